"""clip_finetune.py with models that differ from CLIP: more tokens than embeddings, BERT or XLM-R as text tower."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness import results
from safetensors.torch import load_file
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPModel,
)

from accelerando.base.errors import UserError
from accelerando.models.clip import open_clip_model, open_preprocessing

pytestmark = pytest.mark.usefixtures("no_figures")
ADDED = ["<one>", "<two>", "a red"]  # the last one stands in captions of the set


@pytest.fixture
def wordy_clip(tiny_clip_folder: Path, tmp_path: Path) -> Path:
    """The tiny CLIP with a tokenizer that somebody has added tokens to, but not to the model."""
    folder = Path(shutil.copytree(tiny_clip_folder, tmp_path / "wordy"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = CLIPModel.from_pretrained(folder).config.text_config.vocab_size
    tokenizer.add_tokens(ADDED)
    assert len(tokenizer) > known
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scenario", ["full", "dual_lora"])
def test_a_tokenizer_with_more_tokens_than_embeddings(scenario: str, wordy_clip: Path, clip_here) -> None:
    """Trained, stopped and resumed, saved, opened by transformers and by our own tools; the first ones are kept."""
    flags = ("--model_name", wordy_clip, "--scenario", scenario, "--lr", "0.01", "--save_every", "1")
    flags += ("--scheduler", "constant", "--warmup_steps", "0")  # which do not depend on max_steps
    run = clip_here(*flags, "--max_steps", "2")
    clip_here(*flags, "--max_steps", "3", "--resume")
    whole = clip_here(*flags, "--max_steps", "3", name="whole")
    log = (run / "logs" / "train.log").read_text()
    tokenizer = AutoTokenizer.from_pretrained(run / "best")
    before = load_file(wordy_clip / "model.safetensors")["text_model.embeddings.token_embedding.weight"]
    known, count = len(before), len(tokenizer)
    assert f"has {count} tokens, the model {known} embeddings: {count - known} are added near the mean" in log
    assert results(run)["steps"] == 3

    model, report = AutoModel.from_pretrained(run / "last", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    embeddings = model.text_model.embeddings.token_embedding.weight
    assert embeddings.shape == (count, before.shape[1])
    assert model.config.text_config.vocab_size == count
    other = AutoModel.from_pretrained(whole / "last").text_model.embeddings.token_embedding.weight
    assert torch.equal(embeddings, other)  # the added ones are the same after a resume
    used = tokenizer.convert_tokens_to_ids("a red")
    assert used >= known
    moved = not torch.equal(embeddings[:known], before)
    assert moved == (scenario == "full")
    if scenario == "full":  # one that occurs in captions has been trained, one that does not has not
        first = load_file(run / "checkpoints" / "step_000002" / "model.safetensors")
        assert not torch.equal(first["text_model.embeddings.token_embedding.weight"][used], embeddings[used])
    processor = AutoProcessor.from_pretrained(run / "best")
    assert used in processor.tokenizer("a red chair")["input_ids"]

    clip_here("--model_name", run / "best", "--scenario", "zero_shot", name="again")
    assert "are added" not in (run.parent / "again" / "logs" / "train.log").read_text()
    again = results(run.parent / "again")["test"]
    assert again["loss"] == pytest.approx(results(run)["test"]["loss"], abs=1e-5)


TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES = {"chinese_clip": (ChineseCLIPConfig, ChineseCLIPModel, {}),
            "altclip": (AltCLIPConfig, AltCLIPModel, {"project_dim": 32})}  # fmt: skip


def make_model(family: str, folder: Path) -> Path:
    """Random weights in the place of those of the tiny CLIP in ``folder``."""
    config_class, model_class, more = FAMILIES[family]
    count = len(AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": count, "max_position_embeddings": 20, "pad_token_id": 0, **more}
    vision = {**TOWER, "image_size": 16, "patch_size": 8}
    model_class(config_class(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_dual_lora_trains_both_towers_of_other_families(
    family: str, tiny_clip_folder: Path, clip_here, tmp_path
) -> None:
    """Their text towers call the projections of attention query and value, their vision towers q_proj and v_proj."""
    folder = make_model(family, Path(shutil.copytree(tiny_clip_folder, tmp_path / family)))
    flags = ("--model_name", folder, "--scenario", "dual_lora", "--save_every", "1", "--keep_checkpoints", "9")
    run = clip_here(*flags, "--max_steps", "3")
    first, last = (load_file(run / "checkpoints" / f"step_00000{step}" / "model.safetensors") for step in (1, 3))
    changed = {name for name in last if not torch.equal(first[name], last[name])}
    plain = {name.removeprefix("base_model.model.") for name in changed}
    adapted = {(name.split(".")[0], name.partition(".lora_")[0].split(".")[-1]) for name in plain if ".lora_" in name}
    assert adapted == {
        ("vision_model", "q_proj"),
        ("vision_model", "v_proj"),
        ("text_model", "query"),
        ("text_model", "value"),
    }
    saved = {name for name in plain if ".lora_" not in name}
    assert {name.split(".")[0] for name in saved} == {"visual_projection", "text_projection"}
    _, report = FAMILIES[family][1].from_pretrained(run / "best", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert json.loads((run / "best" / "config.json").read_text())["model_type"] == family
    clip_here("--model_name", run / "best", "--scenario", "zero_shot", name="again")
    again = results(run.parent / "again")["test"]
    assert again["loss"] == pytest.approx(results(run)["test"]["loss"], abs=1e-5)


@pytest.mark.parametrize(("family", "most"), [("chinese_clip", 20), ("altclip", 19)])
def test_the_longest_captions_fit_the_positions(family: str, most: int, tiny_clip_folder: Path, tmp_path: Path) -> None:
    """AltCLIP's positions begin behind that of the padding, as RoBERTa's do."""
    folder = make_model(family, Path(shutil.copytree(tiny_clip_folder, tmp_path / family)))
    assert open_preprocessing(str(folder), None).max_length == most
    with pytest.raises(UserError, match=f"--max_length {most + 1} exceeds the {most} positions"):
        open_preprocessing(str(folder), most + 1)
    tokens = torch.full((1, most), 7)
    open_clip_model(str(folder)).get_text_features(input_ids=tokens, attention_mask=torch.ones_like(tokens))
