"""Scoring by reward models: which score belongs to which row, on which scale, and what is refused."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.residency import evict, kept
from pipeline.store import Store
from stages.join import JoinError
from stages.models import WEIGHTS, Checkpoint, RewardKind, copy_description, load_model, save, write_tensors
from stages.reward_model import ScoringConfig, score_outputs
from stages.tables import Rollouts
from stages.training.hardware import training_device
from tests.stages.reward_training.worlds import base_with_pad_as_eos, label_rows, outputs_of, outspoken, rules_of
from tests.stages.training.tiny import VOCABULARY, tiny_checkpoint, tiny_model, tiny_tokenizer


def fp32(**changes: Any) -> ScoringConfig:
    return ScoringConfig(**({"precision": "fp32", "threads": 1} | changes))


@functools.lru_cache(maxsize=2)
def loaded(model: Checkpoint) -> Any:
    return load_model(model, dtype=torch.float32)


def by_definition(model: Checkpoint, row: dict[str, Any]) -> list[float]:
    """The head at every output token of one row, without batch or padding."""
    ids = torch.tensor([row["prompt_ids"] + row["output_ids"]])
    with torch.no_grad():
        logits = loaded(model).score(loaded(model).base_model(input_ids=ids).last_hidden_state)[0, :, 0]
    scores: list[float] = logits[len(row["prompt_ids"]) :].tolist()
    return scores


@pytest.mark.claim("a score read at the wrong last token")
@pytest.mark.parametrize("micro_batch_tokens", [20, 16384])
@pytest.mark.parametrize("make_base", [tiny_checkpoint, base_with_pad_as_eos])
def test_an_output_is_scored_at_its_last_token(store: Store, make_base: Any, micro_batch_tokens: int) -> None:
    base = make_base()
    rows, model = label_rows(base), outspoken("outcome", base)
    config = fp32(micro_batch_tokens=micro_batch_tokens)
    scored = score_outputs(outputs_of(rows), base, [model], config, rules_of(rows)).rows()
    for row, found in zip(rows, scored, strict=True):
        assert (found["question_id"], found["sample"]) == (row["question_id"], row["sample"])
        assert found["reward"] == pytest.approx(by_definition(model, row)[-1], abs=1e-5)
    assert len({round(row["reward"], 4) for row in scored}) > 10


def test_the_rules_give_status_and_answer_and_stay_in_the_table(store: Store) -> None:
    base = tiny_checkpoint()
    rows, model = label_rows(base), outspoken("outcome", base)
    made = score_outputs(outputs_of(rows), base, [model], fp32(), rules_of(rows))
    for row, found in zip(rows, made.rows(), strict=True):
        assert found["status"] == ("ok" if row["label"] else "wrong")
        assert found["extracted"] == str(row["sample"])
        assert dict(found["components"]) == {"model": found["reward"], "rule": row["label"]}
        assert found["scorer"] == model.digest
        assert found["step_ends"] is found["step_rewards"] is None
    rewards = [row["reward"] for row in made.rows()]
    assert made.metrics["reward/mean"] == made.metrics["reward/model"] == pytest.approx(sum(rewards) / 16)
    assert made.metrics["reward/rule"] == made.metrics["reward/status_ok"] == 10 / 16


def test_without_rules_nothing_is_said_to_be_right_or_wrong(store: Store) -> None:
    base = tiny_checkpoint()
    found = score_outputs(outputs_of(label_rows(base)), base, [outspoken("outcome", base)], fp32()).rows()
    assert {row["status"] for row in found} == {"unjudged"}
    assert {dict(row["components"])["rule"] for row in found} == {None}


@pytest.mark.claim("a score read at the wrong last token")
def test_a_process_model_scores_each_step_at_its_last_token(store: Store) -> None:
    base = tiny_checkpoint()
    rows, model = label_rows(base), outspoken("process", base)
    for name, of_steps in {"min": min, "mean": lambda steps: sum(steps) / len(steps), "last": lambda s: s[-1]}.items():
        config = fp32(process_score=name)
        for row, found in zip(rows, score_outputs(outputs_of(rows), base, [model], config).rows(), strict=True):
            scores = by_definition(model, row)
            assert found["step_ends"] == row["step_ends"]
            assert found["step_rewards"] == pytest.approx([scores[end] for end in row["step_ends"]], abs=1e-5)
            assert found["reward"] == pytest.approx(of_steps(found["step_rewards"]))


def test_both_models_score_the_same_rollouts_together(store: Store) -> None:
    base = tiny_checkpoint()
    rows = label_rows(base)
    outcome, process = outspoken("outcome", base), outspoken("process", base)
    single = [score_outputs(outputs_of(rows), base, [model], fp32()).rows() for model in (outcome, process)]
    together = score_outputs(outputs_of(rows), base, [process, outcome], fp32(), rules_of(rows)).rows()
    for first, second, both in zip(*single, together, strict=True):
        assert both["reward"] == pytest.approx(first["reward"], abs=1e-6)
        assert both["step_rewards"] == pytest.approx(second["step_rewards"], abs=1e-6)
        assert dict(both["components"])["process"] == pytest.approx(second["reward"], abs=1e-6)
        assert both["scorer"] == f"{outcome.digest}+{process.digest}"


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_bf16_scores_are_those_of_float32_weights_bit_for_bit(
    store: Store, monkeypatch: pytest.MonkeyPatch, kind: RewardKind
) -> None:
    base = tiny_checkpoint()
    rows, model = label_rows(base), outspoken(kind, base)
    config, slot = (
        ScoringConfig(precision="bf16", threads=1),
        {"outcome": "reward_model"}.get(kind, f"{kind}_reward_model"),
    )
    found = score_outputs(outputs_of(rows), base, [model], config)
    weights = kept(slot, (model.state, True, training_device(), config.attention_kind, config.share_prompts))
    assert {name.split(".")[-2] for name, weight in weights.named_parameters() if weight.dtype == torch.bfloat16} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    evict()
    monkeypatch.setattr("stages.training.loop.halve_linear_weights", lambda *_, **__: None)
    whole = score_outputs(outputs_of(rows), base, [model], config.override({"micro_batch_tokens": 16000}))
    assert found.rows() == whole.rows()
    assert found.rows() != score_outputs(outputs_of(rows), base, [model], fp32()).rows()


def test_sigmoid_squeezes_every_score_into_a_probability(store: Store) -> None:
    base = tiny_checkpoint()
    rows, models = label_rows(base), [outspoken("outcome", base), outspoken("process", base)]
    logits = score_outputs(outputs_of(rows), base, models, fp32()).rows()
    squeezed = score_outputs(outputs_of(rows), base, models, fp32(scale="sigmoid")).rows()
    for raw, row in zip(logits, squeezed, strict=True):
        assert row["reward"] == pytest.approx(1 / (1 + math.exp(-raw["reward"])))
        assert row["step_rewards"] == pytest.approx([1 / (1 + math.exp(-score)) for score in raw["step_rewards"]])


def with_head(model: Checkpoint, change: Any) -> Checkpoint:
    """The same model with a head that `change` has changed in place."""
    weights = load_file(model.path / WEIGHTS)
    change(weights["score.weight"])

    def fill(folder: Path) -> None:
        copy_description(model.path, folder)
        write_tensors(folder / WEIGHTS, weights)

    return Checkpoint.write(fill)


def test_scores_far_from_zero_do_not_overflow(store: Store) -> None:
    base = tiny_checkpoint()
    loud = with_head(outspoken("outcome", base), lambda head: head.mul_(1e4))
    outputs = outputs_of(label_rows(base))
    logits = [row["reward"] for row in score_outputs(outputs, base, [loud], fp32()).rows()]
    assert max(map(abs, logits)) > 1e4  # exp would overflow
    squeezed = [row["reward"] for row in score_outputs(outputs, base, [loud], fp32(scale="sigmoid")).rows()]
    assert squeezed == [float(logit > 0) for logit in logits]


@pytest.mark.slow
def test_a_warm_model_and_a_cold_one_score_alike(store: Store) -> None:
    base = tiny_checkpoint()
    outputs, first, second = outputs_of(label_rows(base)), outspoken("outcome", base), outspoken("process", base)
    made = []
    for cold in (False, True):
        for model in (first, second, first):
            if cold:
                evict()
            made.append(score_outputs(outputs, base, [model], fp32(micro_batch_tokens=16384 + cold)).digest)
    assert made[:3] == made[3:]


def test_equal_outputs_score_equally_and_cost_one_forward(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.training import batching

    batched: list[int] = []
    real = batching.micro_batches

    def counting(rows: Any, max_tokens: int, **how: Any) -> Any:
        batched.append(len(rows))
        return real(rows, max_tokens, **how)

    monkeypatch.setattr(batching, "micro_batches", counting)
    base = tiny_checkpoint()
    rows = label_rows(base)
    rows += [{**row, "sample": row["sample"] + 10} for row in rows]
    found = score_outputs(outputs_of(rows), base, [outspoken("outcome", base)], fp32()).rows()
    assert batched == [16]
    assert [row["reward"] for row in found[:16]] == [row["reward"] for row in found[16:]]


def with_vocabulary(model: Checkpoint, change: Any) -> Checkpoint:
    """The same weights with another tokenizer."""
    tokenizer = change(tiny_tokenizer())

    def fill(folder: Path) -> None:
        for file in model.path.iterdir():
            if file.name != "manifest.json":
                (folder / file.name).write_bytes(file.read_bytes())
        tokenizer.save_pretrained(folder)

    return Checkpoint.write(fill)


def renamed(_: Any) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(VOCABULARY - 1 - number): number for number in range(VOCABULARY)}  # every id means another token
    backend = Tokenizer(models.WordLevel(words, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="1", pad_token="2")


def other_roles(tokenizer: Any) -> Any:
    tokenizer.eos_token = "3"
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


@pytest.mark.claim("a reward model given other ids")
def test_a_model_with_another_tokenizer_is_refused(store: Store) -> None:
    base = tiny_checkpoint()
    model = with_vocabulary(outspoken("outcome", base), renamed)
    with pytest.raises(ValueError, match=r"has another tokenizer than the policy .* that sampled"):
        score_outputs(outputs_of(label_rows(base)), base, [model], fp32())


def test_a_model_whose_ids_mean_the_same_is_not_refused_for_its_template(store: Store) -> None:
    base = tiny_checkpoint()
    model = with_vocabulary(outspoken("outcome", base), other_roles)
    assert len(score_outputs(outputs_of(label_rows(base)), base, [model], fp32()).rows()) == 16


def test_an_input_beyond_the_window_is_named_and_not_cut(store: Store) -> None:
    base = tiny_checkpoint()
    short = tiny_model(max_position_embeddings=8)
    narrow = outspoken("outcome", Checkpoint.write(lambda folder: save(folder, short, tiny_tokenizer())))
    rows = [{**row, "output_ids": row["output_ids"][:1], "step_ends": [0]} for row in label_rows(base)]
    rows[6]["output_ids"] = [7] * 9
    with pytest.raises(ValueError, match=r"\('q1', 2\): 3 prompt \+ 9 output .*12, .* 8"):
        score_outputs(outputs_of(rows), base, [narrow], fp32())


def test_models_that_do_not_fit_together_are_refused(store: Store) -> None:
    base = tiny_checkpoint()
    outputs, model = outputs_of(label_rows(base)), outspoken("outcome", base)
    for models, found in (([], r"\[\]"), ([model, model], r"\['outcome', 'outcome'\]"), ([base], "no reward model")):
        with pytest.raises(ValueError, match=found):
            score_outputs(outputs, base, models, fp32())


def test_rules_of_other_rollouts_or_by_a_model_are_refused(store: Store) -> None:
    base = tiny_checkpoint()
    rows, model = label_rows(base), outspoken("outcome", base)
    with pytest.raises(JoinError) as refused:
        score_outputs(outputs_of(rows), base, [model], fp32(), rules_of(rows[:-1]))
    assert (refused.value.table, refused.value.missing) == ("rewards by rules", ("q3", 3))
    with pytest.raises(ValueError, match=r"\('q0', 0\)"):
        score_outputs(outputs_of(rows), base, [model], fp32(), rules_of(rows, scorer=model.digest))


def test_a_score_that_is_not_finite_is_named(store: Store) -> None:
    base = tiny_checkpoint()
    broken = with_head(outspoken("outcome", base), lambda head: head[0, :1].fill_(math.nan))
    with pytest.raises(ValueError, match=r"\('q0', 0\) is not finite"):
        score_outputs(outputs_of(label_rows(base)), base, [broken], fp32())


def test_an_output_without_places_in_its_text_cannot_be_cut_into_steps(store: Store) -> None:
    base = tiny_checkpoint()
    rows = outputs_of(label_rows(base)).rows()
    rows[4]["text_ends"] = [1]
    with pytest.raises(ValueError, match=r"\('q1', 0\): .*text_ends"):
        score_outputs(Rollouts.write(rows), base, [outspoken("process", base)], fp32())
