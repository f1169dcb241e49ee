"""Several machines: `launch_nodes.sh` on two nodes, each a network namespace of this machine, joined by a cable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from harness import ENVIRONMENT, ROOT, TEXT, kill, launch, numbers, wait_for_step, weights

pytestmark = pytest.mark.xdist_group("nodes")
LAUNCH_NODES = ROOT / "accelerate_configs" / "launch_nodes.sh"
ADDRESSES = ("10.231.77.1", "10.231.77.2")
CABLE = "cable0"  # the interface on either side


def node_environment(**variables: object) -> dict[str, str]:
    """A user's shell on a node: `accelerate` is found, and there is no GPU."""
    found = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return found | {"ACCELERATE_USE_CPU": "true"} | {name: str(value) for name, value in variables.items()}


@contextmanager
def two_networks() -> Iterator[list[list[str]]]:
    """The words that run a command on each of two nodes; root needs nothing, others a user namespace.

    A node's network exists as long as a process that waits in it.
    """
    if missing := [tool for tool in ("unshare", "nsenter", "ip") if not shutil.which(tool)]:
        pytest.skip(f"no network namespaces: {', '.join(missing)} not installed (util-linux, iproute2)")
    own_user = os.geteuid() != 0
    into: list[list[str]] = []
    pids: list[int] = []
    with ExitStack() as stack:
        for _ in ADDRESSES:
            # The second network belongs to the first one's user namespace, so that one command may join them.
            outer = into[0] if into and own_user else []
            words = [*outer, "unshare", *(["--user", "--map-root-user"] if own_user and not into else []), "--net"]
            holder = stack.enter_context(
                subprocess.Popen(
                    [*words, "sh", "-c", "echo $$; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
            line = holder.stdout.readline()
            if not line:
                pytest.skip(f"no network namespaces: {holder.stderr.read().strip()}")
            pids.append(holder.pid)
            user = ["--user", "--preserve-credentials"] if own_user else []
            into.append(["nsenter", "--target", str(holder.pid), *user, "--net"])
        commands = [[*into[0], *f"ip link add {CABLE} type veth peer name {CABLE} netns {pids[1]}".split()]]
        for words, address in zip(into, ADDRESSES, strict=True):
            commands.append([*words, *f"ip address add {address}/24 dev {CABLE}".split()])
            commands += [[*words, *f"ip link set {name} up".split()] for name in ("lo", CABLE)]
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces: {done.stderr.strip()}")
        yield into


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[list[str]]]:
    """See :func:`two_networks`."""
    with two_networks() as found:
        yield found


@contextmanager
def started(nodes: list[list[str]], folder: Path, args: list[str], name: str) -> Iterator[list[subprocess.Popen]]:
    """The line of the README on each node; what is left is killed."""
    processes = []
    with ExitStack() as stack:
        for rank, words in enumerate(nodes):
            variables = node_environment(
                NUM_MACHINES=2, MACHINE_RANK=rank, MAIN_ADDRESS=ADDRESSES[0], GPUS_PER_MACHINE=1
            )
            output = stack.enter_context(open(folder / f"{name}{rank}.txt", "wb"))
            processes.append(
                subprocess.Popen(
                    [*words, str(LAUNCH_NODES), str(TEXT), *args], cwd=folder, env=variables, stdin=subprocess.DEVNULL,
                    stdout=output, stderr=output, start_new_session=True,
                )
            )  # fmt: skip
            stack.callback(kill, processes[-1])
        yield processes


@pytest.mark.launch
@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.exhaustive)])
def test_one_of_two_nodes_is_lost_and_both_start_again(lost: int, nodes, text_args, tmp_path: Path) -> None:
    """The other node ends by itself; the same lines with --resume give the bytes of two processes on one machine."""
    args = [*text_args, "--batch_size", "6", "--gradient_accumulation_steps", "2", "--save_every", "3",
            "--eval_every", "50", "--amp", "no", "--max_steps", "10", "--run_name", "run"]  # fmt: skip
    (tmp_path / "reference").mkdir()
    launch(TEXT, *args, cwd=tmp_path / "reference", processes=2)
    reference, run = tmp_path / "reference" / "runs" / "run", tmp_path / "runs" / "run"
    with started(nodes, tmp_path, args, "first") as processes:
        wait_for_step(run, 5, processes[lost])
        kill(processes[lost])  # SIGKILL to all that runs there
        assert processes[1 - lost].wait(timeout=60) != 0, said(tmp_path)
    assert not (run / "results.json").exists(), "the run was over before the kill"
    with started(nodes, tmp_path, [*args, "--resume"], "second") as processes:
        codes = [process.wait(timeout=200) for process in processes]
    assert codes == [0, 0], said(tmp_path)
    assert "Resumed from runs/run/checkpoints/step_" in (run / "logs" / "train.log").read_text()
    assert weights(run / "last") == weights(reference / "last")
    assert weights(run / "best") == weights(reference / "best")
    assert numbers(run) == numbers(reference)


def said(folder: Path) -> str:
    """All output of the nodes."""
    return "\n".join(f"-- {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*.txt")))


@pytest.fixture
def launcher_flags(tmp_path: Path) -> Callable[..., list[str]]:
    """``launcher_flags(**variables)``: what launch_nodes.sh says to `accelerate`, of which there is only a dummy."""
    dummy = tmp_path / "accelerate"
    dummy.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    dummy.chmod(0o755)

    def flags(**variables: object) -> list[str]:
        found = node_environment(**variables)
        found["PATH"] = f"{tmp_path}{os.pathsep}{found['PATH']}"
        done = subprocess.run([str(LAUNCH_NODES), "script.py"], env=found, capture_output=True, text=True)
        return done.stdout.splitlines() if done.returncode == 0 else [done.stderr]

    return flags


@pytest.mark.parametrize(
    ("config", "variables", "mesh"),
    [
        ("multi_node", {}, {}),
        ("multi_node_hsdp", {}, {"REPLICATE": "2", "SHARD": "4"}),
        ("multi_node_hsdp", {"SHARD_OVER": 8}, {"REPLICATE": "1", "SHARD": "8"}),
    ],
)
def test_the_processes_get_what_config_and_counts_say(
    config: str, variables, mesh, launcher_flags, monkeypatch
) -> None:
    """On the second of two machines: all meet at the first one; only a config that shards has a mesh."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))]:
        monkeypatch.delenv(name)
    file = ROOT / "accelerate_configs" / f"{config}.yaml"
    machines = {"NUM_MACHINES": 2, "MACHINE_RANK": 1, "MAIN_ADDRESS": "10.0.0.1", "GPUS_PER_MACHINE": 4}
    word, *flags = launcher_flags(**machines, CONFIG=file, **variables)
    assert word == "launch"
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(flags))
    found = prepare_multi_gpu_env(args)
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("2", 1, "4")
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "10.0.0.1:29500")
    assert found.get("FSDP_VERSION") == ("2" if mesh else None)
    start = "PARALLELISM_CONFIG_DP_"
    assert {name[len(start) : -len("_SIZE")]: found[name] for name in found if name.startswith(start)} == mesh


def test_the_shards_of_a_copy_divide_the_processes(launcher_flags) -> None:
    (line,) = launcher_flags(GPUS_PER_MACHINE=4, SHARD_OVER=3)
    assert line == "error: SHARD_OVER=3 does not divide the number of processes, 4\n"
