"""Try many settings of a script, and say which are best: a grid, random ones, or those that Optuna proposes.

  python tools/sweep.py --sweep lr=1e-5,2e-5,3e-5,5e-5 batch_size=16,32,64 scripts/text_classify.py --epochs 3 ...
  python tools/sweep.py --sweep lr=1e-5..1e-3:log dropout_prob=0..0.5 --trials 30 --pruner median \\
    --seeds 1 2 3 --parallel 2 --config_file accelerate_configs/cpu.yaml scripts/text_classify.py ...
  python tools/sweep.py --config sweep.yaml scripts/text_classify.py ...

`lr=1e-5,3e-5` are choices, `lr=1e-5..1e-3:log` and `dropout_prob=0..0.5` ranges, `0..0.5:0.1` one with a step. Choices
alone make a grid; with a range TPE chooses. Other flags before the script go to `accelerate launch`, all after it to
the script.

A trial is a run of the script in runs/<name>_sweep, with --seeds one run for each seed, and the mean counts. Run the
same command again to resume: finished trials are kept, those that were running go on from their checkpoints; a larger
--trials adds more. Several processes or machines, each with the same command, work on one sweep together: the folder is
shared, or --storage is.

The folder holds the study, the report (table, importance of the settings, plots), results.json, trials.csv, and a log
of each trial.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from accelerando.base.config import Alias, grouped, parse_args, read_yaml, without_effect, without_flags
from accelerando.base.errors import Stopped, UserError, errors_in_one_line, first_line
from accelerando.base.files import LOCK, check_can_be_made, is_unused, locked, write_text
from accelerando.base.processes import command_line
from accelerando.inference import runs
from accelerando.inference.outputs import aligned_rows
from accelerando.inference.scripts import import_script
from accelerando.launch import (
    Signals,
    accelerate_command,
    count_gpus,
    default_launcher,
    how_it_ended,
    last_line,
    run_script,
    was_stopped,
)
from accelerando.report import trials as report
from accelerando.search import (
    Plan,
    Pruner,
    Sampler,
    Search,
    Setting,
    Trial,
    Tried,
    Value,
    check_optuna,
    finish_trial,
    grid,
    importances,
    leave_trial,
    mark_started,
    next_trial,
    open_search,
    read_settings,
    tried,
)
from accelerando.train.tracking import read_history

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "accelerate_configs"
WORDS = "[LAUNCHER'S FLAG ...] SCRIPT [FLAG ...]"
EXAMPLE = "python tools/sweep.py --sweep lr=1e-5,3e-5 scripts/text_classify.py --train_file data/train.csv"
NEEDED = ("output_dir", "run_name", "resume", "overwrite")  # in the Args of a script
IGNORED = {"num_workers", "pin_memory"}  # settings that change no result
TRIALS = 20  # where nothing says how many
POLL = 0.1  # seconds between looks at the trials
SHOWN_ROWS = 12  # of the live table


@dataclass
class Args:
    # -- sweep --
    words: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar=WORDS)] = ()  # see above
    sweep: tuple[str, ...] = ()  # settings: lr=1e-5,3e-5 or a range: lr=1e-5..1e-3:log dropout_prob=0..0.5
    seeds: tuple[int, ...] = ()  # train each trial with each of these; the mean counts, with its interval
    sampler: Sampler | None = None  # how settings are chosen (default: grid; with a range, tpe)
    trials: int | None = None  # how many, with those of earlier starts (default: the whole grid, or 20)
    sampler_seed: int = 0  # of random and tpe
    startup_trials: int = 8  # tpe: random trials before it; pruner: complete ones before a trial is stopped
    pruner: Pruner = "none"  # stop poor trials early: below the median, or by successive halving
    prune_after: int = 1  # pruner: evaluations of a trial before it may be stopped
    metric: str | None = None  # of the validation rows (default: the script's best_metric)
    # -- running --
    parallel: int = 1  # trials at a time here; they share the GPUs, or the cores
    direct: bool = False  # python SCRIPT instead of accelerate launch: one process, some seconds less for each run
    storage: str | None = None  # of the study: a database's URL or a journal file (default: SQLite in the folder)
    config: tuple[str, ...] = ()  # YAML files with any of these settings


@dataclass
class Sweep:
    """What is swept, of which script."""

    args: Args
    script: Path
    flags: list[str]  # of the script, in each trial
    launcher: list[str]
    settings: list[Setting]
    plan: Plan
    folder: Path
    base: dict[str, Any]  # the script's other settings
    metric: str
    higher: bool
    gpus: list[str] = field(default_factory=list)  # that trials at the same time share

    @property
    def seeds(self) -> list[str]:
        """The keys of a trial's results."""
        return [str(seed) for seed in self.args.seeds] or ["-"]


