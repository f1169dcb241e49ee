"""What is needed to compute a step again and to find out why its gradient is not finite: see train.gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from accelerando.base.rng import random_state, set_random_state

if TYPE_CHECKING:
    import torch

COUNTED = ("running_", "num_batches_tracked")  # how the names of buffers begin that a forward pass changes


@dataclass
class Guard:
    """What is needed to compute a window again: the model's running statistics and the random state before it."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    in_a_row: int = 0  # steps without a gradient that could be used
    running: list[torch.Tensor] = field(init=False)  # running means and variances of batch norms, and their counts
    statistics: list[torch.Tensor] = field(default_factory=list)  # running means and variances before the window
    random: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        buffers = self.model.named_buffers()
        self.running = [buffer for name, buffer in buffers if name.rpartition(".")[2].startswith(COUNTED)]

    def remember(self) -> None:
        """Keeps what the forward passes of a window change."""
        import torch

        if not self.statistics:
            self.statistics = [buffer.clone() for buffer in self.running]
        elif self.running:
            torch._foreach_copy_(self.statistics, self.running)
        self.random = random_state(self.device)

    def go_back(self) -> None:
        """Drops the gradients and restores what :meth:`remember` kept."""
        for buffer, kept in zip(self.running, self.statistics, strict=True):
            buffer.copy_(kept)
        set_random_state(self.device, self.random)
        self.optimizer.zero_grad()


class Watch:
    """Hooks on every module: they find the first output that is not finite, and the samples for which it is not."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.cause: str | None = None  # the module, with its weights that are not finite
        self.rows: set[int] = set()
        self._batch: torch.Tensor | None = None  # row numbers of the current micro-batch
        self._windows: torch.Tensor | None = None  # row numbers of the windows that its rows are computed in, if any
        self._found = False  # in this micro-batch
        leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
        self._hooks = [module.register_forward_hook(self._hook(name)) for name, module in leaves]

    def begin(self, index: torch.Tensor, windows: torch.Tensor | None = None) -> None:
        """The next outputs are those of the samples ``index`` [B], or of their ``windows`` [B], so many of each."""
        self._batch, self._found = index, False
        self._windows = None if windows is None else index.repeat_interleave(windows)

    def end(self) -> None:
        """Further outputs are not looked at."""
        self._found = True

    def look(self, value: torch.Tensor, cause: Callable[[], str]) -> None:
        """Notes the cause when a value is not finite for the first time, and the samples of the first such [B, ...]."""
        import torch

        finite = torch.isfinite(value.detach())
        if self._found or bool(finite.all()):
            return
        self.cause = self.cause or cause()
        # An output may have two rows for each sample (R-Drop, MixUp): a later one then says which samples they are.
        for index in (self._batch, self._windows):
            if index is not None and finite.ndim and len(finite) == len(index):
                self._found = True
                self.rows |= set(index[~finite.reshape(len(finite), -1).all(dim=1)].tolist())
                return

    def stop(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def look(module: torch.nn.Module, _: object, output: object) -> None:
            import torch

            if isinstance(output, torch.Tensor) and output.is_floating_point():
                self.look(output, lambda: _describe(name, module))

        return look


def _describe(name: str, module: torch.nn.Module) -> str:
    """The module's name and which of its weights are not finite."""
    import torch

    parameters = module.named_parameters(recurse=False)
    spoilt = [each for each, value in parameters if not bool(torch.isfinite(value.detach()).all())]
    name = name.removeprefix("module.").replace("_orig_mod.", "")
    return f"the output of {name}" + (f", whose {' and '.join(spoilt)} has infinite or NaN values," if spoilt else "")
