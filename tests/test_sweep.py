"""tools/sweep.py: no trial is lost or run twice, whatever is killed and however many work on it; the numbers are right."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import harness
import optuna
import pytest
from harness import ROOT, TEXT, launch, start
from scipy.stats import t

from accelerando import search as searching
from accelerando.base.errors import Stopped, UserError
from accelerando.launch import Signals
from accelerando.report import trials as report
from accelerando.search import Plan, Setting, Tried, next_trial, open_search, tried

TOOL = ROOT / "tools" / "sweep.py"

# A script as the sweep sees one: settings, evaluations, a lock, a stop signal that it heeds, a run that it resumes.
# Its accuracy is a function of its settings; it starts at once, since it imports nothing.
QUICK = """
from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass
class Args:
    # -- training --
    lr: float = 1e-3  # rate
    batch_size: int = 16  # rows
    kind: Literal["a", "b"] = "a"  # what
    sizes: tuple[int, ...] = (3, 4)  # several
    tuned: bool = False  # yes or no
    only_b: float = 0.0  # of kind b
    fails_at: float = -1.0  # a rate that fails
    epochs: int = 2  # evaluations
    pause: float = 0.0  # seconds of each
    best_metric: str = "accuracy"  # chosen by
    seed: int = 42  # seed
    # -- output --
    output_dir: str = "runs"  # where
    run_name: str | None = None  # what
    resume: str | None = None  # go on
    overwrite: bool = False  # again


ALIASES = {"rate": "lr", "both": ("kind", {"true": "b"})}
ONLY_WITH = {"kind b": ("only_b",)}


def check_args(args):
    if not 0 < args.lr < 1:
        from accelerando.base.errors import UserError

        raise UserError(f"--lr {args.lr}: between 0 and 1")


def main():
    flags, stopped = {}, []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    for word in sys.argv[1:]:
        if word.startswith("--"):
            values = flags[word[2:]] = []
        else:
            values.append(word)
    lr, epochs, pause = (float(flags.get(*each)[0]) for each in (("lr", [1e-3]), ("epochs", [2]), ("pause", [0])))
    kind, seed = flags.get("kind", ["a"])[0], int(flags.get("seed", [42])[0])
    folder = Path(flags["output_dir"][0]) / flags["run_name"][0]
    with open("starts.txt", "a") as file:
        file.write(f"{folder.name} {'again' if 'resume' in flags else 'new'} {' '.join(sys.argv[1:])}\\n")
    if lr == float(flags.get("fails_at", [-1])[0]):
        sys.exit(f"working\\nerror: --lr {lr}: this one fails")
    folder.mkdir(parents=True, exist_ok="resume" in flags)
    lock = open(folder / ".lock", "a")
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (folder / "config.yaml").write_text("training:\\n  best_metric: accuracy\\n")
    path = folder / "metrics.jsonl"
    best = 0.9 - abs(math.log10(lr) + 3) / 10 + (kind == "b") / 50 + seed % 7 / 1000
    done = len(path.read_text().splitlines()) if path.exists() else 0
    for epoch in range(done, int(epochs)):
        time.sleep(pause)
        with open(path, "a") as file:
            row = {"kind": "validation", "step": epoch + 1, "accuracy": best * (epoch + 1) / epochs}
            file.write(json.dumps(row) + "\\n")
        if stopped and epoch + 1 < epochs:
            (folder / "stopped.txt").write_text(str(stopped[0]))
            sys.exit(128 + stopped[0])
    scores = {"accuracy": best, "loss": 1 - best, "count": 10}
    results = {"validation": scores, "test": {**scores, "accuracy": best - 0.1}, "seconds": 2.5, "config": {}}
    (folder / "report.html").write_text("")
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
"""


def load_tool():
    spec = importlib.util.spec_from_file_location("sweep", TOOL)
    module = sys.modules["sweep"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``sweep(*before, after=flags)``: the tool in this process on the quick script; gives its results.json."""
    module = load_tool()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setitem(harness.ENVIRONMENT, "CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "quick.py").write_text(QUICK)

    def run(*before: object, after: tuple[object, ...] = (), name: str = "x", script: object = "quick.py") -> dict:
        words = ["--direct", *before, script, "--run_name", name, *after]
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, words)])
        module.main()
        return json.loads((tmp_path / "runs" / f"{name}_sweep" / "results.json").read_text())

    run.module, run.patch = module, monkeypatch
    return run


