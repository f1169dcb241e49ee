"""clip_finetune.py with data and checkpoints in a bucket, against a real S3 server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from harness import CLIP, kill, launch, numbers, start, wait_for_step, weights
from test_remote import KEY, SECRET, Server, s3  # noqa: F401  (a fixture)

import accelerando.data.remote

FLAGS = (
    "--epochs", "3", "--save_every", "3", "--s3_bucket", "bucket", "--run_name", "run", "--enable_s3_checkpoints",
)  # fmt: skip


@pytest.fixture
def bucket_args(s3: Server, clip_args: list[str], pair_set: Path, tmp_path: Path, monkeypatch) -> list[str]:  # noqa: F811
    """The flags of a run whose shards lie in the bucket under data/train and data/val."""
    import harness

    for split, prefix in (("train", "data/train"), ("validation", "data/val")):
        shutil.copytree(pair_set / split, s3.root / "bucket" / prefix)
    s3.settle()
    import os

    monkeypatch.setattr(harness, "ENVIRONMENT", {**harness.ENVIRONMENT, **{
        name: value for name, value in os.environ.items() if name.startswith("AWS_")
    }})  # fmt: skip
    args = [*clip_args, *FLAGS, "--cache_dir", str(tmp_path / "cache")]
    args[args.index("--data_dir") : args.index("--data_dir") + 2] = []
    return args


@pytest.mark.launch
def test_a_run_goes_on_from_the_bucket_on_another_machine(bucket_args, s3: Server, clip_args, tmp_path: Path) -> None:  # noqa: F811
    whole = tmp_path / "whole"
    whole.mkdir()
    local = [*clip_args, "--epochs", "3", "--save_every", "3", "--run_name", "run", "--test_data", "None"]
    data = Path(local[local.index("--data_dir") + 1])
    local[local.index("--data_dir") : local.index("--data_dir") + 2] = [
        *("--train_data", str(data / "train"), "--validation_data", str(data / "validation")),
    ]
    launch(CLIP, *local, cwd=whole)

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    process = start(CLIP, *bucket_args, cwd=first)
    wait_for_step(first / "runs" / "run", 8, process)
    kill(process)
    there = s3.root / "bucket" / "checkpoints" / "run"
    assert sorted(path.name for path in there.iterdir())
    # The machine is lost with its disk; the other one has nothing but the command, and keeps no shard.
    stream = ("--cache_gb", "0", "--cache_dir", str(second / "cache"))
    done = launch(CLIP, *bucket_args, *stream, "--resume_from_checkpoint", cwd=second)
    assert {path.suffix for path in (second / "cache").rglob("*") if path.is_file()} - {".lock"} == {".npy"}
    assert "Fetched step_00000" in done.out
    assert "Resumed from" in done.out
    run = second / "runs" / "run"
    assert weights(run / "last") == weights(whole / "runs" / "run" / "last")
    assert weights(run / "best") == weights(whole / "runs" / "run" / "best")
    assert numbers(run) == numbers(whole / "runs" / "run")
    s3.settle()
    assert sorted(path.name for path in there.iterdir()) == ["step_000009", "step_000012"]
    for text in (done.out, done.err, (run / "logs" / "train.log").read_text(), (run / "results.json").read_text()):
        assert SECRET not in text
        assert KEY not in text
    # A new run of this name would mix two courses.
    refused = launch(CLIP, *bucket_args, "--output_dir", "elsewhere", cwd=tmp_path, check=False)
    assert refused.code == 2
    assert "has checkpoints of a run with this name" in refused.err


@pytest.mark.launch
@pytest.mark.exhaustive
def test_an_upload_that_fails_is_named_and_training_goes_on(bucket_args, s3: Server, tmp_path: Path) -> None:  # noqa: F811
    process = start(CLIP, *bucket_args, "--epochs", "4", cwd=tmp_path)
    run = tmp_path / "runs" / "run"
    wait_for_step(run, 2, process)
    s3.kill()
    assert process.wait(timeout=240) == 0
    log = (run / "logs" / "train.log").read_text()
    assert "Not uploaded: s3://bucket/checkpoints/run" in log
    assert json.loads((run / "results.json").read_text())["samples"] == 4 * 75


@pytest.mark.launch
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("no bucket", ["s3://nowhere", "bucket"]),
        ("wrong secret", ["s3://bucket", "AWS_SECRET_ACCESS_KEY"]),
        ("no server", ["s3://bucket"]),
        ("nothing there", ["s3://bucket/data/other"]),
    ],
)
def test_what_is_wrong_with_a_bucket_is_one_line(kind, parts, bucket_args, s3: Server, tmp_path, monkeypatch) -> None:  # noqa: F811
    import harness

    monkeypatch.setattr(accelerando.data.remote, "TRIES", 2)
    flags = {
        "no bucket": ["--s3_bucket", "nowhere"],
        "nothing there": ["--s3_prefix", "data/other", "--s3_validation_prefix", "data/val"],
    }.get(kind, [])
    if kind == "wrong secret":
        environment = {**harness.ENVIRONMENT, "AWS_SECRET_ACCESS_KEY": "wrong" * 8}
        monkeypatch.setattr(harness, "ENVIRONMENT", environment)
    if kind == "no server":
        s3.kill()
    done = launch(CLIP, *bucket_args, *flags, cwd=tmp_path, check=False)
    assert done.code == 2, done.err
    (line,) = [line for line in done.err.splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line
    assert SECRET not in line
    assert "wrongwrong" not in line
    assert not (tmp_path / "runs").exists()
