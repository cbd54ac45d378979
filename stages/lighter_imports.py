"""transformers without scikit-learn: a third of its import time and 100 MB, for a part of it that is not used here.

Its assisted generation imports scikit-learn, and with it scipy and pandas, where they are installed (MLflow requires them).
Measured on two cores: 8.4 against 11.9 CPU seconds, in every process that loads a model.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final

__all__ = ["leave_out_scikit_learn"]

_USER: Final = "transformers.generation.candidate_generator"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing; sees when the module is about to be imported, which is when transformers' own switch is there."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname == _USER:
            sys.meta_path.remove(self)
            import transformers.utils

            transformers.utils.is_sklearn_available = lambda: False


def leave_out_scikit_learn() -> None:
    """Whatever imports transformers' models later in this process imports them without scikit-learn."""
    if _USER not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
