"""Examples of image-text retrieval for a report: the best images for a few captions, before and after training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from accelerando.base.files import write_text
from accelerando.data.decode import thumbnail
from accelerando.data.pairs import Gallery, PairSource
from accelerando.report.metrics import right_ranks
from accelerando.train.state import Run

EXAMPLES = 8  # queries in a report
SHOWN = 5  # images for each query


def retrieval_examples(found: Mapping[str, Any], gallery: Gallery) -> list[dict[str, Any]]:
    """The best images for a few captions: dicts with ``query`` (row of the caption) and ``results``.

    ``found``: ``image`` [I, d] and ``text`` [T, d] of the gallery, ``image_valid`` [I] and ``readable`` [n], as the
    script's evaluation returns them. The captions are evenly spaced among the readable ones, so that they are the same
    before and after training. A result is (row of the image, score, whether it is correct).
    """
    pairs = np.flatnonzero(found["readable"])
    if not len(pairs):
        return []
    chosen = pairs[np.unique(np.linspace(0, len(pairs) - 1, min(EXAMPLES, len(pairs))).astype(int))]
    readable = np.flatnonzero(found["image_valid"])
    examples = []
    for pair in chosen:
        caption = gallery.text_of[pair]
        scores = found["image"][readable] @ found["text"][caption]
        best = np.argsort(-scores, kind="stable")[:SHOWN]
        right = set(gallery.image_of[gallery.text_of == caption].tolist())
        results = [(int(gallery.image_rows[readable[n]]), float(scores[n]), int(readable[n]) in right) for n in best]
        examples.append({"query": int(gallery.text_rows[caption]), "results": results})
    return examples


def pair_ranks(found: Mapping[str, Any], gallery: Gallery) -> dict[str, np.ndarray]:
    """For each readable pair the rank of the image's best caption (``image_to_text``) and of the caption's best image
    (``text_to_image``), int64 [r]; ``found`` as for :func:`retrieval_examples`."""
    readable = found["readable"]
    images, image_of = np.unique(gallery.image_of[readable], return_inverse=True)
    texts, text_of = np.unique(gallery.text_of[readable], return_inverse=True)
    image, text = found["image"][images], found["text"][texts]
    return {
        "image_to_text": right_ranks(image, text, image_of, text_of)[image_of],
        "text_to_image": right_ranks(text, image, text_of, image_of)[text_of],
    }


def keep_examples(run: Run, name: str, split: str, examples: Sequence[dict[str, Any]]) -> None:
    """Writes examples beside the plots, for the report at the end of the run, perhaps by another process."""
    if run.accelerator.is_main_process:
        write_text(run.directory / "plots" / f"examples_{name}_{split}.json", json.dumps(examples) + "\n")


def example_rows(run: Run, source: PairSource, split: str, titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows for :func:`report.page.retrieval`: captions with thumbnails of the retrieved images.

    ``titles``: name passed to :func:`keep_examples` -> heading.
    """
    kept = {}
    for name, title in titles.items():
        path = run.directory / "plots" / f"examples_{name}_{split}.json"
        kept[title] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return rows_of_examples(source, kept)


def rows_of_examples(source: PairSource, examples: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows for :func:`report.page.retrieval`; ``examples``: heading -> what :func:`retrieval_examples` found."""
    thumbnails: dict[int, bytes] = {}
    rows: dict[int, dict[str, Any]] = {}
    for title, found in examples.items():
        for example in found:
            caption = " ".join(source.read(example["query"])[1].decode("utf-8", "replace").split())
            row = rows.setdefault(example["query"], {"query": caption, "strips": {}})
            for image, _, _ in example["results"]:
                if image not in thumbnails:
                    thumbnails[image] = thumbnail(source.read(image)[0])
            row["strips"][title] = [(thumbnails[image], score, right) for image, score, right in example["results"]]
    return list(rows.values())
