"""Dropout that a CPU computes four times faster: 16 random bits for each element instead of a random number."""

from __future__ import annotations

import torch


class CpuDropout(torch.nn.Module):
    """Drops each element with probability ``p``, to within 1/65536, and scales the rest by 1 / (1 - p).

    Srivastava et al. 2014. Draws from torch's global random state, as ``torch.nn.Dropout`` does.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return inputs
        # bernoulli_ draws a double an element; random_ fills 64 bits, which are four elements, in one call.
        words = torch.empty(-(-inputs.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: inputs.numel()].view(inputs.shape)
        mask = (bits >= round(self.p * 65536) - 32768).to(inputs.dtype).mul_(1 / (1 - self.p))
        return inputs * mask

    def extra_repr(self) -> str:
        return f"p={self.p}"


def speed_up_dropout(model: torch.nn.Module) -> None:
    """Replaces the ``torch.nn.Dropout`` modules of a model that is trained on the CPU, in place."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Dropout and child.p < 1:
                setattr(parent, name, CpuDropout(child.p).train(child.training))