@dataclass
class Job:
    """A trial that runs here, one seed after the other, in a thread of its own."""

    trial: Trial
    runs: dict[str, Path]  # seed -> its run
    log: Path
    slot: int
    stop: Signals
    started: float = field(default_factory=time.monotonic)
    thread: threading.Thread | None = None
    code: int | None = None  # None: still running
    error: str = ""
    pruned: bool = False
    evaluations: int = 0
    best: float | None = None  # of the first seed's evaluations


# ----------------------------------------------------------------------------------------------------- command line


def split_words(words: list[str]) -> tuple[list[str], list[str], Path, list[str]]:
    """(the tool's own flags, those of the launcher, the script, its flags) of a command line.

    Raises:
        UserError: no script, or one that is not there.
    """
    from accelerando.data.table_formats import similar_file

    at = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        raise UserError(f"no script among the arguments; give one, as in: {EXAMPLE}")
    script, ours, launcher = Path(words[at]), [], []
    if not script.is_file():
        raise UserError(f"{script}: no such file{similar_file(script)}")
    own = {each.name for each in dataclasses.fields(Args)} - {"words"}
    kept = None
    for word in words[:at]:
        if word == "--":
            continue
        if word.startswith("-"):
            name = word.lstrip("-").partition("=")[0].replace("-", "_")
            kept = ours if name.removeprefix("no_") in own else launcher
        elif kept is None:
            if word in ("accelerate", "launch"):  # typed out of habit
                continue
            raise UserError(f"{word!r} before {script}: flags of the sweep or of accelerate launch come first")
        kept.append(word)
    return ours, launcher, script, words[at + 1 :]


def from_yaml(path: Path) -> list[str]:
    """The flags in a YAML file; ``sweep`` is a mapping there, of settings to lists of values or ranges.

    Raises:
        UserError: no such file, invalid YAML, an unknown key.
    """
    own, words = {each.name for each in dataclasses.fields(Args)} - {"words", "config"}, []
    for key, value in read_yaml(path).items():
        name = str(key).replace("-", "_")
        if name not in own:
            raise UserError(f"{path}: unknown key {key!r}; there are {', '.join(sorted(own))}")
        if name == "sweep":
            if not isinstance(value, dict) or not value:
                raise UserError(f"{path}: sweep: expected settings below it, as in `lr: [1e-5, 3e-5]`")
            listed = {each: values if isinstance(values, list) else [values] for each, values in value.items()}
            value = [f"{each}={','.join(map(_as_typed, values))}" for each, values in listed.items()]
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(_as_typed, values)]
    return words


def _as_typed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_args(words: list[str]) -> Args:
    """The tool's own settings; the command line wins over YAML files."""
    files: list[str] = []  # read here: a setting that is swept is no flag of this tool
    given: list[str] = []
    kept = given
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            kept = files if flag == "--config" else given
            word = value if kept is files else word
        kept += [word] if word else []
    args = parse_args(Args, argv=[*(word for path in files for word in from_yaml(Path(path))), *given])
    own = [text for text in args.sweep if text.partition("=")[0].lstrip("-") == "seed"]
    if own:  # a seed is no setting to choose: it shows how far results vary
        seeds = own[0].partition("=")[2].split(",")
        if args.seeds or not all(seed.strip().isdigit() for seed in seeds):
            raise UserError(f"--sweep {own[0]}: seeds are not chosen but averaged over: --seeds 1 2 3")
        args.sweep = tuple(text for text in args.sweep if text not in own)
        args.seeds = tuple(map(int, seeds))
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: a seed is there twice")
    if not args.sweep:
        raise UserError("nothing to sweep: --sweep lr=1e-5,3e-5 batch_size=16,32, or a range, lr=1e-5..1e-3:log")
    for name in ("trials", "parallel", "startup_trials", "prune_after"):
        if (value := getattr(args, name)) is not None and value < (0 if name == "startup_trials" else 1):
            raise UserError(f"--{name} {value}: at least {0 if name == 'startup_trials' else 1}")
    return args


