"""A CLIP of two pretrained towers, locked towers and their cached features, the rates and blocks of a tower."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import CLIP, ENVIRONMENT, ROOT, history, launch, results, weights
from safetensors.torch import load_file

from accelerando.base.errors import UserError
from accelerando.models.towers import TwoTowers, make_two_towers, pooled
from accelerando.models.vision import make_net
from accelerando.train.layerwise import layers_of_part, part_factors
from accelerando.train.optim import parameter_groups

NET = "timm/test_efficientnet"
LOCKED = ("--scenario", "full", "--lock_image_tower", "--augmentation", "none")


@pytest.fixture(scope="session")
def net_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small net with batch norms, under names of another implementation."""
    torch.manual_seed(1)
    net = make_net(NET, 1000)
    net.train()(torch.randn(8, 3, 64, 64))  # statistics of their own
    state = {f"_{number}.{name.rpartition('.')[2]}": t for number, (name, t) in enumerate(net.state_dict().items())}
    path = tmp_path_factory.mktemp("net") / "net.pth"
    torch.save(state, path)
    return path


@pytest.fixture
def towers_here(clip_here, clip_args: list[str], tiny_bert: Path, net_weights: Path) -> Callable[..., Path]:
    """clip_finetune.py with two towers in place of the tiny CLIP, two steps unless flags say otherwise."""
    base = [*clip_args[:2], *clip_args[4:]]
    towers = ("--image_model", NET, "--image_weights", str(net_weights), "--text_model", str(tiny_bert))

    def run(*flags: object, name: str = "a") -> Path:
        return clip_here(*towers, "--projection_dim", "16", "--max_steps", "2", *flags, name=name, base=base)

    return run


