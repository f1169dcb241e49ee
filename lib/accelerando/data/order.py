"""The order of samples in an epoch, and how the samples of an optimizer step are divided among processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A pool is sorted by length and cut into blocks; the blocks are shuffled, and so are the runs of similar lengths within
# a block. Neighbouring runs have similar lengths too, so that the batches of different processes take equally long.
POOL, BLOCK, RUN = 8192, 256, 32


def epoch_order(num_samples: int, seed: int, epoch: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """The order of samples in an epoch, int64 [num_samples]; depends only on (seed, epoch) and the data.

    With ``lengths`` [num_samples] (tokens, frames), samples of similar length follow each other in runs of 32, so that
    batches need little padding; which samples share a run changes every epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(num_samples)
    if lengths is None or num_samples <= RUN:
        return order
    # Without a little noise, a small set would form the same batches in every epoch.
    noisy = np.asarray(lengths, dtype=np.float64)[order] * rng.uniform(0.97, 1.03, num_samples)
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
) -> np.ndarray:
    """The order of rows in an epoch, int64 [n]; ``balanced``: every class equally often; ``lengths``: as above."""
    if not balanced:
        return epoch_order(len(classes), seed, epoch, lengths)
    return order_of_rows(balanced_rows(classes, seed, epoch), seed, epoch, lengths)


def order_of_rows(rows: np.ndarray, seed: int, epoch: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """``rows`` [n] of n samples, some of them repeated, in the order of an epoch, with repeats numbered."""
    order = rows[epoch_order(len(rows), seed, epoch, None if lengths is None else np.asarray(lengths)[rows])]
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
