"""The trials of a search: means with their intervals, a table, plots, and the report page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accelerando.base.texts import one_line
from accelerando.report import page
from accelerando.report.plots import COLOURS, shorten, write_figure
from accelerando.search import Setting, Tried

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COVERED = 0.95  # of which an interval covers this share
MOST_PANELS = 12  # settings that are plotted
MOST_TICKS = 8  # of an axis of choices


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of n values and half the width of its 95 % interval (Student's t); None of a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    from scipy.stats import t

    half = float(t.ppf((1 + COVERED) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, half


def shown_mean(values: Sequence[float], digits: int = 4) -> str:
    """``0.9120 ± 0.0040``; one value alone has no interval."""
    mean, half = mean_interval(values)
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def shown_result(trial: Tried) -> str:
    """The metric of a trial: over its seeds, or what a pruned one had reached."""
    if trial.results and trial.state in ("complete", "running"):
        return shown_mean(list(trial.results.values()))
    return "" if trial.value is None else f"{trial.value:.4f}"


def best_first(trials: Sequence[Tried], higher: bool) -> list[Tried]:
    """Complete trials, the best first; then the others in the order in which they were begun."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    ranked = sorted(complete, key=lambda trial: -trial.value if higher else trial.value)
    return ranked + [trial for trial in trials if trial not in ranked]


def trial_rows(trials: Sequence[Tried], settings: Sequence[Setting], metric: str) -> list[tuple[str, ...]]:
    """Heading and a row of text for each trial."""
    rows = [("trial", "state", *(setting.name for setting in settings), metric, "time", "")]
    for trial in trials:
        values = [setting.shown(trial.values[setting.name]) if setting.name in trial.values else ""
                  for setting in settings]  # fmt: skip
        time = "" if trial.seconds is None else f"{trial.seconds:,.0f} s"
        rows.append((str(trial.number), trial.state, *values, shown_result(trial), time, shorten(trial.error, 60)))
    return rows


def within_best(ranked: Sequence[Tried]) -> list[Tried]:
    """The complete trials after the first whose mean lies within the first one's interval."""
    if not ranked or len(ranked[0].results) < 2:
        return []
    mean, half = mean_interval(list(ranked[0].results.values()))
    return [trial for trial in ranked[1:] if trial.state == "complete" and abs(trial.value - mean) <= half]


# ------------------------------------------------------------------------------------------------------------ plots


def positions(setting: Setting, values: Sequence[object]) -> tuple[list[float], dict[float, str], bool]:
    """Where ``values`` lie along the axis of a setting, the names of its ticks (of choices), whether it is logarithmic.

    Choices that are not numbers stand at 0, 1, 2 ...; numbers are in order, as far apart as their neighbours in it.
    """
    if not setting.choices:
        return [float(value) for value in values], {}, setting.log
    try:
        order = sorted(setting.choices, key=float)
    except ValueError:
        order = list(setting.choices)
    names = {float(place): shorten(choice, 14) for place, choice in enumerate(order)}
    return [float(order.index(str(value))) for value in values], names, False


