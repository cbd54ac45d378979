"""Write the outputs that a run sampled, with their rewards and advantages, as JSON lines."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from flows.config import IterativeRLConfig
from flows.export.atif import trajectory
from flows.inspection.history import History, find_run, history_of
from flows.runs.paths import Places
from pipeline.config import ConfigError
from pipeline.event_log import LOG, read_events
from pipeline.events import StepDone
from pipeline.store import Store, StoreError
from stages.environment import parts_of
from stages.join import KEY, align, written_lengths, written_rows
from stages.models import Checkpoint, load_tokenizer
from stages.tables import Advantages, Demonstrations, Questions, Rewards, Rollouts, ToolCalls

Record = dict[str, Any]
_SAMPLING: Final = ("rollout", "continue_dialogues")
_AT_ONCE: Final = 1024
"""Rows that are plain values at a time."""


def export_completions(
    places: Places, store: Store, what: str, file: Path, *, step: int | None, force: bool, atif: bool = False
) -> int:
    """Write one JSON object for each output that the steps of a run learned from; return their number.

    With `atif` it is a trajectory (`flows/export/atif.py`). Else the keys: `run`, `step`, `policy` (which sampled; null: a
    demonstration), `question_id`, `sample`, `question`, `answer`, `prompt` (its text, special tokens by name), `messages` (the
    dialogue, where the prompt is a chat turn; else null; answers of an environment have the role `tool`), `completion`,
    `prompt_tokens`, `completion_tokens` (that the policy wrote), `truncated`, `reward`, `status`, `extracted`, `components`,
    `step_rewards`, `advantage` (of the first token; null: masked) and `token_advantages` (null where those of all tokens that
    the policy wrote are equal). No policy is read but its tokenizer, so that none is replayed.

    Args:
        what: a run by the name of its folder, or the latest of a configuration's name.
        step: only this one; None: all that the run has.
        force: replace the file.
        atif: write trajectories.

    Raises:
        ConfigError: no such run or step; a file that is there, without `force`; with it, one that holds no JSON lines; outputs,
            rewards or advantages that are gone, by their step.
    """
    record = find_run(places, what)
    if record is None:
        raise ConfigError(f"{what}: expected a run, whose completions are written; `cohort runs` lists them")
    run = history_of(places, store, record)
    events = read_events(record.folder / LOG, kinds=(StepDone,))
    done = {event.step: event for event in events if isinstance(event, StepDone)}
    if not done:
        raise ConfigError(f"{what}: no step of the run is done yet; continue it")
    if step is not None and step not in done:
        raise ConfigError(f"{what}: expected a step that is done, 1 to {max(done)}, found {step}")
    target = file.expanduser().resolve()
    _check_target(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft, count = target.with_name(f".{target.name}.{os.getpid()}"), 0
    read = _prompt_reader(store, _policies(store, done))
    try:
        with draft.open("x", encoding="utf-8") as lines:
            for number in sorted(done) if step is None else [step]:
                for line, output, calls in _outputs(store, run, done[number], read):
                    row = trajectory(line, output, calls) if atif else line
                    lines.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                    count += 1
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return count


def _check_target(target: Path, *, force: bool) -> None:
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; name a file, such as {target / 'completions.jsonl'}")
    if not target.exists():
        return
    if not force:
        raise ConfigError(f"{target} is there; name another file, or replace it with --force")
    with target.open("rb") as held:
        if held.read(1) not in (b"", b"{"):
            raise ConfigError(f"{target} holds no JSON lines that --force could replace; name another file")


def _outputs(
    store: Store, run: History, event: StepDone, read: Callable[[tuple[int, ...]], str]
) -> Iterator[tuple[Record, Record, list[Record]]]:
    """Yield for the outputs of one step, in their order: the line that is written of each, its row, and its calls."""
    try:
        calls = [store.action(key) for key in event.calls]
        made = {name: store.action(key) for name, key in event.made.items()}
        table, policy = _joined(made), _sampler(made["rollouts"], calls)
        about = _questions(calls, set(table["question_id"].to_pylist()))
        answered = _calls(made)
    except StoreError as error:
        raise ConfigError(f"step {event.step}: {error}; --step writes a step that is there") from None
    for start in range(0, table.num_rows, _AT_ONCE):
        part = table.slice(start, _AT_ONCE)
        lengths, owners = written_lengths(part).tolist(), written_rows(part)
        for row, length, written in zip(part.to_pylist(), lengths, owners, strict=True):
            question, answer = about.get(row["question_id"], (None, None))
            line = {
                "run": run.record.folder.name,
                "step": event.step,
                "policy": policy,
                "question_id": row["question_id"],
                "sample": row["sample"],
                "question": question,
                "answer": answer,
                "prompt": read(tuple(row["prompt_ids"])),
                "messages": _dialogue(run.config, question, row),
                "completion": row["text"],
                "prompt_tokens": len(row["prompt_ids"]),
                "completion_tokens": length,
                "truncated": row["finish_reason"] == "length",
                "reward": row["reward"],
                "status": row["status"],
                "extracted": row["extracted"],
                "components": dict(row["components"] or ()),
                "step_rewards": row["step_rewards"],
                **_advantages(row["advantage"], written),
            }
            yield line, row, answered.get((row["question_id"], row["sample"]), [])


def _calls(made: Mapping[str, Record]) -> dict[tuple[str, int], list[Record]]:
    """Return the calls of a step's outputs by their key."""
    found: dict[tuple[str, int], list[Record]] = {}
    for row in ToolCalls(made["toolcalls"]["result"]).rows() if "toolcalls" in made else ():
        found.setdefault((row["question_id"], row["sample"]), []).append(row)
    return found


