"""Fine-tune CLIP (or SigLIP) on pairs of image and caption, with a contrastive batch as large as you like.

Pairs come from WebDataset shards (a folder, a brace pattern, s3://) or from a folder of images and a table of captions;
see data/README.md. The loss is taken over the whole effective batch: embeddings are gathered from all processes and all
micro-batches (GradCache), so 1,024 pairs in micro-batches of 64 have 1,023 negatives each, on one process or many. The
weights that are best on the validation pairs are scored on the test pairs, beside the model as it came.

  accelerate launch --config_file accelerate_configs/cpu.yaml scripts/clip_finetune.py --config configs/demo/clip.yaml
  ... the same with accelerate_configs/multi_gpu.yaml (DDP) or accelerate_configs/fsdp.yaml (FSDP2)
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerando.base.config import check_ranges, parse_args, without_effect
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.data.transforms import AugmentationName
from accelerando.train.losses import LossName, Pairs
from accelerando.train.optim import OptimizerName, SchedulerName

Scenario = Literal["zero_shot", "linear_probe", "dual_lora", "vision_lora", "text_lora", "full"]


@dataclass
class Args:
    # -- data --
    train_data: str | None = None  # shards (folder, a/{00..09}.tar, s3://...) or a table of captions
    validation_data: str | None = None  # the same, for choosing the best weights
    test_data: str | None = None  # the same, scored once at the end with the best weights
    data_dir: str | None = None  # instead of the three: a folder with train/, validation/ (or val/) and test/
    image_folder: str | None = None  # tables: folder of the images
    image_column: str = "image"  # tables: column of the image file
    caption_column: str = "caption"  # tables: column of the caption
    s3_bucket: str | None = None  # instead of train_data: an S3 bucket with shards
    s3_prefix: str = "data/train"  # s3: where the training shards are; validation: the same with val for train
    s3_validation_prefix: str | None = None  # s3: where the validation shards are
    cache_dir: str | None = None  # indexes and fetched shards (default: $ACCELERANDO_CACHE or ~/.cache/accelerando)
    cache_gb: float = 50.0  # fetched shards that are kept, in GB; 0: none, each pair is read where it lies
    mini_train: bool = False  # 256 training and 128 validation pairs, for a quick look
    augmentation: AugmentationName = "simple"  # of training pictures: none, simple (flip, crop), advanced
    class_field: str | None = None  # zero-shot classification: field of the .json with a picture's class
    class_names: tuple[str, ...] = ()  # zero-shot classification: the classes (default: those of the validation set)
    class_templates: tuple[str, ...] = ("a photo of a {}.",)  # zero-shot classification: captions of a class
    max_length: int | None = None  # tokens kept of a caption (default: what the model can take)
    # -- model --
    model_name: str = "openai/clip-vit-base-patch32"  # pretrained: folder or Hub name, of a LoRA adapter too
    adapter: str | None = None  # pretrained: LoRA adapter that is merged into model_name first
    from_scratch: bool = False  # random weights in the shape that follows, tokenizer trained on the captions
    image_size: int = 224  # from scratch: pixels of a side
    patch_size: int = 32  # from scratch: pixels of a patch
    vision_width: int = 768  # from scratch: width of the image tower
    vision_layers: int = 12  # from scratch: its layers
    text_width: int = 512  # from scratch: width of the text tower
    text_layers: int = 12  # from scratch: its layers
    projection_dim: int = 512  # from scratch: width of the embeddings
    vocab_size: int = 8192  # from scratch: size of the vocabulary that is trained
    attention_dropout: float | None = None  # dropout of attention weights (default: the model's own)
    scenario: Scenario = "dual_lora"  # what is trained
    lora_r: int = 16  # lora: rank
    lora_alpha: float = 32.0  # lora: the adapters' scale is lora_alpha / lora_r
    lora_dropout: float = 0.05  # lora: dropout before the adapters
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")  # lora: layers that get an adapter
    lock_image_tower: bool = False  # full: the image tower stays as it is (LiT)
    lock_text_tower: bool = False  # full: the text tower stays as it is
    train_logit_scale: bool | None = None  # the temperature too (default: with full, and with siglip)
    logit_scale_init: float | None = None  # start the temperature's factor here (default: the model's, 100 for CLIP)
    logit_bias_init: float = -10.0  # siglip: bias of the logits, for a model without one
    # -- training --
    epochs: int = 10  # passes over the training pairs
    max_steps: int | None = None  # stop after this many optimizer steps, even if epochs are left
    effective_batch_size: int = 1024  # pairs of one contrastive batch, over all processes: one optimizer step
    micro_batch_size: int = 0  # pairs that a process computes at once; 0: the most that fit
    eval_batch_size: int = 64  # pictures or captions per process in evaluation
    loss_batch_size: int = 64  # pairs of one contrastive batch in the validation loss, on any number of processes
    loss: LossName = "clip"  # softmax over the batch (clip) or sigmoid of each pair (siglip)
    mask_duplicates: bool = True  # the same caption or picture twice in a batch: not each other's negatives
    lr: float = 1e-4  # peak learning rate
    weight_decay: float = 0.1  # on matrices; biases, norms and the temperature are spared
    optimizer: OptimizerName = "adamw"  # 8-bit and paged ones come from bitsandbytes
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.98  # decay of the second moment
    adam_epsilon: float = 1e-6  # term that keeps the division finite
    momentum: float = 0.9  # sgd: Nesterov momentum
    scheduler: SchedulerName = "onecycle"  # how the rate changes over the optimizer steps
    scheduler_patience: int = 2  # plateau: evaluations without improvement before the rate falls
    scheduler_step_size: int = 7  # step: epochs from one fall of the rate to the next
    scheduler_factor: float = 0.5  # plateau, step: what the rate is multiplied by when it falls
    warmup_steps: float = 100.0  # optimizer steps of warm-up; below 1, a share of all steps
    grad_clip: float | None = 1.0  # largest gradient norm; None: not clipped
    ema_decay: float | None = None  # average the weights over the steps and evaluate the average: 0.999, say
    amp: Literal["auto", "no", "bf16", "fp16"] | None = None  # precision; auto: bf16 if it is fast (default: launch's)
    compile_model: bool = False  # torch.compile
    deterministic: bool = False  # GPU: only kernels that give the same bits each time, slower where convolutions are
    activation_checkpointing: bool = False  # compute activations twice to save memory
    best_metric: Literal["loss", "recall_mean"] = "loss"  # chooses the best weights
    early_stop: int | None = 2  # evaluations without improvement before the run ends
    early_stop_min_delta: float = 0.001  # what counts as an improvement
    eval_every: int = 0  # optimizer steps between evaluations; 0: every epoch
    wise_ft: tuple[float, ...] = ()  # at the end, score mixtures of old (0) and new (1) weights: 0 0.25 0.5 0.75 1
    num_workers: int = 4  # processes that prepare batches
    seed: int = 42  # of weights, order, augmentation and dropout
    # -- output --
    output_dir: str = "runs"  # folder of the run directories
    run_name: str | None = None  # name of this one (default: data set, model, scenario, batch and seed)
    overwrite: bool = False  # start again where a run of this name exists
    resume: str | None = None  # go on with a run: its folder, or no value for the one this command made
    enable_s3_checkpoints: bool = False  # keep checkpoints in the bucket too, and find them there
    s3_checkpoint_prefix: str = "checkpoints"  # s3: where in the bucket
    save_every: int = 0  # optimizer steps between checkpoints; 0: every epoch
    keep_checkpoints: int = 2  # how many checkpoints stay
    log_every: int = 10  # optimizer steps between lines of the log
    report_to: tuple[str, ...] = ("tensorboard",)  # tensorboard, wandb, mlflow, several of them, or none
    wandb_project: str = "clip-furniture-finetune"  # wandb: project
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
    "batch_size": "micro_batch_size",
    "train_file": "train_data",
    "validation_file": "validation_data",
    "test_file": "test_data",
    "val_data": "validation_data",
    "strategy": "scenario",
}


# ------------------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """Pairs of the splits, what their galleries are, and what turns pictures and captions into tensors."""

    sources: dict[str, Any]  # train, validation and perhaps test: data.shards.ShardPairs or data.folders.TablePairs
    galleries: dict[str, Any]  # validation and test: data.pairs.Gallery
    classes: dict[str, Any]  # the same, where class_field is given: the class of each picture
    class_names: list[str]
    preprocessing: Any  # models.clip.Preprocessing
    collate: Any


def load_data(args: Args, accelerator: Any) -> Data:
    from accelerando.base.files import cache_folder
    from accelerando.base.log import log
    from accelerando.base.processes import main_process_first
    from accelerando.data.collate import PairCollate
    from accelerando.data.pairs import FirstPairs, captions, class_names_of, image_classes, make_gallery, open_pairs
    from accelerando.models.clip import make_preprocessing, open_preprocessing

    with main_process_first(accelerator):  # which makes indexes and fetches what is remote
        cache = cache_folder(args.cache_dir)
        table = (args.image_folder, args.image_column, args.caption_column)
        sources = {split: open_pairs(where, cache, args.cache_gb, *table) for split, where in splits(args).items()}
        if args.mini_train:
            sources = {split: FirstPairs(pairs, 256 if split == "train" else 128) for split, pairs in sources.items()}
        galleries = {split: make_gallery(sources[split], split) for split in sources if split != "train"}
        if args.from_scratch:
            texts = captions(sources["train"])
            preprocessing = make_preprocessing(texts, args.vocab_size, args.image_size, args.max_length or 77)
        else:
            preprocessing = open_preprocessing(args.model_name, args.max_length)
    classes, names = {}, list(args.class_names)
    if args.class_field:
        pictures = {split: gallery.image_rows for split, gallery in galleries.items()}
        names = names or class_names_of(sources["validation"], pictures["validation"], args.class_field)
        classes = {split: image_classes(sources[split], pictures[split], args.class_field, names) for split in pictures}
    for split, pairs in sources.items():
        gallery = galleries.get(split)
        if gallery is None and args.scenario == "zero_shot":
            continue
        unique = f", {len(gallery.image_rows):,} pictures and {len(gallery.text_rows):,} captions" if gallery else ""
        log.info("Pairs for %s: %s%s", split, f"{len(pairs):,}", unique)
    multiple = 8 if args.compile_model else 1
    collate = PairCollate(preprocessing.tokenizer, preprocessing.max_length, multiple, preprocessing.full_length)
    return Data(sources, galleries, classes, names, preprocessing, collate)


def splits(args: Args) -> dict[str, str]:
    """Where the pairs of each split are: named one by one, in a bucket, or in the folders of data_dir."""
    named = {"train": args.train_data, "validation": args.validation_data, "test": args.test_data}
    if args.s3_bucket and args.data_dir and not args.train_data:
        raise UserError("--data_dir and --s3_bucket both name the data: drop one (or name --train_data as well)")
    if args.s3_bucket and not args.train_data:
        prefix = args.s3_prefix.strip("/")
        folder, _, name = prefix.rpartition("/")
        other = (args.s3_validation_prefix or f"{folder}/{name.replace('train', 'val')}").strip("/")
        if not args.validation_data and other == prefix:
            raise UserError(f"--s3_validation_prefix is missing: {prefix} has no `train` to put `val` for")
        named["train"] = f"s3://{args.s3_bucket}/{prefix}"
        named["validation"] = named["validation"] or f"s3://{args.s3_bucket}/{other}"
    elif args.data_dir:
        for split, names in {"train": ["train"], "validation": ["validation", "val"], "test": ["test"]}.items():
            there = [str(Path(args.data_dir) / name) for name in names if (Path(args.data_dir) / name).is_dir()]
            named[split] = named[split] or next(iter(there), None)
    if args.scenario == "zero_shot":  # which reads none
        named["train"] = named["train"] or named["validation"]
    for split in ("train", "validation"):
        if not named[split]:
            raise UserError(
                f"--{split}_data is missing: a folder of shards, a URL or a table of captions; tools/make_shards.py "
                "packs and splits pictures and captions"
            )
    return {split: where for split, where in named.items() if where}


# ------------------------------------------------------------------------------------------------------------ model

PROJECTIONS = ("visual_projection", "text_projection")


def build_model(args: Args, data: Data, accelerator: Any) -> Any:
    from accelerando.base.log import log
    from accelerando.models.clip import embed_in_forward, make_clip_model, make_trainable_scale, open_clip_model
    from accelerando.models.cpu import speed_up_dropout
    from accelerando.models.overrides import spell_out_attention
    from accelerando.train.accelerator import count_parameters
    from accelerando.train.lora import attach_lora

    on_cpu = accelerator.device.type == "cpu"

    if args.from_scratch:
        shape = (args.image_size, args.patch_size, args.vision_width, args.vision_layers, args.text_width,
                 args.text_layers, args.projection_dim, data.preprocessing.max_length)  # fmt: skip
        model = make_clip_model(data.preprocessing.tokenizer, *shape, args.attention_dropout or 0.0)
    else:
        model = open_clip_model(args.model_name, args.adapter)
        if args.attention_dropout is not None:
            for module in model.modules():
                if hasattr(module, "q_proj"):
                    module.dropout = args.attention_dropout
    make_trainable_scale(model, args.logit_scale_init, args.logit_bias_init if args.loss == "siglip" else None)
    if on_cpu and not args.compile_model:
        patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
        spell_out_attention(model, accelerator.mixed_precision, max(patches + 1, data.preprocessing.max_length))
    if args.activation_checkpointing:
        model.activation_checkpointing_enable()
    embed_in_forward(model)
    lora = (args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets)
    if args.scenario == "dual_lora":
        model = attach_lora(model, *lora, modules_to_save=[name for name in PROJECTIONS if hasattr(model, name)])
    elif args.scenario in ("vision_lora", "text_lora"):
        model = attach_lora(model, *lora, within=args.scenario.replace("lora", "model"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_trained(args, name)

    trainable, total = count_parameters(model)
    learns = any(parameter.requires_grad and "logit_" not in name for name, parameter in model.named_parameters())
    if not learns and args.scenario != "zero_shot":
        raise UserError(f"--scenario {args.scenario} finds nothing to train in {args.model_name}")
    if on_cpu and not args.compile_model:
        speed_up_dropout(model)
    log.info("Scenario %s trains %s of %s parameters (%.2f %%)", args.scenario, f"{trainable:,}", f"{total:,}",
             100 * trainable / total)  # fmt: skip
    for name, count in trained_parts(model).items():
        log.info("  %-30s %14s", name, f"{count:,}")
    return model


def is_trained(args: Args, name: str) -> bool:
    """Whether the scenario trains the parameter ``name``."""
    if "logit_scale" in name or "logit_bias" in name:
        always = args.scenario == "full" or (args.loss == "siglip" and args.scenario != "zero_shot")
        return always if args.train_logit_scale is None else args.train_logit_scale
    projection = any(part in name.split(".") for part in PROJECTIONS)
    if args.scenario == "full":
        locked = {"vision_model": args.lock_image_tower, "visual_projection": args.lock_image_tower}
        locked |= {"text_model": args.lock_text_tower, "text_projection": args.lock_text_tower}
        return not any(locked.get(part, False) for part in name.split("."))
    return {
        "zero_shot": False,
        "linear_probe": projection,
        "dual_lora": ".lora_" in name or (projection and ".modules_to_save." in name),
        "vision_lora": ".lora_" in name and "vision_model." in name,
        "text_lora": ".lora_" in name and "text_model." in name,
    }[args.scenario]


def trained_parts(model: Any) -> dict[str, int]:
    """Counts of the trained parameters: adapters by what they adapt, the rest by tower."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            words = [word for word in name.removeprefix("base_model.model.").split(".") if not word.isdigit()]
            adapted = f" {words[-4]} (LoRA)" if ".lora_" in name else ""
            part = words[0] + adapted
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


