"""Training on one GPU: the five-minute answer to how fast, in how much memory, and what each switch brings.

  python benchmarks/gpu.py [--tasks image text clip sign --steps 20]

Models of the usual sizes with random weights, on data that is made here; each contestant is a script of ours under
`accelerate launch --config_file accelerate_configs/single_gpu.yaml`, or a plain PyTorch loop.

  image  ResNet-50, 224 pixels, batches of 256 from the cache of decoded pictures
  text   BERT-base with a vocabulary of 4,000, 128 tokens (all texts are longer), batches of 64
  clip   CLIP ViT-B/32, a contrastive batch of 2,048 pairs: as one (`whole`) and in micro-batches of 256 (GradCache)
  sign   the sign Transformer (3.3 M parameters), clips of 30 to 300 frames, batches of 64

`loop` is the same net, optimizer, precision and batch, over one batch that lies on the GPU: no input, nothing logged.
Timed are the steps after the warm-up, in which the GPU's kernels are chosen (and compiled). Ratios above 1 mean that
the first is faster, or larger. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# Of the benchmarks beside this one: data, and how figures are taken and shown.
from clip import Figures, make_picture, step_times
from sign import make_clips

ROOT = Path(__file__).resolve().parent.parent
WORKERS = max(1, min(12, len(os.sched_getaffinity(0)) - 2))
BATCH = {"image": 256, "text": 64, "clip": 2048, "sign": 64}
MICRO, TOKENS, LABELS = 256, 128, 4
# Contestant -> the flags that it adds; `loop` is a plain loop in bf16.
CONTESTANTS = {
    "image": {
        "loop": None, "float32": ["--amp", "no"], "bf16": [], "bf16_compiled": ["--compile_model"],
        "fp16": ["--amp", "fp16"],
    },
    "text": {
        "loop": None, "float32": ["--amp", "no"], "bf16": [], "bf16_compiled": ["--compile_model"],
        "bf16_8bit": ["--optimizer", "adamw8bit"],
    },
    "clip": {
        "whole": ["--micro_batch_size", str(BATCH["clip"])], "gradcache": ["--micro_batch_size", str(MICRO)],
        "gradcache_compiled": ["--micro_batch_size", str(MICRO), "--compile_model"],
    },
    "sign": {"float32": ["--amp", "no"], "bf16": []},
}  # fmt: skip
RATIOS = {
    "image": [("bf16", "loop"), ("bf16", "float32"), ("bf16_compiled", "bf16")],
    "text": [("bf16", "loop"), ("bf16", "float32"), ("bf16_compiled", "bf16"), ("bf16_8bit", "bf16")],
    "clip": [("gradcache", "whole"), ("gradcache_compiled", "gradcache")],
    "sign": [("bf16", "float32")],
}


# ------------------------------------------------------------------------------------------------------------- data


def make_jpeg(seed: int, side: int) -> bytes:
    import numpy as np

    return make_picture(np.random.default_rng(seed), side)


def make_jpegs(count: int, side: int) -> list[bytes]:
    with ProcessPoolExecutor(WORKERS) as pool:
        return list(pool.map(make_jpeg, range(count), [side] * count))


def make_image_data(folder: Path, samples: int) -> list[str]:
    """Class folders of 256 pictures under many names."""
    for number, file in enumerate(make_jpegs(256, 400)):
        (folder / "files").mkdir(parents=True, exist_ok=True)
        (folder / "files" / f"{number}.jpg").write_bytes(file)
    for side, count in (("train", samples), ("val", 64)):
        for row in range(count):
            path = folder / "pictures" / side / f"class{row % LABELS}" / f"{row:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / "files" / f"{row % 256}.jpg", path)
    return ["--data_dir", str(folder / "pictures"), "--architecture", "resnet50", "--cache", "--cache_dir",
            str(folder / "cache"), "--batch_size", str(BATCH["image"])]  # fmt: skip


def make_text_data(folder: Path, samples: int) -> list[str]:
    """Rows of 200 words, of a vocabulary that a tokenizer is trained on, and the config of BERT-base."""
    import numpy as np
    from transformers import BertConfig

    from accelerando.data.tokenizer import train_tokenizer

    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 6)) for _ in range(2000)])
    folder.mkdir()
    for side, count in (("train", samples), ("validation", 64)):
        texts = [" ".join(row) for row in rng.choice(words, (count, 200))]
        rows = [{"text": text, "label": f"label{number % LABELS}"} for number, text in enumerate(texts)]
        (folder / f"{side}.json").write_text(json.dumps(rows))
    train_tokenizer(texts, "wordpiece", 4000).save_pretrained(folder / "bert")
    BertConfig().save_pretrained(folder / "bert")
    files = ["--train_file", str(folder / "train.json"), "--validation_file", str(folder / "validation.json")]
    return [*files, "--model_name", str(folder / "bert"), "--from_scratch", "--max_length", str(TOKENS),
            "--batch_size", str(BATCH["text"]), "--cache_dir", str(folder / "cache")]  # fmt: skip


def make_clip_data(folder: Path, samples: int) -> list[str]:
    """Shards of 2,048 pairs, of 256 pictures under captions of their own."""
    files = make_jpegs(256, 256)
    for side, count in (("train", samples), ("validation", 64)):
        (folder / side).mkdir(parents=True)
        for start in range(0, count, 2048):
            with tarfile.open(folder / side / f"{start:06d}.tar", "w") as tar:
                for row in range(start, min(count, start + 2048)):
                    caption = f"picture {row} of a {('red', 'green', 'blue')[row % 3]} thing with {row % 17} legs"
                    for end, content in ((".jpg", files[row % 256]), (".txt", caption.encode())):
                        member = tarfile.TarInfo(f"{row:06d}{end}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return ["--data_dir", str(folder), "--from_scratch", "--scenario", "full", "--effective_batch_size",
            str(BATCH["clip"]), "--cache_dir", str(folder / "cache"), "--warmup_steps", "0"]  # fmt: skip


def make_sign_data(folder: Path, samples: int) -> list[str]:
    """Clips of 30 to 300 frames."""
    make_clips(folder / "train", samples)
    make_clips(folder / "val", 64)
    return ["--keypoints-train", str(folder / "train"), "--keypoints-val", str(folder / "val"), "--batch_size",
            str(BATCH["sign"]), "--cache_dir", str(folder / "cache")]  # fmt: skip


MAKERS: dict[str, tuple[str, Callable[[Path, int], list[str]]]] = {
    "image": ("image_classify.py", make_image_data), "text": ("text_classify.py", make_text_data),
    "clip": ("clip_finetune.py", make_clip_data), "sign": ("sign_train.py", make_sign_data),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- training


def train_ours(
    task: str, flags: list[str], folder: Path, steps: int, warm_up: int, config: str = "single_gpu"
) -> dict[str, float]:
    """Samples per second, peak memory and the share of waiting for data, of a script."""
    amp = [] if "--amp" in flags else ["--amp", "bf16"]
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
        str(ROOT / "accelerate_configs" / f"{config}.yaml"), str(ROOT / "scripts" / MAKERS[task][0]), *flags, *amp,
        "--max_steps", str(warm_up + steps), "--epochs", "1000", "--log_every", "1", "--eval_every", str(10**9),
        "--save_every", str(10**9), "--num_workers", str(WORKERS), "--output_dir", str(folder), "--run_name", "ours",
        "--overwrite", "--report_to", "tensorboard", "--lr", "1e-4",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(":")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit("\n".join([" ".join(command), *(done.stdout + done.stderr).splitlines()[-40:]]))
    ends = step_times(folder / "ours")
    if len(ends) != steps + warm_up:
        sys.exit(f"{len(ends)} steps were recorded, not {steps + warm_up}")
    rows = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text().splitlines()]
    (last,) = (row for row in rows if row["kind"] == "validation")
    shutil.rmtree(folder / "ours")
    return {
        "samples_per_second": BATCH[task] * steps / (ends[-1] - ends[warm_up - 1]),
        "memory_mb": last["peak_memory_mb"], "data_wait_share": last["data_wait_share"],
    }  # fmt: skip


def train_loop(task: str, folder: Path, steps: int, warm_up: int) -> dict[str, float]:
    """Samples per second of a plain loop in bf16 over one batch on the GPU."""
    import torch

    labels = torch.randint(0, LABELS, (BATCH[task],), device="cuda")
    if task == "image":
        import torchvision

        model = torchvision.models.resnet50(num_classes=LABELS).cuda().train().to(memory_format=torch.channels_last)
        pixels = torch.randn(BATCH[task], 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)

        def forward() -> torch.Tensor:
            return model(pixels)
    else:
        from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

        words = len(AutoTokenizer.from_pretrained(folder / "bert"))
        model = BertForSequenceClassification(BertConfig(vocab_size=words, num_labels=LABELS)).cuda().train()
        tokens = torch.randint(0, words, (BATCH[task], TOKENS), device="cuda")
        mask = torch.ones_like(tokens)

        def forward() -> torch.Tensor:
            return model(input_ids=tokens, attention_mask=mask).logits

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    torch.cuda.reset_peak_memory_stats()
    for step in range(warm_up + steps):
        if step == warm_up:
            torch.cuda.synchronize()
            started = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(forward(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return {
        "samples_per_second": BATCH[task] * steps / (time.perf_counter() - started),
        "memory_mb": torch.cuda.max_memory_allocated() / 1e6, "data_wait_share": 0.0,
    }  # fmt: skip


def call_loop(task: str, folder: Path, steps: int, warm_up: int) -> dict[str, float]:
    """:func:`train_loop` in a process of its own."""
    command = [sys.executable, __file__, "--loop", task, "--folder", str(folder)]
    command += ["--steps", str(steps), "--warm_up", str(warm_up)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=MAKERS, default=list(MAKERS), help="what is measured")
    parser.add_argument("--contestants", nargs="+", help="of these tasks, such as loop and bf16 (default: all)")
    parser.add_argument("--rounds", type=int, default=1, help="times each contestant runs")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps that are timed (clip: half as many)")
    parser.add_argument("--warm_up", type=int, default=5, help="optimizer steps before them (clip: 2)")
    parser.add_argument("--loop", choices=MAKERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("error: no GPU here; benchmarks/clip.py, image.py, sign.py and text.py measure on the CPU")
    if args.loop:
        print(json.dumps(train_loop(args.loop, args.folder, args.steps, args.warm_up)))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    figures = Figures(args.rounds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for task in args.tasks:
            steps, warm_up = (args.steps // 2, 2) if task == "clip" else (args.steps, args.warm_up)
            # An epoch holds all the steps, so that nobody waits between epochs; clips take long to make.
            samples = 1500 if task == "sign" else BATCH[task] * (warm_up + steps)
            data = MAKERS[task][1](folder / task, samples)
            names = [name for name in CONTESTANTS[task] if name in (args.contestants or CONTESTANTS[task])]
            for number in range(args.rounds):
                for name in names if number % 2 == 0 else names[::-1]:
                    flags = CONTESTANTS[task][name]
                    if flags is None:
                        found = call_loop(task, folder / task, steps, warm_up)
                    else:
                        found = train_ours(task, [*data, *flags], folder, steps, warm_up)
                    for what, value in found.items():
                        figures.add(number, f"{task}_{what}_{name}", value)
            for one, other in RATIOS[task]:
                if not {one, other} <= set(names):
                    continue
                for what in ("samples_per_second", "memory_mb"):
                    pair = (f"{task}_{what}_{who}" for who in (one, other))
                    figures.ratio(f"{task}_ratio_{what}_{one}_to_{other}", *pair)
            shutil.rmtree(folder / task)
    print(f"\n{figures.table()}")
    facts = {"benchmark": "gpu", "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "workers": WORKERS}
    facts |= {name: getattr(args, name) for name in ("tasks", "rounds", "steps", "warm_up")}
    print(json.dumps(facts | figures.numbers()))


if __name__ == "__main__":
    main()
