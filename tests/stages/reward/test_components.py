"""Process labels of the built-in world and the punishment of length: which step is worth what, and which token ends it."""

from __future__ import annotations

from typing import Any

import pytest

from stages.reward import AccuracyConfig, OverlongConfig, RewardConfig, StepsConfig, score
from stages.reward.components import label_steps
from stages.reward.rules.format import overlong_score
from stages.tables import DataError, Rewards, Rollouts
from stages.text import BPETokenizerConfig, CharacterTokenizerConfig, build_tokenizer, decode_outputs
from tests.stages.rows import output_row, question_table

pytestmark = pytest.mark.usefixtures("store")

QUESTION = "Compute 7+5-3."
RIGHT, SLIP = "7+5=12\n12-3=9\n#### 9", "7+5=2\n2-3=9\n#### 9"
STEPS = RewardConfig(components=(AccuracyConfig(verifier="exact"), StepsConfig()))


def rollouts(*texts: str, cut: tuple[int, ...] = ()) -> Rollouts:
    return Rollouts.write([output_row("q", sample, text, cut=sample in cut) for sample, text in enumerate(texts)])


def scored(*texts: str, config: RewardConfig = STEPS, question: str = QUESTION, cut: tuple[int, ...] = ()) -> Rewards:
    return score(rollouts(*texts, cut=cut), question_table("9", question=question), config)


def steps(rewards: Rewards) -> list[Any]:
    return [(row["step_rewards"], row["step_ends"]) for row in rewards.rows()]


@pytest.mark.claim("tokens behind the last step", "4.1.3 steps")
def test_each_line_is_a_step_that_ends_with_its_newline() -> None:
    made = scored(RIGHT, SLIP)
    assert steps(made) == [([1.0, 1.0, 1.0], [6, 13, 20]), ([0.0, 0.0, 1.0], [5, 11, 18])]
    assert [row["components"] for row in made.rows()] == [
        [("accuracy", 1.0), ("steps", 1.0)],
        [("accuracy", 1.0), ("steps", pytest.approx(1 / 3))],
    ]
    assert [row["reward"] for row in made.rows()] == [1.0, 1.0], "steps have weight 0 in the outcome"
    assert made.metrics["reward/steps"] == pytest.approx(4 / 6)


def test_credit_for_consistency_pays_for_what_follows_from_an_earlier_slip() -> None:
    config = STEPS.override({"components": [{"kind": "steps", "credit": "consistent"}]})
    (labels, _), *_ = steps(scored("7+5=2\n2-3=-1\n#### 9", "7+5=11\n11-3=8\n#### 8", config=config))
    assert labels == [0.0, 0.0, 0.0]
    assert steps(scored("7+5=11\n11-3=8\n#### 8", config=config))[0][0] == [0.0, 1.0, 1.0]
    assert steps(scored("7+5=11\n11-3=8\n#### 8"))[0][0] == [0.0, 0.0, 0.0]


def test_a_weight_puts_the_share_of_right_lines_into_the_outcome() -> None:
    config = RewardConfig(components=(AccuracyConfig(verifier="exact"), StepsConfig(weight=0.3)))
    assert [row["reward"] for row in scored(SLIP, config=config).rows()] == [pytest.approx(1.1)]


@pytest.mark.claim("an output without a step")
def test_an_output_without_any_line_is_one_step_of_reward_zero() -> None:
    assert steps(scored("", "\n\n")) == [([0.0], [0]), ([0.0], [2])]


def test_a_broken_line_is_labelled_as_it_is_and_others_keep_their_labels() -> None:
    made = scored("7+5=12\n12-3", "7+5=12\n12-3=9\n#### 9", cut=(0, 1))
    assert steps(made) == [([1.0, 0.0], [6, 10]), ([1.0, 1.0, 1.0], [6, 13, 19])]
    assert [row["components"] for row in made.rows()] == [[("accuracy", 0.0), ("steps", 0.0)]] * 2
    assert {row["status"] for row in made.rows()} == {"truncated"}
    as_is = scored("7+5=12\n12-3", config=STEPS.override({"truncated": "as_is"}), cut=(0,))
    assert as_is.rows()[0]["components"][1] == ("steps", 0.5)
    assert steps(as_is) == [([1.0, 0.0], [6, 10])]


