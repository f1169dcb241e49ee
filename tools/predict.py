"""Predict with a trained model: one JSON object a line, in the order of the input.

python tools/predict.py runs/x "some text" "another"              texts from the command line
python tools/predict.py runs/x --file texts.txt --output out.jsonl  a text a line, or .json .jsonl .csv .tsv .parquet
zcat texts.gz | python tools/predict.py runs/x --top_k 2 | head   standard input of any length
python tools/predict.py runs/signs clip.npz data/clips            a sign run: clips, or folders of clips
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import tyro

from lib.config import parse_args
from lib.errors import UserError, errors_in_one_line
from lib.tokenizer import VOCABULARY_FILES

if TYPE_CHECKING:
    import torch

CHUNK = 4096  # texts that are read, sorted by length and answered at once
NO_LIMIT_LENGTH = 512  # tokens kept where neither tokenizer nor model names a limit
TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json")  # which is all that a tokenizer of bytes has


@dataclass
class Args:
    # -- input --
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]  # run, its best/ or last/, or a folder
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[TEXT ...]")] = ()  # texts, or clips
    file: str | None = None  # read the texts from here: a text a line, or a table (.json .jsonl .csv .tsv .parquet)
    text_column: str = "text"  # tables: column of the text
    text_pair_column: str | None = None  # tables: column of a second text, for a model of pairs
    text_pair: str | None = None  # second text, the same for every text
    # -- prediction --
    batch_size: int = 32  # texts or clips in one forward pass
    max_length: int | None = None  # tokens kept of each text (default: what the tokenizer or the model was made for)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    # -- output --
    top_k: int = 0  # how many classes scores lists, best first; 0: all (signs: 5 glosses and 3 categories)
    output: str | None = None  # write here instead of standard output


# ------------------------------------------------------------------------------------------------------------ common


def model_folder(path: Path) -> Path:
    """The folder with the weights: ``path`` itself, or ``best/`` or ``last/`` of the run ``path``.

    Raises:
        UserError: no such folder, or no model in it.
    """
    if not path.is_dir():
        reason = "is a file, not a folder" if path.exists() else "no such folder"
        raise UserError(f"{path}: {reason}; give a run or a model folder")
    for folder in (path, path / "best", path / "last"):
        if (folder / "config.json").is_file():
            return folder
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path}: holds a LoRA adapter alone; merge it into its model first")
    if path.parent.name == "checkpoints":
        raise UserError(f"{path}: is a checkpoint for resuming; give its run: {path.parent.parent}")
    raise UserError(f"{path}: no model here (no config.json, nor one in best/ or last/)")


def read_model_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder; UserError where it is broken."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: broken JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected an object, found a {type(config).__name__}")
    return config


def task_of(folder: Path, config: dict[str, Any]) -> str:
    """Which task the model in ``folder`` was trained for, from its ``config.json``: "text" or "sign".

    Raises:
        UserError: a model that is no classifier this tool knows.
    """
    architectures = [str(name) for name in config.get("architectures") or []]
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return "text"
    if str(config.get("model_type")).startswith("sign_"):
        return "sign"
    kind = architectures[0] if architectures else config.get("model_type", "of unknown kind")
    raise UserError(f"{folder}: the model is {kind}; predict.py needs a classifier of texts or of signs")


def choose_device(name: str) -> torch.device:
    """The torch device of that name; "auto" is the first accelerator, else the CPU."""
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: no such device here; give auto or cpu") from None
    return device


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[IO[str]]:
    """Standard output, or a file at ``path`` that appears when all of it is written and not before."""
    if path is None:
        sys.stdout.reconfigure(encoding="utf-8")
        try:
            yield sys.stdout
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return
    target = Path(path)
    if target.is_dir():
        raise UserError(f"--output {target}: is a folder; name a file")
    direct = target.exists() and not stat.S_ISREG(target.stat().st_mode)  # /dev/stderr, a named pipe
    draft = target if direct else target.with_name(f".{target.name}.{os.getpid()}.draft")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stream = open(draft, "w", encoding="utf-8")  # noqa: SIM115  (closed below, in one place with the rename)
    except OSError as error:
        raise UserError(f"--output {target}: {error.strerror}") from None
    try:
        with stream:
            yield stream
        if not direct:
            draft.replace(target)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            return
        raise UserError(f"--output {target}: {error.strerror}") from None
    finally:
        if not direct:
            draft.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------------- text


@dataclass
class TextModel:
    """A classifier of texts with what prediction needs: ``predict`` turns a chunk into one result a text."""

    model: Any
    tokenizer: Any
    labels: list[str]
    device: Any
    max_length: int


def load_text_model(
    folder: Path, config: dict[str, Any], device: Any, max_length: int | None = None, pairs: bool = False
) -> TextModel:
    """The model and tokenizer in ``folder``, for single texts or ``pairs``.

    Raises:
        UserError: no tokenizer, weights that are missing or do not fit, a ``max_length`` beyond the model's positions
            or too small for any text.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        # Checked here, because AutoTokenizer may make an empty one without a word.
        raise UserError(f"{folder}: no tokenizer beside the model (tokenizer.json); copy it from the base model")
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if config.get("model_type") == "text_cnn":
        import lib.models.text_cnn  # noqa: F401  (makes the auto classes know it)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(f"{folder}: the tokenizer does not load ({_first_line(error)})") from None
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder}: the model does not load ({_first_line(error)})") from None
    unfit = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if unfit:
        raise UserError(f"{folder}: weights are missing ({', '.join(unfit[:3])}); is it a trained classifier?")
    names = model.config.id2label
    return TextModel(
        model=model.eval().to(device),
        tokenizer=tokenizer,
        labels=[str(names[index]) for index in range(model.config.num_labels)],
        device=device,
        max_length=_length_limit(tokenizer, model.config, max_length, pairs),
    )


