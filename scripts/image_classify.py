"""Classify images: class folders, folds of them, any net of torchvision or timm, any classifier of transformers.

data_dir holds raw/<class>/* and the splits/ that tools/split_folds.py made of it, or train/<class>/*, val/<class>/* and
perhaps test/<class>/*; see data/README.md. The weights that are best on the validation pictures are scored on the test
pictures, which are the same for every fold.

  python tools/split_folds.py --raw_data data/insects/raw --folds 5
  accelerate launch --config_file accelerate_configs/cpu.yaml scripts/image_classify.py --data_dir data/insects --fold 0
  ... the same with accelerate_configs/multi_gpu.yaml (DDP) or accelerate_configs/fsdp.yaml (FSDP2)
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerando.base.config import check_ranges, parse_args, without_effect
from accelerando.base.errors import UserError, errors_in_one_line, first_line
from accelerando.train.optim import OptimizerName, SchedulerName


@dataclass
class Args:
    # -- data --
    data_dir: str = ""  # folder with raw/ and splits/, or with train/ and val/ (and test/)
    dataset_name: str | None = None  # what to call it (default: the folder's name)
    fold: int = 0  # which fold is validated on; the others are trained on
    image_size: int = 224  # side of the pictures in pixels
    crop_scale: float = 0.08  # augmentation: the smallest share of a picture that is cut out; 1: the middle, as it is
    flip: float = 0.5  # augmentation: probability of a left-right mirror
    augmentation: Literal["none", "randaugment", "trivialaugment"] = "none"  # more changes of shape and colour
    erasing: float = 0.0  # augmentation: probability that a rectangle is erased
    mixup: float = 0.0  # two pictures in one, shares from Beta(mixup, mixup): 0.2, say
    cutmix: float = 0.0  # a rectangle of another picture, its share from Beta(cutmix, cutmix): 1, say
    progressive_sizes: tuple[int, ...] = ()  # smaller sides for the first epochs, as 128 160; image_size comes last
    balanced: bool = False  # every class is drawn equally often
    cache: bool = False  # decode the pictures once, and read them from a memory map
    cache_side: int | None = None  # cache: shorter side of what is kept, in pixels (default: what evaluation needs)
    cache_dir: str | None = None  # cache: where (default: $ACCELERANDO_CACHE or ~/.cache/accelerando)
    # -- model --
    architecture: str = "resnet18"  # net of torchvision, or of timm as timm/<name>
    weights: str | None = None  # of the net: a file, or DEFAULT for ImageNet's, downloaded; None: random
    model_name: str | None = None  # instead of architecture: folder or Hub name of a classifier of transformers
    num_classes: int | None = None  # checked against the data
    strategy: Literal["full", "head", "gradual"] = "full"  # what is trained: all, the head, or it and then more
    unfreeze_every: int = 1  # gradual: epochs until the next layer below is trained too
    layer_decay: float = 1.0  # learning rate of a layer over that of the next one above: 0.75, say
    # -- loss --
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    class_weights: bool = False  # a class counts by the inverse of its frequency
    tta: bool = False  # evaluation averages a picture and its mirror image
    # -- training --
    trainer_type: Literal["standard", "accelerate", "mixed_precision", "dp"] = "standard"  # dp: private (Opacus)
    epochs: int = 20  # passes over the training pictures
    max_steps: int | None = None  # stop after this many optimizer steps, even if epochs are left
    batch_size: int = 32  # pictures per process and micro-batch
    eval_batch_size: int = 64  # pictures per process in evaluation
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.0  # on matrices; biases and norms are spared
    optimizer: OptimizerName = "adamw"  # 8-bit and paged ones come from bitsandbytes
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.999  # decay of the second moment
    adam_epsilon: float = 1e-8  # term that keeps the division finite
    momentum: float = 0.9  # sgd: Nesterov momentum
    scheduler: SchedulerName = "cosine"  # how the rate changes over the optimizer steps
    scheduler_patience: int = 5  # plateau: evaluations without improvement before the rate falls
    scheduler_step_size: int = 7  # step: epochs from one fall of the rate to the next
    scheduler_factor: float = 0.5  # plateau, step: what the rate is multiplied by when it falls
    warmup_steps: float = 0.0  # optimizer steps of linear warm-up; below 1, a share of all steps
    grad_clip: float | None = None  # largest gradient norm, with dp of each picture; None: not clipped (dp: 1)
    noise_multiplier: float | None = None  # dp: deviation of the noise over grad_clip (default: from target_epsilon)
    target_epsilon: float | None = None  # dp: privacy budget, at which training stops: 3, say
    target_delta: float = 1e-5  # dp: chance that the budget does not hold, less than 1 over the training pictures
    noise_seed: int | None = None  # dp: for tests; who knows it can subtract the noise (default: drawn, kept secret)
    ema_decay: float | None = None  # average the weights over the steps and evaluate the average: 0.999, say
    amp: Literal["auto", "no", "bf16", "fp16"] | None = None  # precision; auto: bf16 if it is fast (default: launch's)
    compile_model: bool = False  # torch.compile
    deterministic: bool = False  # GPU: only kernels that give the same bits each time, slower where convolutions are
    channels_last: bool = True  # the memory layout that convolutions are fastest in
    best_metric: Literal["accuracy", "f1_macro", "f1_weighted", "loss"] = "accuracy"  # chooses the best weights
    early_stop: int | None = None  # evaluations without improvement before the run ends
    early_stop_min_delta: float = 0.0  # what counts as an improvement
    eval_every: int = 0  # optimizer steps between evaluations; 0: every epoch
    num_workers: int = 0  # processes that prepare batches
    pin_memory: bool = True  # GPU: page-locked batches, which are copied faster
    seed: int = 42  # of weights, order, augmentation and dropout
    # -- output --
    output_dir: str = "runs"  # folder of the run directories
    run_name: str | None = None  # name of this one (default: data set, model, batch, fold and seed)
    overwrite: bool = False  # start again where a run of this name exists
    resume: str | None = None  # go on with a run: its folder, or no value for the one this command made
    save_every: int = 0  # optimizer steps between checkpoints; 0: every epoch
    keep_checkpoints: int = 2  # how many checkpoints stay
    log_every: int = 50  # optimizer steps between lines of the log
    report_on_train: bool = False  # score the best weights on the training pictures too
    report_to: tuple[str, ...] = ("tensorboard",)  # tensorboard, wandb, mlflow, several of them, or none
    wandb_project: str = "accelerando"  # wandb: project
    wandb_entity: str | None = None  # wandb: user or team
    wandb_name: str | None = None  # wandb: name of the run (default: run_name)
    wandb_tags: tuple[str, ...] = ()  # wandb: tags
    wandb_notes: str | None = None  # wandb: notes
    experiment_name: str = "accelerando"  # mlflow: experiment
    push_to_hub: bool = False  # upload best/ to the Hugging Face Hub at the end
    hub_repo_id: str | None = None  # where to: user/name
    hub_private: bool = True  # make the repository private
    config: tuple[str, ...] = ()  # YAML files with any of these settings; the command line wins


# The guide's spellings that are not everybody's.
ALIASES = {
    "random_erasing": "erasing",
    "resize": "image_size",
    "layer_wise_lr_decay": "layer_decay",
    "amp_dtype": ("amp", {"float16": "fp16", "bfloat16": "bf16", "float32": "no"}),
}


# ------------------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """Picture files of the splits, the class names, and how pictures become numbers."""

    splits: dict[str, Any]  # train, validation and perhaps test: data.folders.ImageFiles
    label_names: list[str]
    class_weights: Any  # n / (C n_c) for each class, float32 [C]: 1 on average over the training pictures
    mean: tuple[float, ...]  # of each colour, 0 to 1
    std: tuple[float, ...]


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_data(args: Args) -> Data:
    import numpy as np
    import torch

    from accelerando.base.files import cache_folder
    from accelerando.base.log import log
    from accelerando.data.decode import evaluation_side
    from accelerando.data.folders import read_splits
    from accelerando.data.image_cache import cached_images

    folder = Path(args.data_dir)
    if not args.data_dir:
        raise UserError("--data_dir is missing: a folder with raw/<class>/ or with train/<class>/ and val/<class>/")
    left_out: list[str] = []
    classes, splits = read_splits(folder, args.fold, lambda name, why: left_out.append(f"{folder / name}: {why}"))
    for line in left_out[:5]:
        log.warning("Left out: %s", line)
    if len(left_out) > 5:
        log.warning("... and %d more", len(left_out) - 5)
    if len(classes) < 2:
        raise UserError(f"{folder}: one class, {next(iter(classes))}; a classifier needs at least two")
    if args.num_classes not in (None, len(classes)):
        raise UserError(f"--num_classes {args.num_classes}, but {folder} has {len(classes)} classes")
    names, counts = list(classes), ", ".join(f"{split} {len(found):,}" for split, found in splits.items())
    log.info("Pictures: %s; %d classes: %s", counts, len(names), ", ".join(names[:12]) + " ..." * (len(names) > 12))
    if args.cache:
        side = args.cache_side or evaluation_side(args.image_size)
        splits = cached_images(splits, side, cache_folder(args.cache_dir), args.num_workers)
    counts = np.bincount(splits["train"].classes, minlength=len(names))
    weights = torch.from_numpy(counts.sum() / (len(counts) * np.maximum(counts, 1))).float()
    return Data(splits, names, weights, *normalisation_of(args))


def normalisation_of(args: Args) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each colour that the model was trained with."""
    from accelerando.models.vision import TIMM, timm_settings

    if not args.model_name:
        settings = timm_settings(args.architecture) if args.architecture.startswith(TIMM) else None
        return (tuple(settings.mean), tuple(settings.std)) if settings else IMAGENET
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(args.model_name)
    except (OSError, ValueError):  # from a config alone
        return IMAGENET
    return tuple(processor.image_mean), tuple(processor.image_std)


