"""The policy update as a stage: tables in, mu passes of optimizer steps, a checkpoint out."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from pipeline.progress import report
from pipeline.stage import record_metrics, stage
from stages.join import KEY, Ragged, align, per_token, written_by_policy, written_rows
from stages.models import Checkpoint
from stages.tables import Advantages, ReferenceLogprobs, Rollouts
from stages.training.batching import deal
from stages.training.ranks import on_ranks
from stages.update.config import UpdateConfig
from stages.update.objectives import method_of

if TYPE_CHECKING:
    from torch import Tensor

    from stages.training.engine import Engine
    from stages.update.loss import Example, MicroBatch, MiniBatch, Terms
    from stages.update.objectives import Method

_RECORDS: Final = "rollout log-probabilities"
_REFERENCE: Final = "reference log-probabilities"


@stage(version="6")
@on_ranks
def update_policy(
    policy: Checkpoint,
    reference: Checkpoint | ReferenceLogprobs,
    outputs: Rollouts,
    advantages: Advantages,
    config: UpdateConfig,
    *,
    seed: int,
) -> Checkpoint:
    """Return pi_theta after mu passes over one exploration stage (Algorithm 1, line 10).

    Where every row is masked out (no question has a right and a wrong output, say) the policy stays as it is, with a warning;
    the step counts among `policy/skipped_steps`.

    Args:
        policy: pi_theta before the update; pi_old, the policy that sampled `outputs`, unless `old_logprobs` says otherwise.
        reference: pi_ref, or its log-probabilities of `outputs` (`score_reference`). No second model is loaded for these,
            where the objective has no use for it, or where pi_ref is `policy`, whose own log-probabilities serve.
        outputs: o_i with their ids; the temperature they were sampled at scales the logits of all policies.
        advantages: A-hat_{i,t}, joined by key; rows without advantages take no part and do not count in 1/G.
        seed: deals the questions to mini-batches where there are several.

    Raises:
        ValueError: before any step, naming the row: outputs of several temperatures, of another than configured, or greedy
            ones; rows without a counterpart; numbers that are not finite.
        MismatchError: before the step, where `config.mismatch` has limits and the engine's log-probabilities are beyond them.
    """
    from stages.training.forward import sampling_temperature
    from stages.training.hardware import live_tensors_mib, peak_memory
    from stages.training.loop import publish, resident_engine, train
    from stages.training.optimizers import trained_values
    from stages.update.loss import policy_loss
    from stages.update.metrics import Mismatch, UpdateMetrics

    started = time.perf_counter()
    temperature = sampling_temperature(outputs, config.temperature)
    method, metrics = method_of(config.objective), UpdateMetrics(mismatch=Mismatch(config.mismatch))
    examples = _examples(outputs, advantages, reference, config, method)
    if not examples:
        warnings.warn("update_policy: every output of a step is masked out; the policy stays as it is", stacklevel=2)
    hands = deal(examples, mini_batches=config.mini_batches, seed=seed)
    with config.training.arithmetic(), peak_memory() as peak:
        engine = resident_engine(policy, config.training)
        mini_batches = _mini_batches(hands, engine, policy, reference, temperature, config)
        steps = ((mini_batch.parts, 1.0) for _ in range(config.mu) for mini_batch in mini_batches)

        def account(part: MicroBatch, terms: Terms, entropy_BO: Tensor | None, value: float) -> None:
            metrics.add(part, terms, entropy_BO, value)
            if config.mu > 1 and part.old_logp is None:
                mini_batches[0].keep_policy(part, terms.old_logp_BO)

        loss = policy_loss(engine, temperature, method, config.correction, account)
        for step in train(engine, steps, loss, before_step=lambda: metrics.mismatch.check(engine)):
            metrics.stepped(step)
            report("update_policy", done=metrics.steps, total=config.mu * config.mini_batches)
        metrics.all_reduce(engine)
        parts = [part for mini_batch in mini_batches for part in mini_batch.parts]
        computed = int(engine.total(sum(len(part.batch.rows) for part in parts if part.counts)))
        mismatch = metrics.mismatch.figures(engine)
        checkpoint = publish(engine, given=policy)
    seconds = time.perf_counter() - started
    record_metrics(metrics.metrics(beta=method.beta, seconds=seconds, computed=computed) | mismatch)
    record_metrics({"memory/update_mb": peak.mib, "memory/tensors_mb": live_tensors_mib()})
    record_metrics({"policy/trained_parameters": trained_values(engine.model)})
    return checkpoint


def _examples(
    outputs: Rollouts,
    advantages: Advantages,
    reference: Checkpoint | ReferenceLogprobs,
    config: UpdateConfig,
    method: Method,
) -> list[Example]:
    examples = join(
        outputs,
        advantages,
        with_logprobs=config.reads_rollout_logprobs,
        with_records=config.measures_mismatch,
        reference=reference if method.needs_reference and isinstance(reference, ReferenceLogprobs) else None,
    )
    if method.pairs:
        return pair_up(examples)
    return merge_equal(examples) if config.merge_equal_outputs else examples


def _mini_batches(
    hands: list[list[Example]],
    engine: Engine,
    policy: Checkpoint,
    reference: Checkpoint | ReferenceLogprobs,
    temperature: float,
    config: UpdateConfig,
) -> list[MiniBatch]:
    """Return mini-batches with the log-probabilities of every policy that stays fixed while they are learned from.

    The first step is made by pi_old itself: its own forward, detached, makes the ratio exactly 1, and none is needed before it.
    Where pi_ref is pi_old (an iteration's first step), one forward serves both.
    """
    from stages.training.loop import reference_for_pass
    from stages.update.loss import MiniBatch

    method = method_of(config.objective)
    made = [MiniBatch.of(hand, engine, temperature, config, method) for hand in hands]
    single = config.mu * config.mini_batches == 1
    frozen = reference if method.needs_reference and isinstance(reference, Checkpoint) else None
    alike = frozen is not None and frozen.state == policy.state
    for number, mini_batch in enumerate(made):
        if frozen is not None and not alike:
            with reference_for_pass(frozen, config.training, engine.device, place=engine.device) as model:
                mini_batch.compare_with(model, engine)
        if config.old_logprobs == "rollout":
            mini_batch.trust_rollout()
        if single or (number == 0 and config.old_logprobs == "trainer"):
            if alike:
                mini_batch.take_policy_as_reference()
        elif config.old_logprobs == "trainer":
            mini_batch.remember_policy(engine, as_reference=alike)
        elif alike:
            mini_batch.compare_with(engine.model, engine)
    return made


def join(
    outputs: Rollouts,
    advantages: Advantages,
    *,
    with_logprobs: bool = False,
    with_records: bool = False,
    reference: ReferenceLogprobs | None = None,
) -> list[Example]:
    """One example per output that has advantages; rows masked out (null advantage) take no part.

    Args:
        with_logprobs: the loss reads the rollout engine's log-probabilities: every row must have them.
        with_records: they are measured, in the rows that have them.
        reference: log pi_ref of these outputs.

    Raises:
        ValueError: names the row: an output without advantages or advantages without an output, another number of them than
            tokens, or one that is not finite (log-probabilities too, where they are read).
    """
    from stages.update.loss import Example

    read = with_logprobs or with_records
    table = outputs.read([*KEY, "prompt_ids", "output_ids", "turns", *(["logprobs"] if read else [])])
    found = align(table, advantages.read([*KEY, "advantage", "pair"]), "advantages")
    kept = found["advantage"].is_valid()
    table, found = table.filter(kept), found.filter(kept)
    output = Ragged.of(table["output_ids"])
    written_M = written_by_policy(table)
    columns: dict[str, Iterable[Any]] = {
        "question_id": table["question_id"].to_pylist(),
        "prompt_ids": _tuples(Ragged.of(table["prompt_ids"])),
        "output_ids": _tuples(output),
        "written": written_rows(table),
        "advantage": _tuples(per_token(found, "advantage", output.lengths, "advantages")),
        "weight": itertools.repeat(1.0, len(output)),
        "pair": found["pair"].to_pylist(),
    }
    if read:
        logprobs = per_token(table, "logprobs", output.lengths, _RECORDS, masked=not with_logprobs, written_M=written_M)
        rows = _tuples(logprobs)
        if with_logprobs:
            columns["rollout_logp"] = rows
        if with_records:
            columns["recorded"] = [() if null else (row,) for row, null in zip(rows, logprobs.null, strict=True)]
    if reference is not None:
        frozen = align(table, reference.read(), _REFERENCE, extra=True)
        columns["ref_logp"] = _tuples(per_token(frozen, "reference", output.lengths, _REFERENCE))
    return [Example(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def _tuples(column: Ragged) -> list[tuple[Any, ...]]:
    """The values of each row, so that equal rows can be found."""
    return [tuple(values.tolist()) for values in column]


def merge_equal(examples: Sequence[Example]) -> list[Example]:
    """Merge equal outputs of one question that have equal advantages; weights add up, the first one's place stays."""
    equal: dict[Example, list[Example]] = {}
    for example in examples:
        equal.setdefault(example, []).append(example)
    return [
        dataclasses.replace(
            example,
            weight=math.fsum(member.weight for member in members),
            recorded=tuple(logprobs for member in members for logprobs in member.recorded),
        )
        for example, members in equal.items()
    ]


def pair_up(examples: Sequence[Example]) -> list[Example]:
    """Examples as preferred, other, preferred, other, ...: the two of a pair side by side.

    Raises:
        ValueError: an example without a pair, or a pair that is not one preferred (advantage +1) and one other output (-1).
    """
    pairs: dict[int, list[Example]] = {}
    for example in examples:
        if example.pair is None:
            raise ValueError(
                f"an output of question {example.question_id!r} belongs to no pair; this objective learns from preferences: "
                "set advantage.kind=pairs"
            )
        pairs.setdefault(example.pair, []).append(example)
    ordered = []
    for number, members in pairs.items():
        members.sort(key=lambda example: -max(example.advantage))
        if [_values_of_policy(member) for member in members] != [{1.0}, {-1.0}]:
            raise ValueError(
                f"pair {number}: expected one output with advantage 1 and one with -1, found {len(members)}"
            )
        ordered += members
    return ordered


def _values_of_policy(example: Example) -> set[float]:
    """Return the distinct advantages of the tokens that the policy wrote."""
    if example.written is None:
        return set(example.advantage)
    return {value for value, own in zip(example.advantage, example.written, strict=True) if own}
