"""Labelled images and videos from class folders, tables, `datasets` and shards; a sample has one frame or several."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from accelerando.base.errors import UserError, first_line
from accelerando.base.log import log, with_progress
from accelerando.data.decode import is_unreadable, pixels_of, to_channels_last
from accelerando.data.digest import digest, digest_of, file_contents, file_facts, file_stamps
from accelerando.data.folders import (
    IMAGE_SUFFIXES,
    Wanted,
    class_folders,
    files_of_table,
    read_class_folders,
    read_splits,
)
from accelerando.data.images import ImageAugmentation, blank_image, cut_mix, mix_up
from accelerando.data.mapped import by_file, opened
from accelerando.data.mixing import draw_partner, draw_share, sample_key
from accelerando.data.order import order_of_classes
from accelerando.data.table_formats import read_datasets, table_suffix
from accelerando.data.tables import array_of_any, named_columns, read_text_table
from accelerando.data.videos import VIDEO_SUFFIXES, read_frames, require_av

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from accelerando.data.decode import Source
    from accelerando.data.order import Order
    from accelerando.data.pairs import PairSource
    from accelerando.data.transforms import ImageTransform

MEDIA = Wanted((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES), noun="image or video", plural="images or videos")
POSITIONS = 4  # what a random number is drawn for, beside those of data.images


class Opens(Protocol):
    """Where samples are read from, by row number."""

    def open(self, row: int) -> bytes | Path:
        """An image file's content, or the path of a file or of a folder of frames."""


@dataclass(frozen=True)
class Media:
    """n samples, each an image, a video or a folder of frames.

    ``names`` for messages and tables, and ``labels``: Arrow strings [n]; ``rows`` int64 [n]: their rows in ``source``;
    ``others``: further columns.
    """

    source: Opens
    names: pa.Array
    labels: pa.Array
    rows: np.ndarray
    others: pa.Table | None = None
    unit: ClassVar[str] = "samples"

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, row: int) -> bytes | Path:
        """An image file's content, or the path of a file or of a folder of frames."""
        return self.source.open(int(self.rows[row]))

    def place(self, row: int) -> str:
        """Where a sample is, for messages: the path of its file, or its name."""
        name = self.names[row].as_py()
        return str(self.source.folder / name) if isinstance(self.source, _Files) else name

    def take(self, rows: np.ndarray) -> Media:
        """The samples ``rows`` [m]."""
        others = None if self.others is None else self.others.take(rows)
        names, labels = self.names.take(rows), self.labels.take(rows)
        return replace(self, names=names, labels=labels, rows=self.rows[rows], others=others)

    def files(self) -> tuple[Path, list[str]]:
        """The folder of the files, and the name of each in it, those of the frames of a folder too; empty: there are
        none of their own."""
        if not isinstance(self.source, _Files):
            return Path(), []
        home, names = self.source.folder, self.names.to_pylist()
        if not self.source.whole_folders:
            return home, names
        return home, [str(file.relative_to(home)) for name in names for file in _parts(home / name)]

    def digest(self) -> dict[str, str]:
        """See :class:`data.digest.Digested`: of the samples' names and sizes, and of their labels."""
        found = {"labels": digest(self.labels)}
        if isinstance(self.source, _Files):
            sizes, times = file_facts(*self.files())
            return {"samples": digest(self.names, sizes), **found, "times": digest(times)}
        others = digest_of(getattr(self.source, "pairs", None)).values()
        return {"samples": digest(self.names, self.rows, *others), **found}

    def contents(self) -> str:
        """See :class:`data.digest.InFiles`."""
        return file_contents(*self.files())

    def fingerprint(self) -> str:
        """What changes with a file's name, size or time; of samples without files of their own, with the digest."""
        return file_stamps(*self.files()) if isinstance(self.source, _Files) else digest(*self.digest().values())

    def classes(self, names: Sequence[str]) -> np.ndarray:
        """The position of each label in ``names``, int64 [n]; -1: it is none of them."""
        import pyarrow as pa
        import pyarrow.compute as pc

        found = pc.index_in(self.labels, value_set=pa.array(names, pa.large_string()))
        return pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)

    def class_names(self) -> list[str]:
        """The distinct labels, sorted."""
        return sorted(self.labels.unique().to_pylist())


