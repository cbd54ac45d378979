"""Stages on two ranks end where one rank does, under every ZeRO stage, and whatever becomes of a rank."""

from __future__ import annotations

import functools
import itertools
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import ConfigError
from pipeline.derivation.materialise import materialise
from pipeline.progress import listen
from pipeline.residency import evict
from pipeline.store import Store, use_store
from pipeline.store.context import writing_payloads
from pipeline.workers.group import WorkerError
from stages.critic import CriticConfig, estimate_values, update_critic
from stages.logprobs import LogprobsConfig, compare_policies, score_reference
from stages.models import (
    Checkpoint,
    RewardKind,
    code_files,
    load_model,
    load_tokenizer,
    load_trainer_state,
    model_weights,
    plain_folder,
    trust,
)
from stages.models.trusted_code import code_digest
from stages.reward_model import ScoringConfig, score_outputs
from stages.reward_training import BradleyTerryConfig, PointwiseConfig, RewardTrainingConfig, train_reward_model
from stages.sft import SFTConfig, supervised_finetuning
from stages.tables import Rollouts
from stages.text import PromptConfig
from stages.training import DeepSpeedEngineConfig, LoRAConfig, TorchEngineConfig
from stages.training.ranks import ADDRESS
from stages.update import GRPOConfig, UpdateConfig, update_policy
from tests.stages.critic.worlds import outspoken_critic
from tests.stages.critic.worlds import tables as returns
from tests.stages.models.hub import describe
from tests.stages.reward_training.worlds import label_rows, labels, outputs_of, outspoken, rules_of
from tests.stages.sft.test_sft import demonstrations, new_policy
from tests.stages.training.groups import apart, gone, on_two_ranks, rank_processes, training
from tests.stages.training.tiny import tiny_checkpoint
from tests.stages.update.test_update import exploration, tiny_policy, weights_of

pytestmark = pytest.mark.engines

