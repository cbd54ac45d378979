"""Sample in a process of its own, so that the policy can be updated in this one meanwhile.

`sampler_process.py` is its other end. The process is started once and stays warm. It is given the weights before it samples:
once it holds them, they may change here. Cache, locks and the record of the call stay in this process.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pipeline.residency import evict, kept, resident
from pipeline.workers.group import Group, importing_ours
from pipeline.workers.rpc import accept, order_of
from stages.models import Checkpoint, model_folder
from stages.rollout.config import HFBackendConfig

_SLOT: Final = "sampler"
_DEADLINE: Final = 600.0
"""Seconds without a sign of life until the process is taken to hang; while it decodes it gives two a second."""


def sampler() -> Sampler:
    """Return the process, which is started where there is none that can take orders."""
    found = resident(_SLOT, None, Sampler)
    if not found.group.alive:
        evict(_SLOT)
        found = resident(_SLOT, None, Sampler)
    return found


def stop_sampler(reason: str) -> None:
    """Stop what the process computes: the thread that waits for it raises KeyboardInterrupt with the reason."""
    if (found := kept(_SLOT, None)) is not None:
        found.group.stop(reason)


class Sampler:
    """The process, and what it has the weights of."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="cohort-sampler-"))
        self._holds: tuple[str, HFBackendConfig] | None = None
        try:
            self.group = Group(
                "sampler",
                Path(__file__).with_name("sampler_process.py"),
                python=Path(sys.executable),
                environments=[importing_ours(os.environ)],
                logs=self._folder,
                deadline=_DEADLINE,
            )
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        atexit.register(self.close)

    def hold(self, policy: Checkpoint, backend: HFBackendConfig, load: Callable[..., Checkpoint]) -> None:
        """Give it the weights of a policy.

        Args:
            load: loads them there, given the policy, the backend and a folder (`HandedOver`).
        """
        from stages.training.hardware import inference_dtype

        if self._holds == (policy.state, backend):
            return
        self._holds = None
        with model_folder(policy, inference_dtype(backend.dtype)) as source:
            self.call(load, {"policy": policy, "backend": backend, "folder": str(source)})
        self._holds = policy.state, backend

    def call(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Let it carry out one of its functions.

        Raises:
            WorkerError: it died, hung, or says what was wrong.
        """
        order = order_of(function.__name__, function, arguments)
        (reply,) = self.group.order(order, deadline=_DEADLINE, renewed=True)
        return accept(reply, function)

    def close(self) -> None:
        """End the process. Its log stays where it failed."""
        atexit.unregister(self.close)
        self.group.close()
        if not self.group.failed:
            shutil.rmtree(self._folder, ignore_errors=True)


class HandedOver:
    """In the process: weights that the other one put into a folder, unless they are in the store (`Holder`)."""

    state = ""
    folder = Path()

    def has(self, state: str) -> bool:
        """Return whether they are those of a state."""
        return state == self.state

    def write(self, name: str) -> None:
        """Write nothing: the other process has the state."""

    def hand_over(self, name: str, folder: Path, *, half: bool) -> None:
        """Link them into another folder."""
        for file in self.folder.iterdir():
            if not (folder / file.name).exists():
                (folder / file.name).symlink_to(file)
