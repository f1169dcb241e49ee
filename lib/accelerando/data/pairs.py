"""Image-caption pairs: read, decoded and augmented, with ids that identify equal images and equal captions."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from accelerando.base.errors import UserError, first_line
from accelerando.base.log import progress_bar
from accelerando.data.digest import digest, digest_of, file_contents, file_facts, file_stamps
from accelerando.data.duplicates import join_pairs
from accelerando.data.mapped import by_file, opened
from accelerando.data.order import LARGE_PART, epoch_order
from accelerando.data.table_formats import table_suffix
from accelerando.data.tables import read_text_table
from accelerando.data.transforms import ImageTransform

if TYPE_CHECKING:
    import torch

    from accelerando.data.order import Order


class PairSource(Protocol):
    """Where pairs are read from, by row number."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> tuple[bytes, bytes]:
        """The image file and the caption, UTF-8."""

    def metadata(self, row: int) -> dict[str, Any]:
        """The other data of the row: a shard's .json, a table's other columns."""

    def where(self, row: int) -> str:
        """The location of the row, for a message."""

    def image_numbers(self) -> np.ndarray:
        """A number for the image file of each row, int64 [n]: rows with equal ones have the same file."""

    def image_facts(self) -> str:
        """A digest that changes when an image file does: of names, sizes and modification times."""

    def epoch_order(self, seed: int, epoch: int) -> Order:
        """The order of rows in an epoch, int64 [n], chosen for fast reading."""

    def prefetch(self, parts: Iterable[np.ndarray]) -> None:
        """Starts to fetch remote data of rows in advance, in this order; does nothing for local data."""


@dataclass
class ImageFeatures:
    """What a frozen image tower gave for images: ``values`` [I, D], and the place in it of each row, int64 [n].

    The row of an image that cannot be read is NaN.
    """

    values: np.ndarray
    places: np.ndarray

    def take(self, rows: np.ndarray) -> ImageFeatures:
        """Those of ``rows`` [m]."""
        return ImageFeatures(self.values, self.places[rows])

    def of(self, row: int) -> torch.Tensor:
        """The features of a row, float32 [D]. ValueError: its image could not be read."""
        import torch

        found = torch.from_numpy(np.array(self.values[self.places[row]], np.float32))
        if found.isnan().any():
            raise ValueError("the image cannot be read")
        return found

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "values": by_file(self.values)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"values": opened(state["values"])})


@dataclass
class PairDataset:
    """Samples of ``source`` with ``pixel_values`` uint8 [3, S, S], ``caption``, ``image_id``, ``text_id``, ``valid``.

    With ``features`` there are ``image_features`` float32 [D] in place of the pixels, and no image is decoded.

    A pair whose image or caption cannot be read has ``valid`` 0 and no weight. With ``parts`` image or text only that
    part is read: evaluation uses this, since an image may have several captions.
    """

    source: PairSource
    transform: ImageTransform
    seed: int = 0
    parts: str = "both"  # both, image or text
    features: ImageFeatures | None = None
    unit: ClassVar[str] = "pairs"

    def __len__(self) -> int:
        return len(self.source)

    def at(self, row: int, epoch: int, draw: int = 0) -> dict[str, Any]:
        """The sample as augmented in ``epoch``; each ``draw`` of it is augmented differently."""
        sample: dict[str, Any] = {"valid": 1.0, "image_id": 0, "text_id": 0}
        try:
            file, text = self.source.read(row)
            sample.update(image_id=identity(file), text_id=identity(text))
            if self.parts != "text" and self.features is not None:
                sample["image_features"] = self.features.of(row)
            elif self.parts != "text":
                sample["pixel_values"] = self.transform(file, (self.seed, epoch, row, *([draw] if draw else [])))
            if self.parts != "image":
                sample["caption"] = read_caption(text)
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) not in (None, errno.ENOENT):  # an error of the disk, not of the image
                raise
            import torch

            sample["valid"] = 0.0
            if self.parts != "text" and self.features is not None:
                sample["image_features"] = torch.zeros(self.features.values.shape[1])
            elif self.parts != "text":
                sample["pixel_values"] = torch.zeros(3, self.transform.size, self.transform.size, dtype=torch.uint8)
            if self.parts != "image":
                sample["caption"] = ""
        return sample

    def prefetch(self, parts: Iterable[np.ndarray]) -> None:
        """Starts to fetch remote data of rows in advance, in this order."""
        self.source.prefetch(parts)

    def epoch_order(self, seed: int, epoch: int) -> Order:
        """The order of rows in an epoch, int64 [n]: the source's own."""
        return self.source.epoch_order(seed, epoch)

    def problem(self, row: int) -> str:
        """The location of the pair ``row`` and why it cannot be read."""
        try:
            file, text = self.source.read(row)
            self.transform(file)
            read_caption(text)
        except (ValueError, OSError) as error:
            return f"{self.source.where(row)}: {' '.join(first_line(error).split())}"
        return f"{self.source.where(row)}: it can be read now"


