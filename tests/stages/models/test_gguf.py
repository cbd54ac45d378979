"""GGUF files: the checkpoint is what the file says, and what transformers would leave out of it is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="the extra gguf")

from flows.algorithm.models import early_tokenizer, pretrained_model
from flows.config import IterativeRLConfig, PretrainedPolicy
from flows.config.resolve import choose
from flows.planning.shapes import read_shape
from pipeline.artifact import ArtifactError
from pipeline.config import ConfigError
from pipeline.store import Store
from stages.models import Checkpoint, ExternalCheckpointConfig, import_checkpoint, load_model, load_tokenizer, read_gguf
from stages.rollout.stage import stop_ids
from tests.stages.models import gguf_files
from tests.stages.models.gguf_files import HIDDEN, LAYERS, MIDDLE, TEMPLATE, TOKENS, WINDOW, tensors, write_gguf
from tests.stages.models.smollm import smollm

__all__ = ["smollm"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def imported(path: Path) -> Checkpoint:
    return import_checkpoint(ExternalCheckpointConfig(path=path))


def config_with(path: Path) -> IterativeRLConfig:
    return choose("arithmetic_cpu").config.override({"policy": {"kind": "pretrained", "path": str(path)}, "sft": None})


def rotated(weight: np.ndarray) -> torch.Tensor:
    """Undo what llama.cpp does to q and k: it stores the two halves of each head's rows in turn."""
    heads, size = gguf_files.HEADS, HIDDEN // gguf_files.HEADS
    rows = [head * size + 2 * (row % (size // 2)) + row // (size // 2) for head in range(heads) for row in range(size)]
    return torch.tensor(weight[rows])


def test_weights_are_those_of_the_file(store: Store, file: Path) -> None:
    model = load_model(imported(file), dtype=torch.float32)
    found, given = model.state_dict(), tensors()
    assert torch.equal(found["model.embed_tokens.weight"], torch.tensor(given["token_embd.weight"]))
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"], torch.tensor(given["blk.1.ffn_down.weight"]))
    assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"], rotated(given["blk.0.attn_q.weight"]))
    assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()


def test_digits_are_split_off_where_the_file_says_so(store: Store, file: Path) -> None:
    tokenizer = load_tokenizer(imported(file))
    assert tokenizer.tokenize("the  12") == ["the", "Ġ", "Ġ", "1", "2"]
    assert tokenizer.convert_ids_to_tokens(list(range(len(TOKENS)))) == TOKENS


def test_the_chat_template_is_that_of_the_file(store: Store, file: Path) -> None:
    tokenizer = load_tokenizer(imported(file))
    assert tokenizer.chat_template == TEMPLATE
    turns = [{"role": "user", "content": "the 1"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nthe 1<|im_end|>\n<|im_start|>assistant\n"


def test_the_content_names_a_file_whatever_its_name(store: Store, file: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(file, tmp_path / "renamed.gguf"))
    assert imported(other).digest == imported(file).digest
    changed = write_gguf(tmp_path / "changed.gguf", weights=tensors(seed=1))
    assert imported(changed).digest != imported(file).digest


def test_a_policy_is_made_from_a_file_by_its_path(store: Store, file: Path) -> None:
    assert pretrained_model(PretrainedPolicy(path=str(file))).digest == imported(file).digest
    with pytest.raises(ConfigError, match=r"policy\.revision"):
        pretrained_model(PretrainedPolicy(path=str(file), revision="main"))


def test_planning_reads_the_shape_without_torch(file: Path) -> None:
    shape = read_shape(file)
    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * MIDDLE + 2 * HIDDEN
    assert shape.parameters == len(TOKENS) * HIDDEN + LAYERS * layer + HIDDEN == sum(v.size for v in tensors().values())
    assert shape.window == WINDOW
    code = "import sys, pathlib; from flows.planning.shapes import read_shape; read_shape(pathlib.Path(sys.argv[1])); "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules", str(file)], check=True)


def test_prompts_are_measured_before_there_is_a_policy(store: Store, file: Path) -> None:
    early = early_tokenizer(config_with(file), None)
    assert early.window == WINDOW
    assert early.tokenizer("the 12").input_ids == load_tokenizer(imported(file))("the 12").input_ids


def test_every_end_that_the_file_names_stops_an_output(store: Store, tmp_path: Path) -> None:
    made = imported(write_gguf(tmp_path / "ends.gguf", more={"tokenizer.ggml.eot_token_id": 0}))
    assert stop_ids(made, load_tokenizer(made)) == (0, 2)


def test_a_beginning_of_sequence_that_the_file_asks_for_is_added(store: Store, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="add_bos_token"):
        made = imported(write_gguf(tmp_path / "start.gguf", more={"tokenizer.ggml.add_bos_token": True}))
    assert load_tokenizer(made)("t").input_ids == [1, TOKENS.index("t")]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"architecture": "t5"}, "llama"),
        ({"architecture": "unheard"}, "qwen2"),
        ({"more": {"split.count": 3}}, "llama-gguf-split"),
        ({"more": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}}, "llama.rope.scaling.type"),
        ({"rule": "deepseek-llm"}, "deepseek-llm"),
        ({"weights": {**tensors(), "blk.0.attn_q.bias": np.ones(HIDDEN, np.float32)}}, "the model takes"),
        ({"tokens": [*TOKENS[:-3], TOKENS[5], *TOKENS[-2:]]}, "tokenizer.ggml.tokens"),
        ({"tokens": [*TOKENS[:-1], "th"]}, "the"),
    ],
    ids=[
        "encoder",
        "unknown",
        "parts",
        "scaled positions",
        "rule of splitting",
        "tensor left out",
        "token twice",
        "merge without token",
    ],
)
def test_what_transformers_would_leave_out_is_refused(
    store: Store, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(ArtifactError, match=named):
        imported(write_gguf(tmp_path / "wrong.gguf", **changed))


def test_a_file_that_is_cut_off_anywhere_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for length in (8, 200, len(whole) // 2, len(whole) - 64):
        (cut := tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match="cut off or damaged"):
            read_gguf(cut)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (other := tmp_path / "model.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ArtifactError, match="begins with"):
        read_gguf(other)
    with pytest.raises(ArtifactError, match="no such file"):
        read_gguf(tmp_path / "missing.gguf")


def test_a_tokenizer_beside_the_file_is_not_taken_for_its_own(store: Store, file: Path) -> None:
    (file.parent / "tokenizer_config.json").write_text(json.dumps({"chat_template": "other", "eos_token": "the"}))
    assert load_tokenizer(imported(file)).chat_template == TEMPLATE


# ------------------------------------------------------------------------------------------------ a real file


@pytest.mark.slow
def test_a_real_model_decodes_as_transformers_own_reading(store: Store, smollm: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = imported(smollm)
    ours, tokenizer = load_model(made, dtype=torch.float32), load_tokenizer(made)
    place = {"pretrained_model_name_or_path": smollm.parent, "gguf_file": smollm.name}
    theirs = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(**place)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    asked = [
        kind.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        for kind in (tokenizer, their_tokenizer)
    ]
    assert torch.equal(asked[0]["input_ids"], asked[1]["input_ids"])
    outputs = [model.generate(**asked[0], do_sample=False, max_new_tokens=24) for model in (ours, theirs)]
    assert torch.equal(*outputs)
    assert "Paris" in tokenizer.decode(outputs[0][0, asked[0]["input_ids"].shape[1] :])


def test_without_the_package_its_installation_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'cohort-rl\[gguf\]'"):
        read_gguf(file)
