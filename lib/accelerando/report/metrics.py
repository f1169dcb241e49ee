"""Metrics of classification and retrieval, computed without network access."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from accelerando.base.texts import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    import evaluate

    from accelerando.train.losses import LossName


def classification_metrics(labels: np.ndarray, logits: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """``loss``, ``accuracy`` and precision, recall, F1, each ``_macro`` and ``_weighted``.

    ``labels`` int [n], ``logits`` float [n, C], ``losses`` float [n]. Macro means are over the C classes of the model;
    a class without samples or predictions counts as 0.
    """
    matrix = confusion_matrix(labels, logits.argmax(axis=1), logits.shape[1])
    return {"loss": float(losses.astype(np.float64).mean()), **matrix_metrics(matrix)}


def matrix_metrics(matrix: np.ndarray) -> dict[str, float]:
    """:func:`classification_metrics` without the loss, from a confusion matrix [C, C]."""
    values, support = per_class(matrix), matrix.sum(axis=1)
    result = {"accuracy": float(np.trace(matrix) / max(1, matrix.sum()))}
    for name in ("precision", "recall", "f1"):
        result[f"{name}_macro"] = float(values[name].mean())
        result[f"{name}_weighted"] = float(np.average(values[name], weights=support))
    return result


def top_k_accuracy(labels: np.ndarray, logits: np.ndarray, k: int) -> float:
    """The fraction of rows whose label [n] is among the ``k`` largest logits [n, C]; ties count as errors."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    return float(((~(logits < own)).sum(axis=1) <= k).mean())


def nearest_neighbours_accuracy(
    known: np.ndarray, classes: np.ndarray, asked: np.ndarray, labels: np.ndarray, k: int
) -> float:
    """The fraction of rows of ``asked`` [m, d] whose ``labels`` [m] is the class with the most votes among the ``k``
    rows of ``known`` [n, d], of ``classes`` [n], with the largest cosine similarity, each vote weighted by it."""
    known, asked = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (known, asked))
    k, right = min(k, len(known)), 0
    for start in range(0, len(asked), 1024):
        similar = asked[start : start + 1024] @ known.T
        nearest = np.argpartition(-similar, k - 1, axis=1)[:, :k]
        votes = np.zeros((len(similar), int(classes.max()) + 1))
        np.add.at(votes, (np.arange(len(similar))[:, None], classes[nearest]), np.take_along_axis(similar, nearest, 1))
        right += int((votes.argmax(1) == labels[start : start + 1024]).sum())
    return right / max(1, len(asked))


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
    """scikit-learn's classification report from a confusion matrix, without truncated names."""
    values = per_class(matrix)
    total = max(1, int(matrix.sum()))
    names = [one_line(name) for name in names]
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