def make_sweep(words: list[str]) -> Sweep:
    """All that a sweep is, from the command line; writes nothing.

    Raises:
        UserError: the script lacks a setting or does not take a value, or a flag cannot be swept.
    """
    ours, launcher, script, flags = split_words(words)
    args = read_args(ours)
    if args.direct and launcher:
        raise UserError(f"--direct: there is no launcher that could take {launcher[0]}")
    module = import_script(script)
    if not dataclasses.is_dataclass(getattr(module, "Args", None)):
        raise UserError(f"{script}: it has no Args; what can be swept is one of scripts/, or a copy")
    known, aliases = {each.name for each in dataclasses.fields(module.Args)}, getattr(module, "ALIASES", {})
    if missing := [name for name in (*NEEDED, *(["seed"] if args.seeds else [])) if name not in known]:
        raise UserError(f"{script}: its Args have no {missing[0]}; what can be swept is one of scripts/, or a copy")
    settings = read_settings(args.sweep, module.Args, aliases)
    swept = {setting.name for setting in settings} | ({"seed"} if args.seeds else set())
    if own := swept & {"output_dir", "run_name", "run_prefix", "config", *NEEDED}:
        raise UserError(f"--sweep {min(own)}: the sweep sets it")
    for name in sorted(swept):
        if len(without_flags(flags, {name}, aliases)) < len(flags):
            raise UserError(f"--{name} after {script.name}: it is swept; drop one of them")
    base = check_values(module, flags, settings, args.seeds)
    for name, why in (("resume", "the same command resumes the sweep"), ("push_to_hub", "every trial would be pushed"),
                      ("overwrite", "--run_name makes another sweep")):  # fmt: skip
        if getattr(base, name, None):
            raise UserError(f"--{name}: {why}; drop it here")
    metric = args.metric or getattr(base, "best_metric", None)
    if metric is None:
        raise UserError(f"{script}: its Args have no best_metric: name the metric with --metric")
    directions = {one.name: one.higher_is_better for one in getattr(module, "METRICS", ())}
    ranges = [setting for setting in settings if not setting.choices]
    sampler = args.sampler or ("tpe" if ranges else "grid")
    trials = args.trials or TRIALS
    if sampler == "grid":
        cells = len(grid(settings))
        trials = min(args.trials or cells, cells)
    plan = Plan(sampler, trials, args.sampler_seed, args.startup_trials, args.pruner, args.prune_after)
    titles = [getattr(module, name)(base) for name in ("data_title", "model_title") if hasattr(module, name)]
    default = "_".join([*(titles or [script.stem]), *(setting.name for setting in settings)])
    default = default.replace("/", "-").replace(" ", "-")
    folder = Path(base.output_dir) / f"{base.run_name or default}_sweep"
    others = {
        name: value for section, group in grouped(base).items() if section != "output" for name, value in group.items()
        if name not in {*swept, *IGNORED, "output_dir", "run_name"}
    }  # fmt: skip
    return Sweep(
        args, script, without_flags(flags, {"output_dir", "run_name"}, aliases), launcher, settings, plan, folder,
        others, metric, directions.get(metric, "loss" not in metric and "error" not in metric),
    )  # fmt: skip


def check_values(module: ModuleType, flags: list[str], settings: list[Setting], seeds: Sequence[int]) -> Any:
    """The script's ``Args`` with the first value of each setting; each other value is tried beside these.

    Raises:
        UserError: the script does not take a value, or takes two for the same; a setting has no effect.
    """
    aliases: Mapping[str, Alias] = getattr(module, "ALIASES", {})
    values: dict[str, list[Value]] = {}
    for setting in settings:
        low, high = (int(setting.low), int(setting.high)) if setting.whole else (setting.low, setting.high)
        values[setting.name] = list(setting.choices) or [low, high]

    def parsed(chosen: Mapping[str, Value], checked: bool = True) -> Any:
        words = [word for setting in settings for word in setting.words(chosen[setting.name])]
        args = parse_args(module.Args, aliases, [*flags, *words, *(["--seed", str(seeds[0])] if seeds else [])])
        if checked and hasattr(module, "check_args"):
            module.check_args(args)
        return args

    # What a setting needs, where that is a setting that is not swept.
    needs = getattr(module, "ONLY_WITH", {})
    conditions = {each: needs[each] for each in needs if each.removeprefix("not ").split()[0] not in values}
    firsts, lasts = ({name: each[place] for name, each in values.items()} for place in (0, -1))
    for setting in settings:
        seen: dict[str, Value] = {}
        for value in values[setting.name]:
            args = parsed({**firsts, setting.name: value}, checked=False)
            same = repr(getattr(args, setting.name))
            if same in seen:
                raise UserError(f"--sweep {setting.specification()}: {seen[same]} and {value} are the same")
            seen[same] = value
            idle = without_effect(args, conditions)
            if line := next((line for line in idle if line.startswith(f"--{setting.name} ")), None):
                raise UserError(f"--sweep {setting.specification()}: {line}")
            try:
                parsed({**firsts, setting.name: value})
            except UserError as error:  # a value may need another one of the other settings
                try:
                    parsed({**lasts, setting.name: value})
                except UserError:
                    raise UserError(f"--sweep {setting.specification()}: {error}") from None
    return parsed(firsts, checked=False)


