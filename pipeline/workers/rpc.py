"""The body of a stage executed by other processes: the call and its result as JSON.

Artifacts travel by name, configs as their values (`pipeline/derivation/arguments.py`). An order holds no code and nothing
pickled; the receiver looks the function up among those that it offers. Cache, locks and the record of the call stay with the
process that gives the order.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pipeline.artifact import Artifact
from pipeline.derivation.arguments import describe, kinds_of, read_arguments, write_arguments
from pipeline.progress import listen
from pipeline.store import Store, current_store, use_store
from pipeline.store.context import Call, current_call, payloads, record_metrics, running, writing_payloads

_OURS: Final = tuple(str(Path(__file__).parents[2] / package) + os.sep for package in ("pipeline", "stages"))


def order_of(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the order to call `function`, which the other side knows as `name`, for the running stage and its store.

    Raise TypeError for an argument that is not of the class its parameter is annotated with.
    """
    call = current_call()
    return {
        "function": name,
        "store": str(current_store().root),
        "trusted": sorted(current_store().trusted),
        "payloads": payloads(),
        "call": call and {"stage": call.stage, "version": call.version, "arguments": call.arguments},
        "arguments": write_arguments(function, arguments, keyed=False),
        "described": {parameter: describe(value) for parameter, value in arguments.items()},
    }


def perform(
    order: Mapping[str, Any], function: Callable[..., Artifact], report: Callable[[str, dict[str, Any]], None]
) -> dict[str, Any]:
    """Execute an order: call `function` on what it names and pass on its progress.

    Raise ValueError where the arguments are not those that were sent: the two sides run different code.
    """
    arguments = read_arguments(function, order["arguments"])
    if {parameter: describe(value) for parameter, value in arguments.items()} != order["described"]:
        raise ValueError(
            f"{order['function']}: arguments differ from those that were sent; was the code changed since?"
        )
    store = _store(order["store"])
    store.trusted = set(order["trusted"])  # what this order's configuration pins, and none before it
    call = Call(**(order["call"] or {"stage": order["function"], "version": "", "arguments": {}}))
    when = writing_payloads(order["payloads"])
    with running(call), use_store(store), when, listen(report), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        result = function(**arguments)
    ours = [str(warning.message) for warning in caught if warning.filename.startswith(_OURS)]
    return {"digest": result.digest, "metrics": call.metrics, "warnings": list(dict.fromkeys(ours))}


def accept(reply: Mapping[str, Any], function: Callable[..., Any]) -> Any:
    """Return the artifact that a reply names; record its metrics and repeat its warnings as if `function` had run here."""
    for text in reply["warnings"]:
        warnings.warn(text, stacklevel=2)
    record_metrics(reply["metrics"])
    return kinds_of(function)["return"](reply["digest"])


_store = functools.cache(Store)  # one for all orders: what it has verified stays so
