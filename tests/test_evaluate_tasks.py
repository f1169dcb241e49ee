"""tools/evaluate.py for texts, signs and CLIP: the run's own numbers, other data, exports, copies, comparisons."""

from __future__ import annotations

import csv
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import ROOT, launch, results, script_module
from tasks import TASKS, trained_once
from test_adapt import changed_script
from tools import evaluate, export

from accelerando.inference import named
from accelerando.report.comparison import compare
from accelerando.report.predictions import ensemble_logits

pytestmark = pytest.mark.launch

# What is held out of the training data, too, and every way to build the model.
TRAINED: dict[str, tuple[str, tuple[str, ...]]] = {
    "text": ("text", ("--strategy", "lora", "--lora_r", "4")),
    "cnn": ("text", (*TASKS["text"].kinds["cnn"], "--validation_file", "None", "--validation_fraction", "0.2",
                     "--report_on_train")),
    "sign": ("sign", ("--velocities", "--use_mask", "--learned_weights")),
    "gru": ("sign", ("--model", "iv3_gru", "--features-val", "None", "--validation_fraction", "0.2", "--loss", "focal",
                     "--curriculum", "dynamic", "--normalisation", "standard")),
    "clip": ("clip", ("--class_field", "kind", "--loss", "siglip")),
}  # fmt: skip
SHARE = {"text": "accuracy", "sign": "gloss_accuracy", "clip": "text_to_image_r1"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``trained(request, name)``: a run of one epoch or two, made once."""
    return trained_once(TRAINED, tmp_path_factory)


@pytest.fixture
def call(call_tool):
    """``call(*arguments)``: the tool's exit code and both outputs."""
    return lambda *arguments: call_tool(evaluate, *arguments, "--num_workers", 1)


@pytest.fixture
def found(call):
    """``found(*arguments)``: what the tool finds for one model."""

    def run(*arguments: object) -> dict[str, float]:
        code, out, err = call(*arguments, "--format", "json")
        assert code == 0, err
        return next(iter(json.loads(out)["runs"].values()))

    return run


def assert_same(found: dict[str, float], kept: dict[str, float], loss: float = 1e-4) -> None:
    """The numbers of training: equal, but for the last bits of the loss."""
    assert found.keys() == kept.keys()
    for name, value in found.items():
        assert value == pytest.approx(kept[name], abs=loss * ("loss" in name)), name


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------------------------------- its own samples


@pytest.mark.parametrize("name", TRAINED)
def test_a_split_gives_the_numbers_of_training(name: str, trained, request, found, call) -> None:
    run = trained(request, name)
    kept = results(run)
    for split in ("test", "validation", *(["train"] if "train" in kept else [])):
        assert_same(found(run, "--split", split, "--batch_size", 7), kept[split])
    code, out, _ = call(run)
    assert code == 0 and "(test split)" in out and f"{kept['test']['count']} " in out
    table = dict(line.split() for line in out.splitlines() if len(line.split()) == 2 and "_" in line.split()[0])
    assert table[SHARE[TRAINED[name][0]] if name not in ("text", "cnn") else "f1_macro"]
    assert (run / "last").is_dir() and found(run / "last").keys() == found(run / "best").keys()


def test_the_lines_are_those_of_training(trained, request, call) -> None:
    """Formats and order of the script's METRICS, as in summary.txt."""
    run = trained(request, "clip")
    lines = [line.split() for line in call(run)[1].splitlines() if len(line.split()) == 2][-12:]
    summary = [line.split() for line in (run / "summary.txt").read_text().splitlines()]
    for name, text in lines:
        own = next(words for words in summary if words[:1] == [name])
        assert text in own, name


def test_what_changes_the_numbers(trained, request, found) -> None:
    run = trained(request, "text")
    usual = found(run)["loss"]
    assert found(run, "--amp", "bf16")["loss"] != usual
    assert found(run, "--amp", "bf16")["loss"] == pytest.approx(usual, abs=0.05)
    assert found(run / "last")["loss"] != usual or results(run)["best_step"] == results(run)["steps"]


def test_damaged_weights_are_not_scored(trained, request, call, tmp_path: Path) -> None:
    """A tensor that is missing would otherwise be random; a file that is cut off says so."""
    from safetensors.torch import load_file, save_file

    for name, lost in (("sign", "project.weight"), ("text", "classifier.weight")):
        run = shutil.copytree(trained(request, name), tmp_path / name)
        weights = run / "best" / "model.safetensors"
        state = load_file(weights)
        del state[lost]
        save_file(state, weights, metadata={"format": "pt"})
        code, out, err = call(run)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and lost in err, err
        whole = (trained(request, name) / "best" / "model.safetensors").read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        code, out, err = call(run)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and "truncated" in err, err
        state = {key: torch.full_like(value, torch.nan) for key, value in load_file(
            trained(request, name) / "best" / "model.safetensors").items()}  # fmt: skip
        save_file(state, weights, metadata={"format": "pt"})
        code, out, err = call(run)
        assert (code, len(err.splitlines())) == (2, 1) and "returns NaN" in err, err


def test_changed_data_are_noticed(trained, request, call, text_set: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained(request, "text"), tmp_path / "run")
    rows = json.loads((text_set / "test.json").read_text())
    config = (run / "config.yaml").read_text()
    assert str(text_set / "test.json") in config
    (tmp_path / "test.json").write_text(json.dumps(rows[:50]))
    (run / "config.yaml").write_text(config.replace(str(text_set / "test.json"), str(tmp_path / "test.json")))
    code, out, err = call(run)
    assert code == 0 and "50 rows" in out and err.startswith("warning: test has 50 rows, 67 in ")
    (tmp_path / "train.json").write_text(json.dumps([*json.loads((text_set / "train.json").read_text()),
                                                     {"text": "salt", "label": "food"}]))  # fmt: skip
    (run / "config.yaml").write_text(config.replace(str(text_set / "train.json"), str(tmp_path / "train.json")))
    code, out, err = call(run)
    assert (code, out) == (2, "") and "only the data has 'food'" in err
    (run / "config.yaml").write_text(config.replace(str(text_set / "train.json"), str(tmp_path / "gone.json")))
    code, out, err = call(run)
    assert (code, out) == (2, "") and "gone.json" in err and "score others with --data" in err
    assert call(run, "--data", text_set / "test.json")[0] == 0


# ---------------------------------------------------------------------------------------------------------- other data


def test_texts_in_any_table(trained, request, found, text_set: Path, tmp_path: Path) -> None:
    """CSV, JSON lines, Parquet and `datasets` with other columns give the numbers of the same rows in the run's file."""
    import datasets
    import pandas

    rows = json.loads((text_set / "test.json").read_text())
    frame = pandas.DataFrame({"sentence": [row["text"] for row in rows], "topic": [row["label"] for row in rows]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "a.parquet")
    # Of a set with several splits the test split is scored.
    sets = {"train": datasets.Dataset.from_pandas(frame[:5]), "test": datasets.Dataset.from_pandas(frame)}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "set")
    for name, file in (
        ("text", "a.csv"),
        ("text", "a.jsonl"),
        ("text", "a.parquet"),
        ("text", "set"),
        ("cnn", "a.csv"),
    ):
        run, columns = trained(request, name), ("--text_column", "sentence", "--label_column", "topic")
        assert_same(found(run, "--data", tmp_path / file, *columns), results(run)["test"])


def test_the_classes_are_those_of_the_model(trained, request, call, text_set: Path, tmp_path: Path) -> None:
    """Some may be missing, all but one even; one that it does not know is named with its row."""
    run = trained(request, "text")
    rows = json.loads((text_set / "test.json").read_text())
    some = [row for row in rows if row["label"] == "space"]
    (tmp_path / "space.json").write_text(json.dumps(some))
    code, out, err = call(run, "--data", tmp_path / "space.json", "--output_dir", tmp_path / "out")
    assert (code, err) == (0, "") and "None of the rows is of money, sport" in out
    answers = {row["text"]: row["predicted"] for row in rows_of(tmp_path / "out" / "predictions.csv")}
    right = np.mean([answers[row["text"]] == "space" for row in some])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"][str(run)]["accuracy"] == right
    assert call(run, "--output_dir", tmp_path / "own")[0] == 0
    own = {row["text"]: row["predicted"] for row in rows_of(tmp_path / "own" / "predictions.csv")}
    assert answers == {text: own[text] for text in answers}
    (tmp_path / "odd.json").write_text(json.dumps([*some, {"text": "salt", "label": "food"}]))
    code, out, err = call(run, "--data", tmp_path / "odd.json")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"odd.json: row {len(some) + 1}: label 'food'" in err


def test_clips_in_folders_and_lists(trained, request, found, call, sign_set: Path, tmp_path: Path) -> None:
    run, kept = trained(request, "sign"), results(trained(request, "sign"))["test"]
    listed = tmp_path / "some.csv"
    shutil.copy(sign_set / "test" / "labels.csv", listed)
    assert_same(found(run, "--data", sign_set / "test"), kept)
    assert_same(found(run, "--data", sign_set), kept)
    assert_same(found(trained(request, "gru"), "--data", sign_set / "test" / "labels.csv"),
                results(trained(request, "gru"))["test"])  # fmt: skip
    assert_same(found(run, "--data", listed, "--media_folder", sign_set / "test"), kept)
    lines = (sign_set / "train" / "labels.csv").read_text().splitlines()[:8]
    listed.write_text("\n".join(lines))  # of clips in the training folder
    assert found(run, "--data", listed)["count"] == 7
    for odd, word in (("9,0", "gloss 9"), ("0,3", "cat 3"), ("-1,0", "gloss -1")):
        listed.write_text("\n".join([lines[0], lines[1], f"train clip_001,{odd},0"]))
        code, out, err = call(run, "--data", listed)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert f"line 3 of {tmp_path.name}/some.csv: {word}, but" in err


def test_pairs_in_shards_tables_and_folders(trained, request, found, call, pair_set: Path, tmp_path: Path) -> None:
    run, kept = trained(request, "clip"), results(trained(request, "clip"))["test"]
    assert_same(found(run, "--data", pair_set / "test"), kept)
    assert_same(found(run, "--data", pair_set), kept)
    lines = ["photo;words"]
    (tmp_path / "photos").mkdir()
    with tarfile.open(pair_set / "test" / "00000.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")]
        for name in names:
            (tmp_path / "photos" / name).write_bytes(tar.extractfile(name).read())
            lines.append(f"{name};{tar.extractfile(name.replace('.jpg', '.txt')).read().decode()}")
    (tmp_path / "captions.csv").write_text("\n".join(lines) + "\n")
    columns = ("--file_column", "photo", "--text_column", "words", "--media_folder", tmp_path / "photos")
    code, out, err = call(run, "--data", tmp_path / "captions.csv", *columns, "--format", "json")
    assert code == 0 and err.startswith("no zero-shot classification: ") and len(err.splitlines()) == 1
    without = {metric: value for metric, value in kept.items() if not metric.startswith("zero_shot")}
    assert_same(next(iter(json.loads(out)["runs"].values())), without)
    (tmp_path / "photos" / names[0]).write_bytes(b"no image")
    code, out, err = call(run, "--data", tmp_path / "captions.csv", *columns)
    assert code == 0 and "18 pairs of" in out and "1 more cannot be read" in out and names[0] in err


