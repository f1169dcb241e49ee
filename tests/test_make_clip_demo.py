"""The image set of the CLIP demo: same bytes for the same seed, honest splits, captions that say what is drawn."""

import csv
import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from harness import ROOT, launch

SCRIPT = ROOT / "data" / "make_clip_demo.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_clip_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_clip_demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def piece_color(demo: ModuleType, row: dict, seed: int) -> np.ndarray:
    """Mean colour of what the piece changes in the image: everything that no other colour leaves the same."""
    other = "white" if row["color"] != "white" else "black"
    drawn = np.asarray(demo.draw_image(row, seed, 0, 64), float)
    changed = np.abs(drawn - np.asarray(demo.draw_image({**row, "color": other}, seed, 0, 64), float)).sum(2) > 40
    return drawn[changed].mean(0)


@pytest.mark.launch
def test_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    flags = ("--count", "120", "--seed", "5", "--size", "48")
    one = launch(SCRIPT, "--output_dir", "one", "--num_workers", "1", *flags, cwd=tmp_path)
    launch(SCRIPT, "--output_dir", "two", "--num_workers", "2", *flags, cwd=tmp_path)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    with open(tmp_path / "one" / "captions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 120 and all((tmp_path / "one" / row["image"]).is_file() for row in rows)
    assert "written to one" in one.out and re.search(r"train \d+, validation \d+, test \d+", one.out)


def test_draws_once_and_again_for_other_arguments(tmp_path: Path, demo: ModuleType, monkeypatch, capsys) -> None:
    def run(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["make_clip_demo.py", "--output_dir", str(tmp_path / "set"), *flags])
        demo.main()
        return capsys.readouterr().out

    assert "written to" in run("--count", "20", "--size", "32")
    before = hashes(tmp_path / "set")
    monkeypatch.setattr(demo, "draw_image", None)  # a call would fail
    assert "already in" in run("--count", "20", "--size", "32")
    monkeypatch.undo()
    assert "written to" in run("--count", "20", "--size", "32", "--seed", "1")
    assert json.loads((tmp_path / "set" / "demo.json").read_text())["seed"] == 1
    after = hashes(tmp_path / "set")
    assert before.keys() == after.keys() and before != after
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.launch
def test_leaves_a_folder_of_the_users_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    done = launch(SCRIPT, "--output_dir", "mine", "--count", "5", cwd=tmp_path, check=False)
    assert done.code == 2 and "not made by this program" in done.err and "Traceback" not in done.err
    assert hashes(tmp_path / "mine").keys() == {"notes.txt"}


def test_no_combination_on_two_sides(demo: ModuleType) -> None:
    rows = demo.make_rows(40_000, 42)  # more than there are combinations: each comes several times
    sides: dict[tuple, set[str]] = {}
    for row in rows:
        sides.setdefault(tuple(row[name] for name in demo.COLUMNS[2:-1]), set()).add(row["split"])
    assert len(sides) < 20_000 and all(len(found) == 1 for found in sides.values())
    first = [row["split"] for row in demo.make_rows(4000, 42)]
    assert 340 < first.count("validation") < 460 and 340 < first.count("test") < 460
    assert first != [row["split"] for row in demo.make_rows(4000, 43)]


def test_a_row_depends_on_seed_and_number_alone(demo: ModuleType) -> None:
    assert demo.make_rows(300, 3)[:100] == demo.make_rows(100, 3)


def test_captions_name_every_property(demo: ModuleType) -> None:
    rows = demo.make_rows(4000, 42)
    for row in rows:
        caption = row["caption"]
        for name in ("kind", "color", "size", "background", "position"):
            assert re.search(rf"\b{row[name]}\b", caption), (name, row)
        material = row["material"]
        phrases = (f"{demo.ADJECTIVES[material]} {row['kind']}", f"of {material}", f"{row['color']} {material}")
        assert any(phrase in caption for phrase in phrases), row
        assert 10 <= len(caption.split()) <= 18, caption
    assert len({row["caption"] for row in rows}) > 0.98 * len(rows)
    assert len({row["kind"] for row in rows}) >= 10 and len({row["color"] for row in rows}) == len(demo.COLORS)


def test_colors_are_seen(demo: ModuleType) -> None:
    for kind, (_, materials) in demo.KINDS.items():
        row = {"kind": kind, "material": materials[0], "size": "large", "background": "grey wall", "position": "centre"}
        red, blue = (piece_color(demo, {**row, "color": color}, 1) for color in ("red", "blue"))
        assert red[0] - red[2] > 30 and blue[2] - blue[0] > 30, (kind, red, blue)
        black, white = (piece_color(demo, {**row, "color": color}, 1).mean() for color in ("black", "white"))
        assert white - black > 60, (kind, black, white)


def test_size_position_and_kind_are_seen(demo: ModuleType) -> None:
    def mask(kind: str, size: str, position: str) -> np.ndarray:
        """Where a black piece and a pink one differ."""
        row = {"kind": kind, "material": demo.KINDS[kind][1][0], "size": size, "position": position}
        images = [
            np.asarray(demo.draw_image({**row, "color": color, "background": "white studio"}, 2, 0, 64), float)
            for color in ("black", "pink")
        ]
        return np.abs(images[0] - images[1]).sum(2) > 60

    shapes = []
    for kind in demo.KINDS:
        left, centre, right = (np.nonzero(mask(kind, "small", at))[1].mean() for at in ("left", "centre", "right"))
        assert left + 5 < centre < right - 5, kind
        large = mask(kind, "large", "centre")
        assert large.sum() > 1.6 * mask(kind, "small", "centre").sum(), kind
        shapes.append(large)
    for index, first in enumerate(shapes):
        for second in shapes[:index]:
            assert (first & second).sum() < 0.9 * (first | second).sum()


@pytest.mark.launch
def test_help_needs_no_torch() -> None:
    done = launch(SCRIPT, "--help", cwd=ROOT)
    assert "--num_workers" in done.out and "--seed" in done.out
    assert "torch" not in SCRIPT.read_text(encoding="utf-8")
