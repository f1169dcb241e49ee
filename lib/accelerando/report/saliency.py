"""Saliency maps of image classifiers, by Grad-CAM and by attention, and the images of their mistakes.

The layers are found by running the model instead of from a table of names, so that models of torchvision, timm and
transformers all work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

COLOURS = "inferno"  # matplotlib's colour map
SIDE = 192  # pixels of an image in a report: twice the resolution at which most screens show it
AT_ONCE = 4  # images per batch: large Transformers need much memory for each
LAST_CALLS = 32  # layer calls whose outputs are kept: more than a Transformer's block and head have
MOST_EXTRA = 16  # class and register tokens before the patch tokens


class Viewable(Protocol):
    """Samples that can be shown as an image."""

    def thumbnail(self, row: int, side: int) -> np.ndarray | None:
        """The whole image of a sample, uint8 [H, W, 3], no smaller than ``side`` if it can be; None: unreadable."""

    def seen(self, row: int) -> torch.Tensor:
        """The part of it that the model takes, uint8 [3, S, S]."""


class Layout(NamedTuple):
    """How an output represents h * w positions of an image: [B, C, h, w], [B, h, w, C] or tokens [B, n + h * w, C]."""

    kind: str  # channels_first, channels_last or tokens
    height: int
    width: int


def heat_maps(model: torch.nn.Module, pixels: torch.Tensor, classes: Sequence[int]) -> np.ndarray | None:
    """How much each part of an image contributes to a class, float32 [B, h, w] from 0 to 1; None: no suitable layer.

    ``pixels``: normalised, [B, 3, H, W], on the model's device; ``classes``: one for each image. ``model`` takes
    ``pixel_values``, returns ``.logits``, and is not changed. The score is the class's logit minus the mean of all
    logits, since softmax depends only on differences.

    Models with feature maps, and Transformers that average over patches: Grad-CAM (Selvaraju et al. 2017,
    arXiv:1610.02391) at the last layer with positions: activation times gradient, summed over the channels, the
    positive part. The gradient is not averaged over the positions (HiResCAM, Draelos and Carin 2020,
    arXiv:2011.08891): the result is the same if the model itself averages over them, as ResNets do, and more faithful
    otherwise.

    Transformers with a class token: attention times its gradient, the positive part, averaged over the heads and
    rolled out over the layers (Chefer et al. 2021, arXiv:2103.15679; the rollout without gradient, Abnar and Zuidema
    2020, arXiv:2005.00928, is the same for all classes). If the attention is not accessible, Grad-CAM at the last layer
    whose patches have a gradient.
    """
    import torch

    chosen = dict(list(_spatial_calls(model, pixels).items())[-LAST_CALLS:])
    kept: dict[int, torch.Tensor] = {}
    attention: list[torch.Tensor] = []

    def keep(number: int, output: torch.Tensor) -> torch.Tensor | None:
        if number not in chosen:
            return None
        kept[number] = _in_graph(output)
        return kept[number].clone()  # the next layer may change it in place

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
    """The relevance of each token for those that the head has ``read`` [B, N]; [B, N].

    ``attended``: attention [B, heads, N, N] and its gradient, for each layer.
    """
    matters = read.float()[:, None]
    for weights, slope in reversed(attended):
        matters = matters + matters @ (weights.detach() * slope).clamp(min=0).mean(1)
    return matters[:, 0]


def _among(weights: torch.Tensor, tokens: torch.Tensor) -> bool:
    """True if the shapes are those of self-attention among these tokens [B, N, C]."""
    return weights.shape[0] == tokens.shape[0] and weights.shape[-2:] == (tokens.shape[1], tokens.shape[1])


def _in_graph(values: torch.Tensor) -> torch.Tensor:
    """``values`` with a gradient: the graph begins here if there is none yet."""
    return values if values.requires_grad else values.detach().requires_grad_()


# ----------------------------------------------------------------------------------------- outputs that have positions


def _spatial_calls(model: torch.nn.Module, pixels: torch.Tensor) -> dict[int, Layout]:
    """The layer calls whose output has positions, by their number, in the order in which they return."""
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
        _forward(model, pixels[:1].repeat(2, 1, 1, 1), look)  # two images: an output [1, ...] may be shared by all
    return found


def _layout(shape: Sequence[int], ratio: float, last: Layout) -> Layout | None:
    """The positions in an output of this shape, at most as many as in the ``last`` one; ``ratio``: height / width.

    Since their number never grows, feature maps are not confused with attention [B, heads, n, n].
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
    """[B, h, w, C]; without the tokens before the patch tokens."""
    if layout.kind == "channels_first":
        return values.movedim(1, -1)
    if layout.kind == "channels_last":
        return values
    return values[:, -layout.height * layout.width :].unflatten(1, (layout.height, layout.width))


