"""Code that comes with a model: in every loader, only a pin of the running configuration lets it run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.algorithm.models import pretrained_model
from flows.config import PretrainedPolicy
from pipeline.artifact import ArtifactError
from pipeline.store import Store, use_store
from pipeline.store.archive import read_archive, write_archive
from stages.critic import CriticConfig, create_critic
from stages.models import (
    WEIGHTS,
    Checkpoint,
    ExternalCheckpointConfig,
    HubCheckpointConfig,
    code_files,
    fetch_checkpoint,
    import_checkpoint,
    load_model,
    load_tokenizer,
    trust,
    write_plain,
)
from stages.models.trusted_code import code_digest
from stages.reward_training import RewardModelConfig, create_reward_model
from stages.rollout.probe import vocabulary_and_window
from stages.rollout.vllm import _TOKENIZER, _linked
from stages.sft import PolicyConfig, create_policy
from stages.tables import Demonstrations
from stages.text import PromptConfig
from tests.stages.models.hub import Hub, describe, serving

COMMIT = "a" * 40
pytestmark = pytest.mark.usefixtures("modules")

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

pathlib.Path({marker!r}).touch()


class Config(Qwen2Config):
    model_type = "cohort_own"


class Model(Qwen2ForCausalLM):
    config_class = Config


class Tokenizer(PreTrainedTokenizerFast):
    pass


def generate(*args, **kwargs):
    pass
"""
OWN = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoModel": "own.Model"}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


def own_architecture(folder: Path) -> None:
    describe(folder, "config.json", model_type="cohort_own", architectures=["Model"], auto_map=OWN)
    describe(folder, "config.json", architectures=["OwnForCausalLM"])


def known_architecture(folder: Path) -> None:
    describe(folder, "config.json", auto_map=OWN)


