"""Check the data of a training run before it is trained on, as its script reads it.

  python tools/validate_data.py scripts/text_classify.py --config configs/text_trec.yaml \\
      --train_file data/train.csv --test_file data/test.csv
  python tools/validate_data.py --json found.json scripts/image_classify.py --data_dir data/insects

Every split is opened by the script's own load_data, so what it refuses is
refused here, in the same line. Then samples are counted by class and split,
each image or video is opened, and copies of training samples are looked for in
the other splits: equal texts, clips with equal frames, images that look alike.
Exit code 0: no errors, perhaps warnings; 2: errors.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from accelerando.base.config import check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.log import log, quiet_libraries, with_progress
from accelerando.base.processes import map_ahead
from accelerando.base.texts import one_line
from accelerando.inference.outputs import aligned_rows, whole_file
from accelerando.inference.scripts import import_script

if TYPE_CHECKING:
    import numpy as np

    from accelerando.data.duplicates import Fingerprint

WORDS = "SCRIPT [FLAG ...]"
EXAMPLE = "python tools/validate_data.py scripts/text_classify.py --train_file data/train.csv"
SIDE = 128  # pixels of the shorter side, at least, to which an image is decoded to be compared
MOST_BITS = 4  # of 64, in which the hashes of images that look alike differ
NAMED = 5  # samples that a line names
FEW = 2  # training samples of a class: fewer are an exception more than a class
UNREADABLE, LEAKED = 0.5, 0.5  # shares of a split from which on they are an error


@dataclass
class Args:
    # -- data check --
    words: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar=WORDS)] = ()  # see above
    json: str | None = None  # file for all that was found
    most_opened: int = 100_000  # images or videos of each split that are opened, spread evenly; 0: none
    accept_problems: bool = False  # errors that the script itself does not refuse are warnings


@dataclass
class Found:
    """What was found: samples by split, by class and split, what is unreadable and copied, and lines about it."""

    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    classes: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)  # head -> split -> class -> samples
    unreadable: dict[str, list[str]] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)  # split -> its samples that are in training too
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Head:
    """The classes of one output: their names, and for each split the class of its n samples, int64 [n], or of several
    labels a sample 0 or 1 for each, [n, C]."""

    name: str
    names: list[str]
    of: dict[str, np.ndarray]


# ---------------------------------------------------------------------------------------------------------- the tasks


def heads_of(data: Any) -> list[Head]:
    """The classes of a script's data, whatever its task calls them; none where there are only pairs."""
    import numpy as np

    splits = data.splits
    first = next(iter(splits.values()))
    if getattr(data, "problem_type", None) == "regression":
        return []
    if hasattr(first, "gloss"):  # signs
        return [
            Head("gloss", [str(name) for name in data.names["gloss"]], {s: clips.gloss for s, clips in splits.items()}),
            Head("category", [str(name) for name in data.names["cat"]], {s: clips.cat for s, clips in splits.items()}),
        ]
    if isinstance(getattr(data, "classes", None), dict):  # actions; CLIP with a class field
        names = list(getattr(data, "label_names", None) or getattr(data, "class_names", None) or [])
        of = {split: np.asarray(found) for split, found in data.classes.items() if split != "kept"}
        return [Head("class", names, of)] if names and of else []
    if hasattr(first, "labels") and first.labels is not None:  # texts
        return [Head("label", list(data.label_names), {split: table.labels for split, table in splits.items()})]
    if hasattr(first, "classes"):  # images
        return [Head("class", list(data.label_names), {split: files.classes for split, files in splits.items()})]
    return []


def samples_in(splits: dict[str, Any]) -> dict[str, Any]:
    """The splits of the task itself: not what is scored beside them."""
    return {split: data for split, data in splits.items() if split not in ("kept", "novel")}


def opens(data: Any, splits: dict[str, Any]) -> Callable[[str, int], np.ndarray | str] | None:
    """A function of a split and a row that gives the image, uint8 [H, W, 3], or a line that says why it cannot be read;
    None: the samples are no images."""
    from accelerando.data.decode import decode_pixels, is_unreadable

    first = next(iter(splits.values()))
    if hasattr(first, "path") and hasattr(first, "folder"):  # files in folders
        where = lambda found, row: (found.path(row).read_bytes(), str(found.path(row)))  # noqa: E731
    elif hasattr(first, "read") and hasattr(first, "where"):  # pairs
        where = lambda found, row: (found.read(row)[0], found.where(row))  # noqa: E731
    elif hasattr(first, "open") and hasattr(first, "place"):  # images and videos
        return partial(open_media, splits)
    else:
        return None

    def opened(split: str, row: int) -> np.ndarray | str:
        name = f"{split} {row}"
        try:
            content, name = where(splits[split], row)
            return decode_pixels(content, SIDE)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and not is_unreadable(error):
                raise
            return f"{name}: {' '.join(str(error).split())}"

    return opened


