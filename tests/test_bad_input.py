"""Invariant 10: what a user gets wrong is one line with exit code 2, and leaves no half-made run behind."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from harness import TEXT, launch, weights
from made_data import make_rows, write_json

from accelerando.base.errors import UserError
from accelerando.train.checkpoint_folders import find_damage, write_manifest


@pytest.fixture
def rows_of(tmp_path: Path):
    """``rows_of(content) -> path``: a training file with that content."""

    def write(content: str | list, name: str = "bad.json") -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


GOOD = make_rows(30, 1)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["bad.json", "empty"]),
        ("[]", ["bad.json"]),
        ('[{"text": "a", "label": 0},\n{"text": "b" "label": 1}]', ["bad.json", "line 2"]),
        ([*GOOD[:3], {"label": "sport"}], ["bad.json", "row 4", "text"]),
        ([*GOOD[:5], {"text": "no label"}], ["bad.json", "row 6", "label"]),
        ([*GOOD[:2], {"text": "  ", "label": "sport"}], ["bad.json", "row 3"]),
        ([{"text": "a b", "label": "x"}, {"text": "b", "label": "x"}], ["bad.json", "'x'", "two"]),
        ('{"text": 3}', ["bad.json"]),
    ],
)
def test_bad_training_files(content, parts, train_here, rows_of, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train_here("--train_file", rows_of(content))
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert not (tmp_path / "runs").exists()


def test_a_label_that_training_never_saw(train_here, rows_of, tmp_path: Path) -> None:
    path = rows_of([*GOOD[:4], {"text": "storm ahead", "label": "weather"}], "val.json")
    with pytest.raises(UserError) as caught:
        train_here("--validation_file", path)
    assert all(part in str(caught.value) for part in ("val.json", "row 5", "weather", "sport")), str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--train_file", "nowhere.json"], ["nowhere.json"]),
        (["--model_name", "./nowhere"], ["nowhere"]),
        (["--num_labels", "7"], ["7", "3 labels"]),
        (["--hidden_size", "64"], ["64", "32", "--from_scratch"]),
        (["--max_length", "65"], ["65", "64"]),
        (["--validation_fraction", "1.5", "--validation_file", "None"], ["1.5"]),
        (["--strategy", "lora", "--lora_targets", "nothing"], ["nothing"]),
        (["--architecture", "cnn", "--strategy", "lora"], ["cnn"]),
        (["--amp", "fp16"], ["fp16", "bf16"]),
        (["--report_to", "comet"], ["comet", "tensorboard"]),
        (["--batch_size", "0"], ["--batch_size 0"]),
        (["--adam_beta1", "1.7"], ["--adam_beta1 1.7"]),
        (["--max_length", "-3"], ["--max_length -3"]),
        (["--max_steps", "0"], ["--max_steps 0"]),
        (["--cache_dir", "/dev/null/x"], ["--cache_dir", "/dev/null/x"]),
        (["--grad_clip", "-1"], ["--grad_clip"]),
        (["--push_to_hub"], ["--hub_repo_id"]),
        (["--resume", "nowhere"], ["nowhere", "not a run"]),
        (["--text_column", "body"], ["body", "text"]),
    ],
)
def test_bad_settings(flags, parts, train_here, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train_here(*flags)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert not (tmp_path / "runs").exists()


def test_resume_of_a_run_without_any_sound_checkpoint(train_here, tmp_path: Path) -> None:
    run = train_here("--max_steps", "2", name="run")
    (run / "checkpoints" / "step_000002" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="no complete checkpoint"):
        train_here("--resume", name="run")


def test_a_checkpoint_of_another_version_and_an_incomplete_manifest(train_here, tmp_path: Path) -> None:
    """Neither is passed over in silence for an older one, nor taken for complete."""
    run = train_here("--max_steps", "2", name="run")
    folder = run / "checkpoints" / "step_000002"
    content, manifest = (folder / "state.json").read_text(), (folder / "manifest.json").read_text()
    (folder / "state.json").write_text(json.dumps({**json.loads(content), "format": 7}))
    write_manifest(folder)
    with pytest.raises(
        UserError, match=r"step_000002 was saved by another version of accelerando \(format 7, this vers"
    ):
        train_here("--resume", name="run")
    (folder / "state.json").write_text(content)
    for listed, missing in ((), "model.safetensors, optimizer.safetensors, state.json"), (("rng.json",), "rng.json"):
        files = {name: facts for name, facts in json.loads(manifest).items() if listed and name not in listed}
        (folder / "manifest.json").write_text(json.dumps(files))
        with pytest.raises(UserError, match=f"no complete checkpoint .*manifest.json does not list {missing}"):
            train_here("--resume", name="run")
    (folder / "manifest.json").write_text(manifest)
    assert find_damage(folder) is None


def test_resume_with_another_model_or_optimizer(train_here) -> None:
    run = train_here("--max_steps", "2", name="run")
    with pytest.raises(UserError, match="another optimizer or schedule"):
        train_here("--resume", str(run), "--optimizer", "sgd", name="run")
    with pytest.raises(UserError, match="another model"):
        train_here("--resume", str(run), "--strategy", "lora", name="run")


@pytest.mark.launch
def test_a_full_disk_stops_the_run_and_leaves_what_was_saved(text_args, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1300k", "tmpfs", str(disk)]).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        flags = [*text_args, "--output_dir", str(disk), "--run_name", "run", "--save_every", "2", "--eval_every", "7"]
        done = launch(TEXT, *flags, "--keep_checkpoints", "9", cwd=tmp_path, check=False)
        assert done.code == 2, done.err
        (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
        assert "No space left" in line
        assert "--resume" in line
        assert "Traceback" not in done.err
        kept = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
        assert kept
        assert all(name.startswith("step_") for name in kept)
        elsewhere = tmp_path / "elsewhere"
        shutil.copytree(disk, elsewhere)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    flags[flags.index("--output_dir") + 1] = str(elsewhere)
    launch(TEXT, *flags, "--resume", cwd=tmp_path)
    launch(TEXT, *flags, "--run_name", "whole", cwd=tmp_path)
    assert weights(elsewhere / "run" / "last") == weights(elsewhere / "whole" / "last")


def test_a_small_set_and_a_single_batch_work(train_here, tmp_path: Path) -> None:
    """Three rows, one of each label: nothing to hold out, so the validation file is given."""
    rows = [{"text": f"{word} now", "label": word} for word in ("a", "b", "c")]
    path = str(write_json(tmp_path / "three.json", rows))
    train_here("--train_file", path, "--validation_file", path, "--test_file", path, name="three")
