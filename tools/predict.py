"""Predict with a trained model, in the order of the input: JSON, one object a line, or CSV for images.

  python tools/predict.py runs/x "some text" "another"        texts
  python tools/predict.py runs/x --file texts.txt --output out.jsonl
  zcat texts.gz | python tools/predict.py runs/x --top_k 2    any length
  python tools/predict.py runs/signs clip.npz data/clips      a sign run
  python tools/predict.py runs/ants photo.jpg data/photos     an image run
  python tools/predict.py runs/ants https://example.org/a.jpg
  python tools/predict.py runs/ants --file list.txt --output out.csv
  python tools/predict.py runs/mine photo.jpg --import my_module
  python tools/predict.py runs/har film.mp4 data/films        a run of clip_har.py
  python tools/predict.py runs/har data/films --class_names "riding a horse" cooking
  python tools/predict.py runs/x/export "some text"    what tools/export.py wrote

A file of texts has one on each line, or is a table: .json, .jsonl, .csv, .tsv or .parquet.
A model of several labels a text answers with those that reach their thresholds,
a regression with its numbers.
A folder stands for all images in it at any depth, and for all videos where the
model takes them; a file (or standard input) lists paths of either and URLs of
images, one on each line. An image that cannot be read
is named on standard error and in the JSON, and the exit code is then 1. Where
none can be read it is 2, and no file is written.

--import names the Python module, in the current folder or installed, that
defines the class of a model which is not one of transformers.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import tyro

from accelerando.base.config import Alias, check_ranges, parse_args, sections
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.model_folder import read_json
from accelerando.base.texts import CONTROL, one_line
from accelerando.data.table_formats import SUFFIXES, table_suffix
from accelerando.data.tokenizer import open_tokenizer
from accelerando.data.videos import VIDEO_SUFFIXES
from accelerando.inference.answers import Computing, image_answers, with_progress
from accelerando.inference.inputs import IMAGES, frame_folders_in, is_url, samples_in
from accelerando.inference.outputs import open_output, printable
from accelerando.inference.runs import model_folder, read_settings, run_of
from accelerando.inference.saved import (
    TorchModel,
    choose_device,
    import_user_module,
    label_thresholds,
    open_image_model,
    open_saved,
    scores_of,
    takes_videos,
    task_of_saved,
)

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from accelerando.data.windows import Windows
    from accelerando.models.text_windows import Pooling

CHUNK = 4096  # texts that are read, sorted by length and predicted at once
NO_LIMIT_LENGTH = 512  # tokens kept where neither tokenizer nor model names a limit
Chunk = tuple[list[str], list[str] | None]  # texts, and second texts for a model of pairs
ALIASES: dict[str, Alias] = {
    "import": "import_module",
    "prompt_template": "prompt_templates",
}  # Python's own word cannot name a field

# What a model's config calls several labels, or numbers, of an input; see data/targets.py.
TARGETS = {"multi_label_classification": "multi_label", "regression": "regression"}

Inputs = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[INPUT ...]")]


@dataclass
class Args:
    # -- input --
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]  # run, its best/ or last/, or a folder
    texts: Inputs = ()  # texts; clips or folders of them; or images and videos, folders of them and URLs
    file: str | None = None  # read the input from here: a text, path or URL a line; texts also as a table
    text_column: str = "text"  # texts: column of a table (.json .jsonl .csv .tsv .parquet)
    text_pair_column: str | None = None  # texts: column of a second text, for a model of pairs
    text_pair: str | None = None  # texts: a second one, the same for every text
    threshold: float | None = None  # several labels: of all of them (default: what the run chose, or 0.5)
    calibrated: bool = False  # probabilities with the temperature that was fitted on the validation samples
    # -- prediction --
    import_module: str | None = None  # module of yours that defines the model's class, as --import my_module
    trust_remote_code: bool = False  # run Python files of the model's folder where it needs them
    batch_size: int = 32  # texts, clips or images in one forward pass
    max_length: int | None = None  # texts: tokens kept (default: those of the run's windows, or the model's limit)
    class_names: tuple[str, ...] = ()  # images: of a CLIP, any classes: "riding a horse" cooking
    prompt_templates: tuple[str, ...] = ("a photo of a person {label}.",)  # images: prompts of --class_names
    frames: int | None = None  # videos: frames of each (default: as in training, or 8)
    views: int | None = None  # videos: the mean over so many sets of frames (default: as in training, or 1)
    frame_folders: bool = False  # videos: a folder of images is one, its images are the frames
    tta: bool = False  # images: the mean over each one and its mirror image
    num_workers: int = 8  # images: threads that read, fetch and decode
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    # -- output --
    top_k: int = 0  # how many classes scores lists, best first; 0: all (signs: 5 glosses and 3 categories)
    output: str | None = None  # write here instead of standard output
    format: Literal["json", "csv"] | None = None  # images: csv has every class (default: csv where --output ends so)


# -------------------------------------------------------------------------------------------------------------- text


@dataclass
class TextModel:
    """A classifier of texts with what :func:`predict_chunk` needs; texts are cut off at ``max_length`` tokens, or read
    in ``windows``, whose logits are pooled."""

    model: PreTrainedModel | TorchModel
    tokenizer: PreTrainedTokenizerBase
    labels: list[str]
    device: torch.device
    max_length: int
    windows: Windows | None = None
    pooling: Pooling = "mean"
    temperature: float = 1.0


def load_text_model(
    folder: Path,
    device: torch.device,
    max_length: int | None = None,
    pairs: bool = False,
    module: ModuleType | None = None,
    trust_remote_code: bool = False,
    onnx_file: str | None = None,
) -> TextModel:
    """The model and tokenizer in ``folder``, for single texts or ``pairs``; ``module``: from ``--import``;
    ``onnx_file``: of an export.

    Raises:
        UserError: no tokenizer, weights that are missing or do not fit, a ``max_length`` beyond the model's positions
            or too small for any text; ``pairs`` for a model that reads texts in windows.
    """
    from transformers import AutoModelForSequenceClassification

    from accelerando.models.text_windows import kept_windows

    tokenizer = open_tokenizer(str(folder), trust_remote_code, local_files_only=True)
    model = open_saved(AutoModelForSequenceClassification, folder, module, trust_remote_code, onnx_file)
    names = model.config.id2label
    labels = [str(names[index]) for index in range(model.config.num_labels)]
    windows, pooling = kept_windows(read_json(folder / "config.json"))
    if windows is not None and pairs:
        raise UserError(f"{folder} reads single texts, in windows: it was not trained on pairs")
    if windows is not None:
        max_length = max_length or windows.size
        windows = replace(windows, size=max_length)
        windows.overlap(tokenizer)
    return TextModel(
        model=model.to(device),
        tokenizer=tokenizer,
        labels=labels,
        device=device,
        max_length=_length_limit(tokenizer, model.config, max_length, pairs),
        windows=windows,
        pooling=pooling,
    )


def predict_chunk(
    loaded: TextModel, texts: list[str], pairs: list[str] | None, batch_size: int, done: Callable[[int], object] = int
) -> np.ndarray:
    """Scores float32 [n, C] of n texts in their order: probabilities, or the raw value of a regression.

    Texts are computed in order of length, so that a batch has little padding; ``done`` is called with each batch's
    size.
    """
    import numpy as np
    import torch

    from accelerando.data.collate import collate_text
    from accelerando.data.tokens import encode_texts
    from accelerando.models.pretrained import pads_left
    from accelerando.models.text_windows import pool_windows

    tokenizer, config = loaded.tokenizer, loaded.model.config
    encoded = encode_texts(tokenizer, texts, pairs, max_length=loaded.max_length, windows=loaded.windows)
    if tokenizer.pad_token_id is None:
        batch_size = 1
    window = loaded.windows and loaded.windows.size
    collate = collate_text(tokenizer.pad_token_id or 0, left=pads_left(config), window=window)
    embedded = getattr(loaded.model.get_input_embeddings(), "num_embeddings", None)
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    order = sorted(range(len(texts)), key=lambda row: -len(encoded["input_ids"][row]))
    scores = np.empty((len(texts), len(loaded.labels)), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([{name: encoded[name][row] for name in names} for row in rows])
        if embedded is not None and int(batch["input_ids"].max()) >= embedded:
            raise UserError(f"the tokenizer has more tokens than the model's {embedded}; they do not belong together")
        batch = {name: tensor.to(loaded.device) for name, tensor in batch.items()}
        counts = batch.pop("windows", None)
        with torch.inference_mode():
            logits = pool_windows(loaded.model(**batch).logits.float(), counts, loaded.pooling)
        scores[rows] = scores_of(logits, config, loaded.temperature).cpu().numpy()
        done(len(rows))
    return scores


def ranked(scores: np.ndarray, labels: list[str], top_k: int) -> dict[str, Any]:
    """``label``, ``score`` and ``scores`` of one input; ``scores`` [C] are listed best first, ``top_k`` (0: all)."""
    best_first = sorted(range(len(labels)), key=lambda index: -scores[index])
    listed = {labels[index]: round(float(scores[index]), 6) for index in best_first[: top_k or None]}
    return {"label": labels[best_first[0]], "score": listed[labels[best_first[0]]], "scores": listed}


def answer(
    scores: np.ndarray, labels: list[str], problem_type: str | None, thresholds: np.ndarray | None, top_k: int
) -> dict[str, Any]:
    """What ``scores`` [C] of one input say: the class (:func:`ranked`), the ``labels`` that reach their thresholds, or
    the ``value`` (of several, ``values``)."""
    if problem_type == "regression":
        values = {name: round(float(value), 6) for name, value in zip(labels, scores, strict=True)}
        return {"values": values} if len(values) > 1 else {"value": values[labels[0]]}
    found = ranked(scores, labels, top_k)
    if thresholds is None:
        return found
    reached = [name for name, is_there in zip(labels, scores >= thresholds, strict=True) if is_there]
    return {"labels": reached, "scores": found["scores"]}


def thresholds_of(
    args: Args, folder: Path, problem_type: str | None, labels: list[str], noun: str
) -> np.ndarray | None:
    """The thresholds of the labels' probabilities, [C], where an input may have several labels; else None.

    Raises:
        UserError: --threshold for another model, or config.json has thresholds that are none.
    """
    import numpy as np

    if problem_type != "multi_label_classification":
        if args.threshold is not None:
            raise UserError(f"--threshold {args.threshold:g}: {folder} does not give several labels {noun}")
        return None
    found = label_thresholds(read_json(folder / "config.json"), labels)
    if args.threshold is not None or found is None:
        return np.full(len(labels), 0.5 if args.threshold is None else args.threshold)
    return found


def text_chunks(args: Args) -> tuple[int | None, Iterator[Chunk]]:
    """How many texts there are (None: not known yet), and chunks of them from where ``args`` says.

    Raises:
        UserError: a missing or broken file, no text, more than one source.
    """
    if args.texts and args.file:
        raise UserError("texts and --file: give one of them")
    if args.text_pair is not None and args.text_pair_column:
        raise UserError("--text_pair and --text_pair_column: give one of them")
    if args.text_pair_column and not (args.file and table_suffix(args.file)):
        raise UserError(f"--text_pair_column needs a table: --file with a name in {' '.join(SUFFIXES)}")
    total: int | None = None
    if args.texts:
        total, chunks = len(args.texts), _paired(_chunks_of(args.texts), args.text_pair)
    elif args.file:
        path = Path(args.file)
        if path.is_dir() or not path.exists():
            raise UserError(f"--file {path}: {'is a folder; name a file' if path.is_dir() else 'no such file'}")
        if table_suffix(path):
            total, chunks = _table_chunks(args)
        else:
            chunks = _paired(_line_chunks(path, str(path), CHUNK), args.text_pair)
    else:
        # Typed texts are answered one by one.
        size = 1 if sys.stdin.isatty() else CHUNK
        chunks = _paired(_line_chunks(sys.stdin.buffer, "standard input", size), args.text_pair)
    for given in (*args.texts, args.text_pair or ""):
        if not _is_unicode(given):
            raise UserError(f"text {given!a}: not UTF-8; check the terminal's encoding")
    return total, chunks


def predict_texts(args: Args, folder: Path, config: dict[str, Any], module: ModuleType | None) -> None:
    """Reads, predicts and writes texts, chunk by chunk; memory does not grow with the input."""
    total, chunks = text_chunks(args)
    first = next(chunks, None)  # before the model is loaded, so that a missing input is reported at once
    if first is None:
        source = args.file or "standard input"
        raise UserError(f"{source}: no text in it; give texts on the command line, with --file or on standard input")
    device, pairs = choose_device(args.device), first[1] is not None
    how = (module, args.trust_remote_code, onnx_file(args))
    loaded = load_text_model(folder, device, args.max_length, pairs, *how)
    loaded.temperature = temperature_of(args, folder, config)
    problem_type = loaded.model.config.problem_type
    thresholds = thresholds_of(args, folder, problem_type, loaded.labels, "a text")

    import numpy as np
    from tqdm.auto import tqdm

    row = 0
    with open_output(args.output) as stream:
        # disable=None: shown on a terminal only. Chunks typed by hand would draw it between the lines.
        typed = not args.texts and not args.file and sys.stdin.isatty()
        with tqdm(total=total, unit=" texts", delay=2, disable=typed or None, leave=False, file=sys.stderr) as bar:
            for texts, pairs in itertools.chain([first], chunks):
                scores = predict_chunk(loaded, texts, pairs, args.batch_size, bar.update)
                if not np.isfinite(scores).all():
                    bad = row + int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0]) + 1
                    raise UserError(f"{folder}: the model returns NaN for text {bad}: its weights are corrupted")
                for index, text in enumerate(texts):
                    given = {"text": text} if pairs is None else {"text": text, "text_pair": pairs[index]}
                    said = answer(scores[index], loaded.labels, problem_type, thresholds, args.top_k)
                    write_json(stream, {**given, **said})
                stream.flush()
                row += len(texts)


def _length_limit(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, asked: int | None, pairs: bool) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    known = [limit for limit in (tokenizer.model_max_length, positions) if limit and 0 < limit < 10**9]
    if asked is None:
        return min(known, default=NO_LIMIT_LENGTH)
    if positions and 0 < positions < asked:
        raise UserError(f"--max_length {asked}: the model has {positions} positions")
    if asked <= (special := tokenizer.num_special_tokens_to_add(pair=pairs)):
        raise UserError(f"--max_length {asked}: leaves no room for text beside {special} special tokens")
    return asked


def _table_chunks(args: Args) -> tuple[int, Iterator[Chunk]]:
    from accelerando.data.tables import read_text_table

    table = read_text_table(
        args.file, text_column=args.text_column, text_pair_column=args.text_pair_column, require_labels=False
    )

    def chunks() -> Iterator[Chunk]:
        for start in range(0, len(table.texts), CHUNK):
            texts = table.texts.slice(start, CHUNK).to_pylist()
            pairs = table.pairs.slice(start, CHUNK).to_pylist() if table.pairs is not None else None
            yield texts, pairs if args.text_pair is None else [args.text_pair] * len(texts)

    return len(table.texts), chunks()


def _line_chunks(source: Path | IO[bytes], name: str, size: int) -> Iterator[list[str]]:
    """Lines of UTF-8, without their ends, ``size`` at a time; also an empty line is a text, so that rows agree."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, Path):
            try:
                source = stack.enter_context(open(source, "rb"))
            except OSError as error:
                raise UserError(f"--file {name}: {error.strerror}") from None
        number = 0
        while lines := list(itertools.islice(iter(source.readline, b""), size)):
            texts = []
            for line in lines:
                number += 1
                try:
                    texts.append(line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{name}, line {number}: not UTF-8 text ({error.reason}); convert it with iconv"
                    ) from None
            yield texts


