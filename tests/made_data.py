"""Small data sets and models, made here: a text, a pair, a clip, and the folders of them that the fixtures hold."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, launch
from PIL import Image, ImageDraw
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from accelerando.data.tokenizer import train_tokenizer
from accelerando.models.clip import make_preprocessing

WORDS = {
    "sport": ["goal", "match", "team", "player", "score", "league", "coach", "ball", "season", "win"],
    "money": ["bank", "market", "stock", "price", "trade", "profit", "tax", "share", "euro", "fund"],
    "space": ["orbit", "rocket", "moon", "planet", "star", "launch", "probe", "comet", "crew", "nasa"],
}
COMMON = "the a of to in and was for on with as by at from it is that this new said".split()


def make_rows(count: int, seed: int) -> list[dict]:
    """Texts of 3 to 40 words of one topic among common words: a small net learns them in a few dozen steps."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        topic = str(rng.choice(list(WORDS)))
        length = int(rng.integers(3, 40))
        words = [str(rng.choice(WORDS[topic] if rng.random() < 0.3 else COMMON)) for _ in range(length)]
        words[int(rng.integers(length))] = str(rng.choice(WORDS[topic]))
        rows.append({"text": " ".join(words), "label": topic})
    return rows


def write_json(path: Path, rows: list[dict]) -> Path:
    """A JSON list, one row a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    return path


def make_text_set(folder: Path) -> Path:
    """A folder with train.json (203 rows), validation.json (61) and test.json (67): no round numbers."""
    for seed, (name, count) in enumerate({"train": 203, "validation": 61, "test": 67}.items()):
        write_json(folder / f"{name}.json", make_rows(count, seed))
    return folder


def make_task_files(folder: Path, text_set: Path) -> dict[str, list[str]]:
    """Two tasks on parts of the text set, as ``task=file``: the topic, and whether it is sport."""
    counts = {"train": (120, 83), "validation": (30, 30), "test": (33, 33)}
    files: dict[str, list[str]] = {}
    for split, (topics, plays) in counts.items():
        rows = json.loads((text_set / f"{split}.json").read_text())
        sport = [{"text": row["text"], "label": "play" if row["label"] == "sport" else "other"} for row in rows]
        parts = {"topic": rows[:topics], "play": sport[-plays:]}
        files[split] = [f"{name}={write_json(folder / f'{name}_{split}.json', part)}" for name, part in parts.items()]
    return files


def make_tiny_bert(folder: Path, text_set: Path) -> Path:
    """A folder with a BERT of about 20,000 parameters, random weights, and a tokenizer for ``text_set``."""
    texts = [row["text"] for row in json.loads((text_set / "train.json").read_text())]
    tokenizer = train_tokenizer(texts, "wordpiece", 300)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 210), "grey": (128, 128, 128)}
KINDS = ("chair", "table", "lamp")


def draw_pair(rng: np.random.Generator) -> tuple[bytes, str]:
    """A small JPEG of a coloured shape, and its caption."""
    colour, kind = str(rng.choice(list(COLOURS))), str(rng.choice(KINDS))
    width, height = (int(side) for side in rng.integers(20, 40, 2))
    image = Image.new("RGB", (width, height), tuple(int(v) for v in rng.integers(225, 256, 3)))
    draw = ImageDraw.Draw(image)
    left, top = (int(rng.integers(0, side // 4)) for side in (width, height))
    box = (left, top, left + width // 2, top + height // 2)
    {"chair": draw.rectangle, "table": draw.ellipse, "lamp": lambda box, fill: draw.line(box, fill, 4)}[kind](
        box, fill=COLOURS[colour]
    )
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue(), f"a {colour} {kind} number {int(rng.integers(50))}"


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar with these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_pair_set(folder: Path) -> Path:
    """train/ (3 shards of 31, 17 and 27 pairs), validation/ (23) and test/ (19); no round numbers."""
    rng = np.random.default_rng(5)
    for split, counts in {"train": (31, 17, 27), "validation": (23,), "test": (19,)}.items():
        for shard, count in enumerate(counts):
            members = []
            for number in range(count):
                image, caption = draw_pair(rng)
                kind = caption.split()[2]
                key = f"{split}{shard}_{number:03d}"
                members += [(f"{key}.jpg", image), (f"{key}.txt", caption.encode())]
                members += [(f"{key}.json", json.dumps({"kind": kind}).encode())]
            write_shard(folder / split / f"{shard:05d}.tar", members)
    return folder


def make_tiny_clip(folder: Path) -> Path:
    """A folder with a CLIP of about 60,000 parameters, random weights, with its processor."""
    rng = np.random.default_rng(5)
    preprocessing = make_preprocessing([draw_pair(rng)[1] for _ in range(200)], 120, 16, 16)
    tokenizer = preprocessing.tokenizer
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tokens = {"eos_token_id": tokenizer.sep_token_id, "bos_token_id": tokenizer.cls_token_id, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**tower, **tokens, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(folder)
    preprocessing.save(folder)
    return folder


GLOSSES = 6


def make_clip(rng: np.random.Generator, gloss: int) -> dict[str, np.ndarray]:
    """A clip in which the right hand moves in a direction of the gloss's own, as keypoints and as features."""
    length = int(rng.integers(4, 30))
    points = np.tile(rng.uniform(0.3, 0.7, (78, 2)), (length, 1, 1))
    points[:, 11], points[:, 12] = (0.6, 0.5), (0.4, 0.5)
    angle = 2 * np.pi * gloss / GLOSSES
    path = np.linspace(0, 0.25, length)[:, None] * [np.cos(angle), np.sin(angle)]
    points[:, 46:67] = 0.5 + 0.02 * rng.standard_normal((21, 2)) + path[:, None]
    points += 0.005 * rng.standard_normal(points.shape)
    mask = rng.random((length, 78)) > 0.1
    mask[:, 11:13] = True
    features = np.zeros((length, 2048), np.float32)
    features[:, : 78 * 2] = points.reshape(length, -1)
    features[:, 200 + gloss] = np.linspace(0, 1, length)
    return {
        "X": (points * mask[:, :, None]).clip(0, 1).reshape(length, 156).astype(np.float32), "mask": mask,
        "X2048": features, "timestamps_ms": np.arange(length) * 33,
        "meta": np.array(json.dumps({"dims_per_frame": 156, "keypoints_total": 78})),
    }  # fmt: skip


