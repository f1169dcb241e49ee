"""Labelled text from a JSON list, JSON lines, CSV, TSV, Parquet or a `datasets` name, packed as Arrow columns.

An error in a row is reported in one line with the file and the row number; data/README.md describes the formats.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accelerando.base.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
CHUNK = 65_536  # rows held as Python objects at a time


@dataclass(frozen=True)
class TextTable:
    """n rows: ``texts`` (and ``pairs``) as Arrow strings, ``labels`` as Arrow strings or int64, either may be None."""

    texts: pa.ChunkedArray
    pairs: pa.ChunkedArray | None
    labels: pa.ChunkedArray | None
    source: str
    others: pa.Table | None = None  # the other columns, if requested
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # encoded columns, [n] each: see encode_column

    def __len__(self) -> int:
        return len(self.texts)

    def text(self, row: int) -> str:
        """The text (or pair of texts) of a row, for display."""
        first = self.texts[row].as_py()
        return first if self.pairs is None else f"{first} / {self.pairs[row].as_py()}"

    def take(self, rows: np.ndarray) -> TextTable:
        """The given rows, in the given order."""
        import pyarrow as pa

        index = pa.array(rows)
        columns = [None if column is None else column.take(index) for column in (self.texts, self.pairs, self.labels)]
        others = None if self.others is None else self.others.take(index)
        return TextTable(*columns, self.source, others, {name: values[rows] for name, values in self.columns.items()})


def read_text_table(
    source: str,
    *,
    split: str = "train",
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
    require_labels: bool = True,
    allow_blank: bool = False,
    other_columns: bool = False,
) -> TextTable:
    """Reads ``source``: a file, a folder of `datasets`, or ``name`` or ``name:config`` of a data set on the Hub.

    ``split`` applies only to `datasets`; ``allow_blank`` allows empty texts; ``other_columns`` keeps all columns.
    Messages count rows from 1.

    Raises:
        UserError: the file is missing, invalid or empty; a column is unknown; a row lacks its text or label.
    """
    path = Path(source)
    columns = [
        text_column,
        *([text_pair_column] if text_pair_column else []),
        *([label_column] if require_labels else []),
    ]
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        if not path.is_file():
            raise UserError(f"{source}: {'is a folder' if path.is_dir() else 'no such file'}{similar_file(path)}")
        if path.stat().st_size == 0:
            raise UserError(f"{source}: the file is empty")
    if suffix == ".parquet":
        table = _select(read_parquet(path), columns, source, other_columns)
    elif suffix in SUFFIXES:
        records = csv_records(path, columns) if suffix in (".csv", ".tsv") else json_records(path)
        table = _pack(records, columns, label_column if require_labels else None, source, other_columns)
        if suffix in (".csv", ".tsv") and require_labels:
            table = _numbers_from_text(table, label_column)
    else:
        table = _select(_read_datasets(source, split), columns, source, other_columns)
    if table.num_rows == 0:
        raise UserError(f"{source}: no rows in it")
    texts = _check_texts(table[text_column], text_column, source, allow_blank)
    pairs = _check_texts(table[text_pair_column], text_pair_column, source, True) if text_pair_column else None
    labels = _check_labels(table[label_column], label_column, source) if require_labels else None
    others = table.drop_columns(columns) if other_columns else None
    return TextTable(texts, pairs, labels, source, others)


def label_names(table: TextTable) -> list[str]:
    """The distinct labels as names: text sorted as text, integers as numbers."""
    return [str(label) for label in sorted(table.labels.unique().to_pylist())]


def encode_labels(table: TextTable, names: list[str]) -> np.ndarray:
    """Label numbers, int64 [n]: the position of each row's label in ``names``.

    Raises:
        UserError: a label is not in ``names``; gives file and row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    codes = pc.index_in(pc.cast(table.labels, pa.large_string()), value_set=pa.array(names, pa.large_string()))
    if codes.null_count:
        row = _first(pc.is_null(codes))
        known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        label = str(table.labels[row])
        raise UserError(f"{table.source}: row {row + 1}: label {label!r} does not occur in the training rows ({known})")
    return codes.to_numpy().astype(np.int64)


