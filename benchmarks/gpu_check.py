"""Everything that only a GPU can show, in at most nine minutes and one table.

  python benchmarks/gpu_check.py
  python benchmarks/gpu_check.py --dry_run      (the same steps on the CPU with tiny models: whether the check runs)

First tests/test_gpu.py, several tests at a time, in the order of that file: FSDP2, half precision, torch.compile, 8-bit
states, the bytes of a resumed run. Then, as long as time is left, training with random weights on data that is made
here, in bf16:

  ResNet-50         224 pixels, batches of 256 from the cache of decoded images
  ViT-B/16          the same
  CLIP ViT-B/32     a contrastive batch of 4,096 pairs in micro-batches of 256 (GradCache)
  BERT-base         128 tokens, batches of 64
  sign Transformer  clips of 30 to 300 frames, batches of 64

`loop` is the same model, optimizer, precision and batch, over one batch that lies on the GPU: no input, nothing logged.
`matrix rate` is what the script computes a second (three times the floating-point operations of a forward pass; what
GradCache computes again is not counted), as a share of what a product of two bf16 matrices of 8,192 x 8,192 reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import gpu

ROOT = Path(__file__).resolve().parent.parent
FRAMES = 165  # of a clip of the bare loop: the mean of 30 to 300


class Row(NamedTuple):
    """A model that is trained: the task, the flags, and the same in tiny for a dry run."""

    task: str
    flags: list[str]
    tiny: list[str]


ROWS = {
    "ResNet-50": Row("image", ["--architecture", "resnet50"], ["--architecture", "resnet18", "--image_size", "32"]),
    "ViT-B/16": Row("image", ["--architecture", "vit_b_16"], ["--architecture", "resnet18", "--image_size", "32"]),
    "CLIP ViT-B/32": Row(
        "clip",
        ["--micro_batch_size", "256"],
        ["--micro_batch_size", "4", "--vision_width", "64", "--vision_layers", "1", "--text_width", "64",
         "--text_layers", "1", "--image_size", "32"],
    ),
    "BERT-base": Row("text", [], []),
    "sign Transformer": Row("sign", [], []),
}  # fmt: skip


def bare_model(name: str, folder: Path, batch: int, device: str, tiny: bool) -> tuple:
    """(model, a function that computes its loss, floating-point operations of a forward pass over a sample)."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    task, size = ROWS[name].task, batch
    labels = torch.randint(0, gpu.LABELS, (size,), device=device)
    if task == "image":
        import torchvision

        nets = {"ResNet-50": "resnet50", "ViT-B/16": "vit_b_16"}
        net = "resnet18" if tiny else nets[name]
        model = getattr(torchvision.models, net)(num_classes=gpu.LABELS)
        pixels = torch.randn(size, 3, *(2 * [32 if tiny else 224]), device=device)
        if name == "ResNet-50":
            model, pixels = (one.to(memory_format=torch.channels_last) for one in (model, pixels))

        def loss() -> torch.Tensor:
            return cross_entropy(model(pixels), labels)
    elif task == "text":
        from transformers import AutoConfig, BertForSequenceClassification

        model = BertForSequenceClassification(AutoConfig.from_pretrained(folder / "bert", num_labels=gpu.LABELS))
        tokens = torch.randint(0, model.config.vocab_size, (size, gpu.TOKENS), device=device)

        def loss() -> torch.Tensor:
            return cross_entropy(model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits, labels)
    elif task == "clip":
        from transformers import CLIPConfig, CLIPModel

        small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 128}
        words = {"vocab_size": 4000, "eos_token_id": 3999, "bos_token_id": 3998, **(small if tiny else {})}
        config = CLIPConfig(text_config=words, vision_config={"image_size": 32, **small} if tiny else {})
        model = CLIPModel(config)
        side = config.vision_config.image_size
        pixels = torch.randn(size, 3, side, side, device=device)
        tokens = torch.randint(0, 3997, (size, 16), device=device)

        def loss() -> torch.Tensor:
            return model(pixel_values=pixels, input_ids=tokens, return_loss=True).loss
    else:
        from accelerando.models.sign import SignTransformer, SignTransformerConfig

        glosses, categories = ([str(number) for number in range(count)] for count in (105, 10))
        model = SignTransformer(
            SignTransformerConfig(gloss_names=glosses, cat_names=categories, input_width=156, input_key="X")
        )
        frames = torch.rand(size, FRAMES, 156, device=device)

        def loss() -> torch.Tensor:
            return sum(cross_entropy(logits, labels) for logits in model(frames).to_tuple()[:2])

    model.to(device).train()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss()
    return model, loss, counter.get_total_flops() / size


