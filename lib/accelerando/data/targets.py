"""What a text classifier learns of each row: one label, several labels, or numbers; found from the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from accelerando.base.errors import UserError
from accelerando.data.cells import check_numbers, is_list
from accelerando.data.tables import ProblemType, TextTable

if TYPE_CHECKING:
    import pyarrow as pa

BINS = 10  # of the values of a regression, to stratify by
LEAST_OF_BIN = 20  # rows
# What transformers calls them in a model's config; it takes None for one label a row.
PROBLEM_TYPES = {"single_label": None, "multi_label": "multi_label_classification", "regression": "regression"}


def as_targets(
    tables: Mapping[str, TextTable], problem_type: ProblemType | None = None, label_column: str = "label"
) -> tuple[dict[str, TextTable], ProblemType]:
    """The tables with labels in the form of one problem type, and this type.

    None: it is found from the training rows. Lists of labels, and columns of 0 and 1, are several labels a row; numbers
    of which some have a fraction, and other columns of numbers, are a regression; all else is one label a row.
    ``label_column``: the name of a single number.

    Raises:
        UserError: the labels do not fit ``problem_type``, or those of another split do not fit the training rows'.
    """
    import pyarrow as pa

    train = tables["train"].labels
    if problem_type is None and pa.types.is_fixed_size_list(train.type):
        problem_type = "multi_label" if _other_than_0_and_1(train) is None else "regression"
    elif problem_type is None and pa.types.is_floating(train.type):
        problem_type = "regression"
    elif problem_type is None:
        problem_type = "multi_label" if is_list(train.type) else "single_label"
    if problem_type == "regression":
        return {split: _numbers(table, label_column) for split, table in tables.items()}, problem_type
    convert = _several_labels if problem_type == "multi_label" else _one_label
    return {split: convert(table) for split, table in tables.items()}, problem_type


def _one_label(table: TextTable) -> TextTable:
    import pyarrow as pa

    if table.label_columns or is_list(table.labels.type) or pa.types.is_floating(table.labels.type):
        what = "columns" if table.label_columns else "lists" if is_list(table.labels.type) else "numbers with fractions"
        raise UserError(f"{table.source}: the labels are {what}, but one label a row is wanted (single_label)")
    return table


def _several_labels(table: TextTable) -> TextTable:
    """Labels as lists; a single label a row is a list of one, and columns of 0 and 1 name the labels, sorted."""
    import pyarrow as pa

    labels = table.labels.combine_chunks()
    if pa.types.is_floating(labels.type):
        raise UserError(f"{table.source}: the labels are numbers with fractions, but multi_label wants names or lists")
    if is_list(labels.type):
        return table
    if not table.label_columns:
        offsets = pa.array(np.arange(len(table) + 1, dtype=np.int32))
        return replace(table, labels=pa.chunked_array([pa.ListArray.from_arrays(offsets, labels)]))
    if (wrong := _other_than_0_and_1(table.labels)) is not None:
        row, column, value = wrong
        name = table.label_columns[column]
        raise UserError(f"{table.source}: row {row + 1}: {name} is {value:g}, but columns of labels hold 0 or 1")
    names = sorted(table.label_columns)
    values = _matrix(table.labels)[:, [table.label_columns.index(name) for name in names]]
    rows, columns = np.nonzero(values)
    offsets = np.searchsorted(rows, np.arange(len(table) + 1)).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(names, pa.large_string()).take(pa.array(columns)))
    return replace(table, labels=pa.chunked_array([lists]), label_columns=tuple(names))


def _numbers(table: TextTable, name: str) -> TextTable:
    import pyarrow as pa

    if is_list(table.labels.type):
        raise UserError(f"{table.source}: the labels are lists; numbers of a row need a column each: --label_columns")
    if pa.types.is_fixed_size_list(table.labels.type):
        return table
    return replace(table, labels=check_numbers(table.labels, name, table.source), label_columns=(name,))


def _other_than_0_and_1(labels: pa.ChunkedArray) -> tuple[int, int, float] | None:
    """Row, column and value of the first number that is neither 0 nor 1; None: there is none."""
    values = _matrix(labels)
    wrong = np.argwhere((values != 0) & (values != 1))
    return (int(wrong[0, 0]), int(wrong[0, 1]), float(values[tuple(wrong[0])])) if len(wrong) else None


def _matrix(labels: pa.ChunkedArray) -> np.ndarray:
    """Lists of fixed size as float64 [n, C]."""
    lists = labels.combine_chunks()
    return lists.flatten().to_numpy().reshape(len(lists), -1)


def strata(targets: np.ndarray, problem_type: ProblemType) -> np.ndarray:
    """The number of a stratum for each row, int [n], to split by (:func:`data.splits.stratified_split`).

    ``targets`` as :func:`data.tables.encode_labels` gives them: of one label a row the label itself; of several the
    rarest (-1: none); of numbers a bin between quantiles of their mean, each in units of its standard deviation.
    """
    if problem_type == "single_label":
        return targets
    if problem_type == "multi_label":
        counts = targets.sum(axis=0)
        rarity = np.where(targets > 0, counts, np.inf)
        return np.where(targets.any(axis=1), rarity.argmin(axis=1), -1)
    spread = targets.std(axis=0, dtype=np.float64)
    means = ((targets - targets.mean(axis=0, dtype=np.float64)) / np.where(spread > 0, spread, 1)).mean(axis=1)
    bins = max(1, min(BINS, len(targets) // LEAST_OF_BIN))
    return np.searchsorted(np.quantile(means, np.arange(1, bins) / bins), means, side="right")
