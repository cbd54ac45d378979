"""`cohort show` of runs, `cohort diff`, `cohort replay`: what they say of two real runs that differ in one setting."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flows.cli import run_command
from flows.inspection.history import BETWEEN_STEPS, History, PlacedCall, find_run, history_of, placed_calls
from flows.inspection.replay import choose_call, prepare_replay
from flows.runs.ledger import Ledger, read_ledger
from flows.runs.paths import Places
from flows.runs.record import RunRecord
from pipeline.derivation.arguments import describe
from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.selection import keep_informative
from stages.tables import Advantages, Rewards, Rollouts
from tests.flows.test_cli import HEAVY, REPOSITORY

pytestmark = pytest.mark.slow
"""Two runs with their tracking, and a process of its own: half a minute."""
Say = Callable[..., tuple[int, str]]
SETTINGS = ["iterations=1", "steps=2", "sft.max_steps=2", "sft.decay_steps=1", "evaluation.every=1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root with the runs `one` and `two`, which differ in beta: that has no gradient before the second step."""
    folder = tmp_path_factory.mktemp("artifacts")
    for name, beta in (("one", 0.04), ("two", 4.0)):
        changes = [*SETTINGS, f"name={name}", f"update.objective.beta={beta}"]
        settings = [part for setting in changes for part in ("--set", setting)]
        assert run_command(["run", "arithmetic_smoke", *settings, "--engine", "inline", "--root", str(folder)]) == 0
        evict()
    yield folder
    evict()


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("COHORT_DEBUG", "0")


