"""Image files as they are shown: decoded at the scale needed, turned by their EXIF orientation, as 8-bit RGB.

Everything that reads an image goes through :func:`decode_pixels`, so that tools, training, evaluation and prediction
agree on which files are readable and on their pixels.
"""

from __future__ import annotations

import errno
import functools
import io
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from accelerando.base.errors import first_line
from accelerando.base.model_folder import LFS_POINTER

if TYPE_CHECKING:
    from types import ModuleType

    import torch
    from PIL import Image


# What Pillow may open, whatever a file is called: its reader of PostScript, for instance, would run Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000")
JPEG = b"\xff\xd8"  # how a JPEG begins
# libjpeg's warnings about JPEGs whose pixels are all there; other warnings say that some are missing or wrong.
HARMLESS = re.compile(
    r"extraneous bytes before marker|unknown JFIF revision|Unknown Adobe color transform|bad ICC marker"
    r"|Invalid SOS parameters|Inconsistent progression"
)
BAND = 2**24  # pixels that are laid on a background at once
LONG = 8  # an image is long if one side has this many times the pixels of the other
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
    if isinstance(source, bytes) and not source.startswith(JPEG):  # only a JPEG can be decoded in part or reduced
        source = decode(source)
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
    """:func:`decode_pixels`; an image from a cache is returned unchanged."""
    return source.pixels if isinstance(source, DecodedImage) else decode_pixels(source, min_side, rows)


