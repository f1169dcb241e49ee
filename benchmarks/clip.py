"""Memory, speed and reading of clip_finetune.py, beside open_clip's own trainer and data pipeline.

  python benchmarks/clip.py --open_clip FOLDER [--parts memory open_clip reading --size small --amp auto --rounds 3]
  python benchmarks/clip.py --parts reading --images photos --captions table.csv

FOLDER holds open_clip_torch and what it needs; without the flag it is imported as installed. Pictures are made here
(500 x 500 JPEGs of noise and shapes, about as large as photos) and packed by tools/make_shards.py; both sides read the
very same shards. Every measurement is a process of its own; contestants take turns, and the order turns each round.

  memory     ours alone: a contrastive batch of 1,024 in micro-batches of 64 beside plain batches of 64, all weights
             trained from scratch. Peak memory is that of the training process, without the worker that reads.
  open_clip  ours beside `open_clip_train.main`: the same widths, layers, heads, activation, vocabulary and tokens (its
             own), batch, precision (bf16 where the processor computes it), threads, clipped gradient and 1 worker; the
             rest as each ships it. `theirs_best`, where its version has them: captions padded to the batch, from a
             tokenizer with a padding token; length buckets; the fused optimizer. Once with batches of 64, once with
             8 x 64 as one batch (its --accum-freq 8, our --effective_batch_size 512).
  reading    one worker process reads, decodes, augments, tokenises and makes batches, nothing is trained; ours without
             augmentation and with flip and crop, open_clip's with its random crop. What ours leaves to the training
             process (normalising the pixels) is counted too. Beside samples/s stands the processor time of worker and
             reader, which other work on the machine changes less. And the memory that ours takes (worker and reader
             together, a shared page counted once) early and late, on the pictures made here: it must not grow.

Speeds are those of a steady state: the time from the end of the warm-up to the last step, evaluation and saving not
counted. Memory's are from the times in our TensorBoard events, open_clip's and ours beside it from
benchmarks/step_clock.py, also for a second of processor time (of the training process and its worker), which other work
on the machine changes less. Medians over the rounds; ratios are taken within a round. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Of the file beside this one, as is the clock that every contestant carries.
from step_clock import cpu_seconds, speeds

ROOT = Path(__file__).resolve().parent.parent
CLOCK = ROOT / "benchmarks" / "step_clock.py"
PARTS = ("memory", "open_clip", "reading")
PEERS = ("theirs", "theirs_best")
BATCH, LARGE, ACCUMULATED = 64, 1024, 8  # pairs of a micro-batch, of the large batch, micro-batches beside open_clip
SHAPES = {
    "base": {"image_size": 224, "patch_size": 32, "vision_width": 768, "vision_layers": 12, "text_width": 512,
             "text_layers": 12, "projection_dim": 512},
    "small": {"image_size": 224, "patch_size": 32, "vision_width": 384, "vision_layers": 6, "text_width": 256,
              "text_layers": 6, "projection_dim": 256},
    "tiny": {"image_size": 64, "patch_size": 16, "vision_width": 64, "vision_layers": 2, "text_width": 64,
             "text_layers": 2, "projection_dim": 64},
}  # fmt: skip
# What open_clip's version 4 can do for short captions, and the optimizer that a CPU computes fastest.
BEST_FLAGS = ("--length-bucketing", "--opt-kwargs", "fused=True")
# Runs open_clip's trainer with one more folder of model configs: its command line cannot name one. With captions padded
# to the batch, its --accum-freq hands the model a mask that the model does not take and does not need: left out.
LAUNCHER = """
import sys
import open_clip
from open_clip_train.main import main
forward = open_clip.CustomTextCLIP.forward
open_clip.CustomTextCLIP.forward = lambda self, image=None, text=None, text_valid=None: forward(self, image, text)
if __name__ == "__main__":
    open_clip.add_model_config(sys.argv[1])
    main(sys.argv[2:])
