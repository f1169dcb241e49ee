"""Checkpoints: written in the background, whole or in shards, loaded on any number of processes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from harness import ROOT, launch
from safetensors.torch import load_file, save_file

from accelerando.base.errors import UserError
from accelerando.train import checkpoint
from accelerando.train.averages import Ema
from accelerando.train.checkpoint import Saver, load_checkpoint, save_checkpoint
from accelerando.train.checkpoint_folders import find_damage, open_checkpoint, step_folders
from accelerando.train.optim import make_scheduler
from accelerando.train.tensor_files import Shard, Snapshot, sha256, write_tensors

WORKER = ROOT / "tests" / "sharded_state.py"
SAVED = {
    "two shards": (2, True, "background"),
    "three shards": (3, True, ""),
    "whole": (2, False, "background"),
}
LOADED = [
    *(("two shards", *way) for way in ((1, False), (2, False), (1, True), (2, True), (4, True))),
    ("three shards", 2, True),
    ("whole", 2, True),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder -> the checkpoint of a small model, and in saved.safetensors what has to be in it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            processes, fsdp, how = SAVED[name]
            made[name] = tmp_path_factory.mktemp("saved")
            flags = [how] if how else []
            launch(WORKER, "save", made[name], *flags, cwd=made[name], processes=processes, fsdp=fsdp)
        return made[name]

    return make


@pytest.mark.launch
@pytest.mark.parametrize(("name", "processes", "fsdp"), LOADED)
def test_the_same_bits_on_any_number_of_processes(name: str, processes: int, fsdp: bool, saved, tmp_path: Path) -> None:
    """Weights, averages and moments, saved beside a step that changed them all."""
    source = saved(name)
    shutil.copytree(source, tmp_path / "here")
    launch(WORKER, "load", tmp_path / "here", cwd=tmp_path, processes=processes, fsdp=fsdp)
    expected, found = (load_file(tmp_path / "here" / f"{way}.safetensors") for way in ("saved", "loaded"))
    assert expected.keys() == found.keys() and len(expected) > 20
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key


@pytest.mark.launch
def test_each_process_writes_its_part(saved) -> None:
    """Together the shards have each number once; a damaged or missing one is noticed."""
    folder = step_folders(saved("two shards") / "checkpoints")[0]
    shards = [load_file(folder / f"model/shard-0000{rank}-of-00002.safetensors") for rank in (1, 2)]
    for name, rows in (("embed.weight", (7, 6)), ("layers.0.weight", (4, 3))):
        assert tuple(len(shard[name]) for shard in shards) == rows
    assert ["seen" in shard for shard in shards] == [True, False]
    assert find_damage(folder) is None
    path = folder / "optimizer/shard-00002-of-00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert find_damage(folder) == "optimizer/shard-00002-of-00002.safetensors is corrupted (its checksum differs)"
    path.unlink()
    assert find_damage(folder) == "optimizer/shard-00002-of-00002.safetensors is missing"
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("seed", range(5))
def test_files_are_those_of_safetensors(seed: int, tmp_path: Path) -> None:
    """Any types, shapes and strides; the digest is that of the file."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    types = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8,
             torch.int8, torch.bool)  # fmt: skip
    state = {}
    for number in range(rng.randint(0, 12)):
        shape = [rng.choice((0, 1, 2, 5, 300)) for _ in range(rng.randint(0, 3))]
        tensor = (torch.randn(shape) * 9).to(rng.choice(types))
        state[f"a{number}.é"] = tensor.transpose(0, -1) if tensor.ndim > 1 and rng.random() < 0.5 else tensor
    whole = {name: Shard(tensor, (0,) * tensor.ndim) for name, tensor in state.items()}
    facts = write_tensors(tmp_path / "own.safetensors", whole, sharded=False)
    content = (tmp_path / "own.safetensors").read_bytes()
    assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "theirs.safetensors")
    own, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("own", "theirs"))
    assert own.keys() == theirs.keys() == state.keys()
    for name, tensor in theirs.items():
        assert own[name].dtype == tensor.dtype and own[name].shape == tensor.shape
        assert torch.equal(own[name], tensor)


def test_a_snapshot_keeps_its_memory_and_its_numbers() -> None:
    snapshot = Snapshot()
    weight = torch.arange(6.0).reshape(2, 3)
    taken = snapshot.take({"w": Shard(weight.T, (0, 0))})["w"].tensor
    weight.zero_()
    assert torch.equal(taken, torch.arange(6.0).reshape(2, 3).T)
    place = taken.data_ptr()
    assert snapshot.take({"w": Shard(weight.T, (0, 0))})["w"].tensor.data_ptr() == place
    assert not taken.any()
    assert snapshot.take({"w": Shard(weight, (0, 0))})["w"].tensor.shape == (2, 3)


