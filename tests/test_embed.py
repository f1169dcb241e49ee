"""tools/embed.py: embeddings equal those of transformers, from every kind of input, whatever the batches."""

from __future__ import annotations

import csv
import importlib.util
import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from harness import ROOT, launch
from PIL import Image

from accelerando.base.errors import UserError
from accelerando.models.clip import make_clip_model, make_preprocessing
from accelerando.train.lora import attach_lora

TOOL = ROOT / "tools" / "embed.py"
CAPTIONS = ["a red chair", "two green tables by the wall", "a lamp", "blue sofa, three seats", "a chair"]
SIDE, DIMENSION = 32, 24
# torch, with which AutoProcessor resizes by default, and Pillow both resize with an antialiased cubic; on uint8 they
# differ by at most a level of 255, which moves these embeddings by up to 2e-3. The same resize gives 1e-5.
PILLOW, EXACT = 5e-3, 1e-5


def save_model(folder: Path, seed: int = 0, width: int = 32) -> str:
    """A CLIP of two layers a tower whose random weights are large enough to tell pictures and captions apart."""
    torch.manual_seed(seed)
    preprocessing = make_preprocessing(CAPTIONS, 120, SIDE, 16)
    model = make_clip_model(preprocessing.tokenizer, SIDE, 8, width, 2, width, 2, DIMENSION, 16, 0.0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    preprocessing.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


def picture(number: int, size: tuple[int, int] = (SIDE, SIDE), kind: str = "PNG") -> bytes:
    """Random blobs and not noise: what a photo is like when it is made smaller."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


SIZES = [(SIDE, SIDE), (90, 60), (41, 77), (20, 24), (300, 200)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five pictures in two folders, beside what is none; their order by path is that of their numbers."""
    folder = tmp_path / "photos"
    (folder / "sofas").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        suffix, kind = (".jpg", "JPEG") if number % 2 else (".PNG", "PNG")
        name = f"{'sofas/' if number > 2 else ''}p{number}{suffix}"
        (folder / name).write_bytes(picture(number, size, kind))
    (folder / "readme.txt").write_text("no picture")
    (folder / ".hidden.jpg").write_bytes(b"")
    return folder


def files_of(photos: Path) -> list[Path]:
    return [photos / name for name in ("p0.PNG", "p1.jpg", "p2.PNG", "sofas/p3.jpg", "sofas/p4.PNG")]


def write_shards(folder: Path, files: list[Path], captions: list[str], sizes: tuple[int, ...] = (3, 2)) -> list[str]:
    """Two tar files; the keys that are expected."""
    folder.mkdir()
    keys, row = [], 0
    for shard, count in enumerate(sizes):
        path = folder / f"{shard:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for _ in range(count):
                suffix = files[row].suffix.lower()
                members = {suffix: files[row].read_bytes(), ".txt": captions[row].encode(), ".json": b"{}"}
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"s{row}{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                keys.append(f"{path}:s{row}{suffix}")
                row += 1
    return keys


def write_table(path: Path, rows: list[tuple[str, str]], columns: tuple[str, str] = ("image", "caption")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool as a module, in ``tmp_path``."""
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("embed", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "embed", module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))
    return module


@pytest.fixture
def run(tool: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pa.Table]:
    """``run(model, *flags) -> table``: the tool's ``main`` in this process, on the CPU."""

    def call(*flags: object, output: str = "out.parquet") -> pa.Table:
        workers = [] if "--num_workers" in flags else ["--num_workers", "0"]
        argv = [*map(str, flags), "--device", "cpu", "--output", output, *workers]
        monkeypatch.setattr(sys, "argv", [str(TOOL), *argv])
        tool.main()
        return pq.read_table(output)

    return call


def matrix(table: pa.Table, part: str) -> np.ndarray:
    return np.array(table[f"{part}_embedding"].to_pylist(), np.float32)


def expected(model: str, files: list[Path], captions: list[str], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """What CLIPModel and AutoProcessor of transformers give, one picture and caption at a time."""
    from transformers import AutoProcessor, CLIPModel

    clip, processor = CLIPModel.from_pretrained(model).eval(), AutoProcessor.from_pretrained(model, **options)
    images, texts = [], []
    for file, caption in zip(files, captions, strict=True):
        inputs = processor(text=[caption], images=[Image.open(file).convert("RGB")], return_tensors="pt")
        with torch.no_grad():
            output = clip(**inputs)
        images.append(output.image_embeds[0].numpy())
        texts.append(output.text_embeds[0].numpy())
    return np.stack(images), np.stack(texts)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "draft" in path.name]


def test_a_table_gives_what_transformers_gives(run, model, photos, tmp_path, capsys) -> None:
    files = files_of(photos)
    names = [file.relative_to(photos).as_posix() for file in files]
    table_file = write_table(tmp_path / "t.csv", list(zip(names, CAPTIONS, strict=True)), ("file", "words"))
    columns = ("--image_column", "file", "--caption_column", "words")
    table = run(model, table_file, "--image_folder", photos, *columns)
    images, texts = expected(model, files, CAPTIONS)
    assert table["key"].to_pylist() == names
    assert table["caption"].to_pylist() == CAPTIONS
    found = matrix(table, "image")
    assert np.abs(found - images).max() < EXACT
    assert 0 < np.abs(found - expected(model, files, CAPTIONS, backend="pil")[0]).max() < PILLOW
    assert np.abs(matrix(table, "text") - texts).max() < EXACT
    # The tolerances are small beside what tells two pictures apart.
    apart = np.abs(images[:, None] - images).max(axis=-1)[~np.eye(5, dtype=bool)].min()
    assert apart > 10 * PILLOW
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert table.schema.field("image_embedding").type == pa.list_(pa.float32(), DIMENSION)
    known = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    assert known["model"] == model
    assert known["dimension"] == str(DIMENSION) and known["image_size"] == str(SIDE)
    assert float(known["logit_scale"]) == pytest.approx(14.2857, rel=1e-3)  # CLIP starts at 1 / 0.07
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"5 rows, dimension {DIMENSION}, ") and last.endswith(" samples/s: out.parquet")


def test_a_folder_has_pictures_alone(run, model, photos) -> None:
    table = run(model, photos)
    assert table.column_names == ["key", "image_embedding"]
    assert table["key"].to_pylist() == [file.relative_to(photos).as_posix() for file in files_of(photos)]
    images, _ = expected(model, files_of(photos), CAPTIONS)
    assert np.abs(matrix(table, "image") - images).max() < EXACT


def test_shards(run, model, photos, tmp_path) -> None:
    keys = write_shards(tmp_path / "shards", files_of(photos), CAPTIONS)
    table = run(model, tmp_path / "shards")
    images, texts = expected(model, files_of(photos), CAPTIONS)
    assert table["key"].to_pylist() == keys
    assert table["caption"].to_pylist() == CAPTIONS
    assert np.abs(matrix(table, "image") - images).max() < EXACT
    assert np.abs(matrix(table, "text") - texts).max() < EXACT
    one = run(model, f"{tmp_path}/shards/{{00001..00001}}.tar", output="one.parquet")
    assert one.equals(table.slice(3)) or np.allclose(matrix(one, "image"), matrix(table, "image")[3:], atol=1e-6)
    assert one["key"].to_pylist() == keys[3:]


def test_parts(run, model, photos, tmp_path) -> None:
    write_shards(tmp_path / "shards", files_of(photos), ["a lamp", " ", *CAPTIONS[2:]])
    both = run(model, tmp_path / "shards", output="both.parquet")
    image = run(model, tmp_path / "shards", "--parts", "image", output="image.parquet")
    text = run(model, tmp_path / "shards", "--parts", "text", output="text.parquet")
    assert both.column_names == ["key", "caption", "image_embedding", "text_embedding"]
    assert image.column_names == ["key", "caption", "image_embedding"]
    assert text.column_names == ["key", "caption", "text_embedding"]
    # A blank caption costs the pair, but not the picture.
    assert (both.num_rows, image.num_rows, text.num_rows) == (4, 5, 4)
    assert image["caption"].to_pylist()[1] is None
    assert np.allclose(np.delete(matrix(image, "image"), 1, axis=0), matrix(both, "image"), atol=1e-6)
    assert np.array_equal(matrix(text, "text"), matrix(both, "text"))


def test_texts_alone_and_beside_pictures(run, model, photos, tmp_path) -> None:
    (tmp_path / "words.txt").write_bytes("\ufeffa  lamp\r\n\r\n深紅 chair\n".encode())
    table = run(model, "--texts", "words.txt")
    assert table.column_names == ["key", "caption", "text_embedding"]
    assert table["key"].to_pylist() == ["words.txt:1", "words.txt:3"]
    assert table["caption"].to_pylist() == ["a lamp", "深紅 chair"]
    _, texts = expected(model, files_of(photos)[:2], ["a lamp", "深紅 chair"])
    assert np.abs(matrix(table, "text") - texts).max() < EXACT
    beside = run(model, photos, "--texts", "words.txt", "--batch_size", "3", output="beside.parquet")
    assert beside["image_embedding"].is_null().to_pylist() == [False] * 5 + [True] * 2
    assert beside["text_embedding"].is_null().to_pylist() == [True] * 5 + [False] * 2
    assert np.allclose(np.array(beside["text_embedding"].to_pylist()[5:]), texts, atol=EXACT)


def test_batches_and_workers_change_nothing(run, tool, model, photos, tmp_path, monkeypatch) -> None:
    write_shards(tmp_path / "shards", files_of(photos) * 4, CAPTIONS * 4, (9, 1, 10))
    (tmp_path / "shards" / "00001.tar").rename(tmp_path / "shards" / "z.tar")
    tables = [
        run(model, "shards", "--batch_size", size, "--num_workers", workers, output=f"{size}_{workers}.parquet")
        for size, workers in ((1, 0), (7, 0), (7, 2))
    ]
    monkeypatch.setattr(tool, "ROW_GROUP", 8)
    tables.append(run(model, "shards", "--batch_size", "7", output="groups.parquet"))
    for table in tables[1:]:
        assert table["key"].equals(tables[0]["key"])
        assert table["caption"].equals(tables[0]["caption"])
        for part in ("image", "text"):
            assert np.abs(matrix(table, part) - matrix(tables[0], part)).max() < 1e-6
    assert tables[1].equals(tables[2]) and tables[1].equals(tables[3])  # to the bit
    assert pq.ParquetFile("7_2.parquet").num_row_groups == 1
    assert pq.ParquetFile("groups.parquet").num_row_groups == 2  # of 14 and 6 rows: nothing waits for the end


def test_float16_and_bf16(run, model, photos) -> None:
    full = run(model, photos)
    half = run(model, photos, "--dtype", "float16", output="half.parquet")
    assert half.schema.field("image_embedding").type == pa.list_(pa.float16(), DIMENSION)
    assert np.array_equal(matrix(half, "image"), matrix(full, "image").astype(np.float16).astype(np.float32))
    mixed = matrix(run(model, photos, "--amp", "bf16", output="mixed.parquet"), "image")
    assert 0 < np.abs(mixed - matrix(full, "image")).max() < 0.1
    assert np.allclose(np.linalg.norm(mixed, axis=1), 1, atol=1e-5)


def test_max_length_cuts_captions(run, model, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a red chair by the wall\na red chair\n")
    uncut, cut = run(model, "--texts", "a.txt"), run(model, "--texts", "a.txt", "--max_length", "4", output="b.parquet")
    assert np.abs(matrix(uncut, "text")[0] - matrix(uncut, "text")[1]).max() > 0.01
    assert np.array_equal(matrix(cut, "text")[0], matrix(cut, "text")[1])  # [CLS] a red [SEP]
    with pytest.raises(UserError, match="--max_length 99 exceeds the 16 positions"):
        run(model, "--texts", "a.txt", "--max_length", "99", output="c.parquet")


def save_adapter(folder: Path, base: str) -> Any:
    """A LoRA adapter of ``base``, projections included, that changes much; PEFT's model with it."""
    from transformers import CLIPModel

    torch.manual_seed(3)
    tuned = attach_lora(
        CLIPModel.from_pretrained(base), 4, 8, 0.0, ("q_proj", "v_proj"), modules_to_save=("text_projection",)
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.peft_config["default"].base_model_name_or_path = base
    tuned.save_pretrained(folder)
    return tuned.eval()


def test_an_adapter_is_merged(run, model, photos, tmp_path) -> None:
    from transformers import AutoProcessor

    tuned = save_adapter(tmp_path / "runs" / "x" / "best" / "adapter", model)
    write_shards(tmp_path / "shards", [files_of(photos)[0]] * 2, CAPTIONS[:2], (1, 1))
    processor = AutoProcessor.from_pretrained(model)
    inputs = processor(
        text=CAPTIONS[:2], images=[Image.open(files_of(photos)[0])] * 2, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        output = tuned(**inputs)
    base = run(model, "shards", output="base.parquet")
    named = run("runs/x/best/adapter", "shards", output="named.parquet")
    given = run(model, "shards", "--adapter", "runs/x/best/adapter", output="given.parquet")
    for part, values in (("image", output.image_embeds), ("text", output.text_embeds)):
        assert np.abs(matrix(given, part) - values.numpy()).max() < EXACT
        assert np.array_equal(matrix(named, part), matrix(given, part))
        assert np.abs(matrix(base, part) - matrix(given, part)).max() > 0.02
    assert given.schema.metadata[b"adapter"] == b"runs/x/best/adapter"


def test_a_run_folder_means_its_best_weights(run, tmp_path, photos) -> None:
    save_model(tmp_path / "runs" / "x" / "best", seed=5)
    (tmp_path / "runs" / "x" / "config.yaml").write_text("seed: 1\n")
    assert run("runs/x", photos).equals(run("runs/x/best", photos, output="best.parquet"))


def test_a_wrong_adapter_is_refused(run, model, photos, tmp_path) -> None:
    other = save_model(tmp_path / "other", width=64)
    save_adapter(tmp_path / "adapter", other)
    with pytest.raises(UserError) as caught:
        run(model, photos, "--adapter", "adapter")
    assert f"adapter is an adapter for another base model ({other}), not for {model}" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is itself an adapter"):
        run("adapter", photos, "--adapter", "adapter")
    with pytest.raises(UserError, match="no adapter"):
        run(model, photos, "--adapter", photos)
    assert not Path("out.parquet").exists()


def test_unreadable_pictures_are_left_out_and_named(run, model, photos, capsys) -> None:
    good = picture(7, (300, 200), "JPEG")
    (photos / "cut.jpg").write_bytes(good[: len(good) // 2])
    (photos / "words.png").write_bytes(b"no picture at all")
    (photos / "p0b.png").mkdir()
    kept = run(model, photos, "--batch_size", "2", "--num_workers", "2")
    assert kept["key"].to_pylist() == [file.relative_to(photos).as_posix() for file in files_of(photos)]
    printed = capsys.readouterr()
    assert [line.split(": ")[:2] for line in printed.err.splitlines()] == [
        ["left out", "cut.jpg"], ["left out", "words.png"],
    ]  # fmt: skip
    assert "its header is corrupted" in printed.err and "0x" not in printed.err
    assert "5 rows, 2 left out" in printed.out
    for number in range(20):
        (photos / f"bad{number:02d}.webp").write_bytes(b"")
    more = run(model, photos, output="more.parquet")
    assert more["key"].equals(kept["key"])
    assert np.abs(matrix(more, "image") - matrix(kept, "image")).max() < 1e-6
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and "bad09.webp" in lines[9]
    assert lines[-1] == "... and 12 more"


def test_a_picture_that_is_gone_is_left_out(run, model, photos, capsys) -> None:
    (photos / "sofas" / "p3.jpg").unlink()
    (photos / "sofas" / "p3.jpg").symlink_to("gone.jpg")
    assert run(model, photos).num_rows == 4
    assert "left out: sofas/p3.jpg: [Errno 2]" in capsys.readouterr().err


def test_nothing_that_can_be_read(run, model, tmp_path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"bad: none of its 1 rows can be read, the first one is a.jpg: .*its header is corrupted"
    ):
        run(model, "bad")
    assert not Path("out.parquet").exists() and not leftovers(tmp_path)


def test_an_output_is_replaced_only_when_asked(run, model, photos, tmp_path) -> None:
    Path("out.parquet").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"--output out\.parquet exists: --overwrite replaces it"):
        run(model, photos)
    with pytest.raises(UserError, match=r"other\.parquet: is a folder"):
        (tmp_path / "other.parquet").mkdir()
        run(model, photos, "--overwrite", output="other.parquet")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError):
        run(model, "bad", "--overwrite")
    assert Path("out.parquet").read_bytes() == b"precious"  # a failure replaces nothing
    assert run(model, photos, "--overwrite").num_rows == 5
    assert run(model, photos, output="new/folder/out.parquet").num_rows == 5
    table = write_table(tmp_path / "t.csv", [("p0.PNG", "a lamp")])
    with pytest.raises(UserError, match="would replace the file that is read"):
        run(model, table, "--image_folder", photos, "--overwrite", output="t.csv")
    assert not leftovers(tmp_path)


def test_siglips_square_is_its_own(run, tmp_path, photos) -> None:
    """SigLIP's processor resizes to a square instead of cutting, and wants captions of full length."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    from accelerando.models.clip import Preprocessing

    torch.manual_seed(0)
    tokenizer = make_preprocessing(CAPTIONS, 120, SIDE, 16).tokenizer
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = SiglipConfig(
        text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32},
        vision_config={**tower, "image_size": SIDE, "patch_size": 8},
    )
    siglip = SiglipModel(config).eval()
    siglip.save_pretrained("siglip")
    processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    Preprocessing(tokenizer, processor, 16, full_length=True).save(Path("siglip"))
    names = [file.relative_to(photos).as_posix() for file in files_of(photos)]
    table = run("siglip", write_table(Path("t.csv"), list(zip(names, CAPTIONS, strict=True))), "--image_folder", photos)
    pictures = [Image.open(file).convert("RGB") for file in files_of(photos)]
    tokens = tokenizer(CAPTIONS, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = siglip(input_ids=tokens, **processor(images=pictures, return_tensors="pt"))
    assert np.abs(matrix(table, "image") - output.image_embeds.numpy()).max() < PILLOW
    assert np.abs(matrix(table, "text") - output.text_embeds.numpy()).max() < EXACT
    assert float(table.schema.metadata[b"logit_bias"]) == pytest.approx(float(siglip.logit_bias.detach()), abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["MODEL"], "nothing to embed: name INPUT"),
        (["MODEL", "nowhere"], "nowhere: no such shard or folder"),
        (["MODEL", "empty"], "empty: no image in it"),
        (["MODEL", "words.txt"], "texts are given with --texts"),
        (["MODEL", "--texts", "none.txt"], "--texts none.txt: No such file"),
        (["MODEL", "--texts", "blank.txt"], "--texts blank.txt: no text in it"),
        (["MODEL", "--texts", "latin.txt"], "--texts latin.txt, line 2: not UTF-8"),
        (["MODEL", "photos", "--parts", "text"], "--parts text: photos has no captions"),
        (["MODEL", "--texts", "words.txt", "--parts", "image"], "--parts image: --texts words.txt has no images"),
        (["MODEL", "photos", "--batch_size", "0"], "--batch_size 0: at least 1"),
        (["photos", "photos"], "photos: no model here"),
        (["runs/x", "photos"], "runs/x: no such folder"),
        (["words.txt", "photos"], "words.txt: is a file, not a folder"),
        (["bert", "photos"], "bert is a bert, not a CLIP or SigLIP model"),
        (["damaged", "photos"], "damaged: the model cannot be loaded"),
    ],
)
def test_bad_input_is_one_line(run, model, photos, tiny_bert, tmp_path, flags, message) -> None:
    import shutil

    (tmp_path / "empty").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "words.txt").write_text("a lamp\n")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"a\nStr\xe4nge\n")
    if flags[0] == "damaged":
        shutil.copytree(model, tmp_path / "damaged")
        (tmp_path / "damaged" / "model.safetensors").write_bytes(b"x" * 1000)
    if flags[0] == "bert":
        from transformers import CLIPImageProcessorPil

        shutil.copytree(tiny_bert, tmp_path / "bert")
        CLIPImageProcessorPil().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError) as caught:
        run(*[model if flag == "MODEL" else flag for flag in flags])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("out.parquet").exists() and not leftovers(tmp_path)


@pytest.mark.launch
def test_the_command(model, photos, tmp_path) -> None:
    done = launch(TOOL, model, str(photos), "--device", "cpu", cwd=tmp_path)
    assert len(done.out.splitlines()) == 1 and done.err == ""
    assert pq.read_table(tmp_path / "embeddings.parquet").num_rows == 5
    again = launch(TOOL, model, str(photos), cwd=tmp_path, check=False)
    assert again.code == 2
    assert again.err == "error: --output embeddings.parquet exists: --overwrite replaces it\n"


def test_a_workers_error_is_one_line(run, tool, model, photos, tmp_path, monkeypatch) -> None:
    """A shard that is gone when a worker asks for it again."""

    def fail(self: Any, row: int) -> None:
        raise UserError("s3://bucket/a.tar: the server is gone")

    monkeypatch.setattr(tool.Files, "read", fail)
    with pytest.raises(UserError) as caught:
        run(model, photos, "--num_workers", "2")
    assert str(caught.value) == "s3://bucket/a.tar: the server is gone"
    assert not leftovers(tmp_path)
