"""Images from files and URLs."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from accelerando.base.errors import UserError, first_line
from accelerando.data.folders import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from urllib.request import OpenerDirector

URLS = ("http://", "https://")
# Suffixes of image files, with some that Pillow may not support, so that such files are reported, not ignored.
IMAGES = (*IMAGE_SUFFIXES, ".gif")
MOST_BYTES = 100_000_000  # of a downloaded file
PATIENCE = 20.0  # seconds without an answer from the server
LONGEST_FETCH = 120.0  # seconds for a file in total


def is_url(name: str) -> bool:
    """True for an http or https URL."""
    return name.lower().startswith(URLS)


def read_image(name: str) -> bytes:
    """The file at a path or URL. ValueError or OSError: it does not exist, or access is refused."""
    if is_url(name):
        return fetch(name)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", name):
        raise ValueError("only http:// and https:// URLs can be read")
    return Path(name).read_bytes()


def fetch(url: str) -> bytes:
    """The file at an http or https URL; follows redirects.

    Raises:
        OSError, ValueError: the server refuses, does not answer for 20 s or takes more than 120 s, or the file is
            truncated or larger than 100 MB.
    """
    import urllib.parse
    import urllib.request

    # Lists of URLs may contain spaces and non-ASCII letters.
    url = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]|")
    request = urllib.request.Request(url, headers={"User-Agent": "accelerando", "Accept": "image/*,*/*;q=0.5"})
    deadline = time.monotonic() + LONGEST_FETCH
    with _opener().open(request, timeout=PATIENCE) as answer:
        stated = answer.headers.get("Content-Length") or ""
        expected = int(stated) if stated.isascii() and stated.isdigit() else None
        parts, size = [], 0
        while (expected or 0) <= MOST_BYTES and (part := answer.read1(2**16)):
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                break
            if time.monotonic() > deadline:
                raise ValueError(f"not complete after {LONGEST_FETCH:g} s")
    if max(size, expected or 0) > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES // 10**6} MB")
    if expected is not None and size < expected:
        raise ValueError(f"truncated: {size:,} of {expected:,} bytes")
    return b"".join(parts)


def _opener() -> OpenerDirector:
    """An opener for http and https only: urllib's default would follow a redirect to FTP."""
    from urllib import request

    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.UnknownHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPRedirectHandler,
        request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def fault_of(error: BaseException) -> str:
    """Why an image cannot be read, in one line."""
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):  # wrapped by urllib
        error = reason
    return " ".join(str(getattr(error, "strerror", None) or first_line(error)).split())


def images_in(folder: Path) -> Iterator[str]:
    """The image files in a folder and its subfolders, by suffix; sorted within each folder.

    Raises:
        UserError: a folder in it cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}") from None

    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(files):
            if name.lower().endswith(IMAGES) and not name.startswith("."):
                yield str(Path(place) / name)
