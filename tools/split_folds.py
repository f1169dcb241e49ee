"""Split class folders of images into a held-out test set and stratified folds.

  python tools/split_folds.py --raw_data data/x/raw --folds 5
  python tools/split_folds.py --raw_data data/x/raw --folds 5 --test_fraction 0.2
  python tools/split_folds.py --raw_data data/x/raw --groups patients.csv

RAW_DATA holds a folder for each class, with its images at any depth. The tool
writes splits/test.txt, fold_0_train.txt, fold_0_val.txt and so on, with a path
on each line, and classes.json, which numbers the classes for all folds. Every
image that is not test is validated on in one fold and trained on in the others.
Every class has its share of each part, to within one image.

Copies of an image (same pixels, or resized, compressed again, brighter) stay
together on one side, and so do the images of a group in --groups (a patient, a
camera; columns file and group). Files that cannot be read are left out and
named.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accelerando.base.config import Alias, check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line, first_line
from accelerando.base.files import check_can_be_made, whole_folder
from accelerando.base.log import with_progress
from accelerando.base.processes import map_in_processes
from accelerando.base.texts import one_line
from accelerando.data.folders import class_folders
from accelerando.inference.outputs import print_first

if TYPE_CHECKING:
    import numpy as np

    from accelerando.data.duplicates import Fingerprint

ALIASES: dict[str, Alias] = {
    "k": "folds", "num_folds": "folds", "n_folds": "folds", "n_splits": "folds", "test_size": "test_fraction",
    "test_split": "test_fraction", "test_ratio": "test_fraction", "raw_dir": "raw_data", "splits_dir": "output_dir",
    "random_state": "seed",
}  # fmt: skip
OURS = r"fold_\d+_(train|val)\.txt|test\.txt|classes\.json|duplicates\.txt|skipped\.txt"
SIDES = {"train", "training", "val", "valid", "validation", "test", "dev"}
NAMED = 5  # files left out, and copies in two classes, that are named on the console


@dataclass
class Args:
    # -- data --
    raw_data: str  # folder with a folder of images for each class
    output_dir: str | None = None  # folder of the index files (default: splits beside --raw_data)
    overwrite: bool = False  # replace an earlier split there
    # -- split --
    folds: int = 5  # folds of what is not test
    test_fraction: float = 0.15  # share of the held-out test images; 0: no test set
    groups: str | None = None  # CSV with file and group: images of a group stay on one side
    near_duplicates: int = 4  # bits of 64 by which hashes of copies may differ; 0: only copies with the same pixels
    seed: int = 42  # of the split
    # -- work --
    num_workers: int | None = None  # processes that read images (default: as many as cores, at most 8); 0: this one
    config: tuple[str, ...] = ()  # YAML files with any of these settings


# ------------------------------------------------------------------------------------------------------------ input


def find_images(raw: Path, left_out: Callable[[str, str], None]) -> dict[str, list[str]]:
    """Class -> its images relative to ``raw``, sorted.

    Raises:
        UserError: no folder, no class folders, one alone, an empty one, or sides instead of classes.
    """
    if (raw / "raw").is_dir() and (raw / "splits").is_dir():
        raise UserError(f"--raw_data {raw}: holds raw and splits; did you mean {raw / 'raw'}?")
    names = sorted(path.name for path in raw.iterdir() if path.is_dir()) if raw.is_dir() else []
    names = [name for name in names if not name.startswith((".", "__MACOSX"))]
    if len(names) > 1 and {name.lower() for name in names} <= SIDES:
        raise UserError(
            f"--raw_data {raw}: {', '.join(names)} are sides, not classes: this set is split already; "
            f"to split it again, gather the images of both in one {raw.name}/<class>"
        )
    found = class_folders(raw, left_out)
    if len(found) == 1:
        (name,) = found
        inner = "; if its folders are the classes, give that one" if any(f.count("/") > 1 for f in found[name]) else ""
        raise UserError(f"--raw_data {raw}: only one class folder, {name}: two at least are needed{inner}")
    return found


def read_groups(path: Path, raw: Path, images: list[str]) -> np.ndarray:
    """The group of each image, numbered from 0, int [n]. Files are relative to ``raw`` or to the folder it lies in.

    Raises:
        UserError: the table is broken, a file has two groups or an empty one, or images are not in it.
    """
    import numpy as np

    from accelerando.data.table_formats import csv_records, similar_file

    if not path.is_file():
        raise UserError(f"--groups {path}: {'is a folder' if path.is_dir() else 'no such file'}{similar_file(path)}")
    there = set(images)
    given: dict[str, str] = {}
    for where, row in csv_records(path, ["file", "group"]):
        file, group = row["file"].strip().replace("\\", "/").removeprefix("./"), row["group"].strip()
        inside = file.removeprefix(f"{raw.name}/")
        file = inside if inside in there else file
        if not group:
            raise UserError(f"{path}: {where}: group is empty; give an image that is alone a group of its own")
        if given.setdefault(file, group) != group:
            raise UserError(f"{path}: {where}: {file} is in group {given[file]!r} already")
    chosen = [given.get(image) for image in images]
    if None in chosen:
        first, count = images[chosen.index(None)], chosen.count(None)
        more = f" and {count - 1:,} more of {len(images):,} images" if count > 1 else ""
        raise UserError(f"{path}: no row for {raw.name}/{first}{more}; each image needs its group")
    return np.unique(np.array(chosen, object), return_inverse=True)[1]


def read_print(path: str) -> Fingerprint | str:
    """What is kept of an image file to find its copies, or why it cannot be used; what a worker runs."""
    from accelerando.data.decode import decode_pixels
    from accelerando.data.duplicates import fingerprint

    try:
        data = Path(path).read_bytes()
        return fingerprint(decode_pixels(data)) if data else "the file is empty"
    except (ValueError, OSError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or first_line(error)}"


def read_prints(raw: Path, images: list[str], workers: int | None) -> list[Fingerprint | str]:
    """:func:`read_print` of each image, by ``workers`` processes."""
    if workers is None:  # one is not worth its start for a few images
        workers = min(8, len(os.sched_getaffinity(0)), len(images) // 100)
        workers = workers if workers > 1 else 0
    found = map_in_processes(read_print, [f"{raw}/{image}" for image in images], workers)
    return list(with_progress(found, len(images), "reading", "images"))


# ------------------------------------------------------------------------------------------------------------ split


def check_counts(raw: Path, classes: np.ndarray, names: list[str], args: Args, skipped: list[str]) -> None:
    """UserError for a class that has too few images for every fold and the test; names one that was left out."""
    import numpy as np

    share = args.test_fraction
    for name, count in zip(names, np.bincount(classes, minlength=len(names)).tolist(), strict=True):
        test = max(1, int(round(count * share, 9))) if share else 0
        if count - test < args.folds:
            images = f"{count} image" + "s" * (count != 1)
            goes = f", of which the test takes {test}" if test else ""
            lost = [line for line in skipped if line.startswith(f"{raw.name}/{name}/")]
            raise UserError(
                f"{raw / name}: {images}{goes}: too few for {args.folds} folds; add images, move the folder away, or "
                f"give fewer --folds{' or a smaller --test_fraction' if share > 0 else ''}"
                + (f"; {len(lost):,} left out, such as {lost[0]}" if lost else "")
            )


def check_parts(side: np.ndarray, group: np.ndarray, args: Args) -> None:
    """UserError for a fold, or a test set, without an image: there are too few groups of what has to stay together."""
    import numpy as np

    counts = np.bincount(side, minlength=args.folds + 1)
    wanted = [(0, "the test set")] if args.test_fraction > 0 else []
    wanted += [(fold + 1, f"fold {fold}") for fold in range(args.folds)]
    empty = [name for number, name in wanted if not counts[number]]
    if empty:
        raise UserError(
            f"{', '.join(empty)} would have no image: the {len(side):,} images form {len(np.unique(group)):,} groups "
            f"of copies{' and of --groups' if args.groups else ''}, each of which stays on one side; give "
            "fewer --folds, or --near_duplicates 0 if they are not copies"
        )


def joined(*partitions: np.ndarray) -> np.ndarray:
    """Groups of what is together in any of the partitions, int [n] each: a group is named by its first row."""
    import numpy as np

    from accelerando.data.duplicates import join_pairs

    links = [np.unique(group, return_index=True, return_inverse=True)[1:] for group in partitions]
    pairs = (pair for first, group in links for pair in enumerate(first[group].tolist()))
    return join_pairs(len(partitions[0]), pairs)


# ----------------------------------------------------------------------------------------------------------- output


def check_output(target: Path, raw: Path, args: Args) -> None:
    """UserError where ``target`` cannot be written, or holds something that this tool did not write."""
    flag = f"--output_dir {target}"
    if target.exists() and not target.is_dir():
        raise UserError(f"{flag} is a file")
    if target.resolve() == raw.resolve() or target.resolve() in raw.resolve().parents:
        raise UserError(f"{flag} holds the images: choose another folder")
    if raw.resolve() in target.resolve().parents:
        raise UserError(f"{flag} lies among the class folders: choose another folder")
    names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if others := [name for name in names if not re.fullmatch(OURS, name)]:
        raise UserError(f"{flag} also holds {others[0]}: move that away, or choose another folder")
    if names and not args.overwrite:
        raise UserError(f"{flag} holds a split already: --overwrite replaces it")


def write_all(
    draft: Path,
    images: list[str],
    side: np.ndarray,
    names: list[str],
    copies: list[str],
    skipped: list[str],
    args: Args,
) -> None:
    """Writes all files of the split into the new folder ``draft``; ``images`` are sorted, relative to the data."""

    def write(name: str, lines: Iterable[str]) -> None:
        text = "".join(f"{line}\n" for line in lines)
        (draft / name).write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")

    draft.mkdir(parents=True)
    for fold in range(args.folds):
        number = fold + 1
        write(f"fold_{fold}_val.txt", (name for name, here in zip(images, side, strict=True) if here == number))
        train = (name for name, here in zip(images, side, strict=True) if here not in (0, number))
        write(f"fold_{fold}_train.txt", train)
    if args.test_fraction > 0:
        write("test.txt", (name for name, here in zip(images, side, strict=True) if here == 0))
    write(
        "classes.json", [json.dumps({name: number for number, name in enumerate(names)}, indent=2, ensure_ascii=False)]
    )
    if copies:
        write("duplicates.txt", copies)
    if skipped:
        write("skipped.txt", map(one_line, skipped))


def list_copies(
    images: list[str], classes: np.ndarray, names: list[str], group: np.ndarray, prints: list[Fingerprint]
) -> tuple[list[str], str, list[str]]:
    """Lines of ``duplicates.txt``, a sentence for the report, and a line for each group whose classes contradict."""
    import numpy as np

    order = np.argsort(group, kind="stable")
    parts = [part for part in np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(part) > 1]
    lines, conflicts = [], []
    for part in parts:
        kind = "the same pixels" if len({prints[row].digest for row in part}) == 1 else "nearly the same"
        several = list(dict.fromkeys(names[classes[row]] for row in part))
        if len(several) > 1:
            other = next(row for row in part if classes[row] != classes[part[0]])
            conflicts.append(f"{images[part[0]]} and {images[other]}")
        head = f"# {len(part)} images, {kind}" + (f", in different classes: {', '.join(several)}" * (len(several) > 1))
        lines += [*([""] if lines else []), head, *(images[row] for row in part)]
    if not parts:
        return [], "", []
    count, most = sum(map(len, parts)), max(map(len, parts))
    if len(parts) == 1:
        return lines, f"1 group of duplicates ({count:,} images) is on one side", conflicts
    counts = f"{count:,} images, up to {most:,} in one"
    return lines, f"{len(parts):,} groups of duplicates ({counts}) are each on one side", conflicts


def report(side: np.ndarray, classes: np.ndarray, names: list[str], args: Args) -> str:
    """An aligned table, a line for each part; of up to 20 classes another one, and the classes that a part lacks."""
    import numpy as np

    names = [one_line(name) for name in names]
    counts = np.zeros((args.folds + 1, len(names)), np.int64)
    np.add.at(counts, (side, classes), 1)
    sizes = counts.sum(1)
    parts = [(0, "test")] if args.test_fraction > 0 else []
    parts += [(number, f"fold {number - 1}") for number in range(1, args.folds + 1)]
    lines = [f"{'part':<10}{'images':>10}{'share':>9}{'classes':>10}{'trains on':>12}"]
    notes = []
    for number, title in parts:
        line = f"{title:<10}{sizes[number]:>10,}{sizes[number] / len(side):>9.1%}{(counts[number] > 0).sum():>10,}"
        lines.append(line + (f"{sizes[1:].sum() - sizes[number]:>12,}" if number else ""))
        if lacking := [names[index] for index in np.flatnonzero(counts[number] == 0)]:
            listed = ", ".join(lacking[:8]) + (", ..." if len(lacking) > 8 else "")
            notes.append(f"{title} has no image of {len(lacking):,} of {len(names):,} classes: {listed}")
    lines.append(f"{'total':<10}{len(side):>10,}{1:>9.1%}{len(names):>10,}")
    if len(names) <= 20:
        width = min(36, max(len("class"), *map(len, names)))
        lines += ["", f"{'class':<{width}}{'images':>10}{'test':>10}{'each fold':>16}"]
        for index, name in enumerate(names):
            low, high = counts[1:, index].min(), counts[1:, index].max()
            each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            short = name if len(name) <= width else name[: width - 3] + "..."
            lines.append(f"{short:<{width}}{counts[:, index].sum():>10,}{counts[0, index]:>10,}{each:>16}")
    lines += [""] * bool(notes)
    for note in notes:
        lines += textwrap.wrap(note, 80, subsequent_indent="  ")
    return "\n".join(lines)


def main() -> None:
    args = parse_args(Args, ALIASES)
    check_ranges(args, folds=(2, 1000), test_fraction=(0, 0.9), near_duplicates=(0, 16))
    raw = Path(args.raw_data)
    raw = raw.resolve() if raw.name in ("", "..") else raw  # its name begins each line
    target = Path(args.output_dir) if args.output_dir else raw.parent / "splits"
    check_can_be_made(target, "--output_dir")
    skipped: list[str] = []

    def left_out(name: str, why: str) -> None:
        skipped.append(f"{raw.name}/{name}: {why}")

    found = find_images(raw, left_out)
    check_output(target, raw, args)

    import numpy as np

    from accelerando.data.duplicates import duplicate_groups
    from accelerando.data.splits import deal_folds

    names = list(found)
    class_of = {image: number for number, name in enumerate(names) for image in found[name]}
    images = sorted(class_of)
    classes = np.array([class_of[image] for image in images])
    check_counts(raw, classes, names, args, skipped)
    given = read_groups(Path(args.groups), raw, images) if args.groups else None

    results = read_prints(raw, images, args.num_workers)
    sound = np.array([not isinstance(result, str) for result in results])
    for image, result in zip(images, results, strict=True):
        if isinstance(result, str):
            left_out(image, result)
    skipped.sort()
    prints = [result for result in results if not isinstance(result, str)]
    listed = [f"{raw.name}/{image}" for image, good in zip(images, sound, strict=True) if good]
    classes = classes[sound]
    check_counts(raw, classes, names, args, skipped)
    group = duplicate_groups(prints, args.near_duplicates)
    copies, sentence, conflicts = list_copies(listed, classes, names, group, prints)
    if given is not None:
        group = joined(group, given[sound])
    side = deal_folds(classes, group, args.test_fraction, args.folds, np.random.default_rng(args.seed))
    check_parts(side, group, args)

    try:
        with whole_folder(target) as draft:
            write_all(draft, listed, side, names, copies, skipped, args)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--output_dir {target}: {error.strerror}") from None

    print_first(skipped, "left out", NAMED)
    print_first(conflicts, "warning: copies in different classes", NAMED)
    print(report(side, classes, names, args))
    notes = [f"{sentence}:\n  {target / 'duplicates.txt'}"] if copies else []
    notes += [f"{len(skipped):,} left out, all named in {target / 'skipped.txt'}"] if skipped else []
    if target.resolve().parent != raw.resolve().parent:
        notes.append(f"The paths in it are relative to {raw.parent}")
    print("\n".join(["", *notes, f"Written to {target}"]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the draft is cleared away
    with errors_in_one_line():
        main()
