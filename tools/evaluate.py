"""Score trained classifiers of images and videos on labelled ones.

  python tools/evaluate.py runs/x                        the run's own test samples
  python tools/evaluate.py runs/x --split validation
  python tools/evaluate.py runs/x --data data/new --output_dir scores
  python tools/evaluate.py runs/x_fold0 runs/x_fold1     each one, and both together
  python tools/evaluate.py runs/mine --import my_module  a model of your own class
  python tools/evaluate.py runs/har --data films.csv --views 2   a run of clip_har.py

--data is a folder with a folder for each class, with the names of the model's
classes; some may be missing. For runs of clip_har.py it may have videos, or be
a table of files and labels, shards, or a data set of `datasets`. Without --data
the samples are those of the run, and the numbers those of its results.json. Of
several runs their ensemble is scored too, which is the mean of their
probabilities.

The loss is that of the run's training (label smoothing, class weights); with
--data it is the plain cross-entropy. An ensemble's loss is the mean over the
losses of its runs. What cannot be read is left out and named.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import signal
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from accelerando.base.config import Alias, check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import cache_folder, check_can_be_made, whole_folder, write_text
from accelerando.base.log import quiet_libraries
from accelerando.base.model_folder import read_json
from accelerando.base.processes import command_line
from accelerando.base.texts import one_line
from accelerando.data.folders import IMAGES, ImageFiles, class_folders, read_splits
from accelerando.data.splits import stratified_split
from accelerando.inference.answers import Computing, answers_of, with_progress
from accelerando.inference.outputs import open_output, print_first, printable
from accelerando.inference.runs import model_folder, predicted_files, read_results, read_settings, run_of
from accelerando.inference.saved import (
    choose_device,
    import_user_module,
    open_image_model,
    takes_videos,
    task_of_saved,
)
from accelerando.report import page
from accelerando.report.plots import plot_confusion
from accelerando.train.accelerator import computes_bf16

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    import torch

    from accelerando.data.media import Media

ALIASES: dict[str, Alias] = {"eval_batch_size": "batch_size", "import": "import_module"}
Runs = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
OURS = ("results.json", "classification_report.txt", "confusion.png", "predictions.csv", "report.html")
SIDE = 128  # pixels of the longer side of an image in the report
NAMED = 5  # files left out of a folder that are named


@dataclass
class Args:
    # -- what is scored --
    runs: Runs = ()  # run folders, their best/ or last/, or model folders
    data: str | None = None  # score this folder of class folders, or table, instead of a split of the run's
    split: Literal["test", "validation", "train", "novel"] | None = None  # of the run's (default: test if there is one)
    data_dir: str | None = None  # where the run's images lie now (default: where they were in training)
    media_folder: str | None = None  # clip_har: folder of a table's files (default: the table's own)
    file_column: str | None = None  # clip_har: column of the file in --data (default: as the run's)
    label_column: str | None = None  # clip_har: column of the label in --data (default: as the run's)
    frame_folders: bool | None = None  # clip_har: folders inside class folders are videos (default: as the run's)
    frames: int | None = None  # clip_har: frames of a video (default: as the run's)
    views: int | None = None  # clip_har: the mean over so many sets of frames (default: as the run's)
    # -- evaluation --
    import_module: str | None = None  # module of yours that defines the model's class, as --import my_module
    trust_remote_code: bool = False  # run Python files of the model's folder where it needs them
    batch_size: int = 64  # images in one forward pass
    num_workers: int = 8  # threads that read and decode images
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    amp: Literal["no", "bf16", "fp16"] | None = None  # precision (default: as config.yaml says, if it is fast here)
    tta: bool | None = None  # the mean over an image and its mirror image (default: as the run was evaluated)
    # -- output --
    format: Literal["table", "json"] = "table"  # what is printed
    output_dir: str | None = None  # write results, report, predictions and confusion matrix into this folder
    overwrite: bool = False  # replace an earlier evaluation there


# ------------------------------------------------------------------------------------------------------------- input


@dataclass
class Classifier:
    """A run, or a model folder alone: how it was named, its weights, its classes, its settings (or none), the module
    of the user's that defines its class, and whether it is a run of clip_har.py."""

    name: str
    folder: Path
    label_names: list[str]
    settings: dict[str, Any]
    module: ModuleType | None = None
    takes_videos: bool = False

    @property
    def noun(self) -> str:
        """What its samples are called."""
        return "samples" if self.takes_videos else "images"


