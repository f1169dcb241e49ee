"""The script that trained a run, as a module: tools use its data, its model and its evaluation again."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from accelerando.base.errors import UserError, first_line

if TYPE_CHECKING:
    from types import ModuleType

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
        raise UserError(f"--script {path}: no such file")
    name, beside = f"script_{path.stem}", str(path.resolve().parent)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    if beside not in sys.path:
        sys.path.append(beside)  # last, so that nothing in it hides a module of the tools
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the script may raise anything
        raise UserError(f"--script {path}: {type(error).__name__}: {first_line(error)}") from None
    return module