def make_sign_set(folder: Path) -> Path:
    """train/ (75 clips), val/ (23) and test/ (19) with labels.csv; names with spaces, with and without .npz."""
    rng = np.random.default_rng(7)
    for split, count in {"train": 75, "val": 23, "test": 19}.items():
        (folder / split).mkdir()
        lines = ["file,gloss,cat,occluded"]
        for number in range(count):
            gloss = number % GLOSSES
            name = f"{split} clip_{number:03d}"
            np.savez_compressed(folder / split / f"{name}.npz", **make_clip(rng, gloss))
            lines.append(f"{name}{'.npz' * (number % 2)},{gloss},{gloss // 2},{int(number % 5 == 0)}")
        (folder / split / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def make_image_set(folder: Path) -> Path:
    """raw/ with 117 images of chairs, tables and lamps (JPEG, a few PNG), and splits/ of 3 folds: 31 to 34 each."""
    rng = np.random.default_rng(7)
    for number in range(117):
        file, caption = draw_pair(rng)
        path = folder / "raw" / caption.split()[2] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
        if number % 10 == 0:
            Image.open(path).save(path.with_suffix(".png"))
            path.unlink()
    tool = ROOT / "tools" / "split_folds.py"
    launch(tool, "--raw_data", folder / "raw", "--folds", "3", "--near_duplicates", "0", cwd=folder, real=True)
    return folder


ACTIONS = {"red chair": (230, 60, 40), "green_lamp_left": (40, 200, 60), "blue table": (50, 70, 220)}


def make_video(path: Path, frames: list[np.ndarray], rate: int = 8, codec: str = "mpeg4", gop: int = 12) -> Path:
    """A video of ``frames``, uint8 [H, W, 3] each."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate, stream.codec_context.gop_size = "yuv420p", 800_000, gop
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def make_media_set(folder: Path) -> Path:
    """train/ (66 samples), val/ (33) and test/ (18) of three actions, each of a colour: images, and every third a video."""
    rng = np.random.default_rng(11)
    for split, count in (("train", 22), ("val", 11), ("test", 6)):
        for name, colour in ACTIONS.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count):
                base = np.array(colour) + rng.normal(0, 35, 3)
                frames = [np.clip(base + rng.normal(0, 30, (32, 40, 3)), 0, 255).astype(np.uint8) for _ in range(6)]
                if number % 3 == 2:
                    make_video(place / f"{number:02}.mp4", frames)
                else:
                    Image.fromarray(frames[0]).save(place / f"{number:02}.png")
    return folder


def make_tiny_vit(folder: Path) -> Path:
    """A folder with a ViT of about 20,000 parameters for images of 32 pixels, random weights."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


def make_tiny_resnet(folder: Path) -> Path:
    """A folder with a ResNet (batch norms) of about 25,000 parameters, random weights."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(folder)
    return folder
