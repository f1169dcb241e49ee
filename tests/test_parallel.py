"""Several processes: how a rank ends, what FSDP2 refuses, torch.compile around it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ENVIRONMENT, TEXT, launch, weights
from safetensors.torch import load_file


def test_one_of_several_processes_ends_without_tearing_the_interpreter_down() -> None:
    """A thread of gloo that wants the interpreter while it is torn down would abort a run that went well."""
    code = """
import atexit
from accelerando.base.errors import UserError, errors_in_one_line
class Late:
    def __del__(self): print("torn down")
late = Late()
atexit.register(print, "exit handler")
with errors_in_one_line():
    print("work")
    if {fails}: raise UserError("a reason")
"""
    for world, fails, exit_code in (("1", False, 0), ("2", False, 0), ("1", True, 2), ("2", True, 2)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(fails=fails)],
            env={**os.environ, "WORLD_SIZE": world, "RANK": "0"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == exit_code, done.stderr
        assert done.stdout.split("\n")[:2] == ["work", "exit handler"]
        assert ("torn down" in done.stdout) is (world == "1")
        assert ("error: a reason" in done.stderr) is fails


@pytest.mark.launch
def test_eight_bit_optimizers_are_refused_under_fsdp(text_args, tmp_path: Path) -> None:
    done = launch(TEXT, *text_args, "--optimizer", "adamw8bit", cwd=tmp_path, processes=2, fsdp=True, check=False)
    assert "error: --optimizer adamw8bit does not support sharded parameters (FSDP)" in done.err
    assert done.code != 0


@pytest.mark.launch
@pytest.mark.exhaustive
def test_compiled_and_sharded(text_args, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile wraps the sharded root: saving, evaluating and resuming still find the plain model."""
    monkeypatch.setitem(ENVIRONMENT, "TEST_COMPILE_BACKEND", "eager")
    flags = [*text_args, "--compile_model", "--batch_size", "12", "--max_steps", "4", "--eval_every", "2"]
    launch(TEXT, *flags, "--run_name", "run", "--save_every", "2", cwd=tmp_path, processes=2, fsdp=True)
    run = tmp_path / "runs" / "run"
    assert not [key for key in load_file(run / "last" / "model.safetensors") if "_orig_mod" in key]
    rest = ("--resume", str(run / "checkpoints" / "step_000002"))
    kept = weights(run / "last")
    launch(TEXT, *flags, *rest, cwd=tmp_path, processes=2, fsdp=True)
    assert weights(run / "last") == kept
