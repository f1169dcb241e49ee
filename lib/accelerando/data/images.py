"""Labelled images: decoded at the scale needed, cropped, augmented and mixed, as a function of (seed, epoch, row)."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from accelerando.base.errors import first_line
from accelerando.base.rng import random_state_of
from accelerando.data.decode import (
    decode_crop,
    decode_for_evaluation,
    decode_pixels,
    evaluation_side,
    is_unreadable,
    pixels_of,
    to_channels_last,
)
from accelerando.data.image_cache import CachedImages
from accelerando.data.mixing import draw_partner, draw_share, sample_key
from accelerando.data.order import order_of_classes

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torchvision.transforms import v2

    from accelerando.data.decode import Source
    from accelerando.data.folders import ImageFiles
    from accelerando.data.order import Order


PolicyName = Literal["none", "randaugment", "trivialaugment"]


@dataclass(frozen=True)
class ImageAugmentation:
    """Random augmentation of a training image, drawn for each image and epoch.

    ``crop_scale``: the smallest crop, as a fraction of the area, at an aspect ratio of 3:4 to 4:3 (Szegedy et al.
    2014); 1: the crop of evaluation. ``flip``: probability of a horizontal flip. ``policy``: RandAugment (Cubuk et al.
    2019, arXiv:1909.13719) or TrivialAugmentWide (Müller and Hutter 2021, arXiv:2103.10158). ``erasing``: probability
    that a rectangle is filled with the mean (Zhong et al. 2017, arXiv:1708.04896).
    """

    crop_scale: float = 0.08
    flip: float = 0.5
    policy: PolicyName = "none"
    erasing: float = 0.0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)

    def __call__(self, source: Source, size: int, seed: tuple[int, ...], sound: bool = False) -> torch.Tensor:
        """The image as uint8 [3, size, size]; ``seed`` is (seed, epoch, row). ValueError or OSError: it is unreadable.

        ``sound``: see :func:`decode_crop`.
        """
        rng = np.random.default_rng(list(seed))
        if self.crop_scale < 1:
            pixels = decode_crop(source, size, lambda *sides: crop_box(*sides, self.crop_scale, rng), sound)
        else:
            pixels = decode_for_evaluation(source, size)
        if rng.random() < self.flip:
            pixels = pixels.flip(-1)
        if self.policy != "none" or self.erasing:
            with random_state_of(seed):
                pixels = self._policy(pixels)
        return to_channels_last(pixels)

    @cached_property
    def _policy(self) -> v2.Compose:
        from torchvision.transforms import v2

        steps: list[v2.Transform] = []
        if self.policy != "none":
            steps.append(v2.RandAugment() if self.policy == "randaugment" else v2.TrivialAugmentWide())
        if self.erasing:
            steps.append(v2.RandomErasing(self.erasing, value=[round(255 * value) for value in self.mean]))
        return v2.Compose(steps)


@dataclass
class TrainingImages:
    """The images of ``files``, augmented differently in each epoch; a map-style data set that takes the epoch.

    A sample has ``pixel_values`` uint8 [3, S, S], ``label``, ``other_label`` and ``share``: the label has weight
    ``share``, the other label the rest. They differ where two images are mixed, by MixUp (Zhang et al. 2017,
    arXiv:1710.09412) or CutMix (Yun et al. 2019, arXiv:1905.04899), with ``share`` from Beta(alpha, alpha); if both are
    on, each is used for half of the images. The other image is drawn from the whole set, so the result does not depend
    on batches or processes. ``valid`` is 0 for a file that cannot be read. ``sizes``: the side S, or the sides of
    progressive resizing, in order.
    """

    files: ImageFiles
    augmentation: ImageAugmentation
    sizes: tuple[int, ...]
    epochs: int = 1
    seed: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    balanced: bool = False
    unit: ClassVar[str] = "images"
    # For each row, whether its file was decoded completely without an error; shared by the workers.
    _sound: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._sound = np.frombuffer(mmap.mmap(-1, max(1, len(self.files))), np.bool_)

    def __len__(self) -> int:
        return len(self.files)

    def size_in(self, epoch: int) -> int:
        """The side of the images in ``epoch``: each of ``sizes`` is used for an equal number of epochs."""
        return self.sizes[min(len(self.sizes) - 1, epoch * len(self.sizes) // max(1, self.epochs))]

    def at(self, row: int, epoch: int, draw: int = 0) -> dict[str, Any]:
        """The sample as augmented in ``epoch``; each ``draw`` of it is augmented differently."""
        seed = sample_key(self.seed, epoch, row, draw)
        size, label = self.size_in(epoch), self.files.target(row)
        pixels = self._pixels(row, size, seed)
        sample = {"label": label, "other_label": label, "share": 1.0, "valid": float(pixels is not None)}
        if pixels is None:
            return sample | {"pixel_values": blank_image(size)}
        if self.mixup or self.cutmix:
            other, rng = draw_partner(seed, len(self))
            cut = self.cutmix > 0 and (not self.mixup or rng.random() < 0.5)
            second = self._pixels(other, size, (*seed, 2))
            if second is not None:
                alpha = self.cutmix if cut else self.mixup
                pixels, share = (cut_mix if cut else mix_up)(pixels, second, draw_share(alpha, rng), rng)
                sample |= {"other_label": self.files.target(other), "share": share}
        return sample | {"pixel_values": pixels}

    def epoch_order(self, seed: int, epoch: int) -> Order:
        """The order of rows in an epoch, int64 [n]; ``balanced``: every class equally often."""
        return order_of_classes(self.files.classes, self.balanced, seed, epoch)

    def prefetch(self, parts: Iterable[np.ndarray]) -> None:
        """Does nothing: the files are local."""

    def problem(self, row: int) -> str:
        """The file of a row and why it cannot be read."""
        return why_unreadable(self.files, row)

    def _pixels(self, row: int, size: int, seed: tuple[int, ...]) -> torch.Tensor | None:
        sound = bool(self._sound[row])
        pixels = read_or_none(self.files, row, lambda source: self.augmentation(source, size, seed, sound))
        self._sound[row] = pixels is not None
        return pixels


@dataclass
class EvaluationImages:
    """The images of ``files`` for evaluation: resized and center-cropped.

    A cache is used if it was made for this size, otherwise the files are read; the pixels are the same.
    """

    files: ImageFiles
    size: int
    unit: ClassVar[str] = "images"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> dict[str, Any]:
        label = self.files.target(row)
        shorter = evaluation_side(self.size)
        pixels = read_or_none(self.files, row, lambda source: decode_for_evaluation(source, self.size), shorter)
        sample = {"label": label, "other_label": label, "share": 1.0, "valid": float(pixels is not None)}
        return sample | {"pixel_values": blank_image(self.size) if pixels is None else pixels}

    def thumbnail(self, row: int, side: int) -> np.ndarray | None:
        """The whole image, uint8 [H, W, 3], perhaps reduced, with no side below ``side``; None: it is unreadable."""
        return read_or_none(self.files, row, lambda source: pixels_of(source, side))

    def seen(self, row: int) -> torch.Tensor:
        """What the model takes of it, uint8 [3, S, S]."""
        return self[row]["pixel_values"]

    def problem(self, row: int) -> str:
        """The file of a row and why it cannot be read."""
        return why_unreadable(self.files, row)


def read_or_none(
    files: ImageFiles, row: int, decoded: Callable[[Source], torch.Tensor], side: int | None = None
) -> torch.Tensor | None:
    """``decoded`` of the image of a row, or None if it is unreadable. OSError: an error of the disk.

    The image comes from the cache if there is one; with ``side``, only if the cache was made for exactly that side.
    """
    try:
        if isinstance(files, CachedImages) and side in (None, files.side):
            image = files.decoded(row)
            return None if image is None else decoded(image)
        return decoded(files.path(row).read_bytes())
    except (ValueError, OSError) as error:
        if not is_unreadable(error):
            raise
        return None


def blank_image(size: int) -> torch.Tensor:
    """A black image, uint8 [3, size, size], in place of one that cannot be read; it has no weight in the batch."""
    import torch

    return torch.zeros(3, size, size, dtype=torch.uint8)


def why_unreadable(files: ImageFiles, row: int) -> str:
    """The file of a row and why it cannot be read."""
    path = files.path(row)
    try:
        decode_pixels(path.read_bytes())
    except (ValueError, OSError) as error:
        return f"{path}: {' '.join(first_line(error).split())}"
    return f"{path}: it can be read now"


def write_image_processor(folder: Path, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Writes a configuration with which ``AutoImageProcessor`` preprocesses images as evaluation does here."""
    from transformers import CLIPImageProcessor

    CLIPImageProcessor(
        size={"shortest_edge": evaluation_side(size)},
        crop_size=size,
        resample=2,
        image_mean=list(mean),
        image_std=list(std),
    ).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------- random decisions


