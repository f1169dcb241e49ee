"""clip_har.py: it learns, trains what its strategy names, knows novel classes by their names alone, and options act."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import HAR, history, launch, script_module, weights
from made_data import make_video
from PIL import Image
from safetensors.torch import load_file
from tools import predict

from accelerando.base.errors import UserError
from accelerando.data.media import (
    EvaluationMedia,
    TrainingMedia,
    at_most_per_class,
    class_list,
    content_groups,
    even_positions,
    held_out,
    open_folders,
    open_media,
)
from accelerando.data.transforms import ImageTransform
from accelerando.models.clip_classifier import fill_prompts, segment_means

NAMES = ["blue table", "green_lamp_left", "red chair"]
LINEAR = ("--strategy", "linear_probe", "--augmentation", "none", "--head_lr", "3e-2")


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def changed(run: Path, base: dict[str, torch.Tensor]) -> set[str]:
    """The parts of the model whose saved weights differ from ``base``; a new head counts too."""
    trained = load_file(run / "last" / "model.safetensors")
    own = {name: tensor for name, tensor in trained.items() if "prompt_" not in name}
    moved = {
        name
        for name, tensor in own.items()
        if name not in base or not torch.equal(tensor.flatten(), base[name].flatten())
    }
    return {name.removeprefix("clip.").split(".")[0] for name in moved}


@pytest.fixture(scope="session")
def base_weights(tiny_clip_folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the tiny CLIP, named as in a classifier."""
    return {f"clip.{name}": tensor for name, tensor in load_file(tiny_clip_folder / "model.safetensors").items()}


# ------------------------------------------------------------------------------------------------------- strategies


@pytest.mark.figures
def test_it_learns_and_its_report_shows_what_it_saw(har_here) -> None:
    run = har_here("--epochs", "20", "--lr", "1e-3", "--augmentation", "none", "--report_to", "tensorboard")
    found = results(run)
    assert found["test"]["accuracy"] >= 0.8 > found["zero_shot"]["test"]["accuracy"]
    assert found["test"]["top3_accuracy"] == 1
    assert found["label_names"] == NAMES
    page = (run / "report.html").read_text()
    assert "Scores of all classes, test" in page
    assert page.count('class="scores"') == 6
    assert "zero-shot test" in page


PARTS = {"vision_model", "visual_projection", "text_model", "text_projection"}


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--strategy", "visual"), {"vision_model", "visual_projection"}),
        (("--strategy", "text"), {"text_model", "text_projection"}),
        (("--strategy", "full"), PARTS),
        (("--strategy", "full", "--train_logit_scale"), PARTS | {"logit_scale"}),
        (("--strategy", "full", "--loss", "contrastive"), PARTS | {"logit_scale"}),
        (("--strategy", "lora", "--lora_r", "2"), {"vision_model", "text_model"}),
        (("--strategy", "full", "--head", "linear"), {"vision_model", "visual_projection", "head"}),
        (LINEAR, {"head"}),
        (("--strategy", "linear_probe", "--head_features", "tower", "--head_init", "random"), {"head"}),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, tuple) else "",
)
def test_a_strategy_trains_what_it_names(flags: tuple[str, ...], parts: set[str], har_here, base_weights) -> None:
    assert changed(har_here("--max_steps", "3", *flags), base_weights) == parts


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("--distributed_mode none --batch_size 128 --max_epochs 15 --lr 3e-6", {"batch_size": 128, "epochs": 15, "lr": 3e-6}),
        ("--distributed_mode ddp --batch_size 64 --output_dir outputs/ddp_training", {"output_dir": "outputs/ddp_training"}),
        ("--distributed_mode fsdp --batch_size 32 --lr 2e-6", {"lr": 2e-6}),
        ("--evaluate_only --zero_shot --prompt_template 'a photo of a person {label}'",
         {"evaluate_only": True, "prompt_templates": ("a photo of a person {label}",)}),
        ("--distributed_mode ddp --unfreeze_visual --batch_size 64 --max_epochs 20 --lr 1e-6", {"unfreeze_visual": True}),
        ("--use_mlflow --experiment_name clip_har_experiment",
         {"report_to": ("mlflow",), "experiment_name": "clip_har_experiment"}),
        ("--use_wandb --project_name clip_har --group_name experiments",
         {"report_to": ("wandb",), "wandb_project": "clip_har", "wandb_group": "experiments"}),
        ("--no_mixed_precision --num_workers 2 --eval_batch_size 128 --unfreeze_text",
         {"amp": "no", "num_workers": 2, "eval_batch_size": 128, "unfreeze_text": True}),
    ],
)  # fmt: skip
def test_the_guides_commands_are_understood(words: str, settings: dict[str, object]) -> None:
    """The flags of its `train.py` and `launch_distributed.py`."""
    import shlex

    from accelerando.base.config import parse_args

    module = script_module(HAR)
    args = parse_args(module.Args, module.ALIASES, shlex.split(words))
    assert {name: getattr(args, name) for name in settings} == settings


