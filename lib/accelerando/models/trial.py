"""A forward pass before a run begins: does a net take images of the sizes that it will be given?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from accelerando.base.errors import UserError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def try_image_sizes(model: PreTrainedModel, sizes: Iterable[int]) -> bool:
    """Computes a black image of each side in ``sizes``, in evaluation mode.

    True if a trained batch norm gets a single number per channel of an image: a batch of one image would then stop the
    training. The weights and the random state stay as they are.

    Raises:
        UserError: a size does not fit, or the output is not one logit for each class.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    single: list[bool] = []

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        single.append(inputs[0].numel() == inputs[0].shape[1])

    handles = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and (not own or any(parameter.requires_grad for parameter in own)):
            handles.append(module.register_forward_pre_hook(look))
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for size in dict.fromkeys(sizes):
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                logits = model(pixel_values=torch.zeros(1, 3, size, size, device=device)).logits
            if logits.shape != (1, model.config.num_labels):
                raise UserError(
                    f"the model's output for an image has the shape {list(logits.shape)} instead of one logit for each "
                    f"of {model.config.num_labels} classes"
                )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:  # what nets raise for a size
        reason = " ".join(first_line(error).split())[:200]
        raise UserError(
            f"the model does not take images of {size} x {size} pixels ({reason}): leave --image_size and "
            "--progressive_sizes out for the size it was made for"
        ) from None
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return any(single)
