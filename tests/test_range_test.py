"""The learning-rate range test: what it suggests, and that it leaves the run alone."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from harness import TEXT, launch, results
from tasks import Task, each

from accelerando.base.errors import Stopped, UserError
from accelerando.train.range_test import HIGHEST, LOWEST, STEPS, RangeTest, suggestion

FLAGS = ("--report_to", "none", "--epochs", "1")


def curve(steepest: float, least: float, noise: float, seed: int = 0) -> tuple[list[float], list[float]]:
    """Learning rates and losses that fall around ``steepest``, end at ``least`` and rise from there."""
    rates = np.geomspace(LOWEST, HIGHEST, STEPS)
    x, at, end = np.log10(rates), np.log10(steepest), np.log10(least)
    losses = 2 - 1 / (1 + np.exp(-(x - at) / 0.25)) + np.where(x > end, (x - end) ** 2, 0)
    return rates.tolist(), (losses + noise * np.random.default_rng(seed).normal(size=STEPS)).tolist()


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses_of(run: Path) -> np.ndarray:
    """The losses of a range test's file, [n]."""
    with open(run.with_name(run.name + "_find_lr") / "find_lr.csv") as file:
        return np.array([float(row["loss"]) for row in csv.DictReader(file)])


def test_the_steepest_fall_is_suggested() -> None:
    for steepest, least, noise in ((1e-4, 3e-3, 0.0), (1e-4, 3e-3, 0.05), (1e-2, 0.5, 0.02), (3e-6, 1e-4, 0.02)):
        found = suggestion(*curve(steepest, least, noise))
        assert steepest / 2 < found[0] < steepest * 2
        assert least / 3 < found[1] < least * 3


def test_noise_alone_suggests_nothing() -> None:
    rates = np.geomspace(LOWEST, HIGHEST, STEPS).tolist()
    random = np.random.default_rng(1)
    found = [suggestion(rates, (2 + 0.1 * random.normal(size=STEPS)).tolist()) for _ in range(100)]
    assert sum(each is not None for each in found) <= 10
    rising = np.linspace(1, 2, STEPS).tolist()
    assert suggestion(rates, rising) is None
    assert suggestion(rates[:5], rising[:5]) is None


def test_rates_grow_from_the_lowest_to_the_highest_and_keep_their_ratio() -> None:
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "initial_lr": 1e-3}, {"lr": 5e-5, "initial_lr": 1e-4}])
    test = RangeTest(optimizer, lr=1e-3)
    while not test.is_over:
        test.set_rate()
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(first / 10)
        test.add(1.0)
    assert len(test.rates) == STEPS
    assert test.rates[0] == LOWEST
    assert test.rates[-1] == pytest.approx(HIGHEST)
    with pytest.raises(UserError, match="--find_lr: --lr 0 "):
        RangeTest(optimizer, lr=0.0)


def test_it_ends_when_the_loss_explodes() -> None:
    for last in ([10.0] * 30, [float("nan")]):
        test = RangeTest(SimpleNamespace(param_groups=[{"lr": 1.0}]), lr=1.0)
        for loss in [2.0] * 20 + np.linspace(2, 1, 20).tolist() + last:
            if not test.is_over:
                test.set_rate()
                test.add(loss)
        assert test.exploded
        assert 40 < len(test.losses) < 60


@pytest.mark.parametrize("task", each("find_lr"))
def test_every_script_has_it_and_its_run_is_left_alone(task: Task, request, capsys) -> None:
    """Files of a finished run of the same name stay as they are; the test has a folder beside it."""
    here = request.getfixturevalue(task.here)
    run = here(*FLAGS, "--max_steps", "1")
    before = content(run)
    for _ in range(2 if task.name == "text" else 1):  # the second one replaces the first
        with pytest.raises(Stopped) as ended:
            here(*FLAGS, "--find_lr")
        assert ended.value.exit_code == 0
    said = capsys.readouterr().out
    assert "Plot: " in said
    assert "Suggested: --lr " in said or "No learning rate is suggested" in said
    assert content(run) == before
    folder = run.with_name(run.name + "_find_lr")
    assert (folder / "plots" / "find_lr.png").stat().st_size > 10_000
    assert not (folder / "best").exists()
    assert not any((folder / "checkpoints").iterdir())
    losses = losses_of(run)
    assert 10 < len(losses) <= STEPS
    assert np.isfinite(losses).all()


def test_what_it_suggests_for_a_text_classifier_learns(train_here, capsys) -> None:
    """From a learning rate that is far too low: the suggested one is better by far, and its loss is learnt."""
    low = ("--lr", "1e-7", "--epochs", "3", "--warmup_steps", "0")
    with pytest.raises(Stopped):
        train_here(*FLAGS, *low, "--find_lr")
    flag = next(line for line in capsys.readouterr().out.splitlines() if "Suggested" in line).split("--lr ")[1]
    accuracy = {}
    for rate in ("1e-7", flag.split()[0]):
        accuracy[rate] = results(train_here(*low, "--lr", rate, name=f"lr{rate}"))["test"]["accuracy"]
    assert accuracy[flag.split()[0]] > accuracy["1e-7"] + 0.2


@pytest.mark.launch
@pytest.mark.exhaustive
def test_two_processes_measure_what_one_does(text_args: list[str], tmp_path: Path) -> None:
    flags = ("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0", "--find_lr", *FLAGS)
    launch(TEXT, *text_args, *flags, "--batch_size", "12", "--run_name", "one", cwd=tmp_path)
    launch(TEXT, *text_args, *flags, "--batch_size", "3", "--gradient_accumulation_steps", "2", "--run_name", "two",
           cwd=tmp_path, processes=2)  # fmt: skip
    one, two = (losses_of(tmp_path / "runs" / name) for name in ("one", "two"))
    count = min(len(one), len(two), 50)  # beyond, the loss is chaotic
    assert one[:count] == pytest.approx(two[:count], abs=2e-3)
