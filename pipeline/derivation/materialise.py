"""Write trained state whose bytes are not there: by an engine that has it in memory, else by a replay of its calls.

A replay starts from the nearest ancestors that have their bytes. What an update learned from (outputs, rewards, advantages) is
data and in the store: nothing is sampled again. On a CPU the bits are equal; where they are not, the store warns with both
content digests, and the record keeps the earlier one.

Settings outside the key (deadlines, hosts) have their defaults: a record may come from others, and must not bring a command.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.derivation.arguments import describe, read_arguments
from pipeline.lineage import inputs
from pipeline.progress import report
from pipeline.residency import holder_of
from pipeline.stage import function_behind
from pipeline.store import DamagedArtifactError, MissingArtifactError, PrunedArtifactError, Store, use_store
from pipeline.store.actions import key_of
from pipeline.store.context import Call, current_call, current_watch, payloads, running, writing_payloads
from pipeline.store.pins import PinnedArtifactError


class ReplayError(PrunedArtifactError):
    """Trained state cannot be made again from what is in the store; names what is missing and what to do."""


def materialise(store: Store, name: str) -> bool:
    """Make the payload of trained state whole; return whether `name` is one that a call made.

    Checkpoints on the way that were freed are freed again, as far as they were; those that were never written are not now.

    Raises:
        ReplayError: data that the calls were given is gone, or a stage of that version is.
    """
    if not _is_made(store, name):
        return False
    if _written_from_memory(store, name):
        return True
    records = {key: store.action(key) for key in calls_to_replay(store, name)}
    prepared = {key: _prepared(record) for key, record in records.items()}  # all of them, before the first is made
    chain = list(records)
    stages = Counter(record["stage"] for record in records.values())
    text = ", ".join(f"{count:,} x {stage}" if count > 1 else stage for stage, count in stages.items())
    warnings.warn(
        f"{name[:12]} is not there (not written, freed, lost or damaged) and made again: replaying {text}", stacklevel=3
    )
    freed = {key: _freed(store, key) for key in chain[:-1]}
    last_use = {given: key for key in chain for _, given in inputs(records[key]["arguments"]) if given in freed}
    made: list[str] = []
    try:
        with use_store(store):
            for number, key in enumerate(chain):
                report("replay", done=number, total=len(chain))
                with writing_payloads("now" if key == name or records[key].get("content") else "never"):
                    _replay(store, records[key], *prepared[key])
                made.append(key)
                _free(store, {given: freed[given] for given in made if last_use.get(given) == key})
    finally:  # also of a replay that was cut short; what was freed already stays so
        _free(store, {given: freed[given] for given in made if given in freed})
    report("replay", done=len(chain), total=len(chain))
    return True


def _free(store: Store, parts: Mapping[str, frozenset[str] | None]) -> None:
    """Free again what was freed before a replay."""
    for name, files in parts.items():
        with contextlib.suppress(PinnedArtifactError):  # another run needs it now
            store.prune(name, files)


def calls_to_replay(store: Store, name: str) -> list[str]:
    """Return the keys of the calls that must be made again, oldest first; `name` itself is the last.

    Raises:
        ReplayError: as `materialise`.
    """
    found: dict[str, None] = {}
    waiting = [name]
    while waiting:  # an explicit stack: a long training is one chain of thousands of calls
        current = waiting[-1]
        given = [digest for _, digest in inputs(store.action(current)["arguments"])]
        lacking = [digest for digest in given if digest not in found and not store.is_whole(digest)]
        for digest in lacking:
            if not _is_made(store, digest):
                raise ReplayError(
                    f"nothing to replay {name[:12]} from: {digest[:12]}, which {current[:12]} was made from, is not in the "
                    f"store; `cohort forget {digest[:12]}`, and the run that made it again, computes all of it"
                )
        waiting.extend(lacking)
        if not lacking:
            found[waiting.pop()] = None
    return list(found)


def _is_made(store: Store, name: str) -> bool:
    """Return whether a call that can be made again has this result under its own name."""
    try:
        return store.action(name).get("replay") is not None
    except (MissingArtifactError, DamagedArtifactError):
        return False


def _freed(store: Store, key: str) -> frozenset[str] | None:
    """Return the files of a payload that are not there; None: all."""
    try:
        names = {file["name"] for file in store.manifest(key)["files"]}
        return None if store.freed(key) == names else store.freed(key)
    except (MissingArtifactError, DamagedArtifactError):
        return None


def _replay(store: Store, record: dict[str, Any], function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Make a call again, and keep in its record what it came to before where that differs."""
    key, call = record["key"], Call(record["stage"], record["version"], record["arguments"])
    with store.lock(key):
        if store.is_whole(key):
            return
        with running(call):
            function(**arguments)
        if payloads() == "now":
            note_content(store, record)


def note_content(store: Store, record: dict[str, Any]) -> None:
    """Note in the record of a call the content digest of what it made, and the one before where they differ."""
    content, before = store.manifest(record["key"])["digest"], record.get("content")
    if content != before:
        earlier = [*record.get("earlier", []), *([before] if before else [])]
        store.record(record["key"], {**record, "content": content, "earlier": earlier})


def _written_from_memory(store: Store, name: str) -> bool:
    """Let the resident engine write trained state that has it in memory; return whether one has."""
    try:
        manifest = store.manifest(name)
    except (MissingArtifactError, DamagedArtifactError):
        return False
    holder = holder_of(manifest["state"]) if manifest.get("unwritten") else None
    if holder is None:
        return False
    with use_store(store), contextlib.suppress(MissingArtifactError):
        holder.write(name)
        return True
    return False


def write_payload(store: Store, name: str, fill: Callable[[Path], None]) -> None:
    """Publish all files of trained state that only its description is in the store of, and note their content digest."""
    manifest = store.manifest(name)
    about = {part: manifest[part] for part in ("type", "provenance", "state")}
    call = current_call()  # which made the state, where it is written while the next one runs
    store.publish(fill, about=about, name=name, remedy=call.remedy if call else "")
    with (
        store.lock(name),
        contextlib.suppress(MissingArtifactError),
    ):  # of a call that failed behind this there is no record
        note_content(store, store.action(name))
    if (watch := current_watch()) is not None:
        watch.wrote(manifest["provenance"]["stage"], store.folder(name))


def _prepared(record: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the function of a recorded call and its arguments, which must be those of the key."""
    stage, version = record["stage"], record["version"]
    try:
        function, installed = function_behind(record["replay"]["function"])
        arguments = read_arguments(function, record["replay"]["arguments"])
    except (KeyError, ValueError) as error:
        raise ReplayError(
            f"{record['key'][:12]} cannot be replayed: {stage} (version {version}) cannot be called any more ({error}); "
            "install the version of Cohort that made it"
        ) from None
    described = {parameter: describe(value) for parameter, value in arguments.items()}
    if installed != version or key_of(stage, version, described) != record["key"]:
        raise ReplayError(
            f"{record['key'][:12]} cannot be replayed: it was made by {stage} version {version}, and version {installed} is "
            "installed; install the version of Cohort that made it, or run the configuration again"
        )
    return function, arguments
