r"""Prompts as token ids: templates around a question whose text can inject nothing.

A prompt is `before + question + after`. Special and added tokens act where *we* wrote them, in `before` and `after`; in the
question they are text: a user who writes `<|im_end|>` gets those characters encoded, not a turn that ends. Between the last
token of `before` and the first of `after` everything is encoded in one piece by a copy of the tokenizer that knows no added
tokens, so that an ordinary template gives the same ids as encoding the whole string. The ids are then checked: no id of that
piece is one of a special or added token.

Also checked: that the tokenizer can express the text. Byte-level BPE drops bytes that are not in its vocabulary silently.

The paper's prompts (DeepSeekMath README) have two backslashes here: in the README's own example "\b" of "\boxed" is a
backspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self

from pydantic import Field, JsonValue, model_validator

from pipeline.config import Config
from stages.text.chat_templates import RESERVED, TOOLS, PromptError, answer_end, chat_turn, tool_turn
from stages.text.ids import Plain, encode_texts, plain_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INSTRUCTIONS: Final = {
    "raw": "",
    "deepseek_math_en": "\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "deepseek_math_zh": "\n请通过逐步推理来解答问题，并把最终答案放置于\\boxed{}中。",
}


class PromptConfig(Config):
    """Set what is around a question. The parts nest: `prefix`, chat turn, question and instruction, end of turn, `suffix`.

    `cohort prompt RECIPE --question "..."` prints what comes of it.
    """

    template: Literal["raw", "deepseek_math_en", "deepseek_math_zh"] = "raw"
    """The instruction behind the question: none, or the paper's chain-of-thought prompt in English or Chinese."""
    instruction: str | None = Field(None, min_length=1)
    """An instruction of your own in place of `template`'s, in the same turn as the question and on a line of its own: a newline
    separates the two, and nothing else. Special tokens written here act as such."""
    instruction_at: Literal["behind", "before"] = "behind"
    """Where `instruction` is: behind the question, or before it."""
    chat: Literal["none", "deepseek_math", "tokenizer"] = "none"
    """The turn around question and instruction: none, the paper's `User: ...` and `Assistant:` (no system prompt), or the
    tokenizer's own chat template with its generation prompt."""
    system: str | None = Field(None, min_length=1)
    """With `chat: tokenizer`, the system message; null: none, or what the template writes without one. A template without a
    system role is refused. Special tokens written here act as such."""
    chat_template: str | None = None
    """With `chat: tokenizer`, a Jinja template in place of the tokenizer's own: its text, or a file that ends in `.jinja`. It
    sees `messages` (one of the role `user`, before it one of the role `system` where there is one), `add_generation_prompt`,
    and `chat_template_kwargs`, in a sandbox as transformers'. Templates that read the clock or draw at random are refused."""
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """With `chat: tokenizer`, further variables of the template, such as `enable_thinking: false`. One that the template does
    not read is refused."""
    tools: tuple[Literal["python", "calculator"] | dict[str, JsonValue], ...] = ()
    """With `chat: tokenizer`, the tools that the template shows to the model: built-in ones by name, others as JSON schemas
    (`{"type": "function", "function": {"name": ...}}`). A template that shows none is refused."""
    prefix: str = ""
    """Text before everything, for example `Question: `. Special tokens written here act as such."""
    suffix: str = ""
    """Text behind everything, for example a newline or `Answer:` on a line of its own. Special tokens written here act."""

    @model_validator(mode="after")
    def _parts_are_used(self) -> Self:
        if self.chat != "tokenizer":
            for name in ("chat_template", "chat_template_kwargs", "system", "tools"):
                if getattr(self, name):
                    instead = "; or write the text as prompt.prefix" if name == "system" else ""
                    raise ValueError(
                        f"{name}: is read where chat is tokenizer, and chat is {self.chat}; set chat=tokenizer{instead}"
                    )
        for tool in self.tools:
            function = tool.get("function") if isinstance(tool, dict) else {"name": tool}
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise ValueError(
                    f'tools: expected {{"type": "function", "function": {{"name": ...}}}}, found {tool!r:.80}'
                )
        if self.instruction is not None and self.template != "raw":
            raise ValueError(
                f"instruction: replaces template's, and template is {self.template}; set template=raw or "
                "instruction=null"
            )
        if self.instruction is None and self.instruction_at != "behind":
            raise ValueError(
                "instruction_at: places an instruction, and there is none; set instruction, or leave it out"
            )
        if reserved := sorted(set(self.chat_template_kwargs) & set(RESERVED)):
            raise ValueError(
                f"chat_template_kwargs: {reserved[0]!r} cannot be given; system, instruction and chat_template are settings"
            )
        return self

    def key(self) -> dict[str, Any]:
        """Return the key: a template of one's own counts by its text, parts that are not set are not in it."""
        parts = super().key()
        for name in ("instruction", "system", "chat_template", "chat_template_kwargs", "tools"):
            if not parts[name]:
                del parts[name]
        if "instruction" not in parts:
            del parts["instruction_at"]
        return parts | ({"chat_template": self.own_template()} if "chat_template" in parts else {})

    def around(self) -> tuple[str, str]:
        """Return the instruction, as text before the question and text behind it."""
        if self.instruction is None:
            return "", INSTRUCTIONS[self.template]
        return ("", "\n" + self.instruction) if self.instruction_at == "behind" else (self.instruction + "\n", "")

    @property
    def tool_names(self) -> list[str]:
        """Return the names of the tools that the template shows."""
        return [str(tool["function"]["name"]) for tool in self.variables.get("tools", ())]

    @property
    def variables(self) -> dict[str, Any]:
        """Return what the chat template is given beyond the messages."""
        tools = [TOOLS[tool] if isinstance(tool, str) else tool for tool in self.tools]
        return self.chat_template_kwargs | ({"tools": tools} if tools else {})

    def own_template(self) -> str | None:
        """Return the text of `chat_template`, read from its file where it names one.

        Raises:
            PromptError: the file cannot be read.
        """
        given = self.chat_template
        if given is None or "{" in given or not given.endswith(".jinja"):
            return given
        file = Path(given).expanduser()
        if file.exists() and not file.is_file():  # a pipe would never end
            raise PromptError(f"prompt.chat_template: {given} is no file; name a Jinja file, or its text")
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(
                f"prompt.chat_template: {given} cannot be read ({error}); name a Jinja file, or its text"
            ) from None


