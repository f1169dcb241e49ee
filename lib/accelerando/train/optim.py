"""Parameter groups, optimizers (also 8-bit) and learning rate schedules in optimizer steps."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from accelerando.base.errors import UserError
from accelerando.train.layerwise import decay_factors

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

OptimizerName = Literal["adamw", "sgd", "adamw8bit", "lion8bit", "paged_adamw", "paged_adamw8bit", "paged_lion8bit"]
SchedulerName = Literal["linear", "cosine", "constant", "polynomial", "onecycle", "plateau", "step", "warmup_cosine"]

# Optimizer name -> class in bitsandbytes.
BITSANDBYTES = {
    "adamw8bit": "AdamW8bit",
    "lion8bit": "Lion8bit",
    "paged_adamw": "PagedAdamW32bit",
    "paged_adamw8bit": "PagedAdamW8bit",
    "paged_lion8bit": "PagedLion8bit",
}


def parameter_groups(
    model: torch.nn.Module,
    lr: float,
    weight_decay: float,
    layers: Sequence[Sequence[str]] = (),
    layer_decay: float = 1,
    factors: Mapping[str, float] | None = None,
    plain_first: bool = False,
) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: weight decay for matrices, none for vectors (biases, norms, scales).

    With ``layers`` (names of parameters from the input to the head, :func:`train.layerwise.layers_of`) each layer has
    groups of its own: the last layer with ``lr``, each layer before with ``layer_decay`` times the learning rate of
    the next. ``factors`` of the learning rate by the name of a parameter (1 for others) are an alternative
    (:func:`train.layerwise.part_factors`). The largest factor's groups, such as the head's, come first: theirs is the
    learning rate that is logged. With ``plain_first`` those with ``lr`` itself do.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = decay_factors(layers, layer_decay) if factors is None else factors
    groups = []
    order = sorted({factors.get(name, 1.0) for name in trainable}, key=lambda one: (plain_first and one != 1, -one))
    for factor in order:
        members = [parameter for name, parameter in trainable.items() if factors.get(name, 1.0) == factor]
        layer_lr = lr * factor
        for decay, chosen in (
            (weight_decay, [parameter for parameter in members if parameter.ndim >= 2]),
            (0.0, [parameter for parameter in members if parameter.ndim < 2]),
        ):
            if chosen:
                groups.append({"params": chosen, "lr": layer_lr, "weight_decay": decay})
    return groups


def make_optimizer(
    model: torch.nn.Module,
    name: OptimizerName,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
    sharded: bool = False,
    layers: Sequence[Sequence[str]] = (),
    layer_decay: float = 1.0,
    factors: Mapping[str, float] | None = None,
    plain_first: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer for all trainable parameters of ``model``; paged optimizers use paging only on a CUDA GPU.

    ``layers``, ``layer_decay``, ``factors`` and ``plain_first``: see :func:`parameter_groups`.

    Raises:
        UserError: no parameter is trainable, or the optimizer is from bitsandbytes and parameters are sharded.
    """
    import torch

    groups = parameter_groups(model, lr, weight_decay, layers, layer_decay, factors, plain_first)
    if not groups:
        raise UserError("no parameter is trainable: the strategy froze all of them")
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--optimizer {name} needs bitsandbytes: pip install bitsandbytes")
    if sharded:
        raise UserError(f"--optimizer {name} does not support sharded parameters (FSDP): use --optimizer adamw")
    import bitsandbytes

    kind = getattr(bitsandbytes.optim, BITSANDBYTES[name])
    return kind(groups, lr=lr, betas=betas, **({} if "lion" in name else {"eps": eps}))