def own_tokenizer(folder: Path) -> None:
    auto_map = {"AutoTokenizer": [None, "own.Tokenizer"]}
    describe(folder, "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=auto_map)


def own_generation(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    shutil.copyfile(folder / "own.py", folder / "custom_generate" / "generate.py")


def own_processor(folder: Path) -> None:
    describe(folder, "processor_config.json", processor_class="Own", auto_map={"AutoProcessor": "own.Tokenizer"})
    describe(folder, "generation_config.json", auto_map=OWN, custom_generate="own")


def forged_trust(folder: Path) -> None:
    """What once was the record of trust, and whatever else might be taken for one."""
    own_architecture(folder)
    named = {"own.py": code_digest(code_files(folder))}
    (folder / "trusted_code.json").write_text(json.dumps({"pin": COMMIT, "files": named}))
    describe(folder, "config.json", trust_remote_code=True)


WAYS = [own_architecture, known_architecture, own_tokenizer, own_generation, own_processor, forged_trust]


def smuggled(plain: Path, marker: Path, way: Callable[[Path], None]) -> Checkpoint:
    """An artifact with code in it, as nothing here would write it and an archive could bring it."""

    def fill(target: Path) -> None:
        for file in plain.iterdir():
            shutil.copyfile(file, target / file.name)
        (target / "own.py").write_text(CODE.format(marker=str(marker)))
        way(target)

    return Checkpoint.write(fill)


LOADERS: dict[str, Callable[[Checkpoint], Any]] = {
    "model": lambda made: load_model(made, dtype=torch.float32),
    "tokenizer": load_tokenizer,
    "configuration": vocabulary_and_window,
    "reward model's trunk": lambda made: create_reward_model(made, RewardModelConfig()),
    "critic's trunk": lambda made: create_critic(made, CriticConfig()),
    "vLLM's folder": lambda made: _linked(made, made.path, made.path.parents[3], _TOKENIZER),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loader", LOADERS)
def test_no_loader_runs_code_that_an_artifact_brings(
    store: Store, plain: Path, marker: Path, loader: str, way: Callable[[Path], None]
) -> None:
    made = smuggled(plain, marker, way)
    with pytest.raises(ArtifactError, match=r"own\.py.*does not pin"):
        LOADERS[loader](made)
    assert not marker.exists()


@pytest.mark.parametrize("way", [own_architecture, known_architecture, forged_trust, own_tokenizer])
def test_the_same_code_runs_where_the_configuration_pins_it(
    store: Store, plain: Path, marker: Path, way: Callable[[Path], None]
) -> None:
    """Else the refusals above would show nothing."""
    made = smuggled(plain, marker, way)
    trust(code_digest(code_files(made.path)))
    load_tokenizer(made) if way is own_tokenizer else load_model(made, dtype=torch.float32)
    assert marker.exists()


def test_a_pin_holds_for_one_store_that_is_open_and_for_exactly_its_code(
    store: Store, plain: Path, marker: Path
) -> None:
    made = smuggled(plain, marker, own_architecture)
    trust(code_digest(code_files(made.path)))
    other = smuggled(plain, marker.with_name("ran other"), own_architecture)
    with pytest.raises(ArtifactError, match="does not pin"):
        load_model(other, dtype=torch.float32)
    with use_store(Store(store.root)), pytest.raises(ArtifactError, match="does not pin"):
        load_model(made, dtype=torch.float32)
    assert not marker.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json", "other.json"])
def test_a_pin_covers_no_code_of_another_repository_in_any_file(
    store: Store, plain: Path, marker: Path, file: str
) -> None:
    def way(folder: Path) -> None:
        describe(folder, file, nested=[{"auto_map": {"AutoConfig": [None, "stranger/repo--own.Config"]}}])

    made = smuggled(plain, marker, way)
    trust(code_digest(code_files(made.path)))
    with pytest.raises(ArtifactError, match=r"stranger/repo--own\.Config"):
        load_model(made, dtype=torch.float32)


def test_a_pin_covers_no_code_in_folders_below(store: Store, plain: Path, marker: Path) -> None:
    made = smuggled(plain, marker, own_generation)
    trust(code_digest(code_files(made.path)))
    with pytest.raises(ArtifactError, match=r"custom_generate/generate\.py"):
        load_model(made, dtype=torch.float32)
    assert not marker.exists()


def test_an_adapter_beside_a_model_is_not_loaded_into_it(store: Store, plain: Path, marker: Path) -> None:
    def way(folder: Path) -> None:
        (folder / "own.py").unlink()
        describe(folder, "adapter_config.json", base_model_name_or_path="/elsewhere", peft_type="LORA")
        (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")

    with pytest.raises(ArtifactError, match=r"adapter_config\.json"):
        load_model(smuggled(plain, marker, way), dtype=torch.float32)


def test_an_export_of_a_model_with_code_runs_none_of_it(
    store: Store, plain: Path, marker: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for way in (known_architecture, own_tokenizer):
        (folder := tmp_path / "out" / way.__name__).mkdir()
        with pytest.warns(UserWarning, match=r"own\.py of Checkpoint"):
            write_plain(smuggled(plain, marker, way), folder, dtype="float32", shard_bytes=10**9)
    assert not marker.exists()


# ------------------------------------------------------------------------------------------------ records of others


def test_an_archive_whose_first_policy_brings_code_runs_none_of_it(tmp_path: Path, plain: Path, marker: Path) -> None:
    """The record of `create_policy` under the key that a recipe will ask for, with another result."""
    ask = (PolicyConfig(settings={"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}), PromptConfig())

    def first() -> Checkpoint:
        rows = [{"question_id": "1", "question": "1 + 1?", "completion": "#### 2", "author": None}]
        return create_policy(ask[0], Demonstrations.write(rows), ask[1])

    origin = Store(tmp_path / "origin")
    with use_store(origin):
        asked = first()
        evil = smuggled(plain, marker, forged_trust)
        assert asked.action is not None
        origin.record(asked.action, origin.action(asked.action) | {"result": evil.digest})
        write_archive(tmp_path / "gift.tar", origin, [evil.digest], [asked.action], [])
    victim = Store(tmp_path / "victim")
    read_archive(tmp_path / "gift.tar", victim, tmp_path / "runs")
    with use_store(victim):
        assert first() == evil
        for loader in LOADERS.values():
            with pytest.raises(ArtifactError, match=r"does not pin: none of it ran.*cohort forget"):
                loader(first())
    assert not marker.exists()


@pytest.mark.parametrize("way", ["archive", "shared store"])
def test_a_record_of_others_is_no_hit_where_its_result_would_bring_code(
    tmp_path: Path, plain: Path, marker: Path, way: str
) -> None:
    (plain / "own.py").write_text(CODE.format(marker=str(marker)))
    pin = code_digest(code_files(plain))
    config = ExternalCheckpointConfig(path=plain, trusted_code=pin)
    url = f"file://{tmp_path}/shared" if way == "shared store" else None
    with use_store(origin := Store(tmp_path / "origin", url)):
        mine = import_checkpoint(config)
        other = smuggled(plain, marker.with_name("ran other"), known_architecture)
        assert mine.action is not None
        origin.record(mine.action, origin.action(mine.action) | {"result": other.digest})
        if url is None:
            write_archive(tmp_path / "gift.tar", origin, [other.digest], [mine.action], [])
        assert import_checkpoint(config) == mine, "what it was signed for is another result"
        origin.record(mine.action, origin.action(mine.action) | {"result": other.digest})
    victim = Store(tmp_path / "victim", url)
    if url is None:
        read_archive(tmp_path / "gift.tar", victim, tmp_path / "runs")
    assert victim.action(mine.action)["result"] == other.digest
    with use_store(victim):
        policy = PretrainedPolicy(path=str(plain), revision=pin, trust_remote_code=True)
        assert pretrained_model(policy) == mine
        assert victim.find(mine.action, own=True) is not None
        load_model(mine, dtype=torch.float32)


def test_the_code_of_a_commit_is_compared_with_the_hub_and_not_with_a_record(
    store: Store, plain: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain / "own.py").write_text(CODE.format(marker=str(marker)))
    own_architecture(plain)
    hub = Hub({("owner/own", COMMIT): plain})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    policy = PretrainedPolicy(path="owner/own", revision=COMMIT, trust_remote_code=True)
    config = HubCheckpointConfig(repository="owner/own", revision=COMMIT, trust_remote_code=True)
    with serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        made = fetch_checkpoint(config)
        evil = smuggled(plain, marker.with_name("ran other"), own_architecture)
        assert made.action is not None
        store.record(made.action, store.action(made.action) | {"result": evil.digest})
        store.sign(made.action, evil.digest)  # even where the note of who computed it was forged too
        with pytest.raises(ArtifactError, match="does not pin"):
            load_model(pretrained_model(policy), dtype=torch.float32)
        shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with use_store(Store(store.root)):
        with pytest.warns(UserWarning, match="cannot be compared with its commit"):
            found = pretrained_model(policy)
        with pytest.raises(ArtifactError, match="does not pin"):
            load_model(found, dtype=torch.float32)
    assert not marker.exists()
    assert not marker.with_name("ran other").exists()


# ------------------------------------------------------------------------------------------------ a folder that is imported


SHARD = "model-00001-of-00001.safetensors"


def sharded(folder: Path, *names: Any) -> None:
    """Weights in shards, of an index that names these as well."""
    (folder / WEIGHTS).rename(folder / SHARD)
    places = {f"w{number}": name for number, name in enumerate([SHARD, *names])}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    "name",
    ["trusted_code.json", "own.py", "pytorch_model.bin", "../outside.safetensors", "deep/x.safetensors",
     "optimizer.safetensors", "x.safetensors\n", "/etc/passwd", "", ".safetensors/..", None, 5, ["x.safetensors"]],
)  # fmt: skip
def test_an_index_of_weights_names_nothing_but_safetensors_of_the_folder(store: Store, plain: Path, name: Any) -> None:
    sharded(plain, name)
    for file in ("trusted_code.json", "own.py", "pytorch_model.bin", "optimizer.safetensors", "../outside.safetensors"):
        (plain / file).write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"index\.json names .* as weights"):
        import_checkpoint(ExternalCheckpointConfig(path=plain))


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "no JSON", "[" * 100_000])
def test_an_index_of_another_shape_is_refused(store: Store, plain: Path, content: str) -> None:
    (plain / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"index\.json"):
        import_checkpoint(ExternalCheckpointConfig(path=plain))


def test_files_of_other_names_stay_behind(store: Store, plain: Path, tmp_path: Path) -> None:
    strangers = [
        "trusted_code.json",
        "adapter_config.json",
        "own.py",
        "pytorch_model.bin",
        "notes.txt",
        "x.jinja",
        "x.model",
    ]
    for name in strangers:
        (plain / name).write_text("{}")
    os.mkfifo(plain / "vocab.json")  # whoever opened it would wait
    made = import_checkpoint(ExternalCheckpointConfig(path=plain))
    found = {file.name for file in made.path.iterdir()}
    assert found & {*strangers, "vocab.json"} == set()
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS} <= found


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", WEIGHTS])
def test_a_link_that_leaves_a_model_folder_is_refused_and_one_inside_is_not(
    store: Store, plain: Path, tmp_path: Path, name: str
) -> None:
    (plain / name).rename(tmp_path / "secret")
    (plain / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="a link that leads out of the model folder"):
        import_checkpoint(ExternalCheckpointConfig(path=plain))
    (plain / name).unlink()
    (tmp_path / "secret").rename(plain / "kept")
    (plain / name).symlink_to("kept")
    assert (import_checkpoint(ExternalCheckpointConfig(path=plain)).path / name).is_file()


def test_links_into_the_blobs_of_a_hubs_cache_are_followed_and_no_further(
    store: Store, plain: Path, tmp_path: Path
) -> None:
    snapshot, blobs = tmp_path / "repo" / "snapshots" / COMMIT, tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert import_checkpoint(ExternalCheckpointConfig(path=snapshot)).path
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="leads out of the model folder"):
        import_checkpoint(ExternalCheckpointConfig(path=snapshot))


@pytest.mark.parametrize("content", ["[]", "5", "null", "{", '"text"'])
def test_a_configuration_that_is_no_object_is_refused_by_name(store: Store, plain: Path, content: str) -> None:
    (plain / "config.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"config\.json: (no JSON|expected a JSON object)"):
        import_checkpoint(ExternalCheckpointConfig(path=plain))
