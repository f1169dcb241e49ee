"""clip_finetune.py: what each scenario trains, what its options do, what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import history, weights
from safetensors.torch import load_file

SCENARIOS = {
    "zero_shot": set(),
    "linear_probe": {"visual_projection.weight", "text_projection.weight"},
    "dual_lora": {
        *(f"{tower}_model.encoder.layers.{layer}.self_attn.{name}.lora_{side}"
          for tower in ("vision", "text") for layer in (0, 1) for name in ("q_proj", "v_proj") for side in "AB"),
        "visual_projection.weight", "text_projection.weight",
    },
    "vision_lora": {
        f"vision_model.encoder.layers.{layer}.self_attn.{name}.lora_{side}"
        for layer in (0, 1) for name in ("q_proj", "v_proj") for side in "AB"
    },
    "text_lora": {
        f"text_model.encoder.layers.{layer}.self_attn.{name}.lora_{side}"
        for layer in (0, 1) for name in ("q_proj", "v_proj") for side in "AB"
    },
    "full": None,  # everything
}  # fmt: skip


def plain(name: str) -> str:
    """The name of a checkpoint's tensor without PEFT's wrapping."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save.default", "")
    return name.replace(".default.weight", "") if ".lora_" in name else name


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "zero_shot"])
def test_each_scenario_trains_exactly_what_it_names(scenario: str, clip_here, tiny_clip_folder: Path, capsys) -> None:
    run = clip_here("--scenario", scenario, "--max_steps", "3", "--save_every", "1", "--keep_checkpoints", "9")
    first, last = (load_file(run / "checkpoints" / f"step_00000{step}" / "model.safetensors") for step in (1, 3))
    original = load_file(tiny_clip_folder / "model.safetensors")
    changed = set()
    for name, tensor in last.items():
        if ".original_module." in name:
            assert torch.equal(tensor, original[plain(name).replace(".original_module", "")])
            continue
        start = original.get(plain(name), first[name]).reshape(tensor.shape)
        if ".lora_" in name or not torch.equal(tensor, start):
            changed.add(plain(name))
    expected = SCENARIOS[scenario] or {name for name in original if "k_proj.bias" not in name}
    assert {name for name in changed if "k_proj.bias" not in name} == expected
    for name in expected:
        if "lora_" in name:
            (full,) = [key for key in last if plain(key) == name]
            assert not torch.equal(first[full], last[full]), name
    print(f"\n{scenario}: {len(expected)} tensors\n  " + "\n  ".join(sorted(expected)))
    log = (run / "logs" / "train.log").read_text()
    assert f"Scenario {scenario}: " in log


@pytest.mark.figures
def test_zero_shot_scores_and_trains_nothing(clip_here, pair_set) -> None:
    run = clip_here("--scenario", "zero_shot", "--class_field", "kind", "--micro_batch_size", "0")
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 0
    assert results["trainable_parameters"] == 0
    assert results["test"]["count"] == 19
    assert 0 <= results["test"]["zero_shot_accuracy"] <= 1
    assert results["test"]["loss"] == results["base"]["test"]["loss"]
    assert not (run / "best").exists()
    assert (run / "report.html").is_file()
    scored = ("--validation_data", str(pair_set / "validation"), "--test_data", str(pair_set / "test"))
    flags = ("--scenario", "zero_shot", "--data_dir", "None", *scored, "--class_field", "kind")
    alone = clip_here(*flags, name="alone")
    assert json.loads((alone / "results.json").read_text())["test"] == results["test"]  # no training pairs are needed
    assert "for train" not in (alone / "logs" / "train.log").read_text()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, clip_args) -> Path:
    """A run of 12 epochs that learns the pairs."""
    from harness import CLIP, launch

    folder = tmp_path_factory.mktemp("tuned")
    flags = ("--scenario", "full", "--epochs", "15", "--best_metric", "recall_mean", "--class_field", "kind")
    launch(CLIP, *clip_args, *flags, "--run_name", "a", "--augmentation", "none", cwd=folder)
    return folder / "runs" / "a"


