"""One table of the six training scripts: what the tests of the invariants need to know of each.

A further script gets all of tests/test_invariants.py and tests/torture.py with one more row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from harness import CLIP, HAR, IMAGE, MULTITASK, SIGN, TEXT, launch, results
from safetensors.torch import load_file

import accelerando.models.clip_classifier
import accelerando.models.sign
import accelerando.models.text_cnn
import accelerando.models.vision  # noqa: F401  (these register the models with transformers)

Flags = tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """One way to train for the kill test, on one or two processes."""

    flags: Flags
    processes: int = 1
    kills: int = 1


@dataclass(frozen=True)
class Task:
    """A script with what is particular to it; "{name}" in a flag stands for the fixture of that name."""

    name: str
    script: Path
    fixture: str  # the fixture of its flags
    here: str  # the fixture that runs it in this process
    counts: dict[str, int]  # samples of each split
    metric: str  # a share of right answers in results.json
    # Random parts on, ragged windows, saves and evaluations inside epochs and on different steps.
    random: Flags
    killed: dict[str, Variant]
    # Without random parts and with a small learning rate, so that rounding stays small.
    exact: Flags
    kinds: dict[str, Flags]  # what is trained in the comparison of one process, DDP and FSDP2
    whole: Flags  # the batch of one process
    parts: Flags  # the same batch on two processes
    steps: int  # optimizer steps of that run
    tolerance: float  # of its last weights
    unsettled: tuple[str, ...]  # parts of names of weights that have no gradient but rounding
    sharded: Flags  # trained with FSDP2, killed and handed over
    opened: Callable[[Path, Path], None]  # checks that a saved folder opens; (folder, run)
    promised: tuple[str, ...]  # files of a run, beside those of every run
    broken: tuple[Flags, str]  # flags that name data which is not there, and what the message names
    before: dict[str, tuple[str, ...]] = field(default_factory=dict)  # equal in results["base"][split]

    def args(self, request: pytest.FixtureRequest, *flags: str) -> list[str]:
        """The task's flags with ``flags`` after them."""
        return [*request.getfixturevalue(self.fixture), *self.fill(request, *flags)]

    def fill(self, request: pytest.FixtureRequest, *flags: str) -> list[str]:
        """``flags`` with the paths of fixtures put in."""
        return [str(request.getfixturevalue(flag[1:-1])) if flag.startswith("{") else str(flag) for flag in flags]

    def held_out(self) -> tuple[str, ...]:
        """The splits that every run scores."""
        return ("validation", "test")


def open_text(folder: Path, run: Path) -> None:
    """Model, tokenizer, and the adapter beside the merged weights."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = AutoTokenizer.from_pretrained(folder)(["goal match", "a"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**tokens).logits
        assert logits.shape == (2, 3)
        strategy = results(run)["config"]["model"]["strategy"]
        assert (folder / "adapter").is_dir() == (strategy == "lora")
        if strategy == "lora":
            source = results(run)["config"]["model"]["model_name"]
            base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
            adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
            assert torch.allclose(adapted(**tokens).logits, logits, atol=1e-5)
            files = load_file(folder / "adapter" / "adapter_model.safetensors")
            assert sum("lora_A" in key for key in files) == 4  # no rank's part is missing
            assert any(tensor.abs().max() > 0 for key, tensor in files.items() if "lora_B" in key)


def open_multitask(folder: Path, run: Path) -> None:
    """Each task's classifier alone, and the encoder that they share, whose weights are stored once."""
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    encoder, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, labels in {"topic": ["money", "space", "sport"], "play": ["other", "play"]}.items():
        model, report = AutoModelForSequenceClassification.from_pretrained(folder / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert list(model.config.id2label.values()) == labels
        tokens = AutoTokenizer.from_pretrained(folder / name)(["goal match", "a"], padding=True, return_tensors="pt")
        with torch.no_grad():
            assert model.eval()(**tokens).logits.shape == (2, len(labels))
        for key, tensor in encoder.state_dict().items():
            assert torch.equal(model.base_model.state_dict()[key], tensor), key
    assert len(AutoTokenizer.from_pretrained(folder)) > 10


def open_clip(folder: Path, run: Path) -> None:
    """The model, its processor, the mixed weights and the adapter."""
    from transformers import AutoProcessor, CLIPModel

    config = json.loads((run / "results.json").read_text())["config"]
    scenario = next(section["scenario"] for section in config.values() if "scenario" in section)
    mixed = next(section["wise_ft"] for section in config.values() if "wise_ft" in section)
    for place in (folder, *([run / "wise_ft"] if mixed else [])):
        model, report = CLIPModel.from_pretrained(place, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert model.logit_scale.shape == ()
    assert AutoProcessor.from_pretrained(folder).image_processor is not None
    if "lora" in scenario:
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        towers = 2 if scenario == "dual_lora" else 1
        assert sum("lora_B" in key for key in adapter) == 4 * towers  # no rank's part is missing
        assert all(tensor.abs().max() > 0 for tensor in adapter.values())


def open_sign(folder: Path, run: Path) -> None:
    """The model gives a score for each gloss."""
    from transformers import AutoModel

    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 4, model.config.input_width)).gloss_logits.shape == (1, 6)


