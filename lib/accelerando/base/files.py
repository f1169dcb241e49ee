"""Files and folders written atomically, locks, and derived data in the cache folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import itertools
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

from accelerando.base.errors import UserError, is_disk_full
from accelerando.base.log import log

T = TypeVar("T")

MOST_NAMES = 100_000  # to which a pattern with braces may expand
LOCK = ".lock"  # in a run folder
LOCK_PATIENCE = 5.0  # seconds to wait for a lock: a process that is asked to stop first saves
STALE = 600.0  # seconds without a write, after which a draft is left behind whose process is not visible here
DAMAGED = (OSError, ValueError, EOFError, KeyError)  # the errors that reading a damaged file raises


def expand_braces(pattern: str) -> list[str]:
    """``a{00..02}.tar`` -> a00.tar, a01.tar, a02.tar; ``{x,y}`` -> x, y; several braces are combined.

    Raises:
        UserError: more than ``MOST_NAMES``.
    """
    names = list(itertools.islice(_expanded(pattern), MOST_NAMES + 1))
    if len(names) > MOST_NAMES:
        raise UserError(f"{pattern}: its braces expand to more than {MOST_NAMES:,} names")
    return names


def _expanded(pattern: str) -> Iterator[str]:
    match = re.search(r"\{(?:([0-9]{1,18})\.\.([0-9]{1,18})|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        yield pattern
        return
    low, high, choices = match.groups()
    numbers = (str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)) if low else ()
    for word in choices.split(",") if choices else numbers:
        yield from _expanded(pattern[: match.start()] + word + pattern[match.end() :])


# ------------------------------------------------------------------------------------------------- files and folders


def check_can_be_made(path: Path, flag: str) -> None:
    """UserError, before long work, if ``path`` cannot be made because of a folder above it; nothing is made yet."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{flag} {path}: {above} is not a folder; name another path")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: {above} is not writable; name another path")


def folders_below(top: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """(folder, names of its subfolders, names of its files), sorted, for ``top`` and all folders below it.

    Links are followed, but no folder is entered twice. A subfolder that the caller removes from the list is not
    entered.

    Raises:
        UserError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}") from None

    seen = set()
    for place, folders, files in os.walk(top, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield Path(place), folders, sorted(files)


def visible_files(top: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """The files below ``top`` with one of ``suffixes``, in any case, without hidden files and folders."""
    for place, folders, files in folders_below(top):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        yield from (place / name for name in files if name.lower().endswith(suffixes) and not name.startswith("."))


@contextlib.contextmanager
def open_whole(path: Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Writes a file atomically: the yielded draft replaces ``path`` when the block ends without an error.

    The draft lies beside ``path`` under a name unique to this process, is synced to disk before it is renamed, and is
    removed if the block fails; the draft of a killed process is removed when ``path`` is written again. Text is UTF-8;
    ``options`` are those of ``open``.
    """
    target = path.resolve()  # follows a symlink, so that the file it points to is replaced
    _remove_stale_drafts(target.parent, target.name)
    draft = _draft_of(target)
    try:
        with open(draft, mode, **({} if "b" in mode else {"encoding": "utf-8", **options})) as file:
            yield file
        _sync(draft)
        os.replace(draft, target)
    finally:
        _remove(draft)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with open_whole(path) as file:
        file.write(text)


@contextlib.contextmanager
def whole_folder(folder: Path, file_by_file: bool = False) -> Iterator[Path]:
    """Writes a folder atomically: the block creates and fills the yielded draft, which then replaces ``folder``.

    The draft is synced to disk before it is renamed. If the block fails or is interrupted, ``folder`` stays as it was.
    After a killed process the next call cleans up, and restores ``folder`` if it was killed between the two renames.

    ``file_by_file``: ``folder`` keeps its other files, and each new file is replaced atomically.
    """
    target = folder.resolve()  # follows a symlink, so that the folder it points to is replaced
    old = _old_of(target)
    restore_folder(target)
    _remove(old)
    _remove_stale_drafts(target.parent, target.name)
    draft = _draft_of(target)
    try:
        yield draft
        _follow_umask(draft)
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
        restore_folder(target)
        _remove(draft)
    _remove(old)


def _follow_umask(draft: Path) -> None:
    """Gives files the mode of any new file: safetensors makes its own readable to their owner alone."""
    probe = draft / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in draft.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode != mode:
            path.chmod(mode)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link to a file that is never changed in place, or a copy on a file system without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def restore_folder(folder: Path) -> None:
    """Restores the old folder if :func:`whole_folder` was killed or failed between its two renames."""
    if not folder.exists() and _old_of(folder).exists():
        _old_of(folder).rename(folder)


def remove_drafts(folder: Path, name: str | None = None) -> None:
    """Removes all drafts in ``folder``, or those of one ``name``. Hold a lock: other processes may be writing them."""
    for draft in folder.glob(f".{glob.escape(name)}.*.draft" if name else ".*.draft"):
        _remove(draft)


def _draft_of(target: Path) -> Path:
    # The process id alone is not unique: ids are reused, and a container nearly always assigns the same one.
    owner = f"{os.getpid()}-{_place()}-{_start_time(os.getpid())}"
    return target.with_name(f".{target.name}.{owner}-{os.urandom(3).hex()}.draft")


def _old_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _remove_stale_drafts(folder: Path, name: str | None = None) -> None:
    """Removes the drafts in ``folder``, or those of one ``name``, whose process has ended."""
    pattern = rf"\.{re.escape(name) if name else '.+'}\.(\d+)-(?:([0-9a-f]{{8}})-(\d+)-)?[0-9a-f]+\.draft"
    for draft in _drafts_in(folder):
        if match := re.fullmatch(pattern, draft.name):
            process, place, start = int(match[1]), match[2], match[3]
            if place == _place():
                patience = math.inf if _start_time(process) == start else 0.0
            else:  # of another machine or container; without a place, of an earlier version
                patience = math.inf if place is None and _is_running(process) else STALE
            with contextlib.suppress(OSError):  # removed meanwhile
                written = max(path.stat().st_mtime for path in (draft, *draft.rglob("*")))
                if time.time() - written > patience:
                    _remove(draft)


@functools.cache
def _drafts_in(folder: Path) -> list[Path]:
    """The drafts in ``folder`` when this process first wrote to it: listed once, however many files it writes."""
    return list(folder.glob(".*.draft"))


@functools.cache
def _place() -> str:
    """Identifies the processes whose ids mean something here: those of this machine or container since its start."""
    words = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not on macOS
        words += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]


