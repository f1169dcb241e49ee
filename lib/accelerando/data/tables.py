"""Labelled text from any table (see :mod:`data.table_formats`), checked row by row and packed as Arrow columns.

Labels are one name or number a row; where a caller allows it also several names, or numbers with a fraction: see
:mod:`data.targets`. An error in a row is reported in one line with the file and the row number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from accelerando.base.errors import UserError
from accelerando.base.log import log
from accelerando.data.cells import (
    KINDS,
    check_items,
    check_labels,
    check_lists,
    check_number,
    check_numbers,
    check_texts,
    first_row,
    has_fractions,
    is_list,
    side_by_side,
    split_labels,
)
from accelerando.data.table_formats import check_table, read_datasets, read_parquet, table_records, table_suffix

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 65_536  # rows held as Python objects at a time
AUGMENTED = "augmented_from"  # the column by which tools/augment_text.py marks changed copies of rows

ProblemType = Literal["single_label", "multi_label", "regression"]


@dataclass(frozen=True)
class TextTable:
    """n rows: ``texts`` (and ``pairs``) as Arrow strings, ``labels`` as Arrow strings or int64, either may be None.

    Several labels of a row are an Arrow list of strings or int64; numbers are doubles, several a list of fixed size.
    """

    texts: pa.ChunkedArray
    pairs: pa.ChunkedArray | None
    labels: pa.ChunkedArray | None
    source: str
    others: pa.Table | None = None  # the other columns, if requested
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # encoded columns, [n] each: see encode_column
    label_columns: tuple[str, ...] = ()  # the columns that labels of numbers come from, one for each number
    augmented: bool = False  # changed copies of rows may be among them

    def __len__(self) -> int:
        return len(self.texts)

    def text(self, row: int) -> str:
        """The text (or pair of texts) of a row, for display."""
        first = self.texts[row].as_py()
        return first if self.pairs is None else f"{first} / {self.pairs[row].as_py()}"

    def check_no_copies(self, use: str) -> None:
        """UserError if there are changed copies of rows, which are not to be ``use``: scores would be too good."""
        if self.augmented:
            hint = "split first (tools/preprocess_text.py), augment the training rows alone, and name --validation_file"
            raise UserError(f"{self.source}: has copies of rows (column {AUGMENTED!r}), not to be {use}; {hint}")

    def groups(self, column: str | None = None) -> list[str]:
        """The group of each row: its value of another column, or its texts, so that equal rows are one group.

        Raises:
            UserError: a row has no value there.
        """
        if column is None:
            return [self.text(row) for row in range(len(self))]
        values = [None if value is None else str(value).strip() for value in self.others[column].to_pylist()]
        for row, value in enumerate(values, start=1):
            if not value:
                raise UserError(f"{self.source}: row {row}: {column} is empty; give each unknown one a name of its own")
        return values

    def take(self, rows: np.ndarray) -> TextTable:
        """The given rows, in the given order."""
        import pyarrow as pa

        index = pa.array(rows)
        columns = [None if column is None else column.take(index) for column in (self.texts, self.pairs, self.labels)]
        others = None if self.others is None else self.others.take(index)
        encoded = {name: values[rows] for name, values in self.columns.items()}
        return TextTable(*columns, self.source, others, encoded, self.label_columns, self.augmented)


def read_text_table(
    source: str,
    *,
    split: str = "train",
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
    require_labels: bool = True,
    allow_blank: bool = False,
    other_columns: bool | Sequence[str] = False,
    problem_type: ProblemType | None = "single_label",
    label_columns: Sequence[str] = (),
    label_delimiter: str | None = None,
) -> TextTable:
    """Reads ``source``: a file, a folder of `datasets`, or ``name`` or ``name:config`` of a data set on the Hub.

    ``split`` applies only to `datasets`; ``allow_blank`` allows empty texts; ``other_columns`` keeps all columns, or
    those that it names. Messages count rows from 1.

    Unless ``problem_type`` is single_label, a label may be a list or a number with a fraction (None: whatever there
    is). ``label_columns``: columns of numbers instead of ``label_column``; ``label_delimiter``: what separates several
    labels in a cell, of which an empty one has none.

    Raises:
        UserError: the file is missing, invalid or empty; a column is unknown; a row lacks its text or label.
    """
    path = Path(source)
    numbers = list(label_columns) if require_labels else []
    label = label_column if require_labels and not numbers else None
    columns = [text_column, *([text_pair_column] if text_pair_column else []), *([label] if label else []), *numbers]
    if repeated := [name for name in columns if columns.count(name) > 1]:
        raise UserError(f"{source}: column {repeated[0]!r} is named twice: texts and labels need a column each")
    suffix = table_suffix(path)
    if suffix:
        check_table(path)
    if suffix == ".parquet":
        table = read_parquet(path)
        augmented = AUGMENTED in table.column_names
        table = _select(table, columns, source, bool(other_columns))
    elif suffix:
        records = table_records(path, columns)
        first = [*itertools.islice(records, 1)]
        augmented = any(isinstance(record, dict) and AUGMENTED in record for _, record in first)
        records = itertools.chain(first, records)
        many = problem_type != "single_label"
        table = _pack(records, columns, label, source, bool(other_columns), many, numbers, label_delimiter is not None)
    else:
        table = read_datasets(source, split)
        augmented = AUGMENTED in table.column_names
        table = _select(table, columns, source, bool(other_columns))
    if table.num_rows == 0:
        raise UserError(f"{source}: no rows in it")
    texts = check_texts(table[text_column], text_column, source, allow_blank)
    pairs = check_texts(table[text_pair_column], text_pair_column, source, True) if text_pair_column else None
    labels, all_text = None, suffix in (".csv", ".tsv")
    if label_delimiter is not None and label:
        labels = split_labels(table[label], label, label_delimiter, source)
    elif label and problem_type != "single_label" and is_list(table[label].type):
        labels = check_lists(table[label], label, source)
    elif label and problem_type != "single_label" and has_fractions(table[label], label, source, all_text):
        labels = check_numbers(table[label], label, source)
    elif label:
        labels = check_labels(table[label], label, source, all_text)
    if numbers:
        labels = side_by_side([check_numbers(table[name], name, source) for name in numbers])
    others = table.drop_columns(columns) if other_columns else None
    if not isinstance(other_columns, bool) and others is not None:
        others = named_columns(others, other_columns, source)
    found = TextTable(texts, pairs, labels, source, others, label_columns=tuple(numbers), augmented=augmented)
    if split in ("validation", "test"):
        found.check_no_copies("scored")
    return found


def named_columns(table: pa.Table, names: Sequence[str], source: str) -> pa.Table:
    """The columns ``names`` of a table; UserError: it has no such column."""
    if missing := [name for name in names if name not in table.column_names]:
        there = ", ".join(table.column_names) or "none"
        raise UserError(f"{source}: no column {missing[0]!r} beside those that are trained on: {there}")
    return table.select(list(names))


def label_names(table: TextTable) -> list[str]:
    """The distinct labels as names: text sorted as text, integers as numbers; warns of names that look alike.

    Where numbers come from columns, or labels from columns of 0 and 1, the names of the columns.

    Raises:
        UserError: there are no labels.
    """
    import pyarrow.compute as pc

    if table.label_columns:
        return list(table.label_columns)
    labels = pc.list_flatten(table.labels) if is_list(table.labels.type) else table.labels
    names = [str(label) for label in sorted(labels.unique().to_pylist())]
    if not names:
        raise UserError(f"{table.source}: no row has a label")
    alike: dict[str, str] = {}
    for name in names:
        if (other := alike.setdefault(" ".join(name.casefold().split()), name)) != name:
            log.warning("%s: the labels %r and %r are two classes, though they look alike", table.source, other, name)
    return names


def encode_labels(table: TextTable, names: list[str]) -> np.ndarray:
    """Label numbers, int64 [n]: the position of each row's label in ``names``.

    Of several labels a row float32 [n, C], 1 where a row has the label; of numbers, the numbers as float32 [n, C].

    Raises:
        UserError: a label is not in ``names``; gives file and row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, labels = table.labels.type, table.labels
    if pa.types.is_floating(kind) or pa.types.is_fixed_size_list(kind):
        return _encode_numbers(table, names)
    if is_list(kind):
        lists = labels.combine_chunks()
        rows, labels = pc.list_parent_indices(lists).to_numpy(), pc.list_flatten(lists)
    codes = pc.index_in(pc.cast(labels, pa.large_string()), value_set=pa.array(names, pa.large_string()))
    if codes.null_count:
        place = first_row(pc.is_null(codes))
        row = int(rows[place]) if is_list(kind) else place
        known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        label = str(labels[place])
        if label == "-1" and not is_list(kind):
            raise _unlabelled(table.source, pc.equal(table.labels, table.labels[row]))
        raise UserError(f"{table.source}: row {row + 1}: label {label!r} does not occur in the training rows ({known})")
    if is_list(kind):
        encoded = np.zeros((len(table), len(names)), np.float32)
        encoded[rows, codes.to_numpy(zero_copy_only=False).astype(np.int64)] = 1
        return encoded
    return codes.to_numpy().astype(np.int64)


