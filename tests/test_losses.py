"""Invariant 5: one contrastive batch, however it is cut up, has one loss and one gradient."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_gradients import BATCH, embed, make_pairs, tiny_clip
from harness import ROOT, launch
from safetensors.torch import load_file

from accelerando.data.order import deal
from accelerando.train.losses import Pairs, backward_contrastive, clamp_logit_scale, contrastive_loss

WORKER = ROOT / "tests" / "clip_gradients.py"


@pytest.fixture
def accelerator(monkeypatch):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()
    return Accelerator()


def random_pairs(count: int, seed: int = 0, width: int = 32) -> Pairs:
    """Pictures and captions that match, less a little noise."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    image, text = (torch.nn.functional.normalize(t, dim=1) for t in (draws[0], draws[0] + 0.2 * draws[1]))
    return Pairs(image, text, torch.arange(count), torch.arange(count), torch.ones(count, dtype=torch.float64))


def direct(scenario: str, loss: str) -> dict[str, torch.Tensor]:
    """Loss and gradients of the whole batch in one graph, written as the papers have them."""
    model, batch = tiny_clip(torch.float64, scenario), make_pairs(torch.float64)
    output = model(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"])
    kept = batch["weight"] > 0
    logits = output["scale"] * output["image"][kept] @ output["text"][kept].T
    same = batch["text_id"][kept][:, None] == batch["text_id"][kept]
    same = (same | (batch["image_id"][kept][:, None] == batch["image_id"][kept])) & ~torch.eye(len(same), dtype=bool)
    count = len(logits)
    if loss == "clip":
        masked = logits.masked_fill(same, -math.inf)
        value = sum(torch.nn.functional.cross_entropy(m, torch.arange(count)) for m in (masked, masked.T)) / 2
    else:
        signs = 2 * torch.eye(count, dtype=torch.float64) - 1
        terms = torch.nn.functional.logsigmoid(signs * (logits + output["bias"])).masked_fill(same, 0)
        value = -terms.sum() / count
    value.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": value.detach(), **named}


def assert_equal(found: dict, expected: dict, relative: float) -> None:
    assert found.keys() == expected.keys()
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=relative)
    # A bias of the keys has no influence: its gradient is what rounding leaves, so small ones are held to the largest.
    floor = 0.05 * max(float(gradient.abs().max()) for name, gradient in expected.items() if name != "loss")
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        assert largest > 1e-6 or "k_proj.bias" in name, name
        difference = float((found[name].double() - gradient).abs().max())
        assert difference <= relative * max(largest, floor), (name, difference, largest)


CUTS = {
    "whole": (64, 1, False, "float64", 1e-9),
    "micro8": (8, 1, False, "float64", 1e-9),
    "ddp8": (8, 2, False, "float64", 1e-9),
    "fsdp8": (8, 2, True, "float32", 1e-5),
    "ragged11": (11, 1, False, "float64", 1e-9),
    "ddp32": (32, 2, False, "float64", 1e-9),
}
CASES = [("full", "clip", cut) for cut in CUTS] + [
    (scenario, loss, cut) for scenario, loss in (("lora", "clip"), ("siglip", "siglip")) for cut in list(CUTS)[1:4]
]


@pytest.mark.launch
@pytest.mark.parametrize(("scenario", "loss", "cut"), CASES)
def test_loss_and_gradients_of_a_batch_of_64(scenario: str, loss: str, cut: str, tmp_path: Path) -> None:
    micro, processes, fsdp, dtype, relative = CUTS[cut]
    out = tmp_path / "gradients.safetensors"
    launch(WORKER, str(out), str(micro), dtype, loss, scenario, cwd=tmp_path, processes=processes, fsdp=fsdp)
    found = load_file(out)
    assert "logit_scale" in " ".join(found)
    assert_equal(found, direct(scenario, loss), relative)


