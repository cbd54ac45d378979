"""Check the data of a run before it begins: read every set, measure its prompts, count its questions; imports no torch.

The stages themselves read it, in a store that is thrown away, so that what is checked is what will run.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flows.algorithm.data import arithmetic_complaints, below, demonstrations_of_set, room_of, shortages
from flows.algorithm.models import early_tokenizer
from flows.config import ArithmeticData, FileData, IterativeRLConfig
from pipeline.config import ConfigError
from pipeline.store import Store, use_store
from stages.data import DataError, measure_prompts, read_questions
from stages.tables import Demonstrations, Questions
from stages.text import PromptError


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


def examine_data(config: IterativeRLConfig) -> DataFindings:
    """Read the data sets that are here, without a model, a download or a trace in the store."""
    found = DataFindings()
    if isinstance(config.data, ArithmeticData):
        found.complaints += arithmetic_complaints(config, config.data)
        return found
    with scratch_store():
        sets = dict(_read_sets(config.data, found))
        demonstrations = _demonstrations(sets.get("train"), found)
        _measure(config, sets, demonstrations, found)
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
    """Measure prompts, where there is a tokenizer."""
    if not sets:
        return
    try:
        early = early_tokenizer(config, demonstrations)
    except ConfigError as error:
        found.notes.append(f"prompts are not measured: {error}")
        return
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