def _encode_numbers(table: TextTable, names: list[str]) -> np.ndarray:
    """Numbers float32 [n, C] in the order of ``names``; a single number is found under any name.

    Raises:
        UserError: the table has other columns of numbers.
    """
    import pyarrow as pa

    labels = table.labels.combine_chunks()
    flat = labels.flatten() if pa.types.is_fixed_size_list(labels.type) else labels
    values = flat.to_numpy().reshape(len(table), -1).astype(np.float32)
    if len(names) == values.shape[1] == 1:
        return values
    if missing := [name for name in names if name not in table.label_columns]:
        there = ", ".join(table.label_columns) or "one column"
        raise UserError(f"{table.source}: no column of numbers {missing[0]!r}; there are {there}")
    return values[:, [table.label_columns.index(name) for name in names]]


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
    return UserError(f"{source}: row {first_row(rows) + 1}: the label is -1, that is, none ({count}): {hint}")


def _pack(
    records: Iterator[tuple[str, object]],
    columns: list[str],
    label: str | None,
    source: str,
    others: bool,
    many: bool = False,
    numbers: Sequence[str] = (),
    may_be_blank: bool = False,
) -> pa.Table:
    """Checks records one by one and packs ``columns``; with ``others``, also the other columns of the first record.

    ``many``: a label may also be a list or have a fraction. ``numbers``: those of ``columns`` that hold numbers.
    ``may_be_blank``: a label may be an empty text.
    """
    import pyarrow as pa

    beside: list[str] = []  # names of the other columns
    extra: dict[str, list[object]] = {}
    extra_chunks: dict[str, list[pa.Array]] = {}

    pending: dict[str, list[str | int | float | list]] = {name: [] for name in columns}
    chunks: dict[str, list[pa.Array]] = {name: [] for name in columns}
    label_type: type | None = None
    item_type: type | None = None  # of the labels in a list
    allowed = (int, str, float, list) if many else (int, str)
    filled = {*numbers, *([] if may_be_blank else [label])}

    def kind_of(name: str) -> pa.DataType:
        if name == label and label_type is list:
            return pa.list_(pa.int64() if item_type is int else pa.large_string())
        if name in numbers or (name == label and label_type is float):
            return pa.float64()
        return pa.int64() if name == label and label_type is int else pa.large_string()

    def flush() -> None:
        for name in columns:
            kind = kind_of(name)
            try:
                chunks[name].append(pa.array(pending[name], kind))
            except (OverflowError, pa.ArrowInvalid):
                raise UserError(f"{source}: a {name} does not fit into 64 bits; write it as text") from None
            except UnicodeEncodeError:
                raise UserError(f"{source}: a {name} contains half a character (a lone surrogate)") from None
            pending[name].clear()
        for name in beside:
            extra_chunks[name].append(array_of_any(extra[name]))
            extra[name].clear()

    for where, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{source}: {where}: expected an object with {', '.join(columns)}, found {record!r:.60}")
        for name in columns:
            value = record.get(name)
            if name == label and isinstance(value, float) and value.is_integer():  # 1.0 beside 1
                value = int(value)
            if value is None or (isinstance(value, str) and name in filled and not value.strip()):
                there = ", ".join(map(str, record))
                reason = f"{name} is empty" if name in record else f"no {name!r} (it has {there or 'nothing'})"
                raise UserError(f"{source}: {where}: {reason}")
            if name in numbers:
                value = check_number(value, name, f"{source}: {where}")
            elif name != label and not isinstance(value, str):
                raise UserError(f"{source}: {where}: {name} is {value!r:.40}, not a text")
            if name == label and many and isinstance(value, list):
                value = check_items(value, item_type, name, f"{source}: {where}")
                item_type = next(map(type, value), item_type)
            elif name == label and many and isinstance(value, int | float) and label_type in (int, float):
                if float in (type(value), label_type):
                    value = check_number(value, name, f"{source}: {where}")
                label_type = type(value)  # 2.5 behind 3: the column is of numbers with fractions
            if name == label and type(value) not in (allowed if label_type is None else (label_type,)):
                wanted = "a name or a whole number" if label_type is None else f"{KINDS[label_type]} as in other rows"
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
    for name in [label, *numbers] if many else []:  # whole numbers before the first fraction, lists without items
        chunks[name] = [chunk.cast(kind_of(name)) for chunk in chunks[name]] if name else []
    table = {name: pa.chunked_array(chunks[name]) for name in columns}
    return pa.table(table | {name: _one_type(extra_chunks[name]) for name in beside})


def array_of_any(values: list[object]) -> pa.Array:
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


# ----------------------------------------------------------------------------------------------------------- checks


def _select(table: pa.Table, columns: list[str], source: str, others: bool) -> pa.Table:
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise UserError(f"{source}: no column {missing[0]!r}; there are {', '.join(table.column_names)}")
    if repeated := [name for name in columns if table.column_names.count(name) > 1]:
        raise UserError(f"{source}: two columns are called {repeated[0]!r}")
    kept = [number for number, name in enumerate(table.column_names) if table.column_names.count(name) == 1]
    return table.select(kept if others else columns)
