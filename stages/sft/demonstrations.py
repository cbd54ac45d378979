"""Demonstrations in the place of sampled outputs: SFT as a row of the unified paradigm (DeepSeekMath, section 5.2.1)."""

from __future__ import annotations

from collections import Counter

from pipeline.artifact import take_rows
from pipeline.stage import record_metrics, stage
from stages.epochs import sample_positions
from stages.models import Checkpoint, load_tokenizer
from stages.sft.encoding import encode_demonstrations
from stages.tables import Demonstrations, Rollouts
from stages.text import PromptConfig

__all__ = ["demonstrated_outputs"]


@stage(version="1")
def demonstrated_outputs(
    policy: Checkpoint, demonstrations: Demonstrations, prompt: PromptConfig, *, size: int, step: int, seed: int
) -> Rollouts:
    """q, o ~ P_sft(Q, O) (Table 10, SFT): the `size` demonstrations of step `step` (0, 1, ...), no two alike.

    Steps walk through one shuffled order of the set after another, as batches of questions do. Ids are those that supervised
    fine-tuning trains on, the end of sequence included. A question's demonstrations in the batch are its samples 0, 1, ...

    No policy sampled these rows: they have no log-probabilities, temperature 1, and `seed` is the call's. `text` is what the
    ids decode to, so that `text_ends` are places in it: the completion, after the tokenizer's normalisation of characters.

    Args:
        policy: its tokenizer and window; the weights have no influence.

    Raises:
        DataError: the set has fewer than `size` demonstrations.
        ValueError: a demonstration longer than the model's window, by its question.
    """
    from stages.text import decode_outputs

    table = demonstrations.read()
    drawn = take_rows(table, sample_positions(table.num_rows, size=size, step=step, seed=seed))
    tokenizer = load_tokenizer(policy)
    rows = encode_demonstrations(policy, tokenizer, drawn, prompt)
    outputs = [completion for _, completion in rows]
    decoded = decode_outputs(tokenizer, outputs)
    question_ids = drawn.column("question_id").to_pylist()
    tokens = sum(map(len, outputs))
    record_metrics({"rollout/samples": size, "rollout/tokens": tokens, "rollout/length_mean": tokens / size})
    return Rollouts.write(
        {
            "question_id": question_ids,
            "sample": _numbered(question_ids),
            "prompt_ids": [prompt_ids for prompt_ids, _ in rows],
            "output_ids": outputs,
            "logprobs": [None] * size,
            "finish_reason": ["stop"] * size,
            "text": decoded.texts,
            "text_ends": decoded.ends,
            "temperature": [1.0] * size,
            "seed": [seed] * size,
        }
    )


def _numbered(names: list[str]) -> list[int]:
    """For each name how often it came before."""
    seen: Counter[str] = Counter()
    numbers = []
    for name in names:
        numbers.append(seen[name])
        seen[name] += 1
    return numbers