def open_media(splits: dict[str, Any], split: str, row: int) -> np.ndarray | str:
    """Frames of an image or a video, side by side, or a line that says why it cannot be read."""
    from accelerando.data.decode import is_unreadable, pixels_of
    from accelerando.data.media import even_positions, frames_of

    import numpy as np  # isort: skip

    media = splits[split]
    try:
        frames = [pixels_of(frame, SIDE) for frame in frames_of(media.open(row), even_positions(3))]
        height = min(map(len, frames))
        return np.concatenate([frame[:height] for frame in frames], axis=1)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and not is_unreadable(error):
            raise
        return f"{media.place(row)}: {' '.join(str(error).split())}"


def keys_of(data: Any, split: str) -> Iterable[bytes] | None:
    """A digest of each text or clip of a split, equal for copies; None: the samples are images."""
    import hashlib

    found = data.splits[split]
    if hasattr(data, "tables"):  # of texts
        table = data.tables[split]
        texts = (" ".join(table.text(row).casefold().split()) for row in range(len(table)))
        return (hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest() for text in texts)
    if hasattr(found, "gloss"):
        return (hashlib.blake2b(found[row]["frames"].tobytes(), digest_size=16).digest() for row in range(len(found)))
    return None


def name_of(data: Any, split: str, row: int) -> str:
    """What a sample is called in a line."""
    found = data.splits[split]
    if hasattr(data, "tables"):
        text = data.tables[split].text(row)
        return f"row {row + 1} ({text[:40]!r}{' ...' * (len(text) > 40)})"
    if hasattr(found, "gloss"):
        return found.names[row]
    for place in ("place", "where"):
        if hasattr(found, place):
            return getattr(found, place)(row)
    return str(found.path(row))


# ------------------------------------------------------------------------------------------------------------- checks


def count_classes(data: Any, heads: list[Head], found: Found) -> None:
    """Samples by class and split; what is scored has to be trained on."""
    import numpy as np

    for head in heads:
        counts = {
            split: classes.sum(axis=0).astype(np.int64)
            if classes.ndim == 2
            else np.bincount(classes, minlength=len(head.names))
            for split, classes in head.of.items()
        }
        found.classes[head.name] = {
            split: dict(zip(head.names, row.tolist(), strict=True)) for split, row in counts.items()
        }
        if "train" not in counts:
            continue
        for split in [split for split in counts if split not in ("train", "novel")]:
            if len(lacking := np.flatnonzero((counts[split] > 0) & (counts["train"] == 0))):
                samples = int(counts[split][lacking].sum())
                found.errors.append(
                    f"{split}: {samples:,} samples are of {shown([head.names[at] for at in lacking], 'classes')} "
                    "that no training sample is of"
                )
        few = [head.names[at] for at in np.flatnonzero((counts["train"] < FEW) & (counts["train"] > 0))]
        if few:
            found.warnings.append(f"train: a single sample of {shown(few, 'classes')} ({head.name})")


def open_all(data: Any, found: Found, most: int) -> dict[str, tuple[list[int], list[Fingerprint]]]:
    """Opens the images of all splits and notes what cannot be read; split -> (rows, fingerprints) of the others."""
    from accelerando.data.duplicates import fingerprint

    splits = samples_in(data.splits)
    opened = opens(data, splits)
    prints: dict[str, tuple[list[int], list[Fingerprint]]] = {}
    if opened is None or not most:
        return prints

    def look(split: str, row: int) -> Fingerprint | str:
        pixels = opened(split, row)
        return pixels if isinstance(pixels, str) else fingerprint(pixels)

    threads = max(1, min(8, os.cpu_count() or 1))
    for split, samples in splits.items():
        total = min(len(samples), most)
        rows = [number * len(samples) // total for number in range(total)]
        if images := getattr(samples, "image_numbers", None):  # an image with several captions is opened once
            numbers, seen = images(), set()
            rows = [row for row in rows if not (numbers[row] in seen or seen.add(numbers[row]))]
        results = map_ahead(partial(look, split), rows, threads, 8 * threads)
        prints[split] = ([], [])
        bad = []
        for row, result in with_progress(results, len(rows), f"opening {split}", "samples"):
            if isinstance(result, str):
                bad.append(one_line(result))
            else:
                prints[split][0].append(row)
                prints[split][1].append(result)
        if bad:
            found.unreadable[split] = bad
            serious = len(bad) >= UNREADABLE * len(rows)
            line = f"{split}: {len(bad):,} of {len(rows):,} samples cannot be read: {'; '.join(bad[:NAMED])}"
            (found.errors if serious else found.warnings).append(line)
    return prints


def copies_by_key(data: Any, found: Found) -> None:
    """Texts and clips of the other splits that are training samples too."""
    trained = keys_of(data, "train")
    if trained is None:
        return
    known = set(trained)
    for split in [split for split in samples_in(data.splits) if split != "train"]:
        same = [row for row, key in enumerate(keys_of(data, split)) if key in known]
        note_copies(data, split, same, len(data.splits[split]), found)


def copies_by_look(data: Any, prints: dict[str, tuple[list[int], list[Fingerprint]]], found: Found) -> None:
    """Images of the other splits that look like a training image."""
    import numpy as np

    from accelerando.data.duplicates import duplicate_groups

    if "train" not in prints:
        return
    rows = [(split, row) for split, (own, _) in prints.items() for row in own]
    groups = duplicate_groups([one for _, own in prints.values() for one in own], MOST_BITS)
    trained = np.array([split == "train" for split, _ in rows], bool)
    leaked = np.isin(groups, np.unique(groups[trained])) & ~trained
    for split in [split for split in prints if split != "train"]:
        same = [row for (where, row), is_copy in zip(rows, leaked, strict=True) if is_copy and where == split]
        note_copies(data, split, same, len(prints[split][0]), found)


def note_copies(data: Any, split: str, rows: Sequence[int], total: int, found: Found) -> None:
    """Notes samples of a split that are training samples too; of most of them, the score would mean nothing."""
    found.copies[split] = len(rows)
    if not rows:
        return
    serious = len(rows) >= LEAKED * total
    line = (
        f"{split}: {len(rows):,} of {total:,} samples are training samples too, or look like one: "
        f"{'; '.join(one_line(name_of(data, split, row)) for row in rows[:NAMED])}"
    )
    (found.errors if serious else found.warnings).append(line)


def shown(names: Sequence[str], noun: str) -> str:
    """The first of ``names``, and how many there are."""
    names = list(map(str, names))
    text = ", ".join(names[:NAMED])
    return text if len(names) <= NAMED else f"{len(names):,} {noun} ({text}, ...)"


# ------------------------------------------------------------------------------------------------------------- output


def table_of(found: Found) -> str:
    """Samples by class and split, as text; of very many classes the total alone."""
    splits = list(found.splits)
    rows = [("", *splits)]
    rows.append(("samples", *(f"{found.splits[split]['count']:,}" for split in splits)))
    for head, counts in found.classes.items():
        names = next(iter(counts.values()))
        if len(names) <= 40:
            rows += [
                (f"{head} {name}", *(f"{counts[split][name]:,}" if split in counts else "" for split in splits))
                for name in names
            ]
        else:
            least = [min(counts[split].values()) if split in counts else "" for split in splits]
            rows.append((f"smallest of {len(names):,} ({head})", *map(str, least)))
    return aligned_rows(rows)


def written(found: Found) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "splits": found.splits, "classes": found.classes,
        "unreadable": {split: {"count": len(lines), "first": lines[:100]} for split, lines in found.unreadable.items()},
        "copies": found.copies, "errors": found.errors, "warnings": found.warnings,
    }  # fmt: skip


