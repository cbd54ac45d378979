"""What a command asks for: files, methods, arms and `--set` in the order given, and what the run's record keeps of them."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from flows.config import IterativeRLConfig
from flows.config.methods import METHODS
from flows.config.recipes import RECIPES, arithmetic_smoke
from flows.config.resolve import Asked, Choice, choice_of, choose
from flows.experiments.arms import method_experiment, plan
from flows.inspection.history import History
from flows.inspection.run_view import show_run
from flows.runs.ledger import Ledger
from flows.runs.paths import Places
from flows.runs.record import RunRecord, read_records
from pipeline.config import ConfigError
from pipeline.experiment import Experiment
from stages.update import GSPOConfig

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a YAML file and return its path."""

    def written(text: str) -> Path:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        file.write_text(text)
        return file

    return written


# ------------------------------------------------------------------------------------- one after the other


@pytest.mark.parametrize(
    ("text", "set_", "expected"),
    [
        ("sft: {max_steps: 5}", ["sft=null"], {"sft": None}),
        ("update.training.adapter.r: 4", ["update.training.adapter=null"], {"update.training.adapter": None}),
        (
            "update.training.engine: {kind: deepspeed, zero_stage: 2}",
            ["update.training.engine={kind: torch}"],
            {"update.training.engine.kind": "torch"},
        ),
        ("rollout: {G: 8}", ["rollout={G: 2}"], {"rollout.G": 2, "rollout.max_output_tokens": 1024}),
        ("rollout.G: 8", ["rollout.G=4", "rollout.G=2"], {"rollout.G": 2}),
        ("sft: null", ["sft.max_steps=7"], {"sft.max_steps": 7, "sft.decay_steps": 0}),
        (
            "update.objective.kind: dr_grpo",
            ["update.objective={kind: grpo, beta: 0.5}"],
            {"update.objective.beta": 0.5},
        ),
        (
            "update: {objective: {eps_low: 0.1, kind: gspo}}",
            ["update.objective.eps_high=1"],
            {"update.objective.eps_low": 0.1},
        ),
    ],
)
def test_a_later_setting_wins_over_a_file_as_a_whole_or_a_part(
    text: str, set_: list[str], expected: dict[str, Any], write: Write
) -> None:
    config = choose("arithmetic_smoke", [write(text)], set_).config.model_dump(mode="json")
    for key, value in expected.items():
        found: Any = config
        for name in key.split("."):
            found = found[name]
        assert found == value, key


def test_a_file_and_its_later_file_are_applied_in_turn(write: Write) -> None:
    first, second = write("sft: null"), write("sft: {max_steps: 3}")
    started_anew = choose("arithmetic_smoke", [first, second]).config.sft
    assert started_anew is not None
    assert (started_anew.max_steps, started_anew.length_pool) == (3, type(started_anew)().length_pool)
    assert choose("arithmetic_smoke", [second, first]).config.sft is None


VALUES = {
    "rollout": st.sampled_from([{"G": 2}, {"G": 8, "max_output_tokens": 9}]),
    "rollout.G": st.sampled_from([2, 6]),
    "rollout.backend": st.sampled_from([{"kind": "hf"}, {"kind": "hf", "batch_rows": 7}]),
    "rollout.backend.batch_rows": st.sampled_from([5, 9]),
    "sft": st.sampled_from([None, {"max_steps": 9}, {}]),
    "sft.max_steps": st.sampled_from([3, 4]),
    "update.objective": st.sampled_from([{"kind": "grpo"}, {"kind": "dapo"}, {"kind": "gspo"}]),
    "update.objective.kind": st.sampled_from(["grpo", "dapo", "gspo"]),
    "update.training.adapter": st.sampled_from([None, {"r": 4}]),
    "update.training.adapter.r": st.sampled_from([2, 16]),
}
CHANGES = st.lists(
    st.sampled_from(sorted(VALUES)).flatmap(lambda key: st.tuples(st.just(key), VALUES[key])), max_size=5
)


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """One change by a plain loop."""
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {"kind": "hf"} if section == "backend" else {}
        values = values[section]
    if last == "kind" and values.get("kind", value) != value:
        values.clear()
    values[last] = value


def expected_of(changes: list[tuple[str, Any]]) -> IterativeRLConfig:
    values = arithmetic_smoke().model_dump(mode="json")
    for key, value in changes:
        put(values, key, copy.deepcopy(value))
    return IterativeRLConfig.parse(values)


