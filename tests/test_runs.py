"""accelerando.inference.runs: what a run folder says, finished or not, and one line for what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from accelerando.base.errors import UserError
from accelerando.inference import runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was stopped amid training."""
    folder = tmp_path / "runs" / "x"
    (folder / "best").mkdir(parents=True)
    (folder / "config.yaml").write_text("data:\n  train_file: a.json\ntraining:\n  lr: 0.1\n  layers: [1, 2]\n")
    rows = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "validation", "step": 1, "accuracy": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr')
    return folder


def test_an_unfinished_run(run: Path) -> None:
    assert runs.is_run(run) and not runs.is_finished(run)
    assert runs.run_of(run) == runs.run_of(run / "best") == run
    assert runs.run_of(run.parent) is None
    assert runs.read_settings(run) == {"train_file": "a.json", "lr": 0.1, "layers": [1, 2]}
    assert [row["step"] for row in runs.read_history(run)] == [1, 1]
    assert [row["accuracy"] for row in runs.read_history(run, "validation")] == [0.5]
    (run / "metrics.jsonl").unlink()
    assert runs.read_history(run) == []
    assert runs.predicted_files(run, "test") is None


def test_predictions(run: Path) -> None:
    text = "file,label,predicted,confidence,p_a,p_b\nx.jpg,b,a,0.6,0.6,0.4\ny.jpg,a,a,0.9,0.9,0.1\n"
    (run / "predictions_test.csv").write_text(text)
    found = runs.read_predictions(run, "test", ["a", "b"])
    assert found.files == ["x.jpg", "y.jpg"] and found.labels.tolist() == [1, 0]
    assert np.array_equal(found.probabilities, [[0.6, 0.4], [0.9, 0.1]])
    assert runs.predicted_files(run, "test") == {"x.jpg", "y.jpg"}


def test_a_model_is_in_best_or_last(run: Path) -> None:
    (run / "last").mkdir()
    (run / "last" / "config.json").write_text("{}")
    assert runs.model_folder(run) == run / "last"
    (run / "best" / "adapter_config.json").write_text("{}")
    assert runs.model_folder(run, adapters=True) == run / "best"
    (run / "best" / "config.json").write_text("{}")
    assert runs.model_folder(run) == runs.model_folder(run / "best") == run / "best"


def test_what_is_wrong_is_one_line(run: Path) -> None:
    def refused(words: str, function, *arguments: object) -> None:
        with pytest.raises(UserError) as error:
            function(*arguments)
        assert words in str(error.value) and "\n" not in str(error.value)

    refused("results.json: No such file", runs.read_results, run)
    (run / "results.json").write_text("[1]")
    refused("results.json: expected an object, found a list", runs.read_results, run)
    (run / "results.json").write_text("{")
    refused("results.json: invalid JSON", runs.read_results, run)
    refused("not a run (no config.yaml in it)", runs.read_settings, run.parent)
    refused("predictions_test.csv: no such file", runs.read_predictions, run, "test", ["a"])
    (run / "predictions_test.csv").write_text("file,label,p_a\nx.jpg,b,0.5\n")
    refused("unknown label or not a number", runs.read_predictions, run, "test", ["a"])
    (run / "metrics.jsonl").write_text('{"kind": "tr\n{"kind": "train"}\n')
    refused("metrics.jsonl, line 1: not a row of metrics", runs.read_history, run)
    refused("no model here", runs.model_folder, run)
