"""Differentially private training (DP-SGD, Abadi et al. 2016, arXiv:1607.00133) with Opacus.

Each sample's gradient is clipped to a norm, the clipped gradients of a step are summed, and noise is added to the sum.
A step's samples are a Poisson sample (train.batches), as the accounting of epsilon assumes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import secrets
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError, first_line
from accelerando.base.log import log
from accelerando.base.processes import gather_objects
from accelerando.base.rng import random_state_of
from accelerando.train.batches import TrainBatches
from accelerando.train.state import Run, TrainState

if TYPE_CHECKING:
    import torch
    from opacus.optimizers import DPOptimizer
    from torch.overrides import TorchFunctionMode

ACCOUNTANT = "prv"  # Gopi et al. 2021, arXiv:2106.02848: tight, and an upper bound
MAX_NOISE = 1000  # noise multiplier beyond which the noise hides any sum of gradients
MAX_GRADIENT_ERROR = 0.05  # relative error of a sample's gradient; rounding causes up to 0.01


@dataclass
class Privacy:
    """The state of private training; see :func:`start_privacy`."""

    optimizer: DPOptimizer  # Opacus' optimizer: clips and sums gradients and adds noise
    noise_multiplier: float  # standard deviation of the noise over the maximal gradient norm
    sample_rate: float  # probability that a sample is in a step
    target_delta: float
    state: TrainState

    @property
    def epsilon(self) -> float:
        """The epsilon spent so far, for ``target_delta``."""
        return epsilon_of(spent(self.state), self.target_delta)


def spent(state: TrainState) -> list[list[float]]:
    """The accountant's history: a list of (noise multiplier, sample rate, steps)."""
    return state.extra.get("spent", [])


def require_opacus() -> None:
    """UserError if Opacus is not installed."""
    if importlib.util.find_spec("opacus") is None:
        raise UserError("--trainer_type dp needs opacus: pip install opacus")


# ------------------------------------------------------------------------------------------------------- accounting


def epsilon_of(spent: Sequence[Sequence[float]], delta: float) -> float:
    """The epsilon, for ``delta``, of a history of (noise multiplier, sample rate, steps); infinite without noise."""
    if any(noise == 0 for noise, _, _ in spent):
        return float("inf")
    return _epsilon_of(tuple(map(tuple, spent)), delta) if spent else 0.0


