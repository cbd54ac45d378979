"""Policies of a finished run that were freed or lost come back when somebody needs them, without sampling anything."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flows.cli import run_command
from flows.runs.ledger import read_ledger
from flows.runs.paths import Places
from flows.runs.record import read_records
from pipeline.residency import evict
from pipeline.store import Store
from tests.flows.short_runs import smoke

pytestmark = pytest.mark.slow
SETTINGS = ("name=whole", "evaluation.every=0", "evaluation.samples=0")


def train(root: Path, iterations: int) -> str:
    """Train on for some iterations; the final policy."""
    assert run_command(smoke(root, *SETTINGS, f"iterations={iterations}")) == 0
    evict()
    return max(read_records(Places(root)), key=lambda record: record.total_steps).policy


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root with a run of two iterations of two steps."""
    root = tmp_path_factory.mktemp("finished")
    train(root, 2)
    yield root
    evict()


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def trained(root: Path) -> list[str]:
    """The supervised policy, and that of every step."""
    (record,) = read_records(Places(root))
    ledger = read_ledger(record.folder)
    supervised = next(call.digest for call in ledger.calls.values() if call.stage == "supervised_finetuning")
    return [supervised, *(made["update_policy"] for _, made in sorted(ledger.steps.items()))]


def samples(root: Path) -> int:
    return sum(record["stage"] == "rollout" for record in Store(root / "store").actions())


