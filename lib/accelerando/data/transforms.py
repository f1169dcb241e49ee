"""From image files to uint8 tensors, with an augmentation that depends only on (seed, epoch, row)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from accelerando.base.rng import random_state_of
from accelerando.data.decode import decode_image, resize, resize_and_crop

if TYPE_CHECKING:
    import torch

    from accelerando.data.decode import Source

AugmentationName = Literal["none", "simple", "advanced"]


class ImageTransform:
    """Image file -> uint8 [3, size, size], ready to be normalised.

    ``none``: the shorter side resized to ``shorter`` (default: ``size``), then a center crop, as CLIP's processor does;
    with ``square`` both sides resized, as SigLIP's does; ``mode`` is bicubic or bilinear. ``simple``: resized to a
    square, a horizontal flip with probability 0.5, and a random crop after padding by an eighth. ``advanced``: resized
    to a square, TrivialAugmentWide (Müller and Hutter 2021, arXiv:2103.10158), a rectangle erased with probability 0.2
    and filled with ``mean`` (0 to 1, per channel). A file is decoded at the scale needed (``exact=False``), or in full,
    as the processor of a saved model does.
    """

    def __init__(
        self,
        size: int,
        augmentation: AugmentationName = "none",
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        exact: bool = True,
        square: bool = False,
        shorter: int | None = None,
        mode: str = "bicubic",
    ) -> None:
        self.size, self.augmentation, self.mean = size, augmentation, tuple(mean)
        self.exact, self.square, self.shorter, self.mode = exact, square, shorter or size, mode
        self._random: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, source: Source, seed: Sequence[int] = (0, 0, 0)) -> torch.Tensor:
        """Decodes and transforms; ``seed`` is (seed, epoch, row). ValueError or OSError: it is not an image."""
        pixels = decode_image(source, None if self.exact else self.size)
        if self.augmentation == "none" and not self.square:
            return resize_and_crop(pixels, self.size, self.shorter, self.mode).contiguous()
        pixels = resize(pixels, (self.size, self.size), self.mode)
        if self.augmentation == "none":
            return pixels.contiguous()
        if self._random is None:
            self._random = self._make_random()
        with random_state_of(seed):
            return self._random(pixels).contiguous()

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_random": None}

    def _make_random(self) -> Callable[[torch.Tensor], torch.Tensor]:
        if self.augmentation == "simple":
            return flip_and_crop
        from torchvision.transforms import v2

        grey = [round(255 * value) for value in self.mean]
        return v2.Compose([v2.TrivialAugmentWide(), v2.RandomErasing(0.2, value=grey)])


def flip_and_crop(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [3, S, S], flipped with probability 0.5 and shifted by up to an eighth, with reflection padding.

    The same as torchvision's RandomHorizontalFlip and RandomCrop, without a conversion to float32.
    """
    import torch

    size, edge = pixels.shape[-1], pixels.shape[-1] // 8
    if torch.rand(()).item() < 0.5:
        pixels = pixels.flip(-1)
    top, left = torch.randint(0, 2 * edge + 1, (2,)).tolist()
    pixels = torch.nn.functional.pad(pixels, (edge,) * 4, mode="reflect")
    return pixels[:, top : top + size, left : left + size]


def normalise(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 [B, 3, H, W] -> float32 in the same memory format, (value / 255 - mean) / std per channel."""
    import torch

    mean, std = (255 * pixels.new_tensor(list(values), dtype=torch.float32) for values in (mean, std))
    floats = pixels.float()
    view, width = floats, floats.shape[3]
    if floats.is_contiguous() or not floats.is_contiguous(memory_format=torch.channels_last):
        mean, std = mean[:, None, None], std[:, None, None]
    else:  # whole rows of pixels at once: an inner loop over three channels would be slow
        view = floats.permute(0, 2, 3, 1).view(len(floats), -1, width * len(mean))
        mean, std = mean.repeat(width), std.repeat(width)
    view.sub_(mean).div_(std)  # in place: a batch of floats is large
    return floats
