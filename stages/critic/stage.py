"""The critic's stages: made from a policy, asked for values, fitted to returns (DeepSeekMath, 4.1.1)."""

from __future__ import annotations

import time
import warnings
from typing import Self

from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.progress import report
from pipeline.stage import record_metrics, stage
from stages.join import with_scores
from stages.models import Checkpoint, save_classifier, untrained_classifier
from stages.tables import Advantages, Rollouts, Values
from stages.training.batching import deal, rows_of
from stages.training.config import AdamWConfig, TrainingConfig
from stages.training.ranks import on_ranks


class CriticConfig(Config):
    """How the value function is trained. The paper says no more than that PPO has one, and that it is costly (4.1.1)."""

    mu: int = Field(1, ge=1)
    """Passes over the outputs. Ours: as many as the policy makes (DeepSeekMath, 4.2)."""
    mini_batches: int = Field(1, ge=1)
    """Optimizer steps per pass: the policy's mini-batches, of the same questions; a run refuses another number than the
    policy's."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens per forward and backward; bounds memory and changes no result but in its last bits."""
    training: TrainingConfig = TrainingConfig(optimizer=AdamWConfig(learning_rate=1e-5))
    """Engine, optimizer, precision, learning rate. The paper gives none; 1e-5, ten times the policy's, is verl's."""

    @model_validator(mode="after")
    def _trained_in_full(self) -> Self:
        if self.training.adapter is not None:
            raise ValueError(
                "training.adapter: a critic learns a new head and is trained in full; set training.adapter to null"
            )
        return self


@stage(version="1")
def create_critic(policy: Checkpoint, config: CriticConfig) -> Checkpoint:
    """Make V with the policy's trunk and tokenizer; a token classifier of one label, as plain transformers loads it.

    V = 0 before the first update: advantages then are those without a baseline, instead of those with a random one.

    Args:
        policy: whose trunk it is; its output head (tied to the embeddings or not) stays behind.
        config: of its training. Nothing here depends on it; every critic stage takes the same two.

    Raises:
        ValueError: an architecture that has no token classifier in transformers.
    """
    critic = untrained_classifier(policy, reads="token", label="value")
    record_metrics({"critic/parameters": critic.num_parameters()})
    return save_classifier(policy, critic)


@stage(version="1")
@on_ranks
def estimate_values(critic: Checkpoint, outputs: Rollouts, config: CriticConfig) -> Values:
    """Compute V(q, o_<t), the value before every output token, in the order of `outputs`.

    Raises:
        ValueError: a value that is not finite, by its row.
    """
    from torch import Tensor

    from stages.critic.fitting import values_before
    from stages.training.batching import Batch
    from stages.training.loop import resident_engine, score_rows

    started = time.perf_counter()
    keys, rows = rows_of(outputs)
    with config.training.arithmetic():
        engine = resident_engine(critic, config.training, slot="critic")

        def score(batch: Batch) -> Tensor:
            with engine.autocast():
                return values_before(engine.model, batch.to(engine.device))

        value = score_rows(rows, config.micro_batch_tokens, engine.model, score, engine)
    unsound = f"a {{name}} of critic {critic} is not finite; continue from an earlier critic"
    valued = with_scores(keys, unsound, value=value)
    record_metrics({"time/values": time.perf_counter() - started})
    return Values.write(valued)


@stage(version="5")
@on_ranks
def update_critic(
    critic: Checkpoint, outputs: Rollouts, advantages: Advantages, config: CriticConfig, *, seed: int
) -> Checkpoint:
    """Make mu passes over one exploration stage, each step of them (one for a mini-batch) down the gradient of

        (1/outputs) sum_i (1/|o_i|) sum_t 1/2 (V(q, o_i,<t) - return_i,t)^2

    over the tokens that the policy wrote, averaged as its objective is (DeepSeekMath, Eq. 3). The paper has no formula for the
    critic; Schulman et al. (arXiv 1506.02438, Eq. 28) fit it by least squares too. Values are not clipped around the old ones:
    that is an extra of PPO implementations, in neither paper. Where every row is masked out the critic stays as it is, with a
    warning.

    Args:
        critic: V that the advantages were estimated with.
        advantages: their `returns`, joined by key; rows without advantages take no part and do not count in the mean.
        seed: deals the questions to mini-batches where there are several, as in the policy's update.

    Raises:
        ValueError: returns that are missing, of another number than tokens or not finite, by row, before any step.
    """
    from stages.critic.fitting import Fit, join
    from stages.training.hardware import live_tensors_mib, peak_memory
    from stages.training.loop import publish, resident_engine

    started = time.perf_counter()
    examples = join(outputs, advantages)
    if not examples:
        warnings.warn("update_critic: every output of a step is masked out; the critic stays as it is", stacklevel=2)
        record_metrics(
            {"critic/skipped_steps": config.mu * config.mini_batches, "time/critic": time.perf_counter() - started}
        )
        return critic
    hands = deal(examples, mini_batches=config.mini_batches, seed=seed)
    with config.training.arithmetic(), peak_memory() as peak:
        engine = resident_engine(critic, config.training, slot="critic")
        fit = Fit(hands, engine, config.micro_batch_tokens)
        steps = config.mu * len(fit.mini_batches)
        for done, _ in enumerate(fit.train(config.mu), start=1):
            report("update_critic", done=done, total=steps)
        metrics = fit.metrics(idle=config.mu * config.mini_batches - steps)
        checkpoint = publish(engine, given=critic)
    seconds = time.perf_counter() - started
    # Under ZeRO 3 a parameter between its uses is an empty placeholder that knows its size.
    parameters = sum(getattr(each, "ds_numel", each.numel()) for each in engine.model.parameters())
    held = {"critic/parameters": parameters, "memory/critic_mb": peak.mib, "memory/tensors_mb": live_tensors_mib()}
    record_metrics({**metrics, **held, "time/critic": seconds})
    return checkpoint