# ---------------------------------------------------------------------------------------------------------- the study


def check_study(sweep: Sweep, search: Search) -> None:
    """Keeps what is swept with the study, or compares it with what was kept.

    Raises:
        UserError: the study is that of another sweep.
    """
    now = {
        "script": sweep.script.name,
        "sweep": {setting.name: setting.specification() for setting in sweep.settings},
        "seeds": list(sweep.args.seeds),
        "metric": sweep.metric,
        "grid": sweep.plan.sampler == "grid",
        "settings": sweep.base,
    }
    before = search.study.user_attrs.get("sweep")
    if before is None:
        search.study.set_user_attr("sweep", now)
        return
    other = f"{sweep.folder} is another sweep"
    way = "--run_name, after the script, makes one beside it"
    for name in ("script", "sweep", "seeds", "metric"):
        if before[name] != now[name]:
            then, here = (_in_words(each[name]) for each in (before, now))
            raise UserError(f"{other}: {name} was {then} there and is {here} now; {way}")
    if before["grid"] != now["grid"]:
        raise UserError(f"{other}: {'a grid' if before['grid'] else 'no grid'}; {way}")
    for name, value in now["settings"].items():
        if before["settings"].get(name, value) != value:
            then, here = (_in_words(each) for each in (before["settings"][name], value))
            raise UserError(f"{other}: --{name} was {then} there and is {here} now; {way}")


def _in_words(value: object) -> str:
    values = list(value.values()) if isinstance(value, dict) else value
    return " ".join(map(str, values)) or "none" if isinstance(values, list) else str(values)


def check_folder(folder: Path) -> None:
    """UserError where the folder of the sweep cannot be made or is something else."""
    check_can_be_made(folder, "--output_dir")
    if folder.is_file() or runs.is_run(folder):
        what = "a file" if folder.is_file() else "a run"
        raise UserError(f"{folder}: exists and is {what}; choose another --run_name, after the script")


# ---------------------------------------------------------------------------------------------------------- trials


def command_of(sweep: Sweep, values: Mapping[str, Value], seed: str, more: Sequence[str] = ()) -> list[str]:
    """The flags of the script for a trial and a seed."""
    words = [word for setting in sweep.settings for word in setting.words(values[setting.name])]
    return [*sweep.flags, *words, *(["--seed", seed] if sweep.args.seeds else []), *more]


def begin(sweep: Sweep, search: Search, trial: Trial, slot: int, signals: Signals) -> Job | None:
    """Starts a trial, or resumes it; None: it has the settings of an earlier one, and so its results.

    Raises:
        UserError: a folder of its name is there, but not of this study.
    """
    name = f"trial_{trial.number:04d}"
    folders = {seed: sweep.folder / (name if seed == "-" else f"{name}_seed{seed}") for seed in sweep.seeds}
    if not trial.was_started:
        if strange := next((folder for folder in folders.values() if not is_unused(folder)), None):
            leave_trial(search, trial.number)
            raise UserError(f"{strange} is there, but the study does not know it: move it away, then the same command")
        for other in tried(search):
            if other.state == "complete" and other.values == trial.values and other.number != trial.number:
                details = {"results": other.results, "seconds": 0.0, "error": f"repeats trial {other.number}"}
                finish_trial(search, trial, "complete", other.value, {**other.details, **details})
                return None
    mark_started(trial)
    stop = Signals(list(signals.received), signals.running)
    job = Job(trial, folders, sweep.folder / "logs" / f"{name}.txt", slot, stop)
    job.log.parent.mkdir(exist_ok=True)
    job.thread = threading.Thread(target=train, args=(sweep, job), daemon=True)
    job.thread.start()
    return job


