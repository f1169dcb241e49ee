"""Small data and models made here, and real launches of the scripts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a misspelt model is not looked for in the network

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
TEXT = SCRIPTS / "text_classify.py"
CLIP = SCRIPTS / "clip_finetune.py"
SIGN = SCRIPTS / "sign_train.py"
IMAGE = SCRIPTS / "image_classify.py"

# ACCELERANDO_TEST_DEVICE=cuda runs what takes one process on the GPU; see tests/test_gpu.py.
ON_GPU = os.environ.get("ACCELERANDO_TEST_DEVICE") == "cuda"
# Many short processes: one thread each is faster than many that wait for each other, and bit-exact comparisons need
# the same number everywhere.
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))},
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "NO_COLOR": "1",
    "PYTHONUNBUFFERED": "1",
}
WORDS = {
    "sport": ["goal", "match", "team", "player", "score", "league", "coach", "ball", "season", "win"],
    "money": ["bank", "market", "stock", "price", "trade", "profit", "tax", "share", "euro", "fund"],
    "space": ["orbit", "rocket", "moon", "planet", "star", "launch", "probe", "comet", "crew", "nasa"],
}
COMMON = [
    "the",
    "a",
    "of",
    "to",
    "in",
    "and",
    "was",
    "for",
    "on",
    "with",
    "as",
    "by",
    "at",
    "from",
    "it",
    "is",
    "that",
    "this",
    "new",
    "said",
]


@dataclass
class Finished:
    """A process that ended: exit code and both outputs."""

    code: int
    out: str
    err: str


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
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def text_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.json (203 rows), validation.json (61) and test.json (67): no round numbers."""
    folder = tmp_path_factory.mktemp("text_set")
    for seed, (name, count) in enumerate({"train": 203, "validation": 61, "test": 67}.items()):
        write_json(folder / f"{name}.json", make_rows(count, seed))
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, text_set: Path) -> Path:
    """A folder with a BERT of about 20,000 parameters, random weights, and a tokenizer for ``text_set``."""
    import torch
    from transformers import BertConfig, BertModel

    from accelerando.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny_bert")
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


@pytest.fixture(scope="session")
def text_args(text_set: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags that train the tiny model on the small set; 7 optimizer steps an epoch at a global batch of 32."""
    cache = tmp_path_factory.mktemp("cache")
    return [
        *("--train_file", str(text_set / "train.json"), "--validation_file", str(text_set / "validation.json")),
        *("--test_file", str(text_set / "test.json"), "--model_name", str(tiny_bert), "--cache_dir", str(cache)),
        *("--max_length", "48", "--lr", "3e-3", "--epochs", "2", "--log_every", "1", "--report_to", "none"),
    ]


def command(script: Path, *args: str, processes: int = 1, fsdp: bool = False) -> list[str]:
    """The command that runs ``script``; several processes are real gloo ranks under torchrun."""
    words = [str(word) for word in args]
    if processes == 1 and not fsdp:
        return [sys.executable, str(script), *words]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return [*launcher, *([str(ROOT / "tests" / "fsdp_cpu.py")] if fsdp else []), str(script), *words]


def environment(processes: int = 1) -> dict[str, str]:
    """What a launched command sees; several processes stay on the CPU, since NCCL wants a GPU for each of them."""
    if ON_GPU and processes == 1:
        return ENVIRONMENT
    return {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true", **({"CUDA_VISIBLE_DEVICES": ""} if processes > 1 else {})}


def launch(
    script: Path, *args: str, cwd: Path, processes: int = 1, fsdp: bool = False, check: bool = True, timeout: int = 400
) -> Finished:
    """Runs ``script`` to its end in ``cwd``."""
    done = subprocess.run(
        command(script, *args, processes=processes, fsdp=fsdp),
        cwd=cwd, env=environment(2 if fsdp else processes), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert not check or done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return Finished(done.returncode, done.stdout, done.stderr)


def start(script: Path, *args: str, cwd: Path, processes: int = 1, fsdp: bool = False) -> subprocess.Popen:
    """Starts ``script`` in a process group of its own, so that :func:`kill` reaches every rank."""
    return subprocess.Popen(
        command(script, *args, processes=processes, fsdp=fsdp),
        cwd=cwd, env=environment(2 if fsdp else processes), start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=open(cwd / "stdout.txt", "ab"), stderr=open(cwd / "stderr.txt", "ab"),
    )  # fmt: skip


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """Sends a signal to the launcher and every rank (which have sessions of their own) and waits for their end."""
    import psutil

    try:
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)
    process.wait(timeout=60)
    psutil.wait_procs(family, timeout=60)


def history(run: Path, kind: str) -> list[dict]:
    """The rows of one kind in a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def weights(folder: Path) -> bytes:
    """The bytes of the saved weights."""
    return (folder / "model.safetensors").read_bytes()


COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 210), "grey": (128, 128, 128)}
KINDS = ("chair", "table", "lamp")


