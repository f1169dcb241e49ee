"""A search for settings with Optuna: what is varied, the study in its storage, and which trial is next.

A study may be worked on by several processes and machines. Optuna's storage numbers the trials, so none is given out
twice; a trial whose process was killed is given out again, to go on with it::

    settings = read_settings(["lr=1e-5..1e-3:log", "batch_size=16,32"], Args, ALIASES)
    search = open_search(folder, None, "maximize", settings, plan)
    while (trial := next_trial(search)) is not None:
        ...                                       # trial.values: {"lr": 0.00021, "batch_size": "16"}
        trial.optuna.report(...), finish_trial(search, trial, "complete", value, {...})

Optuna is an optional package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelerando.base.config import COMMON_ALIASES, Alias
from accelerando.base.errors import UserError, first_line
from accelerando.base.files import locked

if TYPE_CHECKING:
    import optuna
    from _typeshed import DataclassInstance

Sampler = Literal["grid", "random", "tpe"]
Pruner = Literal["none", "median", "halving"]
State = Literal["complete", "pruned", "failed", "running"]
Value = str | int | float  # a choice as it was typed, or a number of a range

MOST_CELLS = 10_000  # of a grid
UNCLAIMED = 60.0  # seconds after which a running trial that nobody has signed is one of a killed process
REDUCTION = 3  # halving: the share of trials that goes on is one in this many (Li et al. 2018, eta)
SURPLUS, PLACE, STARTED = "surplus", "place", "started"  # user attributes of trials


# --------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    """A flag that is varied: ``choices`` as they were typed, or the range from ``low`` to ``high``."""

    name: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    whole: bool = False  # a range of whole numbers
    several: bool = False  # the flag takes several values: the words of a choice

    def words(self, value: Value) -> list[str]:
        """The flag with ``value``, as a script takes it."""
        text = repr(value) if isinstance(value, float) else str(value)
        words = text.split() if self.several else [text]
        if len(words) == 1 and words[0].startswith("-"):
            return [f"--{self.name}={words[0]}"]
        return [f"--{self.name}", *words]

    def shown(self, value: Value) -> str:
        """``value`` for a table."""
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    def specification(self) -> str:
        """What was typed, in one spelling: two of the same search are equal."""
        if self.choices:
            return f"{self.name}={','.join(self.choices)}"
        ends = (self.low, self.high, *([self.step] if self.step and not self.log else []))
        numbers = [str(int(end)) if self.whole else repr(float(end)) for end in ends]
        tail = ":log" if self.log else f":{numbers[2]}" if numbers[2:] else ""
        return f"{self.name}={numbers[0]}..{numbers[1]}{tail}"

    def cells(self) -> list[str]:
        """All values, for a grid.

        Raises:
            UserError: a range without a step has no end of them.
        """
        if self.choices:
            return list(self.choices)
        if self.log or not self.step:
            raise UserError(
                f"--sweep {self.specification()}: a grid needs values (1,2,3) or a step ({self.low:g}..{self.high:g}:"
                "STEP); --sampler random or tpe takes the range"
            )
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        if count > MOST_CELLS:
            raise UserError(f"--sweep {self.specification()}: {count:,} values are too many for a grid")
        return [f"{self.low + number * self.step:.10g}" for number in range(count)]


def read_settings(
    specifications: Sequence[str], cls: type[DataclassInstance], aliases: Mapping[str, Alias]
) -> list[Setting]:
    """The settings that ``name=values`` describe, of a script with the arguments ``cls``.

    ``values``: ``1e-5,3e-5`` for choices; ``1e-5..1e-3:log`` or ``0..0.5`` for a range, ``0..0.5:0.1`` with a step.

    Raises:
        UserError: a setting that the script lacks, no values, an empty range, the same setting twice.
    """
    fields = {each.name: each for each in dataclasses.fields(cls)}
    found: dict[str, Setting] = {}
    for text in specifications:
        given, equals, values = text.partition("=")
        name = field_name(given.lstrip("-"), cls, aliases)
        if not equals or not values.strip():
            raise UserError(f"--sweep {text}: no values; as in {name}=1,2,3 or {name}=1..3")
        if name in found:
            raise UserError(f"--sweep {text}: {name} is there twice")
        found[name] = _read_values(text, name, values.strip(), str(fields[name].type))
    return list(found.values())


def field_name(name: str, cls: type[DataclassInstance], aliases: Mapping[str, Alias]) -> str:
    """The field of ``cls`` that ``name`` or one of its other spellings stands for.

    Raises:
        UserError: there is none, or the other spelling stands for a value too.
    """
    import difflib

    fields = [each.name for each in dataclasses.fields(cls)]
    table = {**COMMON_ALIASES, **aliases}
    target: Alias = name.replace("-", "_")
    for _ in range(3):  # an alias of an alias
        if isinstance(target, str) and target not in fields:
            target = table.get(target, target)
    if isinstance(target, tuple):
        raise UserError(f"--sweep {name}: sweep {target[0]} itself, which it stands for")
    if target not in fields:
        close = difflib.get_close_matches(target, fields, n=1, cutoff=0.6)
        raise UserError(f"--sweep {name}: the script has no such setting" + (f"; {close[0]}?" if close else ""))
    return target


def _read_values(text: str, name: str, values: str, kind: str) -> Setting:
    is_number = bool(re.search(r"\b(int|float)\b", kind)) and not kind.startswith("tuple")
    whole = is_number and "float" not in kind
    match = re.fullmatch(r"([^,\s]+?)\.\.([^,\s:]+)(?::(\S+))?", values)
    if not match or not is_number:
        choices = tuple(part.strip() for part in values.split(","))
        if "" in choices:
            raise UserError(f"--sweep {text}: an empty value between the commas")
        if repeated := next((one for one in choices if choices.count(one) > 1), None):
            raise UserError(f"--sweep {text}: {repeated} is there twice")
        return Setting(name, choices, several=kind.startswith("tuple"))
    try:
        low, high = float(match[1]), float(match[2])
        log = match[3] == "log"
        step = None if log or not match[3] else float(match[3])
    except ValueError:
        raise UserError(f"--sweep {text}: not a range; as in {name}=1..3, 1..3:0.5 (a step) or 1..100:log") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"--sweep {text}: an empty range, {match[1]} is not below {match[2]}")
    if log and low <= 0:
        raise UserError(f"--sweep {text}: a logarithmic range begins above 0")
    if step is not None and not 0 < step <= high - low:
        raise UserError(f"--sweep {text}: the step {match[3]} does not fit into the range")
    if whole and any(number != int(number) for number in (low, high, step or 1)):
        raise UserError(f"--sweep {text}: {name} takes whole numbers")
    return Setting(name, (), low, high, step or (1.0 if whole and not log else None), log, whole)


# ------------------------------------------------------------------------------------------------------------ study


@dataclass
class Plan:
    """How settings are chosen and how many. ``trials``: in all, those of earlier starts included."""

    sampler: Sampler
    trials: int
    seed: int = 0
    startup: int = 8  # tpe: random trials before it; pruner: finished trials before one is stopped
    pruner: Pruner = "none"
    prune_after: int = 1  # evaluations of a trial before it may be stopped


@dataclass
class Search:
    """An open study."""

    folder: Path
    study: optuna.Study
    settings: list[Setting]
    plan: Plan
    held: dict[int, contextlib.ExitStack] = field(default_factory=dict)  # locks of the trials that run here


@dataclass
class Trial:
    """A trial that is given to this process: its ``values`` by setting; ``adopted`` from a process that was killed."""

    number: int
    values: dict[str, Value]
    optuna: optuna.Trial
    adopted: bool

    @property
    def was_started(self) -> bool:
        """Whether its runs were begun, by :func:`mark_started`."""
        return STARTED in self.optuna.user_attrs

    @property
    def reported(self) -> set[int]:
        """The evaluations that the study knows."""
        return set(self.optuna._get_latest_trial().intermediate_values)


@dataclass
class Tried:
    """What the study has of a trial: ``results`` by seed, their mean or the value so far, seconds, the error."""

    number: int
    state: State
    values: dict[str, Value]
    value: float | None = None
    results: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    error: str = ""
    details: dict[str, Any] = field(default_factory=dict)  # the other user attributes


def check_optuna() -> None:
    """UserError where Optuna is not installed."""
    import importlib.util

    if importlib.util.find_spec("optuna") is None:
        raise UserError("a sweep needs optuna: pip install optuna")


def open_search(
    folder: Path, storage: str | None, direction: Literal["maximize", "minimize"], settings: list[Setting], plan: Plan
) -> Search:
    """Opens the study named like ``folder``, or makes it.

    ``storage``: a database URL, the path of a journal file, or None: SQLite in ``folder``.

    Raises:
        UserError: the storage cannot be opened.
    """
    check_optuna()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    pruner = {
        "none": optuna.pruners.NopPruner,
        "median": lambda: optuna.pruners.MedianPruner(plan.startup, plan.prune_after),
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(plan.prune_after, REDUCTION),
    }[plan.pruner]()
    try:
        # Two processes that start at once both make SQLite's tables.
        with locked(folder / ".study.lock"):
            study = optuna.create_study(
                storage=_storage(folder, storage), study_name=folder.name, direction=direction, pruner=pruner,
                sampler=optuna.samplers.RandomSampler(), load_if_exists=True,
            )  # fmt: skip
    except Exception as error:  # a driver that is missing, a server that does not answer, a file of something else
        raise UserError(f"--storage {storage or folder / 'study.db'}: {first_line(error)}") from None
    if study.direction.name.lower() != direction:
        raise UserError(f"{folder}: its metric is to be {study.direction.name.lower()}d, not {direction}d")
    return Search(folder, study, settings, plan)


def _storage(folder: Path, storage: str | None) -> optuna.storages.BaseStorage:
    import optuna

    if storage and "://" not in storage:
        from optuna.storages.journal import JournalFileBackend

        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(storage))
    url = storage or f"sqlite:///{(folder / 'study.db').resolve()}"
    wait = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    return optuna.storages.RDBStorage(url, engine_kwargs=wait)


def grid(settings: Sequence[Setting]) -> list[dict[str, str]]:
    """Every combination of all values, the last setting changing fastest.

    Raises:
        UserError: a range without a step; too many combinations.
    """
    values = [setting.cells() for setting in settings]
    if (count := math.prod(map(len, values))) > MOST_CELLS:
        raise UserError(f"--sampler grid: {count:,} combinations; --sampler random or tpe with --trials tries some")
    names = [setting.name for setting in settings]
    return [dict(zip(names, cell, strict=True)) for cell in itertools.product(*values)]


def next_trial(search: Search) -> Trial | None:
    """A trial for this process to run: one of a process that was killed, or a new one; None: there are enough.

    Call :func:`finish_trial` when it has ended, or :func:`leave_trial` to have it resumed later.
    """
    import optuna

    study = search.study
    counted = [trial for trial in study.get_trials(deepcopy=False) if not trial.user_attrs.get(SURPLUS)]
    for trial in counted:
        if trial.state == optuna.trial.TrialState.RUNNING and _take_over(search, trial):
            return _opened(search, trial.number, trial._trial_id, adopted=True)
    if len(counted) >= search.plan.trials:
        return None
    asked = study.ask()
    _hold(search, asked.number)
    asked.set_user_attr(PLACE, _place(search))
    return _opened(search, asked.number, asked._trial_id, adopted=False)


def _opened(search: Search, number: int, identity: int, adopted: bool) -> Trial | None:
    import warnings

    import optuna

    study, plan = search.study, search.plan
    trials = study.get_trials(deepcopy=False)
    rank = sum(trial.number < number and not trial.user_attrs.get(SURPLUS) for trial in trials)
    if rank >= plan.trials and not adopted:  # two processes asked for the last one at the same time
        optuna.Trial(study, identity).set_user_attr(SURPLUS, True)
        study.tell(number, state=optuna.trial.TrialState.FAIL)
        leave_trial(search, number, remove=True)
        return None
    # A sampler for each trial: what it draws depends on the seed, the number and the results so far, and not on which
    # process draws it, or after how many restarts.
    seed = plan.seed * 100_003 + number
    samplers = {
        "grid": lambda: optuna.samplers.PartialFixedSampler(
            grid(search.settings)[rank], optuna.samplers.RandomSampler(seed)
        ),
        "random": lambda: optuna.samplers.RandomSampler(seed),
        "tpe": lambda: optuna.samplers.TPESampler(n_startup_trials=plan.startup, seed=seed),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler = samplers[plan.sampler]()
        trial = optuna.Trial(study, identity)
        values = {setting.name: _suggested(trial, setting, plan.sampler) for setting in search.settings}
    return Trial(number, values, trial, adopted)


def _suggested(trial: optuna.Trial, setting: Setting, sampler: Sampler) -> Value:
    if setting.choices or sampler == "grid":
        return trial.suggest_categorical(setting.name, setting.cells())
    if setting.whole:
        step = 1 if setting.log else int(setting.step or 1)
        return trial.suggest_int(setting.name, int(setting.low), int(setting.high), step=step, log=setting.log)
    return trial.suggest_float(setting.name, setting.low, setting.high, step=setting.step, log=setting.log)


def mark_started(trial: Trial) -> None:
    """Says in the study that the runs of a trial begin: from now on their folders are its own."""
    trial.optuna.set_user_attr(STARTED, True)


def finish_trial(search: Search, trial: Trial, state: State, value: float | None, details: Mapping[str, Any]) -> None:
    """Records the end of a trial. ``value`` of a complete one; ``details``: entries that the study keeps with it.

    A trial that was pruned has the value it had last.
    """
    from optuna.trial import TrialState

    for name, entry in details.items():
        trial.optuna.set_user_attr(name, entry)
    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    search.study.tell(trial.number, value if state == "complete" else None, state=states[state])
    leave_trial(search, trial.number, remove=True)


def leave_trial(search: Search, number: int, remove: bool = False) -> None:
    """Lets go of a trial; one that has not ended is given out again."""
    if (held := search.held.pop(number, None)) is not None:
        if remove:
            _lock_of(search, number).unlink(missing_ok=True)
        held.close()


def tried(search: Search) -> list[Tried]:
    """All trials so far, by number."""
    found = []
    names = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "running"}
    for trial in search.study.get_trials(deepcopy=False):
        notes = dict(trial.user_attrs)
        if notes.pop(SURPLUS, False):
            continue
        for name in (PLACE, STARTED):
            notes.pop(name, None)
        value = trial.value if trial.state.is_finished() else None
        own = {name: notes.pop(name, default) for name, default in (("results", {}), ("seconds", None), ("error", ""))}
        found.append(Tried(trial.number, names[trial.state.name], dict(trial.params), value, details=notes, **own))
    return found


def importances(search: Search, seeds: Sequence[str]) -> dict[str, list[float]]:
    """Setting -> the share of the metric's variance that it explains, for each seed (functional ANOVA, Hutter et al.
    2014). Empty where that cannot be told: fewer than four complete trials, or no difference between them."""
    import optuna
    from optuna.trial import TrialState

    complete = search.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    varied = [one.name for one in search.settings if len({trial.params[one.name] for trial in complete}) > 1]
    found: dict[str, list[float]] = {name: [] for name in varied}
    for seed in seeds:
        results = [trial.user_attrs["results"][seed] for trial in complete]
        if len(complete) < 4 or not varied or max(results) == min(results):
            return {}
        shares = optuna.importance.get_param_importances(
            search.study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0), params=varied,
            target=lambda trial, seed=seed: trial.user_attrs["results"][seed],
        )  # fmt: skip
        for name, share in shares.items():
            found[name].append(float(share))
    return found


# ------------------------------------------------------------------------------------------------------------ locks


def _lock_of(search: Search, number: int) -> Path:
    return search.folder / ".running" / f"trial_{number:04d}.lock"


def _place(search: Search) -> str:
    return f"{socket.gethostname()}:{search.folder.resolve()}"


def _hold(search: Search, number: int) -> bool:
    """Takes the lock of a trial, which ends with this process; False: another process has it."""
    path = _lock_of(search, number)
    path.parent.mkdir(exist_ok=True)
    lock = contextlib.ExitStack()
    try:
        lock.enter_context(locked(path, patience=0))
    except BlockingIOError:
        return False
    search.held[number] = lock
    return True


def _take_over(search: Search, trial: optuna.trial.FrozenTrial) -> bool:
    """Takes a running trial if the process that ran it in this folder is gone; then nobody else can take it."""
    from optuna.trial import TrialState

    if trial.number in search.held:
        return False
    place = trial.user_attrs.get(PLACE)
    started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    unsigned = place is None and time.time() - started > UNCLAIMED
    if not (_lock_of(search, trial.number).exists() or place == _place(search) or unsigned):
        return False  # of a machine with another disk
    if not _hold(search, trial.number):
        return False
    now = search.study.get_trials(deepcopy=False)[trial.number]  # it may have ended between the look and the lock
    if now.state == TrialState.RUNNING:
        return True
    leave_trial(search, trial.number, remove=True)
    return False
