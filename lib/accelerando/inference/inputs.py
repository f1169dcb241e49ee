"""Images and videos from files, folders and URLs."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from accelerando.base.errors import first_line
from accelerando.base.files import visible_files
from accelerando.data.folders import IMAGE_SUFFIXES

URLS = ("http://", "https://")
# Suffixes of image files, with some that Pillow may not support, so that such files are reported, not ignored.
IMAGES = (*IMAGE_SUFFIXES, ".gif")
MOST_BYTES = 100_000_000  # of a downloaded file
PATIENCE = 20.0  # seconds until a server answers, and between parts of its answer
SLOWEST = 1000  # bytes per second
LONGEST_FETCH = 120.0  # seconds for a file in total
MOST_TIMEOUTS = 3  # of a server in a row; after them its time is HURRIED times as long, until it answers
HURRIED = 0.1


def is_url(name: str) -> bool:
    """True for an http or https URL."""
    return name.lower().startswith(URLS)


class Servers:
    """How often each server timed out since it last answered; shared by the threads that fetch from them."""

    def __init__(self) -> None:
        self._timeouts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def share(self, server: str) -> float:
        """The share of the usual time that a request to ``server`` gets."""
        with self._lock:
            return HURRIED if self._timeouts[server] >= MOST_TIMEOUTS else 1.0

    def note(self, server: str, timed_out: bool) -> None:
        """To be called after each request that ended with an answer or a time-out."""
        with self._lock:
            self._timeouts[server] = self._timeouts[server] + 1 if timed_out else 0


def read_image(name: str, servers: Servers | None = None) -> bytes:
    """The file at a path or URL. ValueError or OSError: it does not exist, or access is refused.

    ``servers``: the same object for all images, so that URLs of a server that does not answer cost little time.
    """
    if is_url(name):
        return fetch(name, servers)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", name):
        raise ValueError("only http:// and https:// URLs can be read")
    return Path(name).read_bytes()


def fetch(url: str, servers: Servers | None = None) -> bytes:
    """The file at an http or https URL; follows redirects.

    Raises:
        OSError, ValueError: the server refuses, does not answer within 20 s, takes more than 120 s or sends less than a
            kB per second, or the file is truncated or larger than 100 MB. A server of ``servers`` that timed out three
            times in a row has a tenth of this time.
    """
    import asyncio

    import aiohttp

    servers = servers or Servers()
    server = re.match(r"(\w+://)?([^/?#]*@)?([^/?#]*)", url)[3].lower()
    share = servers.share(server)
    timed_out: bool | None = None  # neither did it answer nor time out: refused, no such host
    try:
        content = asyncio.run(_fetch(url, share))
        timed_out = False
        return content
    except TimeoutError as error:  # at the limit of one wait, or at a limit of ours
        timed_out = True
        reason = first_line(error) if isinstance(error, _TooSlowError) else "timed out"
        if share < 1:
            reason += f" in {share:g} of the usual time, which is all after {MOST_TIMEOUTS} time-outs of its server"
        raise ValueError(reason) from None
    except aiohttp.ClientConnectorError as error:
        raise ValueError(os.strerror(error.errno) if error.errno else first_line(error)) from None
    except aiohttp.ClientPayloadError:
        raise ValueError("truncated: the connection was closed") from None
    except aiohttp.NonHttpUrlClientError:
        raise ValueError("redirected to something else than http:// or https://") from None
    except aiohttp.TooManyRedirects:
        raise ValueError("redirected too often") from None
    except aiohttp.ClientError as error:
        raise ValueError(first_line(error)) from None
    except _AnsweredError as error:
        timed_out = False
        raise ValueError(first_line(error)) from None
    finally:
        if timed_out is not None:
            servers.note(server, timed_out)


class _TooSlowError(TimeoutError):
    """The server sends less than it should."""


class _AnsweredError(ValueError):
    """The server answered in time, but not with the file."""


async def _fetch(url: str, share: float) -> bytes:
    import asyncio
    import urllib.parse

    import aiohttp
    import yarl

    # Lists of URLs may contain spaces and non-ASCII letters.
    address = yarl.URL(urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]|"), encoded=True)
    headers = {"User-Agent": "accelerando", "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
    patience = PATIENCE * share
    limits = aiohttp.ClientTimeout(total=LONGEST_FETCH * share, sock_read=patience)
    started = time.monotonic()
    async with aiohttp.ClientSession(timeout=limits, trust_env=True, headers=headers) as session:
        async with asyncio.timeout(patience):  # for the answer to begin, after all redirects
            answer = await session.get(address)
        async with answer:
            if answer.status >= 400:
                raise _AnsweredError(f"HTTP error {answer.status}: {answer.reason}")
            parts, size = [], answer.content_length or 0
            if size <= MOST_BYTES:
                size = 0
                async for part in answer.content.iter_any():
                    parts.append(part)
                    size += len(part)
                    seconds = time.monotonic() - started
                    if seconds > patience and size < SLOWEST * seconds:
                        raise _TooSlowError(f"less than {SLOWEST // 1000} kB per second")
                    if size > MOST_BYTES:
                        break
            if size > MOST_BYTES:
                raise _AnsweredError(f"larger than {MOST_BYTES // 10**6} MB")
    return b"".join(parts)


def fault_of(error: BaseException) -> str:
    """Why an image cannot be read, in one line."""
    return " ".join(str(getattr(error, "strerror", None) or first_line(error)).split())


def samples_in(folder: Path, suffixes: tuple[str, ...] = IMAGES) -> Iterator[str]:
    """The files with one of ``suffixes`` in a folder and its subfolders; sorted within each folder.

    Raises:
        UserError: a folder in it cannot be listed.
    """
    return map(str, visible_files(folder, suffixes))


def frame_folders_in(folder: Path) -> list[str]:
    """``folder`` and the folders below it that hold images, sorted: each is a video, its images are the frames."""
    return sorted({str(file.parent) for file in visible_files(folder, IMAGE_SUFFIXES)})
