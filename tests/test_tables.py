"""Readers of labelled text: every format gives the same table, and every fault is named with its file and row."""

from __future__ import annotations

import csv
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT, launch, script_module
from made_data import make_rows, write_json

from accelerando.base.errors import UserError
from accelerando.data.splits import stratified_split
from accelerando.data.tables import encode_labels, label_names, read_text_table

ODD = ["NA", "null", "123", "a,b", 'say "hi"', "two\nlines", "tab\there", "naïve 😀", "  padded ", "-1"]


def odd_rows(count: int, seed: int, numbers: bool) -> list[dict]:
    rng = random.Random(seed)
    labels = [0, 3, 12] if numbers else ["NA", "x y", "1e3"]
    return [{"text": rng.choice(ODD) + str(number), "label": rng.choice(labels)} for number in range(count)]


def save(rows: list[dict], path: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["label", "text"], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "saved"])
def test_every_format_gives_the_same_table(name: str, numbers: bool, tmp_path: Path) -> None:
    rows = odd_rows(57, 1, numbers)
    table = read_text_table(save(rows, tmp_path / name))
    assert table.texts.to_pylist() == [row["text"] for row in rows]
    assert table.labels.to_pylist() == [row["label"] for row in rows]
    names = label_names(table)
    assert names == (["0", "3", "12"] if numbers else ["1e3", "NA", "x y"])
    assert [names[code] for code in encode_labels(table, names)] == [str(row["label"]) for row in rows]


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet"])
def test_a_column_is_read_as_one_thing_only(name: str, tmp_path: Path) -> None:
    source = save(odd_rows(3, 1, False), tmp_path / name)
    for columns in ({"text_pair_column": "label"}, {"text_pair_column": "text"}, {"label_column": "text"}):
        with pytest.raises(UserError, match="is named twice"):
            read_text_table(source, **columns)


def test_other_columns_pairs_and_no_labels(tmp_path: Path) -> None:
    rows = [
        {"premise": "a", "hypothesis": "", "gold": "yes", "id": 3},
        {"premise": "c", "hypothesis": "d", "gold": "no"},
    ]
    path = save(rows, tmp_path / "a.jsonl")
    table = read_text_table(path, text_column="premise", text_pair_column="hypothesis", label_column="gold")
    assert table.pairs.to_pylist() == ["", "d"]
    alone = read_text_table(path, text_column="premise", require_labels=False)
    assert alone.labels is None
    assert alone.take(np.array([1])).texts.to_pylist() == ["c"]


