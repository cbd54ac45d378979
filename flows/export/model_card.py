"""Write the card of an exported model from the store's records; what is not recorded is left to fill in."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flows.config import ArithmeticData, IterativeRLConfig, PretrainedPolicy
from flows.inspection.history import History, evaluations, measures
from flows.wording import percent
from pipeline.config import flatten
from pipeline.diff import stored_tensors
from pipeline.lineage import ancestry
from pipeline.store import Store
from stages.data import QuestionFileConfig
from stages.models import Checkpoint, code_files, is_gguf, load_tokenizer
from stages.text import PromptError, encode_prompt

_AUTO: Final = {
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
}
_PRECISION: Final = "update.training.precision"
_SETTINGS: Final = (
    "seed",
    "iterations",
    "steps",
    "questions_per_step",
    "rollout.G",
    "rollout.temperature",
    "rollout.max_output_tokens",
    "update.mu",
    "update.objective.eps",
    "update.objective.beta",
    "update.training.optimizer.learning_rate",
    _PRECISION,
    "sft.epochs",
    "sft.max_steps",
)
"""Settings that a reader of the card asks for first; the whole configuration lies with the run."""


@dataclass(frozen=True)
class Origin:
    """A checkpoint, and the run it is of."""

    checkpoint: Checkpoint
    run: History | None
    """None: no recorded run used it."""
    step: int | None
    """The step whose update made it, or after which it was the policy; None: made before the first, or outside the steps."""

    @property
    def title(self) -> str:
        """Name of the run, else the beginning of the digest."""
        return self.run.record.name if self.run else self.checkpoint.digest[:12]


def model_card(store: Store, origin: Origin, folder: Path, *, dtype: str) -> str:
    """Return README.md of the exported model in `folder`, in Markdown with the hub's header."""
    hub = _arguments(store, _fetched(store, origin.checkpoint.digest))
    about = _model_rows(origin, folder, dtype)
    head = f"{_header(origin.run, 'transformers', hub.get('repository'))}\n\n# {origin.title}"
    return _joined(store, origin, head, about, hub, _how_to_load(folder, _example(origin)))


def adapter_card(store: Store, origin: Origin, folder: Path, *, base: str) -> str:
    """Return README.md of the exported adapter in `folder`.

    Args:
        base: digest of the checkpoint on which the adapter was begun. Where base_model_name_or_path of the folder is another,
            somebody has named the base model.
    """
    key = _fetched(store, origin.checkpoint.digest)
    hub, settings = _arguments(store, key), json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    named = settings["base_model_name_or_path"]
    if named == base:
        named = hub["repository"] if key and store.action(key)["result"] == base else None
    about = _adapter_rows(origin, base, folder, settings)
    head = f"{_header(origin.run, 'peft', named, 'lora')}\n\n# {origin.title}, adapter"
    return _joined(store, origin, head, about, hub, _how_to_add(named, base, _example(origin)))


def _joined(
    store: Store, origin: Origin, head: str, about: Mapping[str, str], hub: Mapping[str, Any], loading: str
) -> str:
    rows = {**about, **_run_row(origin.run, origin.step)}
    parts = [head, _table(("", ""), rows.items())]
    parts += _how_it_was_made(store, origin.checkpoint.digest, origin.run, hub)
    parts += [*_evaluated(origin.run, origin.step), loading, _LICENSE]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _example(origin: Origin) -> str | None:
    """Return a prompt as in training, `{question}` in the question's place; None where it is not known or has no braces."""
    if origin.run is None:
        return None
    tokenizer = load_tokenizer(origin.checkpoint)
    try:
        ids = encode_prompt(tokenizer, "{question}", origin.run.config.prompt)
    except PromptError:
        return None
    return str(tokenizer.decode(ids, skip_special_tokens=False))


_LICENSE: Final = """## License

Not stated: Cohort knows neither the license of the base model nor those of the data, and chooses none. Before you publish this
folder, look them up, choose a license that they permit, and write it into the header above (`license: ...`) and here."""


def _header(run: History | None, library: str, base: str | None, *tags: str) -> str:
    from huggingface_hub import ModelCardData

    kinds = ["reinforcement-learning", run.config.update.objective.kind] if run else []
    data = ModelCardData(library_name=library, tags=["cohort", *tags, *kinds], base_model=base)
    return f"---\n{data.to_yaml()}\n# license: fill in before you publish\n---"


