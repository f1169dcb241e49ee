"""Digests of data sets, so that a resumed run notices that its data has changed.

A digest depends on the samples and their order, but not on where the files lie or when they were written: a data set
that was copied or moved has the same one. It is cheap: of an image its name, its size and its two ends are read, and
the ends again only if the times of the files are not those of before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from accelerando.base.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

MOST_SIZES = 50_000  # files whose sizes and times are read: on a network disk each takes a request
MOST_CONTENTS = 10_000  # files whose ends are read
END = 4096  # bytes


@runtime_checkable
class Digested(Protocol):
    """Data with a digest; of other data only the number of samples is compared."""

    def digest(self) -> dict[str, str]:
        """A digest of each part of the data, by a word for it: texts, labels."""


@runtime_checkable
class InFiles(Digested, Protocol):
    """Data in files whose ``digest`` has, as ``times``, that of the files' times; for others they have none."""

    def contents(self) -> str:
        """A digest of what is in the files."""


def describe(data: Sized, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The number of samples (``count``), the word for them (``unit``), and the digests if ``data`` has them.

    ``before``: an earlier description; files that have the same sizes and times as then are not read again.
    """
    found = {"count": len(data), "unit": getattr(data, "unit", "samples"), **digest_of(data)}
    if "times" in found and isinstance(data, InFiles):
        same = before is not None and before.get("times") == found["times"] and "content" in before
        found["content"] = before["content"] if same else data.contents()
    return found


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


def file_facts(folder: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and times of files, int64 [m] each; -1: it cannot be found. Of very many files every k-th is looked at."""
    names = names[:: max(1, len(names) // MOST_SIZES)]
    found = np.full((2, len(names)), -1, np.int64)
    for number, name in enumerate(names):
        with contextlib.suppress(OSError):
            facts = os.stat(os.path.join(folder, name))  # noqa: PTH116, PTH118  (a million Paths take longer)
            found[:, number] = facts.st_size, facts.st_mtime_ns
    return found[0], found[1]


def file_contents(folder: Path, names: Sequence[str]) -> str:
    """A digest of both ends of each file; of very many files every k-th is read."""
    total = hashlib.blake2b(digest_size=16)
    for name in names[:: max(1, len(names) // MOST_CONTENTS)]:
        try:
            with open(os.path.join(folder, name), "rb", buffering=0) as file:  # noqa: PTH118
                size = os.fstat(file.fileno()).st_size
                total.update(ends_of(file, 0, size))
        except OSError:
            total.update(b"\0")
    return total.hexdigest()


def file_stamps(folder: Path, names: Iterable[str]) -> str:
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


def ends_of(file: IO[bytes], start: int, size: int) -> bytes:
    """The first and the last bytes of a part of a file; all of a small one."""
    file.seek(start)
    if size <= 2 * END:
        return file.read(size)
    first = file.read(END)
    file.seek(start + size - END)
    return first + file.read(END)
