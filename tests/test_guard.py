"""Gradients that are not finite, batches learnt by heart, and the table of layers."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import TEXT, history, launch, results, weights
from safetensors.torch import load_file

from accelerando.base.errors import UserError

BAD = 17  # a row of the training samples


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """``spoil("image_classify", "compute_loss")``: in training this function of a script sees NaN pixels in one image."""

    def patch(script: str, name: str) -> None:
        module = sys.modules[script]
        plain = getattr(module, name)

        def changed(model, batch, *rest):
            if model.training and BAD in batch["index"]:
                pixels = batch["pixel_values"].float()
                pixels[batch["index"] == BAD] = float("nan")
                batch = {**batch, "pixel_values": pixels}
            return plain(model, batch, *rest)

        monkeypatch.setattr(module, name, changed)

    return patch


def test_a_row_whose_loss_is_nan_is_named_and_left_out(train_here, monkeypatch) -> None:
    """The run ends as one in which every step is without that row, dropout and averages included."""
    from accelerando.train.batches import TrainBatches

    flags = ("--batch_size", "12", "--gradient_accumulation_steps", "2", "--ema_decay", "0.9", "--epochs", "2")
    with monkeypatch.context() as patch:
        patch.setattr(TrainBatches, "windows", without_row(TrainBatches.windows, BAD))
        reference = train_here(*flags, name="without")
    module = sys.modules["text_classify"]
    plain = module.compute_loss

    def compute_loss(model, batch, *rest):
        losses, logits = plain(model, batch, *rest)
        return losses * torch.where((batch["index"] == BAD) & model.training, float("nan"), 1.0), logits

    monkeypatch.setattr(module, "compute_loss", compute_loss)
    run = train_here(*flags, name="nan")
    assert weights(run / "last") == weights(reference / "last")
    log = (run / "logs" / "train.log").read_text()
    assert len(re.findall(rf"the loss is infinite or NaN for row {BAD}\n", log)) == 2  # once an epoch
    assert results(run)["samples"] == 2 * 202
    assert [row["loss"] for row in history(run, "train")] == [row["loss"] for row in history(reference, "train")]


def without_row(windows: Callable, row: int) -> Callable:
    """The windows of an epoch, each read again without ``row``."""

    def changed(self, epoch: int, position: int = 0):
        for window in windows(self, epoch, position):
            if row in window.rows:
                list(window)  # the loader's batches of this window are used up
                window.again(None, {row})
                window.is_repeated = False
            yield window

    return changed


def test_a_module_with_an_infinite_weight_is_named_and_the_run_ends(train_here, monkeypatch) -> None:
    """After three steps, with the last good checkpoint in the message; resumed from there it trains on."""
    flags = ("--batch_size", "32", "--save_every", "1", "--max_bad_steps", "3", "--keep_checkpoints", "2")
    module = sys.modules["text_classify"]
    plain, steps = module.compute_loss, []

    def compute_loss(model, batch, *rest):
        steps.append(1)
        if len(steps) == 4:
            with torch.no_grad():
                model.bert.encoder.layer[1].output.dense.weight[3, 5] = float("inf")
        return plain(model, batch, *rest)

    monkeypatch.setattr(module, "compute_loss", compute_loss)
    with pytest.raises(UserError) as error:
        train_here(*flags, name="inf")
    assert "the output of bert.encoder.layer.1.output.dense, whose weight has infinite or NaN values, was" in str(
        error.value
    )
    assert "in 3 steps in a row (--max_bad_steps): the last good checkpoint is" in str(error.value)
    good = re.search(r"--resume (\S+),", str(error.value))[1]
    assert Path(good).name == "step_000003"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(Path(good) / "model.safetensors").values())
    monkeypatch.setattr(module, "compute_loss", plain)
    run = train_here(*flags, "--resume", good, name="inf")
    assert results(run)["steps"] == 14


def test_an_image_with_nan_pixels_is_named_with_the_module_and_left_out(image_here, spoil, monkeypatch) -> None:
    """The run ends as one without that image: batch norms, which see NaN in the first pass, keep nothing of it."""
    from accelerando.train.batches import TrainBatches

    flags = ("--epochs", "2", "--mixup", "0", "--batch_size", "16")
    with monkeypatch.context() as patch:
        patch.setattr(TrainBatches, "windows", without_row(TrainBatches.windows, BAD))
        reference = image_here(*flags, name="without")
    spoil("image_classify", "compute_loss")
    run = image_here(*flags, name="nan")
    saved = load_file(run / "last" / "model.safetensors")
    assert any("running_mean" in name for name in saved)
    assert weights(run / "last") == weights(reference / "last")
    assert results(run)["samples"] == 2 * 65
    assert [row["loss"] for row in history(run, "train")] == [row["loss"] for row in history(reference, "train")]
    log = (run / "logs" / "train.log").read_text()
    named = re.findall(r"the output of (\S+) is infinite or NaN for (\S+)\n", log)
    assert [module for module, _ in named] == 2 * ["resnet.embedder.embedder.convolution"]  # once an epoch
    assert {Path(file).suffix for _, file in named} <= {".jpg", ".png"} and len(set(named)) == 1


@pytest.mark.parametrize("flags", [("--r_drop", "1"), ("--mixup", "0.4")])
def test_a_row_is_named_where_a_batch_is_computed_twice(flags: tuple[str, ...], train_here, monkeypatch) -> None:
    """R-Drop and MixUp give modules two rows for each sample; the module is named, and the row behind it."""
    module = sys.modules["text_classify"]
    plain = module.compute_loss

    def compute_loss(model, batch, *rest):
        def spoilt(_, given, output):
            bad = batch["index"] == BAD
            bad = torch.cat((bad, bad))[: len(output)]
            return torch.where(bad[:, None, None], float("nan"), output)

        if not model.training:
            return plain(model, batch, *rest)
        hook = model.bert.encoder.layer[0].output.dense.register_forward_hook(spoilt)
        try:
            return plain(model, batch, *rest)
        finally:
            hook.remove()

    monkeypatch.setattr(module, "compute_loss", compute_loss)
    run = train_here(*flags, "--epochs", "1", "--batch_size", "24")
    log = (run / "logs" / "train.log").read_text()
    assert re.search(rf"the output of bert\.encoder\.layer\.0\.output\.\S+ is infinite or NaN for row {BAD}\n", log)
    assert results(run)["samples"] == 202


def test_a_bad_pair_leaves_the_contrastive_batch(clip_here, spoil) -> None:
    """One NaN embedding spoils the losses of all pairs; only its pair is left out."""
    spoil("clip_finetune", "embed")
    run = clip_here("--epochs", "1", "--scenario", "full", "--num_workers", "0")
    log = (run / "logs" / "train.log").read_text()
    (name,) = re.findall(r"the output of vision_model.embeddings.patch_embedding is infinite or NaN for (.+)", log)
    assert "train/0000" in name and "computed again without it" in log
    assert results(run)["samples"] == 74


@pytest.mark.launch
def test_two_processes_leave_out_the_same_row(text_args, tmp_path: Path) -> None:
    """The process that does not have the row repeats the step too; the result is that of one process."""
    script = tmp_path / "text_nan.py"
    source = TEXT.read_text()
    bad = f'torch.where(batch["index"] == {BAD}, float("nan"), 1.0)'
    changed = source.replace("else (loss(logits), logits)\n", f"else (loss(logits) * {bad}, logits)\n")
    assert changed != source
    script.write_text(changed)
    flags = [*text_args, "--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0", "--epochs", "1",
             "--validation_file", "None", "--validation_fraction", "0", "--lr", "1e-3"]  # fmt: skip
    launch(script, *flags, "--batch_size", "24", "--run_name", "one", cwd=tmp_path)
    launch(script, *flags, "--batch_size", "6", "--gradient_accumulation_steps", "2", "--run_name", "two",
           cwd=tmp_path, processes=2)  # fmt: skip
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    for run in (one, two):
        assert results(run)["samples"] == 202
        assert f"NaN for row {BAD}\n" in (run / "logs" / "train.log").read_text()
    saved = [load_file(run / "last" / "model.safetensors") for run in (one, two)]
    for name, tensor in saved[0].items():
        assert torch.allclose(tensor, saved[1][name], atol=1e-4), name


def test_a_few_batches_are_learnt_by_heart(train_here) -> None:
    """The same rows in each epoch; the log says whether the loss came near zero."""
    still = ("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0")
    run = train_here(*still, "--overfit_batches", "2", "--batch_size", "8", "--epochs", "80", "--lr", "3e-3", "--warmup_steps",
                     "10")  # fmt: skip
    log = (run / "logs" / "train.log").read_text()
    found = re.search(r"Learnt by heart: the loss of 2 batches went from (\S+) to (\S+) in 160 steps", log)
    assert float(found[2]) < 0.1 * float(found[1])
    assert results(run)["steps"] == 160 and results(run)["samples"] == 160 * 8
    assert len(history(run, "validation")) == 1
    frozen = train_here(*still, "--overfit_batches", "1", "--lr", "0", "--epochs", "5", name="frozen")
    assert "Not learnt by heart: the loss of one batch went from" in (frozen / "logs" / "train.log").read_text()


def test_inspect_shows_layers_and_their_gradients(train_here) -> None:
    """Names, sizes and norms are the model's; with the head alone the others have no gradient."""
    run = train_here("--strategy", "head", "--inspect", "--max_steps", "2", "--log_every", "1", "--lr", "0")
    log = (run / "logs" / "train.log").read_text()
    saved = load_file(run / "last" / "model.safetensors")
    sizes = dict(re.findall(r"^(\S+)  +([\d,]+)  (?:yes|no|[\d,]+)", log, re.MULTILINE))
    assert sum(int(size.replace(",", "")) for size in sizes.values()) == sum(each.numel() for each in saved.values())
    (line,) = [line.split() for line in log.splitlines() if line.startswith("classifier ")]
    norm = (saved["classifier.weight"].norm() ** 2 + saved["classifier.bias"].norm() ** 2) ** 0.5
    assert line[2:5] == ["yes", "float32", "cpu"] and float(line[5]) == pytest.approx(float(norm), rel=1e-3)
    (body,) = [line.split() for line in log.splitlines() if line.startswith("bert.embeddings.word_embeddings ")]
    assert body[2] == "no" and body[6] == "-"
    first, second = history(run, "gradients")
    assert set(first) == {"kind", "step", "epoch", *sizes}
    total = history(run, "train")[0]["grad_norm"]
    assert sum(first[name] ** 2 for name in sizes) ** 0.5 == pytest.approx(min(1.0, total), rel=1e-3)
    assert second["classifier"] != first["classifier"]


def test_half_precision_leaves_overflows_to_the_loss_scale() -> None:
    """A gradient that overflows while the scale is found is not a bad step; a loss that is NaN is."""
    from accelerando.train.gradients import step_is_repeated
    from accelerando.train.guard import Guard

    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    accelerator = SimpleNamespace(scaler=object(), reduce=lambda tensor, reduction: tensor)
    args = SimpleNamespace(max_bad_steps=2, inspect=False)
    run = SimpleNamespace(
        guard=Guard(model, optimizer, torch.device("cpu")), accelerator=accelerator, args=args,
        state=SimpleNamespace(step=4), checkpoints=Path("nowhere"), range_test=None,
    )  # fmt: skip
    window = SimpleNamespace(watch=None, left_out=set(), loss_sum=torch.tensor(1.0), count_nothing=lambda: None)
    run.guard.remember()
    for _ in range(5):
        assert not step_is_repeated(run, window, torch.tensor(float("inf")))
    window.loss_sum = torch.tensor(float("nan"))
    assert not step_is_repeated(run, window, torch.tensor(float("nan")))
    with pytest.raises(UserError, match="there is no checkpoint from before"):
        step_is_repeated(run, window, torch.tensor(float("nan")))
