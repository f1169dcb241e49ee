# /// script
# requires-python = ">=3.11"
# dependencies = ["accelerando"]
# ///
"""Classify images: class folders or tables, any net of torchvision or timm, any classifier of transformers.

data_dir holds raw/<class>/* and the splits/ that tools/split_folds.py made of it, or train/<class>/*, val/<class>/* and
perhaps test/<class>/*; or train_file is a table of files and labels; see data/README.md. Trained with cross-entropy, or
on several labels or numbers an image; the weights that are best on the validation images are scored on the test images,
which are the same for every fold.

  python tools/split_folds.py --raw_data data/insects/raw --folds 5
  accelerate launch --config_file accelerate_configs/cpu.yaml scripts/image_classify.py --data_dir data/insects --fold 0
  ... the same with accelerate_configs/multi_gpu.yaml (DDP) or accelerate_configs/fsdp.yaml (FSDP2)
  python scripts/image_classify.py --data_dir data/insects --fold 0    (one process, some seconds sooner)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from accelerando.base.config import check_ranges, parse_args, without_effect
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import cache_folder
from accelerando.base.log import log
from accelerando.data.collate import ImageCollate
from accelerando.data.decode import evaluation_side
from accelerando.data.folders import ImageFiles, listed_images, read_splits
from accelerando.data.image_cache import cached_images
from accelerando.data.images import EvaluationImages, ImageAugmentation, TrainingImages, write_image_processor
from accelerando.data.splits import stratified_split
from accelerando.data.tables import ProblemType, encode_labels, label_names, read_text_table
from accelerando.data.targets import PROBLEM_TYPES, as_targets, strata
from accelerando.data.transforms import normalise
from accelerando.inference.hub import Hub, check_push
from accelerando.models.cpu import speed_up_dropout, use_patch_products
from accelerando.models.pretrained import (
    class_labels,
    colour_statistics,
    head_names,
    open_classifier,
    own_image_size,
)
from accelerando.report import page, results, target_reports
from accelerando.report.metrics import classification_metrics
from accelerando.report.model_card import write_model_card
from accelerando.report.predictions import probabilities, worst_mistakes, write_predictions
from accelerando.report.saliency import add_images
from accelerando.report.slices import columns_of_files, slices_block
from accelerando.report.target_metrics import (
    best_thresholds,
    multi_label_metrics,
    regression_metrics,
    tuned_metrics,
)
from accelerando.train.accelerator import (
    is_sharded,
    log_trained,
    make_accelerator,
    prepare,
    unwrapped,
)
from accelerando.train.averages import Ema, averaged
from accelerando.train.batches import TrainBatches, check_no_batch_of_one, first_batch
from accelerando.train.class_losses import class_losses, inverse_frequency, log_frequency, mixed_loss
from accelerando.train.distillation import Teacher, distilled, open_image_teacher, teacher_folder
from accelerando.train.evaluation import EvaluationRows, best_metric, check_validation, mirrored_mean
from accelerando.train.gradients import step_is_repeated
from accelerando.train.layerwise import layers_of, train_from, train_mode
from accelerando.train.loop import evaluation_is_due, finish_step, plan_steps, record_evaluation, training_steps
from accelerando.train.lora import attach_lora
from accelerando.train.optim import OptimizerName, SchedulerName, make_optimizer, make_scheduler
from accelerando.train.privacy import (
    check_budget,
    clip_and_add,
    make_valid,
    privacy_notes,
    privacy_results,
    require_opacus,
    start_privacy,
)
from accelerando.train.run import choose_directory, default_run_name, finish_run, restore, save, short_name, start_run
from accelerando.train.state import Metric, Run
from accelerando.train.stop import stoppable
from accelerando.train.trackers import check_trackers
from accelerando.train.weights import load_trained_weights, save_model_folder

if TYPE_CHECKING:
    import numpy as np
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    Found = dict[str, dict[str, np.ndarray]]  # by split: what `evaluate` found


BestMetric = Literal[
    "accuracy", "f1_macro", "f1_weighted", "loss", "f1_micro", "mAP", "subset_accuracy", "pearson", "spearman",
    "mse", "mae",
]  # fmt: skip


@dataclass
class Args:
    # -- data --
    data_dir: str = ""  # folder with raw/ and splits/, or with train/ and val/ (and test/)
    train_file: str | None = None  # instead: a table of files and labels: .json, .jsonl, .csv, .tsv or .parquet
    validation_file: str | None = None  # the same, for choosing the best weights
    test_file: str | None = None  # the same, scored once at the end with the best weights
    media_folder: str | None = None  # tables: folder of the files (default: the table's own)
    file_column: str = "image"  # tables: column of the file
    label_column: str = "label"  # tables: column of the label: names or whole numbers; lists of them; or a number
    label_delimiter: str | None = None  # what separates several labels of a row in label_column: "|", say
    label_columns: tuple[str, ...] = ()  # instead of label_column: a column of 0 and 1 for each label, or of numbers
    problem_type: ProblemType | None = None  # what is learned of each row (default: found from the training rows)
    slice_by: tuple[str, ...] = ()  # tables: other columns; the report shows the accuracy for each of their values
    dataset_name: str | None = None  # what to call it (default: the folder's name, or the table's)
    fold: int = 0  # data_dir with splits/: which fold is validated on; the others are trained on
    validation_fraction: float = 0.1  # share of the training images held out where none are named; 0: none
    image_size: int | None = None  # side of the images in pixels (default: what the model was made for)
    crop_scale: float = 0.08  # augmentation: the smallest share of an image that is cut out; 1: the middle, as it is
    flip: float = 0.5  # augmentation: probability of a left-right mirror
    augmentation: Literal["none", "randaugment", "trivialaugment"] = "none"  # further changes of geometry and colour
    erasing: float = 0.0  # augmentation: probability that a rectangle is erased
    mixup: float = 0.0  # two images in one, shares from Beta(mixup, mixup): 0.2, say
    cutmix: float = 0.0  # a rectangle of another image, its share from Beta(cutmix, cutmix): 1, say
    progressive_sizes: tuple[int, ...] = ()  # smaller sides for the first epochs: 128 160, say; image_size is the last
    balanced: bool = False  # every class is sampled equally often
    cache: bool = False  # decode the images once, then read them from a memory map
    cache_side: int | None = None  # cache: shorter side of what is kept, in pixels (default: what evaluation needs)
    cache_dir: str | None = None  # cache: where (default: $ACCELERANDO_CACHE or ~/.cache/accelerando)
    dataset_version: str | None = None  # tag or revision of the data, kept with the results: v1.2, say
    # -- model --
    architecture: str = "resnet18"  # net of torchvision, or of timm as timm/<name>
    weights: str | None = None  # of the net: a file, or DEFAULT for ImageNet's, downloaded; None: random
    model_name: str | None = None  # instead of architecture: folder or Hub name of a classifier of transformers
    trust_remote_code: bool = False  # run Python files of the model's folder where it needs them
    num_classes: int | None = None  # checked against the data
    strategy: Literal["full", "head", "gradual", "lora"] = "full"  # all, the head, the head and then more, LoRA
    unfreeze_every: int = 1  # gradual: epochs until the next layer below is trained too
    layer_decay: float = 1.0  # learning rate of a layer relative to the next one above: 0.75, say
    lora_r: int = 16  # lora: rank
    lora_alpha: float = 32.0  # lora: the adapters' scale is lora_alpha / lora_r
    lora_dropout: float = 0.05  # lora: dropout before the adapters
    lora_targets: tuple[str, ...] = ()  # lora: layers with an adapter, or all-linear (default: query and value)
    lora_rank_stabilised: bool = False  # lora: the scale is lora_alpha / sqrt(lora_r) (rsLoRA)
    lora_dora: bool = False  # lora: lengths of the weights' rows are learnt apart (DoRA)
    # -- loss --
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    class_weights: bool = False  # weight each class by the inverse of its frequency
    focal_gamma: float = 0.0  # how strongly confident answers are discounted (focal loss): 2, say
    logit_adjustment: float = 0.0  # rare classes: how strongly frequent ones are held back in training: 1, say
    tta: bool = False  # evaluation averages an image and its mirror image
    # -- distillation --
    teacher: str | None = None  # learn from this classifier too: a run, or a folder; its classes have the same names
    temperature: float = 2.0  # teacher: what the logits of both are divided by, which shows unlikely classes
    distill_alpha: float = 0.5  # teacher: share of what it says in the loss; the labels have the rest
    # -- training --
    trainer_type: Literal["standard", "accelerate", "mixed_precision", "dp"] = "standard"  # dp: private (Opacus)
    epochs: int = 20  # passes over the training images
    max_steps: int | None = None  # stop after this many optimizer steps, even if epochs are left
    batch_size: int = 32  # images per process and micro-batch
    eval_batch_size: int = 64  # images per process in evaluation
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.0  # of matrices; biases and norms have none
    optimizer: OptimizerName = "adamw"  # 8-bit and paged ones come from bitsandbytes
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.999  # decay of the second moment
    adam_epsilon: float = 1e-8  # added to the denominator
    momentum: float = 0.9  # sgd: Nesterov momentum
    scheduler: SchedulerName = "cosine"  # how the learning rate changes over the optimizer steps
    scheduler_patience: int = 5  # plateau: evaluations without improvement before the learning rate drops
    scheduler_step_size: int = 7  # step: epochs between drops of the learning rate
    scheduler_factor: float = 0.5  # plateau, step: factor of each drop of the learning rate
    warmup_steps: float = 0.0  # optimizer steps of linear warm-up; below 1, a share of all steps
    grad_clip: float | None = None  # largest gradient norm, with dp of each image; None: not clipped (dp: 1)
    max_bad_steps: int = 5  # steps in a row without a finite gradient before the run ends
    overfit_batches: int | None = None  # for finding mistakes: train on these first batches alone, in each epoch
    find_lr: bool = False  # range test instead of training: 100 steps, a plot and a suggestion; the run is not touched
    inspect: bool = False  # log a table of the layers, and record the gradient norm of each
    noise_multiplier: float | None = None  # dp: noise standard deviation over grad_clip (default: from target_epsilon)
    target_epsilon: float | None = None  # dp: privacy budget, at which training stops: 3, say
    target_delta: float = 1e-5  # dp: probability that the budget does not hold, less than 1 over the training images
    noise_seed: int | None = None  # dp: for tests; whoever knows it can subtract the noise (default: random, secret)
    ema_decay: float | None = None  # moving average of the weights, which is evaluated instead: 0.999, say
    amp: Literal["auto", "no", "bf16", "fp16"] | None = None  # precision; auto: bf16 where fast (default: launch's)
    compile_model: bool = False  # torch.compile
    deterministic: bool = False  # GPU: only kernels that give the same bits each time; slows convolutions
    channels_last: bool = True  # memory layout in which convolutions are fastest
    best_metric: BestMetric = "accuracy"  # chooses the best weights (of several labels f1_macro, of numbers pearson)
    early_stop: int | None = None  # evaluations without improvement before the run ends
    early_stop_min_delta: float = 0.0  # what counts as an improvement
    eval_every: int = 0  # optimizer steps between evaluations; 0: every epoch
    num_workers: int = 0  # processes that prepare batches
    pin_memory: bool = True  # GPU: page-locked batches, which are copied faster
    seed: int = 42  # of weights, order, augmentation and dropout
    # -- output --
    output_dir: str = "runs"  # folder of the run directories
    run_name: str | None = None  # name of this one (default: data set, model, and what is not left at its default)
    run_prefix: str | None = None  # what the default name begins with
    overwrite: bool = False  # start again where a run of this name exists
    resume: str | None = None  # continue a run: its folder, or no value for the one this command made
    allow_changed_data: bool = False  # resume although the data is not what the checkpoint was made with
    save_every: int = 0  # optimizer steps between checkpoints; 0: every epoch
    keep_checkpoints: int = 2  # checkpoints to keep
    background_save: bool = True  # write checkpoints while training goes on, from a copy in memory
    log_every: int = 50  # optimizer steps between log lines
    report_on_train: bool = False  # score the best weights on the training images too
    report_to: tuple[str, ...] = ("tensorboard",)  # tensorboard, wandb, mlflow, trackio, ...: one, several, or none
    wandb_project: str = "accelerando"  # wandb: project
    wandb_entity: str | None = None  # wandb: user or team
    wandb_name: str | None = None  # wandb: name of the run (default: run_name)
    wandb_group: str | None = None  # wandb: group of runs that belong together
    wandb_tags: tuple[str, ...] = ()  # wandb: tags
    wandb_notes: str | None = None  # wandb: notes
    experiment_name: str = "accelerando"  # experiment or project of the other trackers
    push_to_hub: bool = False  # upload best/ and the report to the Hugging Face Hub
    hub_repo_id: str | None = None  # where to: user/name
    hub_private: bool = True  # make the repository private
    hub_strategy: Literal["end", "every_save"] = "end"  # every_save: also the best weights so far, in the background
    config: tuple[str, ...] = ()  # YAML files with any of these settings; the command line wins


# The guide's spellings that are not everybody's.
ALIASES = {
    "random_erasing": "erasing",
    "resize": "image_size",
    "layer_wise_lr_decay": "layer_decay",
    "amp_dtype": ("amp", {"float16": "fp16", "bfloat16": "bf16", "float32": "no"}),
    "teacher_model": "teacher",
    "alpha": "distill_alpha",
}

# Settings that need a single label of each image.
ONE_LABEL = ("label_smoothing", "class_weights", "focal_gamma", "logit_adjustment", "balanced")
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "lora_rank_stabilised", "lora_dora")
# Settings that matter only together with another one.
ONLY_WITH = {
    "train_file": (
        "validation_file", "test_file", "media_folder", "file_column", "label_column", "label_delimiter",
        "label_columns", "slice_by",
    ),
    "data_dir": ("fold",),
    "cache": ("cache_side", "cache_dir"),
    "strategy gradual": ("unfreeze_every",),
    "strategy lora": LORA,
    "trainer_type dp": ("noise_multiplier", "target_epsilon", "target_delta", "noise_seed"),
    "teacher": ("temperature", "distill_alpha"),
    "not model_name": ("architecture", "weights"),
    "model_name": ("trust_remote_code",),
    "GPU": ("deterministic", "pin_memory"),
}  # fmt: skip

# What is measured, in the order in which it is shown; a metric that `score` adds is shown after these.
METRICS = (
    Metric("loss", in_log=True, higher_is_better=False),
    *(Metric(name, in_log=True) for name in ("accuracy", "f1_macro", "f1_micro")),
    Metric("f1_weighted"),
    *(Metric(name, in_log=True) for name in ("mAP", "subset_accuracy", "pearson", "spearman")),
    *(Metric(name, in_log=True, higher_is_better=False) for name in ("mse", "mae")),
    *map(Metric, ("precision_macro", "precision_micro", "precision_weighted")),
    *map(Metric, ("recall_macro", "recall_micro", "recall_weighted")),
)
# How each kind of target is scored, and by what the best weights may be chosen; the first is the default.
SCORES = {"single_label": classification_metrics, "multi_label": multi_label_metrics, "regression": regression_metrics}
BEST_METRICS = {
    "single_label": ("accuracy", "f1_macro", "f1_weighted", "loss"),
    "multi_label": ("f1_macro", "f1_micro", "mAP", "subset_accuracy", "loss"),
    "regression": ("pearson", "spearman", "mse", "mae", "loss"),
}


# ------------------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """Image files of the splits, the names of classes, labels or numbers, and how images become numbers."""

    splits: dict[str, ImageFiles]  # train, and validation and test if there are any
    label_names: list[str]
    class_counts: torch.Tensor | None  # training images of each class, int64 [C]; None for several labels or numbers
    mean: tuple[float, ...]  # of each colour, 0 to 1
    std: tuple[float, ...]
    collate: ImageCollate
    problem_type: ProblemType = "single_label"
    thresholds: np.ndarray | None = None  # several labels: of each one's probability, [C], once they are chosen
    teacher: Teacher | None = None  # in training alone


def load_data(args: Args, accelerator: Accelerator) -> Data:
    import torch

    args.image_size = args.image_size or own_image_size(args.model_name, args.architecture, args.trust_remote_code)
    if any(not 8 <= size <= args.image_size for size in args.progressive_sizes):
        raise UserError(f"--progressive_sizes: sides from 8 up to --image_size {args.image_size}")
    names, splits, problem_type = open_splits(args)
    args.best_metric = best_metric(args, BEST_METRICS, problem_type)
    for name in ONE_LABEL if problem_type != "single_label" else ():
        if getattr(args, name):
            raise UserError(f"--{name} is for one label an image; these are {problem_type} targets")
    where, noun = args.train_file or args.data_dir, "classes" if problem_type == "single_label" else "outputs"
    if problem_type == "single_label" and len(names) < 2:
        raise UserError(f"{where}: one class, {names[0]}; a classifier needs at least two")
    if args.num_classes not in (None, len(names)):
        raise UserError(f"--num_classes {args.num_classes}, but {where} has {len(names)} {noun}")
    check_validation(args, splits, args.report_on_train)
    if "validation" not in splits and args.validation_fraction:
        images = splits.pop("train")
        kept, held_out = stratified_split(strata(images.classes, problem_type), args.validation_fraction, args.seed)
        splits = {"train": images.take(kept), "validation": images.take(held_out), **splits}
    sizes = ", ".join(f"{split} {len(found):,}" for split, found in splits.items())
    log.info("Images: %s; %d %s: %s", sizes, len(names), noun, ", ".join(names[:12]) + " ..." * (len(names) > 12))
    log.info("Problem type: %s, the best weights by %s", problem_type, args.best_metric)
    if args.cache:
        side = args.cache_side or evaluation_side(args.image_size)
        splits = cached_images(splits, side, cache_folder(args.cache_dir), args.num_workers)
    counts = None
    if problem_type == "single_label":
        counts = torch.bincount(torch.as_tensor(splits["train"].classes), minlength=len(names))
    mean, std = colour_statistics(args.model_name, args.architecture, args.trust_remote_code)
    return Data(splits, names, counts, mean, std, ImageCollate(), problem_type)


def open_splits(args: Args) -> tuple[list[str], dict[str, ImageFiles], ProblemType]:
    """The names of classes, labels or numbers, the images of each split, and what is learned of each image."""
    if args.data_dir and args.train_file:
        raise UserError("--data_dir and --train_file both name the data: drop one")
    if args.train_file:
        named = ("label_column", "label_columns", "label_delimiter", "problem_type")
        columns = {"text_column": args.file_column, **{name: getattr(args, name) for name in named}}
        columns["other_columns"] = args.slice_by
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        tables = {split: read_text_table(file, split=split, **columns) for split, file in files.items() if file}
        tables, problem_type = as_targets(tables, args.problem_type, args.label_column)
        names = label_names(tables["train"])
        targets = {split: encode_labels(table, names) for split, table in tables.items()}
        splits = {split: listed_images(tables[split], args.media_folder, targets[split]) for split in tables}
        return names, splits, problem_type
    folder = Path(args.data_dir)
    if not args.data_dir:
        raise UserError("--data_dir is missing: a folder with raw/<class>/ or train/<class>/, or --train_file a table")
    if args.problem_type not in (None, "single_label"):
        raise UserError(f"--problem_type {args.problem_type}: a class folder gives one label: name a --train_file")
    left_out: list[str] = []
    classes, splits = read_splits(folder, args.fold, lambda name, why: left_out.append(f"{folder / name}: {why}"))
    for line in left_out[:5]:
        log.warning("Left out: %s", line)
    if len(left_out) > 5:
        log.warning("... and %d more", len(left_out) - 5)
    return list(classes), splits, "single_label"


def training_images(args: Args, data: Data) -> TrainingImages:
    """The training images as each epoch augments, mixes and orders them."""
    augmentation = ImageAugmentation(args.crop_scale, args.flip, args.augmentation, args.erasing, data.mean)
    sizes = (*args.progressive_sizes, args.image_size)
    return TrainingImages(
        data.splits["train"], augmentation, sizes, args.epochs, args.seed, args.mixup, args.cutmix, args.balanced
    )


# ------------------------------------------------------------------------------------------------------------ model


def build_model(args: Args, data: Data, accelerator: Accelerator) -> PreTrainedModel:
    import torch

    from accelerando.models.trial import try_image_sizes
    from accelerando.models.vision import VisionNet, VisionNetConfig, load_pretrained

    labels = class_labels(data.label_names) | {"problem_type": PROBLEM_TYPES[data.problem_type]}
    if args.model_name:
        model = open_classifier(args.model_name, args.trust_remote_code, **labels)
        vars(model.config).pop("thresholds", None)  # of the labels that model_name was trained on
    else:
        # Batch norms mix the images of a batch, which leaves no image a gradient of its own.
        group_norm = args.trainer_type == "dp" and args.strategy == "full"
        model = VisionNet(VisionNetConfig(architecture=args.architecture, group_norm=group_norm, **labels))
        if args.weights and args.weights.lower() != "none":
            log.info("%s", load_pretrained(model, args.weights))
    head = head_names(model)
    if args.strategy == "lora":
        lora = (args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets)
        lora = (*lora, args.lora_rank_stabilised, args.lora_dora)
        model = attach_lora(model, *lora, modules_to_save=[name.rstrip(".") for name in head])

    def is_trained(name: str) -> bool:
        if args.strategy == "lora":
            return ".lora_" in name or ".modules_to_save." in name
        return args.strategy != "head" or name.startswith(head)

    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_trained(name)
    if try_image_sizes(model, (*args.progressive_sizes, args.image_size)):
        batches = (args.batch_size, args.gradient_accumulation_steps, accelerator.num_processes)
        check_no_batch_of_one(len(data.splits["train"]), *batches)
    if args.trainer_type == "dp":
        make_valid(model, args.image_size)
    elif accelerator.device.type == "cpu" and not args.compile_model:
        speed_up_dropout(model)
        use_patch_products(model, accelerator.mixed_precision)
    if args.channels_last and not is_sharded(accelerator):
        model = model.to(memory_format=torch.channels_last)
    log_trained(model, f"Strategy {args.strategy}")
    return model


def open_teacher(args: Args, data: Data, accelerator: Accelerator) -> Teacher | None:
    """The classifier that the model learns from, if there is one."""
    if not args.teacher:
        return None
    return open_image_teacher(args.teacher, data.label_names, accelerator, args.trust_remote_code)


def unfreeze(model: PreTrainedModel, args: Args, epoch: int) -> None:
    """Strategy gradual: trains one layer more, counted from the head, every ``unfreeze_every`` epochs."""
    layers = layers_of(model, head_names(model))
    count = min(len(layers), 1 + epoch // args.unfreeze_every)
    train_from(model, layers, count)
    log_trained(model, f"Strategy gradual, the last {count} of {len(layers)} layers")


# ------------------------------------------------------------------------------------------------ loss and evaluation


def compute_loss(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], data: Data, args: Args
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each image, [B], and the logits, [B, C]; of several labels or numbers the mean over them.

    Where two images were mixed, each label has its share. In training with a teacher, what it says of the same image
    has its share of the loss.
    """
    import torch

    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    pixels = normalise(batch["pixel_values"].contiguous(memory_format=layout), data.mean, data.std)
    logits = model(pixel_values=pixels).logits.float()
    if args.tta and not model.training:
        logits = mirrored_mean(logits, model(pixel_values=pixels.flip(-1)).logits.float(), data.problem_type)
    weight = inverse_frequency(data.class_counts).to(logits) if args.class_weights else None
    prior = args.logit_adjustment * log_frequency(data.class_counts).to(logits) if args.logit_adjustment else None

    def loss(labels: torch.Tensor) -> torch.Tensor:
        if data.problem_type == "multi_label":
            binary = torch.nn.functional.binary_cross_entropy_with_logits
            return binary(logits, labels, reduction="none").mean(dim=1)
        if data.problem_type == "regression":
            return torch.nn.functional.mse_loss(logits, labels, reduction="none").mean(dim=1)
        return class_losses(logits, labels, weight, args.label_smoothing, args.focal_gamma, prior)

    losses = mixed_loss(loss, batch)
    if data.teacher and model.training:
        lesson = data.teacher.of_images(batch["pixel_values"])
        losses = distilled(losses, logits, lesson.logits, args.distill_alpha, args.temperature, data.problem_type)
    return losses, logits


