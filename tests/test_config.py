"""Flags, YAML files and aliases are one thing, and mistakes in any of them are one line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml
from harness import TEXT, script_module

from accelerando.base.config import grouped, parse_args, sections, to_yaml
from accelerando.base.errors import UserError
from accelerando.train.run import choose_directory


@dataclass
class Args:
    # -- data --
    train_file: str = ""  # training rows
    tags: tuple[str, ...] = ()  # words
    # -- training --
    lr: float = 2e-5  # peak rate
    epochs: int = 3  # passes
    amp: Literal["auto", "no", "bf16", "fp16"] | None = None  # precision
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
        (["--amp"], "amp", "auto"),
        (["--amp", "--lr", "1"], "amp", "auto"),
        (["--fp16"], "amp", "fp16"),
        (["--fp16", "false"], "amp", "no"),
        (["--no_mixed_precision"], "amp", "no"),
        (["--mixed_precision", "bf16"], "amp", "bf16"),
        (["--fp16", "true", "--bf16", "false"], "amp", "fp16"),
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


GUIDE = """
model:
  name: "transformer_model"
  architecture: "transformer"
  pretrained_model: "bert-base-uncased"
  num_labels: 2
  hidden_size: 768
  num_layers: 12
  num_attention_heads: 12
  hidden_dropout_prob: 0.1
  attention_probs_dropout_prob: 0.1
training:
  learning_rate: 2e-5
  batch_size: 16
  num_epochs: 10
  warmup_steps: 500
  weight_decay: 0.01
  gradient_accumulation_steps: 1
  max_grad_norm: 1.0
  fp16: true
  logging_steps: 100
  eval_steps: 500
  optimizer: "adamw"
  adam_epsilon: 1e-8
  adam_beta1: 0.9
  adam_beta2: 0.999
  scheduler_type: "cosine"
  early_stopping_patience: 3
  early_stopping_threshold: 0.01
  save_steps: 1000
  save_total_limit: 3
  dataloader_num_workers: 4
wandb:
  project: "your-project-name"
  entity: "your-wandb-entity"
  name: null
  tags: ["experiment", "baseline"]
  notes: "Baseline model training"
"""


def test_the_text_guides_files_are_understood_as_they_stand(tmp_path: Path) -> None:
    import importlib.util
    import sys

    from harness import TEXT

    spec = importlib.util.spec_from_file_location("guide_text", TEXT)
    module = sys.modules["guide_text"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, training = GUIDE.split("training:")
    files = [write(tmp_path / "model.yaml", model), write(tmp_path / "training.yaml", "training:" + training)]
    args = parse_args(module.Args, module.ALIASES, ["--config", *files])
    expected = {
        "run_prefix": "transformer_model", "model_name": "bert-base-uncased", "num_labels": 2, "num_layers": 12, "lr": 2e-5,
        "epochs": 10, "warmup_steps": 500, "grad_clip": 1.0, "amp": "fp16", "log_every": 100, "eval_every": 500,
        "scheduler": "cosine", "early_stop": 3, "early_stop_min_delta": 0.01, "save_every": 1000, "keep_checkpoints": 3,
        "num_workers": 4, "wandb_project": "your-project-name", "wandb_name": None, "adam_epsilon": 1e-8,
        "wandb_tags": ("experiment", "baseline"), "wandb_notes": "Baseline model training",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    cnn = "model: {architecture: cnn, vocab_size: 30522, embed_size: 128, num_filters: 100, filter_sizes: [3, 4, 5], dropout_prob: 0.5}"
    args = parse_args(module.Args, module.ALIASES, ["--config", write(tmp_path / "cnn.yaml", cnn)])
    assert (args.architecture, args.filter_sizes, args.dropout_prob) == ("cnn", (3, 4, 5), 0.5)


def text_args(*flags: str) -> object:
    module = script_module(TEXT)
    return parse_args(module.Args, module.ALIASES, list(flags))


def test_a_trackers_own_section_switches_it_on(tmp_path: Path) -> None:
    wandb = write(tmp_path / "wandb.yaml", "wandb: {project: p, name: null}\n")
    assert text_args("--config", wandb).report_to == ("tensorboard", "wandb")
    assert text_args("--config", wandb, "--report_to", "none").report_to == ("none",)
    assert text_args("--config", write(tmp_path / "a.yaml", "wandb: {name: null}\n")).report_to == ("tensorboard",)
    both = write(tmp_path / "b.yaml", "wandb: {project: p}\nreport_to: [mlflow]\n")
    assert text_args("--config", both).report_to == ("mlflow",)
    mlflow = write(tmp_path / "c.yaml", "mlflow: {experiment_name: e}\nuse_wandb: false\n")
    assert text_args("--config", mlflow).report_to == ("none",)
    again = write(
        tmp_path / "d.yaml", to_yaml(text_args("--wandb_project", "p"))
    )  # a run's own file has no such section
    assert text_args("--config", again).report_to == ("tensorboard",)


def test_a_name_has_what_is_compared(tmp_path: Path) -> None:
    """The guide's grid: learning rates, batch sizes and dropout; its model.name is what the name begins with."""
    module = script_module(TEXT)
    config = write(tmp_path / "c.yaml", "model: {name: mine}\n")
    names = {
        module.default_name(text_args("--config", config, "--train_file", "d/trec.json", "--lr", lr, "--batch_size", bs, *more))
        for lr in ("1e-5", "5e-5") for bs in ("16", "64")
        for more in ((), ("--dropout", "0.3"), ("--weight_decay", "0"), ("--max_length", "64"), ("--optimizer", "sgd"),
                     ("--no_length_buckets",), ("--architecture", "cnn", "--filter_sizes", "2", "3"))
    }  # fmt: skip
    assert len(names) == 28
    assert {
        "mine_trec_bert-base-uncased_full_bs16_lr1e-05_seed42",
        "mine_trec_bert-base-uncased_full_bs64_lr5e-05_seed42_hidden_dropout_prob0.3",
        "mine_trec_bert-base-uncased_full_bs16_lr1e-05_seed42_optimizer-sgd",
        "mine_trec_cnn_full_bs16_lr1e-05_seed42_filter_sizes-2-3",
        "mine_trec_bert-base-uncased_full_bs16_lr1e-05_seed42_no_length_buckets",
    } <= names
    # How long and how fast is no other run: it is resumed and prolonged under its name.
    longer = ("--epochs", "9", "--num_workers", "2", "--save_every", "5", "--eval_batch_size", "8")
    assert module.default_name(text_args(*longer)) == module.default_name(text_args())
    many = [word for name in ("warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "momentum",
            "scheduler_factor", "grad_clip", "ema_decay") for word in (f"--{name}", "0.123456")]  # fmt: skip
    one, other = (module.default_name(text_args(*many, "--lora_dropout", value)) for value in ("0.3", "0.4"))
    assert one != other and len(one) < 160


