"""Finished runs of any task, and sets of them: runs of the same settings that differ in their seed or fold alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerando.base.config import flat_settings
from accelerando.base.errors import UserError
from accelerando.inference import runs

SPLITS = ("test", "validation", "train")
NOT_METRICS = ("count",)
# Settings outside of the section "output" that make no other experiment.
IGNORED = ("seed", "fold", "cache_dir", "num_workers", "auto_workers", "pin_memory", "eval_batch_size")
FOLD = re.compile(r"(fold[_-]?)(\d+)")  # in a path, where each fold has files of its own
SEED_OR_FOLD = re.compile(r"[_-]?(?:seed|fold)[_-]?\d+")  # in the name of a run
DATA = ("train_file", "data_dir", "train_data", "keypoints_train", "features_train")  # settings that name the data
NAMES = ("label_names", "gloss_names")  # of the classes, in results.json
MAIN = ("accuracy", "gloss_accuracy", "recall_mean", "f1_macro", "pearson", "loss")  # the first that there is
LOWER_IS_BETTER = re.compile(r"(^|_)(loss|mse|mae|median_rank|epsilon)$")


@dataclass
class FinishedRun:
    """A run with its results; ``metrics`` are those of ``split``, with those of other splits as ``split.metric``.

    ``settings``: those that make another experiment, by name; ``task``: the script's name; ``data``: a short name.
    """

    folder: Path
    results: dict[str, Any]
    split: str
    metrics: dict[str, float]
    count: int
    settings: dict[str, Any]
    task: str
    data: str
    key: tuple[int, int]  # seed and fold

    @cached_property
    def answers(self) -> runs.Answers | None:
        """What it predicted of the split; None: there is no table of predictions with labels."""
        return runs.read_answers(self.folder, self.split)


@dataclass
class RunSet:
    """Runs that differ in seed or fold alone, often a single one; ``differing``: its settings that other sets do not
    share."""

    name: str
    runs: list[FinishedRun]
    differing: dict[str, str] = field(default_factory=dict)

    def values(self, metric: str) -> list[float]:
        """The metric of each run; NaN where one has none."""
        return [run.metrics.get(metric, math.nan) for run in self.runs]

    def mean(self, metric: str) -> float:
        """The mean over the runs that have the metric; NaN without any."""
        values = [value for value in self.values(metric) if math.isfinite(value)]
        return sum(values) / len(values) if values else math.nan

    @property
    def folds(self) -> int:
        """How many different folds it has."""
        return len({run.key[1] for run in self.runs})

    @property
    def counted(self) -> str:
        """How many runs it has, and of what: ``5 seeds``, ``5 folds``, ``10 runs``; ``1 run``."""
        seeds, many = len({run.key[0] for run in self.runs}), len(self.runs)
        if many == 1:
            return "1 run"
        return f"{many} {'folds' if self.folds == many > seeds else 'seeds' if seeds == many else 'runs'}"

    @cached_property
    def answered(self) -> dict[tuple[str, int], Answered] | None:
        """Each sample of its runs' tables of predictions (with a number where one occurs several times in a run);
        None: a run has no such table."""
        found: dict[tuple[str, int], Answered] = {}
        for run in self.runs:
            if run.answers is None:
                return None
            seen: Counter[str] = Counter()
            for sample, label, predicted in zip(
                run.answers.samples, run.answers.labels, run.answers.predicted, strict=True
            ):
                found.setdefault((sample, seen[sample]), Answered(label, [])).predicted.append(predicted)
                seen[sample] += 1
        return found


@dataclass
class Answered:
    """A sample's ``label``, and what each run that was scored on it ``predicted``."""

    label: str
    predicted: list[str]

    @property
    def right(self) -> float:
        """The share of runs that predicted its label."""
        return self.predicted.count(self.label) / len(self.predicted)

    @property
    def usual(self) -> str:
        """What most runs predicted."""
        return Counter(self.predicted).most_common(1)[0][0]


def is_lower_better(metric: str) -> bool:
    """Whether a lower value of the metric is better: a loss, an error, a rank."""
    return bool(LOWER_IS_BETTER.search(metric))


def main_metric(run: FinishedRun) -> str:
    """The metric by which a run is ranked: the one that chose its best weights, or instead of a loss the first of
    ``MAIN``."""
    chosen = str(run.results.get("config", {}) and flat_settings(run.results["config"]).get("best_metric"))
    own = [name for name in run.metrics if "." not in name]
    if chosen in own and not is_lower_better(chosen):
        return chosen
    return next((name for name in (*MAIN, *own) if name in own), "loss")


# ------------------------------------------------------------------------------------------------------------ reading


