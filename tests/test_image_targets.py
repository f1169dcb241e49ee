"""image_classify.py with tables, several labels an image and numbers: training, metrics, thresholds, tools."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fork_server import draw_nothing
from harness import IMAGE, history, launch, results, run_in_this_process, script_module, weights
from PIL import Image
from tools import evaluate, export, predict, validate_data

from accelerando.base.errors import UserError
from accelerando.data.collate import ImageCollate
from accelerando.data.decode import evaluation_side
from accelerando.data.folders import read_splits
from accelerando.data.images import ImageAugmentation, TrainingImages
from accelerando.inference.named import find_named
from accelerando.inference.runs import read_answers
from accelerando.report.target_metrics import chosen_labels, sigmoid
from accelerando.train.evaluation import mirrored_mean

COLOURS = {"blue": (30, 60, 230), "green": (40, 200, 60), "red": (220, 40, 40)}
SIDE = evaluation_side(32)  # images of this side are not resized by anybody
COUNTS = {"train": 160, "validation": 48, "test": 56}


def write_csv(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey images with squares of none to three colours in their corners; the grey is a number.

    squares_*.jsonl lists the colours, grey_*.csv has the brightness from -1 to 1, and its negative.
    """
    folder = tmp_path_factory.mktemp("image_targets")
    (folder / "files").mkdir()
    for seed, (split, count) in enumerate(COUNTS.items()):
        rng, squares, greys = np.random.default_rng(seed), [], []
        for number in range(count):
            present = [name for name, share in zip(COLOURS, (0.5, 0.4, 0.25), strict=True) if rng.random() < share]
            for kind, listed in (("squares", present), ("grey", [])):
                bright = rng.uniform(40, 215) if kind == "grey" else 128
                pixels = np.clip(bright + rng.normal(0, 4, (SIDE, SIDE, 3)), 0, 255)
                for name, corner in zip(listed, rng.permutation(4).tolist(), strict=False):
                    top, left = 4 + 16 * (corner // 2), 4 + 16 * (corner % 2)
                    pixels[top : top + 12, left : left + 12] = COLOURS[name]
                file = f"files/{kind}_{split}_{number:03d}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(folder / file)
                if kind == "squares":
                    squares.append({"image": file, "colours": listed})
                else:
                    level = (bright - 127.5) / 87.5
                    greys.append({"image": file, "grey": round(level, 4), "dark": round(-level, 4)})
        (folder / f"squares_{split}.jsonl").write_text("\n".join(map(json.dumps, squares)) + "\n")
        write_csv(folder / f"grey_{split}.csv", greys)
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
        with here(IMAGE, [], tmp_path_factory.mktemp("runs_of_images"), patch) as run:

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


@pytest.fixture(scope="module")
def flags(made: Path, tiny_resnet: Path, tiny_vit: Path) -> dict[str, list[str]]:
    """The flags of each kind of run."""

    def files(name: str, suffix: str) -> list[str]:
        return [word for split in COUNTS for word in (f"--{split}_file", str(made / f"{name}_{split}.{suffix}"))]

    common = ["--image_size", "32", "--crop_scale", "1", "--batch_size", "16", "--report_to", "none", "--lr", "5e-3"]
    net = [*common, "--model_name", str(tiny_resnet)]
    squares = [*files("squares", "jsonl"), "--label_column", "colours"]
    grey = files("grey", "csv")
    return {
        "squares": [*squares, *net, "--epochs", "6", "--eval_every", "20"],
        "grey": [*grey, "--label_column", "grey", *net, "--epochs", "6", "--eval_every", "30"],
        "several": [*grey, "--label_columns", "grey", "dark", *net, "--epochs", "1"],
        "vit": [*squares, *common, "--model_name", str(tiny_vit), "--epochs", "2", "--lr", "1e-3"],
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


def found_by_script(run: Path, split: str = "test", **more: object) -> dict[str, np.ndarray]:
    """What the script's own evaluation finds with the best weights."""
    args = evaluate.Args(runs=(str(run),), split=split, **more)
    return evaluate.score_with_script(find_named(str(run)), args, None).found


def config(run: Path) -> dict:
    return json.loads((run / "best" / "config.json").read_text())


# ------------------------------------------------------------------------------------------------------------- training


def test_the_colours_in_an_image_are_found(trained) -> None:
    run = trained("squares")
    found = results(run)
    assert min(found["test"][name] for name in ("f1_macro", "f1_micro", "mAP")) > 0.99
    assert found["test"]["subset_accuracy"] > 0.98  # one image of 56
    assert found["config"]["training"]["best_metric"] == "f1_macro"
    assert config(run)["problem_type"] == "multi_label_classification"
    assert list(config(run)["id2label"].values()) == sorted(COLOURS)
    log = (run / "logs" / "train.log").read_text()
    assert "Problem type: multi_label" in log and "mAP" in log
    report = (run / "report.html").read_text()
    assert "Per label, test" in report and "Confusion matrix" not in report and "The number is the loss" in report
    assert "files/squares_test_" in report and "data:image/jpeg" in report  # the worst rows with their pictures
    lines = (run / "logs" / "classification_report_test.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines[1:]] == sorted(COLOURS)


def test_the_brightness_is_found(trained) -> None:
    run = trained("grey")
    found = results(run)["test"]
    greys = np.array([float(row["grey"]) for row in read_csv(Path(results(run)["config"]["data"]["test_file"]))])
    assert found["pearson"] > 0.99 and found["spearman"] > 0.98 and found["mse"] < 0.05 * greys.var()
    assert (config(run)["problem_type"], config(run)["id2label"]) == ("regression", {"0": "grey"})
    assert 'class="plot"' in (run / "report.html").read_text()
    assert (run / "plots" / "predicted_test.png").stat().st_size > 10_000


def test_losses_are_means_over_the_outputs(trained) -> None:
    several, squares = found_by_script(trained("several")), found_by_script(trained("vit"))
    assert several["logits"].shape == (56, 2) and list(config(trained("several"))["id2label"].values()) == [
        "grey",
        "dark",
    ]
    np.testing.assert_allclose(several["losses"], ((several["logits"] - several["labels"]) ** 2).mean(1), rtol=1e-4)
    scores = sigmoid(squares["logits"])
    entropy = -np.log(np.where(squares["labels"] > 0, scores, 1 - scores)).mean(1)
    np.testing.assert_allclose(squares["losses"], entropy, rtol=1e-4)
    assert "Per number, test" in (trained("several") / "report.html").read_text()


@pytest.mark.parametrize("how", ["mixup", "cutmix"])
def test_mixed_images_have_mixed_targets(how: str, made: Path) -> None:
    """The loss of a batch is that of targets mixed by hand; the numbers are between 0 and 1 where the images differ."""
    script = script_module(IMAGE)
    args = script.Args(train_file=str(made / "squares_train.jsonl"), label_column="colours")
    _, splits, kind = script.open_splits(args)
    images = TrainingImages(splits["train"], ImageAugmentation(1, 0), (32,), seed=3, **{how: 1.0})
    samples = [images.at(row, 2) for row in range(32)]
    goal = torch.tensor(np.array([s["share"] * s["label"] + (1 - s["share"]) * s["other_label"] for s in samples]))
    assert ((goal > 0.01) & (goal < 0.99)).any() and kind == "multi_label"
    batch, logits = ImageCollate()(samples), torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    data = SimpleNamespace(problem_type=kind, class_counts=None, mean=(0.5,) * 3, std=(0.5,) * 3, teacher=None)
    settings = SimpleNamespace(channels_last=False, tta=False, class_weights=False, logit_adjustment=0.0)
    losses, _ = script.compute_loss(lambda pixel_values: SimpleNamespace(logits=logits), batch, data, settings)
    binary = torch.nn.functional.binary_cross_entropy_with_logits(logits, goal.float(), reduction="none").mean(1)
    torch.testing.assert_close(losses, binary)


def test_every_form_of_labels_trains_the_same(made: Path, train, flags) -> None:
    common = flags["vit"][flags["vit"].index("--image_size") :]
    for split in COUNTS:
        rows = [json.loads(line) for line in (made / f"squares_{split}.jsonl").read_text().splitlines()]
        write_csv(made / f"text_{split}.csv", [row | {"colours": " | ".join(row["colours"])} for row in rows])
        ones = [{"file": row["image"].removeprefix("files/"), **{name: int(name in row["colours"]) for name in COLOURS}}
                for row in rows]  # fmt: skip
        write_csv(made / f"ones_{split}.csv", ones)

    def files(name: str) -> list[object]:
        return [word for split in COUNTS for word in (f"--{split}_file", made / f"{name}_{split}.csv")]

    folder = ("--media_folder", made / "files", "--file_column", "file")
    runs = [
        train(*flags["vit"], "--max_steps", "4", name="list"),
        train(*files("text"), "--label_column", "colours", "--label_delimiter", "|", *common, "--max_steps", "4",
              name="text"),
        train(*files("ones"), *folder, "--label_columns", *list(COLOURS)[::-1], *common, "--max_steps", "4",
              "--cache", "--cache_dir", made / "cache", name="ones"),
    ]  # fmt: skip
    assert len({weights(run / "last") for run in runs}) == 1
    assert len({json.dumps(results(run)["test"]) for run in runs}) == 1


def test_a_table_of_classes_trains_as_class_folders_do(train, image_set: Path, image_args, tmp_path: Path) -> None:
    classes, splits = read_splits(image_set, 0)
    names, words = list(classes), []
    for split, found in splits.items():
        labels = [names[number] for number in found.classes]
        rows = [{"image": file, "label": label} for file, label in zip(found.names.to_pylist(), labels, strict=True)]
        words += [f"--{split}_file", write_csv(tmp_path / f"{split}.csv", rows)]
    steps = ("--max_steps", "4", "--class_weights", "--mixup", "0.2", "--balanced")
    folders = train(*image_args, *steps, name="folders")
    table = train(*image_args, "--data_dir", "", *words, "--media_folder", image_set, *steps, name="table")
    assert weights(table / "last") == weights(folders / "last")
    assert results(table)["test"] == results(folders)["test"]
    assert (table / "predictions_test.csv").read_text() == (folders / "predictions_test.csv").read_text()


def test_validation_images_are_held_out_and_others_left_as_they_are(train, flags) -> None:
    held = ("--validation_file", "None", "--validation_fraction", "0.25", "--max_steps", "1")
    for name in ("squares", "several"):
        assert results(train(*flags[name], *held, name=f"held_{name}"))["validation"]["count"] == pytest.approx(
            40, abs=3
        )
    nothing = ("--validation_file", "None", "--validation_fraction", "0", "--max_steps", "1")
    run = train(*flags["squares"], *nothing, name="unheld")
    assert "thresholds" not in results(run) and "thresholds" not in config(run)


# ----------------------------------------------------------------------------------------------------------------- tools


@pytest.mark.parametrize("name", ["squares", pytest.param("vit", marks=pytest.mark.exhaustive), "grey", "several"])
def test_pipeline_predict_report_and_evaluation_agree(
    name: str, trained, made: Path, call_tool, tmp_path: Path
) -> None:
    """transformers' own pipeline on the saved folder, as its user would call it."""
    from transformers import pipeline

    run, found = trained(name), found_by_script(trained(name))
    names = list(config(run)["id2label"].values())
    table = read_csv(run / "predictions_test.csv")
    if name in ("squares", "vit"):  # what compare_runs.py compares
        answered = read_answers(run, "test")
        assert answered.samples == [row["file"] for row in table]
        true = [", ".join(label for label, there in zip(names, row, strict=True) if there) for row in found["labels"]]
        assert answered.labels == true
    paths = [str(made / row["file"]) for row in table]
    classify = pipeline("image-classification", model=str(run / "best"), device="cpu")
    said = [{each["label"]: each["score"] for each in answer} for answer in classify(paths, top_k=len(names))]
    scores = np.array([[answer[label] for label in names] for answer in said])
    several = name in ("squares", "vit")
    np.testing.assert_allclose(scores, sigmoid(found["logits"]) if several else found["logits"], atol=2e-5)

    code, out, err = call_tool(predict, run, *paths)
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    if several:
        thresholds = np.array([config(run)["thresholds"][label] for label in names])
        chosen = chosen_labels(found["logits"], thresholds)
        listed = [[label for label, is_there in zip(names, row, strict=True) if is_there] for row in chosen]
        assert [answer["labels"] for answer in answers] == listed
        assert [row["predicted"].split(", ") for row in table] == [row or [""] for row in listed]
        for row, answer in zip(table, answers, strict=True):
            for label, score in answer["scores"].items():
                assert float(row[f"p_{label}"]) == pytest.approx(score, abs=2e-6)
        _, out, _ = call_tool(predict, run, "--threshold", "1", *paths[:3])
        assert all(json.loads(line)["labels"] == [] for line in out.splitlines())
    else:
        values = np.array([list(answer.get("values", {"": answer.get("value")}).values()) for answer in answers])
        np.testing.assert_allclose(values, found["logits"], atol=2e-5)
        written = [[float(row[f"predicted_{label}"]) for label in names] for row in table]
        np.testing.assert_allclose(written, found["logits"], atol=2e-5)
    target = tmp_path / "answers.csv"
    code, _, err = call_tool(predict, run, *paths, "--output", target)
    assert code == 0, err
    rows = read_csv(target)
    for column in rows[0].keys() - {"file"}:
        for one, two in zip(rows, table, strict=True):
            numeric = column != "predicted"
            assert (
                float(one[column]) == pytest.approx(float(two[column]), abs=3e-5)
                if numeric
                else one[column] == two[column]
            )


@pytest.mark.parametrize("name", ["squares", "several"])
def test_evaluate_gives_the_numbers_of_the_run(name: str, trained, made: Path, call_tool, tmp_path: Path) -> None:
    run = trained(name)
    for split in ("test", "validation"):
        code, out, err = call_tool(evaluate, run, "--split", split, "--format", "json")
        assert code == 0, err
        assert next(iter(json.loads(out)["runs"].values())) == pytest.approx(results(run)[split], abs=1e-4)
    other = made / ("squares_validation.jsonl" if name == "squares" else "grey_validation.csv")
    target = tmp_path / "out"
    code, out, err = call_tool(evaluate, run, "--data", other, "--format", "json", "--output_dir", target)
    assert code == 0, err
    assert next(iter(json.loads(out)["runs"].values())) == pytest.approx(results(run)["validation"], abs=1e-4)
    page = (target / "report.html").read_text()
    assert "Highest losses" in page and "data:image/jpeg" in page and ("Per label" in page or 'class="plot"' in page)
    assert len(read_csv(target / "predictions.csv")) == 48
    code, _, err = call_tool(evaluate, run, "--data", made / "files")
    assert code == 2 and "is scored on a table of files and labels" in err


def test_mirrored_images_average_probabilities(trained, made: Path, call_tool) -> None:
    run = trained("vit")
    found, mirrored = found_by_script(run), found_by_script(run, tta=True)
    paths = [str(made / row["file"]) for row in read_csv(run / "predictions_test.csv")]
    _, out, _ = call_tool(predict, run, "--tta", *paths)
    said = [json.loads(line)["scores"] for line in out.splitlines()]
    scores = np.array([[answer[name] for name in sorted(COLOURS)] for answer in said])
    np.testing.assert_allclose(scores, sigmoid(mirrored["logits"]), atol=2e-5)
    assert np.abs(mirrored["logits"] - found["logits"]).max() > 1e-4
    one, two = torch.tensor([[-90.0, 3.0, 0.2]]), torch.tensor([[-80.0, -1.0, 0.2]])
    torch.testing.assert_close(
        mirrored_mean(one, two, "multi_label_classification").sigmoid(), (one.sigmoid() + two.sigmoid()) / 2
    )
    for kind in (None, "single_label", "regression"):
        assert torch.equal(mirrored_mean(one, two, kind), (one + two) / 2)


@pytest.mark.parametrize("name", ["squares", "several"])
def test_export_keeps_outputs_and_predictions(name: str, trained, made: Path, call_tool, tmp_path: Path) -> None:
    run, target = trained(name), tmp_path / "export"
    code, _, err = call_tool(export, run, "--samples", "24", "--tolerance", "1e-3", "--output_dir", target)
    assert code == 0, err
    facts = json.loads((target / "export.json").read_text())
    assert facts["files"]["model.onnx"]["equal_predictions"] == 1
    paths = [made / row["file"] for row in read_csv(run / "predictions_test.csv")[:5]]
    plain, exported = (call_tool(predict, model, *paths)[1] for model in (run, target))
    usage = subprocess.run([sys.executable, target / "usage.py", *paths], capture_output=True, text=True, check=True)
    for one, two, line in zip(plain.splitlines(), exported.splitlines(), usage.stdout.splitlines(), strict=True):
        one, two = json.loads(one), json.loads(two)
        *said, path = line.split("\t")
        assert path == one["file"] == two["file"]
        if name == "squares":
            assert set(one["labels"]) == set(two["labels"]) == set(said)
        else:
            assert two["values"] == pytest.approx(one["values"], abs=1e-3)
            assert list(map(float, said)) == pytest.approx(list(two["values"].values()), abs=0.05)  # Pillow resizes
    assert facts.get("thresholds") == (list(config(run)["thresholds"].values()) if name == "squares" else None)


def test_the_data_check_counts_labels(flags, call_tool, tmp_path: Path) -> None:
    for name in ("squares", "grey"):
        code, _, err = call_tool(
            validate_data, "--accept_problems", "--json", tmp_path / "found.json", IMAGE, *flags[name]
        )  # fmt: skip
        assert code == 0, err
        counted = json.loads((tmp_path / "found.json").read_text())["classes"]
        if name == "grey":
            assert counted == {}
        else:
            lists = [json.loads(line)["colours"] for line in Path(flags[name][1]).read_text().splitlines()]
            assert counted["class"]["train"] == {each: sum(each in row for row in lists) for each in sorted(COLOURS)}


# ---------------------------------------------------------------------------------------------------- processes, resume


def test_a_stopped_run_resumes_to_the_same_weights(train, flags, monkeypatch) -> None:
    more = ("--mixup", "0.3", "--cutmix", "1", "--save_every", "3", "--eval_every", "5", "--ema_decay", "0.9")
    whole = train(*flags["squares"], *more, "--epochs", "2", name="whole")
    module = sys.modules["image_classify"]
    plain, steps = module.finish_step, []

    def finish_step(*given):
        steps.append(1)
        if len(steps) == 14:
            raise RuntimeError("stopped")
        return plain(*given)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(module, "finish_step", finish_step)
        train(*flags["squares"], *more, "--epochs", "2", name="part")
    part = train(*flags["squares"], *more, "--epochs", "2", "--resume", name="part")
    assert "Resumed from" in (part / "logs" / "train.log").read_text()
    for folder in ("best", "last"):
        assert weights(part / folder) == weights(whole / folder)
    assert results(part)["thresholds"] == results(whole)["thresholds"]


@pytest.mark.launch
def test_two_processes_equal_one(flags, tmp_path: Path) -> None:
    args = [*flags["vit"], "--epochs", "1", "--mixup", "0.3"]
    launch(IMAGE, *args, "--batch_size", "16", "--run_name", "one", cwd=tmp_path)
    launch(IMAGE, *args, "--batch_size", "8", "--run_name", "two", cwd=tmp_path, processes=2)
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    for first, second in zip(history(one, "train"), history(two, "train"), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-3)
    for split in ("validation", "test"):
        assert results(two)[split] == pytest.approx(results(one)[split], abs=0.02)


def test_what_the_script_refuses(train, flags, made: Path, image_set: Path, tmp_path: Path, call_tool, trained) -> None:
    missing = write_csv(tmp_path / "missing.csv", [{"image": "nothing.png", "label": "a"}])
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "elsewhere" / "a.png")
    odd = write_csv(tmp_path / "elsewhere" / "odd.csv", [{"image": "a.png", "label": "x|weather"}])
    several = ("--label_column", "label", "--label_delimiter", "|")
    cases = [
        ((*flags["squares"], "--data_dir", image_set), "--data_dir and --train_file both name the data"),
        ((*flags["squares"], "--train_file", missing), "no column 'colours'"),
        ((*flags["squares"], "--train_file", missing, "--label_column", "label", "--validation_file", "None", "--test_file",
          "None", "--problem_type", "single_label"), "row 1: no file"),
        ((*flags["squares"], "--problem_type", "single_label"), "not a name or a whole number"),
        ((*flags["squares"], "--label_smoothing", "0.1"), "--label_smoothing is for one label an image"),
        ((*flags["squares"], "--balanced"), "--balanced is for one label an image"),
        ((*flags["squares"], "--best_metric", "accuracy"), "--best_metric accuracy is not measured on multi_label"),
        ((*flags["squares"], "--num_classes", "4"), "has 3 outputs"),
        ((*flags["squares"], "--label_delimiter", ""), "--label_delimiter"),
        ((*flags["grey"], "--problem_type", "multi_label"), "numbers with fractions, but multi_label wants"),
        (("--data_dir", image_set, "--problem_type", "multi_label", *flags["vit"][-10:]), "name a --train_file"),
        (("--train_file", odd, *several, "--validation_file", made / "squares_train.jsonl", *flags["vit"][-10:]), "no 'label'"),
        (("--train_file", odd, *several, "--validation_file", "None", "--test_file", odd, "--validation_fraction", "0",
          "--test_file", made / "text.csv", *flags["vit"][-10:]), "text.csv"),
    ]  # fmt: skip
    for words, message in cases:
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            train(*words, name="refused")
        assert "\n" not in str(caught.value)
    assert not Path("runs/refused").exists()
    lists = tmp_path / "elsewhere" / "lists.jsonl"
    lists.write_text(json.dumps({"image": "a.png", "colours": ["red"]}) + "\n")
    cached = ("--test_file", lists, "--cache", "--cache_dir", tmp_path / "cache")
    with pytest.raises(UserError, match=r"--cache: the images are in .* --media_folder"):
        train(*flags["squares"], *cached, name="cache")
    code, out, err = call_tool(predict, trained("grey"), made / "files" / "grey_test_000.png", "--threshold", "0.2")
    assert (code, out) == (2, "") and "does not give several labels an image" in err


def test_the_lists_of_metrics_agree() -> None:
    module, text = script_module(IMAGE), script_module(IMAGE.with_name("text_classify.py"))
    assert module.BEST_METRICS == text.BEST_METRICS and module.BestMetric == text.BestMetric
    assert {name for names in module.BEST_METRICS.values() for name in names} == set(module.BestMetric.__args__)
    listed = [metric.name for metric in module.METRICS]
    assert len(set(listed)) == len(listed) and set(module.BestMetric.__args__) <= set(listed)
