"""The life of a run: choose its folder, start or resume it, save it, finish it."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.config import compared_settings, flat, flat_settings, read_yaml, to_yaml
from accelerando.base.errors import UserError
from accelerando.base.files import LOCK, check_can_be_made, hold, is_unused, release, write_text
from accelerando.base.log import attach_log_file, log, on_terminal
from accelerando.base.processes import command_line
from accelerando.train import range_test
from accelerando.train.accelerator import describe_processes, seed_each_process
from accelerando.train.changed_data import check_data
from accelerando.train.checkpoint import Saver, load_checkpoint, save_checkpoint
from accelerando.train.checkpoint_folders import (
    find_checkpoint,
    open_checkpoint,
    remove_later_checkpoints,
    restore_best,
    step_folders,
)
from accelerando.train.guard import Guard
from accelerando.train.state import Metric, Run, RunArgs, TrainState
from accelerando.train.stop import listen_for_signals
from accelerando.train.tracking import read_history, start_trackers, write_history

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from accelerando.train.averages import Ema
    from accelerando.train.optim import Schedule


LONGEST_NAME = 150  # characters of a run's default name
# What a finished run gives to trackers that keep files.
TRACKED_FILES = ("config.yaml", "summary.txt", "results.json", "metrics.csv", "report.html",
                 "predictions_validation.csv", "predictions_test.csv", "plots/*.png", "logs/*.txt",
                 "logs/train.log")  # fmt: skip


def choose_directory(args: RunArgs, default_name: str, hint: str = "") -> Path:
    """The folder of this run; writes nothing. ``hint`` is added to the message that there is nothing to resume.

    Raises:
        UserError: it exists and neither ``resume`` nor ``overwrite`` is set; ``resume`` does not name a run.
    """
    directory = Path(args.output_dir) / (args.run_name or default_name)
    if args.find_lr:
        return _directory_of_test(args, directory.with_name(directory.name + range_test.SUFFIX))
    if args.resume and args.resume != "auto":
        path = Path(args.resume)
        for folder in (path, *path.parents[:2]):
            if (folder / "checkpoints").is_dir():
                return folder
        # A path of a replaced script, such as data/SignTransformer_last.pt: the run that this command made.
        if path.name.endswith("last.pt") and not path.exists() and (directory / "checkpoints").is_dir():
            return directory
        raise UserError(f"--resume {path}: not a run; name a folder with checkpoints/ in it, such as runs/<name>{hint}")
    if directory.is_file():
        raise UserError(f"{directory} is a file: choose another --output_dir or --run_name")
    check_can_be_made(directory, "--output_dir")
    if not is_unused(directory) and not args.resume:
        if not args.overwrite:
            raise _exists(directory)
        if not (directory / "config.yaml").is_file():
            raise UserError(f"--overwrite {directory}: not a run (no config.yaml in it), so it is not removed")
    return directory


def _directory_of_test(args: RunArgs, directory: Path) -> Path:
    """The folder of a range test, whose last one it replaces; the run itself, and its trackers, see nothing of it."""
    args.resume, args.overwrite, args.report_to, args.inspect = None, True, ("none",), False
    check_can_be_made(directory, "--output_dir")
    if not is_unused(directory) and not (directory / "config.yaml").is_file():
        raise UserError(f"{directory} is not a range test (no config.yaml in it), so it is not replaced")
    return directory


def _exists(directory: Path) -> UserError:
    return UserError(
        f"{directory} exists: --resume continues it, --overwrite starts it again, --run_name names another"
    )


def short_name(model_name: str) -> str:
    """A short name for a model: the last part of its path that is not just ``model``, ``best`` or ``last``."""
    path = Path(model_name)
    return path.parent.name if path.name in ("model", "best", "last") and path.parent.name else path.name


def join_name(*parts: str) -> str:
    """A folder name from parts with arbitrary characters."""
    return "_".join(parts).replace("/", "-").replace(" ", "-")


def default_run_name(args: RunArgs, *parts: str, named: Sequence[str]) -> str:
    """A name for a run from ``parts``, which show the settings ``named``, and from all others that users compare.

    ``run_prefix`` comes first. Instead of very many settings the name ends with a digest of them.
    """
    name = join_name(*([args.run_prefix] if args.run_prefix else []), *parts)
    others = join_name(*compared_settings(args, named))
    if len(name) + len(others) > LONGEST_NAME:
        others = hashlib.sha256(others.encode()).hexdigest()[:8]
    return join_name(name, others) if others else name


def start_run(
    accelerator: Accelerator,
    args: RunArgs,
    directory: Path,
    metrics: Sequence[Metric],
    model_title: str,
    data: Mapping[str, Sized],
    classes: Mapping[str, Sequence[str]],
    remote: str | None = None,
) -> Run:
    """Creates the run directory (or reopens it), starts log and trackers; called when data and model are ready.

    A resumed run gets its counters and history from the checkpoint that it continues from. ``metrics``: in the order in
    which they are shown. ``data``: the data set of each split, ``classes``: the class names of each head; a checkpoint
    that was made with others is refused, see :mod:`train.changed_data`. ``remote`` is the URL of a folder to which runs
    upload their checkpoints, and from which checkpoints newer than the local ones are resumed. From now on stop signals
    are recorded; see :func:`train.stop.stoppable`.

    Raises:
        UserError: the folder is in use, cannot be created, or has no checkpoint that ``resume`` could continue from;
            the data has changed.
    """
    run = Run(directory, accelerator, args, TrainState(), metrics, model_title)
    run.saver = Saver(accelerator)
    run.remote = remote and f"{remote}/{directory.name}"
    fetched = None
    if accelerator.is_main_process:
        if remote and not (args.resume or args.overwrite):
            _check_no_remote_checkpoints(run)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {directory}: {error.strerror}") from None
        hold(directory)
        if not (args.resume or args.overwrite or is_unused(directory)):  # created while this run was loading its data
            raise _exists(directory)
        if remote and args.resume:
            fetched = _fetch_newer(run)
    accelerator.wait_for_everyone()
    if args.resume:
        _find_checkpoint_to_resume(run, fetched)
    check_data(run, data, classes)
    if accelerator.is_main_process:
        try:
            _prepare_directory(run)
        except OSError as error:
            raise UserError(f"cannot write {directory}: {error.strerror}") from None
        write_history(run)
        attach_log_file(directory / "logs" / "train.log")
    accelerator.wait_for_everyone()
    log.info("Run directory %s", directory)
    log.info("%s", describe_processes(accelerator))
    if args.resume and not run.resumed:
        log.warning("No checkpoint in %s yet: starting from the beginning", directory)
    start_trackers(run)
    listen_for_signals()
    return run


def _check_no_remote_checkpoints(run: Run) -> None:
    from accelerando.train.remote_checkpoints import newest_remote_checkpoint

    if newest_remote_checkpoint(run.remote):
        raise UserError(
            f"{run.remote} has checkpoints of a run with this name: --resume continues it, --overwrite starts it "
            "again, --run_name names another"
        )


def _fetch_newer(run: Run) -> Path | None:
    """Fetches the newest remote checkpoint if it is newer than the local ones."""
    from accelerando.train.remote_checkpoints import fetch_checkpoint, newest_remote_checkpoint

    newest = newest_remote_checkpoint(run.remote)
    here = [int(path.name[5:]) for path in step_folders(run.checkpoints)]
    if newest is None or int(newest[5:]) <= max(here, default=-1):
        return None
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    path = fetch_checkpoint(run.remote, newest, run.checkpoints, log.warning)
    log.info("Fetched %s from %s", path.name, run.remote)
    return path


def _find_checkpoint_to_resume(run: Run, fetched: Path | None) -> None:
    """Sets ``run.resumed``, ``state`` and ``history`` from the newest complete checkpoint, or the named one."""
    named = Path(run.args.resume) if re.fullmatch("step_[0-9]+", Path(run.args.resume).name) else None
    found = find_checkpoint(run.accelerator, named or run.checkpoints, log.warning, verified=fetched)
    if named and not found:
        there = ", ".join(path.name for path in step_folders(run.checkpoints)) or "none"
        raise UserError(f"--resume {named}: no complete checkpoint; there are {there}")
    if found:
        run.resumed = open_checkpoint(found)
        run.state = TrainState.from_json(run.resumed.content["state"])
        run.history = read_history(found)
    chosen = run.state.chosen
    if all(getattr(run.args, name) == given for name, (given, _) in chosen.items()):
        for name, (_, value) in chosen.items():
            setattr(run.args, name, value)


def _prepare_directory(run: Run) -> None:
    directory, args = run.directory, run.args
    if args.overwrite and not args.resume:
        # Everything except the lock, which is held. config.yaml last: if this is interrupted, it still is a run.
        for path in sorted(directory.iterdir(), key=lambda path: path.name == "config.yaml"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        _remove_remote_after(run, -1)
    for name in ("checkpoints", "logs", "plots"):
        (directory / name).mkdir(exist_ok=True)
    config = directory / "config.yaml"
    if run.resumed:
        before = flat_settings(read_yaml(config)) if config.is_file() else {}
        for key, value in flat(args).items():
            if key in before and before[key] != value:
                log.warning("Resumed with a different %s: %s instead of %s", key, value, before[key])
        remove_later_checkpoints(run.resumed.path, log.warning)
        _remove_remote_after(run, run.resumed.step)
        restore_best(run.resumed.path, directory / "best")
    write_text(config, to_yaml(args))


def keep_choice(run: Run, **settings: Any) -> None:
    """Replaces ``settings`` that were chosen automatically by what was chosen, also in ``config.yaml``.

    A run that is resumed or repeated then keeps it: on a busy machine another choice might be made.
    """
    for name, value in settings.items():
        run.state.chosen[name] = [getattr(run.args, name), value]
        setattr(run.args, name, value)
    if run.accelerator.is_main_process:
        write_text(run.directory / "config.yaml", to_yaml(run.args))


def repeat_command(run: Run) -> str:
    """The command that repeats ``run``: the one that started it, with what was chosen automatically."""
    words = [command_line()]
    for name, (_, value) in run.state.chosen.items():
        words.append((f"--{name}" if value else f"--no_{name}") if isinstance(value, bool) else f"--{name} {value}")
    return " ".join(words)


def _remove_remote_after(run: Run, step: int) -> None:
    if run.remote:
        from accelerando.train.remote_checkpoints import remove_remote_after

        remove_remote_after(run.remote, step)


def save(run: Run, model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, ema: Ema) -> Path:
    """Saves a checkpoint; call it on every process. See :func:`train.checkpoint.save_checkpoint`.

    With ``background_save`` training goes on meanwhile, except at the end of the run and when it is stopped.
    """
    last = run.is_over or run.is_stopping
    return save_checkpoint(
        run.saver,
        run.checkpoints,
        run.state.step,
        model,
        optimizer,
        schedule,
        dataclasses.asdict(run.state),
        run.args.keep_checkpoints,
        run.directory / "best",
        ema,
        run.history,
        in_background=run.args.background_save and not last,
        when_saved=lambda path: _report_saved(run, path),
    )


def _report_saved(run: Run, path: Path) -> None:
    """Logs that the checkpoint ``path`` is complete, and uploads it."""
    log.info("Saved %s", path, extra={"only_file": on_terminal()})
    if not run.remote:
        return
    from accelerando.train.remote_checkpoints import prune_remote, upload_checkpoint

    try:
        upload_checkpoint(path, run.remote)
        prune_remote(run.remote, run.args.keep_checkpoints)
        log.info("Uploaded to %s/%s", run.remote, path.name, extra={"only_file": on_terminal()})
    except UserError as error:
        log.warning("Not uploaded: %s; %s is complete, and the next checkpoint will be uploaded", error, path)


def restore(run: Run, model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, ema: Ema) -> None:
    """Loads the checkpoint that :func:`start_run` found; in a new run, only seeds each process differently."""
    run.guard = Guard(model, optimizer, run.accelerator.device)
    if run.args.find_lr:
        run.range_test = range_test.RangeTest(optimizer, run.args.lr)
    seed_each_process(run.args.seed, run.accelerator)
    ema.steps = run.state.step
    if run.resumed is None:
        return
    load_checkpoint(run.accelerator, run.resumed, model, optimizer, schedule, ema)
    log.info(
        "Resumed from %s: step %d, epoch %d, %d samples into it",
        run.resumed.path,
        run.state.step,
        run.state.epoch + 1,
        run.state.position,
    )


def finish_run(run: Run) -> None:
    """Gives the trackers the run's files and closes them and the process group, and releases the folder."""
    files = sorted(path for pattern in TRACKED_FILES for path in run.directory.glob(pattern))
    for tracker in run.trackers:
        tracker.add_files(run.directory, files)
        tracker.finish()
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    release(run.directory)