def plot_parallel(trials: Sequence[Tried], settings: Sequence[Setting], metric: str, higher: bool, path: Path) -> bytes:
    """A line for each complete trial through an axis for each setting and one for the metric: a PNG, also at ``path``.

    The colour is the metric; the best trial's line is black.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    ranked = [trial for trial in best_first(trials, higher) if trial.state == "complete"]
    figure = Figure(figsize=(max(5.0, 1.6 * (len(settings) + 1)), 4.2), layout="constrained")
    axes = figure.subplots()
    results = [trial.value for trial in ranked]
    heights = [_scaled(*positions(setting, [trial.values[setting.name] for trial in ranked])) for setting in settings]
    heights.append(_scaled(results, {}, False))
    shades = heights[-1][0]
    for rank in reversed(range(len(ranked))):
        shade = shades[rank] if higher else 1 - shades[rank]
        colour, width = ("#111111", 2.4) if rank == 0 else (colormaps["viridis"](0.85 * shade), 1.2)
        line = [places[rank] for places, _ in heights]
        axes.plot(range(len(heights)), line, "-", color=colour, lw=width, alpha=1.0 if rank == 0 else 0.8)
    for number, (_, ticks) in enumerate(heights):
        axes.axvline(number, color="#888888", lw=0.8, zorder=0)
        for height, name in ticks:
            axes.text(number + 0.02, height, name, fontsize=7.5, va="center", parse_math=False,
                      bbox={"facecolor": "white", "alpha": 0.9, "lw": 0, "pad": 0.6})  # fmt: skip
    axes.set_xticks(range(len(heights)), [*(shorten(setting.name, 18) for setting in settings), metric], fontsize=9)
    axes.set(yticks=[], xlim=(-0.1, len(heights) - 0.55), ylim=(-0.06, 1.06))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return write_figure(figure, path)


def _scaled(values: list[float], names: Mapping[float, str], log: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """(heights from 0 to 1, ticks as (height, name)) of the values along an axis."""
    ends = list(names) or values
    if log:
        values, ends = [math.log10(value) for value in values], [math.log10(end) for end in ends]
    low, high = min(ends), max(ends)

    def height(value: float) -> float:
        return (value - low) / (high - low) if high > low else 0.5

    if names:
        every = math.ceil(len(names) / MOST_TICKS)
        ticks = [(height(place), name) for place, name in names.items() if int(place) % every == 0]
    else:
        marks = [low + share * (high - low) for share in (0, 0.25, 0.5, 0.75, 1)] if high > low else [low]
        ticks = [(height(mark), f"{10**mark if log else mark:.3g}") for mark in marks]
    return [height(value) for value in values], ticks


def plot_settings(trials: Sequence[Tried], settings: Sequence[Setting], metric: str, higher: bool, path: Path) -> bytes:
    """A panel for each setting with the metric of every complete trial over it, with its interval over seeds: a PNG,
    also at ``path``."""
    from matplotlib.figure import Figure

    shown = list(settings[:MOST_PANELS])
    complete = [trial for trial in best_first(trials, higher) if trial.state == "complete"]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.8 * columns, 3.1 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes, setting in zip(grid, shown, strict=False):
        _plot_setting(axes, complete, setting)
        axes.set_title(shorten(setting.name, 40), fontsize=10, loc="left", parse_math=False)
    for axes in grid[::columns]:
        axes.set_ylabel(metric, fontsize=9)
    for axes in grid[len(shown) :]:
        axes.remove()
    return write_figure(figure, path)


def _plot_setting(axes: Axes, complete: Sequence[Tried], setting: Setting) -> None:
    places, names, log = positions(setting, [trial.values[setting.name] for trial in complete])
    for rank, (place, trial) in enumerate(zip(places, complete, strict=True)):
        mean, half = mean_interval(list(trial.results.values()))
        colour = COLOURS[5] if rank == 0 else COLOURS[0]
        axes.errorbar([place], [mean], yerr=half, fmt="o", ms=6 if rank == 0 else 4, color=colour, lw=1, capsize=2,
                      alpha=1.0 if rank == 0 else 0.65, zorder=3 if rank == 0 else 2)  # fmt: skip
    if names:
        every = math.ceil(len(names) / MOST_TICKS)
        kept = [place for place in names if int(place) % every == 0]
        axes.set_xticks(kept, [names[place] for place in kept], fontsize=8, parse_math=False)
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif log:
        axes.set_xscale("log")
        if max(places) < 10 * min(places):  # no power of ten is in it, and the names of all others overlap
            ends = sorted({min(places), max(places)})
            axes.set_xticks(ends, [f"{end:.3g}" for end in ends])
            axes.set_xticks([], minor=True)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# ------------------------------------------------------------------------------------------------------------- page


def importance_rows(shares: Mapping[str, Sequence[float]]) -> list[tuple[str, str]]:
    """(setting, its share of the variance over the seeds), the largest first."""
    ranked = sorted(shares.items(), key=lambda each: -statistics.fmean(each[1]))
    return [(name, shown_mean(values, 2)) for name, values in ranked]


def write_page(
    path: Path, title: str, subtitle: str, trials: Sequence[Tried], settings: Sequence[Setting], metric: str,
    higher: bool, shares: Mapping[str, Sequence[float]], pictures: Mapping[str, bytes], commands: Mapping[str, str],
    notes: Sequence[str],
) -> None:  # fmt: skip
    """``report.html``: the best trial, all trials, importance of the settings, plots and commands, both by title."""
    ranked = best_first(trials, higher)
    complete = [trial for trial in ranked if trial.state == "complete"]
    counts = {state: sum(trial.state == state for trial in trials) for state in ("pruned", "failed", "running")}
    others = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    tiles = [("trials", f"{len(complete)} complete", others)]
    if complete:
        best = complete[0]
        mean, half = mean_interval(list(best.results.values()))
        over = f"± {half:.4f} over {len(best.results)} seeds" if half is not None else "one seed"
        tiles.insert(0, (f"best {metric}", f"{mean:.4f}", over))
        chosen = ", ".join(f"{one.name} {one.shown(best.values[one.name])}" for one in settings)
        tiles.insert(1, ("best trial", str(best.number), shorten(chosen, 120)))
    seconds = sum(trial.seconds or 0 for trial in trials)
    tiles.append(("training", f"{seconds:,.0f} s", "all trials"))
    heading, *rows = trial_rows(ranked, settings, metric)
    if not any(row[-1] for row in rows):
        heading, rows = heading[:-1], [row[:-1] for row in rows]
    sides = ["right", "left", *["right"] * (len(settings) + 2), "left"][: len(heading)]
    blocks = [page.headline(tiles), page.table(heading, rows, sides, " ".join(map(one_line, notes)), title="Trials")]
    if shares:
        told = "Functional ANOVA: how much of the metric's variance over the trials each setting explains by itself"
        several = len(next(iter(shares.values()))) > 1
        told += ", mean and 95 % interval over the seeds." if several else "."
        bars = [(name, min(1.0, statistics.fmean(shares[name])), shown) for name, shown in importance_rows(shares)]
        heading = ["setting", "importance", "over the seeds"][: 2 + several]
        bars = [bar[: len(heading)] for bar in bars]
        blocks.append(page.table(heading, bars, ["left", "left", "right"][: len(heading)], told, heat=(1,),
                                 title="Importance"))  # fmt: skip
    blocks += [page.picture(image, name, name) for name, image in pictures.items()]
    blocks += [page.command(text, name) for name, text in commands.items()]
    page.write_report(path, title, subtitle, blocks)
