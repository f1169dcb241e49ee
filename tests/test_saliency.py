"""Heat maps lie where a net looks, of whatever family it is, and leave it as it was; the report shows them."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from accelerando.report.saliency import SIDE, add_images, heat_maps, overlay


class Net(nn.Module):
    """A net of layers with the interface of the script's models."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layers(pixel_values))


class Order(nn.Module):
    """Another order of the dimensions."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.permute(self.order)


def quarters(heat: np.ndarray) -> np.ndarray:
    """The share of the heat in each quarter of a picture, [B, 4]: top left, top right, bottom left, bottom right."""
    half = heat.shape[-1] // 2
    tops, bottoms = heat[:, :half], heat[:, half:]
    parts = [part for rows in (tops, bottoms) for part in (rows[..., :half], rows[..., half:])]
    return np.stack([part.sum((1, 2)) for part in parts], 1) / heat.sum((1, 2))[:, None]


def state_of(model: nn.Module) -> list:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    hooks = [(len(module._forward_hooks), len(module._backward_hooks)) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    values = [(name, value.detach().clone(), value.requires_grad, value.grad) for name, value in tensors.items()]
    return [values, hooks, modes]


def assert_same(before: list, after: list) -> None:
    assert before[1:] == after[1:]
    for old, new in zip(before[0], after[0], strict=True):
        assert torch.equal(old[1], new[1]) and old[2] == new[2] and new[3] is None, old[0]


def vision_net(architecture: str, classes: int = 3) -> nn.Module:
    from accelerando.models.vision import VisionNet, VisionNetConfig

    torch.manual_seed(0)
    return VisionNet(VisionNetConfig(architecture=architecture, num_labels=classes))


def vit(layers: int = 2) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64, image_size=32,
        patch_size=4, num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    return ViTForImageClassification(config)


# -------------------------------------------------------------------------------------------------- any architecture


@pytest.mark.parametrize(
    ("architecture", "size", "grid"),
    [("resnet18", 64, 2), ("mobilenet_v3_small", 64, 2), ("convnext_tiny", 64, 2), ("swin_t", 64, 2),
     ("vit_b_16", 224, 14), ("densenet121", 64, 2), ("efficientnet_b0", 64, 2), ("alexnet", 64, 3)],
)  # fmt: skip
def test_every_family_has_a_map_and_stays_as_it_was(architecture: str, size: int, grid: int) -> None:
    model = vision_net(architecture, 2)
    for number, (module, parameter) in enumerate(zip(model.modules(), model.parameters(), strict=False)):
        module.training, parameter.requires_grad = number % 3 > 0, number % 2 > 0  # a mixture
    before = state_of(model)
    heat = heat_maps(model, torch.randn(1, 3, size, size).repeat(2, 1, 1, 1), [0, 1])
    assert heat.shape == (2, grid, grid) and heat.dtype == np.float32
    assert heat.min() >= 0 and set(heat.max((1, 2)).tolist()) <= {0, 1}
    assert (heat.max(0) > 0).all(), "what speaks against one class speaks for another"
    assert_same(before, state_of(model))


def test_models_of_transformers_have_maps(tiny_vit: Path, tiny_resnet: Path) -> None:
    from transformers import AutoModelForImageClassification

    pixels = torch.randn(2, 3, 32, 32)
    for folder in (tiny_vit, tiny_resnet):
        model = AutoModelForImageClassification.from_pretrained(folder)
        assert heat_maps(model, pixels, [1, 2]).shape == (2, 4, 4), folder


def test_a_map_is_of_its_picture_and_its_class_alone() -> None:
    pixels = torch.randn(3, 3, 32, 32)
    for model in (vision_net("resnet18"), vit()):
        heat = heat_maps(model, pixels, [0, 1, 2])
        for number in range(3):
            alone = heat_maps(model, pixels[number : number + 1], [number])
            assert np.allclose(alone[0], heat[number], atol=1e-4)
        assert not np.allclose(heat, heat_maps(model, pixels, [1, 2, 0]), atol=0.01)


def test_a_net_without_positions_has_none() -> None:
    assert (
        heat_maps(Net(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(2, 3, 8, 8), [0, 1])
        is None
    )


def test_of_a_resnet_it_is_the_grad_cam_of_the_paper() -> None:
    model, pixels = vision_net("resnet18").eval(), torch.randn(2, 3, 96, 96)
    found = {}
    model.net.layer4.register_forward_hook(lambda module, inputs, output: found.setdefault("map", output))
    logits = model(pixel_values=pixels).logits
    score = logits[0, 2] - logits[0].mean() + logits[1, 0] - logits[1].mean()
    slope = torch.autograd.grad(score, found["map"])[0]
    heat = (slope.mean((2, 3), keepdim=True) * found["map"]).sum(1).clamp(min=0).detach().numpy()
    expected = heat / heat.max((1, 2), keepdims=True)
    assert expected.shape == (2, 3, 3) and expected.std() > 0.1
    assert np.allclose(heat_maps(model, pixels, [2, 0]), expected, atol=1e-4)


def test_of_a_vit_it_is_the_rollout_of_its_attention() -> None:
    model, pixels = vit().eval(), torch.randn(2, 3, 32, 32)
    model.set_attn_implementation("eager")
    output = model(pixel_values=pixels, output_attentions=True)
    score = output.logits[0, 2] - output.logits[0].mean() + output.logits[1, 0] - output.logits[1].mean()
    slopes = torch.autograd.grad(score, output.attentions)
    relevance = torch.eye(65).repeat(2, 1, 1)
    for weights, slope in zip(output.attentions, slopes, strict=True):
        relevance = relevance + (weights * slope).clamp(min=0).mean(1) @ relevance
    heat = relevance[:, 0, 1:].detach().unflatten(1, (8, 8)).numpy()
    model.set_attn_implementation("sdpa")
    assert np.allclose(heat_maps(model, pixels, [2, 0]), heat / heat.max((1, 2), keepdims=True), atol=1e-4)


@pytest.mark.parametrize("mask", [None, "allowed", "added"])
def test_attention_that_is_kept_is_torchs_own(mask: str | None) -> None:
    from accelerando.report.saliency import _attention_kept

    fused, kept = functional.scaled_dot_product_attention, []
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    hidden = {None: None, "allowed": torch.rand(5, 5) > 0.3, "added": torch.randn(2, 1, 5, 5)}[mask]
    if mask == "allowed":
        hidden.fill_diagonal_(True)
    with _attention_kept(kept):
        ours = functional.scaled_dot_product_attention(query, key, value, hidden, scale=0.5)
    assert functional.scaled_dot_product_attention is fused
    assert torch.allclose(ours, fused(query, key, value, hidden, scale=0.5), atol=1e-5)
    assert [weights.shape for weights in kept] == [(2, 4, 5, 5)]


# ------------------------------------------------------------------------------------------------- where a net looks


def test_the_heat_of_a_trained_net_is_where_the_object_is() -> None:
    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pixels = 0.3 * torch.randn(count, 3, 32, 32)
        colours, places = torch.randint(3, (count,)), torch.randint(4, (count,))
        for number, (colour, place) in enumerate(zip(colours, places, strict=True)):
            top, left = 4 + 16 * (place // 2), 4 + 16 * (place % 2)
            pixels[number, colour, top : top + 8, left : left + 8] += 1.5
        return pixels, colours, places

    torch.manual_seed(0)
    model = Net(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        pixels, colours, _ = draw(32)
        functional.cross_entropy(model(pixels).logits, colours).backward()
        optimizer.step()
        optimizer.zero_grad()
    pixels, colours, places = draw(64)
    shares = quarters(heat_maps(model, pixels, colours.tolist()))
    assert shares[np.arange(64), places].mean() > 0.9 and shares[np.arange(64), places].min() > 0.7
    other = heat_maps(model, pixels, ((colours + 1) % 3).tolist())  # for a colour that is not there, it is elsewhere
    assert np.nanmean(quarters(other)[np.arange(64), places]) < 0.5


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_heat_of_a_net_that_reads_one_quarter_lies_there(channels_last: bool) -> None:
    """Class k counts the light in quarter k; pictures are alike everywhere, so that only the head's weights tell."""
    order = [Order(0, 2, 3, 1), nn.Identity(), Order(0, 3, 1, 2)] if channels_last else [nn.ReLU(inplace=True)]
    head = nn.Linear(8 * 8 * 8, 4)
    places = torch.arange(8)[:, None] // 4 * 2 + torch.arange(8) // 4
    with torch.no_grad():
        head.weight.copy_(torch.stack([(places == k).float().repeat(8, 1, 1).flatten() for k in range(4)]))
        model = Net(nn.Conv2d(3, 8, 4, 4), *order, nn.Flatten(), head)
        model.layers[0].weight.fill_(0.1)
    shares = quarters(heat_maps(model, torch.rand(4, 3, 32, 32) + 1, [0, 1, 2, 3]))
    assert np.diag(shares).min() > 0.99


