"""Decode with a transformers model: prefill once a question, share prefixes, drop finished rows, write keys in place.

The loop is ours, the model is transformers' (any causal LM with full attention and a standard cache; sliding attention up to
its window). A step runs the model over the distinct prefixes alive (`kv_cache.py`), samples every output from its row's
distribution, and regroups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import PreTrainedModel

from pipeline.orchestration.interruption import check
from stages.rollout.generator import FinishReason, Output, Progress, Prompt, Sampling, check_window
from stages.rollout.kv_cache import RowCache, regroup

_PREFILL_TOKENS = 16_384
"""Prompt tokens of one prefill forward, padding included: bounds its activations."""
_PART = 2**20
"""Logits sampled from at a time on a CPU: 4 MiB stay in its cache, and no copy of all of them is allocated at every token."""
_BLOCK = 64
"""Tokens whose probabilities are added before any are cumulated: cumulating is sequential, adding is not."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class HFGenerator:
    """Implement `Generator` over a transformers model, which stays the caller's: its weights may change between calls."""

    def __init__(self, model: PreTrainedModel, *, batch_rows: int) -> None:
        _refuse_unusual_attention(model)
        self.model = model
        self.batch_rows = batch_rows

    @property
    def window(self) -> int | None:
        """Return the model's window. Up to its own, sliding attention is full attention; beyond it, it is refused."""
        positions: int | None = getattr(self.model.config, "max_position_embeddings", None)
        limits = [limit for limit in (positions, self._sliding) if limit is not None]
        return min(limits, default=None)

    @property
    def _sliding(self) -> int | None:
        slides = "sliding_attention" in _layer_kinds(self.model)
        window: int | None = getattr(self.model.config, "sliding_window", None) if slides else None
        return window

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[list[Output]]:
        """Decode prompts in batches of like length, the longest first, as `Generator.generate`."""
        for prompt in prompts:
            called = "sliding window" if self.window == self._sliding is not None else "window"
            check_window(self.window, prompt, sampling, called=called)
        outputs: list[list[Output | None]] = [[None] * len(prompt.seeds) for prompt in prompts]
        done = tokens = 0
        with torch.inference_mode():
            for members in _batches(prompts, self.batch_rows):
                batch = _Batch(self.model, prompts, members, sampling)
                for ended, sampled in batch.decode():
                    if progress is not None:
                        progress(done + ended, tokens + sampled)
                for question, index, output in batch.outputs():
                    outputs[question][index] = output
                done += len(batch.samples)
                tokens += int(batch.lengths.sum())
        return [[output for output in group if output is not None] for group in outputs]


@dataclass(frozen=True)
class _Member:
    """Name part of a batch: outputs `start .. stop` of one question (all of them, unless a group exceeds the batch)."""

    question: int
    start: int
    stop: int


def _batches(prompts: Sequence[Prompt], rows: int) -> Iterator[list[_Member]]:
    """Yield members, at most `rows` outputs a batch: prompts that share their beginning together, the longest ones first."""
    batch: list[_Member] = []
    room = rows
    for question in sorted(range(len(prompts)), key=lambda i: _order(prompts[i])):
        start, count = 0, len(prompts[question].seeds)
        while start < count:
            # A group is split only where it must be: each part pays its own prefill.
            if room < min(count - start, rows):
                yield batch
                batch, room = [], rows
            stop = min(count, start + room)
            batch.append(_Member(question, start, stop))
            room -= stop - start
            start = stop
    if batch:
        yield batch


def _order(prompt: Prompt) -> tuple[int, tuple[int, ...], int]:
    beginning = tuple(prompt.ids[: prompt.shared])
    return -(len(beginning) or len(prompt.ids)), beginning, -len(prompt.ids)


