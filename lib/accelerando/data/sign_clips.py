"""Clips of signing: NPZ files of keypoints or features, read once and packed, so that epochs open no files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from accelerando.base.errors import UserError, first_line
from accelerando.base.files import derived, whole_folder
from accelerando.data.digest import digest
from accelerando.data.keypoints import NUM_POINTS, WIDTH, ClipAugmentation, NormalisationName, normalise_by_body
from accelerando.data.npz import open_npz
from accelerando.data.order import balanced_rows, epoch_order, number_repeats
from accelerando.data.table_formats import check_table, csv_records, without_formula_mark

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    from accelerando.data.sign_labels import Labels

READERS = 8  # threads that open files
CHUNK = 512  # clips in memory at a time while packing


@dataclass(frozen=True)
class ClipTable:
    """Packed frames of n clips; a map-style data set of ``{"frames", ("mask"), "gloss", "cat"}``.

    ``frames`` float32 [N, D] and ``mask`` bool [N, 78] (None for features) are memory-mapped; clip i has ``lengths[i]``
    frames from ``starts[i]`` on, both int64 [n]. ``gloss`` and ``cat`` int64 [n], ``occluded`` bool [n] or None,
    ``names`` of the files, ``packed`` a digest of the files' arrays.
    """

    frames: np.ndarray
    mask: np.ndarray | None
    starts: np.ndarray
    lengths: np.ndarray
    names: list[str]
    gloss: np.ndarray
    cat: np.ndarray
    occluded: np.ndarray | None = None
    packed: str = ""
    unit: ClassVar[str] = "clips"

    def __len__(self) -> int:
        return len(self.starts)

    def digest(self) -> dict[str, str]:
        """See :class:`data.digest.Digested`."""
        return {
            "frames": digest(self.packed, self.starts, self.lengths),
            "labels": digest(self.gloss, self.cat, self.occluded),
        }

    @property
    def width(self) -> int:
        """The number of channels of a frame."""
        return self.frames.shape[1]

    def __getitem__(self, row: int) -> dict[str, Any]:
        start = self.starts[row]
        part = slice(start, start + self.lengths[row])
        sample = {"frames": self.frames[part], "gloss": self.gloss[row], "cat": self.cat[row]}
        return sample if self.mask is None else sample | {"mask": self.mask[part]}

    def take(self, rows: np.ndarray) -> ClipTable:
        """The clips ``rows`` [m]; their frames are not copied."""
        return replace(
            self,
            starts=self.starts[rows],
            lengths=self.lengths[rows],
            names=[self.names[row] for row in rows],
            gloss=self.gloss[rows],
            cat=self.cat[rows],
            occluded=None if self.occluded is None else self.occluded[rows],
        )


@dataclass(frozen=True)
class TrainingClips:
    """Clips as augmented and ordered in each epoch; both depend only on (seed, epoch).

    ``balanced``: every gloss is drawn equally often, so that an epoch repeats some clips and omits others; ``buckets``:
    clips of similar length follow each other.
    """

    clips: ClipTable
    augmentation: ClipAugmentation
    seed: int = 0
    balanced: bool = False
    buckets: bool = True
    unit: ClassVar[str] = "clips"

    def __len__(self) -> int:
        return len(self.clips)

    def at(self, row: int, epoch: int, draw: int = 0) -> dict[str, Any]:
        """The clip as augmented in ``epoch``; each ``draw`` of it is augmented differently."""
        sample = self.clips[row]
        if not self.augmentation.is_on:
            return sample
        rng = np.random.default_rng([self.seed, epoch, row, *([draw] if draw else [])])
        frames, mask = self.augmentation(sample["frames"], sample.get("mask"), rng)
        sample["frames"] = frames
        return sample if mask is None else sample | {"mask": mask}

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of clips in an epoch, int64 [n]."""
        rows = balanced_rows(self.clips.gloss, seed, epoch) if self.balanced else np.arange(len(self))
        lengths = self.clips.lengths[rows] if self.buckets else None
        order = rows[epoch_order(len(rows), seed, epoch, lengths)[:]]
        return number_repeats(order, len(self)) if self.balanced else order

    def prefetch(self, parts: Iterable[np.ndarray]) -> None:
        """Does nothing: the clips are local."""

    def problem(self, row: int) -> str:
        """The file of a clip; unreadable ones were found when the clips were packed."""
        return self.clips.names[row]


# -------------------------------------------------------------------------------------------------- reading, packing


