"""What a report shows of several labels a row and of numbers, as :mod:`report.results` does of classes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.base.files import write_text
from accelerando.base.model_folder import keep_in_config
from accelerando.base.texts import one_line
from accelerando.data.table_formats import formula_safe
from accelerando.report import page
from accelerando.report.plots import plot_numbers
from accelerando.report.predictions import highest_losses, with_plain_breaks, worst_mistakes, write_csv
from accelerando.report.results import aligned_table, class_blocks, write_class_reports
from accelerando.report.target_metrics import chosen_labels, per_label, regression_metrics, sigmoid
from accelerando.train.state import Run

Found = Mapping[str, Mapping[str, np.ndarray]]  # by split: labels [n, C], logits [n, C], losses [n]
Shown = tuple[dict[str, Any], list[str], list[dict[str, Any]]]  # for results.json, blocks of the report, worst rows
TEXTS = ("file", "label", "predicted")  # the columns of a table of predictions that are no numbers
LABEL_COLUMNS = ("precision", "recall", "f1", "average_precision", "threshold", "support")


def write_target_reports(
    run: Run,
    found: Found,
    last: str,
    problem_type: str,
    names: Sequence[str],
    thresholds: np.ndarray | None = None,
    head: str = "",
) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
    """Writes the reports and plots of one of several heads, of any kind of target, for all splits.

    Returns entries for results.json and, of the split ``last``, blocks of the report and the worst rows. Main process
    only.
    """
    rows, what = found[last], f"{head}, {last}" if head else last
    details: dict[str, Any] = {"problem_type": problem_type, "label_names": list(names)}
    if problem_type == "regression":
        plots = write_number_plots(run, found, names, head)
        return details, number_blocks(rows, plots[last].read_bytes(), names, what), worst_numbers(rows, names)
    if problem_type == "multi_label":
        tables = write_label_reports(run, found, names, thresholds, head)
        if thresholds is not None:
            details["thresholds"] = dict(zip(names, thresholds.tolist(), strict=True))
        return details, [label_table(tables[last], names, what)], worst_labels(rows, names, thresholds)
    matrix = write_class_reports(run, found, names, head=head)[last]
    details["confusion_matrix"] = matrix.tolist()
    return details, class_blocks(matrix, names, what), worst_mistakes(rows["labels"], rows["logits"], names)


def write_label_reports(
    run: Run, found: Found, label_names: Sequence[str], thresholds: np.ndarray | None = None, head: str = ""
) -> dict[str, dict[str, np.ndarray]]:
    """Writes ``logs/classification_report_<split>.txt``, a line for each label, also to the trackers.

    ``head``: the name of one of several heads. Returns the numbers of :func:`report.target_metrics.per_label` of each
    split. Main process only.
    """
    tables = {}
    for split, rows in found.items():
        values = tables[split] = per_label(rows["labels"], rows["logits"], thresholds)
        names = [one_line(name) for name in label_names]
        columns = {
            title.replace("_", " "): {
                name: f"{value:,}" if title == "support" else f"{value:.4f}"
                for name, value in zip(names, values[title].tolist(), strict=True)
            }
            for title in LABEL_COLUMNS
        }
        text = aligned_table(names, columns) + "\n"
        name = f"{split}_{head}" if head else split
        write_text(run.directory / "logs" / f"classification_report_{name}.txt", text)
        for tracker in run.trackers:
            tracker.add_text(f"{name}/classification_report", f"```\n{text}```", run.state.step)
    return tables


def label_table(values: Mapping[str, np.ndarray], label_names: Sequence[str], what: str) -> str:
    """A block of ``report.html``: the numbers of :func:`report.target_metrics.per_label`, a row for each label."""
    columns = (values[name].tolist() for name in LABEL_COLUMNS)
    rows = list(zip(map(str, label_names), *columns, strict=True))
    header = ["label", "precision", "recall", "F1", "average precision", "threshold", "rows"]
    return page.table(header, rows, heat=(1, 2, 3, 4), title=f"Per label, {what}")


def write_number_plots(run: Run, found: Found, names: Sequence[str], head: str = "") -> dict[str, Path]:
    """Writes ``plots/predicted_<split>.png``, predicted over true numbers, also to TensorBoard; the paths by split.

    ``head``: the name of one of several heads.

    Main process only.
    """
    paths = {}
    for split, rows in found.items():
        name = f"{split}_{head}" if head else split
        paths[split] = run.directory / "plots" / f"predicted_{name}.png"
        plot = plot_numbers(rows["labels"], rows["logits"], names, paths[split])
        for tracker in run.trackers:
            tracker.add_image(f"{name}/predicted", plot, run.state.step)
    return paths


def number_blocks(rows: Mapping[str, np.ndarray], plot: bytes, names: Sequence[str], what: str) -> list[str]:
    """Blocks of ``report.html``: the ``plot`` as PNG and, of several numbers, how well each is predicted."""
    blocks = [page.picture(plot, "predicted over true numbers", f"Predicted and true, {what}")]
    if len(names) > 1:
        measured = [
            regression_metrics(rows["labels"][:, [number]], rows["logits"][:, [number]], rows["losses"])
            for number in range(len(names))
        ]
        columns = ("pearson", "spearman", "mse", "mae")
        table = [(name, *(values[key] for key in columns)) for name, values in zip(names, measured, strict=True)]
        blocks.append(page.table(["number", *columns], table, title=f"Per number, {what}"))
    return blocks


def show_labels(
    run: Run, found: Found, last: str, label_names: Sequence[str], thresholds: np.ndarray | None = None
) -> Shown:
    """Of several labels a row: reports of all splits; of ``last`` a table of the labels and the highest losses."""
    tables = write_label_reports(run, found, label_names, thresholds)
    details: dict[str, Any] = {"label_names": list(label_names)}
    if thresholds is not None:
        details["thresholds"] = dict(zip(label_names, thresholds.tolist(), strict=True))
    blocks = [label_table(tables[last], label_names, last)]
    return details, blocks, worst_labels(found[last], label_names, thresholds)


def show_numbers(run: Run, found: Found, last: str, names: Sequence[str]) -> Shown:
    """Of numbers: plots of all splits; of ``last`` predicted over true ones, and the highest losses."""
    plots = write_number_plots(run, found, names)
    blocks = number_blocks(found[last], plots[last].read_bytes(), names, last)
    return {"label_names": list(names)}, blocks, worst_numbers(found[last], names)


def write_label_predictions(
    path: Path,
    texts: Sequence[str],
    rows: Mapping[str, np.ndarray],
    label_names: Sequence[str],
    thresholds: np.ndarray | None = None,
) -> None:
    """:func:`report.predictions.write_predictions` for several labels a row, which are separated by a comma."""
    true, chosen, scores = rows["labels"] > 0, chosen_labels(rows["logits"], thresholds), sigmoid(rows["logits"])
    header = ["row", "text", "label", "predicted", *(f"p_{name}" for name in label_names)]
    table = (
        [row + 1, *map(formula_safe, (text, _listed(true[row], label_names), _listed(chosen[row], label_names))),
         *(f"{score:.6f}" for score in scores[row].tolist())]
        for row, text in enumerate(map(with_plain_breaks, texts))
    )  # fmt: skip
    write_csv(path, header, table)


def write_number_predictions(
    path: Path, texts: Sequence[str], rows: Mapping[str, np.ndarray], names: Sequence[str]
) -> None:
    """:func:`report.predictions.write_predictions` for numbers: each of a row and, as ``predicted_<name>``, what it was
    predicted to be."""
    header = ["row", "text", *map(formula_safe, names), *(f"predicted_{name}" for name in names)]
    numbers = np.concatenate([rows["labels"], rows["logits"]], axis=1)
    table = (
        [row + 1, formula_safe(text), *(f"{value:.6g}" for value in numbers[row].tolist())]
        for row, text in enumerate(map(with_plain_breaks, texts))
    )
    write_csv(path, header, table)


def worst_labels(
    rows: Mapping[str, np.ndarray], label_names: Sequence[str], thresholds: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """The rows with the highest losses, with their true and predicted labels, for :func:`report.page.mistakes`."""
    chosen = chosen_labels(rows["logits"], thresholds)
    return [
        {
            "row": int(row),
            "true": _listed(rows["labels"][row] > 0, label_names),
            "predicted": _listed(chosen[row], label_names),
            "loss": float(rows["losses"][row]),
        }
        for row in highest_losses(rows["losses"])
    ]


def worst_numbers(rows: Mapping[str, np.ndarray], names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows with the highest losses, with their true and predicted numbers, for :func:`report.page.mistakes`."""

    def shown(values: np.ndarray) -> str:
        numbers = [f"{value:.4g}" for value in values.tolist()]
        return numbers[0] if len(names) == 1 else ", ".join(map(" ".join, zip(names, numbers, strict=True)))

    return [
        {
            "row": int(row),
            "true": shown(rows["labels"][row]),
            "predicted": shown(rows["logits"][row]),
            "loss": float(rows["losses"][row]),
        }
        for row in highest_losses(rows["losses"])
    ]


