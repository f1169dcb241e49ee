"""Files at s3://, https:// and other URLs, through fsspec: listed, cached, fetched ahead or read in parts; checkpoints.

Keys and endpoint of S3 come from where boto looks for them: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``, ``AWS_PROFILE``; a public bucket needs ``FSSPEC_S3_ANON=true``. What a
user can mend (address, access, network) ends in a ``UserError`` of one line, in which no key, password or signature
is to be seen.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from accelerando.base.errors import UserError, first_line
from accelerando.base.files import expand_braces, locked, open_whole, remove_drafts

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

TRIES = 4
FIRST_DELAY = 0.2  # seconds before the second try; doubled before each further one
RANGE_BLOCK = 4 * 2**20  # bytes that a file which is read from end to end is read by
POLL = 0.2  # seconds between two looks at what other processes have asked for
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_ACCESS_KEY_ID")

SIGNATURE = (
    r"(?i)(x-amz-|x-goog-|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id|token|s[a-z]{1,2}=)"
)


@dataclass(frozen=True)
class RemoteFile:
    """A file elsewhere: ``size`` in bytes; ``version`` (etag or time) differs when the content does."""

    url: str  # without credentials: it may be shown
    size: int
    version: str
    signed: str = field(default="", repr=False, compare=False)  # the URL as given where it carries credentials


def is_remote(path: str) -> bool:
    """True for a URL such as s3://, https://, gs:// or memory://; false for what lies in the file system."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", str(path))
    return bool(match) and match.group(1).lower() not in ("file", "local")


def without_credentials(text: str) -> str:
    """``text`` without user names and query strings in its URLs, and without keys, secrets and tokens."""
    for name in SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= 5:  # a shorter one keeps nothing secret and would be found inside words
            text = text.replace(value, "***")
    text = re.sub(r"(\b(?:s3a?|gs|gcs)://)[^\s/@:]+:[^\s@]*@", r"\1", text)  # a secret of AWS may hold a /
    text = re.sub(r"(://)[^\s/?#\"']*@", r"\1", text)
    text = re.sub(r"(\bhttps?://[^\s?\"']*)\?[^\s\"']*", r"\1", text)  # elsewhere a ? is a pattern's sign
    text = re.sub(r"(://[^\s?\"']*)\?[^\s\"']*=[^\s\"']*", r"\1", text)
    text = re.sub(r"\b(AKIA|ASIA)[A-Z0-9]{12,}", "***", text)
    words = r"(secret|token|password|signature|credential|authorization|access.?key(?:.?id)?)"
    return re.sub(rf"(?i)\b([\w-]*{words}[\w-]*\s*[=:]\s*)(?:(?:Bearer|Basic)\s+)?[^\s,;&\"']+", r"\1***", text)


# -------------------------------------------------------------------------------------------------- list and fetch


def list_remote(url: str, suffix: str = ".tar") -> list[RemoteFile]:
    """The files that ``url`` names, sorted by URL: a folder (its files ending in ``suffix``), one file, or a pattern.

    A pattern has braces (``s3://b/p/{000..012}.tar``) or ``*`` (``s3://b/p/*.tar``); over https a ``?`` begins the
    query, elsewhere it stands for one character.

    Raises:
        UserError: no such bucket, nothing there, access refused, or the server cannot be reached.
    """
    patterns = expand_braces(url)
    found: dict[str, RemoteFile] = {}
    folders: dict[str, list[dict[str, Any]]] = {}  # a thousand names in braces cost one listing, not a thousand looks
    for pattern in patterns:
        fs = filesystem(pattern)
        http = _is_http(pattern)
        parent, _, name = path_on(fs, pattern).rpartition("/")
        if any(sign in pattern for sign in ("*[" if http else "*?[")):
            entries = list(retried(pattern, lambda fs=fs, at=pattern: fs.glob(at, detail=True)).values())
            if http:  # a page of links tells no sizes
                entries = [retried(pattern, lambda fs=fs, at=entry["name"]: fs.info(at)) for entry in entries]
        elif len(patterns) > 1 and not http:
            if parent not in folders:
                folders[parent] = retried(pattern, lambda fs=fs, at=parent: fs.ls(at, detail=True))
            entries = [entry for entry in folders[parent] if entry["name"].rpartition("/")[2] == name]
        else:
            info = retried(pattern, lambda fs=fs, at=pattern: fs.info(at))
            entries = [info]
            if info["type"] == "directory":
                inside = retried(pattern, lambda fs=fs, at=pattern: fs.ls(at, detail=True))
                entries = [entry for entry in inside if fnmatchcase(entry["name"], f"*{suffix}")]
        files = [_remote_file(fs, entry) for entry in entries if entry["type"] == "file"]
        if not files:
            bucket = path_on(fs, pattern).split("/")[0]
            if not http:  # an empty answer also comes from a bucket that is not there
                retried(pattern, lambda fs=fs, at=bucket: fs.ls(at, detail=True))
            raise UserError(f"{without_credentials(pattern)}: nothing found there (a folder is searched for *{suffix})")
        found.update({file.signed or file.url: file for file in files})
    return [found[key] for key in sorted(found)]


