"""A net's layers by depth: rates that fall towards the input, and layers that are trained one after another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import IMAGE, launch, weights
from safetensors.torch import load_file

from accelerando.models.vision import VisionNet, VisionNetConfig
from accelerando.train.layerwise import layers_of, train_from, train_mode
from accelerando.train.optim import make_optimizer, make_scheduler, parameter_groups


def net(architecture: str) -> VisionNet:
    with torch.device("meta"):
        model = VisionNet(VisionNetConfig(architecture=architecture, num_labels=3))
    return model


@pytest.mark.parametrize(
    ("architecture", "count", "first", "last"),
    [
        ("resnet18", 10, "net.conv1.weight", "net.layer4.1.bn2.bias"),
        ("efficientnet_b0", 19, "net.features.0.0.weight", "net.features.8.1.bias"),
        ("convnext_tiny", 23, "net.features.0.0.weight", "net.classifier.0.bias"),
        ("swin_t", 17, "net.features.0.0.weight", "net.norm.bias"),
        ("vit_b_16", 14, "net.class_token", "net.encoder.ln.bias"),
        ("densenet121", 9, "net.features.conv0.weight", "net.features.norm5.bias"),
        ("vgg11", 11, "net.features.0.weight", "net.classifier.3.bias"),
    ],
)
def test_layers_go_from_the_input_to_the_head(architecture: str, count: int, first: str, last: str) -> None:
    model = net(architecture)
    layers = layers_of(model, tuple(f"{name}." for name in model.head_names()))
    assert len(layers) == count
    assert layers[0][0] == first
    assert layers[-2][-1] == last
    assert set(layers[-1]) == {f"{head}.{part}" for head in model.head_names() for part in ("weight", "bias")}
    names = [name for layer in layers for name in layer]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_layers_of_models_of_transformers() -> None:
    from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=32)
    layers = layers_of(ViTForImageClassification(config), ("classifier.",))
    assert [len(layer) for layer in layers] == [4, 16, 16, 18, 2]  # the last norm belongs to the last block
    assert "vit.embeddings.cls_token" in layers[0]
    model = ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))
    assert len(layers_of(model, ("classifier.",))) == 4


def test_rates_fall_by_the_factor_from_layer_to_layer() -> None:
    model = VisionNet(VisionNetConfig(architecture="resnet18", num_labels=3))
    layers = layers_of(model, ("net.fc.",))
    groups = parameter_groups(model, 0.1, 0.05, layers, 0.5)
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(rate) == len(list(model.parameters()))
    for distance, names in enumerate(reversed(layers)):
        for name in names:
            parameter = model.get_parameter(name)
            assert rate[id(parameter)] == pytest.approx(0.1 * 0.5**distance)
            assert decay[id(parameter)] == (0.05 if parameter.ndim > 1 else 0)
    optimizer = make_optimizer(model, "sgd", 0.1, 0.05, layers=layers, layer_decay=0.5)
    assert optimizer.param_groups[0]["lr"] == 0.1  # what the log shows is the head's
    schedule = make_scheduler(optimizer, "step", 20, warmup=2, factor=0.1, step_size=5)
    seen = []
    for _ in range(12):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    expected = [0, 0.5, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]
    assert [row[0] for row in seen] == pytest.approx([0.1 * factor for factor in expected])
    assert [row[-1] / row[0] for row in seen[1:]] == pytest.approx([0.5**9] * 11)


def test_frozen_batch_norms_keep_their_statistics() -> None:
    model = VisionNet(VisionNetConfig(architecture="resnet18", num_labels=3))
    train_from(model, layers_of(model, ("net.fc.",)), 2)
    train_mode(model)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.randn(4, 3, 32, 32))
    moved = {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("net.layer4.1.") for name in moved)
    train_from(model, layers_of(model, ("net.fc.",)), 99)
    train_mode(model)
    assert all(module.training for module in model.modules())
    train_mode(model, keep_statistics=True)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_gradual_unfreezing_begins_as_the_head_alone(image_here, tiny_vit: Path) -> None:
    flags = ("--model_name", str(tiny_vit), "--scheduler", "constant")
    head = image_here(*flags, "--strategy", "head", "--epochs", "1", name="head")
    first = image_here(*flags, "--strategy", "gradual", "--epochs", "1", name="first")
    assert weights(first / "last") == weights(head / "last")
    second = image_here(*flags, "--strategy", "gradual", "--epochs", "2", name="second")
    old, new = (load_file(run / "last" / "model.safetensors") for run in (first, second))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    top = {name for name in old if name.startswith(("classifier", "vit.layernorm")) or ".1." in name}
    assert moved <= top
    assert len(moved) > 10
    slower = image_here(*flags, "--strategy", "gradual", "--unfreeze_every", "2", "--epochs", "2", name="slower")
    kept = load_file(slower / "last" / "model.safetensors")
    assert {name for name in old if not torch.equal(old[name], kept[name])} == {"classifier.weight", "classifier.bias"}
    assert "Strategy gradual, the last 2 of 4 layers" in (second / "logs" / "train.log").read_text()


def test_a_gradual_run_goes_on_at_the_end_of_an_epoch(image_here, tiny_vit: Path) -> None:
    """The layer that comes next has no optimizer state in the checkpoint."""
    flags = ("--model_name", str(tiny_vit), "--scheduler", "constant", "--strategy", "gradual")
    whole = image_here(*flags, "--epochs", "3", name="whole")
    for epochs in "123":
        parts = image_here(*flags, "--epochs", epochs, "--resume", name="parts")
    assert weights(parts / "last") == weights(whole / "last")


@pytest.mark.launch
def test_gradual_unfreezing_under_fsdp(image_here, image_args, tiny_vit: Path, tmp_path: Path) -> None:
    flags = ("--model_name", str(tiny_vit), "--strategy", "gradual", "--layer_decay", "0.7", "--epochs", "3")
    one = load_file(image_here(*flags, "--batch_size", "16") / "last" / "model.safetensors")
    launch(IMAGE, *image_args, *flags, "--batch_size", "8", "--run_name", "two", cwd=tmp_path, processes=2, fsdp=True)
    two = load_file(tmp_path / "runs" / "two" / "last" / "model.safetensors")
    before = load_file(tiny_vit / "model.safetensors")
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, atol=1e-3), name
        if name.startswith("vit.embeddings"):  # not reached in three epochs
            assert torch.equal(two[name], before[name])
