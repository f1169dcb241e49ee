"""Every option of text_classify.py has an effect that is seen, and those that must not change the result do not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from harness import history, weights
from made_data import make_rows, write_json
from safetensors.torch import load_file

from accelerando.base.errors import UserError

NO_DROPOUT = ("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0")
CNN = ("--architecture", "cnn", "--vocab_size", "300", "--embed_size", "16", "--num_filters", "8", "--lr", "1e-2")


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def config(run: Path) -> dict:
    return json.loads((run / "best" / "config.json").read_text())


@pytest.fixture(scope="session")
def baseline(text_args, tmp_path_factory):
    """The weights of the plain run, made once a session."""
    return {}


@pytest.mark.parametrize(
    "flags",
    [
        ("--lr", "1e-3"),
        ("--weight_decay", "0.5"),
        ("--optimizer", "sgd"),
        ("--optimizer", "adamw8bit"),
        ("--optimizer", "lion8bit"),
        ("--optimizer", "paged_adamw"),
        ("--adam_beta1", "0.5"),
        ("--adam_beta2", "0.9"),
        ("--adam_epsilon", "1e-2"),
        ("--scheduler", "cosine"),
        ("--scheduler", "constant"),
        ("--scheduler", "polynomial"),
        ("--scheduler", "onecycle"),
        ("--warmup_steps", "3"),
        ("--warmup_steps", "0.5"),
        ("--grad_clip", "0.01"),
        ("--amp", "bf16"),
        ("--seed", "1"),
        ("--batch_size", "16"),
        ("--max_length", "8"),
        ("--no_length_buckets",),
        ("--epochs", "1"),
        ("--max_steps", "5"),
        ("--hidden_dropout_prob", "0.5"),
        ("--attention_probs_dropout_prob", "0.5"),
        ("--classifier_dropout", "0.9"),
        ("--strategy", "head"),
        ("--strategy", "lora"),
        ("--strategy", "lora", "--lora_r", "2"),
        ("--strategy", "lora", "--lora_alpha", "1"),
        ("--strategy", "lora", "--lora_dropout", "0.9"),
        ("--strategy", "lora", "--lora_targets", "dense"),
        ("--strategy", "lora", "--lora_rank_stabilised"),
        ("--strategy", "lora", "--lora_dora"),
        ("--strategy", "gradual"),
        ("--layer_decay", "0.5"),
        ("--reinit_layers", "1"),
        ("--label_smoothing", "0.2"),
        ("--class_weights",),
        ("--focal_gamma", "2"),
        ("--logit_adjustment", "1"),
        ("--r_drop", "1"),
        ("--balanced",),
        ("--from_scratch",),
        ("--from_scratch", "--num_layers", "1"),
        ("--from_scratch", "--hidden_size", "16"),
        ("--from_scratch", "--intermediate_size", "8"),
        ("--from_scratch", "--num_attention_heads", "2"),
        (*CNN,),
        (*CNN, "--filter_sizes", "2"),
        (*CNN, "--dropout_prob", "0"),
        (*CNN, "--tokenizer_type", "bpe"),
    ],
    ids=" ".join,
)
def test_options_that_change_what_is_learnt(flags: tuple[str, ...], train_here, baseline: dict) -> None:
    if "plain" not in baseline:
        baseline["plain"] = weights(train_here(name="plain") / "last")
    assert weights(train_here(*flags, name="other") / "last") != baseline["plain"]
    others = baseline.setdefault("others", {})
    trained = weights(Path("runs/other/last"))
    assert trained not in others.values(), f"the same weights as {[k for k, v in others.items() if v == trained]}"
    others[flags] = trained


@pytest.mark.parametrize(
    "flags",
    [
        ("--num_workers", "2"),
        ("--eval_batch_size", "7"),
        ("--eval_every", "3"),
        ("--save_every", "2"),
        ("--keep_checkpoints", "5"),
        ("--log_every", "3"),
        ("--report_on_train",),
        ("--report_to", "tensorboard"),
        ("--best_metric", "loss"),
        ("--num_labels", "3"),
    ],
    ids=" ".join,
)
def test_options_that_do_not(flags: tuple[str, ...], train_here, baseline: dict) -> None:
    if "plain" not in baseline:
        baseline["plain"] = weights(train_here(name="plain") / "last")
    assert weights(train_here(*flags, name="other") / "last") == baseline["plain"]


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit"])
def test_a_paged_optimizer_computes_what_its_twin_does(name: str, train_here) -> None:
    plain = train_here("--optimizer", name, name="plain")
    assert weights(train_here("--optimizer", f"paged_{name}", name="paged") / "last") == weights(plain / "last")


def test_it_learns(train_here) -> None:
    flags = ("--epochs", "12", "--batch_size", "16")
    for name, extra in {"bert": ("--warmup_steps", "0.2", *NO_DROPOUT), "cnn": CNN}.items():
        run = train_here(*flags, *extra, name=name)
        assert results(run)["test"]["accuracy"] > 0.9, name


def test_accumulation_equals_the_larger_batch(train_here) -> None:
    """Ragged last window (203 rows) and a micro-batch that does not divide it."""
    whole = train_here(*NO_DROPOUT, "--batch_size", "36", name="whole")
    parts = train_here(*NO_DROPOUT, "--batch_size", "12", "--gradient_accumulation_steps", "3", name="parts")
    for one, other in zip(history(whole, "train"), history(parts, "train"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-3)
    assert results(whole)["steps"] == results(parts)["steps"] == 12


def test_clipping_caps_the_norm_that_is_applied(train_here, monkeypatch) -> None:
    import accelerate

    applied = []
    step = accelerate.optimizer.AcceleratedOptimizer.step

    def spy(self, closure=None):
        norms = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        applied.append(torch.stack(norms).norm().item())
        return step(self, closure)

    monkeypatch.setattr(accelerate.optimizer.AcceleratedOptimizer, "step", spy)
    train_here("--grad_clip", "None", name="unclipped")
    assert max(applied) > 0.1
    applied.clear()
    run = train_here("--grad_clip", "0.05", name="clipped")
    assert max(applied) <= 0.0501
    assert max(row["grad_norm"] for row in history(run, "train")) > 0.06  # what is logged is the norm before


def test_steps_epochs_and_logging_follow_the_flags(train_here) -> None:
    run = train_here("--epochs", "3", "--eval_every", "4", "--save_every", "6", "--keep_checkpoints", "2",
                     "--log_every", "5", name="counts")  # fmt: skip
    assert results(run)["steps"] == 21  # 203 rows, 32 a step
    assert [row["step"] for row in history(run, "validation")] == [4, 8, 12, 16, 20, 21]
    assert [row["step"] for row in history(run, "train")] == [5, 10, 15, 20]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000018", "step_000021"]
    rates = [row["lr"] for row in history(run, "train")]
    assert rates == pytest.approx([3e-3 * (1 - (step - 1) / 21) for step in (5, 10, 15, 20)])
    assert results(run)["samples"] == 3 * 203


def test_the_logged_train_loss_is_the_mean_over_all_samples(train_here) -> None:
    each = train_here("--eval_every", "7", name="each")
    rows = history(each, "train")[:7]
    counts = [32] * 6 + [11]
    mean = sum(row["loss"] * count for row, count in zip(rows, counts, strict=True)) / 203
    assert history(each, "validation")[0]["train_loss"] == pytest.approx(mean, rel=1e-6)


def test_ema_is_what_is_evaluated_and_saved_as_best(train_here) -> None:
    run = train_here("--max_steps", "4", "--eval_every", "4", "--ema_decay", "0.9", "--save_every", "4")
    checkpoint = run / "checkpoints" / "step_000004"
    average, raw, best = (
        load_file(path) for path in (checkpoint / "ema.safetensors", checkpoint / "model.safetensors",
                                     run / "best" / "model.safetensors")
    )  # fmt: skip
    assert torch.equal(best["classifier.weight"], average["classifier.weight"])
    assert not torch.equal(best["classifier.weight"], raw["classifier.weight"])


def test_early_stopping_counts_evaluations_without_improvement(train_here) -> None:
    run = train_here("--epochs", "9", "--lr", "1e-9", "--early_stop", "2", "--best_metric", "loss",
                     "--early_stop_min_delta", "0.5", name="stop")  # fmt: skip
    assert len(history(run, "validation")) == 3  # the first is the best, two bring nothing
    longer = train_here("--epochs", "4", "--lr", "1e-9", "--best_metric", "loss", name="longer")
    assert len(history(longer, "validation")) == 4


def test_best_metric_chooses_the_weights_and_test_scores_them(train_here) -> None:
    for metric, better in (("accuracy", max), ("loss", min), ("f1_macro", max)):
        run = train_here("--epochs", "4", "--best_metric", metric, "--eval_every", "2", name=metric)
        rows = history(run, "validation")
        value = better(row[metric] for row in rows)
        best = next(row for row in rows if row[metric] == value)
        found = results(run)
        assert found["best_step"] == best["step"]
        assert found["validation"]["loss"] == pytest.approx(best["loss"], rel=1e-5)


def test_splits_and_columns(train_here, text_set: Path, tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{"sentence": r["text"], "other": "a new match", "topic": r["label"]} for r in make_rows(90, 5)]
    data = write_json(tmp_path / "pairs.json", rows)
    base = ["--train_file", str(data), "--model_name", str(tiny_bert), "--epochs", "1", "--report_to", "none"]
    flags = ("--text_column", "sentence", "--label_column", "topic", "--validation_fraction", "0.3")
    base += ["--cache_dir", str(tmp_path / "cache"), "--max_length", "60"]
    single = train_here(*flags, base=base, name="single")
    assert results(single)["validation"]["count"] == pytest.approx(27, abs=1)  # each class is rounded
    assert "test" not in results(single)
    pair = train_here(*flags, "--text_pair_column", "other", base=base, name="pair")
    assert weights(pair / "best") != weights(single / "best")
    assert (tmp_path / "cache" / "tokens").is_dir()


def test_nothing_held_out(train_here, text_set: Path) -> None:
    flags = ("--validation_file", "None", "--validation_fraction", "0", "--epochs", "2")
    run = train_here(*flags, "--ema_decay", "0.5", name="all")
    found = results(run)
    assert found["samples"] == 2 * len(json.loads((text_set / "train.json").read_text()))
    assert "validation" not in found
    assert found["best_step"] == found["steps"]
    assert weights(run / "best") != weights(run / "last")  # the average of the weights, and the weights
    assert weights(train_here(*flags, name="plain") / "best") == weights(Path("runs/plain/last"))
    assert "Validation" not in (run / "best" / "README.md").read_text()
    assert "test" in (run / "summary.txt").read_text()
    for more, words in (
        (("--early_stop", "2"), "--early_stop"),
        (("--test_file", "None"), "nothing would be evaluated"),
    ):
        with pytest.raises(UserError, match=words):
            train_here(*flags, *more, name="wrong")
    train_here(*flags, "--test_file", "None", "--report_on_train", name="train")
    assert "train" in results(Path("runs/train"))


def test_names_of_labels_and_overrides_land_in_the_saved_config(train_here) -> None:
    run = train_here("--hidden_dropout_prob", "0.25", "--attention_probs_dropout_prob", "0.15", name="names")
    saved = config(run)
    assert saved["id2label"] == {"0": "money", "1": "space", "2": "sport"}
    assert (saved["hidden_dropout_prob"], saved["attention_probs_dropout_prob"]) == (0.25, 0.15)
    from_scratch = config(train_here("--from_scratch", "--num_layers", "1", "--hidden_size", "16",
                                     "--num_attention_heads", "2", "--intermediate_size", "24", name="shape"))  # fmt: skip
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    assert [from_scratch[key] for key in shape] == [1, 16, 2, 24]
    cnn = config(train_here(*CNN, "--filter_sizes", "2", "5", "--dropout_prob", "0.2", name="cnn"))
    keys = ("embed_size", "num_filters", "filter_sizes", "dropout_prob")
    assert [cnn[key] for key in keys] == [16, 8, [2, 5], 0.2]
    assert cnn["vocab_size"] <= 300


def test_integer_labels_keep_their_numbers(train_here, tiny_bert: Path, tmp_path: Path) -> None:
    numbers = {"money": 4, "space": 0, "sport": 10}
    rows = [{"text": row["text"], "label": numbers[row["label"]]} for row in make_rows(60, 6)]
    base = ["--train_file", str(write_json(tmp_path / "n.json", rows)), "--model_name", str(tiny_bert)]
    run = train_here("--epochs", "1", "--max_length", "48", "--report_to", "none", base=base, name="numbers")
    assert config(run)["id2label"] == {"0": "0", "1": "4", "2": "10"}


def test_lora_trains_adapters_and_head_and_is_saved_merged_and_apart(train_here) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = train_here("--strategy", "lora", "--lora_r", "4", name="lora")
    found = results(run)
    # 2 layers x 2 projections x (32 x 4 + 4 x 32), and the head of 32 x 3 + 3.
    assert found["trainable_parameters"] == 2 * 2 * 256 + 99
    merged = AutoModelForSequenceClassification.from_pretrained(run / "best").eval()
    base = AutoModelForSequenceClassification.from_pretrained(found["config"]["model"]["model_name"], num_labels=3)
    adapted = PeftModel.from_pretrained(base, run / "best" / "adapter").eval()
    tokens = AutoTokenizer.from_pretrained(run / "best")(
        ["goal match", "rocket moon star"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.allclose(merged(**tokens).logits, adapted(**tokens).logits, atol=1e-5)


def test_head_only_leaves_the_body_as_it_was(train_here, tiny_bert: Path) -> None:
    from safetensors.torch import load_file

    run = train_here("--strategy", "head", name="head")
    before, after = load_file(tiny_bert / "model.safetensors"), load_file(run / "best" / "model.safetensors")
    assert all(torch.equal(before[name], after[f"bert.{name}"]) for name in before)
    assert results(run)["trainable_parameters"] == 99


def test_head_only_of_the_cnn_is_its_classifier(train_here) -> None:
    run = train_here(*CNN, "--strategy", "head", name="head")
    assert results(run)["trainable_parameters"] == 3 * 8 * 3 + 3  # 3 sizes of 8 filters, 3 labels


def test_a_small_gain_is_kept_though_it_does_not_count_for_patience(train_here) -> None:
    flags = ("--best_metric", "loss", "--early_stop_min_delta", "9", "--epochs", "4", "--early_stop", "3")
    run = train_here(*flags, "--lr", "1e-4", name="gain")
    rows = history(run, "validation")
    assert len(rows) == 4  # the first, and three that gain less than 9
    assert results(run)["best_step"] == min(rows, key=lambda row: row["loss"])["step"] > 7


@pytest.mark.exhaustive
def test_compiled_runs_save_under_plain_names(train_here) -> None:
    plain = train_here(*NO_DROPOUT, "--max_steps", "3", name="plain")
    compiled = train_here(*NO_DROPOUT, "--max_steps", "3", "--compile_model", name="compiled")
    from safetensors import safe_open

    with safe_open(compiled / "best" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "_orig_mod" in name]  # noqa: SIM118
    for one, other in zip(history(plain, "train"), history(compiled, "train"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.figures
def test_config_report_and_card_say_what_was_trained(train_here) -> None:
    run = train_here(name="whole")
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["lr"] == 3e-3
    assert np.array(results(run)["confusion_matrix"]).sum() == 67
    report = (run / "report.html").read_text()
    assert all(word in report for word in ("money", "space", "sport", "text_classify.py"))
    assert "pipeline_tag: text-classification" in (run / "best" / "README.md").read_text()


def test_defaults_name_the_run_after_what_distinguishes_it(
    text_args, train_here, text_set: Path, tiny_bert: Path
) -> None:
    train_here("--max_steps", "1", "--output_dir", "elsewhere", name="x")
    assert Path("elsewhere/x/results.json").is_file()
    sys_argv = [*text_args, "--max_steps", "1"]
    train_here(base=sys_argv[:], name="named")
    import text_classify

    args = text_classify.Args(train_file="a/trec/train.json", model_name="b/minilm", batch_size=8, lr=1e-4, seed=7)
    assert text_classify.default_name(args) == "trec_minilm_full_bs8_lr0.0001_seed7"


def test_checkpoints_on_disk_are_plain_files(train_here) -> None:
    run = train_here("--max_steps", "2", name="plain")
    files = {path.name for path in (run / "checkpoints" / "step_000002").iterdir()}
    plain = {"model.safetensors", "optimizer.safetensors", "state.json", "rng.json", "manifest.json"}
    assert files == plain | {"best", "metrics.jsonl"}


@pytest.mark.figures
def test_a_loss_that_is_nan_is_said_and_ends_the_run(train_here, capsys) -> None:
    """After five steps; if that is not wanted, with a model and a report all the same."""
    flags = ("--lr", "1e30", "--grad_clip", "None", "--best_metric", "loss", "--log_every", "1")
    with pytest.raises(UserError, match=r"5 steps in a row \(--max_bad_steps\).* with a lower --lr or --grad_clip"):
        train_here(*flags, name="ended")
    run = train_here(*flags, "--max_bad_steps", "1000", name="nan")
    assert "The loss is nan: lower --lr" in (run / "logs" / "train.log").read_text()
    assert (run / "best" / "model.safetensors").is_file()
    assert (run / "report.html").is_file()


def test_an_overflow_under_fp16_does_not_move_the_schedule(train_here, monkeypatch) -> None:
    """No GPU here: the scaler's verdict on each third step is played."""
    import accelerate

    steps = {"taken": 0}

    def skipped(self) -> bool:
        steps["taken"] += 1
        return steps["taken"] % 3 == 0

    monkeypatch.setattr(accelerate.Accelerator, "optimizer_step_was_skipped", property(skipped))
    run = train_here(name="fp16")
    rates = [row["lr"] for row in history(run, "train")]
    assert rates[2] == rates[3] != rates[4]


