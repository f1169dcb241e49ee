"""What a run leaves for people: summary, results, reports, pictures and ``report.html``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accelerando.base.config import grouped
from accelerando.base.files import write_text
from accelerando.base.processes import command_line
from accelerando.data.decode import thumbnail
from accelerando.report.metrics import classification_metrics, confusion_matrix, per_class, report_text
from accelerando.train.accelerator import peak_memory_mb
from accelerando.train.privacy import epsilon_of
from accelerando.train.tracking import evaluations

if TYPE_CHECKING:
    from accelerando.train.state import Run

METRICS = (
    "loss", "accuracy", "f1_macro", "f1_weighted", "precision_macro", "precision_weighted", "recall_macro",
    "recall_weighted",
)  # fmt: skip

RETRIEVAL_METRICS = (
    "loss", "image_to_text_r1", "image_to_text_r5", "image_to_text_r10", "text_to_image_r1", "text_to_image_r5",
    "text_to_image_r10", "recall_mean", "image_to_text_median_rank", "text_to_image_median_rank", "zero_shot_accuracy",
    "zero_shot_top5",
)  # fmt: skip

SIGN_METRICS = (
    "loss", "gloss_accuracy", "gloss_top5", "cat_accuracy", "gloss_f1_macro", "gloss_f1_weighted",
    "gloss_precision_macro", "gloss_precision_weighted", "gloss_recall_macro", "gloss_recall_weighted", "cat_f1_macro",
    "cat_f1_weighted", "occluded_accuracy", "visible_accuracy",
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
    if state.spent:
        delta = run.args.target_delta
        rows.append(("privacy spent", f"epsilon {epsilon_of(state.spent, delta):.3f} at delta {delta:g}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += ["", metrics_table(columns), ""] if columns else [""]
    lines += ["Repeat it with:", f"  {command_line()}", ""]
    text = "\n".join(lines)
    if run.accelerator.is_main_process:
        write_text(run.directory / "summary.txt", text)
    return text


def metrics_table(columns: dict[str, dict[str, float]]) -> str:
    """Metrics as rows, one aligned column for each of ``columns``."""
    known = dict.fromkeys((*METRICS, *SIGN_METRICS, *RETRIEVAL_METRICS))
    names = [name for name in known if any(name in values for values in columns.values())]
    width = max(map(len, names), default=0)
    cells = {title: max(10, 2 + len(title)) for title in columns}
    lines = [" " * width + "".join(f"{title:>{cell}}" for title, cell in cells.items())]
    for name in names:
        form = ".1f" if name.endswith("median_rank") else ".4f"
        numbers = (
            f"{values[name]:>{cells[title]}{form}}" if name in values else " " * cells[title]
            for title, values in columns.items()
        )  # fmt: skip
        lines.append(f"{name:<{width}}" + "".join(numbers))
    return "\n".join(lines)


def split_to_show(scores: dict[str, Any]) -> str:
    """The split whose pictures and mistakes are shown: the test split, or else what there is."""
    return next(split for split in ("test", "validation", "train") if split in scores)


def write_classification_results(
    run: Run,
    model_name: str,
    title: str,
    label_names: list[str],
    scores: dict[str, dict[str, np.ndarray]],
    worst: list[dict[str, Any]],
    extra: dict[str, Any],
    total_steps: int,
    unit: str = "rows",
) -> Path:
    """Writes everything the run directory promises and returns the path of ``report.html``.

    ``scores``: for each split ``labels`` [n], ``logits`` [n, C] and ``losses`` [n] of the best weights; ``worst``: rows
    for :func:`report.page.mistakes`; ``extra``: more entries for ``results.json``; ``unit``: what is counted. Main
    process only.
    """
    from accelerando.report.plots import plot_curves

    directory = run.directory
    metrics = {
        split: classification_metrics(score["labels"], score["logits"], score["losses"])
        for split, score in scores.items()
    }
    matrices = {
        split: confusion_matrix(score["labels"], score["logits"].argmax(axis=1), len(label_names))
        for split, score in scores.items()
    }
    for split, matrix in matrices.items():
        _write_confusion(run, split, matrix, label_names)
    last = split_to_show(scores)
    scored = {split: {**values, "count": int(matrices[split].sum())} for split, values in metrics.items()}
    details = {"label_names": label_names, "confusion_matrix": matrices[last].tolist()}
    _write_results(run, scored, extra | details)
    write_summary(run, model_name, total_steps, metrics)

    history = [{"step": row["step"], **{f"{row['kind']}/{k}": v for k, v in row.items()}} for row in run.history]
    plot_curves(history, _classification_curves(run), directory / "plots" / "curves.png")
    _track(run, metrics)
    path = directory / "report.html"
    _write_report(run, path, title, label_names, metrics, matrices, worst, history, last, unit)
    return path


def _classification_curves(run: Run) -> list[Any]:
    metric = run.args.best_metric if run.args.best_metric != "loss" else "accuracy"  # the loss has a panel of its own
    return _curves(metric, {f"validation/{metric}": "validation"})


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
    unit: str,
) -> None:
    from accelerando.report import page

    state, values = run.state, per_class(matrices[last])
    rows = [(name, *(metrics[split].get(name) for split in metrics)) for name in METRICS]
    count = int(matrices[last].sum())
    tiles = [
        (f"{last} accuracy", f"{100 * metrics[last]['accuracy']:.2f} %", f"{count:,} {unit}"),
        (f"{last} F1 (macro)", f"{metrics[last]['f1_macro']:.4f}", f"{len(names)} classes"),
        ("best step", f"{state.best_step:,}", f"of {state.step:,}"),
        ("speed", f"{state.samples / max(state.seconds, 1e-9):,.0f}", "samples/s in training"),
    ]
    if state.spent:
        delta = run.args.target_delta
        tiles.append(("epsilon spent", f"{epsilon_of(state.spent, delta):.3f}", f"at delta {delta:g}"))
    blocks = [
        page.headline(tiles),
        page.curves(history, _classification_curves(run)),
        page.table(["metric", *metrics], rows, title="Metrics of the best weights"),
        page.confusion(matrices[last], names, title=f"Confusion matrix, {last}"),
        page.per_class(
            names, values["precision"], values["recall"], values["f1"], values["support"], title=f"Per class, {last}"
        ),
        page.mistakes(worst, title=f"Worst mistakes, {last}"),
        page.command(command_line()),
        page.settings(grouped(run.args), _changed(run)),
    ]
    page.write_report(path, title, _subtitle(run), blocks)


# ------------------------------------------------------------------------------------------------------------ signs


def write_sign_results(
    run: Run,
    model_name: str,
    title: str,
    names: dict[str, list[str]],
    scores: dict[str, dict[str, np.ndarray]],
    metrics: dict[str, dict[str, float]],
    worst: list[dict[str, Any]],
    extra: dict[str, Any],
    total_steps: int,
) -> Path:
    """Writes everything the run directory promises and returns the path of ``report.html``. Main process only.

    ``names``: of the classes of the heads ``gloss`` and ``cat``. ``scores`` and ``metrics`` for each split: what
    :func:`report.metrics.sign_metrics` takes and gives. ``worst``: rows for :func:`report.page.mistakes`.
    """
    from accelerando.report import page
    from accelerando.report.plots import plot_curves

    state, directory = run.state, run.directory
    matrices = {
        (split, head): confusion_matrix(score[head], score[f"{head}_logits"].argmax(axis=1), len(names[head]))
        for split, score in scores.items()
        for head in names
    }
    for (split, head), matrix in matrices.items():
        _write_confusion(run, f"{split}_{head}", matrix, names[head])
    last = split_to_show(scores)
    scored = {split: {**values, "count": len(scores[split]["gloss"])} for split, values in metrics.items()}
    details = {f"{head}_names": names[head] for head in names}
    details |= {f"{head}_confusion_matrix": matrices[last, head].tolist() for head in names}
    _write_results(run, scored, extra | details)
    write_summary(run, model_name, total_steps, metrics)
    history = [{"step": row["step"], **{f"{row['kind']}/{k}": v for k, v in row.items()}} for row in run.history]
    plot_curves(history, _sign_curves(), directory / "plots" / "curves.png")
    _track(run, metrics)

    shown, count = metrics[last], len(scores[last]["gloss"])
    rows = [(name, *(metrics[split].get(name) for split in metrics)) for name in SIGN_METRICS]
    tiles = [
        (f"{last}, gloss", f"{100 * shown['gloss_accuracy']:.1f} %", f"{count:,} clips, {len(names['gloss'])} glosses"),
        (f"{last}, category", f"{100 * shown['cat_accuracy']:.1f} %", f"{len(names['cat'])} categories"),
        ("best step", f"{state.best_step:,}", f"of {state.step:,}"),
        ("speed", f"{state.samples / max(state.seconds, 1e-9):,.0f}", "clips/s in training"),
    ]
    blocks = [
        page.headline(tiles),
        page.curves(history, _sign_curves()),
        page.table(["metric", *metrics], [row for row in rows if any(value is not None for value in row[1:])],
                     title="Metrics of the best weights"),
    ]  # fmt: skip
    for head, label in (("gloss", "glosses"), ("cat", "categories")):
        values = per_class(matrices[last, head])
        columns = (values[name] for name in ("precision", "recall", "f1", "support"))
        blocks.append(page.confusion(matrices[last, head], names[head], title=f"Confusion matrix of {label}, {last}"))
        blocks.append(page.per_class(names[head], *columns, title=f"Per class, {label}, {last}"))
    blocks.append(page.mistakes(worst, title=f"Worst mistakes, {last}"))
    blocks += [page.command(command_line()), page.settings(grouped(run.args), _changed(run))]
    path = directory / "report.html"
    page.write_report(path, title, _subtitle(run), blocks)
    return path


def write_log_csv(run: Run, path: str | None) -> None:
    """The table ``path`` with a row for each evaluation; times in seconds since the last one, memory in MB."""
    if path is None or not run.accelerator.is_main_process:
        return
    import csv
    import io

    columns = {
        "epoch": "epoch", "train_loss": "train_loss", "val_loss": "loss", "val_gloss_acc": "gloss_accuracy",
        "val_cat_acc": "cat_accuracy", "lr": "lr", "epoch_time": "seconds", "gpu_memory_allocated": "gpu_allocated_mb",
        "gpu_memory_reserved": "gpu_reserved_mb",
    }  # fmt: skip
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


def _sign_curves() -> list[Any]:
    return _curves("Accuracy", {"validation/gloss_accuracy": "gloss", "validation/cat_accuracy": "category"})


# -------------------------------------------------------------------------------------------------------- retrieval

EXAMPLES = 8  # queries that a report shows
SHOWN = 5  # pictures for each


def retrieval_examples(found: dict[str, Any], gallery: Any) -> list[dict[str, Any]]:
    """The best pictures for a few captions: dicts with ``query`` (row of the caption) and ``results``.

    ``found``: embeddings as the script's evaluation gives them; the captions are spread evenly over the readable ones,
    so that they are the same before and after training. A result is (row of the picture, score, whether it is right).
    """
    pairs = np.flatnonzero(found["readable"])
    if not len(pairs):
        return []
    chosen = pairs[np.unique(np.linspace(0, len(pairs) - 1, min(EXAMPLES, len(pairs))).astype(int))]
    readable = np.flatnonzero(found["image_valid"])
    examples = []
    for pair in chosen:
        caption = gallery.text_of[pair]
        scores = found["image"][readable] @ found["text"][caption]
        best = np.argsort(-scores, kind="stable")[:SHOWN]
        right = set(gallery.image_of[gallery.text_of == caption].tolist())
        results = [(int(gallery.image_rows[readable[n]]), float(scores[n]), int(readable[n]) in right) for n in best]
        examples.append({"query": int(gallery.text_rows[caption]), "results": results})
    return examples


def keep_examples(run: Run, name: str, split: str, examples: list[dict[str, Any]]) -> None:
    """Writes examples beside the plots, for the report that is made at the end, perhaps by a later process."""
    if run.accelerator.is_main_process:
        write_text(run.directory / "plots" / f"examples_{name}_{split}.json", json.dumps(examples) + "\n")


def write_retrieval_results(
    run: Run,
    model_name: str,
    title: str,
    sources: dict[str, Any],
    galleries: dict[str, Any],
    scores: dict[str, dict[str, dict[str, float]]],
    mixtures: list[dict[str, float]],
    extra: dict[str, Any],
    total_steps: int,
) -> Path:
    """Writes everything the run directory promises and returns the path of ``report.html``. Main process only.

    ``scores[split]`` holds the metrics of the ``base`` model and, unless nothing was trained, of the ``tuned`` one;
    ``mixtures``: WiSE-FT's rows, each with ``alpha`` (the share of new weights) and the validation metrics.
    """
    from accelerando.report import page
    from accelerando.report.plots import plot_curves

    directory, state = run.directory, run.state
    columns = {
        f"{kind} {split}": values
        for split in scores
        for kind, values in (("base", scores[split]["base"]), ("", scores[split].get("tuned")))
        if values is not None
    }
    columns = {name.strip(): values for name, values in columns.items()}
    counts = {
        split: {
            "pairs": len(sources[split]),
            "images": len(galleries[split].image_rows),
            "captions": len(galleries[split].text_rows),
        }
        for split in galleries
    }
    scored = {
        split: {**scores[split].get("tuned", scores[split]["base"]), "count": counts[split]["pairs"]}
        for split in scores
    }
    details = {"base": {split: scores[split]["base"] for split in scores}, "galleries": counts, "wise_ft": mixtures}
    _write_results(run, scored, extra | details)
    write_summary(run, model_name, total_steps, columns)
    history = [{"step": row["step"], **{f"{row['kind']}/{k}": v for k, v in row.items()}} for row in run.history]
    plot_curves(history, _retrieval_curves(), directory / "plots" / "curves.png")
    _track(run, {split: scores[split]["tuned"] for split in scores if "tuned" in scores[split]})

    last = split_to_show(scores)
    base, tuned = scores[last]["base"], scores[last].get("tuned")
    shown = tuned or base
    tiles = [
        (
            f"{last}, {label}",
            f"{100 * shown[f'{way}_r1']:.1f} %",
            f"base {100 * base[f'{way}_r1']:.1f} %, chance {100 / counts[last][items]:.2g} %",
        )
        for way, label, items in (
            ("text_to_image", "text to image R@1", "images"),
            ("image_to_text", "image to text R@1", "captions"),
        )
    ]
    tiles.append(("gallery", f"{counts[last]['images']:,}", f"pictures, {counts[last]['captions']:,} captions"))
    tiles.append(("speed", f"{state.samples / max(state.seconds, 1e-9):,.0f}", "samples/s in training"))
    names = [name for name in RETRIEVAL_METRICS if name in shown]
    rows = [(name, *(values.get(name) for values in columns.values())) for name in names]
    blocks = [
        page.headline(tiles),
        page.table(["metric", *columns], rows, title="Metrics of the best weights, beside the base model"),
    ]
    if mixtures:
        header = ["share of new weights", *(name for name in names if name in mixtures[0])]
        mixed = [(row["alpha"], *(row[name] for name in header[1:])) for row in mixtures]
        blocks.append(page.table(header, mixed, title="WiSE-FT: mixtures of old and new weights, validation"))
    if state.step:
        blocks.append(page.curves(history, _retrieval_curves()))
    blocks.append(page.retrieval(_example_rows(run, sources[last], last, tuned is not None), title=f"Examples, {last}"))
    blocks += [page.command(command_line()), page.settings(grouped(run.args), _changed(run))]
    path = directory / "report.html"
    page.write_report(path, title, _subtitle(run), blocks)
    return path


def _example_rows(run: Run, source: Any, split: str, trained: bool) -> list[dict[str, Any]]:
    """Captions with the thumbnails of what was found before and after."""
    kept: dict[str, list[dict[str, Any]]] = {}
    for name in ("base", "tuned") if trained else ("base",):
        path = run.directory / "plots" / f"examples_{name}_{split}.json"
        kept[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    titles = {"base": "before" if trained else "base model", "tuned": "after"}
    pictures: dict[int, bytes] = {}
    rows: dict[int, dict[str, Any]] = {}
    for name, examples in kept.items():
        for example in examples:
            caption = " ".join(source.read(example["query"])[1].decode("utf-8", "replace").split())
            row = rows.setdefault(example["query"], {"query": caption, "strips": {}})
            for picture, _, _ in example["results"]:
                if picture not in pictures:
                    pictures[picture] = thumbnail(source.read(picture)[0])
            row["strips"][titles[name]] = [
                (pictures[picture], score, right) for picture, score, right in example["results"]
            ]
    return list(rows.values())


def _retrieval_curves() -> list[Any]:
    recalls = {
        "validation/text_to_image_r1": "text to image, 1",
        "validation/image_to_text_r1": "image to text, 1",
        "validation/recall_mean": "mean of all",
    }
    return _curves("Recall", recalls)


# ------------------------------------------------------------------------------------------------------- all of them


def _curves(title: str, lines: dict[str, str]) -> list[Any]:
    """The curves of every task: the loss, the metric ``title`` that the task is about, the rate and the gradient."""
    from accelerando.report.plots import Curve

    return [
        Curve("Loss", {"train/loss": "train", "validation/loss": "validation"}, best="min"),
        Curve(title, lines, best="max"),
        Curve("Learning rate", {"train/lr": "rate"}),
        Curve("Gradient norm", {"train/grad_norm": "norm before clipping"}, log_y=True),
    ]


def _write_confusion(run: Run, name: str, matrix: np.ndarray, class_names: list[str]) -> None:
    """The report in words and the confusion matrix as a picture, in the run directory and in TensorBoard."""
    from accelerando.report.plots import plot_confusion

    text = report_text(matrix, class_names)
    write_text(run.directory / "logs" / f"classification_report_{name}.txt", text)
    picture = plot_confusion(matrix, class_names, run.directory / "plots" / f"confusion_{name}.png")
    for tracker in run.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(f"{name}/confusion_matrix", picture, run.state.step, dataformats="HWC")
            tracker.writer.add_text(f"{name}/classification_report", f"```\n{text}```", run.state.step)


def _track(run: Run, metrics: dict[str, dict[str, float]]) -> None:
    """The final metrics of each split; those of the validation were sent at each evaluation."""
    for split in [split for split in metrics if split != "validation"]:
        for tracker in run.trackers:
            tracker.log({f"{split}/{name}": value for name, value in metrics[split].items()}, step=run.state.step)


def _write_results(run: Run, scored: dict[str, dict[str, Any]], details: dict[str, Any]) -> None:
    state = run.state
    results = {
        "run": run.directory.name,
        "best_step": state.best_step,
        **scored,
        "steps": state.step,
        "epochs": round(state.epochs_done, 4),
        "samples": state.samples,
        "seconds": round(state.seconds, 3),
        "samples_per_second": round(state.samples / max(state.seconds, 1e-9), 2),
        "data_wait_share": round(state.wait_seconds / max(state.seconds, 1e-9), 4),
        "peak_memory_mb": round(peak_memory_mb(run.accelerator), 1),
        "num_processes": run.accelerator.num_processes,
        "precision": run.accelerator.mixed_precision,
        **details,
        "command": command_line(),
        "config": grouped(run.args),
    }
    write_text(run.directory / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def _subtitle(run: Run) -> str:
    processes, evaluated = run.accelerator.num_processes, len(evaluations(run))
    counts = f"{run.state.step:,} steps, {evaluated} evaluations, {processes} process{'es' if processes > 1 else ''}"
    return f"{run.directory.name}: {counts}"


def _changed(run: Run) -> set[str]:
    """Settings that are not at their default."""
    return {
        field.name
        for field in dataclasses.fields(run.args)
        if field.default is not dataclasses.MISSING and getattr(run.args, field.name) != field.default
    }
