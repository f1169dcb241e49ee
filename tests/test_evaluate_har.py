"""tools/evaluate.py and predict.py for runs of clip_har.py: the run's own numbers, other data, folders of both kinds."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import HAR, ROOT, run_in_this_process
from made_data import make_video
from PIL import Image
from tools import evaluate, predict

NAMES = ["blue table", "green_lamp_left", "red chair"]


@pytest.fixture(scope="module")
def train(har_args: list[str], tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        training = run_in_this_process(HAR, har_args, tmp_path_factory.mktemp("evaluate"), patch)
        yield next(training)
        training.close()


@pytest.fixture(scope="module")
def run(train) -> Path:
    """Videos have two views, and the loss is smoothed."""
    return train("--views", "2", "--label_smoothing", "0.1", "--epochs", "3", name="views")


@pytest.fixture
def call(call_tool):
    """``call(*arguments, tool=evaluate)``: a tool's exit code and both outputs."""

    def run(*arguments: object, tool=evaluate) -> tuple[int, str, str]:
        return call_tool(tool, *arguments)

    return run


def scores(out: str) -> dict:
    return next(iter(json.loads(out)["runs"].values()))


def assert_its_own_numbers(run: Path, split: str, call, *flags: object) -> dict:
    code, out, err = call(run, "--split", split, "--format", "json", *flags)
    assert code == 0 and "warning" not in err, err
    found, kept = scores(out), json.loads((run / "results.json").read_text())[split]
    assert found.keys() == kept.keys() - {"harmonic_mean"}
    for name, value in found.items():
        assert value == pytest.approx(kept[name], abs=1e-5 * (name == "loss")), name
    return found


def test_its_own_test_split(run: Path, call) -> None:
    assert assert_its_own_numbers(run, "test", call)["count"] == 18
    assert_its_own_numbers(run, "test", call, "--batch_size", 5, "--num_workers", 1)
    code, out, _ = call(run)
    assert code == 0 and "18 samples of" in out and "top3_accuracy" in out


@pytest.mark.exhaustive
def test_what_changes_the_numbers(run: Path, call) -> None:
    def loss(*flags: str) -> float:
        return scores(call(run, "--format", "json", *flags)[1])["loss"]

    assert len({loss(), loss("--views", "1"), loss("--frames", "2"), loss("--tta")}) == 4


def table_of(media_set: Path, path: Path) -> Path:
    """train/, val/ and test/ as one table of files and labels in other columns than the usual ones."""
    files = sorted(file for file in media_set.glob("*/*/*") if file.suffix in (".png", ".mp4"))
    lines = [f"{file.relative_to(media_set)},{file.parent.name}" for file in files]
    path.write_text("\n".join(["clip,action", *lines]) + "\n")
    return path


