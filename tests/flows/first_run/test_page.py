"""The YAML of `cohort init`: it reads back as it was meant, whatever the reasons say."""

from __future__ import annotations

import yaml

from flows.first_run.page import nested, page

VALUES = {
    "name": "a-run",
    "data": {"kind": "files", "train": {"path": "q: #1.jsonl", "columns": {"question": ["body", "question"]}}},
    "prompt": {"instruction": 'End with `The answer is`: a "number"\nor 数字.'},
    "sft": None,
    "steps": 8,
    "update": {"training": {"optimizer": {"kind": "adamw", "learning_rate": 1e-5}}},
}


def test_a_page_reads_back_as_its_values() -> None:
    assert yaml.safe_load(page(["Head."], VALUES, {"data": ["Why."]})) == VALUES


def test_text_of_a_model_ends_no_comment() -> None:
    hostile = "fine\nsteps: 99\r\nname: other\x85x: 1\u2028y: 2 " + "long " * 60
    text = page([hostile], VALUES, {"steps": [hostile]})
    assert yaml.safe_load(text) == VALUES
    assert all(len(line) <= 100 for line in text.splitlines() if line.startswith("#"))


def test_dotted_keys_become_sections_in_their_order() -> None:
    made = nested({"data.kind": "files", "steps": 2, "data.path": ".", "update.training.threads": 1})
    assert made == {"data": {"kind": "files", "path": "."}, "steps": 2, "update": {"training": {"threads": 1}}}
    assert list(made) == ["data", "steps", "update"]
