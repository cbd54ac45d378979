"""`cohort store`: what lies there is counted once, what goes is what was said, and a run moves with all that it used."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.cli import run_command
from flows.config.recipes import arithmetic_smoke
from flows.runs.paths import Places
from flows.runs.record import RunRecord
from flows.runs.state import RunState
from flows.storage.gc import Records, needed_again, superseded
from flows.storage.usage import Inventory
from pipeline.events import recording
from pipeline.store import Store
from tests.flows.toy_training import STATE_BYTES, WEIGHT_BYTES, Toy, kept, train


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Places, Toy]:
    """A root with one recorded run of five steps, the third evaluated."""
    places = Places(tmp_path_factory.mktemp("root"))
    return places, recorded(places, "one")


def recorded(places: Places, name: str, **options: int) -> Toy:
    config = arithmetic_smoke().override({"name": name})
    record, state = RunRecord.begin(places, config, command="", engine="inline"), RunState(steps=5)
    with recording(record.log.take, state.take):
        run = train(places.open_store(), **{"steps": 5, "every": 3, **options})
    record.policy = run.policy
    record.end("finished", state)
    return run


@pytest.fixture
def here(origin: tuple[Places, Toy], tmp_path: Path) -> tuple[Places, Toy]:
    """A copy of it, by way of an archive."""
    file, copy = tmp_path / "run.tar", Places(tmp_path / "copy")
    assert run_command(["store", "export", "one", str(file), "--root", str(origin[0].root)]) == 0
    assert run_command(["store", "import", str(file), "--root", str(copy.root)]) == 0
    return copy, origin[1]


def cohort(*words: str, places: Places) -> int:
    return run_command([*words, "--root", str(places.root)])


@pytest.mark.scale
def test_a_run_that_was_moved_computes_nothing_where_it_is_now(here: tuple[Places, Toy]) -> None:
    places, run = here
    again = train(places.open_store(), steps=5, every=3)
    assert (again.policy, again.executed) == (run.policy, {})
    assert (places.runs / next(places.runs.iterdir()).name / "config.yaml").exists()


@pytest.mark.scale
def test_prune_frees_by_training_what_a_run_would_and_it_stays_cached(
    here: tuple[Places, Toy], capsys: pytest.CaptureFixture[str]
) -> None:
    places, run = here
    words = ("store", "prune", "--checkpoints", "1", "--optimizer", "2", "--rollouts", "1")
    assert cohort(*words, "--dry-run", places=places) == 0
    promised = capsys.readouterr().out.splitlines()[-1]
    store = places.open_store()
    assert {kept(store, digest) for digest in run.policies} == {"all"}
    assert cohort(*words, places=places) == 0
    freed = capsys.readouterr().out.splitlines()[-1]
    assert promised.replace("would be freed", "freed") == freed
    # 3 was evaluated, 5 is the last; 4 and 5 are the newest two, but only 5 of the newest one.
    assert [kept(store, digest) for digest in run.policies] == ["nothing", "nothing", "weights", "nothing", "all"]
    tables = [kept(store, made["rollout"]) for made in run.ledger.steps.values()]
    assert tables == ["all", "nothing", "nothing", "nothing", "all"]
    assert train(places.open_store(), steps=5, every=3).executed == {}


@pytest.mark.scale
def test_du_counts_every_type_and_every_hard_link_once(
    here: tuple[Places, Toy], capsys: pytest.CaptureFixture[str]
) -> None:
    places, run = here
    store = places.open_store()
    sizes = Inventory(store).by_kind()
    assert sizes["Checkpoint: optimizer state"] == (5, 5 * STATE_BYTES)
    trainer_state = len('{"updates": 1}')
    assert sizes["Checkpoint"] == (6, 6 * WEIGHT_BYTES + 5 * trainer_state)
    first, second = (store.folder(digest) / "model.safetensors" for digest in run.policies[:2])
    second.unlink()
    second.hardlink_to(first)
    assert Inventory(store).by_kind()["Checkpoint"][1] == 5 * WEIGHT_BYTES + 5 * trainer_state
    assert cohort("store", "du", places=places) == 0
    out = capsys.readouterr().out
    assert "Checkpoint: optimizer state" in out
    assert "4.0 kB" in out
    assert next(line for line in out.splitlines() if line.startswith("used by no run")).split()[-2:] == ["0", "B"]


@pytest.mark.scale
def test_unreferenced_takes_what_no_run_used_and_nothing_else(
    here: tuple[Places, Toy], capsys: pytest.CaptureFixture[str]
) -> None:
    places, run = here
    stray = train(places.open_store(), steps=1, seed=7)
    assert cohort("store", "prune", "--unreferenced", places=places) == 0
    store = places.open_store()
    assert kept(store, stray.policy) == "nothing"
    assert {kept(store, digest) for digest in run.policies} == {"all"}
    assert train(places.open_store(), steps=5, every=3).executed == {}


@pytest.mark.scale
def test_what_a_live_run_holds_is_left_and_the_run_named(
    here: tuple[Places, Toy], capsys: pytest.CaptureFixture[str]
) -> None:
    places, run = here
    running = places.open_store()
    with running.pins.open("long-run"):
        running.pin(run.policies[0])
        assert cohort("store", "prune", "--checkpoints", "1", places=places) == 0
        assert "1 artifacts (1.2 kB) stay: the run long-run (" in capsys.readouterr().out
        assert [kept(running, digest) for digest in run.policies[:2]] == ["all", "nothing"]
        assert cohort("store", "prune", run.policies[0][:12], places=places) == 1
        assert "is in use by the run long-run (" in capsys.readouterr().err
    assert cohort("prune", run.policies[0][:12], places=places) == 0
    assert kept(running, run.policies[0]) == "nothing"


@pytest.mark.scale
def test_forget_goes_back_far_enough_that_the_next_run_ends_the_same(
    here: tuple[Places, Toy], capsys: pytest.CaptureFixture[str]
) -> None:
    places, run = here
    assert cohort("prune", "--checkpoints", "0", "--optimizer", "0", "--rollouts", "0", places=places) == 0
    store = places.open_store()
    # 3 was evaluated and 5 is the final policy: both keep their weights, and neither its optimizer state.
    assert [kept(store, d) for d in run.policies] == ["nothing", "nothing", "weights", "nothing", "weights"]
    capsys.readouterr()
    assert cohort("forget", run.policy, places=places) == 0
    # Updates 1 to 5, and outputs, rewards and advantages of steps 2 to 5; those of step 1 are the initial policy's.
    assert "17 calls forgotten, with 16 pruned artifacts" in capsys.readouterr().out
    again = train(places.open_store(), steps=5, every=3)
    assert again.policies == run.policies
    assert again.executed == {"rollout": 4, "score": 4, "estimate_advantages": 4, "update_policy": 5}
    assert kept(store, run.policy) == "all"


def test_of_two_trainings_that_share_steps_each_keeps_its_own_newest() -> None:
    def update(result: str, policy: str) -> dict[str, object]:
        given = {"policy": {"artifact": policy}, "reference": {"artifact": "i"}}
        return {"stage": "update_policy", "result": result, "arguments": given}

    records = Records([update("a", "i"), update("b", "a"), update("c", "b"), update("x", "b"), update("y", "x")])
    gone = {part.digest for part in superseded(records, checkpoints=1, optimizer=None, rollouts=None)}
    assert gone == {"a", "b", "x"}
    gone = {part.digest for part in superseded(records, checkpoints=2, optimizer=None, rollouts=None, final=["a"])}
    assert gone == set()  # b is the second newest of one, x of the other, and a is a final policy
    assert superseded(records, checkpoints=None, optimizer=None, rollouts=None) == []
    assert needed_again(records, "y", lambda digest: None) == {"y"}


@pytest.mark.scale
def test_wrong_words_say_what_was_expected(here: tuple[Places, Toy], capsys: pytest.CaptureFixture[str]) -> None:
    places, _ = here
    assert cohort("store", "prune", places=places) == 2
    assert "--optimizer 1" in capsys.readouterr().err
    assert cohort("store", "export", "one", places=places) == 2
    assert "then a FILE.tar" in capsys.readouterr().err
    assert cohort("store", "export", "absent", str(places.root / "a.tar"), places=places) == 1
    assert "'absent' names 0 artifacts" in capsys.readouterr().err
    assert cohort("store", "verify", places=places) == 0
    assert Store(places.store).digests()
