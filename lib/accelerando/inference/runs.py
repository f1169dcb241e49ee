"""Reads run folders, finished or not: their settings, results, history, predictions and models.

A run folder contains ``config.yaml`` from the start, ``metrics.jsonl`` during training, ``best/`` and ``last/``
(weights), and at the end ``predictions_<split>.csv``, ``results.json`` and ``report.html``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.config import flat_settings, read_yaml
from accelerando.base.errors import UserError
from accelerando.base.model_folder import read_json
from accelerando.train.weights import TORCH_MODULE

if TYPE_CHECKING:
    import numpy as np


# ------------------------------------------------------------------------------------------------- settings, results


def is_run(folder: Path) -> bool:
    """True for the folder of a run: settings are the first file that it writes."""
    return (folder / "config.yaml").is_file()


def is_finished(folder: Path) -> bool:
    """True for a finished run: the report is the last file that it writes.

    A finished run that was extended and then stopped still has these files; its ``results.json`` then has the earlier
    settings.
    """
    return (folder / "report.html").is_file() and (folder / "results.json").is_file()


def run_of(path: Path) -> Path | None:
    """The run at ``path``, or of which ``path`` is ``best/`` or ``last/``; None: it belongs to no run."""
    return next((folder for folder in (path, path.parent) if is_run(folder)), None)


def read_settings(run: Path) -> dict[str, Any]:
    """The settings in a run's ``config.yaml``, by name.

    Raises:
        UserError: it is missing or invalid.
    """
    if not is_run(run):
        raise UserError(f"{run}: not a run (no config.yaml in it)")
    return flat_settings(read_yaml(run / "config.yaml"))


def read_results(run: Path) -> dict[str, Any]:
    """``results.json`` of a run, or of a tool's evaluation.

    Raises:
        UserError: it is missing, as in an unfinished run, or invalid.
    """
    return read_json(run / "results.json")


# ------------------------------------------------------------------------------------------------------- predictions


@dataclass
class Predictions:
    """The predictions of a run, or of an ensemble, for n samples: ``files`` [n] (of texts, the numbers of the rows),
    the true ``labels`` int [n] and ``probabilities`` float64 [n, C]; ``texts`` [n], if that is what they are of."""

    files: list[str]
    labels: np.ndarray
    probabilities: np.ndarray
    texts: list[str] | None = None


def read_predictions(run: Path, split: str, label_names: list[str]) -> Predictions:
    """``predictions_<split>.csv`` of a classifier's run, with the C classes in the order of ``label_names``.

    Raises:
        UserError: it is missing or invalid.
    """
    import numpy as np

    numbers = {name: number for number, name in enumerate(label_names)}
    columns = [f"p_{name}" for name in label_names]
    files, labels, probabilities, texts = [], [], [], []
    for where, record in _prediction_records(run, split, ["label", *columns]):
        try:
            labels.append(numbers[record["label"]])
            probabilities.append([float(record[column]) for column in columns])
        except (KeyError, ValueError):
            raise UserError(f"{_predictions_file(run, split)}: {where}: unknown label or not a number") from None
        files.append(record["file" if "file" in record else "row"])
        texts += [record["text"]] if "file" not in record and "text" in record else []
    found = np.array(probabilities).reshape(-1, len(label_names))
    return Predictions(files, np.array(labels), found, texts or None)


def predicted_files(run: Path, split: str) -> set[str] | None:
    """The files of a split for which a run has predictions; None: it has none for this split."""
    if not _predictions_file(run, split).is_file():
        return None
    return {record["file" if "file" in record else "row"] for _, record in _prediction_records(run, split, [])}


@dataclass
class Answers:
    """What a run answered about n samples: ``samples`` [n] (files, or texts), their true ``labels`` [n] and what was
    ``predicted`` [n], as names; of several labels a row, all of them in one name."""

    samples: list[str]
    labels: list[str]
    predicted: list[str]


def read_answers(run: Path, split: str) -> Answers | None:
    """The labels of ``predictions_<split>.csv``, without the probabilities; None: there is no such file, or it has
    numbers instead of labels.

    Raises:
        UserError: the file is invalid.
    """
    import csv

    from accelerando.data.table_formats import without_formula_mark

    path = _predictions_file(run, split)
    if not path.is_file():
        return None
    csv.field_size_limit(2**31 - 1)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.reader(file, strict=True)
            header = next(rows, [])
            sample = next((name for name in ("text", "file") if name in header), None)
            if sample is None or not {"label", "predicted"} <= {*header}:
                return None
            places = [header.index(name) for name in (sample, "label", "predicted")]
            columns = [[without_formula_mark(row[place]) for place in places] for row in rows]
    except (csv.Error, IndexError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: invalid CSV ({error})") from None
    return Answers(*([row[place] for row in columns] for place in range(3)))


def _predictions_file(run: Path, split: str) -> Path:
    return run / f"predictions_{split}.csv"


def _prediction_records(run: Path, split: str, columns: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    from accelerando.data.table_formats import csv_records, without_formula_mark

    path = _predictions_file(run, split)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    for where, record in csv_records(path, columns):
        if "file" not in record and "row" not in record:
            raise UserError(f"{path}: no column 'file' and no column 'row'")
        yield where, {name: without_formula_mark(cell) for name, cell in record.items()}


# ------------------------------------------------------------------------------------------------------------ models


def model_folder(path: Path, adapters: bool = False) -> Path:
    """The folder with the weights: ``path`` itself, ``best/`` or ``last/`` of the run ``path``, or of an ONNX file.

    ``adapters``: a folder with only a LoRA adapter is accepted.

    Raises:
        UserError: no such folder, or no model in it.
    """
    if path.suffix == ".onnx" and path.parent.is_dir():
        path = path.parent
    if not path.is_dir():
        reason = "is a file, not a folder" if path.exists() else "no such folder"
        raise UserError(f"{path}: {reason}; name a run or a model folder")
    files = ("config.json", *(["adapter_config.json"] if adapters else []))
    for folder in (path, path / "best", path / "last"):
        if any((folder / file).is_file() for file in files):
            return folder
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path}: has only a LoRA adapter; merge it into its base model first")
    if path.parent.name == "checkpoints":
        raise UserError(f"{path}: is a checkpoint for resuming; name its run: {path.parent.parent}")
    raise UserError(f"{path}: no model here (no config.json, nor one in best/ or last/)")


def task_of_model(folder: Path, config: Mapping[str, Any]) -> str:
    """The task of the model in ``folder``, from its ``config.json``: text, image or sign.

    Raises:
        UserError: it is not a classifier of these.
    """
    named = config.get("architectures")
    architectures = [str(name) for name in named] if isinstance(named, list) else []
    kind = str(config.get("model_type", "of unknown kind"))
    if config.get("task") in ("text", "image", "sign"):
        return str(config["task"])
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return "text"
    own = kind in ("vision_net", "clip_classifier")
    if own or any(name.endswith("ForImageClassification") for name in architectures):
        return "image"
    if kind.startswith("sign_"):
        return "sign"
    if kind == TORCH_MODULE:  # the files beside it show its kind of input
        return "image" if (folder / "preprocessor_config.json").is_file() else "text"
    if heads := sorted(path.parent.name for path in folder.glob("*/config.json")):
        raise UserError(f"{folder}: one encoder for {' and '.join(heads)}: name one of them, as {folder / heads[0]}")
    raise UserError(
        f"{folder}: the model is {[*architectures, kind][0]}, but a classifier of texts, signs or images is needed"
    )
