"""Saved models that answer: a run's weights opened, pictures from files and URLs decoded ahead, logits for each."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from lib.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

URLS = ("http://", "https://")
MOST_BYTES = 100_000_000  # of a file that is fetched
PATIENCE = 20.0  # seconds that a server may be silent
LONGEST_FETCH = 120.0  # seconds for one file in all
TOLD_EVERY = 30.0  # seconds between lines where nobody watches a bar


# ------------------------------------------------------------------------------------------------------------- model


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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder; UserError where it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: broken JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found a {type(content).__name__}")
    return content


def task_of(folder: Path, config: dict[str, Any]) -> str:
    """Which task the model in ``folder`` was trained for, from its ``config.json``: "text", "sign" or "image".

    Raises:
        UserError: a model that is no such classifier.
    """
    architectures = [str(name) for name in config.get("architectures") or []]
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return "text"
    if any(name.endswith("ForImageClassification") for name in architectures):
        return "image"
    kind = str(config.get("model_type", "of unknown kind"))
    if kind.startswith("sign_"):
        return "sign"
    if kind == "vision_net":
        return "image"
    raise UserError(f"{folder}: the model is {[*architectures, kind][0]}; needed is a classifier of texts, signs or "
                    "pictures")  # fmt: skip


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


def open_saved(auto_class: Any, folder: Path) -> Any:
    """The model in ``folder`` through one of transformers' auto classes, in float32, for evaluation.

    Raises:
        UserError: weights that are missing, damaged or another model's.
    """
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, report = auto_class.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # each format of weights has errors of its own
        raise UserError(f"{folder}: the model does not load ({first_line(error)[:200]})") from None
    unfit = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if unfit:
        raise UserError(f"{folder}: weights are missing ({', '.join(unfit[:3])}); is it a trained classifier?")
    return model.eval()


@dataclass
class ImageModel:
    """A classifier of pictures and what turns a file into its input.

    ``prepare`` gives uint8 [3, S, S], which is normalised with ``mean`` and ``std`` (of each colour, 0 to 1), or
    float32 [3, H, W] that is normalised already.
    """

    model: Any
    device: torch.device
    label_names: list[str]
    prepare: Callable[[bytes], torch.Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def open_image_model(folder: Path, device: torch.device) -> ImageModel:
    """The classifier in ``folder``, its pictures prepared as ``scripts/image_classify.py`` evaluates them, or, where
    ``preprocessor_config.json`` says otherwise, by transformers' own processor.

    Raises:
        UserError: no processor, or weights that are missing or damaged.
    """
    import torch
    from PIL import Image
    from transformers import AutoModelForImageClassification

    import lib.models.vision  # noqa: F401  (makes the auto classes know it)
    from lib.images import decode_for_evaluation

    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no preprocessor_config.json beside the model; copy it from the base model")
    settings = read_json(path)
    # What Pillow thinks of a file is told once, as the reason why it cannot be read.
    warnings.filterwarnings("ignore", module=r"PIL\b")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    size = evaluation_size(settings)
    prepare = OwnProcessor(folder) if size is None else partial(decode_for_evaluation, size=size)
    model = open_saved(AutoModelForImageClassification, folder).to(device, memory_format=torch.channels_last)
    names = model.config.id2label
    return ImageModel(
        model, device, [str(names[number]) for number in range(model.config.num_labels)], prepare,
        tuple(settings.get("image_mean") or ()), tuple(settings.get("image_std") or ()),
    )  # fmt: skip


def evaluation_size(settings: dict[str, Any]) -> int | None:
    """The side of the pictures where a processor's ``settings`` are those of :func:`lib.images.write_image_processor`,
    so that :func:`lib.images.decode_for_evaluation` does the same; else None."""
    from lib.images import evaluation_side

    crop = settings.get("crop_size")
    side = crop.get("height") if isinstance(crop, dict) else None
    if not isinstance(side, int):
        return None
    ours = {
        "image_processor_type": "CLIPImageProcessor", "crop_size": {"height": side, "width": side}, "resample": 2,
        "size": {"shortest_edge": evaluation_side(side)}, "rescale_factor": 1 / 255, "do_resize": True,
        "do_center_crop": True, "do_rescale": True, "do_normalize": True,
    }  # fmt: skip
    coloured = all(len(settings.get(name) or ()) == 3 for name in ("image_mean", "image_std"))
    return side if coloured and all(settings.get(name) == value for name, value in ours.items()) else None


class OwnProcessor:
    """From a file to float32 [3, H, W], normalised, by the processor that is saved in ``folder``.

    Raises:
        UserError: it cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor

        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        except Exception as error:
            raise UserError(f"{folder}: the image processor does not load ({first_line(error)[:200]})") from None

    def __call__(self, file: bytes) -> torch.Tensor:
        from PIL import Image

        from lib.augment import decode_pixels

        picture = Image.fromarray(decode_pixels(file))
        return self.processor(images=[picture], return_tensors="pt")["pixel_values"][0]


