"""Quantises an ONNX file to int8, leaves the layers in float that it would spoil, and says which.

Weights and activations are 8-bit integers, each with a scale: of each output channel, and of each input as it comes or
(static) from samples.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from accelerando.base.errors import UserError
from accelerando.inference.exported import Equals, Parity, onnx_runner, parity

LAYERS = ("MatMul", "Gemm", "Conv", "Attention", "LSTM")  # that are quantised where their weights are known
MOST_TRIALS = 64  # layers that are quantised one by one, to find those that int8 spoils
RANKED_ON = 16  # samples that are enough for their order
# Without these instructions the sum of two products overflows 16 bits, unless weights have 7 bits.
EXACT_INT8 = ("avx512_vnni", "avx_vnni", "asimddp", "amx_int8")


def quantise(
    source: Path,
    path: Path,
    samples: Sequence[Mapping[str, np.ndarray]],
    expected: Sequence[Sequence[np.ndarray]],
    static: bool,
    classifies: bool,
    agreement: float = 0.99,
    equals: Equals | None = None,
) -> list[str]:
    """Writes ``path``, the ONNX file ``source`` in int8; returns the layers left in float, with the reason.

    First all layers are quantised. If fewer than ``agreement`` of the predictions are as in float32, each layer is
    quantised alone, and those that change the outputs most are left in float: as few as are enough, or as help most.

    Raises:
        UserError: no layer could be quantised.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = _prepared(source, Path(folder), static)
        layers = _layers(prepared)
        if not layers:
            raise UserError(f"{source.name}: no layer that could be quantised (matrix products, convolutions)")
        draft = Path(folder) / "draft.onnx"

        def write(left: Sequence[str], batches: int | None = None) -> Parity:
            _quantise(prepared, draft, left, samples, Path(folder) / "ranges.json" if static else None)
            return parity(onnx_runner(draft), samples[:batches], expected[:batches], classifies, equals)

        left: list[str] = []
        alone: dict[str, float] = {}
        if write(left).equal < agreement:
            few = next((n for n in range(1, len(samples)) if _rows(samples[:n]) >= RANKED_ON), None)
            for name in _with_progress(layers[:MOST_TRIALS], f"{source.stem}: layers in int8 one by one"):
                alone[name] = write([each for each in layers if each != name], few).largest
            worst_first = sorted(alone, key=alone.get, reverse=True)
            shares = {}
            for count in _counts(min(len(worst_first), len(layers) - 1)):
                shares[count] = write(worst_first[:count]).equal
                if shares[count] >= agreement:
                    break
            left = worst_first[: max(shares, key=shares.get, default=0)]
            write(left)
        shutil.copyfile(draft, path)
    return [f"{name} (in int8 it alone changes outputs by up to {alone[name]:.2g})" for name in left]


def _rows(samples: Sequence[Mapping[str, np.ndarray]]) -> int:
    return sum(len(next(iter(batch.values()))) for batch in samples)


def _with_progress(names: Sequence[str], what: str) -> Iterable[str]:
    """``names`` with a progress bar on a terminal, and a line where stderr is none."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        print(f"{what}: {len(names)}", file=sys.stderr, flush=True)
    return tqdm(names, desc=what, unit=" layers", delay=2, disable=None, leave=False, file=sys.stderr)


def _counts(most: int) -> list[int]:
    """How many layers are tried to be left in float, at most ``most``: 1, 2, 3, 4, 6, 8, 12, ..."""
    tried = [1, 2, 3, *(size for power in range(2, 10) for size in (2**power, 3 * 2 ** (power - 1)))]
    return [count for count in tried if count < most] + [most] * (most > 0)


def _prepared(source: Path, folder: Path, static: bool) -> Path:
    """``source`` with the shapes of its values known and simple operators joined, as quantisation wants it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    target = folder / "prepared.onnx"
    try:
        quant_pre_process(source, target, skip_symbolic_shape=True, skip_optimization=not static)
    except Exception:  # it knows fewer operators than ONNX Runtime
        return source
    return target


def _layers(path: Path) -> list[str]:
    """The names of the nodes whose weights are constants, in the order of the graph."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type in LAYERS and any(name in constants for name in node.input[1:2])
    ]


def _quantise(
    source: Path, target: Path, left: Sequence[str], samples: Sequence[Mapping[str, np.ndarray]], ranges: Path | None
) -> None:
    """``ranges``: static; keeps the ranges of activations, which are the same whatever is left in float."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    # ONNX Runtime makes a MatMul of a Gemm and calls it so.
    excluded = [*left, *(f"{name}_MatMul" for name in left)]
    options = {"per_channel": True, "reduce_range": not _multiplies_exactly(), "nodes_to_exclude": excluded}
    if ranges is None:
        kinds = [kind for kind in LAYERS if kind != "Conv"]  # whose scales ONNX Runtime computes slowly
        quantize_dynamic(source, target, op_types_to_quantize=kinds, weight_type=QuantType.QInt8, **options)
        return

    class Samples(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.rest, None)
            return None if batch is None else dict(batch)

    quantize_static(
        source, target, Samples(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod.MinMax,
        calibration_cache_path=ranges, **options,
    )  # fmt: skip


def _multiplies_exactly() -> bool:
    """Whether the CPU adds products of 8-bit numbers without overflow."""
    try:
        return any(name in Path("/proc/cpuinfo").read_text() for name in EXACT_INT8)
    except OSError:  # not Linux; Apple's have it
        return True
