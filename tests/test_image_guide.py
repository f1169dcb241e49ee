"""The commands and config files of those who come from ml-split and ml-train, in our spelling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import history, weights

from accelerando.base.config import parse_args
from accelerando.base.errors import UserError

CONFIG = """
data:
  dataset_name: 'furniture'
  data_dir: '{data}'
  fold: 0
model:
  architecture: 'squeezenet1_1'
  weights: None
  num_classes: {classes}
training:
  trainer_type: '{trainer}'
  num_epochs: 1
  batch_size: 32
{more}"""
PRIVATE = """  dp:
    noise_multiplier: 1.1
    max_grad_norm: 0.8
    target_epsilon: 3.0
    target_delta: 1e-5
"""


@pytest.fixture
def guide(image_here, image_set: Path, tmp_path: Path):
    """``guide(*flags, trainer, more)``: trains from a config file as the guide shows it."""

    def train(*flags: str, trainer: str = "standard", more: str = "", classes: int = 3, name: str = "a") -> Path:
        config = tmp_path / "my_dataset_config.yaml"
        config.write_text(CONFIG.format(data=image_set, trainer=trainer, more=more, classes=classes))
        base = ["--config", str(config), "--image_size", "48", "--report_to", "none", "--log_every", "1"]
        return image_here(*flags, name=name, base=base)

    return train


def test_a_config_file_and_flags_over_it(guide, image_set: Path) -> None:
    run = guide("--fold", "1", "--num_epochs", "2", "--batch_size", "16", "--lr", "0.01", "--num_workers", "1")
    config = (run / "config.yaml").read_text()
    for line in ("fold: 1", "epochs: 2", "batch_size: 16", "lr: 0.01", "dataset_name: furniture", "weights: null"):
        assert line in config
    found = json.loads((run / "results.json").read_text())
    assert found["test"]["count"] == len((image_set / "splits" / "test.txt").read_text().splitlines())
    assert found["validation"]["count"] == len((image_set / "splits" / "fold_1_val.txt").read_text().splitlines())
    log = (run / "logs" / "train.log").read_text()
    for words in ("Epoch 1/2", "Epoch 2/2", "| SUCCESS  | New best accuracy", "train step", "validation loss"):
        assert words in log
    for name in ("train", "val", "test"):
        split = {"val": "validation"}.get(name, name)
        there = (run / "logs" / f"classification_report_{split}.txt").is_file()
        assert there == (name != "train")  # of the training pictures: --report_on_train


def test_every_trainer_type(guide) -> None:
    standard = weights(guide(name="standard") / "last")
    assert weights(guide(trainer="accelerate", name="accelerate") / "last") == standard
    half = guide(trainer="mixed_precision", more="  amp_dtype: 'bfloat16'\n", name="half")
    assert "amp: bf16" in (half / "config.yaml").read_text()
    assert weights(half / "last") != standard
    assert "amp: auto" in (guide(trainer="mixed_precision", name="auto") / "config.yaml").read_text()
    more = "  gradient_accumulation_steps: 2\n"
    assert len(history(guide(trainer="accelerate", more=more, name="two"), "train")) == 2  # of 67 pictures
    private = guide("--batch_size", "4", trainer="dp", more=PRIVATE, name="private")
    config = (private / "config.yaml").read_text()
    for line in ("noise_multiplier: 1.1", "grad_clip: 0.8", "target_epsilon: 3.0", "target_delta: 1.0e-05"):
        assert line in config
    assert json.loads((private / "results.json").read_text())["epsilon"] <= 3.0


def test_fp16_on_a_machine_without_a_gpu_is_one_line(guide) -> None:
    with pytest.raises(UserError, match="fp16 needs a CUDA GPU: on a CPU use --amp bf16"):
        guide(trainer="mixed_precision", more="  amp_dtype: 'float16'\n")


def test_resume_from_the_file_that_the_guide_names(guide) -> None:
    run = guide("--num_epochs", "1")
    before = weights(run / "last")
    guide("--resume", "runs/a/last.pt")  # finished: nothing changes
    assert weights(run / "last") == before
    guide("--resume", "runs/a/last.pt", "--num_epochs", "2")
    assert weights(run / "last") != before
    assert [row["epoch"] for row in history(run, "validation")] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--device", "cuda:1"), "--device cuda:1, but this launch computes on cpu: accelerate launch"),
        (("--data_dir", "nowhere"), "tools/split_folds.py --raw_data nowhere/raw --folds 5"),
        (("--trainer_type", "ddp"), "trainer_type"),
    ],
)
def test_what_the_launcher_does_and_what_is_missing_is_said(guide, flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        guide(*flags)


def test_another_number_of_classes_names_both(guide, image_set: Path) -> None:
    with pytest.raises(UserError, match=rf"--num_classes 2, but {image_set} has 3 classes"):
        guide(classes=2)


def test_nested_sections_of_a_config_are_read(tmp_path: Path) -> None:
    import sys

    args = sys.modules.get("image_classify")
    if args is None:
        import importlib.util

        from harness import IMAGE

        spec = importlib.util.spec_from_file_location("image_classify", IMAGE)
        args = sys.modules["image_classify"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(args)
    path = tmp_path / "config.yaml"
    path.write_text("training:\n  dp:\n    noise_multiplier: 1.3\n    no_such_key: 2\n")
    with pytest.raises(UserError, match=r"config.yaml: unknown key 'dp.no_such_key'"):
        parse_args(args.Args, args.ALIASES, ["--config", str(path)])
