"""Folds of the training rows: how they are dealt, and a cross-validation of texts, signs and actions."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from harness import HAR, SIGN, TEXT, results
from test_cross_validate import Tool

from accelerando.base.errors import UserError
from accelerando.data.splits import fold_split


@pytest.mark.parametrize("seed", range(4))
def test_folds_divide_the_rows_and_tear_no_group(seed: int) -> None:
    rng = np.random.default_rng(seed)
    strata = rng.choice(4, 300, p=(0.5, 0.3, 0.15, 0.05))
    groups = [f"group {number}" for number in rng.integers(0, 60 if seed % 2 else 300, 300)]
    parts = [fold_split(strata, groups, 5, fold) for fold in range(5)]
    assert sorted(np.concatenate([held for _, held in parts])) == [*range(300)]
    for rest, held in parts:
        assert sorted([*rest, *held]) == [*range(300)]
        assert not {groups[row] for row in rest} & {groups[row] for row in held}
        assert len(held) == pytest.approx(60, abs=6)
        for label, count in enumerate(np.bincount(strata)):
            assert np.sum(strata[held] == label) == pytest.approx(count / 5, abs=4)
    again, _ = fold_split(strata, groups, 5, 2)
    assert np.array_equal(again, parts[2][0])
    with pytest.raises(UserError, match="--fold 5: there are folds 0 to 4"):
        fold_split(strata, groups, 5, 5)
    with pytest.raises(UserError, match="--num_folds 5: the 300 rows are 2 groups"):
        fold_split(strata, ["a", "b"] * 150, 5, 0)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


@pytest.fixture
def authors(text_set: Path, tmp_path: Path) -> Path:
    """The training rows with an author each; some texts stand there twice."""
    rows = json.loads((text_set / "train.json").read_text())
    rows += rows[:20]
    for number, row in enumerate(rows):
        row["author"] = f"author {number % 23}"
    path = tmp_path / "authors.json"
    path.write_text(json.dumps(rows))
    return path


def test_texts_are_cross_validated_by_author(
    train_here, authors: Path, text_args: list[str], text_set: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Each row is answered once, by a model that has not seen its author; the numbers are those of the folds."""
    tool = Tool(tmp_path, train_here, monkeypatch)
    model = ("--model_name", text_args[text_args.index("--model_name") + 1])
    flags = ("--train_file", authors, "--test_file", text_set / "test.json", "--num_folds", "3", *model, "--epochs", "2",
             "--lr", "3e-3", "--max_length", "48", "--report_to", "none", "--run_name", "x")  # fmt: skip
    result = tool(*flags, "--group_column", "author", script=TEXT)
    author_of: dict[str, set[str]] = {}
    for row in json.loads(authors.read_text()):
        author_of.setdefault(row["text"], set()).add(row["author"])
    folds, answered = [], Counter()
    for number in range(3):
        validated = rows_of(tmp_path / "runs" / f"x_fold{number}" / "predictions_validation.csv")
        answered.update(row["text"] for row in validated)
        folds.append(
            {author for row in validated if len(author_of[row["text"]]) == 1 for author in author_of[row["text"]]}
        )
    assert answered == Counter(row["text"] for row in json.loads(authors.read_text()))
    assert sum(map(len, folds)) == len(set.union(*folds)) == 23  # no author in two folds
    found = results(result)
    accuracies = [results(tmp_path / "runs" / f"x_fold{number}")["test"]["accuracy"] for number in range(3)]
    assert found["mean"]["test"]["accuracy"] == pytest.approx(np.mean(accuracies))
    assert found["std"]["test"]["accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
    pooled = rows_of(result / "predictions_validation.csv")
    assert Counter(row["text"] for row in pooled) == answered
    right = np.mean([row["label"] == row["predicted"] for row in pooled])
    assert found["out_of_fold"]["accuracy"] == pytest.approx(right)
    assert found["out_of_fold"]["count"] == 223
    assert found["ensemble"]["count"] == 67
    assert "3 folds, 223 samples validated on, 67 tested on" in capsys.readouterr().out
    tool(*flags, "--group_column", "author", script=TEXT)
    assert tool.commands == []  # all of it was there
    with pytest.raises(UserError, match=r"authors.json: no column 'writer' beside those that are trained on: author"):
        train_here(*map(str, flags), "--group_column", "writer", base=[], name="other")
    with pytest.raises(UserError, match="--num_folds and --validation_file: the one divides the training rows"):
        train_here("--num_folds", "3", name="both")


def test_equal_texts_fall_into_one_fold(train_here, authors: Path) -> None:
    texts = []
    for fold in ("0", "1"):
        run = train_here("--train_file", authors, "--validation_file", "None", "--num_folds", "2", "--fold", fold,
                         "--epochs", "1", name=fold)  # fmt: skip
        texts.append({row["text"] for row in rows_of(run / "predictions_validation.csv")})
    assert not texts[0] & texts[1]


def test_several_labels_have_mean_and_deviation_alone(
    train_here, text_args, tmp_path: Path, monkeypatch, capsys
) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(60):
        labels = [name for name in ("goal", "price") if rng.random() < 0.5]
        rows.append({"text": " ".join([*labels, *rng.choice(["the", "a", "of"], 4)]), "label": labels})
    path = tmp_path / "tags.json"
    path.write_text(json.dumps(rows))
    tool = Tool(tmp_path, train_here, monkeypatch)
    model = ("--model_name", text_args[text_args.index("--model_name") + 1])
    result = tool("--train_file", path, "--num_folds", "2", *model, "--max_length", "48", "--epochs", "2", "--report_to", "none", "--run_name",
                  "x", script=TEXT)  # fmt: skip
    found = results(result)
    assert "out_of_fold" not in found
    scores = [results(tmp_path / "runs" / f"x_fold{number}")["validation"]["mAP"] for number in range(2)]
    assert found["mean"]["validation"]["mAP"] == pytest.approx(np.mean(scores))
    assert "2 folds, 60 samples validated on" in capsys.readouterr().out
    assert "validation mAP, mean" in (result / "report.html").read_text()


def test_signs_are_cross_validated_by_signer(sign_here, sign_set: Path, tmp_path: Path, monkeypatch) -> None:
    tool = Tool(tmp_path, sign_here, monkeypatch)
    rows = rows_of(sign_set / "train" / "labels.csv")
    for number, row in enumerate(rows):
        row["signer"] = f"signer {number % 9}"
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    result = tool("--model", "transformer", "--keypoints_train", sign_set / "train", "--labels_train_csv",
                  tmp_path / "labels.csv", "--num_folds", "3", "--group_column", "signer", "--hidden_size", "16",
                  "--num_layers", "1", "--num_attention_heads", "2", "--intermediate_size", "16", "--epochs", "1",
                  "--report_to", "none", "--run_name", "x", script=SIGN)  # fmt: skip
    signers = {row["file"].removesuffix(".npz"): row["signer"] for row in rows}
    seen = []
    for number in range(3):
        validated = rows_of(tmp_path / "runs" / f"x_fold{number}" / "predictions_validation.csv")
        seen.append({signers[row["file"].removesuffix(".npz")] for row in validated})
    assert sum(map(len, seen)) == len(set.union(*seen)) == 9
    found = results(result)
    assert found["out_of_fold"]["count"] == len(rows)
    pooled = rows_of(result / "predictions_validation.csv")
    assert found["out_of_fold"]["gloss_accuracy"] == pytest.approx(
        np.mean([row["label"] == row["predicted"] for row in pooled])
    )


def test_actions_have_the_folds_of_a_folder(har_here, har_args, image_set: Path, tmp_path: Path, monkeypatch) -> None:
    tool = Tool(tmp_path, har_here, monkeypatch)
    result = tool(*har_args, "--data_dir", image_set, "--epochs", "1", "--run_name", "x", script=HAR)
    found = results(result)
    assert len(found["folds"]) == 3
    images = sum(len((image_set / "splits" / f"fold_{number}_val.txt").read_text().splitlines()) for number in range(3))
    assert found["out_of_fold"]["count"] == len(rows_of(result / "predictions_validation.csv")) == images
