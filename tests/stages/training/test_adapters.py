"""LoRA: what is trained, what a checkpoint of it is to everyone else, and that going on from one is not having stopped."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.artifact import ArtifactError
from pipeline.config import ConfigError
from pipeline.residency import evict
from pipeline.store import Store, current_store
from stages.models import Checkpoint, load_model, load_weights, model_folder, model_weights, write_plain
from stages.models.folders import model_files
from stages.training import AdamWConfig, LoRAConfig, TrainingConfig
from stages.training.adapters import adapter_base, load_trainable, write_adapter
from stages.training.batching import collate
from stages.training.forward import completion_logprobs
from stages.training.hardware import live_tensors_mib
from stages.training.loop import publish, reference_for_pass, reference_model, resident_engine
from stages.training.optimizers import trainable, trained_values
from stages.training.torch_engine import TorchEngine
from tests.stages.training.tiny import accumulate, random_rows, saved, tiny_checkpoint, tiny_model, update

ROWS = random_rows(6)
BATCH = collate(ROWS, range(len(ROWS)))


def config(**changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "optimizer": AdamWConfig(learning_rate=1e-2),
        "precision": "fp32",
        "adapter": LoRAConfig(r=4),
    }
    return TrainingConfig(**(settings | changes))


def trained(start: Checkpoint, how: TrainingConfig, updates: int = 2) -> tuple[TorchEngine, Checkpoint]:
    engine = TorchEngine(start, how)
    for _ in range(updates):
        update(engine, ROWS)
    return engine, publish(engine)


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    return completion_logprobs(model, BATCH).logp_BO


def policy_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    with model_folder(checkpoint) as folder:
        weights: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
        return weights


def stored(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(checkpoint.path / name)
    return tensors


def test_the_first_policy_is_the_base_bit_for_bit(store: Store) -> None:
    start = tiny_checkpoint()
    engine = TorchEngine(start, config())
    assert logprobs(engine.model).equal(logprobs(load_model(start, dtype=torch.float32)))
    factors = {name: p for name, p in engine.model.named_parameters() if ".lora_" in name}
    assert all(p.eq(0).all() for name, p in factors.items() if ".lora_B." in name)
    spread = torch.cat([(p * p.shape[1] ** 0.5).flatten() for name, p in factors.items() if ".lora_A." in name])
    assert 0.95 < spread.abs().max().item() <= 1
    assert spread.var().item() == pytest.approx(1 / 3, rel=0.1)  # uniform in +-1


def test_only_the_adapter_has_gradient_and_optimizer_state(store: Store) -> None:
    engine = TorchEngine(tiny_checkpoint(), config())
    # Per layer q, k, v, o: 32 -> 32; gate, up: 32 -> 64; down: 64 -> 32; two layers.
    expected = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
    assert trained_values(engine.model) == expected
    accumulate(engine, ROWS)
    assert {name for name, p in engine.model.named_parameters() if p.grad is not None} == set(trainable(engine.model))
    engine.step()
    moments = stored(publish(engine), "optimizer.safetensors")
    assert sum(tensor.numel() for key, tensor in moments.items() if key.endswith("/exp_avg")) == expected
    assert all(".lora_" in key for key in moments)


@pytest.mark.parametrize(("scaling", "scale"), [("lora", 6.0 / 4), ("rslora", 6.0 / math.sqrt(4))])
def test_weights_are_merged_by_the_formula(store: Store, scaling: Any, scale: float) -> None:
    start = tiny_checkpoint()
    _, after = trained(start, config(adapter=LoRAConfig(r=4, alpha=6.0, scaling=scaling)))
    factors = stored(after, "adapter/adapter_model.safetensors")
    before, merged = policy_weights(start), policy_weights(after)
    assert merged.keys() == before.keys()
    for name, tensor in merged.items():
        a, b = (factors.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight") for x in "AB")
        if a is None or b is None:
            assert tensor.equal(before[name]), name
        else:
            assert b.abs().max() > 1e-3
            wanted = before[name].double() + scale * b.double() @ a.double()
            torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=1e-7)


def test_layers_of_gpt2_which_are_transposed_are_adapted(store: Store) -> None:
    start = tiny_checkpoint("gpt2", n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    engine, after = trained(start, config())
    assert json.loads((after.path / "adapter/adapter_config.json").read_text())["fan_in_fan_out"] is True
    change = logprobs(engine.model) - logprobs(load_model(start, dtype=torch.float32))
    assert change.abs().max() > 1e-2
    again = logprobs(load_model(after, dtype=torch.float32))
    torch.testing.assert_close(again, logprobs(engine.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_loads_the_trainers_policy(store: Store, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    start = tiny_checkpoint(tie_word_embeddings=tied)
    engine, after = trained(start, config())
    with model_folder(after) as folder:
        found = logprobs(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    torch.testing.assert_close(found, logprobs(engine.model), rtol=0, atol=1e-6)
    assert (found - logprobs(load_model(start, dtype=torch.float32))).abs().max() > 1e-2


def test_peft_loads_the_adapter_on_the_base(store: Store, tmp_path: Path) -> None:
    import peft

    start = tiny_checkpoint()
    engine, after = trained(start, config())
    assert adapter_base(after) == start.digest
    write_adapter(after, tmp_path, base="org/model")
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == "org/model"
    loaded = peft.PeftModel.from_pretrained(load_model(start, dtype=torch.float32), str(tmp_path))
    assert logprobs(loaded.base_model.model).equal(logprobs(engine.model))
    with pytest.raises(ValueError, match="has no adapter: it was trained in full"):
        write_adapter(start, tmp_path)


def test_the_weights_of_the_base_are_stored_once(store: Store, tmp_path: Path) -> None:
    start = tiny_checkpoint()
    whole = stored(start, "model.safetensors")
    engine, first = trained(start, config())
    update(engine, ROWS)
    second = publish(engine)
    reloaded = TorchEngine(second, config())
    update(reloaded, ROWS)
    third = publish(reloaded)
    files = [checkpoint.path / "model.safetensors" for checkpoint in (start, first, second, third)]
    assert len({file.stat().st_ino for file in files}) == 1
    # Freed in one checkpoint it stays in the others: where the one before has none left, in the base.
    current_store().prune(third.digest)
    update(reloaded, ROWS)
    assert (publish(reloaded).path / "model.safetensors").samefile(files[0])
    # Where no folder has it, it is written again, and nothing is replayed for it.
    for freed in list(current_store().digests()):
        current_store().prune(freed)
    reloaded.save(folder := fresh(tmp_path / "alone"))
    assert all(tensor.equal(whole[name]) for name, tensor in load_file(folder / "model.safetensors").items())
    assert len(load_file(folder / "model.safetensors")) == len(whole)


def fresh(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_base_in_another_precision_is_written_once_in_float32(store: Store) -> None:
    start = halved(tiny_checkpoint())
    engine, first = trained(start, config())
    update(engine, ROWS)
    files = [checkpoint.path / "model.safetensors" for checkpoint in (start, first, publish(engine))]
    assert len({file.stat().st_ino for file in files}) == 2
    assert files[1].samefile(files[2])
    wide = {name: tensor.float() for name, tensor in stored(start, "model.safetensors").items()}
    assert all(tensor.equal(wide[name]) for name, tensor in stored(first, "model.safetensors").items())


def halved(checkpoint: Checkpoint) -> Checkpoint:
    def fill(folder: Path) -> None:
        write_plain(checkpoint, folder, dtype="bfloat16", shard_bytes=10**9)

    return Checkpoint.write(fill)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whoever_loads_a_policy_has_the_bits_that_the_engine_merges(store: Store, tmp_path: Path, dtype: Any) -> None:
    engine, after = trained(tiny_checkpoint(), config())
    expected = {name: tensor.to(dtype) for name, tensor in engine.weights()}
    loaded = load_model(after, dtype=dtype)
    overwritten = tiny_model(seed=7).to(dtype)
    load_weights(overwritten, after)
    (tmp_path / "plain").mkdir()
    write_plain(after, tmp_path / "plain", dtype=str(dtype).removeprefix("torch."), shard_bytes=10**9)  # type: ignore[arg-type]
    found = (model_weights(loaded), model_weights(overwritten), load_file(tmp_path / "plain" / "model.safetensors"))
    for weights in found:
        assert weights.keys() == expected.keys()
        assert all(tensor.equal(expected[name]) for name, tensor in weights.items())
    assert not any("adapter" in file.name for file in (tmp_path / "plain").rglob("*"))


def test_a_checkpoint_of_an_earlier_version_goes_on_to_the_same_weights(store: Store) -> None:
    """It holds the merged weights, and W with the factors."""
    engine, now = trained(tiny_checkpoint(), config())

    def fill(folder: Path) -> None:
        shutil.copytree(now.path, folder, dirs_exist_ok=True)
        for path in folder.rglob("*"):
            path.chmod(0o700)
        for name in ("manifest.json", "model.safetensors"):
            (folder / name).unlink()
        layers = {name for name in stored(now, "model.safetensors") if name.endswith("proj.weight")}
        base = {name: tensor for name, tensor in stored(now, "model.safetensors").items() if name in layers}
        save_file(base, folder / "adapter" / "base.safetensors")
        save_file(policy_weights(now), folder / "model.safetensors", metadata={"format": "pt"})

    before = Checkpoint.write(fill)
    assert all(tensor.equal(policy_weights(now)[name]) for name, tensor in policy_weights(before).items())
    going_on = TorchEngine(before, config())
    update(going_on, ROWS)
    update(engine, ROWS)
    expected = dict(engine.weights())
    assert all(tensor.equal(expected[name]) for name, tensor in going_on.weights())
    after = policy_weights(publish(going_on))
    assert all(tensor.equal(expected[name]) for name, tensor in after.items())


def test_a_checkpoint_of_an_adapter_is_not_taken_for_a_model_of_others(store: Store) -> None:
    _, after = trained(tiny_checkpoint(), config())
    with pytest.raises(ArtifactError, match="cohort export"):
        model_files(after.path)


@pytest.mark.claim("a reference of another time or precision")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_new_reference_is_the_policy_bit_for_bit(store: Store, precision: str) -> None:
    start, how = tiny_checkpoint(), config(precision=precision)
    _, policy = trained(start, how)
    engine = resident_engine(policy, how)
    reference = reference_model(policy, how, engine.device)
    with engine.autocast():
        assert logprobs(reference).equal(logprobs(engine.model))
        base = logprobs(load_model(start, dtype=torch.float32))
        # Neither the base nor the merged weights would have done.
        assert (base - logprobs(engine.model)).abs().max() > 1e-2
        assert not logprobs(load_model(policy, dtype=torch.float32)).equal(logprobs(engine.model))
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_an_adapter_of_other_settings_begins_on_the_merged_weights(store: Store) -> None:
    _, first = trained(tiny_checkpoint(), config())
    how = config(adapter=LoRAConfig(r=2, target_modules=("q_proj",)), optimizer_state="reset_once")
    engine, second = trained(first, how)
    assert adapter_base(second) == first.digest
    before, after = policy_weights(first), policy_weights(second)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    # And in full: the adapter is gone, its weights are part of the policy.
    full, third = trained(second, config(adapter=None, optimizer_state="reset_once"), updates=0)
    assert logprobs(full.model).sub(logprobs(engine.model)).abs().max() < 1e-6
    assert not (third.path / "adapter").exists()


def test_a_new_adapter_in_a_resident_engine_is_the_one_of_a_fresh_engine(store: Store) -> None:
    start, how = tiny_checkpoint(), config()
    engine, _ = trained(start, how)
    engine.load(start)
    update(engine, ROWS)
    assert publish(engine) == trained(start, how, updates=1)[1]


def test_optimizer_state_of_what_is_not_trained_is_refused(store: Store) -> None:
    start = tiny_checkpoint()
    full, adapted = (trained(start, config(adapter=adapter), updates=1)[1] for adapter in (None, LoRAConfig(r=4)))
    cases = (
        (full, LoRAConfig(r=4), "all weights, .* an adapter"),
        (adapted, None, "an adapter, .* all weights"),
        (adapted, LoRAConfig(r=3), "an adapter, .* another adapter"),
    )
    for checkpoint, adapter, message in cases:
        with pytest.raises(ValueError, match=f"{message}.*optimizer_state=reset_once"):
            TorchEngine(checkpoint, config(adapter=adapter))
        TorchEngine(checkpoint, config(adapter=adapter, optimizer_state="reset_once"))
        TorchEngine(checkpoint, config(adapter=adapter, optimizer_state="none"))


def test_recomputing_and_chunks_change_only_the_last_bits(store: Store) -> None:
    start = tiny_checkpoint()
    plain = policy_weights(trained(start, config(max_logits=None))[1])
    frugal = config(max_logits=40, activation_checkpointing=True)
    for name, tensor in policy_weights(trained(start, frugal)[1]).items():
        torch.testing.assert_close(tensor, plain[name], rtol=0, atol=2e-6, msg=name)


def test_what_cannot_be_adapted_is_refused_by_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    start = tiny_checkpoint()
    cases = {
        "q_porj": r"'q_porj' .*'q_proj'.*Qwen2ForCausalLM has down_proj, gate_proj, k_proj",
        "lm_head": "'lm_head'",
        "embed_tokens": "'embed_tokens'",
    }
    for name, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            TorchEngine(start, config(adapter=LoRAConfig(target_modules=(name,))))
    with pytest.raises(ConfigError, match="optimizer muon cannot train an adapter"):
        TrainingConfig.parse({"optimizer": {"kind": "muon"}, "adapter": {}})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"peft is not installed; pip install 'cohort-rl\[lora\]'"):
        TorchEngine(start, config())


def test_critics_and_reward_models_are_refused(store: Store) -> None:
    from transformers import AutoModelForTokenClassification

    critic = saved(AutoModelForTokenClassification.from_config(tiny_model().config))
    with pytest.raises(ConfigError, match="Qwen2ForTokenClassification"):
        TorchEngine(critic, config())


def test_without_an_adapter_the_key_is_what_it_was(store: Store) -> None:
    assert "adapter" not in TrainingConfig().key()
    assert config().key()["adapter"]["r"] == 4
    assert TrainingConfig().override({"adapter.r": 16}).adapter == LoRAConfig(r=16)


def test_without_rounding_the_key_is_what_it_was() -> None:
    assert "head_precision" not in config(head_precision="as_computed").key()
    assert {
        config(precision="bf16", head_precision=each).key()["head_precision"] for each in ("fp32", "as_computed")
    } == {
        "fp32",
        "as_computed",
    }


@torch.no_grad()
def scored_in(model: Any, how: TrainingConfig) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how.bf16):
        return completion_logprobs(model, BATCH, 0.7).logp_BO


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_reference_on_the_trainers_base_is_its_factors_bit_for_bit(store: Store, precision: str) -> None:
    """The base, and an adapter of its own: equal to a copy of the model, whose bytes are not there; the trainer stays."""
    how, start = config(precision=precision), tiny_checkpoint()
    engine = resident_engine(start, how)
    update(engine, ROWS)
    middle = publish(engine)
    update(engine, ROWS)
    last = publish(engine)
    before = scored_in(engine.model, how)
    values = trained_values(engine.model)
    second = sum(p.numel() for name, p in engine.model.named_parameters() if ".lora_B." in name)
    for reference, exchanged in ((start, second), (middle, values)):
        kept = bytes_alive()
        with reference_for_pass(reference, how, "cpu") as model:
            assert bytes_alive() - kept == 4 * exchanged
            shared = scored_in(model, how).tolist()
        assert bytes_alive() == kept
        alone = reference_model(reference, how, "cpu")
        weights = sum(tensor.nbytes for tensor in (*alone.parameters(), *alone.buffers()))
        assert bytes_alive() - kept == weights > 8 * values
        assert shared == scored_in(alone, how).tolist()
        assert shared != before.tolist()
        del alone
        evict("reference")
    assert engine.holds == last.state
    assert scored_in(engine.model, how).equal(before)


def bytes_alive() -> int:
    gc.collect()
    return round(live_tensors_mib() * 2**20)


def test_a_reference_on_another_base_is_a_model_of_its_own(store: Store) -> None:
    """Where it has other weights, other settings, or the trainer none of them."""
    start, other = tiny_checkpoint(), saved(tiny_model(seed=1))
    for reference, held, how in (
        (other, start, config()),
        (start, None, config()),
        (start, start, config(adapter=None)),
    ):
        evict()
        engine = None if held is None else resident_engine(held, how)
        with reference_for_pass(reference, how, "cpu") as model:
            assert engine is None or model is not engine.model
            expected = scored_in(load_trainable(reference, how, torch.float32)[0], how)
            assert scored_in(model, how).equal(expected)


def test_an_error_in_a_pass_leaves_the_trainer_its_own_factors(store: Store) -> None:
    start = tiny_checkpoint()
    engine = resident_engine(start, config())
    update(engine, ROWS)
    before = scored_in(engine.model, config())
    with pytest.raises(ZeroDivisionError), reference_for_pass(start, config(), "cpu"):
        raise ZeroDivisionError
    assert scored_in(engine.model, config()).equal(before)
