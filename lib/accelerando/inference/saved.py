"""Loads saved models for prediction: of transformers, of this library, or of a user's own module."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError, first_line
from accelerando.base.model_folder import in_one_line, opening, read_json
from accelerando.inference.runs import task_of_model
from accelerando.models.pretrained import open_config, open_model
from accelerando.train.evaluation import mirrored_mean
from accelerando.train.weights import TORCH_MODULE

LARGEST_SIDE = 8192  # of an image for a model, in pixels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    import numpy as np
    import torch
    from PIL import Image
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    from accelerando.data.decode import Source
    from accelerando.data.transforms import ImageTransform


# ------------------------------------------------------------------------------------------------------------- model


def import_user_module(name: str) -> ModuleType:
    """The user's module ``name``, which defines a model or registers it with transformers' auto classes.

    The current folder is searched first. Without this, no module that a model folder names is imported.

    Raises:
        UserError: there is no such module, or it cannot be imported.
    """
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name.removesuffix(".py"))
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise UserError(f"--import {name}: {first_line(error)}") from None
        raise UserError(f"--import {name}: no such module in {here} or among the installed ones") from None
    except (Exception, SystemExit) as error:  # the module may raise anything
        raise UserError(f"--import {name}: {type(error).__name__}: {first_line(error)}") from None
    finally:
        # Last in the path: the module may still import others beside it, but cannot shadow the tools' imports.
        sys.path.remove(here)
        sys.path.append(here)


def import_hint(config: Mapping[str, Any]) -> str:
    """A hint for errors about a model type that transformers does not know; otherwise empty."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind in CONFIG_MAPPING:
        return ""
    return f"; transformers does not know the model type {kind!r}: if a module of yours does, use --import my_module"


def task_of_saved(folder: Path, config: Mapping[str, Any], module: ModuleType | None = None) -> str:
    """Like :func:`runs.task_of_model`, also for a model that the user's ``module`` registered with an auto class.

    Raises:
        UserError: it is not a classifier of texts, signs or images.
    """
    try:
        return task_of_model(folder, config)
    except UserError as error:
        import transformers

        kind = config.get("model_type")
        if module is not None and isinstance(kind, str) and kind in transformers.CONFIG_MAPPING:
            registered = transformers.CONFIG_MAPPING[kind]
            if registered in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
                return "image"
            if registered in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
                return "text"
        raise UserError(f"{error}{import_hint(config)}") from None


def choose_device(name: str) -> torch.device:
    """The torch device called ``name``; "auto" is the first accelerator, else the CPU."""
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: no such device here; use auto or cpu") from None
    return device


