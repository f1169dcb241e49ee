"""Long texts as overlapping windows of tokens, so that nothing is cut off.

The windows of a text stand one after another in its row of a :class:`data.tokens.TokenTable`; all but the last one have
``size`` tokens, so the length of the row says where they begin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerando.base.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import BatchEncoding, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Windows:
    """A text of more than ``size`` tokens becomes windows of ``size`` tokens, special tokens in each.

    They begin every ``stride`` tokens of the text; it has at most ``most`` of them (None: as many as it takes).
    """

    size: int
    stride: int
    most: int | None = None

    @property
    def repeated(self) -> int:
        """The tokens of a window after the first that are special ones or stand in the window before, too."""
        return self.size - self.stride

    def overlap(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The tokens of the text that neighbouring windows share.

        Raises:
            UserError: windows would leave out tokens, or the tokenizer cannot make any.
        """
        special = tokenizer.num_special_tokens_to_add()
        if not 1 <= self.stride <= self.size - special:
            room = f"a window of {self.size} tokens has room for {self.size - special} beside {special} special ones"
            raise UserError(f"--window_stride {self.stride}: {room}, so use 1 to {self.size - special}")
        if not tokenizer.is_fast:
            raise UserError("--window_stride needs a tokenizer with a tokenizer.json: this one is written in Python")
        return self.size - special - self.stride


def joined_windows(encoded: BatchEncoding, most: int | None) -> Mapping[str, list[list[int]]]:
    """The tokens of the windows of each text one after another, ``input_ids`` (and ``token_type_ids``)."""
    texts = [[first, *first.overflowing][:most] for first in encoded.encodings]
    names = {"input_ids": "ids", "token_type_ids": "type_ids"}
    return {
        name: [[token for window in text for token in getattr(window, part)] for text in texts]
        for name, part in names.items()
        if name in encoded
    }


def tokens_beyond(encoded: BatchEncoding, windows: Windows) -> tuple[int, int]:
    """Tokens beyond the last window that a text may have, and the texts that have such."""
    left_out = [text.overflowing[windows.most - 1 :] for text in encoded.encodings] if windows.most else []
    tokens = sum(len(window.ids) - windows.repeated for text in left_out for window in text)
    return tokens, sum(len(text) > 0 for text in left_out)