def train_loop(name: str, folder: Path, batch: int, steps: int, device: str, tiny: bool) -> dict[str, float]:
    """Samples per second of the plain loop, and operations of a sample."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    model, loss, operations = bare_model(name, folder, batch, device, tiny)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    warm_up = 3
    for step in range(warm_up + steps):
        if step == warm_up:
            wait()
            started = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    wait()
    return {"samples_per_second": batch * steps / (time.perf_counter() - started), "operations": operations}


def matrix_rate(device: str, side: int) -> float:
    """Floating-point operations a second of a product of two bf16 matrices: the best of five times ten."""
    import torch

    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            one @ other
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 10 * 2 * side**3 / (time.perf_counter() - started))
    return best


def run_tests(seconds: float, dry_run: bool) -> list[tuple[str, str]]:
    """(test, how many of its cases passed) of tests/test_gpu.py, in the order of the file, for at most ``seconds``."""
    file = ROOT / "tests" / "test_gpu.py"
    if dry_run:
        return [(name, "not run on the CPU") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(file), "-n", "6", "-q", "-p", "no:cacheprovider",
                   f"--junitxml={report}"]  # fmt: skip
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            said = process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            process.terminate()
            said = process.communicate()[0]
        cases: dict[str, list[str]] = {}
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            cases.setdefault(case.get("name", "").partition("[")[0], []).append(kinds.pop() if kinds else "passed")
        for line in said.splitlines():
            if line.startswith(("FAILED", "ERROR", "E  ")):
                print(line[:200])
        return [(name, f"{ways.count('passed')} of {len(ways)} passed") for name, ways in cases.items()]


def main() -> None:
    """Runs the tests, then each model, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no further model is begun")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps that are timed (clip: half as many)")
    parser.add_argument("--models", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--no_tests", action="store_true", help="models alone")
    parser.add_argument("--dry_run", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--loop", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    started = time.perf_counter()
    device = "cpu" if args.dry_run else "cuda"
    sizes = {"image": 8, "text": 4, "clip": 8, "sign": 4} if args.dry_run else {**gpu.BATCH, "clip": 4096}
    if args.loop:
        size = sizes[ROWS[args.loop].task]
        print(json.dumps(train_loop(args.loop, args.folder, size, args.steps, device, args.dry_run)))
        return
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("error: no GPU here; --dry_run shows whether the check runs")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU, a dry run"
    rate = matrix_rate(device, 256 if args.dry_run else 8192)
    lines = [f"{card}, torch {torch.__version__}: {rate / 1e12:,.1f} TFLOP/s in bf16 matrix products", ""]
    if not args.no_tests:
        # Half of the time at most, so that the models get theirs.
        lines += [f"{name.removeprefix('test_').replace('_', ' '):<70}{result}"
                  for name, result in run_tests(30 * args.minutes, args.dry_run)] + [""]  # fmt: skip
    lines.append(f"{'':<18}{'samples/s':>10}{'loop':>10}{'of it':>8}{'data wait':>11}{'matrix rate':>13}{'GB':>7}")
    gpu.BATCH.update(sizes)
    facts: dict[str, object] = {"card": card, "matrix_rate": rate}
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.models:
            if time.perf_counter() - started > 60 * args.minutes:
                lines.append(f"{name:<18} not begun: {args.minutes:g} minutes are over")
                continue
            found = measure(name, Path(temporary) / "data", args, sizes[ROWS[name].task])
            facts[name] = found
            share = found["samples_per_second"] / found["loop"]
            of_rate = 3 * found["operations"] * found["samples_per_second"] / rate
            lines.append(
                f"{name:<18}{found['samples_per_second']:>10,.0f}{found['loop']:>10,.0f}{share:>8.0%}"
                f"{found['data_wait_share']:>11.1%}{of_rate:>13.1%}{found['memory_mb'] / 1000:>7.1f}"
            )
            print(lines[-1], flush=True)
    minutes = (time.perf_counter() - started) / 60
    print("\n" + "\n".join(lines) + f"\n\n{minutes:.1f} minutes")
    print(json.dumps(facts))


def measure(name: str, folder: Path, args: argparse.Namespace, batch: int) -> dict[str, float]:
    """Ours and the bare loop, each in a process of its own."""
    row = ROWS[name]
    steps, warm_up = (args.steps // 2, 2) if row.task == "clip" else (args.steps, 5)
    maker: Callable[[Path, int], list[str]] = gpu.MAKERS[row.task][1]
    # As in benchmarks/gpu.py: an epoch holds all the steps, but clips take long to make.
    samples = batch * (warm_up + steps)
    flags = maker(folder, 1500 if row.task == "sign" and not args.dry_run else samples)
    if row.task == "text" and args.dry_run:
        from transformers import BertConfig

        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64).save_pretrained(
            folder / "bert"
        )
    flags += row.tiny if args.dry_run else row.flags
    config = "cpu" if args.dry_run else "single_gpu"
    ours = gpu.train_ours(row.task, flags, folder / "runs", steps, warm_up, config)
    command = [sys.executable, __file__, "--loop", name, "--folder", str(folder), "--steps", str(steps)]
    command += ["--dry_run"] if args.dry_run else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "lib"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    loop = json.loads(done.stdout.strip().splitlines()[-1])
    shutil.rmtree(folder)
    return {**ours, "loop": loop["samples_per_second"], "operations": loop["operations"]}


if __name__ == "__main__":
    main()
