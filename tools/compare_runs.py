"""Compare finished runs of any task: a table, the statistics of their differences, and what may be claimed.

python tools/compare_runs.py runs/*                                        (all of them at a glance)
python tools/compare_runs.py runs/zero_shot runs/visual --metrics accuracy top3_accuracy novel.accuracy
python tools/compare_runs.py runs/small_seed* runs/large_seed* --baseline runs/small_seed1 --output_dir comparison
python tools/compare_runs.py runs/teacher runs/student --metrics accuracy --benchmark   (with size and latency)

Runs of the same settings that differ only in their seed or fold are one set.
Each set is compared with the baseline's: seeds or folds that pair up with the
paired t test and Wilcoxon's, others with Welch's and Mann and Whitney's; single
runs (and the folds of a cross-validation together) by their predictions of the
same samples with McNemar's test and a bootstrap. p is corrected for the number
of comparisons (Holm). A difference may be claimed where that is below 0.05.
"""

from __future__ import annotations

import itertools
import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from accelerando.base.config import check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import check_can_be_made, write_text
from accelerando.base.processes import command_line
from accelerando.base.texts import one_line
from accelerando.data.table_formats import formula_safe
from accelerando.inference.latency import latencies, weights_mb
from accelerando.inference.outputs import aligned_rows, printable
from accelerando.inference.run_sets import (
    FinishedRun,
    RunSet,
    as_sets,
    is_lower_better,
    main_metric,
    paired,
    read_run,
    why_not_comparable,
)
from accelerando.report import page
from accelerando.report.plots import Curve, shorten

if TYPE_CHECKING:
    from accelerando.report.comparison import Difference

OURS = ("report.html", "comparison.json", "changed_samples.csv")
WIDTH = 80  # columns of the terminal
MOST_DRAWN = 12  # sets in a panel of curves: more colours cannot be told apart
MOST_SAID = 12  # sentences in the terminal; the report has all
MOST_NAMED = 5  # folders that are passed over, and sets that are not compared
MOST_CHANGED = 3  # samples of a pair that the terminal shows
MOST_ON_PAGE = 300  # changed samples in the report


@dataclass
class Args:
    # -- input --
    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")] = ()  # their folders
    split: str | None = None  # whose metrics (default: of each run test, else validation, else train)
    metrics: tuple[str, ...] = ()  # which, or split.metric of another split (default: the one the best weights are by)
    baseline: str | None = None  # the run that the others are compared with, and those of its set (default: the first)
    # -- benchmark --
    benchmark: bool = False  # also parameters, MB of the weights, and milliseconds for one sample on the CPU
    seconds: float = 2.0  # benchmark: of each run, in turn
    tokens: int = 32  # benchmark: of a text
    num_threads: int = 1  # benchmark: of the CPU
    # -- output --
    output_dir: str | None = None  # write report.html, comparison.json and changed_samples.csv into this folder
    output_csv: str | None = None  # write a table there too: a line for each run, a column for each metric
    overwrite: bool = False  # replace what an earlier comparison left in output_dir
    config: tuple[str, ...] = ()  # YAML files with any of these settings


@dataclass
class Changed:
    """A sample that one of two sets gets right and the other wrong, by most of their runs."""

    sample: str
    label: str
    before: str
    after: str
    gained: bool


@dataclass
class Pair:
    """A set beside the baseline. ``tests``: by metric, with the one that decides first; ``holm``: p of that one,
    corrected for all comparisons; ``changed``: the samples that changed sides, None where that is not known."""

    number: int  # of the set in the table
    baseline: RunSet
    other: RunSet
    tests: dict[str, list[Difference]]
    holm: dict[str, float]
    changed: list[Changed] | None = None

    def claimed(self, metric: str) -> bool:
        """Whether a difference of the metric may be claimed."""
        from accelerando.report.comparison import ALPHA

        return self.holm.get(metric, math.nan) < ALPHA


# ----------------------------------------------------------------------------------------------------------- compare


