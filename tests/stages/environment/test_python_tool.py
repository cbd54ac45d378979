"""Programs in a sandbox: notebook semantics, one row for each whatever it does, nothing outside changed and nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.config import ConfigError
from pipeline.residency import evict
from stages.environment import PythonConfig, answer_calls
from stages.environment.answers import Answer, Dialogue
from stages.environment.python_tool import PythonTool, SandboxError, Sandboxes
from stages.tables import Questions, Rollouts, ToolCalls
from tests.stages.environment.hostile import PROGRAMS
from tests.stages.rows import question_rows, rollout_row

CONFIG = PythonConfig(deadline=2.0, memory_mb=256)
IN_EVERY_SUITE = [
    "fork bomb",
    "exit",
    "ignore all signals",
    "daemon that keeps the output open",
    "large text",
    "passwords",
]


@pytest.fixture(scope="module", autouse=True)
def sandboxes() -> Iterator[None]:
    try:
        Sandboxes("namespaces").close()
    except SandboxError as error:
        pytest.skip(f"this system lets no user make namespaces: {error}")
    yield
    evict("sandboxes")


def turn(program: str) -> str:
    """Return a turn of the policy that ends in a call."""
    return f"Let us compute.\n```python\n{program}\n```\n```output"


def asked(*programs: str, config: PythonConfig = CONFIG) -> list[Answer]:
    """Answer outputs of one turn each, side by side."""
    return PythonTool(config).answer([Dialogue({}, [turn(program)], []) for program in programs])


@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("print(347 * 290)", "100630\n"),
        ("x = 6\nx * 7", "42\n"),
        ("x = None\nx", ""),
        ("'text'", "'text'\n"),
        ("import math\nfrom fractions import Fraction\nprint(math.comb(5, 2), Fraction(1, 3))", "10 1/3\n"),
        ("def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nf(15)", "610\n"),
        ("import random\nprint(random.random())", "0.8444218515250481\n"),
        ("print({'b', 'a', 'c'} == {'a', 'b', 'c'}, hash('a') == hash('a'))", "True True\n"),
    ],
)
def test_a_program_prints_and_shows_its_last_value_as_a_notebook_does(program: str, output: str) -> None:
    (answer,) = asked(program)
    assert (answer.status, answer.output, answer.input.strip()) == ("ok", output, program)
    assert answer.observation == f"\n{output.rstrip()}\n```\n"


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("1 / 0", "error", "ZeroDivisionError: division by zero"),
        ("print(1)\nraise ValueError('no')", "error", "1\nValueError: no"),
        ("x = (", "error", "SyntaxError"),
        ("while True: pass", "timeout", "timeout: not done after 0.5 s"),
        ("x = [0] * 10 ** 10", "memory", "memory: more than 256 MiB"),
    ],
)
def test_what_goes_wrong_is_a_status_and_is_said_to_the_policy(program: str, status: str, said: str) -> None:
    (answer,) = asked(program, config=CONFIG.override({"deadline": 0.5}))
    assert answer.status == status
    assert said in answer.observation


def test_long_output_is_cut_and_a_turn_without_a_program_is_refused() -> None:
    (long,) = asked("print('x' * 5000)", config=CONFIG.override({"max_observation": 10}))
    assert (long.status, len(long.output), long.observation) == ("ok", 5001, "\nxxxxxxxxxx...\n```\n")
    (none,) = PythonTool(CONFIG).answer([Dialogue({}, ["```output"], [])])
    assert (none.status, none.input) == ("refused", "")


def test_a_program_between_other_marks_is_answered_between_others() -> None:
    config = CONFIG.override({"opens": "<py>", "closes": "</py>", "before_answer": "<", "after_answer": ">"})
    (answer,) = PythonTool(config).answer([Dialogue({}, ["<py>0</py>, no: <py>6 * 7</py>"], [])])
    assert (answer.input, answer.observation) == ("6 * 7", "<42>")


def test_equal_programs_behind_equal_ones_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    run = Sandboxes.run
    monkeypatch.setattr(
        Sandboxes, "run", lambda self, given, config: ran.append(list(given)) or run(self, given, config)
    )
    earlier = [{"input": "x = 1", "status": "ok"}]
    program = turn("x = 2 * x if 'x' in globals() else 3\nprint(x)")
    dialogues = [Dialogue({}, turns, calls) for turns, calls in [([program], [])] * 3 + [(["", program], earlier)] * 2]
    answers = PythonTool(CONFIG).answer(dialogues)
    assert [answer.output for answer in answers] == ["3\n"] * 3 + ["2\n"] * 2
    assert sorted(map(len, ran)) == [1, 2]


@pytest.mark.usefixtures("store")
def test_variables_persist_between_turns_by_the_programs_that_ended_well() -> None:
    questions = Questions.write(question_rows("a"))
    programs = ["x = 2\nprint('once')", "x = 3\n1 / 0", "print(x)", "import os\nprint(os.listdir())"]
    text, spans, calls, rows = "", [], None, []
    for program in programs:
        start = len(text)
        text += turn(program)
        spans.append({"start": start, "end": len(text)})
        ids, ends = list(range(len(text))), list(range(1, len(text) + 1))
        row = rollout_row("q0", 0, ids, text=text, text_ends=ends, finish_reason="call", turns=list(spans))
        calls = answer_calls(Rollouts.write([row]), questions, calls, CONFIG)
        rows = calls.rows()
        text += rows[-1]["observation"]
    assert [(row["turn"], row["status"], row["output"]) for row in rows] == [
        (0, "ok", "once\n"),
        (1, "error", "ZeroDivisionError: division by zero\n"),
        (2, "ok", "2\n"),
        (3, "ok", "[]\n"),
    ]
    assert isinstance(calls, ToolCalls)
    assert {f"tool/{name}": calls.metrics[f"tool/{name}"] for name in ("calls", "ok_rate", "error_rate")} == {
        "tool/calls": 4,
        "tool/ok_rate": 0.75,
        "tool/error_rate": 0.25,
    }


def namespace(process: int | str, kind: str) -> str:
    """Return the namespace of a process; nothing where it has ended."""
    try:
        return os.readlink(f"/proc/{process}/ns/{kind}")
    except OSError:
        return ""


def networks(process: int) -> set[str]:
    """Return the network namespaces of the sandboxes that a process has started: no other test's."""
    below = psutil.Process(process).children(recursive=True)
    return {namespace(each.pid, "net") for each in below} - {namespace("self", "net"), ""}