def evaluate(model: torch.nn.Module, data: Data, split: str, run: Run, args: Args) -> dict[str, np.ndarray]:
    """Labels [n] (of several labels or numbers [n, C]), logits [n, C], losses [n] and row [n] of every image once, in
    order, without the unreadable ones."""
    import torch

    dataset = EvaluationImages(data.splits[split], args.image_size)
    rows = EvaluationRows(run, model, dataset, data.collate, args.eval_batch_size, split, num_workers=args.num_workers)
    model.eval()
    with torch.no_grad():
        for batch in rows:
            losses, logits = compute_loss(model, batch, data, args)
            rows.add(labels=batch["labels"], logits=logits, losses=losses, valid=batch["valid"])
    return rows.gathered_readable()


def score(found: dict[str, np.ndarray], data: Data, split: str, args: Args) -> dict[str, float]:
    """The metrics of what :func:`evaluate` found."""
    metrics = SCORES[data.problem_type](found["labels"], found["logits"], found["losses"])
    return metrics | tuned_metrics(found["labels"], found["logits"], data.thresholds)


# ----------------------------------------------------------------------------------------------------------- output

USAGE = """
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.image_utils import load_image

import accelerando.models.vision  # makes transformers know this model

model = AutoModelForImageClassification.from_pretrained("{folder}").eval()
processor = AutoImageProcessor.from_pretrained("{folder}")
logits = model(**processor(load_image("image.jpg"), return_tensors="pt")).logits
print({answer})
"""
ANSWERS = {
    "single_label": "model.config.id2label[logits.argmax().item()]",
    "multi_label": "logits.sigmoid()",
    "regression": "logits",
}