def test_with_dropout_the_masks_of_the_first_pass_are_replayed(accelerator) -> None:
    def micro_batches():
        share = deal(np.arange(BATCH), 11, 1, 0)
        batch = make_pairs(torch.float64)
        return [{name: tensor[rows] for name, tensor in batch.items()} for rows in share.micro_batches]

    model = tiny_clip(torch.float64, "lora", dropout=0.3).train()
    torch.manual_seed(7)
    value = backward_contrastive(accelerator, model, micro_batches(), embed)
    after = torch.rand(3)
    found = {"loss": value} | {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    model.zero_grad()
    torch.manual_seed(7)
    parts = [embed(model, batch)[0] for batch in micro_batches()]  # all in one graph
    assert torch.equal(torch.rand(3), after)  # training goes on as if there had been one pass
    whole = Pairs(*(torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])))
    scale = embed(model, micro_batches()[0])[1]
    value = contrastive_loss(whole, whole, 0, scale) / whole.weight.sum()
    value.backward()
    expected = {"loss": value.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_equal(found, expected, 1e-9)

    torch.manual_seed(8)
    other = backward_contrastive(accelerator, model, micro_batches(), embed)
    assert abs(float(other) - value.item()) > 1e-6  # dropout was on at all


def test_accumulated_micro_batches_would_be_another_loss(accelerator) -> None:
    """What the old way computes: 7 negatives instead of 63."""
    batch = make_pairs(torch.float64)
    model = tiny_clip(torch.float64, "full")
    parts = [{name: tensor[start : start + 8] for name, tensor in batch.items()} for start in range(0, BATCH, 8)]
    true = float(backward_contrastive(accelerator, model, parts, embed))
    old = np.mean([float(backward_contrastive(accelerator, model, [part], embed)) for part in parts])
    assert true > old + 1


def test_unreadable_pairs_and_fillers_have_no_influence() -> None:
    pairs = random_pairs(10)
    scale = torch.tensor(20.0, dtype=torch.float64)
    fewer = Pairs(*(tensor[:7] for tensor in vars(pairs).values()))
    pairs.weight[7:] = 0
    whole = contrastive_loss(pairs, pairs, 0, scale)
    assert float(whole) == pytest.approx(float(contrastive_loss(fewer, fewer, 0, scale)), rel=1e-12)
    pairs.image[8] = 100  # nor whatever stands there
    assert float(contrastive_loss(pairs, pairs, 0, scale)) == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("same", ["text_ids", "image_ids"])
def test_duplicates_are_no_negatives_unless_asked(loss: str, same: str) -> None:
    scale, bias = torch.tensor(20.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    pairs = random_pairs(6)
    pairs.text[4], pairs.image[4] = pairs.text[1], pairs.image[1]
    vars(pairs)[same][4] = vars(pairs)[same][1]
    values = [float(contrastive_loss(pairs, pairs, 0, scale, bias, loss, on)) for on in (True, False)]
    assert values[1] > values[0] + 0.5
    if loss == "clip":
        assert values[1] - values[0] == pytest.approx(2 * math.log(2), abs=0.2)  # each of the two had an equal rival


def test_rows_in_pieces_add_up(monkeypatch, accelerator) -> None:
    import accelerando.train.losses

    values = []
    for chunk in (1024, 7):
        monkeypatch.setattr(accelerando.train.losses, "CHUNK", chunk)
        batch = [make_pairs(torch.float64)]
        values.append(float(backward_contrastive(accelerator, tiny_clip(torch.float64, "full"), batch, embed)))
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_the_temperature_stays_below_a_hundred() -> None:
    scale = torch.nn.Parameter(torch.tensor([9.0]))
    clamp_logit_scale(scale)
    assert scale.exp().item() == pytest.approx(100, rel=1e-6)
    scale = torch.nn.Parameter(torch.tensor([2.0]))
    clamp_logit_scale(scale)
    assert float(scale) == 2.0