@dataclass
class Samples:
    """n labelled images or videos and where they come from; ``classes`` int64 [n], and ``candidates``: the classes
    among which they are classified, ascending; ``class_weights`` [C] where the run's loss has them."""

    media: Media
    classes: np.ndarray
    candidates: np.ndarray
    split: str  # test, validation, train, novel or data
    source: Path
    class_weights: np.ndarray | None = None


def read_classifier(name: str, module: ModuleType | None = None) -> Classifier:
    """The classifier that ``name`` names, its weights not yet loaded.

    Raises:
        UserError: no model there, or none that gives each image one class of several.
    """
    path = Path(name)
    folder = model_folder(path)
    if folder != path and (path / "wise_ft" / "config.json").is_file():
        folder = path / "wise_ft"  # the weights that results.json is about
    config = read_json(folder / "config.json")
    if (task := task_of_saved(folder, config, module)) != "image":
        what = {"text": "texts", "sign": "signs"}[task]
        raise UserError(f"{name}: a classifier of {what}; only those of images are scored here")
    if config.get("problem_type") in ("multi_label_classification", "regression"):
        raise UserError(f"{name}: its problem type is {config['problem_type']}; only one class per image is supported")
    named = config.get("id2label")
    try:
        labels = [str(named[str(number)]) for number in range(len(named))]
    except (TypeError, KeyError):
        raise UserError(f"{folder / 'config.json'}: id2label does not name the classes 0, 1 and so on") from None
    if len(set(labels)) < max(2, len(labels)):
        raise UserError(f"{folder / 'config.json'}: id2label names fewer than two classes, or one twice")
    settings: dict[str, Any] = {}
    if run := run_of(path):
        settings = read_settings(run)
        if settings.get("amp") is None and (run / "results.json").is_file():  # the launcher's config chose it
            settings["amp"] = read_results(run).get("precision")
    return Classifier(name.rstrip("/"), folder, labels, settings, module, takes_videos(config))


def own_samples(run: Classifier, split: str | None, data_dir: str | None) -> Samples:
    """A split of what the run was trained on; by default the test split, or else the validation's.

    Raises:
        UserError: nothing says where it is, it is there no longer, or it has other classes.
    """
    return (own_media if run.takes_videos else own_images)(run, split, data_dir)


def own_media(run: Classifier, split: str | None, data_dir: str | None) -> Samples:
    """:func:`own_samples` of a run of clip_har.py, divided as its ``load_data`` does."""
    from accelerando.data.media import (
        at_most_per_class,
        candidates_of,
        class_list,
        of_classes,
        open_folders,
        with_held_out,
        with_novel_apart,
    )
    from accelerando.report.results import split_to_show

    settings, names = run.settings, run.label_names
    where = data_dir or settings.get("data_dir")
    if settings.get("train_file"):
        if data_dir:
            raise UserError(f"--data_dir: {run.name} was trained on {settings['train_file']}; score others with --data")
        where = settings["train_file"]
        files = {side: settings.get(f"{side}_file") for side in ("train", "validation", "test")}
        columns = [settings.get(name) for name in ("media_folder", "file_column", "label_column")]
        splits = {side: open_table(run, file, side, *columns) for side, file in files.items() if file}
    elif not where:
        raise UserError(f"{run.name}: no config.yaml that names its data; score others with --data")
    elif not Path(where).is_dir():
        whose = "--data_dir" if data_dir else f"the data_dir of {run.name}"
        raise UserError(f"{where}: no such folder ({whose}); --data_dir says where the run's samples lie now")
    else:
        splits = open_folders(Path(where), settings.get("fold", 0), bool(settings.get("frame_folders")))
    chosen = bool(settings.get("class_names"))
    found = splits["train"].class_names()
    if set(found) != set(names) and not chosen:
        differ = sorted(set(found) ^ set(names))[0]
        who = "the data" if differ in found else "the model"
        raise UserError(f"{where}: its classes are not those of {run.name}: only {who} has {differ!r}; split again?")
    seed = settings["seed"]
    splits = {side: of_classes(media, names, side, chosen) for side, media in splits.items()}
    held_out = {side: settings.get(f"{side}_fraction") or 0 for side in ("test", "validation")}
    with contextlib.redirect_stdout(sys.stderr):  # its lines of progress
        splits = with_held_out(splits, names, held_out, seed)
    last = split_to_show(splits)
    if novel := class_list(settings.get("novel_classes") or (), names, seed):
        splits = with_novel_apart(splits, names, novel, last)
    most = min(settings.get("shots") or 2**62, settings.get("max_samples_per_class") or 2**62)
    if most < 2**62:
        train = splits["train"]
        splits["train"] = train.take(at_most_per_class(train.classes(names), most, seed))
    split = split or last
    if split not in splits:
        raise UserError(f"{where}: {run.name} has no split {split}; it has {', '.join(splits)}")
    media = splits[split]
    return Samples(media, media.classes(names), candidates_of(split, names, novel), split, Path(where))