def write_beside_weights(folder: Path, run: Run, data: Data, args: Args) -> None:
    """What stands beside the saved weights: image processor and model card."""
    write_image_processor(folder, args.image_size, data.mean, data.std)
    usage = USAGE.format(folder=run.directory / "best", answer=ANSWERS[data.problem_type])
    write_model_card(folder, run, "image-classification", args.model_name, usage, data_title(args))


def show_classes(run: Run, data: Data, found: Found, last: str) -> target_reports.Shown:
    """Of one label an image: reports of all splits; of ``last`` confusion matrix and the most confident mistakes."""
    matrices, rows = results.write_class_reports(run, found, data.label_names), found[last]
    calibration, calibrated = results.write_calibration(run, found, last)
    details = {"label_names": data.label_names, "confusion_matrix": matrices[last].tolist(), "calibration": calibration}
    images, labels = data.splits[last].take(rows["row"]), [data.label_names[label] for label in rows["labels"]]
    columns = columns_of_files(images.names.to_pylist(), labels, images.others)
    slices = slices_block(rows["logits"].argmax(axis=1) == rows["labels"], columns, last)
    blocks = [*results.class_blocks(matrices[last], data.label_names, last), *calibrated, *slices]
    return details, blocks, worst_mistakes(rows["labels"], rows["logits"], data.label_names)


