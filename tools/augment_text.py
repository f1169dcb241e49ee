"""Add changed copies of the training rows to a table of labelled text (EDA, Wei and Zou 2019, arXiv:1901.11196).

  python tools/augment_text.py --input_file data/train.csv --output_file data/train_augmented.csv --factor 2 \\
      --techniques swap delete
  python tools/augment_text.py --input_file data/train.csv --output_file data/train_augmented.csv \\
      --synonyms wordnet/dict

Each row is followed by its copies, which have its number in the column augmented_from and all its other columns. A copy
is changed by one technique: words are replaced by synonyms, synonyms are inserted, words change places or are deleted.

Training rows only, after the split: a copy of a row that is validated on gives the answer away. Train with a
--validation_file then; text_classify.py does not split a file with copies, and scores none.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from accelerando.base.config import check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import check_can_be_made, open_whole
from accelerando.data.augment import TECHNIQUES, Technique, TextAugmentation

if TYPE_CHECKING:
    import pyarrow as pa
    from tqdm import tqdm

SCORED = ("validation", "val", "valid", "dev", "test")  # first words in the names of files that are not trained on
CHUNK = 4096  # rows written at a time


@dataclass
class Args:
    # -- data --
    input_file: str  # training rows: .json, .jsonl, .csv, .tsv or .parquet
    output_file: str  # what to write, in the same format
    text_column: str = "text"  # column of the text
    text_pair_column: str | None = None  # column of a second text, which is changed too
    overwrite: bool = False  # replace output_file where it exists
    # -- augmentation --
    factor: int = 1  # copies of each row
    techniques: tuple[Technique, ...] = TECHNIQUES  # one of them, drawn for each copy: synonym insert swap delete
    rate: float = 0.1  # share of a text's words that are changed, at least one word
    synonyms: str | None = None  # table of synonyms, or a folder of WordNet
    model_name: str | None = None  # without --synonyms: folder or Hub name of a model; neighbours in its embedding
    trust_remote_code: bool = False  # run Python files of the model's folder where it needs them
    min_cosine: float = 0.5  # model_name: how close a neighbour has to be
    keep: tuple[str, ...] = ()  # words that are not changed, beside the stop words
    seed: int = 42  # of the changes
    cache_dir: str | None = None  # where neighbours are kept (default: $ACCELERANDO_CACHE or ~/.cache/accelerando)
    config: tuple[str, ...] = ()  # YAML files with any of these settings


# The guide's names.
ALIASES = {"augmentation_factor": "factor", "probability": "rate", "augmentation_prob": "rate"}


@dataclass
class Counts:
    """Source rows, copies, copies that could not be changed; words of the copies, and how many of them are changed."""

    rows: int = 0
    copies: int = 0
    left_out: int = 0
    words: int = 0
    changed: int = 0


def changed_copies(
    texts: list[str | None], row: int, args: Args, augmentation: TextAugmentation, counts: Counts
) -> Iterator[list[str | None]]:
    """The texts of each copy of ``row`` that differs from it."""
    counts.rows += 1
    for copy in range(args.factor):
        changes = [augmentation.change(text or "", row, copy, number) for number, text in enumerate(texts)]
        if any(change.changed for change in changes):
            counts.copies += 1
            counts.words += sum(change.words for change in changes)
            counts.changed += sum(change.changed for change in changes)
            yield [change.text if change.changed else text for change, text in zip(changes, texts, strict=True)]
        else:
            counts.left_out += 1


# -------------------------------------------------------------------------------------------------------------- output

Copies = Callable[[list[str | None], int], Iterator[list[str | None]]]


def write_records(path: Path, target: IO[str], columns: list[str], copies: Copies, bar: tqdm) -> None:
    """Writes the rows of ``path``, each followed by its copies, as JSON, JSON lines, CSV or TSV."""
    from accelerando.data.table_formats import table_records, table_suffix
    from accelerando.data.tables import AUGMENTED

    suffix = table_suffix(path)
    writer: Any = None  # of a CSV file
    separator = "[\n" if suffix == ".json" else ""
    for row, (_, record) in enumerate(table_records(path, columns)):
        changed = (
            dict(zip(columns, texts, strict=True)) | {AUGMENTED: row + 1}
            for texts in copies([record[name] for name in columns], row)
        )
        for out in ({**record, AUGMENTED: None}, *({**record, **change} for change in changed)):
            if suffix in (".csv", ".tsv"):
                if writer is None:
                    delimiter = "\t" if suffix == ".tsv" else ","
                    writer = csv.DictWriter(target, list(out), delimiter=delimiter, lineterminator="\n")
                    writer.writeheader()
                writer.writerow(out)
            else:
                target.write(separator + json.dumps(out, ensure_ascii=False) + ("" if suffix == ".json" else "\n"))
                separator = ",\n" if suffix == ".json" else ""
        bar.update()
    if suffix == ".json":
        target.write("\n]\n")


def write_parquet(table: pa.Table, target: IO[bytes], columns: list[str], copies: Copies, bar: tqdm) -> None:
    """Writes the rows of ``table``, each followed by its copies, as Parquet; columns keep their types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from accelerando.data.tables import AUGMENTED

    table = table.replace_schema_metadata(None)  # of `datasets`, whose class numbers are names by now
    for name in columns:
        table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.large_string()))
    with pq.ParquetWriter(target, table.schema.append(pa.field(AUGMENTED, pa.int64()))) as writer:
        for start in range(0, len(table), CHUNK):
            part = table.slice(start, CHUNK)
            sources = list(zip(*(part[name].to_pylist() for name in columns), strict=True))
            rows, marks, texts = [], [], []
            for row, source in enumerate(sources):
                found = [list(source), *copies(list(source), start + row)]
                rows += [row] * len(found)
                marks += [None] + [start + row + 1] * (len(found) - 1)
                texts += found
                bar.update()
            out = part.take(pa.array(rows, pa.int64()))
            for name, values in zip(columns, zip(*texts, strict=True), strict=True):
                out = out.set_column(out.column_names.index(name), name, pa.array(values, pa.large_string()))
            writer.write_table(out.append_column(AUGMENTED, pa.array(marks, pa.int64())))


