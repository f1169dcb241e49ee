"""Tables as files: JSON, JSON lines, CSV, TSV and Parquet, plain or compressed, and `datasets`; rows as they stand.

An error in a file is reported in one line with its place; data/README.md describes the formats. What the rows mean is
checked in :mod:`data.tables`.
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
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from accelerando.base.errors import UserError, first_line
from accelerando.data.cells import is_list

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz")  # behind the suffix of a text format: rows.csv.gz
DELIMITERS = ",;\t|"  # of a CSV file, the first one that its header has
LONGEST_LINE = 2**28  # bytes


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


def similar_file(path: Path) -> str:
    """A hint if the folder has a file with a similar name."""
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    names = [entry.name for entry in path.parent.iterdir() if table_suffix(entry)]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f": did you mean {path.with_name(close[0])}?" if close else ""


# ----------------------------------------------------------------------------------------------------------------- JSON


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


# ------------------------------------------------------------------------------------------------------------------ CSV


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


# Beginnings of a cell that spreadsheets take for a formula, which may call up an address; some know wide signs.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def formula_safe(cell: str) -> str:
    """A cell of a CSV file that no spreadsheet takes for a formula: an apostrophe stands before what looks like one."""
    return f"'{cell}" if _FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell


def without_formula_mark(cell: str) -> str:
    """The inverse of :func:`formula_safe`, for reading the files that it was used for."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


# ---------------------------------------------------------------------------------------------------------------- Arrow


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
    """Column -> names of its classes, also of lists of classes, from what `datasets` keeps in a schema."""
    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {name: kind.get("feature", kind) for name, kind in features.items()}
        kinds = {name: kind for name, kind in kinds.items() if kind.get("_type") == "ClassLabel"}
        return {name: [str(one) for one in kind["names"]] for name, kind in kinds.items() if kind.get("names")}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _with_class_names(table: pa.Table, classes: Mapping[str, Sequence[str]], source: str) -> pa.Table:
    """``table`` with the names of ``classes`` (by column) in place of their numbers; -1 stands for no class."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for name, names in classes.items():
        if table.column_names.count(name) != 1:
            continue
        numbers = lists = table[name].combine_chunks()
        if is_list(lists.type) and not lists.null_count:
            numbers = lists.flatten()
        if not pa.types.is_integer(numbers.type):
            continue
        if pc.any(pc.greater_equal(numbers, len(names))).as_py():
            raise UserError(f"{source}: column {name!r} has a number beyond its {len(names)} class names")
        texts = pc.take(pa.array(names, pa.string()), pc.if_else(pc.greater_equal(numbers, 0), numbers, None))
        if numbers is not lists:
            ends = np.cumsum(pc.list_value_length(lists).to_numpy(zero_copy_only=False))
            texts = pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]).astype(np.int32)), texts)
        table = table.set_column(table.column_names.index(name), name, texts)
    return table


def read_datasets(source: str, split: str) -> pa.Table:
    """A split of a folder that `datasets` wrote, or of a data set on the Hub (``name`` or ``name:config``).

    Raises:
        UserError: it cannot be loaded, or has no such split.
    """
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
    kinds = {name: getattr(kind, "feature", kind) for name, kind in loaded.features.items()}  # also of lists of classes
    classes = {name: kind.names for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}
    table = loaded.with_format("arrow")[:]
    _check_content(table, source)
    return _with_class_names(table, classes, source)
