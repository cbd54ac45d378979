"""Records: what `MlflowRun.send` takes, and which of them a run has in MLflow already.

A record has a kind, a name and what else its kind needs. Of two records of one kind and name the later replaces the earlier;
points of curves (`step`) are known by the last step of each metric, which MLflow has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

Record = dict[str, Any]

_METRIC_NAME: Final = re.compile(r"[A-Za-z0-9_\-. :/]{1,250}")  # what MLflow accepts
_SENT: Final = ".mlflow.json"


def point(step: int, metrics: Mapping[str, float | int | bool | None]) -> Record:
    """Return points of several curves at one step, without None, NaN, infinity and names that MLflow refuses.

    Steps of one metric ascend: a step at or below its last one is taken for a repetition and left out.
    """
    kept = {
        name: float(value)
        for name, value in metrics.items()
        if value is not None and math.isfinite(value) and _METRIC_NAME.fullmatch(name)
    }
    return {"kind": "step", "name": str(step), "step": step, "metrics": kept}


def table(name: str, rows: Sequence[Mapping[str, Any]]) -> Record:
    """Return a table for MLflow's artifact view."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    data = [[_json_value(row.get(column)) for column in columns] for row in rows]
    return {"kind": "table", "name": name, "columns": columns, "data": data}


def figure(path: Path) -> Record:
    """Return a picture, whose name is that of its file."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"kind": "figure", "name": path.name, "path": str(path.resolve()), "digest": digest}


def dataset(name: str, digest: str, *, context: str, rows: int) -> Record:
    """Return a data set that the run reads.

    Args:
        context: what for: `training`, `evaluation`.
    """
    return {"kind": "dataset", "name": name, "digest": digest, "context": context, "rows": rows}


def tags(values: Mapping[str, str]) -> Record:
    """Return tags."""
    return {"kind": "tags", "name": ",".join(sorted(values)), "tags": dict(values)}


def note(markdown: str) -> Record:
    """Return the description at the top of the run's page."""
    return tags({"mlflow.note.content": markdown})


def model(name: str, digest: str, step: int, tags: Mapping[str, str]) -> Record:
    """Return a model that a run came to: a version of the registered model, and an output of the run.

    Args:
        name: the registered model: what kind of model it is.
        digest: of its artifact: it makes the version.
        step: of the run that it was there after; 0 = before the first.
        tags: what else the version says of itself.
    """
    return {
        "kind": "model",
        "name": f"{name}/{digest}",
        "model": name,
        "digest": digest,
        "step": step,
        "tags": dict(tags),
    }


def alias(name: str, model: Record, *, run: str, run_name: str, began: float) -> Record:
    """Return an alias of the version of a model; an equal alias is moved.

    Args:
        model: a record of kind `model`, of another run of the same experiment.
        run: key of that run, which may be sent later: whichever is first makes it in MLflow, with the start `began`.
    """
    name = re.sub(r"[^\w-]", "-", name)  # what MLflow takes
    about = {"run": run, "run_name": run_name, "began": began, "model": model}
    return {"kind": "alias", "name": f"{model['model']}@{name}", "alias": name, **about}


@dataclasses.dataclass(frozen=True)
class Sent:
    """How much of a log is in MLflow: a hidden file in its folder, which no archive takes along."""

    uri: str = ""
    """Tracking URI that it goes to, without its password: the one in force when the run was last started, or synchronised."""
    database: int = -1
    """inode of a local database file, since another file is another database; 0 for a server, -1 before all."""
    run_id: str = ""
    """The MLflow run."""
    number: int = 0
    """Number of the last event that was sent."""
    size: int = 0
    """Bytes of the log up to there."""
    status: str = ""
    """Status that the run has in MLflow; empty before the first."""
    error: str = ""
    """Why the last attempt failed; empty when it did not."""
    tried: float = 0.0
    """When that was, seconds since the epoch."""
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)
    """Kind and name of a record -> hash of the one that was sent last."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return what the folder of a log says; nothing was sent where it has no such file, or a damaged one."""
        try:
            found = cls(**json.loads((folder / _SENT).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return cls()
        whole = all(type(value) is type(getattr(cls(), name)) for name, value in vars(found).items())
        return found if whole and min(found.number, found.size) >= 0 else cls()

    def write(self, folder: Path) -> None:
        """Replace what the folder says in one step."""
        draft = folder / f"{_SENT}.{os.getpid()}"
        draft.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        os.replace(draft, folder / _SENT)

    def unsent(self, records: Iterable[Record]) -> tuple[list[Record], dict[str, str]]:
        """Return the records that do not repeat the last of their kind and name, and the hashes after them."""
        found, hashes = [], dict(self.hashes)
        for record in records:
            name = f"{record['kind']}/{record['name']}"
            content = {key: value for key, value in record.items() if key != "time"}
            digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
            if record["kind"] != "step" and hashes.get(name) == digest:
                continue
            if record["kind"] != "step":
                hashes[name] = digest
            found.append(record)
        return found, hashes


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | types.NoneType) else str(value)
