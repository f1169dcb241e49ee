"""Contrastive losses over the whole batch of all processes and micro-batches, with exact gradients.

A contrastive loss takes its negatives from the batch, so it cannot be accumulated over micro-batches: the gradient of a
sample depends on the embeddings of all others. GradCache (Gao et al. 2021, arXiv:2101.06983) has three steps: the
embeddings of all micro-batches without a graph; the loss and its gradient with respect to the embeddings, gathered from
all processes; a second forward pass of each micro-batch with a graph, which propagates that gradient to the weights.
Random states are restored, so both passes have the same dropout masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from accelerando.base.rng import random_state, set_random_state

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from accelerando.train.batches import Window

LossName = Literal["clip", "siglip"]
MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5
CHUNK = 1024  # rows of the similarity matrix in memory at a time


@dataclass
class Pairs:
    """Embeddings of n image-caption pairs, each of unit length, with ids and weights.

    ``image`` and ``text`` [n, d]; ``image_ids`` and ``text_ids`` int64 [n]: equal ids mean the same image or the same
    caption; ``weight`` [n]: 0 for padding and unreadable pairs, else 1.
    """

    image: torch.Tensor
    text: torch.Tensor
    image_ids: torch.Tensor
    text_ids: torch.Tensor
    weight: torch.Tensor


class Embedded(NamedTuple):
    """A model's output for a micro-batch: pairs, exp(logit scale), SigLIP's bias, an additional loss for each pair.

    The mean of ``further`` [n] over all pairs of the batch is added to the contrastive loss.
    """

    pairs: Pairs
    scale: torch.Tensor
    bias: torch.Tensor | None = None
    further: torch.Tensor | None = None


def contrastive_loss(
    rows: Pairs,
    columns: Pairs,
    first: int,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    loss: LossName = "clip",
    mask_duplicates: bool = True,
) -> torch.Tensor:
    """The summed loss of the pairs ``rows``, which are ``columns[first : first + n]``, against all of ``columns``.

    ``clip`` (Radford et al. 2021): for each pair the mean of the cross-entropies of its image among all captions and of
    its caption among all images. ``siglip`` (Zhai et al. 2023, arXiv:2303.15343): the sigmoid loss of all (image,
    caption). ``scale`` is exp(logit scale); ``bias`` is SigLIP's. With ``mask_duplicates``, another pair with the same
    caption or the same image is not a negative. Sum it over the batch and divide by the number of pairs of weight 1.
    """
    import torch

    count = len(rows.weight)
    own = torch.arange(first, first + count, device=rows.weight.device)
    position = torch.arange(len(columns.weight), device=rows.weight.device)
    itself = own[:, None] == position
    allowed = (columns.weight > 0).expand(count, -1)
    if mask_duplicates:
        same = rows.text_ids[:, None] == columns.text_ids
        same = same | (rows.image_ids[:, None] == columns.image_ids)
        allowed = allowed & ~same
    allowed = allowed | itself
    image_logits = scale * (rows.image @ columns.text.T)
    if loss == "siglip":
        signs = torch.where(itself, 1.0, -1.0).to(image_logits.dtype)
        terms = torch.nn.functional.logsigmoid(signs * (image_logits + bias))
        return -(terms * allowed).sum(dim=1).mul(rows.weight).sum()
    text_logits = scale * (rows.text @ columns.image.T)
    blocked = torch.finfo(image_logits.dtype).min
    image_loss, text_loss = (
        torch.nn.functional.cross_entropy(logits.masked_fill(~allowed, blocked), own, reduction="none")
        for logits in (image_logits, text_logits)
    )
    return ((image_loss + text_loss) / 2 * rows.weight).sum()


def embedding_gradients(
    accelerator: Accelerator,
    pairs: Pairs,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    loss: LossName,
    mask_duplicates: bool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean loss of the batch of all processes, and its gradients for this process's part of it.

    ``pairs`` are this process's, detached. Gradients: ``image`` and ``text`` [n, d]; ``scale`` and ``bias``: only from
    the rows of this process, so that their sum over processes is the full gradient.
    """
    import torch

    count = len(pairs.weight)
    if accelerator.num_processes == 1:
        everything, first = pairs, 0
    else:
        # The numbers of pairs differ by one between processes; padding has weight 0.
        padded = [accelerator.pad_across_processes(tensor, dim=0, pad_index=0) for tensor in vars(pairs).values()]
        everything = Pairs(*(accelerator.gather(tensor) for tensor in padded))
        first = accelerator.process_index * len(padded[0])
    columns = Pairs(
        everything.image.detach().requires_grad_(),
        everything.text.detach().requires_grad_(),
        everything.image_ids,
        everything.text_ids,
        everything.weight,
    )
    scale = scale.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    num_pairs = everything.weight.sum().clamp(min=1)
    total = torch.zeros((), dtype=pairs.image.dtype, device=pairs.image.device)
    for start in range(0, count, CHUNK):
        rows = slice(first + start, first + min(start + CHUNK, count))
        chunk = Pairs(*(tensor[rows] for tensor in vars(columns).values()))
        value = contrastive_loss(chunk, columns, rows.start, scale, bias, loss, mask_duplicates) / num_pairs
        value.backward()
        total += value.detach()
    image_gradient, text_gradient = columns.image.grad, columns.text.grad
    if accelerator.num_processes > 1:
        image_gradient, text_gradient, total = (
            accelerator.reduce(tensor, reduction="sum") for tensor in (image_gradient, text_gradient, total)
        )
    mine = slice(first, first + count)
    gradients = {"image": image_gradient[mine], "text": text_gradient[mine]}
    for name, leaf in (("scale", scale), ("bias", bias)):
        if leaf is not None:
            gradients[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return total, gradients


def backward_contrastive(
    accelerator: Accelerator,
    model: torch.nn.Module,
    micro_batches: Window | list[dict[str, torch.Tensor]],
    embed: Callable[[torch.nn.Module, dict[str, torch.Tensor]], Embedded],
    loss: LossName = "clip",
    mask_duplicates: bool = True,
) -> torch.Tensor:
    """Adds the gradient of the loss over all ``micro_batches`` of all processes to the weights; returns the mean loss.

    ``embed(model, batch)`` returns the embeddings of a micro-batch. Only one graph exists at a time, so memory is that
    of one micro-batch. The graph of the last micro-batch is kept from the first pass, so k micro-batches cost k - 1
    more forward passes than plain training.
    """
    import torch

    last = len(micro_batches) - 1
    alone = nullcontext() if last == 0 else accelerator.no_sync(model)
    kept, states, parts = [], [], []  # batches are fetched one by one, so that loading overlaps with computing
    for number, batch in enumerate(micro_batches):
        kept.append(batch)
        states.append(random_state(accelerator.device))
        with alone if number == last else torch.no_grad():
            embedded = Embedded(*embed(model, batch))
        parts.append(embedded.pairs)
    after = random_state(accelerator.device)
    pairs = Pairs(*(torch.cat([vars(part)[name].detach() for part in parts]) for name in vars(parts[0])))
    value, gradients = embedding_gradients(accelerator, pairs, embedded.scale, embedded.bias, loss, mask_duplicates)
    sizes = [len(part.weight) for part in parts]
    image_gradients, text_gradients = gradients["image"].split(sizes), gradients["text"].split(sizes)
    further = None if embedded.further is None else torch.zeros_like(value)
    if further is not None:
        num_pairs = accelerator.reduce(pairs.weight.sum(), reduction="sum").clamp(min=1)

    for number in [last, *range(last)]:
        final = number == last - 1 or last == 0  # DDP and FSDP reduce over processes in the final backward
        with nullcontext() if final else accelerator.no_sync(model):
            if number == last:
                parts = []  # now only `embedded` holds the graph of the last micro-batch
            else:
                set_random_state(accelerator.device, states[number])
                embedded = Embedded(*embed(model, kept[number]))
            part = embedded.pairs
            surrogate = (part.image * image_gradients[number]).sum() + (part.text * text_gradients[number]).sum()
            if further is not None:
                mean = (embedded.further * part.weight).sum() / num_pairs
                surrogate, further = surrogate + mean, further + mean.detach()
            # The gradients of scale and bias are added once; the factor 0 keeps them in the graph for DDP otherwise.
            for name, tensor in (("scale", embedded.scale), ("bias", embedded.bias)):
                if tensor is not None and tensor.requires_grad:
                    surrogate = surrogate + (tensor * gradients[name]).sum() * float(number == last)
            # DDP and FSDP average over processes, but these gradients must be summed.
            accelerator.backward(surrogate * accelerator.num_processes)
    set_random_state(accelerator.device, after)
    return value if further is None else value + accelerator.reduce(further, reduction="sum")


def clamp_logit_scale(logit_scale: torch.Tensor) -> None:
    """Clamps exp(logit scale) to at most 100, as in CLIP; in place, after an optimizer step."""
    import torch

    with torch.no_grad():
        logit_scale.clamp_(max=MAX_LOGIT_SCALE)
