"""A model's layers from input to head, for layer-wise learning rates and gradual unfreezing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from accelerando.base.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def layers_of(model: torch.nn.Module, head: tuple[str, ...]) -> list[list[str]]:
    """Names of all parameters, a list for each layer from the input on; the last one is the head.

    ``head``: prefixes of the names of the head's parameters. A layer is a block of a stage (a residual block, a
    Transformer layer), or a module outside of stages; a norm belongs to the layer before it, and a parameter without a
    module of its own (a position embedding) to the first layer.
    """
    groups: list[list[str]] = [[]]
    owners: dict[str, int] = {}
    total = sum(parameter.numel() for parameter in model.parameters())
    _collect(model, "", False, total, groups, owners)
    layers = [[name for name, _ in model.named_parameters() if owners[name] == number] for number in range(len(groups))]
    body = [[name for name in layer if not name.startswith(head)] for layer in layers]
    return [*(layer for layer in body if layer), [name for name in owners if name.startswith(head)]]


def _collect(
    module: torch.nn.Module, prefix: str, in_stage: bool, total: int, groups: list[list[str]], owners: dict[str, int]
) -> None:
    """Assigns a layer number to the parameters of ``module``; ``groups`` has an entry for each layer so far."""
    from torch import nn

    for name, _ in module.named_parameters(prefix[:-1], recurse=False):
        owners[name] = 0
    container = type(module) in (nn.Sequential, nn.ModuleList)
    for name, child in module.named_children():
        sizes = [parameter.numel() for parameter in child.parameters()]
        if not sizes:
            continue
        stage = type(child) in (nn.Sequential, nn.ModuleList)
        single = all(not list(inner.children()) for inner in child.children())  # only convolutions, norms, ...
        # Outside of stages, a module with most of the parameters is a wrapper around the stages.
        wrapper = not in_stage and sum(sizes) > total / 2
        opened = not (single and (in_stage or container)) if stage else wrapper
        if opened and list(child.children()):
            _collect(child, f"{prefix}{name}.", in_stage or stage, total, groups, owners)
            continue
        norm = all(parameter.ndim < 2 for parameter in child.parameters())
        if not norm or not groups[-1]:
            if groups[-1]:
                groups.append([])
            groups[-1].append(f"{prefix}{name}")
        for inner, _ in child.named_parameters(f"{prefix}{name}"):
            owners[inner] = len(groups) - 1


def train_from(model: torch.nn.Module, layers: Sequence[Sequence[str]], count: int) -> None:
    """Makes only the last ``count`` of ``layers`` trainable."""
    chosen = {name for layer in layers[max(0, len(layers) - count) :] for name in layer}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def reinitialise(model: PreTrainedModel, head: tuple[str, ...], count: int) -> None:
    """Gives the last ``count`` layers below the head new random weights (Zhang et al. 2020, arXiv:2006.05987).

    Raises:
        UserError: there are no more layers than that.
    """
    import torch

    body = [layer for layer in layers_of(model, head)[:-1] if layer]
    if count >= len(body):
        raise UserError(f"--reinit_layers {count}: the model has {len(body)} layers below its head")
    chosen = {name for layer in body[len(body) - count :] for name in layer}
    with torch.no_grad():
        for prefix, module in model.named_modules():
            own = {
                f"{prefix}.{name}" if prefix else name: each for name, each in module.named_parameters(recurse=False)
            }
            if own.keys() & chosen:
                for parameter in own.values():
                    parameter._is_hf_initialized = False  # transformers' initialisation leaves loaded weights alone
                model._init_weights(module)


def decay_factors(layers: Sequence[Sequence[str]], decay: float) -> dict[str, float]:
    """Factors of the learning rate for the parameters of ``layers``: 1 in the last, ``decay`` times that of the next in
    each before it (Howard and Ruder 2018, arXiv:1801.06146; Bao et al. 2021, arXiv:2106.08254)."""
    return {name: decay**distance for distance, names in enumerate(reversed(layers)) for name in names}


def layers_of_part(model: torch.nn.Module, part: str) -> list[list[str]]:
    """The layers of the module called ``part`` (an image tower), as :func:`layers_of` gives them, without a head.

    Names are those in ``model``, which may be wrapped. Empty: it has no such part.
    """
    place = next((name for name, _ in model.named_modules() if name.rpartition(".")[2] == part), None)
    if place is None:
        return []
    layers = layers_of(model.get_submodule(place), ())
    return [[f"{place}.{name}" for name in layer] for layer in layers if layer]


def part_factors(model: torch.nn.Module, parts: Mapping[str, float], decay: float = 1.0) -> dict[str, float]:
    """Factors of the learning rate: of each part's last layer the given one, further down times ``decay`` a layer.

    Parameters outside of the parts have no factor, which means 1.
    """
    found = {}
    for part, factor in parts.items():
        factors = decay_factors(layers_of_part(model, part), decay)
        found |= {name: factor * value for name, value in factors.items()}
    return found


def below_last(model: torch.nn.Module, part: str, count: int) -> set[str]:
    """The names of the parameters of ``part`` below its last ``count`` layers.

    Raises:
        UserError: it has fewer layers.
    """
    layers = layers_of_part(model, part)
    if count > len(layers):
        raise UserError(f"the last {count} blocks are to be trained, but {part} has {len(layers)}")
    return {name for layer in layers[: len(layers) - count] for name in layer}


def train_mode(model: torch.nn.Module, towers: Sequence[str] = (), keep_statistics: bool = False) -> None:
    """``model.train()``, but batch norms that are not trained keep their statistics (with ``keep_statistics`` all do),
    and a module with one of the names ``towers`` that is not trained at all computes what it does in evaluation."""
    from torch.nn.modules.batchnorm import _BatchNorm

    model.train()
    for module in model.modules():
        parameters = list(module.parameters(recurse=False)) if isinstance(module, _BatchNorm) else []
        if parameters and (keep_statistics or not any(parameter.requires_grad for parameter in parameters)):
            module.eval()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in towers and not any(each.requires_grad for each in module.parameters()):
            module.eval()