def starts() -> list[tuple[str, str]]:
    """(name of the run, new or again) of every start of the quick script."""
    return [tuple(line.split()[:2]) for line in Path("starts.txt").read_text().splitlines()]


def whole(folder: Path, epochs: int, trials: int) -> None:
    """Every trial has each of its evaluations once, and was begun once."""
    for number in range(trials):
        rows = (folder / f"trial_{number:04d}" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, epochs + 1))
    begun = [name for name, how in starts() if how == "new"]
    assert sorted(begun) == [f"trial_{number:04d}" for number in range(trials)]


# --------------------------------------------------------------------------------------------------------- what is run


def test_a_grid_is_exactly_the_product(sweep) -> None:
    found = sweep("--sweep", "rate=1e-4,1e-3", "kind=a,b", "sizes=3,4 5", "tuned=true,false")
    cells = [tuple(trial["settings"].values()) for trial in found["trials"]]
    assert cells == [(lr, kind, sizes, tuned) for lr in ("1e-4", "1e-3") for kind in "ab"
                     for sizes in ("3", "4 5") for tuned in ("true", "false")]  # fmt: skip
    lines = Path("starts.txt").read_text().splitlines()
    assert len(lines) == 16
    assert "--lr 1e-4 --kind a --sizes 4 5 --tuned true --output_dir runs/x_sweep --run_name trial_0002" in lines[2]
    for trial in found["trials"]:
        own = json.loads(Path(trial["runs"]["-"], "results.json").read_text())
        assert trial["value"] == own["validation"]["accuracy"]
    best = found["best"]
    assert best["value"] == max(trial["value"] for trial in found["trials"])
    assert found["best_command"] == "python quick.py --lr 1e-3 --kind b --sizes 3 --tuned true"
    assert found["importance"]["lr"] > found["importance"]["kind"] > found["importance"]["sizes"]
    assert sum(found["importance"].values()) == pytest.approx(1)


def test_a_range_with_a_step_is_a_grid_and_part_of_one_may_be_run(sweep) -> None:
    found = sweep("--sweep", "lr=0.1..0.5:0.2", "batch_size=1..3", "--sampler", "grid", "--trials", 4)
    assert [trial["settings"] for trial in found["trials"]] == [
        {"lr": lr, "batch_size": size} for lr, size in (("0.1", "1"), ("0.1", "2"), ("0.1", "3"), ("0.3", "1"))
    ]  # fmt: skip
    found = sweep("--sweep", "lr=0.1..0.5:0.2", "batch_size=1..3", "--sampler", "grid")
    assert len({tuple(trial["settings"].values()) for trial in found["trials"]}) == len(found["trials"]) == 9
    assert len(starts()) == 9


def test_seeds_give_the_mean_and_its_interval(sweep) -> None:
    found = sweep("--sweep", "lr=1e-4,1e-3", "--seeds", 1, 2, 5)
    for trial in found["trials"]:
        values = [json.loads(Path(run, "results.json").read_text())["validation"]["accuracy"]
                  for run in trial["runs"].values()]  # fmt: skip
        assert list(trial["results"].values()) == values
        assert len(set(values)) == 3
        assert trial["value"] == pytest.approx(statistics.fmean(values))
        low, high = t.interval(0.95, 2, loc=statistics.fmean(values), scale=statistics.stdev(values) / 3**0.5)
        assert (trial["value"] - trial["interval"], trial["value"] + trial["interval"]) == pytest.approx((low, high))
    assert [name for name, _ in starts()] == [
        f"trial_{trial:04d}_seed{seed}" for trial in range(2) for seed in (1, 2, 5)
    ]
    assert found["best_command"].endswith("--lr 1e-3 --seed 1")
    folder, shown = Path("runs/x_sweep"), f"{found['best']['value']:.4f} ± {found['best']['interval']:.4f}"
    for name in ("summary.txt", "report.html"):
        assert shown in (folder / name).read_text()
    test = [value - 0.1 for value in found["best"]["results"].values()]
    line = f"test accuracy of the best: {statistics.fmean(test):.4f} ± {found['best']['interval']:.4f}"
    assert line in (folder / "summary.txt").read_text()
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert [float(rows[1][f"seed_{seed}"]) for seed in (1, 2, 5)] == list(found["trials"][1]["results"].values())


