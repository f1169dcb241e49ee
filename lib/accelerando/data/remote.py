"""Files at s3://, https:// and other URLs, through fsspec: listed, cached, prefetched or read in parts.

Keys and endpoint of S3 come from boto's usual settings: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``, ``AWS_PROFILE``; a public bucket needs ``FSSPEC_S3_ANON=true``. Errors
that a user can fix (address, access, network) are raised as a ``UserError`` of one line, without keys, passwords or
signatures.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from accelerando.base.errors import UserError, first_line
from accelerando.base.files import expand_braces, locked, open_whole, remove_drafts
from accelerando.base.texts import without_credentials

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

TRIES = 4
FIRST_DELAY = 0.2  # seconds before the second try; doubled before each further one
PATIENCE = 60.0  # seconds for a request without a large answer, and between parts of any answer
LISTING = 600.0  # seconds for the list of a folder
SLOWEST = 10_000  # bytes per second
RANGE_BLOCK = 4 * 2**20  # bytes per request when a file is read sequentially
POLL = 0.2  # seconds between checks of what other processes have requested
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}

SIGNATURE = (
    r"(?i)(x-amz-|x-goog-|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id|token|s[a-z]{1,2}=)"
)


@dataclass(frozen=True)
class RemoteFile:
    """A remote file: ``size`` in bytes; ``version`` (etag or time) changes with the content."""

    url: str  # without credentials: it may be shown
    size: int
    version: str
    signed: str = field(default="", repr=False, compare=False)  # the URL as given, if it contains credentials


def is_remote(path: str) -> bool:
    """True for a URL such as s3://, https://, gs:// or memory://; false for a path in the file system."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", str(path))
    return bool(match) and match.group(1).lower() not in ("file", "local")


# -------------------------------------------------------------------------------------------------- list and fetch


def list_remote(url: str, suffix: str = ".tar") -> list[RemoteFile]:
    """The files that ``url`` names, sorted by URL: a folder (its files ending in ``suffix``), one file, or a pattern.

    A pattern has braces (``s3://b/p/{000..012}.tar``) or ``*`` (``s3://b/p/*.tar``); over https a ``?`` begins the
    query, elsewhere it matches one character.

    Raises:
        UserError: no such bucket, nothing found, access refused, or the server cannot be reached.
    """
    patterns = expand_braces(url)
    found: dict[str, RemoteFile] = {}
    folders: dict[str, list[dict[str, Any]]] = {}  # one listing per folder, also for a thousand names in braces
    for pattern in patterns:
        fs = filesystem(pattern)
        http = _is_http(pattern)
        parent, _, name = path_on(fs, pattern).rpartition("/")
        if any(sign in pattern for sign in ("*[" if http else "*?[")):
            entries = list(_ask(fs, "glob", pattern, pattern).values())
            if http:  # a page of links has no sizes
                entries = [_ask(fs, "info", entry["name"], pattern) for entry in entries]
        elif len(patterns) > 1 and not http:
            if parent not in folders:
                folders[parent] = _ask(fs, "ls", parent, pattern)
            entries = [entry for entry in folders[parent] if entry["name"].rpartition("/")[2] == name]
        else:
            info = _ask(fs, "info", pattern, pattern)
            entries = [info]
            if info["type"] == "directory":
                inside = _ask(fs, "ls", pattern, pattern)
                entries = [entry for entry in inside if fnmatchcase(entry["name"], f"*{suffix}")]
        files = [_remote_file(fs, entry) for entry in entries if entry["type"] == "file"]
        if not files:
            bucket = path_on(fs, pattern).split("/")[0]
            if not http:  # the answer is also empty if the bucket does not exist
                _ask(fs, "ls", bucket, pattern)
            raise UserError(f"{without_credentials(pattern)}: nothing found (a folder is searched for *{suffix})")
        found.update({file.signed or file.url: file for file in files})
    return [found[key] for key in sorted(found)]