# ---------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class _Files:
    folder: Path
    names: pa.Array
    whole_folders: bool

    def open(self, row: int) -> Path:
        return self.folder / self.names[row].as_py()


@dataclass(frozen=True)
class _Column:
    """Images in a column of a data set of `datasets`: bytes, or a path."""

    cells: pa.Array | pa.ChunkedArray

    def open(self, row: int) -> bytes | Path:
        cell = self.cells[row].as_py()
        if isinstance(cell, dict):
            return cell["bytes"] if cell.get("bytes") else Path(cell["path"])
        return cell if isinstance(cell, bytes) else Path(cell)


@dataclass(frozen=True)
class _Shards:
    pairs: PairSource

    def open(self, row: int) -> bytes:
        return self.pairs.read(row)[0]


def open_folders(folder: Path, fold: int = 0, whole_folders: bool = False) -> dict[str, Media]:
    """Split -> samples of a folder with ``train/<class>/*`` and perhaps ``val/`` and ``test/``, of one with ``raw/``
    and ``splits/`` (tools/split_folds.py), or of plain class folders, which are all ``train``.

    ``whole_folders``: each folder inside a class folder is a video, its images are the frames.

    Raises:
        UserError: the folder is missing, or has no such folders.
    """
    left_out: list[str] = []

    def report(name: str, why: str) -> None:
        left_out.append(f"{folder / name}: {why}")

    wanted = replace(MEDIA, whole_folders=whole_folders)
    if (folder / "splits").is_dir():
        _, sides = read_splits(folder, fold, report)
    elif (folder / "train").is_dir():
        _, sides = read_class_folders(folder, report, wanted)
        sides = {"validation" if side == "val" else side: files for side, files in sides.items()}
    else:
        found = class_folders(folder, report, wanted)
        names = [name for files in found.values() for name in files]
        sides = {"train": None}
    for line in left_out[:5]:
        log.warning("Left out: %s", line)
    if len(left_out) > 5:
        log.warning("... and %d more", len(left_out) - 5)
    if sides == {"train": None}:
        labels = [name for name, files in found.items() for _ in files]
        return {"train": media_files(folder, names, labels, whole_folders)}
    return {
        side: media_files(files.folder, files.names.to_pylist(), None, whole_folders) for side, files in sides.items()
    }


def media_files(folder: Path, names: list[str], labels: list[str] | None, whole_folders: bool = False) -> Media:
    """Samples that are files in ``folder``, or with ``whole_folders`` also folders of frames; without ``labels``, the
    second part of each name is its class."""
    import pyarrow as pa

    labels = [name.split("/")[1] for name in names] if labels is None else labels
    files = pa.array(names, pa.large_string())
    if any(name.lower().endswith(VIDEO_SUFFIXES) for name in names):
        require_av(f"{folder}: it has videos, which")
    rows = np.arange(len(names))
    return Media(_Files(folder, files, whole_folders), files, pa.array(labels, pa.large_string()), rows)


def open_media(
    where: str, split: str, cache: Path, cache_gb: float, folder: str | None, file_column: str, label_column: str,
    other_columns: Sequence[str] = (),
) -> Media:  # fmt: skip
    """The samples that ``where`` names: a table of files and labels, shards (local or remote), or a data set of
    `datasets` with a column of images.

    ``folder``: where the files of a table are (default: beside it); ``label_column``: of a table or data set, or the
    field of the shards' .json (without it, their .cls or .txt is the label); ``other_columns``: columns or fields that
    come along.

    Raises:
        UserError: it cannot be read, a file is missing, a sample has no label, or there is no such column.
    """
    import pyarrow as pa

    if table_suffix(where):
        table = read_text_table(where, text_column=file_column, label_column=label_column, other_columns=other_columns)
        home, names = files_of_table(table, folder)
        whole_folders = any((home / name).is_dir() for name in names)
        found = media_files(home, names, [str(label) for label in table.labels.to_pylist()], whole_folders)
        return replace(found, others=table.others)
    if "://" in where or where.endswith(".tar") or any(Path(where).glob("*.tar")):
        from accelerando.data.pairs import open_pairs

        pairs = open_pairs(where, cache, cache_gb, None, file_column, label_column)
        labels = [_shard_label(pairs, row, label_column) for row in range(len(pairs))]
        names = pa.array([f"sample {row}" for row in range(len(pairs))], pa.large_string())
        rows = np.arange(len(pairs))
        others = _shard_fields(pairs, other_columns, where) if other_columns else None
        return Media(_Shards(pairs), names, pa.array(labels, pa.large_string()), rows, others)
    return _of_dataset(where, split, file_column, label_column, other_columns)


