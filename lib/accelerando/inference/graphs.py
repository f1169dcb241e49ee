"""Models with tensors in and tensors out, as formats for deployment need them, with the preprocessing that fits in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from accelerando.data.keypoints import LEFT_SHOULDER, NUM_POINTS, RIGHT_SHOULDER
from accelerando.models.sign import SignGru

if TYPE_CHECKING:
    from accelerando.models.clip_classifier import ClipClassifier
    from accelerando.models.sign import SignModel


class Logits(nn.Module):
    """The logits of a classifier of texts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, C] of token ids [B, T]."""
        more = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **more).logits


class TextEmbedding(nn.Module):
    """The embeddings of a CLIP for texts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings of unit length [B, d] of token ids [B, T]."""
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        return functional.normalize(self.model.get_text_features(input_ids=input_ids, **mask).pooler_output, dim=-1)


class Colours(nn.Module):
    """Pixels 0 to 255 [N, 3, H, W] -> (value / 255 - mean) / std per channel, in the precision of the weights."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(std, dtype=torch.float32)[:, None, None])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The normalised pixels."""
        return (pixels.to(self.mean.dtype) - self.mean) / self.std


class PixelLogits(nn.Module):
    """The logits of an image classifier for pixels 0 to 255."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model, self.colours = model, Colours(mean, std)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] of uint8 [B, 3, S, S]."""
        return self.model(pixel_values=self.colours(pixels)).logits


class ImageEmbedding(PixelLogits):
    """The embeddings of a CLIP for pixels 0 to 255."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings of unit length [B, d] of uint8 [B, 3, S, S]."""
        found = self.model.get_image_features(pixel_values=self.colours(pixels))
        return functional.normalize(found.pooler_output, dim=-1)


