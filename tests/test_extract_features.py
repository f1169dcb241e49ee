"""tools/extract_features.py: the right frames at the right times, features as torchvision's model gives them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from harness import ROOT, kill, launch, start
from PIL import Image

from accelerando.base.errors import UserError

TOOL = ROOT / "tools" / "extract_features.py"
CODECS = {".mp4": "libx264", ".mov": "libx264", ".avi": "mjpeg", ".mkv": "ffv1", ".webm": "libvpx"}
PIXELS = {".avi": "yuvj420p", ".mkv": "bgr0"}  # what .mkv holds here is exact
STEP = 8  # levels of grey between two frames of `write_video`


def greys(count: int) -> list[np.ndarray]:
    """Frames each of which is lighter than the last, up to number 31."""
    return [np.full((48, 64, 3), STEP * min(number, 31), np.uint8) for number in range(count)]


def write_video(
    path: Path, frames: int | list[np.ndarray], rate: int = 30, times: list[int] | None = None, rotation: float = 0,
    **options: str,
) -> Path:  # fmt: skip
    """A video, of :func:`greys` where a number is given. ``times`` are in ms."""
    if isinstance(frames, int):
        frames = greys(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(CODECS[path.suffix.lower()], rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = PIXELS.get(path.suffix, "yuv420p")
        if rotation:
            stream.set_display_rotation(rotation)
        if times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels)
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_frames(folder: Path, frames: int | list[np.ndarray], name: str = "frame_{}.png") -> Path:
    """A folder of pictures, as :func:`write_video`; their numbers have no leading zeros."""
    if isinstance(frames, int):
        frames = greys(frames)
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(frames):
        Image.fromarray(pixels).save(folder / name.format(number))
    return folder


def blobs(count: int, size: tuple[int, int] = (299, 299)) -> list[np.ndarray]:
    """Random blobs, (width, height): frames that an untrained network tells apart."""
    small = np.random.default_rng(0).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC)) for one in small]


class Stub(torch.nn.Module):
    """Instead of Inception where its numbers do not matter: the mean of red, 2048 times; keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2048)
        torch.nn.init.zeros_(self.linear.bias)
        self.linear.weight.data = torch.tensor([[1.0, 0.0, 0.0]]).repeat(2048, 1)
        self.seen: list[torch.Tensor] = []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen.append(pixels)
        return self.linear(pixels.mean((2, 3)))


def numbers(features: np.ndarray) -> list[int]:
    """Which frame of `write_video` each row of the stub's features comes from."""
    assert features.dtype == np.float32 and features.shape[1] == 2048
    return np.rint((features[:, 0] * 0.229 + 0.485) * 255 / STEP).astype(int).tolist()


@pytest.fixture(scope="session")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """torchvision's own model, classifiers and all, with weights that keep the scale; and its state dict in a file."""
    from torchvision.models import inception_v3

    torch.manual_seed(1)
    model = inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(model.state_dict(), path)
    return model, path


def reference(model: torch.nn.Module, frames: list[np.ndarray]) -> np.ndarray:
    """What goes into the classifier of torchvision's model, frame by frame."""
    from torchvision.transforms.v2 import functional

    kept: list[torch.Tensor] = []
    handle = model.avgpool.register_forward_hook(lambda *call: kept.append(call[2].flatten(1)))
    with torch.inference_mode():
        for frame in frames:
            pixels = functional.resize(torch.from_numpy(frame.copy()).permute(2, 0, 1), [299, 299], antialias=True)
            model(functional.normalize(pixels.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None])
    handle.remove()
    return torch.cat(kept).numpy()


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool as a module, in ``tmp_path``."""
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("extract_features", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "extract_features", module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


Run = Callable[..., dict[str, np.ndarray]]


@pytest.fixture
def run(tool: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run(*flags) -> the NPZ file's arrays``, or of several by name: the tool's ``main`` in this process."""

    def call(*flags: object, output: str = "out") -> dict[str, Any]:
        target = [] if {"--add_to", "--output_dir"} & set(flags) else ["--output_dir", output]
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, flags), *target, "--device", "cpu"])
        tool.main()
        files = {path.stem: dict(np.load(path, allow_pickle=False)) for path in Path(output).glob("*.npz")}
        return next(iter(files.values())) if len(files) == 1 else files

    return call


