"""Files of solutions that others wrote, right ones and wrong ones: what a reward model can learn from without a policy."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator

from pipeline.artifact import take_rows
from pipeline.config import Config
from pipeline.stage import record_metrics, stage
from stages.data.cells import Row, cell, has_cell, required_text, text_of
from stages.data.files import QuestionFileConfig, answer_of, question_of, rows_of, without_calculator_marks
from stages.join import key_at
from stages.models import Checkpoint, load_tokenizer
from stages.tables import DataError, Demonstrations, Questions, Rollouts, Solutions, identify, is_held_out
from stages.text import PromptConfig, decode_outputs, encode_completions, encode_prompts


class SolutionFileConfig(Config):
    """A file of labelled solutions, in one of two forms.

    Flat: a row has a question and one solution. Nested (`authors`): a row has a question and, for each author, a column with
    that author's solution, either its text or an object `{solution, label}`.
    """

    source: QuestionFileConfig
    """The file, and the columns of the question and of its gold answer, as for a question set. Where no column holds the answer
    (`columns.answer: null`), it is taken from `columns.solution`, which then is the data set's own solution. Ids are made from
    the questions' texts, so that equal questions are one; `limit` counts rows of the file."""
    authors: tuple[str, ...] = ()
    """Nested form: the columns, one per author. A row without a solution by one of them is no fault. Empty: flat."""
    solution: str = Field("solution", min_length=1)
    """Where the text is: the column of a flat file, the key in an author's object."""
    label: str | None = None
    """Where the file's own label is (true or false, 1 or 0), in the same way; null: it has none."""
    author: str | None = None
    """The column of a flat file that names the author; null: none."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.authors and self.author:
            raise ValueError(
                "`author` is a column of a flat file, `authors` are the columns of a nested one; set one of them"
            )
        if self.source.duplicates != "refuse":
            raise ValueError(
                f"source.duplicates: equal questions are one here, whose solutions are its samples; found "
                f"{self.source.duplicates}: leave it at refuse"
            )
        if len(set(self.authors)) < len(self.authors):
            raise ValueError(f"authors: expected each column once, found {list(self.authors)}")
        return self


class _Found(NamedTuple):
    """One solution as the file has it."""

    text: str
    author: str | None
    label: bool | None


@stage(version="2")
def read_solutions(config: SolutionFileConfig) -> Solutions:
    """Read the solutions of a file, in its order; those of one question are its samples 0, 1, ...

    Metrics: `data/solutions`, `data/questions`, `data/right_share` (of the file's own labels, where it has any).

    Raises:
        DataError: names the file, the row and the column: an absent column, a question without an answer or with two different
            ones, a label that is neither true nor false, a flat row without a solution, a file without any.
    """
    source, answers, counts = config.source, dict[str, tuple[str, str]](), dict[str, int]()
    table: list[dict[str, Any]] = []
    for row in itertools.islice(rows_of(source), source.limit):
        question = question_of(row, source.columns)
        question_id, answer = identify(question), answer_of(row, source.columns, source.answer_marker)
        known, where = answers.setdefault(question_id, (answer, row.where))
        if answer != known:
            raise DataError(f"{row.where}: the answer {answer!r}, where {where} has {known!r} for the same question")
        for found in _found(row, config):
            text = without_calculator_marks(found.text) if source.remove_calculator_marks else found.text
            sample = counts[question_id] = counts.get(question_id, -1) + 1
            key = {"question_id": question_id, "sample": sample, "question": question, "answer": answer}
            table.append({**key, "solution": text, "author": found.author, "label": found.label})
    if not table:
        raise DataError(f"{source.path}: no solutions: the file has none in {_places(config)}")
    record_metrics(_metrics(table))
    return Solutions.write(table)


@stage(version="1")
def take_solutions(solutions: Solutions, *, start: float, stop: float) -> Solutions:
    """Take the solutions of the questions between `start` and `stop`, where a hash of its text puts each in 0..1.

    A split by question: all solutions of one are on one side of any border, whatever the order and size of the file. The
    border is `is_held_out`'s, so that the held-out part of a share s is 0 to s.

    Raises:
        DataError: there are none.
    """
    table = solutions.read()
    sides = {text: is_held_out(text, stop) and not is_held_out(text, start) for text in set(_column(table, "question"))}
    chosen = [place for place, text in enumerate(_column(table, "question")) if sides[text]]
    if not chosen:
        raise DataError(f"none of {len(sides)} questions lies between {start} and {stop}; choose a larger share")
    return Solutions.write(take_rows(table, chosen))


@stage(version="1")
def questions_of(solutions: Solutions) -> Questions:
    """Return the questions of the solutions, each once, with their gold answers."""
    rows = {row["question_id"]: row for row in solutions.read().drop(["solution"]).to_pylist()}
    columns = ("question_id", "question", "answer")
    return Questions.write([{**{name: row[name] for name in columns}, "solution": None} for row in rows.values()])


@stage(version="1")
def demonstrations_of(solutions: Solutions) -> Demonstrations:
    """Return the solutions, right and wrong, as demonstrations: for a tokenizer made from them, not to be imitated."""
    table = solutions.read().select(["question_id", "question", "solution", "author"])
    return Demonstrations.write(table.rename_columns({"solution": "completion"}))


def _column(table: Any, name: str) -> list[str]:
    values: list[str] = table.column(name).to_pylist()
    return values


def _found(row: Row, config: SolutionFileConfig) -> Iterator[_Found]:
    if not config.authors:
        _require_columns(row, [config.solution, config.label, config.author])
        author = text_of(row, config.author) if config.author else None
        yield _Found(required_text(row, config.solution, kind="no solution"), author, _label(row, config.label))
        return
    _require_columns(row, config.authors)
    for author in config.authors:
        value = cell(row, author)
        nested = value if isinstance(value, Mapping) else {config.solution: value}
        part = Row(f"{row.where}, {author}", dict(nested))
        text = text_of(part, config.solution)
        if text is not None:
            yield _Found(text, author, _label(part, config.label))


def _require_columns(row: Row, names: Sequence[str | None]) -> None:
    absent = [name for name in names if name is not None and not has_cell(row, name)]
    if absent:
        raise DataError(f"{row.where}: no column {absent[0]!r}; found columns {sorted(row.values)}")


def _label(row: Row, name: str | None) -> bool | None:
    if name is None:
        return None
    value = cell(row, name)
    if value not in (True, False):  # 1 and 0, 1.0 and 0.0 are equal to them
        raise DataError(f"{row.where}: label {name!r}: expected true or false (or 1 or 0), found {value!r}")
    return bool(value)


def _places(config: SolutionFileConfig) -> str:
    return f"the columns {list(config.authors)}" if config.authors else f"column {config.solution!r}"


def _metrics(table: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    labels = [row["label"] for row in table if row["label"] is not None]
    return {
        "data/solutions": len(table),
        "data/questions": len({row["question_id"] for row in table}),
        "data/right_share": sum(labels) / len(labels) if labels else None,
    }


# ------------------------------------------------------------------------------------------------ as outputs


@stage(version="2")
def solution_outputs(
    model: Checkpoint, solutions: Solutions, prompt: PromptConfig, *, max_tokens: int | None = None
) -> Rollouts:
    """Encode every solution as an output, its question as the prompt, by the model's tokenizer; end of sequence last.

    No policy sampled these rows: they have no log-probabilities, temperature 1, seed 0 and finish reason `stop`.

    Args:
        model: its tokenizer and window; the weights have no influence.
        max_tokens: longer solutions, question included, are left out; None: none is.

    Metrics: `data/tokens_mean` and `data/tokens_most`, question included, and `data/left_out` (solutions).

    Raises:
        PromptError: a character that the tokenizer cannot express.
        DataError: a solution longer than the model's window, by its row; or all are left out.
    """
    tokenizer, table = load_tokenizer(model), solutions.read()
    prompts = encode_prompts(tokenizer, _column(table, "question"), prompt)
    outputs = encode_completions(tokenizer, _column(table, "solution"))
    lengths = [len(asked) + len(output) for asked, output in zip(prompts, outputs, strict=True)]
    kept = [row for row, length in enumerate(lengths) if max_tokens is None or length <= max_tokens]
    if not kept:
        raise DataError("every solution is longer than max_tokens; choose a larger one")
    longest = max(kept, key=lengths.__getitem__)
    _check_window(model, key_at(table, longest), lengths[longest])
    decoded = decode_outputs(tokenizer, [outputs[row] for row in kept])
    tokens = {
        "data/tokens_mean": sum(lengths[row] for row in kept) / len(kept),
        "data/tokens_most": lengths[longest],
        "data/left_out": len(lengths) - len(kept),
    }
    record_metrics(tokens)
    rows = take_rows(table, kept)
    return Rollouts.write(
        {
            "question_id": rows["question_id"],
            "sample": rows["sample"],
            "prompt_ids": [prompts[row] for row in kept],
            "output_ids": [outputs[row] for row in kept],
            "logprobs": [None] * len(kept),
            "finish_reason": ["stop"] * len(kept),
            "text": decoded.texts,
            "text_ends": decoded.ends,
            "temperature": [1.0] * len(kept),
            "seed": [0] * len(kept),
        }
    )


def _check_window(model: Checkpoint, key: Any, longest: int) -> None:
    window = json.loads((model.described / "config.json").read_text()).get("max_position_embeddings")
    if window is not None and longest > window:
        raise DataError(
            f"solution {key}: expected at most {window} tokens with its question (the model's window), found {longest}, the "
            "longest of all; leave such out with max_tokens, or take a model with a larger window"
        )
