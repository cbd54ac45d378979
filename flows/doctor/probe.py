"""Run by `cohort doctor` in a process of its own, in this interpreter or another's; prints one JSON object a line.

    probe.py versions NAME...            versions of distributions, and what they require
    probe.py imports MODULE...           imports each, saying so before it begins
    probe.py torch RANK WORLD_SIZE FILE  devices of torch, and a sum over ranks that meet through a file

Standard library only, and nothing of ours: an environment for vLLM does not have it.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import signal
import sys
import time
from typing import Any

_OWN_END = 300
"""Seconds after which it ends by itself, should whoever started it be gone."""
_MEETING = 30
"""Seconds in which ranks must have found one another."""


def main(arguments: list[str]) -> None:
    """Carry out one of the three orders."""
    signal.alarm(_OWN_END)
    match arguments:
        case ["versions", *names]:
            tell(python=sys.version.split()[0], versions={name: version_of(name) for name in names})
        case ["imports", *modules]:
            for module in modules:
                import_one(module)
        case ["torch", rank, world_size, file]:
            meet(int(rank), int(world_size), file)
        case _:
            raise SystemExit(f"unknown order {arguments}")


def tell(**values: Any) -> None:
    """Print values as one line."""
    print(json.dumps(values), flush=True)


def version_of(name: str) -> dict[str, Any] | None:
    """Version and requirements of an installed distribution."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return {"version": found.version, "requires": found.requires or []}


def import_one(module: str) -> None:
    """Import a module; a crash of the process is then known to be its own."""
    tell(begins=module)
    began = time.perf_counter()
    try:
        importlib.import_module(module)
    except (
        BaseException
    ) as error:  # pydantic, CUDA libraries and `sys.exit` in a module: whatever it is, it is the finding
        last = str(error).strip().splitlines()
        tell(module=module, error=f"{type(error).__name__}: {last[0] if last else ''}".rstrip(": "))
    else:
        tell(module=module, error=None, seconds=round(time.perf_counter() - began, 2))


def meet(rank: int, world_size: int, file: str) -> None:
    """What torch sees, from rank 0; then the sum over ranks of rank + 1, which each rank prints."""
    began = time.perf_counter()
    import torch

    if rank == 0:
        tell(
            torch=torch.__version__,
            seconds=round(time.perf_counter() - began, 2),
            cuda_build=torch.version.cuda,
            nccl=torch.distributed.is_available() and torch.distributed.is_nccl_available(),
            devices=devices(torch),
        )
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=_MEETING),
    )
    total = torch.tensor([rank + 1.0])
    torch.distributed.all_reduce(total)
    tell(rank=rank, total=total.item())
    torch.distributed.destroy_process_group()


def devices(torch: Any) -> list[dict[str, Any]]:
    """CUDA devices with their memory in bytes; one that does not answer is told with its error."""
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
