# /// script
# requires-python = ">=3.11"
# dependencies = ["accelerando"]
# ///
"""Recognise human actions with CLIP, in images and videos, among any class names: zero-shot, linear probe, fine-tuning.

data_dir holds train/<class>/*, val/<class>/* and perhaps test/<class>/*, or class folders alone; tables, data sets of
`datasets` and shards are read too; see data/README.md. With the head `text` a sample's logits are its similarities to
prompts of the class names, so that classes without training images are recognised too; `linear` is a layer on the image
features. The weights that are best on the validation samples are scored on the test samples, beside the zero-shot ones.

  accelerate launch --config_file accelerate_configs/cpu.yaml scripts/clip_har.py --data_dir data/demo_har \\
    --model_name runs/demo_har_clip/best --evaluate_only --zero_shot --prompt_template "a drawing of a person {label}"
  ... the same with accelerate_configs/multi_gpu.yaml (DDP) or accelerate_configs/fsdp.yaml (FSDP2)
  python scripts/clip_har.py --data_dir data/demo_har --unfreeze_visual    (one process, some seconds sooner)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from accelerando.base.config import check_ranges, parse_args, without_effect
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import cache_folder
from accelerando.base.log import log
from accelerando.base.processes import main_process_first
from accelerando.data.images import ImageAugmentation
from accelerando.data.media import (
    EvaluationMedia,
    FeatureRows,
    Media,
    MediaCollate,
    TrainingMedia,
    at_most_per_class,
    by_sample,
    candidates_of,
    class_list,
    matching,
    of_classes,
    open_folders,
    open_media,
    with_held_out,
    with_novel_apart,
)
from accelerando.data.transforms import normalise
from accelerando.inference.hub import Hub, check_push
from accelerando.models import clip
from accelerando.models.cpu import speed_up_dropout, use_eager_attention, use_patch_products
from accelerando.models.pretrained import add_embeddings
from accelerando.report import page, results
from accelerando.report.metrics import classification_metrics, nearest_neighbours_accuracy, top_k_accuracy
from accelerando.report.model_card import write_model_card
from accelerando.report.predictions import probabilities, scored_examples, worst_mistakes, write_predictions
from accelerando.report.saliency import add_images
from accelerando.report.slices import columns_of_files, slices_block
from accelerando.train.accelerator import (
    is_sharded,
    log_trained,
    log_trained_parts,
    make_accelerator,
    prepare,
    unwrapped,
)
from accelerando.train.averages import Ema, averaged, mix_weights, trained_weights
from accelerando.train.batches import TrainBatches, first_batch
from accelerando.train.evaluation import EvaluationRows, check_validation
from accelerando.train.features import cached_features, weights_digest
from accelerando.train.gradients import step_is_repeated
from accelerando.train.layerwise import below_last, train_mode
from accelerando.train.loop import evaluation_is_due, finish_step, plan_steps, record_evaluation, training_steps
from accelerando.train.lora import attach_lora
from accelerando.train.losses import Embedded, Pairs, backward_contrastive
from accelerando.train.optim import OptimizerName, SchedulerName, make_optimizer, make_scheduler
from accelerando.train.run import choose_directory, default_run_name, finish_run, restore, save, short_name, start_run
from accelerando.train.state import Metric, Run
from accelerando.train.stop import stoppable
from accelerando.train.trackers import check_trackers
from accelerando.train.tracking import as_floats, record
from accelerando.train.weights import load_trained_weights, save_model_folder

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel


Strategy = Literal["linear_probe", "visual", "text", "full", "lora"]


@dataclass
class Args:
    # -- data --
    data_dir: str | None = None  # folder with train/ and val/ (and test/), with raw/ and splits/, or of class folders
    train_file: str | None = None  # instead: a table of files and labels, shards, or a data set of `datasets`
    validation_file: str | None = None  # the same, for choosing the best weights
    test_file: str | None = None  # the same, scored once at the end with the best weights
    media_folder: str | None = None  # tables: folder of the files (default: the table's own)
    file_column: str = "image"  # tables: column of the file; data sets: of the image
    label_column: str = "label"  # column of the label; shards: field of the .json (default: what the .cls or .txt says)
    slice_by: tuple[str, ...] = ()  # tables, shards: other columns; the report shows the accuracy for their values
    frame_folders: bool = False  # data_dir: each folder inside a class folder is a video, its images are the frames
    fold: int = 0  # data_dir with splits/: which fold is validated on
    validation_fraction: float = 0.1  # share of the training samples held out where none are named; 0: none
    test_fraction: float = 0.0  # the same for the test samples
    class_names: tuple[str, ...] = ()  # use only these classes (default: all)
    novel_classes: tuple[str, ...] = ()  # not trained on, scored apart: names, a file of names, or a share such as 0.5
    shots: int | None = None  # training samples of each class, drawn at random
    max_samples_per_class: int | None = None  # the same, as an upper limit
    balanced: bool = False  # every class is sampled equally often
    kept_data: str | None = None  # folder of other classes: zero-shot accuracy on it before and after
    frames: int = 8  # videos: frames of a sample
    views: int = 1  # videos: evaluation averages the logits of so many sets of frames
    augmentation: Literal["none", "light", "medium", "strong"] = "light"  # crop and flip; with more changes of colour
    use_action_specific_augmentation: bool = False  # gentler for the classes that follow
    no_flip_classes: tuple[str, ...] = ("*left*", "*right*", "*writing*")  # never mirrored
    no_crop_classes: tuple[str, ...] = ("*texting*", "*calling*", "*phone*")  # never cropped: a small thing matters
    mixup: float = 0.0  # two samples in one, shares from Beta(mixup, mixup): 0.2, say
    cutmix: float = 0.0  # a rectangle of another sample, its share from Beta(cutmix, cutmix): 1, say
    cache_dir: str | None = None  # features and fetched shards (default: $ACCELERANDO_CACHE or ~/.cache/accelerando)
    cache_gb: float = 50.0  # cached remote shards, in GB
    cache_features: bool = True  # compute the features of a frozen image tower once, where augmentation is none
    dataset_version: str | None = None  # tag or revision of the data, kept with the results: v1.2, say
    # -- model --
    model_name: str = "openai/clip-vit-base-patch16"  # folder or Hub name of a CLIP, SigLIP, or of a saved run
    trust_remote_code: bool = False  # run Python files of the model's folder where it needs them
    strategy: Strategy | None = None  # what is trained (default: what unfreeze_visual and unfreeze_text say)
    unfreeze_visual: bool = False  # train the image tower: strategy visual, or full with unfreeze_text
    unfreeze_text: bool = False  # train the text tower: strategy text, or full with unfreeze_visual
    head: Literal["text", "linear"] | None = None  # the classifier (default: linear with linear_probe, else text)
    head_init: Literal["prompts", "random", "saved"] = "prompts"  # linear: start; saved: as model_name, a run, has it
    keep_statistics: bool = False  # batch norms keep their means and variances: for few or small batches
    image_blocks: int | None = None  # visual, full: only the last blocks of the image tower are trained: 2, say
    head_features: Literal["embedding", "tower"] = "embedding"  # linear: on the embeddings, or before the projection
    prompt_templates: tuple[str, ...] = ("a photo of a person {label}.",)  # prompts of a class; their mean counts
    train_logit_scale: bool = False  # train the temperature of the text head
    lora_r: int = 16  # lora: rank
    lora_alpha: float = 32.0  # lora: the adapters' scale is lora_alpha / lora_r
    lora_dropout: float = 0.05  # lora: dropout before the adapters
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")  # lora: layers with an adapter, or all-linear
    lora_rank_stabilised: bool = False  # lora: the scale is lora_alpha / sqrt(lora_r) (rsLoRA)
    lora_dora: bool = False  # lora: lengths of the weights' rows are learnt apart (DoRA)
    zero_shot: bool = False  # classify by the prompts alone; goes with evaluate_only
    evaluate_only: bool = False  # train nothing: score the model, or with zero_shot its prompts
    # -- loss --
    loss: Literal["cross_entropy", "contrastive"] = "cross_entropy"  # contrastive: prompts as captions (FLYP)
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    # -- training --
    epochs: int = 15  # passes over the training samples
    max_steps: int | None = None  # stop after this many optimizer steps, even if epochs are left
    batch_size: int = 256  # samples per process and micro-batch
    eval_batch_size: int = 128  # samples per process in evaluation
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    lr: float = 3e-6  # peak learning rate of the towers
    head_lr: float = 1e-3  # peak learning rate of a linear head
    weight_decay: float = 0.1  # of matrices; biases, norms and the temperature have none
    optimizer: OptimizerName = "adamw"  # 8-bit and paged ones come from bitsandbytes
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.98  # decay of the second moment
    adam_epsilon: float = 1e-6  # added to the denominator
    momentum: float = 0.9  # sgd: Nesterov momentum
    scheduler: SchedulerName = "cosine"  # how the learning rate changes over the optimizer steps
    scheduler_patience: int = 2  # plateau: evaluations without improvement before the learning rate drops
    scheduler_step_size: int = 7  # step: epochs between drops of the learning rate
    scheduler_factor: float = 0.5  # plateau, step: factor of each drop of the learning rate
    warmup_steps: float = 0.1  # optimizer steps of linear warm-up; below 1, a share of all steps
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
    best_metric: Literal["accuracy", "f1_macro", "f1_weighted", "loss"] = "accuracy"  # chooses the best weights
    early_stop: int | None = None  # evaluations without improvement before the run ends
    early_stop_min_delta: float = 0.0  # what counts as an improvement
    eval_every: int = 0  # optimizer steps between evaluations; 0: every epoch
    wise_ft: tuple[float, ...] = ()  # at the end, score mixtures of old (0) and new (1) weights: 0 0.25 0.5 0.75 1
    num_workers: int = 2  # processes that prepare batches
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
    log_every: int = 10  # optimizer steps between log lines
    report_on_train: bool = False  # score the best weights on the training samples too
    report_to: tuple[str, ...] = ("tensorboard",)  # tensorboard, wandb, mlflow, trackio, ...: one, several, or none
    wandb_project: str = "clip_har"  # wandb: project
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
    "dataset_path": "data_dir",
    "train_data": "train_file",
    "validation_data": "validation_file",
    "test_data": "test_file",
    "dataset_name": "train_file",
    "prompt_template": "prompt_templates",
    "augmentation_strength": "augmentation",
    "unfreeze_visual_encoder": "unfreeze_visual",
    "unfreeze_text_encoder": "unfreeze_text",
    "checkpoint_path": "model_name",
    "config_path": "config",
    "num_frames": "frames",
}

LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "lora_rank_stabilised", "lora_dora")
# Settings that matter only together with another one.
ONLY_WITH = {
    "head linear": ("head_init", "head_features", "head_lr"),
    "head text": ("train_logit_scale",),
    "strategy visual full": ("keep_statistics",),
    "strategy lora": LORA,
    "use_action_specific_augmentation": ("no_flip_classes", "no_crop_classes"),
    "data_dir": ("frame_folders", "fold"),
    "train_file": ("media_folder", "file_column", "label_column", "slice_by", "cache_gb"),
    "GPU": ("deterministic", "pin_memory"),
}

# What is measured, in the order in which it is shown; a metric that `score` adds is shown after these.
METRICS = (
    Metric("loss", in_log=True, higher_is_better=False),
    *(Metric(name, in_log=True) for name in ("accuracy", "top3_accuracy", "f1_macro")),
    *map(Metric, ("f1_weighted", "precision_macro", "precision_weighted", "recall_macro", "recall_weighted")),
    *map(Metric, ("accuracy_among_all", "harmonic_mean")),
)


# ------------------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """Samples of the splits, the class names, and what turns images and names into tensors."""

    splits: dict[str, Media]  # train, and validation, test and novel if there are any; kept: of other classes
    classes: dict[str, np.ndarray]  # the class of each sample, a position in label_names
    label_names: list[str]
    candidates: dict[str, np.ndarray]  # the classes among which a split's samples are classified, int64, ascending
    kept_names: list[str]  # the classes of the split kept
    preprocessing: clip.Preprocessing
    collate: MediaCollate
    features: dict[str, FeatureRows] = field(default_factory=dict)  # instead of images: of a frozen image tower


def load_data(args: Args, accelerator: Accelerator) -> Data:
    with main_process_first(accelerator):  # which makes indexes and fetches what is remote
        splits = open_splits(args)
        kept = open_folders(Path(args.kept_data), args.fold, args.frame_folders) if args.kept_data else {}
        preprocessing = clip.open_preprocessing(args.model_name, None, args.trust_remote_code)
    names = list(args.class_names) or splits["train"].class_names()
    novel = class_list(args.novel_classes, names, args.seed)
    splits = {split: of_classes(media, names, split, bool(args.class_names)) for split, media in splits.items()}
    if len(names) < 2:
        raise UserError(f"one class, {names[0]}; a classifier needs at least two")
    if not args.evaluate_only:
        check_validation(args, splits, args.report_on_train)
        fractions = {"test": args.test_fraction, "validation": args.validation_fraction}
        splits = with_held_out(splits, names, fractions, args.seed)
    if novel:  # their samples are in no split but their own
        splits = with_novel_apart(splits, names, novel, results.split_to_show(splits))
    most = min(args.shots or 2**62, args.max_samples_per_class or 2**62)
    if most < 2**62:
        train = splits["train"]
        splits["train"] = train.take(at_most_per_class(train.classes(names), most, args.seed))
    classes = {split: media.classes(names) for split, media in splits.items()}
    candidates = {split: candidates_of(split, names, novel) for split in splits}
    counts = ", ".join(f"{split} {len(media):,}" for split, media in splits.items())
    log.info("Samples: %s; %d classes: %s", counts, len(names), ", ".join(names[:12]) + " ..." * (len(names) > 12))
    if novel:
        log.info("Not trained on: %s", ", ".join(sorted(novel)))
    kept_names: list[str] = []
    if kept:
        splits["kept"] = kept.get("test", kept.get("validation", kept["train"]))
        kept_names = splits["kept"].class_names()
        classes["kept"], candidates["kept"] = splits["kept"].classes(kept_names), np.arange(len(kept_names))
    return Data(splits, classes, names, candidates, kept_names, preprocessing, MediaCollate())


def open_splits(args: Args) -> dict[str, Media]:
    """The samples of each split, of a folder or of what is named one by one."""
    named = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    if args.data_dir and args.train_file:
        raise UserError("--data_dir and --train_file both name the data: drop one")
    if args.data_dir:
        return open_folders(Path(args.data_dir), args.fold, args.frame_folders)
    if not args.train_file:
        raise UserError("--data_dir is missing: a folder with train/<class>/ and val/<class>/, or --train_file a table")
    cache, columns = (
        cache_folder(args.cache_dir),
        (args.media_folder, args.file_column, args.label_column, args.slice_by),
    )
    return {split: open_media(where, split, cache, args.cache_gb, *columns) for split, where in named.items() if where}


def training_samples(args: Args, data: Data) -> TrainingMedia | FeatureRows:
    """The training samples as each epoch augments, mixes and orders them, or their cached features."""
    if "train" in data.features:
        return data.features["train"]
    frozen = args.strategy in ("linear_probe", "text")  # such an image tower sees the images of evaluation
    transform, mean = data.preprocessing.transform(exact=frozen), data.preprocessing.colours[0]
    augmentation = {
        "none": None,
        "light": ImageAugmentation(0.6, 0.5, "none", 0.0, mean),
        "medium": ImageAugmentation(0.35, 0.5, "trivialaugment", 0.0, mean),
        "strong": ImageAugmentation(0.2, 0.5, "randaugment", 0.25, mean),
    }[args.augmentation]
    gentle = {}
    if args.use_action_specific_augmentation and augmentation:
        upright, whole = (matching(data.label_names, some) for some in (args.no_flip_classes, args.no_crop_classes))
        for number in np.flatnonzero(upright | whole).tolist():
            flip, crop = (
                0.0 if upright[number] else augmentation.flip,
                1.0 if whole[number] else augmentation.crop_scale,
            )
            gentle[number] = replace(augmentation, flip=flip, crop_scale=crop)
    return TrainingMedia(
        data.splits["train"], data.classes["train"], transform, augmentation, args.frames, args.seed, args.mixup,
        args.cutmix, args.balanced, gentle,
    )  # fmt: skip


def keep_image_features(model: PreTrainedModel, data: Data, run: Run, args: Args) -> None:
    """Computes the image features of every sample once, if the image tower is frozen and nothing random precedes it."""
    from accelerando.models.clip_classifier import IMAGE_PARTS

    trained = any(is_of_images(name) for name, parameter in model.named_parameters() if parameter.requires_grad)
    if not args.cache_features or args.evaluate_only or trained:
        return
    if args.augmentation != "none" or args.mixup or args.cutmix:
        log.info("The image tower is frozen: with --augmentation none its features would be computed only once")
        return
    parts = [getattr(model.clip, name, None) for name in IMAGE_PARTS]
    key = {
        "weights": [weights_digest(part) for part in parts if part is not None],
        "features": args.head_features,
        "transform": [repr(data.preprocessing.resizing), data.preprocessing.colours],
        "precision": run.accelerator.mixed_precision,
        "frames": args.frames,
    }
    model.to(run.accelerator.device)
    for split, media in data.splits.items():
        views = 1 if split == "train" else args.views
        samples = EvaluationMedia(media, data.classes[split], data.preprocessing.transform(), args.frames, views)

        def compute(samples: EvaluationMedia = samples, split: str = split) -> np.ndarray:
            return image_features(model, samples, split, data, run, args)

        files = {"views": views, "files": media.fingerprint()}
        found = cached_features(run.accelerator, cache_folder(args.cache_dir), key | files, compute)
        data.features[split] = FeatureRows(found, data.classes[split], args.balanced)


def image_features(
    model: torch.nn.Module, samples: EvaluationMedia, split: str, data: Data, run: Run, args: Args
) -> np.ndarray:
    """The mean of the frames' features in each view of each sample, float32 [n, views, d]; NaN: no such view."""
    import torch

    from accelerando.models.clip_classifier import segment_means

    what = f"features of {split}"
    rows = EvaluationRows(run, model, samples, data.collate, args.eval_batch_size, what, num_workers=args.num_workers)
    model.eval()
    with torch.no_grad():
        for batch in rows:
            with run.accelerator.autocast():
                features = model(**model_inputs(batch, data)).features
            means = segment_means(features, batch["frames"])
            rows.add(features=by_sample(means, batch["views"] * (batch["valid"] > 0), samples.views))
    return rows.gathered()["features"]