def fetch_file(url: str, target: Path, size: int | None = None, version: str = "") -> None:
    """Downloads ``url`` to ``target`` atomically, with retries after errors of the network or the server.

    Verified against the server: the size in bytes (or ``size``), the MD5 sum if the S3 etag is one, and ``version`` if
    given.

    Raises:
        UserError: not found, refused, changed since ``version``, or failed on every try.
    """
    fs = filesystem(url)

    def attempt() -> None:
        fs.get_file(path_on(fs, url), file.name, **_limit_for(fs, size))
        facts = facts_of(fs, url)  # after the download, to notice a file that was replaced meanwhile
        if version and facts["version"] and facts["version"] != version:
            raise UserError(f"{without_credentials(url)}: the file changed after it was listed: start again")
        compare(Path(file.name), size if size is not None else facts["size"], facts["md5"])

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be created ({error.strerror}): choose another folder") from None
    with open_whole(target, "wb") as file:
        retried(url, attempt)


def compare(path: Path, size: int | None, md5: str | None) -> None:
    """Raises ConnectionError, after which the transfer is retried, if size or checksum differ from the server's."""
    here = path.stat().st_size
    if size is not None and here != size:
        raise ConnectionError(f"received {here:,} bytes instead of {size:,}")
    if md5:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() != md5:
                raise ConnectionError("the checksum differs from the server's")


def facts_of(fs: AbstractFileSystem, url: str) -> dict[str, Any]:
    """``size``, ``version`` and ``md5`` of a file as the server reports them now; None: not reported."""
    path = path_on(fs, url)
    if protocol_of(url) not in ("s3", "s3a"):
        info = fs.info(path, **_limit(fs, PATIENCE))
        return {"size": info["size"], "version": _version(info), "md5": None}
    bucket, key, _ = fs.split_path(path)
    head = fs.call_s3("head_object", Bucket=bucket, Key=key)
    # The etag of a multipart upload, or of a file encrypted with its own keys, is not the MD5 of the content.
    plain = head.get("ServerSideEncryption") in (None, "AES256") and not head.get("SSECustomerAlgorithm")
    md5 = _version(head) if plain and re.fullmatch(r"[0-9a-f]{32}", _version(head)) else None
    return {"size": head["ContentLength"], "version": _version(head), "md5": md5}


def _ask(fs: AbstractFileSystem, question: str, path: str, shown: str) -> Any:
    """The answer of a server to ``info``, ``ls`` or ``glob`` about ``path``; ``shown`` is the URL for messages."""
    options = {"detail": True} if question != "info" else {}
    seconds = PATIENCE if question == "info" else LISTING
    return retried(shown, lambda: getattr(fs, question)(path, **options, **_limit(fs, seconds)))


def _limit(fs: AbstractFileSystem, seconds: float) -> dict[str, float]:
    """The option that ends a request after so many seconds, however slowly its answer trickles in."""
    return {"timeout": seconds} if fs.async_impl else {}


def _limit_for(fs: AbstractFileSystem, size: int | None) -> dict[str, float]:
    """The same for the transfer of ``size`` bytes on a slow line; a day if the size is not known."""
    return _limit(fs, PATIENCE + size / SLOWEST if size is not None else 86_400.0)


def _remote_file(fs: AbstractFileSystem, entry: dict[str, Any]) -> RemoteFile:
    url = fs.unstrip_protocol(entry["name"])
    shown = without_credentials(url)
    if entry["size"] is None:
        raise UserError(f"{shown}: the server does not report the size: use a server that sends Content-Length")
    return RemoteFile(shown, int(entry["size"]), _version(entry), signed="" if shown == url else url)


def _version(info: dict[str, Any]) -> str:
    for name in ("ETag", "etag", "LastModified", "mtime", "updated", "created"):
        if info.get(name):
            return str(info[name]).strip('"')
    return ""


# ------------------------------------------------------------------------------------------------------- the cache


