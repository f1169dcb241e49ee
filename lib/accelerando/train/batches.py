"""Batches for training and evaluation, with the same samples on any number of processes and workers.

The order of an epoch depends only on (seed, epoch). It is cut into *windows*, one for each optimizer step; a window is
divided among the processes and their micro-batches so that every sample is used once. A position in the epoch is a
number of samples, so a run can be resumed with a different number of processes.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from accelerando.base.errors import UserError
from accelerando.base.log import log
from accelerando.base.processes import gather_objects, signal_when_parent_dies
from accelerando.data.order import deal, deal_groups, epoch_order, order_of_classes, order_of_rows, poisson_rows
from accelerando.train.shared_memory import slots_for

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from accelerando.data.curriculum import Curriculum
    from accelerando.data.order import Order, Share
    from accelerando.train.guard import Watch
    from accelerando.train.shared_memory import InSlot, Slots


@runtime_checkable
class TrainingData(Protocol):
    """A data set whose samples depend on the epoch, and which chooses its order.

    A plain sequence of samples (``len`` and ``[row]``) works too: see :class:`Rows`.
    """

    unit: str  # the word for samples in messages: "images"

    def __len__(self) -> int: ...

    def at(self, row: int, epoch: int, draw: int = 0) -> Any:
        """The sample ``row`` as augmented in ``epoch``; ``draw`` counts its earlier occurrences in the epoch."""

    def epoch_order(self, seed: int, epoch: int) -> Order:
        """The order of rows in an epoch, int64 [n]; a repeated row is row + len * draw (:func:`number_repeats`)."""

    def prefetch(self, parts: Iterable[np.ndarray]) -> None:
        """Starts to fetch remote data of rows in advance, in this order; local data leaves ``parts`` unread."""

    def problem(self, row: int) -> str:
        """The location of the sample ``row`` and why it cannot be read."""


@runtime_checkable
class PartedData(TrainingData, Protocol):
    """Training data of several parts, of which a micro-batch has only one: see :class:`data.mixture.Mixture`."""

    def part_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of the part of each of ``rows``, int64 [r]."""


@dataclass
class Rows:
    """A sequence of samples as :class:`TrainingData`: shuffled, with ``lengths`` [n] in runs of similar length.

    Samples that differ from epoch to epoch come from the sequence's own ``at(row, epoch, draw)``, if it has one.
    With ``classes`` int64 [n] every class is sampled equally often; a ``curriculum`` begins with the easy samples.
    """

    samples: Sequence[Any]
    lengths: np.ndarray | None = None
    classes: np.ndarray | None = None
    curriculum: Curriculum | None = None

    @property
    def unit(self) -> str:
        """The word for samples in messages."""
        return getattr(self.samples, "unit", "samples")

    def __len__(self) -> int:
        return len(self.samples)

    def at(self, row: int, epoch: int, draw: int = 0) -> Any:
        """The sample ``row`` in ``epoch``."""
        return self.samples.at(row, epoch, draw) if hasattr(self.samples, "at") else self.samples[row]

    def epoch_order(self, seed: int, epoch: int) -> Order:
        """The order of an epoch; see :func:`data.order.epoch_order`."""
        if self.curriculum is not None:
            log.info("Curriculum: the easiest %.0f %% of the %s", 100 * self.curriculum.share(epoch), self.unit)
            return order_of_rows(self.curriculum.rows(seed, epoch), seed, epoch, self.lengths)
        if self.classes is not None:
            return order_of_classes(self.classes, True, seed, epoch, self.lengths)
        return epoch_order(len(self.samples), seed, epoch, self.lengths)

    def prefetch(self, parts: Iterable[np.ndarray]) -> None:
        """Does nothing: the samples are local."""

    def problem(self, row: int) -> str:
        """The row number, or the result of the sequence's own ``problem`` if it has one."""
        return self.samples.problem(row) if hasattr(self.samples, "problem") else f"row {row}"


def as_training_data(dataset: TrainingData | Sequence[Any], lengths: np.ndarray | None = None) -> TrainingData:
    """``dataset`` itself, or :class:`Rows` for a plain sequence."""
    return dataset if isinstance(dataset, TrainingData) else Rows(dataset, lengths)


def first_batch(
    dataset: TrainingData | Sequence[Any], collate: Callable[[list[Any]], dict[str, torch.Tensor]], size: int = 4
) -> dict[str, torch.Tensor]:
    """A batch of the first samples, on the CPU."""
    samples = as_training_data(dataset)
    return collate([samples.at(row, 0) for row in range(min(size, len(samples)))])


