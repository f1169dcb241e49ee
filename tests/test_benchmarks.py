"""Benchmarks that no other test runs: their smallest case, for what they show and not for how fast it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ENVIRONMENT, ROOT


def run(name: str, *flags: str, folder: Path) -> str:
    """What ``benchmarks/name.py`` prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *flags]
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT / "lib"), ENVIRONMENT.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.launch
def test_checkpoints_in_the_background_are_complete_later(tmp_path: Path) -> None:
    text = run("checkpoint", "--parameters", "12e6", "--rounds", "1", "--ways", "ours", "waiting", folder=tmp_path)
    table = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith(("ours", "waiting"))}
    still, complete = (float(table["ours"][column]) for column in (0, 2))
    assert still < complete and table["ours"][3] != "-"
    assert table["waiting"][0] == table["waiting"][2]
    assert float(table["ours"][-1]) > 0.1  # GB: 13 million parameters with two moments each


@pytest.mark.launch
@pytest.mark.exhaustive
def test_the_check_of_a_gpu_runs_without_one(tmp_path: Path) -> None:
    """Each test of the GPU is named, and the row of a model has what the table promises."""
    text = run("gpu_check", "--dry_run", "--steps", "2", "--models", "BERT-base", folder=tmp_path)
    assert "sharded training gives the same curve and goes on" in text and "TFLOP/s" in text
    found = json.loads(text.splitlines()[-1])["BERT-base"]
    assert found["samples_per_second"] > 0 and found["loop"] > 0 and 0 <= found["data_wait_share"] <= 1
    # A layer of 32 units over 128 tokens: four projections, attention, the two layers of 64, and the head's.
    layer = 2 * 128 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 128 * 128 * 32
    assert found["operations"] == pytest.approx(layer, rel=0.01)
