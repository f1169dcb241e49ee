"""Files and folders that are there whole or not at all, locks, and the cache folder."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError

if TYPE_CHECKING:
    pass


def cache_folder(named: str | None = None) -> Path:
    """What can be made again is kept in ``named``, else in $ACCELERANDO_CACHE, else in ~/.cache/accelerando."""
    return Path(named or os.environ.get("ACCELERANDO_CACHE") or Path.home() / ".cache" / "accelerando")


def expand_braces(pattern: str) -> list[str]:
    """``a{00..02}.tar`` -> a00.tar, a01.tar, a02.tar; ``{x,y}`` -> x, y; several braces are combined."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        return [pattern]
    low, high, choices = match.groups()
    words = choices.split(",") if choices else [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return [rest for word in words for rest in expand_braces(pattern[: match.start()] + word + pattern[match.end() :])]


LOCK = ".lock"


LOCK_PATIENCE = 5.0  # seconds: a process that was told to stop needs some to save


held_locks: dict[Path, Any] = {}


def hold(directory: Path) -> None:
    """Keeps other processes from training in ``directory`` until the run is finished or this process ends.

    A lock of POSIX: workers do not inherit it, and it goes with the process, however that ends. Where the file system
    has none, nothing is kept out.

    Raises:
        UserError: another process has it, and still has after ``LOCK_PATIENCE``.
    """
    import fcntl
    import socket

    path = directory.resolve() / LOCK
    if path in held_locks:  # closing any file of it would give the lock away
        return
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError:  # not writable, which the first save says
        return
    limit = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > limit:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(
                    f"{directory} is in use by {holder}: wait for its end or stop it, or give another --run_name"
                ) from None
            time.sleep(0.2)
        except OSError:
            return
    held_locks[path] = file
    with contextlib.suppress(OSError):  # a full disk, which the first save says
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()


def is_unused(directory: Path) -> bool:
    """Whether a folder is not there, or has nothing in it but the lock of a run that did not come to begin."""
    return not directory.exists() or (directory.is_dir() and all(path.name == LOCK for path in directory.iterdir()))


def write_text(path: Path, text: str) -> None:
    """Replaces a text file whole."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def fresh_draft(target: Path) -> Path:
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Brings a folder's list of names to the disk, after a rename in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A draft to fill, which takes the place of ``folder`` when the block ends well: it is there whole or not at all.

    A block that fails or is interrupted leaves ``folder`` as it was; what a killed one left, the next one removes.
    """
    target = folder.resolve()  # of a link, the folder behind it is replaced
    draft, old = target.with_name(f"{target.name}.draft"), target.with_name(f"{target.name}.old")
    if old.exists() and not target.exists():  # killed between the two renames below
        old.rename(target)
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield draft
        if target.exists():
            target.rename(old)
        draft.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def release(directory: Path) -> None:
    """Lets others into a folder that :func:`hold` keeps."""
    if file := held_locks.pop(directory.resolve() / LOCK, None):
        file.close()
