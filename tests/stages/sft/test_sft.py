"""Making a first policy and teaching it: what the loss is, when it stops, what is kept."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.progress import listen
from pipeline.store import Store
from stages.models import Checkpoint, load_model, load_tokenizer
from stages.sft import PolicyConfig, SFTConfig, create_policy, supervised_finetuning
from stages.sft.stage import Curve, batches, parts_of, sft_loss
from stages.tables import Demonstrations
from stages.text import PromptConfig, encode_prompt
from stages.training import AdamWConfig, MuonConfig, TrainingConfig
from stages.training.batching import Row
from stages.training.loop import train
from tests.stages.training.tiny import tiny_model
from tests.stages.update.exact import ExactEngine, gradient_of

PROMPT = PromptConfig(suffix="\n")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def demonstrations(count: int = 12) -> Demonstrations:
    """Echo a number: something a policy of one layer learns in seconds."""
    rows = [(f"Say {number}.", f"#### {number}") for number in range(count)]
    return Demonstrations.write(
        {
            "question_id": [f"q{number}" for number in range(count)],
            "question": [question for question, _ in rows],
            "completion": [completion for _, completion in rows],
            "author": [None] * count,
        }
    )


def how(**changes: Any) -> SFTConfig:
    training = TrainingConfig(optimizer=MuonConfig(), precision="fp32", warmup_steps=2, threads=1)
    return SFTConfig(**({"training": training, "batch_size": 6, "max_steps": 4} | changes))


def new_policy(corpus: Demonstrations, **changes: Any) -> Checkpoint:
    return create_policy(PolicyConfig(settings={**SMALL, **changes}), corpus, PROMPT)


def curve_of(checkpoint: Checkpoint) -> dict[str, Any]:
    curve: dict[str, Any] = json.loads((checkpoint.path / "sft_curve.json").read_text())
    return curve


@pytest.mark.claim("padded rows of the vocabulary")
def test_a_first_policy_has_the_architecture_and_vocabulary_asked_for(store: Store) -> None:
    import torch

    policy = new_policy(demonstrations(), tie_word_embeddings=True)
    model = load_model(policy, dtype=torch.float32)
    tokenizer = load_tokenizer(policy)
    # "Say .#", ten digits, the prompt's newline; end of sequence and padding.
    assert model.config.vocab_size == len(tokenizer) == 6 + 10 + 1 + 2
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 1)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert encode_prompt(tokenizer, "Say 7.", PROMPT)[-1] == tokenizer.encode("\n")[0]


def test_another_seed_draws_other_weights_and_the_same_seed_the_same(store: Store) -> None:
    corpus = demonstrations()
    digests = [create_policy(PolicyConfig(settings=SMALL, seed=s), corpus, PROMPT).digest for s in (0, 1)]
    assert digests[0] != digests[1]
    renamed = Demonstrations.write(demonstrations().rows()[::-1])  # another artifact, the same characters
    assert create_policy(PolicyConfig(settings=SMALL), renamed, PROMPT).digest == digests[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PolicyConfig(settings={"hiden_size": 32}), "qwen2 has no setting hiden_size"),
        (PolicyConfig(architecture="qwen2000"), "policy.architecture: "),
    ],
)
def test_an_architecture_or_setting_that_does_not_exist_is_named(
    store: Store, config: PolicyConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        create_policy(config, demonstrations(), PROMPT)


@pytest.mark.claim("Eq. 6-7")
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_the_first_loss_is_that_of_the_untrained_policy(store: Store, aggregation: str) -> None:
    import torch

    corpus = demonstrations()
    policy = new_policy(corpus)
    how_much = how(batch_size=12, max_steps=1, aggregation=aggregation)
    tuned = supervised_finetuning(policy, corpus, PROMPT, how_much)
    # Ten demonstrations of 7 + 7 characters (the ends of prompt and completion included), two of 8 + 8.
    assert tuned.metrics["sft/padding_share"] == pytest.approx(1 - (10 * 14 + 2 * 16) / (12 * 16))
    model, tokenizer = load_model(policy, dtype=torch.float32), load_tokenizer(policy)
    losses = []
    for row in corpus.rows():
        prompt = tokenizer.encode(row["question"] + "\n")
        completion = [*tokenizer.encode(row["completion"]), tokenizer.eos_token_id]
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=torch.tensor([prompt + completion])).logits[0], -1)
        losses.append([-logp[len(prompt) - 1 + o, token].item() for o, token in enumerate(completion)])
    assert len({len(loss) for loss in losses}) == 2  # else both means are one
    means = {
        "sequence_mean": sum(sum(loss) / len(loss) for loss in losses) / 12,
        "token_mean": sum(map(sum, losses)) / sum(map(len, losses)),
    }
    assert curve_of(tuned)["loss"] == pytest.approx([means[aggregation]], rel=1e-5)


@pytest.mark.parametrize(
    ("aggregation", "weights"), [("sequence_mean", (1 / 4, 1 / 12)), ("token_mean", (1 / 8, 1 / 8))]
)
@pytest.mark.parametrize("micro_batch_tokens", [3, 100])
def test_tokens_of_demonstrations_of_2_and_6_weigh_what_the_mean_says(
    aggregation: str, weights: tuple[float, float], micro_batch_tokens: int
) -> None:
    """The gradient of the batch is that of the weighted sum of its log-probabilities, however it is cut."""
    import torch

    rows = [Row([3], [4, 5]), Row([3, 6], [7, 8, 9, 10, 11, 12])]
    engine: Any = ExactEngine(tiny_model())
    config = how(aggregation=aggregation, micro_batch_tokens=micro_batch_tokens)
    curve = Curve(config)
    list(train(engine, [(parts_of(rows, engine, config, curve), 1.0)], lambda part: sft_loss(engine, part)))
    assert (curve.tokens, curve.places) == (3 + 8, 2 * 8 if micro_batch_tokens == 100 else 3 + 8)
    expected = tiny_model()
    for row, weight in zip(rows, weights, strict=True):
        ids = torch.tensor([[*row.prompt_ids, *row.output_ids]])
        logp = torch.log_softmax(expected(input_ids=ids).logits[0], -1)
        begin = len(row.prompt_ids) - 1
        (-weight * sum(logp[begin + o, token] for o, token in enumerate(row.output_ids))).backward()
    torch.testing.assert_close(engine.gradient.float(), gradient_of(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.claim("3.2")
def test_it_learns_stops_at_the_loss_and_then_decays(store: Store) -> None:
    corpus = demonstrations()
    config = how(max_steps=400, stop_loss=0.5, decay_steps=5, batch_size=12)
    rates: list[float] = []
    with listen(lambda topic, values: rates.append(values["learning_rate"]) if topic == "sft" else None):
        tuned = supervised_finetuning(new_policy(corpus), corpus, PROMPT, config)
    curve = curve_of(tuned)
    steps = len(curve["loss"])
    assert curve["ended_by"] == "stop_loss"
    assert steps < 405
    assert curve["loss"][-1] < 0.5 < curve["loss"][0]
    assert rates[:2] == pytest.approx([1.5e-3, 3e-3])
    assert rates[-5:] == pytest.approx([3e-3 * part / 6 for part in (5, 4, 3, 2, 1)])
    assert tuned.metrics["sft/steps"] == steps
    assert tuned.metrics["sft/reached_stop_loss"] == 1


def test_an_end_by_max_steps_is_recorded_as_such(store: Store) -> None:
    corpus = demonstrations()
    tuned = supervised_finetuning(new_policy(corpus), corpus, PROMPT, how(stop_loss=1e-6))
    assert (curve_of(tuned)["ended_by"], len(curve_of(tuned)["loss"])) == ("max_steps", 4)
    assert not (tuned.path / "optimizer.safetensors").exists()


def test_equal_inputs_give_equal_weights_and_another_seed_others(store: Store) -> None:
    corpus = demonstrations()
    policy = new_policy(corpus)
    weights = []
    for seed, tokens in ((0, 8192), (1, 8192), (0, 8193)):
        config = how(
            seed=seed,
            micro_batch_tokens=tokens,
            training=how().training.override({"optimizer": AdamWConfig().model_dump()}),
        )
        weights.append(supervised_finetuning(policy, corpus, PROMPT, config).path / "model.safetensors")
    assert weights[0].read_bytes() == weights[2].read_bytes()
    assert weights[0].read_bytes() != weights[1].read_bytes()


@pytest.mark.claim("the last batch dropped or counted twice")
@pytest.mark.parametrize("pool", [1, 2])
def test_an_epoch_shows_every_demonstration_once(pool: int) -> None:
    rows = [Row([1], [2] * (1 + number)) for number in range(12)]
    drawn = batches(rows, SFTConfig(batch_size=3, length_pool=pool))
    epochs = [[len(row.output_ids) for _ in range(4) for row in next(drawn)] for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(1, 13))] * 2
    assert epochs[0] != epochs[1]


@pytest.mark.claim("3.2")
def test_a_length_pool_makes_batches_of_like_length() -> None:
    rows = [Row([1], [2] * (1 + number % 2 * 50)) for number in range(60)]
    drawn = batches(rows, SFTConfig(batch_size=3, length_pool=20))
    assert all(len({len(row.output_ids) for row in next(drawn)}) == 1 for _ in range(20))


def test_the_smoothed_loss_has_no_bias_from_its_start() -> None:
    curve = Curve(SFTConfig(smoothing=0.5))
    assert curve.smoothed == float("inf")
    curve.add(4.0)
    assert curve.smoothed == pytest.approx(4.0)
    curve.add(1.0)
    assert curve.smoothed == pytest.approx((0.25 * 4 + 0.5 * 1) / 0.75)


def test_fewer_demonstrations_than_a_batch_are_refused(store: Store) -> None:
    corpus = demonstrations(5)
    with pytest.raises(ValueError, match="5 demonstrations are fewer than a batch of 6"):
        supervised_finetuning(new_policy(corpus), corpus, PROMPT, how())


def test_a_demonstration_beyond_the_models_window_is_named(store: Store) -> None:
    corpus = demonstrations()
    policy = new_policy(corpus, max_position_embeddings=14)  # "Say 10.\n" and "#### 10" with its end: 8 + 8
    with pytest.raises(ValueError, match=r"'q10': expected at most 14 tokens .* found 16"):
        supervised_finetuning(policy, corpus, PROMPT, how())
