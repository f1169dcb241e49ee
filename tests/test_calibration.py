"""Calibration: the numbers against their definitions, and temperature scaling on logits whose temperature is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from harness import ROOT, results, script_module
from tasks import TASKS, Task

from accelerando.report.calibration import (
    best_temperature,
    brier,
    calibration_metrics,
    error_of_answered,
    reliability,
    risk_coverage,
    softmax,
)


def drawn(temperature: float, count: int = 20_000, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels that follow softmax(logits / temperature) exactly, and these logits."""
    random = np.random.default_rng(seed)
    logits = 3 * random.normal(size=(count, classes))
    odds = softmax(logits, temperature).cumsum(axis=1)
    return (random.random((count, 1)) > odds).sum(axis=1).clip(0, classes - 1), logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_of_the_data_is_found(temperature: float) -> None:
    labels, logits = drawn(temperature)
    assert best_temperature(labels, logits) == pytest.approx(temperature, rel=0.05)
    found = calibration_metrics(labels, logits, best_temperature(labels, logits))
    assert found["ece_calibrated"] < 0.01
    if temperature != 1:
        assert found["ece"] > 3 * found["ece_calibrated"]
        assert found["nll"] > found["nll_calibrated"]
        assert found["brier"] > found["brier_calibrated"]


def test_no_prediction_changes() -> None:
    _, logits = drawn(1.0, count=500)
    for temperature in (0.05, 0.7, 3.0, 20.0):
        assert (softmax(logits, temperature).argmax(axis=1) == logits.argmax(axis=1)).all()


def test_where_the_rows_do_not_bound_it_there_is_none() -> None:
    labels, logits = drawn(1.0, count=300)
    assert best_temperature(logits.argmax(axis=1), logits) is None  # all right: the colder, the better
    assert best_temperature(labels[:19], logits[:19]) is None
    random = np.random.default_rng(1).integers(0, 5, len(labels))
    assert best_temperature(random, logits) is None  # nothing learnt: the hotter, the better


def test_reliability_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.55, 0.45]])
    found = reliability(np.array([0, 1, 1, 1]), probabilities, bins=10)
    assert found.confidence == pytest.approx([0.55, 0.8, 0.9])
    assert found.accuracy == pytest.approx([0, 1, 0.5])
    assert found.count.tolist() == [1, 1, 2]
    assert found.error == pytest.approx((0.55 + 0.2 + 2 * 0.4) / 4)
    certain = reliability(np.array([0]), np.array([[1.0, 0.0]]))
    assert certain.error == 0


def test_brier_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import brier_score_loss

    labels, logits = drawn(1.0, count=400, classes=2)
    probabilities = softmax(logits)
    assert brier(labels, probabilities) == pytest.approx(2 * brier_score_loss(labels, probabilities[:, 1]))


def test_risk_falls_with_coverage_and_ties_count_together() -> None:
    labels = np.array([0, 1, 0, 0])
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.6, 0.4]])
    coverage, risk = risk_coverage(labels, probabilities)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk == pytest.approx([0, 1 / 3, 1 / 3, 1 / 4])
    other = [0, 2, 1, 3]
    assert risk_coverage(labels[other], probabilities[other])[1] == pytest.approx(risk)
    labels, logits = drawn(1.0)
    found = error_of_answered(labels, softmax(logits))
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found[1.0] == pytest.approx(float((logits.argmax(axis=1) != labels).mean()))


@pytest.mark.figures
@pytest.mark.parametrize("task", [pytest.param(TASKS[name], id=name) for name in ("text", "sign", "image", "har")])
def test_every_report_of_classes_shows_it(task: Task, request) -> None:
    """The numbers of results.json are in the page; the temperature lies beside the weights, which open with it."""
    run = request.getfixturevalue(task.here)("--epochs", "1")
    found = results(run)["calibration"]
    config = json.loads((run / "best" / "config.json").read_text())
    kept = config.get("gloss_calibration_temperature" if task.name == "sign" else "calibration_temperature")
    assert kept == pytest.approx(found["temperature"], abs=1e-5) if found["temperature"] else kept is None
    page = (run / "report.html").read_text()
    assert f'data-v="{found["test"]["ece"]!r}"' in page
    assert "Calibration, " in page
    name = "calibration_gloss_test.png" if task.name == "sign" else "calibration_test.png"
    assert (run / "plots" / name).stat().st_size > 10_000
    task.opened(run / "best", run)


def test_predict_answers_with_the_temperature(train_here, call_tool, tmp_path) -> None:
    """The same class, and the probabilities of the logits divided by it; a folder without one is named."""
    predict = script_module(ROOT / "tools" / "predict.py")
    run = train_here("--epochs", "2", "--report_to", "none")
    path = run / "best" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"calibration_temperature": 2.5}))
    texts = ["goal match", "bank", "a"]
    plain, scaled = (
        [json.loads(line) for line in call_tool(predict, run, *texts, *flags)[1].splitlines()]
        for flags in ((), ("--calibrated",))
    )
    for one, other in zip(plain, scaled, strict=True):
        assert other["label"] == one["label"]
        odds = np.array([value ** (1 / 2.5) for value in one["scores"].values()])
        assert list(other["scores"].values()) == pytest.approx((odds / odds.sum()).tolist(), abs=1e-4)
    config.pop("calibration_temperature", None)
    path.write_text(json.dumps(config))
    code, _, err = call_tool(predict, run, "a", "--calibrated")
    assert code == 2
    assert f"--calibrated: {run / 'best'} has no temperature" in err
