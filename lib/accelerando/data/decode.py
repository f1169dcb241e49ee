"""Image files decoded at the scale that is needed."""

from __future__ import annotations

import errno
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy as np
    import torch


MARGIN = 8 / 7  # an evaluated picture is resized to 256 where 224 pixels are cut out, as torchvision's recipes do


def is_no_picture(error: ValueError | OSError) -> bool:
    """Whether an error of reading a picture is the file's, not the disk's own."""
    return getattr(error, "errno", None) in (None, errno.ENOENT)


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


@dataclass(frozen=True)
class Picture:
    """A decoded picture: ``pixels`` uint8 [h, w, 3], which may not be written to, and its ``size`` [H, W] in the file.

    ``pixels`` are those of the file, or fewer.
    """

    pixels: np.ndarray
    size: tuple[int, int]


Source = bytes | Picture  # an image file, or what a cache holds of it


def decode_image(file: bytes, least: int | None = None) -> torch.Tensor:
    """An image file as uint8 RGB [3, H, W]; with ``least`` a JPEG comes at 1/2, 1/4 or 1/8, no side below ``least``.

    Raises:
        ValueError, OSError: it is no image, cut off, or far too large.
    """
    import torch

    return torch.from_numpy(decode_pixels(file, least)).permute(2, 0, 1)


def decode_pixels(file: bytes, least: int | None = None) -> np.ndarray:
    """:func:`decode_image` as uint8 [H, W, 3], without torch.

    Raises:
        ValueError, OSError: it is no image, cut off, or far too large.
    """
    import numpy as np
    from PIL import Image, ImageFile, UnidentifiedImageError

    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(io.BytesIO(file)) as image:
            if least is not None:
                image.draft("RGB", (least, least))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                canvas = Image.new("RGBA", image.size, "white")  # what a transparent product photo stands on
                image = Image.alpha_composite(canvas, image)
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError:  # whose message names a buffer in memory
        raise ValueError("not a picture, or its header is damaged") from None
    except (SyntaxError, Image.DecompressionBombError) as error:  # Pillow's names for a broken PNG, a giant picture
        raise ValueError(str(error)) from None


def resize_and_crop(pixels: torch.Tensor, size: int, shorter: int | None = None, mode: str = "bicubic") -> torch.Tensor:
    """uint8 [3, H, W] -> [3, size, size]: the shorter side to ``shorter`` (by default ``size``), then the middle."""
    pixels = resize_shorter(pixels, shorter or size, mode)
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    return pixels[:, top : top + size, left : left + size]


def resize_shorter(pixels: torch.Tensor, shorter: int, mode: str = "bicubic") -> torch.Tensor:
    """uint8 [3, H, W] with its shorter side resized to ``shorter``, the other one in proportion."""
    height, width = pixels.shape[1:]
    long = max(shorter, int(shorter * max(height, width) / min(height, width)))
    return resize(pixels, (shorter, long) if height <= width else (long, shorter), mode)


def resize(pixels: torch.Tensor, size: tuple[int, int], mode: str = "bicubic") -> torch.Tensor:
    """uint8 [3, H, W] -> [3, *size], with antialiasing; the three colours of a pixel stay together where they are."""
    import torch

    if tuple(pixels.shape[1:]) == size:
        return pixels
    # torch resizes uint8 with vector instructions, and without a copy of all pixels where it knows them for a batch in
    # channels_last form: by the stride of the batch, though there is one picture. torchvision calls the same function.
    batch = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(batch, size, mode=mode, antialias=True)[0]


def thumbnail(file: bytes, side: int = 128) -> bytes:
    """A small JPEG of an image file, no side longer than ``side`` pixels, what is transparent on white."""

    return small_jpeg(decode_pixels(file, side), side)
