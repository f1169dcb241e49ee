"""Recognise signs: a Transformer over keypoints, or GRUs over precomputed Inception features.

Clips are NPZ files in a folder with a labels.csv (file, gloss, cat); see data/README.md. Two heads are trained, one for
the gloss and one for its category, with loss alpha * gloss + beta * category. The weights that are best on the
validation clips (gloss accuracy) are scored on the test clips.

  accelerate launch --config_file accelerate_configs/cpu.yaml scripts/sign_train.py --config configs/sign_wlasl50.yaml
  ... the same with accelerate_configs/multi_gpu.yaml (DDP) or accelerate_configs/fsdp.yaml (FSDP2)
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerando.base.config import check_ranges, parse_args, without_effect
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.train.optim import OptimizerName, SchedulerName


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
    validation_fraction: float = 0.1  # share of the training clips split off, stratified, without others; 0: none
    names_csv: str | None = None  # columns gloss, label, cat, category: names of the classes, for reports and answers
    kp_key: str = "X"  # transformer: array of the NPZ files
    feature_key: str = "X2048"  # iv3_gru: array of the NPZ files
    num_gloss: int | None = None  # glosses (default: as many as the labels have)
    num_cat: int | None = None  # categories (default: as many as the labels have)
    length_buckets: bool = True  # batches of clips of a like length: little padding
    balanced: bool = False  # every gloss is drawn equally often
    rotation: float = 0.0  # augmentation: up to so many degrees
    scale: float = 0.0  # augmentation: 0.2 is 0.8 to 1.2 times as large
    shift: float = 0.0  # augmentation: up to so many shoulder widths, in x and y
    noise: float = 0.0  # augmentation: standard deviation added to every coordinate
    time_warp: float = 0.0  # augmentation: 0.2 is up to 20 % faster or slower, unevenly
    time_mask: float = 0.0  # augmentation: the longest span that is hidden, as a share of the clip
    frame_drop: float = 0.0  # augmentation: probability that a frame is left out
    mirror: float = 0.0  # augmentation: probability that left and right change places
    cache_dir: str | None = None  # where packed clips are kept (default: $ACCELERANDO_CACHE or ~/.cache/accelerando)
    smoke_test: bool = False  # two epochs on clips made up on the spot: no data is needed
    # -- model --
    model: Literal["transformer", "iv3_gru"] = "transformer"  # of keypoints, or of Inception features
    normalisation: Literal["body", "standard", "none"] | None = None  # transformer: default body; iv3_gru: none
    velocities: bool = False  # transformer: the change since the frame before is an input too
    relative_hands: bool = False  # transformer: each hand from its wrist, in units of its size, is an input too
    use_mask: bool = False  # transformer: which points were seen is an input too
    hidden_size: int = 256  # transformer: width
    num_layers: int = 4  # transformer: layers
    num_attention_heads: int = 8  # transformer: heads
    intermediate_size: int = 1024  # transformer: feed-forward width
    conv_kernel: int = 0  # transformer: neighbours each frame is mixed with, by a convolution in each layer; 0: none
    pooling: Literal["mean", "max", "cls"] = "mean"  # transformer: how frames become one vector
    final_norm: bool = True  # transformer: a norm after the last layer
    gru_sizes: tuple[int, ...] = (16, 12)  # iv3_gru: widths of the GRUs, one after another
    dropout: float = 0.1  # in the layers and before the heads
    pretrained_backbone: bool = True  # tools/extract_features.py: Inception's own weights; nothing is read of it here
    # -- loss --
    alpha: float = 0.5  # weight of the gloss loss
    beta: float = 0.5  # weight of the category loss
    learned_weights: bool = False  # the weights are learned from the losses' uncertainty (Kendall et al. 2018)
    curriculum: Literal["none", "gloss_first", "category_first", "dynamic"] = "none"  # how the weights change
    curriculum_share: float = 0.3  # share of the steps that belongs to the first head alone
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"  # of each head
    focal_gamma: float = 2.0  # focal: how much sure answers count less
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    # -- training --
    epochs: int = 20  # passes over the training clips
    max_steps: int | None = None  # stop after this many optimizer steps, even if epochs are left
    batch_size: int = 32  # clips per process and micro-batch
    auto_batch_size: bool = False  # the largest batch that fits and pays, up to 64, measured
    eval_batch_size: int = 64  # clips per process in evaluation
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    lr: float = 1e-4  # peak learning rate
    weight_decay: float = 0.0  # on matrices; biases and norms are spared
    optimizer: OptimizerName = "adamw"  # 8-bit and paged ones come from bitsandbytes
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.999  # decay of the second moment
    adam_epsilon: float = 1e-8  # term that keeps the division finite
    momentum: float = 0.9  # sgd: Nesterov momentum
    scheduler: SchedulerName = "constant"  # how the rate changes over the optimizer steps
    scheduler_patience: int = 5  # plateau: evaluations without improvement before the rate falls
    scheduler_step_size: int = 7  # step: epochs from one fall of the rate to the next
    scheduler_factor: float = 0.5  # plateau, step: what the rate is multiplied by when it falls
    warmup_steps: float = 0.0  # optimizer steps of linear warm-up; below 1, a share of all steps
    grad_clip: float | None = None  # largest gradient norm; None: not clipped
    ema_decay: float | None = None  # average the weights over the steps and evaluate the average: 0.999, say
    amp: Literal["auto", "no", "bf16", "fp16"] | None = None  # precision; auto: bf16 if it is fast (default: launch's)
    compile_model: bool = False  # torch.compile
    deterministic: bool = False  # GPU: only kernels that give the same bits each time, slower where convolutions are
    best_metric: Literal["gloss_accuracy", "cat_accuracy", "gloss_f1_macro", "loss"] = "gloss_accuracy"  # of the best
    early_stop: int | None = None  # evaluations without improvement before the run ends
    early_stop_min_delta: float = 0.0  # what counts as an improvement
    eval_every: int = 0  # optimizer steps between evaluations; 0: every epoch
    num_workers: int = 0  # processes that prepare batches
    auto_workers: bool = False  # as many as there are cores to spare, up to 8
    pin_memory: bool = True  # GPU: page-locked batches, which are copied faster
    seed: int = 42  # of weights, order, augmentation and dropout
    # -- output --
    output_dir: str = "runs"  # folder of the run directories
    run_name: str | None = None  # name of this one (default: data set, model, batch and seed)
    overwrite: bool = False  # start again where a run of this name exists
    resume: str | None = None  # go on with a run: its folder, or no value for the one this command made
    save_every: int = 0  # optimizer steps between checkpoints; 0: every epoch
    keep_checkpoints: int = 2  # how many checkpoints stay
    log_every: int = 50  # optimizer steps between lines of the log
    log_csv: str | None = None  # a table with a row for each evaluation, for a spreadsheet
    report_on_train: bool = False  # score the best weights on the training clips too
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


# Other spellings, the guide's and the shared ones.
ALIASES = {
    "train_file": "labels_train_csv",
    "validation_file": "labels_val_csv",
    "test_file": "labels_test_csv",
    "architecture": "model",
}


# ------------------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """Packed clips of the splits and the names of the classes."""

    splits: dict[str, Any]  # train, validation and perhaps test: data.sign_clips.ClipTable
    names: dict[str, list[str]]  # of the heads gloss and cat
    key: str
    normalisation: str


def load_data(args: Args, accelerator: Any) -> Data:
    from accelerando.base.files import cache_folder
    from accelerando.base.log import log
    from accelerando.base.processes import main_process_first
    from accelerando.data.sign_clips import class_names, made_up_clips, pack_clips
    from accelerando.data.sign_labels import label_problems, read_labels, report_problems
    from accelerando.data.splits import stratified_split

    transformer = args.model == "transformer"
    key = args.kp_key if transformer else args.feature_key
    normalisation = args.normalisation or ("body" if transformer else "none")
    if args.smoke_test:
        splits = made_up_clips(156 if transformer else 2048, args.num_gloss or 105, args.num_cat or 10, args.seed)
        names = class_names(splits, Path(), None, args.num_gloss or 105, args.num_cat or 10)
        return Data(splits, names, key, "none" if normalisation == "body" else normalisation)

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
    if "validation" not in splits and args.validation_fraction:
        clips = splits["train"]
        kept, held_out = stratified_split(clips.gloss, args.validation_fraction, args.seed)
        splits = {**splits, "train": clips.take(kept), "validation": clips.take(held_out)}
    names = class_names(splits, folders(args)["train"][0], args.names_csv, args.num_gloss, args.num_cat)
    counts = ", ".join(f"{split} {len(clips):,}" for split, clips in splits.items())
    log.info("Clips: %s; %d glosses, %d categories", counts, len(names["gloss"]), len(names["cat"]))
    return Data(splits, names, key, normalisation)


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


# ------------------------------------------------------------------------------------------------------------ model


def build_model(args: Args, data: Data, accelerator: Any) -> Any:
    from accelerando.base.log import log
    from accelerando.data.sign_clips import channel_statistics
    from accelerando.models.cpu import speed_up_dropout
    from accelerando.models.sign import SignGru, SignGruConfig, SignTransformer, SignTransformerConfig
    from accelerando.train.accelerator import count_parameters

    mean = deviation = None
    if data.normalisation == "standard":
        mean, deviation = (values.tolist() for values in channel_statistics(data.splits["train"]))
    common = {
        "input_key": data.key, "input_width": data.splits["train"].width, "normalisation": data.normalisation,
        "channel_mean": mean, "channel_std": deviation, "gloss_names": data.names["gloss"],
        "cat_names": data.names["cat"], "dropout": args.dropout, "learned_weights": args.learned_weights,
    }  # fmt: skip
    if args.model == "transformer":
        shape = ("hidden_size", "num_layers", "num_attention_heads", "intermediate_size", "pooling", "final_norm",
                 "velocities", "relative_hands", "use_mask", "conv_kernel")  # fmt: skip
        model = SignTransformer(SignTransformerConfig(**common, **{name: getattr(args, name) for name in shape}))
    else:
        model = SignGru(SignGruConfig(**common, gru_sizes=args.gru_sizes))
    if accelerator.device.type == "cpu" and not args.compile_model:
        speed_up_dropout(model)
    trainable, total = count_parameters(model)
    if trainable != total:
        raise RuntimeError(f"only {trainable} of {total} parameters would be trained")
    log.info("Model %s trains %s parameters", args.model, f"{total:,}")
    return model


# ------------------------------------------------------------------------------------------------ loss and evaluation


def compute_loss(model: Any, batch: dict[str, Any], args: Args, progress: float) -> tuple[Any, Any]:
    """Loss of each clip, [B], and the model's output; ``progress`` is the share of the steps that were taken."""
    output = model(**{name: batch[name] for name in ("frames", "attention_mask", "mask") if name in batch})
    gloss = class_loss(output.gloss_logits.float(), batch["gloss"], args)
    cat = class_loss(output.cat_logits.float(), batch["cat"], args)
    alpha, beta = loss_weights(args, progress)
    if output.log_variances is not None:  # Kendall, Gal and Cipolla 2018 (arXiv:1705.07115)
        variances = output.log_variances.float()
        alpha, beta = alpha * (-variances[0]).exp(), beta * (-variances[1]).exp()
        return alpha * gloss + beta * cat + variances.sum() / 2, output
    return alpha * gloss + beta * cat, output


