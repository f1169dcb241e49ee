# /// script
# requires-python = ">=3.11"
# dependencies = ["accelerando"]
# ///
"""Recognise signs: a Transformer over keypoints, or GRUs over precomputed Inception features.

Clips are NPZ files in a folder with a labels.csv (file, gloss, cat); see data/README.md. Two heads are trained, one for
the gloss and one for its category, with loss alpha * gloss + beta * category. The weights that are best on the
validation clips (gloss accuracy) are scored on the test clips.

  accelerate launch --config_file accelerate_configs/cpu.yaml scripts/sign_train.py --config configs/sign_wlasl50.yaml
  ... the same with accelerate_configs/multi_gpu.yaml (DDP) or accelerate_configs/fsdp.yaml (FSDP2)
  python scripts/sign_train.py --config configs/sign_wlasl50.yaml    (one process, some seconds sooner)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from accelerando.base.config import check_ranges, parse_args, without_effect
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import cache_folder, check_can_be_made
from accelerando.base.log import log
from accelerando.base.processes import main_process_first
from accelerando.data.collate import ClipCollate
from accelerando.data.keypoints import WIDTH, ClipAugmentation
from accelerando.data.sign_clips import (
    ClipTable,
    TrainingClips,
    channel_statistics,
    class_names,
    pack_clips,
    synthetic_clips,
)
from accelerando.data.sign_labels import label_problems, read_groups, read_labels, report_problems
from accelerando.data.splits import fold_split, stratified_split
from accelerando.inference.hub import Hub, check_push
from accelerando.models.cpu import speed_up_dropout
from accelerando.report import page, results
from accelerando.report.metrics import classification_metrics, top_k_accuracy
from accelerando.report.model_card import write_model_card
from accelerando.report.predictions import probabilities, worst_mistakes, write_predictions
from accelerando.report.slices import slices_block
from accelerando.train.accelerator import is_sharded, log_trained, make_accelerator, prepare
from accelerando.train.autotune import choose_num_workers, find_micro_batch_size
from accelerando.train.averages import Ema, averaged
from accelerando.train.batches import TrainBatches
from accelerando.train.class_losses import class_losses
from accelerando.train.evaluation import EvaluationRows, check_validation
from accelerando.train.gradients import step_is_repeated
from accelerando.train.loop import evaluation_is_due, finish_step, plan_steps, record_evaluation, training_steps
from accelerando.train.optim import OptimizerName, SchedulerName, make_optimizer, make_scheduler
from accelerando.train.run import choose_directory, default_run_name, finish_run, keep_choice, restore, save, start_run
from accelerando.train.state import Metric, Run
from accelerando.train.stop import stoppable
from accelerando.train.trackers import check_trackers
from accelerando.train.weights import load_trained_weights, save_model_folder

if TYPE_CHECKING:
    import numpy as np
    import torch
    from accelerate import Accelerator

    from accelerando.models.sign import SignModel, SignOutput


@dataclass
class Args:
    # -- data --
    keypoints_train: str | None = None  # transformer: folder of the training clips (.npz)
    keypoints_val: str | None = None  # transformer: folder of the validation clips
    keypoints_test: str | None = None  # transformer: folder of the test clips, scored once at the end
    features_train: str | None = None  # iv3_gru: folder of the training clips
    features_val: str | None = None  # iv3_gru: folder of the validation clips
    features_test: str | None = None  # iv3_gru: folder of the test clips
    labels_train_csv: str | None = None  # columns file, gloss, cat and perhaps occluded (default: labels.csv beside)
    labels_val_csv: str | None = None  # the same for validation
    labels_test_csv: str | None = None  # the same for test
    validation_fraction: float = 0.1  # share of the training clips held out, stratified, without others; 0: none
    num_folds: int | None = None  # cross-validation: the training clips are divided into so many folds, stratified
    fold: int = 0  # num_folds: which one is validated on; the others are trained on
    group_column: str | None = None  # num_folds: clips of one value in this column stay together: signer, say
    names_csv: str | None = None  # columns gloss, label, cat, category: names of the classes, for reports and answers
    kp_key: str = "X"  # transformer: array of the NPZ files
    feature_key: str = "X2048"  # iv3_gru: array of the NPZ files
    num_gloss: int | None = None  # glosses (default: as many as the labels have)
    num_cat: int | None = None  # categories (default: as many as the labels have)
    length_buckets: bool = True  # clips of similar length share a batch: little padding
    balanced: bool = False  # every gloss is sampled equally often
    rotation: float = 0.0  # augmentation: up to so many degrees
    scale: float = 0.0  # augmentation: 0.2 is 0.8 to 1.2 times as large
    shift: float = 0.0  # augmentation: up to so many shoulder widths, in x and y
    noise: float = 0.0  # augmentation: standard deviation added to every coordinate
    time_warp: float = 0.0  # augmentation: 0.2 is up to 20 % faster or slower, varying within the clip
    time_mask: float = 0.0  # augmentation: the longest span that is hidden, as a share of the clip
    frame_drop: float = 0.0  # augmentation: probability that a frame is left out
    mirror: float = 0.0  # augmentation: probability that left and right change places
    cache_dir: str | None = None  # where packed clips are kept (default: $ACCELERANDO_CACHE or ~/.cache/accelerando)
    smoke_test: bool = False  # train on generated clips: no data is needed
    dataset_version: str | None = None  # tag or revision of the data, kept with the results: v1.2, say
    # -- model --
    model: Literal["transformer", "iv3_gru"] = "transformer"  # of keypoints, or of Inception features
    weights: str | None = None  # start from an earlier run's: its best/, or a file; a head for other classes is new
    normalisation: Literal["body", "standard", "none"] | None = None  # transformer: default body; iv3_gru: none
    velocities: bool = False  # transformer: adds the change since the previous frame to the input
    relative_hands: bool = False  # transformer: adds each hand relative to its wrist, scaled by its size
    use_mask: bool = False  # transformer: adds which points are visible to the input
    hidden_size: int = 256  # transformer: width
    num_layers: int = 4  # transformer: layers
    num_attention_heads: int = 8  # transformer: heads
    intermediate_size: int = 1024  # transformer: feed-forward width
    conv_kernel: int = 0  # transformer: frames that a convolution in each layer spans; 0: none
    pooling: Literal["mean", "max", "cls"] = "mean"  # transformer: how frames become one vector
    final_norm: bool = True  # transformer: layer norm after the last layer
    gru_sizes: tuple[int, ...] = (16, 12)  # iv3_gru: widths of the GRUs, one after another
    dropout: float = 0.1  # in the layers and before the heads
    pretrained_backbone: bool = True  # tools/extract_features.py: Inception's own weights; nothing is read of it here
    # -- loss --
    alpha: float = 0.5  # weight of the gloss loss
    beta: float = 0.5  # weight of the category loss
    learned_weights: bool = False  # the weights are learned from the losses' uncertainty (Kendall et al. 2018)
    curriculum: Literal["none", "gloss_first", "category_first", "dynamic"] = "none"  # how the loss weights change
    curriculum_share: float = 0.3  # share of the steps in which the first head is trained alone
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"  # of each head
    focal_gamma: float = 2.0  # focal: how strongly confident answers are discounted
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    # -- training --
    epochs: int = 20  # passes over the training clips
    max_steps: int | None = None  # stop after this many optimizer steps, even if epochs are left
    batch_size: int = 32  # clips per process and micro-batch
    auto_batch_size: bool = False  # the largest batch, up to 64, that fits and is faster, measured
    eval_batch_size: int = 64  # clips per process in evaluation
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    lr: float = 1e-4  # peak learning rate
    weight_decay: float = 0.0  # of matrices; biases and norms have none
    optimizer: OptimizerName = "adamw"  # 8-bit and paged ones come from bitsandbytes
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.999  # decay of the second moment
    adam_epsilon: float = 1e-8  # added to the denominator
    momentum: float = 0.9  # sgd: Nesterov momentum
    scheduler: SchedulerName = "constant"  # how the learning rate changes over the optimizer steps
    scheduler_patience: int = 5  # plateau: evaluations without improvement before the learning rate drops
    scheduler_step_size: int = 7  # step: epochs between drops of the learning rate
    scheduler_factor: float = 0.5  # plateau, step: factor of each drop of the learning rate
    warmup_steps: float = 0.0  # optimizer steps of linear warm-up; below 1, a share of all steps
    grad_clip: float | None = None  # largest gradient norm; None: not clipped
    max_bad_steps: int = 5  # steps in a row without a finite gradient before the run ends
    overfit_batches: int | None = None  # for finding mistakes: train on these first batches alone, in each epoch
    find_lr: bool = False  # range test instead of training: 100 steps, a plot and a suggestion; the run is not touched
    inspect: bool = False  # log a table of the layers, and record the gradient norm of each
    ema_decay: float | None = None  # moving average of the weights, which is evaluated instead: 0.999, say
    amp: Literal["auto", "no", "bf16", "fp16"] | None = None  # precision; auto: bf16 where fast (default: launch's)
    compile_model: bool = False  # torch.compile
    deterministic: bool = False  # GPU: only kernels that give the same bits each time; slows convolutions
    best_metric: Literal["gloss_accuracy", "cat_accuracy", "gloss_f1_macro", "loss"] = "gloss_accuracy"  # for best/
    early_stop: int | None = None  # evaluations without improvement before the run ends
    early_stop_min_delta: float = 0.0  # what counts as an improvement
    eval_every: int = 0  # optimizer steps between evaluations; 0: every epoch
    num_workers: int = 0  # processes that prepare batches
    auto_workers: bool = False  # as many as there are cores to spare, up to 8
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
    log_csv: str | None = None  # CSV with a row for each evaluation, for a spreadsheet
    report_on_train: bool = False  # score the best weights on the training clips too
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


# Other spellings, the guide's and the shared ones.
ALIASES = {
    "train_file": "labels_train_csv",
    "validation_file": "labels_val_csv",
    "test_file": "labels_test_csv",
    "architecture": "model",
}

# Settings that matter only together with another one.
ONLY_WITH = {
    "model transformer": (
        "keypoints_train", "keypoints_val", "keypoints_test", "kp_key", "velocities", "relative_hands", "use_mask",
        "hidden_size", "num_layers", "num_attention_heads", "intermediate_size", "conv_kernel", "pooling", "final_norm",
    ),
    "model iv3_gru": ("features_train", "features_val", "features_test", "feature_key", "gru_sizes"),
    "num_folds": ("fold", "group_column"),
    "loss focal": ("focal_gamma",),
    "curriculum gloss_first category_first dynamic": ("curriculum_share",),
    "tools/extract_features.py": ("pretrained_backbone",),  # old commands name a backbone, which runs there alone
    "GPU": ("deterministic", "pin_memory"),
}  # fmt: skip

# What is measured, in the order in which it is shown; a metric that `score` adds is shown after these.
METRICS = (
    Metric("loss", in_log=True, higher_is_better=False),
    Metric("gloss_accuracy", in_log=True),
    Metric("gloss_top5"),
    Metric("cat_accuracy", in_log=True),
    *(Metric(f"gloss_{name}_{mean}") for name in ("f1", "precision", "recall") for mean in ("macro", "weighted")),
    *map(Metric, ("cat_f1_macro", "cat_f1_weighted", "occluded_accuracy", "visible_accuracy")),
)


# ------------------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """Packed clips of the splits and the names of the classes."""

    splits: dict[str, ClipTable]  # train, and validation and test if there are any
    names: dict[str, list[str]]  # of the heads gloss and cat
    key: str  # array of the NPZ files
    normalisation: str
    collate: ClipCollate


def load_data(args: Args, accelerator: Accelerator) -> Data:
    transformer = args.model == "transformer"
    key = args.kp_key if transformer else args.feature_key
    normalisation = args.normalisation or ("body" if transformer else "none")
    collate = ClipCollate(multiple_of=8 if args.compile_model else 1)
    if args.smoke_test:
        splits = synthetic_clips(156 if transformer else 2048, args.num_gloss or 105, args.num_cat or 10, args.seed)
        names = class_names(splits, Path(), None, args.num_gloss or 105, args.num_cat or 10)
        return Data(splits, names, key, "none" if normalisation == "body" else normalisation, collate)

    check_validation(args, folders(args), args.report_on_train)
    labels = {split: read_labels(csv) for split, (_, csv) in folders(args).items()}
    for split, (folder, _) in folders(args).items():
        train = (None, None) if split == "train" else (labels["train"], folders(args)["train"][0])
        report_problems(label_problems(labels[split], folder, args.num_gloss, args.num_cat, *train), log.warning)
    with main_process_first(accelerator):
        cache = cache_folder(args.cache_dir)
        splits = {
            split: pack_clips(labels[split], folder, key, normalisation, cache, split)
            for split, (folder, _) in folders(args).items()
        }
    if "validation" not in splits and (args.num_folds or args.validation_fraction):
        clips = splits.pop("train")
        if args.num_folds:
            groups = read_groups(labels["train"].path, args.group_column) if args.group_column else clips.names
            kept, held_out = fold_split(clips.gloss, groups, args.num_folds, args.fold)
        else:
            kept, held_out = stratified_split(clips.gloss, args.validation_fraction, args.seed)
        splits = {"train": clips.take(kept), "validation": clips.take(held_out), **splits}
    names = class_names(splits, folders(args)["train"][0], args.names_csv, args.num_gloss, args.num_cat)
    counts = ", ".join(f"{split} {len(clips):,}" for split, clips in splits.items())
    log.info("Clips: %s; %d glosses, %d categories", counts, len(names["gloss"]), len(names["cat"]))
    return Data(splits, names, key, normalisation, collate)


def folders(args: Args) -> dict[str, tuple[Path, Path]]:
    """Folder and labels of each split that was named."""
    kind = "keypoints" if args.model == "transformer" else "features"
    found = {}
    for split, short in (("train", "train"), ("validation", "val"), ("test", "test")):
        folder, csv = getattr(args, f"{kind}_{short}"), getattr(args, f"labels_{short}_csv")
        if folder is None and (csv is None or split == "train"):
            continue
        # Labels alone: other clips of the training folder.
        folder = Path(folder or getattr(args, f"{kind}_train") or "")
        found[split] = (folder, Path(csv) if csv else folder / "labels.csv")
    if "train" not in found:
        raise UserError(f"--{kind}_train is missing: a folder of NPZ files with a labels.csv (--smoke_test needs none)")
    return found


def training_clips(args: Args, data: Data) -> TrainingClips:
    """The training clips as each epoch augments and orders them."""
    clips = data.splits["train"]
    if clips.width != WIDTH and (args.rotation or args.shift or args.mirror):
        raise UserError(f"--rotation, --shift and --mirror need frames of {WIDTH} numbers; these have {clips.width}")
    augmentation = ClipAugmentation(
        args.rotation, args.scale, args.shift, args.noise, args.time_warp, args.time_mask, args.frame_drop, args.mirror,
        centre=0.0 if data.normalisation == "body" else 0.5,
    )  # fmt: skip
    return TrainingClips(clips, augmentation, args.seed, args.balanced, args.length_buckets)


# ------------------------------------------------------------------------------------------------------------ model


def build_model(args: Args, data: Data, accelerator: Accelerator) -> SignModel:
    from accelerando.models.sign import SignGru, SignGruConfig, SignTransformer, SignTransformerConfig, load_pretrained

    mean = std = None
    if data.normalisation == "standard":
        mean, std = (values.tolist() for values in channel_statistics(data.splits["train"]))
    common = {
        "input_key": data.key, "input_width": data.splits["train"].width, "normalisation": data.normalisation,
        "channel_mean": mean, "channel_std": std, "gloss_names": data.names["gloss"], "cat_names": data.names["cat"],
        "dropout": args.dropout, "learned_weights": args.learned_weights,
    }  # fmt: skip
    if args.model == "transformer":
        shape = ("hidden_size", "num_layers", "num_attention_heads", "intermediate_size", "pooling", "final_norm",
                 "velocities", "relative_hands", "use_mask", "conv_kernel")  # fmt: skip
        model = SignTransformer(SignTransformerConfig(**common, **{name: getattr(args, name) for name in shape}))
    else:
        model = SignGru(SignGruConfig(**common, gru_sizes=args.gru_sizes))
    if args.weights:
        log.info("%s", load_pretrained(model, args.weights))
    if accelerator.device.type == "cpu" and not args.compile_model:
        speed_up_dropout(model)
    log_trained(model, f"Model {args.model}")
    return model


# ------------------------------------------------------------------------------------------------ loss and evaluation


def compute_loss(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], data: Data, args: Args, progress: float = 1.0
) -> tuple[torch.Tensor, SignOutput]:
    """Loss of each clip, [B], and the model's output; ``progress`` is the share of the steps that were taken."""
    output = model(**{name: batch[name] for name in ("frames", "attention_mask", "mask") if name in batch})
    focal_gamma = args.focal_gamma if args.loss == "focal" else 0.0
    how = {"label_smoothing": args.label_smoothing, "focal_gamma": focal_gamma}
    gloss = class_losses(output.gloss_logits.float(), batch["gloss"], **how)
    cat = class_losses(output.cat_logits.float(), batch["cat"], **how)
    alpha, beta = loss_weights(args, progress)
    if output.log_variances is not None:  # Kendall, Gal and Cipolla 2018 (arXiv:1705.07115)
        variances = output.log_variances.float()
        alpha, beta = alpha * (-variances[0]).exp(), beta * (-variances[1]).exp()
        return alpha * gloss + beta * cat + variances.sum() / 2, output
    return alpha * gloss + beta * cat, output


