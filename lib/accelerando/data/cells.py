"""Checks of the cells of a table: texts, labels, lists of labels, numbers; each error names file and row."""

from __future__ import annotations

import contextlib
import math
import re
import unicodedata
from typing import TYPE_CHECKING

import numpy as np

from accelerando.base.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

WHOLE = r"^(0|-?[1-9]\d{0,17})(\.0+)?$"  # a whole number as a text
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
KINDS = {int: "a whole number", str: "a name", float: "a number", list: "a list"}


def check_number(value: object, name: str, where: str) -> float:
    """A cell of a column of numbers as a float; texts are numbers in CSV.

    Raises:
        UserError: it is no finite number.
    """
    if isinstance(value, str) and re.match(NUMBER, value.strip()):
        value = float(value)
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {name} is {value!r:.40}, not a number")
    return float(value)


def check_items(values: list[object], kind: type | None, name: str, where: str) -> list[str | int]:
    """The labels in a list, names without spaces around them; all of one ``kind``, that of the rows before.

    Raises:
        UserError: one is empty, or neither a name nor a whole number.
    """
    items: list[str | int] = []
    for value in values:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str):
            value = unicodedata.normalize("NFC", value).strip()
        if value == "" or type(value) not in ((int, str) if kind is None else (kind,)):
            wanted = "a name or a whole number" if kind is None else f"{KINDS[kind]} as the others"
            raise UserError(f"{where}: {name} has {value!r:.40} in its list, not {wanted}")
        kind = type(value)
        items.append(value)
    return items


def check_texts(column: pa.ChunkedArray, name: str, source: str, may_be_blank: bool) -> pa.ChunkedArray:
    """A column of texts as large strings; UserError: it holds something else, or an empty cell."""
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
        raise UserError(f"{source}: row {first_row(empty) + 1}: {name} is empty")
    return column


def check_labels(column: pa.ChunkedArray, name: str, source: str, all_text: bool) -> pa.ChunkedArray:
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
        raise UserError(f"{source}: row {first_row(empty) + 1}: {name} is empty ({count})")
    if pa.types.is_integer(kind):
        try:
            return pc.cast(column, pa.int64())
        except pa.ArrowInvalid:
            raise UserError(f"{source}: a {name} does not fit into 64 bits; write it as text") from None
    names = check_texts(column, name, source, False)
    spelled = names.unique().to_pylist()
    plain = [unicodedata.normalize("NFC", one).strip() for one in spelled]
    if plain != spelled:  # names that look the same are the same
        numbers = pc.index_in(names, value_set=pa.array(spelled, pa.large_string()))
        names = pc.take(pa.array(plain, pa.large_string()), numbers)
    return _as_whole_numbers(names) if all_text else names


def _as_whole_numbers(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Names as int64 if all of them are whole numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pc.all(pc.match_substring_regex(names, WHOLE)).as_py():
        return names
    return pc.cast(pc.replace_substring_regex(names, r"\.0+$", ""), pa.int64())


def split_labels(column: pa.ChunkedArray, name: str, delimiter: str, source: str) -> pa.ChunkedArray:
    """Cells of several labels as lists of strings, or of int64 if all are whole numbers; an empty cell has none.

    Raises:
        UserError: a label is empty; gives file and row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not _is_text(kind):
        raise UserError(
            f"{source}: column {name!r} contains {column.type}, not text that --label_delimiter could split"
        )
    cells = pc.utf8_trim_whitespace(pc.utf8_normalize(check_texts(column, name, source, True), "NFC"))
    lists = pc.split_pattern(cells.combine_chunks(), delimiter)
    items = pc.utf8_trim_whitespace(lists.flatten())
    counts = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    empty = pc.equal(cells.combine_chunks(), "").to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(counts)), counts)
    kept = ~empty[rows]  # an empty cell is split into one empty part
    blank = pc.equal(items, "").to_numpy(zero_copy_only=False) & kept
    if blank.any():
        row = int(rows[blank.argmax()])
        raise UserError(f"{source}: row {row + 1}: {name} {cells[row].as_py()!r:.60} has an empty label in it")
    items = _as_whole_numbers(pa.chunked_array([items.filter(pa.array(kept))])).combine_chunks()
    offsets = np.concatenate([[0], np.cumsum(np.where(empty, 0, counts))]).astype(np.int32)
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(offsets), items)])


def check_lists(column: pa.ChunkedArray, name: str, source: str) -> pa.ChunkedArray:
    """Lists of labels as lists of strings or int64, without spaces around the names.

    Raises:
        UserError: a list or a label in it is missing; gives file and row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if column.null_count:
        count = f"{column.null_count:,} of {len(column):,} rows; an empty list stands for no label"
        raise UserError(f"{source}: row {first_row(pc.is_null(column)) + 1}: {name} is empty ({count})")
    lists = column.combine_chunks()
    lists = pa.concat_arrays(lists.chunks) if isinstance(lists, pa.ChunkedArray) else lists
    items, rows = pc.list_flatten(lists), pc.list_parent_indices(lists)
    counts = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    if items.null_count:
        raise UserError(
            f"{source}: row {rows[first_row(pc.is_null(items))].as_py() + 1}: {name} has an empty label in it"
        )
    try:
        items = check_labels(pa.chunked_array([items]), name, source, False) if len(items) else items
    except UserError as error:  # which counts labels, not rows
        place = re.search(r": row (\d+):", str(error))
        row = f": row {rows[int(place[1]) - 1].as_py() + 1}:" if place else ""
        raise UserError(str(error).replace(place[0], row) if place else str(error)) from None
    items = items.combine_chunks() if isinstance(items, pa.ChunkedArray) else items
    items = items.cast(pa.large_string()) if pa.types.is_null(items.type) else items
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(offsets), items)])


