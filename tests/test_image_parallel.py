"""image_classify.py on real ranks: exact resume, and the same result on one process, with DDP and with FSDP2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import IMAGE, history, launch, weights
from safetensors.torch import load_file
from test_resume import kill_and_resume, numbers

# A net with batch norms, augmentation and mixing on, windows ragged, saves and evaluations at different steps.
FLAGS = (
    "--epochs", "5", "--batch_size", "5", "--gradient_accumulation_steps", "2", "--eval_every", "7", "--save_every", "3",
    "--ema_decay", "0.9", "--augmentation", "randaugment", "--erasing", "0.3", "--mixup", "0.2", "--cutmix", "1",
    "--progressive_sizes", "24", "--balanced",
)  # fmt: skip


GRADUAL = ("--strategy", "gradual", "--layer_decay", "0.8")  # what is trained changes from epoch to epoch


@pytest.mark.parametrize(("processes", "workers", "more"), [(1, 2, ()), (2, 0, GRADUAL)])
def test_killed_and_resumed_ends_with_the_same_bytes(
    processes: int, workers: int, more: tuple[str, ...], image_args, tmp_path: Path
) -> None:
    args = [*image_args, *FLAGS, *more, "--num_workers", str(workers), "--run_name", "run"]
    reference = tmp_path / "reference"
    reference.mkdir()
    launch(IMAGE, *args, cwd=reference, processes=processes)
    run = kill_and_resume(tmp_path, args, processes, kills=3, seed=30 + processes, script=IMAGE)
    for folder in ("last", "best"):
        assert weights(run / folder) == weights(reference / "runs" / "run" / folder)
    assert numbers(run) == numbers(reference / "runs" / "run")


def test_one_process_ddp_and_fsdp_agree(image_args, tiny_vit: Path, image_set: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    flags = [*image_args, "--model_name", str(tiny_vit), "--lr", "1e-3", "--mixup", "0.3", "--eval_batch_size", "5"]
    launch(IMAGE, *flags, "--batch_size", "24", "--run_name", "one", cwd=tmp_path)
    two = ("--batch_size", "6", "--gradient_accumulation_steps", "2")
    launch(IMAGE, *flags, *two, "--run_name", "ddp", cwd=tmp_path, processes=2)
    launch(IMAGE, *flags, *two, "--run_name", "fsdp", cwd=tmp_path, processes=2, fsdp=True)
    one = tmp_path / "runs" / "one"
    trained, expected = load_file(one / "last" / "model.safetensors"), json.loads((one / "results.json").read_text())
    reference = history(one, "train")
    assert len(reference) >= 4
    for name in ("ddp", "fsdp"):
        run = tmp_path / "runs" / name
        for first, second in zip(reference, history(run, "train"), strict=True):
            assert second["loss"] == pytest.approx(first["loss"], rel=1e-4), (name, first["step"])
        results = json.loads((run / "results.json").read_text())
        for split in ("validation", "test"):
            assert results[split]["count"] == expected[split]["count"]
            assert results[split]["loss"] == pytest.approx(expected[split]["loss"], rel=1e-3)
        assert 'class="pair"' in (run / "report.html").read_text()  # what the net looked at
        found = load_file(run / "last" / "model.safetensors")
        assert found.keys() == trained.keys()
        for key, tensor in trained.items():
            if "key.bias" not in key and "k_proj.bias" not in key:
                assert torch.allclose(found[key], tensor, atol=1e-3), (name, key)
        model, report = AutoModelForImageClassification.from_pretrained(run / "best", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert model.config.num_labels == 3


def test_batch_norms_under_ddp_count_every_picture_once(image_args, image_set: Path, tmp_path: Path) -> None:
    launch(IMAGE, *image_args, "--batch_size", "7", "--run_name", "run", cwd=tmp_path, processes=2)
    results = json.loads((tmp_path / "runs" / "run" / "results.json").read_text())
    for split, name in (("validation", "fold_0_val"), ("test", "test")):
        assert results[split]["count"] == len((image_set / "splits" / f"{name}.txt").read_text().splitlines())
