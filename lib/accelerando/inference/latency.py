"""How long saved classifiers of texts and images take for one sample on the CPU, timed in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from accelerando.base.errors import UserError
from accelerando.base.model_folder import read_json
from accelerando.inference.runs import model_folder, task_of_model
from accelerando.inference.saved import open_saved
from accelerando.models.pretrained import own_image_size

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FEWEST = 5  # passes of each model


def latencies(runs: Sequence[Path], seconds: float = 2.0, tokens: int = 32, num_threads: int = 1) -> list[float]:
    """The median time of a pass of one sample through each of ``runs``, in milliseconds, in PyTorch and float32.

    Of texts with ``tokens`` tokens, of an image of the model's own size. All take turns for ``seconds`` each, so that
    whatever else the machine does slows all of them alike.

    Raises:
        UserError: a run has no model, or one of another task.
    """
    import torch

    opened = [_opened(model_folder(run), tokens) for run in runs]
    times: list[list[float]] = [[] for _ in opened]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.inference_mode():
            for model, inputs in opened:
                model(**inputs)  # the first pass prepares its kernels
            until = time.perf_counter() + seconds * len(opened)
            while time.perf_counter() < until or len(times[-1]) < FEWEST:
                for (model, inputs), own in zip(opened, times, strict=True):
                    started = time.perf_counter()
                    model(**inputs)
                    own.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return [1000 * float(np.median(own)) for own in times]


def weights_mb(run: Path) -> float:
    """The size of a run's saved weights in MB (10^6 bytes)."""
    folder = model_folder(run)
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")) / 1e6


def _opened(folder: Path, tokens: int) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    import torch
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    task = task_of_model(folder, read_json(folder / "config.json"))
    if task == "text":
        model = open_saved(AutoModelForSequenceClassification, folder)
        ids = torch.arange(tokens)[None] % 5 + model.config.vocab_size // 2
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == "image":
        model, side = open_saved(AutoModelForImageClassification, folder), own_image_size(str(folder), "")
        return model, {"pixel_values": torch.zeros(1, 3, side, side)}
    raise UserError(f"{folder}: --benchmark times classifiers of texts and images; tools/export.py times all")
