"""Differential privacy: clipped gradients of single pictures, calibrated noise, the budget and its accounting."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import IMAGE, kill_and_resume, launch, weights
from safetensors.torch import load_file

from accelerando.base.errors import UserError
from accelerando.data.order import poisson_rows
from accelerando.models.vision import VisionNet, VisionNetConfig
from accelerando.train.batches import TrainBatches
from accelerando.train.privacy import clip_and_add, epsilon_of, make_valid, noise_for, start_privacy, steps_within
from accelerando.train.state import Run as TrainingRun
from accelerando.train.state import TrainState

NET = ("--trainer_type", "dp", "--noise_seed", "5")


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def started(model: torch.nn.Module, optimizer: torch.optim.Optimizer, bound: float, noise: float, seed: int | None):
    """Privacy for 10 steps of 4 out of 20 samples on average."""
    from accelerate import Accelerator

    run = TrainingRun(Path(), Accelerator(cpu=True), None, TrainState(), total_steps=10)
    batches = TrainBatches(range(20), list, 4)
    return start_privacy(run, model, optimizer, batches, bound, noise, seed, None, 1e-5)


def small_net(architecture: str = "resnet18") -> VisionNet:
    torch.manual_seed(0)
    return VisionNet(VisionNetConfig(architecture=architecture, num_labels=3, group_norm=True))


def recomputed(found: dict) -> float:
    """Epsilon from the logged steps and rates, by Opacus' accountant asked anew."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    for part in found["private"]:
        for _ in range(part["steps"]):
            accountant.step(noise_multiplier=part["noise_multiplier"], sample_rate=part["sample_rate"])
    return accountant.get_epsilon(found["delta"])


# ---------------------------------------------------------------------------------------------------------- numbers


def test_calibrated_noise_just_keeps_the_budget() -> None:
    for epsilon, rate, steps in ((3.0, 0.1, 90), (1.0, 0.02, 60)):
        noise = noise_for(epsilon, 1e-5, rate, steps)
        assert epsilon - 0.05 < epsilon_of([(noise, rate, steps)], 1e-5) <= epsilon
        assert epsilon_of([(0.95 * noise, rate, steps)], 1e-5) > epsilon
    with pytest.raises(UserError, match="is too small for"):
        noise_for(0.001, 1e-5, 0.9, 1000)


def test_the_last_step_is_the_same_from_wherever_it_is_asked() -> None:
    last, *others = (
        done + steps_within([[1.1, 0.1, done]] if done else [], 1.1, 0.1, 3.0, 1e-5, 60 - done) for done in (0, 1, 17)
    )
    assert others == [last, last]
    assert 17 < last < 60
    assert epsilon_of([(1.1, 0.1, last)], 1e-5) <= 3.0 < epsilon_of([(1.1, 0.1, last + 1)], 1e-5)
    assert steps_within([[1.1, 0.1, last]], 1.1, 0.1, 3.0, 1e-5, 50) == 0
    assert steps_within([[0.7, 0.1, 5]], 1.1, 0.1, 3.0, 1e-5, 60) < last - 5  # other noise before counts too


def test_steps_are_poisson_samples_and_the_same_on_any_number_of_processes() -> None:
    class Rows:
        def __len__(self) -> int:
            return 40

        def __getitem__(self, row: int) -> int:
            return row

    def collate(samples: list[int]) -> dict[str, torch.Tensor]:
        return {"value": torch.tensor(samples)}

    def windows(processes: int, rank: int, batch: int) -> list[list[int]]:
        batches = TrainBatches(
            Rows(), collate, batch, num_processes=processes, process_index=rank, poisson_seed=3, seed=1
        )
        found = []
        for epoch in range(60):
            positions = []
            for window in batches.windows(epoch):
                rows = [row for part in window for row in part["index"][part["weight"] > 0].tolist()]
                found.append(rows)
                positions.append(window.position)
                if processes == 1:
                    assert window.num_samples == len(rows) == len(set(rows))
            assert positions == [8, 16, 24, 32, 40]
        return found

    one = windows(1, 0, 8)
    two = [first + second for first, second in zip(windows(2, 0, 4), windows(2, 1, 4), strict=True)]
    assert [sorted(rows) for rows in one] == [sorted(rows) for rows in two]
    sizes = np.array([len(rows) for rows in one])
    assert sizes.mean() == pytest.approx(8, abs=0.6)  # 300 steps of Binomial(40, 0.2)
    assert sizes.var() == pytest.approx(6.4, rel=0.3)
    counts = np.bincount(np.concatenate([np.array(rows, int) for rows in one]), minlength=40)
    assert counts.min() > 30 and counts.max() < 95
    (empty,) = [list(window) for window in TrainBatches(Rows(), collate, 1, poisson_seed=0).windows(0)][:1]
    assert all(float(part["weight"].sum()) in (0.0, 1.0) for part in empty)


