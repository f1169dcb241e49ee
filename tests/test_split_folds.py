"""tools/split_folds.py: the folds partition what is not test, classes hold their shares, copies and groups stay whole."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT, launch, start

from accelerando.base.errors import UserError
from accelerando.data.folders import read_class_folders, read_class_map, read_index

TOOL = ROOT / "tools" / "split_folds.py"


def scene(number: int, side: int = 48):
    """A PIL image unlike that of any other number: large random patches, smoothly joined."""
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 230, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side + side // 3, side), Image.Resampling.BICUBIC)


def save(image, path: Path, **settings: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **settings)
    return path


def make_raw(folder: Path, sizes: dict[str, int], first: int = 0) -> Path:
    """``raw`` with so many images in each class, some of them a folder deeper, with names of many kinds."""
    number = first
    for name, count in sizes.items():
        for index in range(count):
            place = folder / "raw" / name / ("a b/c" if index % 5 == 4 else "")
            suffix = ("png", "JPG", "webp")[index % 3]
            save(scene(number), place / f"{index:03d} – ü.{suffix}")
            number += 1
    return folder / "raw"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("split_folds", TOOL)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "split_folds", loaded)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def split(module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """``split(*flags) -> (out, err)``: the tool's ``main`` in this process, in ``tmp_path``, on ``raw``."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: object) -> tuple[str, str]:
        argv = [str(TOOL), "--raw_data", "raw", "--num_workers", "0", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", argv)
        capsys.readouterr()
        module.main()
        return tuple(capsys.readouterr())

    return run


def read_parts(splits: Path) -> tuple[list[str], list[list[str]]]:
    """(test, validation of each fold), after the folds were found to partition what is not test."""
    folds = sorted(splits.glob("fold_*_val.txt"), key=lambda path: int(path.name.split("_")[1]))
    assert [path.name for path in folds] == [f"fold_{number}_val.txt" for number in range(len(folds))]

    def lines(path: Path) -> list[str]:
        text = path.read_bytes().decode()
        assert text.endswith("\n") and "\r" not in text
        found = text[:-1].split("\n")
        assert found == sorted(set(found))
        return found

    validation = [lines(path) for path in folds]
    test = lines(splits / "test.txt") if (splits / "test.txt").exists() else []
    rest = sorted(name for part in validation for name in part)
    assert len(rest) == len(set(rest))
    assert not set(rest) & set(test)
    for number, part in enumerate(validation):
        assert lines(splits / f"fold_{number}_train.txt") == sorted(set(rest) - set(part))
    return test, validation


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sides(splits: Path) -> dict[str, int]:
    """Line -> number of its side, the test as -1."""
    test, validation = read_parts(splits)
    return {name: number for number, part in enumerate([test, *validation], -1) for name in part}


# ------------------------------------------------------------------------------------------------------------ shares


@pytest.mark.parametrize("seed", range(30))
def test_each_class_has_its_share_to_within_one(seed: int) -> None:
    from accelerando.data.splits import deal_folds

    rng = np.random.default_rng(seed)
    folds, share = int(rng.integers(2, 11)), float(rng.choice([0, 0.1, 0.15, 0.25]))
    totals = rng.integers(folds + 5, 80, rng.integers(2, 30))
    classes = rng.permutation(np.repeat(np.arange(len(totals)), totals))
    group = np.arange(len(classes))
    for _ in range(seed % 2 * len(classes) // 30):  # pairs within a class force nothing
        one = rng.integers(len(classes))
        group[rng.choice(np.flatnonzero(classes == classes[one]))] = group[one]
    side = deal_folds(classes, group, share, folds, rng)
    counts = np.zeros((folds + 1, len(totals)), int)
    np.add.at(counts, (side, classes), 1)
    assert (counts.sum(0) == totals).all()
    assert np.abs(counts[0] - totals * share).max() < 1
    assert np.abs(counts[1:] - totals * (1 - share) / folds).max() < 1
    assert counts[1:].min() > 0
    assert (counts[0].min() > 0) == (share > 0)
    assert np.ptp(counts[1:].sum(1)) <= 1
    assert abs(counts[0].sum() - len(classes) * share) <= 1
    assert all(len(np.unique(side[group == number])) == 1 for number in np.unique(group))


def test_the_files_and_the_table_say_the_same(split, tmp_path: Path) -> None:
    sizes = {"wasps": 17, "ants": 23, "bees, wild": 31}
    make_raw(tmp_path, sizes)
    out, err = split("--folds", 4)
    splits = tmp_path / "splits"
    test, validation = read_parts(splits)
    everything = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "raw").rglob("*.*")}
    assert set(test).union(*validation) == everything
    assert json.loads((splits / "classes.json").read_text()) == {"ants": 0, "bees, wild": 1, "wasps": 2}
    assert sorted(path.name for path in splits.iterdir()) == sorted(
        ["classes.json", "test.txt", *(f"fold_{n}_{side}.txt" for n in range(4) for side in ("train", "val"))]
    )
    for name, total in sizes.items():
        assert abs(sum(line.split("/")[1] == name for line in test) - 0.15 * total) < 1
        for part in validation:
            assert abs(sum(line.split("/")[1] == name for line in part) - 0.85 * total / 4) < 1
    rows = {line[:6].strip(): line.split() for line in out.splitlines()}
    assert int(rows["test"][1]) == len(test)
    for number, part in enumerate(validation):
        assert int(rows[f"fold {number}"][2]) == len(part)
        assert int(rows[f"fold {number}"][-1]) == 71 - len(test) - len(part)
    assert max(map(len, out.splitlines())) <= 80
    assert err == ""
    # What image_classify.py reads: the same numbers in every part.
    class_map = read_class_map(splits)
    for path in splits.glob("*.txt"):
        read = read_index(path, class_map)
        assert [class_map[name.split("/")[1]] for name in read.names.to_pylist()] == read.classes.tolist()
        assert all(read.path(row).is_file() for row in range(len(read)))


