"""The report: numbers are the results', questions are the same for all arms, nothing runs, and what is missing is said."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from flows.cli import run_command
from flows.experiments.figures import Figure
from flows.experiments.report import write_report
from flows.experiments.results import ExperimentResult, read_experiment, write_experiment
from flows.inspection.groups import completion_rows, groups_made, last_evaluation
from flows.runs.paths import Places
from pipeline.residency import evict
from pipeline.store import Store, StoreError, use_store
from stages.tables import Rollouts
from tests.flows.experiments.report.pages import Element, parse
from tests.flows.logs import records_of
from tests.flows.short_runs import LEARNING, SHORT

NAME = "pair"
EXPERIMENT: dict[str, Any] = {
    "name": NAME,
    "asks": "Does <b>the</b> clip range matter?",
    "base": "arithmetic_smoke",
    "baseline": "usual",
    "common": LEARNING
    | {
        "data.evaluation.in_domain": {"count": 5, **SHORT},
        "steps": 2,
        "evaluation": {"every": 0, "samples": 2, "estimates": {"ks": [2]}},
    },
    "arms": {"usual": {}, "wide": {"update.objective.eps": 0.4}, "sharp": {"rollout.temperature": 0.5}},
    "seeds": [0, 1],
}
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


pytestmark = pytest.mark.slow
"""Six runs, half a minute."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root of an experiment that was run."""
    place = tmp_path_factory.mktemp("artifacts")
    file = place / "pair.yaml"
    file.write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    assert run_command(["ablate", str(file), "--engine", "inline", "--root", str(place)]) == 0
    (place / "first.html").write_text((place / "runs" / NAME / "report.html").read_text())
    yield place
    evict()


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """The same, to be spoiled."""
    return Path(shutil.copytree(root, tmp_path / "artifacts"))


def result_of(root: Path) -> ExperimentResult:
    result = read_experiment(root / "runs" / NAME)
    assert result is not None
    return result


def page(root: Path, *figures: Figure) -> Element:
    return parse(write_report(result_of(root), Places(root), figures).read_text(encoding="utf-8"))


def figure(folder: Path, svg: str = "<svg xmlns='http://www.w3.org/2000/svg'/>") -> Figure:
    made = Figure("fig", "Accuracy", 'usual & wide are "not" separated', folder)
    made.png.write_bytes(PIXEL)
    made.svg.write_text(svg)
    return made


def completions(body: Element) -> list[Element]:
    return body.section("completions").all("table", "completions")


# ------------------------------------------------------------------------------------- what is on the page


def test_ablate_writes_the_report_and_names_it(root: Path) -> None:
    written = parse((root / "first.html").read_text())
    assert [head.text for head in written.all("h1")] == [NAME]
    assert written.section("curves").all("figure") != []
    assert all(image.attributes["src"].startswith("data:image/") for image in written.all("img"))


def test_the_numbers_are_those_of_the_results(root: Path) -> None:
    result, rows = result_of(root), page(root).table("in domain")
    assert rows[0] == ["arm", "runs", "greedy before", "greedy after", "samples before", "samples after", "best"]
    assert [row[:2] for row in rows[1:]] == [["usual", "2"], ["wide", "2"], ["sharp", "2"]]
    for row in rows[1:]:
        values = result.finals(row[0], "in_domain", "accuracy")
        low, high = f"{min(values):.3f}", f"{max(values):.3f}"
        mean = f"{sum(values) / 2:.3f}"
        assert row[5] == (mean if low == high else f"{mean} ({low}-{high})")


def test_arms_are_compared_with_the_baseline_setting_by_setting(root: Path) -> None:
    assert page(root).table("Settings that are not those of usual") == [
        ["setting", "usual", "wide", "sharp"],
        ["update.objective.eps", "0.2", "0.4", "0.2"],
        ["rollout.temperature", "1", "1", "0.5"],
    ]


def test_work_shared_is_the_results_own(root: Path) -> None:
    sharing = result_of(root).sharing
    facts = dict(page(root).section("sharing").all("table")[0].rows())
    assert (facts["stage calls asked for"], facts["executed"]) == (str(sharing.asked), str(sharing.distinct))
    assert facts["reused"] == str(sharing.asked - sharing.distinct)
    assert f"({sharing.ratio:.2f} of it)" in facts["time together"]


