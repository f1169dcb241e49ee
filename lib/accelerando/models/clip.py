"""CLIP and SigLIP from transformers: pretrained or small with random weights, with embeddings as output."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING

from accelerando.base.errors import UserError, first_line
from accelerando.base.model_folder import opening, read_json, tensor_shapes
from accelerando.data.tokenizer import open_tokenizer
from accelerando.data.transforms import AugmentationName, ImageTransform
from accelerando.models.pretrained import open_config, open_model
from accelerando.models.processors import Resizing, described, input_colours, open_processor, resizing_of

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase


# Text towers that count positions from the padding's id on; see pretrained.first_position.
BEHIND_PADDING = ("altclip_text_model", "camembert", "roberta", "xlm-roberta")


def open_clip_model(
    name: str,
    adapter: str | None = None,
    attention_dropout: float | None = None,
    trust_remote_code: bool = False,
) -> torch.nn.Module:
    """The model in a folder or on the Hub, in float32; ``name`` or ``adapter`` may be a LoRA adapter, which is merged.

    ``attention_dropout``: dropout of attention weights; None: the model's own.

    Raises:
        UserError: it cannot be opened, is not a CLIP or SigLIP model, or the adapter belongs to another base model.
    """
    from transformers import AutoModel, AutoModelForImageClassification

    if (Path(name) / "adapter_config.json").is_file():
        if adapter is not None:
            raise UserError(f"--model_name {name} is itself an adapter: with --adapter, name its base model")
        adapter, name = name, _base_of(Path(name))
    config = open_config(name, trust_remote_code)
    check_family(config.model_type, name)
    kind = AutoModelForImageClassification if hasattr(config, "of_clip") else AutoModel  # a classifier on a CLIP
    model = open_model(kind, name, config, new_head=False, trust_remote_code=trust_remote_code)
    model = model.clip if hasattr(config, "of_clip") else model
    if not hasattr(model, "get_image_features") or not hasattr(model, "logit_scale"):
        raise UserError(f"{name} is a {model.config.model_type}, not a CLIP or SigLIP model")
    model = model if adapter is None else merge_adapter(model, name, Path(adapter))
    if attention_dropout is not None:
        for module in model.modules():
            if hasattr(module, "q_proj"):
                module.dropout = attention_dropout
    return model


# Model types that look like CLIP but take other inputs.
OTHER_INPUTS = {
    "siglip2": "images of any aspect ratio, cut into patches (NaFlex): choose a checkpoint for a fixed size, such as "
    "google/siglip2-base-patch16-224",
    "xclip": "videos, not images (X-CLIP): choose a CLIP for images",
}


def check_family(model_type: str, name: str) -> None:
    """UserError if models of this type take other inputs than an image and a text."""
    if model_type in OTHER_INPUTS:
        raise UserError(f"{name}: a {model_type} takes {OTHER_INPUTS[model_type]}")


def merge_adapter(model: torch.nn.Module, name: str, adapter: Path) -> torch.nn.Module:
    """``model`` with the LoRA adapter of a folder merged into its weights.

    Raises:
        UserError: there is no adapter, or it belongs to another base model.
    """
    from peft import PeftModel

    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{adapter}: no adapter (adapter_model.safetensors) in it; a LoRA run has one in best/adapter")
    own, stored = dict(model.named_parameters()), tensor_shapes(file)
    for key, shape in stored.items():
        stem, lora, _ = key.removeprefix("base_model.model.").partition(".lora_")
        weight = own.get(f"{stem}.weight" if lora else stem)
        if lora and key.removesuffix(".weight").endswith("B"):
            continue
        fits = weight is not None and ({*shape[1:2]} <= {*weight.shape} if lora else shape == weight.shape)
        if not fits:
            raise UserError(
                f"{adapter} is an adapter for another base model ({_base_of(adapter)}), not for {name}: {stem} differs"
            )
    with opening(adapter, "adapter"):
        adapted = PeftModel.from_pretrained(model, str(adapter))
    wanted = sum(".lora_" in key for key, _ in adapted.named_parameters())
    if (there := sum(".lora_" in key for key in stored)) != wanted:
        raise UserError(f"{file}: {there} tensors for the {wanted} that adapter_config.json describes")
    with opening(adapter, "adapter"):
        return adapted.merge_and_unload()


def _base_of(adapter: Path) -> str:
    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{adapter / 'adapter_config.json'}: base_model_name_or_path names no base model")
    return base


def make_clip_model(
    tokenizer: PreTrainedTokenizerBase,
    image_size: int,
    patch_size: int,
    vision_width: int,
    vision_layers: int,
    text_width: int,
    text_layers: int,
    projection_dim: int,
    max_length: int,
    dropout: float,
) -> torch.nn.Module:
    """A CLIP with random weights for the vocabulary of ``tokenizer``; heads have width 64, or 32 in a narrow tower."""
    from transformers import CLIPConfig, CLIPModel

    def tower(width: int, layers: int) -> dict[str, int | float]:
        heads = max(1, width // 64 if width >= 384 else width // 32)
        return {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "attention_dropout": dropout,
            "projection_dim": projection_dim,
        }

    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max_length,
        "eos_token_id": end,
        "bos_token_id": start,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={**tower(text_width, text_layers), **text},
        vision_config={**tower(vision_width, vision_layers), "image_size": image_size, "patch_size": patch_size},
        projection_dim=projection_dim,
    )
    return CLIPModel(config)


@dataclass
class Preprocessing:
    """Turns images and captions into model inputs; saved beside the weights."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    max_length: int
    full_length: bool  # SigLIP takes captions padded to the maximal length

    @cached_property
    def colours(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, 0 to 1."""
        colours = input_colours(self.image_processor)
        if colours.blue_first:
            raise UserError(f"{described(self.image_processor)} gives blue before red, which is not supported")
        return colours.mean, colours.std

    @cached_property
    def resizing(self) -> Resizing:
        """How an image gets the size that the model takes."""
        return resizing_of(self.image_processor)

    @property
    def image_size(self) -> int:
        """The side of the model's images, in pixels."""
        return self.resizing.size

    def transform(self, augmentation: AugmentationName = "none", exact: bool = True) -> ImageTransform:
        """What makes an image file a uint8 tensor of the model's size; see :class:`ImageTransform`."""
        size, shorter, square, mode = self.resizing
        return ImageTransform(size, augmentation, self.colours[0], exact, square, shorter, mode)

    def save(self, folder: Path) -> None:
        """Writes both beside the weights, so that ``AutoProcessor`` can load them."""
        from transformers import CLIPProcessor, SiglipProcessor

        kind = SiglipProcessor if self.full_length else CLIPProcessor
        kind(image_processor=self.image_processor, tokenizer=self.tokenizer).save_pretrained(folder)


def open_preprocessing(name: str, max_length: int | None, trust_remote_code: bool = False) -> Preprocessing:
    """Tokenizer and image processor of a model's folder or Hub name.

    Raises:
        UserError: they are missing, or ``max_length`` exceeds the model's number of positions.
    """
    if (Path(name) / "adapter_config.json").is_file():
        name = _base_of(Path(name))
    config = open_config(name, trust_remote_code)
    config = getattr(config, "of_clip", config)  # of a classifier on a CLIP
    check_family(config.model_type, name)
    tokenizer = open_tokenizer(name, trust_remote_code)
    images = open_processor(name, trust_remote_code, backend="pil")
    if images is None:
        raise UserError(f"{name}: no preprocessor_config.json in it: copy it from the base model")
    text = getattr(config, "text_config", config)
    limit = getattr(text, "max_position_embeddings", 77)
    if text.model_type in BEHIND_PADDING:
        limit -= text.pad_token_id + 1
    if max_length is not None and max_length > limit:
        raise UserError(f"--max_length {max_length} exceeds the {limit} positions of {name}")
    found = Preprocessing(tokenizer, images, max_length or limit, config.model_type.startswith("siglip"))
    check_processor(found)
    return found


def tower_preprocessing(
    image_model: str, text_model: str, max_length: int | None, trust_remote_code: bool = False
) -> Preprocessing:
    """The tokenizer of a text encoder; and the image processor of an image encoder, or what an image net was made for.

    A net of timm or torchvision sees the whole of a square image: the shorter side gets the net's size.

    Raises:
        UserError: they are missing, or ``max_length`` exceeds the encoder's number of positions.
    """
    from transformers import CLIPImageProcessorPil

    from accelerando.models.pretrained import colour_statistics
    from accelerando.models.towers import is_net, tower_side
    from accelerando.models.vision import interpolation_of

    tokenizer, config = open_tokenizer(text_model, trust_remote_code), open_config(text_model, trust_remote_code)
    limit = getattr(getattr(config, "text_config", config), "max_position_embeddings", None) or 77
    limit = min(limit, tokenizer.model_max_length)
    if max_length is not None and max_length > limit:
        raise UserError(f"--max_length {max_length} exceeds the {limit} positions of {text_model}")
    if is_net(image_model):
        side = tower_side(image_model)
        mean, std = colour_statistics(None, image_model)
        images = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=list(mean),
            image_std=list(std), resample={"bilinear": 2, "bicubic": 3}[interpolation_of(image_model)],
        )  # fmt: skip
    else:
        images = open_processor(image_model, trust_remote_code, backend="pil")
        if images is None:
            raise UserError(f"{image_model}: no preprocessor_config.json in it: copy it from the base model")
    found = Preprocessing(tokenizer, images, max_length or limit, full_length=False)
    check_processor(found)
    return found


