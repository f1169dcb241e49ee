"""tools/evaluate.py: the numbers of training, folders of others, ensembles, what it writes, one line for mistakes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from harness import IMAGE, ROOT, launch, run_in_this_process
from tools import evaluate, export, predict

METRICS = ("accuracy", "f1_macro", "f1_weighted", "precision_macro", "recall_weighted")


@pytest.fixture(scope="module")
def runs(image_args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/a (fold 0: everything that changes the loss) and runs/b (fold 1: nothing of it)."""
    with pytest.MonkeyPatch.context() as patch:
        training = run_in_this_process(IMAGE, image_args, tmp_path_factory.mktemp("evaluate"), patch)
        train = next(training)
        special = ("--label_smoothing", "0.1", "--class_weights", "--tta", "--report_on_train")
        train("--epochs", "4", "--lr", "1e-2", "--fold", "0", *special, name="a")
        folder = train("--epochs", "4", "--lr", "1e-2", "--fold", "1", name="b").parent
        training.close()
    return folder


@pytest.fixture
def call(call_tool):
    """``call(*arguments, tool=evaluate)``: a tool's exit code and both outputs."""

    def run(*arguments: object, tool=evaluate) -> tuple[int, str, str]:
        return call_tool(tool, *arguments)

    return run


@pytest.mark.parametrize("split", ["validation", "train"])
def test_validation_images_that_were_held_out_are_found_again(
    split: str, image_set, image_here, call, tmp_path
) -> None:
    shutil.copytree(image_set / "raw", tmp_path / "photos" / "train")
    data = ("--data_dir", tmp_path / "photos", "--validation_fraction", "0.3", "--seed", "5", "--report_on_train")
    run = image_here(*data, "--class_weights", "--max_steps", "2")
    code, out, err = call(run, "--split", split, "--format", "json")
    assert (code, err) == (0, "")
    (found,) = json.loads(out)["runs"].values()
    kept = json.loads((run / "results.json").read_text())[split]
    assert found["count"] == kept["count"]
    for name in ("loss", *METRICS):
        assert found[name] == pytest.approx(kept[name], abs=1e-5), name


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def probabilities_of(rows: list[dict[str, str]]) -> np.ndarray:
    return np.array([[float(row[f"p_{name}"]) for name in ("chair", "lamp", "table")] for row in rows])


@pytest.mark.parametrize(("run", "split"), [("a", "test"), ("a", "validation"), ("a", "train"), ("b", "test")])
def test_a_split_gives_the_numbers_of_training(run: str, split: str, runs: Path, call) -> None:
    code, out, err = call(runs / run, "--split", split, "--format", "json", "--batch_size", 5)
    assert (code, err) == (0, "")
    (found,) = json.loads(out)["runs"].values()
    kept = json.loads((runs / run / "results.json").read_text())[split]
    assert found.keys() == kept.keys() and found["count"] == kept["count"]
    assert found["loss"] == pytest.approx(kept["loss"], abs=1e-5)
    for name in METRICS:
        assert found[name] == kept[name]


def test_what_changes_the_numbers(runs: Path, call) -> None:
    def loss(*flags: str) -> float:
        (found,) = json.loads(call(runs / "a", "--format", "json", *flags)[1])["runs"].values()
        return found["loss"]

    usual = loss()
    assert loss("--no_tta") != usual
    assert loss("--amp", "bf16") != usual
    assert loss("--num_workers", "1") == pytest.approx(usual, abs=1e-6)


def test_what_is_printed_fits_a_terminal(runs: Path, call) -> None:
    code, out, _ = call(runs / "a")
    kept = json.loads((runs / "a" / "results.json").read_text())["test"]
    assert code == 0 and f"{kept['count']} images of" in out and "(test split)" in out
    table = dict(line.split() for line in out.splitlines() if line.startswith(("loss", "accuracy", "f1")))
    assert table["loss"] == f"{kept['loss']:.4f}" and table["accuracy"] == f"{kept['accuracy']:.4f}"
    assert max(map(len, call(runs / "a", runs / "b")[1].splitlines()[3:])) <= 80


def test_an_ensemble_is_the_mean_of_probabilities(runs: Path, image_set: Path, call, tmp_path: Path) -> None:
    data = image_set / "raw"
    alone = {}
    for run in ("a", "b"):
        assert call(runs / run, "--data", data, "--output_dir", tmp_path / run)[0] == 0
        alone[run] = rows_of(tmp_path / run / "predictions.csv")
    code, _, err = call(runs / "a", runs / "b", "--data", data, "--output_dir", tmp_path / "both")
    together = rows_of(tmp_path / "both" / "predictions.csv")
    results = json.loads((tmp_path / "both" / "results.json").read_text())
    assert (code, err) == (0, "")
    assert [row["file"] for row in together] == [row["file"] for row in alone["a"]]
    mean = (probabilities_of(alone["a"]) + probabilities_of(alone["b"])) / 2
    np.testing.assert_allclose(probabilities_of(together), mean, atol=2e-6)
    labels = np.array([["chair", "lamp", "table"].index(row["label"]) for row in together])
    assert len(labels) == 117 == results["ensemble"]["count"]
    assert results["ensemble"]["accuracy"] == (mean.argmax(1) == labels).mean()
    plain = -np.log(mean[np.arange(117), labels]).mean()  # with --data the loss is no run's own
    assert results["ensemble"]["loss"] == pytest.approx(plain, rel=1e-4)
    for run in ("a", "b"):
        kept = json.loads((tmp_path / run / "results.json").read_text())["runs"][str(runs / run)]
        assert results["runs"][str(runs / run)] == pytest.approx(kept, abs=1e-6)
    own = json.loads(call(runs / "a", runs / "b", "--format", "json")[1])
    assert own["split"] == "test" and len(own["runs"]) == 2 and sum(map(sum, own["confusion_matrix"])) == own[
        "ensemble"]["count"]  # fmt: skip


