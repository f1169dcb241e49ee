# /// script
# requires-python = ">=3.11"
# dependencies = ["accelerando"]
# ///
"""Fine-tune a text classifier: a transformer (all of it, its head, or LoRA) or a convolutional net.

Rows of text and label come from a JSON list, JSON lines, CSV, Parquet or a `datasets` name; see data/README.md.
Trained with cross-entropy, or on several labels or numbers a row; the weights that are best on the validation rows are
scored on the test rows.

  accelerate launch --config_file accelerate_configs/cpu.yaml scripts/text_classify.py --config configs/text_trec.yaml
  ... the same with accelerate_configs/multi_gpu.yaml (DDP) or accelerate_configs/fsdp.yaml (FSDP2)
  python scripts/text_classify.py --config configs/text_trec.yaml    (one process, some seconds sooner)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from accelerando.base.config import check_ranges, parse_args, was_given, without_effect
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import cache_folder
from accelerando.base.log import log
from accelerando.base.processes import main_process_first
from accelerando.data.augment import NEED_SYNONYMS, AugmentedTexts, Technique, TextAugmentation
from accelerando.data.collate import TextCollate
from accelerando.data.curriculum import Curriculum, losses_of_predictions, rarity
from accelerando.data.mixing import MixedRows
from accelerando.data.splits import fold_split, stratified_split
from accelerando.data.tables import ProblemType, TextTable, encode_labels, label_names, read_text_table
from accelerando.data.targets import PROBLEM_TYPES, as_targets, strata
from accelerando.data.taught import all_texts, with_unlabelled
from accelerando.data.tokenizer import open_tokenizer, train_tokenizer
from accelerando.data.tokens import TokenTable, tokenize_table, warn_of_cut_texts
from accelerando.data.windows import Windows
from accelerando.inference.hub import Hub, check_push
from accelerando.models.cpu import attention_for_cpu, speed_up_dropout
from accelerando.models.mixing import mix_texts, token_inputs
from accelerando.models.neighbours import synonyms_of_texts
from accelerando.models.overrides import override_config
from accelerando.models.pretrained import (
    class_labels,
    head_names,
    match_tokenizer,
    most_tokens,
    open_config,
    open_model,
    pads_left,
)
from accelerando.models.student import copy_layers, keep_layers
from accelerando.models.text_windows import Pooling, keep_windows, pool_windows
from accelerando.report import page, results, target_reports
from accelerando.report.metrics import classification_metrics
from accelerando.report.model_card import write_model_card
from accelerando.report.predictions import probabilities, worst_mistakes, write_predictions
from accelerando.report.slices import slices_block
from accelerando.report.target_metrics import (
    best_thresholds,
    multi_label_metrics,
    regression_metrics,
    tuned_metrics,
)
from accelerando.train.accelerator import is_sharded, log_trained, make_accelerator, prepare
from accelerando.train.averages import Ema, averaged
from accelerando.train.batches import Rows, TrainBatches, first_batch
from accelerando.train.class_losses import (
    class_losses,
    inverse_frequency,
    log_frequency,
    mixed_loss,
    r_drop,
    twice,
)
from accelerando.train.distillation import (
    Teacher,
    distilled,
    hidden_distances,
    open_text_teacher,
    same_tokens,
    taught_rows,
    teacher_collate,
    teacher_folder,
)
from accelerando.train.evaluation import EvaluationRows, best_metric, check_validation
from accelerando.train.gradients import step_is_repeated
from accelerando.train.layerwise import layers_of, reinitialise, train_from
from accelerando.train.loop import evaluation_is_due, finish_step, plan_steps, record_evaluation, training_steps
from accelerando.train.lora import attach_lora
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
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Found = dict[str, dict[str, np.ndarray]]  # by split: what `evaluate` found


BestMetric = Literal[
    "accuracy", "f1_macro", "f1_weighted", "loss", "f1_micro", "mAP", "subset_accuracy", "pearson", "spearman",
    "mse", "mae",
]  # fmt: skip


@dataclass
class Args:
    # -- data --
    train_file: str = ""  # training rows: .json, .jsonl, .csv, .tsv, .parquet or a `datasets` name
    validation_file: str | None = None  # validation rows; without them, validation_fraction of the training rows
    test_file: str | None = None  # test rows, scored once at the end with the best weights
    unlabelled_file: str | None = None  # teacher: further training rows, without labels
    validation_fraction: float = 0.1  # share of train_file held out, stratified, without validation_file; 0: none
    num_folds: int | None = None  # cross-validation: train_file is divided into so many folds, stratified
    fold: int = 0  # num_folds: which one is validated on; the others are trained on
    group_column: str | None = None  # num_folds: rows of one value in this column stay together: author, say
    text_column: str = "text"  # column of the text
    text_pair_column: str | None = None  # column of a second text, for pairs
    label_column: str = "label"  # column of the label: names or whole numbers; lists of them; or a number
    label_delimiter: str | None = None  # what separates several labels of a row in label_column: "|", say
    label_columns: tuple[str, ...] = ()  # instead of label_column: a column of 0 and 1 for each label, or of numbers
    problem_type: ProblemType | None = None  # what is learned of each row (default: found from the training rows)
    slice_by: tuple[str, ...] = ()  # other columns: the report shows the accuracy for each of their values
    max_length: int = 128  # tokens kept of each text, or of a window
    window_stride: int | None = None  # longer texts: windows of max_length that begin every so many tokens; None: cut
    max_windows: int | None = 8  # window_stride: windows of a text at most; they cost time and memory like texts
    window_pooling: Pooling = "mean"  # window_stride: a text's logits are their mean or maximum over its windows
    length_buckets: bool = True  # texts of similar length share a batch: little padding
    balanced: bool = False  # every class is sampled equally often
    curriculum: str | None = None  # easy rows first: length, rarity, or by loss: a predictions.csv of tools/evaluate.py
    initial_difficulty: float = 0.3  # curriculum: share of the rows, the easiest ones, in the first epoch
    final_difficulty: float = 1.0  # curriculum: share of the rows at its end
    curriculum_epochs: int | None = None  # curriculum: epochs until its end (default: all)
    augment: tuple[Technique, ...] = ()  # training texts change in each epoch: synonym, insert, swap, delete
    augment_rate: float = 0.1  # augment: share of a text's words that are changed
    augment_share: float = 0.5  # augment: share of the training rows that are changed
    mixup: float = 0.0  # embeddings of two texts in one, shares from Beta(mixup, mixup): 0.2, say
    synonyms: str | None = None  # augment: table or WordNet folder (default: neighbours in model_name's embedding)
    cache_dir: str | None = None  # where tokenized text is kept (default: $ACCELERANDO_CACHE or ~/.cache/accelerando)
    dataset_version: str | None = None  # tag or revision of the data, kept with the results: v1.2, say
    # -- model --
    architecture: Literal["transformer", "cnn"] = "transformer"  # transformer, or Kim's convolutional net
    model_name: str = "bert-base-uncased"  # transformer: folder or Hub name
    from_scratch: bool = False  # transformer: random weights, the shape from model_name's config
    tokenizer_name: str | None = None  # folder or Hub name (default: model_name's; the cnn trains one)
    trust_remote_code: bool = False  # run Python files of the model's folder where it needs them
    tokenizer_type: Literal["wordpiece", "bpe"] = "wordpiece"  # what to train where there is no tokenizer
    strategy: Literal["full", "head", "gradual", "lora"] = "full"  # all, the head, the head and then more, LoRA
    unfreeze_every: int = 1  # gradual: epochs until the next layer below is trained too
    layer_decay: float = 1.0  # learning rate of a layer relative to the next one above: 0.75, say
    reinit_layers: int = 0  # transformer: last layers below the head that begin with random weights
    lora_r: int = 16  # lora: rank
    lora_alpha: float = 32.0  # lora: the adapters' scale is lora_alpha / lora_r
    lora_dropout: float = 0.05  # lora: dropout before the adapters
    lora_targets: tuple[str, ...] = ()  # lora: layers with an adapter, or all-linear (default: query and value)
    lora_rank_stabilised: bool = False  # lora: the scale is lora_alpha / sqrt(lora_r) (rsLoRA)
    lora_dora: bool = False  # lora: lengths of the weights' rows are learnt apart (DoRA)
    num_labels: int | None = None  # checked against the data
    hidden_size: int | None = None  # transformer from scratch: width
    num_layers: int | None = None  # transformer from scratch: layers
    num_attention_heads: int | None = None  # transformer from scratch: heads
    intermediate_size: int | None = None  # transformer from scratch: feed-forward width
    hidden_dropout_prob: float | None = None  # transformer: dropout (default: the model's own)
    attention_probs_dropout_prob: float | None = None  # transformer: dropout of attention weights
    classifier_dropout: float | None = None  # transformer: dropout before the head
    vocab_size: int = 30522  # cnn: size of the vocabulary that is trained
    embed_size: int = 128  # cnn: embedding width
    num_filters: int = 100  # cnn: filters of each size
    filter_sizes: tuple[int, ...] = (3, 4, 5)  # cnn: filter widths in tokens
    dropout_prob: float = 0.5  # cnn: dropout before the head
    # -- loss --
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    class_weights: bool = False  # weight each class by the inverse of its frequency
    focal_gamma: float = 0.0  # how strongly confident answers are discounted (focal loss): 2, say
    logit_adjustment: float = 0.0  # rare classes: how strongly frequent ones are held back in training: 1, say
    r_drop: float = 0.0  # weight of the difference between two dropout masks: 1 to 5, say; twice the time
    # -- distillation --
    teacher: str | None = None  # learn from this classifier too: a run, or a folder; its classes have the same names
    temperature: float = 2.0  # teacher: what the logits of both are divided by, which shows unlikely classes
    distill_alpha: float = 0.5  # teacher: share of what it says in the loss; the labels have the rest
    student_layers: int | None = None  # teacher: start with so many of its layers, evenly spaced, and its embeddings
    student_vocab: int | None = None  # student_layers: train a tokenizer of so many tokens; embeddings become means
    match_hidden: float = 0.0  # teacher: weight of the difference of embeddings and layers, of the same tokens
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


# The guide's spellings that are not everybody's.
ALIASES = {
    "pretrained_model": "model_name",
    "model.name": "run_prefix",
    "val_file": "validation_file",
    "dropout": "hidden_dropout_prob",
    "augmentation.techniques": ("augment", {
        "synonym_replacement": "synonym", "random_insertion": "insert", "random_swap": "swap",
        "random_deletion": "delete",
    }),
    "augmentation.probability": "augment_rate",
    "teacher_model": "teacher",
    "alpha": "distill_alpha",
}  # fmt: skip

# Settings that need a single label of each row.
ONE_LABEL = ("label_smoothing", "class_weights", "focal_gamma", "logit_adjustment", "r_drop", "balanced")
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "lora_rank_stabilised", "lora_dora")
# Settings that matter only together with another one.
ONLY_WITH = {
    "architecture transformer": (
        "model_name", "from_scratch", "trust_remote_code", "hidden_dropout_prob", "attention_probs_dropout_prob",
        "classifier_dropout", "reinit_layers",
    ),
    "from_scratch": ("hidden_size", "num_layers", "num_attention_heads", "intermediate_size"),
    "architecture cnn": ("vocab_size", "embed_size", "num_filters", "filter_sizes", "dropout_prob"),
    "num_folds": ("fold", "group_column"),
    "window_stride": ("max_windows", "window_pooling"),
    "augment": ("augment_rate", "augment_share"),
    "augment synonym insert": ("synonyms",),
    "curriculum": ("initial_difficulty", "final_difficulty", "curriculum_epochs"),
    "strategy gradual": ("unfreeze_every",),
    "strategy lora": LORA,
    "teacher": ("temperature", "distill_alpha", "match_hidden"),
    "student_layers": ("student_vocab",),
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
    """Token tables of the splits, their texts (for the report), the names of labels or numbers, and the tokenizer."""

    splits: dict[str, TokenTable]  # train, and validation and test if there are any
    tables: dict[str, TextTable]
    label_names: list[str]
    class_counts: torch.Tensor | None  # training rows of each class, int64 [C]; None for several labels or numbers
    tokenizer: PreTrainedTokenizerBase
    collate: TextCollate
    problem_type: ProblemType = "single_label"
    thresholds: np.ndarray | None = None  # several labels: of each one's probability, [C], once they are chosen
    teacher: Teacher | None = None  # in training alone
    unlabelled: TextTable | None = None  # further training rows for the teacher's lessons


def load_data(args: Args, accelerator: Accelerator) -> Data:
    import torch

    if not args.train_file:
        raise UserError("--train_file is missing: a .json, .jsonl, .csv or .parquet file, or a `datasets` name")
    named = ("text_column", "text_pair_column", "label_column", "label_columns", "label_delimiter", "problem_type")
    columns = {name: getattr(args, name) for name in named}
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    beside = {"train": (*args.slice_by, *filter(None, [args.group_column]))}  # other columns of a file
    tables = {
        split: read_text_table(file, split=split, other_columns=beside.get(split, args.slice_by), **columns)
        for split, file in files.items()
        if file
    }
    check_validation(args, tables, args.report_on_train)
    tables, problem_type = as_targets(tables, args.problem_type, args.label_column)
    args.best_metric = best_metric(args, BEST_METRICS, problem_type)
    for name in ONE_LABEL if problem_type != "single_label" else ():
        if getattr(args, name):
            raise UserError(f"--{name} is for one label a row; these are {problem_type} targets")
    names = label_names(tables["train"])
    if problem_type == "single_label" and len(names) < 2:
        raise UserError(f"{args.train_file}: every row has the label {names[0]!r}; a classifier needs at least two")
    if args.num_labels not in (None, len(names)):
        raise UserError(f"--num_labels {args.num_labels}, but {args.train_file} has {len(names)} labels")
    labels = {split: encode_labels(table, names) for split, table in tables.items()}
    if "validation" not in tables and (args.num_folds or args.validation_fraction):
        tables["train"].check_no_copies("split")
        of_rows = strata(labels["train"], problem_type)
        if args.num_folds:
            kept, held_out = fold_split(of_rows, tables["train"].groups(args.group_column), args.num_folds, args.fold)
        else:
            kept, held_out = stratified_split(of_rows, args.validation_fraction, args.seed)
        rows, codes = tables.pop("train"), labels.pop("train")
        tables = {"train": rows.take(kept), "validation": rows.take(held_out), **tables}
        labels = {"train": codes[kept], "validation": codes[held_out], **labels}

    unlabelled = None
    if args.unlabelled_file:
        pair = args.text_pair_column
        unlabelled = read_text_table(
            args.unlabelled_file, text_column=args.text_column, text_pair_column=pair, require_labels=False
        )
    with main_process_first(accelerator):
        name = args.tokenizer_name or (args.model_name if args.architecture == "transformer" else None)
        if name and not args.student_vocab:
            tokenizer = open_tokenizer(name, args.trust_remote_code)
        else:
            texts, size = all_texts(tables["train"], unlabelled), args.student_vocab or args.vocab_size
            tokenizer = train_tokenizer(texts, args.tokenizer_type, size, max_length=args.max_length)
        cache = cache_folder(args.cache_dir)
        splits = {
            split: tokenize_table(table, tokenizer, args.max_length, labels[split], cache, windows_of(args))
            for split, table in tables.items()
        }
    warn_of_cut_texts(splits, args.max_length, windows_of(args))
    sizes = ", ".join(f"{split} {len(table):,}" for split, table in splits.items())
    what = "numbers" if problem_type == "regression" else "labels"
    log.info("Rows: %s; %d %s: %s", sizes, len(names), what, ", ".join(names[:12]) + (" ..." * (len(names) > 12)))
    log.info("Problem type: %s, the best weights by %s", problem_type, args.best_metric)
    collate = TextCollate(tokenizer.pad_token_id or 0, multiple_of=8 if args.compile_model else 1)
    collate.window = args.max_length if args.window_stride else None
    counts = None
    if problem_type == "single_label":
        counts = torch.bincount(torch.as_tensor(labels["train"]), minlength=len(names))
    return Data(splits, tables, names, counts, tokenizer, collate, problem_type, unlabelled=unlabelled)


def windows_of(args: Args) -> Windows | None:
    """How long texts are read; None: they are cut off."""
    return Windows(args.max_length, args.window_stride, args.max_windows) if args.window_stride else None


def training_rows(args: Args, data: Data, accelerator: Accelerator) -> Rows:
    """The training rows in the order of each epoch, with ``augment`` a share of them changed, with ``mixup`` mixed,
    with a teacher what it says of each, also of rows without labels."""
    table, rows = data.tables["train"], data.splits["train"]
    cache = cache_folder(args.cache_dir)
    if data.unlabelled:
        with main_process_first(accelerator):
            table, rows = with_unlabelled(table, rows.labels, data.unlabelled, data.tokenizer, args.max_length, cache)
        log.info("Rows without labels: %s", f"{len(data.unlabelled):,}")
    lengths, classes = rows.lengths if args.length_buckets else None, rows.labels if args.balanced else None
    curriculum = None
    if args.curriculum:
        if args.curriculum == "length":
            difficulty = rows.lengths
        elif args.curriculum == "rarity":
            difficulty = rarity(rows)
        else:
            difficulty = losses_of_predictions(args.curriculum, [data.label_names[label] for label in rows.labels])
        epochs = args.curriculum_epochs or args.epochs
        curriculum = Curriculum(difficulty, args.initial_difficulty, args.final_difficulty, epochs)
    if args.augment:
        with main_process_first(accelerator):
            synonyms = synonyms_of_texts(
                table, args.augment, args.synonyms, args.model_name, cache=cache,
                trust_remote_code=args.trust_remote_code,
            )  # fmt: skip
        change = TextAugmentation(args.augment, args.augment_rate, synonyms, args.seed)
        how = (data.tokenizer, args.max_length, change, args.augment_share, windows_of(args))
        rows = AugmentedTexts(table, rows, *how)
    if args.teacher:
        wanted = (data.problem_type, args.match_hidden > 0, args.trust_remote_code)
        data.teacher = open_text_teacher(args.teacher, data.label_names, accelerator, *wanted)
        data.collate.teacher = teacher_collate(data.teacher)
        settings = (args.max_length, args.eval_batch_size, cache)
        rows = taught_rows(rows, table, data.teacher, data.tokenizer, *settings)
    if args.mixup:
        rows = MixedRows(rows, args.mixup, args.seed)
    return Rows(rows, lengths, classes, curriculum)


# ------------------------------------------------------------------------------------------------------------ model


def build_model(args: Args, data: Data, accelerator: Accelerator) -> torch.nn.Module:
    on_cpu = accelerator.device.type == "cpu"
    labels = class_labels(data.label_names) | {"problem_type": PROBLEM_TYPES[data.problem_type]}
    if args.architecture == "cnn":
        model = build_cnn(args, data, labels)
    else:
        model = build_transformer(args, data, labels, on_cpu)
    keep_windows(model.config, windows_of(args), args.window_pooling)
    head = head_names(model)
    if args.strategy == "lora":
        kept = [name.rstrip(".") for name in head]
        lora = (args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets)
        lora = (*lora, args.lora_rank_stabilised, args.lora_dora)
        model = attach_lora(model, *lora, modules_to_save=kept)

    def is_trained(name: str) -> bool:
        if args.strategy == "lora":
            return ".lora_" in name or ".modules_to_save." in name
        return args.strategy != "head" or name.startswith(head)

    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_trained(name)
    if on_cpu and not args.compile_model:
        speed_up_dropout(model)
    if args.mixup:
        mix_texts(model)
    log_trained(model, f"Strategy {args.strategy}")
    return model


def build_transformer(args: Args, data: Data, labels: dict, on_cpu: bool) -> PreTrainedModel:
    from transformers import AutoModelForSequenceClassification

    config = open_config(args.model_name, args.trust_remote_code, **labels)
    vars(config).pop("thresholds", None)  # of the labels that model_name was trained on
    override_config(config, args, has_weights=not args.from_scratch)
    copied = keep_layers(config, args.student_layers) if args.student_layers else []
    other_tokens = bool(copied) and not same_tokens(data.tokenizer, data.teacher.tokenizer)
    if args.from_scratch or other_tokens:
        config.vocab_size = max(len(data.tokenizer), 1)
        config.pad_token_id = data.tokenizer.pad_token_id
    model = open_model(
        AutoModelForSequenceClassification, args.model_name, config, args.from_scratch or bool(copied),
        trust_remote_code=args.trust_remote_code, **attention_for_cpu(config, on_cpu),
    )  # fmt: skip
    if copied:
        tokenizers = (data.tokenizer, data.teacher.tokenizer) if other_tokens else None
        copy_layers(model, data.teacher.model, copied, data.teacher.order, tokenizers)
    if args.reinit_layers:
        reinitialise(model, head_names(model), args.reinit_layers)
    match_tokenizer(model, data.tokenizer, args.model_name)
    data.collate.pad_token_id, data.collate.left = data.tokenizer.pad_token_id, pads_left(config)
    limit = most_tokens(model)
    if limit and args.max_length > limit:
        raise UserError(f"--max_length {args.max_length} exceeds the {limit} positions of {args.model_name}")
    return model


def unfreeze(model: PreTrainedModel, args: Args, epoch: int) -> None:
    """Strategy gradual: trains one layer more, counted from the head, every ``unfreeze_every`` epochs."""
    layers = layers_of(model, head_names(model))
    count = min(len(layers), 1 + epoch // args.unfreeze_every)
    train_from(model, layers, count)
    log_trained(model, f"Strategy gradual, the last {count} of {len(layers)} layers")


def build_cnn(args: Args, data: Data, labels: dict) -> PreTrainedModel:
    from accelerando.models.text_cnn import TextCnnConfig, TextCnnForSequenceClassification

    config = TextCnnConfig(
        vocab_size=len(data.tokenizer),
        embed_size=args.embed_size,
        num_filters=args.num_filters,
        filter_sizes=list(args.filter_sizes),
        dropout_prob=args.dropout_prob,
        pad_token_id=data.tokenizer.pad_token_id,
        **labels,
    )
    return TextCnnForSequenceClassification(config)


# ------------------------------------------------------------------------------------------------ loss and evaluation


def compute_loss(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], data: Data, args: Args
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each row, [B], and the logits, [B, C]; of several labels or numbers the mean over them.

    In training with a teacher, what it says has its share of the loss.
    """
    import torch

    inputs = token_inputs(batch)
    two_passes = args.r_drop > 0 and model.training
    lesson = data.teacher.of_texts(batch) if data.teacher and model.training else None
    shown = {"output_hidden_states": True} if lesson and args.match_hidden else {}
    output = model(**(twice(inputs) if two_passes else inputs), **shown)
    logits = output.logits.float()
    if "windows" in batch:  # from here on a row of logits is a text again
        windows = torch.cat([batch["windows"]] * (2 if two_passes else 1))
        logits = pool_windows(logits, windows, args.window_pooling)
    weight = inverse_frequency(data.class_counts).to(logits) if args.class_weights else None
    prior = args.logit_adjustment * log_frequency(data.class_counts).to(logits) if args.logit_adjustment else None

    def own_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if data.problem_type == "multi_label":
            binary = torch.nn.functional.binary_cross_entropy_with_logits
            return binary(logits, labels, reduction="none").mean(dim=1)
        if data.problem_type == "regression":
            return torch.nn.functional.mse_loss(logits, labels, reduction="none").mean(dim=1)
        return class_losses(logits, labels, weight, args.label_smoothing, args.focal_gamma, prior)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        own = mixed_loss(lambda labels: own_loss(logits, labels), batch)
        if lesson is None:
            return own
        mix = (args.distill_alpha, args.temperature, data.problem_type, batch.get("labelled"))
        return distilled(own, logits, lesson.logits, *mix)

    losses, logits = r_drop(loss, logits, args.r_drop) if two_passes else (loss(logits), logits)
    if shown:
        apart = hidden_distances(output.hidden_states, lesson.hidden, batch["attention_mask"])
        losses = losses + args.match_hidden * apart
    return losses, logits


