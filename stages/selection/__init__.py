"""Which questions are drawn, and which groups are learned from."""

from stages.selection.curriculum import PassRateBand, draw_from_band
from stages.selection.stage import keep_informative

__all__ = ["PassRateBand", "draw_from_band", "keep_informative"]
