"""The scores of one or several models on the same samples: as a table, as files, and as a report page."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.files import open_whole, write_text
from accelerando.base.processes import command_line
from accelerando.data.table_formats import formula_safe
from accelerando.inference.outputs import aligned_rows, printable
from accelerando.report import page

if TYPE_CHECKING:
    import numpy as np

    from accelerando.report.comparison import Comparison


@dataclass
class Head:
    """The answers to one question about n samples: ``labels`` int [n] and ``logits`` [n, C], of the classes
    ``label_names``. ``name`` is empty where a model has one head only."""

    name: str
    label_names: list[str]
    labels: np.ndarray
    logits: np.ndarray

    def called(self, what: str) -> str:
        """``what`` with the head's name before it."""
        return f"{self.name}_{what}" if self.name else what

    @cached_property
    def matrix(self) -> np.ndarray:
        """Its confusion matrix [C, C]."""
        from accelerando.report.metrics import confusion_matrix

        return confusion_matrix(self.labels, self.logits.argmax(axis=1), len(self.label_names))

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Of each class, float64 [n, C]."""
        from accelerando.report.predictions import probabilities

        return probabilities(self.logits)

    @property
    def absent(self) -> list[str]:
        """The classes of which there is no sample."""
        return [name for name, row in zip(self.label_names, self.matrix, strict=True) if not row.sum()]


@dataclass
class Scores:
    """What one model, or an ensemble, made of ``count`` samples.

    ``right``: the metric that is a share of right answers -> which they are, bool; these are compared between models.
    ``written``: the metrics as texts, in the order in which they are shown (default: four decimals). ``columns``:
    further columns of the table of predictions.
    """

    name: str
    metrics: dict[str, float]
    count: int
    heads: list[Head]
    right: dict[str, np.ndarray]
    written: dict[str, str] | None = None
    columns: dict[str, Sequence[object]] = field(default_factory=dict)

    @property
    def texts(self) -> dict[str, str]:
        """The metrics as they are printed."""
        return self.written or {name: f"{value:.4f}" for name, value in self.metrics.items()}


@dataclass
class Evaluation:
    """The scores of models on the same samples, which are ``nouns``; ``source`` and ``split`` say where they are from.

    ``samples``: the first columns of the table of predictions; the last of them is shown beside a mistake, and
    ``picture`` gives an image of one. ``left_out``: how many could not be read. ``blocks``: further ones of the page.
    """

    source: str
    split: str  # data: not one of the run's
    nouns: str
    models: list[Scores]
    samples: dict[str, Sequence[str]]
    ensemble: Scores | None = None
    left_out: int = 0
    picture: Callable[[int], bytes | None] = lambda row: None
    blocks: list[str] = field(default_factory=list)

    @property
    def titles(self) -> list[str]:
        """A short heading for each model."""
        short = [Path(each.name).name for each in self.models]
        return short if len(set(short)) == len(short) else [each.name for each in self.models]

    @property
    def columns(self) -> dict[str, Scores]:
        """All scores by their heading."""
        return dict(zip(self.titles, self.models, strict=True)) | ({"ensemble": self.ensemble} if self.ensemble else {})

    @property
    def shown(self) -> dict[str, Scores]:
        """Those whose confusion matrices and mistakes are shown: the ensemble's alone where there is one."""
        return {"ensemble": self.ensemble} if self.ensemble else self.columns

    @cached_property
    def comparisons(self) -> list[tuple[int, str, Comparison]]:
        """(place of a model, metric, comparison of the first model with this one)."""
        from accelerando.report.comparison import compare

        first = self.models[0]
        return [
            (place, metric, compare(first.right[metric], other.right[metric]))
            for place, other in enumerate(self.models[1:], start=1)
            for metric in first.right
            if metric in other.right
        ]

    def described(self) -> str:
        """What was scored, in one line."""
        what = "of --data" if self.split == "data" else f"{self.split} split"
        unread = f", {self.left_out:,} more cannot be read" if self.left_out else ""
        return f"{self.models[0].count:,} {self.nouns} of {printable(self.source)} ({what}){unread}"


