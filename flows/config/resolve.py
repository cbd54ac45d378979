"""Resolve the configuration that a command means: a recipe or a YAML file, changed in the order asked for.

The order is: what a YAML file says of its recipe, `--method`, an experiment's `common` and an arm's own overrides, `--config`
files, `--set`. Later ones win (`pipeline/config/` says what a change does). Nested mappings of a file or an arm are changes
of their parts; a mapping in `--set` is a whole section. A `method` is one change, and comes first in the mapping that has it.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic_core import to_jsonable_python

from flows.config import IterativeRLConfig
from flows.config.methods import check_method, settings_among
from flows.config.recipes import RECIPES
from pipeline.config import Config, ConfigError, Override, changes_of, flatten, parse_settings

_METHOD = "method"
"""Key of a change that is replaced by all settings of a method."""


class AskedOverride(Config):
    """An override as records keep it."""

    setting: str
    "Dotted key; `method` means all settings of a method."
    value: Any
    "What it becomes."
    source: str
    "Who asked for it: `--set`, a file, an arm."
    undone: bool = False
    "Without effect: a later change set the key again, replaced its section, or chose another kind."


class Asked(Config):
    """What was asked for, in its order."""

    recipe: str = ""
    "The recipe, or the complete file, that the overrides were made to."
    overrides: tuple[AskedOverride, ...] = ()
    "All of them, those without effect included."

    def changes(self) -> list[Override]:
        """Return the overrides as changes."""
        return [Override(override.setting, override.value, override.source) for override in self.overrides]


def differences(base: Config, config: Config) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose value differs from the base: what it was, what it is.

    What it was is None where there was no such key, and `...` where a section has become a value. Keys that are no more went
    with a `kind` or a section that is in the list.
    """
    was, now = (flatten(each.model_dump(mode="json")) for each in (base, config))
    sections = {key[:place] for key in was for place, letter in enumerate(key) if letter == "."}
    before = dict.fromkeys(sections, "...") | was
    return {key: (before.get(key), value) for key, value in now.items() if before.get(key) != value}


