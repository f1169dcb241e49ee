"""tools/export.py: equal outputs in every format, usage without torch, int8 that spoils nothing, one line for mistakes."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ROOT, launch, results
from tasks import TASKS, trained_once
from tools import export, predict

from accelerando.base.errors import UserError
from accelerando.data.keypoints import NUM_POINTS, normalise_by_body
from accelerando.inference import formats, packages
from accelerando.inference.exported import onnx_runner, parity
from accelerando.inference.formats import Graph
from accelerando.inference.graphs import normalised_by_body
from accelerando.inference.quantisation import quantise

# Each task, with models that are written in different ways.
TRAINED: dict[str, tuple[str, tuple[str, ...]]] = {
    "text": ("text", ()),
    "cnn": ("text", TASKS["text"].kinds["cnn"]),
    "sign": ("sign", ("--velocities", "--use_mask", "--relative_hands", "--conv_kernel", "3", "--pooling", "cls")),
    "gru": ("sign", ("--model", "iv3_gru")),
    "image": ("image", ()),
    "clip": ("clip", ()),
    "har": ("har", ("--frames", "2")),
}


def models(*names: str) -> list:
    """pytest parameters; further models of text, and what other tests export too, are left to the exhaustive suite."""
    return [
        pytest.param(name, marks=[pytest.mark.exhaustive] * (name in ("cnn", "gru", "sign", "clip", "har")))
        for name in names
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``trained(request, name)``: a run of two epochs, made once."""
    return trained_once(TRAINED, tmp_path_factory)


@pytest.fixture(scope="module")
def only_numpy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with numpy, onnxruntime, tokenizers and pillow alone, to run Python with."""
    import onnxruntime
    import PIL
    import tokenizers

    folder = tmp_path_factory.mktemp("packages")
    for module in (np, onnxruntime, tokenizers, PIL):
        home = Path(module.__file__).parent
        for part in (home, *home.parent.glob(f"{home.name}.libs"), *home.parent.glob(f"{home.name.lower()}low.libs")):
            (folder / part.name).symlink_to(part)
    return folder


def inputs_of(task: str, request: pytest.FixtureRequest) -> list[str]:
    """Arguments of usage.py and predict.py: texts, clips or images."""
    if task == "text":
        return ["the goal of the match", "a rocket", "planet orbit moon and a very long text " * 9]
    if task == "sign":
        return [str(path) for path in sorted(request.getfixturevalue("sign_set").glob("val/*.npz"))[:6]]
    folder = request.getfixturevalue({"image": "image_set", "har": "media_set"}[task])
    return [str(path) for path in sorted(folder.rglob("*")) if path.suffix in (".jpg", ".jpeg", ".png")][:6]


@pytest.mark.launch
@pytest.mark.parametrize("name", models(*TRAINED))
def test_every_format_gives_the_outputs_of_the_model(
    name: str, trained, only_numpy, request, call_tool, tmp_path
) -> None:
    """ONNX, TorchScript and torch.export on validation samples; usage.py without torch answers as predict.py does."""
    run, target = trained(request, name), tmp_path / "export"
    kinds = ("onnx", "torchscript", "pt2")
    code, out, err = call_tool(
        export, run, "--export_format", *kinds, "--samples", "20", "--tolerance", "1e-5", "--output_dir", target
    )
    assert code == 0, err
    facts = json.loads((target / "export.json").read_text())
    graphs = ("image", "text") if name == "clip" else ("model",)
    assert set(facts["files"]) == {f"{graph}{formats.SUFFIXES[kind]}" for graph in graphs for kind in kinds}
    for file, about in facts["files"].items():
        assert about["largest_difference"] < 1e-5, file
        assert about["equal_predictions"] == 1, file
        assert about["samples"] == 20, file
        assert re.search(rf"{re.escape(file)} .* 100.0% of 20", out)
    shutil.copytree(target, run / "export", dirs_exist_ok=True)
    # In a process of its own: in this one, after OpenVINO has run, reading the films of har was a segmentation fault.
    done = launch(ROOT / "tools" / "evaluate.py", run / "export", "--format", "json", cwd=tmp_path)
    (scored,) = json.loads(done.out)["runs"].values()
    assert scored == pytest.approx(results(run)["test"], abs=1e-4)
    usage = (target / "usage.py").read_text()
    assert len([line for line in usage.splitlines()[1:] if line.strip()]) <= 15
    if name == "clip":
        return
    task = TRAINED[name][0]
    if name == "gru":
        given = [str(path) for path in sorted(request.getfixturevalue("sign_set").glob("val/*.npz"))[:6]]
    else:
        given = inputs_of(task, request)
    environment = {"PYTHONPATH": str(only_numpy), "PATH": ""}
    alone = subprocess.run(
        [sys.executable, "-S", str(target / "usage.py"), *given], env=environment, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    first = [line.split("\t")[0] for line in alone.stdout.splitlines()]
    answers = {}
    for model in (run, target):
        code, out, err = call_tool(predict, model, *given)
        assert code == 0, err
        rows = [json.loads(line) for line in out.splitlines()]
        answers[model] = [row["gloss"][0]["label"] if task == "sign" else row["label"] for row in rows]
    assert first == answers[target] == answers[run]


@pytest.mark.launch
@pytest.mark.parametrize("name", models("gru", "image"))
def test_openvino_gives_the_outputs_of_the_model(name: str, trained, request, tmp_path) -> None:
    """In a process of its own: beside all that this one has loaded, OpenVINO's threads have ended it."""
    pytest.importorskip("openvino")
    run, target = trained(request, name), tmp_path / "export"
    flags = (
        "--export_format",
        "openvino",
        "--precision",
        "float32",
        "float16",
        "--samples",
        "20",
        "--tolerance",
        "1e-5",
    )
    launch(ROOT / "tools" / "export.py", run, *flags, "--output_dir", target, cwd=tmp_path)
    facts = json.loads((target / "export.json").read_text())["files"]
    assert set(facts) == {"model.xml", "model_float16.xml"}
    assert facts["model.xml"]["largest_difference"] < 1e-5
    assert facts["model_float16.xml"]["equal_predictions"] >= 0.95