def loss_weights(args: Args, progress: float) -> tuple[float, float]:
    """Weights of the gloss and the category loss at this moment of the curriculum."""
    share = min(1.0, progress / args.curriculum_share) if args.curriculum_share else 1.0
    return {
        "none": (args.alpha, args.beta),
        "gloss_first": (args.alpha, args.beta if share >= 1 else 0.0),
        "category_first": (args.alpha if share >= 1 else 0.0, args.beta),
        # From the category alone, which is easier, gradually to both.
        "dynamic": (args.alpha * share, args.beta + args.alpha * (1 - share)),
    }[args.curriculum]


def choose_batch_size(model: torch.nn.Module, data: Data, run: Run, args: Args) -> int:
    """Clips per micro-batch: as given (or measured before a resume), or the most that fit and pay."""
    if not args.auto_batch_size:
        return args.batch_size
    longest = data.splits["train"][int(data.splits["train"].lengths.argmax())]
    size = find_micro_batch_size(
        run.accelerator, model, lambda size: data.collate([longest] * size),
        lambda plain, batch: compute_loss(plain, batch, data, args)[0].sum(), most=64, flag="--auto_batch_size",
        hint="--amp bf16, or a smaller model",
    )  # fmt: skip
    keep_choice(run, batch_size=size, auto_batch_size=False)
    return size


