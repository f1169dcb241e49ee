"""What a run forked from the server is: a process as ``python script.py`` and torchrun make it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from harness import Finished, fork_server, kill, launch, start, wait_until

pytestmark = pytest.mark.launch


@pytest.fixture
def run(tmp_path: Path):
    """``run(code, ...)``: launches a script with that code."""

    def run(code: str, *args: str, **options) -> Finished:
        script = tmp_path / "script.py"
        script.write_text(code)
        return launch(script, *args, cwd=tmp_path, check=False, timeout=60, **options)

    return run


LOOK = """
import json, os, signal, sys
from pathlib import Path
class Here: pass
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__, "cwd": os.getcwd(),
    "descriptors": sorted(map(int, os.listdir("/proc/self/fd")))[:3], "open": len(os.listdir("/proc/self/fd")),
    "session": os.getsid(0) == os.getpid(), "stdin": os.readlink("/proc/self/fd/0"), "umask": os.umask(0),
    "handlers": [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGUSR1)],
    "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, ())), "main": sys.modules["__main__"].Here is Here,
    "environment": sorted(name for name in os.environ if name != "LC_CTYPE"), "parent": os.getppid() > 1,
    "command": Path("/proc/self/cmdline").read_text().rstrip("\\0").split("\\0"),
}))
"""


def test_a_fork_looks_like_a_fresh_interpreter(run) -> None:
    forked, real = (json.loads(run(LOOK, "a", "b c", real=real).out) for real in (False, True))
    assert forked == real


@pytest.mark.parametrize(
    ("code", "exit_code", "words"),
    [
        ("print('fine')", 0, ""), ("import sys; sys.exit(3)", 3, ""), ("import sys; sys.exit('gone')", 1, "gone"),
        ("import os; os._exit(7)", 7, ""), ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("raise KeyboardInterrupt", -2, "KeyboardInterrupt"), ("def f():\n  1 / 0\nf()", 1, "ZeroDivisionError"),
        ("import threading; threading.Thread(target=print, args=['late']).start()", 0, ""),
        ("import atexit; atexit.register(print, 'at exit')", 0, ""), ("x = (", 1, "SyntaxError"),
    ],
)  # fmt: skip
def test_exit_codes_and_outputs_are_pythons(code: str, exit_code: int, words: str, run) -> None:
    forked = run(code)
    assert forked.code == exit_code
    assert words in forked.err
    if words != "SyntaxError":  # whose frames name no line of the script
        assert forked == run(code, real=True)


RANKS = """
import os, sys, time
from accelerando.base.processes import launcher_command
import torch, torch.distributed as dist
assert launcher_command()[0] == "torch.distributed.run"
dist.init_process_group("gloo")
total = torch.tensor([float(os.environ["RANK"]) + 1])
dist.all_reduce(total)
os.write(1, f"{os.environ['LOCAL_RANK']} of {os.environ['LOCAL_WORLD_SIZE']}: {total.item()}\\n".encode())
dist.destroy_process_group()
"""


@pytest.mark.parametrize("real", [False, True])
def test_ranks_find_each_other(real: bool, run) -> None:
    done = run(RANKS, processes=3 - real, real=real)
    assert done.code == 0, done.err
    count, total = (2, 3.0) if real else (3, 6.0)
    assert sorted(done.out.splitlines()) == [f"{rank} of {count}: {total}" for rank in range(count)]


def test_a_rank_that_fails_ends_the_others(run) -> None:
    started = time.monotonic()
    done = run("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(2)\ntime.sleep(60)", processes=2)
    assert done.code == 1
    assert "exitcode: 2" in done.err
    assert time.monotonic() - started < 20


WAIT = """
import os, signal, sys, time
from pathlib import Path
def note(number, _):
    Path(f"rank{os.environ['RANK']}").write_text(str(number))
    sys.exit(0)
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGINT, note)
Path(f"ready{os.environ['RANK']}").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_agent_reaches_every_rank(number: int, tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text(WAIT)
    process = start(tmp_path / "wait.py", cwd=tmp_path, processes=2)
    assert wait_until(lambda: len(list(tmp_path.glob("ready*"))) == 2, process)
    process.send_signal(number)
    assert process.wait(timeout=30) == 1
    assert {path.read_text() for path in tmp_path.glob("rank*")} == {str(int(number))}


def test_kill_reaches_every_rank(tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text(WAIT)
    process = start(tmp_path / "wait.py", cwd=tmp_path, processes=2)
    assert wait_until(lambda: len(list(tmp_path.glob("ready*"))) == 2, process)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    kill(process)
    assert process.returncode == -9
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]


def test_the_server_keeps_nothing_of_its_runs(run) -> None:
    server = psutil.Process(fork_server().process.pid)
    run("pass")
    time.sleep(0.1)  # the answer comes before what is closed after it
    descriptors, memory = server.num_fds(), server.memory_info().rss
    ours = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        run("import os; os._exit(0)")
    run("import os; os._exit(0)", processes=2)
    time.sleep(0.1)
    assert server.num_fds() == descriptors
    assert server.memory_info().rss - memory < 2**21
    assert len(os.listdir("/proc/self/fd")) == ours
    assert server.num_threads() == 1
    assert not server.children()


def test_what_is_read_at_import_is_launched_for_real() -> None:
    server = fork_server()
    ours = os.environ["PYTHONPATH"]
    assert server.takes({**server.environment, "PYTHONPATH": f"{ours}:x", "ACCELERATE_USE_CPU": "true"})
    assert not server.takes({**server.environment, "PYTHONPATH": "x"})  # another package than the imported one
    assert not server.takes({**server.environment, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert not server.takes({**server.environment, "PYTHONHASHSEED": "0"})


@pytest.mark.exhaustive
def test_a_server_that_has_ended_is_replaced(run) -> None:
    before = fork_server()
    before.process.kill()
    before.process.wait()
    assert run("print(1)").out == "1\n"
    assert fork_server() is not before


WORKERS = """
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
@dataclass
class Square:
    value: int
def square(value):
    return Square(value**2)
if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        print(pool.submit(square, 3).result())
"""


@pytest.mark.parametrize("real", [False, True])
def test_workers_return_classes_of_the_script(real: bool, run) -> None:
    assert run(WORKERS, real=real).out == "Square(value=9)\n"
