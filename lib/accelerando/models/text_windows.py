"""The logits of a long text from those of its windows, and the settings of windows in a model's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from accelerando.base.errors import UserError
from accelerando.data.windows import Windows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

Pooling = Literal["mean", "max"]
KEY = "text_windows"  # in config.json; transformers keeps the entry, but does not go by it


def pool_windows(logits: torch.Tensor, counts: torch.Tensor | None, pooling: Pooling) -> torch.Tensor:
    """Logits of texts [B, C]: the mean, or the largest of each class, over their windows.

    ``logits`` [W, C] of all windows, those of a text one after another; ``counts`` int64 [B]: how many each text has.
    None, and one window for each text, leave the logits as they are.
    """
    import torch

    if counts is None or len(counts) == len(logits):
        return logits
    text = torch.repeat_interleave(counts)
    if pooling == "max":
        lowest = logits.new_full((len(counts), logits.shape[1]), -torch.inf)
        return lowest.scatter_reduce(0, text[:, None].expand_as(logits), logits, "amax")
    sums = logits.new_zeros(len(counts), logits.shape[1]).index_add(0, text, logits)
    return sums / counts.to(logits)[:, None]


def keep_windows(config: PreTrainedConfig, windows: Windows | None, pooling: Pooling) -> None:
    """Notes in ``config`` how long texts are read, for tools/predict.py and tools/evaluate.py; None: they are cut."""
    vars(config).pop(KEY, None)  # of the model that the weights come from
    if windows is not None:
        setattr(config, KEY, {**vars(windows), "pooling": pooling})


def kept_windows(config: Mapping[str, Any]) -> tuple[Windows | None, Pooling]:
    """What :func:`keep_windows` noted, from the content of a ``config.json``; None: texts are cut.

    Raises:
        UserError: the entry is broken.
    """
    noted = config.get(KEY)
    if noted is None:
        return None, "mean"
    try:
        windows, pooling = Windows(noted["size"], noted["stride"], noted["most"]), noted["pooling"]
        counts = (windows.size, windows.stride, 1 if windows.most is None else windows.most)
        sound = all(type(value) is int and value > 0 for value in counts) and pooling in get_args(Pooling)
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"config.json: {KEY} is not what a run of scripts/text_classify.py wrote: remove or mend it")
    return windows, pooling