def evaluate(model: torch.nn.Module, data: Data, split: str, run: Run, args: Args) -> dict[str, np.ndarray]:
    """Labels [n] (of several labels or numbers [n, C]), logits [n, C] and losses [n] of every row once, in the order of
    the file."""
    import torch

    dataset = data.splits[split]
    rows = EvaluationRows(
        run, model, dataset, data.collate, args.eval_batch_size, split, lengths=dataset.lengths,
        num_workers=args.num_workers,
    )  # fmt: skip
    model.eval()
    with torch.no_grad():
        for batch in rows:
            losses, logits = compute_loss(model, batch, data, args)
            rows.add(labels=batch["labels"], logits=logits, losses=losses)
    return rows.gathered()


def score(found: dict[str, np.ndarray], data: Data, split: str, args: Args) -> dict[str, float]:
    """The metrics of what :func:`evaluate` found."""
    metrics = SCORES[data.problem_type](found["labels"], found["logits"], found["losses"])
    return metrics | tuned_metrics(found["labels"], found["logits"], data.thresholds)


# ----------------------------------------------------------------------------------------------------------- output

USAGE = """
from transformers import pipeline

classify = pipeline("text-classification", model="{folder}", top_k=None)
print(classify("some text"))
"""
WINDOWS = """
# A text of more than {size} tokens is cut off here; tools/predict.py reads it in windows, as in training.
"""
MEANING = {
    "multi_label": "# A score is the probability of a label, which counts from classify.model.config.thresholds on.\n",
    "regression": "# The scores are the numbers themselves.\n",
}