def check_processor(preprocessing: Preprocessing) -> None:
    """UserError if the image processor does more than :class:`Preprocessing` repeats: both are compared on an image."""
    import io

    import numpy as np
    from PIL import Image

    from accelerando.data.transforms import normalise
    from accelerando.models.processors import processed

    mean, std = preprocessing.colours
    coarse = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    side = preprocessing.image_size
    image = Image.fromarray(coarse).resize((side * 2, side * 3 // 2), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=0)
    own = normalise(preprocessing.transform()(file.getvalue())[None], mean, std)[0]
    theirs = processed(preprocessing.image_processor, image)
    if own.shape != theirs.shape or float((own - theirs).abs().mean()) * max(std) > 0.02:
        raise UserError(
            f"{described(preprocessing.image_processor)} does more than resize, crop and normalise, which is not "
            "supported"
        )


def check_image_size(model: torch.nn.Module, preprocessing: Preprocessing) -> None:
    """UserError if the model does not take images of the size that the image processor makes."""
    import torch

    size, training = preprocessing.image_size, model.training
    model.eval()  # or batch norms would take the black image for data
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.get_image_features(pixel_values=torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{described(preprocessing.image_processor)} makes images of {size} x {size} pixels, which the model does "
            f"not take: {' '.join(first_line(error).split())[:200]}"
        ) from None
    finally:
        model.train(training)


def make_preprocessing(captions: Iterable[str], vocab_size: int, image_size: int, max_length: int) -> Preprocessing:
    """A WordPiece tokenizer trained on ``captions``, and CLIP's image processing at ``image_size``."""
    from transformers import CLIPImageProcessorPil

    from accelerando.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(captions, "wordpiece", vocab_size, max_length=max_length)
    side = {"height": image_size, "width": image_size}
    images = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=side)
    return Preprocessing(tokenizer, images, max_length, full_length=False)


def make_trainable_scale(model: torch.nn.Module, scale: float | None, bias: float | None) -> None:
    """Gives the logit scale the shape [1], which FSDP can shard, and the model a ``logit_bias`` if ``bias`` is given.

    ``scale`` (the factor itself, not its logarithm) replaces the model's own. :func:`saved_scale` restores the shape.
    """
    import torch

    model.saved_scale_shape, model.has_own_bias = model.logit_scale.shape, hasattr(model, "logit_bias")
    value = model.logit_scale.detach().reshape(1) if scale is None else torch.tensor([math.log(scale)])
    model.logit_scale = torch.nn.Parameter(value.clone().float())
    if bias is not None and not model.has_own_bias:
        model.logit_bias = torch.nn.Parameter(torch.tensor([float(bias)]))


def saved_scale(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` as ``from_pretrained`` expects it: CLIP has a logit scale of shape [] and no bias."""
    if not model.has_own_bias:
        state = {name: tensor for name, tensor in state.items() if name != "logit_bias"}
    return {**state, "logit_scale": state["logit_scale"].reshape(model.saved_scale_shape)}


def tokens_at_most(model: torch.nn.Module, max_length: int) -> int:
    """The longest input of either tower, in patches or tokens."""
    vision = model.config.vision_config
    patch = getattr(vision, "patch_size", None)
    return max((vision.image_size // patch) ** 2 + 1 if isinstance(patch, int) else 0, max_length)


def tower_features(model: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the image tower gives for images, before the projection: float32 [B, width]."""
    return model.vision_model(pixel_values=pixel_values).pooler_output.float()


def features_suffice(model: torch.nn.Module, image_size: int) -> bool:
    """Whether :func:`tower_features` and the projection are all that an image goes through, tried on two images."""
    import torch

    device = model.logit_scale.device
    pixels = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            whole = embed_pairs(model, pixel_values=pixels)["image"]
            parts = embed_pairs(model, image_features=tower_features(model, pixels))["image"]
    except (AttributeError, TypeError, RuntimeError):  # a tower of another interface
        return False
    finally:
        model.train(training)
    return torch.allclose(whole, parts, atol=1e-5)


def pair_logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits [B, B] of images and texts by a model with or without :func:`embed_in_forward`."""
    output = embed_pairs(model, **inputs)
    return output["scale"] * output["image"] @ output["text"].T


def embed_in_forward(model: torch.nn.Module) -> None:
    """Makes :func:`embed_pairs` the forward of ``model``, since FSDP and DDP act only around forward."""
    model.forward = MethodType(embed_pairs, model)


def embed_pairs(
    self: torch.nn.Module,
    pixel_values: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    image_features: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Embeddings of unit length ``image`` and ``text`` [B, d] of the given inputs; ``scale`` [1] and perhaps ``bias``.

    ``image_features`` [B, width], from :func:`tower_features`, stand in for the pixels they were computed from.
    Embeddings in half precision are converted to float32, so that the loss is computed in full precision.
    """
    import torch

    output = {"scale": self.logit_scale.exp()}
    if hasattr(self, "logit_bias"):
        output["bias"] = self.logit_bias * 1
    if pixel_values is not None:
        output["image"] = self.get_image_features(pixel_values=pixel_values).pooler_output
    if image_features is not None:
        projection = getattr(self, "visual_projection", None)  # SigLIP has none
        output["image"] = image_features if projection is None else projection(image_features)
    if input_ids is not None:
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        output["text"] = self.get_text_features(input_ids=input_ids, **mask).pooler_output
    for name in ("image", "text"):
        if name in output:
            features = output[name].float() if output[name].itemsize < 4 else output[name]
            output[name] = torch.nn.functional.normalize(features, dim=-1)
    return output
