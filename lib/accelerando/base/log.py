"""The logger, its output in the terminal and in a file, and progress bars."""

from __future__ import annotations

import contextlib
import copy
import logging
import logging.handlers
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from accelerando.base.errors import is_main_rank
from accelerando.base.texts import one_line, without_credentials

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")


def with_progress(items: Iterable[T], total: int, what: str, unit: str) -> Iterator[T]:
    """``items`` with a progress bar on a terminal; elsewhere prints a line at the start and every half minute."""

    bar = progress_bar(total, 0, f" {unit}", what)
    last_line = -math.inf
    with bar:
        for number, item in enumerate(items):
            if bar.disable and time.monotonic() - last_line > 30:
                print(f"{what}: {number:,} of {total:,} {unit}", flush=True)
                last_line = time.monotonic()
            yield item
            bar.update()


log = logging.getLogger("accelerando")


SUCCESS = 25
logging.addLevelName(SUCCESS, "SUCCESS")


COLOURS = {"WARNING": "33", "ERROR": "31", "SUCCESS": "32"}  # ANSI codes: yellow, red, green


class _LineFormatter(logging.Formatter):
    """``2026-01-31 12:00:00 | INFO     | ...``; with colours on a terminal."""

    def __init__(self, colour: bool) -> None:
        super().__init__("%(asctime)s | %(levelname)-8s | %(message)s", "%Y-%m-%d %H:%M:%S")
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)
        lines = record.getMessage().split("\n") if "\n" in str(record.msg) else [record.getMessage()]
        record.msg, record.args = without_credentials("\n".join(map(one_line, lines))), ()
        line = super().format(record)
        if not self.colour:
            return line
        stamp, level, message = line.split(" | ", 2)
        code = COLOURS.get(record.levelname)
        message = f"\033[{code}m{message}\033[0m" if code else message
        if not code:
            message = re.sub(r"\b(epoch \S+)", "\033[33m\\1\033[0m", message, flags=re.IGNORECASE)
            message = re.sub(r"^(train)\b", "\033[34m\\1\033[0m", message)
            message = re.sub(r"^(validation|test)\b", "\033[35m\\1\033[0m", message)
            message = re.sub(r"((?:loss|accuracy) +)(\d\S*)", "\\1\033[33m\\2\033[0m", message)
        return f"\033[36m{stamp}\033[0m | {level} | {message}"


class _ConsoleHandler(logging.StreamHandler):
    """Writes above a progress bar instead of into it; skips ``only_file`` records."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "only_file", False):
            return
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            with tqdm.external_write_mode(file=sys.stderr):
                super().emit(record)
        else:
            super().emit(record)


def start_log() -> None:
    """Starts console output on the main process; keeps the lines for the file that :func:`attach_log_file` opens."""
    quiet_libraries()
    for handler in log.handlers[:]:
        log.removeHandler(handler)
    log.propagate = False
    logging.raiseExceptions = False  # a full disk is reported once, by the save that fails, not for each line
    log.setLevel(logging.INFO if is_main_rank() else logging.CRITICAL)
    if not is_main_rank():
        return
    console = _ConsoleHandler(sys.stdout)
    console.setFormatter(_LineFormatter(colour=on_terminal()))
    log.addHandler(console)
    log.addHandler(logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False))


def attach_log_file(path: Path) -> None:
    """Opens ``path`` and writes the lines logged so far into it."""
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(_LineFormatter(colour=False))
    for handler in log.handlers[:]:
        if isinstance(handler, logging.handlers.MemoryHandler):
            for record in handler.buffer:
                file.handle(record)
            log.removeHandler(handler)
    log.addHandler(file)


@contextlib.contextmanager
def only_warnings() -> Iterator[None]:
    """Within the block the log has only warnings, as plain lines on stderr: for tools that print their result."""
    before = log.handlers[:], log.level, log.propagate
    console = _ConsoleHandler(sys.stderr)
    console.setFormatter(_PlainFormatter())
    log.handlers, log.propagate = [console], False
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.handlers, log.propagate = before[0], before[2]
        log.setLevel(before[1])


class _PlainFormatter(logging.Formatter):
    """The message alone, in one line."""

    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(one_line(record.getMessage()))


def success(message: str, *values: object) -> None:
    """Logs a line at level SUCCESS."""
    log.log(SUCCESS, message, *values)


def on_terminal() -> bool:
    """True if the output goes to a terminal: colours and progress bars; otherwise plain lines."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def quiet_libraries() -> None:
    """Silences library messages that the user cannot act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    warnings.filterwarnings("ignore", message=".*implicitly creating a replicated DTensor.*")
    warnings.filterwarnings("ignore", message=".*Paged optimizers are not supported on CPU.*")
    warnings.filterwarnings("ignore", message=".*TensorFloat32 tensor cores.*")  # float32 was asked for
    warnings.filterwarnings("ignore", message=".*Full backward hook is firing.*")  # Opacus' hooks at the first layer
    for name in ("transformers", "datasets", "peft", "bitsandbytes", "torch.distributed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def progress_bar(total: int, initial: int, unit: str, description: str = "") -> tqdm:
    """A progress bar on a terminal, shown after two seconds; nothing elsewhere."""
    from tqdm import tqdm

    hidden = not (is_main_rank() and on_terminal())
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        desc=description,
        disable=hidden,
        delay=2,
        leave=False,
        ncols=80,
        file=sys.stderr,
        dynamic_ncols=True,
    )