class _Batch:
    """Decode one batch: n samples over at most n rows. Bookkeeping is numpy, the model's part torch."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Prompt], members: Sequence[_Member], sampling: Sampling
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.prompts = [prompts[member.question] for member in members]
        self.samples = [(m.question, i) for m in members for i in range(m.start, m.stop)]
        self.seeds = np.array([prompts[q].seeds[i] for q, i in self.samples], dtype=np.uint64)
        self.first_row = np.repeat(np.arange(len(members)), [m.stop - m.start for m in members])
        self.beginnings, self.beginning_of, self.rests = _split(self.prompts)
        self.width = max(map(len, self.beginnings)) + max(map(len, self.rests), default=0)
        self.padding = np.zeros(len(self.samples), dtype=np.int64)
        self.padding[: len(members)] = [self.width - len(prompt.ids) for prompt in self.prompts]
        columns = self.width + sampling.max_output_tokens
        self.cache = RowCache(model.config.num_hidden_layers, rows=len(self.samples), columns=columns)
        # 0 or the most negative number, added to attention scores: given in full, transformers builds none of its own.
        self.mask = torch.full((len(self.samples), 1, 1, columns), torch.finfo(model.dtype).min, dtype=model.dtype)
        self.mask = self.mask.to(model.device)
        self.ids = np.zeros((len(self.samples), sampling.max_output_tokens), dtype=np.int32)
        self.logprobs = np.zeros((len(self.samples), sampling.max_output_tokens), dtype=np.float32)
        self.lengths = np.zeros(len(self.samples), dtype=np.int64)
        self.stopped = np.zeros(len(self.samples), dtype=bool)

    def decode(self) -> Iterator[tuple[int, int]]:
        """Run to the end; after every token yield (outputs ended, tokens so far)."""
        live, row = np.arange(len(self.samples)), self.first_row
        logits = self._prefill()
        for step in range(self.sampling.max_output_tokens):
            check()
            token, logprob = sample(logits, row, uniforms(self.seeds[live], step), self.sampling.temperature)
            self.ids[live, step], self.logprobs[live, step] = token, logprob
            self.lengths[live] += 1
            ends = np.isin(token, self.sampling.stop_ids) | self._completes_string(live, token, step)
            self.stopped[live[ends]] = True
            ends |= step + 1 == self.sampling.max_output_tokens
            live, row, token = live[~ends], row[~ends], token[~ends]
            yield len(self.samples) - len(live), int(self.lengths.sum())
            if len(live) == 0:
                return
            row, row_token = self._regroup(row, token, filled=self.width + step)
            order = np.argsort(row, kind="stable")
            live, row = live[order], row[order]
            logits = self._forward(row_token, column=self.width + step)

    def _completes_string(self, live: NDArray[np.int64], token: NDArray[np.int64], step: int) -> NDArray[np.bool_]:
        """Return whether the token that each live sample drew at `step` completes a stop string."""
        found, strings = np.zeros(len(live), dtype=bool), self.sampling.stop_strings
        if strings is None:
            return found
        for place in np.flatnonzero(strings.may_complete(token)):
            i = live[place]
            begun = np.array(self.prompts[self.first_row[i]].beginning, dtype=np.int32)
            found[place] = strings.completes(np.concatenate([begun, self.ids[i, : step + 1]]))
        return found

    def outputs(self) -> Iterator[tuple[int, int, Output]]:
        """Yield (question, index of the sample, output) of every sample, once decoded."""
        for i, (question, index) in enumerate(self.samples):
            length = self.lengths[i]
            reason: FinishReason = "stop" if self.stopped[i] else "length"
            yield question, index, Output(self.ids[i, :length].copy(), self.logprobs[i, :length].copy(), reason)

    def _prefill(self) -> torch.Tensor:
        """Return logits `[prompts, V]` after each prompt: after the beginnings that several share, and then the rests."""
        logits = self._read(self.beginnings, np.zeros(len(self.beginnings), dtype=np.int64), column=0)
        if not self.rests:
            return logits
        filled, rows = max(map(len, self.beginnings)), torch.from_numpy(self.beginning_of).to(self.model.device)
        self.cache.spread(rows, filled, self.width)
        self.mask[: len(rows)] = self.mask[rows]
        return self._read(self.rests, np.array([len(self.beginnings[row]) for row in self.beginning_of]), column=filled)

    def _read(self, texts: Sequence[Sequence[int]], first: NDArray[np.int64], *, column: int) -> torch.Tensor:
        """Return logits `[rows, V]` after one text a row, written from this column on, padded on the left.

        `first` `[rows]`: position of each text's first token.
        """
        lowest, device, width = torch.finfo(self.model.dtype).min, self.model.device, max(map(len, texts))
        ids = np.zeros((len(texts), width), dtype=np.int64)
        for row, text in enumerate(texts):
            ids[row, width - len(text) :] = text
        place = np.arange(width) - np.array([[width - len(text)] for text in texts])
        end, position = column + width, np.maximum(place, 0) + first[:, None]
        self.mask[: len(texts), 0, 0, column:end].masked_fill_(torch.from_numpy(place >= 0).to(device), 0.0)
        logits = []
        size = max(1, _PREFILL_TOKENS // width)
        for start in range(0, len(texts), size):
            part = slice(start, start + size)
            read = self.cache.place(row=start, columns=slice(column, end))
            causal = torch.full((width, read), lowest, dtype=self.model.dtype, device=device).triu(column + 1)
            mask = torch.minimum(causal, self.mask[: len(texts)][part, ..., :read])
            logits.append(self._run(ids[part], position[part], mask))
        return torch.cat(logits)

    def _forward(self, row_token: NDArray[np.int64], *, column: int) -> torch.Tensor:
        """Return logits `[rows, V]` after one more token in every row."""
        rows = len(row_token)
        read = self.cache.place(row=0, columns=slice(column, column + 1))
        self.mask[..., column] = 0.0
        position = column - self.padding[:rows, None]
        return self._run(row_token[:, None], position, self.mask[:rows, ..., :read])

    def _run(self, ids: NDArray[np.int64], position: NDArray[np.int64], mask: torch.Tensor) -> torch.Tensor:
        device = self.model.device
        output = self.model(
            input_ids=torch.from_numpy(ids).to(device),
            position_ids=torch.from_numpy(position).to(device),
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _regroup(
        self, row: NDArray[np.int64], token: NDArray[np.int64], *, filled: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the new row of each live sample and the token each row reads; fork and move rows in the cache to match."""
        groups = regroup(row, token)
        if len(groups.source):
            source = torch.from_numpy(groups.source).to(self.model.device)
            target = torch.from_numpy(groups.target).to(self.model.device)
            self.cache.copy_rows(source, target, filled)
            self.mask[target] = self.mask[source]
            self.padding[groups.target] = self.padding[groups.source]
        return groups.sample_row, groups.row_token


