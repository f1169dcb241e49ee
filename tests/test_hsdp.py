"""Four ranks as two machines with two GPUs each: parameters sharded within a machine, replicated between them (HSDP)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ENVIRONMENT, ROOT, history, kill, launch, numbers, results, start, wait_for_step, weights
from safetensors import safe_open
from safetensors.torch import load_file
from tasks import TASKS, Task

pytestmark = [pytest.mark.launch, pytest.mark.xdist_group("hsdp")]
RANKS = 4
# The batch of one process, on four; CLIP's contrastive loss gathers the embeddings of all of them.
PARTS = {"text": ("--batch_size", "3", "--gradient_accumulation_steps", "2"), "clip": ("--micro_batch_size", "4")}


@contextmanager
def mesh() -> Iterator[dict[str, Any]]:
    """How to launch them, with what the launcher makes of accelerate_configs/multi_node_hsdp.yaml for two machines."""
    sizes = {"DP_REPLICATE": 2, "DP_SHARD": 2, "TP": 1, "CP": 1, "SP": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        for name, size in sizes.items():
            patch.setitem(ENVIRONMENT, f"PARALLELISM_CONFIG_{name}_SIZE", str(size))
        yield {"processes": RANKS, "fsdp": True}


@pytest.mark.parametrize("task", [pytest.param(TASKS[name], id=name) for name in PARTS])
def test_it_trains_as_one_process_does(task: Task, request, tmp_path: Path) -> None:
    """The same curve and weights as of one process; shards of two ranks, and gradients that both copies share."""
    args = task.args(request, *task.exact, *task.kinds["full"], "--max_steps", "7")
    launch(task.script, *args, *task.whole, "--run_name", "one", cwd=tmp_path)
    (tmp_path / "gradients").mkdir()
    kept = (ROOT / "tests" / "window_gradients.py", tmp_path / "gradients", task.script)
    with mesh() as four:
        launch(*kept, *args, *PARTS[task.name], "--run_name", "mesh", cwd=tmp_path, **four)
    one, other = (tmp_path / "runs" / name for name in ("one", "mesh"))
    assert "2 copies sharded over 2 each" in (other / "logs" / "train.log").read_text()
    for expected, found in zip(history(one, "train"), history(other, "train"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    for split in task.held_out():
        assert results(other)[split]["count"] == task.counts[split]
        assert results(other)[split]["loss"] == pytest.approx(results(one)[split]["loss"], rel=1e-3)
    trained, last = (load_file(run / "last" / "model.safetensors") for run in (one, other))
    assert last.keys() == trained.keys()
    for key, tensor in trained.items():
        if not any(part in key for part in task.unsettled):
            assert torch.allclose(last[key], tensor, atol=task.tolerance), key
    check_shards(tmp_path / "gradients", steps=len(history(one, "train")))


def check_shards(folder: Path, steps: int) -> None:
    """Ranks 0 and 1 are one machine, 2 and 3 the other: each holds half of every parameter, as its copy does."""
    for step in range(1, steps + 1):
        files = [folder / f"rank{rank}_step{step}.safetensors" for rank in range(RANKS)]
        gradients = [load_file(path) for path in files]
        for path in files:
            with safe_open(path, "pt") as file:
                placements = file.metadata()
            assert placements.keys() >= gradients[0].keys()
            assert all("Replicate(), " in each and "Shard(" in each for each in placements.values())
            assert all(each.endswith("of [[0, 1], [2, 3]]") for each in placements.values())
        for name, shard in gradients[0].items():
            other = gradients[1][name]
            assert torch.equal(shard, gradients[2][name]) and torch.equal(other, gradients[3][name]), name
            rows = len(shard) + len(other)
            assert len(shard) == math.ceil(rows / 2), name  # the first rank of two has the larger half
    assert any(len(shard) and not torch.equal(shard, gradients[1][name]) for name, shard in gradients[0].items())


def test_killed_and_resumed_ends_with_the_same_bytes_and_goes_on_otherwise(request, tmp_path: Path) -> None:
    """With dropout and EMA. Then two ranks that shard over both, and one that shards nothing, each add an epoch."""
    task = TASKS["text"]
    args = task.args(request, *task.sharded, "--batch_size", "6", "--epochs", "1", "--ema_decay", "0.9")
    killed = (task.script, *args, "--run_name", "killed")
    run, whole = (tmp_path / "runs" / name for name in ("killed", "whole"))
    with mesh() as four:
        launch(task.script, *args, "--run_name", "whole", cwd=tmp_path, **four)
        process = start(*killed, cwd=tmp_path, **four)
        wait_for_step(run, 5, process)
        kill(process)
        assert not (run / "results.json").exists()
        launch(*killed, "--resume", cwd=tmp_path, **four)
    assert "Resumed from" in (run / "logs" / "train.log").read_text()
    assert weights(run / "last") == weights(whole / "last")
    assert weights(run / "best") == weights(whole / "best")
    assert numbers(run) == numbers(whole)
    for epochs, ranks in ((2, 2), (3, 1)):
        launch(*killed, "--resume", "--epochs", epochs, cwd=tmp_path, processes=ranks, fsdp=ranks > 1)
        assert results(run)["samples"] == epochs * task.counts["train"]
        assert results(run)["num_processes"] == ranks
