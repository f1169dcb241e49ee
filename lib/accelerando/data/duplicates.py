"""Duplicate and near-duplicate images: the same pixels, or the image resized, recompressed or slightly brightened."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

SIDE = 16  # pixels: side of the thumbnails on which candidates are compared
# Differences of thumbnails, in standard deviations. For photos that were resized, compressed or brightened, the root
# mean square is 0.01 to 0.1 and the maximum over pixels 0.03 to 0.3; for the most similar of 1,797 digits 0.09 and 0.4.
MAX_RMS, MAX_DIFFERENCE = 0.1, 0.35
MAX_CONTRAST_RATIO = 1.5  # between the contrasts of duplicates
MAX_BRIGHTNESS_SHIFT = 48.0  # difference in mean brightness of duplicates, 0 to 255
MIN_STD = 6.0  # 0 to 255; an image with a smaller standard deviation is too plain to compare
MIN_BITS = 4  # a hash with fewer bits set, or unset, is not distinctive: plain colours and gradients


class Fingerprint(NamedTuple):
    """What is kept of an image to find its duplicates."""

    digest: bytes  # of size and pixels
    hash: int  # 64 bits, a difference hash: is a pixel brighter than the one to its left?
    small: bytes  # uint8 [SIDE, SIDE, 3]


def fingerprint(pixels: np.ndarray) -> Fingerprint:
    """The fingerprint of an image, uint8 [H, W, 3]."""
    from PIL import Image

    digest = hashlib.sha256(str(pixels.shape).encode() + b"\0")
    digest.update(np.ascontiguousarray(pixels))
    image = Image.fromarray(pixels)
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    # A margin of two levels: uniform backgrounds give the same bits whatever the compression.
    bits = np.packbits(grey[:, 1:] > grey[:, :-1] + 2)
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))
    return Fingerprint(digest.digest()[:16], int.from_bytes(bits.tobytes(), "big"), small.tobytes())


def near_pairs(hashes: np.ndarray, most_bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each pair of rows whose hashes (uint64 [n]) differ in up to ``most_bits`` bits, once, as pairs of int arrays.

    The bits are divided into ``most_bits + 1`` bands, so that the hashes of a pair agree in at least one band: only
    rows that share a band are compared, with one vector operation for each distance of two rows in a sorted bucket.
    """
    bands = most_bits + 1
    # Interleaved bits: otherwise a band would cover only the top of the images, which is often white in all of them.
    masks = [np.uint64(sum(1 << bit for bit in range(band, 64, bands))) for band in range(bands)]
    for band, mask in enumerate(masks):
        keys = hashes & mask
        order = np.argsort(keys, kind="stable")
        keys, ordered = keys[order], hashes[order]
        ends = np.searchsorted(keys, keys, side="right")
        first = np.arange(len(keys))
        for step in range(1, len(keys)):
            first = first[first + step < ends[first]]
            if not len(first):
                break
            differ = ordered[first] ^ ordered[first + step]
            hits = np.flatnonzero(np.bitwise_count(differ) <= most_bits)
            for earlier in masks[:band]:  # pairs that an earlier band has found
                hits = hits[(differ[hits] & earlier) != 0]
            if len(hits):
                yield order[first[hits]], order[first[hits] + step]


def duplicate_groups(prints: Sequence[Fingerprint], most_bits: int) -> np.ndarray:
    """Group of each image, int [n].

    Images in a group have the same pixels, or hashes that differ in up to ``most_bits`` bits (0: only equal pixels) and
    thumbnails that agree apart from brightness and contrast, directly or through other images of the group. A group's
    number is the row of its first image.
    """
    digests = np.array([found.digest for found in prints], "S16")
    _, first, same = np.unique(digests, return_index=True, return_inverse=True)
    pairs = zip(range(len(prints)), first[same].tolist(), strict=True)
    if not most_bits:
        return join_pairs(len(prints), pairs)
    hashes = np.array([prints[row].hash for row in first], np.uint64)
    small = np.frombuffer(b"".join(prints[row].small for row in first), np.uint8).reshape(len(first), -1)
    near = ((int(first[one]), int(first[other])) for one, other in _alike_pairs(hashes, small, most_bits))
    return join_pairs(len(prints), itertools.chain(pairs, near))


def join_pairs(count: int, pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """The smallest member of each member's set, int [count], after the sets of every pair were merged (union-find)."""
    links = list(range(count))

    def root(member: int) -> int:
        while links[member] != member:
            links[member] = links[links[member]]
            member = links[member]
        return member

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        links[high] = low
    return np.array([root(member) for member in range(count)], np.int64)


def _alike_pairs(hashes: np.ndarray, small: np.ndarray, most_bits: int) -> Iterator[tuple[int, int]]:
    """Pairs of rows with similar hashes and similar thumbnails ``small``, uint8 [n, SIDE * SIDE * 3]."""
    mean, spread, coarse = (np.empty(shape, np.float32) for shape in (len(small), len(small), (len(small), 48)))
    plain = np.empty(len(small), bool)
    for start in range(0, len(small), 4096):
        part = small[start : start + 4096].astype(np.float32).reshape(-1, SIDE, SIDE, 3)
        rows = slice(start, start + len(part))
        mean[rows], spread[rows] = part.mean((1, 2, 3)), part.std((1, 2, 3))
        plain[rows] = part.std((1, 2)).max(1) < MIN_STD
        blocks = part.reshape(-1, 4, SIDE // 4, 4, SIDE // 4, 3).mean((2, 4)).reshape(-1, 48)
        coarse[rows] = (blocks - mean[rows, None]) / np.maximum(spread[rows, None], MIN_STD)
    spread = np.maximum(spread, MIN_STD)
    bits = np.bitwise_count(hashes)
    rows = np.flatnonzero(~plain & (bits >= MIN_BITS) & (bits <= 64 - MIN_BITS))

    def scaled(chosen: np.ndarray) -> np.ndarray:
        return (small[chosen].astype(np.float32) - mean[chosen, None]) / spread[chosen, None]

    for ones, others in near_pairs(hashes[rows], most_bits):
        for start in range(0, len(ones), 8192):
            one, other = rows[ones[start : start + 8192]], rows[others[start : start + 8192]]
            ratio = spread[one] / spread[other]
            near = (ratio < MAX_CONTRAST_RATIO) & (ratio > 1 / MAX_CONTRAST_RATIO)
            near &= np.abs(mean[one] - mean[other]) < MAX_BRIGHTNESS_SHIFT
            one, other = one[near], other[near]
            # Cheap first: the mean square over block means is never larger than over all pixels.
            near = np.square(coarse[one] - coarse[other]).mean(1) < MAX_RMS**2
            one, other = one[near], other[near]
            differ = np.abs(scaled(one) - scaled(other)).reshape(len(one), SIDE * SIDE, 3)
            near = (np.square(differ).mean((1, 2)) < MAX_RMS**2) & (differ.mean(2).max(1) < MAX_DIFFERENCE)
            yield from zip(one[near].tolist(), other[near].tolist(), strict=True)
