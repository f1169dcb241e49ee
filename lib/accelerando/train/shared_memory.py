"""Batches from worker processes through memory that all of them share from the start.

torch's own way makes a file of shared memory for each tensor of each batch, and asks the worker for it over a socket:
that takes longer than a cached picture does, most of it in the kernel. Here a worker writes into one of its slots, and
the reader copies out of it. The memory has no name, so nothing is left behind where a process is killed, and a
container's limit on /dev/shm does not matter.
"""

from __future__ import annotations

import itertools
import math
import mmap
import multiprocessing
import resource
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np

if TYPE_CHECKING:
    import torch

SLOT = 2**27  # bytes; a page of it becomes memory only when it is written to
ALIGNED = 64

_open: WeakValueDictionary[int, Slots] = WeakValueDictionary()
_numbers = itertools.count()


class Slots:
    """Shared memory for the batches of ``workers`` forked processes, of which each prepares up to ``ahead``.

    A worker's batch is copied out as it is received, and it is asked for another one only then: it may use its slots
    in turn. ``pin``: what is copied out is page-locked.
    """

    def __init__(self, workers: int, ahead: int, pin: bool) -> None:
        import torch

        self.ahead, self.pin = ahead, pin
        memory = np.frombuffer(mmap.mmap(-1, workers * ahead * SLOT), np.uint8)
        self.slots = torch.from_numpy(memory).view(workers * ahead, SLOT)
        self.number = next(_numbers)
        self._batches = 0  # of this worker so far
        _open[self.number] = self

    def put(self, batch: dict[str, Any]) -> dict[str, Any] | InSlot:
        """In a worker: ``batch`` in a slot; itself where it is too large, or not of plain tensors alone."""
        import torch

        worker = torch.utils.data.get_worker_info()
        if worker is None or not all(map(_is_plain, batch.values())):
            return batch
        layouts, start = {}, 0
        for name, tensor in batch.items():
            stride = torch.empty_like(tensor, device="meta").stride()  # of the same memory format, without gaps
            layouts[name] = tensor.dtype, tuple(tensor.shape), stride, start
            start += -(-tensor.nbytes // ALIGNED) * ALIGNED
        if start > SLOT:
            return batch
        slot = worker.id * self.ahead + self._batches % self.ahead
        self._batches += 1
        for name, layout in layouts.items():
            self._tensor(slot, *layout).copy_(batch[name])
        return InSlot(self.number, slot, layouts)

    def take(self, slot: int, layouts: dict[str, tuple[Any, ...]]) -> dict[str, torch.Tensor]:
        """A copy of the batch in a slot."""
        import torch

        batch = {}
        for name, layout in layouts.items():
            dtype, shape, stride, _ = layout
            try:
                batch[name] = torch.empty_strided(shape, stride, dtype=dtype, pin_memory=self.pin)
            except RuntimeError:  # nothing can be locked: torch tries it again, and says so
                batch[name] = torch.empty_strided(shape, stride, dtype=dtype)
            batch[name].copy_(self._tensor(slot, *layout))
        return batch

    def _tensor(
        self, slot: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], start: int
    ) -> torch.Tensor:
        length = math.prod(shape) * dtype.itemsize
        return self.slots[slot, start : start + length].view(dtype).as_strided(shape, stride)


def _is_plain(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested


class InSlot:
    """A batch in a slot; it arrives in the reader as the dict of tensors that it was."""

    def __init__(self, *place: Any) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return _take, self.place


def _take(number: int, slot: int, layouts: dict[str, tuple[Any, ...]]) -> dict[str, torch.Tensor]:
    return _open[number].take(slot, layouts)


def slots_for(workers: int, ahead: int, pin: bool) -> Slots | None:
    """Slots for the workers of a loader; None where processes do not share memory from the start, and where addresses,
    of which slots take many, are limited (``ulimit -v``)."""
    if multiprocessing.get_start_method() != "fork":
        return None
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return None
    try:
        return Slots(workers, ahead, pin)
    except OSError:  # a system that promises no more than it has: torch's own way does
        return None