@pytest.mark.parametrize("name", ["text", "cnn", "sign", "gru", "clip"])
def test_a_model_folder_needs_no_run(name: str, trained, request, found, call, tmp_path: Path, monkeypatch) -> None:
    """What is saved says how it is built and how samples are prepared; so does what the Hub's cache has."""
    kept = results(trained(request, name))["test"]
    folder = shutil.copytree(trained(request, name) / "best", tmp_path / "model")
    code, out, err = call(folder)
    assert (code, out) == (2, "") and "score others with --data" in err
    fixture, file = {"text": ("text_set", "test.json"), "sign": ("sign_set", "test"), "clip": ("pair_set", "test")}[
        TRAINED[name][0]
    ]
    data = ("--data", request.getfixturevalue(fixture) / file)
    same = [metric for metric in kept if metric.endswith(("accuracy", "f1_macro", "r1", "median_rank"))]
    same = [metric for metric in same if not metric.startswith("zero_shot")]
    alone = found(folder, *data)
    assert {metric: alone[metric] for metric in same} == {metric: kept[metric] for metric in same}
    cached = tmp_path / "hub" / "models--someone--net"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, cached / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert found("someone/net", *data) == alone
    code, out, err = call("someone/other", *data)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and "not found on the Hub" in err


def test_classes_without_names_are_numbers(trained, request, found, text_set: Path, tmp_path: Path) -> None:
    """transformers calls them LABEL_0 and so on; tables have the numbers."""
    run = trained(request, "text")
    folder = shutil.copytree(run / "best", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    names = [config["id2label"][str(number)] for number in range(3)]
    config["id2label"] = {str(number): f"LABEL_{number}" for number in range(3)}
    config["label2id"] = {f"LABEL_{number}": number for number in range(3)}
    (folder / "config.json").write_text(json.dumps(config))
    rows = json.loads((text_set / "test.json").read_text())
    numbered = [{"text": row["text"], "label": names.index(row["label"])} for row in rows]
    (tmp_path / "numbers.json").write_text(json.dumps(numbered))
    assert found(folder, "--data", tmp_path / "numbers.json")["accuracy"] == results(run)["test"]["accuracy"]
    del config["id2label"], config["label2id"]  # as transformers leaves two of them out
    (folder / "config.json").write_text(json.dumps(config | {"num_labels": 3}))
    assert found(folder, "--data", tmp_path / "numbers.json")["accuracy"] == results(run)["test"]["accuracy"]


# --------------------------------------------------------------------------------------------------- exports and copies


@pytest.mark.exhaustive
def test_an_export_is_scored_beside_its_run(trained, request, call, call_tool, found) -> None:
    """With the bias of its loss, too; tests/test_export.py scores those of the other tasks."""
    run = trained(request, "clip")
    code, _, err = call_tool(export, run, "--samples", "8")
    assert code == 0, err
    file = run / "export" / "text.onnx"
    code, out, err = call(run, file, "--format", "json")
    assert code == 0, err
    own, exported = json.loads(out)["runs"].values()
    assert_same(own, results(run)["test"])
    assert_same(exported, own)
    for each in json.loads(out)["comparisons"]:
        assert each["difference"] == each["low"] == each["high"] == each["only_first"] == each["only_second"] == 0
    assert found(run / "export") == exported
    code, out, err = call(run, file, "--device", "cuda")
    assert (code, out) == (2, "") and "an export runs on the CPU" in err
    code, out, err = call(file.with_name("text_int8.onnx"))
    assert (code, out) == (2, "") and "image_int8.onnx: no such file of the export" in err


def test_a_copied_script_is_scored_with_its_own_metric(trained, request, text_args, call, found, tmp_path) -> None:
    script = changed_script(tmp_path, "metric")
    launch(script, *text_args, "--run_name", "own", "--max_steps", "4", cwd=tmp_path)
    run = tmp_path / "runs" / "own"
    assert "top2" in results(run)["test"]
    assert_same(found(run, "--script", script), results(run)["test"])
    code, out, err = call(run)
    assert code == 0 and "top2" not in out and "accuracy" in out
    assert err.startswith("note: ") and f"--script {script} scores it with its own metrics" in err
    code, out, err = call(run, trained(request, "text"), "--script", script)
    assert code == 0, err
    assert len(next(line for line in out.splitlines() if line.startswith("top2")).split()) == 4  # and the ensemble
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config + "mine:\n  sharpness: 3\n")
    code, out, err = call(run)
    assert (code, out) == (2, "") and "mine.sharpness" in err and "name it with --script" in err


