"""tools/convert_ts.py: series of the UEA archive become clips that sign_train.py reads."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from tools import convert_ts

from accelerando.base.errors import UserError

HEADER = "#comment\n@problemName Made\n@dimensions 3\n@classLabel true 1.0 wave 3\n@data\n"


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/convert_ts.py", *map(str, words)])
    convert_ts.main()


def test_series_become_clips(tmp_path: Path, monkeypatch, capsys) -> None:
    rng = np.random.default_rng(0)
    series = [rng.standard_normal((3, length)).astype(np.float32) for length in (5, 9, 1)]
    lines = [":".join(",".join(map(repr, row.tolist())) for row in one) for one in series]
    names = ["wave", "1.0", "3"]
    text = HEADER + "\n".join(f"{line}:{name}" for line, name in zip(lines, names, strict=True)) + "\n"
    (tmp_path / "Made_TRAIN.ts").write_text(text)
    call(monkeypatch, tmp_path / "Made_TRAIN.ts", "--output_dir", tmp_path / "out")
    assert "3 clips of 3 classes" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "labels.csv").read_text().splitlines()))
    assert [row["gloss"] for row in rows] == ["1", "0", "2"]
    for row, one in zip(rows, series, strict=True):
        with np.load(tmp_path / "out" / f"{row['file']}.npz") as arrays:
            assert (arrays["X"] == one.T).all()
    labels = (tmp_path / "out" / "gloss_names.csv").read_text()
    assert "1,wave,0,all" in labels
    with pytest.raises(UserError, match="--overwrite"):
        call(monkeypatch, tmp_path / "Made_TRAIN.ts", "--output_dir", tmp_path / "out")
    call(monkeypatch, tmp_path / "Made_TRAIN.ts", "--output_dir", tmp_path / "out", "--overwrite")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no header", "no @data line"), ("@data\n1,2:a\n", "no class labels"),
        (HEADER + "1,2:3,4:5,x:wave\n", "line 6"), (HEADER + "1,2:3,4,5:1.0\n", "unequal length"),
        (HEADER + "1,2:3,4:5,6:other\n", "'other'"),
    ],
)  # fmt: skip
def test_what_is_no_such_file_is_one_line(text: str, words: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.ts").write_text(text)
    with pytest.raises(UserError, match=words):
        call(monkeypatch, tmp_path / "a.ts", "--output_dir", tmp_path / "out")
