"""LoRA on each kind of layer: merged as PEFT merges it, checked at each save; both towers of a dual encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_model_folders import decoder
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    VisionTextDualEncoderModel,
)

from accelerando.base.errors import UserError
from accelerando.models.clip import pair_logits
from accelerando.train import lora
from accelerando.train.lora import attach_lora

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder("gpt2", tmp_path_factory.mktemp("gpt2"), pad=True)


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        ("tiny_gpt2", ()),  # c_attn, a Conv1D
        ("tiny_gpt2", ("c_proj",)),  # square in the attention
        ("tiny_gpt2", ("wte", "c_fc")),
        ("tiny_bert", ("word_embeddings", "query")),
    ],
)
def test_merged_text_models_answer_as_their_adapters(model, targets, request, train_here) -> None:
    folder = request.getfixturevalue(model)
    flags = ("--strategy", "lora", "--lora_alpha", "64", *(["--lora_targets", *targets] if targets else []))
    run = train_here("--model_name", folder, *flags, "--lr", "0.03", "--max_steps", "2", name="lora")
    merged = AutoModelForSequenceClassification.from_pretrained(run / "best").eval()
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = PeftModel.from_pretrained(base, run / "best" / "adapter").eval()
    tokens = torch.tensor([[2, 7, 9, 8, 3], [2, 11, 8, 9, 3]])
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, adapted(tokens).logits, atol=1e-4)
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, start[name])}
    expected = targets or ("c_attn",)
    assert all(any(f".{target}." in name for name in changed) for target in expected)
    assert all(any(f".{part}." in f".{name}" for part in (*expected, "classifier", "score")) for name in changed)


def test_a_convolution_is_merged_too(clip_here, tiny_clip_folder: Path) -> None:
    flags = ("--lora_targets", "patch_embedding", "v_proj", "--lr", "0.03", "--lora_alpha", "64", "--max_steps", "2")
    run = clip_here(*flags, name="conv")
    merged, base = (AutoModel.from_pretrained(folder).eval() for folder in (run / "best", tiny_clip_folder))
    before = base.vision_model.embeddings.patch_embedding.weight.clone()
    assert not torch.equal(merged.vision_model.embeddings.patch_embedding.weight, before)
    adapted = PeftModel.from_pretrained(base, run / "best" / "adapter").eval()
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "input_ids": torch.tensor([[2, 7, 9, 3], [2, 11, 8, 3]])}
    with torch.no_grad():
        expected = pair_logits(adapted.get_base_model(), inputs)
        assert torch.allclose(pair_logits(merged, inputs), expected, atol=1e-4)


@pytest.mark.parametrize("task", ["text", "clip"])
def test_a_merge_that_differs_is_an_error_and_saves_nothing(task: str, request, monkeypatch, tmp_path) -> None:
    whole = lora.merged_state_dict
    first = {"text": "bert.encoder.layer.0.attention.self.value.weight",
             "clip": "text_model.encoder.layers.0.self_attn.v_proj.weight"}[task]  # fmt: skip

    def transposed(model, state):
        merged = whole(model, state)
        return merged | {first: merged[first].T}

    monkeypatch.setattr(lora, "merged_state_dict", transposed)
    train = request.getfixturevalue({"text": "train_here", "clip": "clip_here"}[task])
    flags = ("--strategy", "lora") if task == "text" else ("--scenario", "dual_lora")
    with pytest.raises(UserError, match="the merged weights give other results") as caught:
        train(*flags, "--max_steps", "2", name="wrong")
    assert "\n" not in str(caught.value) and "nothing was saved" in str(caught.value)
    assert not (tmp_path / "runs" / "wrong" / "best").exists()


def dual_encoder() -> VisionTextDualEncoderModel:
    """Its towers name their projections q_proj and query."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=16, patch_size=8))
    return VisionTextDualEncoderModel(vision_model=vision, text_model=BertModel(BertConfig(**shape, vocab_size=50)))


def adapted_layers(model: torch.nn.Module) -> set[str]:
    names = [name.partition(".lora_A")[0].split(".") for name, _ in model.named_parameters() if ".lora_A" in name]
    return {f"{'vision' if 'vision_model' in name else 'text'} {name[-1]}" for name in names}


def test_each_tower_gets_adapters_at_its_own_projections(caplog) -> None:
    towers = ("vision_model", "text_model")
    model = attach_lora(dual_encoder(), 2, 4, 0.0, within=towers)
    assert adapted_layers(model) == {"vision q_proj", "vision v_proj", "text query", "text value"}
    assert adapted_layers(attach_lora(dual_encoder(), 2, 4, 0.0, within=towers[1:])) == {"text query", "text value"}
    model = attach_lora(dual_encoder(), 2, 4, 0.0, ("q_proj",), within=towers)
    assert adapted_layers(model) == {"vision q_proj"}
    (line,) = caplog.messages
    assert "--lora_targets q_proj: text_model has none of them" in line and "query" in line


def test_a_layer_that_cannot_be_merged_is_refused(tiny_clip_folder: Path) -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed = torch.nn.MultiheadAttention(4, 2)

    with pytest.raises(UserError, match="no adapter for mixed, which is a MultiheadAttention"):
        attach_lora(Attention(), 2, 4, 0.0, ("mixed",))
