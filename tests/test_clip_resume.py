"""clip_finetune.py on shards: exact resume with workers, the same result on any number of processes, FSDP2."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import CLIP, history, kill, launch, start, weights
from safetensors.torch import load_file
from test_resume import kill_and_resume, numbers, wait_for_step

# LoRA dropout and augmentation are on, windows are ragged, saves and evaluations fall on different steps.
FLAGS = (
    "--epochs", "5", "--effective_batch_size", "20", "--micro_batch_size", "6", "--num_workers", "2", "--eval_every",
    "7", "--save_every", "3", "--augmentation", "advanced", "--ema_decay", "0.99", "--lora_dropout", "0.2",
)  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_on_shards_ends_with_the_same_bytes(processes: int, clip_args, tmp_path: Path) -> None:
    args = [*clip_args, *FLAGS, "--run_name", "run"]
    reference = tmp_path / "reference"
    reference.mkdir()
    launch(CLIP, *args, cwd=reference, processes=processes)
    run = kill_and_resume(tmp_path, args, processes, kills=3, seed=10 + processes, script=CLIP)
    for folder in ("last", "best"):
        assert weights(run / folder) == weights(reference / "runs" / "run" / folder)
    assert numbers(run) == numbers(reference / "runs" / "run")


def test_asked_to_stop_it_saves_and_goes_on_with_another_number_of_processes(clip_args, tmp_path: Path) -> None:
    args = [*clip_args, *FLAGS, "--epochs", "3", "--run_name", "run"]
    run = tmp_path / "runs" / "run"
    process = start(CLIP, *args, cwd=tmp_path)
    wait_for_step(run, 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    launch(CLIP, *args, "--resume", cwd=tmp_path, processes=2)
    results = json.loads((run / "results.json").read_text())
    assert results["samples"] == 3 * 75
    assert results["test"]["count"] == 19


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_lets_it_save(number: int, clip_args, tmp_path: Path) -> None:
    """As `timeout`, Slurm and Ctrl-C send it: to the workers too, who must not die of it before the run has saved."""
    args = [*clip_args, *FLAGS, "--epochs", "30", "--run_name", "run"]
    run = tmp_path / "runs" / "run"
    process = start(CLIP, *args, cwd=tmp_path)
    wait_for_step(run, 9, process)
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == 128 + number
    assert "the same command with --resume goes on" in (tmp_path / "stdout.txt").read_text()
    assert not (tmp_path / "stderr.txt").read_text()


@pytest.fixture(scope="module", params=["full", "dual_lora", "vision_lora", "text_lora", "linear_probe"])
def three_runs(request, clip_args, tmp_path_factory) -> tuple[str, dict[str, Path]]:
    """The same training three times, without dropout; the learning rate is small, so that rounding stays small."""
    folder = tmp_path_factory.mktemp("clip_parallel")
    flags = [*clip_args, "--scenario", request.param, "--lora_dropout", "0", "--lr", "3e-4", "--epochs", "1"]
    flags += ["--class_field", "kind", "--wise_ft", "0.5", "--ema_decay", "0.9", "--eval_every", "2"]
    launch(CLIP, *flags, "--run_name", "one", cwd=folder)
    launch(CLIP, *flags, "--micro_batch_size", "7", "--run_name", "ddp", cwd=folder, processes=2)
    launch(CLIP, *flags, "--micro_batch_size", "7", "--run_name", "fsdp", cwd=folder, processes=2, fsdp=True)
    return request.param, {name: folder / "runs" / name for name in ("one", "ddp", "fsdp")}


def test_one_process_ddp_and_fsdp_agree(three_runs: tuple[str, dict[str, Path]]) -> None:
    from transformers import CLIPModel

    scenario, runs = three_runs
    reference = history(runs["one"], "train")
    trained = load_file(runs["one"] / "last" / "model.safetensors")
    expected = json.loads((runs["one"] / "results.json").read_text())
    assert len(reference) == 4
    for name in ("ddp", "fsdp"):
        for one, other in zip(reference, history(runs[name], "train"), strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4), (name, one["step"])
        results = json.loads((runs[name] / "results.json").read_text())
        assert results["test"]["count"] == 19
        for split in ("validation", "test"):
            assert results[split]["loss"] == pytest.approx(expected[split]["loss"], rel=1e-3)
            assert results["base"][split]["recall_mean"] == expected["base"][split]["recall_mean"]
        found = load_file(runs[name] / "last" / "model.safetensors")
        assert found.keys() == trained.keys()
        for key, tensor in trained.items():
            if "k_proj.bias" not in key:
                assert torch.allclose(found[key], tensor, atol=1e-3), (name, key)
        for folder in ("best", "wise_ft"):
            model, report = CLIPModel.from_pretrained(runs[name] / folder, output_loading_info=True)
            assert not report["missing_keys"]
            assert not report["unexpected_keys"]
            assert model.logit_scale.shape == ()
        if "lora" in scenario:
            adapter = load_file(runs[name] / "best" / "adapter" / "adapter_model.safetensors")
            towers = 2 if scenario == "dual_lora" else 1
            assert sum("lora_B" in key for key in adapter) == 4 * towers  # no rank's part is missing
            assert all(tensor.abs().max() > 0 for tensor in adapter.values())


def test_half_precision_is_the_same_under_fsdp(clip_args, tmp_path: Path) -> None:
    """The temperature and the sums of gradients stay in full precision."""
    flags = [
        *clip_args,
        "--scenario",
        "full",
        "--amp",
        "bf16",
        "--micro_batch_size",
        "7",
        "--epochs",
        "1",
        "--lr",
        "3e-4",
    ]
    launch(CLIP, *flags, "--run_name", "ddp", cwd=tmp_path, processes=2)
    launch(CLIP, *flags, "--run_name", "fsdp", cwd=tmp_path, processes=2, fsdp=True)
    ddp, fsdp = (history(tmp_path / "runs" / name, "train") for name in ("ddp", "fsdp"))
    for one, other in zip(ddp, fsdp, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-3)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-2)
    scales = [row["logit_scale"] for name in ("ddp", "fsdp") for row in history(tmp_path / "runs" / name, "validation")]
    assert scales[0] == pytest.approx(scales[1], rel=1e-4)


def test_fsdp_resumes_exactly_and_hands_over(clip_args, tmp_path: Path) -> None:
    flags = [*clip_args, *FLAGS, "--scenario", "full"]
    launch(CLIP, *flags, "--run_name", "whole", cwd=tmp_path, processes=2, fsdp=True)
    process = start(CLIP, *flags, "--run_name", "killed", cwd=tmp_path, processes=2, fsdp=True)
    run = tmp_path / "runs" / "killed"
    wait_for_step(run, 8, process)
    kill(process)
    launch(CLIP, *flags, "--run_name", "killed", "--resume", cwd=tmp_path, processes=2, fsdp=True)
    assert weights(run / "last") == weights(tmp_path / "runs" / "whole" / "last")
    launch(CLIP, *flags, "--run_name", "killed", "--resume", "--epochs", "6", cwd=tmp_path)
    assert json.loads((run / "results.json").read_text())["samples"] == 6 * 75


def test_more_processes_and_workers_than_shards_and_zero_shot(clip_args, pair_set: Path, tmp_path: Path) -> None:
    one = str(pair_set / "validation")  # one shard of 23 pairs
    flags = [*clip_args, "--train_data", one, "--num_workers", "3", "--max_steps", "2"]
    launch(CLIP, *flags, "--run_name", "one", cwd=tmp_path, processes=2)
    assert json.loads((tmp_path / "runs" / "one" / "results.json").read_text())["samples"] == 23 + 24 - 1
    for fsdp in (False, True):
        name = f"zero{fsdp}"
        flags = [*clip_args, "--scenario", "zero_shot", "--run_name", name]
        launch(CLIP, *flags, cwd=tmp_path, processes=2, fsdp=fsdp)
        assert json.loads((tmp_path / "runs" / name / "results.json").read_text())["test"]["count"] == 19