@settings(max_examples=20, deadline=None)
@given(CHANGES)
def test_settings_of_the_command_line_equal_a_loop(changes: list[tuple[str, Any]]) -> None:
    set_ = [f"{key}={json.dumps(value)}" for key, value in changes]
    assert choose("arithmetic_smoke", settings=set_).config == expected_of(changes)


PARTS = CHANGES.map(lambda changes: [change for change in changes if not isinstance(change[1], dict) or not change[1]])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=PARTS, last=CHANGES)
def test_files_and_then_settings_equal_a_loop(
    first: list[tuple[str, Any]], last: list[tuple[str, Any]], write: Write
) -> None:
    files = [write(yaml.safe_dump({key: value})) for key, value in first]
    set_ = [f"{key}={json.dumps(value)}" for key, value in last]
    assert choose("arithmetic_smoke", files, set_).config == expected_of(first + last)


@settings(max_examples=20, deadline=None)
@given(common=PARTS, arm=PARTS, last=CHANGES)
def test_common_arm_and_then_settings_equal_a_loop(
    common: list[tuple[str, Any]], arm: list[tuple[str, Any]], last: list[tuple[str, Any]]
) -> None:
    shared, own = (dict(reversed(changes)) for changes in (common, arm))  # no key twice
    experiment = Experiment(
        name="arithmetic_smoke", asks="", base="arithmetic_smoke", common=shared, arms={"x": own}, baseline="x"
    )
    (run,) = plan(experiment, settings=[f"{key}={json.dumps(value)}" for key, value in last], own_names=False).arms
    expected = expected_of([*shared.items(), *own.items(), *last]).override({"name": "arithmetic_smoke-x-s0"})
    assert run.choice.config == expected


def test_only_the_last_state_has_to_be_valid(write: Write) -> None:
    file = write("recipe: arithmetic_smoke\nrollout.G: -3\nadvantage.kind: gae\nsft: 7\n")
    config = choose(str(file), settings=["rollout.G=2", "sft=null"], method="ppo").config
    assert (config.rollout.G, config.advantage.kind, config.sft) == (2, "gae", None)


def test_errors_name_the_key_and_the_file_or_option_it_is_from(write: Write) -> None:
    file = write("rollout: {G: -3}\nsteps: 2\n")
    with pytest.raises(ConfigError) as caught:
        choose("arithmetic_smoke", [file], ["steps=x", "update.objective.betta=1"])
    lines = {line.split(":")[0].strip(): line for line in str(caught.value).splitlines()[1:]}
    assert lines["rollout.G"].endswith(f"(from {file})")
    assert lines["steps"].endswith("(from --set)")
    assert lines["update.objective.betta"].endswith("did you mean 'beta'? (from --set)")


def test_what_another_kind_lacks_is_said_to_be_from_the_choice_of_the_kind() -> None:
    with pytest.raises(ConfigError, match=r"policy\.path: Field required .*\(from --set\)"):
        choose("arithmetic_smoke", settings=["policy.kind=pretrained"])


# ------------------------------------------------------------------------------------- methods among them


def test_a_method_comes_first_in_its_mapping_and_in_order_elsewhere(write: Write) -> None:
    file = write("update.objective.eps_low: 0.5\nmethod: gspo\n")
    assert choose("arithmetic_smoke", [file]).config.update.objective == GSPOConfig(eps_low=0.5)
    set_ = ["update.objective.eps_low=0.5", "method=gspo"]
    assert choose("arithmetic_smoke", settings=set_).config.update.objective == GSPOConfig()


def test_ppo_keeps_the_critic_that_its_base_has() -> None:
    settings = ["critic.mu=3", "advantage.kind=gae", "update.objective.kind=ppo", "method=ppo"]
    critic = choose("arithmetic_smoke", settings=settings).config.critic
    assert critic is not None
    assert critic.mu == 3


def test_overrides_common_to_all_arms_come_before_an_arms_method() -> None:
    experiment = Experiment(
        name="order",
        asks="",
        base="arithmetic_smoke",
        common={"update.objective.beta": 0.5, "steps": 3},
        arms={"plain": {}, "whole": {"method": "grpo"}, "part": {"update.objective.beta": 0.2, "method": "grpo"}},
        baseline="plain",
    )
    found = {arm.name: arm.choice.config for arm in plan(experiment).arms}
    assert {name: getattr(config.update.objective, "beta", None) for name, config in found.items()} == {
        "plain": 0.5,
        "whole": 0.04,
        "part": 0.2,
    }
    assert {config.steps for config in found.values()} == {3}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["rft", "a", "x-rft", "-".join(["a" * 60]), "b" * 64, "c" * 59 + "-grpo"])
