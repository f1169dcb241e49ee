"""One line for an error that the user can fix, a traceback for a bug."""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from accelerando.base.texts import one_line, without_credentials

_waits = True  # for the exit handlers of packages; see leave_without_waiting


class UserError(Exception):
    """An error that the user can fix: printed as one line, exit code 2."""

    def __init__(self, message: str) -> None:
        # torch raises the error of a reading process again, with that process's traceback before the message.
        start = f"\n{__name__}.UserError: "
        message = message.rpartition(start)[2].strip() if start in message else message
        super().__init__(without_credentials(one_line(message)))


class Stopped(Exception):  # noqa: N818  (an end, not an error)
    """The run was asked to stop and has saved a checkpoint; ``exit_code`` is 128 + signal, as in a shell."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_main_rank() -> bool:
    """True on the process whose launcher rank is 0; works before torch is imported."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Around ``main()``: a :class:`UserError` becomes ``error: ...`` on rank 0 and exit code 2 on every rank."""
    try:
        yield
    except UserError as error:
        leave(f"error: {error}", 2)
    except Stopped as stopped:
        leave(str(stopped), stopped.exit_code)
    except KeyboardInterrupt:
        leave("interrupted", 130)
    except Exception as error:
        line = _cause_outside(error)
        if line is None:
            raise
        leave(f"error: {line}", 2)
    else:
        end_rank(0)


def is_disk_full(error: BaseException) -> bool:
    """True also for the errors of numpy ("8 requested and 0 written") and safetensors, which have no number."""
    words = r"\d+ requested and \d+ written|No space left on device|Disk quota exceeded"
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or bool(re.search(words, str(error)))


# Errors of the system that say what is wrong with a path, wherever it is used.
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
             errno.ELOOP, errno.EIO)  # fmt: skip


def _cause_outside(error: Exception) -> str | None:
    """A line for an error whose cause is the disk, a path or the batch size; None for all others."""
    if is_disk_full(error):
        reason = first_line(error) if getattr(error, "errno", None) else "No space left on device"
        hint = "everything saved before is intact: free some space, then run it again (training: with --resume)"
        return f"{reason}; {hint}"
    if isinstance(error, OSError) and error.errno in NO_ACCESS and error.filename:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
        line = f"cannot use {name}: {error.strerror}; name another path or change its permissions"
        return str(UserError(line))
    if "Expected more than 1 value per channel" in str(error):  # raised by torch's batch norm
        return "a batch has a single sample, but batch norm needs at least two: change --batch_size by one"
    return None


def leave(message: str, exit_code: int) -> None:
    """Prints ``message`` once and exits; destroys the process group first, so that no rank warns about it."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0 and message:  # one process of each machine
        print(message, file=sys.stderr, flush=True)
    elif exit_code == 2:
        time.sleep(1)  # at the first exit, the launcher ends the others: the one that prints should be the first
    if exit_code and message:
        _tell_launcher(message)
    if "torch" in sys.modules:
        distributed = sys.modules["torch"].distributed
        # If only this rank failed, the others wait in a collective, and destroying the group here would hang.
        if exit_code != 2 and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    end_rank(exit_code)
    sys.exit(exit_code)


def _tell_launcher(message: str) -> None:
    """Makes ``message`` the cause in the launcher's own report, which stands below the lines of its traceback.

    torchrun (and so ``accelerate launch``) names a file for it, in the format of torch's ``ErrorHandler``. So the
    error of a process that prints nothing is shown too.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": said}))


def leave_without_waiting() -> None:
    """From now on this process ends without its exit handlers, some of which would wait for a server for minutes."""
    global _waits
    _waits = False


def end_rank(exit_code: int) -> None:
    """Ends a process of a distributed run after its exit handlers, and one that must not wait for them without.

    Does nothing in any other single-process run.

    gloo's threads may still use the interpreter while it shuts down, which sometimes aborts the process
    (pytorch/pytorch#179291): a successful run would be reported as failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or not _waits:
        if _waits:
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # the reader of the pipe has exited
                stream.flush()
        os._exit(exit_code)
