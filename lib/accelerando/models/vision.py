"""Models of torchvision and timm as Hugging Face models, with a head for any number of classes.

Importing this module registers the model type "vision_net" with transformers' auto classes.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from accelerando.base.errors import UserError, first_line
from accelerando.models.checkpoints import read_state, without_prefixes

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

TIMM = "timm/"  # prefix of timm's architectures
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # heads of Inception and GoogLeNet that are not built
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norms
COUNTER = ".num_batches_tracked"  # of batch norms, without effect
KINDS = ("weight", "bias", "running_mean", "running_var")  # names of tensors that every implementation uses alike
FULL = 1000  # outputs of torchvision's models: ImageNet's classes


class VisionNetConfig(PreTrainedConfig):
    """``architecture`` is a name in torchvision, or ``timm/`` and a name in timm; ``group_norm`` replaces batch norms
    by group norms, which do not mix the images of a batch."""

    model_type = "vision_net"

    architecture: str = "resnet18"
    group_norm: bool = False


class VisionNet(PreTrainedModel):
    """The model is in ``net``; its head, the only part that depends on the classes, is at :meth:`head_names`."""

    config_class = VisionNetConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _no_split_modules: list[str] = []  # noqa: RUF012  (required by Hugging Face)

    def __init__(self, config: VisionNetConfig) -> None:
        super().__init__(config)
        self.net = make_net(config.architecture, config.num_labels)
        if config.group_norm:
            replace_batch_norms(self.net)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: torchvision or timm have initialised the weights."""

    def get_input_embeddings(self) -> None:
        """None: images are numbers, not tokens."""
        return

    def head_names(self) -> tuple[str, ...]:
        """The names of the classification layers, such as ``net.fc``; a distilled net has two."""
        return tuple(f"net.{name}" for name in heads_of(self.net, self.config.num_labels))

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits [B, C] of normalised images [B, 3, S, S], and with ``labels`` [B] their mean cross-entropy."""
        logits = self.net(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


def make_net(architecture: str, num_labels: int) -> nn.Module:
    """A model with random weights and ``num_labels`` outputs.

    Raises:
        UserError: no such architecture (suggests a similar name), or timm is not installed.
    """
    if architecture.startswith(TIMM):
        require_timm(architecture)
        import timm

        try:
            with torch.device("cpu"):  # transformers creates models on the meta device, where tables are not computed
                return timm.create_model(architecture.removeprefix(TIMM), num_classes=num_labels)
        except RuntimeError as error:
            raise UserError(f"--architecture {architecture}: {first_line(error)}") from None
    return replace_head(_torchvision_net(architecture, None), num_labels)


def require_timm(architecture: str) -> None:
    """UserError if timm is not installed."""
    if importlib.util.find_spec("timm") is None:
        raise UserError(f"--architecture {architecture} needs timm: pip install timm")


def timm_settings(architecture: str) -> PretrainedCfg | None:
    """timm's settings for its pretrained weights of an architecture (``mean``, ``std``); None: it has no weights.

    Raises:
        UserError: timm is not installed.
    """
    require_timm(architecture)
    import timm

    return timm.get_pretrained_cfg(architecture.removeprefix(TIMM))


def interpolation_of(architecture: str) -> Literal["bilinear", "bicubic"]:
    """How images were resized for an architecture's weights; bicubic if it is unknown."""
    import torchvision

    if architecture.startswith(TIMM):
        settings = timm_settings(architecture)
        return "bilinear" if settings and settings.interpolation == "bilinear" else "bicubic"
    try:
        transforms = torchvision.models.get_model_weights(architecture).DEFAULT.transforms()
    except (ValueError, AttributeError):  # an unknown architecture, or one without weights
        return "bicubic"
    return "bilinear" if transforms.interpolation.value == "bilinear" else "bicubic"


def architecture_side(architecture: str) -> int | None:
    """The side of the images that an architecture was made for; None: unknown."""
    import torchvision

    if architecture.startswith(TIMM):
        settings = timm_settings(architecture)
        return settings.input_size[-1] if settings else None
    if architecture.startswith("vit_"):  # its position embeddings, whatever size its best weights were trained with
        return 224
    try:
        transforms = torchvision.models.get_model_weights(architecture).DEFAULT.transforms()
    except (ValueError, AttributeError):  # an unknown architecture, or one without weights
        return None
    return transforms.crop_size[0]


