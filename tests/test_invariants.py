"""What holds for every script: exact resume, one result on any number of processes, each sample counted once.

Parametrised over the table in tests/tasks.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from harness import (
    history,
    kill,
    kill_and_resume,
    last_step,
    launch,
    numbers,
    results,
    start,
    wait_for_step,
    weights,
)
from safetensors.torch import load_file
from tasks import TASKS, Task, each, over, place

from accelerando.base.errors import UserError

ONE_AND_TWO = [
    pytest.param(
        task, processes, id=f"{task.name}-{processes}", marks=place(f"{task.name}-{processes}", f"{task.name}-resume")
    )
    for task in TASKS.values()
    for processes in (1, 2)
]
ALONE_AND_TWO = [  # every script alone, also where ONE_AND_TWO leaves it to the exhaustive suite
    parameter if parameter.values[1] == 2 else pytest.param(*parameter.values, id=parameter.id)
    for parameter in ONE_AND_TWO
]
WAYS = {"one": {}, "ddp": {"processes": 2}, "fsdp": {"processes": 2, "fsdp": True}}
EVERY_RUN = (
    "config.yaml", "summary.txt", "results.json", "metrics.jsonl", "metrics.csv", "report.html", "best/model.safetensors",
    "best/config.json", "best/README.md", "last/model.safetensors", "last/config.json", "logs/train.log",
    "plots/curves.png",
)  # fmt: skip


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """``unbroken(request, task, name)``: the run of a kill variant that nobody disturbs, made once."""
    made: dict[tuple[str, str], Path] = {}

    def run(request: pytest.FixtureRequest, task: Task, name: str) -> Path:
        if (task.name, name) not in made:
            folder, variant = tmp_path_factory.mktemp("unbroken"), task.killed[name]
            args = task.args(request, *variant.flags, "--run_name", "run")
            launch(task.script, *args, cwd=folder, processes=variant.processes)
            made[task.name, name] = folder / "runs" / "run"
        return made[task.name, name]

    yield run
    for path in made.values():
        shutil.rmtree(path)


def same_end(run: Path, reference: Path) -> None:
    """Both runs have the same bytes of weights and the same numbers."""
    for folder in ("last", "best"):
        assert weights(run / folder) == weights(reference / folder), folder
    assert numbers(run) == numbers(reference)
    for split in ("validation", "test"):
        assert results(run)[split] == results(reference)[split]


# --------------------------------------------------------------------------------------------------- exact resume


@pytest.mark.launch
@pytest.mark.parametrize(("task", "name"), over("killed", "resume"))
def test_killed_and_resumed_ends_with_the_same_bytes(task: Task, name: str, unbroken, request, tmp_path: Path) -> None:
    """SIGKILLs between steps and inside saves leave no trace in weights and numbers."""
    variant = task.killed[name]
    args = task.args(request, *variant.flags, "--run_name", "run")
    seed = 10 * list(TASKS).index(task.name) + list(task.killed).index(name)
    run = kill_and_resume(tmp_path, task.script, args, variant.processes, variant.kills, seed)
    same_end(run, unbroken(request, task, name))


@pytest.mark.launch
@pytest.mark.parametrize(("task", "processes"), ONE_AND_TWO)
def test_terminated_saves_at_once_and_goes_on(task: Task, processes: int, unbroken, request, tmp_path: Path) -> None:
    """SIGTERM (to torchrun, where there are two) saves a checkpoint although none is due; resumed, nothing differs."""
    name = {1: "one", 2: "two"}[processes]
    args = task.args(request, *task.killed[name].flags, "--run_name", "run", "--save_every", "1000")
    run = tmp_path / "runs" / "run"
    process = start(task.script, *args, cwd=tmp_path, processes=processes)
    wait_for_step(run, 4, process)
    process.send_signal(signal.SIGTERM)
    asked = time.time()
    code = process.wait(timeout=30)
    assert time.time() - asked < 10
    assert code == 143 if processes == 1 else code != 0  # torchrun has a code of its own
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert (checkpoint / "manifest.json").is_file()
    assert not (run / "results.json").exists()
    assert "the same command with --resume continues" in (tmp_path / "stdout.txt").read_text()
    launch(task.script, *args, "--resume", cwd=tmp_path, processes=processes)
    same_end(run, unbroken(request, task, name))


@pytest.mark.launch
@pytest.mark.parametrize(
    ("task", "number"),
    [
        pytest.param(
            task, number, id=f"{task.name}-{number.name}", marks=pytest.mark.xdist_group(f"{task.name}-resume")
        )
        for task in TASKS.values()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        if number == signal.SIGTERM or task.name == "text"  # all signals take the same way
    ],
)
def test_a_signal_to_the_whole_group_lets_it_save(task: Task, number: signal.Signals, request, tmp_path: Path) -> None:
    """As `timeout`, Slurm and Ctrl-C send it: to the workers too, who must not die of it before the run has saved."""
    args = task.args(request, *task.random, "--num_workers", "2", "--epochs", "60", "--run_name", "run")
    run = tmp_path / "runs" / "run"
    process = start(task.script, *args, cwd=tmp_path)
    wait_for_step(run, 9, process)
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == 128 + number
    assert "the same command with --resume continues" in (tmp_path / "stdout.txt").read_text()
    assert not (tmp_path / "stderr.txt").read_text()
    newest = max((run / "checkpoints").glob("step_*"))
    assert int(newest.name[5:]) == last_step(run)
    assert not (run / "results.json").exists()


@pytest.mark.launch
@pytest.mark.parametrize("task", each("processes", "resume"))
def test_going_on_with_another_number_of_processes(task: Task, request, tmp_path: Path) -> None:
    """One process, then two, then one: every sample of each epoch is used once."""
    args = task.args(request, *task.random, "--epochs", "3", "--run_name", "run")
    if "--balanced" in args:  # which draws some samples twice
        args.remove("--balanced")
    run = tmp_path / "runs" / "run"
    for processes, step in ((1, 4), (2, 8)):
        process = start(task.script, *args, "--resume", cwd=tmp_path, processes=processes)
        wait_for_step(run, step, process)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        assert code == 143 if processes == 1 else code != 0
        kill(process)
    launch(task.script, *args, "--resume", cwd=tmp_path)
    found = results(run)
    assert found["samples"] == 3 * task.counts["train"]
    assert found["epochs"] == 3
    assert found["test"]["count"] == task.counts["test"]


@pytest.mark.launch
@pytest.mark.parametrize(("task", "processes"), ONE_AND_TWO)
def test_a_damaged_newest_checkpoint_is_passed_over(
    task: Task, processes: int, unbroken, request, tmp_path: Path
) -> None:
    """One bit of the newest checkpoint is wrong: the run says so and goes on from the one before, to the same end."""
    name = {1: "one", 2: "two"}[processes]
    reference, run = unbroken(request, task, name), tmp_path / "runs" / "run"
    shutil.copytree(reference, run)
    newest, older = sorted((run / "checkpoints").iterdir(), reverse=True)[:2]
    file = newest / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    args = task.args(request, *task.killed[name].flags, "--run_name", "run")
    done = launch(task.script, *args, "--resume", cwd=tmp_path, processes=processes)
    (line,) = [line for line in done.out.splitlines() if "falling back" in line]
    assert newest.name in line
    assert "optimizer.safetensors is corrupted" in line
    assert older.name in line
    assert weights(run / "last") == weights(reference / "last")


@pytest.mark.launch
@pytest.mark.parametrize("task", each("prolonged", "resume"))
def test_a_finished_run_is_resumed_to_the_same_end_and_can_be_prolonged(
    task: Task, unbroken, request, tmp_path: Path
) -> None:
    """Resumed with nothing left to do it changes nothing; with more epochs it goes on."""
    reference, run = unbroken(request, task, "one"), tmp_path / "runs" / "run"
    shutil.copytree(reference, run)
    args = task.args(request, *task.killed["one"].flags, "--run_name", "run")
    launch(task.script, *args, "--resume", cwd=tmp_path)
    assert weights(run / "last") == weights(reference / "last")
    epochs = int(results(reference)["epochs"])
    launch(task.script, *args, "--resume", str(run), "--epochs", str(epochs + 2), cwd=tmp_path)
    each_epoch = results(reference)["samples"] // epochs
    if "--balanced" not in args:  # which draws as many of each class
        assert each_epoch == task.counts["train"]
    assert results(run)["samples"] == (epochs + 2) * each_epoch
    assert (
        f"Resumed with a different epochs: {epochs + 2} instead of {epochs}" in (run / "logs" / "train.log").read_text()
    )


@pytest.mark.launch
@pytest.mark.parametrize(
    ("task", "processes"),  # the lock is the same for all scripts
    [
        pytest.param(TASKS["text"], 1, id="text-1"),
        pytest.param(TASKS["text"], 2, id="text-2", marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_has_one_owner_at_a_time(task: Task, processes: int, request, tmp_path: Path) -> None:
    """A command that is given twice does not write into the run of the first; a killed owner holds nothing up."""
    args = task.args(request, "--epochs", "2000", "--save_every", "2", "--run_name", "run")
    run = tmp_path / "runs" / "run"
    process = start(task.script, *args, cwd=tmp_path, processes=processes)
    try:
        wait_for_step(run, 2, process)
        for flag in ("--resume", "--overwrite") if processes == 1 else ("--resume",):
            done = launch(task.script, *args, flag, cwd=tmp_path, processes=processes, check=False)
            assert done.code == (2 if processes == 1 else 1)
            (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
            assert re.fullmatch(
                r"error: runs/run is in use by process \d+ on .+, since .+ or choose another --run_name", line
            )
        step = last_step(run)
        wait_for_step(run, step + 4, process)
        assert process.poll() is None and last_step(run) >= step + 4  # the first one goes on unharmed
    finally:
        kill(process)
    if processes == 1:
        step = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))
        launch(task.script, *args, "--resume", "--max_steps", str(step + 2), cwd=tmp_path)


# --------------------------------------------------------------- one process, DDP and FSDP2: the same training


@pytest.fixture(scope="session")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Path]]:
    """``three_runs(request, task, name)``: the same training on one process, with DDP and with FSDP2, made once.

    The global batch is the same; the last window of each epoch is ragged and divides unequally.
    """
    made: dict[tuple[str, str], dict[str, Path]] = {}

    def run(request: pytest.FixtureRequest, task: Task, name: str) -> dict[str, Path]:
        if (task.name, name) not in made:
            folder = tmp_path_factory.mktemp("parallel")
            args = task.args(request, *task.exact, *task.kinds[name])
            for way, options in WAYS.items():
                batch = task.whole if way == "one" else task.parts
                launch(task.script, *args, *batch, "--run_name", way, cwd=folder, **options)
            made[task.name, name] = {way: folder / "runs" / way for way in WAYS}
        return made[task.name, name]

    return run


@pytest.mark.launch
@pytest.mark.parametrize(("task", "name"), over("kinds", "parallel"))
def test_one_process_ddp_and_fsdp_agree(task: Task, name: str, three_runs, request) -> None:
    """The same curve, the same metrics, the same weights, within what the order of sums explains."""
    runs = three_runs(request, task, name)
    reference, expected = history(runs["one"], "train"), results(runs["one"])
    trained = load_file(runs["one"] / "last" / "model.safetensors")
    assert len(reference) == task.steps
    for way in ("ddp", "fsdp"):
        for one, other in zip(reference, history(runs[way], "train"), strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4), (way, one["step"])
            assert other["lr"] == one["lr"]
        found = results(runs[way])
        assert found["num_processes"] == 2
        for split in task.held_out():
            assert found[split]["loss"] == pytest.approx(expected[split]["loss"], rel=1e-3)
            assert found[split][task.metric] == pytest.approx(
                expected[split][task.metric], abs=1.01 / task.counts[split]
            )
        for metric, splits in task.before.items():
            for split in splits:
                assert found["base"][split][metric] == expected["base"][split][metric]
        last = load_file(runs[way] / "last" / "model.safetensors")
        assert last.keys() == trained.keys()
        for key, tensor in trained.items():
            if not any(part in key for part in task.unsettled):
                assert torch.allclose(last[key], tensor, atol=task.tolerance), (way, key)


@pytest.mark.launch
@pytest.mark.parametrize(("task", "name"), over("kinds", "parallel"))
def test_every_sample_is_used_and_scored_once(task: Task, name: str, three_runs, request) -> None:
    """Counts do not depend on the number of processes, though no batch size divides them."""
    for way, run in three_runs(request, task, name).items():
        found = results(run)
        assert found["samples"] == found["epochs"] * task.counts["train"], way
        assert {split: found[split]["count"] for split in task.held_out()} == {
            split: task.counts[split] for split in task.held_out()
        }, way


@pytest.mark.launch
@pytest.mark.parametrize(("task", "name"), over("kinds", "parallel"))
def test_what_was_saved_opens_with_from_pretrained(task: Task, name: str, three_runs, request) -> None:
    """Whole, whoever saved it: one process, or two that hold a part each."""
    for run in three_runs(request, task, name).values():
        task.opened(run / "best", run)


@pytest.mark.launch
@pytest.mark.parametrize("task", each("sharded"))
def test_fsdp_resumes_exactly_and_hands_over_to_one_process(task: Task, request, tmp_path: Path) -> None:
    """Killed and resumed under FSDP2 nothing differs; one process that shards nothing goes on from the checkpoint."""
    args = task.args(request, *task.sharded)
    two = {"cwd": tmp_path, "processes": 2, "fsdp": True}
    launch(task.script, *args, "--run_name", "whole", **two)
    process = start(task.script, *args, "--run_name", "killed", **two)
    run, whole = (tmp_path / "runs" / name for name in ("killed", "whole"))
    wait_for_step(run, 5, process)
    kill(process)
    launch(task.script, *args, "--run_name", "killed", "--resume", **two)
    assert weights(run / "last") == weights(whole / "last")
    assert numbers(run) == numbers(whole)
    before = results(run)
    epochs = int(before["epochs"])
    launch(task.script, *args, "--run_name", "killed", "--resume", "--epochs", str(epochs + 1), cwd=tmp_path)
    assert results(run)["samples"] == before["samples"] // epochs * (epochs + 1)
    if "--balanced" not in args:
        assert results(run)["samples"] == (epochs + 1) * task.counts["train"]
    assert results(run)["num_processes"] == 1


# --------------------------------------------------------------------------------------------- the run's folder


@pytest.fixture
def here(task: Task, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """The task's script in this process."""
    return request.getfixturevalue(task.here)