def open_pairs(
    where: str, cache: Path, cache_gb: float, image_folder: str | None, image_column: str, caption_column: str
) -> PairSource:
    """The pairs that ``where`` names: local or remote shards, or a table of captions of images in ``image_folder``."""
    from accelerando.data.remote import FileCache, RangeReader, is_remote, list_remote
    from accelerando.data.shards import ShardPairs, list_shards

    if is_remote(where):
        remote = FileCache(cache / "remote", int(cache_gb * 1e9)) if cache_gb else RangeReader()
        return ShardPairs(list_remote(where), cache, remote)
    if table_suffix(where):
        folder = Path(image_folder) if image_folder else Path(where).parent
        return TablePairs(where, folder, image_column, caption_column)
    return ShardPairs(list_shards(where), cache)


class TablePairs:
    """Image files in a folder and a table that names them, one caption a row; an image may have several rows.

    Raises:
        UserError: the table cannot be read, or a row names an image that does not exist.
    """

    unit: ClassVar[str] = "pairs"

    def __init__(self, table: str, folder: Path, image_column: str = "image", caption_column: str = "caption") -> None:
        import pyarrow as pa

        rows = read_text_table(
            table,
            text_column=caption_column,
            text_pair_column=image_column,
            label_column="",
            require_labels=False,
            other_columns=True,
        )
        self.table, self.folder, self.captions, self.names = table, folder, rows.texts, rows.pairs
        self.others = rows.others
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        names = self.names.to_pylist()
        paths = [name if name in there else _image_path(folder, name, there) for name in names]
        if None in paths:
            row = paths.index(None)
            close = difflib.get_close_matches(names[row], there, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{table}: row {row + 1}: no image {names[row]} in {folder}{hint}")
        # Relative to the folder, or absolute.
        self.paths = self.names if paths == names else pa.array(paths, pa.large_string())

    def __len__(self) -> int:
        return len(self.captions)

    def digest(self) -> dict[str, str]:
        """See :class:`data.digest.Digested`: of names and sizes of the images, and of their captions."""
        sizes, times = file_facts(self.folder, self.paths.to_pylist())
        return {"images": digest(self.names, sizes), "captions": digest(self.captions), "times": digest(times)}

    def contents(self) -> str:
        """See :class:`data.digest.InFiles`."""
        return file_contents(self.folder, self.paths.to_pylist())

    def image_numbers(self) -> np.ndarray:
        """See :class:`PairSource`."""
        import pyarrow as pa
        import pyarrow.compute as pc

        paths = self.paths if isinstance(self.paths, pa.ChunkedArray) else pa.chunked_array([self.paths])
        return pc.index_in(paths, value_set=pc.unique(paths)).to_numpy().astype(np.int64)

    def image_facts(self) -> str:
        """See :class:`PairSource`."""
        return file_stamps(self.folder, sorted(set(self.paths.to_pylist())))

    def read(self, row: int) -> tuple[bytes, bytes]:
        """The image file and the caption of a row."""
        return (self.folder / self.paths[row].as_py()).read_bytes(), self.captions[row].as_py().encode()

    def metadata(self, row: int) -> dict[str, Any]:
        """The row's other columns."""
        return self.others.slice(row, 1).to_pylist()[0] if self.others.num_columns else {}

    def epoch_order(self, seed: int, epoch: int) -> Order:
        """The order of rows in an epoch, int64 [n], shuffled."""
        return epoch_order(len(self), seed, epoch)

    def prefetch(self, parts: Iterable[np.ndarray]) -> None:
        """Does nothing: the images are local."""

    def where(self, row: int) -> str:
        """Table, row and image of a row, for a message."""
        return f"{self.table}: row {row + 1}: {self.folder / self.paths[row].as_py()}"


def _image_path(folder: Path, name: str, there: set[str]) -> str | None:
    """The path, relative to ``folder`` or absolute, of an image that a table names in any spelling; None: no such file.

    Spaces around it, ``./``, backslashes, absolute paths and paths through links are understood.
    """
    for spelled in (name, name.strip(), name.strip().replace("\\", "/")):
        path = os.path.normpath(spelled) if spelled else ""
        if path in there:
            return path
        if path and "\0" not in path and (folder / spelled).is_file():  # outside, or behind a link
            return spelled
    return None


@dataclass
class PairSubset:
    """The ``rows`` [n] of a source."""

    source: PairSource
    rows: np.ndarray
    unit: ClassVar[str] = "pairs"

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> dict[str, str]:
        """See :class:`data.digest.Digested`."""
        return {name: digest(part, self.rows) for name, part in digest_of(self.source).items()}

    def contents(self) -> str:
        """See :class:`data.digest.InFiles`."""
        return digest(self.source.contents(), self.rows)

    def read(self, row: int) -> tuple[bytes, bytes]:
        """The image file and the caption of a row."""
        return self.source.read(int(self.rows[row]))

    def image_numbers(self) -> np.ndarray:
        """See :class:`PairSource`."""
        return self.source.image_numbers()[self.rows]

    def image_facts(self) -> str:
        """See :class:`PairSource`."""
        return self.source.image_facts()

    def metadata(self, row: int) -> dict[str, Any]:
        """The other data of a row."""
        return self.source.metadata(int(self.rows[row]))

    def where(self, row: int) -> str:
        """The location of a row, for a message."""
        return self.source.where(int(self.rows[row]))

    def epoch_order(self, seed: int, epoch: int) -> Order:
        """The order of rows in an epoch, int64 [n]: the source's, which keeps the rows of a shard together."""
        place = np.full(len(self.source), -1)
        place[self.rows] = np.arange(len(self.rows))
        order = self.source.epoch_order(seed, epoch)
        parts = (place[order[start : start + LARGE_PART]] for start in range(0, len(order), LARGE_PART))
        return np.concatenate([part[part >= 0] for part in parts])

    def prefetch(self, parts: Iterable[np.ndarray]) -> None:
        """Starts to fetch remote data of rows in advance, in this order."""
        self.source.prefetch(self.rows[rows] for rows in parts)


def rows_of_source(pairs: PairSource) -> tuple[PairSource, np.ndarray]:
    """The source that subsets (of subsets) were taken from, and their rows in it."""
    if not isinstance(pairs, PairSubset):
        return pairs, np.arange(len(pairs))
    source, rows = rows_of_source(pairs.source)
    return source, rows[pairs.rows]


def hold_out_images(source: PairSource, fraction: float, seed: int) -> tuple[PairSubset, PairSubset]:
    """(rest, held out): about ``fraction`` of the pairs; all pairs of an image or a caption are in the same part.

    Reads every pair once. Depends only on (source, fraction, seed).

    Raises:
        UserError: one part would be empty.
    """
    gallery = make_gallery(source, "splitting")
    links = zip(gallery.image_of, len(gallery.image_rows) + gallery.text_of, strict=True)
    groups = join_pairs(len(gallery.image_rows) + len(gallery.text_rows), links)[gallery.image_of]
    order = np.random.default_rng(seed).permutation(np.unique(groups))
    sizes = np.bincount(groups)[order]
    chosen = order[: max(1, int(np.searchsorted(np.cumsum(sizes), fraction * len(source), side="right")))]
    held = np.isin(groups, chosen)
    if held.all() or not held.any():
        raise UserError(f"{len(source)} pairs are too few, or too similar, to hold any out: name --validation_data")
    return PairSubset(source, np.flatnonzero(~held)), PairSubset(source, np.flatnonzero(held))


def split_locations(data_dir: str | None, named: dict[str, str | None]) -> dict[str, str | None]:
    """The location of each split's pairs: as ``named``, otherwise a subfolder of ``data_dir``."""
    found = dict(named)
    if data_dir:
        for split, names in {"train": ["train"], "validation": ["validation", "val"], "test": ["test"]}.items():
            there = [str(Path(data_dir) / name) for name in names if (Path(data_dir) / name).is_dir()]
            found[split] = found[split] or next(iter(there), None)
    return found


def bucket_locations(bucket: str, prefix: str, validation_prefix: str | None, validation: str | None) -> dict[str, str]:
    """URLs of the training and validation shards in an S3 bucket; ``validation`` overrides a prefix.

    Raises:
        UserError: there is no prefix for validation, and none can be derived from that of training.
    """
    prefix = prefix.strip("/")
    folder, _, name = prefix.rpartition("/")
    other = (validation_prefix or f"{folder}/{name.replace('train', 'val')}").strip("/")
    if not validation and other == prefix:
        raise UserError(f"--s3_validation_prefix is missing: {prefix} has no `train` to replace by `val`")
    return {"train": f"s3://{bucket}/{prefix}", "validation": validation or f"s3://{bucket}/{other}"}


@dataclass
class Captions:
    """Texts without images, as samples."""

    texts: list[str]
    unit: ClassVar[str] = "texts"

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"valid": 1.0, "image_id": 0, "text_id": row, "caption": self.texts[row]}


