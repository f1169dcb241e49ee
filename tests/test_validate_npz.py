"""tools/validate_npz.py and accelerando.data.sign_labels: every fault is found, alone, and named; a sound set passes."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT, launch

from accelerando.base.errors import UserError
from accelerando.data.sign_labels import KINDS, Labels, inspect_clip, label_problems, read_labels

TOOL = ROOT / "tools" / "validate_npz.py"
META = {"dims_per_frame": 156, "keypoints_total": 78, "order": "pose25,left_hand21,right_hand21,face11"}
BAD = "clip_0002_how are you"  # the clip that faults are planted in


def make_clip(number: int, frames: int = 9) -> dict[str, np.ndarray]:
    """A sound clip: every array the format knows."""
    rng = np.random.default_rng(number)
    return {
        "X": rng.random((frames, 156), np.float32),
        "mask": rng.random((frames, 78)) < 0.7,
        "timestamps_ms": np.arange(frames, dtype=np.int64) * 33,
        "meta": np.array(json.dumps(META)),
    }


def write_labels(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


class Sets:
    """A training and a validation folder; ``save`` writes the labels after a test has spoilt something."""

    def __init__(self, folder: Path, clips: int = 6) -> None:
        self.train, self.val = folder / "train", folder / "val"
        self.rows: dict[Path, list[dict]] = {self.train: [], self.val: []}
        for part, first in ((self.train, 100), (self.val, 0)):
            part.mkdir()
            for number in range(clips):
                # Names as they are: with spaces, with and without .npz.
                name = f"clip_{first + number:04d}_how are you"
                np.savez(part / f"{name}.npz", **make_clip(first + number, 5 + number % 7))
                self.rows[part].append(
                    {"file": name + ".npz" * (number % 2), "gloss": number % 3, "cat": number % 3 // 2}
                )

    def save(self) -> None:
        for part, rows in self.rows.items():
            write_labels(part / "labels.csv", rows)

    def change(self, **arrays: np.ndarray | None) -> None:
        """Other arrays in the bad clip; None removes one."""
        content = {name: value for name, value in {**make_clip(2), **arrays}.items() if value is not None}
        np.savez(self.val / f"{BAD}.npz", **content)

    def edit(self, function: Callable) -> None:
        """Spoils one array of the bad clip in place."""
        content = make_clip(2)
        function(content)
        self.change(**content)


@pytest.fixture
def sets(tmp_path: Path) -> Sets:
    return Sets(tmp_path)


@pytest.fixture
def validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """``validate(*flags) -> (exit code, output, what --json wrote)``: the tool's ``main`` in this process."""
    spec = importlib.util.spec_from_file_location("validate_npz", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "validate_npz", module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*flags: object) -> tuple[int, str, dict]:
        argv = [*map(str, flags), *(() if "--json" in flags else ("--json", "out.json"))]
        monkeypatch.setattr(sys, "argv", [str(TOOL), *argv])
        capsys.readouterr()
        try:
            module.main()
            code = 0
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr().out, json.loads(Path("out.json").read_text())

    return run


def test_a_sound_set_passes(sets: Sets, validate) -> None:
    sets.save()
    for flags in ([], ["--num_gloss", 3, "--num-cat", 2, "--expect-mask"], ["--labels", "val/labels.csv"]):
        code, out, summary = validate("val", "--train_folder", "train", *flags)
        assert code == 0
        assert out == "6 clips, 5/7/10 frames (min/med/max), 3 glosses, 0 errors, 0 warnings\n"
        assert summary["problems"] == []
        assert summary["frames"] == {"min": 5, "median": 7, "max": 10}


def test_clips_without_labels_pass(sets: Sets, validate) -> None:
    assert validate("val", "--train_folder", "train")[0] == 0
    assert validate("val")[1] == "6 clips, 5/7/10 frames (min/med/max), 0 errors, 0 warnings\n"


# ----------------------------------------------------------------------------------------------------- planted faults


def row(sets: Sets, number: int = 2, **values: object) -> None:
    sets.rows[sets.val][number].update(values)


def put(array: str, place: tuple, value: float) -> Callable:
    return lambda sets: sets.edit(lambda content: content[array].__setitem__(place, value))


def arrays(**values: np.ndarray | None) -> Callable:
    return lambda sets: sets.change(**values)


