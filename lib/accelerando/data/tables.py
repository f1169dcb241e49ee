"""Labelled text from JSON, JSON lines, CSV, TSV, Parquet or a `datasets` name, packed as Arrow columns.

An error in a row is reported in one line with the file and the row number; data/README.md describes the formats.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import difflib
import gzip
import json
import lzma
import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from accelerando.base.errors import UserError, first_line
from accelerando.base.log import log

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz")  # behind the suffix of a text format: rows.csv.gz
DELIMITERS = ",;\t|"  # of a CSV file, the first one that its header has
LONGEST_LINE = 2**28  # bytes
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
    suffix = table_suffix(path)
    if suffix:
        check_table(path)
    if suffix == ".parquet":
        table = _select(read_parquet(path), columns, source, other_columns)
    elif suffix:
        records = table_records(path, columns)
        table = _pack(records, columns, label_column if require_labels else None, source, other_columns)
    else:
        table = _select(read_datasets(source, split), columns, source, other_columns)
    if table.num_rows == 0:
        raise UserError(f"{source}: no rows in it")
    texts = _check_texts(table[text_column], text_column, source, allow_blank)
    pairs = _check_texts(table[text_pair_column], text_pair_column, source, True) if text_pair_column else None
    labels = None
    if require_labels:
        labels = _check_labels(table[label_column], label_column, source, all_text=suffix in (".csv", ".tsv"))
    others = table.drop_columns(columns) if other_columns else None
    return TextTable(texts, pairs, labels, source, others)


def label_names(table: TextTable) -> list[str]:
    """The distinct labels as names: text sorted as text, integers as numbers; warns of names that look alike."""
    names = [str(label) for label in sorted(table.labels.unique().to_pylist())]
    alike: dict[str, str] = {}
    for name in names:
        if (other := alike.setdefault(" ".join(name.casefold().split()), name)) != name:
            log.warning("%s: the labels %r and %r are two classes, though they look alike", table.source, other, name)
    return names


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
        if label == "-1":
            raise _unlabelled(table.source, pc.equal(table.labels, table.labels[row]))
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


def _unlabelled(source: str, rows: pa.ChunkedArray) -> UserError:
    """The error for ``rows`` (a mask) whose label is -1, which stands for none, as in the test sets of benchmarks."""
    import pyarrow.compute as pc

    count = f"{pc.sum(rows).as_py():,} of {len(rows):,} rows"
    hint = "leave them out; tools/predict.py predicts rows without labels"
    return UserError(f"{source}: row {_first(rows) + 1}: the label is -1, that is, none ({count}): {hint}")


# ---------------------------------------------------------------------------------------------------------- readers


def table_suffix(path: Path | str) -> str:
    """The suffix that tells the format of a table (``.csv`` of ``rows.csv.gz``); empty for any other name."""
    path = Path(path)
    packed = path.suffix.lower() in COMPRESSED and Path(path.stem).suffix.lower() != ".parquet"
    suffix = Path(path.stem if packed else path).suffix.lower()
    return suffix if suffix in SUFFIXES else ""


def check_table(path: Path, flag: str = "") -> None:
    """UserError unless ``path`` is a file with something in it; ``flag`` stands before the path in the message."""
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is not an ordinary file" if path.exists() else "no such file"
        raise UserError(f"{flag} {path}: {kind}{similar_file(path)}".lstrip())
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")


def table_records(path: Path, columns: list[str]) -> Iterator[tuple[str, Any]]:
    """(where, record) of the rows of any table but a Parquet file; see :func:`csv_records` and :func:`json_records`."""
    return csv_records(path, columns) if table_suffix(path) in (".csv", ".tsv") else json_records(path, columns)


def json_records(path: Path, columns: list[str]) -> Iterator[tuple[str, Any]]:
    """(where, record) of JSON lines, of a JSON list, or of the list in a JSON object (``{"data": [...]}``).

    An object with one of ``columns`` is a row.
    """
    if table_suffix(path) == ".json" and not _has_json_lines(path):
        with _opened(path) as file:
            content = file.read()
        try:
            content = _parse(content.decode("utf-8-sig"), f"{path}:")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        rows = content
        if isinstance(content, dict):
            lists = [value for value in content.values() if _is_list_of_rows(value)]
            if not any(name in content for name in columns) and len(lists) != 1:
                listed = ", ".join(content) or "nothing"
                raise UserError(
                    f"{path}: expected a list of rows, or an object with one; found an object with {listed}"
                )
            rows = [content] if any(name in content for name in columns) else lists[0]
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a list of rows, found a {type(rows).__name__}")
        for number, record in enumerate(rows, start=1):
            yield f"row {number}", record
        return
    number = 0
    for line_number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        number += 1
        yield f"row {number} (line {line_number})", _parse(line, f"{path}: line {line_number}", line_number)


def _is_list_of_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _has_json_lines(path: Path) -> bool:
    """Whether a ``.json`` file has an object on each line instead of one value."""
    with _opened(path) as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head.startswith(b"{"):
        return False
    lines = (line for line in _lines(path) if line.strip())
    first = next(lines)
    try:
        json.loads(first)
    except (ValueError, RecursionError):  # the beginning of one object, or a row with an error
        return first.rstrip().endswith("}")
    return next(lines, None) is not None


def _parse(text: str, where: str, line: int | None = None) -> Any:
    """The value in a JSON text; errors name its ``line``, or the line within the text."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"{where}, column" if line else f"{where} line {error.lineno}, column"
        raise UserError(f"{place} {error.colno}: invalid JSON ({error.msg})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits, a repeated key
        raise UserError(f"{where.removesuffix(':')}: invalid JSON ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has two entries called {repeated!r}")
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file, decompressed if its first bytes say that it is compressed; UserError: it cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(6)
        kinds = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
        opener = next((opener for magic, opener in kinds.items() if head.startswith(magic)), open)
        with opener(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or first_line(error)})") from None


