"""Runs scripts in their own processes for tools that start several: passes signals on, returns exit codes, cleans up.

A script runs under `accelerate launch` or as plain Python::

    with Signals() as signals:
        for script, flags in jobs:
            code = run_script(accelerate_command(script, flags, default_launcher(configs)), signals)
            if signals.received or was_stopped(code):
                ...

Threads may call :func:`run_script` at the same time with the same :class:`Signals`, which the main thread makes.

``python -m accelerando.launch accelerate launch ...`` is `accelerate launch ...` with the script's own exit code.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from accelerando.base.errors import Stopped, UserError, errors_in_one_line, first_line
from accelerando.base.processes import heeded, signal_when_parent_dies

if TYPE_CHECKING:
    from types import FrameType

    import psutil

# A script saves and exits when it receives one of these.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# -P: a file in the current folder with the name of a package does not shadow it.
LAUNCHER = [sys.executable, "-P", "-m", "accelerando.launch"]
POLL = 0.2  # seconds between looks at a running process
GRACE = 2.0  # seconds for helpers of a script to end after it
PATIENCE = 60.0  # further seconds for processes it left running to save and exit


# --------------------------------------------------------------------------------------------------------- commands


def accelerate_command(script: Path, flags: Sequence[str], launcher: Sequence[str]) -> list[str]:
    """The command that runs ``script`` under `accelerate launch`; ``launcher``: flags of the launcher's own."""
    return [*LAUNCHER, "accelerate", "launch", *launcher, str(script), *flags]


def default_launcher(configs: Path) -> list[str]:
    """Flags for `accelerate launch` where none are given: ``configs``/cpu.yaml if there is neither a GPU nor a config
    of the user's own (`accelerate config`), otherwise none."""
    # In another process, because torch would otherwise stay in memory for as long as the scripts run.
    code = (
        "import os, torch; from accelerate.commands.config import default_config_file as file; "
        "print(os.path.isfile(file) or torch.accelerator.is_available())"
    )
    found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    if found.strip() == "True":
        return []
    config, here = configs / "cpu.yaml", Path.cwd()
    return ["--config_file", str(config.relative_to(here) if config.is_relative_to(here) else config)]


def mode_launcher(configs: Path, mode: str, num_processes: int | None = None) -> list[str]:
    """Flags for `accelerate launch` with the config of a mode in ``configs``: none (one process), ddp, fsdp; as many
    processes as there are GPUs, unless ``num_processes`` says otherwise.

    Raises:
        UserError: several processes where there is no GPU.
    """
    gpus = count_gpus()
    if mode == "none":
        if num_processes not in (None, 1):
            raise UserError(f"--num_processes {num_processes}: --distributed_mode none is one process")
        return ["--config_file", str(configs / ("single_gpu.yaml" if gpus else "cpu.yaml"))]
    if not gpus:
        raise UserError(
            f"--distributed_mode {mode} is one process for each GPU, and there is none here; --config_file takes any "
            "config of accelerate launch"
        )
    name = {"ddp": "multi_gpu.yaml", "fsdp": "fsdp.yaml"}[mode]
    return ["--config_file", str(configs / name), "--num_processes", str(num_processes or gpus)]


def count_gpus() -> int:
    """The GPUs of this machine, counted in another process: torch would stay in memory."""
    code = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)


def launch_facts(launcher: Sequence[str]) -> list[Any]:
    """The launcher's flags, with the content of their config: that on which a result depends."""
    import yaml

    facts: list[Any] = []
    for before, word in zip(["", *launcher], launcher, strict=False):
        facts.append(yaml.safe_load(Path(word).read_text(encoding="utf-8")) if before == "--config_file" else word)
    if not launcher:  # `accelerate config` may have written one
        home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "accelerate"
        facts += [path.read_text(encoding="utf-8") for path in sorted(home.glob("default_config.*"))]
    return facts


# ---------------------------------------------------------------------------------------------------------- running


