"""One run: its log of events, and everything that is a fold of it."""
