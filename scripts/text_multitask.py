# /// script
# requires-python = ">=3.11"
# dependencies = ["accelerando"]
# ///
"""Fine-tune one transformer on several text classification tasks at once: a shared encoder, a head for each task.

Each task has rows of text and label of its own, as scripts/text_classify.py takes them: one label a row, several, or
numbers. A micro-batch is of one task. best/ has a folder for each task that opens alone, as a classifier.

  accelerate launch --config_file accelerate_configs/cpu.yaml scripts/text_multitask.py --train_files a=a.csv b=b.csv
  ... the same with accelerate_configs/multi_gpu.yaml (DDP) or accelerate_configs/fsdp.yaml (FSDP2)
  python scripts/text_multitask.py --config configs/text_multitask.yaml    (one process, some seconds sooner)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from accelerando.base.config import by_name, check_ranges, numbers_by_name, parse_args, without_effect
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import cache_folder
from accelerando.base.log import log
from accelerando.base.processes import main_process_first
from accelerando.data.collate import TextCollate
from accelerando.data.mixture import Mixture, Sampling
from accelerando.data.splits import stratified_split
from accelerando.data.tables import ProblemType, TextTable, encode_labels, label_names, read_text_table
from accelerando.data.targets import PROBLEM_TYPES, as_targets, strata
from accelerando.data.tokenizer import open_tokenizer
from accelerando.data.tokens import TokenTable, tokenize_table, warn_of_cut_texts
from accelerando.inference.hub import Hub, check_push
from accelerando.models.cpu import attention_for_cpu, speed_up_dropout
from accelerando.models.overrides import override_config
from accelerando.models.pretrained import class_labels, match_tokenizer, most_tokens, open_config, open_model, pads_left
from accelerando.models.text_windows import keep_windows
from accelerando.report import page, results, target_reports
from accelerando.report.metrics import classification_metrics
from accelerando.report.model_card import write_model_card
from accelerando.report.target_metrics import (
    best_thresholds,
    multi_label_metrics,
    regression_metrics,
    tuned_metrics,
)
from accelerando.train.accelerator import is_sharded, log_trained, make_accelerator, prepare
from accelerando.train.averages import Ema, averaged
from accelerando.train.batches import TrainBatches
from accelerando.train.class_losses import class_losses
from accelerando.train.evaluation import EvaluationRows, check_validation
from accelerando.train.gradients import step_is_repeated
from accelerando.train.loop import evaluation_is_due, finish_step, plan_steps, record_evaluation, training_steps
from accelerando.train.optim import OptimizerName, SchedulerName, make_optimizer, make_scheduler
from accelerando.train.run import choose_directory, default_run_name, finish_run, restore, save, short_name, start_run
from accelerando.train.state import Metric, Run
from accelerando.train.stop import stoppable
from accelerando.train.trackers import check_trackers
from accelerando.train.weights import load_trained_weights, save_model_folder

if TYPE_CHECKING:
    import numpy as np
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from accelerando.models.shared_encoder import SharedEncoder

    Found = dict[str, dict[str, np.ndarray]]  # by split: what `evaluate` found


@dataclass
class Args:
    # -- data --
    train_files: tuple[str, ...] = ()  # training rows of each task, as task=file: .json, .csv, ... or a `datasets` name
    validation_files: tuple[str, ...] = ()  # the same of validation rows; without, a share of the training rows
    test_files: tuple[str, ...] = ()  # the same of test rows, scored once at the end with the best weights
    validation_fraction: float = 0.1  # share of training rows held out, stratified, without validation rows; 0: none
    text_column: tuple[str, ...] = ("text",)  # column of the text; here and below for all tasks, or as task=column
    text_pair_column: tuple[str, ...] = ()  # column of a second text, for pairs
    label_column: tuple[str, ...] = ("label",)  # column of the label: names, whole numbers, lists of them; numbers
    label_delimiter: tuple[str, ...] = ()  # what separates several labels of a row in label_column: "|", say
    label_columns: tuple[str, ...] = ()  # instead of label_column: task=a,b: columns of 0 and 1, or of numbers
    problem_type: tuple[str, ...] = ()  # single_label, multi_label or regression (default: found from the rows)
    max_length: int = 128  # tokens kept of each text
    length_buckets: bool = True  # texts of similar length share a batch: little padding
    sampling: Sampling = "proportional"  # a task's share of an epoch: as its rows; uniform: all the same; temperature
    sampling_temperature: float = 2.0  # sampling temperature: rows^(1/T); 1: proportional, high: uniform
    task_block: int = 32  # rows of a task after each other; a step of more rows than that has several tasks
    cache_dir: str | None = None  # where tokenized text is kept (default: $ACCELERANDO_CACHE or ~/.cache/accelerando)
    dataset_version: str | None = None  # tag or revision of the data, kept with the results: v1.2, say
    # -- model --
    model_name: str = "bert-base-uncased"  # folder or Hub name of the encoder that all tasks share
    models: tuple[str, ...] = ()  # instead of model_name: task=name, the same one for all tasks
    strategy: Literal["full", "head"] = "full"  # all, or the heads alone
    hidden_dropout_prob: float | None = None  # dropout (default: the model's own)
    attention_probs_dropout_prob: float | None = None  # dropout of attention weights
    classifier_dropout: float | None = None  # dropout before the heads
    # -- loss --
    task_weights: tuple[str, ...] = ()  # weights of the tasks' losses: trec=1 ag=0.5 (default: 1)
    uncertainty_weighting: bool = False  # they are multiplied by weights learned from the losses' uncertainty
    uncertainty_lr: float = 1e-2  # uncertainty_weighting: learning rate of the log variances
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    # -- training --
    epochs: int = 3  # passes over the training rows
    max_steps: int | None = None  # stop after this many optimizer steps, even if epochs are left
    batch_size: int = 32  # rows per process and micro-batch
    eval_batch_size: int = 64  # rows per process in evaluation
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    lr: float = 2e-5  # peak learning rate
    weight_decay: float = 0.01  # of matrices; biases and norms have none
    optimizer: OptimizerName = "adamw"  # 8-bit and paged ones come from bitsandbytes
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.999  # decay of the second moment
    adam_epsilon: float = 1e-8  # added to the denominator
    momentum: float = 0.9  # sgd: Nesterov momentum
    scheduler: SchedulerName = "linear"  # how the learning rate changes over the optimizer steps
    scheduler_patience: int = 2  # plateau: evaluations without improvement before the learning rate drops
    scheduler_step_size: int = 7  # step: epochs between drops of the learning rate
    scheduler_factor: float = 0.5  # plateau, step: factor of each drop of the learning rate
    warmup_steps: float = 0.0  # optimizer steps of linear warm-up; below 1, a share of all steps
    grad_clip: float | None = 1.0  # largest gradient norm; None: not clipped
    max_bad_steps: int = 5  # steps in a row without a finite gradient before the run ends
    overfit_batches: int | None = None  # for finding mistakes: train on these first batches alone, in each epoch
    find_lr: bool = False  # range test instead of training: 100 steps, a plot and a suggestion; the run is not touched
    inspect: bool = False  # log a table of the layers, and record the gradient norm of each
    ema_decay: float | None = None  # moving average of the weights, which is evaluated instead: 0.999, say
    amp: Literal["auto", "no", "bf16", "fp16"] | None = None  # precision; auto: bf16 where fast (default: launch's)
    compile_model: bool = False  # torch.compile
    deterministic: bool = False  # GPU: only kernels that give the same bits each time; slows convolutions
    best_metric: str = "mean"  # for best/: mean, loss, or one of a task's own, as trec.accuracy
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
    report_on_train: bool = False  # score the best weights on the training rows too
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


# The guide's spellings, and those of text_classify.py.
ALIASES = {
    "datasets": "train_files", "loss_weights": "task_weights", "val_files": "validation_files",
    "pretrained_model": "model_name", "dropout": "hidden_dropout_prob",
}  # fmt: skip

# Settings that matter only together with another one.
ONLY_WITH = {
    "sampling temperature": ("sampling_temperature",),
    "uncertainty_weighting": ("uncertainty_lr",),
    "GPU": ("deterministic", "pin_memory"),
}

# How each kind of target is scored, and by what weights may be chosen; the mean over tasks is that of the first ones.
SCORES = {"single_label": classification_metrics, "multi_label": multi_label_metrics, "regression": regression_metrics}
BEST_METRICS = {
    "single_label": ("accuracy", "f1_macro", "f1_weighted", "loss"),
    "multi_label": ("f1_macro", "f1_micro", "mAP", "subset_accuracy", "loss"),
    "regression": ("pearson", "spearman", "mse", "mae", "loss"),
}


# ------------------------------------------------------------------------------------------------------------- data


@dataclass
class Task:
    """One task: token tables of its splits, their texts (for the report), and the names of its labels or numbers."""

    name: str
    splits: dict[str, TokenTable] = field(default_factory=dict)  # train, and validation and test if there are any
    tables: dict[str, TextTable] = field(default_factory=dict)
    label_names: list[str] = field(default_factory=list)
    problem_type: ProblemType = "single_label"
    weight: float = 1.0  # of its loss
    thresholds: np.ndarray | None = None  # several labels: of each one's probability, [C], once they are chosen

    @property
    def metric(self) -> str:
        """The metric that counts in the mean over all tasks: trec.accuracy."""
        return f"{self.name}.{BEST_METRICS[self.problem_type][0]}"


@dataclass
class Data:
    """The tasks in the order of the heads, the rows of all of them by split, and what they share."""

    tasks: list[Task]
    splits: dict[str, Mixture]
    tokenizer: PreTrainedTokenizerBase
    collate: TextCollate


def load_data(args: Args, accelerator: Accelerator) -> Data:
    files = {split: by_name(f"{split}_files", getattr(args, f"{split}_files"))
             for split in ("train", "validation", "test")}  # fmt: skip
    if not files["train"]:
        raise UserError("--train_files is missing: task=file for each task, as a=data/train_a.json b=data/train_b.json")
    weights = numbers_by_name("task_weights", args.task_weights)
    for flag, named in (*((f"{split}_files", named) for split, named in files.items()), ("task_weights", weights)):
        for name in named:
            if name not in files["train"] or not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
                reason = "not in --train_files" if name not in files["train"] else "use letters, digits, - and _"
                raise UserError(f"--{flag}: task {name!r}: {reason}")
    loaded = []
    for name in files["train"]:
        task, labels = load_task(args, name, {split: named[name] for split, named in files.items() if name in named})
        task.weight = weights.get(name, 1.0)
        loaded.append((task, labels))
    with main_process_first(accelerator):
        tokenizer = open_tokenizer(args.model_name)
        tokenizer.model_max_length = args.max_length  # what is saved with it: texts are cut in use as in training
        for task, labels in loaded:
            task.splits = {
                split: tokenize_table(table, tokenizer, args.max_length, labels[split], cache_folder(args.cache_dir))
                for split, table in task.tables.items()
            }
    for task, _ in loaded:
        warn_of_cut_texts({f"{task.name}, {split}": table for split, table in task.splits.items()}, args.max_length)
        sizes = ", ".join(f"{split} {len(table):,}" for split, table in task.splits.items())
        outputs = ", ".join(task.label_names[:12]) + (" ..." * (len(task.label_names) > 12))
        log.info("%s (%s): %s; %d: %s", task.name, task.problem_type, sizes, len(task.label_names), outputs)
    tasks = [task for task, _ in loaded]
    check_best_metric(args, tasks)
    splits = {
        split: Mixture({task.name: task.splits[split] for task in tasks if split in task.splits})
        for split in ("train", "validation", "test")
        if any(split in task.splits for task in tasks)
    }
    collate = TextCollate(tokenizer.pad_token_id or 0, multiple_of=8 if args.compile_model else 1)
    return Data(tasks, splits, tokenizer, collate)


def load_task(args: Args, name: str, files: dict[str, str]) -> tuple[Task, dict[str, np.ndarray]]:
    """A task with its tables, not yet tokenized, and the labels of each split."""
    named = ("text_column", "text_pair_column", "label_column", "label_delimiter", "problem_type")
    columns = {flag: setting_of(getattr(args, flag), name) for flag in named}
    several = by_name("label_columns", args.label_columns).get(name)
    columns["label_columns"] = several.split(",") if several else ()
    if columns["problem_type"] not in (None, *SCORES):
        raise UserError(f"--problem_type {columns['problem_type']}: choose from {', '.join(SCORES)}")
    tables = {split: read_text_table(file, split=split, **columns) for split, file in files.items()}
    check_validation(args, tables, args.report_on_train)
    tables, problem_type = as_targets(tables, columns["problem_type"], columns["label_column"])
    names = label_names(tables["train"])
    if problem_type == "single_label" and len(names) < 2:
        raise UserError(f"{files['train']}: every row has the label {names[0]!r}; a classifier needs at least two")
    labels = {split: encode_labels(table, names) for split, table in tables.items()}
    if "validation" not in tables and args.validation_fraction:
        tables["train"].check_no_copies("split")
        of_rows = strata(labels["train"], problem_type)
        kept, held_out = stratified_split(of_rows, args.validation_fraction, args.seed)
        rows, codes = tables.pop("train"), labels.pop("train")
        tables = {"train": rows.take(kept), "validation": rows.take(held_out), **tables}
        labels = {"train": codes[kept], "validation": codes[held_out], **labels}
    return Task(name, tables=tables, label_names=names, problem_type=problem_type), labels


def setting_of(words: tuple[str, ...], task: str) -> str | None:
    """What ``words`` say of a task: ``task=value``, or else the value for all tasks."""
    own = [word.partition("=")[2] for word in words if word.startswith(f"{task}=")]
    return next(iter([*own, *(word for word in words if "=" not in word)]), None)


def check_best_metric(args: Args, tasks: list[Task]) -> None:
    """UserError for a metric that is not measured."""
    known = ["mean", "loss", *(f"{task.name}.{name}" for task in tasks for name in BEST_METRICS[task.problem_type])]
    if args.best_metric not in known:
        raise UserError(f"--best_metric {args.best_metric} is not measured: use one of {', '.join(known)}")


def training_rows(args: Args, data: Data) -> Mixture:
    """The training rows of all tasks in the order of each epoch."""
    parts = data.splits["train"].parts
    lengths = {name: table.lengths for name, table in parts.items()} if args.length_buckets else None
    rows = Mixture(parts, lengths, args.sampling, args.sampling_temperature, args.task_block)
    shares = zip(parts, rows.counts().tolist(), strict=True)
    log.info("Rows of an epoch: %s", ", ".join(f"{name} {count:,}" for name, count in shares))
    return rows


# ------------------------------------------------------------------------------------------------------------ model


def build_model(args: Args, data: Data, accelerator: Accelerator) -> SharedEncoder:
    from transformers import AutoModelForSequenceClassification

    from accelerando.models.shared_encoder import SharedEncoder

    on_cpu = accelerator.device.type == "cpu"
    models = {}
    for task in data.tasks:
        labels = class_labels(task.label_names) | {"problem_type": PROBLEM_TYPES[task.problem_type]}
        config = open_config(args.model_name, **labels)
        vars(config).pop("thresholds", None)  # of the labels that model_name was trained on
        keep_windows(config, None, "mean")
        override_config(config, args, has_weights=True)
        model = open_model(
            AutoModelForSequenceClassification, args.model_name, config, **attention_for_cpu(config, on_cpu)
        )
        match_tokenizer(model, data.tokenizer, args.model_name)
        models[task.name] = model
    data.collate.pad_token_id, data.collate.left = data.tokenizer.pad_token_id, pads_left(config)
    limit = most_tokens(model)
    if limit and args.max_length > limit:
        raise UserError(f"--max_length {args.max_length} exceeds the {limit} positions of {args.model_name}")
    model = SharedEncoder(models, args.uncertainty_weighting)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = args.strategy == "full" or name.startswith(("heads.", "log_variances"))
    if on_cpu and not args.compile_model:
        speed_up_dropout(model)
    log_trained(model, f"Strategy {args.strategy}")
    return model


# ------------------------------------------------------------------------------------------------ loss and evaluation


def compute_loss(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], data: Data, args: Args
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each row of a batch of one task, [B], in training weighted, and the logits, [B, C]."""
    import torch

    part = int(batch["part"][0])
    task = data.tasks[part]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    output = model(part, **inputs)
    logits = output.logits.float()
    if task.problem_type == "multi_label":
        binary = torch.nn.functional.binary_cross_entropy_with_logits
        losses = binary(logits, batch["labels"], reduction="none").mean(dim=1)
    elif task.problem_type == "regression":
        losses = torch.nn.functional.mse_loss(logits, batch["labels"], reduction="none").mean(dim=1)
    else:
        losses = class_losses(logits, batch["labels"], label_smoothing=args.label_smoothing)
    if not model.training:
        return losses, logits
    losses = task.weight * losses
    if output.log_variances is not None:  # Kendall, Gal and Cipolla 2018 (arXiv:1705.07115), equations 7 and 10
        variance = output.log_variances[part].float()
        losses = losses * (-variance).exp() * (0.5 if task.problem_type == "regression" else 1.0) + variance / 2
    return losses, logits


