"""What tools cost: a call's machinery, in 1,000 dialogues of three turns, and a turn's prefill.

    .venv/bin/python -m benchmarks.tools            # two minutes
    .venv/bin/python -m benchmarks.tools --quick    # 20 dialogues and few tokens, to see that it runs

Calls: `answer_calls` alone, of outputs written by hand: reading tables, running each output's programs in sandboxes side by
side, writing the table of calls. A turn runs the programs of the turns before it again: 6,000 for 3,000 calls, of which no two
are equal. Milliseconds of a core are wall time times cores over calls.

Prefill: 16 outputs of each of 8 questions go on behind a question of 150 tokens and 60 of their own, with a model of 27 M
random weights; seconds with the question computed once for its outputs, over seconds with each output computed whole, in turns.

Prints one line for each figure, and one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.environment import CalculatorConfig, EnvironmentConfig, PythonConfig, answer_calls
from stages.rollout.generator import Prompt, Sampling
from stages.rollout.hf import HFGenerator
from stages.rollout.kv_cache import GROUPED
from stages.tables import Questions, Rollouts, ToolCalls

_TURNS = {
    "python": [f"```python\n# #####\nx{turn} = {turn}\nprint(x{turn})\n```\n```output" for turn in range(3)],
    "calculator": [f"[{turn}+1]" for turn in range(3)],
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20 dialogues")
    quick = parser.parse_args(arguments).quick
    dialogues = 20 if quick else 1000
    found: dict[str, Any] = {}
    for config in (PythonConfig(), CalculatorConfig()):
        with tempfile.TemporaryDirectory() as folder, use_store(Store(Path(folder))):
            found[config.kind] = measure(config, dialogues)
        for turn, milliseconds in enumerate(found[config.kind]):
            print(f"{config.kind:<11} turn {turn}  {milliseconds:.2f} ms of a core a call")
    for new in (1, 40):
        found[f"{new} new tokens"] = times = continuing(new, **({"questions": 2, "G": 2, "layers": 1} if quick else {}))
        print(f"{new:>2} tokens behind a shared question: {min(times[1]) / min(times[0]):.2f} of the time")
    print(json.dumps(found))


def continuing(new: int, *, questions: int = 8, G: int = 16, layers: int = 8) -> tuple[list[float], list[float]]:
    """Return seconds of sampling `new` tokens, three times each: every output computed whole, and its question once."""
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": layers, "vocab_size": 2048}
    config = Qwen2Config(**shape, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=512)
    generator = HFGenerator(Qwen2ForCausalLM._from_config(config, attn_implementation=GROUPED).eval(), batch_rows=512)
    draw = np.random.default_rng(0)
    prompts = []
    for question in range(questions):
        asked = draw.integers(0, 2048, 150).tolist()
        own = [draw.integers(0, 2048, 60).tolist() for _ in range(G)]
        prompts += [Prompt(f"q{question}", asked + rest, [n], shared=150) for n, rest in enumerate(own)]
    whole = [dataclasses.replace(prompt, shared=0) for prompt in prompts]
    found: tuple[list[float], list[float]] = [], []
    for _ in range(3):
        for given, seconds in zip((whole, prompts), found, strict=True):
            started = time.perf_counter()
            generator.generate(given, Sampling(1.0, new, ()))
            seconds.append(time.perf_counter() - started)
    return found


def measure(config: EnvironmentConfig, dialogues: int) -> list[float]:
    """Return milliseconds of a core a call, for each turn."""
    cores = len(os.sched_getaffinity(0))
    names = [f"q{number:04}" for number in range(dialogues)]
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
    return Rollouts.write([row | {"question_id": name, "text": text.replace("#####", name)} for name in names])


if __name__ == "__main__":
    main()
