"""Run as a module: train as a file of overrides says, in a root of its own, without MLflow or Prefect.

python -m flows.proving.run OVERRIDES.yaml ROOT
"""

from __future__ import annotations

import sys
from pathlib import Path

from flows.config.resolve import choose
from flows.iterative_rl import iterative_rl
from flows.runs.paths import Places
from pipeline.config import ConfigError
from pipeline.store import use_store
from stages.rollout import require_backend

RECIPE = "arithmetic_smoke"


def main(file: Path, root: Path) -> None:
    """Train."""
    config = choose(RECIPE, [file], []).config
    require_backend(config.rollout.backend)
    with use_store(Places(root).open_store()):
        iterative_rl(config)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except ConfigError as error:
        sys.exit(f"configuration: {error}")
