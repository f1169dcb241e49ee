"""Saved models that answer: a run's weights opened, pictures from files and URLs decoded ahead, logits for each."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from accelerando.base.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")


# ------------------------------------------------------------------------------------------------------------- model


def model_folder(path: Path) -> Path:
    """The folder with the weights: ``path`` itself, or ``best/`` or ``last/`` of the run ``path``.

    Raises:
        UserError: no such folder, or no model in it.
    """
    if not path.is_dir():
        reason = "is a file, not a folder" if path.exists() else "no such folder"
        raise UserError(f"{path}: {reason}; give a run or a model folder")
    for folder in (path, path / "best", path / "last"):
        if (folder / "config.json").is_file():
            return folder
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path}: holds a LoRA adapter alone; merge it into its model first")
    if path.parent.name == "checkpoints":
        raise UserError(f"{path}: is a checkpoint for resuming; give its run: {path.parent.parent}")
    raise UserError(f"{path}: no model here (no config.json, nor one in best/ or last/)")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder; UserError where it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: broken JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found a {type(content).__name__}")
    return content


def task_of(folder: Path, config: dict[str, Any]) -> str:
    """Which task the model in ``folder`` was trained for, from its ``config.json``: "text", "sign" or "image".

    Raises:
        UserError: a model that is no such classifier.
    """
    architectures = [str(name) for name in config.get("architectures") or []]
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return "text"
    if any(name.endswith("ForImageClassification") for name in architectures):
        return "image"
    kind = str(config.get("model_type", "of unknown kind"))
    if kind.startswith("sign_"):
        return "sign"
    if kind == "vision_net":
        return "image"
    raise UserError(f"{folder}: the model is {[*architectures, kind][0]}; needed is a classifier of texts, signs or "
                    "pictures")  # fmt: skip


def choose_device(name: str) -> torch.device:
    """The torch device of that name; "auto" is the first accelerator, else the CPU."""
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: no such device here; give auto or cpu") from None
    return device


def open_saved(auto_class: Any, folder: Path) -> Any:
    """The model in ``folder`` through one of transformers' auto classes, in float32, for evaluation.

    Raises:
        UserError: weights that are missing, damaged or another model's.
    """
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, report = auto_class.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # each format of weights has errors of its own
        raise UserError(f"{folder}: the model does not load ({first_line(error)[:200]})") from None
    unfit = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if unfit:
        raise UserError(f"{folder}: weights are missing ({', '.join(unfit[:3])}); is it a trained classifier?")
    return model.eval()


@dataclass
class ImageModel:
    """A classifier of pictures and what turns a file into its input.

    ``prepare`` gives uint8 [3, S, S], which is normalised with ``mean`` and ``std`` (of each colour, 0 to 1), or
    float32 [3, H, W] that is normalised already.
    """

    model: Any
    device: torch.device
    label_names: list[str]
    prepare: Callable[[bytes], torch.Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def open_image_model(folder: Path, device: torch.device) -> ImageModel:
    """The classifier in ``folder``, its pictures prepared as ``scripts/image_classify.py`` evaluates them, or, where
    ``preprocessor_config.json`` says otherwise, by transformers' own processor.

    Raises:
        UserError: no processor, or weights that are missing or damaged.
    """
    import torch
    from PIL import Image
    from transformers import AutoModelForImageClassification

    import accelerando.models.vision  # noqa: F401  (makes the auto classes know it)
    from accelerando.data.decode import decode_for_evaluation

    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no preprocessor_config.json beside the model; copy it from the base model")
    settings = read_json(path)
    # What Pillow thinks of a file is told once, as the reason why it cannot be read.
    warnings.filterwarnings("ignore", module=r"PIL\b")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    size = evaluation_size(settings)
    prepare = OwnProcessor(folder) if size is None else partial(decode_for_evaluation, size=size)
    model = open_saved(AutoModelForImageClassification, folder).to(device, memory_format=torch.channels_last)
    names = model.config.id2label
    return ImageModel(
        model, device, [str(names[number]) for number in range(model.config.num_labels)], prepare,
        tuple(settings.get("image_mean") or ()), tuple(settings.get("image_std") or ()),
    )  # fmt: skip


def evaluation_size(settings: dict[str, Any]) -> int | None:
    """The side of the pictures where a processor's ``settings`` are those of :func:`data.images.write_image_processor`,
    so that :func:`data.decode.decode_for_evaluation` does the same; else None."""
    from accelerando.data.decode import evaluation_side

    crop = settings.get("crop_size")
    side = crop.get("height") if isinstance(crop, dict) else None
    if not isinstance(side, int):
        return None
    ours = {
        "image_processor_type": "CLIPImageProcessor", "crop_size": {"height": side, "width": side}, "resample": 2,
        "size": {"shortest_edge": evaluation_side(side)}, "rescale_factor": 1 / 255, "do_resize": True,
        "do_center_crop": True, "do_rescale": True, "do_normalize": True,
    }  # fmt: skip
    coloured = all(len(settings.get(name) or ()) == 3 for name in ("image_mean", "image_std"))
    return side if coloured and all(settings.get(name) == value for name, value in ours.items()) else None


class OwnProcessor:
    """From a file to float32 [3, H, W], normalised, by the processor that is saved in ``folder``.

    Raises:
        UserError: it cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor

        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        except Exception as error:
            raise UserError(f"{folder}: the image processor does not load ({first_line(error)[:200]})") from None

    def __call__(self, file: bytes) -> torch.Tensor:
        from PIL import Image

        from accelerando.data.decode import decode_pixels

        picture = Image.fromarray(decode_pixels(file))
        return self.processor(images=[picture], return_tensors="pt")["pixel_values"][0]


def image_logits(opened: ImageModel, pixels: torch.Tensor, tta: bool = False, amp: str = "no") -> torch.Tensor:
    """Logits [B, C], float32 on the CPU, of prepared pictures [B, 3, H, W].

    ``tta``: the mean over each picture and its mirror image. ``amp``: no, bf16 or fp16.
    """
    import torch

    from accelerando.data.transforms import normalise

    pixels = pixels.contiguous(memory_format=torch.channels_last).to(opened.device, non_blocking=True)
    if pixels.dtype == torch.uint8:
        pixels = normalise(pixels, opened.mean, opened.std)
    kind = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    with torch.inference_mode(), torch.autocast(opened.device.type, kind, enabled=amp != "no"):
        logits = opened.model(pixel_values=pixels).logits.float()
        if tta:
            logits = (logits + opened.model(pixel_values=pixels.flip(-1)).logits.float()) / 2
    return logits.cpu()


def scores_of(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Probabilities [B, C] from logits, as ``config.problem_type`` wants them; of a regression its raw values."""
    if config.problem_type == "multi_label_classification":
        return logits.sigmoid()
    return logits.softmax(dim=-1) if logits.shape[-1] > 1 and config.problem_type != "regression" else logits


# ---------------------------------------------------------------------------------------------------------- pictures


# ------------------------------------------------------------------------------------------------------------ output
