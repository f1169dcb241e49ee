"""Compare finished runs: one table with a line for each run and a column for each metric.

python tools/compare_runs.py runs/demo_har_zero_shot runs/demo_har_full
python tools/compare_runs.py runs/* --split validation --metrics accuracy f1_macro
python tools/compare_runs.py runs/* --metrics accuracy novel.accuracy novel.harmonic_mean    (of another split too)
python tools/compare_runs.py runs/teacher runs/student --metrics accuracy --benchmark    (size and latency beside it)
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from accelerando.base.config import check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import write_text
from accelerando.inference.latency import latencies, weights_mb
from accelerando.inference.outputs import aligned_rows
from accelerando.inference.runs import read_results

SPLITS = ("test", "validation", "train")
NOT_METRICS = ("count",)


@dataclass
class Args:
    # -- input --
    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")] = ()  # their folders
    split: str | None = None  # whose metrics (default: of each run test, else validation, else train)
    metrics: tuple[str, ...] = ()  # which, or split.metric of another split (default: all)
    # -- benchmark --
    benchmark: bool = False  # also parameters, MB of the weights, and milliseconds for one sample on the CPU
    seconds: float = 2.0  # benchmark: of each run, in turn
    tokens: int = 32  # benchmark: of a text
    num_threads: int = 1  # benchmark: of the CPU
    # -- output --
    output_csv: str | None = None  # write the table there too
    config: tuple[str, ...] = ()  # YAML files with any of these settings


def metrics_of(run: Path, results: dict[str, Any], split: str | None) -> tuple[str, dict[str, float]]:
    """The split and its metrics, with those of other splits as ``split.metric``."""
    scored = {
        name: {key: value for key, value in part.items() if isinstance(value, int | float) and key not in NOT_METRICS}
        for name, part in results.items()
        if isinstance(part, dict) and "count" in part
    }
    chosen = split or next((name for name in SPLITS if name in scored), "")
    if chosen not in scored:
        raise UserError(f"{run}: no metrics of {chosen or 'any split'}; there are {', '.join(scored) or 'none'}")
    others = {f"{name}.{key}": value for name, part in scored.items() for key, value in part.items()}
    return chosen, {**scored[chosen], **others}


def main() -> None:
    args = parse_args(Args)
    if not args.runs:
        raise UserError("name the folders of finished runs: runs/one runs/other")
    check_ranges(args, seconds=(0, 3600), tokens=(1, 4096), num_threads=(1, 1024))
    rows, sizes = [], []
    for name in args.runs:
        run = Path(name)
        results = read_results(run)
        split, found = metrics_of(run, results, args.split)
        rows.append((run.name, split, found))
        sizes.append((f"{results.get('parameters', '')}", f"{weights_mb(run):.2f}") if args.benchmark else ())
    if args.benchmark:
        timed = latencies([Path(name) for name in args.runs], args.seconds, args.tokens, args.num_threads)
        sizes = [(*size, f"{milliseconds:.2f}") for size, milliseconds in zip(sizes, timed, strict=True)]
    shared = [key for key in dict.fromkeys(key for *_, found in rows for key in found) if "." not in key]
    columns = list(args.metrics or shared)
    known = {key for *_, found in rows for key in found}
    if unknown := [name for name in columns if name not in known]:
        raise UserError(f"--metrics {unknown[0]}: no run has it; there are {', '.join(shared)}")
    table = [("run", "split", *columns, *(("parameters", "MB", "ms") if args.benchmark else ()))]
    for (name, split, found), size in zip(rows, sizes, strict=True):
        table.append((name, split, *(f"{found[key]:.4f}" if key in found else "" for key in columns), *size))
    print(aligned_rows(table, left=2))
    if args.output_csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(table)
        write_text(Path(args.output_csv), text.getvalue())


if __name__ == "__main__":
    with errors_in_one_line():
        main()
