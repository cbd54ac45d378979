"""What transformers is imported without."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_model_is_imported_without_scikit_learn() -> None:
    script = (
        "import stages, sys\n"
        "from transformers.models.qwen2 import Qwen2ForCausalLM\n"
        "print('transformers.generation.candidate_generator' in sys.modules, 'sklearn' in sys.modules)\n"
        "import sklearn.metrics\n"
        "print('sklearn' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    # The first: the place where transformers asks for it is still the one that is watched.
    assert done.stdout.split() == ["True", "False", "True"]
