"""Images decoded once and cached as pixels in a memory-mapped file, so that training epochs need no decoding."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from accelerando.base.errors import UserError
from accelerando.base.files import derived, whole_folder
from accelerando.data.decode import DecodedImage
from accelerando.data.digest import file_stamps
from accelerando.data.folders import ImageFiles

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 2  # of the format and of how images are decoded; part of the cache's name
FEW = 256  # below this number of images, starting worker processes takes longer than decoding
LARGE = 2e9  # bytes; a larger cache is announced in the log


@dataclass(frozen=True)
class CachedImages(ImageFiles):
    """Image files whose pixels are in the folder ``cache``, at positions ``places`` [n]; made by :func:`cached_images`.

    Images are stored with a shorter side of ``side`` pixels, resized as in evaluation; smaller ones keep their size.
    All processes map the same file.
    """

    cache: Path
    side: int
    places: np.ndarray

    def decoded(self, row: int) -> DecodedImage | None:
        """The image of a row; None: it cannot be read."""
        starts, shapes, pixels = self._arrays
        place = self.places[row]
        height, width, file_height, file_width = shapes[place].tolist()
        if not height:
            return None
        found = pixels[starts[place] : starts[place + 1]].reshape(height, width, 3)
        return DecodedImage(found, (file_height, file_width))

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        starts, shapes = (
            np.load(self.cache / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("starts", "shapes")
        )
        pixels = np.memmap(self.cache / "pixels.bin", np.uint8, "r") if starts[-1] else np.zeros(0, np.uint8)
        return np.asarray(starts), np.asarray(shapes), np.asarray(pixels)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_arrays"}


def cached_images(splits: dict[str, ImageFiles], side: int, cache: Path, workers: int = 0) -> dict[str, CachedImages]:
    """The images of ``splits``, all in one folder, decoded into ``cache`` unless they are already there.

    The cache covers the images of all splits, so that the folds of a cross-validation share it. It is identified by
    the names, sizes and modification times of the files and by ``side``, the shorter side in pixels. If several
    processes or runs need the same cache, one makes it and the others wait. Unreadable images are recorded as such.

    Args:
        workers: processes that decode; 0: one for each core.

    Raises:
        UserError: ``cache`` cannot be written to, or has too little space; an image no longer exists; the images are
            in several folders.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    folders = {files.folder for files in splits.values()}
    if len(folders) != 1:
        some = " and ".join(map(str, sorted(folders)))
        raise UserError(
            f"--cache: the images are in {some}: name the folder that holds all of them with --media_folder"
        )
    folder = folders.pop()
    names = pc.unique(pa.chunked_array([files.names for files in splits.values()]))
    names = names.take(pc.sort_indices(names))
    target = cache.absolute() / "images" / fingerprint(folder, names, side)
    paths = [str(folder / name) for name in names.to_pylist()]
    derived(target, lambda target: check(target, len(paths)), lambda target: _make(target, paths, side, workers))
    places = {split: pc.index_in(files.names, value_set=names).to_numpy() for split, files in splits.items()}
    return {
        split: CachedImages(files.folder, files.names, files.classes, target, side, places[split], others=files.others)
        for split, files in splits.items()
    }


def fingerprint(folder: Path, names: pa.Array, side: int) -> str:
    """The name of the cache of these images; it changes with any file's name, size or time, and with ``side``."""
    facts = file_stamps(folder, names.to_pylist())
    return hashlib.sha256(json.dumps([VERSION, side, facts]).encode()).hexdigest()[:32]


def check(target: Path, count: int) -> None:
    """Raises ValueError, EOFError or OSError if ``target`` is not a complete cache of ``count`` images."""
    starts, shapes = (np.load(target / f"{name}.npy", allow_pickle=False) for name in ("starts", "shapes"))
    length = (target / "pixels.bin").stat().st_size
    if starts.shape != (count + 1,) or shapes.shape != (count, 4):
        raise ValueError(f"starts.npy and shapes.npy are not those of {count:,} images")
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
        raise UserError(
            f"--cache_dir {target.parent.parent}: {free / 1e9:.1f} GB are free, but the decoded images take about "
            f"{size / 1e9:.1f} GB: free some space or name another folder"
        )
    if size > LARGE:
        log.info("The decoded images will take about %.1f GB in %s", size / 1e9, target)
    workers = (workers or len(os.sched_getaffinity(0))) if len(paths) >= FEW else 0
    shapes = np.zeros((len(paths), 4), np.int32)
    with whole_folder(target) as draft:
        draft.mkdir()
        with open(draft / "pixels.bin", "wb") as file:
            # Small chunks: results are held in memory until the earlier ones have been written.
            images = map_in_processes(functools.partial(_shrink, side), paths, workers, chunk=8)
            for row, image in enumerate(with_progress(images, len(paths), "decoding", "images")):
                if image is not None:
                    shapes[row] = *image.pixels.shape[:2], *image.size
                    file.write(image.pixels.data)
        starts = np.concatenate([[0], np.cumsum(3 * shapes[:, 0].astype(np.int64) * shapes[:, 1])])
        np.save(draft / "starts.npy", starts, allow_pickle=False)
        np.save(draft / "shapes.npy", shapes, allow_pickle=False)
    log.info("Decoded images are cached in %s (%s MB)", target, f"{int(starts[-1]) / 1e6:,.1f}")


def expected_size(paths: list[str], side: int) -> float:
    """Estimated bytes of pixels in a cache of these files, from the headers of a few hundred of them."""
    from accelerando.data.decode import header_size, is_unreadable

    some = paths[:: max(1, len(paths) // 200)]
    total = 0.0
    for path in some:
        try:
            height, width = header_size(Path(path).read_bytes())
        except (ValueError, OSError) as error:
            if not is_unreadable(error):
                raise
            continue
        shrunk = min(1.0, side / min(height, width))
        total += 3 * height * width * shrunk**2
    return total * len(paths) / len(some)


def _shrink(side: int, path: str) -> DecodedImage | None:
    """An image as the cache stores it; None: it cannot be read. A worker process uses one core."""
    import multiprocessing

    import torch

    from accelerando.data.decode import decode, is_unreadable, resize_shorter, to_tensor

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)
    try:
        image = decode(Path(path).read_bytes(), side)
    except (ValueError, OSError) as error:
        if not is_unreadable(error):
            raise
        return None
    pixels = image.pixels
    if min(pixels.shape[:2]) > side:  # a smaller one is enlarged when it is read, as in evaluation
        pixels = resize_shorter(to_tensor(pixels), side, "bilinear").permute(1, 2, 0).numpy()
    return DecodedImage(np.ascontiguousarray(pixels), image.size)
