"""Which configuration a command means: a recipe or a YAML file, then files of overrides, then `--set key=value`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from flows.config import IterativeRLConfig
from flows.methods import method_settings
from flows.recipes import RECIPES
from pipeline.config import Config, ConfigError, flatten, parse_settings

__all__ = ["Choice", "choose", "descriptions", "read_overrides", "read_values"]


@dataclass(frozen=True)
class Choice:
    """A configuration, and what it was made from."""

    config: IterativeRLConfig
    base: IterativeRLConfig
    """The recipe before overrides; for a file that is complete in itself, the recipe of its name or the file."""

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Dotted keys whose value differs from the base: what it was, what it is.

        What it was is None where there was no such key, and `...` where a section has become a value. Keys that are no more
        went with a `kind` or a section that is in the list.
        """
        was, now = (flatten(config.model_dump(mode="json")) for config in (self.base, self.config))
        sections = {key[:place] for key in was for place, letter in enumerate(key) if letter == "."}
        before = dict.fromkeys(sections, "...") | was
        return {key: (before.get(key), value) for key, value in now.items() if before.get(key) != value}


class _Values(Config):
    """Any mapping in YAML, read as configs are (safe subset, no key twice); what it means is checked where it is used."""

    model_config = ConfigDict(extra="allow")


def choose(
    source: str,
    files: Sequence[Path] = (),
    settings: Sequence[str] = (),
    *,
    method: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Choice:
    """The configuration named by `source`, made a run of `method`, changed by `overrides`, `files` and then by `settings`.

    Args:
        source: name of a recipe, or a YAML file. A file with the key `recipe` holds overrides of that recipe.
        files: YAML files of overrides, nested or with dotted keys.
        settings: `key=value` each.
        method: a name in `flows/methods.py`; None leaves the method of the source.
        overrides: by dotted key, those of an experiment's arm.

    Raises:
        ConfigError: no such recipe or file, all that is wrong in the result, or a reward function that is not there.
    """
    choice = _choose(source, files, settings, method, overrides or {})
    choice.config.reward.key()  # reads the files of reward functions, so that one that is not there is found here
    return choice


def _choose(
    source: str, files: Sequence[Path], settings: Sequence[str], method: str | None, overrides: Mapping[str, Any]
) -> Choice:
    base, changes = _start(source)
    later = dict(overrides)
    for file in files:
        later |= read_overrides(file)
    later |= parse_settings(list(settings))
    names = ([f"method {method}"] if method else []) + [str(file) for file in files] + (["--set"] if settings else [])
    origin = " + ".join([source, *names])
    if method is None:
        changes |= later
        config = base.override(changes, source=origin) if changes else base
    else:
        # What a file says of its recipe comes before the method, so that the method fits what it finds.
        start = base.override(changes, source=source) if changes else base
        config = _by_method(start, method, later, origin)
    return Choice(config, RECIPES[base.name]() if base.name in RECIPES else base)


def descriptions() -> dict[str, str]:
    """The recipes by name, with the first line of what each says about itself."""
    return {name: (inspect.getdoc(make) or "").partition("\n")[0] for name, make in RECIPES.items()}


def _by_method(start: IterativeRLConfig, method: str, later: dict[str, Any], origin: str) -> IterativeRLConfig:
    """`start` made a run of `method`, then changed by `later`."""
    first = start.override(method_settings(method, start) | later, source=origin)
    # What a method takes over from other settings (the longest output, the policy's optimizer) is what `later` made of them.
    settled = first.model_copy(update={"name": start.name, "critic": start.critic})
    return start.override(method_settings(method, settled) | later, source=origin)


def _start(source: str) -> tuple[IterativeRLConfig, dict[str, Any]]:
    if source in RECIPES:
        return RECIPES[source](), {}
    file = Path(source)
    if not file.is_file():
        near = difflib.get_close_matches(source, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"recipes: {', '.join(RECIPES)}"
        raise ConfigError(f"{source}: neither a recipe nor a YAML file; {hint}")
    values = read_values(file)
    if "recipe" not in values:
        return IterativeRLConfig.parse(values, source=source), {}
    recipe = values.pop("recipe")
    if recipe not in RECIPES:
        raise ConfigError(f"{source}: recipe: {recipe!r} is not one of {', '.join(RECIPES)}")
    return RECIPES[recipe](), flatten(values)


def read_overrides(file: Path) -> dict[str, Any]:
    """What a `--config` file changes, by dotted key.

    Raises:
        ConfigError: no such file, or it cannot be read.
    """
    if not file.is_file():
        raise ConfigError(f"--config {file}: no such file")
    return flatten(read_values(file))


def read_values(file: Path) -> dict[str, Any]:
    """A YAML file as plain values.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return dict(_Values.from_yaml(file.read_text(encoding="utf-8"), source=str(file)).model_extra or {})
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