def image_logits(opened: ImageModel, pixels: torch.Tensor, tta: bool = False, amp: str = "no") -> torch.Tensor:
    """Logits [B, C], float32 on the CPU, of prepared pictures [B, 3, H, W].

    ``tta``: the mean over each picture and its mirror image. ``amp``: no, bf16 or fp16.
    """
    import torch

    from lib.augment import normalise

    pixels = pixels.contiguous(memory_format=torch.channels_last).to(opened.device, non_blocking=True)
    if pixels.dtype == torch.uint8:
        pixels = normalise(pixels, opened.mean, opened.std)
    kind = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    with torch.inference_mode(), torch.autocast(opened.device.type, kind, enabled=amp != "no"):
        logits = opened.model(pixel_values=pixels).logits.float()
        if tta:
            logits = (logits + opened.model(pixel_values=pixels.flip(-1)).logits.float()) / 2
    return logits.cpu()


def scores_of(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Probabilities [B, C] from logits, as ``config.problem_type`` wants them; of a regression its raw values."""
    if config.problem_type == "multi_label_classification":
        return logits.sigmoid()
    return logits.softmax(dim=-1) if logits.shape[-1] > 1 and config.problem_type != "regression" else logits


# ---------------------------------------------------------------------------------------------------------- pictures


@dataclass
class Answers:
    """A batch of pictures in the order they were named: ``faults`` [b], None where one could be read, and the
    ``logits`` float32 [r, C] of those r."""

    names: list[str]
    faults: list[str | None]
    logits: torch.Tensor


def image_answers(
    opened: ImageModel, names: Iterable[str], batch_size: int, threads: int, tta: bool = False, amp: str = "no",
    ahead: int | None = None,
) -> Iterator[Answers]:  # fmt: skip
    """The model's answers for picture files and URLs, in order; memory does not grow with their number.

    ``threads`` read, fetch and decode while the model computes, at most ``ahead`` pictures before it (by default two
    batches and one for each thread).

    Raises:
        UserError: pictures of one batch have different shapes, the model does not take them, or gives NaN.
    """
    import torch

    def prepared(name: str) -> torch.Tensor | str:
        try:
            return opened.prepare(read_picture(name))
        except Exception as error:  # each of Pillow's decoders has errors of its own
            return fault_of(error)

    def answer(batch: list[tuple[str, torch.Tensor | str]]) -> Answers:
        sound = [pixels for _, pixels in batch if not isinstance(pixels, str)]
        logits = torch.zeros(0, len(opened.label_names))
        if len({pixels.shape for pixels in sound}) > 1:
            raise UserError("the model's image processor makes pictures of different shapes; give --batch_size 1")
        if sound:
            try:
                logits = image_logits(opened, torch.stack(sound), tta, amp)
            except torch.OutOfMemoryError:
                raise UserError("the GPU's memory does not suffice: give a smaller --batch_size") from None
            except ValueError as error:  # transformers' way to say it
                reason = first_line(error)[:200]
                raise UserError(f"the model does not take what its image processor makes: {reason}") from None
        found = Answers(
            [name for name, _ in batch], [pixels if isinstance(pixels, str) else None for _, pixels in batch], logits
        )
        if not logits.isfinite().all():
            bad = int((~logits.isfinite().all(1)).nonzero()[0])
            read = [name for name, fault in zip(found.names, found.faults, strict=True) if fault is None]
            raise UserError(f"the model gives NaN for {read[bad]}; its weights are broken")
        return found

    batch: list[tuple[str, torch.Tensor | str]] = []
    ahead = 2 * batch_size + threads if ahead is None else ahead
    with contextlib.closing(map_ahead(prepared, names, threads, ahead)) as pictures:
        for picture in pictures:
            batch.append(picture)
            if len(batch) == batch_size:
                yield answer(batch)
                batch = []
        if batch:
            yield answer(batch)


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Iterator[tuple[T, R]]:
    """(item, ``function(item)``) in order, computed by ``threads`` threads at most ``ahead`` items before they are
    taken. An exception of ``function`` is raised in its place.

    The threads end with the iterator, or, where one waits for a server, with the process.
    """
    from concurrent.futures import Future
    from queue import SimpleQueue

    tasks: SimpleQueue[tuple[T, Future[R]] | None] = SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while (task := tasks.get()) is not None and not stopped.is_set():
            item, future = task
            try:
                future.set_result(function(item))
            except BaseException as error:
                future.set_exception(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    pending: deque[tuple[T, Future[R]]] = deque()
    try:
        for worker in workers:
            worker.start()
        for item in items:
            pending.append((item, Future()))
            tasks.put(pending[-1])
            if len(pending) > ahead:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        stopped.set()
        for _ in workers:
            tasks.put(None)
        # A thread amid torch's code would disturb the end of the process; one that waits for a server does not.
        deadline = time.monotonic() + 2
        for worker in workers:
            if worker.ident is not None:
                worker.join(max(0.0, deadline - time.monotonic()))


def is_url(name: str) -> bool:
    """Whether a name is a URL that can be fetched."""
    return name.lower().startswith(URLS)


def read_picture(name: str) -> bytes:
    """The file at a path or URL. ValueError or OSError: there is none, or it is refused."""
    if is_url(name):
        return fetch(name)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", name):
        raise ValueError("of URLs, only http:// and https:// are read")
    return Path(name).read_bytes()


def fetch(url: str) -> bytes:
    """The file at an http or https URL, redirections followed.

    Raises:
        OSError, ValueError: the server says no, is silent for 20 s or slow for 120 s, or the file is cut off or larger
            than 100 MB.
    """
    import urllib.parse
    import urllib.request

    # Spaces and letters beyond ASCII, as they stand in lists.
    url = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]|")
    request = urllib.request.Request(url, headers={"User-Agent": "accelerando", "Accept": "image/*,*/*;q=0.5"})
    deadline = time.monotonic() + LONGEST_FETCH
    with _opener().open(request, timeout=PATIENCE) as answer:
        stated = answer.headers.get("Content-Length") or ""
        expected = int(stated) if stated.isascii() and stated.isdigit() else None
        parts, size = [], 0
        while (expected or 0) <= MOST_BYTES and (part := answer.read1(2**16)):
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                break
            if time.monotonic() > deadline:
                raise ValueError(f"not there after {LONGEST_FETCH:g} s")
    if max(size, expected or 0) > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES // 10**6} MB")
    if expected is not None and size < expected:
        raise ValueError(f"cut off: {size:,} of {expected:,} bytes")
    return b"".join(parts)


def _opener() -> Any:
    """What opens http and https alone: urllib's own would let a redirection lead to FTP."""
    from urllib import request

    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler, request.UnknownHandler, request.HTTPHandler, request.HTTPSHandler,
        request.HTTPDefaultErrorHandler, request.HTTPRedirectHandler, request.HTTPErrorProcessor,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


def fault_of(error: BaseException) -> str:
    """Why a picture cannot be read, in one line."""
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):  # urllib's wrapping
        error = reason
    # Pillow names the buffer that it read from, which tells nobody anything.
    text = re.sub(r"cannot identify image file .*", "not a picture, or its header is damaged", first_line(error))
    return " ".join(str(getattr(error, "strerror", None) or text).split())


