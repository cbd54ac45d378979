"""Sample outputs by vLLM, in a worker process that has an interpreter of its own (`vllm_worker.py` is its other end).

The engine is kept warm and given new weights in place, of a policy that is not on disk from shared memory. When it starts, and
after some loads (`probe_every`), its log-probabilities of a probe are compared with transformers' on the same weights
(`probe.py`); every order names the checkpoint whose outputs are wanted: outputs of stale weights are an error. What goes over
the wire is small; ids go through files of a scratch folder.
"""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pipeline.residency import evict, resident
from pipeline.store.context import record_package
from pipeline.workers.group import Group, Hear, RefusedError, WorkerError
from stages.models import WEIGHT_INDEX, Checkpoint, architecture_of, may_run_code, model_folder, weight_files
from stages.rollout.config import VLLMBackendConfig, environments_of, float32_logits, require_vllm
from stages.rollout.generator import VLLM, Output, Progress, Prompt, Sampling, check_window, cut_at_string, make_room
from stages.rollout.probe import SAMPLED, Answer, StaleWeightsError, check_answer, probe_ids, vocabulary_and_window

if TYPE_CHECKING:
    import torch

_HANDLER: Final = Path(__file__).with_name("vllm_worker.py")
_PROBE_TEMPERATURE: Final = 0.7
"""Not 1: there `raw_logprobs` and `processed_logprobs` are the same."""
_TOKENIZER: Final = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model"),
)
"""Files that an engine reads which looks for stop strings."""
_STEP_TOKENS: Final = 4096
"""Tokens that a step computes on a CPU, at most; vLLM's own default there. A longer window raises it."""


@contextlib.contextmanager
def vllm_generator(
    policy: Checkpoint, backend: VLLMBackendConfig, *, reads_text: bool = False
) -> Iterator[VLLMGenerator]:
    """Yield a generator that has the weights of `policy`, over an engine that may serve others afterwards.

    Args:
        reads_text: whether the engine has the policy's tokenizer too, which stop strings need.

    Raises:
        ConfigError: no vLLM.
        StaleWeightsError: the engine does not compute with the policy's weights.
        WorkerError: it died, hung, or cannot run such a model, in its own words.
    """
    from stages.training.hardware import training_device

    device, key = training_device(), (architecture_of(policy), backend, reads_text)
    make_room(VLLM, device)
    engine = resident(VLLM, key, lambda: Engine(backend, reads_text=reads_text))
    if not engine.alive:
        evict(VLLM)
        engine = resident(VLLM, key, lambda: Engine(backend, reads_text=reads_text))
    try:
        engine.hold(policy)
        yield VLLMGenerator(engine, policy)
        if engine.between_calls == "sleep":
            engine.sleep()
    except BaseException:
        evict(VLLM)  # whatever it was doing, it shall not be found in the middle of it
        raise
    if engine.between_calls == "kill":
        evict(VLLM)


class VLLMGenerator:
    """Implement `Generator` over an engine that holds the weights of one checkpoint."""

    def __init__(self, engine: Engine, policy: Checkpoint) -> None:
        self.engine = engine
        self.policy = policy
        self.window = engine.window(policy)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[list[Output]]:
        """Sample all prompts at once, as `Generator.generate`; vLLM forms its own batches.

        Raises:
            WorkerError: the engine died, hung, or refused.
        """
        for prompt in prompts:
            check_window(self.window, prompt, sampling)
        return self.engine.generate(self.policy, prompts, sampling, progress)


