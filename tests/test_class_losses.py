"""Losses of classification, and what is trained when: the right effect of each, on made numbers and small runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import TEXT, kill_and_resume, launch, results, weights
from safetensors.torch import load_file

from accelerando.base.errors import UserError
from accelerando.train.class_losses import class_losses, disagreement, inverse_frequency, log_frequency, twice


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 1, 2, 3, 0, 0, 2])


def test_focal_loss_is_the_paper_s(logits) -> None:
    right = logits.softmax(-1)[torch.arange(7), LABELS]
    found = class_losses(logits, LABELS, focal_gamma=2.0)
    assert torch.allclose(found, -((1 - right) ** 2) * right.log(), atol=1e-6)
    assert torch.equal(
        class_losses(logits, LABELS), torch.nn.functional.cross_entropy(logits, LABELS, reduction="none")
    )


def test_class_weights_give_each_class_the_same_sum() -> None:
    counts = torch.tensor([60, 30, 9, 1])
    weight = inverse_frequency(counts)
    assert torch.allclose(counts * weight, torch.full((4,), 25.0))
    assert torch.isfinite(inverse_frequency(torch.tensor([5, 0]))).all()


def test_logit_adjustment_makes_the_balanced_answer_the_best_one() -> None:
    """With two classes 9 to 1 whose inputs look alike, the plain logits end even: neither class is preferred."""
    counts, bias = torch.tensor([90, 10]), torch.zeros(2, requires_grad=True)
    labels = torch.tensor([0] * 90 + [1] * 10)
    for prior, expected in ((None, 0.9), (log_frequency(counts), 0.5)):
        bias = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.SGD([bias], lr=1.0)
        for _ in range(300):
            optimizer.zero_grad()
            class_losses(bias.expand(100, 2), labels, prior=prior).mean().backward()
            optimizer.step()
        assert float(bias.detach().softmax(0)[0]) == pytest.approx(expected, abs=1e-3)


def test_disagreement_is_the_mean_of_both_divergences(logits) -> None:
    other = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    one, two = logits.log_softmax(-1), other.log_softmax(-1)
    kl = torch.nn.functional.kl_div
    both = (kl(one, two, reduction="none", log_target=True) + kl(two, one, reduction="none", log_target=True)).sum(-1)
    assert torch.allclose(disagreement(torch.cat((logits, other))), both / 2, atol=1e-6)
    assert torch.equal(disagreement(twice({"logits": logits})["logits"]), torch.zeros(7))


def test_r_drop_without_dropout_is_plain_training(train_here) -> None:
    """Two equal passes: the same losses and, up to rounding, the same weights; with dropout it makes them agree."""
    still = ("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0", "--max_steps", "4")
    runs = [train_here(*still, *flags, name=name) for name, flags in (("plain", ()), ("twice", ("--r_drop", "3")))]
    one, two = (load_file(run / "last" / "model.safetensors") for run in runs)
    assert all(torch.allclose(tensor, two[name], atol=1e-5) for name, tensor in one.items())


def test_balanced_rows_draw_every_class_equally_often() -> None:
    """And rows of similar length still follow each other."""
    from accelerando.train.batches import Rows

    rng = np.random.default_rng(0)
    classes, lengths = rng.choice(3, 600, p=[0.8, 0.15, 0.05]), rng.integers(3, 100, 600)
    rows = Rows(range(600), lengths, classes)
    order = rows.epoch_order(0, 0)
    assert np.bincount(classes[order % 600]).tolist() == [200, 200, 200]
    assert len(np.unique(order)) == 600  # a repeated row counts as another draw
    spread = np.mean([np.ptp(lengths[order[start : start + 32] % 600]) for start in range(0, 576, 32)])
    shuffled = Rows(range(600), None, classes).epoch_order(0, 0)
    assert spread < 0.3 * np.mean([np.ptp(lengths[shuffled[start : start + 32] % 600]) for start in range(0, 576, 32)])


def test_layers_are_unfrozen_from_the_head_on(train_here, tiny_bert: Path) -> None:
    """Epoch 1 trains the head, epoch 2 the pooler too, epoch 3 the last block; the embeddings stay as they were."""
    source = load_file(tiny_bert / "model.safetensors")
    run = train_here("--strategy", "gradual", "--epochs", "3")
    saved = load_file(run / "last" / "model.safetensors")
    bare = {name.removeprefix("bert."): tensor for name, tensor in saved.items()}
    changed = {name for name, tensor in source.items() if not torch.equal(bare[name.removeprefix("bert.")], tensor)}
    found = {re.sub(r"^(bert\.)?(encoder\.layer\.\d|pooler|embeddings).*", r"\2", name) for name in changed}
    assert found <= {"pooler", "encoder.layer.1"} and "encoder.layer.1" in found
    lines = re.findall(r"Strategy gradual, the last (\d) of (\d) layers", (run / "logs" / "train.log").read_text())
    assert [int(count) for count, _ in lines] == [1, 2, 3]


def test_layer_decay_slows_lower_layers(train_here, tiny_bert: Path) -> None:
    """After one step of Adam every weight has moved by about its learning rate: half as far in each layer below."""
    run = train_here(
        "--layer_decay", "0.5", "--max_steps", "1", "--lr", "1e-3", "--weight_decay", "0", "--grad_clip", "None"
    )
    saved = load_file(run / "last" / "model.safetensors")
    source = {f"bert.{name.removeprefix('bert.')}": tensor
              for name, tensor in load_file(tiny_bert / "model.safetensors").items()}  # fmt: skip

    def moved(part: str) -> float:
        name = f"bert.encoder.layer.{part}.intermediate.dense.weight"
        return float((saved[name] - source[name]).abs().median())

    assert moved("0") / moved("1") == pytest.approx(0.5, rel=0.02)


def test_the_last_layers_begin_anew(train_here, tiny_bert: Path) -> None:
    source = {f"bert.{name.removeprefix('bert.')}": tensor
              for name, tensor in load_file(tiny_bert / "model.safetensors").items()}  # fmt: skip
    run = train_here("--reinit_layers", "2", "--max_steps", "1", "--lr", "0", "--weight_decay", "0")
    saved = load_file(run / "last" / "model.safetensors")
    changed = {name.partition(".dense")[0] for name in source if not torch.equal(saved[name], source[name])}
    assert any("encoder.layer.1" in name for name in changed)
    assert not any("layer.0" in name or "embeddings" in name for name in changed)
    with pytest.raises(UserError, match="--reinit_layers 9: the model has 4 layers below its head"):
        train_here("--reinit_layers", "9", name="many")


@pytest.mark.parametrize(
    "variant", [("--lora_dora",), ("--lora_rank_stabilised",), ("--lora_dora", "--lora_rank_stabilised")]
)
def test_adapters_of_all_linear_layers_are_merged(variant, train_here, tiny_bert: Path) -> None:
    """Each linear layer of the body has an adapter, and the merged model answers as the adapted one."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    flags = ("--strategy", "lora", "--lora_r", "4", "--lora_targets", "all-linear", "--lr", "0.02", "--max_steps", "6")
    run = train_here(*flags, *variant)
    files = load_file(run / "best" / "adapter" / "adapter_model.safetensors")
    assert sum("lora_A" in name for name in files) == 2 * 6 + 1  # six in each block, and the pooler
    assert ("magnitude" in "".join(files)) == ("--lora_dora" in variant)
    config = json.loads((run / "best" / "adapter" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == ("--lora_dora" in variant, "--lora_rank_stabilised" in variant)
    tokens = AutoTokenizer.from_pretrained(run / "best")(["goal match", "a b c"], padding=True, return_tensors="pt")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    adapted = PeftModel.from_pretrained(base, run / "best" / "adapter").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(run / "best").eval()
    with torch.no_grad():
        expected = adapted(**tokens).logits
        assert torch.allclose(merged(**tokens).logits, expected, atol=1e-4)
        plain = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3).eval()
        plain.classifier.load_state_dict(merged.classifier.state_dict())
        assert not torch.allclose(plain(**tokens).logits, expected, atol=1e-2)


@pytest.mark.launch
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_killed_and_resumed_with_all_of_it(processes: int, text_args, tmp_path: Path) -> None:
    """Gradual unfreezing, layer-wise rates, R-Drop, balanced classes: the same bytes as undisturbed."""
    args = [*text_args, "--strategy", "gradual", "--layer_decay", "0.8", "--r_drop", "1", "--balanced", "--epochs", "3",
            "--focal_gamma", "1", "--class_weights", "--batch_size", "16", "--save_every", "3", "--run_name", "run"]  # fmt: skip
    whole = tmp_path / "whole"
    whole.mkdir()
    launch(TEXT, *args, cwd=whole, processes=processes)
    run = kill_and_resume(tmp_path, TEXT, args, processes, 2, seed=processes)
    assert weights(run / "last") == weights(whole / "runs" / "run" / "last")
    assert results(run)["test"] == results(whole / "runs" / "run")["test"]


def test_mistakes_are_one_line(train_here) -> None:
    with pytest.raises(UserError, match="--layer_decay: --strategy lora trains no layers as a whole"):
        train_here("--strategy", "lora", "--layer_decay", "0.5")
    with pytest.raises(UserError, match="--r_drop -1"):
        train_here("--r_drop", "-1")


def test_images_are_trained_with_adapters_too(image_here, tiny_vit: Path) -> None:
    """Nothing but the adapters' layers and the head has changed in the merged model; it goes on from a checkpoint."""
    from transformers import AutoModelForImageClassification

    flags = ("--model_name", tiny_vit, "--strategy", "lora", "--lora_r", "2", "--lr", "0.02", "--save_every", "2")
    run = image_here(*flags, "--max_steps", "4")
    source = load_file(tiny_vit / "model.safetensors")
    saved = AutoModelForImageClassification.from_pretrained(run / "best").state_dict()
    changed = {name for name, tensor in source.items() if name in saved and not torch.equal(saved[name], tensor)}
    assert changed and all(re.search(r"\.(query|value|q_proj|v_proj)\.weight|^classifier\.", name) for name in changed)
    kept = weights(run / "last")
    image_here(*flags, "--max_steps", "4", "--resume", run / "checkpoints" / "step_000002")
    assert weights(run / "last") == kept
    with pytest.raises(UserError, match="name them with --lora_targets"):
        image_here("--strategy", "lora", name="resnet")
    net = image_here("--strategy", "lora", "--lora_targets", "convolution", "--max_steps", "2", name="resnet")
    assert AutoModelForImageClassification.from_pretrained(net / "best").config.num_labels == 3
