"""The torch engine: saved, loaded and continued, a run is the run that was never interrupted."""

from __future__ import annotations

import math
from typing import Any

import pytest
from safetensors.torch import load_file

from pipeline.residency import evict
from pipeline.store import Store
from stages.models import load_tokenizer
from stages.training import AdamWConfig, LoRAConfig, MuonConfig, TrainingConfig
from stages.training.batching import collate
from stages.training.forward import completion_logprobs
from stages.training.loop import publish, resident_engine
from stages.training.torch_engine import TorchEngine
from tests.stages.training.tiny import accumulate, continued, random_rows, tiny_checkpoint, update

ROWS = random_rows(6)


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(
        **({"optimizer": AdamWConfig(learning_rate=1e-2), "precision": "fp32", "warmup_steps": 4} | changes)
    )


@pytest.mark.claim("optimizer state lost or kept by accident")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": MuonConfig(learning_rate=1e-2)}, {"adapter": LoRAConfig(r=4)}],
    ids=["adamw", "muon", "lora"],
)
def test_a_reloaded_run_continues_bit_for_bit(store: Store, changes: dict[str, Any], precision: str) -> None:
    how = config(precision=precision, **changes)
    ends = continued(TorchEngine(tiny_checkpoint(), how), lambda middle: TorchEngine(middle, how), ROWS)
    assert len(set(ends)) == 1


@pytest.mark.claim("outputs of stale weights")
def test_an_update_far_below_bfloat16_resolution_is_in_the_stored_weights(store: Store) -> None:
    start = tiny_checkpoint()
    engine = TorchEngine(start, config(optimizer=AdamWConfig(learning_rate=1e-6), precision="bf16", warmup_steps=0))
    update(engine, ROWS)
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = (load_file(point.path / "model.safetensors")[name] for point in (start, publish(engine)))
    assert (after - before).abs().mean().item() == pytest.approx(1e-6, rel=0.05)
    assert after.bfloat16().equal(before.bfloat16()) or (after.bfloat16() != before.bfloat16()).float().mean() < 0.05


def test_gradients_are_clipped_to_their_global_norm(store: Store) -> None:
    start = tiny_checkpoint()
    free, clipped = (TorchEngine(start, config(max_grad_norm=limit)) for limit in (0.0, 0.25))
    report = update(free, ROWS)
    assert report.grad_norm > 0.25
    assert update(clipped, ROWS).grad_norm == pytest.approx(report.grad_norm)
    # One update in, the first moment is 0.1 times the clipped gradient.
    moments = load_file(publish(clipped).path / "optimizer.safetensors")
    norm = math.sqrt(sum(float(value.pow(2).sum()) for key, value in moments.items() if key.endswith("/exp_avg")))
    assert norm == pytest.approx(0.1 * 0.25, rel=1e-4)


@pytest.mark.claim("NaN on one rank")
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(store: Store) -> None:
    engine, twin = (TorchEngine(tiny_checkpoint(), config()) for _ in range(2))
    update(engine, ROWS)
    update(twin, ROWS)
    report = update(engine, ROWS, weight=math.nan)
    assert report.skipped
    assert not math.isfinite(report.grad_norm)
    assert engine.skipped == 1
    # Neither parameters nor moments nor warm-up took notice.
    assert update(engine, ROWS) == update(twin, ROWS)


@pytest.mark.claim("dropout left on")
def test_dropout_of_the_architecture_is_off_so_that_ratios_are_exactly_1(store: Store) -> None:
    engine = TorchEngine(tiny_checkpoint(attention_dropout=0.5), config())
    batch = collate(ROWS, range(len(ROWS)))
    for _ in range(2):
        update(engine, ROWS)
        logp_BO, old_logp_BO = (completion_logprobs(engine.model, batch).logp_BO for _ in range(2))
        assert (logp_BO - old_logp_BO).exp().eq(1).all()
    engine.model.train()  # there is something to switch off
    assert not completion_logprobs(engine.model, batch).logp_BO.equal(logp_BO)


@pytest.mark.claim("a schedule that decays by default")
def test_warm_up_goes_on_where_the_checkpoint_left_it(store: Store) -> None:
    engine = TorchEngine(tiny_checkpoint(), config())
    assert [update(engine, ROWS).learning_rate for _ in range(2)] == pytest.approx([0.0025, 0.005])
    assert update(TorchEngine(publish(engine), config()), ROWS).learning_rate == pytest.approx(0.0075)


def test_an_engine_is_kept_while_it_holds_the_checkpoint(store: Store) -> None:
    start = tiny_checkpoint()
    engine = resident_engine(start, config())
    assert engine.holds == start.digest
    accumulate(engine, ROWS)
    assert engine.holds is None
    engine.step()
    trained = publish(engine)
    assert resident_engine(trained, config()) is engine
    # A stage that failed between backward and step leaves a gradient behind: it must not leak into the next.
    accumulate(engine, ROWS)
    again = resident_engine(trained, config())
    assert again is engine
    update(again, ROWS)
    in_place = publish(again)
    evict()
    fresh = resident_engine(trained, config())
    update(fresh, ROWS)
    assert publish(fresh).digest == in_place.digest


@pytest.mark.parametrize("adapter", [None, LoRAConfig(r=2)], ids=["full", "adapter"])
def test_what_an_engine_publishes_needs_no_earlier_checkpoint(store: Store, adapter: LoRAConfig | None) -> None:
    """Pruned: the one it was loaded from, and its own last one, whose base an adapter's checkpoints share."""
    digests = []
    for pruned in (False, True):
        start = tiny_checkpoint(max_position_embeddings=64 + pruned)  # another object, the same numbers
        engine = TorchEngine(start, config(adapter=adapter))
        for _ in range(2):
            update(engine, ROWS)
            made = publish(engine)
            if pruned:
                store.prune(start.digest)
                store.prune(made.digest)
        update(engine, ROWS)
        digests.append(publish(engine))
    kept, freed = ({file.name for file in digest.path.iterdir()} for digest in digests)
    assert kept == freed
    assert "pruned.json" not in freed
    weights = [load_file(digest.path / "model.safetensors") for digest in digests]
    assert all(weights[1][name].equal(tensor) for name, tensor in weights[0].items())
    assert load_tokenizer(digests[1]).eos_token == "1"