def write_beside_weights(folder: Path, run: Run, data: Data, args: Args) -> None:
    """What stands beside the saved weights: tokenizer and model card."""
    data.tokenizer.save_pretrained(folder)
    usage = USAGE.format(folder=run.directory / "best") + MEANING.get(data.problem_type, "")
    if args.window_stride:
        usage += WINDOWS.format(size=args.max_length).lstrip()
    if args.architecture == "cnn":
        usage = "import accelerando.models.text_cnn  # makes transformers know this model\n" + usage.lstrip()
    source = None if args.from_scratch or args.architecture == "cnn" else args.model_name
    write_model_card(folder, run, "text-classification", source, usage, data_title(args))


def show_classes(run: Run, data: Data, found: Found, last: str) -> target_reports.Shown:
    """Of one label a row: reports of all splits; of ``last`` the confusion matrix and the most confident mistakes."""
    matrices, rows = results.write_class_reports(run, found, data.label_names), found[last]
    calibration, calibrated = results.write_calibration(run, found, last)
    details = {"label_names": data.label_names, "confusion_matrix": matrices[last].tolist(), "calibration": calibration}
    table, labels = data.tables[last], [data.label_names[label] for label in rows["labels"]]
    columns = {"label": labels, "tokens": data.splits[last].lengths}
    columns |= {name: table.others[name].to_pylist() for name in (table.others.column_names if table.others else ())}
    slices = slices_block(rows["logits"].argmax(axis=1) == rows["labels"], columns, last)
    blocks = [*results.class_blocks(matrices[last], data.label_names, last), *calibrated, *slices]
    return details, blocks, worst_mistakes(rows["labels"], rows["logits"], data.label_names)


