"""Clips packed, found again, changed and ordered; collated; broken files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from made_data import make_clip

from accelerando.base.errors import UserError
from accelerando.data.collate import ClipCollate
from accelerando.data.keypoints import ClipAugmentation, normalise_by_body
from accelerando.data.sign_clips import (
    ClipTable,
    TrainingClips,
    balanced_rows,
    channel_statistics,
    class_names,
    pack_clips,
    read_clip,
)
from accelerando.data.sign_labels import read_labels
from accelerando.train.batches import TrainBatches


@pytest.fixture
def table(sign_set: Path, tmp_path: Path) -> ClipTable:
    return pack_clips(read_labels(sign_set / "train" / "labels.csv"), sign_set / "train", "X", "body", tmp_path)


def test_packed_is_what_the_files_hold(sign_set: Path, tmp_path: Path, table: ClipTable) -> None:
    labels = read_labels(sign_set / "train" / "labels.csv")
    assert len(table) == 75
    for row in np.random.default_rng(0).permutation(75):
        frames, mask = read_clip(sign_set / "train" / f"{labels.files[row]}.npz", "X")
        normalised, seen = normalise_by_body(frames, mask)
        sample = table[row]
        assert (sample["frames"] == normalised).all()
        assert (sample["mask"] == seen).all()
        assert table.lengths[row] == len(frames)
        assert sample["gloss"] == row % 6
    some = table.take(np.array([7, 3]))
    assert (some[1]["frames"] == table[3]["frames"]).all()
    assert some.names == [labels.files[7], labels.files[3]]
    features = pack_clips(labels, sign_set / "train", "X2048", "none", tmp_path)
    assert features.width == 2048
    assert features.mask is None


def test_a_second_run_opens_no_clip_and_a_changed_one_is_noticed(sign_set: Path, tmp_path: Path, monkeypatch) -> None:
    import accelerando.data.sign_clips

    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("a", "b"):
        np.savez(folder / f"{name}.npz", **make_clip(np.random.default_rng(len(name)), 1))
    (folder / "labels.csv").write_text("file,gloss,cat\na,0,0\nb,1,0\n")
    labels, opened = read_labels(folder / "labels.csv"), []
    real = accelerando.data.sign_clips.read_clip
    monkeypatch.setattr(
        accelerando.data.sign_clips, "read_clip", lambda path, *rest: opened.append(path.stem) or real(path, *rest)
    )
    first = pack_clips(labels, folder, "X", "body", tmp_path / "cache")
    assert sorted(opened) == ["a", "b"]
    again = pack_clips(labels, folder, "X", "body", tmp_path / "cache")
    assert len(opened) == 2
    assert (again.frames == first.frames).all()
    (damaged,) = (tmp_path / "cache" / "clips").glob("*/frames.bin")
    expected = first.frames.copy()  # of the mapped file, which is cut off
    os.truncate(damaged, 100)
    assert (pack_clips(labels, folder, "X", "body", tmp_path / "cache").frames == expected).all()
    assert sorted(opened) == ["a", "a", "b", "b"]
    opened.clear()
    np.savez(folder / "b.npz", **make_clip(np.random.default_rng(99), 3))
    os.utime(folder / "b.npz", ns=(1, 1))
    changed = pack_clips(labels, folder, "X", "body", tmp_path / "cache")
    assert sorted(opened) == ["a", "b"]
    assert changed.frames.shape != expected.shape or (changed.frames != expected).any()
    # An attempt that broke off leaves nothing that counts.
    (folder / "b.npz").write_bytes(b"no archive")
    with pytest.raises(UserError):
        pack_clips(labels, folder, "X", "body", tmp_path / "cache")
    assert len([path for path in (tmp_path / "cache" / "clips").iterdir() if path.suffix != ".lock"]) == 2


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such file"), ("no archive", "not a readable NPZ"), ("cut off", "not a readable NPZ"),
        ("pickled", "not a readable NPZ"), ("other key", "no array 'X', only Y"), ("flat", "expected numbers"),
        ("words", "expected numbers"), ("empty", "no frames"), ("nan", "not finite"), ("other width", "the other clips 156"),
        ("wide", "--normalisation standard"),
    ],
)  # fmt: skip
def test_a_broken_clip_is_one_line(kind: str, words: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "a.npz", tmp_path / "b.npz"
    np.savez(good, X=np.ones((3, 20 if kind == "wide" else 156), np.float32))
    arrays = {
        "pickled": {"X": np.array([{"a": 1}], dtype=object)}, "other key": {"Y": np.ones((3, 156))},
        "flat": {"X": np.ones(156)}, "words": {"X": np.full((3, 156), "a")}, "empty": {"X": np.ones((0, 156))},
        "nan": {"X": np.full((3, 156), np.nan)}, "other width": {"X": np.ones((3, 10))}, "wide": {"X": np.ones((3, 20))},
    }  # fmt: skip
    if kind in arrays:
        np.savez(bad, **arrays[kind])
    elif kind == "no archive":
        bad.write_bytes(b"text")
    elif kind == "cut off":
        bad.write_bytes(good.read_bytes()[:-40])
    (tmp_path / "labels.csv").write_text("file,gloss,cat\na,0,0\nb,1,0\n")
    with pytest.raises(UserError) as error:
        pack_clips(read_labels(tmp_path / "labels.csv"), tmp_path, "X", "body", tmp_path / "cache")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert ("a.npz" if kind == "wide" else "b.npz") in str(error.value)


def test_what_is_drawn_depends_on_seed_epoch_and_clip_alone(table: ClipTable) -> None:
    dataset = TrainingClips(table, ClipAugmentation(noise=0.1, time_warp=0.2), seed=3)
    one, same = dataset.at(5, 1), dataset.at(5, 1)
    assert (one["frames"] == same["frames"]).all()
    assert (
        dataset.at(5, 2)["frames"].shape != one["frames"].shape or (dataset.at(5, 2)["frames"] != one["frames"]).any()
    )
    other = TrainingClips(table, ClipAugmentation(noise=0.1, time_warp=0.2), seed=4).at(5, 1)
    assert other["frames"].shape != one["frames"].shape or (other["frames"] != one["frames"]).any()
    for workers in (0, 2):
        batches = TrainBatches(dataset, ClipCollate(), 8, seed=3, num_workers=workers)
        found = [batch for window in batches.windows(1) for batch in window]
        if workers == 0:
            expected = found
    for one, other in zip(expected, found, strict=True):
        assert (one["frames"] == other["frames"]).all()
    assert sorted(np.concatenate([batch["index"] for batch in found])) == list(range(75))


def test_balanced_epochs_draw_every_gloss_alike() -> None:
    rng = np.random.default_rng(0)
    classes = np.array([0] * 70 + [1] * 20 + [2] * 7 + [5] * 3)
    rng.shuffle(classes)
    seen: set[int] = set()
    for epoch in range(30):
        rows = balanced_rows(classes, 1, epoch)
        assert len(rows) == len(classes)
        counts = np.bincount(classes[rows], minlength=6)[[0, 1, 2, 5]]
        assert counts.max() - counts.min() <= 1
        assert len(set(rows[classes[rows] == 0])) == counts[0]  # none twice while there are others
        seen |= set(rows.tolist())
    assert len(seen) == len(classes)  # over the epochs every clip has its turn
    assert (balanced_rows(classes, 1, 3) == balanced_rows(classes, 1, 3)).all()


def test_balanced_training_reads_what_was_drawn(table: ClipTable) -> None:
    unequal = table.take(np.array([row for row in range(75) if row % 6 == 0 or row < 30]))
    dataset = TrainingClips(unequal, ClipAugmentation(), balanced=True)
    batches = TrainBatches(dataset, ClipCollate(), 8)
    gloss = np.concatenate([batch["gloss"] for window in batches.windows(0) for batch in window])
    counts = np.bincount(gloss)
    assert len(gloss) == len(unequal)
    assert counts.max() - counts.min() <= 1


def test_buckets_need_less_padding(table: ClipTable) -> None:
    def padding(buckets: bool) -> float:
        batches = TrainBatches(TrainingClips(table, ClipAugmentation(), buckets=buckets), ClipCollate(), 8)
        masks = [batch["attention_mask"] for window in batches.windows(0) for batch in window]
        return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    assert padding(True) < 0.7 * padding(False)


def test_collate_fills_up_with_noughts(table: ClipTable) -> None:
    samples = [table[row] for row in (1, 2, 3)]
    batch = ClipCollate(multiple_of=8)(samples)
    assert batch["frames"].shape[1] % 8 == 0
    for row, sample in enumerate(samples):
        length = len(sample["frames"])
        assert (batch["frames"][row, :length].numpy() == sample["frames"]).all()
        assert not batch["frames"][row, length:].any()
        assert not batch["mask"][row, length:].any()
        assert batch["attention_mask"][row].sum() == length


def test_channel_statistics_are_those_of_all_frames(table: ClipTable) -> None:
    rows = np.arange(20)
    mean, deviation = channel_statistics(table.take(rows))
    every = np.concatenate([table[row]["frames"] for row in rows]).astype(np.float64)
    assert mean == pytest.approx(every.mean(axis=0), abs=1e-9)
    assert deviation == pytest.approx(np.where(every.std(axis=0) > 1e-6, every.std(axis=0), 1), abs=1e-6)


def test_class_names_come_from_a_table(table: ClipTable, tmp_path: Path) -> None:
    splits = {"train": table}
    assert class_names(splits, tmp_path, None, None, None) == {"gloss": list("012345"), "cat": list("012")}
    (tmp_path / "gloss_names.csv").write_text("gloss,label,cat,category\n0,HELLO,0,GREETING\n3,RED,1,COLOUR\n")
    names = class_names(splits, tmp_path, None, 7, None)
    assert names["gloss"] == ["HELLO", "1", "2", "RED", "4", "5", "6"]
    assert names["cat"] == ["GREETING", "COLOUR", "2"]
    (tmp_path / "other.csv").write_text("id,name\n0,HELLO\n")
    with pytest.raises(UserError, match=r"other\.csv: no column 'gloss'; there are id, name"):
        class_names(splits, tmp_path, str(tmp_path / "other.csv"), None, None)