def test_every_arm_answers_the_same_held_out_questions(root: Path) -> None:
    table = completions(page(root))[0]
    assert table.rows()[0] == ["question", "usual", "wide", "sharp"]
    store = Store(root / "store")
    runs = [run for run in result_of(root).runs if run.seed == 0]
    for place, run in enumerate(runs):
        ledger = run.ledger(Places(root))
        evaluation = last_evaluation(ledger)  # type: ignore[arg-type]
        assert evaluation is not None
        assert (evaluation.step, evaluation.set, evaluation.mode) == (2, "in_domain", "greedy")
        with use_store(store):
            texts = {row["question_id"]: row["text"] for row in Rollouts(evaluation.artifacts["rollout"]).rows()}
        for row in table.all("tr")[1:]:
            cells = [cell for cell in row.content if isinstance(cell, Element)]
            asked = cells[0].all("p", "key")[0].text
            assert cells[1 + place].all("pre")[0].text == " ".join(texts[asked].split())
    assert len(table.all("tr")) >= 3


def test_groups_of_the_last_step_show_rewards_and_advantages_by_arm(root: Path) -> None:
    table = completions(page(root))[1]
    assert "What step 2 learned from" in page(root).section("completions").text
    rows = table.all("tr")[1:]
    assert len(rows) == 2
    for place, run in enumerate(run for run in result_of(root).runs if run.seed == 0):
        ledger = run.ledger(Places(root))
        assert ledger is not None
        groups = {g.question_id: g for g in groups_made(Store(root / "store"), ledger, ledger.steps[2])}
        for row in rows:
            cells = [cell for cell in row.content if isinstance(cell, Element)]
            group = groups[cells[0].all("p", "key")[0].text]
            count, output = group.merged()[0]
            verdict = cells[1 + place].all("p", "verdict")[0].text
            times = f"{count} x " if count > 1 else ""
            shown = f"{output.advantage:+.3g}" if output.advantage else "0"
            assert verdict == f"{times}{output.status} reward {output.reward:.3g} advantage {shown}"


def test_shared_ancestors_are_marked_apart_from_an_arms_own(root: Path) -> None:
    section = page(root).section("lineage")
    rows = {row.all("th")[0].text: row.all("td") for row in section.all("table", "lineage")[0].all("tr")[1:]}
    assert list(rows) == ["before", "step 1", "step 2"]
    assert {mark.attributes["class"] for cell in rows["before"] for mark in cell.all("span")} == {"mark all"}
    first = [[mark.attributes["class"].split()[-1] for mark in cell.all("span")] for cell in rows["step 1"]]
    # Usual and wide sample the same first outputs; sharp samples its own. Questions are everybody's.
    assert first[0][:2] == first[1][:2] == ["all", "some"]
    assert first[2][:2] == ["all", "own"]
    for run in result_of(root).runs[:3]:
        assert run.policy[:12] in section.text
    assert [part.text for part in section.all("summary")] == [f"{a} as a Mermaid graph" for a in EXPERIMENT["arms"]]
    assert all(graph.text.startswith("flowchart LR") for graph in section.all("pre"))


def test_deviations_from_the_paper_name_the_arms_that_have_them(root: Path) -> None:
    body = page(root)
    everywhere = {row[0]: row[1:] for row in body.table("In every arm")}
    assert everywhere["update.training.optimizer.learning_rate"][:2] == ["1e-06", "4.2"]
    headings = body.section("paper").all("caption")
    assert [caption.text for caption in headings] == ["In every arm"]  # neither eps nor temperature is the paper's


# ------------------------------------------------------------------------------------- one file, which runs nothing


def test_what_a_model_or_a_person_wrote_runs_nothing(copy: Path) -> None:
    file = copy / "runs" / NAME / "experiment.json"
    values = json.loads(file.read_text())
    values["command"] = "cohort ablate '<script>alert(1)</script>'"
    values["runs"][5] |= {"status": "failed", "error": "<img src=x onerror=alert(2)>"}
    file.write_text(json.dumps(values))
    text = write_report(result_of(copy), Places(copy), []).read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in text
    assert "Does &lt;b&gt;the&lt;/b&gt; clip range matter?" in text
    body = parse(text)
    assert (body.all("script"), body.all("img")) == ([], [])
    assert "<script>alert(1)</script>" in body.text


