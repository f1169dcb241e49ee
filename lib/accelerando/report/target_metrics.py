"""Metrics of several labels a row and of numbers, from scikit-learn and SciPy, and thresholds for labels."""

from __future__ import annotations

import warnings

import numpy as np


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """The probability of each label by itself, float64 of the shape of ``logits``; nan counts as 0."""
    finite = np.nan_to_num(logits.astype(np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    return np.exp(-np.logaddexp(0, -finite))


def chosen_labels(logits: np.ndarray, thresholds: np.ndarray | None = None) -> np.ndarray:
    """Which labels a row is said to have, bool [n, C]: those whose probability reaches the label's threshold.

    ``logits`` [n, C], ``thresholds`` [C], by default 0.5 each.
    """
    return sigmoid(logits) >= (0.5 if thresholds is None else thresholds)


def multi_label_metrics(labels: np.ndarray, logits: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """``loss``, F1, precision and recall (each ``_macro`` and ``_micro``), ``mAP`` and ``subset_accuracy``.

    ``labels`` [n, C] are 0 or 1, ``logits`` [n, C], ``losses`` [n]. A label counts where its probability is at least
    0.5. Macro means are over the C labels; one without rows or predictions counts as 0. ``mAP``: the mean average
    precision of the labels that some row has. ``subset_accuracy``: the share of rows with exactly their labels.
    """
    precisions = average_precisions(labels, logits)
    there = ~np.isnan(precisions)
    return {
        "loss": float(losses.astype(np.float64).mean()),
        **_f1(labels, chosen_labels(logits)),
        "mAP": float(precisions[there].mean()) if there.any() else 0.0,
        "subset_accuracy": float(exactly_right(labels, chosen_labels(logits)).mean()),
    }


def tuned_metrics(labels: np.ndarray, logits: np.ndarray, thresholds: np.ndarray | None) -> dict[str, float]:
    """What thresholds [C] make of F1 and ``subset_accuracy``, under names with ``_tuned``; empty without thresholds."""
    if thresholds is None:
        return {}
    chosen = chosen_labels(logits, thresholds)
    found = {name: value for name, value in _f1(labels, chosen).items() if name.startswith("f1")}
    found["subset_accuracy"] = float(exactly_right(labels, chosen).mean())
    return {f"{name}_tuned": value for name, value in found.items()}


def _f1(labels: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 with their means over labels (macro) and over all pairs of row and label (micro)."""
    macro, micro = _prf(labels, chosen).mean(axis=1), _prf(labels.reshape(-1, 1), chosen.reshape(-1, 1))[:, 0]
    return {
        f"{name}_{kind}": float(values[place])
        for kind, values in (("macro", macro), ("micro", micro))
        for place, name in enumerate(("precision", "recall", "f1"))
    }


def _prf(labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Precision, recall and F1 of each label, float64 [3, C]."""
    from sklearn.metrics import precision_recall_fscore_support

    only = {}
    if labels.shape[1] == 1:  # scikit-learn takes a single column for two classes
        labels, chosen, only = labels.reshape(-1), chosen.reshape(-1), {"labels": [True]}
    return np.array(precision_recall_fscore_support(labels > 0, chosen, average=None, zero_division=0, **only)[:3])


def exactly_right(labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Which rows have exactly the labels that were chosen, bool [n]."""
    return ((labels > 0) == chosen).all(axis=1)


def average_precisions(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The average precision of each label, float64 [C]; nan: no row has the label."""
    from sklearn.metrics import average_precision_score

    scores, true = sigmoid(logits), labels > 0
    pairs = zip(true.T, scores.T, strict=True)
    return np.array([average_precision_score(own, score) if own.any() else np.nan for own, score in pairs])


def per_label(labels: np.ndarray, logits: np.ndarray, thresholds: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Of each label [C] its ``precision``, ``recall``, ``f1``, ``average_precision`` (nan without rows), ``threshold``
    and ``support``."""
    precision, recall, f1 = _prf(labels, chosen_labels(logits, thresholds))
    return {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "average_precision": average_precisions(labels, logits),
        "threshold": np.full(labels.shape[1], 0.5) if thresholds is None else np.asarray(thresholds, np.float64),
        "support": (labels > 0).sum(axis=0),
    }


def best_thresholds(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """For each label the threshold of its probability with the highest F1 on these rows, float64 [C].

    ``labels`` [n, C] are 0 or 1, ``logits`` [n, C]. A threshold lies midway between two rows' probabilities. Where 0.5
    is as good, and where no row has the label, it is 0.5.
    """
    from sklearn.metrics import f1_score, precision_recall_curve

    scores, found = sigmoid(logits), np.full(labels.shape[1], 0.5)
    for label, (own, score) in enumerate(zip(labels.T > 0, scores.T, strict=True)):
        if not own.any():
            continue
        precision, recall, cuts = precision_recall_curve(own, score)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
        place = int(f1[:-1].argmax())  # the last point has no threshold
        if f1[place] > f1_score(own, score >= 0.5, zero_division=0) + 1e-12:
            below = score[score < cuts[place]]
            found[label] = (cuts[place] + below.max()) / 2 if len(below) else cuts[place] / 2
    return found


def regression_metrics(labels: np.ndarray, logits: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """``loss``, ``mse``, ``mae``, ``pearson`` and ``spearman``; of several numbers a row, the means over them.

    ``labels`` and ``logits`` float [n, C], ``losses`` [n]. A correlation with numbers that are all equal is 0; all are
    nan if an output is not finite.
    """
    from sklearn.metrics import mean_absolute_error, mean_squared_error

    loss = float(losses.astype(np.float64).mean())
    labels, found = labels.astype(np.float64), logits.astype(np.float64)
    if not np.isfinite(found).all():
        return {"loss": loss, **dict.fromkeys(("mse", "mae", "pearson", "spearman"), float("nan"))}
    pairs = list(zip(labels.T, found.T, strict=True))
    return {
        "loss": loss,
        "mse": float(mean_squared_error(labels, found)),
        "mae": float(mean_absolute_error(labels, found)),
        "pearson": float(np.mean([correlation(*pair) for pair in pairs])),
        "spearman": float(np.mean([correlation(*pair, ranks=True) for pair in pairs])),
    }


def correlation(first: np.ndarray, second: np.ndarray, ranks: bool = False) -> float:
    """Pearson's correlation of two rows of numbers [n], or Spearman's, of their ranks; 0 where one is constant."""
    from scipy.stats import pearsonr, spearmanr

    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    with warnings.catch_warnings():  # numbers that are nearly equal
        warnings.simplefilter("ignore")
        value = float((spearmanr if ranks else pearsonr)(first, second).statistic)
    return value if np.isfinite(value) else 0.0
