"""Split the labels of sign clips into training, validation and test rows.

  python tools/split_labels.py --labels data/sign/labels.csv \\
      --output_dir data/sign/split
  python tools/split_labels.py --labels data/sign/labels.csv \\
      --output_dir data/sign/split --group_column signer

Every gloss is divided in the wanted shares, to within one clip, and keeps a
training clip. With --group_column all rows of a group (a signer, a video)
stay on one side; shares then hold as nearly as the groups allow. All columns
are kept: labels_train.csv, labels_val.csv, labels_test.csv.
"""

from __future__ import annotations

import csv
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accelerando.base.config import check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import whole_folder

if TYPE_CHECKING:
    import numpy as np

SIDES = ("train", "val", "test")


@dataclass
class Args:
    # -- data --
    labels: str  # CSV with file, gloss, cat and any other columns
    output_dir: str  # folder for labels_train.csv, labels_val.csv, labels_test.csv
    overwrite: bool = False  # replace these three files if they exist
    # -- split --
    validation_fraction: float = 0.1  # share of validation clips
    test_fraction: float = 0.1  # share of test clips; 0: no such file
    group_column: str | None = None  # rows with one value here stay together, such as signer
    seed: int = 42  # of the split
    config: tuple[str, ...] = ()  # YAML files with any of these settings


def deal_clips(gloss: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The side of each clip, int [n]; of each gloss every side gets its share, rounded up or down, training at least 1.

    What one gloss's rounding takes from a side the next ones give back, so that the sides' totals hold too.

    Raises:
        UserError: too few clips for a wanted side.
    """
    import numpy as np

    side = np.zeros(len(gloss), np.int64)
    owed = np.zeros(len(shares))
    for number in rng.permutation(np.unique(gloss)):
        members = rng.permutation(np.flatnonzero(gloss == number))
        exact = np.round(len(members) * shares, 9)
        low, high = np.floor(exact), np.ceil(exact)
        low[0] = max(low[0], 1)
        high[0] = max(high[0], 1)
        wanted = exact + owed
        counts = low.copy()
        while counts.sum() < len(members):
            counts[np.where(counts < high, wanted - counts, -np.inf).argmax()] += 1
        owed = wanted - counts
        side[members] = np.repeat(np.arange(len(shares)), counts.astype(np.int64))
    for empty in np.flatnonzero((np.bincount(side, minlength=len(shares)) == 0) & (shares > 0)):
        left = np.bincount(gloss[side == 0])
        if left.max() < 2:
            raise UserError(
                f"too few clips for {SIDES[empty]}: each gloss needs one for training; "
                "--validation_fraction 0 or --test_fraction 0 does without that side"
            )
        side[rng.choice(np.flatnonzero((side == 0) & (gloss == left.argmax())))] = empty
    return side


def report(side: np.ndarray, gloss: np.ndarray, group: np.ndarray | None, shares: np.ndarray, args: Args) -> str:
    """An aligned table, a line for each side, and the glosses that a side lacks."""
    import numpy as np

    heading = f"{'side':<8}{'clips':>10}{'share':>9}{'wanted':>9}{'glosses':>10}"
    lines = [heading + (f"  {args.group_column + 's':>12.24}" if group is not None else "")]
    notes = []
    everything = np.unique(gloss)
    for number in np.flatnonzero(shares > 0):
        rows = side == number
        there = np.unique(gloss[rows])
        line = f"{SIDES[number]:<8}{rows.sum():>10,}{rows.mean():>9.1%}{shares[number]:>9.1%}{len(there):>10,}"
        lines.append(line + (f"  {len(np.unique(group[rows])):>12,}" if group is not None else ""))
        lacking = np.setdiff1d(everything, there)
        if len(lacking):
            shown = lacking[:8] if number else lacking
            listed = ", ".join(map(str, shown)) + (", ..." if len(lacking) > len(shown) else "")
            name = {"train": "training", "val": "validation", "test": "test"}[SIDES[number]]
            text = f"{len(lacking):,} of {len(everything):,} glosses have no {name} clip: {listed}"
            notes += textwrap.wrap(text, 80, subsequent_indent="  ")
    return "\n".join(lines + (["", *notes] if notes else []))


def check_output(target: Path, args: Args) -> None:
    """UserError where ``target`` cannot take the three files."""
    if target.exists() and not target.is_dir():
        raise UserError(f"--output_dir {target} is a file")
    for name in SIDES:
        path = target / f"labels_{name}.csv"
        if path.exists() and path.resolve() == Path(args.labels).resolve():
            raise UserError(f"--labels {args.labels} would be overwritten: choose another --output_dir")
        if path.exists() and not args.overwrite:
            raise UserError(f"{path} is there already: --overwrite replaces it")


def main() -> None:
    args = parse_args(Args, {"val_fraction": "validation_fraction"})
    check_ranges(args, validation_fraction=(0, 1), test_fraction=(0, 1))
    if args.validation_fraction + args.test_fraction > 0.999:
        raise UserError(
            f"--validation_fraction {args.validation_fraction} and --test_fraction {args.test_fraction}: "
            "0.999 together at most, so that something is left for training"
        )
    target = Path(args.output_dir)
    check_output(target, args)

    import numpy as np

    from accelerando.data.sign_labels import label_records, read_groups, read_labels
    from accelerando.data.splits import deal_groups

    labels = read_labels(args.labels)
    rows = [row for _, row in label_records(Path(args.labels))]
    shares = np.array([1 - args.validation_fraction - args.test_fraction, args.validation_fraction, args.test_fraction])
    rng = np.random.default_rng(args.seed)
    gloss = np.unique(labels.gloss, return_inverse=True)[1]
    group = None
    if args.group_column is not None:
        group = np.unique(read_groups(Path(args.labels), args.group_column), return_inverse=True)[1]
    try:
        if group is None:
            # A file that is listed twice is dealt out once.
            _, first, clip = np.unique(labels.files, return_index=True, return_inverse=True)
            side = deal_clips(gloss[first], shares, rng)[clip]
        else:
            wanted, groups = [name for name, share in zip(SIDES, shares, strict=True) if share > 0], group.max() + 1
            if groups < len(wanted):
                raise UserError(f"{groups} groups for {', '.join(wanted)}: too few")
            # No side stays empty, and training has each gloss.
            covered = np.repeat([[True], [False], [False]], gloss.max() + 1, axis=1)
            side = deal_groups(gloss, group, shares, rng, covered, filled_first=True)[group]
    except UserError as error:
        raise UserError(f"{args.labels}: {error}") from None

    try:
        with whole_folder(target, file_by_file=True) as draft:
            draft.mkdir(parents=True)
            for number in np.flatnonzero(shares > 0):
                with open(draft / f"labels_{SIDES[number]}.csv", "w", encoding="utf-8", newline="") as file:
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(rows[0])
                    writer.writerows(rows[row].values() for row in np.flatnonzero(side == number))
            for number in np.flatnonzero(shares == 0):  # a file of an earlier split would mix with these
                (target / f"labels_{SIDES[number]}.csv").unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--output_dir {target}: {error.strerror}") from None
    print(report(side, labels.gloss, group, shares, args) + f"\n\nWritten to {target}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
