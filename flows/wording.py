"""Write numbers, moments and text of others for people, in the live display, the summary and the commands.

What a model, a data set or a record of others says is shown as text: no terminal escape in it moves a cursor, no markup in it
colours a line, no Markdown in it makes a link.
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

_UNSEEN: Final = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's classes of control, format (directions of writing, zero width), surrogate, line and paragraph characters."""
_MARKDOWN: Final = re.compile(r"([\\`*\[\]<>|])")

_AT_K: Final = re.compile(r"(?:pass|maj)_at_(\d+)")


def duration(seconds: float) -> str:
    """Write seconds: `0.3 s`, `12 s`, `4:05 min`, `1:02:03 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def number(value: Any) -> str:
    """Write integers with thousands separators, floats with four significant digits, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def percent(value: float | None) -> str:
    """Write `0.512`: three digits, since a thousand questions resolve no more; `-` where it was not measured."""
    return "-" if value is None else f"{value:.3f}"


def size(count: float) -> str:
    """Write bytes: `512 B`, `4.1 kB`, `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def moment(seconds: float) -> str:
    """Write local date and time of `seconds` since the epoch, the year where it is not this one."""
    then = time.localtime(seconds)
    return time.strftime("%d %b %H:%M" if then.tm_year == time.localtime().tm_year else "%d %b %Y %H:%M", then)


def accuracies(metrics: Mapping[str, float]) -> str:
    """Write an evaluation in one line: accuracy with its interval, then pass@k and maj@k by k."""
    if "greedy_accuracy" in metrics:
        return f"greedy {percent(metrics['greedy_accuracy'])}"
    parts = [f"sampled {percent(metrics.get('accuracy'))}"]
    if "accuracy_ci_low" in metrics and "accuracy_ci_high" in metrics:
        parts.append(f"[{percent(metrics['accuracy_ci_low'])}, {percent(metrics['accuracy_ci_high'])}]")
    parts += [f"{label.lower()} {percent(metrics.get(key))}" for label, key in at_k(metrics).items()]
    return " ".join(parts)


def at_k(metrics: Iterable[str]) -> dict[str, str]:
    """Return label -> metric: `Pass@8`, `Maj@8` by K from 2 on, both at each K that one of them has: Maj@K may be undefined."""
    ks = sorted({int(found[1]) for key in metrics if (found := _AT_K.fullmatch(key))})
    named = (("Pass", "pass_at_"), ("Maj", "maj_at_"))
    return {f"{label}@{k}": f"{prefix}{k}" for label, prefix in named for k in ks if k > 1}


# ------------------------------------------------------------------------------------------------ text of others


def visible(text: object) -> str:
    """Return text with what cannot be seen spelled as in Python (`\\x1b`, `\\u202e`); line breaks and tabs stay."""
    found = str(text)
    if found.isprintable():
        return found
    return "".join(_spelled(letter) for letter in found)


def _spelled(letter: str) -> str:
    if letter in "\n\t" or unicodedata.category(letter) not in _UNSEEN:
        return letter
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")


def quoted(text: object) -> str:
    """Escape text of others for a place where rich reads markup: `[red]` in it is these five characters."""
    return escape(visible(text))


def markdown(text: object) -> str:
    """Escape text of others for one line, or one cell, of Markdown."""
    return _MARKDOWN.sub(r"\\\1", " ".join(visible(text).split()))


def code(text: object) -> str:
    """Write text of others as code in one line, or one cell, of Markdown; a backtick in it becomes an apostrophe."""
    line = " ".join(visible(text).split()).replace("`", "'").replace("|", r"\|")
    return f"`{line}`"


class SafeConsole(Console):
    """A console that writes no control character but its own, whatever it is given to print."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, with `visible` text; what rich itself says to the terminal passes."""
        for segment in super().render(renderable, options):
            plain = segment.control or segment.text.isprintable()
            yield segment if plain else Segment(visible(segment.text), segment.style)
