"""Make the demo's action sets: stick figures in ten actions, drawn by this program, as images and as short videos.

`pairs/` has clean drawings with captions, on which a small CLIP is trained; `actions/` has class folders of other
drawings (thin lines, clutter, colours that were not trained on), a third of them videos, on which it is then tuned.

  python data/make_har_demo.py --output_dir data/demo_har
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from accelerando.base.config import check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import whole_folder, write_text
from accelerando.base.log import with_progress
from accelerando.base.processes import map_in_processes

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

VERSION = 1  # incremented when the drawings change
SIDE = 96  # pixels
DRAWN = 3  # drawn at so many times the size, then reduced: smooth lines
FRAMES = 12  # of a video
RATE = 6  # frames per second
Point = tuple[float, float]


@dataclass
class Args:
    # -- output --
    output_dir: str = "data/demo_har"  # folder to write pairs/ and actions/ to
    pairs: int = 4000  # drawings with captions; a tenth is for validation
    train: int = 20  # samples of each action for training
    validation: int = 20  # the same for validation
    test: int = 40  # the same for the test
    seed: int = 0  # of the drawings
    overwrite: bool = False  # replace a set that was made with other settings
    config: tuple[str, ...] = ()  # YAML files with any of these settings


@dataclass
class Pose:
    """Angles of a figure in degrees from straight down, positive to the right: of upper and lower arms and legs; of the
    torso from straight up; where the hip is, in shares of the image."""

    torso: float = 0.0
    arms: tuple[tuple[float, float], tuple[float, float]] = ((-12, -8), (12, 8))
    legs: tuple[tuple[float, float], tuple[float, float]] = ((-7, -5), (7, 5))
    hip: Point = (0.5, 0.58)
    prop: str = ""


def swing(phase: float, size: float) -> float:
    return size * math.sin(2 * math.pi * phase)


def standing(phase: float) -> Pose:
    return Pose(torso=swing(phase, 2))


def waving(phase: float) -> Pose:
    return Pose(arms=((-12, -8), (150, 165 + swing(phase, 28))))


def jumping(phase: float) -> Pose:
    up = abs(math.sin(2 * math.pi * phase))
    return Pose(arms=((-140, -160), (140, 160)), legs=((-32, -20), (32, 20)), hip=(0.5, 0.56 - 0.1 * up))


def running(phase: float) -> Pose:
    a, b = swing(phase, 42), swing(phase + 0.5, 42)
    return Pose(torso=14, arms=((b, b + 80), (a, a + 80)), legs=((a, a - 45), (b, b - 25)))


def sitting(phase: float) -> Pose:
    return Pose(torso=-4 + swing(phase, 3), arms=((20, 50), (26, 60)), legs=((82, 4), (86, 8)), hip=(0.44, 0.66),
                prop="chair")  # fmt: skip


def lying(phase: float) -> Pose:
    return Pose(torso=-88, arms=((80, 84), (96, 92)), legs=((86, 88), (92, 94 + swing(phase, 6))), hip=(0.52, 0.84))


def kicking(phase: float) -> Pose:
    kick = 35 + 45 * abs(math.sin(math.pi * phase))
    return Pose(torso=-12, arms=((-50, -40), (50, 40)), legs=((-6, -4), (kick, kick + 4)), prop="ball")


def lifting(phase: float) -> Pose:
    high = 150 + swing(phase, 22)
    return Pose(arms=((-high, -172), (high, 172)), legs=((-22, -4), (22, 4)), prop="barbell")


def climbing(phase: float) -> Pose:
    a, b = 130 + swing(phase, 22), 130 + swing(phase + 0.5, 22)
    legs = ((50 - swing(phase, 22), -10), (30, -14))
    return Pose(torso=6, arms=((a, a + 20), (b, b + 20)), legs=legs, hip=(0.47, 0.58), prop="ladder")


def cycling(phase: float) -> Pose:
    a, b = 45 + swing(phase, 26), 45 + swing(phase + 0.5, 26)
    return Pose(torso=34, arms=((48, 70), (52, 74)), legs=((a, a - 58), (b, b - 58)), hip=(0.42, 0.54), prop="bicycle")


ACTIONS: dict[str, Callable[[float], Pose]] = {
    "climbing a ladder": climbing,
    "cycling": cycling,
    "jumping": jumping,
    "kicking a ball": kicking,
    "lifting a barbell": lifting,
    "lying down": lying,
    "running": running,
    "sitting on a chair": sitting,
    "standing still": standing,
    "waving a hand": waving,
}
COLOURS = {"red": (200, 40, 40), "blue": (40, 70, 200), "green": (30, 140, 50), "black": (25, 25, 25)}
OTHER_COLOURS = ((150, 60, 160), (200, 120, 20), (20, 140, 150), (120, 80, 50))
CAPTIONS = ("a drawing of a person {}", "a {} person is {}", "someone {}", "a {} stick figure {}", "a person {} alone")


# ------------------------------------------------------------------------------------------------------------ drawing


@dataclass(frozen=True)
class Look:
    """How a figure is drawn: colours, width of its lines, size, place, clutter; ``jitter`` is added to its angles."""

    ink: tuple[int, int, int]
    paper: tuple[int, int, int]
    width: float
    size: float
    shift: Point
    mirrored: bool
    clutter: int
    noise: float
    jitter: tuple[float, ...]
    seed: int


def clean_look(rng: random.Random, ink: tuple[int, int, int]) -> Look:
    """Thick lines on pale paper, with hardly anything behind them."""
    paper = tuple(rng.randint(205, 255) for _ in range(3))
    shift = (rng.uniform(-0.07, 0.07), rng.uniform(-0.04, 0.03))
    jitter = tuple(rng.gauss(0, 5) for _ in range(9))
    return Look(ink, paper, rng.uniform(0.03, 0.05), rng.uniform(0.85, 1.1), shift, rng.random() < 0.5,
                rng.randint(0, 1), 5, jitter, rng.getrandbits(30))  # fmt: skip


def wild_look(rng: random.Random) -> Look:
    """Thinner lines of other colours on darker paper, with clutter and grain."""
    paper = tuple(rng.randint(170, 240) for _ in range(3))
    shift = (rng.uniform(-0.09, 0.09), rng.uniform(-0.05, 0.04))
    jitter = tuple(rng.gauss(0, 7) for _ in range(9))
    return Look(rng.choice(OTHER_COLOURS), paper, rng.uniform(0.025, 0.038), rng.uniform(0.8, 1.05), shift,
                rng.random() < 0.5, rng.randint(2, 4), 9, jitter, rng.getrandbits(30))  # fmt: skip


def draw(action: str, phase: float, look: Look) -> Image.Image:
    """One drawing of an action at a ``phase`` of its movement, 0 to 1."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageOps

    pose, side = ACTIONS[action](phase), SIDE * DRAWN
    image = Image.new("RGB", (side, side), look.paper)
    canvas = ImageDraw.Draw(image)
    rng = random.Random(look.seed)
    for _ in range(look.clutter):
        clutter(canvas, rng, side)
    figure(canvas, pose, look, side)
    image = ImageOps.mirror(image) if look.mirrored else image
    image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    grain = np.random.default_rng([look.seed, round(phase * 1000)]).normal(0, look.noise, (SIDE, SIDE, 1))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def clutter(canvas: ImageDraw.ImageDraw, rng: random.Random, side: int) -> None:
    """A pale shape behind the figure."""
    colour = tuple(rng.randint(120, 240) for _ in range(3))
    x, y, size = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.05, 0.22) * side
    box = (x - size, y - size * rng.uniform(0.3, 1), x + size, y + size * 0.5)
    if rng.random() < 0.4:
        canvas.ellipse(box, fill=colour)
    elif rng.random() < 0.6:
        canvas.rectangle(box, fill=colour)
    else:
        canvas.line(box, fill=colour, width=round(side * 0.015))


