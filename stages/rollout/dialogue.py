"""Continue outputs of several turns: append what an environment answered to the very ids sampled, and sample the next turn."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from pipeline.stage import record_metrics, stage
from stages.join import KEY, align, turns_of
from stages.models import Checkpoint, load_tokenizer
from stages.rollout.config import RolloutConfig
from stages.rollout.engines import generator_of
from stages.rollout.generator import Output, Prompt, generate_within, sample_seed
from stages.rollout.stage import Sampled, calls_of, reason_of, record_outputs, reporter, sampling_of, write_rollouts
from stages.tables import Rollouts, ToolCalls
from stages.text import Frame, PromptConfig, PromptError, tool_frame
from stages.text.ids import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TURN: Final = (*KEY, "turn")


@stage(version="2")
def continue_dialogues(
    policy: Checkpoint,
    outputs: Rollouts,
    calls: ToolCalls,
    config: RolloutConfig,
    *,
    call_ends: Sequence[str],
    max_calls: int,
    messages: PromptConfig | None = None,
) -> Rollouts:
    """Append the answers to the outputs that wait for one (finish reason `call`), and sample their next turns.

    No id is encoded again: an output's ids are those sampled and those of each answer, appended. A turn's seed is a function of
    the output's own and of the turn's number. Tokens of answers have no log-probability, and lie outside `turns`. All turns
    and answers of an output have `max_output_tokens` together.

    An output ends as a finished one where its environment says so (`done`). It ends cut (`length`) at a call beyond
    `max_calls`, and where no room is left for the answer and one more token. With no output that waits, `outputs` is returned.

    Args:
        policy: as `rollout` sampled with, `config` and `call_ends` too.
        outputs: of `rollout`, or of this stage.
        calls: the calls of all turns so far, with their answers.
        max_calls: answers of an output, at most.
        messages: whose chat template writes each answer as a message of the role `tool`; None: it is text as it stands.

    Metrics: as `rollout`, of what the policy wrote in all turns so far; `rollout/turns_mean`, `rollout/observed_tokens` (of
    answers, in all outputs), `rollout/waiting` (outputs that wait for an answer now).

    Raises:
        JoinError: a call that waits without an answer.
        PromptError: a chat template without the role `tool`.
        UnsoundOutputError, ConfigError, WorkerError, StaleWeightsError: as `rollout`.
    """
    rows = [_Dialogue.of(row) for row in outputs.rows()]
    waiting = [row for row in rows if row.finish_reason == "call"]
    if not waiting:
        record_metrics(outputs.metrics)
        return outputs
    tokenizer = load_tokenizer(policy)
    _hear(waiting, calls, tokenizer, messages)
    sampling, ends = sampling_of(policy, tokenizer, config, call_ends), calls_of(tokenizer, call_ends)
    with generator_of(policy, config.backend, stop_strings=True) as generator:
        started = time.perf_counter()
        limit, window = config.max_output_tokens, generator.window
        going = [row for row in waiting if row.goes_on(limit, window)]
        prompts = [row.prompt() for row in going]
        rooms, progress = [row.room(limit, window) for row in going], reporter(len(going), "continue_dialogues")
        made = generate_within(generator, prompts, rooms, sampling, progress, window=window)
        seconds = time.perf_counter() - started
    for row, (output,) in zip(going, made, strict=True):
        row.add(output, reason_of(output, ends), max_calls=max_calls)
    _record(rows, seconds + outputs.metrics.get("rollout/seconds", 0.0))
    return write_rollouts([row.sampled() for row in rows], tokenizer, config.temperature)


@dataclass
class _Dialogue:
    """Hold an output of some turns, as it grows."""

    question_id: str
    sample: int
    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float | None]
    finish_reason: str
    seed: int
    turns: list[tuple[int, int]]
    answer: list[int]
    """Ids of what the environment says next."""

    @classmethod
    def of(cls, row: dict[str, Any]) -> _Dialogue:
        """Take a row of `Rollouts`."""
        same = {
            name: row[name] for name in ("question_id", "sample", "prompt_ids", "logprobs", "finish_reason", "seed")
        }
        return cls(**same, ids=row["output_ids"], turns=turns_of(row), answer=[])

    def prompt(self) -> Prompt:
        """Return what the turn to come is sampled from, by a seed of its own."""
        seed = sample_seed(self.seed, f"{self.question_id}\0turn {len(self.turns)}", self.sample)
        return Prompt(self.question_id, self.prompt_ids + self.ids, [seed], shared=len(self.prompt_ids))

    def room(self, limit: int, window: int | None) -> int:
        """Return how many tokens may follow."""
        most = limit if window is None else min(limit, window - len(self.prompt_ids))
        return most - len(self.ids)

    def goes_on(self, limit: int, window: int | None) -> bool:
        """Append the answer; end the output where it waits for none, or where nothing fits behind it."""
        if self.finish_reason != "call":
            return False
        if self.room(limit, window) <= len(self.answer):
            self.finish_reason = "length"
            return False
        self.ids += self.answer
        self.logprobs += [None] * len(self.answer)
        return True

    def add(self, output: Output, reason: str, *, max_calls: int) -> None:
        """Append a turn; a call beyond `max_calls` ends the output."""
        self.turns.append((len(self.ids), len(self.ids) + len(output.ids)))
        self.ids += output.ids.tolist()
        self.logprobs += output.logprobs.tolist()
        self.finish_reason = "length" if reason == "call" and len(self.turns) > max_calls else reason

    def sampled(self) -> Sampled:
        """Return the row; one of a single turn is the policy's as a whole."""
        turns = self.turns if len(self.turns) > 1 else None
        key = (self.question_id, self.sample, self.prompt_ids, self.ids)
        return Sampled(*key, self.logprobs, self.finish_reason, self.seed, turns)


