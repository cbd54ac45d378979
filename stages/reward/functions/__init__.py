"""Reward functions of the user: found by name, called in worker processes, never imported here."""
