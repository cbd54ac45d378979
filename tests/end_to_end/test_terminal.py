"""Runs and commands on a real terminal (a pseudo-terminal): they end as they do when piped, whatever the display meets."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import run_command
from flows.config.resolve import choose
from flows.runs.paths import Places
from flows.runs.record import read_record, read_records, run_folder
from pipeline.events import Event
from pipeline.residency import evict
from tests.end_to_end.terminal import Terminal, on_terminal, piped, terminal
from tests.flows.experiments.test_ablation import TINY as EXPERIMENT
from tests.flows.short_runs import options, smoke

TINY = ["iterations=1", "steps=2", "sft.max_steps=2", "sft.decay_steps=1", "evaluation.every=1", "evaluation.samples=2"]
SIZES = "data.evaluation.in_domain.count=4"


def run(root: Path, *arguments: str) -> list[str]:
    return [*smoke(root, *TINY, SIZES), *arguments]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, Terminal]]:
    """A root in which the tiny recipe ran once, on a terminal; the exit code, and what the terminal showed."""
    root = tmp_path_factory.mktemp("artifacts")
    code, shown = on_terminal(run(root), 100)
    evict()
    yield root, code, shown
    evict()


@pytest.fixture
def finished(fresh: tuple[Path, int, Terminal]) -> Path:
    """The root of the finished run."""
    return fresh[0]


def outcome(root: Path) -> dict[str, Any]:
    """What the tiny run left that must not depend on how it was shown."""
    config = choose("arithmetic_smoke", settings=[*TINY, SIZES]).config
    record = read_record(run_folder(Places(root), config))
    assert record is not None
    last = record.attempts[-1]
    return {"policy": record.policy, "steps": record.steps, "status": last.status, "error": last.error}


def tables(text: str) -> list[str]:
    """The lines of tables, without times and percentages, which differ from run to run.

    Of the table of times the rows of stages: those of what came between are there only where it took long enough.
    """
    shown, _, times = text.partition("where the time went")
    lines = [line for line in shown.splitlines() if "│" in line]
    lines += [line for line in times.splitlines() if re.match(r"│ [a-z_]+ +│", line)]
    return [" ".join(re.sub(r"\d+:\d\d min|[\d.]+ s\b|\d+%", "_", line).split()) for line in lines]


# ------------------------------------------------------------------------------------------------ runs


def test_a_fresh_run_on_a_terminal_ends_well(fresh: tuple[Path, int, Terminal]) -> None:
    root, code, shown = fresh
    assert code == 0, shown.text[-3000:]
    assert outcome(root)["status"] == "finished"
    assert re.search(r"step +0  in_domain: greedy 0\.\d{3}  sampled 0\.\d{3}", shown.text), (
        "each evaluation has its line"
    )
    assert "in_domain 0." in shown.text, "the moving part shows the last accuracy"
    assert "where the time went" in shown.text


def test_a_run_of_greedy_evaluations_only_ends_well_on_a_terminal(finished: Path, tmp_path: Path) -> None:
    root = shutil.copytree(finished, tmp_path / "root")
    code, shown = on_terminal(run(root, "--set", "evaluation.samples=0", "--set", "evaluation.estimates.ks=[1]"), 100)
    assert code == 0, shown.text[-3000:]
    assert re.search(r"in_domain 0\.\d{3}", shown.text)


@pytest.mark.parametrize(
    ("columns", "environment"),
    [(20, {}), (80, {}), (200, {}), (80, {"NO_COLOR": "1"}), (80, {"TERM": "dumb"})],  # a dumb terminal has 80 columns
    ids=["20", "80", "200", "no colours", "dumb"],
)
def test_a_cached_run_on_any_terminal_prints_what_it_prints_when_piped(
    finished: Path, columns: int, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = outcome(finished)
    code, shown = on_terminal(run(finished), columns, **environment)
    expected = piped(run(finished), columns, capsys)
    assert (code, tables(shown.text)) == (expected[0], tables(expected[1]))
    assert (code, outcome(finished)) == (0, before)
    if columns >= 80:
        assert any("update_policy" in line for line in tables(shown.text)), "the table of times is compared too"
    if environment:
        assert not re.search(r"\x1b\[[349]\d", shown.raw), "no colour is set"


def test_a_window_is_resized_while_a_run_goes_on_and_ctrl_c_interrupts_it(finished: Path) -> None:
    with terminal(100) as window:
        process = window.start(*run(finished, "--set", "steps=500"))
        window.wait_for(lambda text: "step   2  in_domain" in text)
        for step, columns in enumerate((30, 200), start=4):
            window.resize(columns, 10)
            window.wait_for(lambda text, step=step: f"step   {step}  in_domain" in text)
        window.type("\x03")
        assert process.wait(60) == 130
        window.wait_for(lambda text: "cohort run arithmetic_smoke" in text.rpartition("interrupted")[2], seconds=10)
        assert "Traceback" not in window.text
    (record,) = [record for record in read_records(Places(finished)) if record.total_steps == 500]
    assert record.attempts[-1].status == "interrupted"


def test_a_run_outlives_its_terminal_where_hangups_are_ignored(finished: Path) -> None:
    with terminal(100) as window:
        process = window.start(
            *run(finished, "--set", "steps=4"), before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN) and None
        )
        window.wait_for(lambda text: "arithmetic_smoke" in text)
        window.close()
        assert process.wait(120) == 0
    (record,) = [record for record in read_records(Places(finished)) if record.total_steps == 4]
    assert (record.attempts[-1].status, record.steps) == ("finished", 4)


# ------------------------------------------------------------------------------------------------ displays that fail


class Broken:
    """Raises whatever it is asked."""

    live = True

    def __init__(self, *_: Any) -> None:
        pass

    def take(self, event: Event) -> None:
        raise RuntimeError("the display cannot take anything")

    def note(self, topic: str, values: dict[str, Any]) -> None:
        raise RuntimeError("the display cannot note anything")

    def warn(self, message: str) -> None:
        raise RuntimeError("the display cannot warn")

    def close(self) -> None:
        raise RuntimeError("the display cannot close")

    def __rich__(self) -> str:
        raise RuntimeError("the display cannot draw")


def explode(*_: Any, **__: Any) -> Any:
    raise RuntimeError("nothing works here")


def failing(name: str) -> Callable[..., Any]:
    """Return a function that raises whatever it is given, and says its name."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"no {name} here")

    return fail


