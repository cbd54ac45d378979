"""The sampler's process (`stages/rollout/apart.py` gives the orders)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.workers.rpc import perform


def make_handler() -> Callable[[dict[str, Any], Callable[[str, dict[str, Any]], None]], Any]:
    """Import what sampling needs; return the handler of orders, each of which names a function."""
    import stages.rollout.hf  # noqa: F401 - so that the first order does not wait for it
    from stages.rollout.engines import hold_weights
    from stages.rollout.stage import sample_outputs

    functions = {function.__name__: function for function in (hold_weights, sample_outputs)}
    return lambda order, report: perform(order, functions[order["function"]], report)