def states(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights after the first and after the second step."""
    return tuple(load_file(run / "checkpoints" / f"step_00000{step}" / "model.safetensors") for step in (1, 2))


EACH = ("--save_every", "1", "--keep_checkpoints", "9")


def test_a_locked_tower_and_its_batch_norms_stay_and_the_projections_are_trained(
    towers_here, tiny_bert: Path, net_weights: Path
) -> None:
    run = towers_here("--scenario", "full", "--lock_image_tower", *EACH)
    saved = load_file(run / "last" / "model.safetensors")
    source = make_two_towers(NET, str(tiny_bert), str(net_weights)).vision_model.state_dict()
    for name, tensor in source.items():
        assert torch.equal(saved[f"vision_model.{name}"], tensor), name
    first, second = states(run)
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert {"visual_projection.weight", "text_projection.weight", "logit_scale"} <= changed
    assert changed == {name for name in changed if not name.startswith("vision_model.")}
    assert any(name.startswith("text_model.net.encoder.layer.0.") for name in changed)
    assert not any("pooler" in name for name in saved)  # the mean is taken: nobody would train it
    log = (run / "logs" / "train.log").read_text()
    assert "its names are of another implementation: matched by order and shape" in log


def test_an_open_tower_s_batch_norms_learn(towers_here) -> None:
    run = towers_here("--scenario", "full", *EACH)
    first, second = states(run)
    assert not torch.equal(first["vision_model.net.bn1.running_mean"], second["vision_model.net.bn1.running_mean"])


@pytest.mark.exhaustive
def test_a_classifier_s_batch_norms_keep_their_statistics_if_asked(towers_here, har_here) -> None:
    model = towers_here("--scenario", "full", name="towers").absolute() / "last"
    before = load_file(model / "model.safetensors")
    for flags, kept in (((), False), (("--keep_statistics",), True)):
        run = har_here("--strategy", "visual", "--model_name", model, "--max_steps", "3", *flags, name=f"kept_{kept}")
        after = load_file(run / "last" / "model.safetensors")
        for name, same in (("running_mean", kept), ("weight", False)):
            name = f"vision_model.net.bn1.{name}"
            assert torch.equal(after[f"clip.{name}"], before[name]) == same, name


OPEN = """
import sys, torch, accelerando.models.towers
from PIL import Image
from transformers import AutoModel, AutoProcessor
model, report = AutoModel.from_pretrained(sys.argv[1], output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
processor = AutoProcessor.from_pretrained(sys.argv[1])
image = Image.new("RGB", (50, 40), (200, 40, 40))
inputs = processor(text=["a red chair", "a lamp"], images=[image], padding=True, return_tensors="pt")
with torch.no_grad():
    output = model.eval()(**inputs)
print(output.logits_per_image.shape, model.logit_scale.shape)
torch.save({"image": output.image_embeds, "text": output.text_embeds, **inputs}, "seen.pt")
"""


@pytest.mark.launch
def test_saved_towers_open_as_the_readme_says(towers_here, tmp_path: Path, tiny_bert: Path) -> None:
    run = towers_here("--scenario", "full", "--projection", "mlp")
    card = (run / "best" / "README.md").read_text()
    assert "import accelerando.models.towers" in card
    call = [sys.executable, "-c", OPEN, str(run / "best")]
    done = subprocess.run(call, cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT / "lib")}, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "torch.Size([1, 2]) torch.Size([])"
    seen = torch.load(tmp_path / "seen.pt")
    model = TwoTowers.from_pretrained(run / "best").eval()
    with torch.no_grad():
        image = model.visual_projection(model.vision_model.net(seen["pixel_values"]))
        hidden = model.text_model.net(seen["input_ids"], attention_mask=seen["attention_mask"]).last_hidden_state
        mean = torch.stack([row[mask > 0].mean(0) for row, mask in zip(hidden, seen["attention_mask"], strict=True)])
        text = model.text_projection(mean)
    assert torch.allclose(torch.nn.functional.normalize(image, dim=-1), seen["image"], atol=1e-6)
    assert torch.allclose(torch.nn.functional.normalize(text, dim=-1), seen["text"], atol=1e-6)


def test_a_saved_model_is_a_start_and_the_tools_take_it(towers_here, clip_here, call_tool, tmp_path: Path) -> None:
    from made_data import draw_pair

    run = towers_here("--scenario", "full", "--class_field", "kind")
    again = clip_here("--model_name", run / "best", "--scenario", "zero_shot", "--class_field", "kind", name="again")
    for name in ("recall_mean", "zero_shot_accuracy"):
        assert results(again)["test"][name] == pytest.approx(results(run)["test"][name], abs=1e-6)
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import embed
        import numpy as np
    finally:
        sys.path.pop(0)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(draw_pair(np.random.default_rng(0))[0])
    code, _, err = call_tool(
        embed, run / "best", tmp_path / "photos", "--output", tmp_path / "out.parquet", "--num_workers", 0
    )
    assert code == 0, err
    import pyarrow.parquet as pq

    assert pq.read_table(tmp_path / "out.parquet").num_rows == 1


def test_text_lora_on_two_towers_is_saved_merged(towers_here) -> None:
    run = towers_here("--scenario", "text_lora", "--lora_targets", "query", "value")
    model, report = TwoTowers.from_pretrained(run / "best", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    adapter = load_file(run / "best" / "adapter" / "adapter_model.safetensors")
    assert sum("lora_B" in key for key in adapter) == 4
    assert model.config.text_config.model_type == "bert"


@pytest.mark.parametrize(("pooling", "expected"), [("mean", 2.0), ("cls", 1.0), ("pooler", 7.0)])
def test_poolings(pooling: str, expected: float) -> None:
    from types import SimpleNamespace

    hidden = torch.tensor([[[1.0], [3.0], [100.0]]])
    output = SimpleNamespace(last_hidden_state=hidden, pooler_output=torch.tensor([[7.0]]))
    assert pooled(output, pooling, torch.tensor([[1, 1, 0]])).tolist() == [[expected]]


def test_the_folder_of_a_sentence_encoder_says_how_it_pools(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "encoder")
    assert make_two_towers("squeezenet1_1", str(folder)).config.text_pooling == "mean"
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert make_two_towers("squeezenet1_1", str(folder)).config.text_pooling == "cls"
    model = make_two_towers("squeezenet1_1", str(folder), text_pooling="pooler")
    assert model.config.text_pooling == "pooler"
    assert model.config.image_width == 512
    assert any("pooler" in name for name, _ in model.named_parameters())


def test_an_encoder_of_transformers_is_an_image_tower(tiny_vit: Path, tiny_resnet: Path, tiny_bert: Path) -> None:
    vit = make_two_towers(str(tiny_vit), str(tiny_bert))
    assert vit.config.image_pooling == "cls"  # a classifier's weights have no pooler
    assert vit.get_image_features(torch.zeros(2, 3, 32, 32)).pooler_output.shape == (2, 512)
    resnet = make_two_towers(str(tiny_resnet), str(tiny_bert))
    assert resnet.config.image_pooling == "pooler"
    assert resnet.config.image_width == 32


# ------------------------------------------------------------------------------------------------------------ cache


def test_with_cached_features_the_same_is_learnt(towers_here) -> None:
    flags = (*LOCKED, "--max_steps", "6", "--class_field", "kind")
    plain = towers_here(*flags, "--cache_features", "false", name="plain")
    cached = towers_here(*flags, name="cached")
    again = towers_here(*flags, name="again")
    logs = [(run / "logs" / "train.log").read_text() for run in (plain, cached, again)]
    assert [log.count("Features are cached in") for log in logs] == [0, 3, 0]
    assert [log.count("Features are read from") for log in logs] == [0, 0, 3]
    assert weights(again / "last") == weights(cached / "last")
    one, other = (load_file(run / "last" / "model.safetensors") for run in (plain, cached))
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=2e-5), (name, (tensor - other[name]).abs().max())
    for split in ("validation", "test"):
        for name, value in results(plain)[split].items():
            assert results(cached)[split][name] == pytest.approx(value, abs=1e-4), name
    losses = [[row["loss"] for row in history(run, "train")] for run in (plain, cached)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.launch
@pytest.mark.exhaustive
def test_two_processes_learn_what_one_does(clip_args, tiny_bert: Path, net_weights: Path, tmp_path: Path) -> None:
    """With DDP and with FSDP2; killed and resumed, the sharded run ends with the same bytes, which open."""
    still = json.loads((tiny_bert / "config.json").read_text())
    still |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = shutil.copytree(tiny_bert, tmp_path / "bert")
    (bert / "config.json").write_text(json.dumps(still))
    flags = (*clip_args[:2], *clip_args[4:], "--image_model", NET, "--image_weights", net_weights, "--text_model", bert,
             *LOCKED, "--projection_dim", "16", "--max_steps", "4", "--lr", "3e-4", "--save_every", "2")  # fmt: skip
    for name, size, options in (
        ("one", 8, {}),
        ("ddp", 7, {"processes": 2}),
        ("fsdp", 7, {"processes": 2, "fsdp": True}),
    ):
        own = ("--run_name", name, "--micro_batch_size", size, "--cache_dir", tmp_path / f"cache_{name}")
        launch(CLIP, *flags, *own, cwd=tmp_path, **options)
    runs = {name: tmp_path / "runs" / name for name in ("one", "ddp", "fsdp")}
    one = load_file(runs["one"] / "last" / "model.safetensors")
    for way in ("ddp", "fsdp"):
        other = load_file(runs[way] / "last" / "model.safetensors")
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.allclose(tensor, other[name], atol=1e-4), (way, name, (tensor - other[name]).abs().max())
    kept = weights(runs["fsdp"] / "last")
    rest = ("--run_name", "fsdp", "--micro_batch_size", 7, "--cache_dir", tmp_path / "cache_fsdp")
    again = ("--resume", runs["fsdp"] / "checkpoints" / "step_000002")
    launch(CLIP, *flags, *rest, *again, cwd=tmp_path, processes=2, fsdp=True)
    assert weights(runs["fsdp"] / "last") == kept
    from transformers import AutoModel

    AutoModel.from_pretrained(runs["fsdp"] / "best")


@pytest.mark.parametrize(
    "flags",
    [("--augmentation", "simple"), ("--scenario", "vision_lora", "--lora_targets", "q_proj"), ("--lock_image_tower", "false")],
    ids=" ".join,
)  # fmt: skip
def test_nothing_is_cached_where_it_would_differ_from_epoch_to_epoch(flags: tuple[str, ...], clip_here) -> None:
    run = clip_here(*LOCKED, "--max_steps", "1", *flags)
    assert "Features are" not in (run / "logs" / "train.log").read_text()


def test_other_weights_a_changed_file_and_another_size_are_noticed(towers_here, clip_here, tmp_path: Path) -> None:
    import os

    import numpy as np
    from made_data import draw_pair

    from accelerando.data.pairs import TablePairs

    rng = np.random.default_rng(3)
    lines = ["image,caption"]
    for number in range(30):
        file, caption = draw_pair(rng)
        (tmp_path / f"{number}.jpg").write_bytes(file)
        lines += [f"{number}.jpg,{caption}", f"{number}.jpg,{caption} again"]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    flags = ("--data_dir", "None", "--train_data", tmp_path / "pairs.csv", *LOCKED, "--cache_dir", tmp_path / "cache")

    def cached(*more: object) -> list[str]:
        run = towers_here(*flags, *more, "--overwrite")
        lines = (run / "logs" / "train.log").read_text().splitlines()
        return [
            line.partition("Features are ")[2].split(" in /")[0].split(" from /")[0]
            for line in lines
            if "Features are " in line
        ]

    assert cached() == ["cached"]  # once for each image of both splits, which are of one table
    (folder,) = (tmp_path / "cache" / "features").glob("*[!k]")
    assert np.load(folder / "features.npy").shape == (30, 256)
    assert cached("--seed", "7") == ["read"]  # other images are held out
    os.utime(tmp_path / "3.jpg")
    assert cached() == ["cached"]
    (tmp_path / "4.jpg").write_bytes(b"no image")
    assert cached() == ["cached"]
    values = np.load(
        max((tmp_path / "cache" / "features").glob("*[!k]"), key=lambda path: path.stat().st_mtime) / "features.npy"
    )
    assert np.isnan(values).any(axis=1).sum() == 1
    assert cached("--image_weights", "None") == ["cached"]
    numbers = TablePairs(str(tmp_path / "pairs.csv"), tmp_path).image_numbers()
    assert numbers.tolist() == [number // 2 for number in range(60)]


# ---------------------------------------------------------------------------------------------------- rates, blocks


def test_the_rate_of_every_layer_of_a_tower(tiny_clip_folder: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(tiny_clip_folder)
    layers = layers_of_part(model, "vision_model")
    assert [layer[0].split(".")[1] for layer in layers] == ["embeddings", "encoder", "encoder"]
    factors = part_factors(model, {"vision_model": 0.1, "text_model": 1.0}, 0.5)
    groups = parameter_groups(model, 2.0, 0.0, factors=factors)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rate = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert set(rate) == set(names.values())
    for prefix, expected in {
        "visual_projection": 2.0, "text_projection": 2.0, "logit_scale": 2.0,
        "text_model.encoder.layers.1.": 2.0, "text_model.final_layer_norm": 2.0, "text_model.encoder.layers.0.": 1.0,
        "text_model.embeddings": 0.5, "vision_model.encoder.layers.1.": 0.2, "vision_model.post_layernorm": 0.2,
        "vision_model.encoder.layers.0.": 0.1, "vision_model.embeddings": 0.05,
    }.items():  # fmt: skip
        found = [value for name, value in rate.items() if name.startswith(prefix)]
        assert found and found == pytest.approx([expected] * len(found)), prefix


SGD = ("--scenario", "full", "--optimizer", "sgd", "--momentum", "0", "--weight_decay", "0", "--scheduler", "constant",
       "--warmup_steps", "0", "--grad_clip", "None", "--lr", "4", "--max_steps", "1")  # fmt: skip


def test_a_step_is_as_long_as_the_rate_says(clip_here, tiny_clip_folder: Path) -> None:
    start = load_file(tiny_clip_folder / "model.safetensors")

    def step(*flags: str, name: str) -> dict[str, torch.Tensor]:
        saved = load_file(clip_here(*SGD, *flags, name=name) / "last" / "model.safetensors")
        return {name: saved[name] - start[name] for name in start}

    plain = step(name="plain")
    other = step("--image_lr", "2", "--text_lr", "1", "--layer_decay", "0.5", name="other")
    expected = {
        "vision_model.encoder.layers.1.": 0.5, "vision_model.encoder.layers.0.": 0.25, "vision_model.embeddings": 0.125,
        "text_model.encoder.layers.1.": 0.25, "text_model.encoder.layers.0.": 0.125, "text_model.embeddings": 0.0625,
        "visual_projection": 1.0, "text_projection": 1.0,
    }  # fmt: skip
    for prefix, factor in expected.items():
        names = [name for name in plain if name.startswith(prefix) and plain[name].abs().max() > 1e-3]
        assert names, prefix
        for name in names:
            largest = float(plain[name].abs().max())
            assert torch.allclose(other[name], factor * plain[name], atol=1e-3 * largest), name


def test_only_the_last_blocks_are_trained(clip_here, tiny_clip_folder: Path) -> None:
    start = load_file(tiny_clip_folder / "model.safetensors")
    run = clip_here("--scenario", "full", "--image_blocks", "1", "--text_blocks", "2", "--max_steps", "2")
    saved = load_file(run / "last" / "model.safetensors")
    changed = {name for name in start if not torch.equal(saved[name], start[name]) and "k_proj.bias" not in name}
    kept = ("vision_model.embeddings", "vision_model.pre_layrnorm", "vision_model.encoder.layers.0.",
            "text_model.embeddings")  # fmt: skip
    assert changed == {name for name in start if not name.startswith(kept) and "k_proj.bias" not in name}


def test_blocks_of_two_towers_and_their_batch_norms(towers_here) -> None:
    run = towers_here("--scenario", "full", "--image_blocks", "1", "--text_blocks", "1", *EACH)
    first, second = states(run)
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    image = {name.split(".")[2] for name in changed if name.startswith("vision_model.")}
    assert image == {"conv_head", "bn2"}  # statistics too, and of no other batch norm
    text = {".".join(name.split(".")[2:5]) for name in changed if name.startswith("text_model.")}
    assert text == {"encoder.layer.1"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--image_model", NET), "--text_model"),
        (("--text_model", "x"), "--image_model"),
        (("--image_model", NET, "--text_model", "x", "--from_scratch"), "drop one"),
        (("--image_model", "resnet81", "--text_model", "{bert}"), "--image_model resnet81: torchvision has no such model"),
        (("--image_model", NET, "--text_model", "{bert}", "--image_weights", "no.pth"), "--image_weights no.pth: no such file"),
        (("--image_model", NET, "--text_model", "nowhere/none"), "nowhere/none"),
        (("--image_model", "{bert}", "--text_model", "{bert}"), "no preprocessor_config.json"),
        (("--image_model", "{vit}", "--text_model", "{bert}", "--image_weights", "x.pth"), "brings its own"),
        (("--scenario", "full", "--image_blocks", "9"), "the last 9 blocks are to be trained, but vision_model has 3"),
        (("--scenario", "full", "--lock_text_tower", "--text_blocks", "1"), "drop one"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_one_line(
    flags: tuple[str, ...], words: str, clip_here, tiny_bert: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        clip_here(*[flag.format(bert=tiny_bert, vit=tiny_vit) if "{" in flag else flag for flag in flags])
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_the_run_says_what_was_joined(towers_here, tiny_bert: Path) -> None:
    run = towers_here("--scenario", "full")
    config = json.loads((run / "best" / "config.json").read_text())
    assert config["model_type"] == "two_towers"
    assert config["vision_config"]["architecture"] == NET
    processor = json.loads((run / "best" / "processor_config.json").read_text())["image_processor"]
    assert processor["image_mean"] == list(make_net(NET, 3).pretrained_cfg["mean"])
