"""One line for an error that the user can fix, a traceback for a bug."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import sys
from collections.abc import Iterator

from accelerando.base.texts import one_line, without_credentials

# Errors of the system that say what is wrong with a path, wherever it is used.
PATH_ERRORS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.EIO)


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
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):  # raised by torch's batch norm
            raise
        leave("error: a batch has a single sample, but batch norm needs at least two: change --batch_size by one", 2)
    except OSError as error:
        if error.errno in PATH_ERRORS and error.filename is not None:
            name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
            leave(f"error: {UserError(f'{name}: {error.strerror}')}", 2)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        hint = "everything saved before is intact: free some space, then run it again (training: with --resume)"
        leave(f"error: {error}; {hint}", 2)
    else:
        end_rank(0)


def leave(message: str, exit_code: int) -> None:
    """Prints ``message`` once and exits; destroys the process group first, so that no rank warns about it."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0 and message:  # one process of each machine
        print(message, file=sys.stderr, flush=True)
    if "torch" in sys.modules:
        distributed = sys.modules["torch"].distributed
        # If only this rank failed, the others wait in a collective, and destroying the group here would hang.
        if exit_code != 2 and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    end_rank(exit_code)
    sys.exit(exit_code)


def end_rank(exit_code: int) -> None:
    """Ends a process of a distributed run after its exit handlers; does nothing in a single-process run.

    gloo's threads may still use the interpreter while it shuts down, which sometimes aborts the process
    (pytorch/pytorch#179291): a successful run would be reported as failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # the reader of the pipe has exited
                stream.flush()
        os._exit(exit_code)
