"""Questions that are put to other processes, so that what crashes, hangs or must be killed is not this one.

Run as a program, in this interpreter or another's, it is such a process and prints one JSON object a line:

    probe.py versions NAME...            versions of distributions, and what they require
    probe.py imports MODULE...           imports each, saying so before it begins
    probe.py lock FILE                   holds a lock of ours until its input ends or it is killed
    probe.py torch RANK WORLD_SIZE FILE  devices of torch, and a sum over ranks that meet through a file

`versions` and `imports` use the standard library only: an environment for vLLM has nothing of ours.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from flows.doctor.examination import Severity

_LINES: Final = 3
_GRACE: Final = 2.0
"""Seconds."""


@dataclass(frozen=True)
class Answer:
    """How a process ended."""

    exit_code: int | None
    """Negative: the signal that ended it. None: it was killed at the deadline."""
    output: str
    errors: str

    @property
    def severity(self) -> Severity:
        """Severity of its failure: a process that was only late may be the victim of a busy machine."""
        return "warning" if self.exit_code is None else "problem"

    def values(self) -> list[dict[str, Any]]:
        """Return the JSON objects that it printed, one a line; other lines, of libraries, are ignored."""
        return [json.loads(line) for line in self.output.splitlines() if line.startswith("{") and line.endswith("}")]

    def failure(self) -> str:
        """Return how it failed, with its last lines of standard error."""
        last = " / ".join(self.errors.strip().splitlines()[-_LINES:])
        ended = "did not end in time" if self.exit_code is None else f"ended with exit code {self.exit_code}"
        return f"{ended}: {last}" if last else ended


def ask(command: Sequence[str | Path], environment: Mapping[str, str], *, deadline: float) -> Answer:
    """Run one program, as `together` does."""
    return together([command], [environment], deadline=deadline)[0]


def together(
    commands: Sequence[Sequence[str | Path]], environments: Sequence[Mapping[str, str]], *, deadline: float
) -> list[Answer]:
    """Run programs side by side, each with an environment of its own.

    All are killed after `deadline` seconds, or soon after one of them failed.

    Raises:
        OSError: there is no such program, or it is none.
    """
    end = time.monotonic() + deadline
    with tempfile.TemporaryDirectory(prefix="cohort-doctor-") as folder:
        paths = [Path(folder, str(number)) for number in range(len(commands))]
        children: list[subprocess.Popen[bytes]] = []
        try:
            for command, environment, path in zip(commands, environments, paths, strict=True):
                children.append(_started(command, environment, path))
            codes = _codes(children, end)
        finally:
            for child in children:
                child.kill()
                child.wait()
        return [Answer(code, _text(path, "out"), _text(path, "err")) for code, path in zip(codes, paths, strict=True)]


def probing(*arguments: str | Path, python: Path | None = None) -> list[str | Path]:
    """Return the command line of the probe in an interpreter, by default this one."""
    return [python or sys.executable, "-P", __file__, *arguments]


def _started(command: Sequence[str | Path], environment: Mapping[str, str], place: Path) -> subprocess.Popen[bytes]:
    # Files, not pipes: what prints much must not wait for a reader. No session: Ctrl-C reaches the children too.
    with Path(f"{place}.out").open("wb") as out, Path(f"{place}.err").open("wb") as err:
        return subprocess.Popen(command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=out, stderr=err)


def _codes(children: Sequence[subprocess.Popen[bytes]], end: float) -> list[int | None]:
    """Return exit codes once all have ended, time is up, or one failed and the others, which may wait for it, had a chance."""
    while any(child.poll() is None for child in children) and time.monotonic() < end:
        if any(child.poll() for child in children):
            end = min(end, time.monotonic() + _GRACE)
        time.sleep(0.02)
    return [child.poll() for child in children]


def _text(place: Path, stream: str) -> str:
    return Path(f"{place}.{stream}").read_text(encoding="utf-8", errors="replace")


_OWN_END: Final = 300
"""Seconds after which it ends by itself, should its parent be gone."""
_RENDEZVOUS: Final = 30
"""Seconds in which ranks must have connected."""


def main(arguments: list[str]) -> None:
    """Carry out one of the four orders."""
    signal.alarm(_OWN_END)
    match arguments:
        case ["versions", *names]:
            report(python=sys.version.split()[0], versions={name: version_of(name) for name in names})
        case ["imports", *modules]:
            for module in modules:
                import_one(module)
        case ["lock", file]:
            hold(Path(file))
        case ["torch", rank, world_size, file]:
            all_reduce(int(rank), int(world_size), file)
        case _:
            raise SystemExit(f"unknown order {arguments}")


def report(**values: Any) -> None:
    """Print values as one line."""
    print(json.dumps(values), flush=True)


def version_of(name: str) -> dict[str, Any] | None:
    """Return version and requirements of an installed distribution."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return {"version": found.version, "requires": found.requires or []}


def import_one(module: str) -> None:
    """Import a module, and print its name first, so that a crash of the process is known to be its own."""
    report(begins=module)
    began = time.perf_counter()
    try:
        importlib.import_module(module)
    except BaseException as error:  # errors of pydantic and CUDA, `sys.exit` in a module: each is a finding
        last = str(error).strip().splitlines()
        report(module=module, error=f"{type(error).__name__}: {last[0] if last else ''}".rstrip(": "))
    else:
        report(module=module, error=None, seconds=round(time.perf_counter() - began, 2))


def hold(file: Path) -> None:
    """Hold a lock, for the check of locks between processes."""
    from pipeline.store.locks import locked

    with locked(file):
        print("held", flush=True)
        sys.stdin.read()


def all_reduce(rank: int, world_size: int, file: str) -> None:
    """Print the devices of torch on rank 0, then on each rank the sum over ranks of rank + 1."""
    began = time.perf_counter()
    import torch

    if rank == 0:
        report(
            torch=torch.__version__,
            seconds=round(time.perf_counter() - began, 2),
            cuda_build=torch.version.cuda,
            nccl=torch.distributed.is_available() and torch.distributed.is_nccl_available(),
            devices=devices(torch),
        )
    timeout = datetime.timedelta(seconds=_RENDEZVOUS)
    torch.distributed.init_process_group("gloo", f"file://{file}", timeout, world_size, rank)
    total = torch.tensor([rank + 1.0])
    torch.distributed.all_reduce(total)
    report(rank=rank, total=total.item())
    torch.distributed.destroy_process_group()


def devices(torch: Any) -> list[dict[str, Any]]:
    """Return CUDA devices with their memory in bytes, or with the error of one that does not compute."""
    found: list[dict[str, Any]] = []
    for number in range(torch.cuda.device_count()):
        about: dict[str, Any] = {"number": number}
        try:
            about["name"] = torch.cuda.get_device_name(number)
            about["free"], about["total"] = torch.cuda.mem_get_info(number)
            torch.ones(1, device=f"cuda:{number}").add_(1).cpu()
            about["bf16"] = torch.cuda.get_device_capability(number) >= (8, 0)
        except (RuntimeError, AssertionError) as error:
            about["error"] = str(error).splitlines()[0]
        found.append(about)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