def write_report(run: Run, model: torch.nn.Module, data: Data, found: Found, args: Args) -> None:
    """Results and report of the best weights; ``found``: what :func:`evaluate` found in each split. Main process."""
    if data.problem_type == "multi_label" and "validation" in found:
        data.thresholds = best_thresholds(found["validation"]["labels"], found["validation"]["logits"])
        target_reports.keep_thresholds(run.directory / "best", data.label_names, data.thresholds)
    metrics = {split: score(rows, data, split, args) for split, rows in found.items()}
    last = results.split_to_show(found)
    if data.problem_type == "single_label":
        details, blocks, worst = show_classes(run, data, found, last)
    elif data.problem_type == "multi_label":
        details, blocks, worst = target_reports.show_labels(run, found, last, data.label_names, data.thresholds)
    else:
        details, blocks, worst = target_reports.show_numbers(run, found, last, data.label_names)
    for split, rows in found.items():
        texts = [data.tables[split].text(row) for row in range(len(data.tables[split]))]
        path = run.directory / f"predictions_{split}.csv"
        if data.problem_type == "single_label":
            predicted = probabilities(rows["logits"])
            write_predictions(path, texts, data.label_names, predicted, rows["labels"], of_texts=True)
        elif data.problem_type == "multi_label":
            target_reports.write_label_predictions(path, texts, rows, data.label_names, data.thresholds)
        else:
            target_reports.write_number_predictions(path, texts, rows, data.label_names)
    for mistake in worst:
        mistake["text"] = data.tables[last].text(mistake["row"])
    counts = {split: len(rows["labels"]) for split, rows in found.items()}
    results.write_results(run, model, metrics, counts, details)
    first, second = BEST_METRICS[data.problem_type][:2]
    shown = args.best_metric if args.best_metric != "loss" else first  # the loss has curves of its own
    outputs = f"{len(data.label_names)} {'classes' if data.problem_type == 'single_label' else 'outputs'}"
    notes = {first: f"{counts[last]:,} rows", second: outputs}
    tiles = results.metric_tiles(metrics[last], notes, last)
    blocks.append(page.mistakes(worst, title=f"Worst mistakes, {last}"))
    best = "min" if shown in ("mse", "mae") else "max"
    curves = results.training_curves(shown, {f"validation/{shown}": "validation"}, best)
    path = results.write_page(run, f"Text classification: {data_title(args)}", tiles, metrics, curves, blocks)
    log.info("Summary\n%s", results.write_summary(run, metrics))
    log.info("Report: %s", path)


