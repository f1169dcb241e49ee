"""Ranks that need the same features at once: ``features_on_ranks.py CACHE``; each rank notes what it did."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from accelerando.base.errors import errors_in_one_line
from accelerando.train.accelerator import make_accelerator
from accelerando.train.features import cached_features


def main() -> None:
    cache = Path(sys.argv[1])
    accelerator = make_accelerator(0, None)
    computed = []

    def compute() -> np.ndarray:
        """Every rank has a part, and gets all."""
        import torch

        computed.append(time.time())
        time.sleep(0.5)
        mine = torch.full((2, 3), float(accelerator.process_index), device=accelerator.device)
        return accelerator.gather(mine).cpu().numpy()

    values = cached_features(accelerator, cache, {"weights": "w"}, compute)
    name = f"{sys.argv[2] if len(sys.argv) > 2 else 'rank'}{accelerator.process_index}.json"
    Path(name).write_text(json.dumps({"computed": len(computed), "values": values.tolist()}))
    accelerator.end_training()


if __name__ == "__main__":
    with errors_in_one_line():
        main()
