"""Images from files and URLs."""

from __future__ import annotations

import os
import re
import time
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
        OSError, ValueError: the server refuses, does not answer within 20 s, takes more than 120 s or sends less than a
            kB per second, or the file is truncated or larger than 100 MB.
    """
    import asyncio

    import aiohttp

    try:
        return asyncio.run(_fetch(url))
    except TimeoutError:
        raise ValueError("timed out") from None
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


async def _fetch(url: str) -> bytes:
    import asyncio
    import urllib.parse

    import aiohttp
    import yarl

    # Lists of URLs may contain spaces and non-ASCII letters.
    address = yarl.URL(urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]|"), encoded=True)
    headers = {"User-Agent": "accelerando", "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
    limits = aiohttp.ClientTimeout(total=LONGEST_FETCH, sock_read=PATIENCE)
    started = time.monotonic()
    async with aiohttp.ClientSession(timeout=limits, trust_env=True, headers=headers) as session:
        async with asyncio.timeout(PATIENCE):  # for the answer to begin, after all redirects
            answer = await session.get(address)
        async with answer:
            if answer.status >= 400:
                raise ValueError(f"HTTP error {answer.status}: {answer.reason}")
            parts, size = [], answer.content_length or 0
            if size <= MOST_BYTES:
                size = 0
                async for part in answer.content.iter_any():
                    parts.append(part)
                    size += len(part)
                    seconds = time.monotonic() - started
                    if seconds > PATIENCE and size < SLOWEST * seconds:
                        raise ValueError(f"less than {SLOWEST // 1000} kB per second")
                    if size > MOST_BYTES:
                        break
            if size > MOST_BYTES:
                raise ValueError(f"larger than {MOST_BYTES // 10**6} MB")
    return b"".join(parts)


def fault_of(error: BaseException) -> str:
    """Why an image cannot be read, in one line."""
    return " ".join(str(getattr(error, "strerror", None) or first_line(error)).split())


def images_in(folder: Path) -> Iterator[str]:
    """The image files in a folder and its subfolders, by suffix; sorted within each folder.

    Raises:
        UserError: a folder in it cannot be listed.
    """

    return map(str, visible_files(folder, IMAGES))