def test_a_completion_with_a_script_is_shown_as_text(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Rollouts.read
    wicked = "<script>alert(3)</script></pre><h1>"

    def altered(self: Rollouts, columns: Sequence[str] | None = None) -> pa.Table:
        table = read(self, columns)
        return table.set_column(
            table.column_names.index("text"), table.field("text"), pa.array([wicked] * table.num_rows)
        )

    monkeypatch.setattr(Rollouts, "read", altered)
    body = page(root)
    assert body.all("script") == []
    assert {cell.text for cell in completions(body)[0].all("td")} != set()
    assert all(wicked in cell.text for cell in completions(body)[0].all("td"))


def test_no_other_file_and_no_network_is_asked_for(root: Path, tmp_path: Path) -> None:
    text = write_report(result_of(root), Places(root), [figure(tmp_path)]).read_text(encoding="utf-8")
    body = parse(text)
    sources = [
        e.attributes[a] for t in ("img", "link", "a") for e in body.all(t) for a in ("src", "href") if a in e.attributes
    ]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/svg+xml;base64,")
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_figures_have_captions_as_text_and_one_that_is_gone_is_named(root: Path, tmp_path: Path) -> None:
    one = figure(tmp_path)
    (image,) = page(root, one).section("curves").all("img")
    assert image.attributes["alt"] == one.caption
    assert one.caption in page(root, one).section("found").text
    one.svg.unlink()
    (image,) = page(root, one).all("img")
    assert base64.b64decode(image.attributes["src"].removeprefix("data:image/png;base64,")) == PIXEL
    one.png.unlink()
    assert "The files of this figure are gone." in page(root, one).section("curves").text


# ------------------------------------------------------------------------------------- what is missing


def test_pruned_outputs_are_said_in_the_arms_place_and_the_others_stay(copy: Path) -> None:
    store = Store(copy / "store")
    sharp = result_of(copy).runs[2].ledger(Places(copy))
    assert sharp is not None
    evaluation = last_evaluation(sharp)
    assert evaluation is not None
    store.prune(evaluation.artifacts["rollout"])
    held_out, learned = completions(page(copy))
    for row in held_out.all("tr")[1:]:
        texts = [cell.text for cell in row.all("td")]
        assert texts[2].startswith("pruned")
        assert "reward" in texts[0]
        assert "reward" in texts[1]
    assert "pruned" not in learned.text
    with pytest.raises(StoreError):
        completion_rows(store, sharp)


def test_runs_that_failed_or_never_ran_are_said_and_the_rest_is_shown(copy: Path) -> None:
    result = result_of(copy)
    lost = {"final": {}, "before": {}, "best": {}, "policy": "", "cost": {}}
    runs = list(result.runs)
    for place, (status, error) in {0: ("failed", "ValueError: too odd"), 1: ("not run", ""), 4: ("killed", "")}.items():
        runs[place] = runs[place].model_copy(update=lost | {"status": status, "error": error})
    write_experiment(Places(copy), result.model_copy(update={"runs": tuple(runs)}))
    body = page(copy)
    notes = [item.text for item in body.all("div", "warning")[0].all("li")]
    assert notes == ["pair-usual-s0: failed: ValueError: too odd", "pair-wide-s0: not run", "pair-wide-s1: killed"]
    assert [row[1] for row in body.table("in domain")[1:]] == ["1", "0", "2"]
    assert body.table("in domain")[2] == ["wide", "0", "-", "-", "-", "-", "-"]
    assert "Of every arm with seed 1." in body.section("completions").text
    assert "killed" in completions(body)[0].rows()[1][2]
    assert "wide: killed; no lineage of it" in body.section("lineage").text


def test_an_experiment_of_which_nothing_finished_has_a_report(copy: Path) -> None:
    result = result_of(copy)
    lost = {"final": {}, "before": {}, "best": {}, "policy": "", "status": "not run"}
    runs = tuple(run.model_copy(update=lost) for run in result.runs)
    write_experiment(Places(copy), result.model_copy(update={"runs": runs}))
    body = page(copy)
    assert "Nothing yet: no run finished" in body.section("found").text
    assert completions(body) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_keeps_the_old_report(copy: Path) -> None:
    folder = copy / "runs" / NAME
    before = (folder / "report.html").read_text()
    folder.chmod(0o555)
    try:
        with pytest.raises(StoreError, match=r"report\.html cannot be written .* cohort report pair"):
            write_report(result_of(copy), Places(copy), [])
    finally:
        folder.chmod(0o755)
    assert (folder / "report.html").read_text() == before


def test_a_report_that_cannot_be_placed_is_an_error_and_leaves_no_draft(copy: Path) -> None:
    folder = copy / "runs" / NAME
    (folder / "report.html").unlink()
    (folder / "report.html" / "in the way").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"report\.html cannot be written .*`cohort report pair`"):
        write_report(result_of(copy), Places(copy), [])
    assert list(folder.glob("*.draft")) == []
    assert read_experiment(folder) is not None