def _model_rows(origin: Origin, folder: Path, dtype: str) -> dict[str, str]:
    tensors = stored_tensors(folder)
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = ", ".join(described.get("architectures") or [str(described.get("model_type"))])
    return {
        "checkpoint": f"`{origin.checkpoint.digest}`",
        "architecture": f"{architecture}, {sum(tensor.size for tensor in tensors.values()):,} parameters",
        "weights": f"{dtype}; trained as float32 masters",
    }


def _run_row(run: History | None, step: int | None) -> dict[str, str]:
    if run is None:
        return {}
    total = run.config.iterations * run.config.steps
    place = "made before the first step, or outside the steps" if step is None else f"after step {step} of {total}"
    return {"run": f"`{run.record.folder.name}`, {place}, started on {_date(run.record.attempts[0].start.time)}"}


def _adapter_rows(origin: Origin, base: str, folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as factors:
        values = sum(math.prod(factors.get_slice(name).get_shape()) for name in factors.keys())  # noqa: SIM118 - no mapping
    root = "sqrt(r)" if settings["use_rslora"] else "r"
    modules = ", ".join(f"`{name}`" for name in settings["target_modules"])
    return {
        "adapter of the checkpoint": f"`{origin.checkpoint.digest}`",
        "begun on the checkpoint": f"`{base}`",
        "kind": f"LoRA, r = {settings['r']}, scale {settings['lora_alpha']:g} / {root}, {values:,} parameters in float32",
        "of the matrices": modules,
    }


def _how_it_was_made(store: Store, digest: str, run: History | None, hub: Mapping[str, Any]) -> Iterator[str]:
    yield "## How it was made"
    if run is None:
        yield "No recorded run came to this checkpoint; what the store knows of it is below."
    else:
        config, objective = run.config, run.config.update.objective.kind
        yield (
            f"By Cohort, from the configuration `{config.name}`: {_base(config, hub)}"
            f"{', supervised fine-tuning' if config.sft else ''}, then `{objective}` on outputs of `{config.data_source}` with "
            f"advantages of kind `{config.advantage.kind}`; rewards from {_rewards(config)}."
        )
        flat = flatten(config.model_dump(mode="json"))
        if flat[_PRECISION] == "auto":
            flat[_PRECISION] = _computed_in(store, digest)
        yield _table(("setting", "value"), [(f"`{key}`", f"`{flat[key]}`") for key in _SETTINGS if key in flat])
        yield "Data:\n\n" + "\n".join(f"* {line}" for line in _data(config))
    calls = run.ledger.calls.keys() if run else ()
    counts = Counter(part.stage or "not made by a stage" for part in ancestry(store, digest, calls=calls).values())
    made = ", ".join(f"{count} x `{stage}`" for stage, count in sorted(counts.items(), key=lambda item: -item[1]))
    yield f"Lineage (`cohort lineage {digest[:12]}` draws it): {made}."
    versions = (store.manifest(digest).get("provenance") or {}).get("packages", {})
    if versions:
        yield "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."


def _computed_in(store: Store, digest: str) -> str:
    """Return the precision that `auto` was where the checkpoint was trained; `auto` where no training made it."""
    arguments = (store.manifest(digest).get("provenance") or {}).get("arguments", {})
    configs = (part["config"] for part in arguments.values() if isinstance(part, dict) and "config" in part)
    found = (config.get("training", {}).get("precision") for config in configs)
    return next(filter(None, found), "auto")


def _base(config: IterativeRLConfig, hub: Mapping[str, Any]) -> str:
    if hub:
        return f"the model `{hub['repository']}` at commit `{hub['revision']}`"
    if isinstance(config.policy, PretrainedPolicy):
        path = Path(config.policy.path)
        kind = "GGUF file" if is_gguf(path) else "folder"
        return f"a model from the {kind} `{path.name}` (name its origin here)"
    return f"a model of architecture `{config.policy.architecture}` made from scratch"


def _rewards(config: IterativeRLConfig) -> str:
    if config.reward_model is not None:
        return (
            "reward models trained on the rules' labels (" + ", ".join(m.kind for m in config.reward_model.models) + ")"
        )
    return "rules: " + ", ".join(f"`{part.kind}`" for part in config.reward.components)


def _data(config: IterativeRLConfig) -> Iterator[str]:
    """Yield the sets by name, without the folders they lay in."""
    data = config.data
    if isinstance(data, ArithmeticData):
        yield f"training: {data.train.count:,} questions of Cohort's built-in arithmetic world (seed {data.train.seed})"
        for name, part in data.evaluation.items():
            yield f"evaluation `{name}`: {part.count:,} held-out questions of the same world (seed {part.seed})"
        return
    yield f"training: {_set_of(data.train)}"
    for name, file in data.evaluation.items():
        yield f"evaluation `{name}`: {_set_of(file)}"
    if data.max_prompt_tokens.longer == "drop":
        yield "of every set, questions with too long a prompt were left out (`data.max_prompt_tokens`)"


def _set_of(part: QuestionFileConfig) -> str:
    if part.format == "hub":
        return f"`{part.path}` at `{part.revision}`" + (f", split `{part.split}`" if part.split else "")
    repeats = {"refuse": "", "first": ", repeated rows once", "number": ", repeated rows as often as they stand there"}
    limit = f", the first {part.limit:,}" if part.limit else ""
    return f"`{Path(part.path).name}`{limit}{repeats[part.duplicates]}"


def _evaluated(run: History | None, step: int | None) -> Iterator[str]:
    yield "## Evaluation"
    curves = evaluations(run.points) if run else {}
    rows = []
    for name, curve in curves.items():
        before, here = curve.get(0, {}), curve.get(-1 if step is None else step, {})
        rows += [
            (f"`{name}`", label, _with_interval(before, key), _with_interval(here, key))
            for label, key in measures(here).items()
        ]
    if not rows:
        yield "This checkpoint was not evaluated."
        return
    yield _table(("held-out set", "measure", "before RL", "this model"), rows)
    yield "In parentheses 95 % intervals over questions, where they were computed. Nothing else was evaluated."


def _with_interval(metrics: Mapping[str, float], key: str) -> str:
    low, high = metrics.get(f"{key}_ci_low"), metrics.get(f"{key}_ci_high")
    return percent(metrics.get(key)) + ("" if low is None or high is None else f" ({low:.3f} - {high:.3f})")


def _how_to_load(folder: Path, example: str | None) -> str:
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = (described.get("architectures") or ["ForCausalLM"])[0]
    auto = next((auto for ending, auto in _AUTO.items() if name.endswith(ending)), "AutoModelForCausalLM")
    own = bool(code_files(folder))
    trust = ", trust_remote_code=True" if own else ""
    warning = (
        "\n\nIts architecture is in the Python files of this folder, which loading runs: read them first."
        if own
        else ""
    )
    return f"""## How to load it

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
```{warning}{_prompts(example)}"""


def _how_to_add(named: str | None, base: str, example: str | None) -> str:
    made = "" if named else f" Its base is a checkpoint of Cohort's: `cohort export {base[:12]} BASE --dtype float32`."
    return f"""## How to load it

The folder has the adapter alone; the tokenizer is its base's.{made}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{named or "BASE"}")
model = PeftModel.from_pretrained(base, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("{named or "BASE"}")
```{_prompts(example)}"""


def _prompts(example: str | None) -> str:
    return f"\n\nPrompts as in training:\n\n```text\n{example}\n```" if example else ""


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def _fetched(store: Store, digest: str) -> str | None:
    """Return the key of the call that fetched a model from the hub for what came to be the checkpoint; None where none did."""
    calls = {ancestor.stage: ancestor.key for ancestor in reversed(ancestry(store, digest).values()) if ancestor.stage}
    return calls.get("fetch_checkpoint")


def _arguments(store: Store, key: str | None) -> Mapping[str, Any]:
    """Return the configuration that a call was given; empty where there was no such call."""
    found: Mapping[str, Any] = store.action(key)["arguments"]["config"]["config"] if key else {}
    return found


def _table(heads: tuple[str, ...], rows: Any) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in [heads, ("---",) * len(heads), *rows]]
    return "\n".join(line.replace("| --- ", "|---").replace("--- |", "---|") for line in lines)
