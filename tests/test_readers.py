"""Shards, caption tables, clips, configs and checkpoints that are not as they should be: read rightly, or one line."""

from __future__ import annotations

import io
import json
import os
import socket
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_data import write_shard

from accelerando.base.config import check_ranges, read_yaml
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import expand_braces
from accelerando.data.npz import MOST_BYTES, open_npz
from accelerando.data.pairs import TablePairs
from accelerando.data.shards import ShardPairs, list_shards
from accelerando.data.sign_clips import class_names, read_clip, synthetic_clips
from accelerando.data.sign_labels import inspect_clip, label_problems, read_labels, report_problems
from accelerando.inference import answers, inputs
from accelerando.train.checkpoint_folders import step_folders


def pairs_of(source: Path, cache: Path) -> list[tuple[bytes, bytes]]:
    shards = ShardPairs(list_shards(str(source)), cache)
    return [shards.read(row) for row in range(len(shards))]


# ----------------------------------------------------------------------------------------------------------- shards


def test_layouts_of_img2dataset(tmp_path: Path) -> None:
    """Captions only in the JSON, failed downloads, and two images of one sample."""
    about = {"caption": "eine Bank 😀", "status": "success"}
    members = [
        ("000.jpg", b"0"), ("000.json", json.dumps(about).encode()),
        ("001.json", b'{"caption": "gone", "status": "failed_to_download"}'),
        ("002.txt", b"gone"), ("002.json", b'{"status": "failed_to_resize"}'),
        ("003.png", b"png"), ("003.jpg", b"jpg"), ("003.txt", b"two images"),
    ]  # fmt: skip
    write_shard(tmp_path / "00000.tar", members)
    assert pairs_of(tmp_path, tmp_path / "cache") == [(b"0", "eine Bank 😀".encode()), (b"jpg", b"two images")]
    write_shard(tmp_path / "bad" / "00000.tar", [("1.jpg", b"0"), ("1.json", b'{"caption": null}')])
    with pytest.raises(UserError, match=r"sample '1' has no caption \(\.txt, or caption in a \.json\)"):
        pairs_of(tmp_path / "bad", tmp_path / "cache")


def test_shards_in_nested_folders(tmp_path: Path) -> None:
    for name in ("a/0.tar", "a/deep/1.tar"):
        write_shard(tmp_path / name, [(f"{name}.jpg", b"x"), (f"{name}.txt", name.encode())])
    assert [path.name for path in list_shards(str(tmp_path))] == ["0.tar", "1.tar"]
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "a" / "deep")
    assert len(list_shards(str(tmp_path / "a" / "linked"))) == 1
    assert len(list_shards(f"{tmp_path}/**/*.tar")) >= 2
    for split in ("train", "val"):
        write_shard(tmp_path / "set" / split / "0.tar", [("a.jpg", b"x"), ("a.txt", b"a")])
    with pytest.raises(UserError, match="holds train and val: name one of them"):
        list_shards(str(tmp_path / "set"))


