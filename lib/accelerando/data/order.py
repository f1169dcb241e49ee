"""The order of samples in an epoch, and how the samples of an optimizer step are divided among processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

# A pool is sorted by length and cut into blocks; the blocks are shuffled, and so are the runs of similar lengths within
# a block. Neighbouring runs have similar lengths too, so that the batches of different processes take equally long.
POOL, BLOCK, RUN = 8192, 256, 32
# A longer order is made in parts of LARGE_PART rows, when they are reached: a permutation of a billion rows would take
# minutes and 8 GB before the first batch.
LARGE, LARGE_PART = 2**24, 2**19


class Order(Protocol):
    """The order of an epoch: an int64 array, or something that makes the parts of one as they are sliced."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> np.ndarray: ...


@dataclass
class LargeOrder:
    """An order that is made part by part: ``part(k)`` has the rows at the positions ``bounds[k]`` to ``bounds[k + 1]``.

    Any position is reached at once, so that a run resumes in the middle of an epoch as quickly as at its start.
    """

    bounds: np.ndarray  # int64 [parts + 1]
    part: Callable[[int], np.ndarray]
    _last: tuple[int, np.ndarray] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, positions: slice) -> np.ndarray:
        start, stop, _ = positions.indices(len(self))
        found = []
        while start < stop:
            number = int(np.searchsorted(self.bounds, start, side="right")) - 1
            begin, end = self.bounds[number : number + 2].tolist()
            found.append(self._part(number)[start - begin : stop - begin])
            start = min(stop, end)
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _part(self, number: int) -> np.ndarray:
        last = self._last  # which another thread may replace
        if last is None or last[0] != number:
            self._last = last = number, self.part(number)
        return last[1]


