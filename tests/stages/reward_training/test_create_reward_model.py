"""A reward model made from a policy: the same trunk, a head that says 0, scores that plain transformers computes too."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline.store import Store
from stages.models import Checkpoint, RewardKind, load_tokenizer, reward_kind
from stages.reward_model import ScoringConfig, score_outputs
from tests.stages.critic.worlds import tiny_critic
from tests.stages.reward_training.worlds import (
    base_with_pad_as_eos,
    label_rows,
    outputs_of,
    outspoken,
    tiny_reward_model,
)
from tests.stages.training.tiny import tiny_checkpoint

FP32 = ScoringConfig(precision="fp32", threads=1)
KINDS: list[RewardKind] = ["outcome", "process"]


@pytest.mark.claim("4.2 reward model")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_trunk_is_the_bases_and_its_output_head_stays_behind(store: Store, kind: RewardKind, tied: bool) -> None:
    base = tiny_checkpoint(tie_word_embeddings=tied)
    model = tiny_reward_model(kind, base)
    theirs, ours = (load_file(point.path / "model.safetensors") for point in (base, model))
    assert set(ours) - set(theirs) == ({"score.weight"} if kind == "outcome" else {"score.weight", "score.bias"})
    assert set(theirs) - set(ours) == (set() if tied else {"lm_head.weight"})
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items() if name != "lm_head.weight")
    assert not ours["score.weight"].any()
    assert model.metrics["rm/parameters"] == sum(tensor.numel() for tensor in ours.values())


@pytest.mark.parametrize("kind", KINDS)
def test_its_folder_says_what_it_is(store: Store, kind: RewardKind) -> None:
    model = tiny_reward_model(kind)
    assert reward_kind(model) == kind
    assert load_tokenizer(model).eos_token == "1"


def test_neither_a_policy_nor_a_critic_is_a_reward_model(store: Store) -> None:
    with pytest.raises(ValueError, match=r"is no reward model: .* found Qwen2ForCausalLM"):
        reward_kind(tiny_checkpoint())
    with pytest.raises(ValueError, match=r"found Qwen2ForTokenClassification with labels \['value'\]"):
        reward_kind(tiny_critic())


def test_plain_transformers_computes_the_same_scores_of_padded_batches(store: Store) -> None:
    from transformers import AutoModelForSequenceClassification

    base = tiny_checkpoint()
    rows, model = label_rows(base), outspoken("outcome", base)
    plain = AutoModelForSequenceClassification.from_pretrained(model.path)
    plain.train()  # nothing drops out, in this mode either
    ids = [torch.tensor(row["prompt_ids"] + row["output_ids"]) for row in rows]
    padding = plain.config.pad_token_id
    assert padding == load_tokenizer(model).pad_token_id == 2
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding)
    expected = plain(input_ids=padded, attention_mask=(padded != padding).long()).logits[:, 0]
    found = [row["reward"] for row in score_outputs(outputs_of(rows), base, [model], FP32).rows()]
    assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_plain_transformers_computes_the_same_step_scores(store: Store) -> None:
    from transformers import AutoModelForTokenClassification

    base = tiny_checkpoint()
    rows, model = label_rows(base), outspoken("process", base)
    plain = AutoModelForTokenClassification.from_pretrained(model.path)
    plain.train()
    for row, found in zip(rows, score_outputs(outputs_of(rows), base, [model], FP32).rows(), strict=True):
        logits = plain(input_ids=torch.tensor([row["prompt_ids"] + row["output_ids"]])).logits[0, :, 0]
        expected = [logits[len(row["prompt_ids"]) + end].item() for end in row["step_ends"]]
        assert found["step_ends"] == row["step_ends"]
        assert found["step_rewards"] == pytest.approx(expected, abs=1e-5)


def test_padding_that_is_the_end_of_sequence_is_not_left_to_guess(store: Store) -> None:
    from transformers import AutoModelForSequenceClassification

    base = base_with_pad_as_eos()
    rows, model = label_rows(base), outspoken("outcome", base)
    assert json.loads((model.path / "config.json").read_text())["pad_token_id"] is None
    plain = AutoModelForSequenceClassification.from_pretrained(model.path)
    ids = torch.tensor([rows[0]["prompt_ids"] + rows[0]["output_ids"]])
    found = score_outputs(outputs_of(rows), base, [model], FP32).rows()[0]["reward"]
    assert plain(input_ids=ids).logits.item() == pytest.approx(found, abs=1e-5)
    with pytest.raises(ValueError, match="batch sizes > 1"):
        plain(input_ids=ids.repeat(2, 1))
    # What it would have read, had the policy's padding been kept: the token before the end.
    plain.config.pad_token_id = 1
    assert plain(input_ids=ids).logits.item() != pytest.approx(found, abs=1e-3)


def test_an_architecture_without_a_classifier_is_refused(store: Store) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.models import save
    from tests.stages.training.tiny import tiny_tokenizer

    shape = AutoConfig.for_model("olmo", vocab_size=26, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                 num_attention_heads=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(shape)
    policy = Checkpoint.write(lambda folder: save(folder, model, tiny_tokenizer()))
    with pytest.raises(ValueError, match="no AutoModelForTokenClassification of architecture olmo"):
        tiny_reward_model("process", policy)
