"""Pictures of classes: decoded at the scale that is needed, cropped, augmented and mixed, from (seed, epoch, row)."""

from __future__ import annotations

import errno
import io
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lib.augment import decode_pixels, random_state_of, resize, resize_and_crop
from lib.errors import first_line
from lib.image_cache import CachedImages, Picture

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lib.folders import ImageFiles

PolicyName = Literal["none", "randaugment", "trivialaugment"]
Source = bytes | Picture  # an image file, or what a cache holds of it
MARGIN = 8 / 7  # an evaluated picture is resized to 256 where 224 pixels are cut out, as torchvision's recipes do


@dataclass(frozen=True)
class ImageAugmentation:
    """Random changes of a training picture, drawn anew for each picture and epoch.

    ``crop_scale``: the smallest share of its area that is cut out, at 3:4 to 4:3 (Szegedy et al. 2014); 1: what
    evaluation sees. ``flip``: probability of a left-right mirror. ``policy``: RandAugment (Cubuk et al. 2019,
    arXiv:1909.13719) or TrivialAugmentWide (Müller and Hutter 2021, arXiv:2103.10158). ``erasing``: probability that a
    rectangle is filled with the mean (Zhong et al. 2017, arXiv:1708.04896).
    """

    crop_scale: float = 0.08
    flip: float = 0.5
    policy: PolicyName = "none"
    erasing: float = 0.0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)

    def __call__(self, source: Source, size: int, seed: tuple[int, ...], sound: bool = False) -> torch.Tensor:
        """uint8 [3, size, size] of a picture; ``seed`` is (seed, epoch, row). ValueError or OSError: it is none.

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
        return colours_together(pixels)

    @cached_property
    def _policy(self) -> Any:
        from torchvision.transforms import v2

        steps: list[Any] = []
        if self.policy != "none":
            steps.append(v2.RandAugment() if self.policy == "randaugment" else v2.TrivialAugmentWide())
        if self.erasing:
            steps.append(v2.RandomErasing(self.erasing, value=[round(255 * value) for value in self.mean]))
        return v2.Compose(steps)


@dataclass
class TrainingImages:
    """The pictures of ``files`` as each epoch changes them; a map-style data set that is told the epoch.

    A sample has ``pixel_values`` uint8 [3, S, S], ``label``, ``other_label`` and ``share``: the label counts by
    ``share``, the other one by the rest. They differ where two pictures are mixed: by MixUp (Zhang et al. 2017,
    arXiv:1710.09412) or CutMix (Yun et al. 2019, arXiv:1905.04899), with shares from Beta(alpha, alpha); where both are
    on, each takes half of the pictures. The other picture is drawn from all of them, so that neither batches nor
    processes matter. ``valid`` is 0 for a file that cannot be read. ``sizes``: the side S, or the sides that the epochs
    go through.
    """

    files: ImageFiles
    augmentation: ImageAugmentation
    sizes: tuple[int, ...]
    epochs: int = 1
    seed: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    balanced: bool = False
    # Of each row, whether its file was once decoded in full without complaint; the workers share what they found.
    _sound: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._sound = np.frombuffer(mmap.mmap(-1, max(1, len(self.files))), np.bool_)

    def __len__(self) -> int:
        return len(self.files)

    def size_in(self, epoch: int) -> int:
        """The side of the pictures of ``epoch``: each of ``sizes`` gets an equal share of the epochs."""
        return self.sizes[min(len(self.sizes) - 1, epoch * len(self.sizes) // max(1, self.epochs))]

    def at(self, row: int, epoch: int, draw: int = 0) -> dict[str, Any]:
        """The sample as ``epoch`` changes it, each ``draw`` of it in another way."""
        seed = (self.seed, epoch, row, *([3, draw] if draw else []))
        size, label = self.size_in(epoch), int(self.files.classes[row])
        pixels = self._pixels(row, size, seed)
        sample = {"label": label, "other_label": label, "share": 1.0, "valid": float(pixels is not None)}
        if pixels is None:
            return sample | {"pixel_values": nothing(size)}
        if self.mixup or self.cutmix:
            rng = np.random.default_rng([*seed, 1])
            other = int(rng.integers(len(self)))
            cut = self.cutmix > 0 and (not self.mixup or rng.random() < 0.5)
            second = self._pixels(other, size, (*seed, 2))
            if second is not None:
                alpha = self.cutmix if cut else self.mixup
                pixels, share = (cut_mix if cut else mix_up)(pixels, second, float(rng.beta(alpha, alpha)), rng)
                sample |= {"other_label": int(self.files.classes[other]), "share": share}
        return sample | {"pixel_values": pixels}

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """The rows of an epoch, int64 [n]; ``balanced``: every class equally often."""
        from lib.batches import balanced_rows, epoch_order

        rows = balanced_rows(self.files.classes, seed, epoch) if self.balanced else np.arange(len(self))
        return rows[epoch_order(len(rows), seed, epoch)]

    def problem(self, row: int) -> str:
        """Which file a row is and why it cannot be read."""
        return why_unreadable(self.files, row)

    def _pixels(self, row: int, size: int, seed: tuple[int, ...]) -> torch.Tensor | None:
        sound = bool(self._sound[row])
        pixels = read_or_none(self.files, row, lambda source: self.augmentation(source, size, seed, sound))
        self._sound[row] = pixels is not None
        return pixels


@dataclass
class EvaluationImages:
    """The pictures of ``files`` as they are evaluated: resized, and the middle cut out.

    A cache is read where it was made for this size, and the files otherwise: the pixels are the same.
    """

    files: ImageFiles
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> dict[str, Any]:
        label = int(self.files.classes[row])
        shorter = evaluation_side(self.size)
        pixels = read_or_none(self.files, row, lambda source: decode_for_evaluation(source, self.size), shorter)
        sample = {"label": label, "other_label": label, "share": 1.0, "valid": float(pixels is not None)}
        return sample | {"pixel_values": nothing(self.size) if pixels is None else pixels}

    def problem(self, row: int) -> str:
        """Which file a row is and why it cannot be read."""
        return why_unreadable(self.files, row)


def read_or_none(
    files: ImageFiles, row: int, decoded: Callable[[Source], torch.Tensor], side: int | None = None
) -> torch.Tensor | None:
    """What ``decoded`` makes of the picture of a row; None where it is no picture. OSError: the disk's own.

    Of a cache, what it holds is read, and with ``side`` only if it was made for just that side.
    """
    try:
        if isinstance(files, CachedImages) and side in (None, files.side):
            picture = files.picture(row)
            return None if picture is None else decoded(picture)
        return decoded(files.path(row).read_bytes())
    except (ValueError, OSError) as error:
        if not is_no_picture(error):
            raise
        return None


def is_no_picture(error: ValueError | OSError) -> bool:
    """Whether an error of reading a picture is the file's, not the disk's own."""
    return getattr(error, "errno", None) in (None, errno.ENOENT)


def nothing(size: int) -> torch.Tensor:
    """What stands in a batch for a picture that cannot be read, uint8 [3, size, size]; it does not count."""
    import torch

    return torch.zeros(3, size, size, dtype=torch.uint8)


def why_unreadable(files: ImageFiles, row: int) -> str:
    """Which file a row is and why it cannot be read."""
    path = files.path(row)
    try:
        decode_pixels(path.read_bytes())
    except (ValueError, OSError) as error:
        return f"{path}: {' '.join(first_line(error).split())}"
    return f"{path}: now it can be read"


def write_image_processor(folder: Path, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Writes what makes ``AutoImageProcessor`` do with a picture what evaluation does here."""
    from transformers import CLIPImageProcessor

    CLIPImageProcessor(
        size={"shortest_edge": evaluation_side(size)}, crop_size=size, resample=2, image_mean=list(mean),
        image_std=list(std),
    ).save_pretrained(folder)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- decoding