def _shard_fields(pairs: PairSource, fields: Sequence[str], where: str) -> pa.Table:
    import pyarrow as pa

    records = [pairs.metadata(row) for row in range(len(pairs))]
    there = {name: None for record in records for name in record}
    if missing := [name for name in fields if name not in there]:
        raise UserError(f"{where}: no field {missing[0]!r} in the .json of its samples: {', '.join(there) or 'none'}")
    return pa.table({name: array_of_any([record.get(name) for record in records]) for name in fields})


def _shard_label(pairs: PairSource, row: int, field: str) -> str:
    value = pairs.metadata(row).get(field)
    if value is None:
        value = pairs.read(row)[1].decode("utf-8", errors="replace").strip()
    if not str(value):
        raise UserError(f"{pairs.where(row)}: no label: neither {field} in a .json nor a .cls")
    return str(value)


def _of_dataset(where: str, split: str, image_column: str, label_column: str, other_columns: Sequence[str]) -> Media:
    import pyarrow as pa

    table = read_datasets(where, split)
    for column in (image_column, label_column):
        if column not in table.column_names:
            raise UserError(f"{where}: no column {column!r}; it has {', '.join(table.column_names)}")
    cells = table[image_column].combine_chunks()
    labels = [None if label is None else str(label) for label in table[label_column].to_pylist()]
    if None in labels:
        raise UserError(f"{where}: row {labels.index(None) + 1} of {split} has no label")
    names = pa.array([f"{split} {row}" for row in range(len(cells))], pa.large_string())
    beside = table.drop_columns([image_column, label_column])
    others = named_columns(beside, other_columns, where) if other_columns else None
    return Media(_Column(cells), names, pa.array(labels, pa.large_string()), np.arange(len(cells)), others)


# ----------------------------------------------------------------------------------------------------------- choosing