def as_results(evaluation: Evaluation) -> dict[str, Any]:
    """What ``results.json`` holds: the metrics of each model under ``runs``, those of the ``ensemble``, how models
    differ, and the classes with the confusion matrices of what is shown."""

    def metrics(scores: Scores) -> dict[str, float]:
        return {**scores.metrics, "count": scores.count}

    models, shown = evaluation.models, evaluation.shown
    several = [
        {"run": models[place].name, "compared_with": models[0].name, "metric": metric, **found.as_json()}
        for place, metric, found in evaluation.comparisons
    ]
    classes: dict[str, Any] = {}
    for number, head in enumerate(next(iter(shown.values())).heads):
        matrices = {scores.name: scores.heads[number].matrix.tolist() for scores in shown.values()}
        names = f"{head.name}_names" if head.name else "label_names"
        classes |= {names: head.label_names}
        classes |= {head.called("confusion_matrix"): next(iter(matrices.values())) if len(matrices) == 1 else matrices}
    return {
        "data": printable(evaluation.source),
        "split": evaluation.split,
        "of": evaluation.nouns,
        "runs": {scores.name: metrics(scores) for scores in models},
        **({"ensemble": metrics(evaluation.ensemble)} if evaluation.ensemble else {}),
        **({"comparisons": several} if several else {}),
        "left_out": evaluation.left_out,
        **classes,
        "command": command_line(),
    }


# ------------------------------------------------------------------------------------------------------------- table


def table_text(evaluation: Evaluation) -> str:
    """The result on one screen: what was scored, the metrics, how models differ, and notes."""
    import textwrap

    from accelerando.report.results import aligned_table

    names = [scores.name for scores in evaluation.models]
    several = len(names) > 1
    titles = [f"run {number}" for number in range(1, len(names) + 1)] if several else [evaluation.split]
    lines = [f"{title}  {name}" for title, name in zip(titles, names, strict=True)] if several else names
    columns = dict(zip(titles, (scores.texts for scores in evaluation.models), strict=True))
    if evaluation.ensemble:
        columns["ensemble"] = evaluation.ensemble.texts
    metrics = list(dict.fromkeys(chain.from_iterable(columns.values())))
    lines += [evaluation.described(), "", aligned_table(metrics, columns)]
    if evaluation.comparisons:
        rows = [("compared with run 1", "difference", "95 % interval", "only run 1", "only this")]
        for place, metric, found in evaluation.comparisons:
            interval = f"{found.low:+.4f} to {found.high:+.4f}"
            counts = (f"{found.only_first:,}", f"{found.only_second:,}")
            rows.append((f"{titles[place]} {metric}", f"{found.difference:+.4f}", interval, *counts))
        lines += ["", aligned_rows(rows)]
    for head in next(iter(evaluation.shown.values())).heads:
        if head.absent:
            which = ", ".join(head.absent[:20]) + (f" and {len(head.absent) - 20:,} more" if head.absent[20:] else "")
            note = f"None of the {evaluation.nouns} is of {which}; the macro means count such a class as 0."
            lines += ["", *textwrap.wrap(note, 80)]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- files


def write_files(folder: Path, evaluation: Evaluation, results: Mapping[str, Any]) -> None:
    """Writes the files of an evaluation into the new folder ``folder``."""
    from accelerando.report.metrics import report_text
    from accelerando.report.plots import plot_confusion

    folder.mkdir(parents=True)
    write_text(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    shown = list(evaluation.shown.values())
    for number, scores in enumerate(shown, start=1):
        for head in scores.heads:
            end = "_".join(["", *([head.name] if head.name else []), *([f"run_{number}"] if len(shown) > 1 else [])])
            report = report_text(head.matrix, head.label_names)
            write_text(folder / f"classification_report{end}.txt", report)
            plot_confusion(head.matrix, head.label_names, folder / f"confusion{end}.png")
    write_predictions(folder / "predictions.csv", evaluation)
    write_page(folder / "report.html", evaluation, results["command"])


def write_predictions(path: Path, evaluation: Evaluation) -> None:
    """A CSV with a row for each sample: what it is, its class, and each model's answer and how sure it is; of a single
    model, or an ensemble, also the probability of each class as ``p_<class>``. Safe to open in a spreadsheet."""
    shown = evaluation.shown
    one = len(shown) == 1
    columns: dict[str, list[object]] = {name: list(values) for name, values in evaluation.samples.items()}
    texts = {*columns}
    first = next(iter(shown.values()))
    if not first.heads and not first.columns:
        return

    def add_texts(name: str, numbers: np.ndarray, names: list[str]) -> None:
        columns[name] = [names[number] for number in numbers.tolist()]
        texts.add(name)

    def add_numbers(name: str, values: np.ndarray) -> None:
        columns[name] = [f"{value:.6f}" for value in values.tolist()]

    for head in first.heads:
        add_texts(head.name or "label", head.labels, head.label_names)

    def add_answers(before: str, scores: Scores) -> None:
        for head in scores.heads:
            add_texts(before + head.called("predicted"), head.logits.argmax(axis=1), head.label_names)
            add_numbers(before + head.called("confidence"), head.probabilities.max(axis=1))
        columns.update({before + name: list(values) for name, values in scores.columns.items()})
        texts.update(before + name for name in scores.columns)

    for title, scores in shown.items():
        add_answers("" if one else f"{title}: ", scores)
    if one:
        for head in first.heads:
            for number, name in enumerate(head.label_names):
                add_numbers(f"p_{head.called(name)}", head.probabilities[:, number])
    if evaluation.ensemble:
        for title, scores in zip(evaluation.titles, evaluation.models, strict=True):
            add_answers(f"{title}: ", scores)
    safe = [[formula_safe(str(cell)) for cell in cells] if name in texts else cells for name, cells in columns.items()]
    with open_whole(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*safe, strict=True))


