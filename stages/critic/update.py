"""The critic's update as a stage: returns in, mu optimizer steps of least squares, a checkpoint out."""

from __future__ import annotations

import time
import warnings

from pipeline.progress import report
from pipeline.stage import record_metrics, stage
from stages.critic.config import CriticConfig
from stages.critic.examples import join
from stages.epochs import deal
from stages.models import Checkpoint
from stages.tables import Advantages, Rollouts
from stages.training.ranks import on_ranks

__all__ = ["update_critic"]


@stage(version="2")
@on_ranks
def update_critic(
    critic: Checkpoint, outputs: Rollouts, advantages: Advantages, config: CriticConfig, *, seed: int
) -> Checkpoint:
    """V after mu passes over one exploration stage, each step of them (one for a mini-batch) down the gradient of

        (1/outputs) sum_i (1/|o_i|) sum_t 1/2 (V(q, o_i,<t) - return_i,t)^2

    averaged as the policy's objective is (DeepSeekMath, Eq. 3). The paper has no formula for the critic; Schulman et al.
    (arXiv 1506.02438, Eq. 28) fit it by least squares too. Values are not clipped around the old ones: that is an extra of
    PPO implementations, in neither paper.

    Args:
        critic: V that the advantages were estimated with.
        outputs: o_i with their ids.
        advantages: their `returns`, joined by key; rows without advantages take no part and do not count in the mean.
        config: passes, batching, engine.
        seed: deals the questions to mini-batches where there are several, as in the policy's update.

    Raises:
        ValueError: returns that are missing, of another number than tokens or not finite, by row, before any step.

    Where every row is masked out the critic stays as it is, with a warning, as the policy does.
    """
    from stages.critic.fitting import Fit
    from stages.training import threads
    from stages.training.engine import publish, resident_engine
    from stages.training.memory import live_tensors_mib, peak_memory

    started = time.perf_counter()
    examples = join(outputs, advantages)
    if not examples:
        warnings.warn("update_critic: every output of a step is masked out; the critic stays as it is", stacklevel=2)
        record_metrics(
            {"critic/skipped_steps": config.mu * config.mini_batches, "time/critic": time.perf_counter() - started}
        )
        return critic
    hands = deal(examples, mini_batches=config.mini_batches, seed=seed)
    with threads(config.training.threads), peak_memory() as peak:
        engine = resident_engine(critic, config.training, slot="critic")
        fit = Fit.of(hands, engine, config.micro_batch_tokens)
        steps = config.mu * len(fit.mini_batches)
        for number in range(steps):
            fit.step(engine)
            report("update_critic", done=number + 1, total=steps)
        metrics = fit.metrics(engine, idle=config.mu * config.mini_batches - steps)
        checkpoint = publish(engine)
    seconds = time.perf_counter() - started
    # Under ZeRO 3 a parameter between its uses is an empty stand-in that knows its size.
    parameters = sum(getattr(each, "ds_numel", each.numel()) for each in engine.model.parameters())
    held = {"critic/parameters": parameters, "memory/critic_mb": peak.mib, "memory/tensors_mb": live_tensors_mib()}
    record_metrics({**metrics, **held, "time/critic": seconds})
    return checkpoint