def _hear(
    waiting: Sequence[_Dialogue],
    calls: ToolCalls,
    tokenizer: PreTrainedTokenizerFast,
    messages: PromptConfig | None,
) -> None:
    """Note the answer to each call; end the outputs that their environment ends."""
    names = {name: [getattr(row, name) for row in waiting] for name in KEY}
    last = pa.array([len(row.turns) - 1 for row in waiting], pa.int32())
    wanted = pa.table(
        {"question_id": names["question_id"], "sample": pa.array(names["sample"], pa.int32()), "turn": last}
    )
    found = align(
        wanted, calls.read([*_TURN, "observation", "done"]), "calls", to="waiting outputs", by=_TURN, extra=True
    )
    frame = Frame([], "", "", []) if messages is None else tool_frame(tokenizer, messages)
    for row, text, done in zip(waiting, found["observation"].to_pylist(), found["done"].to_pylist(), strict=True):
        if done:
            row.finish_reason = "stop"
        else:
            said = encode_observation(tokenizer, frame.lead + text + frame.tail)
            row.answer = [*frame.head_ids, *said, *frame.end_ids]


def encode_observation(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the ids of what an environment says: ordinary tokens only, so that it can write no special token.

    Characters that the tokenizer cannot express are left out.
    """
    with contextlib.suppress(PromptError):
        return encode_texts(tokenizer, [text])[0]
    kept = []
    for character in text:
        with contextlib.suppress(PromptError):
            encode_texts(tokenizer, [character])
            kept.append(character)
    return encode_texts(tokenizer, ["".join(kept)])[0]


def _record(rows: Sequence[_Dialogue], seconds: float) -> None:
    lengths = [sum(end - start for start, end in row.turns) for row in rows]
    record_outputs(lengths, sum(row.finish_reason == "length" for row in rows), seconds)
    record_metrics(
        {
            "rollout/waiting": sum(row.finish_reason == "call" for row in rows),
            "rollout/turns_mean": sum(len(row.turns) for row in rows) / len(rows),
            "rollout/observed_tokens": sum(len(row.ids) for row in rows) - sum(lengths),
        }
    )
