"""The labels of sign clips, and checks of the labels and of the clips themselves.

A clip is an ``.npz`` file: ``X`` float [T, 156] keypoints (or other channels), ``X2048`` float [T, 2048] features,
``mask`` bool [T, 78], ``timestamps_ms`` int [T], ``meta`` a JSON string. Labels are a CSV with file, gloss and cat.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from accelerando.base.errors import UserError, first_line
from accelerando.base.texts import one_line
from accelerando.data.npz import open_npz
from accelerando.data.table_formats import check_table, csv_records

if TYPE_CHECKING:
    from accelerando.data.npz import Arrays

    Add = Callable[[str, str], None]  # called with the kind and the text of a problem

COLUMNS = ("file", "gloss", "cat")
KEYPOINTS = 156  # channels of a frame: x and y of 78 points
FEATURES = 2048
ORDER = "pose25,left_hand21,right_hand21,face11"
MOST_CLASSES = 100_000  # a larger number is a mistake, and each class takes memory
MARGIN = 0.05  # coordinates are in [0, 1]; a point may be outside the image by this much

# kind -> (severity, what it means)
KINDS: dict[str, tuple[str, str]] = {
    "missing_file": ("error", "listed in the labels, but not in the folder"),
    "unlisted_file": ("warning", "in the folder, but not in the labels: neither used nor checked"),
    "listed_twice": ("error", "listed more than once"),
    "gloss_out_of_range": ("error", "gloss negative, or not below --num_gloss"),
    "cat_out_of_range": ("error", "category negative, or not below --num_cat"),
    "gloss_with_two_cats": ("warning", "one gloss with several categories"),
    "gloss_not_in_train": ("error", "gloss without a training clip"),
    "cat_not_in_train": ("error", "category without a training clip"),
    "same_name": ("error", "a training clip has the same name"),
    "same_clip": ("error", "a training clip has the same content"),
    "unreadable": ("error", "not a valid .npz file"),
    "object_array": ("error", "contains pickled objects, which are never loaded"),
    "key_missing": ("error", "the array with the frames is missing"),
    "wrong_ndim": ("error", "frames are not a table of [frames, channels]"),
    "wrong_width": ("error", "number of channels differs from --width"),
    "wrong_dtype": ("error", "frames are not floating point numbers"),
    "no_frames": ("error", "no frames"),
    "nan": ("error", "NaN among the values"),
    "infinite": ("error", "infinite values"),
    "out_of_range": ("warning", "coordinates outside of [0, 1]"),
    "all_zero": ("error", "every value is zero"),
    "mask_missing": ("warning", "no mask"),
    "mask_shape": ("error", "mask does not fit the frames"),
    "mask_dtype": ("error", "mask is not boolean"),
    "nothing_visible": ("error", "mask hides every point of every frame"),
    "timestamps_shape": ("error", "timestamps do not fit the frames"),
    "timestamps_dtype": ("error", "timestamps are not whole numbers"),
    "timestamps_decrease": ("error", "timestamps decrease"),
    "meta_not_json": ("error", "meta is not a JSON object"),
    "meta_contradicts": ("error", "meta contradicts the arrays"),
    # The next four are warnings if features are not required.
    "x2048_missing": ("error", "features are required, but missing"),
    "x2048_shape": ("error", "features are not floats of [frames, 2048]"),
    "x2048_length": ("error", "features and keypoints differ in length"),
    "x2048_not_finite": ("error", "NaN or infinite features"),
}


@dataclass(frozen=True)
class Labels:
    """n rows: ``files`` without ``.npz``, ``gloss`` and ``cat`` int64 [n], ``occluded`` bool [n] or None."""

    path: Path
    files: list[str]
    gloss: np.ndarray
    cat: np.ndarray
    occluded: np.ndarray | None = None
    lines: np.ndarray | None = None  # int64 [n], the line where each row ends

    def __len__(self) -> int:
        return len(self.files)

    def where(self, row: int) -> str:
        """The line number of a row, as in an editor."""
        return f"line {row + 2 if self.lines is None else self.lines[row]} of {self.name}"

    @property
    def name(self) -> str:
        """The file with its folder: several sets may have a labels.csv."""
        return "/".join(self.path.parts[-2:])


@dataclass(frozen=True)
class Problem:
    """A problem: its ``kind`` in ``KINDS``, the clip's ``file`` with ``.npz``, and a line of ``text`` about both."""

    kind: str
    file: str
    text: str
    severity: str


