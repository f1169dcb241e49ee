"""The two things that make clip_har.py quick: cached image features, and few frames of a long video.

  python benchmarks/har.py [--rounds 3 --model MODEL --data FOLDER]

FOLDER has train/<class>/* and val/<class>/*, MODEL is a CLIP; without them JPEGs are made here, and a CLIP from random
weights with an image tower of the size of ViT-S/16. Contestants take turns, each in a process of its own, and the order
turns each round.

  features  a linear probe of clip_har.py for a few epochs: `cache` computes the image features in the first epoch and
            stores them, `stored` finds those of the run before, `without` (--cache_features false) computes them in
            each epoch. Timed is an epoch from its beginning (the first from the moment the model is there) to the end
            of its validation, as the log says it; saving is not counted. All three have to find the same.
  video     8 frames of a made film of 200 (640 x 360, MP4) with a keyframe every so many frames: 12 (what FFmpeg does
            for most codecs), 30 (one a second: phones and cameras) or 250 (what x264 does: the first one alone).
            `ours` is what the script reads, `decode` decodes all 200 and makes images of the 8, `everything` makes
            images of all 200 before it takes the 8. They have to be the same images. Processor time.

Ratios are medians over the rounds, above 1 means ours is faster. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Of the benchmark beside this one: images, and how figures are taken and shown.
from clip import Figures, in_turns, make_picture

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("features", "video")
CONTESTANTS = {"cache": ["--cache_features", "true"], "stored": [], "without": ["--cache_features", "false"]}
READERS = ("ours", "decode", "everything")
FRAMES, TAKEN, WIDTH, HEIGHT = 200, 8, 640, 360
KEYFRAMES = (12, 30, 250)
CLASSES = ("jumping", "running", "sleeping", "writing")


# ----------------------------------------------------------------------------------------------------------- features


def make_images(folder: Path, count: int) -> Path:
    """``count`` JPEGs in train/ and a quarter as many in val/, of four classes."""
    import numpy as np

    rng = np.random.default_rng(0)
    for side, number in (("train", count), ("val", count // 4)):
        for row in range(number):
            path = folder / side / CLASSES[row % len(CLASSES)] / f"{row:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make_picture(rng, 400))
    return folder


def make_model(folder: Path) -> Path:
    """A CLIP from random weights whose image tower is a ViT-S/16, with a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["<pad>", "<start>", "<end>", "<unknown>", "a", "photo", "of", "person", ".", *CLASSES]
    vocabulary = {word: number for number, word in enumerate(words)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unknown>",
        model_max_length=16,
    )  # fmt: skip
    text = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0}  # fmt: skip
    image = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6,
             "patch_size": 16, "image_size": 224}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=256)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return folder


def probe(args: argparse.Namespace, folder: Path, data: Path, model: Path, who: str, number: int) -> dict[str, Any]:
    """Seconds of the first and of the later epochs of a linear probe, and what it found."""
    run = folder / "runs" / who
    cache = folder / f"cache{number}"  # a new one each round
    command = [
        sys.executable, "-u", str(ROOT / "scripts" / "clip_har.py"), "--data_dir", str(data), "--model_name",
        str(model), "--augmentation", "none", "--head_features", "tower", "--head_init", "random", "--head_lr", "3e-3",
        "--amp", "no", "--epochs", str(args.epochs), "--output_dir", str(run.parent), "--run_name", who, "--overwrite",
        "--report_to", "none", "--num_workers", "1", "--cache_dir", str(cache), *CONTESTANTS[who],
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    lines, begun, seconds = [], 0.0, []
    try:
        for line in process.stdout:
            now = time.perf_counter()
            lines.append(line)
            if "Run directory" in line or ("Epoch " in line and seconds):
                begun = now
            elif "validation loss" in line:
                seconds.append(now - begun)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
    if process.returncode or len(seconds) != args.epochs:
        sys.exit("\n".join([" ".join(command), *map(str.rstrip, lines[-40:])]))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(row["accuracy"], row["loss"]) for row in rows if row["kind"] == "validation"]
    return {"first": seconds[0], "second": seconds[1], "found": found}


def measure_features(args: argparse.Namespace, folder: Path, figures: Figures) -> dict[str, Any]:
    data = args.data or make_images(folder / "images", args.images)
    model = args.model or make_model(folder / "model")
    found: dict[str, list[Any]] = {}
    # `stored` needs what `cache` has left; the order of the pair and of `without` turns.
    for number, pair in in_turns(args.rounds, [("cache", "stored"), ("without",)]):
        for who in pair:
            result = probe(args, folder, data, model, who, number)
            found.setdefault(who, []).append(result["found"])
            for epoch in ("first", "second"):
                figures.add(number, f"features_seconds_{epoch}_epoch_{who}", result[epoch])
    first, second = "features_seconds_first_epoch_{}", "features_seconds_second_epoch_{}"
    figures.ratio("features_ratio_first_to_second", first.format("cache"), second.format("cache"), at_least=20)
    figures.ratio("features_ratio_without_to_cache", second.format("without"), second.format("cache"))
    figures.ratio("features_ratio_first_without_to_stored", first.format("without"), first.format("stored"))
    # Accuracy and loss of each validation, of `stored` and `without` beside `cache`.
    pairs = [
        (one, other)
        for who in ("stored", "without")
        for ours, theirs in zip(found["cache"], found[who], strict=True)
        for one, other in zip(ours, theirs, strict=True)
    ]
    if different := [(one, other) for one, other in pairs if one[0] != other[0]]:
        sys.exit(f"accuracies differ: {different}")
    apart = max(abs(one[1] - other[1]) for one, other in pairs)
    print(f"the accuracy of every epoch is the same, the loss of the validation at most {apart:.2g} apart")
    return {"features_loss_apart": apart}


