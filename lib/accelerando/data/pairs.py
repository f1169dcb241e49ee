"""Image-caption pairs: read, decoded and augmented, with numbers that tell the same picture and the same caption."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accelerando.base.errors import UserError, first_line
from accelerando.data.transforms import ImageTransform

if TYPE_CHECKING:
    from accelerando.data.folders import TablePairs
    from accelerando.data.shards import ShardPairs


@dataclass
class PairDataset:
    """Samples of ``source`` with ``pixel_values`` uint8 [3, S, S], ``caption``, ``image_id``, ``text_id``, ``valid``.

    A pair whose image or caption cannot be read has ``valid`` 0, and nothing of it counts. With ``parts`` other than
    both only the picture or only the caption is read: what evaluation needs, since a picture may have five captions.
    ``rows`` [n] chooses rows of the source.
    """

    source: ShardPairs | TablePairs
    transform: ImageTransform
    seed: int = 0
    parts: str = "both"  # both, image or text
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.source if self.rows is None else self.rows)

    def at(self, row: int, epoch: int) -> dict[str, Any]:
        """The sample as ``epoch`` augments it."""
        row = int(row if self.rows is None else self.rows[row])
        sample: dict[str, Any] = {"valid": 1.0, "image_id": 0, "text_id": 0}
        try:
            file, text = self.source.read(row)
            sample.update(image_id=identity(file), text_id=identity(text))
            if self.parts != "text":
                sample["pixel_values"] = self.transform(file, (self.seed, epoch, row))
            if self.parts != "image":
                sample["caption"] = read_caption(text)
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) not in (None, errno.ENOENT):  # the disk's error, not the picture's
                raise
            import torch

            sample["valid"] = 0.0
            if self.parts != "text":
                sample["pixel_values"] = torch.zeros(3, self.transform.size, self.transform.size, dtype=torch.uint8)
            if self.parts != "image":
                sample["caption"] = ""
        return sample

    def prefetch(self, rows: np.ndarray) -> None:
        """Has what ``rows`` need, in this order, fetched ahead where it is remote."""
        if self.rows is None and hasattr(self.source, "prefetch"):
            self.source.prefetch(rows)

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """The rows of an epoch, int64 [n], as the source likes to be read."""
        from accelerando.data.order import epoch_order

        if self.rows is None and hasattr(self.source, "epoch_order"):
            return self.source.epoch_order(seed, epoch)
        return epoch_order(len(self), seed, epoch)

    def problem(self, row: int) -> str:
        """Where the pair ``row`` comes from and why it cannot be read."""
        row = int(row if self.rows is None else self.rows[row])
        try:
            file, text = self.source.read(row)
            self.transform(file)
            read_caption(text)
        except (ValueError, OSError) as error:
            return f"{self.source.where(row)}: {' '.join(first_line(error).split())}"
        return f"{self.source.where(row)}: now it can be read"


def open_pairs(
    where: str, cache: Path, cache_gb: float, image_folder: str | None, image_column: str, caption_column: str
) -> ShardPairs | TablePairs:
    """The pairs that ``where`` names: shards here or at a URL, or a table of captions of images in ``image_folder``."""
    from accelerando.data.folders import TablePairs
    from accelerando.data.remote import FileCache, RangeReader, is_remote, list_remote
    from accelerando.data.shards import ShardPairs, list_shards
    from accelerando.data.tables import SUFFIXES

    if is_remote(where):
        remote = FileCache(cache / "remote", int(cache_gb * 1e9)) if cache_gb else RangeReader()
        return ShardPairs(list_remote(where), cache, remote)
    if Path(where).suffix.lower() in SUFFIXES:
        folder = Path(image_folder) if image_folder else Path(where).parent
        return TablePairs(where, folder, image_column, caption_column)
    return ShardPairs(list_shards(where), cache)


@dataclass
class FirstPairs:
    """The first ``count`` pairs of a source."""

    source: ShardPairs | TablePairs
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.source))

    def __getattr__(self, name: str) -> Any:
        if name in ("read", "metadata", "where"):
            return getattr(self.source, name)
        raise AttributeError(name)


def report_unreadable(
    accelerator: Any, dataset: Any, split: str, rows: Iterable[int], shown: int = 10, what: str = "pairs"
) -> None:
    """Logs how many pairs of ``split``, on all processes, could not be read, and which. A collective."""
    from accelerando.base.log import log
    from accelerando.base.processes import gather_objects

    everybody = sorted(set().union(*gather_objects(accelerator, [int(row) for row in rows])))
    if everybody and accelerator.is_main_process:
        log.warning("%d of %d %s %s cannot be read and were left out:", len(everybody), len(dataset), split, what)
        for row in everybody[:shown]:
            log.warning("  %s", dataset.problem(row))
        if len(everybody) > shown:
            log.warning("  ... and %d more", len(everybody) - shown)


@dataclass
class Captions:
    """Texts without pictures, as samples."""

    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"valid": 1.0, "image_id": 0, "text_id": row, "caption": self.texts[row]}


def captions(source: Any) -> Iterator[str]:
    """The captions of a source that can be read, one by one."""
    for row in range(len(source)):
        with contextlib.suppress(ValueError):
            yield read_caption(source.read(row)[1])


def identity(content: bytes) -> int:
    """A number of 63 bits that equal contents share."""
    return int.from_bytes(hashlib.blake2b(content.strip(), digest_size=8).digest(), "big") >> 1


def read_caption(text: bytes) -> str:
    """The caption in one line. ValueError where it is empty or not UTF-8."""
    caption = " ".join(text.decode("utf-8").split())
    if not caption:
        raise ValueError("the caption is empty")
    return caption


@dataclass
class Gallery:
    """Each picture and each caption of an evaluation set once.

    ``image_rows`` and ``text_rows`` are rows of the source with a new picture or a new caption; ``image_of`` and
    ``text_of`` int64 [n] lead from each pair to its place in them.
    """

    image_rows: np.ndarray
    text_rows: np.ndarray
    image_of: np.ndarray
    text_of: np.ndarray


def make_gallery(source: ShardPairs | TablePairs, description: str) -> Gallery:
    """Reads every pair once to find out which pictures and captions are the same."""
    from accelerando.base.log import progress_bar

    ids = np.zeros((2, len(source)), np.int64)
    with progress_bar(len(source), 0, " pairs", description) as bar:
        for row in range(len(source)):
            ids[:, row] = [identity(part) for part in source.read(row)]
            bar.update()
    (_, image_rows, image_of), (_, text_rows, text_of) = (
        np.unique(part, return_index=True, return_inverse=True) for part in ids
    )
    return Gallery(image_rows, text_rows, image_of, text_of)


def class_names_of(source: Any, rows: np.ndarray, field: str) -> list[str]:
    """The classes that the metadata of ``rows`` names in ``field``, sorted.

    Raises:
        UserError: fewer than two.
    """
    values = {source.metadata(int(row)).get(field) for row in rows} - {None}
    if len(values) < 2:
        raise UserError(f"--class_field {field}: the .json of the validation pairs names {len(values)} classes with it")
    return sorted(map(str, values))


def image_classes(source: Any, rows: np.ndarray, field: str, names: Sequence[str]) -> np.ndarray:
    """The class of each of ``rows`` by the ``field`` of its metadata, int64 [n]; -1 where it has none.

    Raises:
        UserError: no row has a class that ``names`` knows.
    """
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers.get(str(source.metadata(int(row)).get(field)), -1) for row in rows], np.int64)
    if (labels < 0).all():
        raise UserError(f"--class_field {field}: no picture has one of the class names in its .json metadata")
    return labels