def class_loss(logits: Any, labels: Any, args: Args) -> Any:
    """Cross-entropy of each row, [B], or the focal loss (Lin et al. 2017, arXiv:1708.02002)."""
    import torch

    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=args.label_smoothing)
    if args.loss == "focal":
        right = logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]
        losses = (1 - right) ** args.focal_gamma * losses
    return losses


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


def evaluate(model: Any, dataset: Any, collate: Any, run: Any, args: Args, what: str) -> dict[str, Any] | None:
    """Classes [n], logits [n, G] and [n, C], and losses [n] of every clip once, in order; None when stopped."""
    import torch

    from accelerando.base.log import progress_bar
    from accelerando.train.accelerator import unwrapped
    from accelerando.train.batches import evaluation_batches, gather_rows
    from accelerando.train.stop import stop_requested

    accelerator = run.accelerator
    batches = evaluation_batches(
        dataset, collate, args.eval_batch_size, lengths=dataset.lengths, num_workers=args.num_workers,
        num_processes=accelerator.num_processes, process_index=accelerator.process_index, device=accelerator.device,
    )  # fmt: skip
    model.eval()
    columns: dict[str, list[Any]] = {}
    with torch.no_grad(), progress_bar(len(dataset), 0, " clips", what) as bar:
        for batch in batches:
            losses, output = compute_loss(model, batch, args, 1.0)
            values = {name: batch[name] for name in ("index", "weight", "gloss", "cat")} | {"losses": losses}
            values |= {"gloss_logits": output.gloss_logits.float(), "cat_logits": output.cat_logits.float()}
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
            bar.update(len(losses) * accelerator.num_processes)
            if stop_requested(run):
                return None
    unwrapped(accelerator, model)  # FSDP: frees the gathered weights, which may be those of the average
    return gather_rows(accelerator, len(dataset), {name: torch.cat(parts) for name, parts in columns.items()})


