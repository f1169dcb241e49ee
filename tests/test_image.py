"""image_classify.py: it learns, every option has an effect, what cannot be read is left out, bad input is one line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import IMAGE, history, launch, weights
from PIL import Image
from safetensors.torch import load_file

from accelerando.base.errors import UserError


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.mark.figures
def test_it_learns_and_leaves_what_it_promises(image_here, image_set: Path) -> None:
    flags = ("--epochs", "30", "--lr", "1e-2", "--report_on_train", "--report_to", "tensorboard")
    run = image_here(*flags, "--fold", "2")
    found = results(run)
    assert found["test"]["accuracy"] >= 0.8
    for split, name in (("train", "fold_2_train"), ("validation", "fold_2_val"), ("test", "test")):
        assert found[split]["count"] == len((image_set / "splits" / f"{name}.txt").read_text().splitlines())
    assert found["validation"]["accuracy"] == max(row["accuracy"] for row in history(run, "validation"))
    assert found["label_names"] == ["chair", "lamp", "table"]
    assert np.sum(found["confusion_matrix"]) == found["test"]["count"]
    for name in ("summary.txt", "report.html", "metrics.csv", "plots/curves.png", "plots/confusion_test.png",
                 "logs/classification_report_test.txt", "best/README.md", "best/preprocessor_config.json"):  # fmt: skip
        assert (run / name).stat().st_size > 100, name

    code = (run / "best" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    right = 0
    for line in (image_set / "splits" / "test.txt").read_text().splitlines():
        Image.open(image_set / line).convert("RGB").save("image.jpg", quality=95)
        printed: list[str] = []
        exec(compile(code, "card", "exec"), {"print": printed.append})
        right += printed[0] == line.split("/")[1]
    assert right == pytest.approx(found["test"]["accuracy"] * found["test"]["count"], abs=2)


@pytest.fixture(scope="module")
def known() -> dict:
    """Weights of the runs so far: no two sets of flags may give the same ones."""
    return {}


@pytest.mark.parametrize(
    "flags",
    [
        ("--lr", "1e-3"), ("--weight_decay", "0.5"), ("--grad_clip", "0.01"), ("--batch_size", "8"), ("--seed", "1"),
        ("--gradient_accumulation_steps", "2"), ("--epochs", "1"), ("--max_steps", "3"), ("--amp", "bf16"),
        ("--scheduler", "constant"), ("--scheduler", "onecycle"), ("--warmup_steps", "3"), ("--optimizer", "sgd"),
        ("--optimizer", "sgd", "--momentum", "0.5"), ("--optimizer", "adamw8bit"), ("--fold", "1"),
        ("--image_size", "40"), ("--crop_scale", "0.3"), ("--crop_scale", "1"), ("--flip", "0"),
        ("--augmentation", "randaugment"), ("--augmentation", "trivialaugment"), ("--erasing", "0.5"),
        ("--mixup", "0.3"), ("--cutmix", "1"), ("--mixup", "0.3", "--cutmix", "1"), ("--progressive_sizes", "24"),
        ("--balanced",), ("--strategy", "head"), ("--layer_decay", "0.5"),
        ("--scheduler", "step", "--scheduler_step_size", "1"), ("--strategy", "gradual"), ("--label_smoothing", "0.2"), ("--class_weights",),
        ("--model_name", "None", "--architecture", "squeezenet1_1", "--image_size", "48"),
        ("--model_name", "None", "--architecture", "mnasnet0_5"), ("--adam_beta1", "0.5"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_that_change_what_is_learnt(flags: tuple[str, ...], image_here, known: dict) -> None:
    if not known:
        known["plain"] = weights(image_here(name="plain") / "last")
    trained = weights(image_here(*flags, name="other") / "last")
    assert trained not in known.values(), f"the same weights as {[k for k, v in known.items() if v == trained]}"
    known[flags] = trained


@pytest.mark.parametrize(
    "flags",
    [("--num_workers", "2"), ("--eval_batch_size", "7"), ("--eval_every", "2"), ("--save_every", "2"), ("--tta",),
     ("--ema_decay", "0.9"), ("--dataset_name", "other"), ("--num_classes", "3"), ("--best_metric", "loss")],
    ids=" ".join,
)  # fmt: skip
def test_options_that_do_not(flags: tuple[str, ...], image_here, known: dict) -> None:
    if "plain results" not in known:
        run = image_here(name="plain")
        known |= {"plain": weights(run / "last"), "plain results": results(run)}
    run = image_here(*flags, name="other")
    assert weights(run / "last") == known["plain"]
    if flags[0] in ("--tta", "--ema_decay"):
        assert results(run)["test"]["loss"] != known["plain results"]["test"]["loss"]
    elif flags[0] in ("--num_workers", "--eval_batch_size", "--save_every"):
        assert results(run)["test"]["loss"] == pytest.approx(known["plain results"]["test"]["loss"], rel=1e-5)


def test_a_cache_of_pixels_changes_nothing_but_coarse_crops(image_here) -> None:
    flags = ("--crop_scale", "1", "--flip", "0", "--cache_dir", "cache")
    plain = image_here(*flags, name="plain")
    assert not Path("cache").exists()
    cached = image_here(*flags, "--cache", name="cached")
    assert weights(cached / "last") == weights(plain / "last")
    assert results(cached)["test"] == results(plain)["test"]
    (kept,) = Path("cache").rglob("pixels.bin")
    before = kept.stat().st_mtime_ns
    coarse = image_here(*flags, "--cache", "--cache_side", "12", name="coarse")
    assert weights(coarse / "last") != weights(plain / "last")
    assert kept.stat().st_mtime_ns == before
    assert len(list(Path("cache").rglob("pixels.bin"))) == 2


def test_the_head_alone_is_trained(image_here) -> None:
    """And the norms below keep the statistics that they came with."""
    before = load_file(
        image_here("--strategy", "head", "--max_steps", "1", "--lr", "0", name="before") / "last" / "model.safetensors"
    )
    run = image_here("--strategy", "head", name="after")
    after = load_file(run / "last" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"classifier.1.weight", "classifier.1.bias"}
    found = results(run)
    assert found["trainable_parameters"] == 32 * 3 + 3 < found["parameters"]


def test_a_model_of_transformers_gets_a_new_head_and_keeps_its_normalisation(image_here, tiny_vit: Path) -> None:
    run = image_here("--model_name", str(tiny_vit))
    assert json.loads((run / "best" / "config.json").read_text())["model_type"] == "vit"
    assert json.loads((run / "best" / "preprocessor_config.json").read_text())["image_mean"] == [0.5] * 3
    # And what it saved opens too, as it was.
    again = image_here("--model_name", str(run / "best"), "--max_steps", "1", "--lr", "0", name="again")
    assert results(again)["validation"]["loss"] == pytest.approx(results(run)["validation"]["loss"], rel=1e-6)


@pytest.mark.parametrize("net", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_nets_of_timm_train_freeze_and_open(net: str, image_here) -> None:
    from transformers import AutoModelForImageClassification

    import accelerando.models.vision  # noqa: F401  (registers the class with transformers)

    base = ("--model_name", "None", "--architecture", f"timm/{net}", "--image_size", "160", "--max_steps", "2")
    whole = load_file(image_here(*base, name="whole") / "last" / "model.safetensors")
    start = load_file(image_here(*base, "--lr", "0", name="start") / "last" / "model.safetensors")
    run = image_here(*base, "--strategy", "head", "--report_to", "none", name="head")
    head = load_file(run / "last" / "model.safetensors")
    names = [name for name in start if name.rpartition(".")[2] in ("weight", "bias")]  # no statistics of batch norms
    moved = {name.rpartition(".")[0] for name in names if not torch.equal(head[name], start[name])}
    assert len(moved) == 1
    assert sum(not torch.equal(whole[name], start[name]) for name in names) > len(names) // 2
    assert AutoModelForImageClassification.from_pretrained(run / "best").config.architecture == f"timm/{net}"
    assert 'class="pair"' in (run / "report.html").read_text()  # a picture beside what the net looked at


def test_the_head_of_half_a_model_is_found() -> None:
    import importlib.util

    from transformers import CLIPConfig, CLIPForImageClassification

    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPConfig(text_config=tower, vision_config={**tower, "image_size": 16, "patch_size": 8})
    spec = importlib.util.spec_from_file_location("heads", IMAGE)
    module = sys.modules["heads"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.head_names(CLIPForImageClassification(config)) == ("classifier.",)


def test_weights_of_another_model_are_refused(tiny_vit: Path, tiny_resnet: Path) -> None:
    """Also where the names in the file are not those in memory, so that it is opened through its class."""
    from accelerate import Accelerator
    from transformers import ViTForImageClassification

    from accelerando.train.weights import load_trained_weights

    accelerator, model = Accelerator(cpu=True), ViTForImageClassification.from_pretrained(tiny_vit)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="belongs to another model"):
        load_trained_weights(accelerator, model, tiny_resnet)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_trained_weights(accelerator, model, tiny_vit)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unreadable_pictures_are_left_out_and_named(image_here, image_set: Path, tmp_path: Path, caplog) -> None:
    data = tmp_path / "broken"
    shutil.copytree(image_set, data)
    broken = {}
    for name in ("fold_0_train", "fold_0_val", "test"):
        broken[name] = data / (data / "splits" / f"{name}.txt").read_text().splitlines()[1]
        broken[name].write_bytes(broken[name].read_bytes()[:100])
    run = image_here("--data_dir", str(data), "--mixup", "0.5")
    log = (run / "logs" / "train.log").read_text()
    for name, split in (("fold_0_train", "training"), ("fold_0_val", "validation"), ("test", "test")):
        assert f"{split} images cannot be read and were skipped" in log
        assert str(broken[name]) in log
    counts = {split: len((data / "splits" / f"{name}.txt").read_text().splitlines())
              for split, name in (("validation", "fold_0_val"), ("test", "test"))}  # fmt: skip
    assert {split: results(run)[split]["count"] for split in counts} == {k: v - 1 for k, v in counts.items()}


def test_folders_that_come_split_need_no_index(image_here, image_set: Path, tmp_path: Path) -> None:
    data = tmp_path / "pair"
    for side, name in (("train", "fold_0_train"), ("val", "fold_0_val")):
        for line in (image_set / "splits" / f"{name}.txt").read_text().splitlines():
            target = data / side / line.split("/", 1)[1]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image_set / line, target)
    (data / "train" / "chair" / "stray.gif").write_bytes(b"GIF89a")
    run = image_here("--data_dir", str(data))
    assert set(results(run)) >= {"validation"}
    assert "test" not in results(run)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data_dir", ""), "--data_dir is missing"),
        (("--data_dir", "nowhere"), "tools/split_folds.py --raw_data nowhere/raw"),
        (("--fold", "7"), "there are folds 0 to 2"),
        (("--num_classes", "5"), "--num_classes 5, but .* has 3 classes"),
        (("--model_name", "None", "--architecture", "resnet81"), "did you mean resnet18"),
        (("--model_name", "nowhere"), "nowhere: the config cannot be loaded .there is no such folder"),
        (("--model_name", "x", "--weights", "y"), "drop one"),
        (("--model_name", "None", "--weights", "nowhere.pth"), "no such file"),
        (("--progressive_sizes", "64"), "up to --image_size 32"),
        (("--crop_scale", "0"), "--crop_scale"),
        (("--strategy", "head", "--layer_decay", "0.5"), "trains no layers as a whole"),
        (("--trainer_type", "mixed_precision", "--amp", "no"), "contradict each other"),
    ],
)
def test_what_cannot_be_is_one_line(flags: tuple[str, ...], words: str, image_here, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        image_here(*flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.launch
def test_an_error_ends_with_exit_code_2(image_args, tmp_path: Path) -> None:
    done = launch(IMAGE, *image_args, "--archtecture", "resnet18", cwd=tmp_path, check=False)
    assert done.code == 2
    assert done.err.strip().splitlines() == ["error: unknown flag --archtecture: did you mean --architecture?"]
