"""Policies that are not written: the same weights wherever they are read, and next to no bytes."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from pipeline.derivation.materialise import materialise
from pipeline.residency import evict, resident
from pipeline.store import DamagedArtifactError, Store, StoreError, use_store
from pipeline.store.context import Payloads, writing_payloads
from stages.models import (
    OPTIMIZER,
    WEIGHTS,
    Checkpoint,
    load_model,
    load_tokenizer,
    model_weights,
    plain_folder,
    tensors,
)
from stages.rollout import HFBackendConfig
from stages.rollout.engines import resident_model
from stages.tables import Advantages
from stages.training import LoRAConfig, TorchEngineConfig
from stages.training import engine as engine_module
from stages.training import writer as writer_module
from stages.training.writer import Writer, writer
from stages.update import UpdateConfig, update_policy
from tests.stages.training.groups import training
from tests.stages.training.tiny import tiny_checkpoint
from tests.stages.update.test_update import exploration, tiny_policy

HF = HFBackendConfig(dtype="float32", attention="eager")


@pytest.fixture(autouse=True)
def _replaying(store: Store) -> None:
    store.replay = functools.partial(materialise, store)


def steps(whens: list[Payloads], **changes: Any) -> list[Checkpoint]:
    """Policies after updates whose payloads are written at these times."""
    policy, made = tiny_policy(0), []
    outputs, advantages = exploration()
    config = UpdateConfig(training=training(TorchEngineConfig(), **changes))
    for number, when in enumerate(whens):
        with writing_payloads(when):
            policy = update_policy(policy, tiny_policy(1), outputs, advantages, config, seed=number)
        made.append(policy)
    return made


def weights(policy: Checkpoint) -> dict[str, torch.Tensor]:
    with plain_folder(policy.path) as folder:
        found: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
        return found


def equal(found: Any, expected: Any) -> bool:
    return found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


def elsewhere(folder: Path, make: Callable[[], list[Checkpoint]]) -> list[str | None]:
    """The contents of what is made in another store."""
    evict()
    with use_store(Store(folder)):
        found = [policy.content for policy in make()]
    evict()
    return found


@pytest.mark.parametrize("changes", [{}, {"adapter": LoRAConfig(r=2)}], ids=["full", "lora"])
@pytest.mark.parametrize("when", ["never", "background"])
def test_unwritten_policies_have_the_contents_of_written_ones(
    store: Store, tmp_path: Path, changes: dict[str, Any], when: Payloads
) -> None:
    if changes:
        pytest.importorskip("peft")
    expected = elsewhere(tmp_path / "other", lambda: steps(["now"] * 4, **changes))
    made = steps(["now", when, when, "now"], **changes)
    evict()
    for policy in made:
        assert policy.path.is_dir()
    assert [policy.content for policy in made] == expected


@pytest.mark.parametrize("changes", [{}, {"adapter": LoRAConfig(r=2)}], ids=["full", "lora"])
def test_a_sampler_in_this_process_has_the_trainers_weights_and_nothing_is_written(
    store: Store, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    if changes:
        pytest.importorskip("peft")
    made = steps(["now"], **changes)
    assert equal(model_weights(resident_model(made[0], HF)), weights(made[0]))
    made += steps(["now", "never", "never"], **changes)[1:]
    monkeypatch.setattr("stages.rollout.engines.load_weights", None)
    sampler = {name: tensor.clone() for name, tensor in model_weights(resident_model(made[-1], HF)).items()}
    assert made[-1].content is None
    assert equal(sampler, weights(made[-1]))


def test_whoever_loads_the_model_gets_it_by_way_of_shared_memory(store: Store) -> None:
    made = steps(["now", "never"])
    model = load_model(made[1], dtype=torch.float32)
    assert made[1].content is None
    assert equal(model_weights(model), weights(made[1]))


@pytest.mark.parametrize("room", ["shared memory", "nowhere"])
def test_shared_memory_without_room_is_replaced_by_the_disk(
    store: Store, monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    made = steps(["now", "never"])
    full = tensors._SHARED_MEMORY if room == "shared memory" else Path("/")
    monkeypatch.setattr(engine_module, "free_bytes", lambda folder: 1000 if folder.is_relative_to(full) else 10**9)
    model = load_model(made[1], dtype=torch.float32)
    assert (made[1].content is None) == (room == "shared memory"), (
        "else it is written to the store, which has its own checks"
    )
    assert equal(model_weights(model), weights(made[1]))


def test_an_engine_that_makes_room_for_another_writes_what_it_holds(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another arm goes on from a policy of this one, with other settings."""
    policy = steps(["now", "never"])[-1]
    monkeypatch.setattr("pipeline.derivation.materialise.calls_to_replay", None)  # it is not replayed
    outputs, advantages = exploration()
    config = UpdateConfig(training=training(TorchEngineConfig(), max_grad_norm=0.5))
    update_policy(policy, tiny_policy(1), outputs, advantages, config, seed=7)
    assert policy.content is not None


