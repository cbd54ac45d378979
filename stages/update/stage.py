"""The policy update as a stage: tables in, mu passes of optimizer steps, a checkpoint out."""

from __future__ import annotations

import time

from pipeline.progress import report
from pipeline.stage import record_metrics, stage
from stages.models import Checkpoint
from stages.tables import Advantages, Rollouts
from stages.update.config import UpdateConfig
from stages.update.examples import deal, join, merge_equal

__all__ = ["update_policy"]


@stage(version="1")
def update_policy(
    policy: Checkpoint,
    reference: Checkpoint,
    outputs: Rollouts,
    advantages: Advantages,
    config: UpdateConfig,
    *,
    seed: int,
) -> Checkpoint:
    """pi_theta after mu passes over one exploration stage (Algorithm 1, line 10).

    Args:
        policy: pi_old, the policy that sampled `outputs`.
        reference: pi_ref; not loaded where beta is 0.
        outputs: o_i with their ids; the temperature they were sampled at scales the logits of all three policies.
        advantages: A-hat_{i,t}, joined by key; rows without advantages take no part and do not count in 1/G.
        config: objective, passes, batching, engine.
        seed: deals the questions to mini-batches where there are several.

    Raises:
        ValueError: outputs of several temperatures or greedy ones (drawn from no distribution), or all rows masked out.
    """
    from stages.training import threads
    from stages.training.engine import publish, resident_engine
    from stages.update.steps import Ledger, MiniBatch, optimizer_step, reference_model

    started = time.perf_counter()
    temperature = _temperature(outputs)
    examples = join(outputs, advantages)
    if config.merge_equal_outputs:
        examples = merge_equal(examples)
    hands = deal(examples, mini_batches=config.mini_batches, seed=seed)
    with threads(config.training.threads):
        engine = resident_engine(policy, config.training)
        mini_batches = [MiniBatch.of(hand, engine, temperature, config) for hand in hands]
        for mini_batch in mini_batches:
            if config.objective.beta > 0:
                mini_batch.ref_logp = mini_batch.logprobs(reference_model(reference, engine, config.training), engine)
            # A single step has pi_old = pi_theta: its own forward, detached, makes the ratio exactly 1.
            if config.mu * config.mini_batches > 1:
                mini_batch.old_logp = mini_batch.logprobs(engine.model, engine)
        ledger = Ledger()
        for number in range(config.mu * config.mini_batches):
            optimizer_step(engine, mini_batches[number % config.mini_batches], config.objective, ledger)
            report("update_policy", done=number + 1, total=config.mu * config.mini_batches)
        checkpoint = publish(engine)
    computed = sum(len(batch.rows) for mini_batch in mini_batches for batch in mini_batch.batches)
    seconds = time.perf_counter() - started
    record_metrics(ledger.metrics(beta=config.objective.beta, seconds=seconds, computed=computed))
    return checkpoint


def _temperature(outputs: Rollouts) -> float:
    import pyarrow.compute as pc

    found: list[float] = pc.unique(outputs.read().column("temperature")).to_pylist()
    if len(found) != 1:
        raise ValueError(f"update_policy: expected outputs of one temperature, found {found}")
    if found[0] == 0:
        raise ValueError("update_policy: greedy outputs come from no distribution; sample with temperature above 0")
    return found[0]
