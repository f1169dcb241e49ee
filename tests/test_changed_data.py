"""A run is resumed with the data that its checkpoint was made with, or says what differs; copied data is the same."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from harness import ROOT, history, results, script_module, weights
from made_data import draw_pair, make_rows, write_json, write_shard

from accelerando.base.errors import UserError
from accelerando.data.digest import describe, digest
from accelerando.data.folders import ImageFiles
from accelerando.data.pairs import PairSubset, TablePairs
from accelerando.data.shards import FACTS, ShardPairs
from accelerando.train.batches import TrainBatches
from accelerando.train.changed_data import changed_splits
from accelerando.train.checkpoint import Saver
from accelerando.train.loop import finish_step, plan_steps, training_steps
from accelerando.train.state import Run, TrainState

pytestmark = pytest.mark.usefixtures("no_figures")


def move(args: list[str], old: Path, new: Path) -> list[str]:
    """The flags with the data of ``old``, copied to ``new``."""
    shutil.copytree(old, new)
    for path in new.rglob("*"):  # as rsync without -t leaves it
        os.utime(path)
    return [word.replace(str(old), str(new)) for word in args]


def rewritten(path: Path, change: Callable[[list[dict]], list[dict]]) -> Callable[[], None]:
    """Changes the rows of a JSON file; the returned function puts them back."""
    before = path.read_text()
    write_json(path, change(json.loads(before)))
    return lambda: path.write_text(before)


def relabelled(rows: list[dict]) -> list[dict]:
    rows[3]["label"] = "space" if rows[3]["label"] == "sport" else "sport"
    return rows


def renamed(rows: list[dict]) -> list[dict]:
    return [{**row, "label": row["label"].replace("money", "z money")} for row in rows]


CHANGES = {
    "fewer": ("train", lambda rows: rows[:40], "train has 40 rows, the checkpoint was made with 203: "),
    "more": ("train", lambda rows: [*rows, rows[0]], "train has 204 rows, the checkpoint was made with 203: "),
    "reordered": ("train", lambda rows: rows[::-1], "train has 203 rows as before, but other texts or tokens and labels or another order: "),
    "edited": ("train", lambda rows: [{**rows[0], "text": "a win"}, *rows[1:]], "but other texts or tokens or another order: "),
    "relabelled": ("train", relabelled, "train has 203 rows as before, but other labels or another order: "),
    "validation": ("validation", lambda rows: rows[:-1], "validation has 60 rows, the checkpoint was made with 61: "),
    "test": ("test", relabelled, "test has 67 rows as before, but other labels or another order: "),
}  # fmt: skip


def test_changed_rows_are_refused_unless_allowed(text_args: list[str], text_set: Path, tmp_path, train_here) -> None:
    """The checkpoint stands at row 64 of an epoch; with fewer rows than that the epoch is over."""
    folder = tmp_path / "copy"
    args = move(text_args, text_set, folder)
    run = train_here("--max_steps", "2", base=args)
    kept = sorted(path.relative_to(run) for path in run.rglob("*"))
    for name, (split, change, message) in CHANGES.items():
        put_back = rewritten(folder / f"{split}.json", change)
        with pytest.raises(UserError) as caught:
            train_here("--resume", base=args)
        assert str(caught.value).startswith("runs/a/checkpoints/step_000002 was made with other data: "), name
        assert message + "put it back, start again with --overwrite" in str(caught.value), name
        assert str(caught.value).endswith("or continue anyway with --allow_changed_data"), name
        put_back()
    for split in ("train", "validation", "test"):
        rewritten(folder / f"{split}.json", renamed)
    with pytest.raises(UserError, match=r"other classes \(new: 'z money'; gone: 'money'\): put them back, or start"):
        train_here("--resume", "--allow_changed_data", base=args)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == kept  # nothing was touched

    shutil.rmtree(folder)
    train_here("--resume", "--epochs", "1")  # elsewhere, with other times: the same data
    assert "Resumed with other data" not in (run / "logs" / "train.log").read_text()
    assert results(run)["samples"] == 203


def test_less_data_than_the_position_ends_the_epoch(text_args: list[str], text_set: Path, tmp_path, train_here) -> None:
    args = move(text_args, text_set, tmp_path / "copy")
    run = train_here("--max_steps", "2", base=args)
    rewritten(tmp_path / "copy" / "train.json", lambda rows: rows[:40])
    train_here("--resume", "--allow_changed_data", base=args)
    log = (run / "logs" / "train.log").read_text()
    assert "WARNING  | Resumed with other data: train has 40 rows, the checkpoint was made with 203" in log
    assert results(run)["samples"] == 64 + 40  # of the epoch that was over, and the one after it
    assert [row["step"] for row in history(run, "validation")] == [2, 4]
    assert "allow_changed_data" not in (run / "config.yaml").read_text()  # it is said each time
    train_here("--resume", "--epochs", "3", base=args)  # the new data is now that of the run
    assert results(run)["samples"] == 64 + 2 * 40


def test_a_checkpoint_without_a_digest_still_resumes(
    text_args: list[str], text_set: Path, tmp_path, train_here
) -> None:
    """Of an earlier version: the number of rows is compared, and a log line says so."""
    args = move(text_args, text_set, tmp_path / "copy")
    run = train_here("--max_steps", "2", base=args)
    forget_data(run)
    put_back = rewritten(tmp_path / "copy" / "train.json", lambda rows: rows[:190])
    with pytest.raises(UserError, match="train has 190 rows, the checkpoint was made with 203"):
        train_here("--resume", base=args)
    put_back()
    train_here("--resume", "--max_steps", "3", base=args)
    assert "does not say which data it was made with: only the number" in (run / "logs" / "train.log").read_text()


def forget_data(run: Path) -> None:
    """Makes the checkpoints of ``run`` those of a version that did not note its data."""
    from accelerando.train.checkpoint_folders import write_manifest

    for folder in (run / "checkpoints").iterdir():
        content = json.loads((folder / "state.json").read_text())
        del content["state"]["data"]
        (folder / "state.json").write_text(json.dumps(content))
        write_manifest(folder)


class Listed:
    """A data set of a user's own: nothing but a length and rows."""

    def __init__(self, rows: list) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> object:
        return self.rows[row]