class Clip(NamedTuple):
    """The result of inspecting a clip; ``digest`` is None for an unreadable clip, one without frames or of zeros."""

    problems: list[Problem]
    frames: int | None
    digest: int | None


def make_problem(kind: str, file: str, text: str, severity: str | None = None) -> Problem:
    """A problem with a one-line text that names the file; control characters are escaped."""
    file, text = one_line(file), one_line(text)
    return Problem(kind, file, f"{file}: {text}", severity or KINDS[kind][0])


# ----------------------------------------------------------------------------------------------------------- labels


def read_labels(path: Path | str) -> Labels:
    """Reads a CSV with file (with or without ``.npz``), gloss, cat and perhaps occluded; other columns are ignored.

    Raises:
        UserError: the file is missing, empty or invalid; a column is missing; a value is not an integer.
    """
    path = Path(path)
    files: list[str] = []
    numbers: dict[str, list[int]] = {"gloss": [], "cat": [], "line": []}
    occluded: list[bool] = []
    for where, record in label_records(path):
        name = record["file"].strip().removesuffix(".npz")
        if not name:
            raise UserError(f"{path}: {where}: file is empty")
        files.append(name)
        for column in ("gloss", "cat"):
            numbers[column].append(_whole_number(record[column], f"{path}: {where}: {column}"))
        numbers["line"].append(int(re.findall(r"\d+", where)[-1]))
        if "occluded" in record:
            word = record["occluded"].strip().lower()
            if word not in ("0", "1", "false", "true"):
                raise UserError(f"{path}: {where}: occluded is {record['occluded']!r:.40}; write 0 or 1")
            occluded.append(word in ("1", "true"))
    arrays = {name: np.array(values, np.int64) for name, values in numbers.items()}
    hidden = np.array(occluded) if occluded else None
    return Labels(path, files, arrays["gloss"], arrays["cat"], hidden, arrays["line"])


def label_records(path: Path) -> Iterable[tuple[str, dict[str, str]]]:
    """(where, row) of a labels file, every column as text, spaces around column names stripped.

    Raises:
        UserError: as in :func:`read_labels`, but values are not checked.
    """
    check_table(path)
    try:
        first = next(iter(csv_records(path, [])), None)
        if first is None:
            raise UserError(f"{path}: no rows; expected a header {','.join(COLUMNS)} and a line for each clip")
        spelled = list(first[1])
        there = [name.strip() for name in spelled]
        missing = [name for name in COLUMNS if name not in there]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}; there are {', '.join(there)}{_hint(missing[0], there)}")
        wanted = [name for name in spelled if name.strip() in COLUMNS]
        if len(wanted) > len(COLUMNS):
            raise UserError(f"{path}: two columns are called {max(wanted, key=wanted.count).strip()!r}")
        for where, record in csv_records(path, wanted):
            yield where, {name.strip(): value for name, value in record.items()}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def read_groups(path: Path, column: str) -> list[str]:
    """The value of a further column for each row of a labels file, such as its signer.

    Raises:
        UserError: no such column, or a row without a value.
    """
    groups = []
    for where, record in label_records(path):
        if column not in record:
            raise UserError(f"{path}: no column {column!r}; there are {', '.join(record)}")
        groups.append(record[column].strip())
        if not groups[-1]:
            raise UserError(f"{path}: {where}: {column} is empty; give each unknown one a name of its own")
    return groups


