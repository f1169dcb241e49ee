"""Runs a script with FSDP2 on CPU ranks: ``torchrun --nproc_per_node 2 tests/fsdp_cpu.py SCRIPT [ARGUMENT ...]``.

Accelerate turns FSDP on only for the device types it lists, and the CPU is not among them; torch's ``fully_shard`` runs
on gloo all the same. So the state's type is changed to FSDP as soon as it exists. For tests alone.
"""

import functools
import os
import runpy
import sys

os.environ.update(
    ACCELERATE_USE_CPU="true",
    ACCELERATE_USE_FSDP="true",
    FSDP_VERSION="2",
    FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_RESHARD_AFTER_FORWARD="true",
    FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
    ACCELERATE_MIXED_PRECISION=os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
)

from accelerate.state import AcceleratorState, DistributedType, PartialState

original = AcceleratorState.__init__


def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs) -> None:
    fresh = not AcceleratorState._shared_state
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fresh and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = init_with_fsdp

if backend := os.environ.get("TEST_COMPILE_BACKEND"):
    import torch

    torch.compile = functools.partial(torch.compile, backend=backend)

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