def write_report(run: Run, model: torch.nn.Module, data: Data, found: Found, args: Args) -> None:
    """Results and report of the best weights; ``found``: what :func:`evaluate` found in each split. Main process."""
    one_label = data.problem_type == "single_label"
    if data.problem_type == "multi_label" and "validation" in found:
        data.thresholds = best_thresholds(found["validation"]["labels"], found["validation"]["logits"])
        target_reports.keep_thresholds(run.directory / "best", data.label_names, data.thresholds)
    metrics = {split: score(rows, data, split, args) for split, rows in found.items()}
    last = results.split_to_show(found)
    if one_label:
        details, blocks, worst = show_classes(run, data, found, last)
    elif data.problem_type == "multi_label":
        details, blocks, worst = target_reports.show_labels(run, found, last, data.label_names, data.thresholds)
    else:
        details, blocks, worst = target_reports.show_numbers(run, found, last, data.label_names)
    for split, rows in found.items():
        files = [data.splits[split].names[row].as_py() for row in rows["row"].tolist()]
        path = run.directory / f"predictions_{split}.csv"
        if one_label:
            write_predictions(path, files, data.label_names, probabilities(rows["logits"]), rows["labels"])
        else:
            kind = (data.label_names, data.problem_type, data.thresholds)
            target_reports.write_target_predictions(path, files, rows["logits"], *kind, rows["labels"])
    for mistake in worst:
        mistake["text"] = data.splits[last].names[int(found[last]["row"][mistake["row"]])].as_py()
    net = None
    if one_label:  # what it looked at; one process alone cannot ask a sharded net
        sharded = is_sharded(run.accelerator)
        net = open_classifier(str(run.directory / "best")) if sharded else unwrapped(run.accelerator, model)
    add_images(worst, found[last], EvaluationImages(data.splits[last], args.image_size), net, data.mean, data.std)
    counts = {split: len(rows["labels"]) for split, rows in found.items()}
    privacy = privacy_results(run.state, args.target_delta)
    results.write_results(run, model, metrics, counts, details | privacy)
    first, second = BEST_METRICS[data.problem_type][:2]
    shown = args.best_metric if args.best_metric != "loss" else first  # the loss has curves of its own
    outputs = f"{len(data.label_names)} {'classes' if one_label else 'outputs'}"
    tiles = results.metric_tiles(metrics[last], {first: f"{counts[last]:,} images", second: outputs}, last)
    if privacy:
        tiles.append(("epsilon spent", f"{privacy['epsilon']:.3f}", f"at delta {privacy['delta']:g}"))
    blocks.append(page.mistakes(worst, title=f"Worst mistakes, {last}"))
    best = "min" if shown in ("mse", "mae") else "max"
    curves = results.training_curves(shown, {f"validation/{shown}": "validation"}, best)
    path = results.write_page(run, f"Image classification: {data_title(args)}", tiles, metrics, curves, blocks)
    log.info("Summary\n%s", results.write_summary(run, metrics, privacy_notes(run.state, args.target_delta)))
    log.info("Report: %s", path)


