"""Distillation: the loss by hand, the teacher's classes and cache, copied layers, rows without labels, resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import TEXT, history, launch, results, weights
from made_data import make_rows, write_json
from safetensors.torch import load_file
from tools import compare_runs, evaluate

from accelerando.base.errors import UserError
from accelerando.data.augment import AugmentedTexts, TextAugmentation
from accelerando.data.collate import TextCollate
from accelerando.data.tables import read_text_table
from accelerando.data.tokenizer import open_tokenizer, train_tokenizer
from accelerando.data.tokens import tokenize_table
from accelerando.models.student import copy_layers, embeddings_for, keep_layers, layers_to_copy
from accelerando.train.batches import first_batch
from accelerando.train.distillation import (
    distillation_losses,
    distilled,
    hidden_distances,
    open_image_teacher,
    open_text_teacher,
    taught_rows,
    teacher_collate,
)

TOPICS = ["money", "space", "sport"]
OTHER_ORDER = [2, 0, 1]
SHORT = ("--max_steps", "2", "--test_file", "None")


def save_teacher(
    folder: Path, tiny_bert: Path, seed: int, order: list[int] | None = None, layers: int = 2, **settings: object
) -> Path:
    """A BERT with random weights and sure answers; ``order``: of its classes, with the rows of the head."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    order = order or [0, 1, 2]
    names = dict(enumerate(TOPICS[number] for number in order))
    config = BertConfig.from_pretrained(
        tiny_bert, num_hidden_layers=layers, id2label=names, label2id={name: n for n, name in names.items()}, **settings
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(40)
        model.classifier.weight.copy_(model.classifier.weight[order])
        model.classifier.bias.copy_(torch.tensor([0.3, -0.2, 0.1])[order])
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), tiny_bert, 1)


@pytest.fixture(scope="session")
def deep_teacher(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("deep"), tiny_bert, 2, layers=5)


@pytest.fixture
def accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    return Accelerator(cpu=True)


def tensors(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / name / "model.safetensors")


@pytest.fixture(scope="session")
def bare_args(text_args: list[str]) -> list[str]:
    """The flags without the model's name: a student has its teacher's."""
    place = text_args.index("--model_name")
    return [*text_args[:place], *text_args[place + 2 :]]


# -------------------------------------------------------------------------------------------------------------- losses


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, generator=draw), 3 * torch.randn(5, 3, generator=draw)


def test_the_divergence_is_that_of_a_computation_by_hand(pair) -> None:
    student, teacher = (each.double().numpy() for each in pair)
    for temperature in (1.0, 2.5):
        p, q = (np.exp(each / temperature) for each in (teacher, student))
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        expected = temperature**2 * (p * np.log(p / q)).sum(1)
        assert np.allclose(distillation_losses(*pair, temperature), expected, atol=1e-5)
        p, q = (1 / (1 + np.exp(-each / temperature)) for each in (teacher, student))
        expected = temperature**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean(1)
        assert np.allclose(distillation_losses(*pair, temperature, "multi_label"), expected, atol=1e-5)
    expected = ((student - teacher) ** 2).mean(1)
    assert np.allclose(distillation_losses(*pair, 7.0, "regression"), expected, atol=1e-5)
    for kind in ("single_label", "multi_label", "regression"):
        assert distillation_losses(pair[1], pair[1], 2.0, kind).abs().max() < 1e-5


def test_rows_without_a_label_have_the_teachers_share_alone(pair) -> None:
    own, labelled = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([1.0, 0, 1, 0, 1])
    found = distilled(own, *pair, 0.3, 2.0, "single_label", labelled)
    expected = 0.7 * own * labelled + 0.3 * distillation_losses(*pair, 2.0)
    assert torch.allclose(found, expected) and torch.equal(distilled(own, *pair, 0.0, 2.0), own)