def evaluate(model: torch.nn.Module, data: Data, split: str, run: Run, args: Args) -> dict[str, np.ndarray]:
    """Of each task ``trec.labels`` [n] (of several labels or numbers [n, C]), ``trec.logits`` [n, C] and
    ``trec.losses`` [n] of every row once, in the order of the file."""
    import torch

    found = {}
    for part, task in enumerate(data.tasks):
        if split not in task.splits:
            continue
        dataset = task.splits[split]
        rows = EvaluationRows(
            run, model, dataset, data.collate, args.eval_batch_size, f"{split} {task.name}", lengths=dataset.lengths,
            num_workers=args.num_workers,
        )  # fmt: skip
        model.eval()
        with torch.no_grad():
            for batch in rows:
                losses, logits = compute_loss(model, {**batch, "part": torch.tensor([part])}, data, args)
                rows.add(labels=batch["labels"], logits=logits, losses=losses)
        found |= {f"{task.name}.{name}": values for name, values in rows.gathered().items()}
    return found


def of_task(found: dict[str, np.ndarray], task: Task) -> dict[str, np.ndarray]:
    """What :func:`evaluate` found of one task: labels, logits and losses; empty if it has no such split."""
    names = ("labels", "logits", "losses")
    return {name: found[f"{task.name}.{name}"] for name in names if f"{task.name}.{name}" in found}