@pytest.mark.parametrize("kind", ["held_out", "novel", "table", "dataset", "shards", "frames", "lora", "linear"])
def test_a_split_is_made_as_in_training(kind: str, train, media_set: Path, call, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(media_set / "train", plain)
    columns = ("--file_column", "clip", "--label_column", "action", "--media_folder", str(media_set))
    if kind == "frames":
        make_frame_folders(tmp_path / "frames")
    if kind in ("dataset", "shards"):
        pack(media_set, tmp_path / kind, kind)
    flags = {
        "held_out": ("--data_dir", str(plain), "--test_fraction", "0.2", "--shots", "9", "--report_on_train"),
        "novel": ("--novel_classes", "red chair"),
        "table": ("--data_dir", "None", "--train_file", str(table_of(media_set, tmp_path / "all.csv")), *columns,
                  "--test_fraction", "0.2"),
        "dataset": ("--data_dir", "None", "--train_file", str(tmp_path / "dataset"), "--test_fraction", "0.3"),
        "shards": ("--data_dir", "None", "--train_file", str(tmp_path / "shards" / "train.tar"),
                   "--test_file", str(tmp_path / "shards" / "test.tar")),
        "frames": ("--data_dir", str(tmp_path / "frames"), "--frame_folders", "--test_fraction", "0.3"),
        "lora": ("--strategy", "lora", "--lora_r", "2"),
        "linear": ("--strategy", "linear_probe", "--augmentation", "none", "--head_lr", "3e-2", "--views", "2"),
    }[kind]  # fmt: skip
    run = train(*flags, "--epochs", "1", name=kind)
    for split in {"held_out": ("test", "validation", "train"), "novel": ("test", "novel")}.get(kind, ("test",)):
        found = assert_its_own_numbers(run, split, call)
        assert ("accuracy_among_all" in found) == (kind == "novel")


def pack(media_set: Path, folder: Path, kind: str) -> None:
    """The images of train/ and test/ as a data set of `datasets` (train alone), or as one shard each."""
    import datasets
    import webdataset

    folder.mkdir()
    files = {split: sorted((media_set / split).rglob("*.png")) for split in ("train", "test")}
    if kind == "dataset":
        columns = {"image": [str(file) for file in files["train"]],
                   "label": [NAMES.index(file.parent.name) for file in files["train"]]}  # fmt: skip
        rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        rows = rows.cast_column("label", datasets.ClassLabel(names=NAMES))
        datasets.DatasetDict({"train": rows}).save_to_disk(folder)
        return
    for split, paths in files.items():
        with webdataset.TarWriter(str(folder / f"{split}.tar")) as tar:
            for number, file in enumerate(paths):
                tar.write({"__key__": f"{number:03}", "png": file.read_bytes(), "cls": file.parent.name.encode()})


def make_frame_folders(folder: Path) -> None:
    rng = np.random.default_rng(5)
    for name, colour in (("blue", (40, 40, 230)), ("red", (230, 40, 40))):
        for video in range(8):
            place = folder / name / f"v{video}"
            place.mkdir(parents=True)
            for frame in range(5):
                pixels = np.clip(np.array(colour) + rng.normal(0, 60, (24, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{frame}.png")


def test_the_best_mixture_is_what_the_run_scored(train, call) -> None:
    run = train("--wise_ft", "0", "--epochs", "2", name="wise")  # the untrained weights
    found = assert_its_own_numbers(run, "test", call)
    assert scores(call(run / "best", "--format", "json")[1])["loss"] != found["loss"]


def test_a_copied_script_scores_as_the_run(run: Path, call, tmp_path: Path) -> None:
    shutil.copy(HAR, tmp_path / "mine.py")
    for split in ("test", "validation"):
        assert_its_own_numbers(run, split, call, "--script", tmp_path / "mine.py")


def test_other_data(run: Path, media_set: Path, call, tmp_path: Path) -> None:
    """Class folders and a table of the same files give the same numbers; unreadable ones are named."""
    one = call(run, "--data", media_set / "test", "--format", "json", "--output_dir", tmp_path / "a")
    assert one[0] == 0, one[2]
    table = tmp_path / "some.csv"
    lines = [f"{file.relative_to(media_set)},{file.parent.name}" for file in sorted(media_set.glob("test/*/*"))]
    table.write_text("\n".join(["clip,action", *lines]) + "\n")
    columns = ("--file_column", "clip", "--label_column", "action", "--media_folder", media_set)
    two = call(run, "--data", table, *columns, "--format", "json")
    assert two[0] == 0, two[2]
    assert scores(one[1]) == pytest.approx(scores(two[1]))
    with open(tmp_path / "a" / "predictions.csv") as file:
        assert sum(row["file"].endswith(".mp4") for row in csv.DictReader(file)) == 6
    page = (tmp_path / "a" / "report.html").read_text()
    wrong = 18 - round(scores(one[1])["accuracy"] * 18)
    assert page.count("data:image/jpeg") == wrong
    (tmp_path / "few" / "red chair").mkdir(parents=True)
    shutil.copy(media_set / "test" / "red chair" / "02.mp4", tmp_path / "few" / "red chair")
    (tmp_path / "few" / "red chair" / "x.mp4").write_bytes(b"no video")
    code, out, err = call(run, "--data", tmp_path / "few")
    assert code == 0 and "1 samples of" in out and "1 more cannot be read" in out and "x.mp4: not a video" in err


def test_an_ensemble_of_runs(run: Path, train, call) -> None:
    other = train("--epochs", "1", "--seed", "3", name="other")
    code, out, err = call(run, other, "--format", "json")
    assert code == 0, err
    found = json.loads(out)
    assert len(found["runs"]) == 2 and 0 <= found["ensemble"]["top3_accuracy"] <= 1


def test_mistakes_are_one_line(run: Path, media_set: Path, call, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    table = tmp_path / "t.csv"
    table.write_text("image,label\nnone.png,red chair\n")
    odd = tmp_path / "odd" / "red chairs"
    odd.mkdir(parents=True)
    shutil.copy(media_set / "test" / "red chair" / "00.png", odd)
    for flags, words in (
        (("--data", empty), "no class folders in it"),
        (("--data", odd.parent), "did you mean red chair?"),
        (("--data", table), "no file"),
        (("--data", table, "--frame_folders"), "has no effect"),
        (("--data", media_set / "test", "--file_column", "x"), "has no effect"),
        (("--file_column", "x"), "says how --data is read"),
        (("--split", "novel"), "has no split novel; it has train, validation, test"),
        (("--data_dir", tmp_path / "gone"), "no such folder"),
        (("--views", "0"), "between 1 and 64"),
    ):
        code, out, err = call(run, *flags)
        assert (code, out) == (2, ""), (flags, err)
        assert len(err.splitlines()) == 1 and words in err, (flags, err)


# ------------------------------------------------------------------------------------------------------ prediction


def test_a_folder_of_images_and_videos_is_answered_as_its_files(run: Path, media_set: Path, call, tmp_path) -> None:
    folder = tmp_path / "mixed" / "deep"
    folder.mkdir(parents=True)
    for name in ("00.png", "02.mp4", "05.mp4"):
        shutil.copy(media_set / "test" / "red chair" / name, folder)
    (folder / "notes.txt").write_text("x")
    make_video(folder / "A.MKV", [np.full((32, 32, 3), 90, np.uint8)] * 4)
    Image.new("RGB", (20, 20)).save(folder / "z.gif")
    files = [folder / name for name in ("00.png", "02.mp4", "05.mp4", "A.MKV", "z.gif")]
    code, whole, err = call(run, folder.parent, tool=predict)
    assert (code, err) == (0, ""), err
    one = {line["file"]: line for line in map(json.loads, call(run, *files, tool=predict)[1].splitlines())}
    found = {line["file"]: line for line in map(json.loads, whole.splitlines())}
    assert list(found) == sorted(map(str, files)) == sorted(one)
    for file, line in found.items():
        assert line["scores"] == pytest.approx(one[file]["scores"], abs=2e-6)
    with open(run / "predictions_test.csv") as file:  # with the run's own frames and views
        own = {Path(row["file"]).name: row for row in csv.DictReader(file) if row["label"] == "red chair"}
    for name in ("00.png", "02.mp4", "05.mp4"):
        for label, score in found[str(folder / name)]["scores"].items():
            assert score == pytest.approx(float(own[name][f"p_{label}"]), abs=2e-5)
    other = json.loads(call(run, folder / "02.mp4", "--views", "1", "--frames", "2", tool=predict)[1])
    assert other["scores"] != found[str(folder / "02.mp4")]["scores"]
    code, _, _ = call(run, folder, "--output", tmp_path / "a.csv", "--class_names", "a dog", "a cat", tool=predict)
    assert code == 0 and len((tmp_path / "a.csv").read_text().splitlines()) == 6


def test_folders_of_frames_and_what_cannot_be_read(run: Path, call, tmp_path: Path) -> None:
    make_frame_folders(tmp_path / "frames")
    code, out, err = call(run, tmp_path / "frames", "--frame_folders", tool=predict)
    assert code == 0, err
    assert len(out.splitlines()) == 16 and json.loads(out.splitlines()[0])["file"].endswith("blue/v0")
    assert len(call(run, tmp_path / "frames", tool=predict)[1].splitlines()) == 80
    (tmp_path / "frames" / "blue" / "v0" / "broken.mp4").write_bytes(b"no video")
    code, out, err = call(run, tmp_path / "frames" / "blue" / "v0", tool=predict)
    assert code == 1 and len(out.splitlines()) == 6 and "broken.mp4: not a video" in err
    code, _, err = call(run, tmp_path / "frames" / "blue" / "v0" / "broken.mp4", tool=predict)
    assert code == 2 and err.splitlines()[-1] == "error: the sample cannot be read"
    (tmp_path / "none").mkdir()
    for flags, words in (
        ((tmp_path / "none",), "no image or video in this folder"),
        ((tmp_path / "gone.mp4",), "no such file or folder (this model classifies images and videos)"),
    ):
        code, out, err = call(run, *flags, tool=predict)
        assert (code, out) == (2, "") and words in err.splitlines()[-1], err


def test_without_pyav_a_video_names_the_package(run: Path, media_set: Path, call, monkeypatch) -> None:
    monkeypatch.setattr("accelerando.data.videos.importlib.util.find_spec", lambda name: None)
    code, _, err = call(run, media_set / "test" / "red chair", tool=predict)
    assert code == 1 and err.count("a video needs PyAV to be read: pip install av") == 2


@pytest.mark.exhaustive
def test_an_image_run_opens_where_nothing_else_was_imported(image_here, image_set: Path, tmp_path: Path) -> None:
    """Each tool registers the classes of this library by itself."""
    run = image_here("--max_steps", "1", base=["--data_dir", str(image_set), "--image_size", "32", "--report_to", "none",
                                               "--architecture", "squeezenet1_1"])  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    for tool, flags in (("evaluate.py", ()), ("predict.py", (str(image_set / "raw" / "lamp"),))):
        command = [sys.executable, str(ROOT / "tools" / tool), str(run), *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
