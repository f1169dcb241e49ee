"""The metrics that a run records: metrics.jsonl, metrics.csv and the trackers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.config import flat, to_yaml
from accelerando.base.errors import UserError, first_line
from accelerando.base.files import write_text
from accelerando.base.texts import MARK, without_credentials

if TYPE_CHECKING:
    from accelerando.train.state import Run


def record(run: Run, kind: str, values: dict[str, Any]) -> None:
    """Adds a line to ``metrics.jsonl`` and sends the numbers to the trackers as ``kind/name``.

    ``kind`` is "train" (every ``log_every`` steps), "validation" (every evaluation) or "test"; ``metrics.csv`` has all
    but "train".
    """
    row = {"kind": kind, "step": run.state.step, "epoch": round(run.state.epochs_done, 4), **values}
    run.history.append(row)
    if not run.accelerator.is_main_process:
        return
    with open(run.directory / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if kind != "train":
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

    rows = [row for row in run.history if row["kind"] != "train"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or ["kind", "step", "epoch"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(run.directory / "metrics.csv", text.getvalue())


def check_trackers(names: tuple[str, ...]) -> None:
    """UserError if a tracker in ``report_to`` is unknown or not installed."""
    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "none": None}
    for name in names:
        if name not in packages:
            raise UserError(f"--report_to {name}: choose from {', '.join(packages)}")
        if packages[name] and importlib.util.find_spec(packages[name]) is None:
            raise UserError(f"--report_to {name} needs a package: pip install {packages[name]}")


def start_trackers(run: Run) -> None:
    """Starts Accelerate's trackers; their ids are saved so that a resumed run continues the same records."""
    names, settings = [name for name in run.args.report_to if name != "none"], flat(run.args)
    if not run.accelerator.is_main_process:
        return
    from accelerate import tracking

    run_name = run.directory.name
    if "tensorboard" in names:
        purge = {"purge_step": run.state.step + 1} if run.resumed else {}
        run.trackers.append(tracking.TensorBoardTracker("tensorboard", str(run.directory), **purge))
    if "wandb" in names:
        identity = run.state.trackers.get("wandb")
        run.trackers.append(
            tracking.WandBTracker(
                settings["wandb_project"],
                entity=settings["wandb_entity"],
                name=settings["wandb_name"] or run_name,
                group=settings["wandb_group"],
                tags=settings["wandb_tags"] or None,
                notes=settings["wandb_notes"],
                dir=str(run.directory),
                **({"id": identity, "resume": "allow"} if identity else {}),
            )
        )
    if "mlflow" in names:
        run.trackers.append(
            tracking.MLflowTracker(
                settings["experiment_name"], run_id=run.state.trackers.get("mlflow"), run_name=run_name
            )
        )
    for tracker in run.trackers:
        try:
            with _argv_without_credentials():
                tracker.start()
            if tracker.name == "wandb":
                run.state.trackers["wandb"] = tracker.run.id
            if tracker.name == "mlflow":
                run.state.trackers["mlflow"] = tracker.active_run.info.run_id
            if tracker.name != "tensorboard" and not run.resumed:  # TensorBoard shows the settings as text instead
                tracker.store_init_configuration(settings)
        except Exception as error:  # the errors of trackers have no common base class
            raise UserError(f"--report_to {tracker.name}: {first_line(error)}") from error
    for tracker in run.trackers:
        if tracker.name == "tensorboard" and not run.resumed:
            tracker.writer.add_text("config", "```yaml\n" + to_yaml(run.args) + "```", 0)


@contextlib.contextmanager
def _argv_without_credentials() -> Iterator[None]:
    """wandb records the command line of the process."""
    before, sys.argv = sys.argv, [without_credentials(word, MARK) for word in sys.argv]
    try:
        yield
    finally:
        sys.argv = before
