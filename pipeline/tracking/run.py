"""One run in MLflow's database: found by its key, continued without repetition, with the end that it really had.

MLflow keeps a step that is logged twice twice and refuses a changed parameter. So the last step of every metric is read from
the run itself before anything is sent: a point is in the database exactly once, even after a kill between the sending and
the note that it was sent.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pipeline.tracking.records import Record
from pipeline.tracking.registry import Registry, source_of

_METRICS_A_BATCH: Final = 1000  # MLflow's limits for one request
_PARAMS_A_BATCH: Final = 100
_PARAM_LENGTH: Final = 6000
_TAG_LENGTH: Final = 8000
_DATASET_DIGEST_LENGTH: Final = 36
_RUN_KEY: Final = "cohort.run_key"

_MODEL_TRAINING: Final = {"mlflow.experimentKind": "custom_model_development"}
"""What MLflow's UI opens an experiment as: runs and charts, not traces and prompts."""


class MlflowRun:
    """The run of one key in one experiment, created when there is none.

    Args:
        run: the `run` record: experiment, name, key, parameters, tags, time.
        artifacts: where the files of a new experiment lie, a URI; None leaves the choice to the server.
    """

    def __init__(self, client: Any, run: Record, artifacts: str | None) -> None:
        self._client = client
        self._experiment_id = self._experiment(run["experiment"], artifacts)
        self._registry = Registry(client, self._experiment_id)
        state = self._run_of(run["key"], run["name"], run["time"])
        self.id: str = state.info.run_id
        self.status: str = state.info.status
        self._params: dict[str, str] = dict(state.data.params)
        self._tables: list[dict[str, str]] = json.loads(state.data.tags.get("mlflow.loggedArtifacts", "[]"))
        # The public data.metrics has no steps; the message that goes over the wire has.
        self._last_step = {metric.key: metric.step for metric in state.to_proto().data.metrics}

    def send(self, records: Sequence[Record]) -> None:
        """Send records, in order; points that the run has already are left out.

        Raises:
            Exception: whatever MLflow raises; then open the run anew and send again.
        """
        self._send_steps([record for record in records if record["kind"] == "step"])
        for record in records:
            match record["kind"]:
                case "run":
                    self._send_params(record["params"])
                    self._send_tags(record["tags"])
                case "tags":
                    self._send_tags(record["tags"])
                case "table":
                    self._send_table(record)
                case "dataset":
                    self._send_dataset(record)
                case "model":
                    self._registry.add(record, self.id)
                case "alias":
                    # The run that has the model may be sent later: then it is made here.
                    run = self._run_of(record["run"], record["run_name"], record["began"])
                    self._registry.point(record["alias"], record["model"], run.info.run_id)
                case "figure":
                    # The file may be gone by now: a picture, drawn again by the next run.
                    with contextlib.suppress(FileNotFoundError):
                        self._client.log_artifact(self.id, record["path"], "figures")

    def set_status(self, status: str, time_ms: int | None) -> None:
        """RUNNING, or how the run ended, and when."""
        if status == "RUNNING":
            self._client.update_run(self.id, status="RUNNING")
        else:
            self._client.set_terminated(self.id, status=status, end_time=time_ms)
        self.status = status

    def _experiment(self, name: str, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts, tags=_MODEL_TRAINING))
            except Exception:
                found = self._client.get_experiment_by_name(name)  # another run created it in this moment
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _run_of(self, key: str, name: str, began: float) -> Any:
        where = f"tags.`{_RUN_KEY}` = '{key}'"
        found = self._client.search_runs([self._experiment_id], filter_string=where, max_results=1)
        if found:
            return found[0]
        tags = {_RUN_KEY: key, "mlflow.source.name": "cohort", "mlflow.source.type": "LOCAL"}
        # Not when it is first sent, which may be after its end.
        return self._client.create_run(self._experiment_id, start_time=int(began * 1000), run_name=name, tags=tags)

    def _send_steps(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        points = []
        last_step = dict(self._last_step)
        for record in records:
            for key, value in record["metrics"].items():
                if record["step"] > last_step.get(key, -1):
                    points.append(Metric(key, value, int(record["time"] * 1000), record["step"]))
            last_step |= {key: max(record["step"], last_step.get(key, -1)) for key in record["metrics"]}
        self._log("metrics", points, _METRICS_A_BATCH)
        self._last_step = last_step

    def _send_params(self, params: Mapping[str, str]) -> None:
        """Parameters are written once; one that differs now is a tag, since MLflow refuses to change it."""
        from mlflow.entities import Param

        known = self._params
        fresh = [Param(key, value[:_PARAM_LENGTH]) for key, value in params.items() if key not in known]
        drift = {k: v for k, v in params.items() if known.get(k, v[:_PARAM_LENGTH]) != v[:_PARAM_LENGTH]}
        self._log("params", fresh, _PARAMS_A_BATCH)
        self._params = known | {param.key: param.value for param in fresh}
        if drift:
            self._send_tags({"cohort.drift": "; ".join(f"{k}: {known[k]} -> {v}" for k, v in sorted(drift.items()))})

    def _send_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._log("tags", [RunTag(key, value[:_TAG_LENGTH]) for key, value in tags.items()], _PARAMS_A_BATCH)

    def _log(self, kind: str, entries: list[Any], most: int) -> None:
        for start in range(0, len(entries), most):
            self._client.log_batch(self.id, **{kind: entries[start : start + most]})

    def _send_table(self, record: Record) -> None:
        """A table as MLflow's own `log_table` stores it, but replaced where that appends."""
        path = f"{record['name']}.json"
        self._client.log_dict(self.id, {"columns": record["columns"], "data": record["data"]}, path)
        if {"path": path, "type": "table"} not in self._tables:
            self._tables.append({"path": path, "type": "table"})
            self._client.set_tag(self.id, "mlflow.loggedArtifacts", json.dumps(self._tables))

    def _send_dataset(self, record: Record) -> None:
        """A data set among the run's inputs, by digest; MLflow leaves out what is there."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=record["name"],
            digest=record["digest"][:_DATASET_DIGEST_LENGTH],
            source_type="cohort",
            source=json.dumps({"uri": source_of(record["digest"])}),
            profile=json.dumps({"num_rows": record["rows"]}),
        )
        context = InputTag("mlflow.data.context", record["context"])
        self._client.log_inputs(self.id, datasets=[DatasetInput(dataset, tags=[context])])
