"""clip_finetune.py: what a user gets wrong is one line, and leaves no half-made run behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from harness import CLIP, launch
from made_data import write_shard

from accelerando.base.errors import UserError


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


@pytest.fixture
def broken(tmp_path: Path, pair_set: Path) -> dict[str, str]:
    """Folders of shards, each with one thing wrong."""
    good = pair_set / "train" / "00000.tar"
    (tmp_path / "empty").mkdir()
    for name in ("cut", "cut_late", "rubbish", "zero"):
        (tmp_path / name).mkdir()
        shutil.copy(good, tmp_path / name / "00000.tar")
    cut(tmp_path / "cut" / "00000.tar", 0.5)
    late = tmp_path / "cut_late" / "00000.tar"
    late.write_bytes(late.read_bytes().rstrip(b"\0")[:-5])
    (tmp_path / "rubbish" / "00000.tar").write_bytes(b"no tar at all " * 100)
    (tmp_path / "zero" / "00000.tar").write_bytes(b"")
    write_shard(tmp_path / "no_text" / "7.tar", [("a.jpg", b"x"), ("a.txt", b"a"), ("b.jpg", b"x"), ("c.jpg", b"x")])
    write_shard(tmp_path / "no_image" / "7.tar", [("a.jpg", b"x"), ("a.txt", b"a"), ("b.txt", b"b")])
    write_shard(tmp_path / "others" / "7.tar", [("a.md", b"x")])
    (tmp_path / "captions.csv").write_text("image,caption\nchair.jpg,a chair\n")
    return {name: str(tmp_path / name) for name in
            ("empty", "cut", "cut_late", "rubbish", "zero", "no_text", "no_image", "others", "captions.csv")}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("empty", ["empty", "no shards", "make_shards.py"]),
        ("nowhere", ["nowhere", "no such"]),
        ("cut", ["00000.tar", "truncated"]),
        ("cut_late", ["00000.tar", "truncated"]),
        ("rubbish", ["00000.tar", "corrupted"]),
        ("zero", ["00000.tar"]),
        ("no_text", ["7.tar", "'b'", "caption"]),
        ("no_image", ["7.tar", "'b'", "image"]),
        ("others", ["7.tar", "no samples"]),
        ("captions.csv", ["captions.csv", "row 1", "chair.jpg"]),
    ],
)
def test_bad_data(name: str, parts: list[str], broken: dict[str, str], clip_here, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        clip_here("--train_data", broken.get(name, name))
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--model_name", "nowhere"], ["nowhere"]),
        (["--max_length", "99"], ["99", "16"]),
        (["--adapter", "nowhere"], ["nowhere", "adapter"]),
        (["--scenario", "half"], ["half", "dual_lora"]),
        (["--lora_targets", "nothing"], ["nothing"]),
        (["--enable_s3_checkpoints"], ["--s3_bucket"]),
        (["--s3_bucket", "b"], ["--data_dir", "--s3_bucket"]),
        (["--s3_bucket", "b", "--data_dir", "None", "--s3_prefix", "data/shards"], ["--s3_validation_prefix"]),
        (["--scenario", "zero_shot", "--push_to_hub", "--hub_repo_id", "a/b"], ["--push_to_hub"]),
        (["--wise_ft", "2"], ["--wise_ft"]),
        (["--class_field", "colour"], ["colour"]),
        (["--class_templates", "a photo"], ["{}"]),
        (["--effective_batch_size", "1"], ["--effective_batch_size 1", "at least 2"]),
        (["--amp", "fp16"], ["fp16", "bf16"]),
        (["--lock_image_tower", "--lock_text_tower"], ["nothing to train"]),
        (["--image_size", "12", "--from_scratch", "--patch_size", "24"], ["--patch_size"]),
    ],
)
def test_bad_settings(flags: list[str], parts: list[str], clip_here, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        clip_here(*flags)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert not (tmp_path / "runs").exists()


def test_an_adapter_for_another_base_model(clip_here, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    run = clip_here("--max_steps", "1")
    config = CLIPConfig.from_pretrained(run / "best")
    config.vision_config.hidden_size = 64
    other = tmp_path / "other"
    shutil.copytree(run / "best", other)
    (other / "model.safetensors").unlink()
    CLIPModel(config).save_pretrained(other)
    with pytest.raises(UserError, match=r"adapter for another base model \(.*tiny_clip.*\), not for .*other") as caught:
        clip_here("--model_name", other, "--adapter", run / "best" / "adapter", name="b")
    assert "\n" not in str(caught.value)


@pytest.mark.launch
def test_without_any_data_the_missing_flag_is_named(tmp_path: Path) -> None:
    done = launch(CLIP, "--model_name", "x", cwd=tmp_path, check=False)
    assert done.code == 2
    assert done.err.startswith("error: --train_data is missing")
    assert done.err.count("\n") == 1


def test_models_that_are_not_whole(clip_here, tiny_clip_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_clip_folder, tmp_path / name))

    state = load_file(tiny_clip_folder / "model.safetensors")
    lacking = copy("lacking")
    save_file({name: t for name, t in state.items() if "text_projection" not in name}, lacking / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    damaged = copy("damaged")
    (damaged / "model.safetensors").write_bytes(b"rubbish" * 100)
    wordless = copy("wordless")
    for path in [*wordless.glob("token*"), *wordless.glob("vocab*")]:
        path.unlink()
    for folder, part in (
        (lacking, "text_projection"),
        (damaged, "model.safetensors: truncated or not"),
        (wordless, "no tokenizer"),
    ):
        with pytest.raises(UserError, match=part) as caught:
            clip_here("--model_name", folder)
        assert folder.name in str(caught.value)
        assert "\n" not in str(caught.value)