def fetch_file(url: str, target: Path, size: int | None = None, version: str = "") -> None:
    """Downloads ``url`` as ``target``, which appears whole or not at all; tried again when network or server fail.

    Compared with what the server says: the size (bytes; also with ``size``), the MD5 sum where an S3 etag is one, and
    ``version`` where one is given.

    Raises:
        UserError: not there, refused, changed since ``version``, or failed on every try.
    """
    fs = filesystem(url)

    def attempt() -> None:
        fs.get_file(path_on(fs, url), file.name)
        facts = facts_of(fs, url)  # afterwards: a file replaced meanwhile is then noticed
        if version and facts["version"] and facts["version"] != version:
            raise UserError(f"{without_credentials(url)}: changed since it was listed: start again")
        compare(Path(file.name), size if size is not None else facts["size"], facts["md5"])

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be made ({error.strerror}): choose another folder") from None
    with open_whole(target, "wb") as file:
        retried(url, attempt)


def compare(path: Path, size: int | None, md5: str | None) -> None:
    """Raises ConnectionError, on which the transfer is tried again, where the bytes are not the server's."""
    here = path.stat().st_size
    if size is not None and here != size:
        raise ConnectionError(f"{here:,} bytes came instead of {size:,}")
    if md5:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() != md5:
                raise ConnectionError("the checksum differs from the server's")


def facts_of(fs: AbstractFileSystem, url: str) -> dict[str, Any]:
    """``size``, ``version`` and ``md5`` of a file, as the server has it now; None where it does not tell."""
    path = path_on(fs, url)
    if protocol_of(url) not in ("s3", "s3a"):
        info = fs.info(path)
        return {"size": info["size"], "version": _version(info), "md5": None}
    bucket, key, _ = fs.split_path(path)
    head = fs.call_s3("head_object", Bucket=bucket, Key=key)
    # The etag of a file uploaded in parts, or encrypted with keys of its own, is no MD5 of the content.
    plain = head.get("ServerSideEncryption") in (None, "AES256") and not head.get("SSECustomerAlgorithm")
    md5 = _version(head) if plain and re.fullmatch(r"[0-9a-f]{32}", _version(head)) else None
    return {"size": head["ContentLength"], "version": _version(head), "md5": md5}


def _remote_file(fs: AbstractFileSystem, entry: dict[str, Any]) -> RemoteFile:
    url = fs.unstrip_protocol(entry["name"])
    shown = without_credentials(url)
    if entry["size"] is None:
        raise UserError(f"{shown}: the server does not tell its size: use a server that sends Content-Length")
    return RemoteFile(shown, int(entry["size"]), _version(entry), signed="" if shown == url else url)


def _version(info: dict[str, Any]) -> str:
    for name in ("ETag", "etag", "LastModified", "mtime", "updated", "created"):
        if info.get(name):
            return str(info[name]).strip('"')
    return ""


# ------------------------------------------------------------------------------------------------------- the cache


