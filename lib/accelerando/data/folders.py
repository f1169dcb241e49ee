"""Images in folders: a folder for each class, the index files of folds, or the files that a table lists."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from accelerando.base.errors import UserError
from accelerando.data.digest import digest, file_contents, file_facts

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from accelerando.data.tables import TextTable

# Files taken for images; .heic is listed so that such files are reported where pillow-heif is missing.
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
    ".ppm",
    ".pgm",
)
LeftOut = Callable[[str, str], None]  # called with a file or folder that is left out, and the reason


@dataclass(frozen=True)
class ImageFiles:
    """n image files in ``folder``: ``names`` relative to it (Arrow strings, with slashes), ``classes`` int64 [n].

    Of several labels or numbers an image, ``classes`` are these targets, float32 [n, C]. ``others``: further columns of
    the table that lists them.
    """

    folder: Path
    names: pa.Array
    classes: np.ndarray
    others: pa.Table | None = field(default=None, kw_only=True)
    unit: ClassVar[str] = "images"

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> Path:
        """The file of a row."""
        return self.folder / self.names[row].as_py()

    def target(self, row: int) -> int | np.ndarray:
        """The class of a row, or its targets, float32 [C]."""
        return int(self.classes[row]) if self.classes.ndim == 1 else self.classes[row]

    def take(self, rows: np.ndarray) -> ImageFiles:
        """The files ``rows`` [m]."""
        others = None if self.others is None else self.others.take(rows)
        return ImageFiles(self.folder, self.names.take(rows), self.classes[rows], others=others)

    def digest(self) -> dict[str, str]:
        """See :class:`data.digest.Digested`: of names and sizes of the files, and of their classes."""
        sizes, times = file_facts(self.folder, self.names.to_pylist())
        return {"files": digest(self.names, sizes), "labels": digest(self.classes), "times": digest(times)}

    def contents(self) -> str:
        """See :class:`data.digest.InFiles`."""
        return file_contents(self.folder, self.names.to_pylist())


@dataclass(frozen=True)
class Wanted:
    """Which files in class folders are samples: by their suffixes; with ``whole_folders``, each folder inside a class
    folder is one sample (a video as a folder of frames)."""

    suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    whole_folders: bool = False
    noun: str = "image"
    plural: str = "images"


IMAGES = Wanted()


def class_folders(folder: Path, left_out: LeftOut, wanted: Wanted = IMAGES) -> dict[str, list[str]]:
    """Class -> its images in ``folder/<class>``, at any depth, relative to ``folder`` with slashes; both sorted.

    Raises:
        UserError: no such folder, no class folders in it, or a class folder without an image.
    """
    if not folder.is_dir():
        near = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        close = difflib.get_close_matches(folder.name, near, n=1)
        hint = f"; did you mean {folder.with_name(close[0])}?" if close else ""
        raise UserError(f"{folder}: {'is a file, not a folder' if folder.exists() else 'no such folder'}{hint}")
    found: dict[str, list[str]] = {}
    beside = ""
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__MACOSX")):
            left_out(path.name, "hidden")
        elif path.is_dir():
            others: list[tuple[str, str]] = []
            found[path.name] = _find_images(
                folder, path, lambda name, why, others=others: others.append((name, why)), wanted
            )
            for other in others:
                left_out(*other)
            if not found[path.name]:
                hint = (
                    f"; {len(others):,} files were left out, such as {others[0][0]} ({others[0][1]})" if others else ""
                )
                raise UserError(
                    f"{path}: no {wanted.noun} in this class folder: add {wanted.plural} or move it away{hint}"
                )
        else:
            beside = beside or (path.name if path.name.lower().endswith(wanted.suffixes) else "")
            left_out(path.name, "not in a class folder")
    if not found:
        what = (
            f"its {wanted.plural} (such as {beside}) are not in class folders" if beside else "no class folders in it"
        )
        raise UserError(f"{folder}: {what}; it should look like {folder.name}/ants/1.jpg, {folder.name}/bees/2.jpg")
    return found


def _find_images(folder: Path, top: Path, left_out: LeftOut, wanted: Wanted) -> list[str]:
    found, seen = [], set()
    for place, folders, files in os.walk(top, followlinks=True):
        here = Path(place).relative_to(folder)
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        for name in [name for name in folders if name.startswith((".", "__MACOSX"))]:
            left_out((here / name).as_posix(), "hidden")
            folders.remove(name)
        folders.sort()
        if wanted.whole_folders:
            found += [(here / name).as_posix() for name in folders]
            folders.clear()
        for name in sorted(files):
            path = (here / name).as_posix()
            if name.startswith("."):
                left_out(path, "hidden")
            elif name.lower().endswith(".gif") and ".gif" not in wanted.suffixes:
                left_out(path, "GIFs are not used (nor by torchvision); save it as PNG if you need it")
            elif not name.lower().endswith(wanted.suffixes):
                left_out(path, f"its name does not end like that of an {wanted.noun}")
            elif re.search(r"[\r\n\ud800-\udfff]", path):
                left_out(path, "its name has line breaks or bytes that are not UTF-8; rename it")
            else:
                found.append(path)
    return sorted(found)


def read_class_map(splits: Path) -> dict[str, int]:
    """Class name -> number from 0 on, from ``classes.json``, which all folds share.

    Raises:
        UserError: there are no splits yet (names the command that makes them), or the file is invalid.
    """
    path = splits / "classes.json"
    again = f"python tools/split_folds.py --raw_data {splits.parent / 'raw'} --folds 5"
    if not path.is_file():
        what = f"{path}: no such file" if splits.is_dir() else f"{splits}: no splits yet"
        raise UserError(f"{what}; {again}{' --overwrite' if splits.is_dir() else ''} makes them")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid ({error}); {again} --overwrite makes it again") from None
    numbers = list(content.values()) if isinstance(content, dict) else []
    if not numbers or any(type(number) is not int for number in numbers) or sorted(numbers) != [*range(len(numbers))]:
        raise UserError(
            f'{path}: expected {{"ants": 0, "bees": 1}}, each number once; {again} --overwrite makes it again'
        )
    return dict(sorted(content.items(), key=lambda item: item[1]))


def read_index(path: Path, class_map: dict[str, int], folder: Path | None = None) -> ImageFiles:
    """The images that an index file lists, one per line: ``raw/ants/0013035.jpg`` has class ants.

    Args:
        path: such as ``data/x/splits/fold_0_train.txt``.
        class_map: from :func:`read_class_map`.
        folder: what the lines are relative to; default: the parent of the splits folder, ``data/x``.

    Raises:
        UserError: no such index file, or an empty one; a malformed line; an image that is missing or listed twice; a
            class that is not in ``class_map``.
    """
    folder = folder or path.absolute().parent.parent
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: is not an ordinary file")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        there = sorted(other.name for other in path.parent.glob("fold_*_train.txt"))
        hint = f"there are folds 0 to {len(there) - 1}" if there else "tools/split_folds.py makes it"
        raise UserError(f"{path}: no such file; {hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    names: dict[str, int] = {}  # -> line
    classes = []
    for number, line in enumerate(lines, 1):
        name = line.rstrip("\r")
        if not name.strip():
            continue
        parts = name.split("/")
        if len(parts) < 3 or "" in parts or ".." in parts:
            raise UserError(f"{path}: line {number}: {name!r:.80} is not of the form raw/<class>/<file>")
        if parts[1] not in class_map:
            listed = ", ".join(list(class_map)[:8]) + (", ..." if len(class_map) > 8 else "")
            raise UserError(f"{path}: line {number}: class {parts[1]!r} is not in classes.json, which has {listed}")
        if name in names:
            raise UserError(f"{path}: line {number}: {name} is already in line {names[name]}")
        if not (folder / name).is_file():
            raise UserError(f"{path}: line {number}: {folder / name} does not exist; split again if files were moved")
        names[name] = number
        classes.append(class_map[parts[1]])
    if not names:
        raise UserError(f"{path}: no image in it")
    return _image_files(folder, names, classes)


def read_class_folders(
    data: Path, left_out: LeftOut | None = None, wanted: Wanted = IMAGES
) -> tuple[dict[str, int], dict[str, ImageFiles]]:
    """Class map, and split -> images, of ``train/<class>/*`` and, if they exist, ``val/`` and ``test/``.

    Classes are numbered in the order of their names in ``train``; the other splits may lack some of them. ``left_out``
    is called for each file that is not an image.

    Raises:
        UserError: ``train`` is missing or lacks a class, a split has no class folders, or a class folder is empty.
    """
    class_map: dict[str, int] = {}
    sides: dict[str, ImageFiles] = {}
    for side in ("train", "val", "test"):
        if side != "train" and not (data / side).exists():
            continue

        def report(name: str, why: str, side: str = side) -> None:
            if left_out is not None:
                left_out(f"{side}/{name}", why)

        found = class_folders(data / side, report, wanted)
        class_map = class_map or {name: number for number, name in enumerate(found)}
        if unknown := [name for name in found if name not in class_map]:
            raise UserError(f"{data / side / unknown[0]}: {data / 'train'} has no such class to train on")
        classes = [class_map[name] for name, files in found.items() for _ in files]
        sides[side] = _image_files(data, (f"{side}/{file}" for files in found.values() for file in files), classes)
    return class_map, sides


def read_splits(
    data: Path, fold: int, left_out: LeftOut | None = None, wanted: Sequence[str] = ("train", "validation", "test")
) -> tuple[dict[str, int], dict[str, ImageFiles]]:
    """Class map, and split -> images, of a folder with ``splits/`` (of ``fold``) or with ``train/`` and ``val/``.

    With index files only the ``wanted`` splits are read; a test split is optional.

    Raises:
        UserError: there is neither (names the command that splits), or they are invalid; see :func:`read_index` and
            :func:`read_class_folders`.
    """
    index = data / "splits"
    if index.is_dir() or not (data / "train").is_dir():
        class_map = read_class_map(index)
        names = {"train": f"fold_{fold}_train.txt", "validation": f"fold_{fold}_val.txt", "test": "test.txt"}
        there = [split for split in wanted if split != "test" or (index / names["test"]).exists()]
        return class_map, {split: read_index(index / names[split], class_map) for split in there}
    class_map, sides = read_class_folders(data, left_out)
    return class_map, {"validation" if side == "val" else side: files for side, files in sides.items()}


def files_of_table(table: TextTable, folder: str | None) -> tuple[Path, list[str]]:
    """The folder of the files that a table lists as its texts (default: the table's own), and their names in it.

    Raises:
        UserError: a file is missing; gives the row.
    """
    home = Path(folder) if folder else Path(table.source).parent
    names = table.texts.to_pylist()
    for row, name in enumerate(names, 1):
        if not (home / name).exists():
            where = f"{table.source}: row {row}"
            raise UserError(f"{where}: no file {home / name}; --media_folder says where the files are")
    return home, names


def listed_images(table: TextTable, folder: str | None, targets: np.ndarray) -> ImageFiles:
    """The images that a table lists, as :func:`files_of_table` finds them, with ``targets`` [n] or [n, C]."""
    import pyarrow as pa

    home, names = files_of_table(table, folder)
    return ImageFiles(home, pa.array(names, pa.large_string()), targets, others=table.others)


def _image_files(folder: Path, names: Iterable[str], classes: list[int]) -> ImageFiles:
    import numpy as np
    import pyarrow as pa

    return ImageFiles(folder, pa.array(names, pa.large_string()), np.array(classes, np.int64))