def predict_chunk(
    loaded: TextModel, texts: list[str], pairs: list[str] | None, batch_size: int, done: Callable[[int], Any] = int
) -> Any:
    """Scores [n, C] (float32 numpy) of n texts in their order: probabilities, or the raw value of a regression.

    Texts are computed in order of length, so that a batch has little padding; ``done`` is told each batch's size.
    """
    import numpy as np
    import torch

    from lib.collate import collate_text

    tokenizer, config = loaded.tokenizer, loaded.model.config
    encoded = tokenizer(texts, pairs, truncation=True, max_length=loaded.max_length, return_attention_mask=False)
    if tokenizer.pad_token_id is None:
        batch_size = 1
    collate = collate_text(tokenizer.pad_token_id or 0)
    embedded = getattr(loaded.model.get_input_embeddings(), "num_embeddings", None)
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    order = sorted(range(len(texts)), key=lambda row: -len(encoded["input_ids"][row]))
    scores = np.empty((len(texts), len(loaded.labels)), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([{name: encoded[name][row] for name in names} for row in rows])
        if embedded is not None and int(batch["input_ids"].max()) >= embedded:
            raise UserError(f"the tokenizer has more tokens than the model's {embedded}; they do not belong together")
        with torch.inference_mode():
            logits = loaded.model(**{name: tensor.to(loaded.device) for name, tensor in batch.items()}).logits.float()
        if config.problem_type == "multi_label_classification":
            logits = logits.sigmoid()
        elif len(loaded.labels) > 1 and config.problem_type != "regression":
            logits = logits.softmax(dim=-1)
        scores[rows] = logits.cpu().numpy()
        done(len(rows))
    return scores


def text_result(text: str, pair: str | None, scores: Any, labels: list[str], top_k: int) -> dict[str, Any]:
    """What is written for one text; ``scores`` [C] are listed best first, ``top_k`` of them (0: all)."""
    best_first = sorted(range(len(labels)), key=lambda index: -scores[index])
    listed = {labels[index]: round(float(scores[index]), 6) for index in best_first[: top_k or None]}
    result: dict[str, Any] = {"text": text}
    if pair is not None:
        result["text_pair"] = pair
    return {**result, "label": labels[best_first[0]], "score": listed[labels[best_first[0]]], "scores": listed}


def text_chunks(args: Args) -> tuple[int | None, Iterator[tuple[list[str], list[str] | None]]]:
    """How many texts there are (None: not known yet), and chunks of (texts, second texts) from where ``args`` says.

    Raises:
        UserError: a missing or broken file, no text, more than one source.
    """
    if args.texts and args.file:
        raise UserError("texts and --file: give one of them")
    if args.text_pair is not None and args.text_pair_column:
        raise UserError("--text_pair and --text_pair_column: give one of them")
    if args.text_pair_column and not (args.file and args.file.lower().endswith(TABLES)):
        raise UserError(f"--text_pair_column needs a table: --file with a name in {' '.join(TABLES)}")
    total: int | None = None
    if args.texts:
        total, chunks = len(args.texts), _paired(_chunks_of(args.texts), args.text_pair)
    elif args.file:
        path = Path(args.file)
        if path.is_dir() or not path.exists():
            raise UserError(f"--file {path}: {'is a folder; name a file' if path.is_dir() else 'no such file'}")
        if path.suffix.lower() in TABLES:
            total, chunks = _table_chunks(args)
        else:
            chunks = _paired(_line_chunks(path, str(path), CHUNK), args.text_pair)
    else:
        # Someone who types wants each answer at once.
        size = 1 if sys.stdin.isatty() else CHUNK
        chunks = _paired(_line_chunks(sys.stdin.buffer, "standard input", size), args.text_pair)
    for given in (*args.texts, args.text_pair or ""):
        if not _is_unicode(given):
            raise UserError(f"text {given!a}: not UTF-8; check the terminal's encoding")
    return total, chunks


def predict_texts(args: Args, folder: Path, config: dict[str, Any]) -> None:
    """Reads, predicts and writes texts, chunk by chunk; memory does not grow with the input."""
    total, chunks = text_chunks(args)
    first = next(chunks, None)  # before the model is loaded: a missing input is told at once
    if first is None:
        source = args.file or "standard input"
        raise UserError(f"{source}: no text in it; give texts on the command line, with --file or on standard input")
    loaded = load_text_model(folder, config, choose_device(args.device), args.max_length, pairs=first[1] is not None)

    import numpy as np
    from tqdm.auto import tqdm

    row = 0
    with open_output(args.output) as stream:
        # disable=None: shown on a terminal only. Chunks typed by hand would draw it between the lines.
        typed = not args.texts and not args.file and sys.stdin.isatty()
        with tqdm(total=total, unit=" texts", delay=2, disable=typed or None, leave=False, file=sys.stderr) as bar:
            for texts, pairs in _chain(first, chunks):
                scores = predict_chunk(loaded, texts, pairs, args.batch_size, bar.update)
                if not np.isfinite(scores).all():
                    bad = row + int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0]) + 1
                    raise UserError(f"{folder}: the model gives NaN for text {bad}; its weights are broken")
                for index, text in enumerate(texts):
                    pair = None if pairs is None else pairs[index]
                    result = text_result(text, pair, scores[index], loaded.labels, args.top_k)
                    stream.write(json.dumps(result, ensure_ascii=False) + "\n")
                stream.flush()
                row += len(texts)