def score(found: dict[str, np.ndarray], data: Data, split: str, args: Args) -> dict[str, float]:
    """The metrics of what :func:`evaluate` found: the means over the tasks, then those of each one."""
    metrics, means, losses = {}, [], []
    for task in data.tasks:
        if rows := of_task(found, task):
            own = SCORES[task.problem_type](rows["labels"], rows["logits"], rows["losses"])
            own |= tuned_metrics(rows["labels"], rows["logits"], task.thresholds)
            metrics |= {f"{task.name}.{name}": value for name, value in own.items()}
            means.append(metrics[task.metric])
            losses.append(own["loss"])
    return {"mean": sum(means) / len(means), "loss": sum(losses) / len(losses), **metrics}


def metrics_of(data: Data) -> tuple[Metric, ...]:
    """What is measured, in the order in which it is shown; a metric that `score` adds is shown after these."""
    shown = [Metric("mean", in_log=True), Metric("loss", in_log=True, higher_is_better=False)]
    for task in data.tasks:
        for name in BEST_METRICS[task.problem_type]:
            key, low = f"{task.name}.{name}", name in ("loss", "mse", "mae")
            shown.append(Metric(key, in_log=key == task.metric, higher_is_better=not low))
        averages = ("macro", "micro", "weighted")
        shown += [Metric(f"{task.name}.{name}_{kind}") for name in ("precision", "recall") for kind in averages]
    return tuple(shown)


