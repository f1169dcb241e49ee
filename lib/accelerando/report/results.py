"""The results of a run: ``summary.txt``, ``results.json``, ``plots/curves.png`` and ``report.html``.

This module is independent of the task: a script passes its metrics (:class:`train.state.Metric`), curves and blocks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from accelerando.base.config import grouped
from accelerando.base.files import write_text
from accelerando.base.model_folder import keep_in_config
from accelerando.base.texts import one_line, without_credentials
from accelerando.report import page
from accelerando.report.calibration import (
    best_temperature,
    calibration_metrics,
    error_of_answered,
    reliability,
    risk_coverage,
    softmax,
)
from accelerando.report.metrics import confusion_matrix, per_class, report_text
from accelerando.report.plots import Curve, plot_calibration, plot_confusion, plot_curves
from accelerando.train.accelerator import count_parameters, peak_memory_mb
from accelerando.train.run import repeat_command
from accelerando.train.state import Run
from accelerando.train.tracking import as_floats, evaluations

if TYPE_CHECKING:
    import torch

Columns = Mapping[str, Mapping[str, float]]  # metrics by the heading of their column, such as a split


def write_summary(run: Run, columns: Columns, notes: Mapping[str, str] | None = None) -> str:
    """Writes ``summary.txt``, the results on one screen; called at each evaluation to keep it up to date.

    ``notes``: additional lines by name.
    """
    state = run.state
    progress = "finished" if run.is_over else "training"
    rows = {
        "run": str(run.directory),
        "model": run.model_title,
        **({"data version": run.args.dataset_version} if run.args.dataset_version else {}),
        "progress": f"{progress}, step {state.step:,} of {run.total_steps:,}, epoch {state.epochs_done:.2f}",
        "best step": f"{state.best_step:,}",
        "time": f"{state.seconds:,.1f} s of training, {state.samples_per_second:,.1f} samples/s",
        "waiting for data": f"{100 * state.data_wait_share:.1f} % of the time",
        "peak memory": f"{peak_memory_mb(run.accelerator):,.0f} MB per process",
        **(notes or {}),
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {without_credentials(one_line(value))}" for name, value in rows.items()]
    columns = {title: values for title, values in columns.items() if values}
    lines += ["", metrics_table(run, columns), ""] if columns else [""]
    lines += ["Repeat it with:", f"  {repeat_command(run)}", ""]
    text = "\n".join(lines)
    if run.accelerator.is_main_process:
        write_text(run.directory / "summary.txt", text)
    return text


def metric_names(run: Run, columns: Columns) -> list[str]:
    """The metrics of all ``columns``: first those that the script lists, in its order, then the others."""
    found = dict.fromkeys(name for values in columns.values() for name in values)
    listed = [metric.name for metric in run.metrics if metric.name in found]
    return [*listed, *(name for name in found if name not in listed)]


def metrics_table(run: Run, columns: Columns) -> str:
    """Metrics as rows, one aligned column for each of ``columns``."""
    written = {title: dict(run.written(dict(values))) for title, values in columns.items()}
    return aligned_table(metric_names(run, columns), written)


def aligned_table(names: Sequence[str], columns: Mapping[str, Mapping[str, str]]) -> str:
    """``names`` as rows, with the texts of each of ``columns`` right-aligned; missing ones are blank."""
    width = max(map(len, names), default=0)
    cells = {title: max(10, 2 + len(title)) for title in columns}
    lines = [" " * width + "".join(f"{title:>{cell}}" for title, cell in cells.items())]
    for name in names:
        numbers = "".join(f"{texts.get(name, ''):>{cells[title]}}" for title, texts in columns.items())
        lines.append(f"{name:<{width}}{numbers}".rstrip())
    return "\n".join(lines)


def split_to_show(scores: Mapping[str, Any]) -> str:
    """The split whose images and mistakes are shown: test if it exists, else validation, else train."""
    return next(split for split in ("test", "validation", "train") if split in scores)


def metric_tiles(values: Mapping[str, float], notes: Mapping[str, str], what: str) -> list[tuple[str, str, str]]:
    """Tiles of a report for the metrics that ``notes`` names, with these notes; ``what`` stands before their names."""
    titles = {"f1_macro": "F1 (macro)", "f1_micro": "F1 (micro)"}
    written = {name: f"{100 * values[name]:.2f} %" if name == "accuracy" else f"{values[name]:.4f}" for name in notes}
    return [(f"{what} {titles.get(name, name)}", written[name], note) for name, note in notes.items()]


def training_curves(title: str, lines: Mapping[str, str], best: Literal["max", "min"] = "max") -> list[Curve]:
    """The panels of a report: loss, the metrics of the task (``title``), learning rate and gradient norm.

    ``lines``: key, such as ``"validation/accuracy"`` -> label of its line, whose ``best`` point is marked.
    """
    return [
        Curve("Loss", {"train/loss": "train", "validation/loss": "validation"}, best="min"),
        Curve(title, dict(lines), best=best),
        Curve("Learning rate", {"train/lr": "learning rate"}),
        Curve("Gradient norm", {"train/grad_norm": "norm before clipping"}, log_y=True),
    ]


def write_results(
    run: Run,
    model: torch.nn.Module,
    splits: Columns,
    counts: Mapping[str, int],
    details: Mapping[str, Any],
) -> None:
    """Writes ``results.json`` and sends the final metrics of each split to the trackers. Main process only.

    ``counts``: number of samples of each split; ``details``: additional entries for JSON.
    """
    trainable, parameters = count_parameters(model)
    state = run.state
    splits = {split: as_floats(values) for split, values in splits.items()}
    results = {
        "run": run.directory.name,
        **({"dataset_version": run.args.dataset_version} if run.args.dataset_version else {}),
        "best_step": state.best_step,
        **{split: {**values, "count": counts[split]} for split, values in splits.items()},
        "steps": state.step,
        "epochs": round(state.epochs_done, 4),
        "samples": state.samples,
        "seconds": round(state.seconds, 3),
        "samples_per_second": round(state.samples_per_second, 2),
        "data_wait_share": round(state.data_wait_share, 4),
        "peak_memory_mb": round(peak_memory_mb(run.accelerator), 1),
        "num_processes": run.accelerator.num_processes,
        "precision": run.accelerator.mixed_precision,
        "parameters": parameters,
        "trainable_parameters": trainable,
        **details,
        **({"trackers": run.state.trackers} if run.state.trackers else {}),
        "command": repeat_command(run),
        "config": grouped(run.args),
    }
    write_text(run.directory / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    for split in [split for split in splits if split != "validation"]:  # validation was sent at each evaluation
        for tracker in run.trackers:
            tracker.log({f"{split}/{name}": value for name, value in splits[split].items()}, step=state.step)


def write_page(
    run: Run,
    title: str,
    tiles: Sequence[tuple[str, str, str]],
    columns: Columns,
    curves: Sequence[Curve],
    blocks: Sequence[str],
    heading: str = "Metrics of the best weights",
) -> Path:
    """Writes ``report.html`` and ``plots/curves.png`` and returns the page's path. Main process only.

    ``tiles``: (name, number, note) for the headline, to which best step and speed are added; ``blocks``: the script's
    own blocks between the metrics and the settings, from :mod:`report.page`.
    """
    state = run.state
    history = [
        {"step": row["step"], **{f"{row['kind']}/{key}": value for key, value in row.items()}} for row in run.history
    ]
    plot_curves(history, curves, run.directory / "plots" / "curves.png")
    common = [
        ("best step", f"{state.best_step:,}", f"of {state.step:,}"),
        ("speed", f"{run.state.samples_per_second:,.0f}", "samples/s in training"),
    ]
    rows = [(name, *(values.get(name) for values in columns.values())) for name in metric_names(run, columns)]
    parts = [
        page.headline([*tiles, *common]),
        *([page.curves(history, curves)] if state.step else []),
        page.table(["metric", *columns], rows, title=heading),
        *blocks,
        page.command(repeat_command(run)),
        page.settings(grouped(run.args), _changed(run)),
    ]
    processes, evaluated = run.accelerator.num_processes, len(evaluations(run))
    counts = f"{state.step:,} steps, {evaluated} evaluations, {processes} process{'es' if processes > 1 else ''}"
    path = run.directory / "report.html"
    page.write_report(path, title, f"{run.directory.name}: {counts}", parts)
    return path


def write_class_reports(
    run: Run,
    found: Mapping[str, Mapping[str, np.ndarray]],
    class_names: Sequence[str],
    labels: str = "labels",
    logits: str = "logits",
    head: str = "",
) -> dict[str, np.ndarray]:
    """Writes a classification report and a plot of the confusion matrix for each split, also to TensorBoard.

    ``found``: for each split ``labels`` int [n] and ``logits`` [n, C] under these names; ``head``: the name of a head.
    Returns the confusion matrices [C, C]. Main process only.
    """
    matrices = {}
    for split, rows in found.items():
        name = f"{split}_{head}" if head else split
        matrix = confusion_matrix(rows[labels], rows[logits].argmax(axis=1), len(class_names))
        text = report_text(matrix, list(class_names))
        write_text(run.directory / "logs" / f"classification_report_{name}.txt", text)
        plot = plot_confusion(matrix, class_names, run.directory / "plots" / f"confusion_{name}.png")
        for tracker in run.trackers:
            tracker.add_image(f"{name}/confusion_matrix", plot, run.state.step)
            tracker.add_text(f"{name}/classification_report", f"```\n{text}```", run.state.step)
        matrices[split] = matrix
    return matrices


def class_blocks(matrix: np.ndarray, class_names: Sequence[str], what: str) -> list[str]:
    """Blocks of ``report.html``: a confusion matrix [C, C] and a table per class; ``what`` is added to their titles."""
    values = per_class(matrix)
    columns = (values[name] for name in ("precision", "recall", "f1", "support"))
    return [
        page.confusion(matrix, class_names, title=f"Confusion matrix, {what}"),
        page.per_class(class_names, *columns, title=f"Per class, {what}"),
    ]


def write_calibration(
    run: Run,
    found: Mapping[str, Mapping[str, np.ndarray]],
    split: str,
    labels: str = "labels",
    logits: str = "logits",
    head: str = "",
) -> tuple[dict[str, Any], list[str]]:
    """Fits a temperature on the validation rows, and shows what the probabilities of ``split`` are worth.

    ``found`` and ``head`` as in :func:`write_class_reports`. The temperature is kept in the ``config.json`` of the best
    weights as ``calibration_temperature`` (after the head's name). Returns the entries of ``results.json`` and the
    blocks of ``report.html``. Main process only.
    """
    if not all(np.isfinite(part[logits]).all() for part in found.values()):
        return {}, []  # of a model that returns NaN nothing can be said
    rows, prefix = found[split], f"{head}_" if head else ""
    temperature = None
    if "validation" in found:
        temperature = best_temperature(found["validation"][labels], found["validation"][logits])
    if temperature is not None and (run.directory / "best" / "config.json").is_file():
        keep_in_config(run.directory / "best", f"{prefix}calibration_temperature", round(temperature, 6))
    details: dict[str, Any] = {"temperature": temperature}
    details |= {name: calibration_metrics(part[labels], part[logits], temperature) for name, part in found.items()}
    before = softmax(rows[logits])
    after = None if temperature is None else softmax(rows[logits], temperature)
    path = run.directory / "plots" / f"calibration_{prefix}{split}.png"
    shown = before if after is None else after
    scaled = None if after is None else reliability(rows[labels], after)
    plot_calibration(reliability(rows[labels], before), scaled, *risk_coverage(rows[labels], shown), path)
    named = {"ece": "expected calibration error", "brier": "Brier score", "nll": "negative log-likelihood"}
    numbers, suffixes = details[split], ["", *([] if temperature is None else ["_calibrated"])]
    lines = [(title, *(numbers[name + suffix] for suffix in suffixes)) for name, title in named.items()]
    header = ["", "as trained", *([] if temperature is None else [f"calibrated, temperature {temperature:.3f}"])]
    answered = error_of_answered(rows[labels], shown).items()
    lines += [(f"wrong answers, {share:.0%} answered", *([""] * len(suffixes[1:])), error) for share, error in answered]
    what = f"{head}, {split}" if head else split
    return details, [
        page.picture(path.read_bytes(), "Accuracy over confidence, and errors over coverage", f"Calibration, {what}"),
        page.table(header, lines, align=["left", *(["right"] * len(suffixes))]),
    ]


def mixtures_block(run: Run, mixtures: Sequence[Mapping[str, float]]) -> str:
    """A block of ``report.html``: the validation metrics of mixtures of old and new weights, by their ``alpha``."""
    names = [name for name in metric_names(run, {"": mixtures[0]}) if name != "alpha"]
    rows = [tuple(mixture[name] for name in ("alpha", *names)) for mixture in mixtures]
    title = "WiSE-FT: mixtures of old and new weights, validation"
    return page.table(["share of new weights", *names], rows, title=title)


def write_table(run: Run, path: str | Path, columns: Mapping[str, str]) -> None:
    """Writes a CSV with a row for each evaluation; ``columns``: heading -> name in ``metrics.jsonl``.

    ``seconds`` are counted from the previous evaluation.
    """
    import csv
    import io

    if not run.accelerator.is_main_process:
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    before = 0.0
    for row in evaluations(run):
        values = {**row, "seconds": row["seconds"] - before}
        before = row["seconds"]
        writer.writerow([values.get(name, "") for name in columns.values()])
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text.getvalue())


def _changed(run: Run) -> set[str]:
    """Settings that differ from their default."""
    return {
        field.name
        for field in dataclasses.fields(run.args)
        if field.default is not dataclasses.MISSING and getattr(run.args, field.name) != field.default
    }
