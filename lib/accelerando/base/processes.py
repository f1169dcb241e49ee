"""Functions mapped over items by worker processes or threads, and the processes of a distributed run."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from accelerando.base.errors import UserError
from accelerando.base.texts import MARK, without_credentials

if TYPE_CHECKING:
    from concurrent.futures import Future

    from accelerate import Accelerator


T = TypeVar("T")
R = TypeVar("R")


def map_in_processes(function: Callable[[T], R], items: Sequence[T], workers: int, chunk: int = 64) -> Iterator[R]:
    """``function`` of each item, in order; each worker gets ``chunk`` items at a time. 0 workers: this process.

    Raises:
        UserError: a worker was killed.
    """
    if workers == 0 or len(items) < 2:
        yield from map(function, items)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    chunk = min(chunk, max(1, len(items) // (4 * workers)))
    chunks = [items[start : start + chunk] for start in range(0, len(items), chunk)]
    pool = ProcessPoolExecutor(
        min(workers, len(chunks)),
        multiprocessing.get_context("spawn"),  # a fork of a process with threads may hang
        signal.signal,
        (signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is handled by the main process
    )
    others = set(multiprocessing.active_children())
    pending: deque[Future[list[R]]] = deque()  # bounded, so that results do not pile up
    try:
        for part in chunks:
            # Ctrl-C is blocked while a worker starts; the worker inherits the mask.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                pending.append(pool.submit(_each, function, part))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if len(pending) > 4 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker was killed, most likely out of memory: use fewer --num_workers") from None
    except BaseException:
        # The results are no longer needed, and the exit must not wait for a worker after a second Ctrl-C.
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _each(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return list(map(function, items))


@functools.cache
def command_line() -> str:
    """The command that started this process, with ``accelerate launch`` if it was used, and the variables it needs.

    Credentials are left out.
    """
    launcher = launcher_command()
    given = _environment_of(os.getppid()) if launcher else os.environ  # a launcher adds variables for its scripts
    variables = [
        f"{name}={shlex.quote(value)}" for name, value in sorted(given.items()) if re.match(NEEDED_VARIABLES, name)
    ]
    words = [without_credentials(word, MARK) for word in launcher or ["python", *sys.argv]]
    return " ".join([*variables, shlex.join(words)])


# Variables on which a run depends: Accelerate's, and those of devices and threads.
NEEDED_VARIABLES = r"ACCELERATE_|FSDP_|PARALLELISM_CONFIG_|(CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS)$"


def _environment_of(process: int) -> dict[str, str]:
    """The variables with which a process was started; empty if they cannot be read."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(word.split("=", 1) for word in words if "=" in word)
    return {}


@functools.cache
def launcher_command() -> tuple[str, ...]:
    """The command line of the parent process if it is ``accelerate launch`` or ``torchrun``, otherwise empty."""
    with contextlib.suppress(OSError):
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_text().rstrip("\0").split("\0")
        for position, word in enumerate(parent):
            if Path(word).name in ("accelerate", "accelerate-launch", "torchrun", "torch.distributed.run"):
                return (Path(word).name, *parent[position + 1 :])
    return ()


def threads_are_chosen() -> bool:
    """Whether the user said how many CPU threads a process has; Accelerate's launcher says one if nobody did."""
    launcher = launcher_command()
    if any(word.startswith("--num_cpu_threads_per_process") for word in launcher):
        return True
    return "OMP_NUM_THREADS" in (_environment_of(os.getppid()) if launcher else os.environ)


@contextlib.contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """The main process runs the block first; the others run it after that and find the result cached."""
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
    yield
    if accelerator.is_main_process:
        accelerator.wait_for_everyone()


def gather_objects(accelerator: Accelerator, item: T) -> list[T]:
    """Every process's ``item``, in order of rank, on all processes."""
    if accelerator.num_processes == 1:
        return [item]
    from accelerate.utils import gather_object

    return gather_object([item])


def heeded(*numbers: signal.Signals) -> tuple[signal.Signals, ...]:
    """The given signals without SIGHUP where it is ignored: `nohup` asks that a closed terminal has no effect."""
    return tuple(n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)


def signal_when_parent_dies(number: int) -> None:
    """Makes Linux send this process a signal when its parent ends, for whatever reason."""
    import ctypes
    import sys

    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Iterator[tuple[T, R]]:
    """(item, ``function(item)``) in order, computed by ``threads`` threads, at most ``ahead`` items in advance. An
    exception of ``function`` is raised in place of its result.

    The threads end with the iterator; a thread that waits for a server ends with the process.
    """
    from concurrent.futures import Future
    from queue import SimpleQueue

    tasks: SimpleQueue[tuple[T, Future[R]] | None] = SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while (task := tasks.get()) is not None and not stopped.is_set():
            item, future = task
            try:
                future.set_result(function(item))
            except BaseException as error:
                future.set_exception(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    pending: deque[tuple[T, Future[R]]] = deque()
    try:
        for worker in workers:
            worker.start()
        for item in items:
            pending.append((item, Future()))
            tasks.put(pending[-1])
            if len(pending) > ahead:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        stopped.set()
        for _ in workers:
            tasks.put(None)
        # A thread that still runs torch code would disturb the exit of the process; one that waits for a server won't.
        deadline = time.monotonic() + 2
        for worker in workers:
            if worker.ident is not None:
                worker.join(max(0.0, deadline - time.monotonic()))
