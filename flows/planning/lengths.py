"""Lengths and sizes that no configuration knows: from the last run of the same name, else assumptions that say so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from flows.bootstrap import below
from flows.config import ArithmeticData, FileData, IterativeRLConfig
from flows.ledger import Ledger, read_ledger
from flows.places import Places
from flows.planning.given import Lengths
from flows.records import read_records
from pipeline.config import ConfigError
from pipeline.store import Store, StoreError, use_store
from stages.tables import Rollouts

__all__ = ["lengths_for", "sft_steps_of", "sizes_for"]

_SHARE: Final = 0.5
"""Of the longest output; ours."""
_PROMPTS: Final = {"arithmetic": 17.0, "files": 128.0}
"""Tokens of a prompt: of the built-in world's questions as characters, of word problems with an instruction; ours."""
_KNOWN_SETS: Final = {"gsm8k_test.jsonl": 1319, "math_test.jsonl": 5000}
"""Questions of published test sets (Cobbe et al. 2021; Hendrycks et al. 2021), where the file is not here."""
_QUESTIONS: Final = 1000
"""Of any other set that is not here; ours."""


def lengths_for(
    config: IterativeRLConfig,
    places: Places,
    store: Store,
    ledger: Ledger,
    *,
    prompt: float | None,
    output: float | None,
) -> tuple[Lengths, list[str]]:
    """Tokens of prompts and outputs, and where they come from.

    Args:
        prompt, output: what the command line says; it wins.

    Raises:
        ConfigError: a mean beyond the longest output, or no positive number.
    """
    longest = config.rollout.max_output_tokens
    if output is not None and not 0 < output <= longest:
        raise ConfigError(
            f"--mean-output-tokens: expected above 0, at most rollout.max_output_tokens={longest}, found {output:g}"
        )
    if prompt is not None and prompt < 1:
        raise ConfigError(f"--prompt-tokens: expected at least 1, found {prompt:g}")
    said: list[str] = []
    found = {} if prompt and output else _measured(config, places, store, ledger)
    if output is None:
        output = found.get("output")
        said.append(
            f"outputs have {output:.0f} tokens, as those of the last step that was run"
            if output
            else f"outputs have {_SHARE * longest:.0f} tokens, half of the longest (--mean-output-tokens)"
        )
    if prompt is None:
        prompt = found.get("prompt")
        guess = _PROMPTS[config.data.kind]
        said.append(
            f"prompts have {prompt:.0f} tokens, as those of the last step that was run"
            if prompt
            else f"prompts have {guess:.0f} tokens (--prompt-tokens)"
        )
        prompt = prompt or guess
    said.append(f"in every batch some output has all {longest} tokens, and no two outputs of a group are equal")
    return Lengths(prompt, output or _SHARE * longest, longest), said


def sizes_for(config: IterativeRLConfig) -> tuple[dict[str, int], list[str]]:
    """Questions of every held-out set."""
    match config.data:
        case ArithmeticData():
            return {name: part.count for name, part in config.data.evaluation.items()}, []
        case FileData():
            found, said = {}, []
            for name, part in config.data.evaluation.items():
                count = _lines(Path(below(config.data.path, part).path).expanduser())
                if count is None:
                    count = _KNOWN_SETS.get(Path(part.path).name, _QUESTIONS)
                    said.append(f"data.evaluation.{name} is not here: {count} questions")
                found[name] = count if part.limit is None else min(count, part.limit)
            return found, said


def sft_steps_of(store: Store, ledger: Ledger) -> int | None:
    """Optimizer steps of the supervised fine-tuning that the store has; None: it has none."""
    for key, call in ledger.calls.items():
        if call.stage == "supervised_finetuning":
            with contextlib.suppress(StoreError):
                return int(store.action(key)["metrics"]["sft/steps"])
    return None


def _measured(config: IterativeRLConfig, places: Places, store: Store, ledger: Ledger) -> dict[str, float]:
    """Mean lengths of the outputs of a step: this configuration's last, else that of the last run of its name."""
    for known in _ledgers(config, places, ledger):
        for made in reversed(known.steps.values()):
            if "rollout" in made and (found := _means(store, made["rollout"])):
                return found
    return {}


def _ledgers(config: IterativeRLConfig, places: Places, ledger: Ledger) -> Iterator[Ledger]:
    yield ledger
    for record in reversed(list(read_records(places))):
        if record.name == config.name and (known := read_ledger(record.folder)) is not None:
            yield known


def _means(store: Store, digest: str) -> dict[str, float]:
    import pyarrow.compute as pc

    with contextlib.suppress(StoreError, ValueError, OSError), use_store(store):  # pruned, or moved away
        table: Any = Rollouts(digest).read(["prompt_ids", "output_ids"])
        means = {
            name: pc.mean(pc.list_value_length(table.column(f"{name}_ids"))).as_py() for name in ("prompt", "output")
        }
        return {name: float(mean) for name, mean in means.items() if mean}
    return {}


def _lines(file: Path) -> int | None:
    """Rows of a file with one question a line; None: it is not here, or of another format."""
    if file.suffix != ".jsonl" or not file.is_file():  # a pipe would never end
        return None
    with contextlib.suppress(OSError), file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
    return None