# ------------------------------------------------------------------------------------------------------------- main


def check_args(args: Args) -> None:
    """What can be wrong before anything is loaded; what trainer_type stands for."""
    check_trackers(args.report_to)
    check_push(args.push_to_hub, args.hub_repo_id)
    check_ranges(
        args, ema_decay=(0, 0.9999999), validation_fraction=(0, 0.9), fold=(0, 9999), image_size=(8, 4096),
        crop_scale=(0.001, 1), flip=(0, 1), erasing=(0, 1), cache_side=(8, 16384), mixup=(0, 100), cutmix=(0, 100),
        label_smoothing=(0, 0.999), focal_gamma=(0, 100), logit_adjustment=(0, 100), num_classes=(1, 2**20),
        unfreeze_every=(1, 2**20), layer_decay=(0.001, 1), temperature=(0.01, 1000), distill_alpha=(0, 1),
        noise_multiplier=(0, 1000), target_epsilon=(1e-6, 1e6), target_delta=(1e-30, 0.999), noise_seed=(0, 2**62),
    )  # fmt: skip
    if args.label_delimiter is not None and (args.label_columns or not args.label_delimiter):
        raise UserError(
            "--label_delimiter: the sign between labels in a cell; --label_columns has none, drop one of them"
        )
    if args.model_name and args.weights:
        raise UserError("--weights are those of --architecture; --model_name brings its own: drop one")
    if args.layer_decay < 1 and args.strategy in ("head", "lora"):
        raise UserError(f"--layer_decay: --strategy {args.strategy} trains no layers as a whole: full or gradual do")
    if args.trainer_type == "mixed_precision":
        if args.amp == "no":
            raise UserError("--trainer_type mixed_precision and --amp no contradict each other: drop one")
        args.amp = args.amp or "auto"
    if args.teacher:
        teacher_folder(args.teacher)
    if args.trainer_type == "dp":
        check_private(args)


