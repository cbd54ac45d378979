"""The `cohort` command: what people type, what they read, and the exit codes that scripts read."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.cli import _explain, run_command
from flows.config.recipes import RECIPES, arithmetic_smoke
from flows.config.resolve import choose
from flows.inspection.groups import groups_of
from flows.runs.paths import Places
from flows.runs.record import Attempt, RunRecord, read_records, run_folder
from flows.runs.state import RunState
from pipeline.config import ConfigError
from pipeline.events import RunStarted
from pipeline.residency import evict
from pipeline.store import Store, StoreError, use_store
from tests.flows.short_runs import smoke

REPOSITORY = Path(__file__).parents[2]
TINY = ["iterations=1", "steps=1", "sft.max_steps=2", "sft.decay_steps=1", "evaluation.every=0"]
HEAVY = ("torch", "transformers", "datasets", "prefect", "mlflow", "deepspeed")


def command(*arguments: str, root: Path) -> list[str]:
    return [*smoke(root, *TINY), *arguments]


def cohort(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which ends with the names of the heavy modules it imported."""
    code = (
        "import sys; sys.argv[0] = 'cohort'; from flows.cli import run_command; code = run_command(sys.argv[1:]);"
        f"print('IMPORTED', *[name for name in {HEAVY} if name in sys.modules]); sys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"COLUMNS": "160"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root in which the tiny recipe ran once."""
    folder = tmp_path_factory.mktemp("artifacts")
    assert run_command(command(root=folder)) == 0
    evict()
    yield folder
    evict()


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("COHORT_DEBUG", "0")


def test_help_imports_nothing_heavy() -> None:
    done = cohort("--help")
    assert done.returncode == 0
    assert "Train as a recipe says" in done.stdout
    assert done.stdout.splitlines()[-1] == "IMPORTED"


def test_a_second_run_computes_nothing_and_imports_nothing_heavy(root: Path) -> None:
    before = {file: file.read_bytes() for file in sorted((root / "store" / "actions").glob("*/*.json"))}
    done = cohort(*command(root=root))
    assert done.returncode == 0, done.stderr
    assert "0 stages computed" in done.stdout
    assert done.stdout.splitlines()[-1] == "IMPORTED"
    assert {file: file.read_bytes() for file in sorted((root / "store" / "actions").glob("*/*.json"))} == before


def test_a_run_leaves_config_record_summary_and_picture(root: Path) -> None:
    (folder,) = (root / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert choose(str(folder / "config.yaml")).config.steps == 1
    assert summary["steps"] == 1
    assert summary["after"]["in_domain"]["accuracy"] is not None
    assert Path(summary["paths"]["final policy"], "model.safetensors").is_file()
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    record = next(read_records(Places(root)))
    assert (record.attempts[0].status, record.steps, record.policy) == ("finished", 1, summary["policy"])


def test_runs_lists_the_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["runs", "--root", str(root)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("arithmetic_smoke-"))
    assert "finished" in line
    assert "1/1" in line
    assert "in_domain" in line


def test_show_prints_groups_with_rewards_and_advantages(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(root / "store")
    digest = next(call["result"] for call in store.actions() if call["stage"] == "estimate_advantages")
    with use_store(store):
        groups = groups_of(store, digest)
        assert groups is not None
        first = next(groups)
    assert len(first.outputs) == 4
    assert all(output.reward is not None and output.advantage is not None for output in first.outputs)
    assert sum(output.advantage or 0.0 for output in first.outputs) == pytest.approx(0.0, abs=1e-5)
    assert run_command(["show", digest[:16], "--root", str(root), "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert first.question in out
    assert f"answer {first.answer}" in out
    assert "estimate_advantages (version" in out


def test_show_describes_a_checkpoint(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = next(read_records(Places(root))).policy
    assert run_command(["show", policy, "--full", "--root", str(root)]) == 0
    out = capsys.readouterr().out
    assert "objective.beta: 0.04" in out
    assert "trainer: updates" in out
    assert "policy/kl" in out


def test_lineage_goes_down_to_the_data(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["lineage", "arithmetic_smoke", "--depth", "0", "--root", str(root)]) == 0
    assert "arithmetic_demonstrations" in capsys.readouterr().out
    assert run_command(["lineage", "arithmetic_smoke", "--mermaid", "--root", str(root)]) == 0
    assert capsys.readouterr().out.startswith("flowchart")


@pytest.mark.slow
def test_explain_names_the_setting_that_made_the_stage_compute(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command("--set", "update.objective.beta=0.5", root=root)) == 0
    capsys.readouterr()
    assert run_command(["explain", "update_policy", "--root", str(root)]) == 0
    assert "config.objective.beta: 0.04 -> 0.5" in capsys.readouterr().out
    assert run_command(["explain", "--root", str(root)]) == 0
    assert "update_policy\n  config.objective.beta: 0.04 -> 0.5" in capsys.readouterr().out
    assert len(list((root / "runs").iterdir())) == 2  # neither overwrote the other's record


def test_verify_finds_a_flipped_bit_and_repairs_it_by_computing_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["verify", "--root", str(root)]) == 0
    store = Store(root / "store")
    digest = next(call["result"] for call in store.actions() if call["stage"] == "score")
    file = Places(root).payload(digest) / "table.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    capsys.readouterr()
    assert run_command(["verify", "--root", str(root)]) == 1
    assert f"{digest[:4]}" in capsys.readouterr().out
    assert run_command(["verify", "--repair", "--root", str(root)]) == 0
    assert run_command(["verify", "--root", str(root)]) == 0
    assert "0 damaged, 0 missing" in capsys.readouterr().out.splitlines()[-1]


def test_forget_makes_the_next_run_compute_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(root / "store")
    digest = next(call["result"] for call in store.actions() if call["stage"] == "sample_batch")
    assert run_command(["forget", digest[:12], "--root", str(root)]) == 0
    capsys.readouterr()
    assert run_command(command(root=root)) == 0
    assert "1 stages computed" in capsys.readouterr().out


def test_prune_spares_final_policies_and_keeps_runs_cached(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["prune", "--root", str(root)]) == 2  # nothing is freed without being asked for
    assert run_command(["prune", "--keep-last", "0", "--root", str(root)]) == 0
    assert "0 artifacts" in capsys.readouterr().out
    store = Store(root / "store")
    digest = next(call["result"] for call in store.actions() if call["stage"] == "evaluate")
    table = Places(root).payload(digest) / "table.arrow"
    assert run_command(["prune", digest, "--dry-run", "--root", str(root)]) == 0
    assert "would be freed" in capsys.readouterr().out
    assert table.exists()
    assert run_command(["prune", digest, "--root", str(root)]) == 0
    assert not table.exists()
    assert run_command(command(root=root)) == 0
    assert "0 stages computed" in capsys.readouterr().out


def test_a_wrong_configuration_lists_every_error_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "rollout.temperatures=1", "--set", "update.objective.beta=-1"]
    assert run_command(["check", "arithmetic_cpu", *settings]) == 2
    errors = capsys.readouterr().err
    assert "did you mean 'temperature'?" in errors
    assert "update.objective.beta" in errors
    assert "Traceback" not in errors


def test_a_misspelt_recipe_or_option_exits_with_2_and_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", "arithmetic_cpuu"]) == 2
    assert "did you mean 'arithmetic_cpu'?" in capsys.readouterr().err
    assert run_command(["run", "arithmetic_cpu", "--engin", "inline"]) == 2


def test_missing_data_is_one_message_that_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"data.path={tmp_path / 'nowhere'}"
    arguments = ["run", "gsm8k_cpu", "--set", path, "--engine", "inline", "--root", str(tmp_path / "root")]
    assert run_command(arguments) == 1
    errors = capsys.readouterr().err
    assert "nowhere/" in errors
    assert "Traceback" not in errors
    assert next(read_records(Places(tmp_path / "root"))).attempts[-1].status == "failed"


def test_debug_lets_the_traceback_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["show", "abcdef", "--root", str(tmp_path)]
    assert run_command(arguments) == 1
    assert "'abcdef' names 0 artifacts" in capsys.readouterr().err
    with pytest.raises(StoreError):
        run_command(["--debug", *arguments])


def test_files_and_settings_override_in_order(tmp_path: Path) -> None:
    file = tmp_path / "overrides.yaml"
    file.write_text("rollout:\n  G: 8\nupdate.objective.beta: 0.0\n")
    choice = choose("arithmetic_cpu", [file], ["rollout.G=4"])
    assert (choice.config.rollout.G, choice.config.update.objective.beta) == (4, 0.0)
    assert choice.differences() == {"rollout.G": (16, 4), "update.objective.beta": (0.04, 0.0)}


def test_a_file_may_name_the_recipe_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: arithmetic_smoke\nname: mine\nseed: 3\n")
    choice = choose(str(file))
    assert choice.config == arithmetic_smoke().override({"name": "mine", "seed": 3})
    file.write_text("recipe: nothing\n")
    with pytest.raises(ConfigError, match="arithmetic_smoke"):
        choose(str(file))


def test_a_key_that_occurs_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="occurs twice"):
        choose("arithmetic_cpu", [file])


def test_every_recipe_is_listed_and_prints_as_valid_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name, make in RECIPES.items():
        assert name in listed
        assert run_command(["recipes", name]) == 0
        file = tmp_path / f"{name}.yaml"
        file.write_text(capsys.readouterr().out)
        assert choose(str(file)).config == make()


def test_configurations_of_one_name_have_folders_of_their_own(tmp_path: Path) -> None:
    config = arithmetic_smoke()
    folders = {run_folder(Places(tmp_path), changed) for changed in (config, config.override({"seed": 1}))}
    assert len(folders) == 2


def test_a_run_whose_process_is_gone_counts_as_killed() -> None:
    outcomes = {
        host: Attempt(RunStarted("r", "study", 1, 1, "", "inline", host, 2**22 + 1, "0-")).outcome()
        for host in (socket.gethostname(), "another host")
    }
    assert list(outcomes.values()) == ["killed", "running"]


def test_two_processes_that_run_one_configuration_keep_both_their_attempts(tmp_path: Path) -> None:
    state = RunState(steps=4, clock=lambda: 0.0)
    first, second = (
        RunRecord.begin(Places(tmp_path), arithmetic_smoke(), command=name, engine="inline") for name in ("a", "b")
    )
    first.end("failed", state, "ValueError: no")
    second.end("finished", state)
    (record,) = read_records(Places(tmp_path))
    assert [(attempt.start.command, attempt.status) for attempt in record.attempts] == [
        ("a", "failed"),
        ("b", "finished"),
    ]


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run_command(command(root=tmp_path / "file")) == 1
    errors = capsys.readouterr().err
    assert str(tmp_path / "file" / "runs") in errors
    assert "--root" in errors


def test_a_damaged_record_does_not_hide_the_others(tmp_path: Path) -> None:
    places = Places(tmp_path)
    RunRecord.begin(places, arithmetic_smoke(), command="cohort run x", engine="inline")
    (places.runs / "damaged").mkdir()
    (places.runs / "damaged" / "events.jsonl").write_text("{")
    assert [record.name for record in read_records(places)] == ["arithmetic_smoke"]


@pytest.mark.slow  # a process that imports everything and trains
def test_an_interrupted_run_prints_the_command_that_continues_it(root: Path) -> None:
    arguments = command("--set", "steps=500", root=root)
    code = "import sys; from flows.cli import main; sys.argv[0] = 'cohort'; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    assert process.stdout is not None
    assert any("/500 " in line for line in process.stdout)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait() == 130
    assert "cohort run arithmetic_smoke" in rest
    assert "steps=500" in rest
    assert "Traceback" not in rest
    assert list(read_records(Places(root)))[-1].attempts[-1].status == "interrupted"


@pytest.mark.parametrize(
    ("error", "advised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            True,
        ),  # safetensors
        (ValueError("[Errno 28] Error writing bytes to file"), True),  # Arrow
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("exit code 28"), False),
    ],
)
def test_a_full_disk_in_any_librarys_error_is_named_with_what_frees_space(
    error: Exception, advised: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    wrapped = RuntimeError("a stage failed")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        assert _explain(each) == 1
        assert ("cohort prune" in capsys.readouterr().err) == advised