def test_what_is_no_tar_file_is_named(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "folder" / "0.tar").mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "0.tar")
    (tmp_path / "packed").mkdir()
    write_shard(tmp_path / "0.tar", [("a.jpg", b"x"), ("a.txt", b"a")])
    (tmp_path / "packed" / "0.tar.gz").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    for source, message in {
        "folder": "0.tar: is a folder; pack it", "folder/0.tar": "0.tar: is a folder", "pipe": "not an ordinary file",
        "pipe/0.tar": "not an ordinary file", "packed": r"0\.tar\.gz is compressed: unpack it",
        "packed/0.tar.gz": "is compressed: unpack it",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            pairs_of(tmp_path / source, tmp_path / "cache")


@pytest.mark.parametrize("size", [-512, 2**40, 2**80, 10_000])
def test_a_member_of_impossible_size(size: int, tmp_path: Path) -> None:
    """A negative size would send tarfile back to the same member for ever."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("a.jpg", "a.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    content = bytearray(buffer.getvalue())
    sign = 0x80 if size >= 0 else 0xFF
    content[124:136] = bytes([sign]) + (size % 256**11).to_bytes(11, "big")
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"0\.tar: a corrupted or truncated tar"):
        pairs_of(tmp_path, tmp_path / "cache")


def test_pipes_do_not_hold_a_reader(tmp_path: Path) -> None:
    """Opening one would wait for a writer for ever."""
    from accelerando.data.folders import read_index
    from accelerando.inference.runs import read_json
    from accelerando.train.checkpoint_folders import MANIFEST, find_damage

    for name in ("a.npz", "rows.txt", "config.json", MANIFEST):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="not an ordinary file"):
        read_clip(tmp_path / "a.npz", "X")
    with pytest.raises(UserError, match="not an ordinary file"):
        read_index(tmp_path / "rows.txt", {"a": 0})
    with pytest.raises(UserError, match="not an ordinary file"):
        read_json(tmp_path / "config.json")
    assert find_damage(tmp_path) == f"{MANIFEST} is missing or corrupted"


def test_a_pattern_that_stands_for_too_many_names() -> None:
    assert expand_braces("a{08..10}.{x,y}") == [f"a{n}.{s}" for n in ("08", "09", "10") for s in "xy"]
    for pattern in ("{0..999999999}.tar", "{a,b}" * 40):
        with pytest.raises(UserError, match="more than 100,000 names"):
            expand_braces(pattern)


# --------------------------------------------------------------------------------------------------- caption tables


def test_image_names_in_any_spelling(tmp_path: Path) -> None:
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    (photos / "red").mkdir(parents=True)
    elsewhere.mkdir()
    for path in (photos / "red" / "a.jpg", photos / "b c.jpg", elsewhere / "d.jpg"):
        path.write_bytes(path.name.encode())
    (photos / "linked").symlink_to(elsewhere)
    names = ["red/a.jpg", "./red/a.jpg", "red\\a.jpg", " b c.jpg ", str(photos / "b c.jpg"), "linked/d.jpg",
             "../elsewhere/d.jpg", "red//a.jpg"]  # fmt: skip
    rows = [{"image": name, "caption": f"caption {number}"} for number, name in enumerate(names)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = TablePairs(str(tmp_path / "rows.jsonl"), photos)
    found = [pairs.read(row)[0].decode() for row in range(len(pairs))]
    assert found == ["a.jpg", "a.jpg", "a.jpg", "b c.jpg", "b c.jpg", "d.jpg", "d.jpg", "a.jpg"]
    (tmp_path / "bad.csv").write_text("image,caption\nred/a.jpg,x\nred/b.jpg,y\n")
    with pytest.raises(UserError, match=r"row 2: no image red/b\.jpg .*did you mean red/a\.jpg"):
        TablePairs(str(tmp_path / "bad.csv"), photos)


# ------------------------------------------------------------------------------------------------------------ clips


def header(text: str) -> bytes:
    body = text.encode().ljust(118 - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def spoilt() -> bytes:
    content = bytearray(npz(X=np.random.default_rng(0).random((50, 156), np.float32)))
    content[300:340] = bytes(40)
    return bytes(content)


def encrypted() -> bytes:
    content = bytearray(npz(X=np.ones((5, 156), np.float32)))
    for magic, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(magic) + flags] |= 1
    return bytes(content)


CLIPS = {
    "complex": (npz(X=np.ones((5, 156), np.complex64)), "complex64"),
    "timedelta": (npz(X=np.ones((5, 156), "m8[s]")), "timedelta64"),
    "huge": (archive(X=header("{'descr': '<f4', 'fortran_order': False, 'shape': (100000000, 156), }")), "claims 62,400"),
    "lying": (archive(X=header("{'descr': '<f4', 'fortran_order': False, 'shape': (9, 156), }") + b"1234"), "but 4 follow"),
    "negative": (archive(X=header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 156), }")), "claims the shape"),
    "code": (archive(X=header("{'descr': __import__('os'), 'shape': (1,)}")), "not a readable NPZ"),
    "encrypted": (encrypted(), "it is encrypted"),
    "spoilt": (spoilt(), "cannot be read|not a readable NPZ"),
    "npy": (npy(np.ones((5, 156))), "a single array, as np.save writes it"),
    "pickle": (b"\x80\x04K\x01.", "a pickle, which is never loaded"),
    "objects": (npz(X=np.array([{}], object)), "Python objects"),
    "empty": (b"", "the file is empty"),
    "words": (b"no archive", "no zip archive"),
    "cut": (npz(X=np.ones((5, 156)))[:-30], "corrupted or truncated"),
    "no_width": (npz(X=np.ones((5, 0), np.float32)), r"\[5, 0\]"),
    "text_mask": (npz(X=np.ones((5, 156)), mask=np.full((5, 78), "x")), "mask is <U1"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLIPS)
def test_clips_that_cannot_be_used_say_why(name: str, tmp_path: Path) -> None:
    content, message = CLIPS[name]
    path = tmp_path / "clip.npz"
    path.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        read_clip(path, "X")
    assert str(caught.value).startswith(f"{path}: ")
    assert any(problem.severity == "error" for problem in inspect_clip(path, width=None).problems)
    assert time.monotonic() - started < 5


def test_a_clip_of_many_zeros_is_not_unpacked(tmp_path: Path) -> None:
    """Compressed a thousand times, it would fill the memory."""
    rows = MOST_BYTES // (156 * 4) + 1
    content = header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, 156), }}") + bytes(1000)
    (tmp_path / "a.npz").write_bytes(archive(X=content))
    with pytest.raises(UserError, match="at most 536,870,912 are read"):
        read_clip(tmp_path / "a.npz", "X")


def test_no_two_threads_parse_a_header_at_once(tmp_path: Path, monkeypatch) -> None:
    """numpy parses it with ast, whose count of its own depth is lost where two threads do (cpython issue 106905)."""
    path, inside, most = tmp_path / "a.npz", [], []
    path.write_bytes(npz(X=np.ones((5, 156), np.float32)))
    parse = np.lib.format.read_array_header_1_0

    def watched(file: io.BytesIO) -> tuple:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return parse(file)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", watched)
    with ThreadPoolExecutor(4) as pool:
        for frames, _ in pool.map(lambda _: read_clip(path, "X"), range(16)):
            assert frames.shape == (5, 156)
            assert (frames == 1).all()
    assert len(most) == 16
    assert max(most) == 1


def test_arrays_are_read_as_numpy_does(tmp_path: Path) -> None:
    arrays = {
        "by_columns": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "big_endian": np.arange(4, dtype=">i4"),
        "text": np.array(["a", "bc"]),
        "scalar": np.array(3),
        "nothing": np.ones((5, 0), np.float32),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    with open_npz(tmp_path / "a.npz") as file:
        for name, array in arrays.items():
            read = file.read(name)
            assert read.dtype == array.dtype
            assert np.array_equal(read, array)
            assert read.flags.writeable


def test_a_gloss_number_beyond_reason(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(npz(X=np.ones((5, 156))))
    (tmp_path / "labels.csv").write_text("file,gloss,cat\na,999999999,0\n")
    with pytest.raises(
        UserError, match=r"gloss 999999999 in line 2 of .*; classes count from 0, without gaps, to 99,999"
    ):
        report_problems(label_problems(read_labels(tmp_path / "labels.csv"), tmp_path), print)
    splits = synthetic_clips(156, 3, 2, 0)
    for row in ("²,a,0,x", "999999999999999999999999,a,0,x", "one,a,0,x"):
        (tmp_path / "names.csv").write_text(f"gloss,label,cat,category\n{row}\n")
        with pytest.raises(UserError, match=r"names\.csv: row 1 \(line 2\): gloss is .*, not a whole number"):
            class_names(splits, tmp_path, str(tmp_path / "names.csv"), None, None)


# ------------------------------------------------------------------------------------- configs, paths, checkpoints


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
        ), "more than 20,000 values"),
        ("a: &a\n  b: *a\n", "more than 20,000 values"),
        ("a: &a {k: 1}\nb: &b {<<: [*a,*a,*a,*a,*a,*a,*a,*a,*a]}\n" + "".join(
            f"{b}: &{b} {{<<: [{','.join(['*' + a] * 9)}]}}\n" for a, b in zip("bcdefgh", "cdefghi", strict=True)
        ), "more than 20,000 values"),
        ("a: " + "[" * 5000, "nested too deeply|invalid YAML"),
        ("lr: 1\nlr: 2\n", "line 1: 'lr' occurs twice"),
        ("a: 2001-99-99\n", "invalid YAML .*month"),
        ("a: !!int x\n", "invalid YAML"),
        ("a: !!python/object/apply:os.system [x]\n", "line 1: invalid YAML"),
        ("a: \x00\n", "invalid YAML"),
    ],
)  # fmt: skip
def test_configs_that_would_fill_the_memory_or_mean_nothing(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(content)
    started = time.monotonic()
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "a.yaml")
    assert time.monotonic() - started < 5


def test_anchors_of_a_config_still_work(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {lr: 0.1}\ntraining:\n  <<: *base\n  epochs: 3\n")
    assert read_yaml(tmp_path / "a.yaml")["training"] == {"lr": 0.1, "epochs": 3}


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_refuses(seed: int) -> None:
    from scripts.text_classify import Args

    with pytest.raises(UserError, match=f"--seed {seed}: (at least 0|between 0 and 4294967295)"):
        check_ranges(Args(seed=seed))


def test_a_path_of_more_than_255_bytes(train_here, capsys) -> None:
    with pytest.raises(SystemExit) as ended, errors_in_one_line():
        train_here("--train_file", "x" * 300 + ".json")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot use {'x' * 300}.json: File name too long")


@pytest.mark.parametrize("line", [b'{"kind": "x\xda"}', b"[1]", b"1", b"{}", b'{"kind": '])
def test_a_history_that_is_none(line: bytes, tmp_path: Path) -> None:
    from accelerando.train.tracking import read_history

    (tmp_path / "metrics.jsonl").write_bytes(line + b'\n{"kind": "test", "step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: not a row of metrics"):
        read_history(tmp_path, "test")


def test_folders_that_only_look_like_checkpoints(tmp_path: Path) -> None:
    for name in ("step_000010", "step_²", "step_٣", "step_1e3", "step_"):
        (tmp_path / name).mkdir()
    assert [path.name for path in step_folders(tmp_path)] == ["step_000010"]


# ------------------------------------------------------------------------------------------------------------- URLs


@pytest.fixture
def slow_server(monkeypatch):
    """A server that trickles: its answer's head, endless 100 Continue, or a body of a byte every 0.1 s."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(inputs, "PATIENCE", 0.6)
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        kind = connection.recv(4096).split()[1].decode()
        try:
            if kind != "/continue":
                end = b"Content-Length: 1000\r\n\r\n" if kind == "/body" else b"X-Long: "
                connection.sendall(b"HTTP/1.1 200 OK\r\n" + end)
            while True:
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" if kind == "/continue" else b"a")
                time.sleep(0.1)
        except OSError:
            connection.close()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


@pytest.mark.parametrize(
    ("kind", "reason"), [("head", "timed out"), ("continue", "timed out"), ("body", "less than 1 kB")]
)
def test_a_server_that_trickles_does_not_hold_a_fetch(kind: str, reason: str, slow_server: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=reason):
        inputs.fetch(f"{slow_server}/{kind}")
    assert time.monotonic() - started < 3


@pytest.fixture
def silent_server(monkeypatch):
    """A server that answers requests for /good with two bytes, and no others."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/good":
                ended.wait(20)
                return
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    ended.set()
    server.shutdown()


def test_urls_of_a_dead_server_in_a_row_cost_little(silent_server: str, monkeypatch) -> None:
    """Three have the whole time, the others a tenth of it, until the server answers; other servers have theirs."""
    monkeypatch.setattr(inputs, "PATIENCE", 1.0)
    servers = inputs.Servers()

    def seconds(url: str, reason: str = "") -> float:
        started = time.monotonic()
        if reason:
            with pytest.raises(ValueError, match=f"^{reason}$"):
                inputs.fetch(url, servers)
        else:
            assert inputs.fetch(url, servers) == b"ok"
        return time.monotonic() - started

    dead, hurried = (
        f"http://{silent_server}/dead",
        "timed out in 0.1 of the usual time, which is all after 3 time-outs .*",
    )
    assert all(seconds(f"{dead}/{number}", "timed out") >= 1 for number in range(3))
    assert sum(seconds(f"{dead}/{number}", hurried) for number in range(10)) < 4  # of 10 s
    assert seconds(f"http://localhost:{silent_server.split(':')[1]}/dead", "timed out") >= 1  # another name
    assert seconds(f"http://me:x@{silent_server}/good") < 0.5
    assert seconds(dead, "timed out") >= 1


def test_dead_urls_do_not_delay_those_behind_them(silent_server: str, monkeypatch) -> None:
    """Through the threads of predict.py, in order; each dead one is named with its reason."""
    monkeypatch.setattr(inputs, "PATIENCE", 2.0)
    host = f"http://{silent_server}"
    names = [f"{host}/dead/{number}" for number in range(40)] + [f"{host}/good"]
    saved = SimpleNamespace(config=SimpleNamespace(model_type="vit"))
    model = SimpleNamespace(
        model=saved, prepare=lambda content: torch.full((1,), len(content)), label_names=["a"], takes_videos=False
    )
    monkeypatch.setattr(answers, "image_logits", lambda opened, pixels, tta, amp, frames: pixels.float())
    started = time.monotonic()
    found = list(answers.image_answers(model, names, answers.Computing(8, 4)))
    assert time.monotonic() - started < 10  # 2 + 9 * 0.2 s; 20 without the bound
    assert [name for batch in found for name in batch.names] == names
    faults = [fault for batch in found for fault in batch.faults]
    assert all(fault.startswith("timed out") for fault in faults[:-1]) and faults[-1] is None
    assert torch.equal(found[-1].logits, torch.tensor([[2.0]]))


def test_a_server_that_trickles_does_not_hold_a_listing(slow_server: str, monkeypatch) -> None:
    from accelerando.data import remote

    monkeypatch.setattr(remote, "PATIENCE", 0.5)
    monkeypatch.setattr(remote, "TRIES", 2)
    for kind in ("head", "continue"):
        with pytest.raises(UserError, match="failed 2 times"):
            remote.list_remote(f"{slow_server}/{kind}")
