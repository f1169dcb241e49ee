"""The CPU's dropout drops and scales as it should, from torch's own random state."""

import pytest
import torch

from accelerando.models.cpu import cpu_dropout_class, speed_up_dropout

CpuDropout = cpu_dropout_class()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.93])
@pytest.mark.parametrize("shape", [(1001, 997), (3,), (1,), (64, 12, 41, 41)])
def test_share_scale_and_gradient(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = torch.ones(shape, requires_grad=True)
    out = CpuDropout(p)(inputs)
    kept = out[out != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - p)))
    if out.numel() > 100_000:
        assert (out == 0).float().mean().item() == pytest.approx(p, abs=0.003)
        halves = (out == 0).flatten()[: out.numel() // 2 * 2].view(-1, 2).float()
        assert torch.corrcoef(halves.T)[0, 1].abs() < 0.01 or p == 0  # neighbours are independent
    out.sum().backward()
    assert torch.equal(inputs.grad, out.detach())


def test_the_same_state_gives_the_same_mask_and_evaluation_none() -> None:
    drop, inputs = CpuDropout(0.3), torch.randn(50, 50)
    state = torch.get_rng_state()
    first = drop(inputs)
    assert not torch.equal(first, drop(inputs))
    torch.set_rng_state(state)
    assert torch.equal(first, drop(inputs))
    assert drop.eval()(inputs) is inputs


def test_modules_are_replaced_in_place() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Dropout(0.2)), torch.nn.Dropout(0.4)
    )
    keys = list(model.state_dict())
    speed_up_dropout(model)
    assert [module.p for module in model.modules() if isinstance(module, CpuDropout)] == [0.2, 0.4]
    assert list(model.state_dict()) == keys
