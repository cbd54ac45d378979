"""Versions against what Cohort and its packages require."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.doctor import versions
from flows.doctor.versions import declared, unmet
from stages.training.hardware import built_for_cuda
from tests.flows.doctor.subjects import subject


def install(folder: Path, name: str, version: str, *requires: str) -> None:
    """Metadata of a distribution, as an installer leaves it."""
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {x}" for x in requires),
    ]
    (place / "METADATA").write_text("\n".join(lines) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose distributions come before those that are installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    built_for_cuda.cache_clear()
    yield folder
    built_for_cuda.cache_clear()


def test_a_version_outside_the_range_and_a_pair_known_to_break_are_problems(site: Path, tmp_path: Path) -> None:
    install(site, "torch", "2.11.0")
    install(site, "prefect", "3.8.8", "fastapi<1.0.0,>=0.139.0", "httpx>=999")
    install(site, "fastapi", "0.136.3")
    install(site, "antlr4-python3-runtime", "4.9.3")
    found = {finding.check: finding for finding in versions.packages(subject(tmp_path))}
    torch, fastapi = found["package.torch"], found["package.fastapi"]
    assert (torch.severity, torch.values["installed"]) == ("problem", "2.11.0")
    assert torch.advice == "pip install 'torch<2.14,>=2.13'"
    assert (fastapi.severity, fastapi.values["wanted_by"]) == ("problem", "prefect")
    assert found["package.antlr4-python3-runtime"].severity == "problem", "reached through two extras"
    assert found["package.httpx"].severity == "warning", "another package wants it"
    assert "requirements are not met" in found["packages"].found


def test_requirements_count_where_their_marker_and_extra_apply(site: Path) -> None:
    install(site, "alpha", "1.0", "beta[fast]>=2", 'gamma; extra == "all"', 'delta; python_version < "3"')
    install(site, "beta", "2.5", 'alpha>=1; extra == "fast"', 'epsilon==4; extra == "fast"')
    missed = [(fault.owner, str(fault.requirement), fault.found) for fault in unmet("us", ["alpha", "zeta-none>1"])]
    assert missed == [("us", "zeta-none>1", None), ("beta", 'epsilon==4; extra == "fast"', None)]


@pytest.mark.parametrize("backport", [False, True])
def test_metadata_older_than_the_checkout_is_named(site: Path, tmp_path: Path, backport: bool) -> None:
    if backport:
        pytest.importorskip("importlib_metadata")  # from now on it answers in the place of the standard library
    install(site, "cohort-rl", "0.1.0", "rich", "numpy<3,>=2")
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\nname = "cohort-rl"\nrequires-python = ">=3.11"\ndependencies = ["numpy>=2,<3", "rich>=13"]\n'
    )
    found = declared(project)
    assert found is not None
    assert found.stale == ("rich>=13",)
    project.write_text('[project]\nname = "another"\n')
    installed_alone = declared(project)
    assert installed_alone is not None
    assert (installed_alone.core, installed_alone.stale) == (("rich", "numpy<3,>=2"), ())


@pytest.mark.parametrize(("cuda", "severity"), [("None", "warning"), ("'12.8'", None)])
def test_cuda_companions_are_named_with_a_cpu_build_of_torch_only(
    site: Path, tmp_path: Path, cuda: str, severity: str | None
) -> None:
    install(site, "torch", "2.13.0")
    install(site, "torchvision", "0.28.0")
    (site / "torch").mkdir()
    (site / "torch" / "version.py").write_text(
        f"from typing import Optional\ncuda: Optional[str] = {cuda}\nhip = None\n"
    )
    found = [finding.severity for finding in versions.companions(subject(tmp_path))]
    assert found == ([severity] if severity else [])