# ------------------------------------------------------------------------------------------------------------ model


TOWERS = ("vision_model", "text_model")


def is_of_images(name: str) -> bool:
    """Whether a parameter belongs to the image tower or its projection."""
    return "vision_model" in name.split(".") or "visual_projection" in name.split(".")


def is_of_head(name: str) -> bool:
    """Whether a parameter belongs to the linear head."""
    return "head" in name.split(".") and "clip" not in name.split(".")


def build_model(args: Args, data: Data, accelerator: Accelerator) -> PreTrainedModel:
    from accelerando.models.clip_classifier import (
        fill_prompts,
        make_classifier,
        open_trained,
        prompt_tokens,
        start_head_from_prompts,
        start_head_from_saved,
    )
    from accelerando.models.towers import use_fast_layout

    on_cpu = accelerator.device.type == "cpu" and not args.compile_model
    prompts = fill_prompts(data.label_names, args.prompt_templates)
    length, full_length = data.preprocessing.max_length, data.preprocessing.full_length
    tokens = prompt_tokens(data.preprocessing.tokenizer, prompts, length, full_length)
    if args.evaluate_only and not args.zero_shot:
        model = open_trained(args.model_name, data.label_names, tokens, args.trust_remote_code)
        tower = model.clip
    else:
        tower = clip.open_clip_model(args.model_name, trust_remote_code=args.trust_remote_code)
        clip.check_image_size(tower, data.preprocessing)
        add_embeddings(tower, data.preprocessing.tokenizer)
        clip.make_trainable_scale(tower, None, None)
        model = make_classifier(tower, args.head, args.head_features, data.label_names, tokens)
        if args.head == "linear" and args.head_init == "prompts":
            start_head_from_prompts(model)
        elif args.head == "linear" and args.head_init == "saved":
            start_head_from_saved(model, args.model_name, args.trust_remote_code)
    if not is_sharded(accelerator):
        use_fast_layout(tower)
    if on_cpu:
        longest = clip.tokens_at_most(tower, data.preprocessing.max_length)
        use_eager_attention(tower, accelerator.mixed_precision, longest)
        use_patch_products(tower, accelerator.mixed_precision)
    if args.activation_checkpointing:
        tower.activation_checkpointing_enable()
    if args.strategy == "lora":
        lora = (args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets)
        lora = (*lora, args.lora_rank_stabilised, args.lora_dora)
        within = ("clip.vision_model", *(["clip.text_model"] if args.head == "text" else []))
        model = attach_lora(model, *lora, modules_to_save=model.head_names(), within=within)
    frozen = below_last(model, "vision_model", args.image_blocks) if args.image_blocks else set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not args.evaluate_only and is_trained(args, name) and name not in frozen
    if on_cpu:
        speed_up_dropout(model)
    if not args.evaluate_only:
        log_trained(model, f"Strategy {args.strategy}, head {args.head}")
        log_trained_parts(model)
    return model


