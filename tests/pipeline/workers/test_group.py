"""Groups of real processes: orders and replies, and every way in which one of them can end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.progress import listen
from pipeline.workers.group import Group, RefusedError, WorkerError
from tests.pipeline.processes import await_end

HANDLER = """
import os, subprocess, sys, time

def make_handler():
    print("ready, says", os.environ["COHORT_LAUNCHER_RANK"], flush=True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    rank = int(os.environ["COHORT_LAUNCHER_RANK"])

    def handle(order, report):
        if order.get("rank", rank) != rank:
            return time.sleep(order.get("others", 0))
        match order["do"]:
            case "pids":
                return [os.getpid(), child.pid]
            case "echo":
                report("echo", {"done": 1, "of": rank})
                return order
            case "work":
                for done in range(4):
                    time.sleep(0.5)
                    report("work", {"done": done + 1})
            case "raise":
                raise ValueError("expected a number, found a cat")
            case "desert":
                if rank == order["deserter"]:
                    os._exit(3)
                time.sleep(0.2)
                raise ConnectionError("where are the others?")
            case "exit":
                print("this is the end", flush=True)
                os._exit(order["code"])
            case "hang":
                time.sleep(600)
    return handle
"""

Start = Callable[..., Group]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    groups: list[Group] = []

    def started(ranks: int = 1, handler: str = HANDLER, deadline: float = 20.0, **where: Any) -> Group:
        file = tmp_path / "handler.py"
        file.write_text(textwrap.dedent(handler))
        environments = [{"PATH": os.environ["PATH"]}] * ranks
        group = Group(
            "crew",
            file,
            python=Path(sys.executable),
            environments=environments,
            logs=tmp_path,
            deadline=deadline,
            **where,
        )
        groups.append(group)
        return group

    yield started
    for group in groups:
        group.close()


def test_every_rank_replies_and_the_first_ones_progress_is_reported(start: Start) -> None:
    group, heard = start(ranks=2), []
    with listen(lambda topic, values: heard.append((topic, values))):
        replies = group.order({"do": "echo", "text": "größer"}, deadline=10)
    assert replies == [{"do": "echo", "text": "größer"}] * 2
    assert heard == [("echo", {"done": 1, "of": 0})]
    assert group.order({"do": "echo"}, deadline=10) == [{"do": "echo"}] * 2, "and again"


def test_closing_leaves_no_process_nor_what_it_started(start: Start) -> None:
    group = start(ranks=2)
    pids = [pid for own in group.order({"do": "pids"}, deadline=10) for pid in own]
    assert len(set(pids)) == 4
    assert pids[::2] == group.pids
    assert all(psutil.pid_exists(pid) for pid in pids)
    group.close()
    await_end(pids)
    assert not group.alive


def test_a_rank_that_dies_is_named_with_last_lines_and_ends_the_group(start: Start) -> None:
    group = start(ranks=2)
    pids = [pid for own in group.order({"do": "pids"}, deadline=10) for pid in own]
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"crew, rank 1 of 2 ended with exit code 3") as raised:
        group.order({"do": "exit", "code": 3, "rank": 1, "others": 600}, deadline=60)
    assert time.monotonic() - began < 10
    assert (raised.value.rank, raised.value.exit_code) == (1, 3)
    assert group.failed
    assert "| ready, says 1\n  | this is the end" in str(raised.value)
    await_end(pids)


def test_ctrl_c_ends_the_group_and_is_no_failure_that_keeps_logs(start: Start) -> None:
    group = start()

    def interrupt(topic: str, values: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with listen(interrupt), pytest.raises(KeyboardInterrupt):
        group.order({"do": "echo"}, deadline=10)
    assert not group.alive
    assert not group.failed


def test_a_killed_process_is_distinguished_from_one_that_ended(start: Start) -> None:
    group = start()
    [pids] = group.order({"do": "pids"}, deadline=10)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"was killed \(signal 9: out of memory"):
        group.order({"do": "echo"}, deadline=10)
    await_end(pids)


def test_a_process_that_hangs_is_killed_at_the_deadline(start: Start) -> None:
    group = start(ranks=2)
    pids = [pid for own in group.order({"do": "pids"}, deadline=10) for pid in own]
    with pytest.raises(WorkerError, match="rank 1 of 2 gave no answer within 1 s and was killed"):
        group.order({"do": "hang", "rank": 1}, deadline=1)
    await_end(pids)


def test_a_single_process_survives_an_order_that_it_refuses(start: Start) -> None:
    group = start()
    with pytest.raises(RefusedError, match="crew: ValueError: expected a number, found a cat") as raised:
        group.order({"do": "raise"}, deadline=10)
    assert (raised.value.kinds[0], raised.value.text) == ("ValueError", "expected a number, found a cat")
    assert group.order({"do": "echo"}, deadline=10) == [{"do": "echo"}]


def test_one_of_several_that_fails_ends_all(start: Start) -> None:
    group = start(ranks=2)
    with pytest.raises(WorkerError, match="crew, rank 1 of 2: ValueError: expected a number"):
        group.order({"do": "raise", "rank": 1, "others": 600}, deadline=60)
    assert not group.alive


def test_a_rank_that_lost_its_peers_is_not_named_for_the_rank_that_died(start: Start) -> None:
    with pytest.raises(WorkerError, match="crew, rank 1 of 2 ended with exit code 3"):
        start(ranks=2).order({"do": "desert", "deserter": 1}, deadline=60)


def test_progress_renews_a_deadline_where_that_is_asked_for(start: Start) -> None:
    group = start()
    assert group.order({"do": "work"}, deadline=1.5, renewed=True) == [None]
    with pytest.raises(WorkerError, match="gave no answer within 1 s"):
        group.order({"do": "work"}, deadline=1)


@pytest.mark.parametrize("message", [{"reply": 7}, {"error": "no", "kinds": ["ValueError"]}], ids=["reply", "error"])
def test_what_a_process_says_just_before_it_ends_is_heard(
    start: Start, monkeypatch: pytest.MonkeyPatch, message: dict[str, Any]
) -> None:
    """It ends between two looks at it: the first thing that is looked at finds it dead, with its message sent."""
    ours, theirs = Pipe()
    group, said = start(), []

    class Ending:
        pid = group.pids[0]

        def poll(self) -> int:
            if not said:
                said.append(theirs.send_bytes(json.dumps(message).encode()))
            return 0

    process = group._processes[0]
    monkeypatch.setattr(group, "_processes", [Ending()])
    monkeypatch.setattr(group, "_connections", [ours])
    try:
        if "reply" in message:
            assert group._replies(time.monotonic() + 5, 5) == [7]
        else:
            with pytest.raises(RefusedError, match="no"):
                group._replies(time.monotonic() + 5, 5)
    finally:
        group._processes, group._connections = [process], []


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ("import vllm_of_nowhere", "crew: ModuleNotFoundError: No module named 'vllm_of_nowhere'"),
        ("import time\ndef make_handler():\n    time.sleep(600)", "rank 0 of 1 gave no answer within 1 s"),
    ],
    ids=["no module", "never ready"],
)
def test_a_handler_that_cannot_be_made_in_time_is_an_error_at_the_start(
    start: Start, handler: str, message: str
) -> None:
    with pytest.raises(WorkerError, match=message):
        start(handler=handler, deadline=1 if "sleep" in handler else 20)


def test_foreign_connections_delay_neither_the_start_nor_its_deadline(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come first; in the second group the process never becomes ready."""
    foreign: list[socket.socket] = []
    listen_on = socket.create_server

    def crowded(address: tuple[str, int]) -> socket.socket:
        server = listen_on(address)
        foreign.extend(socket.create_connection(server.getsockname()) for _ in range(3))
        foreign[-1].sendall(b"\0\0\0\4rank")
        return server

    monkeypatch.setattr(socket, "create_server", crowded)
    assert start(ranks=2).order({"do": "echo"}, deadline=10) == [{"do": "echo"}] * 2
    for each in foreign:
        each.settimeout(5)
        while each.recv(4096):  # the challenge, and then the end
            pass
    began = time.monotonic()
    with pytest.raises(WorkerError, match="rank 0 of 1 gave no answer within 1 s"):
        start(handler="import time\ndef make_handler():\n    time.sleep(600)", deadline=0.6)
    assert time.monotonic() - began < 10


def test_workers_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "handler.py").write_text(HANDLER)
    launcher = f"""
        import os, sys, time
        from pathlib import Path
        from pipeline.workers.group import Group
        folder = Path({str(tmp_path)!r})
        group = Group("crew", folder / "handler.py", python=Path(sys.executable),
                      environments=[dict(os.environ)], logs=folder, deadline=20)
        print(*group.order({{"do": "pids"}}, deadline=10)[0], flush=True)
        time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(launcher)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    process.wait()
    await_end(pids)


@pytest.fixture
def two_hosts() -> dict[str, Any]:
    """Two addresses of this one; what is started by a command is started by a shell, as ssh would."""
    return {"address": "127.0.0.2", "starts": [None, "sh -c 'echo on its way; {command}'"]}


@pytest.mark.slow
def test_a_rank_on_another_host_is_started_by_the_command_and_works_like_any(
    start: Start, two_hosts: dict[str, Any]
) -> None:
    group = start(ranks=2, **two_hosts)
    assert group.order({"do": "echo"}, deadline=10) == [{"do": "echo"}] * 2
    [(here, child), (there, its_child)] = group.order({"do": "pids"}, deadline=10)
    assert group.pids[0] == here
    assert there not in (here, group.pids[1])
    ends = {kind.laddr.ip for kind in psutil.Process().net_connections() if kind.raddr and kind.laddr.ip == "127.0.0.2"}
    assert ends == {"127.0.0.2"}
    remote = psutil.Process(there)
    assert remote.environ()["COHORT_LAUNCHER_RANK"] == "1"
    secret = psutil.Process(here).environ()["COHORT_LAUNCHER_KEY"]
    assert not any(secret in part for p in psutil.process_iter() for part in _command(p))
    group.close()
    await_end([here, child, there, its_child])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["exit", "hang"])
def test_a_rank_on_another_host_that_dies_or_hangs_is_named_and_gone(
    start: Start, two_hosts: dict[str, Any], what: str
) -> None:
    group = start(ranks=2, **two_hosts)
    pids = [pid for own in group.order({"do": "pids"}, deadline=10) for pid in own]
    message = (
        r"(?s)crew, rank 1 of 2 ended with exit code 3.*on its way" if what == "exit" else "rank 1 of 2 gave no answer"
    )
    with pytest.raises(WorkerError, match=message):
        group.order({"do": what, "code": 3, "rank": 1}, deadline=2)
    await_end(pids)


@pytest.mark.slow
def test_a_host_that_cannot_be_reached_is_an_error_with_what_was_said_there(start: Start) -> None:
    with pytest.raises(WorkerError, match=r"(?s)rank 1 of 2 ended with exit code 255.*no route to node2"):
        start(ranks=2, starts=[None, "sh -c 'echo no route to node2; exit 255; {command}'"])


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
