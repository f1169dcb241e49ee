"""Scores classifiers of images and videos: on a split of their run's samples, or on others; also their ensemble."""

from __future__ import annotations

import contextlib
import difflib
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from accelerando.base.errors import UserError
from accelerando.base.files import cache_folder
from accelerando.base.texts import one_line
from accelerando.data.folders import IMAGES, ImageFiles, class_folders, read_splits
from accelerando.data.splits import stratified_split
from accelerando.inference.answers import Computing, answers_of, with_progress
from accelerando.inference.named import Named, label_names, precision
from accelerando.inference.outputs import print_first
from accelerando.inference.runs import predicted_files
from accelerando.inference.saved import choose_device, open_image_model, takes_videos
from accelerando.inference.scores import Evaluation, Head, Scores

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np

    from accelerando.data.media import Media

NAMED = 5  # files left out of a folder that are named
SIDE = 128  # pixels of the longer side of an image in a report


class Settings(Protocol):
    """What is read of a tool's ``Args``."""

    data: str | None
    split: str | None
    data_dir: str | None
    media_folder: str | None
    file_column: str | None
    label_column: str | None
    frame_folders: bool | None
    frames: int | None
    views: int | None
    tta: bool | None
    amp: str | None
    device: str
    batch_size: int
    num_workers: int
    trust_remote_code: bool


def evaluate_media(models: list[Named], args: Settings, module: ModuleType | None = None) -> Evaluation:
    """The scores of classifiers of images and videos and, of several, of their ensemble; ``module``: from ``--import``.

    Raises:
        UserError: the samples are not there or have other classes, or the models have different ones.
    """
    from accelerando.data.decode import small_jpeg
    from accelerando.data.media import thumbnail

    runs = [read_classifier(model, module) for model in models]
    samples = other_samples(runs, args) if args.data else [own_samples(run, args.split, args.data_dir) for run in runs]
    check_same_samples(runs, samples)
    found = in_all([score(run, own, args) for run, own in zip(runs, samples, strict=True)])
    for run, own, each in zip(runs, samples, found, strict=True):
        warn_of_other_samples(run, own, each)
    scores = [_named_scores(run.name, run, own, each) for run, own, each in zip(runs, samples, found, strict=True)]
    media, rows = samples[0].media, found[0].rows
    together = None
    if len(runs) > 1:
        together = _named_scores("ensemble", runs[0], samples[0], ensemble(runs, samples, found))

    def picture(row: int) -> bytes | None:
        pixels = thumbnail(media.open(int(rows[row])), SIDE)
        return None if pixels is None else small_jpeg(pixels, SIDE)

    return Evaluation(
        str(samples[0].source), samples[0].split, runs[0].noun, scores, {"file": media.names.take(rows).to_pylist()},
        together, len(media) - len(rows), picture,
    )  # fmt: skip


def _named_scores(name: str, run: Classifier, samples: Samples, found: Score) -> Scores:
    labels, logits = among(samples, found.labels, found.logits)
    head = Head("", run.label_names, found.labels, found.logits)
    right = {"accuracy": logits.argmax(axis=1) == labels}
    return Scores(name, metrics_of(run, samples, found), len(found.rows), [head], right)


@dataclass
class Classifier:
    """A model that was named, its classes, the module of the user's that defines its class, and whether it takes
    videos, as those of clip_har.py do."""

    model: Named
    label_names: list[str]
    module: ModuleType | None = None
    takes_videos: bool = False

    @property
    def name(self) -> str:
        """How it was named."""
        return self.model.name

    @property
    def settings(self) -> dict[str, Any]:
        """Those of its run, or none."""
        return self.model.settings

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


def read_classifier(model: Named, module: ModuleType | None = None) -> Classifier:
    """The classifier that was named, its weights not yet loaded.

    Raises:
        UserError: it does not give each sample one class of several.
    """
    return Classifier(model, label_names(model), module, takes_videos(model.config))


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


def other_samples(runs: list[Classifier], args: Settings) -> list[Samples]:
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
        raise UserError(f"--data {where}: only runs of clip_har.py are scored on it; name class folders or a table")
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


def score(run: Classifier, samples: Samples, args: Settings) -> Score:
    """The run's answers for all samples.

    Raises:
        UserError: the weights cannot be loaded, or none of the samples can be read.
    """
    import numpy as np

    media, device = samples.media, choose_device(args.device)
    model = run.model
    opened = open_image_model(model.folder, device, run.module, args.trust_remote_code, onnx_file=model.onnx_file)
    tta = bool(run.settings.get("tta")) if args.tta is None else args.tta
    how = Computing(args.batch_size, args.num_workers, tta, precision(args.amp, model.trained_precision, device),
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

    from accelerando.report.predictions import ensemble_logits

    first = scores[0]
    order = [[run.label_names.index(name) for name in runs[0].label_names] for run in runs]
    logits = ensemble_logits([found.logits[:, columns] for found, columns in zip(scores, order, strict=True)])
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
    if samples.split == "data" or run.model.run is None:
        return
    path = run.model.run / f"predictions_{samples.split}.csv"
    if (before := predicted_files(path.parent, samples.split)) is None:
        return
    now = set(samples.media.names.take(found.rows).to_pylist())
    if odd := sorted(before ^ now):
        change = "is new" if odd[0] in now else "is missing"
        print(
            f"warning: {len(odd):,} {samples.split} {run.noun} differ from those in {path} ({one_line(odd[0])} "
            f"{change}): if the data was split again, the run may have been trained on some",
            file=sys.stderr,
        )