def evaluate(model: torch.nn.Module, data: Data, split: str, run: Run, args: Args) -> dict[str, np.ndarray]:
    """Classes [n], logits [n, G] and [n, C], and losses [n] of every clip once, in the order of the labels."""
    import torch

    dataset = data.splits[split]
    rows = EvaluationRows(
        run, model, dataset, data.collate, args.eval_batch_size, split, lengths=dataset.lengths,
        num_workers=args.num_workers,
    )  # fmt: skip
    model.eval()
    with torch.no_grad():
        for batch in rows:
            losses, output = compute_loss(model, batch, data, args)
            rows.add(gloss=batch["gloss"], cat=batch["cat"], losses=losses, gloss_logits=output.gloss_logits.float(),
                     cat_logits=output.cat_logits.float())  # fmt: skip
    return rows.gathered()


def score(found: dict[str, np.ndarray], data: Data, split: str, args: Args) -> dict[str, float]:
    """The metrics of what :func:`evaluate` found: of the glosses, the categories, and clips with occluded hands."""
    gloss = classification_metrics(found["gloss"], found["gloss_logits"], found["losses"])
    cat = classification_metrics(found["cat"], found["cat_logits"], found["losses"])
    metrics = {"loss": gloss.pop("loss"), "cat_accuracy": cat["accuracy"]}
    metrics |= {f"gloss_{name}": value for name, value in gloss.items()}
    metrics |= {f"cat_{name}": cat[name] for name in ("f1_macro", "f1_weighted")}
    if len(data.names["gloss"]) > 5:
        metrics["gloss_top5"] = top_k_accuracy(found["gloss"], found["gloss_logits"], 5)
    if (occluded := data.splits[split].occluded) is not None:
        right = found["gloss_logits"].argmax(axis=1) == found["gloss"]
        for name, rows in (("occluded", occluded), ("visible", ~occluded)):
            if rows.any():
                metrics[f"{name}_accuracy"] = float(right[rows].mean())
    return metrics


