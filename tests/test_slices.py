"""Slices of a report: which rows are in them, their order and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from accelerando.report.slices import slices, slices_block


def test_the_weakest_come_first_and_few_rows_do_not_count_as_weak() -> None:
    """Of two slices with the same accuracy the one with more rows is surely weak; five wrong rows alone are not."""
    source = ["web"] * 200 + ["book"] * 20 + ["talk"] * 100 + ["note"] * 4
    right = np.array([True] * 100 + [False] * 100 + [True] * 10 + [False] * 10 + [True] * 100 + [False] * 4)
    found = slices(right, {"source": source})
    assert [each.value for each in found] == ["web", "book", "talk"]  # four rows of notes are too few
    assert [each.count for each in found] == [200, 20, 100]
    assert found[0].accuracy == found[1].accuracy == 0.5
    assert found[0].high < found[1].high
    assert found[2].high == pytest.approx(1)
    # Wilson's interval of 10 right of 20, by the formula.
    z, p, n = 1.959964, 0.5, 20
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found[1].low, found[1].high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-5)


def test_many_numbers_become_quarters_that_hold_every_row_once() -> None:
    lengths = np.random.default_rng(0).integers(3, 200, 400)
    right = lengths < 150
    found = slices(right, {"length": lengths})
    assert len(found) == 4
    assert sum(each.count for each in found) == 400
    assert found[0].value.endswith(f"to {lengths.max()}")
    assert found[0].accuracy < 0.5 < found[1].accuracy
    few = slices(right, {"layers": lengths % 3})
    assert {each.value for each in few} == {"0", "1", "2"}


def test_names_of_rows_are_no_kinds_of_rows() -> None:
    right = np.arange(300) % 2 == 0
    assert slices(right, {"file": [f"{row}.jpg" for row in range(300)], "all": ["x"] * 300}) == []
    assert slices_block(right, {"all": ["x"] * 300}, "test") == []
    (block,) = slices_block(right, {"half": ["<a>", "b"] * 150}, "test")
    assert "&lt;a&gt;" in block
    assert "All rows: 0.5000" in block