@pytest.mark.parametrize("family", ["transformers", "torchvision"])
@pytest.mark.parametrize("quarter", [1, 2])
def test_the_heat_of_a_vit_that_attends_to_one_quarter_lies_there(family: str, quarter: int) -> None:
    """Two layers set by hand: the second's class token attends to the patches of one quarter, and takes their colour."""
    from torchvision.models import VisionTransformer

    width, grid = 32, 8
    places = (torch.arange(grid)[:, None] // 4 * 2 + torch.arange(grid) // 4).flatten()
    where = torch.zeros(1, 1 + grid**2, width)
    where[0, 0, 12] = 10
    where[0, torch.arange(1, 1 + grid**2), 8 + places] = 10
    patch, query, key, value = torch.zeros(width, 3, 4, 4), *torch.zeros(3, width, width)
    for colour in range(3):
        patch[colour, colour] = 1 / 16
        value[colour, colour] = 1
    query[0, 12], key[0, 8 + quarter] = 3, 3
    names: dict[str, torch.Tensor]
    if family == "torchvision":
        model = Net(VisionTransformer(32, 4, 2, 1, width, 64, num_classes=3))
        attention = "layers.0.encoder.layers.encoder_layer_1.self_attention."
        names = {
            "layers.0.conv_proj.weight": patch, "layers.0.encoder.pos_embedding": where,
            f"{attention}in_proj_weight": torch.cat([query, key, value]), f"{attention}out_proj.weight": torch.eye(width),
            "layers.0.heads.head.weight": torch.eye(3, width),
        }  # fmt: skip
    else:
        from transformers import ViTConfig, ViTForImageClassification

        model = ViTForImageClassification(ViTConfig(
            hidden_size=width, num_hidden_layers=2, num_attention_heads=1, intermediate_size=64, image_size=32,
            patch_size=4, num_labels=3,
        ))  # fmt: skip
        attention = "vit.layers.1.attention."
        names = {
            "vit.embeddings.patch_embeddings.projection.weight": patch, "vit.embeddings.position_embeddings": where,
            f"{attention}q_proj.weight": query, f"{attention}k_proj.weight": key, f"{attention}v_proj.weight": value,
            f"{attention}o_proj.weight": torch.eye(width), "classifier.weight": torch.eye(3, width),
        }  # fmt: skip
    norms = {
        name for module_name, module in model.named_modules() if isinstance(module, nn.LayerNorm)
        for name in (f"{module_name}.weight",)
    }  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(names.pop(name, torch.ones_like(parameter) if name in norms else torch.tensor(0.0)))
    assert not names, "these are named otherwise in this version"
    pixels = torch.zeros(2, 3, 32, 32)
    pixels[0, 0], pixels[1, 2] = 3, 3  # all red, all blue
    assert model.eval()(pixel_values=pixels).logits.argmax(1).tolist() == [0, 2]
    heat = heat_maps(model, pixels, [0, 2])
    assert heat.shape == (2, grid, grid) and quarters(heat)[:, quarter].min() > 0.9


# ----------------------------------------------------------------------------------------------- whatever surrounds it


def test_autocast_and_a_replaced_forward_change_nothing() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # of tests before this one
    model, pixels = vision_net("mobilenet_v3_small"), torch.randn(1, 3, 64, 64)
    plain = heat_maps(model, pixels, [1])
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(heat_maps(model, pixels, [1]), plain)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert "forward" in vars(prepared), "Accelerate no longer replaces it: this test has lost its point"
    assert np.array_equal(heat_maps(prepared, pixels, [1]), plain)
    assert np.array_equal(heat_maps(model.requires_grad_(False), pixels, [1]), plain), "with nothing to train"
    assert np.allclose(heat_maps(model.to(memory_format=torch.channels_last), pixels, [1]), plain, atol=1e-3)
    AcceleratorState._reset_state(True)


def test_hooks_of_opacus_are_left_alone() -> None:
    grad_sample = pytest.importorskip("opacus.grad_sample")
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    model, pixels = Net(*layers), torch.randn(2, 3, 32, 32)
    plain = heat_maps(model, pixels, [0, 1])
    grad_sample.GradSampleHooks(model, loss_reduction="sum")
    before = state_of(model)
    assert np.allclose(heat_maps(model, pixels, [0, 1]), plain, atol=1e-5)
    assert_same(before, state_of(model))
    assert all(getattr(parameter, "grad_sample", None) is None for parameter in model.parameters())
    functional.cross_entropy(model(pixels.requires_grad_()).logits, torch.tensor([0, 1])).backward()
    assert model.layers[0].weight.grad_sample.shape == (2, 8, 3, 4, 4), "the hooks work again"


# --------------------------------------------------------------------------------------------------------- pictures


def opened(file: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(file)) as image:
        assert image.format == "JPEG"
        return np.asarray(image.convert("RGB")).astype(float)


def test_overlay_is_hot_where_the_heat_is_and_keeps_the_picture() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::16] = stripes[:, 1::16] = 255
    heat = np.zeros((4, 4), np.float32)
    heat[:2, 2:] = 1
    image = opened(overlay(stripes, heat))
    assert image.shape == (SIDE, SIDE, 3)
    dark = slice(30, 40)  # between the stripes
    red = image[..., 0]
    assert red[20:60, 126:138].mean() > red[140:180, 30:42].mean() + 100, "the hot quarter is light, the rest dark"
    cold = red[140:180]
    assert cold[:, :6].mean() > cold[:, dark].mean() + 60, "the stripes are still seen"


