"""Find what of a training is no longer needed, from the records of its stage calls, however it ended.

Checkpoints form chains: each update names the checkpoint that it continued. The newest of a chain is what training continues
from, with the optimizer's state; nothing needs the state of the earlier ones. The tables of a step (outputs, rewards,
advantages and what else its update was given) are read by that step only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pipeline.lineage import inputs
from stages.models import OPTIMIZER

Record = Mapping[str, Any]

CONTINUES: Final = {"update_policy": "policy", "update_critic": "critic", "train_reward_model": "model"}
"""Stages that train, and the parameter of the checkpoint that they go on from, with its optimizer's state."""
_PRUNED_WHOLE: Final = ("update_policy", "update_critic")
"""Stages that make a checkpoint each step; reward models are made once an iteration and all stay."""
_SAMPLERS: Final = ("rollout", "demonstrated_outputs")
_TABLES: Final = (
    *_SAMPLERS,
    "answer_calls",
    "continue_dialogues",
    "keep_informative",
    "score",
    "score_outputs",
    "combine_rewards",
    "estimate_values",
    "compare_policies",
    "score_reference",
    "estimate_advantages",
)
"""Stages whose tables one step's update was made from. No others are followed: questions, labels and models stay."""


@dataclass(frozen=True)
class Freed:
    """A payload that may go, or some of its files."""

    digest: str
    files: tuple[str, ...] | None = None
    """None: all."""


OPTIMIZER_ONLY: Final = (OPTIMIZER,)


_READ: Final = {**CONTINUES, **dict.fromkeys(_SAMPLERS, "policy"), "evaluate": "outputs"}
"""Stages, and the artifact among their arguments that is read here."""


