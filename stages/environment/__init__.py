"""Environments: what answers the calls that outputs make (tool-integrated reasoning), turn by turn."""

from stages.environment.config import (
    CalculatorConfig,
    EnvironmentConfig,
    FunctionConfig,
    OpenEnvConfig,
    PythonConfig,
    ToolCallsConfig,
    VerifiersConfig,
)
from stages.environment.stage import answer_calls, environment_of, parts_of

__all__ = [
    "CalculatorConfig",
    "EnvironmentConfig",
    "FunctionConfig",
    "OpenEnvConfig",
    "PythonConfig",
    "ToolCallsConfig",
    "VerifiersConfig",
    "answer_calls",
    "environment_of",
    "parts_of",
]
