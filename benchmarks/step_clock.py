"""Runs a training script, ours or another project's, and notes when each of its optimizer steps ended.

  python benchmarks/step_clock.py TIMES script.py --flags of the script

TIMES gets two numbers a step: the clock, and the processor time of the process and its workers so far, in seconds. So
all contestants are timed in the same way, whatever they log. Processor time is what other work on the machine changes
least.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import time
from pathlib import Path


def cpu_seconds() -> float:
    """Processor time of this process and its workers so far."""
    import psutil

    this = psutil.Process()
    times = [process.cpu_times() for process in [this, *this.children(recursive=True)]]
    return sum(time.user + time.system for time in times)


def note_steps(path: Path) -> None:
    """Has every optimizer of this process write its steps to ``path``."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    file, pid = path.open("w", buffering=1), os.getpid()

    def note(*_: object) -> None:
        if os.getpid() == pid:
            file.write(f"{time.perf_counter()} {cpu_seconds()}\n")

    register_optimizer_step_post_hook(note)


def speeds(path: Path, steps: int, warm_up: int, samples: int) -> dict[str, float]:
    """Samples per second after the warm-up, ``samples`` a step, and per second of processor time."""
    ends = [[float(word) for word in line.split()] for line in path.read_text().splitlines()]
    if len(ends) != steps:
        sys.exit(f"{len(ends)} steps were noted, not {steps}")
    seconds, used = (end - start for start, end in zip(ends[warm_up - 1], ends[-1], strict=True))
    samples *= steps - warm_up
    return {"samples_per_second": samples / seconds, "samples_per_cpu_second": samples / used}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("times", type=Path, help="file that gets a line a step")
    parser.add_argument("script", help="what is run")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of the script")
    args = parser.parse_args()
    note_steps(args.times)
    sys.argv, sys.path[0] = [args.script, *args.flags], str(Path(args.script).resolve().parent)
    runpy.run_path(args.script, run_name="__main__")


if __name__ == "__main__":
    main()
