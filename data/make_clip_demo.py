"""Make the demo's image set: furniture drawn by this program, each image with a caption of its properties.

Each combination of properties is in one split only: retrieval on the test split asks for combinations never trained on.

  python data/make_clip_demo.py --output_dir data/demo_clip
"""

from __future__ import annotations

import collections
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from accelerando.base.config import check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import whole_folder
from accelerando.base.log import with_progress
from accelerando.base.processes import map_in_processes

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageDraw

VERSION = 1  # incremented when the same arguments draw other images
OVERSAMPLING = 3

Color = tuple[int, int, int]
Range = tuple[float, float]

COLORS: dict[str, Color] = {
    "red": (192, 38, 42), "orange": (232, 126, 32), "yellow": (236, 202, 52), "green": (58, 132, 68),
    "blue": (44, 88, 176), "purple": (116, 58, 156), "pink": (236, 146, 178), "brown": (118, 74, 42),
    "black": (44, 43, 46), "white": (236, 235, 230),
}  # fmt: skip
ADJECTIVES = {"wood": "wooden", "metal": "metal", "leather": "leather", "fabric": "fabric", "glass": "glass"}
SIZES = ("small", "large")
POSITIONS = {"left": "on the left", "centre": "in the centre", "right": "on the right"}
BACKGROUNDS = {
    "white studio": "in a white studio",
    "grey wall": "in front of a grey wall",
    "striped wallpaper": "in front of striped wallpaper",
    "brick wall": "in front of a brick wall",
    "wooden floor": "on a wooden floor",
    "carpet": "on a patterned carpet",
}
TEMPLATES = (
    "a {size} {color} {adjective} {kind} {position}, {background}",
    "a {size} {adjective} {kind} in {color}, standing {position} {background}",
    "a picture of a {size} {color} {kind} of {material} {position}, {background}",
    "{background} stands a {size} {color} {kind} made of {material}, placed {position}",
    "{position}, {background}: a {size} {kind} in {color} {material}",
    "the {kind} {position} is {size}, {color} and made of {material}, {background}",
    "this {color} {adjective} {kind} is {size} and stands {position}, {background}",
    "furniture for the home: a {size} {color} {adjective} {kind} {position} {background}",
)
COLUMNS = ("image", "caption", "kind", "material", "color", "size", "background", "position", "split")


@dataclass
class Args:
    # -- output --
    output_dir: str = "data/demo_clip"  # folder to write captions.csv and images/ to
    count: int = 4000  # images; a tenth each for validation and for test
    seed: int = 42  # of the properties, the images, the captions and the split
    size: int = 96  # side of an image in pixels
    num_workers: int | None = None  # processes that draw, default one for each core; the images are the same
    config: tuple[str, ...] = ()  # YAML files with any of these settings


class Paint(NamedTuple):
    """What a part is made of: colour, name of a texture, opacity."""

    color: Color
    texture: str = ""
    alpha: int = 255


