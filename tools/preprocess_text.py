"""Clean raw labelled text and split it: every file of a folder becomes train.json, validation.json and test.json.

  python tools/preprocess_text.py --input_dir data/raw --output_dir data/processed
  python tools/preprocess_text.py --input_dir data/raw --output_dir data/processed --config data_config.yaml --lowercase

Files named train, validation (val, dev) or test, or train-00000-of-00002 and the like, keep their place. All others are
pooled: they join the training rows where there are some, and what is missing is split off, seeded and stratified.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from accelerando.base.config import check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import check_can_be_made, whole_folder
from accelerando.base.texts import one_line

SPLITS = {"train": "train", "training": "train", "validation": "validation", "val": "validation", "dev": "validation",
          "valid": "validation", "test": "test"}  # fmt: skip


@dataclass
class Args:
    # -- data --
    input_dir: str = "dataset/raw"  # folder of .json, .jsonl, .csv, .tsv or .parquet files
    output_dir: str = "dataset/processed"  # folder to make
    text_column: str = "text"  # column of the text
    label_column: str = "label"  # column of the label
    overwrite: bool = False  # replace output_dir where it exists
    # -- cleaning --
    lowercase: bool = False  # lower-case every text
    strip_html: bool = False  # drop tags and decode entities
    strip_urls: bool = False  # drop web addresses
    min_length: int = 1  # characters a text needs
    max_chars: int | None = None  # characters beyond which a row is dropped
    keep_conflicts: bool = False  # keep a text that occurs with several labels
    # -- split --
    val_fraction: float = 0.1  # share of validation rows
    test_fraction: float = 0.1  # share of test rows
    seed: int = 42  # of the split
    config: tuple[str, ...] = ()  # YAML files with any of these settings


# Settings of training that the same YAML file may contain.
FOREIGN = {"max_length": "counts tokens, in training; here max_chars drops long texts"}

Row = tuple[str, str | int]  # text, label


def clean(text: str, args: Args) -> str:
    """NFC, one kind of white space, no control characters; more where asked for."""
    import html

    if args.strip_html:
        text = html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>|<!--.*?-->", " ", text, flags=re.DOTALL))
    if args.strip_urls:
        text = re.sub(r"\b(?:https?://|www\.)\S+", " ", text)
    text = unicodedata.normalize("NFC", text)
    text = "".join(" " if char.isspace() else char for char in text)
    text = "".join(char for char in text if unicodedata.category(char) != "Cc")
    text = " ".join(text.split())
    return text.lower() if args.lowercase else text


def read_folder(args: Args, dropped: Counter) -> dict[str, list[Row]]:
    """The cleaned rows of each split; "" holds what is still to be split."""
    from tqdm import tqdm

    from accelerando.data.table_formats import SUFFIXES, table_suffix
    from accelerando.data.tables import read_text_table

    folder = Path(args.input_dir)
    if not folder.is_dir():
        raise UserError(f"--input_dir {folder}: no such folder")
    files = sorted(path for path in folder.iterdir() if table_suffix(path))
    # Label names and summaries are not data.
    files = [path for path in files if path.name.partition(".")[0] not in ("classes", "labels", "dataset_info")]
    if not files:
        raise UserError(f"--input_dir {folder}: no file that ends in {', '.join(SUFFIXES)}")
    rows: dict[str, list[Row]] = {}
    for path in files:
        columns = {"text_column": args.text_column, "label_column": args.label_column}
        table = read_text_table(str(path), **columns, allow_blank=True)
        table.check_no_copies("split")
        kept = rows.setdefault(SPLITS.get(re.split(r"[-_.]", path.stem.lower())[0], ""), [])
        for text, label in tqdm(
            zip(table.texts, table.labels, strict=True),
            one_line(path.name),
            len(table),
            delay=2,
            disable=None,
            leave=False,
        ):
            cleaned = clean(text.as_py(), args)
            if len(cleaned) < max(1, args.min_length):
                dropped["too short"] += 1
            elif args.max_chars is not None and len(cleaned) > args.max_chars:
                dropped["too long"] += 1
            else:
                kept.append((cleaned, label.as_py()))
    if len({type(label) for split in rows.values() for _, label in split}) > 1:  # one file has numbers, another names
        rows = {name: [(text, str(label)) for text, label in split] for name, split in rows.items()}
    return rows


def drop_repeats(rows: dict[str, list[Row]], args: Args, dropped: Counter) -> dict[str, list[Row]]:
    """Keeps each text in one split only, the one that needs it most: test before validation before train."""
    labels: dict[str, set] = {}
    for split in rows.values():
        for text, label in split:
            labels.setdefault(text, set()).add(label)
    seen: dict[Row | str, str] = {}  # where a row, and where a text, is kept
    result = {}
    for name in ("test", "validation", "train", ""):
        kept = []
        for text, label in rows.get(name, []):
            if len(labels[text]) > 1 and not args.keep_conflicts:
                dropped["same text, different labels"] += 1
            elif (text, label) in seen or seen.get(text, name) != name:
                dropped["repeated"] += 1
            else:
                kept.append((text, label))
                seen[text] = seen[text, label] = name
        if name in rows:
            result[name] = kept
    return result


def split_rest(rows: dict[str, list[Row]], args: Args) -> dict[str, list[Row]]:
    """Distributes the rows without a split of their own over the splits that are missing."""
    import numpy as np

    from accelerando.data.splits import stratified_split

    rest = rows.pop("", [])
    if rest and "train" in rows:
        rows["train"] += rest
        rest = []
    pool = rest or rows.pop("train", [])
    if not pool:
        raise UserError(f"--input_dir {args.input_dir}: no training rows are left after cleaning")
    wanted = {"test": args.test_fraction, "validation": args.val_fraction}
    left = 1.0
    for name, fraction in wanted.items():
        if name in rows or fraction == 0:
            continue
        # Texts are distributed, not rows: with --keep_conflicts a text has several rows, which stay together.
        texts = dict(reversed(pool))
        codes = np.unique([str(label) for label in texts.values()], return_inverse=True)[1]
        _, held = stratified_split(codes, fraction / left, args.seed)
        names = list(texts)
        chosen = {names[row] for row in held}
        rows[name] = [row for row in pool if row[0] in chosen]
        pool = [row for row in pool if row[0] not in chosen]
        left -= fraction
    rows["train"] = pool
    return rows


def summary(rows: dict[str, list[Row]], dropped: Counter) -> str:
    """Counts of each class and split, and what was dropped, in aligned columns."""
    names = [name for name in ("train", "validation", "test") if name in rows]
    counts = {name: Counter(label for _, label in rows[name]) for name in names}
    labels = sorted({label for counter in counts.values() for label in counter}, key=lambda x: (isinstance(x, str), x))
    shown = {label: one_line(str(label)) for label in labels}
    width = max(len("label"), *map(len, shown.values()))
    lines = [f"{'label':<{width}}" + "".join(f"{name:>12}" for name in names)]
    lines += [f"{shown[label]:<{width}}" + "".join(f"{counts[name][label]:>12,}" for name in names) for label in labels]
    lines.append(f"{'total':<{width}}" + "".join(f"{len(rows[name]):>12,}" for name in names))
    if dropped:
        lines += ["", "dropped"] + [f"{count:>8,}  {reason}" for reason, count in sorted(dropped.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parse_args(Args, foreign=FOREIGN)
    check_ranges(args, min_length=(0, 2**40), max_chars=(1, 2**40))
    target = Path(args.output_dir)
    if target.exists() and not target.is_dir():
        raise UserError(f"--output_dir {target} is a file")
    check_can_be_made(target, "--output_dir")
    if min(args.val_fraction, args.test_fraction) < 0 or args.val_fraction + args.test_fraction >= 1:
        raise UserError(
            f"--val_fraction {args.val_fraction} and --test_fraction {args.test_fraction}: below 1 together"
        )
    if target.exists() and any(target.iterdir()) and not args.overwrite:
        raise UserError(
            f"--output_dir {target} is not empty: --overwrite replaces its train, validation and test files"
        )
    if target.resolve() in (Path(args.input_dir).resolve(), *Path(args.input_dir).resolve().parents):
        raise UserError(f"--output_dir {target} holds the raw files: choose another folder")
    dropped: Counter = Counter()
    rows = split_rest(drop_repeats(read_folder(args, dropped), args, dropped), args)
    with whole_folder(target, file_by_file=True) as draft:  # nothing else that lies there is touched
        draft.mkdir(parents=True)
        for name, split in rows.items():
            lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in split]
            (draft / f"{name}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        labels = sorted({label for _, label in rows["train"]}, key=lambda x: (isinstance(x, str), x))
        (draft / "classes.json").write_text(json.dumps(labels, ensure_ascii=False) + "\n", encoding="utf-8")
        (draft / "summary.txt").write_text(summary(rows, dropped), encoding="utf-8")
    print(summary(rows, dropped) + f"\nWritten to {target}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