@pytest.mark.parametrize("task", each("folder"))
def test_a_run_leaves_what_it_promises(task: Task, here, request) -> None:
    """Files of every run and of this task; the counts of all splits; a config that repeats the run."""
    import yaml

    flags = ("--max_steps", "4", "--seed", "3", "--warmup_steps", "2", "--report_to", "tensorboard")
    run = here(*flags, *(["--report_on_train"] * (task.name != "clip")))
    for name in (*EVERY_RUN, *task.promised):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert not [path for path in run.rglob("*") if path.name.endswith((".draft", ".old"))]
    found = results(run)
    for split in (*task.held_out(), *(["train"] * (task.name != "clip"))):
        assert found[split]["count"] == task.counts[split], split
    assert 0 <= found["data_wait_share"] <= 1
    assert found["peak_memory_mb"] > 10
    assert found["steps"] == 4
    assert f"{found['test'][task.metric]:.4f}" in (run / "summary.txt").read_text()
    assert task.script.name in (run / "report.html").read_text()
    assert "\033" not in (run / "logs" / "train.log").read_text()
    sections = yaml.safe_load((run / "config.yaml").read_text())
    assert next(section["max_steps"] for section in sections.values() if "max_steps" in section) == 4
    state = json.loads((run / "checkpoints" / "step_000004" / "state.json").read_text())["state"]
    assert state["step"] == 4
    task.opened(run / "best", run)
    again = here("--config", str(run / "config.yaml"), "--report_to", "none", base=[], name="again")
    assert weights(again / "last") == weights(run / "last")


