"""From samples to batches: dicts of tensors, padded to the longest sample of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from accelerando.data.mixing import OTHER

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def collate_text(
    pad_token_id: int, multiple_of: int = 1, left: bool = False, window: int | None = None
) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    """Collate for token samples: ``input_ids``, ``attention_mask`` (and ``token_type_ids``) [B, T], ``labels`` [B].

    The labels are int64, or float32 [B, C] of several labels or numbers. Of :class:`data.mixing.MixedRows` there is the
    same of the other rows under ``other_...``, of the same width, and ``share`` float32 [B].

    T is the length of the longest text, rounded up to a multiple of ``multiple_of`` (8 suits a GPU's tensor cores, and
    keeps the number of shapes small for torch.compile). ``left``: padding stands before the text.

    With ``window`` a sample holds windows of that many tokens (:mod:`data.windows`): the tensors of tokens are
    [W, T] of the W windows of all texts, and ``windows`` int64 [B] says how many each text has.
    """
    return TextCollate(pad_token_id, multiple_of, left, window)


class TextCollate:
    """See :func:`collate_text`; a class because worker processes need to pickle it."""

    def __init__(
        self,
        pad_token_id: int,
        multiple_of: int = 1,
        left: bool = False,
        window: int | None = None,
        teacher: TextCollate | None = None,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.multiple_of = multiple_of
        self.left = left
        self.window = window
        self.teacher = teacher  # of a sample's ``teacher``, the tokens of another tokenizer: ``teacher_input_ids``

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        import torch

        parts = ("", OTHER) if "share" in samples[0] else ("",)  # the texts, and those that they are mixed with
        lengths = {part: np.array([len(sample[f"{part}input_ids"]) for sample in samples]) for part in parts}
        batch: dict[str, np.ndarray] = {}
        if self.window is not None:
            batch["windows"], lengths[""] = self._windows(lengths[""])
        longest = max(1, *(int(of_part.max()) for of_part in lengths.values()))
        width = -(-longest // self.multiple_of) * self.multiple_of
        for part in parts:
            real = np.arange(width) < lengths[part][:, None]
            real = real[:, ::-1] if self.left else real
            batch[f"{part}attention_mask"] = real.astype(np.int64)
            for name, padding in ((f"{part}input_ids", self.pad_token_id), (f"{part}token_type_ids", 0)):
                if name in samples[0]:
                    values = np.full(real.shape, padding, dtype=np.int64)
                    values[real] = np.concatenate([sample[name] for sample in samples])
                    batch[name] = values
            if f"{part}label" in samples[0]:
                labels = np.array([sample[f"{part}label"] for sample in samples])
                batch[f"{part}labels"] = labels.astype(np.float32 if labels.ndim > 1 else np.int64)
        known = {f"{part}{name}" for part in parts for name in ("input_ids", "token_type_ids", "label")} | {"teacher"}
        for name in samples[0].keys() - known:  # share, and additional columns of the table
            values = np.array([sample[name] for sample in samples])
            batch[name] = values.astype(np.float32) if name == "share" else values
        tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
        if "teacher" in samples[0]:
            for name, tensor in self.teacher([sample["teacher"] for sample in samples]).items():
                tensors[f"teacher_{name}"] = tensor
        return tensors

    def _windows(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many windows each text of ``lengths`` [B] tokens has, [B], and the length of each window."""
        counts = np.maximum(-(-lengths // self.window), 1)
        row = np.repeat(np.arange(len(lengths)), counts)
        place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        return counts, np.minimum(lengths[row] - place * self.window, self.window)


class ClipCollate:
    """Collate for clips of signing: a dict of tensors.

    ``frames`` float32 [B, T, D], ``attention_mask`` int64 [B, T], ``gloss`` and ``cat`` int64 [B], and ``mask`` bool
    [B, T, 78] if the clips have one. T is the length of the longest clip, rounded up to a multiple of ``multiple_of``;
    padding is 0. A class because worker processes need to pickle it.
    """

    def __init__(self, multiple_of: int = 1) -> None:
        self.multiple_of = multiple_of

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        import torch

        lengths = np.array([len(sample["frames"]) for sample in samples])
        length = -(-int(lengths.max()) // self.multiple_of) * self.multiple_of
        batch = {"attention_mask": (np.arange(length) < lengths[:, None]).astype(np.int64)}
        for name in ("frames", "mask"):
            if name in samples[0]:
                first = samples[0][name]
                values = np.zeros((len(samples), length, first.shape[1]), first.dtype)
                for place, sample in zip(values, samples, strict=True):
                    place[: len(sample[name])] = sample[name]
                batch[name] = values
        for name in ("gloss", "cat"):
            batch[name] = np.array([sample[name] for sample in samples], dtype=np.int64)
        return {name: torch.from_numpy(values) for name, values in batch.items()}


class PairCollate:
    """Collate for image-caption pairs: a dict of tensors.

    ``pixel_values`` uint8 [B, 3, S, S] or ``image_features`` float32 [B, D], ``input_ids`` and ``attention_mask`` int64
    [B, T], ``image_id`` and ``text_id`` int64 [B], ``valid`` float32 [B]. T is the length of the longest caption, at
    most ``max_length``, rounded up to a multiple of ``multiple_of``; with ``full_length`` it is ``max_length`` and
    there is no mask, as in SigLIP's training. A class because worker processes need to pickle it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, multiple_of: int = 1, full_length: bool = False
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.multiple_of, self.full_length = multiple_of, full_length

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        import torch

        batch = {"valid": torch.tensor([sample["valid"] for sample in samples], dtype=torch.float32)}
        for name in ("image_id", "text_id"):
            batch[name] = torch.tensor([sample[name] for sample in samples], dtype=torch.int64)
        if "pixel_values" in samples[0]:
            batch["pixel_values"] = torch.stack([sample["pixel_values"] for sample in samples])
        if "image_features" in samples[0]:
            batch["image_features"] = torch.stack([sample["image_features"] for sample in samples])
        if "caption" in samples[0]:
            tokens = self.tokenizer(
                [sample["caption"] for sample in samples],
                truncation=True,
                max_length=self.max_length,
                padding="max_length" if self.full_length else True,
                return_tensors="pt",
                pad_to_multiple_of=self.multiple_of if self.multiple_of > 1 else None,
            )
            names = ("input_ids",) if self.full_length else ("input_ids", "attention_mask")
            batch.update({name: tokens[name][:, : self.max_length] for name in names})
        return batch


class ImageCollate:
    """Collate for images: ``pixel_values`` uint8 [B, 3, S, S], ``labels`` and ``other_labels`` int64 [B] (of several
    labels or numbers float32 [B, C]), ``share`` and ``valid`` float32 [B].

    A class because worker processes need to pickle it.
    """

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        import torch

        # The samples are channels_last, and so is the batch: stacked like this, nothing is transposed in memory.
        pixels = torch.stack([sample["pixel_values"].permute(1, 2, 0) for sample in samples])
        batch = {"pixel_values": pixels.permute(0, 3, 1, 2)}
        for name, column in (("labels", "label"), ("other_labels", "other_label")):
            labels = np.array([sample[column] for sample in samples])
            batch[name] = torch.from_numpy(labels.astype(np.float32 if labels.ndim > 1 else np.int64))
        for name in ("share", "valid"):
            batch[name] = torch.tensor([sample[name] for sample in samples], dtype=torch.float32)
        return batch
