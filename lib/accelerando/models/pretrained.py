"""Models of transformers by name or folder: opened or made from their config, with errors in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def class_labels(names: list[str]) -> dict[str, Any]:
    """What a config says of its classes."""
    numbers = {name: number for number, name in enumerate(names)}
    return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": numbers}


def open_config(name: str, **settings: Any) -> PreTrainedConfig:
    """The config of the model ``name``, a folder or a name on the Hub, with other ``settings``."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, **settings)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name {name} cannot be opened: {first_line(error)}") from None


def open_model(auto_class: Any, name: str, from_scratch: bool = False, **settings: Any) -> PreTrainedModel:
    """The model ``name`` through one of transformers' auto classes, or one with random weights from its ``config``.

    In float32, whatever the checkpoint holds: mixed precision casts as it computes, and updates need all digits.
    """
    import torch

    try:
        if from_scratch:
            return auto_class.from_config(settings.pop("config"), dtype=torch.float32, **settings)
        return auto_class.from_pretrained(name, dtype=torch.float32, ignore_mismatched_sizes=True, **settings)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name {name} cannot be loaded: {first_line(error)}") from None


def most_tokens(model: PreTrainedModel) -> int | None:
    """The longest input that the model's position embeddings allow; None where there is no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if limit and getattr(positions, "padding_idx", None) is not None:  # RoBERTa counts from behind the padding's number
        limit -= positions.padding_idx + 1
    return limit