def test_a_step_of_another_size_draws_anew() -> None:
    """A run that goes on with another global batch must not meet the draws of steps before."""
    rows = {(size, at): set(poisson_rows(4000, size / 4000, 7, 0, at).tolist())
            for size, at in ((1000, 2000), (1000, 1000), (2000, 2000), (2000, 0))}  # fmt: skip
    assert len(rows[1000, 1000] & rows[2000, 2000]) == pytest.approx(500, abs=80)
    assert len(rows[1000, 2000] & rows[1000, 1000]) == pytest.approx(250, abs=60)


def gradient_by_hand(model: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor, bound: float) -> list:
    """The sum of each picture's gradient, clipped, one backward a picture."""
    parameters, sums = list(model.parameters()), None
    for row in range(len(pixels)):
        model.zero_grad()
        logits = model(pixel_values=pixels[row : row + 1]).logits
        torch.nn.functional.cross_entropy(logits, labels[row : row + 1]).backward()
        grads = [parameter.grad.clone() for parameter in parameters]
        norm = torch.sqrt(sum(grad.square().sum() for grad in grads))
        grads = [grad * min(1.0, bound / (norm + 1e-6)) for grad in grads]
        sums = grads if sums is None else [a + b for a, b in zip(sums, grads, strict=True)]
    return sums


@pytest.mark.parametrize("bound", [0.5, 1e6])
def test_a_step_is_the_mean_of_clipped_gradients(bound: float) -> None:
    """Over micro-batches of unequal size, pictures in any layout of memory, residual nets with in-place additions."""

    pixels = torch.randn(5, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.tensor([0, 1, 2, 1, 0])
    expected = gradient_by_hand(small_net(), pixels, labels, bound)
    model = small_net()
    make_valid(model, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    privacy = started(model, optimizer, bound, 0.0, 1)
    for rows in (slice(0, 2), slice(2, 5)):
        loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels[rows]).logits, labels[rows], reduction="sum")
        loss.backward()
        clip_and_add(privacy, last=rows.stop == 5)
    error = sum((p.grad - e / 4).square().sum() for p, e in zip(model.parameters(), expected, strict=True)) ** 0.5
    size = sum((e / 4).square().sum() for e in expected) ** 0.5
    assert error < 1e-3 * size
    if bound == 0.5:
        assert size <= 5 * bound / 4


def test_noise_has_the_deviation_that_was_asked_for() -> None:

    model = small_net("squeezenet1_1")
    make_valid(model, 48)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    privacy = started(model, optimizer, 0.5, 3.0, None)
    (model(pixel_values=torch.randn(1, 3, 48, 48)).logits.sum() * 0).backward()
    clip_and_add(privacy, last=True)
    noise = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert float(noise.std()) == pytest.approx(3.0 * 0.5 / 4, rel=0.01)
    assert 0 <= privacy.state.extra["noise_seed"] < 2**62

    def drawn(seed: int, step: int) -> torch.Tensor:
        privacy.state.extra["noise_seed"], privacy.state.step = seed, step
        privacy.optimizer.zero_grad()
        (model(pixel_values=torch.randn(1, 3, 48, 48)).logits.sum() * 0).backward()
        clip_and_add(privacy, last=True)
        return next(model.parameters()).grad.clone()

    assert torch.equal(drawn(5, 1), drawn(5, 1))
    assert not torch.equal(drawn(5, 1), drawn(5, 2))
    assert not torch.equal(drawn(5, 1), drawn(5 + 2**32, 1))