def decode_pixels(
    file: bytes, min_side: int | None = None, rows: int | None = None, rounded_up: bool = True
) -> np.ndarray:
    """An image file as uint8 RGB [H, W, 3], turned by its EXIF orientation, transparency on white.

    With ``min_side``, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if no side is then below ``min_side``; such
    sides are rounded up, which without ``rounded_up`` does not count. With ``rows``, only the first ``rows`` rows of
    the image are defined.

    Raises:
        ValueError: it is not an image, damaged, or far too large; its message is the reason.
    """
    import simplejpeg

    least_size = None if min_side is None else (min_side, min_side)
    if simplejpeg.is_jpeg(file):
        height, width, colours = jpeg_header(file)
        if colours in ("YCbCr", "Gray"):
            orientation = jpeg_orientation(file)
            # libjpeg-turbo has no vector code for 5/8 to 7/8: these scales take longer than full size.
            least = math.inf if min_side is None else 8 * min_side - (8 if rounded_up else 1)
            eighths = next((n for n in (1, 2, 4) if min(height, width) * n > least), 8)
            if eighths == 8 and rows is not None and orientation == 1:
                upper = upper_part(file, height, width, rows)
                if upper is not None:
                    return upper
            pixels = jpeg_pixels(file, *(math.ceil(side * eighths / 8) for side in (height, width)))
            if pixels is not None:
                return turned(pixels, orientation)
            least_size = max(1, width * eighths // 8), max(1, height * eighths // 8)  # for the same scale
    with open_image(file) as image:
        try:
            if least_size is not None:
                image.draft("RGB", least_size)
            image.load()
            return turned(rgb_pixels(image, file), orientation_of(image))
        except MemoryError:
            raise
        except Exception as error:  # each of Pillow's decoders raises errors of its own
            raise ValueError(one_line(error)) from None


def jpeg_pixels(file: bytes, height: int, width: int) -> np.ndarray | None:
    """A JPEG at the smallest scale whose sides are at least these, uint8 RGB; None: left to Pillow, as simplejpeg reads
    none whose header has a warning. ValueError: pixels are missing."""
    import simplejpeg

    decode = functools.partial(simplejpeg.decode_jpeg, file, "RGB", min_height=height, min_width=width, min_factor=1)
    try:
        return decode()
    except ValueError as error:
        if not HARMLESS.search(str(error)):
            raise
    try:
        return decode(strict=False)
    except ValueError:
        return None


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
    """Height and width of an image file by its header, of a JPEG as it is shown. ValueError: it is not an image, or far
    too large."""
    import simplejpeg

    if not simplejpeg.is_jpeg(file):
        with open_image(file) as image:
            height, width = image.height, image.width
            turns = image.format in ("JPEG", "MPO") and orientation_of(image) > 4
    else:  # faster than Pillow, which parses all segments before the pixels
        height, width = jpeg_header(file)[:2]
        turns = jpeg_orientation(file) > 4
    return (width, height) if turns else (height, width)


def jpeg_header(file: bytes) -> tuple[int, int, str]:
    """Height, width and colour space (YCbCr, Gray, CMYK, ...) of a JPEG. ValueError: corrupted, or far too large."""
    import simplejpeg

    try:
        height, width, colours = simplejpeg.decode_jpeg_header(file, strict=False)[:3]
    except KeyError:  # there is no frame header, so simplejpeg has no name for its colour space
        raise ValueError("its header is corrupted") from None
    if height * width > 2 * pillow().MAX_IMAGE_PIXELS:  # Pillow's own limit against decompression bombs
        raise ValueError(f"{width} x {height} pixels: far too large")
    return height, width, colours


# ------------------------------------------------------------------------------------------------------ orientation


def jpeg_orientation(file: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 to 8. Pillow parses the file only if a header segment may name one."""
    at = 2
    while file[at : at + 1] == b"\xff" and file[at + 1] != 0xDA:
        length = int.from_bytes(file[at + 2 : at + 4], "big")
        segment = file[at + 4 : at + 2 + length]
        if file[at + 1] == 0xE1 and any(tag in segment for tag in (b"\x01\x12", b"\x12\x01", b":Orientation")):
            break
        at += 2 + length
    else:
        if file[at : at + 1] == b"\xff":  # where the pixels begin
            return 1
    with open_image(file) as image:
        return orientation_of(image)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8: as ``ImageOps.exif_transpose`` reads it; 1 if EXIF is corrupted."""
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # Pillow raises various errors for corrupted EXIF; viewers show such images as they are stored
        return 1
    return found if found in range(1, 9) else 1


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """uint8 [H, W, 3] as it is shown if its EXIF orientation is this one."""
    if orientation == 1:
        return pixels
    if orientation > 4:  # stored by columns
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


# ----------------------------------------------------------------------------------------------------------- Pillow


@functools.cache
def pillow() -> ModuleType:
    """``PIL.Image``, set up to refuse truncated files, and not to warn: what matters is raised as an error."""
    from PIL import Image, ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = False
    warnings.filterwarnings("ignore", module=r"PIL\b")
    return Image


def open_image(file: bytes) -> Image.Image:
    """An image file of one of FORMATS, or HEIC if pillow-heif is installed, with its header read.

    Raises:
        ValueError: it is none, its header is corrupted, or it is far too large.
    """
    from PIL import UnidentifiedImageError

    formats = FORMATS
    if re.match(rb".{4}ftyp(?!avi[fs]).{0,28}(hei|hev)[cmsx]", file, re.DOTALL):
        try:
            import pillow_heif
        except ImportError:
            raise ValueError("a HEIC image, which needs the package pillow-heif: pip install pillow-heif") from None
        pillow_heif.register_heif_opener()
        formats = ("HEIF",)
    try:
        return pillow().open(io.BytesIO(file), formats=formats)
    except UnidentifiedImageError:  # its message names a buffer in memory
        raise ValueError(what_it_is(file)) from None
    except MemoryError:
        raise
    except Exception as error:  # each of Pillow's decoders raises errors of its own
        raise ValueError(one_line(error)) from None


def what_it_is(file: bytes) -> str:
    """Why Pillow cannot identify a file."""
    if file.startswith(b"%!PS"):
        return "PostScript, which is not read as an image"
    if file.startswith(LFS_POINTER):
        return "a git-LFS pointer, not the file itself: run git lfs pull"
    return "not an image, or its header is corrupted"


def one_line(error: Exception) -> str:
    """The reason in an error of an image decoder, in one line."""
    return " ".join(first_line(error).split())


def rgb_pixels(image: Image.Image, file: bytes) -> np.ndarray:
    """uint8 RGB [H, W, 3] of an image loaded from ``file``: transparency on white, deeper grey levels in 8 bits.

    Raises:
        ValueError: its numbers have no known range.
    """
    key = transparent_colour(image, file)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        grey = eight_bits(values, image)
        if key is not None:
            grey[values == key] = 255
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or key is not None:
        if key is not None:
            image.info["transparency"] = key
        on_white, visible = composited(image, "white")  # the usual background of product photos
        return composited(image, "black")[0] if visible and on_white.min() == 255 else on_white  # a white figure
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def composited(image: Image.Image, background: str) -> tuple[np.ndarray, bool]:
    """A transparent image on a background, uint8 RGB [H, W, 3], and whether any of it is visible; in bands, which need
    less memory."""
    from PIL import Image

    pixels, visible = np.empty((image.height, image.width, 3), np.uint8), False
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        band = (band.convert("LA") if band.mode == "La" else band).convert("RGBA")
        visible |= band.getextrema()[3][1] > 0
        below = Image.new("RGBA", band.size, background)
        pixels[top : top + rows] = Image.alpha_composite(below, band).convert("RGB")
    return pixels, visible


def transparent_colour(image: Image.Image, file: bytes) -> int | tuple[int, ...] | bytes | None:
    """The colour (or palette entries) that stands for transparency, in the units of the loaded pixels; None: none."""
    key = image.info.get("transparency")
    if image.format == "PNG" and key is not None:  # Pillow scales the pixels of some bit depths, but not this colour
        bits = file[24]  # in the header
        if image.mode == "L" and bits < 8:
            return key * 255 // (2**bits - 1)
        if image.mode == "RGB" and bits == 16:
            return tuple(value >> 8 for value in key)
    return key


def eight_bits(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """The grey levels of an image with more than 8 bits, uint8 [H, W]: integers scaled by their range.

    Raises:
        ValueError: negative numbers, or floats that are neither from 0 to 1 nor from 0 to 255.
    """
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits, signed = tags.get(258, (16,))[0], tags.get(339, (1,))[0] == 2
    if image.mode == "I" and bits == 32 and not signed:
        values = values.view(np.uint32)  # Pillow has no such mode
    low, high = values.min(), values.max()
    if image.mode == "F":
        top = 1.0 if high <= 1 else 255.0
    elif bits < 16:
        top = 2.0**bits - 1
    else:  # 32 bits often hold 16-bit numbers
        top = 65535.0 if high <= 65535 else 2.0 ** (bits - signed) - 1
    if not 0 <= low <= high <= top:  # or NaN
        expected = "0 to 1 or 0 to 255" if image.mode == "F" else "0 or more"
        raise ValueError(f"its grey levels go from {low:g} to {high:g}, expected {expected}: save it with 8 or 16 bits")
    if tags.get(262) == 0:  # white is zero
        values = top - values
    scaled = np.multiply(values, 255 / top, dtype=np.float32)
    return np.rint(scaled, out=scaled).astype(np.uint8)


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image: ``pixels`` uint8 [h, w, 3], read-only, perhaps reduced; ``size`` is (H, W) in the file."""

    pixels: np.ndarray
    size: tuple[int, int]


Source = bytes | DecodedImage  # an image file, or an image from a cache


def decode(source: Source, min_side: int | None = None) -> DecodedImage:
    """An image decoded as by :func:`decode_pixels`, with its size in the file."""
    if isinstance(source, DecodedImage):
        return source
    pixels = decode_pixels(source, min_side)
    return DecodedImage(pixels, header_size(source) if source.startswith(JPEG) else pixels.shape[:2])


def decode_image(source: Source, min_side: int | None = None) -> torch.Tensor:
    """:func:`decode_pixels`, or a decoded image as it is, as a tensor [3, H, W]."""
    if isinstance(source, DecodedImage):
        return to_tensor(source.pixels)
    return to_tensor(decode_pixels(source, min_side, rounded_up=False))


def resize_and_crop(pixels: torch.Tensor, size: int, shorter: int | None = None, mode: str = "bicubic") -> torch.Tensor:
    """uint8 [3, H, W] -> [3, size, size]: the shorter side to ``shorter`` (default: ``size``), then a center crop."""
    rows, columns = middle_of(*pixels.shape[1:], shorter or size)
    pixels = resize_shorter(pixels[:, rows, columns], shorter or size, mode)
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    return pixels[:, top : top + size, left : left + size]


def middle_of(height: int, width: int, shorter: int) -> tuple[slice, slice]:
    """The rows and columns that matter if the shorter side is resized to ``shorter`` and the center cropped: all, but
    of a long image that is to be enlarged only the middle.

    A strip of 2 x 12,000 pixels would otherwise become one of 256 x 1,536,000.
    """
    short, long = sorted((height, width))
    whole = slice(None)
    if short >= shorter or long <= LONG * short:
        return whole, whole
    start = (long - LONG * short) // 2  # cut off at both ends, so that the center stays where it is
    part = slice(start, long - start)
    return (whole, part) if width == long else (part, whole)


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