def test_runs_are_compared_on_the_same_images(runs: Path, image_set: Path, call, tmp_path: Path) -> None:
    data = image_set / "raw"
    right = {}
    for run in ("a", "b"):
        assert call(runs / run, "--data", data, "--output_dir", tmp_path / run)[0] == 0
        right[run] = np.array([row["label"] == row["predicted"] for row in rows_of(tmp_path / run / "predictions.csv")])
    code, out, _ = call(runs / "a", runs / "b", "--data", data, "--format", "json")
    (found,) = json.loads(out)["comparisons"]
    assert code == 0 and found["count"] == 117
    assert found["only_first"] == (right["a"] & ~right["b"]).sum()
    assert found["only_second"] == (right["b"] & ~right["a"]).sum()
    assert found["difference"] == pytest.approx(right["b"].mean() - right["a"].mean())
    assert "run 2 accuracy" in call(runs / "a", runs / "b", "--data", data)[1]


def test_an_export_and_a_copied_script_score_as_the_run(runs: Path, call, tmp_path: Path) -> None:
    kept = json.loads((runs / "a" / "results.json").read_text())["test"]
    assert call(runs / "a", "--samples", "4", "--output_dir", tmp_path / "deployed", tool=export)[0] == 0
    shutil.copytree(tmp_path / "deployed", runs / "a" / "export")
    code, out, err = call(runs / "a", runs / "a" / "export" / "model.onnx", "--format", "json")
    assert (code, err) == (0, "")
    for found in json.loads(out)["runs"].values():
        for name, value in found.items():
            assert value == pytest.approx(kept[name], abs=1e-4 if name == "loss" else 1e-9), name
    code, out, err = call(tmp_path / "deployed")
    assert code == 2 and "score others with --data" in err
    source = IMAGE.read_text()
    line = '    metrics = SCORES[data.problem_type](found["labels"], found["logits"], found["losses"])'
    assert source.count(line) == 1
    more = f'{line} | {{"sure": float(found["logits"].max(axis=1).mean())}}'
    (tmp_path / "mine.py").write_text(source.replace(line, more))
    code, out, err = call(
        runs / "a", "--script", tmp_path / "mine.py", "--format", "json", "--output_dir", tmp_path / "o"
    )
    assert code == 0, err
    (found,) = json.loads(out)["runs"].values()
    assert found.pop("sure") != 0 and found == pytest.approx(kept, abs=1e-5)
    own = rows_of(runs / "a" / "predictions_test.csv")
    assert [row["file"] for row in rows_of(tmp_path / "o" / "predictions.csv")] == [row["file"] for row in own]
    code, out, err = call(runs / "a", "--script", tmp_path / "mine.py", "--data", tmp_path)
    assert (code, out) == (2, "") and "scored on its own samples only" in err