def test_the_guides_flags_name_strategies(har_args, har_here, base_weights) -> None:
    """--unfreeze_visual and --unfreeze_text; nothing is a linear probe; a YAML with the guide's sections."""
    flags = [flag for flag in har_args if flag not in ("--strategy", "full")]
    for asked, parts in (
        (["--unfreeze_visual"], {"vision_model", "visual_projection"}),
        (["--unfreeze_text"], {"text_model", "text_projection"}),
        (["--unfreeze_visual", "--unfreeze_text"], PARTS),
        ([], {"head"}),
    ):
        assert changed(har_here("--max_steps", "2", "--overwrite", *asked, base=flags), base_weights) == parts
    model, data = (flags[flags.index(name) + 1] for name in ("--model_name", "--data_dir"))
    Path("guide.yaml").write_text(
        f"model:\n  model_name: {model}\n  unfreeze_visual_encoder: true\n  unfreeze_text_encoder: false\n"
        "training:\n  max_epochs: 1\n  batch_size: 16\n  lr: 2e-4\n  mixed_precision: false\n"
        f'data:\n  dataset_path: {data}\n  augmentation_strength: "medium"\n  use_action_specific_augmentation: true\n'
    )
    run = har_here("--config", "guide.yaml", "--report_to", "none", base=[], name="guide")
    assert changed(run, base_weights) == {"vision_model", "visual_projection"}


def test_the_text_tower_gets_a_gradient_when_it_is_trained(har_args, monkeypatch, tiny_clip_folder: Path) -> None:
    """Class embeddings are then part of the graph, in every micro-batch; frozen, they are computed once."""
    from accelerando.models import clip
    from accelerando.models.clip_classifier import make_classifier, prompt_tokens

    tower = clip.open_clip_model(str(tiny_clip_folder))
    clip.make_trainable_scale(tower, None, None)
    tokenizer = clip.open_preprocessing(str(tiny_clip_folder), None).tokenizer
    tokens = prompt_tokens(tokenizer, fill_prompts(NAMES, ["a red {label}.", "one {}"]), 16, False)
    model = make_classifier(tower, "text", "embedding", NAMES, tokens).train()
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(4, 3, 16, 16)).logits.logsumexp(1).sum().backward()
        assert tower.text_model.embeddings.token_embedding.weight.grad.abs().sum() > 0
    for part in (tower.text_model, tower.text_projection):
        part.requires_grad_(False)
    model.train()
    calls = []
    monkeypatch.setattr(tower, "get_text_features", lambda **_: calls.append(1))
    with pytest.raises(AttributeError):
        model(torch.randn(4, 3, 16, 16))
    monkeypatch.undo()
    first = model(torch.randn(4, 3, 16, 16)).logits
    monkeypatch.setattr(tower, "get_text_features", lambda **_: calls.append(1))
    model.train()
    assert first.shape == model(torch.randn(4, 3, 16, 16)).logits.shape
    assert len(calls) == 1


def test_a_head_from_prompts_starts_where_zero_shot_is(har_here) -> None:
    """Before the first step the linear head has the prompts' accuracy; a random one has not their loss."""
    found = {}
    for start in ("prompts", "random"):
        run = har_here(*LINEAR, "--head_init", start, "--max_steps", "1", "--head_lr", "0", name=start)
        found[start] = results(run)
    assert found["prompts"]["test"]["loss"] == pytest.approx(found["prompts"]["zero_shot"]["test"]["loss"], rel=1e-4)
    assert found["random"]["test"]["loss"] != pytest.approx(found["prompts"]["test"]["loss"], rel=1e-2)


