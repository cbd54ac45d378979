"""How an output is cut into the steps of process supervision: line by line.

The paper does not say how (DeepSeekMath, 4.1.3 speaks of index(j), the end token of step j). Here a step is a line with its
newline; index(j) is the token that completes it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

__all__ = ["step_ends"]


def step_ends(text: str, text_ends: Sequence[int]) -> list[int]:
    """index(j) of every step of `text`: places among its tokens, in order.

    The last step reaches to the last token, the end of sequence included. Empty lines belong to the step that follows, or to
    the last; a text without any line is one step. An output without tokens has none.

    Args:
        text: the output.
        text_ends: for each of its tokens the length of `text` once that token is decoded.
    """
    if not text_ends:
        return []
    last, position, ends = len(text_ends) - 1, 0, []
    for line in text.split("\n"):
        # The newline is part of its line; the first token that reaches behind it ends the step.
        if line:
            ends.append(min(bisect_left(text_ends, position + len(line) + 1), last))
        position += len(line) + 1
    return [*ends[:-1], last]
