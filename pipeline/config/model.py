"""Configs: frozen, closed pydantic models that override by dotted key, round-trip through YAML and make cache keys.

A config answers three questions: is it valid (all errors at once, the nearest name suggested), what differs from another
(dotted keys), and what part of it decides a result (`key`).

Overrides are a list of changes, applied in its order; only the result is validated. A later change wins. A value replaces what
was at its key, a whole section included. `null` switches a section off, and a part set after it starts the section from its
defaults. Another `kind` drops the fields of the one before.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

from pipeline.config.text import ConfigError, dump_yaml, load_mapping, load_value


class _Unkeyed:
    """Marks a field that cannot change a result: worker counts, deadlines, paths of scratch space."""

    def __repr__(self) -> str:
        return "UNKEYED"


UNKEYED: Final = _Unkeyed()


class Override(NamedTuple):
    """One override."""

    key: str
    """Dotted key."""
    value: Any
    """What it becomes."""
    source: str = ""
    """Who asks for it: `--set`, a file, an arm."""


class Config(BaseModel):
    """Base of every config: immutable, unknown keys refused, field documentation taken from the strings under fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Document a field of which a subclass changes nothing but the default as its base does."""
        bare = [name for name, field in cls.model_fields.items() if field.description is None]
        for name in bare:
            bases = [base.model_fields.get(name) for base in cls.__mro__[1:] if issubclass(base, Config)]
            cls.model_fields[name].description = next((base.description for base in bases if base), None)
        if any(cls.model_fields[name].description for name in bare):
            cls.model_rebuild(force=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, source: str = "config", changes: Iterable[Override] = ()) -> Self:
        """Return the config that nested `values` describe.

        Args:
            source: name of the values, for the first line of an error.
            changes: what set the values, for the lines of their keys.

        Raises:
            ConfigError: with every error found; unknown keys come with the nearest known name.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            asked = list(changes)
            lines = [_blame(_explain(cls, details), asked) for details in error.errors(include_url=False)]
            count = f"{len(lines)} error{'s' if len(lines) > 1 else ''}"
            raise ConfigError(f"{source}: {count} in {cls.__name__}\n" + "\n".join(f"  {x}" for x in lines)) from None

    @classmethod
    def from_yaml(cls, text: str, *, source: str = "config") -> Self:
        """Return the config written in YAML `text` (safe subset, duplicate keys refused)."""
        return cls.parse(load_mapping(text, source), source=source)

    def to_yaml(self) -> str:
        """Return YAML that `from_yaml` reads back to an equal config."""
        return dump_yaml(self.model_dump(mode="json"))

    def override(self, changes: Mapping[str, Any] | Iterable[Override], *, source: str = "override") -> Self:
        """Return this config with the changes, or a mapping of dotted keys to values, applied in their order (`changed`).

        Raise ConfigError with all that is wrong in the result, each line with the source of the change.
        """
        pairs = [Override(*pair) for pair in changes.items()] if isinstance(changes, Mapping) else list(changes)
        return type(self).parse(self.changed(pairs), source=source, changes=pairs)

    def changed(self, changes: Iterable[Override]) -> dict[str, Any]:
        """Return the values of this config with the changes applied one after the other; validate nothing.

        A part of a section that is null or absent starts it from its defaults, of the `kind` that the field has by default.

        Raises:
            ConfigError: a part was set of what is a plain value, and no later change replaced it.
        """
        values = self.model_dump(mode="json")
        clashes: dict[str, str] = {}
        for change in changes:
            *parents, last = change.key.split(".")
            place = values
            for depth, name in enumerate(parents):
                inner, section = place.get(name), parents[: depth + 1]
                if not isinstance(inner, dict):
                    if inner is not None:
                        path = ".".join(section)
                        clashes[path] = _from(f"{change.key}: {path} is a value ({inner!r}), not a section", change)
                    inner = place[name] = _begun(type(self), section)
                place = inner
            replaced = change.key
            if last == "kind" and place.get("kind", change.value) != change.value:
                place.clear()
                replaced = ".".join(parents)
            clashes = {key: text for key, text in clashes.items() if not _within(key, replaced)}
            place[last] = copy.deepcopy(change.value)  # a later change may be written into it
        if clashes:
            raise ConfigError("\n".join(clashes.values()))
        return values

    def key(self) -> dict[str, Any]:
        """Return what decides a result, as plain JSON values: every field but those marked `UNKEYED`.

        A subclass that names something outside itself (a file, a function) overrides this to add its digest.
        """
        fields = type(self).model_fields.items()
        return {name: _key_of(getattr(self, name)) for name, field in fields if UNKEYED not in field.metadata}