def crop_box(height: int, width: int, min_area: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop with ``min_area`` to 1 of the area and a ratio of 3:4 to 4:3.

    After ten failed draws, the largest center crop with such a ratio, as in torchvision.
    """
    for _ in range(10):
        area = height * width * rng.uniform(min_area, 1)
        shape = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        part_width, part_height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < part_width <= width and 0 < part_height <= height:
            top = int(rng.integers(height - part_height + 1))
            return top, int(rng.integers(width - part_width + 1)), part_height, part_width
    part_width = min(width, round(height * 4 / 3))
    part_height = min(height, round(width * 4 / 3))
    return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width


def mix_up(
    one: torch.Tensor, other: torch.Tensor, share: float, rng: np.random.Generator
) -> tuple[torch.Tensor, float]:
    """``share * one + (1 - share) * other``, uint8 [3, S, S], and the share."""
    import torch

    return torch.lerp(other.float(), one.float(), share).round_().to(torch.uint8), share


def cut_mix(
    one: torch.Tensor, other: torch.Tensor, share: float, rng: np.random.Generator
) -> tuple[torch.Tensor, float]:
    """``one`` with a rectangle of ``other``, uint8 [..., S, S], and the fraction of the area left to ``one``."""
    size = one.shape[-1]
    side = round(size * math.sqrt(1 - share))
    middle = rng.integers(0, size, 2)
    (top, bottom), (left, right) = (np.clip([at - side // 2, at - side // 2 + side], 0, size).tolist() for at in middle)
    mixed = one.clone()
    mixed[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / size**2