def _start_time(process: int) -> str:
    """When a process started, in ticks; "0" if it cannot be found."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    return "0"


def _is_running(process: int) -> bool:
    with contextlib.suppress(PermissionError):  # another user's process
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
    """Flushes a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------- locks


_thread_locks: dict[Path, threading.Lock] = {}  # POSIX locks exclude other processes, not other threads
os.register_at_fork(after_in_child=_thread_locks.clear)  # their threads do not exist in the child


@contextlib.contextmanager
def locked(path: Path, patience: float = math.inf) -> Iterator[IO[str]]:
    """Keeps other processes and threads out of the block; ``path`` is the lock file, which is created and kept.

    This is a POSIX lock: a forked process neither inherits nor releases it, and it is released when the process ends
    in any way. On a file system without locks, other processes are not excluded. Nothing else in this process may open
    ``path``: closing it would release the lock. Yields the open file.

    Raises:
        BlockingIOError: the lock is taken, and still is after ``patience`` seconds.
        OSError: the file cannot be created.
    """
    path = path.resolve()
    limit, pause = time.monotonic() + patience, 0.01
    own = _thread_locks.setdefault(path, threading.Lock())
    with contextlib.ExitStack() as stack:
        if not own.acquire(timeout=min(patience, threading.TIMEOUT_MAX)):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))
        stack.callback(own.release)
        file = stack.enter_context(open(path, "a+", encoding="utf-8"))
        while True:
            try:  # polled: a blocking wait fails if the kernel sees a deadlock between two processes' threads
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

    Removes the drafts of killed processes.

    Raises:
        UserError: another process holds the folder, and still does after ``LOCK_PATIENCE``.
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
            f"{directory} is in use by {holder}: wait until it ends, stop it, or choose another --run_name"
        ) from None
    except OSError:  # not writable: the first save reports it
        return
    held_locks[path] = lock
    remove_drafts(directory)
    with contextlib.suppress(OSError):  # a full disk: the first save reports it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()


def release(directory: Path) -> None:
    """Releases a folder that :func:`hold` has locked."""
    if lock := held_locks.pop(directory.resolve() / LOCK, None):
        lock.close()


def is_unused(directory: Path) -> bool:
    """True if a folder does not exist, or contains only the lock file of a run that never started."""
    return not directory.exists() or (directory.is_dir() and all(path.name == LOCK for path in directory.iterdir()))


# ------------------------------------------------------------------------------------------------------ derived data


def cache_folder(named: str | None = None) -> Path:
    """The folder for derived data: ``named``, else $ACCELERANDO_CACHE, else ~/.cache/accelerando.

    Raises:
        UserError: there is no home directory.
    """
    if found := named or os.environ.get("ACCELERANDO_CACHE"):
        return Path(found)
    try:
        return Path.home() / ".cache" / "accelerando"
    except RuntimeError:
        raise UserError("no home directory for the cache: name a folder with --cache_dir") from None


def derived(target: Path, read: Callable[[Path], T], make: Callable[[Path], None]) -> T:
    """What ``read`` finds at ``target``, a file or folder in a subfolder of the cache; ``make`` creates it if needed.

    If several processes need it at once, one makes it and the others wait. If ``read`` raises one of ``DAMAGED``, the
    target is made again; ``make`` uses :func:`open_whole` or :func:`whole_folder`.

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
                log.info("Another run is making %s: waiting for it", target)
                stack.enter_context(locked(lock))
        except OSError as error:
            raise UserError(f"--cache_dir {cache}: {error.strerror}; name a folder that is writable") from None
        try:
            return read(target)  # another run may have made it meanwhile
        except DAMAGED as error:
            if target.exists():
                log.warning("%s is corrupted and will be made again: %s", target, error)
        remove_drafts(target.parent, target.name)
        _remove_stale_drafts(target.parent)
        try:
            make(target)
        except OSError as error:
            if not is_disk_full(error):
                raise
            reason = error.strerror or "No space left on device"
            raise UserError(f"--cache_dir {cache}: {reason}: free some space or name another folder") from None
        return read(target)
