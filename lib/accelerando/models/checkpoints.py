"""Files of weights that other trainers have written: the state dict in them, and the names of its tensors."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from accelerando.base.errors import UserError
from accelerando.base.model_folder import check_pointer, in_one_line, shard_names, tensor_shapes

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]

# The keys under which trainers keep a state dict: plain weights, then moving averages of them.
STATES = ("state_dict", "model_state_dict", "model", "module", "net", "weights", "params")
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema")
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch's, in front of any part
# Attributes in which DDP, Lightning modules and moving averages keep the model: in front of all of its names.
HOLDERS = ("module", "model", "net", "network", "backbone", "ema_model", "online_model")
FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


def read_state(path: Path) -> State:
    """The state dict in a file: .safetensors, or what torch.save wrote, in which only tensors and numbers are read; or
    in the files of a model's folder.

    Of a trainer's checkpoint (timm, Lightning, torchvision) the model's weights are taken, or their moving average if
    there is nothing else.

    Raises:
        UserError: no such file, no state dict in it, or Python objects that would have to be unpickled.
    """
    import argparse

    import torch

    if path.is_dir():
        files = stored_files(str(path))
        if not files:
            raise UserError(f"{path}: no weights in it (model.safetensors)")
        return {name: tensor for file in files for name, tensor in read_state(file).items()}
    check_pointer(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensor_shapes(path)
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm saves its arguments; it is a plain record
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    # Besides its own errors torch.load raises those of the code that it runs on a damaged file.
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError,
            pickle.UnpicklingError) as error:  # fmt: skip
        raise UserError(f"{path}: not a weights file ({in_one_line(error)})") from None
    while isinstance(content, dict) and not _all_tensors(content):
        key = next((key for key in (*STATES, *AVERAGES) if isinstance(content.get(key), dict)), None)
        if key is None:
            raise UserError(f"{path}: no state dict in it, but {', '.join(map(str, [*content][:5]))}")
        content = content[key]
    if not content or not isinstance(content, dict):
        raise UserError(f"{path}: no state dict in it")
    return content


def _all_tensors(content: dict) -> bool:
    import torch

    return all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items())


def without_prefixes(state: State) -> Iterator[tuple[str, State]]:
    """``state`` as it is, then without the names of wrappers, then without one more prefix of all names at a time.

    Yields what was removed ("" at first) and the rest of the state; tensors without the prefix that most of them have
    (a metric, a counter) are left out.
    """
    yield "", state
    pattern = re.compile(rf"(^|\.)(?:{'|'.join(WRAPPERS)})(?:\.|$)")
    plain = state
    while any(pattern.search(name) for name in plain):
        plain = {pattern.sub(r"\1", name): tensor for name, tensor in plain.items()}
    taken = [f"{name}." for name in WRAPPERS if any(f"{name}." in key for key in state)]
    if taken:
        yield "".join(taken), plain
    while 3 * _count(plain, holder := max(HOLDERS, key=lambda name: _count(plain, name))) > len(plain):
        plain = {name.removeprefix(f"{holder}."): t for name, t in plain.items() if name.startswith(f"{holder}.")}
        taken.append(f"{holder}.")
        yield "".join(taken), plain


def _count(state: State, holder: str) -> int:
    return sum(name.startswith(f"{holder}.") for name in state)


def stored_files(name: str) -> list[Path]:
    """The files with the weights of a local folder, or of a name on the Hub that has been downloaded."""
    from transformers.utils import cached_file

    def local(file: str) -> Path | None:
        found = cached_file(name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None

    for file in FILES:
        if path := local(file):
            if not file.endswith(".index.json"):
                return [path]
            return [part for name in shard_names(path) if (part := local(name))]
    return []
