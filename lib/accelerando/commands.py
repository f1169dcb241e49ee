"""The scripts as commands of an installed package: ``accelerando-text --train_file ...``, and a copy of one to edit."""

from __future__ import annotations

import importlib.util
import runpy
import shutil
import sys
from pathlib import Path

SCRIPTS = {
    "clip": "clip_finetune", "har": "clip_har", "sign": "sign_train", "image": "image_classify",
    "text": "text_classify", "multitask": "text_multitask",
}  # fmt: skip


def _run(task: str) -> None:
    runpy.run_module(f"accelerando.scripts.{SCRIPTS[task]}", run_name="__main__", alter_sys=True)


def clip() -> None:
    """``accelerando-clip``: clip_finetune.py."""
    _run("clip")


def har() -> None:
    """``accelerando-har``: clip_har.py."""
    _run("har")


def sign() -> None:
    """``accelerando-sign``: sign_train.py."""
    _run("sign")


def image() -> None:
    """``accelerando-image``: image_classify.py."""
    _run("image")


def text() -> None:
    """``accelerando-text``: text_classify.py."""
    _run("text")


def multitask() -> None:
    """``accelerando-multitask``: text_multitask.py."""
    _run("multitask")


def copy() -> None:
    """``accelerando-copy TASK FILE``: a script of one's own to edit, which needs nothing but the installed package."""
    words = sys.argv[1:]
    if len(words) != 2 or words[0] not in SCRIPTS:
        sys.exit(f"usage: accelerando-copy {{{','.join(SCRIPTS)}}} my_script.py")
    target = Path(words[1])
    if target.exists():
        sys.exit(f"error: {target} exists already")
    if not target.parent.is_dir():
        sys.exit(f"error: {target.parent}: no such folder")
    source = importlib.util.find_spec(f"accelerando.scripts.{SCRIPTS[words[0]]}").origin
    shutil.copyfile(source, target)
    print(f"{target}: accelerate launch {target} --help")
