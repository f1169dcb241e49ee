"""Transformers models by name or folder, pretrained or with random weights, with one-line errors."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError
from accelerando.base.log import log
from accelerando.base.model_folder import opening, without_warnings
from accelerando.models.checkpoints import read_state, stored_files, without_prefixes
from accelerando.models.overrides import SHAPE

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass


# Settings of a config that are a side of a tensor; those in POSITIVE are 1 or more.
SIZES = ("max_position_embeddings", "n_positions", "type_vocab_size", "projection_dim")
POSITIVE = ("vocab_size", *(key for kind in SHAPE if kind != "num_layers" for key in SHAPE[kind]))
SPARE = 10_000_000  # numbers that a model may have beside its stored ones: a new head, positions without weights
MOST_LAYERS = 1000


# Model types of this package, and the modules that make transformers' auto classes know them.
OWN = {
    "text_cnn": ("text_cnn",), "vision_net": ("vision",), "image_net": ("towers",), "two_towers": ("towers",),
    "clip_classifier": ("towers", "clip_classifier"), "sign_transformer": ("sign",), "sign_gru": ("sign",),
}  # fmt: skip


def class_labels(names: list[str]) -> dict[str, Any]:
    """The entries of a config about its classes."""
    numbers = {name: number for number, name in enumerate(names)}
    return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": numbers}


def open_config(name: str, trust_remote_code: bool = False, **settings: Any) -> PreTrainedConfig:
    """The config of the model ``name``, a folder or a name on the Hub, changed by ``settings``.

    ``trust_remote_code``: Python files of the model are run where it needs them.

    Raises:
        UserError: there is none, or it is broken.
    """
    from transformers import AutoConfig, PreTrainedConfig

    with opening(name, "config"):
        content, _ = PreTrainedConfig.get_config_dict(name, trust_remote_code=trust_remote_code)
        kind = content.get("model_type")
        for module in OWN.get(kind, ()) if isinstance(kind, str) else ():
            importlib.import_module(f"accelerando.models.{module}")
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **settings)


def open_model(
    auto_class: type[_BaseAutoModelClass],
    name: str,
    config: PreTrainedConfig,
    from_scratch: bool = False,
    new_head: bool = True,
    trust_remote_code: bool = False,
    new_pooler: bool | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """The model ``name`` from one of transformers' auto classes, or one with random weights from its ``config``.

    Always in float32: mixed precision casts during computation, and weight updates need full precision. ``new_head``: a
    head that the weights lack, or have for other classes, starts from random weights; everything else has to be there.
    ``new_pooler``: the same of a pooler alone; None: as ``new_head``.
    Prefixes that DDP, torch.compile or Lightning have added to the names are removed (see
    :func:`checkpoints.without_prefixes`).

    Raises:
        UserError: the files are broken, or the weights are those of another model.
    """
    import torch

    new_pooler = new_head if new_pooler is None else new_pooler
    common = {"dtype": torch.float32, "trust_remote_code": trust_remote_code, **settings}
    if from_scratch:
        with opening(name, "model"):
            return auto_class.from_config(config, **common)
    if (Path(name) / "adapter_config.json").is_file():
        raise UserError(f"{name}: holds a LoRA adapter: name its base model, or best/ of the run, which is merged")
    _check_size(name, config)
    reporting = {**common, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with opening(name, "model"):
        model, report = auto_class.from_pretrained(name, config=config, **reporting)
    unfit = _unfit(model, report, new_head, new_pooler)
    for prefix, state in _without_prefixes(name) if unfit else ():
        with opening(name, "model"):
            other, fit = type(model).from_pretrained(None, config=model.config, state_dict=state, **reporting)
        if not _unfit(other, fit, new_head, new_pooler):
            log.info("%s: the names of its weights begin with %s, which is removed", name, prefix)
            model, report, unfit = other, fit, {}
            break
    if unfit:
        total = len(model.state_dict())
        tensor, reason = next(iter(unfit.items()))
        raise UserError(
            f"{name}: weights are missing or of another model than the {config.model_type} of config.json: "
            f"{max(0, total - len(unfit))} of {total} tensors fit; {tensor} {reason}"
        )
    new = sorted({key.rpartition(".")[0] for key in _new_tensors(report)})
    if new:
        log.info("Random at the start, not from %s: %s", name, ", ".join(new))
    return model


def _new_tensors(report: dict[str, Any]) -> dict[str, str]:
    """The tensors that were not loaded, and why: a name -> reason of transformers' loading report."""
    found = dict.fromkeys(sorted(report["missing_keys"]), "is missing")
    for key, stored, wanted in sorted(report["mismatched_keys"]):
        found[key] = f"has the shape {list(stored)}, not {list(wanted)}"
    return found


