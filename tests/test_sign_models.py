"""The sign models: padding changes nothing, any length, every option, saved and opened again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from accelerando.base.errors import UserError
from accelerando.models.sign import CHANGE_SCALE, SignGru, SignGruConfig, SignTransformer, SignTransformerConfig

NAMES = {"gloss_names": list("abcde"), "cat_names": ["x", "y"]}
SMALL = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, **NAMES}
KINDS = {
    "mean": {}, "max": {"pooling": "max"}, "cls": {"pooling": "cls"}, "plain": {"final_norm": False},
    "convolution": {"conv_kernel": 5}, "convolution, cls": {"conv_kernel": 3, "pooling": "cls"},
    "everything": {"velocities": True, "relative_hands": True, "use_mask": True, "learned_weights": True},
    "standard": {"normalisation": "standard", "channel_mean": [0.5] * 156, "channel_std": [2.0] * 156},
    "gru": None,
}  # fmt: skip


def make(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "gru":
        return SignGru(SignGruConfig(input_width=156, gru_sizes=(16, 12), **NAMES)).eval()
    return SignTransformer(SignTransformerConfig(**SMALL, **KINDS[kind])).eval()


def clips() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 7, 30)
    return [
        {
            "frames": torch.randn(length, 156, generator=generator),
            "mask": torch.rand(length, 78, generator=generator) > 0.2,
        }
        for length in lengths
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_answer(kind: str) -> None:
    model = make(kind)
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([clip[name] for clip in clips()], batch_first=True)
        for name in ("frames", "mask")
    }
    lengths = torch.tensor([len(clip["frames"]) for clip in clips()])
    real = torch.arange(40)[None] < lengths[:, None]
    batch = {name: torch.nn.functional.pad(values, (0, 0, 0, 10)) for name, values in batch.items()}
    batch["frames"][~real] = 7.0  # whatever stands there
    with torch.no_grad():
        together = model(**batch, attention_mask=real)
        for row, clip in enumerate(clips()):
            alone = model(clip["frames"][None], mask=clip["mask"][None])
            assert torch.allclose(alone.gloss_logits[0], together.gloss_logits[row], atol=1e-5)
            assert torch.allclose(alone.cat_logits[0], together.cat_logits[row], atol=1e-5)
    assert together.gloss_logits.shape == (3, 5)
    assert together.cat_logits.shape == (3, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_order_in_time_matters_and_any_length_goes(kind: str) -> None:
    model = make(kind)
    frames = torch.randn(1, 700, 156)
    with torch.no_grad():
        forwards, backwards = model(frames).gloss_logits, model(frames.flip(1)).gloss_logits
    assert torch.isfinite(forwards).all()
    assert (forwards - backwards).abs().max() > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_opened_it_answers_the_same(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    model.save_pretrained(tmp_path)
    opened, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(opened) is type(model)
    assert opened.config.gloss_names == NAMES["gloss_names"]
    assert opened.config.id2label == dict(enumerate("abcde"))
    frames = torch.randn(2, 9, 156)
    with torch.no_grad():
        assert torch.equal(opened.eval()(frames).gloss_logits, model(frames).gloss_logits)


@pytest.mark.parametrize("option", ["velocities", "relative_hands", "use_mask"])
def test_each_input_has_an_effect(option: str) -> None:
    torch.manual_seed(0)
    model = SignTransformer(SignTransformerConfig(**SMALL, **{option: True})).eval()
    plain = SignTransformer(SignTransformerConfig(**SMALL))
    assert model.project.in_features == plain.project.in_features + {"velocities": 156, "relative_hands": 84}.get(
        option, 78
    )
    frames, mask = torch.randn(1, 9, 156), torch.ones(1, 9, 78, dtype=torch.bool)
    parts = model.parts(frames, torch.ones(1, 9, dtype=torch.bool), mask)[0, :, 156:]
    if option == "velocities":
        assert torch.allclose(parts[1:], CHANGE_SCALE * (frames[0, 1:] - frames[0, :-1]))
        assert not parts[0].any()
        mask[0, 4, 3] = False  # a point that comes into sight has not moved
        hidden = model.parts(frames, torch.ones(1, 9, dtype=torch.bool), mask)[0, :, 156:]
        assert not hidden[4:6, 6:8].any()
        assert torch.equal(hidden[6:], parts[6:])
    elif option == "relative_hands":
        shifted = frames.clone()
        shifted.view(1, 9, 78, 2)[:, :, 25:46] += 3.0  # a hand elsewhere has the same shape
        other = model.parts(shifted, torch.ones(1, 9, dtype=torch.bool), mask)[0, :, 156:]
        assert torch.allclose(other, parts, atol=1e-5)
        shifted.view(1, 9, 78, 2)[:, :, 25:46] *= 2.0  # so has a larger one
        other = model.parts(shifted, torch.ones(1, 9, dtype=torch.bool), mask)[0, :, 156:]
        assert torch.allclose(other, parts, atol=1e-5)
        assert torch.allclose(parts.view(9, 2, 21, 2).square().sum(dim=3).mean(dim=2), torch.ones(9, 2))
        mask[0, 3, 25:46] = False  # an unseen hand has none
        assert not model.parts(frames, torch.ones(1, 9, dtype=torch.bool), mask)[0, 3, 156 : 156 + 42].any()
    else:
        assert parts.all()
        mask[0, 2, 7] = False
        assert model.parts(frames, torch.ones(1, 9, dtype=torch.bool), mask)[0, 2, 156 + 7] == 0


def test_a_convolution_sees_its_neighbours_alone() -> None:
    torch.manual_seed(0)
    layer = SignTransformer(SignTransformerConfig(**SMALL, conv_kernel=5)).eval().layers[0].convolution
    hidden, real = torch.randn(1, 20, 32), torch.ones(1, 20, 1, dtype=torch.bool)
    other = hidden.clone()
    other[0, 9] += 1
    with torch.no_grad():
        changed = (layer(hidden, real) - layer(other, real)).abs().amax(dim=2)[0] > 0
    assert changed.nonzero()[:, 0].tolist() == [7, 8, 9, 10, 11]


def test_learned_weights_get_a_gradient() -> None:
    model = make("everything")
    output = model(torch.randn(2, 5, 156))
    assert output.log_variances.shape == (2,)
    output.log_variances.sum().backward()
    assert model.log_variances.grad.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": 30}, "use a multiple of"),
        ({"conv_kernel": 4}, "use an odd number"),
        ({"use_mask": True, "input_width": 24}, "needs frames of 78 points"),
    ],
)
def test_what_cannot_be_is_one_line(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        SignTransformerConfig(**{**SMALL, **settings})
