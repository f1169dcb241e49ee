"""NPZ files from anywhere, read with care: a header may claim any size, and nothing is unpickled."""

from __future__ import annotations

import math
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from accelerando.base.errors import first_line
from accelerando.base.model_folder import LFS_POINTER

MOST_BYTES = 2**29  # of an array: 12 hours of keypoints, or half an hour of features
ONE_HEADER = threading.Lock()  # numpy parses them with ast, which fails in two threads at once (cpython issue 106905)
OTHER_FORMATS = {
    b"\x93NUMPY": "a single array, as np.save writes it; write it with np.savez(file, X=array)",
    b"\x80": "a pickle, which is never loaded; write it with np.savez(file, X=array)",
    b"\x89HDF": "an HDF5 file; write its arrays with np.savez",
    LFS_POINTER: "a git-LFS pointer, not the file itself: run git lfs pull",
}


@dataclass(frozen=True)
class Arrays:
    """An open NPZ file."""

    archive: zipfile.ZipFile

    @property
    def names(self) -> list[str]:
        """The names of its arrays."""
        return [name.removesuffix(".npy") for name in self.archive.namelist()]

    def read(self, name: str) -> np.ndarray:
        """The array called ``name``. ValueError: it is damaged, too large, or contains Python objects."""
        member = f"{name}.npy" if f"{name}.npy" in self.archive.namelist() else name
        try:
            with self.archive.open(member) as file:
                shape, by_columns, dtype = _read_header(file, self.archive.getinfo(member).file_size)
                order = "F" if by_columns else "C"
                return np.ndarray(shape, dtype, buffer=bytearray(file.read()), order=order)
        except Exception as error:  # zipfile, zlib and numpy have errors of their own
            reason = "it is encrypted" if "encrypted" in str(error) else first_line(error)
            raise ValueError(reason) from None


@contextmanager
def open_npz(path: str | Path) -> Iterator[Arrays]:
    """The arrays of a file. ValueError or OSError: it is no NPZ file, or cannot be read."""
    path = Path(path)  # the code in a model card gives a name
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("not an ordinary file")
    with open(path, "rb") as file:
        head = file.read(64)
        if not head.startswith(b"PK"):
            known = (what for magic, what in OTHER_FORMATS.items() if head.startswith(magic))
            raise ValueError(next(known, "no zip archive") if head else "the file is empty")
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:  # zipfile passes on errors of numbers and texts
            raise ValueError(f"corrupted or truncated: {first_line(error)}") from None
        with archive:
            yield Arrays(archive)


def _read_header(file: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is stored by columns, and type of the array that begins in ``file``.

    Raises:
        ValueError: it cannot be read into memory, or has not ``size`` bytes in all.
    """
    if file.read(6) != b"\x93NUMPY":
        raise ValueError("it is not a numpy array")
    version = tuple(file.read(2))
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"numpy's format {'.'.join(map(str, version))} is unknown")
    # Of version 3 only the encoding of names in the header differs.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with ONE_HEADER:
        shape, by_columns, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("allow_pickle: it contains Python objects")
    if min(shape, default=1) < 0:
        raise ValueError(f"its header claims the shape {shape}")
    claimed = math.prod(shape) * dtype.itemsize
    if claimed > MOST_BYTES:
        raise ValueError(
            f"its header claims {claimed:,} bytes ({dtype} {list(shape)}); at most {MOST_BYTES:,} are read"
        )
    if claimed != size - file.tell():
        raise ValueError(f"its header claims {claimed:,} bytes, but {size - file.tell():,} follow")
    return shape, by_columns, dtype