def open_table(
    run: Classifier, where: str, split: str, folder: str | None, file_column: str | None, label_column: str | None
) -> Media:
    """The samples of a table, shards or a data set of `datasets`, as clip_har.py reads them."""
    from accelerando.data.media import open_media

    cache, most = cache_folder(run.settings.get("cache_dir")), run.settings.get("cache_gb", 50.0)
    return open_media(where, split, cache, most, folder, file_column or "image", label_column or "label")


def own_images(run: Classifier, split: str | None, data_dir: str | None) -> Samples:
    """:func:`own_samples` of a run of image_classify.py."""
    import numpy as np

    if not run.settings.get("data_dir"):
        raise UserError(f"{run.name}: no config.yaml that names its images; score others with --data")
    folder, fold = Path(data_dir or run.settings["data_dir"]), run.settings.get("fold", 0)
    weighted = bool(run.settings.get("class_weights"))
    if not folder.is_dir():
        whose = "--data_dir" if data_dir else f"the data_dir of {run.name}"
        raise UserError(f"{folder}: no such folder ({whose}); --data_dir says where the run's images lie now")
    wanted = {split or "test", *(["train"] if weighted else [])}
    classes, sides = read_splits(folder, fold, wanted=sorted(wanted))
    split = split or ("test" if "test" in sides else "validation")
    fraction = float(run.settings.get("validation_fraction") or 0)
    divided = fraction and (weighted or split != "test")  # its training images may have been divided
    if divided or split not in sides:
        wanted |= {split, "train", "validation"} if divided else {split}
        classes, sides = read_splits(folder, fold, wanted=sorted(wanted))
    if divided and "validation" not in sides and "train" in sides:  # as the script holds them out
        images = sides["train"]
        kept, held_out = stratified_split(images.classes, fraction, run.settings["seed"])
        sides = {**sides, "train": images.take(kept), "validation": images.take(held_out)}
    if split not in sides:
        raise UserError(f"{folder}: there is no {split} set; it has {', '.join(sides) or 'none of those asked for'}")
    if set(classes) != set(run.label_names):
        differ = sorted(set(classes) ^ set(run.label_names))[0]
        who = "the data" if differ in classes else "the model"
        raise UserError(f"{folder}: its classes are not those of {run.name}: only {who} has {differ!r}; split again?")
    weights = None
    if weighted:
        counts = np.bincount(_samples_of(sides["train"], list(classes), run, "train").classes, minlength=len(classes))
        weights = counts.sum() / (len(counts) * np.maximum(counts, 1))
    return _samples_of(sides[split], list(classes), run, split, weights)


def _samples_of(
    files: ImageFiles, class_names: list[str], run: Classifier, split: str, class_weights: np.ndarray | None = None
) -> Samples:
    """``files``, whose classes are numbered as in ``class_names``, with the numbers that the model has for them."""
    import numpy as np

    from accelerando.data.media import media_files

    labels = [class_names[number] for number in files.classes.tolist()]
    media = media_files(files.folder, files.names.to_pylist(), labels)
    every = np.arange(len(run.label_names))
    return Samples(media, media.classes(run.label_names), every, split, files.folder, class_weights)


