"""Slices of a report: which rows are in them, their order and their intervals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from accelerando.base.errors import UserError
from accelerando.data.media import _shard_fields
from accelerando.report.slices import columns_of_files, slices, slices_block


def test_the_weakest_come_first_and_few_rows_do_not_count_as_weak() -> None:
    """Of two slices with the same accuracy the one with more rows is surely weak; five wrong rows alone are not."""
    source = ["web"] * 200 + ["book"] * 20 + ["talk"] * 100 + ["note"] * 4
    right = np.array([True] * 100 + [False] * 100 + [True] * 10 + [False] * 10 + [True] * 100 + [False] * 4)
    found = slices(right, {"source": source})
    assert [each.value for each in found] == ["web", "book", "talk"]  # four rows of notes are too few
    assert [each.count for each in found] == [200, 20, 100]
    assert found[0].accuracy == found[1].accuracy == 0.5
    assert found[0].high < found[1].high
    assert found[2].high == pytest.approx(1)
    # Wilson's interval of 10 right of 20, by the formula.
    z, p, n = 1.959964, 0.5, 20
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found[1].low, found[1].high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-5)


def test_many_numbers_become_quarters_that_hold_every_row_once() -> None:
    lengths = np.random.default_rng(0).integers(3, 200, 400)
    right = lengths < 150
    found = slices(right, {"length": lengths})
    assert len(found) == 4
    assert sum(each.count for each in found) == 400
    assert found[0].value.endswith(f"to {lengths.max()}")
    assert found[0].accuracy < 0.5 < found[1].accuracy
    few = slices(right, {"layers": lengths % 3})
    assert {each.value for each in few} == {"0", "1", "2"}


def test_names_of_rows_are_no_kinds_of_rows() -> None:
    right = np.arange(300) % 2 == 0
    assert slices(right, {"file": [f"{row}.jpg" for row in range(300)], "all": ["x"] * 300}) == []
    assert slices_block(right, {"all": ["x"] * 300}, "test") == []
    (block,) = slices_block(right, {"half": ["<a>", "b"] * 150}, "test")
    assert "&lt;a&gt;" in block
    assert "All rows: 0.5000" in block


def test_the_reports_of_texts_and_signs_have_them(train_here, sign_here, tmp_path: Path) -> None:
    """Of texts by label, length, and the columns that are named: one in which the labels are wrong comes first."""
    random = np.random.default_rng(3)
    rows = []
    for number in range(120):
        label = ("sport", "money")[number % 2]
        words = {"sport": "goal match team", "money": "bank market price"}[label].split()
        source = "spam" if number % 6 < 2 else ("paper", "forum")[number % 2]
        shown = {"sport": "money", "money": "sport"}[label] if source == "spam" and number >= 60 else label
        rows.append({"text": " ".join(random.choice(words, 6)), "label": shown, "source": source})
    train, test = tmp_path / "sources_train.json", tmp_path / "sources_test.json"
    train.write_text(json.dumps(rows[:60]))
    test.write_text(json.dumps(rows[60:]))
    files = ("--train_file", train, "--validation_file", "None", "--test_file", test, "--report_to", "none")
    run = train_here(*files, "--slice_by", "source", "--epochs", "6", "--lr", "5e-3")
    page = (run / "report.html").read_text()
    table = page.partition("Weakest slices, test")[2].partition("</table>")[0]
    found = re.findall(r">(source|tokens|label)</td><td[^>]*>([^<]*)<", table)
    assert found[0] == ("source", "spam")
    assert {("source", "forum"), ("label", "money")} <= set(found)
    with pytest.raises(UserError, match=r"train.json: no column 'age' beside those that are trained on: source"):
        train_here(*files, "--slice_by", "age", name="b")
    signs = (sign_here("--epochs", "1", name="signs") / "report.html").read_text()
    assert ">frames</td>" in signs.partition("Weakest slices, glosses, test")[2]


def weakest(run: Path, what: str) -> list[tuple[str, str]]:
    """Column and value of the slices in a run's report, in its order."""
    table = (run / "report.html").read_text().partition(f"Weakest slices, {what}")[2].partition("</table>")[0]
    return re.findall(r"<tr><td[^>]*>([^<]*)</td><td[^>]*>([^<]*)<", table)


def test_images_and_actions_have_them_by_folder_and_column(image_here, har_here, tmp_path: Path) -> None:
    """The labels of one camera are wrong: it comes first, by its folder as by a column."""
    colours = {"red chair": (220, 40, 30), "green lamp": (40, 200, 60), "blue table": (50, 60, 220)}
    wrong = dict(zip(colours, [*colours][1:] + [*colours][:1], strict=True))
    for split in ("train", "test"):
        rows = []
        for number in range(90):
            label, camera = [*colours][number % 3], ("night", "day")[number % 5 > 0]
            file = tmp_path / "photos" / camera / f"{split}_{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(number).integers(0, 30, (32, 32, 3), np.uint8)
            Image.fromarray(noise + np.uint8(colours[label])).save(file)
            shown = wrong[label] if (split, camera) == ("test", "night") else label
            name = f"{camera}/{file.name}"
            rows.append({"image": name, "label": shown, "year": number // 2, "camera": camera, "split": split})
        (tmp_path / "photos" / f"{split}.json").write_text(json.dumps(rows))
    files = ("--train_file", tmp_path / "photos" / "train.json", "--test_file", tmp_path / "photos" / "test.json")
    alone = ("--data_dir", "", *files, "--validation_fraction", "0", "--slice_by", "camera", "split")
    for run in (
        image_here(*alone, "--epochs", "6", "--lr", "1e-2", name="images"),
        har_here(*alone, "--epochs", "6", "--augmentation", "none", name="actions"),
    ):
        found = weakest(run, "test")
        assert found[0] == ("camera", "night")
        assert {("camera", "day"), ("label", "green lamp")} <= set(found)
        assert not any(column == "split" for column, _ in found)  # one value, which divides nothing
    there = "year, camera, split"
    with pytest.raises(UserError, match=f"train.json: no column 'age' beside those that are trained on: {there}"):
        har_here(*alone, "--slice_by", "age", name="b")


def test_folders_count_where_they_say_more_than_the_labels() -> None:
    names = ["ant/web/1.jpg", "ant/own/2.jpg", "bee/own/3.jpg"]
    assert columns_of_files(names, ["ant", "ant", "bee"], None)["folder"] == ["ant/web", "ant/own", "bee/own"]
    assert set(columns_of_files(["ant/1.jpg", "bee/2.jpg"], ["ant", "bee"], None)) == {"label"}


def test_fields_of_shards_are_columns_where_they_are_named() -> None:
    records = [{"year": 1, "note": "x"}, {"year": 2}, {}]

    class Pairs:
        def __len__(self) -> int:
            return len(records)

        def metadata(self, row: int) -> dict[str, object]:
            return records[row]

    assert _shard_fields(Pairs(), ("year",), "shards").to_pydict() == {"year": [1, 2, None]}
    with pytest.raises(UserError, match=r"shards: no field 'camera' in the .json of its samples: year, note"):
        _shard_fields(Pairs(), ("camera",), "shards")
