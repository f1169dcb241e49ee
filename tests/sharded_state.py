"""Saves or loads a checkpoint of a small model with its optimizer and averages, on any number of processes.

``[torchrun ... tests/fsdp_cpu.py] tests/sharded_state.py save|load FOLDER [background]``. ``load`` writes the whole
tensors that it then has to ``FOLDER/loaded.safetensors``, ``save`` those that it saved to ``FOLDER/saved.safetensors``.
For tests alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from accelerando.base.errors import errors_in_one_line
from accelerando.train.accelerator import choose_sharded_layers, unwrapped
from accelerando.train.averages import Ema, averaged
from accelerando.train.checkpoint import Saver, load_checkpoint, save_checkpoint
from accelerando.train.checkpoint_folders import open_checkpoint
from accelerando.train.optim import make_scheduler
from accelerando.train.weights import contiguous, model_state


class Net(torch.nn.Module):
    """Odd sizes, which no number of processes divides, a single number, a tied weight, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(13, 7)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(7, 7) for _ in range(2))
        self.scale = torch.nn.Parameter(torch.ones(()).reshape(1))
        self.head = torch.nn.Linear(7, 13)
        self.head.weight = self.embed.weight
        self.layers[1].weight.requires_grad_(False)
        self.register_buffer("seen", torch.tensor([3, 1, 2]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [rows, 13]."""
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return self.head(hidden) * self.scale


def whole_state(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> dict:
    """All tensors on the main process: weights, averages, moments."""
    found = {f"model/{name}": tensor for name, tensor in model_state(accelerator, model).items()}
    with averaged(ema):
        found |= {f"ema/{name}": tensor.clone() for name, tensor in model_state(accelerator, model).items()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    plain = unwrapped(accelerator, model)
    kept = get_optimizer_state_dict(plain, optimizer.optimizer, options=options).get("state", {})
    for name, values in kept.items():
        found |= {f"optimizer/{name}/{key}": value for key, value in values.items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def main() -> None:
    """See the module."""
    way, folder = sys.argv[1], Path(sys.argv[2])
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0 if way == "save" else 1)
    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    choose_sharded_layers(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = make_scheduler(optimizer.optimizer, "cosine", 10, 0, 0.5, 2, True, 1)
    ema = Ema(optimizer, 0.5)

    def step() -> None:
        tokens = torch.arange(12) % 13
        torch.nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
        schedule.step(skipped=False)
        optimizer.zero_grad()
        ema.update()

    if way == "save":
        saver = Saver(accelerator)
        for _ in range(3):
            step()
        saved = whole_state(accelerator, model, optimizer, ema)
        save_checkpoint(
            saver, folder / "checkpoints", 3, model, optimizer, schedule, {}, 2, folder / "best", ema,
            in_background="background" in sys.argv,
        )  # fmt: skip
        step()  # while it is written
        saver.wait()
    else:
        load_checkpoint(
            accelerator, open_checkpoint(folder / "checkpoints/step_000003"), model, optimizer, schedule, ema
        )
        saved = whole_state(accelerator, model, optimizer, ema)
    if accelerator.is_main_process:
        save_file(contiguous(saved), folder / f"{'saved' if way == 'save' else 'loaded'}.safetensors")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    with errors_in_one_line():
        main()
