"""Where checkpoints come from: folders and GGUF files outside the store, and models of the Hugging Face hub at one commit.

A branch moves; a run that is continued must not move with it. `resolve_revision` is a stage, so its answer is an artifact that
later runs reuse (`cohort forget` asks again), and `fetch_checkpoint` knows commits only: they are its cache key, stand in its
provenance, and need no network where they were fetched before.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import Field

from pipeline.artifact import ArtifactError, Folder
from pipeline.config import Config, ConfigError
from pipeline.progress import report
from pipeline.stage import stage
from pipeline.store.files import measure
from stages.models.checkpoint import Checkpoint
from stages.models.folders import copy_model, model_files
from stages.models.gguf import copy_gguf, gguf_file, is_gguf
from stages.models.trusted_code import code_digest, code_files

REPOSITORY: Final = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
"""`owner/name`."""
COMMIT: Final = r"[0-9a-f]{40}"

_WANTED: Final = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_UNWANTED: Final = ("*/*", "consolidated*")
"""Other formats in folders of their own, and Mistral's second copy of the weights."""
_FILE: Final = "revision.json"


class HubError(RuntimeError):
    """A model that cannot be fetched; says what to do."""


class ExternalCheckpointConfig(Config):
    """A Hugging Face folder or a GGUF file outside the store."""

    path: Path
    """Folder with config.json, safetensors and tokenizer files, as `save_pretrained` or a download leaves it; or a file whose
    name ends in .gguf."""
    trusted_code: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """Run the folder's own Python code, which is pinned by these digits (`code_digest`); null: it stays behind."""

    def key(self) -> dict[str, Any]:
        """Return the digests of the files: the content decides, not the place."""
        if is_gguf(self.path):
            return {"gguf": measure(gguf_file(self.path))["sha256"]}
        files = model_files(self.path, own_code=self.trusted_code is not None)
        if self.trusted_code is None:
            return {file.name: measure(file)["sha256"] for file in files}
        named = {file.name: measure(file)["sha256"] for file in [*files, *code_files(self.path)]}
        return {**named, "trusted_code": self.trusted_code}


@stage(version="3", own=lambda config: config.trusted_code is not None)
def import_checkpoint(config: ExternalCheckpointConfig) -> Checkpoint:
    """Copy a model folder into the store; weights stay as they are and are cast when they are loaded.

    Of a GGUF file a plain checkpoint is made, its weights dequantised to float32 (`stages/models/gguf.py`).

    Raises:
        ConfigError: a GGUF file without the package that reads it, or with code to trust, of which it has none.
        ArtifactError: a missing configuration, shard or tokenizer, weights that are pickles, by file name; an architecture
            that needs code of its own which is not trusted, or is not the code that was pinned; a tokenizer that loses text.
    """
    if is_gguf(config.path):
        if config.trusted_code is not None:
            raise ConfigError(
                "policy.trust_remote_code: a GGUF file brings no code; leave it out, and policy.revision too"
            )
        return Checkpoint.write(lambda folder: copy_gguf(config.path, folder))
    pin, files = config.trusted_code, code_files(config.path) if config.path.is_dir() else []
    found = code_digest(files)
    if pin not in (None, found):
        raise ArtifactError(
            f"{config.path}: its code ({', '.join(file.name for file in files) or 'none'}) has the digest {found}, not the "
            f"{pin} that was pinned. Read it again; if you trust it, set policy.revision={found}"
        )
    setting = f"policy.trust_remote_code=true and policy.revision={found}"
    return Checkpoint.write(lambda folder: copy_model(config.path, folder, pin=pin, setting=setting))


# ------------------------------------------------------------------------------------------------ hub


class Revision(Folder):
    """The commit of a branch or tag when it was first resolved: revision.json with `commit`."""

    @property
    def commit(self) -> str:
        """Return 40 hexadecimal digits."""
        commit: str = json.loads((self.path / _FILE).read_text(encoding="utf-8"))["commit"]
        return commit


class HubCheckpointConfig(Config):
    """A model of the hub at one commit."""

    repository: str = Field(pattern=f"^{REPOSITORY}$")
    """`owner/name`."""
    revision: str = Field(pattern=f"^{COMMIT}$")
    """The commit: branches move."""
    trust_remote_code: bool = False
    """Fetch the repository's own Python code with it, and let it run whenever the model is loaded."""


@stage(version="1")
def resolve_revision(repository: str, revision: str) -> Revision:
    """Resolve a branch or tag to its commit, which stays that of every later run; warn with the commit.

    Raises:
        HubError: no such repository or revision, no access, or no connection and nothing in the hub's cache.
    """
    with _explained(repository, revision):
        commit = _commit(repository, revision)
    warnings.warn(
        f"{repository}: {revision} is commit {commit}, which this and later runs use; set policy.revision={commit} so that the "
        "configuration says it",
        stacklevel=2,
    )
    found = {"repository": repository, "revision": revision, "commit": commit}

    def write(folder: Path) -> None:
        (folder / _FILE).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    return Revision.write(write)


