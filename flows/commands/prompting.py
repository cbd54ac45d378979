"""`cohort prompt`: what the policy reads for a question, text and ids."""

from __future__ import annotations

from flows.commands.options import ConfigFiles, Method, Settings
from flows.config import IterativeRLConfig
from flows.config.resolve import choose
from stages.tables import Demonstrations

__all__ = ["prompt"]


def prompt(
    recipe: str, *, question: str, config: ConfigFiles = None, set_: Settings = None, method: Method = None
) -> None:
    """Print the prompt that a question becomes: its exact text, escaped, with special tokens by name, and its token ids.

    Parameters
    ----------
    recipe
        Name of a recipe or a YAML file.
    question
        Text of the question.
    config
        YAML file of overrides.
    set_
        `key=value`, for example `--set prompt.instruction="Think step by step."`.
    method
        A method (`cohort methods`) instead of the recipe's.
    """
    from flows.algorithm.data_check import scratch_store
    from flows.algorithm.models import early_tokenizer
    from stages.text import encode_prompt, plain_of, prompt_text

    chosen = choose(recipe, config or [], set_ or [], method=method).config
    with scratch_store():
        tokenizer = early_tokenizer(chosen, _demonstrations(chosen), fetch=True, exact=True).tokenizer
    text, ids = prompt_text(tokenizer, question, chosen.prompt), encode_prompt(tokenizer, question, chosen.prompt)
    special = plain_of(tokenizer).added
    print(f"text\n  {text!r}\n\nids\n  {ids}\n")
    for number in ids:
        mark = "  special" if number in special else ""
        print(f"{number:>8}  {tokenizer.decode([number], skip_special_tokens=False)!r}{mark}")
    print(f"\n{len(ids)} tokens, {sum(number in special for number in ids)} of them special")


def _demonstrations(config: IterativeRLConfig) -> Demonstrations | None:
    """What a policy made from scratch makes its tokenizer from; of a policy of others, nothing is read."""
    from flows.algorithm.data import prepare_data
    from flows.config import PretrainedPolicy

    return None if isinstance(config.policy, PretrainedPolicy) else prepare_data(config.data).demonstrations
