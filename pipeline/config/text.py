"""Read YAML text as plain values: the safe subset, no key twice, no ambiguous number, no endless aliases.

And remove the passwords of URLs from texts, for logs, records and error messages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

_VALUES: Final = 100_000
"""Values of a YAML text at most, aliases counted as often as they stand; a config has hundreds."""
_OTHER_BASE: Final = re.compile(r"[-+]?(0[0-9_]*[0-7][0-7_]*|[0-9_]+(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""Integers of YAML 1.1 that begin with 0, and numbers of base 60."""
_SECRETS: Final = "passw(?:or)?d|pwd|secret|token|api_?key|access_?key|signature|credential"
_PASSWORDS: Final = (
    re.compile(r"([A-Za-z][\w+.-]*://[^:/@\s]*:)(\S+)(?=@)"),
    re.compile(r"(https?://)([^:/@?#\s]+)(?=@)"),
    re.compile(rf"(?i)([?&;][\w-]*(?:{_SECRETS})[\w-]*=)([^&;\s]+)"),
)
"""Where a URL may have one: before the host (for HTTP also a token without a user), and among the options."""


class ConfigError(ValueError):
    """A config that cannot be used; the text lists every error, one a line, each with its dotted key."""


class _Loader(yaml.SafeLoader):
    """Refuse what YAML's safe loader accepts: two equal keys, and a short text that expands to endless values."""

    def get_single_data(self) -> Any:
        try:
            return super().get_single_data()
        except (ConfigError, yaml.YAMLError):
            raise
        except RecursionError:
            raise ConfigError("values are nested too deeply") from None
        except (ValueError, OverflowError) as error:  # a date or a number that is none
            raise ConfigError(str(error)) from None

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _count_values(node, {}) > _VALUES:
            raise ConfigError(f"more than {_VALUES:,} values, aliases (`*name`) counted as often as they stand")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: the key {key.value!r} occurs twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _count_values(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """Count the values under a node with every alias written out, each node once (`counts`; 0: is being counted)."""
    if node in counts:
        if counts[node] == 0:
            raise ConfigError(f"line {node.start_mark.line + 1}: an alias refers to a value that it is part of")
        return counts[node]
    counts[node] = 0
    parts = [] if isinstance(node, yaml.ScalarNode) else node.value
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in parts for part in pair]
    counts[node] = 1 + sum(_count_values(part, counts) for part in parts)
    return counts[node]


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would read as numbers."""


# YAML 1.1 reads `3e-4` as text; people mean a number.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+"), list("-+0123456789"))


def _number(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """Read a decimal number, or 0x and the like; refuse `010` (8 in YAML 1.1) and `1:30` (90), as people mean neither."""
    if _OTHER_BASE.fullmatch(node.value):
        raise ConfigError(
            f"line {node.start_mark.line + 1}: {node.value} is a number of base 8 or 60 in YAML; write it without zeros in "
            "front and without colons, or as text in quotes"
        )
    is_int = node.tag.endswith(":int")
    return loader.construct_yaml_int(node) if is_int else loader.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _number)


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Return nested values as YAML text that reads back to them."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_value(text: str) -> Any:
    """Return the value of a YAML text; raise ConfigError where it is not YAML, or none of a config."""
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}") from None


def load_mapping(text: str, source: str) -> Mapping[str, Any]:
    """Return the mapping of a YAML text; raise ConfigError, which names the source, as `load_value` or for another value."""
    try:
        values = load_value(text)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: expected a mapping of field names to values, found {type(values).__name__}")
    return values


def without_password(text: str) -> str:
    """Return a URI, or a text with URIs, as it may be stored and printed; the same for every password."""
    for place in _PASSWORDS:
        text = place.sub(r"\1***", text)
    return text


def unspoken(text: str, uri: str) -> str:
    """Return a text, such as an error, without the password of a URI."""
    for found in (place.search(uri) for place in _PASSWORDS):
        text = text.replace(found[2], "***") if found else text
    return text
