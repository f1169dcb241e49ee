"""accelerando.models.text_cnn: padding, short texts, save and load, autocast, compile, DDP and FSDP2."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import launch
from transformers import AutoConfig, AutoModelForSequenceClassification

from accelerando.base.errors import UserError
from accelerando.models.text_cnn import TextCnnConfig, TextCnnForSequenceClassification

ROOT = Path(__file__).parent.parent
SMALL = {"vocab_size": 50, "embed_size": 8, "num_filters": 6, "num_labels": 3}


def make_model(seed: int = 0, **changes: object) -> TextCnnForSequenceClassification:
    torch.manual_seed(seed)
    return TextCnnForSequenceClassification(TextCnnConfig(**{**SMALL, **changes})).eval()


def padded(texts: list[list[int]], width: int, side: str = "right", fill: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.full((len(texts), width), fill)
    mask = torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        part = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, part] = torch.tensor(text, dtype=torch.int64)
        mask[row, part] = 1
    return {"input_ids": ids, "attention_mask": mask}


def by_definition(model: TextCnnForSequenceClassification, text: list[int]) -> torch.Tensor:
    """The logits of one text, computed window by window from the docstring's definition."""
    pooled = []
    for convolution, size in zip(model.convolutions, model.config.filter_sizes, strict=True):
        vectors = torch.cat([model.embedding.weight[text], torch.zeros(size - 1, model.config.embed_size)])
        filters = convolution.weight.squeeze(2)  # [F, E, size]
        windows = [
            torch.einsum("fes,se->f", filters, vectors[start : start + size]) + convolution.bias
            for start in range(len(text))
        ]
        pooled.append(torch.stack(windows).amax(0).relu() if windows else torch.zeros(len(convolution.bias)))
    return model.classifier(torch.cat(pooled))


@pytest.mark.parametrize("seed", range(8))
def test_padding_changes_nothing_and_windows_are_as_defined(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = tuple(int(size) for size in rng.integers(1, 9, size=rng.integers(1, 4)))
    model = make_model(seed, filter_sizes=sizes)
    with torch.no_grad():  # otherwise a freshly made net could hide a wrong bias or a wrong padding vector
        for parameter in model.parameters():
            parameter.normal_()
    texts = [rng.integers(1, 50, size=length).tolist() for length in (1, 2, 3, *rng.integers(0, 20, size=5))]
    expected = torch.stack([by_definition(model, text) for text in texts])
    longest = max(map(len, texts))
    for width in (longest, longest + 1, longest + 17):
        for side in ("right", "left"):
            for fill in (0, 7):
                got = model(**padded(texts, width, side, fill)).logits
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for text, row in zip(texts, expected, strict=True):  # alone: T is L, also below the filter
        if text:
            torch.testing.assert_close(model(torch.tensor([text])).logits[0], row, rtol=1e-4, atol=1e-4)


def test_without_mask_the_padding_id_tells() -> None:
    model = make_model(pad_token_id=4)
    batch = padded([[1, 2, 3], [5]], 6, fill=4)
    torch.testing.assert_close(model(batch["input_ids"]).logits, model(**batch).logits)


def test_gradients_do_not_depend_on_padding_and_padding_is_not_trained() -> None:
    gradients = []
    for width in (5, 12):
        model = make_model()
        batch = padded([[1, 2, 3, 9, 8], [5], []], width)
        model(**batch, labels=torch.tensor([0, 2, 1]), token_type_ids=batch["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)
    assert not gradients[0]["embedding.weight"][0].any()


def test_saved_model_opens_with_the_auto_class(tmp_path: Path) -> None:
    model = make_model(id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}, filter_sizes=(2, 4))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(again) is TextCnnForSequenceClassification
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"} and list(again.config.filter_sizes) == [2, 4]
    assert AutoConfig.from_pretrained(tmp_path).model_type == "text_cnn"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert torch.equal(model(torch.tensor([[1, 2]])).logits, again(torch.tensor([[1, 2]])).logits)


def test_fresh_weights_follow_the_seed_and_keep_the_signal() -> None:
    one, two, other = make_model(1), make_model(1), make_model(2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert not one.embedding.weight[0].any()
    assert one(torch.randint(1, 50, (64, 20))).logits.std() > 0.05


def test_it_learns_which_word_is_there() -> None:
    torch.manual_seed(0)
    model = make_model(num_labels=2).train()
    ids = torch.randint(3, 50, (256, 12))
    labels = torch.arange(256) % 2
    ids[torch.arange(256), torch.randint(0, 12, (256,))] = 1 + labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()
    assert (model.eval()(ids).logits.argmax(1) == labels).float().mean() > 0.95


@pytest.mark.parametrize(
    "changes",
    [{"filter_sizes": ()}, {"filter_sizes": (3, 0)}, {"dropout_prob": 1.0}, {"embed_size": 0}, {"pad_token_id": 50}],
)
def test_impossible_shapes_are_refused_in_one_line(changes: dict) -> None:
    with pytest.raises(UserError) as error:
        TextCnnConfig(**{**SMALL, **changes})
    assert next(iter(changes)) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.exhaustive
def test_autocast_and_compile_give_the_same_result() -> None:
    model = make_model()
    # aot_eager traces and differentiates as inductor does, without a C++ compiler.
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    for width in (2, 9, 13, 31):
        batch = padded([[1, 2], list(range(1, width + 1))], width)
        labels = torch.tensor([0, 1])
        expected = model(**batch, labels=labels)
        got = compiled(**batch, labels=labels)
        torch.testing.assert_close(got.logits, expected.logits)
        got.loss.backward()
        with torch.autocast("cpu", torch.bfloat16):
            low = model(**batch, labels=labels)
        assert low.logits.dtype == torch.bfloat16
        torch.testing.assert_close(low.logits.float(), expected.logits, rtol=0.05, atol=0.05)
        low.loss.backward()


def test_accelerate_finds_no_layer_to_wrap_and_does_not_fail() -> None:
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = SimpleNamespace(
        auto_wrap_policy=functools.partial(transformer_auto_wrap_policy), transformer_cls_names_to_wrap=None
    )
    model = make_model()
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert not any(policy(module) for module in model.modules())
    assert model.get_input_embeddings() is model.embedding  # which Accelerate shards by itself


RANKS = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, "tests")
from test_text_cnn import make_model, padded
dist.init_process_group("gloo")
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
texts, labels = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [2, 3]], torch.tensor([0, 1, 2, 0])
mine = slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2)
plain = make_model()
plain(**padded(texts, 5), labels=labels).loss.backward()
ddp = DistributedDataParallel(make_model())
sharded = make_model()
fully_shard(sharded.get_input_embeddings(), mesh=mesh)
fully_shard(sharded, mesh=mesh)
for model in (ddp, sharded):
    width = 5 + dist.get_rank()
    model(**padded(texts[mine], width), labels=labels[mine]).loss.backward()
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        torch.testing.assert_close(gradient, expected.grad)
os.write(1, b"same\\n")  # at once: two ranks write to one file
dist.destroy_process_group()
"""


@pytest.mark.launch
def test_ddp_and_fsdp2_on_two_ranks_give_the_gradients_of_one(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    done = launch(tmp_path / "ranks.py", cwd=ROOT, processes=2)
    assert done.out.split() == ["same", "same"], done.err
