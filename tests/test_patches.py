"""Patches embedded by a matrix product: what the convolution computes, within rounding."""

import pytest
import torch

from accelerando.models.cpu import patch_product_class, use_patch_products


def embedding(**options) -> torch.nn.Conv2d:
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 24, **options)


@pytest.mark.parametrize("kernel", [8, (16, 8)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_outputs_and_gradients_are_those_of_the_convolution(kernel, channels_last: bool) -> None:
    found = []
    inputs = torch.randn(2, 3, 32, 48)
    for replaced in (False, True):
        model = torch.nn.Sequential(embedding(kernel_size=kernel, stride=kernel))
        if replaced:
            use_patch_products(model, "bf16")
        assert (type(model[0]) is patch_product_class()) == replaced
        assert list(model.state_dict()) == ["0.weight", "0.bias"]
        pixels = inputs.clone()
        if channels_last:
            model, pixels = (
                model.to(memory_format=torch.channels_last),
                pixels.contiguous(memory_format=torch.channels_last),
            )
        outputs = model(pixels.requires_grad_())
        outputs.square().sum().backward()
        found.append([outputs, pixels.grad, model[0].weight.grad, model[0].bias.grad])
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_size_that_is_no_multiple_is_convolved() -> None:
    model = torch.nn.Sequential(embedding(kernel_size=8, stride=8))
    inputs = torch.randn(2, 3, 35, 41)
    expected = model(inputs)
    use_patch_products(model, "bf16")
    assert torch.equal(model(inputs), expected)


def test_other_precisions_and_other_convolutions_stay() -> None:
    model = torch.nn.Sequential(embedding(kernel_size=8, stride=8))
    use_patch_products(model, "no")
    others = torch.nn.Sequential(
        embedding(kernel_size=8, stride=4),
        embedding(kernel_size=4, stride=4),
        embedding(kernel_size=8, stride=8, padding=1),
    )
    use_patch_products(others, "bf16")
    assert all(type(module) is torch.nn.Conv2d for module in [*model, *others])
