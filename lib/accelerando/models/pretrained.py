"""Transformers models by name or folder, pretrained or with random weights, with one-line errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass


def class_labels(names: list[str]) -> dict[str, Any]:
    """The entries of a config about its classes."""
    numbers = {name: number for number, name in enumerate(names)}
    return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": numbers}


def open_config(name: str, **settings: Any) -> PreTrainedConfig:
    """The config of the model ``name``, a folder or a name on the Hub, changed by ``settings``."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, **settings)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name {name} cannot be opened: {first_line(error)}") from None


def open_model(
    auto_class: type[_BaseAutoModelClass], name: str, from_scratch: bool = False, **settings: Any
) -> PreTrainedModel:
    """The model ``name`` from one of transformers' auto classes, or one with random weights from its ``config``.

    Always in float32: mixed precision casts during computation, and weight updates need full precision.
    """
    import torch

    try:
        if from_scratch:
            return auto_class.from_config(settings.pop("config"), dtype=torch.float32, **settings)
        return auto_class.from_pretrained(name, dtype=torch.float32, ignore_mismatched_sizes=True, **settings)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name {name} cannot be loaded: {first_line(error)}") from None


def most_tokens(model: PreTrainedModel) -> int | None:
    """The longest input, in tokens, that the model's position embeddings allow; None: no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if limit and getattr(positions, "padding_idx", None) is not None:  # RoBERTa's positions start after padding_idx
        limit -= positions.padding_idx + 1
    return limit


def head_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The prefixes of the names of the classification head's parameters: ``("classifier.",)``."""
    if hasattr(model, "head_name"):
        return (f"{model.head_name()}.",)
    if hasattr(model, "timm_model"):  # a timm model wrapped by transformers
        last = model.timm_model.get_classifier()
        return tuple(f"{name}." for name, module in model.named_modules() if module is last)
    bodies = (model.base_model_prefix, "vision_model")  # CLIP's and SigLIP's classifiers have only the vision model
    others = {name: child for name, child in model.named_children() if name not in bodies}
    return tuple(f"{name}." for name, child in others.items() if list(child.parameters()))


def open_classifier(name: str, **settings: Any) -> PreTrainedModel:
    """An image classifier of transformers or of this package, with a new head if its own is for other classes."""
    from transformers import AutoModelForImageClassification

    import accelerando.models.vision  # noqa: F401  (registers the classes of this package)

    return open_model(AutoModelForImageClassification, name, **settings)


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def colour_statistics(model_name: str | None, architecture: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, 0 to 1, used in the training of ``model_name`` or ``architecture``.

    ImageNet's if they are unknown.
    """
    from accelerando.models.vision import TIMM, timm_settings

    if not model_name:
        settings = timm_settings(architecture) if architecture.startswith(TIMM) else None
        return (tuple(settings.mean), tuple(settings.std)) if settings else IMAGENET
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(model_name)
    except (OSError, ValueError):  # a folder with only a config
        return IMAGENET
    return tuple(processor.image_mean), tuple(processor.image_std)
