"""Advantages and objectives as their papers write them, output by output and in float64: what the trainer is compared with.

Nothing of `stages/kernels` or `stages/advantage` is used here. Legend: an output is a row; T its tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Values = list[float]


@dataclass(frozen=True)
class Output:
    """An output with all that is known of it."""

    question: str
    sample: int
    prompt: list[int]
    ids: list[int]
    reward: float | None
    cut: bool
    steps: list[tuple[float, int]]
    """Reward and last token of each step."""
    k1: Values
    """log pi - log pi_ref, for the penalty inside the reward; or log pi - log pi_teacher."""
    value: Values
    """The critic's."""
    rollout: Values
    """log pi of the rollout engine."""

    @property
    def right(self) -> bool:
        return self.reward == 1.0


# ------------------------------------------------------------------------------------------------ advantages


def advantages(outputs: Sequence[Output], config: Any) -> list[Values | None]:
    """A-hat of every token; None for an output that takes no part."""
    match config.kind:
        case "one":
            return [[1.0] * len(each.ids) for each in outputs]
        case "correct":
            return [None if each.reward is None else [float(each.right)] * len(each.ids) for each in outputs]
        case "teacher":
            return [[-k1 for k1 in each.k1] for each in outputs]
        case "pairs":
            return [
                [sign] * len(each.ids) if sign else None
                for each, (sign, _) in zip(outputs, pairs(outputs), strict=True)
            ]
        case "group":
            return _group(outputs, config)
        case "batch":
            return _batch(outputs, config)
        case _:
            return _gae(outputs, config)


def pairs(outputs: Sequence[Output]) -> list[tuple[float, int | None]]:
    """+1, -1 or 0, and the number of the pair: the i-th right output of a question with its i-th wrong one."""
    found: dict[tuple[str, int], tuple[float, int]] = {}
    number = 0
    for question in dict.fromkeys(each.question for each in outputs):
        group = [each for each in outputs if each.question == question and each.reward is not None]
        for better, worse in zip([e for e in group if e.right], [e for e in group if not e.right], strict=False):
            found |= {(question, better.sample): (1.0, number), (question, worse.sample): (-1.0, number)}
            number += 1
    return [found.get((each.question, each.sample), (0.0, None)) for each in outputs]