def _split(
    prompts: Sequence[Prompt],
) -> tuple[list[tuple[int, ...]], NDArray[np.int64], list[Sequence[int]]]:
    """Return the beginnings that prompts share, which of them each prompt has, and the rests; no rests where none is shared."""
    beginnings = [tuple(prompt.ids[: prompt.shared]) for prompt in prompts]
    distinct = {beginning: row for row, beginning in enumerate(dict.fromkeys(beginnings))}
    if len(distinct) == len(prompts) or not all(0 < prompt.shared < len(prompt.ids) for prompt in prompts):
        return [tuple(prompt.ids) for prompt in prompts], np.arange(len(prompts)), []
    rests = [prompt.ids[prompt.shared :] for prompt in prompts]
    return list(distinct), np.array([distinct[beginning] for beginning in beginnings]), rests


def _refuse_unusual_attention(model: PreTrainedModel) -> None:
    """Refuse recurrent and chunked layers, which need masks and caches that this loop does not keep."""
    unusual = _layer_kinds(model) - {"full_attention", "sliding_attention"}
    if unusual:
        raise ValueError(
            f"the hf backend expects full attention in every layer, or sliding attention within its window, found"
            f" {', '.join(sorted(unusual))} in {type(model).__name__}; take another model or another rollout backend"
        )


