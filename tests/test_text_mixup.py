"""--mixup of text_classify.py: what is mixed with what, the loss of a batch mixed by hand, and the invariants."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import TEXT, history, launch, results, script_module, weights
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, Qwen2Config, RobertaConfig, XLNetConfig

from accelerando.base.errors import UserError
from accelerando.data.collate import TextCollate
from accelerando.data.mixing import MixedRows
from accelerando.data.tokens import TokenTable
from accelerando.models.mixing import mix_texts, token_inputs
from accelerando.models.text_cnn import TextCnnConfig, TextCnnForSequenceClassification
from accelerando.train.class_losses import mixed_loss

EXACT = ("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
         "max_position_embeddings": 40, "pad_token_id": 0}  # fmt: skip
CONFIGS = {
    "bert": BertConfig(vocab_size=50, hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=3, **SMALL),
    "roberta": RobertaConfig(vocab_size=50, hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=3, **SMALL),
    "qwen2": Qwen2Config(vocab_size=50, num_key_value_heads=2, num_labels=3, **SMALL),
    "cnn": TextCnnConfig(vocab_size=50, embed_size=8, num_filters=4, dropout_prob=0, num_labels=3),
}  # fmt: skip
ARGS = SimpleNamespace(r_drop=0.0, class_weights=False, logit_adjustment=0.0, label_smoothing=0.1, focal_gamma=2.0)


def table_of(labels: np.ndarray, seed: int = 0) -> TokenTable:
    """Texts of 1 to 9 tokens of a vocabulary of 50."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 10, len(labels))
    ids = rng.integers(2, 50, lengths.sum()).astype(np.int32)
    return TokenTable(ids, np.concatenate([[0], np.cumsum(lengths)]), None, labels)


def model_of(name: str, vocabulary: int = 50) -> torch.nn.Module:
    torch.manual_seed(0)
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict() | {"vocab_size": vocabulary})
    if name == "cnn":
        return TextCnnForSequenceClassification(config)
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


def batch_of(mixed: MixedRows, name: str) -> dict[str, torch.Tensor]:
    return TextCollate(0, left=name == "qwen2")([mixed.at(row, 3) for row in range(len(mixed))])


def logits_by_hand(name: str, mixed: MixedRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a model with a word for each place of each mixed text, whose embedding was mixed by hand; both labels."""
    table, plain = mixed.samples, model_of(name)
    embedding = plain.get_input_embeddings().weight.detach()
    rows, others, shares = [], [], []
    for row in range(len(table)):
        sample = mixed.at(row, 3)
        others.append(sample["other_label"])
        shares.append(sample["share"])
        texts = [sample["input_ids"], sample["other_input_ids"]]
        longest = max(map(len, texts))
        place = torch.zeros(longest, embedding.shape[1])
        for ids, share in zip(texts, (sample["share"], 1 - sample["share"]), strict=True):
            vectors = share * embedding[torch.from_numpy(ids.astype(np.int64))]
            if name == "qwen2":  # padding stands before the text
                place[longest - len(ids) :] += vectors
            else:
                place[: len(ids)] += vectors
        rows.append(place)
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    words = [torch.zeros(2, embedding.shape[1])]
    for number, place in enumerate(rows):
        part = slice(width - len(place), width) if name == "qwen2" else slice(0, len(place))
        start = sum(map(len, words))
        ids[number, part], mask[number, part] = torch.arange(start, start + len(place)), 1
        words.append(place)
    model = model_of(name, sum(map(len, words)))
    state = plain.state_dict()
    key = next(
        key for key, value in state.items() if value.data_ptr() == plain.get_input_embeddings().weight.data_ptr()
    )
    model.load_state_dict(state | {key: torch.cat(words)})
    model.train()
    return model(input_ids=ids, attention_mask=mask).logits, torch.tensor(np.array(others)), torch.tensor(shares)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_mixed_by_hand_has_the_same_loss(name: str) -> None:
    """The embeddings of each place, the lengths, the labels with focal loss and smoothing; also with R-Drop's two passes."""
    labels = np.random.default_rng(1).integers(0, 3, 12)
    mixed = MixedRows(table_of(labels), 0.8, seed=5)
    logits, others, shares = logits_by_hand(name, mixed)
    script, model = script_module(TEXT), model_of(name).train()
    mix_texts(model)
    data = SimpleNamespace(problem_type="single_label", class_counts=None, teacher=None)
    losses, found = script.compute_loss(model, batch_of(mixed, name), data, ARGS)
    torch.testing.assert_close(found, logits.float(), atol=1e-5, rtol=1e-4)
    of = [script.class_losses(logits.float(), each, None, 0.1, 2.0) for each in (torch.from_numpy(labels), others)]
    torch.testing.assert_close(losses, (shares * of[0] + (1 - shares) * of[1]).float(), atol=1e-5, rtol=1e-4)
    twice = SimpleNamespace(**vars(ARGS) | {"r_drop": 1.0})
    torch.testing.assert_close(script.compute_loss(model, batch_of(mixed, name), data, twice)[0], losses)
    losses.sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    plain = TextCollate(0, left=name == "qwen2")([mixed[row] for row in range(12)])
    with torch.no_grad():  # a batch without shares is not mixed
        assert torch.equal(model(**token_inputs(plain)).logits, model_of(name).train()(**token_inputs(plain)).logits)


def test_targets_that_are_numbers_are_mixed_themselves() -> None:
    targets = np.random.default_rng(2).normal(size=(6, 2)).astype(np.float32)
    mixed = MixedRows(table_of(targets), 1.0)
    batch, logits = batch_of(mixed, "bert"), torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    assert batch["labels"].dtype == batch["other_labels"].dtype == batch["share"].dtype == torch.float32
    goal = batch["share"][:, None] * batch["labels"] + (1 - batch["share"][:, None]) * batch["other_labels"]
    found = mixed_loss(lambda labels: (logits - labels).square().mean(dim=1), batch)
    torch.testing.assert_close(found, (logits - goal).square().mean(dim=1))
    assert not torch.allclose(goal, batch["labels"])


def test_partner_and_share_depend_on_seed_epoch_and_row_alone() -> None:
    mixed = MixedRows(table_of(np.arange(400)), 0.4, seed=7)
    drawn = [
        (mixed.at(row, epoch)["other_label"], mixed.at(row, epoch)["share"]) for epoch in (0, 1) for row in range(400)
    ]
    assert drawn[3] == (mixed.at(3, 0)["other_label"], mixed.at(3, 0)["share"]) != drawn[403]
    assert mixed.at(3, 0, draw=1)["share"] != mixed.at(3, 0)["share"]
    shares = np.array([share for _, share in drawn])
    assert shares.mean() == pytest.approx(0.5, abs=0.05)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.1)  # of Beta(a, a)
    assert len({other for other, _ in drawn}) > 300


