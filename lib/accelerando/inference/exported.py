"""Computes the outputs of exported models with numpy arrays, and compares them with those that are right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from accelerando.base.errors import UserError, first_line

Runner = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
Equals = Callable[[np.ndarray, np.ndarray], np.ndarray]  # outputs [n, C] twice -> which rows predict the same, bool [n]


def torch_runner(module: torch.nn.Module) -> Runner:
    """Computes the outputs of a torch module, on the CPU."""

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = module(*(torch.from_numpy(np.ascontiguousarray(each)) for each in inputs.values()))
        return [each.numpy() for each in (found if isinstance(found, tuple | list) else (found,))]

    return run


def onnx_runner(path: Path, threads: int = 0) -> Runner:
    """Computes an ONNX file's outputs with ONNX Runtime, on the CPU.

    Raises:
        UserError: ONNX Runtime is not installed, or the file is damaged.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError(f"{path} needs ONNX Runtime: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises errors of its own
        raise UserError(f"{path}: not an ONNX file that ONNX Runtime can run ({first_line(error)[:200]})") from None
    names = [value.name for value in session.get_inputs()]

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return session.run(None, {name: inputs[name] for name in names})

    return run


@dataclass
class Parity:
    """How far outputs are from those that are right: the ``largest`` absolute difference, the share of ``equal``
    predictions, and the ``count`` of samples."""

    largest: float
    equal: float
    count: int


def parity(
    run: Callable[[Mapping[str, np.ndarray]], list[np.ndarray]],
    samples: Sequence[Mapping[str, np.ndarray]],
    expected: Sequence[Sequence[np.ndarray]],
    classifies: bool = True,
    equals: Equals | None = None,
) -> Parity:
    """Compares the outputs of ``run`` for ``samples`` with the ``expected`` ones.

    A prediction is equal where the largest of its scores (or the number, if there is one) is that of the same class;
    of embeddings, where the nearest of the expected embeddings is the same one. ``equals`` says it in another way.
    """
    found = [run(batch) for batch in samples]
    largest, equal, count = 0.0, [], 0
    for number in range(len(expected[0])):
        ours = np.concatenate([batch[number] for batch in found]).astype(np.float64)
        right = np.concatenate([batch[number] for batch in expected]).astype(np.float64)
        if not np.isfinite(ours).all():
            return Parity(float("inf"), 0.0, len(right))
        largest, count = max(largest, float(np.abs(ours - right).max())), len(right)
        if equals is not None:
            equal.append(equals(ours, right))
        elif classifies and right.shape[1] == 1:
            equal.append(np.isclose(ours, right, rtol=0.01, atol=0.01)[:, 0])
        else:
            scores = (ours, right) if classifies else (ours @ right.T, right @ right.T)
            equal.append(scores[0].argmax(1) == scores[1].argmax(1))
    return Parity(largest, float(np.all(equal, axis=0).mean()), count)
