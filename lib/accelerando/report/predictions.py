"""Predictions as tables, and the worst mistakes among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.base.files import write_text
from accelerando.data.table_formats import formula_safe


def worst_mistakes(
    labels: np.ndarray, logits: np.ndarray, label_names: Sequence[str], limit: int = 20
) -> list[dict[str, Any]]:
    """The most confident errors: dicts with ``row``, ``true``, ``predicted`` and ``confidence``, the worst first.

    ``labels`` int [n], ``logits`` [n, C].
    """
    scores = probabilities(logits)
    confidence, predicted = scores.max(axis=1), scores.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    chosen = wrong[np.argsort(-confidence[wrong], kind="stable")][:limit]
    return [
        {
            "row": int(row),
            "true": label_names[labels[row]],
            "predicted": label_names[predicted[row]],
            "confidence": float(confidence[row]),
        }
        for row in chosen
    ]


def highest_losses(losses: np.ndarray, limit: int = 20) -> np.ndarray:
    """The rows with the highest of ``losses`` [n], the worst first, int [at most ``limit``]; nan counts as highest."""
    return np.argsort(-np.nan_to_num(losses, nan=np.inf), kind="stable")[:limit]


def scored_examples(
    labels: np.ndarray, logits: np.ndarray, label_names: Sequence[str], limit: int = 6
) -> list[dict[str, Any]]:
    """A few samples, evenly spread: dicts with ``row``, ``true``, ``predicted`` and ``scores``, the probability of each
    class name."""
    chosen = np.unique(np.linspace(0, len(labels) - 1, min(limit, len(labels))).round().astype(int))
    return [
        {
            "row": int(row),
            "true": label_names[labels[row]],
            "predicted": label_names[int(values.argmax())],
            "scores": dict(zip(label_names, values.tolist(), strict=True)),
        }
        for row, values in zip(chosen, probabilities(logits[chosen]), strict=True)
    ]


def ensemble_logits(logits: Sequence[np.ndarray], problem_type: str = "single_label") -> np.ndarray:
    """Logits float32 [n, C] of the mean of several models' probabilities; ``logits``: [n, C] of each model.

    ``problem_type``: ``multi_label`` takes the probability of each label by itself; of ``regression`` the outputs
    themselves are averaged.
    """
    from accelerando.report.target_metrics import sigmoid

    if problem_type == "regression":
        return np.mean(logits, axis=0, dtype=np.float64).astype(np.float32)
    of_each = sigmoid if problem_type == "multi_label" else probabilities
    # Zero probability would be an infinite loss.
    mean = np.maximum(np.mean([of_each(own) for own in logits], axis=0), np.finfo(np.float32).tiny)
    other = np.maximum(1 - mean, 1e-16) if problem_type == "multi_label" else 1.0
    return np.log(mean / other).astype(np.float32)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the classes, float64 [n, C]."""
    logits = logits.astype(np.float64)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def write_predictions(
    path: Path,
    samples: Sequence[str],
    label_names: list[str],
    probabilities: np.ndarray,
    labels: np.ndarray | None = None,
    of_texts: bool = False,
) -> None:
    """Writes a CSV with a row for each sample: ``file``, ``label`` (if ``labels`` [n] are given), ``predicted``,
    ``confidence``, and the probability of each class as ``p_<class>`` from ``probabilities`` [n, C].

    ``samples``: the files [n]; ``of_texts``: they are texts, and ``row`` (from 1 on) and ``text`` stand first instead.
    """
    samples = [*map(with_plain_breaks, samples)] if of_texts else samples
    rows = prediction_rows(samples, label_names, probabilities, labels)
    header = prediction_header(label_names, labels is not None)
    if of_texts:
        header, rows = ["row", "text", *header[1:]], ([number, *row] for number, row in enumerate(rows, start=1))
    write_csv(path, header, rows)


def with_plain_breaks(text: str) -> str:
    """A text whose line breaks are all alike: a carriage return alone would end a row of a CSV file."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a CSV atomically; the cells are written as they are (see :func:`formula_safe`)."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def prediction_header(label_names: list[str], labelled: bool = False) -> list[str]:
    """The columns of :func:`prediction_rows`."""
    return ["file", *(["label"] if labelled else []), "predicted", "confidence", *(f"p_{name}" for name in label_names)]


def prediction_rows(
    files: Sequence[str], label_names: list[str], probabilities: np.ndarray, labels: np.ndarray | None = None
) -> Iterator[list[str]]:
    """The rows of a CSV of predictions, safe to open in a spreadsheet; see :func:`write_predictions`."""
    for row, (file, best) in enumerate(zip(files, probabilities.argmax(axis=1).tolist(), strict=True)):
        label = [label_names[labels[row]]] if labels is not None else []
        numbers = [f"{value:.6f}" for value in (probabilities[row, best], *probabilities[row])]
        yield [*map(formula_safe, (file, *label, label_names[best])), *numbers]
