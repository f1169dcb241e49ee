"""Two models on the same samples: how far apart they are, and how sure that is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

DRAWS = 10_000  # of the bootstrap
COVERED = 0.95  # of which the interval covers this share


@dataclass(frozen=True)
class Comparison:
    """The ``difference`` of the shares of right answers, second minus first, with the interval ``low`` to ``high``.

    ``only_first`` and ``only_second``: on how many of ``count`` samples the one is right and the other is wrong.
    """

    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    count: int

    def as_json(self) -> dict[str, Any]:
        """Its entries for results.json."""
        return asdict(self)


def compare(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Comparison:
    """Compares which of n samples two models get right, bool [n] each, with a paired bootstrap (Efron 1979).

    A resampling draws n samples with what both models made of each. The difference depends only on how many of them
    have which of three outcomes (only the first is right, only the second, neither or both), so their numbers are drawn
    from a multinomial distribution: the same as drawing the samples, for a millionth of the work.
    """
    count = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    shares = np.array([only_first, only_second, count - only_first - only_second]) / max(1, count)
    drawn = np.random.default_rng(seed).multinomial(count, shares, DRAWS)
    differences = (drawn[:, 1] - drawn[:, 0]) / max(1, count)
    low, high = np.quantile(differences, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return Comparison(
        (only_second - only_first) / max(1, count), float(low), float(high), only_first, only_second, count
    )