def open_image(folder: Path, run: Path) -> None:
    """The model has the classes of the folders; the report shows what the net looked at."""
    from transformers import AutoModelForImageClassification

    model, report = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.num_labels == 3
    assert 'class="pair"' in (run / "report.html").read_text()


def open_har(folder: Path, run: Path) -> None:
    """The classifier has the classes of the folders and needs nothing else; a processor and a tokenizer are beside it."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoTokenizer

    model, report = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert list(model.config.id2label.values()) == ["blue table", "green_lamp_left", "red chair"]
    with torch.no_grad():
        assert model.eval()(pixel_values=torch.zeros(2, 3, 16, 16)).logits.shape == (2, 3)
    assert AutoImageProcessor.from_pretrained(folder) is not None
    assert len(AutoTokenizer.from_pretrained(folder)) > 10


HALVES = ("--batch_size", "6", "--gradient_accumulation_steps", "2")
CNN = ("--architecture", "cnn", "--embed_size", "16", "--num_filters", "8", "--vocab_size", "300")
TEXT_RANDOM = (
    "--epochs", "2", "--batch_size", "12", "--gradient_accumulation_steps", "2", "--eval_every", "5", "--save_every", "3",
    "--warmup_steps", "4", "--early_stop", "50", "--ema_decay", "0.95",
)  # fmt: skip
CLIP_RANDOM = (
    "--epochs", "2", "--effective_batch_size", "20", "--micro_batch_size", "6", "--num_workers", "2", "--eval_every",
    "5", "--save_every", "3", "--augmentation", "advanced", "--ema_decay", "0.99", "--lora_dropout", "0.2",
)  # fmt: skip
SIGN_RANDOM = (
    "--epochs", "2", "--batch_size", "5", "--gradient_accumulation_steps", "2", "--eval_every", "5", "--save_every", "3",
    "--ema_decay", "0.99", "--dropout", "0.2", "--rotation", "10", "--time_warp", "0.2", "--mirror", "0.5", "--balanced",
    "--noise", "0.02", "--curriculum", "dynamic", "--learned_weights", "--scheduler", "warmup_cosine",
)  # fmt: skip
SIGN_GRU = (
    *SIGN_RANDOM[: SIGN_RANDOM.index("--rotation")], "--model", "iv3_gru", "--noise", "0.02", "--num_workers", "2",
)  # fmt: skip
IMAGE_RANDOM = (
    "--epochs", "2", "--batch_size", "5", "--gradient_accumulation_steps", "2", "--eval_every", "5", "--save_every", "3",
    "--ema_decay", "0.9", "--augmentation", "randaugment", "--erasing", "0.3", "--mixup", "0.2", "--cutmix", "1",
    "--progressive_sizes", "24", "--balanced",
)  # fmt: skip
GRADUAL = (
    "--strategy",
    "gradual",
    "--layer_decay",
    "0.8",
    "--epochs",
    "3",
)  # what is trained changes from epoch to epoch

HAR_RANDOM = (
    "--epochs", "2", "--batch_size", "5", "--gradient_accumulation_steps", "2", "--eval_every", "5", "--save_every", "3",
    "--ema_decay", "0.9", "--augmentation", "strong", "--mixup", "0.2", "--cutmix", "1", "--balanced",
)  # fmt: skip
HAR_PROBE = ("--strategy", "linear_probe", "--head_lr", "1e-2", "--augmentation", "none")

MULTITASK_RANDOM = (
    *TEXT_RANDOM, "--uncertainty_weighting", "--sampling", "temperature", "--task_block", "8", "--task_weights",
    "play=0.5",
)  # fmt: skip

TASKS = {
    "text": Task(
        name="text", script=TEXT, fixture="text_args", here="train_here", metric="accuracy",
        counts={"train": 203, "validation": 61, "test": 67},
        random=TEXT_RANDOM,
        killed={
            "one": Variant(TEXT_RANDOM, kills=3),
            "two": Variant((*TEXT_RANDOM, "--batch_size", "6"), processes=2, kills=2),
            "cnn-workers": Variant((*TEXT_RANDOM, *CNN, "--num_workers", "2")),
            "lora-two": Variant((*TEXT_RANDOM, "--batch_size", "6", "--strategy", "lora", "--lora_r", "4",
                                 "--lora_dropout", "0.2"), processes=2),
        },
        exact=("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0", "--lora_dropout", "0",
               "--eval_batch_size", "5"),
        kinds={
            "full": ("--warmup_steps", "3", "--ema_decay", "0.9", "--eval_every", "4"),
            "lora": ("--strategy", "lora", "--lora_r", "4"),
            "cnn": (*CNN, "--dropout_prob", "0"),
        },
        whole=("--batch_size", "24"), parts=HALVES, steps=18, tolerance=2e-3, unsettled=(),
        sharded=("--batch_size", "12", "--save_every", "3", "--epochs", "2"),
        opened=open_text,
        promised=("best/tokenizer.json", "logs/classification_report_train.txt",
                  "logs/classification_report_validation.txt", "logs/classification_report_test.txt",
                  "plots/confusion_test.png"),
        broken=(("--train_file", "none.json"), "none.json"),
    ),
    "multitask": Task(
        name="multitask", script=MULTITASK, fixture="multitask_args", here="multitask_here", metric="mean",
        counts={"train": 203, "validation": 60, "test": 66},
        random=MULTITASK_RANDOM,
        killed={
            "one": Variant((*MULTITASK_RANDOM, "--num_workers", "2")),
            "two": Variant((*MULTITASK_RANDOM, "--batch_size", "6"), processes=2),
        },
        exact=("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0", "--eval_batch_size", "5"),
        kinds={"full": ("--warmup_steps", "3", "--ema_decay", "0.9", "--eval_every", "4", "--uncertainty_weighting")},
        whole=("--batch_size", "24"), parts=HALVES, steps=18, tolerance=2e-3, unsettled=(),
        sharded=("--batch_size", "12", "--save_every", "3", "--epochs", "2", "--uncertainty_weighting"),
        opened=open_multitask,
        promised=("best/tokenizer.json", "best/model_heads.safetensors", "best/topic/tokenizer.json",
                  "best/play/README.md", "logs/classification_report_train_play.txt",
                  "logs/classification_report_test_topic.txt", "plots/confusion_test_play.png"),
        broken=(("--train_files", "topic=none.json", "play=none.json"), "none.json"),
    ),
    "clip": Task(
        name="clip", script=CLIP, fixture="clip_args", here="clip_here", metric="recall_mean",
        counts={"train": 75, "validation": 23, "test": 19},
        random=CLIP_RANDOM,
        killed={
            "one": Variant(CLIP_RANDOM), "two": Variant(CLIP_RANDOM, processes=2),
            # The image tower's features come from the cache, which the first start makes.
            "locked": Variant((*CLIP_RANDOM, "--scenario", "full", "--lock_image_tower", "--augmentation", "none",
                               "--text_lr", "1e-3", "--layer_decay", "0.8")),
        },
        exact=("--lora_dropout", "0", "--lr", "3e-4", "--epochs", "1", "--class_field", "kind", "--wise_ft", "0.5",
               "--ema_decay", "0.9", "--eval_every", "2"),
        kinds={name: ("--scenario", name) for name in ("full", "dual_lora", "linear_probe")},
        whole=(), parts=("--micro_batch_size", "7"), steps=4, tolerance=1e-3, unsettled=("k_proj.bias",),
        sharded=(*CLIP_RANDOM, "--scenario", "full"),
        opened=open_clip,
        promised=("best/tokenizer.json", "best/processor_config.json"),
        broken=(("--train_data", "nowhere"), "nowhere"),
        before={"recall_mean": ("validation", "test")},
    ),
    "sign": Task(
        name="sign", script=SIGN, fixture="sign_args", here="sign_here", metric="gloss_accuracy",
        counts={"train": 75, "validation": 23, "test": 19},
        random=SIGN_RANDOM,
        killed={
            "one": Variant((*SIGN_RANDOM, "--num_workers", "2")),
            "two": Variant(SIGN_RANDOM, processes=2),
            "gru": Variant(SIGN_GRU),
        },
        exact=("--dropout", "0", "--lr", "1e-3", "--eval_batch_size", "5"),
        kinds={
            "transformer": ("--velocities", "--use_mask", "--learned_weights", "--conv_kernel", "3"),
            "iv3_gru": ("--model", "iv3_gru"),
        },
        whole=("--batch_size", "24"), parts=HALVES, steps=8, tolerance=2e-3, unsettled=(),
        sharded=SIGN_RANDOM,
        opened=open_sign,
        promised=("plots/confusion_test_cat.png", "logs/classification_report_test_gloss.txt"),
        broken=(("--keypoints-train", "nowhere"), "nowhere"),
    ),
    "image": Task(
        name="image", script=IMAGE, fixture="image_args", here="image_here", metric="accuracy",
        counts={"train": 66, "validation": 33, "test": 18},
        random=IMAGE_RANDOM,
        killed={
            "one": Variant((*IMAGE_RANDOM, "--num_workers", "2")),
            "two": Variant((*IMAGE_RANDOM, *GRADUAL), processes=2),
        },
        exact=("--model_name", "{tiny_vit}", "--lr", "1e-3", "--mixup", "0.3", "--eval_batch_size", "5"),
        kinds={"vit": ()},
        whole=("--batch_size", "24"), parts=HALVES, steps=6, tolerance=1e-3, unsettled=("key.bias", "k_proj.bias"),
        sharded=("--model_name", "{tiny_vit}", *IMAGE_RANDOM[: IMAGE_RANDOM.index("--progressive_sizes")], "--balanced"),
        opened=open_image,
        promised=("best/preprocessor_config.json", "plots/confusion_test.png", "logs/classification_report_test.txt"),
        broken=(("--data_dir", "nowhere"), "nowhere"),
    ),
    "har": Task(
        name="har", script=HAR, fixture="har_args", here="har_here", metric="accuracy",
        counts={"train": 66, "validation": 33, "test": 18},
        random=HAR_RANDOM,
        killed={
            "one": Variant((*HAR_RANDOM, "--num_workers", "2")),
            "two": Variant(HAR_RANDOM, processes=2),
            "probe": Variant((*HAR_RANDOM[: HAR_RANDOM.index("--augmentation")], *HAR_PROBE)),
        },
        exact=("--lr", "1e-3", "--eval_batch_size", "5", "--augmentation", "light", "--views", "2"),
        kinds={
            "full": ("--train_logit_scale",),
            "flyp": ("--loss", "contrastive", "--strategy", "lora", "--lora_r", "4", "--lora_dropout", "0"),
        },
        whole=("--batch_size", "24"), parts=HALVES, steps=6, tolerance=1e-3, unsettled=("k_proj.bias",),
        sharded=HAR_RANDOM,
        opened=open_har,
        promised=("best/tokenizer.json", "best/processor_config.json", "plots/confusion_test.png",
                  "logs/classification_report_test.txt", "predictions_test.csv"),
        broken=(("--data_dir", "nowhere"), "nowhere"),
    ),
}  # fmt: skip


# Left to `make test-all`: a further model or strategy of a script, where another one shows the same in `make test`.
EXHAUSTIVE = {
    "text-cnn-workers", "text-lora-two", "text-cnn", "text-lora", "clip-locked", "clip-linear_probe", "clip-dual_lora",
    "clip-two", "clip-2", "clip-launchers", "sign-gru", "sign-iv3_gru", "sign-two", "sign-2", "sign-launchers",
    "sign-sharded", "image-two", "image-2", "image-launchers", "image-sharded", "har-flyp", "har-two", "har-2",
    "har-probe", "har-launchers", "har-sharded", "multitask-two", "multitask-2", "multitask-launchers",
    "multitask-sharded", "clip-sharded", "clip-find_lr", "clip-processes", "clip-prolonged", "multitask-full",
    *(f"{task}-{label}" for task in ("sign", "image", "har", "multitask") for label in ("1", "processes", "prolonged", "find_lr")),
}  # fmt: skip


def place(label: str, group: str) -> list[pytest.MarkDecorator]:
    """The marks of a parameter: the worker of its group, and whether it is left to the exhaustive suite."""
    marks = [pytest.mark.xdist_group(group)]
    return [*marks, pytest.mark.exhaustive] if label in EXHAUSTIVE else marks


def over(what: str, group: str) -> list:
    """pytest parameters (task, name) over ``killed`` or ``kinds`` of all tasks; one worker for each task's group."""
    return [
        pytest.param(task, name, id=f"{task.name}-{name}", marks=place(f"{task.name}-{name}", f"{task.name}-{group}"))
        for task in TASKS.values()
        for name in getattr(task, what)
    ]


def each(label: str, group: str | None = None) -> list:
    """pytest parameters over the tasks; ``group``: the tests that one worker runs, if not those of ``label``."""
    return [
        pytest.param(task, id=task.name, marks=place(f"{task.name}-{label}", f"{task.name}-{group or label}"))
        for task in TASKS.values()
    ]


def trained_once(
    variants: Mapping[str, tuple[str, Flags]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[pytest.FixtureRequest, str], Path]:
    """``run(request, name)``: the run of a variant (task, flags), trained when it is first asked for."""
    made: dict[str, Path] = {}

    def run(request: pytest.FixtureRequest, name: str) -> Path:
        if name not in made:
            task, flags = variants[name]
            folder = tmp_path_factory.mktemp(name)
            script, args = TASKS[task].script, TASKS[task].args(request, *flags, "--run_name", name)
            launch(script, *args, cwd=folder)
            made[name] = folder / "runs" / name
        return made[name]

    return run
