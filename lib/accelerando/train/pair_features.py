"""The features of the images of pairs, from an image tower that is not trained: computed once for each image file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from accelerando.data.digest import digest
from accelerando.data.pairs import ImageFeatures, PairDataset, PairSource, PairSubset, rows_of_source
from accelerando.train.evaluation import EvaluationRows
from accelerando.train.features import cached_features

if TYPE_CHECKING:
    import torch

    from accelerando.data.collate import PairCollate
    from accelerando.data.transforms import ImageTransform
    from accelerando.train.state import Run


def cached_image_features(
    run: Run,
    model: torch.nn.Module,
    compute: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    splits: Mapping[str, PairSource],
    transform: ImageTransform,
    collate: PairCollate,
    batch_size: int,
    num_workers: int,
    cache: Path,
    key: Mapping[str, object],
) -> dict[str, ImageFeatures]:
    """For each split the features of its images: ``compute`` of a batch is float32 [B, D]; ``model`` is what it uses.

    Splits of the same source share an array. ``key`` names weights and precision; transform and files are added. Call
    it on every process.
    """
    import torch

    model.to(run.accelerator.device).eval()
    parts = {split: rows_of_source(pairs) for split, pairs in splits.items()}
    found = {}
    for source in {id(source): source for source, _ in parts.values()}.values():
        mine = {split: rows for split, (own, rows) in parts.items() if own is source}
        numbers = source.image_numbers()
        used = np.unique(np.concatenate(list(mine.values())))
        known, first = np.unique(numbers[used], return_index=True)
        images = PairDataset(PairSubset(source, used[first]), transform, parts="image")

        def embedded(images: PairDataset = images) -> np.ndarray:
            rows = EvaluationRows(run, model, images, collate, batch_size, "images, once", num_workers=num_workers)
            with torch.no_grad():
                for batch in rows:
                    with run.accelerator.autocast():
                        rows.add(features=compute(batch).float(), valid=batch["valid"])
            columns = rows.gathered()
            return np.where(columns["valid"][:, None] > 0, columns["features"], np.float32(np.nan))

        shape = {"size": transform.size, "shorter": transform.shorter, "square": transform.square,
                 "mode": transform.mode, "exact": transform.exact}  # fmt: skip
        whole = {**key, "transform": shape, "files": source.image_facts(), "rows": digest(used[first])}
        values = cached_features(run.accelerator, cache, whole, embedded)
        place = np.full(int(numbers.max()) + 1, -1)
        place[known] = np.arange(len(known))
        found |= {split: ImageFeatures(values, place[numbers[rows]]) for split, rows in mine.items()}
    return found
