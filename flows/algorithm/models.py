"""The models that Algorithm 1 starts from, and the policy's tokenizer before there is a policy."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from flows.algorithm.data import DataSets
from flows.config import IterativeRLConfig, PretrainedPolicy
from pipeline.artifact import ArtifactError
from pipeline.config import ConfigError
from stages.environment import ToolCallsConfig
from stages.models import (
    COMMIT,
    REPOSITORY,
    Checkpoint,
    ExternalCheckpointConfig,
    HubCheckpointConfig,
    HubError,
    code_of_commit,
    describe_gguf,
    fetch_checkpoint,
    fetch_description,
    import_checkpoint,
    is_gguf,
    load_tokenizer,
    read_gguf,
    resolve_revision,
    same_vocabulary,
    trust,
)
from stages.rollout import stops_of
from stages.sft import create_policy, policy_texts, supervised_finetuning
from stages.tables import Demonstrations
from stages.text import PromptError, build_tokenizer, tool_frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SUFFIXES: Final = (".json", ".txt", ".model", ".jinja")


def base_model(config: IterativeRLConfig, data: DataSets) -> Checkpoint:
    """Return a pretrained model, or one made from scratch.

    Raises:
        ConfigError: as `require_turns`.
    """
    if isinstance(config.policy, PretrainedPolicy):
        made = pretrained_model(config.policy)
    else:
        made = create_policy(config.policy, data.demonstrations, config.prompt)
    if config.rollout.has_stops or config.environment is not None:
        require_turns(config, load_tokenizer(made))
    return made


def require_turns(config: IterativeRLConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer in which outputs and their turns would not end, or answers could not be written.

    Raises:
        ConfigError: stops of outputs, or ends of calls, that it cannot write; a chat template without the role `tool`,
            or that shows no tools.
    """
    environment = config.environment
    stops_of(tokenizer, config.rollout, environment.call_ends if environment else ())
    if isinstance(environment, ToolCallsConfig):
        try:
            tool_frame(tokenizer, config.prompt)
        except PromptError as error:
            raise ConfigError(f"environment: {error}") from None


def initial_policy(config: IterativeRLConfig, data: DataSets, base: Checkpoint) -> Checkpoint:
    """Return pi_theta_init (Algorithm 1, line 1): the base model after supervised fine-tuning, where there is any."""
    if config.sft is None:
        return base
    if data.demonstrations is None:
        raise ValueError("sft: the data set has no solutions to imitate; set sft to null or name the solution column")
    return supervised_finetuning(base, data.demonstrations, config.prompt, config.sft)


def teacher_model(config: IterativeRLConfig, base: Checkpoint) -> Checkpoint | None:
    """Return the teacher, where the method learns from one.

    Raises:
        ConfigError: its ids mean other tokens than those of `base`.
        HubError, ArtifactError: as `pretrained_model`.
    """
    if config.teacher is None:
        return None
    teacher = pretrained_model(config.teacher)
    if not same_vocabulary(base, teacher):
        raise ConfigError(
            f"teacher.path: {config.teacher.path} has another vocabulary than the policy, and its log-probabilities would be "
            "those of other tokens; expected a model with the policy's tokenizer"
        )
    return teacher


