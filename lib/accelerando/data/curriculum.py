"""Easy samples first: a growing share of the training set, ordered by difficulty (Bengio et al. 2009)."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accelerando.base.errors import UserError
from accelerando.data.tokens import TokenTable


@dataclass(frozen=True)
class Curriculum:
    """``difficulty`` float [n] of each sample; the easiest ``initial`` share of them in the first epoch, the easiest
    ``final`` share from epoch ``epochs`` on, and linearly more in between."""

    difficulty: np.ndarray
    initial: float
    final: float
    epochs: int

    def share(self, epoch: int) -> float:
        """The share of the samples that ``epoch`` draws from; epochs count from 0."""
        progress = min(1.0, epoch / max(1, self.epochs - 1))
        return self.initial + progress * (self.final - self.initial)

    def rows(self, seed: int, epoch: int) -> np.ndarray:
        """n rows, int64 [n], of the easiest samples, each equally often to within one: epochs keep their length."""
        total = len(self.difficulty)
        count = max(1, math.ceil(self.share(epoch) * total))
        easiest = np.argsort(self.difficulty, kind="stable")[:count]
        return np.resize(np.random.default_rng([seed, epoch, 3]).permutation(easiest), total)


def rarity(table: TokenTable) -> np.ndarray:
    """The mean of -log p(token) over the tokens of each text, float64 [n]: high for texts of rare words.

    p is the token's frequency in ``table`` (Platanios et al. 2019, arXiv:1903.09848, who take the sum, which is above
    all a length).
    """
    ids = np.asarray(table.ids)
    counts = np.bincount(ids)
    surprise = -np.log(counts / counts.sum(), where=counts > 0, out=np.zeros(len(counts)))
    sums = np.add.reduceat(surprise[ids], table.offsets[:-1]) if len(ids) else np.zeros(len(table))
    return sums / np.maximum(table.lengths, 1)


def losses_of_predictions(path: str, labels: Sequence[str]) -> np.ndarray:
    """The loss of each row in the predictions.csv that tools/evaluate.py writes, -log of its label's probability, [n].

    ``labels``: the labels of the training rows, in order.

    Raises:
        UserError: it is not such a file, or has other rows.
    """
    how = "; tools/evaluate.py RUN --split train --output_dir DIR writes one for the training rows of a run"
    if not Path(path).is_file():
        raise UserError(f"--curriculum {path}: length, rarity, or a predictions.csv{how}")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "label" not in rows[0]:
        raise UserError(f"{path}: no column 'label'{how}")
    if len(rows) != len(labels):
        raise UserError(f"{path} has {len(rows):,} rows, but {len(labels):,} are trained on{how}")
    losses = np.zeros(len(rows))
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        if row["label"] != label:
            raise UserError(
                f"{path}, row {number + 1}: the label is {row['label']!r}, but that row's is {label!r}{how}"
            )
        try:
            losses[number] = -math.log(max(float(row[f"p_{label}"]), 1e-7))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}, row {number + 1}: no probability p_{label}{how}") from None
    return losses
