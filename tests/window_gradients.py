"""Runs a script and keeps the gradient of each optimizer step: ``window_gradients.py FOLDER SCRIPT [ARGUMENT ...]``.

Each rank writes ``rank0_step1.safetensors`` and so on, gradients by the name of their parameter, before they are used.
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

NAMES: dict[int, str] = {}
prepare, step = accelerate.Accelerator.prepare, AcceleratedOptimizer.step
taken = 0


def prepare_and_name(self: accelerate.Accelerator, *objects: object, **options: object) -> object:
    """Notes the parameters' names."""
    for thing in objects:
        if isinstance(thing, torch.nn.Module):
            NAMES.update({id(parameter): name for name, parameter in thing.named_parameters()})
    return prepare(self, *objects, **options)


def keep_and_step(self: AcceleratedOptimizer, closure: object = None) -> object:
    """Writes what this step is about to use."""
    global taken
    taken += 1
    parameters = [parameter for group in self.param_groups for parameter in group["params"]]
    gradients = {NAMES[id(p)]: p.grad.detach().contiguous() for p in parameters if p.grad is not None}
    save_file(gradients, Path(FOLDER) / f"rank{os.environ.get('RANK', '0')}_step{taken}.safetensors")
    return step(self, closure)


if __name__ == "__main__":
    FOLDER = sys.argv[1]
    accelerate.Accelerator.prepare = prepare_and_name
    AcceleratedOptimizer.step = keep_and_step
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
