"""What the machinery of tools costs a call: 1,000 dialogues of three turns whose programs cost nothing.

    .venv/bin/python -m benchmarks.tools            # a minute
    .venv/bin/python -m benchmarks.tools --quick    # 20 dialogues, to see that it runs

`answer_calls` alone, of outputs written by hand: reading tables, running each output's programs in sandboxes side by side,
writing the table of calls. A turn runs the programs of the turns before it again: 6,000 for 3,000 calls. Milliseconds of
a core are wall time times cores over calls. Prints one line for each tool and turn, and one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.environment import CalculatorConfig, EnvironmentConfig, PythonConfig, answer_calls
from stages.tables import Questions, Rollouts, ToolCalls

_TURNS = {
    "python": [f"```python\nx{turn} = {turn}\nprint(x{turn})\n```\n```output" for turn in range(3)],
    "calculator": [f"[{turn}+1]" for turn in range(3)],
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20 dialogues")
    dialogues = 20 if parser.parse_args(arguments).quick else 1000
    found: dict[str, list[float]] = {}
    for config in (PythonConfig(), CalculatorConfig()):
        with tempfile.TemporaryDirectory() as folder, use_store(Store(Path(folder))):
            found[config.kind] = measure(config, dialogues)
        for turn, milliseconds in enumerate(found[config.kind]):
            print(f"{config.kind:<11} turn {turn}  {milliseconds:.2f} ms of a core a call")
    print(json.dumps(found))


def measure(config: EnvironmentConfig, dialogues: int) -> list[float]:
    """Return milliseconds of a core a call, for each turn."""
    cores = len(os.sched_getaffinity(0))
    names = [f"q{number}" for number in range(dialogues)]
    asked = {"question_id": names, "question": names, "answer": ["0"] * dialogues, "solution": [None] * dialogues}
    questions, calls, found = Questions.write(asked), None, []
    answer_calls(_outputs(config.kind, names[:8], [], 0), questions, None, config)  # the sandboxes start
    for turn in range(len(_TURNS[config.kind])):
        observations = [] if calls is None else _observed(calls, dialogues)
        outputs = _outputs(config.kind, names, observations, turn)
        started = time.perf_counter()
        calls = answer_calls(outputs, questions, calls, config)
        found.append((time.perf_counter() - started) * cores / dialogues * 1e3)
    assert {row["status"] for row in calls.rows()} == {"ok"} if calls else False
    evict()
    return found


def _observed(calls: ToolCalls, dialogues: int) -> list[str]:
    """Return what the environment has written in the turns so far, which is the same in all dialogues."""
    return [row["observation"] for row in calls.rows()][::dialogues]


def _outputs(kind: str, names: Sequence[str], observations: Sequence[str], turn: int) -> Rollouts:
    """Return outputs that wait in their turn `turn`, of a token for each character."""
    text, spans = "", []
    for written, observed in zip(_TURNS[kind][: turn + 1], [*observations, ""], strict=True):
        spans.append({"start": len(text), "end": len(text) + len(written)})
        text += written + observed
    row: dict[str, Any] = {
        "sample": 0,
        "prompt_ids": [1],
        "output_ids": list(range(len(text))),
        "logprobs": None,
        "finish_reason": "call",
        "text": text,
        "text_ends": list(range(1, len(text) + 1)),
        "temperature": 1.0,
        "seed": 0,
        "turns": spans,
    }
    return Rollouts.write([row | {"question_id": name} for name in names])


if __name__ == "__main__":
    main()
