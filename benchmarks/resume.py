"""Is a training that was killed and resumed the same as one that was left alone? Ours beside its neighbours.

  python benchmarks/resume.py [--kills 17 23 31]

The same small training (203 texts, a BERT of two layers with dropout, batches of 16, 3 epochs of 13 steps, a checkpoint
every 5 steps) on 1 and 2 processes: once undisturbed, and once for each of the given steps, in which it is killed with
SIGKILL, and resumed from the newest checkpoint in the way that its documentation shows. Contestants:

  ours                scripts/text_classify.py with --resume
  trainer             transformers.Trainer with resume_from_checkpoint
  accelerate          the loop of Accelerate's examples/by_feature/checkpointing.py: save_state, skip_first_batches
  accelerate_seeded   the same with use_seedable_sampler and set_epoch
  accelerate_stateful the same as `accelerate` with use_stateful_dataloader (needs torchdata)

Of the rows of the epoch that was interrupted: which share was trained on more often than in the undisturbed run, less
often, or in another step; and whether the weights at the end have the same bytes. What was computed after the newest
checkpoint and lost counts for nobody.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS, BATCH, EPOCHS, SAVE_EVERY, SEED = 203, 16, 3, 5, 7
STEPS_OF_EPOCH = -(-ROWS // BATCH)
CONTESTANTS = ("ours", "trainer", "accelerate", "accelerate_seeded", "accelerate_stateful")


# ------------------------------------------------------------------------------------------------- in the trainings


class Recorder:
    """Writes the rows of each training step of this rank, and kills the process in the step that it is told."""

    def __init__(self, folder: Path) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.file = open(folder / f"rows_{self.rank}.jsonl", "a")  # noqa: SIM115
        self.step, self.kill_at = int(os.environ["FIRST_STEP"]), int(os.environ["KILL_AT"])

    def step_on(self, rows: list[int]) -> None:
        """Call it in the forward pass of each optimizer step."""
        self.step += 1
        if self.step == self.kill_at and self.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.file.write(json.dumps({"step": self.step, "rows": rows}) + "\n")
        self.file.flush()


def run_ours(folder: Path, data: Path, resume: Path | None) -> None:
    """text_classify.py as it is, but for a loss that notes its rows before it is computed."""
    from accelerando.inference.scripts import import_script

    module, recorder = import_script(ROOT / "scripts" / "text_classify.py"), Recorder(folder)
    loss_of = module.compute_loss

    def noted(model, batch, data, args):
        if model.training:
            recorder.step_on(
                batch["index"][batch["valid"] > 0].tolist() if "valid" in batch else batch["index"].tolist()
            )
        return loss_of(model, batch, data, args)

    module.compute_loss = noted
    share = int(os.environ.get("WORLD_SIZE", "1"))
    sys.argv = [
        "text_classify.py", "--train_file", str(data / "rows.json"), "--validation_fraction", "0", "--test_file",
        str(data / "rows.json"), "--model_name", str(data / "bert"), "--epochs", str(EPOCHS), "--batch_size",
        str(BATCH // share), "--lr", "1e-3", "--save_every", str(SAVE_EVERY), "--keep_checkpoints", "9", "--seed",
        str(SEED), "--output_dir", str(folder), "--run_name", "run", "--report_to", "none",
        *(["--resume"] if resume else []),
    ]  # fmt: skip
    module.main()


def open_model_and_rows(data: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The classifier with the seed's random head, and the tokenized rows, each with its number."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(SEED)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(data / "bert")
    rows = json.loads((data / "rows.json").read_text())
    encoded = tokenizer([row["text"] for row in rows], padding=True)
    names = sorted({row["label"] for row in rows})
    samples = [
        {**{key: encoded[key][number] for key in ("input_ids", "attention_mask")}, "labels": names.index(row["label"]),
         "number": number}
        for number, row in enumerate(rows)
    ]  # fmt: skip
    return AutoModelForSequenceClassification.from_pretrained(data / "bert", num_labels=len(names)), samples


def run_trainer(folder: Path, data: Path, resume: Path | None) -> None:
    """transformers.Trainer with its defaults; the loss notes its rows."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    model, samples = open_model_and_rows(data)
    recorder = Recorder(folder)

    class Noting(Trainer):
        def compute_loss(self, model, inputs, **others):
            recorder.step_on(inputs.pop("number").tolist())
            return super().compute_loss(model, inputs, **others)

    arguments = TrainingArguments(
        str(folder / "run"), num_train_epochs=EPOCHS, learning_rate=1e-3, save_steps=SAVE_EVERY, seed=SEED,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")), use_cpu=True, report_to="none",
        disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Noting(model, arguments, train_dataset=samples, data_collator=default_data_collator)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.accelerator.is_main_process:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder / "end")