# ------------------------------------------------------------------------------------------------------------ model


def build_model(args: Args, data: Data, accelerator: Any) -> Any:
    from accelerando.base.log import log
    from accelerando.models.cpu import speed_up_dropout
    from accelerando.models.vision import VisionNet, VisionNetConfig, load_pretrained
    from accelerando.train.accelerator import count_parameters
    from accelerando.train.privacy import make_valid

    labels = {
        "num_labels": len(data.label_names),
        "id2label": dict(enumerate(data.label_names)),
        "label2id": {name: number for number, name in enumerate(data.label_names)},
    }
    if args.model_name:
        model = open_classifier(args.model_name, labels)
    else:
        # Batch norms mix the pictures of a batch, which leaves no picture a gradient of its own.
        group_norm = args.trainer_type == "dp" and args.strategy == "full"
        model = VisionNet(VisionNetConfig(architecture=args.architecture, group_norm=group_norm, **labels))
        if args.weights and args.weights.lower() != "none":
            log.info("%s", load_pretrained(model, args.weights))
    head = head_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = args.strategy != "head" or name.startswith(head)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained or any(args.strategy == "head" and not name.startswith(head) for name in trained):
        raise RuntimeError(f"strategy {args.strategy} trains the wrong parameters: {trained[:3]}")
    if args.trainer_type == "dp":
        make_valid(model, args.image_size)
    if accelerator.device.type == "cpu" and not args.compile_model and args.trainer_type != "dp":
        speed_up_dropout(model)
    trainable, total = count_parameters(model)
    log.info("Strategy %s trains %s of %s parameters (%.2f %%)", args.strategy, f"{trainable:,}", f"{total:,}",
             100 * trainable / total)  # fmt: skip
    return model


