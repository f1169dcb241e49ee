"""``make torture``: a hundred SIGKILLs, at moments drawn over the whole run, of all six scripts.

A third of them are aimed at saves, some at evaluations and at the final report. Each run has to end with the bytes and
the numbers of one that nobody disturbed.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from harness import (
    Process,
    history,
    kill,
    last_step,
    launch,
    numbers,
    results,
    start,
    wait_for_draft,
    wait_for_step,
    wait_until,
    weights,
)
from tasks import TASKS, Task

KILLS = {
    "text": {"one": 6, "two": 6, "cnn-workers": 4},
    "multitask": {"one": 4},
    "clip": {"one": 10, "two": 10},
    "sign": {"one": 7, "two": 7, "gru": 6},
    "image": {"one": 10, "two": 10},
    "har": {"one": 8, "two": 7, "probe": 5},
}
assert sum(count for variants in KILLS.values() for count in variants.values()) == 100


def moments(count: int, rng: random.Random) -> list[str]:
    """What each kill is aimed at; the final report comes last, since the run has to get there."""
    reports = max(1, count // 8)
    saves, evaluations = round(count / 3), max(1, count // 6)
    drawn = ["save"] * saves + ["evaluation"] * evaluations
    drawn += ["anywhere"] * (count - reports - len(drawn))
    rng.shuffle(drawn)
    return drawn + ["report"] * reports


def await_moment(kind: str, run: Path, process: Process, steps: int, left: int, rng: random.Random) -> str:
    """Waits until the run is where it is to be killed; says where that is."""
    step = last_step(run)
    if kind == "report":
        wait_until(lambda: (run / "last").is_dir() or last_step(run) >= steps, process)
        time.sleep(rng.random() * 1.5)
        return f"report, results {'written' if (run / 'results.json').exists() else 'not yet'}"
    ahead = max(1, (steps - step) // max(1, left))  # so that the run is not over before the kills are
    wait_for_step(run, min(steps, step + rng.randint(1, 2 * ahead)), process)
    if kind == "save":
        wait_for_draft(run, process)
        time.sleep(rng.random() * 0.01)
        return "save"
    if kind == "evaluation":
        seen = len(history(run, "validation")) if (run / "metrics.jsonl").is_file() else 0
        # The step before a row of validation is the moment in which it is computed.
        due = next((row["step"] for row in REFERENCE if row["kind"] == "validation" and row["step"] > step), steps)
        wait_for_step(run, due, process)
        time.sleep(rng.random() * 0.02)
        return f"evaluation at step {due}, {len(history(run, 'validation')) - seen} done since"
    time.sleep(rng.random() * 0.3)
    return "anywhere"


REFERENCE: list[dict] = []


@pytest.mark.launch
@pytest.mark.parametrize(
    ("task", "name"),
    [pytest.param(TASKS[task], name, id=f"{task}-{name}") for task, names in KILLS.items() for name in names],
)
def test_a_hundred_kills(task: Task, name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Byte-identical best/ and last/, equal numbers, after every kill."""
    variant, count = task.killed[name], KILLS[task.name][name]
    epochs = 8 * int(variant.flags[variant.flags.index("--epochs") + 1])
    args = task.args(request, *variant.flags, "--epochs", str(epochs), "--run_name", "run")
    whole = tmp_path / "whole"
    whole.mkdir()
    launch(task.script, *args, cwd=whole, processes=variant.processes)
    reference, run = whole / "runs" / "run", tmp_path / "runs" / "run"
    REFERENCE[:] = numbers(reference)
    steps = results(reference)["steps"]
    rng = random.Random(f"{task.name} {name}")
    places = []
    kinds = moments(count, rng)
    for number, kind in enumerate(kinds):
        process = start(task.script, *args, "--resume", cwd=tmp_path, processes=variant.processes)
        place = await_moment(kind, run, process, steps, count - number, rng)
        running = process.poll() is None
        places.append(f"{place} at step {last_step(run)} of {steps}{'' if running else ' (it had ended)'}")
        kill(process)
    launch(task.script, *args, "--resume", cwd=tmp_path, processes=variant.processes)
    print(f"\n{task.name} {name}: {count} kills\n  " + "\n  ".join(places))
    for folder in ("best", "last"):
        assert weights(run / folder) == weights(reference / folder)
    assert numbers(run) == numbers(reference)
    for split in task.held_out():
        assert results(run)[split] == results(reference)[split]
    assert sum("had ended" in place for place in places) <= count // 4, places
