"""Ranks on several hosts: what each is told by its environment, and the interface by which it meets the others."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence
from typing import Final

import psutil

from pipeline.config import ConfigError
from stages.training.config import HostConfig

__all__ = ["ADDRESS", "environments_of", "interface_of", "meet_by_address", "starts_of"]

ADDRESS: Final = "COHORT_RANK_ADDRESS"
"""Variable with the address of the host that a rank is on, where there are several."""


def environments_of(
    hosts: Sequence[HostConfig], shared: dict[str, str], inherited: dict[str, str], *, cuda: bool
) -> list[dict[str, str]]:
    """The environment of each rank, by rank: of the first host's that of the flow, of the others' only what it is told.

    Args:
        shared: what all ranks are told.
        inherited: the flow's own environment.
        cuda: train on CUDA devices, of which a host's ranks take the first.
    """
    told: list[dict[str, str]] = []
    for number, host in enumerate(hosts):
        for local in range(host.ranks):
            place = {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": str(local)} if cuda else {"LOCAL_RANK": str(local)}
            own = {"RANK": str(len(told)), "LOCAL_WORLD_SIZE": str(host.ranks), ADDRESS: str(host.address)}
            told.append((inherited if number == 0 else {}) | shared | place | own)
    return told


def starts_of(hosts: Sequence[HostConfig]) -> list[str | None]:
    """Of each rank what starts it, by rank."""
    return [host.start for host in hosts for _ in range(host.ranks)]


def meet_by_address() -> None:
    """Let gloo and nccl of this process talk over the interface that has its host's address, where there is one to keep to.

    Raises:
        ConfigError: as `interface_of`.
    """
    if address := os.environ.get(ADDRESS):
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface_of(address)


def interface_of(address: str) -> str:
    """The network interface of this host that has an IP address; all of 127.0.0.0/8 is the loopback interface's.

    Raises:
        ConfigError: none has it.
    """
    wanted = ipaddress.ip_address(address)
    for name, places in psutil.net_if_addrs().items():
        for place in places:
            if place.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            found = ipaddress.ip_address(place.address.partition("%")[0])
            if found == wanted or (wanted.is_loopback and found.is_loopback and wanted.version == found.version):
                return name
    raise ConfigError(
        f"training.engine.hosts: {address} is no address of {socket.gethostname()}, where it was to be found; name one that "
        "`ip address` lists there"
    )
