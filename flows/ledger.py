"""The ledger of a run: every stage call it asked for, and which artifacts each step and each evaluation came to.

Written beside the summary as ledger.json when a run ends well. It is the same for a run that computes and for one that reuses
everything: from the ledgers of an experiment's runs follows what they share, and from digests everything that can be looked at.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from flows.records import write_json
from pipeline.store.actions import Seconds

__all__ = ["Call", "EvaluationCalls", "Ledger", "read_ledger"]

_FILE: Final = "ledger.json"


@dataclass(frozen=True)
class Call:
    """A stage call, by its key."""

    stage: str
    digest: str
    """Of its result."""
    seconds: Seconds
    """What it took when it was computed, by whichever run that was."""


@dataclass(frozen=True)
class EvaluationCalls:
    """One evaluation of the policy after a step on a held-out set."""

    step: int
    set: str
    mode: str
    """`greedy` or `sampled`."""
    artifacts: dict[str, str]
    """Stage -> digest of what it made for this evaluation: `rollout`, `score`, `count_votes`, `evaluate`."""


@dataclass
class Ledger:
    """Kept by listening to `pipeline.progress`. A flow asks one stage after another: what was made since the last step or
    evaluation belongs to the next one that is reported."""

    calls: dict[str, Call] = field(default_factory=dict)
    """By key, in the order in which they were first asked for."""
    steps: dict[int, dict[str, str]] = field(default_factory=dict)
    """Step -> stage -> digest of the last thing that stage made for it: `rollout`, `score`, `estimate_advantages`, ..."""
    evaluations: list[EvaluationCalls] = field(default_factory=list)
    _since: dict[str, str] = field(default_factory=dict, repr=False)

    def take(self, topic: str, values: dict[str, Any]) -> None:
        """Note one report."""
        match topic:
            case "stage" if values["outcome"] in ("executed", "cached"):
                call = Call(values["name"], values["digest"], values["seconds"])
                self.calls.setdefault(values["key"], call)
                self._since[call.stage] = call.digest
            case "step":
                self.steps[values["step"]] = self._taken()
            case "evaluation":
                where = {name: values[name] for name in ("step", "set", "mode")}
                self.evaluations.append(EvaluationCalls(**where, artifacts=self._taken()))
            case "drift":
                self._taken()  # of outputs that nothing is learned from

    def write(self, folder: Path) -> None:
        """Leave the ledger in the folder of its run."""
        write_json(folder / _FILE, {name: part for name, part in asdict(self).items() if name != "_since"})

    def _taken(self) -> dict[str, str]:
        taken, self._since = self._since, {}
        return taken


class _Written(BaseModel):
    """What ledger.json has to be, whoever wrote it."""

    calls: dict[str, Call]
    steps: dict[int, dict[str, str]]
    evaluations: list[EvaluationCalls]


def read_ledger(folder: Path) -> Ledger | None:
    """The ledger in a run's folder; None where there is none: the run did not end yet, or before ledgers were kept."""
    with contextlib.suppress(OSError, ValueError):
        found = _Written.model_validate_json((folder / _FILE).read_bytes())
        return Ledger(found.calls, found.steps, found.evaluations)
    return None
