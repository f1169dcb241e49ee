"""clip_finetune.py on two processes: half precision under FSDP2, few shards for many readers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import CLIP, history, launch


@pytest.mark.launch
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


@pytest.mark.launch
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