def check_private(args: Args) -> None:
    """What cannot go with differential privacy, and what it needs."""
    require_opacus()
    others = {
        "mixup and --cutmix": (args.mixup or args.cutmix, "an image would be in the gradient of others too"),
        "balanced": (args.balanced, "the accounting needs each image drawn with the same probability"),
        "overfit_batches": (args.overfit_batches, "the accounting needs each image drawn with the same probability"),
        "class_weights": (args.class_weights, "they tell the numbers of images without noise"),
        "logit_adjustment": (args.logit_adjustment, "it tells the numbers of images without noise"),
        "teacher": (args.teacher, "what it has learned of the images is not accounted for"),
        "strategy lora": (args.strategy == "lora", "adapters have not been tried with it: full or head"),
        "strategy gradual": (args.strategy == "gradual", "what is trained has to stay the same: full or head"),
        "amp": (args.amp not in (None, "no"), "gradients of single images are computed in float32"),
        "compile_model": (args.compile_model, "the hooks for gradients of single images are not compiled"),
        "progressive_sizes": (args.progressive_sizes, "one size was checked"),
        "allow_changed_data": (args.allow_changed_data, "the privacy budget was spent on the previous images"),
        "report_on_train": (args.report_on_train, "it tells of the training images without noise"),
        f"resume {args.resume}": (Path(args.resume or "").name.startswith("step_"),
                                  "steps that are given up would not be counted; it goes on from the newest"),
    }  # fmt: skip
    for flag, (given, why) in others.items():
        if given:
            raise UserError(f"--{flag} cannot go with --trainer_type dp: {why}")
    if args.noise_multiplier is None and args.target_epsilon is None:
        raise UserError("--trainer_type dp needs a budget, such as --target_epsilon 3, or --noise_multiplier")
    args.amp, args.grad_clip, args.channels_last = "no", args.grad_clip or 1.0, False


