"""Several data sets as one, of which each epoch draws a share: rows of one part follow each other in blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from accelerando.data.digest import digest_of
from accelerando.data.order import epoch_order, number_repeats

Sampling = Literal["proportional", "uniform", "temperature"]


@dataclass
class Mixture:
    """Data sets by name as training data of n rows in all, those of one after those of the other.

    An epoch has n rows in any case; ``sampling`` says how many come from which part. proportional: every row once.
    temperature: a part of m rows has a share in proportion to m^(1/T), T being ``temperature``; uniform: all parts have
    the same. Of a part with too few rows all are drawn in turn, of one with too many another choice in each epoch.

    Up to ``block`` rows of a part follow each other, then come those of another one, in an order that depends on the
    seed and the epoch alone; what is left of each part after its last whole block comes at the end of the epoch.
    Samples are dicts, to which ``part`` is added, the number of the part. ``lengths``: as for
    :class:`train.batches.Rows`, [m] of each part.
    """

    parts: Mapping[str, Sequence[Any]]
    lengths: Mapping[str, np.ndarray] | None = None
    sampling: Sampling = "proportional"
    temperature: float = 2.0
    block: int = 32
    unit: ClassVar[str] = "rows"
    offsets: np.ndarray = field(init=False)  # where each part begins, and the end: int64 [parts + 1]

    def __post_init__(self) -> None:
        self.offsets = np.cumsum([0, *map(len, self.parts.values())])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def counts(self) -> np.ndarray:
        """The rows that an epoch draws from each part, int64 [parts]; their sum is the number of all rows."""
        sizes = np.diff(self.offsets)
        if self.sampling == "proportional":
            return sizes
        power = 0.0 if self.sampling == "uniform" else 1 / self.temperature
        wanted = len(self) * sizes**power / (sizes**power).sum()
        counts = np.floor(wanted).astype(np.int64)
        most_left = np.argsort(counts - wanted, kind="stable")[: len(self) - counts.sum()]
        counts[most_left] += 1
        return counts

    def part_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of the part of each of ``rows``, int64 [r]."""
        return np.searchsorted(self.offsets, rows % len(self), side="right") - 1

    def at(self, row: int, epoch: int, draw: int = 0) -> dict[str, Any]:
        """The sample ``row``, with the number of its part."""
        return self[row]

    def __getitem__(self, row: int) -> dict[str, Any]:
        part, own = self._place(row)
        return {**self._samples(part)[own], "part": part}

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """The rows of an epoch, int64 [n], repeats numbered: see :func:`data.order.number_repeats`."""
        blocks, rest = [], []
        for part, count in enumerate(self.counts().tolist()):
            order = self._order_of(part, count, seed, epoch) + self.offsets[part]
            whole = count - count % self.block
            blocks.append(order[:whole].reshape(-1, self.block))
            rest.append(order[whole:])
        turns = np.repeat(np.arange(len(blocks)), [len(part) for part in blocks])
        turns = np.random.default_rng([seed, epoch, 4]).permutation(turns)
        mixed = np.empty((len(turns), self.block), np.int64)
        for part, own in enumerate(blocks):
            mixed[turns == part] = own
        return number_repeats(np.concatenate([mixed.reshape(-1), *rest]), len(self))

    def prefetch(self, parts: Iterable[np.ndarray]) -> None:
        """Does nothing: the samples are local."""

    def problem(self, row: int) -> str:
        """The part and the row in it."""
        part, own = self._place(row)
        return f"row {own} of {[*self.parts][part]}"

    def digest(self) -> dict[str, str]:
        """See :class:`data.digest.Digested`: those of all parts."""
        return {
            f"{what} of {name}": text for name, part in self.parts.items() for what, text in digest_of(part).items()
        }

    def _order_of(self, part: int, count: int, seed: int, epoch: int) -> np.ndarray:
        """``count`` rows of a part in the order of an epoch, int64 [count]."""
        size, lengths = len(self._samples(part)), None
        if self.lengths is not None:
            lengths = np.asarray(self.lengths[[*self.parts][part]])
        if count == size:
            return epoch_order(size, seed + part, epoch, lengths)[:]
        chosen = np.resize(np.random.default_rng([seed + part, epoch, 5]).permutation(size), count)
        return chosen[epoch_order(count, seed + part, epoch, None if lengths is None else lengths[chosen])[:]]

    def _samples(self, part: int) -> Sequence[Any]:
        return self.parts[[*self.parts][part]]

    def _place(self, row: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return part, int(row - self.offsets[part])
