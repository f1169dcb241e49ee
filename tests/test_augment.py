"""Text augmentation: as many words change as the rate says, by seed and key alone; what is scored never changes."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from harness import ROOT, TEXT, history, kill, launch, results, script_module, start, wait_until, weights
from made_data import WORDS

from accelerando.base.errors import UserError
from accelerando.data.augment import TECHNIQUES, AugmentedTexts, TextAugmentation
from accelerando.data.collate import TextCollate
from accelerando.data.digest import describe
from accelerando.data.synonyms import read_synonyms
from accelerando.data.tables import read_text_table
from accelerando.data.tokenizer import open_tokenizer, train_tokenizer
from accelerando.data.tokens import tokenize_table
from accelerando.data.words import STOP_WORDS, distinct_words, split_words
from accelerando.models.neighbours import embedding_neighbours, input_embedding, neighbours_in, whole_words

VOCABULARY = ["".join(letters) + "n" for letters in itertools.product("bdfgk", "aeiou", "bdfgk", "aeiou")]
SYNONYMS = {word: (word + "s", word + " too") for word in VOCABULARY}
TOPIC_SYNONYMS = {word: [f"{topic}word"] for topic, words in WORDS.items() for word in words}


def random_texts(count: int, seed: int) -> list[str]:
    """Texts of 1 to 60 different words, none of them a stop word, with punctuation."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        words = rng.permutation(VOCABULARY)[: int(rng.integers(1, 61))]
        signs = rng.choice(["", "", "", ",", ".", "!", " -"], len(words))
        texts.append(" ".join(word + sign for word, sign in zip(words, signs, strict=True)))
    return texts


def words_of(text: str) -> list[str]:
    found = split_words(text)
    return [found.tokens[place] for place in found.words]


# ------------------------------------------------------------------------------------------------------------- one text


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.34, 0.5, 1.0])
def test_as_many_words_change_as_the_rate_says(rate: float) -> None:
    for number, text in enumerate(random_texts(200, 1)):
        before = words_of(text)
        wanted = max(1, round(rate * len(before)))
        for technique in TECHNIQUES:
            change = TextAugmentation((technique,), rate, SYNONYMS, seed=3).change(text, number)
            after = words_of(change.text.replace(" too", ""))
            assert change.words == len(before)
            if technique == "synonym":
                changed = sum(one != other for one, other in zip(before, after, strict=True)) + change.text.count(
                    " too"
                )
            elif technique == "insert":
                changed = len(after) - len(before)
            elif technique == "delete":
                changed, wanted = len(before) - len(after), min(wanted, len(before) - 1)
                assert all(word in before for word in after)
            else:
                changed = sum(one != other for one, other in zip(before, after, strict=True))
                wanted = max(2, wanted) if len(before) > 1 else 0
                assert sorted(after) == sorted(before)
            assert changed == change.changed == wanted, (technique, text, change.text)
            wanted = max(1, round(rate * len(before)))


def test_every_text_that_can_change_does() -> None:
    augmentation = TextAugmentation(rate=0.1, synonyms={"cat": ("kitten",)}, seed=1)
    texts = [
        "cat",
        "a cat",
        "How are you?",
        "of the",
        "red red blue",
        "Go, go, stop!",
        "[NAME] sees the cat",
        "dogs bark",
    ]
    for text in [*texts, *random_texts(300, 2)[:300]]:
        if len(words_of(text)) > 1 or text == "cat":
            for copy in range(20):
                change = augmentation.change(text, 0, copy)
                assert change.text != text and change.changed > 0, text
    for text in ("", "dog", "the the", "The the THE", "it", "[A] {b} <c>", "12 34", "... !"):
        assert augmentation.change(text, 7).text == text and augmentation.change(text, 7).changed == 0


