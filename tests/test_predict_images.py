"""tools/predict.py for images: the numbers of training, every source, what cannot be read, one line for mistakes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import struct
import threading
import zlib
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from tools import predict
from transformers import (
    AutoImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTForImageClassification,
    ViTImageProcessor,
)

from accelerando.base import processes
from accelerando.data.decode import decode_for_evaluation
from accelerando.data.images import write_image_processor
from accelerando.data.transforms import normalise
from accelerando.inference import inputs, saved
from accelerando.models.vision import VisionNet, VisionNetConfig

LABELS = {0: "chair", 1: "Küche", 2: "lamp"}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def run_folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best/ is a small ResNet with random weights, scaled so that images get different answers."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    torch.manual_seed(0)
    names = {"id2label": LABELS, "label2id": {name: number for number, name in LABELS.items()}}
    shape = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**shape, **names)).eval()
    some = torch.stack([decode_for_evaluation(path.read_bytes(), 32) for path in sorted(photos.rglob("b/*.*"))])
    with torch.no_grad():
        model.classifier[1].weight.mul_(20)
        model.classifier[1].bias.sub_(model(pixel_values=normalise(some, MEAN, STD)).logits.mean(0))
    model.save_pretrained(folder / "best")
    write_image_processor(folder / "best", 32, MEAN, STD)
    return folder


@pytest.fixture(scope="module")
def photos(image_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of several formats, some in folders, beside what is none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    found = sorted((image_set / "raw").rglob("*.*g"))[:24]
    for number, path in enumerate(found):
        place = (folder, folder / "b", folder / "b" / "deep")[number % 3]
        (place / f"{number:02d} x{path.suffix.upper()}").write_bytes(path.read_bytes())
    Image.open(found[0]).convert("P").save(folder / "a.gif")
    Image.new("RGBA", (40, 30), (255, 0, 0, 90)).save(folder / "b" / "see-through.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden" / "h.jpg").write_bytes(found[0].read_bytes())
    return folder


@pytest.fixture
def call(call_tool):
    """``call(*arguments, stdin=b"...")``: predict.py's exit code and both outputs."""
    return partial(call_tool, predict)


