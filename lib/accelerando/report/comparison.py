"""How far two models, or two sets of runs, are apart, and how sure that is.

Runs of one setting that differ in their seed or fold are a set. :func:`compare_paired` and :func:`compare_independent`
compare a metric of two sets, :func:`compare` and :func:`mcnemar` the answers of two single models to the same samples.
The tests are scipy's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

DRAWS = 10_000  # of the bootstrap
COVERED = 0.95  # of which the interval covers this share
ALPHA = 0.05  # a difference is claimed where p, corrected for the number of comparisons, is below
POWER = 0.8  # the share of repetitions that would find a difference, for the number of runs that a claim takes
MOST_RUNS = 100_000  # more are not asked for
FEW = 25  # discordant samples up to which McNemar's test is exact


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


def mcnemar(only_first: int, only_second: int) -> float:
    """p of McNemar's test (1947): are as many samples answered right by the first model alone as by the second alone?

    Up to ``FEW`` such samples it is the exact binomial test, otherwise chi squared with Edwards' continuity correction.
    """
    from scipy.stats import binomtest, chi2

    discordant = only_first + only_second
    if discordant <= FEW:
        return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return float(chi2.sf((abs(only_first - only_second) - 1) ** 2 / discordant, 1))


# ----------------------------------------------------------------------------------------------------- sets of runs


@dataclass(frozen=True)
class Difference:
    """The difference of a metric's means, second minus first, with its interval ``low`` to ``high``.

    ``test``: its name, with the two-sided ``p``, and ``rank_test`` with ``rank_p`` for a test that assumes no normal
    distribution (None: there is none). ``cohen``: the effect size, the difference in standard deviations; ``effect``:
    with Hedges' correction for few runs. NaN stands for what cannot be computed. ``first`` and ``second``: how many
    runs were compared; ``folds``: of a cross-validation of that many folds, 0 otherwise.
    """

    difference: float
    low: float
    high: float
    test: str
    p: float
    rank_test: str | None
    rank_p: float
    cohen: float
    effect: float
    first: int
    second: int
    folds: int = 0


def compare_paired(first: Sequence[float], second: Sequence[float], folds: int = 0) -> Difference | None:
    """Compares n runs with n others that share their seeds or folds, one by one: paired t test and Wilcoxon's.

    The effect size is d_z, the mean of the differences over their standard deviation. Runs on ``folds`` of a
    cross-validation share most of their training samples, so their variance is too small: it is corrected as by Nadeau
    and Bengio (2003; for repeated ones Bouckaert and Frank 2004), times 1/n + 1/(folds - 1) instead of 1/n. Pairs that
    are not finite are left out; None: fewer than two are left.
    """
    from scipy import stats

    differences = np.subtract(second, first, dtype=np.float64)
    differences = differences[np.isfinite(differences)]
    count = len(differences)
    if count < 2:
        return None
    mean, spread = float(differences.mean()), _spread(differences)
    scale = _scale_of_pairs(folds)(count)
    p, margin = _t_test(mean, spread * scale, count - 1)
    rank_p = 1.0
    if differences.any():
        with warnings.catch_warnings():  # of ties and zeros in few runs, which it takes into account
            warnings.simplefilter("ignore")
            rank_p = float(stats.wilcoxon(differences).pvalue)
    cohen = _ratio(mean, spread)
    test = "corrected paired t" if folds > 1 else "paired t"
    return Difference(
        mean, mean - margin, mean + margin, test, p, "Wilcoxon", rank_p, cohen, cohen * hedges(count - 1),
        count, count, folds,
    )  # fmt: skip


def compare_independent(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """Compares the runs of two sets that have nothing in common: Welch's t test and Mann and Whitney's.

    The effect size is Cohen's d, with the pooled standard deviation. Where one set is a single run, the test is
    Student's, with the other set's variance for both. None: neither set has two runs with a finite value.
    """
    from scipy import stats

    first, second = (np.asarray(values, np.float64) for values in (first, second))
    first, second = first[np.isfinite(first)], second[np.isfinite(second)]
    sizes = np.array([len(first), len(second)])
    if sizes.min() < 1 or sizes.max() < 2:
        return None
    mean = float(second.mean() - first.mean())
    variances = np.array([_spread(values) ** 2 if len(values) > 1 else 0.0 for values in (first, second)])
    pooled = math.sqrt(float(((sizes - 1) * variances).sum() / (sizes.sum() - 2))) if sizes.sum() > 2 else math.nan
    if sizes.min() == 1:
        test, error, degrees = "Student's t", pooled * math.sqrt((1 / sizes).sum()), float(sizes.sum() - 2)
    else:
        parts = variances / sizes
        test, error = "Welch's t", math.sqrt(parts.sum())
        # Welch and Satterthwaite
        degrees = float(parts.sum() ** 2 / (parts**2 / (sizes - 1)).sum()) if error else float(sizes.sum() - 2)
    p, margin = _t_test(mean, error, degrees)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rank_p = float(stats.mannwhitneyu(first, second).pvalue)
    cohen = _ratio(mean, pooled)
    return Difference(
        mean, mean - margin, mean + margin, test, p, "Mann-Whitney", rank_p, cohen,
        cohen * hedges(int(sizes.sum()) - 2), len(first), len(second),
    )  # fmt: skip


def compare_answers(first: np.ndarray, second: np.ndarray) -> Difference:
    """Compares which of n samples two models get right, bool [n] each: McNemar's test, and the interval of
    :func:`compare`."""
    found = compare(first, second)
    p = mcnemar(found.only_first, found.only_second)
    none = math.nan
    return Difference(found.difference, found.low, found.high, "McNemar", p, None, none, none, none, 1, 1)


def interval_of_mean(values: Sequence[float]) -> float:
    """Half the width of the t interval around the mean of n runs; NaN of fewer than two."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return math.nan
    return _t_test(0.0, _spread(values) / math.sqrt(len(values)), len(values) - 1)[1]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979) for many comparisons: the chance of any false claim among all stays below alpha.

    NaN are no comparisons and stay NaN.
    """
    tested = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected[place] = highest
    return corrected


def hedges(degrees: int) -> float:
    """Hedges' correction (1981) of an effect size that was estimated with so many degrees of freedom; exact."""
    if degrees < 2:
        return 0.0 if degrees == 1 else math.nan
    return math.exp(math.lgamma(degrees / 2) - math.lgamma((degrees - 1) / 2)) / math.sqrt(degrees / 2)