# ------------------------------------------------------------------------------------------------------------- nets


@pytest.mark.parametrize("architecture", ["convnext_tiny", "swin_t"])
def test_nets_that_opacus_does_not_know_are_one_line(architecture: str) -> None:
    with pytest.raises(UserError, match="Opacus cannot train this model") as error:
        make_valid(small_net(architecture), 32)
    assert "\n" not in str(error.value)


def test_wrong_gradients_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opacus takes a convolution's input as contiguous; without our copy its gradients are wrong without a word."""
    model = small_net().to(memory_format=torch.channels_last)
    monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", lambda *_: None)
    forward = model.forward
    model.forward = lambda pixel_values: forward(pixel_values.contiguous(memory_format=torch.channels_last))
    with pytest.raises(UserError, match="its per-sample gradients are wrong by"):
        make_valid(model, 32)


def test_batch_norms_are_replaced_and_take_the_factors_of_a_file(tmp_path: Path) -> None:
    from accelerando.models.vision import load_pretrained, make_net

    source = make_net("resnet18", 3)
    torch.nn.init.uniform_(source.layer1[0].bn1.weight)
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    model = small_net()
    assert not [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    load_pretrained(model, str(tmp_path / "resnet18.pth"))
    assert torch.equal(model.net.layer1[0].bn1.weight, source.layer1[0].bn1.weight)
    model.save_pretrained(tmp_path / "saved")
    opened = VisionNet.from_pretrained(tmp_path / "saved")
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(opened.eval()(pixels).logits, model.eval()(pixels).logits)


# ------------------------------------------------------------------------------------------------------------- runs


def test_the_budget_is_kept_and_each_gradient_is_clipped(image_here, tiny_vit, monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus.optimizers import DPOptimizer

    norms: list[float] = []
    clip = DPOptimizer.clip_and_accumulate

    def watched(self: DPOptimizer) -> None:
        """With micro-batches of one picture, what is added is that picture's clipped gradient."""
        before = [0 if parameter.summed_grad is None else parameter.summed_grad.clone() for parameter in self.params]
        clip(self)
        added = [parameter.summed_grad - old for parameter, old in zip(self.params, before, strict=True)]
        norms.append(float(sum(part.double().square().sum() for part in added) ** 0.5))

    monkeypatch.setattr(DPOptimizer, "clip_and_accumulate", watched)
    run = image_here(
        *NET, "--model_name", str(tiny_vit), "--target_epsilon", "3", "--grad_clip", "0.7", "--batch_size", "1",
        "--gradient_accumulation_steps", "8", "--epochs", "1", "--eval_every", "5",
    )  # fmt: skip
    found = results(run)
    assert len(norms) > 50
    assert 0.69 < max(norms) <= 0.7 + 1e-5
    assert found["epsilon"] == pytest.approx(recomputed(found), abs=1e-9)
    assert 2.9 < found["epsilon"] <= 3.0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    spent = [row["epsilon"] for row in rows if row["kind"] == "validation"]
    assert len(spent) == 2 and 0 < spent[0] < spent[1] == found["epsilon"]
    assert f"epsilon {found['epsilon']:.3f} at delta 1e-05" in (run / "summary.txt").read_text()
    assert "noise_seed: 5" in (run / "config.yaml").read_text()  # given, so it is no secret


def test_training_stops_where_the_budget_ends(image_here, tiny_vit) -> None:
    flags = (*NET, "--model_name", str(tiny_vit), "--noise_multiplier", "1.1", "--target_epsilon", "3")
    run = image_here(*flags, "--epochs", "30", "--batch_size", "8")
    found = results(run)
    assert found["epsilon"] <= 3.0
    (part,) = found["private"]
    assert found["steps"] == part["steps"] < 30 * 9
    assert epsilon_of([(part["noise_multiplier"], part["sample_rate"], part["steps"] + 1)], 1e-5) > 3.0
    before = weights(run / "last")
    again = image_here(*flags, "--epochs", "60", "--batch_size", "8", "--resume")  # nothing is left to spend
    assert weights(again / "last") == before
    assert results(again)["epsilon"] == found["epsilon"]


def test_noise_follows_its_seed_alone(image_here, tiny_vit) -> None:
    flags = ("--trainer_type", "dp", "--model_name", str(tiny_vit), "--noise_multiplier", "1", "--epochs", "1")
    runs = {name: weights(image_here(*flags, "--noise_seed", name[0], name=name) / "last") for name in ("1", "1b", "2")}
    assert runs["1"] == runs["1b"] != runs["2"]
    drawn = [weights(image_here(*flags, name=name) / "last") for name in ("a", "b")]
    assert drawn[0] != drawn[1]
    assert "noise_seed: null" in (Path("runs") / "a" / "config.yaml").read_text()


@pytest.mark.launch
def test_killed_and_resumed_it_has_spent_the_same(image_args, tiny_vit, tmp_path: Path) -> None:
    flags = [*image_args, *NET, "--model_name", str(tiny_vit), "--target_epsilon", "3", "--epochs", "6"]
    flags += ["--batch_size", "5", "--gradient_accumulation_steps", "2", "--save_every", "3", "--run_name", "run"]
    reference = tmp_path / "reference"
    reference.mkdir()
    launch(IMAGE, *flags, cwd=reference)
    run = kill_and_resume(tmp_path, IMAGE, flags, 1, kills=2, seed=3)
    unbroken = results(reference / "runs" / "run")
    assert results(run)["epsilon"] == unbroken["epsilon"] <= 3.0
    assert unbroken["epsilon"] == pytest.approx(recomputed(unbroken), abs=1e-9)
    assert results(run)["private"] == unbroken["private"]
    assert weights(run / "last") == weights(reference / "runs" / "run" / "last")


@pytest.mark.launch
def test_two_processes_train_as_one_does(image_args, tiny_vit, tmp_path: Path) -> None:
    flags = [*image_args, *NET, "--model_name", str(tiny_vit), "--noise_multiplier", "0.8", "--target_epsilon", "50"]
    launch(IMAGE, *flags, "--batch_size", "8", "--run_name", "one", cwd=tmp_path)
    launch(IMAGE, *flags, "--batch_size", "4", "--run_name", "two", cwd=tmp_path, processes=2)
    one, two = (load_file(tmp_path / "runs" / name / "last" / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=2e-3), name
    found = [results(tmp_path / "runs" / name) for name in ("one", "two")]
    assert found[0]["epsilon"] == found[1]["epsilon"]
    assert found[0]["test"]["loss"] == pytest.approx(found[1]["test"]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--mixup", "0.2"), "--mixup and --cutmix cannot go with"), (("--cutmix", "1"), "cannot go with"),
        (("--balanced",), "--balanced cannot go with"), (("--class_weights",), "--class_weights cannot go with"),
        (("--strategy", "gradual"), "full or head"), (("--amp", "bf16"), "float32"),
        (("--report_on_train",), "without noise"), (("--compile_model",), "not compiled"), (("--target_epsilon", "None"), "needs a budget"),
        (("--batch_size", "500"), "500 samples per step on average, but only 66"),
        (("--target_epsilon", "0.001"), "is too small for"),
        (("--noise_multiplier", "0.3", "--target_epsilon", "0.1"), "the first step would already spend more"),
        (("--model_name", "None", "--architecture", "vit_b_16", "--image_size", "224"), "MultiheadAttention"),
    ],
)  # fmt: skip
def test_what_cannot_go_with_privacy_is_one_line(flags, words: str, image_here, tiny_vit, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        image_here(*NET, "--model_name", str(tiny_vit), "--target_epsilon", "3", *flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.launch
def test_fsdp_is_refused(image_args, tiny_vit, tmp_path: Path) -> None:
    flags = [*image_args, *NET, "--model_name", str(tiny_vit), "--target_epsilon", "3"]
    done = launch(IMAGE, *flags, cwd=tmp_path, processes=2, fsdp=True, check=False)
    assert "error: --trainer_type dp needs whole parameters: launch without FSDP" in done.err
    assert done.code != 0
