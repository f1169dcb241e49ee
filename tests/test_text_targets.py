"""text_classify.py with several labels a row and with numbers: reading, training, metrics, thresholds, tools."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fork_server import draw_nothing
from harness import TEXT, history, kill_and_resume, launch, results, run_in_this_process, script_module, weights
from made_data import COMMON, WORDS, write_json
from tools import evaluate, export, predict

from accelerando.base.errors import UserError
from accelerando.data.splits import stratified_split
from accelerando.data.tables import encode_labels, label_names, read_text_table
from accelerando.data.targets import as_targets, strata
from accelerando.inference.named import find_named
from accelerando.report.target_metrics import (
    best_thresholds,
    chosen_labels,
    multi_label_metrics,
    regression_metrics,
    sigmoid,
    tuned_metrics,
)

TOPICS = sorted(WORDS)  # money, space, sport
WORTH = {"goal": 2.0, "bank": -1.5, "moon": 0.5, "star": 1.0}  # of each occurrence of a word, in the numbers below
# Kim's net sees which words are there, so both made sets have an optimum that it reaches.
CNN = (
    "--architecture", "cnn", "--vocab_size", "300", "--embed_size", "16", "--num_filters", "32", "--filter_sizes", "1",
    "--dropout_prob", "0", "--lr", "2e-2", "--batch_size", "16", "--max_length", "48", "--report_to", "none",
)  # fmt: skip
WIDE = ("--num_filters", "64", "--embed_size", "32")
EXACT = ("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0")


def make_topics(count: int, seed: int) -> list[dict]:
    """Texts with the labels whose words are in them: none to three."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        labels = [topic for topic, share in zip(TOPICS, (0.5, 0.3, 0.15), strict=True) if rng.random() < share]
        words = [str(rng.choice(COMMON)) for _ in range(int(rng.integers(3, 12)))]
        words += [str(rng.choice(WORDS[topic][:4])) for topic in labels for _ in range(2)]
        rows.append({"text": " ".join(rng.permutation(words)), "labels": labels})
    return rows


def make_numbers(count: int, seed: int) -> list[dict]:
    """Texts with a number, the sum of WORTH over their words, none of which is there twice; a second one is its square."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        words = [word for word in WORTH if rng.random() < 0.5]
        score = 0.25 + sum(WORTH[word] for word in words)
        words += [str(rng.choice(COMMON)) for _ in range(int(rng.integers(3, 10)))]
        rows.append({"text": " ".join(rng.permutation(words)), "score": score, "negative": -score, "pair": "a goal"})
    return rows


def write_csv(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def as_texts(rows: list[dict]) -> list[dict]:
    """The labels of a row in one cell."""
    return [{"text": row["text"], "labels": " | ".join(row["labels"])} for row in rows]


def as_columns(rows: list[dict]) -> list[dict]:
    """A column of 0 and 1 for each label."""
    return [{"text": row["text"], **{topic: int(topic in row["labels"]) for topic in TOPICS}} for row in rows]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both sets: topics as lists, and numbers."""
    folder = tmp_path_factory.mktemp("targets")
    for seed, (split, count) in enumerate({"train": 250, "validation": 83, "test": 91}.items()):
        write_json(folder / f"topics_{split}.json", make_topics(count, seed))
        write_csv(folder / f"numbers_{split}.csv", make_numbers(count, seed))
    return folder


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """See :func:`harness.run_in_this_process`; only the plots of numbers are drawn."""
    from accelerando.report import target_reports

    with pytest.MonkeyPatch.context() as patch:
        own = target_reports.plot_numbers
        draw_nothing(patch.setattr)
        patch.setattr(target_reports, "plot_numbers", own)
        here = contextlib.contextmanager(run_in_this_process)
        with here(TEXT, [], tmp_path_factory.mktemp("runs_of_targets"), patch) as run:

            def train_and_unlisten(*flags: object, **how: object) -> Path:
                """As other files do after each test: a later signal ends pytest instead of being noted."""
                handlers = {
                    number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
                }
                try:
                    return run(*flags, **how)
                finally:
                    for number, handler in handlers.items():
                        signal.signal(number, handler)

            yield train_and_unlisten


def files(made: Path, name: str, suffix: str) -> list[str]:
    return [
        word
        for split in ("train", "validation", "test")
        for word in (f"--{split}_file", str(made / f"{name}_{split}.{suffix}"))
    ]


