"""Classification metrics against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from harness import SIGN, script_module

from accelerando.report.metrics import classification_metrics, evaluate_metric, top_k_accuracy

# Nine of class 0, two of class 1, one of class 2: macro and weighted means are far apart.
LABELS = np.array([0] * 9 + [1] * 2 + [2])
FOUND = np.array([0] * 8 + [1] + [1, 0] + [0])
# class: precision, recall, F1, samples
BY_HAND = {0: (8 / 10, 8 / 9, 16 / 19, 9), 1: (1 / 2, 1 / 2, 1 / 2, 2), 2: (0.0, 0.0, 0.0, 1)}


def logits_for(predictions: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[predictions]


@pytest.mark.parametrize(("place", "name"), [(0, "precision"), (1, "recall"), (2, "f1")])
def test_macro_is_the_plain_mean_over_classes_and_weighted_goes_by_their_samples(place: int, name: str) -> None:
    found = classification_metrics(LABELS, logits_for(FOUND, 3), np.ones(12))
    macro = sum(row[place] for row in BY_HAND.values()) / 3
    weighted = sum(row[place] * row[3] for row in BY_HAND.values()) / 12
    assert abs(macro - weighted) > 0.1
    assert found[f"{name}_macro"] == pytest.approx(macro)
    assert found[f"{name}_weighted"] == pytest.approx(weighted)


def test_a_class_that_never_occurs_counts_zero_in_the_macro_mean() -> None:
    three, four = (classification_metrics(LABELS, logits_for(FOUND, n), np.ones(12)) for n in (3, 4))
    assert four["f1_macro"] == pytest.approx(three["f1_macro"] * 3 / 4)
    assert four["f1_weighted"] == pytest.approx(three["f1_weighted"])
    assert three["accuracy"] == four["accuracy"] == pytest.approx(9 / 12)


def test_loss_is_the_mean_over_samples() -> None:
    losses = np.arange(12, dtype=np.float32)
    assert classification_metrics(LABELS, logits_for(FOUND, 3), losses)["loss"] == pytest.approx(5.5)


def test_signs_have_the_same_means_for_glosses_and_categories() -> None:
    from types import SimpleNamespace

    sign = script_module(SIGN)
    data = SimpleNamespace(names={"gloss": list("abc"), "cat": list("abc")},
                           splits={"test": SimpleNamespace(occluded=None)})  # fmt: skip
    rows = {
        "gloss": LABELS, "cat": LABELS[::-1].copy(), "gloss_logits": logits_for(FOUND, 3),
        "cat_logits": logits_for(FOUND[::-1], 3), "losses": np.ones(12),
    }  # fmt: skip
    found = sign.score(rows, data, "test", None)
    macro = sum(row[2] for row in BY_HAND.values()) / 3
    for kind in ("gloss", "cat"):
        assert found[f"{kind}_f1_macro"] == pytest.approx(macro)
        assert found[f"{kind}_f1_weighted"] == pytest.approx(sum(row[2] * row[3] for row in BY_HAND.values()) / 12)
    rows["losses"][:] = 0
    data.splits["test"].occluded = np.arange(12) < 3
    assert sign.score(rows, data, "test", None)["visible_accuracy"] == pytest.approx(6 / 9)


def test_evaluates_own_metric_gives_the_same_numbers() -> None:
    found = evaluate_metric().compute(predictions=FOUND, references=LABELS, num_labels=3)
    expected = classification_metrics(LABELS, logits_for(FOUND, 3), np.ones(12))
    assert found == {name: value for name, value in expected.items() if name != "loss"}


def test_top_k_counts_equal_scores_against() -> None:
    logits = np.array([[3.0, 2, 1, 0], [3, 2, 1, 0], [1, 1, 1, 1]])
    assert top_k_accuracy(np.array([1, 2, 0]), logits, 2) == pytest.approx(1 / 3)
