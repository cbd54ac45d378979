"""Check the data of a run before it begins: read every set, measure its prompts, count its questions; imports no torch.

The stages themselves read it, in a store that is thrown away, so that what is checked is what will run.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from flows.algorithm.data import (
    arithmetic_complaints,
    below,
    demonstrations_of_set,
    prepare_data,
    question_ids,
    rewards_named,
    room_of,
    shortages,
)
from flows.algorithm.models import EarlyTokenizer, early_tokenizer, require_turns
from flows.config import ArithmeticData, FileData, IterativeRLConfig, PretrainedPolicy
from pipeline.config import ConfigError
from pipeline.store import Store, use_store
from stages.data import DataError, measure_prompts, read_questions
from stages.models import is_gguf
from stages.reward import AccuracyConfig
from stages.tables import Demonstrations, Questions
from stages.text import PromptError, turn_end

_NAME_WORDS: Final = 5
"""An answer of more words that is no formula is a sentence, which no output repeats word by word; ours."""


@dataclass
class DataFindings:
    """Lines about the data of a run."""

    notes: list[str] = field(default_factory=list)
    """Sizes, and what could not be looked at."""
    complaints: list[str] = field(default_factory=list)
    """What a run would fail of."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Questions of each set that was read, those that are left out apart."""


@contextlib.contextmanager
def scratch_store() -> Iterator[None]:
    """Use a store that is deleted after the block."""
    with tempfile.TemporaryDirectory(prefix="cohort-check-") as folder, use_store(Store(Path(folder))):
        yield


def examine_data(config: IterativeRLConfig, store: Store | None = None) -> DataFindings:
    """Read the data sets that are here, without a model, a download or a trace in the store.

    Args:
        store: where the rewards of a curriculum are looked for; None: they are not.
    """
    found = DataFindings()
    if isinstance(config.data, ArithmeticData):
        found.complaints += arithmetic_complaints(config, config.data)
        stops = config.rollout.has_stops or config.environment is not None
        if stops or store is not None:
            with scratch_store():
                data = prepare_data(config.data)
                if stops:
                    _examine_stops_without_sets(config, data.demonstrations, found)
                if store is not None:
                    _examine_rewards(config, data.train, store, found)
        return found
    with scratch_store():
        sets = dict(_read_sets(config.data, found))
        demonstrations = _demonstrations(sets.get("train"), found)
        _measure(config, sets, demonstrations, found)
        _examine_answers(config, sets, found)
        if store is not None and "train" in sets:
            _examine_rewards(config, sets["train"], store, found)
        if "train" in found.sizes:
            count = found.sizes["train"]
            found.complaints += shortages(config, count, count if demonstrations else None)
    return found


def _read_sets(data: FileData, found: DataFindings) -> Iterator[tuple[str, Questions]]:
    sets = {"train": data.train} | {f"evaluation.{name}": part for name, part in data.evaluation.items()}
    for name, part in sets.items():
        given = below(data.path, part)
        if part.format == "hub":
            found.notes.append(f"data.{name}: not read, it is on the hub")
            continue
        if not Path(given.path).expanduser().exists():
            found.notes.append(f"data.{name}: not read, {given.path} is not here")
            continue
        try:
            questions = read_questions(given)
        except DataError as error:
            found.complaints.append(f"data.{name}: {error}")
            continue
        rows, repeats = (int(questions.metrics[f"data/{what}"]) for what in ("rows", "repeats"))
        left = rows - repeats if part.duplicates == "first" else rows
        repeated = f", {repeats:,} of {rows:,} rows repeat others ({part.duplicates})" if repeats else ""
        found.notes.append(f"data.{name}: {left:,} questions{repeated}")
        found.sizes[name] = left
        yield name, questions


def _demonstrations(train: Questions | None, found: DataFindings) -> Demonstrations | None:
    try:
        return None if train is None else demonstrations_of_set(train)
    except DataError as error:
        found.complaints.append(f"data.train: {error}")
        return None