def test_seeds_among_the_settings_are_averaged_over_too(sweep) -> None:
    assert sweep.module.read_args(["--sweep", "lr=1,2", "seed=1,2,3"]).seeds == (1, 2, 3)


def test_a_failing_trial_is_named_and_passed_over(sweep, capsys) -> None:
    found = sweep("--sweep", "lr=1e-4,1e-3,1e-2", after=("--fails_at", "1e-3"))
    assert [trial["state"] for trial in found["trials"]] == ["complete", "failed", "complete"]
    assert found["trials"][1]["error"] == "--lr 0.001: this one fails"
    assert "--lr 0.001: this one fails" in Path("runs/x_sweep/report.html").read_text()
    out = capsys.readouterr().out
    assert "trial 1 failed, --lr 0.001: this one fails  (2 of 3 done)" in out
    assert "Traceback" not in out
    assert "this one fails" in Path("runs/x_sweep/logs/trial_0001.txt").read_text()
    sweep("--sweep", "lr=1e-4,1e-3,1e-2", after=("--fails_at", "1e-3"))
    assert len(starts()) == 3


def test_where_all_fail_it_says_so(sweep) -> None:
    with pytest.raises(UserError, match=r"no trial was completed: --lr 0\.001: this one fails; runs/x_sweep/logs"):
        sweep("--sweep", "lr=1e-3", after=("--fails_at", "1e-3"))


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_a_pruned_trial_is_stopped_by_a_signal_and_saves(sweep, pruner: str) -> None:
    rates = "1e-3,1e-9" if pruner == "median" else "1e-3,2e-3,3e-3,1e-9"
    flags = ("--pruner", pruner, "--startup_trials", 1)
    found = sweep("--sweep", f"lr={rates}", *flags, after=("--epochs", 40, "--pause", 0.03))
    last = found["trials"][-1]
    assert (found["trials"][0]["state"], last["state"]) == ("complete", "pruned")
    run = Path(last["runs"]["-"])
    assert (run / "stopped.txt").read_text() == str(int(signal.SIGTERM))
    evaluated = (run / "metrics.jsonl").read_text().splitlines()
    assert 1 <= len(evaluated) < 40
    assert last["pruned"] <= len(evaluated)
    assert last["value"] in [json.loads(row)["accuracy"] for row in evaluated]  # the last one that was seen
    assert found["best"]["trial"] != last["trial"]
    sweep("--sweep", f"lr={rates}", *flags, after=("--epochs", 40, "--pause", 0.03))
    assert [how for _, how in starts()] == ["new"] * (2 if pruner == "median" else 4)


@pytest.mark.exhaustive
def test_more_trials_are_added_and_the_same_command_runs_none(sweep) -> None:
    flags = ("--sweep", "lr=1e-5..1e-1:log", "--sampler", "random")
    first = sweep(*flags, "--trials", 3)
    again = sweep(*flags, "--trials", 3)
    assert again["trials"] == first["trials"]
    more = sweep(*flags, "--trials", 5)
    assert len(starts()) == 5
    assert more["trials"][:3] == first["trials"]
    at_once = sweep(*flags, "--trials", 5, name="y")
    assert [trial["settings"] for trial in at_once["trials"]] == [trial["settings"] for trial in more["trials"]]
    other = sweep(*flags, "--trials", 5, "--sampler_seed", 1, name="z")
    assert not {t["settings"]["lr"] for t in other["trials"]} & {t["settings"]["lr"] for t in more["trials"]}


