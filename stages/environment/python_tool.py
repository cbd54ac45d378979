"""Programs within outputs, run in a sandbox (`sandbox_process.py`), several outputs side by side."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import select
import struct
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from pipeline.config import ConfigError
from pipeline.residency import resident
from stages.environment.answers import Answer, Dialogue, Status, cut, side_by_side
from stages.environment.config import PythonConfig

_SIDE_BY_SIDE: Final = 8
_GRACE: Final = 0.5
"""Seconds beyond its deadline until a sandbox that is silent is killed."""
_START: Final = 20.0
_LOOK: Final = 0.25
"""Seconds between two looks at the memory of a program."""
_SLACK: Final = 64 * 2**20
"""Bytes that a program's processes may take beyond its limit: the interpreter itself."""
_HEAD: Final = struct.Struct("<I")


class SandboxError(RuntimeError):
    """A sandbox that does not start, or that died."""


class _MemoryError(SandboxError):
    """A program whose processes take too much together."""


class PythonTool:
    """Implement `Environment`: the program at the end of a turn, behind the programs of the turns before that ended well.

    State persists between the turns of an output as in a notebook: its earlier programs run again in the same fresh process,
    their output thrown away. So an answer depends on what is recorded alone, and no process waits for a turn.
    """

    def __init__(self, config: PythonConfig) -> None:
        """Take the settings; raise ConfigError as `require_sandbox`."""
        self._config, self._sandboxes = config, require_sandbox(config)

    def answer(self, dialogues: Sequence[Dialogue]) -> list[Answer]:
        """Answer the last call of each, eight side by side; equal programs run once."""
        asked = [self._programs(dialogue) for dialogue in dialogues]
        distinct = list(dict.fromkeys(asked))
        found = dict(zip(distinct, side_by_side(self._answer, distinct, most=_SIDE_BY_SIDE), strict=True))
        return [found[programs] for programs in asked]

    def _programs(self, dialogue: Dialogue) -> tuple[str, ...]:
        """Return the program of the last turn, behind those before it that ended well; none where a turn has none."""
        _, opened, rest = dialogue.turns[-1].removesuffix(self._config.closes).rpartition(self._config.opens)
        earlier = [call["input"] for call in dialogue.calls if call["status"] == "ok"]
        return (*earlier, rest.rstrip().removesuffix("```")) if opened else ()

    def _answer(self, programs: tuple[str, ...]) -> Answer:
        config = self._config
        if not programs:
            return self._said("", "", "refused", f"no program: expected one behind {config.opens.strip()}")
        status, output = self._sandboxes.run(programs, config)
        said = {
            "timeout": f"timeout: not done after {config.deadline:g} s",
            "memory": f"memory: more than {config.memory_mb} MiB",
        }.get(status, "")
        return self._said(programs[-1], output, status, said)

    def _said(self, program: str, output: str, status: Status, said: str) -> Answer:
        config = self._config
        result = "\n".join(part for part in (cut(output.rstrip("\n"), config.max_observation), said) if part)
        return Answer("python", program, output, f"{config.before_answer}{result}{config.after_answer}", status)


def require_sandbox(config: PythonConfig) -> Sandboxes:
    """Return the sandboxes of such programs, which stay warm.

    Raises:
        ConfigError: this system does not let a user make namespaces.
    """
    if config.sandbox == "limits":
        warnings.warn(
            "environment.sandbox=limits: programs of the policy run with your rights, files and network; only time and memory "
            "are limited",
            stacklevel=2,
        )
    try:
        return resident("sandboxes", config.sandbox, lambda: Sandboxes(config.sandbox))
    except SandboxError as error:
        raise ConfigError(
            f"environment: expected a system on which a user may make namespaces, found: {error}. Allow it (for example "
            "`sysctl kernel.unprivileged_userns_clone=1`, or an AppArmor profile), or run programs with your own rights by "
            "environment.sandbox=limits"
        ) from None


class Sandboxes:
    """Hold processes that run programs, each one at a time."""

    def __init__(self, kind: str) -> None:
        """Start the first.

        Raises:
            SandboxError: it does not start.
        """
        self._kind = kind
        self._idle: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        self._idle.put(_Process(kind))
        for _ in range(_SIDE_BY_SIDE - 1):
            self._idle.put(None)
        atexit.register(self.close)

    def run(self, programs: Sequence[str], config: PythonConfig) -> tuple[Status, str]:
        """Run programs one after another; return the status and what the last one printed."""
        process = self._idle.get()
        try:
            if process is None or not process.alive:
                process = _Process(self._kind)
            return process.run(programs, config)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End the processes that are idle; each ends by itself once its input is closed."""
        with contextlib.suppress(queue.Empty):
            while True:
                process = self._idle.get_nowait()
                if process is not None:
                    process.close()


class _Process:
    def __init__(self, kind: str) -> None:
        packages = sysconfig.get_path("purelib")
        shown = [sys.base_prefix, packages, "/usr/lib", "/usr/lib64", "/lib", "/lib64"]
        environment = {
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": packages,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-s", "-B", "-P", str(Path(__file__).with_name("sandbox_process.py")), kind]
            + [path for path in shown if path != "/usr"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        try:
            answer = self._read(_START)
        except SandboxError:
            self.close()
            raise
        if not answer["ready"]:
            self.close()
            raise SandboxError(str(answer["detail"]))

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def run(self, programs: Sequence[str], config: PythonConfig) -> tuple[Status, str]:
        request = {"programs": list(programs), "deadline": config.deadline, "memory_mb": config.memory_mb}
        written = json.dumps(request).encode()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(_HEAD.pack(len(written)) + written)
            self._process.stdin.flush()
            answer = self._read(config.deadline + _GRACE, config.memory_mb * 2**20 + _SLACK)
        except (OSError, SandboxError) as error:
            self.close()
            return "memory" if isinstance(error, _MemoryError) else "timeout", ""
        return answer["status"], answer["output"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _read(self, seconds: float, memory: int | None = None) -> Any:
        end = time.monotonic() + seconds
        (size,) = _HEAD.unpack(self._bytes(_HEAD.size, end, memory))
        return json.loads(self._bytes(size, end, memory))

    def _bytes(self, count: int, end: float, memory: int | None) -> bytes:
        assert self._process.stdout is not None
        number, found = self._process.stdout.fileno(), b""
        while len(found) < count:
            left = max(0.0, end - time.monotonic())
            if not select.select([number], [], [], left if memory is None else min(left, _LOOK))[0]:
                if left <= _LOOK:
                    raise SandboxError("no answer")
                if memory is not None and _taken_below(self._process.pid) > memory:
                    raise _MemoryError("too much memory")
                continue
            if not (part := os.read(number, count - len(found))):
                raise SandboxError("the process ended")
            found += part
        return found


def _taken_below(pid: int) -> int:
    """Return bytes of memory that the processes below one take together; a page that several share counts in parts."""
    total, below = 0, list[psutil.Process]()
    with contextlib.suppress(psutil.Error):  # it may end at any time
        below = psutil.Process(pid).children(recursive=True)
    for process in below:
        with contextlib.suppress(psutil.Error, OSError):
            try:
                total += process.memory_full_info().pss
            except psutil.AccessDenied:
                taken = process.memory_info()
                total += taken.rss - taken.shared
    return total