def test_the_seed_decides_and_not_the_order_of_the_file_system(split, tmp_path: Path, monkeypatch) -> None:
    make_raw(tmp_path, {"ants": 12, "bees": 15})
    split()
    first = files(tmp_path / "splits")
    walk, iterdir = os.walk, Path.iterdir
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((p, d, f[::-1]) for p, d, f in walk(*a, **k)))
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(iterdir(self), reverse=True)))
    split("--overwrite")
    assert files(tmp_path / "splits") == first
    split("--overwrite", "--random_state", 7)
    assert files(tmp_path / "splits") != first


@pytest.mark.launch
def test_workers_find_the_same(tmp_path: Path) -> None:
    make_raw(tmp_path, {"ants": 8, "bees": 9})
    (tmp_path / "raw" / "ants" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    for workers in (0, 2):
        done = launch(TOOL, "--raw-data", "raw/", "--k", "3", "--num_workers", str(workers),
                      "--output_dir", f"splits{workers}", cwd=tmp_path)  # fmt: skip
    assert "raw/ants/cut.jpg" in done.err
    assert files(tmp_path / "splits0") == files(tmp_path / "splits2")


# ------------------------------------------------------------------------------------------------- groups and copies


def test_groups_are_not_torn(split, tmp_path: Path) -> None:
    make_raw(tmp_path, {"ants": 40, "bees": 50})
    names = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "raw").rglob("*.*"))
    rng = np.random.default_rng(0)
    groups = {name: f"camera {rng.integers(25)}" for name in names}
    rows = [f'"{name if n % 2 else name[4:]}","{groups[name]}"' for n, name in enumerate(names)]
    (tmp_path / "groups.csv").write_text("\n".join(["file,group", *rows]) + "\n", encoding="utf-8")
    split("--groups", "groups.csv", "--folds", 3)
    side = sides(tmp_path / "splits")
    assert sorted(side) == names
    assert len({(groups[name], side[name]) for name in names}) == len(set(groups.values()))
    counts = [sum(side[name] == number and "/ants/" in name for name in names) for number in range(3)]
    assert np.abs(np.array(counts) - 0.85 * 40 / 3).max() < 4
    # One that is not in the table is named, with how many there are.
    (tmp_path / "groups.csv").write_text("\n".join(["file,group", *rows[:-3]]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"groups\.csv: no row for {names[-3]} and 2 more of 90 images"):
        split("--groups", "groups.csv", "--overwrite")
    (tmp_path / "groups.csv").write_text("\n".join(["file,group", *rows, f'"{names[0]}",other']), encoding="utf-8")
    with pytest.raises(UserError, match="is in group 'camera") as caught:
        split("--groups", "groups.csv", "--overwrite")
    assert "\n" not in str(caught.value)


def copies_of(image) -> dict[str, bytes]:
    from PIL import ImageEnhance

    def encoded(image, kind: str, **settings: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **settings)
        return buffer.getvalue()

    small = image.resize((image.width // 2, image.height // 2))
    return {
        "same.bmp": encoded(image, "BMP"),
        "again.jpg": encoded(image, "JPEG", quality=60),
        "small.png": encoded(small, "PNG"),
        "brighter.png": encoded(ImageEnhance.Brightness(image).enhance(1.1), "PNG"),
    }


def test_copies_stay_on_one_side(split, tmp_path: Path) -> None:
    make_raw(tmp_path, {"ants": 30, "bees": 30})
    kinds = ("same.bmp", "again.jpg", "small.png", "brighter.png")
    for number in range(8):
        image = scene(1000 + number, 120)
        save(image, tmp_path / "raw" / "ants" / f"original{number}.png")
        for kind, data in copies_of(image).items():
            (tmp_path / "raw" / "ants" / f"original{number}.{kind}").write_bytes(data)
    out, err = split()
    side = sides(tmp_path / "splits")
    for number in range(8):
        assert len({side[f"raw/ants/original{number}.{kind}"] for kind in ("png", *kinds)}) == 1
    assert "8 groups of duplicates (40 images, up to 5 in one) are each on one side:\n" in out
    assert max(map(len, out.splitlines())) <= 80
    assert err == ""
    blocks = (tmp_path / "splits" / "duplicates.txt").read_text().split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == ["# 5 images, nearly the same"] * 8
    assert sum(len(block.splitlines()) - 1 for block in blocks) == 40
    # Without the search for near ones only those with the same pixels are left.
    out, _ = split("--near_duplicates", 0, "--overwrite")
    assert "8 groups of duplicates (16 images, up to 2 in one)" in out
    assert "# 2 images, the same pixels" in (tmp_path / "splits" / "duplicates.txt").read_text()


def test_copies_in_two_classes_are_named(split, tmp_path: Path) -> None:
    raw = make_raw(tmp_path, {"ants": 10, "bees": 10})
    shutil.copy(raw / "ants" / "000 – ü.png", raw / "bees" / "x.png")
    _, err = split("--folds", 3)
    assert err == "warning: copies in different classes: raw/ants/000 – ü.png and raw/bees/x.png\n"
    side = sides(tmp_path / "splits")
    assert side["raw/ants/000 – ü.png"] == side["raw/bees/x.png"]
    assert "in different classes: ants, bees" in (tmp_path / "splits" / "duplicates.txt").read_text()


def test_digits_and_plain_pictures_do_not_collapse() -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    from accelerando.data.duplicates import duplicate_groups, fingerprint

    def pixels(image, side: int) -> np.ndarray:
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC).convert("RGB"))

    for side in (8, 48):
        digits = [Image.fromarray((digit * 15.9).astype(np.uint8)) for digit in load_digits().images]
        group = duplicate_groups([fingerprint(pixels(digit, side)) for digit in digits], 4)
        assert len(np.unique(group)) == len(digits)
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (300, 3), dtype=np.uint8)
    plain = [np.broadcast_to(colour, (20, 30, 3)) for colour in np.unique(colours, axis=0)]
    noisy = [np.clip(part + rng.normal(0, 4, part.shape), 0, 255).astype(np.uint8) for part in plain[:100]]
    fades = [np.linspace(a, b, 40)[:, None].repeat(30, 1).astype(np.uint8) for a, b in itertools.pairwise(colours)]
    every = [*plain, *noisy, *fades]
    assert len(np.unique(duplicate_groups([fingerprint(picture) for picture in every], 4))) == len(every)
    # Shapes of several colours are different pictures.
    shapes = []
    for colour in itertools.product((0, 120, 220), repeat=3):
        picture = np.full((40, 40, 3), 255, np.uint8)
        picture[5:18, 10:32] = picture[18:35, 12:18] = colour
        shapes.append(fingerprint(picture))
    assert len(np.unique(duplicate_groups(shapes, 4))) == 27