# ----------------------------------------------------------------------------------------------------------- output

USAGE = """
from transformers import pipeline

classify = pipeline("text-classification", model="{folder}", top_k=None)
print(classify("some text"))
"""


def write_beside_weights(folder: Path, run: Run, data: Data, args: Args) -> None:
    """What stands beside the saved weights: tokenizer and model card, for each task too."""
    data.tokenizer.save_pretrained(folder)
    usage = USAGE.format(folder=run.directory / "best" / data.tasks[0].name)
    names = ", ".join(task.name for task in data.tasks)
    usage += f"# The tasks: {names}. From the Hub, a task is the subfolder of its name.\n"
    write_model_card(folder, run, "text-classification", args.model_name, usage, data_title(args))
    for task in data.tasks:
        data.tokenizer.save_pretrained(folder / task.name)
        metrics = {key: value for key, value in run.state.metrics.items() if key.startswith(f"{task.name}.")}
        metrics = {key.partition(".")[2]: value for key, value in metrics.items()}
        usage = USAGE.format(folder=run.directory / "best" / task.name)
        card = (folder / task.name, run, "text-classification", args.model_name, usage, task.name)
        write_model_card(*card, metrics)


def show_task(run: Run, task: Task, found: Found) -> tuple[dict[str, object], list[str]]:
    """Entries of results.json and blocks of the report; writes the reports of all of the task's splits."""
    own = {split: rows for split, every in found.items() if (rows := of_task(every, task))}
    last = results.split_to_show(own)
    how = (task.problem_type, task.label_names, task.thresholds)
    details, blocks, worst = target_reports.write_target_reports(run, own, last, *how, head=task.name)
    for mistake in worst:
        mistake["text"] = task.tables[last].text(mistake["row"])
    return details, [*blocks, page.mistakes(worst, title=f"Worst mistakes, {task.name}, {last}")]