# ----------------------------------------------------------------------------------------------------------- output

USAGE = """
import numpy as np
import torch
from transformers import AutoModel

import accelerando.models.sign  # makes transformers know this model
from accelerando.data.sign_clips import normalise, read_clip

model = AutoModel.from_pretrained("{folder}").eval()
frames, mask = normalise(*read_clip("clip.npz", model.config.input_key), model.config.normalisation)
inputs = {{"frames": frames}} | ({{}} if mask is None else {{"mask": mask}})
output = model(**{{name: torch.from_numpy(values)[None] for name, values in inputs.items()}})
print(model.config.gloss_names[output.gloss_logits.argmax()])
"""

# The columns of --log_csv.
LOG_CSV = {
    "epoch": "epoch", "train_loss": "train_loss", "val_loss": "loss", "val_gloss_acc": "gloss_accuracy",
    "val_cat_acc": "cat_accuracy", "lr": "lr", "epoch_time": "seconds", "gpu_memory_allocated": "gpu_allocated_mb",
    "gpu_memory_reserved": "gpu_reserved_mb",
}  # fmt: skip


def write_beside_weights(folder: Path, run: Run, data: Data, args: Args) -> None:
    """What stands beside the saved weights: the model card."""
    usage = USAGE.format(folder=run.directory / "best")
    write_model_card(folder, run, "video-classification", None, usage, data_title(args))