@pytest.fixture(scope="module")
def flags(made: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The flags of each kind of run."""
    cache = ("--cache_dir", str(tmp_path_factory.mktemp("cache_of_targets")))
    topics = [*files(made, "topics", "json"), "--label_column", "labels", *cache]
    numbers = [*files(made, "numbers", "csv"), *cache]
    bert = ("--model_name", str(tiny_bert), "--max_length", "48", "--lr", "3e-3", "--report_to", "none")
    return {
        "cache": list(cache),
        "topics": [*topics, *CNN, "--epochs", "16"],
        "numbers": [*numbers, *CNN, "--label_column", "score", "--epochs", "20"],
        "several": [*numbers, *CNN, "--label_columns", "score", "negative", "--epochs", "3"],
        "pairs": [*numbers, *bert, "--text_pair_column", "pair", "--label_column", "score", "--epochs", "2"],
        "bert": [*topics, *bert, "--epochs", "2"],
    }


@pytest.fixture(scope="module")
def trained(train, flags) -> Callable[[str], Path]:
    """``trained(name)``: the run of these flags, trained when it is first asked for."""
    made_runs: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made_runs:
            made_runs[name] = train(*flags[name], name=name)
        return made_runs[name]

    return run


def found_by_script(run: Path, split: str = "test") -> dict[str, np.ndarray]:
    """What the script's own evaluation finds with the best weights."""
    return evaluate.score_with_script(find_named(str(run)), evaluate.Args(runs=(str(run),), split=split), None).found


def config(run: Path) -> dict:
    return json.loads((run / "best" / "config.json").read_text())


# ------------------------------------------------------------------------------------------------------------- training


def test_words_decide_several_labels(trained) -> None:
    run = trained("topics")
    found = results(run)
    assert min(found["test"][name] for name in ("f1_macro", "f1_micro", "mAP", "subset_accuracy")) > 0.99
    assert found["config"]["training"]["best_metric"] == "f1_macro"
    assert (config(run)["problem_type"], list(config(run)["id2label"].values())) == (
        "multi_label_classification",
        TOPICS,
    )
    log = (run / "logs" / "train.log").read_text()
    assert "mAP" in log and "subset_accuracy" in log
    for file in ("summary.txt", "metrics.csv", "report.html", "best/README.md"):
        assert "mAP" in (run / file).read_text(), file
    report = (run / "report.html").read_text()
    assert "Per label, test" in report and "Confusion matrix" not in report and "The number is the loss" in report
    lines = (run / "logs" / "classification_report_test.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines[1:]] == TOPICS


def test_a_linear_function_of_words_is_found(trained) -> None:
    run = trained("numbers")
    found = results(run)["test"]
    assert (
        found["pearson"] > 0.99 and found["spearman"] > 0.98 and found["mse"] == pytest.approx(found["loss"], abs=1e-5)
    )
    assert found["mae"] < 0.15
    assert (config(run)["problem_type"], config(run)["id2label"]) == ("regression", {"0": "score"})
    report = (run / "report.html").read_text()
    assert 'class="plot"' in report and (run / "plots" / "predicted_test.png").stat().st_size > 10_000
    worst = float(re.search(r'class="sure">([\d.e-]+)<', report)[1])
    assert worst == pytest.approx(float(found_by_script(run)["losses"].max()), rel=0.01)


def test_several_numbers_and_pairs_of_texts(trained) -> None:
    several = trained("several")
    assert list(config(several)["id2label"].values()) == ["score", "negative"]
    found = found_by_script(several)
    assert found["logits"].shape == (91, 2)
    np.testing.assert_allclose(found["losses"], ((found["logits"] - found["labels"]) ** 2).mean(1), rtol=1e-5)
    assert "Per number, test" in (several / "report.html").read_text()
    assert np.isfinite(results(trained("pairs"))["test"]["pearson"])


def test_pairs_are_scored_as_in_sts_b(train, flags, tmp_path: Path, call_tool) -> None:
    """The layouts of run_glue: JSON lines, and GLUE's own TSV with quotes that enclose nothing; what each text adds to
    the score is known, and without the second text a part of it is missing."""
    worth = {"goal": 1.5, "bank": 0.5, "moon": 1.2, "star": 1.8}
    of_second = ("moon", "star")
    for seed, (split, count) in enumerate({"train": 250, "dev": 80, "test": 90}.items()):
        rng, rows = np.random.default_rng(seed), []
        for number in range(count):
            there = [word for word in worth if rng.random() < 0.5]
            first, second = ([word for word in there if (word in of_second) == each] for each in (False, True))
            texts = [" ".join([*map(str, rng.permutation(COMMON)[:6]), *words]) for words in (first, second)]
            texts[0] = f'"{texts[0]}' if number % 7 == 0 else texts[0]
            rows.append({
                "index": number, "genre": "main-news", "filename": "f", "year": "2012", "old_index": number, "source1": "none",
                "source2": "none", "sentence1": texts[0], "sentence2": texts[1], "score": sum(worth[word] for word in there),
            })  # fmt: skip
        lines = ["\t".join(f"{v:.3f}" if k == "score" else str(v) for k, v in row.items()) for row in rows]
        (tmp_path / f"{split}.tsv").write_text("\n".join(["\t".join(rows[0]), *lines]) + "\n")
        kept = [{name: row[name] for name in ("sentence1", "sentence2", "score")} for row in rows]
        (tmp_path / f"{split}.json").write_text("\n".join(map(json.dumps, kept)) + "\n")

    def sts(suffix: str, *more: str) -> Path:
        named = zip(("train", "validation", "test"), ("train", "dev", "test"), strict=True)
        data = [word for split, name in named for word in (f"--{split}_file", tmp_path / f"{name}.{suffix}")]
        columns = ("--text_column", "sentence1", "--label_column", "score")
        return train(*data, *columns, *CNN, *flags["cache"], *WIDE, *more, name=f"sts_{suffix}{len(more)}")

    pair = ("--text_pair_column", "sentence2")
    few = ("--max_steps", "6")
    assert weights(sts("json", *pair, *few) / "last") == weights(sts("tsv", *pair, *few) / "last")
    table, alone = sts("tsv", *pair, "--epochs", "10", "--eval_every", "80"), sts("json", "--epochs", "4")
    found = results(table)["test"]
    assert found["pearson"] > 0.99 and found["spearman"] > 0.98 and found["mse"] < 0.05
    assert results(alone)["test"]["pearson"] < 0.8
    output = tmp_path / "answers.jsonl"
    columns = ("--text_column", "sentence1", *pair)
    code, _, err = call_tool(predict, table, "--file", tmp_path / "test.tsv", *columns, "--output", output)
    assert code == 0, err
    values = [json.loads(line)["value"] for line in output.read_text().splitlines()]
    np.testing.assert_allclose(values, found_by_script(table)["logits"][:, 0], atol=2e-5)


def test_the_loss_of_several_labels_is_the_mean_over_them(trained) -> None:
    found = found_by_script(trained("bert"))
    scores = sigmoid(found["logits"])
    entropy = -np.log(np.where(found["labels"] > 0, scores, 1 - scores)).mean(1)
    np.testing.assert_allclose(found["losses"], entropy, rtol=1e-4)


def test_every_form_of_labels_trains_the_same(made: Path, train, flags) -> None:
    for split in ("train", "validation", "test"):
        own = json.loads((made / f"topics_{split}.json").read_text())
        (made / f"list_{split}.jsonl").write_text("\n".join(map(json.dumps, own)) + "\n")
        write_csv(made / f"text_{split}.csv", as_texts(own))
        write_csv(made / f"columns_{split}.tsv", as_columns(own))
        pq.write_table(pa.Table.from_pylist(own), made / f"parquet_{split}.parquet")
    common = [*CNN, *flags["cache"], "--max_steps", "6"]
    runs = {
        "list": train(*files(made, "list", "jsonl"), "--label_column", "labels", *common, name="list"),
        "text": train(
            *files(made, "text", "csv"), "--label_column", "labels", "--label_delimiter", "|", *common, name="text"
        ),
        "columns": train(*files(made, "columns", "tsv"), "--label_columns", *TOPICS[::-1], *common, name="columns"),
        "parquet": train(*files(made, "parquet", "parquet"), "--label_column", "labels", *common, name="parquet"),
    }
    assert len({weights(run / "last") for run in runs.values()}) == 1
    assert len({json.dumps(results(run)["test"]) for run in runs.values()}) == 1


# ------------------------------------------------------------------------------------------------------------ thresholds


def test_a_threshold_has_the_best_f1_of_all() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 4)) < (0.5, 0.2, 0.05, 0)).astype(np.float32)
    logits = (2 * labels - 2.5 + rng.normal(size=labels.shape)).astype(np.float32)
    found = best_thresholds(labels, logits)
    assert found[3] == 0.5  # of no row
    for label in range(3):
        cuts = [0.5, *np.unique(sigmoid(logits[:, label]))]
        own = labels[:, [label]]
        of_cut = [tuned_metrics(own, logits[:, [label]], np.array([cut]))["f1_macro_tuned"] for cut in cuts]
        assert tuned_metrics(own, logits[:, [label]], found[[label]])["f1_macro_tuned"] == pytest.approx(max(of_cut))
        assert found[label] == 0.5 or max(of_cut) > of_cut[0]


