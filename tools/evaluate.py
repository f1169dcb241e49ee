"""Score trained image classifiers on labelled images.

  python tools/evaluate.py runs/x                        the run's own test images
  python tools/evaluate.py runs/x --split validation
  python tools/evaluate.py runs/x --data data/new --output_dir scores
  python tools/evaluate.py runs/x_fold0 runs/x_fold1     each one, and both together
  python tools/evaluate.py runs/mine --import my_module  a model of your own class

--data is a folder with a folder for each class, with the names of the model's
classes; some may be missing. Without it the images are those of the run's
data_dir, and the numbers those of its results.json. Of several runs their
ensemble is scored too, which is the mean of their probabilities.

The loss is that of the run's training (label smoothing, class weights); with
--data it is the plain cross-entropy. An ensemble's loss is the mean over the
losses of its runs. An image that cannot be read is left out and named.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from accelerando.base.config import Alias, check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import check_can_be_made, whole_folder, write_text
from accelerando.base.log import quiet_libraries
from accelerando.base.model_folder import read_json
from accelerando.base.processes import command_line
from accelerando.base.texts import one_line
from accelerando.data.folders import ImageFiles, class_folders, read_splits
from accelerando.inference.answers import image_answers, with_progress
from accelerando.inference.outputs import open_output, print_first, printable
from accelerando.inference.runs import model_folder, predicted_files, read_results, read_settings, run_of
from accelerando.inference.saved import choose_device, import_user_module, open_image_model, task_of_saved
from accelerando.report import page
from accelerando.report.plots import plot_confusion
from accelerando.train.accelerator import computes_bf16

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    import torch

ALIASES: dict[str, Alias] = {"eval_batch_size": "batch_size", "import": "import_module"}
Runs = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
OURS = ("results.json", "classification_report.txt", "confusion.png", "predictions.csv", "report.html")
NAMED = 5  # files left out of a folder that are named


@dataclass
class Args:
    # -- what is scored --
    runs: Runs = ()  # run folders, their best/ or last/, or model folders
    data: str | None = None  # score this folder of class folders instead of a split of the run's
    split: Literal["test", "validation", "train"] | None = None  # of the run's images (default: test if there is one)
    data_dir: str | None = None  # where the run's images lie now (default: where they were in training)
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
    """A run, or a model folder alone: how it was named, its weights, its classes, its settings (or none), and the
    module of the user's that defines its class."""

    name: str
    folder: Path
    label_names: list[str]
    settings: dict[str, Any]
    module: ModuleType | None = None


@dataclass
class LabelledImages:
    """Labelled images and where they come from; ``class_weights`` [C] where the run's loss has them."""

    files: ImageFiles
    split: str  # test, validation, train or data
    source: Path
    class_weights: np.ndarray | None = None


def read_classifier(name: str, module: ModuleType | None = None) -> Classifier:
    """The classifier that ``name`` names, its weights not yet loaded.

    Raises:
        UserError: no model there, or none that gives each image one class of several.
    """
    path = Path(name)
    folder = model_folder(path)
    config = read_json(folder / "config.json")
    if (task := task_of_saved(folder, config, module)) != "image":
        what = {"text": "texts", "sign": "signs"}[task]
        raise UserError(f"{name}: a classifier of {what}; only runs of image_classify.py are scored here")
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
    return Classifier(name.rstrip("/"), folder, labels, settings, module)


def own_images(run: Classifier, split: str | None, data_dir: str | None) -> LabelledImages:
    """A split of the images that the run was trained on; by default the test split, or else the validation's.

    Raises:
        UserError: nothing says where they are, they are there no longer, or they have other classes.
    """
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
    if split is None and "test" not in sides:
        split = "validation"
        classes, sides = read_splits(folder, fold, wanted=sorted(wanted | {split}))
    split = split or "test"
    if split not in sides:
        raise UserError(f"{folder}: there is no test set; give --split validation")
    if set(classes) != set(run.label_names):
        differ = sorted(set(classes) ^ set(run.label_names))[0]
        who = "the data" if differ in classes else "the model"
        raise UserError(f"{folder}: its classes are not those of {run.name}: only {who} has {differ!r}; split again?")
    weights = None
    if weighted:
        counts = np.bincount(_renumbered(sides["train"], list(classes), run).classes, minlength=len(classes))
        weights = counts.sum() / (len(counts) * np.maximum(counts, 1))
    return LabelledImages(_renumbered(sides[split], list(classes), run), split, folder, weights)


