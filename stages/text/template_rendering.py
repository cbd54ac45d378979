"""The rendering of a chat template, as a script in a process of its own: jinja2 and the standard library only.

A template is a program that others wrote. Here it has limits of processor time and memory, clocks that are given to it, and no
random numbers; `stages/text/chat_templates.py` starts it and judges what comes out. The environment is that of transformers'
`apply_chat_template` otherwise.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from typing import Any, Final, NoReturn

import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MEMORY: Final = 2**30
_LONGEST: Final = 1_000_000
"""Characters of a rendered conversation without its question."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`, which marks a model's own text: its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(spec: dict[str, Any]) -> dict[str, Any]:
    """Render every conversation at every clock, and find the variables that the template reads.

    Args:
        spec: `template`, `variables` by name, `conversations` (lists of messages), `clocks` (ISO 8601).

    Returns:
        `rendered[conversation][clock]` and `reads`; or `error`, what the template raised.
    """
    try:
        environment, clock = _environment()
        template = environment.from_string(spec["template"])
        reads = jinja2.meta.find_undeclared_variables(environment.parse(spec["template"])) - set(environment.globals)
        rendered: list[list[str]] = []
        for messages in spec["conversations"]:
            rendered.append([])
            for instant in spec["clocks"]:
                clock.now = datetime.datetime.fromisoformat(instant)
                rendered[-1].append(_rendered(template, messages, spec["variables"]))
    except Exception as error:  # whatever a template does wrong is said of it
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"rendered": rendered, "reads": sorted(reads)}


def _rendered(template: jinja2.Template, messages: list[Any], variables: dict[str, Any]) -> str:
    values = {"tools": None, "documents": None, **variables}
    parts, length = [], 0
    for part in template.generate(messages=messages, add_generation_prompt=True, **values):
        parts.append(part)
        length += len(part)
        if length > _LONGEST:
            raise ValueError(f"it writes more than {_LONGEST:,} characters around a question")
    return "".join(parts)


class _Clock:
    """The time that a template is given."""

    now = datetime.datetime.min

    def strftime_now(self, format: str) -> str:
        return self.now.strftime(format)


def _environment() -> tuple[ImmutableSandboxedEnvironment, _Clock]:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.filters["random"] = _draw
    environment.globals["lipsum"] = _draw
    environment.globals["raise_exception"] = _raise
    clock = _Clock()
    environment.globals["strftime_now"] = clock.strftime_now
    return environment, clock


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _draw(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("it draws at random (`random`, `lipsum`), so that every run would have other prompts")


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _limit(seconds: int) -> None:
    """Limit this process; the deadline of the process that started it holds where the system has no limits."""
    import resource

    for kind, limit in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, _MEMORY)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    _limit(int(sys.argv[1]))
    print(json.dumps(render(json.load(sys.stdin))))