class Engine:
    """Run vLLM in a process of its own, or in several that share the questions, and know which checkpoint all of them hold."""

    def __init__(self, backend: VLLMBackendConfig, *, reads_text: bool = False) -> None:
        python = require_vllm(backend)
        self.backend = backend
        self._reads_text = reads_text
        self.holds: str | None = None
        """Digest of the checkpoint that it was seen to have the weights of; None while they change."""
        self.between_calls = backend.between_calls
        """What becomes of it between two calls; the worker says what `auto` is once it has started the engine."""
        self._about = ""
        self._loads = 0
        """Loads of weights, of which the first and every `probe_every`-th after it is probed."""
        self._folder = Path(tempfile.mkdtemp(prefix="cohort-vllm-"))
        try:
            self._group = Group(
                "vllm",
                _HANDLER,
                python=python,
                environments=environments_of(backend),
                logs=self._folder,
                deadline=backend.start_deadline,
            )
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        atexit.register(self.close)

    @property
    def alive(self) -> bool:
        """Return whether it can take orders."""
        return self._group.alive

    def window(self, policy: Checkpoint) -> int | None:
        """Return the tokens of prompt and output that fit."""
        limits = (vocabulary_and_window(policy)[1], self.backend.max_model_len)
        return min((limit for limit in limits if limit is not None), default=None)

    def hold(self, policy: Checkpoint) -> None:
        """Load the weights of `policy`, and compare the probe.

        Raises:
            StaleWeightsError: it has others.
            WorkerError: see `vllm_generator`.
        """
        if self.holds != policy.state:
            self.holds = None
            with model_folder(policy, self.dtype) as source, tempfile.TemporaryDirectory(dir=self._folder) as folder:
                reply, *_ = self.order(
                    {
                        "do": "hold",
                        "folder": _linked(policy, source, Path(folder), _TOKENIZER if self._reads_text else ()),
                        "digest": policy.state,
                        "engine": self._arguments(policy),
                        "between_calls": self._wanted_between_calls(),
                    },
                    deadline=self.backend.start_deadline,
                )
            self.between_calls = reply["between_calls"]
            self._about = f"{reply['vllm']} ({str(self.dtype).removeprefix('torch.')}, {reply['device']})"
            if self._loads % self.backend.probe_every == 0:
                self._prove(policy)
            self._loads += 1
            self.holds = policy.state
        record_package("vllm", self._about)

    def generate(
        self, policy: Checkpoint, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None
    ) -> list[list[Output]]:
        """Return one output per seed for every prompt."""
        if not any(prompt.seeds for prompt in prompts):
            return [[] for _ in prompts]
        hands = deal([len(prompt.seeds) for prompt in prompts], len(self._group.pids))
        requests, outputs = (
            [self._folder / f"{name}-{rank}.npz" for rank in range(len(hands))] for name in ("requests", "outputs")
        )
        for file, hand in zip(requests, hands, strict=True):
            _write([prompts[place] for place in hand], file)
        heard: dict[int, tuple[int, int]] = {}

        def hear(rank: int, topic: str, values: dict[str, Any]) -> None:
            heard[rank] = (values["done"], values["tokens"])
            if progress is not None:
                progress(sum(done for done, _ in heard.values()), sum(tokens for _, tokens in heard.values()))

        self.order(
            {
                "do": "generate",
                "digest": policy.state,
                "requests": [str(file) for file in requests],
                "outputs": [str(file) for file in outputs],
                "temperature": sampling.temperature,
                "max_tokens": sampling.max_output_tokens,
                "stop_ids": list(sampling.stop_ids),
                "stop_strings": sampling.stop_strings.of_any_prompt if sampling.stop_strings else [],
            },
            deadline=self.backend.deadline,
            hear=hear,
        )
        groups: list[list[Output]] = [[] for _ in prompts]
        for rank, (file, hand) in enumerate(zip(outputs, hands, strict=True)):
            found = _read(file, [len(prompts[place].seeds) for place in hand])
            every = [output for group in found for output in group]
            hear(rank, "vllm", {"done": len(every), "tokens": sum(len(output.ids) for output in every)})
            for place, group in zip(hand, found, strict=True):
                groups[place] = [cut_at_string(output, sampling, prompts[place]) for output in group]
        return groups

    def sleep(self) -> None:
        """Give the GPU's memory back; the weights are gone then."""
        self.holds = None
        self.order({"do": "sleep"}, deadline=self.backend.start_deadline)

    def order(self, order: dict[str, Any], *, deadline: float, hear: Hear | None = None) -> list[Any]:
        """Let every engine do it, without news for `deadline` seconds at most; return the replies."""
        try:
            return self._group.order(order, deadline=deadline, renewed=True, hear=hear)
        except RefusedError as error:
            if "StaleWeightsError" in error.kinds:
                raise StaleWeightsError(str(error)) from None
            raise

    def close(self) -> None:
        """End the processes, which is the only sure way to have its memory back. Its log stays where it failed."""
        atexit.unregister(self.close)
        self._group.close()
        if not self._group.failed:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of weights and activations."""
        from stages.training.hardware import inference_dtype

        return inference_dtype(self.backend.dtype)

    def _wanted_between_calls(self) -> str:
        """Return the setting; `auto` is the worker's to decide only where the trainer needs the engine's memory, on a GPU."""
        from stages.training.hardware import training_device

        alone = self.backend.between_calls == "auto" and training_device() == "cpu"
        return "warm" if alone else self.backend.between_calls

    def _arguments(self, policy: Checkpoint) -> dict[str, Any]:
        """Return vLLM's own arguments, by their names there."""
        from stages.training.hardware import training_device

        backend, eager, window = self.backend, self.backend.eager, self.window(policy)
        on_cpu = training_device() == "cpu"
        # A prompt that is cut over two steps makes vLLM rewind its request's random numbers, which a CPU's generator cannot.
        whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(_STEP_TOKENS, window or 0)}
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            **({"hf_overrides": {"head_dtype": "float32"}} if float32_logits(backend) else {}),
            "max_model_len": window,
            "max_num_seqs": backend.max_num_seqs,
            "tensor_parallel_size": backend.tensor_parallel_size,
            "gpu_memory_utilization": backend.gpu_memory_utilization,
            "enforce_eager": on_cpu if eager is None else eager,
            "skip_tokenizer_init": not self._reads_text,
            "generation_config": "vllm",  # not the model's, whose top_p and penalties would change the distribution
            "logprobs_mode": "processed_logprobs",
            "trust_remote_code": False,
            "disable_log_stats": True,
            "seed": 0,  # every request has its own
            **(whole if on_cpu else {}),
        }

    def _prove(self, policy: Checkpoint) -> None:
        prompt = probe_ids(vocabulary_and_window(policy)[0], self.window(policy))
        replies = self.order(
            {
                "do": "probe",
                "digest": policy.state,
                "ids": prompt,
                "tokens": SAMPLED,
                "temperature": _PROBE_TEMPERATURE,
            },
            deadline=self.backend.deadline,
        )
        check_answer(
            [Answer(**reply) for reply in replies],
            policy,
            prompt,
            dtype=self.dtype,
            temperature=_PROBE_TEMPERATURE,
            tolerance=self.backend.probe_tolerance,
            engine="vllm",
        )