def test_a_saved_head_is_where_training_starts(har_here) -> None:
    """After a linear probe the image tower is trained from its head on; a head on other features is refused."""
    probe = har_here(*LINEAR, "--head_lr", "0.1", name="probe")
    tuned = ("--model_name", str(probe / "best"), "--head", "linear", "--head_init", "saved", "--max_steps", "3")
    same = har_here("--strategy", "visual", *tuned, "--lr", "0", "--head_lr", "0", name="same")
    for split in ("validation", "test"):
        assert results(same)[split]["loss"] == pytest.approx(results(probe)[split]["loss"], rel=1e-4)
    further = changed(
        har_here("--strategy", "visual", *tuned, name="further"), load_file(probe / "best" / "model.safetensors")
    )
    assert further == {"vision_model", "visual_projection", "head"}
    with pytest.raises(UserError, match="those of the tower"):
        har_here("--strategy", "visual", *tuned, "--head_features", "tower", name="other")


@pytest.mark.launch
@pytest.mark.exhaustive
def test_a_saved_run_is_a_model_for_another_process(har_here, har_args, tmp_path: Path) -> None:
    """In which transformers has not met the classifier's class yet."""
    run = har_here(*LINEAR, "--max_steps", "2", name="first")
    more = ("--model_name", run.absolute() / "best", "--max_steps", "2", "--run_name", "second")
    launch(HAR, *har_args, *more, cwd=tmp_path, real=True)
    assert results(tmp_path / "runs" / "second")["steps"] == 2


def test_image_blocks_trains_the_last_ones_alone(har_here, base_weights) -> None:
    """With what comes after them; a tower has no more blocks than it has."""
    run = har_here("--strategy", "visual", "--image_blocks", "1", "--max_steps", "3")
    now = load_file(run / "last" / "model.safetensors")
    moved = {name for name, tensor in base_weights.items() if not torch.equal(now[name].flatten(), tensor.flatten())}
    blocks = {name.partition(".layers.")[2].partition(".")[0] for name in moved if ".layers." in name}
    assert blocks == {max(name.partition(".layers.")[2].partition(".")[0] for name in now if "vision_model" in name)}
    assert not [name for name in moved if "embeddings" in name or "text_model" in name]
    with pytest.raises(UserError, match="the last 99 blocks"):
        har_here("--strategy", "visual", "--image_blocks", "99", name="more")


def test_templates_are_averaged(har_here, tiny_clip_folder: Path) -> None:
    """The saved classifier's logits are scale x image x normalised mean of the prompts' embeddings."""
    from transformers import AutoModelForImageClassification, AutoTokenizer, CLIPModel

    templates = ("a {label}", "the red {label} here")
    run = har_here("--max_steps", "1", "--lr", "0", "--prompt_template", *templates)
    model = AutoModelForImageClassification.from_pretrained(run / "last").eval()
    clip, tokenizer = (
        CLIPModel.from_pretrained(tiny_clip_folder).eval(),
        AutoTokenizer.from_pretrained(tiny_clip_folder),
    )
    texts = [template.replace("{label}", name.replace("_", " ")) for name in NAMES for template in templates]
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        text = clip.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
        classes = torch.nn.functional.normalize(text, dim=-1).unflatten(0, (3, 2)).mean(1)
        classes = torch.nn.functional.normalize(classes, dim=-1)
        image = torch.nn.functional.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        assert torch.allclose(model(pixels).logits, clip.logit_scale.exp() * image @ classes.T, atol=1e-4)


# ------------------------------------------------------------------------------------------------- open vocabulary


def test_novel_classes_are_not_trained_on_and_are_scored_apart(har_here, media_set: Path) -> None:
    run = har_here("--novel_classes", "green lamp left", "--epochs", "4")
    found = results(run)
    assert found["samples"] == 4 * 44  # 22 of each of the two other classes
    assert {split: found[split]["count"] for split in ("validation", "test", "novel")} == {
        "validation": 22, "test": 12, "novel": 6,
    }  # fmt: skip
    one, other = found["test"]["accuracy"], found["novel"]["accuracy"]
    assert other == 1  # among the novel classes, of which there is one
    assert found["novel"]["harmonic_mean"] == pytest.approx(2 * one * other / (one + other))
    assert found["novel"]["accuracy_among_all"] <= 1
    assert "green_lamp_left" in (run / "predictions_novel.csv").read_text()
    assert "green_lamp_left" not in {
        line.split(",")[1] for line in (run / "predictions_test.csv").read_text().splitlines()
    }


