"""Question sets: files of others, the built-in world of chain arithmetic, and the batch of each step.

Every set is a `Questions` table with unique ids; demonstrations for supervised fine-tuning are `Demonstrations`.
"""

from stages.arithmetic import ArithmeticConfig, AuthorShares, LineCheck, check_solution
from stages.data.sampling import sample_batch
from stages.data.sources import ColumnsConfig, QuestionFileConfig
from stages.data.stages import (
    DemonstrationConfig,
    arithmetic_demonstrations,
    arithmetic_questions,
    demonstrations_from_solutions,
    read_questions,
)
from stages.identity import DataError

__all__ = [
    "ArithmeticConfig",
    "AuthorShares",
    "ColumnsConfig",
    "DataError",
    "DemonstrationConfig",
    "LineCheck",
    "QuestionFileConfig",
    "arithmetic_demonstrations",
    "arithmetic_questions",
    "check_solution",
    "demonstrations_from_solutions",
    "read_questions",
    "sample_batch",
]
