"""Stratified splits into training, validation and test sets or folds; groups are never divided."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from accelerando.base.errors import UserError


def deal_groups(
    classes: np.ndarray,
    group: np.ndarray,
    shares: np.ndarray,
    rng: np.random.Generator,
    covered: np.ndarray,
    filled_first: bool = False,
) -> np.ndarray:
    """The side (split or fold) of each group, int [groups], so that the fractions of classes and of samples are as
    close to ``shares`` as possible: a greedy assignment, then local search.

    Args:
        classes: class number of each sample, int [n].
        group: group of each sample, int [n], numbered from 0 without gaps.
        shares: fraction of the samples for each side, float [sides]; a side with fraction 0 gets none.
        covered: bool [sides, classes]: whether the class should have samples on the side.
        filled_first: avoid sides without groups before anything else.
    """
    sides = np.flatnonzero(shares > 0)
    sizes, totals, samples = np.bincount(group), np.bincount(classes, minlength=covered.shape[1]), len(classes)
    members = np.split(classes[np.argsort(group, kind="stable")], np.cumsum(sizes)[:-1])
    parts = [np.unique(numbers, return_counts=True) for numbers in members]
    target = shares[:, None] * totals

    def settle(chosen: np.ndarray, order: np.ndarray, final: bool) -> bool:
        """Moves each group to the side with the lowest cost; True if any moved. ``final``: empty sides have a cost."""
        moved = False
        for number in order:
            numbers, counts = parts[number]
            here = chosen[number]
            if here >= 0:
                held[here, numbers] -= counts
                filled[here] -= sizes[number]
            # The increase of the squared distance from the target on each side; the total size has weight 3.
            off = 2 * (held[:, numbers] - target[:, numbers]) + counts
            costs = (off * counts / totals[numbers]).sum(1)
            costs += 3 * (2 * (filled - shares * samples) + sizes[number]) * sizes[number] / samples
            if final:
                costs -= 10 * samples * ((held[:, numbers] == 0) & covered[:, numbers]).sum(1)
                if filled_first:
                    costs[filled == 0] -= 10 * samples * (len(totals) + 1)
            costs[shares == 0] = np.inf
            best = here if here >= 0 and costs[here] <= costs.min() + 1e-9 else int(costs.argmin())
            held[best, numbers] += counts
            filled[best] += sizes[number]
            chosen[number] = best
            moved |= best != here
        return moved

    results = []
    few = len(sizes) <= 1000
    for attempt in range(8 if few else 1):
        held, filled = np.zeros_like(target), np.zeros(len(shares))
        order = rng.permutation(len(sizes))
        chosen = np.full(len(sizes), -1)
        # Large groups first fit best. With many groups any order does, and a random one spreads the small groups.
        settle(chosen, order[np.argsort(-sizes[order], kind="stable")] if few and attempt == 0 else order, False)
        for _ in range(20 if few else 3):
            if not settle(chosen, rng.permutation(len(sizes)), True):
                break
        off = ((held - target) ** 2 / np.maximum(totals, 1)).sum() + 3 * (
            (filled - shares * samples) ** 2
        ).sum() / samples
        empty = np.count_nonzero(filled[sides] == 0) if filled_first else 0
        bad = (empty, np.count_nonzero((held == 0) & covered))
        results.append((bad, off, attempt, chosen))
    return min(results)[-1]


def deal_folds(
    classes: np.ndarray, group: np.ndarray, test_fraction: float, folds: int, rng: np.random.Generator
) -> np.ndarray:
    """Side of each sample, int [n]: 0 is the test set, 1 to ``folds`` are the folds that partition the rest.

    Each side gets its fraction of each class rounded up or down, and a test set at least one sample of each; remainders
    are spread so that the sizes of the folds differ by at most one. All samples of a group are on one side: groups
    are assigned first, and single samples then even out what the groups leave uneven.

    Args:
        classes: class number of each sample, int [n], numbered from 0 without gaps.
        group: group of each sample, int [n].
    """
    num_classes = classes.max() + 1
    _, group, sizes = np.unique(group, return_inverse=True, return_counts=True)
    together = sizes[group] > 1
    alone = np.bincount(classes[~together], minlength=num_classes)
    side = np.full(len(classes), -1)
    held = np.zeros((folds + 1, num_classes), np.int64)
    if together.any():
        shares = np.array([test_fraction] + [(1 - test_fraction) / folds] * folds)
        covered = (shares > 0)[:, None] & (alone < folds + 1)  # other classes have enough single samples for each side
        numbers = np.unique(group[together], return_inverse=True)[1]
        side[together] = deal_groups(classes[together], numbers, shares, rng, covered)[numbers]
        np.add.at(held, (side[together], classes[together]), 1)

    # The total of the test set should match its fraction too: rounding errors are carried over to the next class.
    totals, owed = held.sum(0) + alone, 0.0
    added = np.zeros_like(held)
    for number in rng.permutation(num_classes) if test_fraction > 0 else ():
        exact = round(totals[number] * test_fraction, 9)
        low = max(1, np.floor(exact))
        high = max(low, min(np.ceil(exact), totals[number] - folds))  # each fold needs one as well
        wanted = np.clip(np.floor(exact + owed + 0.5), low, high)
        added[0, number] = np.clip(wanted - held[0, number], 0, alone[number])
        owed += exact - held[0, number] - added[0, number]
    # First an equal number of each class to every fold, then the remainders to the smallest folds.
    left = alone - added[0]
    for number in range(num_classes):
        added[1:, number] = _level(held[1:, number], left[number])
    left = alone - added.sum(0)
    filled = (held + added).sum(1)[1:].astype(np.float64)
    for number in rng.permutation(np.flatnonzero(left)):
        lowest = (held + added)[1:, number]
        order = np.lexsort((rng.random(folds), filled, lowest))[: left[number]]
        added[1 + order, number] += 1
        filled[order] += 1
    for number in range(num_classes):
        members = rng.permutation(np.flatnonzero(~together & (classes == number)))
        side[members] = np.repeat(np.arange(folds + 1), added[:, number])
    return np.concatenate([[0], 1 + rng.permutation(folds)])[side]  # the number of a fold says nothing about its groups


def _level(held: np.ndarray, count: int) -> np.ndarray:
    """How many of ``count`` each position gets to raise the lowest to one level; a remainder is not assigned."""
    open_ = np.ones(len(held), bool)
    while True:
        level = (held[open_].sum() + count) // open_.sum()
        above = open_ & (held > level)
        if not above.any():
            return np.where(open_, level - held, 0)
        open_ &= ~above


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held out), sorted row numbers; depends only on (labels, fraction, seed).

    ``fraction`` of each class is held out, to within one row; a class with two rows or more has at least one in each
    part, and a class with a single row stays in the rest.
    """
    if not 0 < fraction < 1:
        raise UserError(f"a split of {fraction}: it must be between 0 and 1")
    rng = np.random.default_rng(seed)
    held_out = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        held_out.append(rows[:count])
    held = np.sort(np.concatenate(held_out))
    if len(held) == 0:
        raise UserError(f"{len(labels)} rows are too few to hold any out: name a validation file")
    return np.setdiff1d(np.arange(len(labels)), held), held


def fold_split(strata: np.ndarray, groups: Sequence[str], folds: int, fold: int) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held out), sorted row numbers: of ``folds`` folds the one with the number ``fold`` is held out.

    The same rows are always dealt in the same way. Each fold gets its share of each stratum (int [n]), and all rows of
    a group (n names).

    Raises:
        UserError: no such fold, or fewer groups than folds.
    """
    if not 0 <= fold < folds:
        raise UserError(f"--fold {fold}: there are folds 0 to {folds - 1}")
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < folds:
        raise UserError(f"--num_folds {folds}: the {len(strata):,} rows are {len(names):,} groups, too few for that")
    classes = np.unique(strata, return_inverse=True)[1]
    side = deal_folds(classes, group, 0.0, folds, np.random.default_rng(0))
    held = np.flatnonzero(side == 1 + fold)
    if len(held) == 0:
        raise UserError(f"--num_folds {folds}: fold {fold} gets no rows, since a few groups hold most of them")
    return np.flatnonzero(side != 1 + fold), held