def _torchvision_net(architecture: str, weights: str | None) -> nn.Module:
    import difflib
    import warnings

    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        close = difflib.get_close_matches(architecture, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "such as resnet18, efficientnet_b0 or timm/<name>"
        raise UserError(f"--architecture {architecture}: torchvision has no such model; {hint}")
    # With auxiliary heads, which are not needed with batch norms, the output would be a tuple. ImageNet's weights for
    # these two models expect a different normalisation, to which the model converts its input.
    two = {"aux_logits": False, "init_weights": True, "transform_input": True}
    plain = two if architecture in ("googlenet", "inception_v3") else {}
    # transformers creates models on the meta device, but RegNets compute with their weights during construction.
    with warnings.catch_warnings(), torch.device("cpu"):
        warnings.simplefilter("ignore")
        if weights is None:
            return torchvision.models.get_model(architecture, weights=None, **plain)
        net = torchvision.models.get_model(architecture, weights=weights)
    return net


def head_of(net: nn.Module, outputs: int) -> str:
    """The name of the last linear layer or convolution with ``outputs`` outputs: ``fc`` or ``classifier.1``."""
    found = [
        name
        for name, module in net.named_modules()
        if getattr(module, "out_features", getattr(module, "out_channels", None)) == outputs
        and isinstance(module, nn.Linear | nn.Conv2d)
    ]
    if not found:
        raise RuntimeError(f"no layer with {outputs} outputs in {type(net).__name__}")
    return found[-1]


def heads_of(net: nn.Module, outputs: int) -> tuple[str, ...]:
    """The names of the layers with an output for each class: those that timm names, otherwise the last such layer."""
    named = (getattr(net, "pretrained_cfg", None) or {}).get("classifier") or ()
    named = (named,) if isinstance(named, str) else tuple(named)
    return tuple(name for name in named if hasattr(submodule(net, name), "weight")) or (head_of(net, outputs),)


def submodule(net: nn.Module, name: str) -> nn.Module | None:
    """The module called ``name``; None: there is none."""
    return dict(net.named_modules()).get(name)


def replace_head(net: nn.Module, num_labels: int) -> nn.Module:
    """``net`` with a new head of ``num_labels`` outputs instead of ImageNet's 1,000."""
    name = head_of(net, FULL)
    old, bias = net.get_submodule(name), net.get_submodule(name).bias is not None
    if isinstance(old, nn.Linear):
        new: nn.Module = nn.Linear(old.in_features, num_labels, bias)
    else:
        new = nn.Conv2d(old.in_channels, num_labels, old.kernel_size, old.stride, old.padding, bias=bias)
    parent, _, last = name.rpartition(".")
    setattr(net.get_submodule(parent), last, new)
    return net


def replace_batch_norms(net: nn.Module) -> None:
    """Replaces all batch norms by group norms with 32 groups (fewer if 32 does not divide the channels), as in Wu and
    He 2018 (arXiv:1803.08494) and Opacus."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parent, _, last = name.rpartition(".")
            channels = module.num_features
            norm = nn.GroupNorm(math.gcd(32, channels), channels, module.eps, module.affine)
            setattr(net.get_submodule(parent), last, norm)


def load_pretrained(model: VisionNet, weights: str) -> str:
    """Loads ``weights`` into ``model``, except a head for other classes, and returns a line about what was loaded.

    ``weights`` is DEFAULT (torchvision's or timm's best, downloaded), a file (:func:`checkpoints.read_state`) or a
    folder. Known prefixes of its names (:func:`checkpoints.without_prefixes`) are taken off. Weights of another
    implementation, with other names, are loaded by their order if all shapes agree.

    Raises:
        UserError: they cannot be downloaded or read, or belong to another architecture.
    """
    architecture = model.config.architecture
    state = _downloaded(architecture) if weights.upper() == "DEFAULT" else _read_weights(weights)
    prefix, state, unfit = min(
        ((prefix, *_without_other_head(model, found)) for prefix, found in without_prefixes(state)),
        key=lambda candidate: len(candidate[2]),
    )
    own = model.net.state_dict()
    renamed = _in_order(model, state) if unfit else None
    if renamed is not None:
        state, unfit = renamed, {}
    if unfit:
        fitted = sum(name in own and own[name].shape == tensor.shape for name, tensor in state.items())
        name = next(iter(unfit))
        raise UserError(
            f"--weights {weights}: not the weights of {architecture}: {fitted} of its {len(own)} tensors fit; "
            f"{name} {unfit[name]}"
        )
    model.net.load_state_dict(state, strict=False)
    heads = heads_of(model.net, model.config.num_labels)
    other_head = any(name.rpartition(".")[0] in heads and name not in state for name in own)
    if other_head and model.config.architecture.startswith(TIMM):
        # timm's start for a head depends on the number of classes: for few of them its weights are far too large.
        for name in heads:
            model.net.get_submodule(name).reset_parameters()
    return (
        f"Loaded {len(state)} tensors from {weights}"
        + (f", whose names begin with {prefix}" if prefix else "")
        + (": its names are of another implementation: matched by order and shape" if renamed is not None else "")
        + (f", all except the head {', '.join(heads)}" if other_head else "")
    )


def _without_other_head(
    model: VisionNet, state: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """``state`` without a head for other classes and what ``model`` does not need; and what does not fit: name, why."""
    own = model.net.state_dict()
    heads = heads_of(model.net, model.config.num_labels)
    left_out = {
        name
        for name, value in state.items()
        if name.rpartition(".")[0] in heads and name in own and own[name].shape != value.shape
    }
    dropped = STATISTICS if model.config.group_norm else ()  # a group norm has only a batch norm's weight and bias
    kept = {
        name: value
        for name, value in state.items()
        if name not in left_out and not name.startswith(AUXILIARY) and name.rpartition(".")[2] not in dropped
    }
    unfit = {name: "is not in this net" for name in kept if name not in own}
    unfit |= {
        name: f"has the shape {list(value.shape)}, not {list(own[name].shape)}"
        for name, value in kept.items()
        if name in own and own[name].shape != value.shape
    }
    lacking = [name for name in own if name not in kept and not name.endswith(COUNTER)]
    unfit |= {name: "is missing" for name in lacking if name.rpartition(".")[0] not in heads}
    return kept, unfit


def _in_order(model: VisionNet, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """``state`` under the names of ``model``'s tensors, without a head for other classes.

    None: their number, a shape, or the kind of a tensor (weight, bias, running mean, running variance) differs. Two
    tensors of equal shape and kind in another order cannot be told apart.
    """
    dropped = STATISTICS if model.config.group_norm else (COUNTER[1:],)
    given = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in dropped}
    own = {name: tensor for name, tensor in model.net.state_dict().items() if not name.endswith(COUNTER)}
    if len(given) != len(own):
        return None
    heads = heads_of(model.net, model.config.num_labels)
    renamed = {}
    for (name, tensor), (stored, value) in zip(own.items(), given.items(), strict=True):
        kinds = {part.rpartition(".")[2] for part in (name, stored)}
        if len(kinds) > 1 and kinds <= {*KINDS}:
            return None
        if value.shape == tensor.shape:
            renamed[name] = value
        elif name.rpartition(".")[0] not in heads or value.shape[1:] != tensor.shape[1:]:
            return None
    return renamed


def _downloaded(architecture: str) -> dict[str, torch.Tensor]:
    try:
        if architecture.startswith(TIMM):
            import timm

            return timm.create_model(architecture.removeprefix(TIMM), pretrained=True).state_dict()
        return _torchvision_net(architecture, "DEFAULT").state_dict()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--weights DEFAULT: the weights of {architecture} cannot be downloaded ({first_line(error)}); "
            "name a file, or None for random weights"
        ) from None


def _read_weights(weights: str) -> dict[str, torch.Tensor]:
    if not Path(weights).exists():
        raise UserError(f"--weights {weights}: no such file; DEFAULT downloads weights, None starts from scratch")
    try:
        return read_state(Path(weights))
    except UserError as error:
        raise UserError(f"--weights {error}") from None


AutoConfig.register(VisionNetConfig.model_type, VisionNetConfig, exist_ok=True)
AutoModelForImageClassification.register(VisionNetConfig, VisionNet, exist_ok=True)