def test_stop_words_kept_words_and_placeholders_stay() -> None:
    text = (
        "The [FIRST NAME] of <url> is not at http://x.org/cat, said @cat and {cat} at cat@x.org #cat in 1999: the 3 red "
        "cats were \u201cnever\u201d seen by big Dogs (which don\u2019t bark)."
    )
    placeholders = ["[FIRST NAME]", "<url>", "http://x.org/cat,", "@cat", "{cat}", "cat@x.org", "#cat", "1999:", "3"]
    synonyms = dict.fromkeys(("red", "cats", "seen", "big", "dogs", "bark", "said", "not", "the", "cat"), ("other",))
    for technique in TECHNIQUES:
        for copy in range(30):
            done = TextAugmentation((technique,), 0.5, synonyms, keep=("Red", "bark"))(text, copy)
            found = split_words(done)
            kept = [token for place, token in enumerate(found.tokens) if place not in found.words]
            assert kept == placeholders, done
            same = [word.replace("\u2019", "'") for word in words_of(done)]
            for word in ("The", "of", "is", "not", "never", "don't", "red", "bark", "which"):
                assert same.count(word) == [one.replace("\u2019", "'") for one in words_of(text)].count(word), done
            if technique in ("synonym", "delete"):
                assert [word for word in same if word.lower() in STOP_WORDS] == [
                    word
                    for word in (one.replace("\u2019", "'") for one in words_of(text))
                    if word.lower() in STOP_WORDS
                ]
    only_stop_words = TextAugmentation(("synonym", "insert"), 0.5, {"cat": ("the",), "dog": ("Dog",)})
    assert only_stop_words("a cat, a dog", 1) == "a cat, a dog"


def test_capitals_and_punctuation_are_carried_over() -> None:
    replace = TextAugmentation(("synonym",), 1.0, {"fox": ("vixen",), "big": ("large",), "paris": ("Lutetia",)})
    assert replace('"Fox", FOX; a fox (Big).  BIG paris\n', 0) == '"Vixen", VIXEN; a vixen (Large).  LARGE Lutetia\n'
    delete = TextAugmentation(("delete",), 0.01)
    found = {delete("Cats, dogs and mice!", copy) for copy in range(40)}
    assert found == {"dogs and mice!", "Cats, and mice!", "Cats, dogs and!"}


def test_the_same_key_gives_the_same_text_and_another_one_another() -> None:
    texts = random_texts(50, 4)
    augmentation = TextAugmentation(rate=0.2, synonyms=SYNONYMS, seed=5)
    again = TextAugmentation(rate=0.2, synonyms=dict(reversed(SYNONYMS.items())), seed=5)
    for row, text in enumerate(texts):
        assert augmentation(text, row, 0) == again(text, row, 0)
    long = [(row, text) for row, text in enumerate(texts) if len(words_of(text)) > 10]
    for other in (TextAugmentation(rate=0.2, synonyms=SYNONYMS, seed=6), augmentation):
        key = 0 if other is not augmentation else 1
        assert all(other(text, row, key) != augmentation(text, row, 0) for row, text in long)
    assert len(long) > 20
    chosen = {name: TextAugmentation((name,), 0.2, SYNONYMS, 5) for name in TECHNIQUES}
    lengths = {
        name: {len(words_of(chosen[name](text, row))) - len(words_of(text)) for row, text in long} for name in chosen
    }
    assert max(lengths["delete"]) < 0 < min(lengths["insert"]) and lengths["swap"] == {0}
    row, text = long[0]
    drawn = {len(words_of(augmentation(text, row, copy))) - len(words_of(text)) for copy in range(20)}
    assert min(drawn) < 0 in drawn and max(drawn) > 0  # each technique for some copies


def test_a_mistake_in_its_settings_is_one_line() -> None:
    for settings in ({"techniques": ()}, {"techniques": ("shuffle",)}, {"rate": 0}, {"rate": 1.5}):
        with pytest.raises(UserError):
            TextAugmentation(**settings)


# ------------------------------------------------------------------------------------------------------------- synonyms


