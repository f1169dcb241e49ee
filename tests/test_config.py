"""Flags, YAML files and aliases are one thing, and mistakes in any of them are one line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from lib.config import grouped, parse_args, sections, to_yaml
from lib.errors import UserError


@dataclass
class Args:
    # -- data --
    train_file: str = ""  # training rows
    tags: tuple[str, ...] = ()  # words
    # -- training --
    lr: float = 2e-5  # peak rate
    epochs: int = 3  # passes
    amp: Literal["no", "bf16", "fp16"] | None = None  # precision
    grad_clip: float | None = 1.0  # norm
    shuffle: bool = True  # in a new order every epoch
    wandb_name: str | None = None  # name
    resume: str | None = None  # run to go on with
    config: tuple[str, ...] = ()  # YAML files


def parse(*argv: str) -> Args:
    return parse_args(Args, {"model.name": "wandb_name"}, list(argv))


def write(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


def test_default_then_yaml_then_command_line(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", "training:\n  lr: 1e-3\n  epochs: 7\ndata: {tags: [a, b]}\n")
    args = parse("--config", config, "--epochs", "9")
    assert (args.lr, args.epochs, args.tags, args.grad_clip) == (1e-3, 9, ("a", "b"), 1.0)
    later = write(tmp_path / "d.yaml", "lr: 5e-3\ntags: []\ngrad_clip: null\nshuffle: false\n")
    args = parse("--config", config, later)
    assert (args.lr, args.epochs, args.tags, args.grad_clip, args.shuffle) == (5e-3, 7, (), None, False)


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--learning_rate", "3"], "lr", 3.0),
        (["--learning-rate=3"], "lr", 3.0),
        (["--num-train-epochs", "4"], "epochs", 4),
        (["--max-grad-norm", "None"], "grad_clip", None),
        (["--fp16"], "amp", "fp16"),
        (["--fp16", "false"], "amp", "no"),
        (["--no_mixed_precision"], "amp", "no"),
        (["--mixed_precision", "bf16"], "amp", "bf16"),
        (["--no-shuffle"], "shuffle", False),
        (["--shuffle", "false"], "shuffle", False),
        (["--shuffle=true"], "shuffle", True),
        (["--resume"], "resume", "auto"),
        (["--resume", "--lr", "1"], "resume", "auto"),
        (["--resume", "runs/x"], "resume", "runs/x"),
        (["--tags", "x", "y"], "tags", ("x", "y")),
        (["--lr", "1", "--lr", "2"], "lr", 2.0),
    ],
)
def test_spellings(argv: list[str], field: str, value: object) -> None:
    assert getattr(parse(*argv), field) == value


def test_a_guides_yaml_with_sections_and_its_own_names(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", "model: {name: mine}\ntraining: {fp16: true, learning_rate: 2e-4}\n")
    args = parse("--config", config)
    assert (args.wandb_name, args.amp, args.lr) == ("mine", "fp16", 2e-4)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--leraning_rate", "1"], ["--leraning_rate", "did you mean --learning_rate?"]),
        (["--epoch", "1"], ["did you mean --epochs?"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["--amp", "int4"], ["int4", "bf16"]),
        (["--epochs"], ["--epochs"]),
        (["stray"], ["stray"]),
        (["--distributed_mode", "fsdp"], ["accelerate launch", "fsdp.yaml"]),
        (["--enable-parallel"], ["accelerate launch", "multi_gpu.yaml"]),
        (["--device", "cpu"], ["cpu.yaml"]),
        (["--device", "cuda:1"], ["CUDA_VISIBLE_DEVICES=1", "single_gpu.yaml"]),
        (["--config", "none.yaml"], ["none.yaml", "No such file"]),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(argv: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("training: {leraning_rate: 1}", ["training.leraning_rate", "learning_rate"]),
        ("lr: fast", ["c.yaml", "--lr", "fast"]),
        ("lr: 1\n  epochs: [", ["c.yaml, line 2"]),
        ("- a\n- b", ["c.yaml", "list"]),
        ("shuffle: maybe", ["shuffle", "true or false"]),
        ("fp16: 3", ["amp", "3"]),
        ("lr: {a: 1}", ["lr"]),
    ],
)
def test_mistakes_in_yaml_name_the_file(tmp_path: Path, content: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse("--config", write(tmp_path / "c.yaml", content))
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_the_saved_config_repeats_the_run(tmp_path: Path) -> None:
    args = parse("--lr", "0.1", "--tags", "a b", "c", "--grad_clip", "None", "--no-shuffle", "--resume", "x")
    again = parse("--config", write(tmp_path / "config.yaml", to_yaml(args)))
    assert grouped(again) == grouped(args)
    assert again.resume is None  # says nothing of how this one was started
    assert list(yaml.safe_load(to_yaml(args))) == ["data", "training"]


def test_a_resumed_run_starts_from_its_own_config(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_000001").mkdir(parents=True)
    write(tmp_path / "run" / "config.yaml", "lr: 0.5\n")
    assert parse("--resume", str(tmp_path / "run")).lr == 0.5
    assert parse("--resume", str(tmp_path / "run" / "checkpoints" / "step_000001")).lr == 0.5
    assert parse("--resume", str(tmp_path / "run"), "--lr", "2").lr == 2


def test_help_comes_from_the_comments(capsys: pytest.CaptureFixture) -> None:
    assert sections(Args)["training"][0] == ("lr", "peak rate")
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for expected in ("training rows", "peak rate", "training options", "--learning_rate = --lr"):
        assert expected in shown