def test_novel_classes_are_names_a_file_or_a_share(tmp_path: Path) -> None:
    names = [f"class_{number}" for number in range(10)]
    (tmp_path / "some.txt").write_text("class_3\n\nClass 5\n")
    assert class_list(["class 1", "class_2"], names, 0) == ["class_1", "class_2"]
    assert class_list([str(tmp_path / "some.txt")], names, 0) == ["class_3", "class_5"]
    half = class_list(["0.5"], names, 0)
    assert len(half) == 5 and half == class_list(["0.5"], names, 0) != class_list(["0.5"], names, 1)
    with pytest.raises(UserError, match="did you mean class_1"):
        class_list(["clas_1"], names, 0)
    with pytest.raises(UserError, match="at least two are needed"):
        class_list(names[1:], names, 0)


def test_zero_shot_trains_nothing_and_a_saved_run_is_scored_again(har_here, har_args) -> None:
    run = har_here("--evaluate_only", "--zero_shot", name="zero")
    assert results(run)["steps"] == 0
    assert not (run / "best").exists()
    trained = har_here("--epochs", "3", name="trained")
    assert results(trained)["zero_shot"]["test"] == pytest.approx(
        {name: value for name, value in results(run)["test"].items() if name != "count"}
    )
    again = har_here(
        "--evaluate_only",
        "--model_name",
        str(trained / "best"),
        "--prompt_template",
        "x {}",
        "--strategy",
        "linear_probe",
        name="again",
    )
    for name, value in results(trained)["test"].items():
        assert results(again)["test"][name] == pytest.approx(value, rel=1e-4), name
    linear = har_here("--strategy", "visual", "--head", "linear", "--epochs", "3", name="linear")
    again = har_here("--evaluate_only", "--model_name", str(linear / "best"), name="linear_again")
    assert results(again)["test"]["loss"] == pytest.approx(results(linear)["test"]["loss"], rel=1e-4)


def test_what_was_kept_is_shown_with_a_warning(har_here, media_set: Path, tmp_path: Path) -> None:
    """Zero-shot accuracy on other classes before and after; training towards wrong answers lowers it."""
    kept = tmp_path / "kept"
    shutil.copytree(media_set / "train" / "blue table", kept / "blue table")
    shutil.copytree(media_set / "train" / "green_lamp_left", kept / "red chair")  # a name that training gives to others
    run = har_here("--kept_data", str(kept), "--epochs", "8")
    before, after = results(run)["zero_shot"]["kept"]["accuracy"], results(run)["kept"]["accuracy"]
    assert before != after
    assert "What was kept" in (run / "report.html").read_text()
    assert ("fell from" in (run / "logs" / "train.log").read_text()) == (after < before - 0.01)