def write_report(
    run: Run, model: torch.nn.Module, data: Data, found: dict[str, dict[str, np.ndarray]], args: Args
) -> None:
    """Results and report of the best weights; ``found``: what :func:`evaluate` found in each split. Main process."""
    metrics = {split: score(rows, data, split, args) for split, rows in found.items()}
    matrices = {
        head: results.write_class_reports(run, found, names, head, f"{head}_logits", head)
        for head, names in data.names.items()
    }
    for split, rows in found.items():  # of the glosses
        path, predicted = run.directory / f"predictions_{split}.csv", probabilities(rows["gloss_logits"])
        write_predictions(path, data.splits[split].names, data.names["gloss"], predicted, rows["gloss"])
    last = results.split_to_show(found)
    worst = worst_mistakes(found[last]["gloss"], found[last]["gloss_logits"], data.names["gloss"])
    for mistake in worst:
        mistake["text"] = data.splits[last].names[mistake["row"]]
    counts = {split: len(rows["gloss"]) for split, rows in found.items()}
    details = {f"{head}_names": names for head, names in data.names.items()}
    details |= {f"{head}_confusion_matrix": matrices[head][last].tolist() for head in data.names}
    details["calibration"], calibrated = results.write_calibration(run, found, last, "gloss", "gloss_logits", "gloss")
    results.write_results(run, model, metrics, counts, details)
    right = found[last]["gloss_logits"].argmax(axis=1) == found[last]["gloss"]
    categories = [data.names["cat"][label] for label in found[last]["cat"]]
    tiles = [
        (
            f"{last}, gloss",
            f"{100 * metrics[last]['gloss_accuracy']:.1f} %",
            f"{counts[last]:,} clips, {len(data.names['gloss'])} glosses",
        ),
        (
            f"{last}, category",
            f"{100 * metrics[last]['cat_accuracy']:.1f} %",
            f"{len(data.names['cat'])} categories",
        ),
    ]
    blocks = [
        *results.class_blocks(matrices["gloss"][last], data.names["gloss"], f"glosses, {last}"),
        *results.class_blocks(matrices["cat"][last], data.names["cat"], f"categories, {last}"),
        *calibrated,
        *slices_block(right, {"frames": data.splits[last].lengths, "category": categories}, f"glosses, {last}"),
        page.mistakes(worst, title=f"Worst mistakes, {last}"),
    ]
    lines = {"validation/gloss_accuracy": "gloss", "validation/cat_accuracy": "category"}
    curves = results.training_curves("Accuracy", lines)
    path = results.write_page(run, f"Sign recognition: {data_title(args)}", tiles, metrics, curves, blocks)
    log.info("Summary\n%s", results.write_summary(run, metrics))
    log.info("Report: %s", path)