def retrieval_metrics(
    image: np.ndarray, text: np.ndarray, image_of: np.ndarray, text_of: np.ndarray, at: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k in both directions and the median rank, over a gallery of images [I, d] and captions [T, d].

    Pair n says that image ``image_of[n]`` and caption ``text_of[n]`` belong together; each may be in several pairs.
    The rank of an image is that of its best matching caption among all captions, and vice versa; ties count against
    it. ``recall_mean`` is the mean of all recalls.
    """
    ranks = {
        "image_to_text": right_ranks(image, text, image_of, text_of),
        "text_to_image": right_ranks(text, image, text_of, image_of),
    }
    values = {f"{way}_r{k}": float((rank <= k).mean()) for way, rank in ranks.items() for k in at}
    values["recall_mean"] = float(np.mean(list(values.values())))
    return {**values, **{f"{way}_median_rank": float(np.median(rank)) for way, rank in ranks.items()}}


def contrastive_metrics(
    image: np.ndarray,
    text: np.ndarray,
    image_of: np.ndarray,
    text_of: np.ndarray,
    scale: float,
    bias: float | None,
    loss: LossName,
    mask_duplicates: bool,
    batch_size: int,
) -> dict[str, float]:
    """``loss``: the mean contrastive loss of the pairs in batches of ``batch_size``.

    A contrastive loss depends on the size and the content of the batch, so both are fixed: a seeded order, and only
    full batches (or a single smaller one if there are too few pairs).
    """
    import torch

    from accelerando.train.losses import Pairs, contrastive_loss

    order = np.random.default_rng(0).permutation(len(image_of))
    size = min(batch_size, len(order))
    total = 0.0
    for start in range(0, len(order) - size + 1, size):
        rows = order[start : start + size]
        columns = (image[image_of[rows]], text[text_of[rows]], image_of[rows], text_of[rows], np.ones(size, np.float32))
        pairs = Pairs(*map(torch.from_numpy, columns))
        factor = torch.tensor(scale, dtype=pairs.image.dtype)
        total += float(contrastive_loss(pairs, pairs, 0, factor, bias, loss, mask_duplicates))
    return {"loss": total / (len(order) // size * size)}


def zero_shot_metrics(
    image: np.ndarray, prompts: np.ndarray, classes: np.ndarray, valid: np.ndarray
) -> dict[str, float]:
    """Top-1 and top-5 accuracy of images [I, d] for class embeddings [C, d]; ``classes`` [I], -1: ignored."""
    counted = valid & (classes >= 0)
    scores = image[counted] @ prompts.T
    right = np.take_along_axis(scores, classes[counted, None], axis=1)
    rank = (~(scores < right)).sum(axis=1)  # nan counts against it
    values = {"zero_shot_accuracy": float((rank <= 1).mean())}
    return values | ({"zero_shot_top5": float((rank <= 5).mean())} if len(prompts) > 5 else {})


def right_ranks(queries: np.ndarray, gallery: np.ndarray, query_of: np.ndarray, item_of: np.ndarray) -> np.ndarray:
    """The rank of the best correct item for each query, int64 [q], from 1; computed for 1,024 queries at a time.

    ``queries`` [q, d] and ``gallery`` [g, d] are compared by dot product; pair n says that item ``item_of[n]`` is
    correct for query ``query_of[n]``.
    """
    order = np.argsort(query_of, kind="stable")
    query_of, item_of = query_of[order], item_of[order]
    ranks = np.zeros(len(queries), np.int64)
    for start in range(0, len(queries), 1024):
        scores = queries[start : start + 1024] @ gallery.T
        first, last = np.searchsorted(query_of, [start, start + len(scores)])
        right = np.zeros(scores.shape, bool)
        right[query_of[first:last] - start, item_of[first:last]] = True
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        ranks[start : start + len(scores)] = 1 + (~(scores < best) & ~right).sum(axis=1)  # nan counts against it
    return ranks


def _evaluate_package() -> ModuleType:
    """Hugging Face's ``evaluate``, even if the running script's folder has a file of that name (tools/evaluate.py)."""
    import sys
    from pathlib import Path

    kept = sys.path[:]
    sys.path[:] = [place for place in kept if not (Path(place) / "evaluate.py").is_file()]
    try:
        import evaluate
    finally:
        sys.path[:] = kept
    return evaluate


def evaluate_metric() -> evaluate.Metric:
    """The same metrics as a Hugging Face ``evaluate.Metric``, without network access; importing it takes seconds.

    ``compute(predictions=..., references=..., num_labels=C)`` with class numbers.
    """
    import datasets

    evaluate = _evaluate_package()

    class Classification(evaluate.Metric):
        """Accuracy and macro and weighted precision, recall and F1, from class numbers."""

        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=self.__doc__,
                citation="",
                features=datasets.Features(
                    {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
                ),
            )

        def _compute(self, predictions: Sequence[int], references: Sequence[int], num_labels: int) -> dict[str, float]:
            return matrix_metrics(confusion_matrix(np.asarray(references), np.asarray(predictions), num_labels))

    return Classification(keep_in_memory=True)
