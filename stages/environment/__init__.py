"""Environments: the built-in world of chain arithmetic."""

from stages.environment.arithmetic import (
    ArithmeticConfig,
    Author,
    AuthorShares,
    LineCheck,
    Split,
    check_solution,
    draw_chains,
    longest_question,
    render_question,
    unique_chains,
    write_solution,
)

__all__ = [
    "ArithmeticConfig",
    "Author",
    "AuthorShares",
    "LineCheck",
    "Split",
    "check_solution",
    "draw_chains",
    "longest_question",
    "render_question",
    "unique_chains",
    "write_solution",
]
