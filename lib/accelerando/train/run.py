"""The run directory, its log and trackers, the Accelerator and the seeds: everything around the loop."""

from __future__ import annotations

import dataclasses
import json
import logging
import logging.handlers
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.config import flat, read_yaml, to_yaml
from accelerando.base.errors import Stopped, UserError
from accelerando.base.files import LOCK, held_locks, hold, is_unused, write_text
from accelerando.base.log import SUCCESS, attach_log_file, log, on_terminal
from accelerando.train.accelerator import describe_processes
from accelerando.train.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    remove_later_checkpoints,
    restore_best,
    save_checkpoint,
    step_folders,
)
from accelerando.train.state import Run, TrainState
from accelerando.train.stop import StopSignal
from accelerando.train.tracking import read_history, start_trackers, write_history

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from accelerando.train.averages import Ema
    from accelerando.train.optim import Schedule

logging.addLevelName(SUCCESS, "SUCCESS")


# ----------------------------------------------------------------------------------------------------- accelerator


# --------------------------------------------------------------------------------------------------- run directory


def choose_directory(args: Any, default_name: str) -> Path:
    """The folder of this run; nothing is written yet.

    Raises:
        UserError: it exists and neither ``resume`` nor ``overwrite`` was given; ``resume`` names no run.
    """
    if args.resume and args.resume != "auto":
        path = Path(args.resume)
        for folder in (path, *path.parents[:2]):
            if (folder / "checkpoints").is_dir():
                return folder
        hint = (
            "; --resume without a folder looks in the bucket" if getattr(args, "enable_s3_checkpoints", False) else ""
        )
        raise UserError(
            f"--resume {path}: no run there; give a folder with checkpoints/ in it, such as runs/<name>{hint}"
        )
    directory = Path(args.output_dir) / (args.run_name or default_name)
    if directory.is_file():
        raise UserError(f"{directory} is a file: choose another --output_dir or --run_name")
    if not is_unused(directory) and not args.resume:
        if not args.overwrite:
            raise UserError(
                f"{directory} exists: --resume goes on with it, --overwrite starts it again, --run_name names another"
            )
        if not (directory / "config.yaml").is_file():
            raise UserError(f"--overwrite {directory}: not a run (no config.yaml in it), so it is left alone")
    return directory


def short_name(model_name: str) -> str:
    """What to call a model: the last part of its path that says more than ``best`` does."""
    path = Path(model_name)
    return path.parent.name if path.name in ("model", "best", "last") and path.parent.name else path.name


def join_name(*parts: str) -> str:
    """A name for a folder, from parts of any characters."""
    return "_".join(parts).replace("/", "-").replace(" ", "-")


def start_run(accelerator: Accelerator, args: Any, default_name: str, remote: str | None = None) -> Run:
    """Makes the run directory (or opens it again), starts log and trackers; called when data and model are ready.

    A run that is resumed gets its counters and its history from the checkpoint it will go on from. ``remote`` is the
    URL of a folder where each run keeps its checkpoints too, and finds them if they are newer than those here.
    """
    directory = choose_directory(args, default_name)
    accelerator.wait_for_everyone()  # every process has looked before the main one makes the folder
    run = Run(directory, accelerator, args, TrainState(), remote=remote and f"{remote}/{directory.name}")
    if accelerator.is_main_process and directory.is_dir():
        hold(directory)
    if remote and accelerator.is_main_process:
        _look_for_remote_checkpoint(run)
    accelerator.wait_for_everyone()
    if args.resume:
        named = Path(args.resume) if re.fullmatch(r"step_\d+", Path(args.resume).name) else None
        run.resumed = find_checkpoint(accelerator, named or run.checkpoints, log.warning)
        if named and not run.resumed:
            there = ", ".join(path.name for path in step_folders(run.checkpoints)) or "none"
            raise UserError(f"--resume {named}: no complete checkpoint; there are {there}")
    if accelerator.is_main_process:
        try:
            _prepare_directory(run)
        except OSError as error:
            raise UserError(f"cannot make {directory}: {error.strerror}") from None
    accelerator.wait_for_everyone()
    if run.resumed:
        if accelerator.is_main_process:
            remove_later_checkpoints(run.resumed, log.warning)
            if run.remote:
                from accelerando.train.remote_checkpoints import remove_remote_after

                remove_remote_after(run.remote, int(run.resumed.name[5:]))
            restore_best(run.resumed, directory / "best")
        content = json.loads((run.resumed / "state.json").read_text(encoding="utf-8"))
        run.state = TrainState(**content["state"])
        run.history = read_history(run.resumed / "metrics.jsonl")
    if accelerator.is_main_process:
        write_history(run)
        attach_log_file(directory / "logs" / "train.log")
    log.info("Run directory %s", directory)
    log.info("%s", describe_processes(accelerator))
    if args.resume and not run.resumed:
        log.warning("No checkpoint in %s yet: starting from the beginning", directory)
    start_trackers(run)
    run.stop = StopSignal()
    return run


