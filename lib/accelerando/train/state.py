"""Where a run is, and what belongs to it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.train.stop import StopSignal

if TYPE_CHECKING:
    pass
    from accelerate import Accelerator


@dataclass
class TrainState:
    """Where the run is; saved in every checkpoint."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0
    position: int = 0  # samples of this epoch already used
    samples: int = 0  # samples used in all
    best_value: float | None = None
    best_step: int = 0
    patience_value: float | None = None  # what an evaluation has to beat by early_stop_min_delta
    bad_evaluations: int = 0  # evaluations in a row without an improvement
    evaluated_step: int = -1
    finished: bool = False
    loss_sum: float = 0.0  # of the samples since the last evaluation
    loss_count: int = 0
    log_loss_sum: float = 0.0  # of the samples since the last line of the log
    log_loss_count: int = 0
    seconds: float = 0.0  # of training, over all restarts
    wait_seconds: float = 0.0  # of these, spent waiting for data
    epoch_size: int = 0  # samples of an epoch
    micro_batch_size: int = 0  # as it was found; a run that goes on keeps it, since dropout masks depend on it
    trackers: dict[str, str] = field(default_factory=dict)  # ids under which trackers go on
    spent: list[list[float]] = field(default_factory=list)  # privacy: noise multiplier, sample rate, steps
    noise_seed: int | None = None  # privacy: of the noise and the sampling

    @property
    def epochs_done(self) -> float:
        """Epochs with their fraction, for the log."""
        return self.epoch + (self.position / self.epoch_size if self.epoch_size else 0.0)


@dataclass
class Run:
    """One run: its folder, its processes, the numbers it recorded.

    ``resumed`` is the checkpoint it goes on from; ``remote`` the URL under which checkpoints are kept too.
    """

    directory: Path
    accelerator: Accelerator
    args: Any
    state: TrainState
    history: list[dict[str, Any]] = field(default_factory=list)
    resumed: Path | None = None
    remote: str | None = None
    trackers: list[Any] = field(default_factory=list)
    stop: StopSignal | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def checkpoints(self) -> Path:
        """Where exact resume finds what it needs."""
        return self.directory / "checkpoints"
