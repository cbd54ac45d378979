"""Where models that decode are kept warm between calls (`pipeline/residency.py`): a place of its own for each kind.

Rollouts by one kind and held-out outputs by another leave each other's engine alone, which takes half a minute to start. So in
host memory both kinds lie side by side. On a GPU they take turns: vLLM claims its share of the memory when it starts.
"""

from __future__ import annotations

from typing import Final

from pipeline.residency import evict

__all__ = ["HF", "VLLM", "make_room"]

HF: Final = "rollout"
VLLM: Final = "vllm"


def make_room(slot: str, device: str) -> None:
    """Free the other kind's place, where both would be in a GPU's memory."""
    if device == "cuda":
        for other in {HF, VLLM} - {slot}:
            evict(other)