def test_a_repeated_setting_takes_the_result_that_is_there(sweep) -> None:
    found = sweep("--sweep", "kind=a,b", "--sampler", "random", "--trials", 6)
    assert len(starts()) == 2
    for trial in found["trials"]:
        same = next(other for other in found["trials"] if other["settings"] == trial["settings"])
        assert trial["value"] == same["value"]
        assert trial.get("error", "") == ("" if trial == same else f"repeats trial {same['trial']}")


def test_tpe_goes_where_the_good_ones_are(sweep) -> None:
    found = sweep("--sweep", "lr=1e-8..1e-1:log", "--trials", 22, after=("--epochs", 1))
    distance = [abs(value + 3) for value in (math.log10(trial["settings"]["lr"]) for trial in found["trials"])]
    assert found["sampler"] == "tpe"
    assert statistics.fmean(distance[12:]) < statistics.fmean(distance[:8]) * 0.75


# --------------------------------------------------------------------------------------- killed, stopped, several of them


def started(folder: Path, count: int, process: harness.Process) -> None:
    """Until the quick script was started ``count`` times."""
    path = folder / "starts.txt"
    harness.wait_until(lambda: path.exists() and len(path.read_text().splitlines()) >= count, process, 60, 0.01)


@pytest.mark.launch
def test_killed_and_stopped_it_finishes_with_all_trials_and_none_twice(sweep, tmp_path: Path) -> None:
    words = ("--direct", "--sweep", "lr=1e-5..1e-1:log", "--trials", 12, "--parallel", 2, "quick.py", "--epochs", 4,
             "--pause", 0.15, "--run_name", "x")  # fmt: skip
    process = start(TOOL, *words, cwd=tmp_path)
    started(tmp_path, 3, process)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    said = (tmp_path / "stderr.txt").read_text().splitlines()[-1]
    assert re.fullmatch(r"Stopped after \d+ of 12 trials: the same command resumes", said)
    interrupted = list(tmp_path.glob("runs/x_sweep/trial_*/stopped.txt"))
    assert interrupted
    assert all(path.read_text() == str(int(signal.SIGTERM)) for path in interrupted)

    count = len(starts())
    process = start(TOOL, *words, cwd=tmp_path)
    started(tmp_path, count + 4, process)
    os.kill(process.pid, signal.SIGKILL)  # the scripts that it started go on by themselves
    process.wait(60)
    done = launch(TOOL, *words, cwd=tmp_path)
    found = json.loads((tmp_path / "runs/x_sweep/results.json").read_text())
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 12
    whole(tmp_path / "runs" / "x_sweep", 4, 12)
    assert any(how == "again" for _, how in starts())
    assert "goes on" in done.out
    unbroken = sweep("--sweep", "lr=1e-5..1e-1:log", "--sampler", "random", "--trials", 8, name="y")
    assert [t["settings"] for t in unbroken["trials"]] == [t["settings"] for t in found["trials"][:8]]


@pytest.mark.launch
@pytest.mark.parametrize("storage", ["folder", "journal"])
def test_two_processes_on_one_storage_share_the_trials(storage: str, sweep, tmp_path: Path) -> None:
    where = () if storage == "folder" else ("--storage", "shared/study.log")
    words = ("--direct", "--sweep", "lr=1e-4,1e-3,1e-2", "batch_size=1..4", *where, "--sampler", "grid", "quick.py",
             "--epochs", 2, "--pause", 0.1, "--run_name", "x")  # fmt: skip
    processes = [start(TOOL, *words, cwd=tmp_path) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0], (tmp_path / "stderr.txt").read_text()
    whole(tmp_path / "runs" / "x_sweep", 2, 12)
    done = launch(TOOL, *words, cwd=tmp_path)
    assert "12 of 12 trials" in done.out
    found = json.loads((tmp_path / "runs/x_sweep/results.json").read_text())
    assert len({tuple(trial["settings"].values()) for trial in found["trials"]}) == len(found["trials"]) == 12
    out = (tmp_path / "stdout.txt").read_text()
    assert len(re.findall(r"^trial \d+ starts", out, flags=re.MULTILINE)) == 12
    assert (tmp_path / "runs/x_sweep/study.db").exists() == (storage == "folder")
    assert not list((tmp_path / "runs/x_sweep/.running").iterdir())


