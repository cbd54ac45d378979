"""Where outputs are continued from: the prefixes that end with their steps, each distinct one of a question once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.stage import record_metrics, stage
from stages.tables import Rollouts, StepPrefixes
from stages.text import step_ends

__all__ = ["cut_into_prefixes"]


@stage(version="1")
def cut_into_prefixes(outputs: Rollouts, *, outputs_per_question: int | None = None) -> StepPrefixes:
    """Every step of every output, with the number of the prefix that it ends.

    A prefix is what was sampled up to and including the step's last token (`step_ends`), as ids: a token that completes
    a line may bring the beginning of the next, and the prefix has all of it. The step that ends with the output has no prefix
    to continue, whether the output ended by itself or by its length.

    Args:
        outputs_per_question: only so many outputs of each question, those of the lowest `sample`; the others get no rows.
            None: all of them.

    Metrics: `rm/steps`, `rm/prefixes` (distinct, to be continued), `rm/prefixes_saved` (share of the steps to be continued
    whose prefix another step has already).

    Raises:
        ValueError: by row: an output without tokens, or whose `text_ends` are not one per token.
    """
    table = outputs.read().select(["question_id", "sample", "prompt_ids", "output_ids", "text", "text_ends"])
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        groups.setdefault(row["question_id"], []).append(row)
    cut = []
    for group in groups.values():
        kept = sorted(group, key=lambda row: row["sample"])[:outputs_per_question]
        numbers: dict[tuple[int, ...], int] = {}
        for row in kept:
            cut += _steps(row, numbers)
    continued = [(row["question_id"], row["prefix"]) for row in cut if row["prefix"] is not None]
    distinct = len(set(continued))
    record_metrics(
        {
            "rm/steps": len(cut),
            "rm/prefixes": distinct,
            "rm/prefixes_saved": 1 - distinct / len(continued) if continued else None,
        }
    )
    return StepPrefixes.write(cut)


def _steps(row: Mapping[str, Any], numbers: dict[tuple[int, ...], int]) -> list[dict[str, Any]]:
    """The steps of one output; `numbers` are those of its question's prefixes so far."""
    key, ids, prompt = (row["question_id"], row["sample"]), row["output_ids"], row["prompt_ids"]
    if not ids or len(row["text_ends"]) != len(ids):
        raise ValueError(
            f"output {key}: expected tokens with one of text_ends for each, found {len(ids)} and {len(row['text_ends'])}"
        )
    steps = []
    for step, end in enumerate(step_ends(row["text"], row["text_ends"])):
        whole = end == len(ids) - 1
        # The prompt is part of what is equal: it is the question's, but nothing in the table says so.
        prefix = None if whole else numbers.setdefault((len(prompt), *prompt, *ids[: end + 1]), len(numbers))
        steps.append({"question_id": key[0], "sample": key[1], "step": step, "end": end, "prefix": prefix})
    return steps
