"""Fine-tune a text classifier: a transformer (all of it, its head, or LoRA) or a convolutional net.

Rows of text and label come from a JSON list, JSON lines, CSV, Parquet or a `datasets` name; see data/README.md.
Trained with cross-entropy; the weights that are best on the validation rows are scored on the test rows.

  accelerate launch --config_file accelerate_configs/cpu.yaml scripts/text_classify.py --config configs/text_trec.yaml
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
    train_file: str = ""  # training rows: .json, .jsonl, .csv, .tsv, .parquet or a `datasets` name
    validation_file: str | None = None  # validation rows; without them, validation_fraction of the training rows
    test_file: str | None = None  # test rows, scored once at the end with the best weights
    validation_fraction: float = 0.1  # share split off, stratified and seeded, without validation_file; 0: none
    text_column: str = "text"  # column of the text
    text_pair_column: str | None = None  # column of a second text, for pairs
    label_column: str = "label"  # column of the label: names or whole numbers
    max_length: int = 128  # tokens kept of each text
    length_buckets: bool = True  # batches of texts of a like length: little padding
    cache_dir: str | None = None  # where tokenised text is kept (default: $ACCELERANDO_CACHE or ~/.cache/accelerando)
    # -- model --
    architecture: Literal["transformer", "cnn"] = "transformer"  # transformer, or Kim's convolutional net
    model_name: str = "bert-base-uncased"  # transformer: folder or Hub name
    from_scratch: bool = False  # transformer: random weights, the shape from model_name's config
    tokenizer_name: str | None = None  # folder or Hub name (default: model_name's; the cnn trains one)
    tokenizer_type: Literal["wordpiece", "bpe"] = "wordpiece"  # what to train where there is no tokenizer
    strategy: Literal["full", "head", "lora"] = "full"  # what is trained: all, the head alone, LoRA and the head
    lora_r: int = 16  # lora: rank
    lora_alpha: float = 32.0  # lora: the adapters' scale is lora_alpha / lora_r
    lora_dropout: float = 0.05  # lora: dropout before the adapters
    lora_targets: tuple[str, ...] = ()  # lora: layers that get an adapter (default: query and value projections)
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
    # -- training --
    epochs: int = 3  # passes over the training rows
    max_steps: int | None = None  # stop after this many optimizer steps, even if epochs are left
    batch_size: int = 32  # rows per process and micro-batch
    eval_batch_size: int = 64  # rows per process in evaluation
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    lr: float = 2e-5  # peak learning rate
    weight_decay: float = 0.01  # on matrices; biases and norms are spared
    optimizer: OptimizerName = "adamw"  # 8-bit and paged ones come from bitsandbytes
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.999  # decay of the second moment
    adam_epsilon: float = 1e-8  # term that keeps the division finite
    momentum: float = 0.9  # sgd: Nesterov momentum
    scheduler: SchedulerName = "linear"  # how the rate changes over the optimizer steps
    scheduler_patience: int = 2  # plateau: evaluations without improvement before the rate falls
    scheduler_step_size: int = 7  # step: epochs from one fall of the rate to the next
    scheduler_factor: float = 0.5  # plateau, step: what the rate is multiplied by when it falls
    warmup_steps: float = 0.0  # optimizer steps of linear warm-up; below 1, a share of all steps
    grad_clip: float | None = 1.0  # largest gradient norm; None: not clipped
    ema_decay: float | None = None  # average the weights over the steps and evaluate the average: 0.999, say
    amp: Literal["auto", "no", "bf16", "fp16"] | None = None  # precision; auto: bf16 if it is fast (default: launch's)
    compile_model: bool = False  # torch.compile
    deterministic: bool = False  # GPU: only kernels that give the same bits each time, slower where convolutions are
    best_metric: Literal["accuracy", "f1_macro", "f1_weighted", "loss"] = "accuracy"  # chooses the best weights
    early_stop: int | None = None  # evaluations without improvement before the run ends
    early_stop_min_delta: float = 0.0  # what counts as an improvement
    eval_every: int = 0  # optimizer steps between evaluations; 0: every epoch
    num_workers: int = 0  # processes that prepare batches
    seed: int = 42  # of weights, order and dropout
    # -- output --
    output_dir: str = "runs"  # folder of the run directories
    run_name: str | None = None  # name of this one (default: data set, model, strategy, batch and seed)
    overwrite: bool = False  # start again where a run of this name exists
    resume: str | None = None  # go on with a run: its folder, or no value for the one this command made
    save_every: int = 0  # optimizer steps between checkpoints; 0: every epoch
    keep_checkpoints: int = 2  # how many checkpoints stay
    log_every: int = 50  # optimizer steps between lines of the log
    report_on_train: bool = False  # score the best weights on the training rows too
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
    "pretrained_model": "model_name",
    "model.name": "run_name",
    "val_file": "validation_file",
    "dropout": "hidden_dropout_prob",
}


# ------------------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """Token tables of the splits, their texts (for the report), the label names and the tokenizer."""

    splits: dict[str, Any]  # train, validation and perhaps test: data.tokens.TokenTable
    tables: dict[str, Any]  # the same: data.tables.TextTable
    label_names: list[str]
    tokenizer: Any


def load_data(args: Args, accelerator: Any) -> Data:
    from accelerando.base.log import log
    from accelerando.base.processes import main_process_first
    from accelerando.data.splits import stratified_split
    from accelerando.data.tables import encode_labels, label_names, read_text_table
    from accelerando.data.tokens import tokenize_table

    if not args.train_file:
        raise UserError("--train_file is missing: a .json, .jsonl, .csv or .parquet file, or a `datasets` name")
    columns = {name: getattr(args, name) for name in ("text_column", "text_pair_column", "label_column")}
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    tables = {split: read_text_table(file, split=split, **columns) for split, file in files.items() if file}
    names = label_names(tables["train"])
    if len(names) < 2:
        raise UserError(f"{args.train_file}: every row has the label {names[0]!r}; a classifier needs at least two")
    if args.num_labels not in (None, len(names)):
        raise UserError(f"--num_labels {args.num_labels}, but {args.train_file} has {len(names)} labels")
    labels = {split: encode_labels(table, names) for split, table in tables.items()}
    if "validation" not in tables and args.validation_fraction:
        kept, held_out = stratified_split(labels["train"], args.validation_fraction, args.seed)
        tables = {"validation": tables["train"].take(held_out), **tables, "train": tables["train"].take(kept)}
        labels = {"validation": labels["train"][held_out], **labels, "train": labels["train"][kept]}

    with main_process_first(accelerator):
        tokenizer = load_tokenizer(args, tables["train"])
        cache = Path(args.cache_dir) if args.cache_dir else None
        splits = {
            split: tokenize_table(tables[split], tokenizer, args.max_length, labels[split], cache)
            for split in ("train", "validation", "test")
            if split in tables
        }
    counts = ", ".join(f"{split} {len(table):,}" for split, table in splits.items())
    log.info("Rows: %s; %d labels: %s", counts, len(names), ", ".join(names[:12]) + (" ..." * (len(names) > 12)))
    return Data(splits, tables, names, tokenizer)


def load_tokenizer(args: Args, train_table: Any) -> Any:
    from transformers import AutoTokenizer

    from accelerando.data.tokenizer import train_tokenizer

    name = args.tokenizer_name or (args.model_name if args.architecture == "transformer" else None)
    if name is None:
        return train_tokenizer(train_table.texts, args.tokenizer_type, args.vocab_size, max_length=args.max_length)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in {name}: {first_line(error)}") from None


# ------------------------------------------------------------------------------------------------------------ model


def build_model(args: Args, data: Data, accelerator: Any) -> Any:
    from accelerando.base.log import log
    from accelerando.models.cpu import speed_up_dropout
    from accelerando.train.accelerator import count_parameters
    from accelerando.train.lora import attach_lora

    on_cpu = accelerator.device.type == "cpu"
    labels = {
        "num_labels": len(data.label_names),
        "id2label": dict(enumerate(data.label_names)),
        "label2id": {name: number for number, name in enumerate(data.label_names)},
    }
    if args.architecture == "cnn":
        model = build_cnn(args, data, labels)
    else:
        model = build_transformer(args, data, labels, on_cpu)
    head = head_names(model)
    if args.strategy == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.split(".")[0] in head
    elif args.strategy == "lora":
        model = attach_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets, head)

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {
        "full": lambda name: True,
        "head": lambda name: name.split(".")[0] in head,
        "lora": lambda name: ".lora_" in name or ".modules_to_save." in name,
    }[args.strategy]
    wrong = [name for name, _ in model.named_parameters() if (name in trained) != expected(name)]
    if wrong or not trained:
        raise RuntimeError(f"strategy {args.strategy} trains the wrong parameters: {wrong[:3]}")
    if on_cpu and not args.compile_model:
        speed_up_dropout(model)
    trainable, total = count_parameters(model)
    log.info("Strategy %s trains %s of %s parameters (%.2f %%)", args.strategy, f"{trainable:,}", f"{total:,}",
             100 * trainable / total)  # fmt: skip
    return model


def build_transformer(args: Args, data: Data, labels: dict[str, Any], on_cpu: bool) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from accelerando.models.overrides import attention_for_cpu, override_config

    try:
        config = AutoConfig.from_pretrained(args.model_name, **labels)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name {args.model_name} cannot be opened: {first_line(error)}") from None
    override_config(config, args, has_weights=not args.from_scratch)
    if data.tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {args.model_name} has no padding token: set one and save it to a folder")
    config.pad_token_id = data.tokenizer.pad_token_id
    attention = attention_for_cpu(config, on_cpu)
    if args.from_scratch:
        config.vocab_size = max(len(data.tokenizer), 1)
        try:
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, **attention)
        except ValueError as error:
            raise UserError(f"{args.model_name}: {first_line(error)}") from None
    else:
        try:
            # float32 master weights whatever the checkpoint holds; mixed precision casts as it computes.
            model = AutoModelForSequenceClassification.from_pretrained(
                args.model_name, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, **attention
            )
        except (OSError, ValueError) as error:
            raise UserError(f"--model_name {args.model_name} cannot be loaded: {first_line(error)}") from None
    limit = getattr(config, "max_position_embeddings", None)
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if limit and getattr(positions, "padding_idx", None) is not None:  # RoBERTa counts from behind the padding's number
        limit -= positions.padding_idx + 1
    if limit and args.max_length > limit:
        raise UserError(f"--max_length {args.max_length} exceeds the {limit} positions of {args.model_name}")
    return model


def build_cnn(args: Args, data: Data, labels: dict[str, Any]) -> Any:
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


def head_names(model: Any) -> list[str]:
    """The top-level modules that are not the pretrained body: the classification head."""
    body = getattr(model, "base_model_prefix", "")
    if not body:  # the cnn
        return ["classifier"]
    return [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]


# ------------------------------------------------------------------------------------------------ loss and evaluation


def compute_loss(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Cross-entropy of each row, [B], and the logits, [B, C]."""
    import torch

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    logits = model(**inputs).logits.float()
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none"), logits


