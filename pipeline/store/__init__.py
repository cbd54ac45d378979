"""Content-addressed storage of artifacts and of the records of stage calls.

The public names are loaded when they are first asked for, so that a module of this package can be imported alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.store.context import current_store, use_store
    from pipeline.store.files import (
        DamagedArtifactError,
        MissingArtifactError,
        PrunedArtifactError,
        StoreError,
        canonical_json,
        sha256_of,
    )
    from pipeline.store.store import Store

__all__ = [
    "DamagedArtifactError",
    "MissingArtifactError",
    "PrunedArtifactError",
    "Store",
    "StoreError",
    "canonical_json",
    "current_store",
    "sha256_of",
    "use_store",
]

_MODULES = {"Store": "store", "current_store": "context", "use_store": "context"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'files')}"), name)
    globals()[name] = value
    return value