# ------------------------------------------------------------------------------------------------------ forward hooks


def _forward(model: torch.nn.Module, pixels: torch.Tensor, watch: Callable[[int, Any], Any]) -> torch.Tensor:
    """Logits [B, C]; ``watch`` gets the number and the output of each call of a layer, and may replace the output."""
    import torch

    numbers = itertools.count()

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> torch.Tensor | None:
        number = next(numbers)
        return watch(number, output) if isinstance(output, torch.Tensor) else None

    handles = [module.register_forward_hook(hook) for module in model.modules() if module is not model]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it would bypass the attention function that is replaced
        # The forward of the class: Accelerate sets one with autocast on the instance.
        return type(model).forward(model, pixel_values=pixels).logits
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode with frozen weights, so that the graph does not include them; restored afterwards.

    Opacus' hooks, which treat every backward as part of training, are removed meanwhile.
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
    """Appends the attention weights that torch computes, [B, heads, N, N], to ``kept``, with a graph."""
    from torch.nn import functional

    fused = functional.scaled_dot_product_attention

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **others: Any,
    ) -> torch.Tensor:
        if is_causal or any(others.values()) or query.dim() != 4 or query.shape != key.shape:
            return fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others)
        logits = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None:
            logits = logits + attn_mask if attn_mask.is_floating_point() else logits.masked_fill(~attn_mask, -math.inf)
        kept.append(_in_graph(logits.softmax(-1)))
        return kept[-1] @ value

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = fused


# --------------------------------------------------------------------------------------------------------- images


def add_images(
    mistakes: list[dict[str, Any]],
    score: dict[str, np.ndarray],
    images: Viewable,
    model: torch.nn.Module | None,
    mean: Sequence[float],
    std: Sequence[float],
    looked_at: int = 8,
) -> None:
    """Adds its image to each of the worst mistakes as ``image``, and to the first few a heat map as ``heat``.

    ``score``: ``logits`` [n, C] and ``row`` [n] in ``images``. ``heat`` shows what contributed to the predicted class,
    over the part of the image that was evaluated; it is omitted without a ``model`` or if no map can be computed. Both
    are small JPEGs.
    """
    import torch

    from accelerando.base.errors import first_line
    from accelerando.base.log import log
    from accelerando.data.decode import small_jpeg
    from accelerando.data.transforms import normalise

    rows = [int(score["row"][mistake["row"]]) for mistake in mistakes]
    for mistake, row in zip(mistakes, rows, strict=True):
        pixels = images.thumbnail(row, SIDE)
        if pixels is not None:
            mistake["image"] = small_jpeg(pixels, SIDE)
    if model is None:
        return
    predicted = [int(score["logits"][mistake["row"]].argmax()) for mistake in mistakes]
    device = next(model.parameters()).device
    for start in range(0, min(looked_at, len(rows)), AT_ONCE):
        part = slice(start, min(start + AT_ONCE, looked_at))
        pixels = torch.stack([images.seen(row) for row in rows[part]])
        try:
            heat = heat_maps(model, normalise(pixels.to(device), mean, std), predicted[part])
        except RuntimeError as error:  # too little memory, or a layer without a gradient
            log.warning("No heat maps in the report: %s", first_line(error))
            return
        if heat is None:
            return
        for mistake, seen, warmth in zip(mistakes[part], pixels.permute(0, 2, 3, 1).numpy(), heat, strict=True):
            mistake["heat"] = overlay(seen, warmth)


def overlay(pixels: np.ndarray, heat: np.ndarray) -> bytes:
    """A JPEG of side ``SIDE``: an image uint8 [S, S, 3] in grey, blended with the colours of ``heat`` [h, w]."""
    from matplotlib import colormaps
    from PIL import Image

    from accelerando.data.decode import small_jpeg

    grey = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    smooth = Image.fromarray(heat.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    colours = 255 * colormaps[COLOURS](np.asarray(smooth).clip(0, 1))[..., :3]
    return small_jpeg((0.5 * np.asarray(grey)[..., None] + 0.5 * colours).round().astype(np.uint8), SIDE)