class FileCache:
    """A folder of at most ``max_bytes`` with local copies of remote files, shared by any number of processes.

    A file is downloaded by one process while the others wait for it. When space is needed, the least recently
    requested files are removed first; a file that was requested or fetched within the last ``grace`` seconds is kept,
    so that a process that got its path can still open it. The total can therefore exceed ``max_bytes`` by the files
    used within that time, and by a single file that is larger. An open file stays readable after its removal (Linux),
    and occupies disk space until it is closed.

    It may be pickled and forked; prefetching continues in the process that called :meth:`prefetch`.
    """

    def __init__(self, folder: Path, max_bytes: int, ahead: int = 4, grace: float = 10.0) -> None:
        self.folder, self.max_bytes, self.ahead, self.grace = Path(folder), max_bytes, ahead, grace
        self._order: list[RemoteFile] = []
        self._requested = threading.Event()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("folder", "max_bytes", "ahead", "grace")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def get(self, file: RemoteFile) -> Path:
        """The local copy of ``file``, fetched if it is missing; its mtime is the same each time it is fetched.

        Raises:
            UserError: it cannot be fetched.
        """
        path = self._ensure(file, requested=True)
        if self._pid == os.getpid():  # a forked copy has no thread to wake, and its event may be locked forever
            self._requested.set()
        return path

    def open(self, file: RemoteFile) -> IO[bytes]:
        """The local copy of ``file``, open for reading."""
        return open(self.get(file), "rb")

    def prefetch(self, files: Iterable[RemoteFile]) -> None:
        """Fetches ``files`` in this order in the background; replaces an earlier order, and an empty one stops it.

        A thread draws ``files`` as it reaches them. It stays at most ``ahead`` files, and half of ``max_bytes``, ahead
        of the last file requested with ``get`` in any process. Errors are ignored here: the ``get`` that needs the file
        tries again and raises them.
        """
        if self._pid != os.getpid():
            self._requested, self._pid = threading.Event(), os.getpid()
        order = iter(files)
        first = next(order, None)
        self._order = order = itertools.chain([] if first is None else [first], order)
        self._requested.set()
        if first is not None:
            filesystem(first.url)  # imports now: a fork during an import in the thread would leave a lock held
            threading.Thread(target=self._fetch_ahead, args=(order, time.time_ns()), daemon=True).start()

    def _fetch_ahead(self, order: Iterator[RemoteFile], since: int) -> None:
        known: list[RemoteFile] = []  # the order, as far as it was drawn
        reached = 0  # how far in the order files were requested
        for position in itertools.count():
            while True:
                if self._order is not order:
                    return
                self._requested.clear()
                known += itertools.islice(order, max(0, reached + self.ahead + 1 - len(known)))
                if position == len(known):
                    return
                for at in range(reached, len(known)):
                    if self._requested_at(known[at]) >= since:
                        reached = at + 1
                waiting = sum(one.size for one in known[reached : position + 1])
                if position < reached + self.ahead and (waiting <= self.max_bytes // 2 or position <= reached):
                    break
                self._requested.wait(POLL)
            with contextlib.suppress(Exception):  # the get that needs the file gets the same error and raises it
                self._ensure(known[position], requested=False)

    def _ensure(self, file: RemoteFile, requested: bool) -> Path:
        path = self.folder / self._key(file)
        fetched = False
        with self._locked(path) as lock:
            if not path.is_file() or path.stat().st_size != file.size:
                remove_drafts(self.folder, path.name)
                self._make_room(file.size, keep=path)
                fetch_file(file.signed or file.url, path, file.size, file.version)
                # The name contains the version. Data derived from a file (an index) is identified by its mtime,
                # which must not change when the same version is fetched again.
                os.utime(path, (0, 0))
                fetched = True
            if requested or fetched:
                now = time.time_ns() if requested else 0
                os.utime(lock.fileno(), ns=(now, now))
        if fetched:
            self._make_room(0, keep=path)
        return path

    def _key(self, file: RemoteFile) -> str:
        # Without the signature in a query, which differs each time.
        base, _, query = (file.signed or file.url).partition("?")
        query = "&".join(word for word in query.split("&") if not re.match(SIGNATURE, word))
        identity = f"{without_credentials(base)}?{query}|{file.version}|{file.size}"
        name = re.sub(r"[^A-Za-z0-9._-]", "_", file.url.rstrip("/").rpartition("/")[2])[-80:]
        return f"{hashlib.sha256(identity.encode()).hexdigest()[:20]}-{name}"

    def _requested_at(self, file: RemoteFile) -> int:
        try:
            return (self.folder / f"{self._key(file)}.lock").stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    @contextlib.contextmanager
    def _locked(self, path: Path, patience: float = math.inf) -> Iterator[IO[str]]:
        """Holds the lock of a cached file; the empty lock file is kept. BlockingIOError: the lock is taken."""
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(locked(path.with_name(f"{path.name}.lock"), patience))
            except BlockingIOError:
                raise
            except OSError as error:
                reason = f"cannot be written ({error.strerror}): name another --cache_dir"
                raise UserError(f"{self.folder}: {reason}") from None
            yield lock

    def _make_room(self, needed: int, keep: Path) -> None:
        """Removes the least recently used files until there is space for ``needed`` more bytes."""

        def last_use(path: Path) -> float:
            lock = path.with_name(f"{path.name}.lock")  # the inode has the time of the fetch, the lock of the request
            return max(path.stat().st_ctime, lock.stat().st_mtime if lock.exists() else 0.0)

        with self._locked(self.folder / "room"):
            files = []
            total = needed
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                    total += entry.stat().st_size
                    if not entry.name.endswith(".lock") and entry.name != keep.name:
                        draft = entry.name.startswith(".")
                        owner = entry.name[1:].rsplit(".", 2)[0] if draft else entry.name
                        files.append((0.0 if draft else last_use(Path(entry.path)), Path(entry.path), owner))
            for used, path, owner in sorted(files):
                if total <= self.max_bytes and used:  # leftover drafts are removed in any case
                    break
                # The lock is taken only by a process that is fetching or returning this very file.
                taken = contextlib.suppress(BlockingIOError, FileNotFoundError)
                with taken, self._locked(path.with_name(owner), patience=0):
                    if used == 0.0 or last_use(path) + self.grace < time.time():
                        size = path.stat().st_size
                        path.unlink()
                        total -= size


class RangeReader:
    """Reads parts of remote files without a local copy: one request for each read."""

    def read(self, file: RemoteFile, parts: list[tuple[int, int]]) -> list[bytes]:
        """The ``parts`` (start, size) of a file in bytes, by one request, which includes the bytes between them.

        Raises:
            UserError: the file no longer exists or is shorter, access is refused, or the server fails on every try.
        """
        url = file.signed or file.url
        first, end = min(start for start, _ in parts), max(start + size for start, size in parts)

        def attempt() -> bytes:
            fs = filesystem(url)
            content = fs.cat_file(path_on(fs, url), start=first, end=end, **_limit_for(fs, end - first))
            if len(content) != end - first:
                raise ConnectionError(f"received {len(content):,} bytes instead of {end - first:,}")
            return content

        content = retried(url, attempt) if end > first else b""
        return [content[start - first : start - first + size] for start, size in parts]

    def open(self, file: RemoteFile) -> IO[bytes]:
        """The file for sequential reading, in blocks of a few MB."""
        return io.BufferedReader(_Blocks(self, file), RANGE_BLOCK)

    def prefetch(self, files: Iterable[RemoteFile]) -> None:
        """Does nothing: no file is kept."""


class _Blocks(io.RawIOBase):
    """A remote file as a raw stream for Python's buffered reader."""

    def __init__(self, reader: RangeReader, file: RemoteFile) -> None:
        self.reader, self.file, self.position = reader, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.file.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        size = max(0, min(len(buffer), self.file.size - self.position))
        buffer[:size] = self.reader.read(self.file, [(self.position, size)])[0]
        self.position += size
        return size


# ------------------------------------------------------------------------------------------- file systems and errors


def protocol_of(url: str) -> str:
    return url.partition("://")[0].lower()


def _is_http(url: str) -> bool:
    return protocol_of(url) in ("http", "https")


def path_on(fs: AbstractFileSystem, url: str) -> str:
    return fs._strip_protocol(url)


def filesystem(url: str) -> AbstractFileSystem:
    """The file system for a URL, one per process: connections and the IO thread of fsspec do not survive a fork."""
    if protocol_of(url) in ("s3", "s3a") and re.match(r"[^/@]*(:[^@]*)?@", url.partition("://")[2]):
        raise UserError(f"{without_credentials(url)}: put keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _made_filesystem(os.getpid(), protocol_of(url), settings)


@functools.cache  # never cleared: a child that finalized its parent's would wait for a thread that it does not have
def _made_filesystem(pid: int, protocol: str, settings: tuple[tuple[str, str], ...]) -> AbstractFileSystem:
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        import fsspec

        if protocol in ("s3", "s3a"):
            # Boto tries once, `retried` does the retries; one stream per file, to save memory.
            options |= {"config_kwargs": {"retries": {"max_attempts": 0}}, "max_concurrency": 1}
        elif protocol in ("http", "https"):
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=PATIENCE)
            options |= {"client_kwargs": {"timeout": limits}}
        fs = fsspec.filesystem(protocol, **options)
        if protocol in ("s3", "s3a"):
            fs.retries = 2  # s3fs resumes an interrupted stream once; `retried` does the rest
        return fs
    except ImportError:
        package = PACKAGES.get(protocol, "fsspec[http]")
        raise UserError(f"{protocol}:// needs a package that is not installed: pip install {package}") from None
    except ValueError as error:
        raise UserError(f"{protocol}://: {first_line(error)}: use s3:// or https://") from None


def retried(url: str, call: Callable[[], T]) -> T:
    """``call()``, retried after errors of network and server; errors that a user can fix are raised as UserError."""
    for tries_left in reversed(range(TRIES)):
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            kind = _kind(error)
            if kind is None:
                raise
            if kind != "transient" or not tries_left:
                raise UserError(_message(url, error, kind)) from None
            time.sleep(FIRST_DELAY * 2 ** (TRIES - 1 - tries_left))


def _kind(error: BaseException) -> str | None:
    """``missing``, ``refused``, ``settings``, ``transient`` (worth another try); None for a bug or a full disk."""
    import aiohttp

    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, aiohttp.ClientError | TimeoutError):
        return _kind(error.__cause__)  # fsspec raises FileNotFoundError for any failure over http
    code, status = _answer(error)
    if code in ("RequestTimeTooSkewed", "PermanentRedirect", "AuthorizationHeaderMalformed") or status in (301, 307):
        return "settings"
    if code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired") or status in (401, 403):
        return "refused"
    if code in ("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown"):
        return "transient"
    if status is not None and (status in (408, 409, 416, 429) or (status >= 500 and status != 501)):
        return "transient"
    if status is not None and status >= 400:
        return "missing" if status == 404 else "settings"
    if isinstance(error, FileNotFoundError):
        return None if error.errno else "missing"  # with an errno it is a local file
    if isinstance(error, aiohttp.InvalidURL):
        return "settings"
    if isinstance(error, aiohttp.ClientError | TimeoutError | ConnectionError):
        return "transient"
    with contextlib.suppress(ImportError):
        from botocore import exceptions, parsers

        gone = (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError)
        if isinstance(error, (*gone, parsers.ResponseParserError)):
            return "transient"
        if isinstance(error, exceptions.BotoCoreError):
            return "refused" if "redentials" in type(error).__name__ else "settings"
    return "settings" if isinstance(error, ValueError) and "nvalid endpoint" in str(error) else None