class Kept(logging.Handler):
    """Keeps the warnings that a script logs while it loads its data."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(one_line(record.getMessage()))


# --------------------------------------------------------------------------------------------------------------- main


def validate(script: Path, flags: list[str], most_opened: int) -> Found:
    """All that there is to say about the data of a script with these flags.

    Raises:
        UserError: the script refuses the flags or the data.
    """
    from accelerate import Accelerator

    from accelerando.data.digest import describe

    module = import_script(script)
    args = parse_args(module.Args, getattr(module, "ALIASES", {}), flags)
    if hasattr(module, "check_args"):
        module.check_args(args)
    kept = Kept()
    log.addHandler(kept)
    log.setLevel(logging.INFO)
    log.propagate = False
    data = module.load_data(args, Accelerator(cpu=True))
    log.removeHandler(kept)
    if hasattr(data, "tasks"):
        raise UserError(f"{script}: the data of several tasks: validate each one, as that of scripts/text_classify.py")
    found = Found(warnings=kept.lines)
    for split, samples in data.splits.items():
        described = describe(samples)
        described.pop("times", None)  # of the files: they say nothing about what is in them
        found.splits[split] = described
    count_classes(data, heads_of(data), found)
    prints = open_all(data, found, most_opened)
    if prints:
        copies_by_look(data, prints, found)
    else:
        copies_by_key(data, found)
    return found


def split_words(words: list[str]) -> tuple[list[str], Path, list[str]]:
    """(the tool's own flags, the script, its flags) of a command line.

    Raises:
        UserError: there is no script.
    """
    at = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        raise UserError(f"no script among the arguments; give one, as in: {EXAMPLE}")
    return words[:at], Path(words[at]), words[at + 1 :]


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        parse_args(Args, argv=["--help"])
    ours, script, flags = split_words(words)
    args = parse_args(Args, argv=ours)
    check_ranges(args, most_opened=(0, 2**40))
    quiet_libraries()
    found = validate(script, flags, args.most_opened)
    if args.accept_problems:
        found.warnings, found.errors = found.errors + found.warnings, []
    if args.json:
        with whole_file(Path(args.json), flag="--json") as file:
            file.write(json.dumps(written(found), indent=1, ensure_ascii=False) + "\n")
    print(table_of(found))
    for line in found.warnings:
        print(f"warning: {line}")
    totals = Counter(errors=len(found.errors), warnings=len(found.warnings))
    print(f"{totals['errors']:,} errors, {totals['warnings']:,} warnings")
    if found.errors:
        first, more = found.errors[0], len(found.errors) - 1
        for line in found.errors[1:]:
            print(f"error: {line}", file=sys.stderr)
        raise UserError(f"{first}{f' (and {more:,} more above)' if more else ''}; --accept_problems goes on anyway")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
