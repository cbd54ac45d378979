"""Scoring by reward models as a stage: outputs in, rewards out."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, assert_never

import pyarrow as pa
from pydantic import Field

from pipeline.config import UNKEYED
from pipeline.orchestration.interruption import check
from pipeline.residency import resident
from pipeline.stage import record_metrics, stage
from stages.join import KEY, align, key_at
from stages.models import Checkpoint, RewardKind, check_lengths, load_model, reward_kind, same_vocabulary
from stages.reward_metrics import RewardMetric, status_metric
from stages.tables import Rewards, Rollouts
from stages.text import step_ends
from stages.training.config import ComputeConfig, DeepSpeedEngineConfig, TorchEngineConfig
from stages.training.ranks import on_ranks

if TYPE_CHECKING:
    import torch

UNJUDGED = "unjudged"
"""Status where no rule has looked at the output."""


class ScoringConfig(ComputeConfig):
    """How a reward model's scores become rewards."""

    scale: Literal["logit", "sigmoid"] = "logit"
    """`logit`: the model's output as it is; `sigmoid`: squeezed into 0..1, a probability where the model was trained pointwise
    (Math-Shepherd's scale). The paper is silent. A group's normalisation removes level and scale, not this curvature; rewards
    that are mixed with rules belong on `sigmoid`."""
    process_score: Literal["min", "mean", "last"] = "min"
    """The score of an output that only a process model has scored, from those of its steps. `min`: Math-Shepherd's (3.4)."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens per forward; bounds memory and changes no result but in its last bits."""
    engine: Annotated[
        Annotated[TorchEngineConfig | DeepSpeedEngineConfig, Field(discriminator="kind")] | None, UNKEYED
    ] = None
    """Whose ranks share the outputs, each with the whole model; null: those of the policy update. The scores are the same."""


@stage(version="1")
@on_ranks
def score_outputs(
    outputs: Rollouts,
    policy: Checkpoint,
    models: list[Checkpoint],
    config: ScoringConfig,
    rules: Rewards | None = None,
) -> Rewards:
    """Compute r_phi of every output, in the order of `outputs` (Algorithm 1, line 8).

    An outcome model gives the `reward`; a process model gives `step_rewards`, and the reward where it is alone
    (`process_score`). Steps are lines (`step_ends`). Models read the very ids that were sampled, at the tokens named,
    and score every output, truncated ones included: their status says so. `components`: `model` (the reward), `process` (the
    process model's score of the output, where both score) and `rule`. `scorer` is the model's digest, of two models both,
    joined by `+`.

    Args:
        outputs: o_i with their ids.
        policy: who sampled them; its tokenizer must be that of the models.
        models: one, or one of each kind.
        config: scale and batching.
        rules: rewards of the same outputs by rules, which give status and extracted answer; without, the status is `unjudged`.

    Metrics: `reward/mean`, `reward/model`, `reward/process`, `reward/rule`, `reward/status_<status>`, `time/scoring`.

    Raises:
        ValueError: models of one kind or of none; a model with another tokenizer; by row: an input beyond a model's window, an
            output without a rule's reward, a score that is not finite.
    """
    started = time.perf_counter()
    chosen = _by_kind(models, policy)
    columns = ["question_id", "sample", "prompt_ids", "output_ids", "text", "text_ends"]
    table = outputs.read(columns)
    rows, verdicts = table.to_pylist(), _verdicts(table, rules)
    scored = {kind: _scores(rows, model, kind, config) for kind, model in chosen.items()}
    rewards = [
        _reward(row, verdict, {kind: scores[place] for kind, scores in scored.items()}, config)
        for place, (row, verdict) in enumerate(zip(rows, verdicts, strict=True))
    ]
    scorer = "+".join(model.digest for model in chosen.values())
    record_metrics({**_metrics(rewards), "time/scoring": time.perf_counter() - started})
    return Rewards.write([{**reward, "scorer": scorer} for reward in rewards])


def _by_kind(models: Sequence[Checkpoint], policy: Checkpoint) -> dict[RewardKind, Checkpoint]:
    kinds = [reward_kind(model) for model in models]
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(f"expected one reward model, or one of each kind, found {kinds}")
    for model in models:
        if not same_vocabulary(policy, model):
            raise ValueError(
                f"the reward {model} has another tokenizer than the policy {policy} that sampled: the same ids are other "
                "tokens to it; make the reward model from a model that shares the policy's tokenizer"
            )
    return dict(sorted(zip(kinds, models, strict=True)))  # outcome before process


def _verdicts(outputs: pa.Table, rules: Rewards | None) -> list[Mapping[str, Any]]:
    """Return status, extracted answer and reward of each output by the rules."""
    if rules is None:
        return [{"status": UNJUDGED, "extracted": None, "reward": None}] * outputs.num_rows
    found = align(
        outputs, rules.read([*KEY, "status", "extracted", "reward", "scorer"]), "rewards by rules", extra=True
    )
    for row in found["scorer"].is_valid().to_numpy().nonzero()[0]:
        raise ValueError(
            f"output {key_at(found, row)}: expected the reward of rules, found one by a model; score by rules first"
        )
    verdicts: list[Mapping[str, Any]] = found.select(["status", "extracted", "reward"]).to_pylist()
    return verdicts


