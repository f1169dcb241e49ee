"""Writes the loss and the gradients of one contrastive batch of 64: one process or several, DDP or FSDP2.

``[torchrun ... [tests/fsdp_cpu.py]] tests/clip_gradients.py OUT MICRO_BATCH_SIZE DTYPE LOSS SCENARIO``. For tests alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from accelerando.base.errors import errors_in_one_line
from accelerando.data.order import deal
from accelerando.models.clip import embed_in_forward, make_trainable_scale
from accelerando.train.lora import attach_lora
from accelerando.train.losses import Pairs, backward_contrastive

BATCH = 64


def tiny_clip(dtype: torch.dtype, scenario: str, dropout: float = 0.0) -> torch.nn.Module:
    """A CLIP of two layers a tower, as the script makes it ready for training."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 98, "bos_token_id": 97},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=24,
    )
    model = CLIPModel(config)
    make_trainable_scale(model, None, -10.0 if scenario == "siglip" else None)
    embed_in_forward(model)
    if scenario == "lora":
        model = attach_lora(
            model, 4, 8, dropout, ("q_proj", "v_proj"), modules_to_save=("visual_projection", "text_projection")
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # not nought, so that its gradient reaches A
                torch.nn.init.normal_(parameter, std=0.1)
            if "logit_scale" in name:
                parameter.requires_grad = True
    return model.to(dtype)


def make_pairs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """64 random pairs: some captions and pictures occur twice, one could not be read."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 97, (BATCH, 12), generator=generator)
    tokens[torch.arange(BATCH), torch.randint(4, 12, (BATCH,), generator=generator)] = 98
    text_id, image_id = torch.arange(BATCH), torch.arange(BATCH)
    tokens[40], text_id[40] = tokens[3], text_id[3]
    image_id[17] = image_id[50]
    pixels = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    pixels[17] = pixels[50]
    weight = torch.ones(BATCH)
    weight[22] = 0
    return {"pixel_values": pixels, "input_ids": tokens, "image_id": image_id, "text_id": text_id, "weight": weight}


def embed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[Pairs, Any, Any]:
    """As in the script, with pixels of any precision."""
    output = model(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"])
    pairs = Pairs(output["image"], output["text"], batch["image_id"], batch["text_id"], batch["weight"])
    return pairs, output["scale"], output.get("bias")


def main() -> None:
    from accelerate import Accelerator

    from accelerando.train.accelerator import choose_sharded_layers

    out, micro, dtype, loss, scenario = sys.argv[1:]
    accelerator = Accelerator()
    model = tiny_clip(getattr(torch, dtype), scenario)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    choose_sharded_layers(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    batch = make_pairs(getattr(torch, dtype))
    share = deal(torch.arange(BATCH).numpy(), int(micro), accelerator.num_processes, accelerator.process_index)
    parts = [{name: tensor[rows] for name, tensor in batch.items()} for rows in share.micro_batches]
    value = backward_contrastive(accelerator, model, parts, embed, loss)
    gradients = {"loss": value}
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            gradients[name] = gradient.detach().clone().contiguous()
    if accelerator.is_main_process:
        save_file(gradients, out)
    accelerator.end_training()


if __name__ == "__main__":
    with errors_in_one_line():
        main()
