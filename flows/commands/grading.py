"""`cohort grade`: the verdicts that a recipe's reward gives on answers that lie in a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flows.commands.options import UNCHANGED, MethodChanges
from pipeline.config import ConfigError

if TYPE_CHECKING:
    from stages.reward import AccuracyConfig, RewardConfig
    from stages.reward.composition import ComponentScore

_DEFAULT_RECIPE: Final = "deepseekmath_7b"
_CHUNK_ROWS: Final = 4096
_SHOWN_LENGTH: Final = 60


@dataclass(frozen=True)
class _Row:
    number: int
    values: dict[str, Any]
    gold: str
    output: str
    expected: bool | None


def grade(
    file: Path,
    *,
    recipe: str = _DEFAULT_RECIPE,
    changes: MethodChanges = UNCHANGED,
    out: Path | None = None,
    show: int = 20,
) -> int:
    """Grade answers in a file as the reward of a recipe would; exit code 1 where `expected` says otherwise.

    Parameters
    ----------
    file
        JSONL with the columns `gold`, `output` and perhaps `expected`; other columns are kept.
    recipe
        Name of a recipe or a YAML file; by default one with symbolic comparison and all conventions.
    changes.settings
        `key=value`, for example `--set 'reward.components=[{kind: accuracy, verifier: exact}]'`.
    out
        File to write the rows to, with `status` and `read_as` added.
    show
        How many disagreements to print.
    """
    reward = changes.choose(recipe).config.reward
    component = _accuracy(reward, recipe)
    if out is not None and out.resolve() == file.resolve():
        raise ConfigError(f"--out {out}: is the file that is read; name another one")
    rows = list(_rows(file))
    verdicts = _graded(rows, component, reward)
    if out is not None:
        _write(out, rows, verdicts)
    return _report(rows, verdicts, show)


def _accuracy(reward: RewardConfig, recipe: str) -> AccuracyConfig:
    from stages.reward import AccuracyConfig

    found = next((part for part in reward.components if isinstance(part, AccuracyConfig)), None)
    if found is None:
        kinds = ", ".join(part.kind for part in reward.components)
        raise ConfigError(f"{recipe}: expected a component of kind accuracy in reward.components, found {kinds}")
    return found


def _rows(file: Path) -> Iterator[_Row]:
    """Yield the rows of the file.

    Raises:
        ConfigError: a file or a row that is not as expected, by its line.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise ConfigError(f"{file}: expected one JSON object a line with gold and output, found none")
    for number, line in filled:
        yield _row(line, number, f"{file}, line {number}")


def _row(line: str, number: int, place: str) -> _Row:
    from stages.reward.rules.accuracy import GoldError, read_gold

    try:
        values = json.loads(line, parse_constant=lambda name: name)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{place}: expected an object with gold and output, found {type(values).__name__}")
    missing = [name for name in ("gold", "output") if name not in values]
    if missing:
        raise ConfigError(f"{place}: expected gold and output, found {', '.join(values) or 'no columns'}")
    gold, output = values["gold"], values["output"]
    if isinstance(gold, int) and not isinstance(gold, bool):
        gold = str(gold)
    for name, value in (("gold", gold), ("output", output)):
        if not isinstance(value, str):
            raise ConfigError(f"{place}: expected {name} to be text, found {type(value).__name__}; put it in quotes")
    expected = values.get("expected")
    if expected is not None and (isinstance(expected, str) or expected not in (True, False)):
        raise ConfigError(f"{place}: expected `expected` to be true or false, found {expected!r}")
    try:
        read_gold(gold)
    except GoldError as error:
        raise ConfigError(f"{place}: {error}") from None
    return _Row(number, values, gold, output, None if expected is None else bool(expected))


def _graded(rows: list[_Row], component: AccuracyConfig, reward: RewardConfig) -> list[ComponentScore]:
    from stages.reward.components import score_component
    from stages.reward.composition import Output

    found: list[ComponentScore] = []
    for start in range(0, len(rows), _CHUNK_ROWS):
        outputs = [
            Output(str(row.number), 0, "", row.gold, None, row.output, (), (), "stop")
            for row in rows[start : start + _CHUNK_ROWS]
        ]
        found += score_component(outputs, component, reward)
    return found


def _write(out: Path, rows: list[_Row], verdicts: list[ComponentScore]) -> None:
    lines = [
        json.dumps(row.values | {"status": verdict.status, "read_as": verdict.extracted}, ensure_ascii=False)
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    out.write_bytes(("\n".join(lines) + "\n").encode("utf-8", "replace"))


def _report(rows: list[_Row], verdicts: list[ComponentScore], show: int) -> int:
    counts = Counter(verdict.status for verdict in verdicts)
    print(f"{len(rows)} rows")
    for status, count in counts.most_common():
        print(f"  {status:<12} {count:>6}  {count / len(rows):.1%}")
    known = [pair for pair in zip(rows, verdicts, strict=True) if pair[0].expected is not None]
    otherwise = [(row, verdict) for row, verdict in known if (verdict.status == "ok") != row.expected]
    if not known:
        return 0
    print(f"\n{len(known) - len(otherwise)} of {len(known)} rows are graded as expected")
    for row, verdict in otherwise[: max(show, 0)]:
        print(
            f"  line {row.number}: expected {'ok' if row.expected else 'not ok'}, found {verdict.status}; gold "
            f"{_shown(row.gold)}, read as {_shown(verdict.extracted)}, output ends in {_shown(row.output[-_SHOWN_LENGTH:])}"
        )
    if len(otherwise) > max(show, 0):
        print(f"  and {len(otherwise) - max(show, 0)} more; --out FILE writes all of them, --show N prints more")
    return 1 if otherwise else 0


def _shown(text: str | None) -> str:
    """Return text of a model or of data, escaped: control characters and line ends as `\\x1b`, `\\n`."""
    if text is None:
        return "nothing"
    short = text if len(text) <= _SHOWN_LENGTH else text[:_SHOWN_LENGTH] + "..."
    return repr(short)