def read_run(folder: Path, split: str | None = None) -> FinishedRun:
    """The results of a finished run; ``split``: by default test, else validation, else train.

    Raises:
        UserError: it is no run, not finished or damaged, or was not scored on the split.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder" if folder.exists() else f"{folder}: no such folder")
    if runs.is_run(folder) and not runs.is_finished(folder):
        raise UserError(f"{folder}: not finished")
    if not (folder / "results.json").is_file():
        raise UserError(f"{folder}: not a run")
    results = runs.read_results(folder)
    scored = {
        name: {key: float(value) for key, value in part.items() if _is_number(value) and key not in NOT_METRICS}
        for name, part in results.items()
        if isinstance(part, dict) and _is_number(part.get("count"))
    }
    chosen = split or next((name for name in SPLITS if name in scored), "")
    if chosen not in scored:
        raise UserError(f"{folder}: no metrics of {chosen or 'any split'}; there are {', '.join(scored) or 'none'}")
    others = {f"{name}.{key}": value for name, part in scored.items() for key, value in part.items()}
    groups = results.get("config")
    groups = groups if isinstance(groups, dict) else {}
    everything = flat_settings(groups)
    settings = flat_settings({name: group for name, group in groups.items() if name != "output"})
    fold, settings = _without_folds(settings)
    settings = {name: value for name, value in settings.items() if name not in IGNORED}
    for name in ("num_processes", "precision", "dataset_version"):
        settings[name] = results.get(name)
    if settings["num_processes"] == 1:
        settings["num_processes"] = None  # as in runs that do not say
    if settings["precision"] == "no":
        settings["precision"] = None
    command = str(results.get("command", ""))
    script = re.search(r"([\w.-]+)\.py\b", command) or re.search(r"\b(accelerando-\w+)", command)
    key = (_whole(everything.get("seed")), fold if fold is not None else _whole(everything.get("fold")))
    return FinishedRun(
        folder, results, chosen, {**scored[chosen], **others}, int(results[chosen]["count"]), settings,
        script[1] if script else "", _data_title(settings), key,
    )  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _without_folds(settings: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """The fold that paths among the settings name, if they do, and the settings with ``*`` in its place."""
    found: int | None = None
    kept = dict(settings)
    for name, value in settings.items():
        if isinstance(value, str) and (match := FOLD.search(value)):
            found = int(match[2]) if found is None else found
            kept[name] = FOLD.sub(r"\1*", value)
    return found, kept


def _data_title(settings: Mapping[str, Any]) -> str:
    """A short name of the data: that of its file or folder, or of the folder above where it says no more than train."""
    named = settings.get("dataset_name") or next((settings[name] for name in DATA if settings.get(name)), None)
    if isinstance(named, list):
        named = named[0] if named else None
    if not named:
        return ""
    path = Path(str(named))
    return (path.parent.name if path.stem in ("train", "training", "clips") else "") or path.stem or str(named)


# --------------------------------------------------------------------------------------------------------------- sets


def as_sets(found: Iterable[FinishedRun]) -> list[RunSet]:
    """The runs as sets, in the order of each one's first run, with what of the settings differs between them.

    A setting that is missing, as in a run from before it existed, counts as one that is off. A run that repeats the
    seed and fold of another is no further evidence: it is in a set of its own.
    """
    groups: dict[tuple[object, ...], list[FinishedRun]] = {}
    seen: Counter[tuple[object, ...]] = Counter()
    for run in found:
        values = sorted((name, repr(value)) for name, value in run.settings.items() if _is_on(value))
        setting = (run.task, run.split, *values)
        repetition = seen[(*setting, run.key)]
        seen[(*setting, run.key)] += 1
        groups.setdefault((*setting, repetition), []).append(run)
    sets = [RunSet(_name_of(members), members) for members in groups.values()]
    named = Counter(each.name for each in sets)
    for each in sets:
        if named[each.name] > 1:
            each.name = _first_and_more(each.runs)
    named = Counter(each.name for each in sets)
    same = [each for each in sets if named[each.name] > 1]  # folders of one name in several places
    for each, name in zip(same, _shortest_paths([each.runs[0].folder for each in same]), strict=True):
        each.name = name
    by_data: dict[tuple[str, str], list[RunSet]] = {}
    for each in sets:
        by_data.setdefault((each.runs[0].task, each.runs[0].data), []).append(each)
    for block in by_data.values():
        _mark_differences(block)
    return sets


def _is_on(value: object) -> bool:
    return value not in (None, False, 0, "", [], "none")


def _mark_differences(sets: Sequence[RunSet]) -> None:
    names = dict.fromkeys(name for each in sets for name in each.runs[0].settings)
    for name in names:
        values = [each.runs[0].settings.get(name) for each in sets]
        if len({repr(value) if _is_on(value) else "" for value in values}) > 1:
            for each, value in zip(sets, values, strict=True):
                each.differing[name] = _shown(value)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value in (None, "") else str(value)


def _name_of(members: Sequence[FinishedRun]) -> str:
    """The name of a run, or what is left of those of several without seed and fold, if that is the same."""
    names = [run.folder.absolute().name for run in members]
    left = {SEED_OR_FOLD.sub("", name) for name in names}
    return (
        names[0] if len(members) == 1 else left.pop() if len(left) == 1 and "" not in left else _first_and_more(members)
    )


def _shortest_paths(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths, of as many folders as it takes to tell them apart."""
    paths = [folder.absolute().parts for folder in folders]
    longest = max(map(len, paths), default=1)
    ends = ([str(Path(*parts[-length:])) for parts in paths] for length in range(1, longest + 1))
    return next((names for names in ends if len(set(names)) == len(names)), [str(folder) for folder in folders])


def _first_and_more(members: Sequence[FinishedRun]) -> str:
    name = members[0].folder.absolute().name
    return name if len(members) == 1 else f"{name} + {len(members) - 1}"


def paired(first: RunSet, second: RunSet) -> list[tuple[FinishedRun, FinishedRun]]:
    """The runs of two sets with the same seed and fold; empty unless each run of the smaller set has its counterpart,
    and there are two at least."""
    one, other = ({run.key: run for run in each.runs} for each in (first, second))
    shared = [key for key in one if key in other]
    if len(shared) < max(2, min(len(one), len(other))):
        return []
    return [(one[key], other[key]) for key in shared]


def why_not_comparable(first: RunSet, second: RunSet) -> str:
    """Why two sets of runs cannot be compared: they were scored on other classes or samples; empty: they can."""
    for name in NAMES:
        if first.runs[0].results.get(name) != second.runs[0].results.get(name):
            return "other classes"
    if first.runs[0].split != second.runs[0].split:
        return "another split"
    if not {run.count for run in first.runs} & {run.count for run in second.runs}:
        return "other samples"
    return ""