def _hint(column: str, there: list[str]) -> str:
    plain = {name.lower(): name for name in there}
    close = difflib.get_close_matches(column, plain, n=1, cutoff=0.5)
    return f"; rename {plain[close[0]]!r}?" if close else f"; expected the header {','.join(COLUMNS)}"


def _whole_number(text: str, where: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()):
        raise UserError(f"{where} is {text!r:.40}, not a whole number" if text.strip() else f"{where} is empty")
    return int(text)


def list_clips(folder: Path, names: Iterable[str] = ()) -> list[str]:
    """The clips in ``folder``, sorted, without ``.npz``; also in the subfolders that ``names`` mention (``s1/clip``).

    Raises:
        UserError: no such folder.
    """
    inside = {PurePosixPath(name).parent.as_posix() for name in names if "/" in name} - {"."}
    inside = {part for part in inside if not part.startswith("/") and ".." not in part.split("/")}
    found = []
    for part in ["", *(part + "/" for part in inside)]:
        try:
            with os.scandir(folder / part) as entries:
                found += [part + entry.name[:-4] for entry in entries if re.fullmatch(r"[^.].*\.npz", entry.name, re.S)]
        except OSError as error:
            if not part:
                raise UserError(
                    f"{folder}: {'is a file, not a folder' if folder.is_file() else error.strerror}"
                ) from None
    return sorted(found)


def label_problems(
    labels: Labels,
    folder: Path | str,
    num_gloss: int | None = None,
    num_cat: int | None = None,
    train: Labels | None = None,
    train_folder: Path | str | None = None,
) -> list[Problem]:
    """Problems found from labels and file names; no clip is opened. ``train``: the labels of the training set.

    ``train_folder`` contains its clips (default: ``folder``). In different folders equal names are only a warning, as
    they may coincide; comparing the contents is safer.

    Raises:
        UserError: no such folder.
    """
    folder = Path(folder)
    there = list_clips(folder, labels.files)
    present = set(there)
    plain = {_plain(name): name for name in there}
    together = train_folder is None or Path(train_folder).resolve() == folder.resolve()
    seen_in_train = {} if train is None else {name: row for row, name in reversed(list(enumerate(train.files)))}
    problems: list[Problem] = []
    first: dict[str, int] = {}
    for row, name in enumerate(labels.files):
        where = labels.where(row)
        if name in first:
            other = first[name]
            same = labels.gloss[row] == labels.gloss[other] and labels.cat[row] == labels.cat[other]
            text = f"{where} lists it again after {labels.where(other)}{'' if same else ', with other labels'}"
            problems.append(make_problem("listed_twice", f"{name}.npz", text))
        elif name not in present:
            alike = plain.get(_plain(name)) or plain.get(_plain(re.split(r"[/\\]", name)[-1]))
            text = f"{where} lists it{f'; did you mean {alike!r}?' if alike else ''}"
            problems.append(make_problem("missing_file", f"{name}.npz", text))
        first.setdefault(name, row)
        for column, values, count in (("gloss", labels.gloss, num_gloss), ("cat", labels.cat, num_cat)):
            if values[row] < 0 or values[row] >= (count or MOST_CLASSES):
                allowed = (
                    f"--num_{column} {count} allows 0 to {count - 1}"
                    if count
                    else (f"classes count from 0, without gaps, to {MOST_CLASSES - 1:,} at most")
                )
                text = f"{column} {values[row]} in {where}; {allowed}"
                problems.append(make_problem(f"{column}_out_of_range", f"{name}.npz", text))
        if name in seen_in_train and row == first[name]:
            text = f"in {where} and in {train.where(seen_in_train[name])}"
            severity = "error" if together else "warning"
            problems.append(make_problem("same_name", f"{name}.npz", text, severity))
    listed = first.keys() | (seen_in_train.keys() if together else ())
    for name in there:
        if name not in listed:
            problems.append(make_problem("unlisted_file", f"{name}.npz", f"not in {labels.name}"))
    return problems + _class_problems(labels, train)


