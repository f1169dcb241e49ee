"""Features of videos for the Inception-GRU model: Inception v3, 2048 a frame.

  python tools/extract_features.py videos --output_dir data/features
  python tools/extract_features.py videos --output_dir data/features \\
      --weights inception_v3_google.pth --fps 15
  python tools/extract_features.py videos --add_to data/keypoints

INPUT: a video (.mp4 .mov .avi .mkv .webm); a folder of numbered images (.jpg
.png), which are the frames of one clip; or a folder of many, also in folders
below. Images that lie beside a video are ignored.

Each clip gives a <name>.npz: X2048 float32 [T, 2048], timestamps_ms int64 [T]
from 0 on, and meta, a JSON text. With --add_to, X2048 (and X2048_meta) goes into
the <name>.npz that is there, at the times that stand in it. The frame of a time
is the nearest one, so the video's frame rate may vary. Frames are rotated as the
video says, and resized whole to 299x299.

Run it again to resume where it stopped: finished clips are skipped. A damaged
video is named and left out; the exit code is then 2.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import json
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from accelerando.base.config import check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line, first_line
from accelerando.base.files import open_whole
from accelerando.base.log import progress_bar, quiet_libraries
from accelerando.base.texts import one_line
from accelerando.inference.saved import choose_device
from accelerando.models.checkpoints import read_state, without_prefixes

if TYPE_CHECKING:
    import av
    import numpy as np
    import torch

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
SIDE = 299  # pixels, what Inception v3 was trained on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
ROUNDING = Fraction(3, 2000)  # s; Matroska and WebM round times and durations to whole milliseconds
BEYOND = Fraction(1, 2)  # s that the times of an NPZ file may go beyond the video's end


@dataclass
class Args:
    # -- input --
    input: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="INPUT")]  # video, folder of frames, or of many
    fps: float = 30.0  # frames a second in the output
    frame_rate_of_frames: float = 30.0  # frames a second of the clips that are folders of images
    # -- output --
    output_dir: str | None = None  # folder for <name>.npz
    add_to: str | None = None  # instead: folder with a <name>.npz of each clip, to which X2048 is added
    overwrite: bool = False  # redo the features that are there
    # -- model --
    weights: str | None = None  # state dict of Inception v3, .pth or .safetensors (default: torchvision's download)
    random_weights: bool = False  # an untrained network instead
    seed: int = 42  # of --random_weights
    # -- work --
    batch_size: int = 32  # frames in one forward pass
    num_workers: int = 2  # threads that decode; 0: the main one
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where it is computed
    amp: Literal["no", "bf16"] = "no"  # mixed precision


@dataclass
class Clip:
    """A video or a folder of frames, and what is known of it so far."""

    name: str
    source: Path
    target: Path  # the NPZ file
    times: list[int] = field(default_factory=list)  # [T] in ms
    counts: list[int] = field(default_factory=list)  # of each kept frame: the times to which it is the nearest
    parts: list[np.ndarray] = field(default_factory=list)  # features [b, 2048] of the kept frames
    read: int = 0  # frames decoded
    end: Fraction = Fraction(0)  # s from the first frame to the end of the last one
    fault: str = ""


Piece = tuple[Clip, "torch.Tensor | None", list[int]]  # frames uint8 [b, 3, 299, 299] (None: the clip ends), counts
Frame = tuple[Fraction, Callable[[], "torch.Tensor"]]  # s from the first frame; gives uint8 [3, H, W]


# ------------------------------------------------------------------------------------------------------------ input


def find_clips(source: Path, folder: Path) -> list[Clip]:
    """The clips that INPUT names, by name; ``folder`` is for their NPZ files.

    Raises:
        UserError: there is none, or two have one name.
    """
    found: list[tuple[str, Path]] = []
    if source.is_dir():
        for place, folders, files in os.walk(source):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
            names = sorted(name for name in files if not name.startswith("."))
            videos = [Path(place, name) for name in names if name.lower().endswith(VIDEOS)]
            found += [(video.stem, video) for video in videos]
            if not videos and any(frame_number(name) for name in names):
                found.append((Path(place).resolve().name, Path(place)))
        if not found:
            raise UserError(f"{source}: no video in it ({' '.join(VIDEOS)}), nor numbered images (.jpg .png)")
    elif not source.exists():
        near = [path.name for path in source.parent.iterdir()] if source.parent.is_dir() else []
        close = difflib.get_close_matches(source.name, near, n=1)
        hint = f": did you mean {source.with_name(close[0])}?" if close else ""
        raise UserError(f"{source}: no such file or folder{hint}")
    elif source.suffix.lower() not in VIDEOS:
        raise UserError(f"{source}: a video ends in {' '.join(VIDEOS)}; frames are given as their folder")
    else:
        found = [(source.stem, source)]
    found.sort()
    for (name, one), (other, two) in itertools.pairwise(found):
        if name == other:
            raise UserError(f"{one} and {two} would both make {name}.npz: rename one, or give their folders one by one")
    return [Clip(name, path, folder / f"{name}.npz") for name, path in found]


def frame_number(name: str) -> tuple[str, int] | None:
    """What stands before the number at the end of an image's name, and the number; None where it is no frame."""
    match = re.fullmatch(r"(|[^.].*?)(\d+)\.(?:jpe?g|png)", name, re.IGNORECASE)
    return (match[1], int(match[2])) if match else None