def test_every_near_pair_is_found_once() -> None:
    from accelerando.data.duplicates import near_pairs

    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, 200, dtype=np.uint64)
    for row in range(0, 200, 2):
        hashes[row] = hashes[row + 1] ^ np.uint64(sum(1 << int(bit) for bit in rng.choice(64, row % 11, replace=False)))
    for most in (1, 4, 9):
        found = sorted(tuple(sorted(pair)) for a, b in near_pairs(hashes, most) for pair in zip(a, b, strict=True))
        expected = [
            (a, b) for a in range(200) for b in range(a + 1, 200) if int(hashes[a] ^ hashes[b]).bit_count() <= most
        ]
        assert found == expected


# ---------------------------------------------------------------------------------------------------------- bad input


def test_what_is_no_picture_is_left_out_and_named(split, tmp_path: Path, monkeypatch) -> None:
    from PIL import Image

    raw = make_raw(tmp_path, {"ants": 10, "bees": 10})
    save(Image.new("P", (30, 30)), raw / "ants" / "imageNotFound.gif")
    whole = (raw / "ants" / "001 – ü.JPG").read_bytes()
    (raw / "ants" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (raw / "ants" / "empty.png").touch()
    (raw / "ants" / "page.jpg").write_text("<html>404</html>")
    (raw / "bees" / "Thumbs.db").write_bytes(b"x")
    (raw / "bees" / ".hidden.png").write_bytes(b"x")
    (raw / "notes.txt").write_text("x")
    (raw / ".ipynb_checkpoints").mkdir()
    save(Image.new("L", (400, 400)), raw / "bees" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 70_000)
    out, err = split("--folds", 3)
    assert len(sides(tmp_path / "splits")) == 20
    lines = (tmp_path / "splits" / "skipped.txt").read_text().splitlines()
    for name, why in {
        "raw/ants/imageNotFound.gif": "GIFs are not used", "raw/ants/cut.jpg": "Truncated", "raw/ants/empty.png": "is empty",
        "raw/ants/page.jpg": "its header is corrupted", "raw/bees/Thumbs.db": "its name does not end like that of an image", "raw/bees/.hidden.png": "hidden",
        "raw/notes.txt": "not in a class folder", "raw/.ipynb_checkpoints": "hidden", "raw/bees/bomb.png": "exceeds",
    }.items():  # fmt: skip
        assert [why in line for line in lines if line.startswith(f"{name}: ")] == [True], name
    assert len(lines) == 9
    assert err.count("left out: ") == 5
    assert "... and 4 more" in err
    assert "9 left out, all named in splits/skipped.txt" in out


@pytest.mark.parametrize(
    ("raw", "flags", "parts"),
    [
        ({}, ["--raw_data", "rawx"], ["rawx: no such folder", "did you mean raw"]),
        ({}, [], ["raw: no class folders in it", "raw/ants/1.jpg"]),
        ({"": 2}, [], ["raw: its images", "are not in class folders"]),
        ({"ants": 9}, [], ["only one class folder, ants"]),
        ({"ants": 9, "bees": 0}, [], ["raw/bees: no image in this class folder"]),
        ({"ants": 9, "bees": 4}, [], ["raw/bees: 4 images, of which the test takes 1: too few for 5 folds"]),
        ({"ants": 9, "bees": 4}, ["--folds", "5", "--test_fraction", "0"], ["raw/bees: 4 images: too few"]),
        ({"ants": 9, "bees": 8}, ["--test_size", "0.5"], ["raw/bees: 8 images, of which the test takes 4"]),
        ({"train": 9, "val": 8}, [], ["train, val are sides, not classes"]),
        ({"ants": 9, "bees": 9}, ["--folds", "1"], ["--folds 1"]),
        ({"ants": 9, "bees": 9}, ["--test_fraction", "1"], ["--test_fraction 1"]),
        ({"ants": 9, "bees": 9}, ["--near_duplicates", "40"], ["--near_duplicates 40"]),
        ({"ants": 9, "bees": 9}, ["--groups", "no.csv"], ["--groups no.csv: no such file"]),
        ({"ants": 9, "bees": 9}, ["--groups", "bad.csv"], ["bad.csv: no column 'group'"]),
        ({"ants": 9, "bees": 9}, ["--groups", "blank.csv"], ["blank.csv: row 1", "group is empty"]),
        ({"ants": 9, "bees": 9}, ["--output_dir", "."], ["holds the images"]),
        ({"ants": 9, "bees": 9}, ["--output_dir", "raw/splits"], ["lies among the class folders"]),
        ({"ants": 9, "bees": 9}, ["--output_dir", "bad.csv"], ["--output_dir bad.csv is a file"]),
        ({"ants": 9, "bees": 9}, ["--output_dir", "mine", "--overwrite"], ["mine also holds notes.txt"]),
        ({"ants": 9, "bees": 9}, ["--output_dir", "old"], ["old holds a split already: --overwrite"]),
        ({"ants": 9, "bees": 9}, ["--fold", "5"], ["did you mean --folds"]),
    ],
)
def test_bad_use_is_one_line_and_writes_nothing(raw, flags, parts, split, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for name, count in raw.items():
        (tmp_path / "raw" / name).mkdir(exist_ok=True)
        for number in range(count):
            save(scene(number, 8), tmp_path / "raw" / name / f"{number}.png")
    (tmp_path / "bad.csv").write_text("file,camera\nants/0.png,1\n")
    (tmp_path / "blank.csv").write_text("file,group\nants/0.png,\n")
    for name in ("mine/notes.txt", "old/test.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        split(*flags)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert sorted(tmp_path.rglob("*")) == before


def test_unreadable_images_do_not_count(split, tmp_path: Path) -> None:
    raw = make_raw(tmp_path, {"ants": 9, "bees": 6})
    (raw / "bees" / "002 – ü.webp").write_bytes(b"x")
    with pytest.raises(UserError, match=r"raw/bees: 5 images.*too few.*1 left out, such as raw/bees/002.*cannot be"):
        split()
    assert not (tmp_path / "splits").exists()


def test_nothing_of_an_earlier_split_stays_and_an_interrupted_one_leaves_it(
    split, module, tmp_path: Path, monkeypatch
) -> None:
    make_raw(tmp_path, {"ants": 14, "bees": 14})
    split("--folds", 7)
    with pytest.raises(UserError, match="--overwrite replaces it"):
        split()
    split("--folds", 3, "--test_fraction", 0, "--overwrite")
    assert len(list((tmp_path / "splits").iterdir())) == 7  # 6 and classes.json: no test, no fold 3
    before = files(tmp_path / "splits")
    write = module.write_all

    def interrupted(*args: object) -> None:
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        split("--overwrite")
    assert files(tmp_path / "splits") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "splits"]
    # Between the two renames that put the new folder in place of the old one.
    monkeypatch.setattr(module, "write_all", write)
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if self.name.endswith(".draft"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        split("--overwrite")
    assert files(tmp_path / "splits") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "splits"]


@pytest.mark.launch
def test_two_interrupts_at_once_end_it_and_its_workers(tmp_path: Path) -> None:
    make_raw(tmp_path, {"ants": 120, "bees": 120})
    flags = ("--raw_data", "raw", "--num_workers", "2", "--overwrite")
    launch(TOOL, *flags, cwd=tmp_path)
    before = files(tmp_path / "splits")
    process = start(TOOL, *flags, "--seed", "1", cwd=tmp_path)
    until = time.monotonic() + 60
    while "reading" not in (tmp_path / "stdout.txt").read_text() and time.monotonic() < until:
        time.sleep(0.01)
    for _ in range(2):  # as a terminal sends them, to the workers too, which are starting
        os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert (tmp_path / "stderr.txt").read_text() == "interrupted\n"
    assert files(tmp_path / "splits") == before
    with pytest.raises(ProcessLookupError):  # nobody of its group is left
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["fold_0_val.txt: no image in it"]),
        (b"raw/ants/1.png\nraw/ants/no.png\n", ["line 2", "raw/ants/no.png does not exist"]),
        (b"raw/ants/1.png\nraw/wasps/1.png\n", ["line 2: class 'wasps' is not in classes.json, which has ants, bees"]),
        (b"ants/1.png\n", ["line 1: 'ants/1.png' is not of the form raw/<class>/<file>"]),
        (b"raw/ants/../bees/1.png\n", ["line 1", "form"]),
        (b"raw/ants/1.png\nraw/bees/1.png\nraw/ants/1.png\n", ["line 3: raw/ants/1.png is already in line 1"]),
        (b"raw/ants/\xff.png\n", ["fold_0_val.txt: not UTF-8"]),
    ],
)
def test_a_bad_index_file_is_one_line(content: bytes, parts: list[str], tmp_path: Path) -> None:
    for name in ("ants", "bees"):
        save(scene(1, 8), tmp_path / "raw" / name / "1.png")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "fold_0_val.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_index(tmp_path / "splits" / "fold_0_val.txt", {"ants": 0, "bees": 1})
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_an_index_file_of_windows_is_read(tmp_path: Path) -> None:
    save(scene(1, 8), tmp_path / "raw" / "ants" / "1 ü.png")
    (tmp_path / "splits").mkdir()
    path = tmp_path / "splits" / "test.txt"
    path.write_bytes("\ufeffraw/ants/1 ü.png\r\n\r\n".encode())
    read = read_index(path, {"ants": 3})
    assert (read.names.to_pylist(), read.classes.tolist()) == (["raw/ants/1 ü.png"], [3])
    assert read.path(0) == tmp_path / "raw" / "ants" / "1 ü.png"
    assert len(read_index(path, {"ants": 3}, tmp_path)) == 1