def compare_sets(number: int, baseline: RunSet, other: RunSet, metrics: Sequence[str]) -> Pair:
    """All tests of a set against the baseline."""
    from accelerando.report.comparison import compare_answers, compare_independent, compare_paired

    pair = Pair(number, baseline, other, {}, {})
    together = paired(baseline, other)
    for metric in metrics:
        found = None
        if together:
            first, second = (
                [run.metrics.get(metric, math.nan) for run in runs] for runs in zip(*together, strict=True)
            )
            found = compare_paired(first, second, max(baseline.folds, other.folds) if baseline.folds > 1 else 0)
        else:
            found = compare_independent(baseline.values(metric), other.values(metric))
        pair.tests[metric] = [found] if found else []
    answers = same_answers(baseline, other)
    if answers is None:
        return pair
    first, second = answers
    pair.changed = changed_samples(first, second)
    if all(len(one.predicted) == 1 for side in answers for one in side.values()):
        import numpy as np

        right = [np.array([one.right == 1 for one in side.values()]) for side in (first, second)]
        for metric in metrics:
            if all(is_share_of_right(run, metric) for run in (*baseline.runs, *other.runs)):
                pair.tests[metric].append(compare_answers(*right))
    return pair


def same_answers(baseline: RunSet, other: RunSet) -> tuple[dict, dict] | None:
    """What both sets answered about each sample, in the same order; None: not known, or not about the same samples."""
    if baseline.answered is None or other.answered is None:
        return None
    first, second = baseline.answered, other.answered
    if first.keys() != second.keys() or any(first[key].label != second[key].label for key in first):
        return None
    return first, {key: second[key] for key in first}


def is_share_of_right(run: FinishedRun, metric: str) -> bool:
    """Whether the metric is the share of samples whose label was predicted."""
    answers = run.answers
    if answers is None or not answers.labels or metric not in run.metrics:
        return False
    right = sum(label == predicted for label, predicted in zip(answers.labels, answers.predicted, strict=True))
    return abs(right / len(answers.labels) - run.metrics[metric]) < 1e-6


def changed_samples(first: dict, second: dict) -> list[Changed]:
    """The samples that most runs of one set get right and most of the other wrong."""
    changed = []
    for key, before in first.items():
        after = second[key]
        if (before.right > 0.5) != (after.right > 0.5):
            changed.append(Changed(key[0], before.label, before.usual, after.usual, after.right > 0.5))
    return changed


def correct(pairs: Sequence[Pair], metrics: Sequence[str]) -> int:
    """Fills ``holm`` of the pairs; the number of comparisons."""
    from accelerando.report.comparison import holm

    deciding = [(pair, metric, pair.tests[metric][0].p) for pair in pairs for metric in metrics if pair.tests[metric]]
    for (pair, metric, _), p in zip(deciding, holm([p for *_, p in deciding]), strict=True):
        pair.holm[metric] = p
    return sum(not math.isnan(p) for *_, p in deciding)


# ----------------------------------------------------------------------------------------------------------- wording


def written_p(p: float) -> str:
    """p with four decimals, ``<0.0001`` or ``–``."""
    return "–" if math.isnan(p) else "<0.0001" if p < 0.0001 else f"{p:.4f}"


def written(value: float, form: str = ".4f") -> str:
    """A number, or ``–``."""
    return format(value, form) if math.isfinite(value) else "–"


def claim(pair: Pair, metric: str, comparisons: int) -> str:
    """One sentence: what may be claimed about a pair, and how many more runs a claim would take."""
    from accelerando.report.comparison import POWER, runs_for_claim

    other, baseline = pair.other.name, pair.baseline.name
    difference = pair.other.mean(metric) - pair.baseline.mean(metric)
    if not pair.tests[metric]:
        if not math.isfinite(difference):
            return f"{other} and {baseline} cannot be compared: one of them has no {metric}."
        return (
            f"Nothing can be claimed of {other} and {baseline} ({metric} {difference:+.4f}) from a single run each "
            "without predictions of the same samples that this metric counts: train several seeds of each."
        )
    found = pair.tests[metric][0]
    where = f"95 % interval {found.low:+.4f} to {found.high:+.4f}"
    p = f"{found.test} p {written_p(found.p).replace('<', '< ') if found.p < 0.0001 else '= ' + written_p(found.p)}"
    if comparisons > 1 and not math.isnan(found.p):
        p += f", {written_p(pair.holm[metric]).replace('<', '< ')} when corrected for {comparisons} comparisons"
    single = found.test == "McNemar"
    over = f"{pair.other.counted} against {pair.baseline.counted}"
    if single:
        lost, gained = (sum(each.gained is way for each in pair.changed or []) for way in (False, True))
        over = f"{gained} samples gained, {lost} lost"
    numbers = f"{metric} {found.difference:+.4f} ({where}; {p}; {over})"
    if math.isnan(found.p):
        return f"Nothing can be tested of {other} and {baseline}, whose runs do not vary: {numbers}."
    seeds = "whether this holds for other seeds takes several runs of each"
    if pair.claimed(metric):
        better = "better" if (found.difference > 0) != is_lower_better(metric) else "worse"
        these = " on these samples" if single else ""
        return f"{other} is {better} than {baseline}{these}: {numbers}{'; ' + seeds if single else ''}."
    start = f"No difference between {other} and {baseline} can be claimed: {numbers}"
    if single:
        return f"{start}; {seeds}."
    if found.difference == 0:
        return f"{start}."
    needed = runs_for_claim(found, comparisons)
    chance = f"a chance of {POWER:.0%} to find a difference of the observed size".replace("%", " %")
    if needed is None:
        return f"{start}; no number of runs has {chance}."
    if found.folds > 1:
        return f"{start}; {chance} takes the {found.folds} folds with {math.ceil(needed / found.folds)} seeds each."
    more = needed - min(found.first, found.second)
    return f"{start}; {chance} takes {needed:,} runs of each, {more:,} more."


