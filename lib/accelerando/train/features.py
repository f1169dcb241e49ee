"""What a frozen part of a model computes for every sample, once: an array in the cache folder, memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from accelerando.base.files import DAMAGED, derived, whole_folder, write_text
from accelerando.base.log import log
from accelerando.base.processes import gather_objects
from accelerando.train.weights import main_process_writes

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

VERSION = 1  # of the format; part of the cache's name
CHECKED = 2**30  # bytes; the content of a smaller cache is compared with its digest whenever it is opened
KINDS = ("float16", "float32")


def weights_digest(module: torch.nn.Module) -> str:
    """A digest of the names, shapes and values of all parameters and buffers of ``module``; their layout in memory and
    their device do not matter."""
    import torch

    total = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        total.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def cached_features(
    accelerator: Accelerator,
    cache: Path,
    key: Mapping[str, object],
    compute: Callable[[], np.ndarray],
    what: str = "Features",
) -> np.ndarray:
    """The array that ``compute`` returns, float32 or float16 [n, ...], memory-mapped from the folder ``cache``.

    It is computed where it is not there yet, or damaged. ``key`` names everything that the array depends on: weights,
    transform, files with their sizes and times; anything that JSON can hold. Call it on every process; ``compute`` is
    called on all of them or on none, returns the same array on each, and the main process writes it. Of several runs
    that need the same array, one computes it and the others wait. ``what``: what the log calls it.

    Raises:
        UserError: the cache cannot be written to, or the disk is full.
    """
    words = json.dumps({"version": VERSION, **key}, sort_keys=True)
    target = cache.absolute() / "features" / hashlib.sha256(words.encode()).hexdigest()
    values: list[np.ndarray] = []  # once they are computed

    def make(folder: Path) -> None:
        values.append(compute())
        write_features(folder, values[0], words)

    def announced(needed: bool) -> bool:
        """What the main process says, on all of them."""
        return gather_objects(accelerator, needed)[0]

    with main_process_writes(accelerator, f"features {target}"):
        if accelerator.is_main_process:
            asked = []

            def make_together(folder: Path) -> None:
                asked.append(announced(True))
                make(folder)

            try:
                found = derived(target, read_features, make_together)
            finally:
                if not asked:
                    announced(False)
            size = f"{' x '.join(map(str, found.shape))} numbers, {found.nbytes / 1e6:,.1f} MB"
            log.info("%s: %s", f"{what} are cached in {target}" if asked else f"{what} are read from {target}",
                     size)  # fmt: skip
        elif announced(False):
            values.append(compute())
    # Of a launch on several machines, those without the main process may have a disk of their own.
    if any(gather_objects(accelerator, not _is_whole(target))):
        with main_process_writes(accelerator, f"features {target}"):
            values = values or [compute()]
            if accelerator.is_local_main_process:
                derived(target, read_features, lambda folder: write_features(folder, values[0], words))
    return read_features(target)


def write_features(folder: Path, values: np.ndarray, key: str) -> None:
    """Writes a folder that :func:`read_features` reads; ``key`` stands in it for a person who looks."""
    if values.dtype.name not in KINDS:
        raise TypeError(f"features of type {values.dtype}; expected {' or '.join(KINDS)}")
    values = np.ascontiguousarray(values)
    content = {"shape": list(values.shape), "digest": hashlib.sha256(values.data).hexdigest(), "key": json.loads(key)}
    with whole_folder(folder) as draft:
        draft.mkdir()
        np.save(draft / "features.npy", values, allow_pickle=False)
        write_text(draft / "features.json", json.dumps(content, indent=2) + "\n")


def read_features(folder: Path) -> np.ndarray:
    """The memory-mapped array in ``folder``. One of ``files.DAMAGED`` is raised if it is not there, or not whole."""
    content = json.loads((folder / "features.json").read_text(encoding="utf-8"))
    values = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
    if values.dtype.name not in KINDS or list(values.shape) != content["shape"]:
        raise ValueError("features.npy and features.json do not agree")
    if values.nbytes < CHECKED and hashlib.sha256(values.data).hexdigest() != content["digest"]:
        raise ValueError("the content of features.npy has changed")
    return values


def _is_whole(folder: Path) -> bool:
    try:
        read_features(folder)
    except DAMAGED:
        return False
    return True
