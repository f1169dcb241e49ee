"""Long texts in windows: what the windows are, what is pooled, and that rows stay rows in everything else."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from harness import TEXT, history, launch, results, script_module, weights
from made_data import COMMON, WORDS, write_json
from safetensors.torch import load_file

from accelerando.base.errors import UserError
from accelerando.data.collate import TextCollate
from accelerando.data.tables import TextTable
from accelerando.data.tokenizer import open_tokenizer
from accelerando.data.tokens import tokenize_table, warn_of_cut_texts
from accelerando.data.windows import Windows
from accelerando.models.text_windows import keep_windows, kept_windows, pool_windows

ROOT = Path(__file__).resolve().parent.parent
NO_DROPOUT = ("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0")
CNN = ("--architecture", "cnn", "--vocab_size", "300", "--embed_size", "16", "--num_filters", "8", "--lr", "1e-2")
LONG = ("--max_length", "16", "--window_stride", "9", "--max_windows", "4")


def late_rows(count: int, seed: int) -> list[dict]:
    """Rows whose topic is named by their last words alone, behind 20 to 34 common ones."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        topic = str(rng.choice(list(WORDS)))
        words = [str(word) for word in rng.choice(COMMON, int(rng.integers(20, 35)))]
        rows.append({"text": " ".join([*words, *map(str, rng.choice(WORDS[topic], 3))]), "label": topic})
    return rows


@pytest.fixture(scope="session")
def late_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a data set of such rows."""
    folder, flags = tmp_path_factory.mktemp("late"), []
    for seed, (split, count) in enumerate({"train": 150, "validation": 40, "test": 41}.items()):
        flags += [f"--{split}_file", str(write_json(folder / f"{split}.json", late_rows(count, seed)))]
    return flags


def by_hand(tokenizer, text: str, size: int, stride: int, most: int | None) -> list[list[int]]:
    """The windows of a text, cut from its tokens one by one."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    found = []
    for start in range(0, len(ids), stride):
        found.append([first, *ids[start : start + size - 2], last])
        if start + size - 2 >= len(ids):
            break
    return found[:most]


@pytest.mark.parametrize("most", [None, 3])
def test_windows_are_those_cut_by_hand(tiny_bert: Path, tmp_path: Path, caplog, most: int | None) -> None:
    """Their ids, their padding on either side, and the share of tokens beyond the last one."""
    tokenizer = open_tokenizer(str(tiny_bert))
    texts = [row["text"] for row in late_rows(9, 0)] + ["goal", "the match", " ".join(["ball"] * 200)]
    windows = Windows(16, 5, most)
    table = tokenize_table(
        TextTable(pa.chunked_array([texts]), None, None, "x"), tokenizer, 16, None, tmp_path, windows
    )
    expected = [by_hand(tokenizer, text, 16, 5, most) for text in texts]
    assert [table[row]["input_ids"].tolist() for row in range(len(texts))] == [
        list(itertools.chain(*parts)) for parts in expected
    ]
    flat = list(itertools.chain(*expected))
    for left in (False, True):
        batch = TextCollate(7, left=left, window=16)([table[row] for row in range(len(texts))])
        assert batch["windows"].tolist() == [len(parts) for parts in expected]
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(flat), 16)
        for ids, mask, window in zip(batch["input_ids"], batch["attention_mask"], flat, strict=True):
            padding = 16 - len(window)
            assert ids.tolist() == ([7] * padding + window if left else window + [7] * padding)
            assert mask.tolist() == ([0] * padding + [1] * len(window) if left else [1] * len(window) + [0] * padding)
    warn_of_cut_texts({"train": table}, 16, windows)
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    beyond = [max(0, length - 14 - 2 * 5) if most else 0 for length in lengths]
    assert table.cut == (sum(beyond), sum(one > 0 for one in beyond))
    assert ("--max_windows 3 cut off" in caplog.text) == (most is not None)
    seen = sum(min(length, 24) for length in lengths) + 2 * len(texts)
    if most:
        assert f"{100 * sum(beyond) / (sum(beyond) + seen):.1f} % of the tokens of train" in caplog.text


