"""accelerando.data.tokenizer: the same file in every process, round trips, pairs, odd texts, small sets."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from accelerando.base.errors import UserError
from accelerando.data.tokenizer import CHUNK, SPECIAL_TOKENS, train_tokenizer

ROOT = Path(__file__).parent.parent
LETTERS = "abcdefghijklmnopqrstuvwxyzABCäöüßéèñ.,!?'-0123456789中文字кот😀🤖"
KINDS = ["wordpiece", "bpe"]


def made_up(count: int = 300, seed: int = 0) -> list[str]:
    """Texts of random letters, so that many pairs are equally frequent: where an order of a hash map would show."""
    rng = random.Random(seed)
    return [
        " ".join("".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 7))) for _ in range(rng.randint(0, 15)))
        for _ in range(count)
    ]


def file_of(tokenizer: Any) -> str:
    return tokenizer.backend_tokenizer.to_str(pretty=True)


HASHES = """
import hashlib, sys
from pathlib import Path
from accelerando.data.tokenizer import train_tokenizer
from tests.test_tokenizer import KINDS, made_up
for kind in KINDS:
    train_tokenizer(made_up(), kind, 900, max_length=32).save_pretrained(sys.argv[1] + kind)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        print(hashlib.sha256(Path(sys.argv[1] + kind, name).read_bytes()).hexdigest())
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    """Another one, with another hash seed and several threads, writes what this one writes."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'lib'}:{ROOT}", "TOKENIZERS_PARALLELISM": "true"}
    environment["PYTHONHASHSEED"] = "1"
    command = [sys.executable, "-c", HASHES, str(tmp_path / "there")]
    seen = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(seen) == 4
    for kind in KINDS:
        train_tokenizer(made_up(), kind, 900, max_length=32).save_pretrained(tmp_path / kind)
    files = [tmp_path / kind / name for kind in KINDS for name in ("tokenizer.json", "tokenizer_config.json")]
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] == seen


@pytest.mark.parametrize("kind", KINDS)
def test_any_form_of_texts_gives_the_same_tokenizer(kind: str) -> None:
    texts = made_up(CHUNK + 50)
    expected = file_of(train_tokenizer(texts, kind, 600))
    array = pa.array(texts)
    forms: list[Any] = [
        (text for text in texts),
        array,
        pa.chunked_array([array.slice(0, 7), array.slice(7)]),
        pa.array([*texts, None], pa.large_string()),
    ]
    for form in forms:
        assert file_of(train_tokenizer(form, kind, 600)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_and_size(kind: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(made_up(), kind, 700, max_length=24)
    assert len(tokenizer) == 700 and tokenizer.model_max_length == 24
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == [0, 1, 2, 3, 4] and tokenizer.pad_token_id == 0
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert file_of(again) == file_of(tokenizer) and again.model_max_length == 24
    assert again.model_input_names == tokenizer.model_input_names
    texts = made_up(40, seed=5)
    assert (
        again(texts, texts[::-1], truncation=True)["input_ids"]
        == tokenizer(texts, texts[::-1], truncation=True)["input_ids"]
    )
    assert max(map(len, again(texts, truncation=True)["input_ids"])) <= 24


OPENED = """
import sys
from transformers import AutoTokenizer
for folder in sys.argv[1:]:
    print(AutoTokenizer.from_pretrained(folder)("one two"))
import accelerando.models.text_cnn
for folder in sys.argv[1:]:
    print(AutoTokenizer.from_pretrained(folder)("one two"))