STAGES = (0, 1, 2, 3)
ONE_RANK = TorchEngineConfig()
Engine = TorchEngineConfig | DeepSpeedEngineConfig


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One store for all tests, and so one group of ranks for those that leave it alive."""
    with pytest.MonkeyPatch.context() as patch, use_store(Store(tmp_path_factory.mktemp("store"))) as opened:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("logs")))  # those of ranks that failed are kept
        yield opened
        ranks = rank_processes()
        evict()
    assert gone(ranks)


def updated(engines: list[Engine], *, tokens: int = 24, **changes: Any) -> Checkpoint:
    """A policy after one update by each engine in turn, on five micro-batches of 4, 3, 2, 2 and 1 rows."""
    policy, reference = tiny_policy(0), tiny_policy(1)
    outputs, advantages = exploration()
    for number, engine in enumerate(engines):
        how = training(engine, **changes)
        config = UpdateConfig(objective=GRPOConfig(beta=0.04), micro_batch_tokens=tokens, training=how)
        policy = update_policy(policy, reference, outputs, advantages, config, seed=number)
    return policy


def assert_same_metrics(found: Checkpoint, expected: Checkpoint) -> None:
    """All but those that say how long it took and in how much memory."""

    def comparable(metrics: dict[str, float]) -> dict[str, float]:
        return {name: metrics[name] for name in metrics if not re.match(r"time/|memory/|.*(seconds|_per_s)$", name)}

    ours, theirs = comparable(found.metrics), comparable(expected.metrics)
    assert ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_three_policy_updates_on_two_ranks_are_those_of_one(shared: Store, stage: int) -> None:
    found, expected = updated([on_two_ranks(stage)] * 3), updated([ONE_RANK] * 3)
    assert found.content != expected.content, "the ranks did nothing of their own"
    assert len(rank_processes()) == 2
    assert apart(found, expected) < 1e-5
    assert_same_metrics(found, expected)


@pytest.mark.parametrize("stage", STAGES)
def test_shared_prompts_train_two_ranks_as_separate_sequences_do(shared: Store, stage: int) -> None:
    how: dict[str, Any] = {"activation_checkpointing": True, "max_logits": 8 * 26}
    found = updated([on_two_ranks(stage)] * 2, **how)
    expected = updated([ONE_RANK] * 2, share_prompts=False, **how)
    assert found.metrics["policy/padding_share"] == 0.0 < expected.metrics["policy/padding_share"]
    assert apart(found, expected) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_two_ranks_is_continued_by_one_and_back(shared: Store, stage: int) -> None:
    one_rank = DeepSpeedEngineConfig(zero_stage=3 - stage)
    assert apart(updated([ONE_RANK, on_two_ranks(stage), one_rank]), updated([ONE_RANK] * 3)) < 1e-5


@pytest.mark.parametrize(("stage", "what"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")])
def test_offloading_changes_nothing(shared: Store, stage: int, what: str) -> None:
    found = updated([on_two_ranks(stage, offload=what)] * 3)
    assert apart(found, updated([ONE_RANK] * 3)) < 1e-5


@pytest.mark.parametrize("files", [None, ["optimizer.safetensors"]], ids=["all", "optimizer"])
def test_a_freed_checkpoint_is_replayed_before_the_ranks_go_on_from_it(shared: Store, files: list[str] | None) -> None:
    engines = [on_two_ranks(1)] * 2
    first, second = updated(engines[:1], tokens=25), updated(engines, tokens=25)
    before = first.content, second.content
    shared.prune(first.digest, files)
    shared.forget(second.digest)
    evict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "replay", functools.partial(materialise, shared))
        with pytest.warns(UserWarning, match=f"{first.digest[:12]} is not there .* replaying update_policy"):
            assert updated(engines, tokens=25) == second
    assert (first.content, second.content) == before
    assert not shared.freed(first.digest)


@pytest.mark.parametrize(
    ("stage", "offload", "precision"),
    [
        *((0, None, "fp32"), (1, None, "bf16"), (2, "optimizer", "bf16")),
        *((3, None, "fp32"), (3, None, "bf16"), (3, "parameters", "fp32")),
    ],
)
def test_updates_that_are_not_written_end_in_the_same_bits(
    shared: Store, tmp_path: Path, stage: int, offload: str | None, precision: str
) -> None:
    engine = on_two_ranks(stage, offload=offload) if offload else on_two_ranks(stage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "replay", functools.partial(materialise, shared))
        with writing_payloads("never"):
            made = updated([engine] * 3, tokens=26, precision=precision)
            handed = model_weights(load_model(made, dtype=torch.float32))
            assert made.content is None, "the ranks hand the weights over; the store has none"
        evict()
        with pytest.warns(UserWarning, match=r"is not there .* replaying 3 x update_policy"):
            weights = load_file(made.path / "model.safetensors")
    assert handed.keys() == weights.keys()
    assert all(handed[name].equal(weights[name]) for name in weights)
    with use_store(Store(tmp_path)):
        assert updated([engine] * 3, tokens=26, precision=precision).content is not None
        content = updated([engine] * 3, tokens=26, precision=precision).content
    assert made.content == content


def test_ranks_write_what_they_hold_when_it_is_read(shared: Store) -> None:
    with pytest.MonkeyPatch.context() as patch, writing_payloads("never"):
        patch.setattr(shared, "replay", functools.partial(materialise, shared))
        made = updated([on_two_ranks(2)] * 2, tokens=27)
        patch.setattr("pipeline.derivation.materialise.calls_to_replay", None)  # nothing is replayed
        assert (made.path / "optimizer.safetensors").exists()


def test_ranks_write_in_the_background_what_was_snapped_while_they_go_on(shared: Store, tmp_path: Path) -> None:
    with writing_payloads("background"):
        made = updated([on_two_ranks(2)] * 2, tokens=28)
    evict()  # whoever ends the ranks waits for what they write
    with use_store(Store(tmp_path)):
        content = updated([on_two_ranks(2)] * 2, tokens=28).content
    assert made.content == content is not None


@pytest.mark.parametrize("kinds", [("outcome",), ("process", "outcome")], ids=["outcome", "both"])
@pytest.mark.parametrize("budget", [1, 40, 10_000], ids=["a row each", "some", "one batch for two ranks"])
def test_scores_of_reward_models_on_two_ranks_are_those_of_one(
    shared: Store, kinds: tuple[RewardKind, ...], budget: int
) -> None:
    base = tiny_checkpoint()
    rows, models = label_rows(base), [outspoken(kind, base) for kind in kinds]
    outputs, rules = outputs_of(rows), rules_of(rows)
    how = {"precision": "fp32", "micro_batch_tokens": budget}
    alone = score_outputs(outputs, base, models, ScoringConfig.model_validate(how), rules)
    shared.forget(alone.digest)
    ranks = ScoringConfig.model_validate({**how, "engine": on_two_ranks(2).model_dump(mode="json")})
    together = score_outputs(outputs, base, models, ranks, rules)
    assert len(rank_processes()) == 2
    assert together == alone, "the same bits"
    assert together.metrics["reward/mean"] == alone.metrics["reward/mean"]


def merged(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """W + s B A of every adapted matrix, in float64, from what a checkpoint keeps of its adapter."""
    folder = checkpoint.path / "adapter"
    factors, base = load_file(folder / "adapter_model.safetensors"), load_file(checkpoint.path / "model.safetensors")
    found = {}
    for name, weight in base.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" not in factors:
            continue
        a, b = (factors[f"{layer}.lora_{factor}.weight"].double() for factor in "AB")
        found[name] = weight.double() + SCALE * b @ a
    return found


LORA = LoRAConfig(r=3)
SCALE = LORA.alpha / LORA.r


@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_trained_on_two_ranks_is_that_of_one(shared: Store, stage: int) -> None:
    """Three updates; then one that each side continues from the other's checkpoint, optimizer state included."""
    pytest.importorskip("peft")
    two, one = on_two_ranks(stage), DeepSpeedEngineConfig(zero_stage=3 - stage)
    expected = updated([ONE_RANK] * 3, adapter=LORA)
    for engines in ([two] * 3, [ONE_RANK, two, one], [two, ONE_RANK, two]):
        found = updated(engines, adapter=LORA)
        assert found.content != expected.content, "the ranks did nothing of their own"
        assert apart(found, expected) < 1e-5
        assert load_trainer_state(found)["updates"] == 3
        ours, theirs = merged(found), merged(expected)
        assert ours.keys() == theirs.keys()
        assert max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours) < 1e-5
        with plain_folder(found.path) as folder:
            stored = load_file(folder / "model.safetensors")
        assert all(torch.allclose(stored[name].double(), ours[name], rtol=0, atol=1e-6) for name in ours)


