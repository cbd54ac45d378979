"""Models in MLflow's registry: a version for each digest, which refers to the store and copies nothing.

A version leads to the run that came to the model first; every run that came to it has it among its outputs. The weights stay in
the store, under the digest that the version's source and tags name, so that no pickle and no second copy comes to be.
"""

from __future__ import annotations

import json
from typing import Any, Final

from pipeline.tracking.records import Record

_LOGGED: Final = "cohort.logged_model"
"""Tag of a version: the logged model through which MLflow's pages lead from runs to it."""
_NOT_THERE: Final = "RESOURCE_DOES_NOT_EXIST"
_DESCRIPTION: Final = "What runs came to, a version for each digest. The weights are in the store, under the digest."


def source_of(digest: str) -> str:
    """An artifact as a URI, from the root of the store. MLflow's server takes no path outside its own folders for a source."""
    return f"cohort:///objects/{digest[:2]}/{digest}"


class Registry:
    """The registered models of a tracking server, for the runs of one experiment."""

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
