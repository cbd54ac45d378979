"""Where a project's data lies: one root folder with the store, the runs, MLflow's database and Prefect's home."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.store import Store

__all__ = ["Places"]


@dataclass(frozen=True)
class Places:
    """The folders under a root."""

    root: Path

    @classmethod
    def under(cls, root: Path | None) -> Places:
        """The places under `root`; without one, under the environment's COHORT_ROOT or `./artifacts`."""
        chosen = root or Path(os.environ.get("COHORT_ROOT") or "artifacts")
        return cls(chosen.expanduser().resolve())

    @property
    def store(self) -> Path:
        """Objects and actions."""
        return self.root / "store"

    def open_store(self) -> Store:
        """The store, for reading and writing; opening it never fails."""
        return Store(self.store)

    def payload(self, digest: str) -> Path:
        """Folder of an artifact, for people to look into; programs read through the store, which verifies."""
        return self.store / "objects" / digest[:2] / digest

    @property
    def runs(self) -> Path:
        """One folder per run."""
        return self.root / "runs"

    @property
    def mlflow(self) -> Path:
        """MLflow's sqlite database."""
        return self.root / "mlflow.db"

    @property
    def prefect(self) -> Path:
        """Home of the local Prefect server."""
        return self.root / "prefect"

    def option(self) -> str:
        """What a command needs so that it finds these places from here: ` --root DIR`, or nothing."""
        return "" if self == Places.under(None) else f" --root {self.root}"
