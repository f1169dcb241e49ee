"""sign_train.py on real ranks: exact resume, and the same result on one process, with DDP and with FSDP2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SIGN, history, launch, weights
from safetensors.torch import load_file
from test_resume import kill_and_resume, numbers

# Dropout and augmentation are on, windows are ragged, saves and evaluations fall on different steps.
FLAGS = (
    "--epochs", "6", "--batch_size", "5", "--gradient_accumulation_steps", "2", "--eval_every", "7", "--save_every", "3",
    "--ema_decay", "0.99", "--dropout", "0.2", "--rotation", "10", "--time_warp", "0.2", "--mirror", "0.5", "--balanced",
    "--noise", "0.02", "--curriculum", "dynamic", "--learned_weights", "--scheduler", "warmup_cosine",
)  # fmt: skip
KINDS = {
    "transformer": ("--velocities", "--use_mask", "--learned_weights", "--conv_kernel", "3"),
    "iv3_gru": ("--model", "iv3_gru"),
}


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0)])
def test_killed_and_resumed_ends_with_the_same_bytes(processes: int, workers: int, sign_args, tmp_path: Path) -> None:
    args = [*sign_args, *FLAGS, "--num_workers", str(workers), "--run_name", "run"]
    reference = tmp_path / "reference"
    reference.mkdir()
    launch(SIGN, *args, cwd=reference, processes=processes)
    run = kill_and_resume(tmp_path, args, processes, kills=3, seed=20 + processes, script=SIGN)
    for folder in ("last", "best"):
        assert weights(run / folder) == weights(reference / "runs" / "run" / folder)
    assert numbers(run) == numbers(reference / "runs" / "run")


@pytest.fixture(scope="module", params=list(KINDS))
def three_runs(request, sign_args, tmp_path_factory) -> dict[str, Path]:
    """The same training three times: global batch 24, the last window of each epoch ragged."""
    folder = tmp_path_factory.mktemp("sign_parallel")
    flags = [*sign_args, *KINDS[request.param], "--dropout", "0", "--lr", "1e-3", "--eval_batch_size", "5"]
    launch(SIGN, *flags, "--batch_size", "24", "--run_name", "one", cwd=folder)
    two = ("--batch_size", "6", "--gradient_accumulation_steps", "2")
    launch(SIGN, *flags, *two, "--run_name", "ddp", cwd=folder, processes=2)
    launch(SIGN, *flags, *two, "--run_name", "fsdp", cwd=folder, processes=2, fsdp=True)
    return {name: folder / "runs" / name for name in ("one", "ddp", "fsdp")}


def test_one_process_ddp_and_fsdp_agree(three_runs: dict[str, Path]) -> None:
    from transformers import AutoModel

    import accelerando.models.sign  # noqa: F401  (registers the models)

    reference = history(three_runs["one"], "train")
    trained = load_file(three_runs["one"] / "last" / "model.safetensors")
    expected = json.loads((three_runs["one"] / "results.json").read_text())
    assert len(reference) == 8
    for name in ("ddp", "fsdp"):
        for one, other in zip(reference, history(three_runs[name], "train"), strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4), (name, one["step"])
        results = json.loads((three_runs[name] / "results.json").read_text())
        assert results["num_processes"] == 2
        for split, count in (("validation", 23), ("test", 19)):
            assert results[split]["count"] == count
            assert results[split]["loss"] == pytest.approx(expected[split]["loss"], rel=1e-3)
        found = load_file(three_runs[name] / "last" / "model.safetensors")
        assert found.keys() == trained.keys()
        for key, tensor in trained.items():
            assert torch.allclose(found[key], tensor, atol=2e-3), (name, key)
        model, report = AutoModel.from_pretrained(three_runs[name] / "best", output_loading_info=True)
        assert not report["missing_keys"]
        with torch.no_grad():
            assert model.eval()(torch.zeros(1, 4, model.config.input_width)).gloss_logits.shape == (1, 6)