def open_one(folder: Path, trials: int) -> searching.Search:
    return open_search(folder, None, "maximize", [Setting("lr", low=0, high=1)], Plan("random", trials))


def test_the_last_trial_is_given_to_one_of_two_that_ask_at_once(tmp_path: Path, monkeypatch) -> None:
    first, second = open_one(tmp_path / "x_sweep", 2), open_one(tmp_path / "x_sweep", 2)
    assert next_trial(first).number == 0
    seen = second.study.get_trials()
    assert next_trial(first).number == 1
    real, asked = second.study.get_trials, []

    def outdated(*args, **options):
        asked.append(1)
        return seen if len(asked) == 1 else real(*args, **options)

    monkeypatch.setattr(second.study, "get_trials", outdated)
    assert next_trial(second) is None
    assert len(second.study.get_trials()) == 3  # it was counted as one too many
    assert [trial.number for trial in tried(first)] == [0, 1]
    longer = open_one(tmp_path / "x_sweep", 3)
    assert next_trial(longer).number == 3
    assert len(tried(longer)) == 3


def test_a_trial_is_taken_over_only_from_a_process_that_is_gone(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from accelerando.search import *; "
        "search = open_search(Path(sys.argv[1]), None, 'maximize', [Setting('lr', low=0, high=1)], Plan('random', 1)); "
        "print(next_trial(search).values['lr'], flush=True); sys.stdin.read()"
    )
    folder = tmp_path / "x_sweep"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    rate = float(process.stdout.readline())
    one = open_one(folder, 1)
    assert next_trial(one) is None
    process.kill()
    process.wait()
    taken = next_trial(one)
    assert (taken.number, taken.values, taken.adopted) == (0, {"lr": rate}, True)
    assert next_trial(one) is None
    process.communicate()


# ------------------------------------------------------------------------------------------------------------- places


def test_trials_at_the_same_time_have_their_own_devices_or_cores(sweep, tmp_path: Path) -> None:
    module = sweep.module

    def places(parallel: int, gpus: list[str], launcher: tuple[str, ...] = ()) -> list[dict[str, str]]:
        made = module.make_sweep(["--sweep", "lr=0.1,0.2", "--parallel", str(parallel), *launcher, "quick.py"])
        made.gpus = gpus
        return [module.slot_environment(made, slot) for slot in range(parallel)]

    assert places(2, ["0", "1", "2", "3"]) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert places(3, ["4", "7"]) == [{"CUDA_VISIBLE_DEVICES": device} for device in ("4", "7", "4")]
    sweep.patch.delenv("OMP_NUM_THREADS", raising=False)
    sweep.patch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert places(3, []) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert places(2, [], ("--num_cpu_threads_per_process", "1")) == [{}, {}]
    assert places(1, []) == [{}]
    sweep.patch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert module.visible_gpus() == ["GPU-a", "GPU-b"]


def test_the_launcher_gets_its_flags_and_a_free_port_for_each_trial(sweep) -> None:
    commands = []

    def finish(command: list[str], signals: Signals, output: Path, environment: dict[str, str]) -> int:
        commands.append(command)
        at = next(number for number, word in enumerate(command) if word.endswith(".py"))
        done = subprocess.run([sys.executable, *command[at:]], check=False)
        return done.returncode

    sweep.patch.setattr(sweep.module, "run_script", finish)
    config = str(ROOT / "accelerate_configs" / "cpu.yaml")
    words = ["accelerate", "launch", "--parallel", "2", "--config_file", config, "--sweep", "lr=0.1,0.2", "quick.py"]
    sweep.patch.setattr(sys, "argv", [str(TOOL), *words])
    sweep.module.main()
    assert len(commands) == 2
    for command in commands:
        at = command.index("quick.py")
        assert command[at - 6 : at] == ["accelerate", "launch", "--config_file", config, "--main_process_port", "0"]
    found = json.loads(Path("runs/quick_lr_sweep/results.json").read_text())
    assert shlex.split(found["best_command"]) == [
        "accelerate",
        "launch",
        "--config_file",
        config,
        "quick.py",
        "--lr",
        "0.1",
    ]