def draw_pair(rng: np.random.Generator) -> tuple[bytes, str]:
    """A small JPEG of a coloured shape, and its caption."""
    import io

    from PIL import Image, ImageDraw

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
    import io
    import tarfile

    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def pair_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ (3 shards of 31, 17 and 27 pairs), validation/ (23) and test/ (19); no round numbers."""
    folder = tmp_path_factory.mktemp("pair_set")
    rng = np.random.default_rng(5)
    for split, counts in {"train": (31, 17, 27), "validation": (23,), "test": (19,)}.items():
        for shard, count in enumerate(counts):
            members = []
            for number in range(count):
                picture, caption = draw_pair(rng)
                kind = caption.split()[2]
                key = f"{split}{shard}_{number:03d}"
                members += [(f"{key}.jpg", picture), (f"{key}.txt", caption.encode())]
                members += [(f"{key}.json", json.dumps({"kind": kind}).encode())]
            write_shard(folder / split / f"{shard:05d}.tar", members)
    return folder


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP of about 60,000 parameters, random weights, with its processor."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from accelerando.models.clip import make_preprocessing

    folder = tmp_path_factory.mktemp("tiny_clip")
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


@pytest.fixture(scope="session")
def clip_args(pair_set: Path, tiny_clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags that fine-tune the tiny CLIP; 4 optimizer steps an epoch of 75 pairs at a batch of 24."""
    cache = tmp_path_factory.mktemp("clip_cache")
    return [
        *("--data_dir", str(pair_set), "--model_name", str(tiny_clip_folder), "--cache_dir", str(cache)),
        *("--effective_batch_size", "24", "--micro_batch_size", "8", "--lr", "3e-3", "--warmup_steps", "2"),
        *("--epochs", "2", "--log_every", "1", "--num_workers", "0", "--report_to", "none", "--early_stop", "None"),
        *("--loss_batch_size", "8"),
    ]


def run_in_this_process(script: Path, base_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Yields ``run(*flags, name="a") -> run folder``: the script's ``main`` in this process, on one thread.

    Imports are paid for once, so an option's effect costs a second. Kills and several ranks use :func:`launch`.
    """
    import importlib.util

    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from accelerando.base.processes import command_line

    monkeypatch.chdir(tmp_path)
    if not ON_GPU:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    if script.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(script.stem, script)
        sys.modules[script.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[script.stem])
    module = sys.modules[script.stem]

    def run(*flags: str, name: str = "a", base: list[str] | None = None) -> Path:
        command_line.cache_clear()
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        GradientState._reset_state()
        argv = [*(base_args if base is None else base), "--run_name", name, *map(str, flags)]
        monkeypatch.setattr(sys, "argv", [str(script), *argv])
        module.main()
        return tmp_path / "runs" / name

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def train_here(text_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """text_classify.py in this process; see :func:`run_in_this_process`."""
    yield from run_in_this_process(TEXT, text_args, tmp_path, monkeypatch)


@pytest.fixture
def clip_here(clip_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """clip_finetune.py in this process; see :func:`run_in_this_process`."""
    yield from run_in_this_process(CLIP, clip_args, tmp_path, monkeypatch)


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


@pytest.fixture(scope="session")
def sign_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ (75 clips), val/ (23) and test/ (19) with labels.csv; names with spaces, with and without .npz."""
    folder = tmp_path_factory.mktemp("sign_set")
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


@pytest.fixture(scope="session")
def sign_args(sign_set: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags that train a tiny Transformer; 3 optimizer steps an epoch of 75 clips at a batch of 32."""
    cache = tmp_path_factory.mktemp("sign_cache")
    return [
        *("--keypoints-train", str(sign_set / "train"), "--keypoints-val", str(sign_set / "val")),
        *("--keypoints-test", str(sign_set / "test"), "--features-train", str(sign_set / "train")),
        *("--features-val", str(sign_set / "val"), "--features-test", str(sign_set / "test")),
        *("--hidden_size", "32", "--num_layers", "2", "--num_attention_heads", "4", "--intermediate_size", "48"),
        *("--cache_dir", str(cache), "--lr", "3e-3", "--epochs", "2", "--log_every", "1", "--report_to", "none"),
    ]


@pytest.fixture
def sign_here(sign_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """sign_train.py in this process; see :func:`run_in_this_process`."""
    yield from run_in_this_process(SIGN, sign_args, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def image_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw/ with 117 pictures of chairs, tables and lamps (JPEG, a few PNG), and splits/ of 3 folds: 31 to 34 each."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("image_set") / "furniture"
    rng = np.random.default_rng(7)
    for number in range(117):
        file, caption = draw_pair(rng)
        path = folder / "raw" / caption.split()[2] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
        if number % 10 == 0:
            Image.open(path).save(path.with_suffix(".png"))
            path.unlink()
    command = [
        sys.executable,
        str(ROOT / "tools" / "split_folds.py"),
        "--raw_data",
        str(folder / "raw"),
        "--folds",
        "3",
    ]
    subprocess.run([*command, "--near_duplicates", "0"], check=True, capture_output=True, env=environment())
    return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ViT of about 20,000 parameters for pictures of 32 pixels, random weights."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("tiny_vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ResNet (batch norms) of about 25,000 parameters, random weights."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    folder = tmp_path_factory.mktemp("tiny_resnet")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_args(image_set: Path, tiny_resnet: Path) -> list[str]:
    """The flags that train the tiny ResNet on small pictures."""
    return [
        *("--data_dir", str(image_set), "--model_name", str(tiny_resnet), "--image_size", "32"),
        *("--crop_scale", "0.6", "--batch_size", "16", "--lr", "3e-3", "--epochs", "2", "--log_every", "1"),
        *("--report_to", "none"),
    ]


@pytest.fixture
def image_here(image_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """image_classify.py in this process; see :func:`run_in_this_process`."""
    yield from run_in_this_process(IMAGE, image_args, tmp_path, monkeypatch)
