"""Saving and loading the weights of plain, DDP and FSDP2 models, in Hugging Face format."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError, first_line
from accelerando.base.files import whole_folder
from accelerando.base.processes import gather_objects
from accelerando.train.accelerator import is_sharded, unwrapped

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


TORCH_MODULE = "torch_module"  # the model_type of a plain torch module


def save_model_folder(
    accelerator: Accelerator,
    model: torch.nn.Module,
    folder: Path,
    extra: Callable[[Path], None] | None = None,
    saved_form: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda state: state,
    outputs: Callable[[torch.nn.Module], torch.Tensor] | None = None,
) -> None:
    """Saves the model in Hugging Face format, for ``from_pretrained``; call it on every process.

    With LoRA ``folder`` gets the merged model and ``folder/adapter`` the adapter; for a module without
    ``save_pretrained`` it gets ``model.safetensors`` and :func:`module_config`. ``extra`` writes further files
    (tokenizer, model card) into the folder that it is called with; ``saved_form`` converts the state dict of training
    to the one that the model's class expects, if they differ. Each file is replaced atomically.

    With LoRA the saved model's ``outputs`` of one batch (its logits) are compared with the trained model's; a
    difference is a UserError, and then nothing is saved.
    """
    from accelerando.train.lora import check_merged, is_lora, merged_state_dict

    state = model_state(accelerator, model)
    plain = unwrapped(accelerator, model)

    def write(draft: Path) -> None:
        from safetensors.torch import save_file

        draft.mkdir(parents=True)
        trained = merged_state_dict(plain, state) if is_lora(plain) else state
        saved = saved_form(trained) if trained else trained
        # Tensors that the model's class does not have (a bias of the loss); load_trained_weights reads them.
        if left_over := {name: tensor for name, tensor in trained.items() if name not in saved}:
            save_file(contiguous(left_over), draft / "model_training_only.safetensors", metadata={"format": "pt"})
        if is_lora(plain):
            plain.get_base_model().save_pretrained(draft, state_dict=contiguous(saved))
            if outputs is None:
                raise TypeError("with LoRA, save_model_folder needs outputs: merged and trained model are compared")
            check_merged(plain, state, draft, outputs)
            plain.save_pretrained(draft / "adapter", state_dict=state, save_embedding_layers=False)
            with contextlib.suppress(FileNotFoundError):
                (draft / "adapter" / "README.md").unlink()  # PEFT's template, which has only placeholders
        elif hasattr(plain, "save_pretrained"):
            plain.save_pretrained(draft, state_dict=contiguous(saved))
        else:
            save_file(contiguous(saved), draft / "model.safetensors", metadata={"format": "pt"})
            (draft / "config.json").write_text(json.dumps(module_config(plain), indent=2) + "\n", encoding="utf-8")
        if extra is not None:
            extra(draft)

    with main_process_writes(accelerator, f"model {folder}"):
        if accelerator.is_main_process:
            # File by file: only the weights change between saves, and a rename replaces them atomically.
            with whole_folder(folder, file_by_file=True) as draft:
                write(draft)


@contextlib.contextmanager
def main_process_writes(accelerator: Accelerator, what: str) -> Iterator[None]:
    """Turns an error on the main process into a UserError on all processes, which would otherwise hang."""
    problem = None
    try:
        yield
    except Exception as error:
        problem = what_failed(error)
        if problem is None:
            raise
    problem = next((text for text in gather_objects(accelerator, problem) if text), None)
    if problem:
        raise UserError(f"{what}: {problem}")


def what_failed(error: Exception) -> str | None:
    """Why a file could not be written; None for an error of another kind."""
    from safetensors import SafetensorError

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError | SafetensorError):
        reason = getattr(error, "strerror", None) or first_line(error)
        return f"{reason}; everything saved before is intact: free some space, then use --resume"
    return None


def module_config(model: torch.nn.Module) -> dict[str, Any]:
    """The ``config.json`` of a plain torch module: its class, and its own ``config`` if that is a dict."""
    own = getattr(model, "config", None)
    kind = type(model)
    return {
        "model_type": TORCH_MODULE,
        "class": f"{kind.__module__}:{kind.__qualname__}",
        **(own if isinstance(own, dict) else {}),
    }


def model_state(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The full state dict on the CPU with the plain model's names; for a sharded model, only on the main process."""
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
    """Loads a full state dict into a plain, DDP or FSDP2 model; ``partly``: ``state`` may lack some tensors.

    Raises:
        UserError: names or shapes do not match the model.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    plain = unwrapped(accelerator, model)
    whole = plain.state_dict()
    own, given = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (whole, state))
    check_same_tensors(own, given, source, partly)
    if is_sharded(accelerator):
        options = StateDictOptions(full_state_dict=True, strict=not partly)
        set_model_state_dict(plain, state, options=options)
    else:
        versioned = type(whole)(state)  # some modules (MNASNet) check the version in a state dict's metadata
        versioned._metadata = whole._metadata
        plain.load_state_dict(versioned, strict=not partly)


def check_same_tensors(
    own: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]], source: str, partly: bool = False
) -> None:
    """UserError if the shapes that ``source`` has by name are not the model's ``own``; ``partly``: some may lack."""
    wrong = [name for name, shape in given.items() if own.get(name) != shape]
    wrong += [] if partly else [name for name in own if name not in given]
    if wrong:
        raise UserError(f"{source} belongs to another model: {wrong[0]} differs (and {len(wrong) - 1} more)")


def load_trained_weights(accelerator: Accelerator, model: torch.nn.Module, folder: Path) -> None:
    """Loads the weights that :func:`save_model_folder` wrote into the same model."""
    from safetensors.torch import load_file

    from accelerando.train.lora import adapter_name, is_lora, plain_name

    plain = unwrapped(accelerator, model)
    saved = {}
    for path in sorted(folder.glob("model*.safetensors")):
        saved.update(load_file(path))
    own = plain.state_dict()
    if is_lora(plain):
        kept = load_file(folder / "adapter" / "adapter_model.safetensors")
        names = {adapter_name(name): name for name in own}
        state = {names[name]: tensor for name, tensor in kept.items()}
        # Parameters that are trained besides the adapters (a logit scale) are only in the merged weights.
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad and name not in state and plain_name(name) in saved:
                state[name] = saved[plain_name(name)]
    else:
        if not saved.keys() <= own.keys():  # transformers saves some models with older names
            opened, report = type(plain).from_pretrained(
                folder, dtype="auto", ignore_mismatched_sizes=True, output_loading_info=True
            )
            if not any(report.values()):  # otherwise it is another model, which set_model_state reports
                saved = opened.state_dict()
        state = saved  # tied weights are stored once and shared in the model
    same_size = {name for name in state if name in own and own[name].numel() == state[name].numel()}
    state = {name: t.reshape(own[name].shape) if name in same_size else t for name, t in state.items()}
    set_model_state(accelerator, model, state, source=str(folder), partly=True)


def contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` for safetensors: contiguous CPU tensors that share no memory."""
    seen: set[int] = set()
    result = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.numel() and tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        result[name] = tensor
    return result