def test_the_table_on_a_terminal(sweep, monkeypatch) -> None:
    made = sweep.module.make_sweep(["--direct", "--sweep", "lr=0.1..0.5", "quick.py"])
    trials = [
        Tried(0, "complete", {"lr": 0.25}, 0.5, {"-": 0.5}, 3.0),
        Tried(1, "complete", {"lr": 0.125}, 0.75, {"-": 0.75}, 4.0),
        Tried(2, "failed", {"lr": 0.5}, error="out of memory"),
        Tried(3, "running", {"lr": 0.3}),
    ]
    monkeypatch.setenv("COLUMNS", "60")
    lines = sweep.module.Screen(made, True).lines(trials, [])
    assert lines[0] == "runs/quick_lr_sweep: 3 of 20 done; 2 complete, 1 running, 1"
    assert [line.split()[:3] for line in lines[2:]] == [
        ["1", "complete", "0.125"], ["0", "complete", "0.25"], ["2", "failed", "0.5"], ["3", "running", "0.3"],
    ]  # fmt: skip
    assert lines[4].endswith("out of memory")
    assert max(map(len, lines)) < 60


# -------------------------------------------------------------------------------------------------------------- report


def test_within_the_best_ones_interval() -> None:
    def trial(number: int, *values: float) -> Tried:
        return Tried(number, "complete", {}, statistics.fmean(values), dict(zip("123", values, strict=False)))

    ranked = [trial(0, 0.9, 0.92, 0.94), trial(1, 0.9, 0.9, 0.9), trial(2, 0.8, 0.8, 0.8)]
    mean, half = report.mean_interval([0.9, 0.92, 0.94])
    assert (mean, half) == pytest.approx((0.92, t.ppf(0.975, 2) * 0.02 / 3**0.5))
    assert [one.number for one in report.within_best(ranked)] == [1]
    assert report.mean_interval([0.5]) == (0.5, None)
    assert report.within_best([trial(0, 0.9), trial(1, 0.9)]) == []


def test_places_along_an_axis() -> None:
    numbers = Setting("batch_size", ("64", "8", "16"))
    assert report.positions(numbers, ["8", "64", "16"]) == ([0.0, 2.0, 1.0], {0.0: "8", 1.0: "16", 2.0: "64"}, False)
    assert report.positions(Setting("kind", ("z", "a")), ["a", "z"])[0] == [1.0, 0.0]
    places, ticks = report._scaled([1e-4, 1e-2, 1e-3], {}, True)
    assert places == pytest.approx([0, 1, 0.5])
    assert [name for _, name in ticks] == ["0.0001", "0.000316", "0.001", "0.00316", "0.01"]


