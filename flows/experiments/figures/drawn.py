"""What was drawn last: figures of unchanged results are not drawn again, since matplotlib takes seconds to import.

Beside the pictures lies figures.json: a key over all that the figures are made from (numbers, this code, matplotlib), titles,
captions, and the digests of the files. Anything that differs, also a file that was touched, means that they are drawn anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from flows.experiments.figures.figure import Figure
from flows.experiments.figures.numbers import Study
from flows.places import Places
from flows.records import write_json

__all__ = ["key_of", "read_drawn", "write_drawn"]

_FILE: Final = "figures.json"


def key_of(study: Study, places: Places) -> str:
    """Over everything that figures are made from."""
    experiment = study.result.experiment
    runs = [
        {
            "run": [one.run.arm, one.run.seed, one.run.steps, one.run.policy, one.run.before, one.run.final],
            "curve": {str(step): dict(metrics) for step, metrics in one.curve.items()},
            "policies": sorted(one.policies),
            "samples": [
                [call.step, call.set, call.mode, digest, places.payload(digest).exists()]
                for call in (one.ledger.evaluations if one.ledger else ())
                if (digest := call.artifacts.get("count_votes"))
            ],
        }
        for runs in study.arms.values()
        for one in runs
    ]
    names = [experiment.name, experiment.baseline, *(arm.name for arm in study.result.arms)]
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parents[2] / "learning_curve.py"]
    code = [_digest(file) for file in sources]
    about = [names, runs, code, version("matplotlib")]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def read_drawn(folder: Path, key: str) -> list[Figure] | None:
    """The figures in the folder, if they are those of this key and as they were written."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        found = [
            Figure(
                one["name"], one["title"], one["caption"], folder / f"{one['name']}.png", folder / f"{one['name']}.svg"
            )
            for one in known["figures"]
        ]
        if known["key"] == key and known["files"] == _digests(found):
            return found
    return None


def write_drawn(folder: Path, key: str, figures: Sequence[Figure]) -> None:
    """Note what was drawn.

    Raises:
        OSError: the folder cannot be written.
    """
    told = [{"name": one.name, "title": one.title, "caption": one.caption} for one in figures]
    write_json(folder / _FILE, {"key": key, "figures": told, "files": _digests(figures)})


def _digests(figures: Sequence[Figure]) -> dict[str, str]:
    return {file.name: _digest(file) for one in figures for file in (one.png, one.svg)}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