def train(sweep: Sweep, job: Job) -> None:
    """The runs of a trial, one after the other; those that are finished are kept. In the job's thread."""
    try:
        for seed, folder in job.runs.items():
            if runs.is_finished(folder) or not wait_until_free(folder, job.stop):
                continue
            if runs.is_finished(folder):  # by a process that outlived the tool that began it
                continue
            where = ["--output_dir", str(sweep.folder), "--run_name", folder.name]
            resume = [] if is_unused(folder) else ["--resume"]
            flags = command_of(sweep, job.trial.values, seed, [*where, *resume])
            if sweep.args.direct:
                command = [sys.executable, str(sweep.script), *flags]
            else:
                command = accelerate_command(sweep.script, flags, sweep.launcher)
            code = run_script(command, job.stop, job.log, slot_environment(sweep, job.slot))
            if code:
                job.code = code
                return
        job.code = 0 if all(map(runs.is_finished, job.runs.values())) else 128 + signal.SIGTERM
    except Exception as error:
        job.code, job.error = 1, f"{type(error).__name__}: {first_line(error)}"


def wait_until_free(folder: Path, stop: Signals) -> bool:
    """Waits until no process trains in a run's folder: that of a tool that was killed saves first. False: stopped."""
    while not stop.received:
        if not (folder / LOCK).exists():
            return True
        try:
            with locked(folder / LOCK, patience=0.5):
                return True
        except BlockingIOError:
            continue
    return False


def visible_gpus() -> list[str]:
    """The ids of the GPUs that trials are dealt to."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(count_gpus())] if named is None else [i for i in named.split(",") if i]


def slot_environment(sweep: Sweep, slot: int) -> dict[str, str]:
    """The variables of a trial in one of ``parallel`` places: its part of the GPUs or, without any, of the cores."""
    places = sweep.args.parallel
    if places == 1:
        return {}
    if gpus := sweep.gpus:
        each = max(1, len(gpus) // places)
        own = [gpus[(slot * each + number) % len(gpus)] for number in range(each)]
        return {"CUDA_VISIBLE_DEVICES": ",".join(own)}
    if "OMP_NUM_THREADS" in os.environ or any("--num_cpu_threads" in word for word in sweep.launcher):
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // places))}


def follow(sweep: Sweep, job: Job) -> None:
    """Reports the evaluations of a trial's first seed to the study, and stops the trial where the pruner says so."""
    first = next(iter(job.runs.values()))
    try:
        rows = read_history(first, "validation")
    except (OSError, UserError):
        return
    known = job.trial.reported if len(rows) > job.evaluations else set()
    for number, row in enumerate(rows[job.evaluations :], start=job.evaluations + 1):
        job.evaluations = number
        value = row.get(metric_of(sweep, first))
        if not isinstance(value, int | float) or not math.isfinite(value):
            continue
        better = job.best is None or (value > job.best if sweep.higher else value < job.best)
        job.best = value if better else job.best
        if number not in known:
            job.trial.optuna.report(job.best, number)
        # With several seeds the first one decides; the others are trained to the end.
        if sweep.plan.pruner != "none" and not job.pruned and not runs.is_finished(first):
            job.pruned = job.trial.optuna.should_prune()
            if job.pruned:
                job.trial.optuna.set_user_attr("pruned", number)


def metric_of(sweep: Sweep, run: Path) -> str:
    """The metric of a run: what was asked for, or what the run chose for its kind of labels."""
    if sweep.args.metric is None:
        with contextlib.suppress(UserError):
            sweep.metric = runs.read_settings(run).get("best_metric") or sweep.metric
    return sweep.metric