class FileCache:
    """A folder of at most ``max_bytes`` with local copies of remote files, shared by any number of processes.

    A file is downloaded by one process while the others wait for it. When room is needed, the least recently asked
    for go first; a file that was asked for or fetched within the last ``grace`` seconds stays, so that whoever got
    its path has the time to open it. The sum can therefore exceed ``max_bytes`` by what is used within that time, and
    by one file that is larger by itself. A file that is open stays readable after its removal (Linux), and occupies
    the disk until it is closed.

    It may be pickled and forked; fetching ahead goes on in the process that called :meth:`prefetch`.
    """

    def __init__(self, folder: Path, max_bytes: int, ahead: int = 4, grace: float = 10.0) -> None:
        self.folder, self.max_bytes, self.ahead, self.grace = Path(folder), max_bytes, ahead, grace
        self._order: list[RemoteFile] = []
        self._asked = threading.Event()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("folder", "max_bytes", "ahead", "grace")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def get(self, file: RemoteFile) -> Path:
        """The local copy of ``file``, fetched where it is missing; its mtime is the same each time it is fetched.

        Raises:
            UserError: it cannot be fetched.
        """
        path = self._bring(file, asked=True)
        if self._pid == os.getpid():  # a forked copy has no thread to wake, and its event may be locked for ever
            self._asked.set()
        return path

    def open(self, file: RemoteFile) -> IO[bytes]:
        """The local copy of ``file``, open for reading."""
        return open(self.get(file), "rb")

    def prefetch(self, files: list[RemoteFile]) -> None:
        """Fetches ``files`` in this order in the background; replaces an earlier order, an empty list ends it.

        It stays at most ``ahead`` files, and half of ``max_bytes``, ahead of the last one asked for by ``get`` in any
        process. A file that fails is passed over: the ``get`` that needs it tries again and raises.
        """
        if self._pid != os.getpid():
            self._asked, self._pid = threading.Event(), os.getpid()
        self._order = order = list(files)
        self._asked.set()
        if order:
            filesystem(order[0].url)  # imports here: a fork during an import in a thread would leave it locked
            threading.Thread(target=self._fetch_ahead, args=(order, time.time_ns()), daemon=True).start()

    def _fetch_ahead(self, order: list[RemoteFile], since: int) -> None:
        reached = 0  # how far in the order somebody has asked
        for position, file in enumerate(order):
            while True:
                if self._order is not order:
                    return
                self._asked.clear()
                for at in range(reached, min(len(order), reached + self.ahead + 1)):
                    if self._asked_at(order[at]) >= since:
                        reached = at + 1
                waiting = sum(one.size for one in order[reached : position + 1])
                if position < reached + self.ahead and (waiting <= self.max_bytes // 2 or position <= reached):
                    break
                self._asked.wait(POLL)
            with contextlib.suppress(Exception):  # the get that needs the file meets the same error and raises it
                self._bring(file, asked=False)

    def _bring(self, file: RemoteFile, asked: bool) -> Path:
        path = self.folder / self._key(file)
        fetched = False
        with self._locked(path) as lock:
            if not path.is_file() or path.stat().st_size != file.size:
                remove_drafts(self.folder, path.name)
                self._make_room(file.size, keep=path)
                fetch_file(file.signed or file.url, path, file.size, file.version)
                # The name says the version. What is derived from a file (an index) is known by its mtime, which
                # must then not change when the file is fetched again.
                os.utime(path, (0, 0))
                fetched = True
            if asked or fetched:
                now = time.time_ns() if asked else 0
                os.utime(lock.fileno(), ns=(now, now))
        if fetched:
            self._make_room(0, keep=path)
        return path

    def _key(self, file: RemoteFile) -> str:
        # Of a query what names the file counts; a signature is another one each time.
        base, _, query = (file.signed or file.url).partition("?")
        query = "&".join(word for word in query.split("&") if not re.match(SIGNATURE, word))
        identity = f"{without_credentials(base)}?{query}|{file.version}|{file.size}"
        name = re.sub(r"[^A-Za-z0-9._-]", "_", file.url.rstrip("/").rpartition("/")[2])[-80:]
        return f"{hashlib.sha256(identity.encode()).hexdigest()[:20]}-{name}"

    def _asked_at(self, file: RemoteFile) -> int:
        try:
            return (self.folder / f"{self._key(file)}.lock").stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    @contextlib.contextmanager
    def _locked(self, path: Path, patience: float = math.inf) -> Iterator[IO[str]]:
        """Holds the lock of a cached file, which stays as an empty file; BlockingIOError where it is taken."""
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
        """Removes what was not used for longest until ``needed`` more bytes stay within the bound."""

        def last_use(path: Path) -> float:
            lock = path.with_name(f"{path.name}.lock")  # fetched: the inode's time; asked for: the lock's
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
                if total <= self.max_bytes and used:  # left-over drafts go in any case
                    break
                # Taken only by somebody who is fetching or about to return this very file.
                taken = contextlib.suppress(BlockingIOError, FileNotFoundError)
                with taken, self._locked(path.with_name(owner), patience=0):
                    if used == 0.0 or last_use(path) + self.grace < time.time():
                        size = path.stat().st_size
                        path.unlink()
                        total -= size


class RangeReader:
    """Reads parts of remote files where they lie, for a disk that should keep none of them: a request each time."""

    def read(self, file: RemoteFile, parts: list[tuple[int, int]]) -> list[bytes]:
        """The ``parts`` (start, size) of a file in bytes, by one request, which also brings what is between them.

        Raises:
            UserError: it is no longer there, it was cut, access is refused, or the server fails on every try.
        """
        url = file.signed or file.url
        first, end = min(start for start, _ in parts), max(start + size for start, size in parts)

        def attempt() -> bytes:
            fs = filesystem(url)
            content = fs.cat_file(path_on(fs, url), start=first, end=end)
            if len(content) != end - first:
                raise ConnectionError(f"{len(content):,} bytes came instead of {end - first:,}")
            return content

        content = retried(url, attempt) if end > first else b""
        return [content[start - first : start - first + size] for start, size in parts]

    def open(self, file: RemoteFile) -> IO[bytes]:
        """The whole file, read in blocks of a few MB from its beginning to its end."""
        return io.BufferedReader(_Blocks(self, file), RANGE_BLOCK)

    def prefetch(self, files: list[RemoteFile]) -> None:
        """Nothing: no file is kept."""


class _Blocks(io.RawIOBase):
    """A remote file as Python's own buffering wants it."""

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

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self.file.size - self.position))
        buffer[:size] = self.reader.read(self.file, [(self.position, size)])[0]
        self.position += size
        return size


