"""Two sign recognition models as Hugging Face models: a Transformer over keypoints, and GRUs over Inception features.

Both have two heads, one for the gloss and one for its category, and take clips of any length. Importing this module
registers the model types "sign_transformer" and "sign_gru" with ``AutoConfig`` and ``AutoModel``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from accelerando.base.errors import UserError
from accelerando.base.model_folder import read_json
from accelerando.data.keypoints import LEFT_HAND, NUM_POINTS, RIGHT_HAND, WIDTH
from accelerando.models.checkpoints import read_state, without_prefixes

HEADS = {"gloss_head": "gloss_names", "cat_head": "cat_names"}  # and where the config names their classes
# What does not change the shape of a tensor, but what the model computes.
COMPUTED = ("input_key", "normalisation", "num_attention_heads", "pooling", "final_norm", "velocities",
            "relative_hands", "use_mask")  # fmt: skip
CHANGE_SCALE = 5.0  # of velocities: neighbouring frames differ little, and small inputs slow down learning


@dataclass
class SignOutput(ModelOutput):
    """``gloss_logits`` [B, G], ``cat_logits`` [B, C] and, if they are learned, the log variances of the losses [2]."""

    gloss_logits: torch.FloatTensor | None = None
    cat_logits: torch.FloatTensor | None = None
    log_variances: torch.FloatTensor | None = None


class SignConfig(PreTrainedConfig):
    """The settings of both models: the input, so that prediction needs no other information, and the classes.

    ``input_key`` is the array of the NPZ files, ``input_width`` its columns; ``normalisation`` is "body" (see
    :func:`data.keypoints.normalise_by_body`), "standard" (by ``channel_mean`` and ``channel_std``) or "none".
    ``gloss_names`` and ``cat_names`` name the classes. ``learned_weights``: the model has a log variance for each loss.
    """

    input_key: str = "X"
    input_width: int = WIDTH
    normalisation: str = "body"
    channel_mean: list[float] | None = None
    channel_std: list[float] | None = None
    gloss_names: list[str] | None = None
    cat_names: list[str] | None = None
    dropout: float = 0.1
    learned_weights: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        for name in ("gloss_names", "cat_names"):
            if not getattr(self, name):
                setattr(self, name, ["0", "1"])
        kwargs.setdefault("id2label", dict(enumerate(self.gloss_names)))
        super().__post_init__(**kwargs)


class SignTransformerConfig(SignConfig):
    """Shape of the Transformer over keypoints.

    ``pooling`` is mean, max or cls; ``final_norm``: a norm after the last layer. ``velocities`` adds the difference
    from the previous frame (times five, to be about as large as the coordinates), ``relative_hands`` the points of each
    hand relative to its wrist, in units of its size, ``use_mask`` which points were detected. ``conv_kernel``: width,
    in frames, of the convolution before the attention of each layer (0: none).

    Raises:
        UserError: the heads do not divide the width, or a setting needs the layout of 78 points.
    """

    model_type = "sign_transformer"

    hidden_size: int = 256
    num_layers: int = 4
    num_attention_heads: int = 8
    intermediate_size: int = 1024
    pooling: str = "mean"
    final_norm: bool = True
    velocities: bool = False
    relative_hands: bool = False
    use_mask: bool = False
    conv_kernel: int = 0

    def __post_init__(self, **kwargs: object) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise UserError(f"hidden_size {self.hidden_size}: use a multiple of 2 x {self.num_attention_heads} heads")
        if self.conv_kernel and self.conv_kernel % 2 == 0:
            raise UserError(f"conv_kernel {self.conv_kernel}: use an odd number, or 0 for none")
        for name in ("relative_hands", "use_mask"):
            if getattr(self, name) and self.input_width != WIDTH:
                raise UserError(
                    f"{name} needs frames of {NUM_POINTS} points ({WIDTH} channels), not {self.input_width}"
                )
        super().__post_init__(**kwargs)


class SignGruConfig(SignConfig):
    """Shape of the recurrent model over features: stacked GRUs with the widths ``gru_sizes``."""

    model_type = "sign_gru"

    input_key: str = "X2048"
    input_width: int = 2048
    normalisation: str = "none"
    gru_sizes: tuple[int, ...] | list[int] = (16, 12)

    def __post_init__(self, **kwargs: object) -> None:
        self.gru_sizes = list(self.gru_sizes)  # the same type as when it is loaded from JSON
        super().__post_init__(**kwargs)


class SignModel(PreTrainedModel):
    """The base class of both models."""

    config_class = SignConfig
    base_model_prefix = ""
    main_input_name = "frames"
    _no_split_modules: list[str] = []  # noqa: RUF012  (required by Hugging Face)

    def get_input_embeddings(self) -> None:
        """None: frames are numbers, not tokens."""
        return

    def _init_weights(self, module: nn.Module) -> None:
        # torch's own initialisation; Hugging Face calls this for weights that a checkpoint lacks.
        first = next(module.parameters(recurse=False), None)
        if hasattr(module, "reset_parameters") and not getattr(first, "_is_hf_initialized", False):
            module.reset_parameters()

    def make_heads(self, width: int, hidden: int | None) -> None:
        """A head for gloss and one for category, with a layer of ``hidden`` units if given."""
        config = self.config
        for name, classes in (("gloss_head", config.gloss_names), ("cat_head", config.cat_names)):
            between = [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(config.dropout)] if hidden else []
            setattr(self, name, nn.Sequential(*between, nn.Linear(hidden or width, len(classes))))
        if config.learned_weights:
            # Both in a vector, because FSDP2 cannot shard a scalar parameter.
            self.log_variances = nn.Parameter(torch.zeros(2))
        if config.normalisation == "standard":
            self.register_buffer("channel_mean", torch.tensor(config.channel_mean, dtype=torch.float32))
            self.register_buffer("channel_std", torch.tensor(config.channel_std, dtype=torch.float32))

    def standardised(self, frames: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Frames [B, T, D] on the scale the model was trained with; padding is 0."""
        if self.config.normalisation == "standard":
            frames = (frames - self.channel_mean) / self.channel_std
        return frames * real.unsqueeze(-1)

    def heads(self, pooled: torch.Tensor) -> SignOutput:
        """Logits of both heads."""
        # A copy, because FSDP shards the parameter again after the forward pass.
        learned = self.log_variances + 0 if self.config.learned_weights else None
        return SignOutput(self.gloss_head(pooled), self.cat_head(pooled), learned)