def warmup_in_steps(warmup: float, total_steps: int) -> int:
    """Warm-up in optimizer steps; a value below 1 is a fraction of ``total_steps``."""
    return math.ceil(warmup * total_steps) if warmup < 1 else min(int(warmup), total_steps)


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    name: SchedulerName,
    total_steps: int,
    warmup: float = 0.0,
    factor: float = 0.5,
    plateau_patience: int = 2,
    higher_is_better: bool = True,
    step_size: int = 1,
) -> Schedule:
    """A learning rate schedule over ``total_steps`` optimizer steps; call its ``step`` after each of them.

    ``linear``, ``cosine`` and ``polynomial`` (power 1 down to 1e-7, as in transformers) decrease until the end,
    ``constant`` does not change, ``warmup_cosine`` is ``cosine`` with a default warm-up of 5 %, ``onecycle`` is Smith's
    1cycle policy (arXiv:1708.07120) from torch with the warm-up as its rising part (default: 30 %), ``plateau``
    multiplies the learning rate by ``factor`` when the evaluated metric stops improving, ``step`` does so every
    ``step_size`` optimizer steps.
    """
    import torch

    total_steps = max(1, total_steps)
    if name == "warmup_cosine":
        name, warmup = "cosine", warmup or 0.05
    steps = warmup_in_steps(warmup, total_steps)
    if steps > total_steps // 2 > 2:
        from accelerando.base.log import log

        log.warning("Warm-up takes %d of %d steps: --warmup_steps 0.1 is a tenth of them", steps, total_steps)
    if name == "onecycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        share = min(max(steps / total_steps, 1 / total_steps), 1.0) if steps else 0.3
        # One more step than torch expects, because it is also stepped after the last update.
        inner = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, peaks, total_steps + 1, pct_start=share, cycle_momentum=False
        )
        return Schedule(inner, None)
    if name == "plateau":
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="max" if higher_is_better else "min", factor=factor, patience=plateau_patience
        )
    else:
        plateau = None
    peak = optimizer.defaults["lr"]
    inner = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(name, step, total_steps, steps, peak, factor, step_size)
    )
    return Schedule(inner, plateau, warmup_steps=0 if plateau is None else steps)


def rate_factor(
    name: str, step: int, total_steps: int, warmup: int, peak: float, factor: float = 0.5, step_size: int = 1
) -> float:
    """Learning rate of optimizer step ``step`` (from 0) as a fraction of ``peak``, as in transformers' schedules."""
    if step < warmup:
        return step / warmup
    if name == "step":
        return factor ** (step // step_size)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if name == "linear":
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup))
    if name == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if name == "polynomial":
        final = 1e-7
        return final / peak if step > total_steps else ((peak - final) * (1 - progress) + final) / peak
    return 1.0  # constant, plateau


class Schedule:
    """A schedule that depends on steps, and perhaps one that depends on a metric; checkpoints contain both."""

    def __init__(self, inner: LRScheduler, plateau: ReduceLROnPlateau | None, warmup_steps: int = 0) -> None:
        self.inner = inner
        self.plateau = plateau
        self.warmup_steps = warmup_steps
        self.steps = 0
        self.lr = self.current_lr  # learning rate of the last step (of the first group)

    @property
    def current_lr(self) -> float:
        """The learning rate of the next step (of the first group)."""
        return self.inner.optimizer.param_groups[0]["lr"]

    def step(self, skipped: bool = False) -> None:
        """Call after each optimizer step; ``skipped``: fp16's scaler skipped the update because of an overflow."""
        self.lr = self.current_lr
        if skipped:
            return
        self.steps += 1
        if self.plateau is None or self.steps <= self.warmup_steps:
            self.inner.step()

    def evaluated(self, value: float) -> None:
        """Call after each evaluation with the value of ``best_metric``; affects only ``plateau``, after the warm-up."""
        if self.plateau is not None and self.steps >= self.warmup_steps:
            self.plateau.step(value)

    def state_dict(self) -> dict[str, Any]:
        """The counters, as JSON types."""
        states = {"steps": self.steps, "inner": _numbers(self.inner.state_dict())}
        if self.plateau is not None:
            states["plateau"] = _numbers(self.plateau.state_dict())
        return states

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the counters of ``state``; keeps this run's length of the schedule, so that a run can be extended."""
        self.steps = state["steps"]
        kept = {key: value for key, value in state["inner"].items() if key not in ("total_steps", "base_lrs")}
        if hasattr(self.inner, "lr_lambdas"):
            kept["lr_lambdas"] = [None] * len(self.inner.lr_lambdas)  # required by torch; None keeps this run's own
        self.inner.load_state_dict(kept)
        if hasattr(self.inner, "lr_lambdas") and self.plateau is None:  # a changed --lr applies from the next step on
            for group, base, factor in zip(
                self.inner.optimizer.param_groups, self.inner.base_lrs, self.inner.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(self.inner.last_epoch)
        if self.plateau is not None and "plateau" in state:
            own = ("factor", "patience", "mode", "min_lrs", "default_min_lr")
            self.plateau.load_state_dict({key: value for key, value in state["plateau"].items() if key not in own})


def _numbers(state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a scheduler's state that JSON can represent; drops functions."""
    kept = {}
    for key, value in state.items():
        if isinstance(value, bool | int | float | str) or value is None:
            kept[key] = value
        elif isinstance(value, list | tuple) and all(isinstance(item, bool | int | float | None) for item in value):
            kept[key] = list(value)
    return kept
