"""A CLIP of two towers that were pretrained apart: an image net of timm, torchvision or transformers, and a text
encoder of transformers.

Importing this module registers the model types "two_towers" and "image_net" with ``AutoConfig`` and ``AutoModel``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput

from accelerando.base.errors import UserError
from accelerando.base.log import log
from accelerando.base.model_folder import read_json, tensor_shapes
from accelerando.models.checkpoints import stored_files
from accelerando.models.pretrained import open_config, open_model
from accelerando.models.vision import (
    FULL,
    TIMM,
    VisionNet,
    VisionNetConfig,
    architecture_side,
    heads_of,
    load_pretrained,
    make_net,
)

POOLINGS = ("mean", "cls", "pooler")
PROJECTIONS = ("linear", "mlp")


class ImageNetConfig(PreTrainedConfig):
    """A net without its head: ``architecture`` is a name in torchvision, or ``timm/`` and a name in timm."""

    model_type = "image_net"

    architecture: str = "resnet18"
    image_size: int = 224
    hidden_size: int = 512


class TwoTowersConfig(PreTrainedConfig):
    """Two towers and what joins them.

    ``vision_config`` is an :class:`ImageNetConfig` or the config of an image encoder of transformers, ``text_config``
    that of a text encoder. A tower's output is pooled as its ``image_pooling`` or ``text_pooling`` says: the mean of
    all tokens, the first one (cls), or what the encoder itself pools (pooler). ``projection``: a linear layer, or one
    with a hidden layer as wide as the tower (mlp).
    """

    model_type = "two_towers"

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    image_pooling: str = "pooler"
    text_pooling: str = "mean"
    projection: str = "linear"
    projection_dim: int = 512
    image_width: int = 512
    logit_scale_init_value: float = math.log(1 / 0.07)

    def __post_init__(self, **kwargs: object) -> None:
        for name, kind in (("vision_config", "image_net"), ("text_config", "bert")):
            settings = getattr(self, name)
            if not isinstance(settings, PreTrainedConfig):
                setattr(self, name, AutoConfig.for_model(**{"model_type": kind, **(settings or {})}))
        super().__post_init__(**kwargs)


class ImageTower(nn.Module):
    """The image encoder in ``net``; gives ``pooler_output`` [B, width]."""

    def __init__(self, config: TwoTowersConfig, net: nn.Module | None = None) -> None:
        super().__init__()
        self.config, self.pooling = config.vision_config, config.image_pooling
        self.plain = isinstance(self.config, ImageNetConfig)
        if net is None and self.plain:
            net = headless_net(self.config.architecture)
        self.net = AutoModel.from_config(self.config) if net is None else net
        without_pooler(self.net, self.pooling)

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Of normalised images [B, 3, S, S]."""
        pixels = pixel_values.contiguous(memory_format=torch.channels_last)
        if self.plain:
            return BaseModelOutputWithPooling(pooler_output=self.net(pixels).flatten(1))
        output = self.net(pixel_values=pixels)
        return BaseModelOutputWithPooling(pooler_output=pooled(output, self.pooling).flatten(1))


class TextTower(nn.Module):
    """The text encoder in ``net``; gives ``pooler_output`` [B, width]."""

    def __init__(self, config: TwoTowersConfig, net: nn.Module | None = None) -> None:
        super().__init__()
        self.config, self.pooling = config.text_config, config.text_pooling
        self.net = AutoModel.from_config(self.config) if net is None else net
        without_pooler(self.net, self.pooling)

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's token embeddings."""
        return self.net.get_input_embeddings()

    def resize_token_embeddings(self, count: int) -> nn.Module:
        """See transformers."""
        return self.net.resize_token_embeddings(count)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Of tokens [B, T] and the mask of those that count."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        output = self.net(input_ids=input_ids, attention_mask=mask)
        return BaseModelOutputWithPooling(pooler_output=pooled(output, self.pooling, mask))


