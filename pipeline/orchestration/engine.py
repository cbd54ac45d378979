"""Run flows and tasks inline (a plain call) or through Prefect (states, logs, UI).

`@flow` marks a function that loops over stages; `use_engine` around the call chooses the engine. Inline is the default and
imports no Prefect, so Slurm jobs, debuggers and tests need no server.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from pipeline.orchestration.interruption import interruptible
from pipeline.store.context import Engine, current_engine, use_engine

__all__ = ["Engine", "flow", "joining", "run_as_task", "running_deployment", "use_engine"]

P = ParamSpec("P")
R = TypeVar("R")


def running_deployment() -> bool:
    """Return whether this is called inside a flow run that a Prefect worker started."""
    if "prefect.context" not in sys.modules:
        return False
    context = sys.modules["prefect.context"].FlowRunContext.get()
    return bool(context and context.flow_run and context.flow_run.deployment_id)


def joining() -> contextlib.AbstractContextManager[None]:
    """Run flows on the Prefect engine as part of the flow run that is there, which then shows their tasks as its own."""
    return use_engine("joined")


def flow(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function a flow: a Prefect flow on the Prefect engine, itself otherwise."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if current_engine() == "inline":
            return function(*args, **kwargs)
        import prefect
        from prefect.context import TagsContext

        @functools.wraps(function)
        def body(*args: P.args, **kwargs: P.kwargs) -> R:
            # The flow's tags are not its tasks': each tag of a task costs a look-up of concurrency limits at the server.
            with interruptible(), TagsContext(current_tags=set()):
                return function(*args, **kwargs)

        if current_engine() == "joined":
            return body(*args, **kwargs)
        run: Callable[P, R] = prefect.flow(
            body, name=function.__name__.replace("_", "-"), validate_parameters=False, persist_result=False
        )
        return run(*args, **kwargs)

    return call


def run_as_task(name: str, look_up: Callable[[], R | None], compute: Callable[[], R]) -> R:
    """Return `look_up()`, else `compute()`; on the Prefect engine as a task, in which a hit is a state named `Cached`."""
    if current_engine() == "inline":
        found = look_up()
        return compute() if found is None else found
    import prefect
    from prefect.cache_policies import NO_CACHE
    from prefect.states import Completed

    def body() -> Any:
        found = look_up()
        return compute() if found is None else Completed(name="Cached", data=found)

    # A task that returns a State hands the State to its caller, hence return_state and result().
    task = prefect.task(body, name=name, cache_policy=NO_CACHE, persist_result=False)
    result: R = task(return_state=True).result()
    return result