# ---------------------------------------------------------------------------------------------------------- terminal


def blocks_of(sets: Sequence[RunSet], metric: str) -> dict[str, list[tuple[int, RunSet]]]:
    """The sets by task and data, the best first, with their number in the table."""
    blocks: dict[str, list[RunSet]] = {}
    for each in sets:
        run = each.runs[0]
        heading = " on ".join(filter(None, (run.task, run.data))) or "runs"
        blocks.setdefault(f"{heading}, {run.split}", []).append(each)
    sign = 1 if is_lower_better(metric) else -1

    def rank(each: RunSet) -> tuple[bool, float]:
        value = each.mean(metric)
        return math.isnan(value), sign * value

    ordered = {title: sorted(block, key=rank) for title, block in blocks.items()}
    numbers = iter(range(1, len(sets) + 1))
    return {title: [(next(numbers), each) for each in block] for title, block in ordered.items()}


def result(each: RunSet, metric: str) -> str:
    """The mean of the metric and, of several runs, half of its interval."""
    from accelerando.report.comparison import interval_of_mean

    half = interval_of_mean(each.values(metric))
    return written(each.mean(metric)) + (f" ± {half:.4f}" if math.isfinite(half) else "")


def leaderboard(blocks: dict[str, list[tuple[int, RunSet]]], metric: str, baseline: RunSet) -> str:
    """The sets with their results, the best first, and what of their settings differs; 80 columns."""
    lines = []
    for title, block in blocks.items():
        names = [shorten(printable(each.name), 34) + (" *" if each is baseline else "") for _, each in block]
        rows = [("", title if len(title) < 40 else shorten(title, 40), "runs", metric)]
        rows += [(str(number), name, each.counted.removesuffix(" run"), result(each, metric))
                 for (number, each), name in zip(block, names, strict=True)]  # fmt: skip
        heads = aligned_rows(rows, left=4).split("\n")
        room = WIDTH - max(map(len, heads)) - 2
        settings = ["", *unusual([each for _, each in block])]
        wide = max(map(len, heads))
        beside = max(map(len, settings)) <= room
        for head, text in zip(heads, settings, strict=True):
            lines.append(f"{head:<{wide}}  {text}".rstrip() if beside else head)
            if text and not beside:
                indents = {"initial_indent": "     ", "subsequent_indent": "     "}
                lines += textwrap.wrap(text, WIDTH, max_lines=2, placeholder=" ...", **indents)
        lines.append("")
    lines.append("± half of the 95 % interval of the mean; * the baseline")
    return "\n".join(lines)


def unusual(sets: Sequence[RunSet]) -> list[str]:
    """Of each set, in one line, the settings whose value not more than half of the sets have."""
    shared = Counter(setting for each in sets for setting in each.differing.items())
    few = [[item for item in each.differing.items() if 2 * shared[item] <= len(sets)] for each in sets]
    return [", ".join(f"{name} {one_line(shorten(value, 30))}" for name, value in each) for each in few]


