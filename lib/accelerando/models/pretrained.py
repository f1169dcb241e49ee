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


def head_names(model: PreTrainedModel) -> tuple[str, ...]:
    """How the names of the classification head's parameters begin: ``("classifier.",)``."""
    if hasattr(model, "head_name"):
        return (f"{model.head_name()}.",)
    if hasattr(model, "timm_model"):  # timm's nets inside transformers
        last = model.timm_model.get_classifier()
        return tuple(f"{name}." for name, module in model.named_modules() if module is last)
    bodies = (model.base_model_prefix, "vision_model")  # CLIP's and SigLIP's classifiers have half of their model
    others = {name: child for name, child in model.named_children() if name not in bodies}
    return tuple(f"{name}." for name, child in others.items() if list(child.parameters()))


def open_classifier(name: str, **settings: Any) -> PreTrainedModel:
    """An image classifier of transformers or of ours, with a new head where its own is for other classes."""
    from transformers import AutoModelForImageClassification

    import accelerando.models.vision  # noqa: F401  (so that a net that was saved here opens too)

    return open_model(AutoModelForImageClassification, name, **settings)


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def colour_statistics(model_name: str | None, architecture: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each colour, 0 to 1, in the training of ``model_name`` or ``architecture``.

    ImageNet's where nothing is known.
    """
    from accelerando.models.vision import TIMM, timm_settings

    if not model_name:
        settings = timm_settings(architecture) if architecture.startswith(TIMM) else None
        return (tuple(settings.mean), tuple(settings.std)) if settings else IMAGENET
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(model_name)
    except (OSError, ValueError):  # from a config alone
        return IMAGENET
    return tuple(processor.image_mean), tuple(processor.image_std)
