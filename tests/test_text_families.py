"""Encoders and decoders of transformers with tiny random weights: trained, resumed, saved, asked, and with LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import weights
from made_data import make_rows
from tools import predict

from accelerando.data.collate import collate_text
from accelerando.data.tokenizer import open_tokenizer, train_tokenizer
from accelerando.models.pretrained import match_tokenizer, open_config, open_model, pads_left

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
DECODER = {**SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 3, "bos_token_id": 2}
FAMILIES: dict[str, dict] = {
    "bert": {**SHAPE, "max_position_embeddings": 64},
    "roberta": {**SHAPE, "max_position_embeddings": 66, "pad_token_id": 1},
    "xlm-roberta": {**SHAPE, "max_position_embeddings": 66, "pad_token_id": 1},
    "deberta-v2": {**SHAPE, "max_position_embeddings": 64, "relative_attention": True, "position_buckets": 16,
                   "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", "share_att_key": True},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    "electra": {**SHAPE, "embedding_size": 16, "max_position_embeddings": 64},
    "modernbert": {**SHAPE, "max_position_embeddings": 64, "global_attn_every_n_layers": 2, "local_attention": 16,
                   "reference_compile": False},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": DECODER,
    "qwen2": DECODER,
    "qwen3": {**DECODER, "head_dim": 8},
}  # fmt: skip
DECODERS = ("gpt2", "llama", "qwen2", "qwen3")
OFTEN = ("roberta", "deberta-v2", "modernbert", "gpt2", "qwen3")  # the rest is left to `make test-all`
KINDS = [pytest.param(kind, marks=[] if kind in OFTEN else [pytest.mark.exhaustive]) for kind in FAMILIES]
pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``family(kind)``: a folder of this kind, made once; decoders come without a padding token, as they are published."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        from transformers import AutoConfig, AutoModel

        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            tokenizer = train_tokenizer([row["text"] for row in make_rows(200, 0)], "bpe", 400)
            if kind in DECODERS:
                tokenizer.eos_token, tokenizer.pad_token = "[SEP]", None
            torch.manual_seed(0)
            settings = {"pad_token_id": 0, **FAMILIES[kind]} if kind not in DECODERS else FAMILIES[kind]
            config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **settings)
            AutoModel.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_answer(kind: str, family) -> None:
    """Alone or beside longer texts, a text has the same logits; decoders read them off its last token."""
    from transformers import AutoModelForSequenceClassification

    folder = str(family(kind))
    model = open_model(AutoModelForSequenceClassification, folder, open_config(folder, num_labels=3)).eval()
    tokenizer = open_tokenizer(folder)
    match_tokenizer(model, tokenizer, folder)
    texts = ("goal match of the team", "moon", "the orbit of a planet and its moon")
    samples = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
    collate = collate_text(tokenizer.pad_token_id, left=pads_left(model.config))
    with torch.no_grad():
        logits = model(**collate(samples)).logits
        for row, sample in enumerate(samples):
            alone = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0]
            assert torch.allclose(logits[row], alone, atol=1e-5), texts[row]


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_is_trained_resumed_saved_and_asked(kind: str, family, train_here, call_tool) -> None:
    """A batch is learnt, a resumed run ends with the same bytes, and predict.py answers as transformers' pipeline does."""
    import json

    from transformers import pipeline

    flags = ("--model_name", family(kind), "--max_length", "40", "--lr", "5e-3", "--save_every", "6", "--epochs", "24",
             "--overfit_batches", "1", "--batch_size", "8")  # fmt: skip
    run = train_here(*flags)
    kept = weights(run / "last")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert sum(losses[-4:]) < 0.87 * sum(losses[:4])
    train_here(*flags, "--resume", run / "checkpoints" / "step_000018")
    assert weights(run / "last") == kept
    texts = ["goal match of the team", "a", "the orbit of a planet and its moon"]
    code, out, err = call_tool(predict, run, *texts)
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    expected = pipeline("text-classification", model=str(run / "best"), top_k=1)(texts)
    for answer, (best,) in zip(answers, expected, strict=True):
        assert answer["label"] == best["label"]
        assert answer["score"] == pytest.approx(best["score"], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_has_adapters(kind: str, family, train_here) -> None:
    """Without naming layers; the merged model is compared with the adapted one when it is saved."""
    run = train_here("--model_name", family(kind), "--max_length", "40", "--strategy", "lora", "--max_steps", "2")
    assert (run / "best" / "adapter" / "adapter_model.safetensors").is_file()