def is_trained(args: Args, name: str) -> bool:
    """Whether the strategy trains the parameter ``name``."""
    words = name.split(".")
    if "logit_scale" in words:
        return args.train_logit_scale or args.loss == "contrastive"
    if is_of_head(name):
        return args.strategy != "lora" or "modules_to_save" in words
    of_text = "text_model" in words or "text_projection" in words
    # A linear head has no use for the text tower, nor, on the tower's own features, for the projection.
    unused = args.head == "linear" and (of_text or (args.head_features == "tower" and "visual_projection" in words))
    return (
        not unused
        and {
            "linear_probe": False,
            "visual": is_of_images(name),
            "text": of_text,
            "full": is_of_images(name) or of_text,
            "lora": any(word.startswith("lora_") for word in words),
        }[args.strategy]
    )


def rate_factors(model: PreTrainedModel, args: Args) -> dict[str, float]:
    """The learning rates of a linear head's parameters, as factors of ``lr``."""
    factor = args.head_lr / args.lr if args.lr else 1.0
    return {name: factor for name, _ in model.named_parameters() if is_of_head(name)}


# ------------------------------------------------------------------------------------------------ loss and evaluation


def model_inputs(batch: dict[str, torch.Tensor], data: Data) -> dict[str, torch.Tensor]:
    """What the model takes of a batch: normalised frames, or cached features, and how many belong together."""
    inputs = {name: batch[name] for name in ("frames", "features", "input_ids", "attention_mask") if name in batch}
    if "pixel_values" in batch:
        inputs["pixel_values"] = normalise(batch["pixel_values"], *data.preprocessing.colours)
    return inputs