def test_a_method_makes_a_valid_name_of_any_name(name: str, method: str) -> None:
    teacher = ["teacher.path=teacher"] if method == "distillation" else []
    made = choose("arithmetic_smoke", settings=[f"name={name}", f"method={method}", *teacher]).config.name
    assert made.endswith(f"-{method}")
    assert len(made) <= 64
    assert made[0] == name[0]


def test_arms_and_seeds_of_long_names_make_valid_names_of_their_own() -> None:
    arms = {"a" * 64: {}, "a" * 63 + "b": {"steps": 3}}
    experiment = Experiment(
        name="e" * 64, asks="", base="arithmetic_smoke", arms=arms, baseline="a" * 64, seeds=(0, 10**12)
    )
    names = [arm.choice.config.name for arm in plan(experiment).arms]
    assert len(set(names)) == 4
    assert all(len(name) <= 64 for name in names)


def test_methods_are_compared_for_a_recipe_of_any_name(write: Write) -> None:
    for name in ("rft", "n" * 64):
        file = write(arithmetic_smoke().override({"name": name}).to_yaml())
        names = [arm.choice.config.name for arm in method_experiment(str(file), ["grpo", "rft"], 2).arms]
        assert len(set(names)) == 4


@pytest.mark.parametrize("method", ["null", "[grpo]", "3", "grppo"])
def test_what_is_not_a_method_is_refused(method: str) -> None:
    with pytest.raises(ConfigError, match=r"method .* is unknown"):
        choose("arithmetic_smoke", settings=[f"method={method}"])


# ------------------------------------------------------------------------------------- what the record keeps


def asked_of(choice: Choice) -> list[tuple[str, Any, str, bool]]:
    return [(each.setting, each.value, each.source, each.undone) for each in choice.asked.overrides]


def recorded(places: Places, choice: Choice) -> RunRecord:
    RunRecord.begin(places, choice.config, command="cohort run", engine="inline", asked=choice.asked)
    (record,) = read_records(places)
    return record


def shown_of(record: RunRecord, places: Places, choice: Choice) -> str:
    console = Console(width=300, file=io.StringIO(), record=True)
    history = History(record=record, config=choice.config, ledger=Ledger(), points={}, note="")
    show_run(places.open_store(), history, console, limit=None)
    return console.export_text()


def test_the_choice_keeps_every_override_in_order_with_its_source(write: Write) -> None:
    mine, more = write("recipe: gsm8k_cpu\nname: gsm8k_one_gpu\nseed: 3\n"), write("rollout: {G: 8}\n")
    choice = choose(str(mine), [more], ["rollout.G=4", "sft.max_steps=2", "sft=null"], method="gspo")
    assert choice.asked.recipe == "gsm8k_cpu"
    assert asked_of(choice) == [
        ("name", "gsm8k_one_gpu", str(mine), True),  # the method adds its own
        ("seed", 3, str(mine), False),
        ("method", "gspo", "--method", False),
        ("rollout.G", 8, str(more), True),
        ("rollout.G", 4, "--set", False),
        ("sft.max_steps", 2, "--set", True),
        ("sft", None, "--set", False),
    ]
    assert [each.setting for each in choice.dropped()] == ["name", "sft.max_steps"]


def test_an_override_that_another_kind_drops_is_said_to_have_no_effect() -> None:
    part, kind = "update.objective.eps_low=0.5", "update.objective.kind=gspo"
    assert choose("arithmetic_smoke", settings=[kind, part]).dropped() == []
    assert [each.setting for each in choose("arithmetic_smoke", settings=[part, kind]).dropped()] == [part[:-4]]


def test_a_method_that_a_later_one_replaces_is_undone() -> None:
    choice = choose("arithmetic_smoke", settings=["method=rft"], method="gspo")
    assert [(value, undone) for _, value, _, undone in asked_of(choice)] == [("gspo", True), ("rft", False)]
    assert choice.config.name == "arithmetic_smoke-rft"


def test_a_section_that_a_later_part_refines_is_not_undone() -> None:
    choice = choose("arithmetic_smoke", settings=["rollout={G: 8}", "rollout.G=4", "sft=null", "sft.max_steps=2"])
    assert [undone for *_, undone in asked_of(choice)] == [False, False, False, False]


def test_a_deployments_form_is_recorded_as_changes_of_what_was_deployed() -> None:
    deployed = choose("arithmetic_smoke", settings=["rollout.G=8"], method="gspo")
    edited = deployed.config.override({"rollout.G": 6, "sft": None, "update.objective": {"kind": "dapo"}})
    choice = choice_of(edited, Asked.parse(deployed.asked.model_dump(mode="json")), "the run's parameters")
    assert choice.config == edited
    assert choice.base == arithmetic_smoke()
    assert asked_of(choice)[:2] == [("method", "gspo", "--method", False), ("rollout.G", 8, "--set", True)]
    more = {(setting, value) for setting, value, source, _ in asked_of(choice) if source == "the run's parameters"}
    assert {("rollout.G", 6), ("sft", None), ("update.objective.kind", "dapo")} <= more


