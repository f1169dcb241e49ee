"""What the number of shards costs: opening, planning, dealing and resuming an epoch of very many pairs, without tars.

  python benchmarks/scale.py [--shards 4000 --pairs 20000000 --folder kept]
  python benchmarks/scale.py --shards 20000 --pairs 100000000       (needs 6 GB of disk)

Makes the indexes of shards of random lengths, for sparse files in place of the tars, and a few real shards among them.
What reads them is the code that trains: list_shards, ShardPairs, PairDataset, TrainBatches. Each step runs in a process
of its own; `MB` is the highest memory of that process while the step lasts, mapped files included, `before` what it
had when the step began (imports, and a set that is opened but for the first steps). Files come from the disk cache.

Checked is that
  - the first batches of all ranks, at the beginning and resumed in the middle on fewer ranks, are the order of the
    epoch at that place, row by row;
  - half an epoch on all ranks and the rest on fewer have every pair exactly once;
  - the pairs of the real shards come out of the loader as they were packed, and what is no image has no weight;
  - the digest that a checkpoint keeps is that of all indexes, whichever way the set was opened.

A failed check ends the benchmark. Prints a table and ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import colorsys
import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from accelerando.data.pairs import PairDataset
    from accelerando.data.shards import ShardPairs
    from accelerando.train.batches import TrainBatches

ROOT = Path(__file__).resolve().parent.parent
SEED, EPOCH = 1, 3
REAL_PAIRS, PIXELS = 40, 32  # of a real shard; of its images
TEXT = 64  # bytes of a caption in the made indexes


@dataclass
class Setting:
    """What is simulated; ``resumed`` ranks continue where ``ranks`` stopped, each with ``batch`` pairs a step."""

    folder: Path
    shards: int = 4000
    pairs: int = 20_000_000
    real: int = 3  # of the shards
    ranks: int = 64
    resumed: int = 48
    batch: int = 256
    windows: int = 2  # whose batches are read at each place

    @property
    def middle(self) -> int:
        """The position at which the run is resumed: after half of the steps of ``ranks``."""
        window = self.ranks * self.batch
        return self.pairs // 2 // window * window

    @property
    def real_shards(self) -> list[int]:
        """The numbers of the real shards: the first, the last and some between."""
        return sorted({int(number) for number in np.linspace(0, self.shards - 1, self.real)})

    def lengths(self) -> np.ndarray:
        """Pairs of each shard, int64 [shards]: unequal, and ``pairs`` in total."""
        rng = np.random.default_rng(SEED)
        made = np.setdiff1d(np.arange(self.shards), self.real_shards)
        left = self.pairs - REAL_PAIRS * len(self.real_shards)
        ends = np.linspace(0, left, len(made) + 1)
        ends[1:-1] += rng.uniform(-0.2, 0.2, len(made) - 1) * left / len(made)
        lengths = np.full(self.shards, REAL_PAIRS)
        lengths[made] = np.diff(ends.round().astype(np.int64))
        return lengths


@dataclass
class Step:
    """Seconds and memory of the block that ``measured`` runs, and what else is known of the step."""

    seconds: float = 0.0
    peak_mb: float = 0.0
    before_mb: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Times the block; the highest memory is counted from its beginning, if the system can."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before_mb = memory_mb("VmRSS")
        started = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - started
        self.peak_mb = max(self.before_mb, memory_mb("VmHWM"))  # the kernel counts in batches


def memory_mb(what: str) -> float:
    """Resident memory of this process now (VmRSS) or at its highest (VmHWM); elsewhere than on Linux the highest."""
    with contextlib.suppress(OSError):
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[what].split()[0]) / 1024
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest / (2**20 if sys.platform == "darwin" else 1024)


def check(holds: bool, what: str) -> None:
    if not holds:
        sys.exit(f"FAILED: {what}")


# -------------------------------------------------------------------------------------------------------------- data


def real_pair(shard: int, number: int) -> tuple[bytes, bytes, tuple[int, ...]]:
    """The JPEG file of one colour, the caption and the colour of a pair of a real shard."""
    from PIL import Image

    hue = (shard * 0.37 + number / REAL_PAIRS) % 1
    colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.8, 0.9))
    file = io.BytesIO()
    Image.new("RGB", (PIXELS, PIXELS), colour).save(file, "JPEG", quality=95)
    return file.getvalue(), f"pair {number} of shard {shard}".encode(), colour


def make_index(rng: np.random.Generator, length: int) -> np.ndarray:
    """An index [length] of a tar with images of 20 to 60 kB and captions of ``TEXT`` bytes, each behind its header."""
    from accelerando.data.shards import INDEX

    index = np.zeros(length, INDEX)
    sizes = rng.integers(20_000, 60_000, length).astype(np.uint64)
    ends = np.cumsum(sizes + (-sizes % np.uint64(512)) + np.uint64(3 * 512))
    index["image_start"] = np.concatenate([[0], ends[:-1]]) + 512
    index["image_size"], index["text_size"] = sizes, TEXT
    index["text_start"] = ends - np.uint64(512)
    index["content"] = rng.integers(0, 2**64, length, np.uint64)
    return index


def make_set(setting: Setting) -> Step:
    """Real shards, and for the others a sparse file and its index, as index_shard would leave it."""
    from accelerando.data.shards import index_file

    step, cache = Step(), setting.folder / "cache" / "shards"
    (setting.folder / "shards").mkdir(parents=True)
    cache.mkdir(parents=True)
    rng = np.random.default_rng(SEED)
    with step.measured():
        for number, length in enumerate(setting.lengths().tolist()):
            path = setting.folder / "shards" / f"{number:06d}.tar"
            if number in setting.real_shards:
                write_real_shard(path, number)
                continue
            index = make_index(rng, length)
            with open(path, "wb") as file:
                file.truncate(int(index["text_start"][-1]) + 3 * 512)
            np.save(index_file(path, cache), index)
    step.found["index_bytes"] = sum(file.stat().st_size for file in cache.iterdir())
    return step


def write_real_shard(path: Path, shard: int) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(REAL_PAIRS):
            image, text, _ = real_pair(shard, number)
            for suffix, content in (("jpg", image), ("txt", text)):
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


# ------------------------------------------------------------------------------------------------------------- steps


def open_set(setting: Setting) -> ShardPairs:
    from accelerando.data.shards import ShardPairs, list_shards

    return ShardPairs(list_shards(str(setting.folder / "shards")), setting.folder / "cache")


def list_files(setting: Setting) -> Step:
    from accelerando.data.shards import list_shards

    step = Step()
    with step.measured():
        shards = list_shards(str(setting.folder / "shards"))
    check(len(shards) == setting.shards, f"{len(shards)} shards were listed")
    return step


def open_and_describe(setting: Setting) -> Step:
    """Until the set is open, which every process does, and its digest is known, which the main process compares."""
    from accelerando.data.digest import describe

    step = Step()
    with step.measured():
        started = time.perf_counter()
        pairs = open_set(setting)
        opened = time.perf_counter() - started
        found = describe(pairs)
    check(found["count"] == setting.pairs, f"{found['count']:,} pairs were found")
    check(np.array_equal(np.diff(pairs.starts), setting.lengths()), "the shards have other lengths")
    step.found = {"opened_s": opened, "digest": found["shards"]}
    return step


def open_with_torch(setting: Setting) -> ShardPairs:
    """The set, after the imports that reading an image needs, which are not to be measured."""
    from accelerando.data.transforms import ImageTransform

    ImageTransform(PIXELS)(real_pair(0, 0)[0])
    return open_set(setting)


def dataset_of(pairs: ShardPairs) -> PairDataset:
    from accelerando.data.pairs import PairDataset
    from accelerando.data.transforms import ImageTransform

    return PairDataset(pairs, ImageTransform(PIXELS), SEED)


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pixels, identities and ``readable``; without ``valid`` the weight of a row says only whether it is counted."""
    import torch

    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "image_id": torch.tensor([sample["image_id"] for sample in samples]),
        "text_id": torch.tensor([sample["text_id"] for sample in samples]),
        "readable": torch.tensor([sample["valid"] for sample in samples]),
    }


