"""A critic made from a policy: the same trunk, a head that says 0, loadable by plain transformers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline.store import Store
from stages.critic import create_critic, estimate_values
from stages.models import Checkpoint, load_model, load_tokenizer
from tests.stages.critic.worlds import exact, outspoken_critic, tables, tiny_critic
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


def test_a_llama_policy_has_a_critic_too(store: Store) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.models import save
    from tests.stages.training.tiny import tiny_tokenizer

    shape = AutoConfig.for_model(
        "llama", vocab_size=26, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(shape)
    policy = Checkpoint.write(lambda folder: save(folder, model, tiny_tokenizer()))
    critic = load_model(create_critic(policy, exact()), dtype=torch.float32)
    assert type(critic).__name__ == "LlamaForTokenClassification"
    assert all(critic.model.state_dict()[name].equal(tensor) for name, tensor in model.model.state_dict().items())


def test_a_policy_of_an_architecture_without_a_token_classifier_is_refused(store: Store) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.models import save
    from tests.stages.training.tiny import tiny_tokenizer

    shape = AutoConfig.for_model("olmo", vocab_size=26, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                 num_attention_heads=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(shape)
    policy = Checkpoint.write(lambda folder: save(folder, model, tiny_tokenizer()))
    with pytest.raises(
        ValueError, match="no AutoModelForTokenClassification of architecture olmo; choose a model of another"
    ):
        create_critic(policy, exact())


def test_before_the_first_update_every_value_is_zero(store: Store) -> None:
    outputs, _ = tables()
    values = estimate_values(tiny_critic(), outputs, exact()).rows()
    assert {value for row in values for value in row["value"]} == {0.0}


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


def test_tokenizer_and_description_follow_from_the_policy(store: Store) -> None:
    critic = tiny_critic()
    assert load_tokenizer(critic).eos_token == "1"
    assert json.loads((critic.path / "config.json").read_text())["architectures"] == ["Qwen2ForTokenClassification"]


def test_one_policy_makes_one_critic(store: Store) -> None:
    policy = tiny_checkpoint()
    # Another config is another call of the stage; what it makes is the same.
    assert create_critic(policy, exact()).digest == create_critic(policy, exact(mu=2)).digest
