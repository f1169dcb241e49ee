"""image_classify.py on bad input: one line that says what, where and how to mend it, and no run directory."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.models.vision import make_net


def picture(seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 30, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels by its header, in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """data/ with train/ and val/, each with ants and bees."""
    for number, (side, name) in enumerate((s, n) for s in ("train", "val") for n in ("ants", "bees")):
        folder = tmp_path / "data" / side / name
        folder.mkdir(parents=True)
        for row in range(4):
            (folder / f"{row}.jpg").write_bytes(picture(10 * number + row))
    return tmp_path / "data"


def empty_class(data: Path) -> str:
    (data / "train" / "wasps").mkdir()
    return r"train/wasps: no image in this class folder: add images or move it away"


def nothing_but_notes(data: Path) -> str:
    (data / "train" / "wasps").mkdir()
    (data / "train" / "wasps" / "notes.txt").write_text("none found")
    return r"train/wasps: no image in this class folder.*notes.txt \(its name does not end like that of an image\)"


def class_that_is_not_trained(data: Path) -> str:
    shutil.copytree(data / "val" / "bees", data / "val" / "wasps")
    return r"val/wasps: .*train has no such class"


def one_class(data: Path) -> str:
    for side in ("train", "val"):
        shutil.rmtree(data / side / "bees")
    return "one class, ants; a classifier needs at least two"


def pictures_in_no_class(data: Path) -> str:
    shutil.rmtree(data / "train")
    (data / "train").mkdir()
    (data / "train" / "1.jpg").write_bytes(picture())
    return "are not in class folders"


def all_broken(data: Path) -> str:
    for path in (data / "val").rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:50])
    return "none of the images of validation can be read"


@pytest.mark.parametrize(
    "spoil",
    [empty_class, nothing_but_notes, class_that_is_not_trained, one_class, pictures_in_no_class],
    ids=lambda function: function.__name__,
)
def test_folders_that_make_no_set_are_one_line(spoil, pair: Path, image_here, tmp_path: Path) -> None:
    words = spoil(pair)
    with pytest.raises(UserError, match=words) as error:
        image_here("--data_dir", str(pair))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_without_val_a_share_of_train_is_held_out(pair: Path, image_here) -> None:
    shutil.rmtree(pair / "val")
    run = image_here("--data_dir", str(pair), "--epochs", "1", "--validation_fraction", "0.3", "--report_on_train")
    found = json.loads((run / "results.json").read_text())
    parts = [(run / f"predictions_{split}.csv").read_text().splitlines()[1:] for split in ("train", "validation")]
    names = [{line.split(",")[0] for line in part} for part in parts]
    assert not names[0] & names[1] and all(name.startswith("train/") for name in names[0] | names[1])
    assert found["validation"]["count"] == len(names[1]) >= 2
    assert found["train"]["count"] + found["validation"]["count"] == len(list((pair / "train").rglob("*.jpg")))
    with pytest.raises(UserError, match="validation_fraction 0: nothing would be evaluated"):
        image_here("--data_dir", str(pair), "--validation_fraction", "0", name="b")


def test_no_picture_that_can_be_read(pair: Path, image_here) -> None:
    words = all_broken(pair)
    with pytest.raises(UserError, match=words):
        image_here("--data_dir", str(pair))


def spoil_index(name: str, change) -> object:
    def spoil(data: Path) -> None:
        path = data / "splits" / name
        path.write_text(change(path.read_text()))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: shutil.rmtree(data / "splits"), r"splits: no splits yet; python tools/split_folds.py --raw_data"),
        (spoil_index("fold_0_val.txt", lambda text: text.replace("raw/lamp/", "raw/wasps/", 1)),
         r"fold_0_val.txt: line \d+: class 'wasps' is not in classes.json, which has chair, lamp, table"),
        (spoil_index("test.txt", lambda text: text + "raw/chair/none.jpg\n"), r"none.jpg does not exist"),
        (spoil_index("test.txt", lambda text: text + text.splitlines()[0] + "\n"), r"is already in line 1"),
        (spoil_index("fold_0_train.txt", lambda text: ""), "fold_0_train.txt: no image in it"),
        (spoil_index("classes.json", lambda text: json.dumps({"chair": 0, "lamp": 0})), "each number once"),
    ],
    ids=["no splits", "another class", "missing picture", "named twice", "empty index", "broken class map"],
)  # fmt: skip
def test_splits_that_are_wrong_are_one_line(spoil, words: str, image_set: Path, image_here, tmp_path: Path) -> None:
    data = tmp_path / "copy"
    shutil.copytree(image_set, data)
    spoil(data)
    with pytest.raises(UserError, match=words) as error:
        image_here("--data_dir", str(data))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "not an image"), (b"no picture", "not an image"), (picture()[:200], "truncated|premature|broken"),
     (bomb(), "exceeds limit|far too large|decompression bomb")],
    ids=["empty", "text", "cut off", "bomb"],
)  # fmt: skip
@pytest.mark.parametrize("cache", [False, True])
def test_a_bad_picture_is_left_out_and_named(content: bytes, reason: str, cache: bool, pair: Path, image_here) -> None:
    bad = pair / "train" / "ants" / "bad.png"
    bad.write_bytes(content)
    run = image_here("--data_dir", str(pair), "--epochs", "1", *(["--cache", "--cache_dir", "c"] if cache else []))
    log = (run / "logs" / "train.log").read_text()
    assert "1 of 9 training images cannot be read and were skipped" in log
    (line,) = [line for line in log.splitlines() if str(bad) in line]
    assert re.search(reason, line, re.IGNORECASE)


def test_weights_of_another_architecture(pair: Path, image_here, tmp_path: Path) -> None:
    torch.save(make_net("squeezenet1_1", 2).state_dict(), tmp_path / "weights.pth")
    flags = ("--data_dir", str(pair), "--model_name", "None", "--architecture", "resnet18")
    with pytest.raises(UserError, match=r"weights\.pth: not the weights of resnet18") as error:
        image_here(*flags, "--weights", str(tmp_path / "weights.pth"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_batch_of_one_picture_is_found_beforehand(pair: Path, image_here, tmp_path: Path) -> None:
    """Batch norms over one picture of one pixel: torch's own error would come after some steps."""
    flags = ("--data_dir", str(pair), "--max_steps", "2", "--epochs", "1")
    words = "--batch_size 7: 8 samples leave a batch of a single one, .* need at least two: --batch_size 6 leaves none"
    with pytest.raises(UserError, match=words):
        image_here(*flags, "--batch_size", "7", "--image_size", "8")
    assert not (tmp_path / "runs").exists()
    image_here(*flags, "--batch_size", "6", "--image_size", "8", name="as told")
    image_here(*flags, "--batch_size", "7", "--image_size", "16", name="larger maps")
    image_here(*flags, "--batch_size", "7", "--image_size", "8", "--strategy", "head", name="norms at rest")


