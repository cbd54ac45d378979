"""Environments: what answers the calls that outputs make (tool-integrated reasoning), turn by turn."""

from stages.environment.config import CalculatorConfig, EnvironmentConfig
from stages.environment.stage import answer_calls

__all__ = ["CalculatorConfig", "EnvironmentConfig", "answer_calls"]
