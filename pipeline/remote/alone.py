"""What stands where a store has no remote one: nothing more to find, nowhere to upload to."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pipeline.store.files import MissingArtifactError

__all__ = ["Alone"]


class Alone:
    """The calls of `Mirror`, for a store that is nobody's cache."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def owe(self, kind: str, name: str) -> None:
        """Nothing is owed."""

    def flush(self) -> None:
        """Nothing is owed."""

    def settle(self) -> None:
        """Nothing is owed."""

    def pull(self, digest: str, into: Path) -> bool:
        """There is no other copy."""
        return False

    def holds(self, digest: str) -> bool:
        """There is no other copy."""
        return False

    def about(self, digest: str) -> Path:
        """The folder where the manifest would be."""
        raise MissingArtifactError(f"no artifact {digest} in {self._root}; run the command that made it again")

    def outline(self, digest: str, folder: Path) -> None:
        """What is not here is nowhere."""

    def refuse(self, digest: str) -> None:
        """There is no other machine."""

    def prune(self, folder: Path) -> int:
        """There is no other copy."""
        return 0

    def digests(self) -> list[str]:
        """None but those that are here."""
        return []

    def fetch_record(self, key: str) -> None:
        """There are none but those that are here."""

    def fetch_records(self) -> None:
        """There are none but those that are here."""

    def forget(self, keys: list[str]) -> None:
        """There are none but those that are here."""

    def lock(self, key: str) -> contextlib.AbstractContextManager[None]:
        """`flock` suffices."""
        return contextlib.nullcontext()

    def handed(self, digest: str, folder: Path) -> None:
        """Nothing is evicted."""
