"""What any engine may answer with: the checks that all generators' outputs pass."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest

from stages.rollout.generator import (
    CheckedGenerator,
    FinishReason,
    Output,
    Progress,
    Prompt,
    Sampling,
    UnsoundOutputError,
    objection_to,
)
from stages.text.stops import StopStrings

PROMPTS = [Prompt("a", [5], [0, 1]), Prompt("b", [5], [2])]
SAMPLING = Sampling(1.0, 4, (1, 3))


def output(ids: Any = (4, 5, 6, 7), logprobs: Any = None, reason: FinishReason = "length") -> Output:
    given = np.full(len(ids), -0.5, dtype=np.float32) if logprobs is None else np.asarray(logprobs)
    return Output(np.asarray(ids), given, reason)


@dataclass
class Fake:
    """Answer with the groups given."""

    groups: list[list[Output]]
    window: int | None = None

    def generate(self, prompts: Any, sampling: Sampling, progress: Progress | None = None) -> list[list[Output]]:
        return self.groups


def checked(*groups: list[Output]) -> list[list[Output]]:
    return CheckedGenerator(Fake(list(groups)), "the fake", 9).generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize(
    "sound",
    [
        output(),
        output([1], [0.0], "stop"),
        output([4, 4, 3], [-1e-9, 9e-5, -999.0], "stop"),
        output([0, 8, 0, 1], reason="stop"),
    ],
)
def test_a_sound_output_stays_what_it_is(sound: Output) -> None:
    found = checked([output(), sound], [output()])[0][1]
    np.testing.assert_array_equal(found.ids, sound.ids)
    np.testing.assert_allclose(found.logprobs, sound.logprobs)
    assert (found.ids.dtype, found.logprobs.dtype, found.finish_reason) == (
        np.dtype("int32"),
        np.dtype("float32"),
        sound.finish_reason,
    )


class Strings:
    """Complete a string with id 6 after 5, or within ids that begin the output."""

    strings = ("56",)

    def first(self, ids: Any, begun: Any = ()) -> int | None:
        whole = [*begun, *ids]
        return next((t - len(begun) for t in range(1, len(whole)) if whole[t - 1 : t + 1] == [5, 6]), None)


@pytest.mark.parametrize(
    ("given", "beginning", "message"),
    [
        (output([4, 5, 6], reason="stop"), (), None),
        (output([6], reason="stop"), (5,), None),
        (output([6, 7, 7, 7]), (), None),
        (output([4, 5, 6, 7]), (), r"'length' of 4 .* \('56',\) at \[2\]"),
        (output([5, 6, 3], reason="stop"), (), r"at \[1, 2\]"),
        (output([6, 7], reason="length"), (5,), r"at \[0\]"),
        (output([4, 5], reason="stop"), (), r"at \[\]"),
    ],
)
def test_an_output_ends_with_the_token_that_completes_a_string_and_nowhere_else(
    given: Output, beginning: tuple[int, ...], message: str | None
) -> None:
    sampling = Sampling(1.0, 4, (1, 3), cast(StopStrings, Strings()))
    found = objection_to(given, sampling, 9, beginning)
    assert found is None if message is None else re.search(message, found or "")


@pytest.mark.claim("unsound rows of an engine")
@pytest.mark.parametrize(
    ("unsound", "objection"),
    [
        (output(np.zeros(0, dtype=np.int32)), "found 0 and 0"),
        (output([4] * 5), "found 5 and 5"),
        (output(logprobs=[-0.5] * 3), "found 4 and 3"),
        (output([4, 9, 9, 9]), "token 1: .* 0 to 8, .* 9"),
        (output([4, 5, 6, -1]), "token 3: .* found -1"),
        (output(np.array([4.0, 5.0, 6.0, 7.0])), "ids: .* float64"),
        (output(np.array([True] * 4)), "ids: .* bool"),
        (output([[4, 5, 6, 7]]), "ids: "),
        (output(logprobs=[-1.0, np.nan, -1.0, -1.0]), "token 1: .* found nan"),
        (output(logprobs=[-1.0, -1.0, -np.inf, -1.0]), "token 2: .* found -inf"),
        (output(logprobs=[-1.0, -1.0, -1.0, 1e-3]), "token 3: .* found 0.001"),
        (output([4, 1], reason="length"), "'length' of 2"),
        (output([4, 5], reason="stop"), "'stop' of 2"),
        (output([4, 3, 5, 1], reason="stop"), r"\(1, 3\) at \[1, 3\]"),
    ],
)
def test_an_unsound_output_is_refused_with_engine_question_and_row(unsound: Output, objection: str) -> None:
    with pytest.raises(UnsoundOutputError, match=f"^the fake: question 'a', output 1: .*{objection}"):
        checked([output(), unsound], [output()])


@pytest.mark.parametrize(
    ("groups", "found"), [(([output()], [output()]), r"\[1, 1\]"), (([output()] * 2,), r"\[2\]"), ((), r"\[\]")]
)
def test_outputs_that_are_missing_are_refused(groups: tuple[list[Output], ...], found: str) -> None:
    with pytest.raises(UnsoundOutputError, match=rf"expected \[2, 1\] outputs of the questions, found {found}"):
        checked(*groups)