# -------------------------------------------------------------------------------------------------------------- video


def make_film(path: Path, codec: str, keyframes: int) -> None:
    """A film that pans over an image, with a square that moves through it."""
    import av
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    with Image.open(io.BytesIO(make_picture(rng, 2 * WIDTH))) as image:
        scene = np.asarray(image)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate, stream.codec_context.gop_size = 2_000_000, keyframes
        for number in range(FRAMES):
            x, y = round((0.5 + 0.5 * np.sin(number / 30)) * WIDTH), round((0.5 + 0.5 * np.cos(number / 40)) * WIDTH)
            pixels = scene[y : y + HEIGHT, x : x + WIDTH].copy()
            pixels[100:200, 2 * number : 2 * number + 100] = (30, 200, 90)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def read_film(path: str, who: str, times: int) -> dict[str, Any]:
    """Milliseconds of processor time for the 8 frames, and a digest of their pixels."""
    import hashlib

    import av
    import numpy as np

    from accelerando.data.media import even_positions
    from accelerando.data.videos import read_frames

    positions = even_positions(TAKEN)

    def taken() -> list[np.ndarray]:
        if who == "ours":
            return [frame.pixels for frame in read_frames(Path(path), positions)]
        with av.open(path) as container:
            frames = container.decode(video=0)
            if who == "everything":
                images = [frame.to_ndarray(format="rgb24") for frame in frames]
                return [images[int(position * len(images))] for position in positions]
            kept = {int(position * FRAMES) for position in positions}
            return [frame.to_ndarray(format="rgb24") for number, frame in enumerate(frames) if number in kept]

    pixels = taken()  # once for the imports
    started = time.process_time()
    for _ in range(times):
        taken()
    milliseconds = 1000 * (time.process_time() - started) / times
    return {"milliseconds": milliseconds, "digest": hashlib.sha256(np.stack(pixels).tobytes()).hexdigest()}


def measure_video(args: argparse.Namespace, folder: Path, figures: Figures) -> dict[str, Any]:
    import av

    codecs = ["mpeg4", *(["libx264"] if "libx264" in av.codecs_available else [])]
    digests: dict[str, set[str]] = {}
    for codec in codecs:
        for keyframes in KEYFRAMES:
            make_film(folder / f"{codec}_{keyframes}.mp4", codec, keyframes)
    contestants = [(codec, keyframes, who) for codec in codecs for keyframes in KEYFRAMES for who in READERS]
    for number, (codec, keyframes, who) in in_turns(args.rounds, contestants):
        path = folder / f"{codec}_{keyframes}.mp4"
        command = [sys.executable, __file__, "--child", json.dumps([str(path), who, args.times])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        result = json.loads(done.stdout.strip().splitlines()[-1])
        digests.setdefault(path.name, set()).add(result["digest"])
        figures.add(number, f"video_ms_{codec}_{keyframes}_{who}", result["milliseconds"])
    for codec in codecs:
        for keyframes in KEYFRAMES:
            name = f"video_ms_{codec}_{keyframes}"
            for other in READERS[1:]:
                least = 3 if keyframes == KEYFRAMES[0] else None  # where keyframes are rare, most has to be decoded
                ratio = f"video_ratio_{codec}_{keyframes}_{other}"
                figures.ratio(ratio, f"{name}_{other}", f"{name}_ours", at_least=least)
    if different := sorted(name for name, values in digests.items() if len(values) > 1):
        sys.exit(f"the frames differ: {', '.join(different)}")
    return {"video_codecs": codecs}


# ---------------------------------------------------------------------------------------------------------- measuring


def machine() -> str:
    """The processor's name, the cores that this process may use, and what else runs."""
    name = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {len(os.sched_getaffinity(0))} cores, load before {os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--data", type=Path, help="folder with train/<class>/ and val/<class>/ (default: made here)")
    parser.add_argument("--model", type=Path, help="folder of a CLIP (default: made here)")
    parser.add_argument("--images", type=int, default=64, help="training images that are made")
    parser.add_argument("--rounds", type=int, default=3, help="times each contestant runs")
    parser.add_argument("--epochs", type=int, default=2, help="features: epochs of each probe")
    parser.add_argument("--times", type=int, default=5, help="video: how often a film is read in each round")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(read_film(*args.child)))
        return

    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    facts: dict[str, Any] = {"benchmark": "har", "parts": args.parts, "rounds": args.rounds, "machine": machine()}
    print(facts["machine"])
    figures = Figures(args.rounds)
    with tempfile.TemporaryDirectory() as temporary:
        measure = {"features": measure_features, "video": measure_video}
        for part in [part for part in PARTS if part in args.parts]:
            facts |= measure[part](args, Path(temporary), figures)
    print(f"\n{figures.table()}")
    facts |= {"data": str(args.data or "made"), "model": str(args.model or "made"), "epochs": args.epochs}
    print(json.dumps(facts | figures.numbers()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder is cleared away
    main()