def _look_for_remote_checkpoint(run: Run) -> None:
    """Fetches the newest remote checkpoint of a run that is resumed, if it is newer than those here.

    Raises:
        UserError: there are some and the run is to start anew; the bucket is missing or cannot be reached.
    """
    from accelerando.train.remote_checkpoints import fetch_checkpoint, newest_remote_checkpoint, remove_remote_after

    newest = newest_remote_checkpoint(run.remote)
    if newest is None:
        return
    if run.args.resume:
        here = [int(path.name[5:]) for path in step_folders(run.checkpoints)]
        if int(newest[5:]) > max(here, default=-1):
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            path = fetch_checkpoint(run.remote, newest, run.checkpoints, log.warning)
            log.info("Fetched %s from %s", path.name, run.remote)
    elif run.args.overwrite:
        remove_remote_after(run.remote, -1)
    else:
        raise UserError(
            f"{run.remote} has checkpoints of a run of this name: --resume goes on with it, --overwrite starts it "
            "again, --run_name names another"
        )


def _prepare_directory(run: Run) -> None:
    directory, args = run.directory, run.args
    if directory.exists() and args.overwrite and not args.resume:
        # All but the lock, which is held; last what marks it as a run, should this be interrupted.
        for path in sorted(directory.iterdir(), key=lambda path: path.name == "config.yaml"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    for name in ("checkpoints", "logs", "plots"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    hold(directory)
    config = directory / "config.yaml"
    if run.resumed and config.is_file():
        before = {key: value for group in read_yaml(config).values() for key, value in group.items()}
        for key, value in flat(args).items():
            if key in before and before[key] != value:
                log.warning("Resumed with another %s: %s instead of %s", key, value, before[key])
    write_text(config, to_yaml(args))


# -------------------------------------------------------------------------------------------------------------- log


# ------------------------------------------------------------------------------------------------ metrics, trackers


# ------------------------------------------------------------------------------------------------- saving and ending


def save(
    run: Run, model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, keep: int,
    ema: Ema | None = None,
) -> Path:  # fmt: skip
    """A checkpoint of this moment, on every process; see :func:`train.checkpoint.save_checkpoint`."""
    state = dataclasses.asdict(run.state)
    path = save_checkpoint(
        run.accelerator, run.checkpoints, run.state.step, model, optimizer, schedule, state, keep,
        run.directory / "best", ema, run.history,
    )  # fmt: skip
    log.info("Saved %s", path, extra={"only_file": on_terminal()})
    if run.remote and run.accelerator.is_main_process:
        from accelerando.train.remote_checkpoints import prune_remote, upload_checkpoint

        try:
            upload_checkpoint(path, run.remote)
            prune_remote(run.remote, keep)
            log.info("Uploaded to %s/%s", run.remote, path.name, extra={"only_file": on_terminal()})
        except UserError as error:
            log.warning("Not uploaded: %s; %s is complete, and the next checkpoint will be tried", error, path)
    return path


def restore(
    run: Run, model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, ema: Ema | None = None
) -> None:
    """Goes on from the checkpoint that :func:`start_run` found, if there is one."""
    if run.resumed is None:
        return
    load_checkpoint(run.accelerator, run.resumed, model, optimizer, schedule, ema)
    log.info(
        "Resumed from %s: step %d, epoch %d, %d samples into it",
        run.resumed, run.state.step, run.state.epoch + 1, run.state.position,
    )  # fmt: skip


def leave_after_stop(run: Run, checkpoint: Path | None) -> None:
    """Ends the run after a stop signal; never returns."""
    for tracker in run.trackers:
        tracker.finish()
    if checkpoint is None:
        raise Stopped("stopped by a signal", run.stop.exit_code)
    log.warning("Stopped by a signal: %s is complete; the same command with --resume goes on", checkpoint)
    raise Stopped("", run.stop.exit_code)


def finish_run(run: Run) -> None:
    """Closes trackers and processes, and lets others into the folder."""
    for tracker in run.trackers:
        tracker.finish()
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    if file := held_locks.pop(run.directory.resolve() / LOCK, None):
        file.close()


# -------------------------------------------------------------------------------------------------- inside the loop