def objects(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def expected(run_folder: Path, paths: list[Path], tta: bool = False) -> torch.Tensor:
    """Probabilities as the training script's evaluation computes them."""
    model = ResNetForImageClassification.from_pretrained(run_folder / "best").eval()
    pixels = normalise(torch.stack([decode_for_evaluation(path.read_bytes(), 32) for path in paths]), MEAN, STD)
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
        if tta:
            logits = (logits + model(pixel_values=pixels.flip(-1)).logits) / 2
    return logits.softmax(1)


def assert_scores(found: list[dict], probabilities: torch.Tensor, names: list[str], atol: float = 2e-5) -> None:
    got = torch.tensor([[result["scores"][name] for name in names] for result in found])
    torch.testing.assert_close(got, probabilities, rtol=0, atol=atol)


def test_a_folder_is_answered_as_in_training(run_folder: Path, photos: Path, call) -> None:
    code, out, err = call(run_folder, photos, "--batch_size", 7)
    found = objects(out)
    paths = [Path(result["file"]) for result in found]
    assert (code, err) == (0, "")
    there = [sorted(path for path in place.iterdir() if path.is_file() and path.suffix != ".txt")
             for place in (photos, photos / "b", photos / "b" / "deep")]  # fmt: skip
    assert paths == [path for place in there for path in place] and len(paths) == 26
    probabilities = expected(run_folder, paths)
    assert probabilities.argmax(1).unique().numel() > 1
    assert_scores(found, probabilities, list(LABELS.values()))
    for result, row in zip(found, probabilities, strict=True):
        assert result["label"] == LABELS[int(row.argmax())] and result["score"] == max(result["scores"].values())
        assert list(result["scores"].values()) == sorted(result["scores"].values(), reverse=True)

    alone = objects(call(run_folder, photos, "--batch_size", 26, "--num_workers", 1)[1])
    assert [result["file"] for result in alone] == [str(path) for path in paths]
    short = objects(call(run_folder, paths[0], "--top_k", 2)[1])[0]
    assert list(short["scores"].items()) == list(found[0]["scores"].items())[:2]
    mirrored = objects(call(run_folder, photos, "--tta")[1])
    assert_scores(mirrored, expected(run_folder, paths, tta=True), list(LABELS.values()))
    assert [result["scores"] for result in mirrored] != [result["scores"] for result in found]


def test_csv_has_the_columns_of_a_run(run_folder: Path, photos: Path, call, tmp_path: Path) -> None:
    assert call(run_folder, photos, "--output", tmp_path / "new" / "a.csv") == (0, "", "")
    text = (tmp_path / "new" / "a.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == ["file", "predicted", "confidence", "p_chair", "p_Küche", "p_lamp"]
    for row, result in zip(rows, objects(call(run_folder, photos)[1]), strict=True):
        assert (row["file"], row["predicted"]) == (result["file"], result["label"])
        assert float(row["confidence"]) == pytest.approx(result["score"], abs=2e-5)
    assert call(run_folder, photos, "--format", "csv")[1] == text
    assert objects(call(run_folder, photos, "--format", "json")[1])[0]["file"] == rows[0]["file"]


def test_another_processor_is_used_as_it_is(run_folder: Path, photos: Path, tiny_vit: Path, call, tmp_path) -> None:
    ViTForImageClassification.from_pretrained(tiny_vit).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3).save_pretrained(tmp_path)
    paths = sorted(photos.glob("*.JPG"))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    inputs = processor([Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
    model = ViTForImageClassification.from_pretrained(tmp_path).eval()
    probabilities = model(**inputs).logits.softmax(1).detach()
    code, out, err = call(tmp_path, *paths)
    assert code == 0, err
    assert_scores(objects(out), probabilities, list(model.config.id2label.values()))

    code, out, err = call(tiny_vit, paths[0])  # its processor makes 224 pixels of 32
    assert (code, out, len(err.splitlines())) == (
        2,
        "",
        1,
    ) and "does not accept the output of its image processor" in err


def test_a_net_of_torchvision_is_known(photos: Path, call, tmp_path: Path) -> None:
    VisionNet(VisionNetConfig(architecture="shufflenet_v2_x0_5", id2label=LABELS)).save_pretrained(tmp_path)
    write_image_processor(tmp_path, 32, MEAN, STD)
    assert saved.evaluation_size(json.loads((tmp_path / "preprocessor_config.json").read_text())) == 32
    code, out, _ = call(tmp_path, photos / "a.gif")
    assert code == 0 and set(objects(out)[0]["scores"]) == set(LABELS.values())


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims to have that many pixels, and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_what_cannot_be_read_is_named(run_folder: Path, photos: Path, call, tmp_path: Path) -> None:
    sound = sorted(photos.glob("*.JPG"))[:2]
    bad = {"bomb.png": png_of(30000, 30000), "cut.jpg": sound[0].read_bytes()[:300], "empty.png": b"", "x.heic": b"no"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    given = [sound[0], *(tmp_path / name for name in bad), sound[1]]
    code, out, err = call(run_folder, *given, "--batch_size", 3)
    found = objects(out)
    assert code == 1
    assert [result["file"] for result in found] == [str(path) for path in given]
    assert ["error" in result for result in found] == [False, *[True] * len(bad), False]
    assert_scores([found[0], found[-1]], expected(run_folder, sound), list(LABELS.values()))
    assert err.splitlines() == [f"cannot be read: {r['file']}: {r['error']}" for r in found[1:-1]]
    assert "bomb" in found[1]["error"] and "its header is corrupted" in found[3]["error"] and "BytesIO" not in err

    output = tmp_path / "out" / "a.csv"
    code, out, _ = call(run_folder, *given, "--output", output)
    assert (code, out) == (1, "") and len(output.read_text().splitlines()) == 3
    for name in ("b.csv", "b.jsonl"):
        code, out, err = call(run_folder, *given[1:3], "--output", tmp_path / "out" / name)
        assert (code, err.splitlines()[-1]) == (2, "error: none of 2 images can be read")
    assert list(output.parent.iterdir()) == [output]


@pytest.fixture(scope="module")
def server(photos: Path):
    """A web server with an image, and with what servers do instead of sending one."""
    image = (photos / "a.gif").read_bytes()
    held = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/")
            if name == "silent":
                held.wait(10)
            lengths = {"cut": len(image) + 5, "large": inputs.MOST_BYTES + 1}
            moved = {"moved": "/a%20b.gif", "ftp": "ftp://localhost/a.gif", "round": "/round"}
            self.send_response(404 if name == "none" else 302 if name in moved else 200)
            if name in moved:
                self.send_header("Location", moved[name])
            elif name != "endless":
                self.send_header("Content-Length", str(lengths.get(name, len(image))))
            self.end_headers()
            if name == "a%20b.gif":
                self.wfile.write(image)
            elif name in ("cut", "large"):
                self.wfile.write(image[:-5])
            elif name == "endless":
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(bytes(2**16))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    held.set()
    server.shutdown()


def test_lists_and_urls(run_folder: Path, photos: Path, server: str, call, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(inputs, "PATIENCE", 0.5)
    monkeypatch.setattr(inputs, "MOST_BYTES", inputs.MOST_BYTES)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    lines = {
        f"{server}/a b.gif": None, f"{server}/moved": None, f"{server}/none": "404", f"{server}/cut": "truncated",
        f"{server}/large": "larger than 100 MB", f"{server}/ftp": "to something else", f"{server}/round": "redirect",
        f"{server}/silent": "timed out", "http://127.0.0.1:1/x": "refused", "ftp://localhost/x": "only http",
        str(photos / "a.gif"): None, str(photos / "gone.png"): "No such file", str(photos): "directory",
    }  # fmt: skip
    text = "\ufeff" + "".join(f"{line}\r\n\n" for line in lines)
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    code, out, err = call(run_folder, "--file", tmp_path / "list.txt")
    found = objects(out)
    assert code == 1
    assert [result["file"] for result in found] == list(lines)
    for result, reason in zip(found, lines.values(), strict=True):
        assert (reason is None) == ("error" not in result) and (reason or "").lower() in str(result).lower(), result
    assert len(err.splitlines()) == sum(reason is not None for reason in lines.values())
    same = [result["scores"] for result in found if "scores" in result]
    assert len(same) == 3 and same[0] == same[1] == same[2]

    one = f"{photos / 'a.gif'}\n".encode()
    assert call(run_folder, stdin=one) == call(run_folder, photos / "a.gif")
    assert call(run_folder, f"{server}/moved")[0] == 0
    monkeypatch.setattr(inputs, "MOST_BYTES", 10**6)  # a server that says no length and does not end
    code, out, err = call(run_folder, photos / "a.gif", f"{server}/endless")
    assert code == 1 and "larger than 1 MB" in err


def test_threads_stay_a_bounded_way_ahead() -> None:
    taken: list[int] = []

    def source():
        for number in range(1000):
            taken.append(number)
            yield number

    before = threading.active_count()
    results = processes.map_ahead(lambda number: number * number, source(), 4, 10)
    for number in range(500):
        assert next(results) == (number, number * number)
        assert len(taken) <= number + 11
    results.close()
    assert threading.active_count() == before
    with pytest.raises(ZeroDivisionError):
        list(processes.map_ahead(lambda number: 1 // (number - 5), iter(range(100)), 3, 4))
    assert threading.active_count() == before


def test_mistakes_end_in_one_line(run_folder: Path, photos: Path, call, tmp_path: Path) -> None:
    import shutil

    image = photos / "a.gif"

    def variant(name: str) -> Path:
        return shutil.copytree(run_folder / "best", tmp_path / name)

    truncated, weightless, bare, broken = map(variant, ("truncated", "weightless", "bare", "broken"))
    weights = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (weightless / "model.safetensors").unlink()
    (bare / "preprocessor_config.json").unlink()
    model = ResNetForImageClassification.from_pretrained(broken)
    with torch.no_grad():
        model.classifier[1].bias[0] = float("nan")
    model.save_pretrained(broken)
    empty, text = tmp_path / "empty", tmp_path / "text"
    empty.mkdir()
    text.mkdir()
    (text / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    cases: list[tuple[tuple, str]] = [
        ((truncated, image), "cannot be loaded"),
        ((weightless, image), "cannot be loaded"),
        ((bare, image), "no preprocessor_config.json"),
        ((broken, image), "NaN"),
        ((text, image), "a classifier of texts"),
        ((text, "x", "--tta"), "--tta has no effect here (images:"),
        ((text, "x", "--output", "x.csv"), "CSV is for images"),
        ((run_folder,), "standard input: no image"),
        ((run_folder, empty), "no image in this folder"),
        ((run_folder, photos / "a.gfi"), "no such file"),
        ((run_folder, "s3://bucket/a.jpg"), "only http"),
        ((run_folder, image, "--file", image), "give one of them"),
        ((run_folder, "--file", image), "not a list of paths and URLs"),
        ((run_folder, "--file", photos), "is a folder"),
        ((run_folder, "--file", tmp_path / "nowhere.txt"), "no such file"),
        ((run_folder, image, "--text_pair", "x"), "--text_pair has no effect here"),
        ((run_folder, image, "--format", "csv", "--top_k", 1), "--top_k is for JSON"),
        ((run_folder, image, "--num_workers", 0), "--num_workers 0"),
        ((run_folder, image, "--batch_size", 0), "--batch_size 0"),
        ((run_folder, image, "--device", "cuda:77"), "no such device"),
        ((run_folder, image, "--output", empty), "is a folder"),
    ]
    for arguments, message in cases:
        code, out, err = call(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1, (arguments, err)
