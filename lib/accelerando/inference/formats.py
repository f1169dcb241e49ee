"""Writes models for deployment and runs them: ONNX, TorchScript, torch.export, OpenVINO, ExecuTorch, TensorRT.

A :class:`Graph` is a torch module with tensors as inputs and outputs. Each function here writes it to one file or
returns a function that computes a written file's outputs with numpy, so that all formats are compared in the same way.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accelerando.base.errors import UserError, first_line
from accelerando.inference.exported import Equals, Runner, onnx_runner, torch_runner
from accelerando.inference.quantisation import quantise

SUFFIXES = {
    "onnx": ".onnx", "torchscript": ".torchscript.pt", "pt2": ".pt2", "openvino": ".xml", "executorch": ".pte",
    "tensorrt": ".plan",
}  # fmt: skip
MADE_OF_ONNX = ("onnx", "openvino", "tensorrt")
LARGEST_FILE = 1_900_000_000  # bytes of weights in one ONNX file, whose limit is 2 GiB; more stand in a file beside it
MOST = {"batch": 32, "frames": 256, "length": 512}  # that ExecuTorch and TensorRT plan their memory for


@dataclass
class Graph:
    """A module to export, with an example of its inputs, and samples with the outputs that are right for them.

    ``inputs``: name -> example of at least two rows. ``axes``: name -> {axis: what varies along it}; others are fixed.
    ``variants``: format -> module, where a format needs another form of the same computation. ``samples``: batches of
    inputs; ``expected``: the outputs that the model itself gives for them. ``classifies``: each output is a score for
    each class; otherwise an embedding of unit length. ``equals``: when predictions are equal, if not by the best class.
    ``most``: what varies -> its largest size, where that is not ``MOST``'s; formats that need no limit have none.
    """

    name: str
    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    axes: dict[str, dict[int, str]]
    outputs: tuple[str, ...]
    samples: list[dict[str, np.ndarray]] = field(default_factory=list)
    expected: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    classifies: bool = True
    equals: Equals | None = None
    variants: dict[str, torch.nn.Module] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)

    def limits(self, name: str) -> dict[int, int]:
        """Axis of the input ``name`` -> its largest size."""
        return {axis: self.most.get(what, MOST[what]) for axis, what in self.axes.get(name, {}).items()}

    def file_name(self, kind: str, precision: str) -> str:
        """model.onnx, model_int8.onnx, image.torchscript.pt, ..."""
        return f"{self.name}{'' if precision == 'float32' else f'_{precision}'}{SUFFIXES[kind]}"

    def size(self) -> int:
        """Bytes of the weights in float32."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ----------------------------------------------------------------------------------------------------------- writing


def write(
    graph: Graph, kind: str, precision: str, folder: Path, opset: int, agreement: float = 0.99
) -> tuple[Path, list[str]]:
    """Writes ``graph`` to ``folder``; the file, and which layers int8 left in float to keep ``agreement`` predictions.

    Raises:
        UserError: the format cannot hold the model; the message says why.
    """
    path = folder / graph.file_name(kind, precision)
    try:
        with _quietly():
            if kind == "onnx" and precision == "float32":
                _write_onnx(graph, path, opset)
            elif kind == "onnx":
                return path, _convert_onnx(graph, precision, path, agreement)
            elif kind in ("torchscript", "pt2"):
                _write_torch(graph, kind, precision, path)
            elif kind == "openvino":
                _write_openvino(graph, precision, path)
            elif kind == "executorch":
                _write_executorch(graph, path)
            else:
                _write_tensorrt(graph, precision, path)
    except UserError:
        raise
    except Exception as error:  # each exporter raises errors of its own
        raise UserError(f"{path.name}: the model cannot be written as {kind}: {first_line(error)[:300]}") from error
    return path, []


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' notes about their own progress, fallbacks and plans."""
    names = ("onnxscript", "torch.onnx", "torch.export", "onnx_ir", "onnxruntime")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _exported(graph: Graph, kind: str, limited: bool = False) -> torch.export.ExportedProgram:
    varying = torch.export.Dim.DYNAMIC
    dynamic = [
        {axis: varying(max=most) if limited else varying for axis, most in graph.limits(name).items()}
        for name in graph.inputs
    ]
    module = graph.variants.get(kind, graph.module).eval()
    shapes = (tuple(dynamic),) if isinstance(module, InPrecision) else tuple(dynamic)  # whose inputs are one argument
    with torch.no_grad():
        return torch.export.export(module, tuple(graph.inputs.values()), dynamic_shapes=shapes, strict=False)


def _write_onnx(graph: Graph, path: Path, opset: int) -> None:
    program = torch.onnx.export(
        _exported(graph, "onnx"), dynamo=True, input_names=list(graph.inputs), output_names=list(graph.outputs),
        opset_version=opset, verbose=False,
    )  # fmt: skip
    for value in program.model.graph.inputs:
        for axis, name in graph.axes.get(value.name, {}).items():
            value.shape[axis] = name
    for value in program.model.graph.outputs:
        value.shape[0] = "batch"
    _name_values(program.model.graph)
    program.save(path, external_data=graph.size() > LARGEST_FILE)


def _name_values(graph: Any) -> None:
    """Gives values inside the graph names of their own: an output may be called as torch calls a tensor on the way."""
    kept = {value.name for value in (*graph.inputs, *graph.outputs)}
    outside = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for name in [name for name in graph.initializers if name in kept]:
        value = graph.initializers.pop(name)
        value.name = f"{name}_inside"
        graph.register_initializer(value)
    for node in graph:
        for value in node.outputs:
            if value.name in kept and id(value) not in outside:
                value.name = f"{value.name}_inside"


