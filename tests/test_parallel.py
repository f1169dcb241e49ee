"""Invariants 3, 6 and 8 on real ranks: one process, two with DDP, two with FSDP2, under torchrun on gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TEXT, history, kill, launch, start, weights
from safetensors.torch import load_file
from test_resume import wait_for_step

NO_DROPOUT = ("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0", "--lora_dropout", "0")
KINDS = {
    "full": ("--warmup_steps", "3", "--ema_decay", "0.9", "--eval_every", "4"),
    "lora": ("--strategy", "lora", "--lora_r", "4"),
    "cnn": ("--architecture", "cnn", "--embed_size", "16", "--num_filters", "8", "--dropout_prob", "0",
            "--vocab_size", "300"),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(KINDS))
def three_runs(request, text_args, tmp_path_factory) -> dict[str, Path]:
    """The same training three times: global batch 24, the last window of each epoch ragged."""
    folder = tmp_path_factory.mktemp("parallel")
    flags = [*text_args, *NO_DROPOUT, *KINDS[request.param], "--eval_batch_size", "5"]
    launch(TEXT, *flags, "--batch_size", "24", "--run_name", "one", cwd=folder)
    two = ("--batch_size", "6", "--gradient_accumulation_steps", "2")
    launch(TEXT, *flags, *two, "--run_name", "ddp", cwd=folder, processes=2)
    launch(TEXT, *flags, *two, "--run_name", "fsdp", cwd=folder, processes=2, fsdp=True)
    return {name: folder / "runs" / name for name in ("one", "ddp", "fsdp")}


def test_the_same_curve_the_same_counts_and_the_same_model(three_runs: dict[str, Path]) -> None:
    reference = history(three_runs["one"], "train")
    expected = json.loads((three_runs["one"] / "results.json").read_text())
    trained = load_file(three_runs["one"] / "last" / "model.safetensors")
    assert len(reference) == 18
    for name in ("ddp", "fsdp"):
        for one, other in zip(reference, history(three_runs[name], "train"), strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4), (name, one["step"])
            assert other["lr"] == one["lr"]
        results = json.loads((three_runs[name] / "results.json").read_text())
        assert results["num_processes"] == 2
        for split, count in (("validation", 61), ("test", 67)):
            assert results[split]["count"] == count
            assert results[split]["loss"] == pytest.approx(expected[split]["loss"], rel=1e-3)
        found = load_file(three_runs[name] / "last" / "model.safetensors")
        assert found.keys() == trained.keys()
        for key, tensor in trained.items():
            assert torch.allclose(found[key], tensor, atol=2e-3), key


def test_what_was_saved_opens_with_from_pretrained(three_runs: dict[str, Path]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import accelerando.models.text_cnn  # noqa: F401  (registers the CNN)

    for run in three_runs.values():
        model, report = AutoModelForSequenceClassification.from_pretrained(run / "best", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        tokens = AutoTokenizer.from_pretrained(run / "best")(["goal match", "a"], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model.eval()(**tokens).logits
            assert logits.shape == (2, 3)
            if (run / "best" / "adapter").is_dir():
                from peft import PeftModel

                source = json.loads((run / "results.json").read_text())["config"]["model"]["model_name"]
                base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
                adapted = PeftModel.from_pretrained(base, run / "best" / "adapter").eval()
                assert torch.allclose(adapted(**tokens).logits, logits, atol=1e-5)
                files = load_file(run / "best" / "adapter" / "adapter_model.safetensors")
                assert sum("lora_A" in key for key in files) == 4  # no rank's part is missing
                assert any(tensor.abs().max() > 0 for key, tensor in files.items() if "lora_B" in key)


def test_fsdp_resumes_exactly_and_hands_over_to_one_process(text_args, tmp_path: Path) -> None:
    flags = [*text_args, "--batch_size", "12", "--save_every", "3", "--epochs", "3"]
    launch(TEXT, *flags, "--run_name", "whole", cwd=tmp_path, processes=2, fsdp=True)
    process = start(TEXT, *flags, "--run_name", "killed", cwd=tmp_path, processes=2, fsdp=True)
    run = tmp_path / "runs" / "killed"
    wait_for_step(run, 8, process)
    kill(process, signal.SIGKILL)
    launch(TEXT, *flags, "--run_name", "killed", "--resume", cwd=tmp_path, processes=2, fsdp=True)
    assert weights(run / "last") == weights(tmp_path / "runs" / "whole" / "last")
    # The same checkpoint, on one process that shards nothing: one more epoch.
    launch(TEXT, *flags, "--run_name", "killed", "--resume", "--epochs", "4", cwd=tmp_path)
    assert json.loads((run / "results.json").read_text())["samples"] == 4 * 203


def test_one_of_several_processes_ends_without_tearing_the_interpreter_down() -> None:
    """A thread of gloo that wants the interpreter while it is torn down would abort a run that went well."""
    code = """
import atexit
from accelerando.base.errors import UserError, errors_in_one_line
class Late:
    def __del__(self): print("torn down")
late = Late()
atexit.register(print, "exit handler")
with errors_in_one_line():
    print("work")
    if {fails}: raise UserError("a reason")
"""
    for world, fails, exit_code in (("1", False, 0), ("2", False, 0), ("1", True, 2), ("2", True, 2)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(fails=fails)],
            env={**os.environ, "WORLD_SIZE": world, "RANK": "0"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == exit_code, done.stderr
        assert done.stdout.split("\n")[:2] == ["work", "exit handler"]
        assert ("torn down" in done.stdout) is (world == "1")
        assert ("error: a reason" in done.stderr) is fails


def test_eight_bit_optimizers_are_refused_under_fsdp(text_args, tmp_path: Path) -> None:
    done = launch(TEXT, *text_args, "--optimizer", "adamw8bit", cwd=tmp_path, processes=2, fsdp=True, check=False)
    assert "error: --optimizer adamw8bit does not know sharded parameters (FSDP)" in done.err
    assert done.code != 0


def test_compiled_and_sharded(text_args, tmp_path: Path) -> None:
    """torch.compile wraps the sharded root: saving, evaluating and resuming still find the plain model."""
    flags = [*text_args, "--compile_model", "--batch_size", "12", "--max_steps", "4", "--eval_every", "2"]
    launch(TEXT, *flags, "--run_name", "run", "--save_every", "2", cwd=tmp_path, processes=2, fsdp=True)
    run = tmp_path / "runs" / "run"
    assert not [key for key in load_file(run / "last" / "model.safetensors") if "_orig_mod" in key]
    rest = ("--resume", str(run / "checkpoints" / "step_000002"))
    kept = weights(run / "last")
    launch(TEXT, *flags, *rest, cwd=tmp_path, processes=2, fsdp=True)
    assert weights(run / "last") == kept