# ------------------------------------------------------------------------------------------------------------- main


def check_args(args: Args) -> None:
    """What can be wrong before anything is loaded."""
    check_trackers(args.report_to)
    check_push(args.push_to_hub, args.hub_repo_id)
    if args.architecture == "cnn" and args.strategy == "lora":
        raise UserError("--strategy lora: --architecture cnn has no attention layers; use full or head")
    pretrained = args.architecture == "transformer" and not args.from_scratch
    if {*args.augment} & {*NEED_SYNONYMS} and not (args.synonyms or pretrained):
        raise UserError(f"--augment {' '.join(args.augment)}: without pretrained weights, name a table with --synonyms")
    check_ranges(
        args, ema_decay=(0, 0.9999999), validation_fraction=(0, 0.9), label_smoothing=(0, 0.999), focal_gamma=(0, 100),
        logit_adjustment=(0, 100), r_drop=(0, 1000), unfreeze_every=(1, 2**20), layer_decay=(0.001, 1),
        reinit_layers=(0, 4096), initial_difficulty=(0.001, 1), final_difficulty=(0.001, 1),
        curriculum_epochs=(1, 2**30), augment_rate=(1e-6, 1), augment_share=(0, 1), mixup=(0, 100),
        temperature=(0.01, 1000), distill_alpha=(0, 1), student_layers=(1, 4096), student_vocab=(8, 2**24),
        match_hidden=(0, 1000), num_folds=(2, 1000), window_stride=(1, 2**20), max_windows=(1, 2**20),
    )  # fmt: skip
    for one, other, reason in (
        ("num_folds", "validation_file", "the one divides the training rows, the other names the validation rows"),
        ("mixup", "teacher", "the teacher sees no mixed texts"),
        ("mixup", "compile_model", "compiled code does not see that embeddings are mixed"),
        ("window_stride", "mixup", "a text of several windows has no other one to be mixed with"),
        ("window_stride", "teacher", "the teacher reads texts that are cut off"),
        ("window_stride", "text_pair_column", "pairs have no windows"),
    ):
        if getattr(args, one) and getattr(args, other):
            raise UserError(f"--{one} and --{other}: {reason}; drop one")
    if args.balanced and args.curriculum:
        raise UserError("--balanced and --curriculum both choose the rows of an epoch: drop one")
    if args.layer_decay < 1 and args.strategy in ("head", "lora"):
        raise UserError(f"--layer_decay: --strategy {args.strategy} trains no layers as a whole: full or gradual do")
    if args.label_delimiter is not None and (args.label_columns or not args.label_delimiter):
        raise UserError(
            "--label_delimiter: the sign between labels in a cell; --label_columns has none, drop one of them"
        )
    check_distillation(args)