def folder_frames(clip: Clip, rate: Fraction) -> Iterator[Frame]:
    """The images of a folder in the order of their numbers, at ``rate`` frames a second.

    Raises:
        ValueError, OSError: two series of numbers, or an image that cannot be read.
    """
    from accelerando.data.decode import decode_image

    files = sorted((*key, entry.name) for entry in os.scandir(clip.source) if (key := frame_number(entry.name)))
    for one, two in itertools.pairwise(files):
        if one[0] != two[0] or one[1] == two[1]:
            raise ValueError(f"{one[2]} and {two[2]} are not of one series of frames")

    def read(name: str) -> torch.Tensor:
        try:
            return decode_image((clip.source / name).read_bytes())
        except Exception as error:  # each of Pillow's decoders has errors of its own
            raise ValueError(f"{name}: {first_line(error)}") from None

    for row, (_, _, name) in enumerate(files):
        clip.read, clip.end = row + 1, (row + 1) / rate
        yield row / rate, lambda name=name: read(name)


def video_frames(clip: Clip, step: Fraction, threads: int) -> Iterator[Frame]:
    """The frames of a video as they are decoded; ``step`` is how long one lasts where nothing says so.

    Raises:
        ValueError, OSError, av.FFmpegError: it is damaged, cut off, or no video.
    """
    import av

    # "file:": a colon in a name is no protocol; and nothing that poses as a video may name another address.
    options = {"protocol_whitelist": "file"}
    with av.open(f"file:{clip.source}", options=options, metadata_errors="replace") as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise ValueError("no video in it that PyAV can decode")
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        first = last = None
        for frame in container.decode(stream):
            clip.read += 1
            if frame.is_corrupt:
                raise ValueError(f"damaged at {float(clip.end):.1f} s")
            moment = clip.end + (first or 0) if frame.pts is None else frame.pts * frame.time_base
            first = moment if first is None else first
            if last is not None and moment <= last:
                continue  # a time twice: the first frame of it counts
            lasts = frame.duration * frame.time_base if frame.duration and frame.time_base else 0
            clip.end = moment - first + (lasts or (moment - last if last is not None else step))
            last = moment
            yield moment - first, lambda frame=frame: pixels_of(frame)
        # FFmpeg reads a file that is cut off as far as it goes and says nothing.
        declared = stream.duration * stream.time_base if stream.duration else 0
        if not declared and container.duration and not container.streams.audio:
            declared = Fraction(container.duration, av.time_base)
        there = clip.end + (first or 0)
        if declared - there > max(Fraction(1, 4), declared / 50):
            raise ValueError(f"cut off: {float(there):.1f} of {float(declared):.1f} s are there")