"""


# ------------------------------------------------------------------------------------------------------------- data


def make_picture(rng: Any, side: int) -> bytes:
    """A JPEG with the statistics of a photo: smooth noise of every scale, a few sharp shapes, some grain."""
    import numpy as np
    from PIL import Image, ImageDraw

    layers = np.zeros((side, side, 3), np.float32)
    for cells in (3, 8, 24, 72, 216):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8)).resize((side, side), Image.BICUBIC)
        layers += (np.asarray(noise, np.float32) - 128) * 2.2 / cells**0.45
    image = Image.fromarray(np.clip(layers + 128, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for number in range(6):
        corner, size = rng.integers(0, side, 2), rng.integers(side // 10 + 1, side // 3 + 2, 2)
        box, colour = [*corner.tolist(), *(corner + size).tolist()], tuple(rng.integers(0, 256, 3).tolist())
        (draw.rectangle if number % 2 else draw.ellipse)(box, fill=colour)
    grain = rng.normal(0, 2, (side, side, 1)).astype(np.float32)
    pixels = np.clip(np.asarray(image, np.float32) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_pictures(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Pictures and a table of captions of 15 to 20 tokens, each picture often; what make_shards.py has to be told."""
    import numpy as np

    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    sizes = []
    for number in range(args.pictures + BATCH):
        file = make_picture(rng, args.picture_side)
        sizes.append(len(file))
        (folder / "images" / f"{number:05d}.jpg").write_bytes(file)
    colours = ("red", "green", "blue", "yellow", "brown", "grey", "white", "black", "pink", "golden")
    things = ("chair", "table", "lamp", "sofa", "shelf", "bed", "mirror", "desk", "clock", "plant", "bottle", "carpet")
    places = ("kitchen", "garden", "window", "street", "bedroom", "corner", "wall", "forest", "beach", "office")
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "split"])
        for row in range(args.rows + BATCH):
            side = "train" if row < args.rows else "validation"
            picture = row % args.pictures if row < args.rows else args.pictures + row - args.rows
            draw = [str(rng.choice(words)) for words in (colours, things, colours, things, colours, places)]
            caption = "a photo of a {} {} beside a {} {} in front of a {} {}".format(*draw) + ", old" * (row % 3)
            table.writerow([f"{picture:05d}.jpg", caption, side])
    where = {"images": folder / "images", "captions": folder / "captions.csv", "split_column": "split"}
    return where | {"kilobytes": round(statistics.mean(sizes) / 1000, 1)}