def check_distillation(args: Args) -> None:
    """What needs a teacher, and what a teacher needs; the model that a student with its layers starts from."""
    for name in ("unlabelled_file", "student_layers"):
        if getattr(args, name) and not args.teacher:
            raise UserError(f"--{name} needs a trained classifier, named with --teacher")
    folder = teacher_folder(args.teacher) if args.teacher else None
    if args.match_hidden and args.teacher and args.architecture == "cnn":
        raise UserError("--match_hidden compares the layers of transformers; --architecture cnn has none")
    if args.unlabelled_file and (args.balanced or args.curriculum not in (None, "length", "rarity")):
        flag = "balanced" if args.balanced else f"curriculum {args.curriculum}"
        raise UserError(f"--{flag} needs the label of every row, but those of --unlabelled_file have none")
    if args.student_layers:
        if args.architecture == "cnn" or args.from_scratch:
            flag = "from_scratch" if args.from_scratch else "architecture cnn"
            raise UserError(f"--student_layers copies layers of the teacher, --{flag} takes none: drop one")
        if was_given("model_name") and Path(args.model_name) != folder:
            raise UserError(f"--student_layers starts from {folder}, not from --model_name {args.model_name}: drop one")
        args.model_name = str(folder)


def data_title(args: Args) -> str:
    """A short name of the data: the training file's own, or its folder's where that says no more than `train`."""
    path = Path(args.train_file)
    return path.parent.name if path.stem in ("train", "training") and path.parent.name else path.stem or "data"


