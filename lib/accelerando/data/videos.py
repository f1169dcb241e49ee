"""Frames of videos at given times, read with PyAV: decoding starts at the keyframe before each of them."""

from __future__ import annotations

import bisect
import errno
import importlib.util
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from accelerando.base.errors import UserError, first_line
from accelerando.base.model_folder import LFS_POINTER
from accelerando.data.decode import DecodedImage, pillow, what_it_is

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif")
TOLERANCE = 0.5  # seconds by which the last frame may end before the length that a file states


def require_av(what: str) -> None:
    """UserError if PyAV, which reads videos, is not installed."""
    if importlib.util.find_spec("av") is None:
        raise UserError(f"{what} needs PyAV to be read: pip install av")


def read_frames(path: Path, positions: Sequence[float]) -> list[DecodedImage]:
    """The frames that are shown at ``positions``, ascending shares of the video's duration (0 <= p < 1), as they are
    shown: turned as the file says, with square pixels.

    Positions are times, not frame numbers, so a variable frame rate changes nothing.

    Raises:
        ValueError: it is not a video, has no video stream, is damaged or ends before its stated duration.
        OSError: it cannot be read from the disk.
    """
    require_av("a video")
    import av

    with open(path, "rb") as file:
        if (start := file.read(len(LFS_POINTER))) == LFS_POINTER:
            raise ValueError(what_it_is(start))
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = _video_stream(container)
            return [_as_shown(frame, stream) for frame in _frames_at(container, stream, positions)]
    except av.FFmpegError as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.EACCES, errno.EIO, errno.EMFILE):
            raise OSError(error.errno, error.strerror, str(path)) from None
        reason = re.sub(r"^\[Errno \d+\] ", "", " ".join(first_line(error).split())).partition(":")[0]
        raise ValueError(f"not a video, or damaged ({reason})") from None


def _video_stream(container: InputContainer) -> VideoStream:
    """The first video stream that is not a cover image."""
    import av

    cover = av.stream.Disposition.attached_pic
    found = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not found:
        raise ValueError("it has no video stream" if len(container.streams) else "not a video, or its end is missing")
    stream = found[0]
    if stream.codec_context is None or not stream.codec_context.width:
        raise ValueError("its video codec is unknown, or its header is damaged")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > 2 * pillow().MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels: far too large")
    return stream


def _frames_at(container: InputContainer, stream: VideoStream, positions: Sequence[float]) -> list[VideoFrame]:
    """The frame at each position; frames that are not asked for are decoded only where others depend on them."""
    start, duration = _extent(container, stream)
    base = float(stream.time_base)
    keyframes = sorted(entry.timestamp * base for entry in stream.index_entries if entry.is_keyframe)
    found: list[VideoFrame] = []
    decoder: Iterator[VideoFrame] = container.decode(stream)
    shown = following = None  # the frame at the current time, and the next one
    for position in positions:
        time = start + position * duration
        key = keyframes[bisect.bisect_right(keyframes, time) - 1] if keyframes and keyframes[0] <= time else start
        if key > (start if following is None else following.time) + base:
            # The index may hold decoding times, which are earlier than those at which frames are shown.
            for earlier in (0.0, 1.0, math.inf):
                container.seek(math.floor(max(start, time - earlier) / base), stream=stream)
                decoder = container.decode(stream)
                shown, following = None, _timed(decoder)
                if following is not None and following.time <= time:
                    break
        following = _timed(decoder) if shown is following is None else following
        while following is not None and (shown is None or following.time <= time):
            shown, following = following, _timed(decoder)
        if shown is None:
            raise ValueError("no frame can be decoded")
        length = float((shown.duration or 0) * base)
        if following is None and shown.time + length < time - max(TOLERANCE, 0.05 * duration):
            raise ValueError(f"it ends after {shown.time - start:.1f} of {duration:.1f} seconds: truncated or damaged")
        if shown.is_corrupt:
            raise ValueError(f"it is damaged at second {shown.time - start:.1f}")
        found.append(shown)
    return found


def _timed(decoder: Iterator[VideoFrame]) -> VideoFrame | None:
    """The next frame with a time; None: there is none."""
    return next((frame for frame in decoder if frame.pts is not None), None)


def _extent(container: InputContainer, stream: VideoStream) -> tuple[float, float]:
    """The time of the first frame and the duration, in seconds; if the file does not state it, it is read once."""
    import av

    base = float(stream.time_base)
    start = (stream.start_time or 0) * base
    if stream.duration:
        return start, stream.duration * base
    if container.duration:
        return start, container.duration / av.time_base
    last = max((packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None),
               default=0)  # fmt: skip
    container.seek(0)
    return start, max(last * base - start, base)


def _as_shown(frame: VideoFrame, stream: VideoStream) -> DecodedImage:
    """The frame as uint8 RGB with its rotation and its pixels' aspect ratio applied."""
    ratio = float(stream.sample_aspect_ratio or 1) or 1.0
    width = max(1, round(frame.width * ratio)) if 0.1 < ratio < 10 else frame.width
    pixels = frame.to_ndarray(format="rgb24", width=width, height=frame.height)
    turns = round(frame.rotation / 90) % 4  # counterclockwise
    if turns:
        pixels = np.ascontiguousarray(np.rot90(pixels, turns))
    return DecodedImage(pixels, pixels.shape[:2])