def _compare(values: Values, config: Any) -> tuple[list[float], bool]:
    """Every value compared with all of them, and whether they are equal."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2 or max(values) == min(values):
        return [0.0] * count, True
    if config.baseline == "leave_one_out":
        return [value - (sum(values) - value) / (count - 1) for value in values], False
    if config.scale == "none":
        return [value - mean for value in values], False
    std = statistics.stdev(values) if config.ddof else statistics.pstdev(values)
    return [(value - mean) / (std + config.eps) for value in values], False


def _group(outputs: Sequence[Output], config: Any) -> list[Values | None]:
    found: dict[tuple[str, int], Values | None] = {}
    for question in dict.fromkeys(each.question for each in outputs):
        group = [each for each in outputs if each.question == question]
        scored = [each for each in group if each.reward is not None]
        if config.supervision == "process":
            compared, equal = _compare([reward for each in scored for reward, _ in each.steps], config)
            rest = iter(compared)
            for each in scored:
                ends = [(next(rest), end) for _, end in each.steps]
                found[question, each.sample] = [
                    sum(step for step, end in ends if end >= token) for token in range(len(each.ids))
                ]
        else:
            rewards = [(each.reward or 0.0) - config.kl_in_reward * sum(each.k1) for each in scored]
            compared, equal = _compare(rewards, config)
            for each, advantage in zip(scored, compared, strict=True):
                found[question, each.sample] = [advantage] * len(each.ids)
        for each in group:
            if (config.degenerate == "mask" and equal) or (config.truncated == "mask" and each.cut):
                found[question, each.sample] = None
    return [found.get((each.question, each.sample)) for each in outputs]


def _batch(outputs: Sequence[Output], config: Any) -> list[Values | None]:
    returns: dict[int, Values] = {}
    for place, each in enumerate(outputs):
        if each.reward is None:
            continue
        group = [other.reward for other in outputs if other.question == each.question and other.reward is not None]
        reward = each.reward - (statistics.fmean(group) if config.baseline == "group_mean" else 0.0)
        returns[place] = [reward - config.kl_in_reward * sum(each.k1[token:]) for token in range(len(each.ids))]
    return _whitened(returns, len(outputs))


def _whitened(values: dict[int, Values], count: int) -> list[Values | None]:
    every = [value for row in values.values() for value in row]
    mean, std = statistics.fmean(every), statistics.pstdev(every)
    return [[(value - mean) / std for value in values[row]] if row in values else None for row in range(count)]


def _gae(outputs: Sequence[Output], config: Any) -> list[Values | None]:
    found: dict[int, Values] = {}
    for place, each in enumerate(outputs):
        if each.reward is None:
            continue
        length = len(each.ids)
        rewards = [-config.kl_in_reward * k1 for k1 in each.k1]
        rewards[-1] += each.reward
        after = [*each.value[1:], 0.0]
        errors = [rewards[t] + config.gamma * after[t] - each.value[t] for t in range(length)]
        decay = config.gamma * config.lam
        found[place] = [sum(decay ** (s - t) * errors[s] for s in range(t, length)) for t in range(length)]
    if config.whiten == "batch":
        return _whitened(found, len(outputs))
    return [found.get(place) for place in range(len(outputs))]


# ------------------------------------------------------------------------------------------------ objectives


@dataclass(frozen=True)
class Known:
    """Log-probabilities and advantages of an output that is learned from; [T] each."""

    logp: Tensor
    old: Tensor
    ref: Tensor
    rollout: Tensor
    advantage: Tensor
    pair: int | None


def objective(known: Sequence[Known], config: Any, correction: Any) -> Tensor:
    """J of these outputs: what is maximised."""
    kind, G = config.kind, len(known)
    if kind == "dpo":
        return _dpo(known, config)
    tokens = sum(len(each.logp) for each in known)
    total = torch.zeros((), dtype=torch.float64)
    for each in known:
        value_T = _corrected(_surrogate(each, config), each, correction) - _kl(each, config)
        match getattr(config, "aggregation", _MEANS.get(kind, "sequence_mean")):
            case "sequence_mean":
                total = total + value_T.mean() / G
            case "token_mean":
                total = total + value_T.sum() / tokens
            case _:
                total = total + value_T.sum() / (G * (1 if kind == "rloo" else config.length))
    return total


_MEANS = {
    "dapo": "token_mean",
    "cispo": "token_mean",
    "reinforce_plus_plus": "token_mean",
    "distillation": "token_mean",
    "dr_grpo": "constant",
    "rloo": "constant",
}


def _surrogate(each: Known, config: Any) -> Tensor:
    A, log_ratio = each.advantage, each.logp - each.old
    ratio = log_ratio.exp()
    match config.kind:
        case "sft" | "rft" | "online_rft" | "rloo":
            return A * each.logp
        case "cispo":
            return torch.clamp(ratio, max=1 + config.eps_high).detach() * A * each.logp
        case "gspo" if bool((A[0] == A).all()):  # Eq. 5 and 7
            ratio = log_ratio.mean().exp().expand_as(A)
        case "gspo":  # Eq. 14
            ratio = log_ratio.mean().exp().detach() * each.logp.exp() / each.logp.detach().exp()
    low, high = getattr(config, "eps_low", None), getattr(config, "eps_high", None)
    low, high = (config.eps, config.eps) if low is None or high is None else (low, high)
    return torch.min(ratio * A, ratio.clip(1 - low, 1 + high) * A)


def _corrected(value_T: Tensor, each: Known, correction: Any) -> Tensor:
    if correction.kind == "none":
        return value_T
    weight = each.old - each.rollout
    if correction.level != "token":
        weight = weight.sum() if correction.level == "sequence" else weight.mean()
    return weight.exp().clip(max=correction.cap).detach() * value_T


def _kl(each: Known, config: Any) -> Tensor:
    if config.kind != "grpo" or config.beta == 0:
        return torch.zeros_like(each.logp)
    d = each.ref - each.logp
    k3 = d.exp() - 1 - d
    ratio = (each.logp - each.old).exp()
    return config.beta * {"k2": d**2 / 2, "k3": k3, "k3_unbiased": ratio * k3}[config.divergence]  # type: ignore[no-any-return]


def _dpo(known: Sequence[Known], config: Any) -> Tensor:
    margins: dict[int | None, Tensor] = {}
    for each in known:
        ratio_T = each.logp - each.ref
        m = ratio_T.mean() if config.length_normalised else ratio_T.sum()
        margins[each.pair] = margins.get(each.pair, torch.zeros(())) + each.advantage[0] * m
    losses = [-torch.log1p(torch.exp(-config.beta * margin)) for margin in margins.values()]
    return torch.stack(losses).mean()


def finite(values: Values) -> bool:
    """Whether all are numbers."""
    return all(map(math.isfinite, values))
