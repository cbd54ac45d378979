"""`cohort export`: a plain folder that transformers loads without us, with a card that claims what is recorded."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flows.cli import run_command
from flows.config import IterativeRLConfig
from flows.config.recipes import arithmetic_smoke
from flows.runs.paths import Places
from flows.runs.record import RunRecord, write_json
from flows.runs.state import RunState
from pipeline.artifact import ArtifactError
from pipeline.residency import evict
from pipeline.stage import stage
from pipeline.store import Store, use_store
from stages.models import Checkpoint, load_model, load_tokenizer, save, write_plain
from stages.sft import SFTConfig
from stages.tables import Questions
from stages.text import CharacterTokenizerConfig, build_tokenizer
from stages.training import TrainingConfig
from tests.flows.logs import write_log
from tests.flows.short_runs import smoke
from tests.stages.training.tiny import tiny_model, tiny_tokenizer

TEXT = "12 + 7 =  19\n#### 19"


def trained(**settings: Any) -> Checkpoint:
    """A checkpoint as training leaves it: float32, with a trainer's files."""
    tokenizer = build_tokenizer([TEXT + "0123456789"], CharacterTokenizerConfig())
    model = tiny_model(vocab_size=len(tokenizer), **settings)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(3))

    def fill(folder: Path) -> None:
        save(folder, model, tokenizer, eos_token_ids=[0, 3])
        (folder / "optimizer.safetensors").write_bytes(b"state")
        (folder / "trainer_state.json").write_text('{"updates": 7}')

    return Checkpoint.write(fill)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("COHORT_DEBUG", "0")
    return Places.under(tmp_path / "root")


@pytest.fixture
def store(places: Places) -> Iterator[Store]:
    with use_store(Store(places.store)) as opened:
        yield opened
    evict()


def export(places: Places, *arguments: str) -> int:
    return run_command(["export", *arguments, "--root", str(places.root)])


def greedy(model: Any, tokenizer: Any) -> list[int]:
    ids = tokenizer(TEXT[:8], return_tensors="pt")["input_ids"]
    found: list[int] = model.generate(ids, do_sample=False, max_new_tokens=24, pad_token_id=1)[0].tolist()
    return found


@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("bfloat16", False)])
def test_plain_transformers_loads_the_folder_and_decodes_the_same(
    store: Store, places: Places, tmp_path: Path, dtype: str, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = trained(tie_word_embeddings=tied)
    folder = tmp_path / "out" / "model"
    assert export(places, checkpoint.digest[:12], str(folder), "--dtype", dtype) == 0
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    )  # ours; others differ in last bits
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = load_model(checkpoint, dtype=getattr(torch, dtype))
    assert model.dtype == getattr(torch, dtype)
    assert model.generation_config.eos_token_id == [0, 3]
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in ours.state_dict().items())
    assert greedy(model, tokenizer) == greedy(ours, load_tokenizer(checkpoint))
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    held = {file.name for file in folder.iterdir()}
    assert held == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied


