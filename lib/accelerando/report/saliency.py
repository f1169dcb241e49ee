"""Where a classifier of pictures looked: heat maps by Grad-CAM and by attention, and the pictures of its mistakes.

The layer that is looked at is found by running the net, not by a table of names, so that nets of torchvision, timm and
transformers all do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

    from accelerando.data.images import EvaluationImages

COLOURS = "inferno"  # matplotlib's, from nothing to the most
SIDE = 192  # of a picture in a report, in pixels: twice as sharp as it is shown on most screens
AT_ONCE = 4  # pictures: large Transformers keep much for each
LAST_CALLS = 32  # of layers, whose outputs are kept: more than a Transformer's block and head have
MOST_EXTRA = 16  # class and register tokens in front of those of the patches


class Layout(NamedTuple):
    """How an output holds h * w positions of a picture: [B, C, h, w], [B, h, w, C] or tokens [B, n + h * w, C]."""

    kind: str  # channels_first, channels_last or tokens
    height: int
    width: int


def heat_maps(model: torch.nn.Module, pixels: torch.Tensor, classes: Sequence[int]) -> np.ndarray | None:
    """How much each part of a picture speaks for a class, float32 [B, h, w] from 0 to 1; None where no layer fits.

    ``pixels``: normalised, [B, 3, H, W], on the model's device; ``classes``: one for each picture. ``model`` takes
    ``pixel_values``, gives ``.logits``, and is left as it was. The score is the class's logit less the mean of all, as
    softmax knows only differences.

    Nets with a map of features, and Transformers that average over their patches: Grad-CAM (Selvaraju et al. 2017,
    arXiv:1610.02391) at the last layer that still has positions, activation times gradient, summed over the channels,
    the positive part. The gradient is not averaged over the positions (HiResCAM, Draelos and Carin 2020,
    arXiv:2011.08891): that is the same where the net itself averages over them, as ResNets do, and true to what was
    seen where it does not.

    Transformers that decide by a class token: attention times its gradient, the positive part, averaged over the heads
    and rolled out over the layers (Chefer et al. 2021, arXiv:2103.15679; the rollout without gradient is Abnar and
    Zuidema's, 2020, arXiv:2005.00928, which is the same for all classes). Where the attention is out of reach, Grad-CAM
    at the last layer whose patches have a gradient.
    """
    import torch

    chosen = dict(list(_spatial_calls(model, pixels).items())[-LAST_CALLS:])
    kept: dict[int, torch.Tensor] = {}
    attention: list[torch.Tensor] = []

    def keep(number: int, output: torch.Tensor) -> torch.Tensor | None:
        if number not in chosen:
            return None
        kept[number] = _in_graph(output)
        return kept[number].clone()  # the next layer may work in place

    exact = torch.autocast(pixels.device.type, enabled=False)  # backward too
    with exact, _evaluating(model), _attention_kept(attention), torch.enable_grad():
        logits = _forward(model, pixels, keep)
        classes = torch.as_tensor(classes, device=logits.device)[:, None]
        score = (logits.gather(1, classes) - logits.mean(1, keepdim=True)).sum()
        if not score.requires_grad:
            return None
        slopes = torch.autograd.grad(score, [*kept.values(), *attention], allow_unused=True)
    attended = [pair for pair in zip(attention, slopes[len(kept) :], strict=True) if pair[1] is not None]
    ends = [
        (chosen[number], output.detach(), slope)
        for (number, output), slope in zip(kept.items(), slopes[: len(kept)], strict=True)
        if slope is not None
    ]
    for layout, output, slope in reversed(ends):
        at_patches = _by_position(slope, layout)
        if at_patches.any():
            heat = (at_patches * _by_position(output, layout)).sum(-1).clamp(min=0)
        elif layout.kind == "tokens" and (pairs := [pair for pair in attended if _among(pair[0], output)]):
            heat = _rolled_out(pairs, slope.abs().sum(-1) > 0)[:, -layout.height * layout.width :]
            heat = heat.unflatten(1, (layout.height, layout.width))
        else:
            continue
        heat = heat.nan_to_num(0)
        most = heat.amax((1, 2), keepdim=True)
        return torch.where(most > 0, heat / most, 0).float().cpu().numpy()
    return None


def _rolled_out(attended: list[tuple[torch.Tensor, torch.Tensor]], read: torch.Tensor) -> torch.Tensor:
    """How much each token matters to those that the head has ``read`` [B, N], [B, N].

    ``attended``: attention [B, heads, N, N] and its gradient, for each layer.
    """
    matters = read.float()[:, None]
    for weights, slope in reversed(attended):
        matters = matters + matters @ (weights.detach() * slope).clamp(min=0).mean(1)
    return matters[:, 0]


def _among(weights: torch.Tensor, tokens: torch.Tensor) -> bool:
    """Whether attention is that of these tokens [B, N, C] among each other."""
    return weights.shape[0] == tokens.shape[0] and weights.shape[-2:] == (tokens.shape[1], tokens.shape[1])


def _in_graph(values: torch.Tensor) -> torch.Tensor:
    """``values`` so that a gradient with respect to them exists: where there is no graph yet, it begins here."""
    return values if values.requires_grad else values.detach().requires_grad_()


# ------------------------------------------------------------------------------------------------ what has positions


def _spatial_calls(model: torch.nn.Module, pixels: torch.Tensor) -> dict[int, Layout]:
    """The calls of layers, by their number, whose output has positions, in the order in which they end."""
    import torch

    height, width = pixels.shape[-2:]
    found: dict[int, Layout] = {}
    last = Layout("", height, width)

    def look(number: int, output: torch.Tensor) -> None:
        nonlocal last
        if output.shape[:1] == (2,) and output.is_floating_point():
            layout = _layout(output.shape, height / width, last)
            if layout:
                found[number] = last = layout

    with _evaluating(model), torch.no_grad():
        _forward(model, pixels[:1].repeat(2, 1, 1, 1), look)  # two, as an output [1, ...] may belong to all pictures
    return found


def _layout(shape: Sequence[int], ratio: float, last: Layout) -> Layout | None:
    """The positions in an output of this shape, at most as many as in the ``last`` one; ``ratio``: height / width.

    That their number never grows tells maps from attention [B, heads, n, n].
    """
    if len(shape) == 4:
        for kind, height, width in (("channels_first", *shape[2:]), ("channels_last", *shape[1:3])):
            if 1 < height * width <= last.height * last.width and abs(height - width * ratio) < max(1, ratio):
                return Layout(kind, height, width)
    elif len(shape) == 3:
        for stride in range(1, max(last.height, last.width)):
            height, width = math.ceil(last.height / stride), math.ceil(last.width / stride)
            if height * width <= shape[1]:
                return Layout("tokens", height, width) if shape[1] <= height * width + MOST_EXTRA else None
    return None


def _by_position(values: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[B, h, w, C]; tokens that belong to no patch stand in front and are left out."""
    if layout.kind == "channels_first":
        return values.movedim(1, -1)
    if layout.kind == "channels_last":
        return values
    return values[:, -layout.height * layout.width :].unflatten(1, (layout.height, layout.width))


# ------------------------------------------------------------------------------------------ a look into a running net


def _forward(model: torch.nn.Module, pixels: torch.Tensor, watch: Callable[[int, Any], Any]) -> torch.Tensor:
    """Logits [B, C]; ``watch`` gets the number and the output of each call of a layer, and may replace the output."""
    import torch

    numbers = itertools.count()

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        number = next(numbers)
        return watch(number, output) if isinstance(output, torch.Tensor) else None

    handles = [module.register_forward_hook(hook) for module in model.modules() if module is not model]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it passes by the attention that is kept
        # The class's own forward: Accelerate puts one with autocast into the object.
        return type(model).forward(model, pixel_values=pixels).logits
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode and with fixed weights, so that no graph leads to them; afterwards as before.

    Opacus' hooks, which take every backward for one of training, are set aside.
    """
    before = [(module, module.training, module._backward_hooks) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for module, _, hooks in before:
            module._backward_hooks = type(hooks)()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, training, hooks in before:
            module.training, module._backward_hooks = training, hooks


@contextmanager
def _attention_kept(kept: list[torch.Tensor]) -> Iterator[None]:
    """Attention that torch computes, [B, heads, N, N], is appended to ``kept``, with a graph."""
    from torch.nn import functional

    fused = functional.scaled_dot_product_attention

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, **others: Any) -> torch.Tensor:  # fmt: skip
        if is_causal or any(others.values()) or query.dim() != 4 or query.shape != key.shape:
            return fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others)
        odds = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None:
            odds = odds + attn_mask if attn_mask.is_floating_point() else odds.masked_fill(~attn_mask, -math.inf)
        kept.append(_in_graph(odds.softmax(-1)))
        return kept[-1] @ value

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = fused


# --------------------------------------------------------------------------------------------------------- pictures


def add_pictures(
    mistakes: list[dict[str, Any]],
    score: dict[str, np.ndarray],
    images: EvaluationImages,
    model: torch.nn.Module | None,
    mean: Sequence[float],
    std: Sequence[float],
    looked_at: int = 8,
) -> None:
    """Gives each of the worst mistakes its picture as ``image``, and the first few a heat map, ``heat``.

    ``score``: ``logits`` [n, C] and ``row`` [n], which of ``images``. ``heat`` shows what spoke for the class that was
    predicted, over the part of the picture that was evaluated; without a ``model``, or for one that has no such map, it
    is left out. Both are small JPEGs.
    """
    import torch

    from accelerando.base.errors import first_line
    from accelerando.base.log import log
    from accelerando.data.decode import pixels_of, small_jpeg
    from accelerando.data.images import read_or_none
    from accelerando.data.transforms import normalise

    rows = [int(score["row"][mistake["row"]]) for mistake in mistakes]
    for mistake, row in zip(mistakes, rows, strict=True):
        pixels = read_or_none(images.files, row, lambda source: pixels_of(source, SIDE))
        if pixels is not None:
            mistake["image"] = small_jpeg(pixels, SIDE)
    if model is None:
        return
    predicted = [int(score["logits"][mistake["row"]].argmax()) for mistake in mistakes]
    device = next(model.parameters()).device
    for start in range(0, min(looked_at, len(rows)), AT_ONCE):
        part = slice(start, min(start + AT_ONCE, looked_at))
        pixels = torch.stack([images[row]["pixel_values"] for row in rows[part]])
        try:
            heat = heat_maps(model, normalise(pixels.to(device), mean, std), predicted[part])
        except RuntimeError as error:  # too little memory, or a layer without a gradient: the report does without
            log.warning("No heat maps in the report: %s", first_line(error))
            return
        if heat is None:
            return
        for mistake, seen, warmth in zip(mistakes[part], pixels.permute(0, 2, 3, 1).numpy(), heat, strict=True):
            mistake["heat"] = overlay(seen, warmth)


def overlay(pixels: np.ndarray, heat: np.ndarray) -> bytes:
    """A JPEG with sides of ``SIDE``: a square picture uint8 [S, S, 3] in grey under the colours of ``heat`` [h, w]."""
    from matplotlib import colormaps
    from PIL import Image

    from accelerando.data.decode import small_jpeg

    grey = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    smooth = Image.fromarray(heat.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    colours = 255 * colormaps[COLOURS](np.asarray(smooth).clip(0, 1))[..., :3]
    return small_jpeg((0.5 * np.asarray(grey)[..., None] + 0.5 * colours).round().astype(np.uint8), SIDE)
