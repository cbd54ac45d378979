"""DeepSpeed agrees with torch, restores bit for bit and skips NaN, with adapters too. One module: its import is slow."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.store import Store
from stages.models import WEIGHTS, Checkpoint, load_optimizer_state, load_trainer_state
from stages.training import AdamWConfig, DeepSpeedEngineConfig, LoRAConfig, MuonConfig, TrainingConfig
from stages.training.batching import collate
from stages.training.deepspeed_engine import DeepSpeedEngine
from stages.training.engine import GradientError
from stages.training.forward import completion_logprobs
from stages.training.loop import publish
from stages.training.optimizers import trained_values
from stages.training.torch_engine import TorchEngine
from tests.stages.training.tiny import VOCABULARY, assert_close, continued, random_rows, tiny_checkpoint, update

ROWS = random_rows(6)
BATCH = collate(ROWS, range(6))
STAGES = (0, 1, 2, 3)
LORA = LoRAConfig(r=4)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


MOST = (0, slow(1), slow(2), 3)
"""0 and 3 have code of their own; 1 and 2 share theirs with 3."""


def config(stage: int, **changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "engine": DeepSpeedEngineConfig(zero_stage=stage),  # type: ignore[arg-type]
        "optimizer": AdamWConfig(learning_rate=1e-3),
        "precision": "fp32",
        "max_grad_norm": 0.5,
        "warmup_steps": 4,
    }
    return TrainingConfig(**(settings | changes))


@pytest.fixture
def start(store: Store) -> Iterator[Checkpoint]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny_checkpoint()
    torch.set_num_threads(threads)


@pytest.mark.claim("ZeRO 3 that trains a part")
@pytest.mark.parametrize(
    ("stage", "adapter", "checkpointing"),
    [
        *((stage, None, False) for stage in STAGES),
        *(slow(stage, LORA, checkpointing) for stage in STAGES for checkpointing in (False, True)),
    ],
)
def test_three_updates_equal_those_of_torch(
    start: Checkpoint, stage: int, adapter: LoRAConfig | None, checkpointing: bool
) -> None:
    adamw = AdamWConfig(learning_rate=1e-3, weight_decay=0.1)
    how = config(stage, optimizer=adamw, adapter=adapter, activation_checkpointing=checkpointing)
    ours, theirs = DeepSpeedEngine(start, how), TorchEngine(start, how)
    assert trained_values(ours.model) == trained_values(theirs.model)
    for _ in range(3):
        reports = update(ours, ROWS), update(theirs, ROWS)
        assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=1e-6)
        assert reports[0].learning_rate == reports[1].learning_rate
    files = ("adapter/adapter_model.safetensors",) if adapter else ()
    found, expected = publish(ours), publish(theirs)
    assert_close(found, expected, WEIGHTS, *files)
    assert load_optimizer_state(found).keys() == load_optimizer_state(expected).keys()
    ours.close()


@pytest.mark.parametrize(
    ("stage", "adapter", "checkpointing"),
    [
        (0, None, False),
        (3, None, False),
        *(slow(stage, LORA, True) for stage in STAGES),
        *(slow(stage, None, True) for stage in STAGES),
    ],
)
@pytest.mark.parametrize("max_logits", [None, 8 * VOCABULARY])
def test_float32_logits_in_bf16_are_those_of_torch(
    start: Checkpoint, stage: int, adapter: LoRAConfig | None, checkpointing: bool, max_logits: int | None
) -> None:
    """In full and in chunks; the gradient's norm differs by what products in bfloat16 round."""
    how = config(
        stage,
        precision="bf16",
        adapter=adapter,
        activation_checkpointing=checkpointing,
        max_logits=max_logits,
    )
    ours, theirs = DeepSpeedEngine(start, how), TorchEngine(start, how)
    found = []
    for engine in (ours, theirs):
        with engine.autocast(), torch.no_grad():
            found.append(completion_logprobs(engine.model, BATCH, max_logits=engine.max_logits).logp_BO)
    assert (found[0] - found[1]).abs().max() <= (1e-6 if stage < 3 else 1e-2)  # ZeRO 3 adds biases in float32
    norms = update(ours, ROWS).grad_norm, update(theirs, ROWS).grad_norm
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    ours.close()


MUON = MuonConfig(learning_rate=1e-2)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (0, {"optimizer": MUON, "precision": "bf16"}),
        (0, {}),
        (3, {}),
        *(slow(stage, {}) for stage in (1, 2)),
        *(slow(stage, {"precision": "bf16"}) for stage in STAGES),
        *(slow(stage, {"precision": "bf16", "adapter": LORA}) for stage in STAGES),
        slow(0, {"optimizer": MUON}),
    ],
)
def test_a_reloaded_run_continues_bit_for_bit(start: Checkpoint, stage: int, changes: dict[str, Any]) -> None:
    """And torch reads and writes the same checkpoint."""
    how = config(stage, **changes)
    engine = DeepSpeedEngine(start, how)
    whole, _, reloaded = continued(engine, lambda middle: TorchEngine(middle, how), ROWS)
    assert reloaded == whole
    engine.close()


