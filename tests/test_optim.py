"""Schedules against their formulas, groups, optimizers, and their state through JSON."""

from __future__ import annotations

import json
import math

import pytest
import torch

from accelerando.base.errors import UserError
from accelerando.train.optim import make_optimizer, make_scheduler, parameter_groups


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.LayerNorm(128), torch.nn.Linear(128, 4))


def rates(name: str, total: int, warmup: float = 0.0, values: list[float] | None = None) -> list[float]:
    optimizer = torch.optim.SGD(net().parameters(), lr=1.0)
    schedule = make_scheduler(optimizer, name, total, warmup)
    seen = []
    for step in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        if values:
            schedule.evaluated(values[step])
    return seen


def test_linear_and_cosine_follow_their_formulas() -> None:
    assert rates("linear", 10, 2) == pytest.approx([0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    expected = [0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert rates("cosine", 10) == pytest.approx(expected)
    assert rates("constant", 5, 2) == pytest.approx([0, 0.5, 1, 1, 1])
    assert rates("polynomial", 4) == pytest.approx([1, 0.75, 0.5, 0.25], abs=1e-6)


def test_warmup_below_one_is_a_share() -> None:
    assert rates("linear", 20, 0.25) == rates("linear", 20, 5)


def test_onecycle_rises_then_falls_to_nothing() -> None:
    seen = rates("onecycle", 40, 10)
    assert max(seen) == pytest.approx(1.0, abs=0.02)
    assert seen.index(max(seen)) in (9, 10)
    assert seen[0] == pytest.approx(1 / 25)
    assert seen[-1] < 0.01


def test_plateau_falls_after_patience_and_not_before() -> None:
    improving = rates("plateau", 8, values=[1, 2, 3, 4, 5, 6, 7, 8])
    assert set(improving) == {1.0}
    flat = rates("plateau", 9, values=[1.0] * 9)
    assert flat[:4] == [1.0] * 4
    assert flat[4] == 0.5
    warm = rates("plateau", 6, warmup=3, values=[1.0] * 6)
    assert warm[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "polynomial", "onecycle", "plateau"])
def test_a_schedule_goes_on_from_json(name: str) -> None:
    values = [1.0, 2.0, 1.5, 1.5, 1.5, 1.5, 1.5, 3.0, 1.0, 1.0, 1.0, 1.0]
    whole = rates(name, 12, 3, values)
    first = torch.optim.SGD(net().parameters(), lr=1.0)
    schedule = make_scheduler(first, name, 12, 3)
    for step in range(5):
        first.step()
        schedule.step()
        schedule.evaluated(values[step])
    kept = json.loads(json.dumps([schedule.state_dict(), first.param_groups[0]["lr"]]))
    second = torch.optim.SGD(net().parameters(), lr=1.0)
    again = make_scheduler(second, name, 12, 3)
    for group in second.param_groups:
        group["lr"] = kept[1]  # as the optimizer's own state does
    again.load_state_dict(kept[0])
    rest = []
    for step in range(5, 12):
        rest.append(second.param_groups[0]["lr"])
        second.step()
        again.step()
        again.evaluated(values[step])
    assert rest == whole[5:]


def test_vectors_do_not_decay() -> None:
    groups = parameter_groups(net(), 1e-3, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(parameter.ndim == 2 for parameter in groups[0]["params"])
    assert sum(len(group["params"]) for group in groups) == 6


@pytest.mark.parametrize("name", ["adamw", "sgd", "adamw8bit", "lion8bit", "paged_adamw", "paged_adamw8bit"])
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    model = net()
    optimizer = make_optimizer(model, name, 0.1 if name == "sgd" else 3e-3, 0.0)
    inputs, targets = torch.randn(64, 64), torch.randint(0, 4, (64,))
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_eight_bit_states_are_eight_bit() -> None:
    model = net()
    optimizer = make_optimizer(model, "adamw8bit", 1e-3, 0.0)
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    kinds = {parameter.numel() >= 4096: state["state1"].dtype for parameter, state in optimizer.state.items()}
    assert kinds == {True: torch.uint8, False: torch.float32}


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match="sharded"):
        make_optimizer(net(), "adamw8bit", 1e-3, 0.0, sharded=True)
    frozen = net().requires_grad_(False)
    with pytest.raises(UserError, match="no parameter is trainable"):
        make_optimizer(frozen, "adamw", 1e-3, 0.0)