def test_what_describes_an_unwritten_policy_is_read_without_writing_it(store: Store) -> None:
    made = steps(["now", "never"])
    evict()
    assert len(load_tokenizer(made[1])) == len(load_tokenizer(made[0]))
    assert made[1].content is None


def test_next_to_nothing_is_written_between_checkpoints(store: Store) -> None:
    """A policy of 1.1 million parameters: what is new on the disk, links counted once, by stat."""

    def size() -> int:
        files = {
            (state.st_dev, state.st_ino): state.st_size for state in map(Path.stat, store.root.rglob("*")) if state
        }
        return sum(files.values())

    policy, outputs_and_advantages = tiny_checkpoint(hidden_size=256, intermediate_size=512), exploration()
    config = UpdateConfig(training=training(TorchEngineConfig()))
    sizes = [size()]
    for number, when in enumerate(("now", "never", "never")):
        with writing_payloads(when):
            policy = update_policy(policy, tiny_policy(1), *outputs_and_advantages, config, seed=number)
        sizes.append(size())
    written, *between = (after - before for before, after in itertools.pairwise(sizes))
    assert written > 10_000_000
    assert max(between) < 0.03 * written


def test_a_step_without_anything_to_learn_from_returns_the_policy_that_it_was_given(store: Store) -> None:
    outputs, advantages = exploration()
    table = advantages.read()
    null = pa.nulls(table.num_rows, table.schema.field("advantage").type)
    masked = Advantages.write(table.set_column(table.schema.get_field_index("advantage"), "advantage", null))
    policy = steps(["now", "never"])[1]
    config = UpdateConfig(training=training(TorchEngineConfig()))
    with pytest.warns(UserWarning, match="the policy stays as it is"):
        same = update_policy(policy, tiny_policy(1), outputs, masked, config, seed=9)
    assert same == policy
    assert same.metrics["policy/skipped_steps"] == 1.0, "the call is another"
    with pytest.warns(UserWarning, match="the policy stays as it is"):
        assert update_policy(tiny_policy(0), tiny_policy(1), outputs, masked, config, seed=9) == tiny_policy(0)


# ------------------------------------------------------------------------------------------------ in the background


def test_whoever_reads_a_checkpoint_that_is_being_written_waits_for_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    write = writer_module.write_payload

    def slow(*arguments: Any) -> None:
        go.wait(20)
        write(*arguments)

    monkeypatch.setattr(writer_module, "write_payload", slow)
    made = steps(["now", "background", "never"])
    assert (made[1].content, writer().holds) == (None, made[1].state)
    threading.Timer(0.2, go.set).start()
    monkeypatch.setattr("pipeline.derivation.materialise.calls_to_replay", None)  # it is not replayed
    assert (made[1].path / OPTIMIZER).exists()
    assert store.action(made[1].digest)["content"] == made[1].content
    assert made[2].content is None


def test_a_checkpoint_that_cannot_be_written_stops_the_next_step_that_writes_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_payload", full)
        made = steps(["now", "background", "never"])
        with pytest.raises(StoreError, match="the disk is full"):
            steps(["now", "background", "never", "now"])
    again = steps(["now", "background", "never", "now"])
    assert [policy.digest for policy in again[:3]] == [policy.digest for policy in made], "nothing was lost"
    assert again[3].content is not None
    assert made[1].content is None
    evict()
    assert (made[1].path / WEIGHTS).exists(), "it is replayed"


def test_a_call_that_failed_behind_its_publishing_fails_no_later_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, write = threading.Event(), writer_module.write_payload

    def slow(*arguments: Any) -> None:
        go.wait(20)
        write(*arguments)

    monkeypatch.setattr(writer_module, "write_payload", slow)
    made = steps(["now", "background"])
    store.forget(made[1].digest)  # as if it had never been recorded
    go.set()
    writer().wait()
    assert made[1].content is not None


def test_a_writer_that_is_closed_has_written(store: Store) -> None:
    made = steps(["now", "background"])
    evict()
    assert made[1].content is not None


def test_an_error_of_a_writer_is_raised_once() -> None:
    kept = resident("writer", None, Writer)
    kept._error = DamagedArtifactError("x")
    with pytest.raises(DamagedArtifactError):
        kept.wait()
    kept.wait()
