"""Checkpoints as plain folders with model cards."""