class Part(NamedTuple):
    """A box, or with more sides a round prism, narrower at the top by ``taper``; ``soft`` rounds its outline."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    paint: Paint
    sides: int
    taper: float
    soft: float


class Piece:
    """A piece of furniture as parts: x to the right, y away from the viewer, z up, the floor at 0."""

    def __init__(self, rng: random.Random, main: Paint, trim: Paint) -> None:
        self.rng, self.main, self.trim = rng, main, trim
        self.dark = main._replace(color=shaded(main.color, 0.62), alpha=255)
        self.padded = main.texture in ("leather", "fabric")
        self.parts: list[Part] = []

    def add(
        self, x: Range, y: Range, z: Range, paint: Paint | None = None,
        sides: int = 4, taper: float = 1, soft: float = 0,
    ) -> None:  # fmt: skip
        self.parts.append(Part((x[0], y[0], z[0]), (x[1], y[1], z[1]), paint or self.main, sides, taper, soft))

    def legs(self, width: float, depth: float, height: float, thick: float, paint: Paint, sides: int = 4) -> None:
        for x, y in itertools.product((-1, 1), (1, -1)):
            a, b = x * (width - thick) / 2, y * (depth - thick) / 2
            t = thick / 2
            self.add((a - t, a + t), (b - t, b + t), (0, height), paint, sides)

    def dots(self, x: Range, y: float, z: Range, columns: int, rows: int, paint: Paint, size: float = 0.08) -> None:
        """Buttons or knobs on a front at depth ``y``."""
        for column, row in itertools.product(range(columns), range(rows)):
            a = x[0] + (x[1] - x[0]) * (column + 0.5) / columns
            b = z[0] + (z[1] - z[0]) * (row + 0.5) / rows
            self.add((a - size / 2, a + size / 2), (y - 0.03, y), (b - size / 2, b + size / 2), paint)

    def fronts(self, x: Range, y: float, z: Range, columns: int, rows: int, paint: Paint) -> None:
        """Doors or drawers on a front at depth ``y``, a handle on each."""
        width, height = (x[1] - x[0]) / columns, (z[1] - z[0]) / rows
        for column, row in itertools.product(range(columns), range(rows)):
            a, b = x[0] + column * width, z[0] + row * height
            self.add((a + 0.03, a + width - 0.03), (y - 0.05, y), (b + 0.03, b + height - 0.03), paint)
            if width > height:  # a drawer
                handle, rise = (a + width * 0.36, a + width * 0.64), (b + height * 0.5, b + height * 0.62)
            else:  # a door opens from the middle of the piece
                edge = a + width - 0.15 if column % 2 == 0 and columns > 1 else a + 0.1
                handle, rise = (edge, edge + 0.06), (b + height * 0.4, b + height * 0.62)
            self.add(handle, (y - 0.1, y - 0.05), rise, self.trim)


def chair(p: Piece) -> None:
    width, depth, seat = p.rng.uniform(0.9, 1.1), p.rng.uniform(0.85, 1), p.rng.uniform(0.85, 1)
    top = seat + p.rng.uniform(0.95, 1.25)
    frame = p.trim if p.padded else p.main
    thick = 0.07 if frame.texture == "metal" else 0.12
    w, d = width / 2, depth / 2
    p.legs(width, depth, seat, thick, frame)
    p.add((-w, w), (-d, d), (seat, seat + (0.2 if p.padded else 0.1)), soft=0.02 if p.padded else 0)
    seat += 0.2 if p.padded else 0.1
    if p.padded:
        p.add((-w, w), (d - 0.16, d), (seat + 0.12, top), soft=0.03)
        for x in (-w + 0.1, w - 0.2):
            p.add((x, x + 0.1), (d - 0.12, d), (seat, seat + 0.12), frame)
        return
    for x in (-w, w - thick):
        p.add((x, x + thick), (d - thick, d), (seat, top))
    if p.rng.random() < 0.5:  # slats across
        for step in range(3):
            z = top - 0.16 - step * (top - seat) * 0.3
            p.add((-w + thick, w - thick), (d - 0.08, d - 0.02), (z, z + 0.15))
    else:  # spindles
        p.add((-w + thick, w - thick), (d - thick, d), (top - 0.2, top))
        for step in range(4):
            x = -w + thick + (step + 0.6) * (width - 2 * thick) / 4.4
            p.add((x - 0.03, x + 0.03), (d - 0.08, d - 0.02), (seat, top - 0.2))


def seating(p: Piece, seats: int, wide: float, back: float) -> None:
    """Armchair and sofa: arms, a back and ``seats`` cushions."""
    width, depth, foot = seats * wide, p.rng.uniform(1, 1.15), p.rng.uniform(0.12, 0.28)
    arm, seat, arm_top = p.rng.uniform(0.18, 0.26), foot + 0.3, foot + p.rng.uniform(0.68, 0.82)
    w, d = width / 2, depth / 2
    p.legs(width + arm, depth - 0.1, foot, 0.14, p.trim)
    p.add((-w, w), (-d, d), (foot, seat), p.dark)
    p.add((-w - arm * 0.6, w + arm * 0.6), (d - 0.25, d), (seat, foot + back), soft=0.04)
    for index in range(seats):
        x = -w + index * wide
        p.add((x + 0.03, x + wide - 0.03), (-d - 0.03, d - 0.28), (seat, seat + 0.2), soft=0.03)
        if p.main.texture == "leather":
            p.dots((x + 0.05, x + wide - 0.05), d - 0.25, (seat + 0.25, foot + back), 3, 2, p.dark)
        else:
            p.add((x + 0.06, x + wide - 0.06), (d - 0.4, d - 0.28), (seat + 0.24, foot + back - 0.08), soft=0.03)
    for x in (-w - arm, w):
        p.add((x, x + arm), (-d, d - 0.25), (foot, arm_top), soft=0.03)


def armchair(p: Piece) -> None:
    seating(p, 1, p.rng.uniform(0.8, 0.95), p.rng.uniform(1.25, 1.6))


def sofa(p: Piece) -> None:
    seating(p, p.rng.choice((2, 3, 3)), p.rng.uniform(0.85, 1), p.rng.uniform(0.95, 1.1))


def table(p: Piece) -> None:
    width, depth, height = p.rng.uniform(2, 2.6), p.rng.uniform(1.2, 1.5), p.rng.uniform(1.05, 1.3)
    w, d = width / 2, depth / 2
    leg = p.dark if p.main.alpha < 255 else p.main
    if p.rng.random() < 0.4:  # round, on one foot
        p.add((-d * 0.6, d * 0.6), (-d * 0.6, d * 0.6), (0, 0.1), leg, 16, 0.8)
        p.add((-0.12, 0.12), (-0.12, 0.12), (0.1, height), leg, 10)
        p.add((-d * 1.4, d * 1.4), (-d * 1.4, d * 1.4), (height, height + 0.1), sides=20)
        return
    p.legs(width - 0.1, depth - 0.1, height, 0.1 if leg.texture == "metal" else 0.16, leg)
    if p.main.alpha == 255:
        p.add((-w + 0.2, w - 0.2), (-d + 0.1, d - 0.1), (height - 0.18, height), p.dark)
    p.add((-w, w), (-d, d), (height, height + 0.1))


def desk(p: Piece) -> None:
    width, depth, height = p.rng.uniform(2.2, 2.7), p.rng.uniform(1, 1.2), p.rng.uniform(1.15, 1.3)
    w, d, drawers = width / 2, depth / 2, p.rng.uniform(0.65, 0.8)
    solid = p.main._replace(alpha=255)
    sides = [(w - drawers, w - 0.06)] if p.rng.random() < 0.6 else [(w - drawers, w - 0.06), (-w + 0.06, drawers - w)]
    for x in sides:
        p.add(x, (-d + 0.08, d - 0.05), (0, height), p.dark)
        p.fronts(x, -d + 0.08, (0.06, height), 1, 3, solid)
    if len(sides) == 1:
        p.add((-w + 0.06, -w + 0.18), (-d + 0.08, d - 0.05), (0, height), solid)
    p.add((-w + 0.2, w - drawers), (d - 0.12, d - 0.05), (height * 0.45, height), p.dark)
    p.add((-w, w), (-d, d), (height, height + 0.1))


def bed(p: Piece) -> None:
    width, length, rail = p.rng.uniform(1.5, 2), p.rng.uniform(2.1, 2.4), p.rng.uniform(0.35, 0.5)
    w, d, head = width / 2, length / 2, p.rng.uniform(1.1, 1.5)
    linen = Paint(p.rng.choice(((240, 238, 232), (226, 220, 208), (205, 212, 218))))
    soft = 0.03 if p.padded else 0
    p.add((-w - 0.08, w + 0.08), (d, d + 0.14), (0, head), soft=soft)
    if p.padded:
        p.dots((-w, w), d, (rail + 0.35, head), 4, 2, p.dark)
    p.add((-w, w), (-d, d), (0.12, rail))
    p.add((-w + 0.05, w - 0.05), (-d + 0.02, d), (rail, rail + 0.2), linen, soft=0.03)
    p.add((-w, w), (-d, d * 0.25), (rail + 0.2, rail + 0.28), Paint(shaded(linen.color, 0.9)), soft=0.03)
    for x in (-w + 0.12, 0.06):
        p.add((x, x + w - 0.18), (d * 0.5, d - 0.1), (rail + 0.2, rail + 0.36), Paint((250, 250, 248)), soft=0.05)
    p.add((-w - 0.08, w + 0.08), (-d - 0.12, -d), (0, rail + p.rng.uniform(0.05, 0.3)), soft=soft)


def wardrobe(p: Piece) -> None:
    doors = p.rng.choice((2, 2, 3))
    width, depth, height = doors * p.rng.uniform(0.62, 0.75), 0.7, p.rng.uniform(2.3, 2.7)
    w, d, drawer = width / 2, depth / 2, p.rng.choice((0, 0.45))
    p.legs(width, depth, 0.14, 0.14, p.dark)
    p.add((-w, w), (-d, d), (0.14, height), p.dark)
    p.fronts((-w, w), -d, (0.2 + drawer, height - 0.04), doors, 1, p.main)
    if drawer:
        p.fronts((-w, w), -d, (0.18, 0.2 + drawer), 1, 1, p.main)
    p.add((-w - 0.07, w + 0.07), (-d - 0.1, d), (height, height + 0.1))


def bookshelf(p: Piece) -> None:
    width, depth, shelves = p.rng.uniform(1.2, 1.7), 0.5, p.rng.choice((3, 4, 4))
    height, w, d = shelves * p.rng.uniform(0.5, 0.6), width / 2, depth / 2
    p.add((-w, w), (d - 0.04, d), (0, height), p.dark)
    for x in (-w, w - 0.09):
        p.add((x, x + 0.09), (-d, d - 0.04), (0, height))
    step = (height - 0.09) / shelves
    for index in range(shelves + 1):
        z = index * step
        p.add((-w + 0.09, w - 0.09), (-d, d - 0.04), (z, z + 0.09))
        x = -w + 0.1
        while index < shelves:
            thick = p.rng.uniform(0.08, 0.15)
            if x + thick > w - 0.12 - 0.3 * (index % 2):
                break
            # Pale and dull: the colour that the caption names is the shelf's.
            tone = p.rng.choice(((222, 214, 196), (186, 172, 150), (140, 134, 130), (206, 200, 196), (104, 98, 96)))
            tall = (step - 0.09) * p.rng.uniform(0.6, 0.92)
            if p.rng.random() < 0.92:
                p.add((x, x + thick), (-d + 0.1, d - 0.06), (z + 0.09, z + 0.09 + tall), Paint(tone))
            x += thick


def lamp(p: Piece) -> None:
    pole, radius, shade = p.rng.uniform(0.9, 1.9), p.rng.uniform(0.42, 0.55), p.rng.uniform(0.5, 0.7)
    stem = p.main._replace(alpha=255) if p.main.texture == "metal" else p.trim
    foot = radius * p.rng.uniform(0.55, 0.8)
    p.add((-foot, foot), (-foot, foot), (0, 0.09), stem, 16, 0.85)
    p.add((-0.05, 0.05), (-0.05, 0.05), (0.09, pole + 0.1), stem, 8)
    if p.main.alpha < 255:
        p.add((-0.15, 0.15), (-0.15, 0.15), (pole + 0.1, pole + 0.4), Paint((255, 244, 190)), 10, 0.7, 0.03)
    else:  # the light that falls out at the lower edge
        p.add((-radius, radius), (-radius, radius), (pole - 0.03, pole), Paint((255, 240, 190)), 20)
    p.add((-radius, radius), (-radius, radius), (pole, pole + shade), sides=20, taper=p.rng.uniform(0.45, 0.75))


def stool(p: Piece) -> None:
    width, height = p.rng.uniform(0.85, 1.05), p.rng.uniform(1, 1.5)
    frame, w = p.trim if p.padded else p.main, width / 2
    thick = 0.08 if frame.texture == "metal" else 0.12
    p.legs(width * 0.8, width * 0.8, height, thick, frame)
    reach, rung = width * 0.4 - thick, height * p.rng.uniform(0.25, 0.4)
    for y in (-width * 0.4, width * 0.4 - thick):
        p.add((-reach, reach), (y + 0.02, y + thick - 0.02), (rung, rung + 0.07), frame)
    for x in (-width * 0.4, width * 0.4 - thick):
        p.add((x + 0.02, x + thick - 0.02), (-reach, reach), (rung, rung + 0.07), frame)
    p.add((-w, w), (-w, w), (height, height + (0.24 if p.padded else 0.12)), sides=20, soft=0.03 if p.padded else 0)


def cabinet(p: Piece) -> None:
    width, depth, height = p.rng.uniform(1.8, 2.3), 0.7, p.rng.uniform(0.95, 1.3)
    w, d, foot, doors = width / 2, depth / 2, p.rng.uniform(0.15, 0.35), p.rng.choice((2, 3))
    p.legs(width - 0.1, depth, foot, 0.12, p.trim)
    if p.main.alpha < 255:  # glass doors before a pale inside with one shelf
        p.add((-w, w), (-d, d), (foot, height), p.dark)
        inside = Paint((226, 222, 214))
        for z in (foot + 0.06, (foot + height) / 2 + 0.03):
            p.add((-w + 0.08, w - 0.08), (-d - 0.01, -d), (z, z + (height - foot) / 2 - 0.12), inside)
        p.fronts((-w, w), -d - 0.01, (foot, height), doors, 1, p.main)
    else:
        p.add((-w, w), (-d, d), (foot, height), p.dark)
        split = foot + (height - foot) * p.rng.choice((0, 0.6))
        if split > foot:
            p.fronts((-w, w), -d, (foot, split), doors, 1, p.main)
        p.fronts((-w, w), -d, (split, height), 2, 1 if split > foot else 3, p.main)
    p.add((-w - 0.05, w + 0.05), (-d - 0.1, d), (height, height + 0.09), p.main._replace(alpha=255))


def bench(p: Piece) -> None:
    width, depth, seat = p.rng.uniform(2.4, 3), p.rng.uniform(0.75, 0.9), p.rng.uniform(0.6, 0.75)
    w, d = width / 2, depth / 2
    if p.padded:
        p.legs(width - 0.2, depth, seat, 0.12, p.trim)
        p.add((-w, w), (-d, d), (seat, seat + 0.25), soft=0.04)
        p.dots((-w, w), -d - 0.03, (seat, seat + 0.25), 6, 1, p.dark, 0.1)
        return
    for x in (-w + 0.2, w - 0.34):
        p.add((x, x + 0.14), (-d, -d + 0.14), (0, seat), p.dark)
        p.add((x, x + 0.14), (d - 0.14, d), (0, seat + 0.8), p.dark)
    for index in range(4):
        y = -d + index * (depth - 0.14) / 4
        p.add((-w, w), (y, y + (depth - 0.14) / 4 - 0.04), (seat, seat + 0.09))
    for index in range(3):
        z = seat + 0.18 + index * 0.22
        p.add((-w, w), (d - 0.22, d - 0.15), (z, z + 0.17))


KINDS: dict[str, tuple[Callable[[Piece], None], tuple[str, ...]]] = {
    "chair": (chair, ("wood", "metal", "leather", "fabric")),
    "armchair": (armchair, ("leather", "fabric")),
    "sofa": (sofa, ("leather", "fabric")),
    "table": (table, ("wood", "metal", "glass")),
    "desk": (desk, ("wood", "metal", "glass")),
    "bed": (bed, ("wood", "metal", "leather", "fabric")),
    "wardrobe": (wardrobe, ("wood", "metal")),
    "bookshelf": (bookshelf, ("wood", "metal")),
    "lamp": (lamp, ("metal", "fabric", "glass")),
    "stool": (stool, ("wood", "metal", "leather", "fabric")),
    "cabinet": (cabinet, ("wood", "metal", "glass")),
    "bench": (bench, ("wood", "metal", "leather")),
}


def shaded(color: Color, factor: float) -> Color:
    """Darker below 1, towards white above."""
    if factor <= 1:
        return (int(color[0] * factor), int(color[1] * factor), int(color[2] * factor))
    red, green, blue = (int(value + (255 - value) * min(factor - 1, 1)) for value in color)
    return (red, green, blue)


@functools.lru_cache(maxsize=2)
def textures(side: int) -> dict[str, Image.Image]:
    """Textures twice as large as the canvas, of which each image cuts its own pieces; 128 leaves a colour alone."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    full, unit = 2 * side, side / 288
    y, x = np.mgrid[:full, :full] / unit

    def clouds(across: int, down: int) -> np.ndarray:
        small = Image.fromarray(rng.random((down, across)).astype(np.float32) * 2 - 1)
        return np.asarray(small.resize((full, full), Image.Resampling.BICUBIC))

    grain = np.sin(y / 1.8 + 5 * clouds(4, 10)) * 17 + 20 * clouds(10, full // 3)
    values = {
        "wood": grain,
        "upright wood": grain.T,
        "metal": 44 * np.sin((x + 0.7 * y) / 19 + 2 * clouds(6, 6)) + 8 * clouds(8, full // 2),
        "leather": 40 * clouds(14, 14) * clouds(9, 9) + 16 * clouds(110, 110) + 6,
        "fabric": 16 * np.sign(np.sin(x * 0.72) * np.sin(y * 0.72)) + 12 * clouds(full // 3, full // 3),
        "glass": np.where(np.sin((x + y) / 26 + clouds(4, 4)) > 0.55, 62, 4),
        "carpet": 22 * clouds(full // 4, full // 4),
    }
    gray = {name: Image.fromarray(np.clip(128 + value, 0, 255).astype(np.uint8)) for name, value in values.items()}
    return {name: Image.merge("RGB", [image] * 3) for name, image in gray.items()}


@functools.lru_cache(maxsize=2)
def camera_noise(size: int) -> np.ndarray:
    """Noise int16 [2 size, 2 size, 3], of which each image cuts its own piece."""
    import numpy as np

    return np.random.default_rng(1).normal(0, 3, (2 * size, 2 * size, 3)).round().astype(np.int16)


def add_texture(canvas: Image.Image, name: str, mask: Image.Image, rng: random.Random) -> None:
    """Lays a piece of a texture over what ``mask`` marks."""
    from PIL import ImageChops

    box = mask.getbbox()
    if box is None:
        return
    x, y = rng.randrange(canvas.width), rng.randrange(canvas.height)
    piece = textures(canvas.width)[name].crop((x + box[0], y + box[1], x + box[2], y + box[3]))
    canvas.paste(ImageChops.hard_light(canvas.crop(box), piece), box[:2], mask.crop(box))


def draw_background(name: str, side: int, horizon: int, rng: random.Random) -> Image.Image:
    """Wall and floor, the floor from row ``horizon`` down."""
    from PIL import Image, ImageDraw

    unit, light = side / 288, rng.uniform(0.92, 1.04)
    pale = rng.choice(((226, 219, 205), (214, 220, 222), (222, 214, 214), (218, 222, 208)))
    paper = rng.choice(((222, 206, 182), (196, 212, 204), (220, 200, 204), (198, 206, 222)))
    wall, floor = {
        "white studio": ((244, 244, 243), (236, 236, 235)),
        "grey wall": ((146, 148, 152), (196, 194, 190)),
        "striped wallpaper": (paper, (206, 196, 180)),
        "brick wall": ((202, 190, 178), (168, 164, 160)),
        "wooden floor": (pale, rng.choice(((188, 142, 92), (160, 112, 70), (206, 164, 114)))),
        "carpet": (pale, (200, 192, 182)),
    }[name]
    wall, floor = shaded(wall, light), shaded(floor, light)
    canvas = Image.new("RGB", (side, side), wall)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, horizon, side, side), floor)
    if name == "white studio":  # no edge between wall and floor
        band = round(36 * unit)
        for row in range(-band, band):
            share = (row + band) / (2 * band)
            mixed = tuple(round(a + (b - a) * share) for a, b in zip(wall, floor, strict=True))
            draw.line((0, horizon + row, side, horizon + row), mixed)
        return canvas
    if name == "striped wallpaper":
        stripe = rng.uniform(11, 17) * unit
        for index in range(math.ceil(side / stripe / 2)):
            draw.rectangle((2 * index * stripe, 0, (2 * index + 1) * stripe, horizon), shaded(wall, 0.84))
    elif name == "brick wall":
        width, height, start = 40 * unit, 17 * unit, rng.random()
        for row in range(math.ceil(horizon / height)):
            low, high = horizon - (row + 1) * height + 2 * unit, horizon - row * height
            for column in range(-1, math.ceil(side / width) + 1):
                left = (column + (row % 2) / 2 - start) * width
                tone = shaded((172, 92, 70), light * rng.uniform(0.82, 1.08))
                draw.rectangle((left + 2 * unit, low, left + width, high), tone)
    elif name == "wooden floor":
        vanish, middle = horizon - 150 * unit, side * rng.uniform(0.3, 0.7)
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).rectangle((0, horizon, side, side), 90)
        add_texture(canvas, "wood", mask, rng)
        for index in range(-14, 15):
            end = middle + index * 44 * unit
            start = middle + (end - middle) * (horizon - vanish) / (side - vanish)
            draw.line((start, horizon, end, side), shaded(floor, 0.62), max(1, round(2 * unit)))
    elif name == "carpet":
        tone = shaded(rng.choice(((150, 66, 62), (70, 88, 128), (84, 112, 92), (140, 104, 130))), light)
        edge = horizon + 14 * unit
        draw.rectangle((0, edge, side, side), tone)
        for row, (gap, bright) in enumerate(((5, 1.55), (15, 1.3))):
            draw.rectangle((0, edge + gap * unit, side, edge + (gap + 4 - row) * unit), shaded(tone, bright))
        step, rows = 26 * unit, math.ceil((side - edge) / (17 * unit))
        for row, column in itertools.product(range(rows), range(-1, 13)):
            x, y = (column + (row % 2) / 2) * step, edge + (32 + row * 17) * unit
            rhomb = ((x - 9 * unit, y), (x, y - 5 * unit), (x + 9 * unit, y), (x, y + 5 * unit))
            draw.polygon(rhomb, shaded(tone, 1.5 if row % 2 else 1.25))
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).rectangle((0, edge, side, side), 255)
        add_texture(canvas, "carpet", mask, rng)
    if name in ("grey wall", "striped wallpaper", "wooden floor"):  # a skirting board
        draw.rectangle((0, horizon - 9 * unit, side, horizon), shaded((236, 234, 230), light))
        draw.line((0, horizon, side, horizon), shaded(floor, 0.7), max(1, round(2 * unit)))
    return canvas