def batches_of(pairs: ShardPairs, setting: Setting, ranks: int, rank: int) -> TrainBatches:
    from accelerando.train.batches import TrainBatches

    return TrainBatches(dataset_of(pairs), collate, setting.batch, seed=SEED, num_processes=ranks, process_index=rank)


def read_windows(
    pairs: ShardPairs, setting: Setting, ranks: int, position: int, windows: int
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The batches of all ranks in each of the first windows from ``position`` on, rank by rank."""
    running = [batches_of(pairs, setting, ranks, rank).windows(EPOCH, position) for rank in range(ranks)]
    for _ in range(windows):
        yield [batch for one in running for batch in next(one)]


def first_batch_at(place: str, ranks: str, setting: Setting) -> Step:
    """From an open set to the first batch of one rank: what a rank waits for when a run begins or is resumed."""
    step, pairs = Step(), open_with_torch(setting)
    position = setting.middle if place == "middle" else 0
    with step.measured():
        window = next(batches_of(pairs, setting, getattr(setting, ranks), 0).windows(EPOCH, position))
        batch = next(iter(window))
    check(len(batch["index"]) == setting.batch, "the first batch is not full")
    return step


def read_ranks_at(place: str, ranks: str, setting: Setting) -> Step:
    """The batches of all ranks in some windows, which have to be the order of the epoch at that place."""
    step, pairs = Step(), open_with_torch(setting)
    number = getattr(setting, ranks)
    position = setting.middle if place == "middle" else 0
    with step.measured():
        found = [
            np.concatenate([batch["index"][batch["weight"] > 0].numpy() for batch in window])
            for window in read_windows(pairs, setting, number, position, setting.windows)
        ]
    rows = np.concatenate(found)
    size = setting.windows * number * setting.batch
    expected = open_set(setting).epoch_order(SEED, EPOCH)[position : position + size]
    check(len(rows) == size and np.array_equal(rows, expected), f"{place}: {number} ranks read other rows")
    check(len(np.unique(rows)) == size, f"{place}: a row is read twice")
    step.found["rows"] = len(rows)
    return step


def plan_epoch(setting: Setting) -> Step:
    """All steps of an epoch as one rank plans them, nothing read."""
    step, pairs = Step(), open_set(setting)
    batches = batches_of(pairs, setting, setting.ranks, 0)
    with step.measured():
        rows = sum(len(part) for _, part, _ in batches._steps(pairs.epoch_order(SEED, EPOCH), EPOCH, 0))
    check(rows == setting.pairs, f"{rows:,} rows were planned")
    return step


def deal_epoch(setting: Setting) -> Step:
    """Half an epoch dealt to all ranks, the rest to fewer: every row has to come once. A byte a row counts them."""
    step, pairs = Step(), open_set(setting)
    times = np.zeros(setting.pairs, np.uint8)
    with step.measured():
        for ranks, begin, end in ((setting.ranks, 0, setting.middle), (setting.resumed, setting.middle, setting.pairs)):
            all_ranks = [batches_of(pairs, setting, ranks, rank) for rank in range(ranks)]
            order = pairs.epoch_order(SEED, EPOCH)
            for start, part in all_ranks[0]._parts(order, EPOCH, begin):
                if start >= end:
                    break
                for share in (batches._share_of(part) for batches in all_ranks):
                    for rows, counts in zip(share.micro_batches, share.counts, strict=True):
                        if counts:
                            np.add.at(times, rows, 1)
    check(bool((times == 1).all()), f"{int((times != 1).sum()):,} rows do not come exactly once")
    return step


def read_real_shards(setting: Setting) -> Step:
    """The windows of the epoch in which pairs of the real shards are, read on all ranks from their positions on."""
    step, pairs = Step(), open_with_torch(setting)
    order, size = pairs.epoch_order(SEED, EPOCH), setting.ranks * setting.batch
    expected = {
        int(pairs.starts[shard]) + number: real_pair(shard, number)
        for shard in setting.real_shards
        for number in range(REAL_PAIRS)
    }
    real = np.array(sorted(expected))
    places = [start for start in range(0, setting.pairs, size) if np.isin(order[start : start + size], real).any()]
    read, unreadable = set(), 0
    with step.measured():
        for place in places:
            for batch in next(read_windows(pairs, setting, setting.ranks, place, 1)):
                found = compare(batch, expected)
                check(not read & found, "a pair of a real shard was read twice")
                read |= found
                unreadable += int(batch["weight"].sum()) - len(found)
    check(read == set(expected), f"{len(expected) - len(read)} pairs of the real shards were not read")
    step.found = {"real_pairs": len(read), "rows": len(read) + unreadable, "windows": len(places)}
    return step


def compare(batch: dict[str, torch.Tensor], expected: dict[int, tuple[bytes, bytes, tuple[int, ...]]]) -> set[int]:
    """The rows of ``batch`` that are in ``expected`` and as it says; of the others no image is to be readable."""
    from accelerando.data.pairs import identity

    found = set()
    for number, row in enumerate(batch["index"].tolist()):
        if not batch["weight"][number]:  # a filler
            continue
        check(bool(batch["readable"][number]) == (row in expected), f"row {row} is readable, or not, by mistake")
        if row in expected:
            image, text, colour = expected[row]
            ids = batch["image_id"][number].item(), batch["text_id"][number].item()
            check(ids == (identity(image), identity(text)), f"row {row} is another pair")
            difference = batch["pixel_values"][number].float().mean((1, 2)).numpy() - colour
            check(bool(np.abs(difference).max() < 6), f"row {row} has another colour")
            found.add(row)
    return found


def steps_of(setting: Setting) -> dict[str, Callable[[Setting], Step]]:
    """Name -> what is run in a process of its own, in this order."""
    ranks, resumed, windows = setting.ranks, setting.resumed, setting.windows
    return {
        "indexes made": make_set,
        "shards listed": list_files,
        "set opened and described, first time": open_and_describe,
        "set opened and described again": open_and_describe,
        f"first batch, rank 0 of {ranks}": partial(first_batch_at, "beginning", "ranks"),
        f"{windows} windows of all {ranks} ranks": partial(read_ranks_at, "beginning", "ranks"),
        f"first batch in the middle, rank 0 of {resumed}": partial(first_batch_at, "middle", "resumed"),
        f"{windows} windows of all {resumed} ranks there": partial(read_ranks_at, "middle", "resumed"),
        "whole epoch planned by one rank": plan_epoch,
        f"half dealt to {ranks}, the rest to {resumed} ranks": deal_epoch,
        f"pairs of {len(setting.real_shards)} real shards": read_real_shards,
    }


def in_own_process(step: Callable[[Setting], Step], setting: Setting) -> Step:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(step, setting).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=Setting.shards)
    parser.add_argument("--pairs", type=int, default=Setting.pairs)
    parser.add_argument("--real", type=int, default=Setting.real, help="of the shards")
    parser.add_argument("--ranks", type=int, default=Setting.ranks)
    parser.add_argument("--resumed", type=int, default=Setting.resumed, help="ranks that continue in the middle")
    parser.add_argument("--batch", type=int, default=Setting.batch, help="pairs of a rank in each step")
    parser.add_argument("--windows", type=int, default=Setting.windows, help="steps whose batches are read at a place")
    parser.add_argument("--folder", type=Path, help="keep the set here; one that was kept is used again")
    args = vars(parser.parse_args())
    sys.path.insert(0, str(ROOT / "lib"))
    kept = args.pop("folder")
    with contextlib.nullcontext(kept) if kept else tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), **args)
        if kept and (made := kept / "setting.json").exists():
            check(json.loads(made.read_text()) == args, f"{kept} holds another set: name another --folder")
        shutil.rmtree(setting.folder / "cache" / "shard_sets", ignore_errors=True)  # the first time is measured
        print(f"{setting.shards:,} shards, {setting.pairs:,} pairs, {os.cpu_count()} cores\n")
        print(f"{'':<48}{'seconds':>9}{'MB':>8}{'before':>8}")
        steps: dict[str, Step] = {}
        for name, run in steps_of(setting).items():
            if run is make_set and (setting.folder / "shards").exists():
                continue
            steps[name] = done = in_own_process(run, setting)
            print(f"{name:<48}{done.seconds:9.2f}{done.peak_mb:8.0f}{done.before_mb:8.0f}", flush=True)
            if run is make_set and kept:
                (kept / "setting.json").write_text(json.dumps(args))
        digests = {done.found["digest"] for done in steps.values() if "digest" in done.found}
        check(len(digests) == 1, "the digest depends on how the set was opened")
        figures = {
            name: {"s": done.seconds, "mb": done.peak_mb, "mb_before": done.before_mb, **done.found}
            for name, done in steps.items()
        }
        print(json.dumps({**args, "steps": figures}))


if __name__ == "__main__":
    main()
