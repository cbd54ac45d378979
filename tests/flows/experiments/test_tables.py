"""Methods side by side: which arms there are, what the tables say, and that they fit the screen."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.cli import run_command
from flows.config.methods import METHODS, PAPER
from flows.config.resolve import choose
from flows.experiments.ablation import tables_file
from flows.experiments.arms import Arm, method_experiment
from flows.experiments.results import RunResult
from flows.experiments.tables import Outcome, comparison_markdown, print_comparison
from flows.runs.paths import Places
from flows.runs.record import read_records
from flows.runs.state import RunState
from flows.runs.summary import summarise
from pipeline.config import ConfigError
from pipeline.residency import evict
from stages.models import Checkpoint
from tests.flows.short_runs import options, smoke

COSTLY = {
    "rollout/samples": 40960.0,
    "rollout/tokens": 1_234_567.0,
    "rollout/seconds": 4000.0,
    "time/update": 300.0,
    "memory/update_mb": 12345.6,
    "memory/tensors_mb": 2345.67,
}


def outcome(arm: Arm, before: float, after: float, cost: float = 1.0) -> Outcome:
    """An arm whose accuracies are given, and whose only step cost `cost` times a lot."""
    points = {
        0: {"eval/in_domain/greedy_accuracy": before, "eval/in_domain/accuracy": before / 2},
        1: {key: cost * value for key, value in COSTLY.items()}
        | {
            "critic/parameters": 7_000_000_000.0,
            "eval/in_domain/greedy_accuracy": after,
            "eval/in_domain/accuracy": after / 2,
        },
    }
    state = RunState(steps=1, clock=lambda: 0.0)
    done = summarise(arm.choice.config, points, state, Checkpoint("ab" * 32), {})
    of_run = {"arm": arm.name, "seed": arm.seed, "name": arm.choice.config.name, "folder": "run", "error": ""}
    figures = {"before": done.before, "final": done.after, "best": done.best, "cost": done.cost}
    return Outcome(arm, RunResult.parse({**of_run, "status": "finished", "steps": 1, "policy": done.policy, **figures}))


def arms_of(recipe: str, methods: Sequence[str], seeds: int, **changes: Any) -> tuple[Arm, ...]:
    return method_experiment(recipe, methods, seeds, **changes).arms


def markdown(compared: list[Outcome], command: str = "cohort compare") -> str:
    return comparison_markdown(compared, command, name="arithmetic_smoke-methods")


def outcomes(methods: tuple[str, ...] = PAPER, seeds: int = 2, **changes: Any) -> list[Outcome]:
    arms = arms_of("arithmetic_smoke", methods, seeds, **changes)
    return [outcome(arm, 0.25, 0.5 + arm.seed / 8, cost=1 + arm.seed) for arm in arms]


def printed(compared: list[Outcome], width: int) -> str:
    text = io.StringIO()
    print_comparison(compared, Console(file=text, width=width, force_terminal=False))
    return text.getvalue()


# ------------------------------------------------------------------------------------- arms


def test_an_arm_is_a_method_with_a_seed_counted_up_from_the_recipes() -> None:
    arms = arms_of("arithmetic_smoke", ["grpo", "sft"], 2, settings=["seed=5"])
    assert [(arm.name, arm.seed, arm.choice.config.seed) for arm in arms] == [
        ("grpo", 5, 5),
        ("sft", 5, 5),
        ("grpo", 6, 6),
        ("sft", 6, 6),
    ]
    assert len({arm.choice.config.name for arm in arms}) == 4


def test_an_arm_trains_what_the_command_for_one_method_trains() -> None:
    settings = ["rollout.max_output_tokens=30", "name=mine"]
    (arm,) = arms_of("arithmetic_smoke", ["dr_grpo"], 1, settings=settings)
    alone = choose("arithmetic_smoke", settings=settings, method="dr_grpo").config
    assert arm.choice.config == alone.override({"name": "mine-dr_grpo-s0"})


def test_a_setting_that_a_method_does_not_know_is_refused_before_any_run() -> None:
    with pytest.raises(ConfigError, match=r"update\.objective\.beta: unknown key"):
        arms_of("arithmetic_smoke", ["grpo", "sft"], 1, settings=["update.objective.beta=0.5"])


# ------------------------------------------------------------------------------------- tables


def test_a_cell_is_the_mean_over_seeds_with_its_range() -> None:
    text = markdown(outcomes(("grpo", "ppo"), seeds=3))
    rows = [line for line in text.splitlines() if line.startswith("| grpo |")]
    # Seeds 0, 1, 2 end at 0.5, 0.625, 0.75 greedily and at half of that by samples.
    assert rows[-2] == "| grpo | 0.250 | 0.625 (0.500-0.750) | 0.125 | 0.312 (0.250-0.375) | 0.312 (0.250-0.375) |"
    assert "81,920 (40,960-122,880)" in rows[-1]


def test_one_seed_has_no_range() -> None:
    text = markdown(outcomes(("grpo",), seeds=1))
    assert "| grpo | 0.250 | 0.500 | 0.125 | 0.250 | 0.250 |" in text
    assert "accuracy, seed 0" in text


@pytest.mark.parametrize("width", [120, 80])
def test_a_table_too_wide_for_the_screen_is_split_between_columns(width: int) -> None:
    compared = outcomes(tuple(name for name in METHODS if name != "distillation"))  # it needs a teacher
    lines = printed(compared, width).splitlines()
    assert max(map(len, lines)) <= width
    assert not [line for line in lines if "…" in line]
    cells = {cell.strip() for line in lines for cell in re.split("[│┃]", line)}
    written = markdown(compared).split("## in_domain")[1].splitlines()
    expected = {cell.strip() for line in written if line.startswith("| ") for cell in line.split("|")}
    assert expected <= cells
    headings = [line for line in lines if line.startswith("┃")]
    assert all("arm" in line for line in headings)
    assert len(headings) == {120: 4, 80: 7}[width]


def test_the_file_says_what_was_compared() -> None:
    compared = outcomes(("grpo", "sft"), settings=["rollout.G=8"])
    text = markdown(compared, "cohort compare arithmetic_smoke --set rollout.G=8")
    assert text.startswith("# arithmetic_smoke-methods: grpo, sft\n")
    assert "`cohort compare arithmetic_smoke --set rollout.G=8`" in text
    assert "2 x 2 steps of 4 questions x 8 outputs, seeds 0, 1." in text
    assert "| `rollout.G` | 4 | 8 |" in text
    assert "| grpo | - | `arithmetic_smoke-grpo-s0`, `arithmetic_smoke-grpo-s1` |" in text
    sft = "| sft | `data_source=demonstrations`, `advantage.kind=one`, `update.objective.kind=sft` |"
    assert sft in text


def test_the_file_lists_of_a_critic_only_what_the_policy_does_not_have() -> None:
    settings = ["critic.mu=3"]
    text = markdown(outcomes(("ppo",), settings=settings) + outcomes(("grpo",)))
    (line,) = [line for line in text.splitlines() if line.startswith("| ppo |") and "critic" in line]
    assert re.findall(r"`(critic[^`]*)`", line) == ["critic.mu=3"]


def test_another_set_of_arms_has_another_file(tmp_path: Path) -> None:
    places = Places(tmp_path)
    sets = [
        method_experiment("arithmetic_smoke", ["grpo"], 1),
        method_experiment("arithmetic_smoke", ["grpo"], 2),
        method_experiment("arithmetic_smoke", ["grpo"], 1, settings=["steps=3"]),
    ]
    assert len({tables_file(places, planned.experiment.name) for planned in sets}) == 3


# ------------------------------------------------------------------------------------- the command


TINY = ["iterations=1", "steps=1", "sft.max_steps=2", "sft.decay_steps=1", "evaluation.every=0"]
SETTINGS = options(TINY)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("COHORT_DEBUG", "0")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("artifacts")
    evict()


def compare(root: Path, *arguments: str) -> int:
    methods = ["--method", "ppo", "--method", "sft", "--seeds", "2"]
    place = ["--engine", "inline", "--root", str(root)]
    return run_command(["compare", "arithmetic_smoke", *methods, *SETTINGS, *place, *arguments])


def executed(root: Path) -> dict[str, list[int]]:
    """Stages computed by each attempt of each run."""
    return {record.name: [attempt.executed for attempt in record.attempts] for record in read_records(Places(root))}


@pytest.mark.slow
def test_compare_trains_every_arm_and_a_second_call_computes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(root) == 0
    first = capsys.readouterr().out
    counts = executed(root)
    assert sorted(counts) == [f"arithmetic_smoke-{method}-s{seed}" for method in ("ppo", "sft") for seed in (0, 1)]
    assert all(count[0] > 0 for count in counts.values())
    (file,) = (root / "runs").glob("*/tables.md")
    text = file.read_text()
    assert str(file) in first
    assert "in_domain: accuracy, mean (range) over seeds 0, 1" in first
    assert "critic parameters" in first

    assert compare(root) == 0
    second = capsys.readouterr().out
    assert {name: count[1] for name, count in executed(root).items()} == dict.fromkeys(counts, 0)
    tables = [said[said.index("in_domain: accuracy") : said.index("stage calls:")] for said in (first, second)]
    assert tables[0] == tables[1]
    assert file.read_text() == text


@pytest.mark.slow
def test_the_summary_of_a_run_without_rewards_or_kl_can_be_read(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(root)
    (folder,) = (root / "runs").glob("arithmetic_smoke-sft-s0-*/")
    summary = json.loads((folder / "summary.json").read_text())
    assert not any("reward/mean" in point for point in summary["curve"].values())
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert run_command(["show", "arithmetic_smoke-sft-s0", "--root", str(root)]) == 0
    assert run_command(["runs", "--root", str(root)]) == 0
    assert "arithmetic_smoke-sft-s0" in capsys.readouterr().out


def test_methods_lists_every_method_whole_also_on_a_narrow_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_command(["methods"]) == 0
    out = capsys.readouterr().out
    assert [name for name in METHODS if f"│ {name} " not in out] == []
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_check_says_what_a_method_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["check", "arithmetic_smoke", "--method", "rloo"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["advantage.baseline", "mean", "leave_one_out"] in lines
    assert ["update.objective.kind", "grpo", "rloo"] in lines


@pytest.mark.slow
def test_run_trains_by_the_method_and_says_so(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*smoke(root, *TINY), "--method", "online_rft"]) == 0
    assert "arithmetic_smoke-online_rft" in capsys.readouterr().out
    record = list(read_records(Places(root)))[-1]
    assert (record.name, record.attempts[-1].status) == ("arithmetic_smoke-online_rft", "finished")


@pytest.mark.parametrize("name", ["run", "check", "compare"])
def test_an_unknown_method_exits_with_2_and_the_nearest_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = [] if name == "check" else ["--root", str(tmp_path)]
    assert run_command([name, "arithmetic_smoke", "--method", "rlo", *root]) == 2
    assert "method 'rlo' is unknown; did you mean 'rloo'?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_help_of_compare_shows_how_to_name_several_methods_and_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["compare", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--method grpo --method ppo" in out
    assert "mean (lowest-highest)" in out
