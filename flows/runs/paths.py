"""Where a project's data lies: one root folder with the store, the runs, MLflow's database and Prefect's home.

The environment's COHORT_STORE moves the store alone: into another folder, or behind a URL (`s3://bucket/folder`) that several
machines share, of which `store` under the root is then the cache. Runs and databases stay under the root.
"""

from __future__ import annotations

import functools
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.derivation.materialise import materialise
from pipeline.remote.bucket import is_url
from pipeline.store import Store


@dataclass(frozen=True)
class Places:
    """The folders under a root."""

    root: Path

    @classmethod
    def under(cls, root: Path | None) -> Places:
        """The places under `root`; without one, under the environment's COHORT_ROOT or `./artifacts`.

        Raises:
            ConfigError: the root is a URL.
        """
        chosen = str(root or os.environ.get("COHORT_ROOT") or "artifacts")
        if is_url(chosen):
            raise ConfigError(
                f"--root {chosen}: expected a local folder, for runs, MLflow's database and Prefect's home; a URL is for the "
                "store alone: COHORT_STORE=s3://bucket/folder cohort ..."
            )
        return cls(Path(chosen).expanduser().resolve())

    @property
    def store(self) -> Path:
        """Objects and actions, or those of them that are here when the store lies behind a URL."""
        chosen = os.environ.get("COHORT_STORE") or ""
        return self.root / "store" if is_url(chosen) or not chosen else Path(chosen).expanduser().resolve()

    @property
    def upstream(self) -> str | None:
        """URL of the store that several machines share; None: there is none but the local one."""
        chosen = os.environ.get("COHORT_STORE") or ""
        return chosen if is_url(chosen) else None

    def open_store(self) -> Store:
        """The store, for reading and writing; trained state that was freed is replayed when it is read.

        Nothing is asked of a remote store before something is looked up in it.

        Raises:
            ConfigError: COHORT_STORE is a URL that cannot be a store's, or whose file system's package is not installed.
        """
        store = Store(self.store, self.upstream)
        store.replay = functools.partial(materialise, store)
        return store

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
        return "" if self == Places.under(None) else f" --root {shlex.quote(str(self.root))}"


def nearest(path: Path) -> Path:
    """Return the path itself, or its nearest parent that exists."""
    return path if path.exists() or path == path.parent else nearest(path.parent)
