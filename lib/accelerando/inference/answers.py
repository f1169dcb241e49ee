"""A saved classifier's predictions for many images or videos, in order."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from accelerando.base.errors import UserError, first_line
from accelerando.base.processes import map_ahead
from accelerando.base.texts import one_line
from accelerando.data.media import prepared_views
from accelerando.data.videos import VIDEO_SUFFIXES
from accelerando.inference.inputs import Servers, fault_of, is_url, read_image
from accelerando.inference.outputs import printable
from accelerando.inference.saved import image_logits

if TYPE_CHECKING:
    import torch

    from accelerando.inference.saved import ImageModel

Opens = Callable[[], bytes | Path]  # gives an image file's content, or the path of a file or of a folder of frames
REPORT_EVERY = 30.0  # seconds between lines of progress without a terminal


@dataclass
class Answers:
    """A batch of b images or videos in the given order: ``faults`` [b], None if it could be read, and the ``logits``
    float32 [r, C] of the r readable ones."""

    names: list[str]
    faults: list[str | None]
    logits: torch.Tensor


@dataclass(frozen=True)
class Computing:
    """How answers are computed: ``batch_size`` samples at once; ``threads`` read, download and decode while the model
    computes, at most ``ahead`` samples in advance (default: two batches and one per thread). ``tta``: the mean over
    each image and its mirror image; ``amp``: no, bf16 or fp16. Of a video ``frames`` frames are seen in each of
    ``views`` views, whose logits are averaged."""

    batch_size: int
    threads: int
    tta: bool = False
    amp: str = "no"
    ahead: int | None = None
    frames: int = 8
    views: int = 1


def image_answers(opened: ImageModel, names: Iterable[str], how: Computing) -> Iterator[Answers]:
    """The model's predictions for files and URLs of images, and for files of videos and folders of frames if it takes
    them, in order; memory does not grow with their number.

    Raises:
        UserError: the images of a batch have different shapes, the model does not accept them, or it returns NaN.
    """
    servers = Servers()

    def found(name: str) -> bytes | Path:
        videos = opened.takes_videos and not is_url(name)
        whole = videos and (name.lower().endswith(VIDEO_SUFFIXES) or Path(name).is_dir())
        return Path(name) if whole else read_image(name, servers)

    return answers_of(opened, ((name, partial(found, name)) for name in names), how)


def answers_of(opened: ImageModel, samples: Iterable[tuple[str, Opens]], how: Computing) -> Iterator[Answers]:
    """Like :func:`image_answers`, for named samples."""
    import torch

    def prepared(sample: tuple[str, Opens]) -> tuple[torch.Tensor, list[int]] | str:
        """The frames of the views after each other, [F, 3, H, W], and the number of each view's; or why there are
        none."""
        try:
            source = sample[1]()
            if opened.takes_videos:
                return prepared_views(source, opened.prepare, how.frames, how.views)
            return opened.prepare(source.read_bytes() if isinstance(source, Path) else source)[None], [1]
        except Exception as error:  # each of Pillow's decoders raises errors of its own
            return fault_of(error)

    def answer(batch: list[tuple[tuple[str, Opens], tuple[torch.Tensor, list[int]] | str]]) -> Answers:
        sound = [found for _, found in batch if not isinstance(found, str)]
        logits = torch.zeros(0, len(opened.label_names))
        if len({pixels.shape[-3:] for pixels, _ in sound}) > 1:
            raise UserError("the model's image processor makes images of different shapes; use --batch_size 1")
        if sound:
            try:
                together = torch.cat([pixels for pixels, _ in sound])
                logits = image_logits(opened, together, how.tta, how.amp, [frames for _, frames in sound])
            except torch.OutOfMemoryError:
                raise UserError("out of GPU memory: use a smaller --batch_size") from None
            except (ValueError, RuntimeError, AssertionError) as error:  # what nets raise for a size
                reason = first_line(error)[:200]
                raise UserError(f"the model does not accept the output of its image processor: {reason}") from None
        answers = Answers(
            [name for (name, _), _ in batch], [found if isinstance(found, str) else None for _, found in batch], logits
        )
        if not logits.isfinite().all():
            bad = int((~logits.isfinite().all(1)).nonzero()[0])
            read = [name for name, fault in zip(answers.names, answers.faults, strict=True) if fault is None]
            raise UserError(f"the model returns NaN for {read[bad]}; its weights are corrupted")
        return answers

    batch: list[tuple[tuple[str, Opens], tuple[torch.Tensor, list[int]] | str]] = []
    ahead = 2 * how.batch_size + how.threads if how.ahead is None else how.ahead
    with contextlib.closing(map_ahead(prepared, samples, how.threads, ahead)) as found:
        for sample in found:
            batch.append(sample)
            if len(batch) == how.batch_size:
                yield answer(batch)
                batch = []
        if batch:
            yield answer(batch)


def with_progress(
    answers: Iterable[Answers], total: int | None, what: str, hidden: bool = False, noun: str = "images"
) -> Iterator[Answers]:
    """``answers`` with a progress bar on a terminal, and a line on stderr for each sample that cannot be read.

    If stderr is not a terminal, a line every half minute replaces the bar. ``hidden``: neither.
    """
    from tqdm import tqdm

    done, started, reported = 0, time.monotonic(), time.monotonic()
    with tqdm(
        total=total, unit=f" {noun}", desc=what, delay=2, disable=hidden or None, leave=False, file=sys.stderr
    ) as bar:
        for batch in answers:
            for name, fault in zip(batch.names, batch.faults, strict=True):
                if fault is not None:
                    tqdm.write(f"cannot be read: {one_line(printable(name))}: {one_line(fault)}", file=sys.stderr)
            yield batch
            done += len(batch.names)
            bar.update(len(batch.names))
            now = time.monotonic()
            if bar.disable and not hidden and now - reported > REPORT_EVERY:
                of_all = f" of {total:,}" if total is not None else ""
                print(f"{what}: {done:,}{of_all} {noun}, {done / (now - started):,.1f}/s", file=sys.stderr, flush=True)
                reported = now
