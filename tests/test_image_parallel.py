"""image_classify.py on two processes: batch norms under DDP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import IMAGE, launch


@pytest.mark.launch
def test_batch_norms_under_ddp_count_every_picture_once(image_args, image_set: Path, tmp_path: Path) -> None:
    launch(IMAGE, *image_args, "--batch_size", "7", "--run_name", "run", cwd=tmp_path, processes=2)
    results = json.loads((tmp_path / "runs" / "run" / "results.json").read_text())
    for split, name in (("validation", "fold_0_val"), ("test", "test")):
        assert results[split]["count"] == len((image_set / "splits" / f"{name}.txt").read_text().splitlines())