def programs(within: set[str]) -> set[str]:
    """Return the processes of programs in these sandboxes, whoever is their parent by now."""
    running = {name for name in os.listdir("/proc") if name.isdigit() and namespace(name, "net") in within}
    return {name for name in running if namespace(name, "pid") not in (namespace("self", "pid"), "")}


def hold(names: list[str]) -> None:
    """Run each program together with an honest one, and check every row."""
    within: set[str] = set()
    for name in names:
        program, statuses = PROGRAMS[name]
        started = time.monotonic()
        hostile, honest = asked(program, "print(6 * 7)")
        seconds = time.monotonic() - started
        assert hostile.status in statuses, (name, hostile.status, hostile.output[:200])
        assert "ESCAPED" not in hostile.output, name
        assert (honest.status, honest.output) == ("ok", "42\n"), name
        assert seconds < CONFIG.deadline + 1, (name, seconds)
        within |= networks(os.getpid())
    assert within
    assert not programs(within)
    assert not [path for path in ("/written", "/late", "/scratch", "/tmp/late") if Path(path).exists()]


@pytest.mark.parametrize("name", IN_EVERY_SUITE)
def test_a_hostile_program_gets_its_row_in_time_and_changes_nothing(name: str) -> None:
    hold([name])


def test_processes_of_a_program_that_take_too_much_together_are_ended_for_it() -> None:
    fork = (
        "import os, time\n{before}\nfor _ in range({count}):\n"
        "    if not os.fork():\n        {child}\n        os._exit(0)\n{after}"
    )
    many = fork.format(before="", count=16, child="x = b'x' * (100 * 2**20); time.sleep(60)", after="time.sleep(60)")
    shared = fork.format(
        before="x = b'x' * (150 * 2**20)", count=8, child="time.sleep(1)", after="time.sleep(1)\nprint('ok')"
    )
    apart, together = asked(many, shared, config=CONFIG.override({"deadline": 30.0}))
    assert apart.status == "memory"
    assert (together.status, together.output) == ("ok", "ok\n"), "pages that processes share count once"
    assert not programs(networks(os.getpid()))


@pytest.mark.slow
def test_every_hostile_program_gets_its_row_in_time_and_changes_nothing() -> None:
    assert len(PROGRAMS) >= 60
    hold(list(PROGRAMS))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system in a mount namespace of its own")
def test_what_is_mounted_below_the_folders_of_python_is_read_only_too() -> None:
    folder = Path(sysconfig.get_path("stdlib")) / "pydoc_data"
    program = f"import os\nprint(os.listdir({str(folder)!r}))\nopen({str(folder / 'written')!r}, 'w')"
    script = (
        "import subprocess\n"
        f"subprocess.run(['mount', '-t', 'tmpfs', '-o', 'mode=777', 'none', {str(folder)!r}], check=True)\n"
        f"open({str(folder / 'outside')!r}, 'w').close()\n"
        "from stages.environment import PythonConfig\n"
        "from stages.environment.python_tool import require_sandbox\n"
        f"print(*require_sandbox(PythonConfig()).run([{program!r}], PythonConfig()))\n"
    )
    command = ["unshare", "--mount", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace: {done.stderr}")
    assert done.stdout.startswith("error ['outside']"), done.stdout + done.stderr
    assert "Read-only file system" in done.stdout


def test_a_killed_run_leaves_no_process_of_a_program_behind() -> None:
    script = (
        "from stages.environment import PythonConfig\n"
        "from stages.environment.python_tool import require_sandbox\n"
        "held = require_sandbox(PythonConfig())\n"
        "print('ready', flush=True)\n"
        "held.run(['import time; time.sleep(99)'], PythonConfig(deadline=2.0))\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    end = time.monotonic() + 10
    while not programs(networks(run.pid)) and time.monotonic() < end:
        time.sleep(0.01)
    within = networks(run.pid)
    assert programs(within)
    run.send_signal(signal.SIGKILL)
    run.wait()
    while programs(within) and time.monotonic() < end:
        time.sleep(0.05)
    assert not programs(within)


def test_a_system_without_namespaces_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    evict("sandboxes")

    def refuse(*_: Any, **__: Any) -> Sandboxes:
        raise SandboxError("[Errno 1] unshare: Operation not permitted")

    monkeypatch.setattr("stages.environment.python_tool.Sandboxes", refuse)
    with pytest.raises(ConfigError, match=r"unshare.*environment.sandbox=limits"):
        asked("1")


def test_limits_alone_are_a_choice_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="your rights"):
        ok, slow = asked("print(1)", "while True: pass", config=CONFIG.override({"sandbox": "limits", "deadline": 0.5}))
    assert (ok.status, ok.output, slow.status) == ("ok", "1\n", "timeout")
    evict("sandboxes")