def encode_prompt(tokenizer: PreTrainedTokenizerFast, question: str, config: PromptConfig) -> list[int]:
    """Encode the prompt of one question; see `encode_prompts`."""
    return encode_prompts(tokenizer, [question], config)[0]


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[str], config: PromptConfig
) -> list[list[int]]:
    """Encode the prompts of `questions`, in order.

    A beginning-of-sequence token comes first, once, if the tokenizer adds one; where a chat template is used, only the
    template decides about it, as in transformers' `apply_chat_template`.

    Raises:
        PromptError: a question holds a character the tokenizer cannot express, or the chat template is missing or unusable.
    """
    frame = _frame(tokenizer, config)
    bodies = encode_texts(tokenizer, [frame.lead + question + frame.tail for question in questions])
    return [frame.head_ids + body + frame.end_ids for body in bodies]


def prompt_text(tokenizer: PreTrainedTokenizerFast, question: str, config: PromptConfig) -> str:
    """Return the text of a prompt, special tokens by name.

    Raises:
        PromptError: as `encode_prompts`.
    """
    before, after = _around(tokenizer, config)
    start = plain_of(tokenizer).template.decode(_added_start(tokenizer, config, before), skip_special_tokens=False)
    return f"{start}{before}{question}{after}"


def turn_end(tokenizer: PreTrainedTokenizerFast, config: PromptConfig) -> int | None:
    """Return the token with which the chat template ends an answer; None: no chat template, or it writes none there.

    Raises:
        PromptError: as `encode_prompts`.
    """
    if config.chat != "tokenizer":
        return None
    text = answer_end(tokenizer, config.own_template(), config.variables)
    plain = plain_of(tokenizer)
    ids = plain.template.encode(text.lstrip(), add_special_tokens=False).ids
    return ids[0] if ids and ids[0] in plain.added else None


