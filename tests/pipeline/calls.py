"""A record of a stage call, as `@stage` writes it."""

from __future__ import annotations

from typing import Any


def call(result: str, **changes: Any) -> dict[str, Any]:
    """The record of a call that came to `result`, for `Store.record`."""
    made = {"stage": "make", "version": "1", "type": "Folder", "arguments": {}, "seconds": 0.5, "created": 1.0}
    return {**made, "result": result, **changes}