# ------------------------------------------------------------------------------------------------------------- main


def check_args(args: Args) -> None:
    """What can be wrong before anything is loaded."""
    check_trackers(args.report_to)
    check_push(args.push_to_hub, args.hub_repo_id)
    if not args.smoke_test and "validation" in folders(args) and args.num_folds:
        raise UserError("--num_folds divides the training clips, but validation clips are named too: drop one")
    check_ranges(
        args, ema_decay=(0, 0.9999999), rotation=(0, 180), scale=(0, 0.99), shift=(0, 100), noise=(0, 100),
        time_warp=(0, 0.9), time_mask=(0, 0.9), frame_drop=(0, 0.9), mirror=(0, 1), dropout=(0, 0.999999),
        alpha=(0, 1e6), beta=(0, 1e6), curriculum_share=(0, 1), focal_gamma=(0, 100), label_smoothing=(0, 0.999),
        validation_fraction=(0, 0.9), num_folds=(2, 1000), num_gloss=(2, 2**20), num_cat=(1, 2**20),
        hidden_size=(2, 2**16), num_layers=(1, 1000), conv_kernel=(0, 999), num_attention_heads=(1, 1000),
        intermediate_size=(1, 2**20),
    )  # fmt: skip
    if args.log_csv and not (args.smoke_test or args.validation_fraction or "validation" in folders(args)):
        raise UserError("--log_csv: a row for each evaluation, but --validation_fraction 0 leaves none")
    if args.log_csv:
        check_can_be_made(Path(args.log_csv), "--log_csv")
    if not args.alpha and not args.beta:
        raise UserError("--alpha 0 --beta 0: neither head would learn anything")
    if args.num_workers and args.auto_workers:
        raise UserError("--auto_workers and --num_workers both say how many: drop one")


