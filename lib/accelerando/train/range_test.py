"""The learning-rate range test: some steps on a copy of the run, while the learning rate grows until the loss explodes.

The loss of each step is that of its own batch, so it is smoothed; the learning rate at which it falls most steeply is
suggested. Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186; the
exponential growth and the end at a loss that explodes are fastai's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from accelerando.base.errors import UserError
from accelerando.base.files import write_text
from accelerando.base.log import log, success

if TYPE_CHECKING:
    from pathlib import Path

    import torch

STEPS = 100  # optimizer steps, if the loss does not explode before
LOWEST, HIGHEST = 1e-7, 10.0  # learning rates of the first and the last step
SMOOTHING = 0.9  # of the loss: share of the moving average that each step keeps
EXPLODED = 4.0  # the test ends where the loss is this many times as far above its least as its start was
LEAST_FALL = 0.25  # of the start: counted as its distance where it is nearer
WIDTH = 4.0  # steps: standard deviation of the average that is looked at in the end
CERTAIN = 5.0  # standard errors of that average: a fall of less may be chance
FEWEST = 10  # steps without which nothing can be said
SUFFIX = "_find_lr"  # of the test's folder, after the run's


@dataclass
class RangeTest:
    """Sets the learning rate of each step and keeps its loss.

    The learning rates are those of ``lr``; parameters with another one keep their ratio to it.
    """

    optimizer: torch.optim.Optimizer
    lr: float
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    exploded: bool = False

    def __post_init__(self) -> None:
        if not self.lr:
            raise UserError("--find_lr: --lr 0 has no multiples; other learning rates keep their ratio to it")
        groups = self.optimizer.param_groups
        self.ratios = [group.get("max_lr", group.get("initial_lr", group["lr"])) / self.lr for group in groups]

    @property
    def is_over(self) -> bool:
        """True after the last step."""
        return self.exploded or len(self.losses) >= STEPS

    def set_rate(self) -> None:
        """Sets the learning rate of the step that follows."""
        rate = LOWEST * (HIGHEST / LOWEST) ** (len(self.losses) / (STEPS - 1))
        self.rates = [*self.rates[: len(self.losses)], rate]
        for group, ratio in zip(self.optimizer.param_groups, self.ratios, strict=True):
            group["lr"] = rate * ratio

    def add(self, loss: float) -> None:
        """Counts a step, whose loss is the mean over the samples of all processes."""
        self.losses.append(loss)
        curve = smoothed(self.losses)
        fallen = max(curve[0] - curve.min(), LEAST_FALL * abs(curve[0]))
        self.exploded = not math.isfinite(loss) or curve[-1] > curve.min() + EXPLODED * fallen


def smoothed(losses: list[float]) -> np.ndarray:
    """The moving average of the losses [n], float64 [n], without the bias of its start (as in Adam)."""
    average, values = 0.0, []
    for step, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        values.append(average / (1 - SMOOTHING**step))
    return np.array(values)


def averaged(losses: list[float]) -> np.ndarray:
    """The losses [n], each averaged with the steps before and after it, float64 [n]."""
    from scipy.ndimage import gaussian_filter1d

    return gaussian_filter1d(np.array(losses), WIDTH, mode="nearest")


def suggestion(rates: list[float], losses: list[float]) -> tuple[float, float] | None:
    """(learning rate at which the loss falls most steeply, the one at which it is least) of the rates and losses [n].

    None if the loss fell nowhere by more than it varies from step to step. The losses are averaged over neighbouring
    steps on both sides, so that the curve is not shifted.
    """
    if len(losses) < FEWEST:
        return None
    curve = averaged(losses)
    least = int(curve.argmin())
    start = float(np.median(losses[: len(losses) // 5]))
    # The median of the differences between neighbouring steps: neither the fall nor the explosion is part of it.
    deviation = float(np.median(np.abs(np.diff(losses)))) / (0.6745 * math.sqrt(2))
    error = deviation / math.sqrt(2 * math.sqrt(math.pi) * WIDTH)
    if least < 2 or start - curve[least] <= CERTAIN * error:
        return None
    return rates[int(np.gradient(curve[: least + 1]).argmin())], rates[least]


def write_result(test: RangeTest, directory: Path, settings: dict[str, object]) -> None:
    """Writes losses and plot into the run's ``directory``, and says which learning rate is suggested and why.

    ``settings``: of the script; those that are learning rates are suggested in their ratio to ``lr``.
    """
    rates, losses = test.rates[: len(test.losses)], test.losses
    while losses and not math.isfinite(losses[-1]):
        rates, losses = rates[:-1], losses[:-1]
    found = suggestion(rates, losses)
    lines = "".join(f"{rate:.6g},{loss:.6g}\n" for rate, loss in zip(rates, losses, strict=True))
    write_text(directory / "find_lr.csv", "lr,loss\n" + lines)
    plot = directory / "plots" / "find_lr.png"
    draw(rates, losses, found, plot)
    if found is None:
        log.warning("No learning rate is suggested: the loss fell at none of them by more than it varies")
    else:
        end = "exploded" if test.exploded else "was still finite"
        log.info("%d steps, from %.0e to %.2g, where the loss %s", len(losses), rates[0], rates[-1], end)
        log.info("The loss falls most steeply at %.2g and is least at %.2g", *found)
        scaled = {
            name: found[0] * value / test.lr
            for name, value in settings.items()
            if (name == "lr" or name.endswith("_lr")) and type(value) in (int, float)
        }
        success("Suggested: %s", " ".join(f"--{name} {value:.2g}" for name, value in scaled.items()))
    log.info("Plot: %s", plot)


def draw(rates: list[float], losses: list[float], found: tuple[float, float] | None, path: Path) -> None:
    """Writes a PNG of the loss of each step over its learning rate, with their average and with ``found`` marked.

    The axis ends a little above the losses of the first half, so that the explosion does not flatten all before it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(rates, losses, ".", color="#999999", ms=4, label="loss of a step")
    axes.plot(rates, averaged(losses), "-", color="#0072B2", lw=2, label="smoothed")
    marks = zip(found or (), ("#D55E00", "#009E73"), ("steepest", "least"), strict=False)
    for rate, colour, word in marks:
        axes.axvline(rate, color=colour, lw=1.2, ls="--", label=f"{word}: {rate:.2g}")
    low, high = min(losses), max(losses[: max(2, len(losses) // 2)])
    room = 0.1 * (high - low) or 0.1
    axes.set(xscale="log", ylim=(low - room, high + 3 * room))
    axes.set_xlabel("learning rate", fontsize=9)
    axes.set_ylabel("loss", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
