"""tools/compare_runs.py and report.comparison: the tests are scipy's, claims are as rare and as frequent as theory says."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from harness import ROOT, results
from scipy import special, stats

from accelerando.base.errors import UserError
from accelerando.data.table_formats import without_formula_mark
from accelerando.inference.run_sets import as_sets, main_metric, paired, read_run
from accelerando.inference.runs import read_answers, read_predictions
from accelerando.report import page
from accelerando.report.comparison import (
    ALPHA,
    POWER,
    Difference,
    compare_answers,
    compare_independent,
    compare_paired,
    hedges,
    holm,
    interval_of_mean,
    mcnemar,
    power,
    runs_for_claim,
)
from accelerando.report.predictions import write_predictions
from accelerando.report.target_reports import write_label_predictions, write_number_predictions

CLASSES = ["cat", "=dog"]


@pytest.fixture
def tool() -> ModuleType:
    """tools/compare_runs.py as a module."""
    spec = importlib.util.spec_from_file_location("compare_runs", ROOT / "tools" / "compare_runs.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["compare_runs"] = module
    spec.loader.exec_module(module)
    return module


def make_run(
    folder: Path,
    accuracy: float,
    seed: int = 1,
    right: Sequence[bool] | None = None,
    samples: Sequence[str] | None = None,
    split: str = "test",
    count: int = 200,
    script: str = "image_classify",
    names: Sequence[str] = CLASSES,
    **settings: object,
) -> Path:
    """A finished run as the scripts leave it: settings, results, history, report and, with ``right``, predictions."""
    folder.mkdir(parents=True)
    settings = {"data_dir": "data/pets", "lr": 0.1, "fold": 0, "best_metric": "accuracy", **settings}
    config = {
        "data": {name: settings[name] for name in ("data_dir", "fold")},
        "training": {name: value for name, value in settings.items() if name not in ("data_dir", "fold")}
        | {"seed": seed},
        "output": {"output_dir": "runs", "run_name": folder.name},
    }
    (folder / "config.yaml").write_text("training:\n  seed: 1\n")
    if right is not None:
        count, accuracy = len(right), float(np.mean(right))
        labels = np.arange(count) % 2
        chosen = np.where(right, labels, 1 - labels)
        files = [f"{number}.jpg" for number in range(count)] if samples is None else list(samples)
        write_predictions(folder / f"predictions_{split}.csv", files, list(names), np.eye(2)[chosen], labels)
    content = {
        split: {"accuracy": accuracy, "loss": 1 - accuracy, "count": count},
        "label_names": list(names), "num_processes": 1, "precision": "no",
        "command": f"python scripts/{script}.py --seed {seed}", "config": config,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(content))
    rows = [{"kind": "train", "step": step, "loss": 1 / step} for step in (1, 2, 3)]
    rows += [{"kind": "validation", "step": step, "loss": 1 / step, "accuracy": accuracy} for step in (1, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "report.html").write_text("<html>")
    return folder


def make_set(parent: Path, name: str, values: Sequence[float], first: int = 1, **settings: object) -> list[Path]:
    """A run for each value, each with a seed of its own."""
    return [
        make_run(parent / f"{name}_seed{seed}", value, seed, **settings)
        for seed, value in enumerate(values, start=first)
    ]


def widest(text: str) -> int:
    """The width of what was printed, without paths."""
    return max(len(line) for line in text.splitlines() if not line.startswith("Report: "))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("count", [2, 3, 5, 12, 60])
def test_pairs_as_in_scipy(count: int) -> None:
    rng = np.random.default_rng(count)
    first, second = rng.normal(0.8, 0.01, count), rng.normal(0.81, 0.02, count)
    found, expected = compare_paired(first, second), stats.ttest_rel(second, first)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.rank_p == pytest.approx(stats.wilcoxon(second - first).pvalue)
    assert found.cohen == pytest.approx((second - first).mean() / (second - first).std(ddof=1))
    assert found.cohen == pytest.approx(expected.statistic / math.sqrt(count))
    assert found.effect == pytest.approx(found.cohen * hedges(count - 1))


@pytest.mark.parametrize("sizes", [(2, 2), (3, 7), (10, 10), (40, 25)])
def test_independent_runs_as_in_scipy(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(sizes)
    first, second = rng.normal(0.8, 0.01, sizes[0]), rng.normal(0.81, 0.03, sizes[1])
    found, expected = compare_independent(first, second), stats.ttest_ind(second, first, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert found.test == "Welch's t" and found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.rank_p == pytest.approx(stats.mannwhitneyu(second, first).pvalue)
    student = stats.ttest_ind(second, first)  # whose statistic is Cohen's d over its scale
    assert found.cohen == pytest.approx(student.statistic * math.sqrt(1 / sizes[0] + 1 / sizes[1]))
    alone = compare_independent(first[:1], second)
    assert alone.test == "Student's t" and alone.p == pytest.approx(stats.ttest_ind(second, first[:1]).pvalue)


def test_folds_have_the_corrected_variance() -> None:
    first, second = [0.80, 0.82, 0.79, 0.83, 0.81], [0.82, 0.85, 0.80, 0.84, 0.84]
    plain, corrected = compare_paired(first, second), compare_paired(first, second, folds=5)
    differences = np.subtract(second, first)
    statistic = differences.mean() / math.sqrt(differences.var(ddof=1) * (1 / 5 + 1 / 4))
    assert corrected.p == pytest.approx(2 * stats.t.sf(statistic, 4)) and corrected.p > 2 * plain.p
    assert corrected.high - corrected.low == pytest.approx(1.5 * (plain.high - plain.low))
    assert corrected.rank_p == plain.rank_p and corrected.difference == plain.difference


def test_mcnemar_as_in_scipy() -> None:
    assert mcnemar(3, 12) == pytest.approx(stats.binomtest(3, 15).pvalue)  # exact
    assert mcnemar(25, 0) == pytest.approx(2 * 0.5**25)
    statistic = stats.chi2_contingency([[121, 59], [59, 121]], correction=False).statistic  # twice (b - c)^2 / (b + c)
    assert stats.chi2.isf(mcnemar(121, 59), 1) == pytest.approx(statistic / 2 * (61 / 62) ** 2)  # continuity
    assert mcnemar(0, 0) == mcnemar(7, 7) == 1
    first, second = np.zeros(100, bool), np.zeros(100, bool)
    first[:30], second[10:70] = True, True
    found = compare_answers(first, second)
    assert found.difference == pytest.approx(0.3) and found.p == mcnemar(10, 40)
    assert found.low < 0.3 < found.high


def test_statsmodels_agrees_where_it_is_installed() -> None:
    power_of = pytest.importorskip("statsmodels.stats.power")
    from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
    from statsmodels.stats.multitest import multipletests

    for b, c in ((3, 12), (30, 50), (121, 59), (0, 4)):
        theirs = their_mcnemar([[10, b], [c, 20]], exact=b + c <= 25, correction=True)
        assert mcnemar(b, c) == pytest.approx(theirs.pvalue)
    p_values = np.random.default_rng(0).random(20) ** 3
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    for effect, count in ((0.5, 34), (1.3, 5), (0.1, 200)):
        theirs = power_of.TTestPower().power(effect, count, ALPHA)
        assert power(effect, 1 / math.sqrt(count), count - 1) == pytest.approx(theirs)
        theirs = power_of.TTestIndPower().power(effect, count, ALPHA)
        assert power(effect, math.sqrt(2 / count), 2 * count - 2) == pytest.approx(theirs)


def test_holm_and_hedges() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, math.nan, 0.8])[0] == 1 and math.isnan(holm([0.9, math.nan, 0.8])[1])
    for degrees in (2, 5, 30):
        exact = special.gamma(degrees / 2) / (math.sqrt(degrees / 2) * special.gamma((degrees - 1) / 2))
        assert hedges(degrees) == pytest.approx(exact)
    assert hedges(1) == 0 and hedges(100_000) == pytest.approx(1, abs=1e-4)
    values = [0.8, 0.82, 0.81]
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert interval_of_mean(values) == pytest.approx((expected[1] - expected[0]) / 2)


def difference(effect: float, paired: bool = True, folds: int = 0) -> Difference:
    rank = "Wilcoxon" if paired else "Mann-Whitney"
    return Difference(effect, -1, 1, "", 0.3, rank, 0.3, effect, effect, 5, 5, folds)


def test_how_many_runs_a_claim_takes() -> None:
    # The numbers of every table of sample sizes (Cohen 1988) for a power of 80 %.
    assert [runs_for_claim(difference(d)) for d in (0.2, 0.5, 0.8)] == [199, 34, 15]
    assert [runs_for_claim(difference(d, paired=False)) for d in (0.2, 0.5, 0.8)] == [394, 64, 26]
    assert runs_for_claim(difference(-0.5)) == 34
    many = runs_for_claim(difference(0.5), comparisons=10)
    assert power(0.5, 1 / math.sqrt(many), many - 1, ALPHA / 10) >= POWER
    assert power(0.5, 1 / math.sqrt(many - 1), many - 2, ALPHA / 10) < POWER
    assert runs_for_claim(difference(0)) is runs_for_claim(difference(1e-5)) is None
    assert runs_for_claim(difference(0.3, folds=5)) is None  # repetitions do not make the folds' overlap smaller
    assert runs_for_claim(difference(2, folds=5)) > runs_for_claim(difference(2))
    assert power(1e4, 0.1, 3) == 1


@pytest.mark.parametrize("are_paired", [True, False])
def test_seeds_of_one_setting_are_called_different_in_at_most_a_twentieth(are_paired: bool) -> None:
    rng = np.random.default_rng(3)
    p_values = []
    for _ in range(200):
        first, second = rng.normal(0.9, 0.01, (2, 5))
        found = compare_paired(first, second) if are_paired else compare_independent(first, second)
        p_values.append(found.p)
    assert sum(p < ALPHA for p in p_values) <= 10
    assert stats.kstest(p_values, "uniform").pvalue > 0.01  # nor are they called equal too often


@pytest.mark.parametrize("are_paired", [True, False])
def test_two_standard_errors_are_found_as_often_as_theory_says(are_paired: bool) -> None:
    rng, count, repetitions = np.random.default_rng(1), 6, 1000
    scale = math.sqrt((1 if are_paired else 2) / count)
    claims = 0
    for _ in range(repetitions):
        first, second = rng.normal(0, math.sqrt(0.5) if are_paired else 1, (2, count))
        second = second + 2 * scale
        found = compare_paired(first, second) if are_paired else compare_independent(first, second)
        claims += found.p < ALPHA
    expected = power(2 * scale, scale, count - 1 if are_paired else 2 * count - 2)
    assert 0.3 < expected < 0.5
    # Welch's degrees of freedom are estimated, which costs a little.
    assert abs(claims / repetitions - expected) < 3 * math.sqrt(expected * (1 - expected) / repetitions) + 0.02


def test_what_cannot_be_tested() -> None:
    assert compare_paired([0.9], [0.8]) is None and compare_independent([0.9], [0.8]) is None
    assert compare_paired([0.9, math.nan, 0.8], [0.8, 0.7, math.nan]) is None
    same = compare_paired([0.9, 0.8], [0.9, 0.8])
    assert same.p == same.rank_p == 1 and same.difference == same.cohen == 0
    constant = compare_independent([0.9, 0.9], [0.8, 0.8])
    assert math.isnan(constant.p) and constant.low == constant.high == pytest.approx(-0.1)
    assert math.isnan(compare_paired([0.1, 0.2], [0.4, 0.5]).p)  # all differences are equal but for rounding


# --------------------------------------------------------------------------------------------------------------- sets


def test_runs_that_differ_in_seed_or_fold_alone_are_a_set(tmp_path: Path) -> None:
    small = make_set(tmp_path, "small", [0.8, 0.81, 0.82])
    other = make_set(tmp_path, "large", [0.9, 0.91], lr=0.2)
    old = make_run(tmp_path / "older", 0.83, 4)
    content = results(old)
    content["config"]["training"]["new_flag"] = None  # as in runs from after it was added
    content["config"]["output"]["keep_checkpoints"] = 9
    (old / "results.json").write_text(json.dumps(content))
    sets = as_sets([read_run(folder) for folder in (*small, *other, old)])
    assert [(each.name, each.counted) for each in sets] == [("small_seed1 + 3", "4 seeds"), ("large", "2 seeds")]
    assert sets[1].differing == {"lr": "0.2"}
    assert main_metric(sets[0].runs[0]) == "accuracy"
    assert [(a.key, b.key) for a, b in paired(sets[0], sets[1])] == [((1, 0), (1, 0)), ((2, 0), (2, 0))]
    again = as_sets([read_run(folder) for folder in (*small, make_run(tmp_path / "again", 0.8, 2))])
    assert [(each.name, each.counted) for each in again] == [("small", "3 seeds"), ("again", "1 run")]
    folds = [
        make_run(tmp_path / f"cv_fold{fold}", 0.8, train_file=f"splits/fold_{fold}/train.csv") for fold in range(3)
    ]
    (cross,) = as_sets([read_run(folder) for folder in folds])
    assert cross.name == "cv" and cross.counted == "3 folds" and cross.folds == 3


def test_folders_of_one_name_are_told_apart_by_as_little_as_it_takes(tmp_path: Path) -> None:
    places = [tmp_path / "runs" / name / "trial_0001" for name in ("first", "second")]
    sets = as_sets([read_run(make_run(place, 0.8, number, lr=number + 1.0)) for number, place in enumerate(places)])
    assert [each.name for each in sets] == ["first/trial_0001", "second/trial_0001"]


def test_seeds_pair_up_or_not(tmp_path: Path) -> None:
    def sets(first: int, **settings: object) -> list:
        parent = tmp_path / f"from{first}"
        folders = [*make_set(parent, "a", [0.8, 0.81, 0.82]), *make_set(parent, "b", [0.9, 0.91], first, lr=0.2)]
        return as_sets([read_run(folder) for folder in folders])

    assert len(paired(*sets(1))) == 2  # seeds 1 and 2 of 1, 2 and 3
    assert not paired(*sets(3))  # seed 3, but not 4
    one, other = sets(9)
    assert not paired(one, other) and not paired(one, one.__class__("x", one.runs[:1]))


# --------------------------------------------------------------------------------------------------------------- tool


def test_two_sets_of_seeds(tool: ModuleType, call_tool, tmp_path: Path) -> None:
    first, second = [0.80, 0.82, 0.79, 0.83, 0.81], [0.84, 0.85, 0.83, 0.86, 0.86]
    folders = [*make_set(tmp_path / "runs", "small", first), *make_set(tmp_path / "runs", "large", second, lr=0.2)]
    out = tmp_path / "out"
    code, text, _ = call_tool(tool, *folders, "--output_dir", out)
    assert code == 0
    assert widest(text) <= 80
    assert "10 runs in 2 sets, in which only seed or fold differ" in " ".join(text.split())
    content = json.loads((out / "comparison.json").read_text())
    (found,) = content["comparisons"]
    assert found["tests"][0]["p"] == pytest.approx(stats.ttest_rel(second, first).pvalue) == found["holm_p"]
    assert found["claimed"] and content["sets"][0]["name"] == "large"  # the best first
    (claim,) = content["claims"]
    assert claim.startswith("large is better than small: accuracy +0.0380 (95 % interval +0.0")
    assert claim.endswith("5 seeds against 5 seeds).") and " ".join(claim.split()) in " ".join(text.split())
    html = (out / "report.html").read_text()
    assert html.count('<div class="row') == 2 and 'class="row claimed"' in html  # one difference and the axis
    assert "<th" in html and ">lr<" in html and "data-curves" in html and "momentum" not in html
    code, _, error = call_tool(tool, *folders, "--output_dir", out)
    assert code == 2 and "--overwrite replaces it" in error
    assert call_tool(tool, *folders, "--output_dir", out, "--overwrite")[0] == 0
    assert (out / "report.html").read_text().partition("<pre>")[0] == html.partition("<pre>")[0]
    (out / "mine.txt").write_text("x")
    assert call_tool(tool, *folders, "--output_dir", out, "--overwrite")[0] == 2


def test_what_cannot_be_claimed_says_how_many_runs_it_takes(tool: ModuleType, call_tool, tmp_path: Path) -> None:
    first, second = [0.80, 0.82, 0.79], [0.82, 0.81, 0.83]
    folders = [*make_set(tmp_path, "a", first), *make_set(tmp_path, "b", second, first=7, lr=0.2)]
    text = " ".join(call_tool(tool, *folders, "--baseline", tmp_path / "b_seed8")[1].split())
    needed = runs_for_claim(compare_independent(second, first))
    assert (
        f"a chance of 80 % to find a difference of the observed size takes {needed} runs of each, {needed - 3}" in text
    )
    assert "No difference between a and b can be claimed: accuracy -0.0167" in text and "Welch's t p = " in text
    assert call_tool(tool, tmp_path / "a_*", tmp_path / "b_*", "--baseline", "b_seed8")[1].split() == text.split()
    code, _, error = call_tool(tool, *folders, "--baseline", "c")
    assert code == 2 and "--baseline c: is not among the runs" in error


def test_two_runs_with_predictions(tool: ModuleType, call_tool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    right = [rng.random(120) < 0.6 for _ in range(2)]
    right[1][:50] = True
    samples = [f"={number}.jpg" for number in range(119)] + ["=7.jpg"]  # one of them twice
    folders = [make_run(tmp_path / f"run{number}", 0, right=each, samples=samples, lr=number + 1.0)
               for number, each in enumerate(right)]  # fmt: skip
    code, text, _ = call_tool(tool, *folders, "--metrics", "accuracy", "loss", "--output_dir", tmp_path / "out")
    assert code == 0 and widest(text) <= 80
    lost, gained = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    of = {row["metric"]: row for row in json.loads((tmp_path / "out" / "comparison.json").read_text())["comparisons"]}
    assert of["accuracy"]["tests"][0]["p"] == pytest.approx(mcnemar(lost, gained))
    assert of["loss"]["tests"] == []
    assert f"{gained} samples gained, {lost} lost" in " ".join(text.split())
    changed = rows_of(tmp_path / "out" / "changed_samples.csv")
    assert [row["change"] for row in changed].count("gained") == gained and len(changed) == gained + lost
    assert all(row["sample"].startswith("'=") for row in changed)
    for row in changed:
        where = [place for place, name in enumerate(samples) if name == without_formula_mark(row["sample"])]
        assert any(right[1][place] != right[0][place] for place in where)
        assert (row["predicted"] == row["label"]) == (row["change"] == "gained")


def test_the_folds_together_are_compared_by_their_predictions(tool: ModuleType, call_tool, tmp_path: Path) -> None:
    rng, folders, right = np.random.default_rng(5), [], {}
    for name, chance in (("a", 0.5), ("b", 0.8)):
        right[name] = rng.random((4, 50)) < chance
        for fold, each in enumerate(right[name]):
            files = [f"{fold}_{number}.jpg" for number in range(50)]
            folders.append(
                make_run(tmp_path / f"{name}_fold{fold}", 0, 1, each, files, "validation", fold=fold, lr=chance)
            )
    call_tool(tool, *folders, "--output_dir", tmp_path / "out")
    (found,) = json.loads((tmp_path / "out" / "comparison.json").read_text())["comparisons"]
    by_fold, together = found["tests"]
    expected = compare_paired(right["a"].mean(axis=1), right["b"].mean(axis=1), folds=4)
    assert by_fold["test"] == "corrected paired t" and by_fold["p"] == pytest.approx(expected.p) == found["holm_p"]
    lost, gained = int((right["a"] & ~right["b"]).sum()), int((right["b"] & ~right["a"]).sum())
    assert together["test"] == "McNemar" and together["p"] == pytest.approx(mcnemar(lost, gained))
    assert together["difference"] == pytest.approx(right["b"].mean() - right["a"].mean())


def test_the_same_table_as_ever_and_what_is_passed_over(tool: ModuleType, call_tool, tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one", 0.5), make_run(tmp_path / "two", 0.75, lr=0.2)
    broken = make_run(tmp_path / "broken", 0.5)
    (broken / "results.json").write_text("{")
    unfinished = make_run(tmp_path / "unfinished", 0.5)
    (unfinished / "report.html").unlink()
    (tmp_path / "empty").mkdir()
    names = [one, two, broken, unfinished, tmp_path / "empty"]
    code, text, _ = call_tool(tool, *names, "--metrics", "accuracy", "test.loss", "--output_csv", tmp_path / "t.csv")
    assert code == 0
    assert text.splitlines()[:3] == [
        "run  split  accuracy  test.loss", "one  test     0.5000     0.5000", "two  test     0.7500     0.2500",
    ]  # fmt: skip
    assert (tmp_path / "t.csv").read_text() == (
        "run,split,accuracy,test.loss\none,test,0.5000,0.5000\ntwo,test,0.7500,0.2500\n"
    )
    (line,) = [line for line in text.splitlines() if line.startswith("Passed over")]
    for part in ("broken/results.json: invalid JSON", "unfinished: not finished", "empty: not a run"):
        assert part in line
    assert "train several seeds of each" in " ".join(text.split())
    for given, said in (
        ([], "name the folders of finished runs"),
        ([tmp_path / "empty"], "empty: not a run"),
        ([broken, unfinished], "none of these can be compared"),
        ([one, "--metrics", "f2"], "--metrics f2: no run has it; there are accuracy, loss"),
        ([one, "--split", "validation"], "one: no metrics of validation; there are test"),
    ):
        code, _, error = call_tool(tool, *given)
        assert code == 2 and said in error and len(error.splitlines()) == 1


def test_only_what_was_scored_on_the_same_is_compared(tool: ModuleType, call_tool, tmp_path: Path) -> None:
    right = np.arange(40) < 30
    folders = [
        make_run(tmp_path / "a", 0, right=right),
        make_run(tmp_path / "b", 0, right=~right, samples=[f"{number}.png" for number in range(40)], lr=0.2),
        make_run(tmp_path / "c", 0.9, count=77, lr=0.3),
        make_run(tmp_path / "d", 0.9, names=["x", "y"], lr=0.4, data_dir="data/others"),
    ]
    text = " ".join(call_tool(tool, *folders)[1].split())
    assert "Not compared with a (other samples): c" in text and "Not compared with a (other classes): d" in text
    assert "Nothing can be claimed of b and a" in text and "McNemar" not in text
    assert "image_classify on pets, test" in text and "image_classify on others, test" in text


def test_a_glance_shows_the_settings_that_few_runs_have(tool: ModuleType, call_tool, tmp_path: Path) -> None:
    for number in range(5):
        changed = (
            {"weight_decay": 0.1} if number == 2 else {"notes": "x" * 25, "more": "y " * 12} if number == 3 else {}
        )
        make_run(tmp_path / f"run{number}", 0.5 + number / 10, lr=number + 1.0, ema=number == 4, **changed)
    lines = call_tool(tool, tmp_path / "run*")[1].splitlines()
    board = "\n".join(lines[: lines.index("± half of the 95 % interval of the mean; * the baseline")])
    assert re.search(r"run4 .*\n +lr 5, ema yes\n", board) and re.search(r"run1 .*\n +lr 2\n", board)
    assert re.search(r"run2 .*\n +lr 3, weight_decay 0.1\n", board) and board.count("weight_decay") == 1


def test_sixty_runs(tool: ModuleType, call_tool, tmp_path: Path) -> None:
    rng, truth = np.random.default_rng(2), np.linspace(0.5, 0.9, 60)
    difficulty = rng.random(400)
    for number, chance in enumerate(truth):
        right = difficulty + rng.normal(0, 0.1, 400) < chance
        make_run(tmp_path / "runs" / f"trial_{number:02d}", 0, right=right, lr=round(0.01 * (number + 1), 2))
    folders = sorted((tmp_path / "runs").iterdir())
    started = time.process_time()
    code, text, _ = call_tool(tool, *folders, "--output_dir", tmp_path / "out")
    assert code == 0 and time.process_time() - started < 15
    assert widest(text) <= 80
    assert len([line for line in text.splitlines() if re.match(r" *\d+ +trial_\d\d", line)]) == 60
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    p_values = [row["tests"][0]["p"] for row in content["comparisons"]]
    assert [row["holm_p"] for row in content["comparisons"]] == pytest.approx(holm(p_values))
    assert any(p < ALPHA <= row["holm_p"] for p, row in zip(p_values, content["comparisons"], strict=True))
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count('<div class="row') == 60 and "<summary>47 more</summary>" in html
    assert len(html) < 1_000_000 and html.count('class="line') <= 3 * 12


def test_the_page_escapes_names_and_draws_what_is_finite() -> None:
    nan = math.nan
    block = page.differences([("<b>", 0.1, -0.1, 0.3, True), ("y", -0.5, nan, nan, False), ("z", nan, nan, nan, False)])
    assert block.count("&lt;b&gt;") == 2
    assert block.count('class="reach"') == 1 and block.count("<b style") == 2 and block.count('class="zero"') == 3
    assert "−0.5000" in block and "nan%" not in block
    assert page.differences([("x", 0.0, 0.0, 0.0, False)])  # nothing to scale by
    folded = page.sentences([f"{number} < 1" for number in range(15)], "T")
    assert folded.count("<li>") == 15 and "3 more" in folded and "0 &lt; 1" in folded


# --------------------------------------------------------------------------------------------------------- real runs


def test_real_runs_of_text(train_here, tool: ModuleType, call_tool, text_set: Path) -> None:
    folders = [train_here("--seed", seed, "--lr", lr, "--epochs", 1, name=f"lr{lr}_seed{seed}")
               for lr in ("3e-3", "3e-4") for seed in (1, 2)]  # fmt: skip
    rows = json.loads((text_set / "test.json").read_text())
    table = rows_of(folders[0] / "predictions_test.csv")
    assert list(table[0])[:5] == ["row", "text", "label", "predicted", "confidence"]
    assert [without_formula_mark(row["text"]) for row in table] == [row["text"] for row in rows]
    assert [(row["row"], row["label"]) for row in table] == [(str(n), r["label"]) for n, r in enumerate(rows, start=1)]
    right = np.mean([row["label"] == row["predicted"] for row in table])
    assert right == pytest.approx(results(folders[0])["test"]["accuracy"])
    found = read_predictions(folders[0], "test", results(folders[0])["label_names"])
    assert found.files[:2] == ["1", "2"] and np.allclose(found.probabilities.sum(axis=1), 1, atol=1e-4)
    code, text, _ = call_tool(tool, *folders, "--output_dir", "out")
    assert code == 0 and "4 runs in 2 sets" in text and "text_classify on" in text
    (claim,) = json.loads(Path("out/comparison.json").read_text())["claims"]
    assert "lr3e-4" in claim and "2 seeds against 2 seeds" in claim
    assert {row["label"] for row in rows_of(Path("out/changed_samples.csv"))} <= {row["label"] for row in rows}


def test_predictions_of_signs(sign_here, sign_set: Path) -> None:
    run = sign_here("--epochs", 1)
    table, found = rows_of(run / "predictions_test.csv"), results(run)
    assert list(table[0]) == [
        "file",
        "label",
        "predicted",
        "confidence",
        *(f"p_{name}" for name in found["gloss_names"]),
    ]
    assert len(table) == found["test"]["count"] and all((sign_set / "test" / row["file"]).exists() or
                                                        (sign_set / "test" / f"{row['file']}.npz").exists() for row in table)  # fmt: skip
    right = np.mean([row["label"] == row["predicted"] for row in table])
    assert right == pytest.approx(found["test"]["gloss_accuracy"])


def test_a_text_with_line_breaks_and_a_formula_is_read_as_one_row(tmp_path: Path) -> None:
    texts = ["=1+1", "two\r\nlines", "a\rb", 'a "quoted", text', ""]
    write_predictions(tmp_path / "predictions_test.csv", texts, CLASSES, np.eye(2)[[0, 1, 0, 1, 0]],
                      np.array([0, 0, 0, 1, 1]), of_texts=True)  # fmt: skip
    answers = read_answers(tmp_path, "test")
    assert answers.samples == ["=1+1", "two\nlines", "a\nb", 'a "quoted", text', ""]
    assert answers.labels == ["cat", "cat", "cat", "=dog", "=dog"]
    assert answers.predicted == ["cat", "=dog", "cat", "=dog", "cat"]
    assert read_answers(tmp_path, "validation") is None
    (tmp_path / "predictions_test.csv").write_text("file,label,predicted\na,b\n")
    with pytest.raises(UserError, match=r"predictions_test\.csv: invalid CSV"):
        read_answers(tmp_path, "test")


def test_predictions_of_several_labels_and_of_numbers(tmp_path: Path) -> None:
    texts = ["=a", "b\rc"]
    rows = {"labels": np.array([[1, 0], [1, 1]]), "logits": np.array([[2.0, -2.0], [-1.0, 0.1]])}
    write_label_predictions(tmp_path / "predictions_test.csv", texts, rows, CLASSES, np.array([0.5, 0.6]))
    answers = read_answers(tmp_path, "test")
    assert answers.samples == ["=a", "b\nc"]
    assert answers.labels == ["cat", "cat, =dog"] and answers.predicted == ["cat", "none"]
    table = rows_of(tmp_path / "predictions_test.csv")
    assert [float(row["p_=dog"]) for row in table] == pytest.approx(special.expit([-2.0, 0.1]), abs=1e-6)
    write_number_predictions(tmp_path / "predictions_test.csv", texts, rows, CLASSES)
    assert read_answers(tmp_path, "test") is None
    assert rows_of(tmp_path / "predictions_test.csv")[1] == {
        "row": "2", "text": "b\nc", "cat": "1", "'=dog": "1", "predicted_cat": "-1", "predicted_=dog": "0.1",
    }  # fmt: skip
