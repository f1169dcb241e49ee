"""What a model consists of, and the gradient of each of its layers: ``--inspect``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from accelerando.base.log import log
from accelerando.train.tracking import record

if TYPE_CHECKING:
    import torch

    from accelerando.train.state import Run

MOST_LAYERS = 40  # lines of the table: names are shortened until there are no more


@dataclass
class Layer:
    """The parameters whose names begin alike."""

    name: str
    parameters: list[torch.nn.Parameter] = field(default_factory=list)

    def share_trained(self) -> str:
        """ "yes", "no", or how many of the parameters are trained."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters]
        trained, total = sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
        return "yes" if trained == total else f"{trained:,}" if trained else "no"

    def norm(self, of_gradient: bool) -> float:
        """The Euclidean norm of the weights, or of their gradients; a collective operation for a sharded model."""
        tensors = [each.grad if of_gradient else each.detach() for each in self.parameters]
        squares = [float(tensor.float().norm()) ** 2 for tensor in tensors if tensor is not None]
        return sum(squares) ** 0.5


def layers_by_name(model: torch.nn.Module) -> list[Layer]:
    """The layers of ``model``, in as much detail as ``MOST_LAYERS`` lines have room for."""
    named = [
        (name.removeprefix("module.").replace("_orig_mod.", "").split("."), parameter)
        for name, parameter in model.named_parameters()
    ]
    depth = max((len(parts) for parts, _ in named), default=1)
    for shown in range(depth - 1, 0, -1):
        layers: dict[str, Layer] = {}
        for parts, parameter in named:
            name = ".".join(parts[: min(shown, len(parts) - 1)]) or parts[0]
            layers.setdefault(name, Layer(name)).parameters.append(parameter)
        if len(layers) <= MOST_LAYERS:
            break
    return list(layers.values())


def write_gradients(run: Run) -> None:
    """Logs the table of layers once, and records the gradient norm of each every ``log_every`` steps.

    Call it between the clipping and the optimizer's step, on all processes.
    """
    due = (run.state.step + 1) % run.args.log_every == 0
    if run.inspected and not due:
        return
    layers = layers_by_name(run.guard.model)
    gradients = {layer.name: layer.norm(of_gradient=True) for layer in layers}
    if not run.inspected:
        run.inspected = True
        log.info("Layers, and gradients of step %d\n%s", run.state.step + 1, table(layers, gradients.values()))
    if due:
        record(run, "gradients", gradients)


def table(layers: list[Layer], gradients: Iterable[float]) -> str:
    """A line for each layer: parameters, whether they are trained, precision, device, norms of weights and gradient."""
    rows = [("layer", "parameters", "trained", "precision", "device", "|weights|", "|gradient|")]
    for layer, gradient in zip(layers, gradients, strict=True):
        first = layer.parameters[0]
        rows.append((
            layer.name, f"{sum(each.numel() for each in layer.parameters):,}", layer.share_trained(),
            str(first.dtype).removeprefix("torch."), str(first.device), f"{layer.norm(of_gradient=False):.4g}",
            f"{gradient:.3g}" if layer.share_trained() != "no" else "-",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = (0, 2, 3, 4)  # columns of words; numbers are aligned on the right
    return "\n".join(
        "  ".join(
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
