"""Run vLLM's side of `vllm.py`: an engine that works off orders, in vLLM's environment, which has none of our packages.

The engine lives in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), so that there is one process to start, to wait for and to
kill; only tensor parallelism adds others, in the same process group.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

_RANK = int(os.environ["COHORT_LAUNCHER_RANK"])
"""This engine's number among those that share the questions."""
_EVERY = 0.5
"""Seconds between two reports: what is silent for long is taken to hang."""

Report = Callable[[str, dict[str, Any]], None]


class Repacking:
    """Extend vLLM's worker, by `worker_extension_cls`."""

    def repack_weights(self) -> int:
        """Pack again what multiplies by a packed copy of weights that were replaced; the number of such layers.

        On a CPU every linear layer and the output head run on weights packed when they were loaded. vLLM's `reload_weights`
        packs linear layers anew and forgets the head where it is tied to the embedding: engines then answer with a mixture.
        """
        packed = [
            layer
            for layer in self.model_runner.get_model().modules()  # type: ignore[attr-defined]
            if hasattr(layer, "cpu_linear") and getattr(layer, "weight", None) is not None and layer.weight.numel() > 0
        ]
        for layer in packed:
            layer.quant_method.process_weights_after_loading(layer)
        return len(packed)


def between_calls(chosen: str) -> str:
    """Return what becomes of an engine between two calls; `auto`: what frees this platform's memory soonest.

    Sleep mode needs an allocator of vLLM's own on CUDA and ROCm, which some builds lack; the process has to end there.
    """
    if chosen != "auto":
        return chosen
    if current_platform.is_cpu():
        return "warm"
    allocates = not current_platform.is_cuda_alike() or current_platform.is_cumem_allocator_available()
    return "sleep" if current_platform.is_sleep_mode_available() and allocates else "kill"