def decode_crop(
    source: Source, size: int, box: Callable[[int, int], tuple[int, int, int, int]], sound: bool = False
) -> torch.Tensor:
    """uint8 [3, size, size]: the part ``box(height, width)`` = (top, left, height, width) of a picture, resized.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the part stays as large as ``size``. Of one that is known to
    be ``sound``, what is below the part is not decoded; the result is the same, but damage is not always noticed.
    """
    height, width = source.size if isinstance(source, Picture) else header_size(source)
    top, left, part_height, part_width = box(height, width)
    least = math.ceil(min(height, width) * min(1.0, size / min(part_height, part_width)))
    pixels = pixels_of(source, least, top + part_height if sound else None)
    scale = pixels.shape[0] / height, pixels.shape[1] / width
    top, part_height = round(top * scale[0]), max(1, round(part_height * scale[0]))
    left, part_width = round(left * scale[1]), max(1, round(part_width * scale[1]))
    return resize(to_tensor(pixels[top : top + part_height, left : left + part_width]), (size, size), "bilinear")


def decode_for_evaluation(source: Source, size: int) -> torch.Tensor:
    """uint8 [3, size, size]: the shorter side at 8/7 of ``size``, then the middle."""
    shorter = evaluation_side(size)
    return colours_together(resize_and_crop(to_tensor(pixels_of(source, shorter)), size, shorter, "bilinear"))


def evaluation_side(size: int) -> int:
    """The shorter side, in pixels, of the picture whose middle of ``size`` pixels is evaluated."""
    return round(size * MARGIN)


def decode(file: bytes, least: int) -> torch.Tensor:
    """An image file as uint8 RGB [3, H, W], a JPEG at 1/2, 1/4 or 1/8 of its size with no side below ``least``.

    Raises:
        ValueError, OSError: it is no image, cut off, or far too large.
    """
    return to_tensor(pixels_of(file, least))


