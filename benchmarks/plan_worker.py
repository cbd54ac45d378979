"""One stage of one small model in a process of its own: its highest memory and its seconds, for `benchmarks/plan.py`.

    python -m benchmarks.plan_worker CASE.json

The last line on standard output is a JSON object: `peak_mib`, the highest resident memory during an update's second call (of
SFT and rollout the only one) above that of this process once the same stage has run on a tiny model, with its `seconds`
and `cpu_seconds`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

__all__ = ["Case", "make_policies"]

_PAD, _EOS = "<pad>", "<eos>"


@dataclasses.dataclass(frozen=True)
class Case:
    """A stage, a policy's shape, and what it is given."""

    name: str
    stage: Literal["sft", "update", "rollout"]
    shape: dict[str, Any]
    """Settings of a Qwen2, its vocabulary among them."""
    rows: int
    """Outputs, demonstrations, or questions times G."""
    prompt: int
    """Tokens that are given."""
    output: int
    """Tokens that are learned from, or sampled."""
    group: int = 1
    """Outputs of a question."""
    micro_batch_tokens: int = 4096
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of `training`, but for those that every case has."""
    beta: float = 0.0
    """Above 0: with a reference in memory."""
    seed: int = 0

    def tiny(self) -> Case:
        """The same on a model of next to no memory."""
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 128}
        given = {"rows": 4, "group": min(self.group, 4), "prompt": 8, "output": 8, "micro_batch_tokens": 64}
        return dataclasses.replace(self, shape={**self.shape, **small, **heads}, **given)

    def text(self, tokens: int, number: int) -> str:
        """So many random letters, each of them a token."""
        draw = random.Random(f"{self.seed}/{number}/{tokens}")
        return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(tokens))


def make_policy(case: Case, folder: Path) -> None:
    """A Qwen2 with random weights; its tokenizer writes every ASCII character as one token."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    symbols = [chr(byte) if 33 <= byte < 127 else chr(256 + byte) for byte in range(126)]
    vocabulary = {token: number for number, token in enumerate([_PAD, _EOS, *symbols])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=_EOS, eos_token=_EOS, pad_token=_PAD)
    torch.manual_seed(case.seed)
    description = Qwen2Config(**case.shape, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    Qwen2ForCausalLM(description).save_pretrained(folder, max_shard_size="100GB")
    tokenizer.save_pretrained(folder)


def make_policies(files: Sequence[str]) -> None:
    """Those of cases and of their tiny twins, next to their files."""
    for file in map(Path, files):
        case = Case(**json.loads(file.read_text()))
        make_policy(case, file.parent / "policy")
        make_policy(case.tiny(), file.parent / "tiny")


def main() -> None:
    case = Case(**json.loads(Path(sys.argv[1]).read_text()))
    folder = Path(sys.argv[1]).parent
    # Whatever a library prints goes to standard error; standard output carries the answer.
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from pipeline.residency import evict
    from pipeline.store import Store, use_store
    from stages.training.hardware import peak_memory

    with use_store(Store(folder / "store")):
        for call in _calls(case.tiny(), folder / "tiny"):
            call()
        evict()
        gc.collect()
        with peak_memory() as libraries:
            pass
        *before, last = _calls(case, folder / "policy")
        for call in before:
            call()
        started, cpu = time.perf_counter(), time.process_time()
        with peak_memory() as peak:
            last()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    found = {"peak_mib": peak.mib - libraries.mib, "seconds": seconds, "cpu_seconds": cpu}
    answer.write(json.dumps(found) + "\n")


def _calls(case: Case, policy: Path) -> list[Callable[[], object]]:
    """What the process does with a policy, one call after another; the last one is measured."""
    match case.stage:
        case "sft":
            return _sft(case, policy)
        case "rollout":
            return _rollout(case, policy)
        case "update":
            return _update(case, policy)


def _sft(case: Case, policy: Path) -> list[Callable[[], object]]:
    from stages.models import ExternalCheckpointConfig, import_checkpoint
    from stages.sft import SFTConfig, supervised_finetuning
    from stages.tables import Demonstrations
    from stages.text import PromptConfig

    rows = [
        {"question_id": f"q{n}", "question": case.text(case.prompt, n), "completion": case.text(case.output - 1, n)}
        for n in range(case.rows)
    ]
    demonstrations = Demonstrations.write([{**row, "author": None} for row in rows])
    steps = {"max_steps": 2, "decay_steps": 0, "batch_size": case.rows, "micro_batch_tokens": case.micro_batch_tokens}
    config = SFTConfig.model_validate({**steps, "training": case.training})
    base = import_checkpoint(ExternalCheckpointConfig(path=policy))
    return [lambda: supervised_finetuning(base, demonstrations, PromptConfig(), config)]


def _rollout(case: Case, policy: Path) -> list[Callable[[], object]]:
    from stages.models import ExternalCheckpointConfig, import_checkpoint
    from stages.rollout import RolloutConfig, rollout
    from stages.tables import Questions
    from stages.text import PromptConfig

    asked = [
        {"question_id": f"q{n}", "question": case.text(case.prompt, n), "answer": "0", "solution": None}
        for n in range(case.rows // case.group)
    ]
    questions = Questions.write(asked)
    dtype = "bfloat16" if case.training.get("precision") == "bf16" else "float32"
    backend = {"kind": "hf", "dtype": dtype, "threads": 1}
    given = {"G": case.group, "max_output_tokens": case.output, "stop": False, "backend": backend}
    config = RolloutConfig.model_validate(given)
    held = import_checkpoint(ExternalCheckpointConfig(path=policy))
    return [lambda: rollout(held, questions, PromptConfig(), config, seed=0)]


def _update(case: Case, policy: Path) -> list[Callable[[], object]]:
    from stages.models import ExternalCheckpointConfig, import_checkpoint
    from stages.tables import Advantages, Rollouts
    from stages.update import UpdateConfig, update_policy

    draw = random.Random(case.seed)
    keys = [{"question_id": f"q{n // case.group}", "sample": n % case.group} for n in range(case.rows)]
    outputs = Rollouts.write([{**key, **_output(case, draw)} for key in keys])
    nothing = {"returns": None, "pair": None}
    advantages = Advantages.write(
        [{**key, **nothing, "advantage": [float(1 - 2 * (n % 2))] * case.output} for n, key in enumerate(keys)]
    )
    objective = {"kind": "grpo", "beta": case.beta}
    given = {"objective": objective, "micro_batch_tokens": case.micro_batch_tokens, "training": case.training}
    config = UpdateConfig.model_validate(given)
    reference = import_checkpoint(ExternalCheckpointConfig(path=policy))
    held = [reference]

    def step() -> None:
        held.append(update_policy(held[-1], reference, outputs, advantages, config, seed=len(held)))

    return [step, step]  # the first one begins without the optimizer's state, and without a reference


def _output(case: Case, draw: random.Random) -> dict[str, Any]:
    highest = case.shape["vocab_size"] - 1
    return {
        "prompt_ids": [draw.randint(2, highest) for _ in range(case.prompt)],
        "output_ids": [draw.randint(2, highest) for _ in range(case.output)],
        "logprobs": None,
        "finish_reason": "length",
        "text": "",
        "text_ends": [0] * case.output,
        "temperature": 1.0,
        "seed": 0,
    }


if __name__ == "__main__":
    main()