class Engine:
    """Hold one model, made at the first order and given other weights by later ones."""

    def __init__(self) -> None:
        self.llm: LLM | None = None
        self.holds: str | None = None
        """Digest of the checkpoint whose weights it has; None while they change."""
        self.between_calls = ""
        """`warm`, `sleep` or `kill`, as `between_calls` decides."""
        self.asleep = False

    def __call__(self, order: dict[str, Any], report: Report) -> Any:
        match order["do"]:
            case "hold":
                return self._hold(order)
            case "generate":
                return self._generate(order, report)
            case "probe":
                return self._probe(order)
            case "sleep":
                self.holds, self.asleep = None, True
                self._engine().sleep(level=2)
                return None
        raise ValueError(f"no such order: {order['do']}")

    def _hold(self, order: dict[str, Any]) -> dict[str, Any]:
        """Load the weights in `folder`; return what it runs on."""
        started, self.holds = time.perf_counter(), None
        if self.llm is None:
            extension = f"{Repacking.__module__}.{Repacking.__name__}" if current_platform.is_cpu() else ""
            self.between_calls = between_calls(order["between_calls"])
            sleeps = self.between_calls == "sleep"
            self.llm = LLM(
                model=order["folder"], worker_extension_cls=extension, enable_sleep_mode=sleeps, **order["engine"]
            )
        else:
            self._reload(order["folder"])
        self.holds = order["digest"]
        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "device": current_platform.device_type,
            "between_calls": self.between_calls,
            "seconds": time.perf_counter() - started,
        }

    def _reload(self, folder: str) -> None:
        llm = self._engine()
        if self.asleep:
            llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if current_platform.is_cpu():
            llm.collective_rpc("repack_weights")
        if self.asleep:
            llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def _generate(self, order: dict[str, Any], report: Report) -> dict[str, Any]:
        """Sample for the requests in this engine's file of `requests`, into that of `outputs`, in the order of the requests."""
        self._check(order)
        self._forget_prefixes()
        prompts, params = _requests(order)
        if not prompts:  # fewer questions than engines
            return {"digest": self.holds}
        ids: list[Any] = [None] * len(prompts)
        logprobs: list[Any] = [None] * len(prompts)
        stopped = np.zeros(len(prompts), dtype=bool)
        for place, output in self._ended(prompts, params, report):
            ids[place] = np.asarray(output.token_ids, dtype=np.int32)
            logprobs[place] = np.asarray(_sampled(output), dtype=np.float32)
            stopped[place] = _has_stopped(output, place)
        lengths = np.array([len(part) for part in ids])
        np.savez(
            order["outputs"][_RANK],
            ids=np.concatenate(ids),
            logprobs=np.concatenate(logprobs),
            lengths=lengths,
            stopped=stopped,
        )
        self._check(order)
        return {"digest": self.holds}

    def _ended(self, prompts: Sequence[Any], params: Sequence[Any], report: Report) -> Iterator[tuple[int, Any]]:
        """Yield (place, output) of every request, as they end; report (outputs ended, tokens of these)."""
        engine = self._engine().llm_engine
        names = self._engine().enqueue(list(prompts), list(params), use_tqdm=False)
        # Requests are called `number-random` inside the engine, and `number` in what it returns.
        place = {name.rpartition("-")[0] or name: place for place, name in enumerate(names)}
        done = tokens = 0
        last = time.perf_counter()
        while engine.has_unfinished_requests():
            for request in engine.step():
                if not request.finished:
                    continue
                [output] = request.outputs
                done, tokens = done + 1, tokens + len(output.token_ids)
                yield place[request.request_id], output
            if time.perf_counter() - last > _EVERY:
                last = time.perf_counter()
                report("vllm", {"done": done, "tokens": tokens})

    def _probe(self, order: dict[str, Any]) -> dict[str, Any]:
        """Return log-probabilities of a prompt at T = 1, and some sampled tokens with theirs at `temperature`."""
        self._check(order)
        params = SamplingParams(
            temperature=order["temperature"],
            max_tokens=order["tokens"],
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=0,
            seed=0,
            detokenize=False,
        )
        [request] = self._engine().generate([{"prompt_token_ids": order["ids"]}], params, use_tqdm=False)
        [output] = request.outputs
        found = [at[token].logprob for token, at in zip(order["ids"][1:], request.prompt_logprobs[1:], strict=True)]
        return {"prompt_logprobs": found, "ids": list(output.token_ids), "logprobs": _sampled(output)}

    def _forget_prefixes(self) -> None:
        """Drop keys of older weights, and of the call before: an equal call shall find the engine in an equal state."""
        if not self._engine().reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, as requests of an earlier call still run")

    def _check(self, order: dict[str, Any]) -> None:
        if self.holds != order["digest"]:
            raise StaleWeightsError(f"asked for outputs of {order['digest']}, but the engine holds {self.holds}")

    def _engine(self) -> LLM:
        if self.llm is None:
            raise RuntimeError("no model was loaded yet")
        return self.llm


class StaleWeightsError(RuntimeError):
    """The engine has other weights than those whose outputs are wanted."""


def _requests(order: dict[str, Any]) -> tuple[list[Any], list[SamplingParams]]:
    """Return one request per seed: only then does each output depend on its own seed alone."""
    with np.load(order["requests"][_RANK], allow_pickle=False) as file:
        ids, lengths, counts, seeds = (file[name] for name in ("ids", "lengths", "counts", "seeds"))
    prompts: list[Any] = []
    parts = np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
    for prompt, count in zip(parts, counts.tolist(), strict=True):
        prompts += [{"prompt_token_ids": prompt.tolist()}] * count
    # It finds a string at its token or later, in a text that waits for whole characters; `cut_at_string` has the last word.
    strings = {"stop": order["stop_strings"], "include_stop_str_in_output": True} if order["stop_strings"] else {}
    params = [
        SamplingParams(
            temperature=order["temperature"],
            max_tokens=order["max_tokens"],
            stop_token_ids=order["stop_ids"],
            ignore_eos=True,  # the ids above are all there are
            logprobs=0,
            seed=seed,
            detokenize=bool(strings),
            **strings,
        )
        for seed in seeds.tolist()
    ]
    return prompts, params


def _sampled(output: Any) -> list[float]:
    """Return the sampled tokens' own log-probabilities."""
    return [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)]


def _has_stopped(output: Any, place: int) -> bool:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"request {place} ended with {output.finish_reason!r}; expected stop or length")
    return bool(output.finish_reason == "stop")


def make_handler() -> Engine:
    """See `pipeline/workers/process.py`."""
    return Engine()
