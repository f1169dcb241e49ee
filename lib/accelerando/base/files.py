"""Files and folders that are there whole or not at all, locks, derived data in the cache folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import glob
import math
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from accelerando.base.errors import UserError
from accelerando.base.log import log

T = TypeVar("T")

LOCK = ".lock"  # in a run folder
LOCK_PATIENCE = 5.0  # seconds: a process that was told to stop needs some to save
STALE = 60.0  # seconds that the draft of a process not seen here is untouched: it may be another machine's
DAMAGED = (OSError, ValueError, EOFError, KeyError)  # what reading a damaged file raises


def expand_braces(pattern: str) -> list[str]:
    """``a{00..02}.tar`` -> a00.tar, a01.tar, a02.tar; ``{x,y}`` -> x, y; several braces are combined."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        return [pattern]
    low, high, choices = match.groups()
    words = choices.split(",") if choices else [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return [rest for word in words for rest in expand_braces(pattern[: match.start()] + word + pattern[match.end() :])]


# ------------------------------------------------------------------------------------------------- files and folders


@contextlib.contextmanager
def open_whole(path: Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """A file to write, which takes the place of ``path`` when the block ends well: it is there whole or not at all.

    It is on the disk before it has its name. Until then it lies beside ``path`` under a name that no other process has,
    and is removed when the block fails; what a killed process left of it goes when ``path`` is next written. Text is
    UTF-8; ``options`` are those of ``open``.
    """
    target = path.resolve()  # of a link, the file behind it is replaced
    _remove_stale_drafts(target)
    draft = _draft_of(target)
    try:
        with open(draft, mode, **({} if "b" in mode else {"encoding": "utf-8", **options})) as file:
            yield file
        _sync(draft)
        os.replace(draft, target)
    finally:
        _remove(draft)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with open_whole(path) as file:
        file.write(text)


@contextlib.contextmanager
def whole_folder(folder: Path, file_by_file: bool = False) -> Iterator[Path]:
    """A draft to make and fill, which takes the place of ``folder`` when the block ends well: whole or not at all.

    It is on the disk before it has its name. A block that fails or is interrupted leaves ``folder`` as it was; what a
    killed one left, the next one removes, or puts back where it was killed between the two renames.

    ``file_by_file``: ``folder`` keeps what else is in it, and each file is replaced whole.
    """
    target = folder.resolve()  # of a link, the folder behind it is replaced
    old = _old_of(target)
    put_back(target)
    _remove(old)
    _remove_stale_drafts(target)
    draft = _draft_of(target)
    try:
        yield draft
        for path in (draft, *draft.rglob("*")):
            _sync(path)
        if file_by_file:
            for path in sorted(path for path in draft.rglob("*") if not path.is_dir()):
                place = target / path.relative_to(draft)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
            _sync(target)
        else:
            if target.exists():
                target.rename(old)
            draft.rename(target)
            _sync(target.parent)
    finally:
        put_back(target)
        _remove(draft)
    _remove(old)


def put_back(folder: Path) -> None:
    """Undoes half of what :func:`whole_folder` does where it was killed or failed between its two renames."""
    if not folder.exists() and _old_of(folder).exists():
        _old_of(folder).rename(folder)


def remove_drafts(folder: Path, name: str | None = None) -> None:
    """Removes all drafts in ``folder``, or those of one ``name``. For whoever holds a lock: others may write them."""
    for draft in folder.glob(f".{glob.escape(name)}.*.draft" if name else ".*.draft"):
        _remove(draft)


def _draft_of(target: Path) -> Path:
    # Process numbers alone would meet: several containers may share a disk.
    return target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(3).hex()}.draft")


def _old_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _remove_stale_drafts(target: Path) -> None:
    for draft in _drafts_in(target.parent):
        match = re.fullmatch(rf"\.{re.escape(target.name)}\.(\d+)-[0-9a-f]+\.draft", draft.name)
        if match and not _is_running(int(match[1])):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - draft.stat().st_mtime > STALE:
                    _remove(draft)


@functools.cache
def _drafts_in(folder: Path) -> list[Path]:
    """The drafts that this process found when it first wrote to ``folder``: one look, however many files it writes."""
    return list(folder.glob(".*.draft"))


def _is_running(process: int) -> bool:
    with contextlib.suppress(PermissionError):  # another user's
        try:
            os.kill(process, 0)
        except (ProcessLookupError, OverflowError):
            return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(path: Path) -> None:
    """Brings a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------- locks


_threads: dict[Path, threading.Lock] = {}  # POSIX locks keep processes apart, not threads
os.register_at_fork(after_in_child=_threads.clear)  # those of threads that a child does not have


@contextlib.contextmanager
def locked(path: Path, patience: float = math.inf) -> Iterator[IO[str]]:
    """Keeps other processes and threads out of the block; ``path`` is a file, which is made and stays.

    A lock of POSIX: a forked process neither inherits it nor gives it away, and it goes with the process, however that
    ends. Where the file system has none, other processes are not kept out. Nothing else in this process may open
    ``path``: to close it would give the lock away. Yields the open file.

    Raises:
        BlockingIOError: somebody else has it, and still has after ``patience`` seconds.
        OSError: the file cannot be made.
    """
    path = path.resolve()
    limit, pause = time.monotonic() + patience, 0.01
    own = _threads.setdefault(path, threading.Lock())
    with contextlib.ExitStack() as stack:
        if not own.acquire(timeout=min(patience, threading.TIMEOUT_MAX)):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))
        stack.callback(own.release)
        file = stack.enter_context(open(path, "a+", encoding="utf-8"))
        while True:
            try:  # again and again: a wait in the kernel fails where two processes' threads seem to wait for each other
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= limit:
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path)) from None
                time.sleep(pause)
                pause = min(0.2, 1.5 * pause)
            except OSError:
                break
        yield file


held_locks: dict[Path, contextlib.ExitStack] = {}


def hold(directory: Path) -> None:
    """Keeps other processes from training in ``directory`` until the run is finished or this process ends.

    What a killed one left half written in it is removed.

    Raises:
        UserError: another process has it, and still has after ``LOCK_PATIENCE``.
    """
    path = directory.resolve() / LOCK
    if path in held_locks:
        return
    lock = contextlib.ExitStack()
    try:
        file = lock.enter_context(locked(path, LOCK_PATIENCE))
    except BlockingIOError:
        holder = path.read_text(encoding="utf-8").strip() or "another process"
        raise UserError(
            f"{directory} is in use by {holder}: wait for its end or stop it, or give another --run_name"
        ) from None
    except OSError:  # not writable, which the first save says
        return
    held_locks[path] = lock
    remove_drafts(directory)
    with contextlib.suppress(OSError):  # a full disk, which the first save says
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()


def release(directory: Path) -> None:
    """Lets others into a folder that :func:`hold` keeps."""
    if lock := held_locks.pop(directory.resolve() / LOCK, None):
        lock.close()


def is_unused(directory: Path) -> bool:
    """Whether a folder is not there, or has nothing in it but the lock of a run that did not come to begin."""
    return not directory.exists() or (directory.is_dir() and all(path.name == LOCK for path in directory.iterdir()))


# ------------------------------------------------------------------------------------------------------ derived data


def cache_folder(named: str | None = None) -> Path:
    """What can be made again is kept in ``named``, else in $ACCELERANDO_CACHE, else in ~/.cache/accelerando.

    Raises:
        UserError: there is no home directory.
    """
    if found := named or os.environ.get("ACCELERANDO_CACHE"):
        return Path(found)
    try:
        return Path.home() / ".cache" / "accelerando"
    except RuntimeError:
        raise UserError("there is no home directory to keep data in: name a folder with --cache_dir") from None


def derived(target: Path, read: Callable[[Path], T], make: Callable[[Path], None]) -> T:
    """What ``read`` finds at ``target``, a file or folder in a folder of the cache; ``make`` makes it where it must.

    Of processes that want it at once one makes it, and the others wait. ``read`` raises one of ``DAMAGED`` for what is
    not whole, which is then made again; ``make`` uses :func:`open_whole` or :func:`whole_folder`.

    Raises:
        UserError: the cache cannot be written to, or the disk is full.
    """
    with contextlib.suppress(*DAMAGED):
        return read(target)
    cache, lock = target.parent.parent, target.with_name(f"{target.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(lock, patience=0))
            except BlockingIOError:
                log.info("Another run makes %s: waiting for it", target)
                stack.enter_context(locked(lock))
        except OSError as error:
            raise UserError(f"--cache_dir {cache}: {error.strerror}; name a folder to write to") from None
        try:
            return read(target)  # another run may have made it meanwhile
        except DAMAGED as error:
            if target.exists():
                log.warning("%s is damaged and made again: %s", target, error)
        remove_drafts(target.parent, target.name)
        try:
            make(target)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"--cache_dir {cache}: {error.strerror}: free space, or name another folder") from None
        return read(target)
