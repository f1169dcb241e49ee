"""Transformers models by name or folder, pretrained or with random weights, with one-line errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError, first_line
from accelerando.base.log import log

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
    if hasattr(model, "head_names"):
        return tuple(f"{name}." for name in model.head_names())
    if hasattr(model, "timm_model"):  # a timm model wrapped by transformers
        from accelerando.models.vision import heads_of

        return tuple(f"timm_model.{name}." for name in heads_of(model.timm_model, model.config.num_labels))
    bodies = (model.base_model_prefix, "vision_model")  # CLIP's and SigLIP's classifiers have only the vision model
    others = {name: child for name, child in model.named_children() if name not in bodies}
    return tuple(f"{name}." for name, child in others.items() if list(child.parameters()))


def open_classifier(name: str, **settings: Any) -> PreTrainedModel:
    """An image classifier of transformers or of this package, with a new head if its own is for other classes.

    It takes colours in the order red, green, blue, even if its image processor gives blue first.
    """
    from transformers import AutoModelForImageClassification

    import accelerando.models.vision  # noqa: F401  (registers the classes of this package)
    from accelerando.models.processors import input_colours, open_processor

    config = open_config(name, **settings)
    if getattr(config, "model_args", None):  # timm writes its own number of classes there too
        config.model_args.pop("num_classes", None)
    model = open_model(AutoModelForImageClassification, name, config=config)
    processor = open_processor(name)
    if processor is not None and input_colours(processor).blue_first:
        swap_red_and_blue(model, name)
    return model


def swap_red_and_blue(model: PreTrainedModel, name: str) -> None:
    """Swaps the weights of the first layer, so that a model for BGR images gives the same for RGB ones."""
    import torch

    first = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d) and module.in_channels == 3]
    if len(first) != 1:
        raise UserError(f"--model_name {name} takes blue before red, and has no single first layer to change that in")
    with torch.no_grad():
        first[0].weight.copy_(first[0].weight.flip(1))


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def colour_statistics(model_name: str | None, architecture: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, 0 to 1, used in the training of ``model_name`` or ``architecture``.

    ImageNet's if they are unknown.
    """
    from PIL.Image import Resampling

    from accelerando.models.processors import input_colours, open_processor
    from accelerando.models.vision import TIMM, timm_settings

    if not model_name:
        settings = timm_settings(architecture) if architecture.startswith(TIMM) else None
        return (tuple(settings.mean), tuple(settings.std)) if settings else IMAGENET
    processor = open_processor(model_name)
    if processor is None:
        return IMAGENET
    colours = input_colours(processor)
    filter_used = getattr(processor, "resample", None)
    if filter_used not in (None, Resampling.BILINEAR):
        name = Resampling(filter_used).name.lower()
        log.info("The image processor of %s resizes with the %s filter; here images are resized bilinearly",
                 model_name, name)  # fmt: skip
    return colours.mean, colours.std


def own_image_size(model_name: str | None, architecture: str) -> int:
    """The side of the images that ``model_name`` or ``architecture`` was made for; 224 if it is unknown."""
    from accelerando.models.processors import image_side, open_processor
    from accelerando.models.vision import architecture_side

    if not model_name:
        return architecture_side(architecture) or 224
    config = open_config(model_name)
    own = getattr(getattr(config, "vision_config", config), "image_size", None)
    processor = open_processor(model_name)
    return image_side(own) or (image_side(processor) if processor else None) or 224
