"""Bytes that artifacts take: tables by the columns that stages write, checkpoints by what training has to keep."""

from __future__ import annotations

from typing import Final

from flows.planning.memory import FLOAT
from flows.planning.shapes import ModelShape
from stages.training import AdamWConfig, TrainingConfig

__all__ = ["checkpoint_bytes", "table_bytes"]

_KEY: Final = 40
"""Question id, sample and offsets of a row."""
_TEXT: Final = 4
"""Characters of a token; ours, of English under a large vocabulary. A character tokenizer has one."""


def checkpoint_bytes(shape: ModelShape, config: TrainingConfig, *, head: bool = True) -> float:
    """float32 weights, with the optimizer's moments where they are kept; of an adapter its own beside the merged weights."""
    parameters = shape.parameters if head else shape.trunk
    kept = config.optimizer_state != "none"
    if config.adapter is not None:
        return FLOAT * (parameters + (1.0 + 2.0 * kept) * shape.adapter(config.adapter.r))
    if not kept:
        return FLOAT * parameters
    if isinstance(config.optimizer, AdamWConfig):
        return FLOAT * 3.0 * parameters
    return FLOAT * (3.0 * parameters - shape.matrices)


def table_bytes(rows: float, prompt: float, output: float, *, kind: str) -> float:
    """A table: of each token ids, log-probability, text and its end (Rollouts), or one number (log-probabilities, values)."""
    per_token = {"rollouts": 3 * FLOAT + _TEXT, "values": FLOAT, "rewards": 0}[kind]
    ids = FLOAT * prompt if kind == "rollouts" else 0.0
    fixed = _KEY + {"rollouts": 40, "values": 0, "rewards": 80}[kind]
    return rows * (fixed + ids + per_token * output)
