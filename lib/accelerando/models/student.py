"""Students that begin with layers of their teacher, and with its embeddings, for the same or a smaller vocabulary."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from accelerando.base.errors import UserError
from accelerando.base.log import log
from accelerando.models.overrides import SHAPE
from accelerando.models.pretrained import head_names

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Tokens with a meaning of their own in every tokenizer.
ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")


def layers_to_copy(count: int, total: int) -> list[int]:
    """``count`` of ``total`` layers, evenly spaced from the first to the last: of 12 the 6 of DistilBERT (Sanh et al.
    2019, arXiv:1910.01108), 0 2 4 7 9 11."""
    return [int(number) for number in np.linspace(0, total - 1, count).round()]


def keep_layers(config: PreTrainedConfig, count: int) -> list[int]:
    """Changes the config of a teacher to that of a student with ``count`` of its layers, and says which they are.

    Raises:
        UserError: the architecture has no number of layers, or fewer than that.
    """
    name = next((spelling for spelling in SHAPE["num_layers"] if hasattr(config, spelling)), None)
    if name is None:
        raise UserError(f"--student_layers: a {config.model_type} model has no number of layers")
    total = getattr(config, name)
    if count > total:
        raise UserError(f"--student_layers {count}: the teacher has {total}")
    chosen = layers_to_copy(count, total)
    if isinstance(kinds := getattr(config, "layer_types", None), list | tuple):  # local and global attention, say
        config.layer_types = [kinds[number] for number in chosen]
    setattr(config, name, count)
    return chosen


def copy_layers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    chosen: list[int],
    order: list[int],
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
) -> None:
    """Copies the layers ``chosen`` of the teacher into the student, and everything outside of the layers.

    ``order`` [C]: the place of each of the student's classes among the teacher's, for the head. ``tokenizers``, of
    student and teacher, if they differ: see :func:`embeddings_for`.

    Raises:
        UserError: the teacher's layers are not found, or tensors of the two do not fit.
    """
    import torch

    place = _place_of_layers(teacher)
    own, given = student.state_dict(), teacher.state_dict()
    if tokenizers is not None:
        table = teacher.get_input_embeddings()
        name = next(name for name, module in teacher.named_modules() if module is table)
        given[f"{name}.weight"] = embeddings_for(*tokenizers, table.weight, len(student.get_input_embeddings().weight))
    head = head_names(student)
    unfit = []
    with torch.no_grad():
        for name, tensor in own.items():
            source = given.get(re.sub(rf"^({re.escape(place)}\.)(\d+)", lambda m: m[1] + str(chosen[int(m[2])]), name))
            if source is None or source.shape != tensor.shape:
                unfit.append(name)
                continue
            if name.startswith(head) and tensor.ndim and len(tensor) == len(order):
                source = source[order]
            tensor.copy_(source)
    if strange := [name for name in unfit if not name.startswith(head)]:
        raise UserError(
            f"--student_layers: a {teacher.config.model_type} model cannot be copied layer by layer ({strange[0]} does "
            "not fit)"
        )
    words = f"; not {', '.join(unfit)}" if unfit else ""
    shown = ", ".join(str(number + 1) for number in chosen)
    log.info("Copied from the teacher: layers %s of %d, embeddings and head%s", shown,
             len(teacher.get_submodule(place)), words)  # fmt: skip


def _place_of_layers(model: PreTrainedModel) -> str:
    """The name of the list of the model's layers.

    Raises:
        UserError: there is none, as in ALBERT, whose layers share their weights.
    """
    from torch import nn

    total = next((getattr(model.config, name) for name in SHAPE["num_layers"] if hasattr(model.config, name)), 0)
    lists = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.ModuleList)]
    found = [name for name, each in lists if len(each) == total and len({type(layer) for layer in each}) == 1]
    if not found:
        raise UserError(f"--student_layers: a {model.config.model_type} model has no list of layers to copy from")
    return max(found, key=lambda name: sum(each.numel() for each in model.get_submodule(name).parameters()))


def embeddings_for(
    tokenizer: PreTrainedTokenizerBase,
    old: PreTrainedTokenizerBase,
    weight: torch.Tensor,
    count: int,
) -> torch.Tensor:
    """Embeddings [count, width] of the tokens of ``tokenizer`` from those of ``old``, ``weight`` [n, width].

    A token that both have keeps its own; any other gets the mean of the tokens that ``old`` cuts its text into (Gee et
    al. 2022, arXiv:2402.09977).
    """
    import torch

    vocabulary = old.get_vocab()
    special = {getattr(tokenizer, role): getattr(old, role, None) for role in ROLES if getattr(tokenizer, role, None)}
    found = weight.mean(dim=0, keepdim=True).repeat(count, 1)
    with torch.no_grad():
        for token, number in tokenizer.get_vocab().items():
            known = special.get(token) or token
            if known in vocabulary:
                found[number] = weight[vocabulary[known]]
                continue
            text = tokenizer.convert_tokens_to_string([token]).strip().removeprefix("##")
            if pieces := old(text, add_special_tokens=False)["input_ids"]:
                found[number] = weight[pieces].mean(dim=0)
    return found
