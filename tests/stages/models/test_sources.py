"""Models of the hub: what is fetched is one commit, what cannot be fetched says why, and no code runs unasked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flows.algorithm.models import pretrained_model
from flows.config import PretrainedPolicy
from pipeline.artifact import ArtifactError
from pipeline.config import ConfigError
from pipeline.store import Store
from stages.models import (
    Checkpoint,
    HubCheckpointConfig,
    HubError,
    architecture_of,
    code_files,
    copy_description,
    fetch_checkpoint,
    load_model,
    load_tokenizer,
    resolve_revision,
)
from stages.models.trusted_code import code_digest
from tests.stages.models.hub import Hub, describe, serving
from tests.stages.training.tiny import tiny_model

FIRST, SECOND = "a" * 40, "b" * 40

MODELING = """
import pathlib
from transformers import Qwen2Config, Qwen2ForCausalLM

pathlib.Path({marker!r}).touch()


class DoubledConfig(Qwen2Config):
    model_type = "cohort_doubled"


class DoubledForCausalLM(Qwen2ForCausalLM):
    config_class = DoubledConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output
"""


@pytest.fixture
def folder(plain: Path) -> Path:
    """A tiny model among files that nothing asks for."""
    (plain / "extra").mkdir()
    (plain / "extra" / "other.json").write_text("{}")
    (plain / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (plain / "evil.py").write_text("raise SystemExit")
    return plain


@pytest.fixture
def hub(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """`owner/tiny`, whose `main` is FIRST, behind HF_ENDPOINT; an empty hub cache."""
    known = Hub({("owner/tiny", FIRST): folder}, {("owner/tiny", "main"): FIRST})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(known):
        monkeypatch.setenv("HF_ENDPOINT", known.url)
        yield known


def own_code(folder: Path, marker: Path) -> Path:
    """Make the model one of an architecture that transformers lacks; running its code touches `marker`."""
    names = {"AutoConfig": "DoubledConfig", "AutoModelForCausalLM": "DoubledForCausalLM"}
    classes = {auto: f"modeling_doubled.{name}" for auto, name in names.items()}
    describe(folder, "config.json", model_type="cohort_doubled", architectures=["DoubledForCausalLM"], auto_map=classes)
    (folder / "evil.py").unlink()
    (folder / "modeling_doubled.py").write_text(MODELING.format(marker=str(marker)))
    return folder


def names(checkpoint: Checkpoint) -> set[str]:
    return {file.name for file in checkpoint.path.iterdir()}


# ------------------------------------------------------------------------------------------------ the hub


def test_a_commit_becomes_a_checkpoint_without_pickles_code_and_folders(store: Store, hub: Hub) -> None:
    fetched = fetch_checkpoint(HubCheckpointConfig(repository="owner/tiny", revision=FIRST))
    assert names(fetched) & {"evil.py", "pytorch_model.bin", "extra", "other.json"} == set()
    assert not [path for path in hub.asked if path.endswith((".py", ".bin", "other.json"))]
    loaded = load_model(fetched, dtype=torch.float32).state_dict()
    expected = tiny_model(vocab_size=len(load_tokenizer(fetched))).state_dict()
    assert all(loaded[name].equal(tensor) for name, tensor in expected.items())
    assert store.manifest(fetched.digest)["provenance"]["arguments"]["config"]["config"]["revision"] == FIRST


def test_a_branch_is_resolved_once_and_does_not_move_a_run_that_is_continued(
    store: Store, hub: Hub, folder: Path, tmp_path: Path
) -> None:
    policy = PretrainedPolicy(path="owner/tiny")
    with pytest.warns(UserWarning, match=f"main is commit {FIRST}.* policy.revision={FIRST}"):
        first = pretrained_model(policy)
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    (moved / "tokenizer_config.json").write_text((moved / "tokenizer_config.json").read_text() + "\n")
    hub.commits["owner/tiny", SECOND], hub.branches["owner/tiny", "main"] = moved, SECOND
    asked = len(hub.asked)
    assert pretrained_model(policy) == first
    assert len(hub.asked) == asked
    assert pretrained_model(PretrainedPolicy(path="owner/tiny", revision=SECOND)) != first
    store.forget(resolve_revision("owner/tiny", "main").digest)
    with pytest.warns(UserWarning, match=f"main is commit {SECOND}"):
        assert pretrained_model(policy) != first


def test_without_a_connection_the_hubs_cache_is_used(
    store: Store, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download("owner/tiny", endpoint=hub.url, cache_dir=tmp_path / "cache")  # by another program, of `main`
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.warns(UserWarning, match=f"main is commit {FIRST}"):
        fetched = pretrained_model(PretrainedPolicy(path="owner/tiny"))
    assert "evil.py" not in names(fetched)


@pytest.mark.parametrize("revision", ["main", FIRST])
def test_a_hub_that_cannot_be_reached_is_an_error_that_says_what_to_do(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(HubError, match=r"owner/tiny: http://127.0.0.1:1 .*ConnectError.* policy\.path"):
        pretrained_model(PretrainedPolicy(path="owner/tiny", revision=revision))


def test_each_refusal_of_the_hub_names_what_is_at_fault(store: Store, hub: Hub) -> None:
    for repository, revision, fault in (
        ("owner/none", None, "owner/none: .* policy.path"),
        ("owner/none", FIRST, f"owner/none: .* {hub.url} "),
        ("owner/tiny", "v2", "owner/tiny has no .* v2; correct policy.revision"),
    ):
        with pytest.raises(HubError, match=fault):
            pretrained_model(PretrainedPolicy(path=repository, revision=revision))
    hub.gated.add("owner/tiny")
    with pytest.raises(HubError, match=f"gated: .*{hub.url}/owner/tiny"):
        pretrained_model(PretrainedPolicy(path="owner/tiny", revision=FIRST))


def test_a_folder_goes_before_the_hub_and_has_no_revision(
    store: Store, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "owner").mkdir()
    folder.rename(folder.parent / "owner" / "tiny")
    assert "config.json" in names(pretrained_model(PretrainedPolicy(path="owner/tiny")))
    assert not hub.asked
    with pytest.raises(ConfigError, match="owner/tiny is a folder"):
        pretrained_model(PretrainedPolicy(path="owner/tiny", revision="main"))
    with pytest.raises(ArtifactError, match="no such folder"):
        pretrained_model(PretrainedPolicy(path="./owner/none"))


# ------------------------------------------------------------------------------------------------ code of the model's own


@pytest.mark.parametrize("revision", [None, "main", "a" * 39, "A" * 40])
def test_code_is_not_trusted_without_a_pin(revision: str | None) -> None:
    with pytest.raises(ConfigError, match=r"trust_remote_code: .* set revision to the 40 hexadecimal digits"):
        PretrainedPolicy.parse({"path": "owner/tiny", "revision": revision, "trust_remote_code": True})


def test_an_architecture_of_its_own_is_refused_and_the_setting_named(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    own_code(folder, tmp_path / "ran")
    pin = code_digest(code_files(folder))
    with pytest.raises(ArtifactError, match=f"set policy.trust_remote_code=true and policy.revision={pin}"):
        pretrained_model(PretrainedPolicy(path=str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("modules")
def test_pinned_code_of_a_folder_runs_and_follows_the_model(store: Store, folder: Path, tmp_path: Path) -> None:
    plain = pretrained_model(PretrainedPolicy(path=str(folder)))
    own_code(folder, tmp_path / "ran")
    pin = code_digest(code_files(folder))
    trusted = pretrained_model(PretrainedPolicy(path=str(folder), revision=pin, trust_remote_code=True))
    assert {"modeling_doubled.py"} == {name for name in names(trusted) if name not in names(plain)}
    assert not (tmp_path / "ran").exists(), "importing ran the code"
    ids = torch.tensor([[3, 4, 5]])
    size = len(load_tokenizer(trusted))
    model = load_model(trusted, dtype=torch.float32)
    torch.testing.assert_close(model(input_ids=ids).logits, 2 * tiny_model(vocab_size=size)(input_ids=ids).logits)
    assert (tmp_path / "ran").exists()

    def next_state(target: Path) -> None:
        copy_description(trusted.path, target)
        shutil.copyfile(trusted.path / "model.safetensors", target / "model.safetensors")

    assert Checkpoint.write(next_state) == trusted


@pytest.mark.usefixtures("modules")
def test_pinned_code_of_the_hub_is_that_of_the_commit(store: Store, hub: Hub, folder: Path, tmp_path: Path) -> None:
    own_code(folder, tmp_path / "ran")
    with pytest.raises(ArtifactError, match=f"owner/tiny: .*policy.revision={FIRST}"):
        pretrained_model(PretrainedPolicy(path="owner/tiny", revision=FIRST))
    trusted = pretrained_model(PretrainedPolicy(path="owner/tiny", revision=FIRST, trust_remote_code=True))
    assert type(load_model(trusted, dtype=torch.float32)).__name__ == "DoubledForCausalLM"


def test_code_that_changed_since_it_was_read_is_refused(store: Store, folder: Path, tmp_path: Path) -> None:
    own_code(folder, tmp_path / "ran")
    pin = code_digest(code_files(folder))
    (folder / "modeling_doubled.py").write_text("raise SystemExit")
    with pytest.raises(ArtifactError, match=rf"modeling_doubled\.py.* not the {pin} "):
        pretrained_model(PretrainedPolicy(path=str(folder), revision=pin, trust_remote_code=True))


def test_code_of_another_repository_is_refused(store: Store, folder: Path, tmp_path: Path) -> None:
    own_code(folder, tmp_path / "ran")
    describe(folder, "config.json", auto_map={"AutoConfig": "stranger/repo--modeling_doubled.DoubledConfig"})
    pin = code_digest(code_files(folder))
    with pytest.raises(ArtifactError, match=r"stranger/repo--modeling_doubled\.DoubledConfig"):
        pretrained_model(PretrainedPolicy(path=str(folder), revision=pin, trust_remote_code=True))


def test_an_unknown_architecture_without_code_is_refused(store: Store, folder: Path) -> None:
    describe(folder, "config.json", model_type="unheard_of")
    with pytest.raises(ArtifactError, match="'unheard_of'"):
        pretrained_model(PretrainedPolicy(path=str(folder)))


@pytest.mark.usefixtures("modules")
def test_equal_configurations_with_other_code_are_other_architectures(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    """A model that is kept warm must not take weights that belong to code it does not run."""
    own_code(folder, tmp_path / "ran")

    def trusted() -> Checkpoint:
        pin = code_digest(code_files(folder))
        return pretrained_model(PretrainedPolicy(path=str(folder), revision=pin, trust_remote_code=True))

    first = trusted()
    file = folder / "modeling_doubled.py"
    file.write_text(file.read_text().replace("logits * 2", "logits * 3"))
    second = trusted()
    assert (first.path / "config.json").read_bytes() == (second.path / "config.json").read_bytes()
    assert architecture_of(first) != architecture_of(second)
    ids = torch.tensor([[3, 4, 5]])
    twice, thrice = (load_model(part, dtype=torch.float32)(input_ids=ids).logits for part in (first, second))
    torch.testing.assert_close(thrice, twice * 1.5)
