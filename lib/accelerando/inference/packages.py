"""What the formats of export hold and need beside PyTorch; light, so that it can be asked before hours of training."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal

from accelerando.base.errors import UserError

Formats = tuple[Literal["onnx", "torchscript", "pt2", "openvino", "tensorrt"], ...]
Precisions = tuple[Literal["float32", "float16", "bfloat16", "int8", "int8_static"], ...]
# What each format can hold. int8: weights and activations of matrix products, scaled for each input as it comes;
# int8_static: with scales from samples, for convolutions too.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnx": ("float32", "float16", "int8", "int8_static"),
    "torchscript": ("float32", "float16", "bfloat16"),
    "pt2": ("float32", "float16", "bfloat16"),
    "openvino": ("float32", "float16"),
    "tensorrt": ("float32", "float16"),
}
PACKAGES = {  # that a format needs: module and what installs it
    "onnx": ("onnx onnxruntime onnxscript", "onnx onnxruntime onnxscript"),
    "openvino": ("openvino onnx onnxscript", "openvino onnx onnxscript"),
    "tensorrt": ("tensorrt onnx onnxscript", "tensorrt onnx onnxscript"),
}


def check_installed(kind: str) -> None:
    """UserError if a package that a format needs is missing."""
    modules, packages = PACKAGES.get(kind, ("", ""))
    missing = [name for name in modules.split() if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--export_format {kind} needs {missing[0]}: pip install {packages}")


def check_precisions(kind: str, precisions: Sequence[str]) -> None:
    """UserError if a format holds none of the precisions."""
    if not set(precisions) & set(PRECISIONS[kind]):
        raise UserError(f"--export_format {kind} holds {', '.join(PRECISIONS[kind])}, not {' '.join(precisions)}")
