"""Checkpoints for exact resume: written atomically, beside training, and verified before they are used.

A checkpoint is a folder ``checkpoints/step_000500`` with ``model.safetensors`` and ``optimizer.safetensors`` (tensors
under the model's own names, so that they load on any number of processes), ``state.json`` (position, schedule, scaler,
counters), ``rng.json`` (the random states of every process), ``metrics.jsonl`` (the history), ``best/`` (the best model
so far; its weights are hard links, which need no space until a better one is found) and ``manifest.json`` (size and
SHA-256 of each file). Under FSDP2 each process writes the part that it holds: ``model/`` and ``optimizer/`` with a file
of each. Nothing in it is pickled.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError
from accelerando.base.files import whole_folder
from accelerando.base.processes import gather_objects
from accelerando.base.rng import rng_state, set_rng_state
from accelerando.train.accelerator import is_sharded, unwrapped
from accelerando.train.averages import Ema, averaged
from accelerando.train.checkpoint_folders import SHARDED, WHOLE, Checkpoint, copy_model, prune, write_manifest
from accelerando.train.tensor_files import Shard, Snapshot, read_shards, saved_shapes, shards_of, write_tensors
from accelerando.train.weights import check_same_tensors, main_process_writes, set_model_state, what_failed

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from accelerando.train.optim import Schedule


# ----------------------------------------------------------------------------------------------------------- saving


class Saver:
    """Writes checkpoints one at a time, in a thread of its own or at once.

    Until the thread is done, the checkpoint is a draft: a run that is killed meanwhile continues from the one before.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.snapshots: dict[str, Snapshot] = {}
        self.digests: dict[tuple[int, ...], str] = {}  # of the best weights, which many checkpoints have
        self.what = ""
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._group: Any = None

    @property
    def failed(self) -> bool:
        """True if this process could not write the last checkpoint; :meth:`wait` on all processes says why."""
        return self._error is not None

    def start(self, what: str, write: Callable[[], None], in_background: bool) -> None:
        """Calls ``write``; ``what`` names the checkpoint in messages. Call it on every process, after :meth:`wait`."""
        self.what = what

        def run() -> None:
            try:
                write()
            except Exception as error:
                self._error = error

        if in_background:
            self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            run()
            self.wait()

    def join(self) -> None:
        """Waits until this process has written its part."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Waits until all processes have written the last checkpoint; call it on every process.

        Raises:
            UserError: one of them could not: the disk is full or not writable.
        """
        self.join()
        error, self._error = self._error, None
        with main_process_writes(self.accelerator, self.what):
            if error is not None:
                raise error

    def gathered(self, write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``write`` returned on all processes, in the thread of each.

        Raises:
            UserError: one of them could not write.
        """
        from torch import distributed

        found: dict[str, Any] = {}
        problem = defect = None
        try:
            found = write()
        except Exception as error:
            problem = what_failed(error)
            if problem is None:  # the others must not wait for this process
                problem, defect = f"{type(error).__name__}: {error}", error
        everything = [(found, problem)]
        if self._group is not None:
            everything = [None] * distributed.get_world_size()
            distributed.all_gather_object(everything, (found, problem), group=self._group)
        if defect is not None:
            raise defect
        for _, problem in everything:
            if problem:
                raise UserError(problem)
        return {name: facts for found, _ in everything for name, facts in found.items()}

    def open_group(self) -> None:
        """Makes the group of processes over which their threads speak; call it on every process."""
        from torch import distributed

        if self._group is None and self.accelerator.num_processes > 1:
            self._group = distributed.new_group(backend="gloo")


def save_checkpoint(
    saver: Saver,
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    state: dict[str, Any],
    keep: int,
    best: Path,
    ema: Ema,
    history: Sequence[dict[str, Any]] = (),
    in_background: bool = False,
    when_saved: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Saves everything exact resume needs as ``folder/step_NNNNNN`` and removes all but the ``keep`` newest.

    Call it on every process. ``state``: the run's counters, for JSON; ``best``: the folder of the best model so far;
    ``history``: the rows of metrics.jsonl. ``in_background``: the tensors are copied, and written while training goes
    on; a problem is then raised by the next call of ``saver``'s methods. ``when_saved`` is called on the main process
    with the folder, when it is complete.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are not affected.
    """
    accelerator = saver.accelerator
    saver.wait()  # for the one before
    main, sharded = accelerator.is_main_process, is_sharded(accelerator)
    target = folder / f"step_{step:06d}"
    if sharded:
        saver.open_group()

    tensors, optimizer_rest = _split_tensors(_optimizer_state(accelerator, model, optimizer))
    parts: dict[str, dict[str, Shard]] = {}

    def add(kind: str, found: dict[str, torch.Tensor], copied: bool) -> None:
        parts[kind] = shards_of(found, main)
        if copied:
            parts[kind] = saver.snapshots.setdefault(kind, Snapshot()).take(parts[kind])

    add("model", _model_tensors(accelerator, model), in_background)
    add("optimizer", tensors, in_background)
    if ema.is_on:
        with averaged(ema):
            add("ema", _model_tensors(accelerator, model), copied=True)
    content = {
        "format": SHARDED if sharded else WHOLE,
        "step": step,
        "num_processes": accelerator.num_processes,
        "state": state,
        "schedule": schedule.state_dict(),
        "scaler": scaler.state_dict() if (scaler := getattr(accelerator, "scaler", None)) is not None else None,
        "optimizer": optimizer_rest,
    }
    texts = {
        "state.json": json.dumps(content, indent=1),
        "rng.json": json.dumps(gather_objects(accelerator, rng_state(accelerator))),
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in history),
    }

    draft = None
    with main_process_writes(accelerator, f"checkpoint {target}"), contextlib.ExitStack() as stack:
        if main:
            draft = stack.enter_context(whole_folder(target))
            draft.mkdir(parents=True)
            if best.is_dir():  # now: it may be replaced while the rest is written
                copy_model(best, draft / "best")
            for kind in parts if sharded else ():
                (draft / kind).mkdir()
        opened = stack.pop_all()
    draft = gather_objects(accelerator, draft)[0]

    def write_own() -> dict[str, Any]:
        if not draft.is_dir():
            raise UserError("this machine does not see the folder: --output_dir has to be on a disk that all share")
        facts = {}
        for kind, part in parts.items():
            rank = f"shard-{accelerator.process_index + 1:05d}-of-{accelerator.num_processes:05d}"
            name = f"{kind}/{rank}.safetensors" if sharded else f"{kind}.safetensors"
            facts[name] = write_tensors(draft / name, part, sharded)
        return facts

    def write() -> None:
        with opened:  # at its end the draft becomes the checkpoint
            facts = saver.gathered(write_own) if sharded else write_own()
            if main:
                for name, text in texts.items():
                    (draft / name).write_text(text, encoding="utf-8")
                write_manifest(draft, facts, saver.digests)
        if main:
            prune(folder, keep, newest=target)
            when_saved(target)

    # Without shards the main process has everything.
    saver.start(f"checkpoint {target}", write if main or sharded else lambda: None, in_background)
    return target


