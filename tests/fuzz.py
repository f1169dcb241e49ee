"""``make fuzz``: malformed inputs for every reader; each must end in one clear line, or in a right use.

Sound files are damaged at random (cut, bytes flipped, spliced, other types, huge numbers, another encoding). Each input is
read in a forked process with a limit of time, whose peak memory is measured, so that a hang or a crash is one row of the
table. The same seed gives the same inputs; ``--reader shards --number 17`` runs one of them without catching anything.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from made_data import draw_pair, make_clip, make_rows, make_tiny_clip, make_tiny_resnet, write_json, write_shard  # noqa: E402
from PIL import Image  # noqa: E402

from accelerando.base.config import parse_args, to_yaml  # noqa: E402
from accelerando.base.errors import errors_in_one_line  # noqa: E402
from accelerando.base.log import quiet_libraries  # noqa: E402
from accelerando.base.texts import CONTROL  # noqa: E402

SECONDS = 30  # for one input
MOST_MEMORY = 2048  # MB for one input
SCRIPTS = ("text_classify", "clip_finetune", "sign_train", "image_classify")


@dataclass
class Args:
    # -- what --
    seed: int = 1  # of the damage
    reader: str | None = None  # this reader alone
    number: int | None = None  # this input of the reader alone, in this process
    keep: str | None = None  # keep the inputs that failed in this folder


@dataclass(frozen=True)
class Reader:
    """``count`` damaged copies of the folder that ``make`` fills are read with ``read``; ``damaged``: which files.

    ``content_only``: what is damaged stays a file. A pipe as a config is a right use, which waits for its writer.
    """

    count: int
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    damaged: str = "*"
    content_only: bool = False


@dataclass
class Outcome:
    """How one input ended: refused, read, or a fault with its reason."""

    kind: str
    reason: str
    seconds: float
    megabytes: float


@dataclass
class Tally:
    outcomes: list[Outcome] = field(default_factory=list)

    def count(self, kind: str) -> int:
        """How many inputs ended so."""
        return sum(one.kind == kind for one in self.outcomes)


# ----------------------------------------------------------------------------------------------------------- damage

ODD_VALUES: list[object] = [
    None, True, -1, 0, 1.5, 10**9, 10**30, -(10**12), "", "x", "²", "\x1b[31m", "\ud800", [], {}, [1], {"a": 1}, "a" * 300, float("nan"),
]  # fmt: skip
ODD_BYTES = [b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[31m", b"PK\x03\x04", b"\x93NUMPY\x01\0", b"%!PS", b"\x80\x04K\x01.",
             b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"<html>404</html>", b"999999999999999999"]  # fmt: skip


def damage(content: bytes, rng: random.Random) -> bytes:
    """``content`` with one thing wrong."""
    if not content:
        return rng.choice(ODD_BYTES)
    at, size = rng.randrange(len(content)), rng.randint(1, max(1, min(len(content), 200)))

    def flip() -> bytes:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 3, 20))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)

    def number() -> bytes:
        numbers = list(re.finditer(rb"[0-9]+", content))
        huge = rng.choice((b"999999999", b"-1", b"1e999", b"18446744073709551616", b"0"))
        if not numbers:
            return content[:at] + rng.choice((b"\xff", b"\x7f", b"\x80")) * rng.choice((2, 4, 8)) + content[at + 8 :]
        place = rng.choice(numbers)
        return content[: place.start()] + huge + content[place.end() :]

    def encoded() -> bytes:
        text = content.decode("utf-8", "replace")
        return text.encode(rng.choice(("utf-16", "latin-1", "utf-8-sig", "utf-7")), "replace")

    def value() -> bytes:
        try:
            return _odd_json(content, rng)
        except (ValueError, RecursionError):
            return flip()

    ways: list[Callable[[], bytes]] = [
        lambda: content[:at],
        lambda: content[at:],
        flip,
        flip,
        lambda: content[:at] + content[at + size :],
        lambda: content[:at] + content[at : at + size] * rng.choice((2, 50)) + content[at + size :],
        lambda: content[:at] + rng.choice(ODD_BYTES) + content[at:],
        lambda: rng.choice(ODD_BYTES),
        lambda: content[:at] + rng.randbytes(size) + content[at + size :],
        number,
        encoded,
        value,
        value,
        lambda: gzip.compress(content),
    ]
    return rng.choice(ways)()


def _odd_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON document with a value of another type somewhere, or without one of its entries."""
    tree = json.loads(content)
    places: list[tuple[dict | list, str | int]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
        places += [(node, key) for key, _ in items]
        pending += [child for _, child in items]
    node, key = rng.choice(places) if places else ([tree], 0)
    if isinstance(node, dict) and rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(ODD_VALUES)
    return json.dumps(tree if places else node[0]).encode()


def damage_folder(folder: Path, pattern: str, rng: random.Random, content_only: bool) -> None:
    """Damages one file of ``folder`` (in one of ten cases what it is: missing, a folder, a pipe, a link to itself)."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    path = rng.choice(files)
    if rng.random() < 0.1 and not content_only:
        path.unlink()
        kind = rng.choice(("missing", "folder", "pipe", "link"))
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(path)
        return
    content = path.read_bytes()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = damage(content, rng)
    path.write_bytes(content)


# ----------------------------------------------------------------------------------------------------- sound inputs


def script(name: str) -> ModuleType:
    return __import__(name)


def table_maker(name: str) -> Callable[[Path], object]:
    """Writes rows in the format that ``name`` ends in."""

    def make(folder: Path) -> object:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = make_rows(12, 3)
        rows[3]["text"] = 'say "hi", then\nleave'
        path = folder / name.removesuffix(".gz")
        if path.suffix == ".json":
            write_json(path, rows)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif path.suffix == ".parquet":
            return pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            import csv

            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, ["text", "label"], delimiter="\t" if path.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
        if name.endswith(".gz"):
            (folder / name).write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        return None

    return make


def table_reader(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        from accelerando.data.tables import encode_labels, label_names, read_text_table

        table = read_text_table(str(folder / name), other_columns=True)
        [table.text(row) for row in range(min(len(table), 100))]
        return encode_labels(table, label_names(table))

    return read


def make_saved_set(folder: Path) -> object:
    import datasets

    names = datasets.ClassLabel(names=["money", "space", "sport"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = datasets.Dataset.from_list(make_rows(12, 3), features=features)
    return datasets.DatasetDict({"train": rows}).save_to_disk(folder / "set")


def make_shards(folder: Path) -> object:
    rng = np.random.default_rng(0)
    members = []
    for number in range(4):
        image, caption = draw_pair(rng)
        members += [(f"{number}.jpg", image), (f"{number}.txt", caption.encode())]
        members += [(f"{number}.json", json.dumps({"kind": "chair", "caption": caption}).encode())]
    members += [("5.jpg", image), ("5.json", b'{"caption": "a"}'), ("6.json", b'{"status": "failed_to_download"}')]
    return write_shard(folder / "shards" / "0.tar", members)


def read_pairs(where: str, folder: Path) -> object:
    from accelerando.data.pairs import PairDataset, captions, hold_out_images, open_pairs
    from accelerando.data.transforms import ImageTransform

    source = open_pairs(str(folder / where), folder / "cache", 1.0, None, "image", "caption")
    data = PairDataset(source, ImageTransform(16, "simple", exact=False))
    samples = [data.at(row, 0) for row in range(min(len(data), 20))]
    [data.problem(row) for row, sample in enumerate(samples) if not sample["valid"]]
    list(captions(source))
    [source.metadata(row) for row in range(min(len(data), 20))]
    return hold_out_images(source, 0.3, 0)


def make_caption_table(folder: Path) -> object:
    rng = np.random.default_rng(0)
    lines = ["image,caption,kind"]
    for number in range(4):
        image, caption = draw_pair(rng)
        (folder / f"{number}.jpg").write_bytes(image)
        lines.append(f"{number}.jpg,{caption},chair")
    return (folder / "rows.csv").write_text("\n".join(lines) + "\n")


def image_maker(kind: str, mode: str = "RGB", **options: object) -> Callable[[Path], object]:
    def make(folder: Path) -> object:
        pixels = np.random.default_rng(0).integers(0, 255, (24, 31, 4), np.uint8)
        return Image.fromarray(pixels, "RGBA").convert(mode).save(folder / "image", kind, **options)

    return make


def read_image(folder: Path) -> object:
    from accelerando.data.decode import decode_crop, decode_for_evaluation, decode_image, thumbnail

    file = (folder / "image").read_bytes()
    reasons = []
    for read in (
        decode_image,
        lambda content: decode_image(content, 8),
        lambda content: decode_for_evaluation(content, 16),
        lambda content: decode_crop(content, 16, lambda height, width: (0, 0, max(1, height // 2), width)),
        thumbnail,
    ):
        try:
            read(file)
        except (ValueError, OSError) as error:  # what training and prediction report as an image that cannot be read
            reasons.append(str(error))
    if reasons:
        raise SystemExit(1)
    return None


def make_clips(folder: Path) -> object:
    rng = np.random.default_rng(0)
    clip = make_clip(rng, 1)
    np.savez_compressed(folder / "a.npz", **clip)
    np.savez(folder / "b.npz", X=clip["X"])
    return (folder / "labels.csv").write_text("file,gloss,cat,occluded\na,0,0,1\nb.npz,1,0,0\n")


def read_clips(folder: Path) -> object:
    from accelerando.data.sign_clips import class_names, normalise, pack_clips, read_clip
    from accelerando.data.sign_labels import inspect_clip, label_problems, read_labels, report_problems

    for name in ("a", "b"):
        inspect_clip(folder / f"{name}.npz", expect_mask=True)
    labels = read_labels(folder / "labels.csv")
    report_problems(label_problems(labels, folder), lambda line: None)
    frames, mask = read_clip(folder / f"{labels.files[0]}.npz", "X")
    with contextlib.suppress(ValueError):  # other keypoints than a body's
        normalise(frames, mask, "body")
    clips = pack_clips(labels, folder, "X", "none", folder / "cache")
    return class_names({"train": clips}, folder, None, None, None)


def make_names(folder: Path) -> object:
    make_clips(folder)
    return (folder / "gloss_names.csv").write_text("gloss,label,cat,category\n0,HELLO,0,GREETING\n1,RED,1,COLOUR\n")


def make_index(folder: Path) -> object:
    rng = np.random.default_rng(0)
    for number in range(6):
        path = folder / "raw" / ("ants", "bees")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw_pair(rng)[0])
    names = [f"raw/{('ants', 'bees')[number % 2]}/{number}.jpg" for number in range(6)]
    (folder / "splits").mkdir()
    (folder / "splits" / "classes.json").write_text('{"ants": 0, "bees": 1}')
    (folder / "splits" / "fold_0_train.txt").write_text("\n".join(names[:4]))
    (folder / "splits" / "fold_0_val.txt").write_text("\n".join(names[4:]))
    return (folder / "groups.csv").write_text("file,group\n" + "".join(f"{name[4:]},{name[-5]}\n" for name in names))


def read_index(folder: Path) -> object:
    from tools import split_folds

    from accelerando.data.folders import read_splits

    read_splits(folder, 0)
    images = [f"{('ants', 'bees')[number % 2]}/{number}.jpg" for number in range(6)]
    return split_folds.read_groups(folder / "groups.csv", folder / "raw", images)


def make_configs(folder: Path) -> object:
    for name in SCRIPTS:
        (folder / f"{name}.yaml").write_text(to_yaml(script(name).Args()))
    return None


def read_configs(folder: Path) -> object:
    for name in SCRIPTS:
        script(name).check_args(
            parse_args(script(name).Args, script(name).ALIASES, ["--config", str(folder / f"{name}.yaml")])
        )
    return None


def make_words(folder: Path) -> object:
    lines = {
        "text_classify": "--train_file a.json --lr 1e-3 --batch_size 8 --lora_targets query value --amp bf16 --fp16 --seed 3",
        "clip_finetune": "--train_data s3://b/{0..3}.tar --effective_batch_size 64 --image_size 32 --class_templates a{}",
        "sign_train": "--num_gloss 12 --epochs 3 --hidden_size=64 --resume --no_length_buckets --dropout 0.1",
        "image_classify": "--data_dir x --image_size 64 --crop_scale 0.5 --mixup 0.2 --report_to none tensorboard",
    }
    for name, line in lines.items():
        (folder / name).write_text(line)
    return None


def read_words(folder: Path) -> object:
    for name in SCRIPTS:
        argv = (folder / name).read_bytes().decode("utf-8", "surrogateescape").split()
        argv = [word for word in argv if word not in ("-h", "--help") and "\0" not in word]
        args = parse_args(script(name).Args, script(name).ALIASES, argv)
        script(name).check_args(args)
        script(name).default_name(args)
    return None


def make_text_model(folder: Path) -> object:
    from transformers import BertConfig, BertForSequenceClassification

    from accelerando.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([row["text"] for row in make_rows(100, 0)], "wordpiece", 200)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    return tokenizer.save_pretrained(folder / "model")


def read_text_model(folder: Path) -> object:
    from tools import predict
    from transformers import AutoModelForSequenceClassification

    from accelerando.data.tokenizer import open_tokenizer
    from accelerando.inference.runs import model_folder
    from accelerando.models.pretrained import class_labels, open_config, open_model

    model = str(folder / "model")
    open_tokenizer(model)
    config = open_config(model, **class_labels(["a", "b"]))
    open_model(AutoModelForSequenceClassification, model, config=config)
    place = model_folder(Path(model))
    loaded = predict.load_text_model(place, torch.device("cpu"))
    return predict.predict_chunk(loaded, ["a goal", "the moon"], None, 2)


def read_clip_model(folder: Path) -> object:
    from accelerando.models.clip import open_clip_model, open_preprocessing

    model = open_clip_model(str(folder / "model"))
    preprocessing = open_preprocessing(str(folder / "model"), None)
    tokens = preprocessing.tokenizer(["a chair"], return_tensors="pt")
    return model.get_text_features(**{name: tokens[name] for name in ("input_ids", "attention_mask")})


def make_image_model(folder: Path) -> object:
    from accelerando.data.images import write_image_processor

    make_tiny_resnet(folder / "model")
    write_image_processor(folder / "model", 32, (0.5,) * 3, (0.5,) * 3)
    return (folder / "model" / "image.bin").write_bytes(draw_pair(np.random.default_rng(0))[0])


def read_image_model(folder: Path) -> object:
    from accelerando.inference.answers import Computing, image_answers
    from accelerando.inference.runs import model_folder, read_json
    from accelerando.inference.saved import open_image_model, task_of_saved

    place = model_folder(folder / "model")
    task_of_saved(place, read_json(place / "config.json"))
    opened = open_image_model(place, torch.device("cpu"))
    return list(image_answers(opened, [str(place / "image.bin")], Computing(1, 1)))


def make_sign_model(folder: Path) -> object:
    from accelerando.models.sign import SignTransformer, SignTransformerConfig

    shape = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = SignTransformerConfig(**shape, gloss_names=["A", "B"], cat_names=["X"])
    SignTransformer(config).save_pretrained(folder / "model")
    return np.savez_compressed(folder / "clip.npz", **make_clip(np.random.default_rng(0), 1))


def read_sign_model(folder: Path) -> object:
    from tools import predict

    from accelerando.inference.runs import model_folder, read_json

    place = model_folder(folder / "model")
    args = predict.Args(str(place), (str(folder / "clip.npz"),), output=str(folder / "out.jsonl"))
    return predict.predict_clips(args, place, read_json(place / "config.json"), None)


def make_run(folder: Path) -> object:
    from safetensors.torch import save_file

    from accelerando.report.predictions import write_predictions
    from accelerando.train.checkpoint_folders import write_manifest
    from accelerando.train.state import TrainState

    (folder / "config.yaml").write_text(to_yaml(script("image_classify").Args()))
    (folder / "results.json").write_text(
        json.dumps({"best_step": 3, "test": {"accuracy": 0.5}, "config": {"a": {"lr": 1}}})
    )
    rows = [{"kind": "validation", "step": 3, "epoch": 1.0, "accuracy": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_predictions(folder / "predictions_test.csv", ["a", "b"], ["x", "y"], np.eye(2), np.arange(2))
    for step in (3, 6):
        place = folder / "checkpoints" / f"step_{step:06d}"
        place.mkdir(parents=True)
        save_file({"a": torch.zeros(3)}, place / "model.safetensors")
        state = {"state": vars(TrainState(step=step)), "schedule": {}, "optimizer": {}, "scaler": None}
        (place / "state.json").write_text(json.dumps(state))
        (place / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
        write_manifest(place)
    return None


def read_run(folder: Path) -> object:
    from accelerando.inference import runs
    from accelerando.train.checkpoint_folders import find_checkpoint, open_checkpoint
    from accelerando.train.state import TrainState
    from accelerando.train.tracking import read_history

    alone = SimpleNamespace(is_main_process=True, num_processes=1, process_index=0)
    found = find_checkpoint(alone, folder / "checkpoints", lambda line: None)
    if found:
        TrainState.from_json(open_checkpoint(found).content["state"])
        read_history(found / "metrics.jsonl")
    runs.flat_settings(runs.read_settings(folder))
    runs.read_results(folder)
    runs.read_history(folder, "validation")
    return runs.read_predictions(folder, "test", ["x", "y"])


def make_list(folder: Path) -> object:
    (folder / "a.jpg").write_bytes(draw_pair(np.random.default_rng(0))[0])
    return (folder / "list.txt").write_text(f"{folder}/a.jpg\n\nb.jpg\nhttp://127.0.0.1:1/x.jpg\n")


def read_list(folder: Path) -> object:
    from tools import predict

    from accelerando.inference.inputs import read_image

    _, names = predict.image_names(predict.Args("x", file=str(folder / "list.txt")), predict.IMAGES)
    for name in names:
        with contextlib.suppress(ValueError, OSError):
            read_image(name)
    return None


READERS = {
    "table .json": Reader(80, table_maker("a.json"), table_reader("a.json")),
    "table .jsonl": Reader(60, table_maker("a.jsonl"), table_reader("a.jsonl")),
    "table .csv": Reader(70, table_maker("a.csv"), table_reader("a.csv")),
    "table .tsv": Reader(70, table_maker("a.tsv"), table_reader("a.tsv")),
    "table .csv.gz": Reader(40, table_maker("a.csv.gz"), table_reader("a.csv.gz")),
    "table .parquet": Reader(90, table_maker("a.parquet"), table_reader("a.parquet")),
    "saved data set": Reader(30, make_saved_set, table_reader("set")),
    "shards": Reader(110, make_shards, lambda folder: read_pairs("shards", folder)),
    "caption table": Reader(50, make_caption_table, lambda folder: read_pairs("rows.csv", folder)),
    "JPEG": Reader(50, image_maker("JPEG"), read_image, content_only=True),
    "PNG": Reader(40, image_maker("PNG", "RGBA"), read_image, content_only=True),
    "PNG, palette": Reader(20, image_maker("PNG", "P"), read_image, content_only=True),
    "WebP": Reader(30, image_maker("WEBP"), read_image, content_only=True),
    "TIFF": Reader(30, image_maker("TIFF"), read_image, content_only=True),
    "BMP": Reader(15, image_maker("BMP"), read_image, content_only=True),
    "PPM": Reader(15, image_maker("PPM"), read_image, content_only=True),
    "AVIF": Reader(20, image_maker("AVIF"), read_image, content_only=True),
    "NPZ": Reader(120, make_clips, read_clips, "*.npz"),
    "sign labels": Reader(50, make_clips, read_clips, "*.csv"),
    "gloss names": Reader(25, make_names, read_clips, "gloss_names.csv"),
    "class folders": Reader(40, make_index, read_index, "*.[tcj][xs][tvo]*"),
    "YAML": Reader(60, make_configs, read_configs, content_only=True),
    "command line": Reader(60, make_words, read_words, content_only=True),
    "text model": Reader(50, make_text_model, read_text_model),
    "CLIP model": Reader(40, lambda folder: make_tiny_clip(folder / "model"), read_clip_model),
    "image model": Reader(50, make_image_model, read_image_model, "*.[js]*"),
    "sign model": Reader(40, make_sign_model, read_sign_model, "*.[js]*"),
    "run folder": Reader(70, make_run, read_run),
    "list of images": Reader(20, make_list, read_list, "list.txt"),
}


# -------------------------------------------------------------------------------------------------------------- run


def prepared(reader: str, number: int, seed: int, sound: Path, folder: Path) -> Path:
    """A damaged copy of the sound input, always the same for these arguments."""
    shutil.copytree(sound, folder)
    rng = random.Random(f"{seed} {reader} {number}")
    damage_folder(folder, READERS[reader].damaged, rng, READERS[reader].content_only)
    return folder


def attempt(reader: str, folder: Path) -> Outcome:
    """Reads a damaged input in a forked process."""
    report = folder.with_suffix(".report")
    started = time.monotonic()
    process = os.fork()
    if process == 0:
        child(reader, folder, report)
    _, status, usage = os.wait4(process, 0)
    seconds = time.monotonic() - started
    megabytes = usage.ru_maxrss / 1024
    lines = report.read_text(errors="replace").splitlines() if report.is_file() else []
    kind, reason = (lines[0], " ".join(lines[1:])) if lines else ("", "")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        kind, reason = ("hang", f"more than {SECONDS} s") if number == signal.SIGALRM else ("crash", f"signal {number}")
    if kind not in ("hang", "crash") and megabytes > MOST_MEMORY:
        kind, reason = "memory", f"{megabytes:,.0f} MB"
    return Outcome(kind or "crash", reason, seconds, megabytes)


def child(reader: str, folder: Path, report: Path) -> None:
    """Reads, writes what came of it, and ends this process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    kind, reason = "read", ""
    try:
        with errors_in_one_line():
            READERS[reader].read(folder)
    except SystemExit as end:
        said = sys.stderr.getvalue().strip()
        kind, reason = "refused", said
        if end.code == 2 and not (said.startswith("error: ") and not CONTROL.search(said)):
            kind = "unclear"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in last if "accelerando" in frame.filename or "/tools/" in frame.filename] or last
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        kind, reason = "traceback", f"{type(error).__name__} in {place}: {str(error)[:150]}"
    report.write_text(f"{kind}\n{reason}", errors="replace")
    os._exit(0)