@pytest.fixture
def said(root: Path, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs a command in the root; gives its exit code, and what it wrote with runs of spaces made one."""

    def say(*tokens: str, root: Path = root) -> tuple[int, str]:
        capsys.readouterr()
        code = run_command([*tokens, "--root", str(root)])
        captured = capsys.readouterr()
        return code, " ".join((captured.out + captured.err).split())

    return say


def record(root: Path, name: str) -> RunRecord:
    run = find_run(Places(root), name)
    assert run is not None
    return run


def ledger(root: Path, name: str) -> Ledger:
    found = read_ledger(record(root, name).folder)
    assert found is not None
    return found


def history(root: Path, name: str = "one") -> tuple[Store, History]:
    store = Store(Places(root).store)
    return store, history_of(Places(root), store, record(root, name))


# ------------------------------------------------------------------------------------------------------------- show


def test_a_run_is_shown_with_its_settings_evaluations_and_artifacts_by_step(said: Say, root: Path) -> None:
    code, text = said("show", "two")
    assert code == 0
    assert "differs from the recipe arithmetic_smoke in" in text
    assert "update.objective.beta 0.04 4" in text
    assert "in_domain step greedy sampled Pass@2 Maj@2" in text
    for step, made in ledger(root, "two").steps.items():
        digests = [made[stage][:12] for stage in ("rollout", "score", "estimate_advantages", "update_policy")]
        assert f"{step} {' '.join(digests)}" in text


def test_a_step_is_shown_with_the_groups_that_were_learned_from(said: Say, root: Path) -> None:
    code, text = said("show", "one", "--step", "1", "-n", "4")
    assert code == 0
    with use_store(Store(root / "store")):
        made = ledger(root, "one").steps[1]
        rows = Advantages(made["estimate_advantages"]).rows()
    assert len({row["question_id"] for row in rows}) == 4
    for row in rows:
        assert row["question_id"] in text
        assert f"{row['advantage'][0]:+.3f}" in text


def test_a_step_that_is_not_there_is_an_error_that_says_which_are(said: Say) -> None:
    code, text = said("show", "one", "--step", "9")
    assert (code, "has no step 9; its steps are 1 to 2" in text) == (1, True)
    code, text = said("show", "one", "--step", "1", "--question", "none-such")
    assert (code, "no group of this table has that question_id" in text) == (1, True)


def test_a_run_that_did_not_end_is_shown_as_far_as_its_log_goes(root: Path, tmp_path: Path) -> None:
    places = Places(Path(shutil.copytree(root, tmp_path / "copy")))
    run, whole = record(places.root, "two"), ledger(places.root, "two")
    lines = run.log.file.read_bytes().splitlines(keepends=True)
    ends = [number for number, line in enumerate(lines) if line.startswith(b'{"type":"StepDone"')]
    run.log.file.write_bytes(b"".join(lines[: ends[1]]) + lines[ends[1]][:40])  # killed while the second step was noted
    (run.folder / "summary.json").unlink()
    before = sorted(path.name for path in places.store.glob("*/*/*"))
    _, found = history(places.root, "two")
    assert found.ledger.steps == {1: whole.steps[1]}
    assert "known up to step 1" in found.note
    assert list(found.ledger.calls) == list(whole.calls)[: len(found.ledger.calls)]
    assert found.points[1]["eval/in_domain/accuracy"] >= 0
    assert 2 not in found.points
    assert sorted(path.name for path in places.store.glob("*/*/*")) == before  # nothing was computed


def test_points_without_a_summary_are_those_of_the_records_that_are_left(root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    file = record(copy, "two").folder / "summary.json"
    summary = json.loads(file.read_text())["curve"]
    file.unlink()
    store, run = history(copy, "two")
    points = run.points
    assert {step: points[int(step)].items() >= part.items() for step, part in summary.items()} == dict.fromkeys(
        summary, True
    )
    for call in list(store.actions()):
        if call["stage"] == "evaluate":
            store.forget(call["result"])
    left = history(copy, "two")[1].points
    assert left[2]["reward/mean"] == points[2]["reward/mean"]
    assert "eval/in_domain/accuracy" not in left[2]


def test_every_call_of_a_run_has_its_place(root: Path) -> None:
    placed = placed_calls(ledger(root, "one"))
    by_stage = defaultdict(list)
    for call in placed:
        by_stage[call.stage].append((call.step, call.where))
    assert by_stage["update_policy"] == [(1, ""), (2, "")]
    assert by_stage["supervised_finetuning"] == [(0, BETWEEN_STEPS)]
    modes = ["in_domain/greedy", "in_domain/sampled"]
    assert by_stage["evaluate"] == [(step, mode) for step in (0, 1, 2) for mode in modes]
    assert by_stage["rollout"] == [
        (0, modes[0]), (0, modes[1]), (1, ""), (1, modes[0]), (1, modes[1]), (2, ""), (2, modes[0]), (2, modes[1])
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- diff


def test_two_runs_differ_where_their_setting_first_acts(said: Say) -> None:
    code, text = said("diff", "one", "two")
    assert code == 0
    assert "update.objective.beta 0.04 4" in text
    assert "the same for both: training questions, policy, reference, held-out set in_domain" in text
    # At step 1 policy and reference are one, and the KL term has no gradient: other calls, equal content.
    assert "equal artifacts through step 1; they part at step 2, first in update_policy" in text
    assert "supervised_finetuning 1 1 1" in text
    assert "update_policy 2 2 0 config.objective.beta 0.04 -> 4.0 (from step 1 on)" in text
    assert "rollout 8 8 3 other policy (from step 1, in_domain/greedy on)" in text


def test_two_checkpoints_differ_by_tensor_and_by_what_made_them(said: Say, root: Path) -> None:
    digests = [ledger(root, name).steps[2]["update_policy"] for name in ("one", "two")]
    code, text = said("diff", *digests, "--limit", "50")
    assert code == 0
    assert "made by update_policy from before after config.objective.beta 0.04 4.0" in text
    assert "tensors differ; all differences together have the norm" in text
    assert "model.embed_tokens.weight [" in text


def test_an_artifact_does_not_differ_from_itself_nor_compare_with_another_type(said: Say, root: Path) -> None:
    made = ledger(root, "one").steps[1]
    assert "the same content" in said("diff", made["score"], made["score"])[1]
    code, text = said("diff", made["score"], made["rollout"])
    assert (code, "of two types: their contents are not compared" in text) == (0, True)


def test_show_and_diff_import_nothing_heavy(root: Path) -> None:
    made = [ledger(root, name).steps[2] for name in ("one", "two")]
    commands = [
        ["show", "one"],
        ["show", "one", "--step", "2"],
        ["diff", "one", "two"],
        ["diff", made[0]["update_policy"], made[1]["update_policy"]],
        ["diff", made[0]["estimate_advantages"], made[1]["estimate_advantages"]],
    ]
    code = (
        "import sys; from flows.cli import run_command\n"
        f"for tokens in {commands}: assert run_command([*tokens, '--root', {str(root)!r}]) == 0\n"
        f"print('IMPORTED', *[name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "IMPORTED"


# ----------------------------------------------------------------------------------------------------------- replay


def test_replayed_advantages_are_those_of_the_other_formula(said: Say, root: Path) -> None:
    code, text = said("replay", "estimate_advantages", "--run", "one", "--step", "1", "--set", "scale=none")
    assert code == 0
    assert "config.scale 'std' 'none'" in text
    assert "rows by question_id, sample: 16 in both" in text
    store, made = Store(root / "store"), ledger(root, "one").steps[1]
    with use_store(store):
        call = [call for call in store.actions() if call["stage"] == "estimate_advantages"][-1]
        rewards = {(row["question_id"], row["sample"]): row["reward"] for row in Rewards(made["score"]).rows()}
        rows = Advantages(call["result"]).rows()
    assert call["result"] != made["estimate_advantages"]
    groups: dict[str, list[float]] = defaultdict(list)
    for (question, _), reward in rewards.items():
        groups[question].append(reward)
    for row in rows:
        group = groups[row["question_id"]]
        expected = rewards[row["question_id"], row["sample"]] - sum(group) / len(group)
        assert row["advantage"][0] == pytest.approx(expected, abs=1e-6)
    again = said("replay", "estimate_advantages", "--run", "one", "--step", "1", "--set", "scale=none")[1]
    assert "found in the store" in again


def test_every_recorded_call_is_rebuilt_with_the_arguments_it_had(root: Path) -> None:
    store, run = history(root)
    for call in placed_calls(run.ledger):
        replay = prepare_replay(store, run, call, [])
        assert {name: describe(value) for name, value in replay.arguments.items()} == replay.recorded["arguments"], call


def test_a_replay_keeps_what_the_record_does_not_hold_of_the_runs_own_settings(root: Path) -> None:
    store, run = history(root)
    patient = replace(run, config=run.config.override({"reward.deadline_s": 60.0}))
    call = choose_call(patient, "score", 1, None)
    config = prepare_replay(store, patient, call, ["truncated=as_is"]).arguments["config"]
    assert (config.deadline_s, config.truncated) == (60.0, "as_is")


def test_artifacts_are_rebuilt_in_the_containers_that_stages_take(root: Path, tmp_path: Path) -> None:
    """No stage of these runs takes lists of artifacts; `keep_informative` does."""
    store, run = history(Path(shutil.copytree(root, tmp_path / "copy")))
    made = run.ledger.steps
    outputs, rewards = ([made[step][stage] for step in (1, 2)] for stage in ("rollout", "score"))
    with use_store(store):
        kept = keep_informative(
            [Rollouts(digest) for digest in outputs], [Rewards(digest) for digest in rewards], size=4
        )
    assert kept.action is not None
    call = PlacedCall(2, "", "keep_informative", kept.action, kept.digest)
    replay = prepare_replay(store, run, call, ["size=3"])
    assert replay.arguments == {
        "outputs": [Rollouts(digest) for digest in outputs],
        "rewards": [Rewards(digest) for digest in rewards],
        "size": 3,
    }


def test_a_replay_leaves_the_run_as_it_was(said: Say, root: Path) -> None:
    before = said("show", "one", "--step", "2")[1]
    code, text = said("replay", "score", "--run", "one", "--iteration", "1", "--set", "components=[{kind: accuracy}]")
    assert code == 0
    assert "one-" in text
    assert "step 2" in text
    said("replay", "estimate_advantages", "--run", "one", "--step", "2", "--set", "kind=correct")
    assert said("show", "one", "--step", "2")[1] == before


def test_an_update_is_replayed_with_another_learning_rate_or_seed(said: Say) -> None:
    rate = "training.optimizer.learning_rate=0.01"
    code, text = said("replay", "update_policy", "--run", "one", "--step", "1", "--set", rate, "--limit", "2")
    assert code == 0
    assert "config.training.optimizer.learning_rate 0.0003 0.01" in text
    assert "more tensors differ, by less (--limit)" in text
    code, text = said("replay", "update_policy", "--run", "one", "--step", "1", "--set", "seed=5")
    assert (code, "the same content" in text) == (0, True)  # one mini-batch: the order of its questions does not count


def test_calls_of_an_evaluation_and_before_the_first_step_are_replayed(said: Say) -> None:
    place = ("--run", "one", "--step", "2", "--evaluation", "in_domain/sampled")
    code, text = said("replay", "evaluate", *place, "--set", "ks=[1]")
    assert code == 0
    assert "maj_at_2" in text
    code, text = said("replay", "sample_batch", "--run", "one", "--step", "1", "--set", "size=2")
    assert (code, "2 in both, of which 0 differ; 2 only before, 0 only after" in text) == (0, True)
    code, text = said("replay", "create_policy", "--run", "one", "--step", "0", "--set", "seed=4")
    assert (code, "config.seed 0 4" in text) == (0, True)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (("score", "--run", "three", "--step", "1"), "no run is named three"),
        (("scores", "--run", "one", "--step", "1"), "called no such stage; did you mean 'score'?"),
        (("score", "--run", "one", "--step", "9"), "called score at steps 0 to 2"),
        (("update_critic", "--run", "one", "--step", "1"), "called no such stage"),
        (("evaluate", "--run", "one", "--step", "2"), "add --evaluation in_domain/greedy or in_domain/sampled"),
        (("score", "--run", "one", "--step", "1", "--evaluation", "x"), "in_domain/greedy or in_domain/sampled"),
        (("score", "--run", "one"), "expected --step K, or --iteration I"),
        (("score", "--run", "one", "--iteration", "1", "--step", "3"), "has the steps 1 to 2"),
        (
            ("estimate_advantages", "--run", "one", "--step", "1", "--set", "scal=none"),
            "config.scal: unknown key; did you mean 'scale'?",
        ),
        (("rollout", "--run", "one", "--step", "1", "--set", "promt.suffix=x"), "did you mean 'prompt'?"),
        (("update_policy", "--run", "one", "--step", "1", "--set", "seed=x"), "seed: Input should be a valid integer"),
    ],
)
def test_a_replay_that_cannot_be_made_says_why(said: Say, tokens: tuple[str, ...], message: str) -> None:
    code, text = said("replay", *tokens)
    assert (code, message in text) == (2, True), text


def test_a_replay_of_pruned_inputs_says_which_command_recomputes_them(said: Say, root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    outputs = ledger(root, "one").steps[1]["rollout"]
    Store(copy / "store").prune(outputs)
    code, text = said("replay", "score", "--run", "one", "--step", "1", "--set", "truncated=as_is", root=copy)
    assert code == 1
    assert f"`cohort forget {outputs[:12]}` and the same run again recompute it" in text


def test_a_pruned_checkpoint_is_replayed_to_be_compared(said: Say, root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    first, second = (ledger(root, "one").steps[step]["update_policy"] for step in (1, 2))
    _, whole = said("diff", first, second, root=root)
    Store(copy / "store").prune(first)
    with pytest.warns(UserWarning, match=f"{first[:12]} is not there .* replaying update_policy"):
        code, text = said("diff", first, second, root=copy)
    assert (code, text) == (0, whole)


def test_a_pruned_checkpoint_that_cannot_be_replayed_is_compared_by_what_is_left(
    said: Say, root: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    steps = ledger(root, "one").steps
    first, second = (steps[step]["update_policy"] for step in (1, 2))
    for digest in (first, steps[1]["estimate_advantages"]):
        Store(copy / "store").prune(digest)
    code, text = said("diff", first, second, root=copy)
    assert code == 0
    assert "policy/loss" in text
    assert "contents are not compared" in text
