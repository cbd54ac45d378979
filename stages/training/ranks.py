"""Run the body of a stage in a group of processes that is started once and stays warm between calls.

The flow's process asks the cache, holds the lock and records the call; every rank computes the body in lockstep, and rank 0
reports. A group that failed is gone: the next call starts another, whose engines load what they need from artifacts.

Each rank is a process in a session of its own, so that its exit code is known and a kill reaches what it started. (Workers of
torchrun have sessions too, but a killed torchrun leaves them behind.) The rendezvous is a file: there is no port that could be
taken, or that others could reach. Several hosts differ in how a rank is started; the file then lies in the store's folder,
which all hosts see.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import inspect
import ipaddress
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import psutil

from pipeline.artifact import Artifact, ArtifactError
from pipeline.config import ConfigError
from pipeline.residency import evict, holder_of, resident
from pipeline.store import DamagedArtifactError, MissingArtifactError, PrunedArtifactError, StoreError, current_store
from pipeline.workers.group import Group, RefusedError, WorkerError, importing_ours
from pipeline.workers.rpc import accept, order_of
from stages.models import Checkpoint
from stages.training.config import DeepSpeedEngineConfig, HostConfig
from stages.training.hardware import cores, cuda_devices, training_device, within_quota

P = ParamSpec("P")
A = TypeVar("A", bound=Artifact)

RANK_VARIABLES: Final = (
    "RANK",
    "WORLD_",
    "GROUP_",
    "ROLE_",
    "LOCAL_",
    "MASTER_",
    "TORCHELASTIC_",
    "SLURM_",
    "OMPI_",
    "PMI",
)
"""Prefixes of variables by which a surrounding launcher would make a process a rank of something else."""
RENDEZVOUS: Final = "COHORT_RENDEZVOUS"
"""Variable with the file through which the ranks find one another."""
ADDRESS: Final = "COHORT_RANK_ADDRESS"
"""Variable with the address of the host that a rank is on, where there are several."""
LOOPBACK: Final = "127.0.0.1"
_SLOT: Final = "ranks"
_SAME: Final[dict[str, type[Exception]]] = {
    kind.__name__: kind
    for kind in (
        *(ValueError, ArtifactError, ConfigError),
        *(StoreError, MissingArtifactError, DamagedArtifactError, PrunedArtifactError),
    )
}
"""Errors about data or store, which are raised here as they would be with one rank."""

_bodies: dict[str, Callable[..., Artifact]] = {}


def on_ranks(function: Callable[P, A]) -> Callable[P, A]:
    """Let the body of a stage run on the ranks that its parameter `config` asks for; with one, in this process.

    Goes under `@stage`. Each rank calls the body with the same arguments: it trains through `resident_engine` and `publish`,
    which know their rank.
    """
    name = f"{function.__module__}:{function.__name__}"
    signature = inspect.signature(function)
    _bodies[name] = function

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> A:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        config = bound.arguments["config"]
        engine = getattr(config, "training", config).engine
        if not isinstance(engine, DeepSpeedEngineConfig) or engine.ranks == 1:
            return function(*args, **kwargs)
        order = order_of(name, function, bound.arguments)
        try:
            reply = _ordered(order, engine)
        except PrunedArtifactError as error:  # the ranks only read
            named = [
                value.digest
                for value in bound.arguments.values()
                if isinstance(value, Checkpoint) and value.digest[:12] in str(error)
            ]
            if not any(current_store().make_whole(digest) for digest in named):
                raise
            reply = _ordered(order, engine)
        result: A = accept(reply, function)
        if isinstance(result, Checkpoint) and result.content is None:
            resident(_SLOT, _group_key(engine), lambda: Ranks(engine)).held[name] = result.state
        return result

    return call


def body_called(name: str) -> Callable[..., Artifact]:
    """Return the body behind a name, "module:function": of a stage that runs on ranks, and nothing else.

    Raises:
        ValueError: something else.
    """
    module, _, _ = name.partition(":")
    if re.fullmatch(r"stages(\.[a-z_]+)+", module):
        importlib.import_module(module)
    if name not in _bodies:
        raise ValueError(f"{name!r} is no stage that runs on ranks")
    return _bodies[name]


class Ranks:
    """Keep the group as a resident of the flow's process, with its folder of logs."""

    def __init__(self, engine: DeepSpeedEngineConfig) -> None:
        for slot in ("trainer", "reference", "reward_trainer", "critic"):
            evict(slot)  # models that this process trained, on one rank, would stay in memory with those of the ranks
        cuda = training_device() == "cuda"
        if engine.hosts:
            shared = _shared(engine.ranks, engine.hosts[0].ranks, cuda=cuda)
            given = environments_of(engine.hosts, shared, _inherited(), cuda=cuda)
        else:
            given = environments(engine.ranks, devices=cuda_devices() or None)
        self.engine = engine
        self.held: dict[str, str] = {}
        """Stage -> `Artifact.state` of what the ranks trained in it last, where that was not written."""
        self._folder = Path(tempfile.mkdtemp(prefix="cohort-ranks-"))
        # Logs are this host's; all hosts see the folder of the rendezvous.
        self._rendezvous = (
            Path(tempfile.mkdtemp(prefix=".ranks-", dir=current_store().root)) if engine.hosts else self._folder
        )
        rendezvous = {RENDEZVOUS: str(self._rendezvous / "rendezvous")}
        try:
            self.group = Group(
                "training",
                Path(__file__).with_name("process_group.py"),
                python=Path(sys.executable),
                environments=[environment | rendezvous for environment in given],
                logs=self._folder,
                deadline=engine.deadline,
                address=str(engine.hosts[0].address) if engine.hosts else LOOPBACK,
                starts=starts_of(engine.hosts) or None,
            )
        except BaseException:
            self._remove_rendezvous()
            raise
        atexit.register(self.close)

    def has(self, state: str) -> bool:
        """Return whether the ranks trained it last (`Holder`)."""
        return self.group.alive and state in self.held.values()

    def write(self, name: str) -> None:
        """Let the ranks write what they hold (`Holder`)."""
        self._order(write_held, Checkpoint(name))

    def hand_over(self, name: str, folder: Path, *, half: bool) -> None:
        """Let the ranks write the weights that they hold into a folder of this host."""
        self._order(hand_over_held, Checkpoint(name), str(folder), half)

    def _order(self, function: Callable[..., Checkpoint], *args: Any) -> None:
        given = inspect.signature(function).bind(*args).arguments
        _ordered(order_of(f"{function.__module__}:{function.__name__}", function, given), self.engine)

    def close(self) -> None:
        """End the ranks. The logs go with them, unless they failed: errors name the file."""
        atexit.unregister(self.close)
        self.group.close()
        self._remove_rendezvous()
        if not self.group.failed:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _remove_rendezvous(self) -> None:
        if self._rendezvous != self._folder:
            shutil.rmtree(self._rendezvous, ignore_errors=True)