def model_title(args: Args) -> str:
    """A short name of the model."""
    return "cnn" if args.architecture == "cnn" else short_name(args.model_name)


def default_name(args: Args) -> str:
    """The run directory's name: what distinguishes runs that are likely to be compared."""
    fold = (f"fold{args.fold}",) if args.num_folds else ()
    settings = (args.strategy, f"bs{args.batch_size}", f"lr{args.lr:g}", *fold, f"seed{args.seed}")
    named = ("architecture", "model_name", "strategy", "batch_size", "lr", "fold", "seed")
    return default_run_name(args, data_title(args), model_title(args), *settings, named=named)


def main() -> None:
    args = parse_args(Args, ALIASES)
    check_args(args)
    directory = choose_directory(args, default_name(args))

    # Data, model and the run's folder.
    changing = args.strategy == "gradual"  # which parameters are trained changes with the epochs
    accelerator = make_accelerator(args.seed, args.amp, args.deterministic, changing)
    data = load_data(args, accelerator)
    rows = training_rows(args, data, accelerator)
    model = build_model(args, data, accelerator)
    sources = {**data.splits, "train": rows.samples, **({"teacher": data.teacher} if data.teacher else {})}
    run = start_run(accelerator, args, directory, METRICS, model_title(args), sources, {"label": data.label_names})
    for line in without_effect(args, ONLY_WITH, GPU=accelerator.device.type == "cuda"):
        log.warning("%s", line)

    # What an optimizer step trains on: the same samples on any number of processes.
    batches = TrainBatches(
        rows, data.collate, args.batch_size, args.gradient_accumulation_steps, args.seed,
        num_workers=args.num_workers, accelerator=accelerator, pin_memory=args.pin_memory,
    )  # fmt: skip
    plan_steps(run, batches)

    # Optimizer, schedule, averages; then back to where a resumed run was.
    layers = layers_of(model, head_names(model)) if args.layer_decay < 1 else ()
    optimizer = make_optimizer(
        model, args.optimizer, args.lr, args.weight_decay, (args.adam_beta1, args.adam_beta2), args.adam_epsilon,
        args.momentum, is_sharded(accelerator), layers, args.layer_decay,
    )  # fmt: skip
    plain = model
    model, optimizer = prepare(accelerator, model, optimizer, args.compile_model)
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
            outputs=lambda saved: compute_loss(saved, first_batch(data.splits["train"], data.collate), data, args)[1],
        )  # fmt: skip

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
            if record_evaluation(run, metrics, schedule):
                save_weights("best")
        results.write_summary(run, {"validation": metrics})

    with stoppable(run, on_stop=checkpoint):
        if evaluation_is_due(run):
            validate()
            if run.is_over:
                checkpoint()
        for window in training_steps(run, batches):
            if changing and window.starts_epoch:
                unfreeze(plain, args, run.state.epoch)
            model.train()
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
