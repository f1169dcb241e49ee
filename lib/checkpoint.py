"""Checkpoints from which a run goes on exactly: written whole or not at all, checked before they are used.

A checkpoint is a folder ``checkpoints/step_000500`` with ``model.safetensors`` and ``optimizer.safetensors`` (whole,
unsharded tensors under the model's own names, so that they load on any number of processes), ``state.json`` (position,
schedule, scaler, counters), ``rng.json`` (the random states of every process), ``metrics.jsonl`` (what was recorded),
``best/`` (the best model of that moment; its weights are hard links, which cost no space until a better one is found)
and ``manifest.json`` (size and SHA-256 of each file). Nothing in it is pickled. It is written beside its place and
renamed when it is on the disk.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.config import launcher_command
from lib.ema import Ema, averaged
from lib.errors import UserError, first_line

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from lib.optim import Schedule

MANIFEST = "manifest.json"


# ----------------------------------------------------------------------------------------------------------- saving


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    state: dict[str, Any],
    keep: int,
    best: Path | None = None,
    ema: Ema | None = None,
    history: Sequence[dict[str, Any]] = (),
) -> Path:
    """Saves everything exact resume needs as ``folder/step_NNNNNN`` and removes all but the ``keep`` newest.

    To be called on every process. ``state`` holds the run's own counters, as JSON can; ``best`` is the folder of the
    best model so far, ``history`` what was recorded.

    Raises:
        UserError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    tensors, optimizer_rest = _split_tensors(_optimizer_state(accelerator, model, optimizer))
    weights = model_state(accelerator, model)
    with averaged(ema):
        average = {} if ema is None else {name: t.clone() for name, t in model_state(accelerator, model).items()}
    rng = gather_objects(accelerator, _rng_state(accelerator))
    scaler = getattr(accelerator, "scaler", None)
    content = {
        "format": 1,
        "step": step,
        "num_processes": accelerator.num_processes,
        "state": state,
        "schedule": schedule.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "optimizer": optimizer_rest,
    }
    target = folder / f"step_{step:06d}"

    def write(draft: Path) -> None:
        from safetensors.torch import save_file

        save_file(_contiguous(weights), draft / "model.safetensors", metadata={"format": "pt"})
        save_file(_contiguous(tensors), draft / "optimizer.safetensors", metadata={"format": "pt"})
        if average:
            save_file(_contiguous(average), draft / "ema.safetensors", metadata={"format": "pt"})
        (draft / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        (draft / "rng.json").write_text(json.dumps(rng), encoding="utf-8")
        (draft / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
        if best is not None and best.is_dir():
            _copy_model(best, draft / "best")
        _write_manifest(draft)

    with _main_process_writes(accelerator, f"checkpoint {target}"):
        if accelerator.is_main_process:
            _publish(target, write)
            _prune(folder, keep, newest=target)
    return target


def save_model_folder(
    accelerator: Accelerator,
    model: torch.nn.Module,
    folder: Path,
    extra: Callable[[Path], None] | None = None,
    saved_form: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda state: state,
) -> None:
    """Saves the model in Hugging Face layout, to be opened with ``from_pretrained``; to be called on every process.

    With LoRA ``folder`` holds the merged model and ``folder/adapter`` the adapter. ``extra`` writes what belongs
    beside the weights (tokenizer, model card) into the folder it is given; ``saved_form`` turns the state dict of
    training into the one that the model's class expects, where they differ. Each file is replaced whole.
    """
    from lib.lora import is_lora, merged_state_dict

    state = model_state(accelerator, model)
    plain = unwrapped(accelerator, model)

    def write(draft: Path) -> None:
        from safetensors.torch import save_file

        trained = merged_state_dict(plain, state) if is_lora(plain) else state
        saved = saved_form(trained) if trained else trained
        # What the model's class has no place for (a bias of the loss); load_trained_weights finds it here.
        if left_over := {name: tensor for name, tensor in trained.items() if name not in saved}:
            save_file(_contiguous(left_over), draft / "model_training_only.safetensors", metadata={"format": "pt"})
        if is_lora(plain):
            plain.get_base_model().save_pretrained(draft, state_dict=_contiguous(saved))
            plain.save_pretrained(draft / "adapter", state_dict=state, save_embedding_layers=False)
            with contextlib.suppress(FileNotFoundError):
                (draft / "adapter" / "README.md").unlink()  # PEFT's template, all of it placeholders
        else:
            plain.save_pretrained(draft, state_dict=_contiguous(saved))
        if extra is not None:
            extra(draft)

    with _main_process_writes(accelerator, f"model {folder}"):
        if accelerator.is_main_process:
            draft = _fresh_draft(folder)
            try:
                write(draft)
                _sync_files(draft)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
            # File by file: only the weights change between two saves, and a rename replaces them in one go.
            for path in sorted(draft.rglob("*")):
                target = folder / path.relative_to(draft)
                if path.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)
            shutil.rmtree(draft)


def _publish(target: Path, write: Callable[[Path], None]) -> None:
    """``write``s into a folder beside ``target``, brings it to the disk and renames it."""
    draft = _fresh_draft(target)
    try:
        write(draft)
        _sync_files(draft)
        if target.exists():  # the same step, saved again after a resume
            old = target.with_name(f".{target.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            draft.rename(target)
            shutil.rmtree(old)
        else:
            draft.rename(target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _copy_model(source: Path, target: Path) -> None:
    """A second name for the weights, which are only ever replaced whole, and a copy of what a person may edit."""

    def link_or_copy(old: str, new: str) -> None:
        if old.endswith(".safetensors"):
            with contextlib.suppress(OSError):  # a file system without hard links
                os.link(old, new)
                return
        shutil.copy2(old, new)

    shutil.copytree(source, target, copy_function=link_or_copy)


def restore_best(checkpoint: Path, best: Path) -> None:
    """Puts the best model of the moment of ``checkpoint`` back: ``best`` may be of a later one, or half replaced."""
    shutil.rmtree(best, ignore_errors=True)
    if (checkpoint / "best").is_dir():
        _copy_model(checkpoint / "best", best)


def _fresh_draft(target: Path) -> Path:
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Brings a folder's list of names to the disk, after a rename in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_manifest(folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prune(folder: Path, keep: int, newest: Path) -> None:
    for old in [path for path in step_folders(folder) if path != newest][max(0, keep - 1) :]:
        shutil.rmtree(old, ignore_errors=True)
    for draft in folder.glob(".step_*"):  # what a killed run left half written
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _main_process_writes(accelerator: Accelerator, what: str) -> Iterator[None]:
    """An OSError on the main process becomes one UserError on all of them, instead of a hang of the others."""
    from safetensors import SafetensorError

    problem = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = getattr(error, "strerror", None) or first_line(error)
    problem = next((text for text in gather_objects(accelerator, problem) if text), None)
    if problem:
        raise UserError(
            f"cannot write {what}: {problem}; what was saved before is intact: free space, then go on with --resume"
        )


# ---------------------------------------------------------------------------------------------------------- loading


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def what_is_wrong(checkpoint: Path) -> str | None:
    """None for a complete checkpoint; otherwise what is missing or damaged."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            if _sha256(path) != expected["sha256"]:
                return f"{name} is damaged (its checksum differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or damaged"
    return None


def find_checkpoint(accelerator: Accelerator, folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint in ``folder`` (or ``folder`` itself), the same on every process.

    A damaged one is passed over with a warning. None where there is none at all.

    Raises:
        UserError: there are checkpoints and none is complete.
    """
    choice: tuple[str | None, list[str]] = (None, [])
    if accelerator.is_main_process:
        for old in folder.glob(".step_*.old"):  # killed while a step was saved a second time
            place = folder / old.name.removeprefix(".").removesuffix(".old")
            if not place.exists():
                old.rename(place)
        candidates = [folder] if (folder / MANIFEST).is_file() else step_folders(folder)
        damaged = []
        good = None
        for path in candidates:
            problem = what_is_wrong(path)
            if problem is None:
                good = str(path)
                break
            damaged.append(f"{path}: {problem}")
        choice = (good, damaged)
    good, damaged = gather_objects(accelerator, choice)[0]
    if good is None and damaged:
        raise UserError(f"no complete checkpoint to resume from ({'; '.join(damaged)}): start again with --overwrite")
    for line in damaged:
        warn(f"checkpoint {line}; falling back to {Path(good).name}")
    return Path(good) if good else None


def remove_later_checkpoints(checkpoint: Path, warn: Callable[[str], None]) -> None:
    """Removes what comes after the ``checkpoint`` a run goes on from: damaged, or of a course that is given up.

    Left there, they would push the new ones out and be found by the next resume.
    """
    for path in step_folders(checkpoint.parent):
        if int(path.name[5:]) > int(checkpoint.name[5:]):
            warn(f"removed {path}: the run goes on from {checkpoint.name}")
            shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(
    accelerator: Accelerator,
    checkpoint: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    ema: Ema | None = None,
) -> dict[str, Any]:
    """Loads ``checkpoint`` into all of them, restores this process's random states and returns the saved ``state``.

    Raises:
        UserError: the checkpoint belongs to another model or another optimizer.
    """
    from safetensors.torch import load_file

    content = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    if ema is not None:
        name = "ema" if (checkpoint / "ema.safetensors").is_file() else "model"  # switched on later: from here on
        set_model_state(accelerator, model, load_file(checkpoint / f"{name}.safetensors"), source=str(checkpoint))
        ema.take_from_weights()
    set_model_state(accelerator, model, load_file(checkpoint / "model.safetensors"), source=str(checkpoint))
    tensors = load_file(checkpoint / "optimizer.safetensors")
    _set_optimizer_state(accelerator, model, optimizer, _join_tensors(content["optimizer"], tensors), checkpoint)
    schedule.load_state_dict(content["schedule"])
    scaler = getattr(accelerator, "scaler", None)
    if scaler is not None and content["scaler"]:
        scaler.load_state_dict(content["scaler"])
    rng = json.loads((checkpoint / "rng.json").read_text(encoding="utf-8"))
    if accelerator.process_index < len(rng):
        _set_rng_state(rng[accelerator.process_index])
    return content["state"]


# ------------------------------------------------------------------------------------------------- states of a model


def unwrapped(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """The model without DDP's and torch.compile's wrappers; FSDP2 wraps nothing, but is brought to its sharded form."""
    plain = accelerator.unwrap_model(model, keep_torch_compile=False)
    if is_sharded(accelerator):
        from torch.distributed.fsdp import FSDPModule

        # An evaluation ends without the backward that frees the root's gathered parameters, and the optimizer knows
        # only the sharded ones.
        for module in model.modules():  # a compiled model's root is its wrapper
            if isinstance(module, FSDPModule):
                module.reshard()
    return plain


def model_state(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole state dict on the CPU under the plain model's names; where it is sharded, on the main process alone."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    plain = unwrapped(accelerator, model)
    if not is_sharded(accelerator):
        return {name: tensor.detach().cpu() for name, tensor in plain.state_dict().items()}
    return get_model_state_dict(plain, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def set_model_state(
    accelerator: Accelerator,
    model: torch.nn.Module,
    state: dict[str, torch.Tensor],
    source: str,
    partly: bool = False,
) -> None:
    """Loads a whole state dict into a plain, DDP or FSDP2 model; ``partly`` allows for tensors not in ``state``.

    Raises:
        UserError: names or shapes do not fit the model.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    plain = unwrapped(accelerator, model)
    whole = plain.state_dict()
    own = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    wrong = [name for name in state if name not in own or own[name] != tuple(state[name].shape)]
    wrong += [] if partly else [name for name in own if name not in state]
    if wrong:
        raise UserError(f"{source} belongs to another model: {wrong[0]} differs (and {len(wrong) - 1} more)")
    if is_sharded(accelerator):
        options = StateDictOptions(full_state_dict=True, strict=not partly)
        set_model_state_dict(plain, state, options=options)
    else:
        versioned = type(whole)(state)  # some modules (MNASNet) ask for the version that a state dict carries
        versioned._metadata = whole._metadata
        plain.load_state_dict(versioned, strict=not partly)


def load_trained_weights(accelerator: Accelerator, model: torch.nn.Module, folder: Path) -> None:
    """Loads what :func:`save_model_folder` wrote back into the model it came from."""
    from safetensors.torch import load_file

    from lib.lora import adapter_name, is_lora, plain_name

    plain = unwrapped(accelerator, model)
    saved = {}
    for path in sorted(folder.glob("model*.safetensors")):
        saved.update(load_file(path))
    own = plain.state_dict()
    if is_lora(plain):
        kept = load_file(folder / "adapter" / "adapter_model.safetensors")
        names = {adapter_name(name): name for name in own}
        state = {names[name]: tensor for name, tensor in kept.items()}
        # What is trained beside the adapters (a logit scale) is in the merged weights alone.
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad and name not in state and plain_name(name) in saved:
                state[name] = saved[plain_name(name)]
    else:
        if not saved.keys() <= own.keys():  # transformers saves some models under older names than they have
            opened, report = type(plain).from_pretrained(
                folder, dtype="auto", ignore_mismatched_sizes=True, output_loading_info=True
            )
            if not any(report.values()):  # otherwise it is another model's, which set_model_state says
                saved = opened.state_dict()
        state = saved  # tied weights are stored once; the model shares them anyway
    same_size = {name for name in state if name in own and own[name].numel() == state[name].numel()}
    state = {name: t.reshape(own[name].shape) if name in same_size else t for name, t in state.items()}
    set_model_state(accelerator, model, state, source=str(folder), partly=True)


def is_sharded(accelerator: Accelerator) -> bool:
    """True under FSDP, where a process holds only its part of each parameter."""
    from accelerate import DistributedType

    return accelerator.distributed_type == DistributedType.FSDP


def _plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _optimizer_state(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=is_sharded(accelerator))
    return get_optimizer_state_dict(unwrapped(accelerator, model), _plain_optimizer(optimizer), options=options)


def _set_optimizer_state(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, state: dict[str, Any], checkpoint: Path
) -> None:
    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    groups = _plain_optimizer(optimizer).param_groups
    saved = state["param_groups"]
    unknown = set(saved[0]) ^ set(groups[0]) if saved else {"groups"}
    if len(saved) != len(groups) or unknown:
        raise UserError(
            f"{checkpoint} was trained with another optimizer or schedule: give --optimizer and --scheduler as before"
        )
    options = StateDictOptions(full_state_dict=True)
    plain = unwrapped(accelerator, model)
    trained = {parameter: parameter.requires_grad for parameter in plain.parameters()}
    # Parameters without a state so far (a layer not yet unfrozen, one that took no part) start without one again: torch
    # gives a state to all that are trainable, and wants one for each.
    for name, parameter in plain.named_parameters():
        known = name.replace("_orig_mod.", "") in state["state"]
        parameter.requires_grad_(known if state["state"] else trained[parameter])
    try:
        set_optimizer_state_dict(plain, _plain_optimizer(optimizer), state, options=options)
    finally:
        for parameter, before in trained.items():
            parameter.requires_grad_(before)
    # A fused step goes through weight and state in the order of memory, which has to be the same (channels_last).
    for weight, kept in _plain_optimizer(optimizer).state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                kept[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def _contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What safetensors takes: contiguous CPU tensors that share no memory."""
    seen: set[int] = set()
    result = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.numel() and tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        result[name] = tensor
    return result


def _split_tensors(tree: Any, prefix: str = "") -> tuple[dict[str, torch.Tensor], Any]:
    """Takes the tensors out of nested dicts and lists: ({path: tensor}, the rest with ``{"tensor": path}`` there)."""
    import torch

    if isinstance(tree, torch.Tensor):
        return {prefix: tree}, {"tensor": prefix}
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(tree, dict):
        rest: Any = {"dict": {}}
        for key, value in tree.items():
            inner, rest["dict"][key] = _split_tensors(value, f"{prefix}/{key}")
            tensors.update(inner)
        return tensors, rest
    if isinstance(tree, list | tuple):
        rest = {"list" if isinstance(tree, list) else "tuple": []}
        for position, value in enumerate(tree):
            inner, kept = _split_tensors(value, f"{prefix}/{position}")
            tensors.update(inner)
            next(iter(rest.values())).append(kept)
        return tensors, rest
    return tensors, {"value": tree}


def _join_tensors(rest: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of :func:`_split_tensors`."""
    ((kind, content),) = rest.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _join_tensors(value, tensors) for key, value in content.items()}
    if kind in ("list", "tuple"):
        items = [_join_tensors(value, tensors) for value in content]
        return items if kind == "list" else tuple(items)
    return content


# ---------------------------------------------------------------------------------------------------- random states


def _rng_state(accelerator: Accelerator) -> dict[str, Any]:
    import numpy as np
    import torch

    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    if accelerator.device.type == "cuda":
        state["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    import numpy as np
    import torch

    def as_bytes(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(as_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(as_bytes(state["cuda"]))


def gather_objects(accelerator: Accelerator, item: Any) -> list[Any]:
    """``item`` of every process, in order, on every process."""
    if accelerator.num_processes == 1:
        return [item]
    from accelerate.utils import gather_object

    return gather_object([item])


# --------------------------------------------------------------------------------------------------- the stop signal


class StopSignal:
    """Notes SIGTERM, SIGINT and SIGUSR1 so that the loop can save and leave; a second SIGINT leaves at once.

    ``received`` is this process's own; the processes agree on it together with the loss of each step. Where the
    launcher dies without telling its child (Accelerate's does, on one process), Linux sends the SIGTERM.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, self._note)
            if launcher_command():
                signal_when_parent_dies(signal.SIGTERM)

    def _note(self, number: int, _frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    @property
    def exit_code(self) -> int:
        """The shell's code for an end by this signal."""
        return 128 + (self.received or signal.SIGTERM)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A draft to fill, which takes the place of ``folder`` when the block ends well: it is there whole or not at all.

    A block that fails or is interrupted leaves ``folder`` as it was; what a killed one left, the next one removes.
    """
    target = folder.resolve()  # of a link, the folder behind it is replaced
    draft, old = target.with_name(f"{target.name}.draft"), target.with_name(f"{target.name}.old")
    if old.exists() and not target.exists():  # killed between the two renames below
        old.rename(target)
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield draft
        if target.exists():
            target.rename(old)
        draft.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def signal_when_parent_dies(number: int) -> None:
    """Has Linux send this process a signal when its parent ends, however that happens."""
    import ctypes
    import sys

    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