def outcome(sweep: Sweep, job: Job) -> tuple[str, float | None, dict[str, Any]]:
    """(state, value, entries for the study) of a trial that has ended.

    Raises:
        UserError: the runs do not have the metric.
    """
    details: dict[str, Any] = {"host": socket.gethostname(), "runs": {s: str(run) for s, run in job.runs.items()}}
    if job.pruned and (job.code != 0 or not all(map(runs.is_finished, job.runs.values()))):
        seconds = time.monotonic() - job.started
        return "pruned", None, {**details, "seconds": seconds}
    if job.code:
        said = job.error or (how_it_ended(job.code) if job.code > 128 else "")
        if not said and job.log.is_file():
            said = last_line(job.log).removeprefix("error: ")
        return "failed", None, {**details, "error": said or how_it_ended(job.code)}
    scores, tests, seconds = {}, {}, 0.0
    for seed, run in job.runs.items():
        results = runs.read_results(run)
        metric, validation = metric_of(sweep, run), results.get("validation", {})
        if metric not in validation:
            there = [name for name, value in validation.items() if isinstance(value, float)]
            raise UserError(f"--metric {metric}: {run} has {', '.join(there) or 'no validation rows'}")
        scores[seed] = float(validation[metric])
        if isinstance(results.get("test"), dict) and metric in results["test"]:
            tests[seed] = float(results["test"][metric])
        seconds += float(results.get("seconds", 0))
    details |= {"results": scores, "tests": tests, "seconds": seconds}
    value, _ = report.mean_interval(list(scores.values()))
    if not math.isfinite(value):
        return "failed", None, {**details, "error": f"{sweep.metric} is {value}"}
    return "complete", value, details


def run_all(sweep: Sweep, search: Search, signals: Signals, screen: Screen) -> None:
    """Runs trials until there are enough, ``parallel`` at a time.

    Raises:
        Stopped: this process, or a trial, got a signal to stop; running trials have saved, and are resumed next time.
    """
    jobs: list[Job] = []
    ended = 0  # the code of a trial that somebody else stopped
    try:
        while True:
            while len(jobs) < sweep.args.parallel and not signals.received and not ended:
                trial = next_trial(search)
                if trial is None:
                    break
                if trial.adopted and "pruned" in trial.optuna.user_attrs:  # killed while it was being stopped
                    finish_trial(search, trial, "pruned", None, {})
                    continue
                slot = min(set(range(sweep.args.parallel)) - {job.slot for job in jobs})
                job = begin(sweep, search, trial, slot, signals)
                event = "goes on" if trial.adopted else "starts" if job else "repeats an earlier one"
                screen.say(f"trial {trial.number} {event}", trial.values)
                jobs += [job] if job else []
            if not jobs:
                break
            time.sleep(POLL)
            for job in list(jobs):
                follow(sweep, job)
                asked = signals.received or ([signal.SIGTERM] if job.pruned or ended else [])
                job.stop.received[:] = asked
                if job.thread.is_alive():
                    continue
                follow(sweep, job)
                jobs.remove(job)
                if job.code and was_stopped(job.code) and not job.pruned:
                    ended = ended or job.code
                    leave_trial(search, job.trial.number)
                    screen.say(f"trial {job.trial.number} was stopped", {})
                    continue
                state, value, details = outcome(sweep, job)
                finish_trial(search, job.trial, state, value, details)
                screen.say_end(tried(search), job.trial.number)
            screen.draw(search, jobs)
    finally:
        for job in jobs:  # an error here: the scripts save and leave
            job.stop.received[:] = [signal.SIGTERM]
        for job in jobs:
            job.thread.join()
            leave_trial(search, job.trial.number)
    if signals.received or ended:
        code = 128 + signals.received[0] if signals.received else ended
        done = sum(trial.state != "running" for trial in tried(search))
        raise Stopped(f"Stopped after {done} of {sweep.plan.trials} trials: the same command resumes", code)


# ----------------------------------------------------------------------------------------------------------- output