class SignTransformer(SignModel):
    """Linear, sinusoidal positions, pre-norm encoder layers, masked pooling over time, two heads of 128 units."""

    config_class = SignTransformerConfig
    _no_split_modules: list[str] = ["SignEncoderLayer"]  # noqa: RUF012

    def __init__(self, config: SignTransformerConfig) -> None:
        super().__init__(config)
        width = config.input_width * (2 if config.velocities else 1)
        width += 2 * 42 * config.relative_hands + NUM_POINTS * config.use_mask
        self.project = nn.Linear(width, config.hidden_size)
        self.cls = nn.Parameter(torch.randn(1, 1, config.hidden_size) * 0.02) if config.pooling == "cls" else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(SignEncoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size) if config.final_norm else nn.Identity()
        self.make_heads(config.hidden_size, 128)
        self.post_init()

    def forward(
        self, frames: torch.Tensor, attention_mask: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> SignOutput:
        """Logits of clips ``frames`` [B, T, D]; ``attention_mask`` [B, T] is 0 for padding.

        ``mask`` [B, T, 78]: which points were detected; without it, all of them.
        """
        if attention_mask is None:
            attention_mask = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
        real = attention_mask.bool()
        hidden = self.project(self.parts(self.standardised(frames, real), real, mask))
        if self.cls is not None:
            hidden = torch.cat([self.cls.expand(hidden.shape[0], -1, -1), hidden], dim=1)
            real = functional.pad(real, (1, 0), value=True)
        hidden = self.dropout(hidden + positions(hidden.shape[1], hidden.shape[2], hidden.device))
        shown = real[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, shown)
        hidden = self.norm(hidden)
        if self.cls is not None:
            return self.heads(hidden[:, 0])
        if self.config.pooling == "max":
            return self.heads(hidden.masked_fill(~real.unsqueeze(-1), -torch.inf).amax(dim=1))
        weight = real.unsqueeze(-1).to(hidden.dtype)
        return self.heads((hidden * weight).sum(dim=1) / weight.sum(dim=1))

    def parts(self, frames: torch.Tensor, real: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The inputs for each frame [B, T, D']: coordinates and the parts that the config adds."""
        config, parts = self.config, [frames]
        if (
            mask is None
            and (config.velocities or config.relative_hands or config.use_mask)
            and config.input_width == WIDTH
        ):
            mask = torch.ones(*frames.shape[:2], NUM_POINTS, dtype=torch.bool, device=frames.device)
        seen = None if mask is None else (mask & real.unsqueeze(-1)).unsqueeze(-1).to(frames.dtype)  # [B, T, 78, 1]
        if config.velocities:
            change = functional.pad(frames[:, 1:] - frames[:, :-1], (0, 0, 1, 0)) * real.unsqueeze(-1)
            if seen is not None:  # a point that becomes visible has not moved
                both = functional.pad(seen[:, 1:] * seen[:, :-1], (0, 0, 0, 0, 1, 0))
                change = (change.unflatten(2, (NUM_POINTS, 2)) * both).flatten(2)
            parts.append(CHANGE_SCALE * change)
        if config.relative_hands:
            points = frames.unflatten(2, (NUM_POINTS, 2))
            for hand in (LEFT_HAND, RIGHT_HAND):
                # A hand's first point is its wrist, detected whenever the hand is; its size is the root mean square.
                from_wrist = (points[:, :, hand] - points[:, :, hand][:, :, :1]) * seen[:, :, hand]
                size = from_wrist.square().sum(dim=3).mean(dim=2).sqrt().clamp(min=0.05)
                parts.append((from_wrist / size[:, :, None, None]).flatten(2))
        if config.use_mask:
            parts.append(seen.flatten(2))
        return torch.cat(parts, dim=2)


class SignEncoderLayer(nn.Module):
    """A pre-norm layer of a Transformer encoder (Xiong et al. 2020, arXiv:2002.04745) with GELU."""

    def __init__(self, config: SignTransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout_prob = config.num_attention_heads, config.dropout
        self.convolution = SignConvolution(config) if config.conv_kernel else None
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        """``hidden`` [B, T, H]; ``shown`` bool [B, 1, 1, T]: the frames that may be attended to."""
        if self.convolution is not None:
            hidden = hidden + self.dropout(self.convolution(hidden, shown[:, 0, 0, :, None]))
        parts = self.query_key_value(self.attention_norm(hidden)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=shown, dropout_p=self.dropout_prob if self.training else 0.0
        )
        hidden = hidden + self.dropout(self.output(attended.transpose(1, 2).flatten(2)))
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))


class SignConvolution(nn.Module):
    """A Conformer's convolution (Gulati et al. 2020, arXiv:2005.08100), with layer norm instead of batch norm."""

    def __init__(self, config: SignTransformerConfig) -> None:
        super().__init__()
        width, kernel = config.hidden_size, config.conv_kernel
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.depthwise_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """``hidden`` [B, T, H]; ``real`` bool [B, T, 1]: padding is set to 0, as beyond the ends."""
        gated = functional.glu(self.expand(self.norm(hidden)), dim=-1) * real
        mixed = self.depthwise(gated.transpose(1, 2)).transpose(1, 2)
        return self.output(functional.silu(self.depthwise_norm(mixed)))


def positions(length: int, width: int, device: torch.device) -> torch.Tensor:
    """Sinusoidal positions [length, width] (Vaswani et al. 2017), for any length."""
    frequencies = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))
    angles = torch.arange(length, device=device).unsqueeze(1) * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class SignGru(SignModel):
    """Stacked GRUs over the features of frames; the state after a clip's last frame is the input of the two heads."""

    config_class = SignGruConfig

    def __init__(self, config: SignGruConfig) -> None:
        super().__init__(config)
        widths = [config.input_width, *config.gru_sizes]
        self.grus = nn.ModuleList(nn.GRU(one, other, batch_first=True) for one, other in itertools.pairwise(widths))
        self.dropout = nn.Dropout(config.dropout)
        self.make_heads(widths[-1], None)
        self.post_init()

    def forward(
        self, frames: torch.Tensor, attention_mask: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> SignOutput:
        """Logits of clips ``frames`` [B, T, D]; ``attention_mask`` [B, T] is 0 for padding."""
        if attention_mask is None:
            attention_mask = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
        lengths = attention_mask.sum(dim=1).cpu()
        frames = self.standardised(frames, attention_mask.bool())
        packed = nn.utils.rnn.pack_padded_sequence(frames, lengths, batch_first=True, enforce_sorted=False)
        for number, gru in enumerate(self.grus):
            if number:
                packed = packed._replace(data=self.dropout(packed.data))
            # The GRU has a list of its weights, which is outdated after FSDP replaces them.
            gru._flat_weights = [getattr(gru, name) for name in gru._flat_weights_names]
            packed, last = gru(packed)
        return self.heads(self.dropout(last[0]))


def load_pretrained(model: SignModel, weights: str) -> str:
    """Loads ``weights`` of an earlier run into ``model``, except heads for other classes; a line says what was loaded.

    ``weights`` is a run's best/ or last/, or a file (:func:`checkpoints.read_state`); known prefixes of its names are
    taken off. A head is another one if its shape differs, or the names of its classes in the config.json beside it.
    The log variances of a loss with learned weights may be missing.

    Raises:
        UserError: they cannot be read, or belong to another model or input.
    """
    place = Path(weights)
    if not place.exists():
        raise UserError(f"--weights {weights}: no such file or folder; it takes best/ of a run, or a file of weights")
    try:
        config = _config_beside(place)
        state = read_state(place)
    except UserError as error:
        raise UserError(f"--weights {error}") from None
    _check_same_kind(model, config, weights)
    prefix, state, new, unfit = min(
        ((prefix, *_without_other_heads(model, found, config)) for prefix, found in without_prefixes(state)),
        key=lambda candidate: len(candidate[3]),
    )
    own = model.state_dict()
    if unfit:
        fitted = sum(name in own and own[name].shape == tensor.shape for name, tensor in state.items())
        name = next(iter(unfit))
        raise UserError(
            f"--weights {weights}: not the weights of this {model.config.model_type}: {fitted} of its {len(own)} "
            f"tensors fit; {name} {unfit[name]}"
        )
    model.load_state_dict(state, strict=False)
    return (
        f"Loaded {len(state)} tensors from {weights}"
        + (f", whose names begin with {prefix}" if prefix else "")
        + (f", all except {' and '.join(new)}, whose classes are others" if new else "")
    )


def _config_beside(place: Path) -> dict:
    """The config.json of a sign model beside its weights; empty: there is none."""
    path = (place if place.is_dir() else place.parent) / "config.json"
    config = read_json(path) if path.is_file() else {}
    return config if place.is_dir() or str(config.get("model_type")).startswith("sign_") else {}


def _check_same_kind(model: SignModel, config: dict, weights: str) -> None:
    """UserError where the config beside the weights names another model, or a setting that no shape shows."""
    if config and config.get("model_type") != model.config.model_type:
        raise UserError(f"--weights {weights}: a {config.get('model_type')}, not a {model.config.model_type}")
    usual = type(model.config)()
    for name in COMPUTED:
        ours = getattr(model.config, name, None)
        theirs = config.get(name, getattr(usual, name, None)) if config else ours
        if ours != theirs:
            raise UserError(f"--weights {weights}: trained with {name} {theirs}, but this run has {ours}")


def _without_other_heads(
    model: SignModel, state: dict[str, torch.Tensor], config: dict
) -> tuple[dict[str, torch.Tensor], list[str], dict[str, str]]:
    """``state`` without heads for other classes; those heads; and what does not fit: name, why."""
    own = model.state_dict()
    new = [
        head
        for head, names in HEADS.items()
        if (names in config and list(config[names]) != list(getattr(model.config, names)))
        or any(name.startswith(f"{head}.") and state[name].shape != own[name].shape for name in own if name in state)
        or not any(name.startswith(f"{head}.") for name in state)
    ]
    free = (*(f"{head}." for head in new), "log_variances")  # which may be missing
    kept = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(free[:-1]) and (name in own or name != "log_variances")
    }
    unfit = {name: "is not in this model" for name in kept if name not in own}
    unfit |= {
        name: f"has the shape {list(tensor.shape)}, not {list(own[name].shape)}"
        for name, tensor in kept.items()
        if name in own and own[name].shape != tensor.shape
    }
    unfit |= {name: "is missing" for name in own if name not in kept and not name.startswith(free)}
    return kept, new, unfit


AutoConfig.register(SignTransformerConfig.model_type, SignTransformerConfig, exist_ok=True)
AutoConfig.register(SignGruConfig.model_type, SignGruConfig, exist_ok=True)
AutoModel.register(SignTransformerConfig, SignTransformer, exist_ok=True)
AutoModel.register(SignGruConfig, SignGru, exist_ok=True)
