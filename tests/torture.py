"""``make torture``: 20 SIGKILLs of text_classify.py and of clip_finetune.py on shards, a third of them inside a save."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import CLIP, TEXT, launch, weights
from test_clip_resume import FLAGS
from test_resume import flags_for, kill_and_resume, numbers

KILLS = 20


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0)])
def test_twenty_kills(processes: int, workers: int, text_args: list[str], tmp_path: Path) -> None:
    args = [*text_args, *flags_for(processes), "--epochs", "14", "--num_workers", str(workers), "--run_name", "run"]
    reference = tmp_path / "reference"
    reference.mkdir()
    launch(TEXT, *args, cwd=reference, processes=processes)
    run = kill_and_resume(tmp_path, args, processes, KILLS, seed=100 * processes + workers)
    for folder in ("best", "last"):
        assert weights(run / folder) == weights(reference / "runs" / "run" / folder)
    assert numbers(run) == numbers(reference / "runs" / "run")
    print(f"\n{processes} process(es), {workers} workers: {KILLS} kills, byte-identical weights")


@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_on_shards(processes: int, clip_args: list[str], tmp_path: Path) -> None:
    args = [*clip_args, *FLAGS, "--epochs", "25", "--run_name", "run"]
    reference = tmp_path / "reference"
    reference.mkdir()
    launch(CLIP, *args, cwd=reference, processes=processes)
    run = kill_and_resume(tmp_path, args, processes, KILLS, seed=200 * processes, script=CLIP)
    for folder in ("best", "last"):
        assert weights(run / folder) == weights(reference / "runs" / "run" / folder)
    assert numbers(run) == numbers(reference / "runs" / "run")
    print(f"\nclip, {processes} process(es), 2 workers: {KILLS} kills, byte-identical weights")