def pictures_in(folder: Path) -> Iterator[str]:
    """The picture files in a folder and the folders in it, by their names' endings; in each folder sorted.

    Raises:
        UserError: a folder in it cannot be listed.
    """
    from lib.folders import PICTURES

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}") from None

    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(files):
            if name.lower().endswith((*PICTURES, ".gif")) and not name.startswith("."):
                yield str(Path(place) / name)


def printable(name: str) -> str:
    """A file's name as text that can be written as UTF-8, which its bytes need not be."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# ------------------------------------------------------------------------------------------------------------ output


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


def told(answers: Iterable[Answers], total: int | None, what: str, hidden: bool = False) -> Iterator[Answers]:
    """``answers`` with a bar on a terminal, and a line on stderr for each picture that cannot be read.

    Where stderr is no terminal, a line every half minute takes the place of the bar. ``hidden``: neither.
    """
    from tqdm import tqdm

    done, started, said = 0, time.monotonic(), time.monotonic()
    with tqdm(
        total=total, unit=" pictures", desc=what, delay=2, disable=hidden or None, leave=False, file=sys.stderr
    ) as bar:
        for batch in answers:
            for name, fault in zip(batch.names, batch.faults, strict=True):
                if fault is not None:
                    tqdm.write(f"cannot be read: {printable(name)}: {fault}", file=sys.stderr)
            yield batch
            done += len(batch.names)
            bar.update(len(batch.names))
            now = time.monotonic()
            if bar.disable and not hidden and now - said > TOLD_EVERY:
                of_all = f" of {total:,}" if total is not None else ""
                print(
                    f"{what}: {done:,}{of_all} pictures, {done / (now - started):,.1f}/s", file=sys.stderr, flush=True
                )
                said = now
