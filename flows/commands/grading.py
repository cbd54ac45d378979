"""`cohort grade`, `reward-model`: how a recipe's reward, or a learned one, judges answers that lie in a file."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.markup import escape
from rich.syntax import Syntax

from flows.commands.options import UNCHANGED, Changes, EngineOption, Flag, MethodChanges, Root, console, debugging
from flows.runs.paths import Places
from flows.wording import number
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
    for place, line in filled:
        yield _row(line, place, f"{file}, line {place}")


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


def reward_model(
    recipe: str = "gsm8k_solutions",
    *,
    changes: Changes = UNCHANGED,
    engine: EngineOption = "prefect",
    root: Root = None,
    show: Flag = False,
) -> None:
    """Train a reward model on labelled solutions of others, and compare it with baselines on questions it has not seen.

    Parameters
    ----------
    recipe
        `gsm8k_solutions` (its files lie in `--set path=FOLDER`), or a YAML file.
    changes.settings
        `key=value`, for example `--set training.epochs=3`; `--set judged_on=validation` is for choosing settings.
    show
        Only print the whole configuration as YAML (a start for a file of your own).
    """
    from flows.reward_study.config import choose_study
    from flows.reward_study.run import print_study, run_study

    choice = choose_study(recipe, changes.config, changes.settings)
    places, out = Places.under(root), console()
    if show:
        text = choice.config.to_yaml()
        out.print(Syntax(text, "yaml", background_color="default")) if out.is_terminal else print(text, end="")
        return
    out.print(
        f"[bold]{choice.config.name}[/]  evaluated on {choice.config.judged_on}, engine {engine}, in {escape(str(places.root))}"
    )
    for key, (was, now) in choice.differences().items():
        out.print(f"  {key}  [dim]{number(was)}[/] -> [bold]{number(now)}[/]", soft_wrap=True)
    command = shlex.join(["cohort", *sys.argv[1:]])
    done = run_study(choice, places, engine=engine, console=out, command=command, debug=debugging())
    out.print()
    print_study(done.study, out)
    out.print(f"\n{done.executed:,} stages computed, {done.cached:,} reused from the store")
    out.print(f"[cyan]{done.report}[/]", soft_wrap=True)
