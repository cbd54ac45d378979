"""Arms times seeds: planned, run with shared work computed once, and held side by side."""
