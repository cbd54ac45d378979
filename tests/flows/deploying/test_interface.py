"""What people see of a deployment in Prefect's interface, in a headless Chromium: the form, and the graph of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from flows.config import IterativeRLConfig
from flows.config.resolve import Choice
from flows.deploying.deployment import deploy
from flows.deploying.pool import submit
from pipeline.orchestration.server_process import password_of
from stages.rollout import RolloutConfig
from tests.flows.browser import Browser, chromium
from tests.flows.deploying.project import Project
from tests.flows.short_runs import BASE
from tests.pipeline.processes import until

pytestmark = pytest.mark.scale

CONFIG: IterativeRLConfig = BASE.override({"name": "seen", "steps": 1})


def log_in(browser: Browser, project: Project) -> None:
    """As the page does with what a person writes into it."""
    browser.open(project.url.removesuffix("/api"))
    password = json.dumps(password_of(project.places.prefect))
    browser.evaluate(f"localStorage.setItem('prefect-password', btoa({password}))")


def test_the_form_documents_its_fields_and_sends_what_was_filled_in(project: Project, tmp_path: Path) -> None:
    made = deploy(Choice(CONFIG, BASE), project.places, name="seen")
    documented = str(RolloutConfig.model_fields["max_output_tokens"].description).partition("`")[0].strip()
    with chromium(tmp_path / "profile") as browser:
        log_in(browser, project)
        shown = browser.open(f"{made.url}/run", documented)
        assert {"ArithmeticData", "GRPOConfig", "VLLMBackendConfig"} <= set(shown.split()), "choices of sections"
        browser.click("Submit")
        browser.picture(tmp_path / "sent.png")  # a page that nothing draws may wait with what a click began
        wanted = {"deployments": {"id": {"any_": [str(made.id)]}}}
        (run,) = until(lambda: project.ask("flow_runs/filter", **wanted), 60)
        assert IterativeRLConfig.parse(run["parameters"]["config"]) == CONFIG


def test_the_graph_of_a_finished_run_is_drawn_with_its_stages(project: Project, tmp_path: Path) -> None:
    made = deploy(Choice(CONFIG, BASE), project.places, name="drawn")
    with project.worker(tmp_path / "worker.log"):
        run = submit(made.name, CONFIG)
        assert project.ended(run)[0] == "COMPLETED"
    count = len(project.tasks(run, 10))
    with chromium(tmp_path / "profile") as browser:
        log_in(browser, project)
        browser.open(
            made.url.partition("/deployments/")[0] + f"/runs/flow-run/{run}", "Completed", f"{count} Task runs"
        )
        recenter = (
            "[...document.querySelectorAll('button')].find(e => (e.title || e.ariaLabel || '').startsWith('Recenter'))"
        )
        browser.until(f"!!{recenter}")
        browser.click_on(recenter)
        time.sleep(3.0)  # drawn on a canvas, which has no text to wait for
        drawn = browser.picture(tmp_path / "graph.png", width=1300, height=560).read_bytes()
    assert len(drawn) > 50_000, "an empty graph is a picture of half the size"