def permuted(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """What a permutation of ``range(size)``, chosen by ``key``, has at ``positions``, int64; only these are computed.

    A Feistel network over the next power of two, applied again where the result is not below ``size`` (cycle walking;
    Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    bits = max(2, (size - 1).bit_length())
    low_bits = bits // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (bits - low_bits)) - 1)
    keys = np.random.default_rng(key).integers(0, 2**64, 8, np.uint64)

    def once(values: np.ndarray) -> np.ndarray:
        low, high = values & low_mask, values >> np.uint64(low_bits)
        for number, own in enumerate(keys):
            if number % 2:
                low ^= _mixed(high + own) & low_mask
            else:
                high ^= _mixed(low + own) & high_mask
        return (high << np.uint64(low_bits)) | low

    values = once(np.asarray(positions).astype(np.uint64))
    while (outside := np.flatnonzero(values >= np.uint64(size))).size:
        values[outside] = once(values[outside])
    return values.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators")."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def epoch_order(num_samples: int, seed: int, epoch: int, lengths: np.ndarray | None = None) -> Order:
    """The order of samples in an epoch, int64 [num_samples]; depends only on (seed, epoch) and the data.

    With ``lengths`` [num_samples] (tokens, frames), samples of similar length follow each other in runs of 32, so that
    batches need little padding; which samples share a run changes every epoch.
    """
    lengths = None if lengths is None else np.asarray(lengths)
    if num_samples <= LARGE:
        rng = np.random.default_rng([seed, epoch])
        return _in_runs(rng.permutation(num_samples), rng, lengths)

    key = int(np.random.default_rng([seed, epoch, 6]).integers(2**63))
    bounds = np.append(np.arange(0, num_samples, LARGE_PART), num_samples)

    def part(number: int) -> np.ndarray:
        order = permuted(np.arange(bounds[number], bounds[number + 1]), num_samples, key)
        return _in_runs(order, np.random.default_rng([seed, epoch, 6, number]), lengths)

    return LargeOrder(bounds, part)


def _in_runs(order: np.ndarray, rng: np.random.Generator, lengths: np.ndarray | None) -> np.ndarray:
    """``order`` [n] with rows of similar ``lengths`` in runs."""
    num_samples = len(order)
    if lengths is None or num_samples <= RUN:
        return order
    # Without a little noise, a small set would form the same batches in every epoch.
    noisy = lengths[order].astype(np.float64) * rng.uniform(0.97, 1.03, num_samples)
    blocks: list[np.ndarray] = []
    leftover = order[:0]
    for start in range(0, num_samples, POOL):
        # Longest first: the samples after the last complete run are then short and need little padding.
        by_length = order[start : start + POOL][np.argsort(-noisy[start : start + POOL], kind="stable")]
        whole = len(by_length) - len(by_length) % RUN
        leftover = by_length[whole:] if whole < len(by_length) else leftover
        for block_start in range(0, whole, BLOCK):
            runs = by_length[block_start : min(block_start + BLOCK, whole)].reshape(-1, RUN)
            blocks.append(rng.permuted(runs[rng.permutation(len(runs))], axis=1).reshape(-1))
    shuffled = [blocks[index] for index in rng.permutation(len(blocks))]
    return np.concatenate([*shuffled, leftover])


def balanced_rows(classes: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """n rows, int64 [n], with every class equally often to within one.

    The rows of a small class are repeated in turn; a large class contributes different rows in each epoch.
    """
    rng = np.random.default_rng([seed, epoch, 1])
    order = rng.permutation(len(classes))
    members = [order[classes[order] == one] for one in rng.permutation(np.unique(classes))]
    turns = -(-len(classes) // len(members))
    return np.stack([np.resize(rows, turns) for rows in members], axis=1).reshape(-1)[: len(classes)]


def order_of_classes(
    classes: np.ndarray, balanced: bool, seed: int, epoch: int, lengths: np.ndarray | None = None
) -> Order:
    """The order of rows in an epoch, int64 [n]; ``balanced``: every class equally often; ``lengths``: as above."""
    if not balanced:
        return epoch_order(len(classes), seed, epoch, lengths)
    return order_of_rows(balanced_rows(classes, seed, epoch), seed, epoch, lengths)


def order_of_rows(rows: np.ndarray, seed: int, epoch: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """``rows`` [n] of n samples, some of them repeated, in the order of an epoch, with repeats numbered."""
    order = rows[epoch_order(len(rows), seed, epoch, None if lengths is None else np.asarray(lengths)[rows])[:]]
    return number_repeats(order, len(rows))


def poisson_rows(num_samples: int, rate: float, seed: int, epoch: int, position: int) -> np.ndarray:
    """The rows of the step at ``position`` of an epoch, int64 in random order: each of ``num_samples`` with probability
    ``rate``, so their number varies and may be 0. Steps are drawn independently, even if their size changes during an
    epoch.
    """
    rng = np.random.default_rng([seed, epoch, position, 2])
    return rng.permutation(np.flatnonzero(rng.random(num_samples) < rate))


def number_repeats(order: np.ndarray, num_samples: int) -> np.ndarray:
    """``order``, int64, with ``num_samples`` added to the second occurrence of a row, twice that to the third, ..."""
    by_row = np.argsort(order, kind="stable")
    sorted_rows = order[by_row]
    first = np.searchsorted(sorted_rows, sorted_rows)
    numbered = np.empty_like(order)
    numbered[by_row] = sorted_rows + num_samples * (np.arange(len(order)) - first)
    return numbered


@dataclass(frozen=True)
class Share:
    """One process's part of a step: ``micro_batches`` of row numbers and, in ``counts``, whether each contributes."""

    micro_batches: list[np.ndarray]
    counts: list[bool]


def deal(window: np.ndarray, batch_size: int, num_processes: int, process_index: int) -> Share:
    """This process's share of the rows of an optimizer step, ``window`` [n].

    All processes get the same number of micro-batches, of at most ``batch_size`` rows and equal in size to within one.
    A process without rows for a micro-batch gets a repeated row that does not count (row 0 if the window is empty), so
    that all processes take part in collectives.
    """
    steps = max(1, -(-len(window) // (batch_size * num_processes)))
    parts = np.array_split(window, steps * num_processes)
    mine = [parts[step * num_processes + process_index] for step in range(steps)]
    filler = window[:1] if len(window) else np.zeros(1, np.int64)
    return Share([part if len(part) else filler for part in mine], [len(part) > 0 for part in mine])


def deal_groups(
    window: np.ndarray, groups: np.ndarray, batch_size: int, num_processes: int, process_index: int
) -> Share:
    """Like :func:`deal`, with micro-batches of one group each; ``groups`` [n]: the group of each row of ``window``."""
    shares = [
        deal(window[groups == group], batch_size, num_processes, process_index)
        for group in dict.fromkeys(groups.tolist())  # in the order in which they occur
    ]
    return Share(
        [rows for share in shares for rows in share.micro_batches], [one for share in shares for one in share.counts]
    )
