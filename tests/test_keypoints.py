"""Normalisation by the body, and what each augmentation does to a clip."""

from __future__ import annotations

import numpy as np
import pytest

from accelerando.data.keypoints import (
    LEFT_HAND,
    MIRROR,
    RIGHT_HAND,
    WIDTH,
    ClipAugmentation,
    normalise_by_body,
    time_warp,
)


def clip(length: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A smooth random clip with shoulders, and its mask."""
    rng = np.random.default_rng(seed)
    points = np.cumsum(0.01 * rng.standard_normal((length, 78, 2)), axis=0) + rng.uniform(0.3, 0.7, (78, 2))
    points[:, 11], points[:, 12] = (0.62, 0.5), (0.4, 0.52)
    mask = rng.random((length, 78)) > 0.2
    mask[:, 11:13] = True
    return points.reshape(length, WIDTH).astype(np.float32), mask


def test_the_body_is_the_unit_wherever_and_however_large_it_stands() -> None:
    frames, mask = clip()
    expected, seen = normalise_by_body(frames, mask)
    points = expected.reshape(-1, 78, 2)
    assert points[:, 11:13].mean(axis=1) == pytest.approx(0, abs=1e-5)
    assert np.linalg.norm(points[0, 11] - points[0, 12]) == pytest.approx(1, abs=1e-5)
    assert (points[~mask] == 0).all()
    moved = (frames.reshape(-1, 78, 2) * 0.4 + [0.3, 0.1]).reshape(frames.shape)
    assert normalise_by_body(moved, mask)[0] == pytest.approx(expected, abs=1e-4)
    assert (seen == mask).all()


@pytest.mark.parametrize("kind", ["no shoulders", "nothing seen", "no mask", "one frame"])
def test_what_lacks_something_is_finite(kind: str) -> None:
    frames, mask = clip(1 if kind == "one frame" else 12)
    if kind == "no shoulders":
        mask[:, 11:13] = False
    if kind == "nothing seen":
        mask[:] = False
    normalised, seen = normalise_by_body(frames, None if kind == "no mask" else mask)
    assert np.isfinite(normalised).all()
    assert np.abs(normalised).max() < 100
    assert seen.shape == (len(frames), 78)
    if kind == "no mask":
        assert seen.all()
    if kind == "nothing seen":
        assert not normalised.any()


def test_mirror_exchanges_the_sides_and_twice_is_nothing() -> None:
    frames, mask = normalise_by_body(*clip())
    mirror = ClipAugmentation(mirror=1.0)
    once, once_mask = mirror(frames, mask, np.random.default_rng(0))
    points, mirrored = frames.reshape(-1, 78, 2), once.reshape(-1, 78, 2)
    assert mirrored[:, LEFT_HAND, 0] == pytest.approx(-points[:, RIGHT_HAND, 0])
    assert mirrored[:, LEFT_HAND, 1] == pytest.approx(points[:, RIGHT_HAND, 1])
    assert mirrored[:, 15] == pytest.approx(points[:, 16] * [-1, 1])  # the wrists of the pose
    assert mirrored[:, 0] == pytest.approx(points[:, 0] * [-1, 1])  # the nose stays the nose
    assert (once_mask[:, 46:67] == mask[:, 25:46]).all()
    twice, twice_mask = mirror(once, once_mask, np.random.default_rng(1))
    assert twice == pytest.approx(frames)
    assert (twice_mask == mask).all()
    assert sorted(MIRROR) == list(range(78))
    assert (MIRROR[MIRROR] == np.arange(78)).all()


def test_about_half_are_mirrored() -> None:
    frames, mask = normalise_by_body(*clip(4))
    augment = ClipAugmentation(mirror=0.5)
    changed = sum((augment(frames, mask, np.random.default_rng(seed))[0] != frames).any() for seed in range(200))
    assert 70 < changed < 130


def test_rotation_scale_and_shift_move_all_points_alike() -> None:
    frames, mask = normalise_by_body(*clip())
    points = frames.reshape(-1, 78, 2)
    distance = np.linalg.norm(points[3, 20] - points[3, 30])
    for seed in range(5):
        turned, _ = ClipAugmentation(rotation=20)(frames, np.ones_like(mask), np.random.default_rng(seed))
        turned = turned.reshape(-1, 78, 2)
        assert np.linalg.norm(turned, axis=2) == pytest.approx(np.linalg.norm(points, axis=2), abs=1e-4)
        one, other = points[0, 5] / np.linalg.norm(points[0, 5]), turned[0, 5] / np.linalg.norm(turned[0, 5])
        assert 0 < np.rad2deg(np.arccos(np.clip(one @ other, -1, 1))) <= 20.01
        scaled, _ = ClipAugmentation(scale=0.3)(frames, np.ones_like(mask), np.random.default_rng(seed))
        ratio = np.linalg.norm(scaled.reshape(-1, 78, 2)[3, 20] - scaled.reshape(-1, 78, 2)[3, 30]) / distance
        assert 0.7 <= ratio <= 1.3
        assert scaled == pytest.approx(frames * ratio, abs=1e-4)
        shifted, _ = ClipAugmentation(shift=0.5)(frames, np.ones_like(mask), np.random.default_rng(seed))
        step = (shifted - frames).reshape(-1, 2)
        assert step == pytest.approx(np.broadcast_to(step[0], step.shape), abs=1e-5)
        assert 0 < np.abs(step[0]).max() <= 0.5


def test_noise_time_mask_and_frame_drop() -> None:
    frames, mask = normalise_by_body(*clip(200))
    full = np.ones_like(mask)
    noisy, _ = ClipAugmentation(noise=0.05)(frames, full, np.random.default_rng(0))
    assert (noisy - frames).std() == pytest.approx(0.05, rel=0.05)
    spans = []
    for seed in range(50):
        hidden, kept = ClipAugmentation(time_mask=0.3)(frames, full, np.random.default_rng(seed))
        gone = np.flatnonzero(~kept.any(axis=1))
        assert (hidden[gone] == 0).all()
        assert (hidden[kept.all(axis=1)] == frames[kept.all(axis=1)]).all()
        assert not len(gone) or gone[-1] - gone[0] + 1 == len(gone)
        spans.append(len(gone))
    assert max(spans) <= 60
    assert max(spans) > 40
    dropped, _ = ClipAugmentation(frame_drop=0.25)(frames, full, np.random.default_rng(0))
    assert 120 < len(dropped) < 180
    rows = {row.tobytes() for row in frames}
    assert all(row.tobytes() in rows for row in dropped)  # in their order, none changed
    assert len(ClipAugmentation(frame_drop=0.9)(frames[:3], full[:3], np.random.default_rng(0))[0]) >= 1


def test_time_warp_changes_the_speed_and_nothing_else() -> None:
    frames, mask = normalise_by_body(*clip(100))
    lengths = set()
    for seed in range(30):
        warped, seen = time_warp(frames, np.ones_like(mask), 0.3, np.random.default_rng(seed))
        lengths.add(len(warped))
        assert 70 <= len(warped) <= 130
        assert warped[0] == pytest.approx(frames[0])
        assert warped[-1] == pytest.approx(frames[-1], abs=1e-4)
        assert warped.min() >= frames.min() - 1e-5
        assert warped.max() <= frames.max() + 1e-5
        assert seen.shape == (len(warped), 78)
    assert len(lengths) > 10
    ramp = np.linspace(0, 1, 50, dtype=np.float32)[:, None]
    moments = time_warp(ramp, None, 0.5, np.random.default_rng(3))[0][:, 0]
    assert (np.diff(moments) > 0).all()  # never backwards
    assert np.diff(moments).std() > 1e-4  # unevenly
    # A point that is hidden on one side is not mixed with its nought.
    hidden = np.ones((2, 78), bool)
    hidden[1, 5] = False
    two = np.ones((2, WIDTH), np.float32) * hidden.repeat(2, axis=1)
    warped, seen = time_warp(two, hidden, 0.5, np.random.default_rng(0))
    values = warped.reshape(len(warped), 78, 2)[:, 5]
    assert set(np.unique(values)) <= {0.0, 1.0}
    assert (values[:, 0] == seen[:, 5]).all()


def test_what_is_hidden_stays_nought_under_every_change() -> None:
    frames, mask = normalise_by_body(*clip())
    everything = ClipAugmentation(15, 0.2, 0.2, 0.02, 0.3, 0.2, 0.1, 0.5)
    for seed in range(20):
        changed, seen = everything(frames, mask, np.random.default_rng(seed))
        assert len(changed) == len(seen)
        assert changed.dtype == np.float32
        assert (changed.reshape(-1, 78, 2)[~seen] == 0).all()
        again, _ = everything(frames, mask, np.random.default_rng(seed))
        assert (changed == again).all()


def test_without_any_the_clip_is_itself() -> None:
    frames, mask = normalise_by_body(*clip())
    same, seen = ClipAugmentation()(frames, mask, np.random.default_rng(0))
    assert (same == frames).all()
    assert (seen == mask).all()


def test_other_channels_are_scaled_and_warped() -> None:
    frames = np.random.default_rng(0).standard_normal((51, 24)).astype(np.float32)
    changed, mask = ClipAugmentation(scale=0.2, noise=0.1, time_warp=0.2)(frames, None, np.random.default_rng(0))
    assert mask is None
    assert changed.shape[1] == 24
