"""Reading and training of image_classify.py, beside torchvision's recipe and beside a loop that reads nothing.

  python benchmarks/image.py [--data data/hymenoptera --rounds 3 --steps 6]
  python benchmarks/image.py --parts peers --timm FOLDER --transformers FOLDER

FOLDER of --data holds train/<class>/* and val/<class>/*; without it JPEGs of the sizes of the hymenoptera photos are
made. The job is that of the guide: ResNet-18, 224 pixels, batches of 32, on the cores that this process may use.
Contestants take turns, each in a process of its own, and the order turns each round.

  reading     batches of training pictures, nothing trained, 2 workers each. `imagefolder` is the recipe of
              torchvision's tutorials: ImageFolder, RandomResizedCrop(224), RandomHorizontalFlip, ToTensor and
              Normalize in a shuffled DataLoader. `ours`: the same crops and flips as image_classify.py makes them from
              the JPEGs; `cache`: from the decoded pixels of --cache, made before. What ours leaves to the training
              process (the floats) is counted too. The folder is read several times in a row, so nobody waits between
              epochs; timed is what comes after a warm-up of about one epoch, in which ours decodes each JPEG in full
              (later only down to the lower edge of what is cut out).
  evaluation  the same for evaluated pictures, with 2 workers: Resize(256), CenterCrop(224) beside ours.
  training    `ours`: image_classify.py under accelerate launch from the JPEGs with 2 workers; `ours_cache`: with
              --cache and 1 worker. `loop`: a plain PyTorch loop over one batch of floats that lies in memory, with the
              same net, optimizer and threads, and no input at all; `loop_channels_last`: in the memory format that ours
              uses by default. `ours_bf16` and `loop_bf16` (channels_last) in bf16, where the processor computes it.
              From the end of the warm-up to the last step; ours goes through several epochs, evaluation and saving not
              counted.
  alone       reading without workers; not measured unless it is named.
  peers       `train.py` of timm and `run_image_classification.py` of transformers, FOLDER a checkout of each; measured
              with these flags alone. The same net, pictures, batch, crops, flips, precision, AdamW (fused), threads and
              1 worker; timm in channels_last with its fast norms, and `timm_compiled` compiled too. Their first epoch
              beside our second one (ours decodes each JPEG in full in the first), after two steps of warm-up, by the
              clock of benchmarks/step_clock.py, which also takes the processor time.

Beside samples/s stands the processor time of reader and workers for a picture, which other work on the machine changes
less, and their memory together (a page that several share counted once). Ratios are medians over the rounds, above 1
means ours is faster. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Of the benchmark beside this one: pictures, and how figures are taken and shown.
from clip import Figures, in_turns, make_picture, resident_mb, step_times
from step_clock import cpu_seconds, speeds

ROOT = Path(__file__).resolve().parent.parent
CLOCK = ROOT / "benchmarks" / "step_clock.py"
PARTS = ("reading", "evaluation", "training", "alone", "peers")
BATCH, SIZE, WORKERS = 32, 224, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
READERS = ("ours", "cache", "imagefolder")
# A ViT-Tiny of transformers: model_type and what differs from the base net.
VIT_TINY = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
# The examples of transformers ask the Hub for this metric, and look for a folder of its name first.
ACCURACY = """
import datasets
import evaluate

class Accuracy(evaluate.Metric):
    def _info(self):
        numbers = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", features=numbers)

    def _compute(self, predictions, references):
        return {"accuracy": sum(a == b for a, b in zip(predictions, references)) / len(references)}
