"""Training a reward model as a stage: labels in, optimizer steps, a checkpoint out (Algorithm 1, line 11)."""

from __future__ import annotations

import time

from pipeline.progress import report
from pipeline.stage import record_metrics, stage
from stages.models import Checkpoint
from stages.reward_training.config import RewardTrainingConfig
from stages.reward_training.examples import draw_updates, read_examples
from stages.tables import RewardLabels
from stages.training.ranks import on_ranks

__all__ = ["train_reward_model"]


@stage(version="2")
@on_ranks
def train_reward_model(
    model: Checkpoint, labels: RewardLabels, config: RewardTrainingConfig, *, seed: int
) -> Checkpoint:
    """r_phi after `epochs` passes over the labels, continued from what `model` has learned (DeepSeekMath, 4.1.4).

    Args:
        model: from create_reward_model or from an earlier training.
        labels: outputs with the verdict of the rules; of fresh outputs alone or mixed with history.
        config: objective, passes, batching, engine.
        seed: draws the order of the questions.

    Metrics: `rm/loss` (nats), `rm/train_accuracy` and `rm/grad_norm` are means over the last epoch's updates, each before its
    update: in a single epoch, of outputs not learned from before. Accuracy is the share of pairs in order, or of scores on the
    side of their label, weighted as the loss is. Besides `rm/updates`, `rm/skipped_steps`, `rm/examples`, `rm/pairs` (of the
    last epoch) and `rm/learning_rate`.

    Raises:
        ValueError: before any step: an objective that does not fit the model, labels without a pair or without a difference, of
            another vocabulary, a row longer than the model's window.
    """
    from stages.reward_training.fitting import Ledger, update
    from stages.training import threads
    from stages.training.engine import publish, resident_engine
    from stages.training.memory import live_tensors_mib, peak_memory

    started = time.perf_counter()
    examples = read_examples(labels, model, config.objective)
    updates = skipped = 0
    with threads(config.training.threads), peak_memory() as peak:
        engine = resident_engine(model, config.training, slot="reward_trainer")
        for epoch in range(config.epochs):
            ledger = Ledger()
            drawn = draw_updates(examples, config.questions_per_update, epoch=epoch, seed=seed)
            for number, held in enumerate(drawn):
                done = (epoch + number / len(drawn)) / config.epochs
                update(engine, held, config, ledger, factor=1 - done if config.decay == "linear" else 1.0)
                report("train_reward_model", done=epoch * len(drawn) + number + 1, total=config.epochs * len(drawn))
            updates += len(ledger.reports)
            skipped += sum(step.skipped for step in ledger.reports)
        metrics = ledger.metrics(engine)
        checkpoint = publish(engine)
    counts = {"rm/updates": updates - skipped, "rm/skipped_steps": skipped, "rm/examples": len(examples)}
    memory = {"memory/reward_training_mb": peak.mib, "memory/tensors_mb": live_tensors_mib()}
    record_metrics({**metrics, **counts, **memory, "time/reward_training": time.perf_counter() - started})
    return checkpoint