def at_most_per_class(classes: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most ``most`` rows of each class, drawn at random: sorted row numbers, int64."""
    rng = np.random.default_rng([seed, most])
    order = rng.permutation(len(classes))
    kept = [order[classes[order] == number][:most] for number in np.unique(classes)]
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.int64)


def of_classes(media: Media, names: Sequence[str], split: str, asked: bool) -> Media:
    """The samples of ``media`` whose class is among ``names``; others are reported, unless the classes were ``asked``
    for.

    Raises:
        UserError: there are none.
    """
    known = media.classes(names) >= 0
    if not known.any():
        raise UserError(f"{split}: no sample of the classes {', '.join(names[:8])}")
    if not known.all() and not asked:
        row = int(np.flatnonzero(~known)[0])
        log.warning("%s: %d samples are left out, of classes that train does not have, such as %s", split,
                    np.count_nonzero(~known), media.labels[row].as_py())  # fmt: skip
    return media.take(np.flatnonzero(known))


def class_list(asked: Sequence[str], names: Sequence[str], seed: int) -> list[str]:
    """The classes that ``asked`` means: names, a file with one a line, or a share of ``names`` such as 0.5, drawn.

    Raises:
        UserError: a name is not in ``names``, or none would be left or chosen.
    """
    if len(asked) == 1 and re.fullmatch(r"0?\.\d+", asked[0]):
        count = min(max(1, round(float(asked[0]) * len(names))), len(names) - 1)
        return sorted(np.random.default_rng([seed, count]).permutation(np.array(names, object))[:count].tolist())
    if len(asked) == 1 and asked[0] not in names and Path(asked[0]).is_file():
        lines = Path(asked[0]).read_text(encoding="utf-8-sig").splitlines()
        asked = [line.strip() for line in lines if line.strip()]
    known = {name.replace("_", " ").casefold(): name for name in names}
    found = []
    for name in asked:
        if (key := name.replace("_", " ").casefold()) not in known:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(list(names)[:8])}"
            raise UserError(f"--novel_classes {name}: no such class; {hint}")
        found.append(known[key])
    if asked and len(set(found)) > len(names) - 2:
        raise UserError(
            f"--novel_classes leaves {len(names) - len(set(found))} classes to train on; at least two are needed"
        )
    return sorted(set(found))


def content_groups(media: Media) -> np.ndarray:
    """A number for each sample, int64 [n], equal for files with the same content; only files of equal size are read."""
    sizes = [_size(media.open(row)) for row in range(len(media))]
    alike = Counter(sizes)
    groups: dict[object, int] = {}
    found = np.zeros(len(media), np.int64)
    for row in with_progress(range(len(media)), len(media), "looking for copies", "samples"):
        key: object = row  # nothing is equal to it
        if alike[sizes[row]] > 1:
            content = media.open(row)
            if isinstance(content, Path):
                content = b"".join(file.read_bytes() for file in _parts(content) if file.is_file())
            key = hashlib.blake2b(content, digest_size=16).digest()
        found[row] = groups.setdefault(key, len(groups))
    return found


def _size(content: bytes | Path) -> int:
    """The bytes of a sample."""
    if isinstance(content, bytes):
        return len(content)
    return sum(file.stat().st_size for file in _parts(content) if file.is_file())


def held_out(classes: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held out), sorted row numbers: ``fraction`` of each class; a group of copies is never divided."""
    from accelerando.data.splits import deal_folds

    _, classes = np.unique(classes, return_inverse=True)
    side = deal_folds(classes, groups, fraction, 1, np.random.default_rng(seed))
    rest, held = np.flatnonzero(side > 0), np.flatnonzero(side == 0)
    if not len(held) or not len(rest):
        raise UserError(f"{len(classes)} samples are too few, or too similar, to hold any out: name validation data")
    return rest, held


def with_held_out(
    splits: dict[str, Media], names: Sequence[str], fractions: Mapping[str, float], seed: int
) -> dict[str, Media]:
    """``splits`` with those of ``fractions`` that are missing: such a share of the training samples; 0: none."""
    for split, fraction in fractions.items():
        if split not in splits and fraction:
            train = splits["train"]
            rest, held = held_out(train.classes(names), content_groups(train), fraction, seed)
            splits = splits | {"train": train.take(rest), split: train.take(held)}
    return splits


def with_novel_apart(
    splits: dict[str, Media], names: Sequence[str], novel: Sequence[str], last: str
) -> dict[str, Media]:
    """``splits`` without the samples of the ``novel`` classes; those of the split ``last`` are the split novel."""
    of_novel = {split: np.isin(media.classes(names), _places(novel, names)) for split, media in splits.items()}
    apart = splits[last].take(np.flatnonzero(of_novel[last]))
    splits = {split: media.take(np.flatnonzero(~of_novel[split])) for split, media in splits.items()}
    return splits | ({"novel": apart} if len(apart) else {})


def candidates_of(split: str, names: Sequence[str], novel: Sequence[str]) -> np.ndarray:
    """The classes among which the samples of a split are classified, int64, ascending: the ``novel`` ones of the split
    novel, the others elsewhere."""
    of_novel = np.isin(np.arange(len(names)), _places(novel, names))
    return np.flatnonzero(of_novel if split == "novel" else ~of_novel)


def _places(novel: Sequence[str], names: Sequence[str]) -> list[int]:
    return [number for number, name in enumerate(names) if name in set(novel)]


# ------------------------------------------------------------------------------------------------------------- frames


def frame_files(folder: Path) -> list[Path]:
    """The images in a folder of frames, in the order of the numbers in their names."""

    def key(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]

    return sorted((path for path in folder.iterdir() if path.name.lower().endswith(IMAGE_SUFFIXES)), key=key)


def _parts(path: Path) -> list[Path]:
    """The files of a sample: itself, or the frames in the folder."""
    return frame_files(path) if path.is_dir() else [path]


def frames_of(found: bytes | Path, positions: Sequence[float]) -> list[Source]:
    """The frames of a video, or of a folder of frames, at ``positions`` (ascending, 0 <= p < 1); of an image, itself
    alone.

    Raises:
        ValueError: it cannot be read as one; its message is the reason.
        OSError: an error of the disk, or there is no such file.
    """
    if isinstance(found, bytes):
        return [found]
    if found.is_dir():
        files = frame_files(found)
        if not files:
            raise ValueError("a folder of frames without an image")
        return [files[int(position * len(files))].read_bytes() for position in positions]
    if found.name.lower().endswith(VIDEO_SUFFIXES):
        return list(read_frames(found, positions))
    return [found.read_bytes()]


def even_positions(frames: int, views: int = 1, view: int = 0) -> list[float]:
    """The middles of ``frames`` segments of equal length; of several views, each takes another part of the segments."""
    return [(segment + (view + 0.5) / views) / frames for segment in range(frames)]


def jittered_positions(frames: int, rng: np.random.Generator) -> list[float]:
    """A random position in each of ``frames`` segments of equal length (Wang et al. 2016, arXiv:1608.00859)."""
    return ((np.arange(frames) + rng.uniform(0, 1, frames)) / frames).tolist()


def prepared_frames(
    found: bytes | Path, made: Callable[[Source], torch.Tensor], positions: Sequence[float]
) -> torch.Tensor:
    """The frames of :func:`frames_of`, each ``made`` a uint8 [3, S, S]: [F, 3, S, S]."""
    import torch

    frames = [to_channels_last(made(frame)) for frame in frames_of(found, positions)]
    return torch.stack([frame.permute(1, 2, 0) for frame in frames]).permute(0, 3, 1, 2)


def prepared_views(
    found: bytes | Path, made: Callable[[Source], torch.Tensor], frames: int, views: int
) -> tuple[torch.Tensor, list[int]]:
    """What evaluation sees of a sample: frames at even distances as in :func:`prepared_frames`, those of a view after
    each other, and the number of frames of each view. A video has ``views`` groups of ``frames`` frames, at other times
    each; an image is one view of one frame."""
    positions = np.array([even_positions(frames, views, view) for view in range(views)])
    order = np.argsort(positions, axis=None, kind="stable")  # read once, in the order of time
    pixels = prepared_frames(found, made, positions.ravel()[order].tolist())
    if len(pixels) == 1 < len(order):
        return pixels, [1]
    return pixels[np.argsort(order)], [frames] * views


def thumbnail(found: bytes | Path, side: int, frames: int = 3) -> np.ndarray | None:
    """A whole image, or ``frames`` frames of a video side by side, uint8 [H, W, 3]; None: it is unreadable."""
    try:
        parts = [pixels_of(frame, side) for frame in frames_of(found, even_positions(frames))]
    except (ValueError, OSError) as error:
        if not is_unreadable(error):
            raise
        return None
    height = min(len(part) for part in parts)
    return np.concatenate([part[:height] for part in parts], axis=1)


def matching(names: Sequence[str], patterns: Sequence[str]) -> np.ndarray:
    """Which of ``names`` match one of ``patterns`` (``*left*``), in any case: bool [n]."""
    lower = [pattern.lower() for pattern in patterns]
    return np.array([any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in lower) for name in names], bool)