def class_images(runs: list[Classifier], folder: Path) -> list[LabelledImages]:
    """The images of a folder of class folders, with each run's numbers; files left out are named on stderr.

    Raises:
        UserError: no such folder, one without images, or a class that the model does not know.
    """
    import numpy as np
    import pyarrow as pa

    left_out: list[str] = []
    if (folder / "splits").is_dir() and (folder / "raw").is_dir():
        raise UserError(f"--data {folder}: holds raw and splits; its class folders are in {folder / 'raw'}, and "
                        f"--data_dir {folder} scores a split of it")  # fmt: skip
    found = class_folders(folder, lambda name, why: left_out.append(f"{folder / name}: {why}"))
    for run, name in ((run, name) for run in runs for name in found):
        if name not in run.label_names:
            close = difflib.get_close_matches(name, run.label_names, n=1)
            known = ", ".join(run.label_names[:8]) + (", ..." if len(run.label_names) > 8 else "")
            hint = f"did you mean {close[0]}?" if close else f"it knows {known}"
            raise UserError(f"{folder / name}: {run.name} has no class {name!r}; {hint}")
    print_first(left_out, "left out", NAMED)
    numbers = [number for number, files in enumerate(found.values()) for _ in files]
    names = pa.array((file for files in found.values() for file in files), pa.large_string())
    files = ImageFiles(folder, names, np.array(numbers, np.int64))
    return [LabelledImages(_renumbered(files, list(found), run), "data", folder) for run in runs]


def _renumbered(files: ImageFiles, class_names: list[str], run: Classifier) -> ImageFiles:
    """``files``, whose classes are numbered as in ``class_names``, with the numbers that the model has for them."""
    import numpy as np

    numbers = np.array([run.label_names.index(name) for name in class_names])
    return ImageFiles(files.folder, files.names, numbers[files.classes])


# -------------------------------------------------------------------------------------------------------- evaluation


@dataclass
class Score:
    """Of the r images that could be read: their ``rows`` [r], ``labels`` int [r], ``logits`` float32 [r, C] and
    ``losses`` float32 [r]."""

    rows: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    losses: np.ndarray


def score(run: Classifier, images: LabelledImages, args: Args) -> Score:
    """The run's answers for all images.

    Raises:
        UserError: the weights cannot be loaded, or no image can be read.
    """
    import numpy as np

    files, device = images.files, choose_device(args.device)
    opened = open_image_model(run.folder, device, run.module, args.trust_remote_code)
    tta = bool(run.settings.get("tta")) if args.tta is None else args.tta
    names = (str(files.path(row)) for row in range(len(files)))
    answers = image_answers(
        opened, names, args.batch_size, args.num_workers, tta, precision(args.amp, run.settings.get("amp"), device)
    )
    logits, sound = np.zeros((len(files), len(run.label_names)), np.float32), np.zeros(len(files), bool)
    row = 0
    with contextlib.closing(answers):
        for batch in with_progress(answers, len(files), Path(run.name).name):
            rows = row + np.flatnonzero([fault is None for fault in batch.faults])
            logits[rows], sound[rows] = batch.logits.numpy(), True
            row += len(batch.names)
    if not sound.any():
        raise UserError(f"{images.source}: none of the {len(files):,} images can be read")
    labels = files.classes[sound]
    return Score(np.flatnonzero(sound), labels, logits[sound], losses_of(run, images, logits[sound], labels))


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


def losses_of(run: Classifier, images: LabelledImages, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The cross-entropy of each image, float32 [r]: as in training, or plain where the images are not the run's."""
    import torch

    smoothing = float(run.settings.get("label_smoothing") or 0) if images.split != "data" else 0.0
    weight = None if images.class_weights is None else torch.from_numpy(images.class_weights).float()
    return torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).float(), torch.from_numpy(labels), weight, reduction="none", label_smoothing=smoothing
    ).numpy()


def in_all(scores: list[Score]) -> list[Score]:
    """The scores of the images that every run could read, whose decoders may differ."""
    import numpy as np

    kept = scores[0].rows
    for found in scores[1:]:
        kept = np.intersect1d(kept, found.rows)
    places = [np.searchsorted(found.rows, kept) for found in scores]
    return [
        Score(kept, found.labels[at], found.logits[at], found.losses[at])
        for found, at in zip(scores, places, strict=True)
    ]


def ensemble(runs: list[Classifier], images: list[LabelledImages], scores: list[Score]) -> Score:
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
        for run, own, found, columns in zip(runs, images, scores, order, strict=True)
    ]
    return Score(first.rows, first.labels, logits, np.mean(losses, axis=0))


def check_same_images(runs: list[Classifier], images: list[LabelledImages]) -> None:
    """UserError where runs would be scored on different images or have different classes."""
    import numpy as np

    for run, own in zip(runs[1:], images[1:], strict=True):
        if set(run.label_names) != set(runs[0].label_names):
            odd = sorted(set(run.label_names) ^ set(runs[0].label_names))[0]
            raise UserError(f"{run.name} and {runs[0].name} have different classes ({odd!r}): score them one by one")
        labels = [np.array(one.label_names)[files.files.classes] for one, files in ((run, own), (runs[0], images[0]))]
        same = own.source.resolve() == images[0].source.resolve() and own.files.names.equals(images[0].files.names)
        if own.split != images[0].split or not same or (labels[0] != labels[1]).any():
            hint = "score them one by one, or on --split test" if own.split in ("validation", "train") else "use --data"
            raise UserError(f"{run.name} and {runs[0].name} have different {own.split} images: {hint}")


