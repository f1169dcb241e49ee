"""Image files decoded at the scale needed."""

from __future__ import annotations

import errno
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


MARGIN = 8 / 7  # evaluation resizes to 256 for a center crop of 224 pixels, as torchvision's recipes do


def is_unreadable(error: ValueError | OSError) -> bool:
    """True if an error in reading an image is due to the file, not to the disk."""
    return getattr(error, "errno", None) in (None, errno.ENOENT)


def decode_crop(
    source: Source, size: int, box: Callable[[int, int], tuple[int, int, int, int]], sound: bool = False
) -> torch.Tensor:
    """uint8 [3, size, size]: the crop ``box(height, width)`` = (top, left, height, width) of an image, resized.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the crop is still at least as large as ``size``. ``sound``: the
    file is known to be intact, so the rows below the crop are not decoded; the result is the same, but damage there
    may go unnoticed.
    """
    height, width = source.size if isinstance(source, DecodedImage) else header_size(source)
    top, left, part_height, part_width = box(height, width)
    min_side = math.ceil(min(height, width) * min(1.0, size / min(part_height, part_width)))
    pixels = pixels_of(source, min_side, top + part_height if sound else None)
    scale = pixels.shape[0] / height, pixels.shape[1] / width
    top, part_height = round(top * scale[0]), max(1, round(part_height * scale[0]))
    left, part_width = round(left * scale[1]), max(1, round(part_width * scale[1]))
    return resize(to_tensor(pixels[top : top + part_height, left : left + part_width]), (size, size), "bilinear")


def decode_for_evaluation(source: Source, size: int) -> torch.Tensor:
    """uint8 [3, size, size]: the shorter side resized to 8/7 of ``size``, then a center crop."""
    shorter = evaluation_side(size)
    return to_channels_last(resize_and_crop(to_tensor(pixels_of(source, shorter)), size, shorter, "bilinear"))


def evaluation_side(size: int) -> int:
    """The shorter side, in pixels, to which evaluation resizes an image before a center crop of ``size`` pixels."""
    return round(size * MARGIN)


def pixels_of(source: Source, min_side: int, rows: int | None = None) -> np.ndarray:
    """An image as uint8 RGB [H, W, 3], a JPEG at 1/2, 1/4 or 1/8 of its size with no side below ``min_side``.

    An image from a cache is returned unchanged. With ``rows``, only the first ``rows`` rows of the image are defined.

    Raises:
        ValueError, OSError: it is not an image, truncated, or far too large.
    """
    import simplejpeg

    if isinstance(source, DecodedImage):
        return source.pixels
    if simplejpeg.is_jpeg(source):
        height, width, colours = jpeg_header(source)
        if colours in ("YCbCr", "Gray"):
            # libjpeg-turbo has no vector code for 5/8 to 7/8: these scales take longer than full size.
            eighths = next((n for n in (1, 2, 4) if min(height, width) * n > 8 * (min_side - 1)), 8)
            if eighths == 8 and rows is not None:
                upper = upper_part(source, height, width, rows)
                if upper is not None:
                    return upper
            sides = [math.ceil(side * eighths / 8) for side in (height, width)]
            return simplejpeg.decode_jpeg(source, "RGB", min_height=sides[0], min_width=sides[1], min_factor=1)
    return decode_pixels(source, min_side)