def pack(args: argparse.Namespace, folder: Path, options: dict[str, Any]) -> Path:
    """Shards of pictures and captions in ``folder``, by tools/make_shards.py."""
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), "--output_dir", str(folder)]
    command += ["--max_shard_count", str(max(BATCH, args.rows // 4)), "--num_workers", "2"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    call(command, args)
    return folder


# -------------------------------------------------------------------------------------------------------- processes


def call(command: list[str], args: argparse.Namespace, peer: bool = False, **variables: str) -> str:
    """What a command prints. Ends the benchmark with its output where it fails."""
    paths = [str(ROOT), *([args.open_clip] if peer and args.open_clip else []), os.environ.get("PYTHONPATH", "")]
    # Its folder may hold other versions of packages that are installed here too; it comes first for the peer alone.
    paths = paths[::-1] if peer else paths
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path), **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit("\n".join([" ".join(command), *(done.stdout + done.stderr).splitlines()[-40:]]))
    return done.stdout


def call_self(what: str, args: argparse.Namespace, peer: bool = False, **values: Any) -> dict[str, Any]:
    """One of :data:`CHILDREN` in a process of its own."""
    command = [sys.executable, __file__, "--child", what, "--values", json.dumps(values, default=str)]
    return json.loads(call(command, args, peer).strip().splitlines()[-1])


def has_peer(args: argparse.Namespace) -> bool:
    """Whether open_clip's trainer can be imported."""
    code = "from importlib.util import find_spec as f; exit(not (f('open_clip') and f('open_clip_train')))"
    paths = [path for path in (args.open_clip, os.environ.get("PYTHONPATH")) if path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def steps_of(args: argparse.Namespace, effective: int) -> tuple[int, int]:
    """Steps of warm-up and all steps of a run with ``effective`` pairs a step."""
    warm_up = max(1, args.warm_up // effective)
    return warm_up, warm_up + max(1, args.samples // effective)


def train_ours(
    args: argparse.Namespace, folder: Path, shards: Path, effective: int, model: list[str]
) -> dict[str, float]:
    """Samples per second of a run of ours, also of processor time, and its peak memory."""
    warm_up, steps = steps_of(args, effective)
    command = [
        sys.executable, str(CLOCK), str(folder / "times"), str(ROOT / "scripts" / "clip_finetune.py"),
        "--train_data", str(shards / "train"),
        "--validation_data", str(shards / "validation"), "--scenario", "full", "--effective_batch_size", str(effective),
        "--micro_batch_size", str(BATCH), "--amp", args.amp, "--max_steps", str(steps), "--epochs", str(steps),
        "--warmup_steps", "0", "--grad_clip", "1.0", "--num_workers", "1", "--log_every", "1",
        "--eval_every", str(10**9), "--save_every", str(10**9), "--output_dir", str(folder), "--run_name", "ours",
        "--overwrite", "--cache_dir", str(folder / "cache"), *model,
    ]  # fmt: skip
    call(command, args, ACCELERATE_USE_CPU="true")
    results = json.loads((folder / "ours" / "results.json").read_text())
    return speeds(folder / "times", steps, warm_up, effective) | {"peak_memory_mb": results["peak_memory_mb"]}


def step_times(run: Path) -> list[float]:
    """When each optimizer step of a run ended, from its TensorBoard events."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = sorted(run.rglob("events.out.tfevents.*"))
    events = (event for path in files for event in EventFileLoader(str(path)).Load())
    found = {
        event.step: event.wall_time for event in events for value in event.summary.value if value.tag == "train/loss"
    }
    return [found[step] for step in sorted(found)]


def train_theirs(
    args: argparse.Namespace, folder: Path, shards: Path, accumulated: int, best: bool
) -> dict[str, float]:
    """The speeds of open_clip's trainer."""
    effective = BATCH * accumulated
    warm_up, steps = steps_of(args, effective)
    tars = sorted((shards / "train").glob("*.tar"))
    with tempfile.TemporaryDirectory(dir=folder) as logs:
        command = [
            sys.executable, str(CLOCK), str(folder / "times"), str(folder / "launcher.py"), str(folder / "peer"),
            "--model", "benchmark_variable" if best else "benchmark", "--dataset-type", "webdataset",
            "--train-data", f"{shards / 'train'}/{{{tars[0].stem}..{tars[-1].stem}}}.tar",
            "--train-num-samples", str(steps * effective), "--batch-size", str(BATCH), "--accum-freq", str(accumulated),
            "--precision", "amp_bf16" if args.amp == "bf16" else "fp32", "--epochs", "1", "--workers", "1",
            "--warmup", "0", "--lr", "1e-4", "--wd", "0.1", "--grad-clip-norm", "1.0", "--log-every-n-steps", "1",
            "--device", "cpu", "--logs", logs, "--name", "theirs", "--save-frequency", "0",
            *(BEST_FLAGS if best else []), *(args.open_clip_flags or []),
        ]  # fmt: skip
        call(command, args, peer=True)
    return speeds(folder / "times", steps, warm_up, effective)


# --------------------------------------------------------------------------------------------------------- children


def make_models(folder: str, shape: dict[str, int], activation: str) -> dict[str, Any]:
    """Two descriptions of the same model: a folder for ours, a JSON for open_clip; the vocabulary is open_clip's."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    from accelerando.models.clip import Preprocessing, make_clip_model

    theirs = SimpleTokenizer()
    special = dict(zip(theirs.all_special_ids, ("<|startoftext|>", "<|endoftext|>"), strict=True))
    vocabulary = {special.get(number, word): number for word, number in theirs.encoder.items()}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(theirs.bpe_ranks))
    for text in ("a photo of a red chair, old", "In front of the WINDOW: 12 lamps"):
        ours = tokenizer(text)["input_ids"]
        if theirs(text)[0][: len(ours)].tolist() != ours:
            sys.exit(f"the two tokenizers differ: {ours}")
    model = make_clip_model(tokenizer, *shape.values(), 77, 0.0)
    model.save_pretrained(Path(folder, "model"))
    side = {"height": shape["image_size"], "width": shape["image_size"]}
    images = CLIPImageProcessorPil(size={"shortest_edge": shape["image_size"]}, crop_size=side)
    Preprocessing(tokenizer, images, 77, full_length=False).save(Path(folder, "model"))
    file = Path(folder, "model", "config.json")
    config = json.loads(file.read_text())
    for tower in ("vision_config", "text_config"):
        config[tower]["hidden_act"] = activation
    file.write_text(json.dumps(config))

    vision, text = model.config.vision_config, model.config.text_config
    description = {
        "embed_dim": shape["projection_dim"],
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {
            "image_size": shape["image_size"], "patch_size": shape["patch_size"], "width": vision.hidden_size,
            "layers": vision.num_hidden_layers, "head_width": vision.hidden_size // vision.num_attention_heads,
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": len(vocabulary), "width": text.hidden_size,
            "heads": text.num_attention_heads, "layers": text.num_hidden_layers,
        },
    }  # fmt: skip
    Path(folder, "peer").mkdir()
    Path(folder, "peer", "benchmark.json").write_text(json.dumps(description))
    import open_clip

    # Our tokenizer pads with its end, and open_clip pools at the first end: the same features as with its own padding.
    variable = {
        "variable_text": True,
        "hf_tokenizer_name": str(Path(folder, "model")),
        "pad_id": tokenizer.pad_token_id,
    }
    names = ["benchmark"]
    if hasattr(open_clip.CLIPTextCfg, "variable_text"):
        description["text_cfg"] |= variable | {"pad_id": tokenizer.pad_token_id}
        Path(folder, "peer", "benchmark_variable.json").write_text(json.dumps(description))
        names.append("benchmark_variable")
    open_clip.add_model_config(Path(folder, "peer"))
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, *map(open_clip.create_model, names))]
    if len(set(counts)) > 1:
        sys.exit(f"the models have {counts} parameters")
    return {"parameters": counts[0], "open_clip_version": open_clip.__version__, "best": len(names) > 1}


def read_ours(
    shards: str, cache: str, model: str | None, side: int, augmentation: str, marks: list[int]
) -> dict[str, Any]:
    """Samples per second between two ``marks`` (samples read), and the memory at each, in MB."""
    from accelerando.data.collate import PairCollate
    from accelerando.data.pairs import PairDataset, captions, open_pairs
    from accelerando.data.transforms import ImageTransform, normalise
    from accelerando.models.clip import make_preprocessing, open_preprocessing
    from accelerando.train.batches import TrainBatches

    pairs = open_pairs(shards, Path(cache), 1.0, None, "image", "caption")
    preprocessing = open_preprocessing(model, None) if model else make_preprocessing(captions(pairs), 8192, side, 77)
    images = preprocessing.image_processor
    transform = ImageTransform(side, augmentation, images.image_mean, exact=False)
    collate = PairCollate(preprocessing.tokenizer, preprocessing.max_length)
    batches = TrainBatches(PairDataset(pairs, transform), collate, BATCH, num_workers=1)

    def sizes() -> Any:
        for epoch in range(10**9):
            for window in batches.windows(epoch):
                for batch in window:
                    normalise(batch["pixel_values"], images.image_mean, images.image_std)
                    yield len(batch["index"])

    return between_marks(sizes(), marks)


def read_theirs(shards: str, side: int, marks: list[int]) -> dict[str, Any]:
    """The same of open_clip's pipeline."""
    from open_clip import image_transform
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip_train.data import get_wds_dataset

    tars = sorted(Path(shards).glob("*.tar"))
    settings = argparse.Namespace(
        train_data=f"{shards}/{{{tars[0].stem}..{tars[-1].stem}}}.tar", train_num_samples=marks[-1] + 8 * BATCH,
        train_data_upsampling_factors=None, dataset_resampled=False, seed=0, batch_size=BATCH, workers=1, world_size=1,
    )  # fmt: skip
    data = get_wds_dataset(settings, image_transform(side, is_train=True), True, tokenizer=SimpleTokenizer())
    return between_marks((len(images) for images, _ in data.dataloader), marks)


def between_marks(sizes: Any, marks: list[int]) -> dict[str, Any]:
    done, ends, memory, recent, used = 0, [], [], [], []
    for size in sizes:
        done += size
        if done >= marks[len(ends)] - 8 * BATCH:
            recent = [*recent[-7:], resident_mb()]  # the most of a few: it goes up and down with the batches under way
        if done >= marks[len(ends)]:
            ends.append((done, time.perf_counter()))
            memory.append(max(recent))
            used.append(cpu_seconds())
            if len(ends) == len(marks):
                break
    (first, start), (last, end) = ends[0], ends[-1]
    read = last - first
    cpu = 1000 * (used[-1] - used[0]) / read
    return {"samples_per_second": read / (end - start), "cpu_ms_per_sample": cpu, "memory_mb": memory}


def resident_mb() -> float:
    """Memory of this process and its workers in MB, a page that several share counted once."""
    import psutil

    this = psutil.Process()
    return sum(process.memory_full_info().pss for process in [this, *this.children(recursive=True)]) / 1e6


CHILDREN = {"make_models": make_models, "read_ours": read_ours, "read_theirs": read_theirs}


# ------------------------------------------------------------------------------------------------------------ parts


class Figures:
    """What was measured, round by round, and the ratios that have a target."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.values, self.targets = rounds, {}, {}

    def add(self, number: int, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)
        print(f"round {number + 1}/{self.rounds}  {name:<52}{value:10.4g}", flush=True)

    def ratio(self, name: str, above: str, below: str, at_least: float | None = None, at_most: float | None = None):
        """The ratio of two figures within each round."""
        pairs = zip(self.values[above], self.values[below], strict=True)
        self.values[name] = [upper / lower for upper, lower in pairs]
        self.targets[name] = (at_least, at_most)

    def table(self) -> str:
        lines = [f"{'':54}{'median':>10}  target    rounds"]
        for name, values in self.values.items():
            least, most = self.targets.get(name, (None, None))
            target = f">= {least:g}" if least else f"<= {most:g}" if most else ""
            rounds = "  ".join(f"{value:.4g}" for value in values)
            lines.append(f"{name:<54}{statistics.median(values):10.4g}  {target:<8}  {rounds}")
        return "\n".join(lines)

    def numbers(self) -> dict[str, Any]:
        medians = {name: round(statistics.median(values), 4) for name, values in self.values.items()}
        rounds = {f"{name}_rounds": [round(v, 4) for v in self.values[name]] for name in self.targets}
        return medians | rounds


def in_turns(rounds: int, names: list[Any]):
    """(round, name), the order turned in every second round."""
    for number in range(rounds):
        yield from ((number, name) for name in (names if number % 2 == 0 else names[::-1]))


def measure_memory(args: argparse.Namespace, folder: Path, shards: Path, figures: Figures) -> None:
    shape = ["--from_scratch"] + [word for name, value in args.shape.items() for word in (f"--{name}", str(value))]
    for number, effective in in_turns(args.rounds, [BATCH, LARGE]):
        found = train_ours(args, folder, shards, effective, shape)
        figures.add(number, f"memory_peak_mb_{effective}", found["peak_memory_mb"])
        figures.add(number, f"memory_ms_per_sample_{effective}", 1000 / found["samples_per_second"])
    for name, most in (("peak_mb", 1.3), ("ms_per_sample", 1.4)):
        names = (f"memory_{name}_{LARGE}", f"memory_{name}_{BATCH}")
        figures.ratio(f"memory_ratio_{name}", *names, at_most=most)


def measure_open_clip(args: argparse.Namespace, folder: Path, shards: Path, best: bool, figures: Figures) -> None:
    (folder / "launcher.py").write_text(LAUNCHER)
    model = ["--model_name", str(folder / "model")]
    theirs = [side for side in args.peers if best or side != "theirs_best"]
    contestants = [(accumulated, side) for accumulated in args.accumulated for side in ("ours", *theirs)]
    for number, (accumulated, side) in in_turns(args.rounds, contestants):
        if side == "ours":
            found = train_ours(args, folder, shards, BATCH * accumulated, model)
        else:
            found = train_theirs(args, folder, shards, accumulated, side == "theirs_best")
        for clock in ("second", "cpu_second"):
            name = f"open_clip_samples_per_{clock}_{side}_{BATCH * accumulated}"
            figures.add(number, name, found[f"samples_per_{clock}"])
    for accumulated in args.accumulated:
        for side in theirs:
            for clock in ("second", "cpu_second"):
                names = (f"open_clip_samples_per_{clock}_{one}_{BATCH * accumulated}" for one in ("ours", side))
                ratio = f"open_clip_ratio_{clock}_to_{side}_{BATCH * accumulated}"
                figures.ratio(ratio, *names, at_least=1.5)


def measure_reading(args: argparse.Namespace, folder: Path, shards: Path, peer: bool, figures: Figures) -> None:
    sets = {"made": shards}
    if args.images:
        options = {"images": args.images, "validation_fraction": 0.01, "test_fraction": 0}
        options |= {name: getattr(args, name) for name in ("captions", "image_column", "caption_column")}
        options |= {"caption_template": args.caption_template} if args.caption_template else {}
        given = {name: value for name, value in options.items() if value is not None}
        sets["given"] = pack(args, folder / "given", given)
    side, marks = args.shape["image_size"], [args.reading_warm_up, args.reading_warm_up + args.reading_samples]
    ours = {"cache": folder / "cache", "model": folder / "model" if peer else None, "side": side}
    contestants = [(name, who) for name in sets for who in ("ours_none", "ours_simple", *(["theirs"] if peer else []))]
    for number, (name, who) in in_turns(args.rounds, contestants):
        train = sets[name] / "train"
        if who == "theirs":
            found = call_self("read_theirs", args, peer=True, shards=train, side=side, marks=marks)
        else:
            augmentation = who.removeprefix("ours_")
            found = call_self("read_ours", args, shards=train, augmentation=augmentation, marks=marks, **ours)
        for figure in ("samples_per_second", "cpu_ms_per_sample"):
            figures.add(number, f"reading_{figure}_{name}_{who}", found[figure])
    for name, who in contestants if peer else []:
        if who != "theirs":
            pair = (f"reading_samples_per_second_{name}_{side}" for side in (who, "theirs"))
            figures.ratio(f"reading_ratio_{name}_{who}", *pair, at_least=1.5)
    early, late = args.memory_samples
    found = call_self("read_ours", args, shards=shards / "train", augmentation="simple", marks=[early, late], **ours)
    for samples, memory in zip((early, late), found["memory_mb"], strict=True):
        figures.add(0, f"reading_memory_mb_after_{samples}", memory)
    names = (f"reading_memory_mb_after_{samples}" for samples in (late, early))
    figures.ratio("reading_memory_growth", *names, at_most=1.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--open_clip", help="folder with open_clip_torch and what it needs (default: as installed)")
    parser.add_argument("--open_clip_flags", nargs=argparse.REMAINDER, help="more flags for open_clip; the last option")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=list(PEERS), help="its flags: as shipped, the best"
    )
    parser.add_argument("--accumulated", type=int, nargs="+", default=[1, ACCUMULATED], help="x 64: pairs of a batch")
    parser.add_argument("--size", choices=SHAPES, default="small", help="of the model; base is ViT-B/32")
    parser.add_argument("--amp", choices=("auto", "no", "bf16"), default="auto", help="precision of both sides")
    parser.add_argument("--activation", choices=("quick_gelu", "gelu"), default="quick_gelu", help="beside open_clip")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each training process")
    parser.add_argument("--rounds", type=int, default=3, help="times each contestant runs")
    parser.add_argument("--samples", type=int, default=3072, help="pairs of a training run that are timed")
    parser.add_argument("--warm_up", type=int, default=512, help="pairs before them; at least one step")
    parser.add_argument("--reading_samples", type=int, default=6144, help="pairs that are read and timed")
    parser.add_argument("--reading_warm_up", type=int, default=1024, help="pairs before them")
    parser.add_argument("--memory_samples", type=int, nargs=2, default=[1000, 50000], help="read, then the memory")
    parser.add_argument("--pictures", type=int, default=512, help="different pictures that are made")
    parser.add_argument("--picture_side", type=int, default=500, help="their pixels of a side")
    parser.add_argument("--images", help="reading: a folder of pictures, beside those that are made")
    parser.add_argument("--captions", help="reading: the table of their captions")
    parser.add_argument("--image_column", help="reading: column of the file name in it")
    parser.add_argument("--caption_column", help="reading: column of the caption")
    parser.add_argument("--caption_template", help='reading: a caption of several columns, "a {color} {kind}"')
    parser.add_argument("--quick", action="store_true", help="a look whether it runs: the smallest sizes, one round")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--values", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.child](**args.values)))
        return
    if args.quick:
        args.size, args.rounds, args.samples, args.warm_up, args.memory_samples = "tiny", 1, 1, 1, [128, 256]
        args.reading_samples, args.reading_warm_up, args.pictures, args.picture_side = 128, 64, 64, 96

    if args.amp == "auto":
        from accelerando.train.accelerator import computes_bf16

        args.amp = "bf16" if computes_bf16() else "no"
    peer = has_peer(args)
    if not peer and "open_clip" in args.parts:
        if not args.quick:
            sys.exit("error: no open_clip here: pip install open_clip_torch, or --open_clip FOLDER, or other --parts")
        args.parts = [part for part in args.parts if part != "open_clip"]
    args.shape = SHAPES[args.size]
    sizes = {"memory": [BATCH, LARGE], "open_clip": [BATCH * accumulated for accumulated in args.accumulated]}
    # An epoch holds all steps of a run: what happens between epochs is not compared.
    args.rows = max([args.pictures, *(steps_of(args, e)[1] * e for part in args.parts for e in sizes.get(part, []))])
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    figures, models = Figures(args.rounds), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made = make_pictures(args, folder)
        kilobytes = made.pop("kilobytes")
        shards = pack(args, folder / "made", made)
        if peer and {"open_clip", "reading"} & set(args.parts):
            shape = {"shape": args.shape, "activation": args.activation}
            models = call_self("make_models", args, peer=True, folder=folder, **shape)
        if "memory" in args.parts:
            measure_memory(args, folder, shards, figures)
        if "open_clip" in args.parts:
            measure_open_clip(args, folder, shards, models["best"], figures)
        if "reading" in args.parts:
            measure_reading(args, folder, shards, peer, figures)
    print(f"\n{figures.table()}")
    settings = {name: getattr(args, name) for name in ("size", "amp", "activation", "threads", "rounds", "samples")}
    settings |= {"pictures_kilobytes": kilobytes, "cores": len(os.sched_getaffinity(0))}
    print(json.dumps({"benchmark": "clip", "parts": args.parts, **settings, **models, **figures.numbers()}))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder is cleared away
    main()