TABLES = {
    "a.csv": "word,synonyms\nBig,large|huge\nfox,\nred,crimson\n",
    "b.csv": "word,first,second\nbig,large,huge\nred,crimson,\n",
    "c.tsv": "synonyms\tword\nlarge|huge | big\tbig\ncrimson\tred\n",
    "d.json": '{"big": ["large", "huge"], "red": "crimson", "fox": []}',
    "e.json": '[{"word": "big", "synonyms": ["large", "huge"]}, {"word": "red", "synonyms": "crimson"}]',
    "f.jsonl": '{"word": "big", "synonyms": "large|huge"}\n{"word": "red", "synonyms": ["crimson"]}\n',
    "g.json": '{"word": "big", "synonyms": "large|huge"}\n{"word": "red", "synonyms": ["crimson"]}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_synonyms(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TABLES[name])
    assert read_synonyms(str(tmp_path / name)) == {"big": ("large", "huge"), "red": ("crimson",)}


def test_a_parquet_table_of_synonyms(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"word": ["big", "red"], "s": [["large", "huge"], ["crimson"]]}), tmp_path / "a.parquet")
    assert read_synonyms(str(tmp_path / "a.parquet")) == {"big": ("large", "huge"), "red": ("crimson",)}


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.csv", "word,synonyms\nbig,large,huge\n", ["row 1 (line 2)", "3 fields"]),
        ("a.csv", "lemma,synonyms\nbig,large\n", ["no column 'word'"]),
        ("a.csv", "word\nbig\n", ["row 1", "no column of synonyms"]),
        ("a.csv", "word,synonyms\nbig,\n", ["no word with a synonym"]),
        ("a.csv", "word,synonyms\n ,large\n", ["row 1", "word"]),
        ("a.csv", "", ["empty"]),
        ("a.json", '{"big": 3}', ["entry 1", "'big'", "3"]),
        ("a.json", '[{"word": "big", "synonyms": [1]}]', ["row 1", "[1]"]),
        ("a.json", "[", ["invalid JSON"]),
        ("a.jsonl", '{"word": 3, "synonyms": "x"}\n', ["row 1 (line 1)", "3"]),
        ("a.txt", "big large\n", ["not a table"]),
        (None, "", ["no such file"]),
    ],
)
def test_a_broken_table_is_one_line(name: str | None, content: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / (name or "none.csv")
    if name:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_synonyms(str(path))
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    assert all(part in message for part in parts), message


LICENCE = "  1 This software and database is being provided to you, the LICENSEE\n"
NOUNS = (
    "00001740 03 n 02 dog 0 domestic_dog 0 001 @ 00002000 n 0000 | a member of the genus Canis\n"
    "00001900 03 n 03 dog 1 cad 0 Paris_hound 0 000 | someone who is morally reprehensible\n"
    "00002000 03 n 01 animal 0 000 | a living organism\n"
)
NOUN_INDEX = (
    "animal n 1 1 @ 1 1 00002000\n"
    "cad n 1 0 1 0 00001900\n"
    "dog n 2 1 @ 2 1 00001900 00001740\n"
    "domestic_dog n 1 1 @ 1 0 00001740\n"
)
ADJECTIVES = "00003000 00 s 03 galore(ip) 0 abundant 0 plenteous 0 001 & 00003000 a 0000 | in plenty\n"


def make_wordnet(folder: Path, **changed: str) -> Path:
    folder.mkdir(parents=True)
    index = "abundant a 1 0 1 0 00003000\ngalore a 1 0 1 0 00003000\n"
    files = {"data.noun": NOUNS, "index.noun": NOUN_INDEX, "data.adj": ADJECTIVES, "index.adj": index}
    for name, content in {**files, **{name.replace("_", "."): text for name, text in changed.items()}}.items():
        if content:
            (folder / name).write_text(LICENCE + content)
    return folder


def test_the_files_of_wordnet(tmp_path: Path) -> None:
    make_wordnet(tmp_path / "WordNet-3.0" / "dict")
    expected = {
        "dog": ("cad", "Paris hound", "domestic dog"),  # in the order of the index: by how frequent a sense is
        "cad": ("dog", "Paris hound"),
        "domestic dog": ("dog",),
        "abundant": ("galore", "plenteous"),
        "galore": ("abundant", "plenteous"),
    }
    for folder in (tmp_path / "WordNet-3.0", tmp_path / "WordNet-3.0" / "dict"):
        assert read_synonyms(str(folder)) == expected
    augmentation = TextAugmentation(("synonym",), 1.0, expected)
    assert augmentation("Galore of CADS and a dog", 3).startswith(("Abundant of CADS", "Plenteous of CADS"))


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"index_noun": ""}, ["index.noun", "No such file"]),
        ({"data_noun": "00001740 03 n 0z dog 0\n"}, ["data.noun: line 2"]),
        ({"data_noun": "00001740 03 n 05 dog 0\n"}, ["data.noun: line 2"]),
        ({"index_noun": "dog n 1 0 1 0 00009999\n"}, ["index.noun: line 2"]),
        ({"index_noun": "dog n x 0 1 0 00001740\n"}, ["index.noun: line 2"]),
        ({"data_noun": "", "data_adj": ""}, ["no data.noun", "dict/"]),
    ],
)
def test_a_broken_wordnet_is_one_line(changed: dict[str, str], parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_synonyms(str(make_wordnet(tmp_path / "dict", **changed)))
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_neighbours_in_an_embedding(kind: str) -> None:
    texts = ["goal match team player score the win", "bank market stock price the fund", "Goalkeeping 12 x"] * 3
    tokenizer = train_tokenizer(texts, kind, 600)
    ids, names = whole_words(tokenizer, len(tokenizer))
    token = dict(zip(names, ids.tolist(), strict=True))
    assert {"goal", "match", "team", "player", "bank", "market", "stock", "price", "fund"} <= {*names}
    assert not {"the", "12", "x", "[PAD]", "[CLS]"} & {*names}
    assert not any(name.startswith(("##", "Ġ")) for name in names)
    rng = np.random.default_rng(0)
    embedding = 0.01 * rng.standard_normal((len(tokenizer), 40)).astype(np.float32)
    for number, name in enumerate(names[:40]):
        embedding[token[name], number] += 1
    embedding[token["goal"]] = 3 * embedding[token["match"]] + embedding[token["team"]]
    asked = {"goal", "match", "nowhere", "fund", "the"}
    found = neighbours_in(embedding, tokenizer, asked, 8, 0.2)
    assert found == {"goal": ("match", "team"), "match": ("goal",)}
    assert neighbours_in(embedding, tokenizer, asked, 1, 0.2)["goal"] == ("match",)
    assert neighbours_in(embedding, tokenizer, asked, 8, 0.999) == {}
    every = neighbours_in(embedding, tokenizer, names, 3, -1)  # each neighbour is the nearest of all others
    unit = embedding[ids] / np.linalg.norm(embedding[ids], axis=1, keepdims=True)
    cosines = unit @ unit.T - 2 * np.eye(len(ids))
    for name, row in zip(names, cosines, strict=True):
        assert every[name] == tuple(names[place] for place in np.argsort(-row)[:3])


def test_a_models_neighbours_are_computed_once(tiny_bert: Path, tmp_path: Path, monkeypatch) -> None:
    from accelerando.models import neighbours

    words = {"goal", "bank", "moon", "unseen"}
    found = embedding_neighbours(str(tiny_bert), words, min_cosine=0.2, cache=tmp_path)
    embedding, tokenizer = input_embedding(str(tiny_bert)), open_tokenizer(str(tiny_bert))
    assert embedding.shape == (len(tokenizer), 32)
    assert found == neighbours_in(embedding, tokenizer, words, 8, 0.2) and found
    monkeypatch.setattr(neighbours, "input_embedding", None)
    assert embedding_neighbours(str(tiny_bert), words, min_cosine=0.2, cache=tmp_path) == found
    with pytest.raises(TypeError):
        embedding_neighbours(str(tiny_bert), words, min_cosine=0.1, cache=tmp_path)


# ----------------------------------------------------------------------------------------------------------------- tool


@pytest.fixture
def tool() -> ModuleType:
    return script_module(ROOT / "tools" / "augment_text.py")


ROWS = [
    {"id": 3, "text": 'The "quick" fox, said Ann;\njumps over lazy dogs', "label": "animal", "pair": "a red fox"},
    {"id": 1, "text": "banks lend money, markets fall\tquickly", "label": "money", "pair": ""},
    {"id": 7, "text": "fox", "label": "animal", "pair": "a"},
    {"id": 2, "text": "word", "label": "money", "pair": "b"},
]
SOURCE_TABLE = "word,synonyms\nfox,vixen\nquick,fast\nmoney,cash\n"


def write_rows(path: Path, rows: list[dict]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    suffix = path.suffix
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def read_rows(path: Path) -> list[dict]:
    import pyarrow.parquet as pq

    from accelerando.data.table_formats import table_records

    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [record for _, record in table_records(path, [])]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_the_tool_writes_rows_and_copies(suffix: str, tmp_path: Path, tool: ModuleType, call_tool) -> None:
    source = write_rows(tmp_path / f"train{suffix}", ROWS)
    (tmp_path / "synonyms.csv").write_text(SOURCE_TABLE)
    target = tmp_path / "new" / f"more{suffix}"
    flags = ("--input_file", source, "--output_file", target, "--factor", "2", "--synonyms", tmp_path / "synonyms.csv")
    code, out, err = call_tool(tool, *flags, "--text_pair_column", "pair")
    assert code == 0, err
    assert "4 rows in, 10 out" in out and "2 copies could not be changed" in out
    rows = read_rows(target)
    blank = (None, "")
    assert [row["augmented_from"] in blank for row in rows] == [True, False, False] * 3 + [True]
    sources = [row for row in rows if row["augmented_from"] in blank]
    before = read_rows(source)
    assert [{key: row[key] for key in ROWS[0]} for row in sources] == before
    for row in rows:
        if row["augmented_from"] not in blank:
            old = before[int(row["augmented_from"]) - 1]
            assert (row["id"], row["label"]) == (old["id"], old["label"])
            assert row["text"] != old["text"] or row["pair"] != old["pair"]
    table = read_text_table(str(target), text_pair_column="pair")  # a table that the script reads
    assert len(table) == 10 and table.augmented and table.texts.to_pylist() == [row["text"] for row in rows]
    again = call_tool(tool, *flags, "--text_pair_column", "pair")
    assert again[0] == 2 and "--overwrite replaces it" in again[2]
    bytes_before = target.read_bytes()
    assert call_tool(tool, *flags, "--text_pair_column", "pair", "--overwrite")[0] == 0
    assert target.read_bytes() == bytes_before
    assert call_tool(tool, *flags, "--text_pair_column", "pair", "--overwrite", "--seed", "1")[0] == 0
    assert target.read_bytes() != bytes_before


def test_the_tools_rate_and_model(text_set: Path, tiny_bert: Path, tmp_path: Path, tool: ModuleType, call_tool) -> None:
    flags = ("--input_file", text_set / "train.json", "--overwrite", "--cache_dir", tmp_path / "cache")
    code, out, err = call_tool(
        tool, *flags, "--output_file", tmp_path / "a.json", "--techniques", "delete", "--rate", "0.3", "--factor", "3"
    )
    assert code == 0 and "203 rows in, 812 out" in out, (out, err)
    share = float(out.partition(" out; ")[2].partition("%")[0])
    assert 22 < share < 32  # some texts have fewer words than that beside the stop words
    model = ("--output_file", tmp_path / "b.json", "--techniques", "synonym", "--model_name", tiny_bert)
    code, out, err = call_tool(tool, *flags, *model, "--min_cosine", "0.1")
    assert code == 0, err
    rows = read_rows(tmp_path / "b.json")
    before = read_rows(text_set / "train.json")
    vocabulary = {*open_tokenizer(str(tiny_bert)).get_vocab()}
    for row in rows:
        if row["augmented_from"]:
            old = before[row["augmented_from"] - 1]
            new = [b for a, b in zip(old["text"].split(), row["text"].split(), strict=True) if a != b]
            assert new and {*new} <= vocabulary
    refused = call_tool(tool, *flags, *model, "--min_cosine", "1")
    assert refused[0] == 2 and "no word of the texts has a synonym" in refused[2]
    assert read_rows(tmp_path / "b.json") == rows


def test_what_the_tool_refuses(text_set: Path, tmp_path: Path, tool: ModuleType, call_tool) -> None:
    source = write_rows(tmp_path / "train.csv", ROWS)
    swap = ("--techniques", "swap")
    augmented = tmp_path / "augmented.csv"
    assert call_tool(tool, "--input_file", source, "--output_file", augmented, *swap)[0] == 0
    blank = write_rows(tmp_path / "blank.json", [{"text": "a b", "label": 1}, {"text": " ", "label": 2}])
    half = tmp_path / "half.jsonl"
    half.write_text('{"text": "one two", "label": "x", "other": "\\ud800"}\n')
    cases = {
        (text_set / "validation.json", "x.json"): "rows to score",
        (write_rows(tmp_path / "Test-00000.csv", ROWS), "x.csv"): "rows to score",
        (tmp_path / "none.csv", "x.csv"): "no such file",
        (source, "x.json"): "end in .csv",
        (source, "x.csv.gz"): "leave out .gz",
        (source, "train.csv"): "is the input",
        (augmented, "x.csv"): "augmented before",
        (blank, "x.json"): "row 2: text is empty",
        (half, "x.jsonl"): "row 1: half a character",
    }
    for (path, name), words in cases.items():
        code, _, err = call_tool(tool, "--input_file", path, "--output_file", tmp_path / name, *swap)
        assert code == 2 and words in err and err.count("\n") == 1, err
        assert not list(tmp_path.glob(".*draft")) and not list(tmp_path.glob("x.*"))
    code, _, err = call_tool(tool, "--input_file", source, "--output_file", tmp_path / "x.csv")
    assert code == 2 and "synonym and insert: no synonyms" in err
    for flags, words in (
        (("--factor", "0"), "--factor 0"),
        (("--rate", "2"), "--rate 2"),
        (("--text_column", "x"), "'x'"),
    ):
        code, _, err = call_tool(tool, "--input_file", source, "--output_file", tmp_path / "x.csv", *swap, *flags)
        assert code == 2 and words in err


# ----------------------------------------------------------------------------------------------------------- on the fly


@pytest.fixture
def synonym_table(tmp_path: Path) -> Path:
    path = tmp_path / "synonyms.json"
    path.write_text(json.dumps(TOPIC_SYNONYMS))
    return path


def augmented_texts(text_set: Path, tiny_bert: Path, cache: Path, share: float = 0.5, **columns: str) -> AugmentedTexts:
    table = read_text_table(str(text_set / "train.json"), **columns)
    tokenizer = open_tokenizer(str(tiny_bert))
    tokens = tokenize_table(table, tokenizer, 48, np.arange(len(table)), cache)
    augmentation = TextAugmentation(
        rate=0.2, synonyms={key: tuple(value) for key, value in TOPIC_SYNONYMS.items()}, seed=9
    )
    return AugmentedTexts(table, tokens, tokenizer, 48, augmentation, share)


def test_a_share_of_the_rows_changes_in_each_epoch(text_set: Path, tiny_bert: Path, tmp_path: Path) -> None:
    data = augmented_texts(text_set, tiny_bert, tmp_path)
    changed = np.array(
        [[data.at(row, epoch)["input_ids"].tolist() != data.tokens[row]["input_ids"].tolist() for row in range(len(data))]
         for epoch in range(6)]
    )  # fmt: skip
    assert 0.42 < changed.mean() < 0.58
    assert changed.any(axis=0).mean() > 0.95 and changed.all(axis=0).mean() < 0.1
    for row in range(20):
        sample = data.at(row, 2)
        assert sample["label"] == row
        if changed[2, row]:
            text = data.augmentation(data.table.texts[row].as_py(), row, 2, 0, 1)
            expected = data.tokenizer(text, truncation=True, max_length=48)["input_ids"]
            assert sample["input_ids"].tolist() == expected
    for share, expected in ((0.0, 0), (1.0, len(data))):
        data.share = share
        assert sum(data.at(row, 0)["input_ids"].tolist() != data.tokens[row]["input_ids"].tolist()
                   for row in range(len(data))) == expected  # fmt: skip


def test_both_texts_of_a_pair_change(text_set: Path, tiny_bert: Path, tmp_path: Path) -> None:
    rows = json.loads((text_set / "train.json").read_text())
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        row["pair"] = other["text"]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    data = augmented_texts(tmp_path, tiny_bert, tmp_path, 1.0, text_pair_column="pair")
    for row in range(20):
        sample, before = data.at(row, 1), data.tokens[row]
        assert len(sample["input_ids"]) == len(sample["token_type_ids"])
        assert sample["token_type_ids"].dtype == before["token_type_ids"].dtype
        texts = [data.augmentation(column[row].as_py(), row, 1, 0, 1 + number)
                 for number, column in enumerate((data.table.texts, data.table.pairs))]  # fmt: skip
        assert texts[0] != rows[row]["text"] and texts[1] != rows[row]["pair"]
        assert sample["input_ids"].tolist() == data.tokenizer(*texts, truncation=True, max_length=48)["input_ids"]


def batches_of(data: AugmentedTexts, by_length: bool = True, **settings: int) -> list[dict[int, list[int]]]:
    """Of two epochs, for each optimizer step: row -> token ids."""
    from accelerando.train.batches import Rows, TrainBatches

    rows = Rows(data, data.tokens.lengths if by_length else None)
    batches = TrainBatches(rows, TextCollate(0), seed=3, **settings)
    return [
        {int(row): ids[: int(mask.sum())].tolist() for batch in window
         for row, ids, mask in zip(batch["index"], batch["input_ids"], batch["attention_mask"], strict=True)}
        for epoch in (0, 1) for window in batches.windows(epoch)
    ]  # fmt: skip


def test_processes_and_workers_get_the_same_texts(text_set: Path, tiny_bert: Path, tmp_path: Path) -> None:
    data = augmented_texts(text_set, tiny_bert, tmp_path)
    whole = batches_of(data, batch_size=32)
    assert batches_of(data, batch_size=32, num_workers=2) == whole
    parts = [batches_of(data, batch_size=16, num_processes=2, process_index=index) for index in (0, 1)]
    assert [one | other for one, other in zip(*parts, strict=True)] == whole
    other = batches_of(data, by_length=False, batch_size=32)
    assert [list(window) for window in other[:7]] != [list(window) for window in whole[:7]]


def test_what_is_scored_never_changes(train_here, synonym_table: Path) -> None:
    flags = ("--lr", "0", "--report_on_train", "--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0")
    plain = train_here(*flags, name="plain")
    other = train_here(*flags, "--augment", *TECHNIQUES, "--synonyms", synonym_table, name="other")
    for split in ("train", "validation", "test"):
        assert results(other)[split] == results(plain)[split]
    losses = [[row["loss"] for row in history(run, "train")] for run in (plain, other)]
    assert all(one != two for one, two in zip(*losses, strict=True))


def test_options_of_augmentation_have_an_effect(train_here, synonym_table: Path) -> None:
    found = {}
    for flags in (
        (),
        ("--augment", "swap"),
        ("--augment", "swap", "--augment_rate", "0.5"),
        ("--augment", "swap", "--augment_share", "1"),
        ("--augment", "delete"),
        ("--augment", "synonym", "--synonyms", str(synonym_table)),
        ("--augment", "insert", "--synonyms", str(synonym_table)),
    ):
        found[flags] = weights(train_here(*flags, "--max_steps", "3", "--overwrite", name="run") / "last")
    assert len({*found.values()}) == len(found)
    plain = train_here("--max_steps", "3", "--augment_share", "0", "--augment", "swap", name="none")
    assert weights(plain / "last") == found[()]
    workers = train_here("--max_steps", "3", "--augment", "swap", "--num_workers", "2", name="workers")
    assert weights(workers / "last") == found["--augment", "swap"]


def test_without_augmentation_the_data_is_described_as_before(text_set: Path, tiny_bert: Path, tmp_path: Path) -> None:
    data = augmented_texts(text_set, tiny_bert, tmp_path)
    plain, changed = describe(data.tokens), describe(data)
    assert {key: value for key, value in changed.items() if key != "synonyms"} == plain and "synonyms" not in plain


def test_copies_are_neither_split_nor_scored(
    text_set: Path, tiny_bert: Path, tmp_path: Path, train_here, tool, call_tool
):
    copies = tmp_path / "copies.json"
    done = call_tool(tool, "--input_file", text_set / "train.json", "--output_file", copies, "--techniques", "swap")
    assert done[0] == 0
    common = ["--model_name", str(tiny_bert), "--max_steps", "2", "--max_length", "48", "--report_to", "none"]
    common += ["--cache_dir", str(tmp_path / "cache"), "--overwrite"]
    train = str(text_set / "train.json")
    for base in (
        ["--train_file", str(copies)],
        ["--train_file", train, "--validation_file", str(copies)],
        ["--train_file", train, "--test_file", str(copies)],
    ):
        with pytest.raises(UserError, match="copies of rows"):
            train_here(base=[*base, *common])
    run = train_here(base=["--train_file", str(copies), "--validation_file", train, *common])
    assert results(run)["validation"]["accuracy"] >= 0
    (tmp_path / "raw").mkdir()
    copies.rename(tmp_path / "raw" / "copies.json")
    clean = script_module(ROOT / "tools" / "preprocess_text.py")
    code, _, err = call_tool(clean, "--input_dir", tmp_path / "raw", "--output_dir", tmp_path / "clean")
    assert code == 2 and "copies of rows" in err


def test_synonyms_are_needed_without_pretrained_weights(train_here) -> None:
    for flags in (("--architecture", "cnn"), ("--from_scratch",)):
        with pytest.raises(UserError, match="--synonyms"):
            train_here("--augment", "synonym", *flags)


@pytest.mark.launch
def test_a_killed_run_resumes_to_the_same_bytes_on_any_number_of_processes(
    text_args: list[str], synonym_table: Path, tmp_path: Path
) -> None:
    flags = ["--augment", *TECHNIQUES, "--synonyms", str(synonym_table), "--hidden_dropout_prob", "0"]
    args = [*text_args, *flags, "--attention_probs_dropout_prob", "0", "--save_every", "3", "--keep_checkpoints", "9"]
    launch(TEXT, *args, "--batch_size", "32", "--run_name", "whole", cwd=tmp_path)
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    launch(TEXT, *args, "--batch_size", "16", "--run_name", "two", cwd=tmp_path, processes=2)
    for one, two in zip(history(whole, "train"), history(tmp_path / "runs" / "two", "train"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    args += ["--batch_size", "32", "--run_name", "killed"]
    process = start(TEXT, *args, cwd=tmp_path)
    assert wait_until(lambda: any(killed.glob("checkpoints/step_0*")), process)
    kill(process)
    (tmp_path / "other.json").write_text(json.dumps({**TOPIC_SYNONYMS, "goal": ["aim"]}))
    refused = launch(TEXT, *args, "--resume", "--synonyms", tmp_path / "other.json", cwd=tmp_path, check=False)
    assert refused.code == 2 and "other synonyms" in refused.err
    launch(TEXT, *args, "--resume", cwd=tmp_path)
    for folder in ("best", "last"):
        assert weights(killed / folder) == weights(whole / folder)


def test_the_words_of_a_column() -> None:
    import pyarrow as pa

    column = pa.chunked_array([["The Cat, sat", "dogs http://x.y"], ["cat-like [NAME]"]])
    assert distinct_words(column, None) == {"the", "cat", "sat", "dogs", "cat-like"}


@pytest.mark.parametrize("enabled", [True, False])
def test_the_guide_s_section_is_read(enabled: bool, train_here, synonym_table: Path, tmp_path: Path) -> None:
    """With its names of techniques; `enabled: false` switches the whole section off."""
    (tmp_path / "guide.yaml").write_text(
        f"data:\n  augmentation:\n    enabled: {str(enabled).lower()}\n    techniques:\n      - synonym_replacement\n"
        "      - random_swap\n    probability: 0.2\n"
    )
    run = train_here("--config", tmp_path / "guide.yaml", "--synonyms", synonym_table, "--max_steps", "2")
    found = results(run)["config"]["data"]
    assert (found["augment"], found["augment_rate"]) == ((["synonym", "swap"], 0.2) if enabled else ([], 0.1))