@functools.cache
def _epsilon_of(spent: tuple[tuple[float, float, int], ...], delta: float) -> float:
    from opacus.accountants import create_accountant

    accountant = create_accountant(ACCOUNTANT)
    accountant.history = list(spent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


def noise_for(target_epsilon: float, target_delta: float, sample_rate: float, steps: int) -> float:
    """The smallest noise multiplier, to within 0.01 of epsilon, with which ``steps`` stay within the target.

    Raises:
        UserError: there is none.
    """
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            noise = get_noise_multiplier(
                target_epsilon=target_epsilon,
                target_delta=target_delta,
                sample_rate=sample_rate,
                steps=steps,
                accountant=ACCOUNTANT,
            )
    except (ValueError, RuntimeError):  # beyond Opacus' limit
        noise = math.inf
    if noise > MAX_NOISE:
        raise UserError(
            f"--target_epsilon {target_epsilon:g} is too small for {steps:,} steps (noise beyond {MAX_NOISE} x the "
            "gradient): use a larger one, fewer --epochs or a smaller --batch_size"
        )
    return noise


def steps_within(
    spent: Sequence[Sequence[float]], noise: float, rate: float, epsilon: float, delta: float, most: int
) -> int:
    """How many of up to ``most`` more steps stay within ``epsilon``, given what was ``spent``.

    The last step is the same from whichever step of a run this is computed, so that a resumed run ends at the same
    step as one without interruption.
    """
    before, done = list(spent), 0
    if before and tuple(before[-1][:2]) == (noise, rate):
        done = int(before.pop()[2])

    def fits(steps: int) -> bool:
        return epsilon_of([*before, (noise, rate, steps)], delta) <= epsilon

    if fits(done + most):
        return most
    low, high = 0, done + most  # low fits (or no number does), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return max(0, low - done)


def check_budget(
    batch: int,
    samples: int,
    epochs: int,
    max_steps: int | None,
    noise_multiplier: float | None,
    target_epsilon: float | None,
    target_delta: float,
) -> None:
    """UserError if a new run could not take a single step within its budget; see :func:`start_privacy`."""
    if batch > samples:
        raise UserError(_batch_too_large(batch, samples))
    rate = batch / samples
    steps = min(epochs * -(-samples // batch), max_steps or 2**62)
    if noise_multiplier is None:
        noise_for(target_epsilon, target_delta, rate, steps)
    elif target_epsilon is not None and not steps_within([], noise_multiplier, rate, target_epsilon, target_delta, 1):
        raise UserError(
            f"--noise_multiplier {noise_multiplier:g}: the first step would already spend more than --target_epsilon "
            f"{target_epsilon:g}: use more noise or a larger budget"
        )
    if target_delta >= 1 / samples:
        message = "--target_delta %g guarantees little for %d samples: it should be below 1 / %d"
        log.warning(message, target_delta, samples, samples)


def _batch_too_large(batch: int, samples: int) -> str:
    return f"--batch_size: {batch:,} samples per step on average, but only {samples:,} training samples: lower it"


# ------------------------------------------------------------------------------------------------------------ model


def make_valid(model: torch.nn.Module, size: int) -> None:
    """Prepares a model for per-sample gradients with images of side ``size``: no layer may change its input in place.

    Raises:
        UserError: Opacus cannot compute per-sample gradients of a trained layer (batch norms mix the samples of a
            batch), or they are wrong: they are checked against the gradients of two samples one by one.
    """
    from torch import nn

    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
        # Opacus assumes that the input is contiguous, and silently computes wrong gradients if it is not.
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    forward = model.forward

    def out_of_place(*args: Any, **kwargs: Any) -> Any:
        with _out_of_place():
            return forward(*args, **kwargs)

    model.forward = out_of_place  # ResNets compute `out += identity`, which Opacus' hooks do not support
    problem = _opacus_problem(model, size)
    if problem:
        raise UserError(
            f"--trainer_type dp: Opacus cannot train this model ({problem}): resnet18, vgg11 and efficientnet_b0 of "
            "torchvision and ViTs of transformers work, and any model with --strategy head"
        )


def _opacus_problem(model: torch.nn.Module, size: int) -> str | None:
    """Why per-sample gradients cannot be computed or are wrong; None if they are correct."""
    import torch
    from opacus.validators import ModuleValidator

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = {module: module.training for module in model.modules()}
    problems = ModuleValidator.validate(model.train())
    if problems:
        return first_line(problems[0]).split(". ")[0].rstrip(".")

    def gradients(pixels: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        model(pixel_values=pixels).logits.float().square().sum().backward()
        return [parameter.grad for parameter in trained]

    def off(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
        square = sum((a - b).square().sum() for a, b in zip(one, other, strict=True))
        return float(square / max(1e-30, sum(b.square().sum() for b in other))) ** 0.5

    try:
        with random_state_of((0, 0, 0)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = torch.randn(2, 3, size, size)
            with _per_sample(model):
                gradients(pixels)  # in training mode, with dropout
                if any(getattr(parameter, "grad_sample", None) is None for parameter in trained):
                    return "some of its trained parameters are not used"
            for module in model.modules():
                module.training = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
            with _per_sample(model):
                gradients(pixels)
                single = [parameter.grad_sample.clone() for parameter in trained]
            errors = [off([part[row] for part in single], gradients(pixels[row : row + 1])) for row in range(2)]
    except (RuntimeError, ValueError) as error:  # NotImplementedError too
        return f"{first_line(error):.120}"
    finally:
        for module, training in modes.items():
            module.training = training
        model.zero_grad()
    return None if max(errors) < MAX_GRADIENT_ERROR else f"its per-sample gradients are wrong by {max(errors):.0%}"


@contextlib.contextmanager
def _per_sample(model: torch.nn.Module) -> Iterator[None]:
    from opacus.grad_sample import GradSampleHooks

    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        yield
    finally:
        hooks.cleanup()


def _out_of_place() -> TorchFunctionMode:
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    others = {Tensor.add_: Tensor.add, Tensor.sub_: Tensor.sub, Tensor.mul_: Tensor.mul, Tensor.div_: Tensor.div}

    class OutOfPlace(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = {**(kwargs or {}), "inplace": False} if kwargs and kwargs.get("inplace") else kwargs or {}
            return others.get(func, func)(*args, **kwargs)

    return OutOfPlace()


# --------------------------------------------------------------------------------------------------------- training


def start_privacy(
    run: Run,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: TrainBatches,
    max_grad_norm: float,
    noise_multiplier: float | None,
    noise_seed: int | None,
    target_epsilon: float | None,
    target_delta: float,
) -> Privacy:
    """Attaches Opacus to ``model`` and ``optimizer``, on every process; the model must not be wrapped in DDP.

    ``batches`` become Poisson samples, and ``run.total_steps`` is reduced to the privacy budget.

    Args:
        noise_multiplier: None: the smallest that ``target_epsilon`` allows, or in a resumed run the previous one.
    """
    from opacus.grad_sample import GradSampleHooks
    from opacus.optimizers import DistributedDPOptimizer, DPOptimizer

    accelerator, state = run.accelerator, run.state
    batch, samples = batches.window_size, len(batches.dataset)
    if batch > samples:
        raise UserError(_batch_too_large(batch, samples))
    rate, history = batch / samples, spent(state)
    if noise_multiplier is None:
        noise_multiplier = history[-1][0] if history else None
    if noise_multiplier is None:
        noise_multiplier = noise_for(target_epsilon, target_delta, rate, run.total_steps)
    message = "Private: noise multiplier %.3f, gradients clipped to %g, sampling rate %.4g"
    log.info(message, noise_multiplier, max_grad_norm, rate)
    if target_epsilon is not None and run.total_steps > state.step:
        most = run.total_steps - state.step
        left = steps_within(history, noise_multiplier, rate, target_epsilon, target_delta, most)
        if left < most:
            last = state.step + left
            log.warning("The budget of epsilon %g ends the run at step %d of %d", target_epsilon, last, run.total_steps)
            run.total_steps = last
    if state.extra.get("noise_seed") is None:
        # The seed allows subtracting the noise, so it is stored only in the checkpoints, where exact resume needs it.
        drawn = gather_objects(accelerator, secrets.randbits(62))[0]
        state.extra["noise_seed"] = drawn if noise_seed is None else noise_seed
    batches.poisson_seed = state.extra["noise_seed"]
    GradSampleHooks(model, loss_reduction="sum")
    several = accelerator.num_processes > 1
    private = (DistributedDPOptimizer if several else DPOptimizer)(
        optimizer,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=batch / accelerator.num_processes,
    )
    return Privacy(private, noise_multiplier, rate, target_delta, state)


def clip_and_add(privacy: Privacy, last: bool) -> None:
    """After the backward of a micro-batch: clips each sample's gradient and adds it to the sum.

    After the ``last`` micro-batch of a step it also adds noise, so that the parameters' ``grad`` is ready for the
    optimizer and the same on all processes, and counts the step for the accountant.
    """
    import numpy as np
    import torch

    optimizer, state = privacy.optimizer, privacy.state
    rng = np.random.default_rng([state.extra["noise_seed"], state.step, 3])
    noise_std = optimizer.noise_multiplier * optimizer.max_grad_norm

    def add_noise() -> None:
        # Replaces Opacus' own: torch's CPU generator uses only 32 bits of a seed.
        for parameter in optimizer.params:
            parameter.grad = parameter.summed_grad.view_as(parameter)
            if getattr(optimizer, "rank", 0) == 0:
                noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape), np.float32))
                parameter.grad = parameter.grad + noise_std * noise.to(parameter.device)

    optimizer.add_noise = add_noise
    optimizer.signal_skip_step(do_skip=not last)
    if not optimizer.pre_step():
        optimizer.zero_grad()  # the gradients of this micro-batch; the sum is kept
        return
    if hasattr(optimizer, "reduce_gradients"):
        optimizer.reduce_gradients()
    for parameter in optimizer.params:  # free the per-sample gradients
        parameter.grad_sample = parameter.summed_grad = None
    history = state.extra.setdefault("spent", [])
    part = [privacy.noise_multiplier, privacy.sample_rate]
    if history and list(history[-1][:2]) == part:
        history[-1][2] += 1
    else:
        history.append([*part, 1])


def privacy_results(state: TrainState, delta: float) -> dict[str, Any]:
    """The spent privacy budget for results.json; empty if training was not private."""
    history = spent(state)
    if not history:
        return {}
    names = ("noise_multiplier", "sample_rate", "steps")
    steps = [dict(zip(names, part, strict=True)) for part in history]
    return {"epsilon": epsilon_of(history, delta), "delta": delta, "private": steps}


def privacy_notes(state: TrainState, delta: float) -> dict[str, str]:
    """The spent privacy budget for the summary; empty if training was not private."""
    history = spent(state)
    return {"privacy spent": f"epsilon {epsilon_of(history, delta):.3f} at delta {delta:g}"} if history else {}