def test_ranks_that_are_warm_need_none_of_the_checkpoints_they_came_from(shared: Store) -> None:
    outputs, advantages = exploration()
    config = UpdateConfig(training=training(on_two_ranks(3)), micro_batch_tokens=24)
    start = tiny_checkpoint(max_position_embeddings=77)  # of no other test
    first = update_policy(start, start, outputs, advantages, config, seed=0)
    shared.prune(start.digest)
    second = update_policy(first, first, outputs, advantages, config, seed=1)
    assert {file.name for file in second.path.iterdir()} == {file.name for file in first.path.iterdir()}
    assert load_tokenizer(second).eos_token == "1"


def test_policy_updates_on_two_hosts_are_those_of_one_rank(shared: Store, tmp_path: Path) -> None:
    """Two addresses of this one, the second's rank started by a shell. Another store: where ranks are is in no cache key."""
    hosts = ({"address": "127.0.0.2", "ranks": 1}, {"address": "127.0.0.1", "ranks": 1, "start": "sh -c {command}"})
    with use_store(Store(tmp_path / "store")):
        found = updated([on_two_ranks(2, hosts=hosts, deadline=600.0)] * 2)
        assert apart(found, updated([ONE_RANK] * 2)) < 1e-5
        started = [p for p in psutil.Process().children(recursive=True) if "process_group.py" in " ".join(p.cmdline())]
        assert {p.environ().get(ADDRESS) for p in started} == {None, "127.0.0.1", "127.0.0.2"}
        assert list(tmp_path.glob("store/.ranks-*/rendezvous"))
        evict()
    assert not psutil.wait_procs(started, timeout=10)[1]
    assert not list(tmp_path.glob("store/.ranks-*"))


def test_more_ranks_than_micro_batches_are_idle_and_no_error(shared: Store) -> None:
    assert apart(updated([on_two_ranks(2)], tokens=10_000), updated([ONE_RANK], tokens=10_000)) < 1e-5


def tuned(engine: Engine) -> Checkpoint:
    corpus = demonstrations()
    config = SFTConfig(
        training=training(engine), batch_size=5, max_steps=2, decay_steps=2, micro_batch_tokens=60, stop_loss=None
    )
    return supervised_finetuning(new_policy(corpus), corpus, PromptConfig(suffix="\n"), config)