def pixels_of(frame: av.VideoFrame) -> torch.Tensor:
    """A decoded frame as uint8 RGB [3, H, W], rotated as its video says: phones store upright films sideways."""
    import numpy as np
    import torch

    pixels = np.rot90(frame.to_ndarray(format="rgb24", threads=1), round(frame.rotation / 90))
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def nearest(clip: Clip, frames: Iterator[Frame], times: Iterator[Fraction]) -> Iterator[tuple[Frame, int]]:
    """The frames that are nearest to one of the rising ``times`` or more, and to how many; of two as near the earlier.

    The last frame gets those before its end, or all others where the times are ``clip.times``.
    """
    moment, held = next(times, None), None
    for frame in frames:
        count = 0
        while held is not None and moment is not None and moment <= (held[0] + frame[0]) / 2:
            count, moment = count + 1, next(times, None)
        if count:
            yield held, count
        if moment is None:
            return
        held = frame
    if held is None:
        raise ValueError("no frame in it")
    rest = itertools.chain([moment], times)
    if not clip.times:
        rest = itertools.takewhile(lambda moment: moment == 0 or moment < clip.end - ROUNDING, rest)
    if count := sum(1 for _ in rest):
        yield held, count


def read_clip(clip: Clip, args: Args, threads: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Batch by batch: the kept frames, uint8 [b, 3, 299, 299], and to how many times each is nearest.

    ``clip.times`` is filled; what goes wrong stands in ``clip.fault``.
    """
    import torch

    # 29.97 is 2997/100, not the float next to it.
    fps, rate = Fraction(str(args.fps)), Fraction(str(args.frame_rate_of_frames))
    try:
        if args.add_to:
            clip.times = read_times(clip.target)
        times = (Fraction(ms, 1000) for ms in clip.times) if args.add_to else (row / fps for row in itertools.count())
        frames = folder_frames(clip, rate) if clip.source.is_dir() else video_frames(clip, 1 / fps, threads)
        batch, counts, total = [], [], 0
        for (_, load), count in nearest(clip, frames, times):
            # The pixels lie with channels last, for which torch resizes uint8 with vector instructions.
            small = torch.nn.functional.interpolate(load()[None], (SIDE, SIDE), mode="bilinear", antialias=True)
            batch.append(small[0])
            counts.append(count)
            if len(batch) == args.batch_size:
                yield torch.stack(batch), counts
                batch, counts, total = [], [], total + sum(counts)
        if batch:
            yield torch.stack(batch), counts
        if not args.add_to:
            clip.times = [int(row * 1000 / fps) for row in range(total + sum(counts))]
        elif Fraction(clip.times[-1], 1000) > clip.end + BEYOND:
            ends = f"go to {clip.times[-1] / 1000:.1f} s, the video to {float(clip.end):.1f} s"
            raise ValueError(f"timestamps_ms of {clip.target} {ends}")
    except Exception as error:  # FFmpeg, Pillow and zipfile have many
        clip.fault = getattr(error, "strerror", None) or first_line(error)


def read_times(path: Path) -> list[int]:
    """``timestamps_ms`` [T] of an NPZ file; ValueError where they cannot be used."""
    import numpy as np

    from accelerando.data.npz import open_npz

    try:
        with open_npz(path) as arrays:
            if "timestamps_ms" not in arrays.names:
                raise ValueError("no array 'timestamps_ms'")
            times = arrays.read("timestamps_ms")
            rows = len(np.atleast_1d(arrays.read("X"))) if "X" in arrays.names else None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or first_line(error)}") from None
    whole = times.ndim == 1 and times.dtype.kind in "iu" and len(times) > 0
    if not whole or times[0] < 0 or (np.diff(times.astype(np.int64)) < 0).any():
        raise ValueError(f"{path}: timestamps_ms are no rising whole numbers from 0 on")
    if rows not in (None, len(times)):
        raise ValueError(f"{path}: {rows} rows of X, but {len(times)} of timestamps_ms")
    return times.tolist()


def decoded(clips: list[Clip], args: Args) -> Iterator[Piece]:
    """Batches of all clips, decoded by ``--num_workers`` threads a little ahead; None instead ends a clip."""
    threads = max(1, args.num_workers // len(clips))  # for one video: more than one decode it

    def pieces() -> Iterator[Piece]:
        for clip in iter(waiting.get, None):
            yield from ((clip, *piece) for piece in read_clip(clip, args, threads))
            yield clip, None, []

    def put(item: Piece | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            for piece in pieces():
                put(piece)
                if stop.is_set():
                    return
        finally:
            put(None)

    waiting: queue.SimpleQueue[Clip | None] = queue.SimpleQueue()
    for clip in [*clips, *[None] * max(1, args.num_workers)]:
        waiting.put(clip)
    if not args.num_workers:
        yield from pieces()
        return
    stop = threading.Event()
    ready: queue.Queue[Piece | None] = queue.Queue(2 * args.num_workers)
    workers = [threading.Thread(target=work) for _ in range(min(args.num_workers, len(clips)))]
    try:
        for worker in workers:
            worker.start()
        for _ in workers:
            yield from iter(ready.get, None)
    finally:
        stop.set()
        for worker in workers:
            worker.join()


# ------------------------------------------------------------------------------------------------------------ model


def find_weights(args: Args) -> Path:
    """The file with the weights, downloaded where need be.

    Raises:
        UserError: no such file, or it cannot be downloaded.
    """
    if args.weights:
        path = Path(args.weights)
        if not path.is_file():
            raise UserError(f"--weights {path}: {'is a folder' if path.is_dir() else 'no such file'}")
        return path
    import socket

    import torch
    from torchvision.models import Inception_V3_Weights

    url = Inception_V3_Weights.DEFAULT.url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if path.is_file():
        return path
    print(f"downloading {url} to {path}", flush=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # of each read, so that a server that does not answer ends the tool
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # RuntimeError: another file than was published
        raise UserError(f"the weights cannot be downloaded ({first_line(error)}): name a copy with --weights") from None
    finally:
        socket.setdefaulttimeout(before)
    return path


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict of :func:`models.checkpoints.read_state` without prefixes and classifiers."""
    try:
        *_, (_, state) = without_prefixes(read_state(path))
    except UserError as error:
        raise UserError(f"--weights {error}") from None
    return {key: value for key, value in state.items() if not key.startswith(("fc.", "AuxLogits."))}


def build_model(weights: Path | None, seed: int, device: torch.device) -> torch.nn.Module:
    """Inception v3 in eval mode, [B, 3, 299, 299] -> [B, 2048]; without ``weights`` random ones that keep the scale.

    Raises:
        UserError: the weights are those of another model.
    """
    import torch
    from torchvision.models import inception_v3

    state = read_weights(weights) if weights else None
    # transform_input belongs to torchvision's weights, though no state dict says so: they were Google's, for inputs
    # from -1 to 1, and the model makes these from ImageNet's normalisation.
    model = inception_v3(weights=None, init_weights=False, aux_logits=False, transform_input=True)
    model.fc = torch.nn.Identity()
    if state is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in model.modules():
                if isinstance(module, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    else:
        lacking = [name for name, _ in model.named_parameters() if name not in state]
        if lacking:
            raise UserError(f"--weights {weights}: not of torchvision's Inception v3 (it has no {lacking[0]})")
        try:
            model.load_state_dict(state)
        except (RuntimeError, AttributeError, TypeError) as error:  # the first line only names the class
            reason = " ".join(str(error).split()).partition(": ")[2][:150]
            raise UserError(f"--weights {weights}: not of torchvision's Inception v3 ({reason})") from None
    return model.eval().to(device, memory_format=torch.channels_last)


def extract(model: torch.nn.Module, frames: torch.Tensor, device: torch.device, amp: str) -> np.ndarray:
    """Features float32 [b, 2048] of frames uint8 [b, 3, 299, 299]; UserError where they are not finite."""
    import numpy as np
    import torch

    from accelerando.data.transforms import normalise

    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
        pixels = normalise(frames.to(device), MEAN, STD).contiguous(memory_format=torch.channels_last)
        features = model(pixels).float().cpu().numpy()
    if not np.isfinite(features).all():
        raise UserError("the model returns NaN: its weights are corrupted")
    return features


# ----------------------------------------------------------------------------------------------------------- output


def settings(clip: Clip, args: Args, digest: str) -> dict[str, Any]:
    """What the features depend on beside the video itself; stands in ``meta``. ``digest`` is that of the weights."""
    found: dict[str, Any] = {"frame_rate_of_frames": args.frame_rate_of_frames} if clip.source.is_dir() else {}
    if not args.add_to:
        found["target_fps"] = int(args.fps) if args.fps == int(args.fps) else args.fps
    found |= {"out_size": SIDE, "feature_extractor": "torchvision inception_v3, pooled", "weights": digest}
    return found | ({"seed": args.seed} if args.random_weights else {}) | {"amp": args.amp}


def is_done(clip: Clip, args: Args, digest: str) -> bool:
    """Whether the features are there; UserError where writing would lose something, or mix two kinds of features."""
    from accelerando.data.npz import open_npz

    path, made = clip.target, None
    if not path.exists():
        return False
    try:
        with open_npz(path) as arrays:
            keys = set(arrays.names)
    except (OSError, ValueError):
        if args.add_to or args.overwrite:  # reading it will name it as damaged, or it is replaced
            return False
        raise UserError(f"{path}: no NPZ file; --overwrite replaces it") from None
    if not args.add_to and (others := sorted(keys - {"X2048", "timestamps_ms", "meta"})):
        raise UserError(f"{path} also holds {', '.join(others)}: --add_to {path.parent} adds features to such files")
    if args.overwrite or "X2048" not in keys:
        return False
    with contextlib.suppress(OSError, ValueError, RecursionError), open_npz(path) as arrays:
        made = json.loads(str(arrays.read("X2048_meta" if args.add_to else "meta")))
    if isinstance(made, dict) and "weights" in made:
        for name, value in settings(clip, args, digest).items():
            if made.get(name) != value:
                difference = f"{name} {made.get(name)!s:.12}, not {value!s:.12}"
                raise UserError(f"{path} was made with {difference}: --overwrite redoes it, or write to another folder")
    return True


def save(clip: Clip, args: Args, digest: str) -> None:
    """Writes the NPZ file whole or not at all; with ``--add_to`` its other members keep their bytes."""
    import numpy as np

    features = np.repeat(np.concatenate(clip.parts), clip.counts, axis=0)
    if len(features) != len(clip.times):
        raise ValueError(f"{len(features)} rows of features for {len(clip.times)} times")
    about = {"video": clip.source.resolve().name, **settings(clip, args, digest)}
    about |= {"frames_read": clip.read, "frames_kept": len(clip.counts)}
    arrays = {"X2048": features, "X2048_meta" if args.add_to else "meta": np.array(json.dumps(about))}
    if not args.add_to:
        arrays["timestamps_ms"] = np.array(clip.times, np.int64)
    with open_whole(clip.target, "wb") as draft, zipfile.ZipFile(draft, "w") as new:
        if args.add_to:
            shutil.copymode(clip.target, draft.name)
            with zipfile.ZipFile(clip.target) as old:
                for member in old.infolist():
                    if member.filename.removesuffix(".npy") not in arrays:
                        new.writestr(member, old.read(member))
        for key, value in arrays.items():  # not compressed: features of floats would be 10% smaller, and slow
            with new.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, value, allow_pickle=False)


def prepare_output(args: Args) -> Path:
    """The folder for the NPZ files; UserError where it cannot be written to."""
    flag, folder = ("--add_to", Path(args.add_to)) if args.add_to else ("--output_dir", Path(args.output_dir or ""))
    try:
        if not args.add_to:
            folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"{flag} {folder}: {'not to be written to' if folder.is_dir() else 'no such folder'}")
    except OSError as error:
        raise UserError(f"{flag} {folder}: {error.strerror}") from None
    return folder