def data_title(args: Args) -> str:
    """A short name of the data: the training folder's own, or its parent's where that says no more than `train`."""
    if args.smoke_test:
        return "smoke"
    path = folders(args)["train"][0].absolute()
    return path.parent.name if path.name in ("train", "training", "clips") else path.name or "data"


def model_title(args: Args) -> str:
    """A short name of the model."""
    return args.model


def default_name(args: Args) -> str:
    """The run directory's name: what distinguishes runs that are likely to be compared."""
    fold = (f"fold{args.fold}",) if args.num_folds else ()
    settings = (f"bs{args.batch_size}", f"lr{args.lr:g}", *fold, f"seed{args.seed}")
    named = ("model", "batch_size", "lr", "fold", "seed")
    return default_run_name(args, data_title(args), model_title(args), *settings, named=named)


def main() -> None:
    args = parse_args(Args, ALIASES)
    check_args(args)
    directory = choose_directory(args, default_name(args))

    # Data, model and the run's folder.
    accelerator = make_accelerator(args.seed, args.amp, args.deterministic)
    data = load_data(args, accelerator)
    model = build_model(args, data, accelerator)
    run = start_run(accelerator, args, directory, METRICS, model_title(args), data.splits, data.names)
    here = {"GPU": accelerator.device.type == "cuda", "tools/extract_features.py": False}
    for line in without_effect(args, ONLY_WITH, **here):
        log.warning("%s", line)

    # What an optimizer step trains on: the same samples on any number of processes.
    train_data, batch_size = training_clips(args, data), choose_batch_size(model, data, run, args)
    if args.auto_workers:
        args.num_workers = choose_num_workers()
    batches = TrainBatches(
        train_data, data.collate, batch_size, args.gradient_accumulation_steps, args.seed, num_workers=args.num_workers,
        accelerator=accelerator, pin_memory=args.pin_memory,
    )  # fmt: skip
    plan_steps(run, batches)

    # Optimizer, schedule, averages; then back to where a resumed run was.
    optimizer = make_optimizer(
        model, args.optimizer, args.lr, args.weight_decay, (args.adam_beta1, args.adam_beta2), args.adam_epsilon,
        args.momentum, sharded=is_sharded(accelerator),
    )  # fmt: skip
    model, optimizer = prepare(accelerator, model, optimizer, args.compile_model)
    schedule = make_scheduler(
        optimizer.optimizer, args.scheduler, run.total_steps, args.warmup_steps, args.scheduler_factor,
        args.scheduler_patience, run.higher_is_better, args.scheduler_step_size * batches.num_windows(),
    )  # fmt: skip
    ema = Ema(optimizer, args.ema_decay)
    restore(run, model, optimizer, schedule, ema)
    hub = Hub(run, args)

    def save_weights(name: str) -> None:
        save_model_folder(
            accelerator, model, directory / name, lambda folder: write_beside_weights(folder, run, data, args)
        )

    def checkpoint() -> Path:
        hub.push_soon()
        return save(run, model, optimizer, schedule, ema)

    def validate() -> None:
        """Scores the validation clips, and keeps the weights in best/ if they are the best so far."""
        metrics = {}  # without validation clips the last weights count
        with averaged(ema):
            if "validation" in data.splits:
                found = evaluate(model, data, "validation", run, args)
                metrics = score(found, data, "validation", args)
            if record_evaluation(run, metrics, schedule):
                save_weights("best")
        results.write_summary(run, {"validation": metrics})
        if args.log_csv:
            results.write_table(run, args.log_csv, LOG_CSV)

    with stoppable(run, on_stop=checkpoint):
        if evaluation_is_due(run):
            validate()
            if run.is_over:
                checkpoint()
        for window in training_steps(run, batches):
            model.train()
            for batch in window:  # the micro-batches of one optimizer step
                with window.sync(model):
                    losses, _ = compute_loss(model, batch, data, args, run.state.step / run.total_steps)
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
