"""Where a classifier is weak: its accuracy on parts of the rows, by the values of columns, the worst first."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from accelerando.base.texts import one_line
from accelerando.report import page
from accelerando.report.plots import shorten

if TYPE_CHECKING:
    import pyarrow as pa

FEWEST = 5  # rows of a slice that is shown
MOST_VALUES = 12  # of a column of numbers: with more of them its quarters are shown
MOST_NAMES = 200  # of a column of names: with more of them it tells rows apart and not kinds of rows
SHOWN = 30  # slices in the report
COVERED = 0.95  # of which the interval covers this share


@dataclass(frozen=True)
class Slice:
    """The rows with one value (or range of values) of a column: how many they are, and the share of right answers
    with the interval ``low`` to ``high``."""

    column: str
    value: str
    count: int
    accuracy: float
    low: float
    high: float


def slices(right: np.ndarray, columns: Mapping[str, Sequence[object] | np.ndarray]) -> list[Slice]:
    """Slices of at least 5 rows, those first whose accuracy is lowest even at the upper end of its interval.

    ``right``: bool [n], which answers are right; ``columns``: n names or numbers each. The interval is Wilson's (1927),
    which holds for few rows and near 0 and 1.
    """
    from scipy.stats import binomtest

    found = []
    for column, values in columns.items():
        for value, rows in _groups(values).items():
            count = len(rows)
            if FEWEST <= count < len(right):
                test = binomtest(int(right[rows].sum()), count)
                low, high = test.proportion_ci(COVERED, method="wilson")
                found.append(Slice(column, value, count, float(right[rows].mean()), float(low), float(high)))
    return sorted(found, key=lambda each: (each.high, each.accuracy, each.column, each.value))


def columns_of_files(
    names: Sequence[str], labels: Sequence[str], others: pa.Table | None
) -> dict[str, Sequence[object]]:
    """What n files are divided by: their labels, the folders of ``names`` (with slashes) where these say more than the
    labels, and the columns of ``others``."""
    folders = [str(PurePosixPath(name).parent) for name in names]
    says_more = len(set(folders)) > len(set(labels))
    columns = {name: others[name].to_pylist() for name in (others.column_names if others is not None else ())}
    return {"label": labels, **({"folder": folders} if says_more else {}), **columns}


def slices_block(right: np.ndarray, columns: Mapping[str, Sequence[object] | np.ndarray], what: str) -> list[str]:
    """A block of ``report.html``, or none where no column has slices; ``what`` is added to its title."""
    found = slices(right, columns)
    rows = [
        (each.column, shorten(one_line(each.value), 60), each.count, each.accuracy, each.low, each.high)
        for each in found[:SHOWN]
    ]
    header = ["column", "value", "rows", "accuracy", "from", "to"]
    more = f" {len(found) - SHOWN:,} better ones are not shown." if len(found) > SHOWN else ""
    note = f"All rows: {right.mean():.4f}. From, to: the 95 % interval.{more}"
    return [page.table(header, rows, note=note, heat=(3,), title=f"Weakest slices, {what}")] if found else []


def _groups(values: Sequence[object] | np.ndarray) -> dict[str, np.ndarray]:
    """The rows of each value; of many numbers, of each quarter."""
    array = np.asarray(values)
    if array.dtype.kind in "fiu" and len(np.unique(array)) > MOST_VALUES:
        edges = np.unique(np.quantile(array, [0, 0.25, 0.5, 0.75, 1]))
        place = np.clip(np.searchsorted(edges, array, side="right") - 1, 0, len(edges) - 2)
        names = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)]
        return {name: np.flatnonzero(place == number) for number, name in enumerate(names)}
    names, inverse = np.unique(array.astype(str), return_inverse=True)
    if len(names) > MOST_NAMES:
        return {}
    return {str(name): np.flatnonzero(inverse == number) for number, name in enumerate(names)}
