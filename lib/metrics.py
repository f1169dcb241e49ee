"""Classification metrics as ``evaluate.Metric`` classes that need no network, and the numbers under plain names."""

from __future__ import annotations

from typing import Any

import numpy as np


def classification_metrics(labels: np.ndarray, logits: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """``loss``, ``accuracy`` and precision, recall, F1, each ``_macro`` and ``_weighted``.

    ``labels`` int [n], ``logits`` float [n, C], ``losses`` float [n]. Macro means are over the C classes of the model;
    a class without samples or predictions counts 0.
    """
    metric = _metric_class()(keep_in_memory=True)
    values = metric.compute(predictions=logits.argmax(axis=1), references=labels, num_labels=logits.shape[1])
    return {"loss": float(losses.astype(np.float64).mean()), **values}


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> np.ndarray:
    """Counts, int64 [C, C]: rows are the true classes, columns the predicted ones."""
    flat = np.bincount(labels * num_labels + predictions, minlength=num_labels * num_labels)
    return flat.reshape(num_labels, num_labels)


def per_class(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """``precision``, ``recall``, ``f1`` float [C] and ``support`` int [C] from a confusion matrix [C, C]."""
    hits = np.diag(matrix).astype(np.float64)
    predicted, support = matrix.sum(axis=0), matrix.sum(axis=1)
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(support, 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return {"precision": precision, "recall": recall, "f1": f1, "support": support}


def report_text(matrix: np.ndarray, names: list[str]) -> str:
    """scikit-learn's classification report, from a confusion matrix, with names that are not cut off."""
    values = per_class(matrix)
    total = max(1, int(matrix.sum()))
    width = max(12, *(len(name) for name in names))
    lines = [f"{'':{width}}  precision    recall        f1   support", ""]
    columns = ("precision", "recall", "f1")
    for row, name in enumerate(names):
        numbers = "".join(f"{values[column][row]:10.4f}" for column in columns)
        lines.append(f"{name:{width}} {numbers}{values['support'][row]:10d}")
    lines.append("")
    lines.append(f"{'accuracy':{width}} {'':20}{np.trace(matrix) / total:10.4f}{total:10d}")
    for kind, weights in (("macro", np.ones(len(names))), ("weighted", values["support"])):
        numbers = "".join(f"{np.average(values[column], weights=weights):10.4f}" for column in columns)
        lines.append(f"{kind + ' average':{width}} {numbers}{total:10d}")
    return "\n".join(lines) + "\n"


def _metric_class() -> type:
    """Made on first use: importing ``evaluate`` takes seconds."""
    import datasets
    import evaluate

    class Classification(evaluate.Metric):
        """Accuracy and macro and weighted precision, recall and F1, from class numbers."""

        def _info(self) -> Any:
            return evaluate.MetricInfo(
                description=self.__doc__,
                citation="",
                features=datasets.Features(
                    {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
                ),
            )

        def _compute(self, predictions: Any, references: Any, num_labels: int) -> dict[str, float]:
            matrix = confusion_matrix(np.asarray(references), np.asarray(predictions), num_labels)
            values, support = per_class(matrix), matrix.sum(axis=1)
            result = {"accuracy": float(np.trace(matrix) / max(1, matrix.sum()))}
            for name in ("precision", "recall", "f1"):
                result[f"{name}_macro"] = float(values[name].mean())
                result[f"{name}_weighted"] = float(np.average(values[name], weights=support))
            return result

    return Classification
