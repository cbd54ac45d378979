"""The decoding loop against transformers' own forward and generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from stages.rollout import hf
from stages.rollout.generator import Output, Prompt, PromptTooLongError, Sampling, sample_seed
from stages.rollout.hf import HFGenerator
from stages.rollout.kv_cache import GROUPED, grouped_attention
from tests.stages.rollout.conftest import VOCABULARY, make_model

LENGTHS = (3, 9, 1, 6, 6)


def _prompts(*, G: int, lengths: Sequence[int] = LENGTHS) -> list[Prompt]:
    draw = np.random.default_rng(0)
    return [
        Prompt(f"q{i}", draw.integers(0, VOCABULARY, n).tolist(), [sample_seed(7, f"q{i}", s) for s in range(G)])
        for i, n in enumerate(lengths)
    ]


def _ids(groups: list[list[Output]]) -> list[list[list[int]]]:
    return [[output.ids.tolist() for output in group] for group in groups]


def _flat(groups: list[list[Output]]) -> list[Output]:
    return [output for group in groups for output in group]


def _assert_same(left: list[list[Output]], right: list[list[Output]]) -> None:
    assert _ids(left) == _ids(right)
    for a, b in zip(_flat(left), _flat(right), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert a.finish_reason == b.finish_reason


def test_greedy_equals_generate_token_for_token(model: PreTrainedModel) -> None:
    prompts = _prompts(G=1)
    width = max(LENGTHS)
    ids = torch.tensor([[0] * (width - len(p.ids)) + list(p.ids) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts])
    expected = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=80, pad_token_id=0, eos_token_id=None
    )[:, width:]
    found = HFGenerator(model, batch_rows=16).generate(prompts, Sampling(0.0, 80, ()))
    assert _ids(found) == [[row.tolist()] for row in expected]


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2"])
def test_grouped_attention_decodes_like_eager_attention(architecture: str) -> None:
    eager, grouped = make_model(architecture), make_model(architecture, attention=GROUPED)
    prompts, sampling = _prompts(G=4), Sampling(1.0, 20, (1,))
    _assert_same(
        HFGenerator(eager, batch_rows=64).generate(prompts, sampling),
        HFGenerator(grouped, batch_rows=64).generate(prompts, sampling),
    )


def test_grouped_attention_refuses_models_with_soft_caps() -> None:
    states = torch.zeros(1, 2, 1, 4)
    with pytest.raises(NotImplementedError, match=r"rollout\.backend\.attention"):
        grouped_attention(torch.nn.Identity(), states, states, states, torch.zeros(1, 1, 1, 1), softcap=50.0)


@pytest.mark.claim("engine log-probabilities of raw logits", "positions that count left padding")
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_equal_a_full_forward_of_the_row_alone(model: PreTrainedModel, temperature: float) -> None:
    prompts = _prompts(G=4)
    groups = HFGenerator(model, batch_rows=64).generate(prompts, Sampling(temperature, 12, (3, 4)))
    for prompt, group in zip(prompts, groups, strict=True):
        for output in group:
            ids = torch.tensor([[*prompt.ids, *output.ids]])
            with torch.no_grad():
                logp = (model(input_ids=ids).logits[0, len(prompt.ids) - 1 : -1] / temperature).log_softmax(-1)
            expected = logp.gather(1, torch.from_numpy(output.ids).long()[:, None])[:, 0]
            np.testing.assert_allclose(output.logprobs, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("spread", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("batch_rows", [1, 8, 13])
def test_outputs_do_not_depend_on_what_shares_their_batch(spread: float, batch_rows: int) -> None:
    """Flat to sharp policies: rows fork at once or hardly ever, and end at all times."""
    model = make_model("qwen2", spread=spread)
    prompts, sampling = _prompts(G=5), Sampling(1.0, 14, (1, 2, 3))
    together = HFGenerator(model, batch_rows=64).generate(prompts, sampling)
    apart = HFGenerator(model, batch_rows=batch_rows)
    seen: list[tuple[int, int]] = []
    _assert_same(together, apart.generate(prompts, sampling, lambda *counted: seen.append(counted)))
    _assert_same(together, apart.generate(prompts[::-1], sampling)[::-1])
    assert seen == sorted(seen)
    assert seen[-1] == (25, sum(len(output.ids) for output in _flat(together)))


@pytest.mark.claim("masks guessed from ids", "the end of sequence outside the loss")
def test_an_output_ends_with_the_first_stop_id_or_at_the_limit(qwen2: PreTrainedModel) -> None:
    stops = (1, 2, 3)
    groups = HFGenerator(qwen2, batch_rows=64).generate(_prompts(G=8), Sampling(1.0, 9, stops))
    outputs = _flat(groups)
    assert {output.finish_reason for output in outputs} == {"stop", "length"}
    assert len({int(o.ids[-1]) for o in outputs if o.finish_reason == "stop"}) > 1, "only one stop id was ever met"
    for output in outputs:
        assert not np.isin(output.ids[:-1], stops).any()
        assert np.isin(output.ids[-1], stops) == (output.finish_reason == "stop")
        assert len(output.ids) == len(output.logprobs)
        assert len(output.ids) == 9 or output.finish_reason == "stop"
    limit = Sampling(1.0, 1, tuple(range(VOCABULARY)))  # a stop id at the limit is a stop
    at_limit = HFGenerator(qwen2, batch_rows=64).generate(_prompts(G=2), limit)
    assert {output.finish_reason for output in _flat(at_limit)} == {"stop"}


@pytest.mark.claim("one seed for a whole group")
def test_different_seeds_give_different_outputs_and_equal_seeds_equal_ones(qwen2: PreTrainedModel) -> None:
    generator, sampling = HFGenerator(qwen2, batch_rows=64), Sampling(1.0, 20, ())
    (group,) = generator.generate([Prompt("q", [1, 2], [5, 6, 5, 7])], sampling)
    assert group[0].ids.tolist() == group[2].ids.tolist()
    assert len({tuple(output.ids) for output in group}) == 3
    (again,) = generator.generate([Prompt("q", [1, 2], [5, 6, 5, 7])], sampling)  # bit for bit
    assert [o.logprobs.tobytes() for o in again] == [o.logprobs.tobytes() for o in group]


def test_a_prefix_is_computed_once_however_many_outputs_share_it(qwen2: PreTrainedModel) -> None:
    rows: list[int] = []
    hook = qwen2.register_forward_pre_hook(lambda _m, _a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
    groups = HFGenerator(qwen2, batch_rows=64).generate(_prompts(G=12), Sampling(0.3, 8, (1,)))
    hook.remove()
    prefixes = [{(q, *o.ids[:t]) for q, g in enumerate(groups) for o in g if len(o.ids) > t} for t in range(8)]
    assert rows == [len(alive) for alive in prefixes]


def _continued() -> list[Prompt]:
    """Outputs of two questions and a lone one, to be continued behind rests of their own, two of which are equal."""
    draw = np.random.default_rng(1)
    questions = [draw.integers(0, VOCABULARY, n).tolist() for n in (9, 4, 6)]
    rests = [draw.integers(0, VOCABULARY, n).tolist() for n in (1, 12, 5, 5, 3, 7, 2)]
    rests[3] = rests[2]
    return [
        Prompt(
            f"q{q}",
            questions[q] + rest,
            [sample_seed(3, f"q{q}", 10 * i + s) for s in range(2)],
            shared=len(questions[q]),
        )
        for i, (q, rest) in enumerate(zip((0, 1, 0, 0, 1, 0, 2), rests, strict=True))
    ]


@pytest.mark.parametrize("attention", ["eager", "sdpa", GROUPED])
@pytest.mark.parametrize("batch_rows", [64, 5])
@pytest.mark.parametrize("prefill", [16_384, 12], ids=["at once", "in parts"])
def test_a_shared_beginning_changes_no_output(
    monkeypatch: pytest.MonkeyPatch, attention: str, batch_rows: int, prefill: int
) -> None:
    monkeypatch.setattr(hf, "_PREFILL_TOKENS", prefill)
    model, prompts, sampling = make_model("qwen2", attention=attention), _continued(), Sampling(1.0, 30, (1, 2))
    alone = [dataclasses.replace(prompt, shared=0) for prompt in prompts]
    expected = HFGenerator(model, batch_rows=64).generate(alone, sampling)
    _assert_same(HFGenerator(model, batch_rows=batch_rows).generate(prompts, sampling), expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_positions_behind_a_shared_beginning_are_the_prompts_own(architecture: str) -> None:
    model, prompts, sampling = make_model(architecture), _continued(), Sampling(1.0, 12, ())
    alone = [dataclasses.replace(prompt, shared=0) for prompt in prompts]
    generator = HFGenerator(model, batch_rows=64)
    _assert_same(generator.generate(prompts, sampling), generator.generate(alone, sampling))


def test_a_beginning_is_computed_once_for_all_that_share_it(qwen2: PreTrainedModel) -> None:
    shapes: list[tuple[int, ...]] = []
    hook = qwen2.register_forward_pre_hook(lambda _m, _a, k: shapes.append(k["input_ids"].shape), with_kwargs=True)
    HFGenerator(qwen2, batch_rows=64).generate(_continued(), Sampling(1.0, 1, ()))
    hook.remove()
    assert shapes == [(3, 9), (7, 12)]


@pytest.mark.claim("log-probabilities in bfloat16")
def test_bfloat16_weights_give_float32_logprobs_near_those_of_float32() -> None:
    exact, rounded = make_model("qwen2", spread=0.1), make_model("qwen2", spread=0.1).to(torch.bfloat16)
    prompts, sampling = _prompts(G=1), Sampling(0.0, 1, ())
    for a, b in zip(
        _flat(HFGenerator(exact, batch_rows=8).generate(prompts, sampling)),
        _flat(HFGenerator(rounded, batch_rows=8).generate(prompts, sampling)),
        strict=True,
    ):
        assert b.logprobs.dtype == np.float32
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=0.05)


def test_a_prompt_longer_than_the_window_is_refused_by_name(qwen2: PreTrainedModel) -> None:
    fits, too_long = Prompt("fits", [1] * 108, [0]), Prompt("too-long", [1] * 109, [0])
    generator, sampling = HFGenerator(qwen2, batch_rows=8), Sampling(0.0, 20, ())
    assert len(generator.generate([fits], sampling)[0][0].ids) == 20
    with pytest.raises(PromptTooLongError, match=r"'too-long'.* 108 .* 128 .* 20.* 109"):
        generator.generate([fits, too_long], sampling)
    with pytest.raises(ValueError, match="'void'"):
        generator.generate([Prompt("void", [], [0])], sampling)


def test_sliding_attention_is_refused_beyond_its_window_only() -> None:
    """Up to the window sliding attention is full attention, which the loop computes; beyond it, it would not be."""
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.num_key_value_heads, config.sliding_window, config.max_position_embeddings = 1, 16, 64
    model = MistralForCausalLM(config).eval()
    generator, prompt = HFGenerator(model, batch_rows=8), Prompt("q", [3, 4, 5, 6], [0])
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=None)[0, 4:]
    assert _ids(generator.generate([prompt], Sampling(0.0, 12, ()))) == [[expected.tolist()]]
    with pytest.raises(PromptTooLongError, match=r" 3 .*sliding window of 16 .* 13\), .* 4"):
        generator.generate([prompt], Sampling(0.0, 13, ()))
    config.layer_types = ["linear_attention"]
    with pytest.raises(ValueError, match="linear_attention in Mistral"):
        HFGenerator(MistralForCausalLM(config), batch_rows=8)
