"""Invariant 4: the gradient of a window is the mean over its samples, however the window is cut into micro-batches.

27 samples without dropout and augmentation at a learning rate that moves nothing: the windows of an epoch must add up to
the gradient of all 27 in one batch, each weighted by its samples. The last window is ragged and divides unequally.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from harness import ROOT, TEXT, history, launch
from made_data import make_rows, write_json
from safetensors.torch import load_file
from tasks import TASKS

pytestmark = [pytest.mark.launch, pytest.mark.xdist_group("window-gradients")]
SAMPLES = 27
STILL = ("--lr", "1e-30", "--weight_decay", "0", "--grad_clip", "None", "--epochs", "1", "--scheduler", "constant",
         "--warmup_steps", "0")  # fmt: skip
# name: (flags, processes, samples of each window)
CUTS = {
    "one micro-batch": (("--batch_size", "16"), 1, [16, 11]),
    "ragged micro-batches": (("--batch_size", "5", "--gradient_accumulation_steps", "3"), 1, [15, 12]),
    "larger than the epoch": (("--batch_size", "8", "--gradient_accumulation_steps", "5"), 1, [27]),
    "two processes": (("--batch_size", "4", "--gradient_accumulation_steps", "2"), 2, [16, 11]),
    "two processes, one sample left": (("--batch_size", "13"), 2, [26, 1]),
}


@pytest.fixture(scope="module", params=["text", "sign", "image"])
def trained(request, tmp_path_factory):
    """``trained(name, flags, processes)``: the gradients of each step of a run on the 27 samples, and its losses."""
    task, folder = TASKS[request.param], tmp_path_factory.mktemp("gradients")
    if task.script == TEXT:
        data = ("--train_file", str(write_json(folder / "rows.json", make_rows(SAMPLES, 3))))
    elif task.name == "sign":
        source, target = request.getfixturevalue("sign_set") / "train", folder / "clips"
        target.mkdir()
        names = sorted(source.glob("*.npz"))[:SAMPLES]
        for path in names:
            shutil.copy(path, target)
        lines = (source / "labels.csv").read_text().splitlines()
        (target / "labels.csv").write_text("\n".join(lines[: SAMPLES + 1]) + "\n")
        data = ("--keypoints-train", str(target), "--dropout", "0", "--num-gloss", "6", "--num-cat", "3")
    else:
        source, target = request.getfixturevalue("image_set"), folder / "images"
        for side, name, count in (("train", "fold_0_train", SAMPLES), ("val", "fold_0_val", 33)):
            lines = (source / "splits" / f"{name}.txt").read_text().splitlines()
            for line in (lines[place * len(lines) // count] for place in range(count)):  # of every class
                place = target / side / line.split("/", 1)[1]
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / line, place)
        # No batch norms: their statistics are those of a micro-batch, in any framework.
        data = ("--data_dir", str(target), "--model_name", "{tiny_vit}", "--crop_scale", "1", "--flip", "0")
    args = task.args(request, *task.exact, *data, *STILL)
    if "--mixup" in args:
        args[args.index("--mixup") + 1] = "0"

    def run(name: str, flags: tuple[str, ...], processes: int = 1) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
        out = folder / name.replace(" ", "_")
        out.mkdir()
        words = (out, task.script, *args, *flags, "--run_name", name)
        launch(ROOT / "tests" / "window_gradients.py", *words, cwd=folder, processes=processes)
        steps = len(list(out.glob("rank0_*")))
        found = [load_file(out / f"rank0_step{step + 1}.safetensors") for step in range(steps)]
        for rank in range(1, processes):  # every rank has the same gradient
            for step, gradients in enumerate(found):
                other = load_file(out / f"rank{rank}_step{step + 1}.safetensors")
                assert all(torch.equal(other[key], value) for key, value in gradients.items())
        return found, [row["loss"] for row in history(folder / "runs" / name, "train")]

    run.whole = run("whole", ("--batch_size", str(SAMPLES)))
    return run


@pytest.mark.parametrize("cut", CUTS)
def test_the_windows_of_an_epoch_add_up_to_the_gradient_of_its_samples(cut: str, trained) -> None:
    (expected,), (loss,) = trained.whole
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    flags, processes, counts = CUTS[cut]
    windows, losses = trained(cut, flags, processes)
    assert len(windows) == len(counts)
    assert sum(map(lambda count, loss: count * loss, counts, losses)) / SAMPLES == pytest.approx(loss, rel=1e-5)
    for name, gradient in expected.items():
        total = sum(count * window[name] for count, window in zip(counts, windows, strict=True)) / SAMPLES
        torch.testing.assert_close(total, gradient, rtol=1e-3, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