def _unfit(model: PreTrainedModel, report: dict[str, Any], new_head: bool, new_pooler: bool) -> dict[str, str]:
    """What differs between a model and the weights that were loaded into it, less a head that may be new: name, why."""
    head = head_names(model) if new_head else ()
    found = {
        key: why
        for key, why in _new_tensors(report).items()
        # A pooler stands between body and head, and pretraining on masked tokens has none.
        if not (
            key.startswith(head) or (new_pooler and "pooler" in key.split(".")) or key.endswith("num_batches_tracked")
        )
    }

    def kind(key: str) -> str:
        return re.sub(r"\d+", "*", key.removeprefix(f"{model.base_model_prefix}."))

    # More layers than the config says; other tensors without a place belong to heads of another task.
    kinds = {kind(key) for key in model.state_dict() if re.search(r"\.\d+\.", key)}
    layers = [key for key in sorted(report["unexpected_keys"]) if kind(key) in kinds and not key.startswith(head)]
    return found | dict.fromkeys(layers, "belongs to a layer that config.json does not have")


def _without_prefixes(name: str) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The weights of ``name`` under other names; see :func:`checkpoints.without_prefixes`."""
    state = {key: tensor for file in stored_files(name) for key, tensor in read_state(file).items()}
    return itertools.islice(without_prefixes(state), 1, None)


def _check_size(name: str, config: PreTrainedConfig) -> None:
    """UserError if a config describes tensors far larger than the stored weights, before memory is asked for."""
    stored = sum(path.stat().st_size for path in stored_files(name)) if Path(name).is_dir() else 0
    if not stored:
        return
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        sizes = {key: getattr(part, key, None) for key in (*SIZES, *POSITIVE, *SHAPE["num_layers"])}
        sizes = {key: size for key, size in sizes.items() if type(size) is int}
        width = next((sizes[key] for key in SHAPE["hidden_size"] if key in sizes), 1)
        for key, size in sorted(sizes.items(), key=lambda each: -each[1]):  # the largest is the one to blame
            too_many = size > MOST_LAYERS if key in SHAPE["num_layers"] else width * size > stored + SPARE
            if too_many or (size < 1 and key in POSITIVE):
                raise UserError(f"{name}: {key} {size:,} in config.json does not fit its weights")


def most_tokens(model: PreTrainedModel) -> int | None:
    """The longest input, in tokens, that the model's position embeddings allow; None: no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or limit < 1:  # XLNet's is -1
        return None
    first = first_position(model)
    return limit if first is None else limit - first


def first_position(model: PreTrainedModel) -> int | None:
    """The position of the first token where positions are counted from the padding's id on, as RoBERTa does."""
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(positions, "padding_idx", None)
    return None if padding is None else padding + 1


def pads_left(config: PreTrainedConfig) -> bool:
    """True for a model that classifies by its last position (XLNet), before which padding has to stand."""
    return getattr(config, "summary_type", None) == "last"


