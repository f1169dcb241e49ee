"""Launches of the scripts and tools: forked from a server by default, with the true launchers where asked."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO

import psutil
import pytest
from fork_server import Forked, ForkServer

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a misspelt model is not looked for in the network

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
TEXT = SCRIPTS / "text_classify.py"
MULTITASK = SCRIPTS / "text_multitask.py"
CLIP = SCRIPTS / "clip_finetune.py"
SIGN = SCRIPTS / "sign_train.py"
IMAGE = SCRIPTS / "image_classify.py"
HAR = SCRIPTS / "clip_har.py"
FSDP_ON_CPU = ROOT / "tests" / "fsdp_cpu.py"

# ACCELERANDO_TEST_DEVICE=cuda runs what takes one process on the GPU; see tests/test_gpu.py.
ON_GPU = os.environ.get("ACCELERANDO_TEST_DEVICE") == "cuda"
# Processes of the tests import this clone's package, whatever is installed.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "lib"), *filter(None, [os.environ.get("PYTHONPATH")])])
# Many short processes: one thread each is faster than many that wait for each other, and bit-exact comparisons need
# the same number everywhere.
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))},
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "NO_COLOR": "1",
    "PYTHONUNBUFFERED": "1",
}
AS_STARTED = dict(ENVIRONMENT)
Process = subprocess.Popen | Forked
_server: list[ForkServer] = []


@dataclass
class Finished:
    """A process that ended: exit code and both outputs."""

    code: int
    out: str
    err: str


def fork_server() -> ForkServer:
    """This process's fork server, started on first use."""
    if _server and _server[0].process.poll() is not None:  # its end has failed one test, and must not fail the rest
        _server.pop().close()
    if not _server:
        _server.append(ForkServer(AS_STARTED))
    return _server[0]


def close_fork_server() -> None:
    """Ends the server, if there is one."""
    while _server:
        _server.pop().close()


def command(
    script: Path, *args: object, processes: int = 1, fsdp: bool = False, config: str | None = None
) -> list[str]:
    """The true command that runs ``script``; several processes are real gloo ranks under torchrun.

    ``config`` names a file of accelerate_configs/, with which `accelerate launch` runs it.
    """
    words = [str(word) for word in args]
    if config:
        launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file"]
        return [*launcher, str(ROOT / "accelerate_configs" / f"{config}.yaml"), str(script), *words]
    if processes == 1 and not fsdp:
        return [sys.executable, str(script), *words]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return [*launcher, *([str(FSDP_ON_CPU)] if fsdp else []), str(script), *words]


