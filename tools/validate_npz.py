"""Check sign clips (.npz files) and their labels before training.

  python tools/validate_npz.py data/sign/train
  python tools/validate_npz.py data/sign/val --train_folder data/sign/train \\
      --num_gloss 105 --num_cat 10
  python tools/validate_npz.py data/sign --labels data/sign/labels_val.csv \\
      --train_labels data/sign/labels_train.csv

Opens the clips that the labels list, or without labels every clip of the
folder. With a training set, compares classes, names and contents with it.
Exit code 0: no errors, perhaps warnings; 2: errors.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from accelerando.base.config import Alias, check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.processes import map_in_processes
from accelerando.inference.outputs import whole_file

if TYPE_CHECKING:
    from accelerando.data.sign_labels import Clip, Problem

    Setting = str | int | bool | None  # of inspect_clip

ALIASES: dict[str, Alias] = {
    "labels_val_csv": "labels", "labels_csv": "labels", "labels_train_csv": "train_labels",
    "keypoints_train": "train_folder", "features_train": "train_folder", "key": "kp_key",
}  # fmt: skip


@dataclass
class Args:
    # -- data --
    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]  # folder of the clips
    labels: str | None = None  # CSV with file, gloss, cat (default: labels.csv in FOLDER, where there is one)
    train_folder: str | None = None  # clips of the training set that this set is to validate (default: FOLDER)
    train_labels: str | None = None  # its labels (default: labels.csv in --train_folder, where there is one)
    # -- what is right --
    num_gloss: int | None = None  # glosses are below this
    num_cat: int | None = None  # categories are below this
    kp_key: str = "X"  # array with the frames
    width: int | None = 156  # channels of a frame; None: any
    require_x2048: bool = False  # the features X2048 are what is trained on
    expect_mask: bool = False  # warn of clips without a mask
    # -- work --
    num_workers: int | None = None  # processes (default: a core for each 500 clips, at most 8); 0: this one
    json: str | None = None  # file for all problems, as JSON
    config: tuple[str, ...] = ()  # YAML files with any of these settings


# ------------------------------------------------------------------------------------------------------------- work


def inspect_all(folder: Path, names: list[str], workers: int | None, what: str, **settings: Setting) -> Iterator[Clip]:
    """:func:`data.sign_labels.inspect_clip` of each clip, in order, by ``workers`` processes.

    Raises:
        UserError: a worker was killed.
    """
    from tqdm import tqdm

    inspect = functools.partial(inspect_one, folder, settings=settings)
    workers = min(8, os.cpu_count() or 1, len(names) // 500) if workers is None else workers
    bar = tqdm(total=len(names), desc=what, unit=" clips", delay=2, disable=None, leave=False)
    with bar:
        for clip in map_in_processes(inspect, names, workers if workers > 1 else 0):
            yield clip
            bar.update()


def inspect_one(folder: Path, name: str, settings: dict[str, Setting]) -> Clip:
    """One clip; what a worker runs."""
    from accelerando.data.sign_labels import inspect_clip

    return inspect_clip(folder / f"{name}.npz", f"{name}.npz", **settings)


def same_clips(
    names: list[str], digests: list[int | None], train_folder: Path, train_names: list[str], args: Args
) -> Iterator[Problem]:
    """Clips whose frames are those of a training clip."""
    import numpy as np

    from accelerando.data.sign_labels import make_problem

    settings = {"key": args.kp_key, "frames_only": True}
    trained = inspect_all(train_folder, train_names, args.num_workers, "comparing", **settings)
    # 8 bytes a clip; 0 stands for a clip that cannot be compared.
    hashes = np.fromiter((clip.digest or 0 for clip in trained), np.uint64, len(train_names))
    order = np.argsort(hashes, kind="stable")
    together = train_folder.resolve() == Path(args.folder).resolve()
    for name, digest in zip(names, digests, strict=True):
        if digest is None:
            continue
        place = np.searchsorted(hashes, np.uint64(digest), sorter=order)
        if place < len(order) and hashes[order[place]] == digest:
            twin = train_names[order[place]]
            if not (together and twin == name):  # one file: same_name says it
                path = train_folder / f"{twin}.npz"
                yield make_problem("same_clip", f"{name}.npz", f"its frames are those of the training clip {path}")


# ----------------------------------------------------------------------------------------------------------- output


def table(problems: list[Problem], width: int) -> str:
    """Problems by kind, errors first: how many, what it is, the first one in full, the names of some others."""
    from accelerando.data.sign_labels import KINDS

    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in sorted(problems, key=lambda problem: problem.severity):  # "error" before "warning"
        groups.setdefault((problem.severity, problem.kind), []).append(problem)
    wide = max(len(kind) for _, kind in groups)
    fold = functools.partial(textwrap.wrap, break_on_hyphens=False)
    lines = [f"{'severity':<10}{'count':>7}  {'problem':<{wide}}  what, and the first clips"]
    for (severity, kind), found in groups.items():
        what, *rest = fold(KINDS[kind][1], width - wide - 21)
        lines.append(f"{severity:<10}{len(found):>7,}  {kind:<{wide}}  {what}")
        lines += [" " * (wide + 21) + line for line in rest]
        texts = [found[0].text]
        if others := list(dict.fromkeys(problem.file for problem in found[1:])):
            more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
            texts.append(f"also {', '.join(others[:3])}{more}")
        lines += ["    " + line for text in texts for line in fold(text, width - 4, subsequent_indent="  ")]
    return "\n".join(lines)


def summarise(problems: list[Problem], lengths: Counter, clips: int, glosses: int | None, args: Args) -> dict[str, Any]:
    """What ``--json`` writes; ``frames`` are those of the clips whose length is known."""
    frames = sorted(lengths)
    middle, seen = 0, 0
    for middle in frames:
        seen += lengths[middle]
        if 2 * seen >= lengths.total():
            break
    severities = Counter(problem.severity for problem in problems)
    return {
        "folder": args.folder,
        "clips": clips,
        "frames": {"min": frames[0], "median": middle, "max": frames[-1]} if frames else None,
        "glosses": glosses,
        "errors": severities["error"],
        "warnings": severities["warning"],
        "counts": dict(Counter(problem.kind for problem in problems)),
        "problems": [dataclasses.asdict(problem) for problem in problems],
    }


def summary_line(summary: dict[str, Any]) -> str:
    """One line: clips, frames, glosses, problems."""

    def count(number: int, word: str) -> str:
        plural = "" if number == 1 else "es" if word.endswith("ss") else "s"
        return f"{number:,} {word}{plural}"

    frames = summary["frames"]
    parts = [count(summary["clips"], "clip")]
    parts += [f"{frames['min']:,}/{frames['median']:,}/{frames['max']:,} frames (min/med/max)"] if frames else []
    parts += [] if summary["glosses"] is None else [count(summary["glosses"], "gloss")]
    return ", ".join([*parts, count(summary["errors"], "error"), count(summary["warnings"], "warning")])


def check_arguments(args: Args) -> None:
    """Fills in the defaults that depend on what is there; UserError for what does not fit."""
    check_ranges(args, num_gloss=(1, 2**62), num_cat=(1, 2**62), width=(1, 2**30))
    folder = Path(args.folder)
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give the folder of the clips (and a file of labels as --labels)")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if args.labels is None and (folder / "labels.csv").is_file():
        args.labels = str(folder / "labels.csv")
    if args.train_folder is not None:
        if not Path(args.train_folder).is_dir():
            raise UserError(f"--train_folder {args.train_folder}: no such folder")
        if args.train_labels is None and (Path(args.train_folder) / "labels.csv").is_file():
            args.train_labels = f"{args.train_folder}/labels.csv"
        if args.train_labels is None and Path(args.train_folder).resolve() == folder.resolve():
            raise UserError(f"--train_folder {args.train_folder} is FOLDER itself: name its clips by --train_labels")
    elif args.train_labels is not None:
        args.train_folder = args.folder
    if args.labels is None:
        for name in ("num_gloss", "num_cat"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} needs labels: there is no {folder / 'labels.csv'}, so give --labels")
    elif args.train_labels and Path(args.labels).resolve() == Path(args.train_labels).resolve():
        raise UserError(f"{args.labels} is named as the labels of both sets")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: no such folder")
    if args.json and Path(args.json).is_dir():
        raise UserError(f"--json {args.json}: is a folder")


def main() -> None:
    args = parse_args(Args, ALIASES)
    check_arguments(args)

    from accelerando.data.sign_labels import label_problems, list_clips, read_labels

    folder, train_folder = Path(args.folder), Path(args.train_folder or args.folder)
    labels = read_labels(args.labels) if args.labels else None
    train = read_labels(args.train_labels) if args.train_labels else None
    names = list_clips(folder, labels.files if labels else ())
    if not names:
        raise UserError(f"{folder}: no .npz file in it")
    problems: list[Problem] = []
    if labels is not None:
        problems += label_problems(labels, folder, args.num_gloss, args.num_cat, train, train_folder)
        listed = set(labels.files)
        names = [name for name in names if name in listed]

    lengths: Counter[int] = Counter()
    digests: list[int | None] = []
    settings = {"key": args.kp_key, "width": args.width}
    settings |= {"require_x2048": args.require_x2048, "expect_mask": args.expect_mask}
    for clip in inspect_all(folder, names, args.num_workers, "checking", **settings):
        problems += clip.problems
        if clip.frames is not None:
            lengths[clip.frames] += 1
        if args.train_folder:
            digests.append(clip.digest)
    if args.train_folder:
        there = list_clips(train_folder, train.files if train else ())
        used = set(train.files if train else there)
        problems += same_clips(names, digests, train_folder, [name for name in there if name in used], args)

    glosses = None if labels is None else len(set(labels.gloss.tolist()))
    summary = summarise(problems, lengths, len(names), glosses, args)
    if problems:
        print(table(problems, max(60, shutil.get_terminal_size().columns)) + "\n")
    print(summary_line(summary))
    if args.json:
        with whole_file(Path(args.json), flag="--json") as file:
            file.write(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if summary["errors"]:
        raise SystemExit(2)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
