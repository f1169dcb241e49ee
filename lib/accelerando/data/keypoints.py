"""Keypoints of signing: the layout of a frame, its normalisation by the body, and the augmentation of clips.

A frame has 78 points (x, y): MediaPipe's pose landmarks 0 to 24, 21 of the left hand, 21 of the right hand, and 11 of
the face mesh (1, 33, 263, 133, 362, 61, 291, 105, 334, 199, 4). "Left" and "right" are the signer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

NormalisationName = Literal["body", "standard", "none"]

NUM_POINTS = 78
WIDTH = 2 * NUM_POINTS
LEFT_HAND, RIGHT_HAND = slice(25, 46), slice(46, 67)
LEFT_SHOULDER, RIGHT_SHOULDER = 11, 12


def _mirror_index() -> np.ndarray:
    index = np.arange(NUM_POINTS)
    pose = [(1, 4), (2, 5), (3, 6), *((left, left + 1) for left in range(7, 24, 2))]  # 7 and 8 are the ears
    face = [(67 + left, 67 + left + 1) for left in (1, 3, 5, 7)]
    for left, right in [*pose, *face]:
        index[left], index[right] = right, left
    index[LEFT_HAND], index[RIGHT_HAND] = np.arange(46, 67), np.arange(25, 46)
    return index


MIRROR = _mirror_index()  # [78]: the index of each point's counterpart under a left-right mirror


def visible_points(frames: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Which points were detected, bool [T, 78]: the mask, or without one the points that are not at (0, 0)."""
    if mask is not None:
        return mask
    return frames.reshape(len(frames), -1, 2).any(axis=2)


def normalise_by_body(frames: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Frames [T, 156] in units of the distance of the shoulders, their midpoint at 0, and the mask bool [T, 78].

    Midpoint and distance are medians over the frames in which both shoulders were detected, so movements of the body
    are kept. If there is no such frame, the mean and standard deviation of all detected points are used. Points that
    were not detected are 0.
    """
    points = frames.reshape(len(frames), NUM_POINTS, 2).astype(np.float32)
    seen = visible_points(frames, mask)
    both = seen[:, LEFT_SHOULDER] & seen[:, RIGHT_SHOULDER]
    centre, unit = np.zeros(2, np.float32), 0.0
    if both.any():
        left, right = points[both, LEFT_SHOULDER], points[both, RIGHT_SHOULDER]
        centre = np.median((left + right) / 2, axis=0)
        unit = float(np.median(np.linalg.norm(left - right, axis=1)))
    if unit < 1e-4 and seen.any():
        centre = points[seen].mean(axis=0)
        unit = 2 * float(points[seen].std(axis=0).mean())
    points = (points - centre) / max(unit, 1e-4) * seen[:, :, None]
    return points.reshape(len(frames), WIDTH).astype(np.float32), seen


@dataclass(frozen=True)
class ClipAugmentation:
    """Random augmentation of a training clip, drawn for each clip and epoch; 0 turns an option off.

    ``rotation`` (degrees), ``scale`` (0.2: from 0.8 to 1.2 times), ``shift`` and ``noise`` (standard deviation) in
    units of the frames; ``time_warp`` (0.2: up to 20 % longer or shorter, unevenly); ``time_mask`` (the longest masked
    span, as a fraction of the clip); ``frame_drop`` and ``mirror`` (probabilities). Rotation, shift and mirror need the
    layout of 78 points; ``centre`` is the position of the body's centre (0 if normalised by the body, else 0.5).
    """

    rotation: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    noise: float = 0.0
    time_warp: float = 0.0
    time_mask: float = 0.0
    frame_drop: float = 0.0
    mirror: float = 0.0
    centre: float = 0.0

    @property
    def is_on(self) -> bool:
        """True if any option is on."""
        moves = self.rotation or self.scale or self.shift or self.mirror
        return bool(moves or self.noise or self.time_warp or self.time_mask or self.frame_drop)

    def __call__(
        self, frames: np.ndarray, mask: np.ndarray | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Augmented copies of frames [T, D] and mask [T, K]; the number of frames may change."""
        if self.time_warp:
            frames, mask = time_warp(frames, mask, self.time_warp, rng)
        if self.frame_drop and len(frames) > 2:
            kept = rng.random(len(frames)) >= self.frame_drop
            kept[rng.integers(len(frames), size=2)] = True
            frames, mask = frames[kept], None if mask is None else mask[kept]
        if self.rotation or self.scale or self.shift or self.mirror:
            frames, mask = self._move(frames, mask, rng)
        if self.noise:
            frames = frames + rng.standard_normal(frames.shape, dtype=np.float32) * np.float32(self.noise)
        if self.time_mask:
            length = int(rng.uniform(0, self.time_mask) * len(frames))
            start = int(rng.integers(len(frames) - length + 1))
            hidden = slice(start, start + length)
            frames = frames.copy()
            frames[hidden] = 0
            if mask is not None:
                mask = mask.copy()
                mask[hidden] = False
        if mask is not None:
            frames = (frames.reshape(*mask.shape, -1) * mask[:, :, None]).reshape(frames.shape)
        return frames.astype(np.float32, copy=False), mask

    def _move(
        self, frames: np.ndarray, mask: np.ndarray | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        factor = np.float32(rng.uniform(1 - self.scale, 1 + self.scale))
        if frames.shape[1] != WIDTH:
            return frames * factor, mask
        points = frames.reshape(-1, NUM_POINTS, 2) - np.float32(self.centre)
        if self.mirror and rng.random() < self.mirror:
            points = points[:, MIRROR] * np.array([-1, 1], np.float32)
            mask = None if mask is None else mask[:, MIRROR]
        angle = np.deg2rad(rng.uniform(-self.rotation, self.rotation))
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], np.float32)
        shift = rng.uniform(-self.shift, self.shift, 2).astype(np.float32) + np.float32(self.centre)
        return (points @ (turn * factor) + shift).reshape(frames.shape), mask


def time_warp(
    frames: np.ndarray, mask: np.ndarray | None, strength: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """The clip at a different, varying speed: up to ``strength`` longer or shorter, at most three times as fast.

    Frames [T, D] are interpolated linearly; a point that is masked in one of the two frames is taken from the nearer.
    """
    length = max(2, round(len(frames) * rng.uniform(1 - strength, 1 + strength)))
    # Speeds at five points of the clip, interpolated; their cumulative sum is the time that each new frame shows.
    speed = np.interp(np.linspace(0, 4, length), np.arange(5), rng.uniform(1 - strength, 1 + strength, 5))
    moment = np.concatenate([[0], np.cumsum(speed[1:])])
    moment *= (len(frames) - 1) / moment[-1]
    before = np.minimum(moment.astype(np.int64), len(frames) - 1)
    after = np.minimum(before + 1, len(frames) - 1)
    share = (moment - before).astype(np.float32)[:, None]
    nearest = np.where(share[:, 0] < 0.5, before, after)
    mixed = frames[before] * (1 - share) + frames[after] * share
    if mask is None:
        return mixed, None
    both = (mask[before] & mask[after])[:, :, None]
    shape = (*mask[nearest].shape, -1)
    chosen = np.where(both, mixed.reshape(shape), frames[nearest].reshape(shape))
    return chosen.reshape(mixed.shape), mask[nearest]
