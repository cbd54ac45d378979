"""A tiny policy and rows for tests of training."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import torch
from safetensors.torch import load_file

from pipeline.store.folder import MANIFEST
from stages.models import WEIGHTS, Checkpoint, copy_description, save, write_tensors
from stages.training.batching import Row, micro_batches
from stages.training.engine import Engine, StepReport
from stages.training.forward import completion_logprobs
from stages.training.loop import publish

VOCABULARY = 26
P = ParamSpec("P")


def remembered(make: Callable[P, Checkpoint]) -> Callable[P, Checkpoint]:
    """Make a checkpoint once for equal arguments; from then on write the same files to the current store."""
    made: dict[str, dict[str, bytes]] = {}

    @functools.wraps(make)
    def again(*args: P.args, **kwargs: P.kwargs) -> Checkpoint:
        key = repr((args, kwargs))
        if key not in made:
            first = make(*args, **kwargs)
            files = (file for file in first.path.iterdir() if file.name != MANIFEST)
            made[key] = {file.name: file.read_bytes() for file in files}
            return first

        def fill(folder: Path) -> None:
            for name, content in made[key].items():
                (folder / name).write_bytes(content)

        return Checkpoint.write(fill)

    return again


def tiny_model(architecture: str = "qwen2", *, seed: int = 0, **settings: Any) -> Any:
    """Two layers, hidden size 32, random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    description = AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            **settings,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(description, attn_implementation="eager").eval()


def tiny_tokenizer() -> Any:
    """Its vocabulary is what the tests of training never look at."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="1", pad_token="2")


@remembered
def tiny_checkpoint(architecture: str = "qwen2", **settings: Any) -> Checkpoint:
    """The tiny model as a checkpoint in the current store."""
    return saved(tiny_model(architecture, **settings))


def saved(model: Any) -> Checkpoint:
    """A model as a checkpoint in the current store, with the tokenizer of the tests."""
    return Checkpoint.write(lambda folder: save(folder, model, tiny_tokenizer()))


def changed(checkpoint: Checkpoint, change: Callable[[dict[str, torch.Tensor]], None]) -> Checkpoint:
    """The checkpoint with weights that `change` has overwritten, without an optimizer's state."""
    weights = load_file(checkpoint.path / WEIGHTS)
    change(weights)

    def fill(folder: Path) -> None:
        copy_description(checkpoint.path, folder)
        write_tensors(folder / WEIGHTS, weights)

    return Checkpoint.write(fill)


def random_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of 2-6 prompt and 1-9 output tokens."""
    rng = random.Random(seed)

    def ids(shortest: int, longest: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(shortest, longest))]

    return [Row(ids(2, 6), ids(1, 9)) for _ in range(count)]


def accumulate(engine: Engine, rows: list[Row], *, max_tokens: int = 40, weight: float = 1.0) -> None:
    """Accumulate the gradient of the mean negative log-likelihood, times `weight`, over micro-batches."""
    targets = sum(len(row.output_ids) for row in rows)
    batches = list(micro_batches(rows, max_tokens))
    for number, batch in enumerate(batches):
        with engine.autocast():
            scored = completion_logprobs(engine.model, batch.to(engine.device))
        engine.backward(-weight * scored.logp_BO.sum() / targets, last=number == len(batches) - 1)


def continued(engine: Engine, start_anew: Callable[[Checkpoint], Engine], rows: list[Row]) -> list[Checkpoint]:
    """What four updates end in: without a stop, in an engine made from the second's checkpoint, and in the first, reloaded."""
    update(engine, rows)
    update(engine, rows)
    middle = publish(engine)
    update(engine, rows)
    update(engine, rows)
    ends = [publish(engine)]
    anew = start_anew(middle)
    assert publish(anew) == middle  # the same files
    engine.load(middle)  # in place, over a state that went on
    for again in (anew, engine):
        update(again, rows)
        update(again, rows)
        ends.append(publish(again))
    return ends


def assert_close(found: Checkpoint, expected: Checkpoint, *files: str, exact: float = 1e-6) -> None:
    """Compare the tensors of files of two checkpoints (weights, unless others are named), relative to their norms.

    Softmax does not see what is added to all keys: the gradient of a key bias is 0 up to rounding, and AdamW divides rounding
    by its own size. It is compared with the size of the steps instead.
    """
    for file in files or (WEIGHTS,):
        ours, theirs = load_file(found.path / file), load_file(expected.path / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            limit = 3e-3 if "k_proj.bias" in name else exact * theirs[name].norm()
            assert (tensor - theirs[name]).norm() <= limit, (file, name)


def update(engine: Engine, rows: list[Row], **options: Any) -> StepReport:
    """One supervised update."""
    accumulate(engine, rows, **options)
    return engine.step()
