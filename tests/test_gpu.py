"""What only a GPU can show: the CPU's numbers on it, half precision, FSDP2, torch.compile, 8-bit states, exact resume.

Skipped where there is none. On one, the rest of the suite can be run on it too, but for several processes:

  ACCELERANDO_TEST_DEVICE=cuda python -m pytest tests -n 8
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from harness import CLIP, ENVIRONMENT, IMAGE, ROOT, SIGN, TEXT, history, weights
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


class Task(NamedTuple):
    """A script, the flags that train its small model, and those without which nothing is random."""

    script: Path
    flags: list[str]
    without_dropout: list[str]


@pytest.fixture(params=["text", "clip", "sign", "image"])
def task(request: pytest.FixtureRequest) -> Task:
    flags = request.getfixturevalue(f"{request.param}_args")
    return {
        "text": Task(TEXT, flags, ["--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0"]),
        "clip": Task(CLIP, [*flags, "--scenario", "full", "--augmentation", "none"], []),
        "sign": Task(SIGN, flags, ["--dropout", "0"]),
        "image": Task(IMAGE, flags, []),
    }[request.param]


def train(task: Task, folder: Path, name: str, *flags: str, config: str = "single_gpu") -> Path:
    """The run folder of a run under ``accelerate launch`` with one of our configs, on one process."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    command += ["--num_processes", "1", "--main_process_port", "0"] if config == "fsdp" else []
    command += [str(task.script), *task.flags, "--run_name", name, *flags]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    return folder / "runs" / name


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in history(run, "train")]


def validation_loss(run: Path) -> float:
    return history(run, "validation")[-1]["loss"]


def test_sharded_training_gives_the_same_curve_and_goes_on(task: Task, tmp_path: Path) -> None:
    flags = ("--max_steps", "4", "--save_every", "2", "--keep_checkpoints", "5", *task.without_dropout)
    whole = train(task, tmp_path, "whole", "--amp", "bf16", *flags)
    sharded = train(task, tmp_path, "sharded", "--amp", "bf16", *flags, config="fsdp")
    assert "FSDP" in (sharded / "logs" / "train.log").read_text()
    assert losses(sharded) == pytest.approx(losses(whole), rel=0.02)
    assert (
        load_file(sharded / "best" / "model.safetensors").keys()
        == load_file(whole / "best" / "model.safetensors").keys()
    )
    curve = losses(sharded)
    step = str(sharded / "checkpoints" / "step_000002")
    again = train(task, tmp_path, "sharded", "--amp", "bf16", *flags, "--resume", step, config="fsdp")
    assert losses(again) == pytest.approx(curve, rel=1e-3)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_learns_as_float32_does(task: Task, amp: str, tmp_path: Path) -> None:
    flags = ("--max_steps", "4", *task.without_dropout)
    full, half = (train(task, tmp_path, name, "--amp", name, *flags) for name in ("no", amp))
    assert losses(half) == pytest.approx(losses(full), rel=0.05)
    assert losses(half) != losses(full)


def test_a_compiled_model_trains_alike(task: Task, tmp_path: Path) -> None:
    flags = ("--amp", "no", "--max_steps", "3", *task.without_dropout)
    plain, compiled = (
        train(task, tmp_path, "plain", *flags),
        train(task, tmp_path, "compiled", "--compile_model", *flags),
    )
    assert losses(compiled) == pytest.approx(losses(plain), rel=5e-3)
    names = load_file(compiled / "best" / "model.safetensors").keys()
    assert names == load_file(plain / "best" / "model.safetensors").keys()


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit", "lion8bit"])
def test_8_bit_states_are_bytes_and_go_on(task: Task, optimizer: str, tmp_path: Path) -> None:
    flags = ("--optimizer", optimizer, "--lr", "3e-4", "--max_steps", "4", "--save_every", "2", "--deterministic")
    flags += ("--keep_checkpoints", "5")
    run = train(task, tmp_path, "a", "--amp", "bf16", *flags)
    saved = load_file(run / "checkpoints" / "step_000004" / "optimizer.safetensors")
    states = [state for name, state in saved.items() if name.endswith("/state1")]
    assert states and all((state.dtype == torch.uint8) == (state.numel() >= 4096) for state in states)
    curve, unbroken = losses(run), weights(run / "last")
    again = train(task, tmp_path, "a", "--amp", "bf16", *flags, "--resume", str(run / "checkpoints" / "step_000002"))
    assert losses(again) == curve and weights(again / "last") == unbroken


@pytest.mark.parametrize("amp", ["no", "bf16", "fp16"])
def test_a_run_that_goes_on_ends_with_the_same_bytes(task: Task, amp: str, tmp_path: Path) -> None:
    flags = ("--amp", amp, "--max_steps", "6", "--save_every", "3", "--keep_checkpoints", "5", "--deterministic")
    run = train(task, tmp_path, "a", *flags)
    unbroken, curve = weights(run / "last"), losses(run)
    assert all(map(math.isfinite, curve))
    again = train(task, tmp_path, "a", *flags, "--resume", str(run / "checkpoints" / "step_000003"))
    assert losses(again) == curve
    assert weights(again / "last") == unbroken
    scaler = json.loads((run / "checkpoints" / "step_000006" / "state.json").read_text())["scaler"]
    assert bool(scaler) == (amp == "fp16")


def test_the_gpu_gives_what_the_cpu_gives(task: Task, tmp_path: Path) -> None:
    flags = ("--amp", "no", "--max_steps", "4", *task.without_dropout)
    cpu = train(task, tmp_path, "cpu", *flags, config="cpu")
    gpu = train(task, tmp_path, "gpu", *flags)
    assert "cuda" not in (cpu / "logs" / "train.log").read_text().lower()
    assert torch.cuda.get_device_name() in (gpu / "logs" / "train.log").read_text()
    assert losses(gpu) == pytest.approx(losses(cpu), rel=5e-3)
    assert validation_loss(gpu) == pytest.approx(validation_loss(cpu), rel=5e-3)
    assert history(gpu, "validation")[-1]["gpu_allocated_mb"] > 0


def test_private_training_on_a_gpu_adds_the_noise_of_the_cpu(
    image_args: list[str], tiny_vit: Path, tmp_path: Path
) -> None:
    task = Task(IMAGE, [*image_args, "--model_name", str(tiny_vit)], [])
    flags = ("--trainer_type", "dp", "--noise_multiplier", "1", "--noise_seed", "3", "--max_steps", "3")
    cpu, gpu = (train(task, tmp_path, config, *flags, config=config) for config in ("cpu", "single_gpu"))
    assert losses(gpu) == pytest.approx(losses(cpu), rel=5e-3)
    assert [row["epsilon"] for row in history(gpu, "validation")] == [
        row["epsilon"] for row in history(cpu, "validation")
    ]


def test_the_largest_batch_is_found(clip_args: list[str], tmp_path: Path) -> None:
    task = Task(CLIP, [*clip_args, "--scenario", "full"], [])
    run = train(task, tmp_path, "a", "--micro_batch_size", "0", "--max_steps", "1")
    assert "Micro-batch size 16" in (run / "logs" / "train.log").read_text()  # of 24 pairs