def captions(source: PairSource) -> Iterator[str]:
    """The readable captions of a source, one by one."""
    for row in range(len(source)):
        with contextlib.suppress(ValueError):
            yield read_caption(source.read(row)[1])


def identity(content: bytes) -> int:
    """A 63-bit id of ``content``: a hash."""
    return int.from_bytes(hashlib.blake2b(content.strip(), digest_size=8).digest(), "big") >> 1


def read_caption(text: bytes) -> str:
    """The caption in one line. ValueError: it is empty or not UTF-8."""
    caption = " ".join(text.decode("utf-8").split())
    if not caption:
        raise ValueError("the caption is empty")
    return caption


@dataclass
class Gallery:
    """The distinct images and captions of an evaluation set.

    ``image_rows`` and ``text_rows`` are the rows of the source where each first occurs; ``image_of`` and ``text_of``
    int64 [n] map each pair to its positions in them.
    """

    image_rows: np.ndarray
    text_rows: np.ndarray
    image_of: np.ndarray
    text_of: np.ndarray


def make_gallery(source: PairSource, description: str) -> Gallery:
    """Reads every pair once to find equal images and equal captions."""
    ids = np.zeros((2, len(source)), np.int64)
    with progress_bar(len(source), 0, " pairs", description) as bar:
        for row in range(len(source)):
            ids[:, row] = [identity(part) for part in source.read(row)]
            bar.update()
    (_, image_rows, image_of), (_, text_rows, text_of) = (
        np.unique(part, return_index=True, return_inverse=True) for part in ids
    )
    return Gallery(image_rows, text_rows, image_of, text_of)


def class_names_of(source: PairSource, rows: np.ndarray, field: str) -> list[str]:
    """The classes in ``field`` of the metadata of ``rows``, sorted.

    Raises:
        UserError: there are fewer than two.
    """
    values = {source.metadata(int(row)).get(field) for row in rows} - {None}
    if len(values) < 2:
        raise UserError(f"--class_field {field}: {len(values)} classes found in the metadata; at least two are needed")
    return sorted(map(str, values))


def image_classes(source: PairSource, rows: np.ndarray, field: str, names: Sequence[str]) -> np.ndarray:
    """The class of each of ``rows`` from ``field`` of its metadata, int64 [n]; -1: none of ``names``.

    Raises:
        UserError: no row has a class in ``names``.
    """
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers.get(str(source.metadata(int(row)).get(field)), -1) for row in rows], np.int64)
    if (labels < 0).all():
        raise UserError(f"--class_field {field}: no image has one of the class names in its metadata")
    return labels
