"""Whether probabilities mean what they say: reliability, temperature scaling, and what rejecting unsure answers brings.

Sources: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599 (expected calibration error,
temperature scaling); Brier 1950; Geifman and El-Yaniv 2017, "Selective Classification for Deep Neural Networks",
arXiv:1705.08500 (risk and coverage).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15  # of confidence, as in Guo et al.
COLDEST, HOTTEST = 0.05, 20.0  # temperatures among which the best is sought
FEWEST = 20  # rows without which no temperature is fitted
COVERED = (1.0, 0.9, 0.8, 0.7, 0.5)  # shares of the rows that are answered, in the table


@dataclass(frozen=True)
class Reliability:
    """Rows by confidence, the probability of the predicted class: of each bin that has any, its mean confidence
    [b], the share of right answers [b], and its number of rows [b]."""

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance of accuracy from confidence, weighted by rows."""
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.count))


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities [n, C] in float64 of ``logits`` [n, C] divided by ``temperature``."""
    scaled = logits.astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> Reliability:
    """Bins of equal width over 0 to 1; ``labels`` int [n], ``probabilities`` [n, C]."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    kept = count > 0
    means = (np.bincount(place, weights, bins)[kept] / count[kept] for weights in (confidence, right))
    return Reliability(*means, count[kept])


def brier(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The mean over rows of the squared distances of all C probabilities from the truth: 0 to 2."""
    truth = np.eye(probabilities.shape[1])[labels]
    return float(((probabilities - truth) ** 2).sum(axis=1).mean())


def best_temperature(labels: np.ndarray, logits: np.ndarray) -> float | None:
    """The temperature that makes the labels [n] most probable given ``logits`` [n, C]; None of fewer than 20 rows.

    Above 1, the model was too sure of itself. Dividing by it changes no prediction. Where all answers are right (or the
    optimum lies at a limit for another reason) the data does not bound it: None.
    """
    from scipy.optimize import minimize_scalar

    if len(labels) < FEWEST:
        return None
    own = np.arange(len(labels)), labels

    def loss(log_temperature: float) -> float:
        scaled = logits.astype(np.float64) / np.exp(log_temperature)
        top = scaled.max(axis=1)
        total = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        return float((total - scaled[own]).mean())

    limits = np.log(COLDEST), np.log(HOTTEST)
    found = float(minimize_scalar(loss, bounds=limits, method="bounded", options={"xatol": 1e-6}).x)
    inside = limits[0] + 0.01 < found < limits[1] - 0.01
    return float(np.exp(found)) if inside else None


def risk_coverage(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(coverage, risk), float [n] each: the share of wrong answers among the most confident rows.

    Rows of equal confidence are answered together, so that their order does not matter.
    """
    confidence = probabilities.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    wrong = (probabilities.argmax(axis=1) != labels)[order]
    risk = np.cumsum(wrong) / np.arange(1, len(labels) + 1)
    # The last row of each group of equal confidence stands for all of it.
    last = np.searchsorted(-confidence[order], -confidence[order], side="right") - 1
    return np.arange(1, len(labels) + 1) / len(labels), risk[last]


def error_of_answered(labels: np.ndarray, probabilities: np.ndarray) -> dict[float, float]:
    """The share of wrong answers when only the most confident share of the rows is answered; see ``COVERED``."""
    coverage, risk = risk_coverage(labels, probabilities)
    return {share: float(risk[np.searchsorted(coverage, share - 1e-9)]) for share in COVERED}


def calibration_metrics(labels: np.ndarray, logits: np.ndarray, temperature: float | None = None) -> dict[str, float]:
    """``ece``, ``brier`` and ``nll``, and with a temperature the same with ``_calibrated``."""
    found = {}
    for suffix, divisor in (("", 1.0), ("_calibrated", temperature)):
        if divisor is None:
            continue
        probabilities = softmax(logits, divisor)
        likely = np.maximum(probabilities[np.arange(len(labels)), labels], 1e-300)
        found[f"ece{suffix}"] = reliability(labels, probabilities).error
        found[f"brier{suffix}"] = brier(labels, probabilities)
        found[f"nll{suffix}"] = float(-np.log(likely).mean())
    return found
