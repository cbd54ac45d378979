"""Every method as settings of any recipe, and as a whole run: two steps from one supervised policy in one store."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.config import IterativeRLConfig
from flows.config.methods import METHODS, PAPER, method_settings
from flows.config.recipes import RECIPES, arithmetic_smoke
from flows.config.resolve import choose
from flows.inspection.groups import groups_of
from pipeline.config import ConfigError
from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.tables import Advantages, Rewards
from tests.flows.short_runs import Run, copied, train, whole_method


@pytest.fixture(scope="module")
def store(supervised: Run, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that holds the supervised policy."""
    return copied(supervised.store, tmp_path_factory)


@pytest.fixture(scope="module")
def other_store(supervised: Run, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Another store that holds it."""
    return copied(supervised.store, tmp_path_factory)


@pytest.fixture(scope="module")
def runs(store: Store) -> dict[str, Run]:
    """Every method, run one after the other in one process and store."""
    made = {method: train(store, method) for method in METHODS if method != "distillation"}
    return made | {"distillation": train(store, "distillation", **taught(made["grpo"]))}


def taught(teacher: Run) -> dict[str, Any]:
    """Settings that make the last policy of a run the teacher."""
    return {"teacher": {"path": str(teacher.store.path(teacher.digest))}}


@pytest.mark.claim("5.2.1, Fig. 5")
def test_all_methods_start_from_the_one_supervised_policy(runs: dict[str, Run], supervised: Run) -> None:
    assert supervised.executed["supervised_finetuning"] == 1
    assert {run.supervised for run in runs.values()} == {supervised.digest}
    for stage in ("supervised_finetuning", "create_policy", "arithmetic_demonstrations"):
        assert sum(run.executed[stage] for run in runs.values()) == 0


@pytest.mark.parametrize("method", METHODS)
def test_where_outputs_have_an_advantage_the_policy_changes(runs: dict[str, Run], method: str) -> None:
    run = runs[method]
    informative = [any(any(values) for values in part) for part in advantages(run)]
    assert any(informative)
    for step, expected in enumerate(informative, 1):
        assert run.points[step]["policy/grad_norm"] > 0 or not expected
    assert weights(run.store, run.digest) != weights(run.store, run.supervised)


def test_no_two_methods_come_to_the_same_policy(runs: dict[str, Run]) -> None:
    assert len({weights(run.store, run.digest) for run in runs.values()}) == len(METHODS)


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=() if name in ("ppo", "distillation") else pytest.mark.slow) for name in METHODS],
)
def test_equal_seeds_give_equal_bits_also_when_resumed_after_the_first_step(
    runs: dict[str, Run], other_store: Store, method: str
) -> None:
    teacher = taught(runs["grpo"]) if method == "distillation" else {}
    first = train(other_store, method, steps=1, **teacher)
    evict()  # as a new process would begin
    resumed = train(other_store, method, **teacher)
    assert resumed.content == runs[method].content
    assert resumed.calls[: len(first.calls)] == first.calls
    assert resumed.executed["update_policy"] == 1


def test_another_seed_gives_another_policy_from_the_same_start(runs: dict[str, Run], store: Store) -> None:
    other = train(store, "grpo", seed=1)
    assert other.content != runs["grpo"].content
    assert other.supervised == runs["grpo"].supervised


# ------------------------------------------------------------------------------------- whose outputs


@pytest.mark.claim("5.2.1 online, offline")
@pytest.mark.parametrize("method", ["rft", "dpo"])
def test_offline_methods_sample_from_the_initial_policy_at_every_step(runs: dict[str, Run], method: str) -> None:
    run = runs[method]
    assert run.given("rollout", "policy") == [run.supervised] * 2
    assert run.given("update_policy", "policy") == [run.supervised, run.made("update_policy")[0]]


def test_offline_methods_share_their_outputs(runs: dict[str, Run]) -> None:
    assert runs["rft"].made("rollout") == runs["dpo"].made("rollout")
    assert runs["dpo"].executed["rollout"] == 0


@pytest.mark.claim("5.2.1 online, offline")
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("sft", "rft", "dpo")])
def test_online_methods_sample_from_the_policy_as_it_is(runs: dict[str, Run], method: str) -> None:
    run = runs[method]
    assert list(dict.fromkeys(run.given("rollout", "policy"))) == [run.supervised, run.made("update_policy")[0]]


def test_a_method_over_a_base_with_a_lag_takes_its_ratio_to_the_policy_that_sampled() -> None:
    lagged = {"overlap": 1, "update.old_logprobs": "rollout"}
    base = arithmetic_smoke().override(lagged)
    assert base.override(method_settings("cispo", base)).update.old_logprobs == "rollout"
    corrected = base.override({"update.old_logprobs": "trainer", "update.correction": {"kind": "truncated"}})
    assert corrected.override(method_settings("dapo", corrected)).update.old_logprobs == "trainer"
    with pytest.raises(ConfigError, match="overlap: online_rft has no ratio"):
        base.override(method_settings("online_rft", base))


def test_sft_as_a_method_samples_nothing_and_scores_nothing(runs: dict[str, Run]) -> None:
    names = {name for name, _ in runs["sft"].calls}
    assert "demonstrated_outputs" in names
    assert names.isdisjoint({"rollout", "score", "sample_batch"})


@pytest.mark.claim("5.2.1, Fig. 5")
@pytest.mark.parametrize("method", ["sft", "grpo", "rft", "online_rft"])
def test_every_step_has_as_many_outputs_whatever_the_method(runs: dict[str, Run], method: str) -> None:
    points = runs[method].points
    assert [points[step]["rollout/samples"] for step in (1, 2)] == [24, 24]


# ------------------------------------------------------------------------------------- what they learn with


def test_the_critic_of_a_step_is_that_of_the_step_before(runs: dict[str, Run]) -> None:
    run = runs["ppo"]
    assert run.given("create_critic", "policy") == [run.supervised]
    (fresh,), fitted = run.made("create_critic"), run.made("update_critic")
    assert run.given("update_critic", "critic") == [fresh, fitted[0]]
    assert run.given("estimate_values", "critic") == [fresh, fitted[0]]
    assert run.given("update_critic", "advantages") == run.made("estimate_advantages")
    assert len({fresh, *fitted}) == 3


def test_only_ppo_has_a_critic(runs: dict[str, Run]) -> None:
    assert {method for method, run in runs.items() if run.of("create_critic")} == {"ppo"}


def test_penalties_in_the_reward_compare_with_the_iterations_first_policy(runs: dict[str, Run]) -> None:
    penalised = {method: run for method, run in runs.items() if run.of("compare_policies")}
    assert set(penalised) == {"ppo", "rloo", "reinforce_plus_plus", "distillation"}
    del penalised["distillation"]  # it compares with another policy, below
    for run in penalised.values():
        assert run.given("compare_policies", "reference") == [run.supervised] * 2
        assert run.given("compare_policies", "policy") == run.given("update_policy", "policy")


@pytest.mark.claim("on-policy distillation")
def test_distillation_compares_each_policy_with_the_teacher_and_scores_nothing(runs: dict[str, Run]) -> None:
    run = runs["distillation"]
    (teacher,) = run.made("import_checkpoint")
    assert run.given("compare_policies", "reference") == [teacher] * 2
    assert run.given("compare_policies", "policy") == run.given("update_policy", "policy")
    assert run.given("estimate_advantages", "logprobs") == run.made("compare_policies")
    assert {name for name, _ in run.calls}.isdisjoint({"score", "reward_outputs"})
    assert not any("reward/mean" in point for point in run.points.values())


@pytest.mark.slow
@pytest.mark.claim("on-policy distillation")
def test_the_reverse_kl_to_the_teacher_falls(store: Store) -> None:
    teacher = taught(train(store, "grpo", iterations=0, **{"policy.seed": 3}))
    points = train(store, "distillation", **teacher, **{"steps": 12, "questions_per_step": 16, "rollout.G": 8}).points
    divergence = [points[step]["policy/kl_k1"] for step in range(1, 13)]
    assert sum(divergence[-4:]) < 0.8 * sum(divergence[:4])  # 0.109, 0.118, 0.113, ..., 0.070, 0.062, 0.089


def test_sft_learns_from_a_teachers_outputs_where_it_is_asked_to(runs: dict[str, Run], store: Store) -> None:
    run = train(store, "sft", data_source="teacher", **taught(runs["grpo"]))
    assert run.given("rollout", "policy") == run.made("import_checkpoint") * 2
    assert {name for name, _ in run.calls}.isdisjoint({"score", "demonstrated_outputs", "compare_policies"})
    assert run.content != runs["sft"].content


@pytest.mark.claim("a teacher given other ids")
def test_a_teacher_of_another_vocabulary_is_refused_before_anything_is_trained(
    store: Store, tmp_path: Path, runs: dict[str, Run]
) -> None:
    shutil.copytree(store.path(runs["grpo"].digest), tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.chmod(0o644)
    described = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = described["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    file.write_text(json.dumps(described), encoding="utf-8")
    failed = Run(store)
    with pytest.raises(ConfigError, match=r"teacher\.path: .* another vocabulary"):
        train(store, "distillation", run=failed, seed=5, teacher={"path": str(tmp_path / "other")})
    assert {"supervised_finetuning", "rollout", "update_policy"}.isdisjoint(name for name, _ in failed.calls)


def test_the_reference_is_the_policy_at_the_start_of_the_iteration(store: Store) -> None:
    run = train(store, "grpo", iterations=2)
    policies = run.made("update_policy")
    assert run.given("update_policy", "reference") == [run.supervised] * 2 + [policies[1]] * 2


def test_dynamic_sampling_leaves_groups_whose_rewards_differ(runs: dict[str, Run]) -> None:
    run = runs["dapo"]
    with use_store(run.store):
        rewards = [Rewards(digest) for digest in run.made("score")]
    learned_from = run.given("update_policy", "outputs")
    kept = [table for table, given in zip(rewards, run.given("score", "outputs"), strict=True) if given in learned_from]
    assert len(kept) >= 2
    for table in kept:
        with use_store(run.store):
            found = groups(table)
        assert len(found) == 6
        assert all(len(values) == 4 and len(set(values)) > 1 for values in found.values())
    assert [run.points[step]["rollout/agreeing_groups"] for step in (1, 2)] == [0, 0]
    # Without it some groups agree, so that it had something to do.
    assert runs["grpo"].points[1]["reward/frac_degenerate_groups"] > 0
    assert run.points[1]["rollout/draws"] > 1


def test_process_supervision_has_advantages_that_differ_within_an_output(runs: dict[str, Run]) -> None:
    outcome, process = ([a for step in advantages(runs[name]) for a in step] for name in ("grpo", "grpo_process"))
    assert all(len(set(values)) == 1 for values in outcome)
    assert any(len(set(values)) > 1 for values in process)


@pytest.mark.parametrize("method", METHODS)
def test_the_groups_of_every_method_can_be_shown(runs: dict[str, Run], method: str) -> None:
    run = runs[method]
    with use_store(run.store):
        found = groups_of(run.store, run.made("estimate_advantages")[0])
        assert found is not None
        outputs = [output for group in found for output in group.outputs]
    assert len(outputs) == 24
    assert all((output.reward is None) == (method in ("sft", "distillation")) for output in outputs)


# ------------------------------------------------------------------------------------- as settings


def become(base: IterativeRLConfig, method: str) -> IterativeRLConfig:
    return base.override(whole_method(method, base))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_valid_config_of_every_recipe(recipe: str, method: str) -> None:
    config = become(RECIPES[recipe](), method)
    assert config.name == f"{recipe}-{method}"
    assert IterativeRLConfig.from_yaml(config.to_yaml()) == config


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(METHODS, 2)))
def test_a_method_leaves_nothing_of_the_one_before(first: str, second: str) -> None:
    base = arithmetic_smoke()
    assert become(become(base, first), second) == become(base, second)


def test_grpo_of_the_recipe_is_the_recipe() -> None:
    base = arithmetic_smoke()
    assert become(base, "grpo").override({"name": base.name}) == base


def test_the_methods_of_the_paper_come_first_and_are_rows_of_their_own() -> None:
    assert tuple(METHODS)[: len(PAPER)] == PAPER
    titles = [become(arithmetic_smoke(), method).update.objective.ROW.title for method in PAPER]
    assert titles == ["SFT", "RFT", "DPO", "Online RFT", "PPO", "GRPO"]


def test_process_supervision_adds_and_takes_away_only_its_own_component() -> None:
    base = arithmetic_smoke()
    process = become(base, "grpo_process")
    assert [component.kind for component in process.reward.components] == ["format", "accuracy", "steps"]
    weighted = base.override({"reward.components": [{"kind": "accuracy"}, {"kind": "steps", "weight": 0.5}]})
    assert become(weighted, "grpo_process").reward == weighted.reward
    assert become(weighted, "grpo").reward == weighted.reward


def test_methods_that_learn_from_others_outputs_drop_the_correction() -> None:
    corrected = arithmetic_smoke().override({"update.correction": {"kind": "truncated", "level": "sequence"}})
    kinds = {method: become(corrected, method).update.correction.kind for method in METHODS}
    assert {method for method, kind in kinds.items() if kind == "none"} == {"sft", "rft", "dpo"}


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'onlin_rft' .*'online_rft'"):
        method_settings("onlin_rft", arithmetic_smoke())
    with pytest.raises(ConfigError, match=r"'zzz' .* sft, rft"):
        method_settings("zzz", arithmetic_smoke())


def test_settings_come_after_the_method() -> None:
    config = choose("arithmetic_smoke", settings=["advantage.lam=0.5", "critic.mu=3"], method="ppo").config
    assert config.advantage.kind == "gae"
    assert config.advantage.lam == 0.5
    assert config.critic is not None
    assert config.critic.mu == 3


def test_settings_of_one_run_change_no_method() -> None:
    before = copy.deepcopy(METHODS)
    choose("arithmetic_smoke", settings=["update.objective.beta=0.5", "advantage.ddof=0"], method="grpo")
    assert before == METHODS


def test_what_a_method_takes_from_its_base_follows_the_settings() -> None:
    length = choose("arithmetic_smoke", settings=["rollout.max_output_tokens=30"], method="dr_grpo").config
    assert length.update.objective.kind == "dr_grpo"
    assert length.update.objective.length == 30
    rate = choose("arithmetic_smoke", settings=["update.training.optimizer.learning_rate=0.5"], method="ppo").config
    assert rate.critic is not None
    assert rate.critic.training.optimizer.learning_rate == 0.5


def test_a_file_that_tunes_its_own_method_may_be_trained_by_another(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: arithmetic_smoke\nupdate.objective.beta: 0.5\nseed: 3\n")
    config = choose(str(file), method="sft").config
    assert (config.update.objective.kind, config.seed) == ("sft", 3)


def test_differences_leave_out_what_went_with_its_kind() -> None:
    assert choose("arithmetic_smoke", method="sft").differences() == {
        "name": ("arithmetic_smoke", "arithmetic_smoke-sft"),
        "data_source": ("policy", "demonstrations"),
        "advantage.kind": ("group", "one"),
        "update.objective.kind": ("grpo", "sft"),
    }
    assert choose("arithmetic_smoke", settings=["sft=null"]).differences() == {"sft": ("...", None)}


# ------------------------------------------------------------------------------------- reading


def weights(store: Store, digest: str) -> bytes:
    return (store.path(digest) / "model.safetensors").read_bytes()


def groups(rewards: Rewards) -> dict[str, list[float | None]]:
    found: dict[str, list[float | None]] = {}
    for row in rewards.rows():
        found.setdefault(row["question_id"], []).append(row["reward"])
    return found


def advantages(run: Run) -> list[list[list[float]]]:
    """By step: those of every output that has any."""
    with use_store(run.store):
        tables = [Advantages(digest).rows() for digest in run.made("estimate_advantages")]
    return [[row["advantage"] for row in rows if row["advantage"] is not None] for rows in tables]