def figure(canvas: ImageDraw.ImageDraw, pose: Pose, look: Look, side: int) -> None:
    """Draws the figure and what belongs to its action."""
    scale, width = look.size * side, max(1, round(look.width * side))
    hip = ((pose.hip[0] + look.shift[0]) * side, (pose.hip[1] + look.shift[1]) * side)
    turns = iter(look.jitter)

    def limb(start: Point, angle: float, length: float) -> Point:
        turned = math.radians(angle + next(turns))
        end = (start[0] + math.sin(turned) * length * scale, start[1] + math.cos(turned) * length * scale)
        canvas.line((*start, *end), fill=look.ink, width=width)
        radius = width / 2
        for x, y in (start, end):
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=look.ink)
        return end

    neck = limb(hip, 180 - pose.torso, 0.24)
    hands = [limb(limb(neck, upper, 0.13), lower, 0.13) for upper, lower in pose.arms]
    feet = [limb(limb(hip, upper, 0.15), lower, 0.15) for upper, lower in pose.legs]
    tilt, radius = math.radians(pose.torso), 0.065 * scale
    head = (neck[0] + math.sin(tilt) * radius, neck[1] - math.cos(tilt) * radius)
    canvas.ellipse((head[0] - radius, head[1] - radius, head[0] + radius, head[1] + radius), fill=look.ink)
    thin = max(1, round(width * 0.7))
    if pose.prop == "chair":
        x, y = hip
        seat = 0.13 * scale
        canvas.line((x - seat * 0.8, y + width, x + seat, y + width), fill=look.ink, width=thin)
        canvas.line((x - seat * 0.8, y - 0.2 * scale, x - seat * 0.8, y + 0.19 * scale), fill=look.ink, width=thin)
        canvas.line((x + seat, y, x + seat, y + 0.19 * scale), fill=look.ink, width=thin)
    elif pose.prop == "ball":
        x, y = feet[1]
        size = 0.055 * scale
        canvas.ellipse((x + size, y - size, x + 3 * size, y + size), outline=look.ink, width=thin)
    elif pose.prop == "barbell":
        (x1, y1), (x2, y2) = sorted(hands)
        canvas.line((x1 - 0.14 * scale, y1, x2 + 0.14 * scale, y2), fill=look.ink, width=thin)
        for x, y in ((x1 - 0.14 * scale, y1), (x2 + 0.14 * scale, y2)):
            canvas.line((x, y - 0.08 * scale, x, y + 0.08 * scale), fill=look.ink, width=2 * thin)
    elif pose.prop == "ladder":
        x = hip[0] + 0.2 * scale
        for rail in (x, x + 0.14 * scale):
            canvas.line((rail, 0.04 * side, rail, 0.96 * side), fill=look.ink, width=thin)
        for step in range(8):
            y = (0.1 + 0.11 * step) * side
            canvas.line((x, y, x + 0.14 * scale, y), fill=look.ink, width=thin)
    elif pose.prop == "bicycle":
        size, y = 0.13 * scale, hip[1] + 0.26 * scale
        for x in (hip[0] - 0.12 * scale, hip[0] + 0.26 * scale):
            canvas.ellipse((x - size, y - size, x + size, y + size), outline=look.ink, width=thin)
        canvas.line((hip[0] - 0.12 * scale, y, *hip, hip[0] + 0.26 * scale, y), fill=look.ink, width=thin)


