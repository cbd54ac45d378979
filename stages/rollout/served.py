"""Sample outputs by a `vllm serve` that runs already, through its OpenAI-compatible `/v1/completions`: ids in, ids out.

A server's weights cannot be changed from here, so that it serves one fixed policy. Before every call its log-probabilities of a
probe are compared with transformers' on the checkpoint (`probe.py`), at the temperature of the call: a server that has other
weights, or that reports log-probabilities from before temperature, is refused.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pipeline.store.context import record_package
from stages.models import Checkpoint
from stages.rollout.config import VLLMServerConfig
from stages.rollout.generator import Output, Progress, Prompt, Sampling, check_window, cut_at_string
from stages.rollout.probe import SAMPLED, Answer, StaleWeightsError, check_answer, probe_ids, vocabulary_and_window

if TYPE_CHECKING:
    import torch

_KEY: Final = "VLLM_API_KEY"
"""Variable with the key that the server asks for, if it does; the name that vLLM itself reads."""
_OVERLOADED: Final = (429, 502, 503, 504)
_PATIENCE: Final = 30.0
"""Seconds for a question about the server itself."""


class ServerError(RuntimeError):
    """A server that cannot be reached, or that does not do what it is asked."""


class ServedGenerator:
    """Implement `Generator` over a running server that has the weights of `policy`."""

    def __init__(self, policy: Checkpoint, backend: VLLMServerConfig) -> None:
        """Find out what the server serves.

        Raises:
            ServerError: it cannot be reached, or serves no model or several.
        """
        self.policy = policy
        self.backend = backend
        self.vocabulary, window = vocabulary_and_window(policy)
        models = self._ask("/v1/models", None, _PATIENCE).get("data", [])
        if len(models) != 1:
            named = ", ".join(str(model.get("id")) for model in models) or "none"
            raise ServerError(
                f"{backend.url}: expected a server of one model, found {named}; start `vllm serve` with one"
            )
        self.model = str(models[0]["id"])
        limits = [window, models[0].get("max_model_len")]
        self.window: int | None = min((limit for limit in limits if limit is not None), default=None)
        version = self._ask("/version", None, _PATIENCE).get("version", "unknown")
        record_package("vllm", f"{version} ({backend.dtype}, server)")

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[list[Output]]:
        """Send one request per output, as `Generator.generate`.

        Raises:
            ServerError: the server cannot be reached, failed, or did not keep to the sampling it was asked for.
            StaleWeightsError: it serves other weights than the policy's.
        """
        for prompt in prompts:
            check_window(self.window, prompt, sampling)
        end = time.monotonic() + self.backend.deadline
        self._prove(sampling.temperature, end)
        wanted = [(place, prompt, seed) for place, prompt in enumerate(prompts) for seed in prompt.seeds]
        outputs: list[Output | None] = [None] * len(wanted)
        tokens = 0
        with ThreadPoolExecutor(self.backend.concurrency) as pool:
            try:
                asked = {
                    pool.submit(self._sample, prompt, seed, sampling, end): number
                    for number, (_, prompt, seed) in enumerate(wanted)
                }
                for done, answer in enumerate(as_completed(asked), start=1):
                    output = outputs[asked[answer]] = answer.result()
                    tokens += len(output.ids)
                    if progress is not None:
                        progress(done, tokens)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        groups: list[list[Output]] = [[] for _ in prompts]
        for (place, _, _), output_or_none in zip(wanted, outputs, strict=True):
            assert output_or_none is not None
            groups[place].append(output_or_none)
        return groups

    def _sample(self, prompt: Prompt, seed: int, sampling: Sampling, end: float) -> Output:
        strings = sampling.stop_strings.of_any_prompt if sampling.stop_strings else []
        choice = self._complete(
            prompt.ids,
            end,
            max_tokens=sampling.max_output_tokens,
            temperature=sampling.temperature,
            stop_token_ids=list(sampling.stop_ids),
            seed=seed,
            **({"stop": strings, "include_stop_str_in_output": True} if strings else {}),
        )
        ids, reason = choice["token_ids"], choice["finish_reason"]
        stopped = bool(ids) and ids[-1] in sampling.stop_ids
        # As they were answered: a cast would make numbers of null, text and True before they are looked at.
        answered = Output(
            np.array(ids, dtype=object), np.array(_logprobs(choice), dtype=object), "stop" if stopped else "length"
        )
        output = cut_at_string(answered, sampling, prompt)
        complete = output.finish_reason == "stop" or len(ids) == sampling.max_output_tokens
        if reason not in ("stop", "length") or not complete:
            raise ServerError(
                f"{self.backend.url}: question {prompt.question_id!r}: output of {len(ids)} tokens ended with {reason!r} "
                f"before its end ({sampling.max_output_tokens} tokens, or one of {(*sampling.stop_ids, *strings)}); start the "
                "server with `--generation-config vllm`, so that the model's own stop tokens are not added"
            )
        return output

    def _prove(self, temperature: float, end: float) -> None:
        prompt = probe_ids(self.vocabulary, self.window)
        choice = self._complete(
            prompt, end, max_tokens=SAMPLED, temperature=temperature, stop_token_ids=[], seed=0, prompt_logprobs=0
        )
        try:
            prompt_logprobs = [
                float(at[str(token)]["logprob"])
                for token, at in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(
                f"{self.backend.url}: expected a log-probability of each of the probe's tokens in prompt_logprobs: {error}"
            ) from None
        try:
            check_answer(
                [Answer(prompt_logprobs, choice["token_ids"], _logprobs(choice))],
                self.policy,
                prompt,
                dtype=_dtype(self.backend),
                temperature=temperature,
                tolerance=self.backend.probe_tolerance,
                engine=f"the server {self.backend.url} ({self.model})",
            )
        except StaleWeightsError as error:
            raise StaleWeightsError(
                f"{error}. A server keeps the weights it was started with: use it for outputs of that one policy, with "
                "`--logprobs-mode processed_logprobs`, and rollout.backend.kind=vllm or hf where the policy changes"
            ) from None

    def _complete(self, ids: Sequence[int], end: float, **sampling: Any) -> dict[str, Any]:
        """Ask for one completion; every filter is set, since the defaults come from the model's generation_config.json."""
        asked = {
            "model": self.model,
            "prompt": list(ids),
            "logprobs": 0,
            "return_token_ids": True,
            "ignore_eos": True,  # the stop ids are all there are
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "add_special_tokens": False,
            **sampling,
        }
        answer = self._ask("/v1/completions", asked, end - time.monotonic())
        try:
            [choice] = answer["choices"]
            found: dict[str, Any] = choice
            if len(found["token_ids"]) != len(_logprobs(found)):
                raise KeyError("as many logprobs as token_ids")
        except (KeyError, ValueError, TypeError) as error:
            raise ServerError(
                f"{self.backend.url}: its answer lacks {error}; expected vLLM 0.32's `/v1/completions` with return_token_ids"
            ) from None
        return found

    def _ask(self, path: str, body: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
        """Return what the server answers, asked again while it is out of reach or overloaded."""
        end = time.monotonic() + seconds
        headers = {"Content-Type": "application/json"}
        if os.environ.get(_KEY):
            headers["Authorization"] = f"Bearer {os.environ[_KEY]}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.backend.url.rstrip("/") + path, data, headers)
        for attempt in range(self.backend.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=max(0.1, end - time.monotonic())) as answer:
                    found: dict[str, Any] = json.loads(answer.read())
                    return found
            except urllib.error.HTTPError as error:
                text = " ".join(error.read().decode(errors="replace").split())
                said = f"HTTP {error.code}: {text[:500]}"
                if error.code not in _OVERLOADED:
                    raise ServerError(f"{self.backend.url}{path}: {said}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                said = f"{type(error).__name__}: {error}"
            pause = 2.0**attempt
            if attempt == self.backend.retries or time.monotonic() + pause > end:
                break
            time.sleep(pause)
        raise ServerError(
            f"{self.backend.url}{path}: no answer, attempts: {attempt + 1} ({said}); is `vllm serve` running there? "
            "rollout.backend.url, retries and deadline say where and how long to ask"
        )


def _logprobs(choice: Mapping[str, Any]) -> list[float]:
    found: list[float] = choice["logprobs"]["token_logprobs"]
    return found


def _dtype(backend: VLLMServerConfig) -> torch.dtype:
    from stages.training.hardware import inference_dtype

    return inference_dtype(backend.dtype)
