"""Plots of a run as PNG, for ``plots/`` and TensorBoard; :mod:`report.page` draws the same plots in an HTML page.

pyplot's global state is not used, so plots can be drawn during training and from any thread.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from accelerando.report.calibration import Reliability

Point = tuple[float, float]  # (step, value)

DPI = 150
MOST_NAMES = 60  # of classes along an axis: each takes time to draw
MOST_PANELS = 9  # of numbers, in one plot
MOST_POINTS = 5000  # of a panel
MAX_COUNTED_CLASSES = 20  # beyond this a count no longer fits its cell

# Okabe and Ito's palette for colour-blind readers, ordered so that neighbours also differ in lightness.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


@dataclass(frozen=True)
class Curve:
    """A panel of curves over the training steps.

    If the panel has several lines, ``best`` marks the best point of the **last** key: ``{"train_loss": "train",
    "eval_loss": "validation"}`` marks that of the validation.
    """

    title: str
    keys: Mapping[str, str]  # metric key in a history row -> label of its line
    unit: str = ""
    log_y: bool = False  # omits values <= 0
    best: Literal["max", "min"] | None = None


def points(history: Sequence[Mapping[str, Any]], key: str, log_y: bool = False) -> tuple[list[Point], int]:
    """``([(step, value), ...], left_out)`` of one metric, ordered by step.

    If a step has several values, as after a resume, the last one is used. ``left_out`` counts the values that cannot be
    drawn: NaN, infinite, beyond 1e100, or not positive on a logarithmic axis. Rows without ``step`` or the key, and
    values that are not numbers, are ignored.
    """
    kept: dict[float, float] = {}
    left_out = 0
    for row in history:
        step, value = row.get("step"), row.get(key)
        if not isinstance(value, Real) or not isinstance(step, Real) or not math.isfinite(step):
            continue
        value = float(value)
        # The bound, which excludes NaN too, keeps differences and axis limits in the range of a float.
        if abs(value) < 1e100 and (value > 0 or not log_y):
            kept[float(step)] = value
        else:
            left_out += 1
    return sorted(kept.items()), left_out


def best_point(curve: Curve, history: Sequence[Mapping[str, Any]]) -> tuple[str, Point] | None:
    """``(key, (step, value))`` of the best point according to ``curve.best``, the earliest if several are equal, or
    None."""
    if curve.best not in ("max", "min", None):
        raise ValueError(f"Curve {curve.title!r}: best is {curve.best!r}, but must be 'max', 'min' or None")
    key = list(curve.keys)[-1] if curve.keys else ""
    line, _ = points(history, key, curve.log_y)
    if curve.best is None or not line:
        return None
    return key, (max if curve.best == "max" else min)(line, key=lambda point: point[1])


def shorten(text: str, length: int) -> str:
    """``text`` on one line, shortened in the middle to at most ``length`` characters: names often differ at the end."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    tail = (length - 1) // 3
    return text[: length - 1 - tail] + "…" + text[len(text) - tail :]


