"""Runs a script and keeps the gradient of each optimizer step: ``window_gradients.py FOLDER SCRIPT [ARGUMENT ...]``.

Each rank writes ``rank0_step1.safetensors`` and so on, gradients by the name of their parameter, before they are used. Of
a sharded model they are this rank's shards, and the file's metadata says how each parameter is placed on which mesh.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import accelerate
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

NAMES: dict[int, str] = {}
prepare, step = accelerate.Accelerator.prepare, AcceleratedOptimizer.step
taken = 0


def prepare_and_name(self: accelerate.Accelerator, *objects: object, **options: object) -> object:
    """Notes the parameters' names, after FSDP has replaced them."""
    prepared = prepare(self, *objects, **options)
    for thing in objects:
        if isinstance(thing, torch.nn.Module):
            NAMES.update({id(parameter): name for name, parameter in thing.named_parameters()})
    return prepared


def keep_and_step(self: AcceleratedOptimizer, closure: object = None) -> object:
    """Writes what this step is about to use."""
    global taken
    taken += 1
    parameters = [parameter for group in self.param_groups for parameter in group["params"]]
    gradients = {NAMES[id(p)]: p.grad.detach() for p in parameters if p.grad is not None}
    shards = {
        name: g.to_local().contiguous() if isinstance(g, DTensor) else g.contiguous() for name, g in gradients.items()
    }
    placed = {
        NAMES[id(p)]: f"{p.placements} of {p.device_mesh.mesh.tolist()}" for p in parameters if isinstance(p, DTensor)
    }
    save_file(shards, Path(FOLDER) / f"rank{os.environ.get('RANK', '0')}_step{taken}.safetensors", metadata=placed)
    return step(self, closure)


if __name__ == "__main__":
    FOLDER = sys.argv[1]
    accelerate.Accelerator.prepare = prepare_and_name
    AcceleratedOptimizer.step = keep_and_step
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
