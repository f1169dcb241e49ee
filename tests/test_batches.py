"""Invariants 2, 4 and 6 at their root: one order, fair shares, nothing lost or doubled."""

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ROOT

import accelerando.data.order as order_module
import accelerando.data.pairs as pairs_module
import accelerando.train.batches as batches_module
from accelerando.data import shards
from accelerando.data.collate import collate_text
from accelerando.data.order import deal, epoch_order, permuted
from accelerando.inference.scripts import import_script
from accelerando.train.batches import TrainBatches, evaluation_batches

SIZES = [1, 2, 5, 31, 32, 33, 255, 257, 1000, 9001]


class Numbers:
    """A data set whose sample is its own row number, as a text of ``lengths[row]`` tokens."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> dict:
        return {"input_ids": np.full(self.lengths[row], row + 1), "label": row % 3}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bucketed", [False, True])
def test_an_epoch_has_every_sample_once_and_depends_on_seed_and_epoch(size: int, bucketed: bool) -> None:
    lengths = np.random.default_rng(size).integers(1, 60, size) if bucketed else None
    order = epoch_order(size, 7, 0, lengths)
    assert sorted(order) == list(range(size))
    assert np.array_equal(order, epoch_order(size, 7, 0, lengths))
    if size > 30:
        assert not np.array_equal(order, epoch_order(size, 7, 1, lengths))
        assert not np.array_equal(order, epoch_order(size, 8, 0, lengths))


def test_length_buckets_leave_little_padding_and_still_mix() -> None:
    lengths = np.random.default_rng(0).gamma(6, 8, 10_000).astype(int) + 1

    def padding(order: np.ndarray, size: int = 32) -> float:
        padded = sum(lengths[order[i : i + size]].max() * len(order[i : i + size]) for i in range(0, len(order), size))
        return 1 - lengths.sum() / padded

    first, second = epoch_order(10_000, 1, 0, lengths), epoch_order(10_000, 1, 1, lengths)
    assert padding(epoch_order(10_000, 1, 0)) > 0.4
    assert padding(first) < 0.06
    together = [{frozenset(order[i : i + 32].tolist()) for i in range(0, 9_984, 32)} for order in (first, second)]
    assert len(together[0] & together[1]) == 0  # no batch is formed again
    # Long and short texts come in turns, not one after the other.
    means = lengths[first[: 256 * 30]].reshape(30, 256).mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(30))[0, 1]) < 0.5


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
@pytest.mark.parametrize("size", [1, 2, 5, 16, 23, 56])
def test_a_window_is_dealt_out_once_in_equal_steps(size: int, batch_size: int, processes: int) -> None:
    window = np.arange(100, 100 + size)
    shares = [deal(window, batch_size, processes, rank) for rank in range(processes)]
    assert len({len(share.micro_batches) for share in shares}) == 1
    rows = [part for share in shares for part, counts in zip(share.micro_batches, share.counts, strict=True) if counts]
    assert sorted(np.concatenate(rows)) == list(window)
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
    assert all(len(part) <= batch_size for share in shares for part in share.micro_batches)
    assert all(len(part) >= 1 for share in shares for part in share.micro_batches)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("size", "processes", "accumulation"), [(103, 1, 1), (103, 2, 3), (5, 3, 2), (64, 2, 1)])
def test_windows_cover_the_epoch_for_any_number_of_workers(
    size: int, processes: int, accumulation: int, workers: int
) -> None:
    lengths = np.random.default_rng(1).integers(1, 9, size)
    seen: list[int] = []
    for rank in range(processes):
        batches = TrainBatches(Numbers(lengths), collate_text(0), 4, accumulation, 3, lengths, workers, processes, rank)
        windows = [(w.num_samples, w.position, list(w)) for w in batches.windows(0)]
        assert sum(count for count, _, _ in windows) == size
        assert windows[-1][1] == size
        assert len(windows) == batches.num_windows()
        for _, _, parts in windows:
            for batch in parts:
                assert torch.equal(batch["input_ids"][:, 0], batch["index"] + 1)
                seen += batch["index"][batch["weight"] > 0].tolist()
    assert sorted(seen) == list(range(size))


class Grown:
    """Samples whose pixels, colours together, grow with each row; ``large`` gives the size of the largest."""

    def __init__(self, large: int) -> None:
        self.large = large

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> dict:
        return {"row": row, "side": self.large if row == 7 else row}


def stack_grown(samples: list[dict]) -> dict[str, torch.Tensor]:
    (sample,) = samples
    rows = torch.full((1, sample["side"], 5, 3), sample["row"], dtype=torch.uint8)
    few = torch.arange(8, dtype=torch.float64)[::2] + sample["row"]
    return {"pixels": rows.permute(0, 3, 1, 2), "few": few, "one": torch.tensor(True), "wide": few[:1].expand(3)}


@pytest.mark.parametrize("large", [20, 10**7])  # the larger one does not fit into what the workers share
def test_batches_of_workers_are_those_of_the_process_itself(large: int) -> None:
    plain, others = (TrainBatches(Grown(large), stack_grown, 1, 1, 3, num_workers=workers) for workers in (0, 2))
    for epoch in range(2):
        expected, found = ([b for w in batches.windows(epoch) for b in w] for batches in (plain, others))
        assert len(found) == 12
        for one, other in zip(expected, found, strict=True):  # all of them are still held
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
            assert all(one[name].dtype == other[name].dtype for name in one)
            assert other["pixels"].permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.filterwarnings("ignore:Sparse invariant")
def test_sparse_batches_go_torchs_own_way() -> None:
    def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
        rows = [sample["row"] for sample in samples]
        return {"rows": torch.sparse_coo_tensor([[0]], [float(rows[0])], (2,))}

    batches = TrainBatches(Grown(20), collate, 1, 1, 3, num_workers=1)
    found = [float(batch["rows"].to_dense()[0]) for window in batches.windows(0) for batch in window]
    assert sorted(found) == list(range(12))


def test_no_slots_where_addresses_are_limited() -> None:
    import subprocess
    import sys

    program = "from accelerando.train.shared_memory import slots_for; print(slots_for(2, 2, False) is not None)"
    for limit, expected in (("unlimited", "True"), ("30000000", "False")):
        done = subprocess.run(["bash", "-c", f"ulimit -v {limit}; exec {sys.executable} -c '{program}'"],
                              capture_output=True, text=True, cwd=ROOT)  # fmt: skip
        assert done.stdout.strip() == expected, done.stderr


def test_an_epoch_that_was_left_does_not_show_in_the_next_one() -> None:
    plain, others = (TrainBatches(Grown(20), stack_grown, 1, 1, 3, num_workers=workers) for workers in (0, 2))
    next(iter(next(others.windows(0))))
    expected, found = ([b for w in batches.windows(1) for b in w] for batches in (plain, others))
    assert all(torch.equal(one["pixels"], other["pixels"]) for one, other in zip(expected, found, strict=True))


def test_going_on_elsewhere_sees_the_remaining_samples_once() -> None:
    """Two windows on one process, the rest of the epoch on three."""
    lengths = np.random.default_rng(2).integers(1, 9, 107)
    first = TrainBatches(Numbers(lengths), collate_text(0), 8, 1, 3, lengths)
    windows = iter(first.windows(4))
    seen = [row for window in (next(windows), next(windows)) for batch in window for row in batch["index"].tolist()]
    for rank in range(3):
        rest = TrainBatches(Numbers(lengths), collate_text(0), 5, 2, 3, lengths, 0, 3, rank)
        for window in rest.windows(4, position=16):
            for batch in window:
                seen += batch["index"][batch["weight"] > 0].tolist()
    assert sorted(seen) == list(range(107))


def test_iterating_never_draws_from_the_global_random_state() -> None:
    batches = TrainBatches(Numbers(np.full(20, 3)), collate_text(0), 4)
    before = torch.get_rng_state()
    assert sum(len(list(window)) for window in batches.windows(0)) == 5
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 4, 33])
def test_evaluation_batches_are_as_many_on_each_process_and_cover_all(size: int, processes: int) -> None:
    lengths = np.random.default_rng(3).integers(1, 9, size)
    seen, counts = [], []
    for rank in range(processes):
        batches = list(
            evaluation_batches(
                Numbers(lengths), collate_text(0), 3, lengths=lengths, num_processes=processes, process_index=rank
            )
        )
        counts.append(len(batches))
        for batch in batches:
            seen += batch["index"][batch["weight"] > 0].tolist()
    assert sorted(seen) == list(range(size))
    assert len(set(counts)) == 1


def test_collate_pads_to_the_longest_and_marks_what_is_real() -> None:
    samples = [{"input_ids": np.array([5, 6]), "label": 1}, {"input_ids": np.array([7, 8, 9]), "label": 0}]
    batch = collate_text(pad_token_id=2)(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]
    assert collate_text(2, multiple_of=8)(samples)["input_ids"].shape == (2, 8)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_a_permutation_of_any_length_has_every_row_once(size: int) -> None:
    for key in range(3):
        found = permuted(np.arange(size), size, key)
        assert np.array_equal(np.sort(found), np.arange(size))
        assert np.array_equal(found[size // 2 :], permuted(np.arange(size // 2, size), size, key))  # from any place
    assert size < 64 or not np.array_equal(permuted(np.arange(size), size, 0), permuted(np.arange(size), size, 1))


def test_a_permutation_looks_random() -> None:
    """Rows do not depend on their positions, nor on the row before: chi-squared of 16 x 16 counts, 255 expected."""
    size = 200_000
    for key in range(5):
        found = permuted(np.arange(size), size, key) * 16 // size
        for before in (np.arange(size) * 16 // size, np.roll(found, 1), np.roll(found, 7), np.arange(size) % 16):
            counts = np.bincount(before * 16 + found, minlength=256)
            assert 170 < ((counts - size / 256) ** 2 / (size / 256)).sum() < 360


@pytest.mark.parametrize("bucketed", [False, True])
def test_an_order_that_is_made_in_parts(bucketed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "LARGE", 1000)
    monkeypatch.setattr(order_module, "LARGE_PART", 512)
    lengths = np.random.default_rng(0).integers(1, 200, 3001) if bucketed else None
    order = epoch_order(3001, 1, 2, lengths)
    assert isinstance(order, order_module.LargeOrder) and len(order) == 3001
    assert np.array_equal(np.sort(order[:]), np.arange(3001))
    fresh = epoch_order(3001, 1, 2, lengths)
    for start, stop in [(2900, 3001), (0, 40), (500, 1600), (3001, 3010), (1023, 1025)]:  # in any turn
        assert np.array_equal(fresh[start:stop], order[:][start:stop])
    assert not np.array_equal(order[:], epoch_order(3001, 1, 3, lengths)[:])
    if bucketed:  # samples of similar length together, as in an order that is made at once
        assert np.abs(np.diff(lengths[order[:]])).mean() < 0.5 * np.abs(np.diff(lengths)).mean()


def test_the_first_batch_of_a_billion_rows() -> None:
    """Nothing is made for the whole epoch, at its start nor in its middle; steps go on at the usual pace."""

    class Billion:
        unit = "rows"

        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, row: int) -> int:
            return row

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        return {"row": torch.tensor(rows)}

    tracemalloc.start()
    begun, middle = (iter(TrainBatches(Billion(), collate, 256).windows(3, place)) for place in (0, 5 * 10**8))
    rows = [next(iter(next(windows)))["row"] for windows in (begun, middle) for _ in range(3)]
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()
    assert len(torch.cat(rows).unique()) == 6 * 256
    again = next(iter(next(TrainBatches(Billion(), collate, 256).windows(3, 5 * 10**8 + 256))))["row"]
    assert torch.equal(again, rows[4])


def test_the_order_of_many_shards_is_made_in_parts(
    pair_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = shards.ShardPairs(shards.list_shards(str(pair_set / "train")), tmp_path)
    monkeypatch.setattr(shards, "SHARDS_AT_ONCE", 1)
    whole = pairs.epoch_order(1, 0)
    monkeypatch.setattr(shards, "LARGE", 10)
    order = pairs.epoch_order(1, 0)
    assert np.array_equal(np.sort(order[:]), np.arange(len(pairs)))
    assert np.array_equal(pairs.epoch_order(1, 0)[20:55], order[:][20:55])
    places = [np.searchsorted(pairs.starts, part[:], side="right") for part in (whole, order)]
    assert np.array_equal(*places) and not np.array_equal(whole, order[:])  # the same shards in the same turn
    monkeypatch.setattr(pairs_module, "LARGE_PART", 7)
    some = np.random.default_rng(0).permutation(len(pairs))[:40]  # a subset keeps the turn of its rows
    subset = pairs_module.PairSubset(pairs, some).epoch_order(1, 0)
    assert some[subset].tolist() == [row for row in order[:].tolist() if row in some]


def test_a_set_of_shards_at_a_small_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/scale.py: ranks get the order of the epoch, also resumed on fewer, and the real pairs among it."""
    scale = import_script(ROOT / "benchmarks" / "scale.py")
    monkeypatch.setattr(shards, "LARGE", 500)
    setting = scale.Setting(tmp_path, shards=20, pairs=1500, real=2, ranks=6, resumed=4, batch=8)
    done = {name: step(setting) for name, step in scale.steps_of(setting).items()}
    assert done["2 windows of all 6 ranks"].found == {"rows": 2 * 6 * 8}
    assert done["2 windows of all 4 ranks there"].found == {"rows": 2 * 4 * 8}
    assert done["pairs of 2 real shards"].found["real_pairs"] == 2 * scale.REAL_PAIRS
    assert len({step.found["digest"] for step in done.values() if "digest" in step.found}) == 1
    assert all(step.seconds > 0 and step.peak_mb >= step.before_mb > 0 for step in done.values())

    # The checks fail when they should: a row that comes twice, another order after resuming, another pair.
    with monkeypatch.context() as broken, pytest.raises(SystemExit, match="exactly once"):
        broken.setattr(batches_module, "deal", lambda rows, *how: deal(np.append(rows[1:], rows[1]), *how))
        scale.deal_epoch(setting)
    with monkeypatch.context() as broken, pytest.raises(SystemExit, match="middle: 4 ranks read other rows"):
        calls, order_of = itertools.count(), shards.ShardPairs.epoch_order  # another order each time that it is asked
        broken.setattr(shards.ShardPairs, "epoch_order", lambda pairs, seed, _: order_of(pairs, seed, next(calls)))
        scale.read_ranks_at("middle", "resumed", setting)
    with monkeypatch.context() as broken, pytest.raises(SystemExit, match="is another pair"):
        broken.setattr(scale, "real_pair", lambda shard, number, real=scale.real_pair: real(shard, number + 1))
        scale.read_real_shards(setting)