def left_out(reasons: dict[str, str], baseline: RunSet) -> list[str]:
    """A note for each reason why sets are not compared."""
    notes = []
    for why in dict.fromkeys(filter(None, reasons.values())):
        names = [name for name, reason in reasons.items() if reason == why]
        rest = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        notes.append(f"not compared with {baseline.name} ({why}): {', '.join(names[:MOST_NAMED])}{rest}")
    return notes


def table_of_runs(
    found: Sequence[FinishedRun], metrics: Sequence[str], sizes: Mapping[Path, tuple[str, ...]] | None = None
) -> list[tuple[str, ...]]:
    """A line for each run, a column for each metric, and those of :func:`sizes_of` if there are any."""
    table = [("run", "split", *metrics, *(("parameters", "MB", "ms") if sizes else ()))]
    for run in found:
        cells = (f"{run.metrics[key]:.4f}" if key in run.metrics else "" for key in metrics)
        table.append((run.folder.name, run.split, *cells, *((sizes or {}).get(run.folder, ()))))
    return table


def sizes_of(found: Sequence[FinishedRun], args: Args) -> dict[Path, tuple[str, ...]]:
    """Of each run the parameters, the MB of its weights, and the milliseconds for one sample, all measured in turn."""
    folders = [run.folder for run in found]
    timed = latencies(folders, args.seconds, args.tokens, args.num_threads)
    return {
        run.folder: (f"{run.results.get('parameters', '')}", f"{weights_mb(run.folder):.2f}", f"{milliseconds:.2f}")
        for run, milliseconds in zip(found, timed, strict=True)
    }


def statistics_text(pairs: Sequence[Pair], metrics: Sequence[str], comparisons: int) -> str:
    """The tests as a table for each metric."""
    parts = []
    for metric in metrics:
        rows = [("", "difference", "95 % interval", "test", "p", "Holm p", "rank p", "effect")]
        for pair in pairs:
            for place, found in enumerate(pair.tests[metric]):
                corrected = pair.holm.get(metric, math.nan) if place == 0 else math.nan
                numbers = [written_p(p) for p in (found.p, corrected, found.rank_p)]
                interval = f"{found.low:+.4f} to {found.high:+.4f}"
                test = found.test.replace("corrected paired t", "paired t, c.")
                row = (str(pair.number), f"{found.difference:+.4f}", interval, test, *numbers)
                rows.append((*row, written(found.effect, ".2f")))
        if len(rows) > 1:
            parts.append(f"{metric}, beside {shorten(printable(pairs[0].baseline.name), 50)}\n{aligned_rows(rows)}")
    if not parts:
        return ""
    tests = {found.test for pair in pairs for each in pair.tests.values() for found in each}
    notes = [f"Holm p: corrected for {comparisons} comparison{'s' if comparisons != 1 else ''}"]
    if tests != {"McNemar"}:
        notes.append("rank p: Wilcoxon's test for pairs, else Mann and Whitney's; effect: Hedges' g")
    if "corrected paired t" in tests:
        notes.append("c.: for folds, which share training samples (Nadeau and Bengio)")
    return "\n\n".join(parts) + "\n" + textwrap.fill("; ".join(notes), WIDTH)


def changed_text(pairs: Sequence[Pair]) -> Iterator[str]:
    """The first samples that changed sides, of the first pairs."""
    known = [pair for pair in pairs if pair.changed]
    for pair in known[:MOST_CHANGED]:
        gained = sum(each.gained for each in pair.changed)
        yield f"{pair.number}: {gained:,} samples gained, {len(pair.changed) - gained:,} lost, among them"
        rows = [
            ("  gained" if each.gained else "  lost", shorten(one_line(printable(each.sample)), 34),
             f"{shorten(one_line(each.before), 14)} -> {shorten(one_line(each.after), 14)}")
            for each in pair.changed[:MOST_CHANGED]
        ]  # fmt: skip
        yield from aligned_rows(rows, left=3).split("\n")
    if known[MOST_CHANGED:]:
        yield f"... and those of {len(known) - MOST_CHANGED:,} more"


# ------------------------------------------------------------------------------------------------------------- files