@pytest.mark.launch
def test_it_learns_and_shows_the_base_model_beside(tuned: Path) -> None:
    results = json.loads((tuned / "results.json").read_text())
    assert results["validation"]["recall_mean"] > 1.5 * results["base"]["validation"]["recall_mean"]
    assert results["validation"]["loss"] < results["base"]["validation"]["loss"]
    summary = (tuned / "summary.txt").read_text()
    assert "base validation" in summary
    assert all(len(line) <= 80 for line in summary.split("Repeat it")[0].splitlines()[9:])
    page = (tuned / "report.html").read_text()
    assert page.count("<figure class=") >= 2 * 5 * 5  # before and after, five pictures each
    assert "after" in page and "before" in page


@pytest.mark.launch
def test_what_was_saved_opens_and_scores_what_the_log_says(tuned: Path, pair_set: Path) -> None:
    from transformers import AutoProcessor, CLIPModel

    from accelerando.data.pairs import make_gallery
    from accelerando.data.shards import ShardPairs, list_shards
    from accelerando.data.transforms import ImageTransform, normalise
    from accelerando.report.metrics import retrieval_metrics

    model, report = CLIPModel.from_pretrained(tuned / "best", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.logit_scale.shape == ()
    processor = AutoProcessor.from_pretrained(tuned / "best")
    pairs = ShardPairs(list_shards(str(pair_set / "test")), tuned.parent)
    gallery = make_gallery(pairs, "test")
    images = processor.image_processor
    transform = ImageTransform(16)
    pixels = torch.stack([transform(pairs.read(int(row))[0]) for row in gallery.image_rows])
    texts = [pairs.read(int(row))[1].decode() for row in gallery.text_rows]
    with torch.no_grad():
        output = model.eval()(
            pixel_values=normalise(pixels, images.image_mean, images.image_std),
            **processor.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False),
        )
    found = retrieval_metrics(output.image_embeds.numpy(), output.text_embeds.numpy(), gallery.image_of,
                              gallery.text_of)  # fmt: skip
    results = json.loads((tuned / "results.json").read_text())
    for name, value in found.items():
        assert results["test"][name] == pytest.approx(value, abs=1e-6), name


def test_the_same_pixels_as_the_processor(pair_set: Path, tiny_clip_folder: Path) -> None:
    import io

    from PIL import Image
    from transformers import AutoProcessor

    from accelerando.data.shards import ShardPairs, list_shards
    from accelerando.data.transforms import ImageTransform, normalise

    images = AutoProcessor.from_pretrained(tiny_clip_folder).image_processor
    pairs = ShardPairs(list_shards(str(pair_set / "test")), pair_set / "cache")
    for row in range(5):
        file = pairs.read(row)[0]
        own = normalise(ImageTransform(16)(file)[None], images.image_mean, images.image_std)
        theirs = images(Image.open(io.BytesIO(file)), return_tensors="pt")["pixel_values"]
        assert (own - theirs).abs().max() < 2.1 / 255 / min(images.image_std)  # two levels of 256, by rounding


def test_lora_is_saved_merged_and_apart(clip_here, tiny_clip_folder: Path) -> None:
    from peft import PeftModel
    from transformers import CLIPModel

    run = clip_here("--max_steps", "4", "--train_logit_scale")
    merged = CLIPModel.from_pretrained(run / "best").eval()
    adapted = PeftModel.from_pretrained(CLIPModel.from_pretrained(tiny_clip_folder), run / "best" / "adapter").eval()
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16), "input_ids": torch.tensor([[2, 9, 10, 3]] * 3)}
    with torch.no_grad():
        one, other = merged(**inputs), adapted(**inputs)
    assert torch.allclose(one.image_embeds, other.image_embeds, atol=1e-5)
    assert torch.allclose(one.text_embeds, other.text_embeds, atol=1e-5)
    original = load_file(tiny_clip_folder / "model.safetensors")
    assert merged.logit_scale.item() != float(original["logit_scale"])
    # A new run starts from the adapter alone, or from base and adapter.
    for flags in (("--model_name", run / "best" / "adapter"), ("--adapter", run / "best" / "adapter")):
        again = clip_here("--scenario", "zero_shot", *flags, "--overwrite", name="again")
        first = json.loads((again / "results.json").read_text())["validation"]
        best = min(history(run, "validation"), key=lambda row: row["loss"])
        # The logit scale is not in an adapter, and the loss depends on it: the ranks do not.
        assert first["recall_mean"] == pytest.approx(best["recall_mean"], abs=0.02)


