"""MixUp of texts: the token embeddings of two texts are mixed before anything else is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError
from accelerando.data.mixing import OTHER

if TYPE_CHECKING:
    import torch

NAMES = ("input_ids", "attention_mask", "token_type_ids")


def token_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a batch a text model takes; of mixed texts also the other ones and ``share``."""
    names = (*NAMES, *(f"{OTHER}{name}" for name in NAMES), "share")
    return {name: batch[name] for name in names if name in batch}


def mix_texts(model: torch.nn.Module) -> None:
    """Makes ``model`` take the :func:`token_inputs` of mixed texts (wordMixup, Guo et al. 2019, arXiv:1905.08941).

    Place by place, the embedding of a text's token counts ``share`` [B] and that of the other's the rest; behind the
    end of one text its part is 0, and the attention mask is the union of both. Positions are those of the longer text;
    a token's type is that of the first text, behind its end of the other. Without ``share`` the model is what it was.

    Raises:
        UserError: (in the forward pass) the model does not look up a batch's tokens in one embedding layer, once.
    """
    # Hooks, since under FSDP the weights of the embedding are there only while the model computes.
    mixing = _Mixing(type(model).__name__)
    layer = model.get_input_embeddings()
    model.register_forward_pre_hook(mixing.begin, with_kwargs=True)
    layer.register_forward_pre_hook(mixing.both_texts)
    layer.register_forward_hook(mixing.mix)
    model.register_forward_hook(mixing.end)


class _Mixing:
    """The hooks, and what they need of the current batch."""

    def __init__(self, name: str) -> None:
        self.name = name  # of the model's class
        self.ids: torch.Tensor | None = None  # of the other texts, [B, T]
        self.weights: torch.Tensor | None = None  # of both texts' tokens, [2, B, T]
        self.looked_up = 0

    def begin(self, _: torch.nn.Module, given: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        import torch

        self.ids, self.looked_up = None, 0
        if "share" not in inputs:
            return None
        inputs = dict(inputs)
        share = inputs.pop("share")[:, None]
        others = {name: inputs.pop(f"{OTHER}{name}") for name in NAMES if f"{OTHER}{name}" in inputs}
        first, second = inputs["attention_mask"].bool(), others["attention_mask"].bool()
        self.ids, self.weights = others["input_ids"], torch.stack((share * first, (1 - share) * second))
        union = {name: torch.where(first, inputs[name], others[name]) for name in others}
        return given, inputs | union | {"attention_mask": (first | second).long()}

    def both_texts(self, _: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        import torch

        if self.ids is None:
            return None
        self.looked_up += 1
        if not given or len(given[0]) != len(self.ids) or given[0].shape[1] < self.ids.shape[1]:
            raise self._error()
        beyond = given[0].shape[1] - self.ids.shape[1]  # Kim's net puts zeros behind the texts
        return torch.cat((given[0], torch.nn.functional.pad(self.ids, (0, beyond)))), *given[1:]

    def mix(self, _: torch.nn.Module, given: tuple, output: torch.Tensor) -> torch.Tensor | None:
        import torch

        if self.ids is None:
            return None
        of_text = output.unflatten(0, (2, -1))  # [2, B, T, E]
        weights = torch.nn.functional.pad(self.weights, (0, of_text.shape[2] - self.weights.shape[2]))
        return (weights.to(output)[..., None] * of_text).sum(dim=0)

    def end(self, _: torch.nn.Module, given: tuple, output: object) -> None:
        if self.ids is not None and self.looked_up != 1:
            raise self._error()
        self.ids = None

    def _error(self) -> UserError:
        why = "does not look up a batch's tokens in one embedding layer, once"
        return UserError(f"--mixup: {self.name} {why}: train it without")
