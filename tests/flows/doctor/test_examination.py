"""The report of `cohort doctor`: what is really broken is found, and everything else is examined all the same."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from flows.cli import run_command
from flows.config.resolve import choose
from flows.doctor import CHECKS, imports, places, servers
from flows.doctor.examination import Check, Finding, Subject, examine, redacted, subject_of
from flows.runs.paths import Places
from tests.flows.doctor.subjects import only, subject

REPOSITORY = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "datasets", "prefect", "mlflow", "deepspeed")


@pytest.mark.slow
def test_quick_gives_every_light_check_as_json_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from flows.cli import run_command; code = run_command(sys.argv[1:]);"
        f"print('IMPORTED', *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    (tmp_path / "file").touch()
    root = tmp_path / "file" / "artifacts"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--quick", "--json", "--root", str(root)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "abc"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr.splitlines()[-1] == "IMPORTED"
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert set(report) == {"format", "cohort", "root", "quick", "seconds", "verdict", "summary", "checks"}
    assert (report["format"], report["root"], report["quick"], report["verdict"]) == (1, str(root), True, "problem")
    severities = {check["check"]: check["severity"] for check in report["checks"]}
    assert {"python", "packages", "cpu", "memory", "locking", "prefect", "mlflow", "variables"} <= set(severities)
    assert "torch" not in severities
    assert (severities["threads.OMP_NUM_THREADS"], severities["store.write"]) == ("warning", "problem")
    for check in report["checks"]:
        assert set(check) == {"part", "check", "severity", "found", "advice", "values"}
        assert (check["severity"] == "ok") == (check["advice"] is None)


def test_the_table_says_below_a_problem_what_to_do_and_ends_with_the_verdict(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report = examine(subject(tmp_path / "file"), [Check("store", places.commits), Check("servers", servers.loopback)])
    out = Console(file=io.StringIO(), width=200)
    report.print(out)
    lines = [line.strip() for line in out.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    place = lines.index("store") + 1
    assert lines[place].split()[:2] == ["problem", "store.write"]
    assert str(tmp_path / "file") in lines[place]
    assert lines[place + 1].endswith("choose another folder: --root, or COHORT_ROOT")
    assert lines[-1].startswith("1 problem to fix before a run (store.write first) (")


def test_settings_without_a_recipe_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "--set", "rollout.G=8"]) == 2
    assert "cohort doctor RECIPE" in capsys.readouterr().err


def test_a_recipe_says_which_engine_and_how_many_ranks_are_wanted(tmp_path: Path) -> None:
    settings = [
        "rollout.backend={kind: vllm, python: /env/python}",
        "update.training.engine={kind: deepspeed, ranks: 3}",
    ]
    asked = subject_of(Places(tmp_path), {}, config=choose("arithmetic_smoke", settings=settings).config)
    assert (asked.vllm, asked.vllm_python, asked.ranks) == (True, Path("/env/python"), 3)
    url = "http://127.0.0.1:9"
    settings = [f"rollout.backend={{kind: vllm_server, url: '{url}'}}", "evaluation.backend={kind: hf}"]
    offline = choose("arithmetic_smoke", settings=settings, method="rft")
    asked = subject_of(Places(tmp_path), {}, config=offline.config)
    assert (asked.vllm, asked.vllm_servers, asked.ranks) == (False, (url,), 1)
    assert only(imports.vllm_servers(asked)).severity == "problem"


@pytest.mark.slow
def test_in_full_torch_and_other_packages_import_and_two_ranks_connect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["doctor", "--json", "--root", str(tmp_path)]) == 0
    report = {check["check"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert (report["torch"]["severity"], report["gloo"]["severity"]) == ("ok", "ok")
    assert {"prefect", "mlflow", "deepspeed", "math_verify"} <= set(report["imports"]["values"])


def test_a_check_that_raises_or_hangs_is_a_finding_and_no_login_is_shown(tmp_path: Path) -> None:
    def raises(asked: Subject) -> Iterator[Finding]:
        yield Finding("first", "ok", "seen")
        raise OSError("no route to postgresql://prefect:hunter2@db.example/prefect")

    def hangs(asked: Subject) -> Iterator[Finding]:
        yield Finding("before", "warning", "seen", "fix it")
        threading.Event().wait()

    def answers(asked: Subject) -> Iterator[Finding]:
        yield Finding("last", "ok", "there", values={"url": "https://x:y@host/api?token=t0p&n=1"})

    report = examine(subject(tmp_path), [Check("p", raises), Check("p", hangs, deadline=0.2), Check("q", answers)])
    found = {finding.check: finding for _, finding in report.findings}
    assert list(found) == ["first", "raises", "before", "hangs", "last"]
    assert "OSError: no route to postgresql://***@db.example/prefect" in found["raises"].found
    assert "no answer within 0.2 s" in found["hangs"].found
    assert found["last"].values == {"url": "https://***@host/api?token=***&n=1"}
    assert report.summary == "2 problems to fix before a run (raises first); 1 warning"
    assert json.loads(report.json())["verdict"] == "problem"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:p@ss@host:1/api", "http://***@host:1/api"),
        ("http://host/a@b", "http://host/a@b"),
        ("TOKENIZERS_PARALLELISM=true", "TOKENIZERS_PARALLELISM=true"),
        ("PREFECT_API_KEY=abc HF_TOKEN=def", "PREFECT_API_KEY=*** HF_TOKEN=***"),
    ],
)
def test_logins_are_taken_out_and_nothing_else(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_every_check_has_a_name_of_its_own() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
