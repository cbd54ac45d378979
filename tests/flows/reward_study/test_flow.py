"""`cohort reward-model`: what is learned from, what is measured on, the report, and that it is computed once."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.cli import run_command
from flows.reward_study.config import RewardModelStudyConfig, choose_study
from flows.reward_study.flow import Gauge, Study, reward_model_study
from flows.reward_study.run import print_study, study_markdown, verdicts
from pipeline.config import ConfigError
from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.tables import DataError, RewardLabels, Solutions, is_held_out
from tests.end_to_end.terminal import on_terminal

QUESTIONS, AUTHORS = 40, ("ann", "bob")
SMALL: dict[str, Any] = {
    "solutions.authors": list(AUTHORS),
    "held_out_share": 0.25,
    "demonstrations": None,
    "sft": None,
    "policy.settings.hidden_size": 16,
    "policy.settings.intermediate_size": 16,
    "policy.settings.num_hidden_layers": 1,
    "policy.settings.num_attention_heads": 2,
    "policy.settings.num_key_value_heads": 2,
    "policy.tokenizer": {"kind": "character"},
    "training.epochs": 1,
    "gauges.resamples": 100,
}


def rows() -> list[dict[str, Any]]:
    """Sums; ann is right in three of four, bob in one of three; the file's labels are true."""
    rng = random.Random(7)
    found = []
    for number in range(QUESTIONS):
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        right = {"ann": number % 4 > 0, "bob": number % 3 == 0}
        solved = {
            name: {"solution": f"{a}+{b}\nA: {a + b + (not good)}", "is_correct": good} for name, good in right.items()
        }
        found.append({"question": f"{number}: {a}+{b}?", "ground_truth": f"A: {a + b}", **solved})
    return found


def written(folder: Path, solutions: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in solutions)
    (folder / "gsm8k_example_model_solutions.jsonl").write_text(text, encoding="utf-8")
    return folder


def config(folder: Path, **changes: Any) -> RewardModelStudyConfig:
    settings = {**SMALL, "path": str(folder), **{key.replace("__", "."): value for key, value in changes.items()}}
    return choose_study("gsm8k_solutions").config.override(settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("data"), rows())


@pytest.fixture(scope="module")
def ran(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Study, Store]]:
    """Two seeds on the held-out questions."""
    with use_store(Store(tmp_path_factory.mktemp("study") / "store")) as store:
        yield reward_model_study(config(data, seeds=2)), store
    evict()


def asked(store: Store, stage: str) -> list[dict[str, Any]]:
    return [record for record in store.actions() if record["stage"] == stage]


def test_nothing_is_learned_from_the_questions_that_are_measured_on(ran: tuple[Study, Store]) -> None:
    study, store = ran
    with use_store(store):
        held_out = {row["question_id"] for row in Solutions(asked_part(store, start=0.0)).rows()}
        learned = {row["question_id"] for row in RewardLabels(asked(store, "label_outputs")[0]["result"]).rows()}
    assert len(held_out) == study.questions["measured"] == sum(is_held_out(row["question"], 0.25) for row in rows())
    assert learned.isdisjoint(held_out)
    assert len(learned) == study.questions["learned"] == QUESTIONS - len(held_out)


def asked_part(store: Store, *, start: float) -> str:
    (found,) = [record["result"] for record in asked(store, "take_solutions") if record["arguments"]["start"] == start]
    return str(found)


def test_model_and_baselines_are_measured_on_the_same_rows(ran: tuple[Study, Store]) -> None:
    study, store = ran
    measured = asked(store, "measure_discrimination")
    assert len(measured) == len(study.shortcuts) + 2
    assert len({json.dumps(record["arguments"]["rules"]) for record in measured}) == 1
    gain, model, length = (
        study.models[0]["auc_gain/length"].value,
        study.models[0]["auc"].value,
        study.shortcuts["length"]["auc"].value,
    )
    assert gain == pytest.approx(model - length)  # type: ignore[operator]


def test_author_baseline_is_at_chance_within_authors(ran: tuple[Study, Store]) -> None:
    study, _ = ran
    assert study.shortcuts["author"]["auc_within_authors"].value == 0.5
    assert study.shortcuts["author"]["auc"].value != 0.5


def test_each_seed_is_another_training_of_one_trunk(ran: tuple[Study, Store]) -> None:
    study, store = ran
    assert study.trained[0] != study.trained[1]
    assert len(asked(store, "create_reward_model")) == 1


def test_validation_leaves_the_held_out_questions_alone(data: Path, store: Store) -> None:
    study = reward_model_study(config(data, judged_on="validation", validation_share=0.3))
    texts = [row["question"] for row in rows()]
    between = {text for text in texts if is_held_out(text, 0.55) and not is_held_out(text, 0.25)}
    assert study.questions == {"learned": sum(not is_held_out(text, 0.55) for text in texts), "measured": len(between)}