class TwoTowers(PreTrainedModel):
    """CLIP's interface for two towers: ``vision_model``, ``text_model``, their projections, ``logit_scale``."""

    config_class = TwoTowersConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []  # noqa: RUF012  (required by Hugging Face)

    def __init__(
        self, config: TwoTowersConfig, image_net: nn.Module | None = None, text_net: nn.Module | None = None
    ) -> None:
        super().__init__(config)
        self.vision_model = ImageTower(config, image_net)
        self.text_model = TextTower(config, text_net)
        self.visual_projection = make_projection(config.projection, config.image_width, config.projection_dim)
        self.text_projection = make_projection(config.projection, config.text_config.hidden_size, config.projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: timm, torchvision, transformers or torch have initialised the weights."""

    def get_input_embeddings(self) -> nn.Module:
        """NotImplementedError, as of CLIP: there are two inputs."""
        raise NotImplementedError

    def get_image_features(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """``pooler_output``: projected embeddings [B, d] of normalised images [B, 3, S, S]."""
        output = self.vision_model(pixel_values)
        output.pooler_output = self.visual_projection(output.pooler_output)
        return output

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """``pooler_output``: projected embeddings [B, d] of tokens [B, T]."""
        output = self.text_model(input_ids, attention_mask)
        output.pooler_output = self.text_projection(output.pooler_output)
        return output

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,  # what a tokenizer gives for one text: all 0
    ) -> CLIPOutput:
        """Logits of all images and texts, and their embeddings of unit length."""
        image = nn.functional.normalize(self.get_image_features(pixel_values).pooler_output, dim=-1)
        text = nn.functional.normalize(self.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)
        logits = self.logit_scale.exp() * image @ text.T
        return CLIPOutput(logits_per_image=logits, logits_per_text=logits.T, image_embeds=image, text_embeds=text)


def use_fast_layout(model: nn.Module) -> None:
    """channels_last for the weights of an image net, in which convolutions are fastest; not for sharded models. Other
    models stay as they are."""
    if isinstance(model, TwoTowers):
        model.vision_model.to(memory_format=torch.channels_last)


def make_projection(kind: str, width: int, dim: int) -> nn.Module:
    """From a tower of ``width`` to embeddings of ``dim`` numbers."""
    if kind == "linear":
        return nn.Linear(width, dim, bias=False)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim, bias=False))


def pooled(output: Any, pooling: str, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The pooled output of an encoder, [B, width] (or [B, width, 1, 1])."""
    if pooling == "pooler":
        return output.pooler_output
    hidden = output.last_hidden_state
    if hidden.ndim == 4:  # of a convolutional net
        return hidden.mean(dim=(2, 3))
    if pooling == "cls":
        return hidden[:, 0]
    if mask is None:
        return hidden.mean(dim=1)
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def without_pooler(net: nn.Module, pooling: str) -> None:
    """Drops a pooler that is not used: its weights would get no gradient, which DDP does not allow."""
    if pooling != "pooler" and isinstance(getattr(net, "pooler", None), nn.Module):
        net.pooler = None


def headless_net(architecture: str, net: nn.Module | None = None) -> nn.Module:
    """A net of timm or torchvision with pooled features as output; ``net``: one with a head for ImageNet."""
    net = make_net(architecture, FULL) if net is None else net
    if architecture.startswith(TIMM):
        net.reset_classifier(0)
        return net
    for name in heads_of(net, FULL):
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, nn.Identity())
    return net


# ---------------------------------------------------------------------------------------------------------- building


def is_net(name: str) -> bool:
    """True for ``timm/<name>`` and for a name without a slash that is no folder, which is torchvision's."""
    return name.startswith(TIMM) or ("/" not in name and not Path(name).exists())


def make_two_towers(
    image_model: str,
    text_model: str,
    image_weights: str | None = None,
    text_pooling: str | None = None,
    projection: str = "linear",
    projection_dim: int = 512,
    trust_remote_code: bool = False,
) -> TwoTowers:
    """Two pretrained towers with random projections.

    ``image_weights``: of a net of timm or torchvision; see :func:`vision.load_pretrained`. ``text_pooling``: None is
    what the folder of a sentence encoder says, else the mean.

    Raises:
        UserError: a tower cannot be opened, or is no encoder of images or texts.
    """
    if is_net(image_model):
        image_net, vision_config, image_pooling = _open_net(image_model, image_weights)
    else:
        if image_weights:
            raise UserError(f"--image_weights are those of a net of timm or torchvision; {image_model} brings its own")
        image_net, vision_config, image_pooling = _open_encoder(image_model, "vision", trust_remote_code)
    text_net, text_config, own_pooling = _open_encoder(text_model, "text", trust_remote_code)
    config = TwoTowersConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_pooling=image_pooling,
        text_pooling=text_pooling or own_pooling,
        projection=projection,
        projection_dim=projection_dim,
    )
    if not isinstance(getattr(text_config, "hidden_size", None), int):
        raise UserError(f"--text_model {text_model}: its config has no hidden_size, so it is no text encoder")
    config.image_width = _image_width(config, image_net, image_model)
    model = TwoTowers(config, image_net, text_net)
    for name, parameter in model.named_parameters():
        if "mask_token" in name:  # of pretraining: nothing is masked here
            parameter.requires_grad_(False)
    log.info("Image tower %s (%s numbers an image), text tower %s (%s numbers a text, pooled: %s)", image_model,
             config.image_width, text_model, text_config.hidden_size, config.text_pooling)  # fmt: skip
    return model.eval()  # as from_pretrained gives it: batch norms learn only while training