def _answer(error: BaseException) -> tuple[str, int | None]:
    """The S3 error code and the HTTP status behind an error."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return response.get("Error", {}).get("Code", ""), response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(getattr(one, "status", None), int):
            return "", one.status
    return "", None


def is_no_bucket(error: BaseException) -> bool:
    return _answer(error)[0] == "NoSuchBucket"


def _message(url: str, error: BaseException, kind: str) -> str:
    s3 = protocol_of(url) in ("s3", "s3a")
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    place = f"{url} (at {server})" if s3 else url
    if isinstance(error, FileNotFoundError) and error.__cause__:  # fsspec's message over http is the URL alone
        error = error.__cause__
    detail = first_line(error)
    if kind == "missing":
        bucket = url.partition("://")[2].split("/")[0]
        what = f"there is no bucket {bucket}" if s3 and is_no_bucket(error) else "nothing found"
        text = f"{place}: {what}: check the name{' and AWS_ENDPOINT_URL' if s3 else ''}"
    elif kind == "refused":
        keys = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE" if s3 else "the URL's user or signature"
        text = f"{place}: access refused ({detail}): check {keys}"
    elif kind == "settings":
        hint = "AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, AWS_PROFILE and the clock" if s3 else "the URL"
        text = f"{place}: {detail}: check {hint}"
    else:
        hint = "check the network and AWS_ENDPOINT_URL" if s3 else "check the network and the URL"
        text = f"{place}: failed {TRIES} times ({detail or type(error).__name__}): {hint}, or try again later"
    return without_credentials(text)