def test_the_record_keeps_what_was_asked_and_show_names_that_recipe(tmp_path: Path, write: Write) -> None:
    mine = write("recipe: arithmetic_cpu\nname: arithmetic_smoke\nsft.max_steps: 5\n")
    choice = choose(str(mine), settings=["sft.max_steps=6", "rollout.G=4"])
    places = Places(tmp_path / "root")
    record = recorded(places, choice)
    assert (record.attempts[-1].start.recipe, len(record.attempts[-1].start.overrides)) == ("arithmetic_cpu", 4)
    shown = shown_of(record, places, choice)
    assert "differs from the recipe arithmetic_cpu in" in shown
    rows = [line.split()[:2] for line in shown.splitlines()]
    assert rows.index(["sft.max_steps", "5"]) < rows.index(["sft.max_steps", "6"]) < rows.index(["rollout.G", "4"])
    assert "(undone by a later one)" in shown


def test_overrides_of_a_complete_file_are_shown_and_the_recipe_is_a_guess(tmp_path: Path, write: Write) -> None:
    mine = write(RECIPES["gsm8k_cpu"]().override({"name": "gsm8k_one_gpu"}).to_yaml())
    choice, places = choose(str(mine), settings=["steps=3"]), Places(tmp_path / "root")
    shown = shown_of(recorded(places, choice), places, choice)
    assert f"made from {mine} by, in this order" in shown
    assert ["steps", "3", "--set"] in [line.split() for line in shown.splitlines()]
    assert "differs from the nearest recipe, gsm8k_cpu, in" in shown


def test_overrides_of_a_record_of_others_are_shown_escaped(tmp_path: Path) -> None:
    choice, places = choose("arithmetic_smoke", settings=["seed=3"]), Places(tmp_path)
    record = recorded(places, choice)
    record.attempts[-1].start.overrides[:] = [
        {"setting": "\x1b[2J[red]a", "value": "\x9b2J", "source": "[link=x]b"},
        {},
    ]
    shown = shown_of(record, places, choice)
    assert not {"\x1b", "\x9b"} & set(shown)
    assert "\\u001b[2J[red]a" in shown
    assert "[link=x]b" in shown


def test_the_same_settings_make_an_equal_configuration_in_any_way(write: Write) -> None:
    ways = [
        choose("arithmetic_smoke", settings=["rollout.G=8", "steps=3"]),
        choose("arithmetic_smoke", [write("steps: 3\nrollout: {G: 8}")]),
        choose(str(write("recipe: arithmetic_smoke\nrollout.G: 2\nsteps: 3")), settings=["rollout.G=8"]),
        choose(str(write(RECIPES["arithmetic_smoke"]().override({"rollout.G": 8, "steps": 3}).to_yaml()))),
    ]
    assert all(choice.config == ways[0].config for choice in ways)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("no_such_rewards:reward", "function 'no_such_rewards:reward': no module 'no_such_rewards' in"),
        ("my_rewards:rewrad", "it has no 'rewrad'; did you mean 'reward'?"),
        ("broken_rewards:reward", "not Python source"),
    ],
)
def test_a_function_that_is_not_there_is_found_with_the_configuration(
    function: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("def reward(completions, **columns):\n    raise SystemExit\n")
    (tmp_path / "broken_rewards.py").write_text("def reward(completions:\n")
    for setting in (
        "reward.components=[{kind: function, function: '%s'}]",
        "environment={kind: function, function: '%s', call_ends: [m]}",
    ):
        with pytest.raises(ConfigError) as caught:
            choose("arithmetic_smoke", settings=[setting % function])
        assert said in str(caught.value)
        choose("arithmetic_smoke", settings=[setting % "my_rewards:reward"])


@pytest.mark.parametrize("kind", ["verifiers, name: my-environment", "openenv, url: 'http://127.0.0.1:1'"])
def test_an_environment_of_a_package_that_is_not_there_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VERIFIERS", "OPENENV"):
        monkeypatch.setattr(f"stages.environment.config.{name}", "0.0")
    with pytest.raises(ConfigError, match=r"expected the package [a-z-]+ 0\.0"):
        choose("arithmetic_smoke", settings=[f"environment={{kind: {kind}}}"])