def test_a_data_set_of_ones_own_is_compared_by_its_length(train_here, monkeypatch) -> None:
    module = script_module(ROOT / "scripts" / "text_classify.py")
    load, most = module.load_data, [203]

    def own(args: object, accelerator: object) -> object:
        data = load(args, accelerator)
        table = data.splits["train"]
        data.splits["train"] = Listed([table[row] for row in range(most[0])])
        return data

    monkeypatch.setattr(module, "load_data", own)
    run = train_here("--max_steps", "2", "--no_length_buckets", name="own")
    train_here("--resume", "--max_steps", "3", "--no_length_buckets", name="own")
    most[0] = 190
    with pytest.raises(UserError, match="train has 190 samples, the checkpoint was made with 203"):
        train_here("--resume", "--max_steps", "4", "--no_length_buckets", name="own")
    assert results(run)["samples"] == 96


def test_an_epoch_without_samples_is_an_error_and_no_endless_loop() -> None:
    """A data set that shrinks while it is trained on."""
    args = SimpleNamespace(epochs=3, max_steps=None, log_every=9, eval_every=0, save_every=0, early_stop=None,
                           overfit_batches=None, find_lr=False)  # fmt: skip
    accelerator = Accelerator(cpu=True)
    run = Run(Path(), accelerator, args, TrainState(), saver=Saver(accelerator))
    rows = [torch.zeros(1)] * 10
    batches = TrainBatches(Listed(rows), lambda samples: {"x": torch.stack(samples)}, 4, accelerator=run.accelerator)
    plan_steps(run, batches)
    with pytest.raises(UserError, match=r"no sample is left after 7 of epoch 2: .* has 7 samples now, but had 10 when"):
        for window in training_steps(run, batches):
            for _ in window:
                pass
            finish_step(run, window, 0.0, 0.0)
            del rows[7 if run.state.epoch else 10 :]
    assert run.state.step == 5