# ------------------------------------------------------------------------------------------------ comparisons, outputs


def test_the_interval_is_that_of_resampled_samples() -> None:
    """Drawn sample by sample it is the same, within the error of drawing; and it covers the truth as often as it says."""
    rng = np.random.default_rng(3)
    first, second = rng.random(200) < 0.7, rng.random(200) < 0.76
    found = compare(first, second)
    difference = second.astype(int) - first.astype(int)
    drawn = [difference[rng.integers(200, size=200)].mean() for _ in range(10_000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.008) and found.high == pytest.approx(high, abs=0.008)
    assert found.difference == difference.mean()
    assert (found.only_first, found.only_second) == ((difference == -1).sum(), (difference == 1).sum())
    assert compare(first, second) == found
    many = rng.random((2, 9973)) < 0.5
    assert compare(*many) == compare(*many) != compare(*many, seed=1)
    covered = 0
    for _ in range(400):  # the true difference is 0.1
        first, second = rng.random(300) < 0.6, rng.random(300) < 0.7
        found = compare(first, second)
        covered += found.low <= 0.1 <= found.high
    assert 0.91 <= covered / 400 <= 0.98
    same = compare(first, first)
    assert (same.difference, same.low, same.high, same.only_first, same.only_second) == (0, 0, 0, 0, 0)


def test_two_runs_side_by_side(trained, request, call, tmp_path: Path) -> None:
    """The counts are those of the table of predictions; the same command gives the same interval."""
    one, two, target = trained(request, "text"), trained(request, "cnn"), tmp_path / "both"
    code, out, err = call(one, two, "--output_dir", target)
    assert (code, err) == (0, ""), err
    rows = rows_of(target / "predictions.csv")
    names = [name.removeprefix("p_") for name in rows[0] if name.startswith("p_")]
    each = [f"{name}: {what}" for name in ("text", "cnn") for what in ("predicted", "confidence")]
    assert list(rows[0]) == ["text", "label", "predicted", "confidence", *(f"p_{name}" for name in names), *each]
    right = {name: np.array([row[f"{name}: predicted"] == row["label"] for row in rows]) for name in ("text", "cnn")}
    written = json.loads((target / "results.json").read_text())
    (found,) = written["comparisons"]
    assert (found["run"], found["compared_with"], found["metric"]) == (str(two), str(one), "accuracy")
    assert found["only_first"] == (right["text"] & ~right["cnn"]).sum()
    assert found["only_second"] == (right["cnn"] & ~right["text"]).sum()
    assert found["only_first"] + found["only_second"] > 0
    assert found["count"] == 67 and found["low"] < found["difference"] < found["high"]
    accuracies = [values["accuracy"] for values in written["runs"].values()]
    assert found["difference"] == pytest.approx(accuracies[1] - accuracies[0])
    line = next(line for line in out.splitlines() if line.startswith("run 2 accuracy"))
    assert f"{found['difference']:+.4f}" in line and f"{found['low']:+.4f} to {found['high']:+.4f}" in line
    assert max(map(len, out.splitlines()[3:-1])) <= 80
    page = (target / "report.html").read_text()
    assert "Compared with text" in page and "Confusion matrix, ensemble" in page and "Worst mistakes" in page
    assert {path.name for path in target.glob("confusion*")} == {"confusion.png"}
    assert json.loads(call(one, two, "--format", "json")[1])["comparisons"] == written["comparisons"]
    assert call(one, "--output_dir", target, "--overwrite")[0] == 0
    assert sorted(path.name for path in target.iterdir()) == sorted(evaluate.OURS)


@pytest.mark.parametrize("pair", [("text", "cnn"), ("sign", "gru")])
def test_an_ensemble_is_the_mean_of_probabilities(pair, trained, request, call, tmp_path: Path) -> None:
    """Of every head; its loss is the mean of its runs' losses, which with plain cross-entropy is that of the mean."""
    runs = [trained(request, name) for name in pair]
    for run, name in zip(runs, pair, strict=True):
        assert call(run, "--output_dir", tmp_path / name)[0] == 0
    assert call(*runs, "--output_dir", tmp_path / "both")[0] == 0
    found = json.loads((tmp_path / "both" / "results.json").read_text())
    rows = {name: rows_of(tmp_path / name / "predictions.csv") for name in (*pair, "both")}
    for head, metric in (
        (("", "accuracy"),) if pair[0] == "text" else (("gloss_", "gloss_accuracy"), ("cat_", "cat_accuracy"))
    ):
        names = [name for name in rows["both"][0] if name.startswith(f"p_{head}")]
        one, two, both = (np.array([[float(row[name]) for name in names] for row in rows[n]]) for n in rows)
        np.testing.assert_allclose(both, (one + two) / 2, atol=2e-6)
        labels = np.array([names.index(f"p_{head}{row[head.removesuffix('_') or 'label']}") for row in rows["both"]])
        assert found["ensemble"][metric] == pytest.approx((both.argmax(axis=1) == labels).mean())
        if pair[0] == "text":
            plain = -np.log(both[np.arange(len(labels)), labels]).mean()
            assert found["ensemble"]["loss"] == pytest.approx(plain, rel=1e-4)
    assert found["ensemble"]["count"] == len(rows["both"]) and np.isfinite(found["ensemble"]["loss"])
    table = call(*runs)[1]
    assert re.search(r"run 1 +run 2 +ensemble", table)


def test_an_ensemble_of_classes_in_another_order_or_of_other_classes(capsys, tmp_path: Path) -> None:
    """By name; models of other classes have none, and a copy's loss may not be known."""
    module = script_module(ROOT / "scripts" / "text_classify.py")
    settings = module.Args(label_smoothing=0.1)
    rng = np.random.default_rng(0)
    logits, order = rng.normal(size=(2, 7, 3)).astype(np.float32), np.array([2, 0, 1])
    labels = rng.integers(0, 3, 7)

    def part(name: str, names: list[str], logits: np.ndarray, labels: np.ndarray) -> evaluate.Part:
        data = SimpleNamespace(label_names=names, problem_type="single_label", class_counts=None, teacher=None)
        found = {"labels": labels, "logits": logits, "losses": np.zeros(7, np.float32)}
        return evaluate.Part(named.Named(name, tmp_path, "text", {}, None, {}), module, settings, data, "test", found)

    first = part("first", ["a", "b", "c"], logits[0], labels)
    second = part("second", ["c", "a", "b"], logits[1][:, order], np.argsort(order)[labels])
    mean = evaluate.ensemble_of([first, second], is_copy=False)
    right = torch.from_numpy(logits).softmax(-1).mean(0)
    assert np.allclose(torch.from_numpy(mean.found["logits"]).softmax(-1), right, atol=1e-6)
    loss = torch.nn.functional.cross_entropy(right.log(), torch.from_numpy(labels), label_smoothing=0.1)
    assert mean.found["losses"].mean() == pytest.approx(loss.item(), rel=1e-5)
    assert np.isnan(evaluate.ensemble_of([first, second], is_copy=True).found["losses"]).all()
    other = part("other", ["a", "b", "d"], logits[1], labels)
    assert evaluate.ensemble_of([first, other], is_copy=False) is None
    assert capsys.readouterr().err == "note: no ensemble: other and first have different classes\n"


def test_ensembles_of_several_labels_and_of_numbers() -> None:
    logits = np.array([[[2.0, -1.0]], [[0.0, -3.0]]], np.float32)
    mean = (1 / (1 + np.exp(-logits.astype(np.float64)))).mean(axis=0)
    assert np.allclose(1 / (1 + np.exp(-ensemble_logits(logits, "multi_label").astype(np.float64))), mean, atol=1e-7)
    assert ensemble_logits(logits, "regression").tolist() == [[1.0, -2.0]]
    far = ensemble_logits(np.array([[[900.0, -900.0]]] * 2, np.float32), "multi_label")
    assert np.isfinite(far).all() and far[0, 0] > 30 and far[0, 1] < -30


def test_models_of_other_samples_or_tasks_are_not_compared(trained, request, call) -> None:
    for pair, words in (
        ((trained(request, "text"), trained(request, "sign")), "a model of texts"),
        ((trained(request, "text"), trained(request, "cnn"), "--split", "validation"), "different validation rows"),
    ):
        code, out, err = call(*pair)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and words in err
    code, out, err = call(trained(request, "sign"), trained(request, "gru"))
    assert code == 0 and "run 2 gloss_accuracy" in out and "run 2 cat_accuracy" in out


def test_what_is_written(trained, request, call, sign_set: Path, tmp_path: Path) -> None:
    run = trained(request, "sign")
    assert call(run, "--output_dir", tmp_path / "sign")[0] == 0
    names = {path.name for path in (tmp_path / "sign").iterdir()}
    assert names == {"results.json", "predictions.csv", "report.html"} | {
        f"{part}_{head}.{end}"
        for part, end in (("confusion", "png"), ("classification_report", "txt"))
        for head in ("gloss", "cat")
    }
    for head in ("gloss", "cat"):
        own = (run / "logs" / f"classification_report_test_{head}.txt").read_text()
        assert (tmp_path / "sign" / f"classification_report_{head}.txt").read_text() == own
    rows = rows_of(tmp_path / "sign" / "predictions.csv")
    assert [row["file"] for row in rows] == [f"test clip_{number:03d}" for number in range(19)]
    assert [(row["gloss"], row["cat"]) for row in rows] == [(f"{n % 6}", f"{n % 6 // 2}") for n in range(19)]
    kept = results(run)
    share = np.mean([row["gloss"] == row["gloss_predicted"] for row in rows])
    assert share == pytest.approx(kept["test"]["gloss_accuracy"])
    for row in rows:
        scores = [float(row[f"p_gloss_{number}"]) for number in range(6)]
        assert sum(scores) == pytest.approx(1, abs=1e-5) and max(scores) == float(row["gloss_confidence"])
    written = json.loads((tmp_path / "sign" / "results.json").read_text())
    assert written["gloss_confusion_matrix"] == kept["gloss_confusion_matrix"]
    page = (tmp_path / "sign" / "report.html").read_text()
    assert "Confusion matrix, cat" in page and "Worst mistakes" in page


def test_the_report_of_a_clip_shows_what_it_retrieves(trained, request, call, tiny_clip_folder, pair_set, tmp_path):
    """Beside the model that it began as; ranks in the table give the recalls."""
    run, target = trained(request, "clip"), tmp_path / "out"
    code, out, err = call(run, tiny_clip_folder, "--data", pair_set / "test", "--output_dir", target)
    assert code == 0, err
    page = (target / "report.html").read_text()
    assert page.count("data:image/jpeg") == 8 * 5 * 2 and "run 2 text_to_image_r1" in out
    rows, kept = rows_of(target / "predictions.csv"), results(run)
    captions = {row["caption"]: int(row["clip: text_to_image_rank"]) for row in rows}
    for k in (1, 5, 10):
        recall = np.mean([rank <= k for rank in captions.values()])
        assert recall == pytest.approx(kept["test"][f"text_to_image_r{k}"])
    base = json.loads((target / "results.json").read_text())["runs"][str(tiny_clip_folder)]
    assert base["recall_mean"] == kept["base"]["test"]["recall_mean"]


def test_a_run_without_training_is_its_base_model(request, trained, clip_args, call, tmp_path: Path) -> None:
    launch(TASKS["clip"].script, *clip_args, "--scenario", "zero_shot", "--run_name", "zero", cwd=tmp_path)
    run = tmp_path / "runs" / "zero"
    code, out, err = call(run, trained(request, "clip"), "--format", "json")
    assert code == 0, err
    zero, tuned = json.loads(out)["runs"].values()
    assert zero["recall_mean"] == results(run)["test"]["recall_mean"]
    assert tuned["recall_mean"] == results(trained(request, "clip"))["test"]["recall_mean"]


def test_the_command_of_the_guide(trained, request, tmp_path: Path) -> None:
    """As a process, in the folder where the run was made."""
    run = trained(request, "text")
    target = tmp_path / "results"
    tool = ROOT / "tools" / "evaluate.py"
    done = launch(tool, "--model_path", "runs/text", "--output_dir", target, cwd=run.parent.parent)
    assert done.err == "" and "accuracy" in done.out and str(target / "report.html") in done.out
    assert json.loads((target / "results.json").read_text())["runs"]["runs/text"]["count"] == 67


def test_mistakes_are_one_line(trained, request, call, tmp_path: Path, sign_set: Path, text_set: Path) -> None:
    text, sign, clip = (trained(request, name) for name in ("text", "sign", "clip"))
    regression = shutil.copytree(text / "best", tmp_path / "regression")
    config = json.loads((regression / "config.json").read_text()) | {"problem_type": "regression"}
    (regression / "config.json").write_text(json.dumps(config))
    table = tmp_path / "a.csv"
    table.write_text("text,label\na,space\n")
    wide = tmp_path / "wide"
    wide.mkdir()
    np.savez(wide / "a.npz", X=np.zeros((4, 10), np.float32))
    (wide / "labels.csv").write_text("file,gloss,cat\na,0,0\n")
    (tmp_path / "broken.py").write_text("import nowhere_at_all\n")
    cases: list[tuple[tuple, str]] = [
        ((tmp_path / "gone",), "no such folder"),
        ((text, "--split", "novel"), "no run of clip_har.py"),
        ((text, "--frames", "3"), "--frames has no effect on"),
        ((text, "--tta"), "--tta has no effect on"),
        ((text, "--data_dir", "x"), "--data_dir has no effect on"),
        ((sign, "--data", sign_set, "--text_column", "x"), "--text_column has no effect on"),
        ((clip, "--data_dir", tmp_path / "gone"), "gone: no such folder"),
        ((text, "--text_column", "x"), "says how --data is read"),
        ((text, "--data", tmp_path / "gone.csv"), "gone.csv"),
        ((text, "--data", table, "--label_column", "topic"), "no column 'topic'"),
        ((sign, "--data", tmp_path / "empty"), "empty: no such file"),
        ((sign, "--data", tmp_path), "labels.csv: no such file"),
        ((sign, "--data", wide), "a.npz: X has 10 numbers per frame, but"),
        ((clip, "--data", tmp_path / "none"), "none"),
        ((regression, "--data", table), "row 1: label is 'space', not a number"),
        ((text, "--script", tmp_path / "gone.py"), "gone.py: no such file"),
        ((text, "--script", tmp_path / "broken.py"), "No module named 'nowhere_at_all'"),
        ((text, "--amp", "fp16"), "needs a GPU"),
        ((text / "checkpoints" / "step_000001",), "no such folder"),
        ((), "no run: name one"),
        ((text, "--model_path", text), "named twice"),
    ]
    for arguments, message in cases:
        code, out, err = call(*arguments)
        assert (code, out) == (2, ""), (arguments, out)
        assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1, (arguments, err)


def test_what_a_name_on_the_hub_brings(monkeypatch, tmp_path: Path) -> None:
    """No Python files, unless they are trusted; no pickles."""
    asked = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    for trust in (False, True):
        assert named._fetched("someone/net", trust) == tmp_path
    assert ("*.py" in asked[1]) and "*.py" not in asked[0] and not any("bin" in part for part in (*asked[0], *asked[1]))
