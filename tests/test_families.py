"""clip_finetune.py with every family of models that has CLIP's interface: one step, saved, opened again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from harness import results

from accelerando.base.errors import UserError

SIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE = {**SIDE, "image_size": 16, "patch_size": 8}


def tiny_model(kind: str, tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.PreTrainedModel:
    """A model of a family with random weights for images of 16 pixels."""
    tokens = {"eos_token_id": tokenizer.sep_token_id, "bos_token_id": tokenizer.cls_token_id, "pad_token_id": 0}
    text = {**SIDE, **tokens, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    torch.manual_seed(0)
    if kind == "VisionTextDualEncoder":
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            transformers.ViTConfig(**IMAGE), transformers.BertConfig(**text), projection_dim=24
        )
        return transformers.VisionTextDualEncoderModel(config)
    name = {"clip": "CLIP", "siglip": "Siglip", "metaclip_2": "MetaClip2", "chinese_clip": "ChineseCLIP",
            "altclip": "AltCLIP", "aimv2": "Aimv2", "siglip2": "Siglip2", "xclip": "XCLIP"}[kind]  # fmt: skip
    image = dict(IMAGE)
    if kind == "altclip":  # a RoBERTa, which counts positions from behind the padding's id on
        text |= {"project_dim": 32, "max_position_embeddings": 20}
    if kind == "siglip2":
        image.pop("image_size")
        image |= {"num_patches": 4}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=image, projection_dim=24)
    return getattr(transformers, f"{name}Model")(config)


@pytest.fixture
def family(tiny_clip_folder: Path, tmp_path: Path):
    """``family(kind)``: a folder with a tiny model of it, and the tiny CLIP's tokenizer and image processor."""

    def make(kind: str) -> Path:
        folder = tmp_path / kind
        shutil.copytree(tiny_clip_folder, folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tiny_model(kind, tokenizer).save_pretrained(folder)
        return folder

    return make


FAMILIES = ("clip", "siglip", "metaclip_2", "chinese_clip", "altclip", "aimv2", "VisionTextDualEncoder")


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("locked", [False, True], ids=["open", "locked"])
def test_a_family_is_trained_saved_and_opened(kind: str, locked: bool, family, clip_here) -> None:
    folder = family(kind)
    flags = ("--lock_image_tower", "--augmentation", "none") if locked else ()
    flags = (*flags, "--loss", "siglip") if kind == "siglip" else flags
    run = clip_here("--model_name", folder, "--scenario", "full", "--max_steps", "1", *flags)
    before, after = (transformers.AutoModel.from_pretrained(place) for place in (folder, run / "last"))
    _, report = transformers.AutoModel.from_pretrained(run / "best", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    old, new = before.state_dict(), after.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    towers = {name.split(".")[0] for name in changed}
    assert "text_model" in towers
    assert ("vision_model" in towers) == (not locked)
    assert transformers.AutoProcessor.from_pretrained(run / "best").image_processor is not None
    again = clip_here("--model_name", run / "best", "--scenario", "zero_shot", *flags, name="again")
    assert results(again)["test"]["recall_mean"] == pytest.approx(results(run)["test"]["recall_mean"], abs=1e-6)
    assert ("Features are " in (run / "logs" / "train.log").read_text()) == locked


@pytest.mark.parametrize(("kind", "words"), [("siglip2", "NaFlex"), ("xclip", "videos")])
def test_what_takes_other_inputs_is_one_line(kind: str, words: str, family, clip_here, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        clip_here("--model_name", family(kind))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()