def test_an_output_taken_out_for_being_truncated_has_no_steps() -> None:
    made = scored(RIGHT, RIGHT, config=STEPS.override({"truncated": "no_reward"}), cut=(0,))
    assert steps(made)[0] == (None, None)
    assert steps(made)[1][0] == [1.0] * 3
    assert [row["reward"] for row in made.rows()] == [None, 1.0]


def test_an_answer_line_decides_the_status_where_only_steps_read_it() -> None:
    made = scored(SLIP, "7+5=12\n12-3=9\n#### 8", "7+5=12", config=RewardConfig(components=(StepsConfig(),)))
    assert [row["status"] for row in made.rows()] == ["ok", "wrong", "unparseable"]


@pytest.mark.claim("step borders from encoding text again")
@pytest.mark.parametrize("text", [RIGHT, "7加5等于12\n12减3等于9\n#### 9"])
@pytest.mark.parametrize("config", [CharacterTokenizerConfig(), BPETokenizerConfig(vocab_size=300)])
def test_the_token_that_ends_a_step_is_the_first_to_reach_behind_its_newline(text: str, config: Any) -> None:
    tokenizer = build_tokenizer([RIGHT, "7加5减等于"], config)
    ids = [*tokenizer(text)["input_ids"], 0]
    decoded = decode_outputs(tokenizer, [ids])
    labels = label_steps(QUESTION, decoded.texts[0], decoded.ends[0].tolist(), "right")
    assert labels.rewards == [1.0, 1.0, 1.0]
    assert labels.ends[-1] == len(ids) - 1
    for number, end in enumerate(labels.ends[:-1], start=1):
        assert tokenizer.decode(ids[: end + 1]).count("\n") == number
        assert tokenizer.decode(ids[:end]).count("\n") == number - 1


def test_one_token_may_end_two_steps() -> None:
    labels = label_steps("Compute 7+5.", "x\n7+5=12\n#### 12", [1, 9, 16], "right")
    assert (labels.rewards, labels.ends) == ([0.0, 1.0, 1.0], [1, 1, 2])


def test_an_output_without_tokens_has_no_place_for_a_step() -> None:
    labels = label_steps(QUESTION, "", [], "right")
    assert (labels.rewards, labels.ends, labels.answer_right) == ([], [], None)


def test_a_question_of_another_world_has_no_labels() -> None:
    with pytest.raises(DataError, match="question 'q'"):
        scored("#### 9", question="How many eggs?")


@pytest.mark.claim("DAPO: overlong punishment")
def test_length_is_punished_linearly_over_the_buffer_then_fully() -> None:
    lengths = [0, 12, 13, 14, 16, 17]
    found = [overlong_score(tokens, max_tokens=16, buffer_tokens=4) for tokens in lengths]
    assert found == [0, 0, -0.25, -0.5, -1, -1]


@pytest.mark.parametrize(("truncated", "expected"), [("as_unparseable", -1.0), ("as_is", 0.0), ("no_reward", None)])
def test_the_longest_outputs_do_not_escape_the_punishment_by_being_cut(truncated: str, expected: float | None) -> None:
    config = RewardConfig(
        components=(AccuracyConfig(verifier="exact"), OverlongConfig(max_tokens=20, buffer_tokens=4)),
        truncated=truncated,
    )
    made = scored(RIGHT, "7+5=12", config=config, cut=(0,))  # 20 tokens; 6 and the end of sequence
    assert [row["reward"] for row in made.rows()] == [expected, 0.0]


def test_what_an_environment_wrote_is_no_length() -> None:
    turns = [{"start": 0, "end": 3}, {"start": 6, "end": 7}]
    rows = [output_row("q", 0, "1234567", cut=True, turns=turns), output_row("q", 1, "1234567", cut=True, turns=None)]
    overlong = OverlongConfig(max_tokens=8, buffer_tokens=4)
    config = RewardConfig(components=(AccuracyConfig(verifier="exact"), overlong), truncated="as_is")
    made = score(Rollouts.write(rows), question_table(), config)
    assert [row["reward"] for row in made.rows()] == [0.0, -0.75]