def test_plots_and_page_are_written(sweep) -> None:
    sweep("--sweep", "lr=1e-5..1e-1:log", "kind=a,b", "--trials", 6, "--sampler", "random", "--seeds", 1, 2)
    folder = Path("runs/x_sweep")
    for name in ("settings", "parallel_coordinates"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    for words in (
        "Importance",
        "Each setting",
        "Settings together",
        "Best settings",
        "Repeat this sweep",
        "over 2 seeds",
    ):
        assert words in page
    assert page.count("data:image/png") == 2
    shares = json.loads((folder / "results.json").read_text())["importance_of_seeds"]
    assert all(len(values) == 2 for values in shares.values())


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (("--sweep", "lrr=1,2"), (), "--sweep lrr: the script has no such setting; lr?"),
        (("--sweep", "both=true"), (), "--sweep both: sweep kind itself"),
        (("--sweep", "lr="), (), "--sweep lr=: no values"),
        (("--sweep", "lr"), (), "--sweep lr: no values; as in lr=1,2,3 or lr=1..3"),
        (("--sweep", "lr=0.1,,0.2"), (), "an empty value between the commas"),
        (("--sweep", "lr=0.5..0.1"), (), "--sweep lr=0.5..0.1: an empty range, 0.5 is not below 0.1"),
        (("--sweep", "lr=0..0.1:log"), (), "a logarithmic range begins above 0"),
        (("--sweep", "lr=0.1..x"), (), "--sweep lr=0.1..x: not a range"),
        (("--sweep", "lr=0.1..0.2:3"), (), "the step 3 does not fit into the range"),
        (("--sweep", "batch_size=1..2.5"), (), "batch_size takes whole numbers"),
        (("--sweep", "lr=0.1,0.10"), (), "--sweep lr=0.1,0.10: 0.1 and 0.10 are the same"),
        (("--sweep", "lr=0.1,x"), (), "--lr"),
        (("--sweep", "kind=a,c"), (), "--kind"),
        (("--sweep", "lr=0.1,2"), (), "--sweep lr=0.1,2: --lr 2.0: between 0 and 1"),
        (("--sweep", "lr=0.1..0.2", "--sampler", "grid"), (), "a grid needs values (1,2,3) or a step"),
        (("--sweep", "lr=0.1,0.2", "rate=0.3"), (), "--sweep rate=0.3: lr is there twice"),
        (("--sweep", "lr=0.1,0.2"), ("--rate", "0.3"), "--lr after quick.py: it is swept; drop one of them"),
        (("--sweep", "lr=0.1,0.2", "--seeds", 1, 2), ("--seed", 3), "--seed after quick.py: it is swept"),
        (("--sweep", "only_b=0.1,0.2"), (), "--only_b has no effect here without --kind b"),
        (("--sweep", "run_name=a,b"), (), "--sweep run_name: the sweep sets it"),
        (("--sweep", "seed=1..3"), (), "seeds are not chosen but averaged over: --seeds 1 2 3"),
        (("--sweep", "lr=0.1", "--seeds", 1, 1), (), "a seed is there twice"),
        (("--sweep", "lr=0.1,0.2", "--trials", 0), (), "--trials 0: at least 1"),
        (("--sweep", "lr=0.1,0.2"), ("--overwrite",), "--overwrite: --run_name makes another sweep"),
        (("--sweep", "lr=0.1,0.2"), ("--resume",), "--resume: the same command resumes the sweep"),
        (("--sweep", "lr=0.1,0.2"), ("--epohcs", 1), "did you mean --epochs"),
        (("--sweep", "lr=0.1,0.2", "--cpu"), (), "--direct: there is no launcher that could take --cpu"),
        ((), (), "nothing to sweep: --sweep lr=1e-5,3e-5"),
        (("--config", "none.yaml"), (), "none.yaml: No such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(before, after, words: str, sweep) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as error:
        sweep(*before, after=after)
    assert "\n" not in str(error.value)
    assert not Path("runs").exists()


def test_another_sweep_of_the_same_name_is_refused(sweep) -> None:
    sweep("--sweep", "lr=0.1,0.2")
    for before, after, words in (
        (("lr=0.1,0.3",), (), "sweep was lr=0.1,0.2 there and is lr=0.1,0.3 now"),
        (("lr=0.1,0.2",), ("--epochs", 3), "--epochs was 2 there and is 3 now"),
        (("lr=0.1,0.2", "--seeds", 1, 2), (), "seeds was none there and is 1 2 now"),
        (("lr=0.1,0.2", "--sampler", "tpe"), (), "a grid; --run_name"),
        (("lr=0.1,0.2", "--metric", "loss"), (), "its metric is to be maximized, not minimized"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            sweep("--sweep", *before, after=after)
    assert len(starts()) == 2


def test_folders_and_storages_that_are_something_else(sweep, tmp_path: Path) -> None:
    Path("runs/x_sweep").mkdir(parents=True)
    Path("runs/x_sweep/config.yaml").write_text("")
    with pytest.raises(UserError, match="runs/x_sweep: exists and is a run"):
        sweep("--sweep", "lr=0.1")
    Path("runs/x_sweep/config.yaml").unlink()
    Path("runs/x_sweep/trial_0000").mkdir()
    Path("runs/x_sweep/trial_0000/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="runs/x_sweep/trial_0000 is there, but the study does not know it"):
        sweep("--sweep", "lr=0.1")
    with pytest.raises(UserError, match="--storage nowhere://x: "):
        sweep("--sweep", "lr=0.1", "--storage", "nowhere://x", name="y")
    with pytest.raises(UserError, match="--metric auc: runs/z_sweep/trial_0000 has accuracy, loss"):
        sweep("--sweep", "lr=0.1", "--metric", "auc", name="z")


def test_without_optuna_one_line_says_how_to_get_it(sweep, monkeypatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else real(name))
    with pytest.raises(UserError, match="a sweep needs optuna: pip install optuna"):
        sweep("--sweep", "lr=0.1")


def test_a_script_that_stops_by_itself_ends_the_sweep(sweep) -> None:
    sweep.patch.setattr(sweep.module, "run_script", lambda *_: 143)
    with pytest.raises(Stopped, match="Stopped after 0 of 2 trials: the same command resumes") as stopped:
        sweep("--sweep", "lr=0.1,0.2")
    assert stopped.value.exit_code == 143


def test_yaml_says_the_same_as_flags(sweep) -> None:
    Path("s.yaml").write_text(
        "sweep:\n  lr: [0.001, 0.01]\n  tuned: [true, false]\n  batch_size: 1..4:3\nsampler: grid\nseeds: [1, 2]\ntrials: 3\n"
    )
    args = sweep.module.read_args(["--config", "s.yaml", "--trials", "2"])
    assert args.sweep == ("lr=0.001,0.01", "tuned=true,false", "batch_size=1..4:3")
    assert (args.sampler, args.seeds, args.trials) == ("grid", (1, 2), 2)
    for text, words in (("swep: 1", "unknown key 'swep'"), ("sweep: 3", "expected settings below it")):
        Path("s.yaml").write_text(text)
        with pytest.raises(UserError, match=words):
            sweep.module.read_args(["--config", "s.yaml"])


def test_the_shipped_settings_of_a_sweep_are_one(sweep) -> None:
    path = ROOT / "configs" / "sweep_text.yaml"
    made = sweep.module.make_sweep(["--config", str(path), str(TEXT), "--train_file", "x.csv"])
    assert made.plan.sampler == "tpe"
    assert len(made.settings) >= 3


# -------------------------------------------------------------------------------------------------------- a real script


@pytest.mark.launch
def test_a_sweep_of_a_training_script(sweep, text_set: Path) -> None:
    """Two trials of the text CNN, forked from the server instead of started afresh."""

    def forked(command: list[str], signals: Signals, output: Path, environment: dict[str, str]) -> int:
        at = command.index(str(TEXT))
        done = launch(TEXT, *command[at + 1 :], cwd=Path.cwd(), check=False)
        output.write_text(done.out + done.err)
        return done.code

    sweep.patch.setattr(sweep.module, "run_script", forked)
    data = ("--train_file", text_set / "train.json", "--test_file", text_set / "test.json", "--architecture", "cnn")
    small = ("--embed_size", 16, "--num_filters", 8, "--vocab_size", 300, "--max_steps", 4, "--report_to", "none")
    found = sweep("--sweep", "learning_rate=1e-5,1e-2", script=TEXT, after=(*data, *small))
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 2
    for trial, rate in zip(found["trials"], (1e-5, 1e-2), strict=True):
        run = Path(trial["runs"]["-"])
        own = harness.results(run)
        assert own["config"]["training"]["lr"] == rate
        assert trial["value"] == own["validation"]["accuracy"]
        assert trial["tests"]["-"] == own["test"]["accuracy"]
        assert trial["seconds"] == own["seconds"]
        assert (run / "best" / "model.safetensors").is_file()
    study = optuna.load_study(study_name="x_sweep", storage="sqlite:///runs/x_sweep/study.db")
    assert [trial.params["lr"] for trial in study.trials] == ["1e-5", "1e-2"]
    assert all(trial.intermediate_values for trial in study.trials)
