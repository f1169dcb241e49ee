"""Tensors in safetensors files: hashed while they are written, whole or as the shards of several processes.

A file of shards says where each begins in its whole tensor, in the way of torch's distributed checkpoint, whose
``HuggingFaceStorageReader`` reads any part of it on any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CHUNK = 16 * 2**20  # bytes that are written and hashed at a time


@dataclass(frozen=True)
class Shard:
    """This process's part of a tensor, and its position in the whole one (zeros for a whole tensor)."""

    tensor: torch.Tensor
    offset: tuple[int, ...]


def shards_of(state: dict[str, torch.Tensor], is_main: bool) -> dict[str, Shard]:
    """What this process writes of ``state``: its shards of sharded tensors, and on the main process all others.

    Of shards that several processes hold (HSDP), the first one writes.
    """
    from torch.distributed.tensor import DTensor

    found = {}
    for name, tensor in state.items():
        if not isinstance(tensor, DTensor):
            if is_main:
                found[name] = Shard(tensor.detach(), (0,) * tensor.ndim)
            continue
        position = tensor.device_mesh.get_coordinate()
        copies = [place for place, kind in zip(position, tensor.placements, strict=True) if kind.is_replicate()]
        local = tensor.detach().to_local()
        if any(copies) or not local.numel():
            continue
        (chunk,) = tensor.__create_chunk_list__()
        found[name] = Shard(local, tuple(chunk.offsets))
    return found


class Snapshot:
    """Copies of tensors on the CPU, which stay as they are while training goes on.

    The memory is kept for the next copy: the first use of new memory takes longer than the copy itself.
    """

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def take(self, state: dict[str, Shard]) -> dict[str, Shard]:
        """Copies of ``state``; those of the call before are overwritten."""
        import torch

        taken = {}
        for name, shard in state.items():
            copy = self.kept.get(name)
            if copy is None or copy.shape != shard.tensor.shape or copy.dtype != shard.tensor.dtype:
                copy = torch.empty(shard.tensor.shape, dtype=shard.tensor.dtype)
            copy.copy_(shard.tensor, non_blocking=True)
            taken[name] = Shard(copy, shard.offset)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.kept = {name: shard.tensor for name, shard in taken.items()}
        return taken


def write_tensors(path: Path, state: dict[str, Shard], sharded: bool) -> dict[str, Any]:
    """Writes a safetensors file, of whole tensors or ``sharded``; returns its ``bytes`` and ``sha256``.

    The digest is computed while the file is written. Neither needs Python's lock, so that training goes on beside it.

    Raises:
        OSError: the disk is full or not writable.
    """
    import torch

    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
        torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    }  # fmt: skip
    # Types with more bytes first, so that each tensor begins at a multiple of its own.
    order = sorted(state, key=lambda name: (-state[name].tensor.element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    if sharded:
        where = {name: {"saved_offsets": list(shard.offset)} for name, shard in state.items()}
        header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(where)
    begin = 0
    for name in order:
        tensor = state[name].tensor
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "xb", buffering=0) as file, ThreadPoolExecutor(1) as hashing:
        for part in (len(text).to_bytes(8, "little"), text, *_chunks(state, order)):
            hashed = hashing.submit(digest.update, part)
            try:
                _write_all(file.fileno(), part)
            finally:
                hashed.result()
    return {"bytes": 8 + len(text) + begin, "sha256": digest.hexdigest()}


def _chunks(state: dict[str, Shard], order: list[str]) -> Iterator[memoryview]:
    import torch

    for name in order:
        tensor = state[name].tensor.cpu().contiguous()
        if tensor.numel():
            content = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            yield from (content[start : start + CHUNK] for start in range(0, len(content), CHUNK))


def _write_all(descriptor: int, part: bytes | memoryview) -> None:
    left = memoryview(part)
    while left:
        left = left[os.write(descriptor, left) :]


def sha256(path: Path) -> str:
    """The SHA-256 digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def saved_shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> shape and type of the whole tensors whose shards are in the files of ``folder``."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in known.items()}


def read_shards(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Fills the tensors of ``state``, whole or sharded, from the shards in ``folder``; call it on every process.

    Each process reads only what it holds.
    """
    from torch.distributed import checkpoint

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        checkpoint.load(state, storage_reader=checkpoint.HuggingFaceStorageReader(str(folder)))