def _measure(
    config: IterativeRLConfig, sets: dict[str, Questions], demonstrations: Demonstrations | None, found: DataFindings
) -> None:
    """Measure prompts, where there is a tokenizer, and see whether outputs end as the chat template ends an answer."""
    if not sets:
        return
    try:
        early = early_tokenizer(config, demonstrations)
    except ConfigError as error:
        policy = config.policy
        damaged = isinstance(policy, PretrainedPolicy) and is_gguf(Path(policy.path))
        (found.complaints if damaged else found.notes).append(f"prompts are not measured: {error}")
        return
    _examine_stops(config, early, found)
    with contextlib.suppress(PromptError):  # every set's prompts say it below
        found.complaints += _unended(config, early)
    for name, questions in sets.items():
        table, room = questions.read(["question_id", "question"]), room_of(config, name, early.window)
        try:
            lengths = measure_prompts(early.tokenizer, table.column("question").to_pylist(), config.prompt, room)
        except PromptError as error:
            found.complaints.append(f"data.{name}: {error}")
            continue
        most = "any number" if room.tokens is None else f"{max(room.tokens, 0):,}"
        found.notes.append(f"data.{name}: prompts of up to {lengths.longest:,} tokens; {most} fit")
        left = table.num_rows - len(lengths.longer)
        if lengths.longer and (room.limit.longer == "refuse" or left == 0):
            found.complaints.append(f"data.{name}: {lengths.complaint(table.column('question_id').to_pylist(), room)}")
        elif lengths.longer:
            found.notes.append(f"data.{name}: {len(lengths.longer):,} questions are left out, {left:,} stay")
            found.sizes[name] = left


def _examine_rewards(config: IterativeRLConfig, train: Questions, store: Store, found: DataFindings) -> None:
    """Complain of `curriculum.rewards` that are not in the store, or of other questions."""
    questions = question_ids(train)
    for name in config.curriculum.rewards if config.curriculum else ():
        try:
            with use_store(store):
                rewards_named(name, questions)
        except ConfigError as error:
            found.complaints.append(str(error))


def _examine_stops(config: IterativeRLConfig, early: EarlyTokenizer, found: DataFindings) -> None:
    """Complain of what `require_turns` refuses."""
    try:
        require_turns(config, early.tokenizer)
    except ConfigError as error:
        found.complaints.append(str(error))


def _examine_stops_without_sets(
    config: IterativeRLConfig, demonstrations: Demonstrations | None, found: DataFindings
) -> None:
    try:
        early = early_tokenizer(config, demonstrations)
    except ConfigError as error:
        found.notes.append(f"stops of outputs and ends of calls are not looked at: {error}")
        return
    _examine_stops(config, early, found)


def _unended(config: IterativeRLConfig, early: EarlyTokenizer) -> Iterator[str]:
    """Say that an answer ends, by the chat template, with a token that does not end an output."""
    end = turn_end(early.tokenizer, config.prompt)
    if end is not None and end not in early.ends.union(config.rollout.stop_ids):
        named = early.tokenizer.convert_ids_to_tokens([end, *sorted(early.ends)])
        yield (
            f"prompt.chat: the chat template ends an answer with {named[0]!r}, and outputs end at {', '.join(named[1:])} only: "
            "a base model, or one whose generation_config.json does not name that token; all outputs would run to "
            f"rollout.max_output_tokens. Set rollout.stop_ids=[{end}], take the instructed model, or set prompt.chat=none"
        )


def _examine_answers(config: IterativeRLConfig, sets: dict[str, Questions], found: DataFindings) -> None:
    """Complain of a set all of whose answers are sentences, where the reward compares answers."""
    if not any(isinstance(part, AccuracyConfig) for part in config.reward.components):
        return
    for name, questions in sets.items():
        answers = questions.read(["answer"]).column("answer").to_pylist()
        kinds = answer_kinds(answers)
        if kinds["sentence"] == len(answers):
            found.complaints.append(
                f"data.{name}: no answer can be compared: all {len(answers):,} are sentences, such as {answers[0]!r:.80}, and "
                "the accuracy component compares numbers, formulas, options and names; name the column of the answer "
                "(columns.answer), or score with a function of your own (reward.components, kind function)"
            )


def answer_kinds(answers: Sequence[str]) -> Counter[str]:
    """Count answers by what the verifier takes them for: `number`, `option`, `formula`, `name` (few words) or `sentence`."""
    return Counter(map(_kind, answers))


def _kind(answer: str) -> str:
    from stages.reward.rules.accuracy import GoldError, read_gold
    from stages.reward.rules.exact import read_number
    from stages.reward.rules.formula import as_formula
    from stages.reward.rules.prose import choice_label

    try:
        gold = read_gold(answer)
    except GoldError:
        return "sentence"
    if read_number(gold) is not None:
        return "number"
    if (label := choice_label(gold)) is not None and label[1]:
        return "option"
    if len(gold.split()) <= _NAME_WORDS:
        return "name" if as_formula(gold) is None else "formula"
    return "formula" if as_formula(gold) is not None else "sentence"
