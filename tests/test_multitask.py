"""text_multitask.py: rows of several data sets in one run, an encoder for all of them, and heads that open alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import MULTITASK, TEXT, history, results, run_in_this_process, script_module, weights
from made_data import write_json
from safetensors.torch import load_file

from accelerando.base.config import parse_args
from accelerando.base.errors import UserError
from accelerando.data.mixture import Mixture
from accelerando.data.order import deal_groups, epoch_order
from accelerando.train.batches import PartedData, TrainBatches

ROOT = Path(__file__).resolve().parent.parent
NO_DROPOUT = ("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0")


def mixture(**settings: object) -> Mixture:
    """Parts of 70, 45 and 5 samples with lengths."""
    rng = np.random.default_rng(0)
    parts = {name: [{"value": number} for number in range(size)] for name, size in {"a": 70, "b": 45, "c": 5}.items()}
    lengths = {name: rng.integers(3, 60, len(part)) for name, part in parts.items()}
    return Mixture(parts, lengths, **settings)


def test_an_epoch_has_every_row_once_in_blocks_of_a_part() -> None:
    data = mixture(block=8)
    order = data.epoch_order(3, 0)
    assert sorted(order.tolist()) == list(range(120))
    assert not np.array_equal(order, data.epoch_order(3, 1))
    assert np.array_equal(order, data.epoch_order(3, 0))
    part = data.part_of(order)
    whole = 8 * (70 // 8 + 45 // 8)
    blocks = part[:whole].reshape(-1, 8)
    assert (blocks == blocks[:, :1]).all()
    assert np.count_nonzero(np.diff(blocks[:, 0])) > 3, "the parts take turns"
    # Within a part the order is the one that it would have alone.
    assert np.array_equal(order[part == 0], epoch_order(70, 3, 0, data.lengths["a"]))
    assert [data[int(row)] for row in order[part == 1][:3]] == [
        {"value": int(row) - 70, "part": 1} for row in order[part == 1][:3]
    ]
    assert data.problem(72) == "row 2 of b"
    assert isinstance(data, PartedData)


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({"sampling": "uniform"}, [40, 40, 40]),
        ({"sampling": "temperature", "temperature": 2.0}, [58, 47, 15]),
        ({"sampling": "temperature", "temperature": 1.0}, [70, 45, 5]),
    ],
)
def test_sampling_sets_the_shares_and_repeats_rows_in_turn(settings: dict, counts: list[int]) -> None:
    data = mixture(**settings)
    power = {"uniform": 0.0}.get(settings["sampling"], 1 / settings.get("temperature", 1))
    sizes = np.array([70, 45, 5])
    assert counts == pytest.approx(120 * sizes**power / (sizes**power).sum(), abs=1)
    order = data.epoch_order(0, 0)
    assert len(order) == len(np.unique(order)) == 120  # repeats are numbered
    part = data.part_of(order)
    assert np.bincount(part).tolist() == counts
    times = np.bincount(order[part == 2] % 120 - 115, minlength=5)
    assert times.max() - times.min() <= 1
    if counts[0] < 70:
        seen = np.unique(
            np.concatenate([rows[data.part_of(rows) == 0] for rows in map(data.epoch_order, [0] * 9, range(9))])
        )
        assert len(seen) > 65  # another choice in each epoch


@pytest.mark.parametrize(("batch_size", "processes", "steps"), [(24, 1, 1), (12, 2, 1), (4, 2, 3), (7, 1, 2)])
def test_a_micro_batch_has_one_part_and_every_row_is_used_once(batch_size: int, processes: int, steps: int) -> None:
    """On any number of processes, which have as many micro-batches each; windows of as many rows have the same rows."""
    collate = lambda samples: {name: torch.tensor([one[name] for one in samples]) for name in samples[0]}  # noqa: E731
    used, windows = [], []
    for process in range(processes):
        batches = TrainBatches(mixture(block=8), collate, batch_size, steps, 1, num_processes=processes,
                               process_index=process)  # fmt: skip
        lengths = []
        for number, window in enumerate(batches.windows(0)):
            lengths.append(len(window))
            for batch in window:
                assert len(batch["part"].unique()) == 1
                used += [(number, int(row)) for row in batch["index"][batch["weight"] > 0]]
        windows.append(lengths)
    assert sorted(row for _, row in used) == list(range(120))
    assert windows[0] == windows[-1]
    if batch_size * processes * steps == 24:
        order = mixture(block=8).epoch_order(1, 0)
        for number in range(5):
            assert sorted(row for one, row in used if one == number) == sorted(order[24 * number : 24 * number + 24])


def test_a_process_without_rows_of_a_part_keeps_step() -> None:
    window, groups = np.arange(9), np.array([0] * 8 + [1])
    one, two = (deal_groups(window, groups, 4, 2, process) for process in range(2))
    assert [len(part) for part in one.micro_batches] == [4, 1]
    assert (one.counts, two.counts) == ([True, True], [True, False])
    assert two.micro_batches[1].tolist() == [8]


def test_one_task_alone_is_trained_as_by_text_classify(
    multitask_here, text_args, multitask_args, tmp_path, monkeypatch
) -> None:
    """The same bits, dropout included."""
    file = multitask_args[1].partition("=")[2]
    flags = ("--validation_file", "None", "--test_file", "None", "--train_file", file)
    steps = ("--max_steps", "5", "--batch_size", "12", "--gradient_accumulation_steps", "2")
    run = multitask_here("--train_files", f"topic={file}", "--validation_files", "--test_files", *steps, name="multi")
    for here in run_in_this_process(TEXT, text_args, tmp_path, monkeypatch):
        alone = load_file(here(*flags, *steps, name="alone") / "last" / "model.safetensors")
    found = load_file(run / "last" / "model.safetensors")
    found |= {
        name.replace("heads.0.", ""): tensor
        for name, tensor in load_file(run / "last" / "model_heads.safetensors").items()
    }
    assert found.keys() == alone.keys()
    assert all(torch.equal(tensor, alone[name]) for name, tensor in found.items())


def test_both_tasks_are_learnt_and_each_opens_alone(multitask_here, multitask_args, call_tool, tmp_path: Path) -> None:
    """The report's numbers of a task are those of predict.py and evaluate.py with its folder; the encoder's weights are
    stored once, and the run itself is named as what it is."""
    from transformers import pipeline

    run = multitask_here(
        "--epochs", "14", "--batch_size", "16", "--lr", "5e-3", *NO_DROPOUT, "--eval_every", "91", name="both"
    )
    found = results(run)["test"]
    assert found["topic.accuracy"] > 0.85 and found["play.accuracy"] > 0.85
    assert found["mean"] == pytest.approx((found["topic.accuracy"] + found["play.accuracy"]) / 2)
    assert found["loss"] == pytest.approx((found["topic.loss"] + found["play.loss"]) / 2)
    summary, csv = (run / "summary.txt").read_text(), (run / "metrics.csv").read_text()
    assert f"{found['play.f1_macro']:.4f}" in summary and "play.f1_macro" in csv
    files = dict(word.split("=") for word in multitask_args[7:9])
    predict, evaluate = (script_module(ROOT / "tools" / f"{name}.py") for name in ("predict", "evaluate"))
    for name in ("topic", "play"):
        folder = run / "best" / name
        rows = json.loads(Path(files[name]).read_text())
        code, out, err = call_tool(predict, folder, "--file", files[name])
        assert code == 0, err
        right = [json.loads(line)["label"] == row["label"] for line, row in zip(out.splitlines(), rows, strict=True)]
        assert np.mean(right) == pytest.approx(found[f"{name}.accuracy"], abs=1e-9)
        code, out, err = call_tool(evaluate, folder, "--data", files[name], "--format", "json")
        assert code == 0, err
        assert json.loads(out)["runs"][str(folder)]["loss"] == pytest.approx(found[f"{name}.loss"], rel=1e-4)
        card = (folder / "README.md").read_text()
        assert "| accuracy |" in card and f"runs/both/best/{name}" in card
        classify = pipeline("text-classification", model=str(folder), top_k=None)
        assert {one["label"] for one in classify("a goal")[0]} == {row["label"] for row in rows}
    stored = [run / "best" / "model.safetensors"]
    stored += [run / "best" / name / "model-00001-of-00002.safetensors" for name in ("topic", "play")]
    assert len({path.stat().st_ino for path in stored}) == 1
    assert len({path.stat().st_mode for path in (run / "best").rglob("*") if path.is_file()}) == 1
    code, _, err = call_tool(predict, run, "a goal")
    assert code == 2 and "one encoder for play and topic: name one of them" in err


@pytest.fixture(scope="session")
def trained() -> dict[str, tuple[bytes, bytes]]:
    """Encoder and heads of runs, by their flags."""
    return {}


@pytest.mark.parametrize(
    "flags",
    [
        ("--sampling", "uniform"),
        ("--sampling", "temperature", "--sampling_temperature", "5"),
        ("--task_block", "4"),
        ("--task_weights", "play=0.2"),
        ("--uncertainty_weighting",),
        ("--uncertainty_weighting", "--uncertainty_lr", "0.5"),
        ("--label_smoothing", "0.2"),
        pytest.param(("--sampling", "temperature"), marks=pytest.mark.exhaustive),
        pytest.param(("--no_length_buckets",), marks=pytest.mark.exhaustive),
        pytest.param(("--classifier_dropout", "0.9"), marks=pytest.mark.exhaustive),
        ("--strategy", "head"),
    ],
    ids=" ".join,
)
def test_options_that_change_what_is_learnt(flags: tuple[str, ...], multitask_here, trained) -> None:
    def train(*more: str) -> tuple[bytes, bytes]:
        run = multitask_here(*more, "--max_steps", "3", "--batch_size", "48", name=f"run{len(trained)}")
        return weights(run / "last"), (run / "last" / "model_heads.safetensors").read_bytes()

    if not trained:
        trained[""] = train()
    found = train(*flags)
    assert found[1] not in [heads for _, heads in trained.values()]
    trained["".join(flags)] = found


def test_the_heads_alone_leave_the_encoder_as_it_was(multitask_here, tiny_bert: Path) -> None:
    run = multitask_here("--strategy", "head", "--max_steps", "2", name="head")
    before, after = load_file(tiny_bert / "model.safetensors"), load_file(run / "last" / "model.safetensors")
    assert all(torch.equal(after[f"bert.{name}"], tensor) for name, tensor in before.items())
    assert results(run)["trainable_parameters"] == 2 * 33 + 3 * 33


def test_weights_are_learned_as_in_the_paper(multitask_here) -> None:
    """The loss is that of arXiv:1705.07115; the log variances are in the checkpoint and its optimizer, not in best/."""
    script = script_module(MULTITASK)
    args = script.Args()
    tasks = [
        SimpleNamespace(problem_type="single_label", weight=2.0),
        SimpleNamespace(problem_type="regression", weight=1.0),
    ]
    logits, variances = torch.randn(4, 2), torch.tensor([0.7, -0.3])
    fake = type(
        "Model",
        (),
        {"training": True, "__call__": lambda self, part: SimpleNamespace(logits=logits, log_variances=variances)},
    )()
    labels, numbers = torch.tensor([0, 1, 1, 0]), torch.randn(4, 2)
    data = SimpleNamespace(tasks=tasks)
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    losses, _ = script.compute_loss(fake, {"part": torch.tensor([0]), "labels": labels}, data, args)
    sigma = (variances[0] / 2).exp()
    assert torch.allclose(losses, 2 * plain / sigma**2 + sigma.log())
    losses, _ = script.compute_loss(fake, {"part": torch.tensor([1]), "labels": numbers}, data, args)
    sigma = (variances[1] / 2).exp()
    assert torch.allclose(losses, ((logits - numbers) ** 2).mean(1) / (2 * sigma**2) + sigma.log())
    run = multitask_here("--uncertainty_weighting", "--uncertainty_lr", "0.05", "--epochs", "1", name="learned")
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert load_file(checkpoint / "model.safetensors")["log_variances"].abs().min() > 0.01
    assert any("log_variances" in name for name in load_file(checkpoint / "optimizer.safetensors"))
    kept = [name for path in (run / "best").rglob("*.safetensors") for name in load_file(path)]
    assert not any("log_variances" in name for name in kept)
    row = history(run, "validation")[-1]
    assert history(run, "train")[0]["lr"] == 3e-3  # that of the weights
    learned = load_file(checkpoint / "model.safetensors")["log_variances"]
    assert [row["topic.learned_weight"], row["play.learned_weight"]] == pytest.approx((-learned).exp().tolist())


def test_targets_of_every_kind_in_one_run(multitask_here, multitask_args, tmp_path: Path, call_tool) -> None:
    """Several labels, a number of a pair of texts, and a class, each in columns of its own."""
    rows = json.loads(Path(multitask_args[1].partition("=")[2]).read_text())
    several = [
        {"body": row["text"], "tags": f"{row['label']}|long" if len(row["text"]) > 90 else row["label"]} for row in rows
    ]
    pairs = [{"text": row["text"][:60], "other": "a goal", "label": len(row["text"]) / 100} for row in rows[:70]]
    files = [f"tags={write_json(tmp_path / 'tags.json', several)}", f"pair={write_json(tmp_path / 'pair.json', pairs)}"]
    flags = ("--train_files", *files, multitask_args[1], "--validation_files", "--test_files", "--text_column", "text",
             "tags=body", "--label_column", "label", "tags=tags", "--label_delimiter", "tags=|", "--text_pair_column",
             "pair=other", "--validation_fraction", "0.2")  # fmt: skip
    run = multitask_here(*flags, "--epochs", "1", "--best_metric", "pair.mse", name="kinds")
    found = results(run)
    assert (
        found["tasks"]["tags"]["problem_type"] == "multi_label"
        and found["tasks"]["pair"]["problem_type"] == "regression"
    )
    names = ("tags.f1_macro", "pair.pearson", "topic.accuracy")
    assert found["validation"]["mean"] == pytest.approx(np.mean([found["validation"][name] for name in names]))
    assert set(found["tasks"]["tags"]["thresholds"]) == {"long", "money", "space", "sport"}
    assert (run / "logs" / "classification_report_validation_tags.txt").is_file()
    page = (run / "report.html").read_text()
    assert all(f"Worst mistakes, {name}, validation" in page for name in ("tags", "pair", "topic"))
    predict = script_module(ROOT / "tools" / "predict.py")
    code, out, err = call_tool(predict, run / "best" / "tags", "a goal")
    assert code == 0 and "labels" in json.loads(out), err
    code, out, err = call_tool(predict, run / "best" / "pair", "a goal", "--text_pair", "a match")
    assert code == 0 and "value" in json.loads(out), err


def test_yaml_takes_mappings_and_the_guides_spelling(tmp_path: Path) -> None:
    script = script_module(MULTITASK)
    file = tmp_path / "tasks.yaml"
    file.write_text(
        "multitask:\n  models: {task1: m, task2: m}\n  datasets: {task1: a.json, task2: b.json}\n"
        "  loss_weights: {task1: 0.7, task2: 0.3}\ndata:\n  label_columns: {task2: [x, y]}\ntraining:\n  epochs: 2\n"
    )
    args = parse_args(script.Args, script.ALIASES, ["--config", str(file)])
    script.check_args(args)
    assert (args.train_files, args.task_weights) == (("task1=a.json", "task2=b.json"), ("task1=0.7", "task2=0.3"))
    assert (args.model_name, args.label_columns, args.epochs) == ("m", ("task2=x,y",), 2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--train_files",), "--train_files is missing"),
        (("--train_files", "a.json"), "--train_files a.json: write name=value"),
        (("--test_files", "other=x.json"), "--test_files: task 'other': not in --train_files"),
        (("--train_files", "a/b=x.json"), "task 'a/b'"),
        (("--task_weights", "play=-1"), "--task_weights play=-1: a number of at least 0"),
        (
            ("--best_metric", "play.mse"),
            "--best_metric play.mse is not measured: use one of mean, loss, topic.accuracy",
        ),
        (("--models", "topic=a", "play=b"), "--models a and b: the tasks share one encoder"),
        (("--problem_type", "play=classes"), "--problem_type classes: choose from single_label"),
        (("--sampling_temperature", "0.5"), "--sampling_temperature 0.5: "),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_said_in_one_line(flags: tuple[str, ...], words: str, multitask_here) -> None:
    with pytest.raises(UserError) as found:
        multitask_here(*flags)
    assert words in str(found.value)
    assert not Path("runs").exists()
