"""Two nodes on one machine: network namespaces joined by a cable, or two loopback addresses where those are refused."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """Where its processes are started, and its address for the other one."""

    prefix: tuple[str, ...]  # of a command that runs there
    address: str
    interface: str

    def environment(self) -> dict[str, str]:
        """For gloo."""
        return {"GLOO_SOCKET_IFNAME": self.interface}


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Namespaces if this process may make some. They are removed afterwards."""
    names = [f"dg{os.getpid()}{side}" for side in "ab"]
    cables = [f"dg{os.getpid() % 10**6}{side}" for side in "ab"]
    try:
        made = _joined(names, cables)
        if made is None:
            yield Node((), "127.0.0.1", "lo"), Node((), "127.0.0.2", "lo")
        else:
            yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _joined(names: list[str], cables: list[str]) -> tuple[Node, Node] | None:
    """None where the kernel or the machine does not allow it."""
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add {cables[0]} netns {names[0]} type veth peer name {cables[1]} netns {names[1]}")
    addresses = ["10.77.0.1", "10.77.0.2"]
    for name, cable, address in zip(names, cables, addresses, strict=True):
        inside = f"ip -n {name}"
        commands += [f"{inside} addr add {address}/24 dev {cable}", f"{inside} link set {cable} up"]
        commands.append(f"{inside} link set lo up")
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    one, two = (
        Node(("ip", "netns", "exec", name), address, cable)
        for name, cable, address in zip(names, cables, addresses, strict=True)
    )
    return one, two