# ---------------------------------------------------------------------------------------------------------- loading


def load_checkpoint(
    accelerator: Accelerator,
    checkpoint: Checkpoint,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    ema: Ema,
) -> None:
    """Loads ``checkpoint`` into the given objects and restores this process's random states.

    Raises:
        UserError: the checkpoint belongs to another model or another optimizer.
    """
    path, content = checkpoint.path, checkpoint.content
    if ema.is_on:
        averages = any((path / name).exists() for name in ("ema.safetensors", "ema"))
        _load_weights(accelerator, model, checkpoint, "ema" if averages else "model")  # EMA was turned on only now
        ema.take_from_weights()
    _load_weights(accelerator, model, checkpoint, "model")
    tensors = _load_optimizer_tensors(accelerator, model, checkpoint)
    _set_optimizer_state(accelerator, model, optimizer, _join_tensors(content["optimizer"], tensors), checkpoint)
    schedule.load_state_dict(content["schedule"])
    scaler = getattr(accelerator, "scaler", None)
    if scaler is not None and content["scaler"]:
        scaler.load_state_dict(content["scaler"])
    rng = json.loads((path / "rng.json").read_text(encoding="utf-8"))
    if accelerator.process_index < len(rng):
        set_rng_state(rng[accelerator.process_index])


