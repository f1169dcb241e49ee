"""Losses of classification, one value for each sample, and what makes them robust to rare classes and overfitting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def class_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    prior: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of each sample, float32 [B].

    ``logits`` [B, C], ``labels`` int64 [B], ``weight`` [C] of the classes, ``label_smoothing``: share of the target
    that is spread over all classes. ``focal_gamma``: confident answers count (1 - p)^gamma (Lin et al. 2017,
    arXiv:1708.02002). ``prior`` [C] is added to the logits: with tau times the log of the classes' frequencies, the
    plain logits favour rare classes (logit adjustment, Menon et al. 2020, arXiv:2007.07314).
    """
    import torch

    logits = logits if prior is None else logits + prior
    losses = torch.nn.functional.cross_entropy(
        logits, labels, weight, reduction="none", label_smoothing=label_smoothing
    )
    if not focal_gamma:
        return losses
    right = logits.softmax(dim=-1).gather(1, labels[:, None]).squeeze(1)
    return (1 - right) ** focal_gamma * losses


def mixed_loss(loss: Callable[[torch.Tensor], torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``loss`` of the ``labels`` of a batch, [B]; of mixed samples that of both labels, as much as ``share`` says.

    Classes int64 [B] have their share of the loss; targets that are numbers, [B, C], are mixed themselves.
    """
    labels, share = batch["labels"], batch.get("share")
    if share is None:
        return loss(labels)
    others = batch["other_labels"]
    if labels.is_floating_point():
        return loss(share[:, None] * labels + (1 - share[:, None]) * others)
    return share * loss(labels) + (1 - share) * loss(others)


def inverse_frequency(counts: torch.Tensor) -> torch.Tensor:
    """Weights of classes with ``counts`` [C] samples: n / (C n_c), float32 [C], 1 on average over the samples."""
    return (counts.sum().double() / (len(counts) * counts.clamp(min=1))).float()


def log_frequency(counts: torch.Tensor) -> torch.Tensor:
    """Logarithms of the shares of classes with ``counts`` [C] samples, float32 [C]; 0 samples count as 1."""
    counts = counts.clamp(min=1).double()
    return (counts / counts.sum()).log().float()


def twice(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch [B] and then the same again, [2B], which a single pass gives two dropout masks."""
    import torch

    return {name: torch.cat((tensor, tensor)) for name, tensor in inputs.items()}


def r_drop(
    loss: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean ``loss`` of two passes plus ``weight`` times their disagreement, [B], and the first logits, [B, C].

    ``logits`` [2B, C] of a batch that was passed :func:`twice` (R-Drop, Liang et al. 2021, arXiv:2106.14448).
    """
    one, two = logits.chunk(2)
    return (loss(one) + loss(two)) / 2 + weight * disagreement(logits), one


def disagreement(logits: torch.Tensor) -> torch.Tensor:
    """How far the halves of ``logits`` [2B, C], two passes of the same samples, are apart, [B].

    The mean of both Kullback-Leibler divergences.
    """
    one, two = logits.log_softmax(dim=-1).chunk(2)
    return ((one.exp() - two.exp()) * (one - two)).sum(dim=-1) / 2