def in_a_process(work: Callable[[], object]) -> None:
    """Runs ``work`` in a forked process, so that no library starts threads in this one."""
    process = os.fork()
    if process == 0:
        work()
        os._exit(0)
    if os.wait4(process, 0)[1]:
        raise RuntimeError("the sound inputs cannot be made")


def shown(folder: Path, sound: Path) -> str:
    """The damaged file, in full if it is small."""
    for path in sorted(folder.rglob("*")):
        before = sound / path.relative_to(folder)
        if path.is_file() and before.is_file() and path.read_bytes() != before.read_bytes():
            content = path.read_bytes()
            return f"{path.name}: {content!r}" if len(content) < 160 else f"{path.name}: {len(content):,} bytes"
    return "a file is missing, or a folder, pipe or link"


def main() -> None:
    args = parse_args(Args)
    warnings.simplefilter("ignore")
    quiet_libraries()
    torch.set_num_threads(1)
    names = [args.reader] if args.reader else list(READERS)
    place = Path(args.keep) if args.keep else Path(tempfile.mkdtemp(prefix="fuzz"))
    place.mkdir(parents=True, exist_ok=True)
    for name in (*SCRIPTS, "transformers", "pyarrow.parquet", "safetensors.torch"):  # imported once, before all forks
        __import__(name)
    sys.modules["transformers"].utils.logging.disable_progress_bar()
    tallies: dict[str, Tally] = {}
    started = time.monotonic()
    for name in names:
        sound = place / f"{name.replace(' ', '_')}.sound"
        shutil.rmtree(sound, ignore_errors=True)
        sound.mkdir()
        in_a_process(lambda name=name, sound=sound: READERS[name].make(sound))
        tallies[name] = tally = Tally()
        for number in range(READERS[name].count) if args.number is None else [args.number]:
            folder = place / f"{name.replace(' ', '_')}.{number}"
            shutil.rmtree(folder, ignore_errors=True)
            prepared(name, number, args.seed, sound, folder)
            if args.number is not None:
                print(shown(folder, sound))
                READERS[name].read(folder)
                continue
            outcome = attempt(name, folder)
            tally.outcomes.append(outcome)
            if outcome.kind not in ("refused", "read"):
                print(f"{name} {number}: {outcome.kind}: {outcome.reason}\n    {shown(folder, sound)}", flush=True)
            if not args.keep or outcome.kind in ("refused", "read"):
                shutil.rmtree(folder)
                folder.with_suffix(".report").unlink(missing_ok=True)
    if args.number is None:
        report(tallies, time.monotonic() - started)
    if not args.keep:
        shutil.rmtree(place)


def report(tallies: dict[str, Tally], seconds: float) -> None:
    """Prints the table; exit code 1 if an input did not end as it should."""
    faults = ("traceback", "hang", "memory", "crash", "unclear")
    print(f"\n{'reader':<16}{'inputs':>8}{'refused':>9}{'read':>7}{'faults':>8}{'slowest':>10}{'peak MB':>9}")
    everything = Tally([one for tally in tallies.values() for one in tally.outcomes])
    for name, tally in {**tallies, "all": everything}.items():
        bad = sum(tally.count(kind) for kind in faults)
        slowest = max((one.seconds for one in tally.outcomes), default=0.0)
        peak = max((one.megabytes for one in tally.outcomes), default=0.0)
        counts = f"{len(tally.outcomes):>8,}{tally.count('refused'):>9,}{tally.count('read'):>7,}{bad:>8,}"
        print(f"{name:<16}{counts}{slowest:>9.1f}s{peak:>9,.0f}")
    bad = {kind: everything.count(kind) for kind in faults if everything.count(kind)}
    print(
        f"\n{len(everything.outcomes):,} inputs in {seconds:.0f} s: {bad or 'no traceback, no hang, no memory over 2 GB'}"
    )
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