def open_classifier(name: str, labels: dict[str, Any]) -> Any:
    """A classifier of transformers, with a new head where its own is for other classes."""
    import torch
    from transformers import AutoModelForImageClassification

    import accelerando.models.vision  # noqa: F401  (so that a net saved by this script opens too)

    try:
        return AutoModelForImageClassification.from_pretrained(
            name, dtype=torch.float32, ignore_mismatched_sizes=True, **labels
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name {name} cannot be opened: {first_line(error)}") from None


def head_names(model: Any) -> tuple[str, ...]:
    """How the names of the head's parameters begin."""
    if hasattr(model, "head_name"):
        return (f"{model.head_name()}.",)
    if hasattr(model, "timm_model"):  # timm's nets inside transformers
        last = model.timm_model.get_classifier()
        return tuple(f"{name}." for name, module in model.named_modules() if module is last)
    bodies = (model.base_model_prefix, "vision_model")  # CLIP's and SigLIP's classifiers have half of their model
    others = {name: child for name, child in model.named_children() if name not in bodies}
    return tuple(f"{name}." for name, child in others.items() if list(child.parameters()))


# ------------------------------------------------------------------------------------------------ loss and evaluation


def compute_loss(model: Any, batch: dict[str, Any], data: Data, args: Args) -> tuple[Any, Any]:
    """Cross-entropy of each picture, [B], and the logits, [B, C]; where two were mixed, each label has its share."""
    import torch

    from accelerando.data.transforms import normalise

    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    pixels = normalise(batch["pixel_values"].contiguous(memory_format=layout), data.mean, data.std)
    logits = model(pixel_values=pixels).logits.float()
    if args.tta and not model.training:
        logits = (logits + model(pixel_values=pixels.flip(-1)).logits.float()) / 2
    weight = data.class_weights.to(logits) if args.class_weights else None

    def loss(labels: Any) -> Any:
        return torch.nn.functional.cross_entropy(
            logits, labels, weight, reduction="none", label_smoothing=args.label_smoothing
        )

    share = batch["share"]
    return share * loss(batch["labels"]) + (1 - share) * loss(batch["other_labels"]), logits


def evaluate(model: Any, dataset: Any, data: Data, run: Any, args: Args, what: str) -> dict[str, Any] | None:
    """Labels [n], logits [n, C], losses [n] and row [n] of every picture once, in order, but for those that cannot be
    read; None when stopped."""
    import torch

    from accelerando.base.log import progress_bar
    from accelerando.data.collate import ImageCollate
    from accelerando.data.pairs import report_unreadable
    from accelerando.train.accelerator import unwrapped
    from accelerando.train.batches import evaluation_batches, gather_rows
    from accelerando.train.stop import stop_requested

    accelerator = run.accelerator
    batches = evaluation_batches(
        dataset, ImageCollate(), args.eval_batch_size, num_workers=args.num_workers,
        num_processes=accelerator.num_processes, process_index=accelerator.process_index, device=accelerator.device,
    )  # fmt: skip
    model.eval()
    columns: dict[str, list[Any]] = {name: [] for name in ("index", "weight", "valid", "labels", "logits", "losses")}
    with torch.no_grad(), progress_bar(len(dataset), 0, " pictures", what) as bar:
        for batch in batches:
            losses, logits = compute_loss(model, batch, data, args)
            for name, values in {**batch, "losses": losses, "logits": logits}.items():
                if name in columns:
                    columns[name].append(values)
            bar.update(len(losses) * accelerator.num_processes)
            if stop_requested(run):
                return None
    unwrapped(accelerator, model)  # FSDP: frees the gathered weights, which may be those of the average
    found = gather_rows(accelerator, len(dataset), {name: torch.cat(parts) for name, parts in columns.items()})
    readable = found.pop("valid") > 0
    report_unreadable(accelerator, dataset, what, (~readable).nonzero()[0], what="pictures")
    if not readable.any():
        raise UserError(f"no picture of {what} can be read")
    return {name: values[readable] for name, values in found.items()} | {"row": readable.nonzero()[0]}


# ------------------------------------------------------------------------------------------------------------- main

USAGE = """
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import accelerando.models.vision  # makes transformers know this model

model = AutoModelForImageClassification.from_pretrained("{folder}").eval()
processor = AutoImageProcessor.from_pretrained("{folder}")
logits = model(**processor(Image.open("picture.jpg").convert("RGB"), return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])
"""


def check_args(args: Args) -> None:
    """What can be wrong before anything is loaded; what trainer_type stands for."""
    from accelerando.inference.hub import check_push
    from accelerando.train.run import choose_directory
    from accelerando.train.tracking import check_trackers

    check_trackers(args.report_to)
    check_push(args.push_to_hub, args.hub_repo_id)
    choose_directory(args, default_name(args))
    check_ranges(
        args, ema_decay=(0, 0.9999999), fold=(0, 9999), image_size=(8, 4096), crop_scale=(0.001, 1), flip=(0, 1),
        erasing=(0, 1), cache_side=(8, 16384), mixup=(0, 100), cutmix=(0, 100), label_smoothing=(0, 0.999),
        num_classes=(2, 2**20), unfreeze_every=(1, 2**20), layer_decay=(0.001, 1), noise_multiplier=(0, 1000),
        target_epsilon=(1e-6, 1e6), target_delta=(1e-30, 0.999), noise_seed=(0, 2**62),
    )  # fmt: skip
    if any(not 8 <= size <= args.image_size for size in args.progressive_sizes):
        raise UserError(f"--progressive_sizes: sides from 8 up to --image_size {args.image_size}")
    if args.model_name and args.weights:
        raise UserError("--weights are those of --architecture; --model_name brings its own: drop one")
    if args.layer_decay < 1 and args.strategy == "head":
        raise UserError("--layer_decay: --strategy head trains one layer alone: full or gradual train more")
    if args.trainer_type == "mixed_precision":
        if args.amp == "no":
            raise UserError("--trainer_type mixed_precision and --amp no contradict each other: drop one")
        args.amp = args.amp or "auto"
    if args.trainer_type == "dp":
        check_private(args)


def check_private(args: Args) -> None:
    """What cannot go with differential privacy, and what it needs."""
    from accelerando.train.privacy import require_opacus

    require_opacus()
    others = {
        "mixup and --cutmix": (args.mixup or args.cutmix, "a picture would be in the gradient of others too"),
        "balanced": (args.balanced, "the accounting needs each picture drawn with the same probability"),
        "class_weights": (args.class_weights, "they tell the numbers of pictures without noise"),
        "strategy gradual": (args.strategy == "gradual", "what is trained has to stay the same: full or head"),
        "amp": (args.amp not in (None, "no"), "gradients of single pictures are computed in float32"),
        "compile_model": (args.compile_model, "the hooks for gradients of single pictures are not compiled"),
        "progressive_sizes": (args.progressive_sizes, "one size was checked"),
        "report_on_train": (args.report_on_train, "it tells of the training pictures without noise"),
        f"resume {args.resume}": (Path(args.resume or "").name.startswith("step_"),
                                  "steps that are given up would not be counted; it goes on from the newest"),
    }  # fmt: skip
    for flag, (given, why) in others.items():
        if given:
            raise UserError(f"--{flag} cannot go with --trainer_type dp: {why}")
    if args.noise_multiplier is None and args.target_epsilon is None:
        raise UserError("--trainer_type dp needs a budget, such as --target_epsilon 3, or --noise_multiplier")
    args.amp, args.grad_clip, args.channels_last = "no", args.grad_clip or 1.0, False


def data_title(args: Args) -> str:
    """A short name of the data: what it was called, or its folder's own name."""
    return args.dataset_name or Path(args.data_dir).absolute().name or "data"


def model_title(args: Args) -> str:
    """A short name of the model."""
    from accelerando.train.run import short_name

    return short_name(args.model_name) if args.model_name else args.architecture.replace("/", "-")


def default_name(args: Args) -> str:
    """The run directory's name: what distinguishes runs that one tends to compare."""
    from accelerando.train.run import join_name

    fold = (f"fold{args.fold}",) if (Path(args.data_dir) / "splits").is_dir() else ()
    settings = (f"bs{args.batch_size}", f"lr{args.lr:g}", *fold, f"seed{args.seed}")
    return join_name(data_title(args), model_title(args), *settings)


def main() -> None:
    args = parse_args(Args, ALIASES)
    check_args(args)

    import torch

    from accelerando.base.log import log, progress_bar, success
    from accelerando.data.collate import ImageCollate
    from accelerando.data.images import EvaluationImages, ImageAugmentation, TrainingImages, write_image_processor
    from accelerando.data.pairs import report_unreadable
    from accelerando.inference.hub import push_folder
    from accelerando.report.metrics import classification_metrics
    from accelerando.report.model_card import write_model_card
    from accelerando.report.predictions import probabilities, worst_mistakes, write_predictions
    from accelerando.report.results import METRICS, split_to_show, write_classification_results, write_summary
    from accelerando.report.saliency import add_pictures
    from accelerando.train.accelerator import (
        choose_sharded_layers,
        count_parameters,
        is_sharded,
        make_accelerator,
        seed_processes_apart,
        unwrapped,
    )
    from accelerando.train.averages import Ema, averaged
    from accelerando.train.batches import TrainBatches
    from accelerando.train.layerwise import layers_of, train_from, train_mode
    from accelerando.train.loop import (
        after_step,
        count_evaluation,
        evaluation_was_stopped,
        is_due,
        log_step,
        out_of_patience,
        plan_steps,
        speed,
        take_train_loss,
    )
    from accelerando.train.optim import make_optimizer, make_scheduler
    from accelerando.train.privacy import (
        check_budget,
        clip_and_add,
        count_private_step,
        epsilon_of,
        privacy_results,
        start_privacy,
    )
    from accelerando.train.run import finish_run, leave_after_stop, restore, save, start_run
    from accelerando.train.tracking import evaluations, record
    from accelerando.train.weights import load_trained_weights, save_model_folder

    accelerator = make_accelerator(args.seed, args.amp, args.deterministic, changing=args.strategy == "gradual")
    if args.trainer_type == "dp" and is_sharded(accelerator):
        raise UserError("--trainer_type dp needs whole parameters: launch without FSDP")
    data = load_data(args)
    model = build_model(args, data, accelerator)
    if args.trainer_type == "dp" and not args.resume:
        batch = args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        check_budget(
            batch, len(data.splits["train"]), args.epochs, args.max_steps, args.noise_multiplier, args.target_epsilon,
            args.target_delta,
        )  # fmt: skip
    run = start_run(accelerator, args, default_name(args))
    state = run.state
    used = {"GPU": accelerator.device.type == "cuda", "cache": args.cache, "dp": args.trainer_type == "dp",
            "gradual": args.strategy == "gradual"}  # fmt: skip
    for line in without_effect(args, used):
        log.warning("%s", line)

    augmentation = ImageAugmentation(args.crop_scale, args.flip, args.augmentation, args.erasing, data.mean)
    dataset = TrainingImages(
        data.splits["train"], augmentation, (*args.progressive_sizes, args.image_size), args.epochs, args.seed,
        args.mixup, args.cutmix, args.balanced,
    )  # fmt: skip
    images = {split: EvaluationImages(files, args.image_size) for split, files in data.splits.items()}
    train_batches = TrainBatches(
        dataset, ImageCollate(), args.batch_size, args.gradient_accumulation_steps, args.seed,
        num_workers=args.num_workers, num_processes=accelerator.num_processes,
        process_index=accelerator.process_index, device=accelerator.device, pin_memory=args.pin_memory,
    )  # fmt: skip
    total_steps = plan_steps(run, train_batches, args.epochs, args.max_steps)

    layers = layers_of(model, head_names(model))
    optimizer = make_optimizer(
        model, args.optimizer, args.lr, args.weight_decay, (args.adam_beta1, args.adam_beta2), args.adam_epsilon,
        args.momentum, is_sharded(accelerator), layers if args.layer_decay < 1 else (), args.layer_decay,
    )  # fmt: skip
    plain = model
    if args.compile_model:
        model = torch.compile(model)
    if args.channels_last and not is_sharded(accelerator):
        model = model.to(memory_format=torch.channels_last)
    if args.trainer_type == "dp":  # sums over processes by itself
        model, optimizer = model.to(accelerator.device), accelerator.prepare(optimizer)
    else:
        choose_sharded_layers(accelerator, model)
        model, optimizer = accelerator.prepare(model, optimizer)
    privacy = None
    if args.trainer_type == "dp":
        privacy = start_privacy(
            accelerator, model, optimizer.optimizer, state, train_batches.window_size, len(dataset), total_steps,
            args.grad_clip, args.noise_multiplier, args.noise_seed, args.target_epsilon, args.target_delta,
        )  # fmt: skip
        total_steps = privacy.last_step  # a hard stop where the budget is spent
        train_batches.poisson_seed = state.noise_seed
    higher_is_better = args.best_metric != "loss"
    schedule = make_scheduler(
        optimizer.optimizer, args.scheduler, total_steps, args.warmup_steps, args.scheduler_factor,
        args.scheduler_patience, higher_is_better, args.scheduler_step_size * train_batches.num_windows(),
    )  # fmt: skip
    ema = Ema(optimizer, args.ema_decay) if args.ema_decay else None
    seed_processes_apart(args.seed, accelerator)
    if args.strategy == "gradual":
        train_from(plain, layers, 1 + state.epoch // args.unfreeze_every)
    restore(run, model, optimizer, schedule, ema)

    def write_beside_weights(folder: Path) -> None:
        write_image_processor(folder, args.image_size, data.mean, data.std)
        usage = USAGE.format(folder=run.directory / "best")
        write_model_card(folder, run, "image-classification", args.model_name, metrics, usage)

    def save_weights(folder: Path) -> None:
        save_model_folder(accelerator, model, folder, write_beside_weights)

    def stop_here() -> None:
        leave_after_stop(run, save(run, model, optimizer, schedule, args.keep_checkpoints, ema))

    metrics = {name: row[name] for row in evaluations(run)[-1:] for name in METRICS if name in row}

    def validate() -> bool:
        """Scores the validation pictures, keeps the weights if they are the best so far; False when asked to stop."""
        with averaged(ema):
            found = evaluate(model, images["validation"], data, run, args, "validation")
        if found is None:
            return False
        metrics.update(classification_metrics(found["labels"], found["logits"], found["losses"]))
        value, train_loss = metrics[args.best_metric], take_train_loss(state)
        best = count_evaluation(state, value, args.early_stop_min_delta, higher_is_better)
        lr = optimizer.param_groups[0]["lr"]
        epsilon = {"epsilon": epsilon_of(state.spent, args.target_delta)} if privacy else {}
        record(run, "validation", {"train_loss": train_loss, **metrics, **epsilon, "lr": lr, **speed(run)})
        schedule.evaluated(value)
        log.info("validation loss %.4f  accuracy %.4f  F1 macro %.4f  (step %d, train loss %.4f)",
                 metrics["loss"], metrics["accuracy"], metrics["f1_macro"], state.step, train_loss)  # fmt: skip
        if privacy:
            log.info("privacy spent: epsilon %.3f at delta %g", epsilon["epsilon"], args.target_delta)
        if best:
            with averaged(ema):
                save_weights(run.directory / "best")
            success("New best %s %.4f, saved to %s", args.best_metric, value, run.directory / "best")
        write_summary(run, model_title(args), total_steps, {"validation": metrics})
        return True

    # A run that was stopped inside an evaluation goes on with it.
    if evaluation_was_stopped(state, args.eval_every, total_steps) and not validate():
        stop_here()

    checkpoint = None
    bar = progress_bar(total_steps, state.step, " steps", "training")
    while state.step < total_steps and not out_of_patience(state, args.early_stop):
        log.info("Epoch %d/%d", state.epoch + 1, args.epochs)
        if args.strategy == "gradual":
            train_from(plain, layers, 1 + state.epoch // args.unfreeze_every)
            log.info("trained are the last %d of %d layers, %s parameters",
                     min(len(layers), 1 + state.epoch // args.unfreeze_every), len(layers),
                     f"{count_parameters(model)[0]:,}")  # fmt: skip
        clock = time.perf_counter()
        for window in train_batches.windows(state.epoch, state.position):
            train_mode(model)
            loss_sum = torch.zeros((), device=accelerator.device)
            for number, batch in enumerate(window, start=1):
                with nullcontext() if number == len(window) else accelerator.no_sync(model):
                    losses, _ = compute_loss(model, batch, data, args)
                    loss = (losses * batch["weight"]).sum()
                    # The mean over the samples of the whole window; DDP and FSDP average over processes.
                    accelerator.backward(loss if privacy else loss * accelerator.num_processes / window.num_samples)
                if privacy:
                    clip_and_add(privacy, last=number == len(window))
                loss_sum += loss.detach()
            most = float("inf") if privacy else args.grad_clip or float("inf")
            norm = accelerator.clip_grad_norm_(model.parameters(), most)
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:  # fp16: the scaler met an overflow
                schedule.step()
            optimizer.zero_grad()
            if privacy:
                count_private_step(privacy)
            stop = after_step(run, window, loss_sum)
            if ema:
                ema.update(state.step)
            end_of_epoch, last_step = state.position == len(dataset), state.step == total_steps
            now = time.perf_counter()
            state.seconds, clock = state.seconds + now - clock, now
            state.wait_seconds += train_batches.take_seconds_waited()
            bar.update()
            if state.step % args.log_every == 0:
                log_step(run, bar, total_steps, lr, float(norm))
            if end_of_epoch:
                state.epoch, state.position = state.epoch + 1, 0
            if is_due(args.eval_every, state.step, end_of_epoch, last_step) and not stop:
                stop = not validate()
                clock = time.perf_counter()  # evaluating and saving is not training
            if stop or is_due(args.save_every, state.step, end_of_epoch, last_step):
                checkpoint = save(run, model, optimizer, schedule, args.keep_checkpoints, ema)
                clock = time.perf_counter()
            if stop:
                leave_after_stop(run, checkpoint)
            if last_step or out_of_patience(state, args.early_stop):
                break
    bar.close()
    report_unreadable(accelerator, dataset, "training", train_batches.unreadable, what="pictures")
    if out_of_patience(state, args.early_stop):
        log.info("Stopped early: no better %s in %d evaluations", args.best_metric, args.early_stop)
        if checkpoint is None or checkpoint.name != f"step_{state.step:06d}":
            save(run, model, optimizer, schedule, args.keep_checkpoints, ema)

    save_weights(run.directory / "last")
    load_trained_weights(accelerator, model, run.directory / "best")
    scores = {}
    for split in ("validation", "test", *(["train"] if args.report_on_train else [])):
        if split in images:
            scores[split] = evaluate(model, images[split], data, run, args, split)
            if scores[split] is None:
                leave_after_stop(run, run.checkpoints)
    if accelerator.is_main_process:
        for split, score in scores.items():
            files = [data.splits[split].names[int(row)].as_py() for row in score["row"]]
            chances = probabilities(score["logits"])
            write_predictions(
                run.directory / f"predictions_{split}.csv", files, data.label_names, chances, score["labels"]
            )
        last = split_to_show(scores)
        worst = worst_mistakes(scores[last], data.label_names)
        for mistake in worst:
            mistake["text"] = data.splits[last].names[int(scores[last]["row"][mistake["row"]])].as_py()
        # A sharded net cannot be asked by one process alone what it looked at.
        best = run.directory / "best"
        net = open_classifier(str(best), {}) if is_sharded(accelerator) else unwrapped(accelerator, model)
        add_pictures(worst, scores[last], images[last], net, data.mean, data.std)
        trainable, parameters = count_parameters(model)
        report = write_classification_results(
            run, model_title(args), f"Image classification: {data_title(args)}", data.label_names, scores, worst,
            {"parameters": parameters, "trainable_parameters": trainable, **privacy_results(state, args.target_delta)},
            total_steps, "pictures",
        )  # fmt: skip
        log.info("Summary\n%s", (run.directory / "summary.txt").read_text(encoding="utf-8"))
        log.info("Report: %s", report)
        if args.push_to_hub:
            success("Pushed %s to %s", best, push_folder(best, args.hub_repo_id, args.hub_private))
    finish_run(run)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
