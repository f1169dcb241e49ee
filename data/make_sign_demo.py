"""Make the demo's sign set: keypoints of invented signs, as MediaPipe would find them in films of several signers.

A sign is a hand shape, a place at the body, a way the hand points and a movement. Signs come in families of three that
differ only in the order of the movement in time (there, back, there twice). Validation and test have signers of their
own, with other bodies, habits, speeds and cameras; some are left-handed.

  python data/make_sign_demo.py --output_dir data/demo_sign --preview signs.png
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import math
import os
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from accelerando.base.config import check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import whole_folder, write_text
from accelerando.base.log import with_progress
from accelerando.base.processes import map_in_processes

VERSION = 1  # incremented when the same arguments give other clips
SPLITS = ("train", "val", "test")
COLUMNS = ("file", "gloss", "cat", "occluded", "signer")
LEFT, RIGHT = slice(25, 46), slice(46, 67)  # keypoints of the hands; before them the pose, after them the face
MAX_GAP = 5  # frames for which a lost hand stays where it was seen last; then its coordinates are 0
META = {
    "target_fps": 30, "out_size": 256, "dims_per_frame": 156, "keypoints_total": 78,
    "order": "pose25,left_hand21,right_hand21,face11", "pose_indices": list(range(25)),
    "face_indices": [1, 33, 263, 133, 362, 61, 291, 105, 334, 199, 4], "conf_thresh": 0.5,
    "interpolation_max_gap": MAX_GAP,
}  # fmt: skip

# Lengths are in shoulder widths; x points away from the body's middle on an arm's own side, y down, z to the viewer.
# How far thumb, index, middle, ring and little finger are bent (0 straight, 1 closed), and how far they are spread.
SHAPES = {
    "FLAT": (0.3, 0, 0, 0, 0, 0), "FIST": (1, 1, 1, 1, 1, 0), "INDEX": (1, 0, 1, 1, 1, 0), "FIVE": (0, 0, 0, 0, 0, 1),
    "VEE": (1, 0, 0, 1, 1, 1), "CLAW": (0.2, 0.5, 0.5, 0.5, 0.5, 1), "HORNS": (1, 0, 1, 1, 0, 0.5),
    "PINCH": (0.7, 0.65, 0, 0, 0, 0.6), "ELL": (0, 0, 1, 1, 1, 0), "CUP": (0.3, 0.35, 0.35, 0.35, 0.35, 0),
    "WYE": (0, 1, 1, 1, 0, 1), "THREE": (0, 0, 0, 1, 1, 0.7),
}  # fmt: skip
RELAXED = np.array([0.3, 0.35, 0.4, 0.4, 0.4, 0.2])
PLACES = {
    "BROW": (0.3, -1.0, 0.35), "CHIN": (0.12, -0.3, 0.4), "CHEST": (0.22, 0.35, 0.45), "SIDE": (0.6, 0.15, 0.45),
    "BELLY": (0.25, 0.8, 0.45),
}  # fmt: skip
POINTING = {  # where the fingers point, and where the palm looks
    "UP": ((0.1, -1, 0.1), (0, 0, 1)), "ACROSS": ((-0.85, -0.4, 0.25), (-0.2, 0.1, -1)),
    "EDGE": ((0.15, -0.8, 0.5), (-1, 0, 0.1)),
}  # fmt: skip
HANDS = ("", "BOTH", "TURNS")  # one hand; both, as in a mirror; both, the other hand after the first
MOVES = {  # at 0 <= u <= 1: offset x, y, z, turn of the palm, how far the hand has closed (a fist: opened)
    "LINE": lambda u: (0.7 * u - 0.28, 0, 0.2 * u, 0, 0),
    "ARC": lambda u: (0.05 - 0.35 * np.cos(np.pi * u), -0.35 * np.sin(np.pi * u), 0, 0, 0),
    "DROP": lambda u: (0, 0.6 * u - 0.3, 0.2 * u, 0, 0),
    "HOOK": lambda u: (0.32 * np.sin(1.5 * np.pi * u), -0.32 * np.cos(1.5 * np.pi * u), 0, 0, 0),
    "CORNER": lambda u: (np.minimum(u, 0.5) - 0.25, np.maximum(u, 0.5) - 0.75, 0, 0, 0),
    "ZIGZAG": lambda u: (0.35 * np.abs(1 - (3 * u) % 2) - 0.17, 0.55 * u - 0.28, 0, 0, 0),
    "TWIST": lambda u: (0, 0.1 * u, 0, 2.2 * u - 0.66, 0),
    "CLOSE": lambda u: (0.15 * u, 0, 0, 0, u),
}
VARIANTS = ("", "BACK", "TWICE")  # the movement; from its end to its beginning; there, back and there again
# Pose landmarks 0-10 and META["face_indices"] from the nose, x to the image's right, as in a real clip.
HEAD = np.array([
    (0, 0), (0.08, -0.14), (0.12, -0.14), (0.17, -0.14), (-0.08, -0.14), (-0.12, -0.14), (-0.17, -0.14), (0.25, -0.09),
    (-0.25, -0.09), (0.1, 0.17), (-0.1, 0.17), (0, 0.05), (-0.17, -0.13), (0.17, -0.13), (-0.06, -0.12),
    (0.06, -0.12), (-0.1, 0.25), (0.1, 0.25), (-0.17, -0.27), (0.17, -0.27), (0, 0.4), (0, 0.02),
])  # fmt: skip
NOSE, HIP = np.array([0, -0.78, 0.3]), np.array([0.32, 1.65, 0])
SIGNER = {  # mean, and the spread between signers relative to it
    "shoulders": (1, 0.08), "upper_arm": (0.82, 0.07), "forearm": (0.72, 0.07), "palm": (0.34, 0.08),
    "head": (1, 0.07), "neck": (1, 0.06), "speed": (1, 0.2), "size": (1, 0.18), "skew": (1, 0.15),
    "tremor": (0.012, 0.5), "lost": (0.012, 0.5), "rest_x": (0.25, 0.6), "rest_y": (1.25, 0.2), "elbow": (0.5, 0.4),
    "width": (0.235, 0.12), "x": (0.52, 0.07), "y": (0.6, 0.06), "noise": (0.003, 0.3),
}  # fmt: skip


@dataclass
class Args:
    # -- output --
    output_dir: str = "data/demo_sign"  # folder to write train/, val/, test/ and gloss_names.csv to
    num_glosses: int = 24  # signs, the first of a fixed list; three by three they are families
    num_categories: int = 4  # groups of glosses, as equal as may be
    signers: int = 12  # a sixth each for validation and for test, at least one
    clips_per_signer: int = 4  # of each gloss
    occluded: float = 0.15  # share of the clips in which something hides a hand
    seed: int = 0  # of the signers and of the clips
    num_workers: int | None = None  # processes that make clips, default one for each core; the clips are the same
    baseline: bool = True  # measure logistic regression on the test signers and write baseline.json
    preview: str | None = None  # image to draw of some clips, skeletons over time
    config: tuple[str, ...] = ()  # YAML files with any of these settings


class Gloss(NamedTuple):
    """A sign: keys of the tables above."""

    hands: str
    shape: str
    place: str
    pointing: str
    move: str
    variant: str

    @property
    def label(self) -> str:
        return " ".join(word for word in (*self[:3], *self[4:]) if word)


class Task(NamedTuple):
    """A clip to make."""

    split: str
    file: str
    gloss: int
    sign: Gloss
    signer: int
    left_handed: bool
    take: int
    occluded: bool


def make_glosses(count: int) -> list[Gloss]:
    """The first ``count`` of a fixed list, in which shapes and movements take turns."""
    frames = list(itertools.product(HANDS, PLACES, POINTING))
    random.Random(3).shuffle(frames)
    families: dict[tuple, list[Gloss]] = {}
    for number in range(len(frames) * len(SHAPES)):
        hands, place, pointing = frames[(number + number // len(frames)) % len(frames)]
        shape, move = list(SHAPES)[number % len(SHAPES)], list(MOVES)[number % len(MOVES)]
        family = [Gloss(hands, shape, place, pointing, move, variant) for variant in VARIANTS]
        families.setdefault((hands, shape, place, move), family)
    return list(itertools.chain(*families.values()))[:count]


def make_tasks(args: Args) -> list[Task]:
    """All clips: signer by signer, each with every gloss."""
    held_out = max(1, args.signers // 6)
    first = {"train": 0, "val": args.signers - 2 * held_out, "test": args.signers - held_out}
    tasks: list[Task] = []
    for signer, (gloss, sign), take in itertools.product(
        range(args.signers), enumerate(make_glosses(args.num_glosses)), range(args.clips_per_signer)
    ):
        split = [name for name in SPLITS if signer >= first[name]][-1]
        left_handed = (signer - first[split]) % 4 == 1  # of any two held-out signers one
        file = f"clip_{len(tasks):05d}_{sign.label.lower().replace(' ', '_')}"
        hidden = random.Random(f"{args.seed}:{signer}:{gloss}:{take}").random() < args.occluded
        tasks.append(Task(split, file, gloss, sign, signer, left_handed, take, hidden))
    return tasks


@functools.cache
def make_signer(seed: int, number: int) -> dict[str, Any]:
    """What stays the same in all clips of a person."""
    rng = np.random.default_rng((seed, 1, number))
    signer: dict[str, Any] = {}
    for name, (mean, spread) in SIGNER.items():
        signer[name] = float(mean * (1 + spread * np.clip(rng.normal(), -2, 2)))
    signer["places"] = dict(zip(PLACES, rng.normal(0, 0.09, (len(PLACES), 3)), strict=True))
    signer |= {"bend": rng.normal(0, 0.1, 6), "along": rng.normal(0, 0.18, 3), "facing": rng.normal(0, 0.15, 3)}
    signer |= {"roll": rng.normal(0, 0.05), "yaw": rng.normal(0, 0.15)}
    return signer | {"look": rng.normal(0, 0.4, 16)}  # clothes and background, as the feature net sees them


def ease(x: np.ndarray) -> np.ndarray:
    """From 0 to 1 as a hand moves, at rest at both ends (minimum jerk, Flash and Hogan 1985)."""
    x = np.clip(x, 0, 1)
    return x**3 * (10 - 15 * x + 6 * x**2)


def length(vector: np.ndarray) -> np.ndarray:
    return np.sqrt((vector**2).sum(-1, keepdims=True)) + 1e-8


def across(vector: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """The part of ``vector`` at a right angle to the unit vector ``axis``, of length 1."""
    rest = vector - axis * (vector * axis).sum(-1, keepdims=True)
    return rest / length(rest)


def wobble(rng: np.random.Generator, frames: int, width: int, size: float, smooth: int = 4) -> np.ndarray:
    """Slow noise [T,width] of about ``size``."""
    kernel = np.hanning(2 * smooth + 1)[1:-1]
    noise = rng.normal(0, size, (frames + len(kernel) - 1, width))
    return sum(k * noise[i : i + frames] for i, k in enumerate(kernel)) / np.sqrt((kernel**2).sum())


def timeline(signer: dict[str, Any], sign: Gloss, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """How far the hands are raised [T] and how far the movement is [T], T between 24 and 90."""
    longer = (1.6 if sign.variant == "TWICE" else 1) * (1.35 if sign.move in ("HOOK", "ZIGZAG") else 1)
    stroke = rng.uniform(13, 18) * longer
    spans = np.array([rng.uniform(5, 8), rng.uniform(0, 3), stroke, rng.uniform(0, 6), rng.uniform(5, 8)])
    spans /= signer["speed"] * rng.uniform(0.8, 1.25)
    frames = int(np.clip(round(spans.sum() + rng.uniform(2, 36)), 24, 90))
    spans *= min(1, (frames - 2) / spans.sum())
    time = np.arange(frames)
    starts = rng.uniform(0, frames - spans.sum()) + np.concatenate([[0], np.cumsum(spans)])
    rise = ease((time - starts[0]) / spans[0]) * (1 - ease((time - starts[4]) / spans[4]))
    progress = np.clip((time - starts[2]) / spans[2], 0, 1) ** signer["skew"]
    ways = 3 if sign.variant == "TWICE" else 1  # each begins and ends at rest
    way = np.minimum(np.floor(progress * ways), ways - 1)
    return rise, (way + ease(progress * ways - way)) / ways


def hand_landmarks(bend: np.ndarray, along: np.ndarray, palm: np.ndarray) -> np.ndarray:
    """Forward kinematics: [T,21,3] from the wrist in lengths of the palm, in MediaPipe's order, thumb first.

    ``bend`` [T,6] is as in ``SHAPES``; the hand points to ``along`` and the palm looks to ``palm``, unit vectors [T,3].
    """
    thumbward = np.cross(along, palm)
    points = np.zeros((len(bend), 21, 3))
    roots = ((0.3, 0.3), (0.33, 0.97), (0.1, 1.0), (-0.12, 0.95), (-0.33, 0.86))  # thumbward, along
    bones = ((0.4, 0.33, 0.28), (0.46, 0.28, 0.22), (0.52, 0.31, 0.23), (0.47, 0.29, 0.23), (0.37, 0.22, 0.2))
    fans = (0, 0.28, 0.04, -0.18, -0.42)
    for finger in range(5):
        flex = bend[:, finger, None]
        if finger == 0:  # the thumb closes across the palm
            sideways, angles = 0.95 - 1.5 * flex, (0.5, 0.9, 1.2)
        else:
            sideways, angles = fans[finger] * bend[:, 5, None] * (1 - flex), (1.4, 3.1, 4.1)
        straight = np.cos(sideways) * along + np.sin(sideways) * thumbward
        points[:, 1 + 4 * finger] = roots[finger][0] * thumbward + roots[finger][1] * along
        for point, angle, bone in zip(range(2 + 4 * finger, 5 + 4 * finger), angles, bones[finger], strict=True):
            turned = np.cos(angle * flex) * straight + np.sin(angle * flex) * palm
            points[:, point] = points[:, point - 1] + bone * turned
    return points


def elbow_of(shoulder: np.ndarray, wrist: np.ndarray, upper: float, lower: float, out: float) -> np.ndarray:
    """Two-link inverse kinematics: the elbow [T,3], hanging down and ``out`` to the side."""
    reach = length(wrist - shoulder)
    axis, reach = (wrist - shoulder) / reach, np.clip(reach, abs(upper - lower) + 0.01, upper + lower - 0.01)
    along = (upper**2 - lower**2 + reach**2) / (2 * reach)
    aside = np.sqrt(np.maximum(upper**2 - along**2, 0))
    return shoulder + along * axis + aside * across(np.array([out, 1, -0.3]), axis)


def move_arm(
    signer: dict[str, Any], sign: Gloss, rise: np.ndarray, progress: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Elbow [T,3] and hand [T,21,3] of one arm, on its own side; ``rise`` [T] is 0 at rest and 1 in the sign."""
    frames, up = len(rise), rise[:, None]
    u = {"": progress, "BACK": 1 - progress, "TWICE": 1 - np.abs(1 - (3 * progress) % 2)}[sign.variant]
    x, y, z, turn, close = (np.broadcast_to(value, frames)[:, None] for value in MOVES[sign.move](u))
    offset = np.concatenate([x, y, z], 1) * signer["size"] * rng.uniform(0.85, 1.15)
    place = PLACES[sign.place] + signer["places"][sign.place] + rng.normal(0, 0.05, 3)
    place[0] += 0.12 * (sign.hands != "")  # two hands keep apart
    rest = np.array([signer["rest_x"], signer["rest_y"], 0.2]) + rng.normal(0, 0.05, 3)
    centre = (1 - up) * rest + up * (place + offset) + wobble(rng, frames, 3, signer["tremor"])

    along, palm = (np.array(vector) + rng.normal(0, 0.1, 3) for vector in POINTING[sign.pointing])
    along = (1 - up) * np.array([-0.3, 0.9, 0.3]) + up * (along + signer["along"])
    along /= length(along)
    palm = across((1 - up) * np.array([-0.6, 0, -0.8]) + up * (palm + signer["facing"]), along)
    palm = np.cos(turn * up) * palm + np.sin(turn * up) * np.cross(along, palm)
    closed = np.array(SHAPES["FIVE" if sign.shape == "FIST" else "FIST"])
    bend = (1 - up) * RELAXED + up * ((1 - close) * np.array(SHAPES[sign.shape]) + close * closed)
    bend = np.clip(bend + signer["bend"] + rng.normal(0, 0.05, 6) + wobble(rng, frames, 6, 0.03), -0.05, 1.05)

    shoulder, upper, lower = np.array([signer["shoulders"] / 2, 0, 0]), signer["upper_arm"], signer["forearm"]
    reach = centre - 0.9 * signer["palm"] * along - shoulder
    wrist = shoulder + reach * np.minimum(1, 0.98 * (upper + lower) / length(reach))
    hand = wrist[:, None] + hand_landmarks(bend, along, palm) * signer["palm"]
    return elbow_of(shoulder, wrist, upper, lower, signer["elbow"]), hand


