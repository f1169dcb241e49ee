"""Random states: saved, restored, and derived from seeds."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


@contextmanager
def random_state_of(seed: Sequence[int]) -> Iterator[None]:
    """Seeds torch's global random state from the numbers in ``seed``; restores the previous state afterwards."""
    import numpy as np
    import torch

    before = torch.get_rng_state()
    torch.default_generator.manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0] >> 1))
    try:
        yield
    finally:
        torch.set_rng_state(before)


def rng_state(accelerator: Accelerator) -> dict[str, Any]:
    import numpy as np
    import torch

    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    if accelerator.device.type == "cuda":
        state["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    import numpy as np
    import torch

    def as_bytes(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(as_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(as_bytes(state["cuda"]))


def random_state(device: torch.device) -> list[torch.Tensor]:
    """The random states that a forward pass on ``device`` draws from."""
    import torch

    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(device: torch.device, states: list[torch.Tensor]) -> None:
    """Restores what :func:`random_state` returned."""
    import torch

    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
