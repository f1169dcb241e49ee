"""tools/make_shards.py: what lies in the shards, on which side, and what is said about the rest."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import random
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT, launch

from accelerando.base.errors import UserError

TOOL = ROOT / "tools" / "make_shards.py"
COLORS = ["red", "blaugrün", "深紅", "orange 🛋"]
WORDS = ["Stuhl", "silla", "椅子", "كرسي", "стул", "ghế", "e\u0301tage`re", '"quoted"', "a,b", "two\nlines", "🪑"]


def picture(number: int, kind: str = "PNG", side: int = 12) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def add_picture(folder: Path, name: str, data: bytes) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return name


def write_csv(path: Path, rows: list[dict]) -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path.name


def furniture(folder: Path, count: int = 40, first: int = 0) -> list[dict]:
    """``count`` pictures of three kinds in two folders, and a row for each."""
    rng = random.Random(first)
    rows = []
    for number in range(first, first + count):
        suffix, kind = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")][number % 3]
        name = add_picture(
            folder, f"{'sofas' if number % 2 else 'chairs'}/no {number}.v2.{suffix}", picture(number, kind)
        )
        caption = f"{' '.join(rng.choices(WORDS, k=4))} {number}"
        rows.append({"image": name, "caption": caption, "color": rng.choice(COLORS), "kind": "chair"})
    return rows


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """``pack(*flags, out="out") -> (out, err)``: the tool's ``main`` in this process, in ``tmp_path``."""
    spec = importlib.util.spec_from_file_location("make_shards", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_shards", module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)

    def run(*flags: object, out: str = "out") -> tuple[str, str]:
        argv = ["--images", "images", "--output_dir", out, "--num_workers", "0", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", [str(TOOL), *argv])
        capsys.readouterr()
        module.main()
        return tuple(capsys.readouterr())

    return run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def read(out: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    """split -> key -> extension -> bytes, by Python's own tarfile."""
    content: dict[str, dict[str, dict[str, bytes]]] = {}
    for shard in sorted(out.glob("*/*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                members = content.setdefault(shard.parent.name, {}).setdefault(key, {})
                assert extension not in members
                members[extension] = tar.extractfile(member).read()
    return content


def merged(out: Path) -> dict[str, dict[str, bytes]]:
    splits = read(out).values()
    result = {key: members for split in splits for key, members in split.items()}
    assert len(result) == sum(map(len, splits))  # keys are unique over all splits
    return result


def sides(out: Path) -> dict[bytes, set[str]]:
    """Picture (its bytes) -> the splits it is in."""
    found: dict[bytes, set[str]] = {}
    for name, samples in read(out).items():
        for members in samples.values():
            (data,) = (members[kind] for kind in ("jpg", "png", "webp") if kind in members)
            found.setdefault(data, set()).add(name)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def captions(out: Path) -> list[str]:
    return sorted(members["txt"].decode() for members in merged(out).values())


def test_every_row_is_packed_whole_and_once(pack, images: Path, tmp_path: Path) -> None:
    rows = furniture(images)
    out, err = pack("--captions", write_csv(tmp_path / "rows.csv", rows))
    content = merged(tmp_path / "out")
    assert captions(tmp_path / "out") == sorted(row["caption"] for row in rows)
    by_caption = {row["caption"]: row for row in rows}
    for key, members in content.items():
        row = by_caption[members["txt"].decode()]
        extension = row["image"].rpartition(".")[2]
        assert set(members) == {extension, "txt", "json"}
        assert members[extension] == (images / row["image"]).read_bytes()
        assert json.loads(members["json"]) == row
        assert re.fullmatch(r"(chairs|sofas)_no_\d+_v2-[0-9a-f]{12}", key)
    assert err == ""
    summary = json.loads((tmp_path / "out" / "shards.json").read_text())
    assert summary["seed"] == 42
    assert summary["arguments"]["images"] == "../images"
    assert str(tmp_path) not in json.dumps(summary)
    for name, counts in summary["splits"].items():
        shards = list((tmp_path / "out" / name).iterdir())
        size = sum(path.stat().st_size for path in shards)
        samples = len(read(tmp_path / "out")[name])
        assert counts == {"samples": samples, "images": samples, "shards": len(shards), "bytes": size}
        assert re.search(rf"^{name} +{samples} +{samples} +{len(shards)} +{size / 1e6:.2f}$", out, re.M)
    assert not (tmp_path / "out" / "skipped.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out", "rows.csv"]
    pack("--captions", "rows.csv", "--metadata", "false", out="bare")
    assert all("json" not in members for members in merged(tmp_path / "bare").values())


def test_the_webdataset_package_reads_the_shards(pack, images: Path, tmp_path: Path) -> None:
    import webdataset

    rows = furniture(images, 12)
    pack("--captions", write_csv(tmp_path / "rows.csv", rows), "--max_shard_count", 3)
    found = []
    for name in ("train", "validation", "test"):
        shards = sorted(map(str, (tmp_path / "out" / name).glob("*.tar")))
        for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil"):
            (kind,) = {"jpg", "png", "webp"} & set(sample)
            assert sample[kind].size == (12, 12)
            assert sample["txt"] == sample["json"]["caption"]
            found.append(sample["txt"])
    assert sorted(found) == sorted(row["caption"] for row in rows)


@pytest.mark.launch
def test_bytes_do_not_depend_on_workers_row_order_or_the_moment(images: Path, tmp_path: Path, pack) -> None:
    rows = furniture(images, 30)
    (images / "chairs" / "broken.png").write_bytes(picture(1)[:200])
    rows.append({**rows[0], "image": "chairs/broken.png"})
    flags = ("--captions", write_csv(tmp_path / "rows.csv", rows), "--max_shard_count", "7")
    done = launch(TOOL, "--images", "images", "--output_dir", "two", "--num_workers", "2", *flags, cwd=tmp_path)
    assert "checking: 0 of 31 images" in done.out
    pack(*flags, out="none")
    assert files(tmp_path / "two") == files(tmp_path / "none")
    write_csv(tmp_path / "rows.csv", rows[::-1])
    pack(*flags, out="reversed")
    tars = [{k: v for k, v in files(tmp_path / n).items() if k.endswith("tar")} for n in ("none", "reversed")]
    assert tars[0] == tars[1]
    pack(*flags, "--seed", 43, out="other")
    assert read(tmp_path / "other") != read(tmp_path / "none")


def test_samples_are_mixed(pack, images: Path, tmp_path: Path) -> None:
    rows = furniture(images, 60)
    flags = ("--captions", write_csv(tmp_path / "rows.csv", rows), "--validation_fraction", 0, "--test_fraction", 0)
    pack(*flags)
    order = [int(members["txt"].decode().split()[-1]) for members in read(tmp_path / "out")["train"].values()]
    assert sorted(order) == list(range(60))
    assert abs(np.corrcoef(order, range(60))[0, 1]) < 0.5


def test_no_picture_is_on_two_sides(pack, images: Path, tmp_path: Path) -> None:
    rows = furniture(images, 40)
    for number in range(0, 40, 2):  # byte-identical under another name, and in another row
        copy = add_picture(images, f"copies/{number}.jpg", (images / rows[number]["image"]).read_bytes())
        rows += [{**rows[number], "image": copy}, {**rows[number], "caption": f"again {number}"}]
    flags = ("--validation_fraction", 0.3, "--test_fraction", 0.3)
    pack("--captions", write_csv(tmp_path / "rows.csv", rows), *flags)
    found = sides(tmp_path / "out")
    assert len(found) == 40
    assert {len(names) for names in found.values()} == {1}
    assert set.union(*found.values()) == {"train", "validation", "test"}
    counts = json.loads((tmp_path / "out" / "shards.json").read_text())["splits"].values()
    assert sum(row["images"] for row in counts) == 40
    assert sum(row["samples"] for row in counts) == 80


def test_fractions_hold_approximately_and_more_pictures_move_none(pack, images: Path, tmp_path: Path) -> None:
    rows = furniture(images, 120)
    flags = ("--validation_fraction", 0.2, "--test_fraction", 0.3)
    pack("--captions", write_csv(tmp_path / "rows.csv", rows), *flags)
    before, keys = sides(tmp_path / "out"), set(merged(tmp_path / "out"))
    counts = {name: len(samples) for name, samples in read(tmp_path / "out").items()}
    assert counts["test"] == pytest.approx(36, abs=20)  # four standard deviations
    assert counts["validation"] == pytest.approx(24, abs=17)
    rows = furniture(images, 60, first=120) + rows
    pack("--captions", write_csv(tmp_path / "rows.csv", rows), *flags, "--overwrite")
    after = sides(tmp_path / "out")
    assert len(after) == 180
    assert {data: after[data] for data in before} == before
    assert keys < set(merged(tmp_path / "out"))


@pytest.mark.parametrize("seed", range(4))
def test_every_wanted_side_has_a_picture(seed: int, pack, images: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "rows.csv", furniture(images, 3))
    few = ("--captions", table, "--seed", seed, "--validation_fraction", 0.02, "--test_fraction", 0.02)
    pack(*few)
    assert {name: len(samples) for name, samples in read(tmp_path / "out").items()} == {
        "train": 1, "validation": 1, "test": 1,
    }  # fmt: skip
    pack(*few, "--test_fraction", 0, "--overwrite")
    assert set(read(tmp_path / "out")) == {"train", "validation"}
    table = write_csv(tmp_path / "rows.csv", furniture(images, 2))
    with pytest.raises(UserError, match=r"2 different images.*--test_fraction 0"):
        pack("--captions", table, out="new")


def test_a_split_column_wins_and_leaks_are_left_out(pack, images: Path, tmp_path: Path) -> None:
    words = ["train", "val", "Test", "validation"]
    rows = [{**row, "split": words[number % 4]} for number, row in enumerate(furniture(images, 20))]
    copy = add_picture(images, "copy.jpg", (images / rows[2]["image"]).read_bytes())  # a test picture
    rows.append({**rows[0], "image": copy, "caption": "leak"})
    _, err = pack("--captions", write_csv(tmp_path / "rows.csv", rows), "--split_column", "split")
    found = read(tmp_path / "out")
    assert {name: len(samples) for name, samples in found.items()} == {"train": 5, "validation": 10, "test": 5}
    for name, samples in found.items():
        given = {json.loads(members["json"])["split"].lower() for members in samples.values()}
        assert given <= {name, name[:3]}
    assert re.search(r"rows\.csv row 21 .*: copy\.jpg: the same image is in test too", err)
    rows[6]["split"] = "holdout"
    with pytest.raises(UserError, match=r"rows\.csv row 7 .*'holdout'.*train, validation"):
        pack("--captions", write_csv(tmp_path / "rows.csv", rows), "--split_column", "split", out="new")
    rows = [{**row, "split": "" if number else "test"} for number, row in enumerate(rows[:20])]
    pack("--captions", write_csv(tmp_path / "rows.csv", rows), "--split_column", "split", out="blank")
    assert rows[0]["caption"] in {members["txt"].decode() for members in read(tmp_path / "blank")["test"].values()}
    assert len(merged(tmp_path / "blank")) == 20


def test_several_captions_of_one_picture(pack, images: Path, tmp_path: Path) -> None:
    rows = furniture(images, 3)
    rows += [{**rows[1], "caption": "second"}, {**rows[1], "caption": "third"}]
    pack("--captions", write_csv(tmp_path / "rows.csv", rows))
    numbered = {key: members["txt"].decode() for key, members in merged(tmp_path / "out").items()}
    (base,) = (key for key, text in numbered.items() if text == rows[1]["caption"])
    assert (numbered[f"{base}_1"], numbered[f"{base}_2"]) == ("second", "third")
    rows[3]["caption"] = " "  # the third keeps its key
    _, err = pack("--captions", write_csv(tmp_path / "rows.csv", rows), out="new")
    assert {key: members["txt"].decode() for key, members in merged(tmp_path / "new").items()} == {
        key: text for key, text in numbered.items() if text != "second"
    }
    assert "row 4" in err and "caption is empty" in err


def test_names_that_become_alike_have_keys_of_their_own(pack, images: Path, tmp_path: Path) -> None:
    names = ["a/b.png", "a_b.png", "a b.png", "a.b.png", "A/B.png", "椅子.png", "стул.png", "x" * 180 + ".png"]
    rows = [{"image": add_picture(images, name, picture(n)), "caption": name} for n, name in enumerate(names)]
    rows[0]["image"] = ".\\a\\b.png"
    rows.append({"image": str(images / "a b.png"), "caption": "absolute"})
    pack("--captions", write_csv(tmp_path / "rows.csv", rows))
    content = merged(tmp_path / "out")
    assert {members["txt"].decode() for members in content.values()} == {*names, "absolute"}
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) for key in content)
    (key,) = (key for key, members in content.items() if members["txt"] == b"absolute")
    assert content[key.removesuffix("_1")]["txt"] == b"a b.png"


def test_templates(pack, images: Path, tmp_path: Path) -> None:
    rows = furniture(images, 30)
    rows[4]["color"] = ""
    table = write_csv(tmp_path / "rows.csv", rows)
    _, err = pack("--captions", table, "--caption_template", "a {color} {kind} {{new}}", out="one")
    assert captions(tmp_path / "one") == sorted(f"a {row['color']} chair {{new}}" for row in rows if row["color"])
    assert re.search(r"rows\.csv row 5 .*: color is empty", err)

    two = ("--captions", table, "--caption_template", "a {color} {kind}", "this is a {kind}")
    pack(*two, out="drawn")
    drawn = {key: members["txt"] for key, members in merged(tmp_path / "drawn").items()}
    assert len(drawn) == 30
    assert 5 < sum(text == b"this is a chair" for text in drawn.values()) < 26
    write_csv(tmp_path / "rows.csv", rows[::-1])
    pack(*two, out="again")
    assert {key: members["txt"] for key, members in merged(tmp_path / "again").items()} == drawn
    pack(*two, "--seed", 1, out="seed")
    assert {key: members["txt"] for key, members in merged(tmp_path / "seed").items()} != drawn
    pack(*two, "--all_templates", out="all")
    assert len(merged(tmp_path / "all")) == 59
    assert {len(names) for names in sides(tmp_path / "all").values()} == {1}

    for template, part in {"a {colour}": "no column 'colour'", "a {color": "expected '}'", "{color!r}": "only column",
                           "{}": "only column"}.items():  # fmt: skip
        with pytest.raises(UserError, match=re.escape(part)):
            pack("--captions", table, "--caption_template", template, out="bad")


def test_files_beside_the_pictures(pack, images: Path, tmp_path: Path) -> None:
    for number in range(6):
        add_picture(images, f"{number}.JPG", picture(number, "JPEG"))
    for number in range(4):
        (images / f"{number}.txt").write_text(f"\ufeffpicture {number}\nStuhl für 2\n", encoding="utf-8")
    (images / "3.json").write_text('{"color": "red", "price": NaN}')
    (images / "4.json").write_text('{"color": "blue"}')
    (images / "notes.md").write_text("no picture")
    add_picture(images, ".cache/6.jpg", picture(6))
    _, err = pack()
    assert captions(tmp_path / "out") == [f"picture {number}\nStuhl für 2" for number in range(4)]
    assert "4.JPG: caption is empty" in err
    assert "5.JPG: no caption beside it (5.txt or 5.json)" in err
    (rest,) = (m for m in merged(tmp_path / "out").values() if m["txt"].startswith(b"picture 3"))
    assert json.loads(rest["json"])["color"] == "red"
    assert b"NaN" not in rest["json"]
    pack("--caption_template", "a {color} thing", "--test_fraction", 0, out="filled")
    assert captions(tmp_path / "filled") == ["a blue thing", "a red thing"]
    pack("--caption_template", "{color}: {caption}", "--test_fraction", 0, "--validation_fraction", 0, out="both")
    assert captions(tmp_path / "both") == ["red: picture 3\nStuhl für 2"]
    (images / "2.txt").write_bytes(b"\xff\xfe\xff")
    (images / "3.json").write_text("{")
    with pytest.raises(
        UserError, match=r"2 different images for train, validation, test.*4 rows were left out.*2\.JPG"
    ):
        pack(out="faults")
    _, err = pack("--test_fraction", 0, out="faults")
    assert "2.JPG: 2.txt beside it: " in err
    assert "3.JPG: 3.json beside it: " in err


def test_what_cannot_be_packed_is_named(pack, images: Path, tmp_path: Path) -> None:
    rows = furniture(images, 8)
    whole = picture(3, "JPEG", 64)
    (images / rows[0]["image"]).write_bytes(whole[: len(whole) // 2])
    (images / rows[1]["image"]).write_bytes(b"")
    (images / rows[2]["image"]).write_bytes(picture(2, "GIF"))
    (images / rows[3]["image"]).unlink()
    rows[4]["image"] = "../rows.csv"
    rows[5]["image"] = ""
    rows += furniture(images, 5, first=20)
    _, err = pack("--captions", write_csv(tmp_path / "rows.csv", rows), "--caption_template", "{kind} {color}")
    reasons = ["broken image (image file is truncated", "the file is empty", "not a JPEG, PNG or WebP",
               "no such file", "lies outside of images", "image is empty"]  # fmt: skip
    said = (tmp_path / "out" / "skipped.txt").read_text()
    for number, reason in enumerate(reasons, start=1):
        pattern = rf"rows\.csv row {number} \(line \d+\): .*{re.escape(reason)}"
        assert re.search(pattern, err) and re.search(pattern, said)
    assert len(said.splitlines()) == 6
    assert len(merged(tmp_path / "out")) == 7
    assert json.loads((tmp_path / "out" / "shards.json").read_text())["left_out"] == 6
    pack("--captions", "rows.csv", "--verify", "false", out="trusting")
    assert len(merged(tmp_path / "trusting")) == 8  # the broken JPEG too

    rows += [{**rows[-1], "image": f"none{number}.jpg"} for number in range(20)]
    out, err = pack("--captions", write_csv(tmp_path / "rows.csv", rows), "--overwrite")
    assert len(err.splitlines()) == 11
    assert err.splitlines()[-1] == "... and 16 more"
    assert f"26 left out, all named in {Path('out', 'skipped.txt')}" in out
    assert len((tmp_path / "out" / "skipped.txt").read_text().splitlines()) == 26


def test_an_extension_that_lies_is_put_right(pack, images: Path, tmp_path: Path) -> None:
    rows = [{"image": add_picture(images, f"{n}.jpeg", picture(n, kind)), "caption": kind}
            for n, kind in enumerate(["JPEG", "PNG", "WEBP"])]  # fmt: skip
    pack("--captions", write_csv(tmp_path / "rows.csv", rows))
    kinds = {members["txt"].decode(): set(members) - {"txt", "json"} for members in merged(tmp_path / "out").values()}
    assert kinds == {"JPEG": {"jpg"}, "PNG": {"png"}, "WEBP": {"webp"}}


def test_limits_of_a_shard(pack, images: Path, tmp_path: Path) -> None:
    rows = furniture(images, 50)
    add_picture(images, "large.png", picture(99, "PNG", 200))  # 120 kB alone
    rows.append({**rows[0], "image": "large.png"})
    flags = ("--captions", write_csv(tmp_path / "rows.csv", rows), "--validation_fraction", 0, "--test_fraction", 0)
    pack(*flags, "--max_shard_count", 8, out="count")
    shards = sorted((tmp_path / "count" / "train").iterdir())
    assert [shard.name for shard in shards] == [f"{number:05d}.tar" for number in range(7)]
    assert [shard.read_bytes().count(b"ustar") // 3 for shard in shards] == [8] * 6 + [3]
    pack(*flags, "--max_shard_mb", 0.05, out="size")
    sizes = sorted(path.stat().st_size for path in (tmp_path / "size" / "train").iterdir())
    assert sizes[-1] > 120_000
    assert sizes[-2] <= 50_000
    assert np.median(sizes) > 40_000  # and not one sample each
    assert len(merged(tmp_path / "size")) == 51


@pytest.mark.parametrize("name", ["a.tsv", "a.json", "a.jsonl", "a.parquet"])
def test_every_table_format(name: str, pack, images: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"file_name": row["image"], "text": row["caption"]} for row in furniture(images, 5)]
    rows[2]["text"] = "" if name == "a.tsv" else None
    if name == "a.tsv":
        write_csv(tmp_path / name, rows)
    elif name == "a.parquet":
        pq.write_table(pa.Table.from_pylist([{**row, "raw": b"\x00", "x": float("nan")} for row in rows]), name)
    else:
        lines = [json.dumps(row) for row in rows]
        text = "[" + ",".join(lines) + "]" if name == "a.json" else "\n".join(lines)
        (tmp_path / name).write_text(text)
    _, err = pack("--captions", name, "--image_column", "file_name", "--caption_column", "text")
    assert captions(tmp_path / "out") == sorted(row["text"] for row in rows if row["text"])
    assert re.search(rf"{re.escape(name)} row 3.*text is empty", err)
    for members in merged(tmp_path / "out").values():
        assert json.loads(members["json"], parse_constant=pytest.fail)["text"] == members["txt"].decode()
        assert b"raw" not in members["json"]


def test_odd_captions_in_json(pack, images: Path, tmp_path: Path) -> None:
    rows = furniture(images, 6)
    for row, caption in zip(rows, ["\ud800", 7, ["a"]], strict=False):
        row["caption"] = caption
    (tmp_path / "a.json").write_text(json.dumps(rows))
    _, err = pack("--captions", "a.json")
    assert len(merged(tmp_path / "out")) == 3
    for part in (
        "row 1: the caption holds half a character",
        "row 2: caption is 7, not a text",
        "row 3: caption is ['a']",
    ):
        assert part in err


@pytest.mark.parametrize("seed", range(3))
def test_random_captions_survive(seed: int, pack, images: Path, tmp_path: Path) -> None:
    rng = random.Random(seed)
    rows = furniture(images, 20)
    for row in rows:
        points = [rng.choice([rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x110000)]) for _ in range(30)]
        row["caption"] = "x" + "".join(map(chr, points)) + "x"
    pack("--captions", write_csv(tmp_path / "rows.csv", rows))
    assert captions(tmp_path / "out") == sorted(row["caption"] for row in rows)


def test_existing_output_is_kept_unless_it_is_ours_and_asked_for(pack, images: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "rows.csv", furniture(images, 10))
    (tmp_path / "out").mkdir()
    pack("--captions", table)  # an empty folder is as good as none
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match="not empty: --overwrite"):
        pack("--captions", table, "--seed", 1)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        pack("--captions", table, "--seed", 1, "--overwrite")
    (tmp_path / "out" / "notes.txt").unlink()
    assert files(tmp_path / "out") == before
    pack("--captions", table, "--seed", 1, "--overwrite")
    assert json.loads((tmp_path / "out" / "shards.json").read_text())["seed"] == 1
    for content in ('{"made_by": "another"}', "[]", "{"):
        (tmp_path / "theirs").mkdir(exist_ok=True)
        (tmp_path / "theirs" / "shards.json").write_text(content)
        with pytest.raises(UserError, match="not made by this tool"):
            pack("--captions", table, "--overwrite", out="theirs")
        assert files(tmp_path / "theirs") == {"shards.json": content.encode()}
    for place, part in {"images": "holds the images", ".": "holds the images", "rows.csv": "is a file"}.items():
        with pytest.raises(UserError, match=part):
            pack("--captions", table, "--overwrite", out=place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out", "rows.csv", "theirs"]


def test_a_failure_while_writing_leaves_nothing_and_keeps_the_old(
    pack, images: Path, tmp_path: Path, monkeypatch
) -> None:
    table = write_csv(tmp_path / "rows.csv", furniture(images, 10))
    pack("--captions", table)
    before = files(tmp_path / "out")
    module = sys.modules["make_shards"]
    check = module.check_images

    def then_change(*args):
        found = check(*args)
        next(images.glob("*/*.jpg")).write_bytes(picture(77, "JPEG"))
        return found

    monkeypatch.setattr(module, "check_images", then_change)
    with pytest.raises(UserError, match="changed while it was being packed"):
        pack("--captions", table, "--overwrite")
    assert files(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out", "rows.csv"]


@pytest.mark.launch
def test_mistakes_end_in_one_line(pack, images: Path, tmp_path: Path) -> None:
    rows = furniture(images, 4)
    table = write_csv(tmp_path / "rows.csv", rows)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").touch()
    write_csv(tmp_path / "gone.csv", [{**row, "image": "no.jpg"} for row in rows])
    faults = {
        ("--images", "nowhere"): "--images nowhere: no such folder",
        ("--images", "empty"): "--images empty: no image in it",
        (): "nothing to pack: all 4 rows are left out, the first one is chairs/no 0.v2.jpg: no caption beside it",
        ("--captions", "row.csv"): "did you mean rows.csv",
        ("--captions", "empty.csv"): "empty.csv: the file is empty",
        ("--captions", "gone.csv"): "all 4 rows are left out, the first one is gone.csv row 1 (line ",
        ("--captions", table, "--caption_column", "titel"): "no column 'titel'; there are image, caption, color, kind",
        ("--captions", table, "--split_column", "fold"): "no column 'fold'",
        ("--captions", table, "--test_fraction", "0.95"): "below 1 together",
        ("--captions", table, "--max_shard_count", "0"): "--max_shard_count 0: at least 1",
        ("--captions", table, "--all_templates"): "--all_templates needs --caption_template",
        ("--captions", table, "--imags", "x"): "did you mean --images",
    }
    for flags, part in faults.items():
        with pytest.raises(UserError) as caught:
            pack(*flags)
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)
    done = launch(
        TOOL, "--images", "images", "--output_dir", "out", "--captions", "gone.csv", cwd=tmp_path, check=False
    )
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("error: nothing to pack")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
