"""accelerando.launch: exit codes, signals passed on, output kept, leftovers ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from harness import ENVIRONMENT, TEXT, command

from accelerando import launch
from accelerando.base.errors import UserError
from accelerando.launch import Signals, accelerate_command, run_script

CPU_CONFIG = "accelerate_configs/cpu.yaml"


def plain_command(script: Path, flags: list[str]) -> list[str]:
    return [sys.executable, str(script), *flags]


# Says that it began, and leaves with 3 at SIGTERM and with 4 at SIGINT after it.
STOPPABLE = """
import signal, sys, time
from pathlib import Path
received = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: received.append(number))
Path(sys.argv[1]).touch()
while not received:
    time.sleep(0.02)
while sys.argv[2:] and len(received) < 2:
    time.sleep(0.02)
sys.exit(received != [signal.SIGTERM, signal.SIGINT][: len(received)] or 2 + len(received))
"""


def script(folder: Path, code: str) -> Path:
    path = folder / "script.py"
    path.write_text(code)
    return path


def once(condition, action) -> threading.Thread:
    """A thread that does ``action`` when ``condition`` holds."""

    def wait() -> None:
        while not condition():
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_output_is_kept_and_the_exit_code_returned(tmp_path: Path) -> None:
    code = "import os, sys\nprint('first', os.environ['WHICH'], flush=True)\nsys.exit(f'error: {sys.argv[1]}')\n"
    path, output = script(tmp_path, code), tmp_path / "output.txt"
    with Signals() as signals:
        assert run_script(plain_command(path, ["x y"]), signals, output, {"WHICH": "one"}) == 1
        assert run_script(plain_command(path, ["z"]), signals, output, {"WHICH": "two"}) == 1
    assert output.read_text().splitlines() == ["first one", "error: x y", "first two", "error: z"]
    assert launch.last_line(output) == "error: z"
    assert not launch.was_stopped(1) and launch.how_it_ended(1) == "ended with the error above"
    assert launch.was_stopped(143) and launch.how_it_ended(137) == "was killed by signal 9"


@pytest.mark.parametrize("count", [1, 2])
def test_the_first_signal_asks_to_save_and_the_second_to_leave(count: int, tmp_path: Path) -> None:
    path, begun = script(tmp_path, STOPPABLE), tmp_path / "begun"
    handlers = [signal.getsignal(number) for number in (*launch.STOPPING, signal.SIGTSTP)]
    with Signals() as signals:

        def interrupt() -> None:
            for _ in range(count):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)

        thread = once(begun.exists, interrupt)
        assert run_script(plain_command(path, [str(begun), *["again"] * (count - 1)]), signals) == 2 + count
        thread.join()
    assert signals.received == [signal.SIGINT] * count
    assert handlers == [signal.getsignal(number) for number in (*launch.STOPPING, signal.SIGTSTP)]


def test_scripts_beside_each_other_are_all_told(tmp_path: Path) -> None:
    path, begun = script(tmp_path, STOPPABLE), [tmp_path / f"begun{number}" for number in range(2)]
    with Signals() as signals, ThreadPoolExecutor() as pool:
        found = [pool.submit(run_script, plain_command(path, [str(file)]), signals) for file in begun]
        once(lambda: all(file.exists() for file in begun), lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert [future.result() for future in found] == [3, 3]


def test_what_is_left_running_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what left the script's session, and what does not care for SIGTERM."""
    monkeypatch.setattr(launch, "GRACE", 0.5)
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    sleeper = (
        "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print(1, end='', flush=True); time.sleep(600)"
    )
    code = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {sleeper!r}], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.read(1)
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    output = tmp_path / "output.txt"
    with Signals() as signals:
        assert run_script(plain_command(script(tmp_path, code), []), signals, output) == 137
    pid = int(output.read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.launch
def test_the_launcher_of_several_ends_with_the_scripts_code_and_without_a_traceback(tmp_path: Path) -> None:
    said = "os.write(1, os.environ['WORLD_SIZE'].encode() + b'\\n')"  # in one piece: there are two
    path = script(tmp_path, f"import os, sys\n{said}\nsys.exit(int(sys.argv[1]))\n")
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    done = subprocess.run(
        accelerate_command(path, ["7"], flags), cwd=tmp_path, env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert done.stdout.split() == ["2", "2"]
    assert "Traceback" not in done.stderr


@pytest.mark.launch
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_launch_for_gpus_without_one_says_so_first_and_in_the_launchers_report(tmp_path: Path) -> None:
    """The true launcher, whose traceback stands between the two."""
    variables = {name: value for name, value in ENVIRONMENT.items() if name != "ACCELERATE_USE_CPU"}
    words = command(TEXT, "--train_file", "x.json", config="multi_gpu")
    words[words.index(str(TEXT)) : words.index(str(TEXT))] = ["--num_processes", "2"]
    done = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=200)
    lines = done.stderr.splitlines()
    own = (
        f"2 processes were launched for GPUs, but this machine has none: accelerate launch --config_file {CPU_CONFIG} "
    )
    assert lines[0].startswith(f"error: {own}"), done.stderr
    assert sum(own in line for line in lines) == 2
    assert any(line.startswith(f"  traceback : error: {own}") for line in lines[-3:]), done.stderr
    assert done.returncode != 0 and list(tmp_path.iterdir()) == []


@pytest.mark.launch
def test_the_line_of_any_process_is_in_the_launchers_report(tmp_path: Path) -> None:
    """Rank 1 prints nothing, so that errors of all ranks are said once; an error that it alone has is reported."""
    code = (
        "import os, sys\nfrom accelerando.base.errors import UserError, errors_in_one_line\n"
        "with errors_in_one_line():\n    if os.environ['RANK'] == '1':\n        raise UserError('x.tar: rank 1 only')\n"
        "    import time; time.sleep(60)\n"
    )
    path = script(tmp_path, code)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", str(path)]
    done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert "traceback : error: x.tar: rank 1 only" in done.stderr, done.stderr


def test_a_wrong_flag_of_the_launcher_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "signal_when_parent_dies", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(UserError, match=r"^accelerate launch: unrecognized arguments: --num_proceses$"):
        launch.launch(["--num_proceses", "2", sys.argv[0]])