def test_labels_that_the_rules_contradict_stop_the_study_or_are_a_warning(tmp_path: Path, store: Store) -> None:
    changed = rows()
    changed[3]["ann"]["is_correct"] = False
    folder = written(tmp_path, changed)
    with pytest.raises(
        DataError, match=r"contradict 1 of 80 labels .*: the file says wrong, the rules ok.*max_disagreement"
    ):
        reward_model_study(config(folder))
    with pytest.warns(UserWarning, match="contradict 1 of 80 labels"):
        study = reward_model_study(config(folder, max_disagreement=0.02))
    assert study.disagreement == 1 / 80


def test_solutions_beyond_the_limit_are_left_out_and_counted(tmp_path: Path, store: Store) -> None:
    changed = rows()
    changed[0]["ann"]["solution"] = "1" * 300
    study = reward_model_study(config(written(tmp_path, changed), max_tokens=100))
    assert sum(study.left_out.values()) == 1
    assert sum(study.rows.values()) == 2 * QUESTIONS - 1


def command(data: Path, root: Path) -> list[str]:
    overrides = root.parent / "small.yaml"
    overrides.write_text(json.dumps({**SMALL, "path": str(data)}), encoding="utf-8")  # JSON is YAML
    return ["reward-model", "gsm8k_solutions", "--config", str(overrides), "--engine", "inline", "--root", str(root)]


@pytest.mark.slow
def test_the_command_prints_tables_and_the_second_time_computes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    root = tmp_path / "artifacts"
    assert run_command(command(data, root)) == 0
    first = capsys.readouterr().out
    assert "baseline: length" in first
    assert "reward model, seed 0" in first
    (report,) = (root / "runs").glob("gsm8k_solutions-*.md")
    assert "| baseline: author |" in report.read_text()
    before = report.read_text()
    assert run_command(command(data, root)) == 0
    assert "\n0 stages computed" in capsys.readouterr().out
    assert report.read_text() == before
    for columns in (80, 200):
        code, shown = on_terminal(command(data, root), columns)
        assert (code, "\n0 stages computed" in shown.text) == (0, True)
    evict()


def test_a_recipe_that_is_none_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gsm8k_solutions'"):
        choose_study("gsm8k_solution")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"demonstrations": None}, "sft: imitates right solutions"),
        ({"held_out_share": 0.9, "validation_share": 0.2}, "leave no question to learn from"),
        ({"shortcuts": {"nothing": []}}, "'nothing' has no feature"),
        ({"reward.components": [{"kind": "accuracy"}, {"kind": "format"}]}, "'format' says nothing of the label"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_study("gsm8k_solutions").config.override(changes)


def test_a_printed_configuration_reads_back_as_it_is(tmp_path: Path) -> None:
    shown = tmp_path / "mine.yaml"
    shown.write_text(choose_study("gsm8k_solutions").config.to_yaml(), encoding="utf-8")
    assert choose_study(str(shown)).config == choose_study("gsm8k_solutions").config


def study(*intervals: tuple[float, float]) -> Study:
    """A study whose models' gauges all have the given intervals, one a seed."""
    gauges = [Gauge((low + high) / 2, low, high) for low, high in intervals]
    names = ("auc", "auc_within_authors", "pair_accuracy", "auc_gain/length", "auc_within_authors_gain/length")
    models = {seed: dict.fromkeys(names, gauge) for seed, gauge in enumerate(gauges)}
    counts = {"learned": 10, "measured": 5}
    return Study(
        counts, counts, {"learned": 0.5, "measured": 0.4}, {"learned": 0, "measured": 1}, 0.0, {"length": {}}, models
    )


@pytest.mark.parametrize(
    ("intervals", "chance", "length"),
    [
        (((0.55, 0.6), (0.51, 0.7)), "above", "above"),
        (((0.3, 0.45),), "below", "above"),
        (((0.45, 0.6),), "not separated", "above"),
        (((0.55, 0.6), (0.45, 0.6)), "not separated (above in 1, below in 0 of 2 seeds)", "above"),
        (((-0.2, -0.1),), "below", "below"),
    ],
)
def test_a_claim_needs_the_intervals_of_all_seeds(
    intervals: tuple[tuple[float, float], ...], chance: str, length: str
) -> None:
    against_chance, against_length = verdicts(study(*intervals))
    assert against_chance == f"against chance: AUC {chance}, within authors {chance}, pairs in order {chance}"
    assert against_length == f"against the baseline 'length': AUC {length}, within authors {length}"


def test_the_report_says_how_many_were_left_out_and_what_the_mean_of_seeds_is() -> None:
    text = io.StringIO()
    print_study(study((0.5, 0.7), (0.7, 0.9)), Console(file=text, width=160))
    assert "reward model, mean of seeds" in text.getvalue()
    markdown = study_markdown(study((0.5, 0.7), (0.7, 0.9)), choose_study("gsm8k_solutions"), "cohort reward-model")
    assert "Left out for their length: 0 and 1." in markdown
    assert "| reward model, mean of seeds | 0.700 | 0.700 | 0.700 |" in markdown