def _chunks_of(texts: tuple[str, ...]) -> Iterator[list[str]]:
    return (list(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK))


def _paired(chunks: Iterable[list[str]], pair: str | None) -> Iterator[Chunk]:
    return ((texts, None if pair is None else [pair] * len(texts)) for texts in chunks)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def write_json(stream: IO[str], result: dict[str, Any]) -> None:
    """One object on a line of its own; control characters are escaped as JSON does it."""
    line = json.dumps(result, ensure_ascii=False)
    stream.write(CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n")


# ------------------------------------------------------------------------------------------------------------- signs


def predict_clips(args: Args, folder: Path, config: dict[str, Any], module: ModuleType | None) -> None:
    """Reads clips (``.npz``, alone or all of a folder) and writes the best glosses and categories of each."""
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoModel

    from accelerando.data.collate import ClipCollate
    from accelerando.data.sign_clips import normalise, read_clip

    if module is not None:
        raise UserError("--import has no effect on a sign run")
    paths = clip_paths(args)
    temperature = temperature_of(args, folder, config, "gloss_calibration_temperature")
    device = choose_device(args.device)
    model, collate = open_saved(AutoModel, folder, onnx_file=onnx_file(args)).to(device), ClipCollate()
    settings = model.config
    bar = tqdm(total=len(paths), unit=" clips", delay=2, disable=None, leave=False, file=sys.stderr)
    with open_output(args.output) as stream, bar:
        for start in range(0, len(paths), args.batch_size):
            chunk, samples = paths[start : start + args.batch_size], []
            for path in chunk:
                frames, mask = read_clip(path, settings.input_key, settings.input_width)
                frames, mask = normalise(frames, mask, settings.normalisation)
                samples.append({"frames": frames, "gloss": 0, "cat": 0} | ({} if mask is None else {"mask": mask}))
            # Clips with a mask beside others without one go alone.
            together = len({"mask" in sample for sample in samples}) == 1
            for batch in [collate(samples)] if together else [collate([sample]) for sample in samples]:
                inputs = {
                    name: batch[name].to(device) for name in ("frames", "attention_mask", "mask") if name in batch
                }
                with torch.inference_mode():
                    output = model(**inputs)
                gloss = (output.gloss_logits.float() / temperature).softmax(1).cpu()
                cat = output.cat_logits.float().softmax(1).cpu()
                for row in range(len(gloss)):
                    path = chunk.pop(0)
                    result = {
                        "file": str(path),
                        "gloss": best_classes(gloss[row], settings.gloss_names, args.top_k or 5),
                        "category": best_classes(cat[row], settings.cat_names, args.top_k or 3),
                    }
                    write_json(stream, result)
            stream.flush()
            bar.update(len(samples))


def best_classes(probabilities: torch.Tensor, names: list[str], count: int) -> list[dict[str, Any]]:
    """The ``count`` most likely classes of ``probabilities`` [C], best first, as ``{"label", "score"}``."""
    best = probabilities.topk(min(count, len(names)))
    return [
        {"label": names[index], "score": round(score, 6)}
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def clip_paths(args: Args) -> list[Path]:
    """The clips that the command line names, those of a folder in the order of their names.

    Raises:
        UserError: none is named, a path does not exist, a folder holds none, or a flag for texts was given.
    """
    if args.file:
        raise UserError("the lines of --file are for texts or images; name the clips behind the run")
    paths: list[Path] = []
    for name in args.texts:
        path = Path(name)
        found = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        if not path.exists() or not found:
            raise UserError(f"{path}: {'no .npz files in it' if path.is_dir() else 'no such file or folder'}")
        paths += found
    if not paths:
        raise UserError("no clips: name .npz files, or folders of them, behind the run")
    return paths


# ----------------------------------------------------------------------------------------------------------- images


def predict_images(args: Args, folder: Path, config: dict[str, Any], module: ModuleType | None) -> None:
    """Reads images and writes the classes of each as JSON or CSV; memory does not grow with their number.

    Raises:
        UserError: something that was named is not there, or none of the images can be read.
    """
    import torch

    as_csv = args.format == "csv" or (args.format is None and str(args.output).lower().endswith(".csv"))
    if as_csv and args.top_k:
        raise UserError("--top_k is for JSON; CSV has a column for every class")
    videos = takes_videos(config, args.class_names)
    given = {"frames": args.frames, "views": args.views, "frame_folders": args.frame_folders or None}
    if not videos and (flag := next((name for name, value in given.items() if value is not None), None)):
        raise UserError(f"--{flag} has no effect: this model takes images, not videos")
    total, names = image_names(args, (*IMAGES, *VIDEO_SUFFIXES) if videos else IMAGES)
    first = next(names, None)  # before the model is loaded, so that a missing input is reported at once
    if first is None:
        source = args.file or "standard input"
        raise UserError(f"{source}: no image in it; name images, folders or URLs behind the run, or in --file")
    classes = (args.class_names, args.prompt_templates)
    device = choose_device(args.device)
    opened = open_image_model(folder, device, module, args.trust_remote_code, *classes, onnx_file(args))
    problem_type, labels = opened.model.config.problem_type, opened.label_names
    thresholds = thresholds_of(args, folder, problem_type, labels, "an image")
    temperature = temperature_of(args, folder, config)
    # Typed paths are answered one by one.
    typed = not args.texts and not args.file and sys.stdin.isatty()
    batch_size, ahead = (1, 0) if typed else (args.batch_size, None)
    trained = read_settings(run) if (run := run_of(Path(args.model))) else {}
    frames, views = (getattr(args, name) or trained.get(name) or usual for name, usual in (("frames", 8), ("views", 1)))
    how = Computing(batch_size, args.num_workers, args.tta, ahead=ahead, frames=frames, views=views)

    from accelerando.report.predictions import prediction_header, prediction_rows
    from accelerando.report.target_reports import target_columns, target_rows

    several = TARGETS.get(problem_type)  # labels or numbers of an image

    answers = image_answers(opened, itertools.chain([first], names), how)
    read, unread = 0, 0
    hidden = typed or (args.output is None and sys.stdout.isatty())  # the bar would be drawn between the lines
    with open_output(args.output) as stream, contextlib.closing(answers):
        writer = csv.writer(stream, lineterminator="\n")
        if as_csv:
            nothing = torch.zeros(0, len(labels)).numpy()
            columns = ["file", *target_columns(nothing, labels, several)] if several else prediction_header(labels)
            writer.writerow(columns)
        for batch in with_progress(answers, total, "predicting", hidden, "samples" if videos else "images"):
            scores = scores_of(batch.logits.double(), opened.model.config, temperature).numpy()
            sound = [printable(name) for name, fault in zip(batch.names, batch.faults, strict=True) if fault is None]
            if as_csv:
                rows = prediction_rows(sound, labels, scores)
                if several:
                    answers_of_all = target_columns(batch.logits.numpy(), labels, several, thresholds)
                    rows = target_rows({"file": sound, **answers_of_all})
                writer.writerows([map(one_line, row) for row in rows] if stream.isatty() else rows)
            else:
                each = iter(scores)
                for name, fault in zip(map(printable, batch.names), batch.faults, strict=True):
                    if fault is None:
                        said = answer(next(each), labels, problem_type, thresholds, args.top_k)
                        write_json(stream, {"file": name, **said})
                    else:
                        write_json(stream, {"file": name, "error": fault})
            stream.flush()
            read, unread = read + len(sound), unread + len(batch.names) - len(sound)
        if not read:
            noun = "sample" if videos else "image"
            raise UserError(f"none of {unread:,} {noun}s can be read" if unread > 1 else f"the {noun} cannot be read")
    if unread:
        sys.exit(1)


def image_names(args: Args, suffixes: tuple[str, ...]) -> tuple[int | None, Iterator[str]]:
    """How many images there are (None: not known yet), and their paths and URLs from where ``args`` says; of folders,
    the files with one of ``suffixes``, or the folders of frames.

    Raises:
        UserError: a path that is not there, a folder without images, a list that is no text.
    """
    if args.texts and args.file:
        raise UserError("images and --file: give one of them")
    if args.texts:
        counts = [_count_images(name, suffixes, args.frame_folders) for name in args.texts]
        return sum(counts), (found for name in args.texts for found in _expanded(name, suffixes, args.frame_folders))
    if args.file:
        path = Path(args.file)
        if path.is_dir() or not path.exists():
            what = "is a folder; name it behind the run, without --file" if path.is_dir() else "no such file"
            raise UserError(f"--file {path}: {what}")
        # What can be read once only, such as a pipe of the shell, is not read to be counted.
        return sum(1 for _ in _listed(path)) if path.is_file() else None, _listed(path)
    return None, _listed(sys.stdin.buffer)


def _count_images(name: str, suffixes: tuple[str, ...], frame_folders: bool) -> int:
    path = Path(name)
    if is_url(name):
        return 1
    if not path.exists():
        what = "images and videos" if ".mp4" in suffixes else "images"
        hint = "of URLs, only http:// and https:// are read" if "://" in name else f"this model classifies {what}"
        raise UserError(f"{printable(name)}: no such file or folder ({hint})")
    count = sum(1 for _ in _expanded(name, suffixes, frame_folders))
    if not count:
        what = "image or video" if ".mp4" in suffixes and not frame_folders else "image"
        raise UserError(f"{printable(name)}: no {what} in this folder")
    return count


def _expanded(name: str, suffixes: tuple[str, ...], frame_folders: bool) -> Iterator[str]:
    if is_url(name) or not Path(name).is_dir():
        return iter([name])
    return iter(frame_folders_in(Path(name))) if frame_folders else samples_in(Path(name), suffixes)


def _listed(source: Path | IO[bytes]) -> Iterator[str]:
    """The paths and URLs of a list, one a line; blank lines are skipped."""
    with contextlib.ExitStack() as stack:
        name = "standard input"
        if isinstance(source, Path):
            name = f"--file {source}"
            try:
                source = stack.enter_context(open(source, "rb"))
            except OSError as error:
                raise UserError(f"{name}: {error.strerror}") from None
        for number, line in enumerate(iter(source.readline, b""), start=1):
            if b"\0" in line:
                raise UserError(f"{name}, line {number}: not a list of paths and URLs; images are named behind the run")
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield os.fsdecode(line.strip())


# --------------------------------------------------------------------------------------------------------------- main


def check(args: Args) -> None:
    """UserError for a number that makes no sense."""
    check_ranges(args, threshold=(0, 1), top_k=(0, 2**30), num_workers=(1, 1024), frames=(1, 1024), views=(1, 64))
    same = args.file and args.output and Path(args.output).exists() and Path(args.file).exists()
    if same and Path(args.file).samefile(args.output):
        raise UserError(f"--output {args.output}: would replace the file that is read; name another")


def temperature_of(args: Args, folder: Path, config: dict[str, Any], name: str = "calibration_temperature") -> float:
    """What divides the logits; UserError: ``calibrated``, but there is no temperature, or none of these classes."""
    if not args.calibrated:
        return 1.0
    if args.class_names:
        raise UserError("--calibrated is for the classes of the training, not for --class_names: drop one")
    found = config.get(name)
    if not isinstance(found, int | float) or found <= 0:
        raise UserError(
            f"--calibrated: {folder} has no temperature; one is fitted where a classifier has 20 validation samples of "
            "one label each, some of them wrong"
        )
    return float(found)


def onnx_file(args: Args) -> str | None:
    """Which file of an export was named; None: its folder, or a model of another kind."""
    return Path(args.model).name if args.model.endswith(".onnx") else None


def check_task(args: Args, task: str, folder: Path) -> None:
    """UserError for what a model of this task does not read: images for one of texts, flags of another task."""
    owner = {"texts": "text", "images": "image", "videos": "image"}
    defaults = {field.name: field.default for field in fields(Args)}
    for rows in sections(Args).values():
        for name, text in rows:
            if owner.get(text.partition(":")[0], task) != task and getattr(args, name) != defaults[name]:
                raise UserError(f"--{name} has no effect here ({text})")
    if task != "image" and args.output and args.output.lower().endswith(".csv"):
        raise UserError(f"--output {args.output}: CSV is for images; name it .jsonl")
    named = [text for text in args.texts if text.lower().endswith(IMAGES) and Path(text).is_file()]
    if task == "text" and named:
        raise UserError(f"{named[0]} is an image, but {folder} is a classifier of texts")


def main() -> None:
    args = parse_args(Args, ALIASES)
    check(args)
    folder = model_folder(Path(args.model))
    config = read_json(folder / "config.json")
    module = import_user_module(args.import_module) if args.import_module else None
    task = "image" if args.class_names else task_of_saved(folder, config, module)
    check_task(args, task, folder)
    predict = {"text": predict_texts, "sign": predict_clips, "image": predict_images}[task]
    predict(args, folder, config, module)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