def evaluate(model: Any, dataset: Any, collate: Any, run: Any, args: Args, what: str) -> dict[str, Any] | None:
    """Labels [n], logits [n, C] and losses [n] of every row once, in the order of the file; None when stopped."""
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
    columns: dict[str, list[Any]] = {"index": [], "weight": [], "labels": [], "logits": [], "losses": []}
    with torch.no_grad(), progress_bar(len(dataset), 0, " rows", what) as bar:
        for batch in batches:
            losses, logits = compute_loss(model, batch)
            for name, values in {**batch, "losses": losses, "logits": logits}.items():
                if name in columns:
                    columns[name].append(values)
            bar.update(len(losses) * accelerator.num_processes)
            if stop_requested(run):
                return None
    unwrapped(accelerator, model)  # FSDP: frees the gathered weights, which may be those of the average
    return gather_rows(accelerator, len(dataset), {name: torch.cat(parts) for name, parts in columns.items()})


# ------------------------------------------------------------------------------------------------------------- main

USAGE = """
from transformers import pipeline

classify = pipeline("text-classification", model="{folder}", top_k=None)
print(classify("some text"))
"""


def check_args(args: Args) -> None:
    """What can be wrong before anything is loaded."""
    from accelerando.inference.hub import check_push
    from accelerando.train.run import choose_directory
    from accelerando.train.tracking import check_trackers

    check_trackers(args.report_to)
    check_push(args.push_to_hub, args.hub_repo_id)
    choose_directory(args, default_name(args))
    if args.architecture == "cnn" and args.strategy == "lora":
        raise UserError("--strategy lora adapts attention layers, which the cnn has not: use full or head")
    check_ranges(args, ema_decay=(0, 0.9999999), validation_fraction=(0, 0.9))
    if not args.validation_fraction and not args.validation_file:
        if args.early_stop or args.scheduler == "plateau":
            raise UserError("--validation_fraction 0: --early_stop and --scheduler plateau need validation rows")
        if not args.test_file and not args.report_on_train:
            raise UserError("--validation_fraction 0: nothing would be scored; give --test_file or --report_on_train")


