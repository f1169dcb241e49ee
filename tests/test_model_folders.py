"""Model folders as others leave them: prefixed names, other models' weights, tokenizers, padding, broken files."""

from __future__ import annotations

import argparse
import io
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_data import make_rows
from safetensors.torch import load_file, save_file
from tools import predict
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
    XLNetConfig,
    XLNetModel,
)

from accelerando.base.errors import UserError
from accelerando.data.collate import collate_text
from accelerando.data.tokenizer import open_tokenizer, train_tokenizer
from accelerando.models.clip import open_clip_model
from accelerando.models.pretrained import match_tokenizer, most_tokens, open_config, open_model, pads_left
from accelerando.models.vision import VisionNet, VisionNetConfig, load_pretrained
from accelerando.train.lora import attach_lora

pytestmark = pytest.mark.usefixtures("no_figures")
METADATA = {"format": "pt"}


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """``copy_of(folder, without=(), **files) -> folder``: a copy without some files, and with others' content."""

    def copy(folder: Path, without: tuple[str, ...] = (), **files: str | bytes) -> Path:
        target = Path(shutil.copytree(folder, tmp_path / f"copy{len(list(tmp_path.iterdir()))}"))
        for pattern in without:
            for path in target.glob(pattern):
                path.unlink()
        for name, content in files.items():
            path = target / f"{name}.json"
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return target

    return copy


def rename(folder: Path, prefix: str) -> Path:
    """Puts ``prefix`` before the names of the weights in ``folder``."""
    path = folder / "model.safetensors"
    save_file({f"{prefix}{name}": tensor for name, tensor in load_file(path).items()}, path, metadata=METADATA)
    return folder


def open_text(folder: Path) -> torch.nn.Module:
    return open_model(AutoModelForSequenceClassification, str(folder), open_config(str(folder), num_labels=3))


# ----------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
def test_known_prefixes_are_taken_off(prefix: str, tiny_bert: Path, copy_of, caplog) -> None:
    caplog.set_level(logging.INFO, "accelerando")
    expected, found = open_text(tiny_bert), open_text(rename(copy_of(tiny_bert), prefix))
    assert all(torch.equal(a, b) for a, b in zip(expected.bert.parameters(), found.bert.parameters(), strict=True))
    assert any("is removed" in line for line in caplog.messages) == (prefix != "")
    found.save_pretrained(tiny := copy_of(tiny_bert))
    assert set(load_file(tiny / "model.safetensors")) == set(expected.state_dict())


def test_prefixed_weights_of_an_image_model(tiny_vit: Path, copy_of) -> None:
    folder = rename(copy_of(tiny_vit), "model.")
    config = open_config(str(folder), num_labels=3)
    found = open_model(AutoModelForImageClassification, str(folder), config)
    expected = open_model(AutoModelForImageClassification, str(tiny_vit), config)
    assert all(torch.equal(a, b) for a, b in zip(expected.vit.parameters(), found.vit.parameters(), strict=True))


