"""A closed terminal: the run saves as at SIGTERM, although nothing can be written to the terminal any more."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from harness import SIGN, environment, last_step, wait_until

from accelerando.base.processes import heeded
from accelerando.train import stop


def take_terminal() -> None:
    """Makes standard input the terminal of this session, whose end is not ignored, as it would be under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.launch
def test_a_closed_terminal_lets_the_run_save(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    os.set_blocking(terminal, False)
    flags = ("--smoke-test", "--num-gloss", "6", "--num-cat", "2", "--hidden_size", "32", "--epochs", "900")
    command = [sys.executable, str(SIGN), *flags, "--log_every", "1", "--report_to", "none", "--run_name", "run"]
    variables = {name: value for name, value in environment().items() if name != "NO_COLOR"}  # with a progress bar
    process = subprocess.Popen(
        command, cwd=tmp_path, env=variables, stdin=end, stdout=end, stderr=end, start_new_session=True,
        preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(end)
    run = tmp_path / "runs" / "run"

    def has_trained() -> bool:
        with contextlib.suppress(BlockingIOError):  # the terminal shows nothing new
            os.read(terminal, 2**16)
        return (run / "metrics.jsonl").is_file() and last_step(run) > 8

    assert wait_until(has_trained, process, every=0.02)
    os.close(terminal)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    newest = max((run / "checkpoints").glob("step_*"))
    assert int(newest.name[5:]) == last_step(run)
    assert "is complete; the same command with --resume continues" in (run / "logs" / "train.log").read_text()


def test_nohup_is_respected() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop.listen_for_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert heeded(signal.SIGTERM, signal.SIGHUP) == (signal.SIGTERM,)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop.listen_for_signals()
        assert signal.getsignal(signal.SIGHUP) == stop._note
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop._received = None