def write_page(path: Path, evaluation: Evaluation, command: str) -> None:
    """``report.html``: the figures, how models differ, the confusion matrices, each class, the worst mistakes."""
    from accelerando.report.comparison import DRAWS
    from accelerando.report.metrics import per_class

    columns, shown, titles = evaluation.columns, evaluation.shown, evaluation.titles
    tiles = []
    for who, scores in shown.items():
        before = f"{who}, " if len(shown) > 1 else ""
        for metric in scores.right:
            share = f"{100 * scores.metrics[metric]:.2f} %"
            tiles.append((before + metric.replace("_", " "), share, f"{scores.count:,} {evaluation.nouns}"))
        if len(scores.heads) == 1 and "f1_macro" in scores.metrics:
            classes = f"{len(scores.heads[0].label_names)} classes"
            tiles.append((f"{before}F1 (macro)", f"{scores.metrics['f1_macro']:.4f}", classes))
    metrics = list(dict.fromkeys(chain.from_iterable(scores.texts for scores in columns.values())))
    rows = [(name, *(scores.metrics.get(name) for scores in columns.values())) for name in metrics]
    blocks = [page.headline(tiles), page.table(["metric", *columns], rows, title="Metrics")]
    if evaluation.comparisons:
        header = ["run", "metric", "difference", "from", "to", f"only {titles[0]} is right", "only this run is right"]
        differences = [
            (titles[place], metric, found.difference, found.low, found.high, found.only_first, found.only_second)
            for place, metric, found in evaluation.comparisons
        ]
        note = f"From and to: the interval that holds 95 % of {DRAWS:,} resamplings of the same samples."
        blocks.append(page.table(header, differences, note=note, title=f"Compared with {titles[0]}"))
    for who, scores in shown.items():
        for head in scores.heads:
            what = f"{head.name}, {who}" if head.name else who
            values = per_class(head.matrix)
            blocks.append(page.confusion(head.matrix, head.label_names, title=f"Confusion matrix, {what}"))
            blocks.append(page.per_class(head.label_names, *(values[name] for name in ("precision", "recall", "f1")),
                                         values["support"], title=f"Per class, {what}"))  # fmt: skip
        if scores.heads:
            title = "Worst mistakes" if len(shown) == 1 else f"Worst mistakes, {who}"
            blocks.append(page.mistakes(mistakes_of(evaluation, scores.heads[0]), title=title))
    blocks += [*evaluation.blocks, page.command(command, title="Repeat it")]
    title = f"Evaluation of {', '.join(scores.name for scores in evaluation.models)}"
    page.write_report(path, title, evaluation.described(), blocks)


def mistakes_of(evaluation: Evaluation, head: Head) -> list[dict[str, Any]]:
    """The most confident errors of a head, with what the samples are."""
    from accelerando.report.predictions import worst_mistakes

    worst, texts = worst_mistakes(head.labels, head.logits, head.label_names), list(evaluation.samples.values())[-1]
    for mistake in worst:
        row = mistake["row"]
        mistake["text"] = texts[row]
        if (picture := evaluation.picture(row)) is not None:
            mistake["image"] = picture
    return worst