def encode_completions(tokenizer: PreTrainedTokenizerFast, completions: Sequence[str]) -> list[list[int]]:
    """Encode supervised targets, the end of sequence included: without it a policy never learns to stop.

    Raises:
        PromptError: a character the tokenizer cannot express, or a tokenizer without an end of sequence.
    """
    if tokenizer.eos_token_id is None:
        raise PromptError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    return [[*ids, tokenizer.eos_token_id] for ids in encode_texts(tokenizer, completions)]


class Frame(NamedTuple):
    """A template cut at its outermost added tokens: ids | text lead, what is inserted, text tail | ids."""

    head_ids: list[int]
    lead: str
    tail: str
    end_ids: list[int]


def _frame(tokenizer: PreTrainedTokenizerFast, config: PromptConfig) -> Frame:
    before, after = _around(tokenizer, config)
    return _cut(tokenizer, _added_start(tokenizer, config, before), before, after)


def tool_frame(tokenizer: PreTrainedTokenizerFast, config: PromptConfig) -> Frame:
    """Return what the chat template writes around a tool's answer: from behind the call up to the next turn.

    Raises:
        PromptError: as `tool_turn`.
    """
    return _cut(tokenizer, [], *tool_turn(tokenizer, config.own_template(), config.variables))


def _cut(tokenizer: PreTrainedTokenizerFast, start: list[int], before: str, after: str) -> Frame:
    plain = plain_of(tokenizer)
    head_ids, lead = _cut_behind_last(plain, before)
    tail, end_ids = _cut_before_first(plain, after)
    return Frame(start + head_ids, lead, tail, end_ids)


def _around(tokenizer: PreTrainedTokenizerFast, config: PromptConfig) -> tuple[str, str]:
    """Return all text before the question, and all behind it."""
    before, after = config.around()
    if config.chat == "deepseek_math":
        before, after = "User: " + before, after + "\n\nAssistant:"
    elif config.chat == "tokenizer":
        before, after = chat_turn(
            tokenizer,
            template=config.own_template(),
            system=config.system,
            lead=before,
            tail=after,
            variables=config.variables,
        )
    return config.prefix + before, after + config.suffix


def _added_start(tokenizer: PreTrainedTokenizerFast, config: PromptConfig, before: str) -> list[int]:
    """Return the beginning of sequence that precedes `before`; empty where a chat template decides, or the text has it."""
    if config.chat == "tokenizer":
        return []
    plain = plain_of(tokenizer)
    start = _start_ids(plain)
    return [] if _cut_behind_last(plain, before)[0][: len(start)] == start else start


def _cut_behind_last(plain: Plain, text: str) -> tuple[list[int], str]:
    """Return ids up to the last added token of `text`, and the text behind it."""
    encoding = plain.template.encode(text, add_special_tokens=False)
    last = max((place for place, number in enumerate(encoding.ids) if number in plain.added), default=None)
    if last is None:
        return [], text
    return encoding.ids[: last + 1], text[encoding.offsets[last][1] :]


def _cut_before_first(plain: Plain, text: str) -> tuple[str, list[int]]:
    """Return the text before the first added token of `text`, and ids from there on."""
    encoding = plain.template.encode(text, add_special_tokens=False)
    first = next((place for place, number in enumerate(encoding.ids) if number in plain.added), None)
    if first is None:
        return text, []
    return text[: encoding.offsets[first][0]], encoding.ids[first:]


def _start_ids(plain: Plain) -> list[int]:
    """Return the ids the tokenizer puts before any text: its beginning of sequence, or nothing."""
    encoding = plain.template.encode("a", add_special_tokens=True)
    mask: list[int] = encoding.special_tokens_mask
    return encoding.ids[: mask.index(0)] if 0 in mask else []