def check_files(args: Args) -> None:
    """UserError for files that cannot be read or written, and for rows that are not trained on."""
    from accelerando.data.table_formats import COMPRESSED, SUFFIXES, check_table, table_suffix

    path, target = Path(args.input_file), Path(args.output_file)
    check_table(path, "--input_file")
    suffix = table_suffix(path)
    if not suffix:
        raise UserError(f"--input_file {path}: its name ends in none of {', '.join(SUFFIXES)}")
    if re.split(r"[-_.]", path.name.lower())[0] in SCORED:
        hint = "scores on changed copies say nothing about new texts; augment the training rows alone"
        raise UserError(f"--input_file {path}: rows to score, by its name; {hint}")
    lines = (".jsonl", ".ndjson")
    if table_suffix(target) != suffix and not (suffix in lines and table_suffix(target) in lines):
        raise UserError(f"--output_file {target}: the format is that of the input, so its name has to end in {suffix}")
    if target.suffix.lower() in COMPRESSED:
        raise UserError(f"--output_file {target}: is written uncompressed: leave out {target.suffix}")
    if target.exists() and target.resolve() == path.resolve():
        raise UserError(f"--output_file {target} is the input: name another file")
    if target.is_dir():
        raise UserError(f"--output_file {target} is a folder")
    if target.exists() and not args.overwrite:
        raise UserError(f"--output_file {target} exists: --overwrite replaces it")
    check_can_be_made(target, "--output_file")


def main() -> None:
    args = parse_args(Args, ALIASES)
    check_ranges(args, factor=(1, 1000), rate=(1e-6, 1), min_cosine=(-1, 1))
    check_files(args)

    from accelerando.base.files import cache_folder
    from accelerando.base.log import progress_bar
    from accelerando.data.table_formats import read_parquet, table_suffix
    from accelerando.data.tables import AUGMENTED, read_text_table
    from accelerando.models.neighbours import synonyms_of_texts

    path, target = Path(args.input_file), Path(args.output_file)
    options = {"text_column": args.text_column, "text_pair_column": args.text_pair_column}
    table = read_text_table(str(path), **options, require_labels=False)  # which checks every row
    if table.augmented:
        raise UserError(f"--input_file {path}: has a column {AUGMENTED!r}, so it was augmented before; give its source")
    if args.model_name and not args.synonyms:
        from transformers.utils import logging

        logging.disable_progress_bar()  # those of loading weights
    cache = cache_folder(args.cache_dir)
    synonyms = synonyms_of_texts(
        table, args.techniques, args.synonyms, args.model_name, args.min_cosine, cache, args.trust_remote_code
    )
    augmentation = TextAugmentation(args.techniques, args.rate, synonyms, args.seed, args.keep)
    counts, columns = Counts(), [args.text_column, *([args.text_pair_column] if args.text_pair_column else [])]

    def copies(texts: list[str | None], row: int) -> Iterator[list[str | None]]:
        return changed_copies(texts, row, args, augmentation, counts)

    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(progress_bar(len(table), 0, " rows", "augmenting")) as bar:
        if table_suffix(path) == ".parquet":
            with open_whole(target, "wb") as file:
                write_parquet(read_parquet(path), file, columns, copies, bar)
        else:
            try:
                with open_whole(target, newline="") as file:
                    write_records(path, file, columns, copies, bar)
            except UnicodeEncodeError:
                raise UserError(f"{path}: row {counts.rows}: half a character (a lone surrogate) in a column") from None
    share = f"{counts.changed / max(1, counts.words):.1%}"
    unchanged = f"; {counts.left_out:,} copies could not be changed and were left out" if counts.left_out else ""
    print(
        f"{counts.rows:,} rows in, {counts.rows + counts.copies:,} out; "
        f"{share} of the words of the {counts.copies:,} copies are changed{unchanged}\nWritten to {target}"
    )


if __name__ == "__main__":
    with errors_in_one_line():
        main()