def other_samples(runs: list[Classifier], args: Args) -> list[Samples]:
    """The samples of ``--data``, with each run's numbers; files left out are named on stderr.

    Raises:
        UserError: nothing there, no samples in it, or a class that a model does not know.
    """
    import numpy as np

    from accelerando.data.media import MEDIA, media_files
    from accelerando.data.table_formats import table_suffix

    where, settings, videos = str(args.data), runs[0].settings, all(run.takes_videos for run in runs)
    folder = Path(where)
    listed = bool("://" in where or table_suffix(where) or where.endswith(".tar") or any(folder.glob("*.tar"))
                  or (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file())  # fmt: skip
    if listed and not videos:
        raise UserError(f"--data {where}: only runs of clip_har.py are scored on it; name a folder of class folders")
    given = {"a table": ("media_folder", "file_column", "label_column"), "class folders": ("frame_folders",)}
    for name in given["class folders" if listed else "a table"]:
        if getattr(args, name) is not None:
            raise UserError(f"--{name} has no effect: --data {where} is {'no folder of' if listed else 'a folder of'} "
                            "class folders")  # fmt: skip
    if listed:
        columns = (getattr(args, name) or settings.get(name) for name in ("file_column", "label_column"))
        media = open_table(runs[0], where, "test", args.media_folder, *columns)
    else:
        if (folder / "splits").is_dir() and (folder / "raw").is_dir():
            raise UserError(f"--data {folder}: holds raw and splits; its class folders are in {folder / 'raw'}, and "
                            f"--data_dir {folder} scores a split of it")  # fmt: skip
        left_out: list[str] = []
        whole = bool(settings.get("frame_folders")) if args.frame_folders is None else args.frame_folders
        wanted = replace(MEDIA, whole_folders=whole) if videos else IMAGES
        found = class_folders(folder, lambda name, why: left_out.append(f"{folder / name}: {why}"), wanted)
        print_first(left_out, "left out", NAMED)
        labels = [name for name, files in found.items() for _ in files]
        media = media_files(folder, [name for files in found.values() for name in files], labels, wanted.whole_folders)
    for run, name in ((run, name) for run in runs for name in media.class_names()):
        if name not in run.label_names:
            close = difflib.get_close_matches(name, run.label_names, n=1)
            known = ", ".join(run.label_names[:8]) + (", ..." if len(run.label_names) > 8 else "")
            hint = f"did you mean {close[0]}?" if close else f"it knows {known}"
            place = f"--data {where}" if listed else folder / name
            raise UserError(f"{place}: {run.name} has no class {name!r}; {hint}")
    every = np.arange(len(runs[0].label_names))
    return [Samples(media, media.classes(run.label_names), every, "data", folder) for run in runs]


# -------------------------------------------------------------------------------------------------------- evaluation


@dataclass
class Score:
    """Of the r samples that could be read: their ``rows`` [r], ``labels`` int [r], ``logits`` float32 [r, C] and
    ``losses`` float32 [r]."""

    rows: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    losses: np.ndarray


def score(run: Classifier, samples: Samples, args: Args) -> Score:
    """The run's answers for all samples.

    Raises:
        UserError: the weights cannot be loaded, or none of the samples can be read.
    """
    import numpy as np

    media, device = samples.media, choose_device(args.device)
    opened = open_image_model(run.folder, device, run.module, args.trust_remote_code)
    tta = bool(run.settings.get("tta")) if args.tta is None else args.tta
    how = Computing(args.batch_size, args.num_workers, tta, precision(args.amp, run.settings.get("amp"), device),
                    frames=args.frames or run.settings.get("frames") or 8,
                    views=args.views or run.settings.get("views") or 1)  # fmt: skip
    answers = answers_of(opened, ((media.place(row), partial(media.open, row)) for row in range(len(media))), how)
    logits, sound = np.zeros((len(media), len(run.label_names)), np.float32), np.zeros(len(media), bool)
    row = 0
    with contextlib.closing(answers):
        for batch in with_progress(answers, len(media), Path(run.name).name, noun=run.noun):
            rows = row + np.flatnonzero([fault is None for fault in batch.faults])
            logits[rows], sound[rows] = batch.logits.numpy(), True
            row += len(batch.names)
    if not sound.any():
        raise UserError(f"{samples.source}: none of the {len(media):,} {run.noun} can be read")
    labels = samples.classes[sound]
    return Score(np.flatnonzero(sound), labels, logits[sound], losses_of(run, samples, logits[sound], labels))


def precision(asked: str | None, trained: str | bool | None, device: torch.device) -> str:
    """no, bf16 or fp16: what was asked for, or what the run was trained in, if this machine computes it.

    Raises:
        UserError: fp16 was asked for on a CPU.
    """
    fast = {"bf16": computes_bf16(), "fp16": device.type != "cpu"}
    if asked is not None:
        if asked == "fp16" and device.type == "cpu":
            raise UserError("--amp fp16 needs a GPU: --amp bf16 is the mixed precision of a CPU, --amp no the full one")
        return asked
    if trained == "auto":
        return next((kind for kind in ("bf16", "fp16") if fast[kind]), "no")
    return trained if fast.get(trained) else "no"


def losses_of(run: Classifier, samples: Samples, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The cross-entropy of each sample among its candidates, float32 [r]: as in training, or plain where the samples
    are not the run's."""
    import torch

    smoothing = float(run.settings.get("label_smoothing") or 0) if samples.split != "data" else 0.0
    weight = None if samples.class_weights is None else torch.from_numpy(samples.class_weights).float()
    labels, logits = among(samples, labels, logits)
    return torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).float(), torch.from_numpy(labels), weight, reduction="none", label_smoothing=smoothing
    ).numpy()


