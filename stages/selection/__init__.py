"""Which questions are drawn, and which groups are learned from."""

from stages.selection.stage import PassRateBand, draw_from_band, keep_calls, keep_informative

__all__ = ["PassRateBand", "draw_from_band", "keep_calls", "keep_informative"]
