"""Configs: every error at once with its nearest name, overrides by dotted key, YAML there and back, keys of results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from pipeline.config import UNKEYED, Config, ConfigError, flatten, parse_settings


class Verifier(Config):
    deadline: Annotated[float, UNKEYED] = 2.0
    """Seconds an answer may take."""
    strict: bool = False
    """Whether units must match."""


class GRPO(Config):
    kind: Literal["grpo"] = "grpo"
    """The objective."""
    eps: float = 0.2
    """Clip range."""
    beta: float = 0.04
    """KL coefficient."""


class DPO(Config):
    kind: Literal["dpo"] = "dpo"
    """The objective."""
    beta: float = 0.1
    """Temperature of the preference."""
    label_smoothing: float = 0.0
    """Share of flipped labels."""
    verifier: Verifier = Verifier()
    """Who labels."""


class Study(Config):
    G: int = Field(default=64, gt=0)
    """Outputs per question."""
    learning_rate: float = 1e-6
    """Of the policy."""
    workers: Annotated[int, UNKEYED] = 4
    """Processes of the verifier."""
    name: str = "a"
    """What people call it."""
    objective: GRPO | DPO = Field(default=GRPO(), discriminator="kind")
    """The row of Table 10."""
    verifiers: list[Verifier] = Field(default=[])
    """One for each answer format."""
    labels: frozenset[str] = frozenset()
    """Marks."""
    path: Path = Path("data")
    """Questions."""
    reference: Verifier | None = None
    """Optional part."""


def complaint(values: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as raised:
        Study.parse(values, source="study.yaml")
    return str(raised.value)


def test_all_errors_are_reported_at_once_each_with_its_dotted_key() -> None:
    text = complaint({"G": -1, "learning_rate": "fast", "objective": {"kind": "dpo", "verifier": {"strict": "maybe"}}})
    assert text.splitlines()[0] == "study.yaml: 3 errors in Study"
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == [
        "G",
        "learning_rate",
        "objective.verifier.strict",
    ]
    assert "found -1" in text
    assert "found 'fast'" in text


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"learning_rat": 1}, "learning_rat: unknown key; did you mean 'learning_rate'?"),
        ({"reference": {"strikt": 1}}, "reference.strikt: unknown key; did you mean 'strict'?"),
        ({"objective": {"kind": "grpo", "betta": 1}}, "objective.betta: unknown key; did you mean 'beta'?"),
        (
            {"objective": {"kind": "dpo", "label_smoth": 1}},
            "objective.label_smoth: unknown key; did you mean 'label_smoothing'?",
        ),
        (
            {"objective": {"kind": "dpo", "verifier": {"deadlin": 1}}},
            "objective.verifier.deadlin: unknown key; did you mean 'deadline'?",
        ),
        ({"verifiers": [{}, {"dedline": 1}]}, "verifiers.1.dedline: unknown key; did you mean 'deadline'?"),
        ({"objective": {"kind": "grpo", "zzz": 1}}, "objective.zzz: unknown key; known keys: beta, eps, kind"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_name_of_the_place_where_it_stands(
    values: dict[str, object], line: str
) -> None:
    assert complaint(values).splitlines()[1].strip() == line


def test_an_unknown_kind_names_the_known_ones() -> None:
    text = complaint({"objective": {"kind": "grppo"}})
    assert "objective" in text
    assert "'grpo', 'dpo'" in text


def test_an_override_changes_what_it_names_and_nothing_else() -> None:
    base = Study()
    changed = base.override({"objective.beta": 0.5, "G": 8})
    assert (changed.G, changed.objective.beta, changed.objective.kind) == (8, 0.5, "grpo")
    assert changed.override({"objective.beta": 0.04, "G": 64}) == base
    assert base.G == 64


def test_an_override_of_a_kind_starts_that_part_anew_whatever_the_order_of_the_changes() -> None:
    base = Study().override({"objective.eps": 0.9, "objective.beta": 0.7})
    assert base.override({"objective.kind": "dpo"}).objective == DPO(beta=0.1)
    for changes in (
        {"objective.label_smoothing": 0.3, "objective.kind": "dpo", "objective.verifier.strict": True},
        {"objective.verifier.strict": True, "objective.kind": "dpo", "objective.label_smoothing": 0.3},
    ):
        assert base.override(changes).objective == DPO(label_smoothing=0.3, verifier=Verifier(strict=True))


def test_an_override_with_the_same_kind_keeps_the_other_values() -> None:
    assert Study().override({"objective.eps": 0.9}).override({"objective.kind": "grpo"}).objective == GRPO(eps=0.9)


def test_a_whole_section_is_overridden_before_its_parts() -> None:
    changed = Study().override({"objective.beta": 0.9, "objective": {"kind": "dpo", "label_smoothing": 0.2}})
    assert changed.objective == DPO(beta=0.9, label_smoothing=0.2)


def test_an_override_can_fill_a_section_that_is_absent() -> None:
    assert Study().override({"reference.strict": True}).reference == Verifier(strict=True)


def test_an_override_below_a_plain_value_says_so() -> None:
    with pytest.raises(ConfigError, match=r"G\.x: G is a value \(64\), not a section"):
        Study().override({"G.x": 1})


def test_an_override_of_an_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"objective\.epz: unknown key; did you mean 'eps'\?"):
        Study().override({"objective.epz": 1})


def test_the_key_holds_every_field_but_the_unkeyed_ones_at_any_depth() -> None:
    key = Study(objective=DPO(), verifiers=[Verifier()]).key()
    assert "workers" not in key
    assert key["verifiers"] == [{"strict": False}]
    assert key["objective"] == {
        "kind": "dpo",
        "beta": 0.1,
        "label_smoothing": 0.0,
        "verifier": {"strict": False},
    }
    assert key["path"] == "data"
    assert set(key) == set(Study.model_fields) - {"workers"}


def test_the_key_of_a_set_does_not_depend_on_the_process() -> None:
    code = "from tests_config_probe import Study; print(Study(labels=frozenset('abcdefgh')).key()['labels'])"
    probe = "import importlib.util as u, sys; s = u.spec_from_file_location('tests_config_probe', sys.argv[1]);"
    probe += (
        "m = u.module_from_spec(s); sys.modules['tests_config_probe'] = m; s.loader.exec_module(m); exec(sys.argv[2])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", probe, __file__, code],
            env={"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {"['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h']\n"}


def test_yaml_reads_back_to_an_equal_config_even_where_text_looks_like_a_number() -> None:
    for name in ("3e-4", "1e5", "no", "12:30", "null", "1.5", "数学", "a: b", "0x1F", " x"):
        config = Study(name=name, learning_rate=3e-4, objective=DPO(beta=1e-9), verifiers=[Verifier(strict=True)])
        assert Study.from_yaml(config.to_yaml()) == config


def test_yaml_with_a_key_twice_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"study.yaml: line 3: the key 'G' stands twice"):
        Study.from_yaml("G: 1\nname: x\nG: 2\n", source="study.yaml")
    with pytest.raises(ConfigError, match="the key 'eps' stands twice"):
        Study.from_yaml("objective: {kind: grpo, eps: 1, eps: 2}")


def test_yaml_anchors_and_merge_keys_work() -> None:
    text = "objective: &o {kind: grpo, eps: 0.3}\nverifiers: [&v {strict: true}, {<<: *v, deadline: 1}]"
    config = Study.from_yaml(text)
    assert config.verifiers == [Verifier(strict=True), Verifier(strict=True, deadline=1.0)]


@pytest.mark.parametrize(
    "text", ["- 1\n- 2", "G: [1", "just text", "", "? [a]\n: 1", "!!python/object/apply:os.getcwd []"]
)
def test_yaml_that_is_no_safe_mapping_is_a_config_error_naming_the_source(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^study\.yaml: "):
        Study.from_yaml(text, source="study.yaml")


def test_settings_are_yaml_values_and_3e_4_is_a_number() -> None:
    settings = ["a=3e-4", "b=[1, 2e5]", "c=true", "d=x=y", "e=", "f={k: 1}", 'g="3e-4"', "h=1e", " i =-2E+3", "j=0.5"]
    assert parse_settings(settings) == {
        "a": 0.0003,
        "b": [1, 200000.0],
        "c": True,
        "d": "x=y",
        "e": None,
        "f": {"k": 1},
        "g": "3e-4",
        "h": "1e",
        "i": -2000.0,
        "j": 0.5,
    }
    assert isinstance(parse_settings(["a=3e-4"])["a"], float)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("G", "expected key=value"),
        ("=1", "expected key=value"),
        ("G=[1", "'\\[1' is not YAML"),
        ("a={b: 1, b: 2}", "twice"),
    ],
)
def test_a_setting_that_cannot_be_read_names_itself(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings([setting])


def test_a_config_is_frozen_and_refuses_values_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Study().G = 1  # type: ignore[misc]
    assert "learning_rate" in complaint({"learning_rate": float("nan")})


def test_flatten_gives_dotted_keys_and_keeps_lists_and_empty_sections() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": {}}) == {"a.b.c": 1, "a.d": [1, {"e": 2}], "f": {}}
