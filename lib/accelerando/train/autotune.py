"""Finds the largest micro-batch that fits into memory, by trying."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from accelerando.base.errors import UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

CPU_SHARE = 0.5  # of the memory that is free at the start
GPU_SHARE = 0.9  # of the GPU's memory
STATES = 3  # a gradient and two optimizer states per trained parameter, which are allocated later


def find_micro_batch_size(
    accelerator: Accelerator,
    model: torch.nn.Module,
    make_batch: Callable[[int], dict[str, torch.Tensor]],
    loss: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor],
    most: int,
    flag: str = "--micro_batch_size 0",
    hint: str = "--activation_checkpointing, or --amp bf16",
) -> int:
    """The largest power of two, at most ``most``, whose forward and backward pass fit; the same on every process.

    ``make_batch(n)`` returns n samples of the maximal size; ``loss(model, batch)`` is the scalar for backward. Sizes
    are tried on the model before it is wrapped, in the precision of training, with memory reserved for gradients and
    optimizer states. Weights, gradients and random states are not changed. On a CPU the search stops if the next size
    would need more than half of the free memory (in a container: of its limit), divided by the processes of this
    machine, or if a doubled size no longer increases the speed.

    Raises:
        UserError: not even one sample fits.
    """
    import torch

    from accelerando.base.log import log
    from accelerando.base.rng import random_state, set_random_state

    model.to(accelerator.device)
    state, training = random_state(accelerator.device), model.training
    on_gpu = accelerator.device.type == "cuda"
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if on_gpu:
        room = GPU_SHARE * torch.cuda.mem_get_info()[0] - STATES * weights
    else:
        room = CPU_SHARE * free_memory() / local - STATES * weights
    best, size, speed = 0, 1, 0.0
    model.train()
    try:
        while size <= most:
            needed, seconds = _try(accelerator, model, loss, make_batch(size))
            fits = needed is not None and needed <= room
            if not fits or (not on_gpu and best and size / seconds < 1.05 * speed):
                break
            best, speed = size, size / seconds
            if not on_gpu and 2 * needed > room:
                break
            size *= 2
    finally:
        model.train(training)
        set_random_state(accelerator.device, state)
        if on_gpu:
            torch.cuda.empty_cache()
    sizes = torch.tensor([best], device=accelerator.device)
    if accelerator.num_processes > 1:
        sizes = accelerator.gather(sizes)
    best = int(sizes.min())
    if not best:
        raise UserError(f"{flag}: not even one sample fits; try {hint}")
    log.info("Micro-batch size %d: the largest power of two that fits and increases the speed", best)
    return best


def choose_num_workers() -> int:
    """The number of worker processes per training process that the cores of this machine allow, at most 8."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(8, len(os.sched_getaffinity(0)) // local - 1))


def _try(
    accelerator: Accelerator,
    model: torch.nn.Module,
    loss: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor],
    batch: dict[str, torch.Tensor],
) -> tuple[float | None, float]:
    """Bytes (None: out of memory) and seconds of a forward and backward pass; gradients are discarded."""
    import time

    import torch

    from accelerando.train.batches import to_device

    on_gpu = accelerator.device.type == "cuda"
    batch = to_device(batch, accelerator.device)
    watch = _Watch(on_gpu)
    started = time.perf_counter()
    try:
        with accelerator.autocast():
            loss(model, batch).backward()
        if on_gpu:
            torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return None, float("inf")
    except RuntimeError as error:
        if "alloc" not in str(error):
            raise
        return None, float("inf")
    finally:
        for parameter in model.parameters():
            parameter.grad = None
    return watch.peak_bytes(), time.perf_counter() - started


class _Watch:
    """Measures the peak memory from its creation to :meth:`peak_bytes`."""

    def __init__(self, on_gpu: bool) -> None:
        import torch

        self.on_gpu = on_gpu
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            # Writing 5 resets the peak of this process to its current use, see proc(5).
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                raise UserError(
                    "this system does not report the memory in use: set the batch size, such as 64"
                ) from None
            self.before = _status("VmRSS")

    def peak_bytes(self) -> float:
        """The peak in bytes, above the memory in use at the start."""
        import torch

        return torch.cuda.max_memory_allocated() - self.before if self.on_gpu else _status("VmHWM") - self.before


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def free_memory() -> float:
    """The free memory of this machine or container, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, float(limit.read_text()) - float(used.read_text()))
    return free