@dataclass
class Screen:
    """What is shown meanwhile: a table that is drawn anew on a terminal, a line for each event elsewhere."""

    sweep: Sweep
    is_live: bool = field(default_factory=lambda: sys.stdout.isatty())
    drawn: int = 0  # lines on the terminal
    shown: str = ""
    last: float = 0.0

    def say(self, event: str, values: Mapping[str, Value]) -> None:
        """An event, with a trial's settings."""
        settings = ", ".join(f"{one.name} {one.shown(values[one.name])}" for one in self.sweep.settings if values)
        if not self.is_live:
            print(event + (f": {settings}" if settings else ""), flush=True)

    def say_end(self, trials: Sequence[Tried], number: int) -> None:
        """How a trial ended."""
        trial = next(each for each in trials if each.number == number)
        done = sum(each.state != "running" for each in trials)
        result = shorten_error(trial) or f"{self.sweep.metric} {report.shown_result(trial)}"
        self.say(f"trial {number} {trial.state}, {result}  ({done} of {self.sweep.plan.trials} done)", {})

    def draw(self, search: Search, jobs: Sequence[Job]) -> None:
        """The table, where it is live: the best trials, those that run, and the last that failed."""
        if not self.is_live or time.monotonic() - self.last < 0.5:
            return
        self.last = time.monotonic()
        text = "\n".join(self.lines(tried(search), jobs))
        if text != self.shown:
            self.clear()
            print(text, flush=True)
            self.shown, self.drawn = text, text.count("\n") + 1

    def clear(self) -> None:
        """Removes the table."""
        if self.drawn:
            print(f"\033[{self.drawn}F\033[J", end="", flush=True)
        self.shown, self.drawn = "", 0

    def lines(self, trials: Sequence[Tried], jobs: Sequence[Job]) -> list[str]:
        """The lines of the table, none longer than the terminal is wide."""
        sweep, (width, height) = self.sweep, shutil.get_terminal_size()
        ranked = report.best_first(trials, sweep.higher)
        running = [trial for trial in ranked if trial.state == "running"]
        ended = [trial for trial in ranked if trial.state != "running"]
        room = max(3, min(SHOWN_ROWS, height - 4 - len(running)))
        rows = report.trial_rows([*ended[:room], *running], sweep.settings, sweep.metric)
        progress = {
            str(job.trial.number): (
                "" if job.best is None else f"{job.best:.4f}", f"{time.monotonic() - job.started:,.0f} s",
                f"{job.evaluations} evaluations",
            )
            for job in jobs
        }  # fmt: skip
        rows = [(*row[:-3], *progress[row[0]]) if row[1] == "running" and row[0] in progress else row for row in rows]
        counts = ", ".join(f"{sum(trial.state == state for trial in trials)} {state}"
                           for state in ("complete", "running", "pruned", "failed")
                           if any(trial.state == state for trial in trials))  # fmt: skip
        head = f"{sweep.folder}: {len(ended)} of {sweep.plan.trials} done; {counts or 'none yet'}"
        return [line[: width - 1] for line in [head, *aligned_rows(rows, left=2).splitlines()]]


def shorten_error(trial: Tried) -> str:
    """The error of a failed trial, in one line."""
    from accelerando.report.plots import shorten

    return shorten(trial.error, 200) if trial.state == "failed" else ""


def best_command(sweep: Sweep, best: Tried) -> str:
    """The command that trains the best settings again, under the script's own name for the run."""
    flags = command_of(sweep, best.values, sweep.seeds[0])
    if sweep.args.direct:
        return shlex.join(["python", str(sweep.script), *flags])
    launcher = sweep.launcher or default_launcher(CONFIGS)
    return shlex.join(["accelerate", "launch", *without_port(launcher), str(sweep.script), *flags])


def without_port(launcher: list[str]) -> list[str]:
    """The launcher's flags as they were given: without the free port that trials at the same time need."""
    return launcher[:-2] if launcher[-2:] == FREE_PORT else launcher


FREE_PORT = ["--main_process_port", "0"]


def remarks(sweep: Sweep, ranked: Sequence[Tried]) -> list[str]:
    """What a reader of the table has to know."""
    complete = [trial for trial in ranked if trial.state == "complete"]
    notes = [f"{sweep.metric}: of the validation rows, by which the best is chosen, so it flatters the best."]
    if not sweep.args.seeds:
        notes.append("One seed each: small differences may be chance; --seeds 1 2 3 shows how far results vary.")
    else:
        notes.append(f"± is half the 95 % interval (Student's t) of the mean over {len(sweep.args.seeds)} seeds.")
        if near := report.within_best(complete):
            names = ", ".join(str(trial.number) for trial in near)
            notes.append(f"Within the best one's interval: trial{'s' if len(near) > 1 else ''} {names}.")
    return notes


