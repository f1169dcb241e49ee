"""Batches from worker processes through memory that is shared from the start.

torch creates a shared memory file for each tensor of each batch and requests it from the worker over a socket, which
takes longer than loading a cached image, mostly in the kernel. Here a worker writes into one of its slots, and the
reader copies from it. The memory has no name, so a killed process leaves nothing behind, and a container's limit on
/dev/shm does not apply.
"""

from __future__ import annotations

import itertools
import math
import mmap
import multiprocessing
import resource
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Layout = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]  # dtype, shape, stride, start in bytes

SLOT = 2**27  # bytes of address space; pages are allocated only when they are written
ALIGNED = 64

_open: WeakValueDictionary[int, Slots] = WeakValueDictionary()
_numbers = itertools.count()


class Slots:
    """Shared memory for the batches of ``workers`` forked processes, each of which prepares up to ``ahead``.

    A worker's batch is copied when it is received, and only then is the worker asked for another one, so it can use its
    slots in turn. ``pin``: the copies are page-locked.
    """

    def __init__(self, workers: int, ahead: int, pin: bool) -> None:
        import torch

        self.ahead, self.pin = ahead, pin
        memory = np.frombuffer(mmap.mmap(-1, workers * ahead * SLOT), np.uint8)
        self.slots = torch.from_numpy(memory).view(workers * ahead, SLOT)
        self.number = next(_numbers)
        self._batches = 0  # batches of this worker so far
        _open[self.number] = self

    def put(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | InSlot:
        """In a worker: ``batch`` in a slot, or unchanged if it is too large or has other values than plain tensors."""
        import torch

        worker = torch.utils.data.get_worker_info()
        if worker is None or not all(map(_is_plain, batch.values())):
            return batch
        layouts, start = {}, 0
        for name, tensor in batch.items():
            stride = torch.empty_like(tensor, device="meta").stride()  # the same memory format, without gaps
            layouts[name] = tensor.dtype, tuple(tensor.shape), stride, start
            start += -(-tensor.nbytes // ALIGNED) * ALIGNED
        if start > SLOT:
            return batch
        slot = worker.id * self.ahead + self._batches % self.ahead
        self._batches += 1
        for name, layout in layouts.items():
            self._tensor(slot, *layout).copy_(batch[name])
        return InSlot(self.number, slot, layouts)

    def take(self, slot: int, layouts: dict[str, Layout]) -> dict[str, torch.Tensor]:
        """A copy of the batch in a slot."""
        import torch

        batch = {}
        for name, layout in layouts.items():
            dtype, shape, stride, _ = layout
            try:
                batch[name] = torch.empty_strided(shape, stride, dtype=dtype, pin_memory=self.pin)
            except RuntimeError:  # memory cannot be page-locked; torch's own pinning reports this
                batch[name] = torch.empty_strided(shape, stride, dtype=dtype)
            batch[name].copy_(self._tensor(slot, *layout))
        return batch

    def _tensor(
        self, slot: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], start: int
    ) -> torch.Tensor:
        length = math.prod(shape) * dtype.itemsize
        return self.slots[slot, start : start + length].view(dtype).as_strided(shape, stride)


def _is_plain(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested


class InSlot:
    """A batch in a slot; unpickling it in the reader gives the dict of tensors."""

    def __init__(self, number: int, slot: int, layouts: dict[str, Layout]) -> None:
        self.place = number, slot, layouts

    def __reduce__(self) -> tuple[Callable[..., dict[str, torch.Tensor]], tuple[int, int, dict[str, Layout]]]:
        return _take, self.place


def _take(number: int, slot: int, layouts: dict[str, Layout]) -> dict[str, torch.Tensor]:
    return _open[number].take(slot, layouts)


def slots_for(workers: int, ahead: int, pin: bool) -> Slots | None:
    """Slots for the workers of a loader; None if processes are not forked, or if the address space, of which slots need
    much, is limited (``ulimit -v``)."""
    if multiprocessing.get_start_method() != "fork":
        return None
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return None
    try:
        return Slots(workers, ahead, pin)
    except OSError:  # no memory overcommit: torch's own way is used
        return None