def _layer_kinds(model: PreTrainedModel) -> set[str]:
    named = getattr(model.config, "layer_types", None)
    if named:
        return set(named)
    return {"full_attention" if getattr(model.config, "sliding_window", None) is None else "sliding_attention"}


def uniforms(seeds: NDArray[np.uint64], step: int) -> NDArray[np.float64]:
    """Return u_i in [0, 1): output number `step` of the SplitMix64 stream with seed `seeds[i]`.

    SplitMix64 (Steele, Lea and Flood 2014) is counter-based: state = seed + (step + 1) * golden ratio, then a finaliser. Kept
    to 40 bits, so that u times a sum near 1 stays below that sum.
    """
    with np.errstate(over="ignore"):
        z = seeds + np.uint64(step + 1) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(24)).astype(np.float64) * 2.0**-40


def sample(
    logits: torch.Tensor, row: NDArray[np.int64], uniform: NDArray[np.float64], temperature: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Draw one token for each sample from its row's distribution, with its log-probability there (`Output.logprobs`).

    logits `[rows, V]`; `row` and `uniform` `[n]`, u below 1 - 2**-40. On a CPU a part of the rows is taken at a time, which
    changes no bit.

    Raises:
        FloatingPointError: logits that are no distribution (NaN, +inf, or nothing but -inf).
    """
    rows, vocabulary = logits.shape
    size = max(1, _PART // vocabulary) if logits.device.type == "cpu" else rows
    if rows <= size:
        return _draw(logits, row, uniform, temperature)
    token, logprob = np.empty(len(row), dtype=np.int64), np.empty(len(row), dtype=np.float32)
    by_row = np.argsort(row)
    starts = range(0, rows, size)
    for start, mine in zip(starts, np.split(by_row, np.searchsorted(row[by_row], starts[1:])), strict=True):
        part = _draw(logits[start : start + size], row[mine] - start, uniform[mine], temperature)
        token[mine], logprob[mine] = part
    return token, logprob


def _draw(
    logits: torch.Tensor, row: NDArray[np.int64], uniform: NDArray[np.float64], temperature: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Do what `sample` says, for all rows at once."""
    logits = logits.float()  # before temperature and softmax: in bf16 a log-probability near -8 has a step of 1/32
    if temperature not in (0, 1):
        logits = logits / temperature
    logp = torch.log_softmax(logits, dim=-1)
    if logp[:, 0].isnan().any():  # one token tells of its row: logits that are no distribution make all of it NaN
        raise FloatingPointError("the policy's logits are not finite: its weights are damaged or have diverged")
    index = torch.from_numpy(row).to(logits.device)
    if temperature == 0:
        token = logp.argmax(dim=-1)[index]
    else:
        token = _invert(logp.exp(), index, torch.from_numpy(uniform).to(logits.device))
    return token.cpu().numpy(), logp[index, token].cpu().numpy()


def _invert(probability: torch.Tensor, index: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return the first token whose cumulated probability exceeds u times the total: its own is positive.

    First the block of tokens is found, then the token in it. Sums are float64: float32 would lose rare tokens.
    """
    rows, vocabulary = probability.shape
    if vocabulary % _BLOCK:
        probability = F.pad(probability, (0, -vocabulary % _BLOCK))
    blocks = probability.view(rows, -1, _BLOCK)
    until = F.pad(blocks.sum(dim=-1).double().cumsum(dim=-1), (1, 0))[index]
    target = uniform[:, None] * until[:, -1:]
    block = torch.searchsorted(until[:, 1:].contiguous(), target, right=True)
    inside = blocks[index, block[:, 0]].double().cumsum(dim=-1)
    # The block's sum was rounded in another order than `inside`: stay below its end, where no token is left.
    rest = torch.minimum(target - until.gather(1, block), inside[:, -1:] * (1 - 2**-40))
    return (block * _BLOCK + torch.searchsorted(inside, rest, right=True))[:, 0]