def test_large_models_are_cut_into_shards_that_hold_everything_once(
    store: Store, places: Places, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = trained(tie_word_embeddings=False)
    assert export(places, checkpoint.digest, str(tmp_path / "out"), "--shard-gb", "2e-5") == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert all(re.fullmatch(rf"model-\d{{5}}-of-{len(files):05d}\.safetensors", name) for name in files)
    parts = [load_file(tmp_path / "out" / name) for name in files]
    ours = load_model(checkpoint, dtype=torch.bfloat16).state_dict()
    assert sum(map(len, parts)) == len(ours) == len(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for part in parts for tensor in part.values())
    for part in parts:
        assert sum(tensor.nbytes for tensor in part.values()) <= 20_000 or len(part) == 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(loaded[name].equal(tensor) for name, tensor in ours.items())


def test_a_folder_that_holds_anything_is_left_as_it_is_without_force(
    store: Store, places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = trained(tie_word_embeddings=False), trained()
    folder = tmp_path / "out"
    folder.mkdir()
    assert export(places, first.digest, str(folder), "--shard-gb", "2e-5") == 0
    (folder / "notes.txt").write_text("mine")
    assert export(places, second.digest, str(folder)) == 2
    assert "is not empty" in capsys.readouterr().err
    assert export(places, second.digest, str(folder), "--force") == 0
    assert [file.name for file in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert (folder / "notes.txt").read_text() == "mine"
    for other in ("home", "file"):
        place = tmp_path / other
        if other == "home":
            place.mkdir()
            (place / "thesis.tex").write_text("precious")
        else:
            place.write_text("precious")
        assert export(places, second.digest, str(place), "--force") == 2
    errors = capsys.readouterr().err
    assert "holds no model that --force could replace (it holds thesis.tex)" in errors
    assert "is a file" in errors
    assert (tmp_path / "file").read_text() == (tmp_path / "home" / "thesis.tex").read_text() == "precious"


def test_what_is_no_checkpoint_or_was_pruned_is_refused_with_what_to_do(
    store: Store, places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Questions.write({"question_id": ["a"], "question": ["?"], "answer": ["1"], "solution": [None]})
    assert export(places, table.digest, str(tmp_path / "out")) == 2
    assert f"{table.digest[:12]} is no checkpoint (Questions)" in capsys.readouterr().err
    checkpoint = trained()
    store.prune(checkpoint.digest)
    assert export(places, checkpoint.digest, str(tmp_path / "out")) == 1
    assert f"`cohort forget {checkpoint.digest[:12]}` and the same run again recompute it" in capsys.readouterr().err
    assert export(places, "no_such_run", str(tmp_path / "out")) == 1
    assert not (tmp_path / "out").exists()
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".out")]


def test_a_tokenizer_that_would_lose_text_is_not_exported(store: Store, tmp_path: Path) -> None:
    """The trap of a custom tokenizer under `qwen2`, which transformers reloads as a class of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {character: number for number, character in enumerate(["</s>", *"ab 0123456789+=\n#"])}
    backend = Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    checkpoint = Checkpoint.write(lambda folder: save(folder, tiny_model(vocab_size=len(words)), tokenizer))
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match=r"as Qwen2Tokenizer, under which '.*' does not come back"):
        write_plain(checkpoint, tmp_path / "out", dtype="float32", shard_bytes=10**9)


def test_a_model_with_code_of_its_own_is_exported_with_it_and_warned_of(store: Store, tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        save(folder, tiny_model(), tiny_tokenizer())
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    (tmp_path / "out").mkdir()
    with pytest.warns(
        UserWarning, match=r"own\.py of Checkpoint \w+ is Python code, which comes along and did not run"
    ):
        write_plain(Checkpoint.write(fill), tmp_path / "out", dtype="float32", shard_bytes=10**9)
    assert (tmp_path / "out" / "own.py").exists()
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ the card


def recorded(
    places: Places, config: IterativeRLConfig, policies: dict[int, Checkpoint], *, finished: bool = True
) -> str:
    """The record of a run as `cohort run` leaves it: steps that led to `policies`, evaluated before and after."""
    record = RunRecord.begin(places, config, command="cohort run arithmetic_smoke", engine="inline")
    write_log(record.folder, {step: {"update_policy": policy.digest} for step, policy in policies.items()}, whole=False)
    last = max(policies)
    measured = {0: 0.25, last: 0.75}
    curve = {
        step: {"eval/in_domain/accuracy": value, "eval/in_domain/accuracy_ci_low": value - 0.1}
        | {"eval/in_domain/accuracy_ci_high": value + 0.1, "eval/in_domain/pass_at_4": value + 0.125}
        for step, value in measured.items()
    }
    write_json(record.folder / "summary.json", {"curve": {str(step): part for step, part in curve.items()}})
    state = RunState(steps=last, clock=lambda: 0.0)
    record.policy = policies[last].digest if finished else ""
    record.end("finished", state)
    return record.folder.name


def test_the_card_says_how_the_policy_of_a_run_was_made(store: Store, places: Places, tmp_path: Path) -> None:
    config = arithmetic_smoke().override({"name": "mine", "iterations": 1, "steps": 2, "update.objective.beta": 0.125})
    first, last = trained(), trained(tie_word_embeddings=False)
    name = recorded(places, config, {1: first, 2: last})
    assert export(places, "mine", str(tmp_path / "final")) == 0
    card = (tmp_path / "final" / "README.md").read_text()
    assert f"`{last.digest}`" in card
    assert f"| run | `{name}`, after step 2 of 2, started on 20" in card
    assert (
        "`grpo` on outputs of `policy` with advantages of kind `group`; rewards from rules: `format`, `accuracy`."
        in card
    )
    assert "| `update.objective.beta` | `0.125` |" in card
    assert "| `in_domain` | sampled | 0.250 (0.150 - 0.350) | 0.750 (0.650 - 0.850) |" in card
    assert "| `in_domain` | Pass@4 | 0.375 | 0.875 |" in card
    assert "questions of Cohort's built-in arithmetic world" in card
    assert "# license: fill in before you publish" in card
    assert "chooses none" in card
    header = card.split("---")[1]
    assert "\nlicense:" not in header
    assert str(tmp_path) not in card, "a path of this machine"
    assert export(places, first.digest, str(tmp_path / "step1")) == 0
    card = (tmp_path / "step1" / "README.md").read_text()
    assert "after step 1 of 2" in card
    assert "This checkpoint was not evaluated." in card


@stage(version="1")
def tuned(config: SFTConfig) -> Checkpoint:
    return trained()


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_card_names_the_precision_that_auto_was_where_it_trained(
    store: Store, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool, precision: str
) -> None:
    monkeypatch.setattr("stages.training.config.has_native_bf16", lambda: native)
    policy = tuned(SFTConfig(training=TrainingConfig()))
    monkeypatch.setattr("stages.training.config.has_native_bf16", lambda: not native)
    config = arithmetic_smoke().override({"iterations": 1, "steps": 1, "update.training.precision": "auto"})
    recorded(places, config, {1: policy})
    assert export(places, policy.digest, str(tmp_path / "out")) == 0
    assert f"| `update.training.precision` | `{precision}` |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_the_folder_of_an_adapter_is_what_its_card_says_and_peft_loads_it(
    store: Store, places: Places, tmp_path: Path
) -> None:
    """On its base as the card has it exported, the adapter gives the merged policy's logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from stages.training import AdamWConfig, LoRAConfig, TrainingConfig
    from stages.training.batching import Row
    from stages.training.loop import publish, resident_engine
    from tests.stages.training.tiny import update

    how = TrainingConfig(optimizer=AdamWConfig(learning_rate=1e-2), precision="fp32", adapter=LoRAConfig(r=2))
    base = trained()
    engine = resident_engine(base, how.override({"optimizer_state": "none"}))
    update(engine, [Row([3, 4], [5, 6, 7])])
    adapted = publish(engine)
    recorded(places, arithmetic_smoke().override({"name": "lora", "iterations": 1, "steps": 1}), {1: adapted})
    assert export(places, "lora", str(tmp_path / "adapter"), "--adapter") == 0
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "# lora, adapter" in card
    assert "after step 1 of 1" in card
    assert "`grpo` on outputs of `policy`" in card
    assert "| `in_domain` | sampled | 0.250 (0.150 - 0.350) | 0.750 (0.650 - 0.850) |" in card
    assert f"| begun on the checkpoint | `{base.digest}` |" in card
    assert re.search(rf"`cohort export {base.digest[:12]} BASE --dtype float32`", card)
    assert export(places, base.digest[:12], str(tmp_path / "base"), "--dtype", "float32") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    model = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        theirs, ours = (part(input_ids=ids).logits for part in (model, load_model(adapted, dtype=torch.float32)))
        start = load_model(base, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert (ours - start).abs().max() > 1e-3


def test_a_checkpoint_of_no_run_has_a_card_that_says_so(store: Store, places: Places, tmp_path: Path) -> None:
    assert export(places, trained().digest, str(tmp_path / "out")) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No recorded run came to this checkpoint" in card
    assert "This checkpoint was not evaluated." in card
    assert "1 x `not made by a stage`" in card


def test_a_run_without_a_final_policy_is_refused(
    store: Store, places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(places, arithmetic_smoke().override({"name": "stopped"}), {1: trained()}, finished=False)
    assert export(places, "stopped", str(tmp_path / "out")) == 2
    assert "stopped: the run has no final policy yet" in capsys.readouterr().err


def test_a_chat_template_of_the_runs_own_goes_with_the_model(store: Store, places: Places, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} = {% endif %}"
    config = arithmetic_smoke().override({"name": "chat", "prompt": {"chat": "tokenizer", "chat_template": template}})
    recorded(places, config, {1: trained()})
    assert export(places, "chat", str(tmp_path / "out")) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "12 + 7"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "12 + 7 = "


@pytest.mark.slow
def test_the_policy_of_a_real_run_answers_as_it_did_in_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exported in float32, plain transformers gives the greedy outputs that the run's own evaluation recorded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flows.runs.ledger import read_ledger
    from flows.runs.record import read_records
    from stages.tables import Rollouts

    root = tmp_path / "root"
    settings = ["iterations=1", "steps=1", "evaluation.every=0", "evaluation.samples=0", "evaluation.estimates.ks=[1]"]
    assert run_command(smoke(root, *settings)) == 0
    assert export(Places.under(root), "arithmetic_smoke", str(tmp_path / "out"), "--dtype", "float32") == 0
    shutil.move(root / "store", tmp_path / "gone")  # the folder needs nothing of ours
    model, tokenizer = (part.from_pretrained(tmp_path / "out") for part in (AutoModelForCausalLM, AutoTokenizer))
    os.rename(tmp_path / "gone", root / "store")
    ledger = read_ledger(next(read_records(Places(root))).folder)
    assert ledger is not None
    last = [part for part in ledger.evaluations if part.mode == "greedy"][-1]
    with use_store(Store(root / "store")):
        rows = Rollouts(last.artifacts["rollout"]).rows()[:24]
    for row in rows:
        ids = torch.tensor([row["prompt_ids"]])
        found = model.generate(ids, do_sample=False, max_new_tokens=len(row["output_ids"]), pad_token_id=1)
        assert found[0, ids.shape[1] :].tolist() == row["output_ids"]
        assert tokenizer.decode(row["output_ids"], skip_special_tokens=True) == row["text"]
    evict()