def read_clip(path: Path | str, key: str, width: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Frames float32 [T, D] under ``key`` and the mask bool [T, 78] of a clip (None if it has none).

    Nothing in the file is unpickled.

    Raises:
        UserError: no such file, not an NPZ, no such key, not ``width`` channels, no frames, non-finite values.
    """
    try:
        with open_npz(path) as arrays:
            if key not in arrays.names:
                listed = ", ".join(arrays.names) or "none"
                raise UserError(f"{path}: no array {key!r}, only {listed}: name the key to read")
            frames = arrays.read(key)
            mask = arrays.read("mask") if "mask" in arrays.names else None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, but the labels list it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: not a readable NPZ file ({reason})") from None
    if frames.ndim != 2 or frames.dtype.kind not in "fiu" or not frames.shape[1]:
        raise UserError(f"{path}: {key} is {frames.dtype} {list(frames.shape)}; expected numbers [T, {width or 'D'}]")
    if width is not None and frames.shape[1] != width:
        raise UserError(f"{path}: {key} has {frames.shape[1]} channels per frame, the other clips {width}")
    if not len(frames):
        raise UserError(f"{path}: {key} has no frames")
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite
        frames = frames.astype(np.float32)
    if not np.isfinite(frames).all():
        raise UserError(f"{path}: {key} has values that are not finite; tools/validate_npz.py lists such files")
    if mask is not None and mask.dtype.kind not in "biuf":
        raise UserError(f"{path}: mask is {mask.dtype}; save it as bool")
    if mask is not None and (mask.shape != (len(frames), NUM_POINTS) or frames.shape[1] != WIDTH):
        mask = None  # it belongs to other keypoints
    return frames, None if mask is None else mask.astype(bool)


def normalise(
    frames: np.ndarray, mask: np.ndarray | None, normalisation: NormalisationName
) -> tuple[np.ndarray, np.ndarray | None]:
    """Frames and mask of a clip as the model takes them; for "standard" the model itself normalises each channel."""
    return normalise_by_body(frames, mask) if normalisation == "body" else (frames, mask)


def pack_clips(
    labels: Labels, folder: Path, key: str, normalisation: NormalisationName, cache: Path, what: str = ""
) -> ClipTable:
    """Reads the clips that ``labels`` lists, or maps the result of an earlier run for the same files from ``cache``.

    Raises:
        UserError: a clip cannot be read, or its width differs from that of the first; ``cache`` cannot be written to,
            or has too little space.
    """

    def read(target: Path) -> ClipTable:
        facts = json.loads((target / "facts.json").read_text(encoding="utf-8"))
        offsets = np.load(target / "offsets.npy", allow_pickle=False)

        def mapped(name: str, dtype: DTypeLike, width: int) -> np.ndarray:
            return np.asarray(np.memmap(target / f"{name}.bin", dtype=dtype, mode="r", shape=(int(offsets[-1]), width)))

        return ClipTable(
            frames=mapped("frames", np.float32, facts["width"]),
            mask=mapped("mask", np.bool_, NUM_POINTS) if facts["mask"] else None,
            starts=offsets[:-1],
            lengths=np.diff(offsets),
            names=labels.files,
            gloss=labels.gloss,
            cat=labels.cat,
            occluded=labels.occluded,
            packed=facts["digest"],
        )

    paths = [folder / f"{name}.npz" for name in labels.files]
    target = cache / "clips" / _fingerprint(paths, key, normalisation)
    return derived(target, read, lambda target: _write(target, paths, key, normalisation, what))


def channel_statistics(clips: ClipTable) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over all frames, float64 [D] each; a constant channel has 1."""
    total, squares, count = 0.0, 0.0, 0
    for row in range(len(clips)):
        frames = clips[row]["frames"].astype(np.float64)
        total, squares, count = total + frames.sum(axis=0), squares + (frames**2).sum(axis=0), count + len(frames)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return mean, np.where(std > 1e-6, std, 1.0)


def _fingerprint(paths: list[Path], key: str, normalisation: str) -> str:
    digest = hashlib.sha256(json.dumps([key, normalisation, 2]).encode())
    for path in paths:
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise UserError(f"{path}: no such file, but the labels list it") from None
        digest.update(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _write(target: Path, paths: list[Path], key: str, normalisation: NormalisationName, what: str) -> None:
    from accelerando.base.log import progress_bar

    lengths, width, has_mask, arrays = [], None, None, hashlib.blake2b(digest_size=16)
    with whole_folder(target) as draft:
        draft.mkdir()
        with (
            open(draft / "frames.bin", "wb") as frames_file,
            open(draft / "mask.bin", "wb") as mask_file,
            progress_bar(len(paths), 0, " clips", f"reading {what}".strip()) as bar,
        ):
            for path, (frames, mask) in zip(paths, _read_all(paths, key), strict=True):
                width = width or frames.shape[1]
                if frames.shape[1] != width:
                    raise UserError(f"{path}: {key} has {frames.shape[1]} channels per frame, the other clips {width}")
                if normalisation == "body" and width != WIDTH:
                    hint = f"not the {WIDTH} of a body: use --normalisation standard"
                    raise UserError(f"{path}: {key} has {width} channels per frame, {hint}")
                for part in (frames, *([] if mask is None else [mask])):  # as in the file, before normalisation
                    arrays.update(np.ascontiguousarray(part).data)
                frames, mask = normalise(frames, mask, normalisation)
                has_mask = mask is not None if has_mask is None else has_mask
                if has_mask != (mask is not None):
                    raise UserError(f"{path}: only some of the clips have a mask: tools/validate_npz.py lists them")
                lengths.append(len(frames))
                np.ascontiguousarray(frames).tofile(frames_file)
                if mask is not None:
                    np.ascontiguousarray(mask).tofile(mask_file)
                bar.update()
        facts = {"width": width, "mask": bool(has_mask), "digest": arrays.hexdigest()}
        (draft / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        np.save(draft / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), allow_pickle=False)


def _read_all(paths: list[Path], key: str) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The clips in order, read by several threads, at most ``CHUNK`` in advance."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(paths), CHUNK):
            yield from pool.map(lambda path: read_clip(path, key), paths[start : start + CHUNK])


def class_names(
    splits: dict[str, ClipTable], folder: Path, named: str | None, num_gloss: int | None, num_cat: int | None
) -> dict[str, list[str]]:
    """The names of the classes ``gloss`` and ``cat``; their number is given, or taken from the labels.

    The names come from the file ``named`` (columns gloss, label, cat, category), or from a ``gloss_names.csv`` in
    ``folder`` or its parent; without one the numbers are the names.

    Raises:
        UserError: the file lacks a column.
    """
    counts = {
        "gloss": num_gloss or 1 + max(int(clips.gloss.max()) for clips in splits.values()),
        "cat": num_cat or 1 + max(int(clips.cat.max()) for clips in splits.values()),
    }
    names = {head: [str(number) for number in range(count)] for head, count in counts.items()}
    candidates = [Path(named)] if named else [folder / "gloss_names.csv", folder.absolute().parent / "gloss_names.csv"]
    path = next((path for path in candidates if named or path.is_file()), None)
    if path is None:
        return names
    check_table(path, "--names_csv" if named else "")
    for where, row in csv_records(path, ["gloss", "label", "cat", "category"]):
        for head, number, column in (("gloss", "gloss", "label"), ("cat", "cat", "category")):
            if not re.fullmatch("[0-9]{1,18}", row[number].strip()):
                raise UserError(f"{path}: {where}: {number} is {row[number]!r:.40}, not a whole number")
            if int(row[number]) < counts[head]:
                names[head][int(row[number])] = without_formula_mark(row[column])
    return names


def synthetic_clips(width: int, num_gloss: int, num_cat: int, seed: int) -> dict[str, ClipTable]:
    """Synthetic clips for a smoke test, noise around a curve per gloss: 64 training, 16 validation, 16 test clips."""
    rng = np.random.default_rng(seed)
    curves = rng.standard_normal((num_gloss, 2, width)).astype(np.float32)
    splits = {}
    for split, count in (("train", 64), ("validation", 16), ("test", 16)):
        lengths = rng.integers(20, 60, count)
        gloss = np.arange(count) % num_gloss
        frames = []
        for length, number in zip(lengths, gloss, strict=True):
            share = np.linspace(0, 1, length, dtype=np.float32)[:, None]
            curve = curves[number, 0] * (1 - share) + curves[number, 1] * share
            frames.append(curve + 0.3 * rng.standard_normal((length, width), dtype=np.float32))
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        frames = np.concatenate(frames)
        mask = np.ones((len(frames), NUM_POINTS), bool) if width == WIDTH else None
        names = [f"made_up_{number}" for number in range(count)]
        splits[split] = ClipTable(frames, mask, starts, lengths, names, gloss, gloss % num_cat)
    return splits