def match_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Gives ``model`` an embedding for every token of ``tokenizer``, and both the same padding.

    A tokenizer without a padding token (GPT-2) pads with its end token, which the attention mask hides. ``name``: the
    model's, for messages.

    Raises:
        UserError: the tokenizer has no token that could pad.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token
        if tokenizer.pad_token_id is None:
            raise UserError(f"the tokenizer of {name} has neither a padding nor an end token: set one and save it")
        log.info("The tokenizer has no padding token: its end token %s pads", tokenizer.pad_token)
    add_embeddings(model, tokenizer)
    own = model.config.pad_token_id
    if own not in (None, tokenizer.pad_token_id) and first_position(model) is not None:
        # Another id would move all positions.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(own)
        log.info("Texts are padded with the model's own padding token, %s", tokenizer.pad_token)
    model.config.pad_token_id = tokenizer.pad_token_id
    embedding = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = tokenizer.pad_token_id
    tokenizer.padding_side = "left" if pads_left(model.config) else "right"


def add_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds embeddings to ``model`` for the tokens of ``tokenizer`` that have none, near the mean of the others."""
    part = getattr(model, "text_model", model)  # of a model with two towers
    known = getattr(part.get_input_embeddings(), "num_embeddings", None)  # None: not of tokens from a table
    needed = max(tokenizer.get_vocab().values()) + 1
    if known is not None and needed > known:
        with without_warnings():
            part.resize_token_embeddings(needed)
        model.config.get_text_config().vocab_size = needed
        log.warning("The tokenizer has %d tokens, the model %d embeddings: %d are added near the mean of the others; "
                    "only training of all weights changes them", needed, known, needed - known)  # fmt: skip


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


def open_classifier(
    name: str, trust_remote_code: bool = False, new_head: bool = True, **settings: Any
) -> PreTrainedModel:
    """An image classifier of transformers or of this package, with a new head if its own is for other classes.

    ``new_head=False``: as it is, and its head has to be there.

    It takes colours in the order red, green, blue, even if its image processor gives blue first.
    """
    from transformers import AutoModelForImageClassification

    from accelerando.models.processors import input_colours, open_processor

    config = open_config(name, trust_remote_code, **settings)
    if getattr(config, "model_args", None):  # timm writes its own number of classes there too
        config.model_args.pop("num_classes", None)
    model = open_model(
        AutoModelForImageClassification, name, config, new_head=new_head, trust_remote_code=trust_remote_code
    )
    processor = open_processor(name, trust_remote_code)
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
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def colour_statistics(
    model_name: str | None, architecture: str, trust_remote_code: bool = False
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, 0 to 1, used in the training of ``model_name`` or ``architecture``.

    ImageNet's if they are unknown.

    Raises:
        UserError: the model's processor is broken.
    """
    from PIL.Image import Resampling

    from accelerando.models.processors import input_colours, open_processor
    from accelerando.models.vision import TIMM, timm_settings

    if not model_name:
        settings = timm_settings(architecture) if architecture.startswith(TIMM) else None
        return (tuple(settings.mean), tuple(settings.std)) if settings else IMAGENET
    processor = open_processor(model_name, trust_remote_code)
    if processor is None:
        log.info("%s has no image processor: its images are normalised with ImageNet's mean and standard deviation",
                 model_name)  # fmt: skip
        return IMAGENET
    colours = input_colours(processor)
    filter_used = getattr(processor, "resample", None)
    if filter_used not in (None, Resampling.BILINEAR):
        name = Resampling(filter_used).name.lower()
        log.info("The image processor of %s resizes with the %s filter; here images are resized bilinearly",
                 model_name, name)  # fmt: skip
    return colours.mean, colours.std


def own_image_size(model_name: str | None, architecture: str, trust_remote_code: bool = False) -> int:
    """The side of the images that ``model_name`` or ``architecture`` was made for; 224 if it is unknown."""
    from accelerando.models.processors import image_side, open_processor
    from accelerando.models.vision import architecture_side

    if not model_name:
        return architecture_side(architecture) or 224
    config = open_config(model_name, trust_remote_code)
    own = getattr(getattr(config, "vision_config", config), "image_size", None)
    processor = open_processor(model_name, trust_remote_code)
    return image_side(own) or (image_side(processor) if processor else None) or 224