@dataclass
class Signals:
    """A block in which SIGTERM, SIGINT, SIGUSR1 and SIGHUP do not end this process: :func:`run_script` passes them on.

    ``received``: the numbers of those that came so far. Ctrl-Z (SIGTSTP) pauses this process together with the scripts
    that it runs, until SIGCONT. For the main thread.
    """

    received: list[int] = field(default_factory=list)
    running: set[int] = field(default_factory=set)  # process ids that run_script waits for
    _before: dict[int, object] = field(default_factory=dict)

    def __enter__(self) -> Signals:
        for number in heeded(*STOPPING):
            self._before[number] = signal.signal(number, self._receive)
        self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._pause)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)

    def _pause(self, _number: int, _frame: FrameType | None) -> None:
        family = [member for pid in tuple(self.running) for member in family_of(pid)]
        send(family, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # goes on here after SIGCONT
        send(family, signal.SIGCONT)


def run_script(
    command: Sequence[str], signals: Signals, output: Path | None = None, environment: Mapping[str, str] | None = None
) -> int:
    """Runs ``command`` to its end and returns its exit code, 128 + n where signal n ended it.

    The first signal in ``signals.received`` is passed on as SIGTERM, upon which a script saves and leaves; a second one
    as SIGINT, upon which it leaves at once. What the command started and left running is ended too.

    ``output``: a file to which standard output and standard error are appended, instead of being shown.
    ``environment``: variables beside those of this process.
    """
    mark = f"ACCELERANDO_SCRIPT_{uuid.uuid4().hex}"  # marks all that it starts, for end_leftovers
    variables = {**os.environ, **(environment or {}), mark: "1"}
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(output, "ab")) if output is not None else None
        # A session of its own: a Ctrl-C reaches the script once, from here, and not a second time from the terminal.
        process = subprocess.Popen(
            command,
            start_new_session=True,
            stdout=file,
            stderr=subprocess.STDOUT if file else None,
            stdin=subprocess.DEVNULL if file else None,
            env=variables,
        )
        signals.running.add(process.pid)
        try:
            code = _wait(process, list(command[: len(LAUNCHER)]) == LAUNCHER, signals.received)
        finally:
            signals.running.discard(process.pid)
            end_leftovers(mark, signals.received)
    return code if code >= 0 else 128 - code


def _wait(process: subprocess.Popen[bytes], is_launcher: bool, received: list[int]) -> int:
    """Waits for the end of ``process``; signals go to it, or past a launcher, which outlives them, to its scripts."""
    import psutil

    passed_on: dict[int, int] = {}  # process id -> how many signals
    while True:
        try:
            return process.wait(POLL)
        except subprocess.TimeoutExpired:
            pass
        if not received:
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            target = psutil.Process(process.pid)
            for script in target.children() if is_launcher else [target]:
                count = passed_on.get(script.pid, 0)
                if count < min(2, len(received)):
                    script.send_signal(signal.SIGINT if count else signal.SIGTERM)
                    passed_on[script.pid] = count + 1


def was_stopped(code: int) -> bool:
    """Whether an exit code is that of a script that got a signal to stop, and did."""
    return code in (128 + number for number in STOPPING)


def how_it_ended(code: int) -> str:
    """An exit code other than 0 in words, to follow a script's name."""
    return f"was killed by signal {code - 128}" if code > 128 else "ended with the error above"


def last_line(output: Path) -> str:
    """The last line of a script's ``output`` that is not blank: its error, where it ended with one."""
    with open(output, "rb") as file:
        file.seek(max(0, output.stat().st_size - 2**16))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


# -------------------------------------------------------------------------------------------------------- processes


def family_of(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it; empty where it has ended."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def send(family: Sequence[psutil.Process], number: int) -> None:
    """Sends a signal to each process that is still there."""
    import psutil

    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)


def end_leftovers(mark: str, received: Sequence[int] = ()) -> None:
    """Ends the processes that have ``mark`` in their environment: SIGTERM after ``GRACE`` seconds, and SIGKILL
    ``PATIENCE`` seconds later, or at once where a second signal was ``received``."""
    import psutil

    def marked() -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):  # ended meanwhile, or another user's
                if mark in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    started, asked = time.monotonic(), set()
    while leftovers := list(marked()):
        waited = time.monotonic() - started
        if waited > GRACE + PATIENCE or len(received) > 1:
            send(leftovers, signal.SIGKILL)
        elif waited > GRACE:
            send([process for process in leftovers if process.pid not in asked], signal.SIGTERM)
            asked |= {process.pid for process in leftovers}
        psutil.wait_procs(leftovers, timeout=POLL)


# --------------------------------------------------------------------------------------------------------- launcher


def launch(words: Sequence[str]) -> int:
    """`accelerate launch` with ``words``; returns the exit code of the script, which the launcher itself would not.

    Where the script ends with an error, its own line is the last one: the launcher's traceback says nothing more.

    Raises:
        UserError: the launcher does not take these flags.
    """
    import logging

    from accelerate.commands import launch as launcher
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The script saves and leaves at these signals: the launcher must outlive it. A handler, unlike SIG_IGN, is
    # not inherited by the script. Should our parent be killed, this process ends at once and Linux tells the script.
    for number in heeded(*STOPPING):
        signal.signal(number, lambda *_: None)
    signal_when_parent_dies(signal.SIGKILL)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

    def refuse(message: str) -> NoReturn:
        raise UserError(f"accelerate launch: {message}")

    parser = launcher.launch_command_parser()
    parser.error = refuse
    args = parser.parse_args([word for word in words if word not in ("--quiet", "-q")])  # which would hide the code
    code = 0
    try:
        launcher.launch_command(args)
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except (ValueError, OSError) as error:
        refuse(first_line(error))
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    with errors_in_one_line():
        raise Stopped("", launch(sys.argv[3:]))
