"""The Accelerator with its precision and seeds, and functions for models under DDP and FSDP."""

from __future__ import annotations

import datetime
import gc
import os
import sys
import warnings
from typing import TYPE_CHECKING

from accelerando.base.config import asked_of_launch
from accelerando.base.errors import UserError
from accelerando.base.log import log, start_log
from accelerando.base.processes import threads_are_chosen
from accelerando.train.machines import check_mesh, choose_interface

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer


def make_accelerator(seed: int, amp: str | None, deterministic: bool = False, changing: bool = False) -> Accelerator:
    """The Accelerator (precision from ``amp``, or from the launch config if that is None), with seeds set.

    ``deterministic``: on a GPU, see :func:`choose_deterministic_kernels`; CPU kernels are deterministic anyway.
    ``changing``: the set of trainable parameters changes during the run, so DDP must find the unused ones in each step.

    "auto" is bf16 if the hardware supports it, else fp16 on a GPU and float32 on a CPU.

    The script does the gradient accumulation, so Accelerate does not divide the loss, whatever the launch config says.

    Raises:
        UserError: fp16 without a GPU, or a launch that the scripts do not support.
    """
    start_log()
    _check_launch_environment()
    choose_interface()
    _import_libraries()
    import torch
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
        set_seed,
    )
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # those of loading and saving weights
    # By default Accelerate's launcher sets one thread; without a GPU that would waste the other cores.
    if not torch.cuda.is_available() and os.environ.get("OMP_NUM_THREADS") == "1" and not threads_are_chosen():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    if amp == "auto":
        amp = "bf16" if computes_bf16() else "fp16" if torch.cuda.is_available() else "no"
    wanted = amp or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if wanted == "bf16" and not computes_bf16():
        log.warning("bf16 is many times slower than float32 on this hardware: use --amp auto or --amp no")
    if wanted == "fp16" and not torch.cuda.is_available():
        raise UserError("fp16 needs a CUDA GPU: on a CPU use --amp bf16 (mixed precision) or --amp no (float32)")
    try:
        # The others wait while the main process tokenizes or writes; the default of ten minutes can be too short.
        process_group = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))
        handlers = [process_group, DistributedDataParallelKwargs(find_unused_parameters=changing)]
        # A plugin, because ACCELERATE_GRADIENT_ACCUMULATION_STEPS would win over the argument.
        accumulation = GradientAccumulationPlugin(num_steps=1)
        accelerator = Accelerator(
            mixed_precision=amp, gradient_accumulation_plugin=accumulation, kwargs_handlers=handlers
        )
    except ValueError as error:
        raise UserError(f"precision {wanted}: {error}") from None
    _check_launch(accelerator)
    if is_sharded(accelerator) and not accelerator.is_fsdp2:
        raise UserError("FSDP version 1: the launch config needs fsdp_version: 2, see accelerate_configs/fsdp.yaml")
    if is_sharded(accelerator):
        # Autocast as under DDP. Accelerate's policy would also cast outputs, the temperature and accumulated gradients
        # to half precision.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    set_seed(seed)
    if deterministic and accelerator.device.type == "cuda":
        choose_deterministic_kernels()
    return accelerator


def _import_libraries() -> None:
    """Imports what every script needs. Garbage is looked for more seldom meanwhile, since all of it stays: after every
    700 new objects, as usual, would take a tenth of the time.
    """
    usual = gc.get_threshold()
    gc.set_threshold(100_000)
    try:
        import transformers.modeling_utils  # noqa: F401
    finally:
        gc.set_threshold(*usual)


def _check_launch_environment() -> None:
    """UserError if the launch asks for what these scripts or this machine do not have."""
    import torch
    from accelerate.utils import parse_flag_from_env

    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        log.warning(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=%s, of the launch, has no effect: the script's own flags set the "
            "number of micro-batches",
            steps,
        )
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise UserError(f"{name} of the launch config is not supported: use accelerate_configs/fsdp.yaml")
    check_mesh()
    # Otherwise each process would train on its own.
    processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
    if processes > max(1, devices) and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        config = {0: "cpu.yaml", 1: "single_gpu.yaml"}.get(devices, f"multi_gpu.yaml --num_processes {devices}")
        line = _launch_line(config)
        raise UserError(
            f"{processes} processes were launched for GPUs, but this machine has {devices or 'none'}: {line}"
        )


def _launch_line(config: str) -> str:
    """The command that launches this script with a config of accelerate_configs/."""
    return f"accelerate launch --config_file accelerate_configs/{config} {sys.argv[0]} ..."


def _check_launch(accelerator: Accelerator) -> None:
    """Compares what was asked for with flags of the replaced scripts (``--device``) with the launch.

    Raises:
        UserError: it is another device or another kind of launch.
    """
    asked, several = asked_of_launch(), accelerator.num_processes > 1
    device, mode = asked.get("device", "auto"), asked.get("distributed_mode")
    kind, _, number = device.partition(":")
    kind = {"gpu": "cuda"}.get(kind, kind)
    if kind not in ("auto", accelerator.device.type):
        config = "cpu.yaml" if kind == "cpu" else "single_gpu.yaml"
        raise UserError(f"--device {device}, but this launch computes on {accelerator.device}: {_launch_line(config)}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", str(accelerator.device.index or 0))
    if number and not several and number != visible:
        line = f"CUDA_VISIBLE_DEVICES={number} {_launch_line('single_gpu.yaml')}"
        raise UserError(f"--device {device}, but this launch computes on GPU {visible}: {line}")
    found = "fsdp" if is_sharded(accelerator) else "ddp" if several else "none"
    if mode not in (None, found):
        config = {"ddp": "multi_gpu.yaml", "fsdp": "fsdp.yaml"}.get(mode, "single_gpu.yaml")
        raise UserError(f"--distributed_mode {mode}, but this launch is {found}: {_launch_line(config)}")
    if asked.get("enable_parallel") in ("true", "yes", "1") and not several:
        line = _launch_line("multi_gpu.yaml")
        log.warning("--enable_parallel, but this launch is one process; on several GPUs: %s", line)


