"""Tables of questions and demonstrations, from the built-in world or from files, and the batch of each step."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping
from typing import Any, Final, Self, get_args

from pydantic import Field, field_validator, model_validator

from pipeline.artifact import take_rows
from pipeline.config import Config
from pipeline.stage import record_metrics, stage
from stages.arithmetic import (
    ArithmeticConfig,
    Author,
    AuthorShares,
    Split,
    called_part,
    draw_chains,
    render_question,
    unique_chains,
    write_solution,
)
from stages.data.files import QuestionFileConfig, load_questions
from stages.tables import DataError, Demonstrations, Questions, identify
from stages.training.batching import sample_positions

_AUTHORS: Final[tuple[Author, ...]] = get_args(Author)


_SFT_CHAINS: Final = ArithmeticConfig(count=50_000, shortest=2, longest=6)


class DemonstrationConfig(Config):
    """Demonstrations of chain arithmetic by a mixture of authors, from the training split."""

    chains: ArithmeticConfig = _SFT_CHAINS
    """Their questions; `count` demonstrations, whose questions may repeat, by the same or another author."""
    authors: AuthorShares = Field(default_factory=AuthorShares)
    """Who writes them."""

    @field_validator("chains", mode="before")
    @classmethod
    def _complete(cls, chains: Any) -> Any:
        """Complete a file's fields by this default, not by `ArithmeticConfig`'s."""
        return {**_SFT_CHAINS.model_dump(), **chains} if isinstance(chains, Mapping) else chains

    @model_validator(mode="after")
    def _authors_who_can(self) -> Self:
        written = {"careful", "stops_early", "calls", "calls_early"}
        unable = [name for name, share in self.authors.model_dump().items() if share and name not in written]
        if self.chains.numbers == "large" and unable:
            raise ValueError(
                f"authors: {unable[0]} has a habit with small numbers only; set its share to 0, or chains.numbers=small"
            )
        if self.chains.language != "en" and self.authors.calls_a_tool:
            raise ValueError(
                "authors: who calls a calculator writes en; set calls=0 and calls_early=0, or chains.language=en"
            )
        return self


@stage(version="1")
def arithmetic_questions(config: ArithmeticConfig, split: Split = "train") -> Questions:
    """Make `config.count` different chains of one split, with the true answer and the careful author's solution.

    Raises:
        DataError: the split holds fewer such chains.
    """
    chains = unique_chains(config, split)
    questions = [render_question(chain, config.language) for chain in chains]
    return Questions.write(
        {
            "question_id": [identify(question) for question in questions],
            "question": questions,
            "answer": [str(chain.answer) for chain in chains],
            "solution": [write_solution(chain, "careful", config.language) for chain in chains],
        }
    )


@stage(version="1")
def arithmetic_demonstrations(config: DemonstrationConfig) -> Demonstrations:
    """Make demonstrations of training chains, each by an author drawn for it: the question does not say by whom.

    What a calculator answered is no author's: it is `observed`.

    The share of right answers is recorded as `data/accuracy`: the accuracy at T = 1 of a policy that imitates perfectly.
    """
    rng = random.Random(f"demonstrations/{config.chains.seed}")
    shares = config.authors.model_dump()
    chains = draw_chains(config.chains, "train", rng)
    language, right = config.chains.language, 0
    rows: list[dict[str, Any]] = []
    for chain in itertools.islice(chains, config.chains.count):
        author = _draw_author(rng.random(), shares)
        question, completion = render_question(chain, language), write_solution(chain, author, language)
        right += completion.endswith(f"#### {chain.answer}")
        called = called_part(completion)
        rows.append(
            {
                "question_id": identify(question),
                "question": question,
                "completion": completion,
                "author": author,
                "observed": called and [{"start": called[0], "end": called[1]}],
            }
        )
    record_metrics({"data/accuracy": right / len(rows)})
    return Demonstrations.write(rows)


@stage(version="2")
def read_questions(config: QuestionFileConfig) -> Questions:
    """Read a question set from a JSONL, CSV or Parquet file, a Hugging Face `datasets` folder or a hub data set.

    Metrics: `data/rows` (read), `data/repeats` (of these, repeated ones: `duplicates`).

    Raises:
        DataError: names file, row and column: a question without an answer, a duplicate id, an empty set, a missing column, a
            number that is not exact, a line that is not JSON or CSV, a missing file, a set that would need a script.
    """
    loaded = load_questions(config)
    record_metrics({"data/rows": loaded.rows, "data/repeats": loaded.repeats})
    return Questions.write(loaded.columns)


@stage(version="1")
def demonstrations_from_solutions(
    questions: Questions, answer_line: str = "#### {answer}", author: str = "data"
) -> Demonstrations:
    r"""Make demonstrations of the data set's own solutions, each ending in one line that states the answer.

    Args:
        questions: a set with solutions.
        answer_line: the last line, `{answer}` standing for the answer, for example `The answer is \boxed{{answer}}.`; an
            answer line of the data set itself (`#### 17`) gives way to it.
        author: recorded as the author of every row.

    Raises:
        DataError: a question without a solution, or an `answer_line` without `{answer}`.
    """
    if "{answer}" not in answer_line:
        raise DataError(f"answer_line {answer_line!r} does not hold {{answer}}")
    rows = questions.rows()
    for number, row in enumerate(rows):
        if row["solution"] is None:
            raise DataError(f"row {number} (question {row['question_id']}) has no solution to demonstrate")
    return Demonstrations.write(
        {
            "question_id": [row["question_id"] for row in rows],
            "question": [row["question"] for row in rows],
            "completion": [_with_answer_line(row, answer_line) for row in rows],
            "author": [author] * len(rows),
        }
    )


@stage(version="1")
def sample_batch(questions: Questions, *, size: int, step: int, seed: int) -> Questions:
    """Draw D_b: the questions of step `step` (Algorithm 1, line 5), without replacement, by (seed, step) only.

    Steps walk through one shuffled order of the set after another: in every `len(questions)` draws each question comes once.

    Raises:
        DataError: the set has fewer than `size` questions.
    """
    table = questions.read()
    return Questions.write(take_rows(table, sample_positions(table.num_rows, size=size, step=step, seed=seed)))


def _draw_author(point: float, shares: dict[str, float]) -> Author:
    """Return the author at `point` of 0..1 when the shares lie side by side."""
    rest = point * sum(shares.values())
    for author in _AUTHORS:
        rest -= shares[author]
        if rest < 0:
            return author
    return next(author for author in reversed(_AUTHORS) if shares[author] > 0)  # rounding at the very end of 0..1


def _with_answer_line(row: dict[str, Any], answer_line: str) -> str:
    body = re.sub(r"\n*^####[^\n]*\s*\Z", "", row["solution"], flags=re.MULTILINE).rstrip()
    last = answer_line.replace("{answer}", row["answer"])
    return f"{body}\n{last}" if body else last