def among(samples: Samples, labels: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``labels`` [r] and ``logits`` [r, C] as places among, and of, the candidates."""
    import numpy as np

    return np.searchsorted(samples.candidates, labels), logits[:, samples.candidates]


def metrics_of(run: Classifier, samples: Samples, found: Score) -> dict[str, float]:
    """The metrics that the run's own script has for a split."""
    from accelerando.report.metrics import classification_metrics, top_k_accuracy

    labels, logits = among(samples, found.labels, found.logits)
    metrics = classification_metrics(labels, logits, found.losses)
    if run.takes_videos:
        metrics["top3_accuracy"] = top_k_accuracy(labels, logits, min(3, logits.shape[1]))
    if logits.shape[1] < len(run.label_names):
        metrics["accuracy_among_all"] = float((found.logits.argmax(1) == found.labels).mean())
    return metrics


def in_all(scores: list[Score]) -> list[Score]:
    """The scores of the samples that every run could read, whose decoders may differ."""
    import numpy as np

    kept = scores[0].rows
    for found in scores[1:]:
        kept = np.intersect1d(kept, found.rows)
    places = [np.searchsorted(found.rows, kept) for found in scores]
    return [
        Score(kept, found.labels[at], found.logits[at], found.losses[at])
        for found, at in zip(scores, places, strict=True)
    ]


def ensemble(runs: list[Classifier], samples: list[Samples], scores: list[Score]) -> Score:
    """The mean of the runs' probabilities, as logits, for the classes in the order of the first run."""
    import numpy as np

    from accelerando.report.predictions import probabilities

    first = scores[0]
    order = [[run.label_names.index(name) for name in runs[0].label_names] for run in runs]
    together = [probabilities(found.logits)[:, columns] for found, columns in zip(scores, order, strict=True)]
    # Zero probability would be an infinite loss.
    logits = np.log(np.maximum(np.mean(together, axis=0), np.finfo(np.float32).tiny)).astype(np.float32)
    losses = [
        losses_of(run, own, logits[:, np.argsort(columns)], found.labels)
        for run, own, found, columns in zip(runs, samples, scores, order, strict=True)
    ]
    return Score(first.rows, first.labels, logits, np.mean(losses, axis=0))


def check_same_samples(runs: list[Classifier], samples: list[Samples]) -> None:
    """UserError where runs would be scored on different samples or have different classes."""
    import numpy as np

    first, one = runs[0], samples[0]
    for run, own in zip(runs[1:], samples[1:], strict=True):
        if set(run.label_names) != set(first.label_names):
            odd = sorted(set(run.label_names) ^ set(first.label_names))[0]
            raise UserError(f"{run.name} and {first.name} have different classes ({odd!r}): score them one by one")
        names, firsts = np.array(run.label_names, object), np.array(first.label_names, object)
        same = own.source.resolve() == one.source.resolve() and own.media.names.equals(one.media.names)
        same = same and (names[own.classes] == firsts[one.classes]).all()
        if own.split != one.split or not same or {*names[own.candidates]} != {*firsts[one.candidates]}:
            hint = "score them one by one, or on --split test" if own.split in ("validation", "train") else "use --data"
            raise UserError(f"{run.name} and {first.name} have different {own.split} {run.noun}: {hint}")


def warn_of_other_samples(run: Classifier, samples: Samples, found: Score) -> None:
    """Warns where these are not the samples that the run itself scored: it may have been trained on some of them."""
    path = run.folder.parent / f"predictions_{samples.split}.csv"
    before = None if samples.split == "data" else predicted_files(path.parent, samples.split)
    if before is None:
        return
    now = set(samples.media.names.take(found.rows).to_pylist())
    if odd := sorted(before ^ now):
        change = "is new" if odd[0] in now else "is missing"
        print(
            f"warning: {len(odd):,} {samples.split} {run.noun} differ from those in {path} ({one_line(odd[0])} "
            f"{change}): if the data was split again, the run may have been trained on some",
            file=sys.stderr,
        )


# ------------------------------------------------------------------------------------------------------------ output


def results_of(
    runs: list[Classifier], samples: list[Samples], scores: list[Score], together: Score | None
) -> dict[str, Any]:
    """What ``results.json`` holds: the metrics of each run under ``runs``, and those of the ``ensemble``."""
    from accelerando.report.metrics import confusion_matrix

    def metrics(run: Classifier, own: Samples, found: Score) -> dict[str, float]:
        return {**metrics_of(run, own, found), "count": len(found.rows)}

    last = together or scores[0]
    matrix = confusion_matrix(last.labels, last.logits.argmax(axis=1), len(runs[0].label_names))
    return {
        "data": printable(str(samples[0].source)),
        "split": samples[0].split,
        "of": runs[0].noun,
        "runs": {run.name: metrics(run, own, found) for run, own, found in zip(runs, samples, scores, strict=True)},
        **({"ensemble": metrics(runs[0], samples[0], together)} if together else {}),
        "left_out": len(samples[0].media) - len(last.rows),
        "label_names": runs[0].label_names,
        "confusion_matrix": matrix.tolist(),
        "command": command_line(),
    }


def columns_of(results: dict[str, Any], titles: list[str]) -> dict[str, dict[str, float]]:
    """The metrics of each run under its title, and of the ensemble."""
    columns = dict(zip(titles, results["runs"].values(), strict=True))
    return columns | ({"ensemble": results["ensemble"]} if "ensemble" in results else {})


def metric_names(values: dict[str, float]) -> list[str]:
    """The metrics among the entries of a split's results, in their order."""
    return [name for name, value in values.items() if name != "count" and isinstance(value, float)]


def described(results: dict[str, Any]) -> str:
    """What was scored, in one line."""
    count = next(iter(results["runs"].values()))["count"]
    what = "of --data" if results["split"] == "data" else f"{results['split']} split"
    unread = f", {results['left_out']:,} more cannot be read" if results["left_out"] else ""
    return f"{count:,} {results['of']} of {results['data']} ({what}){unread}"


def table_text(results: dict[str, Any]) -> str:
    """The result on one screen: what was scored, the metrics, and notes on them."""
    import textwrap

    from accelerando.report.results import aligned_table

    names = list(results["runs"])
    several = len(names) > 1
    titles = [f"run {number}" for number in range(1, len(names) + 1)] if several else [results["split"]]
    lines = [f"{title}  {name}" for title, name in zip(titles, names, strict=True)] if several else names
    columns = columns_of(results, titles)
    texts = {title: {name: f"{values[name]:.4f}" for name in metric_names(values)} for title, values in columns.items()}
    lines += [described(results), "", aligned_table(metric_names(columns[titles[0]]), texts)]
    counts = zip(results["label_names"], results["confusion_matrix"], strict=True)
    if absent := [name for name, row in counts if not sum(row)]:
        note = f"None of the {results['of']} is of {', '.join(absent)}; the macro means count such a class as 0."
        lines += ["", *textwrap.wrap(note, 80)]
    return "\n".join(lines)


def write_results(folder: Path, samples: Samples, results: dict[str, Any], last: Score) -> None:
    """Writes the files of an evaluation into the new folder ``folder``; predictions, confusion matrix and report are
    of ``last``, which is the ensemble where there are several runs."""
    import numpy as np

    from accelerando.report.metrics import report_text
    from accelerando.report.predictions import probabilities, write_predictions

    folder.mkdir(parents=True)
    names, matrix = results["label_names"], np.array(results["confusion_matrix"])
    write_text(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "classification_report.txt", report_text(matrix, names))
    plot_confusion(matrix, names, folder / "confusion.png")
    files = samples.media.names.take(last.rows).to_pylist()
    write_predictions(folder / "predictions.csv", files, names, probabilities(last.logits), last.labels)
    write_page(folder / "report.html", samples, results, last)


def write_page(path: Path, samples: Samples, results: dict[str, Any], last: Score) -> None:
    """``report.html``: the figures, the confusion matrix, each class, and the worst mistakes as images."""
    import numpy as np

    from accelerando.data.decode import small_jpeg
    from accelerando.data.media import thumbnail
    from accelerando.report.metrics import per_class
    from accelerando.report.predictions import worst_mistakes

    names, matrix = results["label_names"], np.array(results["confusion_matrix"])
    worst = worst_mistakes(last.labels, last.logits, names)
    for mistake in worst:
        row = int(last.rows[mistake["row"]])
        mistake["text"] = samples.media.names[row].as_py()
        if (pixels := thumbnail(samples.media.open(row), SIDE)) is not None:
            mistake["image"] = small_jpeg(pixels, SIDE)
    columns = columns_of(results, [Path(name).name for name in results["runs"]])
    who, shown = list(columns.items())[-1]
    tiles = [
        ("accuracy", f"{100 * shown['accuracy']:.2f} %", f"{shown['count']:,} {results['of']}"),
        ("F1 (macro)", f"{shown['f1_macro']:.4f}", f"{len(names)} classes"),
    ]
    values = per_class(matrix)
    rows = [(name, *(column[name] for column in columns.values())) for name in metric_names(shown)]
    blocks = [
        page.headline(tiles),
        page.table(["metric", *columns], rows, title="Metrics"),
        page.confusion(matrix, names, title=f"Confusion matrix, {who}"),
        page.per_class(names, *(values[name] for name in ("precision", "recall", "f1", "support"))),
        page.mistakes(worst),
        page.command(results["command"], title="Repeat it"),
    ]  # fmt: skip
    page.write_report(path, f"Evaluation of {', '.join(results['runs'])}", described(results), blocks)


# -------------------------------------------------------------------------------------------------------------- main


def check_args(args: Args) -> None:
    """UserError for what can be wrong before anything is loaded."""
    check_ranges(args, num_workers=(1, 1024), frames=(1, 1024), views=(1, 64))
    if not args.runs:
        raise UserError("no run: name one, or several, as in: python tools/evaluate.py runs/x")
    if args.data and (args.split or args.data_dir):
        flag = "--split" if args.split else "--data_dir"
        raise UserError(f"{flag} chooses among a run's own samples, --data names others: drop one")
    for name in ("media_folder", "file_column", "label_column", "frame_folders"):
        if getattr(args, name) is not None and not args.data:
            raise UserError(f"--{name} says how --data is read, which is not given")
    if len({Path(name).resolve() for name in args.runs}) < len(args.runs):
        raise UserError("a run is named twice")
    if args.output_dir is None:
        return
    target = Path(args.output_dir)
    if target.exists() and not target.is_dir():
        raise UserError(f"--output_dir {target}: is a file")
    there = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if others := [name for name in there if name not in OURS]:
        raise UserError(f"--output_dir {target}: holds {others[0]}, which is no evaluation's: choose another folder")
    if there and not args.overwrite:
        raise UserError(f"--output_dir {target}: holds an evaluation already; --overwrite replaces it")
    check_can_be_made(target, "--output_dir")


def main() -> None:
    args = parse_args(Args, ALIASES)
    check_args(args)
    quiet_libraries()
    module = import_user_module(args.import_module) if args.import_module else None
    classifiers = [read_classifier(name, module) for name in args.runs]
    for name in ("media_folder", "file_column", "label_column", "frame_folders", "frames", "views"):
        of_images = next((run.name for run in classifiers if not run.takes_videos), None)
        if getattr(args, name) is not None and of_images:
            raise UserError(f"--{name} has no effect on {of_images}, which is no run of clip_har.py")
    if args.data:
        samples = other_samples(classifiers, args)
    else:
        samples = [own_samples(run, args.split, args.data_dir) for run in classifiers]
    check_same_samples(classifiers, samples)
    scores = in_all([score(run, own, args) for run, own in zip(classifiers, samples, strict=True)])
    for run, own, found in zip(classifiers, samples, scores, strict=True):
        warn_of_other_samples(run, own, found)
    together = ensemble(classifiers, samples, scores) if len(classifiers) > 1 else None
    results = results_of(classifiers, samples, scores, together)
    if args.output_dir:
        with whole_folder(Path(args.output_dir)) as draft:
            write_results(draft, samples[0], results, together or scores[0])
    with open_output(None) as stream:
        if args.format == "json":
            stream.write(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
            return
        stream.write(table_text(results) + "\n")
        if args.output_dir:
            stream.write(f"\nReport: {Path(args.output_dir) / 'report.html'}\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the draft is cleared away
    with errors_in_one_line():
        main()
