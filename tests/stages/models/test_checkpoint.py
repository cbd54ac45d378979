"""Checkpoints: what is stored is what was meant, and what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.artifact import ArtifactError
from pipeline.config import ConfigError
from pipeline.store import Store, StoreError
from stages.models import (
    Checkpoint,
    ExternalCheckpointConfig,
    copy_weights,
    import_checkpoint,
    load_model,
    load_tokenizer,
    load_weights,
    save,
    tensor_file,
    write_tensors,
)
from stages.sft import PolicyConfig
from tests.stages.training.tiny import tiny_checkpoint, tiny_model, tiny_tokenizer

BOMB = b"cbuiltins\nexec\n(S'raise SystemExit'\ntR."
"""A pickle that ends the process that loads it."""


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """A folder as `save_pretrained` leaves it, in two shards."""
    folder = tmp_path / "external"
    tiny_model(tie_word_embeddings=False).save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_weights_survive_a_round_trip_exactly(store: Store, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    checkpoint = Checkpoint.write(lambda folder: save(folder, model, tiny_tokenizer()))
    stored = load_file(checkpoint.path / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    loaded = load_model(checkpoint, dtype=torch.float32)
    assert all(loaded.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert not loaded.training


@pytest.mark.claim("a reference of another time or precision")
@pytest.mark.parametrize("tied", [True, False])
def test_loading_in_place_casts_exactly_and_keeps_ties(store: Store, tied: bool) -> None:
    checkpoint = tiny_checkpoint(tie_word_embeddings=tied)
    model = load_model(checkpoint, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_weights(model, checkpoint)
    stored = load_file(checkpoint.path / "model.safetensors")
    assert all(dict(model.named_parameters())[name].equal(tensor.bfloat16()) for name, tensor in stored.items())
    assert model.lm_head.weight.equal(model.model.embed_tokens.weight) is tied


def test_equal_models_have_one_digest(store: Store) -> None:
    assert tiny_checkpoint().digest == tiny_checkpoint().digest


def test_weights_of_another_shape_are_refused_by_name(store: Store) -> None:
    with pytest.raises(ArtifactError, match=r"embed_tokens.weight: \(26, 32\) .*\(26, 48\)"):
        load_weights(tiny_model(hidden_size=48), tiny_checkpoint())


def test_missing_weights_are_refused_and_not_drawn_at_random(store: Store) -> None:
    model = tiny_model()

    def fill(folder: Path) -> None:
        save(folder, model, tiny_tokenizer())
        stored = load_file(folder / "model.safetensors")
        del stored["model.layers.1.mlp.up_proj.weight"]
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    damaged = Checkpoint.write(fill)
    with pytest.raises(ArtifactError, match=r"missing.*layers\.1\.mlp\.up_proj"):
        load_model(damaged, dtype=torch.float32)
    with pytest.raises(ArtifactError, match=r"no weights for model\.layers\.1\.mlp\.up_proj"):
        load_weights(model, damaged)


def test_a_sharded_model_of_others_is_imported_and_loads(store: Store, external: Path) -> None:
    assert len(list(external.glob("*.safetensors"))) > 1
    (external / "modeling_evil.py").write_text("raise SystemExit")
    imported = import_checkpoint(ExternalCheckpointConfig(path=external))
    expected = tiny_model(tie_word_embeddings=False).state_dict()
    loaded = load_model(imported, dtype=torch.float32).state_dict()
    assert all(loaded[name].equal(tensor) for name, tensor in expected.items())
    in_place = tiny_model(tie_word_embeddings=False, vocab_size=26)
    load_weights(in_place, imported)
    assert load_tokenizer(imported).eos_token == "1"
    assert not (imported.path / "modeling_evil.py").exists()


def test_the_content_of_an_imported_folder_decides_and_not_its_place(external: Path, tmp_path: Path) -> None:
    elsewhere = external.rename(tmp_path / "elsewhere")
    key = ExternalCheckpointConfig(path=elsewhere).key()
    assert ExternalCheckpointConfig(path=elsewhere.rename(external)).key() == key
    (external / "config.json").write_text("{}")
    assert ExternalCheckpointConfig(path=external).key() != key


def test_a_missing_shard_is_named(store: Store, external: Path) -> None:
    index = json.loads((external / "model.safetensors.index.json").read_text())
    shard = sorted(index["weight_map"].values())[0]
    (external / shard).unlink()
    with pytest.raises(ArtifactError, match=shard):
        import_checkpoint(ExternalCheckpointConfig(path=external))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_description_is_named(store: Store, external: Path, name: str) -> None:
    (external / name).unlink()
    (external / "tokenizer_config.json").unlink()
    with pytest.raises(ArtifactError, match=f"missing {name}"):
        import_checkpoint(ExternalCheckpointConfig(path=external))


def test_a_pickle_is_never_opened_whether_it_is_imported_or_planted(store: Store, external: Path) -> None:
    for file in external.glob("model*"):
        file.unlink()
    pickled = dict.fromkeys(("pytorch_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl"), BOMB)
    for name, content in pickled.items():
        (external / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"optimizer\.pt is a pickle"):
        import_checkpoint(ExternalCheckpointConfig(path=external))

    def planted(*left_out: str) -> Checkpoint:
        def fill(folder: Path) -> None:
            save(folder, tiny_model(), tiny_tokenizer())
            for name, content in pickled.items():
                (folder / name).write_bytes(content)
            for name in left_out:
                (folder / name).unlink()

        return Checkpoint.write(fill)

    load_tokenizer(next_to_weights := planted())
    load_model(next_to_weights, dtype=torch.float32)
    with pytest.raises(ArtifactError, match=r"optimizer\.pt is a pickle"):
        load_model(planted("model.safetensors"), dtype=torch.float32)


def test_a_checkpoint_of_a_store_may_be_imported_into_one(store: Store) -> None:
    checkpoint = tiny_checkpoint()
    imported = import_checkpoint(ExternalCheckpointConfig(path=checkpoint.path))
    assert imported == checkpoint  # the same files, so the same content under the same name


@pytest.mark.parametrize(
    ("name", "head"),
    [("AutoModelForTokenClassification", "score.bias"), ("AutoModelForSequenceClassification", "score.weight")],
)
def test_critics_and_reward_models_load_by_the_same_function(store: Store, name: str, head: str) -> None:
    import transformers

    description = tiny_model().config
    description.num_labels = 1
    model = getattr(transformers, name).from_config(description)
    checkpoint = Checkpoint.write(lambda folder: save(folder, model, tiny_tokenizer()))
    loaded = load_model(checkpoint, dtype=torch.float32)
    assert type(loaded) is type(model)
    assert head in loaded.state_dict()
    assert all(loaded.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())
    # Dropout before the head is off, in transformers' default of 0.1 too.
    ids = torch.tensor([[3, 4, 5]])
    assert loaded(input_ids=ids).logits.equal(loaded(input_ids=ids).logits)
    assert not loaded.training


def test_what_is_saved_names_its_architecture(store: Store) -> None:
    described = json.loads((tiny_checkpoint().path / "config.json").read_text())
    assert described["architectures"] == ["Qwen2ForCausalLM"]


@pytest.mark.parametrize("named", [None, [], ["Qwen2ForCausalLM"], ["Qwen2LMHeadModel"]])
def test_a_checkpoint_without_an_architecture_is_a_policy(store: Store, named: list[str] | None) -> None:
    loaded = load_model(renamed(named), dtype=torch.float32)
    assert type(loaded).__name__ == "Qwen2ForCausalLM"


def test_a_head_of_another_kind_is_refused_by_its_architecture(store: Store) -> None:
    with pytest.raises(ArtifactError, match="Qwen2ForQuestionAnswering"):
        load_model(renamed(["Qwen2ForQuestionAnswering"]), dtype=torch.float32)


def test_the_wrong_head_is_refused_and_not_drawn_at_random(store: Store) -> None:
    with pytest.raises(ArtifactError, match=r"missing .*score"):
        load_model(renamed(["Qwen2ForTokenClassification"]), dtype=torch.float32)


def renamed(architectures: list[str] | None) -> Checkpoint:
    """The tiny policy with other `architectures` in its description."""

    def fill(folder: Path) -> None:
        save(folder, tiny_model(), tiny_tokenizer())
        described = json.loads((folder / "config.json").read_text()) | {"architectures": architectures}
        (folder / "config.json").write_text(json.dumps(described))

    return Checkpoint.write(fill)


@pytest.mark.parametrize(
    "absurd",
    [{"num_hidden_layers": 10**9}, {"text_config": {"num_layers": 10**9}}, {"num_local_experts": 1e12}],
    ids=["layers", "nested", "experts"],
)
def test_a_model_too_deep_to_be_built_is_refused_before_it_is(
    store: Store, external: Path, absurd: dict[str, Any]
) -> None:
    described = json.loads((external / "config.json").read_text()) | absurd
    (external / "config.json").write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match="expected at most 10,000"):
        import_checkpoint(ExternalCheckpointConfig(path=external))

    def fill(folder: Path) -> None:
        save(folder, tiny_model(), tiny_tokenizer())
        (folder / "config.json").write_text(json.dumps(described))

    planted = Checkpoint.write(fill)
    for load in (load_tokenizer, lambda checkpoint: load_model(checkpoint, dtype=torch.float32)):
        with pytest.raises(ArtifactError, match="expected at most 10,000"):
            load(planted)
    if "text_config" not in absurd:  # a policy made from scratch has plain settings
        with pytest.raises(ConfigError, match="expected at most 10,000"):
            PolicyConfig.parse({"settings": absurd})


def floats_and_counts() -> dict[str, torch.Tensor]:
    """Tensors of several types and shapes, one without a dimension and one without values."""
    torch.manual_seed(0)
    return {
        "w": torch.randn(3, 5),
        "a.norm": torch.randn(7, dtype=torch.float64),
        "half": torch.randn(3, 2).bfloat16(),
        "step": torch.tensor(3),
        "none": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]),
    }


@pytest.mark.parametrize("half", [False, True])
def test_a_file_filled_in_place_is_what_is_written_at_once(tmp_path: Path, half: bool) -> None:
    tensors = floats_and_counts()
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    targets = tensor_file(tmp_path / "filled", described, half=half, room=1e9)
    for name in reversed(tensors):
        targets[name].copy_(tensors[name])
    write_tensors(tmp_path / "written", tensors, half=half)
    assert (tmp_path / "filled").read_bytes() == (tmp_path / "written").read_bytes()
    stored = load_file(tmp_path / "filled")
    assert {tensor.dtype for name, tensor in stored.items() if name in ("w", "a.norm", "half")} == {
        torch.bfloat16 if half else torch.float32
    }


def test_a_file_without_room_is_refused_before_anything_is_mapped(tmp_path: Path) -> None:
    described = {"w": (torch.float32, (1 << 20,))}
    with pytest.raises(StoreError, match=r"4,194,304 bytes do not fit, 4,194,304 are free"):
        tensor_file(tmp_path / "weights", described, half=False, room=4 << 20)
    with pytest.raises(StoreError, match="do not fit"):
        tensor_file(tmp_path / "weights", {"w": (torch.float32, (1 << 50,))}, half=False, room=1e18)


@pytest.mark.parametrize(("names", "wrong"), [("ab", "b"), ("", "a"), ("aa", "a")])
def test_weights_that_do_not_fit_a_models_are_named(names: str, wrong: str) -> None:
    target = {"a": torch.zeros(2)}
    with pytest.raises(ArtifactError, match=rf"\b{wrong}\b"):
        copy_weights(target, [(name, torch.ones(2)) for name in names])