# ------------------------------------------------------------------------------------------------ the other scripts


def test_changed_images_are_refused(image_args: list[str], image_set: Path, tmp_path, image_here) -> None:
    folder = tmp_path / "copy"
    args = move(image_args, image_set, folder)
    image_here("--max_steps", "2", base=args)
    lines = (folder / "splits" / "fold_0_train.txt").read_text().split("\n")
    with pytest.raises(UserError, match="train has 66 images as before, but other files and labels or another order"):
        image_here("--resume", "--fold", "1", base=args)
    path = folder / lines[0]
    content = path.read_bytes()
    path.write_bytes(draw_pair(np.random.default_rng(3))[0] + b"longer" * 20)
    with pytest.raises(UserError, match="train has 66 images as before, but other files or another order"):
        image_here("--resume", base=args)
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])  # of the same length
    with pytest.raises(UserError, match="train has 66 images as before, but other content or another order"):
        image_here("--resume", base=args)
    path.write_bytes(content)
    classes = (folder / "splits" / "classes.json").read_text()
    (folder / "splits" / "classes.json").write_text(json.dumps({"table": 0, "lamp": 1, "chair": 2}))
    with pytest.raises(UserError, match=r"other classes \(the same in another order\)"):
        image_here("--resume", "--allow_changed_data", base=args)
    (folder / "splits" / "classes.json").write_text(classes)
    image_here("--resume", "--max_steps", "3")
    with pytest.raises(UserError, match="--allow_changed_data cannot go with --trainer_type dp"):
        image_here("--trainer_type", "dp", "--target_epsilon", "3", "--allow_changed_data", name="private")


def test_changed_clips_are_refused(sign_args: list[str], sign_set: Path, tmp_path, sign_here) -> None:
    folder = tmp_path / "copy"
    args = move(sign_args, sign_set, folder)
    sign_here("--max_steps", "2", base=args)
    labels = folder / "train" / "labels.csv"
    before = labels.read_text()
    labels.write_text(before.replace("clip_003.npz,3,1,", "clip_003.npz,4,2,"))
    with pytest.raises(UserError, match="train has 75 clips as before, but other labels or another order"):
        sign_here("--resume", base=args)
    labels.write_text(before)
    clip = folder / "train" / "train clip_000.npz"
    arrays = dict(np.load(clip))
    arrays["X"][0, 0] += 0.5  # one number of one frame
    np.savez_compressed(clip, **arrays)
    with pytest.raises(UserError, match="train has 75 clips as before, but other frames or another order"):
        sign_here("--resume", base=args)
    sign_here("--resume", "--max_steps", "3")
    (tmp_path / "names.csv").write_text(
        "gloss,label,cat,category\n" + "".join(f"{n},g{n},{n // 2},c\n" for n in range(6))
    )
    with pytest.raises(UserError, match="other classes"):
        sign_here("--resume", "--max_steps", "4", "--names_csv", tmp_path / "names.csv")