@dataclass
class Window:
    """The micro-batches of one optimizer step on this process; iterate over it once.

    ``num_samples`` is the number of samples of the step on all processes, ``position`` the number of samples of the
    epoch used after the step. Each batch is a dict of tensors with ``index`` [B] (row numbers) and ``weight`` [B] (1,
    or 0 for a row that only keeps the processes in step). ``loss_sum`` is the sum of this process's losses so far.
    """

    num_samples: int
    position: int
    num_micro_batches: int
    batches: TrainBatches
    starts_epoch: bool
    rows: np.ndarray  # of all processes, as in :meth:`TrainingData.epoch_order`
    _share: Share
    _epoch: int
    _fetch: Callable[[], dict[str, torch.Tensor]]
    _fetched: int = 0
    is_repeated: bool = False  # the loop is to compute it again
    watch: Watch | None = None  # looks for the module and the samples whose output is not finite
    left_out: set[int] = field(default_factory=set)  # samples whose gradient is not finite

    def __post_init__(self) -> None:
        import torch

        self.loss_sum = torch.zeros((), device=self.batches.device)

    def __len__(self) -> int:
        return self.num_micro_batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(self.num_micro_batches):
            batch = self._fetch()
            self._fetched += 1
            if self.watch is not None:
                self.watch.begin(batch["index"], batch.get("windows"))
            yield batch
        if self.watch is not None:  # a second pass of a contrastive loss would find them again
            self.watch.end()

    def again(self, watch: Watch | None, left_out: Collection[int] = ()) -> None:
        """Prepares the window to be computed once more: with ``watch``, or without the samples ``left_out``."""
        self.watch, self.left_out, self.is_repeated = watch, set(left_out), True
        self.num_samples -= int(np.isin(self.rows % len(self.batches.dataset), list(left_out)).sum())
        self.loss_sum.zero_()
        self._fetched = 0
        batches = self.batches.read_again(self._share, self._epoch, self.rows, self.left_out)
        self._fetch = lambda: next(batches)

    def count_nothing(self) -> None:
        """The window's samples and losses are not counted."""
        self.num_samples = 0
        self.loss_sum.zero_()

    @property
    def at_last(self) -> bool:
        """True if the current micro-batch is the last one."""
        return self._fetched == self.num_micro_batches

    def sync(self, model: torch.nn.Module) -> AbstractContextManager:
        """Context for forward and backward: gradients are reduced over processes only after the last micro-batch."""
        return nullcontext() if self.at_last else self.batches.accelerator.no_sync(model)

    def backward(self, losses: torch.Tensor, weight: torch.Tensor, mean: bool = True) -> None:
        """Adds a micro-batch's gradient of the mean loss over all samples of the window, on all processes.

        ``losses`` and ``weight`` [B]. With ``mean=False``, the gradient of the sum over this process's samples.
        """
        accelerator = self.batches.accelerator
        if self.watch is not None:
            self.watch.look(losses, lambda: "the loss")
        loss = (losses * weight).sum()
        # DDP and FSDP average over processes, which the factor compensates.
        accelerator.backward(loss * accelerator.num_processes / self.num_samples if mean else loss)
        self.loss_sum += loss.detach()

    def add_mean_loss(self, loss: torch.Tensor) -> None:
        """Records the mean loss over all samples of the window if its gradient was computed in another way."""
        self.loss_sum += loss * self.num_samples / self.batches.num_processes


