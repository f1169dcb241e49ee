"""Several classifiers of transformers with one encoder: it is computed and trained for all, each has its own head."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from accelerando.base.errors import UserError
from accelerando.base.files import link_or_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADS = "model_heads.safetensors"  # beside the encoder's model.safetensors
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")  # of a classifier: encoder, head


@dataclass
class SharedOutput(ModelOutput):
    """Logits [B, C] of one head, and the log variances of all, [heads], if the weights of the losses are learned."""

    logits: torch.FloatTensor | None = None
    log_variances: torch.FloatTensor | None = None


class SharedEncoder(nn.Module):
    """The encoder of the first of ``models`` (of the same class, by name) with the heads of all of them.

    A head is its model without the encoder, so that everything around the encoder, such as pooling, is the model's own.
    ``learned_weights``: there is a log variance for each head (Kendall, Gal and Cipolla 2018, arXiv:1705.07115).

    Raises:
        UserError: the models have no encoder apart from the head.
    """

    def __init__(self, models: Mapping[str, PreTrainedModel], learned_weights: bool = False) -> None:
        super().__init__()
        self.names = list(models)
        first = next(iter(models.values()))
        self.prefix, self._no_split_modules = first.base_model_prefix, first._no_split_modules
        encoder = first.base_model
        if encoder is first or not self.prefix:
            raise UserError(f"{type(first).__name__} has no encoder apart from its head that others could share")
        setattr(self, self.prefix, encoder)
        for model in models.values():
            del model._modules[self.prefix]
            object.__setattr__(model, self.prefix, encoder)  # found by its forward, but none of its submodules
        self.heads = nn.ModuleList(models.values())
        self.log_variances = nn.Parameter(torch.zeros(len(models))) if learned_weights else None

    def forward(self, part: int, **inputs: torch.Tensor) -> SharedOutput:
        """The logits of head number ``part`` for the encoder's inputs ([B, T] each)."""
        logits = self.heads[part](**inputs).logits
        if self.training:
            # In each backward pass all parameters have a gradient, 0 in the heads without samples: DDP and FSDP reduce
            # the same parameters on all processes, and an optimizer's step is the same for any division of its samples.
            idle = [weight for number, head in enumerate(self.heads) if number != part for weight in head.parameters()]
            logits = logits + 0 * sum(weight.sum() for weight in idle if weight.requires_grad)
        return SharedOutput(logits, None if self.log_variances is None else self.log_variances + 0)

    def get_input_embeddings(self) -> nn.Module:
        """Those of the encoder."""
        return getattr(self, self.prefix).get_input_embeddings()

    def learned_weights(self) -> dict[str, float]:
        """The weight of each head's loss, by name; empty if they are not learned. Call it on every process."""
        if self.log_variances is None:
            return {}
        variances = self.log_variances.detach()
        variances = variances.full_tensor() if hasattr(variances, "full_tensor") else variances  # of FSDP
        return dict(zip(self.names, (-variances.float()).exp().tolist(), strict=True))

    def save_pretrained(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Writes the encoder into ``folder``, for ``AutoModel``, all heads beside it, and into a folder for each head,
        by its name, the whole classifier, for ``AutoModelForSequenceClassification``.

        The encoder's weights are stored once: those in the classifiers' folders are hard links, or copies on a disk
        without such. The log variances belong to training and are left out.
        """
        from safetensors.torch import save_file

        encoder = {name: tensor for name, tensor in state_dict.items() if name.startswith(f"{self.prefix}.")}
        heads = {name: tensor for name, tensor in state_dict.items() if name.startswith("heads.")}
        body = getattr(self, self.prefix)
        config = copy.deepcopy(body.config)
        config.num_labels, config.problem_type, config.architectures = 2, None, [type(body).__name__]
        config.save_pretrained(folder)
        save_file(encoder, folder / "model.safetensors", metadata={"format": "pt"})
        save_file(heads, folder / HEADS, metadata={"format": "pt"})
        for number, (name, model) in enumerate(zip(self.names, self.heads, strict=True)):
            start = f"heads.{number}."
            head = {key.removeprefix(start): tensor for key, tensor in heads.items() if key.startswith(start)}
            _save_classifier(folder / name, model, folder / "model.safetensors", encoder, head)


def _save_classifier(
    folder: Path,
    model: PreTrainedModel,
    weights: Path,
    encoder: dict[str, torch.Tensor],
    head: dict[str, torch.Tensor],
) -> None:
    """A classifier in two files, as transformers divides large models: the encoder's ``weights`` and the head."""
    from safetensors.torch import save_file

    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    link_or_copy(weights, folder / PARTS[0])
    save_file(head, folder / PARTS[1], metadata={"format": "pt"})
    files = dict.fromkeys(sorted(encoder), PARTS[0]) | dict.fromkeys(sorted(head), PARTS[1])
    size = sum(tensor.numel() * tensor.element_size() for part in (encoder, head) for tensor in part.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