def _joined(made: Mapping[str, Record]) -> pa.Table:
    """Return the outputs of a step with the columns of their rewards and advantages; null where a step makes none."""
    sampled = ["prompt_ids", "output_ids", "logprobs", "text", "text_ends", "turns", "finish_reason"]
    table = Rollouts(made["rollouts"]["result"]).read([*KEY, *sampled])
    wanted: list[tuple[str, type[Rewards] | type[Advantages], tuple[str, ...]]] = [
        ("rewards", Rewards, ("reward", "status", "extracted", "components", "step_rewards")),
        ("advantages", Advantages, ("advantage",)),
    ]
    for name, kind, columns in wanted:
        other = kind(made[name]["result"]).read() if name in made else kind.schema.empty_table()
        found = align(table, other.select([*KEY, *columns]), name, missing=name not in made)
        for column in columns:
            table = table.append_column(column, found[column])
    return table


def _advantages(tokens: list[float] | None, written: Sequence[bool] | None) -> dict[str, Any]:
    differ = tokens is not None and len(set(itertools.compress(tokens, written or itertools.repeat(True)))) > 1
    return {"advantage": tokens[0] if tokens else None, "token_advantages": tokens if differ else None}


def _sampler(rollouts: Record, calls: list[Record]) -> str | None:
    """Return the policy that sampled; of outputs that were selected, that of the first rollout they were selected from."""
    if rollouts["stage"] == "keep_informative":
        drawn = rollouts["arguments"]["outputs"][0]["artifact"]
        rollouts = next(call for call in calls if call["stage"] in _SAMPLING and call["result"] == drawn)
    return _artifact(rollouts, "policy") if rollouts["stage"] in _SAMPLING else None


def _questions(calls: list[Record], wanted: set[str]) -> dict[str, tuple[str, str | None]]:
    """Return text and gold answer by id, from the tables that the calls of a step were given."""
    found: dict[str, tuple[str, str | None]] = {}
    for call in calls:
        if wanted <= found.keys():
            break
        if digest := _artifact(call, "questions"):
            rows = Questions(digest).read(["question_id", "question", "answer"]).to_pylist()
        elif digest := _artifact(call, "demonstrations"):
            rows = Demonstrations(digest).read(["question_id", "question"]).to_pylist()
        else:
            continue
        found |= {row["question_id"]: (row["question"], row.get("answer")) for row in rows}
    return found


def _dialogue(config: IterativeRLConfig, question: str | None, row: Record) -> list[dict[str, str]] | None:
    """Return the messages, as the chat template is given them, and those of the output; None without a template."""
    prompt = config.prompt
    if prompt.chat != "tokenizer" or question is None:
        return None
    before, after = prompt.around()
    first = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
    asked = {"role": "user", "content": before + question + after}
    said = [{"role": "assistant" if own else "tool", "content": text} for own, text in parts_of(row)]
    return [*first, asked, *said]


def _policies(store: Store, done: Mapping[int, StepDone]) -> Iterator[str]:
    """Yield the policies of a run's steps, the latest first; all have one tokenizer."""
    for step in sorted(done, reverse=True):
        for call in map(store.action, done[step].calls):
            if call["stage"] == "update_policy":
                yield call["result"]
                yield call["arguments"]["policy"]["artifact"]


def _prompt_reader(store: Store, policies: Iterator[str]) -> Callable[[tuple[int, ...]], str]:
    """Return what decodes prompts, by the tokenizer of the first policy whose description is there; else of the last."""
    digest = ""
    for digest in policies:
        with contextlib.suppress(StoreError):
            store.path(digest, replay=False, partial=True)
            break
    tokenizer = load_tokenizer(Checkpoint(digest))

    @functools.lru_cache(maxsize=4096)
    def read(ids: tuple[int, ...]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return read


def _artifact(call: Record, parameter: str) -> str | None:
    """Return the digest of the artifact that a recorded call was given."""
    given = call["arguments"].get(parameter)
    return given.get("artifact") if isinstance(given, Mapping) else None
