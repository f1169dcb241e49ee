"""What a classification run leaves for people: summary, results, reports, pictures and ``report.html``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.config import command_line, grouped
from lib.metrics import classification_metrics, confusion_matrix, per_class, report_text
from lib.run import evaluations, peak_memory_mb, write_text

if TYPE_CHECKING:
    from lib.run import Run

METRICS = (
    "loss", "accuracy", "f1_macro", "f1_weighted", "precision_macro", "precision_weighted", "recall_macro",
    "recall_weighted",
)  # fmt: skip


def write_summary(run: Run, model_name: str, total_steps: int, columns: dict[str, dict[str, float]]) -> str:
    """Writes ``summary.txt``: the result on one screen. Called at each evaluation, so that it is current."""
    state = run.state
    done = "finished" if state.step >= total_steps else "training"
    rows = [
        ("run", str(run.directory)),
        ("model", model_name),
        ("progress", f"{done}, step {state.step:,} of {total_steps:,}, epoch {state.epochs_done:.2f}"),
        ("best step", f"{state.best_step:,}"),
        ("time", f"{state.seconds:,.1f} s of training, {state.samples / max(state.seconds, 1e-9):,.1f} samples/s"),
        ("waiting for data", f"{100 * state.wait_seconds / max(state.seconds, 1e-9):.1f} % of it"),
        ("peak memory", f"{peak_memory_mb(run.accelerator):,.0f} MB per process"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += ["", metrics_table(columns), "", "Repeat it with:", f"  {command_line()}", ""]
    text = "\n".join(lines)
    if run.accelerator.is_main_process:
        write_text(run.directory / "summary.txt", text)
    return text


def metrics_table(columns: dict[str, dict[str, float]]) -> str:
    """Metrics as rows, one aligned column for each of ``columns``."""
    width = max(len(name) for name in METRICS)
    lines = [" " * width + "".join(f"{name:>14}" for name in columns)]
    for name in METRICS:
        cells = "".join(f"{values[name]:>14.4f}" if name in values else " " * 14 for values in columns.values())
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines)


def write_classification_results(
    run: Run,
    model_name: str,
    title: str,
    label_names: list[str],
    scores: dict[str, dict[str, np.ndarray]],
    worst: list[dict[str, Any]],
    extra: dict[str, Any],
    total_steps: int,
) -> Path:
    """Writes everything the run directory promises and returns the path of ``report.html``.

    ``scores``: for each split ``labels`` [n], ``logits`` [n, C] and ``losses`` [n] of the best weights; ``worst``: rows
    for :func:`lib.report.mistakes`; ``extra``: more entries for ``results.json``. Main process only.
    """
    from lib.plots import plot_confusion, plot_curves

    state, directory = run.state, run.directory
    metrics = {
        split: classification_metrics(score["labels"], score["logits"], score["losses"])
        for split, score in scores.items()
    }
    matrices = {
        split: confusion_matrix(score["labels"], score["logits"].argmax(axis=1), len(label_names))
        for split, score in scores.items()
    }
    for split, matrix in matrices.items():
        write_text(directory / "logs" / f"classification_report_{split}.txt", report_text(matrix, label_names))
    last = "test" if "test" in scores else "validation"
    results = {
        "run": directory.name,
        "best_step": state.best_step,
        **{split: {**values, "count": int(matrices[split].sum())} for split, values in metrics.items()},
        "steps": state.step,
        "epochs": round(state.epochs_done, 4),
        "samples": state.samples,
        "seconds": round(state.seconds, 3),
        "samples_per_second": round(state.samples / max(state.seconds, 1e-9), 2),
        "data_wait_share": round(state.wait_seconds / max(state.seconds, 1e-9), 4),
        "peak_memory_mb": round(peak_memory_mb(run.accelerator), 1),
        "num_processes": run.accelerator.num_processes,
        **extra,
        "label_names": label_names,
        "confusion_matrix": matrices[last].tolist(),
        "command": command_line(),
        "config": grouped(run.args),
    }
    write_text(directory / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_summary(run, model_name, total_steps, metrics)

    history = [{"step": row["step"], **{f"{row['kind']}/{k}": v for k, v in row.items()}} for row in run.history]
    plot_curves(history, _curves(run), directory / "plots" / "curves.png")
    for split, matrix in matrices.items():
        picture = plot_confusion(matrix, label_names, directory / "plots" / f"confusion_{split}.png")
        for tracker in run.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image(f"{split}/confusion_matrix", picture, state.step, dataformats="HWC")
                report = f"```\n{report_text(matrix, label_names)}```"
                tracker.writer.add_text(f"{split}/classification_report", report, state.step)
    for split in [split for split in metrics if split != "validation"]:
        for tracker in run.trackers:
            tracker.log({f"{split}/{name}": value for name, value in metrics[split].items()}, step=state.step)
    path = directory / "report.html"
    _write_report(run, path, title, label_names, metrics, matrices, worst, history, last)
    return path


def worst_mistakes(score: dict[str, np.ndarray], label_names: list[str], limit: int = 20) -> list[dict[str, Any]]:
    """The most confident errors: dicts with ``row``, ``true``, ``predicted`` and ``confidence``, the worst first."""
    logits = score["logits"].astype(np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    confidence = (odds / odds.sum(axis=1, keepdims=True)).max(axis=1)
    predicted = logits.argmax(axis=1)
    wrong = np.flatnonzero(predicted != score["labels"])
    chosen = wrong[np.argsort(-confidence[wrong], kind="stable")][:limit]
    return [
        {
            "row": int(row),
            "true": label_names[score["labels"][row]],
            "predicted": label_names[predicted[row]],
            "confidence": float(confidence[row]),
        }
        for row in chosen
    ]


def _curves(run: Run) -> list[Any]:
    from lib.plots import Curve

    metric = getattr(run.args, "best_metric", "accuracy")
    return [
        Curve("Loss", {"train/loss": "train", "validation/loss": "validation"}, best="min"),
        Curve(metric, {f"validation/{metric}": "validation"}, best="min" if metric == "loss" else "max"),
        Curve("Learning rate", {"train/lr": "rate"}),
        Curve("Gradient norm", {"train/grad_norm": "norm before clipping"}, log_y=True),
    ]


def _write_report(
    run: Run,
    path: Path,
    title: str,
    names: list[str],
    metrics: dict[str, dict[str, float]],
    matrices: dict[str, np.ndarray],
    worst: list[dict[str, Any]],
    history: list[dict[str, Any]],
    last: str,
) -> None:
    from lib import report

    state, values = run.state, per_class(matrices[last])
    rows = [(name, *(metrics[split].get(name) for split in metrics)) for name in METRICS]
    changed = {
        field.name
        for field in dataclasses.fields(run.args)
        if field.default is not dataclasses.MISSING and getattr(run.args, field.name) != field.default
    }
    count = int(matrices[last].sum())
    blocks = [
        report.headline(
            [
                (f"{last} accuracy", f"{100 * metrics[last]['accuracy']:.2f} %", f"{count:,} rows"),
                (f"{last} F1 (macro)", f"{metrics[last]['f1_macro']:.4f}", f"{len(names)} classes"),
                ("best step", f"{state.best_step:,}", f"of {state.step:,}"),
                ("speed", f"{state.samples / max(state.seconds, 1e-9):,.0f}", "samples/s in training"),
            ]
        ),
        report.curves(history, _curves(run)),
        report.table(["metric", *metrics], rows, title="Metrics of the best weights"),
        report.confusion(matrices[last], names, title=f"Confusion matrix, {last}"),
        report.per_class(
            names, values["precision"], values["recall"], values["f1"], values["support"], title=f"Per class, {last}"
        ),
        report.mistakes(worst, title=f"Worst mistakes, {last}"),
        report.command(command_line()),
        report.settings(grouped(run.args), changed),
    ]
    evaluated = len(evaluations(run))
    processes = run.accelerator.num_processes
    counts = f"{state.step:,} steps, {evaluated} evaluations, {processes} process{'es' if processes > 1 else ''}"
    subtitle = f"{run.directory.name}: {counts}"
    report.write_report(path, title, subtitle, blocks)
