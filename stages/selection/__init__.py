"""Which groups are learned from."""

from stages.selection.stage import keep_informative

__all__ = ["keep_informative"]
