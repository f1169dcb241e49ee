"""What a training sample is mixed with (MixUp, CutMix), and mixed rows of text.

Partner and share are drawn for each sample and epoch, and the partner from the whole set: they are the same on any
number of processes, with any number of reading processes, and after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from accelerando.data.digest import digest_of

OTHER = "other_"  # stands before the names of what belongs to the second sample


def sample_key(seed: int, epoch: int, row: int, draw: int = 0) -> tuple[int, ...]:
    """What the random numbers of a sample depend on; ``draw`` counts its earlier occurrences in the epoch."""
    return (seed, epoch, row, *([3, draw] if draw else []))


def draw_partner(key: Sequence[int], total: int) -> tuple[int, np.random.Generator]:
    """The row, of ``total``, that the sample with this :func:`sample_key` is mixed with, and the generator from which
    its share is drawn."""
    rng = np.random.default_rng([*key, 1])
    return int(rng.integers(total)), rng


def draw_share(alpha: float, rng: np.random.Generator) -> float:
    """The share of the first of two samples, from Beta(alpha, alpha)."""
    return float(rng.beta(alpha, alpha))


@dataclass
class MixedRows:
    """Rows of text, each with another one to be mixed with; a data set that takes the epoch.

    A sample has what ``samples`` gives (:class:`data.tokens.TokenTable`), the same of the other row under names with
    ``other_`` before them, and ``share``, the weight of the first, from Beta(alpha, alpha) (MixUp, Zhang et al. 2017,
    arXiv:1710.09412). :func:`models.mixing.mix_texts` makes a model mix
    their embeddings.
    """

    samples: Sequence[Any]
    alpha: float
    seed: int = 0
    unit: ClassVar[str] = "rows"

    def __len__(self) -> int:
        return len(self.samples)

    def at(self, row: int, epoch: int, draw: int = 0) -> dict[str, Any]:
        """The sample ``row`` and what it is mixed with in ``epoch``."""
        other, rng = draw_partner(sample_key(self.seed, epoch, row, draw), len(self))
        one, two = self._sample(row, epoch, draw), self._sample(other, epoch, draw)
        return one | {f"{OTHER}{name}": value for name, value in two.items()} | {"share": draw_share(self.alpha, rng)}

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The sample ``row``, not mixed."""
        return self.samples[row]

    def digest(self) -> dict[str, str]:
        """See :class:`data.digest.Digested`: that of the rows."""
        return digest_of(self.samples)

    def _sample(self, row: int, epoch: int, draw: int) -> dict[str, Any]:
        return self.samples.at(row, epoch, draw) if hasattr(self.samples, "at") else self.samples[row]
