"""Configs: every error at once with its nearest name, overrides by dotted key, YAML there and back, keys of results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from pipeline.config import UNKEYED, Config, ConfigError, Override, changes_of, flatten, parse_settings


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
def test_an_unknown_key_comes_with_the_nearest_name_of_its_section(values: dict[str, object], line: str) -> None:
    assert complaint(values).splitlines()[1].strip() == line


def test_a_field_whose_default_alone_changes_keeps_its_documentation() -> None:
    class Marks(Config):
        opens: str
        """Text that begins."""

    class Round(Marks):
        opens: str = "("

    class Square(Round):
        opens: str = "["
        """Another text."""

    assert Round.model_fields["opens"].description == "Text that begins."
    assert Round.model_json_schema()["properties"]["opens"]["description"] == "Text that begins."
    assert Square.model_fields["opens"].description == "Another text."
    assert Marks.model_fields["opens"].is_required()


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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["objective={kind: dpo, label_smoothing: 0.2}", "objective.beta=0.9"], DPO(beta=0.9, label_smoothing=0.2)),
        (["objective.beta=0.9", "objective={kind: dpo, label_smoothing: 0.2}"], DPO(label_smoothing=0.2)),
        (["objective.eps=0.9", "objective={kind: grpo}"], GRPO()),
        (["objective.eps=0.9", "objective.kind=dpo", "objective.kind=grpo"], GRPO()),
        (["objective.eps=0.9", "objective.eps=0.3", "objective.kind=grpo"], GRPO(eps=0.3)),
        (["objective.eps=0.9", "objective=null", "objective.beta=0.3"], GRPO(beta=0.3)),
        (["objective=null", "objective.beta=0.3", "objective.kind=dpo"], DPO()),
        (["objective={beta: 0.3}", "objective.kind=dpo"], DPO(beta=0.3)),  # not another kind: there was none
        (["objective.eps.x=1", "objective.eps=0.3"], GRPO(eps=0.3)),
        (["objective.eps.x=1", "objective.kind=dpo"], DPO()),
        (["objective.eps=0.9", "objective.beta=0.7", "objective.kind=dpo"], DPO(beta=0.1)),
        (["objective.kind=dpo", "objective.verifier.strict=true"], DPO(verifier=Verifier(strict=True))),
        (["objective.verifier.strict=true", "objective.kind=dpo"], DPO()),
        (["objective.eps=0.9", "objective.kind=grpo"], GRPO(eps=0.9)),
    ],
)
def test_settings_are_applied_one_after_the_other(settings: list[str], expected: GRPO | DPO) -> None:
    assert Study().override(parse_settings(settings)).objective == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["reference.strict=true", "reference=null"], None),
        (["reference.strict=true", "reference=null", "reference.deadline=1"], Verifier(deadline=1.0)),
        (["reference={strict: true, deadline: 5}", "reference={deadline: 1}"], Verifier(deadline=1.0)),
        (["reference={strict: true}", "reference={}"], Verifier()),
        (["reference=null", "reference.strict=true"], Verifier(strict=True)),
        (["reference.strict=true"], Verifier(strict=True)),
    ],
)
def test_null_and_wholes_forget_what_was_set_before(settings: list[str], expected: Verifier | None) -> None:
    assert Study().override(parse_settings(settings)).reference == expected


def one_after_the_other(values: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """The reference: one change, by recursion."""
    name, *rest = path
    if rest:
        begun = {"kind": "grpo"} if name == "objective" else {}  # the field's default
        section = values[name] if isinstance(values.get(name), dict) else begun
        return {**values, name: one_after_the_other(section, rest, value)}
    another_kind = name == "kind" and values.get("kind", value) != value
    return {"kind": value} if another_kind else {**values, name: value}


PART = st.one_of(st.none(), st.just(0.5), st.just(True), st.just({}))
WHOLE = st.sampled_from([{"kind": "dpo", "beta": 0.3}, {"kind": "grpo"}, {"eps": 0.7}, {"verifier": {"strict": True}}])
SECTIONS = st.sampled_from(["objective", "objective.verifier", "reference"])
FIELDS = st.sampled_from(["eps", "beta", "label_smoothing", "verifier", "strict", "deadline", "strict.x"])
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.builds("{}.{}".format, SECTIONS, FIELDS), PART),
        st.tuples(SECTIONS, st.one_of(st.none(), st.just({}), WHOLE)),
        st.tuples(st.just("objective.kind"), st.sampled_from(["dpo", "grpo"])),
    ),
    max_size=6,
)


@given(CHANGES)
def test_overrides_equal_a_plain_loop_over_the_changes(changes: list[tuple[str, Any]]) -> None:
    values = Study().model_dump(mode="json")
    for key, value in changes:
        values = one_after_the_other(values, key.split("."), value)
    asked = [Override(key, value) for key, value in changes]
    try:
        expected = Study.parse(values)
    except ConfigError:
        with pytest.raises(ConfigError):
            Study().override(asked)
    else:
        assert Study().override(asked) == expected


def test_an_error_says_which_change_it_is_from() -> None:
    changes = [
        Override("G", 8, "a.yaml"),
        Override("G", -1, "--set"),
        Override("G_", 1, "c.yaml"),
        Override("objective", {"kind": "dpo", "eps": 1}, "a.yaml"),
        Override("reference.strikt", True, "b.yaml"),
        Override("workers.x", 1, "c.yaml"),
        Override("workers", 2, "--set"),
    ]
    with pytest.raises(ConfigError) as caught:
        Study().override(changes)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "G: Input should be greater than 0 (found -1) (from --set)",
        "objective.eps: unknown key; known keys: beta, kind, label_smoothing, verifier (from a.yaml)",
        "reference.strikt: unknown key; did you mean 'strict'? (from b.yaml)",
        "G_: unknown key; did you mean 'G'? (from c.yaml)",
    ]


def test_a_value_that_later_changes_write_into_stays_as_it_was_given() -> None:
    whole = {"kind": "dpo", "verifier": {"strict": True}}
    Study().override([Override("objective", whole), Override("objective.verifier.strict", False)])
    assert whole == {"kind": "dpo", "verifier": {"strict": True}}


def test_a_section_given_anew_without_a_kind_is_refused_with_the_kinds() -> None:
    with pytest.raises(ConfigError, match=r"objective: a section given anew names its kind, one of dpo, grpo .*--set"):
        Study().override(parse_settings(["objective={beta: 0.3}"]))


def test_nested_mappings_are_changes_of_parts_with_the_kind_first() -> None:
    values = {"objective": {"beta": 0.3, "kind": "dpo"}, "G": 8, "reference": None, "verifiers": [{}], "labels": {}}
    assert list(changes_of(values, "a.yaml")) == [
        Override("objective.kind", "dpo", "a.yaml"),
        Override("objective.beta", 0.3, "a.yaml"),
        Override("G", 8, "a.yaml"),
        Override("reference", None, "a.yaml"),
        Override("verifiers", [{}], "a.yaml"),
        Override("labels", {}, "a.yaml"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"G.x": 1}, r"G\.x: G is a value \(64\), not a section"),
        ({"objective.epz": 1}, r"objective\.epz: unknown key; did you mean 'eps'\?"),
    ],
)
def test_an_override_of_what_is_not_there_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Study().override(changes)


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
    code = (
        "from pipeline.config import Config\nclass Study(Config):\n    labels: frozenset[str]\n"
        "print(Study(labels=frozenset('abcdefgh')).key()['labels'])"
    )
    outputs = {
        subprocess.check_output(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, cwd=Path(__file__).parents[2], text=True
        )
        for seed in ("1", "2")
    }
    assert outputs == {"['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h']\n"}


def test_yaml_reads_back_to_an_equal_config_even_where_text_looks_like_a_number() -> None:
    for name in ("3e-4", "1e5", "no", "12:30", "null", "1.5", "数学", "a: b", "0x1F", " x"):
        config = Study(name=name, learning_rate=3e-4, objective=DPO(beta=1e-9), verifiers=[Verifier(strict=True)])
        assert Study.from_yaml(config.to_yaml()) == config


def test_yaml_anchors_and_merge_keys_work() -> None:
    text = "objective: &o {kind: grpo, eps: 0.3}\nverifiers: [&v {strict: true}, {<<: *v, deadline: 1}]"
    config = Study.from_yaml(text)
    assert config.verifiers == [Verifier(strict=True), Verifier(strict=True, deadline=1.0)]


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)
MERGED = "m0: &m0 {k: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("G: 1\nname: x\nG: 2\n", "line 3: the key 'G' occurs twice"),
        ("objective: {kind: grpo, eps: 1, eps: 2}", "the key 'eps' occurs twice"),
        ("name: a\nG: 0640\n", "line 2: 0640 is a number of base 8 or 60"),
        (BOMB, "more than 100,000 values"),
        (MERGED, "more than 100,000 values"),
        ("a: &a [*a]", "an alias refers to a value that it is part of"),
        ("a: &a {b: {c: *a}}", "an alias refers to a value that it is part of"),
        ("a: " + "[" * 1000 + "]" * 1000, "nested too deeply"),
        ("a: 2001-13-45", "month must be in 1..12"),
        ("a: " + "9" * 5000, "limit"),
        *((text, "") for text in ("- 1\n- 2", "G: [1", "just text", "", "? [a]\n: 1")),
        ("!!python/object/apply:os.getcwd []", ""),
    ],
    ids=lambda text: text.partition("\n")[0][:20],
)
def test_yaml_that_is_ambiguous_endless_or_no_mapping_is_refused_by_source(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)^study\.yaml: .*{message}"):
        Study.from_yaml(text, source="study.yaml")


def test_settings_are_yaml_values_and_3e_4_is_a_number() -> None:
    settings = ["a=3e-4", "b=[1, 2e5]", "c=true", "d=x=y", "e=", "f={k: 1}", 'g="3e-4"', "h=1e", " i =-2E+3", "j=0.5"]
    read = parse_settings(settings)
    assert {change.key: change.value for change in read} == {
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
    assert isinstance(read[0].value, float)
    assert parse_settings(["a=1", "b=2", "a=3"]) == [("a", 1, "--set"), ("b", 2, "--set"), ("a", 3, "--set")]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("G", "expected key=value"),
        ("=1", "expected key=value"),
        ("G=[1", "'\\[1' cannot be read: not valid YAML"),
        ("G=010", "010 is a number of base 8 or 60"),
        ("G=[1, -007]", "-007 is a number of base 8 or 60"),
        ("G=1:30", "1:30 is a number of base 8 or 60"),
        ("G=12:30.5", "12:30.5 is a number of base 8 or 60"),
        ("a={b: 1, b: 2}", "twice"),
    ],
)
def test_a_setting_that_cannot_be_read_names_itself(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings([setting])


def test_zeros_decimals_and_prefixed_numbers_are_read_as_they_look() -> None:
    settings = ["a=0", "b=0.5", "c=0x1F", "d=1_000", "e='010'", "f=0e1", "g=-0"]
    assert [change.value for change in parse_settings(settings)] == [0, 0.5, 31, 1000, "010", 0.0, 0]


def test_a_config_is_frozen_and_refuses_values_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Study().G = 1  # type: ignore[misc]
    assert "learning_rate" in complaint({"learning_rate": float("nan")})


def test_flatten_gives_dotted_keys_and_keeps_lists_and_empty_sections() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": {}}) == {"a.b.c": 1, "a.d": [1, {"e": 2}], "f": {}}