def test_missing_splits_say_what_makes_them(tmp_path: Path) -> None:
    command = rf"python tools/split_folds\.py --raw_data {tmp_path}/raw --folds 5"
    with pytest.raises(UserError, match=f"splits: no splits yet; {command} makes them"):
        read_class_map(tmp_path / "splits")
    (tmp_path / "splits").mkdir()
    with pytest.raises(UserError, match=f"classes.json: no such file; {command} --overwrite"):
        read_class_map(tmp_path / "splits")
    for content in ("{", "[]", "{}", '{"a": 1, "b": 2}', '{"a": 0, "b": 0}', '{"a": "0"}'):
        (tmp_path / "splits" / "classes.json").write_text(content)
        with pytest.raises(UserError, match=r"classes\.json: (invalid|expected)"):
            read_class_map(tmp_path / "splits")
    (tmp_path / "splits" / "fold_0_train.txt").touch()
    with pytest.raises(UserError, match=r"fold_3_train\.txt: no such file; there are folds 0 to 0"):
        read_index(tmp_path / "splits" / "fold_3_train.txt", {"a": 0})


def test_a_pair_of_folders_shares_the_class_map(tmp_path: Path) -> None:
    for side, names in {"train": "abc", "val": "ca", "test": "b"}.items():
        for name in names:
            for number in range(3):
                save(scene(number, 8), tmp_path / side / name / f"{number}.png")
    (tmp_path / "train" / "a" / "x.gif").touch()
    left = []
    class_map, read = read_class_folders(tmp_path, lambda name, why: left.append(name))
    assert class_map == {"a": 0, "b": 1, "c": 2}
    assert {side: found.classes.tolist() for side, found in read.items()} == {
        "train": [0, 0, 0, 1, 1, 1, 2, 2, 2], "val": [0, 0, 0, 2, 2, 2], "test": [1, 1, 1],
    }  # fmt: skip
    assert read["val"].names.to_pylist()[0] == "val/a/0.png"
    assert left == ["train/a/x.gif"]
    shutil.rmtree(tmp_path / "test")
    assert set(read_class_folders(tmp_path)[1]) == {"train", "val"}
    (tmp_path / "val" / "d").mkdir()
    with pytest.raises(UserError, match="val/d: no image in this class folder"):
        read_class_folders(tmp_path)
    save(scene(1, 8), tmp_path / "val" / "d" / "1.png")
    with pytest.raises(UserError, match=r"val/d: .*train has no such class"):
        read_class_folders(tmp_path)
    shutil.rmtree(tmp_path / "val")
    assert set(read_class_folders(tmp_path)[1]) == {"train"}


@pytest.mark.parametrize("how", ["copies", "groups"])
def test_a_fold_without_an_image_is_an_error(how: str, split, tmp_path: Path) -> None:
    raw = make_raw(tmp_path, {"ants": 6, "bees": 6})
    flags = ("--folds", "3")
    if how == "copies":
        for number, path in enumerate(sorted(raw.rglob("*.*"))):
            scene(0, 48 + number % 3).save(path)
    else:
        lines = [f"{path.relative_to(raw).as_posix()},{number % 2}" for number, path in enumerate(raw.rglob("*.*"))]
        (tmp_path / "groups.csv").write_text("\n".join(["file,group", *lines]), encoding="utf-8")
        flags += ("--groups", tmp_path / "groups.csv", "--near_duplicates", "0")
    with pytest.raises(UserError, match=r"would have no image: the 12 images form [12] groups of copies") as error:
        split(*flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "splits").exists()
