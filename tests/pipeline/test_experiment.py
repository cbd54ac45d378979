"""Experiments as data: arms and seeds become configs, everything wrong is found before anything runs, YAML there and back."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import Config, ConfigError, Override
from pipeline.experiment import Experiment, Trial, fitted_name, selected, trials


class Sampling(Config):
    G: int = 4
    """Outputs per question."""
    temperature: float = 1.0
    """Of the logits."""


class Demo(Config):
    seed: int = 0
    """Of everything."""
    steps: int = 10
    """How many."""
    rollout: Sampling = Sampling()
    """Sampling."""


def experiment(**changes: Any) -> Experiment:
    arms = {"usual": None, "many": {"rollout": {"G": 8}}, "hot": {"rollout.temperature": 2.0}}
    values = {"name": "eps", "asks": "Why?", "base": "demo", "arms": arms, "baseline": "usual", "seeds": [0, 7]}
    return Experiment.parse(values | changes)


def configure(changes: list[Override]) -> Demo:
    return Demo().override(changes, source="demo")


def summary(planned: list[Trial[Demo]]) -> list[tuple[str, int, int, float, int]]:
    return [(t.arm, t.seed, t.config.rollout.G, t.config.rollout.temperature, t.config.seed) for t in planned]


def test_every_arm_is_a_config_with_every_seed_seed_by_seed() -> None:
    assert summary(trials(experiment(), configure)) == [
        ("usual", 0, 4, 1.0, 0),
        ("many", 0, 8, 1.0, 0),
        ("hot", 0, 4, 2.0, 0),
        ("usual", 7, 4, 1.0, 7),
        ("many", 7, 8, 1.0, 7),
        ("hot", 7, 4, 2.0, 7),
    ]


def test_what_all_arms_have_in_common_comes_before_what_an_arm_sets() -> None:
    planned = trials(experiment(common={"steps": 3, "rollout": {"G": 6}}, seeds=[0]), configure)
    assert [(t.config.steps, t.config.rollout.G) for t in planned] == [(3, 6), (3, 8), (3, 6)]


def test_an_experiment_is_the_same_after_yaml_and_back() -> None:
    made = experiment(common={"steps": 3})
    assert Experiment.from_yaml(made.to_yaml()) == made
    assert made.changes("usual") == [("steps", 3, "common")]
    assert made.changes("many") == [("steps", 3, "common"), ("rollout.G", 8, "arm many")]


def test_the_overrides_of_an_arm_are_applied_in_the_order_written() -> None:
    arms = {
        "whole_last": {"rollout.G": 8, "rollout": {}, "steps": 3},
        "part_last": {"rollout": {}, "rollout.temperature": 2.0},
        "part_twice": {"rollout": {"G": 8, "temperature": 3.0}, "steps": 3, "rollout.G": 2},
    }
    planned = trials(experiment(arms=arms, common={"rollout.G": 6}, baseline="part_last", seeds=[0]), configure)
    assert [(t.config.rollout.G, t.config.rollout.temperature) for t in planned] == [(4, 1.0), (4, 2.0), (2, 3.0)]


def test_a_name_that_is_too_long_keeps_its_ends_and_stays_its_own() -> None:
    assert fitted_name("a" * 64) == "a" * 64
    first, second = fitted_name("a" * 60 + "x-dapo-s0"), fitted_name("a" * 60 + "y-dapo-s0")
    assert (len(first), len(second)) == (64, 64)
    assert first != second
    assert first.startswith("aaaa")
    assert first.endswith("-dapo-s0")


def test_yaml_with_an_object_of_python_in_it_is_refused() -> None:
    text = experiment().to_yaml().replace("G: 8", "G: !!python/object/apply:os.getpid []")
    with pytest.raises(ConfigError, match="not valid YAML"):
        Experiment.from_yaml(text)


def test_an_unknown_field_in_an_arm_is_named_with_the_arm_and_the_nearest_field() -> None:
    arms = {"usual": {}, "many": {"rollout.GG": 8}, "long": {"step": 3}}
    with pytest.raises(ConfigError) as caught:
        trials(experiment(arms=arms), configure)
    assert str(caught.value).splitlines() == [
        "experiment eps: nothing was run",
        "  arm many:",
        "    rollout.GG: unknown key; did you mean 'G'? (from the arm)",
        "  arm long:",
        "    step: unknown key; did you mean 'steps'? (from the arm)",
    ]


def test_what_is_wrong_in_the_same_way_in_several_arms_is_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        trials(experiment(common={"stops": 3}), configure)
    assert str(caught.value).splitlines()[1:] == [
        "  arms usual, many, hot:",
        "    stops: unknown key; did you mean 'steps'? (from common)",
    ]


def test_arms_that_come_to_equal_configs_are_one_trial_that_names_them_all() -> None:
    arms = {"a": {"steps": 10}, "b": {"steps": 5}, "c": {"rollout.G": 4}, "usual": {}}
    planned = trials(experiment(arms=arms), configure)
    # The baseline stands for those it equals.
    assert [(t.arm, t.also, t.seed) for t in planned] == [
        ("usual", ("a", "c"), 0),
        ("b", (), 0),
        ("usual", ("a", "c"), 7),
        ("b", (), 7),
    ]


def test_arms_are_selected_by_any_of_their_names() -> None:
    arms = {"usual": {}, "same": {"steps": 10}, "many": {"rollout.G": 8}, "hot": {"rollout.temperature": 2.0}}
    planned = trials(experiment(arms=arms), configure)
    assert [(t.arm, t.seed) for t in selected(planned, ["hot", "same"])] == [
        ("usual", 0),
        ("hot", 0),
        ("usual", 7),
        ("hot", 7),
    ]
    with pytest.raises(ConfigError, match="'hut' is not an arm; did you mean 'hot'"):
        selected(planned, ["hut"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seeds": [0, 1, 0]}, "seeds: 0 occurs 2 times"),
        ({"seeds": []}, "seeds: Tuple should have at least 1 item"),
        ({"seeds": [-1]}, "seeds.0: Input should be greater than or equal to 0"),
        ({"baseline": "usal"}, "baseline: 'usal' is not an arm; did you mean 'usual'?"),
        ({"arms": {}}, "arms: Dictionary should have at least 1 item"),
        ({"arms": {"usual": {}, "A b": {}}}, "arms: expected up to 64 letters a-z, digits and ._-, found 'A b'"),
        ({"arms": {"usual": 3}}, "arms.usual: Input should be a valid dictionary"),
        ({"arms": {"usual": {"seed": 3}}}, "arms.usual.seed: the seeds of an experiment are its own dimension"),
        ({"common": {"seed": 3}}, "common.seed: the seeds of an experiment are its own dimension"),
        ({"name": "../x"}, "name: expected up to 64 letters a-z, digits and ._-, found '../x'"),
        ({"armes": {}}, "armes: unknown key; did you mean 'arms'?"),
    ],
)
def test_an_experiment_that_makes_no_sense_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment(**changes)
    assert complaint in str(caught.value)


def test_a_key_that_stands_twice_in_the_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="'usual' occurs twice"):
        Experiment.from_yaml(experiment().to_yaml().replace("  many:", "  usual:"))