# ------------------------------------------------------------------------------------------------ loss and evaluation


def embed(model: Any, batch: dict[str, Any], data: Data) -> tuple[Pairs, Any, Any]:
    """The pairs of a micro-batch with their embeddings, exp(logit scale) and SigLIP's bias (or None)."""
    output = model(**model_inputs(batch, data))
    pairs = Pairs(output["image"], output["text"], batch["image_id"], batch["text_id"], batch["weight"])
    return pairs, output["scale"], output.get("bias")


def embeddings_loss(model: Any, batch: dict[str, Any], data: Data) -> Any:
    """A scalar of both embeddings: what the search for the largest micro-batch goes backward from."""
    output = model(**model_inputs(batch, data))
    return (output["image"] * output["text"].roll(1, 0)).sum()


def model_inputs(batch: dict[str, Any], data: Data) -> dict[str, Any]:
    """What the model takes of a batch: normalised pixels, tokens and their mask, as far as they are there."""
    from accelerando.data.transforms import normalise

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    if "pixel_values" in batch:
        images = data.preprocessing.image_processor
        inputs["pixel_values"] = normalise(batch["pixel_values"], images.image_mean, images.image_std)
    return inputs


def evaluate(model: Any, data: Data, split: str, run: Any, args: Args) -> dict[str, Any] | None:
    """Embeddings of every picture [I, d] and every caption [T, d] of a split once; None when stopped.

    ``readable`` [n] says which pairs count; ``prompts`` [C, d] are the classes' embeddings where there are any.
    """
    import numpy as np

    from accelerando.data.pairs import Captions, PairDataset, report_unreadable
    from accelerando.data.transforms import ImageTransform

    gallery = data.galleries[split]
    transform = ImageTransform(data.preprocessing.image_size, square=data.preprocessing.square)
    found: dict[str, Any] = {}
    for part, rows in (("image", gallery.image_rows), ("text", gallery.text_rows)):
        dataset = PairDataset(data.sources[split], transform, parts=part, rows=rows)
        columns = embed_all(model, dataset, part, data, run, args, f"{split} {part}s")
        if columns is None:
            return None
        found |= {part: columns[part], f"{part}_valid": columns["valid"] > 0, "scale": columns["scale"][0]}
        found["bias"] = columns["bias"][0] if "bias" in columns else None
    found["readable"] = found["image_valid"][gallery.image_of] & found["text_valid"][gallery.text_of]
    if not found["readable"].any():
        raise UserError(f"no pair of {split} can be read: {PairDataset(data.sources[split], transform).problem(0)}")
    if run.state.step == 0:
        pairs = PairDataset(data.sources[split], transform)
        report_unreadable(run.accelerator, pairs, split, np.flatnonzero(~found["readable"]))
    if split in data.classes:
        texts = [template.format(name) for name in data.class_names for template in args.class_templates]
        columns = embed_all(model, Captions(texts), "text", data, run, args, "class names")
        if columns is None:
            return None
        prompts = columns["text"].reshape(len(data.class_names), len(args.class_templates), -1).mean(axis=1)
        found["prompts"] = prompts / np.linalg.norm(prompts, axis=1, keepdims=True)
    return found