def compute_loss(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], data: Data, args: Args, split: str = "train"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each sample among the candidates of its split, [B], and the logits of all classes, [B, C].

    Where two samples were mixed, each label has its share; the logits of several views are averaged.
    """
    import torch

    from accelerando.models.clip_classifier import segment_means

    output = model(**model_inputs(batch, data), zero_shot=args.zero_shot)
    logits = segment_means(output.logits.float(), batch["views"])
    candidates = torch.as_tensor(data.candidates[split], device=logits.device)
    among = logits[:, candidates]

    def loss(labels: torch.Tensor) -> torch.Tensor:
        places = torch.searchsorted(candidates, labels)
        return torch.nn.functional.cross_entropy(among, places, reduction="none", label_smoothing=args.label_smoothing)

    share = batch["share"]
    return share * loss(batch["labels"]) + (1 - share) * loss(batch["other_labels"]), logits


def embed(model: torch.nn.Module, batch: dict[str, torch.Tensor], data: Data, args: Args) -> Embedded:
    """Loss contrastive: samples and prompts of their classes as pairs, whose class makes captions equal (FLYP, Goyal et
    al. 2022, arXiv:2212.00638). The prompt of a sample changes from template to template."""
    plain = model.module if hasattr(model, "module") else model
    templates = len(args.prompt_templates)
    rows = batch["labels"] * templates + batch["index"] % templates
    ids, mask = plain.prompt_ids[rows], plain.prompt_mask[rows]
    texts = {"input_ids": ids, "attention_mask": mask if mask.any() else None}
    output = model(**model_inputs(batch, data) | texts)
    pairs = Pairs(output.image, output.text, batch["index"], batch["labels"], batch["weight"])
    return Embedded(pairs, output.scale)


def evaluate(model: torch.nn.Module, data: Data, split: str, run: Run, args: Args) -> dict[str, np.ndarray]:
    """Labels [n], logits [n, C], losses [n] and row [n] of every sample once, in order, without the unreadable ones."""
    import torch

    if split in data.features:
        dataset = data.features[split]
    else:
        media, transform = data.splits[split], data.preprocessing.transform()
        dataset = EvaluationMedia(media, data.classes[split], transform, args.frames, args.views)
    rows = EvaluationRows(run, model, dataset, data.collate, args.eval_batch_size, split, num_workers=args.num_workers)
    model.eval()
    with torch.no_grad():
        for batch in rows:
            with run.accelerator.autocast():
                losses, logits = compute_loss(model, batch, data, args, split)
            rows.add(labels=batch["labels"], logits=logits, losses=losses, valid=batch["valid"])
    return rows.gathered_readable()


def score(found: dict[str, np.ndarray], data: Data, split: str, args: Args) -> dict[str, float]:
    """The metrics of what :func:`evaluate` found, among the candidates of the split; accuracy among all classes too."""
    candidates = data.candidates[split]
    labels, logits = np.searchsorted(candidates, found["labels"]), found["logits"][:, candidates]
    metrics = classification_metrics(labels, logits, found["losses"])
    metrics["top3_accuracy"] = top_k_accuracy(labels, logits, min(3, len(candidates)))
    if len(candidates) < len(data.label_names):
        metrics["accuracy_among_all"] = float((found["logits"].argmax(1) == found["labels"]).mean())
    return metrics


def score_split(model: torch.nn.Module, data: Data, split: str, run: Run, args: Args) -> dict[str, float]:
    """The metrics of a split; of ``kept``, those of the prompts of its own classes."""
    from accelerando.models.clip_classifier import fill_prompts, other_classes, prompt_tokens

    if split != "kept":
        return as_floats(score(evaluate(model, data, split, run, args), data, split, args))
    length, full_length = data.preprocessing.max_length, data.preprocessing.full_length
    prompts = fill_prompts(data.kept_names, args.prompt_templates)
    tokens = prompt_tokens(data.preprocessing.tokenizer, prompts, length, full_length)
    with other_classes(unwrapped(run.accelerator, model), tokens, data.kept_names):
        found = evaluate(model, data, split, run, replace(args, zero_shot=True))
    names = replace(data, label_names=data.kept_names)
    return as_floats(score(found, names, split, args))


def score_zero_shot(model: torch.nn.Module, data: Data, run: Run, args: Args) -> dict[str, dict[str, float]]:
    """The metrics of the prompts of the untrained model on each split: what every later number is compared with.

    They are recorded, so that a resumed run has them.
    """
    rows = {row["split"]: row for row in run.history if row["kind"] == "base"}
    others = ("kind", "split", "step", "epoch")
    base = {split: {name: row[name] for name in row if name not in others} for split, row in rows.items()}
    if args.head_features == "tower" or (args.evaluate_only and not args.zero_shot):
        return base  # no embeddings to compare with prompts, or a model that is trained already
    for split in [split for split in scored_splits(data, args) if split not in base]:
        base[split] = score_split(model, data, split, run, replace(args, zero_shot=True))
        record(run, "base", {"split": split, **base[split]})
        numbers = "  ".join(f"{name} {text}" for name, text in run.written(base[split], log_only=True))
        log.info("zero-shot, %s: %s", split, numbers)
    return base


def score_alone(model: torch.nn.Module, data: Data, run: Run, args: Args) -> None:
    """Nothing is trained: the model as it is, is all there is to score."""
    model.to(run.accelerator.device)
    with stoppable(run):
        found = {split: evaluate(model, data, split, run, args) for split in scored_splits(data, args)}
    if run.accelerator.is_main_process:
        write_report(run, model, data, {}, found, {}, [], args)
    finish_run(run)


def scored_splits(data: Data, args: Args) -> list[str]:
    """The splits that are scored at the beginning and at the end."""
    return [
        split for split in data.splits if split != "train" or args.report_on_train or list(data.splits) == ["train"]
    ]


def score_mixtures(
    model: torch.nn.Module, initial: dict[str, torch.Tensor], data: Data, run: Run, args: Args
) -> list[dict[str, float]]:
    """WiSE-FT: scores mixtures of the initial and the trained weights, and leaves the model with the best one."""
    weights = trained_weights(unwrapped(run.accelerator, model))
    tuned = trained_weights(unwrapped(run.accelerator, model), copy=True)
    mixtures = []
    for alpha in args.wise_ft:
        mix_weights(weights, initial, tuned, alpha)
        mixtures.append({"alpha": alpha, **score_split(model, data, "validation", run, args)})
    choose = max if run.higher_is_better else min
    run.state.metrics = choose(mixtures, key=lambda mixture: mixture[args.best_metric])
    mix_weights(weights, initial, tuned, run.state.metrics["alpha"])
    log.info("WiSE-FT: the mixture with %.0f %% of the new weights is best, saved to %s",
             100 * run.state.metrics["alpha"], run.directory / "wise_ft")  # fmt: skip
    return mixtures


# ----------------------------------------------------------------------------------------------------------- output

USAGE = """
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.image_utils import load_image