def write_files(
    folder: Path,
    blocks: dict[str, list[tuple[int, RunSet]]],
    baseline: RunSet,
    pairs: Sequence[Pair],
    metrics: Sequence[str],
    comparisons: int,
    notes: Sequence[str],
) -> None:
    """``report.html``, ``comparison.json``, and ``changed_samples.csv`` where samples are known."""
    from accelerando.report.predictions import write_csv

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    sets = [each for block in blocks.values() for _, each in block]
    content = {
        "sets": [
            {"name": each.name, "runs": [str(run.folder) for run in each.runs], "split": each.runs[0].split,
             "metrics": {metric: each.values(metric) for metric in metrics}, "differing": each.differing}
            for each in sets
        ],
        "baseline": baseline.name,
        "comparisons": [
            {"set": pair.other.name, "metric": metric, "tests": [asdict(found) for found in pair.tests[metric]],
             "holm_p": pair.holm.get(metric), "claimed": pair.claimed(metric)}
            for pair in pairs for metric in metrics
        ],
        "claims": [claim(pair, metrics[0], comparisons) for pair in pairs],
        "notes": list(notes),
        "command": command_line(),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "comparison.json", json.dumps(plain(content), indent=2, ensure_ascii=False) + "\n")
    target = folder / "changed_samples.csv"
    if any(pair.changed is not None for pair in pairs):
        header = ["compared", "baseline", "sample", "label", "predicted_by_baseline", "predicted", "change"]
        rows = (
            [formula_safe(pair.other.name), formula_safe(pair.baseline.name),
             *map(formula_safe, (each.sample, each.label, each.before, each.after)),
             "gained" if each.gained else "lost"]
            for pair in pairs for each in pair.changed or []
        )  # fmt: skip
        write_csv(target, header, rows)
    elif target.exists():  # of an earlier comparison
        target.unlink()
    write_page(folder / "report.html", blocks, baseline, pairs, metrics, comparisons, notes)


def write_page(
    path: Path,
    blocks: dict[str, list[tuple[int, RunSet]]],
    baseline: RunSet,
    pairs: Sequence[Pair],
    metrics: Sequence[str],
    comparisons: int,
    notes: Sequence[str],
) -> None:
    """The report: what may be claimed, the differences, the results with the settings that differ, and the curves."""
    metric, sets = metrics[0], [each for block in blocks.values() for _, each in block]
    beside = next(block for block in blocks.values() if any(each is baseline for _, each in block))
    best = beside[0][1]
    claims = [pair for pair in pairs if pair.claimed(metric)]
    count = sum(len(each.runs) for each in sets)
    tiles = [(f"best {metric}", written(best.mean(metric)), shorten(best.name, 40))]
    if pairs:
        tiles.append((f"baseline {metric}", written(baseline.mean(metric)), shorten(baseline.name, 40)))
        tiles.append(("differences claimed", f"{len(claims)} of {len(pairs)}", "Holm's p below 0.05"))
    tiles.append(("runs", f"{count:,}", f"in {len(sets):,} sets of the same settings"))
    parts = [page.headline(tiles)]
    if pairs:
        parts.append(page.sentences([claim(pair, metric, comparisons) for pair in pairs], "What may be claimed"))
    for each in metrics:
        rows = [(pair.other.name, found.difference, found.low, found.high, pair.claimed(each))
                for pair in pairs for found in pair.tests[each][:1]]  # fmt: skip
        if rows:
            note = f"Mean difference from {baseline.name} with its 95 % interval; filled: may be claimed."
            parts.append(page.differences(rows, f"Difference in {each}", note))
    header = ["set", "metric", "difference", "from", "to", "test", "p", "Holm p", "rank test", "rank p", "effect"]
    rows = [
        (pair.other.name, name, found.difference, found.low, found.high, found.test, found.p,
         pair.holm.get(name) if place == 0 else None, found.rank_test or "–", found.rank_p, found.effect)
        for pair in pairs for name in metrics for place, found in enumerate(pair.tests[name])
    ]  # fmt: skip
    if rows:
        note = (
            f"From and to: the 95 % interval. Holm p: p of the first test of each, corrected for {comparisons} "
            f"comparison{'s' if comparisons != 1 else ''}. Effect: Hedges' g, the difference in standard deviations. "
            "Folds share training samples, for which their t test is corrected (Nadeau and Bengio 2003). McNemar's "
            "interval is from a bootstrap."
        )
        parts.append(page.table(header, rows, note=note, title="Statistics"))
    for title, block in blocks.items():
        names = list(dict.fromkeys(name for _, each in block for name in each.differing))
        lines = [
            (number, each.name, each.counted.replace(" ", "\u00a0"), *(each.mean(name) for name in metrics),
             half_of(each, metric), *(each.differing.get(name, "–") for name in names))
            for number, each in block
        ]  # fmt: skip
        parts.append(page.table(["#", "set", "runs", *metrics, "±", *names], lines, title=f"Results: {title}",
                                note="± half of the 95 % interval of the mean over the runs. Settings: those that "
                                "differ."))  # fmt: skip
    parts += curve_blocks([each for _, each in beside], baseline, metric)
    changed = [(pair.other.name, "gained" if each.gained else "lost", each.sample, each.label, each.before, each.after)
               for pair in pairs for each in pair.changed or []]  # fmt: skip
    if changed:
        head = ["set", "change", "sample", "true", "baseline", "this set"]
        more = f"The first {MOST_ON_PAGE} of {len(changed):,}; changed_samples.csv has all."
        shown = [(*row[:2], shorten(row[2], 200), *row[3:]) for row in changed[:MOST_ON_PAGE]]
        note = more if len(changed) > MOST_ON_PAGE else ""
        parts.append(page.table(head, shown, note=note, title="Samples that changed sides"))
    parts.append(page.command(command_line(), title="Repeat it"))
    subtitle = ". ".join([f"{count:,} runs, compared with {baseline.name}", *notes])
    page.write_report(path, "Comparison of runs", subtitle, parts)