def embed_all(
    model: Any, dataset: Any, part: str, data: Data, run: Any, args: Args, what: str
) -> dict[str, Any] | None:
    """Embeddings of every sample once, in the order of ``dataset``, on every process; None when stopped."""
    import torch

    from accelerando.base.log import progress_bar
    from accelerando.train.accelerator import unwrapped
    from accelerando.train.batches import evaluation_batches, gather_rows
    from accelerando.train.stop import stop_requested

    accelerator = run.accelerator
    batches = evaluation_batches(
        dataset, data.collate, args.eval_batch_size, num_workers=min(args.num_workers, 2),
        num_processes=accelerator.num_processes, process_index=accelerator.process_index, device=accelerator.device,
    )  # fmt: skip
    model.eval()
    columns: dict[str, list[Any]] = {}
    with torch.no_grad(), progress_bar(len(dataset), 0, f" {part}s", what) as bar:
        for batch in batches:
            with accelerator.autocast():
                output = model(**model_inputs(batch, data))
            scalars = {name: output[name].expand(len(batch["index"])) for name in ("scale", "bias") if name in output}
            values = {name: batch[name] for name in ("index", "weight", "valid")} | {part: output[part]} | scalars
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
            bar.update(len(batch["index"]) * accelerator.num_processes)
            if stop_requested(run):
                return None
    unwrapped(accelerator, model)  # FSDP: frees the gathered weights, which may be those of the average
    return gather_rows(accelerator, len(dataset), {name: torch.cat(parts) for name, parts in columns.items()})


