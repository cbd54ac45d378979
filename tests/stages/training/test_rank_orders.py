"""What a group of ranks is given, without starting one."""

from __future__ import annotations

import os

import pytest

from pipeline.config import ConfigError
from stages.training import DeepSpeedEngineConfig
from stages.training.ranks import RANK_VARIABLES, body_called, environments, environments_of, interface_of, starts_of


@pytest.mark.parametrize(
    "name", ["os:system", "stages.update.stage:_examples", "stages:update", "pipeline.store:Store"]
)
def test_only_stages_that_run_on_ranks_can_be_ordered(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        body_called(name)


def test_a_stage_that_runs_on_ranks_is_found_by_its_name() -> None:
    assert body_called("stages.update.stage:update_policy").__name__ == "update_policy"


def test_ranks_inherit_nothing_of_a_surrounding_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    surrounding = {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1",
                   "TORCHELASTIC_RUN_ID": "x", "SLURM_PROCID": "7", "OMPI_COMM_WORLD_RANK": "7", "PMI_RANK": "7"}  # fmt: skip
    for name, value in surrounding.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COHORT_DATA", "kept")
    first, second = environments(2, devices=None)
    assert {name: second[name] for name in second if name.startswith(RANK_VARIABLES)} == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert first["RANK"] == first["LOCAL_RANK"] == "0"
    assert (first["COHORT_DATA"], first["DS_ACCELERATOR"]) == ("kept", "cpu")
    assert first["GLOO_SOCKET_IFNAME"].startswith("lo")


def test_threads_are_those_of_the_environment_or_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [rank["OMP_NUM_THREADS"] for rank in environments(2, devices=None)] == ["3", "3"]
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    assert environments(1, devices=None)[0]["OMP_NUM_THREADS"] == str(cores)
    assert environments(10 * cores, devices=None)[0]["OMP_NUM_THREADS"] == "1"


def test_each_rank_sees_one_device_which_is_its_first() -> None:
    ranks = environments(2, devices=["4", "GPU-abc", "6"])
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in ranks] == ["4", "GPU-abc"]
    assert [(rank["RANK"], rank["LOCAL_RANK"]) for rank in ranks] == [("0", "0"), ("1", "0")]
    assert "GLOO_SOCKET_IFNAME" not in ranks[0]


def test_more_ranks_than_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.engine.ranks: .* 1, .* 2;"):
        environments(2, devices=["0"])


def test_one_rank_without_offload_has_neither_in_its_key() -> None:
    assert DeepSpeedEngineConfig(deadline=5.0).key() == {"kind": "deepspeed", "zero_stage": 1}
    assert DeepSpeedEngineConfig(ranks=2, deadline=5.0).key() == {"kind": "deepspeed", "zero_stage": 1, "ranks": 2}
    assert DeepSpeedEngineConfig(offload="optimizer").key()["offload"] == "optimizer"


@pytest.mark.parametrize(("offload", "stage", "least"), [("optimizer", 0, 1), ("parameters", 2, 3)])
def test_what_a_stage_does_not_partition_cannot_be_offloaded(offload: str, stage: int, least: int) -> None:
    with pytest.raises(ConfigError, match=f"{offload} .* {least} .* {stage}"):
        DeepSpeedEngineConfig.parse({"zero_stage": stage, "offload": offload})


HOSTS = ({"address": "10.0.0.1", "ranks": 2}, {"address": "10.0.0.2", "ranks": 1, "start": "ssh node2 {command}"})


def test_ranks_of_another_host_inherit_nothing_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COHORT_DATA", "here")
    hosts = DeepSpeedEngineConfig.parse({"ranks": 3, "hosts": HOSTS}).hosts
    shared = {"WORLD_SIZE": "3", "PYTHONPATH": "/cohort"}
    ranks = environments_of(hosts, shared, dict(os.environ), cuda=True)
    place = {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "0", "COHORT_RANK_ADDRESS": "10.0.0.2"}
    assert ranks[2] == {"RANK": "2", **shared, **place}
    assert [rank["RANK"] for rank in ranks] == ["0", "1", "2"]
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in ranks] == ["0", "1", "0"]
    assert ranks[1]["COHORT_DATA"] == "here"
    assert [rank["LOCAL_RANK"] for rank in environments_of(hosts, shared, {}, cuda=False)] == ["0", "1", "0"]
    assert starts_of(hosts) == [None, None, "ssh node2 {command}"]


def test_an_interface_is_found_by_its_address() -> None:
    loopback = interface_of("127.0.0.1")
    assert loopback.startswith("lo")
    assert interface_of("127.0.0.2") == loopback
    with pytest.raises(ConfigError, match=r"hosts: 192.0.2.7 is no address of .*`ip address` lists"):
        interface_of("192.0.2.7")  # reserved for documentation


@pytest.mark.parametrize(
    ("ranks", "hosts", "message"),
    [
        (4, HOSTS, r"4 .* 2 \+ 1"),
        (3, HOSTS[::-1], "start"),
        (2, ({"address": "0.0.0.0", "ranks": 2},), "0.0.0.0"),
        (2, ({"address": "node1", "ranks": 2},), "hosts.0.address"),
        (3, (HOSTS[0], {**HOSTS[1], "start": "ssh node2"}), "hosts.1.start"),
    ],
)
def test_hosts_that_do_not_fit_are_refused(ranks: int, hosts: tuple[dict[str, object], ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeepSpeedEngineConfig.parse({"ranks": ranks, "hosts": hosts})


def test_where_ranks_are_does_not_decide_what_they_compute() -> None:
    assert DeepSpeedEngineConfig.parse({"ranks": 3, "hosts": HOSTS}).key() == DeepSpeedEngineConfig(ranks=3).key()