def _plain(name: str) -> str:
    """Letters and digits of a name, in lower case: finds names that are spelled differently."""
    return re.sub(r"[\W_]+|npz$", "", name).casefold()


def _class_problems(labels: Labels, train: Labels | None) -> list[Problem]:
    problems = []
    cats: dict[int, dict[int, str]] = {}  # gloss -> category -> where it was first seen
    for part in (train, labels) if train is not None else (labels,):
        for row, (gloss, cat) in enumerate(zip(part.gloss.tolist(), part.cat.tolist(), strict=True)):
            known = cats.setdefault(gloss, {})
            if cat not in known and known and part is labels:
                other, where = next(iter(known.items()))
                text = f"gloss {gloss} has category {cat} in {labels.where(row)}, category {other} in {where}"
                problems.append(make_problem("gloss_with_two_cats", f"{labels.files[row]}.npz", text))
            known.setdefault(cat, part.where(row))
    if train is not None:
        for column, values, trained in (("gloss", labels.gloss, train.gloss), ("cat", labels.cat, train.cat)):
            classes, rows, counts = np.unique(values, return_index=True, return_counts=True)
            for number, row, count in zip(classes, rows, counts, strict=True):
                if number not in trained:
                    text = f"{column} {number} ({labels.where(row)}, {count:,} in all) does not occur in {train.name}"
                    problems.append(make_problem(f"{column}_not_in_train", f"{labels.files[row]}.npz", text))
    return problems


# ------------------------------------------------------------------------------------------------------------ clips


def inspect_clip(
    path: Path | str,
    name: str = "",
    key: str = "X",
    width: int | None = KEYPOINTS,
    require_x2048: bool = False,
    expect_mask: bool = False,
    frames_only: bool = False,
) -> Clip:
    """Checks every array of a clip, called ``name`` in messages; pickled objects are not loaded.

    With ``require_x2048`` the features are required: the keypoints may be missing, and the features may be under
    ``key``. Otherwise problems of the features are warnings. ``frames_only`` reads only the frames.
    """
    path = Path(path)
    problems: list[Problem] = []

    def add(kind: str, text: str, severity: str | None = None) -> None:
        problems.append(make_problem(kind, name or path.name, text, severity))

    arrays: dict[str, np.ndarray] = {}
    try:
        with open_npz(path) as archive:
            there = archive.names
            wanted = [key, "X2048", "mask", "timestamps_ms", "meta"]
            if frames_only:
                wanted = [key] if key in there else ["X2048"]
            for member in dict.fromkeys(wanted):
                if member in there:
                    _read(archive, member, arrays, add)
    except (OSError, ValueError) as error:
        add("unreadable", f"not an .npz file ({getattr(error, 'strerror', None) or first_line(error)})")
        return Clip(problems, None, None)
    frames, features = arrays.pop(key, None), arrays.pop("X2048", None)
    if key == "X2048":
        frames, features, require_x2048 = None, frames, True
    elif require_x2048 and "X2048" not in there and frames is not None and frames.shape[1:] == (FEATURES,):
        frames, features = None, frames  # features may be called X
    elif require_x2048 and "X2048" not in there:
        add("x2048_missing", f"no array 'X2048'; there are {', '.join(there) or 'none'}")
    if key not in there and not (require_x2048 and features is not None):
        add("key_missing", f"no array {key!r}; there are {', '.join(there) or 'none'}")
    digest = _digest(frames if frames is not None else features)
    if frames_only:
        return Clip(problems, None, digest)
    length = None
    if frames is not None:
        length = _check_frames(frames, key, width, add)
    if features is not None:
        severity = "error" if require_x2048 else "warning"
        length = _check_features(features, length, lambda kind, text: add(kind, text, severity))
    # None if there are no channels to compare with: no keypoints, or a wrong width.
    comparable = frames is not None and frames.ndim == 2 and width in (None, frames.shape[1])
    channels = frames.shape[1] if comparable else None
    if "mask" in arrays:
        _check_mask(arrays["mask"], length, channels, add)
    elif expect_mask and "mask" not in there:
        add("mask_missing", f"no array 'mask'; there are {', '.join(there)}")
    if "timestamps_ms" in arrays:
        _check_timestamps(arrays["timestamps_ms"], length, add)
    if "meta" in arrays:
        _check_meta(arrays["meta"], channels, add)
    return Clip(problems, length, digest)


