"""Compare finished runs: one table with a line for each run and a column for each metric.

python tools/compare_runs.py runs/demo_har_zero_shot runs/demo_har_full
python tools/compare_runs.py runs/* --split validation --metrics accuracy f1_macro
python tools/compare_runs.py runs/* --metrics accuracy novel.accuracy novel.harmonic_mean    (of another split too)
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from accelerando.base.config import parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import write_text
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
    rows = []
    for name in args.runs:
        run = Path(name)
        split, found = metrics_of(run, read_results(run), args.split)
        rows.append((run.name, split, found))
    shared = [key for key in dict.fromkeys(key for *_, found in rows for key in found) if "." not in key]
    columns = list(args.metrics or shared)
    known = {key for *_, found in rows for key in found}
    if unknown := [name for name in columns if name not in known]:
        raise UserError(f"--metrics {unknown[0]}: no run has it; there are {', '.join(shared)}")
    table = [("run", "split", *columns)]
    for name, split, found in rows:
        table.append((name, split, *(f"{found[key]:.4f}" if key in found else "" for key in columns)))
    print(aligned_rows(table, left=2))
    if args.output_csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(table)
        write_text(Path(args.output_csv), text.getvalue())


if __name__ == "__main__":
    with errors_in_one_line():
        main()