"""


def test_it_opens_beside_a_text_cnn(tmp_path: Path) -> None:
    expected = []
    for kind in KINDS:
        tokenizer = train_tokenizer(["one two", "three"], kind, 300)
        tokenizer.save_pretrained(tmp_path / kind)
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": "text_cnn"}))
        expected.append(str(tokenizer("one two")))
    command = [sys.executable, "-c", OPENED, *(str(tmp_path / kind) for kind in KINDS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == expected * 2


def test_single_and_pair_templates() -> None:
    wordpiece = train_tokenizer(made_up(), "wordpiece", 500)
    single, pair = wordpiece("ab c"), wordpiece("ab c", "d")
    assert wordpiece.convert_ids_to_tokens(single["input_ids"])[0] == "[CLS]" and single["input_ids"][-1] == 3
    first = len(single["input_ids"])
    assert pair["input_ids"] == single["input_ids"] + wordpiece("d")["input_ids"][1:]
    assert pair["token_type_ids"] == [0] * first + [1] * (len(pair["input_ids"]) - first)
    batch = wordpiece(["a", "b c d"], padding=True)
    assert batch["input_ids"][0][-1] == 0 and batch["attention_mask"][0][-1] == 0

    bpe = train_tokenizer(made_up(), "bpe", 500)
    assert set(bpe("a", "b")) == {"input_ids", "attention_mask"}
    assert bpe("a", "b")["input_ids"].count(3) == 2


@pytest.mark.parametrize("lowercase", [True, False])
def test_lowercase(lowercase: bool, tmp_path: Path) -> None:
    for kind in KINDS:
        tokenizer = train_tokenizer(["Émile Zola", "emile zola", "ÉMILE ZOLA"] * 9, kind, 400, lowercase=lowercase)
        tokenizer.save_pretrained(tmp_path)
        for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
            assert (one("ZOLA")["input_ids"] == one("zola")["input_ids"]) is lowercase
            if kind == "wordpiece":
                assert (one("émile")["input_ids"] == one("emile")["input_ids"]) is lowercase


@pytest.mark.parametrize("kind", KINDS)
def test_odd_texts_are_encoded(kind: str) -> None:
    tokenizer = train_tokenizer([*made_up(), "", "   ", "\x00\ufffd", "a\u0301", "👩‍👩‍👧‍👦"], kind, 600)
    rng = random.Random(1)
    odd = ["", " ", "\n\t", "\x00", "😀😀", "👩‍👩‍👧‍👦", "𝔘𝔫𝔦", "ﷺ", "z" * 3000, "\u202e", "[CLS] [MASK]", "\U0010ffff"]
    anything = [*range(1, 0xD800), *range(0xE000, 0x110000)]
    odd += ["".join(map(chr, rng.choices(anything, k=20))) for _ in range(5)]
    for text in odd:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 2 and ids[-1] == 3 and max(ids) < len(tokenizer)
    assert tokenizer("")["input_ids"] == [2, 3]
    if kind == "bpe":  # bytes: nothing is unknown, everything comes back
        for text in odd[4:9]:
            assert 1 not in tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokenizer("kot 🤖 чай")["input_ids"], skip_special_tokens=True).strip() == "kot 🤖 чай"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [["a b"], [""], ["hello hello world"], ["中文"]])
def test_fewer_texts_than_the_vocabulary_holds(kind: str, texts: list[str]) -> None:
    tokenizer = train_tokenizer(texts, kind, 30522)
    assert 5 <= len(tokenizer) < 400
    assert 1 not in tokenizer(texts[0])["input_ids"]


def test_words_seen_are_whole_and_a_large_alphabet_leaves_room() -> None:
    tokenizer = train_tokenizer(["the training of tokenizers"] * 5, "wordpiece", 200)
    assert tokenizer.tokenize("the training of tokenizers") == ["the", "training", "of", "tokenizers"]
    signs = "".join(chr(code) for code in range(0x400, 0x500))
    many = train_tokenizer([signs, "common word " * 50], "wordpiece", 120)
    assert len(many) <= 120 and "common" in many.get_vocab()


def test_bad_requests_end_in_one_line() -> None:
    def nothing() -> Iterator[str]:
        return iter([])

    for kind in KINDS:
        for empty in ([], nothing(), pa.array([], pa.string())):
            with pytest.raises(UserError, match="no text"):
                train_tokenizer(empty, kind, 400)
    with pytest.raises(UserError, match="at least 261"):
        train_tokenizer(["a"], "bpe", 260)
    with pytest.raises(UserError, match="at least 8"):
        train_tokenizer(["a"], "wordpiece", 7)
    with pytest.raises(UserError, match="wordpiece or bpe"):
        train_tokenizer(["a"], "unigram", 700)  # type: ignore[arg-type]