def test_a_display_that_raises_at_every_call_changes_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = outcome(finished)
    monkeypatch.setattr("flows.runs.display.Display", Broken)
    root = tmp_path / "root"
    code, shown = on_terminal(run(root), 100)
    assert (code, outcome(root)) == (0, before)
    live, _, summary = shown.text.partition("where the time went")
    for event in ("StageDone", "StepDone", "EvaluationDone"):
        assert [text.count(f"what follows {event} (") for text in (live, summary)] == [1, 1], "shown once"


@pytest.mark.parametrize(
    "places",
    [
        # In one run none of these keeps another from being called.
        (
            *("flows.commands.training._announce", "flows.runs.display.Live.start", "flows.runs.curve.Points._add"),
            *("flows.runs.ledger.Ledger.take", "flows.runs.session.summarise"),
        ),
        (
            *("flows.runs.display.Display._step", "flows.runs.display.Display._evaluation"),
            *("flows.runs.session.draw_learning_curve", "flows.commands.training.print_summary"),
            "flows.runs.session.write_text",
        ),
        (
            *("flows.runs.display.Display.__rich__", "flows.runs.display.Display.close"),
            *("flows.runs.session.completion_rows", "flows.runs.session.summary_markdown"),
            "flows.tracking.delivery.outcome_of",
        ),
        (
            "flows.runs.display._held_out",
            "flows.tracking.delivery.Sent.read",
        ),
    ],
    ids=lambda places: " ".join(place.rpartition(".")[2] for place in places),
)
def test_errors_of_views_are_a_warning_each_and_no_failure(
    places: tuple[str, ...], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = outcome(finished)
    root = shutil.copytree(finished, tmp_path / "root")
    for file in root.glob("runs/*/learning_curve.png"):
        file.unlink()  # so that it is drawn again
    for place in places:
        monkeypatch.setattr(place, failing(place))
    code, shown = on_terminal(run(root), 100)
    assert (code, outcome(root)) == (0, before)
    said = "".join(shown.text.split())
    assert [place for place in places if f"no{place}here".replace(" ", "") not in said] == []
    assert "(test_terminal.py:" in said, "a warning names the place"


# ------------------------------------------------------------------------------------------------ other commands


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize(
    "arguments",
    [
        ["recipes"],
        ["methods"],
        ["experiments"],
        ["check", "arithmetic_cpu", "--faithful"],
        ["check", "arithmetic_cpu", "--set", "rollout.G=0"],
        ["plan", "deepseekmath_7b", "--gpus", "8", "--gpu-memory", "80", "--root", "ROOT"],
        ["runs", "--root", "ROOT"],
        ["show", "RUN", "--root", "ROOT"],
        ["show", "RUN", "--step", "1", "--root", "ROOT"],
        ["diff", "RUN", "RUN", "--root", "ROOT"],
        ["lineage", "RUN", "--root", "ROOT"],
        ["explain", "update_policy", "--root", "ROOT"],
        ["replay", "estimate_advantages", "--run", "RUN", "--step", "1", "--set", "scale=none", "--root", "ROOT"],
        ["store", "du", "--root", "ROOT"],
        ["verify", "--root", "ROOT"],
        ["prompt", "arithmetic_smoke", "--question", "Compute 1+1."],
        ["grade", "ANSWERS"],
        ["export", "RUN", "FOLDER", "--root", "ROOT"],
        ["server", "status", "--root", "ROOT"],
    ],
    ids=" ".join,
)
def test_a_command_prints_on_a_terminal_what_it_prints_when_piped(
    arguments: list[str], columns: int, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = (file.parent for file in (finished / "runs").glob("*/summary.json") if steps_of(file) == 2)
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"gold": "4", "output": "#### 4", "expected": false}')
    places = {"ROOT": str(finished), "RUN": folder.name, "ANSWERS": str(answers), "FOLDER": str(tmp_path / "out")}
    words = [places.get(word, word) for word in arguments]
    if words[0] == "replay":
        run_command(words)  # it computes something the first time only
    code, shown = on_terminal(words, columns)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert (code, tables(shown.text)) == ((found := piped(words, columns, capsys))[0], tables(found[1]))


@pytest.mark.parametrize(
    ("arguments", "names_the_root"),
    [
        (["runs"], True),
        (["show", "RUN"], False),
        (["verify"], False),
        (["store", "du"], True),
        (["export", "RUN", "FOLDER"], True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_folder_named_like_markup_is_printed_as_it_is(
    arguments: list[str], names_the_root: bool, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(finished, tmp_path / "a [bold] [/dim] b")
    code, shown = on_terminal(run(root), 200)
    assert (code, "a [bold] [/dim] b" in shown.text) == (0, True)
    (folder,) = (file.parent for file in (root / "runs").glob("*/summary.json") if steps_of(file) == 2)
    words = [{"RUN": folder.name, "FOLDER": str(root / "out")}.get(word, word) for word in arguments]
    code, text = piped([*words, "--root", str(root)], 200, capsys)
    assert (code, "a [bold] [/dim] b" in text) == (0, names_the_root)


def steps_of(summary: Path) -> int:
    """Steps of a finished run."""
    return int(json.loads(summary.read_text())["steps"])


@pytest.mark.parametrize("columns", [80, 200])
def test_doctor_ends_on_a_terminal_as_when_piped(
    columns: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", "--quick", "--root", str(tmp_path)]
    code, shown = on_terminal(words, columns)
    assert code == piped(words, columns, capsys)[0]
    assert "Traceback" not in shown.text


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """A root in which a tiny experiment ran once, on a terminal, and the command."""
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(EXPERIMENT | {"seeds": [0]}))
    words = ["ablate", str(folder / "tiny.yaml"), "--engine", "inline", "--root", str(folder / "root")]
    code, shown = on_terminal(words, 80)
    assert code == 0, shown.text[-3000:]
    yield folder / "root", words
    evict()


def test_an_experiment_ends_well_on_a_terminal(
    studied: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    report = ["report", "tiny", "--root", str(studied[0])]
    for words in (studied[1], report):
        code, cached = on_terminal(words, 200)
        assert (code, tables(cached.text)) == (0, tables(piped(words, 200, capsys)[1]))


def test_a_comparison_ends_well_on_a_terminal(
    studied: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "arithmetic_smoke", "--method", "online_rft", "--engine", "inline", "--root", str(studied[0])]
    words += options(f"{key}={value}" for key, value in EXPERIMENT["common"].items())
    code, fresh = on_terminal(words, 80)
    assert code == 0, fresh.text[-3000:]
    code, cached = on_terminal(words, 200)
    assert (code, tables(cached.text)) == (0, tables(piped(words, 200, capsys)[1]))


def test_figures_and_tables_that_fail_leave_an_experiment_its_results(
    studied: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = studied[0] / "runs" / "tiny" / "report.html"
    report.unlink()
    monkeypatch.setattr("flows.experiments.ablation.draw_figures", explode)
    for place in ("print_comparison", "print_arms", "print_outcome"):
        monkeypatch.setattr(f"flows.commands.ablation.{place}", explode)
    with pytest.warns(UserWarning, match="nothing works here"):
        assert run_command(studied[1]) == 0
    assert report.is_file()
