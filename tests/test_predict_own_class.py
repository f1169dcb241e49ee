"""tools/predict.py and tools/evaluate.py: models whose class is the user's own, made known by --import."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tools import evaluate, predict

from accelerando.data.decode import decode_for_evaluation
from accelerando.data.images import write_image_processor
from accelerando.data.tokenizer import train_tokenizer
from accelerando.data.transforms import normalise

LABELS = {"0": "chair", "1": "lamp", "2": "table"}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PLAIN = """
import torch


class MyNet(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, width, 5, 4), torch.nn.ReLU(), torch.nn.Flatten())
        self.head = torch.nn.LazyLinear(3) if width == 0 else torch.nn.Linear(width * 49, 3)

    @classmethod
    def from_config(cls, config):
        return cls(config["width"])

    def forward(self, x):
        return self.head(self.layers(x))


class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.EmbeddingBag(100, 3)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.embedding(input_ids, per_sample_weights=None)}


class Wrong(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.other = torch.nn.Linear(2, 2)
"""
REGISTERED = """
import torch
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class OwnConfig(PretrainedConfig):
    model_type = "own_net"


class OwnNet(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(3, config.num_labels)
        self.post_init()

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.head(pixel_values.mean((2, 3))))


AutoConfig.register("own_net", OwnConfig, exist_ok=True)
AutoModelForImageClassification.register(OwnConfig, OwnNet, exist_ok=True)
"""


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call_tool):
    """Runs a tool in ``tmp_path``, where the modules are; gives exit code and both outputs."""
    (tmp_path / "my_module.py").write_text(PLAIN)
    (tmp_path / "my_registered.py").write_text(REGISTERED)
    (tmp_path / "my_broken.py").write_text("import nowhere_at_all\n")
    (tmp_path / "my_failing.py").write_text("raise RuntimeError('no GPU')\n")
    monkeypatch.chdir(tmp_path)
    path = sys.path[:]

    def run(*arguments: object, tool=predict) -> tuple[int, str, str]:
        return call_tool(tool, *arguments)

    yield run
    sys.path[:] = path
    for name in ("my_module", "my_registered", "my_broken", "my_failing"):
        sys.modules.pop(name, None)


def write_config(folder: Path, **config: object) -> None:
    content = {"model_type": "torch_module", "id2label": LABELS, "label2id": {v: int(k) for k, v in LABELS.items()}}
    (folder / "config.json").write_text(json.dumps(content | config))


@pytest.fixture
def saved(call, tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    """A folder with a plain torch module as the library saves one, and the module."""
    sys.path.insert(0, str(tmp_path))
    import my_module

    torch.manual_seed(0)
    model, folder = my_module.MyNet.from_config({"width": 4}).eval(), tmp_path / "runs" / "mine" / "best"
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    write_config(folder, **{"class": "my_module:MyNet", "width": 4})
    write_image_processor(folder, 32, MEAN, STD)
    sys.path.remove(str(tmp_path))
    del sys.modules["my_module"]
    return folder, model


def test_a_plain_torch_module_predicts(saved, image_set: Path, call) -> None:
    folder, model = saved
    images = sorted((image_set / "raw" / "lamp").glob("*.jpg"))[:5]
    code, out, err = call(folder.parent, *images, "--import", "my_module")
    assert (code, err) == (0, "")
    pixels = torch.stack([decode_for_evaluation(path.read_bytes(), 32) for path in images])
    with torch.no_grad():
        expected = model(normalise(pixels, MEAN, STD)).softmax(1)
    found = [json.loads(line)["scores"] for line in out.splitlines()]
    got = torch.tensor([[row[name] for name in LABELS.values()] for row in found])
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)

    code, out, err = call(
        folder, "--data", image_set / "raw", "--import", "my_module", "--format", "json", tool=evaluate
    )
    assert (code, err) == (0, "")
    (metrics,) = json.loads(out)["runs"].values()
    assert metrics["count"] == 117


def test_a_plain_torch_module_of_texts(call, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    train_tokenizer(["ball goal rocket", "moon star salt"] * 20, "wordpiece", 60, max_length=24).save_pretrained(folder)
    torch.manual_seed(1)
    save_file({"embedding.weight": torch.randn(100, 3)}, folder / "model.safetensors")
    write_config(folder, **{"class": "my_module:Words"})
    code, out, err = call(folder, "ball goal", "moon", "--import", "my_module")
    assert (code, err) == (0, "")
    assert [set(json.loads(line)["scores"]) for line in out.splitlines()] == [set(LABELS.values())] * 2


def test_a_class_that_is_registered_with_transformers(image_set: Path, call, tmp_path: Path) -> None:
    image, folder = next((image_set / "raw" / "lamp").glob("*.jpg")), tmp_path / "own"
    folder.mkdir()
    save_file(
        {"head.weight": torch.eye(3), "head.bias": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"}
    )
    write_image_processor(folder, 32, MEAN, STD)
    for architecture in ("OwnNet", "OwnNetForImageClassification"):
        write_config(folder, model_type="own_net", architectures=[architecture])
        code, out, err = call(folder, image)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert "'own_net'" in err and "use --import my_module" in err
    write_config(folder, model_type="own_net", architectures=["OwnNet"])
    code, out, err = call(folder, image, "--import", "my_registered")
    assert (code, err) == (0, "")
    assert set(json.loads(out)["scores"]) == set(LABELS.values())


def test_mistakes_end_in_one_line(saved, image_set: Path, call, tmp_path: Path) -> None:
    folder, _ = saved
    image = next((image_set / "raw" / "lamp").glob("*.jpg"))

    def variant(name: str, **config: object) -> Path:
        copy = shutil.copytree(folder, tmp_path / name)
        write_config(copy, **{"class": "my_module:MyNet", "width": 4, **config})
        return copy

    bare = variant("bare")
    (bare / "model.safetensors").unlink()
    cases: list[tuple[tuple, str]] = [
        ((folder, image), "the model's class is MyNet of your module my_module: use --import my_module"),
        ((folder, image, "--import", "my_registered"), "MyNet, which my_registered (--import) does not have"),
        ((folder, image, "--import", "my_modul"), "--import my_modul: no such module"),
        ((folder, image, "--import", "my_broken"), "--import my_broken: No module named 'nowhere_at_all'"),
        ((folder, image, "--import", "my_failing"), "--import my_failing: RuntimeError: no GPU"),
        ((variant("wide", width=5), image, "--import", "my_module"), "cannot be loaded into MyNet"),
        ((variant("other", **{"class": "my_module:Wrong"}), image, "--import", "my_module"), "not those of Wrong"),
        ((variant("odd", width="x"), image, "--import", "my_module"), "MyNet cannot be built: TypeError"),
        ((variant("unnamed", **{"class": ""}), image, "--import", "my_module"), "names no class"),
        ((variant("few", id2label={"0": "a", "1": "b"}), image, "--import", "my_module"), "each of 2 classes"),
        ((bare, image, "--import", "my_module"), "cannot be loaded into MyNet"),
    ]
    for arguments, message in cases:
        code, out, err = call(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1, (arguments, err)
