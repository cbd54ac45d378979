"""What transformers is imported without."""

from __future__ import annotations

import subprocess
import sys


def test_a_model_is_imported_without_scikit_learn_which_can_still_be_imported_by_others() -> None:
    script = (
        "import stages, sys\n"
        "from transformers.models.qwen2 import Qwen2ForCausalLM\n"
        "assert 'transformers.generation.candidate_generator' in sys.modules, 'the place where it was imported has moved'\n"
        "assert 'sklearn' not in sys.modules\n"
        "import sklearn.metrics\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
