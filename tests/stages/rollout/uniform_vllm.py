"""A `vllm` package that draws every token with the same probability: what the real one is to our worker, without a model.

It ends requests in the reverse order, keeps what it was asked in `asked.jsonl`, and does what some seeds say: 13 ends its
process, 14 hangs, 15 answers with NaN, 16 with ids beyond the vocabulary. Its token number t is (seed + t) mod V.
"""

from __future__ import annotations

import sys
from pathlib import Path

VLLM = """
import json, math, os, pathlib, time
from types import SimpleNamespace as Some

__version__ = "0.32.0"
ASKED = pathlib.Path(__file__).with_name("asked.jsonl")


class SamplingParams:
    def __init__(self, **values):
        self.__dict__.update({"stop_token_ids": [], "prompt_logprobs": None} | values)


class LLM:
    def __init__(self, *, model, worker_extension_cls, **values):
        self.note({"engine": values, "files": sorted(os.listdir(model)), "extension": worker_extension_cls})
        self.V = json.loads(pathlib.Path(model, "config.json").read_text())["vocab_size"]
        self.count, self.waiting, self.llm_engine = 0, [], self

    def note(self, what):
        with ASKED.open("a") as file:
            file.write(json.dumps(what) + "\\n")

    def collective_rpc(self, method, kwargs=None):
        self.note({"rpc": method})

    def reset_prefix_cache(self):
        return True

    def sleep(self, level):
        self.note({"sleep": level})

    def wake_up(self, tags):
        self.note({"wake": tags})

    def enqueue(self, prompts, params, use_tqdm):
        names = []
        for prompt, wanted in zip(prompts, params):
            self.note({"prompt": prompt["prompt_token_ids"], **vars(wanted)})
            self.waiting.append((str(self.count), prompt["prompt_token_ids"], wanted))
            names.append(f"{self.count}-a1b2c3d4")
            self.count += 1
        return names

    def generate(self, prompts, params, use_tqdm):
        self.enqueue(prompts, [params], use_tqdm)
        return self.step()

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        name, prompt, wanted = self.waiting.pop()
        if wanted.seed == 13:
            print("out of luck", flush=True)
            os._exit(3)
        if wanted.seed == 14:
            time.sleep(600)
        ids, stopped = [], False
        while len(ids) < wanted.max_tokens and not stopped:
            ids.append((wanted.seed + len(ids)) % self.V)
            stopped = ids[-1] in wanted.stop_token_ids
        if wanted.seed == 16:
            ids = [self.V] * len(ids)
        logprob = math.nan if wanted.seed == 15 else -math.log(self.V)
        rated = lambda tokens: [{token: Some(logprob=logprob)} for token in tokens]
        output = Some(token_ids=ids, logprobs=rated(ids), finish_reason="stop" if stopped else "length")
        first = None if wanted.prompt_logprobs is None else [None, *rated(prompt[1:])]
        return [Some(request_id=name, finished=True, outputs=[output], prompt_logprobs=first)]
"""
PLATFORM = "UNIFORM_PLATFORM"
"""Variable with the device that the engine says it runs on, and what it can do there: `cuda sleep allocator`; else `cpu`."""
PLATFORMS = f"""
import os

DEVICE, *ABLE = os.environ.get("{PLATFORM}", "cpu").split()


class current_platform:
    device_type = DEVICE
    is_cpu = staticmethod(lambda: DEVICE == "cpu")
    is_cuda_alike = staticmethod(lambda: DEVICE == "cuda")
    is_sleep_mode_available = staticmethod(lambda: "sleep" in ABLE)
    is_cumem_allocator_available = staticmethod(lambda: "allocator" in ABLE)
"""


def make_environment(folder: Path) -> Path:
    """An interpreter that finds this vLLM, and no torch to wait for."""
    package = folder / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(VLLM)
    (package / "platforms.py").write_text(PLATFORMS)
    (folder / "torch.py").write_text('__version__ = "2.13.0"\n')
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python