def test_a_folder_may_lack_classes_but_not_have_others(runs: Path, image_set: Path, call, tmp_path: Path) -> None:
    for name in ("table", "chair"):
        shutil.copytree(image_set / "raw" / name, tmp_path / "new" / name)
    (tmp_path / "new" / "chair" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "new" / "notes.txt").write_text("x")
    code, out, err = call(runs / "b", "--data", tmp_path / "new", "--output_dir", tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert code == 0 and "None of the images is of lamp" in out and "1 more cannot be read" in out
    assert "cannot be read:" in err and "broken.jpg" in err and "notes.txt" in err
    assert {(row["label"], row["file"].split("/")[0]) for row in rows} == {("chair", "chair"), ("table", "table")}
    (tmp_path / "new" / "table").rename(tmp_path / "new" / "tables")
    code, out, err = call(runs / "b", "--data", tmp_path / "new")
    assert (code, out) == (2, "") and err.splitlines()[-1].endswith("has no class 'tables'; did you mean table?")


def test_what_is_written(runs: Path, call, tmp_path: Path) -> None:
    target = tmp_path / "scores"
    assert call(runs / "b", "--output_dir", target)[0] == 0
    assert sorted(path.name for path in target.iterdir()) == sorted(evaluate.OURS)
    kept = rows_of(runs / "b" / "predictions_test.csv")
    rows = rows_of(target / "predictions.csv")
    assert [(row["file"], row["label"], row["predicted"]) for row in rows] == [
        (row["file"], row["label"], row["predicted"]) for row in kept
    ]
    np.testing.assert_allclose(probabilities_of(rows), probabilities_of(kept), atol=1e-5)
    for name in ("confusion.png", "classification_report.txt"):
        assert (target / name).stat().st_size > 100
    report = (runs / "b" / "logs" / "classification_report_test.txt").read_text()
    assert (target / "classification_report.txt").read_text() == report
    page = (target / "report.html").read_text()
    wrong = [row["file"] for row in rows if row["label"] != row["predicted"]]
    assert all(name in page for name in wrong) and page.count("data:image/jpeg") == len(wrong) > 0

    before = (target / "results.json").read_text()
    code, out, err = call(runs / "a", "--output_dir", target)
    assert (code, out) == (2, "") and "--overwrite" in err and (target / "results.json").read_text() == before
    assert call(runs / "a", "--output_dir", target, "--overwrite")[0] == 0
    assert (target / "results.json").read_text() != before


def test_a_new_split_is_noticed(runs: Path, image_set: Path, call, tmp_path: Path) -> None:
    shutil.copytree(image_set, tmp_path / "data")
    index = tmp_path / "data" / "splits"
    assert call(runs / "a", "--data_dir", tmp_path / "data")[2] == ""
    (index / "test.txt").write_bytes((index / "fold_1_val.txt").read_bytes())
    code, _, err = call(runs / "a", "--data_dir", tmp_path / "data")
    assert code == 0 and err.startswith("warning: ") and "may have been trained on some" in err
    (index / "classes.json").write_text('{"chair": 0, "lamp": 1, "sofa": 2}')
    (index / "test.txt").write_text((index / "test.txt").read_text().splitlines()[0])
    code, _, err = call(runs / "b", "--data_dir", tmp_path / "data")
    assert code == 2 and "its classes are not those of" in err


def test_mistakes_end_in_one_line(runs: Path, image_set: Path, call, tmp_path: Path) -> None:
    a, data = runs / "a", image_set / "raw"
    truncated = shutil.copytree(a, tmp_path / "truncated")
    weights = (a / "best" / "model.safetensors").read_bytes()
    (truncated / "best" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    moved, alone = shutil.copytree(a, tmp_path / "moved"), shutil.copytree(a / "best", tmp_path / "alone")
    settings = (moved / "config.yaml").read_text().replace(str(image_set), "nowhere/furniture")
    (moved / "config.yaml").write_text(settings)
    text, empty = tmp_path / "text", tmp_path / "empty"
    (empty / "chair").mkdir(parents=True)
    text.mkdir()
    (text / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    cases: list[tuple[tuple, str]] = [
        ((), "no run: name one"),
        ((tmp_path / "gone",), "no such folder"),
        ((text, "--data", data), "no tokenizer"),
        ((truncated,), "the model cannot be loaded"),
        ((moved,), "--data_dir says where the run's images lie now"),
        ((alone,), "score others with --data"),
        ((a, "--data", empty), "in this class folder"),
        ((a, "--data", empty / "chair"), "no class folders in it"),
        ((a, "--data", image_set), "its class folders are in"),
        ((a, "--data", data, "--split", "test"), "drop one"),
        ((a, a), "named twice"),
        ((a, runs / "b", "--split", "validation"), "different validation images"),
        ((a, "--output_dir", a), "is no evaluation's"),
        ((a, "--output_dir", a / "config.yaml"), "is a file"),
        ((a, "--amp", "fp16"), "needs a GPU"),
        ((a, "--device", "cuda:77"), "no such device"),
        ((a, "--splt", "test"), "did you mean --split?"),
    ]
    for arguments, message in cases:
        code, out, err = call(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1, (arguments, err)


@pytest.mark.launch
def test_a_trained_model_in_use(runs: Path, image_set: Path, call, tmp_path: Path) -> None:
    """As a user goes on after training: scores the run, asks it about images, and about a list of them."""
    done = launch(ROOT / "tools" / "evaluate.py", runs / "b", "--output_dir", "scores", cwd=tmp_path)
    assert (tmp_path / "scores" / "report.html").is_file() and "accuracy" in done.out and done.err == ""
    kept = rows_of(runs / "b" / "predictions_test.csv")
    (tmp_path / "list.txt").write_text("".join(f"{image_set / row['file']}\n" for row in kept))
    assert call(runs / "b", "--file", tmp_path / "list.txt", "--output", tmp_path / "a.csv", tool=predict)[0] == 0
    rows = rows_of(tmp_path / "a.csv")
    assert [row["predicted"] for row in rows] == [row["predicted"] for row in kept]
    np.testing.assert_allclose(probabilities_of(rows), probabilities_of(kept), atol=1e-5)
    code, out, _ = call(runs / "b", image_set / "raw" / "lamp", "--top_k", 1, tool=predict)
    assert code == 0 and len(out.splitlines()) == len(list((image_set / "raw" / "lamp").iterdir()))
