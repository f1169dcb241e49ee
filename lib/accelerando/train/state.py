"""The state of a run: plain data that the other modules read and write."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from accelerate import Accelerator
    from tqdm import tqdm

    from accelerando.train.checkpoint import Saver
    from accelerando.train.checkpoint_folders import Checkpoint
    from accelerando.train.guard import Guard
    from accelerando.train.range_test import RangeTest
    from accelerando.train.trackers import Tracker


class RunArgs(Protocol):
    """The settings of every script that the library reads; a script's ``Args`` has them and more."""

    output_dir: str
    run_name: str | None
    run_prefix: str | None
    overwrite: bool
    resume: str | None
    allow_changed_data: bool
    seed: int
    epochs: int
    max_steps: int | None
    max_bad_steps: int
    overfit_batches: int | None
    find_lr: bool
    inspect: bool
    scheduler: str
    best_metric: str
    early_stop: int | None
    early_stop_min_delta: float
    eval_every: int
    save_every: int
    keep_checkpoints: int
    background_save: bool
    log_every: int
    report_to: tuple[str, ...]
    wandb_project: str
    wandb_entity: str | None
    wandb_name: str | None
    wandb_group: str | None
    wandb_tags: tuple[str, ...]
    wandb_notes: str | None
    experiment_name: str
    dataset_version: str | None


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: its ``format`` in tables, and whether it is part of an evaluation's log line.

    A script lists its metrics in the order of its tables. Metrics that are computed but not listed are shown too,
    after the others.
    """

    name: str
    format: str = ".4f"
    in_log: bool = False
    higher_is_better: bool = True


@dataclass
class TrainState:
    """Position and counters of a run; saved in every checkpoint, so only JSON types."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0
    position: int = 0  # samples of this epoch already used
    samples: int = 0  # samples used in total
    best_value: float | None = None
    best_step: int = 0
    patience_value: float | None = None  # an evaluation must be better than this by early_stop_min_delta
    bad_evaluations: int = 0  # consecutive evaluations without an improvement
    evaluated_step: int = -1
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    loss_sum: float = 0.0  # of the samples since the last evaluation
    loss_count: int = 0
    log_loss_sum: float = 0.0  # of the samples since the last line of the log
    log_loss_count: int = 0
    seconds: float = 0.0  # of training, over all restarts
    wait_seconds: float = 0.0  # of these, spent waiting for data
    epoch_size: int = 0  # samples of an epoch
    data: dict[str, Any] = field(default_factory=dict)  # what it is trained on: see train.changed_data
    # Settings chosen automatically: [as given, as chosen]. A resumed run keeps them: dropout masks depend on the batch.
    chosen: dict[str, list[Any]] = field(default_factory=dict)
    trackers: dict[str, str] = field(default_factory=dict)  # ids under which trackers continue
    extra: dict[str, Any] = field(default_factory=dict)  # additional entries of a script or an option

    @property
    def epochs_done(self) -> float:
        """Epochs including the fraction of the current one, for the log."""
        return self.epoch + (self.position / self.epoch_size if self.epoch_size else 0.0)

    @property
    def samples_per_second(self) -> float:
        """Speed over the whole training."""
        return self.samples / max(self.seconds, 1e-9)

    @property
    def data_wait_share(self) -> float:
        """The fraction of the training time spent waiting for data."""
        return self.wait_seconds / max(self.seconds, 1e-9)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainState:
        """The state of a checkpoint; entries of other versions are kept in ``extra``."""
        names = {each.name for each in dataclasses.fields(cls)}
        state = cls(**{name: value for name, value in content.items() if name in names})
        state.extra |= {name: value for name, value in content.items() if name not in names}
        return state


@dataclass
class Run:
    """A run: its folder, processes, settings, and recorded metrics."""

    directory: Path
    accelerator: Accelerator
    args: RunArgs
    state: TrainState
    metrics: Sequence[Metric] = ()  # in the order in which they are shown
    model_title: str = ""  # shown in the summary
    total_steps: int = 0  # optimizer steps of the whole run
    history: list[dict[str, Any]] = field(default_factory=list)  # the rows of metrics.jsonl
    resumed: Checkpoint | None = None  # the checkpoint it continues from
    saver: Saver | None = None  # writes the checkpoints
    is_stopping: bool = False  # a process was asked to stop
    remote: str | None = None  # URL to which checkpoints are uploaded
    trackers: list[Tracker] = field(default_factory=list)
    bar: tqdm | None = None  # the progress bar during training
    guard: Guard | None = None  # against gradients that are not finite
    range_test: RangeTest | None = None  # with find_lr
    inspected: bool = False  # the table of layers has been logged
    losses: list[float] = field(default_factory=list)  # of each step, with overfit_batches
    step_started: float = 0.0  # time.perf_counter() when the current step began

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.directory / "checkpoints"

    @property
    def higher_is_better(self) -> bool:
        """Whether higher values of the metric that selects the best weights are better."""
        known = {metric.name: metric.higher_is_better for metric in self.metrics}
        return known.get(self.args.best_metric, True)

    @property
    def out_of_patience(self) -> bool:
        """True after ``early_stop`` consecutive evaluations without an improvement."""
        return self.args.early_stop is not None and self.state.bad_evaluations >= self.args.early_stop

    @property
    def is_over(self) -> bool:
        """True after the last training step."""
        return self.state.step >= self.total_steps or self.out_of_patience

    def written(self, metrics: dict[str, float], log_only: bool = False) -> list[tuple[str, str]]:
        """(name, formatted value) of ``metrics``, the listed ones first; ``log_only``: only those for the log line."""
        listed = {metric.name: metric for metric in self.metrics}
        order = [*(name for name in listed if name in metrics), *(name for name in metrics if name not in listed)]
        shown = [listed.get(name, Metric(name, in_log=True)) for name in order]
        chosen = [metric for metric in shown if metric.in_log or not log_only]
        return [(metric.name, f"{metrics[metric.name]:{metric.format}}") for metric in chosen]
