"""Evaluation on all processes: every sample exactly once, with results in the order of the data set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from accelerando.base.config import was_given
from accelerando.base.errors import UserError
from accelerando.base.log import progress_bar
from accelerando.train.accelerator import reshard
from accelerando.train.batches import TrainingData, as_training_data, evaluation_batches, gather_rows, report_unreadable
from accelerando.train.state import Run, RunArgs
from accelerando.train.stop import raise_if_stopped

if TYPE_CHECKING:
    import torch


class EvaluationRows:
    """The batches of an evaluation, and the results that a script computes for each sample::

        rows = EvaluationRows(run, model, dataset, data.collate, args.eval_batch_size, "validation")
        for batch in rows:
            rows.add(logits=model(**batch).logits)     # [B, ...] each
        found = rows.gathered()                        # logits [n, ...], numpy, on every process

    ``lengths`` [n]: samples of similar length share a batch, which changes only the padding. Shows a progress bar with
    the title ``what``.

    Raises:
        StopRequested: a process was asked to stop; raised after a batch.
    """

    def __init__(
        self,
        run: Run,
        model: torch.nn.Module,
        dataset: TrainingData | Sequence[Any],
        collate: Callable[[list[Any]], dict[str, torch.Tensor]],
        batch_size: int,
        what: str,
        *,
        lengths: np.ndarray | None = None,
        num_workers: int = 0,
    ) -> None:
        self.run, self.model, self.what = run, model, what
        self.dataset = as_training_data(dataset)
        accelerator = run.accelerator
        self._batches = evaluation_batches(
            self.dataset,
            collate,
            batch_size,
            lengths=lengths,
            num_workers=num_workers,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            device=accelerator.device,
        )
        self._columns: dict[str, list[torch.Tensor]] = {}
        self._batch: dict[str, torch.Tensor] = {}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        with progress_bar(len(self.dataset), 0, f" {self.dataset.unit}", self.what) as bar:
            for batch in self._batches:
                self._batch = batch
                yield batch
                bar.update(len(batch["index"]) * self.run.accelerator.num_processes)
                raise_if_stopped(self.run)
        # Under FSDP the gathered weights stay in memory until a backward pass, and may be averaged weights.
        reshard(self.run.accelerator, self.model)

    def add(self, **columns: torch.Tensor) -> None:
        """Adds results for the samples of the current batch, [B, ...] each."""
        for name, values in {"index": self._batch["index"], "weight": self._batch["weight"], **columns}.items():
            self._columns.setdefault(name, []).append(values)

    def gathered(self) -> dict[str, np.ndarray]:
        """The results of all processes, [n, ...] each, in the order of the data set, on every process (collective).

        Raises:
            RuntimeError: a sample is missing or was evaluated twice.
        """
        import torch

        columns = {name: torch.cat(parts) for name, parts in self._columns.items()}
        return gather_rows(self.run.accelerator, len(self.dataset), columns)

    def gathered_readable(self) -> dict[str, np.ndarray]:
        """:meth:`gathered` without unreadable samples (``valid`` 0), which are reported in the log.

        ``row`` int64 [n]: the positions of the others in the data set.

        Raises:
            UserError: none could be read.
        """
        found = self.gathered()
        readable = found.pop("valid") > 0
        report_unreadable(self.run.accelerator, self.dataset, self.what, np.flatnonzero(~readable))
        if not readable.any():
            raise UserError(f"none of the {self.dataset.unit} of {self.what} can be read")
        return {name: values[readable] for name, values in found.items()} | {"row": np.flatnonzero(readable)}


def mirrored_mean(one: torch.Tensor, other: torch.Tensor, problem_type: str | None) -> torch.Tensor:
    """The logits [B, C] of images and of their mirror images as one: their mean, or, of several labels an image, the
    logits of the mean probability of each label.

    ``problem_type``: as in :mod:`data.targets`, or as in a model's config.
    """
    import torch

    if not str(problem_type).startswith("multi_label"):
        return (one + other) / 2
    log_of = torch.nn.functional.logsigmoid
    return torch.logaddexp(log_of(one), log_of(other)) - torch.logaddexp(log_of(-one), log_of(-other))


def check_validation(args: RunArgs, splits: Collection[str], report_on_train: bool = False) -> None:
    """UserError if there is no validation set and none will be held out, but one is needed or nothing is evaluated."""
    if "validation" in splits or args.validation_fraction or getattr(args, "num_folds", None):
        return
    if args.early_stop:
        raise UserError(
            f"--early_stop {args.early_stop} needs validation data, but --validation_fraction 0 leaves none: "
            "add --early_stop None"
        )
    if args.scheduler == "plateau":
        raise UserError("--scheduler plateau needs validation data, but --validation_fraction 0 leaves none")
    if "test" not in splits and not report_on_train:
        raise UserError("--validation_fraction 0: nothing would be evaluated; name test data or use --report_on_train")


def best_metric(args: RunArgs, choices: Mapping[str, Sequence[str]], problem_type: str) -> str:
    """The metric that chooses the best weights; ``choices``: those of each kind of target, the default first.

    Raises:
        UserError: the one that was asked for is not measured on this kind.
    """
    fitting, known = choices[problem_type], {name for names in choices.values() for name in names}
    if args.best_metric in fitting or args.best_metric not in known:  # a copy may have a metric of its own
        return args.best_metric
    if args.best_metric == type(args).best_metric and not was_given("best_metric"):
        return fitting[0]
    what = f"--best_metric {args.best_metric} is not measured on {problem_type} targets"
    raise UserError(f"{what}: use one of {', '.join(fitting)}")