import accelerando.models.clip_classifier  # makes transformers know this model

model = AutoModelForImageClassification.from_pretrained("{folder}").eval()
processor = AutoImageProcessor.from_pretrained("{folder}")
logits = model(**processor(load_image("image.jpg"), return_tensors="pt")).logits  # of any class names: model.clip
print(model.config.id2label[logits.argmax().item()])
"""


def write_beside_weights(folder: Path, run: Run, data: Data, args: Args) -> None:
    """What stands beside the saved weights: tokenizer, image processor and model card."""
    data.preprocessing.save(folder)
    data.preprocessing.image_processor.save_pretrained(folder)
    usage = USAGE.format(folder=run.directory / "best")
    write_model_card(folder, run, "image-classification", args.model_name, usage, data_title(args))


def write_report(
    run: Run, model: torch.nn.Module, data: Data, base: dict[str, dict[str, float]],
    found: dict[str, dict[str, np.ndarray]], kept: dict[str, float], mixtures: list[dict[str, float]], args: Args,
) -> None:  # fmt: skip
    """Results and report of the best weights, beside the zero-shot classifier; ``found``: what :func:`evaluate` found
    in each split; ``kept``: the zero-shot metrics of the other classes afterwards. Main process."""
    metrics = {split: score(rows, data, split, args) for split, rows in found.items()}
    last = results.split_to_show(found)
    for columns in (metrics, base):
        if "novel" in columns and last in columns:
            one, other = columns[last]["accuracy"], columns["novel"]["accuracy"]
            columns["novel"]["harmonic_mean"] = 2 * one * other / max(one + other, 1e-9)
    metrics |= {"kept": kept} if kept else {}
    columns = {f"zero-shot {split}": values for split, values in base.items()} | metrics
    matrices = results.write_class_reports(run, found, data.label_names)
    files = {
        split: [data.splits[split].names[row].as_py() for row in rows["row"].tolist()] for split, rows in found.items()
    }
    for split, rows in found.items():
        path = run.directory / f"predictions_{split}.csv"
        write_predictions(path, files[split], data.label_names, probabilities(rows["logits"]), rows["labels"])
    counts = {split: len(rows["labels"]) for split, rows in found.items()} | {"kept": len(data.splits.get("kept", ()))}
    neighbours = nearest_neighbours(data, last)
    calibration, calibrated = results.write_calibration(run, found, last)
    details = {"label_names": data.label_names, "confusion_matrix": matrices[last].tolist(), "calibration": calibration,
               "zero_shot": base, "wise_ft": mixtures, "nearest_neighbours": neighbours}  # fmt: skip
    results.write_results(run, model, metrics, counts, details)

    sharded = is_sharded(run.accelerator)  # one process alone cannot ask a sharded model what it looked at
    plain = None if sharded else unwrapped(run.accelerator, model)
    samples = EvaluationMedia(data.splits[last], data.classes[last], data.preprocessing.transform(), args.frames)
    colours = data.preprocessing.colours
    worst = worst_mistakes(found[last]["labels"], found[last]["logits"], data.label_names)
    examples = scored_examples(found[last]["labels"], found[last]["logits"], data.label_names)
    for shown in (worst, examples):
        for row in shown:
            row["text"] = files[last][row["row"]]
        add_images(shown, found[last], samples, plain, *colours)
    tiles = [
        (f"{last} accuracy", f"{100 * metrics[last]['accuracy']:.2f} %", f"{counts[last]:,} samples"),
        *([("zero-shot", f"{100 * base[last]['accuracy']:.2f} %", "before training")] if last in base else []),
        *([("novel classes", f"{100 * metrics['novel']['accuracy']:.2f} %",
            f"harmonic mean {metrics['novel']['harmonic_mean']:.4f}")] if "novel" in metrics else []),
    ]  # fmt: skip
    blocks = [page.class_scores(examples, title=f"Scores of all classes, {last}")]
    if kept and "kept" in base:
        rows = [(name, base["kept"][name], kept[name]) for name in ("accuracy", "top3_accuracy")]
        blocks.append(page.table(["zero-shot on other classes", "before", "after"], rows, title="What was kept"))
    if mixtures:
        blocks.append(results.mixtures_block(run, mixtures))
    labels = [data.label_names[label] for label in found[last]["labels"]]
    columns_shown = columns_of_files(files[last], labels, data.splits[last].take(found[last]["row"]).others)
    right = found[last]["logits"].argmax(axis=1) == found[last]["labels"]
    blocks += [
        *results.class_blocks(matrices[last], data.label_names, last),
        *calibrated,
        *slices_block(right, columns_shown, last),
        page.mistakes(worst, title=f"Worst mistakes, {last}"),
    ]
    curves = results.training_curves("Accuracy", {"validation/accuracy": "validation"})
    path = results.write_page(run, f"Action recognition: {data_title(args)}", tiles, columns, curves, blocks)
    notes = {"nearest neighbours": f"{100 * neighbours:.1f} % of {last} (k = 20)"} if neighbours is not None else {}
    log.info("Summary\n%s", results.write_summary(run, columns, notes))
    if kept and "kept" in base and kept["accuracy"] < base["kept"]["accuracy"] - 0.01:
        log.warning("Zero-shot accuracy on %s fell from %.1f to %.1f %%: --wise_ft mixes old and new weights",
                    args.kept_data, 100 * base["kept"]["accuracy"], 100 * kept["accuracy"])  # fmt: skip
    log.info("Report: %s", path)


def nearest_neighbours(data: Data, split: str) -> float | None:
    """The accuracy of the 20 nearest training samples by cached features; None: there are none."""
    if "train" not in data.features or split not in data.features:
        return None
    (known, classes), (asked, labels) = (data.features[name].first_views() for name in ("train", split))
    return nearest_neighbours_accuracy(known, classes, asked, labels, 20)


# ------------------------------------------------------------------------------------------------------------- main


def check_args(args: Args) -> None:
    """What can be wrong before anything is loaded; what the strategy and the head are where they are not named."""
    check_trackers(args.report_to)
    check_push(args.push_to_hub, args.hub_repo_id)
    check_ranges(
        args, ema_decay=(0, 0.9999999), validation_fraction=(0, 0.9), test_fraction=(0, 0.9), fold=(0, 9999),
        frames=(1, 1024), views=(1, 64), shots=(1, 2**30), max_samples_per_class=(1, 2**30), mixup=(0, 100),
        cutmix=(0, 100), label_smoothing=(0, 0.999), head_lr=(0, 1e6), cache_gb=(0, 1e6), image_blocks=(1, 4096),
    )  # fmt: skip
    unfrozen = {(True, True): "full", (True, False): "visual", (False, True): "text"}
    asked = unfrozen.get((args.unfreeze_visual, args.unfreeze_text))
    if args.strategy and asked and args.strategy != asked:
        raise UserError(f"--strategy {args.strategy} and --unfreeze_visual or --unfreeze_text disagree: drop one")
    args.strategy = args.strategy or asked or "linear_probe"
    args.head = args.head or ("linear" if args.strategy == "linear_probe" and not args.zero_shot else "text")
    if any("{}" not in template and "{label}" not in template for template in args.prompt_templates):
        raise UserError(
            '--prompt_templates: each needs {label} where the class name goes: "a photo of a person {label}."'
        )
    if any(not 0 <= alpha <= 1 for alpha in args.wise_ft):
        raise UserError("--wise_ft: shares of the new weights, each between 0 and 1")
    if args.zero_shot and not args.evaluate_only:
        raise UserError("--zero_shot trains nothing: add --evaluate_only")
    if args.evaluate_only and args.push_to_hub:
        raise UserError("--push_to_hub: --evaluate_only trains nothing that could be pushed")
    if args.evaluate_only:
        return
    if args.strategy == "linear_probe" and args.head == "text" and not args.train_logit_scale:
        raise UserError("--strategy linear_probe trains the head, but --head text has no weights: use --head linear")
    if args.head == "linear":
        if args.lr == 0 < args.head_lr:
            raise UserError("--lr 0 with --head_lr: freeze the towers with --strategy linear_probe instead")
        for flag, given in {
            "novel_classes": args.novel_classes,
            "loss contrastive": args.loss == "contrastive",
        }.items():
            if given:
                raise UserError(f"--{flag} needs --head text: a linear head knows its training classes alone")
        if args.strategy == "text":
            raise UserError("--strategy text needs --head text: a linear head does not use the text tower")
    if args.head_features == "tower" and (args.head != "linear" or args.head_init == "prompts" or args.kept_data):
        raise UserError("--head_features tower needs --head linear and --head_init random or saved, and no "
                        "--kept_data: prompts are compared with embeddings")  # fmt: skip
    if args.image_blocks and args.strategy not in ("visual", "full"):
        raise UserError("--image_blocks needs --strategy visual or full: no other trains blocks of the image tower")
    if args.loss == "contrastive" and (args.mixup or args.cutmix or args.label_smoothing):
        raise UserError("--loss contrastive has no classes: drop --mixup, --cutmix and --label_smoothing")


def data_title(args: Args) -> str:
    """A short name of the data: the folder's or the file's own."""
    return Path(args.data_dir or args.train_file or "").absolute().name.partition(".")[0] or "data"


def model_title(args: Args) -> str:
    """A short name of the model."""
    return short_name(args.model_name)


def default_name(args: Args) -> str:
    """The run directory's name: what distinguishes runs that are likely to be compared."""
    strategy = "zero_shot" if args.zero_shot else "evaluated" if args.evaluate_only else args.strategy
    settings = (strategy, args.head, f"bs{args.batch_size}", f"lr{args.lr:g}", f"seed{args.seed}")
    named = ("model_name", "strategy", "unfreeze_visual", "unfreeze_text", "head", "zero_shot", "evaluate_only",
             "batch_size", "lr", "seed")  # fmt: skip
    return default_run_name(args, data_title(args), model_title(args), *settings, named=named)