@stage(version="2", own=lambda config: config.trust_remote_code)
def fetch_checkpoint(config: HubCheckpointConfig) -> Checkpoint:
    """Download a model into the hub's own cache (HF_HUB_CACHE), then copy it into the store.

    Safetensors, JSON, text, sentencepiece models and templates only: no pickles, and Python files only if trusted.

    Raises:
        HubError: as `resolve_revision`.
        ArtifactError: as `import_checkpoint`.
    """
    report("fetch", repository=config.repository, revision=config.revision)
    with _explained(config.repository, config.revision):
        folder = _snapshot(config)
    pin = config.revision if config.trust_remote_code else None
    setting = f"policy.trust_remote_code=true and policy.revision={config.revision}"
    return Checkpoint.write(lambda target: copy_model(folder, target, pin=pin, setting=setting, name=config.repository))


def code_of_commit(repository: str, revision: str) -> str:
    """Return the digest of the Python code that a commit has, by the hub or its cache and not by any artifact.

    Raises:
        HubError: as `resolve_revision`.
    """
    from huggingface_hub import errors

    def files(*, offline: bool) -> list[Path]:
        return code_files(_download(repository, revision, ["*.py"], offline=offline))

    with _explained(repository, revision):
        with contextlib.suppress(errors.LocalEntryNotFoundError):
            if found := files(offline=True):
                return code_digest(found)
        _ask_quickly(repository, revision)
        return code_digest(files(offline=False))


def fetch_description(repository: str, revision: str) -> Path:
    """Fetch configuration and tokenizer of a model into the hub's cache; return their folder.

    Raises:
        HubError: as `resolve_revision`.
    """
    with _explained(repository, revision):
        return _download(repository, revision, [pattern for pattern in _WANTED if pattern != "*.safetensors"])


def _download(repository: str, revision: str, patterns: list[str], *, offline: bool = False) -> Path:
    """Return the folder of a commit in the hub's cache, with the files of these names; `offline`: only what is there."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repository,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=list(_UNWANTED),
            cache_dir=_cache(),
            endpoint=_endpoint(),
            local_files_only=offline,
        )
    )


def _ask_quickly(repository: str, revision: str) -> None:
    """Raise what a download would raise, at once: that would try six times to reach a hub that is not there."""
    from huggingface_hub import HfApi

    HfApi(endpoint=_endpoint()).model_info(repository, revision=revision)


def _snapshot(config: HubCheckpointConfig) -> Path:
    """Download the files into the hub's cache where they are not there and the hub answers."""
    from huggingface_hub import errors

    refusal: Exception | None = None
    unavailable: tuple[type[Exception], ...] = (errors.HfHubHTTPError, *_unreachable())
    try:
        _ask_quickly(config.repository, config.revision)
    except unavailable as error:
        refusal = error
    wanted = [*_WANTED, *(["*.py"] if config.trust_remote_code else [])]
    try:
        return _download(config.repository, config.revision, wanted, offline=refusal is not None)
    except errors.LocalEntryNotFoundError as error:
        raise refusal or error from None


def _commit(repository: str, revision: str) -> str:
    """Ask the hub; without a connection its cache, filled by an earlier download of whatever program."""
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    try:
        return str(HfApi(endpoint=_endpoint()).model_info(repository, revision=revision).sha)
    except errors.HfHubHTTPError:  # an answer, and a connection error's sibling
        raise
    except _unreachable():
        cached = try_to_load_from_cache(repository, "config.json", revision=revision, cache_dir=_cache())
        if not isinstance(cached, str):
            raise
        return Path(cached).parent.name


# The library reads its environment when it is imported, which the program that calls us may have done before setting it.
def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _cache() -> str | None:
    return os.environ.get("HF_HUB_CACHE") or None


def _unreachable() -> tuple[type[Exception], ...]:
    """Return what the library raises where there is no connection: none is wanted, or none comes about."""
    from huggingface_hub import errors

    # `HTTPError` of the HTTP library in use, the parent of its connection errors.
    return (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, getattr(errors, "HTTPError", OSError))


@contextlib.contextmanager
def _explained(repository: str, revision: str) -> Iterator[None]:
    """Raise the library's errors as `HubError`s that say what to do."""
    from huggingface_hub import constants, errors

    place = _endpoint() or constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(
            f"{repository} is gated: accept its terms at {place}/{repository}, then log in (`hf auth login`, or HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{repository} has no branch, tag or commit {revision}; correct policy.revision") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{repository}: neither a folder here nor a model at {place} that you may read; correct policy.path, or log in "
            "where it is private (`hf auth login`, or HF_TOKEN)"
        ) from None
    except errors.HfHubHTTPError as error:
        raise HubError(f"{repository}: {place} answers {error.response.status_code}; try again later") from None
    except _unreachable() as error:
        raise HubError(
            f"{repository}: {place} cannot be reached ({_reason(error)}), no folder of that name is here, and the hub's cache "
            f"does not hold {revision}; connect, set HF_ENDPOINT to a mirror, or set policy.path to a copy of the model"
        ) from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no details').splitlines()[0]}"
