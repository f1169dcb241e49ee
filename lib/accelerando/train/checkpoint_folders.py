"""The folders of checkpoints: found, verified against their manifests, removed when newer ones are there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError
from accelerando.base.files import restore_folder
from accelerando.base.processes import gather_objects
from accelerando.train.tensor_files import sha256

if TYPE_CHECKING:
    from accelerate import Accelerator

MANIFEST = "manifest.json"
# Of a checkpoint; another version of this library may write another one.
WHOLE, SHARDED = 1, 2
REQUIRED = ("state.json", "rng.json", "metrics.jsonl")
TENSORS = ("model", "optimizer")  # .safetensors, or a folder of shards


def copy_model(source: Path, target: Path) -> None:
    """Copies a model: hard links for weights, which are never changed in place, and copies of the other files."""

    def link_or_copy(old: str, new: str) -> None:
        if old.endswith(".safetensors"):
            with contextlib.suppress(OSError):  # the file system has no hard links
                os.link(old, new)
                return
        shutil.copy2(old, new)

    shutil.copytree(source, target, copy_function=link_or_copy)


def restore_best(checkpoint: Path, best: Path) -> None:
    """Restores the best model from ``checkpoint``: ``best`` may be from a later step, or partly replaced."""
    shutil.rmtree(best, ignore_errors=True)
    if (checkpoint / "best").is_dir():
        copy_model(checkpoint / "best", best)


def write_manifest(
    folder: Path, known: dict[str, dict[str, Any]] | None = None, digests: dict[tuple[int, ...], str] | None = None
) -> None:
    """Writes size and SHA-256 of each file in ``folder``; those in ``known`` (path -> both) are not read again.

    ``digests`` keeps those of weights: the best model's are in many checkpoints, as hard links to one file.
    """
    known, digests = known or {}, {} if digests is None else digests
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, facts = path.relative_to(folder).as_posix(), path.stat()
        if name in known:
            files[name] = known[name]
        elif name != MANIFEST:
            identity = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
            digest = digests.get(identity) or sha256(path)
            if path.suffix == ".safetensors":
                digests[identity] = digest
            files[name] = {"bytes": facts.st_size, "sha256": digest}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")


def prune(folder: Path, keep: int, newest: Path) -> None:
    """Removes all but the ``keep`` newest checkpoints, and what killed runs have begun; ``newest`` always stays."""
    for old in [path for path in step_folders(folder) if path != newest][max(0, keep - 1) :]:
        shutil.rmtree(old, ignore_errors=True)
    for draft in folder.glob(".step_*"):  # drafts of a killed run
        shutil.rmtree(draft, ignore_errors=True)


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch("step_[0-9]+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def find_damage(checkpoint: Path) -> str | None:
    """None for an intact checkpoint; otherwise a description of what is missing or corrupted."""
    if not (checkpoint / MANIFEST).is_file():
        return f"{MANIFEST} is missing or corrupted"
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
        with ThreadPoolExecutor(4) as hashing:
            digests = hashing.map(lambda name: sha256(checkpoint / name), files)
            for name, digest in zip(files, digests, strict=True):
                if digest != files[name]["sha256"]:
                    return f"{name} is corrupted (its checksum differs)"
        known = "state.json" not in files or _read_state(checkpoint).get("format") in (WHOLE, SHARDED)
        unlisted = [
            f"{kind}.safetensors"
            for kind in TENSORS
            if not any(name == f"{kind}.safetensors" or name.startswith(f"{kind}/shard-") for name in files)
        ]
        unlisted += [name for name in REQUIRED if name not in files]
        if unlisted and known:
            return f"{MANIFEST} does not list {', '.join(unlisted)}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is missing or corrupted"
    return None


def _read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def find_checkpoint(
    accelerator: Accelerator, folder: Path, warn: Callable[[str], None], verified: Path | None = None
) -> Path | None:
    """The newest complete checkpoint in ``folder`` (or ``folder`` itself), the same on every process.

    A corrupted one is ignored with a warning; the one that was just ``verified`` is not hashed again. None: there are
    no checkpoints.

    Raises:
        UserError: there are checkpoints, but none is complete.
    """
    choice: tuple[str | None, list[str]] = (None, [])
    if accelerator.is_main_process:
        for old in folder.glob(".step_*.old"):  # killed while a step was saved again
            restore_folder(folder / old.name.removeprefix(".").removesuffix(".old"))
        candidates = [folder] if (folder / MANIFEST).is_file() else step_folders(folder)
        damaged = []
        good = None
        for path in candidates:
            problem = None if path == verified else find_damage(path)
            if problem is None:
                good = str(path)
                break
            damaged.append(f"{path}: {problem}")
        choice = (good, damaged)
    good, damaged = gather_objects(accelerator, choice)[0]
    if good is None and damaged:
        raise UserError(f"no complete checkpoint to resume from ({'; '.join(damaged)}): start again with --overwrite")
    for line in damaged:
        warn(f"checkpoint {line}; falling back to {Path(good).name}")
    return Path(good) if good else None


def remove_later_checkpoints(checkpoint: Path, warn: Callable[[str], None]) -> None:
    """Removes the checkpoints after the ``checkpoint`` that a run continues from: corrupted, or about to be replaced.

    Otherwise the new ones would be pruned instead of them, and the next resume would find them.
    """
    for path in step_folders(checkpoint.parent):
        if int(path.name[5:]) > int(checkpoint.name[5:]):
            warn(f"removed {path}: the run continues from {checkpoint.name}")
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder and the content of its ``state.json``."""

    path: Path
    content: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of optimizer steps taken."""
        return int(self.path.name[5:])

    @property
    def is_sharded(self) -> bool:
        """True if each process wrote its own part of the tensors."""
        return self.content["format"] == SHARDED


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the folder ``path``, which :func:`find_checkpoint` found complete.

    Raises:
        UserError: it was saved by a version of this library that writes another format.
    """
    content = _read_state(path)
    if content.get("format") not in (WHOLE, SHARDED):
        raise UserError(
            f"{path} was saved by another version of accelerando (format {content.get('format')}, this version reads "
            f"{WHOLE} and {SHARDED}): resume it with that version, or start again with --overwrite or another "
            "--run_name"
        )
    return Checkpoint(path, content)
