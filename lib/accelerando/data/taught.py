"""Training rows with what a teacher says of them, and rows without labels: for distillation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from accelerando.base.errors import UserError
from accelerando.data.augment import AugmentedTexts
from accelerando.data.tables import TextTable
from accelerando.data.tokens import TokenTable, encode_texts, tokenize_table

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase


@dataclass
class TaughtRows:
    """``rows`` with a teacher's ``logits`` [n, C] (``teacher_logits``), or with the teacher's own ``tokens`` of each
    (``teacher``: a sample of its own); with neither of them as they are.

    A data set that takes the epoch. Of a text that changes, ``tokenizer`` makes the teacher's tokens anew.
    """

    rows: TokenTable | AugmentedTexts
    logits: np.ndarray | None = None
    tokens: TokenTable | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    max_length: int = 0
    unit: ClassVar[str] = "rows"

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, row: int, epoch: int, draw: int = 0) -> dict[str, Any]:
        """The sample ``row`` in ``epoch``."""
        changes = isinstance(self.rows, AugmentedTexts)
        sample = dict(self.rows.at(row, epoch, draw) if changes else self.rows[row])
        if self.logits is not None:
            sample["teacher_logits"] = self.logits[row]
        if self.tokens is not None:
            changed = self.rows.changed(row, epoch, draw) if changes else None
            sample["teacher"] = self.tokens[row] if changed is None else self._encoded(changed)
        return sample

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The sample ``row`` as it is in the first epoch."""
        return self.at(row, 0)

    def digest(self) -> dict[str, str]:
        """See :class:`data.digest.Digested`: that of the rows, since the teacher has a digest of its own."""
        return self.rows.digest()

    def _encoded(self, texts: list[str]) -> dict[str, np.ndarray]:
        encoded = encode_texts(self.tokenizer, *([text] for text in texts), max_length=self.max_length)
        sample = {"input_ids": np.asarray(encoded["input_ids"][0], np.int32)}
        if self.tokens.types is not None:
            sample["token_type_ids"] = np.asarray(encoded["token_type_ids"][0], np.uint8)
        return sample


def all_texts(table: TextTable, more: TextTable | None) -> pa.ChunkedArray:
    """The texts of ``table`` and after them those of ``more``."""
    import pyarrow as pa

    return pa.chunked_array([*table.texts.chunks, *(more.texts.chunks if more else [])], table.texts.type)


def with_unlabelled(
    table: TextTable, labels: np.ndarray, more: TextTable, tokenizer: PreTrainedTokenizerBase, max_length: int,
    cache: Path,
) -> tuple[TextTable, TokenTable]:  # fmt: skip
    """The texts of ``table`` and after them those of ``more``, which have no labels, and their tokens.

    ``labels`` [n] or [n, C] are those of ``table``; the column ``labelled`` is 1 for its rows and 0 for the others,
    whose labels are 0 and mean nothing.

    Raises:
        UserError: only one of them has pairs of texts.
    """
    import pyarrow as pa

    if (table.pairs is None) != (more.pairs is None):
        raise UserError(f"{more.source}: pairs of texts and single ones cannot be mixed")
    pairs = None if table.pairs is None else pa.chunked_array([*table.pairs.chunks, *more.pairs.chunks])
    labelled = np.concatenate([np.ones(len(table), np.float32), np.zeros(len(more), np.float32)])
    both = TextTable(
        all_texts(table, more), pairs, None, f"{table.source} and {more.source}", columns={"labelled": labelled}
    )
    filler = np.zeros((len(more), *labels.shape[1:]), labels.dtype)
    tokens = tokenize_table(both, tokenizer, max_length, np.concatenate([labels, filler]), cache)
    return both, tokens