@pytest.fixture
def stub(tool: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run`` with :class:`Stub` in the place of Inception, which is ``stub.model``."""
    model = Stub()
    monkeypatch.setattr(tool, "build_model", lambda *_: model)

    def call(*flags: object, **options: Any) -> dict[str, Any]:
        return run(*flags, *([] if "--weights" in flags else ["--random_weights"]), **options)

    call.model = model
    return call


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob("*.draft"))


# ------------------------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("suffix", [*CODECS, ".frames"])
@pytest.mark.parametrize(
    ("count", "rate", "fps", "expected"),
    [
        (21, 30, 15, list(range(0, 21, 2))),
        (4, 10, 30, [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]),
        (23, 30, 30, list(range(23))),
        (24, 24, 24, list(range(24))),
    ],
)
def test_constant_rates(stub, tmp_path, suffix, count, rate, fps, expected) -> None:
    """Also where the container rounds every time to a whole millisecond, as .mkv and .webm do."""
    if suffix == ".frames":
        source = write_frames(tmp_path / "clip", count)
    else:
        source = write_video(tmp_path / f"clip{suffix}", count, rate)
    found = stub(source, "--fps", fps, "--frame_rate_of_frames", rate)
    assert numbers(found["X2048"]) == expected
    assert found["timestamps_ms"].dtype == np.int64
    assert found["timestamps_ms"].tolist() == [row * 1000 // fps for row in range(len(expected))]
    meta = json.loads(str(found["meta"]))
    assert meta["frames_read"] == count and meta["frames_kept"] == len(set(expected))
    assert (meta["video"], meta["target_fps"], meta["out_size"]) == (source.name, fps, 299)
    assert meta["weights"] == "random" and set(found) == {"X2048", "timestamps_ms", "meta"}


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_variable_rate(stub, tmp_path, suffix) -> None:
    times = [0, 30, 100, 130, 400, 1000]
    found = stub(write_video(tmp_path / f"clip{suffix}", 6, times=times), "--fps", "10")
    # 700 is as near to 400 as to 1000: the earlier one.
    assert numbers(found["X2048"]) == [0, 2, 3, 4, 4, 4, 4, 4, 5, 5, 5]
    assert found["timestamps_ms"].tolist() == list(range(0, 1001, 100))


def test_a_fraction_of_a_rate_is_exact(stub, tmp_path) -> None:
    found = stub(write_frames(tmp_path / "clip", 6), "--fps", "29.97", "--frame_rate_of_frames", "29.97")
    assert numbers(found["X2048"]) == list(range(6))
    assert found["timestamps_ms"].tolist() == [0, 33, 66, 100, 133, 166]


def test_one_frame_is_a_clip(stub, tmp_path) -> None:
    assert numbers(stub(write_video(tmp_path / "clip.mp4", 1), "--fps", "5")["X2048"]) == [0]


def test_numbers_are_not_sorted_as_words(stub, tmp_path) -> None:
    folder = write_frames(tmp_path / "clip", 12, name="{}.png")
    Image.new("RGB", (8, 8), "red").save(folder / "cover.png")
    (folder / "._3.png").write_bytes(b"of a Mac")
    assert numbers(stub(folder)["X2048"]) == list(range(12))


# ---------------------------------------------------------------------------------------------------------- features


def test_features_are_those_of_torchvision(run, inception, tmp_path) -> None:
    model, weights = inception
    frames = blobs(2)
    expected = reference(model, frames)
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    write_frames(tmp_path / "in" / "pictures", frames)
    write_video(tmp_path / "in" / "lossless.mkv", frames)
    found = run("in", "--weights", weights)
    for clip in ("pictures", "lossless"):
        assert np.abs(found[clip]["X2048"] - expected).max() < 1e-5
        meta = json.loads(str(found[clip]["meta"]))
        assert meta["weights"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_batches_and_threads_change_nothing(run, inception, tmp_path) -> None:
    for number in range(2):
        write_video(tmp_path / "in" / f"{number}.mkv", blobs(4)[number : number + 3])
    base = run("in", "--weights", inception[1], "--batch_size", "2", "--num_workers", "0")
    other = run("in", "--weights", inception[1], "--batch_size", "1", "--num_workers", "2", output="other")
    assert set(base) == set(other) == {"0", "1"}
    for clip, arrays in base.items():
        assert np.abs(arrays["X2048"] - other[clip]["X2048"]).max() < 1e-5
        assert all(np.array_equal(arrays[key], other[clip][key]) for key in ("timestamps_ms", "meta"))


def test_a_frame_is_resized_whole(stub, tmp_path) -> None:
    from torchvision.transforms.v2 import functional

    frame = blobs(1, (320, 180))[0]
    stub(write_frames(tmp_path / "clip", [frame]))
    pixels = (
        functional.resize(torch.from_numpy(frame.copy()).permute(2, 0, 1), [299, 299], antialias=True).float() / 255
    )
    expected = functional.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    # On some machines one of the two resizes in floats: a level of 255, 0.018 after normalisation.
    assert (stub.model.seen[0][0] - expected).abs().max() < 0.02


@pytest.mark.parametrize("angle", [90, -90, 180])
def test_a_video_is_turned_as_it_says(stub, tmp_path, angle) -> None:
    frame = np.zeros((64, 64, 3), np.uint8)
    frame[:32, :32] = 255
    stub(write_video(tmp_path / "clip.mp4", [frame] * 2, rotation=angle))
    red = stub.model.seen[0][0, 0]
    corners = [[red[40, 40], red[40, -40]], [red[-40, 40], red[-40, -40]]]
    assert np.array_equal(np.array(corners) > 0, np.rot90(frame[16::32, 16::32, 0], angle // 90) > 0)


def test_amp_and_seed_have_an_effect(stub, tool, tmp_path) -> None:
    folder = write_frames(tmp_path / "clip", 3)
    plain, half = stub(folder)["X2048"], stub(folder, "--amp", "bf16", output="half")["X2048"]
    assert 0 < np.abs(plain - half).max() < 0.02
    spec = importlib.util.spec_from_file_location("unpatched", TOOL)
    sys.modules["unpatched"] = fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    first, again, other = (fresh.build_model(None, seed, torch.device("cpu")).state_dict() for seed in (1, 1, 2))
    name = "Mixed_7c.branch1x1.conv.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


def test_weights_of_a_file_are_used(run, inception, tmp_path, capsys) -> None:
    """Also from safetensors, with what DataParallel puts before the names, and without classifiers."""
    from safetensors.torch import save_file

    folder = write_frames(tmp_path / "clip", blobs(1))
    one = run(folder, "--weights", inception[1])["X2048"]
    kept = {k: v for k, v in inception[0].state_dict().items() if not k.startswith(("fc.", "AuxLogits."))}
    save_file({f"module.{key}": value.contiguous() for key, value in kept.items()}, "copy.safetensors")
    assert np.array_equal(run(folder, "--weights", "copy.safetensors", output="b")["X2048"], one)
    assert "RANDOM" not in capsys.readouterr().out
    assert np.abs(run(folder, "--random_weights", output="c")["X2048"] - one).max() > 0.1
    assert "RANDOM weights (seed 42)" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- resume, failures


def test_finished_clips_are_skipped(stub, tmp_path, capsys) -> None:
    write_video(tmp_path / "in" / "a.mp4", 3)
    stub("in")
    before = Path("out/a.npz").stat()
    write_video(tmp_path / "in" / "deep" / "b.MP4", 4)
    assert numbers(stub("in")["b"]["X2048"]) == [0, 1, 2, 3]
    assert "1 clips, 4 frames, 1 skipped (done before)" in capsys.readouterr().out
    stub("in")
    assert "nothing to do: the features of all 2 clips are in out" in capsys.readouterr().out
    after = Path("out/a.npz").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    with pytest.raises(UserError, match=r"out/a\.npz was made with target_fps 30, not 15: --overwrite redoes it"):
        stub("in", "--fps", "15")
    assert numbers(stub("in", "--fps", "15", "--overwrite")["b"]["X2048"]) == [0, 2]


@pytest.mark.launch
def test_a_killed_run_leaves_no_half_file(tmp_path) -> None:
    for number in range(30):
        write_frames(tmp_path / "in" / f"c{number:02d}", 2)
    flags = ["in", "--output_dir", "out", "--random_weights", "--fps", "15", "--device", "cpu"]
    process = start(TOOL, *flags, cwd=tmp_path)
    ended = time.monotonic() + 240
    while len(list(tmp_path.glob("out/*.npz"))) < 1 and process.poll() is None and time.monotonic() < ended:
        time.sleep(0.02)
    kill(process, signal.SIGKILL)
    found = list(tmp_path.glob("out/*.npz"))
    assert 1 <= len(found) < 30
    for path in found:
        assert np.load(path)["X2048"].shape == (1, 2048)


def test_a_file_is_written_whole_or_not_at_all(stub, tmp_path, monkeypatch) -> None:
    write_frames(tmp_path / "clip", 2)
    write_array = np.lib.format.write_array

    def fail(file: Any, array: np.ndarray, **options: Any) -> None:
        write_array(file, array[:1], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(OSError, match="No space"):
        stub("clip")
    assert not list(Path("out").iterdir())


def test_a_stale_draft_is_cleared_away(stub, tmp_path) -> None:
    write_frames(tmp_path / "clip", 2)
    old, young = Path(f"out/.clip.npz.{2**22 + 1}-ab.draft"), Path(f"out/.clip.npz.{os.getpid()}-ab.draft")
    Path("out").mkdir()
    for path in (old, young):  # of a run that was killed, and of one that is at work
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    stub("clip")
    assert leftovers(tmp_path) == [tmp_path / young]


def test_damaged_videos_are_named_and_the_others_done(stub, tmp_path, capsys) -> None:
    folder = tmp_path / "in"
    write_video(folder / "good.mp4", 3)
    whole = write_video(folder / "b_front.mp4", blobs(60, (320, 240)), movflags="faststart").read_bytes()
    (folder / "b_front.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    whole = write_video(folder / "c_cut.webm", 20).read_bytes()
    (folder / "c_cut.webm").write_bytes(whole[: len(whole) // 2])
    (folder / "d_text.avi").write_text("no video")
    (folder / "e_empty.mkv").write_bytes(b"")
    frames = write_frames(folder / "f_frames", 3)
    (frames / "frame_1.png").write_bytes(b"no picture")
    write_frames(folder / "g_two", 2, name="a{}.png")
    write_frames(folder / "g_two", 2, name="b{}.png")
    for workers in ("0", "3"):
        with pytest.raises(UserError, match="6 of 7 clips failed" if workers == "0" else "6 of 6 clips failed"):
            stub("in", "--num_workers", workers)
        lines = sorted(capsys.readouterr().err.splitlines())
        assert [line.split(": ")[:2] for line in lines] == [
            ["failed", f"in/{name}"]
            for name in ("b_front.mp4", "c_cut.webm", "d_text.avi", "e_empty.mkv", "f_frames", "g_two")
        ]
        assert any(reason in lines[0] for reason in ("damaged at", "cut off", "Invalid data"))  # as FFmpeg sees it
        assert "cut off: 0.1 of 0.7 s" in lines[1] and "Invalid data" in lines[2]
        assert "its header is corrupted" in lines[4] and "a1.png and b0.png are not of one series" in lines[5]
        assert [path.name for path in Path("out").iterdir()] == ["good.npz"]


def test_decoding_does_not_run_far_ahead(stub, tool, tmp_path, monkeypatch) -> None:
    """Nothing grows with the length of a video but its features."""
    from accelerando.data import decode

    for name in "ab":
        write_frames(tmp_path / "in" / name, 40)
    original, extract, lock = decode.decode_image, tool.extract, threading.Lock()
    ahead, most = 0, 0

    def counted(file: bytes) -> torch.Tensor:
        nonlocal ahead, most
        with lock:
            ahead += 1
            most = max(most, ahead)
        return original(file)

    def slow(model: Any, frames: torch.Tensor, *rest: Any) -> np.ndarray:
        nonlocal ahead
        time.sleep(0.01)
        with lock:
            ahead -= len(frames)
        return extract(model, frames, *rest)

    monkeypatch.setattr(decode, "decode_image", counted)
    monkeypatch.setattr(tool, "extract", slow)
    found = stub("in", "--batch_size", "2", "--num_workers", "2")
    assert numbers(found["a"]["X2048"]) == numbers(found["b"]["X2048"]) == [min(n, 31) for n in range(40)]
    assert ahead == 0 and most <= 2 * (2 * 2 + 2 + 1)  # the queue, a batch in each thread's hands, and one in use


def test_an_error_ends_the_threads(stub, tool, tmp_path, monkeypatch) -> None:
    write_frames(tmp_path / "clip", 40)

    def fail(*_: Any) -> None:
        raise UserError("the model returns NaN; its weights are corrupted")

    monkeypatch.setattr(tool, "extract", fail)
    with pytest.raises(UserError, match="NaN"):
        stub("clip", "--batch_size", "1")
    assert not [thread for thread in threading.enumerate() if "work" in thread.name]
    assert not list(Path("out").iterdir())


# ------------------------------------------------------------------------------------------------------------- add_to


def write_npz(path: Path, times: list[int], **more: Any) -> dict[str, bytes]:
    """A file of keypoints as preprocessing makes it; the bytes of its members."""
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(times))
    arrays = {
        "X": rng.random((len(times), 156), np.float32), "mask": np.ones((len(times), 78), bool),
        "timestamps_ms": np.array(times, np.int64), "meta": np.array(json.dumps({"video": "0.MOV", "target_fps": 30})),
        **more,
    }  # fmt: skip
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
    return members(path)


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_features_are_added_to_files(stub, tmp_path, capsys) -> None:
    write_video(tmp_path / "in" / "a b.mp4", 20)
    write_video(tmp_path / "in" / "c.mkv", 10, rate=10)
    before = {
        "a b": write_npz(tmp_path / "kp" / "a b.npz", [0, 33, 66, 100, 100, 400, 900]),
        "c": write_npz(tmp_path / "kp" / "c.npz", [100, 149, 151], extra=np.array([{"any": 1}], object)),
    }
    os.chmod(tmp_path / "kp" / "c.npz", 0o640)
    stub("in", "--add_to", "kp")
    for name, rows in {"a b": [0, 1, 2, 3, 3, 12, 19], "c": [1, 1, 2]}.items():
        path = Path("kp") / f"{name}.npz"
        after = members(path)
        with np.load(path, allow_pickle=False) as file:
            assert numbers(file["X2048"]) == rows and len(file["X2048"]) == len(file["timestamps_ms"])
            assert json.loads(str(file["X2048_meta"]))["weights"] == "random"
        del after["X2048.npy"], after["X2048_meta.npy"]
        assert after == before[name]
    assert Path("kp/c.npz").stat().st_mode & 0o777 == 0o640
    capsys.readouterr()
    stub("in", "--add_to", "kp")
    assert "nothing to do" in capsys.readouterr().out
    stamp = Path("kp/c.npz").stat().st_mtime_ns
    stub("in", "--add_to", "kp", "--overwrite")
    assert Path("kp/c.npz").stat().st_mtime_ns > stamp and len(members(Path("kp/c.npz"))) == 7
    assert not leftovers(tmp_path)


def test_files_that_do_not_fit_are_left_as_they_are(stub, tmp_path, capsys) -> None:
    faults = {
        "a": ([0, 9000], {}, "timestamps_ms of kp/a.npz go to 9.0 s, the video to 0.1 s"),
        "b": ([0, 33], {"timestamps_ms": None}, "kp/b.npz: no array 'timestamps_ms'"),
        "c": ([0, 33], {"X": np.zeros((3, 156), np.float32)}, "kp/c.npz: 3 rows of X, but 2 of timestamps_ms"),
        "d": ([33, 0], {}, "kp/d.npz: timestamps_ms are no rising whole numbers"),
        "e": ([0, 33], {}, "kp/e.npz: no zip archive"),
        "f": ([0, 33], {}, "kp/f.npz: No such file"),
        "g": ([0, 33, 66], {}, ""),
    }
    before = {}
    for name, (times, more, _) in faults.items():
        write_video(tmp_path / "in" / f"{name}.mp4", 4)
        before[name] = write_npz(tmp_path / "kp" / f"{name}.npz", times, **more)
    Path("kp/e.npz").write_bytes(b"no NPZ")
    Path("kp/f.npz").unlink()
    with pytest.raises(UserError, match="6 of 7 clips failed"):
        stub("in", "--add_to", "kp")
    lines = sorted(capsys.readouterr().err.splitlines())
    for line, (name, (_, _, message)) in zip(lines, faults.items(), strict=False):
        assert line.startswith(f"failed: in/{name}.mp4: ") and message in line, line
        assert name in "ef" or members(Path(f"kp/{name}.npz")) == before[name]
    assert "X2048.npy" in members(Path("kp/g.npz")) and not leftovers(tmp_path)
    # Keypoints are never written over, not even when asked.
    with pytest.raises(UserError, match=r"kp/a\.npz also holds X, mask: --add_to kp adds features to such files"):
        stub("in", "--output_dir", "kp", "--overwrite")


# ----------------------------------------------------------------------------------------------------------- messages


def test_a_missing_decoder_is_one_line(stub, tmp_path, monkeypatch) -> None:
    write_video(tmp_path / "in" / "a.mp4", 2)
    write_frames(tmp_path / "clip", 2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError) as caught:
        stub("in")
    assert str(caught.value) == "reading videos needs PyAV: pip install av"
    assert numbers(stub("clip")["X2048"]) == [0, 1]


def test_missing_weights_are_one_line(run, tmp_path, monkeypatch) -> None:
    write_frames(tmp_path / "clip", 1)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        run("clip")
    assert "the weights cannot be downloaded" in str(caught.value) and "--weights" in str(caught.value)
    assert "\n" not in str(caught.value) and not list(Path("hub").rglob("*.pth"))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def test_bad_weights_are_one_line(run, tmp_path) -> None:
    write_frames(tmp_path / "clip", 1)
    torch.save({"Conv2d_1a_3x3.conv.weight": Evil()}, "evil.pth")
    torch.save({"layer1.weight": torch.zeros(2)}, "other.pth")
    torch.save([1, 2], "list.pth")
    Path("cut.safetensors").write_bytes(b"x" * 50)
    for name, message in {
        "evil.pth": "not a weights file (it is damaged, or holds a Python object, posix.mkdir",
        "list.pth": "no state dict in it", "cut.safetensors": "truncated or not",
        "other.pth": "not of torchvision's Inception v3 (it has no Conv2d_1a_3x3.conv.weight)",
        "none.pth": "no such file", "clip": "is a folder",
    }.items():  # fmt: skip
        with pytest.raises(UserError) as caught:
            run("clip", "--weights", name)
        assert str(caught.value).startswith(f"--weights {name}: {message}") and "\n" not in str(caught.value)
    assert not Path("pwned").exists()


def test_weights_of_another_shape_are_one_line(run, inception, tmp_path) -> None:
    write_frames(tmp_path / "clip", 1)
    state = dict(inception[0].state_dict())
    state["Conv2d_1a_3x3.conv.weight"] = torch.zeros(32, 1, 3, 3)
    torch.save(state, "grey.pth")
    with pytest.raises(UserError, match="size mismatch for Conv2d_1a_3x3") as caught:
        run("clip", "--weights", "grey.pth")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["clips/a.mp5"], "clips/a.mp5: no such file or folder: did you mean clips/a.mp4?"),
        (["nowhere"], "nowhere: no such file or folder"),
        (["empty"], "empty: no video in it (.mp4 .mov .avi .mkv .webm), nor numbered images"),
        (["words.txt"], "words.txt: a video ends in"),
        (["twins"], "twins/a.mp4 and twins/b/a.mov would both make a.npz"),
        (["clips", "--fps", "0"], "--fps 0.0: between 0.001 and 1000"),
        (["clips", "--frame_rate_of_frames", "0"], "--frame_rate_of_frames 0.0: between"),
        (["clips", "--batch_size", "0"], "--batch_size 0: at least 1"),
        (["clips", "--add_to", "nowhere"], "--add_to nowhere: no such folder"),
        (["clips", "--add_to", "empty"], "--add_to empty: no NPZ file of a clip's name in it (a.npz is looked for)"),
        (["clips", "--add_to", "empty", "--output_dir", "out"], "give --output_dir"),
        (["clips", "--add_to", "empty", "--fps", "15"], "--fps has no effect with --add_to"),
        (["clips", "--output_dir", "words.txt"], "--output_dir words.txt: File exists"),
        (["clips", "--weights", "x.pth"], "--weights and --random_weights: give one of them"),
        (["clips", "--output_dir", "broken"], "broken/a.npz: no NPZ file; --overwrite replaces it"),
        (["clips", "--batchsize", "3"], "unknown flag --batchsize: did you mean --batch_size?"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, flags, message) -> None:
    write_video(tmp_path / "clips" / "a.mp4", 1)
    write_video(tmp_path / "twins" / "a.mp4", 1)
    write_video(tmp_path / "twins" / "b" / "a.mov", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.npz").write_bytes(b"")
    (tmp_path / "words.txt").write_text("a")
    with pytest.raises(UserError) as caught:
        run(*flags, "--random_weights")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not leftovers(tmp_path) and not list(tmp_path.glob("out/*"))


@pytest.mark.launch
def test_the_command(tmp_path) -> None:
    write_video(tmp_path / "in" / "a.mp4", 2)
    (tmp_path / "in" / "bad.mp4").write_bytes(b"x")
    flags = ["--output_dir", "out", "--random_weights", "--fps", "1", "--device", "cpu"]
    done = launch(TOOL, "in", *flags, cwd=tmp_path, check=False)
    assert done.code == 2 and (tmp_path / "out" / "a.npz").is_file()
    assert done.err.splitlines() == [
        "failed: in/bad.mp4: Invalid data found when processing input",
        "error: 1 of 2 clips failed; they are named above",
    ]
    assert len(done.out.splitlines()) == 2