def test_thresholds_are_chosen_on_validation_kept_and_applied(train, flags, call_tool) -> None:
    run = train(*flags["topics"], "--max_steps", "3", "--lr", "3e-3", name="early")  # far from its optimum
    found = results(run)
    assert found["validation"]["f1_macro_tuned"] > found["validation"]["f1_macro"] + 0.05
    assert found["thresholds"] == config(run)["thresholds"]
    rows = found_by_script(run)
    thresholds = np.array([found["thresholds"][name] for name in TOPICS])
    assert tuned_metrics(rows["labels"], rows["logits"], thresholds)["f1_macro_tuned"] == pytest.approx(
        found["test"]["f1_macro_tuned"]
    )
    texts = [row["text"] for row in make_topics(30, 9)]
    code, out, err = call_tool(predict, run, *texts)
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    for answer in answers:
        reached = {name for name, score in answer["scores"].items() if score >= found["thresholds"][name]}
        assert set(answer["labels"]) == reached
    _, out, _ = call_tool(predict, run, "--threshold", "1", *texts)
    assert all(json.loads(line)["labels"] == [] for line in out.splitlines())
    assert any(answer["labels"] for answer in answers)


def test_without_validation_rows_there_are_no_thresholds(train, flags) -> None:
    nothing = ("--validation_file", "None", "--validation_fraction", "0", "--max_steps", "2")
    run = train(*flags["topics"], *nothing, name="unheld")
    assert "thresholds" not in results(run) and "thresholds" not in config(run)
    assert "f1_macro_tuned" not in results(run)["test"]


