"""Stop signals: SIGTERM, SIGINT, SIGUSR1 and SIGHUP on any process end the run on all of them, after a checkpoint."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from accelerando.base.errors import Stopped
from accelerando.base.log import log
from accelerando.base.processes import heeded, launcher_command, signal_when_parent_dies
from accelerando.train.state import Run


class StopRequested(Exception):  # noqa: N818
    """A process was asked to stop. Raised on all processes at the same point."""


_received: int | None = None  # the signal that this process received


def listen_for_signals() -> None:
    """Records stop signals from now on instead of exiting; a second SIGINT exits immediately.

    The processes exchange the recorded signals after each step and after each batch of an evaluation. If the launcher
    dies without a signal to its child (as Accelerate's does with one process), Linux sends a SIGTERM.
    """
    global _received
    _received = None
    if threading.current_thread() is threading.main_thread():
        for number in heeded(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, _note)
        if launcher_command():
            signal_when_parent_dies(signal.SIGTERM)


def _note(number: int, _frame: FrameType | None) -> None:
    global _received
    if _received is not None and number == signal.SIGINT:
        raise KeyboardInterrupt
    if number == signal.SIGHUP:
        _leave_terminal()
    _received = number


def _leave_terminal() -> None:
    """Output to a terminal that was closed is an error, which must not get in the way of saving: it goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(null, descriptor)
    os.close(null)


def stop_noted() -> bool:
    """True if this process received a stop signal; other processes are not considered."""
    return _received is not None


def raise_if_stopped(run: Run) -> None:
    """Raises :class:`StopRequested` on every process if any of them was asked to stop; a collective operation."""
    stop = stop_noted()
    if run.accelerator.num_processes > 1:
        import torch

        flag = torch.tensor([float(stop)], device=run.accelerator.device)
        stop = run.accelerator.reduce(flag, reduction="sum").item() > 0
    if stop:
        raise StopRequested


@contextmanager
def stoppable(run: Run, on_stop: Callable[[], Path | None] | None = None) -> Iterator[None]:
    """Within the block, a stop signal on any process ends the run cleanly, with exit code 128 + signal.

    ``on_stop`` saves a checkpoint and returns its path; without it, ``--resume`` continues from the last checkpoint, if
    there is one.
    Contexts that the block opened (averaged weights, a progress bar) are closed before it is called.

    Raises:
        Stopped: the run was asked to stop and has saved a checkpoint.
    """
    try:
        yield
    except StopRequested:
        run.is_stopping = True
        saved = run.checkpoints if any(run.checkpoints.glob("step_*")) else None
        checkpoint = on_stop() if on_stop else saved
        for tracker in run.trackers:
            tracker.finish(limit=5)  # whoever asked may kill the process soon
        exit_code = 128 + (_received or signal.SIGTERM)
        if checkpoint is None:
            raise Stopped("stopped by a signal", exit_code) from None
        log.warning("Stopped by a signal: %s is complete; the same command with --resume continues", checkpoint)
        raise Stopped("", exit_code) from None
    except Exception:
        run.saver.join()  # so that a checkpoint that is being written is not lost
        raise