@pytest.mark.parametrize("stage", MOST)
def test_checkpoints_pass_from_engine_to_engine(start: Checkpoint, stage: int) -> None:
    whole = TorchEngine(start, config(stage))
    update(whole, ROWS)
    deepspeed = DeepSpeedEngine(publish(whole), config(stage))
    update(deepspeed, ROWS)
    back = TorchEngine(publish(deepspeed), config(stage))
    deepspeed.close()
    for engine, updates in ((whole, 2), (back, 1)):
        for _ in range(updates):
            update(engine, ROWS)
    assert_close(publish(back), publish(whole))


@pytest.mark.parametrize("stage", MOST)
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(start: Checkpoint, stage: int) -> None:
    engine = DeepSpeedEngine(start, config(stage))
    update(engine, ROWS)
    before = load_file(publish(engine).path / WEIGHTS)
    report = update(engine, ROWS, weight=math.nan)
    assert report.skipped
    assert not math.isfinite(report.grad_norm)
    assert engine.skipped == 1
    after = load_file(publish(engine).path / WEIGHTS)
    assert all(tensor.equal(before[name]) for name, tensor in after.items())
    report = update(engine, ROWS)
    assert not report.skipped
    assert report.learning_rate == pytest.approx(0.0005)  # the second applied update of four in warm-up
    engine.close()


@pytest.mark.parametrize("stage", MOST)
def test_moments_begun_anew_count_their_own_updates(start: Checkpoint, stage: int) -> None:
    carried = TorchEngine(start, config(stage))
    for _ in range(2):
        update(carried, ROWS)
    middle, anew = publish(carried), config(stage, optimizer_state="reset_once")
    ours, theirs = DeepSpeedEngine(middle, anew), TorchEngine(middle, anew)
    for _ in range(2):
        assert update(ours, ROWS).learning_rate == update(theirs, ROWS).learning_rate
    made = publish(ours)
    assert {float(value) for key, value in load_optimizer_state(made).items() if key.endswith("/step")} == {2.0}
    assert load_trainer_state(made)["updates"] == 4
    assert_close(made, publish(theirs))
    ours.close()


@pytest.mark.parametrize("stage", MOST)
def test_repeated_gradients_that_are_not_finite_stop_and_say_why(start: Checkpoint, stage: int) -> None:
    engine = DeepSpeedEngine(start, config(stage, max_skipped_steps=1, optimizer_state="none"))
    update(engine, ROWS, weight=math.nan)
    made = publish(engine)
    assert load_trainer_state(made) == {"skipped": 1, "skipped_in_a_row": 1, "updates": 0}
    assert not (made.path / "optimizer.safetensors").exists()
    with pytest.raises(GradientError, match=r"^2 steps .*the loss of 2 micro-batches"):
        update(engine, ROWS, weight=math.nan)
    engine.close()


def test_zero_3_leaves_the_linear_layers_of_others_as_they_are(start: Checkpoint) -> None:
    """DeepSpeed replaces them for the whole process; under autocast they would round otherwise."""
    linear = torch.nn.functional.linear
    engine = DeepSpeedEngine(start, config(3, precision="bf16"))
    assert torch.nn.functional.linear is linear
    with engine.autocast():
        assert torch.nn.functional.linear is not linear, "ZeRO 3 needs its own"
    update(engine, ROWS)
    assert torch.nn.functional.linear is linear
    with pytest.raises(ZeroDivisionError), engine.autocast():
        raise ZeroDivisionError
    assert torch.nn.functional.linear is linear


@pytest.mark.claim("dropout left on")
@pytest.mark.parametrize("stage", [0, 3])
def test_dropout_of_the_architecture_is_off_so_that_ratios_are_exactly_1(start: Checkpoint, stage: int) -> None:
    engine = DeepSpeedEngine(tiny_checkpoint(attention_dropout=0.5), config(stage))
    batch = collate(ROWS, range(len(ROWS)))
    update(engine, ROWS)
    logp_BO, old_logp_BO = (completion_logprobs(engine.model, batch).logp_BO.detach() for _ in range(2))
    assert (logp_BO - old_logp_BO).exp().eq(1).all()
    engine.close()


@pytest.mark.slow  # a process that imports DeepSpeed
def test_inside_another_launchers_rank_it_is_quiet_and_a_group_of_its_own(tmp_path: Path) -> None:
    program = f"""
from pipeline.store import Store, use_store
from stages.training.batching import collate
from stages.training.deepspeed_engine import DeepSpeedEngine
from tests.stages.training.test_deepspeed_engine import config
from tests.stages.training.tiny import random_rows, tiny_checkpoint, update
with use_store(Store({str(tmp_path)!r})):
    engine = DeepSpeedEngine(tiny_checkpoint(), config(1))
    update(engine, random_rows(4))
"""
    launched = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | launched | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
