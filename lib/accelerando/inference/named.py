"""Models as users name them: runs, their ``best/`` or ``last/``, exports and files of them, folders, the Hub's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError
from accelerando.base.model_folder import in_one_line, read_json
from accelerando.inference.runs import is_run, model_folder, read_results, read_settings, run_of
from accelerando.inference.saved import is_export, task_of_saved
from accelerando.train.accelerator import computes_bf16

if TYPE_CHECKING:
    from types import ModuleType

    import torch

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # of a model on the Hub


@dataclass
class Named:
    """A model that was named, its weights not yet loaded.

    ``folder`` holds the weights, or the graphs of an export, of which ``onnx_file`` may name one. ``run`` is the run
    that it belongs to, if any, and ``settings`` what its config.yaml says.
    """

    name: str
    folder: Path
    task: str  # text, sign, image, har or clip
    config: dict[str, Any]
    run: Path | None
    settings: dict[str, Any]
    onnx_file: str | None = None

    @property
    def exported(self) -> bool:
        """Whether its graph is run, not a model of torch."""
        return is_export(self.folder)

    @property
    def trained_precision(self) -> str | None:
        """In which precision it was trained: as config.yaml says, or as the launch chose."""
        asked = self.settings.get("amp")
        if asked is None and self.run and (self.run / "results.json").is_file():
            return read_results(self.run).get("precision")
        return asked


def find_named(name: str, module: ModuleType | None = None, trust_remote_code: bool = False) -> Named:
    """What ``name`` names; ``module``: from ``--import``, which may make more kinds of models known.

    Raises:
        UserError: nothing is there, or no model of these tasks.
    """
    path = Path(name)
    run = run_of(path)
    settings = read_settings(run) if run else {}
    if not path.exists() and path.suffix != ".onnx" and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        folder = _fetched(name, trust_remote_code)
    elif is_run(path) and settings.get("scenario") == "zero_shot" and not (path / "best").is_dir():
        folder = Path(str(settings.get("model_name")))  # nothing was trained: the weights are the base model's
        folder = folder if folder.is_dir() else _fetched(str(folder), trust_remote_code)
    else:
        folder = model_folder(path)
    config = read_json(folder / "config.json")
    task = kind_of(folder, config, module)
    if run is None and (run := run_of(folder)):  # of an export, or a file of it
        settings = read_settings(run)
    if task == "har" and folder == path / "best" and (path / "wise_ft" / "config.json").is_file():
        folder = path / "wise_ft"  # the weights that results.json is about
    onnx_file = path.name if path.suffix == ".onnx" else None
    if onnx_file and not is_export(folder):
        raise UserError(f"{name}: not a file of tools/export.py (no export.json beside it)")
    return Named(
        name.rstrip("/"), folder, task, config, run, settings or (read_settings(run) if run else {}), onnx_file
    )


def _fetched(name: str, trust_remote_code: bool) -> Path:
    """The folder of a model on the Hub, fetched or found in the cache.

    Raises:
        UserError: there is no such model, or no network.
    """
    from huggingface_hub import snapshot_download

    patterns = [*HUB_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the Hub client passes on errors of the libraries that it uses
        reason = f"no such folder, and it is not found on the Hub: {in_one_line(error)}"
        raise UserError(f"{name}: {reason}") from None


def kind_of(folder: Path, config: Mapping[str, Any], module: ModuleType | None = None) -> str:
    """The task of the model in ``folder``: text, sign, image, har or clip; ``module``: from ``--import``.

    Raises:
        UserError: it is none of these.
    """
    if config.get("model_type") == "clip_classifier":
        return "har"
    if "text_config" in config and "vision_config" in config:
        return "clip"
    return task_of_saved(folder, config, module)


def label_names(model: Named, one_class: bool = True) -> list[str]:
    """The names of the model's classes in their order, or, unless ``one_class``, also of several labels or numbers.

    Raises:
        UserError: config.json does not name them, or the model gives no single class.
    """
    config, path = model.config, model.folder / "config.json"
    several = config.get("problem_type") in ("multi_label_classification", "regression")
    if several and one_class:
        kind = config["problem_type"]
        raise UserError(f"{model.name}: its problem type is {kind}; only one class for each sample is supported")
    try:
        # transformers leaves out what it takes for granted: two classes without names.
        named = config.get(
            "id2label", {f"{number}": f"LABEL_{number}" for number in range(config.get("num_labels", 2))}
        )
        labels = [str(named[str(number)]) for number in range(len(named))]
    except (TypeError, KeyError):
        raise UserError(f"{path}: id2label does not name the classes 0, 1 and so on") from None
    if len(set(labels)) < max(1 if several else 2, len(labels)):
        raise UserError(f"{path}: id2label names fewer than two classes, or one twice")
    return labels


def precision(asked: str | None, trained: str | bool | None, device: torch.device) -> str:
    """no, bf16 or fp16: what was asked for, or what the run was trained in, if this machine computes it.

    Raises:
        UserError: fp16 was asked for on a CPU.
    """
    fast = {"bf16": computes_bf16(), "fp16": device.type != "cpu"}
    if asked is not None:
        if asked == "fp16" and device.type == "cpu":
            raise UserError("--amp fp16 needs a GPU: --amp bf16 is the mixed precision of a CPU, --amp no the full one")
        return asked
    if trained == "auto":
        return next((kind for kind in ("bf16", "fp16") if fast[kind]), "no")
    return trained if fast.get(trained) else "no"