class FrameLogits(PixelLogits):
    """The logits of a :class:`ClipClassifier` for images, as videos of one frame, and videos of equal length."""

    model: ClipClassifier

    def __init__(self, model: ClipClassifier, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(model, mean, std)
        if model.head is None:  # the prompts' embeddings are constants, and the text tower is no part of the graph
            with torch.no_grad():
                self.register_buffer("classes", model.clip.logit_scale.exp() * model.class_embeddings())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] of uint8 [B, F, 3, S, S]; see ``ClipClassifier.forward``."""
        features = self.model.embed_frames(self.colours(pixels.flatten(0, 1)))
        pooled = features.unflatten(0, pixels.shape[:2]).mean(1)
        if self.model.config.features == "embedding":
            pooled = functional.normalize(pooled, dim=-1)
        if self.model.head is None:
            return pooled.to(self.classes.dtype) @ self.classes.T
        return self.model.head(pooled.to(self.model.head.weight.dtype))


class SignLogits(nn.Module):
    """The logits of a sign model for clips as they are in NPZ files: keypoints are normalised by the body here."""

    def __init__(self, model: SignModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, frames: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of glosses [B, G] and categories [B, C] of frames [B, T, D]; see ``SignModel.forward``."""
        if self.model.config.normalisation == "body":
            frames, mask = normalised_by_body(frames, attention_mask, mask)
        output = self.output(frames, attention_mask, mask)
        return output.gloss_logits, output.cat_logits

    def output(self, frames: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The model's output."""
        return self.model(frames=frames, attention_mask=attention_mask, mask=mask)


class PaddedGru(SignLogits):
    """A :class:`SignGru` without packed sequences, which no format has: each GRU computes the padding too, behind the
    frames, and the state after a clip's last frame is taken. ``form``: how the GRU is written."""

    def __init__(self, model: SignGru, form: str) -> None:
        super().__init__(model)
        self.form = {"onnx": _gru_operator, "pt2": _gru_scan}.get(form, _gru_module)

    def output(self, frames: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The model's output."""
        hidden = self.model.standardised(frames, attention_mask.bool())
        for gru in self.model.grus:
            hidden = self.form(gru, hidden)
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return self.model.heads(hidden[rows, attention_mask.sum(1) - 1])


def sign_graph(model: SignModel, form: str) -> SignLogits:
    """``model`` as a graph; ``form``: onnx, pt2 or torch, which write a GRU in three ways."""
    return PaddedGru(model, form) if isinstance(model, SignGru) else SignLogits(model)


def _gru_module(gru: nn.GRU, frames: torch.Tensor) -> torch.Tensor:
    return gru(frames)[0]


def _gru_operator(gru: nn.GRU, frames: torch.Tensor) -> torch.Tensor:
    """ONNX's own operator, whose gates stand in another order."""

    def reordered(weight: torch.Tensor) -> torch.Tensor:
        reset, update, new = weight.chunk(3)
        return torch.cat([update, reset, new])

    weights = [reordered(weight)[None] for weight in (gru.weight_ih_l0, gru.weight_hh_l0)]
    bias = torch.cat([reordered(gru.bias_ih_l0), reordered(gru.bias_hh_l0)])[None]
    batch, length = frames.shape[:2]
    hidden = torch.onnx.ops.symbolic(
        "GRU", (frames.transpose(0, 1), *weights, bias),
        attrs={"hidden_size": gru.hidden_size, "linear_before_reset": 1}, dtype=frames.dtype,
        shape=(length, 1, batch, gru.hidden_size),
    )  # fmt: skip
    return hidden[:, 0].transpose(0, 1)


def _gru_scan(gru: nn.GRU, frames: torch.Tensor) -> torch.Tensor:
    """torch.nn.GRU's formula step by step, since torch.export would fix the number of steps of the module."""
    from torch._higher_order_ops.scan import scan

    def step(hidden: torch.Tensor, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        reset, update, new = part.chunk(3, -1)
        own_reset, own_update, own_new = functional.linear(hidden, gru.weight_hh_l0, gru.bias_hh_l0).chunk(3, -1)
        candidate = torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)
        hidden = candidate + torch.sigmoid(update + own_update) * (hidden - candidate)
        return hidden, hidden.clone()

    parts = functional.linear(frames, gru.weight_ih_l0, gru.bias_ih_l0).transpose(0, 1)
    _, states = scan(step, frames.new_zeros(frames.shape[0], gru.hidden_size), parts, dim=0)
    return states.transpose(0, 1)


def normalised_by_body(
    frames: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`data.keypoints.normalise_by_body` of padded clips [B, T, 156]; and which points were seen [B, T, 78]."""
    points = frames.unflatten(2, (NUM_POINTS, 2))
    seen = (points != 0).any(3) if mask is None else mask
    seen = seen & attention_mask.bool()[:, :, None]
    both = seen[:, :, LEFT_SHOULDER] & seen[:, :, RIGHT_SHOULDER]  # [B, T]
    left, right = points[:, :, LEFT_SHOULDER], points[:, :, RIGHT_SHOULDER]
    middle = torch.stack([_median((left + right)[:, :, axis] / 2, both) for axis in (0, 1)], dim=1)  # [B, 2]
    width = _median((left - right).square().sum(2).sqrt(), both)
    # Without shoulders: mean and standard deviation of all points.
    weight = seen[:, :, :, None].to(points.dtype)
    count = weight.sum((1, 2)).clamp(min=1)
    mean = (points * weight).sum((1, 2)) / count
    spread = (((points - mean[:, None, None]).square() * weight).sum((1, 2)) / count).sqrt()
    without = (width < 1e-4) & seen.any(2).any(1)
    middle = torch.where(without[:, None], mean, middle)
    unit = torch.where(without, 2 * spread.mean(1), width).clamp(min=1e-4)
    points = (points - middle[:, None, None]) / unit[:, None, None, None] * weight
    return points.flatten(2), seen


def _median(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The median of each row's ``counted`` values [B, T], 0 for a row without one: [B]."""
    far = torch.where(counted, values, torch.finfo(values.dtype).max)
    ordered = far.topk(values.shape[1], dim=1, largest=False).values  # sorted; ExecuTorch has no sort
    count = counted.sum(1)
    places = torch.stack([(count - 1).clamp(min=0) // 2, count // 2], dim=1)
    pair = ordered.gather(1, places.clamp(max=values.shape[1] - 1))
    return torch.where(count > 0, pair.mean(1), 0)
