"""Image processors with more than mean and std, nets with two heads, timm's nets through transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from accelerando.base.errors import UserError
from accelerando.data.transforms import normalise
from accelerando.models import clip
from accelerando.models.pretrained import (
    class_labels,
    colour_statistics,
    head_names,
    open_classifier,
    own_image_size,
)
from accelerando.models.processors import input_colours, processed, resizing_of
from accelerando.models.vision import VisionNet, VisionNetConfig, load_pretrained, make_net

pytestmark = pytest.mark.usefixtures("no_figures")


def photo(height: int = 70, width: int = 90) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------------- colours

SETTINGS = {
    "plain": ("ViTImageProcessor", {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}),
    "no normalisation": ("ViTImageProcessor", {"do_normalize": False}),
    "to 2": ("ViTImageProcessor", {"rescale_factor": 1 / 127.5}),
    "not rescaled": ("ViTImageProcessor", {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3}),
    "offset": ("EfficientNetImageProcessor", {"rescale_factor": 1 / 127.5, "rescale_offset": True}),
    "normalised twice": ("EfficientNetImageProcessor", {"include_top": True}),
    "blue first": ("MobileViTImageProcessor", {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_colours_are_what_the_processor_makes_of_them(name: str) -> None:
    kind, settings = SETTINGS[name]
    processor = getattr(transformers, kind)(**settings)
    colours = input_colours(processor)
    assert colours.blue_first == (name == "blue first")
    if name == "plain":  # to the last bit
        assert colours[:2] == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    for colour in ((10, 200, 90), (255, 255, 255), (0, 1, 2)):
        expected = processed(processor, Image.new("RGB", (300, 300), colour))[:, 100, 100]
        pixels = torch.tensor(colour, dtype=torch.uint8)[None, :, None, None]
        found = normalise(pixels, colours.mean, colours.std).flatten()
        assert torch.allclose(found.flip(0) if colours.blue_first else found, expected, atol=2e-4, rtol=1e-4)


def test_a_net_that_takes_blue_first_gives_the_same_for_red_first(tmp_path: Path) -> None:
    config = transformers.MobileViTConfig(
        image_size=64,
        hidden_sizes=[8, 12, 16],
        neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 16],
        num_labels=3,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    theirs = transformers.MobileViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    processor = transformers.MobileViTImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path)
    ours = open_classifier(str(tmp_path)).eval()
    mean, std = colour_statistics(str(tmp_path), "")
    assert (mean, std) == ((0, 0, 0), (1, 1, 1))
    with torch.no_grad():
        expected = theirs(processor(images=[photo(64, 64)], return_tensors="pt")["pixel_values"]).logits
        pixels = torch.from_numpy(np.array(photo(64, 64))).permute(2, 0, 1)[None]
        found = ours(normalise(pixels, mean, std)).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert (expected - theirs(normalise(pixels, mean, std)).logits).abs().max() > 1e-4  # the order matters


def test_a_broken_processor_is_one_line_and_none_is_imagenets(tmp_path: Path, tiny_vit: Path) -> None:
    assert colour_statistics(str(tmp_path / "nothing"), "") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    (tmp_path / "preprocessor_config.json").write_text("{ broken")
    with pytest.raises(UserError, match="the image processor cannot be loaded") as error:
        colour_statistics(str(tmp_path), "")
    assert "\n" not in str(error.value)
    transformers.Siglip2ImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"Siglip2ImageProcessor\w*\) has an output of shape .* choose one for a fixed size"
    ):
        colour_statistics(str(tmp_path), "")


@pytest.mark.parametrize(
    ("architecture", "side"),
    [("resnet18", 224), ("inception_v3", 299), ("vit_h_14", 224), ("timm/test_vit", 160), ("resnet81", 224)],
)
def test_the_size_that_a_net_was_made_for(architecture: str, side: int) -> None:
    assert own_image_size(None, architecture) == side


def test_the_size_that_a_model_of_transformers_was_made_for(tiny_vit: Path, tiny_resnet: Path, tmp_path: Path) -> None:
    assert own_image_size(str(tiny_vit), "") == 32
    assert own_image_size(str(tiny_resnet), "") == 224  # neither its config nor a processor says it
    transformers.ResNetConfig().save_pretrained(tmp_path)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 96}).save_pretrained(tmp_path)
    assert own_image_size(str(tmp_path), "") == 96


# ----------------------------------------------------------------------------------------------------------- heads

TWO_HEADS = {
    "deit_tiny_distilled_patch16_224": ("net.head", "net.head_dist"),
    "levit_128s": ("net.head.linear", "net.head_dist.linear"),
    "repvit_m0_9": ("net.head.head.l", "net.head.head_dist.l"),
    "efficientformer_l1": ("net.head", "net.head_dist"),
    "crossvit_tiny_240": ("net.head.0", "net.head.1"),
    "volo_d1_224": ("net.head", "net.aux_head"),
}


@pytest.mark.parametrize("name", TWO_HEADS)
def test_both_heads_are_found_replaced_and_trained(name: str, tmp_path: Path) -> None:
    import timm

    model = VisionNet(VisionNetConfig(architecture=f"timm/{name}", num_labels=3))
    assert model.head_names() == TWO_HEADS[name]
    source = make_net(f"timm/{name}", 10)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    said = load_pretrained(model, str(tmp_path / "weights.pth"))
    assert said.endswith(f"all except the head {', '.join(head.removeprefix('net.') for head in TWO_HEADS[name])}")
    body = next(name for name in source.state_dict() if "head" not in name)
    assert torch.equal(model.net.state_dict()[body], source.state_dict()[body])
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad = parameter_name.startswith(head_names(model))
    size = timm.get_pretrained_cfg(name).input_size[-1]
    model.train()(torch.rand(2, 3, size, size), labels=torch.tensor([0, 2])).loss.backward()
    for head in TWO_HEADS[name]:
        assert model.get_submodule(head).out_features == 3
        assert model.get_submodule(head).weight.grad.abs().sum() > 0


def test_both_heads_of_a_distilled_model_of_transformers(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.DeiTConfig(**shape, image_size=16, patch_size=8, num_labels=10)
    transformers.DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["DeiTForImageClassificationWithTeacher"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path)
    assert head_names(model) == ("cls_classifier.", "distillation_classifier.")


def test_a_timm_model_trains_through_model_name(image_here, tmp_path: Path) -> None:
    import timm

    from accelerando.inference.saved import open_image_model

    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("test_vit2", num_classes=10), tmp_path / "timm")
    flags = ("--model_name", str(tmp_path / "timm"), "--image_size", "None", "--max_steps", "2")
    run = image_here(*flags, "--strategy", "head", name="timm")
    side = timm.get_pretrained_cfg("test_vit2").input_size[-1]
    assert f"image_size: {side}\n" in (run / "config.yaml").read_text()
    settings = json.loads((run / "best" / "preprocessor_config.json").read_text())
    assert settings["crop_size"] == {"height": side, "width": side}
    assert settings["image_mean"] == [0.5] * 3
    opened = open_image_model(run / "best", torch.device("cpu"))
    assert opened.label_names == ["chair", "lamp", "table"]
    assert head_names(opened.model) == ("timm_model.head.",)
    again = image_here(
        "--model_name", str(run / "best"), "--max_steps", "1", "--lr", "0", "--image_size", "None", name="again"
    )
    losses = [json.loads((folder / "results.json").read_text())["test"]["loss"] for folder in (run, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_class_labels_of_a_timm_config_win_over_its_own_number(tmp_path: Path) -> None:
    import timm

    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=10), tmp_path, model_args={"num_classes": 10})
    model = open_classifier(str(tmp_path), **class_labels(["a", "b"]))
    assert model.config.num_labels == 2
    assert model(torch.rand(1, 3, 64, 64)).logits.shape == (1, 2)


# ------------------------------------------------------------------------------------------------------------ CLIP


def preprocessing(processor: transformers.BaseImageProcessor) -> clip.Preprocessing:
    return clip.Preprocessing(None, processor, 16, full_length=False)


SIDE = {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_size": SIDE}, (32, 32, False, "bicubic")),
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 40}, "crop_size": SIDE}, (32, 40, False, "bicubic")),
        ("CLIPImageProcessorPil", {"size": SIDE, "crop_size": SIDE, "resample": 2}, (32, 32, True, "bilinear")),
        ("SiglipImageProcessorPil", {"size": SIDE}, (32, 32, True, "bicubic")),
        ("SiglipImageProcessorPil", {"size": SIDE, "resample": 2, "do_normalize": False}, (32, 32, True, "bilinear")),
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_size": SIDE, "rescale_factor": 1 / 127.5},
         (32, 32, False, "bicubic")),
    ],
)  # fmt: skip
def test_clips_processor_is_repeated(kind: str, settings: dict, expected: tuple) -> None:
    found = preprocessing(getattr(transformers, kind)(**settings))
    assert found.resizing == expected
    clip.check_processor(found)
    file = io.BytesIO()
    photo().save(file, "PNG")
    own = normalise(found.transform()(file.getvalue())[None], *found.colours)[0]
    theirs = processed(found.image_processor, photo())
    assert ((own - theirs) * torch.tensor(found.colours[1])[:, None, None]).abs().max() < 3 / 255


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("CLIPImageProcessorPil", {"do_center_crop": False, "size": {"shortest_edge": 32}}, "crops nothing, so images would"),
        ("CLIPImageProcessorPil", {"do_resize": False}, "makes no square images by resizing"),
        ("SiglipImageProcessorPil", {"size": {"height": 32, "width": 48}}, "makes no square images"),
        ("SiglipImageProcessorPil", {"size": SIDE, "resample": 0}, "makes no square images"),
        ("MobileViTImageProcessor", {}, "gives blue before red"),
    ],
)  # fmt: skip
def test_a_processor_that_cannot_be_repeated_is_one_line(kind: str, settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        clip.check_processor(preprocessing(getattr(transformers, kind)(**settings)))
    assert "\n" not in str(error.value)


def test_a_processor_that_does_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = transformers.SiglipImageProcessorPil(size=SIDE)
    original = type(processor).__call__

    def mirrored(self: object, images: list[Image.Image], **options: str) -> object:
        output = original(self, images, **options)
        output["pixel_values"] = output["pixel_values"].flip(-1)
        return output

    monkeypatch.setattr(type(processor), "__call__", mirrored)
    with pytest.raises(UserError, match="does more than resize, crop and normalise"):
        clip.check_processor(preprocessing(processor))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": {"shortest_edge": 16}, "do_center_crop": False}, "crops nothing, so images would have different shapes"),
        ({"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}, "images of 24 x 24 pixels, which the model"),
    ],
    ids=["no crop", "another size"],
)  # fmt: skip
def test_clip_finetune_refuses_it_before_the_run(
    settings: dict, words: str, tiny_clip_folder: Path, clip_here, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_clip_folder, folder)
    (folder / "processor_config.json").unlink(missing_ok=True)
    transformers.CLIPImageProcessorPil(**settings).save_pretrained(folder)
    with pytest.raises(UserError, match=words) as error:
        clip_here("--model_name", str(folder))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_naflex_is_one_line() -> None:
    with pytest.raises(UserError, match=r"Siglip2ImageProcessor.*NaFlex"):
        clip.check_processor(preprocessing(transformers.Siglip2ImageProcessor()))
    with pytest.raises(UserError, match="makes no square images by resizing"):
        resizing_of(transformers.Siglip2ImageProcessor())