def test_changed_pairs_are_refused_and_a_new_split_has_its_base_score(
    clip_args: list[str], pair_set: Path, tmp_path, clip_here
) -> None:
    folder = tmp_path / "copy"
    args = move(clip_args, pair_set, folder)
    shutil.move(folder / "test", tmp_path / "test")
    run = clip_here("--max_steps", "2", base=args)
    rng = np.random.default_rng(9)
    shard = folder / "train" / "00001.tar"
    content = shard.read_bytes()
    pairs = [draw_pair(rng) for _ in range(17)]
    write_shard(
        shard, [m for n, (image, text) in enumerate(pairs) for m in ((f"{n}.jpg", image), (f"{n}.txt", text.encode()))]
    )
    with pytest.raises(UserError, match="train has 75 pairs as before, but other shards or another order"):
        clip_here("--resume", base=args)
    shard.write_bytes(content.replace(b"a red ", b"a tan ", 1))  # of the same length
    with pytest.raises(UserError, match="train has 75 pairs as before, but other shards or another order"):
        clip_here("--resume", base=args)
    shard.write_bytes(content)
    shutil.move(tmp_path / "test", folder / "test")
    clip_here("--resume", "--max_steps", "3", base=args)
    whole = clip_here("--max_steps", "1", base=args, name="whole")
    assert results(run)["base"] == results(whole)["base"]  # the test split too, which came when two steps were taken
    assert weights(run / "best") != weights(whole / "best")


# ---------------------------------------------------------------------------------------------------------- digests


def test_the_digest_of_a_column_does_not_depend_on_how_it_is_kept() -> None:
    texts = ["a", "", "bc", "ä", "d"]
    expected = digest(pa.array(texts))
    assert digest(pa.chunked_array([texts[:2], [], texts[2:]])) == expected
    assert digest(pa.array(texts, pa.large_string())) == expected
    assert digest(pa.array(["x", *texts]).slice(1)) == expected
    assert digest(pa.array(["ab", "", "c", "ä", "d"])) != expected
    assert digest(np.array([1, 2])) != digest(np.array([2, 1]))
    assert digest("a", "b") != digest("ab", "") != digest("ab")
    assert digest(None) != digest("")


def test_pairs_have_the_digest_of_their_files_names_and_captions(pair_set: Path, tmp_path: Path) -> None:
    shards = sorted((pair_set / "train").glob("*.tar"))
    one = ShardPairs(shards, tmp_path)
    assert describe(one) == {"count": 75, "unit": "pairs", **one.digest()}
    assert ShardPairs(shards, tmp_path / "other").digest() == one.digest()
    assert PairSubset(one, np.arange(5)).digest() != PairSubset(one, np.arange(5)[::-1]).digest()
    rows = make_rows(3, 0)
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jpg").write_bytes(b"x" * number)
        row |= {"image": f"{number}.jpg", "caption": row["text"]}
    table = str(write_json(tmp_path / "captions.json", rows))
    before = TablePairs(table, tmp_path).digest()
    (tmp_path / "2.jpg").write_bytes(b"xxx")
    after = TablePairs(table, tmp_path).digest()
    assert (after["images"] == before["images"], after["captions"] == before["captions"]) == (False, True)


