# /// script
# requires-python = ">=3.11"
# dependencies = ["accelerando"]
# ///
"""Fine-tune CLIP (or SigLIP) on pairs of image and caption, with a contrastive batch of any size.

Pairs come from WebDataset shards (a folder, a brace pattern, s3://) or from a folder of images and a table of captions;
see data/README.md. The loss is taken over the whole effective batch: embeddings are gathered from all processes and all
micro-batches (GradCache), so 1,024 pairs in micro-batches of 64 have 1,023 negatives each, on one process or many. The
weights that are best on the validation pairs are scored on the test pairs, beside the untrained base model.

The model is a pretrained CLIP, a small one from nothing, or two towers that were pretrained apart (--image_model,
--text_model), of which one may stay locked.

  accelerate launch --config_file accelerate_configs/cpu.yaml scripts/clip_finetune.py --config configs/demo/clip.yaml
  ... the same with accelerate_configs/multi_gpu.yaml (DDP) or accelerate_configs/fsdp.yaml (FSDP2)
  python scripts/clip_finetune.py --config configs/demo/clip.yaml    (one process, some seconds sooner)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from accelerando.base.config import check_ranges, parse_args, without_effect
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import cache_folder
from accelerando.base.log import log
from accelerando.base.model_folder import read_json
from accelerando.base.processes import main_process_first
from accelerando.base.texts import without_credentials
from accelerando.data.collate import PairCollate
from accelerando.data.pairs import (
    Captions,
    Gallery,
    ImageFeatures,
    PairDataset,
    PairSource,
    PairSubset,
    bucket_locations,
    captions,
    class_names_of,
    hold_out_images,
    image_classes,
    make_gallery,
    open_pairs,
    split_locations,
)
from accelerando.data.table_formats import table_suffix
from accelerando.data.transforms import AugmentationName, normalise
from accelerando.inference.hub import Hub, check_push
from accelerando.models import clip
from accelerando.models.cpu import speed_up_dropout, use_eager_attention, use_patch_products
from accelerando.models.pretrained import add_embeddings
from accelerando.report import page, results
from accelerando.report.metrics import contrastive_metrics, retrieval_metrics, zero_shot_metrics
from accelerando.report.model_card import write_model_card
from accelerando.report.retrieval import example_rows, keep_examples, retrieval_examples
from accelerando.train.accelerator import (
    is_sharded,
    log_trained,
    log_trained_parts,
    make_accelerator,
    prepare,
    unwrapped,
)
from accelerando.train.autotune import find_micro_batch_size
from accelerando.train.averages import Ema, averaged, mix_weights, trained_weights
from accelerando.train.batches import TrainBatches, first_batch, report_unreadable
from accelerando.train.evaluation import EvaluationRows, check_validation
from accelerando.train.features import weights_digest
from accelerando.train.gradients import step_is_repeated
from accelerando.train.layerwise import below_last, part_factors, train_mode
from accelerando.train.loop import evaluation_is_due, finish_step, plan_steps, record_evaluation, training_steps
from accelerando.train.lora import attach_lora, is_lora
from accelerando.train.losses import Embedded, LossName, Pairs, backward_contrastive, clamp_logit_scale
from accelerando.train.optim import OptimizerName, SchedulerName, make_optimizer, make_scheduler
from accelerando.train.pair_features import cached_image_features
from accelerando.train.run import (
    choose_directory,
    default_run_name,
    finish_run,
    keep_choice,
    restore,
    save,
    short_name,
    start_run,
)
from accelerando.train.state import Metric, Run
from accelerando.train.stop import stoppable
from accelerando.train.trackers import check_trackers
from accelerando.train.tracking import as_floats, record
from accelerando.train.weights import load_trained_weights, save_model_folder

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel


Scenario = Literal["zero_shot", "linear_probe", "dual_lora", "vision_lora", "text_lora", "full"]


@dataclass
class Args:
    # -- data --
    train_data: str | None = None  # shards (folder, a/{00..09}.tar, s3://...) or a table of captions
    validation_data: str | None = None  # the same, for choosing the best weights
    test_data: str | None = None  # the same, scored once at the end with the best weights
    validation_fraction: float = 0.1  # share of the training pairs held out, by image, without others; 0: none
    data_dir: str | None = None  # instead of the three: a folder with train/, validation/ (or val/) and test/
    image_folder: str | None = None  # tables: folder of the images
    image_column: str = "image"  # tables: column of the image file
    caption_column: str = "caption"  # tables: column of the caption
    s3_bucket: str | None = None  # instead of train_data: an S3 bucket with shards
    s3_prefix: str = "data/train"  # s3: where the training shards are; validation: the same with val for train
    s3_validation_prefix: str | None = None  # s3: where the validation shards are
    cache_dir: str | None = None  # indexes and fetched shards (default: $ACCELERANDO_CACHE or ~/.cache/accelerando)
    cache_gb: float = 50.0  # cached remote shards, in GB; 0: none, each pair is read remotely
    mini_train: bool = False  # 256 training and 128 validation pairs, for a quick look
    augmentation: AugmentationName = "simple"  # of training images: none, simple (flip, crop), advanced
    class_field: str | None = None  # zero-shot classification: field of the .json with an image's class
    class_names: tuple[str, ...] = ()  # zero-shot classification: the classes (default: those of the validation set)
    class_templates: tuple[str, ...] = ("a photo of a {}.",)  # zero-shot classification: captions of a class
    max_length: int | None = None  # tokens kept of a caption (default: what the model can take)
    dataset_version: str | None = None  # tag or revision of the data, kept with the results: v1.2, say
    # -- model --
    model_name: str = "openai/clip-vit-base-patch32"  # pretrained: folder or Hub name, of a LoRA adapter too
    image_model: str | None = None  # two towers: timm/<name>, a net of torchvision, or an encoder's folder or Hub name
    text_model: str | None = None  # two towers: folder or Hub name of a text encoder
    image_weights: str | None = None  # two towers: of the image net: a file, or DEFAULT for ImageNet's, downloaded
    text_pooling: Literal["mean", "cls", "pooler"] | None = None  # two towers: of tokens (default: its own, or mean)
    projection: Literal["linear", "mlp"] = "linear"  # two towers: from a tower to the embeddings
    adapter: str | None = None  # pretrained: LoRA adapter that is merged into model_name first
    trust_remote_code: bool = False  # run Python files of the model's folder where it needs them
    from_scratch: bool = False  # random weights in the shape that follows, tokenizer trained on the captions
    image_size: int = 224  # from scratch: pixels of a side
    patch_size: int = 32  # from scratch: pixels of a patch
    vision_width: int = 768  # from scratch: width of the image tower
    vision_layers: int = 12  # from scratch: its layers
    text_width: int = 512  # from scratch: width of the text tower
    text_layers: int = 12  # from scratch: its layers
    projection_dim: int = 512  # from scratch, two towers: width of the embeddings
    vocab_size: int = 8192  # from scratch: size of the vocabulary that is trained
    attention_dropout: float | None = None  # dropout of attention weights (default: the model's own)
    scenario: Scenario = "dual_lora"  # what is trained
    lora_r: int = 16  # lora: rank
    lora_alpha: float = 32.0  # lora: the adapters' scale is lora_alpha / lora_r
    lora_dropout: float = 0.05  # lora: dropout before the adapters
    lora_targets: tuple[str, ...] = ()  # lora: layers with an adapter, or all-linear (default: query and value)
    lora_rank_stabilised: bool = False  # lora: the scale is lora_alpha / sqrt(lora_r) (rsLoRA)
    lora_dora: bool = False  # lora: lengths of the weights' rows are learnt apart (DoRA)
    lock_image_tower: bool = False  # full: the image tower is frozen (LiT)
    lock_text_tower: bool = False  # full: the text tower is frozen
    image_blocks: int | None = None  # full: only the last blocks of the image tower are trained: 2, say
    text_blocks: int | None = None  # full: only the last blocks of the text tower are trained
    cache_features: bool = True  # what a frozen image tower computes of images without augmentation is computed once
    train_logit_scale: bool | None = None  # train the temperature (default: with full, and with siglip)
    logit_scale_init: float | None = None  # start the temperature's factor here (default: the model's, 100 for CLIP)
    logit_bias_init: float = -10.0  # siglip: bias of the logits, for a model without one
    # -- training --
    epochs: int = 10  # passes over the training pairs
    max_steps: int | None = None  # stop after this many optimizer steps, even if epochs are left
    effective_batch_size: int = 1024  # pairs of one contrastive batch, over all processes: one optimizer step
    micro_batch_size: int = 0  # pairs that a process computes at once; 0: the most that fit
    eval_batch_size: int = 64  # images or captions per process in evaluation
    loss_batch_size: int = 64  # pairs of one contrastive batch in the validation loss, on any number of processes
    loss: LossName = "clip"  # softmax over the batch (clip) or sigmoid of each pair (siglip)
    mask_duplicates: bool = True  # duplicates of a caption or image in a batch are no negatives
    lr: float = 1e-4  # peak learning rate
    image_lr: float | None = None  # of the image tower (default: lr)
    text_lr: float | None = None  # of the text tower (default: lr)
    layer_decay: float = 1.0  # learning rate of a tower's layer relative to the next one above: 0.75, say
    weight_decay: float = 0.1  # of matrices; biases, norms and the temperature have none
    optimizer: OptimizerName = "adamw"  # 8-bit and paged ones come from bitsandbytes
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.98  # decay of the second moment
    adam_epsilon: float = 1e-6  # added to the denominator
    momentum: float = 0.9  # sgd: Nesterov momentum
    scheduler: SchedulerName = "onecycle"  # how the learning rate changes over the optimizer steps
    scheduler_patience: int = 2  # plateau: evaluations without improvement before the learning rate drops
    scheduler_step_size: int = 7  # step: epochs between drops of the learning rate
    scheduler_factor: float = 0.5  # plateau, step: factor of each drop of the learning rate
    warmup_steps: float = 100.0  # optimizer steps of warm-up; below 1, a share of all steps
    grad_clip: float | None = 1.0  # largest gradient norm; None: not clipped
    max_bad_steps: int = 5  # steps in a row without a finite gradient before the run ends
    overfit_batches: int | None = None  # for finding mistakes: train on these first batches alone, in each epoch
    find_lr: bool = False  # range test instead of training: 100 steps, a plot and a suggestion; the run is not touched
    inspect: bool = False  # log a table of the layers, and record the gradient norm of each
    ema_decay: float | None = None  # moving average of the weights, which is evaluated instead: 0.999, say
    amp: Literal["auto", "no", "bf16", "fp16"] | None = None  # precision; auto: bf16 where fast (default: launch's)
    compile_model: bool = False  # torch.compile
    deterministic: bool = False  # GPU: only kernels that give the same bits each time; slows convolutions
    activation_checkpointing: bool = False  # recompute activations to save memory
    best_metric: Literal["loss", "recall_mean"] = "loss"  # chooses the best weights
    early_stop: int | None = 2  # evaluations without improvement before the run ends
    early_stop_min_delta: float = 0.001  # what counts as an improvement
    eval_every: int = 0  # optimizer steps between evaluations; 0: every epoch
    wise_ft: tuple[float, ...] = ()  # at the end, score mixtures of old (0) and new (1) weights: 0 0.25 0.5 0.75 1
    num_workers: int = 4  # processes that prepare batches
    pin_memory: bool = True  # GPU: page-locked batches, which are copied faster
    seed: int = 42  # of weights, order, augmentation and dropout
    # -- output --
    output_dir: str = "runs"  # folder of the run directories
    run_name: str | None = None  # name of this one (default: data set, model, and what is not left at its default)
    run_prefix: str | None = None  # what the default name begins with
    overwrite: bool = False  # start again where a run of this name exists
    resume: str | None = None  # continue a run: its folder, or no value for the one this command made
    allow_changed_data: bool = False  # resume although the data is not what the checkpoint was made with
    enable_s3_checkpoints: bool = False  # store checkpoints in the bucket too, and resume from there
    s3_checkpoint_prefix: str = "checkpoints"  # s3: where in the bucket
    save_every: int = 0  # optimizer steps between checkpoints; 0: every epoch
    keep_checkpoints: int = 2  # checkpoints to keep
    background_save: bool = True  # write checkpoints while training goes on, from a copy in memory
    log_every: int = 10  # optimizer steps between log lines
    report_on_train: bool = False  # score the best weights on the training pairs too
    report_to: tuple[str, ...] = ("tensorboard",)  # tensorboard, wandb, mlflow, trackio, ...: one, several, or none
    wandb_project: str = "clip-furniture-finetune"  # wandb: project
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


# Other spellings, the guide's and the shared ones.
ALIASES = {
    "batch_size": "micro_batch_size",
    "train_file": "train_data",
    "validation_file": "validation_data",
    "test_file": "test_data",
    "val_data": "validation_data",
    "strategy": "scenario",
}

LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "lora_rank_stabilised", "lora_dora")
# Settings that matter only together with another one.
ONLY_WITH = {
    "from_scratch": ("image_size", "patch_size", "vision_width", "vision_layers", "text_width", "text_layers",
                     "vocab_size"),
    "not from_scratch": ("model_name", "adapter", "trust_remote_code"),
    "image_model": ("image_weights", "text_pooling", "projection"),
    "not image_model": ("model_name", "adapter"),
    "scenario full": ("lock_image_tower", "lock_text_tower", "image_blocks", "text_blocks"),
    "scenario dual_lora vision_lora text_lora": LORA,
    "loss siglip": ("logit_bias_init",),
    "class_field": ("class_names", "class_templates"),
    "s3_bucket": ("s3_prefix", "s3_validation_prefix", "s3_checkpoint_prefix"),
    "tables": ("image_folder", "image_column", "caption_column"),
    "GPU": ("deterministic", "pin_memory"),
}  # fmt: skip

# What is measured, in the order in which it is shown; a metric that `score` adds is shown after these.
METRICS = (
    Metric("loss", in_log=True, higher_is_better=False),
    *(Metric(f"{way}_r{k}", in_log=k == 1) for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
    Metric("recall_mean"),
    *(Metric(f"{way}_median_rank", ".1f", higher_is_better=False) for way in ("image_to_text", "text_to_image")),
    *map(Metric, ("zero_shot_accuracy", "zero_shot_top5")),
)


# ------------------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """Pairs of the splits, what their galleries are, and what turns images and captions into tensors."""

    splits: dict[str, PairSource]  # train, and validation and test if there are any
    galleries: dict[str, Gallery]  # of those that are scored
    classes: dict[str, np.ndarray]  # the same, where class_field is given: the class of each image
    class_names: list[str]
    preprocessing: clip.Preprocessing
    collate: PairCollate
    features: dict[str, ImageFeatures]  # of a frozen image tower, where there are any: see keep_image_features


def load_data(args: Args, accelerator: Accelerator) -> Data:
    with main_process_first(accelerator):  # which makes indexes and fetches what is remote
        cache = cache_folder(args.cache_dir)
        table = (args.image_folder, args.image_column, args.caption_column)
        splits = {split: open_pairs(where, cache, args.cache_gb, *table) for split, where in locations(args).items()}
        if args.mini_train:
            most = {"train": 256, "validation": 128, "test": 128}
            rows = {split: np.arange(min(len(pairs), most[split])) for split, pairs in splits.items()}
            splits = {split: PairSubset(pairs, rows[split]) for split, pairs in splits.items()}
        if args.scenario != "zero_shot":
            check_validation(args, splits, args.report_on_train)
        if "validation" not in splits and args.validation_fraction:
            train, held_out = hold_out_images(splits.pop("train"), args.validation_fraction, args.seed)
            splits = {"train": train, "validation": held_out, **splits}
        if args.wise_ft and "validation" not in splits:
            raise UserError("--wise_ft scores mixtures on validation data, but --validation_fraction 0 leaves none")
        scored = [split for split in splits if split != "train" or args.report_on_train]
        galleries = {split: make_gallery(splits[split], split) for split in scored}
        if args.from_scratch:
            texts = captions(splits["train"])
            preprocessing = clip.make_preprocessing(texts, args.vocab_size, args.image_size, args.max_length or 77)
        elif args.image_model:
            towers = (args.image_model, args.text_model)
            preprocessing = clip.tower_preprocessing(*towers, args.max_length, args.trust_remote_code)
        else:
            preprocessing = clip.open_preprocessing(args.model_name, args.max_length, args.trust_remote_code)
    classes, names = {}, list(args.class_names)
    if args.class_field:
        images = {split: gallery.image_rows for split, gallery in galleries.items()}
        first = next(split for split in ("validation", "test", "train") if split in galleries)
        names = names or class_names_of(splits[first], images[first], args.class_field)
        classes = {split: image_classes(splits[split], images[split], args.class_field, names) for split in images}
    for split, pairs in splits.items():
        gallery = galleries.get(split)
        if gallery is None and args.scenario == "zero_shot":
            continue
        unique = f", {len(gallery.image_rows):,} images and {len(gallery.text_rows):,} captions" if gallery else ""
        log.info("Pairs for %s: %s%s", split, f"{len(pairs):,}", unique)
    multiple = 8 if args.compile_model else 1
    collate = PairCollate(preprocessing.tokenizer, preprocessing.max_length, multiple, preprocessing.full_length)
    return Data(splits, galleries, classes, names, preprocessing, collate, {})


def locations(args: Args) -> dict[str, str]:
    """Where the pairs of each split are: named one by one, in a bucket, or in the folders of data_dir."""
    named = {"train": args.train_data, "validation": args.validation_data, "test": args.test_data}
    if args.s3_bucket and args.data_dir and not args.train_data:
        raise UserError("--data_dir and --s3_bucket both name the data: drop one (or name --train_data as well)")
    if args.s3_bucket and not args.train_data:
        named |= bucket_locations(args.s3_bucket, args.s3_prefix, args.s3_validation_prefix, args.validation_data)
    else:
        named = split_locations(args.data_dir, named)
    if args.scenario == "zero_shot":  # which trains on none
        named["train"] = named["train"] or named["validation"]
    if not named["train"]:
        raise UserError(
            "--train_data is missing: a folder of shards, a URL or a table of captions; tools/make_shards.py packs and "
            "splits images and captions"
        )
    return {split: where for split, where in named.items() if where}


def training_pairs(args: Args, data: Data) -> PairDataset:
    """The training pairs as each epoch augments them; a frozen image tower sees the images of evaluation."""
    frozen = args.lock_image_tower if args.scenario == "full" else args.scenario in ("linear_probe", "text_lora")
    transform = data.preprocessing.transform(args.augmentation, exact=frozen and args.augmentation == "none")
    return PairDataset(data.splits["train"], transform, args.seed, features=data.features.get("train"))


# ------------------------------------------------------------------------------------------------------------ model

TOWERS = ("vision_model", "text_model")
PROJECTIONS = ("visual_projection", "text_projection")


def build_model(args: Args, data: Data, accelerator: Accelerator) -> PreTrainedModel:
    from accelerando.models.towers import make_two_towers, use_fast_layout

    on_cpu = accelerator.device.type == "cpu" and not args.compile_model
    if args.from_scratch:
        shape = (args.image_size, args.patch_size, args.vision_width, args.vision_layers, args.text_width,
                 args.text_layers, args.projection_dim, data.preprocessing.max_length)  # fmt: skip
        model = clip.make_clip_model(data.preprocessing.tokenizer, *shape, args.attention_dropout or 0.0)
    else:
        if args.image_model:
            towers = (args.image_model, args.text_model, args.image_weights, args.text_pooling)
            model = make_two_towers(*towers, args.projection, args.projection_dim, args.trust_remote_code)
        else:
            model = clip.open_clip_model(args.model_name, args.adapter, args.attention_dropout, args.trust_remote_code)
        clip.check_image_size(model, data.preprocessing)
        add_embeddings(model, data.preprocessing.tokenizer)
    if not is_sharded(accelerator):
        use_fast_layout(model)
    clip.make_trainable_scale(model, args.logit_scale_init, args.logit_bias_init if args.loss == "siglip" else None)
    if on_cpu:
        longest = clip.tokens_at_most(model, data.preprocessing.max_length)
        use_eager_attention(model, accelerator.mixed_precision, longest)
        use_patch_products(model, accelerator.mixed_precision)
    if args.activation_checkpointing:
        model.activation_checkpointing_enable()
    clip.embed_in_forward(model)
    lora = (args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets)
    lora = (*lora, args.lora_rank_stabilised, args.lora_dora)
    if args.scenario == "dual_lora":
        projections = [name for name in PROJECTIONS if hasattr(model, name)]
        model = attach_lora(model, *lora, modules_to_save=projections, within=("vision_model", "text_model"))
    elif args.scenario in ("vision_lora", "text_lora"):
        model = attach_lora(model, *lora, within=[args.scenario.replace("lora", "model")])
    lowest = {}  # the blocks of a tower below those that are trained
    if args.scenario == "full":
        blocks = {"vision_model": args.image_blocks, "text_model": args.text_blocks}
        lowest = {part: below_last(model, part, count) for part, count in blocks.items() if count is not None}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_trained(args, name) and not any(name in names for names in lowest.values())
    learns = any(parameter.requires_grad and "logit_" not in name for name, parameter in model.named_parameters())
    if not learns and args.scenario != "zero_shot":
        raise UserError(f"--scenario {args.scenario} finds nothing to train in {model_title(args)}")
    if on_cpu:
        speed_up_dropout(model)
    if args.scenario != "zero_shot":
        log_trained(model, f"Scenario {args.scenario}")
        log_trained_parts(model)
    return model


def is_trained(args: Args, name: str) -> bool:
    """Whether the scenario trains the parameter ``name``."""
    if "logit_scale" in name or "logit_bias" in name:
        always = args.scenario == "full" or (args.loss == "siglip" and args.scenario != "zero_shot")
        return always if args.train_logit_scale is None else args.train_logit_scale
    projection = any(part in name.split(".") for part in PROJECTIONS)
    if args.scenario == "full":
        if projection and args.image_model:  # its weights are new
            return True
        locked = {"vision_model": args.lock_image_tower, "visual_projection": args.lock_image_tower}
        locked |= {"text_model": args.lock_text_tower, "text_projection": args.lock_text_tower}
        unused = "mask_token" in name  # of pretraining: nothing is masked here
        return not unused and not any(locked.get(part, False) for part in name.split("."))
    return {
        "zero_shot": False,
        "linear_probe": projection,
        "dual_lora": ".lora_" in name or (projection and ".modules_to_save." in name),
        "vision_lora": ".lora_" in name and "vision_model." in name,
        "text_lora": ".lora_" in name and "text_model." in name,
    }[args.scenario]


def rate_factors(model: torch.nn.Module, args: Args) -> dict[str, float] | None:
    """Factors of the learning rate by the name of a parameter; None: all have the same rate."""
    rates = {"vision_model": args.image_lr, "text_model": args.text_lr}
    if args.layer_decay == 1 and not any(rates.values()):
        return None
    return part_factors(model, {part: (rate or args.lr) / args.lr for part, rate in rates.items()}, args.layer_decay)


def keep_image_features(model: PreTrainedModel, data: Data, run: Run, args: Args) -> None:
    """If nothing random comes before a frozen image tower, it computes each image once, for this and later runs.

    From then on an epoch takes the features from the cache; only the projection and the text tower compute.
    """
    plain = model.get_base_model() if is_lora(model) else model
    tower, preprocessing = getattr(plain, "vision_model", None), data.preprocessing
    if args.augmentation != "none" or not args.cache_features or tower is None:
        return
    if any(parameter.requires_grad for parameter in tower.parameters()):
        return
    if not clip.features_suffice(plain, preprocessing.image_size):
        return
    key = {"weights": weights_digest(tower), "colours": preprocessing.colours, "amp": run.accelerator.mixed_precision}
    data.features |= cached_image_features(
        run, plain, lambda batch: clip.tower_features(plain, model_inputs(batch, data)["pixel_values"]), data.splits,
        preprocessing.transform(), data.collate, args.eval_batch_size, min(args.num_workers, 2),
        cache_folder(args.cache_dir), key,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ loss and evaluation


def embed(model: torch.nn.Module, batch: dict[str, torch.Tensor], data: Data, args: Args) -> Embedded:
    """What a micro-batch contributes to the contrastive loss: its pairs' embeddings, exp(logit scale), SigLIP's bias.

    A fourth value, a further loss of each pair [B], is added as its mean over all pairs of the batch.
    """
    output = model(**model_inputs(batch, data))
    pairs = Pairs(output["image"], output["text"], batch["image_id"], batch["text_id"], batch["weight"])
    return Embedded(pairs, output["scale"], output.get("bias"))


def embeddings_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor], data: Data) -> torch.Tensor:
    """A scalar of both embeddings: what the search for the largest micro-batch goes backward from."""
    output = model(**model_inputs(batch, data))
    return (output["image"] * output["text"].roll(1, 0)).sum()


def model_inputs(batch: dict[str, torch.Tensor], data: Data) -> dict[str, torch.Tensor]:
    """What the model takes of a batch, as far as it is there: normalised pixels or features, tokens and their mask."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "image_features") if name in batch}
    if "pixel_values" in batch:
        inputs["pixel_values"] = normalise(batch["pixel_values"], *data.preprocessing.colours)
    return inputs


