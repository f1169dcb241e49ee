"""LoRA (Hu et al. 2021, arXiv:2106.09685) with PEFT: target modules for each architecture, attaching, merging."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from accelerando.base.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

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
    "modernbert": ("Wqkv",),
    "mpnet": ("attn.q", "attn.v"),
    "roberta": ("query", "value"),
    "vit": ("q_proj", "v_proj"),
    "xlm-roberta": ("query", "value"),
}


def lora_targets(model: torch.nn.Module) -> tuple[str, ...]:
    """The linear layers that get an adapter: the query and value projections of this architecture.

    Raises:
        UserError: an unknown architecture; lists the names of its linear layers.
    """
    import torch

    kind = model.config.model_type
    linear = {name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    for targets in (ATTENTION_TARGETS.get(kind, ()), ("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin")):
        if targets and all(target.rsplit(".", 1)[-1] in linear for target in targets):
            return targets
    raise UserError(f"no LoRA targets known for {kind}: name them with --lora_targets ({', '.join(sorted(linear))})")


def attach_lora(
    model: torch.nn.Module,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Iterable[str] = (),
    modules_to_save: Iterable[str] = (),
    within: str | None = None,
) -> torch.nn.Module:
    """``model`` with adapters; all other parameters are frozen except ``modules_to_save`` (such as a new head).

    ``within`` restricts the adapters to a part of the model (``vision_model``).

    Raises:
        UserError: a target is not a linear layer of the model.
    """
    from peft import LoraConfig, get_peft_model

    targets = list(targets) or list(lora_targets(model))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if within is None else rf"{within}\..*\.({'|'.join(targets)})",
        modules_to_save=list(modules_to_save) or None,
        bias="none",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora_targets {' '.join(targets)}: {str(error).splitlines()[0]}") from None


def is_lora(model: torch.nn.Module) -> bool:
    """True if ``model`` (unwrapped) has PEFT adapters."""
    return hasattr(model, "peft_config")


def merged_state_dict(model: PeftModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the base model with the adapters merged: W + (alpha / r) B A, as in PEFT.

    ``state`` is the unsharded state dict of the PEFT ``model``; only the state dict is used, so that a sharded model
    need not be gathered.
    """
    config = model.peft_config["default"]
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    merged = {}
    for name, tensor in state.items():
        plain = plain_name(name)
        if plain is None:
            continue
        stem = name.removesuffix(".base_layer.weight")
        if stem != name and f"{stem}.lora_A.default.weight" in state:
            down, up = state[f"{stem}.lora_A.default.weight"], state[f"{stem}.lora_B.default.weight"]
            tensor = (tensor.float() + scaling * (up.float() @ down.float())).to(tensor.dtype)
        merged[plain] = tensor
    return merged


def plain_name(name: str) -> str | None:
    """The name of a PEFT model's tensor in the model without adapters; None: it has no such tensor."""
    if ".lora_" in name or ".original_module." in name:
        return None
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)


def adapter_name(name: str) -> str | None:
    """The name of a tensor in PEFT's adapter file; None: the file does not contain it."""
    if ".lora_" in name:
        return re.sub(r"\.(lora_\w+)\.default\b", r".\1", name)
    if ".modules_to_save." in name:
        return re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
    return None
