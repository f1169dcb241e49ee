"""The output of tools: files written atomically, and lines on the console."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from accelerando.base.errors import UserError
from accelerando.base.files import open_whole
from accelerando.base.texts import one_line, without_credentials


def printable(name: str) -> str:
    """A file name as text that can be encoded as UTF-8, even if its bytes are not UTF-8; a URL without credentials."""
    name = without_credentials(name) if "://" in name else name
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def print_first(lines: Sequence[str], what: str, count: int, total: int | None = None) -> None:
    """Prints the first ``count`` of ``lines`` on stderr, each after ``what``, and how many more there are of ``total``
    (default: the number of ``lines``)."""
    for line in lines[:count]:
        print(one_line(printable(f"{what}: {line}")), file=sys.stderr)
    total = len(lines) if total is None else total
    if total > count:
        print(f"... and {total - count:,} more", file=sys.stderr)


def aligned_rows(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table as text: the first ``left`` columns to the left, the others to the right; no column heads are drawn."""
    rows = [[one_line(printable(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{'<' if place < left else '>'}{widths[place]}}" for place, cell in enumerate(row)).rstrip()
        for row in rows
    )


@contextlib.contextmanager
def whole_file(target: Path, mode: str = "w", flag: str = "--output") -> Iterator[IO[Any]]:
    """A file open in ``mode`` (w: UTF-8 text, wb) that replaces ``target`` atomically when the block ends.

    Raises:
        UserError: it cannot be written; the message names ``flag``.
    """
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open_whole(target, mode))
        except OSError as error:
            raise UserError(f"{flag} {target}: {error.strerror}") from None
        yield file


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[IO[str]]:
    """Standard output, or a file at ``path`` that is written atomically.

    Raises:
        UserError: it cannot be written.
    """
    if path is None:
        sys.stdout.reconfigure(encoding="utf-8")
        try:
            yield sys.stdout
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return
    target = Path(path)
    if target.is_dir():
        raise UserError(f"--output {target}: is a folder; name a file")
    direct = target.exists() and not stat.S_ISREG(target.stat().st_mode)  # /dev/stderr, a named pipe
    try:
        with open(target, "w", encoding="utf-8") if direct else whole_file(target) as stream:
            yield stream
    except BrokenPipeError:
        return
    except OSError as error:
        raise UserError(f"--output {target}: {error.strerror}") from None