def pretrained_model(config: PretrainedPolicy) -> Checkpoint:
    """Return a pretrained model: a folder or GGUF file where there is one of that name, else one of the hub, at one commit.

    Raises:
        ConfigError: a revision of a folder whose code is not asked for, or of a file.
        HubError, ArtifactError: it cannot be fetched or used, with what to do.
    """
    folder, revision = Path(config.path).expanduser(), config.revision
    if is_gguf(folder) or folder.is_dir() or not re.fullmatch(REPOSITORY, config.path):
        if revision is not None and not config.trust_remote_code:
            kind = "file" if is_gguf(folder) else "folder"
            raise ConfigError(
                f"policy.revision: {config.path} is a {kind}, whose content decides; set policy.revision=null, or give a hub "
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


class EarlyTokenizer(NamedTuple):
    """The policy's tokenizer before there is a policy: read without weights, torch or store."""

    tokenizer: PreTrainedTokenizerFast
    window: int | None
    """Tokens that the model reads; None: not known before it is made, or without a limit."""
    ends: frozenset[int] = frozenset()
    """Tokens that end an output (`stages/rollout/stage.py: stop_ids`)."""


def early_tokenizer(
    config: IterativeRLConfig, demonstrations: Demonstrations | None, *, fetch: bool = False, exact: bool = False
) -> EarlyTokenizer:
    """Return the tokenizer that the policy of `config` has or will have.

    Args:
        demonstrations: what a policy made from scratch makes its tokenizer from.
        fetch: download the tokenizer of a hub model that is not here.
        exact: read it as the run will, which imports torch (as a GGUF file always does); otherwise as its tokenizer.json says,
            which nearly always is the same (`stages/text/tokenizers.py`).

    Raises:
        ConfigError: there is none: no model here, no demonstrations, code of the model's own.
        HubError: it cannot be fetched.
    """
    policy = config.policy
    if not isinstance(policy, PretrainedPolicy):
        if demonstrations is None:
            raise ConfigError("policy: a tokenizer is made from demonstrations, and the data set has none")
        made = build_tokenizer(list(policy_texts(demonstrations, config.prompt)), policy.tokenizer)
        window = policy.settings.get("max_position_embeddings")
        return EarlyTokenizer(made, window if isinstance(window, int) else None, frozenset({made.eos_token_id}))
    with _description(policy, fetch=fetch) as folder:
        described: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        read = _read(folder, exact=exact)
        return EarlyTokenizer(read, described.get("max_position_embeddings"), _ends(folder, read))


def _ends(folder: Path, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    files = [folder / name for name in ("generation_config.json", "config.json")]
    listed = json.loads(next(file for file in files if file.is_file()).read_text(encoding="utf-8")).get("eos_token_id")
    return frozenset({*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id} - {None})


@contextlib.contextmanager
def _description(policy: PretrainedPolicy, *, fetch: bool) -> Iterator[Path]:
    """Yield a folder with configuration and tokenizer of a policy; of a GGUF file they are made for the block."""
    if not is_gguf(path := Path(policy.path).expanduser()):
        yield _folder(policy, fetch=fetch)
        return
    with tempfile.TemporaryDirectory(prefix="cohort-tokenizer-") as made:
        try:
            describe_gguf(read_gguf(path), Path(made))
        except ArtifactError as error:
            raise ConfigError(f"policy.path: {error}") from None
        yield Path(made)


def _folder(policy: PretrainedPolicy, *, fetch: bool) -> Path:
    folder = Path(policy.path).expanduser()
    if policy.trust_remote_code:
        raise ConfigError(
            "policy.trust_remote_code: code of the model's own may read its tokenizer, and runs in a run only"
        )
    if not folder.is_dir() and re.fullmatch(REPOSITORY, policy.path):
        if fetch:
            return fetch_description(policy.path, policy.revision or "main")
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(policy.path, "tokenizer.json", revision=policy.revision)
        folder = Path(found).parent if isinstance(found, str) else folder
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"policy.path: {policy.path} is no folder here with config.json and tokenizer.json")
    return folder


def _read(folder: Path, *, exact: bool) -> PreTrainedTokenizerFast:
    """Read a tokenizer from a copy, as an import into the store makes one."""
    from stages.text import settle_start, settle_tokenizer

    with tempfile.TemporaryDirectory(prefix="cohort-tokenizer-") as scratch:
        for file in folder.iterdir():
            if file.suffix in _SUFFIXES and file.is_file():
                shutil.copyfile(file, Path(scratch) / file.name)
        if exact:
            from transformers import AutoTokenizer

            settle_tokenizer(Path(scratch))
            return AutoTokenizer.from_pretrained(scratch, trust_remote_code=False, local_files_only=True)
        from transformers import PreTrainedTokenizerFast

        settle_start(Path(scratch))
        read: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(scratch, local_files_only=True)
        return read