def check_private_data(args: Args, data: Data, accelerator: Accelerator) -> None:
    """What differential privacy needs of the launch and of the number of images."""
    if is_sharded(accelerator):
        raise UserError("--trainer_type dp needs whole parameters: launch without FSDP")
    if not args.resume:
        batch = args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        budget = (args.noise_multiplier, args.target_epsilon, args.target_delta)
        check_budget(batch, len(data.splits["train"]), args.epochs, args.max_steps, *budget)


def data_title(args: Args) -> str:
    """A short name of the data: what it was called, or the name of its folder or table."""
    table = Path(args.train_file or "")
    if args.train_file and table.stem not in ("train", "training"):
        return args.dataset_name or table.stem
    return args.dataset_name or (table.parent if args.train_file else Path(args.data_dir)).absolute().name or "data"


def model_title(args: Args) -> str:
    """A short name of the model."""

    return short_name(args.model_name) if args.model_name else args.architecture.replace("/", "-")


def default_name(args: Args) -> str:
    """The run directory's name: what distinguishes runs that are likely to be compared."""
    fold = (f"fold{args.fold}",) if args.data_dir and (Path(args.data_dir) / "splits").is_dir() else ()
    settings = (args.strategy, f"bs{args.batch_size}", f"lr{args.lr:g}", *fold, f"seed{args.seed}")
    named = ("architecture", "model_name", "strategy", "batch_size", "lr", "fold", "seed")
    return default_run_name(args, data_title(args), model_title(args), *settings, named=named)