def set_of(folder: Path, count: int = 10) -> tuple[object, dict, list[dict]]:
    """Pictures of several formats and shapes, their score, and all of them as mistakes."""
    import pyarrow as pa
    from PIL import Image

    from accelerando.data.folders import ImageFiles
    from accelerando.data.images import EvaluationImages

    rng = np.random.default_rng(0)
    formats = {"a.jpg": "RGB", "b.png": "RGBA", "c.png": "P", "d.webp": "RGB", "e.tif": "L", "f.bmp": "RGB"}
    names = []
    for number in range(count):
        name, mode = list(formats.items())[number % len(formats)]
        height, width = rng.integers(40, 400, 2)
        noise = Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).convert("RGB").convert(mode)
        names.append(f"{number}{name}")
        noise.save(folder / names[-1])
    images = EvaluationImages(ImageFiles(folder, pa.array(names), np.zeros(count, np.int64)), 32)
    score = {"row": np.arange(count)[::-1], "logits": rng.normal(size=(count, 3))}  # row n of the score: picture 9 - n
    mistakes = [{"row": row, "true": "a", "predicted": "b", "confidence": 0.9} for row in range(count)]
    return images, score, mistakes


def test_mistakes_get_their_pictures_and_the_first_their_heat(tmp_path: Path) -> None:
    images, score, mistakes = set_of(tmp_path)
    torch.manual_seed(0)
    model = vit()
    half = (0.5,) * 3
    add_images(mistakes, score, images, model, half, half, looked_at=6)
    assert ["heat" in mistake for mistake in mistakes] == [True] * 6 + [False] * 4
    for mistake in mistakes:
        assert max(opened(mistake["image"]).shape[:2]) <= SIDE and len(mistake["image"]) < 40_000
    # The fifth mistake is of the sixth picture, and of the class that its own logits name.
    pixels = images[5]["pixel_values"]
    heat = heat_maps(model, (pixels[None].float() / 255 - 0.5) / 0.5, [int(score["logits"][4].argmax())])
    assert np.abs(opened(overlay(pixels.permute(1, 2, 0).numpy(), heat[0])) - opened(mistakes[4]["heat"])).mean() < 1