@pytest.mark.parametrize("task", each("folder"))
def test_a_run_is_neither_overwritten_nor_mixed_unasked(task: Task, here) -> None:
    """The same name again is refused; --overwrite starts anew; --resume with another optimizer or folder is refused."""
    run = here("--max_steps", "2", name="same")
    first = weights(run / "last")
    with pytest.raises(UserError, match="--overwrite"):
        here("--max_steps", "3", name="same")
    assert weights(run / "last") == first
    with pytest.raises(UserError, match="another optimizer or schedule"):
        here("--resume", str(run), "--optimizer", "sgd", "--max_steps", "3", name="same")
    with pytest.raises(UserError, match="nowhere: not a run"):
        here("--resume", "nowhere")
    assert weights(run / "last") == first
    (run / "of_before.txt").write_text("x")
    assert weights(here("--max_steps", "3", "--overwrite", name="same") / "last") != first
    assert not (run / "of_before.txt").exists()
    assert [path.name for path in sorted((run / "checkpoints").iterdir())][-1] == "step_000003"
    precious = run.parent / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not removed"):
        here("--overwrite", name="precious")
    assert (precious / "thesis.txt").read_text() == "mine"


@pytest.mark.launch
@pytest.mark.parametrize(("task", "processes"), ALONE_AND_TWO)
def test_bad_input_ends_with_one_line(task: Task, processes: int, request, tmp_path: Path) -> None:
    """Data that is not there: one line, exit code 2, no run directory, whatever the number of processes."""
    flags, words = task.broken
    args = task.args(request, *flags)
    done = launch(task.script, *args, cwd=tmp_path, processes=processes, check=False, timeout=60)
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert words in line
    assert not (tmp_path / "runs").exists()
    if processes == 1:
        assert done.code == 2
        assert done.err.strip() == line
    else:
        assert done.code != 0


