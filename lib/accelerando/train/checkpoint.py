"""Checkpoints for exact resume: written atomically, verified before they are used.

A checkpoint is a folder ``checkpoints/step_000500`` with ``model.safetensors`` and ``optimizer.safetensors`` (unsharded
tensors under the model's own names, so that they load on any number of processes), ``state.json`` (position, schedule,
scaler, counters), ``rng.json`` (the random states of every process), ``metrics.jsonl`` (the history), ``best/`` (the
best model so far; its weights are hard links, which need no space until a better one is found) and ``manifest.json``
(size and SHA-256 of each file). Nothing in it is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError
from accelerando.base.files import restore_folder, whole_folder
from accelerando.base.processes import gather_objects
from accelerando.base.rng import rng_state, set_rng_state
from accelerando.train.accelerator import is_sharded, unwrapped
from accelerando.train.averages import Ema, averaged
from accelerando.train.weights import contiguous, main_process_writes, model_state, set_model_state

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from accelerando.train.optim import Schedule

MANIFEST = "manifest.json"
FORMAT = 1  # of a checkpoint; another version of this library may write another one
REQUIRED = ("model.safetensors", "optimizer.safetensors", "state.json", "rng.json", "metrics.jsonl")


# ----------------------------------------------------------------------------------------------------------- saving


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    state: dict[str, Any],
    keep: int,
    best: Path,
    ema: Ema,
    history: Sequence[dict[str, Any]] = (),
) -> Path:
    """Saves everything exact resume needs as ``folder/step_NNNNNN`` and removes all but the ``keep`` newest.

    Call it on every process. ``state``: the run's counters, for JSON; ``best``: the folder of the best model so far;
    ``history``: the rows of metrics.jsonl.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are not affected.
    """
    tensors, optimizer_rest = _split_tensors(_optimizer_state(accelerator, model, optimizer))
    weights = model_state(accelerator, model)
    with averaged(ema):
        average = {} if not ema.is_on else {name: t.clone() for name, t in model_state(accelerator, model).items()}
    rng = gather_objects(accelerator, rng_state(accelerator))
    scaler = getattr(accelerator, "scaler", None)
    content = {
        "format": FORMAT,
        "step": step,
        "num_processes": accelerator.num_processes,
        "state": state,
        "schedule": schedule.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "optimizer": optimizer_rest,
    }
    target = folder / f"step_{step:06d}"

    def write(draft: Path) -> None:
        from safetensors.torch import save_file

        draft.mkdir(parents=True)
        save_file(contiguous(weights), draft / "model.safetensors", metadata={"format": "pt"})
        save_file(contiguous(tensors), draft / "optimizer.safetensors", metadata={"format": "pt"})
        if average:
            save_file(contiguous(average), draft / "ema.safetensors", metadata={"format": "pt"})
        (draft / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        (draft / "rng.json").write_text(json.dumps(rng), encoding="utf-8")
        (draft / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
        if best.is_dir():
            _copy_model(best, draft / "best")
        _write_manifest(draft)

    with main_process_writes(accelerator, f"checkpoint {target}"):
        if accelerator.is_main_process:
            with whole_folder(target) as draft:
                write(draft)
            _prune(folder, keep, newest=target)
    return target


def _copy_model(source: Path, target: Path) -> None:
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
        _copy_model(checkpoint / "best", best)


def _write_manifest(folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prune(folder: Path, keep: int, newest: Path) -> None:
    for old in [path for path in step_folders(folder) if path != newest][max(0, keep - 1) :]:
        shutil.rmtree(old, ignore_errors=True)
    for draft in folder.glob(".step_*"):  # drafts of a killed run
        shutil.rmtree(draft, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------- loading


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
            if _sha256(path) != expected["sha256"]:
                return f"{name} is corrupted (its checksum differs)"
        known = "state.json" not in files or _read_state(checkpoint).get("format") == FORMAT
        if unlisted := [name for name in REQUIRED if name not in files and known]:
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


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the folder ``path``, which :func:`find_checkpoint` found complete.

    Raises:
        UserError: it was saved by a version of this library that writes another format.
    """
    content = _read_state(path)
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path} was saved by another version of accelerando (format {content.get('format')}, this version reads "
            f"{FORMAT}): resume it with that version, or start again with --overwrite or another --run_name"
        )
    return Checkpoint(path, content)


