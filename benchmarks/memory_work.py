"""What all sides of the memory benchmark update: a policy's shape and two rows of random tokens.

Importable in the peers' environment: nothing of Cohort at the top.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

__all__ = ["MemoryWork", "make_policy"]


@dataclasses.dataclass(frozen=True)
class MemoryWork:
    """One update; as given the shape of Qwen2.5-0.5B."""

    folder: str
    vocabulary: int = 151_936
    hidden: int = 896
    intermediate: int = 4864
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    rows: int = 2
    prompt: int = 64
    """Tokens of a row that are given."""
    output: int = 960
    """Tokens of a row that are learned from."""
    threads: int = 2
    seed: int = 0

    @property
    def policy(self) -> Path:
        """The policy as a Hugging Face folder."""
        return Path(self.folder) / "policy"

    def tiny(self) -> MemoryWork:
        """The same on a model of next to no memory."""
        small = {"vocabulary": 64, "hidden": 32, "intermediate": 64, "layers": 1, "heads": 2, "kv_heads": 2}
        folder = Path(self.folder) / "tiny"
        folder.mkdir(exist_ok=True)
        return dataclasses.replace(self, folder=str(folder), **small)

    def tokens(self, prompt: int, output: int) -> list[tuple[list[int], list[int]]]:
        """Random rows of so many prompt and output tokens."""
        draw = random.Random(self.seed)
        return [
            (
                [draw.randrange(3, self.vocabulary) for _ in range(prompt)],
                [draw.randrange(3, self.vocabulary) for _ in range(output)],
            )
            for _ in range(self.rows)
        ]

    def save(self) -> Path:
        """Write it where a worker finds it."""
        path = Path(self.folder) / "work.json"
        path.write_text(json.dumps(dataclasses.asdict(self)))
        return path

    @classmethod
    def load(cls, path: str) -> MemoryWork:
        """Read it back."""
        return cls(**json.loads(Path(path).read_text()))


def make_policy(work: MemoryWork) -> None:
    """A Qwen2 with random weights and tied embeddings, in float32; a tokenizer that is not used."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(work.seed)
    config = Qwen2Config(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        intermediate_size=work.intermediate,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads,
        max_position_embeddings=work.prompt + work.output,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(work.policy, max_shard_size="100GB")
    words = Tokenizer(models.WordLevel({str(number): number for number in range(3)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1", pad_token="2").save_pretrained(
        work.policy
    )