def write_report(run: Run, model: torch.nn.Module, data: Data, found: Found, args: Args) -> None:
    """Results and report of the best weights; ``found``: what :func:`evaluate` found in each split. Main process."""
    for task in data.tasks:
        rows = of_task(found.get("validation", {}), task)
        if task.problem_type == "multi_label" and rows:
            task.thresholds = best_thresholds(rows["labels"], rows["logits"])
            target_reports.keep_thresholds(run.directory / "best" / task.name, task.label_names, task.thresholds)
    metrics = {split: score(rows, data, split, args) for split, rows in found.items()}
    last = results.split_to_show(found)
    shown = {task.name: show_task(run, task, found) for task in data.tasks}
    counts = {split: sum(len(of_task(rows, task).get("labels", ())) for task in data.tasks)
              for split, rows in found.items()}  # fmt: skip
    details = {name: entries for name, (entries, _) in shown.items()}
    results.write_results(run, model, metrics, counts, {"tasks": details})
    scored = {task.metric: "" for task in data.tasks if of_task(found[last], task)}
    tiles = results.metric_tiles(metrics[last], {"mean": f"over {len(scored)} tasks"} | scored, last)
    curves = results.training_curves("Tasks", {f"validation/{task.metric}": task.metric for task in data.tasks})
    blocks = [block for _, own in shown.values() for block in own]
    path = results.write_page(run, f"Text classification: {data_title(args)}", tiles, metrics, curves, blocks)
    log.info("Summary\n%s", results.write_summary(run, metrics))
    log.info("Report: %s", path)