# ------------------------------------------------------------------------------------------------ in the background


class Training:
    """A model that is trained in this process, and its checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkpoints"
        self.accelerator = Accelerator(cpu=True)
        self.model = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.schedule = make_scheduler(self.optimizer, "cosine", 10, 0, 0.5, 2, True, 1)
        self.saver = Saver(self.accelerator)
        self.ema = Ema(self.optimizer, None)

    def train(self) -> None:
        self.model(torch.ones(4, 3)).sum().backward()
        self.optimizer.step()

    def save(self, step: int, in_background: bool = True, keep: int = 2) -> Path:
        return save_checkpoint(
            self.saver, self.folder, step, self.model, self.optimizer, self.schedule, {"step": step}, keep,
            self.folder.parent / "best", self.ema, in_background=in_background,
        )  # fmt: skip

    def load(self, path: Path) -> torch.Tensor:
        load_checkpoint(self.accelerator, open_checkpoint(path), self.model, self.optimizer, self.schedule, self.ema)
        return self.model.weight.detach().clone()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing begins when this is set."""
    may_write = threading.Event()

    def write_later(*args, **options):
        may_write.wait(30)
        return write_tensors(*args, **options)

    monkeypatch.setattr(checkpoint, "write_tensors", write_later)
    return may_write


def test_training_goes_on_while_a_checkpoint_is_written(held: threading.Event, tmp_path: Path) -> None:
    """What is saved are the weights of the moment, and the best model of the moment; then the next save waits."""
    run = Training(tmp_path)
    best = tmp_path / "best"
    best.mkdir()
    save_file({"w": torch.ones(1)}, best / "model.safetensors")
    run.train()
    before = run.model.weight.detach().clone()
    path = run.save(1)
    run.train()
    shutil.rmtree(best)
    assert not path.exists() and list(run.folder.glob(".step_000001.*.draft"))
    assert not torch.equal(run.model.weight, before)
    threading.Timer(0.3, held.set).start()
    second = run.save(2)  # waits for the first one
    assert path.is_dir()
    run.saver.wait()
    assert [folder.name for folder in step_folders(run.folder)] == ["step_000002", "step_000001"]
    assert find_damage(path) is None and find_damage(second) is None
    assert load_file(path / "best/model.safetensors")["w"] == 1 and not (second / "best").exists()
    after = run.model.weight.detach().clone()
    assert torch.equal(run.load(path), before)
    assert torch.equal(run.load(second), after)


def test_a_full_disk_is_reported_and_earlier_checkpoints_stay(monkeypatch, tmp_path: Path) -> None:
    """By the flag that the next step reads, and on all processes by wait."""
    run = Training(tmp_path)
    run.train()
    first = run.save(1)
    run.saver.wait()

    def full(path: Path, *_args) -> None:
        path.write_bytes(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full)
        run.save(2, keep=1)
        run.saver.join()
        assert run.saver.failed
        with pytest.raises(UserError, match=r"step_000002: No space left on device; everything saved before is intact"):
            run.saver.wait()
        assert not run.saver.failed
        with pytest.raises(UserError, match="No space left"):
            run.save(3, in_background=False)
    assert [path.name for path in run.folder.iterdir()] == [first.name] and find_damage(first) is None
    run.save(4, keep=1)
    run.saver.wait()
    assert [path.name for path in run.folder.iterdir()] == ["step_000004"]


def test_a_defect_in_the_thread_keeps_its_traceback(monkeypatch, tmp_path: Path) -> None:
    run = Training(tmp_path)
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *_args: 1 / 0)
    run.save(1)
    with pytest.raises(ZeroDivisionError):
        run.saver.wait()
    assert not list(run.folder.iterdir())


def test_a_manifest_hashes_nothing_twice(monkeypatch, tmp_path: Path) -> None:
    """The tensors' digests come from the writing; all others are of small files."""
    from accelerando.train import checkpoint_folders

    read = []
    monkeypatch.setattr(checkpoint_folders, "sha256", lambda path: read.append(path.name) or sha256(path))
    run = Training(tmp_path)
    best = tmp_path / "best" / "best_weights.safetensors"
    best.parent.mkdir()
    small = ["metrics.jsonl", "rng.json", "state.json"]
    for step in range(4):
        if step in (0, 2):  # replaced as the scripts replace it
            save_file({"w": torch.full((3,), float(step))}, tmp_path / "new.safetensors")
            os.replace(tmp_path / "new.safetensors", best)
        path = run.save(step, in_background=False)
        assert sorted(read) == [*(["best_weights.safetensors"] if step in (0, 2) else []), *small]
        assert find_damage(path) is None
        assert "model.safetensors" in json.loads((path / "manifest.json").read_text())
        read.clear()
