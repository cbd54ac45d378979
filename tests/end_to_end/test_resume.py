"""A run that is killed, extended or robbed of artifacts ends where the uninterrupted one does, with the least work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.config.recipes import arithmetic_smoke
from pipeline.residency import evict
from pipeline.store import Store, use_store
from tests.flows.short_runs import executed_by

REPOSITORY = Path(__file__).parents[2]
CALLS = {"environment": {"kind": "calculator", "opens": "C", "closes": "m"}}
"""Marks that the smallest recipe's policy, which has learned little, writes often: its outputs have several turns."""
_LARGE = {"shortest": 2, "longest": 2, "numbers": "large"}
PROGRAMS = {
    "environment": {"kind": "python", "opens": "[", "closes": "]", "before_answer": "=", "after_answer": "\n"},
    "data.demonstrations": {
        "chains": {"count": 512, **_LARGE},
        "authors": {
            "calls": 1.0,
            **dict.fromkeys(("careful", "drops_carries_and_borrows", "drops_borrows", "stops_early"), 0),
        },
    },
    "data.train": {"count": 64, **_LARGE},
    "data.evaluation": {"in_domain": {"count": 16, **_LARGE}},
    "sft.max_steps": 40,
}
"""Changes of the smallest recipe under which its policy writes products, which Python computes in its sandbox."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A store in which the smallest recipe ran to its end, and the content of its policy."""
    root = tmp_path_factory.mktemp("finished")
    with use_store(Store(root)):
        content, _ = executed_by(arithmetic_smoke())
    evict()
    return root, content


def killed(
    folder: Path, kills: int, settings: dict[str, Any], *, small: int = 2**26, patience: float = 900
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What came of an undisturbed run, and of runs that were killed at instants spread over it and then finished."""
    command = [
        sys.executable,
        "-m",
        "tests.end_to_end.killing",
        str(folder),
        str(kills),
        json.dumps(settings),
        str(small),
    ]
    single = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=single, capture_output=True, text=True, check=False, timeout=patience
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["trials"]) == kills
    return report["golden"], report["trials"]


@pytest.mark.scale
@pytest.mark.parametrize("small", [2**26, 0], ids=["written at once", "written in the background"])
def test_a_run_killed_between_checkpoints_replays_few_updates_and_samples_nothing_twice(
    tmp_path: Path, small: int
) -> None:
    kills = 12
    several = {"iterations": 1, "steps": 10, "evaluation": {"every": 0, "samples": 0}, "checkpoint.every": 7}
    golden, trials = killed(tmp_path, kills, several, small=small)
    assert {trial["content"] for trial in trials} == {golden["content"]}
    assert [trial["kept"] + trial["executed"] for trial in trials] == [golden["executed"]] * kills
    assert [trial["sampled before"] + trial["sampled"] for trial in trials] == [golden["sampled"]] * kills
    assert max(updates for trial in trials for updates in trial["replayed"]) in range(3, 8)
    assert [trial["left"] for trial in trials] == [[]] * kills


@pytest.mark.scale
def test_a_run_killed_while_it_samples_and_updates_resumes_to_the_bits_of_turns(tmp_path: Path) -> None:
    kills, lag = 12, {"overlap": 1, "update.old_logprobs": "rollout"}
    several = lag | {"iterations": 1, "steps": 10, "evaluation": {"every": 0, "samples": 0}, "checkpoint.every": 7}
    golden, trials = killed(tmp_path, kills, several, patience=3600)  # every run imports torch for its sampler
    with use_store(Store(tmp_path / "turns")):
        content, executed = executed_by(arithmetic_smoke().override(several | {"side_by_side": "never"}))
    evict()
    assert (golden["content"], golden["executed"]) == (content, len(executed))
    assert {trial["content"] for trial in trials} == {content}
    assert [trial["kept"] + trial["executed"] for trial in trials] == [golden["executed"]] * kills
    assert [trial["sampled before"] + trial["sampled"] for trial in trials] == [golden["sampled"]] * kills
    assert [trial["left"] for trial in trials] == [[]] * kills
    assert sum(trial["killed"] for trial in trials) >= 0.8 * kills - 1


@pytest.mark.claim("a resumed run that repeats questions")
@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"curriculum": {"window": 2}, "dynamic_sampling": 1}, PROGRAMS])
def test_a_run_killed_at_any_instant_resumes_to_the_same_bits(tmp_path: Path, settings: dict[str, Any]) -> None:
    kills = 10
    golden, trials = killed(tmp_path, kills, settings)
    assert {trial["content"] for trial in trials} == {golden["content"]}
    # Nothing committed before the kill was computed again; at most the stage in flight was lost.
    assert [trial["kept"] + trial["executed"] for trial in trials] == [golden["executed"]] * kills
    assert [trial["left"] for trial in trials] == [[]] * kills  # neither drafts nor processes
    assert sum(trial["killed"] for trial in trials) >= 0.8 * kills - 1  # a late instant may find the run already over
    assert len({trial["kept"] for trial in trials}) >= kills / 2  # the instants were spread over the run


def test_a_second_run_executes_nothing(finished: tuple[Path, str]) -> None:
    root, content = finished
    with use_store(Store(root)):
        assert executed_by(arithmetic_smoke()) == (content, [])


@pytest.mark.claim("lines 2, 4")
@pytest.mark.slow
def test_another_iteration_executes_the_new_steps_only(finished: tuple[Path, str]) -> None:
    root, _ = finished
    longer = arithmetic_smoke().override({"iterations": 3})
    with use_store(Store(root)):
        _, executed = executed_by(longer)
    evict()
    assert executed.count("update_policy") == longer.steps
    assert {"create_policy", "supervised_finetuning", "arithmetic_questions"}.isdisjoint(executed)


@pytest.mark.parametrize(
    "stage", ["supervised_finetuning", "rollout", "score", "estimate_advantages", "update_policy", "evaluate"]
)
@pytest.mark.parametrize("damage", ["delete", pytest.param("flip a bit", marks=pytest.mark.slow)])
def test_a_lost_or_damaged_artifact_is_recomputed_and_nothing_after_it(
    finished: tuple[Path, str], stage: str, damage: str
) -> None:
    root, content = finished
    with use_store(Store(root)) as store:
        victim = next(action for action in store.actions() if action["stage"] == stage)["result"]
        makers = [action["stage"] for action in store.actions() if action["result"] == victim]
        DAMAGES[damage](store, victim)
    with use_store(Store(root)), pytest.warns(UserWarning, match="computing it again"):
        found, executed = executed_by(arithmetic_smoke())
    evict()
    assert found == content
    # Calls that gave equal content share the object; the first to miss restores it for all of them.
    assert executed
    assert set(executed) == {stage}
    assert len(executed) <= len(makers)


def flip_a_bit(store: Store, digest: str) -> None:
    folder = store.path(digest)
    victim = max(
        (path for path in folder.iterdir() if path.name != "manifest.json"), key=lambda path: path.stat().st_size
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.chmod(0o644)
    victim.write_bytes(content)


DAMAGES: dict[str, Callable[[Store, str], Any]] = {
    "delete": lambda store, digest: shutil.rmtree(store.path(digest)),
    "flip a bit": flip_a_bit,
}