def row_shares(matrix: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Float64 [C, C]: each count of a confusion matrix as a fraction of its row (0 in an empty row).

    Raises ValueError unless the matrix is square with a row for each name.
    """
    import numpy as np

    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape != (len(names), len(names)):
        raise ValueError(f"a confusion matrix of {len(names)} classes cannot have the shape {matrix.shape}")
    totals = matrix.sum(axis=1, keepdims=True)
    return matrix / np.maximum(totals, 1)


def plot_curves(history: Sequence[Mapping[str, Any]], series: Sequence[Curve], path: str | Path) -> None:
    """Writes a PNG with a panel for each curve, two per row; the best points are circled.

    ``history``: dicts with ``step`` and metric keys, each of which may be missing; it may have one row or none.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    columns = min(2, max(1, len(series)))
    rows = max(1, math.ceil(len(series) / columns))
    figure = Figure(figsize=(5.2 * columns, 3.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, curve in zip(grid, series, strict=False):
        handles, labels, left_out = [], [], 0
        for number, (key, label) in enumerate(curve.keys.items()):
            line, skipped = points(history, key, curve.log_y)
            left_out += skipped
            if line:
                colour, style = COLOURS[number % len(COLOURS)], ("-", "--", ":")[number // len(COLOURS) % 3]
                marker = "o" if len(line) <= 30 else ""
                width = 1.6 if len(line) <= 200 else 1.0
                drawn = axes.plot(*zip(*line, strict=True), style, marker=marker, ms=3, lw=width, color=colour)
                handles += drawn
                labels.append(label.lstrip("_") or key)  # matplotlib drops labels that begin with an underscore
        best = best_point(curve, history)
        if best:
            step, value = best[1]
            handles += axes.plot([step], [value], "o", ms=9, mfc="none", mec="#333333", mew=1.3)
            labels.append(f"best {value:.4g} at step {step:,.0f}")
        if not handles:
            axes.text(0.5, 0.5, "nothing measured", ha="center", va="center", color="#777777", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
        else:
            if curve.log_y:
                axes.set_yscale("log")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.xaxis.set_major_formatter(_tick)
            axes.yaxis.set_major_formatter(_tick)
            if curve.log_y:  # within two decades, powers of ten would be too few ticks
                lowest, highest = axes.get_ylim()
                narrow = highest / lowest < 100
                axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if narrow else range(2, 10)))
                axes.yaxis.set_minor_formatter(_tick if narrow else NullFormatter())
            for text in axes.legend(handles, labels, fontsize=8, frameon=False).get_texts():
                text.set_parse_math(False)
        title = curve.title + (f" [{curve.unit}]" if curve.unit else "")
        axes.set_title(title, fontsize=10, loc="left", parse_math=False)
        note = f" (left out, not finite{' or not positive' if curve.log_y else ''}: {left_out})" if left_out else ""
        axes.set_xlabel("step" + note, fontsize=9)
        axes.tick_params(labelsize=8, which="both")
        axes.grid(color="#e6e6e6", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(figure.axes)[len(series) :]:
        axes.remove()
    _write(Path(path), _png(figure))


def plot_confusion(matrix: np.ndarray, names: Sequence[str], path: str | Path | None = None) -> np.ndarray:
    """A plot of the confusion matrix: uint8 RGB [H, W, 3], also written as PNG if a path is given.

    ``matrix``: counts [C, C], rows true, columns predicted; the colour is the fraction of the row; with up to 20
    classes the cells show the counts. Raises ValueError unless the matrix is square with a row for each name.
    """
    import numpy as np
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.image import imread
    from matplotlib.ticker import PercentFormatter

    matrix = np.asarray(matrix)
    shares, classes = row_shares(matrix, names), len(names)
    side = min(13.0, max(2.4, 0.55 * classes if classes <= MAX_COUNTED_CLASSES else 4 + 0.09 * classes))
    many = classes > MAX_COUNTED_CLASSES
    pitch = side * 72 / max(classes, 1)  # points from one row to the next
    every = max(1, math.ceil(7 / pitch), math.ceil(classes / MOST_NAMES))
    size = min(9.0, max(5.5, pitch * every * 0.8))
    shown = range(0, classes, every)
    labels = [shorten(str(names[index]), 24) for index in shown]
    if many:
        # Space for the names from their lengths: to measure hundreds of texts, as a layout does, takes seconds.
        space = 0.6 + 0.58 * size / 72 * max(map(len, labels))
        width, height = side + space + 1.2, side + space + 0.3
        left, bottom, top = space / width, space / height, 1 - 0.2 / height
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((left, bottom, side / width, top - bottom))
    else:
        figure = Figure(figsize=(side + 2.4, side + 1.6), layout="constrained")
        axes = figure.subplots()
    # With many classes an error is a small share: the root keeps it visible.
    norm = PowerNorm(0.5 if classes > MAX_COUNTED_CLASSES else 1, vmin=0, vmax=1)
    image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    percent = PercentFormatter(1, decimals=0)
    if many:
        bar = figure.colorbar(
            image, cax=figure.add_axes((1 - 0.8 / width, bottom, 0.16 / width, top - bottom)), format=percent
        )
    else:
        bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=max(20, 3.5 * side), format=percent)
    bar.set_ticks([0, 0.2, 0.4, 0.6, 0.8, 1] if norm.gamma == 1 else [0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.set_label("share of the true class", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    upright = classes > 4 or max(map(len, labels), default=0) > 8
    turned = {"rotation": 90 if every > 1 or pitch < 14 else 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(shown, labels, fontsize=size, parse_math=False, **(turned if upright else {}))
    if upright and turned["rotation"] == 90:
        for label in axes.get_xticklabels():
            label.set_va("center")
    axes.set_yticks(shown, labels, fontsize=size, parse_math=False)
    axes.set_xlabel("predicted", fontsize=9)
    axes.set_ylabel("true", fontsize=9)
    axes.tick_params(length=2 if classes > MAX_COUNTED_CLASSES else 0)
    axes.spines[:].set_visible(False)
    if classes <= MAX_COUNTED_CLASSES:
        longest = max((len(str(count)) for count in matrix.flat), default=1)
        count_size = min(9.0, pitch / (0.62 * longest) * 0.85)
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if shares[row, column] > 0.55 else "#222222"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=count_size, color=colour)
        axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", lw=1)
        axes.tick_params(which="minor", length=0)
    data = _png(figure, tight=not many)
    if path is not None:
        _write(Path(path), data)
    pixels = imread(io.BytesIO(data), format="png")[..., :3]
    return np.ascontiguousarray(np.rint(pixels * 255).astype(np.uint8))


def plot_numbers(
    true: np.ndarray, predicted: np.ndarray, names: Sequence[str], path: str | Path | None = None
) -> np.ndarray:
    """Predicted over true numbers, a panel for each of C columns: uint8 RGB [H, W, 3], also a PNG if a path is given.

    ``true`` and ``predicted`` [n, C]. Both axes have one scale, and the diagonal is where they are equal. Of many rows
    an even share is drawn; values that are not finite are left out.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    shown = range(min(len(names), MOST_PANELS))
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4.2 * columns, 4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    kept = np.unique(np.linspace(0, len(true) - 1, min(len(true), MOST_POINTS)).round().astype(int))
    for axes, number in zip(grid, shown, strict=False):
        points = np.stack([true[kept, number], predicted[kept, number]]).astype(np.float64)
        points = points[:, (np.abs(points) < 1e100).all(axis=0)]
        low, high = (points.min(), points.max()) if points.size else (0.0, 1.0)
        room = 0.05 * (high - low) or 0.5
        limits = (low - room, high + room)
        axes.plot(limits, limits, "-", color="#999999", lw=1, zorder=1)
        strength = 0.7 if points.shape[1] <= 300 else 0.35
        axes.scatter(*points, s=14 if points.shape[1] <= 300 else 7, color=COLOURS[0], alpha=strength, lw=0, zorder=2)
        axes.set(xlim=limits, ylim=limits, aspect="equal")
        axes.set_title(shorten(str(names[number]), 40), fontsize=10, loc="left", parse_math=False)
        axes.set_xlabel("true", fontsize=9)
        axes.set_ylabel("predicted", fontsize=9)
        axes.xaxis.set_major_formatter(_tick)
        axes.yaxis.set_major_formatter(_tick)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e6e6e6", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(figure.axes)[len(shown) :]:
        axes.remove()
    data = _png(figure)
    if path is not None:
        _write(Path(path), data)
    pixels = imread(io.BytesIO(data), format="png")[..., :3]
    return np.ascontiguousarray(np.rint(pixels * 255).astype(np.uint8))


def plot_calibration(
    before: Reliability, after: Reliability | None, coverage: np.ndarray, risk: np.ndarray, path: str | Path
) -> None:
    """Writes a PNG of two panels: accuracy over confidence, before and ``after`` temperature scaling, with the share of
    rows as bars; and the share of wrong answers, ``risk`` [n], over the share of rows that are answered [n]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(before.confidence, before.count / before.count.sum(), 0.05, color="#dddddd", label="share of rows")
    left.plot([0, 1], [0, 1], "-", color="#999999", lw=1)
    lines = ((before, COLOURS[1], "o-", "as trained"), (after, COLOURS[0], "s-", "calibrated"))
    for values, colour, style, label in lines:
        if values is not None:
            left.plot(values.confidence, values.accuracy, style, color=colour, ms=4, lw=1.5, label=label)
    left.set(xlim=(0, 1.02), ylim=(0, 1.02))
    left.set_xlabel("confidence", fontsize=9)
    left.set_ylabel("share of right answers", fontsize=9)
    left.legend(fontsize=8, frameon=False, loc="upper left")
    right.plot(coverage, risk, "-", color=COLOURS[0], lw=1.5)
    right.set(xlim=(0, 1), ylim=(0, max(0.01, 1.1 * float(risk.max()))))
    right.set_xlabel("share of rows that are answered, the most confident ones", fontsize=9)
    right.set_ylabel("share of wrong answers", fontsize=9)
    for axes in (left, right):
        axes.tick_params(labelsize=8)
        axes.grid(color="#e6e6e6", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _write(Path(path), _png(figure))


def _tick(value: float, _: int | None = None) -> str:
    """A short tick label, without an offset or a factor shown elsewhere."""
    text = f"{value / 1000:.8g}k" if 1e4 <= abs(value) < 1e7 else f"{value:.8g}"
    return text.replace("e-0", "e-").replace("e+0", "e")


def _png(figure: Figure, tight: bool = True) -> bytes:
    """The figure as PNG, ``tight``: without its empty margins, which takes a second drawing.

    A figure made without pyplot is freed with its last reference, nothing has to be closed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class named in a script the font lacks
        figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight" if tight else None, facecolor="white")
    return buffer.getvalue()


def write_figure(figure: Figure, path: Path) -> bytes:
    """The figure as PNG, also written to ``path``."""
    data = _png(figure)
    _write(path, data)
    return data


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
