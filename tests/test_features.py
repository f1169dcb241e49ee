"""Features of a frozen part of a model: computed once, kept in the cache, made again when anything changes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from harness import ROOT, launch, start

from accelerando.base.errors import UserError
from accelerando.data.digest import file_stamps
from accelerando.train.features import cached_features, weights_digest

RANKS = ROOT / "tests" / "features_on_ranks.py"


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[np.ndarray, bool]]:
    """``read(key, values)``: the features, and whether they were computed."""

    def call(key: dict, values: np.ndarray | None = None) -> tuple[np.ndarray, bool]:
        calls = []

        def compute() -> np.ndarray:
            calls.append(1)
            return np.arange(12, dtype=np.float32).reshape(4, 3) if values is None else values

        return cached_features(Accelerator(cpu=True), tmp_path / "cache", key, compute), bool(calls)

    return call


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_they_are_computed_once_and_read_from_a_memory_map(kind: str, read, tmp_path: Path, caplog) -> None:
    values = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(kind)
    with caplog.at_level("INFO", "accelerando"):
        first, computed = read({"weights": "a"}, values)
        again, more = read({"weights": "a"}, values + 1)
    assert (computed, more) == (True, False)
    for found in (first, again):
        assert isinstance(found, np.memmap)
        assert found.dtype == kind
        assert np.array_equal(found, values)
        assert not found.flags.writeable
    (folder,) = (tmp_path / "cache" / "features").glob("*[!k]")
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in lines] == [
        f"Features are cached in {folder}",
        f"Features are read from {folder}",
    ]
    assert all("5 x 2 x 3 numbers" in line for line in lines)
    assert json.loads((folder / "features.json").read_text())["key"]["weights"] == "a"


@pytest.mark.parametrize("part", ["weights", "transform", "files"])
def test_another_key_is_another_cache(part: str, read) -> None:
    key = {"weights": "a", "transform": {"size": 224, "mean": [0.5, 0.5, 0.5]}, "files": "b"}
    assert read(key)[1]
    assert not read(dict(reversed(key.items())))[1]  # their order is no change
    changed = {**key, part: {"size": 224, "mean": [0.5, 0.5, 0.4]} if part == "transform" else "c"}
    assert read(changed, np.zeros((4, 3), np.float32))[1]
    assert not read(key)[1]


def test_the_digest_of_weights_sees_every_parameter_and_buffer_and_not_the_layout() -> None:
    known = weights_digest(net())
    assert weights_digest(net().to(memory_format=torch.channels_last).eval().requires_grad_(False)) == known
    for name, tensor in (*net().named_parameters(), *net().named_buffers()):
        other = net()
        with torch.no_grad():
            found = dict((*other.named_parameters(), *other.named_buffers()))[name]
            found.reshape(-1)[-1] += 1 if tensor.dtype == torch.int64 else 1e-3
        assert weights_digest(other) != known, name
    assert weights_digest(net().half()) != known
    assert weights_digest(torch.nn.Sequential(*reversed(net()))) != known


def test_the_facts_of_files_change_with_name_size_and_time(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"12345")
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    known = file_stamps(tmp_path, ["a.jpg", "b.jpg"])
    assert file_stamps(tmp_path, ["a.jpg", "b.jpg"]) == known
    assert file_stamps(tmp_path, ["b.jpg", "a.jpg"]) != known
    os.utime(tmp_path / "b.jpg", ns=(10**18, 10**18 + 1))
    assert file_stamps(tmp_path, ["a.jpg", "b.jpg"]) != known
    (tmp_path / "b.jpg").write_bytes(b"1234")
    os.utime(tmp_path / "b.jpg", ns=(10**18, 10**18))
    assert file_stamps(tmp_path, ["a.jpg", "b.jpg"]) != known
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(UserError, match=r"b.jpg: the file no longer exists"):
        file_stamps(tmp_path, ["a.jpg", "b.jpg"])


@pytest.mark.parametrize("damage", ["cut", "changed", "no json", "broken json"])
def test_a_damaged_cache_is_made_again(damage: str, read, tmp_path: Path, caplog) -> None:
    values = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    read({"weights": "a"}, values)
    (folder,) = (tmp_path / "cache" / "features").glob("*[!k]")
    file = folder / "features.npy"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-50])
    elif damage == "changed":
        content[-5] ^= 1
        file.write_bytes(content)
    elif damage == "no json":
        (folder / "features.json").unlink()
    else:
        (folder / "features.json").write_text("{")
    with caplog.at_level("WARNING", "accelerando"):
        found, computed = read({"weights": "a"}, values)
    assert computed
    assert np.array_equal(found, values)
    assert "is corrupted and will be made again" in caplog.text
    assert not read({"weights": "a"}, values)[1]


def test_a_cache_that_cannot_be_written_is_one_line(read, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="name a folder that is writable") as error:
        read({})
    assert "\n" not in str(error.value)


@pytest.mark.launch
def test_two_ranks_compute_together_and_then_read(tmp_path: Path) -> None:
    for computed in (1, 0):
        launch(RANKS, tmp_path / "cache", cwd=tmp_path, processes=2)
        for rank in (0, 1):
            found = json.loads((tmp_path / f"rank{rank}.json").read_text())
            assert found == {"computed": computed, "values": [[0.0] * 3] * 2 + [[1.0] * 3] * 2}
    assert not list((tmp_path / "cache").rglob("*.draft"))


@pytest.mark.launch
def test_of_two_runs_at_once_one_computes_and_the_other_waits(tmp_path: Path) -> None:
    processes = [start(RANKS, tmp_path / "cache", name, cwd=tmp_path) for name in "ab"]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    found = [json.loads((tmp_path / f"{name}0.json").read_text()) for name in "ab"]
    assert sorted(each["computed"] for each in found) == [0, 1]
    assert found[0]["values"] == found[1]["values"]
