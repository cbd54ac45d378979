"""Question sets: files of others, the built-in world of chain arithmetic, and the batch of each step.

Every set is a `Questions` table with unique ids; demonstrations for supervised fine-tuning are `Demonstrations`, right and
wrong solutions of others `Solutions`, with what their surface by itself predicts.
"""

from stages.arithmetic import ArithmeticConfig, AuthorShares, LineCheck, check_solution, longest_question
from stages.data.discrimination import Feature, measure_discrimination, shortcut_scores
from stages.data.files import ColumnsConfig, QuestionFileConfig
from stages.data.lengths import PromptLengths, PromptLimitConfig, PromptRoom, limit_prompts, measure_prompts
from stages.data.questions import (
    DemonstrationConfig,
    arithmetic_demonstrations,
    arithmetic_questions,
    demonstrations_from_solutions,
    read_questions,
    sample_batch,
)
from stages.data.solutions import (
    SolutionFileConfig,
    demonstrations_of,
    questions_of,
    read_solutions,
    solution_outputs,
    take_solutions,
)
from stages.tables import DataError

__all__ = [
    "ArithmeticConfig",
    "AuthorShares",
    "ColumnsConfig",
    "DataError",
    "DemonstrationConfig",
    "Feature",
    "LineCheck",
    "PromptLengths",
    "PromptLimitConfig",
    "PromptRoom",
    "QuestionFileConfig",
    "SolutionFileConfig",
    "arithmetic_demonstrations",
    "arithmetic_questions",
    "check_solution",
    "demonstrations_from_solutions",
    "demonstrations_of",
    "limit_prompts",
    "longest_question",
    "measure_discrimination",
    "measure_prompts",
    "questions_of",
    "read_questions",
    "read_solutions",
    "sample_batch",
    "shortcut_scores",
    "solution_outputs",
    "take_solutions",
]
