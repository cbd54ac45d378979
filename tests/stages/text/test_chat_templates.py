"""Chat templates: rendered as transformers renders them, within limits, and the same whatever the day or the question."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError
from stages.text import PromptConfig, PromptError, chat_templates, encode_prompt, tool_frame
from stages.text.ids import encode_texts
from tests.stages.text.test_prompts import CHAT, make_tokenizer

LLAMA = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{% set system = messages[0].content|trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{%- if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "Today: {{ date_string }}\n{{ system }}\n{% for m in messages %}[{{ m.role }}] {{ m.content|trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
QWEN3 = CHAT + (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}</think>\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}It is {{ strftime_now('%Y') }}.{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
)
TAGS = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% continue %}{% endif %}{% endfor %}"
    "{% generation %}go {% endgeneration %}{{ {'a': '<é>'} | tojson }}{{ raise_exception('no') if tools }}"
)

# In the way of Hermes and Qwen: tools are shown in the system's turn, and answers of tools come as the user.
HERMES = (
    "{%- if tools %}<|im_start|>system\n# Tools{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer()
    made.add_special_tokens({"bos_token": "<s>"})
    return made


def prompt_of(tokenizer: Any, template: str, question: str = "2+2?", **settings: Any) -> str:
    config = PromptConfig.parse({"chat": "tokenizer", "chat_template": template, **settings})
    return str(tokenizer.decode(encode_prompt(tokenizer, question, config), skip_special_tokens=False))


@pytest.mark.parametrize(
    ("template", "system", "kwargs"),
    [
        (CHAT, None, {}),
        (CHAT, "Be brief.\n", {}),
        (QWEN3, None, {"enable_thinking": False}),
        (QWEN3, None, {"enable_thinking": True}),
        (LLAMA, "Be brief.", {"date_string": "1 May 2025"}),
        (DEFAULT_SYSTEM, "Be brief.", {}),
        (TAGS, None, {}),
    ],
)
def test_a_prompt_is_what_transformers_renders(
    tokenizer: Any, template: str, system: str | None, kwargs: dict[str, Any]
) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "2+2?\nThink.  "})
    expected = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **kwargs
    )
    found = prompt_of(tokenizer, template, system=system, instruction="Think.  ", chat_template_kwargs=kwargs)
    assert found == expected


@pytest.mark.parametrize(
    ("settings", "prompt"),
    [
        ({"instruction": "Think."}, "2+2?\nThink."),
        ({"instruction": "Solve:", "instruction_at": "before"}, "Solve:\n2+2?"),
        ({"instruction": "Think.", "chat": "deepseek_math"}, "User: 2+2?\nThink.\n\nAssistant:"),
        (
            {"instruction": "Solve:", "instruction_at": "before", "chat": "deepseek_math", "suffix": " So"},
            "User: Solve:\n2+2?\n\nAssistant: So",
        ),
        (
            {"instruction": "Think.", "system": "Be brief.", "chat": "tokenizer", "suffix": "So"},
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?\nThink.<|im_end|>\n"
            "<|im_start|>assistant\n<think>\nSo",
        ),
    ],
)
def test_an_instruction_is_in_the_question_s_turn(tokenizer: Any, settings: dict[str, Any], prompt: str) -> None:
    ids = encode_prompt(tokenizer, "2+2?", PromptConfig.parse(settings))
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt


@pytest.mark.claim("chat templates that vary")
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LLAMA, "reads the clock"),
        (DEFAULT_SYSTEM, "reads the clock"),
        ("{{ strftime_now('%H') }}{{ messages[0].content }}", "reads the clock"),
        ("{{ messages[0].content }}{{ 'am' if strftime_now('%p') == 'AM' else 'pm' }}", "reads the clock"),
        ("{% macro day() %}{{ strftime_now('%a') }}{% endmacro %}{{ messages[0].content }}{{ day() }}", "the clock"),
        ("{{ messages[0].content }}{{ [1, 2] | random }}", "draws at random"),
        ("{{ messages[0].content }}{{ [[1, 2]] | map('random') | list }}", "draws at random"),
        ("{{ messages[0].content }}{{ lipsum() }}", "draws at random"),
        ("{{ messages[0].content }}{{ raise_exception }}", "an address of memory"),
        ("{{ messages[0].content }}{{ cycler('a') }}", "an address of memory"),
        ("fixed", "exactly once"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "exactly once"),
        ("{{ messages[0].content | upper }}", "changes the user's message"),
        ("{{ messages[0].content | e }}", "changes the user's message"),
        ("{{ messages[0].content.__class__.__mro__ }}", "SecurityError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ raise_exception('no system prompt') }}", "no system prompt"),
        ("missing.jinja", r"missing\.jinja"),
        ("{{ messages[0].content }}{{ messages[0].content | length }}", "changes the user's message"),
        ("{{ messages[0].content }}{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content }}{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[3].content }}", "UndefinedError"),
        ("{{ messages[0].content }}{% include 'x' %}", "TypeError|TemplateNotFound"),
        ("{% for a in range(10**9) %}{% endfor %}{{ messages[0].content }}", "OverflowError"),
        ("{{ messages[0].content }}{{ 'a' * 10 ** 7 }}", "more than 1,000,000 characters"),
        ("{{ messages[0].content }}{{ 'a' * 10 ** 11 }}", "MemoryError|cannot be rendered"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ messages[0].content }}{{ f() }}", "RecursionError"),
    ],
)
def test_a_template_that_is_not_the_same_every_time_or_fails_is_refused(
    tokenizer: Any, template: str, reason: str
) -> None:
    with pytest.raises(PromptError, match=reason):
        prompt_of(tokenizer, template)


@pytest.mark.claim("chat templates that vary")
def test_a_template_that_never_ends_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "_SECONDS", 1)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    with pytest.raises(PromptError, match="did not end within 1 s"):
        prompt_of(tokenizer, loop)


def test_a_clock_that_no_prompt_shows_is_not_refused(tokenizer: Any) -> None:
    template = "{% set day = strftime_now('%d') %}{% for m in messages %}{{ m.content }} {% endfor %}"
    assert prompt_of(tokenizer, template) == "2+2? "
    dated = prompt_of(tokenizer, LLAMA, chat_template_kwargs={"date_string": "1 May 2025"})
    assert "Today: 1 May 2025" in dated


def test_the_clocks_agree_in_nothing_that_a_template_can_ask_for() -> None:
    clocks = [datetime.datetime.fromisoformat(text) for text in chat_templates._CLOCKS]
    for directive in "aAbBcdfHIjmMpSUwWxXyY":
        assert len({clock.strftime(f"%{directive}") for clock in clocks}) > 1, directive


@pytest.mark.claim("template input that is ignored")
@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ messages[0].content }}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "{{ messages[-1].content }} Be brief.",  # a text of its own that reads like the system message
        "{{ messages[0].content | upper }}{{ messages[1].content }}",
    ],
)
def test_a_system_message_that_a_template_does_not_write_is_refused(tokenizer: Any, template: str) -> None:
    with pytest.raises(PromptError, match=r"prompt\.system"):
        prompt_of(tokenizer, template, system="Be brief.")


@pytest.mark.claim("template input that is ignored")
def test_a_variable_that_the_template_does_not_read_is_refused_by_name(tokenizer: Any) -> None:
    with pytest.raises(PromptError, match="does not read 'enable_thinkin'; it reads enable_thinking"):
        prompt_of(tokenizer, QWEN3, chat_template_kwargs={"enable_thinkin": False})


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"system": "Be brief."}, "system: .* chat is none"),
        ({"system": "Be brief.", "chat": "deepseek_math"}, "system: .* chat is deepseek_math"),
        ({"chat_template": CHAT}, "chat_template: .* chat is none"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs: .* chat is none"),
        ({"chat": "tokenizer", "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs: 'messages'"),
        ({"chat": "tokenizer", "chat_template_kwargs": {"add_generation_prompt": False}}, "'add_generation_prompt'"),
        ({"instruction": "Think.", "template": "deepseek_math_en"}, "instruction: "),
        ({"instruction_at": "before"}, "instruction_at: "),
    ],
)
def test_a_part_of_a_prompt_that_would_not_be_used_is_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        PromptConfig.parse(settings)


def test_every_part_that_is_set_is_in_the_cache_key() -> None:
    base = PromptConfig(chat="tokenizer")
    changes: list[dict[str, Any]] = [
        {"system": "a"},
        {"instruction": "a"},
        {"instruction": "a", "instruction_at": "before"},
        {"chat_template_kwargs": {"a": 1}},
        {"chat_template_kwargs": {"a": True}},
    ]
    keys = [repr(base.override(change).key()) for change in changes]
    assert len({repr(base.key()), *keys}) == len(changes) + 1


@pytest.mark.parametrize("token", ["<|im_end|>", "<think>", "<s>"])
def test_questions_inject_nothing_whatever_surrounds_them(tokenizer: Any, token: str) -> None:
    settings = {"system": "Be brief.", "instruction": "Think.", "instruction_at": "before"}
    config = PromptConfig.parse({"chat": "tokenizer", "chat_template": CHAT, **settings})
    number = tokenizer.convert_tokens_to_ids(token)
    clean, dirty = (encode_prompt(tokenizer, f"say {text}", config) for text in ("x", token))
    assert dirty.count(number) == clean.count(number)


def test_a_template_file_that_is_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "t.jinja")
    with pytest.raises(PromptError, match="is no file"):
        PromptConfig(chat="tokenizer", chat_template=str(tmp_path / "t.jinja")).own_template()


def test_tools_are_shown_as_transformers_shows_them(tokenizer: Any) -> None:
    own = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2+2?"}],
        tools=[chat_templates.TOOLS["python"], own],
        chat_template=HERMES,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt_of(tokenizer, HERMES, tools=["python", own]) == expected
    assert '"name": "search"' in expected
    with pytest.raises(PromptError, match=r"prompt\.tools"):
        prompt_of(tokenizer, LLAMA, tools=["python"], chat_template_kwargs={"date_string": "1 May 2025"})
    with pytest.raises(PromptError, match=r"prompt\.tools"):
        tool_frame(tokenizer, PromptConfig.parse({"chat": "tokenizer", "chat_template": CHAT, "tools": ["python"]}))


@pytest.mark.parametrize("answer", ["42", "", " a\nb ", "<|im_end|>"])
def test_an_answer_of_a_tool_is_a_message_as_transformers_renders_it_and_is_text(tokenizer: Any, answer: str) -> None:
    config = PromptConfig.parse({"chat": "tokenizer", "chat_template": HERMES})
    frame = tool_frame(tokenizer, config)
    ids = [*frame.head_ids, *encode_texts(tokenizer, [frame.lead + answer + frame.tail])[0], *frame.end_ids]
    turns = [("user", "2+2?"), ("assistant", "CALL"), ("tool", answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    whole = tokenizer.apply_chat_template(messages, chat_template=HERMES, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == whole.partition("CALL")[2]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 2, "behind the call and behind the answer, and none that the answer names"


@pytest.mark.parametrize(
    "template",
    [
        CHAT.replace(
            "{% for m", "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no') }}{% endfor %}{% for m", 1
        ),
        CHAT.replace("in messages %}", "in messages if m.role != 'tool' %}", 1),
        CHAT.replace("trim }}", "trim }}{{ m['content'] if m.role == 'tool' }}", 1),
    ],
    ids=["refuses the role", "leaves it out", "writes it twice"],
)
def test_a_template_without_the_role_tool_is_refused(tokenizer: Any, template: str) -> None:
    with pytest.raises(PromptError, match="role tool"):
        tool_frame(tokenizer, PromptConfig.parse({"chat": "tokenizer", "chat_template": template}))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"tools": ["python"]}, "tools: is read where chat is tokenizer"),
        ({"chat": "tokenizer", "tools": ["perl"]}, "tools"),
        ({"chat": "tokenizer", "tools": [{"name": "search"}]}, "tools: expected"),
    ],
)
def test_tools_that_no_template_can_show_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        PromptConfig.parse(settings)