def load_checkpoint(
    accelerator: Accelerator,
    checkpoint: Checkpoint,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    ema: Ema,
) -> None:
    """Loads ``checkpoint`` into the given objects and restores this process's random states.

    Raises:
        UserError: the checkpoint belongs to another model or another optimizer.
    """
    from safetensors.torch import load_file

    path, content = checkpoint.path, checkpoint.content
    if ema.is_on:
        name = "ema" if (path / "ema.safetensors").is_file() else "model"  # EMA was turned on for the resume
        set_model_state(accelerator, model, load_file(path / f"{name}.safetensors"), source=str(path))
        ema.take_from_weights()
    set_model_state(accelerator, model, load_file(path / "model.safetensors"), source=str(path))
    tensors = load_file(path / "optimizer.safetensors")
    _set_optimizer_state(accelerator, model, optimizer, _join_tensors(content["optimizer"], tensors), path)
    schedule.load_state_dict(content["schedule"])
    scaler = getattr(accelerator, "scaler", None)
    if scaler is not None and content["scaler"]:
        scaler.load_state_dict(content["scaler"])
    rng = json.loads((path / "rng.json").read_text(encoding="utf-8"))
    if accelerator.process_index < len(rng):
        set_rng_state(rng[accelerator.process_index])


# ------------------------------------------------------------------------------------------------- states of a model


def _plain_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _optimizer_state(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=is_sharded(accelerator))
    return get_optimizer_state_dict(unwrapped(accelerator, model), _plain_optimizer(optimizer), options=options)


def _set_optimizer_state(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    checkpoint: Path,
) -> None:
    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    groups = _plain_optimizer(optimizer).param_groups
    saved = state["param_groups"]
    unknown = set(saved[0]) ^ set(groups[0]) if saved else {"groups"}
    if len(saved) != len(groups) or unknown:
        raise UserError(
            f"{checkpoint} was trained with another optimizer or schedule: use the same --optimizer and --scheduler"
        )
    options = StateDictOptions(full_state_dict=True)
    plain = unwrapped(accelerator, model)
    trained = {parameter: parameter.requires_grad for parameter in plain.parameters()}
    # torch expects a state for each trainable parameter. Those that have none yet (a layer that is not yet unfrozen or
    # was not used) must also start without one, so they are frozen while the state is loaded.
    for name, parameter in plain.named_parameters():
        known = name.replace("_orig_mod.", "") in state["state"]
        parameter.requires_grad_(known if state["state"] else trained[parameter])
    try:
        set_optimizer_state_dict(plain, _plain_optimizer(optimizer), state, options=options)
    finally:
        for parameter, before in trained.items():
            parameter.requires_grad_(before)
    # A fused step requires weight and state in the same memory format (channels_last).
    for weight, kept in _plain_optimizer(optimizer).state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                kept[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def _split_tensors(tree: Any, prefix: str = "") -> tuple[dict[str, torch.Tensor], Any]:
    """Separates tensors from nested dicts and lists: ({path: tensor}, the rest with ``{"tensor": path}`` for each)."""
    import torch

    if isinstance(tree, torch.Tensor):
        return {prefix: tree}, {"tensor": prefix}
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(tree, dict):
        rest: Any = {"dict": {}}
        for key, value in tree.items():
            inner, rest["dict"][key] = _split_tensors(value, f"{prefix}/{key}")
            tensors.update(inner)
        return tensors, rest
    if isinstance(tree, list | tuple):
        rest = {"list" if isinstance(tree, list) else "tuple": []}
        for position, value in enumerate(tree):
            inner, kept = _split_tensors(value, f"{prefix}/{position}")
            tensors.update(inner)
            next(iter(rest.values())).append(kept)
        return tensors, rest
    return tensors, {"value": tree}


def _join_tensors(rest: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of :func:`_split_tensors`."""
    ((kind, content),) = rest.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _join_tensors(value, tensors) for key, value in content.items()}
    if kind in ("list", "tuple"):
        items = [_join_tensors(value, tensors) for value in content]
        return items if kind == "list" else tuple(items)
    return content
