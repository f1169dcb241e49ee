"""tools/predict.py: what it writes, its sources of text, and one line for every mistake."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tools import predict
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from accelerando.data.tokenizer import train_tokenizer
from accelerando.models.text_cnn import TextCnnConfig, TextCnnForSequenceClassification

ROOT = Path(__file__).parent.parent
LABELS = {0: "sport", 1: "space", 2: "Küche"}
WORDS = ["ball", "goal", "rocket", "moon", "star", "pan", "salt", "Suppe", "🚀"]


def made_up(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best/ is a text CNN and whose last/ is a BERT, both with random weights."""
    run = tmp_path_factory.mktemp("runs") / "x"
    tokenizer = train_tokenizer(made_up(200), "wordpiece", 200, max_length=24)
    torch.manual_seed(0)
    names = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
    size = len(tokenizer)
    cnn = TextCnnForSequenceClassification(TextCnnConfig(vocab_size=size, embed_size=8, num_filters=6, **names))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=size, max_position_embeddings=32, initializer_range=0.3, **shape, **names)
    )
    for folder, model in (("best", cnn), ("last", bert)):
        model.save_pretrained(run / folder)
        tokenizer.save_pretrained(run / folder)
    return run


@pytest.fixture
def call(call_tool):
    """``call(*arguments, stdin=b"...")``: predict.py's exit code, results and standard error."""

    def run(*arguments: object, stdin: bytes = b"") -> tuple[int, list[dict], str]:
        code, out, err = call_tool(predict, *arguments, stdin=stdin)
        return code, [json.loads(line) for line in out.splitlines()], err

    return run