def test_a_setting_that_nothing_reads_is_named(train_here) -> None:
    flags = ("--embed_size", "64", "--wandb_project", "mine", "--momentum", "0.5", "--max_steps", "1")
    log = (train_here(*flags) / "logs" / "train.log").read_text()
    for line in ("--embed_size has no effect here without --architecture cnn", "--wandb_project has no effect here",
                 "--momentum has no effect here without --optimizer sgd"):  # fmt: skip
        assert log.count(line) == 1, line
    assert log.count("has no effect") == 3


def test_deterministic_kernels_are_asked_for_on_a_gpu(train_here, monkeypatch) -> None:
    import torch

    from accelerando.train.accelerator import choose_deterministic_kernels

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    log = (train_here("--deterministic", "--max_steps", "1") / "logs" / "train.log").read_text()
    on_gpu = torch.cuda.is_available()
    assert ("--deterministic has no effect here without GPU" in log) == (not on_gpu)
    try:
        assert torch.are_deterministic_algorithms_enabled() == on_gpu
        choose_deterministic_kernels()
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_roberta_counts_positions_from_behind_the_padding(train_here, tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    folder = tmp_path / "roberta"
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=34, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    longest = 34 - tokenizer.pad_token_id - 1
    train_here("--model_name", folder, "--max_length", longest, "--max_steps", "2", name="fits")
    with pytest.raises(UserError, match=f"exceeds the {longest} positions"):
        train_here("--model_name", folder, "--max_length", longest + 1, name="too_long")


def test_what_max_length_cuts_off_is_said(train_here, text_set: Path, tmp_path: Path) -> None:
    """The share of the tokens that the model never sees, for single texts and pairs, from the cache too."""
    from transformers import AutoTokenizer

    rows = json.loads((text_set / "train.json").read_text())
    for row in rows:
        row["second"] = " ".join(row["text"].split()[:3])
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    for number, pair in enumerate(((), ("--text_pair_column", "second"))):
        flags = ("--max_length", "12", "--validation_file", "None", "--test_file", "None", "--validation_fraction", "0",
                 "--report_on_train")  # fmt: skip
        for name in (f"first{number}", f"cached{number}"):
            run = train_here("--train_file", tmp_path / "pairs.json", *pair, *flags, "--max_steps", "1", name=name)
            log = (run / "logs" / "train.log").read_text()
            found = re.search(
                r"--max_length 12 cuts off ([\d.]+) % of the tokens of train, in ([\d.]+) % of its rows", log
            )
            tokenizer = AutoTokenizer.from_pretrained(run / "best")
            texts = ([row["text"] for row in rows], [row["second"] for row in rows] if pair else None)
            whole = [len(ids) for ids in tokenizer(*texts, truncation=False)["input_ids"]]
            kept = [len(ids) for ids in tokenizer(*texts, truncation=True, max_length=12)["input_ids"]]
            assert float(found[1]) == pytest.approx(100 * (1 - sum(kept) / sum(whole)), abs=0.06)
            assert float(found[2]) == pytest.approx(100 * np.mean(np.array(whole) > np.array(kept)), abs=0.06)