def half_of(each: RunSet, metric: str) -> float:
    """Half of the interval of a set's mean."""
    from accelerando.report.comparison import interval_of_mean

    return interval_of_mean(each.values(metric))


def curve_blocks(sets: Sequence[RunSet], baseline: RunSet, metric: str) -> list[str]:
    """Curves of the sets in the same panels, those of several runs as their mean."""
    from accelerando.train.tracking import read_history

    others = [each for each in sets if each is not baseline]
    drawn = [baseline, *others[: MOST_DRAWN - 1]]
    keys = {"validation": (metric.rpartition(".")[2], "loss"), "train": ("loss",)}
    history: list[dict[str, Any]] = []
    lines: dict[str, dict[str, str]] = {}
    for number, each in enumerate(drawn):
        rows = [read_history(run.folder) for run in each.runs]
        for kind, names in keys.items():
            for name in dict.fromkeys(names):
                found = mean_curve(rows, kind, name)
                key = f"{kind}/{name}/{number}"
                history += [{"step": step, key: value} for step, value in found]
                if found:
                    lines.setdefault(f"{kind} {name.replace('_', ' ')}", {})[key] = shorten(each.name, 32)
    if not lines:
        return []
    curves = [Curve(title[0].upper() + title[1:], keys) for title, keys in lines.items()]
    title = "Curves" if len(drawn) == len(sets) else f"Curves of the baseline and the best {len(drawn) - 1}"
    return [page.curves(history, curves, title=title)]


def mean_curve(rows: Sequence[Sequence[dict[str, Any]]], kind: str, name: str) -> list[tuple[int, float]]:
    """(step, mean over the runs) at the steps that all runs have, or those of the first run if they share none."""
    runs = [{row["step"]: row[name] for row in each if row["kind"] == kind and isinstance(row.get(name), int | float)}
            for each in rows]  # fmt: skip
    shared = sorted(set.intersection(*map(set, runs)))
    if not shared:
        return sorted(runs[0].items())
    return [(step, sum(run[step] for run in runs) / len(runs)) for step in shared]


# -------------------------------------------------------------------------------------------------------------- main


def read_all(args: Args) -> tuple[list[FinishedRun], list[str]]:
    """The runs that can be compared, and why the others are passed over.

    Raises:
        UserError: none can.
    """
    found, passed_over = [], []
    patterns = map(Path, args.runs)  # which a shell has not expanded, as in a YAML file
    names = [sorted(path.parent.glob(path.name)) if "*" in path.name else [path] for path in patterns]
    for folder in dict.fromkeys(itertools.chain.from_iterable(names)):
        try:
            found.append(read_run(folder, args.split))
        except UserError as error:
            passed_over.append(one_line(str(error)))
    if not passed_over and not found:
        raise UserError(f"{args.runs[0]}: there are no such folders")
    if not found:
        raise UserError(passed_over[0] if len(passed_over) == 1 else f"none of these can be compared: {passed_over[0]}")
    return found, passed_over