def open_saved(
    auto_class: type[_BaseAutoModelClass],
    folder: Path,
    module: ModuleType | None = None,
    trust_remote_code: bool = False,
    onnx_file: str | None = None,
) -> PreTrainedModel | TorchModel | ExportedModel:
    """The model in ``folder``, in float32, in evaluation mode: through one of transformers' auto classes, or with
    :func:`open_torch_module` if it was saved as a plain torch module, or with ONNX Runtime if ``tools/export.py`` wrote
    the folder. ``module``: the user's, from ``--import``. ``onnx_file``: which of an export's files.

    Raises:
        UserError: the weights are missing, corrupted or another model's, or the class is unknown.
    """
    quiet_loading()
    content = read_json(folder / "config.json")
    if is_export(folder):
        return ExportedModel(folder, onnx_file, read_config(content))
    if content.get("model_type") == TORCH_MODULE:
        return TorchModel(open_torch_module(folder, module), read_config(content))
    try:
        config = open_config(str(folder), trust_remote_code, local_files_only=True)
        model = open_model(
            auto_class, str(folder), config, new_head=False, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except UserError as error:
        raise UserError(f"{error}{import_hint(content)}") from None
    return model.eval()


def quiet_loading() -> None:
    """Turns off transformers' own messages and progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def open_torch_module(folder: Path, module: ModuleType | None) -> torch.nn.Module:
    """The plain torch module saved in ``folder``, in float32, in evaluation mode.

    ``config.json`` names its class as ``"class": "my_module:MyNet"``; ``module``, from ``--import``, has that class. It
    is built with ``MyNet.from_config(config)``, where config is the content of ``config.json``, or with ``MyNet()`` if
    it has no ``from_config``, and then loads the weights of ``model.safetensors``.

    Raises:
        UserError: no module was imported, it lacks the class, or the weights are missing, corrupted or another class's.
    """
    from safetensors.torch import load_file

    config = read_json(folder / "config.json")
    home, _, name = str(config.get("class", "")).partition(":")
    if not home or not name:
        raise UserError(f'{folder / "config.json"}: names no class, such as "class": "my_module:MyNet"')
    if module is None:
        raise UserError(f"{folder}: the model's class is {name} of your module {home}: use --import {home}")
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not inspect.isclass(found):
        raise UserError(f"{folder}: the model's class is {name}, which {module.__name__} (--import) does not have")
    try:
        model = found.from_config(config) if hasattr(found, "from_config") else found()
    except Exception as error:  # the class may raise anything
        raise UserError(f"{folder}: {name} cannot be built: {type(error).__name__}: {first_line(error)}") from None
    try:
        missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    except Exception as error:  # safetensors raises errors of its own; torch lists shapes on separate lines
        raise UserError(f"{folder}: the weights cannot be loaded into {name} ({in_one_line(error)})") from None
    if missing or unexpected:
        words = f"lack {missing[0]}" if missing else f"also contain {unexpected[0]}"
        raise UserError(f"{folder}: the weights are not those of {name}: they {words}")
    return model.float().eval()


def read_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """The content of a ``config.json`` with transformers' defaults (such as ``id2label``), for any class."""
    from transformers import PretrainedConfig

    return PretrainedConfig.from_dict(dict(config))


@dataclass
class ModelOutput:
    """The output of a plain torch module."""

    logits: torch.Tensor


class TorchModel:
    """A plain torch module with the parts of the interface of a transformers model that prediction needs.

    Inputs that are parameters of the module's ``forward`` are passed by name; if none is, ``forward`` gets the first
    one (the images or the tokens). Its output is the logits [B, C], as a tensor, an attribute or a key.
    """

    def __init__(self, module: torch.nn.Module, config: PretrainedConfig) -> None:
        self.module, self.config = module, config

    def to(self, *args: Any, **options: Any) -> TorchModel:
        """Like ``torch.nn.Module.to``."""
        self.module.to(*args, **options)
        return self

    def eval(self) -> TorchModel:
        """Like ``torch.nn.Module.eval``."""
        self.module.eval()
        return self

    def get_input_embeddings(self) -> None:
        """None: unknown for a plain torch module."""

    def __call__(self, **inputs: torch.Tensor) -> ModelOutput:
        import torch

        parameters = inspect.signature(self.module.forward).parameters
        if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
            output = self.module(**inputs)
        elif named := {name: value for name, value in inputs.items() if name in parameters}:
            output = self.module(**named)
        else:
            output = self.module(next(iter(inputs.values())))
        if isinstance(output, Mapping):
            output = output.get("logits")
        logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
        if logits is None or logits.ndim != 2 or logits.shape[1] != self.config.num_labels:
            shape = "no logits" if logits is None else f"logits of shape {list(logits.shape)}"
            raise UserError(
                f"the model returns {shape}, but one logit for each of {self.config.num_labels} classes is needed"
            )
        return ModelOutput(logits)


def is_export(folder: Path) -> bool:
    """True for a folder that ``tools/export.py`` wrote."""
    return (folder / "export.json").is_file()


class ExportedModel:
    """An ONNX file of an export with the parts of the interface of a transformers model that prediction needs; its
    inputs are not normalised, as the graph does that. It computes on the CPU.

    Raises:
        UserError: there is no such file, or it cannot be run.
    """

    def __init__(self, folder: Path, file: str | None, config: PretrainedConfig) -> None:
        from accelerando.inference.exported import onnx_runner

        self.facts = read_json(folder / "export.json")
        files = [name for name, about in self.facts["files"].items() if about["format"] == "onnx"]
        self.file = folder / (file or "model.onnx")
        if self.file.name not in files or not self.file.is_file():
            named = ", ".join(files) or "none, for it has no format onnx"
            raise UserError(f"{self.file}: no such file of the export; name one of it: {named}")
        self.config, self.run = config, onnx_runner(self.file)
        if hasattr(config, "normalisation"):
            config.normalisation = "none"
        self.names = self.facts["files"][self.file.name]["inputs"]

    def to(self, *args: Any, **options: Any) -> ExportedModel:
        """Like ``torch.nn.Module.to``, without effect."""
        return self

    def eval(self) -> ExportedModel:
        """Like ``torch.nn.Module.eval``, without effect."""
        return self

    def get_input_embeddings(self) -> None:
        """None: unknown."""

    def __call__(self, frames: torch.Tensor | None = None, **inputs: torch.Tensor) -> ModelOutput | SignScores:
        import torch

        if "pixel_values" in inputs:
            return ModelOutput(torch.from_numpy(self._of_pixels(inputs["pixel_values"], frames)))
        if frames is not None:
            if "mask" not in inputs and "mask" in self.names:
                inputs["mask"] = (frames.unflatten(2, (-1, 2)) != 0).any(3)
            inputs["frames"] = frames
        if "token_type_ids" in self.names and "token_type_ids" not in inputs:  # texts whose types are all 0
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        found = self.run({name: inputs[name].cpu().numpy() for name in self.names})
        logits = [torch.from_numpy(each) for each in found]
        return SignScores(*logits) if len(logits) == 2 else ModelOutput(logits[0])

    def _of_pixels(self, pixels: torch.Tensor, frames: torch.Tensor | None) -> np.ndarray:
        """Logits of uint8 [N, 3, S, S]; where videos are taken, each of ``frames`` [V] is the length of one."""
        import numpy as np

        pixels = pixels.cpu().contiguous()
        if self.facts["task"] == "image":
            return self.run({"pixels": pixels.numpy()})[0]
        if frames is None or int(frames.max()) == 1:
            return self.run({"pixels": pixels[:, None].numpy()})[0]
        return np.concatenate([self.run({"pixels": part[None].numpy()})[0] for part in pixels.split(frames.tolist())])


@dataclass
class SignScores:
    """The output of an exported sign model."""

    gloss_logits: torch.Tensor
    cat_logits: torch.Tensor
    log_variances: None = None  # of learned loss weights, which an export does not have


class ExportedClip:
    """The two graphs of an exported CLIP, called like the model of ``scripts/clip_finetune.py``; on the CPU.

    ``file`` names one of the graphs (``image_int8.onnx``), with which the other one of the same precision goes.
    ``colours``: mean and standard deviation with which pixels come normalised; the graph does that itself, so it is
    undone.

    Raises:
        UserError: there are no such files, or they cannot be run.
    """

    def __init__(self, folder: Path, file: str | None, colours: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
        from accelerando.inference.exported import onnx_runner

        self.facts, self.colours = read_json(folder / "export.json"), colours
        end = (file or "image.onnx").removeprefix("image").removeprefix("text")
        self.paths = {part: folder / f"{part}{end}" for part in ("image", "text")}
        files = [name for name, about in self.facts["files"].items() if about["format"] == "onnx"]
        for path in self.paths.values():
            if path.name not in files or not path.is_file():
                raise UserError(f"{path}: no such file of the export; name one of it: {', '.join(files) or 'none'}")
        self.run = {part: onnx_runner(path) for part, path in self.paths.items()}

    def to(self, *args: Any, **options: Any) -> ExportedClip:
        """Like ``torch.nn.Module.to``, without effect."""
        return self

    def eval(self) -> ExportedClip:
        """Like ``torch.nn.Module.eval``, without effect."""
        return self

    def __call__(self, pixel_values: torch.Tensor | None = None, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """``image`` and ``text`` [B, d] of the given inputs, ``scale`` [1], and SigLIP's ``bias`` [1]."""
        import torch

        output = {name: torch.tensor([float(self.facts[name])]) for name in ("scale", "bias") if name in self.facts}
        if pixel_values is not None:
            mean, std = (torch.tensor(values)[:, None, None] for values in self.colours)
            pixels = (255 * (pixel_values.cpu() * std + mean)).round().clamp(0, 255).to(torch.uint8).contiguous()
            output["image"] = torch.from_numpy(self.run["image"]({"pixels": pixels.numpy()})[0]).float()
        if "input_ids" in inputs:
            names = self.facts["files"][self.paths["text"].name]["inputs"]
            found = self.run["text"]({name: inputs[name].cpu().numpy() for name in names})[0]
            output["text"] = torch.from_numpy(found).float()
        return output


@dataclass
class ImageModel:
    """An image classifier with its preprocessing.

    ``prepare`` returns uint8 [3, S, S], which is normalised with ``mean`` and ``std`` (per channel, 0 to 1), or
    float32 [3, H, W], which is already normalised. ``takes_videos``: the model can be told which images are the frames
    of one video.
    """

    model: PreTrainedModel | TorchModel | ExportedModel
    device: torch.device
    label_names: list[str]
    prepare: Callable[[Source], torch.Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    takes_videos: bool = False


def takes_videos(config: Mapping[str, Any], class_names: Sequence[str] = ()) -> bool:
    """Whether :func:`open_image_model` opens a model that sees videos too, from the content of its ``config.json``."""
    return config.get("model_type") == "clip_classifier" or bool(class_names)


def open_image_model(
    folder: Path,
    device: torch.device,
    module: ModuleType | None = None,
    trust_remote_code: bool = False,
    class_names: Sequence[str] = (),
    prompt_templates: Sequence[str] = (),
    onnx_file: str | None = None,
) -> ImageModel:
    """The classifier in ``folder``; images are preprocessed as in the evaluation of the script that trained it, or by
    transformers' processor if ``preprocessor_config.json`` differs from that. ``module``: the user's, from
    ``--import``. ``class_names``: of a CLIP or a classifier on one, other classes than its own, in the prompts
    ``prompt_templates``.

    Raises:
        UserError: there is no processor, the weights are missing or corrupted, or classes are named for a model that
            does not compare images with texts.
    """
    import torch
    from PIL import Image
    from transformers import AutoModelForImageClassification

    from accelerando.data.decode import decode_for_evaluation

    if is_export(folder):
        return _open_export(folder, onnx_file, class_names)
    if takes_videos(read_json(folder / "config.json"), class_names):
        return _open_clip_classifier(folder, device, trust_remote_code, class_names, prompt_templates)
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no preprocessor_config.json beside the model; copy it from the base model")
    settings = read_json(path)
    size = evaluation_size(settings)
    prepare = SavedProcessor(folder, trust_remote_code) if size is None else partial(decode_for_evaluation, size=size)
    model = open_saved(AutoModelForImageClassification, folder, module, trust_remote_code)
    if isinstance(prepare, SavedProcessor) and not isinstance(model, TorchModel):
        try:
            with torch.inference_mode():  # its images may have a size that the model refuses
                model(pixel_values=prepare.prepare(Image.new("RGB", (64, 48)))[None])
        except (RuntimeError, ValueError, TypeError) as error:
            reason = f"the model does not accept the output of its image processor ({in_one_line(error)})"
            raise UserError(f"{folder}: {reason}") from None
    mean, std = (channel_values(settings, name) for name in ("image_mean", "image_std"))
    return ImageModel(_on_device(model, device), device, _label_names(model), prepare, mean, std)


def _open_clip_classifier(
    folder: Path,
    device: torch.device,
    trust_remote_code: bool,
    class_names: Sequence[str],
    prompt_templates: Sequence[str],
) -> ImageModel:
    from transformers import AutoModelForImageClassification

    from accelerando.models.clip import check_image_size, open_preprocessing
    from accelerando.models.clip_classifier import open_with_classes

    quiet_loading()
    preprocessing = open_preprocessing(str(folder), None, trust_remote_code)
    if class_names:
        model = open_with_classes(str(folder), class_names, prompt_templates, trust_remote_code).eval()
    else:
        model = open_saved(AutoModelForImageClassification, folder, None, trust_remote_code)
    check_image_size(model.clip, preprocessing)
    prepare = preprocessing.transform()  # as in the evaluation of scripts/clip_har.py
    names = _label_names(model)
    return ImageModel(_on_device(model, device), device, names, prepare, *preprocessing.colours, takes_videos=True)


def _open_export(folder: Path, onnx_file: str | None, class_names: Sequence[str]) -> ImageModel:
    import torch
    from transformers import AutoModelForImageClassification

    from accelerando.data.decode import decode_for_evaluation

    if class_names:
        raise UserError(f"--class_names: the classes of {folder} are part of its graph; name the run")
    model = open_saved(AutoModelForImageClassification, folder, onnx_file=onnx_file)
    settings = folder / "preprocessor_config.json"
    size = evaluation_size(read_json(settings)) if settings.is_file() else None
    prepare = exported_transform(model.facts) if size is None else partial(decode_for_evaluation, size=size)
    videos = model.facts["task"] == "har"
    return ImageModel(model, torch.device("cpu"), _label_names(model), prepare, (), (), takes_videos=videos)


def _on_device(model: PreTrainedModel | TorchModel, device: torch.device) -> PreTrainedModel | TorchModel:
    import torch

    return model.to(device, memory_format=torch.channels_last)


def _label_names(model: PreTrainedModel | TorchModel) -> list[str]:
    return [str(model.config.id2label[number]) for number in range(model.config.num_labels)]


def exported_transform(facts: Mapping[str, Any]) -> ImageTransform:
    """The preprocessing that the facts of an export describe."""
    from accelerando.data.transforms import ImageTransform

    size, margin = facts["size"][0], facts["margin"]
    shorter = size if margin is None else round(size / (1 - 2 * margin))
    mode = {2: "bilinear", 3: "bicubic"}[facts["resample"]]
    return ImageTransform(size, square=margin is None, shorter=shorter, mode=mode)


def evaluation_size(settings: dict[str, Any]) -> int | None:
    """The side of the images if a processor's ``settings`` are those of :func:`data.images.write_image_processor`,
    which :func:`data.decode.decode_for_evaluation` implements; else None."""
    from accelerando.data.decode import evaluation_side

    crop = settings.get("crop_size")
    side = crop.get("height") if isinstance(crop, dict) else None
    if not isinstance(side, int):
        return None
    ours = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": side, "width": side},
        "resample": 2,
        "size": {"shortest_edge": evaluation_side(side)},
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
    }
    coloured = all(channel_values(settings, name) for name in ("image_mean", "image_std"))
    return side if coloured and all(settings.get(name) == value for name, value in ours.items()) else None


def channel_values(settings: dict[str, Any], name: str) -> tuple[float, ...]:
    """The three numbers of a processor's setting; empty if it has others or none."""
    values = settings.get(name)
    whole = isinstance(values, list) and len(values) == 3 and all(isinstance(value, int | float) for value in values)
    return tuple(values) if whole else ()


class SavedProcessor:
    """Turns a file into float32 [3, H, W], normalised, with the processor saved in ``folder``.

    Raises:
        UserError: the processor cannot be loaded.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        from PIL import Image
        from transformers import AutoImageProcessor

        with opening(folder, "image processor"):
            self.processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=trust_remote_code
            )
            for name in ("size", "crop_size"):
                asked = dict(getattr(self.processor, name, None) or {})
                side = max(asked.get(part) or 0 for part in ("height", "width", "shortest_edge", "longest_edge"))
                if side > LARGEST_SIDE:
                    raise UserError(f"{folder}: {name} of its image processor is {side:,} pixels")
            self.prepare(Image.new("RGB", (64, 48)))  # which meets settings of a wrong kind

    def __call__(self, source: Source) -> torch.Tensor:
        from PIL import Image

        from accelerando.data.decode import DecodedImage, decode_pixels, middle_of

        pixels = source.pixels if isinstance(source, DecodedImage) else decode_pixels(source)
        size = dict(getattr(self.processor, "size", None) or {})
        if getattr(self.processor, "do_center_crop", False) and size.get("shortest_edge"):
            pixels = pixels[middle_of(*pixels.shape[:2], size["shortest_edge"])]
        return self.prepare(Image.fromarray(pixels))

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """A decoded image as the model takes it."""
        return self.processor(images=[image], return_tensors="pt")["pixel_values"][0]


def image_logits(
    opened: ImageModel,
    pixels: torch.Tensor,
    tta: bool = False,
    amp: str = "no",
    frames: Sequence[Sequence[int]] = (),
) -> torch.Tensor:
    """Logits [B, C], float32 on the CPU, of prepared images [B, 3, H, W]. Of a model that takes videos: ``frames``,
    how many of the images belong to each view of each of B samples.

    ``tta``: test-time augmentation, the mean over each image and its horizontal flip, as
    :func:`train.evaluation.mirrored_mean` takes it. ``amp``: no, bf16 or fp16.
    """
    import torch

    from accelerando.data.transforms import normalise
    from accelerando.models.clip_classifier import segment_means

    pixels = pixels.contiguous(memory_format=torch.channels_last).to(opened.device, non_blocking=True)
    if pixels.dtype == torch.uint8 and not isinstance(opened.model, ExportedModel):
        pixels = normalise(pixels, opened.mean, opened.std)
    kind = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    parts = {}
    if opened.takes_videos and frames:
        parts["frames"] = torch.tensor([count for views in frames for count in views], device=opened.device)
    with torch.inference_mode(), torch.autocast(opened.device.type, kind, enabled=amp != "no"):
        logits = opened.model(pixel_values=pixels, **parts).logits.float()
        if tta:
            mirrored = opened.model(pixel_values=pixels.flip(-1), **parts).logits.float()
            logits = mirrored_mean(logits, mirrored, opened.model.config.problem_type)
    if parts:
        logits = segment_means(logits, torch.tensor([len(views) for views in frames], device=opened.device))
    return logits.cpu()


def label_thresholds(config: Mapping[str, Any], label_names: Sequence[str]) -> np.ndarray | None:
    """The thresholds of the labels' probabilities, [C], in the content of a ``config.json``; None: it has none.

    Raises:
        UserError: they are not numbers from 0 to 1 by the names of the labels.
    """
    import numpy as np

    named = config.get("thresholds")
    if named is None:
        return None
    try:
        values = np.array([float(named[name]) for name in label_names])
    except (KeyError, TypeError, ValueError):
        values = np.array([np.nan])
    if not ((values >= 0) & (values <= 1)).all():
        raise UserError("config.json: thresholds are not a number from 0 to 1 for each label: correct or remove them")
    return values


def scores_of(logits: torch.Tensor, config: PretrainedConfig, temperature: float = 1.0) -> torch.Tensor:
    """Probabilities [B, C] from logits according to ``config.problem_type``; the raw values for a regression.

    ``temperature`` divides the logits of one label an input, see :mod:`report.calibration`.
    """
    if config.problem_type == "multi_label_classification":
        return logits.sigmoid()
    one_label = logits.shape[-1] > 1 and config.problem_type != "regression"
    return (logits / temperature).softmax(dim=-1) if one_label else logits
