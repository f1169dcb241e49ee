"""A saved image classifier's predictions for many files, in order."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accelerando.base.errors import UserError, first_line
from accelerando.base.processes import map_ahead
from accelerando.base.texts import one_line
from accelerando.data.media import even_positions
from accelerando.data.videos import VIDEO_SUFFIXES, read_frames
from accelerando.inference.inputs import Servers, fault_of, is_url, read_image
from accelerando.inference.outputs import printable
from accelerando.inference.saved import image_logits

if TYPE_CHECKING:
    import torch

    from accelerando.inference.saved import ImageModel

VIDEO_FRAMES = 8  # of a video, as clip_har.py takes by default
REPORT_EVERY = 30.0  # seconds between lines of progress without a terminal


@dataclass
class Answers:
    """A batch of b images in the given order: ``faults`` [b], None if the image could be read, and the ``logits``
    float32 [r, C] of the r readable ones."""

    names: list[str]
    faults: list[str | None]
    logits: torch.Tensor


def image_answers(
    opened: ImageModel,
    names: Iterable[str],
    batch_size: int,
    threads: int,
    tta: bool = False,
    amp: str = "no",
    ahead: int | None = None,
) -> Iterator[Answers]:
    """The model's predictions for image files and URLs, in order; memory does not grow with their number.

    ``threads`` threads read, download and decode while the model computes, at most ``ahead`` images in advance
    (default: two batches and one per thread).

    Raises:
        UserError: the images of a batch have different shapes, the model does not accept them, or it returns NaN.
    """
    import torch

    servers = Servers()
    takes_videos = getattr(opened.model.config, "model_type", "") == "clip_classifier"

    def prepared(name: str) -> torch.Tensor | str:
        """The image, or the frames of a video one after the other [F, 3, H, W]; or why it cannot be read."""
        try:
            if takes_videos and name.lower().endswith(VIDEO_SUFFIXES) and not is_url(name):
                positions = even_positions(VIDEO_FRAMES)
                return torch.stack([opened.prepare(frame) for frame in read_frames(Path(name), positions)])
            return opened.prepare(read_image(name, servers))
        except Exception as error:  # each of Pillow's decoders raises errors of its own
            return fault_of(error)

    def answer(batch: list[tuple[str, torch.Tensor | str]]) -> Answers:
        sound = [pixels for _, pixels in batch if not isinstance(pixels, str)]
        logits = torch.zeros(0, len(opened.label_names))
        if len({pixels.shape[-3:] for pixels in sound}) > 1:
            raise UserError("the model's image processor makes images of different shapes; use --batch_size 1")
        if sound:
            try:
                together = torch.cat([pixels if pixels.ndim == 4 else pixels[None] for pixels in sound])
                frames = torch.tensor([len(pixels) if pixels.ndim == 4 else 1 for pixels in sound])
                logits = image_logits(opened, together, tta, amp, frames if takes_videos else None)
            except torch.OutOfMemoryError:
                raise UserError("out of GPU memory: use a smaller --batch_size") from None
            except (ValueError, RuntimeError, AssertionError) as error:  # what nets raise for a size
                reason = first_line(error)[:200]
                raise UserError(f"the model does not accept the output of its image processor: {reason}") from None
        found = Answers(
            [name for name, _ in batch], [pixels if isinstance(pixels, str) else None for _, pixels in batch], logits
        )
        if not logits.isfinite().all():
            bad = int((~logits.isfinite().all(1)).nonzero()[0])
            read = [name for name, fault in zip(found.names, found.faults, strict=True) if fault is None]
            raise UserError(f"the model returns NaN for {read[bad]}; its weights are corrupted")
        return found

    batch: list[tuple[str, torch.Tensor | str]] = []
    ahead = 2 * batch_size + threads if ahead is None else ahead
    with contextlib.closing(map_ahead(prepared, names, threads, ahead)) as images:
        for image in images:
            batch.append(image)
            if len(batch) == batch_size:
                yield answer(batch)
                batch = []
        if batch:
            yield answer(batch)


def with_progress(answers: Iterable[Answers], total: int | None, what: str, hidden: bool = False) -> Iterator[Answers]:
    """``answers`` with a progress bar on a terminal, and a line on stderr for each image that cannot be read.

    If stderr is not a terminal, a line every half minute replaces the bar. ``hidden``: neither.
    """
    from tqdm import tqdm

    done, started, reported = 0, time.monotonic(), time.monotonic()
    with tqdm(
        total=total, unit=" images", desc=what, delay=2, disable=hidden or None, leave=False, file=sys.stderr
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
                print(f"{what}: {done:,}{of_all} images, {done / (now - started):,.1f}/s", file=sys.stderr, flush=True)
                reported = now