def has_fractions(column: pa.ChunkedArray, name: str, source: str, all_text: bool) -> bool:
    """Whether labels are numbers of which some have a fraction; ``all_text``: numbers are written as texts.

    Raises:
        UserError: most cells of texts are such numbers, and one is none.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_floating(kind):
        known = pc.drop_null(pc.if_else(pc.is_nan(column), None, column))
        return bool(pc.any(pc.not_equal(pc.floor(known), known)).as_py())
    if not (all_text and _is_text(kind)) or column.null_count:
        return False
    cells = pc.utf8_trim_whitespace(pc.cast(column, pa.large_string()))
    numbers, whole = pc.match_substring_regex(cells, NUMBER), pc.match_substring_regex(cells, WHOLE)
    fractions = pc.sum(pc.and_not(numbers, whole)).as_py() or 0
    if 2 * fractions > len(cells) and not pc.all(numbers).as_py():
        row = first_row(pc.invert(numbers))
        hint = "correct it, or use --problem_type single_label if each number is a class"
        raise UserError(f"{source}: row {row + 1}: {name} is {cells[row].as_py()!r:.40}, but most are numbers: {hint}")
    return fractions > 0 and bool(pc.all(numbers).as_py())


def check_numbers(column: pa.ChunkedArray, name: str, source: str) -> pa.ChunkedArray:
    """A column of finite numbers, or of texts that are numbers, as doubles.

    Raises:
        UserError: a cell is empty or no number; gives file and row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if _is_text(kind):
        cells = pc.utf8_trim_whitespace(check_texts(column, name, source, False))
        wrong = pc.invert(pc.match_substring_regex(cells, NUMBER))
        values = pc.cast(pc.if_else(wrong, "0", pc.replace_substring_regex(cells, r"^\+", "")), pa.float64())
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        if column.null_count:
            count = f"{column.null_count:,} of {len(column):,} rows"
            raise UserError(f"{source}: row {first_row(pc.is_null(column)) + 1}: {name} is empty ({count})")
        cells = values = pc.cast(pc.cast(column, pa.int8()) if pa.types.is_boolean(kind) else column, pa.float64())
        wrong = pc.invert(pc.is_finite(values))
    else:
        raise UserError(f"{source}: column {name!r} contains {column.type}, not numbers")
    wrong = pc.or_(wrong, pc.invert(pc.is_finite(values)))
    if pc.any(wrong).as_py():
        row = first_row(wrong)
        raise UserError(f"{source}: row {row + 1}: {name} is {cells[row].as_py()!r:.40}, not a number")
    return values


def side_by_side(columns: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    """Columns of doubles as one of lists of fixed size."""
    import pyarrow as pa

    values = np.column_stack([column.to_numpy() for column in columns])
    return pa.chunked_array([pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), len(columns))])


def is_list(kind: pa.DataType) -> bool:
    """Whether cells are lists of labels."""
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def first_row(mask: pa.ChunkedArray) -> int:
    """The first row at which ``mask`` is true."""
    import pyarrow.compute as pc

    return pc.index(mask, True).as_py()
