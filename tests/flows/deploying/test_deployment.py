"""What deployments are made of, without a server: the form's schema, schedules, places."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.config import IterativeRLConfig
from flows.config.recipes import arithmetic_cpu, arithmetic_smoke
from flows.deploying.deployment import cron_schedule, form_schema, places_passed_on, ready_for_form
from pipeline.config import ConfigError
from stages.rollout import RolloutConfig

REPOSITORY = Path(__file__).parents[3]


def train(config: IterativeRLConfig) -> None:
    """Has the parameter of the deployed flow."""


def fields(part: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Dotted path and schema of every field of every section."""
    for name, section in part["definitions"].items():
        yield from ((f"{name}.{field}", values) for field, values in section.get("properties", {}).items())


def test_every_field_of_the_form_has_a_description() -> None:
    schema = ready_for_form({"definitions": IterativeRLConfig.model_json_schema()["$defs"]})
    described = dict(fields(schema))
    assert [path for path, values in described.items() if not values.get("description", "").strip()] == []
    assert described["RolloutConfig.G"]["description"] == RolloutConfig.model_fields["G"].description
    kinds = {part["$ref"].rpartition("/")[2] for part in described["UpdateConfig.objective"]["anyOf"]}
    assert {"GRPOConfig", "DPOConfig", "PPOConfig"} <= kinds
    assert "oneOf" not in json.dumps(schema)
    backend = described["EvaluationPlan.backend"]["anyOf"]
    assert [part.get("$ref", part.get("type")).rpartition("/")[2] for part in backend][-1] == "null"
    assert all(set(part) & {"$ref", "type"} for part in backend), "a choice within a choice has no name in the form"


@pytest.mark.scale
def test_the_form_takes_what_a_recipe_says_and_names_what_is_wrong() -> None:
    from prefect.utilities.schema_tools import validate

    schema = form_schema(train)
    values = arithmetic_smoke().model_dump(mode="json")
    assert validate({"config": values}, schema, raise_on_error=False) == []
    values["rollout"]["G"], values["oops"] = "x", 1
    said = " ".join(error.message for error in validate({"config": values}, schema, raise_on_error=False))
    assert "'oops' was unexpected" in said
    assert "'x' is not of type 'integer'" in said


@pytest.mark.slow
def test_a_schedule_is_a_cron_expression_in_a_time_zone() -> None:
    schedule = cron_schedule("30 6 * * mon-fri", "Europe/Berlin")
    assert (schedule.cron, schedule.timezone) == ("30 6 * * mon-fri", "Europe/Berlin")
    assert cron_schedule("@daily").timezone == "UTC"


@pytest.mark.parametrize(
    ("text", "zone", "message"),
    [
        ("0 25 * * *", "UTC", r"hour: '25' is not 0 to 23"),
        ("0 2 * * xyz", "UTC", r"day of the week: 'xyz' is not 0 to 6 or sun to sat"),
        ("61 2 0 * *", "UTC", r"(?s)minute: '61' is not 0 to 59.*day of the month: '0' is not 1 to 31"),
        ("every day", "UTC", r"expected 5 fields \(minute, hour, .*\), found 2; for example '30 6 "),
        ("0 6-6 * * mon-mon", "UTC", r"(?s)hour: '6-6' is a range of one; write 6.*'mon-mon' is a range of one"),
        ("", "UTC", r"expected 5 fields \(minute, hour, .*\), found 0"),
        ("@often", "UTC", r"cannot be read; for example"),
        ("0 2 * * *", "Mars/Base", r"--timezone 'Mars/Base': expected a name such as Europe/Berlin"),
        ("0 2 * * *", "Europe/Berln", r"--timezone 'Europe/Berln': did you mean 'Europe/Berlin'\?"),
        ("0 2 * * *", "berlin", r"did you mean 'Europe/Berlin'\?"),
        ("0 2 * * *", "america/new york", r"did you mean 'America/New_York'\?"),
        ("0 2 * * *", "", r"--timezone ''"),
        *((text, "UTC", "never fires") for text in ("30 2 31 2 *", "0 0 30 feb *", "0 0 31 4,6,9,11 *")),
        *((text, "UTC", "never fires") for text in ("0 0 31 9 *", "*/5 * 30-31 2 *")),
    ],
)
def test_a_schedule_that_cannot_be_kept_names_the_field_with_an_example(text: str, zone: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cron_schedule(text, zone)


@pytest.mark.parametrize("text", ["0 0 29 2 *", "0 0 31 * *", "0 0 31 1,2 *", "0 0 L 2 *", "30 2 * * sun", "@yearly"])
def test_a_schedule_that_fires_seldom_is_taken(text: str) -> None:
    assert cron_schedule(text, "Europe/Berlin").cron == text


@pytest.mark.scale
def test_prefect_reads_prefect_yaml_and_deploys_to_both_pools() -> None:
    from prefect.cli.deploy._models import PrefectYamlModel

    read = PrefectYamlModel.model_validate(yaml.safe_load((REPOSITORY / "prefect.yaml").read_text(encoding="utf-8")))
    assert {part.work_pool.name for part in read.deployments if part.work_pool} == {"cohort-local", "cohort-kubernetes"}
    for part in read.deployments:
        assert part.entrypoint == "flows.deploying.flow.train"
        assert IterativeRLConfig.parse(part.parameters["config"]) == arithmetic_cpu()


def test_a_place_with_a_password_is_not_passed_on_to_prefect() -> None:
    environment = {
        "COHORT_STORE": "s3://bucket/folder",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
        "HOME": "/home/me",
    }
    passed = {"COHORT_STORE": "s3://bucket/folder", "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}
    assert places_passed_on(environment) == passed
    secret = environment | {"MLFLOW_TRACKING_URI": "postgresql://cohort:secret@127.0.0.1/mlflow"}
    assert places_passed_on(secret) == {"COHORT_STORE": "s3://bucket/folder"}