# ----------------------------------------------------------------------------------------------------- checkpoints


# ------------------------------------------------------------------------------------------- file systems and errors


def protocol_of(url: str) -> str:
    return url.partition("://")[0].lower()


def _is_http(url: str) -> bool:
    return protocol_of(url) in ("http", "https")


def path_on(fs: AbstractFileSystem, url: str) -> str:
    return fs._strip_protocol(url)


def filesystem(url: str) -> AbstractFileSystem:
    """The file system for a URL in this process: connections and the IO thread of fsspec do not survive a fork."""
    if protocol_of(url) in ("s3", "s3a") and re.match(r"[^/@]*(:[^@]*)?@", url.partition("://")[2]):
        raise UserError(f"{without_credentials(url)}: keys belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _made_filesystem(os.getpid(), protocol_of(url), settings)


@functools.cache  # never emptied: a child that dropped its parent's would wait for a thread it does not have
def _made_filesystem(pid: int, protocol: str, settings: tuple[tuple[str, str], ...]) -> AbstractFileSystem:
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        import fsspec

        if protocol in ("s3", "s3a"):
            # Boto tries once, `retried` again; one stream per file, which costs no memory.
            options |= {"config_kwargs": {"retries": {"max_attempts": 0}}, "max_concurrency": 1}
        elif protocol in ("http", "https"):
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)  # a large file may take hours
            options |= {"client_kwargs": {"timeout": limits}}
        fs = fsspec.filesystem(protocol, **options)
        if protocol in ("s3", "s3a"):
            fs.retries = 2  # s3fs goes on once where a stream broke off; more is up to `retried`
        return fs
    except ImportError:
        package = PACKAGES.get(protocol, "fsspec[http]")
        raise UserError(f"{protocol}:// needs a package that is not installed: pip install {package}") from None
    except ValueError as error:
        raise UserError(f"{protocol}://: {first_line(error)}: use s3:// or https://") from None


def retried(url: str, call: Callable[[], Any]) -> Any:
    """``call()``, again after failures of network and server; what a user can mend is raised as UserError."""
    for tries_left in reversed(range(TRIES)):
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            kind = _kind(error)
            if kind is None:
                raise
            if kind != "passing" or not tries_left:
                raise UserError(_message(url, error, kind)) from None
            time.sleep(FIRST_DELAY * 2 ** (TRIES - 1 - tries_left))


def _kind(error: BaseException) -> str | None:
    """``missing``, ``refused``, ``settings``, ``passing`` (worth another try); None for a defect or a full disk."""
    import aiohttp

    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, aiohttp.ClientError | TimeoutError):
        return _kind(error.__cause__)  # fsspec says so of any failure over http
    code, status = _answer(error)
    if code in ("RequestTimeTooSkewed", "PermanentRedirect", "AuthorizationHeaderMalformed") or status in (301, 307):
        return "settings"
    if code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired") or status in (401, 403):
        return "refused"
    if code in ("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown"):
        return "passing"
    if status is not None and (status in (408, 409, 416, 429) or (status >= 500 and status != 501)):
        return "passing"
    if status is not None and status >= 400:
        return "missing" if status == 404 else "settings"
    if isinstance(error, FileNotFoundError):
        return None if error.errno else "missing"  # with a number it is a local file
    if isinstance(error, aiohttp.InvalidURL):
        return "settings"
    if isinstance(error, aiohttp.ClientError | TimeoutError | ConnectionError):
        return "passing"
    with contextlib.suppress(ImportError):
        from botocore import exceptions, parsers

        gone = (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError)
        if isinstance(error, (*gone, parsers.ResponseParserError)):
            return "passing"
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
    detail = first_line(error)
    if kind == "missing":
        bucket = url.partition("://")[2].split("/")[0]
        what = f"there is no bucket {bucket}" if s3 and is_no_bucket(error) else "nothing found there"
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
