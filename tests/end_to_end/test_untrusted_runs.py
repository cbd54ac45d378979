"""Files of runs that others wrote: what cannot be read hinders nothing else, and no text in them is more than text."""

from __future__ import annotations

import io
import json
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

from flows.cli import run_command
from flows.config.recipes import arithmetic_smoke
from flows.runs.paths import Places
from flows.runs.record import IMPORTED, RunRecord, check_folder, read_record, read_records, unreadable_records
from flows.runs.state import RunState
from flows.storage.gc import Records, needed_again, superseded
from flows.wording import SafeConsole, code, markdown, quoted, visible
from pipeline.event_log import LOG, EventLog
from pipeline.events import StageDone
from pipeline.store.files import write_sealed
from tests.pipeline.calls import call

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e[red]bold[/red] [link=http://x]y[/link]"


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A root with one sound run, `good`."""
    found = Places(tmp_path / "root")
    record = RunRecord.begin(found, arithmetic_smoke(), command="cohort run arithmetic_smoke", engine="inline")
    record.end("finished", RunState(steps=1))
    record.folder.rename(found.runs / "good")
    return found


def lines(places: Places, *changes: dict[str, Any]) -> str:
    """The log of the sound run, its start and its end with these changes; None: without the field."""
    found = [json.loads(line) for line in (places.runs / "good" / LOG).read_text().splitlines()]
    for number, change in enumerate(changes):
        found[number] = {key: value for key, value in (found[number] | change).items() if value is not None}
    return "".join(json.dumps(event, separators=(",", ":")) + "\n" for event in found)


def plant(places: Places, text: str, name: str = "bad") -> Path:
    """Another run, with this log."""
    folder = places.runs / name
    folder.mkdir()
    (folder / "config.yaml").write_text((places.runs / "good" / "config.yaml").read_text())
    (folder / LOG).write_text(text)
    return folder


def cohort(*words: str, places: Places) -> int:
    return run_command([*words, "--root", str(places.root)])


START: list[dict[str, Any]] = [
    {"name": 5},
    {"name": "\x1b[2J"},
    {"total_steps": "8"},
    {"total_steps": -1},
    {"time": "now"},
    {"time": -1.0},
    {"time": 1e300},
    {"pid": "1"},
    {"pid": -1},
    {"pid": 2**70},
    {"command": ["cohort"]},
    {"host": 5},
    {"overrides": {}},
    *({field: None} for field in ("time", "command", "engine", "pid", "host", "name", "type")),
]
END: list[dict[str, Any]] = [
    {"policy": "../../victim"},
    {"policy": 7},
    {"final": []},
    {"final": {"in": 0.5}},
    {"final": {"in": {"accuracy": "high"}}},
    {"best": {"in": 3}},
    {"best": {"in": ["first", 0.5]}},
    {"seconds": "1"},
    {"seconds": 1e300},
    {"status": "owned"},
    {"error": 5},
    {"executed": "many"},
]


@pytest.mark.parametrize("change", START, ids=lambda change: repr(change)[:40])
def test_a_start_of_wrong_types_makes_only_its_run_unreadable(places: Places, change: dict[str, Any]) -> None:
    folder = plant(places, lines(places, change))
    assert [record.folder.name for record in read_records(places)] == ["good"]
    assert list(unreadable_records(places)) == [folder / LOG]
    assert unreadable_records(places)[folder / LOG].startswith("line 1: ")


@pytest.mark.parametrize("change", END, ids=lambda change: repr(change)[:40])
def test_an_end_of_wrong_types_is_left_out_and_refused_in_an_archive(places: Places, change: dict[str, Any]) -> None:
    folder = plant(places, lines(places, {}, change))
    with pytest.warns(UserWarning, match="line 2 cannot be read"):
        record = read_record(folder)
    assert record is not None
    assert (record.attempts[-1].status, record.policy, record.accuracy) == ("running", "", {})
    with pytest.raises(ValueError, match="line 2: "):
        check_folder(folder)


@pytest.mark.parametrize(
    "text",
    ["", "5", "[]", "null", '"x"', "{}", "[" * 100_000, '{"name": NaN}', '{"steps": 1e999}', "\udc80", "{}\n", "\n"],
)
def test_a_log_that_is_none_makes_only_its_run_unreadable(places: Places, text: str) -> None:
    folder = plant(places, "")
    (folder / LOG).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert [record.folder.name for record in read_records(places)] == ["good"]
    assert list(unreadable_records(places)) == [folder / LOG]


def test_an_unreadable_record_stops_no_command_and_verify_reports_it(
    places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(places, lines(places, {"total_steps": "\x1b[2J"}))
    for words in (["runs"], ["show", "good"], ["store", "du"], ["store", "prune", "--unreferenced", "--dry-run"]):
        assert cohort(*words, places=places) == 0, words
    assert cohort("runs", places=places) == 0
    said = capsys.readouterr().out
    assert "good" in said
    assert f"{places.runs / 'bad' / LOG} cannot be read (line 1: total_steps: " in said
    assert cohort("verify", places=places) == 1
    assert "unreadable record" in capsys.readouterr().out


OTHERS = [
    "[]",
    "5",
    "{}",
    '{"calls": [], "steps": {}, "evaluations": []}',
    '{"../../x": "a", "b": 1}',
    "[" * 9999,
    '{"curve": 5}',
]


@pytest.mark.parametrize("text", OTHERS)
@pytest.mark.parametrize("name", ["summary.json", IMPORTED])
def test_other_files_of_a_run_may_be_of_any_shape(places: Places, name: str, text: str) -> None:
    (places.runs / "good" / "summary.json").write_text('{"curve": {}}')
    (places.runs / "good" / name).write_text(text)
    assert cohort("runs", places=places) == 0
    assert cohort("store", "du", places=places) == 0


@pytest.mark.parametrize("words", [["runs"], ["show", "good"]])
def test_escapes_and_markup_in_a_record_are_shown_as_text(
    places: Places, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy = {"final": {"[red]set": {"accuracy": 0.5}}, "before": {}, "best": {"[red]set": [1, 0.5]}}
    changes = {"command": f"cohort run {ESCAPES}"}, {"error": ESCAPES, "status": "failed", **accuracy}
    (places.runs / "good" / LOG).write_text(lines(places, *changes))
    assert cohort(*words, places=places) == 0
    said = capsys.readouterr().out
    assert not [letter for letter in said if letter not in "\n" and not letter.isprintable()]
    expected = "[red]set" if words == ["runs"] else r"\x9b31m\u202e[red]bold[/red] [link="
    assert expected in "".join(said.split("\n")).replace("  ", "")


def test_text_of_others_is_spelled_where_it_cannot_be_seen() -> None:
    assert visible("a\tb\nc é 数 🙂 ３") == "a\tb\nc é 数 🙂 ３"
    assert visible("\x1b\x07\r\x00\x9b\u202e\u200b\u2028\ud800") == r"\x1b\x07\r\x00\x9b\u202e\u200b\u2028\ud800"
    assert quoted("[red]\x1b") == r"\[red]\x1b"
    assert markdown("![a](b) <i>`x`|y\n* z_1\x1b") == r"!\[a\](b) \<i\>\`x\`\|y \* z_1\\x1b"
    assert code("a `b`\n| c\x1b") == r"`a 'b' \| c\x1b`"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_safe_console_writes_no_control_character_but_its_own(terminal: bool) -> None:
    file = io.StringIO()
    colours = "standard" if terminal else None
    console = SafeConsole(file=file, force_terminal=terminal, color_system=colours, width=200, highlight=False)
    console.print(f"[bold]{quoted(ESCAPES)}[/]", soft_wrap=True)
    console.print(ESCAPES, markup=False, style="dim")
    table = Table("heading")
    table.add_row(Text(ESCAPES))
    console.print(table)
    written = file.getvalue()
    for own in ("\x1b[1m", "\x1b[2m", "\x1b[0m"):
        written = written.replace(own, "")
    assert not [letter for letter in written if letter != "\n" and not letter.isprintable()]
    assert r"\x1b[2J\x1b]0;owned\x07" in written
    assert terminal is ("\x1b[1m" in file.getvalue())


# ------------------------------------------------------------------------------------------------ imports


def archive(folder: Path, **files: str) -> Path:
    """An archive with one run, `gift`, of these files (`events_jsonl`: events.jsonl)."""
    contents = {f"runs/gift/{name.replace('_', '.')}": text.encode() for name, text in files.items()}
    index = {name: {"size": len(text), "sha256": sha256(text).hexdigest()} for name, text in contents.items()}
    write_sealed(folder / "index", {"layout": 1, "files": index})
    with tarfile.open(folder / "gift.tar", "w") as tar:
        for name, text in {**contents, "index.json": (folder / "index").read_bytes()}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    (folder / "index").unlink()
    return folder / "gift.tar"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("events_jsonl", "[]\n"),
        ("events_jsonl", ""),
        ("events_jsonl", '{"type":"StageDone","number":1,"time":1.0,"attempt":"00000000","stage":"update_policy"}\n'),
        ("code_py", "raise SystemExit"),
        ("code_so", ""),
    ],
)
def test_an_archive_with_a_run_that_no_run_writes_is_refused(
    places: Places, tmp_path: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = archive(tmp_path, config_yaml="name: gift\n", **{name: text})
    assert cohort("store", "import", str(file), places=places) == 1
    assert "is not as a run leaves it" in capsys.readouterr().err.replace("\n", " ")
    assert not (places.runs / "gift").exists()


def test_a_repair_runs_no_configuration_that_was_imported(
    places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = EventLog(places.runs / "good")
    log.append(StageDone("update_policy", "c" * 64, "d" * 64, 1.0, cached=False))
    known = log.file.read_text()
    config = (places.runs / "good" / "config.yaml").read_text()
    file = archive(tmp_path, config_yaml=config, events_jsonl=known)
    (places.runs / "good").rename(tmp_path / "good")
    assert cohort("store", "import", str(file), places=places) == 0
    store = places.open_store()
    store.record("a" * 64, call("d" * 64))
    assert cohort("verify", "--repair", places=places) == 0
    assert "gift was imported, and its configuration is not yours" in capsys.readouterr().out
    assert (places.runs / "gift" / LOG).read_text() == known


# ------------------------------------------------------------------------------------------------ records of calls


@pytest.mark.parametrize("stage", ["update_policy", "update_critic", "train_reward_model", "rollout", "evaluate"])
@pytest.mark.parametrize("arguments", [{}, {"policy": 5}, {"outputs": {"artifact": None}}, {"model": []}])
def test_a_call_that_was_given_nothing_stops_no_one_from_freeing(stage: str, arguments: dict[str, Any]) -> None:
    foreign = {"key": "a" * 64, **call("d" * 64, stage=stage, arguments=arguments)}
    records = Records([foreign])
    assert superseded(records, checkpoints=1, optimizer=1, rollouts=1) == []
    assert needed_again(records, "d" * 64, lambda digest: None) == {"d" * 64}