def test_a_large_file_is_packed_in_chunks(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    with open(path, "w") as file:
        for number in range(150_000):
            file.write(f'{{"text": "t{number}", "label": {number % 7}}}\n')
    table = read_text_table(str(path))
    assert len(table) == 150_000
    assert table.texts[149_999].as_py() == "t149999"
    assert table.texts.num_chunks == 3


GOOD = '{"text": "a", "label": 1}\n'
FAULTS = {
    "no_such.json": (None, ["no such file"]),
    "empty.json": ("", ["empty"]),
    "none.json": ("[]", ["no rows"]),
    "blank.jsonl": ("\n\n", ["no rows"]),
    "cut.json": ('[{"text": "a",\n "label": 1},\n {"text"', ["line 3", "invalid JSON"]),
    "cut.jsonl": (GOOD * 2 + '{"text": \n', ["line 3", "invalid JSON"]),
    "number.json": ("17", ["list"]),
    "strings.json": ('["a", "b"]', ["row 1", "object"]),
    "no_text.jsonl": (GOOD + "\n" + '{"label": 1}\n', ["row 2 (line 3)", "'text'"]),
    "no_label.jsonl": (GOOD * 3 + '{"text": "b"}\n', ["row 4", "'label'"]),
    "null.jsonl": (GOOD + '{"text": null, "label": 1}\n', ["row 2", "text is empty"]),
    "white.jsonl": (GOOD + '{"text": " \\t", "label": 1}\n', ["row 2", "text is empty"]),
    "list.jsonl": (GOOD + '{"text": ["a"], "label": 1}\n', ["row 2", "not a text"]),
    "float.jsonl": (GOOD + '{"text": "a", "label": 1.5}\n', ["row 2", "1.5", "whole number"]),
    "bool.jsonl": ('{"text": "a", "label": true}\n', ["row 1", "True"]),
    "mixed.jsonl": (GOOD + '{"text": "a", "label": "x"}\n', ["row 2", "'x'", "whole number as in other rows"]),
    "big.jsonl": ('{"text": "a", "label": 99999999999999999999}\n', ["64 bits"]),
    "surrogate.jsonl": ('{"text": "\\ud800", "label": 1}\n', ["surrogate"]),
    "latin.jsonl": (GOOD.encode() + b'{"text": "\xe9", "label": 1}\n', ["line 2", "UTF-8"]),
    "latin.json": (b'[{"text": "\xe9", "label": 1}]', ["UTF-8", "byte 11"]),
    "ragged.csv": ("text,label\na,1\nb,c,2\n", ["row 2 (line 3)", "3 fields, but 2"]),
    "columns.csv": ("body,label\na,1\n", ["no column 'text'", "body, label"]),
    "header.csv": ("text,label\n", ["no rows"]),
    "quote.csv": ('text,label\n"a"b,1\n', ["line 2", "invalid CSV"]),
    "hole.csv": ("text,label\na,1\nb,\n", ["row 2 (line 3)", "label is empty"]),
    "twice.csv": ("text,label,text\na,1,b\n", ["two columns", "'text'"]),
    "deep.jsonl": (GOOD + "[" * 100_000 + "\n", ["line 2", "invalid JSON"]),
    "digits.jsonl": ('{"text": "a", "label": ' + "9" * 5000 + "}\n", ["line 1", "invalid JSON"]),
    "rubbish.parquet": ("PAR1 or not", ["not a valid Parquet file"]),
    "what.xyz": ("text", ["what.xyz"]),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_faults_are_one_line_with_file_and_row(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    content, parts = FAULTS[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_text_table(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in [name, *parts]), message


def test_a_fault_late_in_a_parquet_file_is_found(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["a"] * 5000
    for bad, column, part in ((None, "text", "row 4243: text is empty"), (None, "label", "row 4243: label is empty")):
        columns = {"text": list(texts), "label": list(texts)}
        columns[column][4242] = bad
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=part):
            read_text_table(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"text": texts, "label": [0.5] * 5000}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="double"):
        read_text_table(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"text": texts, "label": pa.array([2**63] * 5000, pa.uint64())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="64 bits"):
        read_text_table(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"text": texts, "label": ["x", " "] * 2500}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 2: label is empty"):
        read_text_table(str(tmp_path / "a.parquet"))
    encoded = pa.array(texts).dictionary_encode()
    pq.write_table(pa.table({"text": encoded, "label": encoded}), tmp_path / "a.parquet")
    assert len(read_text_table(str(tmp_path / "a.parquet"))) == 5000


def test_a_misspelt_file_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(UserError, match=r"did you mean .*train\.json"):
        read_text_table(str(tmp_path / "trian.json"))
    with pytest.raises(UserError, match=r"did you mean .*train\.json"):
        read_text_table(str(tmp_path / "train.jsn"))


def test_labels_that_only_look_like_numbers_stay_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,007\nb,7\n")
    assert label_names(read_text_table(str(tmp_path / "a.csv"))) == ["007", "7"]


@pytest.mark.parametrize("seed", range(5))
def test_a_stratified_split_is_fair_and_repeatable(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice(5, 300, p=[0.5, 0.3, 0.15, 0.04, 0.01])
    labels[0] = 9  # a class of one row
    fraction = float(rng.uniform(0.05, 0.6))
    rest, held = stratified_split(labels, fraction, seed)
    assert sorted([*rest, *held]) == list(range(300))
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        share = (labels[held] == label).sum()
        assert abs(share - fraction * count) <= 1
        if count > 1:
            assert 1 <= share < count
    assert 0 in rest
    assert all(
        np.array_equal(a, b) for a, b in zip((rest, held), stratified_split(labels, fraction, seed), strict=True)
    )
    assert not np.array_equal(held, stratified_split(labels, fraction, seed + 1)[1])


def test_tokenised_text_is_kept_and_kept_apart(tmp_path: Path, tiny_bert: Path) -> None:
    from transformers import AutoTokenizer

    from accelerando.data.tokens import tokenize_table

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    table = read_text_table(str(write_json(tmp_path / "a.json", make_rows(70, 1))))
    first = tokenize_table(table, tokenizer, 20, cache=tmp_path / "cache")
    for row in (0, 33, 69):
        expected = tokenizer(table.texts[row].as_py(), truncation=True, max_length=20)["input_ids"]
        assert first[row]["input_ids"].tolist() == expected
    (folder,) = (path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir())
    stamp = (folder / "ids.npy").stat().st_mtime_ns
    again = tokenize_table(table, tokenizer, 20, cache=tmp_path / "cache")
    assert np.array_equal(first.ids, again.ids)
    assert (folder / "ids.npy").stat().st_mtime_ns == stamp
    assert isinstance(again.ids, np.memmap)
    os.truncate(folder / "ids.npy", 200)
    assert np.array_equal(first.offsets, tokenize_table(table, tokenizer, 20, cache=tmp_path / "cache").offsets)
    assert (folder / "ids.npy").stat().st_size > 200  # damaged, so it is made again
    tokenize_table(table, tokenizer, 21, cache=tmp_path / "cache")
    tokenize_table(table.take(np.arange(69)), tokenizer, 20, cache=tmp_path / "cache")
    assert len([path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]) == 3


PREPROCESS = ROOT / "tools" / "preprocess_text.py"


@pytest.mark.launch
def test_preprocessing_cleans_splits_and_says_what_it_dropped(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = [{"text": f"{row['text']} {number}", "label": row["label"]} for number, row in enumerate(make_rows(100, 1))]
    rows += [{"text": "a  b\u00a0c\x07", "label": "sport"}, {"text": "a b c", "label": "sport"}]
    rows += [
        {"text": "cafe\u0301", "label": "money"},
        {"text": "same", "label": "money"},
        {"text": "same", "label": "space"},
    ]
    write_json(raw / "part1.json", rows)
    save([{"text": "<b>bold</b> &amp; http://x.y/z more", "label": "space"}], raw / "part2.csv")
    flags = ("--input_dir", "raw", "--output_dir", "out", "--val_fraction", "0.2", "--test_fraction", "0.1")
    done = launch(PREPROCESS, *flags, "--strip_html", "--strip_urls", cwd=tmp_path)
    splits = {
        name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("train", "validation", "test")
    }
    texts = [row["text"] for split in splits.values() for row in split]
    assert len(texts) == len(set(texts)) == 103
    assert {"a b c", "café", "bold & more"} <= set(texts)
    assert "same" not in texts
    assert len(splits["validation"]) == pytest.approx(0.2 * 103, abs=3)
    assert len(splits["test"]) == pytest.approx(0.1 * 103, abs=3)
    assert "2  same text, different labels" in done.out
    assert "1  repeated" in done.out
    assert (tmp_path / "out" / "summary.txt").read_text() in done.out
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["money", "space", "sport"]
    again = launch(PREPROCESS, *flags, cwd=tmp_path, check=False)
    assert (again.code, "--overwrite" in again.err) == (2, True)
    launch(PREPROCESS, *flags, "--overwrite", "--lowercase", "--min_length", "5", "--max_chars", "60", cwd=tmp_path)
    kept = json.loads((tmp_path / "out" / "train.json").read_text())
    assert all(5 <= len(row["text"]) <= 60 for row in kept)
    assert len(read_text_table(str(tmp_path / "out" / "train.json"))) == len(kept)


def test_preprocessing_shares_a_file_of_settings_with_training(tmp_path: Path, call_tool) -> None:
    """max_length counts tokens there; here it drops no text."""
    tool = script_module(PREPROCESS)
    (tmp_path / "raw").mkdir()
    write_json(tmp_path / "raw" / "a.json", make_rows(40, 1))
    (tmp_path / "data.yaml").write_text("data: {max_length: 8, text_column: text}\n")
    flags = ("--input_dir", tmp_path / "raw", "--config", tmp_path / "data.yaml", "--output_dir")
    code, _, error = call_tool(tool, *flags, tmp_path / "out")
    assert (code, error) == (0, f"{tmp_path / 'data.yaml'}: data.max_length {tool.FOREIGN['max_length']}\n")
    rows = [
        row
        for name in ("train", "validation", "test")
        for row in json.loads((tmp_path / "out" / f"{name}.json").read_text())
    ]
    assert len(rows) == len({row["text"] for row in make_rows(40, 1)})
    code, _, error = call_tool(tool, *flags, tmp_path / "short", "--max_length", "8")
    assert (code, error) == (2, "error: --max_length counts tokens, in training; here max_chars drops long texts\n")
    code, _, error = call_tool(tool, *flags, tmp_path / "data.yaml" / "out")
    assert code == 2 and "data.yaml is not a folder; name another path" in error


@pytest.mark.launch
def test_preprocessing_keeps_given_splits_and_removes_leaks(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = [{"text": f"{row['text']} {number}", "label": row["label"]} for number, row in enumerate(make_rows(40, 2))]
    write_json(raw / "train.json", rows)
    write_json(raw / "test.json", rows[:5])
    (raw / "config.yaml").write_text("data: {input_dir: raw, output_dir: out, val_fraction: 0.25}\n")
    launch(PREPROCESS, "--config", "raw/config.yaml", cwd=tmp_path)
    sizes = {
        name: len(json.loads((tmp_path / "out" / f"{name}.json").read_text()))
        for name in ("train", "validation", "test")
    }
    assert sizes["test"] == 5
    assert sizes["train"] + sizes["validation"] == 35
    missing = launch(PREPROCESS, "--input_dir", "nowhere", cwd=tmp_path, check=False)
    assert missing.code == 2
    assert missing.err.startswith("error: --input_dir nowhere")


@pytest.mark.launch
def test_preprocessing_deletes_nothing_else_and_splits_no_text(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = [{"text": f"text {number // 2}", "label": number % 2} for number in range(60)]
    write_json(raw / "train-00000-of-00001.json", [*rows, {"text": " ", "label": 0}])
    write_json(raw / "test-00000-of-00001.json", [{"text": "another", "label": "named"}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    launch(PREPROCESS, "--input_dir", "raw", "--output_dir", "out", "--overwrite", "--keep_conflicts", cwd=tmp_path)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    splits = {
        name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("train", "validation", "test")
    }
    assert [len(split) for split in splits.values()] == [54, 6, 1]
    texts = [{row["text"] for row in split} for split in splits.values()]
    assert not texts[0] & texts[1]
    assert {type(row["label"]) for split in splits.values() for row in split} == {str}
    done = launch(
        PREPROCESS, "--input_dir", "raw", "--output_dir", "new", "--val_fraction", "1.2", cwd=tmp_path, check=False
    )
    assert (done.code, "--val_fraction 1.2" in done.err) == (2, True)


TSV = 'text\tlabel\n"What a film", said one\tpos\n"begins and never ends\tneg\nhe said "no"\tneg\nthe end"\tpos\n'


def test_quotes_in_a_tsv_file_are_characters_unless_they_enclose_fields(tmp_path: Path) -> None:
    def texts(content: str) -> list[str]:
        (tmp_path / "a.tsv").write_text(content)
        return read_text_table(str(tmp_path / "a.tsv")).texts.to_pylist()

    assert texts(TSV) == ['"What a film", said one', '"begins and never ends', 'he said "no"', 'the end"']
    assert texts('text\tlabel\n"a\tpos\nb"\tneg\n') == ['"a', 'b"']
    assert texts('text\tlabel\n"a"\tpos\nb\tneg\n') == ['"a"', "b"]
    assert texts('"text"\t"label"\n"a"\t"pos"\n"b"\t"neg"\n') == ["a", "b"]
    assert texts('text\tlabel\n"say ""hi"""\tpos\n"a\tb"\tneg\n') == ['say "hi"', "a\tb"]
    with pytest.raises(UserError, match=r"row 2 \(line 3\): 3 fields, but 2 columns"):
        texts('text\tlabel\n"a\tpos\nb\tneg\tmore\nc"\tneg\n')


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        ("a.csv", "text,label\na,pos\nb,pos \nc, neg\n", ["pos", "pos", "neg"]),
        ("a.csv", "text,label\na,1\nb,1.0\n", [1, 1]),
        ("a.csv", "text,label\na,caf\u00e9\nb,cafe\u0301\n", ["café", "café"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 1.0}\n', [1, 1]),
        ("a.csv", "text;label\na;1\nb;0\n", [1, 0]),
        ("a.csv", "text\tlabel\na\t1\nb\t0\n", [1, 0]),
        ("a.json", '{"data": [{"text": "a", "label": 1}, {"text": "b", "label": 0}]}', [1, 0]),
        ("a.json", '{"version": 2,\n "data": [\n{"text": "a", "label": 1},\n{"text": "b", "label": 0}]}', [1, 0]),
        ("a.json", '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n', [1, 0]),
        ("a.json", '{"text": "a", "label": 1, "tags": ["x"]}', [1]),
    ],
)
def test_labels_that_look_the_same_are_one_and_layouts_are_understood(
    name: str, content: str, labels: list, tmp_path: Path
) -> None:
    import gzip

    for path, data in (
        (tmp_path / name, content.encode()),
        (tmp_path / f"{name}.gz", gzip.compress(content.encode())),
    ):
        path.write_bytes(data)
        assert read_text_table(str(path)).labels.to_pylist() == labels


def test_classes_keep_their_names_in_parquet_and_in_saved_sets(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    saved = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    saved.to_parquet(tmp_path / "a.parquet")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "set")
    for source in ("a.parquet", "set"):
        assert read_text_table(str(tmp_path / source)).labels.to_pylist() == ["yes", "no", "yes"]
    with pytest.raises(UserError, match=r"no split 'test'; there are train; name one by its folder: .*set/train"):
        read_text_table(str(tmp_path / "set"), split="test")
    assert len(read_text_table(str(tmp_path / "set" / "train"), split="test")) == 3
    unlabelled = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    unlabelled.to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"row 2: label is empty \(1 of 2 rows; -1 .* stands for none\)"):
        read_text_table(str(tmp_path / "b.parquet"))
    assert len(read_text_table(str(tmp_path / "b.parquet"), require_labels=False)) == 2


def test_unlabelled_rows_say_so(tmp_path: Path) -> None:
    table = read_text_table(save([{"text": "a", "label": 1}, {"text": "b", "label": -1}], tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match=r"row 2: the label is -1, that is, none \(1 of 2 rows\)"):
        encode_labels(table, ["0", "1"])
    assert encode_labels(table, ["-1", "1"]).tolist() == [1, 0]  # where training has it, it is a class


def test_damaged_and_ambiguous_files_are_refused(tmp_path: Path) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    packed = gzip.compress(b"text,label\n" + b"".join(b"row %d,1\n" % number for number in range(500)))
    spoilt = bytearray(packed)
    spoilt[60:70] = b"\xff" * 10  # zlib's error, not gzip's
    offsets = pa.py_buffer(np.array([0, 1, 2], np.int32).tobytes())
    wrong = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff")])
    pq.write_table(pa.table({"text": wrong, "label": [1, 0]}), tmp_path / "wrong.parquet")
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["text", "text", "label"]), tmp_path / "two.parquet")
    cases = {
        "returns.csv": (b"a\rb,text,label\nx,y,1\n", "line 1: invalid CSV"),
        "cut.csv.gz": (packed[:-30], "cut.csv.gz: cannot be read"),
        "spoilt.csv.gz": (bytes(spoilt), "spoilt.csv.gz: cannot be read"),
        "two.jsonl": (b'{"text": "a", "text": "b", "label": 1}\n', "line 1: invalid JSON .*two entries called 'text'"),
        "lists.json": (
            b'{"a": [{"text": "x"}], "b": [{"text": "y"}]}',
            "an object with one; found an object with a, b",
        ),
        "wrong.parquet": (None, "row 2: text is not UTF-8 text"),
        "two.parquet": (None, "two columns are called 'text'"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_text_table(str(tmp_path / name))