# --------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_worked_out_by_hand() -> None:
    labels = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], np.float32)
    logits = np.array([[2, -1], [-1, 1], [-2, 2], [-3, 1.5]], np.float32)
    found = multi_label_metrics(labels, logits, np.ones(4))
    # First label: 1 hit, 1 miss; second: 2 hits, 1 false alarm.
    assert found["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["f1_micro"] == pytest.approx(2 * 3 / (4 + 4))
    assert found["mAP"] == pytest.approx((1 + (1 + 2 / 3) / 2) / 2)  # ranks of the second: right, wrong, right
    assert found["subset_accuracy"] == 0.5
    one = multi_label_metrics(labels[:, :1], logits[:, :1], np.ones(4))
    assert one["f1_macro"] == one["f1_micro"] == pytest.approx(2 / 3)


@pytest.mark.filterwarnings("error")
def test_degenerate_inputs_give_clear_values_without_warnings() -> None:
    labels, ones = np.zeros((5, 2), np.float32), np.ones(5)
    for logits in (np.full((5, 2), -9.0), np.full((5, 2), np.nan), np.full((5, 2), np.inf)):
        found = multi_label_metrics(labels, logits, ones)
        assert found["mAP"] == found["f1_macro"] == 0
        assert best_thresholds(labels, logits).tolist() == [0.5, 0.5]
    constant = regression_metrics(labels, np.arange(10).reshape(5, 2), ones)
    assert constant["pearson"] == constant["spearman"] == 0 and constant["mse"] > 0
    assert np.isnan(regression_metrics(labels, np.full((5, 2), np.nan), ones)["pearson"])
    few = regression_metrics(labels[:1], labels[:1], ones[:1])
    assert few["pearson"] == few["mse"] == 0


def test_best_metric_follows_the_problem_type(train, flags) -> None:
    run = train(
        *flags["numbers"], "--best_metric", "mae", "--epochs", "3", "--max_steps", "24", "--eval_every", "6", name="mae"
    )
    rows = history(run, "validation")
    assert results(run)["best_step"] == min(rows, key=lambda row: row["mae"])["step"]
    for name, metric in (
        ("numbers", "f1_macro"),
        ("topics", "pearson"),
        ("topics", "accuracy"),
        ("numbers", "accuracy"),
    ):
        with pytest.raises(UserError, match=f"--best_metric {metric} is not measured on"):
            train(*flags[name], "--best_metric", metric, name="unfit")
    assert not Path("runs/unfit").exists()


# ----------------------------------------------------------------------------------------------------------------- tools


@pytest.mark.parametrize("name", ["topics", "bert", "numbers", "several", "pairs"])
def test_pipeline_predict_and_script_agree(name: str, trained, made: Path, call_tool, tmp_path: Path) -> None:
    """transformers' own pipeline on the saved folder, as its user would call it."""
    from transformers import pipeline

    import accelerando.models.text_cnn  # noqa: F401  (makes transformers know the net)

    run = trained(name)
    kind = "topics_test.json" if name in ("topics", "bert") else "numbers_test.csv"
    rows = json.loads((made / kind).read_text()) if kind.endswith("json") else read_csv(made / kind)
    found = found_by_script(run)
    classify = pipeline("text-classification", model=str(run / "best"), top_k=None, device="cpu")
    given = [
        {"text": row["text"], "text_pair": row["pair"]} if name == "pairs" else {"text": row["text"]} for row in rows
    ]
    names = list(config(run)["id2label"].values())
    said = [{each["label"]: each["score"] for each in answer} for answer in (classify([each])[0] for each in given)]
    scores = np.array([[answer[label] for label in names] for answer in said])
    expected = sigmoid(found["logits"]) if name in ("topics", "bert") else found["logits"]
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    pair = ("--text_pair_column", "pair") if name == "pairs" else ()
    output = tmp_path / "answers.jsonl"
    code, _, err = call_tool(predict, run, "--file", made / kind, *pair, "--output", output)
    assert code == 0, err
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    if name in ("topics", "bert"):
        thresholds = np.array([config(run)["thresholds"][label] for label in names])
        assert [set(answer["labels"]) for answer in answers] == [
            {label for label, is_there in zip(names, chosen, strict=True) if is_there}
            for chosen in chosen_labels(found["logits"], thresholds)
        ]
    else:
        values = [list(answer.get("values", {"value": answer.get("value")}).values()) for answer in answers]
        np.testing.assert_allclose(np.array(values, np.float64), found["logits"], atol=2e-5)


@pytest.mark.parametrize("name", ["topics", "numbers", "several"])
def test_evaluate_gives_the_numbers_of_the_run(name: str, trained, made: Path, call_tool, tmp_path: Path) -> None:
    run = trained(name)
    for split in ("test", "validation"):
        code, out, err = call_tool(evaluate, run, "--split", split, "--format", "json", "--num_workers", 1)
        assert code == 0, err
        (found,) = json.loads(out)["runs"].values()
        assert found == pytest.approx(results(run)[split], abs=1e-4)
    other = made / ("topics_validation.json" if name == "topics" else "numbers_validation.csv")
    target = tmp_path / "out"
    code, out, err = call_tool(
        evaluate, run, "--data", other, "--format", "json", "--output_dir", target, "--num_workers", 1
    )
    assert code == 0, err
    (found,) = json.loads(out)["runs"].values()
    assert found == pytest.approx(results(run)["validation"], abs=1e-4)
    page = (target / "report.html").read_text()
    assert "Highest losses" in page and ("Per label" in page or 'class="plot"' in page)
    rows = read_csv(target / "predictions.csv")
    assert (
        len(rows) == 83
        and {"topics": "predicted", "numbers": "predicted_score", "several": "negative"}[name] in rows[0]
    )


def test_evaluate_compares_runs_and_takes_a_column_of_another_name(
    trained, train, flags, made: Path, call_tool
) -> None:
    other = train(*flags["topics"], "--max_steps", "4", name="worse")
    code, out, err = call_tool(evaluate, trained("topics"), other, "--format", "json", "--num_workers", 1)
    assert code == 0, err
    assert json.loads(out)["comparisons"][0]["metric"] == "subset_accuracy"
    code, out, err = call_tool(
        evaluate, trained("numbers"), "--data", made / "numbers_test.csv", "--label_column", "negative", "--format", "json",
        "--num_workers", 1,
    )  # fmt: skip
    assert code == 0, err
    assert next(iter(json.loads(out)["runs"].values()))["pearson"] < -0.99


@pytest.mark.parametrize("name", ["topics", "several"])
def test_export_keeps_outputs_and_predictions(name: str, trained, call_tool, tmp_path: Path) -> None:
    run, target = trained(name), tmp_path / "export"
    code, _, err = call_tool(
        export, run, "--samples", "24", "--tolerance", "1e-4", "--precision", "float32", "int8", "--output_dir", target,
        "--agreement", "0",
    )  # fmt: skip
    assert code == 0, err
    facts = json.loads((target / "export.json").read_text())
    about = facts["files"]["model.onnx"]
    assert about["largest_difference"] < 1e-4 and about["equal_predictions"] == 1 and about["samples"] == 24
    assert 0 <= facts["files"]["model_int8.onnx"]["equal_predictions"] <= 1
    texts = [row["text"] for row in make_topics(5, 3)]
    plain, exported = (call_tool(predict, model, *texts)[1] for model in (run, target))
    usage = subprocess.run([sys.executable, target / "usage.py", *texts], capture_output=True, text=True, check=True)
    for one, two, line in zip(plain.splitlines(), exported.splitlines(), usage.stdout.splitlines(), strict=True):
        one, two = json.loads(one), json.loads(two)
        *said, text = line.split("\t")
        assert text == one["text"] == two["text"]
        if name == "topics":
            assert set(one["labels"]) == set(two["labels"]) == set(said)
        else:
            assert list(map(float, said)) == pytest.approx(list(two["values"].values()), abs=1e-4)
            assert two["values"] == pytest.approx(one["values"], abs=1e-4)
    assert facts.get("thresholds") == (list(config(run)["thresholds"].values()) if name == "topics" else None)


def test_equal_predictions_are_those_of_thresholds_or_near_numbers() -> None:
    several = export.equals_of("multi_label_classification", np.array([0.5, 0.9]))
    ours, right = np.array([[1.0, 1.0], [1.0, 3.0]]), np.array([[2.0, 0.0], [1.0, 2.0]])
    assert several(ours, right).tolist() == [True, False]
    assert export.equals_of("regression", None)(np.array([[100.0], [1.0]]), np.array([[100.5], [1.1]])).tolist() == [
        True,
        False,
    ]


# ------------------------------------------------------------------------------------------- processes, resume, splitting


@pytest.mark.launch
def test_two_processes_equal_one(flags, tmp_path: Path) -> None:
    args = [*flags["bert"], *EXACT, "--epochs", "1", "--lr", "1e-3"]
    launch(TEXT, *args, "--batch_size", "24", "--run_name", "one", cwd=tmp_path)
    launch(TEXT, *args, "--batch_size", "12", "--run_name", "two", cwd=tmp_path, processes=2)
    one, two = (results(tmp_path / "runs" / name) for name in ("one", "two"))
    for split in ("validation", "test"):
        assert two[split].keys() == one[split].keys() and two[split]["count"] == one[split]["count"]
        assert two[split]["loss"] == pytest.approx(one[split]["loss"], rel=1e-3)
        assert two[split]["mAP"] == pytest.approx(one[split]["mAP"], abs=0.01)


@pytest.mark.launch
def test_a_killed_run_resumes_exactly(flags, tmp_path: Path) -> None:
    args = [
        *flags["bert"],
        "--epochs",
        "3",
        "--save_every",
        "3",
        "--eval_every",
        "5",
        "--log_every",
        "1",
        "--run_name",
        "run",
    ]
    (tmp_path / "whole").mkdir()
    launch(TEXT, *args, cwd=tmp_path / "whole")
    run = kill_and_resume(tmp_path, TEXT, args, processes=1, kills=2, seed=5)
    whole = tmp_path / "whole" / "runs" / "run"
    for folder in ("best", "last"):
        assert weights(run / folder) == weights(whole / folder)
    assert results(run)["thresholds"] == results(whole)["thresholds"]
    assert results(run)["test"] == results(whole)["test"]


def test_resume_refuses_other_label_columns(train, flags, made: Path) -> None:
    rows = json.loads((made / "topics_train.json").read_text())
    wide = write_csv(made / "wide.csv", [row | {"other": row["money"]} for row in as_columns(rows)])
    common = ["--train_file", wide, *CNN, "--max_steps", "2", "--epochs", "3"]
    train(*common, "--label_columns", *TOPICS, name="columns3")
    train(*common, "--label_columns", *TOPICS[::-1], "--resume", name="columns3")  # the same in another order
    for columns, words in ((("money", "space"), "gone: 'sport'"), ((*TOPICS[:2], "other"), "new: 'other'")):
        with pytest.raises(UserError, match=rf"other classes .*{words}"):
            train(*common, "--label_columns", *columns, "--resume", name="columns3")
    numbers = [*flags["numbers"], "--max_steps", "2"]
    train(*numbers, name="column")
    with pytest.raises(UserError, match=r"other classes .*new: 'negative'"):
        train(*numbers, "--label_column", "negative", "--resume", name="column")


def test_validation_rows_are_stratified() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 3)) < (0.6, 0.2, 0.03)).astype(np.float32)
    groups = strata(labels, "multi_label")
    rarest = [
        min((labels[:, place].sum(), place) for place in np.flatnonzero(row))[1] if row.any() else -1 for row in labels
    ]
    assert groups.tolist() == rarest
    _, held = stratified_split(groups, 0.2, 42)
    assert np.abs(labels[held].mean(0) - labels.mean(0)).max() < 0.05 and labels[held, 2].sum() >= 2
    assert np.array_equal(held, stratified_split(strata(labels, "multi_label"), 0.2, 42)[1])
    numbers = rng.exponential(size=(400, 1)).astype(np.float32)
    bins = strata(numbers, "regression")
    assert np.bincount(bins).tolist() == [40] * 10
    _, held = stratified_split(bins, 0.1, 42)
    assert np.bincount(bins[held]).tolist() == [4] * 10
    assert len(set(strata(np.ones((50, 2), np.float32), "regression"))) == 1
    assert len(set(strata(numbers[:30], "regression"))) == 1