def file_bytes(change: Callable[[bytes], bytes]) -> Callable:
    def spoil(sets: Sets) -> None:
        path = sets.val / f"{BAD}.npz"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def same_clip(sets: Sets) -> None:
    sets.change(X=make_clip(103, 5 + 3)["X"], mask=None, timestamps_ms=None)


def same_name(sets: Sets) -> None:
    """Both sets in one folder, one clip in both labels."""
    for path in sets.train.glob("*.npz"):
        path.rename(sets.val / path.name)
    sets.rows[sets.train].append({"file": BAD, "gloss": 2, "cat": 1})
    sets.train = sets.val
    write_labels(sets.val / "train.csv", sets.rows.pop(sets.val.parent / "train"))


def flip(data: bytes) -> bytes:
    """One byte of the frames, behind the heading of the first array."""
    return data[:400] + bytes([data[400] ^ 255]) + data[401:]


F = np.float32
FEATURES = np.ones((9, 2048), F)
X = make_clip(2)["X"]
NEED = ("--require-x2048",)
FAULTS: list[tuple[str, Callable, tuple]] = [
    ("missing_file", lambda sets: (sets.val / f"{BAD}.npz").unlink(), ()),
    ("unlisted_file", lambda sets: sets.rows[sets.val].pop(2), ()),
    ("listed_twice", lambda sets: sets.rows[sets.val].append({"file": f"{BAD}.npz", "gloss": 2, "cat": 1}), ()),
    ("gloss_out_of_range", lambda sets: None, ("--num_gloss", 2)),
    ("gloss_out_of_range", lambda sets: [row(sets, n, gloss=-1) for n in (2, 5)] + [
        sets.rows[sets.train].append({"file": "clip_0100_how are you", "gloss": -1, "cat": 1})], ()),
    ("cat_out_of_range", lambda sets: None, ("--num_cat", 1)),
    ("gloss_with_two_cats", lambda sets: row(sets, cat=0), ()),
    ("gloss_not_in_train", lambda sets: row(sets, gloss=7), ()),
    ("cat_not_in_train", lambda sets: row(sets, cat=5, gloss=7), ()),
    ("same_clip", same_clip, ()),
    ("same_name", same_name, ("--train_labels", "val/train.csv")),
    ("unreadable", file_bytes(lambda data: b""), ()),
    ("unreadable", file_bytes(lambda data: b"version https://git-lfs.github.com/spec/v1\n"), ()),
    ("unreadable", file_bytes(lambda data: data[: len(data) // 2]), ()),
    ("unreadable", file_bytes(lambda data: b"PK" + data[:50]), ()),
    ("unreadable", file_bytes(flip), ()),
    ("object_array", arrays(X=np.array([[1.0], [2.0, 3.0]], dtype=object)), ()),
    ("object_array", arrays(meta=np.array(META, dtype=object)), ()),
    ("key_missing", arrays(X=None), ()),
    ("key_missing", lambda sets: None, ("--kp_key", "keypoints")),
    ("wrong_ndim", arrays(X=X.reshape(9, 78, 2)), ()),
    ("wrong_ndim", arrays(X=X[0]), ()),
    ("wrong_ndim", arrays(X=X[0], X2048=FEATURES), NEED),
    ("wrong_width", arrays(X=X[:, :150]), ()),
    ("wrong_width", lambda sets: None, ("--width", 24)),
    ("wrong_dtype", arrays(X=(X * 255).astype(np.uint8)), ()),
    ("wrong_dtype", arrays(X=X.astype(str)), ()),
    ("no_frames", arrays(X=X[:0], mask=np.ones((0, 78), bool), timestamps_ms=np.arange(0)), ()),
    ("nan", put("X", (3, 7), np.nan), ()),
    ("infinite", put("X", (3, 7), -np.inf), ()),
    ("out_of_range", put("X", (3, 7), 1.2), ()),
    ("out_of_range", put("X", (3, 7), -0.2), ()),
    ("all_zero", arrays(X=X * 0), ()),
    ("mask_missing", arrays(mask=None), ("--expect_mask",)),
    ("mask_shape", arrays(mask=np.ones((8, 78), bool)), ()),
    ("mask_shape", arrays(mask=np.ones((9, 77), bool)), ()),
    ("mask_shape", arrays(mask=np.ones(9, bool)), ()),
    ("mask_dtype", arrays(mask=np.ones((9, 78), F)), ()),
    ("nothing_visible", arrays(mask=np.zeros((9, 78), bool)), ()),
    ("timestamps_shape", arrays(timestamps_ms=np.arange(8)), ()),
    ("timestamps_dtype", arrays(timestamps_ms=np.arange(9.0)), ()),
    ("timestamps_decrease", put("timestamps_ms", (4,), 5), ()),
    ("meta_not_json", arrays(meta=np.array("{broken")), ()),
    ("meta_not_json", arrays(meta=np.array("[1, 2]")), ()),
    ("meta_not_json", arrays(meta=np.arange(3)), ()),
    ("meta_contradicts", arrays(meta=np.array(json.dumps({**META, "dims_per_frame": 132}))), ()),
    ("meta_contradicts", arrays(meta=np.array(json.dumps({**META, "keypoints_total": 66}))), ()),
    ("meta_contradicts", arrays(meta=np.array(json.dumps({**META, "order": "face11,pose25"}))), ()),
    ("x2048_missing", lambda sets: None, NEED),
    ("x2048_shape", arrays(X2048=FEATURES[:, :2000]), NEED),
    ("x2048_shape", arrays(X2048=FEATURES.astype(int)), NEED),
    ("x2048_length", arrays(X2048=FEATURES[:5]), NEED),
    ("x2048_not_finite", arrays(X2048=FEATURES * np.nan), NEED),
    ("all_zero", arrays(X2048=FEATURES * 0), NEED),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "plant", "flags"), FAULTS, ids=[f"{n}-{fault[0]}" for n, fault in enumerate(FAULTS)])
def test_every_planted_fault_is_found_and_nothing_else(kind: str, plant, flags, sets: Sets, validate) -> None:
    if flags == NEED and kind != "x2048_missing":  # the other clips have features
        for path in sets.val.glob("*.npz"):
            with np.load(path) as clip:
                content = dict(clip)
            np.savez(path, **content, X2048=FEATURES[[0] * len(content["X"])])
    plant(sets)
    sets.save()
    code, out, summary = validate("val", *([] if "--train_labels" in flags else ["--train_folder", "train"]), *flags)
    # A category that training lacks belongs to a gloss that it lacks, or that it has with another category.
    others = {"gloss_not_in_train"} if kind == "cat_not_in_train" else set()
    assert set(summary["counts"]) == {kind} | others, summary["problems"]
    (problem,) = [row for row in summary["problems"] if row["file"] == f"{BAD}.npz" and row["kind"] == kind]
    severity, what = KINDS[kind]
    assert problem["kind"] == kind
    assert problem["severity"] == severity
    assert problem["text"].startswith(f"{BAD}.npz: ")
    assert problem["text"].isprintable()
    assert code == (2 if severity == "error" else 0)
    assert what.split()[0] in out


def test_every_kind_has_a_planted_fault() -> None:
    assert {kind for kind, _, _ in FAULTS} == set(KINDS)


def test_pickled_objects_stay_shut(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "opened",)

    np.savez(tmp_path / "a.npz", X=np.array([Touch()]), mask=np.array([Touch()]))
    assert [problem.kind for problem in inspect_clip(tmp_path / "a.npz").problems] == ["object_array"] * 2
    assert inspect_clip(tmp_path / "a.npz", width=None, frames_only=True).digest is None
    assert not (tmp_path / "opened").exists()


def test_damaged_bytes_are_problems_and_never_exceptions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", **make_clip(2, 3))
    np.savez_compressed(tmp_path / "b.npz", **make_clip(2, 3), X2048=FEATURES)
    found = 0
    for name in "ab":
        whole = (tmp_path / f"{name}.npz").read_bytes()
        for number in range(100):
            data = bytearray(whole)
            for place in rng.integers(2, len(data), 1 + number % 20):
                data[place] = int(rng.integers(256))
            (tmp_path / "c.npz").write_bytes(data[: int(rng.integers(len(data)))] if number % 3 == 0 else data)
            found += bool(inspect_clip(tmp_path / "c.npz").problems)
    assert found > 150


# ------------------------------------------------------------------------------------------------- what is right, too


@pytest.mark.parametrize(
    ("content", "settings"),
    [
        ({"X": X}, {}),
        ({"X": X.astype(np.float64), "mask": np.ones((9, 78), bool)}, {}),
        ({"X": X[:, :24] * 50 - 20, "mask": np.ones((9, 8), bool)}, {"width": 24}),
        ({"sensors": X[:, :24] * 50}, {"key": "sensors", "width": None}),
        ({"X2048": FEATURES}, {"require_x2048": True}),
        ({"X": FEATURES, "mask": np.ones((9, 78), bool)}, {"require_x2048": True}),
        ({"X2048": FEATURES}, {"key": "X2048"}),
        ({"X": X, "timestamps_ms": np.zeros(9, np.int64), "meta": np.array(b'{"fps": 30}')}, {}),
        ({"X": X, "extra": np.array([{}], dtype=object)}, {}),
    ],
)
def test_other_clips_that_are_right(content: dict, settings: dict, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **content)
    assert inspect_clip(tmp_path / "a.npz", **settings).problems == []


def test_features_that_nobody_asked_for_are_a_warning(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", X=X, X2048=FEATURES[:5])
    assert [problem.severity for problem in inspect_clip(tmp_path / "a.npz").problems] == ["warning"]


def test_the_digest_is_that_of_the_frames_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", X=X, mask=np.ones((9, 78), bool))
    np.savez_compressed(tmp_path / "b.npz", X=X)
    np.savez(tmp_path / "c.npz", X=X[::-1])
    digests = [inspect_clip(tmp_path / f"{name}.npz", width=None, frames_only=True).digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


# ------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "content",
    [
        b"file,gloss,cat\nclip_0089_how are you,42,3\nb.npz,1,0\n",
        b"\xef\xbb\xbffile,gloss,cat\r\nclip_0089_how are you.npz,42,3\r\nb,1,0\r\n",
        b'cat, signer ,file,gloss\n3,"Anna, B.",clip_0089_how are you,42\n\n0,x, b , 1\n',
    ],
)
def test_labels_are_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(content)
    labels = read_labels(tmp_path / "labels.csv")
    assert labels.files == ["clip_0089_how are you", "b"]
    assert labels.gloss.tolist() == [42, 1]
    assert labels.cat.tolist() == [3, 0]
    assert labels.gloss.dtype == labels.cat.dtype == np.int64
    assert labels.occluded is None
    assert len(labels) == 2


def test_occluded_and_quoted_names_are_read(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text('file,gloss,cat,occluded\n"hello, you.npz",0,0,1\nb,0,0,0\n')
    labels = read_labels(tmp_path / "labels.csv")
    assert labels.files == ["hello, you", "b"]
    assert labels.occluded.tolist() == [True, False]
    assert labels.occluded.dtype == bool


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["empty"]),
        ("file,gloss,cat\n", ["no rows"]),
        ("file,Gloss,cat\na,1,1\n", ["'gloss'", "file, Gloss, cat", "rename 'Gloss'"]),
        ("filename,gloss,cat\na,1,1\n", ["'file'", "rename 'filename'"]),
        ("file,gloss,cat\na,1,1\nb,hello,2\n", ["line 3", "gloss", "'hello'", "whole number"]),
        ("file,gloss,cat\na,1,1\n\nb,1,2.0\n", ["line 4", "cat", "'2.0'"]),
        ("file,gloss,cat\na,,1\n", ["line 2", "gloss is empty"]),
        ("file,gloss,cat\n,1,1\n", ["line 2", "file is empty"]),
        ("file,gloss,cat\na,1\n", ["line 2", "2 fields"]),
        ("file,gloss,cat\na,99999999999999999999,1\n", ["line 2", "gloss"]),
        ("file,gloss,cat,occluded\na,1,1,maybe\n", ["line 2", "occluded", "0 or 1"]),
        ("file,gloss,gloss,cat\na,1,2,3\n", ["two columns"]),
        (b"file,gloss,cat\nc\xe9,1,1\n", ["line 2", "UTF-8"]),
    ],
)
def test_bad_labels_are_one_line(content: str | bytes, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        read_labels(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in ["labels.csv", *parts]), message


def test_a_missing_labels_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,gloss,cat\na,1,1\n")
    with pytest.raises(UserError, match=r"did you mean .*labels\.csv"):
        read_labels(tmp_path / "label.csv")
    with pytest.raises(UserError, match="is a folder"):
        read_labels(tmp_path)


def test_names_that_nearly_match_are_suggested_and_subfolders_work(tmp_path: Path) -> None:
    (tmp_path / "signer1").mkdir()
    for name in ("Clip_1", "signer1/clip_2", "clip.v2"):
        np.savez(tmp_path / f"{name}.npz", X=X)
    files = ["clip 1", "data/signer1/clip_2", "signer1/clip_2", "clip.v2", "../x", "/etc/x"]
    numbers = np.zeros(len(files), np.int64)
    found = label_problems(Labels(tmp_path / "labels.csv", files, numbers, numbers), tmp_path)
    assert [problem.file for problem in found if problem.kind == "missing_file"] == [
        "clip 1.npz", "data/signer1/clip_2.npz", "../x.npz", "/etc/x.npz",
    ]  # fmt: skip
    assert "did you mean 'Clip_1'?" in found[0].text
    assert [problem.file for problem in found if problem.kind == "unlisted_file"] == ["Clip_1.npz"]


def test_same_names_in_two_folders_are_a_warning(sets: Sets, validate) -> None:
    (sets.val / f"{BAD}.npz").rename(sets.val / "clip_0100_how are you.npz")
    row(sets, file="clip_0100_how are you")
    sets.save()
    code, _, summary = validate("val", "--train_folder", "train")
    assert code == 0
    assert summary["counts"] == {"same_name": 1}


# --------------------------------------------------------------------------------------------------------------- tool


def spoil_several(sets: Sets) -> None:
    files = sorted(sets.val.glob("*.npz"))
    for path in files[3::5]:
        np.savez(path, X=np.full((4, 156), np.nan, F))
    files[0].write_bytes(b"")
    np.savez(files[1], X=X * 0)
    np.savez(files[2], X=X + 1)
    sets.rows[sets.val] += [{"file": f"ghost {n}", "gloss": 0, "cat": 0} for n in range(12)]
    sets.rows[sets.val][4]["gloss"] = 9
    sets.save()


def test_table_and_json_agree_and_fit_80_columns(tmp_path: Path, validate) -> None:
    sets = Sets(tmp_path, 40)
    spoil_several(sets)
    code, out, summary = validate("val", "--train_folder", "train")
    assert code == 2
    assert max(map(len, out.splitlines())) <= 80
    rows = [(match[1], match[3], int(match[2])) for match in re.finditer(r"^(error|warning) +(\d+)  (\w+) ", out, re.M)]
    counted = {(problem["severity"], problem["kind"]): 0 for problem in summary["problems"]}
    for problem in summary["problems"]:
        counted[problem["severity"], problem["kind"]] += 1
    assert {(severity, kind): count for severity, kind, count in rows} == counted
    assert [severity for severity, _, _ in rows] == sorted(severity for severity, _, _ in rows)
    errors, warnings = (sum(n for s, _, n in rows if s == severity) for severity in ("error", "warning"))
    assert (errors, warnings) == (summary["errors"], summary["warnings"])
    assert out.splitlines()[-1].endswith(f"{errors} errors, {warnings} warning{'s' * (warnings != 1)}")
    assert "ghost 0.npz" in out
    assert "and 8 more" in out


@pytest.mark.launch
def test_workers_change_nothing(tmp_path: Path) -> None:
    sets = Sets(tmp_path, 70)  # two chunks
    spoil_several(sets)
    np.savez(sets.val / f"{BAD}.npz", **make_clip(103, 8))
    written = []
    for workers in (1, 2):
        flags = ["val", "--train_folder", "train", "--num_workers", str(workers), "--json", f"{workers}.json"]
        done = launch(TOOL, *flags, cwd=tmp_path, check=False)
        assert done.code == 2
        assert done.err == ""
        written.append((done.out, (tmp_path / f"{workers}.json").read_bytes()))
    assert written[0] == written[1]
    assert json.loads(written[0][1])["counts"]["same_clip"] == 1


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["nowhere"], ["nowhere", "no such folder"]),
        (["val/labels.csv"], ["is a file", "--labels"]),
        (["empty"], ["empty", "no .npz file"]),
        (["val", "--labels", "val/label.csv"], ["did you mean val/labels.csv"]),
        (["val", "--train_folder", "nowhere"], ["--train_folder nowhere"]),
        (["bare", "--train_folder", "bare"], ["FOLDER itself", "--train_labels"]),
        (["val", "--train_labels", "val/labels.csv"], ["both sets"]),
        (["bare", "--num_gloss", "3"], ["--num_gloss", "labels"]),
        (["val", "--json", "nowhere/out.json"], ["--json", "no such folder"]),
        (["val", "--num_glos", "3"], ["did you mean --num_gloss"]),
    ],
)
def test_bad_use_is_one_line(flags: list[str], parts: list[str], sets: Sets, validate, tmp_path: Path) -> None:
    sets.save()
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    np.savez(tmp_path / "bare" / "a.npz", X=X)
    with pytest.raises(UserError) as caught:
        validate(*flags)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert not (tmp_path / "out.json").exists()