def test_mistakes_without_a_model_or_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, score, mistakes = set_of(tmp_path)
    (tmp_path / images.files.names[9].as_py()).unlink()
    add_images(mistakes, score, images, None, (0.5,) * 3, (0.5,) * 3)
    assert ["image" in mistake for mistake in mistakes] == [False] + [True] * 9
    assert not any("heat" in mistake for mistake in mistakes)

    def fail(values: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    model = Net(nn.Conv2d(3, 3, 4, 4), nn.Flatten(), nn.Linear(192, 3))
    model.layers[1].register_forward_pre_hook(lambda module, inputs: fail(*inputs))
    add_images(mistakes, score, images, model, (0.5,) * 3, (0.5,) * 3)
    assert not any("heat" in mistake for mistake in mistakes)
    assert [record.getMessage() for record in caplog.records] == [
        "No heat maps in the report: CUDA out of memory. Tried to allocate 2.00 GiB"
    ]


def test_the_script_shows_them(image_here) -> None:
    page = (image_here("--max_steps", "2") / "report.html").read_text(encoding="utf-8")
    cards = re.findall(r"<li.*?</li>", page)
    assert len(cards) > 8 and [card.startswith('<li class="pair">') for card in cards] == [True] * 8 + [False] * (
        len(cards) - 8
    )
    for card in cards:
        files = [base64.b64decode(file) for file in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', card)]
        assert [opened(file).std() > 5 for file in files] == [True] * (2 if "pair" in card else 1)