def test_no_mixup_changes_nothing_and_some_trains_otherwise(train_here) -> None:
    plain = train_here("--epochs", "1", name="plain")
    none = train_here("--epochs", "1", "--mixup", "0", name="none")
    some = train_here("--epochs", "1", "--mixup", "0.4", "--augment", "swap", "--balanced", name="some")
    assert weights(none / "last") == weights(plain / "last") != weights(some / "last")
    assert results(some)["samples"] == 203


def test_evaluation_is_not_mixed(train_here) -> None:
    still = ("--epochs", "1", "--lr", "0", *EXACT, "--report_on_train")
    plain, mixed = train_here(*still, name="plain"), train_here(*still, "--mixup", "1", name="mixed")
    for split in ("train", "validation", "test"):
        assert results(mixed)[split] == results(plain)[split]
    losses = [[row["loss"] for row in history(run, "train")] for run in (plain, mixed)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("kind", ["multi_label", "regression"])
def test_several_labels_and_numbers_are_trained(kind: str, train_here, text_set: Path, tmp_path: Path) -> None:
    rows = json.loads((text_set / "train.json").read_text())
    for row in rows:
        row["label"] = [row["label"]] if kind == "multi_label" else len(row["text"]) / 100 + 0.001
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = ("--train_file", tmp_path / "rows.json", "--validation_file", "None", "--test_file", "None", "--epochs", "6")
    net = ("--architecture", "cnn", "--vocab_size", "300", "--embed_size", "16", "--num_filters", "32", "--lr", "2e-2")
    run = train_here(*data, *net, "--filter_sizes", "1", "--dropout_prob", "0", "--mixup", "0.2", name=kind)
    name = "f1_macro" if kind == "multi_label" else "pearson"
    assert results(run)["validation"][name] > 0.8


def test_a_stopped_run_resumes_to_the_same_weights(train_here, monkeypatch) -> None:
    flags = ("--mixup", "0.4", "--save_every", "3", "--gradient_accumulation_steps", "2", "--batch_size", "12")
    whole = train_here(*flags, name="whole")
    module = sys.modules["text_classify"]
    plain, steps = module.finish_step, []

    def finish_step(*given):
        steps.append(1)
        if len(steps) == 8:
            raise RuntimeError("stopped")
        return plain(*given)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(module, "finish_step", finish_step)
        train_here(*flags, name="part")
    part = train_here(*flags, "--resume", name="part")
    assert "Resumed from" in (part / "logs" / "train.log").read_text()
    for folder in ("best", "last"):
        assert weights(part / folder) == weights(whole / folder)


@pytest.mark.launch
@pytest.mark.parametrize("fsdp", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_two_processes_equal_one(fsdp: bool, text_args, tmp_path: Path) -> None:
    args = [*text_args, *EXACT, "--epochs", "1", "--lr", "1e-3", "--mixup", "0.4"]
    launch(TEXT, *args, "--batch_size", "24", "--run_name", "one", cwd=tmp_path)
    launch(TEXT, *args, "--batch_size", "12", "--run_name", "two", cwd=tmp_path, processes=2, fsdp=fsdp)
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    for first, second in zip(history(one, "train"), history(two, "train"), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-3)
    saved = [load_file(run / "last" / "model.safetensors") for run in (one, two)]
    for name, tensor in saved[0].items():
        assert torch.allclose(tensor, saved[1][name], atol=1e-4), name


def test_what_cannot_be_mixed_is_refused(train_here) -> None:
    with pytest.raises(UserError, match="--mixup and --compile_model: compiled code"):
        train_here("--mixup", "0.2", "--compile_model", name="compiled")
    xlnet = AutoModelForSequenceClassification.from_config(
        XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=16, num_labels=3)
    )
    mix_texts(xlnet)  # which takes its tokens as [T, B]
    with pytest.raises(UserError, match="XLNetForSequenceClassification does not look up a batch's tokens"):
        xlnet(**token_inputs(batch_of(MixedRows(table_of(np.zeros(12, np.int64)), 0.2), "bert")))
