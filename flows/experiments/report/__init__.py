"""What an experiment came to as one HTML file that needs nothing else: no network, no script, no other file.

write_report(result, places, draw_figures(result, places, folder / "figures"))
"""

from __future__ import annotations

from flows.experiments.report.page import report_file, write_report

__all__ = ["report_file", "write_report"]