def power(effect: float, scale: float, degrees: float, alpha: float = ALPHA) -> float:
    """The chance that a two-sided t test finds a true difference of ``effect`` standard deviations.

    ``scale``: the standard error in standard deviations, 1/sqrt(n) of n pairs and sqrt(2/n) of two sets of n runs. The
    statistic has the noncentral t distribution with noncentrality effect / scale.
    """
    from scipy import stats

    shift, limit = abs(effect) / scale, float(stats.t.isf(alpha / 2, degrees))
    if shift - limit > 40:  # where its distribution function may overflow
        return 1.0
    return float(stats.nct.sf(limit, degrees, shift) + stats.nct.cdf(-limit, degrees, shift))


def runs_for_claim(found: Difference, comparisons: int = 1) -> int | None:
    """How many runs each set needs to find a difference as large as the observed one in ``POWER`` of all repetitions.

    ``comparisons``: among so many, each with its share of ``ALPHA``. In pairs, as many pairs. None: more than
    ``MOST_RUNS``, or it cannot be told, as of single runs or a difference of zero.
    """
    if not math.isfinite(found.cohen) or found.cohen == 0:
        return None
    paired = found.rank_test == "Wilcoxon"
    scale = _scale_of_pairs(found.folds) if paired else lambda count: math.sqrt(2 / count)

    def enough(count: int) -> bool:
        degrees = count - 1 if paired else 2 * count - 2
        return power(found.cohen, scale(count), degrees, ALPHA / max(1, comparisons)) >= POWER

    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
        if low > MOST_RUNS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _scale_of_pairs(folds: int) -> Callable[[int], float]:
    """The standard error of the mean of n differences, in standard deviations."""
    return lambda count: math.sqrt(1 / count + (1 / (folds - 1) if folds > 1 else 0))


def _spread(values: np.ndarray) -> float:
    """The standard deviation of a sample; 0 where nothing but rounding differs."""
    spread = float(values.std(ddof=1))
    return spread if spread > 1e-12 * float(np.abs(values).max()) else 0.0


def _t_test(mean: float, error: float, degrees: float) -> tuple[float, float]:
    """p of a mean with this standard error, and half the width of its interval; p is NaN where nothing varies."""
    from scipy import stats

    if error == 0:
        return (1.0 if mean == 0 else math.nan), 0.0
    p = float(2 * stats.t.sf(abs(mean) / error, degrees))
    return p, float(stats.t.isf((1 - COVERED) / 2, degrees)) * error


def _ratio(mean: float, spread: float) -> float:
    return mean / spread if spread else (0.0 if mean == 0 else math.nan)
