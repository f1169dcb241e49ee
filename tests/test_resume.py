"""Invariant 1: whatever happens to a run, resumed it ends with the weights of one that was left alone."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import TEXT, history, kill, launch, start, weights

from accelerando.base.errors import UserError

# Dropout is on, windows are ragged, saves and evaluations fall inside epochs and on different steps.
FLAGS = (
    "--epochs", "4", "--batch_size", "12", "--gradient_accumulation_steps", "2", "--eval_every", "5",
    "--save_every", "3", "--warmup_steps", "4", "--early_stop", "50", "--ema_decay", "0.95",
)  # fmt: skip
TIMING = {"seconds", "samples_per_second", "data_wait_share", "peak_memory_mb"}


def numbers(run: Path) -> list[dict]:
    """All recorded rows, less what a clock or the memory says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def flags_for(processes: int) -> tuple[str, ...]:
    return FLAGS if processes == 1 else (*FLAGS, "--batch_size", "6")


@pytest.fixture(scope="module", params=[1, 2])
def unbroken(request, text_args, tmp_path_factory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("unbroken")
    launch(TEXT, *text_args, *flags_for(request.param), "--run_name", "run", cwd=folder, processes=request.param)
    return folder / "runs" / "run", request.param


def wait_for_step(run: Path, step: int, process, timeout: float = 60) -> None:
    """Until the log has reached ``step``, or the process has ended."""
    limit = time.time() + timeout
    path = run / "metrics.jsonl"
    while time.time() < limit and process.poll() is None:
        if path.is_file() and any(f'"step": {step},' in line for line in path.read_text().splitlines()):
            return
        time.sleep(0.002)


def wait_for_draft(run: Path, process, timeout: float = 60) -> None:
    """Until a checkpoint is being written."""
    limit = time.time() + timeout
    while time.time() < limit and process.poll() is None:
        if (run / "checkpoints").is_dir() and any((run / "checkpoints").glob(".step_*")):
            return
        time.sleep(0.0002)


def kill_and_resume(folder: Path, args: list[str], processes: int, kills: int, seed: int, script: Path = TEXT) -> Path:
    """Kills the run ``kills`` times, every third time while it saves, and lets it finish."""
    rng = random.Random(seed)
    run = folder / "runs" / "run"
    for number in range(kills):
        process = start(script, *args, "--resume", cwd=folder, processes=processes)
        if number % 3 == 2:
            wait_for_draft(run, process)
        else:
            rows = history(run, "train") if (run / "metrics.jsonl").is_file() else []
            wait_for_step(run, (rows[-1]["step"] if rows else 0) + rng.randint(4, 7), process)
            time.sleep(rng.random() * 0.05)
        kill(process)
    launch(script, *args, "--resume", cwd=folder, processes=processes)
    resumed = (folder / "stdout.txt").read_text().count("Resumed from")
    assert resumed >= (kills - 1) // 2, f"only {resumed} of {kills} starts found a checkpoint"
    return run


def test_killed_and_resumed_ends_with_the_same_bytes(unbroken, text_args, tmp_path: Path) -> None:
    reference, processes = unbroken
    args = [*text_args, *flags_for(processes), "--run_name", "run"]
    run = kill_and_resume(tmp_path, args, processes, kills=4 if processes == 1 else 3, seed=processes)
    assert weights(run / "last") == weights(reference / "last")
    assert weights(run / "best") == weights(reference / "best")
    assert numbers(run) == numbers(reference)


def test_terminated_saves_at_once_and_goes_on(unbroken, text_args, tmp_path: Path) -> None:
    reference, processes = unbroken
    args = [*text_args, *flags_for(processes), "--run_name", "run", "--save_every", "1000"]
    run = tmp_path / "runs" / "run"
    process = start(TEXT, *args, cwd=tmp_path, processes=processes)
    wait_for_step(run, 7, process)
    process.send_signal(signal.SIGTERM)
    asked = time.time()
    code = process.wait(timeout=30)
    assert time.time() - asked < 10
    assert code == 143 if processes == 1 else code != 0  # torchrun has a code of its own
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert (checkpoint / "manifest.json").is_file()
    assert not (run / "results.json").exists()
    text = (tmp_path / "stdout.txt").read_text()
    assert "the same command with --resume goes on" in text
    launch(TEXT, *args, "--resume", cwd=tmp_path, processes=processes)
    assert weights(run / "last") == weights(reference / "last")
    assert numbers(run) == numbers(reference)


def test_going_on_with_another_number_of_processes(text_args, tmp_path: Path) -> None:
    """One process, then two, then one: every sample of each epoch is used once."""
    args = [*text_args, *FLAGS, "--run_name", "run"]
    run = tmp_path / "runs" / "run"
    for processes, step in ((1, 6), (2, 14)):
        process = start(TEXT, *args, "--resume", cwd=tmp_path, processes=processes)
        wait_for_step(run, step, process)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        kill(process)
    launch(TEXT, *args, "--resume", cwd=tmp_path)
    results = json.loads((run / "results.json").read_text())
    assert results["samples"] == 4 * 203
    assert results["epochs"] == 4
    assert results["test"]["count"] == 67


def test_a_damaged_newest_checkpoint_is_passed_over(unbroken, text_args, tmp_path: Path) -> None:
    reference, processes = unbroken
    run = tmp_path / "runs" / "run"
    shutil.copytree(reference, run)
    newest, older = sorted((run / "checkpoints").iterdir(), reverse=True)[:2]
    file = newest / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    args = [*text_args, *flags_for(processes), "--run_name", "run"]
    done = launch(TEXT, *args, "--resume", cwd=tmp_path, processes=processes)
    (line,) = [line for line in done.out.splitlines() if "falling back" in line]
    assert newest.name in line
    assert "optimizer.safetensors is damaged" in line
    assert older.name in line
    assert weights(run / "last") == weights(reference / "last")


def test_a_finished_run_is_resumed_to_the_same_end_and_can_be_prolonged(unbroken, text_args, tmp_path: Path) -> None:
    reference, processes = unbroken
    if processes == 2:
        pytest.skip("the same code on any number of processes")
    run = tmp_path / "runs" / "run"
    shutil.copytree(reference, run)
    args = [*text_args, *FLAGS, "--run_name", "run"]
    launch(TEXT, *args, "--resume", cwd=tmp_path)
    assert weights(run / "last") == weights(reference / "last")
    launch(TEXT, *args, "--resume", str(run), "--num_epochs", "6", cwd=tmp_path)
    results = json.loads((run / "results.json").read_text())
    assert results["samples"] == 6 * 203
    assert "Resumed with another epochs: 6 instead of 4" in (run / "logs" / "train.log").read_text()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_has_one_owner_at_a_time(processes: int, text_args, tmp_path: Path) -> None:
    """A command that is given twice does not write into the run of the first; a killed owner holds nothing up."""
    args = [*text_args, "--epochs", "2000", "--save_every", "2", "--run_name", "run"]
    run = tmp_path / "runs" / "run"
    process = start(TEXT, *args, cwd=tmp_path, processes=processes)
    try:
        wait_for_step(run, 2, process)
        for flag in ("--resume", "--overwrite") if processes == 1 else ("--resume",):
            done = launch(TEXT, *args, flag, cwd=tmp_path, processes=processes, check=False)
            assert done.code == (2 if processes == 1 else 1)
            (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
            assert re.fullmatch(
                r"error: runs/run is in use by process \d+ on .+, since .+ or give another --run_name", line
            )
        step = history(run, "train")[-1]["step"]
        wait_for_step(run, step + 4, process)
        assert (
            process.poll() is None and history(run, "train")[-1]["step"] >= step + 4
        )  # the first one goes on unharmed
    finally:
        kill(process)
    if processes == 1:
        step = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))
        launch(TEXT, *args, "--resume", "--max_steps", str(step + 2), cwd=tmp_path)


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
    assert [name for name in names if f"/{name}: the run goes on from step_000004" in log] == names[2:]
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
