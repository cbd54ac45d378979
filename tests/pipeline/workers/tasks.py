"""What the pool's tests have done in worker processes; a module of its own, as workers import it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Any


def double(x: int) -> int:
    return 2 * x


def say(x: int) -> int:
    print("printed by a task", flush=True)
    os.write(1, b"written by a task\n")
    return x


def note_and_hang(file: str) -> None:
    """Leaves a mark whenever it is begun, and never ends."""
    with open(file, "a") as notes:
        notes.write("begun\n")
    time.sleep(600)


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


def misbehave(how: str) -> Any:
    match how:
        case "hang":
            while True:
                pass
        case "crash":
            os.abort()
        case "allocate":
            return str(len(bytearray(8 * 2**30)))
        case "allocate slowly":
            kept = []
            while True:
                kept.append(bytearray(2**20))
                time.sleep(0.001)
        case "raise":
            raise ValueError("no such luck")
        case "raise unknown":
            raise type("Unknown", (Exception,), {})("of this process only")
        case "raise mute":
            raise MuteError
        case "exit":
            sys.exit(3)
        case "return a lock":
            return threading.Lock()
        case _:
            return how


def start_a_program(how: str) -> int:
    """Leaves a program running, and says its process."""
    if how == "fork":
        child = os.fork()
        if child == 0:
            time.sleep(600)
        return child
    return subprocess.Popen(["sleep", "600"], start_new_session=how == "new session").pid


def signal_its_group(number: int) -> None:
    os.killpg(os.getpgrp(), number)
    time.sleep(600)


def math_verify_accepts(gold: str, prediction: str, is_text: bool) -> bool:
    """What math-verify itself says, with all of its defaults but the alarms that a worker cannot have."""
    from math_verify import parse, verify

    stated = prediction if is_text else f"\\boxed{{{prediction}}}"
    formula = gold if is_text or "$" in gold else f"${gold}$"
    return verify(parse(formula, parsing_timeout=None), parse(stated, parsing_timeout=None), timeout_seconds=None)
