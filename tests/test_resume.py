"""Exact resume in this process: what a run keeps, gives up and refuses. Kills are in tests/test_invariants.py."""

from __future__ import annotations

import json
import shutil

import pytest
from harness import history, weights

from accelerando.base.errors import UserError


def test_to_overwrite_empties_the_folder_and_keeps_the_lock(train_here) -> None:
    """The lock is held meanwhile: nobody comes in between, and on a network's disk an open file cannot go away."""
    run = train_here("--max_steps", "2", name="run")
    (run / "of_before.txt").write_text("x")
    inode = (run / ".lock").stat().st_ino
    train_here("--max_steps", "1", "--overwrite", name="run")
    assert (run / ".lock").stat().st_ino == inode
    assert not (run / "of_before.txt").exists()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000001"]
    for path in list(run.iterdir()):
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train_here("--max_steps", "1", name="run")  # a folder with nothing but a lock is as good as none


def test_going_back_to_an_earlier_checkpoint_gives_up_what_came_after(text_args, train_here) -> None:
    flags = ("--save_every", "2", "--keep_checkpoints", "9")
    whole = train_here(*flags, name="run")
    expected = weights(whole / "last")
    names = [path.name for path in sorted((whole / "checkpoints").iterdir())]
    assert names == [f"step_{step:06d}" for step in range(2, 15, 2)]
    train_here("--resume", str(whole / "checkpoints" / "step_000004"), base=[], name="run")
    log = (whole / "logs" / "train.log").read_text()
    assert [name for name in names if f"/{name}: the run continues from step_000004" in log] == names[2:]
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == names
    assert weights(whole / "last") == expected
    with pytest.raises(UserError, match="no complete checkpoint; there are step_000014"):
        train_here("--resume", str(whole / "checkpoints" / "step_000005"), base=[], name="run")


def test_the_best_model_goes_back_with_its_checkpoint(text_args, train_here) -> None:
    """best/ may be of a later moment, or half replaced, than the checkpoint that a run goes on from."""
    flags = ("--save_every", "2", "--eval_every", "2", "--keep_checkpoints", "9", "--best_metric", "loss")
    run = train_here(*flags, name="run")
    evaluated = {row["step"]: row["loss"] for row in history(run, "validation")}
    early = min((step for step in evaluated if step <= 6), key=evaluated.get)
    assert min(evaluated, key=evaluated.get) > 6  # a later one was better
    kept = weights(run / "checkpoints" / "step_000006" / "best")
    assert weights(run / "best") != kept
    train_here("--resume", str(run / "checkpoints" / "step_000006"), "--max_steps", "6", base=[], name="run")
    results = json.loads((run / "results.json").read_text())
    assert results["best_step"] == early
    assert weights(run / "best") == kept
    assert results["validation"]["loss"] == pytest.approx(evaluated[early], rel=1e-6)


def test_a_kill_between_the_two_renames_of_a_second_save_loses_nothing(train_here) -> None:
    run = train_here("--max_steps", "2", name="run")
    place = run / "checkpoints" / "step_000002"
    place.rename(place.with_name(".step_000002.old"))
    train_here("--resume", "--max_steps", "4", name="run")
    assert "Resumed from" in (run / "logs" / "train.log").read_text()
    assert not list((run / "checkpoints").glob(".*"))
