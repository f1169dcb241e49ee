"""Averages of weights: over the steps of a run (EMA), and between old and new weights (WiSE-FT)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Ema:
    """Exponential moving averages of all parameters of ``optimizer``:
    average <- decay * average + (1 - decay) * weight.

    The decay is at most (1 + step) / (10 + step), so that the initial weights are soon forgotten. Works with unsharded
    and sharded parameters. With a ``decay`` of None or 0 the methods do nothing.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float | None) -> None:
        self.decay = decay
        self.steps = 0  # optimizer steps so far, including those before a resume
        groups = optimizer.param_groups if decay else []
        self.weights = [parameter for group in groups for parameter in group["params"]]
        self.averages = [parameter.detach().clone() for parameter in self.weights]

    @property
    def is_on(self) -> bool:
        """True if weights are averaged."""
        return bool(self.decay)

    def update(self) -> None:
        """Updates the averages; call it after each optimizer step."""
        import torch

        self.steps += 1
        if not self.is_on:
            return
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for average, weight in zip(self.averages, self.weights, strict=True):
                average.lerp_(weight.detach(), 1 - decay)

    def take_from_weights(self) -> None:
        """Sets the averages to the current weights."""
        for average, weight in zip(self.averages, self.weights, strict=True):
            average.copy_(weight.detach())


@contextmanager
def averaged(ema: Ema) -> Iterator[None]:
    """Within the block, the model's weights are the averages, if there are any."""
    _exchange(ema)
    try:
        yield
    finally:
        _exchange(ema)


def _exchange(ema: Ema) -> None:
    import torch

    with torch.no_grad():
        for average, weight in zip(ema.averages, ema.weights, strict=True):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)


def trained_weights(model: torch.nn.Module, copy: bool = False) -> dict[str, torch.Tensor]:
    """The trainable parameters by name (under FSDP this process's shards), or copies of them."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: parameter.detach().clone() for name, parameter in trained.items()} if copy else trained


def mix_weights(
    weights: dict[str, torch.Tensor], old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], alpha: float
) -> None:
    """Sets ``weights`` to (1 - alpha) old + alpha new (Wortsman et al. 2021, WiSE-FT, arXiv:2109.01903).

    Of a LoRA product B A, which starts at 0, only B is scaled, which mixes the merged weights in the same way.
    """
    import torch

    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(new[name] if ".lora_A." in name else old[name].lerp(new[name], alpha))
