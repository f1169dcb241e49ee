"""Decoded pictures kept as pixels: the same numbers as from the files, made anew when they have to be."""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import accelerando.data.image_cache
from accelerando.base.errors import UserError
from accelerando.data.decode import evaluation_side
from accelerando.data.folders import ImageFiles
from accelerando.data.image_cache import CachedImages, cached_images
from accelerando.data.images import EvaluationImages, ImageAugmentation, TrainingImages

SIZE = 32
SIDE = evaluation_side(SIZE)  # 37


def photo(height: int, width: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Colours that say where in the picture they are, and a little grain."""
    rng = np.random.default_rng(seed)
    rows, columns = np.linspace(0, 235, height)[:, None], np.linspace(0, 235, width)[None]
    pixels = np.stack(np.broadcast_arrays(rows, columns, 235 - (rows + columns) / 2), axis=2)
    pixels = pixels + rng.uniform(0, 20, (height, width, 1))
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


# Larger than the side in several scales of a JPEG, just as large, smaller, long; other formats and colours.
PICTURES = {
    "a.jpg": ((150, 200), "RGB"), "b.jpg": ((600, 451), "RGB"), "c.jpg": ((37, 90), "RGB"), "d.jpg": ((20, 24), "RGB"),
    "e.jpg": ((80, 44), "L"), "f.jpg": ((100, 90), "CMYK"), "g.png": ((60, 200), "RGBA"), "h.png": ((36, 38), "RGB"),
    "i.jpg": ((38, 400), "RGB"), "j.png": ((37, 37), "P"),
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, (name, (size, mode)) in enumerate(PICTURES.items()):
        photo(*size, number, mode).save(folder / name, quality=93)
    names = list(PICTURES)[::-1]  # not in the order of the cache
    return ImageFiles(folder, pa.array(names, pa.large_string()), np.arange(len(names)) % 2)


def make(files: ImageFiles, tmp_path: Path, side: int = SIDE, **options: int) -> CachedImages:
    return cached_images({"train": files}, side, tmp_path / "cache", **options)["train"]


def same_evaluation(files: ImageFiles, cached: CachedImages) -> bool:
    one, other = EvaluationImages(files, SIZE), EvaluationImages(cached, SIZE)
    return all(torch.equal(one[row]["pixel_values"], other[row]["pixel_values"]) for row in range(len(files)))


def test_evaluation_is_the_same_bit_for_bit(files: ImageFiles, tmp_path: Path) -> None:
    cached = make(files, tmp_path)
    assert same_evaluation(files, cached)
    assert [EvaluationImages(cached, SIZE)[row]["label"] for row in range(10)] == files.classes.tolist()
    shapes = {name: cached.decoded(row).pixels.shape for row, name in enumerate(files.names.to_pylist())}
    assert shapes["a.jpg"] == (37, 48, 3)
    assert shapes["d.jpg"] == (20, 24, 3)  # a smaller one takes no more room than it needs
    # Mapped, not copied; and neither a shared mapping nor its copies go to a worker.
    assert np.shares_memory(cached.decoded(3).pixels, cached.decoded(3).pixels)
    assert not cached.decoded(3).pixels.flags.writeable
    assert len(pickle.dumps(cached)) < 5000
    assert same_evaluation(files, pickle.loads(pickle.dumps(cached)))
    # Nobody decodes: the files could be away.
    shutil.rmtree(files.folder)
    assert all(EvaluationImages(cached, SIZE)[row]["valid"] for row in range(10))


def test_training_crops_are_those_of_the_files(files: ImageFiles, tmp_path: Path) -> None:
    cached = make(files, tmp_path)
    settings = (ImageAugmentation(0.2), (SIZE,))
    one, other = TrainingImages(files, *settings), TrainingImages(cached, *settings)
    for row in range(len(files)):
        for epoch in range(6):
            first, second = (data.at(row, epoch)["pixel_values"].float() for data in (one, other))
            # A crop elsewhere has other colours: half of a picture to the side is 117 away. One is cut at whole
            # pixels, which are large where there are 37 of them.
            assert (first.mean((1, 2)) - second.mean((1, 2))).abs().max() < 5
            assert (first - second).abs().mean() < 8
    plain = ImageAugmentation(crop_scale=1, flip=0)
    for row in range(len(files)):
        pixels = [TrainingImages(source, plain, (SIZE,)).at(row, 0)["pixel_values"] for source in (files, cached)]
        assert torch.equal(*pixels)


def test_a_larger_side_keeps_more_detail_and_evaluation_as_it_is(files: ImageFiles, tmp_path: Path) -> None:
    small, large = make(files, tmp_path), make(files, tmp_path, side=120)
    assert small.cache != large.cache
    settings = (ImageAugmentation(0.05), (SIZE,))
    row = files.names.to_pylist().index("b.jpg")
    expected, *found = (
        torch.stack([TrainingImages(source, *settings).at(row, epoch)["pixel_values"] for epoch in range(12)]).float()
        for source in (files, small, large)
    )
    errors = [(pixels - expected).abs().mean() for pixels in found]
    assert errors[1] < 0.7 * errors[0]
    assert same_evaluation(files, large)


def test_made_once_and_again_when_a_picture_changes(files: ImageFiles, tmp_path: Path, monkeypatch) -> None:
    read = []
    shrink = accelerando.data.image_cache._shrink
    monkeypatch.setattr(
        accelerando.data.image_cache, "_shrink", lambda side, path: read.append(path) or shrink(side, path)
    )
    first = make(files, tmp_path)
    assert len(read) == len(set(read)) == 10
    # Other splits of the same pictures, as other folds have them, share it.
    some = {"train": np.arange(0, 7), "validation": np.arange(5, 10)}
    splits = {
        split: ImageFiles(files.folder, files.names.take(pa.array(rows)), files.classes[rows])
        for split, rows in some.items()
    }
    folds = cached_images(splits, SIDE, tmp_path / "cache")
    assert {split: len(images) for split, images in folds.items()} == {"train": 7, "validation": 5}
    assert {images.cache for images in folds.values()} == {first.cache}
    assert all(same_evaluation(splits[split], images) for split, images in folds.items())
    assert len(read) == 10

    path = files.path(4)
    photo(90, 70, 99).save(path)
    second = make(files, tmp_path)
    assert second.cache != first.cache
    assert len(read) == 20
    assert same_evaluation(files, second)
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert make(files, tmp_path).cache not in (first.cache, second.cache)
    assert make(files, tmp_path, side=50).side == 50


@pytest.mark.parametrize("damage", ["short", "gone", "cut index", "other index", "no archive"])
def test_a_damaged_cache_is_made_again(damage: str, files: ImageFiles, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    cache = make(files, tmp_path).cache
    if damage == "short":
        os.truncate(cache / "pixels.bin", (cache / "pixels.bin").stat().st_size - 1)
    elif damage == "gone":
        (cache / "pixels.bin").unlink()
    elif damage == "cut index":
        os.truncate(cache / "starts.npy", 0)
    elif damage == "other index":
        shapes = np.load(cache / "shapes.npy")
        shapes[2, 0] += 1
        np.save(cache / "shapes.npy", shapes)
    else:
        (cache / "shapes.npy").write_bytes(b"no array at all")
    logging.getLogger("accelerando").propagate = True
    cached = make(files, tmp_path)
    assert cached.cache == cache
    assert same_evaluation(files, cached)
    assert [record.message for record in caplog.records if "is corrupted and will be made again" in record.message]
    assert sorted(path.name for path in cache.iterdir()) == ["pixels.bin", "shapes.npy", "starts.npy"]


def test_of_several_at_once_one_makes_it(files: ImageFiles, tmp_path: Path, monkeypatch) -> None:
    read = []
    shrink = accelerando.data.image_cache._shrink
    monkeypatch.setattr(
        accelerando.data.image_cache, "_shrink", lambda side, path: read.append(path) or shrink(side, path)
    )
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: make(files, tmp_path), range(4)))
    assert len(read) == 10
    assert len({cached.cache for cached in found}) == 1
    assert all(same_evaluation(files, cached) for cached in found)


def test_a_killed_one_leaves_nothing_that_is_taken_for_whole(files: ImageFiles, tmp_path: Path, monkeypatch) -> None:
    child = os.fork()
    if not child:
        picture = accelerando.data.decode.DecodedImage(np.ones((37, 50, 3), np.uint8), (74, 100))
        calls = iter([picture, picture])
        accelerando.data.image_cache._shrink = lambda side, path: (
            next(calls, None) or os.kill(os.getpid(), signal.SIGKILL)
        )
        make(files, tmp_path)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left = {path.suffix for path in (tmp_path / "cache" / "images").iterdir()}
    assert left == {".draft", ".lock"}
    cached = make(files, tmp_path)
    assert same_evaluation(files, cached)
    assert {path.suffix for path in cached.cache.parent.iterdir()} == {"", ".lock"}


def test_unreadable_pictures_are_those_without_a_cache(files: ImageFiles, tmp_path: Path) -> None:
    for row, content in ((0, b"no picture"), (5, files.path(5).read_bytes()[:200]), (9, b"")):
        files.path(row).write_bytes(content)
    cached = make(files, tmp_path)
    plain, kept = (EvaluationImages(source, SIZE) for source in (files, cached))
    assert [kept[row]["valid"] for row in range(10)] == [float(row not in (0, 5, 9)) for row in range(10)]
    assert same_evaluation(files, cached)
    for row in (0, 5, 9):
        assert kept.problem(row) == plain.problem(row)
        assert str(files.path(row)) in kept.problem(row)
        assert TrainingImages(cached, ImageAugmentation(), (SIZE,)).at(row, 0)["valid"] == 0
    none = ImageFiles(files.folder, files.names.take(pa.array([0, 9])), files.classes[:2])
    assert make(none, tmp_path).decoded(1) is None


def test_several_processes_make_the_same(files: ImageFiles, tmp_path: Path, monkeypatch) -> None:
    one = make(files, tmp_path).cache
    monkeypatch.setattr(accelerando.data.image_cache, "FEW", 2)
    other = cached_images({"all": files}, SIDE, tmp_path / "other", workers=2)["all"].cache
    for name in ("pixels.bin", "starts.npy", "shapes.npy"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_no_room_is_one_line(files: ImageFiles, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
        with pytest.raises(
            UserError, match=r"--cache_dir .*0\.0 GB are free.*free some space or name another"
        ) as error:
            make(files, tmp_path)
        assert "\n" not in str(error.value)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"--cache_dir .*No space left on device.*name another folder"):
            make(files, tmp_path)
    assert [path.suffix for path in (tmp_path / "cache" / "images").iterdir()] == [".lock"]
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"--cache_dir .*taken: .*name a folder that is writable"):
        cached_images({"train": files}, SIDE, tmp_path / "taken")


def test_what_will_be_large_is_said_beforehand(files: ImageFiles, tmp_path: Path, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    logging.getLogger("accelerando").propagate = True
    paths = [str(files.path(row)) for row in range(10)]
    expected = accelerando.data.image_cache.expected_size(paths, SIDE)
    monkeypatch.setattr(accelerando.data.image_cache, "LARGE", 1000)
    cached = make(files, tmp_path)
    assert expected == pytest.approx((cached.cache / "pixels.bin").stat().st_size, rel=0.05)
    said = [record.message for record in caplog.records]
    assert said[0].startswith("The decoded images will take about")
    assert said[-1].startswith("Decoded images are cached in")
    buffer = io.BytesIO()
    photo(740, 740).save(buffer, "JPEG")
    files.path(0).write_bytes(buffer.getvalue())
    assert accelerando.data.image_cache.expected_size(paths[:1], SIDE) == pytest.approx(37 * 37 * 3)