# ------------------------------------------------------------------------------------------------------------- main


def check_args(args: Args) -> None:
    """What can be wrong before anything is loaded."""
    check_trackers(args.report_to)
    check_push(args.push_to_hub, args.hub_repo_id)
    if names := list(dict.fromkeys(by_name("models", args.models).values())):
        if names[1:]:
            raise UserError(
                f"--models {names[0]} and {names[1]}: the tasks share one encoder; name it with --model_name"
            )
        args.model_name = names[0]
    check_ranges(
        args, ema_decay=(0, 0.9999999), validation_fraction=(0, 0.9), label_smoothing=(0, 0.999),
        sampling_temperature=(1, 1e6), task_block=(1, 2**20), uncertainty_lr=(0, 10),
    )  # fmt: skip


def data_title(args: Args) -> str:
    """A short name of the data: those of the tasks."""
    return "-".join(by_name("train_files", args.train_files)) or "data"


def model_title(args: Args) -> str:
    """A short name of the model."""
    return short_name(args.model_name)


def default_name(args: Args) -> str:
    """The run directory's name: what distinguishes runs that are likely to be compared."""
    settings = (args.strategy, f"bs{args.batch_size}", f"lr{args.lr:g}", f"seed{args.seed}")
    named = ("model_name", "models", "strategy", "batch_size", "lr", "seed")
    return default_run_name(args, data_title(args), model_title(args), *settings, named=named)