def warn_of_other_images(run: Classifier, images: LabelledImages, found: Score) -> None:
    """Warns where these are not the images that the run itself scored: it may have been trained on some of them."""
    path = run.folder.parent / f"predictions_{images.split}.csv"
    before = None if images.split == "data" else predicted_files(path.parent, images.split)
    if before is None:
        return
    now = {images.files.names[int(row)].as_py() for row in found.rows}
    if odd := sorted(before ^ now):
        change = "is new" if odd[0] in now else "is missing"
        print(
            f"warning: {len(odd):,} {images.split} images differ from those in {path} ({one_line(odd[0])} {change}): "
            "if the data was split again, the run may have been trained on some",
            file=sys.stderr,
        )


# ------------------------------------------------------------------------------------------------------------ output


def results_of(
    runs: list[Classifier], images: LabelledImages, scores: list[Score], together: Score | None
) -> dict[str, Any]:
    """What ``results.json`` holds: the metrics of each run under ``runs``, and those of the ``ensemble``."""
    from accelerando.report.metrics import classification_metrics, confusion_matrix

    def metrics(found: Score) -> dict[str, float]:
        return {**classification_metrics(found.labels, found.logits, found.losses), "count": len(found.rows)}

    last = together or scores[0]
    matrix = confusion_matrix(last.labels, last.logits.argmax(axis=1), len(runs[0].label_names))
    return {
        "data": printable(str(images.source)),
        "split": images.split,
        "runs": {run.name: metrics(found) for run, found in zip(runs, scores, strict=True)},
        **({"ensemble": metrics(together)} if together else {}),
        "left_out": len(images.files) - len(last.rows),
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
    what = "class folders" if results["split"] == "data" else f"{results['split']} split"
    unread = f", {results['left_out']:,} more cannot be read" if results["left_out"] else ""
    return f"{count:,} images of {results['data']} ({what}){unread}"


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
        note = f"No image is of {', '.join(absent)}; the macro means count such a class as 0."
        lines += ["", *textwrap.wrap(note, 80)]
    return "\n".join(lines)


def write_results(folder: Path, images: LabelledImages, results: dict[str, Any], last: Score) -> None:
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
    files = [images.files.names[int(row)].as_py() for row in last.rows]
    write_predictions(folder / "predictions.csv", files, names, probabilities(last.logits), last.labels)
    write_page(folder / "report.html", images, results, last)


def write_page(path: Path, images: LabelledImages, results: dict[str, Any], last: Score) -> None:
    """``report.html``: the figures, the confusion matrix, each class, and the worst mistakes as images."""
    import numpy as np

    from accelerando.data.decode import thumbnail
    from accelerando.report.metrics import per_class
    from accelerando.report.predictions import worst_mistakes

    names, matrix = results["label_names"], np.array(results["confusion_matrix"])
    worst = worst_mistakes(last.labels, last.logits, names)
    for mistake in worst:
        row = int(last.rows[mistake["row"]])
        mistake["text"] = images.files.names[row].as_py()
        mistake["image"] = thumbnail(images.files.path(row).read_bytes())
    columns = columns_of(results, [Path(name).name for name in results["runs"]])
    who, shown = list(columns.items())[-1]
    tiles = [
        ("accuracy", f"{100 * shown['accuracy']:.2f} %", f"{shown['count']:,} images"),
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
    check_ranges(args, num_workers=(1, 1024))
    if not args.runs:
        raise UserError("no run: name one, or several, as in: python tools/evaluate.py runs/x")
    if args.data and (args.split or args.data_dir):
        flag = "--split" if args.split else "--data_dir"
        raise UserError(f"{flag} chooses among a run's own images, --data names others: drop one")
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
    if args.data:
        images = class_images(classifiers, Path(args.data))
    else:
        images = [own_images(run, args.split, args.data_dir) for run in classifiers]
    check_same_images(classifiers, images)
    scores = in_all([score(run, own, args) for run, own in zip(classifiers, images, strict=True)])
    for run, own, found in zip(classifiers, images, scores, strict=True):
        warn_of_other_images(run, own, found)
    together = ensemble(classifiers, images, scores) if len(classifiers) > 1 else None
    results = results_of(classifiers, images[0], scores, together)
    if args.output_dir:
        with whole_folder(Path(args.output_dir)) as draft:
            write_results(draft, images[0], results, together or scores[0])
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
