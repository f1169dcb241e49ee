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

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
TEXT = SCRIPTS / "text_classify.py"

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

    from lib.tokenizer import train_tokenizer

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


def environment() -> dict[str, str]:
    return {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}


def launch(
    script: Path, *args: str, cwd: Path, processes: int = 1, fsdp: bool = False, check: bool = True, timeout: int = 400
) -> Finished:
    """Runs ``script`` to its end in ``cwd``."""
    done = subprocess.run(
        command(script, *args, processes=processes, fsdp=fsdp),
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert not check or done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return Finished(done.returncode, done.stdout, done.stderr)


def start(script: Path, *args: str, cwd: Path, processes: int = 1, fsdp: bool = False) -> subprocess.Popen:
    """Starts ``script`` in a process group of its own, so that :func:`kill` reaches every rank."""
    return subprocess.Popen(
        command(script, *args, processes=processes, fsdp=fsdp),
        cwd=cwd, env=environment(), start_new_session=True, stdin=subprocess.DEVNULL,
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


@pytest.fixture
def train_here(text_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``train_here(*flags, name="a") -> run folder``: text_classify.py's ``main`` in this process, on one thread.

    Imports are paid for once, so an option's effect costs a second. Kills and several ranks use :func:`launch`.
    """
    import importlib.util

    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    if "text_classify" not in sys.modules:
        spec = importlib.util.spec_from_file_location("text_classify", TEXT)
        sys.modules["text_classify"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["text_classify"])
    module = sys.modules["text_classify"]

    def run(*flags: str, name: str = "a", base: list[str] | None = None) -> Path:
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        GradientState._reset_state()
        argv = [*(text_args if base is None else base), "--run_name", name, *map(str, flags)]
        monkeypatch.setattr(sys, "argv", [str(TEXT), *argv])
        module.main()
        return tmp_path / "runs" / name

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