# ---------------------------------------------------------------------------------------------- the true launchers


@pytest.mark.launch
@pytest.mark.parametrize("task", each("launchers", "resume"))
def test_the_true_launchers_give_the_same_bytes(task: Task, unbroken, request, tmp_path: Path) -> None:
    """Begun with plain python (text alone), killed, resumed with `accelerate launch`: it ends as a forked run does.

    A fresh interpreter has a hash seed of its own; the summary repeats the command of the last one.
    """
    args = task.args(request, *task.killed["one"].flags, "--run_name", "run")
    run = tmp_path / "runs" / "run"
    process = start(task.script, *args, cwd=tmp_path, real=task.name == "text")
    wait_for_step(run, 5, process)
    kill(process)
    assert not (run / "results.json").exists()
    done = launch(task.script, *args, "--resume", cwd=tmp_path, config="cpu")
    assert "Resumed from" in done.out
    assert "Traceback" not in done.err
    assert "accelerate launch --config_file" in (run / "summary.txt").read_text()
    same_end(run, unbroken(request, task, "one"))


@pytest.mark.launch
@pytest.mark.exhaustive
@pytest.mark.parametrize("task", each("real")[:1])  # the launcher is the same for all scripts
def test_with_torchrun_on_two_ranks(task: Task, request, tmp_path: Path) -> None:
    """torchrun gives what the forked ranks give."""
    args = task.args(request, *task.exact, *next(iter(task.kinds.values())), *task.parts, "--max_steps", "3")
    launch(task.script, *args, "--run_name", "real", cwd=tmp_path, processes=2, real=True)
    launch(task.script, *args, "--run_name", "forked", cwd=tmp_path, processes=2)
    real, forked = (tmp_path / "runs" / name for name in ("real", "forked"))
    assert results(real)["num_processes"] == 2
    assert results(real)["test"]["count"] == task.counts["test"]
    for one, other in zip(history(real, "train"), history(forked, "train"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
