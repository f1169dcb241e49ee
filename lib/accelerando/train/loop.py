"""The bookkeeping of a training loop: steps, epochs, patience, what is due."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerando.base.log import log
from accelerando.train.accelerator import peak_memory_mb
from accelerando.train.tracking import record

if TYPE_CHECKING:
    from accelerando.train.state import Run, TrainState

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
    import torch

    from accelerando.train.batches import TrainBatches, Window


def after_step(run: Run, window: Window, loss_sum: torch.Tensor) -> bool:
    """Counts the optimizer step over ``window``; True when some process was asked to stop.

    ``loss_sum`` is the sum of this process's sample losses; one collective adds them up and carries the stop signal.
    """
    import torch

    stop = float(run.stop.received is not None)
    totals = torch.stack([loss_sum.detach().double(), loss_sum.new_tensor(stop, dtype=torch.float64)])
    loss, stop = run.accelerator.reduce(totals, reduction="sum").tolist()
    state = run.state
    state.step += 1
    state.position = window.position
    state.samples += window.num_samples
    state.loss_sum += loss
    state.loss_count += window.num_samples
    state.log_loss_sum += loss
    state.log_loss_count += window.num_samples
    return stop > 0


def plan_steps(run: Run, batches: TrainBatches, epochs: int, max_steps: int | None) -> int:
    """The optimizer steps of the whole run: those taken and those left of ``epochs``, but ``max_steps`` at most."""
    state = run.state
    state.epoch_size = len(batches.dataset)
    left = sum(
        batches.num_windows(state.position if epoch == state.epoch else 0) for epoch in range(state.epoch, epochs)
    )
    return state.step + left if max_steps is None else min(state.step + left, max_steps)


def log_step(run: Run, bar: Any, total_steps: int, lr: float, grad_norm: float) -> None:
    """One line on the steps since the last one: mean loss, learning rate, gradient norm, samples per second."""
    state = run.state
    loss = state.log_loss_sum / max(1, state.log_loss_count)
    state.log_loss_sum, state.log_loss_count = 0.0, 0
    record(run, "train", {"loss": loss, "lr": lr, "grad_norm": grad_norm})
    if loss != loss:
        log.warning("The loss is nan: lower --lr, set --warmup_steps, keep --grad_clip")
    bar.set_postfix_str(f"loss {loss:.4f}")
    log.info(
        "train step %d/%d  epoch %.2f  loss %.4f  lr %.3g  grad norm %.3f  %.0f samples/s",
        state.step, total_steps, state.epochs_done, loss, lr, grad_norm, state.samples / state.seconds,
    )  # fmt: skip


def speed(run: Run) -> dict[str, float]:
    """Seconds of training, samples per second, the share of waiting for data, and memory, for the records."""
    state = run.state
    values = {
        "seconds": state.seconds,
        "samples_per_second": state.samples / state.seconds,
        "data_wait_share": state.wait_seconds / state.seconds,
        "peak_memory_mb": peak_memory_mb(run.accelerator),
    }
    if run.accelerator.device.type == "cuda":
        import torch

        values["gpu_allocated_mb"] = torch.cuda.memory_allocated() / 1e6
        values["gpu_reserved_mb"] = torch.cuda.memory_reserved() / 1e6
    return values


def take_train_loss(state: TrainState) -> float:
    """The mean loss of the samples since the last evaluation; the count starts anew."""
    loss = state.loss_sum / max(1, state.loss_count)
    state.loss_sum, state.loss_count = 0.0, 0
    return loss


def count_evaluation(state: TrainState, value: float, min_delta: float, higher_is_better: bool) -> bool:
    """Notes what an evaluation found, for the best weights and for patience; True when ``value`` is the best so far."""
    state.evaluated_step = state.step
    state.bad_evaluations += 1
    if is_improvement(value, state.patience_value, min_delta, higher_is_better):
        state.patience_value, state.bad_evaluations = value, 0
    best = is_improvement(value, state.best_value, 0.0, higher_is_better)
    if best:
        state.best_value, state.best_step = value, state.step
    return best


def evaluation_was_stopped(state: TrainState, eval_every: int, total_steps: int) -> bool:
    """Whether the run was stopped inside the evaluation that belongs to its last step."""
    due = is_due(eval_every, state.step, state.position == 0, state.step == total_steps)
    return due and state.step > 0 and state.evaluated_step < state.step


def is_due(every: int, step: int, end_of_epoch: bool, last_step: bool) -> bool:
    """Whether something that happens ``every`` N steps (0: every epoch) happens now; it always does at the end."""
    return last_step or (step % every == 0 if every else end_of_epoch)


def is_improvement(value: float, best: float | None, min_delta: float, higher_is_better: bool) -> bool:
    """Whether ``value`` beats ``best`` by more than ``min_delta``; the first one does, and anything beats nan."""
    if best is None or best != best:
        return True
    return value > best + min_delta if higher_is_better else value < best - min_delta


def out_of_patience(state: TrainState, early_stop: int | None) -> bool:
    """Whether ``early_stop`` evaluations in a row brought no improvement."""
    return early_stop is not None and state.bad_evaluations >= early_stop