def video(path: Path, action: str, start: float, look: Look) -> bytes:
    """A video of one or two movements, as an MP4."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.bit_rate = "yuv420p", 600_000
        for number in range(FRAMES):
            frame = av.VideoFrame.from_image(draw(action, (start + number / (FRAMES - 1)) % 1, look))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


# -------------------------------------------------------------------------------------------------------------- sets


def make_sample(folder: Path, sample: tuple[str, str, bool, int]) -> None:
    """Writes one sample of ``actions/``: (name without suffix, action, whether it is a video, seed)."""
    name, action, moves, seed = sample
    rng = random.Random(seed)
    look, phase = wild_look(rng), rng.random()
    path = folder / name
    if moves:
        path.with_suffix(".mp4").write_bytes(video(path, action, phase, look))
    else:
        draw(action, phase, look).save(path.with_suffix(".png"))


def make_pair(folder: Path, pair: tuple[str, str, str, int]) -> None:
    """Writes one image of ``pairs/``: (name, action, colour, seed)."""
    name, action, colour, seed = pair
    rng = random.Random(seed)
    draw(action, rng.random(), clean_look(rng, COLOURS[colour])).save(folder / name)


def make(args: Args, folder: Path) -> None:
    """Writes the whole set into ``folder``."""
    import os

    rng, cores = random.Random(args.seed), len(os.sched_getaffinity(0))
    pairs, rows = [], []
    for number in range(args.pairs):
        split = "validation" if number % 10 == 0 else "train"
        action, colour = rng.choice(list(ACTIONS)), rng.choice(list(COLOURS))
        template = rng.choice(CAPTIONS)
        words = (colour, action) if template.count("{}") == 2 else (action,)
        pairs.append((f"{number:05}.png", action, colour, rng.getrandbits(30)))
        rows.append((split, f"{number:05}.png", template.format(*words)))
    (folder / "pairs").mkdir(parents=True)
    for split in ("train", "validation"):
        with (folder / "pairs" / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("image", "caption"))
            writer.writerows(row[1:] for row in rows if row[0] == split)
    samples = []
    for split, count in (("train", args.train), ("val", args.validation), ("test", args.test)):
        for action in ACTIONS:
            place = f"actions/{split}/{action.replace(' ', '_')}"
            (folder / place).mkdir(parents=True)
            samples += [
                (f"{place}/{number:03}", action, number % 3 == 2, rng.getrandbits(30)) for number in range(count)
            ]
    drawn = map_in_processes(partial(make_pair, folder / "pairs"), pairs, cores)
    list(with_progress(drawn, len(pairs), "drawing pairs", "images"))
    drawn = map_in_processes(partial(make_sample, folder), samples, cores)
    list(with_progress(drawn, len(samples), "drawing actions", "samples"))
    write_text(folder / "made_with.json", json.dumps(settings(args), indent=2) + "\n")


def settings(args: Args) -> dict[str, int | str]:
    """What the set depends on."""
    numbers = {name: getattr(args, name) for name in ("pairs", "train", "validation", "test", "seed")}
    return {"maker": "make_har_demo.py", "version": VERSION, **numbers}


def main() -> None:
    args = parse_args(Args)
    check_ranges(args, pairs=(20, 10**6), train=(1, 10**5), validation=(1, 10**5), test=(1, 10**5))
    folder = Path(args.output_dir)
    before = folder / "made_with.json"
    if folder.exists() and not args.overwrite:
        if before.is_file() and json.loads(before.read_text()) == settings(args):
            print(f"{folder} is there already")
            return
        raise UserError(f"{folder} exists and was made otherwise: add --overwrite or name another --output_dir")
    with whole_folder(folder) as draft:
        make(args, draft)
    count = len(ACTIONS) * (args.train + args.validation + args.test)
    print(f"{folder}: {args.pairs:,} pairs, {count:,} samples of {len(ACTIONS)} actions, a third of them videos")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
