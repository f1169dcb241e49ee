"""What a launch says and what a script's flags say: they agree, or one line tells how to launch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import nullcontext

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from harness import SIGN, script_module

from accelerando.base import processes
from accelerando.base.config import parse_args
from accelerando.base.errors import UserError
from accelerando.base.log import log
from accelerando.train.accelerator import make_accelerator
from accelerando.train.machines import check_mesh, choose_interface, interface_to


@pytest.fixture(autouse=True)
def one_process_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A launch of its own for each test."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    parse("--smoke-test")  # asks nothing of the launch


def parse(*flags: str) -> object:
    module = script_module(SIGN)
    return parse_args(module.Args, module.ALIASES, list(flags))


def lines_of(*flags: str) -> list[str]:
    """The warnings of a launch with these flags of the script."""
    parse(*flags)
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    log.addHandler(handler)  # start_log would remove it
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("accelerando.train.accelerator.start_log", lambda: None)
            make_accelerator(1, None)
    finally:
        log.removeHandler(handler)
    return found


@pytest.mark.parametrize(
    "flags",
    [(), ("--device", "cpu"), ("--device=auto",), ("--distributed_mode", "none"), ("--no-enable-parallel",),
     ("--enable-parallel", "false", "--epochs", "3")],
)  # fmt: skip
def test_flags_that_agree_with_the_launch_are_taken(flags: tuple[str, ...]) -> None:
    assert lines_of(*flags) == []


def test_a_wish_for_several_gpus_says_how_to_launch_and_goes_on(tmp_path) -> None:
    """The sign guide's quick start has the flag; one process trains all the same."""
    (line,) = lines_of("--enable-parallel", "--epochs", "3")
    assert line.startswith(
        "--enable_parallel, but this launch is one process; on several GPUs: accelerate launch --config_file"
    )
    (tmp_path / "c.yaml").write_text("enable_parallel: true\n")
    assert lines_of("--config", str(tmp_path / "c.yaml")) == [line]
    assert lines_of("--config", str(tmp_path / "c.yaml"), "--no_enable_parallel") == []
    assert parse("--enable-parallel", "--epochs", "3").epochs == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--device", "cuda"), "--device cuda, but this launch computes on cpu: accelerate launch --config_file accelerate_configs/single_gpu.yaml"),
        (("--device", "cuda:1"), "--device cuda:1, but this launch computes on cpu: "),
        (("--distributed_mode", "fsdp"), "--distributed_mode fsdp, but this launch is none: .*fsdp.yaml"),
        (("--distributed-mode=ddp",), "--distributed_mode ddp, but this launch is none: .*multi_gpu.yaml"),
    ],
)  # fmt: skip
def test_another_device_or_mode_is_one_line(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lines_of(*flags)


def test_tools_take_no_flags_of_the_launcher() -> None:
    from accelerando.base import config

    assert not config._is_of_launch("device", {"output_dir": None})


def test_processes_for_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train on its own, in the same folder."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for devices, message in {
        0: "has none: .*cpu.yaml",
        1: "has 1: .*single_gpu.yaml",
        2: "has 2: .*--num_processes 2",
    }.items():
        monkeypatch.setattr(torch.accelerator, "device_count", lambda devices=devices: devices)
        with pytest.raises(UserError, match=f"4 processes were launched for GPUs, but this machine {message}"):
            make_accelerator(1, None)


def test_accumulation_of_the_launch_does_not_divide_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight = torch.ones(1, requires_grad=True)
    (line,) = lines_of()
    make_accelerator(1, None).backward(3 * weight.sum())
    assert weight.grad.item() == 3
    assert line.startswith("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4, of the launch, has no effect")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DEEPSPEED of the launch config is not supported"):
        make_accelerator(1, None)


def test_the_command_to_repeat_a_run_has_the_variables_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.sys, "argv", ["scripts/x.py", "--lr", "1"])
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    def command(launcher: tuple[str, ...], given: dict[str, str]) -> str:
        monkeypatch.setattr(processes, "launcher_command", lambda: launcher)
        monkeypatch.setattr(processes, "_environment_of", lambda _: given)
        processes.command_line.cache_clear()
        return processes.command_line()

    plain = "ACCELERATE_USE_CPU=true CUDA_VISIBLE_DEVICES=0,1 python scripts/x.py --lr 1"
    assert command((), {"ACCELERATE_USE_CPU": "no"}) == plain
    # What the launcher itself sets is left out.
    assert command(("accelerate", "launch", "x.py"), {"OMP_NUM_THREADS": "3", "HOME": "/"}) == (
        "OMP_NUM_THREADS=3 accelerate launch x.py"
    )
    processes.command_line.cache_clear()


def test_one_thread_is_kept_where_the_user_chose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """OMP_NUM_THREADS=1 of the user counts; the launcher's own would leave cores without work."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))

    def threads(launcher: tuple[str, ...], given: dict[str, str]) -> int:
        monkeypatch.setattr(processes, "launcher_command", lambda: launcher)
        monkeypatch.setattr(processes, "_environment_of", lambda _: given)
        torch.set_num_threads(1)
        make_accelerator(1, None)
        return torch.get_num_threads()

    try:
        assert threads((), {}) == 1
        assert threads(("accelerate", "launch", "x.py"), {"OMP_NUM_THREADS": "1"}) == 1
        assert threads(("accelerate", "launch", "--num_cpu_threads_per_process=1", "x.py"), {}) == 1
        assert threads(("accelerate", "launch", "x.py"), {}) == cores
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"DP_SHARD": 4}, "dp_replicate_size 1 x dp_shard_size 4 of the launch config is not the number of processes, 8: "),
        ({"DP_REPLICATE": 8}, "one process a machine leaves nothing to shard within it: use .*multi_node.yaml, or "
                              "dp_replicate_size 1 and dp_shard_size 8"),
        ({"DP_SHARD": 4, "TP": 2}, "tp_size of the launch config is not supported: use dp_replicate_size, dp_shard_size"),
        ({"DP_REPLICATE": 2, "DP_SHARD": 4}, None),
    ],
)  # fmt: skip
def test_the_mesh_of_a_launch_config_is_data_parallelism(sizes, message, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    for name, size in sizes.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}_SIZE", str(size))
    check_mesh()  # the sizes alone are not asked for
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(UserError, match=f"^{message}") if message else nullcontext():
        check_mesh()


def test_machines_meet_on_the_interface_that_leads_to_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine's own name often stands for 127.0.0.1, at which the others find nobody."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    loopback = next(
        name for name, found in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in found)
    )
    for own, variables in ((None, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}), (loopback, {"LOCAL_WORLD_SIZE": "1"}),
                           ("chosen", {"GLOO_SOCKET_IFNAME": "chosen"})):  # fmt: skip
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        choose_interface()
        assert os.environ.get("GLOO_SOCKET_IFNAME") == own
    assert interface_to("name.invalid") is None
