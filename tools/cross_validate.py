"""Train every fold, score all of them on the same test set, and sum them up.

  python tools/cross_validate.py scripts/image_classify.py --data_dir data/insects --epochs 20
  python tools/cross_validate.py --folds 0 2 scripts/image_classify.py --data_dir data/insects
  python tools/cross_validate.py --config_file accelerate_configs/multi_gpu.yaml --num_processes 2 \\
    scripts/image_classify.py --data_dir data/insects
  python tools/cross_validate.py scripts/text_classify.py \\
    --train_file data/train.csv --num_folds 5 --group_column author
  python tools/cross_validate.py scripts/sign_train.py \\
    --keypoints_train data/clips --num_folds 5 --group_column signer

Images and actions have the folds of tools/split_folds.py. The training rows of
texts and the clips of signs are divided by --num_folds: stratified, and the
rows of one group stay together.

Arguments before the script go to `accelerate launch`, except for the flags
below; arguments after it go to the script, or to a copy of it. Without flags
for the launcher your `accelerate config` is used, or, if there is none and no
GPU, accelerate_configs/cpu.yaml.

Run the same command again to resume: finished folds are kept, a stopped one is
resumed. --overwrite after the script starts all of them again.

runs/<name>_fold<k> are the runs, runs/<name>_cv holds the result: mean and
standard deviation over the folds, and the ensemble, which is the mean of their
probabilities. Its predictions_validation.csv has a prediction for every sample
outside the test set, by the one model that was not trained on it. (Of several
labels a row, or numbers, there are mean and standard deviation alone.)
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import tyro

from accelerando.base.config import grouped, parse_args, without_flags
from accelerando.base.errors import Stopped, UserError, errors_in_one_line
from accelerando.base.files import check_can_be_made, is_unused, whole_folder
from accelerando.base.processes import command_line
from accelerando.data.folders import read_class_map, read_index
from accelerando.inference import runs
from accelerando.inference.runs import Predictions
from accelerando.inference.scripts import import_script
from accelerando.launch import Signals, accelerate_command, default_launcher, how_it_ended, run_script, was_stopped
from accelerando.report import page
from accelerando.report.plots import plot_confusion

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "accelerate_configs"
WORDS = "[LAUNCHER'S FLAG ...] SCRIPT [FLAG ...]"
EXAMPLE = "python tools/cross_validate.py scripts/image_classify.py --data_dir data/insects"
# Of the metrics, what is in tables: the first of these that a run has.
SHOWN = (
    {"accuracy": "accuracy", "f1_macro": "F1 macro", "loss": "loss"},
    {"gloss_accuracy": "accuracy", "gloss_f1_macro": "F1 macro", "loss": "loss"},
    {"mAP": "mAP", "f1_macro": "F1 macro", "subset_accuracy": "all right"},
    {"pearson": "Pearson", "spearman": "Spearman", "mse": "MSE"},
)
IGNORED = {"num_workers", "pin_memory"}  # settings that may change between a run and its resumption
STATES = {  # of a fold: what is said of it, and the flag that its run gets
    "new": ("starts", []),
    "restart": ("starts again", ["--overwrite"]),
    "stopped": ("is resumed", ["--resume"]),
    "finished": ("is finished", []),
}
SMALLEST = 5e-7  # probabilities are written with six digits: the most that 0.000000 can stand for


@dataclass
class Args:
    # -- cross-validation --
    words: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar=WORDS)] = ()  # see above
    folds: tuple[int, ...] = ()  # only these, as 0 2 (default: all that splits/ holds)


class ScriptArgs(Protocol):
    """What the ``Args`` of a script with folds hold, among others: ``data_dir`` or ``num_folds``."""

    fold: int
    output_dir: str
    run_name: str | None
    resume: str | None
    overwrite: bool


@dataclass
class Fold:
    """One fold: its number, the settings and the folder of its run, and the images that belong to it, of validation and
    test if there is one; None: the script itself divides the rows."""

    number: int
    args: ScriptArgs
    directory: Path
    images: dict[str, set[str]] | None


# ----------------------------------------------------------------------------------------------------- command line


def split_words(words: list[str]) -> tuple[list[str], list[str], Path, list[str]]:
    """(the tool's own flags, those of the launcher, the script, its flags) of a command line.

    Raises:
        UserError: no script, one that is not there, or a flag that picks a fold where it cannot.
    """
    from accelerando.data.table_formats import similar_file

    at = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        raise UserError(f"no script among the arguments; give one, as in: {EXAMPLE}")
    script, ours, launcher = Path(words[at]), [], []
    if not script.is_file():
        raise UserError(f"{script}: no such file{similar_file(script)}")
    for word in words[:at]:
        if word.startswith("-"):
            kept = ours if word.partition("=")[0] == "--folds" else launcher
        elif not ours and not launcher:
            if word in ("accelerate", "launch"):  # typed out of habit
                continue
            raise UserError(f"{word!r} before {script}: flags of accelerate launch, or --folds, come first")
        kept.append(word)
    for word in (*launcher, *words[at + 1 :]):
        if word.partition("=")[0] in ("--fold", "--folds"):
            raise UserError(f"{word}: all folds are trained; --folds 0 2, before {script}, chooses some of them")
    return ours, launcher, script, words[at + 1 :]


def load_script(path: Path) -> ModuleType:
    """The script, imported as a module.

    Raises:
        UserError: no such file, or it lacks what a script with folds has: ``Args`` with ``fold`` and what names a run,
            and ``default_name``.
    """
    module = import_script(path)
    known = {field.name for field in dataclasses.fields(module.Args)} if hasattr(module, "Args") else set()
    missing = [name for name in ("fold", "output_dir", "run_name", "resume") if name not in known]
    if missing or not hasattr(module, "default_name"):
        what = f"its Args have no {missing[0]}" if missing else "it has no default_name"
        with_folds = "image_classify.py, clip_har.py, text_classify.py and sign_train.py"
        raise UserError(f"{path}: {what}; {with_folds} have folds, and copies of them")
    return module


def folds_of(args: ScriptArgs) -> dict[int, dict[str, set[str]] | None]:
    """Fold -> its images, or None where the script divides its training rows itself.

    Raises:
        UserError: neither is there, or the folds of the images are not a cross-validation.
    """
    if getattr(args, "num_folds", None):
        return dict.fromkeys(range(args.num_folds))
    if hasattr(args, "num_folds"):
        raise UserError("--num_folds is missing: into how many folds the training rows are divided, as --num_folds 5")
    if not args.data_dir:
        raise UserError("--data_dir is missing: a folder with raw/<class>/ and the splits/ of tools/split_folds.py")
    return read_folds(Path(args.data_dir))


# ------------------------------------------------------------------------------------------------------------ folds


def read_folds(data: Path) -> dict[int, dict[str, set[str]]]:
    """Fold -> its images of ``validation``, and of ``test`` if there is a test set.

    Raises:
        UserError: there are no folds, or an image that is not test is not validated on exactly once.
    """
    splits = data / "splits"
    again = f"python tools/split_folds.py --raw_data {data / 'raw'} --folds 5"
    if not splits.is_dir() and (data / "train").is_dir():
        raise UserError(
            f"{data}: train/ and val/ are one split, there is nothing to cross-validate; for folds, gather the "
            f"images of both in {data / 'raw'}/<class>, then: {again}"
        )
    classes = read_class_map(splits)

    def names(file: str) -> list[str]:
        return read_index(splits / file, classes).names.to_pylist()

    found = (re.fullmatch(r"fold_(\d+)_val\.txt", path.name) for path in splits.iterdir())
    numbers = sorted(int(match[1]) for match in found if match)
    if len(numbers) < 2:
        raise UserError(f"{splits}: {len(numbers)} folds, two at least are needed; {again} --overwrite makes them")
    test = names("test.txt") if (splits / "test.txt").exists() else []
    owner = dict.fromkeys(test, "test.txt")
    folds = {}
    for number in numbers:
        file = f"fold_{number}_val.txt"
        validated = names(file)
        if twice := [name for name in validated if name in owner]:
            raise UserError(
                f"{splits / file}: {twice[0]} is in {owner[twice[0]]} too, so this is no cross-validation; {again} "
                "--overwrite makes new folds"
            )
        owner.update(dict.fromkeys(validated, file))
        folds[number] = {"validation": set(validated), **({"test": set(test)} if test else {})}
    for number in numbers:
        own, file = f"fold_{number}_val.txt", f"fold_{number}_train.txt"
        for name in names(file):
            if owner.get(name) in (None, own, "test.txt"):
                where = f"is in {owner[name]} too" if name in owner else "is in no fold_*_val.txt"
                raise UserError(f"{splits / file}: {name} {where}; {again} --overwrite makes new folds")
    return folds


def run_names(module: ModuleType, args: ScriptArgs, numbers: list[int]) -> tuple[dict[int, str], str, bool]:
    """(fold -> name of its run, name that they share, whether the script needs --run_name to use them)."""
    if args.run_name:
        return {number: f"{args.run_name}_fold{number}" for number in numbers}, args.run_name, True
    names = {number: module.default_name(dataclasses.replace(args, fold=number)) for number in numbers}
    first = numbers[0]
    if len(set(names.values())) < len(numbers):  # a copy whose names do without
        return {number: f"{names[first]}_fold{number}" for number in numbers}, names[first], True
    before, _, after = names[first].rpartition(f"_fold{first}")
    return names, before + after, False


def first_difference(args: ScriptArgs, before: Mapping[str, Any]) -> str | None:
    """The first setting in which a run's saved ones differ from ``args``, of those that change a result."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    groups = [group for section, group in grouped(args).items() if section != "output"]
    now = {name: value for group in groups for name, value in group.items() if name not in IGNORED}
    for name, value in now.items():
        default = defaults[name]
        old = before.get(name, list(default) if isinstance(default, tuple) else default)  # a flag newer than the run
        if name == "data_dir" and Path(str(old)).resolve() == Path(str(value)).resolve():
            continue
        if old != value:
            return f"--{name} was {_shown(old)} there and is {_shown(value)} now"
    return None


def _shown(value: object) -> str:
    return " ".join(map(str, value)) or "empty" if isinstance(value, list) else str(value)


def state_of(fold: Fold, overwrite: bool) -> str:
    """The state of a fold, which says what to do with it: one of ``STATES``.

    Raises:
        UserError: the run was made with other settings, or the folder is not that of a run.
    """
    directory = fold.directory
    if is_unused(directory):
        return "new"
    try:
        before = runs.read_settings(directory)
    except UserError as error:
        raise UserError(f"{error}, so it is left alone; choose another --run_name") from None
    if overwrite:
        return "restart"
    if difference := first_difference(fold.args, before):
        raise UserError(
            f"{directory}: {difference}; --overwrite starts all folds again, --run_name makes others beside them"
        )
    if not runs.is_finished(directory):
        return "stopped"
    # A run that was prolonged and stopped has the results of before.
    settings = runs.flat_settings(fold_results(fold).get("config", {}))
    return "stopped" if first_difference(fold.args, settings) else "finished"


# --------------------------------------------------------------------------------------------------------- training


def train_all(folds: list[Fold], states: list[str], commands: list[list[str]], overwrite: bool) -> None:
    """Trains the folds that are not finished, one after the other.

    Raises:
        Stopped: a fold failed, with its exit code, or this process got a signal to stop.
    """
    again = "the same command without --overwrite resumes" if overwrite else "the same command resumes"
    with Signals() as signals:
        for position, (fold, state, command) in enumerate(zip(folds, states, commands, strict=True), start=1):
            title = f"Fold {position} of {len(folds)}"
            print(f"{title}: {fold.directory} {STATES[state][0]}", flush=True)
            if state == "finished":
                continue
            code = run_script(command, signals)
            if signals.received or was_stopped(code):
                raise Stopped(f"{title} was stopped: {again}", 128 + signals.received[0] if signals.received else code)
            if code:
                raise Stopped(f"{title} {how_it_ended(code)}: once that is fixed, {again}", code)


# ----------------------------------------------------------------------------------------------------------- result


def fold_predictions(fold: Fold, split: str, label_names: list[str]) -> Predictions:
    """What a fold's run predicted of a split.

    Raises:
        UserError: the file is missing or broken, or has images that do not belong to this part of the splits.
    """
    try:
        found = runs.read_predictions(fold.directory, split, label_names)
    except UserError as error:
        raise UserError(f"{error}; {retrain(fold)}") from None
    if fold.images and (strange := set(found.files) - fold.images[split]):
        raise UserError(
            f"{fold.directory / f'predictions_{split}.csv'}: {min(strange)} is not in that part of the splits, which "
            "were made again since: --overwrite starts all folds again"
        )
    return found


def fold_results(fold: Fold) -> dict[str, Any]:
    """``results.json`` of a fold's run; UserError where it is missing or broken."""
    try:
        return runs.read_results(fold.directory)
    except UserError as error:
        raise UserError(f"{error}; {retrain(fold)}") from None


def retrain(fold: Fold) -> str:
    """The way out where a file of a finished fold is damaged."""
    return f"remove {fold.directory}, and the same command trains this fold again"


def score(found: Predictions) -> dict[str, float]:
    """The metrics of :func:`report.metrics.classification_metrics`; the loss is the plain cross-entropy."""
    import numpy as np

    from accelerando.report.metrics import classification_metrics

    logits = np.log(np.maximum(found.probabilities, SMALLEST))
    return classification_metrics(found.labels, logits, -logits[np.arange(len(logits)), found.labels])


def ensemble(parts: list[tuple[Fold, Predictions]]) -> Predictions:
    """The mean of the folds' probabilities.

    Raises:
        UserError: the folds were not tested on the same images.
    """
    import numpy as np

    (first, one), *others = parts
    for fold, found in others:
        if found.files != one.files or (found.labels != one.labels).any():
            odd = min(set(found.files) ^ set(one.files), default="their order or their classes")
            raise UserError(
                f"{fold.directory} and {first.directory} were tested on different images ({odd}): the data changed "
                "in between; --overwrite starts all folds again"
            )
    mean = np.mean([found.probabilities for _, found in parts], axis=0)
    return Predictions(one.files, one.labels, mean, one.texts)


def out_of_fold(parts: list[tuple[Fold, Predictions]]) -> Predictions:
    """The validation predictions of all folds together: no file twice."""
    import numpy as np

    files = [name for _, found in parts for name in found.files]
    of_texts = all(found.texts is not None for _, found in parts)  # whose rows each fold numbers from 1 on
    if len(set(files)) != len(files) and not of_texts:
        raise RuntimeError("a sample was validated on in two folds")
    labels = np.concatenate([found.labels for _, found in parts])
    texts = [text for _, found in parts for text in found.texts] if of_texts else None
    return Predictions(files, labels, np.concatenate([found.probabilities for _, found in parts]), texts)


def mean_and_deviation(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean and sample standard deviation (n - 1; None of one fold) of each metric of each split over the folds."""
    mean: dict[str, Any] = {}
    deviation: dict[str, Any] = {}
    for split in [split for split in ("validation", "test") if split in rows[0]]:
        names = [name for name, value in rows[0][split].items() if isinstance(value, float)]
        values = {name: [row[split][name] for row in rows] for name in names}
        mean[split] = {name: statistics.fmean(numbers) for name, numbers in values.items()}
        deviation[split] = {name: statistics.stdev(numbers) if len(rows) > 1 else None
                            for name, numbers in values.items()}  # fmt: skip
    return mean, deviation


def shown_metrics(results: dict[str, Any]) -> dict[str, str]:
    """Metric -> its title in tables; ``results`` of all folds."""
    there = results["mean"]["validation"]
    return next((names for names in SHOWN if set(names) <= set(there)), {name: name for name in [*there][:3]})


def table_rows(results: dict[str, Any]) -> list[tuple[str, list[float | None]]]:
    """(title, values) of a line for each fold, the mean, the deviation and the ensemble; the metrics of each split."""
    shown = shown_metrics(results)
    lines = [(f"fold {row['fold']}", row) for row in results["folds"]]
    lines += [("mean", results["mean"]), ("± std", results["std"])]
    if "ensemble" in results:
        lines.append(("ensemble", {"test": results["ensemble"]}))
    return [(title, [row.get(split, {}).get(name) for split in results["mean"] for name in shown])
            for title, row in lines]  # fmt: skip


def summary_text(results: dict[str, Any], title: str, notes: list[str]) -> str:
    """The result on one screen, at most 80 columns wide."""
    splits, shown = list(results["mean"]), shown_metrics(results)
    head = "".join(f"{split:>12}{'':{10 * len(shown) - 10}}" for split in splits)
    lines = [title, "", f"{'':10}{head}".rstrip()]
    lines.append(f"{'':10}" + "".join("  " + "".join(f"{name:>10}" for name in shown.values()) for _ in splits))
    for name, values in table_rows(results):
        cells = ["–" if value is None else f"{value:.4f}" for value in values]
        if name == "ensemble":  # which has no validation samples
            cells = ["" if split == "validation" else cell
                     for cell, split in zip(cells, [s for s in splits for _ in shown], strict=True)]  # fmt: skip
        parts = [cells[start : start + len(shown)] for start in range(0, len(cells), len(shown))]
        lines.append((f"{name:<10}" + "".join("  " + "".join(f"{c:>10}" for c in part) for part in parts)).rstrip())
    return "\n".join([*lines, "", *notes, "", "Repeat it with:", f"  {command_line()}", ""])


def write_result(
    draft: Path, folds: list[Fold], rows: list[dict[str, Any]], label_names: list[str] | None, title: str
) -> None:
    """Writes all files of the result into the new folder ``draft``.

    ``rows``: of the folds, for ``results.json``; ``label_names``: None where a row has not one label.
    """
    draft.mkdir(parents=True)
    mean, deviation = mean_and_deviation(rows)
    results: dict[str, Any] = {"folds": rows, "mean": mean, "std": deviation}
    notes = ["± std: standard deviation over the folds (of the sample, n - 1)"]
    counts = f"{len(folds)} folds, {sum(row['validation']['count'] for row in rows):,} {unit(folds)} validated on"
    matrix = None
    if label_names is None:  # several labels or numbers
        counts += f", {rows[0]['test']['count']:,} tested on" if "test" in mean else ""
    else:
        together = write_pooled(draft, folds, results, label_names, notes)
        counts = f"{len(folds)} folds, {len(together['validation'].files):,} {unit(folds)} validated on"
        counts += f", {len(together['test'].files):,} tested on" if "test" in together else ""
        matrix = write_confusion(draft, together, label_names)
        results |= {"label_names": label_names, "confusion_matrix": matrix.tolist()}
    results |= {"seconds": round(sum(row["seconds"] for row in rows), 3), "command": command_line()}
    notes.append(f"time: {results['seconds']:,.1f} s of training")
    (draft / "summary.txt").write_text(summary_text(results, f"{title}\n{counts}", notes), encoding="utf-8")
    write_page(draft / "report.html", title, counts, folds[0].args, results, matrix, notes)
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    (draft / "results.json").write_text(text, encoding="utf-8")


def unit(folds: list[Fold]) -> str:
    """What the folds are made of."""
    return "samples" if folds[0].images is None else "images"


def write_pooled(
    draft: Path, folds: list[Fold], results: dict[str, Any], label_names: list[str], notes: list[str]
) -> dict[str, Predictions]:
    """The predictions of all folds together, of validation and test, which are written and scored into ``results``."""
    from accelerando.report.predictions import write_predictions

    rows, shown = results["folds"], shown_metrics(results)
    names = {title: name for name, title in shown.items()}  # a metric of `score` as the script calls it

    def scores(found: Predictions) -> dict[str, Any]:
        own = score(found)
        named = {names[title]: own[name] for name, title in SHOWN[0].items() if title in names}
        return {**(own if names["accuracy"] == "accuracy" else {}), **named, "count": len(found.files)}

    found = {split: [(fold, fold_predictions(fold, split, label_names)) for fold in folds] for split in results["mean"]}
    together = {"validation": out_of_fold(found["validation"])}
    results["out_of_fold"] = scores(together["validation"])
    if "test" in found:
        together["test"] = ensemble(found["test"])
        results["ensemble"] = scores(together["test"])
        count = f"{len(together['test'].files):,} test {unit(folds)}"
        notes.append(f"ensemble: mean of the folds' probabilities, {count}")
        own = [(score(part)["loss"], row["test"]["loss"]) for (_, part), row in zip(found["test"], rows, strict=True)]
        if any(abs(plain - given) > 0.02 * max(plain, given, 0.01) for plain, given in own):
            results["ensemble"]["loss"] = None
            notes.append("          no loss: that of the folds is not the plain cross-entropy (smoothing, weights)")
    if folds[0].images is not None:
        images = len(folds[0].images.get("test", ())) + sum(len(fold.images["validation"]) for fold in folds)
        if unread := images - sum(len(part.files) for part in together.values()):
            notes.append(f"images that could not be read, which no number includes: {unread:,}")
    if getattr(folds[0].args, "trainer_type", None) == "dp":
        notes.append("privacy: an image trains every fold but one, so together they spend more than one's epsilon")
    for split, part in together.items():
        samples, of_texts = part.texts or part.files, part.texts is not None
        path = draft / f"predictions_{split}.csv"
        write_predictions(path, samples, label_names, part.probabilities, part.labels, of_texts=of_texts)
    return together


def write_confusion(draft: Path, together: dict[str, Predictions], label_names: list[str]) -> np.ndarray:
    """What the ensemble (without a test set: all folds) confuses, int [C, C], as a table and a figure."""
    from accelerando.report.metrics import confusion_matrix, report_text

    last = "test" if "test" in together else "validation"
    matrix = confusion_matrix(together[last].labels, together[last].probabilities.argmax(axis=1), len(label_names))
    (draft / f"classification_report_{last}.txt").write_text(report_text(matrix, label_names), encoding="utf-8")
    plot_confusion(matrix, label_names, draft / "plots" / f"confusion_{last}.png")
    return matrix


def write_page(
    path: Path, title: str, counts: str, args: ScriptArgs, results: dict[str, Any], matrix: np.ndarray | None,
    notes: list[str],
) -> None:  # fmt: skip
    """``report.html``: the figures, the folds, and what the ensemble (without a test set: all folds) confuses."""
    from accelerando.report.metrics import per_class

    last = "test" if "test" in results["mean"] else "validation"
    who = "ensemble" if last == "test" else "all folds"
    shown = shown_metrics(results)
    main, what = next(iter(shown.items()))
    percent = what == "accuracy"

    def written(value: float) -> str:
        return f"{100 * value:.2f} %" if percent else f"{value:.4f}"

    mean, deviation = results["mean"][last][main], results["std"][last][main]
    part = f"{100 * deviation:.2f}" if percent and deviation is not None else f"{deviation or 0:.4f}"
    spread = "one fold" if deviation is None else f"± {part} over {len(results['folds'])} folds"
    tiles = [(f"{last} {what}, mean", written(mean), spread)]
    blocks = []
    if matrix is not None:
        pooled, names = results["ensemble" if last == "test" else "out_of_fold"], results["label_names"]
        f1 = next(name for name, metric in shown.items() if metric == "F1 macro")
        tiles += [
            (f"{last} accuracy, {who}", written(pooled[main]), f"{pooled['count']:,} samples"),
            (f"{last} F1 (macro), {who}", f"{pooled[f1]:.4f}", f"{len(names)} classes"),
        ]
        values = per_class(matrix)
        blocks = [
            page.confusion(matrix, names, title=f"Confusion matrix, {last}, {who}"),
            page.per_class(names, values["precision"], values["recall"], values["f1"], values["support"],
                           title=f"Per class, {last}, {who}"),
        ]  # fmt: skip
    tiles.append(("training", f"{results['seconds']:,.0f} s", "all folds"))
    header = ["", *(f"{split} {name}" for split in results["mean"] for name in shown.values())]
    blocks = [
        page.headline(tiles),
        page.table(header, [(name, *numbers) for name, numbers in table_rows(results)], title="Folds",
                     note="; ".join(" ".join(note.split()) for note in notes[:-1])),
        *blocks,
        page.command(command_line()),
        page.settings(grouped(args), title="Settings of all folds"),
    ]  # fmt: skip
    page.write_report(path, title, counts, blocks)


def rows_of(folds: list[Fold]) -> tuple[list[dict[str, Any]], list[str] | None]:
    """What ``results.json`` keeps of each fold, and the class names, which they share; None: a row has not one label.

    Raises:
        UserError: a run has no results, or was made from other splits: its classes, or whether there is a test set.
    """
    rows, names, splits, of_classes = [], None, None, True
    for fold in folds:
        results = fold_results(fold)
        own = results.get("gloss_names", results.get("label_names"))
        if lacking := [name for name in ("validation", "seconds") if name not in results]:
            raise UserError(f"{fold.directory / 'results.json'}: no {lacking[0]} in it: not of a run of this script")
        of_classes &= "confusion_matrix" in results or "gloss_confusion_matrix" in results
        there = [split for split in ("validation", "test") if split in results]
        names, splits = names or own, splits or (there if fold.images is None else [*fold.images])
        other = [f"{split} {unit(folds)}" for split in ("validation", "test") if (split in there) != (split in splits)]
        other += ["classes"] if own != names else []
        if other:
            raise UserError(
                f"{fold.directory}: its {other[0]} differ from the current ones; --overwrite starts all folds again"
            )
        scores = {split: results[split] for split in there}
        rows.append({"fold": fold.number, "run": str(fold.directory), **scores, "seconds": results["seconds"]})
    return rows, names if of_classes else None


def check_target(target: Path) -> None:
    """UserError where the folder of the result holds something else or cannot be made."""
    check_can_be_made(target, "--output_dir")
    if target.is_dir() and any(target.iterdir()):
        if (target / "results.json").is_file() and isinstance(runs.read_results(target).get("folds"), list):
            return
    elif not target.exists():
        return
    raise UserError(f"{target}: exists and is no result of this tool, so it is left alone; choose another --run_name")


# ------------------------------------------------------------------------------------------------------------- main


def plan(script: Path, flags: list[str], wanted: tuple[int, ...]) -> tuple[list[Fold], list[list[str]], Path, bool]:
    """(folds, flags of each one's run, folder of the result, whether all start again).

    Raises:
        UserError: the script does not take these flags, there are no folds, or a flag is of one run alone.
    """
    module = load_script(script)
    aliases = getattr(module, "ALIASES", {})
    args = parse_args(module.Args, aliases, flags)
    if args.resume not in (None, "auto"):
        raise UserError(f"--resume {args.resume}: names one run; without it, the same command resumes all folds")
    if getattr(args, "push_to_hub", False):
        raise UserError("--push_to_hub: each fold would overwrite the one before it; drop it here")
    if hasattr(module, "check_args"):
        module.check_args(args)  # it also fills in settings that the names of the runs depend on
    images = folds_of(args)
    if unknown := [number for number in wanted if number not in images]:
        raise UserError(f"--folds {unknown[0]}: there are folds {', '.join(map(str, images))}")
    names, shared, named = run_names(module, args, list(images))
    chosen = sorted(set(wanted or images))
    words = without_flags(flags, {"resume", "overwrite"} | ({"run_name"} if named else set()), aliases)
    folds, commands = [], []
    for number in chosen:
        run_name = names[number] if named else None
        own = dataclasses.replace(args, fold=number, run_name=run_name, resume="auto", overwrite=False)
        folds.append(Fold(number, own, Path(args.output_dir) / names[number], images[number]))
        commands.append([*words, "--fold", str(number), *(["--run_name", run_name] if named else [])])
    part = "" if len(chosen) == len(images) else "_folds_" + "_".join(map(str, chosen))
    return folds, commands, Path(args.output_dir) / f"{shared}_cv{part}", args.overwrite


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        parse_args(Args, argv=["--help"])
    ours, launcher, script, flags = split_words(words)
    wanted = parse_args(Args, argv=ours).folds
    folds, commands, target, overwrite = plan(script, flags, wanted)
    check_target(target)
    states = [state_of(fold, overwrite) for fold in folds]
    done = [fold for fold, state in zip(folds, states, strict=True) if state == "finished"]
    if done:  # what no longer fits is reported before hours of training
        _, label_names = rows_of(done)
        for fold in done if label_names else ():
            for split in ("validation", "test"):
                if split in fold_results(fold):
                    fold_predictions(fold, split, label_names)
    if len(done) < len(folds):
        launcher = launcher or default_launcher(CONFIGS)
        for state, command in zip(states, commands, strict=True):
            command[:] = accelerate_command(script, [*command, *STATES[state][1]], launcher)
        train_all(folds, states, commands, overwrite)

    rows, label_names = rows_of(folds)
    summary, report = target / "summary.txt", target / "report.html"
    if not (summary.is_file() and report.is_file() and runs.read_results(target).get("folds") == rows):
        try:
            with whole_folder(target) as draft:
                title = f"Cross-validation: {target.name}"
                write_result(draft, folds, rows, label_names, title)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"{target}: {error.strerror}") from None
    print(f"\n{summary.read_text(encoding='utf-8')}\nReport: {report}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
