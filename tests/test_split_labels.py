"""tools/split_labels.py: sides are disjoint and complete, shares hold, groups stay whole, and each gloss is trained."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT, launch

from accelerando.base.errors import UserError

TOOL = ROOT / "tools" / "split_labels.py"
SIDES = ("train", "val", "test")


def write_rows(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def random_rows(seed: int, groups: int = 20) -> list[dict]:
    """A random number of clips and glosses, glosses of very different sizes; names with spaces and commas."""
    rng = np.random.default_rng(seed)
    glosses = int(rng.integers(2, 30))
    weights = rng.dirichlet(np.ones(glosses))
    count = int(rng.integers(60, 500))
    return [
        {
            "file": f"clip_{number:04d}_how are you, {number}" + ".npz" * (number % 2),
            "gloss": int(gloss) * 3,
            "cat": int(gloss) % 4,
            "signer": f"signer {int(rng.integers(groups))}",
            "note": "" if number % 3 else 'two\nlines "quoted"',
        }
        for number, gloss in enumerate(rng.choice(glosses, count, p=weights))
    ]


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """``split(rows, *flags, out="out") -> (side -> rows, output)``: the tool's ``main`` in this process."""
    spec = importlib.util.spec_from_file_location("split_labels", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "split_labels", module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)

    def run(rows: list[dict], *flags: object, out: str = "out") -> tuple[dict[str, list[dict]], str]:
        write_rows(tmp_path / "labels.csv", rows)
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--labels", "labels.csv", "--output_dir", out, *map(str, flags)])
        capsys.readouterr()
        module.main()
        files = {side: tmp_path / out / f"labels_{side}.csv" for side in SIDES}
        read = {}
        for side, path in files.items():
            if path.exists():
                with open(path, newline="", encoding="utf-8") as file:
                    read[side] = list(csv.DictReader(file))
        return read, capsys.readouterr().out

    return run


def as_text(rows: Iterable[dict]) -> list[tuple[str, ...]]:
    return [tuple(str(value) for value in row.values()) for row in rows]


@pytest.mark.parametrize("seed", range(8))
def test_each_gloss_is_dealt_out_in_the_wanted_shares(seed: int, split) -> None:
    rows = random_rows(seed)
    shares = dict(zip(SIDES, [(0.8, 0.1, 0.1), (0.7, 0.2, 0.1), (0.5, 0.25, 0.25)][seed % 3], strict=True))
    sides, _ = split(rows, "--validation_fraction", shares["val"], "--test_fraction", shares["test"])
    # Disjoint and complete, every column kept, in the order of the file.
    assert sorted(as_text(itertools.chain(*sides.values()))) == sorted(as_text(rows))
    order = {text: number for number, text in enumerate(as_text(rows))}
    totals = Counter(str(row["gloss"]) for row in rows)
    for side, part in sides.items():
        places = [order[text] for text in as_text(part)]
        assert places == sorted(places)
        assert list(part[0]) == list(rows[0])
        counts = Counter(row["gloss"] for row in part)
        for gloss, total in totals.items():
            exact = total * shares[side]
            assert abs(counts[gloss] - exact) < 1 or (side == "train" and counts[gloss] == 1), (gloss, total)
        assert abs(len(part) / len(rows) - shares[side]) < 0.03
    assert {row["gloss"] for row in sides["train"]} == set(totals)


@pytest.mark.parametrize("seed", range(8))
def test_groups_are_not_torn(seed: int, split) -> None:
    rows = random_rows(seed, groups=20 + 5 * seed)
    sides, out = split(rows, "--group_column", "signer")
    assert sorted(as_text(itertools.chain(*sides.values()))) == sorted(as_text(rows))
    signers = [{row["signer"] for row in part} for part in sides.values()]
    assert sum(map(len, signers)) == len(set.union(*signers)) == len({row["signer"] for row in rows})
    for side, share in zip(SIDES, (0.8, 0.1, 0.1), strict=True):
        assert abs(len(sides[side]) / len(rows) - share) < 0.05
    assert {row["gloss"] for row in sides["train"]} == {str(row["gloss"]) for row in rows}
    assert "signers" in out.splitlines()[0]


