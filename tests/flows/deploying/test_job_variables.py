"""What a worker of ours takes from Prefect's API: never a command, an environment or a working directory."""

from __future__ import annotations

import asyncio
import os
import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.schemas.objects import Flow, FlowRun, WorkPool
from prefect.client.schemas.responses import DeploymentResponse

from flows.deploying.worker import job_configuration
from pipeline.config import ConfigError

EVIL = {
    "command": "touch /tmp/evil",
    "working_dir": "/tmp",
    "env": {"PYTHONPATH": "/tmp/evil", "LD_PRELOAD": "/tmp/evil.so", "PATH": "/tmp", "PREFECT_API_URL": "http://evil"},
}
FLOW = Flow(id=uuid.uuid4(), name="train", labels={})
STEP = {"prefect.deployments.steps.set_working_directory": {"directory": "/data"}}


def resolved(
    of_run: Any = None, of_deployment: Any = None, template: Any = None, run_of_deployment: bool = True, **changes: Any
) -> Any:
    """The configuration that a worker would start a flow run by."""
    fields = {"entrypoint": "flows.deploying.flow.train", "pull_steps": [STEP]} | changes
    deployment = DeploymentResponse(
        id=uuid.uuid4(), name="d", flow_id=FLOW.id, job_variables=of_deployment or {}, **fields
    )
    run = FlowRun(
        id=uuid.uuid4(),
        name="r",
        flow_id=FLOW.id,
        job_variables=of_run or {},
        deployment_id=deployment.id if run_of_deployment else None,
    )
    pool = WorkPool(name="cohort-local", type="process", base_job_template=template or {})

    async def read_flow(_: uuid.UUID) -> Flow:
        return FLOW

    async def read_deployment(_: uuid.UUID) -> DeploymentResponse:
        return deployment

    client = SimpleNamespace(read_flow=read_flow, read_deployment=read_deployment)
    return asyncio.run(
        job_configuration().resolve_for_flow_run(run, client=client, work_pool=pool, worker_name="worker")
    )


@pytest.mark.claim("a worker that runs the API's command")
@pytest.mark.parametrize(
    ("of_run", "of_deployment", "template"),
    [
        ({}, {}, {}),
        (EVIL, {}, {}),
        ({}, EVIL, {}),
        (EVIL, EVIL, {}),
        ({}, {}, {"job_configuration": EVIL, "variables": {"properties": {}}}),
        ({"env": None}, {"env": "PATH=/tmp"}, {}),
        ({"env": {"COHORT_ROOT": "{{ prefect.blocks.secret.x }}", "COHORT_RUN_TAGS": {"a": "b"}}}, {}, {}),
    ],
)
def test_command_environment_and_working_directory_are_the_hosts_own(
    of_run: Any, of_deployment: Any, template: Any
) -> None:
    found, plain = resolved(of_run, of_deployment, template), resolved()
    assert (found.command, found.working_dir) == (plain.command, plain.working_dir)
    assert found.command.endswith("-m prefect.engine")
    assert not found._command_configured
    ours = {name: value for name, value in found.env.items() if not name.startswith("PREFECT_")}
    assert ours == {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    assert found.env.get("PREFECT_API_URL") == plain.env.get("PREFECT_API_URL")


def test_a_deployment_names_places_left_open_and_a_run_names_data_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COHORT_STORE", "/host/store")
    for name in ("COHORT_ROOT", "COHORT_RESTARTS", "COHORT_RUN_TAGS"):
        monkeypatch.delenv(name, raising=False)
    brought = {"COHORT_ROOT": "/data", "COHORT_STORE": "/elsewhere", "COHORT_RESTARTS": "3"}
    found = resolved({"env": {"COHORT_ROOT": "/run", "COHORT_RUN_TAGS": "{}"}}, {"env": brought})
    assert found.env["COHORT_ROOT"] == "/data"
    assert found.env["COHORT_STORE"] == "/host/store"
    assert (found.env["COHORT_RESTARTS"], found.env["COHORT_RUN_TAGS"]) == ("3", "{}")


@pytest.mark.claim("a worker that runs the API's command")
@pytest.mark.parametrize(
    "changes",
    [
        {"entrypoint": "evil.module.flow"},
        {"entrypoint": "flows/deploying/flow.py:train"},  # a file of the working directory
        {"entrypoint": None},
        {"pull_steps": [{"prefect.deployments.steps.run_shell_script": {"script": "touch /tmp/evil"}}]},
        {"pull_steps": [STEP, {"prefect.deployments.steps.git_clone": {"repository": "https://evil"}}]},
        {"run_of_deployment": False},
    ],
)
def test_other_flows_and_other_steps_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a worker of Cohort"):
        resolved(**changes)