def ring(part: Part, top: bool) -> list[tuple[float, float, float]]:
    """The corners of a part's bottom or top, counter-clockwise seen from above."""
    (x0, y0, z0), (x1, y1, z1) = part.low, part.high
    scale = part.taper if top else 1.0
    x, y, a, b = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2 * scale, (y1 - y0) / 2 * scale
    if part.sides == 4:
        flat = [(x - a, y - b), (x + a, y - b), (x + a, y + b), (x - a, y + b)]
    else:
        turns = [2 * math.pi * index / part.sides for index in range(part.sides)]
        flat = [(x + a * math.cos(turn), y + b * math.sin(turn)) for turn in turns]
    return [(*point, z1 if top else z0) for point in flat]


def back_to_front(parts: list[Part]) -> list[int]:
    """An order in which no part hides one drawn later; the viewer is in front, to the right and above."""
    import numpy as np

    low, high = np.array([part.low for part in parts]), np.array([part.high for part in parts])
    behind = (high[:, None, 0] <= low[None, :, 0] + 1e-6) | (low[:, None, 1] >= high[None, :, 1] - 1e-6)
    behind |= high[:, None, 2] <= low[None, :, 2] + 1e-6
    before = behind & ~behind.T
    waiting, order = before.sum(0), []
    for _ in parts:
        order.append(int(waiting.argmin()))
        waiting -= before[order[-1]]
        waiting[order[-1]] = 1 << 30
    return order


