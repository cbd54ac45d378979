"""Reward models: made from a policy, given labels with a sample of earlier ones, trained on them (Algorithm 1, line 11)."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, Self, assert_never

import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.progress import report
from pipeline.stage import record_metrics, stage
from stages.models import (
    LABELS,
    Checkpoint,
    RewardKind,
    load_tokenizer,
    save_classifier,
    untrained_classifier,
)
from stages.reward_training.examples import (
    Example,
    PointwiseConfig,
    RewardObjectiveConfig,
    draw_updates,
    read_examples,
)
from stages.tables import RewardLabels
from stages.training.config import AdamWConfig, TrainingConfig
from stages.training.ranks import on_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_READS: Final[dict[RewardKind, Literal["sequence", "token"]]] = {"outcome": "sequence", "process": "token"}


class RewardModelConfig(Config):
    """Which kind of reward model is made."""

    kind: Literal["outcome", "process"] = "outcome"
    """`outcome`: one score for an output (sequence classifier; DeepSeekMath, 4.1.2). `process`: one for each step (token
    classifier read at step ends; 4.1.3)."""


class ReplayConfig(Config):
    """How much history joins fresh labels (DeepSeekMath, 4.1.4: "a replay mechanism that incorporates 10% of historical
    data")."""

    share: float = Field(0.1, ge=0, lt=1)
    """4.1.4: 10 %."""
    share_of: Literal["training_set", "old_pool"] = "training_set"
    """What it is a share of; the paper leaves it open. `training_set`: of the mixture, n = share / (1 - share) * fresh rows, so
    that old and new have one proportion at every iteration. `old_pool`: of the history, n = share * its rows, which grows
    from iteration to iteration."""

    @model_validator(mode="after")
    def _shares_something(self) -> Self:
        if self.share == 0 and self.share_of != "training_set":
            raise ValueError(
                f"share_of: a share of 0 is nothing of either; expected training_set, found {self.share_of}"
            )
        return self


class RewardTrainingConfig(Config):
    """How a reward model is trained. The paper gives the learning rate and no more."""

    objective: RewardObjectiveConfig = PointwiseConfig()
    """What is minimised. The paper's source, Math-Shepherd, fits labels one by one; so do we by default."""
    epochs: int = Field(1, ge=1)
    """Passes over the questions. Ours: one, since reward models overfit soon (Ouyang et al. 2022, C.2)."""
    questions_per_update: int = Field(32, ge=1)
    """Questions whose labelled outputs, all of them, make one optimizer step; so a question's pairs stay together. Ours."""
    decay: Literal["linear", "none"] = "linear"
    """The learning rate within one training: from the configured one to 0 over its updates, or constant; every training
    begins at the full rate again, where `training.schedule` counts on from one to the next. Ours: the paper gives one rate;
    on the built-in world the held-out AUC was 0.95 and 0.99 (two seeds) with decay, 0.85 (one seed) without."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens per forward and backward; bounds memory and changes no result but in its last bits. A unit that is
    learned from as a whole (with `pairs: all` the outputs of a question) may exceed it."""
    training: TrainingConfig = TrainingConfig(optimizer=AdamWConfig(learning_rate=2e-5))
    """Engine, optimizer, precision; DeepSeekMath, 4.2: 2e-5. `optimizer_state` says whether the next training of the same
    model continues with the moments of this one or begins anew."""

    @model_validator(mode="after")
    def _trained_in_full(self) -> Self:
        if self.training.adapter is not None:
            raise ValueError(
                "training.adapter: a reward model learns a new head and is trained in full; set training.adapter to null"
            )
        return self


@stage(version="1")
def create_reward_model(policy: Checkpoint, config: RewardModelConfig) -> Checkpoint:
    """Make r_phi before its training, with the policy's trunk and tokenizer, as plain transformers loads it.

    Args:
        policy: whose trunk it is. The paper takes the base model, not the instructed one (4.2).
        config: the kind.

    Raises:
        ValueError: an architecture that has no such classifier in transformers.
    """
    model = untrained_classifier(policy, reads=_READS[config.kind], label=LABELS[config.kind])
    model.config.pad_token_id = _padding(load_tokenizer(policy))
    record_metrics({"rm/parameters": model.num_parameters()})
    return save_classifier(policy, model)


def _padding(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the padding id for config.json, by which plain transformers finds the last token of a padded row.

    None where padding and end of sequence are one token: transformers then refuses to score several rows at once, instead of
    reading each one token too early. (Here nothing depends on it: the scored token is given.)
    """
    same = tokenizer.pad_token_id == tokenizer.eos_token_id
    padding: int | None = None if same else tokenizer.pad_token_id
    return padding


@stage(version="1")
def mix_with_history(
    fresh: RewardLabels, history: list[RewardLabels], config: ReplayConfig, *, seed: int
) -> RewardLabels:
    """Return all fresh labels, then n of the history.

        n = share / (1 - share) * fresh rows    or    share * history rows        (`share_of`), rounded, all there are at most

    Questions are drawn at random with all their rows of one table, the last one perhaps in part: single rows would seldom
    bring a right and a wrong output of one question, and there would be no pairs to compare.

    Args:
        fresh: labels of the current policy's outputs.
        history: the *fresh* labels of earlier iterations, oldest first; not their mixtures, which would count replayed rows
            twice.
        seed: draws the sample.

    Metrics: `rm/fresh`, `rm/replayed`, `rm/history` (rows), `rm/replayed_share` (of the mixture), and `rm/replayed_from_<i>`
    for each table of the history.

    Raises:
        ValueError: labels of another vocabulary in the history.
    """
    tables = [fresh.read(), *(part.read() for part in history)]
    _check_vocabulary(tables)
    pool = [(source, group) for source, table in enumerate(tables[1:], start=1) for group in _questions(table)]
    wanted = _wanted(config, fresh=tables[0].num_rows, old=sum(table.num_rows for table in tables[1:]))
    taken: dict[int, list[int]] = {source: [] for source in range(1, len(tables))}
    uniform = random.Random(f"replay/{seed}").random
    for source, group in sorted(pool, key=lambda _: uniform()):
        left = wanted - sum(map(len, taken.values()))
        taken[source] += group[:left]
    replayed = {source: pa.array(sorted(rows), pa.int64()) for source, rows in taken.items()}
    record_metrics(
        {
            "rm/fresh": tables[0].num_rows,
            "rm/replayed": wanted,
            "rm/replayed_share": wanted / max(wanted + tables[0].num_rows, 1),
            "rm/history": sum(table.num_rows for table in tables[1:]),
            **{f"rm/replayed_from_{source - 1}": len(rows) for source, rows in replayed.items()},
        }
    )
    return RewardLabels.write(pa.concat_tables([tables[0], *(tables[s].take(rows) for s, rows in replayed.items())]))


def _wanted(config: ReplayConfig, *, fresh: int, old: int) -> int:
    match config.share_of:
        case "training_set":
            wanted = config.share / (1 - config.share) * fresh
        case "old_pool":
            wanted = config.share * old
        case _:
            assert_never(config.share_of)
    return min(round(wanted), old)


def _questions(table: pa.Table) -> list[list[int]]:
    """Return row numbers of each question."""
    groups: dict[str, list[int]] = {}
    for row, question_id in enumerate(table["question_id"].to_pylist()):
        groups.setdefault(question_id, []).append(row)
    return list(groups.values())


def _check_vocabulary(tables: Sequence[pa.Table]) -> None:
    found = {name for table in tables for name in table["vocabulary"].to_pylist()}
    if len(found) > 1:
        raise ValueError(
            f"labels of {len(found)} vocabularies; the ids of one mean other tokens in another: replay only what policies with "
            "the current policy's tokenizer sampled"
        )


@stage(version="4")
@on_ranks
def train_reward_model(
    model: Checkpoint, labels: RewardLabels, config: RewardTrainingConfig, *, seed: int
) -> Checkpoint:
    """Train r_phi for `epochs` passes over the labels, from what `model` has learned (DeepSeekMath, 4.1.4).

    Args:
        model: from create_reward_model or from an earlier training.
        labels: outputs with the verdict of the rules; of fresh outputs only or mixed with history.
        config: objective, passes, batching, engine.
        seed: draws the order of the questions.

    Metrics: `rm/loss` (nats), `rm/train_accuracy` and `rm/grad_norm` are means over the last epoch's updates, each before its
    update: in a single epoch, of outputs not learned from before. Accuracy is the share of pairs in order, or of scores on the
    side of their label, weighted as the loss is. Further `rm/updates`, `rm/skipped_steps`, `rm/examples`, `rm/pairs` (of the
    last epoch) and `rm/learning_rate`.

    Raises:
        ValueError: before any step: an objective that does not fit the model, labels without a pair or without a difference, of
            another vocabulary, a row longer than the model's window.
    """
    from stages.reward_training.fitting import Fit
    from stages.training.hardware import live_tensors_mib, peak_memory
    from stages.training.loop import publish, resident_engine

    started = time.perf_counter()
    examples = read_examples(labels, model, config.objective)
    with config.training.arithmetic(), peak_memory() as peak:
        engine = resident_engine(model, config.training, slot="reward_trainer")
        fit, done = Fit(engine, config.objective, config.micro_batch_tokens), 0
        for epoch in range(config.epochs):
            updates = _updates(examples, config, epoch, seed)
            for _ in fit.train(updates):
                done += 1
                report("train_reward_model", done=done, total=config.epochs * len(updates))
        metrics = fit.metrics()
        checkpoint = publish(engine, given=model)
    memory = {"memory/reward_training_mb": peak.mib, "memory/tensors_mb": live_tensors_mib()}
    elapsed = {"time/reward_training": time.perf_counter() - started}
    record_metrics({**metrics, "rm/examples": len(examples), **memory, **elapsed})
    return checkpoint


def _updates(
    examples: Sequence[Example], config: RewardTrainingConfig, epoch: int, seed: int
) -> list[tuple[list[Example], float]]:
    """Return the examples of each update of an epoch, and the factor of its learning rate."""
    drawn = draw_updates(examples, config.questions_per_update, epoch=epoch, seed=seed)
    done = [(epoch + number / len(drawn)) / config.epochs for number in range(len(drawn))]
    return [(held, 1 - part if config.decay == "linear" else 1.0) for held, part in zip(drawn, done, strict=True)]