def main() -> None:
    args = parse_args(Args, ALIASES)
    check_args(args)
    directory = choose_directory(args, default_name(args))

    # Data, model and the run's folder.
    accelerator = make_accelerator(args.seed, args.amp, args.deterministic)
    data = load_data(args, accelerator)
    rows = training_rows(args, data)
    model = build_model(args, data, accelerator)
    classes = {task.name: task.label_names for task in data.tasks}
    run = start_run(accelerator, args, directory, metrics_of(data), model_title(args), data.splits, classes)
    for line in without_effect(args, ONLY_WITH, GPU=accelerator.device.type == "cuda"):
        log.warning("%s", line)

    # What an optimizer step trains on: the same samples on any number of processes.
    batches = TrainBatches(
        rows, data.collate, args.batch_size, args.gradient_accumulation_steps, args.seed,
        num_workers=args.num_workers, accelerator=accelerator, pin_memory=args.pin_memory,
    )  # fmt: skip
    plan_steps(run, batches)

    # Optimizer, schedule, averages; then back to where a resumed run was.
    factors = {"log_variances": args.uncertainty_lr / args.lr} if args.uncertainty_weighting and args.lr else None
    optimizer = make_optimizer(
        model, args.optimizer, args.lr, args.weight_decay, (args.adam_beta1, args.adam_beta2), args.adam_epsilon,
        args.momentum, is_sharded(accelerator), factors=factors, plain_first=True,
    )  # fmt: skip
    plain = model
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
        """Scores the validation rows, and keeps the weights in best/ if they are the best so far."""
        metrics = {}  # without validation rows the last weights count
        with averaged(ema):
            if "validation" in data.splits:
                found = evaluate(model, data, "validation", run, args)
                metrics = score(found, data, "validation", args)
            further = {f"{name}.learned_weight": value for name, value in plain.learned_weights().items()}
            if record_evaluation(run, metrics, schedule, **further):
                save_weights("best")
        results.write_summary(run, {"validation": metrics})

    with stoppable(run, on_stop=checkpoint):
        if evaluation_is_due(run):
            validate()
            if run.is_over:
                checkpoint()
        for window in training_steps(run, batches):
            model.train()
            for batch in window:  # the micro-batches of one optimizer step, each of one task
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
