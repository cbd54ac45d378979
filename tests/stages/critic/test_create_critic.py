"""A critic made from a policy: the same trunk, a head that says 0, loadable by plain transformers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from pipeline.store import Store
from stages.critic import create_critic, estimate_values
from stages.models import load_model, load_tokenizer
from tests.stages.critic.worlds import exact, outspoken_critic, tables
from tests.stages.training.tiny import tiny_checkpoint


@pytest.mark.claim("4.1.1 critic")
@pytest.mark.parametrize("tied", [True, False])
def test_the_trunk_is_the_policys_and_its_output_head_stays_behind(store: Store, tied: bool) -> None:
    policy = tiny_checkpoint(tie_word_embeddings=tied)
    critic = create_critic(policy, exact())
    theirs, ours = (load_file(point.path / "model.safetensors") for point in (policy, critic))
    assert set(ours) - set(theirs) == {"score.weight", "score.bias"}
    assert set(theirs) - set(ours) == (set() if tied else {"lm_head.weight"})
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items() if name != "lm_head.weight")
    assert critic.metrics["critic/parameters"] == sum(tensor.numel() for tensor in ours.values())
    assert load_tokenizer(critic).eos_token == "1"
    # Before the first update every value is zero.
    assert {value for row in estimate_values(critic, tables()[0], exact()).rows() for value in row["value"]} == {0.0}


@pytest.mark.parametrize("architecture", ["llama", "olmo"])
def test_llama_has_a_token_classifier_and_olmo_is_refused(store: Store, architecture: str) -> None:
    policy = tiny_checkpoint(architecture, tie_word_embeddings=False)
    if architecture == "olmo":
        with pytest.raises(ValueError, match="AutoModelForTokenClassification of architecture olmo"):
            create_critic(policy, exact())
        return
    assert (
        type(load_model(create_critic(policy, exact()), dtype=torch.float32)).__name__ == "LlamaForTokenClassification"
    )


def test_plain_transformers_loads_it_and_computes_the_same_values(store: Store) -> None:
    from transformers import AutoModelForTokenClassification

    outputs, _ = tables()
    critic = outspoken_critic()
    plain = AutoModelForTokenClassification.from_pretrained(critic.path)
    plain.train()  # nothing drops out, in this mode either
    assert plain.config.id2label == {0: "value"}
    for row, values in zip(outputs.rows(), estimate_values(critic, outputs, exact()).rows(), strict=True):
        ids = torch.tensor([row["prompt_ids"] + row["output_ids"]])
        expected = plain(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1, 0]
        assert values["value"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_one_policy_makes_one_critic(store: Store) -> None:
    policy = tiny_checkpoint()
    # Another config is another call of the stage; what it makes is the same.
    assert create_critic(policy, exact()).digest == create_critic(policy, exact(mu=2)).digest