def test_a_set_of_shards_is_opened_from_one_file_and_a_changed_shard_is_noticed(
    pair_set: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cache = Path(shutil.copytree(pair_set / "train", tmp_path / "train")), tmp_path / "cache"
    paths = sorted(folder.glob("*.tar"))
    first = ShardPairs(paths, cache)
    # What checkpoints hold that were made when each start read every index.
    every = [f"{path.name} {digest(first._index(number))}" for number, path in enumerate(paths)]
    assert first.digest() == {"shards": digest(" ".join(every))}

    [facts] = (cache / "shard_sets").glob("*.npy")
    for file in (cache / "shards").glob("*.npy"):
        file.unlink()
    again = ShardPairs(paths, cache)
    assert (len(again), again.digest()) == (75, first.digest()) and not list((cache / "shards").glob("*.npy"))
    assert again.read(40) == first.read(40) and len(list((cache / "shards").glob("*.npy"))) == 1  # made when it is read

    np.save(facts, np.load(facts)[:2])
    assert ShardPairs(paths, cache).digest() == first.digest() and "will be made again" in caplog.text
    assert ShardPairs(paths[:2], cache).digest() != first.digest() != ShardPairs(paths[::-1], cache).digest()

    made = {file.name: file.stat().st_mtime_ns for file in (cache / "shards").glob("*.npy")}
    with tarfile.open(paths[1]) as tar:
        member = tar.getmembers()[1]
    content = bytearray(paths[1].read_bytes())
    content[member.offset_data] ^= 1
    paths[1].write_bytes(content)
    os.utime(paths[1], ns=(0, 1))
    changed = ShardPairs(paths, cache)
    assert len(changed) == 75 and changed.digest() != first.digest()
    kept = {file.name: file.stat().st_mtime_ns for file in (cache / "shards").glob("*.npy")}
    assert len(kept) == 4 and made.items() <= kept.items()  # only the changed one has a new index
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(UserError, match=r"00001\.tar: the file changed while it was in use"):
        changed.read(31)
    assert np.load(facts).dtype == FACTS


def test_an_edit_of_the_same_length_changes_the_digest_and_a_copy_does_not(pair_set: Path, tmp_path: Path) -> None:
    """In a shard: of the caption, and of either end of an image. In single files: known from their times."""
    original = pair_set / "train" / "00000.tar"
    expected = ShardPairs([original], tmp_path / "cache").digest()
    copy = shutil.copy(original, tmp_path / "00000.tar")
    assert ShardPairs([tmp_path / "00000.tar"], tmp_path / "cache").digest() == expected
    with tarfile.open(original) as tar:
        places = [member.offset_data + at for member in tar.getmembers()[3:5] for at in (0, member.size - 1)]
    for place in places:
        content = bytearray(original.read_bytes())
        content[place] ^= 1
        Path(copy).write_bytes(content)
        os.utime(copy, ns=(0, place))
        assert ShardPairs([tmp_path / "00000.tar"], tmp_path / "cache").digest() != expected, place

    (tmp_path / "x").mkdir()
    names = [f"{number}.ppm" for number in range(3)]
    for name in names:
        (tmp_path / "x" / name).write_bytes(bytes(30_000))
    files = ImageFiles(tmp_path / "x", pa.array(names), np.arange(3))
    before = describe(files)
    move([], tmp_path / "x", tmp_path / "y")
    copied = describe(ImageFiles(tmp_path / "y", pa.array(names), np.arange(3)), before)
    assert copied["times"] != before["times"] and not changed_splits({"train": before}, {"train": copied})
    (tmp_path / "x" / names[1]).write_bytes(bytes(29_999) + b"x")
    edited = describe(files, before)
    assert changed_splits({"train": before}, {"train": edited}) == {
        "train": "train has 3 images as before, but other content or another order"
    }


def test_files_with_the_same_times_are_not_read_again(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "0.ppm").write_bytes(b"x")
    files = ImageFiles(tmp_path, pa.array(["0.ppm"]), np.zeros(1))
    before = describe(files)
    monkeypatch.setattr(ImageFiles, "contents", lambda self: pytest.fail("read"))
    assert describe(files, before) == before
    monkeypatch.undo()
    os.utime(tmp_path / "0.ppm", (1, 1))
    assert describe(files, {**before, "content": "other"})["content"] == before["content"]


def test_what_is_a_change_and_what_is_not() -> None:
    train = {"train": {"count": 3, "unit": "rows", "texts": "a"}}
    assert not changed_splits({**train, "test": {"count": 1}}, train)  # a test set that is not named any more
    assert not changed_splits(train, {**train, "validation": {"count": 1, "unit": "rows"}})
    assert changed_splits({**train, "validation": {"count": 2}}, train) == {
        "validation": "validation is missing, the checkpoint was made with 2 samples"
    }
    assert changed_splits(train, {"train": {"count": 3, "unit": "pairs", "shards": "a"}}) == {
        "train": "train has 3 pairs as before, but other shards or another order"
    }
    assert not changed_splits(train, {"train": {"count": 3, "unit": "rows"}})  # one side has no digest