# ------------------------------------------------------------------------------------- the command, MLflow


def test_the_command_writes_the_same_report_again(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / "runs" / NAME / "report.html"
    file.unlink()
    assert run_command(["report", NAME, "--root", str(copy)]) == 0
    assert str(file) in capsys.readouterr().out.replace("\n", "")
    assert file.read_text() == (copy / "first.html").read_text()


@pytest.mark.parametrize(
    ("name", "advice"), [("pairs", "did you mean 'pair'?"), ("x", "expected one of pair"), ("", "expected one of pair")]
)
def test_an_unknown_experiment_exits_with_2_and_those_there_are(
    root: Path, capsys: pytest.CaptureFixture[str], name: str, advice: str
) -> None:
    assert run_command(["report", name, "--root", str(root)]) == 2
    assert advice in " ".join(capsys.readouterr().err.split())


def test_mlflow_gets_the_same_questions_from_every_run_under_one_name(root: Path) -> None:
    tables = {}
    for run in result_of(root).runs:
        records = records_of(root, f"runs/{run.folder}")
        (tables[run.name],) = [r for r in records if r["kind"] == "table" and r["name"] == "completions"]
    columns = ["question", "completion", "status", "reward", "answer", "question_id"]
    assert {tuple(table["columns"]) for table in tables.values()} == {tuple(columns)}
    asked = [[(row[0], *row[4:]) for row in table["data"]] for table in tables.values()]
    assert len(asked[0]) == 5
    assert all(rows == asked[0] for rows in asked)
    assert any(row[1] for row in tables["pair-usual-s0"]["data"])


# ------------------------------------------------------------------------------------- in a browser


def test_chromium_shows_arms_figure_and_completions(root: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    file = write_report(result_of(root), Places(root), [figure(tmp_path, _BARS)])
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3000", "--hide-scrollbars"]
    shot = tmp_path / "report.png"
    subprocess.run([*command, f"--screenshot={shot}", file.as_uri()], check=True, capture_output=True, timeout=120)
    dumped = subprocess.run([*command, "--dump-dom", file.as_uri()], check=True, capture_output=True, timeout=120)
    body = parse(re.sub(r"^<!DOCTYPE html>", "", dumped.stdout.decode()))
    assert [head.text for head in completions(body)[0].all("th")[:4]] == ["question", "usual", "wide", "sharp"]
    assert len(completions(body)[0].all("div", "output")) >= 6
    assert len(body.section("curves").all("img")) == 1
    from matplotlib.image import imread

    pixels = imread(shot)[..., :3]
    assert pixels.shape[:2] == (3000, 1200)
    magenta = (abs(pixels - [1.0, 0.0, 1.0]) < 0.01).all(axis=-1)
    assert magenta.sum() == 300 * 40  # the figure is drawn, at its size
    assert magenta[:, 600:].sum() == 0


_BARS = (
    "<svg xmlns='http://www.w3.org/2000/svg' width='300' height='40'>"
    "<rect width='300' height='40' fill='#ff00ff' shape-rendering='crispEdges'/></svg>"
)