def film(points: np.ndarray, signer: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Points [T,K,3] as the camera sees them: [T,K,2] in parts of the image, not clipped."""
    yaw, roll = signer["yaw"] + rng.normal(0, 0.04), signer["roll"] + rng.normal(0, 0.02)
    x = points[..., 0] * math.cos(yaw) + points[..., 2] * math.sin(yaw)
    z = points[..., 2] * math.cos(yaw) - points[..., 0] * math.sin(yaw)
    scale = signer["width"] * rng.uniform(0.96, 1.04) / (1 - z / 8)  # the camera stands 8 shoulder widths away
    x, y = x * scale, points[..., 1] * scale
    turned = (x * math.cos(roll) - y * math.sin(roll), x * math.sin(roll) + y * math.cos(roll))
    return np.stack(turned, -1) + rng.normal((signer["x"], signer["y"]), 0.015)


def hands_seen(image: np.ndarray, signer: dict[str, Any], task: Task, rng: np.random.Generator) -> np.ndarray:
    """Whether left and right hand are found [T,2]: not where they are fast, outside of the image or hidden."""
    frames = len(image)
    seen = np.ones((frames, 2), bool)
    for index, hand in enumerate((LEFT, RIGHT)):
        speed = np.abs(np.diff(image[:, hand][:, 9], axis=0, prepend=image[:1, hand][:, 9])).sum(-1)
        for start in np.flatnonzero(rng.random(frames) < signer["lost"] * (1 + 60 * speed)):
            seen[start : start + rng.integers(1, 4), index] = False
        seen[:, index] &= ((image[:, hand] > 0) & (image[:, hand] < 1)).all(-1).mean(1) > 0.7
    if task.occluded:
        hidden = int(task.left_handed == (rng.random() < 0.3))  # more often the hand that signs
        share = 1 if rng.random() < 0.2 else rng.uniform(0.25, 0.45)
        start = int(rng.uniform(0.2, 1 - share) * frames) if share < 1 else 0
        seen[start : start + math.ceil(share * frames), hidden] = False
    return seen


@functools.cache
def feature_net(width: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight [width,2048] and bias [2048] of the layer that ``features_of`` applies, the same for every set."""
    rng = np.random.default_rng(2048)
    weight = np.clip(np.rint(rng.normal(0, 2, (width, 2048))), -6, 6)
    return weight.astype(np.float32), np.rint(rng.normal(-500, 250, 2048)).astype(np.float32)


def features_of(image: np.ndarray, seen: np.ndarray, look: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a frozen image net might make of the frames: [T,2048], never negative, mostly zero.

    A random layer with ReLU of where head, arms and hands are, the fingers, the signer's look, the light and noise.
    """
    frames = len(image)
    parts = [(image[:, [0, 11, 12, 13, 14]].reshape(frames, -1) - 0.5) * 3, np.tile(look, (frames, 1))]
    for index, hand in enumerate((image[:, LEFT], image[:, RIGHT])):
        shape = (hand[:, 1:] - hand[:, :1]).reshape(frames, -1) * 10
        parts.append(np.concatenate([shape, (hand[:, 9] - 0.5) * 14, np.ones((frames, 1))], 1) * seen[:, index, None])
    parts += [wobble(rng, frames, 4, 0.4, 12), rng.normal(0, 0.3, (frames, 12))]
    # Whole numbers in float32, whose sums are exact: the same bits however the product is computed, and small files.
    inputs = np.clip(np.rint(np.concatenate(parts, 1) * 32), -127, 127).astype(np.float32)
    weight, bias = feature_net(inputs.shape[1])
    return np.maximum(np.floor((inputs @ weight + bias) / 64), 0) / np.float32(16)


def make_clip(seed: int, task: Task) -> dict[str, np.ndarray]:
    """The arrays of one clip; they depend on the arguments alone."""
    signer, sign = make_signer(seed, task.signer), task.sign
    rng = np.random.default_rng((seed, 2, task.signer, task.gloss, task.take))
    rise, progress = timeline(signer, sign, rng)
    frames, ways = len(rise), [(rise, progress), (rise, progress)]
    if sign.hands == "":
        ways[1] = (rise * rng.uniform(0, 0.06), progress)
    elif sign.hands == "TURNS":
        ways = [(rise, np.minimum(progress * 1.4, 1)), (rise, np.maximum(progress * 1.4 - 0.4, 0))]
    arms = [move_arm(signer, sign, *way, rng) for way in ways]

    points = np.zeros((frames, 78, 3))
    head = np.pad(HEAD * signer["head"], ((0, 0), (0, 1))) + NOSE * signer["neck"] + rng.normal(0, 0.02, 3)
    head = head + wobble(rng, frames, 3, 0.03, 8)[:, None]
    points[:, :11], points[:, 67:] = head[:, :11], head[:, 11:]
    arms = arms if task.left_handed else arms[::-1]
    for first, hand, (elbow, fingers) in zip((11, 12), (LEFT, RIGHT), arms, strict=True):
        mirror = np.array([1 if hand == LEFT else -1, 1, 1])  # a signer's left is on the image's right
        points[:, first], points[:, first + 12] = (signer["shoulders"] / 2, 0, 0) * mirror, HIP * mirror
        points[:, first + 2], points[:, hand] = elbow * mirror, fingers * mirror
        points[:, first + 4 : first + 12 : 2] = points[:, hand][:, [0, 17, 5, 3]]  # wrist, little finger, index, thumb
    image = film(points + wobble(rng, frames, 3, 0.015, 10)[:, None], signer, rng)
    seen = hands_seen(image, signer, task, rng)

    found = image + rng.normal(0, signer["noise"], image.shape)
    found += wobble(rng, frames, 156, 0.002).reshape(image.shape)
    mask = ((found > 0) & (found < 1)).all(-1)
    for index, hand in enumerate((LEFT, RIGHT)):
        mask[:, hand] = seen[:, index, None]
        last = -MAX_GAP - 1
        for frame in range(frames):
            last = frame if seen[frame, index] else last
            found[frame, hand] = found[last, hand] if frame - last <= MAX_GAP else 0
        if task.occluded and seen[:, index].any():  # what hides the hand hides the wrist: the pose only guesses it
            hidden = np.ix_(~seen[:, index], range(15 + index, 23, 2))
            found[hidden] += rng.normal(0, 0.03, 2)
            mask[hidden] = False
    times = np.arange(frames) * (1000 / META["target_fps"]) + rng.uniform(-8, 8, frames)
    return {
        "X": np.rint(np.clip(found, 0, 1) * 1000).astype(np.float32).reshape(frames, 156) / np.float32(1000),
        "X2048": features_of(image, seen, signer["look"], rng),
        "mask": mask,
        "timestamps_ms": np.rint(times - times[0]).astype(np.int64),
        "meta": np.array(json.dumps({"video": f"{task.file}.synthetic", **META})),
    }


def write_some(folder: Path, seed: int, tasks: list[Task]) -> None:
    for task in tasks:
        # As np.savez_compressed does, but three times as fast.
        path = folder / task.split / f"{task.file}.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, array in make_clip(seed, task).items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)


def write_table(path: Path, columns: tuple[str, ...], rows: list[tuple]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_all(folder: Path, tasks: list[Task], args: Args) -> None:
    """Makes the clips of ``tasks`` under ``folder``, and the tables beside them."""
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
    workers = args.num_workers if args.num_workers is not None else os.cpu_count() or 1
    parts = [tasks[start : start + 24] for start in range(0, len(tasks), 24)]
    write = functools.partial(write_some, folder, args.seed)
    done = map_in_processes(write, parts, workers if workers > 1 else 0, chunk=1)
    for _ in with_progress(done, len(parts), "signing", "parts"):
        pass
    names = []
    for gloss, sign in enumerate(make_glosses(args.num_glosses)):
        category = gloss * args.num_categories // args.num_glosses
        names.append((gloss, sign.label, category, f"GROUP {category + 1}"))
    write_table(folder / "gloss_names.csv", ("gloss", "label", "cat", "category"), names)
    for split in SPLITS:
        rows = [(t.file, t.gloss, names[t.gloss][2], int(t.occluded), f"s{t.signer:02d}") for t in tasks]
        rows = [row for row, task in zip(rows, tasks, strict=True) if task.split == split]
        write_table(folder / split / "labels.csv", COLUMNS, rows)


def read_flat(folder: Path, frames: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints on ``frames`` frames, centred and scaled by the shoulders, float32 [N,frames*156], and glosses [N]."""
    inputs, rows = [], read_table(folder / "labels.csv")
    for row in rows:
        with np.load(folder / f"{row['file']}.npz") as clip:
            points, mask = clip["X"].reshape(-1, 78, 2), clip["mask"]
        shoulders = points[:, 11:13]
        points = (points - shoulders.mean((0, 1))) / length(shoulders[:, 0] - shoulders[:, 1]).mean()
        flat = np.where(mask[..., None], points, 0).reshape(len(points), -1)
        at = np.linspace(0, len(flat) - 1, frames)
        low = np.minimum(at.astype(int), len(flat) - 2)
        inputs.append(flat[low] + (at - low)[:, None] * (flat[low + 1] - flat[low]))
    return np.array(inputs, np.float32).reshape(len(rows), -1), np.array([int(row["gloss"]) for row in rows])


def baseline(train_folder: Path, test_folder: Path) -> float:
    """Accuracy in 0..1 of logistic regression, the usual first attempt (scikit-learn's objective with C=1)."""
    import torch
    from torch.nn.functional import cross_entropy

    x, y = map(torch.from_numpy, read_flat(Path(train_folder)))
    x_test, y_test = map(torch.from_numpy, read_flat(Path(test_folder)))
    weight = torch.zeros(x.shape[1], int(y.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = cross_entropy(x @ weight + bias, y) + weight.square().sum() / (2 * len(x))
        value.backward()
        return value

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as fast for products this small, and the same number with any count of cores
    optimizer.step(loss)
    torch.set_num_threads(threads)
    return float(((x_test @ weight + bias).argmax(1) == y_test).float().mean())


def draw_preview(folder: Path, image: Path, lines: int = 12, columns: int = 10) -> None:
    """Contact sheet: clips of several signs and signers, one a line, over time; what is not seen is not drawn."""
    from matplotlib.figure import Figure

    names = {row["gloss"]: row["label"] for row in read_table(folder / "gloss_names.csv")}
    clips = [(split, row) for split in SPLITS for row in read_table(folder / split / "labels.csv")]
    takes = [[clip for clip in clips if clip[1]["gloss"] == gloss] for gloss in list(names)[:lines]]
    chosen = [found[number * len(found) // len(takes)] for number, found in enumerate(takes)]
    chains = [((11, 12, 24, 23, 11), "0.6"), ((7, 2, 0, 5, 8), "0.6")]
    for arm, hand, color in (((11, 13, 15), 25, "tab:blue"), ((12, 14, 16), 46, "tab:red")):
        fingers = [(hand, *range(hand + first, hand + first + 4)) for first in (1, 5, 9, 13, 17)]
        chains += [(chain, color) for chain in (arm, *fingers)]
    figure = Figure(figsize=(1.5 * columns, 1.65 * len(chosen)), layout="constrained")
    for axes, (split, row) in zip(figure.subplots(len(chosen), columns, squeeze=False), chosen, strict=True):
        with np.load(folder / split / f"{row['file']}.npz") as clip:
            points, mask = clip["X"].reshape(-1, 78, 2), clip["mask"]
        title = f"{names[row['gloss']]} ({split}, {row['signer']}{', occluded' * int(row['occluded'])})"
        axes[0].set_title(title, loc="left", fontsize=8)
        for axis, frame in zip(axes, np.linspace(2, len(points) - 3, columns).astype(int), strict=True):
            for chain, color in chains:
                seen = [point for point in chain if mask[frame, point]]
                axis.plot(*points[frame, seen].T, color=color, linewidth=0.9)
            axis.plot(*points[frame, 67:].T, ".", color="0.4", markersize=2)
            axis.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect="equal")
            axis.text(0.03, 0.12, frame, fontsize=6, color="0.5")
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=90)


def main() -> None:
    args = parse_args(Args)
    check_ranges(args, num_glosses=(2, 300), num_categories=(1, args.num_glosses), signers=(3, 999))
    check_ranges(args, clips_per_signer=(1, 1000), occluded=(0, 1), seed=(0, 2**63))
    folder, tasks = Path(args.output_dir), make_tasks(args)
    settings = ("num_glosses", "num_categories", "signers", "clips_per_signer", "occluded", "seed")
    made_with = json.dumps({"version": VERSION, **{name: getattr(args, name) for name in settings}}) + "\n"
    made = folder / "made.json"
    if not made.is_file() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir {folder}: there, but not made by this program; name a new folder")
    if made.is_file() and made.read_text(encoding="utf-8") == made_with:
        ending = f"already in {folder}"
    else:
        with whole_folder(folder) as draft:
            write_all(draft, tasks, args)
            (draft / "made.json").write_text(made_with, encoding="utf-8")
        ending = f"written to {folder}"
    counts = [f"{split} {sum(task.split == split for task in tasks):,}" for split in SPLITS]
    print(f"{', '.join(counts)} clips of {args.num_glosses} signs: {ending}")
    if args.baseline:
        note = folder / "baseline.json"
        if not note.is_file():
            accuracy = round(baseline(folder / "train", folder / "test"), 4)
            found = {"logistic_regression": accuracy, "chance": round(1 / args.num_glosses, 4)}
            write_text(note, json.dumps(found) + "\n")
        share = json.loads(note.read_text(encoding="utf-8"))["logistic_regression"]
        print(f"Logistic regression on held-out signers: {100 * share:.1f} %")
    if args.preview:
        draw_preview(folder, Path(args.preview))
        print(f"Image: {args.preview}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