def unfit(kind: str, tiny_bert: Path, copy: Path) -> Path:
    """A copy of the tiny BERT with weights that are not its config's."""
    config = BertConfig.from_pretrained(tiny_bert)
    state = load_file(tiny_bert / "model.safetensors")
    if kind == "another body":
        other = DistilBertConfig(vocab_size=config.vocab_size, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
        state = DistilBertModel(other).state_dict()
    elif kind == "another shape":
        state["embeddings.position_embeddings.weight"] = torch.zeros(48, 32)
    elif kind == "a missing layer":
        state = {name: tensor for name, tensor in state.items() if "layer.1." not in name}
    elif kind == "a further layer":
        state |= {name.replace("layer.1.", "layer.2."): tensor.clone() for name, tensor in state.items()}
    elif kind == "unknown prefix":
        state = {f"unknown.{name}": tensor for name, tensor in state.items()}
    save_file(state, copy / "model.safetensors", metadata=METADATA)
    return copy


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("another body", "7 of 41 tensors fit"),
        ("another shape", r"position_embeddings.weight has the shape \[48, 32\], not \[64, 32\]"),
        ("a missing layer", "25 of 41 tensors fit; bert.encoder.layer.1.*is missing"),
        ("a further layer", "layer.2.* belongs to a layer that config.json does not have"),
        ("unknown prefix", "of 41 tensors fit"),
    ],
)
def test_weights_of_another_model_are_refused(kind, words, tiny_bert: Path, copy_of, train_here, tmp_path) -> None:
    folder = unfit(kind, tiny_bert, copy_of(tiny_bert))
    with pytest.raises(UserError, match=words) as caught:
        train_here("--model_name", folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_image_weights_of_another_model_are_refused(tiny_vit: Path, tiny_resnet: Path, copy_of, image_here) -> None:
    folder = copy_of(tiny_vit)
    shutil.copy(tiny_resnet / "model.safetensors", folder)
    with pytest.raises(UserError, match=r"2 of 40 tensors fit; vit.embeddings.cls_token is missing"):
        image_here("--model_name", folder)


def test_a_head_and_a_pooler_may_be_new(tiny_bert: Path, copy_of, caplog) -> None:
    caplog.set_level(logging.INFO, "accelerando")
    folder = copy_of(tiny_bert)
    BertForMaskedLM(BertConfig.from_pretrained(tiny_bert)).save_pretrained(folder)
    open_text(folder)
    assert any("bert.pooler.dense, classifier" in line for line in caplog.messages)


def resnet() -> torch.nn.Module:
    return VisionNet(VisionNetConfig(architecture="resnet18", num_labels=3)).net


@pytest.mark.parametrize("kind", ["timm", "lightning", "compiled", "average", "torchvision"])
def test_weights_of_other_trainers(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = resnet()
    state = source.state_dict()
    if kind == "timm":
        content = {"arch": "resnet18", "state_dict": state, "args": argparse.Namespace(lr=0.1), "optimizer": {}}
    elif kind == "lightning":
        extra = {"criterion.weight": torch.ones(3)}
        content = {"state_dict": {f"model.{name}": value for name, value in state.items()} | extra, "epoch": 3}
    elif kind == "compiled":
        content = {"model": torch.compile(source).state_dict()}
    elif kind == "average":
        content = torch.optim.swa_utils.AveragedModel(source).state_dict()
    else:
        content = {"model_ema": torch.optim.swa_utils.AveragedModel(source).state_dict(), "args": argparse.Namespace()}
    torch.save(content, tmp_path / "checkpoint.pth")
    torch.manual_seed(2)
    model = VisionNet(VisionNetConfig(architecture="resnet18", num_labels=3))
    line = load_pretrained(model, str(tmp_path / "checkpoint.pth"))
    assert f"Loaded {len(state)} tensors" in line
    assert all(torch.equal(value, model.net.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: torch.nn.Linear(2, 2), r"a Python object, torch.nn.modules.linear.Linear, which is not unpickled"),
        (lambda: {"state_dict": {"a": torch.ones(1)}, "path": Path("x")}, r"a Python object, pathlib"),
        (lambda: {"student": {}, "teacher": {}}, "no state dict in it, but student, teacher"),
        (lambda: {}, "no state dict in it"),
        (lambda: {"fc.weight": torch.ones(3, 512)}, "0 of its 122 tensors fit|1 of its 122 tensors fit"),
    ],
)
def test_weights_that_cannot_be_read_are_one_line_without_colours(content, words: str, tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=words) as caught:
        load_pretrained(VisionNet(VisionNetConfig(num_labels=3)), str(tmp_path / "weights.pth"))
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- tokenizers and padding


def test_a_folder_without_tokenizer_is_refused(tiny_bert: Path, copy_of, train_here, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        train_here("--model_name", copy_of(tiny_bert, without=("token*", "special*", "vocab*")))
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_of_a_newer_format(tiny_bert: Path, copy_of) -> None:
    content = json.loads((tiny_bert / "tokenizer.json").read_text())
    content["model"]["type"] = "Future"
    content["model"].pop("vocab")
    with pytest.raises(UserError, match=r"tokenizer.json is damaged, or of a newer format"):
        open_tokenizer(str(copy_of(tiny_bert, tokenizer=json.dumps(content))))


def test_more_tokens_than_embeddings(tiny_bert: Path, copy_of, train_here, call_tool, capsys) -> None:
    folder = copy_of(tiny_bert)
    tokenizer = open_tokenizer(str(folder))
    known = len(tokenizer)
    tokenizer.add_tokens(["goal", "rocketry", "bankers"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    run = train_here("--model_name", folder, "--epochs", "1", name="larger")
    added = len(tokenizer) - known
    assert f"the model {known} embeddings: {added} are added" in capsys.readouterr().out
    embeddings = load_file(run / "best" / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert embeddings.shape == (known + added, 32)
    code, out, err = call_tool(predict, run, "rocketry bankers", "goal")
    assert (code, len(out.splitlines())) == (0, 2), err


def decoder(kind: str, folder: Path, pad: bool) -> Path:
    """A tiny GPT-2 or XLNet with random weights and a tokenizer of the small texts, perhaps without a padding token."""
    tokenizer = train_tokenizer([row["text"] for row in make_rows(200, 0)], "bpe", 400)
    tokenizer.eos_token = "[SEP]"
    if not pad:
        tokenizer.pad_token = None
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)
        GPT2Model(config).save_pretrained(folder)
    elif kind == "xlnet":
        config = XLNetConfig(vocab_size=len(tokenizer), d_model=32, n_layer=2, n_head=4, d_inner=64, pad_token_id=0)
        XLNetModel(config).save_pretrained(folder)
    else:
        config = RobertaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                               intermediate_size=32, max_position_embeddings=64, pad_token_id=1)  # fmt: skip
        RobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "pad"), [("gpt2", False), ("xlnet", True), ("roberta", True)])
def test_padding_changes_no_result(kind: str, pad: bool, tmp_path: Path) -> None:
    """GPT-2 pads with its end token; XLNet on the left, and its -1 positions are no limit; RoBERTa with its own id."""
    folder = str(decoder(kind, tmp_path, pad))
    model = open_model(AutoModelForSequenceClassification, folder, open_config(folder, num_labels=3)).eval()
    tokenizer = open_tokenizer(folder)
    match_tokenizer(model, tokenizer, folder)
    assert tokenizer.pad_token == {"gpt2": "[SEP]", "xlnet": "[PAD]", "roberta": "[UNK]"}[kind]
    assert most_tokens(model) == {"gpt2": 64, "xlnet": None, "roberta": 62}[kind]
    samples = [{"input_ids": tokenizer(text)["input_ids"]} for text in ("goal match of the team", "moon", "the a")]
    collate = collate_text(tokenizer.pad_token_id, left=pads_left(model.config))
    with torch.no_grad():
        together = model(**collate(samples)).logits
        alone = torch.cat([model(**collate([sample])).logits for sample in samples])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "xlnet"])