def _scores(
    rows: Sequence[dict[str, Any]], model: Checkpoint, kind: RewardKind, config: ScoringConfig
) -> list[tuple[list[int], list[float]]]:
    """Return where each row was read, and its scores there on the scale asked for."""
    from stages.training import threads

    check_lengths(model, rows)
    places = [_places(row, kind) for row in rows]
    inputs = [
        _Input(tuple(row["prompt_ids"]), tuple(row["output_ids"]), tuple(read))
        for row, read in zip(rows, places, strict=True)
    ]
    with threads(config.threads):
        logits = _scores_of(model, inputs, config)
    for row, found in zip(rows, logits, strict=True):
        if not all(map(math.isfinite, found)):
            key = (row["question_id"], row["sample"])
            raise ValueError(f"reward {model}: a score of output {key} is not finite; continue from an earlier model")
    return [(read, [_scaled(logit, config) for logit in found]) for read, found in zip(places, logits, strict=True)]


class _Input(NamedTuple):
    """An output and where its scores are read; equal ones are scored once."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    places: tuple[int, ...]
    """Indices into `output_ids`."""


def _scores_of(checkpoint: Checkpoint, inputs: Sequence[_Input], config: ScoringConfig) -> list[list[float]]:
    """Compute the model's logits at the places of each input, in batches of like length; the model stays resident."""
    import torch

    from stages.training.batching import Row, micro_batches, own_share
    from stages.training.hardware import training_device
    from stages.training.loop import place_among_ranks
    from stages.training.scores import places_in, scores_at

    device, (rank, world_size) = training_device(), place_among_ranks()
    model = _resident(checkpoint, config, device)
    distinct = list(dict.fromkeys(inputs))
    # B distinct inputs, P places of the one with most.
    scores_BP = torch.zeros(len(distinct), max((len(each.places) for each in distinct), default=0), device=device)
    rows = [Row(each.prompt_ids, each.output_ids) for each in distinct]
    batches = list(micro_batches(rows, config.micro_batch_tokens, model=model))
    for batch, factor in own_share(batches, rank=rank, world_size=world_size):
        check()
        members = [distinct[row].places for row in batch.rows]
        positions_N = places_in(batch, members).to(device)
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=config.bf16):
            scores_N = scores_at(model, batch.to(device), positions_N)
        scores = torch.split(scores_N, [len(places) for places in members])
        for row, found in zip(batch.rows, scores, strict=True):
            if factor:
                scores_BP[row, : len(found)] = found
    if world_size > 1:
        torch.distributed.all_reduce(
            scores_BP
        )  # of each row one rank's scores and the others' zeros: nothing is rounded
    listed = dict(zip(distinct, scores_BP.tolist(), strict=True))
    return [listed[each][: len(each.places)] for each in inputs]


def _resident(checkpoint: Checkpoint, config: ScoringConfig, device: str) -> torch.nn.Module:
    """Load the model, frozen, its linear layers in the precision of their products; one of each kind stays in memory."""
    import torch

    from stages.training.loop import halve_linear_weights
    from stages.training.scores import score_head
    from stages.training.sharing import share_prompts

    def load() -> torch.nn.Module:
        model: torch.nn.Module = load_model(checkpoint, dtype=torch.float32, attention=config.attention_kind)
        if config.share_prompts:
            share_prompts(model)
        model.requires_grad_(False)
        if config.bf16:
            halve_linear_weights(model, spared=[score_head(model)])
        return model.to(device)

    slot = {"outcome": "reward_model", "process": "process_reward_model"}[reward_kind(checkpoint)]
    return resident(slot, (checkpoint.state, config.bf16, device, config.attention_kind, config.share_prompts), load)


def _places(row: Mapping[str, Any], kind: RewardKind) -> list[int]:
    tokens, ends = len(row["output_ids"]), row["text_ends"]
    if kind == "outcome":
        return [tokens - 1]
    if len(ends) != tokens:
        key = (row["question_id"], row["sample"])
        raise ValueError(f"output {key}: expected one of text_ends for each of {tokens} tokens, found {len(ends)}")
    return step_ends(row["text"], ends)


def _scaled(logit: float, config: ScoringConfig) -> float:
    if config.scale == "logit":
        return logit
    # Both branches are exact where the other would overflow.
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _reward(
    row: Mapping[str, Any],
    verdict: Mapping[str, Any],
    scored: Mapping[RewardKind, tuple[list[int], list[float]]],
    config: ScoringConfig,
) -> dict[str, Any]:
    ends, steps = scored.get("process", (None, None))
    process = None if steps is None else _of_steps(steps, config)
    reward = scored["outcome"][1][0] if "outcome" in scored else process
    both = {"process": process} if len(scored) > 1 else {}
    return {
        "question_id": row["question_id"],
        "sample": row["sample"],
        "reward": reward,
        "status": verdict["status"],
        "extracted": verdict["extracted"],
        "components": list({"model": reward, **both, "rule": verdict["reward"]}.items()),
        "step_rewards": steps,
        "step_ends": ends,
    }


def _of_steps(steps: Sequence[float], config: ScoringConfig) -> float:
    match config.process_score:
        case "min":
            return min(steps)
        case "mean":
            return fmean(steps)
        case "last":
            return steps[-1]
        case _:
            assert_never(config.process_score)


def _metrics(rewards: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    columns: dict[str, list[float]] = {RewardMetric.MEAN: [row["reward"] for row in rewards]}
    for row in rewards:
        for name, value in row["components"]:
            columns.setdefault(f"reward/{name}", []).extend([] if value is None else [value])
    statuses = Counter(row["status"] for row in rewards)
    shares = {status_metric(status): count / len(rewards) for status, count in statuses.items()}
    return {name: fmean(values) for name, values in columns.items() if values} | shares