class Records:
    """Records of stage calls by their result; one that lacks what every call of its stage is given is left out."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.by_result: dict[str, list[Record]] = {}
        for record in records:
            wanted = _READ.get(record["stage"])
            if wanted is None or wanted in dict(inputs(record["arguments"])):
                self.by_result.setdefault(record["result"], []).append(record)

    def of(self, *stages: str) -> Iterator[Record]:
        """Yield the calls of some stages, in the order in which they were given."""
        for records in self.by_result.values():
            yield from (record for record in records if record["stage"] in stages)

    def made(self, digest: str, *stages: str) -> list[Record]:
        """Return the calls of some stages that came to a digest."""
        return [record for record in self.by_result.get(digest, ()) if record["stage"] in stages]


def predecessor(record: Record) -> str:
    """Return the checkpoint that a training continued."""
    digest: str = record["arguments"][CONTINUES[record["stage"]]]["artifact"]
    return digest


def replayed_from(records: Records, digest: str, is_there: Callable[[str], bool]) -> tuple[str, int]:
    """Return the checkpoint that a training would be replayed from, and the calls from there to `digest`.

    It is the nearest that is there, or else the first of the chain, which is made again before the others.
    """
    calls = 0
    while not is_there(digest):
        made = [record for record in records.made(digest, *CONTINUES) if predecessor(record) != digest]
        if not made:
            break
        digest, calls = predecessor(made[0]), calls + 1
    return digest, calls


def step_tables(update: Record, records: Records, is_trained: Callable[[str], bool]) -> set[str]:
    """Return the tables that an update learned from.

    Empty where they were sampled by a policy that RL has not trained: other arms of an experiment have the same first outputs,
    offline methods all of them, and may not have begun.

    Args:
        update: a call of `update_policy`.
        is_trained: whether a policy came of an update.
    """
    found: set[str] = set()
    waiting = [digest for name, digest in inputs(update["arguments"]) if name != "policy"]
    while waiting:
        digest = waiting.pop()
        made = records.made(digest, *_TABLES)
        if digest in found or not made:
            continue
        if any(record["stage"] in _SAMPLERS and not is_trained(_sampler(record)) for record in made):
            return set()
        found.add(digest)
        waiting += [given for record in made for _, given in inputs(record["arguments"])]
    return found


def _sampler(record: Record) -> str:
    digest: str = record["arguments"]["policy"]["artifact"]
    return digest


def needed_again(records: Records, digest: str, freed: Callable[[str], Freed | None]) -> set[str]:
    """Return what must be computed again to get an artifact: itself, and as far back as it takes, what was freed (`freed`)."""
    found: set[str] = set()
    waiting = [digest]
    while waiting:
        result = waiting.pop()
        if result in found:
            continue
        found.add(result)
        for record in records.by_result.get(result, ()):
            for name, given in inputs(record["arguments"]):
                gone = freed(given)
                # Without its optimizer state a checkpoint serves all but who trains it further.
                if gone is not None and (gone.files is None or CONTINUES.get(record["stage"]) == name):
                    waiting.append(given)
    return found


def superseded(
    records: Records,
    *,
    checkpoints: int | None,
    optimizer: int | None,
    rollouts: int | None,
    final: Collection[str] = (),
) -> list[Freed]:
    """Return what may go when so many of the newest of each training keep weights, optimizer state and tables; None: all.

    Weights stay, whatever their age, of policies that were evaluated, that were an iteration's reference, or that are `final`.
    """
    found: dict[Freed, None] = {}
    for stage in CONTINUES:
        if optimizer is not None:
            _, rest = _newest(records, stage, optimizer)
            found |= {Freed(digest, OPTIMIZER_ONLY): None for digest in sorted(rest)}
        if checkpoints is not None and stage in _PRUNED_WHOLE:
            rest = _newest(records, stage, checkpoints)[1] - _looked_back_at(records) - set(final)
            found |= {Freed(digest): None for digest in sorted(rest)}
    if rollouts is not None:
        found |= {Freed(digest): None for digest in sorted(_old_tables(records, rollouts))}
    whole = {freed.digest for freed in found if freed.files is None}
    return [freed for freed in found if freed.files is None or freed.digest not in whole]


def is_written(record: Record) -> bool:
    """Return whether the result of a call was written, then or later; it may have been freed since."""
    return record["result"] != record.get("key") or record.get("content") is not None


def _newest(records: Records, stage: str, count: int) -> tuple[set[str], set[str]]:
    """Return the newest `count` checkpoints of every chain of a stage, and all others, of those that were written."""
    before = {(record["result"], predecessor(record)) for record in records.of(stage)}
    written = {record["result"] for record in records.of(stage) if is_written(record)}
    links: dict[str, set[str]] = {}
    for result, earlier in before:
        links.setdefault(result, set()).add(earlier)
    continued = {earlier for result, earlier in before if earlier != result}
    kept, seen = set[str](), dict[str, int]()
    waiting = [(result, count) for result in set(links) - continued]
    while waiting:
        result, left = waiting.pop()
        if left <= seen.get(result, 0) or result not in links:
            continue
        seen[result] = left
        kept.add(result)
        waiting += [(earlier, left - (result in written)) for earlier in links[result]]
    return kept & written, (set(links) & written) - kept


def _looked_back_at(records: Records) -> set[str]:
    """Return policies that were evaluated, or that later ones are compared with."""
    evaluated = {
        _sampler(sampled)
        for record in records.of("evaluate")
        for sampled in records.made(record["arguments"]["outputs"]["artifact"], "rollout")
    }
    compared = {
        digest
        for record in records.of("update_policy", "score_reference", "compare_policies")
        for name, digest in inputs(record["arguments"])
        if name == "reference"
    }
    return evaluated | compared


def _old_tables(records: Records, count: int) -> set[str]:
    recent, rest = _newest(records, "update_policy", count)
    trained = recent | rest

    def tables(policies: Iterable[str]) -> set[str]:
        updates = (record for policy in policies for record in records.made(policy, "update_policy"))
        return {digest for update in updates for digest in step_tables(update, records, trained.__contains__)}

    return tables(rest) - tables(recent)
