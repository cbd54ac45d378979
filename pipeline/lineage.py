"""Find where an artifact comes from, and why a stage call differs from an earlier one, in the action records of the store."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final

from pipeline.store import MissingArtifactError, Store

Record = dict[str, Any]

ABSENT: Final = "(absent)"
"""The value in a `Change` of a part that one of two calls does not have."""


@dataclasses.dataclass(frozen=True)
class Ancestor:
    """An artifact with the stage call that first made it."""

    digest: str
    kind: str
    """Type of the artifact (`Checkpoint`, `Rollouts`, ...)."""
    stage: str | None
    """None: published outside of any stage."""
    key: str | None
    """Key of the call."""
    seconds: float
    """What the call took when it was executed."""
    inputs: tuple[tuple[str, str], ...]
    """Parameter and digest of every artifact the call was given."""

    @property
    def label(self) -> str:
        """Return one line for people."""
        made = f"{self.stage}, {self.seconds:.1f} s" if self.stage else "not made by a stage"
        return f"{self.kind} {self.digest[:12]} ({made})"


@dataclasses.dataclass(frozen=True)
class Change:
    """One part of a key that differs from an earlier call."""

    stage: str
    part: str
    """`version`, or a parameter with a dotted key: `config.rollout.G`."""
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.part}: {self.before} -> {self.after}"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why a call computed, by comparison with the nearest earlier call of the same stage."""

    record: Record
    nearest: Record | None
    """None: the stage was never called before."""
    changes: tuple[Change, ...]
    """What differs in this call."""
    causes: tuple[Change, ...]
    """The differences that were not computed: configs, versions, plain values, here or in the calls that made the inputs."""

    def __str__(self) -> str:
        name = f"{self.record['stage']} {self.record['key'][:12]}"
        if self.nearest is None:
            return f"{name}: no earlier call of this stage"
        head = f"{name}: differs from the earlier call {self.nearest['key'][:12]} in"
        lines = [f"  {change.part}: {change.before} -> {change.after}" for change in self.changes]
        upstream = [f"  {cause}" for cause in self.causes if cause not in self.changes]
        return "\n".join([head, *lines, *(["because upstream", *upstream] if upstream else [])])


def ancestry(store: Store, digest: str, *, key: str | None = None, calls: Collection[str] = ()) -> dict[str, Ancestor]:
    """Return every artifact that `digest` was made from, itself first, nearest first.

    Args:
        key: the call that is meant, where several calls gave equal content (an update without a gradient returns the policy
            it was given); by default the earliest that did not consume its own result.
        calls: keys of a run's calls, which are meant before others that gave equal content: policies of two runs may have
            sampled the same outputs.
    """
    records = store.actions()
    makers = producers(records) | producers(record for record in records if record["key"] in calls)
    if key is not None:
        makers[digest] = store.action(key)
    found: dict[str, Ancestor] = {}
    waiting = [digest]
    for current in waiting:  # grows while it is walked: breadth first
        if current not in found:
            found[current] = _ancestor(store, current, makers.get(current))
            waiting.extend(source for _, source in found[current].inputs)
    return found


def mermaid(ancestors: Mapping[str, Ancestor]) -> str:
    """Return the graph as Mermaid text, from origins to result; GitHub and MLflow notes draw it."""
    names = {digest: f"a{number}" for number, digest in enumerate(ancestors)}
    lines = ["flowchart LR"]
    for digest, ancestor in ancestors.items():
        shape = '[("{}")]' if ancestor.stage is None else '["{}"]'
        lines.append(f"  {names[digest]}{shape.format(f'{_word(ancestor.kind)}<br/>{digest[:12]}')}")
    for digest, ancestor in ancestors.items():
        for parameter, source in ancestor.inputs:
            lines.append(f'  {names[source]} -- "{_word(parameter)}" --> {names[digest]}')
    return "\n".join(lines) + "\n"


def _word(text: str) -> str:
    """Return text of a record that Mermaid, and the HTML made of it, reads as nothing but text."""
    return re.sub(r"[^\w .\[\]-]", "_", text)


def tree(ancestors: Mapping[str, Ancestor], *, depth: int | None = None, notes: Mapping[str, str] | None = None) -> str:
    """Return the graph as indented text, result first, `depth` generations; what was shown above is not repeated.

    Args:
        notes: digest -> what is said of an artifact besides.
    """
    shown: set[str] = set()
    lines: list[str] = []
    # An explicit stack: a long training is one chain of thousands of generations.
    stack = [(next(iter(ancestors)), "", 0)]
    while stack:
        digest, parameter, level = stack.pop()
        ancestor = ancestors[digest]
        seen = digest in shown
        shown.add(digest)
        said = f", {notes[digest]}" if notes and digest in notes else ""
        note = ", shown above" if seen and ancestor.inputs else said
        lines.append(f"{'  ' * level}{f'{parameter}: ' if parameter else ''}{ancestor.label}{note}")
        if not seen and (depth is None or level < depth):
            stack.extend((source, name, level + 1) for name, source in reversed(ancestor.inputs))
    return "\n".join(lines)


