"""The bookkeeping of a training loop: steps, epochs, time, early stopping, when to evaluate and save, log lines.

A loop has three calls::

    for window in training_steps(run, batches):
        ...                                            # forward, backward, clipping; see train.gradients
        ...                                            # optimizer, schedule
        step = finish_step(run, window, grad_norm, lr)
        if step.evaluates:
            ...                                        # record_evaluation(run, metrics, schedule)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from accelerando.base.errors import Stopped, UserError
from accelerando.base.files import release
from accelerando.base.log import log, progress_bar, success
from accelerando.train import range_test
from accelerando.train.accelerator import memory_use, peak_memory_mb
from accelerando.train.batches import TrainBatches, Window, report_unreadable
from accelerando.train.state import Run, TrainState
from accelerando.train.stop import StopRequested, stop_noted
from accelerando.train.tracking import as_floats, record

if TYPE_CHECKING:
    import torch

    from accelerando.train.optim import Schedule

LEARNT = 0.1  # share of the first loss at which a few batches count as learnt by heart


def plan_steps(run: Run, batches: TrainBatches) -> None:
    """Sets ``run.total_steps``: the steps taken plus the remaining steps of ``epochs``, at most ``max_steps``.

    With ``overfit_batches``, an epoch is that many steps.
    """
    state, args = run.state, run.args
    batches.overfit_batches = args.overfit_batches
    state.epoch_size = batches.num_samples
    if 0 < state.epoch_size <= state.position:  # resumed with less data
        state.epoch, state.position = state.epoch + 1, 0
    left = sum(
        batches.num_windows(state.position if epoch == state.epoch else 0) for epoch in range(state.epoch, args.epochs)
    )
    run.total_steps = state.step + left if args.max_steps is None else min(state.step + left, args.max_steps)
    if args.find_lr:
        run.total_steps = range_test.STEPS


def training_steps(run: Run, batches: TrainBatches) -> Iterator[Window]:
    """The windows (the samples of an optimizer step) from the run's current position to its last step.

    Ends early after ``early_stop`` evaluations without an improvement.
    """
    state = run.state
    run.bar = progress_bar(run.total_steps, state.step, " steps", "training")
    with run.bar:
        while not run.is_over:
            first = state.step
            log.info("Epoch %d/%d", state.epoch + 1, run.args.epochs)
            run.step_started = time.perf_counter()
            for window in batches.windows(state.epoch, state.position):
                before = state.step
                if run.guard is not None:
                    run.guard.remember()
                if run.range_test is not None:
                    run.range_test.set_rate()
                yield window
                while window.is_repeated:
                    window.is_repeated = False
                    yield window
                if run.range_test is not None and run.range_test.is_over:
                    _end_range_test(run)
                if state.step == before:
                    raise RuntimeError("finish_step was not called for the last window")
                if run.is_over:
                    break
                run.step_started = time.perf_counter()  # the time for logging, evaluating and saving is not counted
            if state.step == first:
                raise UserError(
                    f"no sample is left after {state.position:,} of epoch {state.epoch + 1}: the training data has "
                    f"{batches.num_samples:,} samples now, but had {state.epoch_size:,} when training began"
                )
    report_unreadable(
        run.accelerator, batches.dataset, "training", batches.take_unreadable()
    )  # of a last, partial epoch
    if run.losses:
        _log_overfitting(run)
    if run.out_of_patience:
        log.info("Stopped early: no better %s in %d evaluations", run.args.best_metric, run.args.early_stop)


@dataclass(frozen=True)
class Step:
    """What is due after an optimizer step."""

    run: Run
    evaluates: bool
    save_is_due: bool

    @property
    def saves(self) -> bool:
        """True if a checkpoint is due, also after an evaluation that ends the run.

        Not among steps without a finite gradient: their weights may be the cause, and older checkpoints would go.
        """
        bad = self.run.guard is not None and self.run.guard.in_a_row > 0
        return (self.save_is_due and not bad) or (self.run.is_over and self.run.range_test is None)


def finish_step(run: Run, window: Window, grad_norm: torch.Tensor | float, lr: float) -> Step:
    """Counts the optimizer step over ``window``, on every process; writes a log line if one is due.

    ``lr``: the learning rate of this step. A single collective operation sums the losses, the stop signals and the
    checkpoints that could not be written.

    Raises:
        StopRequested: a process was asked to stop; :func:`train.stop.stoppable` saves and exits.
        UserError: a checkpoint could not be written.
    """
    import torch

    state, args = run.state, run.args
    flags = window.loss_sum.new_tensor([stop_noted(), run.saver.failed], dtype=torch.float64)
    totals = torch.cat([window.loss_sum.double().reshape(1), flags])
    loss, stop, failed = run.accelerator.reduce(totals, reduction="sum").tolist()
    if failed:
        run.saver.wait()
    state.step += 1
    state.position = window.position
    state.samples += window.num_samples
    state.loss_sum += loss
    state.loss_count += window.num_samples
    state.log_loss_sum += loss
    state.log_loss_count += window.num_samples
    if args.overfit_batches:
        run.losses.append(loss / max(1, window.num_samples))
    if run.range_test is not None:
        run.range_test.add(loss / max(1, window.num_samples))
    state.seconds += time.perf_counter() - run.step_started
    state.wait_seconds += window.batches.take_seconds_waited()
    run.bar.update()
    if state.step % args.log_every == 0:
        _log_step(run, lr, float(grad_norm))
    ends_epoch, last = state.position == state.epoch_size, state.step >= run.total_steps
    if ends_epoch:
        state.epoch, state.position = state.epoch + 1, 0
        ends_epoch = not args.overfit_batches  # whose epochs are a step or a few
    if ends_epoch or stop:
        report_unreadable(run.accelerator, window.batches.dataset, "training", window.batches.take_unreadable())
    if stop:
        raise StopRequested
    if run.range_test is not None:
        return Step(run, False, False)
    evaluates, saves = (is_due(every, state.step, ends_epoch, last) for every in (args.eval_every, args.save_every))
    return Step(run, evaluates, saves)


def _end_range_test(run: Run) -> NoReturn:
    """Writes the result and ends the program, on all processes."""
    if run.accelerator.is_main_process:
        range_test.write_result(run.range_test, run.directory, vars(run.args))
    run.accelerator.wait_for_everyone()
    release(run.directory)
    raise Stopped("", 0)


def _log_overfitting(run: Run) -> None:
    """Says whether a few batches were learnt by heart, which any model that is trained rightly can do."""
    count = run.args.overfit_batches
    first, last = (sum(losses) / len(losses) for losses in (run.losses[:count], run.losses[-count:]))
    batches = f"{count} batches" if count > 1 else "one batch"
    change = f"the loss of {batches} went from {first:.4g} to {last:.4g} in {len(run.losses)} steps"
    if last < LEARNT * first:
        success("Learnt by heart: %s", change)
        return
    log.warning("Not learnt by heart: %s", change)
    log.warning("  Try more --epochs, another --lr, no dropout and no augmentation; then look at labels and loss")


def _log_step(run: Run, lr: float, grad_norm: float) -> None:
    state = run.state
    loss = state.log_loss_sum / state.log_loss_count if state.log_loss_count else float("nan")
    state.log_loss_sum, state.log_loss_count = 0.0, 0
    record(run, "train", {"loss": loss, "lr": lr, "grad_norm": grad_norm})
    if loss != loss:
        log.warning("The loss is nan: lower --lr, set --warmup_steps, keep --grad_clip")
    run.bar.set_postfix_str(f"loss {loss:.4f}")
    log.info(
        "train step %d/%d  epoch %.2f  loss %.4f  lr %.3g  grad norm %.3f  %.0f samples/s",
        state.step,
        run.total_steps,
        state.epochs_done,
        loss,
        lr,
        grad_norm,
        state.samples_per_second,
    )


def evaluation_is_due(run: Run) -> bool:
    """True if the evaluation after the last step is still due, because the run was stopped during it."""
    state = run.state
    due = is_due(run.args.eval_every, state.step, state.position == 0, state.step >= run.total_steps)
    return due and state.step > 0 and state.evaluated_step < state.step


def record_evaluation(run: Run, metrics: dict[str, float], schedule: Schedule, **further: float) -> bool:
    """Records an evaluation: history, trackers, early stopping, schedule, log. True: the best so far.

    ``further`` numbers are recorded only in the history and the trackers. Without ``metrics`` (there is no validation
    set) the weights of the last step are the best.
    """
    state, args = run.state, run.args
    state.metrics = metrics = as_floats(metrics)
    if not metrics:
        state.evaluated_step = state.best_step = state.step
        return run.is_over
    train_loss = state.loss_sum / max(1, state.loss_count)
    state.loss_sum, state.loss_count = 0.0, 0
    value = metrics[args.best_metric]
    best = count_evaluation(state, value, args.early_stop_min_delta, run.higher_is_better)
    record(run, "validation", {"train_loss": train_loss, **metrics, "lr": schedule.current_lr, **further, **speed(run)})
    schedule.evaluated(value)
    numbers = "  ".join(f"{name} {text}" for name, text in run.written(metrics, log_only=True))
    log.info("validation %s  (step %d, train loss %.4f)", numbers, state.step, train_loss)
    if best:
        success("New best %s %.4f: saving it in %s", args.best_metric, value, run.directory / "best")
    return best


def speed(run: Run) -> dict[str, float]:
    """Seconds of training, samples per second, the fraction of time waiting for data, and memory in MB."""
    state = run.state
    return {
        "seconds": state.seconds,
        "samples_per_second": state.samples_per_second,
        "data_wait_share": state.data_wait_share,
        "peak_memory_mb": peak_memory_mb(run.accelerator),
        **memory_use(run.accelerator),
    }


def count_evaluation(state: TrainState, value: float, min_delta: float, higher_is_better: bool) -> bool:
    """Updates the best value and the early stopping counter; True if ``value`` is the best so far."""
    state.evaluated_step = state.step
    state.bad_evaluations += 1
    if is_improvement(value, state.patience_value, min_delta, higher_is_better):
        state.patience_value, state.bad_evaluations = value, 0
    best = is_improvement(value, state.best_value, 0.0, higher_is_better)
    if best:
        state.best_value, state.best_step = value, state.step
    return best


def is_due(every: int, step: int, end_of_epoch: bool, last_step: bool) -> bool:
    """True if an action for ``every`` N steps (0: every epoch) is due; it always is after the last step."""
    return last_step or (step % every == 0 if every else end_of_epoch)


def is_improvement(value: float, best: float | None, min_delta: float, higher_is_better: bool) -> bool:
    """True if ``value`` is better than ``best`` by more than ``min_delta``; always for the first value or after nan."""
    if best is None or best != best:
        return True
    return value > best + min_delta if higher_is_better else value < best - min_delta
