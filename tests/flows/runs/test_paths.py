"""Where the data lies as the environment says: a root, a store elsewhere, a store that several machines share."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from flows.doctor.places import shared
from flows.runs.paths import Places
from pipeline.config import ConfigError
from tests.pipeline.calls import call


def test_a_root_behind_a_url_is_refused_with_the_way_to_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for root in (Path("s3://bucket/x"), None):
        monkeypatch.setenv("COHORT_ROOT", "s3://bucket/x")
        with pytest.raises(ConfigError, match=r"COHORT_STORE=s3://bucket/folder"):
            Places.under(root)


def test_cohort_store_moves_the_store_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places.under(tmp_path)
    assert (places.store, places.upstream) == (tmp_path / "store", None)
    monkeypatch.setenv("COHORT_STORE", str(tmp_path / "elsewhere"))
    assert (places.store, places.upstream) == (tmp_path / "elsewhere", None)
    monkeypatch.setenv("COHORT_STORE", f"file://{tmp_path}/shared")
    assert (places.store, places.upstream) == (tmp_path / "store", f"file://{tmp_path}/shared")
    assert places.runs == tmp_path / "runs"
    store = places.open_store()
    digest = store.publish(lambda folder: (folder / "a").touch(), about={})
    assert not (tmp_path / "shared").exists()  # nothing is asked before it is needed
    store.record("a" * 64, call(digest))
    files = [path.relative_to(tmp_path / "shared") for path in (tmp_path / "shared").rglob("*") if path.is_file()]
    assert sorted({file.parts[0] for file in files}) == ["actions", "objects", "store.json"]


def test_the_doctor_writes_to_the_shared_store_and_names_what_is_wrong(tmp_path: Path) -> None:
    found = shared(f"file://{tmp_path}/shared")
    assert (found.severity, found.values["skew"]) == ("ok", pytest.approx(0.0, abs=2.0))
    assert "no store yet; written, listed and deleted" in found.found
    assert [path for path in (tmp_path / "shared").rglob("*") if path.is_file()] == []
    assert shared("nope://x").severity == "problem"
    if os.geteuid():  # root may write everywhere
        (tmp_path / "shared").chmod(0o500)
        assert "access is denied" in shared(f"file://{tmp_path}/shared").found


@pytest.mark.parametrize("name", ["plain", "a b é#1%20", "it's", 'a"b', "$(touch x)", "a;b", "~", "-x"])
def test_a_command_that_is_suggested_reads_the_root_back_whatever_its_name(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    words = shlex.split(f"cohort ui{Places(root).option()}")
    assert words == ["cohort", "ui", "--root", str(root)]
