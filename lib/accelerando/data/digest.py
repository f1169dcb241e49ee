"""Digests of data sets, so that a resumed run notices that its data has changed.

A digest depends on the samples and their order, but not on where the files lie or when they were written: a data set
that was copied or moved has the same one. It is cheap: of images and shards, names and sizes are read, not the pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from accelerando.base.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

MOST_SIZES = 50_000  # files whose sizes are read: on a network disk each takes a request


@runtime_checkable
class Digested(Protocol):
    """Data with a digest; of other data only the number of samples is compared."""

    def digest(self) -> dict[str, str]:
        """A digest of each part of the data, by a word for it: texts, labels."""


def describe(data: Sized) -> dict[str, Any]:
    """The number of samples (``count``), the word for them (``unit``), and the digests if ``data`` has them."""
    return {"count": len(data), "unit": getattr(data, "unit", "samples"), **digest_of(data)}


def digest_of(data: object) -> dict[str, str]:
    """The digest of each part of ``data``; empty if it has none."""
    return data.digest() if isinstance(data, Digested) else {}


def digest(*parts: np.ndarray | pa.Array | pa.ChunkedArray | str | None) -> str:
    """A digest of arrays and texts. The type of Arrow's strings and their division into chunks do not matter."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        if part is None or isinstance(part, str):
            pieces = [part.encode("utf-8", "surrogateescape") if part is not None else b"\0"]
        elif isinstance(part, np.ndarray):
            pieces = [np.ascontiguousarray(part).reshape(-1).view(np.uint8).data]
        else:
            pieces = _bytes_of(part)
        inner = hashlib.blake2b(digest_size=16)
        for piece in pieces:
            inner.update(piece)
        total.update(inner.digest())
    return total.hexdigest()


def _bytes_of(column: pa.Array | pa.ChunkedArray) -> list[bytes | memoryview]:
    """Lengths and bytes of a column of texts (others are written as text), without a Python object for each."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths, texts = [], []
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        chunk = pc.fill_null(pc.cast(chunk, pa.large_string()), "")
        if len(chunk):
            _, offsets, content = chunk.buffers()
            ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            lengths.append(np.diff(ends).data)
            texts.append(memoryview(content)[ends[0] : ends[-1]] if content is not None else b"")
    return [*lengths, *texts]


def file_sizes(folder: Path, names: Sequence[str]) -> np.ndarray:
    """The sizes of files, int64 [m]; -1: it cannot be found. Of very many files every k-th is looked at."""
    names = names[:: max(1, len(names) // MOST_SIZES)]

    def size(name: str) -> int:
        try:
            return os.path.getsize(f"{folder}/{name}")  # noqa: PTH202  (a Path for each of a million files takes longer)
        except OSError:
            return -1

    return np.fromiter(map(size, names), np.int64, len(names))


def file_facts(folder: Path, names: Iterable[str]) -> str:
    """A digest of the names, sizes and modification times of files: of a cache of what was made from them.

    Raises:
        UserError: a file no longer exists.
    """
    total = hashlib.sha256()
    for name in names:
        try:
            facts = (folder / name).stat()
        except FileNotFoundError:
            raise UserError(f"{folder / name}: the file no longer exists: start again") from None
        total.update(f"{name}|{facts.st_size}|{facts.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()
