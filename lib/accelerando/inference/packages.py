"""What the formats of export need beside PyTorch; light, so that it can be asked before hours of training."""

from __future__ import annotations

import importlib.util

from accelerando.base.errors import UserError

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