def environment(processes: int = 1) -> dict[str, str]:
    """What a launched command sees; several processes stay on the CPU, since NCCL wants a GPU for each of them."""
    if ON_GPU and processes == 1:
        return dict(ENVIRONMENT)
    return {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true", **({"CUDA_VISIBLE_DEVICES": ""} if processes > 1 else {})}


def begin(
    script: Path,
    args: tuple[object, ...],
    cwd: Path,
    processes: int,
    fsdp: bool,
    real: bool,
    config: str | None,
    stdout: IO[bytes],
    stderr: IO[bytes],
) -> Process:
    """Starts ``script`` in a session of its own: forked, or with the true command."""
    processes = max(processes, 2) if fsdp else processes
    variables = environment(processes)
    if real or config or ON_GPU or not fork_server().takes(variables):
        words = command(script, *args, processes=processes, fsdp=fsdp, config=config)
        return subprocess.Popen(
            words, cwd=cwd, env=variables, start_new_session=True, stdin=subprocess.DEVNULL, stdout=stdout,
            stderr=stderr,
        )  # fmt: skip
    argv = [str(word) for word in (*([FSDP_ON_CPU] if fsdp else []), script, *args)]
    try:
        return fork_server().start(argv, cwd, variables, stdout.fileno(), stderr.fileno(), processes)
    except (OSError, RuntimeError) as error:  # the server has ended, before it ran anything of this request
        warnings.warn(f"a fork server was replaced: {error}", stacklevel=2)
        fork_server().process.kill()
        fork_server().process.wait()
        return fork_server().start(argv, cwd, variables, stdout.fileno(), stderr.fileno(), processes)


def launch(
    script: Path,
    *args: object,
    cwd: Path,
    processes: int = 1,
    fsdp: bool = False,
    check: bool = True,
    timeout: float = 400,
    real: bool = False,
    config: str | None = None,
) -> Finished:
    """Runs ``script`` to its end in ``cwd``; ``real`` (or a launch ``config``) takes the true command."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = begin(script, args, cwd, processes, fsdp, real, config, out, err)
        try:
            code = process.wait(timeout=timeout)
        except BaseException:
            kill(process)
            raise
        finally:
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
            if process.returncode is None or process.returncode < 0:
                print(*texts, sep="\n")
    assert not check or code == 0, f"exit code {code}\n{texts[0]}\n{texts[1]}"
    return Finished(code, *texts)


def start(
    script: Path,
    *args: object,
    cwd: Path,
    processes: int = 1,
    fsdp: bool = False,
    real: bool = False,
    config: str | None = None,
) -> Process:
    """Starts ``script`` in a session of its own, so that :func:`kill` reaches every rank."""
    with open(cwd / "stdout.txt", "ab") as out, open(cwd / "stderr.txt", "ab") as err:
        return begin(script, args, cwd, processes, fsdp, real, config, out, err)


def kill(process: Process, number: int = signal.SIGKILL) -> None:
    """Sends a signal to the launcher and every rank (which have sessions of their own) and waits for their end."""
    try:
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)
    process.wait(timeout=60)
    psutil.wait_procs(family, timeout=60)


def history(run: Path, kind: str) -> list[dict]:
    """The rows of one kind in a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def results(run: Path) -> dict:
    """A run's results.json."""
    return json.loads((run / "results.json").read_text())


def weights(folder: Path) -> bytes:
    """The bytes of the saved weights."""
    return (folder / "model.safetensors").read_bytes()


TIMING = {"seconds", "samples_per_second", "data_wait_share", "peak_memory_mb"}


def numbers(run: Path) -> list[dict]:
    """All recorded rows, less what a clock or the memory says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def wait_until(ready: Callable[[], bool], process: Process, timeout: float = 60, every: float = 0.002) -> bool:
    """Until ``ready()``, the process's end, or the timeout; True in the first case."""
    limit = time.time() + timeout
    while time.time() < limit:
        if ready():
            return True
        if process.poll() is not None:
            return False
        time.sleep(every)
    return False


def wait_for_step(run: Path, step: int, process: Process, timeout: float = 60) -> None:
    """Until the log has reached ``step``, or the process has ended."""
    path = run / "metrics.jsonl"

    def reached() -> bool:
        return path.is_file() and any(f'"step": {step},' in line for line in path.read_text().splitlines())

    wait_until(reached, process, timeout)


def run_in_this_process(
    script: Path, base_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Path]]:
    """Yields ``run(*flags, name="a") -> run folder``: the script's ``main`` in this process, on one thread.

    Imports are paid for once, so an option's effect costs a second. Kills and several ranks use :func:`launch`.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from accelerando.base.processes import command_line

    monkeypatch.chdir(tmp_path)
    if not ON_GPU:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.set_num_threads(1)
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    }
    module = script_module(script)

    def run(*flags: object, name: str = "a", base: list[str] | None = None) -> Path:
        command_line.cache_clear()
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        GradientState._reset_state()
        argv = [*(base_args if base is None else base), "--run_name", name, *map(str, flags)]
        monkeypatch.setattr(sys, "argv", [str(script), *argv])
        module.main()
        return tmp_path / "runs" / name

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def script_module(script: Path) -> ModuleType:
    """A script as a module, under its own name, or one like it where a package has that (`evaluate`)."""
    import importlib.util

    known = sys.modules.get(script.stem)
    name = script.stem if known is None or known.__file__ == str(script) else f"{script.stem}_script"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def wait_for_draft(run: Path, process: Process, timeout: float = 60) -> None:
    """Until a checkpoint or a folder of weights is being written."""

    def writing() -> bool:
        drafts = (*run.glob(".best.*.draft"), *run.glob(".last.*.draft"), *run.glob("checkpoints/.step_*"))
        return bool(drafts)

    wait_until(writing, process, timeout, every=0.001)


def last_step(run: Path) -> int:
    """The step of the newest row of training, 0 where there is none."""
    rows = history(run, "train") if (run / "metrics.jsonl").is_file() else []
    return rows[-1]["step"] if rows else 0


def kill_and_resume(
    folder: Path, script: Path, args: list[str], processes: int, kills: int, seed: int, real: bool = False
) -> Path:
    """Kills the run ``kills`` times, the second of three times while it saves, and lets it finish."""
    rng = random.Random(seed)
    run = folder / "runs" / "run"
    for number in range(kills):
        process = start(script, *args, "--resume", cwd=folder, processes=processes, real=real)
        if number % 3 == 1:
            wait_for_draft(run, process)
        else:
            wait_for_step(run, last_step(run) + rng.randint(4, 7), process)
            time.sleep(rng.random() * 0.05)
        kill(process)
    launch(script, *args, "--resume", cwd=folder, processes=processes, real=real)
    resumed = (folder / "stdout.txt").read_text().count("Resumed from")
    assert resumed >= (kills - 1) // 2, f"only {resumed} of {kills} starts found a checkpoint"
    return run
