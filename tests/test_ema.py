"""The average of weights: its ramp, and what is exchanged while the average is looked at."""

from __future__ import annotations

import pytest
import torch

from accelerando.train.averages import Ema, averaged


def one_weight(value: float) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(torch.tensor([value], dtype=torch.float64))
    return weight, torch.optim.SGD([weight], lr=1.0)


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_the_decay_is_ramped_up(decay: float) -> None:
    """average <- d average + (1 - d) weight with d = min(decay, (1 + n) / (10 + n)) after step n."""
    weight, optimizer = one_weight(0.0)
    ema, expected = Ema(optimizer, decay), 0.0
    for step in range(1, 200):
        with torch.no_grad():
            weight.fill_(float(step % 7))
        ema.update()
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * (step % 7)
        assert ema.averages[0].item() == pytest.approx(expected, rel=1e-9)


def test_the_first_weights_are_soon_forgotten() -> None:
    """After 50 steps at a decay of 0.999 hardly anything of the start is left; without the ramp 95 % would be."""
    weight, optimizer = one_weight(1.0)
    ema = Ema(optimizer, 0.999)
    with torch.no_grad():
        weight.zero_()
    for _ in range(50):
        ema.update()
    assert 0 < ema.averages[0].item() < 1e-6


def test_inside_averaged_the_model_has_the_averages_and_afterwards_its_own() -> None:
    weight, optimizer = one_weight(1.0)
    ema = Ema(optimizer, 0.5)
    with torch.no_grad():
        weight.fill_(5.0)
    with averaged(ema):
        assert (weight.item(), ema.averages[0].item()) == (1.0, 5.0)
    assert (weight.item(), ema.averages[0].item()) == (5.0, 1.0)
    off = Ema(optimizer, None)
    off.update()
    with averaged(off):
        assert weight.item() == 5.0 and not off.averages


def test_a_resumed_run_goes_on_with_its_ramp() -> None:
    weight, optimizer = one_weight(0.0)
    ema = Ema(optimizer, 0.9999)
    ema.steps = 89  # of before
    with torch.no_grad():
        weight.fill_(1.0)
    ema.update()
    assert ema.averages[0].item() == pytest.approx(1 - 91 / 100)