def main() -> None:
    args = parse_args(Args, ALIASES)
    check_args(args)
    directory = choose_directory(args, default_name(args))

    # Data, model and the run's folder.
    private = args.trainer_type == "dp"
    changing = args.strategy == "gradual"  # which parameters are trained changes with the epochs
    accelerator = make_accelerator(args.seed, args.amp, args.deterministic, changing)
    data = load_data(args, accelerator)
    if private:
        check_private_data(args, data, accelerator)
    model = build_model(args, data, accelerator)
    data.teacher = open_teacher(args, data, accelerator)
    sources = {**data.splits, **({"teacher": data.teacher} if data.teacher else {})}
    run = start_run(accelerator, args, directory, METRICS, model_title(args), sources, {"label": data.label_names})
    for line in without_effect(args, ONLY_WITH, GPU=accelerator.device.type == "cuda"):
        log.warning("%s", line)

    # What an optimizer step trains on: the same samples on any number of processes.
    batches = TrainBatches(
        training_images(args, data), data.collate, args.batch_size, args.gradient_accumulation_steps, args.seed,
        num_workers=args.num_workers, accelerator=accelerator, pin_memory=args.pin_memory,
    )  # fmt: skip
    plan_steps(run, batches)

    # Optimizer, schedule, averages; then back to where a resumed run was.
    layers = layers_of(model, head_names(model)) if args.layer_decay < 1 else ()
    optimizer = make_optimizer(
        model, args.optimizer, args.lr, args.weight_decay, (args.adam_beta1, args.adam_beta2), args.adam_epsilon,
        args.momentum, is_sharded(accelerator), layers, args.layer_decay,
    )  # fmt: skip
    plain, max_norm = model, args.grad_clip or float("inf")
    if private:  # adds up over processes by itself, and clips the gradient of each image
        model, optimizer = model.to(accelerator.device), accelerator.prepare(optimizer)
        budget = (args.noise_multiplier, args.noise_seed, args.target_epsilon, args.target_delta)
        privacy = start_privacy(run, model, optimizer.optimizer, batches, args.grad_clip, *budget)
        max_norm = float("inf")
    else:
        model, optimizer = prepare(accelerator, model, optimizer, args.compile_model, dynamic=None)
    schedule = make_scheduler(
        optimizer.optimizer, args.scheduler, run.total_steps, args.warmup_steps, args.scheduler_factor,
        args.scheduler_patience, run.higher_is_better, args.scheduler_step_size * batches.num_windows(),
    )  # fmt: skip
    ema = Ema(optimizer, args.ema_decay)
    if changing and run.resumed:  # an optimizer state belongs to parameters that are trained
        unfreeze(plain, args, run.state.epoch)
    restore(run, model, optimizer, schedule, ema)
    hub = Hub(run, args)

    def save_weights(name: str) -> None:
        save_model_folder(
            accelerator, model, directory / name, lambda folder: write_beside_weights(folder, run, data, args),
            outputs=lambda saved: compute_loss(saved, first_batch(batches.dataset, data.collate), data, args)[1],
        )  # fmt: skip

    def checkpoint() -> Path:
        hub.push_soon()
        return save(run, model, optimizer, schedule, ema)

    def validate() -> None:
        """Scores the validation images, and keeps the weights in best/ if they are the best so far."""
        metrics = {}  # without validation images the last weights count
        with averaged(ema):
            if "validation" in data.splits:
                found = evaluate(model, data, "validation", run, args)
                metrics = score(found, data, "validation", args)
                metrics |= {"epsilon": privacy.epsilon} if private else {}
            if record_evaluation(run, metrics, schedule):
                save_weights("best")
        results.write_summary(run, {"validation": metrics}, privacy_notes(run.state, args.target_delta))

    with stoppable(run, on_stop=checkpoint):
        if evaluation_is_due(run):
            validate()
            if run.is_over:
                checkpoint()
        for window in training_steps(run, batches):
            if changing and window.starts_epoch:
                unfreeze(plain, args, run.state.epoch)
            train_mode(model)
            for batch in window:  # the micro-batches of one optimizer step
                with window.sync(model):
                    losses, _ = compute_loss(model, batch, data, args)
                    window.backward(losses, batch["weight"], mean=not private)
                if private:
                    clip_and_add(privacy, last=window.at_last)
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
            if not private and step_is_repeated(run, window, grad_norm):
                continue  # without the samples whose gradient is infinite or NaN
            optimizer.step()
            schedule.step(skipped=accelerator.optimizer_step_was_skipped)
            optimizer.zero_grad()
            ema.update()
            step = finish_step(run, window, grad_norm, schedule.lr)
            if step.evaluates:
                validate()
            if step.saves:
                checkpoint()

    # The last weights are saved, the best ones scored.
    save_weights("last")
    load_trained_weights(accelerator, model, directory / "best")
    splits = ("validation", "test", *(["train"] if args.report_on_train else []))
    with stoppable(run):
        found = {split: evaluate(model, data, split, run, args) for split in splits if split in data.splits}
    if accelerator.is_main_process:
        write_report(run, model, data, found, args)
    finish_run(run)
    hub.push_at_end()


if __name__ == "__main__":
    with errors_in_one_line():
        main()
