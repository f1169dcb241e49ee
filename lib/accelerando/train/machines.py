"""Launches on several machines: the network interface between them, and what is sharded and replicated where."""

from __future__ import annotations

import os
import socket

from accelerando.base.errors import UserError

MESH = "PARALLELISM_CONFIG_"  # how the variables begin in which Accelerate's launcher gives the sizes of the mesh


def choose_interface() -> None:
    """Gives gloo the network interface that leads to the main machine, unless ``GLOO_SOCKET_IFNAME`` names one.

    Gloo by itself takes the address of the machine's own name, which on many is 127.0.0.1: the others cannot connect.
    """
    on_one = os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1")
    if on_one or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if name := interface_to(os.environ.get("MASTER_ADDR", "127.0.0.1")):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_to(host: str) -> str | None:
    """The name of the network interface through which this machine reaches ``host``; None if there is no way."""
    import psutil

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing: it only asks for the route
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own for each in addresses):
            return name
    return None


def check_mesh() -> None:
    """UserError if the launch config's ``parallelism_config`` is not data parallelism over all processes."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() != "true":
        return
    sizes = {name: int(os.environ.get(f"{MESH}{name}_SIZE", "1")) for name in ("TP", "CP", "SP")}
    if other := [name.lower() for name, size in sizes.items() if size > 1]:
        raise UserError(f"{other[0]}_size of the launch config is not supported: use dp_replicate_size, dp_shard_size")
    replicas, shards = (int(os.environ.get(f"{MESH}DP_{name}_SIZE", "1")) for name in ("REPLICATE", "SHARD"))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if replicas * shards != processes:
        raise UserError(
            f"dp_replicate_size {replicas} x dp_shard_size {shards} of the launch config is not the number of processes"
            f", {processes}: accelerate_configs/launch_nodes.sh sets both, to the machines and to the GPUs of each"
        )
    if shards == 1:
        raise UserError(
            "one process a machine leaves nothing to shard within it: use accelerate_configs/multi_node.yaml, or "
            f"dp_replicate_size 1 and dp_shard_size {processes}"
        )
