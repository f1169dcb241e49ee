"""A function over many items in worker processes, in order, with a bar."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from lib.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def map_in_processes(function: Callable[[T], R], items: Sequence[T], workers: int, chunk: int = 64) -> Iterator[R]:
    """``function`` of each item, in order; workers are given ``chunk`` items at a time. 0 workers: this process.

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
        (signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is the main process's
    )
    others = set(multiprocessing.active_children())
    pending: deque = deque()  # bounded: results wait for nobody
    try:
        for part in chunks:
            # Ctrl-C comes after a worker was started, not amid it; the worker inherits that it is held back.
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
        raise UserError("a worker was killed, most likely for memory: give fewer --num_workers") from None
    except BaseException:
        # Nobody waits for what is half done, and a second Ctrl-C leaves no worker behind that the exit would wait for.
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _each(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return list(map(function, items))


def watched(items: Iterable[T], total: int, what: str, unit: str) -> Iterator[T]:
    """``items`` with a bar on a terminal; elsewhere a line at the start and every half minute."""
    from lib.run import progress_bar

    bar = progress_bar(total, 0, f" {unit}", what)
    said = -math.inf
    with bar:
        for number, item in enumerate(items):
            if bar.disable and time.monotonic() - said > 30:
                print(f"{what}: {number:,} of {total:,} {unit}", flush=True)
                said = time.monotonic()
            yield item
            bar.update()
