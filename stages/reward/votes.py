"""What the samples of a question vote for: wrong answers counted by meaning, as the reward's own verifier reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from pipeline.stage import record_metrics, stage
from stages.join import group_rows
from stages.reward.config import AccuracyConfig, RewardConfig
from stages.reward.functions import verifier_pool
from stages.reward.rules.accuracy import grade_answers
from stages.tables import Rewards, Votes

Pair = tuple[str, str]
_MOST_FAULTS: Final = 2
"""Deadlines missed after which an answer is compared no more; the first may be the other answer's fault."""
_MOST_OF_A_QUESTION: Final = 16
"""Deadlines missed after which no answers of a question are compared any more."""


@stage(version="3")
def count_votes(rewards: Rewards, config: RewardConfig) -> Votes:
    """Count the votes of every question's samples, for Maj@K (DeepSeekMath, Fig. 7).

    Samples of status `ok` vote for the right answer. Those of status `wrong` vote for what they answered. The distinct
    spellings of a question are compared by the verifier of the first accuracy component, under the reward's deadline, the
    most frequent first. Two are one answer where each is `ok` with the other as gold; a comparison without verdict is not
    equal. All other samples do not vote.

    `wrong` is null, and Maj@K undefined, where a wrong sample has no extracted answer, or no row has one: a reward that reads
    no answers (a function, a pattern) says that samples are wrong and not which of them agree.

    Metrics: `votes/pairs` (compared), `votes/equal`, `votes/no_verdict` (pairs that timed out or failed).
    """
    import pyarrow.compute as pc

    table = rewards.read(["question_id", "status", "extracted"])
    questions, question_N = group_rows(table["question_id"])
    wrong_N = pc.equal(table["status"], "wrong").to_numpy()
    answered_N = table["extracted"].is_valid().to_numpy()
    answers_Q: list[Counter[str]] = [Counter() for _ in questions]
    named_N = wrong_N & answered_N
    for question, answer in zip(question_N[named_N], table["extracted"].filter(named_N).to_pylist(), strict=True):
        answers_Q[question][answer] += 1
    unknown_Q = np.bincount(question_N[wrong_N & ~answered_N], minlength=len(questions)) > 0
    known = np.flatnonzero(~unknown_Q).tolist() if answered_N.any() else []
    comparison = _Comparison(config)
    merged = dict(zip(known, _merge([answers_Q[question] for question in known], comparison), strict=True))
    record_metrics({f"votes/{name}": comparison.counts[name] for name in ("pairs", "equal", "no_verdict")})
    return Votes.write(
        {
            "question_id": questions,
            "samples": np.bincount(question_N, minlength=len(questions)),
            "correct": np.bincount(question_N[pc.equal(table["status"], "ok").to_numpy()], minlength=len(questions)),
            "wrong": [
                sorted(merged[question].values(), reverse=True) if question in merged else None
                for question in range(len(questions))
            ],
        }
    )


class _Comparison:
    """Whether two answers are one, asked of the verifier once for each pair, many pairs at a time."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._verifier = next((c.verifier for c in config.components if isinstance(c, AccuracyConfig)), "exact")
        self._known: dict[Pair, bool | None] = {}
        self.counts: Counter[str] = Counter()

    def __call__(self, pairs: Sequence[Pair]) -> list[bool | None]:
        """Return for each pair whether both are one answer; None where that took too long."""
        forward = self._ask(pairs)
        equal = [pair for pair, same in zip(pairs, forward, strict=True) if same]
        back = dict(zip(equal, self._ask([(answer, gold) for gold, answer in equal]), strict=True))
        return [back.get(pair, same) for pair, same in zip(pairs, forward, strict=True)]

    def _ask(self, pairs: Sequence[Pair]) -> list[bool | None]:
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        if new:
            grades = grade_answers(
                [(gold, rf"\boxed{{{answer}}}") for gold, answer in new],
                conventions=("boxed",),
                # Its search is for answers in prose; these are answers already.
                verifier="exact" if self._verifier == "exact" else "math_verify",
                pool=verifier_pool(self._config),
                deadline_s=self._config.deadline_s,
            )
            for pair, grade in zip(new, grades, strict=True):
                self._known[pair] = None if grade.status == "timeout" else grade.status == "ok"
            silent = sum(grade.score is None for grade in grades)
            self.counts.update(pairs=len(new), equal=sum(grade.status == "ok" for grade in grades), no_verdict=silent)
        return [self._known[pair] for pair in pairs]


def _merge(
    questions: Sequence[Counter[str]], compare: Callable[[Sequence[Pair]], list[bool | None]]
) -> list[Counter[str]]:
    """Return the counts of every question with equal answers merged under their most frequent spelling.

    In each round every question compares its most frequent answer that is left with the rest of them; all questions share one
    call of the verifier.
    """
    merged: list[Counter[str]] = [Counter() for _ in questions]
    faults: list[Counter[str]] = [Counter() for _ in questions]
    left = [_by_frequency(counts) for counts in questions]
    while any(left):
        pairs = [
            [(answers[0], other) for other in answers[1:] if _may_be_equal(answers[0], other, faulty)]
            for answers, faulty in zip(left, faults, strict=True)
        ]
        verdicts = iter(compare([pair for group in pairs for pair in group]))
        for place, group in enumerate(pairs):
            found = {other: next(verdicts) for _, other in group}
            same = [answer for answer in left[place] if answer == left[place][0] or found.get(answer)]
            if same:
                merged[place][same[0]] = sum(questions[place][answer] for answer in same)
            faults[place].update(_faulty(left[place][0], found) if found else ())
            left[place] = [answer for answer in left[place] if answer not in same]
    return merged


def _by_frequency(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda answer: (-counts[answer], answer))


def _faulty(answer: str, found: Mapping[str, bool | None]) -> list[str]:
    """Return whose fault each missed deadline was: that of `answer` where it missed all of several, else the other's."""
    silent = [other for other, verdict in found.items() if verdict is None]
    return [answer] * len(silent) if len(silent) == len(found) > 1 else silent


def _may_be_equal(answer: str, other: str, faults: Counter[str]) -> bool:
    """Return whether the two are compared: not where one is blank, or where deadlines were missed."""
    patient = max(faults[answer], faults[other]) < _MOST_FAULTS and faults.total() < _MOST_OF_A_QUESTION
    return patient and bool(answer.strip() and other.strip())