@dataclass
class TrainingMedia:
    """The samples of ``media``, augmented differently in each epoch; a map-style data set that takes the epoch.

    A sample has ``pixel_values`` uint8 [F, 3, S, S], where F is 1 for an image and ``frames`` for a video; ``frames``:
    [F]; ``label``, ``other_label``, ``share`` and ``valid`` as in :class:`data.images.TrainingImages`. All frames of a
    video are cropped, flipped, changed and mixed alike. ``augmentation`` is None for the frames as evaluation sees them
    (:meth:`transform <data.transforms.ImageTransform>`). ``gentle``: for each class, the augmentation that replaces it.
    """

    media: Media
    classes: np.ndarray
    transform: ImageTransform
    augmentation: ImageAugmentation | None
    frames: int = 8
    seed: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    balanced: bool = False
    gentle: dict[int, ImageAugmentation] = field(default_factory=dict)
    unit: ClassVar[str] = "samples"

    def __len__(self) -> int:
        return len(self.media)

    def at(self, row: int, epoch: int, draw: int = 0) -> dict[str, Any]:
        """The sample as augmented in ``epoch``; each ``draw`` of it is augmented differently."""
        seed = sample_key(self.seed, epoch, row, draw)
        label = int(self.classes[row])
        pixels = self._pixels(row, seed)
        sample = {"label": label, "other_label": label, "share": 1.0, "valid": float(pixels is not None)}
        if pixels is None:
            return sample | {"pixel_values": blank_image(self.transform.size)[None], "frames": [1]}
        if self.mixup or self.cutmix:
            other, rng = draw_partner(seed, len(self))
            cut = self.cutmix > 0 and (not self.mixup or rng.random() < 0.5)
            second = self._pixels(other, (*seed, 2))
            if second is not None:
                alpha = self.cutmix if cut else self.mixup
                second = second[np.arange(len(pixels)) % len(second)]  # an image is in every frame of a video
                pixels, share = (cut_mix if cut else mix_up)(pixels, second, draw_share(alpha, rng), rng)
                sample |= {"other_label": int(self.classes[other]), "share": share}
        return sample | {"pixel_values": pixels, "frames": [len(pixels)]}

    def epoch_order(self, seed: int, epoch: int) -> Order:
        """The order of rows in an epoch, int64 [n]; ``balanced``: every class equally often."""
        return order_of_classes(self.classes, self.balanced, seed, epoch)

    def prefetch(self, parts: Iterable[np.ndarray]) -> None:
        """Does nothing: the files are local, or fetched when they are opened."""

    def problem(self, row: int) -> str:
        """The name of a sample and why it cannot be read."""
        return why_unreadable(self.media, row, self.transform, self.frames)

    def _pixels(self, row: int, seed: tuple[int, ...]) -> torch.Tensor | None:
        # Without augmentation the frames are those of evaluation too.
        augmentation = self.gentle.get(int(self.classes[row]), self.augmentation)
        if augmentation is None:
            return read_or_none(self.media, row, self.transform, even_positions(self.frames))
        positions = jittered_positions(self.frames, np.random.default_rng([*seed, POSITIONS]))
        size = self.transform.size
        return read_or_none(self.media, row, partial(augmentation, size=size, seed=seed), positions)