def choose_micro_batch_size(model: torch.nn.Module, train_data: PairDataset, data: Data, run: Run, args: Args) -> int:
    """Pairs that a process computes at once: as given (or measured before a resume), or the most that fit."""
    if args.micro_batch_size:
        return args.micro_batch_size
    # Captions of the full length: what fits must fit for the longest.
    longest = PairCollate(data.preprocessing.tokenizer, data.preprocessing.max_length, full_length=True)
    size = find_micro_batch_size(
        run.accelerator, model, lambda size: longest([train_data.at(row % len(train_data), 0) for row in range(size)]),
        lambda plain, batch: embeddings_loss(plain, batch, data),
        most=-(-args.effective_batch_size // run.accelerator.num_processes),
    )  # fmt: skip
    keep_choice(run, micro_batch_size=size)
    return size


def evaluate(model: torch.nn.Module, data: Data, split: str, run: Run, args: Args) -> dict[str, np.ndarray]:
    """Embeddings of every image [I, d] and every caption [T, d] of a split once.

    ``readable`` [n] says which pairs count; ``prompts`` [C, d] are the classes' embeddings where there are any.
    """
    gallery = data.galleries[split]
    transform = data.preprocessing.transform()
    found: dict[str, np.ndarray] = {}
    for part, rows in (("image", gallery.image_rows), ("text", gallery.text_rows)):
        features = data.features[split].take(rows) if split in data.features else None
        dataset = PairDataset(PairSubset(data.splits[split], rows), transform, parts=part, features=features)
        columns = embed_all(model, dataset, part, data, run, args, f"{split} {part}s")
        found |= {part: columns[part], f"{part}_valid": columns["valid"] > 0, "scale": columns["scale"][0]}
        found["bias"] = columns["bias"][0] if "bias" in columns else None
    found["readable"] = found["image_valid"][gallery.image_of] & found["text_valid"][gallery.text_of]
    pairs = PairDataset(data.splits[split], transform)
    if not found["readable"].any():
        raise UserError(f"no pair of {split} can be read: {pairs.problem(0)}")
    if run.state.step == 0:
        report_unreadable(run.accelerator, pairs, split, np.flatnonzero(~found["readable"]))
    if split in data.classes:
        texts = [template.format(name) for name in data.class_names for template in args.class_templates]
        columns = embed_all(model, Captions(texts), "text", data, run, args, "class names")
        prompts = columns["text"].reshape(len(data.class_names), len(args.class_templates), -1).mean(axis=1)
        found["prompts"] = prompts / np.linalg.norm(prompts, axis=1, keepdims=True)
    return found


def embed_all(
    model: torch.nn.Module, dataset: PairDataset | Captions, part: str, data: Data, run: Run, args: Args, what: str
) -> dict[str, np.ndarray]:
    """Embeddings of every sample once, in the order of ``dataset``, on every process."""
    import torch

    workers = min(args.num_workers, 2)
    rows = EvaluationRows(run, model, dataset, data.collate, args.eval_batch_size, what, num_workers=workers)
    model.eval()
    with torch.no_grad():
        for batch in rows:
            with run.accelerator.autocast():
                output = model(**model_inputs(batch, data))
            scalars = {name: output[name].expand(len(batch["index"])) for name in ("scale", "bias") if name in output}
            rows.add(valid=batch["valid"], **{part: output[part]}, **scalars)
    return rows.gathered()


def score(found: dict[str, np.ndarray], data: Data, split: str, args: Args) -> dict[str, float]:
    """The metrics of what :func:`evaluate` found: loss, recall both ways, zero-shot accuracy."""
    gallery, readable = data.galleries[split], found["readable"]
    # An image or a caption that cannot be read is no candidate.
    images, image_of = np.unique(gallery.image_of[readable], return_inverse=True)
    texts, text_of = np.unique(gallery.text_of[readable], return_inverse=True)
    pairs = (found["image"][images], found["text"][texts], image_of, text_of)
    temperature = (found["scale"], found["bias"])
    metrics = contrastive_metrics(*pairs, *temperature, args.loss, args.mask_duplicates, args.loss_batch_size)
    metrics |= retrieval_metrics(*pairs)
    if "prompts" in found:
        metrics |= zero_shot_metrics(found["image"], found["prompts"], data.classes[split], found["image_valid"])
    return metrics


def score_split(model: torch.nn.Module, data: Data, split: str, run: Run, args: Args, name: str) -> dict[str, float]:
    """The metrics of a split; examples are kept under ``name`` (base, tuned) for the report."""
    found = evaluate(model, data, split, run, args)
    keep_examples(run, name, split, retrieval_examples(found, data.galleries[split]))
    return as_floats(score(found, data, split, args))


def score_base_model(model: torch.nn.Module, data: Data, run: Run, args: Args) -> dict[str, dict[str, float]]:
    """The metrics of the untrained model on each split: what every later number is compared with.

    They are recorded, so that a resumed run has them.
    """
    rows = {row["split"]: row for row in run.history if row["kind"] == "base"}
    others = ("kind", "split", "step", "epoch")
    base = {split: {name: row[name] for name in row if name not in others} for split, row in rows.items()}
    for split in [split for split in data.galleries if split not in base]:
        base[split] = score_split(model, data, split, run, args, "base")
        record(run, "base", {"split": split, **base[split]})
        numbers = "  ".join(f"{name} {text}" for name, text in run.written(base[split], log_only=True))
        log.info("base model, %s: %s", split, numbers)
    return base


def score_alone(model: torch.nn.Module, data: Data, run: Run, args: Args) -> None:
    """Nothing is trained: the base model is all there is to score."""
    model.to(run.accelerator.device)
    with stoppable(run):
        base = score_base_model(model, data, run, args)
    if run.accelerator.is_main_process:
        write_report(run, model, data, base, {}, [], args)
    finish_run(run)


def score_mixtures(
    model: torch.nn.Module, initial: dict[str, torch.Tensor], data: Data, run: Run, args: Args
) -> list[dict[str, float]]:
    """WiSE-FT: scores mixtures of the initial and the trained weights, and leaves the model with the best one."""
    weights = trained_weights(unwrapped(run.accelerator, model))
    tuned = trained_weights(unwrapped(run.accelerator, model), copy=True)
    mixtures = []
    for alpha in args.wise_ft:
        mix_weights(weights, initial, tuned, alpha)
        mixtures.append(
            {"alpha": alpha, **score(evaluate(model, data, "validation", run, args), data, "validation", args)}
        )
    choose = max if run.higher_is_better else min
    run.state.metrics = choose(mixtures, key=lambda mixture: mixture[args.best_metric])
    mix_weights(weights, initial, tuned, run.state.metrics["alpha"])
    log.info("WiSE-FT: the mixture with %.0f %% of the new weights is best, saved to %s",
             100 * run.state.metrics["alpha"], run.directory / "wise_ft")  # fmt: skip
    return mixtures


# ----------------------------------------------------------------------------------------------------------- output

USAGE = """
from transformers import AutoModel, AutoProcessor
{further}
model = AutoModel.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
inputs = processor(text=["a red chair"], images=[image], padding={padding}, return_tensors="pt")
print(model(**inputs).logits_per_image)
"""


def write_beside_weights(folder: Path, run: Run, data: Data, args: Args) -> None:
    """What stands beside the saved weights: tokenizer, image processor and model card."""
    data.preprocessing.save(folder)
    padding = '"max_length"' if data.preprocessing.full_length else True
    own = read_json(folder / "config.json").get("model_type") == "two_towers"
    further = "\nimport accelerando.models.towers  # makes transformers know this model\n" if own else ""
    usage = USAGE.format(folder=run.directory / "best", padding=padding, further=further)
    source = None if args.from_scratch else args.text_model or args.model_name
    write_model_card(folder, run, "zero-shot-image-classification", source, usage, data_title(args))


def write_report(
    run: Run, model: torch.nn.Module, data: Data, base: dict, tuned: dict, mixtures: list[dict], args: Args
) -> None:
    """Results and report: metrics of each split of the ``base`` model and of the best weights. Main process."""
    final = tuned or base
    columns = {f"base {split}": values for split, values in base.items()} | tuned
    counts = {split: len(data.splits[split]) for split in final}
    galleries = {
        split: {"pairs": counts[split], "images": len(gallery.image_rows), "captions": len(gallery.text_rows)}
        for split, gallery in data.galleries.items()
    }
    details = {"base": base, "galleries": galleries, "wise_ft": mixtures}
    results.write_results(run, model, final, counts, details)
    last = results.split_to_show(final)
    tiles = [
        (f"{last}, {label}", f"{100 * final[last][f'{way}_r1']:.1f} %",
         f"base {100 * base[last][f'{way}_r1']:.1f} %, chance {100 / galleries[last][items]:.2g} %")
        for way, label, items in (("text_to_image", "text to image R@1", "images"),
                                  ("image_to_text", "image to text R@1", "captions"))
    ]  # fmt: skip
    tiles += [("gallery", f"{galleries[last]['images']:,}", f"images, {galleries[last]['captions']:,} captions")]
    blocks = []
    if mixtures:
        blocks.append(results.mixtures_block(run, mixtures))
    titles = {"base": "before", "tuned": "after"} if tuned else {"base": "base model"}
    examples = example_rows(run, data.splits[last], last, titles)
    blocks.append(page.retrieval(examples, title=f"Examples, {last}"))
    curves = results.training_curves("Recall", {
        "validation/text_to_image_r1": "text to image, 1", "validation/image_to_text_r1": "image to text, 1",
        "validation/recall_mean": "mean of all",
    })  # fmt: skip
    heading = "Metrics of the best weights, beside the base model"
    path = results.write_page(run, f"Image-text retrieval: {data_title(args)}", tiles, columns, curves, blocks, heading)
    log.info("Summary\n%s", results.write_summary(run, columns))
    log.info("Report: %s", path)


# ------------------------------------------------------------------------------------------------------------- main


def check_args(args: Args) -> None:
    """What can be wrong before anything is loaded."""
    check_trackers(args.report_to)
    check_push(args.push_to_hub, args.hub_repo_id)
    locations(args)
    check_ranges(
        args, effective_batch_size=(2, 2**30), micro_batch_size=(0, 2**30), loss_batch_size=(2, 2**30),
        ema_decay=(0, 0.9999999), attention_dropout=(0, 0.999), logit_scale_init=(1e-3, 1e6), cache_gb=(0, 1e6),
        validation_fraction=(0, 0.9), image_size=(8, 4096), patch_size=(2, 4096), image_blocks=(1, 4096),
        text_blocks=(1, 4096), layer_decay=(0.001, 1), image_lr=(1e-12, 1e3), text_lr=(1e-12, 1e3),
    )  # fmt: skip
    if args.scenario == "zero_shot" and args.push_to_hub:
        raise UserError("--push_to_hub: --scenario zero_shot trains nothing that could be pushed")
    if args.enable_s3_checkpoints and not args.s3_bucket:
        raise UserError("--enable_s3_checkpoints needs --s3_bucket")
    if any(not 0 <= alpha <= 1 for alpha in args.wise_ft):
        raise UserError("--wise_ft: shares of the new weights, each between 0 and 1")
    if any("{}" not in template for template in args.class_templates):
        raise UserError('--class_templates: each needs {} where the class name goes, as in "a photo of a {}."')
    if args.from_scratch and args.image_size % args.patch_size:
        raise UserError(f"--patch_size {args.patch_size}: a side of {args.image_size} pixels is no multiple of it")
    if args.lock_image_tower and args.lock_text_tower and not args.image_model:
        raise UserError("--lock_image_tower and --lock_text_tower together leave nothing to train")
    if args.lr == 0 and (args.image_lr or args.text_lr):
        raise UserError("--lr 0 with a learning rate of a tower: freeze the rest with another --scenario instead")
    if bool(args.image_model) != bool(args.text_model):
        there, lacking = ("image", "text") if args.image_model else ("text", "image")
        raise UserError(f"--{there}_model is one of two towers: name the other one with --{lacking}_model")
    if args.image_model and args.from_scratch:
        raise UserError("--from_scratch and --image_model are two ways to make a model: drop one")
    for tower, locked, blocks in (("image", args.lock_image_tower, args.image_blocks),
                                  ("text", args.lock_text_tower, args.text_blocks)):  # fmt: skip
        if locked and blocks:
            raise UserError(f"--lock_{tower}_tower freezes what --{tower}_blocks {blocks} would train: drop one")


def data_title(args: Args) -> str:
    """A short name of the data: the folder's or the bucket's own."""
    plain = ("", ".", "train", "validation", "val", "data")
    parts = [part for part in without_credentials(locations(args)["train"]).split("/") if part not in plain]
    return (parts[-1] if parts else "").split(".")[0].split("{")[0] or "data"


def model_title(args: Args) -> str:
    """A short name of the model."""
    if args.image_model:
        return "-".join(short_name(name) for name in (args.image_model, args.text_model))
    return f"clip{args.vision_width}x{args.vision_layers}" if args.from_scratch else short_name(args.model_name)


def default_name(args: Args) -> str:
    """The run directory's name: what distinguishes runs that are likely to be compared."""
    settings = (args.scenario, f"bs{args.effective_batch_size}", f"lr{args.lr:g}", f"seed{args.seed}")
    named = (
        "model_name",
        "image_model",
        "text_model",
        "from_scratch",
        "scenario",
        "effective_batch_size",
        "lr",
        "seed",
    )
    return default_run_name(args, data_title(args), model_title(args), *settings, named=named)


LOOK_IN_BUCKET = "; --resume without a folder looks in the bucket"


def main() -> None:
    args = parse_args(Args, ALIASES)
    check_args(args)
    directory = choose_directory(args, default_name(args), LOOK_IN_BUCKET if args.enable_s3_checkpoints else "")

    # Data, model and the run's folder.
    accelerator = make_accelerator(args.seed, args.amp, args.deterministic)
    data = load_data(args, accelerator)
    model = build_model(args, data, accelerator)
    remote = f"s3://{args.s3_bucket}/{args.s3_checkpoint_prefix.strip('/')}" if args.enable_s3_checkpoints else None
    run = start_run(accelerator, args, directory, METRICS, model_title(args), data.splits, {}, remote)
    tables = any(table_suffix(where) for where in locations(args).values())
    for line in without_effect(args, ONLY_WITH, GPU=accelerator.device.type == "cuda", tables=tables):
        log.warning("%s", line)

    if args.scenario == "zero_shot":
        return score_alone(model, data, run, args)
    with stoppable(run):
        keep_image_features(model, data, run, args)

    # What an optimizer step trains on: the same samples on any number of processes.
    train_data = training_pairs(args, data)
    micro_batch_size = choose_micro_batch_size(model, train_data, data, run, args)
    batches = TrainBatches(
        train_data, data.collate, micro_batch_size, seed=args.seed, num_workers=args.num_workers,
        effective_batch_size=args.effective_batch_size, accelerator=accelerator, pin_memory=args.pin_memory,
    )  # fmt: skip
    plan_steps(run, batches)

    # Optimizer, schedule, averages; then back to where a resumed run was.
    optimizer = make_optimizer(
        model, args.optimizer, args.lr, args.weight_decay, (args.adam_beta1, args.adam_beta2), args.adam_epsilon,
        args.momentum, is_sharded(accelerator), factors=rate_factors(model, args),
    )  # fmt: skip
    model, optimizer = prepare(accelerator, model, optimizer, args.compile_model)
    schedule = make_scheduler(
        optimizer.optimizer, args.scheduler, run.total_steps, args.warmup_steps, args.scheduler_factor,
        args.scheduler_patience, run.higher_is_better, args.scheduler_step_size * batches.num_windows(),
    )  # fmt: skip
    initial = trained_weights(unwrapped(accelerator, model), copy=True) if args.wise_ft else {}
    ema = Ema(optimizer, args.ema_decay)
    with stoppable(run):
        base = score_base_model(model, data, run, args)  # before a resumed run's weights are loaded
    restore(run, model, optimizer, schedule, ema)
    hub = Hub(run, args)
    logit_scale = unwrapped(accelerator, model).logit_scale
    clamps = logit_scale.requires_grad and args.loss == "clip"

    def save_weights(name: str) -> None:
        plain = unwrapped(accelerator, model)
        save_model_folder(
            accelerator, model, directory / name, lambda folder: write_beside_weights(folder, run, data, args),
            saved_form=lambda state: clip.saved_scale(plain, state),
            outputs=lambda saved: clip.pair_logits(saved, model_inputs(first_batch(train_data, data.collate), data)),
        )  # fmt: skip

    def checkpoint() -> Path:
        hub.push_soon()
        return save(run, model, optimizer, schedule, ema)

    def validate() -> None:
        """Scores the validation pairs, and keeps the weights in best/ if they are the best so far."""
        metrics, further = {}, {}  # without validation pairs the last weights count
        with averaged(ema):
            if "validation" in data.galleries:
                found = evaluate(model, data, "validation", run, args)
                metrics, further = score(found, data, "validation", args), {"logit_scale": float(found["scale"])}
            if record_evaluation(run, metrics, schedule, **further):
                save_weights("best")
        results.write_summary(run, {"base": base.get("validation", {}), "validation": metrics})

    with stoppable(run, on_stop=checkpoint):
        if evaluation_is_due(run):
            validate()
            if run.is_over:
                checkpoint()
        for window in training_steps(run, batches):
            train_mode(model, TOWERS)
            loss = backward_contrastive(
                accelerator, model, window, lambda model, batch: embed(model, batch, data, args), args.loss,
                args.mask_duplicates,
            )  # fmt: skip
            window.add_mean_loss(loss)
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.grad_clip or float("inf"))
            if step_is_repeated(run, window, grad_norm):
                continue  # without the samples whose gradient is infinite or NaN
            optimizer.step()
            schedule.step(skipped=accelerator.optimizer_step_was_skipped)
            optimizer.zero_grad()
            if clamps:
                clamp_logit_scale(logit_scale)
            ema.update()
            step = finish_step(run, window, grad_norm, schedule.lr)
            if step.evaluates:
                validate()
            if step.saves:
                checkpoint()

    # The last weights are saved, the best ones scored.
    save_weights("last")
    load_trained_weights(accelerator, model, directory / "best")
    with stoppable(run):
        tuned = {split: score_split(model, data, split, run, args, "tuned") for split in data.galleries}
        mixtures = score_mixtures(model, initial, data, run, args) if args.wise_ft else []
    if mixtures:
        save_weights("wise_ft")
    if accelerator.is_main_process:
        write_report(run, model, data, base, tuned, mixtures, args)
    finish_run(run)
    hub.push_at_end()


if __name__ == "__main__":
    with errors_in_one_line():
        main()
