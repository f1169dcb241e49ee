"""Pictures decoded once and kept as pixels in one memory-mapped file, so that an epoch decodes none."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.base.errors import UserError
from accelerando.base.files import derived, whole_folder
from accelerando.data.decode import Picture
from accelerando.data.folders import ImageFiles

VERSION = 1  # of what is kept; another one is another cache
FEW = 256  # pictures that one process reads sooner than several start
LARGE = 2e9  # bytes of a cache that are worth a word beforehand


@dataclass(frozen=True)
class CachedImages(ImageFiles):
    """Picture files whose pixels are in the folder ``cache``, at its ``places`` [n]; made by :func:`cached_images`.

    A picture is kept with its shorter side at ``side`` pixels, resized as evaluation does it, and a smaller one at its
    own size. Every process maps the same file; none copies it.
    """

    cache: Path
    side: int
    places: np.ndarray

    def picture(self, row: int) -> Picture | None:
        """The picture of a row; None: it cannot be read."""
        starts, shapes, pixels = self._arrays
        place = self.places[row]
        height, width, file_height, file_width = shapes[place].tolist()
        if not height:
            return None
        found = pixels[starts[place] : starts[place + 1]].reshape(height, width, 3)
        return Picture(found, (file_height, file_width))

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        starts, shapes = (
            np.load(self.cache / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("starts", "shapes")
        )
        pixels = np.memmap(self.cache / "pixels.bin", np.uint8, "r") if starts[-1] else np.zeros(0, np.uint8)
        return np.asarray(starts), np.asarray(shapes), np.asarray(pixels)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_arrays"}


def cached_images(splits: dict[str, ImageFiles], side: int, cache: Path, workers: int = 0) -> dict[str, CachedImages]:
    """The pictures of ``splits``, all of one folder, decoded and kept under ``cache``, or found there.

    What is kept depends on all of the pictures together, so that the folds of a cross-validation share it; on their
    names, sizes and times, and on ``side``, the shorter side in pixels. Processes and runs that want the same cache
    wait for the one that makes it. A picture that cannot be read is kept as such.

    Args:
        workers: processes that decode; 0: one for each core.

    Raises:
        UserError: ``cache`` cannot be written to, or is too small; a picture is not there any more.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    folders = {files.folder for files in splits.values()}
    if len(folders) != 1:
        raise ValueError(f"pictures of several folders: {sorted(map(str, folders))}")
    folder = folders.pop()
    names = pc.unique(pa.chunked_array([files.names for files in splits.values()]))
    names = names.take(pc.sort_indices(names))
    target = cache.absolute() / "images" / fingerprint(folder, names, side)
    paths = [str(folder / name) for name in names.to_pylist()]
    derived(target, lambda target: check(target, len(paths)), lambda target: _make(target, paths, side, workers))
    places = {split: pc.index_in(files.names, value_set=names).to_numpy() for split, files in splits.items()}
    return {
        split: CachedImages(files.folder, files.names, files.classes, target, side, places[split])
        for split, files in splits.items()
    }


def fingerprint(folder: Path, names: Any, side: int) -> str:
    """What the cache of these pictures is called: it changes with any name, size or time, and with ``side``."""
    digest = hashlib.sha256(json.dumps([VERSION, side]).encode())
    for name in names.to_pylist():
        try:
            facts = (folder / name).stat()
        except FileNotFoundError:
            raise UserError(f"{folder / name}: no such file any more: start again") from None
        digest.update(f"{name}|{facts.st_size}|{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def check(target: Path, count: int) -> None:
    """ValueError, EOFError or OSError where ``target`` is no whole cache of ``count`` pictures."""
    starts, shapes = (np.load(target / f"{name}.npy", allow_pickle=False) for name in ("starts", "shapes"))
    length = (target / "pixels.bin").stat().st_size
    if starts.shape != (count + 1,) or shapes.shape != (count, 4):
        raise ValueError(f"starts.npy and shapes.npy are not those of {count:,} pictures")
    if starts[0] or (np.diff(starts) != 3 * shapes[:, 0].astype(np.int64) * shapes[:, 1]).any():
        raise ValueError("starts.npy and shapes.npy do not agree")
    if length != starts[-1]:
        raise ValueError(f"pixels.bin has {length:,} bytes instead of {starts[-1]:,}")


# ------------------------------------------------------------------------------------------------------------ making


def _make(target: Path, paths: list[str], side: int, workers: int) -> None:
    from accelerando.base.log import log, with_progress
    from accelerando.base.processes import map_in_processes

    size = expected_size(paths, side)
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise UserError(f"--cache_dir {target.parent.parent}: {free / 1e9:.1f} GB are free, and the decoded pictures "
                        f"take about {size / 1e9:.1f} GB: free space, or name another folder")  # fmt: skip
    if size > LARGE:
        log.info("Decoded pictures take about %.1f GB in %s", size / 1e9, target)
    workers = (workers or len(os.sched_getaffinity(0))) if len(paths) >= FEW else 0
    shapes = np.zeros((len(paths), 4), np.int32)
    with whole_folder(target) as draft:
        draft.mkdir()
        with open(draft / "pixels.bin", "wb") as file:
            # Few pictures at a time: a worker's results wait in memory for those before them.
            pictures = map_in_processes(functools.partial(_shrink, side), paths, workers, chunk=8)
            for row, picture in enumerate(with_progress(pictures, len(paths), "decoding", "pictures")):
                if picture is not None:
                    shapes[row] = *picture.pixels.shape[:2], *picture.size
                    file.write(picture.pixels.data)
        starts = np.concatenate([[0], np.cumsum(3 * shapes[:, 0].astype(np.int64) * shapes[:, 1])])
        np.save(draft / "starts.npy", starts, allow_pickle=False)
        np.save(draft / "shapes.npy", shapes, allow_pickle=False)
    log.info("Decoded pictures are kept in %s (%s MB)", target, f"{int(starts[-1]) / 1e6:,.1f}")


def expected_size(paths: list[str], side: int) -> float:
    """Bytes of the pixels that a cache keeps of these files, from the headers of a few hundred."""
    from accelerando.data.decode import header_size, is_no_picture

    some = paths[:: max(1, len(paths) // 200)]
    total = 0.0
    for path in some:
        try:
            height, width = header_size(Path(path).read_bytes())
        except (ValueError, OSError) as error:
            if not is_no_picture(error):
                raise
            continue
        shrunk = min(1.0, side / min(height, width))
        total += 3 * height * width * shrunk**2
    return total * len(paths) / len(some)


def _shrink(side: int, path: str) -> Picture | None:
    """A picture as the cache keeps it; None: it cannot be read. In a process of its own, on one core."""
    import multiprocessing

    import torch

    from accelerando.data.decode import header_size, is_no_picture, pixels_of, resize_shorter, to_tensor

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)
    try:
        file = Path(path).read_bytes()
        pixels, size = pixels_of(file, side), header_size(file)
    except (ValueError, OSError) as error:
        if not is_no_picture(error):
            raise
        return None
    if min(pixels.shape[:2]) > side:  # a smaller one grows when it is read, as evaluation lets it grow
        pixels = resize_shorter(to_tensor(pixels), side, "bilinear").permute(1, 2, 0).numpy()
    return Picture(np.ascontiguousarray(pixels), size)
