"""LoRA (Hu et al. 2021, arXiv:2106.09685) with PEFT: target modules for each architecture, attaching, merging."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from accelerando.base.errors import UserError
from accelerando.base.log import log

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from peft import LoraConfig, PeftModel

MERGED = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")  # PEFT's layers, Linear also for GPT-2's Conv1D
ALL_LINEAR = "all-linear"
TOLERANCE = 1e-3  # of merged logits, relative to the largest one: above float32's error in deep models

# The attention projections of each model type in transformers 5; PEFT has no default for most of these.
ATTENTION_TARGETS: dict[str, tuple[str, ...]] = {
    "albert": ("query", "value"),
    "bert": ("query", "value"),
    "camembert": ("query", "value"),
    "clip": ("q_proj", "v_proj"),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "electra": ("query", "value"),
    "gpt2": ("c_attn",),
    "modernbert": ("Wqkv",),
    "mpnet": ("attn.q", "attn.v"),
    "roberta": ("query", "value"),
    "vit": ("q_proj", "v_proj"),
    "xlm-roberta": ("query", "value"),
}


def lora_targets(model: torch.nn.Module) -> tuple[str, ...]:
    """The layers that get an adapter: the query and value projections of this architecture.

    Raises:
        UserError: an unknown architecture; lists the names of its linear layers.
    """
    kind, linear = model.config.model_type, linear_names(model)
    for targets in (ATTENTION_TARGETS.get(kind, ()), ("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin")):
        if targets and all(target.rsplit(".", 1)[-1] in linear for target in targets):
            return targets
    raise UserError(f"no LoRA targets known for {kind}: name them with --lora_targets ({', '.join(linear)})")


def linear_names(model: torch.nn.Module) -> list[str]:
    """The last parts of the names of the linear layers, sorted."""
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D)
    return sorted({name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, kinds)})


def attach_lora(
    model: torch.nn.Module,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Iterable[str] = (),
    rank_stabilised: bool = False,
    dora: bool = False,
    modules_to_save: Iterable[str] = (),
    within: Sequence[str] = (),
) -> torch.nn.Module:
    """``model`` with adapters; all other parameters are frozen except ``modules_to_save`` (such as a new head).

    ``targets``: last parts of names of layers, or ``all-linear``: every linear layer but those of ``modules_to_save``.
    ``within``: the parts of the model that get adapters, such as ``vision_model``; by default the whole model.
    ``rank_stabilised``: the adapters' scale is alpha / sqrt(rank), not alpha / rank (Kalajdzievski 2023,
    arXiv:2312.03732). ``dora``: the lengths of the rows of a weight are learnt apart from their directions (Liu et al.
    2024, arXiv:2402.09353).

    Raises:
        UserError: a target is not in the model, or adapters for its kind of layer cannot be merged.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    known = {name for name, _ in model.named_modules()} if within else set()
    if lacking := [name for name in within if name not in known]:
        raise UserError(f"LoRA: a {model.config.model_type} has no {lacking[0]}")
    parts = [model.get_submodule(name) for name in within] or [model]
    targets = list(targets) or list(dict.fromkeys(name for part in parts for name in lora_targets(part)))
    everything = targets == [ALL_LINEAR]
    names = "|".join(re.escape(target) for target in targets)
    chosen = rf"({'|'.join(map(re.escape, within))})\.(.*\.)?({names})" if within else targets
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_all_linear(model, tuple(modules_to_save), within) if everything else chosen,
        use_rslora=rank_stabilised,
        use_dora=dora,
        modules_to_save=list(modules_to_save) or None,
        bias="none",
    )
    try:
        adapted = _with_adapters(model, config)
    except ValueError as error:
        raise UserError(f"--lora_targets {' '.join(targets)}: {str(error).splitlines()[0]}") from None
    for name, layer in adapted.named_modules():
        known = MERGED[:1] if dora else MERGED
        if isinstance(layer, LoraLayer) and type(layer).__name__ not in known:
            raise UserError(f"--lora_targets {' '.join(targets)}: no adapter for {plain_name(name)}, which is a "
                            f"{type(layer.get_base_layer()).__name__}")  # fmt: skip
    for name in within:
        layers = adapted.get_base_model().get_submodule(name).modules()
        if not any(isinstance(layer, LoraLayer) for layer in layers):
            there = ", ".join(linear_names(model.get_submodule(name)))
            log.warning("--lora_targets %s: %s has none of them and gets no adapter; its layers are %s",
                        " ".join(targets), name, there)  # fmt: skip
    return adapted


