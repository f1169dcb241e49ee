"""Folders of models: what is broken in one is said in one line that names the file."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerando.base.errors import UserError
from accelerando.base.files import write_text

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# The files that transformers and PEFT read, by what is opened.
READ = {
    "config": ("config.json",),
    "tokenizer": ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
                  "vocab.json", "config.json"),
    "image processor": ("preprocessor_config.json", "processor_config.json", "config.json"),
    "model": ("config.json", "generation_config.json", "*.index.json", "*.safetensors"),
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
}  # fmt: skip
SPEAKING = (OSError, RuntimeError, ValueError)  # their messages are sentences, unlike those of a KeyError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: no such file, invalid JSON, or not an object.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: is not an ordinary file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found a {type(content).__name__}")
    return content


def keep_in_config(folder: Path, name: str, value: object) -> None:
    """Adds an entry of our own to the ``config.json`` of a saved model, which transformers ignores."""
    path = folder / "config.json"
    write_text(path, json.dumps(read_json(path) | {name: value}, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def opening(name: str | Path, what: str) -> Iterator[None]:
    """Around one call of transformers or PEFT that opens a folder, or a name on the Hub; their warnings are not shown.

    They raise errors of any class about a broken file (KeyError, TypeError, plain Exception), and most do not name it.
    ``what`` is a key of ``READ``.

    Raises:
        UserError: the call failed, or a file is a git-LFS pointer, which some readers take for its content.
    """
    folder = Path(name)
    for path in folder.iterdir() if folder.is_dir() else ():
        check_pointer(path)
    try:
        with without_warnings():
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: the {what} cannot be loaded ({_cause(folder, what, error)})") from None


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """transformers logs only errors."""
    from transformers.utils import logging

    shown = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(shown)


def in_one_line(error: BaseException) -> str:
    """An error's message without line breaks and ANSI codes, shortened; with its class if that says more than it."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is not run: if you have read and trust it, add --trust_remote_code"
    if "Weights only load failed" in str(error):  # torch's error is a page that advises to unpickle anything
        found = re.search(r"GLOBAL (\S+)", str(error))
        kind = f", {found[1]}," if found else ""
        return f"it is damaged, or holds a Python object{kind} which is not unpickled: save its tensors alone"
    text = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(str(error).split()))
    text = text if len(text) <= 250 else f"{text[:250]} ..."
    if type(error) is not Exception and not isinstance(error, SPEAKING):
        text = f"{type(error).__name__}: {text}"
    return text or type(error).__name__


def check_pointer(path: Path) -> None:
    """UserError if ``path`` is a git-LFS pointer: the few lines that git leaves where it did not fetch a large file."""
    with contextlib.suppress(OSError):  # what cannot be read is reported by whoever needs it
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
            raise UserError(f"{path}: a git-LFS pointer, not the file itself: run git lfs pull in {path.parent}")


def _cause(folder: Path, what: str, error: Exception) -> str:
    """What is wrong with the files of ``folder``, or else what ``error`` says."""
    if not folder.exists():
        return f"there is no such folder, and it is not found on the Hub: {in_one_line(error)}"
    paths = [path for pattern in READ[what] for path in sorted(folder.glob(pattern))]
    for path in paths:
        try:
            _check_file(path)
        except UserError as fault:
            return str(fault).removeprefix(f"{folder}/")
    vocabularies = ("tokenizer.json", "vocab.*", "*.model", "*.vocab")
    if what == "tokenizer" and not any(any(folder.glob(pattern)) for pattern in vocabularies):
        return "no tokenizer in it: copy tokenizer.json and tokenizer_config.json from the base model"
    if what == "image processor" and not any((folder / name).exists() for name in READ[what][:2]):
        return "no preprocessor_config.json in it: copy it from the base model"
    text = in_one_line(error)
    if isinstance(error, SPEAKING):
        return text
    if type(error) is Exception:  # of the package tokenizers
        return f"tokenizer.json is damaged, or of a newer format than the package tokenizers reads: {text}"
    return f"{text}: an entry of {' or '.join(path.name for path in paths)} is missing or of a wrong kind"


def _check_file(path: Path) -> None:
    """UserError for invalid JSON, weights that are not whole, and an index that names files which are not there."""
    if path.suffix == ".json":
        read_json(path)
        if path.name.endswith(".index.json") and (
            missing := [name for name in shard_names(path) if not (path.parent / name).is_file()]
        ):
            raise UserError(f"{path.parent / missing[0]}: no such file, but {path.name} names it")
    else:
        tensor_shapes(path)


def shard_names(index: Path) -> list[str]:
    """The files that the index of sharded weights names.

    Raises:
        UserError: it is broken.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index}: weight_map does not name a file for each tensor")
    return sorted(set(names.values()))


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a .safetensors file; only its header is read.

    Raises:
        UserError: it is truncated, or not such a file.
    """
    from safetensors import SafetensorError, safe_open

    check_pointer(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise UserError(
            f"{path}: truncated or not a .safetensors file, {size:,} bytes ({in_one_line(error)})"
        ) from None
