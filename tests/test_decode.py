"""Image files of every kind as they are shown: turned, with their contrast, and nothing but images is opened."""

from __future__ import annotations

import importlib.util
import io
import logging
import re
import struct
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from harness import ROOT
from PIL import Image

from accelerando.data.decode import (
    decode,
    decode_crop,
    decode_for_evaluation,
    decode_image,
    decode_pixels,
    header_size,
    middle_of,
    pixels_of,
    resize_and_crop,
    resize_shorter,
    to_tensor,
    upper_part,
)
from accelerando.data.duplicates import duplicate_groups, fingerprint
from accelerando.data.folders import ImageFiles
from accelerando.data.image_cache import cached_images
from accelerando.data.images import EvaluationImages, ImageAugmentation, TrainingImages
from accelerando.data.transforms import ImageTransform


def content(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def smooth(height: int = 64, width: int = 96) -> Image.Image:
    """Colours by which every corner of an image is known."""
    coarse = np.random.default_rng(3).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def load_tool(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------ orientation

STORED = {  # how an image is stored that is shown upright with this orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip
KINDS = {
    "JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {},
    "AVIF": {"quality": 95},
}  # fmt: skip


def turned_file(kind: str, orientation: int, image: Image.Image, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(STORED[orientation]) if orientation > 1 else image
    return content(stored, kind, exif=exif, **KINDS[kind], **options)


def test_every_orientation_of_every_format_is_turned() -> None:
    upright = np.asarray(smooth()).astype(int)
    files = {(kind, tag): turned_file(kind, tag, smooth()) for kind in KINDS for tag in range(1, 9)}
    # Not at the end of the file: a JPEG with a thumbnail after it is read by Pillow.
    files |= {("JPEG and more", tag): files["JPEG", tag] + b"more" for tag in range(1, 9)}
    for (kind, tag), file in files.items():
        found = decode(file)
        assert found.size == found.pixels.shape[:2] == (64, 96), (kind, tag)
        assert np.abs(found.pixels - upright).mean() < 4, (kind, tag)
        if tag > 1:  # the tag changes what is seen
            assert np.abs(decode_pixels(turned_file("PNG", 1, smooth()))[::-1] - upright).mean() > 20


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_and_scales_of_a_turned_jpeg_are_those_of_the_shown_image(orientation: int) -> None:
    image = smooth(400, 600)
    file, upright = turned_file("JPEG", orientation, image), content(image, "PNG")
    boxes = [(0, 0, 64, 64), (40, 300, 200, 250), (330, 20, 70, 60)]
    for box in boxes:
        expected = decode_crop(upright, 48, lambda *_, box=box: box).float()
        for sound in (False, True):  # True: the lower rows of a JPEG may be left undecoded
            found = decode_crop(file, 48, lambda *sides, box=box: box if sides == (400, 600) else None, sound)
            assert (found - expected).abs().mean() < 4
    for read in (lambda source: decode_for_evaluation(source, 32), ImageTransform(32), decode_image):
        assert (read(file).float() - read(upright).float()).abs().mean() < 4
    assert pixels_of(file, 90).shape == (100, 150, 3)


def test_an_orientation_in_xmp_counts_and_corrupted_exif_does_not() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    file = content(smooth().transpose(STORED[6]), "JPEG", xmp=xmp, quality=95)
    assert decode(file).size == (64, 96)
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12", b"Exif\0\0\x01\x12 no TIFF at all"):
        assert decode_pixels(content(smooth(), "JPEG", exif=exif)).shape == (64, 96, 3)
    for tag in (0, 9):
        exif = Image.Exif()
        exif[0x0112] = tag
        assert decode_pixels(content(smooth(), "JPEG", exif=exif)).shape == (64, 96, 3)


def test_training_cache_evaluation_and_fingerprints_see_turned_images(tmp_path: Path) -> None:
    names = ["upright.png", *(f"{tag}.jpg" for tag in range(2, 9))]
    for name in names:
        image = smooth(200, 300)
        file = content(image, "PNG") if name == "upright.png" else turned_file("JPEG", int(name[0]), image)
        (tmp_path / name).write_bytes(file)
    files = ImageFiles(tmp_path, pa.array(names), np.zeros(len(names), np.int64))
    cached = cached_images({"all": files}, 37, tmp_path / "cache")["all"]
    for source in (files, cached):
        evaluation = [EvaluationImages(source, 32)[row]["pixel_values"].float() for row in range(len(names))]
        training = TrainingImages(source, ImageAugmentation(0.2), (32,))
        assert all((pixels - evaluation[0]).abs().mean() < 4 for pixels in evaluation)
        for row in range(len(names)):
            same = TrainingImages(
                ImageFiles(tmp_path, pa.array([names[0]] * 9), np.zeros(9)), ImageAugmentation(0.2), (32,)
            )
            for epoch in (0, 1):  # the second time the file is known to be sound
                found, expected = training.at(row, epoch)["pixel_values"], same.at(row, epoch)["pixel_values"]
                assert (found.float() - expected.float()).abs().mean() < 9  # a cache's pixels are larger
    prints = [fingerprint(decode_pixels((tmp_path / name).read_bytes())) for name in names]
    assert duplicate_groups(prints, 4).tolist() == [0] * len(names)


def test_the_cache_of_earlier_pixels_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerando.data.image_cache as module

    (tmp_path / "a.png").write_bytes(content(smooth(), "PNG"))
    names = pa.array(["a.png"])
    now = module.fingerprint(tmp_path, names, 37)
    monkeypatch.setattr(module, "VERSION", 1)
    assert module.fingerprint(tmp_path, names, 37) != now


# -------------------------------------------------------------------------------------------- depth and transparency


def png(depth: int, colour: int, rows: list[bytes], width: int, key: bytes = b"") -> bytes:
    """A PNG of any bit depth, with a transparent colour ``key``."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = chunk(b"IHDR", head) + (chunk(b"tRNS", key) if key else b"") + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def grey_of(file: bytes) -> list[int]:
    """The first row, which is grey."""
    pixels = decode_pixels(file)
    assert (pixels == pixels[:, :, :1]).all()
    assert torch.equal(decode_image(file), to_tensor(pixels))
    return pixels[0, :, 0].tolist()


LEVELS = np.array([[0, 257, 1000, 32768, 65535]])


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("PNG", LEVELS.astype(np.uint16), [0, 1, 4, 128, 255]),
        ("TIFF", LEVELS.astype(np.uint16), [0, 1, 4, 128, 255]),
        ("TIFF", LEVELS.astype(">u2"), [0, 1, 4, 128, 255]),
        ("TIFF", LEVELS.astype(np.int32), [0, 1, 4, 128, 255]),
        ("PPM", LEVELS.astype(np.int32), [0, 1, 4, 128, 255]),
        ("TIFF", np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 128, 255]),
        ("TIFF", np.array([[0, 0.25, 0.5, 1]], np.float32), [0, 64, 128, 255]),
        ("TIFF", np.array([[0, 1, 200.4, 255]], np.float32), [0, 1, 200, 255]),
    ],
    ids=["16-bit PNG", "16-bit TIFF", "big-endian TIFF", "32-bit TIFF", "16-bit PGM", "full 32 bits", "unit floats", "floats to 255"],
)  # fmt: skip
def test_deep_grey_levels_keep_their_contrast(kind: str, values: np.ndarray, expected: list[int]) -> None:
    assert grey_of(content(Image.fromarray(values), kind)) == expected


@pytest.mark.parametrize("values", [[-1, 0.5], [0, 255.5], [0, float("nan")], [0, float("inf")]], ids=str)
def test_floats_without_a_known_range_are_refused(values: list[float]) -> None:
    file = content(Image.fromarray(np.array([values], np.float32)), "TIFF")
    with pytest.raises(ValueError, match=r"grey levels go from .* expected 0 to 1 or 0 to 255: save it with") as error:
        decode_pixels(file)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="expected 0 or more"):
        decode_pixels(content(Image.fromarray(np.array([[-5, 9]], np.int32)), "TIFF"))


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (png(1, 0, [b"\x55"], 8, b"\0\1"), [0, 255] * 4),  # white is transparent, black is drawn
        (png(1, 0, [b"\x55"], 8, b"\0\0"), [0, 255] * 4),  # black is transparent: white needs another ground
        (png(2, 0, [b"\x1b"], 4, b"\0\1"), [0, 255, 170, 255]),
        (png(4, 0, [b"\x02\x4f"], 4, b"\0\x02"), [0, 255, 68, 255]),
        (png(8, 0, [b"\x05\x09\xc8"], 3, b"\0\x09"), [5, 255, 200]),
        (png(16, 0, [b"\x01\x01\x05\x05\x80\x80"], 3, b"\x05\x05"), [1, 255, 128]),
        (png(16, 2, [b"\x01\x01" * 3 + b"\x05\x06" * 3], 2, b"\x05\x06" * 3), [1, 255]),
        (content(Image.new("LA", (1, 1), (40, 0)), "PNG"), [255]),
        (content(Image.fromarray(np.array([[[0, 0, 0, 255], [9, 9, 9, 0]]], np.uint8)), "PNG"), [0, 255]),
        (content(Image.fromarray(np.array([[[255] * 4, [255, 255, 255, 0]]], np.uint8)), "PNG"), [255, 0]),
    ],
)  # fmt: skip
def test_what_is_transparent_is_seen_on_white(file: bytes, expected: list[int]) -> None:
    assert grey_of(file) == expected


def test_a_transparent_palette_entry_is_white() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 10, 10, 200, 200, 200, 90, 90, 90])
    assert grey_of(content(image, "PNG", transparency=1)) == [10, 255, 90]
    assert grey_of(content(image, "GIF", transparency=2)) == [10, 200, 255]


def test_16_bit_images_are_no_copies_of_each_other(tmp_path: Path, call_tool) -> None:
    rng = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "raw" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.uniform(2000, 60_000, (6, 6)).astype(np.float32))
        values = np.asarray(coarse.resize((64, 64), Image.Resampling.BICUBIC)).clip(0, 65535).astype(np.uint16)
        Image.fromarray(values).save(folder / f"{number}.png")
    code, out, err = call_tool(load_tool("split_folds"), "--raw_data", tmp_path / "raw", "--folds", 2)
    assert (code, err) == (0, "")
    assert "duplicates" not in out


# -------------------------------------------------------------------------------------- what is opened, and how it fails


def test_a_file_that_poses_as_an_image_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call_tool) -> None:
    import subprocess

    from PIL import EpsImagePlugin  # which runs Ghostscript when it loads an image

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a program was started"))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    for read in (decode_pixels, decode_image, decode, lambda file: decode_crop(file, 8, lambda *_: (0, 0, 4, 4))):
        with pytest.raises(ValueError, match="PostScript, which is not read as an image"):
            read(script)
    for number in range(9):
        folder = tmp_path / "raw" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(content(smooth(40 + number, 50), "JPEG") if number else script)
    code, out, _ = call_tool(
        load_tool("split_folds"), "--raw_data", tmp_path / "raw", "--folds", 2, "--near_duplicates", 0
    )
    assert code == 0
    assert "raw/a/0.jpg: cannot be read: PostScript" in out + (tmp_path / "splits" / "skipped.txt").read_text()


def test_images_are_opened_in_one_place() -> None:
    """Everywhere else, Pillow would try every format that it knows. (tools/usage/ has programs of others.)"""
    sources = [path for folder in ("lib", "scripts") for path in (ROOT / folder).rglob("*.py")]
    sources += (ROOT / "tools").glob("*.py")
    found = [path.name for path in sources if re.search(r"Image\.open\(|\.open\(io\.BytesIO", path.read_text())]
    assert found == ["decode.py"]
    assert "pillow().open(io.BytesIO(file), formats=formats)" in (ROOT / "lib/accelerando/data/decode.py").read_text()


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"a HEIC image, which needs the package pillow-heif: pip install pillow-heif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "pillow-heif"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a git-LFS pointer, not the file itself"),
        (b"", "not an image, or its header is corrupted"),
        (b"<html>not found</html>", "not an image"),
        (content(smooth(), "AVIF")[:-40], "(?i)avif|decode|truncated|EOF"),
        (content(smooth(), "PNG")[:-400], "(?i)truncated|broken"),
        (content(smooth(), "WEBP")[:200], "(?i)webp|truncated|decod|not an image"),
        (content(smooth(), "TIFF")[:-9000], "(?i)truncated|decod"),
        (content(smooth(), "JPEG")[:-400], "truncated"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_has_its_reason(file: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it was not installed
    with pytest.raises(ValueError, match=reason) as error:
        decode_pixels(file)
    assert "\n" not in str(error.value)
    assert "BytesIO" not in str(error.value)


def test_heic_is_read_with_pillow_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package registers a reader under the name that the real one uses."""
    from PIL import PngImagePlugin

    class Heif(PngImagePlugin.PngImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self.fp = io.BytesIO(content(smooth(), "PNG"))
            super()._open()

    def register_heif_opener() -> None:
        Image.register_open("HEIF", Heif, lambda start: start[4:8] == b"ftyp")

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register_heif_opener))
    try:
        assert np.array_equal(decode_pixels(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), np.asarray(smooth()))
    finally:
        Image.OPEN.pop("HEIF", None)
        Image.ID.remove("HEIF")


def test_a_jpeg_without_a_frame_header_is_one_line() -> None:
    for damage in (b"\xff\xc0", b"\xff\xda"):
        file = content(smooth(), "JPEG").replace(damage, b"\x00" + damage[1:], 1)
        for read in (decode_pixels, header_size):
            with pytest.raises(ValueError, match="its header is corrupted"):
                read(file)


def test_damage_of_any_kind_is_a_reason_and_no_crash() -> None:
    rng = np.random.default_rng(1)
    for kind in (*KINDS, "GIF", "BMP", "PPM"):
        whole = content(smooth(), kind)
        for _ in range(25):
            file = bytearray(whole[: int(rng.integers(8, len(whole)))] if rng.random() < 0.5 else whole)
            for at in rng.integers(0, len(file), 5).tolist():
                file[at] = int(rng.integers(256))
            try:
                pixels = decode_pixels(bytes(file))
            except ValueError as error:
                assert str(error) and "\n" not in str(error)
            else:
                assert pixels.dtype == np.uint8 and pixels.shape[2] == 3


# ---------------------------------------------------------------------------------------------------- JPEGs with warnings


def stray(file: bytes, before: bytes, extra: bytes = b"\0\x11\x22") -> bytes:
    """A JPEG with stray bytes before the last marker of a kind."""
    at = file.rindex(before)
    return file[:at] + extra + file[at:]


def webcam_jpegs() -> dict[str, tuple[bytes, bytes]]:
    """name -> (JPEG with stray bytes, the same without)."""
    plain = content(smooth(300, 200), "JPEG", quality=90)
    restarting = content(smooth(300, 200), "JPEG", quality=90, restart_marker_rows=4)
    grey = content(smooth(300, 200).convert("L"), "JPEG")
    return {
        "end": (stray(plain, b"\xff\xd9"), plain),
        "scan": (stray(plain, b"\xff\xda"), plain),
        "tables": (stray(plain, b"\xff\xdb"), plain),
        "restart": (stray(restarting, b"\xff\xd1"), restarting),
        "grey": (stray(grey, b"\xff\xd9"), grey),
        "JFIF 3": (plain.replace(b"JFIF\0\x01", b"JFIF\0\x03"), plain),
    }


@pytest.mark.parametrize("name", webcam_jpegs())
def test_stray_bytes_in_a_jpeg_change_nothing(name: str) -> None:
    file, plain = webcam_jpegs()[name]
    assert file != plain
    for side in (300, 50):
        assert np.array_equal(pixels_of(file, side), pixels_of(plain, side))
    box = (10, 20, 150, 120)
    for sound in (False, True):
        crops = [decode_crop(source, 100, lambda *_: box, sound) for source in (file, plain)]
        assert torch.equal(*crops)
    upper = upper_part(file, 300, 200, 100)
    assert upper is None or np.array_equal(upper[:100], decode_pixels(plain)[:100])


def test_tools_and_training_agree_on_every_file(tmp_path: Path, call_tool) -> None:
    """What split_folds takes, training, its cache and evaluation can read; what it leaves out has the same reason."""
    plain = content(smooth(300, 200), "JPEG", quality=90)
    middle = len(plain) // 2
    cases = {name: pair[0] for name, pair in webcam_jpegs().items()}
    cases |= {
        "half": plain[:middle] + b"\xff\xd9", "cut": plain[:middle], "hole": plain[:middle] + plain[middle + 300 :],
        "trailer": plain + b"more", "no end": plain[:-2], "cmyk": content(smooth().convert("CMYK"), "JPEG"),
        "deep": content(Image.fromarray(np.full((9, 9), -1.0, np.float32)), "TIFF"), "text": b"no image",
    }  # fmt: skip
    for number in range(8):  # enough images for the folds
        cases[f"{number}"] = content(smooth(100 + number, 120), "JPEG")
    for number, (name, file) in enumerate(cases.items()):
        folder = tmp_path / "raw" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jpg").write_bytes(file)
    code, _, err = call_tool(
        load_tool("split_folds"), "--raw_data", tmp_path / "raw", "--folds", 2, "--near_duplicates", 0
    )
    assert code == 0, err
    skipped = dict(
        line.split(": cannot be read: ") for line in (tmp_path / "splits/skipped.txt").read_text().splitlines()
    )
    names = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "raw").rglob("*.jpg"))
    files = ImageFiles(tmp_path, pa.array(names), np.zeros(len(names), np.int64))
    cached = cached_images({"all": files}, 37, tmp_path / "cache")["all"]
    for source in (files, cached):
        training, evaluation = TrainingImages(source, ImageAugmentation(), (32,)), EvaluationImages(source, 32)
        for row, name in enumerate(names):
            assert training.at(row, 0)["valid"] == evaluation[row]["valid"] == float(name not in skipped), name
            if name in skipped:
                assert training.problem(row) == f"{tmp_path / name}: {skipped[name]}"
    assert {Path(name).stem for name in skipped} >= {"half", "cut", "deep", "text"}
    assert {Path(name).stem for name in skipped}.isdisjoint({*webcam_jpegs(), "trailer", "cmyk"})
    assert "premature end" in skipped["raw/a/half.jpg"]


def test_make_shards_takes_what_training_reads(tmp_path: Path, call_tool) -> None:
    plain = content(smooth(300, 200), "JPEG", quality=90)
    cases = {
        "stray": stray(plain, b"\xff\xd9"), "plain": plain, "png": content(smooth(), "PNG"),
        "half": plain[: len(plain) // 2] + b"\xff\xd9",
    }  # fmt: skip
    (tmp_path / "photos").mkdir()
    for name, file in cases.items():
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(file)
        (tmp_path / "photos" / f"{name}.txt").write_text(f"a {name}")
    code, out, _ = call_tool(
        load_tool("make_shards"),
        "--images",
        tmp_path / "photos",
        "--output_dir",
        tmp_path / "shards",
        "--num_workers",
        0,
    )
    assert code == 0, out
    skipped = (tmp_path / "shards" / "skipped.txt").read_text().splitlines()
    assert len(skipped) == 1
    assert re.search(r"half.jpg: broken image \(.*premature end", skipped[0])


# ------------------------------------------------------------------------------------------------------ narrow images


@pytest.mark.parametrize("shape", [(2, 12_000), (12_000, 2), (3, 901), (20, 5001)])
def test_a_narrow_image_is_cut_before_it_is_enlarged(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerando.data.decode as module

    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (3, *shape), np.uint8))
    wholes = {mode: resize_shorter(pixels, 27, mode) for mode in ("bilinear", "bicubic")}
    sizes: list[int] = []
    original = module.resize
    monkeypatch.setattr(
        module, "resize", lambda pixels, size, mode: sizes.append(np.prod(size)) or original(pixels, size, mode)
    )
    for mode, whole in wholes.items():
        found = resize_and_crop(pixels, 24, 27, mode)
        assert max(sizes) <= 27 * 27 * 9
        top, left = (whole.shape[1] - 24) // 2, (whole.shape[2] - 24) // 2
        difference = (found.float() - whole[:, top : top + 24, left : left + 24].float()).abs()
        assert difference.mean() < 6  # the same place, up to a fraction of a pixel


def test_an_ordinary_image_is_not_cut() -> None:
    for shape in ((20, 160), (160, 20), (300, 9000), (224, 10_000), (7, 7)):
        rows, columns = middle_of(*shape, 224 if min(shape) >= 224 else 20)
        assert (rows, columns) == (slice(None), slice(None)) or min(shape) < 20


def test_a_saved_models_own_processor_gets_the_middle_of_a_narrow_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPImageProcessor

    from accelerando.inference.saved import SavedProcessor

    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    prepare = SavedProcessor(tmp_path)
    seen: list[tuple[int, int]] = []
    original = type(prepare.processor).__call__

    def watched(self: CLIPImageProcessor, images: list[Image.Image], **options: str) -> object:
        seen.append(images[0].size)
        return original(self, images, **options)

    monkeypatch.setattr(type(prepare.processor), "__call__", watched)
    output = prepare(content(Image.new("RGB", (3000, 2), "red"), "PNG"))
    assert seen == [(16, 2)]
    assert output.shape == (3, 32, 32)


def test_pillows_warnings_do_not_reach_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    import warnings

    from accelerando.data.decode import pillow

    logging.captureWarnings(False)
    pillow.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        decode_pixels(content(smooth(), "PNG"))
        with pytest.raises(ValueError):
            decode_pixels(content(smooth(), "TIFF")[:-9000])
    assert not seen
    assert capfd.readouterr() == ("", "")
