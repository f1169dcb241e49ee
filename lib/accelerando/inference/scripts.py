"""The script that trained a run, as a module: tools use its data, its model and its evaluation again."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.config import parse_args
from accelerando.base.errors import UserError, first_line
from accelerando.base.model_folder import tensor_shapes
from accelerando.inference.runs import read_results
from accelerando.train.weights import load_trained_weights

if TYPE_CHECKING:
    from types import ModuleType

    import torch
    from accelerate import Accelerator

# Which of scripts/ trains the models of a task.
SCRIPT_OF = {
    "text": "text_classify.py", "image": "image_classify.py", "sign": "sign_train.py", "clip": "clip_finetune.py",
    "har": "clip_har.py",
}  # fmt: skip


def import_script(path: Path) -> ModuleType:
    """A training script as a new module, under a name of its own; it may import modules that stand beside it.

    Raises:
        UserError: no such file, or it cannot be imported.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    name, beside = f"script_{path.stem}", str(path.resolve().parent)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    if beside not in sys.path:
        sys.path.append(beside)  # last, so that nothing in it hides a module of the tools
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the script may raise anything
        raise UserError(f"{path}: {type(error).__name__}: {first_line(error)}") from None
    return module


def trained_by(run: Path) -> Path | None:
    """The script that trained a run, as its command named it; None: unknown, since the run is not finished."""
    if not (run / "results.json").is_file():
        return None
    try:
        words = shlex.split(str(read_results(run).get("command", "")))
    except ValueError:  # a quote without its pair
        return None
    return next((Path(word) for word in words if word.endswith(".py")), None)


def settings_of_run(module: ModuleType, run: Path) -> Any:
    """The ``Args`` of the script ``module`` with the settings in the run's ``config.yaml``.

    Raises:
        UserError: the settings are not those of this script.
    """
    try:
        return parse_args(module.Args, module.ALIASES, ["--config", str(run / "config.yaml")])
    except UserError as error:
        script = trained_by(run)
        own = script is not None and script.name != Path(str(module.__file__)).name
        raise UserError(f"{error}; it was trained by {script}: name it with --script" if own else str(error)) from None


def load_weights(accelerator: Accelerator, model: torch.nn.Module, folder: Path) -> None:
    """Loads the weights in ``folder`` into the model that the script built for them.

    Raises:
        UserError: they are another model's, or tensors are missing.
    """
    saved = {name for path in folder.glob("model*.safetensors") for name in tensor_shapes(path)}
    if not saved:
        raise UserError(f"{folder}: no weights (model.safetensors) beside config.json")
    own = model.state_dict()
    if saved <= own.keys():  # otherwise they have older names, which loading knows
        stored = {own[name].data_ptr() for name in saved}  # tied weights are stored once
        missing = [name for name, tensor in own.items() if name not in saved and tensor.data_ptr() not in stored]
        if missing:
            more = f" and {len(missing) - 1:,} more" if missing[1:] else ""
            raise UserError(f"{folder}: the weights lack {missing[0]}{more}: they are of another model")
    load_trained_weights(accelerator, model, folder)