def data_title(args: Args) -> str:
    """A short name of the data: the training file's own, or its folder's where that says no more than `train`."""
    path = Path(args.train_file)
    return path.parent.name if path.stem in ("train", "training") and path.parent.name else path.stem or "data"


def model_title(args: Args) -> str:
    """A short name of the model."""
    from accelerando.train.run import short_name

    return "cnn" if args.architecture == "cnn" else short_name(args.model_name)


def default_name(args: Args) -> str:
    """The run directory's name: what distinguishes runs that one tends to compare."""
    from accelerando.train.run import join_name

    settings = (args.strategy, f"bs{args.batch_size}", f"lr{args.lr:g}", f"seed{args.seed}")
    return join_name(data_title(args), model_title(args), *settings)


def text_of(table: Any, row: int) -> str:
    """The text (or pair of texts) of a row."""
    first = table.texts[row].as_py()
    return first if table.pairs is None else f"{first} / {table.pairs[row].as_py()}"


def main() -> None:
    args = parse_args(Args, ALIASES)
    check_args(args)

    import torch

    from accelerando.base.log import log, progress_bar, success
    from accelerando.data.collate import collate_text
    from accelerando.inference.hub import push_folder
    from accelerando.report.metrics import classification_metrics
    from accelerando.report.model_card import write_model_card
    from accelerando.report.predictions import worst_mistakes
    from accelerando.report.results import METRICS, split_to_show, write_classification_results, write_summary
    from accelerando.train.accelerator import (
        choose_sharded_layers,
        count_parameters,
        is_sharded,
        make_accelerator,
        seed_processes_apart,
    )
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
    cnn = args.architecture == "cnn"
    used = {"cnn": cnn, "transformer": not cnn, "transformer from scratch": args.from_scratch and not cnn}
    used |= {"GPU": accelerator.device.type == "cuda"}
    for line in without_effect(args, used | {"lora": args.strategy == "lora"}):
        log.warning("%s", line)

    collate = collate_text(data.tokenizer.pad_token_id or 0, multiple_of=8 if args.compile_model else 1)
    train_batches = TrainBatches(
        data.splits["train"], collate, args.batch_size, args.gradient_accumulation_steps, args.seed,
        lengths=data.splits["train"].lengths if args.length_buckets else None, num_workers=args.num_workers,
        num_processes=accelerator.num_processes, process_index=accelerator.process_index, device=accelerator.device,
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
        data.tokenizer.save_pretrained(folder)
        usage = USAGE.format(folder=run.directory / "best")
        if args.architecture == "cnn":
            usage = "import accelerando.models.text_cnn  # makes transformers know this model\n" + usage.lstrip()
        base_model = None if args.from_scratch or args.architecture == "cnn" else args.model_name
        write_model_card(folder, run, "text-classification", base_model, metrics, usage)

    def save_weights(folder: Path) -> None:
        save_model_folder(accelerator, model, folder, write_beside_weights)

    def stop_here() -> None:
        leave_after_stop(run, save(run, model, optimizer, schedule, args.keep_checkpoints, ema))

    metrics = {name: row[name] for row in evaluations(run)[-1:] for name in METRICS}

    def validate() -> bool:
        """Scores the validation rows, keeps the weights if they are the best so far; False when asked to stop."""
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
        metrics.update(classification_metrics(found["labels"], found["logits"], found["losses"]))
        value, train_loss = metrics[args.best_metric], take_train_loss(state)
        best = count_evaluation(state, value, args.early_stop_min_delta, higher_is_better)
        lr = optimizer.param_groups[0]["lr"]
        record(run, "validation", {"train_loss": train_loss, **metrics, "lr": lr, **speed(run)})
        schedule.evaluated(value)
        log.info("validation loss %.4f  accuracy %.4f  f1_macro %.4f  (step %d, train loss %.4f)",
                 metrics["loss"], metrics["accuracy"], metrics["f1_macro"], state.step, train_loss)  # fmt: skip
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
        clock = time.perf_counter()
        for window in train_batches.windows(state.epoch, state.position):
            model.train()
            loss_sum = torch.zeros((), device=accelerator.device)
            for number, batch in enumerate(window, start=1):
                with nullcontext() if number == len(window) else accelerator.no_sync(model):
                    losses, _ = compute_loss(model, batch)
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
            end_of_epoch, last_step = state.position == len(train_batches.dataset), state.step == total_steps
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
        worst = worst_mistakes(scores[last], data.label_names)
        for mistake in worst:
            mistake["text"] = text_of(data.tables[last], mistake["row"])
        trainable, parameters = count_parameters(model)
        report = write_classification_results(
            run, model_title(args), f"Text classification: {data_title(args)}", data.label_names, scores, worst,
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
