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


_LOGGED: Final = "cohort.logged_model"
"""Tag of a version: the logged model through which MLflow's pages lead from runs to it."""
_NOT_THERE: Final = "RESOURCE_DOES_NOT_EXIST"
_DESCRIPTION: Final = "What runs came to, a version for each digest. The weights are in the store, under the digest."


def source_of(digest: str) -> str:
    """An artifact as a URI, from the root of the store. MLflow's server takes no path outside its own folders for a source."""
    return f"cohort:///objects/{digest[:2]}/{digest}"


class Registry:
    """The registered models of a tracking server, for the runs of one experiment: a version for each digest.

    A version leads to the run that came to the model first; every run that came to it has it among its outputs. The weights
    stay in the store, under the digest that the version's source and tags name: no pickle and no second copy.
    """

    def __init__(self, client: Any, experiment_id: str) -> None:
        self._client = client
        self._experiment_id = experiment_id

    def add(self, model: Record, run_id: str) -> str:
        """The version of a model, made unless it is there, among the outputs of the run; what is there is not repeated.

        A version whose run was deleted is made anew, with the aliases it had: it would lead nowhere.
        """
        name, digest = model["model"], model["digest"]
        every = self._client.search_model_versions(f"name = '{name}' and tags.digest = '{digest}'")
        found = [version for version in every if _LOGGED in version.tags]  # what people registered is theirs
        kept = [version for version in found if self._is_there(version.run_id)]
        version = min(kept, key=lambda part: int(part.version)) if kept else self._create(model, run_id)
        for old in found if not kept else []:
            for alias in self._client.get_model_version(name, old.version).aliases:
                self._client.set_registered_model_alias(name, alias, version.version)
            self._client.delete_model_version(name, old.version)
            self._client.delete_logged_model(old.tags[_LOGGED])
        self._link(run_id, version.tags[_LOGGED], model["step"])
        return str(version.version)

    def point(self, alias: str, model: Record, run_id: str) -> None:
        """Let an alias name the version of a model."""
        self._client.set_registered_model_alias(model["model"], alias, self.add(model, run_id))

    def _create(self, model: Record, run_id: str) -> Any:
        name, digest = model["model"], model["digest"]
        self._register(name)
        logged = self._logged(model, run_id)
        version = self._client.create_model_version(
            name,
            source_of(digest),
            run_id=run_id,
            tags={**model["tags"], "digest": digest, "step": str(model["step"]), _LOGGED: logged},
            description=f"After step {model['step']} of {model['tags'].get('run', 'a run')}: `cohort show {digest[:12]}`",
            model_id=logged,
        )
        # The server notes this itself; a client that writes to the database directly does not.
        versions = json.dumps([{"name": name, "version": version.version}])
        self._client.set_logged_model_tags(logged, {"mlflow.modelVersions": versions})
        return version

    def _register(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name, description=_DESCRIPTION)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _logged(self, model: Record, run_id: str) -> str:
        """Id of the run's logged model of this digest, made unless an earlier attempt did."""
        name, digest = model["model"], model["digest"]
        found = self._client.search_logged_models(
            [self._experiment_id], filter_string=f"tags.digest = '{digest}' AND source_run_id = '{run_id}'"
        )
        if found:
            return str(found[0].model_id)
        tags = {**model["tags"], "digest": digest, "mlflow.model.isExternal": "true"}
        logged = self._client.create_logged_model(
            self._experiment_id, name=f"{name}-{digest[:12]}", source_run_id=run_id, tags=tags, model_type=name
        )
        self._client.finalize_logged_model(logged.model_id, "READY")
        return str(logged.model_id)

    def _link(self, run_id: str, logged: str, step: int) -> None:
        from mlflow.entities import LoggedModelOutput

        outputs = self._client.get_run(run_id).outputs
        if logged not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
            self._client.log_outputs(run_id, [LoggedModelOutput(logged, step=step)])

    def _is_there(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == _NOT_THERE:
                return False
            raise