def main() -> None:
    args = parse_args(Args, ALIASES)
    check_args(args)
    directory = choose_directory(args, default_name(args))

    # Data, model and the run's folder.
    accelerator = make_accelerator(args.seed, args.amp, args.deterministic)
    data = load_data(args, accelerator)
    model = build_model(args, data, accelerator)
    run = start_run(accelerator, args, directory, METRICS, model_title(args), data.splits, {"label": data.label_names})
    for line in without_effect(args, ONLY_WITH, GPU=accelerator.device.type == "cuda"):
        log.warning("%s", line)

    if args.evaluate_only:
        return score_alone(model, data, run, args)
    with stoppable(run):
        keep_image_features(model, data, run, args)

    # What an optimizer step trains on: the same samples on any number of processes.
    train_data = training_samples(args, data)
    batches = TrainBatches(
        train_data, data.collate, args.batch_size, args.gradient_accumulation_steps, args.seed,
        num_workers=args.num_workers, accelerator=accelerator, pin_memory=args.pin_memory,
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
        base = score_zero_shot(model, data, run, args)  # before a resumed run's weights are loaded
    restore(run, model, optimizer, schedule, ema)
    hub = Hub(run, args)

    def save_weights(name: str) -> None:
        save_model_folder(
            accelerator, model, directory / name, lambda folder: write_beside_weights(folder, run, data, args),
            outputs=lambda saved: saved(**model_inputs(first_batch(train_data, data.collate), data)).logits,
        )  # fmt: skip

    def checkpoint() -> Path:
        hub.push_soon()
        return save(run, model, optimizer, schedule, ema)

    def validate() -> None:
        """Scores the validation samples, and keeps the weights in best/ if they are the best so far."""
        metrics = {}  # without validation samples the last weights count
        with averaged(ema):
            if "validation" in data.splits:
                metrics = score(evaluate(model, data, "validation", run, args), data, "validation", args)
            if record_evaluation(run, metrics, schedule):
                save_weights("best")
        results.write_summary(run, {"zero-shot validation": base.get("validation", {}), "validation": metrics})

    with stoppable(run, on_stop=checkpoint):
        if evaluation_is_due(run):
            validate()
            if run.is_over:
                checkpoint()
        for window in training_steps(run, batches):
            train_mode(model, TOWERS, args.keep_statistics)
            if args.loss == "contrastive":
                loss = backward_contrastive(accelerator, model, window, lambda *each: embed(*each, data, args))
                window.add_mean_loss(loss)
            else:
                for batch in window:  # the micro-batches of one optimizer step
                    with window.sync(model):
                        losses, _ = compute_loss(model, batch, data, args)
                        window.backward(losses, batch["weight"])
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.grad_clip or float("inf"))
            if step_is_repeated(run, window, grad_norm):
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
    with stoppable(run):
        mixtures = score_mixtures(model, initial, data, run, args) if args.wise_ft else []
        splits = [split for split in scored_splits(data, args) if split != "kept"]
        found = {split: evaluate(model, data, split, run, args) for split in splits}
        kept = score_split(model, data, "kept", run, args) if args.kept_data else {}
    if mixtures:
        save_weights("wise_ft")
    if accelerator.is_main_process:
        write_report(run, model, data, base, found, kept, mixtures, args)
    finish_run(run)
    hub.push_at_end()


if __name__ == "__main__":
    with errors_in_one_line():
        main()