@dataclass
class EvaluationMedia:
    """The samples of ``media`` for evaluation: frames at even distances, preprocessed as the model's processor does.

    A video has ``views`` groups of ``frames`` frames, at other times each; an image is one view of one frame.
    """

    media: Media
    classes: np.ndarray
    transform: ImageTransform
    frames: int = 8
    views: int = 1
    unit: ClassVar[str] = "samples"

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, row: int) -> dict[str, Any]:
        label = int(self.classes[row])
        sample = {"label": label, "other_label": label, "share": 1.0}
        try:
            pixels, frames = prepared_views(self.media.open(row), self.transform, self.frames, self.views)
        except (ValueError, OSError) as error:
            if not is_unreadable(error):
                raise
            return sample | {"valid": 0.0, "pixel_values": blank_image(self.transform.size)[None], "frames": [1]}
        return sample | {"valid": 1.0, "pixel_values": pixels, "frames": frames}

    def thumbnail(self, row: int, side: int) -> np.ndarray | None:
        """See :func:`thumbnail`."""
        return thumbnail(self.media.open(row), side, min(3, self.frames))

    def seen(self, row: int) -> torch.Tensor:
        """What the model takes of its middle frame, uint8 [3, S, S]."""
        pixels = self[row]["pixel_values"]
        return pixels[len(pixels) // 2]

    def problem(self, row: int) -> str:
        """The name of a sample and why it cannot be read."""
        return why_unreadable(self.media, row, self.transform, self.frames)


@dataclass
class FeatureRows:
    """Cached features instead of frames: ``features`` float32 [n, V, d]; rows of NaN are views that do not exist, and a
    sample without a view could not be read."""

    features: np.ndarray
    classes: np.ndarray
    balanced: bool = False
    unit: ClassVar[str] = "samples"

    def __len__(self) -> int:
        return len(self.classes)

    def at(self, row: int, epoch: int, draw: int = 0) -> dict[str, Any]:
        """The sample ``row``, the same in each epoch."""
        views = np.asarray(self.features[row])
        views = views[~np.isnan(views[:, 0])]
        label = int(self.classes[row])
        sample = {"label": label, "other_label": label, "share": 1.0, "valid": float(len(views) > 0)}
        views = views if len(views) else np.zeros((1, self.features.shape[2]), np.float32)
        return sample | {"features": views, "frames": [1] * len(views)}

    def epoch_order(self, seed: int, epoch: int) -> Order:
        """The order of rows in an epoch, int64 [n]: that of :class:`TrainingMedia`."""
        return order_of_classes(self.classes, self.balanced, seed, epoch)

    def prefetch(self, parts: Iterable[np.ndarray]) -> None:
        """Does nothing: they are local."""

    def problem(self, row: int) -> str:
        """The row number."""
        return f"row {row}: could not be read when its features were computed"

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "features": by_file(self.features)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"features": opened(state["features"])})

    def first_views(self) -> tuple[np.ndarray, np.ndarray]:
        """The first view of each readable sample [m, d], and its class [m]."""
        readable = ~np.isnan(self.features[:, 0, 0])
        return np.asarray(self.features[readable, 0]), self.classes[readable]