def command(*arguments: object) -> dict:
    return {
        "args": [sys.executable, str(ROOT / "tools" / "predict.py"), *map(str, arguments)],
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


def reference(folder: Path, texts: list[str], pairs: list[str] | None = None) -> torch.Tensor:
    """Probabilities, each text by itself."""
    kind = TextCnnForSequenceClassification if folder.name == "best" else BertForSequenceClassification
    model, tokenizer = kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = []
    for index, text in enumerate(texts):
        encoded = tokenizer(text, pairs and pairs[index], truncation=True, max_length=24, return_tensors="pt")
        rows.append(model(**encoded).logits[0].softmax(0).detach())
    return torch.stack(rows)


@pytest.mark.parametrize("folder", ["best", "last"])
def test_results_are_those_of_the_model_in_the_order_of_the_input(run_folder: Path, folder: str, call) -> None:
    texts = made_up(70, seed=1)
    expected = reference(run_folder / folder, texts)
    assert expected.argmax(1).unique().numel() > 1
    for batch_size in (1, 16):
        code, results, err = call(run_folder / folder, "--batch_size", batch_size, *texts)
        assert (code, err) == (0, "")
        assert [result["text"] for result in results] == texts
        for result, row in zip(results, expected, strict=True):
            assert list(result) == ["text", "label", "score", "scores"]
            assert result["label"] == LABELS[int(row.argmax())] and result["score"] == max(result["scores"].values())
            got = torch.tensor([result["scores"][name] for name in LABELS.values()])
            torch.testing.assert_close(got, row, rtol=0, atol=3e-6)
            assert list(result["scores"].values()) == sorted(result["scores"].values(), reverse=True)


def test_a_run_means_its_best_weights(run_folder: Path, call, tmp_path: Path) -> None:
    assert call(run_folder, "moon salt") == call(run_folder / "best", "moon salt")
    assert call(run_folder, "moon salt") != call(run_folder / "last", "moon salt")
    shutil.copytree(run_folder / "last", tmp_path / "unfinished" / "last")
    assert call(tmp_path / "unfinished", "moon salt") == call(run_folder / "last", "moon salt")


def test_every_source_gives_the_same_results(run_folder: Path, call, tmp_path: Path) -> None:
    texts = [*made_up(20), "", "last, without newline"]
    expected = call(run_folder, *texts)[1]
    lines = tmp_path / "texts.txt"
    lines.write_text("\n".join(texts), encoding="utf-8")
    assert call(run_folder, "--file", lines)[1] == expected
    windows = "\r\n".join(texts).encode("utf-8-sig")
    assert call(run_folder, stdin=windows)[1] == expected

    full = [text for text in texts if text]  # a table's row without a text is the reader's matter
    expected = call(run_folder, *full)[1]
    rows = [{"number": index, "body": text} for index, text in enumerate(full)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("rows.json", "rows.jsonl"):
        assert call(run_folder, "--file", tmp_path / name, "--text_column", "body")[1] == expected


def test_second_texts(run_folder: Path, call, tmp_path: Path) -> None:
    texts, pairs = ["goal ball", "moon"], ["salt", "rocket star"]
    expected = reference(run_folder / "last", texts, pairs)
    table = tmp_path / "pairs.jsonl"
    table.write_text("\n".join(json.dumps({"text": a, "b": b}) for a, b in zip(texts, pairs, strict=True)))
    results = call(run_folder / "last", "--file", table, "--text_pair_column", "b")[1]
    results += call(run_folder / "last", *texts, "--text_pair", pairs[0])[1]
    for result, row in zip(results[:3], [*expected, expected[0]], strict=True):
        assert result["score"] == pytest.approx(float(row.max()), abs=3e-6)
    assert [result["text_pair"] for result in results] == [*pairs, pairs[0], pairs[0]]


def test_options_have_an_effect(run_folder: Path, call, tmp_path: Path) -> None:
    everything = call(run_folder, "moon salt goal")[1][0]
    short = call(run_folder, "moon salt goal", "--top_k", 2)[1][0]
    assert list(short["scores"].items()) == list(everything["scores"].items())[:2]
    cut = call(run_folder, "moon salt goal", "--max_length", 3)[1][0]
    assert cut["scores"] == call(run_folder, "moon")[1][0]["scores"] != everything["scores"]
    output = tmp_path / "new" / "out.jsonl"
    assert call(run_folder, "moon salt goal", "--output", output, "--device", "cpu") == (0, [], "")
    assert json.loads(output.read_text(encoding="utf-8")) == everything
    assert list(output.parent.iterdir()) == [output]


def test_what_the_scores_are_follows_the_problem_type(run_folder: Path, call, tmp_path: Path) -> None:
    model = TextCnnForSequenceClassification.from_pretrained(run_folder / "best").eval()
    tokenizer = AutoTokenizer.from_pretrained(run_folder / "best")
    logits = model(**tokenizer("moon salt", return_tensors="pt")).logits[0]
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scores = call(tmp_path, "moon salt")[1][0]["scores"]
    torch.testing.assert_close(torch.tensor([scores[name] for name in LABELS.values()]), logits.sigmoid())


def test_mistakes_end_in_one_line(run_folder: Path, call, tmp_path: Path) -> None:
    best = run_folder / "best"

    def variant(name: str, remove: tuple[str, ...] = (), **texts: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(best, folder)
        for pattern in remove:
            for path in folder.glob(pattern):
                path.unlink()
        for stem, content in texts.items():
            (folder / f"{stem}.json").write_text(content)
        return folder

    empty = tmp_path / "empty"
    empty.mkdir()
    nothing, table, latin = tmp_path / "nothing.txt", tmp_path / "table.jsonl", tmp_path / "latin.txt"
    nothing.write_text("")
    table.write_text('{"body": "moon"}\n')
    latin.write_bytes("gut\nKüche\n".encode("latin-1"))
    encoder = variant("encoder", ("model.safetensors",))
    BertModel(BertConfig(vocab_size=200, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)).save_pretrained(
        encoder
    )
    headless = variant("headless", ("model.safetensors",))
    shutil.copy(encoder / "model.safetensors", headless)
    broken = variant("broken")
    model = TextCnnForSequenceClassification.from_pretrained(best)
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    model.save_pretrained(broken)
    damaged = variant("damaged")
    (damaged / "model.safetensors").write_bytes(b"no weights")
    checkpoint = tmp_path / "checkpoints" / "step_5"
    checkpoint.mkdir(parents=True)

    cases: list[tuple[tuple, str]] = [
        ((tmp_path / "absent", "x"), "no such folder"),
        ((table, "x"), "not a folder"),
        ((empty, "x"), "no model here"),
        ((checkpoint, "x"), "for resuming"),
        ((variant("untokenized", ("token*", "special*")), "x"), "no tokenizer"),
        ((variant("unread", tokenizer="{"), "x"), "tokenizer cannot be loaded"),
        ((variant("half", config="{"), "x"), "invalid JSON"),
        ((variant("list", config="[]"), "x"), "expected an object"),
        ((variant("unweighted", ("model.safetensors",)), "x"), "model cannot be loaded"),
        ((damaged, "x"), "model cannot be loaded"),
        ((encoder, "x"), "a classifier of texts, signs or images is needed"),
        ((headless, "x"), "weights are missing"),
        ((broken, "x"), "NaN"),
        ((best,), "standard input: no text"),
        ((best, "--file", nothing), "no text in it"),
        ((best, "--file", tmp_path / "absent.txt"), "no such file"),
        ((best, "--file", empty), "is a folder"),
        ((best, "--file", table), "text"),
        ((best, "--file", latin), "line 2: not UTF-8"),
        ((best, "--file", latin, "x"), "give one of them"),
        ((best, "x", "--text_pair", "y", "--text_pair_column", "z"), "give one of them"),
        ((best, "x", "--text_pair_column", "z"), "needs a table"),
        ((best, "x\udcff"), "not UTF-8"),
        ((best, "x", "--device", "cuda:77"), "no such device"),
        ((best, "x", "--device", "nonsense"), "no such device"),
        ((best, "x", "--batch_size", 0), "--batch_size 0"),
        ((best, "x", "--top_k", "-1"), "--top_k -1"),
        ((best, "x", "--max_length", 0), "--max_length 0"),
        ((best, "x", "--max_length", 2), "--max_length 2"),
        ((run_folder / "last", "x", "--max_length", 33), "32 positions"),
        ((best, "x", "--output", empty), "is a folder"),
        ((best, "x", "--output", table / "y"), "--output"),
        ((best, "--file", table, "--output", table), "would replace"),
        ((), "MODEL"),
        ((best, "x", "--topk", 1), "--top_k"),
    ]
    for arguments, message in cases:
        code, results, err = call(*arguments)
        assert (code, results) == (2, []), arguments
        assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1, (arguments, err)
    code, _, err = call(broken, "x", "--output", empty / "out.jsonl")
    assert code == 2 and not list(empty.iterdir())


def test_chunks_join_in_order(run_folder: Path, call, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = made_up(53, seed=3)
    expected = call(run_folder, *texts)[1]
    monkeypatch.setattr(predict, "CHUNK", 7)
    assert call(run_folder, *texts)[1] == expected
    assert call(run_folder, stdin="".join(text + "\n" for text in texts).encode())[1] == expected


def test_endless_input_and_a_closed_pipe(run_folder: Path) -> None:
    """Standard input that never ends is answered as it comes, and `| head` ends everything without a word."""
    with subprocess.Popen(**command(run_folder), stdin=subprocess.PIPE) as process:
        feeder = subprocess.Popen(["yes", "moon rocket"], stdout=process.stdin)
        process.stdin.close()
        assert json.loads(process.stdout.readline())["text"] == "moon rocket"
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 0 and err == b""
        feeder.wait(timeout=60)


def test_as_a_program() -> None:
    done = subprocess.run(**command("--help"), text=True)  # its time: tests/test_docs.py
    assert done.returncode == 0 and "--top_k" in done.stdout
    done = subprocess.run(**command("nowhere", "x"), text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: nowhere: no such folder")