def _linked(policy: Checkpoint, source: Path, folder: Path, more: Sequence[str]) -> str:
    """Link the model in `source`, and `more`, into `folder`: vLLM would load the optimizer's tensors there as weights."""
    if may_run_code(policy.described):
        raise ValueError(
            f"{policy}: its model is code of its own folder, which vLLM is not given to run; set rollout.backend.kind=hf"
        )
    names = [
        "config.json",
        "generation_config.json",
        WEIGHT_INDEX,
        *(file.name for file in weight_files(source)),
        *more,
    ]
    for name in names:
        if (source / name).exists():
            (folder / name).symlink_to((source / name).absolute())
    return str(folder)


def deal(counts: Sequence[int], engines: int) -> list[list[int]]:
    """Return the places of each engine's prompts, of which each has so many outputs: to the one that has the fewest so far."""
    hands: list[list[int]] = [[] for _ in range(engines)]
    loads = [0] * engines
    for place, count in enumerate(counts):
        rank = loads.index(min(loads))
        hands[rank].append(place)
        loads[rank] += count
    return hands


def _write(prompts: Sequence[Prompt], file: Path) -> None:
    np.savez(
        file,
        ids=np.array([token for prompt in prompts for token in prompt.ids], dtype=np.int64),
        lengths=np.array([len(prompt.ids) for prompt in prompts], dtype=np.int64),
        counts=np.array([len(prompt.seeds) for prompt in prompts], dtype=np.int64),
        seeds=np.array([seed for prompt in prompts for seed in prompt.seeds], dtype=np.int64),
    )


def _read(file: Path, counts: Sequence[int]) -> list[list[Output]]:
    if not sum(counts):
        return [[] for _ in counts]
    with np.load(file, allow_pickle=False) as found:
        ends = np.cumsum(found["lengths"])[:-1]
        rows = zip(
            np.split(found["ids"], ends), np.split(found["logprobs"], ends), found["stopped"].tolist(), strict=True
        )
        outputs = [Output(ids, logprobs, "stop" if stopped else "length") for ids, logprobs, stopped in rows]
    if len(outputs) != sum(counts):
        raise WorkerError(f"vllm: expected {sum(counts)} outputs, found {len(outputs)}", rank=0)
    every = iter(outputs)
    return [[next(every) for _ in range(count)] for count in counts]
