"""A whole run that trains adapters: cached, resumed from artifacts alone, compared with each iteration's start; its export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from flows.cli import run_command
from flows.config.recipes import arithmetic_smoke, smollm2_arithmetic
from flows.iterative_rl import iterative_rl
from flows.runs.curve import Points
from flows.runs.paths import Places
from pipeline.events import recording
from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.models import Checkpoint, load_tokenizer
from stages.tables import Rollouts
from stages.training.adapters import adapter_base
from tests.flows.tiny import write_qwen

SETTINGS = {"update.training.adapter.r": 2, "update.training.optimizer.learning_rate": 3e-3}


@pytest.mark.slow
def test_a_run_with_adapters_that_is_resumed_ends_in_the_same_policy(tmp_path: Path) -> None:
    config, seen = arithmetic_smoke().override(SETTINGS), Points()
    with use_store(Store(tmp_path / "uninterrupted")) as store, recording(seen.take):
        final = iterative_rl(config)
        content = final.content
        made = len(list(store.actions()))
        evict()
        assert iterative_rl(config) == final
        assert len(list(store.actions())) == made  # nothing was computed again
        starts = [call["result"] for call in store.actions() if call["stage"] == "supervised_finetuning"]
        assert [adapter_base(final)] == starts
    kl = [seen.by_step[step]["policy/kl"] for step in (1, 2, 3, 4)]
    assert (kl[0], kl[2]) == (0.0, 0.0)
    assert min(kl[1], kl[3]) > 0
    with use_store(Store(tmp_path / "resumed")):
        for iterations in (1, 2):
            resumed = iterative_rl(config.override({"iterations": iterations}))
            evict()
        assert (resumed, resumed.content) == (final, content)


TINY = {
    "data.demonstrations.chains.count": 64,
    "data.train.count": 32,
    "data.evaluation.in_domain.count": 4,
    "sft.max_steps": 2,
    "sft.decay_steps": 1,
    "steps": 2,
    "questions_per_step": 4,
    "rollout.G": 4,
    "rollout.max_output_tokens": 8,
    "preflight": {"truncated": None, "unreadable": None, "without_signal": None},
}


@pytest.mark.slow
def test_the_world_is_asked_in_the_chat_template_of_a_model_of_others(tmp_path: Path) -> None:
    write_qwen(tmp_path / "model")
    config, seen = smollm2_arithmetic().override({**TINY, "policy.path": str(tmp_path / "model")}), Points()
    with use_store(Store(tmp_path / "store")) as store, recording(seen.take):
        final = iterative_rl(config)
        starts = [call["result"] for call in store.actions() if call["stage"] == "supervised_finetuning"]
        assert [adapter_base(final)] == starts
        asked = next(call["result"] for call in store.actions() if call["stage"] == "rollout")
        tokenizer = load_tokenizer(final)
        text = tokenizer.decode(Rollouts(asked).rows()[0]["prompt_ids"])
    assert text.endswith("and the result.<|im_end|>\n<|im_start|>assistant\n")
    assert "<|im_start|>user\nCompute " in text
    assert seen.by_step[1]["policy/kl"] == 0


LORA = {"r": 2, "lora_alpha": 32.0, "use_rslora": False, "target_modules": ["q_proj", "v_proj"]}


def policy(folder: Path, *, adapter: bool) -> None:
    """What export reads of a checkpoint."""
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    if adapter:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "aa11", **LORA}))
        save_file({"a": np.ones((2, 8), np.float32)}, folder / "adapter" / "adapter_model.safetensors")
        (folder / "adapter" / "base.safetensors").write_bytes(b"W")


def test_an_adapter_is_exported_only_over_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places, target = Places.under(tmp_path / "root"), tmp_path / "adapter"
    with use_store(Store(places.store)):
        adapted, full = (Checkpoint.write(lambda at, has=has: policy(at, adapter=has)).digest for has in (True, False))

    def export(*arguments: str) -> tuple[int, str]:
        code = run_command(["export", *arguments, "--root", str(places.root)])
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).split())

    code, said = export(adapted, str(target), "--adapter", "--base", "org/model")
    assert code == 0
    assert "it belongs on aa11" in said
    assert sorted(file.name for file in target.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    described = json.loads((target / "adapter_config.json").read_text())
    assert described == {"base_model_name_or_path": "org/model", **LORA}
    assert load_file(target / "adapter_model.safetensors")["a"].sum() == 16
    card = (target / "README.md").read_text()
    _, header, _ = card.split("---\n", 2)
    assert yaml.safe_load(header) == {"base_model": "org/model", "library_name": "peft", "tags": ["cohort", "lora"]}
    assert "# license: fill in" in header
    assert f"| adapter of the checkpoint | `{adapted}` |" in card
    assert "| begun on the checkpoint | `aa11` |" in card
    assert "| kind | LoRA, r = 2, scale 32 / r, 16 parameters in float32 |" in card
    assert "| of the matrices | `q_proj`, `v_proj` |" in card
    assert (
        'base = AutoModelForCausalLM.from_pretrained("org/model")\nmodel = PeftModel.from_pretrained(base, "FOLDER")'
        in card
    )
    assert "is not empty" in export(adapted, str(target), "--adapter")[1]
    assert export(adapted, str(target), "--adapter", "--force")[0] == 0
    card = (target / "README.md").read_text()
    assert "base_model" not in card, "the base has no public name"
    assert "`cohort export aa11 BASE --dtype float32`" in card
    assert "has no adapter: it was trained in full" in export(full, str(tmp_path / "none"), "--adapter")[1]
    assert not (tmp_path / "none").exists()
    assert "holds no model that --force could replace" in export(full, str(target), "--force")[1]
    assert "--base names the base of an adapter" in export(full, str(target), "--base", "org/model")[1]