def test_a_held_out_part_of_the_training_rows(train, flags) -> None:
    held = ("--validation_file", "None", "--validation_fraction", "0.2", "--max_steps", "2")
    for name, count in (("topics", 50), ("numbers", 50)):
        run = train(*flags[name], *held, name=f"held_{name}")
        assert results(run)["validation"]["count"] == pytest.approx(count, abs=3)


# --------------------------------------------------------------------------------------------------------------- reading


def read(path: Path, content: object, problem_type: str | None = None, **how: object) -> tuple[str, list[str], list]:
    """What is found in a file: the problem type, the names, the targets."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table(content), path)
    else:
        path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)) + "\n")
    table = read_text_table(str(path), problem_type=problem_type, **how)
    tables, found = as_targets({"train": table}, problem_type, str(how.get("label_column", "label")))
    names = label_names(tables["train"])
    return found, names, encode_labels(tables["train"], names).tolist()


def rows_of(*labels: object) -> list[dict]:
    return [{"text": "a", "label": label} for label in labels]


@pytest.mark.parametrize(
    ("name", "content", "how", "expected"),
    [
        ("a.jsonl", rows_of("x", "y"), {}, ("single_label", ["x", "y"], [0, 1])),
        ("a.jsonl", rows_of(3, 1.0), {}, ("single_label", ["1", "3"], [1, 0])),
        ("a.jsonl", rows_of("1.5", "2.5"), {}, ("single_label", ["1.5", "2.5"], [0, 1])),
        ("a.jsonl", rows_of(1, 2.5), {}, ("regression", ["label"], [[1], [2.5]])),
        ("a.jsonl", rows_of(2.5, 1), {}, ("regression", ["label"], [[2.5], [1]])),
        ("a.jsonl", rows_of([], ["b", "a"], ["a"]), {}, ("multi_label", ["a", "b"], [[0, 0], [1, 1], [1, 0]])),
        ("a.jsonl", rows_of([10, 2], [2, 2.0]), {}, ("multi_label", ["2", "10"], [[1, 1], [1, 0]])),
        ("a.csv", "text,label\na,2\nb,1.0\n", {}, ("single_label", ["1", "2"], [1, 0])),
        ("a.csv", "text,label\na,2\nb,1.5\n", {}, ("regression", ["label"], [[2], [1.5]])),
        ("a.csv", "text,label\na,2\nb,1.5\n", {"problem_type": "single_label"}, ("single_label", ["1.5", "2"], [1, 0])),
        ("a.csv", "text,label\na,2\nb,1\n", {"problem_type": "regression"}, ("regression", ["label"], [[2], [1]])),
        ("a.csv", "text,label\na,x\nb,y\n", {"problem_type": "multi_label"}, ("multi_label", ["x", "y"], [[1, 0], [0, 1]])),
        ("a.csv", "text,label\na,x; y\nb,\n", {"label_delimiter": ";"}, ("multi_label", ["x", "y"], [[1, 1], [0, 0]])),
        ("a.csv", "text,label\na,10|2\nb,2\n", {"label_delimiter": "|"}, ("multi_label", ["2", "10"], [[1, 1], [1, 0]])),
        ("a.csv", "text,q,p\na,0,1\nb,0,0\n", {"label_columns": ("q", "p")}, ("multi_label", ["p", "q"], [[1, 0], [0, 0]])),
        ("a.csv", "text,q,p\na,0,1\nb,0,0.5\n", {"label_columns": ("q", "p")}, ("regression", ["q", "p"], [[0, 1], [0, 0.5]])),
        ("a.parquet", {"text": ["a", "b"], "label": [["x"], []]}, {}, ("multi_label", ["x"], [[1], [0]])),
        ("a.parquet", {"text": ["a", "b"], "label": [1.5, 2.0]}, {}, ("regression", ["label"], [[1.5], [2]])),
        ("a.parquet", {"text": ["a", "b"], "label": [1.0, 2.0]}, {}, ("single_label", ["1", "2"], [0, 1])),
        ("a.parquet", {"text": ["a"], "p": [True], "q": [False]}, {"label_columns": ("p", "q")},
         ("multi_label", ["p", "q"], [[1, 0]])),
    ],
)  # fmt: skip
def test_what_is_learned_is_found_from_the_labels(
    name: str, content: object, how: dict, expected, tmp_path: Path
) -> None:
    assert read(tmp_path / name, content, **how) == expected


def test_lists_of_classes_of_datasets_have_their_names(tmp_path: Path) -> None:
    import datasets

    kinds = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.List(datasets.ClassLabel(names=["y", "x"]))}
    )
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [[0], [], [1, 0]]}, kinds)
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "a.parquet"))
    for source in ("saved", "a.parquet"):
        table = read_text_table(str(tmp_path / source), problem_type=None)
        assert table.labels.to_pylist() == [["y"], [], ["x", "y"]], source


def test_labels_of_many_rows_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fraction, or the first label of a list, may stand behind the rows that were packed already."""
    monkeypatch.setattr("accelerando.data.tables.CHUNK", 2)
    assert read(tmp_path / "a.jsonl", rows_of(1, 2, 3, 4.5))[0] == "regression"
    assert read(tmp_path / "b.jsonl", rows_of([], [], [], [7]))[2] == [[0], [0], [0], [1]]