@dataclass(frozen=True)
class Choice:
    """A configuration, and what it was made from."""

    config: IterativeRLConfig
    base: IterativeRLConfig
    """The recipe before overrides; for a file that is complete in itself, the recipe of its name or the file."""
    asked: Asked = field(default_factory=Asked)
    """What was asked for."""

    def dropped(self) -> list[AskedOverride]:
        """Return overrides whose section or its kind was replaced, and that no later one of the same key explains."""
        asked = self.asked.overrides
        return [
            override
            for place, override in enumerate(asked)
            if override.undone and override.setting not in [later.setting for later in asked[place + 1 :]]
        ]

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Return the dotted keys whose value differs from the base: what it was, what it is."""
        return differences(self.base, self.config)


class _Values(Config):
    """Any mapping in YAML, read as configs are (safe subset, no key twice); what it means is checked where it is used."""

    model_config = ConfigDict(extra="allow")


def choose(
    source: str,
    files: Sequence[Path] = (),
    settings: Sequence[str] = (),
    *,
    method: str | None = None,
    overrides: Iterable[Override] = (),
) -> Choice:
    """Return the configuration named by `source`, changed by `method`, `overrides`, `files` and `settings`, in this order.

    Args:
        source: name of a recipe, or a YAML file. A file with the key `recipe` holds overrides of that recipe.
        files: YAML files of overrides, nested or with dotted keys.
        settings: `key=value` each.
        method: a name in `flows/config/methods.py`; None leaves the method of the source.
        overrides: those of an experiment's arm.

    Raises:
        ConfigError: no such recipe or file, all that is wrong in the result, or a function that is not there.
    """
    base, recipe, changes = _start(source)
    if method is not None:
        changes.append(Override(_METHOD, method, "--method"))
    changes += _method_first(overrides)
    for file in files:
        changes += read_overrides(file)
    changes += parse_settings(settings)
    origin = " + ".join(dict.fromkeys([source, *(change.source for change in changes)]))
    config = base.override(_resolved(base, changes), source=origin) if changes else base
    for part in (config.reward, config.environment):
        if part is not None:
            part.key()  # reads the files of functions, so that one that is not there is found here
    return Choice(config, RECIPES[base.name]() if base.name in RECIPES else base, _asked(base, recipe, changes))


def choice_of(config: IterativeRLConfig, asked: Asked, source: str, base: IterativeRLConfig | None = None) -> Choice:
    """Return the choice of a configuration that came as a whole, with what it has beyond `asked` as changes of `source`.

    Args:
        base: what `config` is compared with; by default the recipe.
    """
    if asked.recipe in RECIPES:
        recipe, changes = RECIPES[asked.recipe](), asked.changes()
        with contextlib.suppress(ConfigError):  # asked of another version's recipe
            expected = recipe.override(_resolved(recipe, changes))
            was, now = (flatten(each.model_dump(mode="json")) for each in (expected, config))
            changes += [Override(key, value, source) for key, value in now.items() if was.get(key, ...) != value]
            asked = _asked(recipe, asked.recipe, changes)
        return Choice(config, base or recipe, asked)
    return Choice(config, base or (RECIPES[config.name]() if config.name in RECIPES else config), asked)


def _resolved(base: IterativeRLConfig, changes: Sequence[Override]) -> list[Override]:
    """Return the changes with the settings of a method in the place of its name."""
    resolved: list[Override] = []
    for place, change in enumerate(changes):
        if change.key != _METHOD:
            resolved.append(change)
            continue
        check_method(change.value)
        later = [other for other in changes[place + 1 :] if other.key != _METHOD]
        settings = settings_among(change.value, base.changed(resolved), base.changed([*resolved, *later]))
        resolved += [Override(key, value, f"method {change.value}") for key, value in settings.items()]
    return resolved


def _asked(base: IterativeRLConfig, recipe: str, changes: Sequence[Override]) -> Asked:
    values = base.changed(_resolved(base, changes))
    overrides = (
        AskedOverride(
            setting=change.key,
            value=to_jsonable_python(change.value, fallback=str),
            source=change.source,
            undone=_is_undone(change, values, changes[place + 1 :]),
        )
        for place, change in enumerate(changes)
    )
    return Asked(recipe=recipe, overrides=tuple(overrides))


def _is_undone(change: Override, values: Mapping[str, Any], later: Sequence[Override]) -> bool:
    """Return whether its value is not in the result `values`, and no later change refined it."""
    if change.key == _METHOD:
        return any(other.key == _METHOD for other in later)
    if any(other.key.startswith(f"{change.key}.") for other in later):
        return False
    return bool(_at(values, change.key) != change.value)


def _at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name, ...) if isinstance(values, Mapping) else ...
    return values


def descriptions() -> dict[str, str]:
    """Return the recipes by name, with the first line of what each says about itself."""
    return {name: (inspect.getdoc(make) or "").partition("\n")[0] for name, make in RECIPES.items()}


def _start(source: str) -> tuple[IterativeRLConfig, str, list[Override]]:
    if source in RECIPES:
        return RECIPES[source](), source, []
    file = Path(source)
    if not file.is_file():
        near = difflib.get_close_matches(source, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"recipes: {', '.join(RECIPES)}"
        raise ConfigError(f"{source}: neither a recipe nor a YAML file; {hint}")
    values = read_values(file)
    if "recipe" not in values:
        return IterativeRLConfig.parse(values, source=source), source, []
    recipe = values.pop("recipe")
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ConfigError(f"{source}: recipe: {recipe!r} is not one of {', '.join(RECIPES)}")
    return RECIPES[recipe](), recipe, _method_first(changes_of(values, source))


def _method_first(changes: Iterable[Override]) -> list[Override]:
    """Return the changes of each source with its method at their head: a method is what the rest of a mapping changes."""
    listed = list(changes)
    sources = list(dict.fromkeys(change.source for change in listed))
    return sorted(listed, key=lambda change: (sources.index(change.source), change.key != _METHOD))


def read_overrides(file: Path) -> list[Override]:
    """Return what a `--config` file changes, in the order written.

    Raises:
        ConfigError: no such file, or it cannot be read.
    """
    if not file.is_file():
        raise ConfigError(f"--config {file}: no such file")
    return _method_first(changes_of(read_values(file), str(file)))


def read_values(file: Path) -> dict[str, Any]:
    """Read a YAML file as plain values.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return dict(_Values.from_yaml(file.read_text(encoding="utf-8"), source=str(file)).model_extra or {})
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