def check_args(args: Args) -> None:
    """UserError for what can be wrong before anything is read."""
    check_ranges(args, fps=(0.001, 1000), frame_rate_of_frames=(0.001, 1000))
    if (args.output_dir is None) == (args.add_to is None):
        raise UserError("give --output_dir (a file for each clip) or --add_to (files that are there), one of them")
    if args.weights and args.random_weights:
        raise UserError("--weights and --random_weights: give one of them")
    if args.add_to and args.fps != Args.fps:
        raise UserError("--fps has no effect with --add_to, which takes the times in each file's timestamps_ms")


def main() -> None:
    args = parse_args(Args, {})
    check_args(args)
    source = Path(args.input)
    clips = find_clips(source, Path(args.add_to or args.output_dir or ""))
    if any(not clip.source.is_dir() for clip in clips):
        try:
            import av  # noqa: F401
        except ImportError:
            raise UserError("reading videos needs PyAV: pip install av") from None
    folder = prepare_output(args)
    if args.add_to and not any(clip.target.is_file() for clip in clips):
        raise UserError(f"--add_to {folder}: no NPZ file of a clip's name in it ({clips[0].target.name} is looked for)")

    from tqdm import tqdm

    quiet_libraries()
    weights = None if args.random_weights else find_weights(args)
    digest = sha256_of(weights) if weights else "random"
    todo = [clip for clip in clips if not is_done(clip, args, digest)]
    skipped = f", {len(clips) - len(todo):,} skipped (done before)" if len(todo) < len(clips) else ""
    if not todo:
        print(f"nothing to do: the features of all {len(clips):,} clips are in {folder} (--overwrite redoes them)")
        return
    device = choose_device(args.device)
    model = build_model(weights, args.seed, device)
    kind = f"weights {weights}" if weights else f"RANDOM weights (seed {args.seed}): an untrained network"
    print(f"Inception v3 on {device.type}, {kind}", flush=True)
    frames = ended = failed = 0
    started = reported = time.perf_counter()
    with progress_bar(len(todo), 0, " clips", "extracting") as bar, contextlib.closing(decoded(todo, args)) as pieces:
        for clip, batch, counts in pieces:
            if batch is not None:
                clip.parts.append(extract(model, batch, device, args.amp))
                clip.counts += counts
                frames += len(batch)
                bar.set_postfix_str(f"{frames:,} frames", refresh=time.perf_counter() - started > 2)
            else:
                if not clip.fault:
                    try:
                        save(clip, args, digest)
                    except (ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                        clip.fault = f"{clip.target}: {first_line(error)}"
                if clip.fault:
                    tqdm.write(one_line(f"failed: {clip.source}: {clip.fault}"), file=sys.stderr)
                ended, failed = ended + 1, failed + bool(clip.fault)
                clip.parts, clip.counts, clip.times = [], [], []
                bar.update()
            if bar.disable and time.perf_counter() - reported > 30:
                reported = time.perf_counter()
                speed = f"{frames:,} frames, {frames / (reported - started):,.1f} frames/s"
                print(f"extracting: {ended:,} of {len(todo):,} clips, {speed}", flush=True)
    speed = frames / (time.perf_counter() - started)
    print(f"{ended - failed:,} clips, {frames:,} frames{skipped}, {speed:,.1f} frames/s: {folder}")
    if failed:
        raise UserError(f"{failed:,} of {len(todo):,} clips failed; they are named above")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the draft is cleared away
    with errors_in_one_line():
        main()