@pytest.mark.parametrize("how", ["prune", "delete"])
def test_any_policy_that_is_gone_is_exported_bit_for_bit(finished: Path, copy: Path, tmp_path: Path, how: str) -> None:
    store, policies, sampled = Store(copy / "store"), trained(copy), samples(copy)
    for digest in policies[1:4]:
        store.prune(digest) if how == "prune" else shutil.rmtree(store.folder(digest))
    target = tmp_path / "out"
    with pytest.warns(UserWarning, match=rf"{policies[3][:12]} is not there .* replaying 3 x update_policy"):
        assert run_command(["export", policies[3], str(target), "--dtype", "float32", "--root", str(copy)]) == 0
    ours = load_file(target / "model.safetensors")
    theirs = load_file(Store(finished / "store").path(policies[3]) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert samples(copy) == sampled
    assert [Store(copy / "store").freed(digest) != frozenset() for digest in policies[1:4]] == [True, True, False]


def test_a_policy_that_is_gone_is_shown_and_its_next_step_replayed(copy: Path) -> None:
    store, policies = Store(copy / "store"), trained(copy)
    for digest in policies:
        store.prune(digest)
    with pytest.warns(UserWarning, match="replaying supervised_finetuning, 2 x update_policy"):
        assert run_command(["show", policies[2], "--root", str(copy)]) == 0
    store.prune(policies[2])
    command = ["replay", "update_policy", "--run", "whole", "--step", "3", "--set", "objective.beta=0.2"]
    with pytest.warns(UserWarning, match="replaying supervised_finetuning, 2 x update_policy"):
        assert run_command([*command, "--root", str(copy)]) == 0


def test_a_run_whose_policies_are_gone_goes_on_to_the_same_bits(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for digest in trained(copy):
        Store(copy / "store").prune(digest)
    longer = train(copy, 3)
    assert "replaying supervised_finetuning, 4 x update_policy" in capsys.readouterr().out.replace("\n", " ")
    undisturbed = train(tmp_path / "undisturbed", 3)
    contents = [
        Store(root / "store").manifest(name)["digest"]
        for root, name in ((copy, longer), (tmp_path / "undisturbed", undisturbed))
    ]
    assert contents[0] == contents[1]


def test_a_policy_whose_rewards_are_gone_says_what_is_missing(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, policies = Store(copy / "store"), trained(copy)
    (record,) = read_records(Places(copy))
    gone = read_ledger(record.folder).steps[2]["estimate_advantages"]
    for digest in (policies[2], gone):
        store.prune(digest)
    assert run_command(["export", policies[2], str(tmp_path / "out"), "--root", str(copy)]) == 1
    assert f"nothing to replay {policies[2][:12]} from: {gone[:12]}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ never written


def several(root: Path, *settings: str) -> Store:
    """A run of nine steps that evaluates its last policy only."""
    assert run_command(smoke(root, *SETTINGS, "iterations=1", "steps=9", *settings)) == 0
    evict()
    return Store(root / "store")


def calls(store: Store) -> dict[str, str]:
    return {record["key"]: record["result"] for record in store.actions()}


def contents(store: Store) -> list[str | None]:
    """What the records of the updates say, in the order of the steps."""
    return [record["content"] for record in store.actions() if record["stage"] == "update_policy"]


def test_however_often_checkpoints_are_written_the_run_is_the_same(tmp_path: Path) -> None:
    every, seventh, last = (several(tmp_path / str(n), f"checkpoint.every={n}") for n in (1, 7, 1000))
    assert calls(every) == calls(seventh) == calls(last)
    assert None not in contents(every)
    assert [step for step, content in enumerate(contents(seventh), 1) if content] == [7, 9]
    assert [step for step, content in enumerate(contents(last), 1) if content] == [9]
    for some in (seventh, last):
        pairs = zip(contents(some), contents(every), strict=True)
        assert all(found in (None, expected) for found, expected in pairs)


def test_the_demo_is_the_same_however_often_it_writes(tmp_path: Path) -> None:
    """Its own settings with fewer questions, demonstrations and steps: Muon, then AdamW under ZeRO 1, in its own precision."""
    few = ["sft.max_steps=40", "sft.decay_steps=10", "data.demonstrations.chains.count=2000", "data.train.count=256"]
    few += [f"data.evaluation.{name}.count=16" for name in ("in_domain", "out_of_domain")]
    few += ["evaluation.every=0", "questions_per_step=8", "steps=8"]
    options = [part for setting in few for part in ("--set", setting)]
    stores = {}
    for every in (1, 3, 1000):
        root = tmp_path / str(every)
        command = ["run", "arithmetic_cpu", *options, "--set", f"checkpoint.every={every}", "--engine", "inline"]
        assert run_command([*command, "--root", str(root)]) == 0
        evict()
        stores[every] = Store(root / "store")
    assert calls(stores[1]) == calls(stores[3]) == calls(stores[1000])
    expected = contents(stores[1])
    assert None not in expected
    assert contents(stores[3]) == [expected[step] if step in (2, 5, 7) else None for step in range(8)]
    assert contents(stores[1000]) == [None] * 7 + [expected[7]]
    fifth = trained(tmp_path / "1000")[5]
    with pytest.warns(UserWarning, match="replaying 5 x update_policy"):
        assert run_command(["export", fifth, str(tmp_path / "out"), "--root", str(tmp_path / "1000")]) == 0
    assert contents(stores[1000])[4] == expected[4]


def test_any_policy_that_was_never_written_is_exported_and_its_next_step_replayed(tmp_path: Path) -> None:
    store = several(tmp_path / "root", "checkpoint.every=7")
    policies, sampled = trained(tmp_path / "root"), samples(tmp_path / "root")
    command = ["export", policies[5], str(tmp_path / "out"), "--dtype", "float32", "--root", str(tmp_path / "root")]
    with pytest.warns(UserWarning, match=rf"{policies[5][:12]} is not there .* replaying 5 x update_policy"):
        assert run_command(command) == 0
    expected = several(tmp_path / "other", "checkpoint.every=1")
    assert contents(store)[:5] == [None] * 4 + [contents(expected)[4]]
    command = ["replay", "update_policy", "--run", "whole", "--step", "9", "--set", "objective.beta=0.2"]
    with pytest.warns(UserWarning, match=rf"{policies[8][:12]} is not there .* replaying update_policy"):
        assert run_command([*command, "--root", str(tmp_path / "root")]) == 0
    assert samples(tmp_path / "root") == sampled


def test_the_last_policy_of_a_shorter_run_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = several(tmp_path, "checkpoint.every=1000")
    several(tmp_path, "checkpoint.every=1000", "steps=4")
    assert "replaying 4 x update_policy" in capsys.readouterr().out.replace("\n", " ")
    assert [step for step, content in enumerate(contents(store), 1) if content] == [4, 9]


# ------------------------------------------------------------------------------------------------ what commands say


@pytest.fixture(scope="module")
def seventh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root with a run of nine steps that wrote the policies of step 7 and of the last."""
    root = tmp_path_factory.mktemp("seventh")
    several(root, "checkpoint.every=7")
    yield root
    evict()


@pytest.fixture
def sparse(seventh: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(seventh, tmp_path / "sparse"))


def said(command: list[str], root: Path, capsys: pytest.CaptureFixture[str], *, code: int = 0) -> str:
    """What a command printed, on one line."""
    capsys.readouterr()
    assert run_command([*command, "--root", str(root)]) == code
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.filterwarnings("error:.*replaying")
def test_an_unwritten_policy_is_described_without_a_replay(sparse: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = trained(sparse)
    found = said(["show", policies[8]], sparse, capsys)
    assert f"not written; replayed from step 7 (1 update); cohort export {policies[8][:12]} FOLDER makes it" in found
    assert "architecture Qwen2ForCausalLM" in found
    assert "content" not in found
    assert f"replayed from {policies[0][:12]} (2 updates)" in said(["show", policies[2]], sparse, capsys)
    assert "not written" not in said(["show", policies[7]], sparse, capsys)
    assert [step for step, content in enumerate(contents(Store(sparse / "store")), 1) if content] == [7, 9]


@pytest.mark.filterwarnings("error:.*replaying")
def test_lineage_marks_the_policies_that_are_replayed(sparse: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = trained(sparse)
    Store(sparse / "store").prune(policies[0])
    for what in ("whole", policies[9]):
        found = said(["lineage", what, "--depth", "0"], sparse, capsys)
        assert f"Checkpoint {policies[8][:12]} (update_policy" in found
        assert found.count("not written; replayed from step 7 (1 update)") == 1
        again = f"replayed from {policies[0][:12]} (6 updates), which is made again first"
        assert again in found
    assert (
        "not written" not in said(["lineage", policies[7], "--depth", "1"], sparse, capsys).split(policies[6][:12])[0]
    )


def test_diff_compares_the_weights_of_unwritten_policies(sparse: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = trained(sparse)
    with pytest.warns(UserWarning, match="replaying"):
        found = said(["diff", policies[1], policies[2]], sparse, capsys)
    assert "the same content" not in found
    assert "model.embed_tokens.weight" in found


def test_verify_counts_unwritten_policies_apart_and_replays_lost_ones(
    sparse: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, policies = Store(sparse / "store"), trained(sparse)
    assert "7 not written (replayed when they are read), 0 pruned, 0 damaged, 0 missing" in said(
        ["verify"], sparse, capsys
    )
    expected = store.manifest(policies[7])["digest"]
    shutil.rmtree(store.folder(policies[7]))
    (weights := store.path(policies[9]) / "model.safetensors").chmod(0o644)
    weights.write_bytes(b"altered")
    assert "1 damaged, 1 missing" in said(["verify"], sparse, capsys, code=1)
    with pytest.warns(UserWarning, match="replaying"):
        found = said(["verify", "--repair"], sparse, capsys)
    assert f"replayed {policies[7]}" in found
    assert f"replayed {policies[9]}" in found
    assert "7 not written (replayed when they are read), 0 pruned, 0 damaged, 0 missing" in found
    assert Store(sparse / "store").manifest(policies[7])["digest"] == expected


def test_what_takes_the_disk_tells_descriptions_from_checkpoints(
    sparse: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Checkpoint: not written 7" in said(["store", "du"], sparse, capsys)
    policies = trained(sparse)
    found = said(["prune", policies[3], policies[7], "--dry-run"], sparse, capsys)
    assert f"{policies[3][:12]} Checkpoint: not written" in found
    assert f"{policies[7][:12]} Checkpoint " in found


def test_an_exported_description_comes_with_what_it_is_replayed_from(
    sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies, other = trained(sparse), tmp_path / "other"
    found = said(["store", "export", policies[8], str(tmp_path / "one.tar")], sparse, capsys)
    assert "1 of them as descriptions" in found
    assert "7 of them as descriptions" in said(["store", "export", "whole", str(tmp_path / "run.tar")], sparse, capsys)
    said(["store", "import", str(tmp_path / "one.tar")], other, capsys)
    store = Store(other / "store")
    assert store.is_written(policies[7])
    assert not store.folder(policies[6]).exists()
    with pytest.warns(UserWarning, match="replaying update_policy"):
        said(["export", policies[8], str(tmp_path / "out")], other, capsys)
    with pytest.warns(UserWarning, match="replaying update_policy"):
        said(["export", policies[8], str(tmp_path / "here")], sparse, capsys)
    assert store.manifest(policies[8])["digest"] == Store(sparse / "store").manifest(policies[8])["digest"]


def test_an_export_says_which_policies_cannot_be_replayed(
    sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = trained(sparse)
    (record,) = read_records(Places(sparse))
    gone = read_ledger(record.folder).steps[8]["estimate_advantages"]
    Store(sparse / "store").prune(gone)
    found = said(["store", "export", policies[8], str(tmp_path / "one.tar")], sparse, capsys)
    assert f"nothing to replay {policies[8][:12]} from: {gone[:12]}" in found