def _lines(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE:
                raise UserError(f"{path}: line {number}: longer than {LONGEST_LINE >> 20} MB")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: line {number}: not UTF-8 text ({error.reason})") from None


def csv_records(path: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of a CSV or TSV file; UserError: it is invalid or lacks one of ``columns``.

    The header shows whether a CSV file is separated by commas, semicolons, tabs or bars. Quotes in a TSV file are
    characters like any other, unless :func:`_is_quoted` says that they enclose its fields.
    """
    csv.field_size_limit(2**31 - 1)
    start = next(_lines(path), "")
    delimiter = "\t" if table_suffix(path) == ".tsv" else _delimiter(start, columns)
    if table_suffix(path) == ".tsv" and not _is_quoted(path, start.count("\t") + 1):
        rows = ((number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(_lines(path), start=1))
        rows = ((number, fields) for number, fields in rows if fields != [""])
        hint = "a text with a tab or a line break needs quotes around it, and quotes in it doubled"
    else:
        rows = _quoted_rows(path, delimiter)
        hint = "put texts with commas in quotes" if delimiter == "," else f"put texts with {delimiter!r} in quotes"
    header = next(rows, (1, []))[1]
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(f"{path}: no column {missing[0]!r}; there are {', '.join(header)}")
    if repeated := [name for name in columns if header.count(name) > 1]:
        raise UserError(f"{path}: two columns are called {repeated[0]!r}")
    for number, (line, fields) in enumerate(rows, start=1):
        where = f"row {number} (line {line})"
        if len(fields) != len(header):
            raise UserError(f"{path}: {where}: {len(fields)} fields, but {len(header)} columns; {hint}")
        yield where, dict(zip(header, fields, strict=True))


def _delimiter(header: str, columns: list[str]) -> str:
    """What separates the fields of a CSV file: the first sign that gives its header all ``columns``, or any sign."""
    there = [sign for sign in DELIMITERS if sign in header and header.strip() not in columns]
    for sign in there:
        with contextlib.suppress(csv.Error):
            if {*columns} <= {*next(csv.reader([header], delimiter=sign), [])}:
                return sign
    return there[0] if there else ","


# Beginnings of a cell that spreadsheets take for a formula, which may call up an address; some know wide signs.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def formula_safe(cell: str) -> str:
    """A cell of a CSV file that no spreadsheet takes for a formula: an apostrophe stands before what looks like one."""
    return f"'{cell}" if _FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell


def without_formula_mark(cell: str) -> str:
    """The inverse of :func:`formula_safe`, for reading the files that it was used for."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _quoted_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, fields) of each row of a file with quotes around fields."""
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: invalid CSV ({error})") from None


def _is_quoted(path: Path, count: int) -> bool:
    """Whether quotes in a TSV file of ``count`` columns enclose fields, as spreadsheets and pandas write them.

    Most TSV files have no quoting: a text may begin with a quote, and reading to the next one would swallow the rows
    in between. If every line is a row, quotes enclose fields only where all of them could, and either the header has
    them or quotes within fields are doubled. Otherwise they do if this makes every row whole, and no field swallows
    what could be a row.
    """
    quoted = re.compile(r'"(?:[^"]|"")*"')
    lines_are_rows, header_quoted, doubled, well_formed, some = True, False, True, True, False
    for number, line in enumerate(_lines(path)):
        line = line.rstrip("\r\n")
        if not line:
            continue
        fields = line.split("\t")
        lines_are_rows = lines_are_rows and len(fields) == count
        enclosed = [field for field in fields if field.startswith('"')]
        some = some or bool(enclosed)
        well_formed = well_formed and all(quoted.fullmatch(field) for field in enclosed)
        if number == 0:
            header_quoted = len(enclosed) == count
        else:
            doubled = doubled and all('""' in field[1:-1] for field in enclosed)
    if not some:
        return False
    if lines_are_rows:
        return well_formed and (header_quoted or doubled)
    try:
        for _, fields in _quoted_rows(path, "\t"):
            swallowed = [line for field in fields if "\n" in field for line in field.split("\n")]
            if len(fields) != count or any(line.count("\t") >= max(1, count - 1) for line in swallowed):
                return False
    except UserError:
        return False
    return True


def read_parquet(path: Path) -> pa.Table:
    """A Parquet file; UserError: it is not readable, or has text that is not UTF-8.

    Class numbers become names where the `datasets` package wrote the file and kept them in its metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # The file is read as a whole: a table of a folder "a=1" would get a column "a" more.
        with open(path, "rb") as file:
            table = pq.ParquetFile(file).read()
    except (pa.ArrowException, OSError, MemoryError, OverflowError) as error:
        raise UserError(f"{path}: not a valid Parquet file ({first_line(error)})") from None
    _check_content(table, str(path))
    return _with_class_names(table, _classes_in_metadata(table), str(path))


def _check_content(table: pa.Table, source: str) -> None:
    """UserError for text that is not UTF-8, and for other damage that Arrow does not notice when it reads."""
    import pyarrow as pa

    for name, column in zip(table.column_names, table.columns, strict=True):
        start = 0
        for chunk in column.chunks:
            try:
                chunk.validate(full=True)
            except pa.ArrowInvalid as error:
                found = re.search(r"Invalid UTF8 sequence at string index (\d+)", str(error))
                what = f"row {start + int(found[1]) + 1}: {name} is not UTF-8 text" if found else first_line(error)
                raise UserError(f"{source}: {what if found else f'column {name!r} is damaged ({what})'}") from None
            start += len(chunk)


def _classes_in_metadata(table: pa.Table) -> dict[str, list[str]]:
    """Column -> names of its classes, from what `datasets` keeps in a schema."""
    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {name: kind for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
        return {name: [str(one) for one in kind["names"]] for name, kind in kinds.items() if kind.get("names")}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _with_class_names(table: pa.Table, classes: Mapping[str, Sequence[str]], source: str) -> pa.Table:
    """``table`` with the names of ``classes`` (by column) in place of their numbers; -1 stands for no class."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for name, names in classes.items():
        if table.column_names.count(name) != 1 or not pa.types.is_integer(table.schema.field(name).type):
            continue
        numbers = table[name]
        if pc.any(pc.greater_equal(numbers, len(names))).as_py():
            raise UserError(f"{source}: column {name!r} has a number beyond its {len(names)} class names")
        texts = pc.take(pa.array(names, pa.string()), pc.if_else(pc.greater_equal(numbers, 0), numbers, None))
        table = table.set_column(table.column_names.index(name), name, texts)
    return table


def read_datasets(source: str, split: str) -> pa.Table:
    import datasets

    path, _, config = source.partition(":")
    if not Path(path).exists() and (
        similar_file(Path(path)).startswith(":") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)
    ):
        raise UserError(f"{source}: no such file{similar_file(Path(source))}; files end in {', '.join(SUFFIXES)}")
    try:
        if (Path(path) / "dataset_dict.json").is_file() or (Path(path) / "dataset_info.json").is_file():
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path, config or None)
    except Exception as error:  # the Hub client, fsspec and each builder raise errors of their own
        reason = first_line(error)
        message = f"{source}: neither a file ({', '.join(SUFFIXES)}) nor a data set that can be loaded: {reason}"
        raise UserError(message) from None
    if isinstance(loaded, dict):
        if split not in loaded:
            hint = f"; name one by its folder: {Path(path) / next(iter(loaded))}" if Path(path).is_dir() else ""
            raise UserError(f"{source}: no split {split!r}; there are {', '.join(loaded)}{hint}")
        loaded = loaded[split]
    classes = {name: kind.names for name, kind in loaded.features.items() if isinstance(kind, datasets.ClassLabel)}
    table = loaded.with_format("arrow")[:]
    _check_content(table, source)
    return _with_class_names(table, classes, source)


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
            if name == label and isinstance(value, float) and value.is_integer():  # 1.0 beside 1
                value = int(value)
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


