"""How long training stands still for a checkpoint, and what it costs in memory.

  python benchmarks/checkpoint.py --parameters 150e6
  python benchmarks/checkpoint.py --parameters 1.5e9 --dtype bfloat16

A stack of linear layers with random weights and AdamW is trained by one process and saved a few times, each way in a
process of its own, in turn:

  ours         the scripts' default: copied, then written, hashed and synced while training goes on
  waiting      the same with --background_save false
  accelerate   accelerator.save_state: not hashed, not synced
  async_save   torch.distributed.checkpoint.async_save, which keeps its copies; files synced, not hashed

"stands still" is the time until training goes on, "complete" until the checkpoint is on disk, "a step beside it" the
time of a training step while it is written, as a multiple of one at other times. The first save is shown apart: it
takes memory for the copies, which is new to the process. Memory is what the process needs at most, above what it has
after the first steps.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("ours", "waiting", "accelerate", "async_save")
WIDTH = 2048


def peak_gb() -> float:
    """The most memory that this process has had, in GB (10^9 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def now_gb() -> float:
    """The memory that this process has now, in GB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def saves(way: str, folder: Path, accelerator, model, optimizer) -> tuple[Callable[[int], None], Callable[[], bool]]:
    """(begin, is_complete): what starts a save, after which training goes on, and whether it is on disk."""
    import torch

    if way in ("ours", "waiting"):
        from accelerando.train.averages import Ema
        from accelerando.train.checkpoint import Saver, save_checkpoint
        from accelerando.train.optim import make_scheduler

        saver, ema = Saver(accelerator), Ema(optimizer, None)
        schedule = make_scheduler(optimizer.optimizer, "cosine", 100, 0, 0.5, 2, True, 1)
        last: list[Path] = []

        def begin(number: int) -> None:
            last[:] = [
                save_checkpoint(
                    saver, folder, number, model, optimizer, schedule, {}, 1, folder / "best", ema,
                    in_background=way == "ours",
                )
            ]  # fmt: skip

        return begin, lambda: last[0].is_dir()
    if way == "accelerate":
        return lambda number: accelerator.save_state(str(folder / f"step_{number}")), lambda: True
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict import get_state_dict

    address = "tcp://127.0.0.1:29555"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    on_gpu = torch.cuda.is_available()
    stager = DefaultStager(StagingOptions(on_gpu, False, on_gpu, on_gpu))
    futures: list = []

    def begin_async(number: int) -> None:
        weights, state = get_state_dict(accelerator.unwrap_model(model), optimizer.optimizer)
        writer = checkpoint.FileSystemWriter(str(folder / f"step_{number}"), sync_files=True)
        found = checkpoint.async_save(
            {"model": weights, "optimizer": state}, storage_writer=writer, async_stager=stager
        )
        futures[:] = [getattr(found, "upload_completion", found)]

    return begin_async, lambda: futures[0].done()


def measure(way: str, parameters: float, dtype: str, rounds: int, folder: Path) -> dict:
    """One way of saving, in this process."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    layers = max(1, round(parameters / WIDTH**2))
    model = torch.nn.Sequential(
        *(torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=getattr(torch, dtype)) for _ in range(layers))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    model, optimizer = accelerator.prepare(model, optimizer)
    batch = torch.randn(8, WIDTH, dtype=getattr(torch, dtype))

    def step() -> float:
        start = time.perf_counter()
        accelerator.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return time.perf_counter() - start

    step()
    alone = [step() for _ in range(2)]
    begin, is_complete = saves(way, folder, accelerator, model, optimizer)
    before = now_gb()
    still, complete, beside = [], [], []
    for number in range(rounds + 1):
        start = time.perf_counter()
        begin(number)
        still.append(time.perf_counter() - start)
        while not is_complete():
            beside.append(step())
        complete.append(time.perf_counter() - start)
        for old in folder.glob(f"step_{number - 1}"):
            shutil.rmtree(old)
        alone.append(step())
    return {
        "still": still,
        "complete": complete,
        "beside": statistics.median(beside) / statistics.median(alone) if beside else None,
        "step": statistics.median(alone),
        "memory": peak_gb() - before,
        "parameters": layers * WIDTH**2,
    }


def main() -> None:
    """Runs each way in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=150e6)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and moments")
    parser.add_argument("--rounds", type=int, default=3, help="saves after the first one")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--folder", help="for the checkpoints (default: a temporary one)")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        found = measure(args.measure, args.parameters, args.dtype, args.rounds, Path(args.folder))
        print(json.dumps(found))
        return
    rows = {}
    for way in args.ways:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            command = [sys.executable, __file__, "--measure", way, "--folder", folder, "--dtype", args.dtype]
            command += ["--parameters", str(args.parameters), "--rounds", str(args.rounds)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            rows[way] = json.loads(done.stdout.splitlines()[-1])
    any_row = next(iter(rows.values()))
    millions = any_row["parameters"] / 1e6
    print(f"{millions:,.0f} million parameters, {args.dtype}, AdamW; a training step takes {any_row['step']:.2f} s")
    print(f"{'':<12}{'stands still, s':>17}{'(first)':>9}{'complete, s':>13}{'a step beside it':>18}{'memory, GB':>12}")
    for way, row in rows.items():
        later = statistics.median(row["still"][1:])
        complete = statistics.median(row["complete"][1:])
        beside = f"{row['beside']:.2f} x" if row["beside"] else "-"
        print(f"{way:<12}{later:>17.2f}{row['still'][0]:>9.2f}{complete:>13.2f}{beside:>18}{row['memory']:>12.2f}")


if __name__ == "__main__":
    main()
