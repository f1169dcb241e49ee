"""Score trained models on labelled data: their own test data or others, one model or several side by side.

  python tools/evaluate.py runs/x                        the run's own test samples
  python tools/evaluate.py runs/x --split validation
  python tools/evaluate.py runs/x --data data/new.csv --output_dir results
  python tools/evaluate.py --model_path runs/x --output_dir results
  python tools/evaluate.py runs/x runs/y                 side by side, with the difference and how sure it is
  python tools/evaluate.py runs/x runs/x/export/model_int8.onnx
  python tools/evaluate.py runs/mine --script my_experiment.py    a copied script, with its own metrics
  python tools/evaluate.py runs/mine --import my_module  a model of your own class
  python tools/evaluate.py runs/har --data films.csv --views 2    a run of clip_har.py

A model is a run of any of the five scripts, its best/ or last/, what
tools/export.py wrote (a folder or an .onnx file), a model folder, or a name on
the Hub. Without --data the samples are those of the run, and the numbers those
of its results.json. --data is what the run's script takes:

  text        a table with text and label, or a data set of `datasets`
  signs       a folder of clips with labels.csv, or such a labels file
  CLIP        shards, a table of captions, or a folder with test/ in it
  images      a folder with a folder for each class, or a table of files and
              labels
  actions     class folders, a table of files and labels, shards, or a
              data set of `datasets`

The classes are the model's; some may be missing. What cannot be read is left
out and named. Texts, signs, CLIP and images of tables are scored by the
functions of the run's script, so by those of a copy, too, if --script names it.

Of several runs the first one is compared with each of the others on the same
samples: the difference, an interval for it (paired bootstrap, 95 %), and on
how many samples only the one or the other is right. Their ensemble is scored
too, which is the mean of their probabilities (of numbers, the mean of these; a
CLIP has none). The loss is that of the run's training (label smoothing, class
weights), of images and videos with --data the plain cross-entropy; an
ensemble's is the mean over its runs.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from accelerando.base.config import Alias, check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import check_can_be_made, whole_folder
from accelerando.base.log import on_terminal, only_warnings, quiet_libraries
from accelerando.base.model_folder import read_json
from accelerando.base.texts import one_line
from accelerando.data.table_formats import table_suffix
from accelerando.inference.media_scores import evaluate_media
from accelerando.inference.named import Named, find_named, label_names, precision
from accelerando.inference.outputs import open_output, printable
from accelerando.inference.saved import ExportedClip, choose_device, import_user_module, label_thresholds, open_saved
from accelerando.inference.scores import Evaluation, Head, Scores, as_results, table_text, write_files
from accelerando.inference.scripts import SCRIPT_OF, import_script, load_weights, settings_of_run, trained_by
from accelerando.train.weights import TORCH_MODULE

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import numpy as np
    import torch
    from accelerate import Accelerator

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
ALIASES: dict[str, Alias] = {"eval_batch_size": "batch_size", "import": "import_module"}
Runs = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
OURS = ("results.json", "classification_report.txt", "confusion.png", "predictions.csv", "report.html")
# The same for several heads and runs.
ALSO_OURS = r"(classification_report|confusion)(_gloss|_cat)?(_run_\d+)?\.(txt|png)"
MANY = 2000  # samples; a line says that so many are being scored
MODEL_OF = {"text": "texts", "sign": "signs", "image": "images", "har": "actions", "clip": "pairs (CLIP)"}
# The tasks that a flag is for.
ONLY_FOR = {
    "data_dir": ("image", "har", "clip"), "media_folder": ("har", "clip", "sign", "image"),
    "file_column": ("har", "clip", "image"), "text_column": ("text", "clip"), "text_pair_column": ("text",),
    "label_column": ("text", "har", "image"), "label_columns": ("text", "image"), "label_delimiter": ("text", "image"),
    "frame_folders": ("har",), "frames": ("har",), "views": ("har",), "tta": ("image", "har"),
}  # fmt: skip
OF_DATA = ("media_folder", "file_column", "text_column", "text_pair_column", "label_column", "label_columns",
           "label_delimiter", "frame_folders")  # fmt: skip
# What a model's config calls the targets of text_classify and image_classify; without it a row has one label.
TARGETS = {"multi_label_classification": "multi_label", "regression": "regression"}


@dataclass
class Args:
    # -- what is scored --
    runs: Runs = ()  # runs, their best/ or last/, exports or .onnx files, model folders, names on the Hub
    model_path: tuple[str, ...] = ()  # the same, as a flag
    script: str | None = None  # the script that trained the runs, if it is a copy of one of scripts/
    data: str | None = None  # score these samples, of the kind that the run's script takes, instead of its own
    split: Literal["test", "validation", "train", "novel"] | None = None  # of the run's (default: test if there is one)
    data_dir: str | None = None  # where the run's data_dir lies now (default: where it was in training)
    media_folder: str | None = None  # --data, a table or labels file: folder of what it lists (default: its own)
    file_column: str | None = None  # --data, a table of images: column of the file (default: as the run's)
    text_column: str | None = None  # --data: column of the text, of clip_finetune the caption (default: as the run's)
    text_pair_column: str | None = None  # --data of text_classify: column of a second text (default: as the run's)
    label_column: str | None = None  # --data, a table: column of the label (default: as the run's)
    label_columns: tuple[str, ...] | None = None  # --data, a table: columns of labels or numbers (as the run's)
    label_delimiter: str | None = None  # --data, a table: the sign between labels in a cell (default: as the run's)
    frame_folders: bool | None = None  # clip_har: folders inside class folders are videos (default: as the run's)
    frames: int | None = None  # clip_har: frames of a video (default: as the run's)
    views: int | None = None  # clip_har: the mean over so many sets of frames (default: as the run's)
    # -- evaluation --
    import_module: str | None = None  # module of yours that defines the model's class, as --import my_module
    trust_remote_code: bool = False  # run Python files of the model's folder where it needs them
    batch_size: int = 64  # samples in one forward pass
    num_workers: int = 8  # threads that read and decode images (CLIP: processes, at most 2)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    amp: Literal["no", "bf16", "fp16"] | None = None  # precision (default: as config.yaml says, if it is fast here)
    tta: bool | None = None  # images: the mean over one and its mirror image (default: as the run was evaluated)
    # -- output --
    format: Literal["table", "json"] = "table"  # what is printed
    output_dir: str | None = None  # write results, report, predictions and confusion matrix into this folder
    overwrite: bool = False  # replace an earlier evaluation there


# ------------------------------------------------------------------------------------- the script, its data and model

# Settings with which a script's load_data takes all samples of train_file as they are, to be evaluated.
ALL_OF_IT = {"validation_fraction": 0.0, "report_on_train": True, "early_stop": None, "scheduler": "constant"}
NOT_HERE = {"compile_model": False, "report_to": (), "push_to_hub": False, "wise_ft": (), "teacher": None,
            "student_layers": None, "student_vocab": None, "unlabelled_file": None}  # fmt: skip
SHAPE = ("hidden_size", "num_layers", "num_attention_heads", "intermediate_size")  # text_classify: from scratch


@dataclass
class Part:
    """A model, the script that scores it, with its settings and data, and what it found in a split."""

    model: Named
    module: ModuleType
    settings: Any
    data: Any
    split: str
    found: dict[str, np.ndarray]
    log_variances: torch.Tensor | None = None  # sign_train: learned weights of its losses

    @property
    def dataset(self) -> Any:
        """The samples that were scored."""
        return self.data.splits[self.split]

    @property
    def nouns(self) -> str:
        """What the samples are called."""
        return getattr(self.dataset, "unit", "samples")


def changed(settings: Any, **changes: Any) -> Any:
    """``settings`` with those of ``changes`` that the script has: a copy may have lost some."""
    known = {field.name for field in fields(settings)}
    return replace(settings, **{name: value for name, value in changes.items() if name in known})


def class_names(model: Named) -> dict[str, list[str]]:
    """The model's classes by head (text: "", signs: gloss and cat); empty where it keeps none, as a CLIP."""
    if model.task == "clip" or (model.config.get("model_type") == TORCH_MODULE and "id2label" not in model.config):
        return {}
    if model.task == "sign":
        from accelerando.models.pretrained import open_config

        config = open_config(str(model.folder), local_files_only=True)
        return {"gloss": list(config.gloss_names), "cat": list(config.cat_names)}
    return {"": label_names(model, one_class=model.task not in ("text", "image"))}


