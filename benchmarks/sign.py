"""Reading and training of sign_train.py, beside a plain loop that opens each clip when it needs it.

  python benchmarks/sign.py [--clips 5000 --rounds 3 --steps 60]

Clips of 30 to 300 frames are made here (random walks of 78 points, compressed as np.savez_compressed does). Contestants
take turns, each in a process of its own, and the order turns each round.

  reading   the second epoch of batches of 32, nothing trained. `ours`: the packed clips as the script reads them, in
            the main process. `opened`: a textbook Dataset that opens each NPZ, with 2 DataLoader workers, shuffled and
            padded. Ours is also timed with every augmentation on. Peak memory is that of the process and its workers.
  training  the Transformer of the script (3.3 M parameters), batches of 32, 2 cores. `ours`: sign_train.py in float32,
            and in bf16 where the processor computes it. `loop`: the textbook loop, float32, over what `opened` gives.

Ends with one line of JSON. Ratios are medians over the rounds, above 1 means ours is faster.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BATCH, GLOSSES = 32, 50
READING, TRAINING = ("ours", "ours_augmented", "opened"), ("ours", "ours_bf16", "loop")


def make_clips(folder: Path, count: int) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "gloss", "cat"))
        for number in range(count):
            length = int(rng.integers(30, 301))
            walk = np.cumsum(rng.normal(0, 0.004, (length, 78, 2)), axis=0) + rng.uniform(0.3, 0.7, (78, 2))
            frames = walk.clip(0, 1).reshape(length, 156).astype(np.float32)
            np.savez_compressed(
                folder / f"{number:05d}.npz", X=frames, mask=rng.random((length, 78)) > 0.05,
                timestamps_ms=np.arange(length) * 33,
            )  # fmt: skip
            writer.writerow((f"{number:05d}", number % GLOSSES, number % 10))


# ------------------------------------------------------------------------------------------------ the textbook version


def opened_loader(folder: Path) -> Any:
    """A Dataset that opens each file, shuffled batches padded to the longest of each, 2 workers."""
    import numpy as np
    import torch

    class Opened(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.rows = list(csv.DictReader(open(folder / "labels.csv")))  # noqa: SIM115

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, row: int) -> tuple[torch.Tensor, int, int]:
            entry = self.rows[row]
            with np.load(folder / f"{entry['file']}.npz") as arrays:
                frames = torch.from_numpy(arrays["X"]).float()
            return frames, int(entry["gloss"]), int(entry["cat"])

    def collate(samples: list[tuple[torch.Tensor, int, int]]) -> tuple[torch.Tensor, ...]:
        frames, gloss, cat = zip(*samples, strict=True)
        lengths = torch.tensor([len(one) for one in frames])
        padded = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True)
        real = torch.arange(padded.shape[1])[None] < lengths[:, None]
        return padded, real, torch.tensor(gloss), torch.tensor(cat)

    return torch.utils.data.DataLoader(Opened(), BATCH, shuffle=True, num_workers=2, collate_fn=collate)


def read_opened(folder: Path) -> float:
    loader = opened_loader(folder)
    for _ in range(2):
        started = time.perf_counter()
        for _ in loader:
            pass
    return time.perf_counter() - started


def train_loop(folder: Path, steps: int) -> float:
    """Samples per second of a plain loop in float32."""
    import torch

    from accelerando.models.sign import SignTransformer, SignTransformerConfig

    torch.manual_seed(0)
    names = {"gloss_names": [str(n) for n in range(GLOSSES)], "cat_names": [str(n) for n in range(10)]}
    model = SignTransformer(SignTransformerConfig(**names)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = opened_loader(folder)
    started, samples = time.perf_counter(), 0
    for number, (frames, real, gloss, cat) in enumerate(loader):
        if number == steps:
            break
        output = model(frames, attention_mask=real)
        loss = torch.nn.functional.cross_entropy(output.gloss_logits, gloss)
        loss = 0.5 * loss + 0.5 * torch.nn.functional.cross_entropy(output.cat_logits, cat)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        samples += len(frames)
    return samples / (time.perf_counter() - started)


# --------------------------------------------------------------------------------------------------------------- ours


def read_ours(folder: Path, augmented: bool) -> float:
    from accelerando.data.collate import ClipCollate
    from accelerando.data.keypoints import ClipAugmentation
    from accelerando.data.sign_clips import TrainingClips, pack_clips
    from accelerando.data.sign_labels import read_labels
    from accelerando.train.batches import TrainBatches

    clips = pack_clips(read_labels(folder / "labels.csv"), folder, "X", "body", folder.parent / "cache")
    augmentation = ClipAugmentation(10, 0.2, 0.1, 0.01, 0.2, 0.2, 0.1, 0.5) if augmented else ClipAugmentation()
    batches = TrainBatches(TrainingClips(clips, augmentation), ClipCollate(), BATCH)
    for epoch in range(2):
        started = time.perf_counter()
        for window in batches.windows(epoch):
            for _ in window:
                pass
    return time.perf_counter() - started


def train_ours(folder: Path, steps: int, amp: str) -> float:
    """Samples per second of sign_train.py, over all of its steps."""
    few = folder.parent / "few.csv"
    few.write_text("".join((folder / "labels.csv").read_text().splitlines(keepends=True)[:65]))
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
        str(ROOT / "accelerate_configs" / "cpu.yaml"), str(ROOT / "scripts" / "sign_train.py"), "--keypoints-train",
        str(folder), "--keypoints-val", str(folder), "--labels-val-csv", str(few), "--batch-size", str(BATCH),
        "--max_steps", str(steps), "--amp", amp, "--cache_dir", str(folder.parent / "cache"), "--output_dir",
        str(folder.parent / "runs"), "--run_name", "ours", "--overwrite", "--report_to", "none",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return json.loads((folder.parent / "runs" / "ours" / "results.json").read_text())["samples_per_second"]


# --------------------------------------------------------------------------------------------------------- measuring


def peak_mb(process: subprocess.Popen) -> float:
    """The most memory a process and its children had together (a shared page counted once), in MB."""
    import psutil

    peak = 0.0
    while process.poll() is None:
        try:
            parent = psutil.Process(process.pid)
            family = [parent, *parent.children(recursive=True)]
            peak = max(peak, sum(one.memory_full_info().pss for one in family) / 1e6)
        except psutil.Error:
            pass
        time.sleep(0.5)  # walking through the pages of a process holds it up
    return peak


def measure(part: str, who: str, args: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Seconds (reading) or samples/s (training), and the peak memory in MB, in a process of its own."""
    if part == "training" and who != "loop":
        return train_ours(folder, args.steps, "bf16" if who == "ours_bf16" else "no"), 0.0
    command = [
        sys.executable,
        __file__,
        "--part",
        part,
        "--who",
        who,
        "--folder",
        str(folder),
        "--steps",
        str(args.steps),
    ]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        peak = peak_mb(process)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(text)
    return float(text.strip().splitlines()[-1]), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=5000, help="clips that are made")
    parser.add_argument("--rounds", type=int, default=3, help="times each contestant runs")
    parser.add_argument("--steps", type=int, default=60, help="training: optimizer steps")
    parser.add_argument("--part", choices=("reading", "training"), help=argparse.SUPPRESS)
    parser.add_argument("--who", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    if args.part:
        roles = {
            "ours": lambda: read_ours(args.folder, False), "ours_augmented": lambda: read_ours(args.folder, True),
            "opened": lambda: read_opened(args.folder), "loop": lambda: train_loop(args.folder, args.steps),
        }  # fmt: skip
        print(f"\n{roles[args.who]()}")
        return

    from accelerando.train.accelerator import computes_bf16

    training = TRAINING if computes_bf16() else [who for who in TRAINING if who != "ours_bf16"]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "clips"
        make_clips(folder, args.clips)
        started = time.perf_counter()
        measure("reading", "ours", args, folder)  # packs the clips, once
        packing = time.perf_counter() - started
        print(f"packing {args.clips:,} clips, once: {packing:.1f} s", flush=True)
        for number in range(args.rounds):
            for part, names, unit in (("reading", READING, "s an epoch"), ("training", training, "samples/s")):
                for who in names if number % 2 == 0 else reversed(names):
                    value = measure(part, who, args, folder)
                    found.setdefault((part, who), []).append(value)
                    memory = f", {value[1]:,.0f} MB" if value[1] else ""
                    print(
                        f"round {number + 1}/{args.rounds}  {part:<9}{who:<15}{value[0]:9.2f} {unit}{memory}",
                        flush=True,
                    )

    def ratio(part: str, one: str, other: str) -> float:
        return statistics.median(a[0] / b[0] for a, b in zip(found[part, one], found[part, other], strict=True))

    ratios = {
        "reading": ratio("reading", "opened", "ours"),
        "reading_augmented": ratio("reading", "opened", "ours_augmented"),
        "training": ratio("training", "ours", "loop"),
    }
    if len(training) == len(TRAINING):
        ratios["training_bf16"] = ratio("training", "ours_bf16", "loop")
    middle = {
        key: tuple(statistics.median(column) for column in zip(*values, strict=True)) for key, values in found.items()
    }
    print(f"\n{'':24}{'median':>10}   peak MB")
    for (part, who), (value, memory) in middle.items():
        print(f"{part:<9}{who:<15}{value:10.2f}{memory:10,.0f}")
    print("\n" + "\n".join(f"{name:<18} ours is {value:.2f} x as fast" for name, value in ratios.items()))
    facts = {"benchmark": "sign", "clips": args.clips, "rounds": args.rounds, "cores": len(os.sched_getaffinity(0))}
    facts |= {f"{part}_{who}": round(value, 3) for (part, who), (value, _) in middle.items()}
    print(json.dumps(facts | {f"ratio_{name}": round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