def pixels_of(source: Source, least: int, rows: int | None = None) -> np.ndarray:
    """:func:`decode` as uint8 [H, W, 3]; what a cache holds, as it is.

    With ``rows``, what stands below as many rows of the file may be anything.
    """
    import simplejpeg

    if isinstance(source, Picture):
        return source.pixels
    if simplejpeg.is_jpeg(source):
        height, width, colours = jpeg_header(source)
        if colours in ("YCbCr", "Gray"):
            # At 5/8 to 7/8 libjpeg-turbo has no vector instructions: it takes longer than all of the picture does.
            eighths = next((n for n in (1, 2, 4) if min(height, width) * n > 8 * (least - 1)), 8)
            if eighths == 8 and rows is not None:
                upper = upper_part(source, height, width, rows)
                if upper is not None:
                    return upper
            sides = [math.ceil(side * eighths / 8) for side in (height, width)]
            return simplejpeg.decode_jpeg(source, "RGB", min_height=sides[0], min_width=sides[1], min_factor=1)
    return decode_pixels(source, least)


def upper_part(file: bytes, height: int, width: int, rows: int) -> np.ndarray | None:
    """The first ``rows`` of a JPEG in uint8 [height, width, 3], the rest undefined; None: it has to be decoded in full.

    The decoder is told of a picture that ends there, and saves the time for what is below. Then it complains of the
    bytes that are left over; where it complains of anything else, that is not a file for this.
    """
    import simplejpeg

    rows = -(-(rows + 2) // 16) * 16  # whole blocks; colours at half the height need a row of theirs below
    at = height_offset(file)
    if rows >= height or at is None:
        return None
    pixels = np.empty((height, width, 3), np.uint8)
    shorter = file[:at] + rows.to_bytes(2, "big") + file[at + 2 :]
    try:
        simplejpeg.decode_jpeg(shorter, "RGB", buffer=pixels[:rows])
    except ValueError as error:
        if not str(error).endswith("extraneous bytes before marker 0xd9"):
            return None
    return pixels


def height_offset(file: bytes) -> int | None:
    """Where a JPEG's height stands; None: its rows do not simply follow each other (progressive, restart markers)."""
    at, found = 2, None
    while at + 4 <= len(file) and file[at] == 0xFF:
        marker = file[at + 1]
        if marker in (0xC0, 0xC1):
            found = at + 5
        elif marker == 0xDA:
            return found
        elif marker == 0xDD or (0xC2 <= marker <= 0xCF and marker != 0xC4):
            return None
        at += 2 + int.from_bytes(file[at + 2 : at + 4], "big")
    return None


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] -> [3, H, W]; a part of a picture is copied, as is what may not be written to."""
    import torch

    return torch.from_numpy(np.require(pixels, requirements="CW")).permute(2, 0, 1)


def colours_together(pixels: torch.Tensor) -> torch.Tensor:
    """The same [3, H, W] with the three colours of a pixel beside each other, as a channels_last batch wants them."""
    return pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def small_jpeg(pixels: np.ndarray, side: int) -> bytes:
    """uint8 [H, W, 3] as a JPEG with no side longer than ``side`` pixels, for reports."""
    from PIL import Image

    small = Image.fromarray(pixels)
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def header_size(file: bytes) -> tuple[int, int]:
    """Height and width of an image file. ValueError or OSError: it is no image, or far too large."""
    import simplejpeg
    from PIL import Image

    if simplejpeg.is_jpeg(file):  # faster than Pillow, which reads all of what stands before the pixels
        return jpeg_header(file)[:2]
    try:
        with Image.open(io.BytesIO(file)) as image:
            return image.height, image.width
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from None


def jpeg_header(file: bytes) -> tuple[int, int, str]:
    """Height, width and colours (YCbCr, Gray, CMYK, ...) of a JPEG. ValueError: it is broken, or far too large."""
    import simplejpeg
    from PIL import Image

    height, width, colours = simplejpeg.decode_jpeg_header(file)[:3]
    if height * width > 2 * Image.MAX_IMAGE_PIXELS:  # Pillow's own limit against decompression bombs
        raise ValueError(f"{width} x {height} pixels: far too large")
    return height, width, colours


# ------------------------------------------------------------------------------------------------- random decisions


def crop_box(height: int, width: int, least: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a part with ``least`` to 1 of the area and a shape between 3:4 and 4:3.

    After ten misses the largest part of such a shape, from the middle, as torchvision does.
    """
    for _ in range(10):
        area = height * width * rng.uniform(least, 1)
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
    """``share`` of ``one`` and the rest of ``other``, uint8 [3, S, S], and the share."""
    import torch

    return torch.lerp(other.float(), one.float(), share).round_().to(torch.uint8), share


def cut_mix(
    one: torch.Tensor, other: torch.Tensor, share: float, rng: np.random.Generator
) -> tuple[torch.Tensor, float]:
    """``one`` with a rectangle of ``other``, uint8 [3, S, S], and the share of its area that is left of ``one``."""
    size = one.shape[-1]
    side = round(size * math.sqrt(1 - share))
    middle = rng.integers(0, size, 2)
    (top, bottom), (left, right) = (np.clip([at - side // 2, at - side // 2 + side], 0, size).tolist() for at in middle)
    mixed = one.clone()
    mixed[:, top:bottom, left:right] = other[:, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / size**2