def draw_parts(
    canvas: Image.Image, parts: list[Part], corners: list[list[Range]], unit: float, rng: random.Random
) -> None:
    """Paints the visible faces of the parts, light from the upper left, and lays the textures over them."""
    from PIL import Image, ImageDraw

    draw = ImageDraw.Draw(canvas, "RGBA")
    masks: dict[str, tuple[Image.Image, ImageDraw.ImageDraw]] = {}
    names = []
    for part in parts:
        extent = [high - low for low, high in zip(part.low, part.high, strict=True)]
        upright = part.paint.texture == "wood" and extent[2] > max(extent[:2])
        names.append("upright wood" if upright else part.paint.texture)
    for name in sorted(set(names) - {""}):
        mask = Image.new("L", canvas.size)
        masks[name] = (mask, ImageDraw.Draw(mask))
    for index in back_to_front(parts):
        part, points, count = parts[index], corners[index], parts[index].sides
        bottom, top, solid = points[:count], points[count:], ring(part, False)
        faces = []
        for first in range(count):
            second = (first + 1) % count
            face = [bottom[first], bottom[second], top[second], top[first]]
            area = (face[1][0] - face[0][0]) * (face[3][1] - face[0][1])
            area -= (face[1][1] - face[0][1]) * (face[3][0] - face[0][0])
            if area < 0:  # turned towards the viewer
                x, y = solid[second][1] - solid[first][1], solid[first][0] - solid[second][0]
                facing = (-0.3 * x - 0.75 * y) / (math.hypot(x, y) or 1)
                faces.append((0.7 + 0.36 * max(0.0, facing), face))
        faces.append((1.08, top))
        for brightness, face in faces:
            color = shaded(part.paint.color, brightness)
            # Round parts have many narrow faces: an edge line on each would be stripes.
            edge = None if count > 4 and face is not top else (*shaded(color, 0.78), part.paint.alpha)
            draw.polygon(face, (*color, part.paint.alpha), edge)
            if part.soft:
                draw.line([*face, face[0], face[1]], color, max(1, round(2 * part.soft * unit)), "curve")
            for name, (_, mask_draw) in masks.items():
                mask_draw.polygon(face, 255 if name == names[index] else 0)
    for name, (mask, _) in masks.items():
        add_texture(canvas, name, mask, rng)