def _length_limit(tokenizer: Any, config: Any, asked: int | None, pairs: bool) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    known = [limit for limit in (tokenizer.model_max_length, positions) if limit and 0 < limit < 10**9]
    if asked is None:
        return min(known, default=NO_LIMIT_LENGTH)
    if positions and 0 < positions < asked:
        raise UserError(f"--max_length {asked}: the model has {positions} positions")
    if asked <= (special := tokenizer.num_special_tokens_to_add(pair=pairs)):
        raise UserError(f"--max_length {asked}: leaves no room for text beside {special} special tokens")
    return asked


def _table_chunks(args: Args) -> tuple[int, Iterator[tuple[list[str], list[str] | None]]]:
    from lib.tables import read_text_table

    table = read_text_table(
        args.file, text_column=args.text_column, text_pair_column=args.text_pair_column, require_labels=False
    )

    def chunks() -> Iterator[tuple[list[str], list[str] | None]]:
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
        while lines := list(islice(iter(source.readline, b""), size)):
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


def _paired(chunks: Iterable[list[str]], pair: str | None) -> Iterator[tuple[list[str], list[str] | None]]:
    return ((texts, None if pair is None else [pair] * len(texts)) for texts in chunks)


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------------- signs


def predict_clips(args: Args, folder: Path, config: dict[str, Any]) -> None:
    """Reads clips (``.npz``, alone or all of a folder) and writes the best glosses and categories of each."""
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoModel

    import lib.models.sign  # noqa: F401  (makes the auto classes know it)
    from lib.clips import normalise, read_clip
    from lib.collate import ClipCollate

    paths = clip_paths(args)
    device = choose_device(args.device)
    try:
        model, report = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except Exception as error:
        raise UserError(f"{folder}: the model does not load ({_first_line(error)})") from None
    if report["missing_keys"]:
        raise UserError(f"{folder}: weights are missing ({', '.join(sorted(report['missing_keys'])[:3])})")
    model, collate, settings = model.eval().to(device), ClipCollate(), model.config
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
                gloss, cat = (logits.float().softmax(1).cpu() for logits in (output.gloss_logits, output.cat_logits))
                for row in range(len(gloss)):
                    path = chunk.pop(0)
                    result = {
                        "file": str(path),
                        "gloss": best_classes(gloss[row], settings.gloss_names, args.top_k or 5),
                        "category": best_classes(cat[row], settings.cat_names, args.top_k or 3),
                    }
                    stream.write(json.dumps(result, ensure_ascii=False) + "\n")
            stream.flush()
            bar.update(len(samples))


def best_classes(odds: torch.Tensor, names: list[str], count: int) -> list[dict[str, Any]]:
    """The ``count`` most likely classes of ``odds`` [C], best first, as ``{"label", "score"}``."""
    best = odds.topk(min(count, len(names)))
    return [
        {"label": names[index], "score": round(score, 6)}
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def clip_paths(args: Args) -> list[Path]:
    """The clips that the command line names, those of a folder in the order of their names.

    Raises:
        UserError: none is named, a path does not exist, a folder holds none, or a flag for texts was given.
    """
    if args.file or args.text_pair or args.text_pair_column or args.max_length:
        raise UserError("--file, --text_pair and --max_length are for texts; name the clips behind the run")
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


def check(args: Args) -> None:
    """UserError for a number that makes no sense."""
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: give a whole number of at least 1")
    if args.top_k < 0:
        raise UserError(f"--top_k {args.top_k}: give a whole number; 0 lists all classes")
    same = args.file and args.output and Path(args.output).exists() and Path(args.file).exists()
    if same and Path(args.file).samefile(args.output):
        raise UserError(f"--output {args.output}: would replace the file that is read; name another")


def main() -> None:
    args = parse_args(Args, aliases={})
    check(args)
    folder = model_folder(Path(args.model))
    config = read_model_config(folder)
    tasks = {"text": predict_texts, "sign": predict_clips}
    tasks[task_of(folder, config)](args, folder, config)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
