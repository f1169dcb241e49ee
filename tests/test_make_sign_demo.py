"""The sign demo's clips: the guide's format, the same bytes for a seed, honest splits, signs that the motion tells."""

import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from harness import ROOT, launch

SCRIPT = ROOT / "data" / "make_sign_demo.py"
FLAGS = (
    "--num_glosses",
    "6",
    "--num_categories",
    "2",
    "--signers",
    "6",
    "--clips_per_signer",
    "2",
    "--occluded",
    "0.3",
)


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_sign_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_sign_demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, demo: ModuleType) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("sign") / "set"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["make_sign_demo.py", "--output_dir", str(folder), "--num_workers", "1", *FLAGS])
        demo.main()
    return SimpleNamespace(folder=folder, out=out.getvalue())


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def clips(folder: Path) -> Iterator[tuple[str, dict[str, str], dict[str, np.ndarray]]]:
    for split in ("train", "val", "test"):
        for row in table(folder / split / "labels.csv"):
            with np.load(folder / split / f"{row['file']}.npz", allow_pickle=False) as arrays:
                yield split, row, dict(arrays)


def wrists(demo: ModuleType, task: object, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ways of the wrists of pose and hands, from between the shoulders: signing hand [T,2] and the other one [T,2]."""
    points = demo.make_clip(seed, task)["X"].reshape(-1, 78, 2)
    points = (points - points[:, 11:13].mean((0, 1))) * (-1 if task.left_handed else 1, 1)
    return points[:, 15 if task.left_handed else 16], points[:, 16 if task.left_handed else 15]


def test_format(made: SimpleNamespace) -> None:
    names = table(made.folder / "gloss_names.csv")
    assert list(names[0]) == ["gloss", "label", "cat", "category"]
    assert [row["gloss"] for row in names] == [*"012345"] and [row["cat"] for row in names] == [*"000111"]
    assert len({row["label"] for row in names}) == 6 and len({row["category"] for row in names}) == 2
    category = {row["gloss"]: row["cat"] for row in names}
    for split in ("train", "val", "test"):
        rows = table(made.folder / split / "labels.csv")
        assert list(rows[0]) == ["file", "gloss", "cat", "occluded", "signer"]
        assert sorted(f"{row['file']}.npz" for row in rows) == sorted(
            p.name for p in (made.folder / split).glob("*.npz")
        )
        assert {row["gloss"] for row in rows} == set(category)
        assert all(row["cat"] == category[row["gloss"]] and row["occluded"] in "01" for row in rows)
    for _, _, clip in clips(made.folder):
        frames = len(clip["X"])
        assert set(clip) == {"X", "X2048", "mask", "timestamps_ms", "meta"} and 24 <= frames <= 90
        assert clip["X"].dtype == np.float32 and clip["X"].shape == (frames, 156)
        assert clip["X"].min() >= 0 and clip["X"].max() <= 1
        assert clip["X2048"].dtype == np.float32 and clip["X2048"].shape == (frames, 2048)
        assert clip["X2048"].min() == 0 and 0.5 < (clip["X2048"] == 0).mean() < 0.95
        assert clip["mask"].dtype == bool and clip["mask"].shape == (frames, 78)
        assert clip["timestamps_ms"].dtype == np.int64 and (np.diff(clip["timestamps_ms"]) >= 0).all()
        assert abs(np.diff(clip["timestamps_ms"]).mean() - 1000 / 30) < 1
        meta = json.loads(str(clip["meta"]))
        assert meta["dims_per_frame"] == 156 and meta["order"] == "pose25,left_hand21,right_hand21,face11"
        assert meta["face_indices"] == [1, 33, 263, 133, 362, 61, 291, 105, 334, 199, 4]


def test_mask_marks_what_is_missing(made: SimpleNamespace) -> None:
    lost = {"0": [], "1": []}
    for _, row, clip in clips(made.folder):
        points, mask = clip["X"].reshape(-1, 78, 2), clip["mask"]
        assert not mask[(points == 0).all(-1)].any()
        assert mask[:, :13].mean() > 0.95 and mask[:, 67:].mean() > 0.95
        for hand in (slice(25, 46), slice(46, 67)):
            seen = mask[:, hand].any(1)
            assert (seen == mask[:, hand].all(1)).all()
            for frame in np.flatnonzero(~seen):  # where it was seen last, or nowhere
                last = points[max(frame - 1, 0), hand]
                assert (points[frame, hand] == last).all() or (points[frame, hand] == 0).all()
        busy = slice(len(mask) // 5, -len(mask) // 5)
        lost[row["occluded"]].append(1 - mask[busy, 25:67].mean())
    assert len(lost["1"]) > 10 and np.mean(lost["1"]) > np.mean(lost["0"]) + 0.1


def test_splits_share_no_signer(made: SimpleNamespace, demo: ModuleType) -> None:
    signers = {split: {row["signer"] for row in table(made.folder / split / "labels.csv")} for split in demo.SPLITS}
    assert [len(signers[split]) for split in demo.SPLITS] == [4, 1, 1] and len(set.union(*signers.values())) == 6
    tasks = demo.make_tasks(demo.Args())
    assert len(tasks) == 12 * 24 * 4 and len({task.file for task in tasks}) == len(tasks)
    by_split = {split: {(t.signer, t.left_handed) for t in tasks if t.split == split} for split in demo.SPLITS}
    assert [sum(left for _, left in by_split[split]) for split in demo.SPLITS] == [2, 1, 1]
    assert 0.12 < np.mean([task.occluded for task in tasks]) < 0.18


@pytest.mark.launch
def test_same_bytes_with_two_workers(made: SimpleNamespace, tmp_path: Path) -> None:
    launch(SCRIPT, "--output_dir", "two", "--num_workers", "2", "--no_baseline", *FLAGS, cwd=tmp_path)
    one, two = hashes(made.folder), hashes(tmp_path / "two")
    assert one.pop("baseline.json") and one == two and len(one) == 72 + 3 + 2
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_makes_once_and_again_for_other_arguments(tmp_path: Path, demo: ModuleType, monkeypatch, capsys) -> None:
    def run(*flags: str) -> str:
        small = ("--num_glosses", "3", "--num_categories", "1", "--signers", "3", "--clips_per_signer", "1")
        monkeypatch.setattr(sys, "argv", ["make_sign_demo.py", "--output_dir", str(tmp_path / "set"), *small, *flags])
        demo.main()
        return capsys.readouterr().out

    assert "written to" in run("--no_baseline")
    before = hashes(tmp_path / "set")
    monkeypatch.setattr(demo, "make_clip", None)  # a call would fail
    picture = tmp_path / "pictures" / "signs.png"
    assert "already in" in run("--no_baseline", "--preview", str(picture))
    assert hashes(tmp_path / "set") == before and picture.read_bytes()[:4] == b"\x89PNG"
    assert "Logistic regression on held-out signers" in run()  # measured when it is asked for
    monkeypatch.setattr(demo, "baseline", None)
    assert "Logistic regression on held-out signers" in run()
    monkeypatch.undo()
    assert "written to" in run("--no_baseline", "--seed", "1")
    after = hashes(tmp_path / "set")
    assert "baseline.json" not in after  # that of the old clips
    same = {name for name in before if after.get(name) == before[name]}
    assert {Path(name).suffix for name in same} <= {".csv"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "set"]


@pytest.mark.parametrize(
    "flags, message",
    [((), "not made by this program"), (("--num_categories", "30"), "between 1 and 24"), (("--signers", "2"), "3")],
)
def test_one_line_for_what_the_user_can_mend(tmp_path: Path, demo: ModuleType, monkeypatch, flags, message) -> None:
    (tmp_path / "notes.txt").write_text("keep")
    monkeypatch.setattr(sys, "argv", ["make_sign_demo.py", "--output_dir", str(tmp_path), *flags])
    with pytest.raises(demo.UserError, match=message):
        demo.main()
    assert hashes(tmp_path).keys() == {"notes.txt"}


def test_signs_of_a_family_differ_in_the_order_of_time_alone(demo: ModuleType) -> None:
    glosses = demo.make_glosses(24)
    assert len({gloss.shape for gloss in glosses}) == 8 and {gloss.move for gloss in glosses} == set(demo.MOVES)
    families = [glosses[start : start + 3] for start in range(0, 24, 3)]
    for family in families:
        assert len({gloss._replace(variant="") for gloss in family}) == 1
        assert [gloss.variant for gloss in family] == ["", "BACK", "TWICE"]
    # A hand that goes up or down at the brow: the mean over time does not tell which, the order does.
    drop = next(number for number, gloss in enumerate(glosses) if gloss.move == "DROP")
    there, back = {}, {}
    for task in demo.make_tasks(demo.Args(clips_per_signer=3, occluded=0)):
        if task.gloss in (drop, drop + 1):
            height = wrists(demo, task)[0][:, 1]
            raised = np.flatnonzero(height < (height.min() + np.median(height[:3])) / 2)
            order = np.corrcoef(raised, height[raised])[0, 1]
            (there if task.gloss == drop else back)[task.signer, task.take] = (height[raised].mean(), order)
    there, back = (np.array([found[key] for key in sorted(there)]) for found in (there, back))
    assert (there[:, 1] > 0).mean() > 0.9 and (back[:, 1] < 0).mean() > 0.9
    gap = abs(there[:, 0].mean() - back[:, 0].mean())
    assert gap < 0.6 * np.concatenate([there[:, 0], back[:, 0]]).std()


def test_hands_move_as_the_sign_says(demo: ModuleType) -> None:
    glosses = demo.make_glosses(24)
    for task in demo.make_tasks(demo.Args(clips_per_signer=1, occluded=0)):
        if task.sign.variant or task.signer not in (0, 1):  # a right-handed signer and a left-handed one
            continue
        assert task.left_handed == bool(task.signer)
        signing, other = (np.ptp(way, axis=0).max() for way in wrists(demo, task))
        assert signing > 0.05
        assert (other < 0.7 * signing) if task.sign.hands == "" else (0.6 < other / signing < 1.6), task.sign
    assert {gloss.hands for gloss in glosses} == set(demo.HANDS)


def test_hand_shapes_bend_the_fingers(demo: ModuleType) -> None:
    along, palm = np.array([[0.0, -1, 0]]), np.array([[0.0, 0, 1]])
    reach = {}
    for name, bend in demo.SHAPES.items():
        hand = demo.hand_landmarks(np.array([bend], float), along, palm)[0]
        reach[name] = -hand[[8, 12, 16, 20], 1]  # tips towards where the hand points
        assert hand.shape == (21, 3) and not hand[0].any()
    assert (reach["FLAT"] > 1.6).all() and (reach["FIST"] < 1.2).all()
    assert [*np.flatnonzero(reach["INDEX"] > 1.6)] == [0] and [*np.flatnonzero(reach["VEE"] > 1.6)] == [0, 1]
    shapes = np.array(list(demo.SHAPES.values()))
    assert len(shapes) >= 8 and np.abs(shapes[:, None] - shapes).sum(-1)[~np.eye(len(shapes), dtype=bool)].min() > 0.4


def test_elbows_are_where_two_bones_meet(demo: ModuleType) -> None:
    shoulder, wrist = np.array([0.5, 0, 0]), np.array([[0.3, -0.5, 0.4], [0.6, 1.2, 0.2]])
    elbow = demo.elbow_of(shoulder, wrist, 0.82, 0.72, 0.5)
    assert np.allclose(np.linalg.norm(elbow - shoulder, axis=1), 0.82)
    assert np.allclose(np.linalg.norm(elbow - wrist, axis=1), 0.72)


def test_baseline_beats_chance(made: SimpleNamespace, demo: ModuleType) -> None:
    found = json.loads((made.folder / "baseline.json").read_text())
    assert found["chance"] == 0.1667 and found["logistic_regression"] > 0.33
    line = f"Logistic regression on held-out signers: {100 * found['logistic_regression']:.1f} %"
    assert line in made.out and re.search(r"train 48, val 12, test 12 clips of 6 signs: written to", made.out)
    inputs, glosses = demo.read_flat(made.folder / "train")
    assert inputs.dtype == np.float32 and inputs.shape == (48, 16 * 156) and sorted(set(glosses)) == [*range(6)]


@pytest.mark.launch
def test_help_needs_no_torch() -> None:
    done = launch(SCRIPT, "--help", cwd=ROOT)
    assert "--num_workers" in done.out and "--clips_per_signer" in done.out
    assert not re.search(r"^(import|from) (torch|matplotlib)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