@pytest.fixture
def baseline(clip_here) -> bytes:
    return weights(clip_here("--scenario", "full", "--max_steps", "3", name="base") / "last")


@pytest.mark.parametrize(
    "flags",
    [
        ("--augmentation", "none"), ("--augmentation", "advanced"), ("--loss", "siglip"), ("--effective_batch_size", "16"),
        ("--lr", "1e-3"), ("--optimizer", "adamw8bit"), ("--optimizer", "sgd"), ("--scheduler", "cosine"),
        ("--weight_decay", "0.5", "--lr", "3e-2"), ("--grad_clip", "0.01"), ("--warmup_steps", "0"), ("--amp", "bf16"),
        ("--attention_dropout", "0.3"), ("--lock_image_tower",), ("--lock_text_tower",), ("--train_logit_scale", "false"),
        ("--logit_scale_init", "20"), ("--seed", "1"), ("--adam_beta2", "0.9"), ("--max_length", "5"),
        ("--mask_duplicates", "false"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_that_change_what_is_learnt(
    flags: tuple[str, ...], clip_here, baseline: bytes, pair_set, tmp_path
) -> None:
    if flags[0] == "--mask_duplicates":
        # Every caption twice in a batch of the whole set.
        from made_data import draw_pair, write_shard

        rng = np.random.default_rng(0)
        drawn = [draw_pair(rng) for _ in range(24)]
        members = []
        for number, (picture, _) in enumerate(drawn):
            members += [(f"{number}.jpg", picture), (f"{number}.txt", drawn[number // 2][1].encode())]
        path = str(write_shard(tmp_path / "twice" / "0.tar", members).parent)
        data = ("--train_data", path, "--scenario", "full", "--max_steps", "3")
        baseline = weights(clip_here(*data, name="masked") / "last")
        flags = (*flags, *data)
    run = clip_here("--scenario", "full", "--max_steps", "3", *flags, name="other")
    assert weights(run / "last") != baseline


def test_options_that_do_not(clip_here, baseline: bytes) -> None:
    """Workers, checkpointing of activations and the number of micro-batches change no bit or next to none."""
    run = clip_here("--scenario", "full", "--max_steps", "3", "--num_workers", "2", name="workers")
    assert weights(run / "last") == baseline
    expected = load_file(run / "last" / "model.safetensors")
    for number, flags in enumerate((("--activation_checkpointing",), ("--micro_batch_size", "24"))):
        run = clip_here("--scenario", "full", "--max_steps", "3", *flags, name=f"same{number}")
        for name, tensor in load_file(run / "last" / "model.safetensors").items():
            if "k_proj.bias" not in name:
                assert torch.allclose(tensor, expected[name], atol=2e-4), (flags, name)


def test_a_bias_of_the_loss_alone_comes_back_with_its_weights(clip_here) -> None:
    from transformers import CLIPModel

    for scenario in ("full", "dual_lora"):
        flags = ("--scenario", scenario, "--loss", "siglip", "--max_steps", "6", "--eval_every", "2", "--lr", "1e-2")
        run = clip_here(*flags, name=scenario)
        rows = {row["step"]: row["loss"] for row in history(run, "validation")}
        results = json.loads((run / "results.json").read_text())
        assert results["validation"]["loss"] == pytest.approx(rows[results["best_step"]], rel=1e-6)
        _, report = CLIPModel.from_pretrained(run / "best", output_loading_info=True)
        assert not report["unexpected_keys"]


def test_nan_counts_against_a_model() -> None:
    from accelerando.report.metrics import right_ranks, zero_shot_metrics

    nan = np.full((3, 2), np.nan, np.float32)
    order = np.arange(3)
    assert right_ranks(nan, nan, order, order).min() == 3
    assert right_ranks(np.ones((3, 2)), np.ones((3, 2)), order, order).min() == 3  # and so do equal scores
    assert zero_shot_metrics(nan, nan, order, np.ones(3, bool))["zero_shot_accuracy"] == 0


def test_ema_moves_each_step_and_is_what_is_scored(clip_here) -> None:
    flags = ("--scenario", "full", "--max_steps", "4", "--save_every", "1", "--keep_checkpoints", "9")
    run = clip_here(*flags, "--ema_decay", "0.9", "--eval_every", "4")
    steps = [load_file(run / "checkpoints" / f"step_00000{n}" / "ema.safetensors") for n in (1, 2, 3, 4)]
    raw = [load_file(run / "checkpoints" / f"step_00000{n}" / "model.safetensors") for n in (1, 2, 3, 4)]
    name = "visual_projection.weight"
    for number in (1, 2, 3):
        decay = (2 + number) / (11 + number)
        expected = decay * steps[number - 1][name] + (1 - decay) * raw[number][name]
        assert torch.allclose(steps[number][name], expected, atol=1e-6)
    best = load_file(run / "best" / "model.safetensors")[name]
    assert torch.equal(best, steps[3][name])
    assert not torch.equal(best, raw[3][name])


def test_wise_ft_mixes_old_and_new(clip_here, tiny_clip_folder: Path) -> None:
    for scenario in ("full", "dual_lora"):
        flags = (
            "--scenario",
            scenario,
            "--max_steps",
            "6",
            "--wise_ft",
            "0",
            "0.5",
            "1",
            "--train_logit_scale",
            "false",
        )
        run = clip_here(*flags, name=scenario)
        results = json.loads((run / "results.json").read_text())
        rows = {row["alpha"]: row for row in results["wise_ft"]}
        assert rows[0]["loss"] == pytest.approx(results["base"]["validation"]["loss"], rel=1e-5)
        assert rows[1]["loss"] == pytest.approx(results["validation"]["loss"], rel=1e-5)
        assert rows[0.5]["loss"] not in (rows[0]["loss"], rows[1]["loss"])
        old, new = (load_file(f / "model.safetensors") for f in (tiny_clip_folder, run / "best"))
        mixed = load_file(run / "wise_ft" / "model.safetensors")
        alpha = min(rows, key=lambda alpha: rows[alpha]["loss"])
        for name in ("visual_projection.weight", "vision_model.encoder.layers.0.self_attn.q_proj.weight"):
            assert torch.allclose(mixed[name], old[name].lerp(new[name], alpha), atol=1e-5)
        assert "WiSE-FT" in (run / "report.html").read_text()


def test_a_micro_batch_size_is_found(clip_here, baseline: bytes, monkeypatch) -> None:
    import accelerando.train.autotune

    run = clip_here("--scenario", "full", "--max_steps", "3", "--micro_batch_size", "0", name="auto")
    (line,) = [row for row in (run / "logs" / "train.log").read_text().splitlines() if "Micro-batch size" in row]
    assert int(line.split("Micro-batch size ")[1].split(":")[0]) in (1, 2, 4, 8, 16)
    # The search has touched neither weights nor random states: what differs is how sums are cut up.
    expected = load_file(run.parent / "base" / "last" / "model.safetensors")
    for name, tensor in load_file(run / "last" / "model.safetensors").items():
        if "k_proj.bias" not in name:
            assert torch.allclose(tensor, expected[name], atol=2e-4), name
    # A run that goes on keeps what was found, though the machine may answer otherwise by then.
    found = line.split("Micro-batch size ")[1].split(":")[0]
    assert f"micro_batch_size: {found}\n" in (run / "config.yaml").read_text()
    assert f" --micro_batch_size {found}\n" in (run / "summary.txt").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("clip_finetune.find_micro_batch_size", None)
        clip_here("--scenario", "full", "--max_steps", "4", "--micro_batch_size", "0", "--resume", name="auto")
    monkeypatch.setattr(accelerando.train.autotune, "free_memory", lambda: 1.0)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (1, 1))
    from accelerando.base.errors import UserError

    with pytest.raises(UserError, match="not even one sample fits"):
        clip_here("--micro_batch_size", "0", name="none")


@pytest.mark.exhaustive
def test_compiled_runs_save_under_plain_names(clip_here, quick_compile) -> None:
    run = clip_here("--scenario", "text_lora", "--max_steps", "1", "--compile_model", "--effective_batch_size", "8")
    assert not [name for name in load_file(run / "last" / "model.safetensors") if "_orig_mod" in name]
    assert load_file(run / "best" / "adapter" / "adapter_model.safetensors")


def test_mini_train_and_early_stop(clip_here) -> None:
    run = clip_here("--mini_train", "--epochs", "9", "--early_stop", "1", "--early_stop_min_delta", "10")
    results = json.loads((run / "results.json").read_text())
    assert results["epochs"] == 2  # the second evaluation was no improvement of 10


def test_a_table_of_captions_and_images(clip_here, tmp_path: Path) -> None:
    from made_data import draw_pair

    rng = np.random.default_rng(3)
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    lines = ["image,caption"]
    for number in range(20):
        picture, caption = draw_pair(rng)
        (tmp_path / "pictures" / "a" / f"{number}.jpg").write_bytes(picture)
        lines += [f"a/{number}.jpg,{caption} {extra} {number}" for extra in ("here", "there")]
    table = tmp_path / "captions.csv"
    table.write_text("\n".join(lines) + "\n")
    data = [flag for name in ("train", "validation") for flag in (f"--{name}_data", str(table))]
    run = clip_here(*data, "--image_folder", str(tmp_path / "pictures"), "--max_steps", "2")
    results = json.loads((run / "results.json").read_text())
    assert results["galleries"]["validation"] == {"pairs": 40, "images": 20, "captions": 40}


def test_unreadable_pairs_are_left_out_and_named(clip_here, tmp_path: Path) -> None:
    from made_data import draw_pair, write_shard

    def shard(broken: dict[int, bytes | str], name: str) -> str:
        rng = np.random.default_rng(9)
        members = []
        for number in range(30):
            picture, caption = draw_pair(rng)
            picture = broken[number] if isinstance(broken.get(number), bytes) else picture
            caption = broken[number] if isinstance(broken.get(number), str) else caption
            members += [(f"{number}.jpg", picture), (f"{number}.txt", caption.encode())]
        return str(write_shard(tmp_path / name / "0.tar", members).parent)

    rng = np.random.default_rng(1)
    half = draw_pair(rng)[0][:-80]
    path = shard({3: b"no picture", 7: half, 11: "  "}, "broken")
    flags = ("--train_data", path, "--validation_data", path, "--augmentation", "none", "--max_steps", "4")
    run = clip_here(*flags, name="broken")
    log = (run / "logs" / "train.log").read_text()
    assert "3 of 30 training pairs cannot be read and were skipped" in log
    for name, reason in (("3.jpg", "not an image"), ("7.jpg", "truncated"), ("11.jpg", "caption is empty")):
        assert any(f"0.tar: {name}" in line and reason in line for line in log.splitlines()), name
    assert "3 of 30 validation pairs cannot be read" in log
    results = json.loads((run / "results.json").read_text())
    assert results["validation"]["recall_mean"] > 0
    # What else stands there has no influence: other rubbish gives the same weights.
    path = shard({3: b"other rubbish" * 9, 7: half[:-20], 11: " "}, "other")
    flags = ("--train_data", path, "--validation_data", path, "--augmentation", "none", "--max_steps", "4")
    assert weights(clip_here(*flags, name="other") / "last") == weights(run / "last")


def test_without_validation_data_images_are_held_out(clip_here, pair_set: Path, tmp_path: Path) -> None:
    """Each image and each caption is on one side; without a validation set the last weights are the best."""
    from accelerando.data.pairs import hold_out_images, identity, open_pairs

    source = open_pairs(str(pair_set / "train"), tmp_path, 1, None, "image", "caption")
    rest, held = hold_out_images(source, 0.2, 3)
    assert sorted([*rest.rows, *held.rows]) == list(range(75))
    assert 10 <= len(held) <= 20
    for part in (0, 1):
        sides = [{identity(side.read(row)[part]) for row in range(len(side))} for side in (rest, held)]
        assert not sides[0] & sides[1]
    data = ("--data_dir", "None", "--train_data", str(pair_set / "train"), "--test_data", str(pair_set / "test"))
    found = json.loads((clip_here(*data, "--max_steps", "2") / "results.json").read_text())
    assert 0 < found["validation"]["count"] < 20 and found["test"]["count"] == 19
    run = clip_here(*data, "--validation_fraction", "0", "--epochs", "1", "--ema_decay", "0.9", name="none")
    found = json.loads((run / "results.json").read_text())
    assert "validation" not in found and found["test"]["count"] == 19 and found["best_step"] == found["steps"]
    assert (run / "best" / "model.safetensors").is_file()