def _convert_onnx(graph: Graph, precision: str, path: Path, agreement: float) -> list[str]:
    """From the float32 file beside ``path``."""
    import onnx

    source = path.with_name(graph.file_name("onnx", "float32"))
    if precision != "float16":
        static = precision == "int8_static"
        return quantise(source, path, graph.samples, graph.expected, static, graph.classifies, agreement, graph.equals)
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(source), keep_io_types=True, disable_shape_infer=graph.size() > 2**31)
    onnx.save(model, path, save_as_external_data=graph.size() > 2 * LARGEST_FILE, location=f"{path.name}.data")
    return []


def _write_torch(graph: Graph, kind: str, precision: str, path: Path) -> None:
    kept = graph.variants.get(kind, graph.module)
    module = copy.deepcopy(kept).eval()
    if precision != "float32":
        module = InPrecision(module, getattr(torch, precision)).eval()
    if kind == "torchscript":
        with torch.no_grad():
            traced = torch.jit.trace(module, tuple(graph.inputs.values()), check_trace=False, strict=False)
        torch.jit.save(traced, str(path))
    else:
        cast = Graph(graph.name, module, graph.inputs, graph.axes, graph.outputs)
        torch.export.save(_exported(cast, kind), path)


def _write_openvino(graph: Graph, precision: str, path: Path) -> None:
    import openvino

    model = openvino.convert_model(path.with_name(graph.file_name("onnx", "float32")))
    openvino.save_model(model, path, compress_to_fp16=precision == "float16")


def _write_executorch(graph: Graph, path: Path) -> None:
    """For CPUs: XNNPACK computes what it can, ExecuTorch's own kernels the rest."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.extension.pybindings.portable_lib import _get_operator_names

    lowered = to_edge_transform_and_lower(_exported(graph, "pt2", limited=True), partitioner=[XnnpackPartitioner()])
    config = ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False))
    program = lowered.to_executorch(config)
    schemas = [
        node.target._schema for node in program.exported_program().graph.nodes if hasattr(node.target, "_schema")
    ]
    lacking = {f"{one.name}.{one.overload_name}".rstrip(".") for one in schemas} - {*_get_operator_names()}
    if lacking := sorted(name for name in lacking if name.startswith("aten::")):
        raise UserError(f"{path.name}: ExecuTorch has no {lacking[0].removeprefix('aten::')}, which the model computes")
    path.write_bytes(program.buffer)


def _write_tensorrt(graph: Graph, precision: str, path: Path) -> None:
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path.with_name(graph.file_name("onnx", "float32")))):
        raise UserError(f"{path.name}: TensorRT cannot read the ONNX file: {parser.get_error(0).desc()}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    if precision == "float16":
        config.set_flag(tensorrt.BuilderFlag.FP16)
    for name, example in graph.inputs.items():
        longest = graph.limits(name)
        least = [1 if axis in longest else size for axis, size in enumerate(example.shape)]
        most = [longest.get(axis, size) for axis, size in enumerate(example.shape)]
        profile.set_shape(name, least, list(example.shape), most)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"{path.name}: TensorRT builds no engine of the model")
    path.write_bytes(engine)


class InPrecision(torch.nn.Module):
    """Takes and returns float32, and computes in another precision."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module.to(dtype), dtype

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The outputs of the module, float32."""
        found = self.module(*(each.to(self.dtype) if each.is_floating_point() else each for each in inputs))
        return tuple(each.float() for each in found) if isinstance(found, tuple) else found.float()


# ----------------------------------------------------------------------------------------------------------- running


def runner(path: Path, kind: str, threads: int = 0) -> Runner:
    """Computes a written file's outputs from inputs by name; ``threads``: of the CPU (0: all)."""
    if kind == "onnx":
        return onnx_runner(path, threads)
    if kind in ("torchscript", "pt2"):
        module = torch.jit.load(str(path)) if kind == "torchscript" else torch.export.load(path).module()
        return torch_runner(module)
    if kind == "openvino":
        return _openvino_runner(path, threads)
    if kind == "executorch":
        return _executorch_runner(path)
    return _tensorrt_runner(path)


def _openvino_runner(path: Path, threads: int) -> Runner:
    import openvino

    core = openvino.Core()
    exactly = {"INFERENCE_PRECISION_HINT": "f32"}  # by default a CPU that can computes in bfloat16
    model = core.compile_model(path, "CPU", exactly | ({"INFERENCE_NUM_THREADS": threads} if threads else {}))

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return list(model({name: np.ascontiguousarray(each) for name, each in inputs.items()}).values())

    return run


def _executorch_runner(path: Path) -> Runner:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        found = method.execute([torch.from_numpy(np.ascontiguousarray(each)) for each in inputs.values()])
        return [each.clone().numpy() for each in found]  # whose memory the next call writes to

    return run


def _tensorrt_runner(path: Path) -> Runner:
    import tensorrt

    engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
    outputs = [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.OUTPUT]

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        held = {name: torch.from_numpy(np.ascontiguousarray(each)).cuda() for name, each in inputs.items()}
        for name, tensor in held.items():
            context.set_input_shape(name, tuple(tensor.shape))
        for name in outputs:
            held[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=torch.float32, device="cuda")
        for name, tensor in held.items():
            context.set_tensor_address(name, tensor.data_ptr())
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        torch.cuda.current_stream().synchronize()
        return [held[name].cpu().numpy() for name in outputs]

    return run