def score(found: dict[str, Any], data: Data, split: str, args: Args) -> dict[str, float]:
    """The metrics of what :func:`evaluate` found: loss, recall both ways, zero-shot accuracy."""
    import numpy as np

    from accelerando.report.metrics import contrastive_metrics, retrieval_metrics, zero_shot_metrics

    gallery, readable = data.galleries[split], found["readable"]
    # What cannot be read is in nobody's gallery.
    images, image_of = np.unique(gallery.image_of[readable], return_inverse=True)
    texts, text_of = np.unique(gallery.text_of[readable], return_inverse=True)
    pairs = (found["image"][images], found["text"][texts], image_of, text_of)
    temperature = (found["scale"], found["bias"])
    metrics = contrastive_metrics(*pairs, *temperature, args.loss, args.mask_duplicates, args.loss_batch_size)
    metrics |= retrieval_metrics(*pairs)
    if "prompts" in found:
        metrics |= zero_shot_metrics(found["image"], found["prompts"], data.classes[split], found["image_valid"])
    return metrics


# ------------------------------------------------------------------------------------------------------------- main

USAGE = """
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
inputs = processor(text=["a red chair"], images=[image], padding={padding}, return_tensors="pt")
print(model(**inputs).logits_per_image)
"""


def check_args(args: Args) -> None:
    """What can be wrong before anything is loaded."""
    from accelerando.inference.hub import check_push
    from accelerando.train.run import choose_directory
    from accelerando.train.tracking import check_trackers

    check_trackers(args.report_to)
    check_push(args.push_to_hub, args.hub_repo_id)
    splits(args)
    choose_directory(args, default_name(args))
    check_ranges(
        args, effective_batch_size=(2, 2**30), micro_batch_size=(0, 2**30), loss_batch_size=(2, 2**30),
        ema_decay=(0, 0.9999999), attention_dropout=(0, 0.999), logit_scale_init=(1e-3, 1e6), cache_gb=(0, 1e6),
        image_size=(8, 4096), patch_size=(2, 4096),
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
    if args.lock_image_tower and args.lock_text_tower:
        raise UserError("--lock_image_tower and --lock_text_tower together leave nothing to train")


def data_title(args: Args) -> str:
    """A short name of the data: the folder's or the bucket's own."""
    plain = ("", ".", "train", "validation", "val", "data")
    parts = [part for part in splits(args)["train"].split("/") if part not in plain]
    return (parts[-1] if parts else "").split(".")[0].split("{")[0] or "data"


def model_title(args: Args) -> str:
    """A short name of the model."""
    from accelerando.train.run import short_name

    return f"clip{args.vision_width}x{args.vision_layers}" if args.from_scratch else short_name(args.model_name)


def default_name(args: Args) -> str:
    """The run directory's name: what distinguishes runs that one tends to compare."""
    from accelerando.train.run import join_name

    settings = (args.scenario, f"bs{args.effective_batch_size}", f"lr{args.lr:g}", f"seed{args.seed}")
    return join_name(data_title(args), model_title(args), *settings)


def main() -> None:
    args = parse_args(Args, ALIASES)
    check_args(args)

    import torch

    from accelerando.base.log import log, progress_bar, success
    from accelerando.data.collate import PairCollate
    from accelerando.data.pairs import PairDataset, report_unreadable
    from accelerando.data.transforms import ImageTransform
    from accelerando.inference.hub import push_folder
    from accelerando.models.clip import saved_scale
    from accelerando.report.model_card import write_model_card
    from accelerando.report.results import (
        RETRIEVAL_METRICS,
        keep_examples,
        retrieval_examples,
        write_retrieval_results,
        write_summary,
    )
    from accelerando.train.accelerator import (
        choose_sharded_layers,
        count_parameters,
        is_sharded,
        make_accelerator,
        seed_processes_apart,
        unwrapped,
    )
    from accelerando.train.autotune import find_micro_batch_size
    from accelerando.train.averages import Ema, averaged, mix_weights, trained_weights
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
    from accelerando.train.losses import backward_contrastive, clamp_logit_scale
    from accelerando.train.optim import make_optimizer, make_scheduler
    from accelerando.train.run import finish_run, leave_after_stop, restore, save, start_run
    from accelerando.train.tracking import evaluations, record
    from accelerando.train.weights import load_trained_weights, save_model_folder

    accelerator = make_accelerator(args.seed, args.amp, args.deterministic)
    data = load_data(args, accelerator)
    model = build_model(args, data, accelerator)
    remote = f"s3://{args.s3_bucket}/{args.s3_checkpoint_prefix.strip('/')}" if args.enable_s3_checkpoints else None
    run = start_run(accelerator, args, default_name(args), remote)
    state = run.state
    used = {"from scratch": args.from_scratch, "full": args.scenario == "full", "siglip": args.loss == "siglip"}
    used |= {"tables": any(hasattr(pairs, "names") for pairs in data.sources.values())}
    used |= {"zero-shot classification": args.class_field is not None, "pretrained": not args.from_scratch}
    used |= {"s3": args.s3_bucket is not None, "GPU": accelerator.device.type == "cuda"}
    for line in without_effect(args, used | {"lora": args.scenario.endswith("lora")}):
        log.warning("%s", line)

    preprocessing, micro_batch_size = data.preprocessing, args.micro_batch_size or state.micro_batch_size
    mean = preprocessing.image_processor.image_mean
    augment = ImageTransform(preprocessing.image_size, args.augmentation, mean, False, preprocessing.square)
    dataset = PairDataset(data.sources["train"], augment, args.seed)
    if not micro_batch_size and args.scenario != "zero_shot":
        # Captions of the full length: what fits must fit for the longest.
        longest = PairCollate(preprocessing.tokenizer, preprocessing.max_length, full_length=True)
        micro_batch_size = find_micro_batch_size(
            accelerator, model, lambda size: longest([dataset.at(row % len(dataset), 0) for row in range(size)]),
            lambda plain, batch: embeddings_loss(plain, batch, data),
            most=-(-args.effective_batch_size // accelerator.num_processes),
        )  # fmt: skip
        state.micro_batch_size = micro_batch_size
    train_batches = TrainBatches(
        dataset, data.collate, max(1, micro_batch_size), seed=args.seed, effective_batch_size=args.effective_batch_size,
        num_workers=args.num_workers, num_processes=accelerator.num_processes,
        process_index=accelerator.process_index, device=accelerator.device,
    )  # fmt: skip
    total_steps = plan_steps(run, train_batches, args.epochs, args.max_steps)

    higher_is_better = args.best_metric != "loss"
    optimizer = schedule = ema = initial = None
    if args.scenario == "zero_shot":
        total_steps = 0
        model.to(accelerator.device)
    else:
        optimizer = make_optimizer(
            model, args.optimizer, args.lr, args.weight_decay, (args.adam_beta1, args.adam_beta2), args.adam_epsilon,
            args.momentum, sharded=is_sharded(accelerator),
        )  # fmt: skip
        if args.compile_model:
            model = torch.compile(model, dynamic=True)
        choose_sharded_layers(accelerator, model)
        model, optimizer = accelerator.prepare(model, optimizer)
        schedule = make_scheduler(
            optimizer.optimizer, args.scheduler, total_steps, args.warmup_steps, args.scheduler_factor,
            args.scheduler_patience, higher_is_better, args.scheduler_step_size * train_batches.num_windows(),
        )  # fmt: skip
        initial = trained_weights(unwrapped(accelerator, model), copy=True) if args.wise_ft else None
        ema = Ema(optimizer, args.ema_decay) if args.ema_decay else None
        seed_processes_apart(args.seed, accelerator)
        restore(run, model, optimizer, schedule, ema)
    logit_scale = unwrapped(accelerator, model).logit_scale

    def write_beside_weights(folder: Path) -> None:
        preprocessing.save(folder)
        padding = '"max_length"' if preprocessing.full_length else True
        usage = USAGE.format(folder=run.directory / "best", padding=padding)
        base_model = None if args.from_scratch else args.model_name
        write_model_card(folder, run, "zero-shot-image-classification", base_model, metrics, usage)

    def save_weights(folder: Path) -> None:
        plain = unwrapped(accelerator, model)
        save_model_folder(accelerator, model, folder, write_beside_weights, lambda state: saved_scale(plain, state))

    def stop_here() -> None:
        leave_after_stop(run, save(run, model, optimizer, schedule, args.keep_checkpoints, ema) if optimizer else None)

    metrics = {name: row[name] for row in evaluations(run)[-1:] for name in RETRIEVAL_METRICS if name in row}

    def validate() -> bool:
        """Scores the validation pairs, keeps the weights if they are the best so far; False when asked to stop."""
        with averaged(ema):
            found = evaluate(model, data, "validation", run, args)
        if found is None:
            return False
        metrics.update(score(found, data, "validation", args))
        value, train_loss = metrics[args.best_metric], take_train_loss(state)
        best = count_evaluation(state, value, args.early_stop_min_delta, higher_is_better)
        lr, scale = optimizer.param_groups[0]["lr"], float(found["scale"])
        record(run, "validation", {"train_loss": train_loss, **metrics, "lr": lr, "logit_scale": scale, **speed(run)})
        schedule.evaluated(value)
        log.info("validation loss %.4f  R@1 image to text %.4f, text to image %.4f  (step %d, train loss %.4f)",
                 metrics["loss"], metrics["image_to_text_r1"], metrics["text_to_image_r1"], state.step,
                 train_loss)  # fmt: skip
        if best:
            with averaged(ema):
                save_weights(run.directory / "best")
            success("New best %s %.4f, saved to %s", args.best_metric, value, run.directory / "best")
        write_summary(run, model_title(args), total_steps, {"base": base["validation"], "validation": metrics})
        return True

    # The model as it came, on the same pairs: what every later number is compared with.
    base = {
        row["split"]: {name: row[name] for name in RETRIEVAL_METRICS if name in row}
        for row in run.history
        if row["kind"] == "base"
    }
    for split in [split for split in data.galleries if split not in base]:
        found = evaluate(model, data, split, run, args)
        if found is None:
            stop_here()
        base[split] = score(found, data, split, args)
        record(run, "base", {"split": split, **base[split]})
        keep_examples(run, "base", split, retrieval_examples(found, data.galleries[split]))
        log.info("base model, %s: loss %.4f  R@1 image to text %.4f, text to image %.4f", split,
                 *(base[split][name] for name in ("loss", "image_to_text_r1", "text_to_image_r1")))  # fmt: skip

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
            loss = backward_contrastive(
                accelerator, model, window, lambda model, batch: embed(model, batch, data), args.loss,
                args.mask_duplicates,
            )  # fmt: skip
            norm = accelerator.clip_grad_norm_(model.parameters(), args.grad_clip or float("inf"))
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:  # fp16: the scaler met an overflow
                schedule.step()
            optimizer.zero_grad()
            if logit_scale.requires_grad and args.loss == "clip":
                clamp_logit_scale(logit_scale)
            stop = after_step(run, window, loss * window.num_samples / accelerator.num_processes)
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
            if end_of_epoch or last_step or stop:
                report_unreadable(accelerator, dataset, "training", train_batches.unreadable)
                train_batches.unreadable.clear()
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

    scores = {split: {"base": base[split]} for split in base}
    mixtures = []
    if optimizer:
        save_weights(run.directory / "last")
        load_trained_weights(accelerator, model, run.directory / "best")
        for split in data.galleries:
            found = evaluate(model, data, split, run, args)
            if found is None:
                leave_after_stop(run, run.checkpoints)
            scores[split]["tuned"] = score(found, data, split, args)
            keep_examples(run, "tuned", split, retrieval_examples(found, data.galleries[split]))
        if args.wise_ft:
            weights = trained_weights(unwrapped(accelerator, model))
            tuned = trained_weights(unwrapped(accelerator, model), copy=True)
            for alpha in args.wise_ft:
                mix_weights(weights, initial, tuned, alpha)
                found = evaluate(model, data, "validation", run, args)
                if found is None:
                    leave_after_stop(run, run.checkpoints)
                mixtures.append({"alpha": alpha, **score(found, data, "validation", args)})
            choose = max if higher_is_better else min
            chosen = choose(mixtures, key=lambda mixture: mixture[args.best_metric])
            mix_weights(weights, initial, tuned, chosen["alpha"])
            metrics.update(chosen)
            save_weights(run.directory / "wise_ft")
            log.info("WiSE-FT: the mixture with %.0f %% of the new weights is best, saved to %s", 100 * chosen["alpha"],
                     run.directory / "wise_ft")  # fmt: skip
    if accelerator.is_main_process:
        trainable, parameters = count_parameters(model)
        report = write_retrieval_results(
            run, model_title(args), f"Image-text retrieval: {data_title(args)}", data.sources, data.galleries, scores,
            mixtures, {"parameters": parameters, "trainable_parameters": trainable}, total_steps,
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