def _read(archive: Arrays, member: str, arrays: dict[str, np.ndarray], add: Add) -> None:
    try:
        arrays[member] = archive.read(member)
    except ValueError as error:
        if "allow_pickle" in str(error):
            instead = "json.dumps(meta)" if member == "meta" else "plain numbers"
            add("object_array", f"{member} contains Python objects; save {instead}")
        else:
            add("unreadable", f"{member} cannot be read: {first_line(error)}")


def _digest(values: np.ndarray | None) -> int | None:
    if values is None or values.dtype.kind not in "fiub" or not values.any():
        return None
    head = f"{values.dtype.str}{values.shape}".encode()
    return int.from_bytes(hashlib.blake2b(head + values.tobytes(), digest_size=8).digest(), "little")


def _shape(values: np.ndarray) -> str:
    return f"{values.dtype} [{', '.join(map(str, values.shape))}]"


def _check_frames(values: np.ndarray, key: str, width: int | None, add: Add) -> int | None:
    """Checks the frames, [T, channels]; returns T, or None if it is unknown."""
    if values.dtype.kind != "f":
        add("wrong_dtype", f"{key} is {values.dtype}; save it as float32")
    if values.ndim != 2 or not values.shape[1]:
        add("wrong_ndim", f"{key} is {_shape(values)}, expected [frames, {width or 'channels'}]")
        return None
    if width is not None and values.shape[1] != width:
        hint = "--require_x2048, if these are features" if values.shape[1] == FEATURES else f"--width {values.shape[1]}"
        add("wrong_width", f"{key} is {_shape(values)}, expected [frames, {width}]; or use {hint}")
    if len(values) == 0:
        add("no_frames", f"{key} is {_shape(values)}")
    if values.dtype.kind != "f" or values.size == 0:
        return len(values)
    for kind, word, bad in (("nan", "NaN", np.isnan(values)), ("infinite", "infinite", np.isinf(values))):
        if bad.any():
            add(kind, f"{np.count_nonzero(bad):,} of {bad.size:,} values are {word}, the first is {key}{_at(bad)}")
    if not values.any():
        add("all_zero", f"{key} is {_shape(values)} of zeros: no person was detected")
    if values.shape[1] == KEYPOINTS:
        away = np.where(np.isfinite(values), np.abs(values - 0.5) - 0.5, 0)
        if (away > MARGIN).any():
            place = np.unravel_index(away.argmax(), away.shape)
            count = np.count_nonzero(away > MARGIN)
            text = f"{count:,} of {away.size:,} coordinates, the farthest is {key}[{place[0]}, {place[1]}]"
            add("out_of_range", f"{text} = {values[place]:.4g}")
    return len(values)


def _at(bad: np.ndarray) -> str:
    return str(list(map(int, np.unravel_index(bad.argmax(), bad.shape))))


def _check_features(values: np.ndarray, length: int | None, add: Add) -> int | None:
    """Checks the features, [T, 2048]; returns the number of frames, that of the keypoints if there are any."""
    if values.dtype.kind != "f" or values.shape[1:] != (FEATURES,) or len(values) == 0:
        add("x2048_shape", f"features are {_shape(values)}, expected float32 [frames, {FEATURES}]")
        return length
    if length is not None and len(values) != length:
        add("x2048_length", f"{len(values):,} frames of features, {length:,} of keypoints")
    bad = ~np.isfinite(values)
    if bad.any():
        add("x2048_not_finite", f"{np.count_nonzero(bad):,} values are NaN or infinite, the first is at {_at(bad)}")
    if not values.any():
        add("all_zero", f"features are {_shape(values)} of zeros")
    return len(values) if length is None else length


