"""Define the seam between the rollout stage and whatever decodes: questions' ids in, sampled ids out.

A backend (`hf.py`, `vllm.py`, `served.py`) implements `Generator`. It knows nothing of tables, templates or tokenizers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.residency import evict

if TYPE_CHECKING:
    from stages.text.stops import StopStrings

FinishReason = Literal["stop", "length"]
HF: Final = "rollout"
VLLM: Final = "vllm"
"""Slots of resident models (`pipeline/residency.py`): each kind keeps its own, as an engine takes half a minute to start."""
_ROUNDING: Final = 1e-4
"""Nats above 0 that a log-probability may have by rounding."""
_IMPOSSIBLE: Final = -1000.0
"""A token of this log-probability cannot have been drawn from float32 probabilities. vLLM's server writes -9999 for -inf."""


class PromptTooLongError(ValueError):
    """A prompt and its outputs do not fit the model's window."""


class UnsoundOutputError(RuntimeError):
    """An engine answered with what cannot be an output it sampled; names engine, question and row."""


def sample_seed(seed: int, question_id: str, sample: int) -> int:
    """Return the seed of one (question, sample): 63 bits of sha256, which fit a signed column and never repeat in practice.

    Equal seeds within a group would give equal outputs and a zero spread of rewards.
    """
    digest = hashlib.sha256(f"{seed}\0{sample}\0{question_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_room(slot: str, device: str) -> None:
    """Evict the other kind's model from a GPU, whose memory vLLM claims when it starts; host memory holds both."""
    if device == "cuda":
        for other in {HF, VLLM} - {slot}:
            evict(other)


@dataclass(frozen=True)
class Prompt:
    """Hold one question as the policy sees it, and one seed for each output wanted of it (G of them)."""

    question_id: str
    ids: Sequence[int]
    seeds: Sequence[int]
    begun: int = 0
    """Of `ids`, how many at the end begin the output: a stop string may reach from these into what is sampled."""
    shared: int = 0
    """Of `ids`, how many at the beginning other prompts may begin with too: they are computed once for all of these."""

    @property
    def beginning(self) -> Sequence[int]:
        """Return the ids that begin the output."""
        return self.ids[len(self.ids) - self.begun :]


@dataclass(frozen=True)
class Sampling:
    """Say how outputs are drawn; temperature 0 takes the most probable token (the lowest id among equals)."""

    temperature: float
    max_output_tokens: int
    stop_ids: tuple[int, ...]
    """A token among these ends its output and is part of it; empty, and no strings: every output has `max_output_tokens`."""
    stop_strings: StopStrings | None = None
    """So does the token that completes one of these."""


@dataclass(frozen=True)
class Output:
    """Hold one sampled output o_i.

    `logprobs[t]` = log pi(ids[t] | prompt, ids[:t]) in nats, under the distribution that was sampled from: logits / T. Greedy
    decoding samples from no distribution; its logprobs are those at T = 1.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finish_reason: FinishReason


Progress = Callable[[int, int], None]
"""Called now and then with (outputs ended, tokens so far)."""


class Generator(Protocol):
    """Sample outputs of a causal language model."""

    @property
    def window(self) -> int | None:
        """Return the tokens of prompt and output together, at most; None: the model names no limit."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[list[Output]]:
        """Return one output per seed for every prompt, in the order given.

        With `hf` the same prompts, sampling and weights give the same outputs bit for bit on one machine; other engines
        promise that only for the same call to an engine in the same state.

        Raises:
            PromptTooLongError: naming the question, the tokens it needs and the tokens the model has.
        """
        ...


def check_window(window: int | None, prompt: Prompt, sampling: Sampling, *, called: str = "window") -> None:
    """Refuse what a generator with such a window, which the message calls `called`, cannot answer in full.

    Raises:
        PromptTooLongError: see `Generator.generate`.
        ValueError: an empty prompt.
    """
    if not prompt.ids:
        raise ValueError(
            f"question {prompt.question_id!r}: expected at least one prompt token, found none; add a prefix"
        )
    if window is None or len(prompt.ids) + sampling.max_output_tokens <= window:
        return
    room = window - sampling.max_output_tokens
    raise PromptTooLongError(
        f"question {prompt.question_id!r}: expected a prompt of at most {max(room, 0)} tokens (the model's {called} of {window}"
        f" less max_output_tokens = {sampling.max_output_tokens}), found {len(prompt.ids)}; shorten or drop the question,"
        " lower max_output_tokens, or take a model with a larger window"
    )


def generate_within(
    generator: Generator,
    prompts: Sequence[Prompt],
    rooms: Sequence[int],
    sampling: Sampling,
    progress: Progress,
    *,
    window: int | None,
) -> list[list[Output]]:
    """Generate outputs of at most `rooms[i]` tokens for prompt i, in as few calls as that takes.

    A generator has one limit for all prompts of a call. So the rooms of a call differ by a quarter of the limit at most, which
    bounds what is sampled in vain, and no prompt is taken beyond the window by the room of another.
    """
    made: list[list[Output]] = [[] for _ in prompts]
    done = tokens = 0
    for room, members in _calls(prompts, rooms, limit=sampling.max_output_tokens, window=window):

        def behind(ended: int, sampled: int, done: int = done, tokens: int = tokens) -> None:
            progress(done + ended, tokens + sampled)

        within = replace(sampling, max_output_tokens=room)
        groups = generator.generate([prompts[place] for place in members], within, behind)
        for place, group in zip(members, groups, strict=True):
            made[place] = [_cut(output, rooms[place]) for output in group]
        done += sum(len(group) for group in groups)
        tokens += sum(len(output.ids) for group in groups for output in group)
    return made


def _calls(
    prompts: Sequence[Prompt], rooms: Sequence[int], *, limit: int, window: int | None
) -> Iterator[tuple[int, list[int]]]:
    """Yield the most tokens of a call, and the places of its prompts."""
    left = sorted(range(len(prompts)), key=lambda place: -rooms[place])
    while left:
        room = rooms[left[0]]
        members = left[:1]
        rest: list[int] = []
        for place in left[1:]:
            fits = window is None or len(prompts[place].ids) + room <= window
            (members if fits and room - rooms[place] <= limit // 4 else rest).append(place)
        yield room, members
        left = rest


def _cut(output: Output, room: int) -> Output:
    """Return what a generator with a limit of `room` would have sampled: tokens are drawn one by one."""
    if len(output.ids) <= room:
        return output
    return Output(output.ids[:room], output.logprobs[:room], "length")


@dataclass(frozen=True)
class CheckedGenerator:
    """Check the outputs of a generator before anything is made of them: the one place where all engines' values pass."""

    inner: Generator
    engine: str
    """What an error calls it."""
    vocabulary: int
    """Token ids that the model knows: 0 .. vocabulary - 1."""

    @property
    def window(self) -> int | None:
        """Return the generator's own."""
        return self.inner.window

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[list[Output]]:
        """Generate and check.

        Raises:
            UnsoundOutputError: outputs that are missing or surplus, or one that `objection_to` objects to.
        """
        groups = self.inner.generate(prompts, sampling, progress)
        counts, wanted = [len(group) for group in groups], [len(prompt.seeds) for prompt in prompts]
        if counts != wanted:
            raise UnsoundOutputError(f"{self.engine}: expected {wanted} outputs of the questions, found {counts}")
        return [
            [self._sound(prompt, row, output, sampling) for row, output in enumerate(group)]
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def _sound(self, prompt: Prompt, row: int, output: Output, sampling: Sampling) -> Output:
        objection = objection_to(output, sampling, self.vocabulary, prompt.beginning)
        if objection is not None:
            raise UnsoundOutputError(
                f"{self.engine}: question {prompt.question_id!r}, output {row}: {objection}. None of this call's outputs was "
                "written: find out what is wrong with the engine, and give the same command again"
            )
        return Output(output.ids.astype(np.int32), output.logprobs.astype(np.float32), output.finish_reason)


def cut_at_string(output: Output, sampling: Sampling, prompt: Prompt) -> Output:
    """Return an output up to the token that completes a stop string: an engine may find it later in its own text, or never."""
    if sampling.stop_strings is None or isinstance(ids := _plain(output.ids, int), str):
        return output
    place = sampling.stop_strings.first(ids, prompt.beginning)
    return output if place is None else Output(output.ids[: place + 1], output.logprobs[: place + 1], "stop")


def objection_to(output: Output, sampling: Sampling, vocabulary: int, beginning: Sequence[int] = ()) -> str | None:
    """Say why this cannot have been sampled; None where it can.

    An output has 1 to `max_output_tokens` ids of the vocabulary, one finite log-probability of at most 0 for each, and a stop
    id, or a token that completes a stop string, at its end, and only there, exactly where its finish reason is `stop`.

    Args:
        beginning: ids of the output that were not sampled, in front of these.
    """
    ids, logprobs = _plain(output.ids, int), _plain(output.logprobs, float)
    if isinstance(ids, str) or isinstance(logprobs, str):
        return f"ids: {ids}" if isinstance(ids, str) else f"log-probabilities: {logprobs}"
    if not 1 <= len(ids) <= sampling.max_output_tokens or len(ids) != len(logprobs):
        return (
            f"expected 1 to {sampling.max_output_tokens} ids and a log-probability of each, found {len(ids)} and "
            f"{len(logprobs)}"
        )
    if (place := _first((ids < 0) | (ids >= vocabulary))) is not None:
        return f"token {place}: expected an id of the vocabulary, 0 to {vocabulary - 1}, found {ids[place]}"
    # NaN fails both comparisons.
    if (place := _first(~((logprobs > _IMPOSSIBLE) & (logprobs <= _ROUNDING)))) is not None:
        return f"token {place}: expected the finite log-probability (at most 0) of a drawn token, found {logprobs[place]:g}"
    stops, strings = np.isin(ids, sampling.stop_ids), ""
    if sampling.stop_strings is not None:
        strings = f" or strings {sampling.stop_strings.strings}"
        if (first := sampling.stop_strings.first(ids, beginning)) is not None:
            stops[first] = True
    if stops[:-1].any() or bool(stops[-1]) != (output.finish_reason == "stop"):
        where = np.flatnonzero(stops).tolist()
        stops_named = f"stop ids {sampling.stop_ids}{strings} at {where}"
        return f"finish reason {output.finish_reason!r} of {len(ids)} tokens, and {stops_named}"
    return None


def _first(wrong_T: NDArray[np.bool_]) -> int | None:
    places = np.flatnonzero(wrong_T)
    return int(places[0]) if len(places) else None


def _plain(values: NDArray[Any], kind: type) -> NDArray[Any] | str:
    """Return the values as numbers, or what is wrong with their types: a cast would make numbers of null, text and True."""
    if values.ndim != 1:
        return f"expected a list of numbers, found {values!r:.60}"
    if values.dtype == object:
        allowed = (int,) if kind is int else (int, float)
        wrong = next((place for place, value in enumerate(values) if type(value) not in allowed), None)
        if wrong is not None:
            return f"token {wrong}: expected a number, found {values[wrong]!r:.60}"
        values = np.array([_clipped(value) for value in values], dtype=np.int64 if kind is int else np.float64)
    expected = "iu" if kind is int else "f"
    return values if values.dtype.kind in expected else f"expected numbers, found {values.dtype}"


def _clipped(value: Any) -> Any:
    """Return an id of more than 64 bits as one that is beyond any vocabulary."""
    return min(max(value, -(2**62)), 2**62) if type(value) is int else value