def draw_image(row: dict[str, str], seed: int, number: int, size: int) -> Image.Image:
    """The image of one row; the same for the same arguments."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFilter

    rng = random.Random(f"{seed}:picture:{number}")
    side = size * OVERSAMPLING
    light = rng.uniform(0.92, 1.06)
    red, green, blue = (min(255, max(0, value + rng.randint(-6, 6))) for value in COLORS[row["color"]])
    main = Paint(shaded((red, green, blue), light), row["material"], 165 if row["material"] == "glass" else 255)
    trim = rng.choice((Paint((74, 52, 38), "wood"), Paint((122, 124, 128), "metal"), Paint((198, 164, 122), "wood")))
    piece = Piece(rng, main, trim)
    KINDS[row["kind"]][0](piece)

    yaw, pitch = math.radians(rng.uniform(14, 34)), math.radians(rng.uniform(12, 22))
    points = np.array([point for part in piece.parts for top in (False, True) for point in ring(part, top)])
    x, y, z = points.T
    across = x * math.cos(yaw) + y * math.sin(yaw)
    away = y * math.cos(yaw) - x * math.sin(yaw)
    down = -z * math.cos(pitch) - away * math.sin(pitch)
    wide, tall = (0.62, 0.72) if row["size"] == "large" else (0.4, 0.46)
    unit = side * rng.uniform(0.92, 1) * min(wide / np.ptp(across), tall / np.ptp(down))

    mirrored = rng.random() < 0.5
    half = np.ptp(across) * unit / side / 2 + 0.03
    middle = {"left": rng.uniform(0.23, 0.3), "centre": rng.uniform(0.46, 0.54), "right": rng.uniform(0.7, 0.77)}
    centre = min(max(middle[row["position"]], half), 1 - half)
    centre = 1 - centre if mirrored else centre
    ground = side * (rng.uniform(0.84, 0.92) if row["size"] == "large" else rng.uniform(0.76, 0.88))
    across = (across - (across.max() + across.min()) / 2) * unit + centre * side
    down = (down - down.max()) * unit + ground
    horizon = min(side * rng.uniform(0.56, 0.66), float(down[z < 0.2].min()) - 0.03 * side)

    canvas = draw_background(row["background"], side, round(horizon), rng)
    # The outermost points near the floor, a little apart, are the shadow's corners.
    shadow, near = Image.new("L", (size, size)), np.flatnonzero(z < 0.3)
    left, right = near[across[near].argmin()], near[across[near].argmax()]
    front, back = near[down[near].argmax()], near[down[near].argmin()]
    spots = [(left, -0.04, 0), (front, 0, 0.02), (right, 0.02, 0), (back, 0, 0)]
    outline = [(across[i] / OVERSAMPLING + a * size, down[i] / OVERSAMPLING + b * size) for i, a, b in spots]
    ImageDraw.Draw(shadow).polygon(outline, 120)
    shadow = shadow.filter(ImageFilter.GaussianBlur(size / 55)).resize((side, side), Image.Resampling.BILINEAR)
    canvas.paste((34, 30, 28), (0, 0), shadow)

    flat, corners, start = list(zip(across.tolist(), down.tolist(), strict=True)), [], 0
    for part in piece.parts:
        corners.append(flat[start : start + 2 * part.sides])
        start += 2 * part.sides
    draw_parts(canvas, piece.parts, corners, unit, rng)
    small = canvas.reduce(OVERSAMPLING)
    if mirrored:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    a, b = rng.randrange(size), rng.randrange(size)
    noisy = np.asarray(small, np.int16) + camera_noise(size)[a : a + size, b : b + size]
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def split_of(row: dict[str, str], seed: int) -> str:
    """The side of a combination of properties: a tenth each is for validation and for test."""
    words = ":".join(row[name] for name in COLUMNS[2:-1])
    share = int(hashlib.sha256(f"{seed}:{words}".encode()).hexdigest()[:8], 16) / 16**8
    return "test" if share < 0.1 else "validation" if share < 0.2 else "train"


def caption_of(row: dict[str, str], rng: random.Random) -> str:
    words = {**row, "position": POSITIONS[row["position"]], "background": BACKGROUNDS[row["background"]]}
    return rng.choice(TEMPLATES).format(**words, adjective=ADJECTIVES[row["material"]])


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """The rows of ``captions.csv``: kinds in turn, and of each kind every combination before one comes again."""
    combinations = {}
    for kind, (_, materials) in KINDS.items():
        combinations[kind] = list(itertools.product(materials, COLORS, SIZES, BACKGROUNDS, POSITIONS))
        random.Random(f"{seed}:{kind}").shuffle(combinations[kind])
    rows, kinds = [], list(KINDS)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        chosen = combinations[kind][number // len(kinds) % len(combinations[kind])]
        row = {"kind": kind, **dict(zip(COLUMNS[3:-1], chosen, strict=True))}
        caption = caption_of(row, random.Random(f"{seed}:caption:{number}"))
        rows.append({"image": f"images/{number:05d}.jpg", "caption": caption, **row, "split": split_of(row, seed)})
    return rows


def draw_one(folder: Path, seed: int, size: int, numbered: tuple[int, dict[str, str]]) -> None:
    """Writes the image of a row, given with its number; what a worker runs."""
    number, row = numbered
    draw_image(row, seed, number, size).save(folder / row["image"], quality=90, subsampling=0)


def draw_all(folder: Path, rows: list[dict[str, str]], args: Args) -> None:
    """Draws the rows' images into ``folder/images`` with a progress bar."""
    (folder / "images").mkdir(parents=True)
    workers = args.num_workers if args.num_workers is not None else os.cpu_count() or 1
    draw = functools.partial(draw_one, folder, args.seed, args.size)
    workers = workers if workers > 1 and len(rows) > 50 else 0  # a process is not worth its start for a few images
    done = map_in_processes(draw, list(enumerate(rows)), workers, chunk=50)
    for _ in with_progress(done, len(rows), "drawing", "images"):
        pass


def is_there(folder: Path, made_with: dict[str, int]) -> bool:
    """Whether ``folder`` holds this very set; UserError where it holds something that this program did not make."""
    note = folder / "demo.json"
    if note.is_file():
        try:
            return json.loads(note.read_text(encoding="utf-8")) == made_with
        except ValueError:
            return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir {folder}: there, but not made by this program; name a new folder")
    return False


def main() -> None:
    args = parse_args(Args)
    check_ranges(args, count=(1, 100_000), size=(32, 1024), seed=(0, 2**63))
    folder = Path(args.output_dir)
    made_with = {"version": VERSION, "count": args.count, "seed": args.seed, "size": args.size}
    rows = make_rows(args.count, args.seed)
    if is_there(folder, made_with):
        ending = f"already in {folder}"
    else:
        with whole_folder(folder) as draft:
            draw_all(draft, rows, args)
            with open(draft / "captions.csv", "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            (draft / "demo.json").write_text(json.dumps(made_with) + "\n", encoding="utf-8")
        ending = f"written to {folder}"
    counts = collections.Counter(row["split"] for row in rows)
    print(f"{', '.join(f'{split} {counts[split]:,}' for split in ('train', 'validation', 'test'))}: {ending}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