def run_accelerate(folder: Path, data: Path, resume: Path | None, stateful: bool, seeded: bool) -> None:
    """The loop of Accelerate's example for checkpoints inside an epoch."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, set_seed
    from transformers import default_data_collator, get_linear_schedule_with_warmup

    settings = DataLoaderConfiguration(use_stateful_dataloader=stateful, use_seedable_sampler=seeded)
    accelerator = Accelerator(cpu=True, dataloader_config=settings)
    set_seed(SEED)
    model, samples = open_model_and_rows(data)
    recorder = Recorder(folder)
    size = BATCH // accelerator.num_processes
    loader = torch.utils.data.DataLoader(samples, size, shuffle=True, collate_fn=default_data_collator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS_OF_EPOCH * EPOCHS * accelerator.num_processes)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    overall, first, skipped = 0, 0, None
    if resume:
        accelerator.load_state(str(resume))
        overall = int(resume.name.removeprefix("step_"))
        first, skipped = divmod(overall, len(loader))
    for epoch in range(first, EPOCHS):
        model.train()
        if seeded:
            loader.set_epoch(epoch)
        active = loader
        if resume and epoch == first and not stateful:
            active = accelerator.skip_first_batches(loader, skipped)
        for batch in active:
            recorder.step_on(batch.pop("number").tolist())
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            overall += 1
            if overall % SAVE_EVERY == 0:
                accelerator.save_state(str(folder / "run" / f"step_{overall}"))
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder / "end")
    accelerator.end_training()


def train(contestant: str, folder: Path, data: Path, resume: Path | None) -> None:
    """One training of a contestant, in this process."""
    if contestant == "ours":
        run_ours(folder, data, resume)
    elif contestant == "trainer":
        run_trainer(folder, data, resume)
    else:
        run_accelerate(folder, data, resume, contestant.endswith("stateful"), contestant.endswith("seeded"))


# ------------------------------------------------------------------------------------------------------- the driver


def make_data(folder: Path) -> None:
    """Rows of made words, and the folder of a small BERT."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    draw = random.Random(SEED)
    topics = {label: draw.sample(words, 30) for label in ("first", "second", "third")}
    rows = [
        {"text": " ".join(draw.choices(topics[label] + words[:20], k=draw.randint(5, 12))), "label": label}
        for label in draw.choices(list(topics), k=ROWS)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "bert").mkdir()
    vocabulary = folder / "bert" / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder / "bert")
    config = BertConfig(
        vocab_size=len(words) + 5, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder / "bert")


def start(contestant: str, folder: Path, data: Path, processes: int, kill_at: int, resume: Path | None) -> int:
    """Trains in processes of its own; returns the exit code."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, __file__, "--contestant", contestant, "--folder", str(folder)]
    command += ["--data", str(data), *(["--checkpoint", str(resume)] if resume else [])]
    first = step_of(resume) if resume else 0
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "lib"), os.environ.get("PYTHONPATH", "")]),
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "KILL_AT": str(kill_at),
        "FIRST_STEP": str(first), "ACCELERANDO_CACHE": str(data / "cache"),
    }  # fmt: skip
    with open(folder / "output.txt", "a") as output:
        return subprocess.run(command, env=environment, stdout=output, stderr=output, cwd=folder).returncode


def newest_checkpoint(folder: Path) -> Path:
    """The complete checkpoint of the most steps."""
    run = folder / "run"
    found = [*run.glob("checkpoints/step_*"), *run.glob("checkpoint-*"), *run.glob("step_*")]
    return max(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The steps in a checkpoint's name."""
    return int(re.sub(r"\D", "", checkpoint.name))