def settings_for(module: ModuleType, model: Named, names: dict[str, list[str]], args: Args) -> Any:
    """The script's ``Args``: those of the run, or else what the model's config says, with the model in ``folder`` as
    the one that the script opens."""
    folder, plain = str(model.folder), model.config.get("model_type") != TORCH_MODULE
    settings = settings_of_run(module, model.run) if model.run else module.Args()
    if model.run is None and model.config.get("model_type") in ("text_cnn", "sign_transformer", "sign_gru"):
        from accelerando.models.pretrained import open_config

        config = open_config(folder, local_files_only=True)
        own = {field.name: getattr(config, field.name) for field in fields(settings) if hasattr(config, field.name)}
        key = getattr(config, "input_key", None)
        kind = {"text_cnn": {"architecture": "cnn"}, "sign_transformer": {"model": "transformer", "kp_key": key},
                "sign_gru": {"model": "iv3_gru", "feature_key": key}}[config.model_type]  # fmt: skip
        settings = changed(settings, **own | kind)
    workers = 0 if model.task in ("text", "sign") else min(args.num_workers, 2)
    settings = changed(
        settings, **NOT_HERE, eval_batch_size=args.batch_size, num_workers=workers,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    if args.split == "train":
        settings = changed(settings, report_on_train=True)
    if args.tta is not None:
        settings = changed(settings, tta=args.tta)
    if model.task == "text":
        settings = changed(settings, tokenizer_name=folder)
        if plain:  # which of a copy's own class is not known
            settings = changed(settings, problem_type=TARGETS.get(model.config.get("problem_type"), "single_label"))
            settings = changed(settings, model_name=folder, from_scratch=False, strategy="full", **dict.fromkeys(SHAPE))
        if model.run is None or model.exported:
            settings = changed(settings, **{"max_length": tokens_at_most(model)} | windows_of(model))
    elif model.task == "sign":
        counts = {"num_gloss": len(names["gloss"]), "num_cat": len(names["cat"])}
        settings = changed(settings, **counts, names_csv=None, weights=None)
        if model.exported:
            settings = changed(settings, normalisation="none")  # the graph does it
    elif model.task == "clip":
        settings = changed(
            settings, model_name=folder, image_model=None, text_model=None, image_weights=None, adapter=None,
            from_scratch=False, scenario="zero_shot",
        )  # fmt: skip
    elif model.task == "image":
        named = getattr(settings, "model_name", None) or model.run is None
        settings = changed(settings, weights=None, model_name=folder if named else None)
        if args.data or getattr(settings, "train_file", None):
            settings = changed(settings, problem_type=TARGETS.get(model.config.get("problem_type"), "single_label"))
    return settings


def windows_of(model: Named) -> dict[str, Any]:
    """The settings with which a text classifier was trained to read long texts in windows, as its config has them."""
    from accelerando.models.text_windows import kept_windows

    windows, pooling = kept_windows(model.config)
    if windows is None:
        return {"window_stride": None}
    return {"max_length": windows.size, "window_stride": windows.stride, "max_windows": windows.most,
            "window_pooling": pooling}  # fmt: skip


def tokens_at_most(model: Named) -> int:
    """How many tokens of a text an export, or a model without a run, gets: as many as it was made for, up to 512."""
    from accelerando.data.tokenizer import open_tokenizer
    from accelerando.models.clip import BEHIND_PADDING
    from accelerando.models.pretrained import open_config

    if model.exported:
        return int(read_json(model.folder / "export.json")["max_length"])
    limits = [512, open_tokenizer(str(model.folder), local_files_only=True).model_max_length]
    if model.config.get("model_type") != TORCH_MODULE:
        config = open_config(str(model.folder), local_files_only=True)
        positions = getattr(config, "max_position_embeddings", None) or 0
        if positions > 0:  # XLNet's are -1
            limits.append(positions - (1 + (config.pad_token_id or 0)) * (config.model_type in BEHIND_PADDING))
    return min(limits)


def with_other_data(settings: Any, model: Named, names: dict[str, list[str]], args: Args) -> tuple[Any, str]:
    """The settings with ``--data`` in place of the run's own data, and the split that it then is for the script."""
    where, folder = str(args.data), Path(str(args.data))
    if model.task == "text":
        sides = [side for side in ("test", "validation", "train") if (folder / side / "dataset_info.json").is_file()]
        return of_table(settings, {"train_file": str(folder / sides[0]) if sides else where}, args), "train"
    if model.task == "sign":
        kind = "keypoints" if settings.model == "transformer" else "features"
        clips, labels = labelled_clips(folder, args.media_folder, getattr(settings, f"{kind}_train"))
        check_clips(model, clips, labels, names, settings.kp_key if kind == "keypoints" else settings.feature_key)
        sides = ("train", "val", "test")
        none = dict.fromkeys(f"{part}_{side}" for part in ("keypoints", "features") for side in sides)
        none |= dict.fromkeys(("labels_val_csv", "labels_test_csv")) | {"smoke_test": False}
        given = {f"{kind}_train": str(clips), "labels_train_csv": str(labels)}
        return changed(settings, **none | ALL_OF_IT | given), "train"
    if model.task == "clip":
        if folder.is_dir() and not any(folder.glob("*.tar")):
            inside = (folder / side for side in ("test", "validation", "val"))
            where = str(next((side for side in inside if side.is_dir()), where))
        given = {"image_column": args.file_column, "caption_column": args.text_column}
        settings = changed(
            settings, train_data=None, validation_data=where, test_data=None, data_dir=None, s3_bucket=None,
            mini_train=False, image_folder=args.media_folder, report_on_train=False,
            **{name: column for name, column in given.items() if column},
        )  # fmt: skip
        return settings, "validation"
    if model.task == "image" and table_suffix(where):
        return of_table(settings, {"train_file": where, "data_dir": ""}, args), "train"
    if model.task == "image" and not args.script:
        raise UserError(f"--data {where}: {model.name} is scored on a table of files and labels; name one")
    raise UserError(f"--data: with --script a run of {MODEL_OF[model.task]} is scored on its own samples only")


def of_table(settings: Any, where: dict[str, str], args: Args) -> Any:
    """The settings with which a script takes all rows of a table, ``where``, with the columns that ``args`` names."""
    columns = ("text_column", "text_pair_column", "file_column", "media_folder", "label_column", "label_columns",
               "label_delimiter")  # fmt: skip
    if args.label_column or args.label_delimiter:
        settings = changed(settings, label_columns=())
    if args.label_columns:
        settings = changed(settings, label_delimiter=None)
    given = {name: value for name in columns if (value := getattr(args, name))}
    others = dict.fromkeys(("validation_file", "test_file", "num_labels", "num_classes", "media_folder"))
    return changed(settings, **others | ALL_OF_IT | where | given)


def labelled_clips(path: Path, media_folder: str | None, trained_on: str | None) -> tuple[Path, Path]:
    """The folder of clips and the labels file that ``--data`` names: the one in the other, or labels alone, of clips
    beside them or in the run's own folder."""
    if path.is_dir():
        sides = ("", "test", "val", "validation")
        folder = next((path / side for side in sides if (path / side / "labels.csv").is_file()), path)
        return Path(media_folder) if media_folder else folder, folder / "labels.csv"
    beside = trained_on is None or any(path.absolute().parent.glob("*.npz"))
    return Path(media_folder or (path.parent if beside else str(trained_on))), path


def check_clips(model: Named, clips: Path, labels: Path, names: dict[str, list[str]], key: str) -> None:
    """UserError for a gloss or category that the model does not know, and for clips of another kind."""
    from accelerando.data.sign_clips import read_clip
    from accelerando.data.sign_labels import read_labels
    from accelerando.models.pretrained import open_config

    found = read_labels(labels)
    first, width = clips / f"{found.files[0]}.npz", open_config(str(model.folder), local_files_only=True).input_width
    if first.is_file() and (there := read_clip(first, key)[0].shape[1]) != width:
        raise UserError(f"{first}: {key} has {there} numbers per frame, but {model.name} takes {width}")
    for head, word in (("gloss", "glosses"), ("cat", "categories")):
        numbers, count = getattr(found, head), len(names[head])
        odd = ((numbers < 0) | (numbers >= count)).nonzero()[0]
        if len(odd):
            known = f"{model.name} knows the {count:,} {word} 0 to {count - 1:,}"
            raise UserError(f"{labels}: {found.where(int(odd[0]))}: {head} {numbers[odd[0]]}, but {known}")


def load_data(module: ModuleType, settings: Any, model: Named, names: dict[str, list[str]], args: Args) -> Any:
    """What the script's ``load_data`` gives, its classes those of the model.

    Raises:
        UserError: it is not there, or has a class that the model does not know.
    """
    if args.data and "" in names and hasattr(module, "label_names"):
        module.label_names = lambda table: names_for(names[""], table)  # the model's, not those of the samples
    if args.data and (read := getattr(module, "read_text_table", None)):  # of a set of `datasets` its test split
        module.read_text_table = lambda source, **how: read(source, **how | {"split": "test"})
    try:
        data = module.load_data(settings, accelerator_for(args))
    except UserError as error:
        if args.data and "--class_field" in str(error):  # the metadata of these pairs have no such field
            print(f"no zero-shot classification: {error}", file=sys.stderr)
            return load_data(module, changed(settings, class_field=None), model, names, args)
        hint = "" if args.data else f"; these are the data of {model.name}: score others with --data"
        raise UserError(f"{error}{hint}") from None
    if getattr(data, "problem_type", None) == "multi_label":
        data.thresholds = label_thresholds(model.config, data.label_names)
    if model.task == "sign":
        data.names = names
    elif "" in names and list(data.label_names) not in (names[""], names_for(names[""])):
        odd = sorted(set(data.label_names) ^ set(names[""]))
        who = "the data has" if odd and odd[0] in data.label_names else "the model has"
        what = f"only {who} {odd[0]!r}" if odd else "they have another order"
        raise UserError(f"the classes of the data are not those of {model.name}: {what}")
    return data


def names_for(names: list[str], table: Any = None) -> list[str]:
    """The names of a model's classes as they stand in a table: numbers, if the model calls its classes LABEL_0 and so
    on, as transformers does with classes that have no names."""
    numbers = [f"LABEL_{number}" for number in range(len(names))] == names
    if numbers and (table is None or "string" not in str(table.labels.type)):
        return [str(number) for number in range(len(names))]
    return names


def accelerator_for(args: Args) -> Accelerator:
    """One process on the device that was asked for; the precision is set around the evaluation."""
    import torch
    from accelerate import Accelerator

    device = choose_device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return Accelerator(cpu=device.type == "cpu")


def open_net(module: ModuleType, settings: Any, data: Any, model: Named, own: ModuleType | None) -> Any:
    """The model with its weights, as the script builds it; or an export's graph; ``own``: the module of ``--import``.

    Raises:
        UserError: the weights are missing, damaged or of another model.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    from accelerando.inference.saved import quiet_loading

    quiet_loading()
    if model.exported and model.task == "clip":
        return ExportedClip(model.folder, model.onnx_file, data.preprocessing.colours)
    alone = model.run is None and model.config.get("model_type") == TORCH_MODULE  # whose class --import has to bring
    if model.exported or alone or (own is not None and model.task in ("text", "sign")):
        if model.task == "text":
            padding = read_json(model.folder / "export.json")["padding"] if model.exported else {}
            data.collate.pad_token_id = padding.get("pad_id", data.collate.pad_token_id)
            data.collate.left = padding.get("direction") == "left"
        kind = AutoModel if model.task == "sign" else AutoModelForSequenceClassification
        trust_remote_code = getattr(settings, "trust_remote_code", False)
        return open_saved(kind, model.folder, own, trust_remote_code, model.onnx_file)
    return None


# --------------------------------------------------------------------------------------------------------- evaluation


def score_with_script(model: Named, args: Args, own: ModuleType | None) -> Part:
    """What the script that trained ``model`` finds in its samples, or in ``--data``.

    Raises:
        UserError: the samples or the weights cannot be had, or the model returns NaN.
    """
    import numpy as np
    import torch

    from accelerando.report.results import split_to_show
    from accelerando.train.state import Run, TrainState

    module = import_script(Path(args.script) if args.script else SCRIPTS / SCRIPT_OF[model.task])
    if not args.data and model.run is None:
        raise UserError(f"{model.name}: no config.yaml that names its data; score others with --data")
    names = class_names(model)
    settings, split = settings_for(module, model, names, args), args.split
    if args.data:
        settings, split = with_other_data(settings, model, names, args)
    elif args.data_dir:
        if not getattr(settings, "data_dir", None):
            raise UserError(f"--data_dir: {model.name} was not trained on a data_dir; score others with --data")
        if not Path(args.data_dir).is_dir():
            raise UserError(f"--data_dir {args.data_dir}: no such folder")
        settings = replace(settings, data_dir=args.data_dir)
    data = load_data(module, settings, model, names, args)
    splits = data.galleries if hasattr(data, "galleries") else data.splits
    split = split or split_to_show(splits)
    if split not in splits:
        raise UserError(f"{model.name} has no split {split}; it has {', '.join(splits)}")
    accelerator = accelerator_for(args)
    net = open_net(module, settings, data, model, own)
    if net is None:
        net = module.build_model(settings, data, accelerator)
        load_weights(accelerator, net, model.folder)
    net = net.to(accelerator.device).eval()
    amp = "no" if model.exported else precision(args.amp, model.trained_precision, accelerator.device)
    kind = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    run = Run(model.run or model.folder, accelerator, settings, TrainState(), module.METRICS)
    if not on_terminal() and len(data.splits[split]) > MANY:  # where there is no progress bar
        print(f"scoring {model.name} on {len(data.splits[split]):,} samples", file=sys.stderr)
    with torch.autocast(accelerator.device.type, kind, enabled=amp != "no"):
        found = module.evaluate(net, data, split, run, settings)
    for name, values in found.items():
        if (name.endswith("logits") or name in ("image", "text")) and np.isnan(values).any():
            raise UserError(f"{model.name}: the model returns NaN: its weights are corrupted")
    return Part(model, module, settings, data, split, found, getattr(net, "log_variances", None))


def scores_of(part: Part) -> Scores:
    """The metrics of the script, and what of them is compared between models."""
    import numpy as np

    from accelerando.report.retrieval import pair_ranks
    from accelerando.train.state import Run, TrainState
    from accelerando.train.tracking import as_floats

    module, data, found = part.module, part.data, part.found
    metrics = as_floats(module.score(found, data, part.split, part.settings))
    if "losses" in found and np.isnan(found["losses"]).all():  # of an ensemble of a copy's models
        metrics.pop("loss", None)
    written = dict(Run(part.model.folder, None, part.settings, TrainState(), module.METRICS).written(metrics))
    heads = heads_of(part)
    right = {head.called("accuracy"): head.logits.argmax(axis=1) == head.labels for head in heads}
    columns: dict[str, Any] = {}
    count = len(heads[0].labels) if heads else len(found.get("labels", part.dataset))
    if is_of_targets(part):
        columns, right = target_columns(part)
    if part.model.task == "clip":
        gallery, readable = data.galleries[part.split], found["readable"]
        count, ranks = int(readable.sum()), pair_ranks(found, gallery)
        for way, of in (("image_to_text", gallery.image_of), ("text_to_image", gallery.text_of)):
            _, first = np.unique(of[readable], return_index=True)  # each image, or caption, once
            right[f"{way}_r1"], columns[f"{way}_rank"] = ranks[way][first] == 1, ranks[way].tolist()
    # A copy may measure something else under the same name.
    right = {name: which for name, which in right.items() if abs(metrics.get(name, -1) - which.mean()) < 1e-6}
    return Scores(part.model.name, metrics, count, heads, right, written, columns)


def ensemble_of(parts: list[Part], is_copy: bool) -> Part | None:
    """The mean of the models' probabilities, with the classes in the order of the first one; None: they have none
    (CLIP), or other classes. ``is_copy``: of a script, whose loss may need more than logits and is left out."""
    import numpy as np

    from accelerando.report.predictions import ensemble_logits

    first, names = parts[0], classes_of(parts[0])
    if not names:
        return None
    for part in parts[1:]:
        if {key: {*own} for key, own in classes_of(part).items()} != {key: {*own} for key, own in names.items()}:
            said = f"note: no ensemble: {part.model.name} and {first.model.name} have different classes"
            print(one_line(said), file=sys.stderr)
            return None
    if more := set(first.found) - {"row", "valid", "losses", *names, *map(labels_of, names)}:
        print(f"note: no ensemble: the script finds more than logits ({min(more)})", file=sys.stderr)
        return None
    problem_type = getattr(first.data, "problem_type", "single_label")
    found, losses = dict(first.found), np.full(len(first.found["losses"]), np.nan)
    columns = [{key: [own[key].index(name) for name in names[key]] for key in names} for own in map(classes_of, parts)]
    for key in names:
        logits = [part.found[key][:, own[key]] for part, own in zip(parts, columns, strict=True)]
        found[key] = ensemble_logits(logits, problem_type)
    if not is_copy:
        in_own_order = [{key: found[key][:, np.argsort(own[key])] for key in names} for own in columns]
        losses = np.mean([losses_of(part, own) for part, own in zip(parts, in_own_order, strict=True)], axis=0)
    # Thresholds were chosen for one model's probabilities.
    data = replace(first.data, thresholds=None) if hasattr(first.data, "thresholds") else first.data
    return replace(first, model=replace(first.model, name="ensemble"), data=data, found=found | {"losses": losses})


def classes_of(part: Part) -> dict[str, list[str]]:
    """The classes, labels or numbers of each array of logits that the script found."""
    named = getattr(part.data, "names", None)
    heads = {f"{head}_logits": names for head, names in named.items()} if isinstance(named, dict) else {}
    heads = heads or {"logits": list(getattr(part.data, "label_names", ()))}
    return {key: names for key, names in heads.items() if key in part.found}


def labels_of(logits: str) -> str:
    """The name of the labels that belong to logits: gloss_logits -> gloss, logits -> labels."""
    return logits.removesuffix("_logits") if logits != "logits" else "labels"


def losses_of(part: Part, logits: dict[str, np.ndarray]) -> np.ndarray:
    """The script's loss of each sample, float32 [n], for other ``logits`` than those of its model."""
    from types import SimpleNamespace

    import torch

    class Given(torch.nn.Module):
        def forward(self, **_: torch.Tensor) -> SimpleNamespace:
            given = {key: torch.from_numpy(values) for key, values in logits.items()}
            return SimpleNamespace(**given, log_variances=part.log_variances)

    batch = {name: torch.from_numpy(part.found[name]) for name in map(labels_of, logits)}
    with torch.no_grad():
        return part.module.compute_loss(Given().eval(), batch, part.data, part.settings)[0].numpy()


def heads_of(part: Part) -> list[Head]:
    """The classes and logits that the script found, of each head whose classes it names."""
    data, found = part.data, part.found
    if isinstance(named := getattr(data, "names", None), dict):
        there = {head: names for head, names in named.items() if f"{head}_logits" in found}
        return [Head(head, names, found[head], found[f"{head}_logits"]) for head, names in there.items()]
    if {"labels", "logits"} <= found.keys() and hasattr(data, "label_names") and not is_of_targets(part):
        return [Head("", list(data.label_names), found["labels"], found["logits"])]
    return []


def is_of_targets(part: Part) -> bool:
    """Whether a row has several labels, or numbers, instead of one class."""
    return {"labels", "logits"} <= part.found.keys() and part.found["labels"].ndim == 2


def target_columns(part: Part) -> tuple[dict[str, list[object]], dict[str, np.ndarray]]:
    """Columns of the table of predictions, and which rows have exactly their labels."""
    from accelerando.report.target_metrics import chosen_labels, exactly_right
    from accelerando.report.target_reports import target_columns as columns_of

    labels, logits, data = part.found["labels"], part.found["logits"], part.data
    columns = columns_of(logits, list(data.label_names), data.problem_type, data.thresholds, labels)
    if data.problem_type == "regression":
        return columns, {}
    return columns, {"subset_accuracy": exactly_right(labels, chosen_labels(logits))}


def target_blocks(part: Part) -> list[str]:
    """Blocks of the report: what is shown of several labels or numbers, and the rows with the highest losses."""
    import io

    from PIL import Image

    from accelerando.report import page, target_reports
    from accelerando.report.plots import plot_numbers
    from accelerando.report.target_metrics import per_label

    found, names, who = part.found, list(part.data.label_names), part.model.name
    if part.data.problem_type == "regression":
        plot = io.BytesIO()
        Image.fromarray(plot_numbers(found["labels"], found["logits"], names)).save(plot, format="png")
        blocks = target_reports.number_blocks(found, plot.getvalue(), names, who)
        worst = target_reports.worst_numbers(found, names)
    else:
        values = per_label(found["labels"], found["logits"], part.data.thresholds)
        blocks = [target_reports.label_table(values, names, who)]
        worst = target_reports.worst_labels(found, names, part.data.thresholds)
    called, picture = list(sample_columns(part).values())[-1], picture_of(part)
    for mistake in worst:
        mistake["text"], mistake["image"] = called[mistake["row"]], picture(mistake["row"])
    return [*blocks, page.mistakes(worst, title=f"Highest losses, {who}")]


def sample_columns(part: Part) -> dict[str, list[str]]:
    """What the samples are called in the table of predictions: texts, files, or images and captions."""
    import numpy as np

    rows = part.found["row"] if "row" in part.found else range(len(part.dataset))
    if part.model.task == "clip":
        pairs = np.flatnonzero(part.found["readable"]).tolist()
        texts = [" ".join(part.dataset.read(row)[1].decode("utf-8", "replace").split()) for row in pairs]
        return {"image": [printable(part.dataset.where(row)) for row in pairs], "caption": texts}
    if part.model.task == "text":
        return {"text": [part.data.tables[part.split].text(row) for row in rows]}
    names = part.dataset.names
    return {"file": [str(names[row]) for row in rows]}


def picture_of(part: Part) -> Callable[[int], bytes | None]:
    """A small picture of a scored sample, by its place among them; of texts and the like None."""
    if part.model.task != "image" or not hasattr(part.module, "EvaluationImages"):
        return lambda row: None
    from accelerando.data.decode import small_jpeg
    from accelerando.inference.media_scores import SIDE

    images = part.module.EvaluationImages(part.dataset, part.settings.image_size)

    def picture(row: int) -> bytes | None:
        pixels = images.thumbnail(int(part.found["row"][row]), SIDE)
        return None if pixels is None else small_jpeg(pixels, SIDE)

    return picture


def check_same_samples(parts: list[Part]) -> None:
    """UserError where models would be compared on different samples."""
    from accelerando.data.digest import digest_of

    def labels(part: Part) -> list[Any]:
        if is_of_targets(part):
            return [list(part.data.label_names), part.found["labels"].tolist()]
        return [[head.label_names[number] for number in head.labels.tolist()] for head in heads_of(part)]

    def samples(part: Part) -> Any:
        if part.model.task == "text":
            table = part.data.tables[part.split]
            return [table.texts.to_pylist(), table.pairs and table.pairs.to_pylist()]
        if part.model.task == "clip":
            facts = {name: value for name, value in digest_of(part.dataset).items() if name != "times"}
            return [facts, part.found["readable"].tolist()]
        return sample_columns(part)

    first = parts[0]
    for part in parts[1:]:
        if part.split != first.split or samples(part) != samples(first) or labels(part) != labels(first):
            raise UserError(
                f"{part.model.name} and {first.model.name} have different {first.split} {first.nouns}: use --data, or "
                "score them one by one"
            )


def source_of(part: Part) -> str:
    """Where the samples are from: a file or folder."""
    settings, split, data = part.settings, part.split, part.data
    if part.model.task == "text" and hasattr(data, "tables"):
        return str(data.tables[split].source)
    if part.model.task == "sign" and not settings.smoke_test and hasattr(part.module, "folders"):
        folders = part.module.folders(settings)
        return str(folders.get(split, folders["train"])[0])
    if part.model.task == "clip" and hasattr(part.module, "locations"):
        places = part.module.locations(settings)
        return places.get(split, places["train"])
    named = (getattr(settings, name, None) for name in (f"{split}_file", "train_file", "data_dir"))
    return str(next(filter(None, named), "made samples"))


def warn_of_other_count(part: Part, count: int) -> None:
    """Warns where the run itself scored another number of samples: it may have been trained on some of these."""
    path = part.model.run / "results.json"
    before = read_json(path).get(part.split, {}).get("count", count) if path.is_file() else count
    if before != count:
        print(f"warning: {part.split} has {count:,} {part.nouns}, {before:,} in {path}: the data has changed, and the "
              "run may have been trained on some of them", file=sys.stderr)  # fmt: skip


def evaluate_with_scripts(models: list[Named], args: Args, own: ModuleType | None) -> Evaluation:
    """The scores of models by the functions of the scripts that trained them; ``own``: the module of ``--import``."""
    from accelerando.report import page
    from accelerando.report.retrieval import retrieval_examples, rows_of_examples

    with only_warnings():
        parts = [score_with_script(model, args, own) for model in models]
        scores = [scores_of(part) for part in parts]
    first = parts[0]
    if len(parts) > 1:
        check_same_samples(parts)
    for part, found in zip(parts, scores, strict=True):
        if not args.data:
            warn_of_other_count(part, found.count)
    source, split = source_of(first), "data" if args.data else first.split
    columns = sample_columns(first) if args.output_dir else {}
    mean = ensemble_of(parts, bool(args.script)) if len(parts) > 1 else None
    together = scores_of(mean) if mean else None
    evaluation = Evaluation(
        source, split, first.nouns, scores, columns, together, left_out=len(first.dataset) - scores[0].count,
        picture=picture_of(first),
    )  # fmt: skip
    if args.output_dir:
        shown = [mean] if mean else parts
        evaluation.blocks = [block for part in shown if is_of_targets(part) for block in target_blocks(part)]
    if first.model.task == "clip" and args.output_dir:
        titles = evaluation.titles
        found = {title: retrieval_examples(part.found, part.data.galleries[part.split])
                 for title, part in zip(titles, parts, strict=True)}  # fmt: skip
        evaluation.blocks = [page.retrieval(rows_of_examples(first.dataset, found))]
    return evaluation


# -------------------------------------------------------------------------------------------------------------- main


def check_args(args: Args) -> None:
    """UserError for what can be wrong before anything is loaded."""
    check_ranges(args, num_workers=(1, 1024), frames=(1, 1024), views=(1, 64))
    names = (*args.runs, *args.model_path)
    if not names:
        raise UserError("no run: name one, or several, as in: python tools/evaluate.py runs/x")
    if args.data and (args.split or args.data_dir):
        flag = "--split" if args.split else "--data_dir"
        raise UserError(f"{flag} chooses among a run's own samples, --data names others: drop one")
    for name in OF_DATA:
        if getattr(args, name) is not None and not args.data:
            raise UserError(f"--{name} says how --data is read, which is not given")
    if len({Path(name).resolve() for name in names}) < len(names):
        raise UserError("a run is named twice")
    if args.output_dir is None:
        return
    target = Path(args.output_dir)
    if target.exists() and not target.is_dir():
        raise UserError(f"--output_dir {target}: is a file")
    there = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if others := [name for name in there if name not in OURS and not re.fullmatch(ALSO_OURS, name)]:
        raise UserError(f"--output_dir {target}: holds {others[0]}, which is no evaluation's: choose another folder")
    if there and not args.overwrite:
        raise UserError(f"--output_dir {target}: holds an evaluation already; --overwrite replaces it")
    check_can_be_made(target, "--output_dir")


def check_models(models: list[Named], args: Args) -> None:
    """UserError for models of different tasks, and for flags that are for another task than theirs."""
    first = models[0]
    if any(model.exported for model in models):
        if args.device not in ("auto", "cpu"):
            raise UserError(f"--device {args.device}: an export runs on the CPU, and so does what it is compared with")
        args.device = "cpu"
    for model in models:
        if model.task != first.task:
            what = f"{first.name} is a model of {MODEL_OF[first.task]}, {model.name} one of {MODEL_OF[model.task]}"
            raise UserError(f"{what}: score them one by one")
    for name, tasks in ONLY_FOR.items():
        if getattr(args, name) is not None and first.task not in tasks:
            scripts = " and ".join(SCRIPT_OF[task] for task in tasks)
            raise UserError(f"--{name} has no effect on {first.name}: it is for runs of {scripts}")
    if args.split == "novel" and first.task != "har":
        raise UserError(f"--split novel: {first.name} is no run of clip_har.py, which alone has such classes")
    for model in models:
        script = trained_by(model.run) if model.run and not args.script else None
        if script and script.name not in SCRIPT_OF.values():
            said = f"note: {model.name} was trained by {script}: --script {script} scores it with its own metrics"
            print(one_line(said), file=sys.stderr)


def by_scripts(models: list[Named], args: Args) -> bool:
    """Whether the functions of the runs' scripts score these models: all but images and videos in class folders."""
    task = models[0].task
    if args.script or task in ("text", "sign", "clip"):
        return True
    table = table_suffix(args.data) if args.data else any(model.settings.get("train_file") for model in models)
    return task == "image" and bool(table or any(model.config.get("problem_type") in TARGETS for model in models))


def main() -> None:
    args = parse_args(Args, ALIASES)
    check_args(args)
    quiet_libraries()
    own = import_user_module(args.import_module) if args.import_module else None
    models = [find_named(name, own, args.trust_remote_code) for name in (*args.runs, *args.model_path)]
    check_models(models, args)
    evaluation = (
        evaluate_with_scripts(models, args, own) if by_scripts(models, args) else evaluate_media(models, args, own)
    )
    results = as_results(evaluation)
    if args.output_dir:
        with whole_folder(Path(args.output_dir)) as draft:
            write_files(draft, evaluation, results)
    with open_output(None) as stream:
        if args.format == "json":
            stream.write(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
            return
        stream.write(table_text(evaluation) + "\n")
        if args.output_dir:
            stream.write(f"\nReport: {Path(args.output_dir) / 'report.html'}\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the draft is cleared away
    with errors_in_one_line():
        main()