def encode_column(tables: Mapping[str, TextTable], name: str) -> tuple[dict[str, TextTable], list[str]]:
    """The tables of all splits with column ``name`` encoded as numbers, and the texts for 0, 1, ..., sorted.

    The tables must be read with ``other_columns``. Batches contain the numbers under ``name``.

    Raises:
        UserError: a table has no such column.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = {}
    for split, table in tables.items():
        there = table.others.column_names if table.others is not None else []
        if name not in there:
            known = ", ".join(there) or "none"
            raise UserError(f"{table.source}: no column {name!r}; other than text and label there are {known}")
        texts[split] = pc.fill_null(pc.cast(table.others[name], pa.large_string()), "")
    names = sorted(set().union(*(column.unique().to_pylist() for column in texts.values())))
    values = pa.array(names, pa.large_string())
    encoded = {}
    for split, table in tables.items():
        numbers = pc.index_in(texts[split], value_set=values).to_numpy().astype(np.int64)
        encoded[split] = replace(table, columns={**table.columns, name: numbers})
    return encoded, names


# ---------------------------------------------------------------------------------------------------------- readers


def json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of a JSON list or of JSON lines."""
    with open(path, "rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if path.suffix.lower() == ".json" and not head.startswith(b"{"):
        try:
            content = json.loads(path.read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {error.lineno}, column {error.colno}: invalid JSON ({error.msg})") from None
        except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits
            raise UserError(f"{path}: invalid JSON ({error})") from None
        if not isinstance(content, list):
            raise UserError(f"{path}: expected a list of rows, found a {type(content).__name__}")
        for number, record in enumerate(content, start=1):
            yield f"row {number}", record
        return
    number = 0
    for line_number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        number += 1
        try:
            yield f"row {number} (line {line_number})", json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {line_number}, column {error.colno}: invalid JSON ({error.msg})") from None
        except (RecursionError, ValueError) as error:
            raise UserError(f"{path}: line {line_number}: invalid JSON ({error})") from None


def _lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: line {number}: not UTF-8 text ({error.reason})") from None


def csv_records(path: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of a CSV or TSV file; UserError: it is invalid or lacks one of ``columns``."""
    reader = csv.reader(_lines(path), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    csv.field_size_limit(2**31 - 1)
    try:
        header = next(reader, [])
        missing = [name for name in columns if name not in header]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}; there are {', '.join(header)}")
        repeated = [name for name in columns if header.count(name) > 1]
        if repeated:
            raise UserError(f"{path}: two columns are called {repeated[0]!r}")
        number = 0
        for fields in reader:
            if not fields:
                continue
            number += 1
            if len(fields) != len(header):
                where = f"row {number} (line {reader.line_num})"
                raise UserError(
                    f"{path}: {where}: {len(fields)} fields, but {len(header)} columns; put texts with commas in quotes"
                )
            yield f"row {number} (line {reader.line_num})", dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: invalid CSV ({error})") from None


def read_parquet(path: Path) -> pa.Table:
    """A Parquet file; UserError: it is not readable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a valid Parquet file ({str(error).splitlines()[0]})") from None


def _read_datasets(source: str, split: str) -> pa.Table:
    import datasets

    path, _, config = source.partition(":")
    if not Path(path).exists() and (
        similar_file(Path(path)).startswith(":") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)
    ):
        raise UserError(f"{source}: no such file{similar_file(Path(source))}; files end in {', '.join(SUFFIXES)}")
    try:
        if (Path(path) / "dataset_dict.json").is_file() or (Path(path) / "dataset_info.json").is_file():
            loaded = datasets.load_from_disk(path)
            loaded = loaded[split] if isinstance(loaded, dict) else loaded
        else:
            loaded = datasets.load_dataset(path, config or None, split=split)
    except Exception as error:  # the Hub client, fsspec and each builder raise errors of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"{source}: neither a file ({', '.join(SUFFIXES)}) nor a data set that can be loaded: {reason}"
        raise UserError(message) from None
    table = loaded.with_format("arrow")[:]
    for name, feature in loaded.features.items():
        if isinstance(feature, datasets.ClassLabel):  # class names instead of their numbers
            import pyarrow as pa

            names = [feature.int2str(value) if value is not None and value >= 0 else None for value in loaded[name]]
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(names, pa.string()))
    return table


def _pack(
    records: Iterator[tuple[str, object]], columns: list[str], label: str | None, source: str, others: bool
) -> pa.Table:
    """Checks records one by one and packs ``columns``; with ``others``, also the other columns of the first record."""
    import pyarrow as pa

    beside: list[str] = []  # names of the other columns
    extra: dict[str, list[object]] = {}
    extra_chunks: dict[str, list[pa.Array]] = {}

    pending: dict[str, list[str | int]] = {name: [] for name in columns}
    chunks: dict[str, list[pa.Array]] = {name: [] for name in columns}
    label_type: type | None = None

    def flush() -> None:
        for name in columns:
            kind = pa.int64() if name == label and label_type is int else pa.large_string()
            try:
                chunks[name].append(pa.array(pending[name], kind))
            except OverflowError:
                raise UserError(f"{source}: a {name} does not fit into 64 bits; write it as text") from None
            except UnicodeEncodeError:
                raise UserError(f"{source}: a {name} contains half a character (a lone surrogate)") from None
            pending[name].clear()
        for name in beside:
            extra_chunks[name].append(_array_of_any(extra[name]))
            extra[name].clear()

    for where, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{source}: {where}: expected an object with {', '.join(columns)}, found {record!r:.60}")
        for name in columns:
            value = record.get(name)
            if value is None or (isinstance(value, str) and name == label and not value.strip()):
                there = ", ".join(map(str, record))
                reason = f"{name} is empty" if name in record else f"no {name!r} (it has {there or 'nothing'})"
                raise UserError(f"{source}: {where}: {reason}")
            if name != label and not isinstance(value, str):
                raise UserError(f"{source}: {where}: {name} is {value!r:.40}, not a text")
            if name == label and type(value) not in ((int, str) if label_type is None else (label_type,)):
                wanted = "a name or a whole number" if label_type is None else f"{_KINDS[label_type]} as in other rows"
                raise UserError(f"{source}: {where}: {name} is {value!r:.40}, not {wanted}")
            if name == label and label_type is None:
                label_type = type(value)
            pending[name].append(value)
        if others and not beside:
            beside = [name for name in record if name not in columns]
            extra, extra_chunks = {name: [] for name in beside}, {name: [] for name in beside}
        for name in beside:
            extra[name].append(record.get(name))
        if len(pending[columns[0]]) == CHUNK:
            flush()
    flush()
    table = {name: pa.chunked_array(chunks[name]) for name in columns}
    return pa.table(table | {name: _one_type(extra_chunks[name]) for name in beside})


def _array_of_any(values: list[object]) -> pa.Array:
    """``values`` with the type that Arrow infers, or as texts if their types differ."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values], pa.large_string())


def _one_type(chunks: list[pa.Array]) -> pa.ChunkedArray:
    """The chunks as one column: with their common type, or as texts."""
    import pyarrow as pa

    kinds = {chunk.type for chunk in chunks if chunk.null_count < len(chunk)}
    kind = next(iter(kinds)) if len(kinds) == 1 else pa.large_string()
    if kind != pa.large_string():
        return pa.chunked_array([chunk.cast(kind) for chunk in chunks], kind)
    texts = [[None if value is None else str(value) for value in chunk.to_pylist()] for chunk in chunks]
    return pa.chunked_array([pa.array(chunk, kind) for chunk in texts], kind)


def _numbers_from_text(table: pa.Table, label: str) -> pa.Table:
    """Turns the labels of a CSV, which are text, into numbers if all of them are integers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table[label]
    if not len(column) or not pc.all(pc.match_substring_regex(column, r"^(0|-?[1-9]\d{0,17})$")).as_py():
        return table
    return table.set_column(table.column_names.index(label), label, pc.cast(column, pa.int64()))


_KINDS = {int: "a whole number", str: "a name"}


# ----------------------------------------------------------------------------------------------------------- checks


def _select(table: pa.Table, columns: list[str], source: str, others: bool) -> pa.Table:
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise UserError(f"{source}: no column {missing[0]!r}; there are {', '.join(table.column_names)}")
    return table if others else table.select(columns)


def _check_texts(column: pa.ChunkedArray, name: str, source: str, may_be_blank: bool) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{source}: column {name!r} contains {column.type}, not text")
    column = pc.cast(column, pa.large_string())
    empty = pc.is_null(column)
    if not may_be_blank:
        empty = pc.or_(empty, pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0), True))
    if pc.any(empty).as_py():
        raise UserError(f"{source}: row {_first(empty) + 1}: {name} is empty")
    return column


def _check_labels(column: pa.ChunkedArray, name: str, source: str) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not pa.types.is_integer(kind):
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise UserError(f"{source}: column {name!r} contains {column.type}: labels are names or whole numbers")
        return _check_texts(column, name, source, may_be_blank=False)
    if column.null_count:
        raise UserError(f"{source}: row {_first(pc.is_null(column)) + 1}: {name} is empty")
    try:
        return pc.cast(column, pa.int64())
    except pa.ArrowInvalid:
        raise UserError(f"{source}: a {name} does not fit into 64 bits; write it as text") from None


def _first(mask: pa.ChunkedArray) -> int:
    import pyarrow.compute as pc

    return pc.index(mask, True).as_py()


def similar_file(path: Path) -> str:
    """A hint if the folder has a file with a similar name."""
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in SUFFIXES]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f": did you mean {path.with_name(close[0])}?" if close else ""