FAULTS = [
    ("a.jsonl", rows_of([], []), {}, "no row has a label"),
    ("a.jsonl", rows_of(["a"], None), {}, "row 2 (line 2): label is empty"),
    ("a.jsonl", rows_of(["a", ""]), {}, "row 1 (line 1): label has '' in its list"),
    ("a.jsonl", rows_of(["a"], [1]), {}, "row 2 (line 2): label has 1 in its list, not a name as the others"),
    ("a.jsonl", rows_of(["a"], "b"), {}, "row 2 (line 2): label is 'b', not a list as in other rows"),
    ("a.jsonl", rows_of(1.5, "b"), {}, "row 2 (line 2): label is 'b', not a number as in other rows"),
    ("a.jsonl", rows_of(1.5, float("nan")), {}, "row 2 (line 2): label is nan, not a number"),
    ("a.jsonl", rows_of([2.5]), {}, "row 1 (line 1): label has 2.5 in its list"),
    ("a.csv", "text,label\na,1.5\nb,\n", {}, "row 2 (line 3): label is empty"),
    ("a.csv", "text,label\na,1.5\nb,2.5\nc,NA\n", {}, "row 3: label is 'NA', but most are numbers"),
    ("a.csv", "text,label\na,1.5\nb,x\n", {"problem_type": "regression"}, "row 2: label is 'x', not a number"),
    ("a.csv", "text,label\na,x||y\n", {"label_delimiter": "|"}, "row 1: label 'x||y' has an empty label in it"),
    ("a.csv", "text,p,q\na,1,\n", {"label_columns": ("p", "q")}, "row 1 (line 2): q is empty"),
    ("a.csv", "text,p,q\na,1,x\n", {"label_columns": ("p", "q")}, "row 1 (line 2): q is 'x', not a number"),
    ("a.csv", "text,p,q\na,1,0\n", {"label_columns": ("p", "z")}, "no column 'z'"),
    ("a.csv", "text,p,q\na,1,0\nb,0,3\n", {"label_columns": ("p", "q"), "problem_type": "multi_label"},
     "row 2: q is 3, but columns of labels hold 0 or 1"),
    ("a.csv", "text,p,q\na,1,0\n", {"label_columns": ("p", "q"), "problem_type": "single_label"}, "the labels are columns"),
    ("a.csv", "text,label\na,x|y\n", {"label_delimiter": "|", "problem_type": "regression"}, "the labels are lists"),
    ("a.parquet", {"text": ["a", "b"], "label": [1.5, None]}, {}, "row 2: label is empty"),
    ("a.parquet", {"text": ["a", "b"], "label": [["x"], None]}, {}, "row 2: label is empty"),
    ("a.parquet", {"text": ["a", "b"], "label": [["x"], ["y", None]]}, {}, "row 2: label has an empty label in it"),
    ("a.parquet", {"text": ["a", "b"], "p": [1.0, float("nan")]}, {"label_columns": ("p",)}, "row 2: p is nan, not a number"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "how", "words"), FAULTS)