# ------------------------------------------------------------------------------------------------------------- main

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


def check_args(args: Args) -> None:
    """What can be wrong before anything is loaded."""
    from accelerando.inference.hub import check_push
    from accelerando.train.run import choose_directory
    from accelerando.train.tracking import check_trackers

    check_trackers(args.report_to)
    check_push(args.push_to_hub, args.hub_repo_id)
    if not args.smoke_test:
        folders(args)
    choose_directory(args, default_name(args))
    check_ranges(
        args, ema_decay=(0, 0.9999999), rotation=(0, 180), scale=(0, 0.99), shift=(0, 100), noise=(0, 100),
        time_warp=(0, 0.9), time_mask=(0, 0.9), frame_drop=(0, 0.9), mirror=(0, 1), dropout=(0, 0.999999),
        alpha=(0, 1e6), beta=(0, 1e6), curriculum_share=(0, 1), focal_gamma=(0, 100), label_smoothing=(0, 0.999),
        validation_fraction=(0, 0.9), num_gloss=(2, 2**20), num_cat=(1, 2**20), hidden_size=(2, 2**16),
        num_layers=(1, 1000), conv_kernel=(0, 999), num_attention_heads=(1, 1000), intermediate_size=(1, 2**20),
    )  # fmt: skip
    if not (args.validation_fraction or args.smoke_test or "validation" in folders(args)):
        if args.early_stop or args.log_csv or args.scheduler == "plateau":
            flags = "--early_stop, --log_csv and --scheduler plateau"
            raise UserError(f"--validation_fraction 0: {flags} need validation clips")
        if "test" not in folders(args) and not args.report_on_train:
            hint = "give --labels_test_csv or --report_on_train"
            raise UserError(f"--validation_fraction 0: nothing would be scored; {hint}")
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
    """The run directory's name: what distinguishes runs that one tends to compare."""
    from accelerando.train.run import join_name

    settings = (f"bs{args.batch_size}", f"lr{args.lr:g}", f"seed{args.seed}")
    return join_name(data_title(args), model_title(args), *settings)