def by_sample(values: torch.Tensor, views: torch.Tensor, most: int) -> torch.Tensor:
    """``values`` [V, d] of consecutive views, ``views`` [B] of each sample (0: none of its own, but one to skip), as
    [B, most, d] with NaN where a sample has fewer."""
    found = values.new_full((len(views), most, values.shape[1]), float("nan"))
    start = 0
    for place, count in enumerate(views.tolist()):
        found[place, :count] = values[start : start + count]
        start += max(1, int(count))
    return found


class MediaCollate:
    """Collate for samples of images and videos: a dict of tensors.

    ``pixel_values`` uint8 [N, 3, S, S], the frames of all samples one after the other, or ``features`` float32 [N, d];
    ``frames`` int64 [V]: the frames of each view; ``views`` int64 [B]: the views of each sample; ``labels`` and
    ``other_labels`` int64 [B], ``share`` and ``valid`` float32 [B]. A class because worker processes need to pickle it.
    """

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        batch = {
            "frames": torch.tensor([count for sample in samples for count in sample["frames"]]),
            "views": torch.tensor([len(sample["frames"]) for sample in samples]),
        }
        if "features" in samples[0]:
            batch["features"] = torch.from_numpy(np.concatenate([sample["features"] for sample in samples]))
        else:
            # The frames are channels_last, and so is the batch: stacked like this, nothing is transposed in memory.
            pixels = torch.cat([sample["pixel_values"].permute(0, 2, 3, 1) for sample in samples])
            batch["pixel_values"] = pixels.permute(0, 3, 1, 2)
        for name, column in (("labels", "label"), ("other_labels", "other_label")):
            batch[name] = torch.tensor([sample[column] for sample in samples], dtype=torch.int64)
        for name in ("share", "valid"):
            batch[name] = torch.tensor([sample[name] for sample in samples], dtype=torch.float32)
        return batch


def read_or_none(
    media: Media, row: int, made: Callable[[Source], torch.Tensor], positions: Sequence[float]
) -> torch.Tensor | None:
    """The frames of a sample, each ``made`` a uint8 [3, S, S]: [F, 3, S, S]; None: it is unreadable.

    Raises:
        OSError: an error of the disk.
    """
    try:
        return prepared_frames(media.open(row), made, positions)
    except (ValueError, OSError) as error:
        if not is_unreadable(error):
            raise
        return None


def why_unreadable(media: Media, row: int, transform: ImageTransform, frames: int) -> str:
    """The name of a sample and why it cannot be read."""
    try:
        for frame in frames_of(media.open(row), even_positions(frames)):
            transform(frame)
    except (ValueError, OSError) as error:
        return f"{media.place(row)}: {' '.join(first_line(error).split())}"
    return f"{media.place(row)}: it can be read now"