@pytest.mark.parametrize("stage", [1, 3])
def test_supervised_finetuning_on_two_ranks_is_that_of_one(shared: Store, stage: int) -> None:
    found, expected = tuned(on_two_ranks(stage)), tuned(ONE_RANK)
    distance = (weights_of(found) - weights_of(expected)).norm() / weights_of(expected).norm()
    assert distance < 1e-5
    assert_same_metrics(found, expected)
    assert (found.path / "sft_curve.json").read_text() == (expected.path / "sft_curve.json").read_text()


@pytest.mark.parametrize(
    ("kind", "objective"),
    [("outcome", BradleyTerryConfig()), ("outcome", PointwiseConfig()), ("process", PointwiseConfig())],
)
@pytest.mark.parametrize("stage", [1, 3])
def test_a_reward_model_trained_on_two_ranks_is_that_of_one(
    shared: Store, stage: int, kind: Any, objective: Any
) -> None:
    base = tiny_checkpoint()
    model, table = outspoken(kind, base), labels(base)

    def trained(engine: Engine) -> Checkpoint:
        config = RewardTrainingConfig(
            training=training(engine), objective=objective, epochs=2, questions_per_update=3, micro_batch_tokens=40
        )
        return train_reward_model(model, table, config, seed=0)

    found, expected = trained(on_two_ranks(stage)), trained(ONE_RANK)
    assert apart(found, expected) < 1e-5
    assert_same_metrics(found, expected)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_critic_on_two_ranks_is_that_of_one(shared: Store, stage: int) -> None:
    critic, (outputs, advantages) = outspoken_critic(), returns()
    found, expected = (
        update_critic(
            critic,
            outputs,
            advantages,
            CriticConfig(training=training(engine), mu=3, micro_batch_tokens=24),
            seed=0,
        )
        for engine in (on_two_ranks(stage), ONE_RANK)
    )
    assert apart(found, expected) < 1e-5
    assert_same_metrics(found, expected)


@pytest.mark.parametrize("stage", [1, 3])
def test_scores_of_two_ranks_are_those_of_one(shared: Store, stage: int) -> None:
    (outputs, _), (valued, _), critic = exploration(), returns(), outspoken_critic()
    compared, reference, values = (
        [run(training(engine)) for engine in (on_two_ranks(stage), ONE_RANK)]
        for run in (
            lambda how: compare_policies(
                tiny_policy(0), tiny_policy(1), outputs, LogprobsConfig(training=how, micro_batch_tokens=24)
            ),
            lambda how: score_reference(tiny_policy(1), outputs, LogprobsConfig(training=how, micro_batch_tokens=24)),
            lambda how: estimate_values(critic, valued, CriticConfig(training=how, micro_batch_tokens=24)),
        )
    )
    pairs = ((compared, ("policy", "reference")), (reference, ("reference",)), (values, ("value",)))
    for (found, expected), columns in pairs:
        for ours, theirs in itertools.zip_longest(found.rows(), expected.rows()):
            assert (ours["question_id"], ours["sample"]) == (theirs["question_id"], theirs["sample"])
            for column in columns:
                assert ours[column] == pytest.approx(theirs[column], rel=1e-5)


# ---------------------------------------------------------------------------------------------------- failures


def update_in_four_steps(seed: int, deadline: float = 120.0) -> Checkpoint:
    """One call whose optimizer steps are reported. The seed decides nothing here but whether it is another call."""
    outputs, advantages = exploration()
    config = UpdateConfig(training=training(on_two_ranks(2, deadline=deadline)), mu=4, micro_batch_tokens=24)
    return update_policy(tiny_policy(0), tiny_policy(1), outputs, advantages, config, seed=seed)


@pytest.fixture(scope="module")
def undisturbed(shared: Store) -> str:
    return update_in_four_steps(seed=0).content


def after_the_first_step(act: Callable[[dict[int, psutil.Process]], None]) -> AbstractContextManager[None]:
    """Act on the ranks once they have done one step of several."""

    def hear(topic: str, values: dict[str, Any]) -> None:
        if topic == "update_policy" and values["done"] == 1:
            act(rank_processes())

    return listen(hear)