def test_distances_of_layers_by_hand() -> None:
    draw = torch.Generator().manual_seed(0)
    own, goal = [torch.randn(2, 4, 6, generator=draw) for _ in range(3)], [torch.randn(2, 4, 6, generator=draw) for _ in range(7)]  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    expected = torch.zeros(2)
    for one, other in zip(own, goal[::3], strict=True):  # 2 layers and 6: the third and the last
        cosine = torch.nn.functional.cosine_similarity(one, other, dim=-1)
        expected += torch.stack([1 - cosine[0, :3].mean(), 1 - cosine[1].mean()]) / 3
    assert torch.allclose(hidden_distances(own, goal, mask), expected, atol=1e-6)
    wide = [torch.cat((each, torch.zeros(2, 4, 5)), dim=-1) for each in goal]  # another width, but the same cosines
    assert hidden_distances(goal, wide, mask).abs().max() < 1e-10
    turned = [each.flip(-1) for each in goal]  # a rotation does not change them
    assert hidden_distances([each[..., :6] for each in turned], goal, mask).min() > 0.1
    between = [torch.nn.functional.normalize(each, dim=-1) for each in (own[0], goal[0])]
    square = ((between[0] @ between[0].mT - between[1] @ between[1].mT) ** 2)[0, :3, :3].mean()
    assert torch.allclose(hidden_distances(own[:1], wide[:1], mask)[0], square, atol=1e-6)
    doubled = [torch.cat((each, each)) for each in own]
    assert torch.allclose(hidden_distances(doubled, goal, mask), expected, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- texts


def test_what_the_options_do(train_here, teacher: Path) -> None:
    """Without a share the teacher changes no byte; share and temperature do."""
    before = weights(teacher)
    plain = train_here(*SHORT, name="plain")
    none = train_here(*SHORT, "--teacher", teacher, "--distill_alpha", "0", name="none")
    assert weights(none / "last") == weights(plain / "last")
    half = train_here(*SHORT, "--teacher_model", teacher, "--alpha", "0.5", name="half")  # the guide's words
    hot = train_here(*SHORT, "--teacher", teacher, "--temperature", "4", name="hot")
    assert len({weights(run / "last") for run in (plain, half, hot)}) == 3
    # The teacher is neither trained nor saved nor counted.
    assert weights(teacher) == before and tensors(half).keys() == tensors(plain).keys()
    assert results(half)["parameters"] == results(plain)["parameters"]
    assert results(none)["validation"] == results(plain)["validation"]


@pytest.mark.exhaustive
def test_the_place_of_a_class_does_not_matter(train_here, teacher: Path, tiny_bert: Path, tmp_path: Path) -> None:
    turned = save_teacher(tmp_path / "turned", tiny_bert, 1, OTHER_ORDER)
    assert weights(turned) != weights(teacher)
    one, two = (tensors(train_here(*SHORT, "--teacher", each, name=each.name)) for each in (teacher, turned))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_what_is_cached_is_what_the_teacher_says(
    teacher: Path, text_set: Path, tmp_path: Path, accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with another tokenizer than the student's, and for texts that change while training."""
    table = read_text_table(str(text_set / "train.json"))
    other = train_tokenizer(table.texts, "wordpiece", 120)
    for tokenizer in (open_tokenizer(str(teacher)), other):
        rows = tokenize_table(table, tokenizer, 48, np.zeros(len(table), np.int64), tmp_path)
        opened = open_text_teacher(str(teacher), [TOPICS[n] for n in OTHER_ORDER], accelerator)
        taught = taught_rows(rows, table, opened, tokenizer, 48, 32, tmp_path)
        collate = TextCollate(0, teacher=teacher_collate(opened))
        for size in (3, 20):  # whatever they are padded to
            batch = first_batch(taught, collate, size)
            texts = table.texts.slice(0, size).to_pylist()
            tokens = opened.tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
            with torch.no_grad():
                expected = opened.model(**tokens).logits[:, OTHER_ORDER]
            assert torch.allclose(opened.of_texts(batch).logits, expected, atol=1e-5)
        assert taught.digest() == rows.digest()
        change = TextAugmentation(("swap",), 0.5, seed=3)
        moving = AugmentedTexts(table, rows, tokenizer, 48, change, 0.7)
        live = taught_rows(moving, table, opened, tokenizer, 48, 32, tmp_path)
        batch = collate([live.at(row, 2) for row in range(20)])
        changed = [moving.changed(row, 2) or [table.texts[row].as_py()] for row in range(20)]
        tokens = opened.tokenizer([one for (one,) in changed], padding=True, return_tensors="pt")
        assert sum(moving.changed(row, 2) is not None for row in range(20)) > 8
        with torch.no_grad():
            expected = opened.model(**tokens).logits[:, OTHER_ORDER]
        assert "teacher_logits" not in batch
        assert torch.allclose(opened.of_texts(batch).logits, expected, atol=1e-5)
        monkeypatch.setattr(type(opened.model), "forward", None)  # a second time nothing is computed
        again = taught_rows(rows, table, opened, tokenizer, 48, 32, tmp_path)
        assert np.array_equal(again.logits, taught.logits)
        monkeypatch.undo()


def test_rows_without_labels(train_here, teacher: Path, tmp_path: Path) -> None:
    """They change what is learned, whatever stands in another column, and not without the teacher's share."""
    rows = make_rows(50, 9)
    more = write_json(tmp_path / "more.json", [{"text": row["text"], "label": "nothing"} for row in rows])
    flags = (*SHORT, "--teacher", teacher, "--distill_alpha", "0.7")
    plain = train_here(*flags, name="plain")
    assert weights(train_here(*flags, "--unlabelled_file", more, name="more") / "last") != weights(plain / "last")
    still = (
        "--epochs",
        "1",
        "--batch_size",
        "253",
        "--weight_decay",
        "0",
        "--distill_alpha",
        "0",
        "--teacher",
        teacher,
    )
    still = (*still, "--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0", "--optimizer", "sgd", "--grad_clip", "None", "--test_file", "None")  # fmt: skip
    # Without the teacher's share they have no gradient: the mean over 253 rows is that of 203, times 203 / 253.
    one = train_here(*still, "--unlabelled_file", more, "--lr", "0.1", name="with")
    assert results(one)["samples"] == 253
    two = train_here(*still, "--batch_size", "203", "--lr", str(0.1 * 203 / 253), name="without")
    one, two = tensors(one), tensors(two)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


NARROW = ("--hidden_size", "16", "--num_attention_heads", "2")


@pytest.mark.parametrize("width", [(), pytest.param(NARROW, marks=pytest.mark.exhaustive)], ids=["equal", "other"])
def test_layers_come_nearer_to_the_teachers(width, train_here, deep_teacher: Path, text_set: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    tokenizer = open_tokenizer(str(deep_teacher))
    texts = [row["text"] for row in json.loads((text_set / "validation.json").read_text())]
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")

    def hidden(folder: Path) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
            return model(**tokens, output_hidden_states=True).hidden_states

    goal, flags = hidden(deep_teacher), ("--from_scratch", *width, "--teacher", deep_teacher, "--max_steps", "10")
    distances = []
    for weight in ("0", "10"):
        run = train_here(*flags, "--match_hidden", weight, "--test_file", "None", name=weight)
        distances.append(float(hidden_distances(hidden(run / "best"), goal, tokens["attention_mask"]).mean()))
    assert distances[1] < 0.85 * distances[0]


def test_a_student_begins_with_the_teachers_layers(train_here, deep_teacher: Path, bare_args: list[str]) -> None:
    assert layers_to_copy(6, 12) == [0, 2, 4, 7, 9, 11] and layers_to_copy(1, 6) == [0]
    flags = (*SHORT, "--lr", "0", "--teacher", deep_teacher, "--student_layers", "2")
    run = train_here(*flags, base=bare_args, name="a")
    own, given = tensors(run), load_file(deep_teacher / "model.safetensors")
    assert sum("layer.1.attention" in name for name in own) and not any("layer.2." in name for name in own)
    for name, tensor in own.items():
        assert torch.equal(tensor, given[name.replace("layer.1.", "layer.4.")]), name
    # A smaller vocabulary: what both know is copied, the rest is a mean.
    run = train_here(*flags, "--student_vocab", "90", base=bare_args, name="b")
    small, large = open_tokenizer(str(run / "best")), open_tokenizer(str(deep_teacher))
    own, name = tensors(run), "bert.embeddings.word_embeddings.weight"
    assert own[name].shape[0] == len(small) <= 90 < len(large)
    for token, number in small.get_vocab().items():
        if token in large.get_vocab():
            assert torch.equal(own[name][number], given[name][large.get_vocab()[token]])
    assert torch.equal(
        own["bert.encoder.layer.1.output.dense.weight"], given["bert.encoder.layer.4.output.dense.weight"]
    )
    assert results(run)["parameters"] < sum(tensor.numel() for tensor in given.values())


def test_embeddings_of_new_tokens_are_means(tiny_bert: Path) -> None:
    old = open_tokenizer(str(tiny_bert))
    new = train_tokenizer(["goalkeeper matchday goal"] * 9, "wordpiece", 60)
    weight = torch.randn(len(old), 4, generator=torch.Generator().manual_seed(0))
    found = embeddings_for(new, old, weight, len(new))
    for token, number in new.get_vocab().items():
        if token in old.get_vocab():
            expected = weight[old.get_vocab()[token]]
        else:
            expected = weight[old(token.removeprefix("##"), add_special_tokens=False)["input_ids"]].mean(0)
        assert torch.allclose(found[number], expected), token
    assert any(token not in old.get_vocab() for token in new.get_vocab())


@pytest.mark.parametrize("family", ["distilbert", "roberta", "electra", "modernbert", "llama", "albert"])
def test_families_whose_layers_can_be_copied(family: str) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
    sizes = {"dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 24} if family == "distilbert" else sizes
    config = AutoConfig.for_model(family, vocab_size=50, num_labels=3, pad_token_id=0, **sizes)
    teacher = AutoModelForSequenceClassification.from_config(config)
    config = copy.deepcopy(config)
    chosen = keep_layers(config, 2)
    student = AutoModelForSequenceClassification.from_config(config)
    if family == "albert":  # its layers share their weights
        with pytest.raises(UserError, match="no list of layers"):
            copy_layers(student, teacher, chosen, [0, 1, 2])
        return
    copy_layers(student, teacher, chosen, [0, 1, 2])
    given = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, given[name.replace("layers.1.", "layers.3.").replace("layer.1.", "layer.3.")]), name


def test_resume_is_exact_and_wants_the_same_teacher(
    train_here, teacher: Path, deep_teacher: Path, tmp_path: Path
) -> None:
    rows = write_json(tmp_path / "more.json", [{"text": row["text"]} for row in make_rows(20, 9)])
    flags = ("--teacher", teacher, "--match_hidden", "0.5", "--augment", "swap", "--unlabelled_file", rows, "--r_drop",
             "1", "--save_every", "1", "--keep_checkpoints", "9", "--max_steps", "3", "--test_file", "None")  # fmt: skip
    run = train_here(*flags, name="run")
    expected, numbers = weights(run / "last"), [row["loss"] for row in history(run, "train")]
    step = str(run / "checkpoints" / "step_000002")
    with pytest.raises(UserError, match="teacher has 3 classes as before, but other weights"):
        train_here(*flags, "--teacher", deep_teacher, "--resume", step, name="run")
    train_here(*flags, "--resume", step, name="run")
    assert weights(run / "last") == expected
    assert [row["loss"] for row in history(run, "train")] == numbers


def test_a_distilled_run_is_scored_without_its_teacher(
    train_here, tiny_bert: Path, bare_args: list[str], call_tool, tmp_path: Path
) -> None:
    """With its own tokenizer, although teacher and further texts are gone."""
    folder = save_teacher(tmp_path / "gone", tiny_bert, 1)
    more = write_json(tmp_path / "more.json", make_rows(9, 9))
    flags = ("--max_steps", "2", "--teacher", folder, "--unlabelled_file", more, "--student_layers", "1")
    run = train_here(*flags, "--student_vocab", "90", base=bare_args, name="run")
    for path in (folder, more):
        path.rename(path.with_name(f"other{path.suffix}"))
    code, out, err = call_tool(evaluate, run)
    assert code == 0, err
    assert f"{results(run)['test']['accuracy']:.4f}" in out, out


@pytest.mark.launch
@pytest.mark.exhaustive
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_learn_the_same(fsdp: bool, text_args: list[str], teacher: Path, tmp_path: Path) -> None:
    flags = ["--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0", "--teacher", str(teacher)]
    for further in ((), ("--match_hidden", "0.5", "--augment", "swap")):
        args = [*text_args, *flags, *further, "--epochs", "1"]
        name = f"one{len(further)}"
        launch(TEXT, *args, "--batch_size", "32", "--run_name", name, cwd=tmp_path)
        parts = ("--batch_size", "8", "--gradient_accumulation_steps", "2", "--run_name", f"two{len(further)}")
        launch(TEXT, *args, *parts, cwd=tmp_path, processes=2, fsdp=fsdp)
        runs = [tmp_path / "runs" / f"{number}{len(further)}" for number in ("one", "two")]
        for one, two in zip(*(history(run, "train") for run in runs), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_several_labels_and_numbers_have_teachers_too(train_here, tiny_bert: Path, tmp_path: Path) -> None:
    rows = make_rows(60, 3)
    several = write_json(tmp_path / "train.json", [{"text": row["text"], "label": [row["label"]]} for row in rows])
    numbers = write_json(
        tmp_path / "numbers.json", [{"text": row["text"], "label": len(row["text"]) / 7} for row in rows]
    )
    kinds = {several: "multi_label_classification", numbers: "regression"}
    common = ["--model_name", str(tiny_bert), "--max_length", "48", "--max_steps", "1", "--log_every", "1",
              "--report_to", "none", "--cache_dir", str(tmp_path / "cache")]  # fmt: skip
    for place, (file, kind) in enumerate(kinds.items()):
        names = TOPICS if place == 0 else ["label"]
        folder = save_numbers_teacher(tmp_path / kind, tiny_bert, names, kind)
        base = ["--train_file", str(file), *common]
        losses = [history(train_here(*flags, base=base, name=f"{place}{len(flags)}"), "train")[-1]["loss"]
                  for flags in ((), ("--teacher", folder, "--distill_alpha", "1"))]  # fmt: skip
        assert len({*losses}) == 2
        with pytest.raises(UserError, match="it was trained for"):
            train_here("--teacher", folder, base=["--train_file", str(write_json(tmp_path / "x.json", rows)), *common])


def save_numbers_teacher(folder: Path, tiny_bert: Path, names: list[str], kind: str) -> Path:
    from transformers import AutoModelForSequenceClassification

    labels = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=len(names), problem_type=kind, **labels
    )
    model.save_pretrained(folder)
    open_tokenizer(str(tiny_bert)).save_pretrained(folder)
    return folder


def test_what_is_refused(train_here, teacher: Path, tiny_bert: Path, bare_args: list[str], tmp_path: Path) -> None:
    rows = write_json(tmp_path / "more.json", make_rows(5, 1))
    cases = {
        ("--teacher", "nowhere"): "--teacher nowhere: no such folder",
        ("--teacher", str(tmp_path)): "no model in it",
        ("--teacher", str(tiny_bert)): "other classes than the data: it lacks 'money', 'space', 'sport' and it has 'LABEL_0'",
        ("--unlabelled_file", str(rows)): "--unlabelled_file needs a trained classifier",
        ("--student_layers", "1"): "--student_layers needs a trained classifier",
        ("--teacher", str(teacher), "--student_layers", "9"): "--student_layers 9: the teacher has 2",
        ("--teacher", str(teacher), "--student_layers", "1", "--from_scratch"): "--from_scratch takes none",
        ("--teacher", str(teacher), "--match_hidden", "1", "--architecture", "cnn"): "--match_hidden compares",
        ("--teacher", str(teacher), "--unlabelled_file", str(rows), "--balanced"): "--balanced needs the label",
        ("--teacher", str(teacher), "--distill_alpha", "2"): "--distill_alpha 2",
    }  # fmt: skip
    for flags, words in cases.items():
        with pytest.raises(UserError) as error:
            train_here(*flags, base=bare_args if "--student_layers" in flags else None, name="refused")
        assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="starts from"):
        train_here("--teacher", teacher, "--student_layers", "1", name="refused")
    assert not (tmp_path / "runs").exists()


# -------------------------------------------------------------------------------------------------------------- images


def save_net(folder: Path, tiny_resnet: Path, order: list[int]) -> Path:
    """A ResNet with sure answers, the classes in the given order, and a processor of its own."""
    from transformers import ResNetForImageClassification, ViTImageProcessor

    torch.manual_seed(3)
    names = [["chair", "lamp", "table"][number] for number in order]
    model = ResNetForImageClassification.from_pretrained(
        tiny_resnet, id2label=dict(enumerate(names)), label2id={name: n for n, name in enumerate(names)}
    )
    with torch.no_grad():
        head = model.classifier[1]
        head.weight.copy_(torch.randn(head.weight.shape)[order])
        head.bias.copy_(torch.tensor([1.0, 0, -1])[order])
    model.save_pretrained(folder)
    size = {"height": 48, "width": 48}
    ViTImageProcessor(image_mean=[0.4] * 3, image_std=[0.3] * 3, size=size).save_pretrained(folder)
    return folder


def test_images_have_teachers_too(image_here, tiny_resnet: Path, tmp_path: Path) -> None:
    folder = save_net(tmp_path / "net", tiny_resnet, [0, 1, 2])
    turned = save_net(tmp_path / "turned", tiny_resnet, OTHER_ORDER)
    flags = ("--max_steps", "2", "--mixup", "0.2")
    plain = image_here(*flags, name="plain")
    none = image_here(*flags, "--teacher", folder, "--distill_alpha", "0", name="none")
    assert weights(none / "last") == weights(plain / "last")
    half = image_here(*flags, "--teacher", folder, "--save_every", "1", "--keep_checkpoints", "9", name="half")
    assert weights(half / "last") != weights(plain / "last")
    assert results(half)["parameters"] == results(plain)["parameters"]
    expected, step = weights(half / "last"), str(half / "checkpoints" / "step_000001")
    image_here(*flags, "--teacher", folder, "--resume", step, name="half")
    assert weights(half / "last") == expected
    with pytest.raises(UserError, match="teacher has 3 classes as before, but other weights"):
        image_here(*flags, "--teacher", turned, "--resume", step, name="half")
    with pytest.raises(UserError, match="other classes than the data: it lacks 'chair'"):
        image_here("--teacher", tiny_resnet, name="other")
    with pytest.raises(UserError, match="--teacher nowhere: no such folder"):
        image_here("--teacher", "nowhere", name="other")


def test_an_image_teacher_sees_what_it_is_used_to(tiny_resnet: Path, tmp_path: Path, accelerator) -> None:
    """Its own size and normalisation, whatever the student has."""
    folder = save_net(tmp_path / "net", tiny_resnet, [0, 1, 2])
    teacher = open_image_teacher(str(folder), ["table", "chair", "lamp"], accelerator)
    assert (teacher.side, teacher.order) == (48, [2, 0, 1])
    for side in (32, 48):
        pixels = torch.randint(0, 256, (3, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        large = torch.nn.functional.interpolate(pixels.float(), (48, 48), mode="bilinear", antialias=True)
        with torch.no_grad():
            expected = teacher.model((large.round() / 255 - 0.4) / 0.3).logits[:, [2, 0, 1]]
        assert torch.allclose(teacher.of_images(pixels).logits, expected, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- comparison


def test_teacher_and_students_in_one_table(train_here, bare_args: list[str], call_tool, tmp_path: Path) -> None:
    runs = [train_here(*SHORT, name="large")]
    flags = (*SHORT, "--teacher", runs[0], "--student_layers", "1")
    runs.append(train_here(*flags, base=bare_args, name="small"))
    code, out, err = call_tool(compare_runs, *runs, "--metrics", "accuracy", "--benchmark", "--seconds", "0.1", "--output_csv",
                               tmp_path / "t.csv")  # fmt: skip
    assert code == 0, err
    lines = [line.split(",") for line in (tmp_path / "t.csv").read_text().splitlines()]
    assert lines[0] == ["run", "split", "accuracy", "parameters", "MB", "ms"]
    assert [line[0] for line in lines[1:]] == ["large", "small"] and out.count("\n") >= 3
    for run, line in zip(runs, lines[1:], strict=True):
        size = sum(path.stat().st_size for path in (run / "best").glob("*.safetensors"))
        assert line[3] == str(results(run)["parameters"]) and float(line[4]) == pytest.approx(size / 1e6, abs=0.006)
        assert float(line[5]) > 0
    assert int(lines[1][3]) > int(lines[2][3])
