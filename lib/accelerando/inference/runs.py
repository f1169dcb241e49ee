"""Run folders, finished or not: the one place that reads their settings, results, history, predictions and models.

A run folder holds ``config.yaml`` from its start, ``metrics.jsonl`` while it trains, ``best/`` and ``last/`` (weights),
and at its end ``predictions_<split>.csv``, ``results.json`` and ``report.html``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.config import read_yaml
from accelerando.base.errors import UserError

if TYPE_CHECKING:
    import numpy as np

TORCH_MODULE = "torch_module"  # the model_type of a plain torch module that the library saved
SCRIPTS = {  # task -> the script that trains for it
    "text": "text_classify.py", "image": "image_classify.py", "sign": "sign_train.py", "clip": "clip_finetune.py",
}  # fmt: skip
# A setting that the script of one task alone has, -> the task.
OWN_SETTINGS = {"train_file": "text", "fold": "image", "keypoints_train": "sign", "train_data": "clip"}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: no such file, broken JSON, or something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: broken JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found a {type(content).__name__}")
    return content


# ------------------------------------------------------------------------------------------------- settings, results


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, which writes its settings first."""
    return (folder / "config.yaml").is_file()


def is_finished(folder: Path) -> bool:
    """Whether a run came to its end: the report is the last file that it writes.

    A run that was prolonged and then stopped still has the files of its first end; its ``results.json`` holds the
    settings of then.
    """
    return (folder / "report.html").is_file() and (folder / "results.json").is_file()


def run_of(path: Path) -> Path | None:
    """The run that ``path`` is, or in which it lies as ``best/`` or ``last/``; None where it belongs to no run."""
    return next((folder for folder in (path, path.parent) if is_run(folder)), None)


def flat_settings(groups: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, from the sections of ``config.yaml`` or of the ``config`` in ``results.json``."""
    settings: dict[str, Any] = {}
    for key, value in groups.items():
        settings.update(value if isinstance(value, dict) else {key: value})
    return settings


def read_settings(run: Path) -> dict[str, Any]:
    """The settings in a run's ``config.yaml``, by name.

    Raises:
        UserError: it is missing or broken.
    """
    if not is_run(run):
        raise UserError(f"{run}: no run (it lacks config.yaml)")
    return flat_settings(read_yaml(run / "config.yaml"))


def read_results(run: Path) -> dict[str, Any]:
    """``results.json`` of a run, or of a tool's evaluation.

    Raises:
        UserError: it is missing, as in an unfinished run, or broken.
    """
    return read_json(run / "results.json")


def read_history(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``: all, or those of one kind (train, validation, test).

    Empty where nothing was recorded yet. A last line that was cut off when the run was killed is ignored.

    Raises:
        UserError: another line is broken.
    """
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: broken JSON") from None
    return [row for row in rows if kind in (None, row["kind"])]


def task_of_run(run: Path) -> str:
    """The task that a run trains for: text, image, sign or clip; see ``SCRIPTS``.

    Raises:
        UserError: its settings are those of no script, or are missing.
    """
    settings = read_settings(run)
    for name, task in OWN_SETTINGS.items():
        if name in settings:
            return task
    raise UserError(f"{run / 'config.yaml'}: not the settings of {', '.join(SCRIPTS.values())}")


# ------------------------------------------------------------------------------------------------------- predictions


@dataclass
class Predictions:
    """What one run, or several together, predict for n files: ``files`` [n], the true ``labels`` int [n] and
    ``probabilities`` float64 [n, C]."""

    files: list[str]
    labels: np.ndarray
    probabilities: np.ndarray


def read_predictions(run: Path, split: str, label_names: list[str]) -> Predictions:
    """``predictions_<split>.csv`` of a classifier's run, its C classes in the order of ``label_names``.

    Raises:
        UserError: it is missing or broken.
    """
    import numpy as np

    numbers = {name: number for number, name in enumerate(label_names)}
    columns = [f"p_{name}" for name in label_names]
    files, labels, probabilities = [], [], []
    for where, record in _prediction_records(run, split, ["label", *columns]):
        try:
            labels.append(numbers[record["label"]])
            probabilities.append([float(record[column]) for column in columns])
        except (KeyError, ValueError):
            raise UserError(f"{_predictions_file(run, split)}: {where}: an unknown label, or no number") from None
        files.append(record["file"])
    return Predictions(files, np.array(labels), np.array(probabilities).reshape(-1, len(label_names)))


def predicted_files(run: Path, split: str) -> set[str] | None:
    """The files that a run predicted of a split; None where it has no predictions of it."""
    if not _predictions_file(run, split).is_file():
        return None
    return {record["file"] for _, record in _prediction_records(run, split, [])}


def _predictions_file(run: Path, split: str) -> Path:
    return run / f"predictions_{split}.csv"


def _prediction_records(run: Path, split: str, columns: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    from accelerando.data.tables import csv_records

    path = _predictions_file(run, split)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return csv_records(path, ["file", *columns])


# ------------------------------------------------------------------------------------------------------------ models


def model_folder(path: Path, adapters: bool = False) -> Path:
    """The folder with the weights: ``path`` itself, or ``best/`` or ``last/`` of the run ``path``.

    ``adapters``: a LoRA adapter alone is fine too.

    Raises:
        UserError: no such folder, or no model in it.
    """
    if not path.is_dir():
        reason = "is a file, not a folder" if path.exists() else "no such folder"
        raise UserError(f"{path}: {reason}; give a run or a model folder")
    files = ("config.json", *(["adapter_config.json"] if adapters else []))
    for folder in (path, path / "best", path / "last"):
        if any((folder / file).is_file() for file in files):
            return folder
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path}: holds a LoRA adapter alone; merge it into its model first")
    if path.parent.name == "checkpoints":
        raise UserError(f"{path}: is a checkpoint for resuming; give its run: {path.parent.parent}")
    raise UserError(f"{path}: no model here (no config.json, nor one in best/ or last/)")


def task_of_model(folder: Path, config: Mapping[str, Any]) -> str:
    """The task of the model in ``folder``, from its ``config.json``: text, image or sign.

    Raises:
        UserError: no classifier of these.
    """
    architectures = [str(name) for name in config.get("architectures") or []]
    kind = str(config.get("model_type", "of unknown kind"))
    if config.get("task") in ("text", "image", "sign"):
        return str(config["task"])
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return "text"
    if any(name.endswith("ForImageClassification") for name in architectures) or kind == "vision_net":
        return "image"
    if kind.startswith("sign_"):
        return "sign"
    if kind == TORCH_MODULE:  # what stands beside it says what it reads
        return "image" if (folder / "preprocessor_config.json").is_file() else "text"
    raise UserError(
        f"{folder}: the model is {[*architectures, kind][0]}; needed is a classifier of texts, signs or images"
    )