"""
TARGETS = {"reading": {"ours": 1.8, "cache": 6.0}, "training": {"ours": 1.0}}
# Height, width and how many in a hundred of the hymenoptera photos, which are 4:4:4 at 0.6 bytes a pixel.
SIZES = ((333, 500, 27), (375, 500, 27), (500, 375, 10), (500, 333, 6), (400, 500, 8), (500, 500, 8), (332, 500, 6),
         (281, 500, 4), (200, 300, 3), (1200, 1600, 1))  # fmt: skip


def make_pictures(folder: Path, count: int, held_out: int | None = None) -> Path:
    """``count`` pictures in train/ and half as many (or ``held_out``) in val/, of two classes, as JPEGs."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    shares = np.array([share for *_, share in SIZES])
    for side, number in (("train", count), ("val", count // 2 if held_out is None else held_out)):
        for row in range(number):
            height, width, _ = SIZES[rng.choice(len(SIZES), p=shares / shares.sum())]
            path = folder / side / ("ants", "bees")[row % 2] / f"{row:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(io.BytesIO(make_picture(rng, max(height, width)))) as image:
                image.crop((0, 0, width, height)).save(path, "JPEG", quality=96, subsampling=0)
    return folder


# -------------------------------------------------------------------------------------------------- reading, a process


def read_imagefolder(data: str, evaluation: bool, workers: int, marks: list[int]) -> dict[str, Any]:
    """What :func:`steady` says of torchvision's recipe."""
    import torch
    from torchvision import datasets
    from torchvision import transforms as t

    steps = [t.Resize(256), t.CenterCrop(SIZE)] if evaluation else [t.RandomResizedCrop(SIZE), t.RandomHorizontalFlip()]
    images = datasets.ImageFolder(str(Path(data, "train")), t.Compose([*steps, t.ToTensor(), t.Normalize(MEAN, STD)]))
    images.samples = images.samples * times(len(images), marks)
    loader = torch.utils.data.DataLoader(
        images, BATCH, shuffle=not evaluation, num_workers=workers, persistent_workers=workers > 0
    )
    return steady((len(batch) for batch, _ in loader), marks)


def read_ours(data: str, cache: str | None, evaluation: bool, workers: int, marks: list[int]) -> dict[str, Any]:
    """The same of the pipeline of image_classify.py."""
    from accelerando.data.collate import ImageCollate
    from accelerando.data.images import EvaluationImages, ImageAugmentation, TrainingImages
    from accelerando.data.transforms import normalise
    from accelerando.train.batches import TrainBatches, evaluation_batches

    files = read_splits(data, cache)["train"]
    count = times(len(files), marks)
    if evaluation:
        dataset = Epochs(EvaluationImages(files, SIZE), count)
        batches = evaluation_batches(dataset, ImageCollate(), BATCH, num_workers=workers)
    else:
        dataset = Epochs(TrainingImages(files, ImageAugmentation(), (SIZE,)), count)
        train_batches = TrainBatches(dataset, ImageCollate(), BATCH, num_workers=workers)
        batches = (batch for window in train_batches.windows(0) for batch in window)

    def sizes() -> Any:
        for batch in batches:
            yield len(normalise(batch["pixel_values"], MEAN, STD))

    return steady(sizes(), marks)


class Epochs:
    """``count`` epochs of a data set as one long one, so that nobody waits between them."""

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset, self.count = dataset, count

    def __len__(self) -> int:
        return self.count * len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.dataset[row % len(self.dataset)]

    def at(self, row: int, _: int) -> dict[str, Any]:
        if not hasattr(self.dataset, "at"):
            return self[row]
        return self.dataset.at(row % len(self.dataset), row // len(self.dataset))

    def epoch_order(self, seed: int, _: int) -> Any:
        import numpy as np

        size = len(self.dataset)
        return np.concatenate([epoch * size + self.dataset.epoch_order(seed, epoch) for epoch in range(self.count)])


def read_splits(data: str, cache: str | None) -> dict[str, Any]:
    """Side -> pictures, from the cache where there is one."""
    from accelerando.data.decode import evaluation_side
    from accelerando.data.folders import read_class_folders
    from accelerando.data.image_cache import cached_images

    splits = read_class_folders(Path(data))[1]
    return cached_images(splits, evaluation_side(SIZE), Path(cache)) if cache else splits


def steady(sizes: Any, marks: list[int]) -> dict[str, float]:
    """Speed from the first to the second of ``marks`` (samples read), and the memory afterwards.

    This process has one thread: the cores are the workers'.
    """
    import torch

    torch.set_num_threads(1)
    done, started = 0, None
    for size in sizes:
        done += size
        if started is None and done >= marks[0]:
            started = done, time.perf_counter(), cpu_seconds()
        elif done >= marks[1]:
            break
    samples, seconds, used = (
        end - start for start, end in zip(started, (done, time.perf_counter(), cpu_seconds()), strict=True)
    )
    speed = {"samples_per_second": samples / seconds, "cpu_ms_per_sample": 1000 * used / samples}
    return speed | {"memory_mb": resident_mb()}


def times(count: int, marks: list[int]) -> int:
    """How often ``count`` pictures are read so that none of the ``marks`` is the end of an epoch."""
    return -(-(marks[-1] + 8 * BATCH) // count)


def make_cache(data: str, cache: str) -> dict[str, Any]:
    """Seconds until the pictures are in the cache, and its size."""
    started = time.perf_counter()
    splits = read_splits(data, cache)
    seconds, pictures = time.perf_counter() - started, sum(len(files) for files in splits.values())
    size = (splits["train"].cache / "pixels.bin").stat().st_size
    return {"seconds": seconds, "megabytes": size / 1e6, "pictures": pictures}


# ------------------------------------------------------------------------------------------------- training, a process


def train_loop(channels_last: bool, bf16: bool, steps: int, warm_up: int) -> dict[str, Any]:
    """Samples per second of a plain loop over one batch."""
    import torch
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=2).train()
    pixels, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(0, 2, (BATCH,))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ends = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = torch.nn.functional.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ends.append(time.perf_counter())
    return {"samples_per_second": BATCH * (steps - warm_up) / (ends[-1] - ends[warm_up - 1])}


def make_vit(folder: str) -> dict[str, Any]:
    """A ViT-Tiny with random weights, as a folder that both sides open."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(**VIT_TINY, num_labels=2, id2label={0: "ants", 1: "bees"}, label2id={"ants": 0, "bees": 1})
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(image_mean=list(MEAN), image_std=list(STD)).save_pretrained(folder)
    return {}


CHILDREN = {
    "read_ours": read_ours, "read_imagefolder": read_imagefolder, "make_cache": make_cache, "train_loop": train_loop,
    "make_vit": make_vit,
}  # fmt: skip


def train_ours(args: argparse.Namespace, folder: Path, data: Path, bf16: bool, cache: bool) -> dict[str, Any]:
    """Samples per second and peak memory of image_classify.py."""
    from accelerando.data.folders import read_class_folders

    steps = args.warm_up + args.steps
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
        str(ROOT / "accelerate_configs" / "cpu.yaml"), str(ROOT / "scripts" / "image_classify.py"), "--data_dir",
        str(data), "--architecture", "resnet18", "--image_size", str(SIZE), "--batch_size", str(BATCH), "--amp",
        "bf16" if bf16 else "no", "--epochs", str(steps), "--max_steps", str(steps), "--log_every", "1",
        "--eval_every", str(10**9), "--save_every", str(10**9), "--num_workers", "1" if cache else str(WORKERS),
        "--output_dir", str(folder), "--run_name", "ours", "--overwrite", "--report_to", "tensorboard",
        *(["--cache", "--cache_dir", str(folder / "cache")] if cache else []),
    ]  # fmt: skip
    call(command)
    ends = step_times(folder / "ours")
    if len(ends) != steps:
        sys.exit(f"{len(ends)} steps were recorded, not {steps}")
    pictures = len(read_class_folders(data)[1]["train"])
    epoch = [min(BATCH, pictures - start) for start in range(0, pictures, BATCH)]  # the last batch may be a short one
    samples = sum(epoch[step % len(epoch)] for step in range(args.warm_up, steps))
    memory = json.loads((folder / "ours" / "results.json").read_text())["peak_memory_mb"]
    return {"samples_per_second": samples / (ends[-1] - ends[args.warm_up - 1]), "memory_mb": memory}


def train_beside_peers(args: argparse.Namespace, folder: Path, data: Path, who: str, net: str, bf16: bool):
    """The speeds of a script that trains ``net``: image_classify.py, or a peer's."""
    clocked = [sys.executable, str(CLOCK), str(folder / "times")]
    epoch = args.warm_up + args.steps  # pictures are made for so many batches
    common = {"ours": [
        str(ROOT / "scripts" / "image_classify.py"), "--data_dir", str(data), "--image_size", str(SIZE), "--batch_size",
        str(BATCH), "--amp", "bf16" if bf16 else "no", "--epochs", "2", "--log_every", str(10**9), "--eval_every",
        str(10**9), "--save_every", str(10**9), "--num_workers", "1", "--output_dir", str(folder), "--run_name", "ours",
        "--overwrite", "--report_to", "none",
        *(["--model_name", net] if Path(net).exists() else ["--architecture", net]),
    ], "timm": [
        f"{args.timm}/train.py", "--data-dir", str(data), "--model", net.removeprefix("timm/"), "--num-classes", "2",
        "--img-size", str(SIZE), "--device", "cpu", "--batch-size", str(BATCH), "--workers", "1", "--epochs", "1",
        "--opt", "adamw", "--opt-kwargs", "fused=True", "--lr", "1e-3", "--weight-decay", "0", "--warmup-epochs", "0",
        "--smoothing", "0", "--color-jitter", "0", "--train-interpolation", "bilinear", "--channels-last",
        "--fast-norm", "--log-interval", "100000", "--output", str(folder / "timm"),
        *(["--amp", "--amp-dtype", "bfloat16"] if bf16 else []),
    ], "transformers": [
        f"{args.transformers}/examples/pytorch/image-classification/run_image_classification.py", "--train_dir",
        f"{data}/train", "--validation_dir", f"{data}/val", "--model_name_or_path", net, "--do_train", "--use_cpu",
        "--per_device_train_batch_size", str(BATCH), "--num_train_epochs", "1", "--learning_rate", "1e-3", "--optim",
        "adamw_torch_fused", "--dataloader_num_workers", "1", "--remove_unused_columns", "False", "--save_strategy",
        "no", "--logging_strategy", "no", "--report_to", "none", "--disable_tqdm", "True", "--output_dir",
        str(folder / "transformers"), "--bf16", str(bf16),
    ]}  # fmt: skip
    compiled = {"timm": ["--torchcompile"], "transformers": ["--torch_compile"]}
    peer, _, compiles = who.partition("_")
    command = [*clocked, *common[peer], *(compiled[peer] if compiles else [])]
    metric = folder / "accuracy" / "accuracy.py"
    metric.parent.mkdir(exist_ok=True)
    metric.write_text(ACCURACY)
    paths = {"PYTHONPATH": args.timm} if peer == "timm" else {}  # its own package, not an installed one
    call(command, folder, ACCELERATE_USE_CPU="true", HF_DATASETS_CACHE=str(folder / "datasets"), **paths)
    warm_up, steps = (epoch + args.warm_up, 2 * epoch) if who == "ours" else (args.warm_up, epoch)
    return speeds(folder / "times", steps, warm_up, BATCH)


# ---------------------------------------------------------------------------------------------------------- measuring


def call(command: list[str], folder: Path | None = None, **variables: str) -> str:
    """What a command prints. Ends the benchmark with its output where it fails."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(":")}
    environment |= variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode:
        sys.exit("\n".join([" ".join(command), *(done.stdout + done.stderr).splitlines()[-40:]]))
    return done.stdout


def call_self(what: str, **values: Any) -> dict[str, Any]:
    """One of :data:`CHILDREN` in a process of its own."""
    command = [sys.executable, __file__, "--child", what, "--values", json.dumps(values, default=str)]
    return json.loads(call(command).strip().splitlines()[-1])


def measure_reading(args: argparse.Namespace, part: str, data: Path, cache: Path, figures: Figures) -> None:
    share = 2 if part == "alone" else 1  # a process without workers reads half as fast
    marks = [args.samples // share // 4, args.samples // share // 4 + args.samples // share]
    values = {"data": data, "evaluation": part == "evaluation", "workers": 0 if part == "alone" else WORKERS}
    for number, who in in_turns(args.rounds, list(READERS)):
        if who == "imagefolder":
            found = call_self("read_imagefolder", **values, marks=marks)
        else:
            found = call_self("read_ours", **values, marks=marks, cache=cache if who == "cache" else None)
        figures.add(number, f"{part}_samples_per_second_{who}", found["samples_per_second"])
        figures.add(number, f"{part}_cpu_ms_per_sample_{who}", found["cpu_ms_per_sample"])
        figures.add(number, f"{part}_memory_mb_{who}", found["memory_mb"])
    for who in ("ours", "cache"):
        pair = (f"{part}_samples_per_second_{one}" for one in (who, "imagefolder"))
        figures.ratio(f"{part}_ratio_{who}", *pair, at_least=TARGETS.get(part, {}).get(who))


def measure_training(args: argparse.Namespace, folder: Path, data: Path, bf16: bool, figures: Figures) -> None:
    names = ["ours", "ours_cache", "loop", "loop_channels_last", *(["ours_bf16", "loop_bf16"] if bf16 else [])]
    for number, who in in_turns(args.rounds, names):
        if who.startswith("ours"):
            found = train_ours(args, folder, data, who == "ours_bf16", who == "ours_cache")
            figures.add(number, f"training_memory_mb_{who}", found["memory_mb"])
        else:
            values = {"channels_last": who != "loop", "bf16": who == "loop_bf16", "warm_up": args.warm_up}
            found = call_self("train_loop", **values, steps=args.warm_up + args.steps)
        figures.add(number, f"training_samples_per_second_{who}", found["samples_per_second"])
    for who, other in (
        ("ours", "loop"), ("ours_cache", "loop"), ("ours", "loop_channels_last"), ("ours_cache", "loop_channels_last"),
        ("ours_bf16", "loop_bf16"), ("ours_bf16", "ours"),
    ):  # fmt: skip
        if {who, other} <= set(names):
            pair = (f"training_samples_per_second_{one}" for one in (who, other))
            target = TARGETS["training"].get(who) if other == "loop" else None
            figures.ratio(f"training_ratio_{who}_to_{other}", *pair, at_least=target)


def measure_peers(args: argparse.Namespace, folder: Path, bf16: bool, figures: Figures) -> None:
    data = make_pictures(folder / "beside_peers", BATCH * (args.warm_up + args.steps), 8)
    call_self("make_vit", folder=folder / "vit")
    args.timm, args.transformers = (where and str(Path(where).resolve()) for where in (args.timm, args.transformers))
    precisions = [name for name in args.precisions if bf16 or name == "float32"]
    pairs = {"resnet18": ["timm"], "timm/vit_tiny_patch16_224": ["timm"], str(folder / "vit"): ["transformers"]}
    contestants = []
    for net, peers in pairs.items():
        peers = [peer for peer in peers if getattr(args, peer)]
        peers += [f"{peer}_compiled" for peer in peers if args.compiled]
        contestants += [(net, who, precision) for precision in precisions for who in ("ours", *peers) if peers]
    ratios = {}
    for number, (net, who, precision) in in_turns(args.rounds, contestants):
        found = train_beside_peers(args, folder, data, who, net, precision == "bf16")
        for clock in ("second", "cpu_second"):
            name = f"peers_{Path(net).name}_{precision}_samples_per_{clock}"
            figures.add(number, f"{name}_{who}", found[f"samples_per_{clock}"])
            if who != "ours":
                ratios[name.replace("samples_per", "ratio") + f"_to_{who}"] = (f"{name}_ours", f"{name}_{who}")
    for name, pair in ratios.items():
        figures.ratio(name, *pair, at_least=1.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[:3]), help="what is measured")
    parser.add_argument("--data", type=Path, help="folder with train/<class>/ and val/<class>/ (default: made here)")
    parser.add_argument("--pictures", type=int, default=256, help="training pictures that are made")
    parser.add_argument("--rounds", type=int, default=3, help="times each contestant runs")
    parser.add_argument("--samples", type=int, default=2048, help="reading: pictures that are timed")
    parser.add_argument("--steps", type=int, default=6, help="training: optimizer steps that are timed")
    parser.add_argument("--warm_up", type=int, default=2, help="training: optimizer steps before them")
    parser.add_argument("--timm", help="peers: folder of timm's repository")
    parser.add_argument("--transformers", help="peers: folder of transformers' repository")
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bf16"), default=["float32", "bf16"])
    parser.add_argument("--compiled", action="store_true", help="peers: also compiled, which takes minutes to begin")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--values", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.child](**args.values)))
        return

    from accelerando.train.accelerator import computes_bf16

    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    bf16 = computes_bf16()
    if not bf16:
        print("This processor does not compute bf16: float32 alone is measured")
    figures = Figures(args.rounds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made = {}
        if set(args.parts) != {"peers"}:
            data = args.data or make_pictures(folder / "pictures", args.pictures)
            made = call_self("make_cache", data=data, cache=folder / "cache")
            print(f"{made['pictures']:,} pictures decoded, once: {made['seconds']:.1f} s, {made['megabytes']:.0f} MB")
        for part in [part for part in PARTS if part in args.parts]:
            if part == "peers":
                measure_peers(args, folder, bf16, figures)
            elif part == "training":
                measure_training(args, folder, data, bf16, figures)
            else:
                measure_reading(args, part, data, folder / "cache", figures)
    print(f"\n{figures.table()}")
    facts = {"benchmark": "image", "parts": args.parts, "data": str(args.data or "made"), "rounds": args.rounds}
    facts |= {name: getattr(args, name) for name in ("samples", "steps", "warm_up")}
    facts |= {"cores": len(os.sched_getaffinity(0)), "workers": WORKERS, "bf16": bf16}
    facts |= {f"cache_{name}": round(value, 2) for name, value in made.items()}
    print(json.dumps(facts | figures.numbers()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder is cleared away
    main()
