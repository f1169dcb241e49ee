"""Image processors of transformers and timm: which numbers and sizes a model expects."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from accelerando.base.errors import UserError, first_line
from accelerando.base.model_folder import opening

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import BaseImageProcessor

FILES = ("preprocessor_config.json", "processor_config.json")  # either has the settings of an image processor
SIDE = 256  # pixels of the images with which a processor is tried


class Colours(NamedTuple):
    """Red, green and blue, 0 to 1, become (value - mean) / std; ``blue_first``: a model gets them in reverse order."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    blue_first: bool


def open_processor(name: str, trust_remote_code: bool = False, **options: str) -> BaseImageProcessor | None:
    """The image processor of a folder or a name on the Hub; None: it has none.

    Raises:
        UserError: the folder has one that cannot be opened.
    """
    from transformers import AutoImageProcessor

    try:
        with opening(name, "image processor"):
            processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except UserError:
        if any((Path(name) / file).is_file() for file in FILES):
            raise
        return None  # a folder with only a config
    check_statistics(processor, name)
    return processor


def check_statistics(processor: BaseImageProcessor, name: str) -> None:
    """UserError if mean or standard deviation of the processor of ``name`` are given, but not as three numbers."""
    for values in (getattr(processor, value, None) for value in ("image_mean", "image_std")):
        three = isinstance(values, list | tuple) and len(values) == 3
        if values is not None and not (three and all(isinstance(value, int | float) for value in values)):
            raise UserError(f"{name}: the image processor's image_mean and image_std are not three numbers each")


def input_colours(processor: BaseImageProcessor) -> Colours:
    """What ``processor`` makes of colours, measured with images of one colour: its settings have many names.

    Raises:
        UserError: it mixes colours, or its output is not an image of three colours.
    """
    import torch

    black = _output_for(processor, (0, 0, 0))
    single = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    slopes = torch.stack([_output_for(processor, colour) - black for colour in single])
    blue_first = bool(slopes.diagonal().abs().min() < slopes.flip(1).diagonal().abs().min())
    if blue_first:
        slopes, black = slopes.flip(1), black.flip(0)
    slope = slopes.diagonal()
    if not slopes.isfinite().all():
        raise UserError(f"{described(processor)} gives no finite numbers: correct its image_mean and image_std")
    if (slope <= 0).any() or (slopes - slope.diag()).abs().max() > 1e-3 * slope.max():
        raise UserError(f"{described(processor)} mixes colours, which is not supported")
    measured = torch.stack([-black / slope, 1 / slope])
    stated = [getattr(processor, value, None) for value in ("image_mean", "image_std")]
    if None not in stated and torch.allclose(torch.tensor(stated, dtype=torch.float64), measured, atol=1e-4):
        return Colours(tuple(stated[0]), tuple(stated[1]), blue_first)  # the same without rounding errors
    mean, std = measured.tolist()
    rounded = tuple(round(value, 6) + 0.0 for value in mean)  # + 0.0: no -0.0
    return Colours(rounded, tuple(float(f"{value:.6g}") for value in std), blue_first)


def _output_for(processor: BaseImageProcessor, colour: tuple[int, int, int]) -> torch.Tensor:
    """What a processor makes of a colour, float64 [3]."""
    from PIL import Image

    output = processed(processor, Image.new("RGB", (SIDE, SIDE), colour))
    return output[:, output.shape[1] // 2, output.shape[2] // 2].double()


def processed(processor: BaseImageProcessor, image: Image) -> torch.Tensor:
    """What a processor makes of an image, float32 [3, H, W].

    Raises:
        UserError: it fails, or its output has another form.
    """
    try:
        output = processor(images=[image], return_tensors="pt")["pixel_values"]
    except Exception as error:  # each of transformers' and timm's processors raises errors of its own
        raise UserError(f"{described(processor)} fails ({first_line(error)})") from None
    if output.ndim != 4 or output.shape[1] != 3:
        hint = ", as of models for any aspect ratio (NaFlex): choose one for a fixed size" if output.ndim == 3 else ""
        raise UserError(
            f"{described(processor)} has an output of shape {list(output.shape)} instead of [n, 3, height, width]{hint}"
        )
    return output[0]


def described(processor: BaseImageProcessor) -> str:
    """What messages call a processor."""
    return f"the model's image processor ({type(processor).__name__})"


class Resizing(NamedTuple):
    """How an image gets the side ``size``: to a square, or the shorter side to ``shorter`` and then a center crop."""

    size: int
    shorter: int
    square: bool
    mode: str  # bicubic or bilinear


def resizing_of(processor: BaseImageProcessor) -> Resizing:
    """How ``processor`` resizes images.

    Raises:
        UserError: its images would have different shapes, or it does what :class:`Resizing` cannot describe.
    """
    asked, crop = dict(getattr(processor, "size", None) or {}), dict(getattr(processor, "crop_size", None) or {})
    cropped = bool(crop) and getattr(processor, "do_center_crop", None)
    shorter, sides = asked.get("shortest_edge"), (asked.get("height"), asked.get("width"))
    if shorter and not cropped:
        raise UserError(
            f"{described(processor)} resizes the shorter side to {shorter} and crops nothing, so images would have "
            f'different shapes: set "do_center_crop": true and "crop_size": {shorter} in its preprocessor_config.json'
        )
    mode = {2: "bilinear", 3: "bicubic"}.get(int(getattr(processor, "resample", None) or 0))
    wanted = (crop.get("height"), crop.get("width")) if cropped else sides
    whole = shorter is not None or sides == wanted
    if not (getattr(processor, "do_resize", None) and mode and whole and wanted[0] and wanted[0] == wanted[1]):
        given = {name: getattr(processor, name, None) for name in ("do_resize", "size", "crop_size", "resample")}
        words = ", ".join(f"{name} {value}" for name, value in given.items())
        raise UserError(f"{described(processor)} is not supported: it makes no square images by resizing ({words})")
    return Resizing(wanted[0], shorter or wanted[0], not shorter, mode)


def image_side(settings: object) -> int | None:
    """The side of square images from a config's ``image_size`` or a processor's settings; None: they name none."""
    if isinstance(settings, int):
        return settings
    if isinstance(settings, list | tuple):
        return settings[-1] if settings and isinstance(settings[-1], int) else None
    data = getattr(settings, "data_config", None)  # of timm
    if data:
        return data["input_size"][-1]
    cropped = getattr(settings, "crop_size", None) if getattr(settings, "do_center_crop", False) else None
    size = cropped or getattr(settings, "size", None) or {}
    return next((size[key] for key in ("height", "shortest_edge") if size.get(key)), None)
