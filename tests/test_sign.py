"""sign_train.py: every option has an effect, the guide's commands run, bad input is one line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from harness import SIGN, history, launch, weights
from made_data import make_clip
from safetensors.torch import load_file, save_file

from accelerando.base.errors import UserError

GRU = ("--model", "iv3_gru")


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.fixture(scope="module")
def known() -> dict:
    """Weights of the runs so far: no two sets of flags may give the same ones."""
    return {}


@pytest.mark.parametrize(
    "flags",
    [
        ("--lr", "1e-3"), ("--weight-decay", "0.5"), ("--grad-clip", "0.01"), ("--batch-size", "16"), ("--seed", "1"),
        ("--gradient-accumulation-steps", "2"), ("--epochs", "1"), ("--max_steps", "4"), ("--amp", "bf16"),
        ("--scheduler", "cosine"), ("--scheduler", "warmup_cosine"), ("--scheduler", "onecycle"),
        ("--warmup_steps", "3"), ("--optimizer", "adamw8bit"), ("--no_length_buckets",), ("--balanced",),
        ("--alpha", "0.9"), ("--beta", "0"), ("--loss", "focal"), ("--loss", "focal", "--focal_gamma", "5"),
        ("--label_smoothing", "0.2"), ("--learned_weights",), ("--curriculum", "gloss_first"),
        ("--curriculum", "category_first"), ("--curriculum", "dynamic"),
        ("--curriculum", "gloss_first", "--curriculum_share", "0.6"), ("--rotation", "10"), ("--scale", "0.2"),
        ("--shift", "0.2"), ("--noise", "0.02"), ("--time_warp", "0.2"), ("--time_mask", "0.3"),
        ("--frame_drop", "0.2"), ("--mirror", "0.5"), ("--normalisation", "standard"), ("--normalisation", "none"),
        ("--velocities",), ("--relative_hands",), ("--use_mask",), ("--hidden_size", "16"), ("--num_layers", "1"),
        ("--num_attention_heads", "2"), ("--intermediate_size", "16"), ("--pooling", "max"), ("--pooling", "cls"),
        ("--no_final_norm",), ("--conv_kernel", "3"), ("--dropout", "0.3"), ("--num-gloss", "9"), ("--num-cat", "5"),
        ("--kp-key", "X2048", "--normalisation", "none"), GRU, (*GRU, "--gru_sizes", "8"), (*GRU, "--dropout", "0.5"),
        (*GRU, "--feature-key", "X"), (*GRU, "--normalisation", "standard"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_that_change_what_is_learnt(flags: tuple[str, ...], sign_here, known: dict) -> None:
    if not known:
        known["plain"] = weights(sign_here(name="plain") / "last")
    trained = weights(sign_here(*flags, name="other") / "last")
    assert trained not in known.values(), f"the same weights as {[k for k, v in known.items() if v == trained]}"
    known[flags] = trained


@pytest.mark.parametrize(
    "flags",
    [
        ("--num-workers", "2"), ("--auto-workers",), ("--eval_batch_size", "7"), ("--eval_every", "2"),
        ("--save_every", "2"), ("--log_every", "3"), ("--report_on_train",), ("--no-pretrained-backbone",),
        ("--best_metric", "loss"), ("--num-gloss", "6", "--num-cat", "3"), ("--ema_decay", "0.9"),
        ("--scheduler", "plateau", "--scheduler-patience", "3"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_that_do_not(flags: tuple[str, ...], sign_here, known: dict) -> None:
    if not known:
        known["plain"] = weights(sign_here(name="plain") / "last")
    run = sign_here(*flags, name="other")
    assert weights(run / "last") == known["plain"]
    named = "--pretrained_backbone has no effect here" in (run / "logs" / "train.log").read_text()
    assert named is ("--no-pretrained-backbone" in flags)
    if "--ema_decay" in flags:
        assert weights(run / "best") != weights(Path("runs/other/last"))


@pytest.mark.figures
def test_it_learns_and_leaves_what_it_promises(sign_here) -> None:
    run = sign_here("--epochs", "25", "--log-csv", "logs/table.csv", "--report_on_train", "--report_to", "tensorboard")
    found = results(run)
    assert found["test"]["gloss_accuracy"] >= 0.8
    assert found["test"]["gloss_accuracy"] <= found["test"]["gloss_top5"] <= 1
    assert found["test"]["cat_accuracy"] >= 0.8
    assert {split: found[split]["count"] for split in ("train", "validation", "test")} == {
        "train": 75, "validation": 23, "test": 19
    }  # fmt: skip
    assert np.sum(found["gloss_confusion_matrix"]) == 19
    occluded, visible = found["test"]["occluded_accuracy"], found["test"]["visible_accuracy"]
    assert (occluded * 4 + visible * 15) / 19 == pytest.approx(found["test"]["gloss_accuracy"])
    assert found["validation"]["gloss_accuracy"] == max(row["gloss_accuracy"] for row in history(run, "validation"))
    for name in ("summary.txt", "report.html", "metrics.csv", "plots/curves.png", "plots/confusion_test_cat.png",
                 "logs/classification_report_test_gloss.txt", "best/README.md", "last/config.json"):  # fmt: skip
        assert (run / name).stat().st_size > 100, name
    rows = list(csv.DictReader(Path("logs/table.csv").read_text().splitlines()))
    assert list(rows[0]) == ["epoch", "train_loss", "val_loss", "val_gloss_acc", "val_cat_acc", "lr", "epoch_time",
                             "gpu_memory_allocated", "gpu_memory_reserved"]  # fmt: skip
    assert [float(row["epoch"]) for row in rows] == list(range(1, 26))
    assert all(float(row["epoch_time"]) > 0 for row in rows)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) / 2


def test_the_model_card_s_code_runs(sign_here, sign_set: Path, monkeypatch, capsys) -> None:
    run = sign_here("--epochs", "12")
    code = (run / "best" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    clip = sorted((sign_set / "test").glob("*.npz"))[4]
    shutil.copy(clip, "clip.npz")
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.strip().splitlines()[-1] in list("012345")


def test_loss_weights_and_curricula(sign_here) -> None:
    import sys

    module = sys.modules["sign_train"]
    args = module.Args(alpha=0.6, beta=0.4, curriculum_share=0.5)
    weights_at = {
        kind: [
            module.loss_weights(dataclass_replace(args, curriculum=kind), progress) for progress in (0, 0.25, 0.5, 1)
        ]
        for kind in ("none", "gloss_first", "category_first", "dynamic")
    }
    assert weights_at["none"] == [(0.6, 0.4)] * 4
    assert weights_at["gloss_first"] == [(0.6, 0), (0.6, 0), (0.6, 0.4), (0.6, 0.4)]
    assert weights_at["category_first"] == [(0, 0.4), (0, 0.4), (0.6, 0.4), (0.6, 0.4)]
    assert weights_at["dynamic"][0] == (0, 1.0)
    assert weights_at["dynamic"][1] == pytest.approx((0.3, 0.7))
    assert weights_at["dynamic"][3] == (0.6, 0.4)


def dataclass_replace(args, **changes):
    import dataclasses

    return dataclasses.replace(args, **changes)


def test_focal_loss_is_the_formula(sign_here) -> None:
    import sys

    module = sys.modules["sign_train"]
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    right = logits.softmax(1)[torch.arange(5), labels]
    expected = -((1 - right) ** 3) * right.log()
    found = module.class_losses(logits, labels, focal_gamma=3)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_table_or_a_run_that_cannot_be_written_is_said_before_training(sign_here, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for flag, path in (("--log_csv", "file/log.csv"), ("--output_dir", "file/runs")):
        with pytest.raises(UserError, match=f"{flag} {path}.*: .*/file is not a folder; name another path"):
            sign_here(flag, path)
    assert not (tmp_path / "runs").exists()


def test_auto_batch_size_is_measured_and_kept(sign_here) -> None:
    run = sign_here("--auto-batch-size", "--epochs", "1")
    log = (run / "logs" / "train.log").read_text()
    size = int(log.split("Micro-batch size ")[1].split(":")[0])
    assert size in (1, 2, 4, 8, 16, 32, 64)
    assert results(run)["steps"] == -(-75 // size)
    state = json.loads(next((run / "checkpoints").iterdir()).joinpath("state.json").read_text())["state"]
    assert state["chosen"] == {"batch_size": [32, size], "auto_batch_size": [True, False]}
    # Written down: a run that is repeated or resumed does not measure anew.
    settings = yaml.safe_load((run / "config.yaml").read_text())["training"]
    assert (settings["batch_size"], settings["auto_batch_size"]) == (size, False)
    assert f" --batch_size {size} --no_auto_batch_size\n" in (run / "summary.txt").read_text()
    sign_here("--auto-batch-size", "--epochs", "2", "--resume")
    log = (run / "logs" / "train.log").read_text()
    assert log.count("Micro-batch size") == 1
    assert [line.split(" | ")[-1] for line in log.splitlines() if "with a different" in line] == [
        "Resumed with a different epochs: 2 instead of 1"
    ]


# Every command of the guide, at our paths; the launcher's own flags stand before the script.
DATA = (
    "--{kind}-train", "{set}/train", "--{kind}-val", "{set}/val", "--labels-train-csv", "{set}/train/labels.csv",
    "--labels-val-csv", "{set}/val/labels.csv", "--num-gloss", "105", "--num-cat", "10",
)  # fmt: skip
COMMANDS = {
    "basic transformer": ("transformer", "--epochs 50 --batch-size 32 --auto-workers --auto-batch-size --enable-parallel --amp"),
    "basic gru": ("iv3_gru", "--epochs 50 --batch-size 32 --auto-workers --auto-batch-size --amp"),
    "multi gpu": ("transformer", "--epochs 100 --batch-size 64 --auto-workers --auto-batch-size --amp --lr 5e-5 "
                  "--weight-decay 1e-4 --scheduler plateau --grad-clip 1.0"),
    "local": ("transformer", "--epochs 50 --batch-size 16 --auto-workers --auto-batch-size --lr 1e-4 --weight-decay 1e-3 "
              "--scheduler plateau"),
    "compiled": ("transformer", "--batch-size 64 --amp --compile-model --auto-workers --gradient-accumulation-steps 2"),
    "limited memory": ("transformer", "--batch-size 16 --auto-batch-size --gradient-accumulation-steps 4 --amp "
                       "--auto-workers"),
    "logged": ("transformer", "--epochs 100 --batch-size 64 --lr 5e-5 --weight-decay 1e-4 --amp --auto-workers "
               "--gradient-accumulation-steps 2 --grad-clip 1.0 --scheduler plateau --early-stop 15 "
               "--log-csv logs/transformer_multi_gpu.csv"),
    "single gpu": ("transformer", "--epochs 50 --batch-size 32 --lr 3e-4 --weight-decay 1e-4 --amp --auto-workers "
                   "--auto-batch-size --gradient-accumulation-steps 2 --grad-clip 1.0 --scheduler cosine "
                   "--early-stop 10 --log-csv logs/transformer_single_gpu.csv"),
    "memory": ("iv3_gru", "--epochs 40 --batch-size 16 --gradient-accumulation-steps 4 --amp --auto-workers "
               "--auto-batch-size --scheduler plateau --scheduler-patience 3 --early-stop 8 "
               "--log-csv logs/iv3_gru_efficient.csv"),
    "cpu": ("transformer", "--epochs 30 --batch-size 8 --auto-workers --auto-batch-size --scheduler plateau "
            "--log-csv logs/cpu_training.csv"),
    "loss weights": ("transformer", "--alpha 0.7 --beta 0.3 --pin-memory --num-workers 0"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.exhaustive] * (number > 4)) for number, name in enumerate(COMMANDS)],
)
def test_the_guide_s_commands_run(name: str, sign_here, sign_set: Path, tmp_path: Path, quick_compile) -> None:
    model, flags = COMMANDS[name]
    kind = {"transformer": "keypoints", "iv3_gru": "features"}[model]
    data = [word.format(kind=kind, set=sign_set) for word in DATA]
    short = ("--max_steps", "2", "--cache_dir", str(tmp_path / "cache"), "--report_to", "none")
    run = sign_here("--model", model, *flags.split(), *short, base=data)
    assert results(run)["steps"] == 2
    config = json.loads((run / "best" / "config.json").read_text())
    assert len(config["gloss_names"]) == 105
    assert len(config["cat_names"]) == 10
    if "--log-csv" in flags:
        assert len(list(csv.DictReader(Path(flags.split()[-1]).read_text().splitlines()))) >= 1


@pytest.mark.launch
@pytest.mark.parametrize("flags", [("--model", "transformer"), (*GRU, "--no-pretrained-backbone")], ids=" ".join)
def test_smoke_test_needs_no_data(flags: tuple[str, ...], tmp_path: Path) -> None:
    done = launch(SIGN, *flags, "--smoke-test", "--num-gloss", "105", "--num-cat", "10", "--epochs", "1", cwd=tmp_path)
    assert "gloss_accuracy" in done.out
    assert not done.err.strip()
    (run,) = (tmp_path / "runs").iterdir()
    assert results(run)["test"]["count"] == 16


def test_nothing_held_out(sign_here, sign_set: Path) -> None:
    base = ["--keypoints-train", str(sign_set / "train"), "--report_to", "none", "--epochs", "1", "--hidden_size", "32"]
    base += ["--cache_dir", "cache", "--validation_fraction", "0"]
    run = sign_here("--keypoints-test", str(sign_set / "test"), base=base, name="all")
    assert results(run)["samples"] == 75
    assert results(run)["test"]["count"] == 19
    assert "validation" not in results(run)
    assert weights(run / "best") == weights(run / "last")
    assert "Validation" not in (run / "best" / "README.md").read_text()
    for more, words in (((), "nothing would be evaluated"), (("--log_csv", "log.csv"), "--log_csv")):
        with pytest.raises(UserError, match=words):
            sign_here(*more, base=base, name="wrong")
    run = sign_here("--report_on_train", base=base, name="train")
    assert results(run)["train"]["count"] == 75


def test_weights_of_an_earlier_run_are_the_start(sign_here, tmp_path: Path) -> None:
    """All of them, or all but a head whose classes are others; training goes on from there."""
    first = sign_here("--epochs", "1", name="first")
    start = load_file(first / "best" / "model.safetensors")
    still = ("--lr", "1e-30", "--max_steps", "1")
    folder = sign_here("--weights", first / "best", *still, name="folder")
    assert results(folder)["validation"] == pytest.approx(results(first)["validation"], abs=1e-6)
    file = sign_here("--weights", first / "best" / "model.safetensors", *still, name="file")
    (tmp_path / "wrapped").mkdir()
    wrapped = {"state_dict": {f"model.{name}": tensor for name, tensor in start.items()}}
    torch.save(wrapped, tmp_path / "wrapped" / "other.ckpt")
    lightning = sign_here("--weights", tmp_path / "wrapped" / "other.ckpt", *still, "--learned_weights", name="wrapped")
    for run in (folder, file, lightning):
        found = load_file(run / "last" / "model.safetensors")
        assert set(found) - set(start) == ({"log_variances"} if run is lightning else set())
        assert all(torch.allclose(found[name], start[name], atol=1e-20) for name in start), run
    assert "whose names begin with model." in (lightning / "logs" / "train.log").read_text()
    other = sign_here("--weights", first / "best", *still, "--num-gloss", "9", name="other")
    assert "all except gloss_head, whose classes are others" in (other / "logs" / "train.log").read_text()
    found = load_file(other / "last" / "model.safetensors")
    kept = {name for name in start if not name.startswith("gloss_head.")}
    assert all(torch.allclose(found[name], start[name], atol=1e-20) for name in kept)
    assert not torch.allclose(found["gloss_head.0.weight"], start["gloss_head.0.weight"], atol=1e-3)


def test_weights_of_another_model_are_refused(sign_here, tmp_path: Path) -> None:
    best = sign_here("--max_steps", "1", name="first") / "best"
    state = load_file(best / "model.safetensors")
    save_file({name: tensor for name, tensor in state.items() if name != "project.weight"}, tmp_path / "a.safetensors")
    torch.save({"epoch": 3}, tmp_path / "b.pth")
    for flags, words in (
        (("--weights", tmp_path / "nowhere"), "--weights .*nowhere: no such file or folder"),
        (("--weights", tmp_path), "no weights in it"),
        (("--weights", tmp_path / "a.safetensors"), "project.weight is missing"),
        (("--weights", tmp_path / "b.pth"), "no state dict in it"),
        (("--weights", best, *GRU), "a sign_transformer, not a sign_gru"),
        (("--weights", best, "--num_attention_heads", "2"), "num_attention_heads 4, but this run has 2"),
        (("--weights", best, "--velocities"), "velocities False, but this run has True"),
        (("--weights", best, "--normalisation", "none"), "normalisation body, but this run has none"),
        (("--weights", best, "--hidden_size", "16", "--num_attention_heads", "4"), "has the shape"),
        (("--weights", best, "--num_layers", "1"), "is not in this model"),
    ):
        with pytest.raises(UserError, match=words) as error:
            sign_here(*flags, name="wrong")
        assert str(error.value).startswith("--weights ") and "\n" not in str(error.value)


def test_resume_by_folder_prolongs(sign_here) -> None:
    run = sign_here("--epochs", "1")
    sign_here("--resume", str(run), "--epochs", "3")
    assert results(run)["epochs"] == 3
    assert results(run)["samples"] == 3 * 75


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no folder", "--keypoints_train is missing"), ("no labels", "labels.csv"), ("missing clip", "not in the folder"),
        ("gloss out of range", "--num_gloss"),
        ("mirror of features", "need frames of 156 numbers"), ("no head", "neither head"), ("typo", "did you mean"),
        ("both workers", "drop one"), ("range", "--dropout 2"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(kind: str, words: str, sign_here, sign_set: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("a", "b", "c", "d"):
        np.savez(folder / f"{name}.npz", **make_clip(np.random.default_rng(0), 1))
    labels = {"missing clip": "e,0,0\n", "gloss out of range": "a,7,0\n"}.get(kind, "")
    if kind != "no labels":
        (folder / "labels.csv").write_text("file,gloss,cat\na,0,0\nb,1,0\nc,0,0\nd,1,1\n" + labels)
    flags = {
        "no folder": [], "gloss out of range": ["--num_gloss", "5"],
        "mirror of features": [*GRU, "--features_train", str(folder), "--mirror", "0.5"],
        "no head": ["--alpha", "0", "--beta", "0"], "typo": ["--keypoint-train", "x"],
        "both workers": ["--auto-workers", "--num-workers", "2"], "range": ["--dropout", "2"],
    }.get(kind, [])  # fmt: skip
    base = [] if kind == "no folder" else ["--keypoints_train", str(folder), "--cache_dir", str(tmp_path / "cache")]
    with pytest.raises(UserError) as error:
        sign_here(*flags, base=base)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs" / "a" / "best").exists()


def test_prediction_agrees_with_the_run(sign_here, sign_set: Path, monkeypatch, capsys) -> None:
    """tools/predict.py: the labels of a folder of clips are those that the run's own test accuracy counts."""
    import sys

    from tools import predict

    for flags in ((), GRU, ("--normalisation", "standard", "--use_mask")):
        run = sign_here("--epochs", "8", *flags)
        monkeypatch.setattr(sys, "argv", ["tools/predict.py", str(run), str(sign_set / "test"), "--batch_size", "5"])
        capsys.readouterr()
        predict.main()
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [Path(answer["file"]).name for answer in answers] == sorted(
            p.name for p in (sign_set / "test").glob("*.npz")
        )
        right = [answer["gloss"][0]["label"] == str(number % 6) for number, answer in enumerate(answers)]
        assert np.mean(right) == pytest.approx(results(run)["test"]["gloss_accuracy"])
        for answer in answers:
            assert len(answer["gloss"]) == 5
            assert len(answer["category"]) == 3
            assert sum(one["score"] for one in answer["category"]) == pytest.approx(1, abs=1e-4)
            scores = [one["score"] for one in answer["gloss"]]
            assert scores == sorted(scores, reverse=True)
        shutil.rmtree(run)
    for words, message in ((["nowhere.npz"], "no such file"), (["--file", "x.txt"], "are for texts"), ([], "no clips")):
        run = tmp_run(sign_here)
        monkeypatch.setattr(sys, "argv", ["tools/predict.py", str(run), *words])
        with pytest.raises(UserError, match=message):
            predict.main()


def tmp_run(sign_here) -> Path:
    run = Path("runs/a")
    return run.resolve() if run.exists() else sign_here("--max_steps", "1")
