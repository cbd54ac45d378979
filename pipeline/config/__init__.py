"""Configs: frozen, closed pydantic models that override by dotted key, round-trip through YAML and make cache keys."""

from pipeline.config.model import UNKEYED, Config, Override, changes_of, flatten, parse_settings
from pipeline.config.text import ConfigError

__all__ = ["UNKEYED", "Config", "ConfigError", "Override", "changes_of", "flatten", "parse_settings"]
