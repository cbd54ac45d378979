"""Fixtures of models of others: a tiny one with a tokenizer that reads text, and a place for code that transformers copies."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stages.text import CharacterTokenizerConfig, build_tokenizer
from tests.stages.training.tiny import tiny_model


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A tiny model without code."""
    made = tmp_path / "model"
    tokenizer = build_tokenizer(["what is 12 + 345 * 67890?\n####"], CharacterTokenizerConfig())
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the test's own for the code that transformers copies before it runs it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
