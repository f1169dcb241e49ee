"""The metrics that a run records: metrics.jsonl, metrics.csv and the trackers."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.config import flat, to_yaml
from accelerando.base.errors import UserError
from accelerando.base.files import write_text
from accelerando.base.texts import MARK, without_credentials
from accelerando.train.trackers import KEEP_FILES, Tracker, check_trackers

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from accelerando.train.state import Run

EVERY_FEW_STEPS = ("train", "gradients")  # kinds of rows that metrics.csv leaves out


def record(run: Run, kind: str, values: dict[str, Any]) -> None:
    """Adds a line to ``metrics.jsonl`` and sends the numbers to the trackers as ``kind/name``.

    ``kind`` is "train" or "gradients" (every ``log_every`` steps), "validation" (every evaluation) or "test";
    ``metrics.csv`` has the last two.
    """
    row = {"kind": kind, "step": run.state.step, "epoch": round(run.state.epochs_done, 4), **values}
    run.history.append(row)
    if not run.accelerator.is_main_process:
        return
    with open(run.directory / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if kind not in EVERY_FEW_STEPS:
        _write_csv(run)
    group = f"{kind}_{values['split']}" if "split" in values else kind
    numbers = {f"{group}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
    for tracker in run.trackers:
        tracker.log(numbers, step=run.state.step)


def as_floats(values: Mapping[str, float]) -> dict[str, float]:
    """Metrics as Python's numbers: JSON and some trackers cannot represent numpy's."""
    return {name: float(value) for name, value in values.items()}


def evaluations(run: Run) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` that come from an evaluation on the validation set."""
    return [row for row in run.history if row["kind"] == "validation"]


def read_history(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` in a run or checkpoint: all, or those of one kind (train, validation, test).

    Empty if nothing was recorded yet. A truncated last line of a killed run is ignored.

    Raises:
        UserError: another line is invalid.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if kind in (None, row["kind"]):
                rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not a row of metrics") from None
    return rows


def write_history(run: Run) -> None:
    write_text(run.directory / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in run.history))
    _write_csv(run)


def _write_csv(run: Run) -> None:
    import csv
    import io

    rows = [row for row in run.history if row["kind"] not in EVERY_FEW_STEPS]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or ["kind", "step", "epoch"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(run.directory / "metrics.csv", text.getvalue())


def open_tracker(
    name: str, directory: Path, settings: Mapping[str, Any], known: str | None, resumed_step: int | None = None
) -> GeneralTracker:
    """Accelerate's tracker ``name`` of the run in ``directory``, not yet started.

    ``known``: the id under which it continues a record, ``resumed_step``: the step of the checkpoint that a run
    continues from.
    """
    from accelerate import tracking

    project, title = settings["experiment_name"], directory.name
    if name == "tensorboard":
        purge = {} if resumed_step is None else {"purge_step": resumed_step + 1}
        return tracking.TensorBoardTracker("tensorboard", str(directory), **purge)
    if name == "wandb":
        return tracking.WandBTracker(
            settings["wandb_project"],
            entity=settings["wandb_entity"],
            name=settings["wandb_name"] or title,
            group=settings["wandb_group"],
            tags=settings["wandb_tags"] or None,
            notes=settings["wandb_notes"],
            dir=str(directory),
            **({"id": known, "resume": "allow"} if known else {}),
        )
    if name == "mlflow":
        return tracking.MLflowTracker(project, run_id=known, run_name=title)
    if name == "trackio":
        same = {"name": known, "resume": "allow"} if known else {"name": title}
        return tracking.TrackioTracker(project, embed=False, auto_log_cpu=False, **same)
    if name == "swanlab":
        same = {"id": known, "resume": "allow"} if known else {}
        return tracking.SwanLabTracker(project, experiment_name=title, logdir=str(directory / "swanlab"), **same)
    if name == "comet_ml":
        same = {"experiment_key": known, "mode": "get_or_create"} if known else {}
        return tracking.CometMLTracker(project, **same)
    if name == "clearml":
        same = {"continue_last_task": known} if known else {"reuse_last_task_id": False}
        return tracking.ClearMLTracker(project, project_name=project, task_name=title, **same)
    if name == "aim":
        same = {"run_hash": known} if known else {}
        return tracking.AimTracker(title, str(directory), experiment=project, **same)
    folder = str(directory / "dvclive")
    return tracking.DVCLiveTracker(title, dir=folder, resume=resumed_step is not None, save_dvc_exp=False)


def identity_of(tracker: GeneralTracker) -> str | None:
    """The id under which a resumed run continues the tracker's record; None where the run's folder is the record."""
    name = tracker.name
    if name == "mlflow":
        return tracker.active_run.info.run_id
    if name == "trackio":
        return tracker.run.name
    if name in ("wandb", "swanlab"):
        return tracker.run.id
    if name == "comet_ml":
        return tracker.writer.get_key()
    if name == "clearml":
        return tracker.task.id
    return tracker.writer.hash if name == "aim" else None


def start_trackers(run: Run) -> None:
    """Starts the trackers of ``report_to`` on the main process; their ids are saved in ``run.state``.

    Raises:
        UserError: one fails to start.
    """
    if not run.accelerator.is_main_process:
        return
    settings = flat(run.args)
    for name in dict.fromkeys(name for name in run.args.report_to if name != "none"):
        resumed_step = run.state.step if run.resumed else None
        tracker = Tracker(open_tracker(name, run.directory, settings, run.state.trackers.get(name), resumed_step))

        def begin(its: GeneralTracker = tracker.tracker) -> str | None:
            with _quietly():
                its.start()
                identity = identity_of(its)
                # TensorBoard shows them as text; trackio forgets those of a run that is continued.
                if its.name == "trackio" or (its.name != "tensorboard" and not run.resumed):
                    its.store_init_configuration(dict(settings))
            return identity

        if (identity := tracker.start(begin)) is not None:
            run.state.trackers[name] = identity
        run.trackers.append(tracker)
        if not run.resumed:
            tracker.add_text("config", f"```yaml\n{to_yaml(run.args)}```", 0)


def add_to_trackers(
    directory: Path, settings: Mapping[str, Any], identities: Mapping[str, str], folder: Path
) -> list[str]:
    """Adds all files of ``folder``, under its name, to the records of the finished run in ``directory``.

    ``identities``: the ids that ``results.json`` has under "trackers". Gives the trackers that have got them.

    Raises:
        UserError: a tracker fails or does not answer.
    """
    names = [name for name in identities if name in KEEP_FILES]
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for name in names:
        check_trackers((name,))
        tracker = Tracker(open_tracker(name, directory, settings, identities[name]))

        def begin(its: GeneralTracker = tracker.tracker) -> None:
            with _quietly():
                its.start()

        tracker.start(begin)
        tracker.add_files(folder.parent, paths)
        if missing := tracker.finish():
            raise UserError(f"{name}: {missing} files were not sent; try again later")
    return names


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """While a tracker starts it prints nothing, and reads a command line without credentials (wandb records it)."""
    before, sys.argv = sys.argv, [without_credentials(word, MARK) for word in sys.argv]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the process waits meanwhile
            yield
    finally:
        sys.argv = before
