"""What a question is called and on which side of the train/held-out border it lies: functions of its text alone."""

from __future__ import annotations

import hashlib

__all__ = ["DataError", "identify", "is_held_out"]


class DataError(ValueError):
    """A data set that cannot be used; names the file, the row and the column at fault."""


def identify(question: str) -> str:
    """An id made from the question's text: 16 hexadecimal digits of its sha256, so that equal questions share it.

    64 bits: the chance that any two of a million questions collide is 3e-8, and a collision is refused as a duplicate.
    """
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def is_held_out(text: str, share: float) -> bool:
    """Whether `text` belongs to the held-out part, which holds about `share` of all texts.

    A function of the text alone: whatever order, seed or count a set is made with, train and held-out share nothing.
    """
    # A prefix of its own keeps the split independent of the ids, which hash the bare text.
    point = int.from_bytes(hashlib.sha256(b"split:" + text.encode()).digest()[:8], "big")
    return point < share * 2**64