def _load_weights(accelerator: Accelerator, model: torch.nn.Module, checkpoint: Checkpoint, kind: str) -> None:
    """Loads ``kind`` (model or ema) into ``model``."""
    from safetensors.torch import load_file

    path = checkpoint.path
    if not checkpoint.is_sharded:
        set_model_state(accelerator, model, load_file(path / f"{kind}.safetensors"), source=str(path))
        return
    state = _model_tensors(accelerator, model)
    check_same_tensors(
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        {name: shape for name, (shape, _) in saved_shapes(path / kind).items()},
        source=str(path),
    )
    read_shards(path / kind, state)


def _load_optimizer_tensors(
    accelerator: Accelerator, model: torch.nn.Module, checkpoint: Checkpoint
) -> dict[str, torch.Tensor]:
    """The tensors of the optimizer's state; of a sharded checkpoint, sharded like their parameters."""
    import torch
    from safetensors.torch import load_file

    if not checkpoint.is_sharded:
        return load_file(checkpoint.path / "optimizer.safetensors")
    folder = checkpoint.path / "optimizer"
    own = {name.replace("_orig_mod.", ""): p for name, p in unwrapped(accelerator, model).named_parameters()}
    tensors = {}
    for path, (shape, dtype) in saved_shapes(folder).items():
        like = own.get(path.split("/")[2])  # /state/<parameter>/<kind>
        if like is not None and tuple(like.shape) == shape:
            tensors[path] = torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        else:
            tensors[path] = torch.zeros(shape, dtype=dtype)
    read_shards(folder, tensors)
    return tensors


# ------------------------------------------------------------------------------------------------- states of a model


def _plain_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _model_tensors(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's own tensors by name; under FSDP2 the sharded ones."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    plain = unwrapped(accelerator, model)
    if is_sharded(accelerator):
        return get_model_state_dict(plain, options=StateDictOptions())
    return {name: tensor.detach() for name, tensor in plain.state_dict().items()}


def _optimizer_state(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=not is_sharded(accelerator))
    return get_optimizer_state_dict(unwrapped(accelerator, model), _plain_optimizer(optimizer), options=options)


def _set_optimizer_state(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    checkpoint: Checkpoint,
) -> None:
    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    groups = _plain_optimizer(optimizer).param_groups
    saved = state["param_groups"]
    unknown = set(saved[0]) ^ set(groups[0]) if saved else {"groups"}
    if len(saved) != len(groups) or unknown:
        raise UserError(
            f"{checkpoint.path} was trained with another optimizer or schedule: use the same --optimizer and "
            "--scheduler"
        )
    options = StateDictOptions(full_state_dict=not (checkpoint.is_sharded and is_sharded(accelerator)))
    plain = unwrapped(accelerator, model)
    trained = {parameter: parameter.requires_grad for parameter in plain.parameters()}
    # torch expects a state for each trainable parameter. Those that have none yet (a layer that is not yet unfrozen or
    # was not used) must also start without one, so they are frozen while the state is loaded.
    for name, parameter in plain.named_parameters():
        known = name.replace("_orig_mod.", "") in state["state"]
        parameter.requires_grad_(known if state["state"] else trained[parameter])
    try:
        set_optimizer_state_dict(plain, _plain_optimizer(optimizer), state, options=options)
    finally:
        for parameter, before in trained.items():
            parameter.requires_grad_(before)
    # A fused step requires weight and state in the same memory format (channels_last).
    for weight, kept in _plain_optimizer(optimizer).state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                kept[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def _split_tensors(tree: Any, prefix: str = "") -> tuple[dict[str, torch.Tensor], Any]:
    """Separates tensors from nested dicts and lists: ({path: tensor}, the rest with ``{"tensor": path}`` for each)."""
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