def test_a_rank_that_hangs_is_killed_at_the_deadline(undisturbed: str) -> None:
    update_in_four_steps(seed=3)  # starts the ranks, where there are none
    ranks, began = rank_processes(), time.monotonic()
    with (
        after_the_first_step(lambda found: found[1].suspend()),
        pytest.raises(WorkerError, match=r"training: rank .*1 of 2 gave no answer within 15 s and was killed"),
    ):
        update_in_four_steps(seed=4, deadline=15.0)
    assert time.monotonic() - began < 60
    assert gone(ranks)
    assert update_in_four_steps(seed=4).content == undisturbed


def test_ranks_that_died_between_two_steps_are_replaced(undisturbed: str) -> None:
    update_in_four_steps(seed=7)
    ranks = rank_processes()
    for process in ranks.values():
        process.kill()
        process.wait()
    assert update_in_four_steps(seed=8).content == undisturbed
    assert {process.pid for process in rank_processes().values()}.isdisjoint(each.pid for each in ranks.values())


def test_a_rank_that_is_out_of_memory_says_so(undisturbed: str) -> None:
    update_in_four_steps(seed=5)
    ranks = rank_processes()
    ranks[1].rlimit(resource.RLIMIT_AS, (ranks[1].memory_info().vms + (8 << 20), resource.RLIM_INFINITY))
    big = tiny_checkpoint(hidden_size=1024, intermediate_size=1024, num_hidden_layers=1)  # 30 MiB and more
    outputs, advantages = exploration()
    with pytest.raises(WorkerError, match=r"(?s)training, rank 1 of 2.*memory"):
        update_policy(big, big, outputs, advantages, UpdateConfig(training=training(on_two_ranks(2))), seed=0)
    assert gone(ranks)


def test_what_is_wrong_with_the_data_is_said_as_by_one_rank(shared: Store) -> None:
    outputs, advantages = exploration()
    hot = Rollouts.write([row | {"temperature": 0.5 + (number == 3)} for number, row in enumerate(outputs.rows())])

    def complaint(engine: Engine) -> str:
        config = UpdateConfig(training=training(engine))
        with pytest.raises(ValueError, match="temperature") as raised:
            update_policy(tiny_policy(0), tiny_policy(1), hot, advantages, config, seed=0)
        assert type(raised.value) is ValueError
        return str(raised.value)

    assert complaint(on_two_ranks()) == complaint(ONE_RANK)


UNORDERED = """
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


class Config(Qwen2Config):
    model_type = "cohort_unordered"


class Model(Qwen2ForCausalLM):
    config_class = Config

    def forward(self, *args, **kwargs):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
        return super().forward(*args, **kwargs)
"""


def unordered_policy() -> Checkpoint:
    """The tiny policy, with an operation in its forward that torch has no fixed order for."""
    plain = tiny_policy(0)

    def fill(folder: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(plain.path / name, folder / name)
        (folder / "own.py").write_text(UNORDERED)
        classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        describe(
            folder, "config.json", model_type="cohort_unordered", architectures=["OwnForCausalLM"], auto_map=classes
        )

    made = Checkpoint.write(fill)
    trust(code_digest(code_files(made.path)))
    return made


@pytest.mark.parametrize("engine", [ONE_RANK, on_two_ranks(2)], ids=["one rank", "two ranks"])
def test_an_update_in_a_fixed_order_refuses_what_has_none(shared: Store, engine: Engine) -> None:
    (outputs, advantages), policy = exploration(), unordered_policy()

    def update(start: Checkpoint, *, fixed: bool) -> Checkpoint:
        how = training(engine, deterministic=fixed)
        config = UpdateConfig(training=how, micro_batch_tokens=24)
        return update_policy(start, start, outputs, advantages, config, seed=0)

    plain = tiny_policy(0)
    assert apart(update(plain, fixed=True), update(plain, fixed=False)) < 1e-6
    assert update(policy, fixed=False).content, "what was fixed before is not now"
    with pytest.raises(ConfigError, match=r"training\.deterministic: put_"):
        update(policy, fixed=True)


def test_an_engine_for_several_ranks_is_refused_outside_of_their_group(shared: Store) -> None:
    from stages.training.loop import resident_engine

    with pytest.raises(ValueError, match=r"training.engine.ranks: expected 1, .* found 2"):
        resident_engine(tiny_policy(), training(on_two_ranks()))