def test_pooling_is_over_the_windows_of_each_text() -> None:
    logits = torch.randn(6, 3, requires_grad=True)
    counts = torch.tensor([1, 3, 2])
    parts = logits.split(counts.tolist())
    assert torch.allclose(pool_windows(logits, counts, "mean"), torch.stack([part.mean(0) for part in parts]))
    assert torch.equal(pool_windows(logits, counts, "max"), torch.stack([part.amax(0) for part in parts]))
    assert pool_windows(logits, torch.ones(6, dtype=torch.int64), "mean") is logits
    pool_windows(logits, counts, "mean").sum().backward()
    assert logits.grad[:, 0].tolist() == pytest.approx([1, *[1 / 3] * 3, 0.5, 0.5])


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_word_beyond_the_first_window_is_learnt_and_predicted(
    pooling: str, train_here, late_files, call_tool, tmp_path: Path
) -> None:
    """Without windows nothing is learnt. The report's numbers are those of predict.py, of evaluate.py on the model's
    folder alone, and of windows that are computed one by one."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    learning = (*late_files, *CNN, "--epochs", "8", "--batch_size", "16")
    if pooling == "mean":
        assert results(train_here(*learning, "--max_length", "16", name="cut"))["test"]["accuracy"] < 0.6
    run = train_here(*learning, *LONG, "--window_pooling", pooling, name="long")
    found = results(run)["test"]
    assert found["accuracy"] > 0.9
    rows = json.loads(Path(late_files[5]).read_text())
    predict = script_module(ROOT / "tools" / "predict.py")
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(row["text"] for row in rows) + "\n")
    code, out, _ = call_tool(predict, run, "--file", file)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    right = [answer["label"] == row["label"] for answer, row in zip(answers, rows, strict=True)]
    assert np.mean(right) == pytest.approx(found["accuracy"], abs=1e-9)
    losses = [-np.log(answer["scores"][row["label"]]) for answer, row in zip(answers, rows, strict=True)]
    assert np.mean(losses) == pytest.approx(found["loss"], rel=1e-3)
    model, tokenizer = (
        one.from_pretrained(run / "best") for one in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    for answer in answers[:5]:
        parts = by_hand(tokenizer, answer["text"], 16, 9, 4)
        with torch.no_grad():
            logits = torch.cat([model.eval()(input_ids=torch.tensor([part])).logits for part in parts])
        pooled = (logits.mean(0) if pooling == "mean" else logits.amax(0)).softmax(0)
        named = {model.config.id2label[number]: value for number, value in enumerate(pooled.tolist())}
        assert answer["scores"] == pytest.approx(named, abs=2e-5)
    card = (run / "best" / "README.md").read_text()
    assert "A text of more than 16 tokens is cut off here" in card
    if pooling == "max":
        alone = tmp_path / "alone"
        (run / "best").rename(alone)
        evaluate = script_module(ROOT / "tools" / "evaluate.py")
        code, out, err = call_tool(evaluate, alone, "--data", late_files[5], "--format", "json")
        assert code == 0, err
        assert json.loads(out)["runs"][str(alone)]["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_texts_that_fit_give_the_same_bits(train_here, text_set: Path, tmp_path: Path) -> None:
    """With augmentation of long texts among the rows, and without."""
    rows = [row for row in json.loads((text_set / "train.json").read_text()) if len(row["text"].split()) < 10]
    short = ("--train_file", str(write_json(tmp_path / "short.json", rows)), "--validation_file", "None", "--test_file",
             "None", "--max_length", "48", "--epochs", "2", "--batch_size", "8")  # fmt: skip
    plain, windows = (
        train_here(*short, *more, name=name) for name, more in (("a", ()), ("b", ("--window_stride", "20")))
    )
    assert weights(plain / "last") == weights(windows / "last")
    assert [row["loss"] for row in history(plain, "train")] == [row["loss"] for row in history(windows, "train")]


def test_options_have_an_effect_and_rows_stay_rows(train_here, late_files) -> None:
    """Stride, number and pooling change what is learnt; R-Drop without dropout, and a run that was resumed, do not; a
    row that gives NaN in one of its windows is named and left out."""
    base = (*late_files, *LONG, "--scheduler", "constant", "--batch_size", "16", "--max_steps", "6", *NO_DROPOUT)
    whole = train_here(*base, "--ema_decay", "0.9", "--augment", "swap", "--curriculum", "length", name="whole")
    begun = (*base, "--ema_decay", "0.9", "--augment", "swap", "--curriculum", "length")
    train_here(*begun, "--max_steps", "3", name="resumed")
    resumed = train_here(*begun, "--resume", name="resumed")
    assert weights(whole / "last") == weights(resumed / "last")
    runs = {"plain": ()} | {name: (f"--{name}", value) for name, value in
                            {"window_stride": "14", "max_windows": "2", "window_pooling": "max"}.items()}  # fmt: skip
    trained = {name: weights(train_here(*base, *more, name=name) / "last") for name, more in runs.items()}
    assert len(set(trained.values())) == len(trained)
    twice = train_here(*base, "--r_drop", "2", name="twice")
    one, two = (load_file(Path("runs") / name / "last" / "model.safetensors") for name in ("plain", twice.name))
    assert all(torch.allclose(tensor, two[name], atol=1e-5) for name, tensor in one.items())


def test_a_row_with_nan_in_one_window_is_left_out(train_here, late_files, monkeypatch) -> None:
    module = sys.modules[TEXT.stem]
    plain = module.build_model

    def build_model(args, data, accelerator):
        model = plain(args, data, accelerator)
        bad = torch.as_tensor(data.splits["train"][17]["input_ids"][16:32].astype(np.int64))  # its second window

        def spoil(_, inputs, output):
            hit = (inputs[0] == bad).all(dim=1) if inputs[0].shape[1] == 16 else torch.zeros(len(inputs[0]), dtype=bool)
            return output.masked_fill(hit[:, None, None], float("nan")) if model.training else output

        model.get_input_embeddings().register_forward_hook(spoil)
        return model

    monkeypatch.setattr(module, "build_model", build_model)
    run = train_here(*late_files, *LONG, *NO_DROPOUT, "--epochs", "1", name="nan")
    assert "is infinite or NaN for row 17\n" in (run / "logs" / "train.log").read_text()
    assert results(run)["samples"] == 149


@pytest.mark.launch
def test_two_processes_train_on_the_same_windows(text_args, late_files, tmp_path: Path) -> None:
    flags = (*text_args, *late_files, *LONG, *NO_DROPOUT, "--epochs", "1", "--lr", "1e-3")
    launch(TEXT, *flags, "--batch_size", "24", "--run_name", "one", cwd=tmp_path)
    launch(TEXT, *flags, "--batch_size", "12", "--run_name", "two", cwd=tmp_path, processes=2)
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    for first, second in zip(history(one, "train"), history(two, "train"), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
    assert results(two)["samples"] == results(one)["samples"] == 150
    assert results(two)["test"]["loss"] == pytest.approx(results(one)["test"]["loss"], rel=1e-3)


def test_what_cannot_be_is_said_in_one_line(train_here, late_files, tiny_bert: Path) -> None:
    with pytest.raises(UserError, match="pairs have no windows"):
        train_here(*late_files, *LONG, "--text_pair_column", "label")
    with pytest.raises(UserError, match="--window_stride 15: a window of 16 tokens has room for 14 beside 2 special"):
        train_here(*late_files, "--max_length", "16", "--window_stride", "15")
    with pytest.raises(UserError, match="text_windows is not what a run of"):
        kept_windows({"text_windows": {"size": 16, "stride": 0, "most": None, "pooling": "mean"}})
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_bert)
    keep_windows(config, Windows(16, 9, 4), "max")
    assert kept_windows(config.to_dict()) == (Windows(16, 9, 4), "max")
    keep_windows(config, None, "mean")
    assert kept_windows(config.to_dict()) == (None, "mean")