def target_columns(
    logits: np.ndarray,
    names: Sequence[str],
    problem_type: str,
    thresholds: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> dict[str, list[str]]:
    """Columns of a table of predictions, as texts, for ``logits`` [n, C] of several labels or numbers a row.

    Several labels: ``label`` (all of them, if given), ``predicted``, and each one's probability as ``p_<label>``;
    numbers: ``<name>`` (if given) and ``predicted_<name>``. ``problem_type``: as in :mod:`data.targets`.
    """
    columns: dict[str, list[str]] = {}
    if problem_type == "regression":
        for before, values in (("", labels), ("predicted_", logits)):
            for place, name in enumerate(names if values is not None else ()):
                columns[f"{before}{name}"] = [f"{value:.7g}" for value in values[:, place].tolist()]
        return columns
    if labels is not None:
        columns["label"] = [_listed(row > 0, names, "") for row in labels]
    columns["predicted"] = [_listed(row, names, "") for row in chosen_labels(logits, thresholds)]
    for name, values in zip(names, sigmoid(logits).T, strict=True):
        columns[f"p_{name}"] = [f"{value:.6f}" for value in values.tolist()]
    return columns


def write_target_predictions(
    path: Path,
    files: Sequence[str],
    logits: np.ndarray,
    names: Sequence[str],
    problem_type: str,
    thresholds: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> None:
    """Writes a CSV with a row for each file: ``file`` and the columns of :func:`target_columns`."""
    columns = {"file": list(files), **target_columns(logits, names, problem_type, thresholds, labels)}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(target_rows(columns))
    write_text(path, text.getvalue())


def target_rows(columns: Mapping[str, Sequence[str]]) -> Iterator[list[str]]:
    """The rows of a CSV of these columns, safe to open in a spreadsheet."""
    texts = [formula_safe if name in TEXTS else str for name in columns]
    return ([kind(cell) for kind, cell in zip(texts, row, strict=True)] for row in zip(*columns.values(), strict=True))


def _listed(chosen: np.ndarray, names: Sequence[str], none: str = "none") -> str:
    return ", ".join(name for name, is_chosen in zip(names, chosen, strict=True) if is_chosen) or none


def keep_thresholds(folder: Path, label_names: Sequence[str], thresholds: np.ndarray) -> None:
    """Adds ``thresholds``, of each label's probability, to ``config.json`` of the saved model in ``folder``.

    transformers ignores the entry; tools/predict.py and tools/evaluate.py go by it. Main process only.
    """
    keep_in_config(folder, "thresholds", dict(zip(label_names, thresholds.tolist(), strict=True)))