def test_wise_ft_ends_are_the_old_and_the_new_weights(har_here) -> None:
    run = har_here("--wise_ft", "0", "0.5", "1", "--epochs", "3")
    mixtures = results(run)["wise_ft"]
    assert [mixture["alpha"] for mixture in mixtures] == [0, 0.5, 1]
    assert mixtures[0]["loss"] == pytest.approx(results(run)["zero_shot"]["validation"]["loss"], rel=1e-4)
    assert (run / "wise_ft" / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------------------ data


def test_options_that_change_what_is_learnt(har_here) -> None:
    """No two sets of flags give the same weights."""
    seen: dict[str, str] = {}
    sets = (
        (), ("--augmentation", "none"), ("--augmentation", "medium"), ("--augmentation", "strong"), ("--mixup", "0.5"),
        ("--cutmix", "1"), ("--label_smoothing", "0.2"), ("--balanced",), ("--shots", "4"), ("--frames", "1"),
        ("--max_samples_per_class", "9"), ("--seed", "1"), ("--head", "linear"), ("--head", "linear", "--head_lr", "1e-2"),
        ("--use_action_specific_augmentation",), ("--use_action_specific_augmentation", "--no_crop_classes", "*"),
        ("--prompt_template", "a {}"), ("--loss", "contrastive"), ("--ema_decay", "0.9"), ("--weight_decay", "0.5"),
        ("--class_names", "blue table", "green_lamp_left"),
    )  # fmt: skip
    for flags in sets:
        found = weights(
            har_here("--max_steps", "3", "--overwrite", *flags) / ("best" if "--ema_decay" in flags else "last")
        )
        assert found not in seen.values(), (flags, [other for other, value in seen.items() if value == found])
        seen[" ".join(flags)] = found


def test_shots_and_limits_are_seeded() -> None:
    classes = np.repeat([0, 1, 2], [30, 5, 12])
    rows = at_most_per_class(classes, 8, seed=3)
    assert np.bincount(classes[rows]).tolist() == [8, 5, 8]
    assert np.array_equal(rows, at_most_per_class(classes, 8, seed=3))
    assert not np.array_equal(rows, at_most_per_class(classes, 8, seed=4))


def test_copies_stay_on_one_side(tmp_path: Path) -> None:
    """Plain class folders are split by class, and the copies of an image together."""
    rng = np.random.default_rng(0)
    for name in ("walk", "run"):
        (tmp_path / name).mkdir()
        for number in range(20):
            file = tmp_path / name / f"{number}.png"
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(file)
            if number < 6:
                for copy in range(2):
                    shutil.copy(file, tmp_path / name / f"{number}_copy{copy}.png")
    media = open_folders(tmp_path)["train"]
    groups = content_groups(media)
    assert len(np.unique(groups)) == 40
    rest, held = held_out(media.classes(media.class_names()), groups, 0.25, seed=0)
    assert not set(groups[rest]) & set(groups[held])
    assert len(held) == pytest.approx(0.25 * len(media), abs=3)


def test_tables_datasets_and_shards_give_the_same_samples(media_set: Path, tmp_path: Path) -> None:
    import datasets
    import webdataset

    images = sorted((media_set / "train").rglob("*.png"))
    labels = [file.parent.name for file in images]
    (tmp_path / "table.csv").write_text(
        "file,action\n" + "".join(f"{file},{label}\n" for file, label in zip(images, labels, strict=True))
    )
    hub = datasets.Dataset.from_dict(
        {"image": [str(file) for file in images], "label": [NAMES.index(x) for x in labels]}
    )
    hub = hub.cast_column("image", datasets.Image()).cast_column("label", datasets.ClassLabel(names=NAMES))
    datasets.DatasetDict({"train": hub}).save_to_disk(tmp_path / "hub")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for number, (file, label) in enumerate(zip(images, labels, strict=True)):
            tar.write({"__key__": f"{number:03}", "png": file.read_bytes(), "cls": label.encode()})
    cache = tmp_path / "cache"
    found = [
        open_media(str(tmp_path / "table.csv"), "train", cache, 0, "/", "file", "action"),
        open_media(str(tmp_path / "hub"), "train", cache, 0, None, "image", "label"),
        open_media(str(tmp_path / "a.tar"), "train", cache, 0, None, "image", "label"),
    ]
    transform = ImageTransform(16)
    first = EvaluationMedia(found[0], found[0].classes(NAMES), transform)
    for media in found:
        assert media.class_names() == NAMES
        samples = EvaluationMedia(media, media.classes(NAMES), transform)
        for row in (0, 7, len(images) - 1):
            assert torch.equal(samples[row]["pixel_values"], first[row]["pixel_values"])
            assert samples[row]["label"] == first[row]["label"] == NAMES.index(labels[row])


def test_frames_of_a_sample_are_augmented_alike(media_set: Path) -> None:
    """A video of one still image stays one through crop, flip, colour and mixing."""
    from accelerando.data.images import ImageAugmentation

    rng = np.random.default_rng(0)
    still = np.kron(rng.integers(0, 255, (4, 4, 3), np.uint8), np.ones((12, 12, 1), np.uint8))
    place = media_set.parent / "still" / "one"
    place.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        make_video(place / f"{number}.mp4", [still] * 8, codec="libx264")
    media = open_folders(place.parent)["train"]
    augmentation = ImageAugmentation(0.3, 0.5, "trivialaugment", 0.5)
    samples = TrainingMedia(media, np.zeros(4, np.int64), ImageTransform(16), augmentation, 4, mixup=0.5, cutmix=1.0)
    different = set()
    for row in range(4):
        for epoch in range(3):
            pixels = samples.at(row, epoch)["pixel_values"].float()
            assert pixels.shape == (4, 3, 16, 16)
            assert (pixels - pixels[0]).abs().mean() < 2  # what is left of the video's compression
            different.add(pixels[0].mean().item())
    assert len(different) > 8


def test_action_specific_augmentation_neither_mirrors_nor_crops(media_set: Path, har_args) -> None:
    module = script_module(HAR)
    args = module.Args(data_dir=str(media_set), use_action_specific_augmentation=True, no_crop_classes=("blue table",))
    media = open_folders(media_set)["train"]
    data = module.Data(
        {"train": media}, {"train": media.classes(NAMES)}, NAMES, {}, [],
        module.clip.open_preprocessing(har_args[har_args.index("--model_name") + 1], None), module.MediaCollate(),
    )  # fmt: skip
    samples = module.training_samples(args, data)
    assert samples.gentle[NAMES.index("green_lamp_left")].flip == 0
    assert samples.gentle[NAMES.index("green_lamp_left")].crop_scale == samples.augmentation.crop_scale
    assert samples.gentle[NAMES.index("blue table")].crop_scale == 1
    assert NAMES.index("red chair") not in samples.gentle


def test_order_of_frames_does_not_count_but_their_number_does(har_here, tmp_path: Path) -> None:
    """A class is told by a colour that only part of the video has: shuffled frames score alike, one frame lower."""
    rng = np.random.default_rng(3)
    colours = {"red first": (230, 40, 40), "blue first": (40, 40, 230)}
    for order in ("kept", "shuffled"):
        for split, count in (("train", 16), ("val", 8), ("test", 16)):
            for name, colour in colours.items():
                for number in range(count):
                    frames = [np.full((32, 32, 3), 128, np.uint8)] * 6 + [np.full((32, 32, 3), colour, np.uint8)] * 2
                    frames = [
                        np.clip(frame + rng.normal(0, 12, frame.shape), 0, 255).astype(np.uint8) for frame in frames
                    ]
                    if order == "shuffled":
                        frames = [frames[place] for place in rng.permutation(8)]
                    place = tmp_path / order / split / name
                    place.mkdir(parents=True, exist_ok=True)
                    make_video(place / f"{number}.mkv", frames, gop=1)
    flags = ("--epochs", "8", "--augmentation", "none", "--frames", "8")
    run = har_here("--data_dir", str(tmp_path / "kept"), *flags, name="run")
    accuracy = results(run)["test"]["accuracy"]
    assert accuracy >= 0.9
    scored = ("--evaluate_only", "--model_name", str(run / "best"), "--data_dir")
    shuffled = har_here(*scored, str(tmp_path / "shuffled"), "--frames", "8", name="shuffled")
    assert results(shuffled)["test"]["accuracy"] == pytest.approx(accuracy, abs=0.1)
    one = har_here(*scored, str(tmp_path / "kept"), "--frames", "1", name="one")  # its middle is grey
    assert results(one)["test"]["accuracy"] <= accuracy - 0.2


def test_views_are_other_frames_whose_logits_are_averaged(media_set: Path) -> None:
    media = open_folders(media_set)["test"]
    video = next(row for row, name in enumerate(media.names.to_pylist()) if name.endswith(".mp4"))
    classes, transform = media.classes(NAMES), ImageTransform(16)
    two = EvaluationMedia(media, classes, transform, frames=3, views=2)[video]
    assert two["frames"] == [3, 3]
    assert two["pixel_values"].shape[0] == 6
    singles = [*even_positions(3, 2, 0), *even_positions(3, 2, 1)]
    assert sorted(singles) == even_positions(6)
    image = EvaluationMedia(media, classes, transform, frames=3, views=2)[0]
    assert image["frames"] == [1]
    values = torch.arange(12.0).reshape(6, 2)
    assert segment_means(values, torch.tensor([1, 3, 2])).tolist() == [[0, 1], [4, 5], [9, 10]]


def test_a_broken_video_is_named_and_left_out(har_here, media_set: Path, tmp_path: Path) -> None:
    shutil.copytree(media_set, tmp_path / "data")
    for name in ("train/blue table/02.mp4", "test/blue table/02.mp4"):
        (tmp_path / "data" / name).write_bytes(b"no video at all")
    run = har_here("--data_dir", str(tmp_path / "data"))
    assert results(run)["test"]["count"] == 17
    log = (run / "logs" / "train.log").read_text()
    assert "test/blue table/02.mp4: " in log and "train/blue table/02.mp4: " in log


# -------------------------------------------------------------------------------------------------- cached features


def test_a_worker_opens_the_cached_features_by_itself(tmp_path: Path) -> None:
    """What a data set sends to its workers does not grow with the features."""
    import pickle

    from accelerando.data.media import FeatureRows

    np.save(tmp_path / "features.npy", np.arange(60_000, dtype=np.float32).reshape(1000, 1, 60))
    rows = FeatureRows(np.load(tmp_path / "features.npy", mmap_mode="r"), np.zeros(1000, np.int64))
    sent = pickle.dumps(rows)
    assert len(sent) < 20_000
    assert np.array_equal(pickle.loads(sent).at(7, 0)["features"], rows.at(7, 0)["features"])


def test_cached_features_change_nothing_and_notice_changes(
    har_here, media_set: Path, tmp_path: Path, tiny_clip_folder
) -> None:
    """The probe's weights are those without a cache; another file, size of frames or weight is computed anew."""
    shutil.copytree(media_set, tmp_path / "data")
    common = (*LINEAR, "--data_dir", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache"), "--overwrite")

    def read(*flags: str) -> tuple[str, str]:
        run = har_here(*common, *flags)
        return (run / "logs" / "train.log").read_text(), run

    log, run = read()
    cached = load_file(run / "last" / "model.safetensors")
    assert log.count("Features are cached") == 3
    neighbours = results(run)["nearest_neighbours"]
    assert 0 <= neighbours <= 1
    assert read()[0].count("Features are read") == 3
    log, run = read("--no-cache_features")
    assert "Features" not in log
    plain = load_file(run / "last" / "model.safetensors")
    for name in ("head.weight", "head.bias"):
        assert torch.allclose(cached[name], plain[name], atol=1e-5), name
    file = tmp_path / "data" / "val" / "blue table" / "00.png"
    os.utime(file, ns=(1, 1))
    assert read()[0].count("Features are cached") == 1  # of the validation samples
    assert read("--frames", "2")[0].count("Features are cached") == 3
    other = tmp_path / "other"
    shutil.copytree(tiny_clip_folder, other)
    tensors = load_file(other / "model.safetensors")
    tensors["visual_projection.weight"][0, 0] += 1
    from safetensors.torch import save_file

    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert read("--model_name", str(other))[0].count("Features are cached") == 3


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--zero_shot",), "add --evaluate_only"),
        (("--evaluate_only",), "a CLIP without a classifier"),
        (("--prompt_template", "a photo"), "needs {label}"),
        (("--novel_classes", "blue tabl"), "did you mean blue table"),
        (("--novel_classes", "blue table", "--head", "linear"), "needs --head text"),
        (("--strategy", "linear_probe", "--head", "text"), "no weights"),
        (("--strategy", "text", "--head", "linear"), "needs --head text"),
        (("--head_features", "tower"), "needs --head linear"),
        (("--head", "linear", "--head_init", "saved"), "a CLIP without a classifier"),
        (("--strategy", "lora", "--image_blocks", "1"), "needs --strategy visual or full"),
        (("--loss", "contrastive", "--mixup", "0.2"), "drop --mixup"),
        (("--unfreeze_text", "--strategy", "visual"), "disagree"),
        (("--train_file", "x.csv"), "both name the data"),
        (("--class_names", "walking"), "no sample of the classes walking"),
        (("--wise_ft", "2"), "between 0 and 1"),
        (("--frames", "0"), "--frames 0"),
        (("--model_name", "nowhere"), "nowhere"),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(flags: tuple[str, ...], words: str, har_here) -> None:
    with pytest.raises(UserError) as caught:
        har_here(*flags)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()


def test_a_table_names_the_row_of_a_missing_file(har_here, tmp_path: Path, har_args) -> None:
    (tmp_path / "table.csv").write_text("image,label\na.mp4,walking\n")
    base = [flag for flag in har_args if flag != "--data_dir"]
    base.remove(har_args[har_args.index("--data_dir") + 1])
    with pytest.raises(UserError, match=r"table.csv: row 1: no file .*a.mp4; --media_folder"):
        har_here("--train_file", str(tmp_path / "table.csv"), base=base)


def test_classes_that_train_lacks_are_reported(har_here, media_set: Path, har_args, tmp_path: Path, capsys) -> None:
    """Of a table; a single class is refused."""
    files = {split: sorted((media_set / split).rglob("*.png")) for split in ("train", "val")}
    for split, skipped in (("train", "red chair"), ("val", "")):
        rows = [f"{file},{file.parent.name}" for file in files[split] if file.parent.name != skipped]
        (tmp_path / f"{split}.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    base = [flag for flag in har_args if flag not in ("--data_dir", str(media_set))]
    tables = ("--train_file", "train.csv", "--validation_file", "val.csv", "--media_folder", "/")
    run = har_here(*tables, "--max_steps", "1", base=base)
    said = capsys.readouterr().out
    assert "validation: 8 samples are left out, of classes that train does not have, such as red chair" in said
    assert results(run)["label_names"] == NAMES[:2]
    with pytest.raises(UserError, match="one class, red chair"):
        har_here("--class_names", "red chair", name="one")


def test_without_pyav_the_package_is_named(har_here, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "av" else True)
    with pytest.raises(UserError, match="pip install av"):
        har_here()


def test_history_has_the_validation_of_each_epoch(har_here) -> None:
    assert len(history(har_here(), "validation")) == 2


# ------------------------------------------------------------------------------------------------------ prediction


def test_predict_answers_for_videos_and_any_class_names(har_here, media_set: Path, call_tool, tmp_path: Path) -> None:
    """As the run's own predictions; with other class names by their prompts, also from a plain CLIP's folder."""
    from accelerando.report.predictions import probabilities

    run = har_here("--epochs", "3", "--frames", "8")
    files = [media_set / "test" / name / file for name in NAMES for file in ("00.png", "02.mp4", "05.mp4")]
    code, out, err = call_tool(predict, run, *files)
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    rows = {line.split(",")[0]: line.split(",") for line in (run / "predictions_test.csv").read_text().splitlines()}
    header = rows["file"]
    for file, answer in zip(files, answers, strict=True):
        own = rows[str(file.relative_to(media_set))]
        for name in NAMES:
            assert answer["scores"][name] == pytest.approx(float(own[header.index(f"p_{name}")]), abs=2e-3)
    code, out, _ = call_tool(
        predict, run, *files[:3], "--class_names", "a lamp", "a chair", "--prompt_template", "one {}"
    )
    assert code == 0
    named = [json.loads(line)["scores"] for line in out.splitlines()]
    assert all(set(scores) == {"a lamp", "a chair"} for scores in named)
    from accelerando.models.clip_classifier import open_with_classes

    model = open_with_classes(str(run / "best"), ["a lamp", "a chair"], ["one {}"]).eval()
    samples = EvaluationMedia(open_folders(media_set)["test"], np.zeros(18, np.int64), ImageTransform(16), 8)
    place = open_folders(media_set)["test"].names.to_pylist().index(str(files[1].relative_to(media_set)))
    from accelerando.data.transforms import normalise
    from accelerando.models.clip import open_preprocessing

    colours = open_preprocessing(str(run / "best"), None).colours
    with torch.no_grad():
        logits = model(normalise(samples[place]["pixel_values"], *colours), torch.tensor([8])).logits
    expected = probabilities(logits.numpy())[0]
    assert [named[1]["a lamp"], named[1]["a chair"]] == pytest.approx(expected.tolist(), abs=2e-3)
    code, _, err = call_tool(predict, media_set, "x.png", "--class_names", "a", "b")
    assert code == 2 and "no model here" in err
