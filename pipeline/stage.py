"""`@stage`: a plain function from artifacts and configs to an artifact that asks the store before it works; and `@flow`.

The key of a call hashes stage name, version, configs and plain values by parameter name, and the digests of the artifacts it
is given. A hit returns the recorded artifact; a miss runs the function under a lock on its key, then records the action last;
it does not start where it would fill the disk (`pipeline/store/files.py`).

`@flow` marks a function that loops over stages; `use_engine` around the call chooses the engine. Inline is the default: a plain
call that imports no Prefect, so Slurm jobs, debuggers and tests need no server. On the Prefect engine each call of a stage is a
task; a hit shows there as a state named `Cached`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import sys
import time
import types
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from pipeline.artifact import Artifact
from pipeline.derivation.arguments import describe, write_arguments
from pipeline.events import StageDone, StageFailed, StageStarted, emit
from pipeline.orchestration.interruption import check, interruptible
from pipeline.store import Store, current_store
from pipeline.store.actions import key_of
from pipeline.store.context import Call, current_engine, current_watch, record_metrics, running, use_engine

__all__ = ["flow", "joining", "record_metrics", "run_as_task", "running_deployment", "stage"]

_functions: dict[str, tuple[Callable[..., Artifact], str]] = {}
"""`module:name` of every stage that was imported -> the function behind the cache, and its version."""

P = ParamSpec("P")
A = TypeVar("A", bound=Artifact)
R = TypeVar("R")


def stage(*, version: str, own: Callable[..., bool] | None = None) -> Callable[[Callable[P, A]], Callable[P, A]]:
    """Make a function a cached stage.

    Args:
        version: part of the cache key; raise it whenever the function's result changes for equal inputs.
        own: called as the stage is; true where only a call that was carried out in this folder is a hit, and none that came
            with an archive or from a shared store, since its result brings code that will run.
    """

    def decorate(function: Callable[P, A]) -> Callable[P, A]:
        signature = inspect.signature(function)
        name = function.__name__
        if "return" not in function.__annotations__:
            raise TypeError(f"stage {name}: annotate the artifact it returns, `-> Questions`")
        kind = functools.cache(lambda: _return_type(function))
        where = f"{function.__module__}:{name}"
        _functions[where] = (function, version)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> A:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = {parameter: _describe(name, parameter, value) for parameter, value in bound.arguments.items()}
            key = key_of(name, version, arguments)
            store, mine = current_store(), own is not None and own(*args, **kwargs)
            check()

            def look_up() -> A | None:
                record = store.find(key, own=mine)
                if record is None:
                    return None
                if (watch := current_watch()) is not None:
                    watch.found(name, record["result"])
                emit(StageDone(name, key, record["result"], record["seconds"], cached=True))
                return kind()(record["result"], key)

            def compute() -> A:
                with store.lock(key):
                    # Another launcher may have computed it while this one waited for the lock.
                    found = look_up()
                    if found is not None:
                        return found
                    work = functools.partial(function, *args, **kwargs)

                    def replayed() -> dict[str, Any]:
                        return {"function": where, "arguments": write_arguments(function, bound.arguments, keyed=True)}

                    made = _execute(store, key, Call(name, version, arguments), kind(), work, replayed)
                    if mine:
                        store.sign(key, made.digest)
                    return made

            return run_as_task(name, look_up, compute)

        return call

    return decorate


def _return_type(function: Callable[..., A]) -> type[A]:
    """Return the artifact class a stage is annotated with; other annotations may name what is imported for typing only."""
    only = types.SimpleNamespace(__annotations__={"return": function.__annotations__["return"]})
    kind: type[A] = typing.get_type_hints(only, globalns=inspect.unwrap(function).__globals__)["return"]
    return kind


def _describe(stage_name: str, parameter: str, value: Any) -> Any:
    try:
        return describe(value)
    except TypeError as error:
        raise TypeError(f"{stage_name}({parameter}=...): {error}") from None


def function_behind(where: str) -> tuple[Callable[..., Artifact], str]:
    """Return the function of the stage `module:name`, without its cache, and its version.

    A module is imported for it only where its top package is one that other stages are from.

    Raises:
        KeyError: there is no such stage (any more).
    """
    module = where.partition(":")[0]
    if where not in _functions and module.partition(".")[0] in {known.partition(".")[0] for known in _functions}:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    return _functions[where]


def _execute(
    store: Store, key: str, call: Call, kind: type[A], work: Callable[[], A], replayed: Callable[[], dict[str, Any]]
) -> A:
    emit(StageStarted(call.stage, key))
    started, watch = time.perf_counter(), current_watch()
    try:
        with running(call):
            if watch is not None:
                watch.before(call.stage, store.manifest)
            result = work()
            if not isinstance(result, kind):
                raise TypeError(
                    f"stage {call.stage} is annotated to return {kind.__name__}; it returned {result!r:.100}"
                )
            seconds = time.perf_counter() - started
            about: dict[str, Any] = {"result": result.digest, "type": kind.__name__, "seconds": seconds}
            store.pin(result.digest)  # another process may have published it
            if result.digest == key:
                about |= {"content": result.content, "replay": replayed()}
            store.record(key, {**about, **call.provenance()})
            if watch is not None and store.is_written(result.digest):
                watch.wrote(call.stage, store.folder(result.digest))
    except BaseException as error:
        emit(StageFailed(call.stage, key, f"{type(error).__name__}: {error}"))
        raise
    emit(StageDone(call.stage, key, result.digest, seconds, cached=False))
    return dataclasses.replace(result, action=key)


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
