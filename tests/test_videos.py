"""Videos: the right frames, read quickly; turned, of a variable rate, truncated, without a picture; folders of frames."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from made_data import make_video

from accelerando.data.media import even_positions, frame_files, frames_of, jittered_positions, open_folders
from accelerando.data.videos import read_frames


def grey(count: int, side: int = 32) -> list[np.ndarray]:
    """Frames whose grey level is their number."""
    return [np.full((side, side, 3), number, np.uint8) for number in range(count)]


def shown(path: Path, positions: list[float]) -> list[int]:
    """The grey levels of the frames at ``positions``."""
    return [int(frame.pixels[5, 5, 0]) for frame in read_frames(path, positions)]


@pytest.mark.parametrize(
    ("name", "codec", "gop"),
    [("a.mp4", "libx264", 250), ("b.mp4", "libx264", 12), ("c.avi", "mpeg4", 12), ("d.mkv", "libx264", 25),
     ("e.webm", "libvpx", 30), ("f.mov", "mpeg4", 50)],
)  # fmt: skip
@pytest.mark.parametrize("frames", [1, 3, 8, 40])
def test_the_frames_are_those_of_a_whole_decoding(name: str, codec: str, gop: int, frames: int, tmp_path: Path) -> None:
    path = make_video(tmp_path / name, grey(200), rate=25, codec=codec, gop=gop)
    with av.open(str(path)) as container:
        every = [int(frame.to_ndarray(format="rgb24")[5, 5, 0]) for frame in container.decode(video=0)]
    rng = np.random.default_rng(frames)
    for positions in (even_positions(frames), jittered_positions(frames, rng)):
        assert shown(path, positions) == [every[int(position * 200)] for position in positions]


def test_with_a_variable_rate_positions_are_times(tmp_path: Path) -> None:
    """The first five frames last a tenth of the time, the last five the rest."""
    path = tmp_path / "variable.mkv"
    times = [0, 1, 2, 3, 4, 10, 20, 30, 40, 50]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for pixels, when in zip(grey(10), times, strict=True):
            frame = av.VideoFrame.from_ndarray(20 * pixels, format="rgb24")
            frame.pts, frame.time_base = when, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found = [round(level / 20) for level in shown(path, [0.0, 0.05, 0.3, 0.5, 0.7])]
    duration = 50 + 1
    expected = [
        max(n for n, when in enumerate(times) if when <= share * duration) for share in (0.0, 0.05, 0.3, 0.5, 0.7)
    ]
    assert np.abs(np.array(found) - expected).max() <= 1
    assert found[0] == 0 and found[-1] >= 7  # by number, 0.7 would be the seventh frame at second 3


@pytest.mark.parametrize(("rotation", "corner"), [(90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))])
def test_a_turned_phone_video_is_upright(rotation: int, corner: tuple[int, int], tmp_path: Path) -> None:
    """A white corner at the top left is where the turned image has it."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:12, :12] = 255
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(rotation)
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    (frame,) = read_frames(path, [0.5])
    assert frame.pixels.shape[:2] == ((48, 32) if abs(rotation) == 90 else (32, 48))
    places = {
        (row, column): int(frame.pixels[4 * row or 3, 4 * column or 3, 0]) for row in (0, -1) for column in (0, -1)
    }
    assert max(places, key=places.get) == corner


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.mkv", grey(200), rate=25).read_bytes()
    (tmp_path / "short.mkv").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("hello" * 100)
    (tmp_path / "pointer.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    mp4 = make_video(tmp_path / "whole.mp4", grey(60)).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(mp4[: len(mp4) * 2 // 3])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for name, words in {
        "short.mkv": r"ends after \d\.\d of 8\.0 seconds",
        "text.mp4": "no video stream|not a video",
        "pointer.mp4": "git-LFS pointer",
        "cut.mp4": "no video stream|not a video",
        "sound.mp4": "no video stream",
    }.items():
        with pytest.raises(ValueError, match=words):
            read_frames(tmp_path / name, even_positions(8))
    with pytest.raises(FileNotFoundError):
        read_frames(tmp_path / "none.mp4", [0.0])


def test_a_folder_of_frames_is_a_video(tmp_path: Path) -> None:
    """Its frames are in the order of their numbers; without the flag each is an image of its own."""
    from PIL import Image

    for name in ("walk", "run"):
        place = tmp_path / name / "clip"
        place.mkdir(parents=True)
        for number in range(12):
            Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(place / f"frame{number}.png")
    media = open_folders(tmp_path, whole_folders=True)["train"]
    assert media.names.to_pylist() == ["run/clip", "walk/clip"]
    assert [file.name for file in frame_files(tmp_path / "walk" / "clip")][:3] == [
        "frame0.png",
        "frame1.png",
        "frame2.png",
    ]
    assert len(frames_of(media.open(0), even_positions(4))) == 4
    assert len(open_folders(tmp_path)["train"]) == 24