def test_decoders_train_and_predict(kind: str, tmp_path: Path, train_here, call_tool) -> None:
    folder = decoder(kind, tmp_path / kind, pad=kind == "xlnet")
    run = train_here("--model_name", folder, "--epochs", "1", "--max_steps", "3", name=kind)
    texts = ("goal match of the team", "moon")
    _, together, _ = call_tool(predict, run, *texts)
    alone = [call_tool(predict, run, text)[1] for text in texts]
    for one, other in zip(together.splitlines(), alone, strict=True):
        assert json.loads(one)["score"] == pytest.approx(json.loads(other)["score"], abs=2e-5)


def test_a_tokenizer_that_cannot_pad(tmp_path: Path, train_here) -> None:
    folder = decoder("gpt2", tmp_path / "gpt2", pad=False)
    tokenizer = open_tokenizer(str(folder))
    tokenizer.eos_token = tokenizer.sep_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="neither a padding nor an end token"):
        train_here("--model_name", folder)


# ----------------------------------------------------------------------------------------------------- code of its own

CODE = """
from pathlib import Path

from transformers import BertConfig, BertForSequenceClassification

Path({marker!r}).write_text("run")


class OwnConfig(BertConfig):
    model_type = "own_bert"


class OwnForSequenceClassification(BertForSequenceClassification):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_if_it_is_trusted(
    tiny_bert: Path, copy_of, train_here, call_tool, tmp_path: Path, monkeypatch
) -> None:
    marker = tmp_path / "marker"
    config = json.loads((tiny_bert / "config.json").read_text()) | {
        "model_type": "own_bert",
        "auto_map": {"AutoConfig": "own_code.OwnConfig",
                     "AutoModelForSequenceClassification": "own_code.OwnForSequenceClassification"},
    }  # fmt: skip
    folder = copy_of(tiny_bert, config=json.dumps(config))
    (folder / "own_code.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(UserError, match="add --trust_remote_code") as caught:
        train_here("--model_name", folder)
    assert "\n" not in str(caught.value) and not marker.exists()
    run = train_here("--model_name", folder, "--trust_remote_code", "--max_steps", "2", name="own")
    assert marker.exists()
    marker.unlink()
    code, _, err = call_tool(predict, run, "goal", stdin=b"y\n")
    assert code == 2 and "add --trust_remote_code" in err and not marker.exists()
    code, _, err = call_tool(predict, run, "goal", "--trust_remote_code")
    assert code == 0, err


# ------------------------------------------------------------------------------------------------------- broken files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12345\n"
WHOLE = "model.safetensors"
# File, what it holds instead (None: nothing is there; a dict: changed entries), a part of the message.
BROKEN: dict[str, list[tuple[str, object, str]]] = {
    "text": [
        (WHOLE, b"", "model.safetensors: truncated or not a .safetensors file"),
        (WHOLE, "half", "model.safetensors: truncated or not a .safetensors file"),
        (WHOLE, POINTER, "model.safetensors: a git-LFS pointer, not the file itself: run git lfs pull"),
        (WHOLE, None, "no file named model.safetensors"),
        ("config.json", b"", "config.json: invalid JSON"),
        ("config.json", b"[]", "config.json: expected an object, found a list"),
        ("config.json", b"[" * 100_000, "config.json: invalid JSON"),
        ("config.json", b'{"a": "\xff"}', "config.json: invalid JSON"),
        ("config.json", b"{}", "Unrecognized model"),
        ("config.json", {"model_type": "nothing"}, "nothing"),
        ("config.json", {"hidden_size": "32"}, "hidden_size"),
        ("config.json", {"hidden_size": 10**9}, "hidden_size 1,000,000,000 in config.json does not fit its weights"),
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers 1,000,000,000 in config.json does not fit"),
        ("config.json", {"num_attention_heads": -1}, "num_attention_heads -1 in config.json does not fit"),
        ("config.json", {"hidden_act": "nothing"}, "nothing"),
        ("tokenizer.json", b"[]", "tokenizer.json"),
        ("tokenizer.json", POINTER, "tokenizer.json: a git-LFS pointer"),
        ("tokenizer.json", {"model": {}}, "tokenizer.json is damaged, or of a newer format"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "tokenizer"),
        ("tokenizer_config.json", {"model_max_length": 1.5}, "model_max_length in tokenizer_config.json"),
        ("tokenizer_config.json", {"pad_token": 3}, "tokenizer"),
    ],
    "image": [
        (WHOLE, "half", "model.safetensors: truncated or not a .safetensors file"),
        ("config.json", {"image_size": 16}, "position_embeddings has the shape"),
        ("preprocessor_config.json", b"{", "preprocessor_config.json: invalid JSON"),
        ("preprocessor_config.json", {"image_mean": "x"}, "image_mean and image_std are not three numbers"),
    ],
    "clip": [
        (WHOLE, POINTER, "model.safetensors: a git-LFS pointer"),
        ("config.json", {"text_config": []}, "config"),
        ("processor_config.json", b"[]", "processor_config.json: expected an object"),
        ("processor_config.json", None, "no preprocessor_config.json in it"),
        ("tokenizer_config.json", None, "the tokenizer cannot be loaded"),
    ],
}  # fmt: skip


def break_file(path: Path, content: object) -> None:
    """Replaces a file by ``content`` of ``BROKEN``."""
    if isinstance(content, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    elif content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "half" else content)


@pytest.mark.parametrize(
    ("task", "file", "content", "words"), [(task, *case) for task, cases in BROKEN.items() for case in cases]
)
def test_a_broken_file_is_one_line(task, file, content, words, request, copy_of, tmp_path) -> None:
    model = {"text": "tiny_bert", "image": "tiny_vit", "clip": "tiny_clip_folder"}[task]
    train = request.getfixturevalue({"text": "train_here", "image": "image_here", "clip": "clip_here"}[task])
    folder = copy_of(request.getfixturevalue(model))
    break_file(folder / file, content)
    with pytest.raises(UserError) as caught:
        train("--model_name", folder)
    message = str(caught.value)
    assert words in message and str(folder) in message
    assert "\n" not in message and "\x1b" not in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors.index.json", b"{", "model.safetensors.index.json: invalid JSON"),
        ("model.safetensors.index.json", {"weight_map": None}, "weight_map does not name a file for each tensor"),
        ("model-00002-of-00003.safetensors", None, "model-00002-of-00003.safetensors: no such file"),
        ("model-00002-of-00003.safetensors", "half", "model-00002-of-00003.safetensors: truncated"),
        ("model-00002-of-00003.safetensors", POINTER, "model-00002-of-00003.safetensors: a git-LFS pointer"),
    ],
)
def test_broken_shards_are_one_line(file, content, words, tiny_bert: Path, copy_of) -> None:
    folder = copy_of(tiny_bert, without=(WHOLE,))
    AutoModelForSequenceClassification.from_pretrained(tiny_bert).save_pretrained(folder, max_shard_size="40KB")
    open_text(folder)
    break_file(folder / file, content)
    with pytest.raises(UserError) as caught:
        open_text(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickle_in_a_folder_is_refused(tiny_bert: Path, copy_of) -> None:
    folder = copy_of(tiny_bert, without=(WHOLE,))
    torch.save({"a": argparse.Namespace()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"a Python object, argparse.Namespace, which is not unpickled") as caught:
        open_text(folder)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("adapter_config.json", b"[]", "expected an object, found a list"),
        ("adapter_config.json", {"peft_type": "NOTHING"}, "the adapter cannot be loaded"),
        ("adapter_config.json", {"r": "x"}, "the adapter cannot be loaded"),
        ("adapter_config.json", {"r": 5}, "the adapter cannot be loaded"),
        ("adapter_config.json", {"target_modules": ["q_proj"]}, "tensors for the"),
        ("adapter_model.safetensors", "half", "adapter_model.safetensors: truncated"),
        ("adapter_model.safetensors", POINTER, "git-LFS pointer"),
    ],
)
def test_a_broken_adapter_is_one_line(file, content, words, tiny_clip_folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    attach_lora(open_clip_model(str(tiny_clip_folder)), 4, 8, 0.0).save_pretrained(adapter)
    open_clip_model(str(tiny_clip_folder), str(adapter))
    break_file(adapter / file, content)
    with pytest.raises(UserError) as caught:
        open_clip_model(str(tiny_clip_folder), str(adapter))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", {"architectures": 3}), ("preprocessor_config.json", {"size": 10**9}),
     ("preprocessor_config.json", {"size": {"height": 40, "width": 40}}),
     ("preprocessor_config.json", {"rescale_factor": "x"}), ("preprocessor_config.json", {"image_mean": 3})],
)  # fmt: skip
def test_a_broken_image_model_does_not_predict(file, content, tiny_vit: Path, copy_of, call_tool, tmp_path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    folder = copy_of(tiny_vit)
    break_file(folder / file, content)
    code, _, err = call_tool(predict, folder, tmp_path / "a.png")
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1, err


OPEN_OWN = """
import sys
from accelerando.models.pretrained import open_config
for folder in sys.argv[1:]:
    config = open_config(folder)
    print(config.model_type, getattr(config, "of_clip", config).model_type)
"""


def test_models_of_this_package_are_known_to_a_process_that_imported_none(tmp_path: Path) -> None:
    """Also a classifier on a CLIP of two towers, whose class names another one of this package."""
    from accelerando.models.clip_classifier import ClipClassifierConfig
    from accelerando.models.pretrained import OWN
    from accelerando.models.towers import TwoTowersConfig

    for kind in OWN:
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": kind}))
    ClipClassifierConfig(clip=TwoTowersConfig().to_dict()).save_pretrained(tmp_path / "clip_classifier")
    call = [sys.executable, "-c", OPEN_OWN]
    for folders in (["clip_classifier"], [kind for kind in OWN if kind != "clip_classifier"]):
        done = subprocess.run(
            [*call, *(str(tmp_path / kind) for kind in folders)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        expected = [f"{kind} {'two_towers' if kind == 'clip_classifier' else kind}" for kind in folders]
        assert done.stdout.splitlines() == expected
