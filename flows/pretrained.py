"""A policy made by others: how a configuration names it, and how it becomes a checkpoint."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config import Config, ConfigError
from stages.models import (
    COMMIT,
    REPOSITORY,
    Checkpoint,
    ExternalCheckpointConfig,
    HubCheckpointConfig,
    HubError,
    code_of_commit,
    fetch_checkpoint,
    import_checkpoint,
    resolve_revision,
    trust,
)

__all__ = ["PretrainedPolicy", "pretrained_model"]


class PretrainedPolicy(Config):
    """A policy made by others: a folder in Hugging Face format, or a model of the hub."""

    kind: Literal["pretrained"] = "pretrained"
    "Selects an existing model."
    path: str = Field(min_length=1)
    """Folder with config.json, safetensors and tokenizer; where there is none of that name, `owner/name` of a model on the hub
    (HF_ENDPOINT names a mirror)."""
    revision: str | None = Field(None, pattern=r"^[A-Za-z0-9][\w./-]*$")
    """Commit, tag or branch of a model on the hub; null: `main`. A name is resolved to a commit once, and later runs keep that
    commit. Of a folder, the digest of its Python code (`trust_remote_code`)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model, for architectures that transformers lacks. It runs with your rights: read it
    first. Needs a pinned `revision`; a refused model names what to set."""

    @model_validator(mode="after")
    def _pinned_code(self) -> Self:
        if self.trust_remote_code and not re.fullmatch(COMMIT, self.revision or ""):
            raise ValueError(
                "trust_remote_code: code is trusted as it was read, so pin it: set revision to the 40 hexadecimal digits of a "
                f"commit (of a folder: the digest that the refusal of its code names), found {self.revision}"
            )
        return self


def pretrained_model(config: PretrainedPolicy) -> Checkpoint:
    """A model of others: a folder where there is one of that name, else of the hub, at one commit.

    Raises:
        ConfigError: a revision of a folder whose code is not asked for.
        HubError, ArtifactError: it cannot be fetched or used, with what to do.
    """
    folder, revision = Path(config.path).expanduser(), config.revision
    if folder.is_dir() or not re.fullmatch(REPOSITORY, config.path):
        if revision is not None and not config.trust_remote_code:
            raise ConfigError(
                f"policy.revision: {config.path} is a folder, whose content decides; set policy.revision=null, or give a hub "
                "model a path that is no folder here"
            )
        if revision is not None:
            trust(revision)
        return import_checkpoint(ExternalCheckpointConfig(path=folder, trusted_code=revision))
    if revision is None or not re.fullmatch(COMMIT, revision):
        revision = resolve_revision(config.path, revision or "main").commit
    wanted = HubCheckpointConfig(repository=config.path, revision=revision, trust_remote_code=config.trust_remote_code)
    checkpoint = fetch_checkpoint(wanted)
    if config.trust_remote_code:
        _trust_commit(config.path, revision)
    return checkpoint


def _trust_commit(repository: str, commit: str) -> None:
    try:
        trust(code_of_commit(repository, commit))
    except HubError as error:  # whoever only looks at a run loads no model, and whoever does is refused
        warnings.warn(
            f"code of {repository} will not run, since it cannot be compared with its commit: {error}", stacklevel=3
        )