def _check_mask(mask: np.ndarray, length: int | None, channels: int | None, add: Add) -> None:
    if mask.dtype != bool:
        add("mask_dtype", f"mask is {mask.dtype}; save it as bool")
    points = KEYPOINTS // 2 if channels == KEYPOINTS else None
    fits = mask.ndim == 2 and length in (None, len(mask)) and mask.shape[1] > 0
    # For other channels it is unknown how many form a point.
    if not fits or (mask.shape[1] != points if points else channels and channels % mask.shape[1]):
        expected = f"[{'frames' if length is None else length}, {points or 'points'}]"
        add("mask_shape", f"mask is {_shape(mask)}, expected bool {expected}")
    elif length != 0 and mask.dtype.kind in "biuf" and not mask.any():
        add("nothing_visible", f"mask is {_shape(mask)}, all false")


def _check_timestamps(times: np.ndarray, length: int | None, add: Add) -> None:
    if times.dtype.kind not in "iu":
        add("timestamps_dtype", f"timestamps_ms is {times.dtype}; save it as int64")
    if times.ndim != 1 or length not in (None, len(times)):
        expected = "frames" if length is None else length
        add("timestamps_shape", f"timestamps_ms is {_shape(times)}, expected int64 [{expected}]")
    elif times.dtype.kind in "iuf" and (back := times[1:] < times[:-1]).any():
        place = int(back.argmax())
        text = f"{times[place + 1]} follows {times[place]} at timestamps_ms[{place + 1}]"
        add("timestamps_decrease", text)


def _check_meta(meta: np.ndarray, channels: int | None, add: Add) -> None:
    if meta.dtype.kind not in "US" or meta.size != 1:
        add("meta_not_json", f"meta is {_shape(meta)}, expected one JSON string")
        return
    try:
        content = json.loads(meta.item())
    except (ValueError, RecursionError) as error:
        add("meta_not_json", f"meta is {meta.item()!r:.30} ({first_line(error)})")
        return
    if not isinstance(content, dict):
        add("meta_not_json", f"meta is a JSON {type(content).__name__}, expected an object")
        return
    said = {name: content[name] for name in ("dims_per_frame", "keypoints_total", "order") if name in content}
    true: dict[str, int | str] = {} if channels is None else {"dims_per_frame": channels}
    if channels == KEYPOINTS:  # for other channels it is unknown how many form a point
        true |= {"keypoints_total": KEYPOINTS // 2, "order": ORDER}
    for name, value in true.items():
        if name in said and (re.sub(r"\s", "", said[name]) if isinstance(said[name], str) else said[name]) != value:
            add("meta_contradicts", f"meta has {name} {said[name]!r:.60}, the frames have {value!r}")


# Problems that make training impossible; the others are only reported.
FATAL = ("missing_file", "gloss_out_of_range", "cat_out_of_range")


def report_problems(problems: list[Problem], warn: Callable[[str], None]) -> None:
    """Calls ``warn`` with one line for each kind of problem; ignores unlisted files, since splits may share a folder.

    Raises:
        UserError: a clip is missing or a class is out of range.
    """
    fatal = [problem for problem in problems if problem.kind in FATAL]
    if fatal:
        more = f" (and {len(fatal) - 1:,} more: tools/validate_npz.py lists them)" if fatal[1:] else ""
        raise UserError(f"{fatal[0].text}: {KINDS[fatal[0].kind][1]}{more}")
    for kind in dict.fromkeys(problem.kind for problem in problems if problem.kind != "unlisted_file"):
        same = [problem for problem in problems if problem.kind == kind]
        warn(same[0].text + (f" (and {len(same) - 1:,} more)" if same[1:] else ""))
