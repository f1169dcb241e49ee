"""The order of samples, and how an optimizer step's samples are dealt to processes and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A pool is sorted by length and cut into blocks; blocks are shuffled, and so are the runs of like lengths inside one.
# Neighbouring runs are of a like length too, so that two processes get batches that take equally long.
POOL, BLOCK, RUN = 8192, 256, 32


def epoch_order(num_samples: int, seed: int, epoch: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """The order of one epoch, int64 [num_samples]: a function of (seed, epoch) and the data alone.

    With ``lengths`` [num_samples] (tokens, frames) samples of a like length stand together, in runs of 32, so that a
    batch needs little padding; which samples share a run changes every epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(num_samples)
    if lengths is None or num_samples <= RUN:
        return order
    # A little noise keeps a small set from forming the same batches in every epoch.
    noisy = np.asarray(lengths, dtype=np.float64)[order] * rng.uniform(0.97, 1.03, num_samples)
    blocks: list[np.ndarray] = []
    leftover = order[:0]
    for start in range(0, num_samples, POOL):
        # Longest first: what is left over after the last whole run is then short, and costs little padding.
        by_length = order[start : start + POOL][np.argsort(-noisy[start : start + POOL], kind="stable")]
        whole = len(by_length) - len(by_length) % RUN
        leftover = by_length[whole:] if whole < len(by_length) else leftover
        for block_start in range(0, whole, BLOCK):
            runs = by_length[block_start : min(block_start + BLOCK, whole)].reshape(-1, RUN)
            blocks.append(rng.permuted(runs[rng.permutation(len(runs))], axis=1).reshape(-1))
    shuffled = [blocks[index] for index in rng.permutation(len(blocks))]
    return np.concatenate([*shuffled, leftover])


def balanced_rows(classes: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """As many rows as there are, int64 [n], with every class equally often to within one.

    A class with few rows repeats them, in turn; of one with many, each epoch takes others.
    """
    rng = np.random.default_rng([seed, epoch, 1])
    order = rng.permutation(len(classes))
    members = [order[classes[order] == one] for one in rng.permutation(np.unique(classes))]
    turns = -(-len(classes) // len(members))
    return np.stack([np.resize(rows, turns) for rows in members], axis=1).reshape(-1)[: len(classes)]


def poisson_rows(num_samples: int, rate: float, seed: int, epoch: int, position: int) -> np.ndarray:
    """The rows of the step at ``position`` of an epoch, int64 in random order: each of ``num_samples`` with probability
    ``rate``, so their number varies and may be 0. No two steps share a draw, also if their size changes amid an epoch.
    """
    rng = np.random.default_rng([seed, epoch, position, 2])
    return rng.permutation(np.flatnonzero(rng.random(num_samples) < rate))


def number_repeats(order: np.ndarray, num_samples: int) -> np.ndarray:
    """``order`` with ``num_samples`` added to a row's second place in it, twice that to its third, and so on: int64."""
    by_row = np.argsort(order, kind="stable")
    sorted_rows = order[by_row]
    first = np.searchsorted(sorted_rows, sorted_rows)
    numbered = np.empty_like(order)
    numbered[by_row] = sorted_rows + num_samples * (np.arange(len(order)) - first)
    return numbered


@dataclass(frozen=True)
class Share:
    """One process's part of a window: ``micro_batches`` of row numbers and, for each, whether its rows count."""

    micro_batches: list[np.ndarray]
    counts: list[bool]


def deal(window: np.ndarray, batch_size: int, num_processes: int, process_index: int) -> Share:
    """Deals the row numbers of one optimizer step, ``window`` [n], to this process.

    All processes get the same number of micro-batches, each at most ``batch_size`` rows and of equal size to within
    one. Where there are fewer rows than places, a process repeats a row that does not count, so that collectives stay
    in step (row 0 in an empty window).
    """
    steps = max(1, -(-len(window) // (batch_size * num_processes)))
    parts = np.array_split(window, steps * num_processes)
    mine = [parts[step * num_processes + process_index] for step in range(steps)]
    filler = window[:1] if len(window) else np.zeros(1, np.int64)
    return Share([part if len(part) else filler for part in mine], [len(part) > 0 for part in mine])