def test_groups_spread_glosses_better_than_chance(split) -> None:
    """The distance of each side's gloss counts from its share, beside that of signers dealt out at random."""
    ours, chance = [], []
    for seed in range(4):
        rows = random_rows(100 + seed, groups=30)
        sides, _ = split(rows, "--group_column", "signer", "--validation_fraction", 0.2, out=f"out{seed}")
        totals = Counter(str(row["gloss"]) for row in rows)

        def distance(part: list[dict], share: float, totals: Counter = totals) -> float:
            counts = Counter(str(row["gloss"]) for row in part)
            return sum((counts[gloss] - share * total) ** 2 / total for gloss, total in totals.items())

        ours.append(distance(sides["val"], 0.2))
        signers = sorted({row["signer"] for row in rows})
        for number in range(10):
            held = set(np.random.default_rng(number).permutation(signers)[: len(signers) // 5])
            chance.append(distance([row for row in rows if row["signer"] in held], 0.2))
    assert np.mean(ours) < 0.6 * np.mean(chance)


@pytest.mark.parametrize("flags", [(), ("--group_column", "signer")])
def test_the_seed_decides(flags, split) -> None:
    rows = random_rows(3, groups=60)
    first, _ = split(rows, *flags)
    again, _ = split(rows, *flags, out="again")
    other, _ = split(rows, *flags, "--seed", 7, out="other")
    assert first == again
    assert first != other


def test_a_gloss_keeps_its_only_clips_for_training(split) -> None:
    rows = [{"file": f"a{n}", "gloss": n, "cat": 0} for n in range(30)]
    rows += [{"file": f"b{n}", "gloss": 30 + n // 2, "cat": 0} for n in range(20)]
    sides, out = split(rows, "--validation_fraction", 0.3, "--test_fraction", 0.3)
    assert {row["gloss"] for row in sides["train"]} == {str(n) for n in range(40)}
    assert sides["val"]
    assert sides["test"]
    assert "of 40 glosses have no validation clip" in out
    assert "no training clip" not in out


def test_what_cannot_be_trained_is_named(split) -> None:
    """Each gloss has one signer, and a side cannot stay empty."""
    rows = [{"file": f"a{n}", "gloss": n % 3, "cat": 0, "signer": f"s{n % 3}"} for n in range(30)]
    sides, out = split(rows, "--group_column", "signer", "--test_fraction", 0)
    lost = {row["gloss"] for row in sides["val"]}
    assert len(lost) == 1
    assert f"1 of 3 glosses have no training clip: {lost.pop()}" in out
    # Where another group has the gloss too, it is trained.
    rows += [{"file": f"b{n}", "gloss": n, "cat": 0, "signer": "everyone"} for n in range(3)]
    _, out = split(rows, "--group_column", "signer", "--test_fraction", 0, "--overwrite")
    assert "no training clip" not in out


def test_a_file_listed_twice_stays_on_one_side(split) -> None:
    rows = [{"file": f"clip {n // 2}" + ".npz" * (n % 2), "gloss": n % 10 // 2, "cat": 0} for n in range(200)]
    sides, _ = split(rows)
    files = [{row["file"].removesuffix(".npz") for row in part} for part in sides.values()]
    assert sum(map(len, files)) == len(set.union(*files)) == 100


def test_the_table_counts_what_was_written(split) -> None:
    sides, out = split(random_rows(5))
    rows = {words[0]: words for words in map(str.split, out.splitlines()) if words and words[0] in SIDES}
    for side, part in sides.items():
        assert int(rows[side][1]) == len(part)
        assert rows[side][2] == f"{len(part) / sum(map(len, sides.values())):.1%}"
        assert int(rows[side][4]) == len({row["gloss"] for row in part})
    assert max(map(len, out.splitlines())) <= 80


def test_nothing_is_overwritten_unasked_and_no_old_side_stays(split, tmp_path: Path) -> None:
    rows = random_rows(6)
    first, _ = split(rows)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"labels_train\.csv is there already: --overwrite"):
        split(rows, "--seed", 1)
    assert split(rows, "--overwrite")[0] == first
    sides, _ = split(rows, "--test_fraction", 0, "--val-fraction", 0.25, "--overwrite")
    assert set(sides) == {"train", "val"}
    assert abs(len(sides["val"]) / len(rows) - 0.25) < 0.03
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "labels_train.csv", "labels_val.csv", "notes.txt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--labels", "label.csv"], ["label.csv", "did you mean labels.csv"]),
        (["--group_column", "singer"], ["labels.csv", "'singer'", "signer"]),
        (["--group_column", "note"], ["labels.csv", "line", "note is empty"]),
        (["--group_column", "cat", "--labels", "two.csv"], ["two.csv", "2 groups", "too few"]),
        (["--labels", "singles.csv"], ["singles.csv", "too few", "val"]),
        (["--validation_fraction", "0.6", "--test_fraction", "0.4"], ["0.6", "0.4", "training"]),
        (["--validation_fraction", "-0.1"], ["--validation_fraction -0.1"]),
        (["--output_dir", "labels.csv"], ["--output_dir labels.csv is a file"]),
        (["--output_dir", "labels.csv/x"], ["--output_dir labels.csv/x"]),
        (["--labels", "out/labels_train.csv", "--overwrite"], ["out/labels_train.csv", "overwritten"]),
        (["--sead", "1"], ["did you mean --seed"]),
    ],
)
def test_bad_use_is_one_line_and_writes_nothing(flags, parts, split, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_rows(tmp_path / "two.csv", [{"file": f"a{n}", "gloss": n % 2, "cat": n % 2} for n in range(40)])
    write_rows(tmp_path / "singles.csv", [{"file": f"a{n}", "gloss": n, "cat": 0} for n in range(5)])
    if "out/labels_train.csv" in flags:
        write_rows(tmp_path / "out" / "labels_train.csv", random_rows(1))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        split(random_rows(1), *flags)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert sorted(set(tmp_path.rglob("*")) - {tmp_path / "labels.csv"}) == before


@pytest.mark.launch
def test_the_process_ends_with_one_line(tmp_path: Path) -> None:
    done = launch(TOOL, "--labels", "none.csv", "--output_dir", "out", cwd=tmp_path, check=False)
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: none.csv: no such file\n"