def environments(count: int, *, devices: Sequence[str] | None) -> list[dict[str, str]]:
    """Return the environment of each rank: this process's, without the variables of another launcher.

    Args:
        devices: the CUDA devices that may be used; None: train on the CPU.

    Raises:
        ConfigError: fewer devices than ranks.
    """
    if devices is not None and len(devices) < count:
        raise ConfigError(
            f"training.engine.ranks: expected at most {len(devices)}, the CUDA devices of this machine, found {count}; name "
            "the hosts that have more in training.engine.hosts"
        )
    shared = _shared(count, count, cuda=devices is not None) | {"LOCAL_WORLD_SIZE": str(count)}
    if devices is None:
        shared |= {"GLOO_SOCKET_IFNAME": interface_of(LOOPBACK)}
    return [_inherited() | shared | _place(rank, devices) for rank in range(count)]


def _inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(RANK_VARIABLES)}


def _shared(count: int, here: int, *, cuda: bool) -> dict[str, str]:
    """Return the variables that all ranks get; `here` of them share this host's cores."""
    return ({} if cuda else {"DS_ACCELERATOR": "cpu"}) | {
        "PYTHONPATH": importing_ours(os.environ)["PYTHONPATH"],
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, within_quota(cores()) // here)),
    }


def _place(rank: int, devices: Sequence[str] | None) -> dict[str, str]:
    """Return the variables that say which rank it is. One that sees a single device has the first of those it sees."""
    if devices is None:
        return {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return {"RANK": str(rank), "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": devices[rank]}


def _ordered(order: Mapping[str, Any], engine: DeepSpeedEngineConfig) -> dict[str, Any]:
    """Return the reply of rank 0, once all ranks have replied.

    Raises:
        WorkerError: a rank died, hung or failed; the group is gone.
        ValueError, StoreError: what the body says of its data or of the store.
    """
    key = _group_key(engine)
    ranks = resident(_SLOT, key, lambda: Ranks(engine))
    if not ranks.group.alive:  # died between two calls, or with an earlier one
        evict(_SLOT)
        ranks = resident(_SLOT, key, lambda: Ranks(engine))
    try:
        replies = ranks.group.order(order, deadline=engine.deadline, renewed=True)
    except RefusedError as error:
        for kind in error.kinds:
            if kind in _SAME:
                raise _SAME[kind](error.text) from error
        raise
    digests = {reply["digest"] for reply in replies}
    if len(digests) > 1:
        raise WorkerError(f"training: the ranks ended with different artifacts: {sorted(digests)}", rank=0)
    reply: dict[str, Any] = replies[0]
    return reply


def _group_key(engine: DeepSpeedEngineConfig) -> tuple[object, ...]:
    return engine.ranks, engine.hosts


def write_held(checkpoint: Checkpoint) -> Checkpoint:
    """Write the payload of a checkpoint that the engines of all ranks hold; each takes part in gathering it."""
    _held(checkpoint).write(checkpoint.digest)
    return checkpoint


def hand_over_held(checkpoint: Checkpoint, folder: str, half: bool) -> Checkpoint:
    """Write the weights of a checkpoint that the engines of all ranks hold into a folder of the first one's host."""
    _held(checkpoint).hand_over(checkpoint.digest, Path(folder), half=half)
    return checkpoint


def _held(checkpoint: Checkpoint) -> Any:
    holder = holder_of(checkpoint.state)
    if holder is None:
        raise MissingArtifactError(f"{checkpoint}: this rank holds it no longer; it is replayed")
    return holder


_bodies |= {f"{body.__module__}:{body.__name__}": body for body in (write_held, hand_over_held)}


def environments_of(
    hosts: Sequence[HostConfig], shared: dict[str, str], inherited: dict[str, str], *, cuda: bool
) -> list[dict[str, str]]:
    """Return the environment of each rank, by rank: on the first host the flow's with its own, on the others its own only.

    Args:
        shared: variables that all ranks get.
        inherited: the flow's own environment.
        cuda: train on CUDA devices, of which a host's ranks take the first.
    """
    made: list[dict[str, str]] = []
    for number, host in enumerate(hosts):
        for local in range(host.ranks):
            place = {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": str(local)} if cuda else {"LOCAL_RANK": str(local)}
            own = {"RANK": str(len(made)), "LOCAL_WORLD_SIZE": str(host.ranks), ADDRESS: str(host.address)}
            made.append((inherited if number == 0 else {}) | shared | place | own)
    return made


def starts_of(hosts: Sequence[HostConfig]) -> list[str | None]:
    """Return the command that starts each rank, by rank; None: a process of this host."""
    return [host.start for host in hosts for _ in range(host.ranks)]


def select_interface() -> None:
    """Make gloo and nccl of this process use the interface with its host's address, where ADDRESS names one.

    Raises:
        ConfigError: as `interface_of`.
    """
    if address := os.environ.get(ADDRESS):
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface_of(address)


def interface_of(address: str) -> str:
    """Return the network interface of this host that has an IP address; the loopback interface has all of 127.0.0.0/8.

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