def choose_deterministic_kernels() -> None:
    """Makes torch use deterministic kernels; if an operation has none, torch warns and names it.

    Otherwise the gradients of convolutions on a GPU differ in the last bits from run to run.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time


def computes_bf16() -> bool:
    """True if the GPU or CPU supports bf16 natively; others emulate it (20 times slower on a CPU with only AVX2)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one is for ARM


def seed_each_process(seed: int, accelerator: Accelerator) -> None:
    """Gives each process a seed of its own for dropout; call it after all have built the same model."""
    from accelerate.utils import set_seed

    set_seed(seed + 1000 * accelerator.process_index)


def choose_sharded_layers(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Under FSDP, selects the layer classes that are sharded separately: the model's own list with two exceptions.

    Accelerate shards the token embedding itself and fails if a listed layer contains it (BERT), or if a listed class
    does not occur in this model.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.transformer_cls_names_to_wrap is not None:
        return
    try:
        embedding = model.get_input_embeddings()
    except AttributeError:
        embedding = None
    except NotImplementedError:  # a model with two towers; Accelerate makes the same call and would fail
        embedding = None
        model.get_input_embeddings = lambda: None
    usable = {
        type(module).__name__
        for module in model.modules()
        if embedding is None or all(child is not embedding for child in module.modules())
    }
    names = getattr(model, "_no_split_modules", None) or []
    plugin.transformer_cls_names_to_wrap = sorted(set(names) & usable)


def describe_processes(accelerator: Accelerator) -> str:
    """A line about processes, device and precision."""
    import torch

    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1].replace("NO", "single process")
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else str(accelerator.device)
    number = torch.get_num_threads()
    threads = f", {number} thread{'s' if number > 1 else ''} each" if accelerator.device.type == "cpu" else ""
    count = accelerator.num_processes
    mesh = accelerator.parallelism_config
    if mesh is not None and mesh.dp_replicate_enabled:
        kind += f", {mesh.dp_replicate_size} copies sharded over {mesh.dp_shard_size} each"
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return f"{count} process{'es' if count > 1 else ''} ({kind}) on {device}{threads}, precision {precision}"


def prepare(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    compile_model: bool = False,
    dynamic: bool | None = True,
) -> tuple[torch.nn.Module, AcceleratedOptimizer]:
    """Model and optimizer prepared for this launch: compiled, on their device, wrapped (DDP) or sharded (FSDP2).

    ``dynamic``: compile once for all shapes; None: torch.compile's default.
    """
    if compile_model:
        import torch

        model = torch.compile(model, dynamic=dynamic)
    choose_sharded_layers(accelerator, model)
    with warnings.catch_warnings():
        # Of torch, about how Accelerate asks for its mesh of shards and copies.
        warnings.filterwarnings("ignore", message="Slicing a flattened dim")
        return accelerator.prepare(model, optimizer)


def log_trained(model: torch.nn.Module, what: str) -> None:
    """Logs how many parameters are trained; ``what`` names the strategy.

    Raises:
        UserError: no parameter is trainable.
    """
    trainable, total = count_parameters(model)
    if not trainable:
        raise UserError(f"{what}: no parameter is trainable")
    share = 100 * trainable / total
    log.info("%s: %s of %s parameters are trained (%.2f %%)", what, f"{trainable:,}", f"{total:,}", share)
    if not hasattr(model, "save_pretrained"):
        name = type(model).__name__
        log.info("%s has no save_pretrained: best/ and last/ will have model.safetensors and a config.json", name)


def log_trained_parts(model: torch.nn.Module) -> None:
    """Logs a line for each part of the model with trained parameters: adapters by target module, the rest by module."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            words = [word for word in name.removeprefix("base_model.model.").split(".") if not word.isdigit()]
            part = words[0] + (f" {words[-4]} (LoRA)" if ".lora_" in name else "")
            counts[part] = counts.get(part, 0) + parameter.numel()
    for part, count in counts.items():
        log.info("  %-30s %14s", part, f"{count:,}")


def memory_use(accelerator: Accelerator) -> dict[str, float]:
    """The current ``gpu_allocated_mb`` and ``gpu_reserved_mb``, in MB; empty without a GPU."""
    if accelerator.device.type != "cuda":
        return {}
    import torch

    return {
        "gpu_allocated_mb": torch.cuda.memory_allocated() / 1e6,
        "gpu_reserved_mb": torch.cuda.memory_reserved() / 1e6,
    }


def peak_memory_mb(accelerator: Accelerator) -> float:
    """The peak memory of this process in MB (10^6 bytes): on the GPU if there is one, else resident memory."""
    import resource

    if accelerator.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    scale = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """The number of (trainable, all) parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def unwrapped(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """The model without the wrappers of DDP and torch.compile; under FSDP2, which has no wrapper, it is resharded."""
    reshard(accelerator, model)
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def reshard(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Under FSDP, frees gathered parameters so that each process holds only its shards; otherwise does nothing.

    After an evaluation the root's parameters stay gathered, because there is no backward that frees them, but the
    optimizer only updates the sharded ones.
    """
    if is_sharded(accelerator):
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():  # not of the unwrapped model: a compiled model's sharded root is its wrapper
            if isinstance(module, FSDPModule):
                module.reshard()


def is_sharded(accelerator: Accelerator) -> bool:
    """True under FSDP, where each process holds only a shard of each parameter."""
    from accelerate import DistributedType

    return accelerator.distributed_type == DistributedType.FSDP