def choose_metrics(args: Args, found: Sequence[FinishedRun], first: FinishedRun) -> list[str]:
    """The metrics that are compared.

    Raises:
        UserError: no run has one of them.
    """
    known = {key for run in found for key in run.metrics}
    if unknown := [name for name in args.metrics if name not in known]:
        shared = dict.fromkeys(key for run in found for key in run.metrics if "." not in key)
        raise UserError(f"--metrics {unknown[0]}: no run has it; there are {', '.join(shared)}")
    return list(dict.fromkeys(args.metrics)) or [main_metric(first)]


def check_args(args: Args) -> None:
    """UserError for what can be wrong before anything is read."""
    if not args.runs:
        raise UserError("name the folders of finished runs: runs/one runs/other")
    check_ranges(args, seconds=(0, 3600), tokens=(1, 4096), num_threads=(1, 1024))
    if args.output_dir is None:
        return
    target = Path(args.output_dir)
    if target.exists() and not target.is_dir():
        raise UserError(f"--output_dir {target}: is a file")
    there = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if others := [name for name in there if name not in OURS]:
        raise UserError(f"--output_dir {target}: holds {others[0]}, which is no comparison's: choose another folder")
    if there and not args.overwrite:
        raise UserError(f"--output_dir {target}: holds a comparison already; --overwrite replaces it")
    check_can_be_made(target, "--output_dir")


def main() -> None:
    args = parse_args(Args)
    check_args(args)
    found, passed_over = read_all(args)
    wanted = Path(args.baseline).resolve() if args.baseline else found[0].folder.resolve()
    first = next((run for run in found if run.folder.resolve() == wanted or run.folder.name == args.baseline), None)
    if first is None:
        raise UserError(f"--baseline {args.baseline}: is not among the runs that can be compared")
    metrics = choose_metrics(args, found, first)
    sets = as_sets(found)
    baseline = next(each for each in sets if first in each.runs)
    blocks = blocks_of(sets, metrics[0])

    numbered = [(number, each) for block in blocks.values() for number, each in block if each is not baseline]
    reasons = {each.name: why_not_comparable(baseline, each) for _, each in numbered}
    pairs = [compare_sets(number, baseline, each, metrics) for number, each in numbered if not reasons[each.name]]
    comparisons = correct(pairs, metrics)
    notes = []
    if len(sets) < len(found):
        notes.append(f"{len(found)} runs in {len(sets)} sets, in which only seed or fold differ")
    if passed_over:
        rest = f"; and {len(passed_over) - MOST_NAMED} more" if len(passed_over) > MOST_NAMED else ""
        notes.append(f"passed over: {'; '.join(passed_over[:MOST_NAMED])}{rest}")
    notes += left_out(reasons, baseline)

    shared = list(dict.fromkeys(key for run in found for key in run.metrics if "." not in key))
    sizes = sizes_of(found, args) if args.benchmark else None
    if args.metrics or sizes:
        print(aligned_rows(table_of_runs(found, metrics, sizes), left=2), end="\n\n")
    print(leaderboard(blocks, metrics[0], baseline))
    if text := statistics_text(pairs, metrics, comparisons):
        print(f"\n{text}")
    for pair in pairs[:MOST_SAID]:
        said = printable(claim(pair, metrics[0], comparisons))
        print(textwrap.fill(one_line(said), WIDTH, initial_indent=f"\n{pair.number}: ", subsequent_indent="   "))
    if pairs[MOST_SAID:]:
        print(f"\n... and {len(pairs) - MOST_SAID} more, which --output_dir has")
    for number, line in enumerate(changed_text(pairs)):
        print(f"\n{line}" if number == 0 else line)
    for note in notes:
        print(f"\n{printable(note[0].upper() + note[1:])}")
    if args.output_csv:
        from accelerando.report.predictions import write_csv

        header, *rows = table_of_runs(found, args.metrics or shared, sizes)
        write_csv(Path(args.output_csv), header, ((formula_safe(name), *cells) for name, *cells in rows))
    if args.output_dir:
        write_files(Path(args.output_dir), blocks, baseline, pairs, metrics, comparisons, notes)
        print(f"\nReport: {Path(args.output_dir) / 'report.html'}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
