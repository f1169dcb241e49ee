"""Copies of checkpoints in a bucket."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError
from accelerando.base.files import whole_folder
from accelerando.base.texts import without_credentials
from accelerando.data.remote import (
    compare,
    facts_of,
    fetch_file,
    filesystem,
    is_no_bucket,
    path_on,
    protocol_of,
    retried,
)
from accelerando.train.checkpoint_folders import MANIFEST, find_damage

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


UPLOAD_PART = 16 * 2**20  # bytes; larger files are uploaded in parts, a few of them at a time


def upload_checkpoint(folder: Path, url: str) -> None:
    """Uploads a local checkpoint to ``url/<its name>``, the manifest last: without it a checkpoint is incomplete.

    An earlier upload of the same step is removed first. Each file is verified on the server (size, and the MD5 sum if
    available) and sent again if it differs.

    Raises:
        UserError: refused, no such bucket, or failed on every try.
    """
    target = f"{url.rstrip('/')}/{folder.name}"
    fs = filesystem(url)
    _remove_step(fs, url, folder.name)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    parts = {"chunksize": UPLOAD_PART, "max_concurrency": 4} if protocol_of(url) in ("s3", "s3a") else {}
    for path in [*files, folder / MANIFEST]:
        there = f"{target}/{path.relative_to(folder).as_posix()}"

        def attempt(path: Path = path, there: str = there) -> None:
            fs.put_file(str(path), path_on(fs, there), **parts)
            facts = facts_of(fs, there)
            compare(path, facts["size"], facts["md5"])

        retried(there, attempt)


def newest_remote_checkpoint(url: str) -> str | None:
    """The name (step_000500) of the newest complete checkpoint under ``url``; None: there is none.

    Raises:
        UserError: no such bucket, refused, or the server cannot be reached.
    """
    steps = _remote_steps(url)
    return next((name for name in steps if MANIFEST in _files_of_step(url, name)), None)


def prune_remote(url: str, keep: int) -> None:
    """Removes all but the ``keep`` newest complete checkpoints under ``url``, and incomplete ones older than those.

    At least one is kept. The manifest is removed first, so that a partly removed checkpoint is incomplete.

    Raises:
        UserError: as in :func:`upload_checkpoint`.
    """
    complete = 0
    for name in _remote_steps(url):
        whole = MANIFEST in _files_of_step(url, name)
        if complete >= max(1, keep) or (complete and not whole):
            _remove_step(filesystem(url), url, name)
        complete += whole


def remove_remote_after(url: str, step: int) -> None:
    """Removes the checkpoints under ``url`` after ``step``, where the run continues or starts again.

    Raises:
        UserError: as in :func:`upload_checkpoint`.
    """
    for name in _remote_steps(url):
        if int(name[5:]) > step:
            _remove_step(filesystem(url), url, name)


def fetch_checkpoint(url: str, name: str, folder: Path, warn: Callable[[str], None]) -> Path:
    """Downloads checkpoint ``name`` from ``url`` to ``folder/name`` and returns that; an intact local copy is kept.

    It is verified against its manifest and written atomically. If it is corrupted, ``warn`` is called and the previous
    checkpoint is used instead.

    Raises:
        UserError: none of them is complete, or the server cannot be reached.
    """
    older = [step for step in _remote_steps(url) if int(step[5:]) <= int(name[5:])]
    for step in older:
        target = folder / step
        if target.is_dir() and find_damage(target) is None:
            return target
        try:
            with whole_folder(target) as draft:
                if problem := _fetch_step(url, step, draft):
                    raise ValueError(problem)
            return target
        except ValueError as problem:
            warn(f"checkpoint {without_credentials(url)}/{step}: {problem}; trying the previous one")
    raise UserError(f"{without_credentials(url)}: no complete checkpoint up to {name}: check the URL")


def _fetch_step(url: str, name: str, draft: Path) -> str | None:
    """Downloads the files that the manifest lists; returns what is wrong with them, or None."""
    there = _files_of_step(url, name)
    if MANIFEST not in there:
        return f"{MANIFEST} is missing"
    fetch_file(f"{url.rstrip('/')}/{name}/{MANIFEST}", draft / MANIFEST)
    try:
        expected = {file: int(facts["bytes"]) for file, facts in json.loads((draft / MANIFEST).read_text()).items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is corrupted"
    for file, size in expected.items():  # checked before the first large download
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts:
            return f"{MANIFEST} names a file outside of it"
        if there.get(file) != size:
            return f"{file} is missing" if file not in there else f"{file} has {there[file]:,} bytes, not {size:,}"
    for file, size in expected.items():
        fetch_file(f"{url.rstrip('/')}/{name}/{file}", draft / file, size)
    return find_damage(draft)


def _remote_steps(url: str) -> list[str]:
    """Names of the checkpoints under ``url``, complete or not, newest first."""
    names = [entry["name"].rstrip("/").rpartition("/")[2] for entry in _inside(url, "ls") if entry["type"] != "file"]
    steps = {name for name in names if re.fullmatch("step_[0-9]+", name)}
    return sorted(steps, key=lambda name: int(name[5:]), reverse=True)


def _files_of_step(url: str, name: str) -> dict[str, int]:
    """Paths within a remote checkpoint -> sizes in bytes."""
    step = f"{url.rstrip('/')}/{name}"
    start = len(path_on(filesystem(url), step)) + 1
    return {entry["name"][start:]: entry["size"] for entry in _inside(step, "find") if entry["type"] == "file"}


def _inside(url: str, how: str) -> list[dict[str, Any]]:
    """The entries of a remote folder (``ls``) or all files below it (``find``); none if there is no such folder."""
    fs = filesystem(url)

    def attempt() -> list[dict[str, Any]]:
        try:
            found = getattr(fs, how)(path_on(fs, url), detail=True)
        except FileNotFoundError as error:
            if is_no_bucket(error):
                raise
            return []
        return list(found.values() if isinstance(found, dict) else found)

    return retried(url, attempt)


def _remove_step(fs: AbstractFileSystem, url: str, name: str) -> None:
    for file in sorted(_files_of_step(url, name), key=lambda file: file != MANIFEST):  # the manifest first
        there = f"{url.rstrip('/')}/{name}/{file}"
        with contextlib.suppress(FileNotFoundError):
            retried(there, lambda there=there: fs.rm_file(path_on(fs, there)))
