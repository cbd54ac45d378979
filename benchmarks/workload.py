"""What both sides of the step benchmark compute: one policy, one list of prompts, one set of numbers, in one folder.

The folder is all that the two workers share. Importable in the peers' environment: nothing of Cohort at the top. Where there is
a CUDA device, both sides compute on it.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any, Literal

__all__ = ["ANSWER", "REWARD_PATTERN", "SHAPES", "Kind", "Workload", "make_policy", "make_questions", "shape_of"]

Kind = Literal["random", "sharp", "words"]
"""`random`: random weights and forced lengths, no two outputs alike. `sharp`: the demo's policy half-way, whose outputs of a
question begin alike and repeat. `words`: word problems, with longer prompts."""
REWARD_PATTERN = r"[!-O]\Z"
"""The reward of an output with random weights, on both sides: 1 where its text ends in one of these 47 characters of 127."""
ANSWER = r"^#### (-?\d+)$"
"""The line with the answer of the other workloads; the reward is 1 where the last one is right."""
SHAPES: dict[str, dict[str, int]] = {
    "small": {},
    "qwen2.5-0.5b": {
        "vocabulary": 151_936,
        "hidden": 896,
        "layers": 24,
        "heads": 14,
        "kv_heads": 2,
        "intermediate": 4864,
    },
}
"""What a policy may be like: 5.15 M parameters, or 0.49 G."""
_CHARACTERS = 127
_PAD = "<|pad|>"
_EOS = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Workload:
    """One GRPO step, and how many of them."""

    folder: str
    kind: Kind = "random"
    chat: bool = False
    """Whether a question is a turn of the model's chat template; else a newline follows it."""
    questions: int = 32
    group: int = 16
    tokens: int = 48
    """Of an output, at most; with random weights exactly."""
    steps: int = 6
    """Steps that a worker may be asked for, warm-up included."""
    beta: float = 0.04
    learning_rate: float = 1e-5
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = 2
    vocabulary: int = 128
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 4
    intermediate: int = 768
    seed: int = 0

    @property
    def policy(self) -> Path:
        """The policy as a Hugging Face folder."""
        return Path(self.folder) / "policy"

    @property
    def question_file(self) -> Path:
        """All questions, one JSON object a line."""
        return Path(self.folder) / "questions.jsonl"

    @property
    def answer_pattern(self) -> str:
        """What the peer finds answers by: the answer line, or, of a model not trained to write it, any whole number."""
        return r"-?\d+" if self.chat else ANSWER

    def peer_row(self, row: dict[str, str]) -> dict[str, Any]:
        """A question as the peer's data set has it."""
        text = row["question"]
        prompt = [{"role": "user", "content": text}] if self.chat else text + "\n"
        return {"prompt": prompt, "answer": row["answer"]}

    def write_questions(self, rows: list[dict[str, str]]) -> None:
        """Write all questions where the pipeline reads them."""
        self.question_file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    @property
    def prompt_file(self) -> Path:
        """The prompts of step after step as the pipeline draws them, for the peer: a JSON list of its rows."""
        return Path(self.folder) / "prompts.json"

    def save(self) -> Path:
        """Write it where a worker finds it."""
        path = Path(self.folder) / "workload.json"
        path.write_text(json.dumps(dataclasses.asdict(self)))
        return path

    @classmethod
    def load(cls, path: str) -> Workload:
        """Read it back."""
        return cls(**json.loads(Path(path).read_text()))


def make_questions(workload: Workload) -> list[dict[str, str]]:
    """Chains of 3 to 5 numbers, as in the built-in arithmetic world; no two alike."""
    draw = random.Random(workload.seed)
    questions: dict[str, str] = {}
    while len(questions) < workload.questions * workload.steps:
        numbers = [draw.randint(1, 18)] + [draw.randint(1, 9) * draw.choice((1, -1)) for _ in range(draw.randint(2, 4))]
        text = f"Compute {numbers[0]}" + "".join(f"{number:+d}" for number in numbers[1:]) + "."
        questions[text] = str(sum(numbers))
    rows = [
        {"question_id": f"q{number}", "question": text, "answer": answer}
        for number, (text, answer) in enumerate(questions.items())
    ]
    workload.write_questions(rows)
    return rows


def shape_of(policy: Path) -> dict[str, int]:
    """The shape of a model, by its config.json, as a workload's fields."""
    found = json.loads((policy / "config.json").read_text())
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    if found["model_type"] not in ("llama", "qwen2") or (found.get("head_dim") or hidden // heads) * heads != hidden:
        raise SystemExit(f"{policy}: the floor counts models of llama's and qwen2's form, found {found['model_type']}")
    return {
        "vocabulary": found["vocab_size"],
        "hidden": hidden,
        "layers": found["num_hidden_layers"],
        "heads": heads,
        "kv_heads": found["num_key_value_heads"],
        "intermediate": found["intermediate_size"],
    }


def make_policy(workload: Workload) -> None:
    """A Qwen2 with random weights (5.15 M parameters as given) and a tokenizer of the 127 first ASCII characters, and beyond
    them of words that end in a character of the reward's or in another, in turn.

    Its next-token distribution is nearly uniform, so no two samples agree. The end-of-sequence id lies beyond the model's
    vocabulary: it cannot be drawn, so every output has all its tokens, without a logits processor that would cost one side
    more than the other.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    # Byte-level BPE without merges; Qwen2Tokenizer adds the end of sequence behind the vocabulary.
    words = (f"{number}{'!z'[number % 2]}" for number in range(_CHARACTERS + 1, workload.vocabulary))
    symbols = [_PAD, *map(_byte_symbol, range(_CHARACTERS)), *words]
    vocabulary = {token: number for number, token in enumerate(symbols)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=_EOS, eos_token=_EOS, pad_token=_PAD)
    settings: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": workload.hidden,
        "intermediate_size": workload.intermediate,
        "num_hidden_layers": workload.layers,
        "num_attention_heads": workload.heads,
        "num_key_value_heads": workload.kv_heads,
        "max_position_embeddings": 512 + workload.tokens,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(workload.seed)
    model = Qwen2ForCausalLM(Qwen2Config(**settings))
    assert tokenizer.eos_token_id >= len(vocabulary)
    model.save_pretrained(workload.policy)
    tokenizer.save_pretrained(workload.policy)


def _byte_symbol(byte: int) -> str:
    """The printable character that byte-level BPE writes for an ASCII byte (GPT-2's table)."""
    return chr(byte) if 33 <= byte < 127 else chr(256 + byte)