def explain(store: Store, record: Record) -> Explanation:
    """Compare a call, made or about to be made, with the earlier call of its stage that differs in the fewest parts."""
    created = record.get("created", float("inf"))
    earlier = [
        other
        for other in store.actions()
        if other["stage"] == record["stage"] and other["key"] != record["key"] and other["created"] <= created
    ]
    if not earlier:
        return Explanation(record, None, (), ())
    # Of equally near ones the latest: min keeps the first.
    nearest = min(reversed(earlier), key=lambda other: len(_changes(other, record)))
    return compare_calls(producers(store.actions()), nearest, record)


def compare_calls(makers: Mapping[str, Record], before: Record, after: Record) -> Explanation:
    """Return what differs between two calls of one stage, and which of it no call in `makers` (`producers`) computed."""
    return Explanation(after, before, tuple(_changes(before, after)), tuple(_causes(makers, before, after)))


def producers(records: Iterable[Record]) -> dict[str, Record]:
    """Return the origin of each artifact: of these records, oldest first, the earliest call that was not given the artifact."""
    found: dict[str, Record] = {}
    for record in records:
        given = {digest for _, digest in inputs(record["arguments"])}
        if record["result"] not in given:
            found.setdefault(record["result"], record)
    return found


def _ancestor(store: Store, digest: str, record: Record | None) -> Ancestor:
    if record is None:
        try:
            kind = str(store.manifest(digest).get("type", "artifact"))
        except MissingArtifactError:
            kind = "missing artifact"
        return Ancestor(digest, kind, None, None, 0.0, ())
    return Ancestor(
        digest, record["type"], record["stage"], record["key"], record["seconds"], tuple(inputs(record["arguments"]))
    )


def inputs(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Return parameter and digest of every artifact among the recorded arguments of a call."""
    for part, value in _parts(arguments):
        if isinstance(value, _Digest):
            yield part, value.digest


@dataclasses.dataclass(frozen=True)
class _Digest:
    digest: str

    def __str__(self) -> str:
        return self.digest[:12]


def _parts(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Return the arguments of a call as dotted names and plain values; an artifact is a `_Digest`."""
    match value:
        case {"artifact": str(digest), **rest} if not rest:
            yield name, _Digest(digest)
        case {"config": dict(config), **rest} if not rest:
            yield from _parts(config, name)
        case dict() if value:
            for key, part in value.items():
                yield from _parts(part, f"{name}.{key}" if name else str(key))
        case list() if any(isinstance(part, dict) for part in value):
            for position, part in enumerate(value):
                yield from _parts(part, f"{name}[{position}]")
        case _:
            yield name, value


def _changes(before: Record, after: Record) -> list[Change]:
    old = {"version": before["version"], **dict(_parts(before["arguments"]))}
    new = {"version": after["version"], **dict(_parts(after["arguments"]))}
    return [
        Change(after["stage"], part, _text(old.get(part, ABSENT)), _text(new.get(part, ABSENT)))
        for part in dict.fromkeys([*new, *old])
        if old.get(part, ABSENT) != new.get(part, ABSENT)
    ]


def _text(value: Any) -> str:
    text = str(value) if isinstance(value, _Digest) or value is ABSENT else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _causes(made_by: Mapping[str, Record], before: Record, after: Record) -> Iterator[Change]:
    """Follow differing inputs to the calls that made them, down to what was not computed."""
    found: set[Change] = set()
    compared: set[tuple[str, str]] = set()
    waiting = [(before, after)]
    for old, new in waiting:  # grows while it is walked
        old_parts, new_parts = dict(_parts(old["arguments"])), dict(_parts(new["arguments"]))
        for change in _changes(old, new):
            makers = _makers(made_by, old_parts.get(change.part), new_parts.get(change.part))
            if makers is None and change not in found:
                found.add(change)
                yield change
            elif makers and (makers[0]["key"], makers[1]["key"]) not in compared:
                compared.add((makers[0]["key"], makers[1]["key"]))
                waiting.append(makers)


def _makers(made_by: Mapping[str, Record], old: Any, new: Any) -> tuple[Record, Record] | None:
    """Return the two calls of one stage that made two artifacts; None where there is nothing to compare."""
    if not (isinstance(old, _Digest) and isinstance(new, _Digest)):
        return None
    makers = made_by.get(old.digest), made_by.get(new.digest)
    if makers[0] is None or makers[1] is None or makers[0]["stage"] != makers[1]["stage"]:
        return None
    return makers[0], makers[1]