@dataclass
class TrainBatches:
    """Windows of micro-batches over ``dataset``, in an order that depends only on the seed and the epoch.

    ``batch_size`` is per process and micro-batch; ``effective_batch_size`` sets the number of samples of an optimizer
    step over all processes, in place of ``gradient_accumulation_steps``. ``lengths`` [n] (tokens, frames) turns on
    length buckets for a plain sequence of samples. The batches do not depend on ``num_workers``. A sample with
    ``valid`` 0 (it could not be read) has weight 0. With a ``poisson_seed``, a step's samples are drawn, each with
    probability ``window_size`` / n, as the accounting of differential privacy assumes; positions are then those of
    windows of equal size.
    """

    dataset: TrainingData | Sequence[Any]
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]
    batch_size: int
    gradient_accumulation_steps: int = 1
    seed: int = 0
    lengths: np.ndarray | None = None
    num_workers: int = 0
    num_processes: int = 1
    process_index: int = 0
    device: torch.device | str = "cpu"
    effective_batch_size: int | None = None
    pin_memory: bool = True  # page-locked batches on a GPU
    poisson_seed: int | None = None
    overfit_batches: int | None = None  # every epoch has these first windows of epoch 0 alone, as augmented there
    accelerator: Accelerator | None = None  # sets num_processes, process_index and device
    seconds_waited: float = 0.0  # for data
    unreadable: set[int] = field(default_factory=set, repr=False)
    _loader: torch.utils.data.DataLoader | None = field(default=None, repr=False)
    _plan: Plan = field(default_factory=lambda: Plan(), repr=False)

    def __post_init__(self) -> None:
        self.dataset = as_training_data(self.dataset, self.lengths)
        if self.accelerator is not None:
            self.num_processes, self.process_index = self.accelerator.num_processes, self.accelerator.process_index
            self.device = self.accelerator.device

    @property
    def window_size(self) -> int:
        """Samples of an optimizer step over all processes: the global batch size."""
        return self.effective_batch_size or self.batch_size * self.num_processes * self.gradient_accumulation_steps

    def take_seconds_waited(self) -> float:
        """Seconds spent waiting for data since the last call."""
        seconds, self.seconds_waited = self.seconds_waited, 0.0
        return seconds

    def take_unreadable(self) -> set[int]:
        """The rows that this process could not read since the last call."""
        rows, self.unreadable = self.unreadable, set()
        return rows

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        total = len(self.dataset)
        return total if self.overfit_batches is None else min(total, self.overfit_batches * self.window_size)

    def num_windows(self, position: int = 0) -> int:
        """Optimizer steps from ``position`` (in samples) to the end of an epoch."""
        return -(-(self.num_samples - position) // self.window_size)

    def windows(self, epoch: int, position: int = 0) -> Iterator[Window]:
        """The windows of ``epoch`` from ``position`` (samples of it already used) on."""
        epoch = epoch if self.overfit_batches is None else 0
        order = None if self.poisson_seed is not None else self.dataset.epoch_order(self.seed, epoch)
        total = len(self.dataset)
        # Steps are planned while the epoch goes on: those of a billion rows would take minutes and gigabytes.
        planned, read = itertools.tee(self._steps(order, epoch, position))
        self._plan.epoch = epoch
        self._plan.batches = (rows for _, _, share in read for rows in share.micro_batches)
        self.dataset.prefetch(part % total for _, part in self._parts(order, epoch, position))
        batches = start_workers(self._make_loader())
        for start, part, share in planned:
            pending = iter(share.counts)
            yield Window(
                num_samples=len(part),
                position=min(start + self.window_size, self.num_samples),
                num_micro_batches=len(share.counts),
                batches=self,
                starts_epoch=start == 0,
                rows=part,
                _share=share,
                _epoch=epoch,
                _fetch=lambda pending=pending: self._next(batches, next(pending)),
            )

    def _steps(self, order: Order | None, epoch: int, position: int) -> Iterator[tuple[int, np.ndarray, Share]]:
        """Start, rows and this process's share of each window."""
        for start, part in self._parts(order, epoch, position):
            yield start, part, self._share_of(part)

    def _parts(self, order: Order | None, epoch: int, position: int) -> Iterator[tuple[int, np.ndarray]]:
        """Start and rows, of all processes, of each window."""
        for start in range(position, self.num_samples, self.window_size):
            yield start, self._rows_of(order, epoch, start)

    def _rows_of(self, order: Order | None, epoch: int, start: int) -> np.ndarray:
        """The rows of the window that begins at position ``start``."""
        if order is not None:
            return order[start : min(start + self.window_size, self.num_samples)]
        total = len(self.dataset)
        return poisson_rows(total, self.window_size / total, self.poisson_seed, epoch, start)

    def _share_of(self, window: np.ndarray) -> Share:
        """This process's micro-batches of the rows of a step; data of several parts has them apart."""
        how = self.batch_size, self.num_processes, self.process_index
        if isinstance(self.dataset, PartedData) and len(window):
            return deal_groups(window, self.dataset.part_of(window), *how)
        return deal(window, *how)

    def read_again(
        self, share: Share, epoch: int, rows: np.ndarray, left_out: Collection[int]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches ``share`` of the window ``rows`` once more, without the samples ``left_out``.

        A micro-batch that would be empty has another sample of the window, of weight 0.
        """
        total, collate = len(self.dataset), _CollateIndexed(self.collate, None)
        filler = [row for row in rows.tolist() if row % total not in left_out][:1]
        for micro_batch, counts in zip(share.micro_batches, share.counts, strict=True):
            kept = [row for row in micro_batch.tolist() if row % total not in left_out]
            batch = collate(
                [(row % total, self.dataset.at(row % total, epoch, row // total)) for row in kept or filler]
            )
            batch["weight"] = _weights(batch, counts and bool(kept))
            if "valid" in batch:
                batch["weight"] *= batch["valid"]
            yield to_device(batch, self.device)

    def _make_loader(self) -> torch.utils.data.DataLoader:
        if self._loader is None:
            window = self.window_size // (self.batch_size * self.num_processes)  # micro-batches of a step
            self._loader = make_loader(
                self.dataset, self.collate, self._plan, self.num_workers, self.device, min(window, 16), self.pin_memory
            )
        return self._loader

    def _next(self, batches: Iterator[dict[str, torch.Tensor]], counts: bool) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        batch = next(batches)
        batch["weight"] = _weights(batch, counts)
        if "valid" in batch:
            batch["weight"] *= batch["valid"]
            self.unreadable.update(batch["index"][batch["valid"] == 0].tolist())
        batch = to_device(batch, self.device)
        self.seconds_waited += time.perf_counter() - started
        return batch


def smallest_batch(num_samples: int, batch_size: int, gradient_accumulation_steps: int, num_processes: int) -> int:
    """Rows of the smallest micro-batch of an epoch on any process, fillers included."""
    window = batch_size * gradient_accumulation_steps * num_processes
    parts = [part for part in (min(num_samples, window), num_samples % window) if part]
    return max(1, min(part // (-(-part // (batch_size * num_processes)) * num_processes) for part in parts))


def check_no_batch_of_one(
    num_samples: int, batch_size: int, gradient_accumulation_steps: int, num_processes: int
) -> None:
    """UserError if an epoch has a batch of one sample, for a model whose batch norms need at least two."""

    def fits(size: int) -> bool:
        return smallest_batch(num_samples, size, gradient_accumulation_steps, num_processes) > 1

    if fits(batch_size):
        return
    near = [size for step in range(1, 65) for size in (batch_size - step, batch_size + step) if size > 1]
    other = next((size for size in near if fits(size)), None)
    raise UserError(
        f"--batch_size {batch_size}: {num_samples:,} samples leave a batch of a single one, but the model's batch "
        f"norms need at least two{f': --batch_size {other} leaves none' if other else ''}"
    )


def evaluation_batches(
    dataset: TrainingData | Sequence[Any],
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    batch_size: int,
    *,
    lengths: np.ndarray | None = None,
    num_workers: int = 0,
    num_processes: int = 1,
    process_index: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's batches of an evaluation in which every sample is used once over all processes.

    All processes get the same number of batches; filler rows have ``weight`` 0 (unreadable samples keep 1 and have
    ``valid`` 0). With ``lengths`` [n] samples are sorted by length, which changes only the padding. Combine the results
    with :func:`gather_rows`.
    """
    rows = np.arange(len(dataset)) if lengths is None else np.argsort(-np.asarray(lengths), kind="stable")
    shares, read = itertools.tee(
        deal(rows[start : start + batch_size * num_processes], batch_size, num_processes, process_index)
        for start in range(0, len(rows), batch_size * num_processes)
    )
    plan = Plan(share.micro_batches[0] for share in read)
    batches = start_workers(make_loader(dataset, collate, plan, num_workers, device))
    for share in shares:
        batch = next(batches)
        yield to_device({**batch, "weight": _weights(batch, share.counts[0])}, device)


def report_unreadable(
    accelerator: Accelerator, dataset: TrainingData, split: str, rows: Iterable[int], shown: int = 10
) -> None:
    """Logs which samples of ``split`` could not be read on any process, and how many (collective)."""
    everywhere = sorted(set().union(*gather_objects(accelerator, [int(row) for row in rows])))
    if everywhere and accelerator.is_main_process:
        count = f"{len(everywhere)} of {len(dataset)} {split} {dataset.unit}"
        log.warning("%s cannot be read and were skipped:", count)
        for row in everywhere[:shown]:
            log.warning("  %s", dataset.problem(row))
        if len(everywhere) > shown:
            log.warning("  ... and %d more", len(everywhere) - shown)


def gather_rows(accelerator: Accelerator, num_samples: int, columns: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Gathers per-sample results of all processes in the order of the data set, on every process.

    ``columns`` has ``index`` [n_local], ``weight`` [n_local] and tensors [n_local, ...]; rows with weight 0 are
    dropped.

    Raises:
        RuntimeError: a sample is missing or was evaluated twice.
    """
    gathered = {}
    for name, values in columns.items():
        padded = accelerator.pad_across_processes(values, dim=0, pad_index=0)  # padding has weight 0 as well
        gathered[name] = (
            accelerator.gather(padded).float().cpu().numpy()
            if values.is_floating_point()
            else (accelerator.gather(padded).cpu().numpy())
        )
    keep = gathered.pop("weight") > 0
    index = gathered.pop("index")[keep]
    if len(index) != num_samples or len(np.unique(index)) != num_samples:
        raise RuntimeError(f"{len(index)} results of {len(np.unique(index))} samples gathered for {num_samples}")
    order = np.argsort(index)
    return {name: values[keep][order] for name, values in gathered.items()}


@dataclass
class Plan:
    """The batches of row numbers that a loader reads next, and their epoch."""

    batches: Iterable[np.ndarray] = ()
    epoch: int = 0


class _PlannedBatches:
    """A batch sampler that reads the current plan each time it is iterated, so that workers persist over epochs."""

    def __init__(self, plan: Plan, num_samples: int) -> None:
        self.plan, self.num_samples = plan, num_samples

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, total = self.plan.epoch, self.num_samples
        return ([(row % total, epoch, row // total) for row in rows.tolist()] for rows in self.plan.batches)


class _Indexed:
    """Adds the row number to every sample; it becomes ``index`` in the batch."""

    def __init__(self, dataset: TrainingData) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, int, int]) -> tuple[int, Any]:
        row, epoch, draw = place
        return row, self.dataset.at(row, epoch, draw)


class _CollateIndexed:
    def __init__(self, collate: Callable[[list[Any]], dict[str, torch.Tensor]], slots: Slots | None) -> None:
        self.collate, self.slots = collate, slots

    def __call__(self, samples: list[tuple[int, Any]]) -> dict[str, torch.Tensor] | InSlot:
        import torch

        batch = self.collate([sample for _, sample in samples])
        batch["index"] = torch.tensor([row for row, _ in samples], dtype=torch.int64)
        return batch if self.slots is None else self.slots.put(batch)


def make_loader(
    dataset: TrainingData | Sequence[Any],
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    plan: Plan,
    num_workers: int,
    device: torch.device | str,
    ahead: int = 0,
    pin_memory: bool = True,
) -> torch.utils.data.DataLoader:
    """A DataLoader over the batches of row numbers in ``plan`` that does not use the global random state.

    The workers prepare at least two batches each, and at least ``ahead`` in total.
    """
    import torch

    pin_memory = pin_memory and torch.device(device).type == "cuda"
    prefetch = max(2, -(-ahead // num_workers)) if num_workers else None
    return torch.utils.data.DataLoader(
        _Indexed(as_training_data(dataset)),
        batch_sampler=_PlannedBatches(plan, len(dataset)),
        collate_fn=_CollateIndexed(collate, slots_for(num_workers, prefetch, pin_memory) if num_workers else None),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        prefetch_factor=prefetch,
        pin_memory=pin_memory,
        # Otherwise each new iterator would advance the generator that dropout uses.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=functools.partial(_start_worker, os.getpid()),
    )


def start_workers(loader: torch.utils.data.DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    """The loader's iterator; its workers and all of their threads start with SIGTERM blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else ())
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(parent: int, _: int) -> None:
    # The tokenizers' thread pool does not survive the fork; waiting for it would hang.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Only the training process handles stop signals, even if they are sent to the whole group (timeout, Slurm): if a
    # worker exited, the run would end before it could save. A worker ends with its parent, even if that is killed.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        threading.Thread(target=_exit_on_sigterm_from, args=(parent,), daemon=True).start()
    signal_when_parent_dies(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _exit_on_sigterm_from(parent: int) -> None:
    """Ends this process on a SIGTERM from ``parent``, but from no other process."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def to_device(batch: dict[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    """The batch with every tensor on ``device``."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _weights(batch: dict[str, torch.Tensor], counts: bool) -> torch.Tensor:
    import torch

    return torch.full(batch["index"].shape, float(counts), dtype=torch.float32)
