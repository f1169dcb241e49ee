"""tools/validate_data.py: counts are those of the data, planted faults are found and named, sound data passes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from harness import IMAGE, MULTITASK, TEXT
from made_data import make_rows, write_json
from PIL import Image
from tasks import TASKS
from tools import validate_data


@pytest.fixture
def validated(call_tool, tmp_path: Path):
    """``validated(script, *flags, ours=())``: (exit code, what --json says, standard error)."""

    def call(script: Path, *flags: object, ours: tuple[str, ...] = ()) -> tuple[int, dict, str]:
        found = tmp_path / "found.json"
        found.unlink(missing_ok=True)
        code, _, err = call_tool(validate_data, "--json", found, *ours, script, *flags)
        return code, json.loads(found.read_text()) if found.exists() else {}, err

    return call


@pytest.mark.parametrize("name", [name for name in TASKS if name != "multitask"])
def test_sound_data_of_every_task_passes_with_its_counts(name: str, request, validated) -> None:
    task = TASKS[name]
    code, found, err = validated(task.script, *task.args(request))
    assert code == 0, err
    assert {split: facts["count"] for split, facts in found["splits"].items()} == task.counts
    assert not found["errors"] and not found["unreadable"]
    for counts in found["classes"].values():
        assert {split: sum(classes.values()) for split, classes in counts.items()} == task.counts
    assert set(found["classes"]) == {"text": {"label"}, "sign": {"gloss", "category"}, "clip": set()}.get(
        name, {"class"}
    )
    assert set(found["copies"]) == {"validation", "test"}


def test_several_tasks_are_validated_one_by_one(multitask_args, validated) -> None:
    code, _, err = validated(MULTITASK, *multitask_args)
    assert code == 2
    assert "validate each one" in err


def test_rows_of_the_test_in_training_are_named(tmp_path: Path, text_args, validated) -> None:
    """A few are a warning; half of them an error, which --accept_problems makes one; spaces and capitals do not hide them."""
    train = json.loads(Path(text_args[1]).read_text())
    for copies, code in ((3, 0), (40, 2)):
        rows = make_rows(60 - copies, 77) + [{**row, "text": f" {row['text'].upper()}  "} for row in train[:copies]]
        path = write_json(tmp_path / "test.json", rows)
        ended, found, err = validated(TEXT, *text_args, "--test_file", path)
        assert (ended, found["copies"]["test"]) == (code, copies)
        (line,) = [line for line in found["errors" if code else "warnings"] if line.startswith("test: ")]
        assert f"{copies} of 60 samples are training samples too" in line and f"row {61 - copies} (" in line
        assert ("--accept_problems goes on anyway" in err.splitlines()[-1]) == bool(code) if err else not code
    ended, found, _ = validated(TEXT, *text_args, "--test_file", path, ours=("--accept_problems",))
    assert ended == 0 and not found["errors"] and any(line.startswith("test: 40 of") for line in found["warnings"])


def test_damaged_and_copied_images_are_named(tmp_path: Path, image_set: Path, image_args, validated) -> None:
    """Smaller and recompressed copies too."""
    shutil.copytree(image_set, tmp_path / "set")
    lines = {
        name: (tmp_path / "set" / "splits" / f"{name}.txt").read_text().splitlines()
        for name in ("test", "fold_0_train", "fold_0_val")
    }
    test, train = (tmp_path / "set" / lines[name][0] for name in ("test", "fold_0_train"))
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(
        (200, 180), Image.Resampling.BICUBIC
    )
    photo.save(train, "JPEG", quality=95)
    photo.resize((150, 135)).save(test, "JPEG", quality=70)
    broken = tmp_path / "set" / lines["fold_0_val"][2]
    broken.write_bytes(broken.read_bytes()[:100])
    code, found, err = validated(IMAGE, *image_args, "--data_dir", tmp_path / "set")
    assert code == 0, err
    assert found["unreadable"]["validation"]["count"] == 1
    assert found["unreadable"]["validation"]["first"][0].startswith(f"{broken}: ")
    assert any(line.startswith("validation: 1 of 33 samples cannot be read: ") for line in found["warnings"])
    assert any(line.startswith("test: ") and str(test) in line for line in found["warnings"])
    before = validated(IMAGE, *image_args)[1]["copies"]["test"]
    assert found["copies"]["test"] == before + 1
    for name in lines["fold_0_val"]:
        (tmp_path / "set" / name).write_bytes(b"no image")
    code, found, err = validated(IMAGE, *image_args, "--data_dir", tmp_path / "set")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: validation: 33 of 33 samples cannot be read: ")


def test_a_class_that_is_not_trained_on_is_an_error(tmp_path: Path, image_set: Path, image_args, validated) -> None:
    shutil.copytree(image_set, tmp_path / "set")
    path = tmp_path / "set" / "splits" / "fold_0_train.txt"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "lamp" not in line) + "\n")
    code, found, err = validated(IMAGE, *image_args, "--data_dir", tmp_path / "set", ours=("--most_opened", "0"))
    assert code == 2
    assert "samples are of lamp that no training sample is of" in err
    assert found["classes"]["class"]["train"]["lamp"] == 0 < found["classes"]["class"]["test"]["lamp"]


def test_what_the_script_refuses_is_its_own_line(text_args, tmp_path: Path, call_tool, validated) -> None:
    code, found, err = validated(TEXT, *text_args, "--train_file", "none.json")
    assert (code, found) == (2, {}) and "none.json" in err and err.count("\n") == 1
    code, _, err = call_tool(validate_data, "--json", "x.json")
    assert code == 2 and "no script among the arguments" in err
