"""Memory-mapped arrays in data sets that worker processes get: the file is passed on, not a copy of its content."""

from __future__ import annotations

import numpy as np


def by_file(values: np.ndarray) -> np.ndarray | str:
    """The file of a whole memory-mapped .npy file; another array as it is."""
    file = getattr(values, "filename", None)
    return values if file is None else str(file)


def opened(values: np.ndarray | str) -> np.ndarray:
    """The array that :func:`by_file` was called with, mapped again."""
    return np.load(values, mmap_mode="r", allow_pickle=False) if isinstance(values, str) else values