@contextlib.contextmanager
def _own_flags() -> Iterator[None]:
    """Messages name the flags of a tower instead of those of an image classifier."""
    try:
        yield
    except UserError as error:
        text = str(error).replace("--architecture", "--image_model").replace("--weights", "--image_weights")
        raise UserError(text) from None


def _open_net(name: str, weights: str | None) -> tuple[nn.Module, ImageNetConfig, str]:
    with _own_flags():
        model = VisionNet(VisionNetConfig(architecture=name, num_labels=FULL))
        if weights and weights.lower() != "none":
            log.info("%s", load_pretrained(model, weights))
        else:
            log.warning("--image_model %s starts from random weights: --image_weights names a file, or DEFAULT", name)
        return headless_net(name, model.net), ImageNetConfig(architecture=name, image_size=tower_side(name)), "pooler"


def tower_side(name: str) -> int:
    """The side of the images that a net of timm or torchvision was made for; 224 if it is unknown."""
    with _own_flags():
        return architecture_side(name) or 224


def _open_encoder(name: str, part: str, trust_remote_code: bool) -> tuple[nn.Module, PreTrainedConfig, str]:
    """An encoder of transformers, or the ``part`` (vision or text) of one with two; its config and its pooling."""
    flag = "--image_model" if part == "vision" else "--text_model"
    config = open_config(name, trust_remote_code)
    of_two = getattr(config, f"{part}_config", None)
    config = config if of_two is None else of_two
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{flag} {name}: a {config.model_type} is an encoder and a decoder; an encoder is needed")
    net = open_model(AutoModel, name, config, new_head=False, new_pooler=True, trust_remote_code=trust_remote_code)
    expected = "pixel_values" if part == "vision" else "input_ids"
    if getattr(net, "main_input_name", expected) != expected:
        raise UserError(f"{flag} {name}: a {config.model_type} takes {net.main_input_name}, not {expected}")
    if part == "text":
        if of_two is not None or config.model_type.endswith("text_model"):  # CLIP's, which looks at the last token
            return net, net.config, "pooler"
        return net, net.config, "cls" if _pools_first(name) else "mean"
    return net, net.config, _image_pooling(net, name)


def _image_pooling(net: PreTrainedModel, name: str) -> str:
    """pooler, unless the encoder has none or its weights were not stored; then cls if it has such a token, or mean."""
    pooler = getattr(net, "pooler", None)
    new = isinstance(pooler, nn.Module) and bool(list(pooler.parameters())) and not _has_pooler(name)
    side = getattr(net.config, "image_size", None) or 224
    side = side if isinstance(side, int) else side[-1]
    if not new:
        with contextlib.suppress(RuntimeError, ValueError, TypeError), torch.no_grad():  # reported with the width
            if getattr(net(pixel_values=torch.zeros(1, 3, side, side)), "pooler_output", None) is not None:
                return "pooler"
    first = any(key.endswith(("cls_token", "class_embedding")) for key, _ in net.named_parameters())
    return "cls" if first else "mean"


def _has_pooler(name: str) -> bool:
    """Whether the stored weights have a pooler's."""
    files = [file for file in stored_files(name) if file.suffix == ".safetensors"]
    return any("pooler" in key.split(".") for file in files for key in tensor_shapes(file))


def _pools_first(name: str) -> bool:
    """Whether a folder of sentence-transformers says that the first token is a text's embedding."""
    path = Path(name) / "1_Pooling" / "config.json"
    return path.is_file() and bool(read_json(path).get("pooling_mode_cls_token"))


def _image_width(config: TwoTowersConfig, net: nn.Module, name: str) -> int:
    """The numbers that the image tower gives for an image, from one black image."""
    tower = ImageTower(config, net)
    side = getattr(config.vision_config, "image_size", None) or 224
    side = side if isinstance(side, int) else side[-1]
    training = tower.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = tower.eval()(torch.zeros(1, 3, side, side)).pooler_output
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--image_model {name}: it gives no pooled output for an image of {side} pixels "
                        f"({' '.join(str(error).split())[:200]})") from None  # fmt: skip
    tower.train(training)
    return found.shape[-1]


AutoConfig.register(ImageNetConfig.model_type, ImageNetConfig, exist_ok=True)
AutoConfig.register(TwoTowersConfig.model_type, TwoTowersConfig, exist_ok=True)
AutoModel.register(TwoTowersConfig, TwoTowers, exist_ok=True)