_KINDS = {int: "a whole number", str: "a name"}


# ----------------------------------------------------------------------------------------------------------- checks


def _select(table: pa.Table, columns: list[str], source: str, others: bool) -> pa.Table:
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise UserError(f"{source}: no column {missing[0]!r}; there are {', '.join(table.column_names)}")
    if repeated := [name for name in columns if table.column_names.count(name) > 1]:
        raise UserError(f"{source}: two columns are called {repeated[0]!r}")
    kept = [number for number, name in enumerate(table.column_names) if table.column_names.count(name) == 1]
    return table.select(kept if others else columns)


def _check_texts(column: pa.ChunkedArray, name: str, source: str, may_be_blank: bool) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not _is_text(kind):
        raise UserError(f"{source}: column {name!r} contains {column.type}, not text")
    column = pc.cast(column, pa.large_string())
    empty = pc.is_null(column)
    if not may_be_blank:
        empty = pc.or_(empty, pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0), True))
    if pc.any(empty).as_py():
        raise UserError(f"{source}: row {_first(empty) + 1}: {name} is empty")
    return column


def _check_labels(column: pa.ChunkedArray, name: str, source: str, all_text: bool) -> pa.ChunkedArray:
    """Labels without spaces around them, as strings or int64; ``all_text``: numbers are written as texts."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not pa.types.is_integer(kind):
        if pa.types.is_floating(kind):
            column = pc.if_else(pc.is_nan(column), None, column)
            with contextlib.suppress(pa.ArrowInvalid):  # a fraction, which is no class
                column, kind = pc.cast(column, pa.int64()), pa.int64()
        if not (pa.types.is_integer(kind) or _is_text(kind)):
            raise UserError(f"{source}: column {name!r} contains {column.type}: labels are names or whole numbers")
    if column.null_count:
        empty = pc.is_null(column)
        count = f"{column.null_count:,} of {len(column):,} rows; -1 among numbered classes stands for none"
        raise UserError(f"{source}: row {_first(empty) + 1}: {name} is empty ({count})")
    if pa.types.is_integer(kind):
        try:
            return pc.cast(column, pa.int64())
        except pa.ArrowInvalid:
            raise UserError(f"{source}: a {name} does not fit into 64 bits; write it as text") from None
    names = _check_texts(column, name, source, False)
    spelled = names.unique().to_pylist()
    plain = [unicodedata.normalize("NFC", one).strip() for one in spelled]
    if plain != spelled:  # names that look the same are the same
        numbers = pc.index_in(names, value_set=pa.array(spelled, pa.large_string()))
        names = pc.take(pa.array(plain, pa.large_string()), numbers)
    if all_text and pc.all(pc.match_substring_regex(names, r"^(0|-?[1-9]\d{0,17})(\.0+)?$")).as_py():
        return pc.cast(pc.replace_substring_regex(names, r"\.0+$", ""), pa.int64())
    return names


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _first(mask: pa.ChunkedArray) -> int:
    import pyarrow.compute as pc

    return pc.index(mask, True).as_py()


def similar_file(path: Path) -> str:
    """A hint if the folder has a file with a similar name."""
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    names = [entry.name for entry in path.parent.iterdir() if table_suffix(entry)]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f": did you mean {path.with_name(close[0])}?" if close else ""