def test_faults_are_one_line_with_file_and_row(
    name: str, content: object, how: dict, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path / name, content, **how)
    message = str(caught.value)
    assert words in message and name in message and "\n" not in message, message


def test_what_the_script_refuses(train, flags, made: Path, tmp_path: Path, call_tool, trained) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "a", "labels": ["weather"]}) + "\n")
    cases = [
        (("topics", "--validation_file", other), "row 1: label 'weather' does not occur in the training rows"),
        (("topics", "--problem_type", "single_label"), "not a name or a whole number"),
        (("topics", "--label_delimiter", ""), "--label_delimiter"),
        (("topics", "--label_delimiter", "|", "--label_columns", "a"), "--label_delimiter"),
        (("topics", "--num_labels", "4"), "has 3 labels"),
        (("numbers", "--validation_file", made / "topics_validation.json"), "no 'score'"),
        (("numbers", "--problem_type", "multi_label"), "numbers with fractions, but multi_label wants"),
    ]
    for (name, *more), words in cases:
        with pytest.raises(UserError, match=re.escape(words)):
            train(*flags[name], *more, name="refused")
    assert not Path("runs/refused").exists()
    code, out, err = call_tool(predict, trained("numbers"), "a", "--threshold", "0.2")
    assert (code, out) == (2, "") and "--threshold 0.2" in err
    broken = tmp_path / "best"
    shutil.copytree(trained("topics") / "best", broken)
    content = json.loads((broken / "config.json").read_text()) | {"thresholds": {"money": 7}}
    (broken / "config.json").write_text(json.dumps(content))
    code, out, err = call_tool(predict, broken, "a")
    assert (code, out) == (2, "") and "thresholds are not a number from 0 to 1" in err and len(err.splitlines()) == 1


def test_a_copy_adds_a_metric_in_one_line() -> None:
    """What docs/adapt.md changes in `score` holds for every kind of target."""
    source = TEXT.read_text()
    [line] = [line for line in source.splitlines() if line.startswith("    metrics = SCORES[")]
    assert source.count(line) == 1
    module = script_module(TEXT)
    assert {name for names in module.BEST_METRICS.values() for name in names} == set(module.BestMetric.__args__)
    listed = [metric.name for metric in module.METRICS]
    assert len(set(listed)) == len(listed) and set(module.BestMetric.__args__) <= set(listed)