@pytest.mark.launch
def test_the_towers_of_a_clip_compare_images_and_texts(trained, only_numpy, request, call_tool, tmp_path) -> None:
    """usage.py without torch gives the similarities that the model gives."""
    from PIL import Image
    from transformers import AutoProcessor, CLIPModel

    run, target = trained(request, "clip"), tmp_path / "export"
    assert call_tool(export, run, "--samples", "8", "--output_dir", target)[0] == 0
    picture = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(picture)
    texts = ["a red chair", "a blue lamp that stands", "table"]
    environment = {"PYTHONPATH": str(only_numpy), "PATH": ""}
    command = [sys.executable, "-S", str(target / "usage.py"), str(picture), *texts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {text: float(value) for value, text in (line.split("\t") for line in done.stdout.splitlines())}
    model, processor = CLIPModel.from_pretrained(run / "best").eval(), AutoProcessor.from_pretrained(run / "best")
    inputs = processor(text=texts, images=Image.open(picture), return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(**inputs)
    right = (output.text_embeds @ output.image_embeds.T)[:, 0].tolist()
    assert [found[text] for text in texts] == pytest.approx(right, abs=2e-3)


@pytest.mark.launch
@pytest.mark.parametrize("name", models("text", "image", "gru"))
def test_other_precisions_and_the_benchmark(name: str, trained, request, call_tool, tmp_path) -> None:
    """float16 and bfloat16 are smaller, int8 changes few predictions; every file is timed beside PyTorch."""
    run, target = trained(request, name), tmp_path / "export"
    precisions = ("float32", "float16", "bfloat16", "int8", *(["int8_static"] if name == "image" else []))
    code, out, err = call_tool(
        export, run, "--export_format", "onnx", "torchscript", "--precision", *precisions, "--output_dir", target,
        "--benchmark", "--batch_sizes", "1", "4", "--seconds", "0.05", "--agreement", "0.5",
    )  # fmt: skip
    assert code == 0, err
    files = json.loads((target / "export.json").read_text())["files"]
    wanted = {"model.onnx", "model_float16.onnx", "model_int8.onnx", "model.torchscript.pt",
              "model_float16.torchscript.pt", "model_bfloat16.torchscript.pt"}  # fmt: skip
    assert set(files) == wanted | ({"model_int8_static.onnx"} if name == "image" else set())
    assert 0 < files["model_float16.onnx"]["largest_difference"] < 0.02
    assert files["model_int8.onnx"]["largest_difference"] > files["model.onnx"]["largest_difference"]
    with open(target / "benchmark.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["file"], row["batch"]) for row in rows} == {
        (file, batch) for file in (*files, "model in PyTorch") for batch in ("1", "4")
    }
    for row in rows:
        half, most, nearly = (float(row[f"p{share} ms"]) for share in (50, 90, 99))
        assert 0 < half <= most <= nearly
        assert float(row["samples/s"]) == pytest.approx(1000 * int(row["batch"]) / half, rel=0.05, abs=1)
    assert {float(row["times PyTorch"]) for row in rows if row["file"] == "model in PyTorch"} == {1.0}
    assert (target / "benchmark.png").stat().st_size > 5000
    assert "times PyTorch" in out and out.splitlines()[0] in (target / "summary.txt").read_text()


@pytest.mark.parametrize("kind", sorted(packages.PACKAGES))
def test_a_format_whose_package_is_missing_says_what_installs_it(kind: str, call_tool, monkeypatch, tmp_path) -> None:
    """Before the model is opened; and the pipeline before hours of training."""
    modules, needed = packages.PACKAGES[kind]
    for module in modules.split():

        def find(name: str, module: str = module) -> object:
            return None if name == module else object()

        with monkeypatch.context() as patch:
            patch.setattr(packages, "find_spec", find)
            with pytest.raises(UserError) as error:
                packages.check_available(kind)
            assert str(error.value) == f"--export_format {kind} needs {module}: pip install {needed}"
            code, out, err = call_tool(export, tmp_path / "nowhere", "--export_format", kind)
            assert (code, out) == (2, "") and f"needs {module}: pip install {needed}" in err


def test_tensorrt_without_a_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^--export_format tensorrt builds for the GPU that it runs on; there is none"):
        packages.check_available("tensorrt")


@pytest.mark.launch
@pytest.mark.parametrize("name", ["text", "clip", "har"])
def test_executorch_gives_the_outputs_of_the_model(name: str, trained, request, tmp_path) -> None:
    """In a process of its own, for batches and lengths other than those of the example."""
    pytest.importorskip("executorch")
    run, target = trained(request, name), tmp_path / "export"
    flags = ("--export_format", "executorch", "--samples", "20", "--tolerance", "1e-5", "--benchmark")
    sizes = ("--batch_sizes", "1", "32", "--seconds", "0.05")
    launch(ROOT / "tools" / "export.py", run, *flags, *sizes, "--output_dir", target, cwd=tmp_path)
    facts = json.loads((target / "export.json").read_text())["files"]
    assert set(facts) == ({"image.pte", "text.pte"} if name == "clip" else {"model.pte"})
    for about in facts.values():
        assert about["largest_difference"] < 1e-5 and about["equal_predictions"] == 1 and about["samples"] == 20


def test_an_operator_that_executorch_lacks_is_named(tmp_path: Path) -> None:
    pytest.importorskip("executorch")

    class Sorted(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values.sort(dim=1).values

    with pytest.raises(UserError, match=r"^model.pte: ExecuTorch has no sort.*, which the model computes$"):
        formats.write(graph_of(Sorted()), "executorch", "float32", tmp_path, 20)


class Spoilt(torch.nn.Module):
    """Two layers; one weight of the second is a million times as large as the rest and of no consequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(32, 32), torch.nn.Linear(33, 10)
        with torch.no_grad():
            self.second.weight[:, 32] = 1e5

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = self.first(values).relu()
        return self.second(torch.cat([hidden, torch.zeros_like(hidden[:, :1])], 1))


def graph_of(module: torch.nn.Module, width: int = 32) -> Graph:
    """A graph with 100 samples."""
    graph = Graph("model", module.eval(), {"values": torch.randn(2, width)}, {"values": {0: "batch"}}, ("logits",))
    kinds = 3 * torch.randn(5, width, generator=torch.Generator().manual_seed(1))  # clusters, so that classes are clear
    batches = kinds.repeat(20, 1) + 0.1 * torch.randn(100, width, generator=torch.Generator().manual_seed(2))
    batches = batches.unflatten(0, (10, 10))
    with torch.no_grad():
        graph.expected = [(module(batch).numpy(),) for batch in batches]
    graph.samples = [{"values": batch.numpy()} for batch in batches]
    return graph


def test_int8_leaves_the_layer_in_float_that_it_would_spoil(tmp_path: Path) -> None:
    """Named with its effect; the predictions are those of float32 again, and the other layer is in 8 bits."""
    import onnx

    graph = graph_of(Spoilt())
    source, _ = formats.write(graph, "onnx", "float32", tmp_path, 20)
    left = quantise(source, tmp_path / "model_int8.onnx", graph.samples, graph.expected, False, True)
    assert len(left) == 1
    name = left[0].split()[0]
    nodes = {node.name: node for node in onnx.load(source).graph.node}
    assert "second" in " ".join(nodes[name].input), left
    found = parity(onnx_runner(tmp_path / "model_int8.onnx"), graph.samples, graph.expected)
    assert found.equal >= 0.99
    kinds = [node.op_type for node in onnx.load(tmp_path / "model_int8.onnx").graph.node]
    assert sum("Integer" in kind for kind in kinds) == 1


def test_int8_static_finds_the_ranges_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers are tried one by one: running all samples is what takes the time."""
    quantize = importlib.import_module("onnxruntime.quantization.quantize")  # whose name a function of it has
    graph, made = graph_of(Spoilt()), []
    source, _ = formats.write(graph, "onnx", "float32", tmp_path, 20)
    create = quantize.create_calibrator
    monkeypatch.setattr(quantize, "create_calibrator", lambda *a, **k: made.append(1) or create(*a, **k))
    left = quantise(source, tmp_path / "model_int8_static.onnx", graph.samples, graph.expected, True, True)
    assert len(left) == 1 and len(made) == 1
    assert (
        parity(onnx_runner(tmp_path / "model_int8_static.onnx"), graph.samples, graph.expected).equal >= 0.95
    )  # the other of its two layers is in 8 bits


def test_large_weights_stand_in_a_file_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those beyond 2 GB have to."""
    monkeypatch.setattr(formats, "LARGEST_FILE", 1000)
    graph = graph_of(torch.nn.Linear(32, 64))
    path, _ = formats.write(graph, "onnx", "float32", tmp_path, 20)
    (beside,) = (each for each in tmp_path.iterdir() if each != path)
    assert beside.stat().st_size >= 32 * 64 * 4 > path.stat().st_size
    assert parity(onnx_runner(path), graph.samples, graph.expected).largest < 1e-5


def test_keypoints_are_normalised_in_the_graph_as_in_training() -> None:
    """Clips of different lengths in one batch: with few detections, without shoulders, without any point."""
    rng = np.random.default_rng(3)
    lengths = (1, 2, 5, 8, 9)
    frames = np.zeros((len(lengths), 9, 2 * NUM_POINTS), np.float32)
    masks = np.zeros((len(lengths), 9, NUM_POINTS), bool)
    attention = np.arange(9) < np.array(lengths)[:, None]
    for row, length in enumerate(lengths):
        masks[row, :length] = rng.random((length, NUM_POINTS)) < 0.6
        frames[row, :length] = rng.random((length, 2 * NUM_POINTS))
    masks[2, :, 11] = False  # no left shoulder
    masks[3] = False
    for given in (masks, None):
        found, seen = normalised_by_body(
            torch.from_numpy(frames), torch.from_numpy(attention.astype(np.int64)),
            None if given is None else torch.from_numpy(given),
        )  # fmt: skip
        for row, length in enumerate(lengths):
            mask = None if given is None else given[row, :length]
            right, right_seen = normalise_by_body(frames[row, :length], mask)
            assert np.allclose(found[row, :length].numpy(), right, rtol=1e-4, atol=1e-5), row
            assert np.array_equal(seen[row, :length].numpy(), right_seen)


@pytest.mark.launch
def test_mistakes_have_one_line(trained, request, call_tool, tmp_path) -> None:
    """What cannot be exported says why; what is out of tolerance ends with exit code 1 and is written nevertheless."""
    run, target = trained(request, "text"), tmp_path / "export"

    def fails(*flags: object) -> str:
        code, _, err = call_tool(export, *flags)
        assert code == 2
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        return line

    assert "name a run or a model folder" in fails()
    assert "no such folder" in fails("nowhere")
    assert "holds float32, float16, int8" in fails(run, "--precision", "bfloat16")
    if not torch.cuda.is_available():
        needed = (
            "there is none here" if find_spec("tensorrt") else "needs tensorrt: pip install tensorrt onnx onnxscript"
        )
        assert needed in fails(run, "--export_format", "tensorrt", "--output_dir", tmp_path / "tensorrt")
    shutil.copytree(run / "best", tmp_path / "alone")
    assert "belongs to no run" in fails(tmp_path / "alone")
    code, _, err = call_tool(export, run, "--output_dir", target, "--tolerance", "1e-12", "--samples", "8")
    assert code == 1
    assert re.search(r"out of tolerance: model.onnx: an output differs by \S+, more than --tolerance 1e-12", err)
    assert (target / "model.onnx").is_file()
    assert "--overwrite replaces it" in fails(run, "--output_dir", target)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "holds files that are no export" in fails(run, "--output_dir", tmp_path / "mine", "--overwrite")
    moved = json.loads((run / "results.json").read_text())["config"]
    config = (run / "config.yaml").read_text()
    train = next(section["train_file"] for section in moved.values() if "train_file" in section)
    (run / "config.yaml").write_text(config.replace(train, "/nowhere/train.json"))
    try:
        assert "--samples 0 exports without them" in fails(run, "--output_dir", tmp_path / "b")
        assert call_tool(export, run, "--output_dir", tmp_path / "b", "--samples", "0")[0] == 0
    finally:
        (run / "config.yaml").write_text(config)
    code, _, err = call_tool(predict, target / "model_int8.onnx", "a text")
    assert code == 2 and "name one of it: model.onnx" in err
    (target / "model.onnx").write_bytes(b"no graph")
    code, _, err = call_tool(predict, target, "a text")
    assert code == 2 and "not an ONNX file that ONNX Runtime can run" in err
