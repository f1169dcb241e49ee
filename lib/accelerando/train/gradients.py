"""Steps whose gradient is not finite: the cause is named, the step is repeated without the samples that cause it.

A loop asks after each clipping::

    grad_norm = accelerator.clip_grad_norm_(model.parameters(), ...)
    if step_is_repeated(run, window, grad_norm):
        continue

The window is computed three times at most. The second pass, with the same random numbers, watches every module and
finds the first output that is not finite and its samples; the third is without them. Where there are none, or it does
not help, the gradients are dropped, so that the optimizer changes nothing in this step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from accelerando.base.errors import UserError
from accelerando.base.log import log
from accelerando.base.processes import gather_objects
from accelerando.train.guard import Watch
from accelerando.train.inspection import write_gradients

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from accelerando.train.batches import Window
    from accelerando.train.state import Run

SHOWN = 5  # samples named in a line


def step_is_repeated(run: Run, window: Window, grad_norm: torch.Tensor | float) -> bool:
    """True where the loop has to compute ``window`` again, because its gradient is not finite; see the module's text.

    ``grad_norm``: the norm over all processes. Call it on all of them, after the clipping and before the optimizer's
    step. Where the gradient cannot be saved it is dropped: the optimizer then has nothing to do.

    Raises:
        UserError: ``max_bad_steps`` steps in a row had no finite gradient.
    """
    guard, accelerator = run.guard, run.accelerator
    if math.isfinite(float(grad_norm)):
        guard.in_a_row = 0
        if window.watch is not None:  # the same pass again was finite
            window.watch.stop()
        if run.args.inspect:
            write_gradients(run)
        return False
    if run.range_test is not None:  # its learning rate is too high by now
        return False
    if accelerator.scaler is not None:  # fp16: gradients overflow while its scale is found
        loss = accelerator.reduce(window.loss_sum.detach().clone(), reduction="sum")
        if math.isfinite(float(loss)):
            return False
        return _drop(run, window, "the loss")
    if window.watch is None and not window.left_out:
        guard.go_back()
        window.again(Watch(guard.model))
        return True
    if window.watch is None:  # it did not help to leave samples out
        return _drop(run, window, "the gradient")
    window.watch.stop()
    found = gather_objects(accelerator, (window.watch.cause, window.watch.rows))
    causes = [cause for cause, _ in found if cause]
    cause, rows = causes[0] if causes else "the gradient", set().union(*(rows for _, rows in found))
    if not rows or rows >= set((window.rows % len(window.batches.dataset)).tolist()):
        return _drop(run, window, cause)
    names = [window.batches.dataset.problem(row).removesuffix(": it can be read now") for row in sorted(rows)[:SHOWN]]
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    log.warning("Step %d: %s is infinite or NaN for %s%s", run.state.step + 1, cause, ", ".join(names), more)
    log.warning("  The step is computed again without %s", "it" if len(rows) == 1 else "them")
    guard.go_back()
    window.again(None, rows)
    return True


def _drop(run: Run, window: Window, cause: str) -> bool:
    """Drops the gradients of a step, so that it changes nothing; False."""
    guard, limit = run.guard, run.args.max_bad_steps
    guard.go_back()
    guard.in_a_row += 1
    log.warning("Step %d: %s is infinite or NaN: nothing is learnt in it", run.state.step + 1, cause)
    window.count_nothing()
    if guard.in_a_row >= limit:
        raise UserError(
            f"{cause} was infinite or NaN in {limit} steps in a row (--max_bad_steps): {_how_to_go_on(run)}, with a "
            "lower --lr or --grad_clip, or more --warmup_steps"
        )
    return False


def _how_to_go_on(run: Run) -> str:
    """Names the newest checkpoint whose weights are finite."""
    import torch
    from safetensors import safe_open

    def is_finite(folder: Path) -> bool:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            tensors = (file.get_tensor(name) for name in file.keys())  # noqa: SIM118
            return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

    for folder in sorted(run.checkpoints.glob("step_*"), reverse=True):
        if (folder / "model.safetensors").is_file() and is_finite(folder):
            return f"the last good checkpoint is {folder}; go on with --resume {folder}"
    return "there is no checkpoint from before; start again with --overwrite"