def _all_linear(model: torch.nn.Module, kept: Sequence[str], within: Sequence[str]) -> list[str]:
    """The full names of the linear layers in the parts ``within``, except those of the modules ``kept``."""
    import torch
    from transformers.pytorch_utils import Conv1D

    names = [name for name, layer in model.named_modules() if isinstance(layer, (torch.nn.Linear, Conv1D))]
    in_head = {each for each in names for name in kept if each == name or each.startswith(f"{name}.")}
    in_parts = [name for name in names if not within or name.startswith(tuple(f"{part}." for part in within))]
    return [name for name in in_parts if name not in in_head]


def _with_adapters(model: torch.nn.Module, config: LoraConfig) -> PeftModel:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fan_in_fan_out, which it sets right, and names of the base model
        return get_peft_model(model, config)


def is_lora(model: torch.nn.Module) -> bool:
    """True if ``model`` (unwrapped) has PEFT adapters."""
    return hasattr(model, "peft_config")


def merged_state_dict(model: PeftModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the base model with the adapters merged: W + what PEFT's layers add to it.

    ``state`` is the unsharded state dict of the PEFT ``model``; only the state dict is used, so that a sharded model
    need not be gathered.
    """
    from peft.tuners.lora import LoraLayer
    from torch.func import functional_call

    merged = {plain: tensor for name, tensor in state.items() if (plain := plain_name(name)) is not None}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            own = {f"layer.{key.removeprefix(f'{name}.')}": state[key] for key in state if f"{name}.lora_" in key}
            added = functional_call(_delta_class()(layer), own, ())
            plain = f"{plain_name(name)}.weight"
            weight = merged[plain].float() + added.float()
            length = state.get(f"{name}.lora_magnitude_vector.default.weight")
            if length is not None:  # DoRA: rows (of GPT-2's Conv1D, columns) of this length
                dim = 0 if layer.fan_in_fan_out else 1
                weight = weight * (length.float() / weight.norm(dim=dim)).unsqueeze(dim)
            merged[plain] = weight.to(merged[plain].dtype)
    return merged


@functools.cache
def _delta_class() -> type[torch.nn.Module]:
    """The class, created on first use so that importing this file does not import torch."""
    import torch

    class Delta(torch.nn.Module):
        """What the adapter of a PEFT layer adds to its weight, which depends on the kind of layer."""

        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self) -> torch.Tensor:
            return self.layer.get_delta_weight("default")

    return Delta


def check_merged(
    model: PeftModel,
    state: dict[str, torch.Tensor],
    folder: Path,
    outputs: Callable[[torch.nn.Module], torch.Tensor],
) -> None:
    """Compares the merged model in ``folder`` with the trained one: base weights and adapters of ``state``.

    ``outputs`` computes the logits of one batch with a model of the base's class. The trained one is rebuilt, since
    that of the run may be sharded or under autocast. The random state is kept.

    Raises:
        UserError: the logits differ.
    """
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        plain = type(model.get_base_model()).from_pretrained(folder, dtype=torch.float32).eval()
        merged = outputs(plain)
        trained = _with_adapters(plain, copy.deepcopy(model.peft_config["default"]))  # puts the adapters into plain
        own = trained.state_dict()
        kept = {name: tensor.reshape(own[name].shape) for name, tensor in state.items() if name in own}
        trained.load_state_dict(kept)
        expected = outputs(plain.eval())
    largest = float(expected.nan_to_num().abs().max())
    if not torch.allclose(merged, expected, rtol=0, atol=TOLERANCE * max(largest, 1e-3), equal_nan=True):
        raise UserError(
            f"the merged weights give other results than the trained adapters ({merged.flatten()[0]:.4g} instead of "
            f"{expected.flatten()[0]:.4g}): nothing was saved"
        )


def plain_name(name: str) -> str | None:
    """The name of a PEFT model's tensor in the model without adapters; None: it has no such tensor."""
    if ".lora_" in name or ".original_module." in name:
        return None
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)


def adapter_name(name: str) -> str | None:
    """The name of a tensor in PEFT's adapter file; None: the file does not contain it."""
    if ".lora_magnitude_vector." in name:
        return name.replace(".default.weight", "")
    if ".lora_" in name:
        return re.sub(r"\.(lora_\w+)\.default\b", r".\1", name)
    if ".modules_to_save." in name:
        return re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
    return None