def upper_part(file: bytes, height: int, width: int, rows: int) -> np.ndarray | None:
    """The first ``rows`` of a JPEG in uint8 [height, width, 3], the rest undefined; None: it must be decoded in full.

    The height in the header is reduced, so that the decoder stops early. It then reports extraneous bytes; any other
    error means that the file must be decoded in full.
    """
    import simplejpeg

    rows = -(-(rows + 2) // 16) * 16  # whole blocks; subsampled chroma needs one more of its rows below
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
    """The offset of the height in a JPEG's header; None: a progressive JPEG, or one with restart markers."""
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
    """uint8 [H, W, 3] -> [3, H, W]; copies a crop or a read-only array."""
    import torch

    return torch.from_numpy(np.require(pixels, requirements="CW")).permute(2, 0, 1)


def to_channels_last(pixels: torch.Tensor) -> torch.Tensor:
    """The same [3, H, W] with the channels of a pixel adjacent in memory, as in a channels_last batch."""
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
    """Height and width of an image file. ValueError or OSError: it is not an image, or far too large."""
    import simplejpeg
    from PIL import Image

    if simplejpeg.is_jpeg(file):  # faster than Pillow, which parses all segments before the pixels
        return jpeg_header(file)[:2]
    try:
        with Image.open(io.BytesIO(file)) as image:
            return image.height, image.width
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from None


def jpeg_header(file: bytes) -> tuple[int, int, str]:
    """Height, width and colour space (YCbCr, Gray, CMYK, ...) of a JPEG. ValueError: corrupted, or far too large."""
    import simplejpeg
    from PIL import Image

    height, width, colours = simplejpeg.decode_jpeg_header(file)[:3]
    if height * width > 2 * Image.MAX_IMAGE_PIXELS:  # Pillow's own limit against decompression bombs
        raise ValueError(f"{width} x {height} pixels: far too large")
    return height, width, colours


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image: ``pixels`` uint8 [h, w, 3], read-only, perhaps reduced; ``size`` is (H, W) in the file."""

    pixels: np.ndarray
    size: tuple[int, int]


Source = bytes | DecodedImage  # an image file, or an image from a cache


def decode_image(file: bytes, min_side: int | None = None) -> torch.Tensor:
    """An image file as uint8 RGB [3, H, W]; with ``min_side``, a JPEG at 1/2, 1/4 or 1/8 with no side below that.

    Raises:
        ValueError, OSError: it is not an image, truncated, or far too large.
    """
    import torch

    return torch.from_numpy(decode_pixels(file, min_side)).permute(2, 0, 1)


def decode_pixels(file: bytes, min_side: int | None = None) -> np.ndarray:
    """:func:`decode_image` as uint8 [H, W, 3], without torch.

    Raises:
        ValueError, OSError: it is not an image, truncated, or far too large.
    """
    from PIL import Image, ImageFile, UnidentifiedImageError

    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(io.BytesIO(file)) as image:
            if min_side is not None:
                image.draft("RGB", (min_side, min_side))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                canvas = Image.new("RGBA", image.size, "white")  # the usual background of product photos
                image = Image.alpha_composite(canvas, image)
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError:  # its message names a buffer in memory
        raise ValueError("not an image, or its header is corrupted") from None
    except (SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises for a corrupted PNG, a huge image
        raise ValueError(str(error)) from None


def resize_and_crop(pixels: torch.Tensor, size: int, shorter: int | None = None, mode: str = "bicubic") -> torch.Tensor:
    """uint8 [3, H, W] -> [3, size, size]: the shorter side to ``shorter`` (default: ``size``), then a center crop."""
    pixels = resize_shorter(pixels, shorter or size, mode)
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    return pixels[:, top : top + size, left : left + size]


def resize_shorter(pixels: torch.Tensor, shorter: int, mode: str = "bicubic") -> torch.Tensor:
    """uint8 [3, H, W] with its shorter side resized to ``shorter`` pixels, the other one in proportion."""
    height, width = pixels.shape[1:]
    long = max(shorter, int(shorter * max(height, width) / min(height, width)))
    return resize(pixels, (shorter, long) if height <= width else (long, shorter), mode)


def resize(pixels: torch.Tensor, size: tuple[int, int], mode: str = "bicubic") -> torch.Tensor:
    """uint8 [3, H, W] -> [3, *size], with antialiasing; keeps the memory format."""
    import torch

    if tuple(pixels.shape[1:]) == size:
        return pixels
    # torch has vector code for uint8, and avoids a copy if it recognizes channels_last from the strides of a batch,
    # even a batch of one image. torchvision calls the same function.
    batch = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(batch, size, mode=mode, antialias=True)[0]


def thumbnail(file: bytes, side: int = 128) -> bytes:
    """A small JPEG of an image file, no side longer than ``side`` pixels, transparency on white."""
    return small_jpeg(decode_pixels(file, side), side)