def read_steps(folder: Path, last: int) -> list[dict[str, Any]]:
    """What the ranks noted so far, without the steps after ``last``."""
    lines = [json.loads(line) for path in sorted(folder.glob("rows_*.jsonl")) for line in path.read_text().splitlines()]
    return [line for line in lines if line["step"] <= last]


def epoch_of(steps: list[dict[str, Any]], epoch: int) -> tuple[Counter, dict[int, set[int]]]:
    """How often each row was used in an epoch (from 0), and the rows of each of its steps."""
    wanted = range(epoch * STEPS_OF_EPOCH + 1, (epoch + 1) * STEPS_OF_EPOCH + 1)
    rows: Counter = Counter()
    by_step: dict[int, set[int]] = {}
    for line in steps:
        if line["step"] in wanted:
            rows.update(line["rows"])
            by_step.setdefault(line["step"], set()).update(line["rows"])
    return rows, by_step


def digest(folder: Path, contestant: str) -> str:
    """Of the weights at the end."""
    path = folder / ("run/last" if contestant == "ours" else "end") / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def measure(contestant: str, processes: int, kills: list[int], folder: Path, data: Path) -> dict[str, Any]:
    """A line of the table."""

    def checked(place: Path, kill_at: int, resume: Path | None) -> None:
        if start(contestant, place, data, processes, kill_at, resume) and not kill_at:
            sys.exit(f"{contestant}: {(place / 'output.txt').read_text()[-3000:]}")

    whole = folder / "whole"
    whole.mkdir(parents=True)
    checked(whole, 0, None)
    everything, found = 10**9, {"more": 0.0, "less": 0.0, "moved": 0.0, "same": 0}
    for kill_at in kills:
        place = folder / f"killed_{kill_at}"
        place.mkdir()
        checked(place, kill_at, None)
        newest = newest_checkpoint(place)
        step = step_of(newest)
        kept = read_steps(place, step)
        for path in place.glob("rows_*.jsonl"):
            path.unlink()
        checked(place, 0, newest)
        steps = kept + read_steps(place, everything)
        epoch = step // STEPS_OF_EPOCH
        (rows, by_step), (own, own_steps) = epoch_of(steps, epoch), epoch_of(read_steps(whole, everything), epoch)
        found["more"] += sum(rows[row] > own[row] for row in range(ROWS)) / ROWS / len(kills)
        found["less"] += sum(rows[row] < own[row] for row in range(ROWS)) / ROWS / len(kills)
        moved = sum(len(used - by_step.get(number, set())) for number, used in own_steps.items())
        found["moved"] += moved / ROWS / len(kills)
        found["same"] += digest(place, contestant) == digest(whole, contestant)
    return {"contestant": contestant, "processes": processes, **found, "kills": len(kills)}


def versions() -> str:
    """Of the packages that are compared."""
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "transformers"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, nargs="+", default=[17, 23, 31], help="steps in which it is killed, of 39")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    for name in ("contestant", "folder", "data", "checkpoint"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        train(args.contestant, Path(args.folder), Path(args.data), Path(args.checkpoint) if args.checkpoint else None)
        return
    folder = Path(tempfile.mkdtemp(prefix="resume_"))
    make_data(folder)
    lines = []
    print(f"{versions()}; {len(args.kills)} kills each, of {EPOCHS * STEPS_OF_EPOCH} steps")
    print(f"{'':20} {'processes':>9} {'too often':>10} {'too rarely':>11} {'moved':>7}   same bytes at the end")
    for contestant in args.contestants:
        if contestant.endswith("stateful") and importlib.util.find_spec("torchdata") is None:
            print(f"{contestant:20} left out: pip install torchdata")
            continue
        for processes in args.processes:
            line = measure(contestant, processes, args.kills, folder / f"{contestant}_{processes}", folder)
            numbers = "".join(f"{line[key]:>{width}.1%}" for key, width in (("more", 11), ("less", 12), ("moved", 8)))
            print(f"{contestant:20} {processes:>9}{numbers}   {line['same']} of {line['kills']}", flush=True)
            lines.append(line)
    shutil.rmtree(folder)
    print(json.dumps(lines))


if __name__ == "__main__":
    main()