def main() -> None:
    args = parse_args(Args, ALIASES)
    check_args(args)

    import torch

    from accelerando.base.log import log, progress_bar, success
    from accelerando.data.collate import ClipCollate
    from accelerando.data.keypoints import WIDTH, ClipAugmentation
    from accelerando.data.sign_clips import TrainingClips
    from accelerando.inference.hub import push_folder
    from accelerando.report.metrics import sign_metrics
    from accelerando.report.model_card import write_model_card
    from accelerando.report.predictions import worst_mistakes
    from accelerando.report.results import (
        SIGN_METRICS,
        split_to_show,
        write_log_csv,
        write_sign_results,
        write_summary,
    )
    from accelerando.train.accelerator import (
        choose_sharded_layers,
        count_parameters,
        is_sharded,
        make_accelerator,
        seed_processes_apart,
    )
    from accelerando.train.autotune import choose_num_workers, find_micro_batch_size
    from accelerando.train.averages import Ema, averaged
    from accelerando.train.batches import TrainBatches
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
    from accelerando.train.run import finish_run, leave_after_stop, restore, save, start_run
    from accelerando.train.tracking import evaluations, record
    from accelerando.train.weights import load_trained_weights, save_model_folder

    accelerator = make_accelerator(args.seed, args.amp, args.deterministic)
    data = load_data(args, accelerator)
    model = build_model(args, data, accelerator)
    run = start_run(accelerator, args, default_name(args))
    state = run.state
    used = {name: args.model == name for name in ("transformer", "iv3_gru")}
    used |= {"focal": args.loss == "focal", "GPU": accelerator.device.type == "cuda"}
    used |= {"tools/extract_features.py": False}  # old commands name a backbone, which runs there alone
    for line in without_effect(args, used):
        log.warning("%s", line)

    clips, collate = data.splits["train"], ClipCollate(multiple_of=8 if args.compile_model else 1)
    centre = 0.0 if data.normalisation == "body" else 0.5
    augmentation = ClipAugmentation(
        args.rotation, args.scale, args.shift, args.noise, args.time_warp, args.time_mask, args.frame_drop, args.mirror,
        centre,
    )  # fmt: skip
    if clips.width != WIDTH and (args.rotation or args.shift or args.mirror):
        raise UserError(f"--rotation, --shift and --mirror need frames of {WIDTH} numbers; these have {clips.width}")
    dataset = TrainingClips(clips, augmentation, args.seed, args.balanced, args.length_buckets)
    batch_size = args.batch_size
    if args.auto_batch_size:
        longest = int(clips.lengths.argmax())
        batch_size = state.micro_batch_size or find_micro_batch_size(
            accelerator, model, lambda size: collate([clips[longest]] * size),
            lambda plain, batch: compute_loss(plain, batch, args, 1.0)[0].sum(), most=64, flag="--auto_batch_size",
            hint="--amp bf16, or a smaller model",
        )  # fmt: skip
        state.micro_batch_size = batch_size
    if args.auto_workers:
        args.num_workers = choose_num_workers()
    train_batches = TrainBatches(
        dataset, collate, batch_size, args.gradient_accumulation_steps, args.seed, num_workers=args.num_workers,
        num_processes=accelerator.num_processes, process_index=accelerator.process_index, device=accelerator.device,
        pin_memory=args.pin_memory,
    )  # fmt: skip
    total_steps = plan_steps(run, train_batches, args.epochs, args.max_steps)

    optimizer = make_optimizer(
        model, args.optimizer, args.lr, args.weight_decay, (args.adam_beta1, args.adam_beta2), args.adam_epsilon,
        args.momentum, sharded=is_sharded(accelerator),
    )  # fmt: skip
    if args.compile_model:
        model = torch.compile(model, dynamic=True)
    choose_sharded_layers(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    higher_is_better = args.best_metric != "loss"
    schedule = make_scheduler(
        optimizer.optimizer, args.scheduler, total_steps, args.warmup_steps, args.scheduler_factor,
        args.scheduler_patience, higher_is_better, args.scheduler_step_size * train_batches.num_windows(),
    )  # fmt: skip
    ema = Ema(optimizer, args.ema_decay) if args.ema_decay else None
    seed_processes_apart(args.seed, accelerator)
    restore(run, model, optimizer, schedule, ema)

    def write_beside_weights(folder: Path) -> None:
        usage = USAGE.format(folder=run.directory / "best")
        write_model_card(folder, run, "video-classification", None, metrics, usage)

    def save_weights(folder: Path) -> None:
        save_model_folder(accelerator, model, folder, write_beside_weights)

    def stop_here() -> None:
        leave_after_stop(run, save(run, model, optimizer, schedule, args.keep_checkpoints, ema))

    metrics = {name: row[name] for row in evaluations(run)[-1:] for name in SIGN_METRICS if name in row}

    def validate() -> bool:
        """Scores the validation clips, keeps the weights if they are the best so far; False when asked to stop."""
        if "validation" not in data.splits:  # none were held out: the last weights count
            state.evaluated_step = state.best_step = state.step
            if state.step == total_steps:
                with averaged(ema):
                    save_weights(run.directory / "best")
            write_summary(run, model_title(args), total_steps, {})
            return True
        with averaged(ema):
            found = evaluate(model, data.splits["validation"], collate, run, args, "validation")
        if found is None:
            return False
        metrics.update(sign_metrics(found, data.splits["validation"].occluded))
        value, train_loss = metrics[args.best_metric], take_train_loss(state)
        best = count_evaluation(state, value, args.early_stop_min_delta, higher_is_better)
        lr = optimizer.param_groups[0]["lr"]
        record(run, "validation", {"train_loss": train_loss, **metrics, "lr": lr, **speed(run)})
        schedule.evaluated(value)
        log.info("validation loss %.4f  gloss accuracy %.4f  category accuracy %.4f  (step %d, train loss %.4f)",
                 metrics["loss"], metrics["gloss_accuracy"], metrics["cat_accuracy"], state.step,
                 train_loss)  # fmt: skip
        if best:
            with averaged(ema):
                save_weights(run.directory / "best")
            success("New best %s %.4f, saved to %s", args.best_metric, value, run.directory / "best")
        write_summary(run, model_title(args), total_steps, {"validation": metrics})
        write_log_csv(run, args.log_csv)
        return True

    # A run that was stopped inside an evaluation goes on with it.
    if evaluation_was_stopped(state, args.eval_every, total_steps) and not validate():
        stop_here()

    checkpoint = None
    bar = progress_bar(total_steps, state.step, " steps", "training")
    while state.step < total_steps and not out_of_patience(state, args.early_stop):
        log.info("Epoch %d/%d", state.epoch + 1, args.epochs)
        clock = time.perf_counter()
        for window in train_batches.windows(state.epoch, state.position):
            model.train()
            loss_sum = torch.zeros((), device=accelerator.device)
            for number, batch in enumerate(window, start=1):
                with nullcontext() if number == len(window) else accelerator.no_sync(model):
                    losses, _ = compute_loss(model, batch, args, state.step / total_steps)
                    loss = (losses * batch["weight"]).sum()
                    # The mean over the samples of the whole window; DDP and FSDP average over processes.
                    accelerator.backward(loss * accelerator.num_processes / window.num_samples)
                loss_sum += loss.detach()
            norm = accelerator.clip_grad_norm_(model.parameters(), args.grad_clip or float("inf"))
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:  # fp16: the scaler met an overflow
                schedule.step()
            optimizer.zero_grad()
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
    if out_of_patience(state, args.early_stop):
        log.info("Stopped early: no better %s in %d evaluations", args.best_metric, args.early_stop)
        if checkpoint is None or checkpoint.name != f"step_{state.step:06d}":
            save(run, model, optimizer, schedule, args.keep_checkpoints, ema)

    save_weights(run.directory / "last")
    load_trained_weights(accelerator, model, run.directory / "best")
    scores = {}
    for split in ("validation", "test", *(["train"] if args.report_on_train else [])):
        if split in data.splits:
            scores[split] = evaluate(model, data.splits[split], collate, run, args, split)
            if scores[split] is None:
                leave_after_stop(run, run.checkpoints)
    if accelerator.is_main_process:
        last = split_to_show(scores)
        found = {split: sign_metrics(score, data.splits[split].occluded) for split, score in scores.items()}
        worst = worst_mistakes({"labels": scores[last]["gloss"], "logits": scores[last]["gloss_logits"]},
                               data.names["gloss"])  # fmt: skip
        for mistake in worst:
            mistake["text"] = data.splits[last].names[mistake["row"]]
        trainable, parameters = count_parameters(model)
        report = write_sign_results(
            run, model_title(args), f"Sign recognition: {data_title(args)}", data.names, scores, found, worst,
            {"parameters": parameters, "trainable_parameters": trainable}, total_steps,
        )  # fmt: skip
        log.info("Summary\n%s", (run.directory / "summary.txt").read_text(encoding="utf-8"))
        log.info("Report: %s", report)
        if args.push_to_hub:
            best = run.directory / "best"
            success("Pushed %s to %s", best, push_folder(best, args.hub_repo_id, args.hub_private))
    finish_run(run)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