def test_a_guides_path_of_a_checkpoint_is_the_run_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "runs" / "x" / "checkpoints").mkdir(parents=True)

    def folder(path: object, name: str = "x") -> Path:
        args = text_args("--output_dir", str(tmp_path / "runs"), "--run_name", name, "--resume", str(path))
        return choose_directory(args, "default")

    for path in ("runs/x/last.pt", "runs/x/weights/last.pt", "data/processed/SignTransformer_last.pt"):
        assert folder(tmp_path / path) == tmp_path / "runs" / "x"
    with pytest.raises(UserError, match=r"SignTransformer_last\.pt: not a run"):
        folder("data/SignTransformer_last.pt", name="other")
    (tmp_path / "SignTransformer_last.pt").write_bytes(b"of another program")
    with pytest.raises(UserError, match=r"SignTransformer_last\.pt: not a run"):
        folder(tmp_path / "SignTransformer_last.pt")


def test_settings_of_another_program_in_a_shared_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path / "c.yaml", "lr: 0.5\nmax_length: 12\n")
    foreign = {"max_length": "is for training"}
    assert parse_args(Args, None, ["--config", config], foreign).lr == 0.5
    assert capsys.readouterr().err == f"{config}: max_length is for training\n"
    with pytest.raises(UserError, match="--max-length is for training"):
        parse_args(Args, None, ["--max-length", "3"], foreign)
    with pytest.raises(UserError, match="unknown key 'max_length'"):
        parse("--config", config)


@dataclass
class Noted:
    # -- output --
    maybe: bool | None = None  # yes, no or as it comes
    wandb_notes: str | None = None  # notes
    config: tuple[str, ...] = ()  # files


def test_a_text_that_begins_with_dashes_stays_a_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("wandb_notes: --not a flag\n")
    assert parse_args(Noted, {}, ["--config", str(path)]).wandb_notes == "--not a flag"
    assert parse_args(Noted, {}, ["--wandb_notes=-x"]).wandb_notes == "-x"


@pytest.mark.parametrize(
    ("argv", "value"),
    [([], None), (["--maybe"], True), (["--maybe", "false"], False), (["--no_maybe"], False), (["--maybe=true"], True),
     (["--maybe", "None"], None)],
    ids=str,
)  # fmt: skip
def test_a_switch_with_a_third_state(argv: list[str], value: bool | None) -> None:
    assert parse_args(Noted, {}, argv).maybe is value