def test_the_smallest_batch_is_that_of_the_loader() -> None:
    from accelerando.train.batches import TrainBatches, smallest_batch

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        return {"rows": torch.tensor(rows)}

    for samples, size, steps, processes in [(8, 7, 1, 1), (9, 4, 2, 1), (10, 3, 2, 2), (5, 8, 1, 2), (3, 2, 1, 4)]:
        found = [
            len(batch["rows"])
            for rank in range(processes)
            for window in TrainBatches(
                range(samples), collate, size, steps, num_processes=processes, process_index=rank
            ).windows(0)
            for batch in window
        ]
        assert smallest_batch(samples, size, steps, processes) == min(found)


def test_torchs_own_error_about_a_batch_of_one_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, errors_in_one_line():
        torch.nn.BatchNorm1d(3)(torch.zeros(1, 3))
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: a batch has a single sample, but batch norm needs at least two: change --batch_size by one\n"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model_name", "{vit}", "--image_size", "48"), r"images of 48 x 48 pixels \(.*48.*\): leave --image_size"),
        (("--model_name", "{vit}", "--image_size", "32", "--progressive_sizes", "16"), "images of 16 x 16 pixels"),
        (("--architecture", "alexnet", "--image_size", "32"), "images of 32 x 32 pixels .*too small"),
        (("--architecture", "vit_b_16", "--image_size", "96"), "images of 96 x 96 pixels .*Wrong image height"),
    ],
)
def test_a_size_that_does_not_fit_the_net(
    flags: tuple[str, ...], words: str, pair: Path, tiny_vit: Path, image_here, tmp_path: Path
) -> None:
    model = () if "--model_name" in flags else ("--model_name", "None")
    with pytest.raises(UserError, match=words) as error:
        image_here("--data_dir", str(pair), *model, *(str(tiny_vit) if flag == "{vit}" else flag for flag in flags))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_without_a_size_it_is_the_models_own(pair: Path, tiny_vit: Path, image_here) -> None:
    run = image_here("--data_dir", str(pair), "--model_name", str(tiny_vit), "--image_size", "None", "--max_steps", "1")
    assert "image_size: 32\n" in (run / "config.yaml").read_text()
    again = image_here("--data_dir", str(pair), "--model_name", str(run / "best"), "--image_size", "None", name="again")
    assert "image_size: 32\n" in (again / "config.yaml").read_text()
