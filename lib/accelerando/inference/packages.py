"""What the formats of export hold and need beside PyTorch; light, so that it can be asked before hours of training."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from accelerando.base.errors import UserError

Formats = tuple[Literal["onnx", "torchscript", "pt2", "openvino", "executorch", "tensorrt"], ...]
Precisions = tuple[Literal["float32", "float16", "bfloat16", "int8", "int8_static"], ...]
# What each format can hold. int8: weights and activations of matrix products, scaled for each input as it comes;
# int8_static: with scales from samples, for convolutions too.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnx": ("float32", "float16", "int8", "int8_static"),
    "torchscript": ("float32", "float16", "bfloat16"),
    "pt2": ("float32", "float16", "bfloat16"),
    "openvino": ("float32", "float16"),
    "executorch": ("float32",),
    "tensorrt": ("float32", "float16"),
}
PACKAGES = {  # that a format needs: module and what installs it
    "onnx": ("onnx onnxruntime onnxscript", "onnx onnxruntime onnxscript"),
    "openvino": ("openvino onnx onnxscript", "openvino onnx onnxscript"),
    "executorch": ("executorch", "executorch"),
    "tensorrt": ("tensorrt onnx onnxscript", "tensorrt onnx onnxscript"),
}


def check_installed(kind: str) -> None:
    """UserError if a package that a format needs is missing."""
    modules, packages = PACKAGES.get(kind, ("", ""))
    missing = [name for name in modules.split() if find_spec(name) is None]
    if missing:
        raise UserError(f"--export_format {kind} needs {missing[0]}: pip install {packages}")


def check_available(kind: str) -> None:
    """UserError if a package that a format needs is missing, or the GPU that TensorRT builds for."""
    check_installed(kind)
    if kind == "tensorrt":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--export_format tensorrt builds for the GPU that it runs on; there is none here")


def check_precisions(kind: str, precisions: Sequence[str]) -> None:
    """UserError if a format holds none of the precisions."""
    if not set(precisions) & set(PRECISIONS[kind]):
        raise UserError(f"--export_format {kind} holds {', '.join(PRECISIONS[kind])}, not {' '.join(precisions)}")