def changes_of(values: Mapping[str, Any], source: str = "", prefix: str = "") -> Iterator[Override]:
    """Yield nested mappings as changes of their parts, in the order written; lists and empty mappings are wholes.

    The fields of a section have no order among themselves, so that its `kind` comes first.
    """
    names = sorted(values, key=lambda name: name != "kind") if prefix else list(values)
    for name in names:
        value = values[name]
        if isinstance(value, Mapping) and value:
            yield from changes_of(value, source, f"{prefix}{name}.")
        else:
            yield Override(f"{prefix}{name}", value, source)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one level of dotted keys, to compare and to show; lists stay values."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{dotted}.")
        else:
            flat[dotted] = value
    return flat


def parse_settings(settings: Iterable[str], source: str = "--set") -> list[Override]:
    """Return `["rollout.G=8", "seed=1"]` as changes in this order; values are YAML scalars, lists or mappings, as wholes."""
    changes: list[Override] = []
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {setting}: expected key=value, for example --set rollout.G=8")
        try:
            changes.append(Override(key.strip(), load_value(text), source))
        except ConfigError as error:
            raise ConfigError(f"--set {key}: the value {text!r} cannot be read: {error}") from None
    return changes


def _key_of(value: Any) -> Any:
    if isinstance(value, Config):
        return value.key()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(name): _key_of(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_key_of(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted((_key_of(part) for part in value), key=repr)  # the order of a set differs between processes
    return to_jsonable_python(value)


def _begun(root: type[BaseModel], section: list[str]) -> dict[str, Any]:
    """Return a new section: of the kind that its field has by default; empty for an unknown field."""
    *parents, name = section
    fields = [model.model_fields[name] for model in _descend({root}, parents)[1] if name in model.model_fields]
    kinds = {getattr(field.get_default(call_default_factory=True), "kind", None) for field in fields} - {None}
    return {"kind": kinds.pop()} if len(kinds) == 1 else {}


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _from(line: str, change: Override) -> str:
    return f"{line} (from {change.source})" if change.source else line


def _blame(text: str, changes: list[Override]) -> str:
    """Append to each line of an error the source of the last change of the key that the line begins with."""
    lines = []
    for line in text.split("\n"):
        found = re.match(r"\s*([\w-]+(?:\.[\w-]+)*)[:=]", line)
        key = found[1] if found else ""
        parent = key.rpartition(".")[0]
        touching = [
            change
            for change in changes
            if key and (_within(key, change.key) or _within(change.key, key) or change.key == f"{parent}.kind")
        ]
        lines.append(_from(line, touching[-1]) if touching else line)
    return "\n".join(lines)


def _explain(root: type[BaseModel], details: ErrorDetails) -> str:
    if not details["loc"]:
        return details["msg"].removeprefix("Value error, ")  # a check of the whole, which names the keys it is about
    *parents, last = (str(part) for part in details["loc"])
    path, models = _descend({root}, parents)
    dotted = ".".join([*path, last])
    if details["type"] == "extra_forbidden":
        known = sorted({name for model in models for name in model.model_fields})
        near = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{dotted}: unknown key; {hint}"
    if details["type"] == "union_tag_not_found":
        kinds = sorted(str(tag) for model in _descend(models, [last])[1] for tag in _tags(model))
        return (
            f"{dotted}: a section given anew names its kind, one of {', '.join(kinds)} (found {details.get('input')!r})"
        )
    return f"{dotted}: {details['msg']} (found {details.get('input')!r})"[:600]


def _descend(models: set[type[BaseModel]], location: list[str]) -> tuple[list[str], set[type[BaseModel]]]:
    """Return the keys as a person writes them, and the models there, at a pydantic error location.

    Inside a union pydantic's location also holds the member, by its tag or class name.
    """
    path: list[str] = []
    for part in location:
        named = {model for model in models if part == model.__name__ or part in _tags(model)}
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if named and not fields:
            models = named
            continue
        path.append(part)
        models = {member for field in fields for member in _walk_models(field.annotation)} or models
    return path, models


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def _walk_models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _walk_models(argument)