def write_results(sweep: Sweep, search: Search) -> str:
    """Writes the results of all trials so far; returns the summary."""
    trials = tried(search)
    ranked = report.best_first(trials, sweep.higher)
    complete = [trial for trial in ranked if trial.state == "complete"]
    rows = report.trial_rows(ranked, sweep.settings, sweep.metric)
    notes = remarks(sweep, ranked)
    shares = importances(search, sweep.seeds) if complete else {}
    pictures, commands = {}, {"Repeat this sweep": command_line()}
    if complete:
        plots = sweep.folder / "plots"
        draw = (complete, sweep.settings, sweep.metric, sweep.higher)
        pictures["Each setting"] = report.plot_settings(*draw, plots / "settings.png")
        pictures["Settings together"] = report.plot_parallel(*draw, plots / "parallel_coordinates.png")
        commands = {"Best settings": best_command(sweep, complete[0]), **commands}
    counts = f"{len(trials)} of {sweep.plan.trials} trials, {sweep.plan.sampler}"
    counts += f", {len(sweep.args.seeds)} seeds each" if sweep.args.seeds else ""
    title = f"Sweep: {sweep.folder.name}"
    report.write_page(
        sweep.folder / "report.html", title, counts, trials, sweep.settings, sweep.metric, sweep.higher, shares,
        pictures, commands, notes,
    )  # fmt: skip
    lines = [title, counts, "", aligned_rows(rows, left=2), "", *notes]
    if complete and complete[0].details.get("tests"):
        shown = report.shown_mean(list(complete[0].details["tests"].values()))
        lines.append(f"test {sweep.metric} of the best: {shown}")
    if shares:
        lines += ["", "importance (share of the metric's variance)"]
        lines.append(aligned_rows([(f"  {name}", share) for name, share in report.importance_rows(shares)]))
    for name, text in commands.items():
        lines += ["", f"{name}:", f"  {text}"]
    summary = "\n".join([*lines, ""])
    write_text(sweep.folder / "summary.txt", summary)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    names = [setting.name for setting in sweep.settings]
    writer.writerow(["trial", "state", *names, sweep.metric, *(f"seed_{seed}" for seed in map(str, sweep.args.seeds)),
                     "seconds", "error"])  # fmt: skip
    for trial in trials:
        seeds = [trial.results.get(str(seed), "") for seed in sweep.args.seeds]
        values = [trial.values.get(name, "") for name in names]
        writer.writerow([trial.number, trial.state, *values, trial.value, *seeds, trial.seconds, trial.error])
    write_text(sweep.folder / "trials.csv", table.getvalue())
    results = {
        "metric": sweep.metric,
        "higher_is_better": sweep.higher,
        "sampler": sweep.plan.sampler,
        "seeds": list(sweep.args.seeds),
        "best": as_json(complete[0]) if complete else None,
        "best_command": commands.get("Best settings"),
        "importance": {name: sum(each) / len(each) for name, each in shares.items()},
        "importance_of_seeds": shares,
        "trials": [as_json(trial) for trial in trials],
        "command": command_line(),
    }
    write_text(sweep.folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return summary


def as_json(trial: Tried) -> dict[str, Any]:
    """A trial as an entry of results.json."""
    half = report.mean_interval(list(trial.results.values()))[1] if trial.results else None
    return {
        "trial": trial.number, "state": trial.state, "settings": trial.values, "value": trial.value,
        "interval": half, "results": trial.results, "seconds": trial.seconds,
        **({"error": trial.error} if trial.error else {}), **trial.details,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        parse_args(Args, argv=["--help"])
    sweep = make_sweep(words)
    check_optuna()
    check_folder(sweep.folder)
    search = open_search(
        sweep.folder, sweep.args.storage, "maximize" if sweep.higher else "minimize", sweep.settings, sweep.plan
    )
    check_study(sweep, search)
    screen = Screen(sweep)
    open_trials = [trial for trial in tried(search) if trial.state == "running"]
    if len(tried(search)) < sweep.plan.trials or open_trials:
        if not sweep.args.direct:
            sweep.launcher = sweep.launcher or default_launcher(CONFIGS)
        if sweep.args.parallel > 1:
            sweep.gpus = visible_gpus()
            if not sweep.args.direct and "--main_process_port" not in " ".join(sweep.launcher):
                sweep.launcher = [*sweep.launcher, *FREE_PORT]
        with Signals() as signals:
            try:
                run_all(sweep, search, signals, screen)
            finally:
                screen.clear()
    summary = write_results(sweep, search)
    print(f"\n{summary}\nReport: {sweep.folder / 'report.html'}")
    elsewhere = sum(trial.state == "running" for trial in tried(search))
    if elsewhere:
        print(f"Running elsewhere: {elsewhere}; once they have ended, the same command shows all")
    failed = [trial for trial in tried(search) if trial.state == "failed"]
    if not elsewhere and failed and not any(trial.state in ("complete", "pruned") for trial in tried(search)):
        raise UserError(f"no trial was completed: {failed[-1].error}; {sweep.folder / 'logs'} has what they said")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
