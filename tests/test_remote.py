"""Remote files against a real S3 server (rclone), behind a proxy that cuts, spoils, refuses and counts."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT

from accelerando.base.errors import UserError
from accelerando.base.texts import without_credentials
from accelerando.data import remote
from accelerando.data.remote import (
    FileCache,
    RangeReader,
    RemoteFile,
    fetch_file,
    is_remote,
    list_remote,
)
from accelerando.data.shards import ShardPairs, list_shards
from accelerando.train import remote_checkpoints
from accelerando.train.checkpoint_folders import REQUIRED, find_damage
from accelerando.train.remote_checkpoints import (
    fetch_checkpoint,
    newest_remote_checkpoint,
    prune_remote,
    upload_checkpoint,
)

KEY, SECRET = "TESTKEYTESTKEY00", "not/so+secret/wordsJKLM"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


class Server:
    """An S3 server in a process of its own; ``root/bucket/x`` on the disk is s3://bucket/x."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, free_port()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        program = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        words = ["serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", f"127.0.0.1:{self.port}", str(self.root)]
        words += ["--dir-cache-time", "20ms", "--config", ""]
        self.process = subprocess.Popen([program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.05)
        raise AssertionError("the S3 server did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def put(self, name: str, content: bytes) -> bytes:
        path = self.root / "bucket" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self.settle()
        return content

    def settle(self) -> None:
        """To be called after a change of the disk: until the server has forgotten what it knew of it."""
        time.sleep(0.03)


class Proxy:
    """Passes connections on to a server; the next ``faults`` answers to a GET of an object go wrong as ``kind`` says.

    ``cut``: ends after ``after`` bytes; ``spoil``: one byte differs; ``busy``: 503 at once. ``gets`` counts GETs of
    objects, ``pause`` slows each block of 64 kB down.
    """

    def __init__(self, port: int) -> None:
        self.target, self.port, self.gets = port, free_port(), []
        self.kind, self.faults, self.after, self.pause, self.passed = "cut", 0, 1000, 0.0, 0
        self.socket = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self.accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self.socket.accept()[0]
                threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            server = socket.create_connection(("127.0.0.1", self.target))
            state = {"fault": "", "sent": 0}
            threading.Thread(target=self.answers, args=(server, client, state), daemon=True).start()
            while block := client.recv(1 << 16):
                line = block.split(b"\r\n", 1)[0].decode("latin-1")
                if line.startswith("GET /") and "?list-type" not in line and line.count("/") > 2:
                    self.gets.append(line.split()[1])
                    state["sent"], state["fault"] = 0, self.kind if self.faults > 0 else ""
                    self.faults -= 1
                    if state["fault"] == "busy":
                        client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                        return
                server.sendall(block)

    def answers(self, server: socket.socket, client: socket.socket, state: dict) -> None:
        with contextlib.suppress(OSError), server:
            while block := server.recv(1 << 16):
                if state["fault"] == "cut" and state["sent"] + len(block) > self.after:
                    client.sendall(block[: self.after - state["sent"]])
                    break
                if state["fault"] == "spoil" and state["sent"] > 10_000:
                    block, state["fault"] = bytes([block[0] ^ 1]) + block[1:], ""
                client.sendall(block)
                state["sent"] += len(block)
                self.passed += len(block)
                time.sleep(self.pause)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


def set_environment(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    values = {
        "ACCESS_KEY_ID": KEY, "SECRET_ACCESS_KEY": SECRET, "ENDPOINT_URL": url, "CONFIG_FILE": "none",
        "SHARED_CREDENTIALS_FILE": "none", "EC2_METADATA_DISABLED": "true", "DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(f"AWS_{name}", value)


@pytest.fixture
def s3(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """A server of its own (it starts in a tenth of a second) with an empty bucket, and the environment leading to it."""
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    server = Server(root)
    set_environment(monkeypatch, server.url)
    yield server
    server.kill()


@pytest.fixture
def proxy(s3: Server, monkeypatch: pytest.MonkeyPatch):
    proxy = Proxy(s3.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.socket.close()


def one_line(error: pytest.ExceptionInfo) -> str:
    """The message of an error: one line, no key and no secret in it."""
    text = str(error.value)
    assert "\n" not in text
    assert KEY not in text and SECRET not in text and "wordsJKLM" not in text, text
    return text


# ------------------------------------------------------------------------------------------------- names and listing


def test_what_is_remote() -> None:
    assert all(map(is_remote, ("s3://b/x", "https://h/x.tar", "gs://b", "memory://x", "S3://b/{0..1}.tar")))
    assert not any(map(is_remote, ("/data/x.tar", "data/x", "file:///data", "C:\\x", "a:b", "local://x", "")))


@pytest.mark.parametrize(
    "text",
    [
        f"s3://{KEY}:{SECRET}@bucket/x.tar is wrong",
        f"at https://me:{SECRET.replace('/', '%2F')}@host:1/x.tar",
        "https://h/x.tar?X-Amz-Credential=AKIAIOSFODNN7EXAMPLE&X-Amz-Signature=wordsJKLM, once",
        "key AKIAIOSFODNN7EXAMPLE refused",
        f"the secret {SECRET} differs",
        "aws_secret_access_key=wordsJKLM",
        "Authorization: Bearer wordsJKLM",
        'header "x-amz-security-token: wordsJKLM"',
    ],
)
def test_credentials_are_taken_out(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    set_environment(monkeypatch, "")
    clean = without_credentials(text)
    for word in ("wordsJKLM", "AKIAIOSFODNN7EXAMPLE", SECRET, KEY, "not%2Fso", "me:"):
        assert word not in clean
    plain = "s3://bucket/shard-{000..012}.tar: 12 of 13 bytes, see https://host:81/a@b"
    assert without_credentials(plain) == plain


def test_listing_of_folder_file_and_patterns(s3: Server) -> None:
    contents = {f"set/{n:03d}.tar": s3.put(f"set/{n:03d}.tar", noise(n * 7 + 1, n)) for n in (2, 0, 1, 10)}
    s3.put("set/notes.txt", b"x")
    s3.put("set/deeper/5.tar", b"x")
    names = sorted(contents)
    for url in ("s3://bucket/set", "s3://bucket/set/", "s3://bucket/set/*.tar"):
        files = list_remote(url)
        assert [file.url for file in files] == [f"s3://bucket/{name}" for name in names], url
        assert [file.size for file in files] == [len(contents[name]) for name in names]
        assert [file.version for file in files] == [hashlib.md5(contents[name]).hexdigest() for name in names]
    assert [file.url[-7:] for file in list_remote("s3://bucket/set/{000..002}.tar")] == names_of("000", "001", "002")
    assert [file.url[-7:] for file in list_remote("s3://bucket/set/00?.tar")] == names_of("000", "001", "002")
    (one,) = list_remote("s3://bucket/set/010.tar")
    assert one == list_remote("s3://bucket/set")[-1]
    assert [file.url for file in list_remote("s3://bucket/set", ".txt")] == ["s3://bucket/set/notes.txt"]
    before = one.version
    s3.put("set/010.tar", noise(71, 99))
    assert list_remote("s3://bucket/set/010.tar")[0].version != before


def names_of(*numbers: str) -> list[str]:
    return [f"{number}.tar" for number in numbers]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://nobucket/set", "no bucket nobucket"),
        ("s3://nobucket/set/*.tar", "no bucket nobucket"),
        ("s3://nobucket/{00..01}.tar", "no bucket nobucket"),
        ("s3://nobucket/set/1.tar", "no bucket nobucket"),
        ("s3://bucket/empty", "nothing found"),
        ("s3://bucket/set/*.zip", "nothing found"),
        ("s3://bucket/set/{00..01}.tar", "01.tar"),
        ("s3://bucket/set/7.tar", "nothing found"),
        (f"s3://{KEY}:{SECRET}@bucket/set", "AWS_ACCESS_KEY_ID"),
        ("gs://bucket/set", "pip install gcsfs"),
        ("foo://bucket/set", "s3:// or https://"),
    ],
)
def test_what_cannot_be_listed_is_one_line(s3: Server, url: str, words: str) -> None:
    s3.put("set/00.tar", b"x")
    with pytest.raises(UserError) as error:
        list_remote(url)
    assert words in one_line(error)


def test_wrong_secret_missing_keys_and_unreachable_server_are_one_line(s3: Server, tmp_path, monkeypatch) -> None:
    s3.put("set/00.tar", b"x")
    (file,) = list_remote("s3://bucket/set")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another/wordsJKLM")
    for url in ("s3://bucket/set", "s3://bucket/set/00.tar", "s3://bucket/set/*.tar"):
        with pytest.raises(UserError, match=r"access refused.*check AWS_ACCESS_KEY_ID") as error:
            list_remote(url)
        assert s3.url in one_line(error)
    with pytest.raises(UserError, match="access refused") as error:
        FileCache(tmp_path / "cache", 1000).get(file)
    one_line(error)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(UserError, match="access refused"):
        list_remote("s3://bucket/set")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:33")
    with pytest.raises(UserError, match="check AWS_ENDPOINT_URL"):
        list_remote("s3://bucket/set")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    for url in ("s3://bucket/set", "s3://bucket/set/00.tar"):
        begin = time.monotonic()
        with pytest.raises(UserError, match=r"failed 4 times.*check the network and AWS_ENDPOINT_URL") as error:
            list_remote(url)
        one_line(error)
        assert time.monotonic() - begin < 6


# ---------------------------------------------------------------------------------------------------------- fetching


@pytest.mark.parametrize("size", [0, 1, 65_537, 5 * 2**20 + 1])
def test_round_trip(s3: Server, tmp_path: Path, size: int) -> None:
    content = s3.put("odd.bin", noise(size))
    fetch_file("s3://bucket/odd.bin", tmp_path / "new" / "odd.bin", size)
    assert (tmp_path / "new" / "odd.bin").read_bytes() == content
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["odd.bin"]


@pytest.mark.parametrize("kind", ["cut", "spoil", "busy"])
def test_a_passing_fault_is_tried_again(proxy: Proxy, s3: Server, tmp_path: Path, kind: str) -> None:
    content = s3.put("x.bin", noise(300_000))
    proxy.kind, proxy.faults, proxy.after = kind, 1, 100_000
    fetch_file("s3://bucket/x.bin", tmp_path / "x.bin", len(content))
    assert proxy.faults < 1 and len(proxy.gets) == 2
    assert (tmp_path / "x.bin").read_bytes() == content


@pytest.mark.parametrize("kind", ["cut", "spoil", "busy"])
def test_a_fault_that_stays_is_one_line_and_leaves_nothing(proxy: Proxy, s3: Server, tmp_path, kind: str) -> None:
    content = s3.put("x.bin", noise(300_000))
    proxy.kind, proxy.faults, proxy.after = kind, 1000, 0
    with pytest.raises(UserError, match="failed 4 times") as error:
        fetch_file("s3://bucket/x.bin", tmp_path / "x.bin", len(content))
    one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_missing_and_refused_are_not_tried_again(proxy: Proxy, s3: Server, tmp_path: Path, monkeypatch) -> None:
    s3.put("x.bin", b"x")
    with pytest.raises(UserError, match="nothing found"):
        fetch_file("s3://bucket/y.bin", tmp_path / "y.bin")
    assert len(proxy.gets) == 1
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-one")
    with pytest.raises(UserError, match="access refused"):
        fetch_file("s3://bucket/x.bin", tmp_path / "x.bin")
    assert len(proxy.gets) == 2
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with pytest.raises(UserError, match="changed after it was listed"):
        fetch_file("s3://bucket/x.bin", tmp_path / "x.bin", 1, version="0" * 32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("again", [True, False])
def test_a_server_killed_in_the_middle(tmp_path: Path, s3: Server, monkeypatch, again: bool) -> None:
    (tmp_path / "root" / "bucket").mkdir(parents=True)
    server = Server(tmp_path / "root")
    proxy = Proxy(server.port)
    proxy.pause = 0.005
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    content = server.put("x.bin", noise(8_000_000))
    (tmp_path / "here").mkdir()

    def kill() -> None:
        while proxy.passed < 1_000_000:
            time.sleep(0.01)
        server.kill()
        if again:
            server.start()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        if again:
            fetch_file("s3://bucket/x.bin", tmp_path / "here" / "x.bin", len(content))
            assert (tmp_path / "here" / "x.bin").read_bytes() == content
            assert len(proxy.gets) > 1
        else:
            with pytest.raises(UserError, match="failed 4 times") as error:
                fetch_file("s3://bucket/x.bin", tmp_path / "here" / "x.bin", len(content))
            one_line(error)
            assert list((tmp_path / "here").iterdir()) == []
    finally:
        killer.join()
        server.kill()


class Pages(http.server.SimpleHTTPRequestHandler):
    """Static files; without ``sig=wordsJKLM`` in the query access is refused."""

    cuts = 0

    def send_head(self):
        if "sig=wordsJKLM" not in self.path:
            return self.send_error(403)
        if self.command == "GET" and type(self).cuts > 0:
            type(self).cuts -= 1
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            return io.BytesIO(b"short")
        return super().send_head()

    def log_message(self, *_: object) -> None:
        pass


def test_https_with_a_signature_that_is_never_shown(tmp_path: Path) -> None:
    content = noise(5000)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "x.tar").write_bytes(content)
    handler = functools.partial(Pages, directory=str(tmp_path / "web"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    (file,) = list_remote(f"{base}/x.tar?sig=wordsJKLM&n=1")
    assert file.url == f"{base}/x.tar" and "wordsJKLM" not in repr(file) and file.size == 5000
    Pages.cuts = 2
    path = FileCache(tmp_path / "cache", 10_000).get(file)
    assert path.read_bytes() == content and Pages.cuts == 0
    assert "wordsJKLM" not in str(path)
    for url, words in ((f"{base}/x.tar?sig=bad", "refused"), (f"{base}/y.tar?sig=wordsJKLM", "nothing found")):
        with pytest.raises(UserError, match=words) as error:
            list_remote(url)
        assert "sig=" not in one_line(error)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="failed 4 times"):
        list_remote(f"{base}/x.tar?sig=wordsJKLM")


# ------------------------------------------------------------------------------------------------------------- cache


def test_shards_are_read_where_they_lie(proxy: Proxy, s3: Server, tmp_path: Path) -> None:
    """Without a cache: the same samples as from the disk, a request each, none of them kept; faults are survived."""
    rng = np.random.default_rng(0)
    for shard in range(3):
        samples = [
            {f"{row:03}.jpg": rng.bytes(int(rng.integers(1, 40_000))), f"{row:03}.txt": f"caption {row}".encode()}
            | ({f"{row:03}.json": json.dumps({"row": row}).encode()} if row % 2 else {})
            for row in range(5 + shard)
        ]
        write_members(
            s3.root / "bucket" / f"{shard}.tar", {name: part for one in samples for name, part in one.items()}
        )
    s3.settle()
    here = ShardPairs(list_shards(str(s3.root / "bucket")), tmp_path / "here")
    there = ShardPairs(list_remote("s3://bucket"), tmp_path / "there", RangeReader())
    assert len(there) == len(here) == 18
    proxy.gets.clear()
    proxy.kind, proxy.faults = "cut", 3
    for row in rng.permutation(len(here)):
        assert there.read(row) == here.read(row)
        assert there.metadata(row) == here.metadata(row)
    assert len(proxy.gets) <= 18 + 18 + 3
    assert there.where(7) == "s3://bucket/1.tar: 002.jpg"
    assert (there.epoch_order(1, 2) == here.epoch_order(1, 2)).all()
    kept = sorted(path.suffix for path in (tmp_path / "there").rglob("*.*"))
    assert kept == [".lock"] * 4 + [".npy"] * 4  # of each shard, and of the set
    write_members(s3.root / "bucket" / "2.tar", {"0.jpg": b"short", "0.txt": b"now"})
    s3.settle()
    with pytest.raises(UserError) as error:
        there.read(17)
    assert "s3://bucket/2.tar" in one_line(error)


def write_members(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def put_files(s3: Server, count: int, size: int = 1000) -> list[RemoteFile]:
    for number in range(count):
        s3.put(f"set/{number:02d}.tar", noise(size, number))
    return list_remote("s3://bucket/set")


def cached(folder: Path) -> set[str]:
    return {path.name.partition("-")[2] for path in folder.glob("[!.]*.tar")}


def test_cache_fetches_once_and_anew_when_the_file_has_changed(proxy: Proxy, s3: Server, tmp_path: Path) -> None:
    (file,) = put_files(s3, 1)
    cache = FileCache(tmp_path / "cache", 10_000)
    path = cache.get(file)
    stat = path.stat()
    assert path == cache.get(file) == FileCache(tmp_path / "cache", 10_000).get(file)
    assert len(proxy.gets) == 1
    path.write_bytes(b"cut off")  # by somebody else
    assert cache.get(file).read_bytes() == noise(1000)
    assert path.stat().st_mtime_ns == stat.st_mtime_ns  # an index of it stays valid
    s3.put("set/00.tar", noise(1000, 50))
    (changed,) = list_remote("s3://bucket/set")
    assert cache.get(changed).read_bytes() == noise(1000, 50) and cache.get(changed) != path
    path.unlink()
    with pytest.raises(UserError, match="changed after it was listed"):
        cache.get(file)


def test_the_bound_is_kept_and_the_least_recently_used_goes(s3: Server, tmp_path: Path) -> None:
    files = put_files(s3, 6)
    cache = FileCache(tmp_path / "cache", 3500, grace=0.0)
    paths = [cache.get(file) for file in files[:3]]
    with open(paths[1], "rb") as open_file:
        cache.get(files[0])
        cache.get(files[3])
        assert cached(cache.folder) == {"00.tar", "02.tar", "03.tar"}
        assert open_file.read() == noise(1000, 1)  # removed, but still open
    draft = cache.folder / f".{paths[1].name}.1-ab.draft"
    draft.write_bytes(noise(900))  # a killed process left it
    for file in [files[5], *files, *files]:
        assert cache.get(file).is_file()
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 3500
    assert not draft.exists()
    # What was used within the grace time stays, even beyond the bound; a file larger than the bound is served.
    careful = FileCache(tmp_path / "careful", 1500, grace=60.0)
    assert all(path.is_file() for path in [careful.get(file) for file in files])
    assert len(cached(careful.folder)) == 6
    assert FileCache(tmp_path / "tiny", 10, grace=0.0).get(files[0]).stat().st_size == 1000


def get_from(cache: FileCache, file: RemoteFile, start: float, answers) -> None:
    time.sleep(max(0.0, start - time.time()))
    answers.put(hashlib.md5(cache.get(file).read_bytes()).hexdigest())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_and_threads_that_ask_at_once_download_once(proxy: Proxy, s3, tmp_path, method: str) -> None:
    content = s3.put("set/0.tar", noise(2_000_000))
    (file,) = list_remote("s3://bucket/set")
    cache = FileCache(tmp_path / "cache", 10**8)
    cache.prefetch([])  # its state must survive as well
    proxy.pause = 0.02
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    args = (cache, file, time.time() + (3.0 if method == "spawn" else 0.3), answers)
    workers = [context.Process(target=get_from, args=args) for _ in range(2)]
    if method == "fork":  # no other threads where processes are forked later
        workers.append(threading.Thread(target=get_from, args=args))
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert set(found) == {hashlib.md5(content).hexdigest()}
    assert len(proxy.gets) == 1


class Shards:
    """A data set whose rows are remote files, as a DataLoader's workers read it."""

    def __init__(self, files: list[RemoteFile], cache: FileCache) -> None:
        self.files, self.cache = files, cache

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str:
        return hashlib.md5(self.cache.get(self.files[index]).read_bytes()).hexdigest()


def test_a_cache_used_before_works_in_workers_and_prefetch_follows_them(s3: Server, tmp_path: Path) -> None:
    import torch

    files = put_files(s3, 12)
    cache = FileCache(tmp_path / "cache", 10**6, ahead=2)
    cache.get(files[0])
    cache.prefetch(files)  # in this process; the workers ask
    loader = torch.utils.data.DataLoader(Shards(files, cache), batch_size=1, num_workers=2, timeout=30)
    for _ in range(2):
        assert [row for (row,) in loader] == [hashlib.md5(noise(1000, n)).hexdigest() for n in range(12)]
    assert len(cached(cache.folder)) == 12


def until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_prefetch_stays_the_given_number_of_files_ahead(proxy: Proxy, s3: Server, tmp_path: Path) -> None:
    files = put_files(s3, 8)
    cache = FileCache(tmp_path / "cache", 10**6, ahead=2)
    cache.prefetch(files)
    assert until(lambda: len(cached(cache.folder)) == 2)
    time.sleep(0.5)
    assert cached(cache.folder) == {"00.tar", "01.tar"}
    cache.get(files[0])
    assert until(lambda: len(cached(cache.folder)) == 3)
    other = pickle.loads(pickle.dumps(cache))  # as another process sees it
    other.get(files[2])
    assert until(lambda: len(cached(cache.folder)) == 5)
    time.sleep(0.5)
    assert cached(cache.folder) == {f"{n:02d}.tar" for n in range(5)}
    assert len(proxy.gets) == 5
    cache.prefetch(files[::-1])  # another order
    assert until(lambda: "07.tar" in cached(cache.folder))
    cache.prefetch([])
    small = FileCache(tmp_path / "small", 2500, ahead=8)  # half of the bound, whatever the number
    small.prefetch(files)
    assert until(lambda: len(cached(small.folder)) == 1)
    time.sleep(0.5)
    assert cached(small.folder) == {"00.tar"}
    small.prefetch([])


def test_what_prefetch_cannot_bring_is_raised_by_the_get(s3: Server, tmp_path: Path, capfd) -> None:
    files = put_files(s3, 3)
    (s3.root / "bucket" / "set" / "00.tar").unlink()
    s3.settle()
    cache = FileCache(tmp_path / "cache", 10**6)
    cache.prefetch(files)
    assert until(lambda: cached(cache.folder) == {"01.tar", "02.tar"})
    assert capfd.readouterr() == ("", "")
    with pytest.raises(UserError, match="nothing found"):
        cache.get(files[0])
    assert cache.get(files[1]).is_file()


def test_a_folder_that_cannot_be_made_is_one_line(s3: Server, tmp_path: Path) -> None:
    (file,) = put_files(s3, 1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="--cache_dir"):
        FileCache(tmp_path / "file" / "cache", 1000).get(file)


# ------------------------------------------------------------------------------------------------------- checkpoints


def make_checkpoint(folder: Path, step: int, size: int = 3001) -> Path:
    path = folder / f"step_{step:06d}"
    (path / "best").mkdir(parents=True)
    files = dict.fromkeys(REQUIRED, b"{}") | {
        "model.safetensors": noise(size, step),
        "optimizer.safetensors": b"{}",
        "empty.bin": b"",
        "best/config.json": b"{}",
    }
    for name, content in files.items():
        (path / name).write_bytes(content)
    facts = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in files.items()}
    (path / "manifest.json").write_text(json.dumps(facts))
    assert find_damage(path) is None
    return path


URL = "s3://bucket/runs/a"


def test_checkpoint_goes_up_and_comes_back(s3: Server, tmp_path: Path, monkeypatch) -> None:
    assert newest_remote_checkpoint(URL) is None
    monkeypatch.setattr(remote_checkpoints, "UPLOAD_PART", 5 * 2**20)
    path = make_checkpoint(tmp_path, 500, size=11 * 2**20 + 1)  # in parts
    upload_checkpoint(path, URL)
    assert newest_remote_checkpoint(URL) == newest_remote_checkpoint(f"{URL}/") == "step_000500"
    warnings: list[str] = []
    back = fetch_checkpoint(URL, "step_000500", tmp_path / "back", warnings.append)
    assert back == tmp_path / "back" / "step_000500" and find_damage(back) is None and not warnings
    for file in path.rglob("*"):
        assert file.is_dir() or (back / file.relative_to(path)).read_bytes() == file.read_bytes()
    assert [one.name for one in (tmp_path / "back").iterdir()] == ["step_000500"]
    # An intact copy here is not fetched again; a damaged one is replaced.
    inode = back.stat().st_ino
    assert fetch_checkpoint(URL, "step_000500", tmp_path / "back", warnings.append).stat().st_ino == inode
    (back / "best" / "config.json").write_text("[]")
    assert find_damage(fetch_checkpoint(URL, "step_000500", tmp_path / "back", warnings.append)) is None


def test_an_upload_cut_off_does_not_count_and_is_replaced(s3: Server, tmp_path: Path, monkeypatch) -> None:
    upload_checkpoint(make_checkpoint(tmp_path, 100), URL)
    path = make_checkpoint(tmp_path, 200)
    sent = []
    compare = remote_checkpoints.compare

    def dies(file: Path, *facts: object) -> None:
        compare(file, *facts)
        sent.append(file.name)
        if len(sent) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(remote_checkpoints, "compare", dies)
        upload_checkpoint(path, URL)
    assert "manifest.json" not in sent
    assert len(list((s3.root / "bucket/runs/a/step_000200").rglob("*.*"))) == 3
    assert newest_remote_checkpoint(URL) == "step_000100"
    s3.put("runs/a/step_000200/left_over.bin", b"x")
    upload_checkpoint(path, URL)
    assert newest_remote_checkpoint(URL) == "step_000200"
    there = s3.root / "bucket/runs/a/step_000200"
    assert find_damage(there) is None and not (there / "left_over.bin").exists()


def test_an_upload_is_tried_again_and_ends_in_one_line(proxy: Proxy, s3: Server, tmp_path: Path, monkeypatch) -> None:
    path = make_checkpoint(tmp_path, 100)
    server = remote.filesystem(URL)
    put, calls = server.put_file, []

    def shaky(*args, **kwargs) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise ConnectionResetError("gone")
        put(*args, **kwargs)
        if len(calls) == 2:  # the server holds something else
            s3.put("runs/a/step_000100/best/config.json", b"[]")

    with monkeypatch.context() as patch:
        patch.setattr(server, "put_file", shaky)
        upload_checkpoint(path, URL)
    assert len(calls) == len(REQUIRED) + 4 + 3  # each file of the checkpoint once, the manifest, and two again
    assert find_damage(s3.root / "bucket/runs/a/step_000100") is None
    for url, words in (("s3://nobucket/a", "no bucket nobucket"), (f"s3://{KEY}:{SECRET}@bucket/a", "put keys in")):
        with pytest.raises(UserError, match=words) as error:
            upload_checkpoint(path, url)
        one_line(error)


def test_prune_keeps_the_newest_complete_ones(s3: Server, tmp_path: Path) -> None:
    for step in (100, 200, 300, 1_000_000):
        upload_checkpoint(make_checkpoint(tmp_path, step), URL)
    s3.put("runs/a/step_000250/model.safetensors", b"half")
    s3.put("runs/a/step_2000000/model.safetensors", b"still going up")
    s3.put("runs/a/other/x", b"x")
    prune_remote(URL, keep=2)
    there = {path.name for path in (s3.root / "bucket/runs/a").iterdir() if any(path.iterdir())}
    assert there == {"step_000300", "step_1000000", "step_2000000", "other"}
    assert newest_remote_checkpoint(URL) == "step_1000000"
    prune_remote(URL, keep=0)
    assert newest_remote_checkpoint(URL) == "step_1000000"


def test_a_damaged_remote_checkpoint_falls_back(s3: Server, tmp_path: Path) -> None:
    for step in (100, 200, 300, 400, 500, 600):
        upload_checkpoint(make_checkpoint(tmp_path, step), URL)
    there = s3.root / "bucket/runs/a"
    content = bytearray((there / "step_000500/model.safetensors").read_bytes())
    content[7] ^= 1
    (there / "step_000500/model.safetensors").write_bytes(content)
    (there / "step_000400/model.safetensors").write_bytes(content[:-1])
    (there / "step_000300/empty.bin").unlink()
    (there / "step_000200/manifest.json").write_text('{"../../x": {"bytes": 1, "sha256": ""}}')
    s3.settle()
    warnings: list[str] = []
    good = fetch_checkpoint(URL, "step_000500", tmp_path / "back", warnings.append)
    assert good.name == "step_000100" and find_damage(good) is None
    for line, words in zip(warnings, ("checksum differs", "3,000 bytes", "is missing", "outside"), strict=True):
        assert words in line
    assert [one.name for one in (tmp_path / "back").iterdir()] == ["step_000100"]
    (there / "step_000100/manifest.json").unlink()
    s3.settle()
    with pytest.raises(UserError, match="no complete checkpoint") as error:
        fetch_checkpoint(URL, "step_000500", tmp_path / "again", warnings.append)
    one_line(error)


@pytest.mark.parametrize(
    ("before", "words"), [("", "no bucket nobucket"), ("import sys; sys.modules['s3fs'] = None", "pip install s3fs")]
)
def test_a_program_ends_with_one_line_and_exit_code_2(s3: Server, before: str, words: str) -> None:
    code = f"{before}\nfrom accelerando.base.errors import errors_in_one_line\nfrom accelerando.data.remote import list_remote\n"
    code += "with errors_in_one_line(): list_remote('s3://nobucket/x')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: s3") and words in done.stderr
