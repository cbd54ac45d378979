"""Two ranks that share a batch unevenly end where one rank does that has all of it, under every ZeRO stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.store import Store, use_store
from stages.models import Checkpoint, plain_folder
from stages.training.loop import publish
from stages.training.torch_engine import TorchEngine
from tests.stages.training import rank_process
from tests.stages.training.rank_process import RANKS, SPLITS, STAGES, config
from tests.stages.training.tiny import assert_close, random_rows, tiny_checkpoint, update

pytestmark = pytest.mark.engines

DEADLINE = 900
"""Seconds until both ranks are killed."""


class Trained(NamedTuple):
    """What the two ranks report, and what one rank did in their place."""

    store: Store
    ranks: list[dict[str, Any]]
    norms: list[float]
    checkpoints: list[Checkpoint]
    sft: dict[str, float]
    grpo: dict[str, Any]
    half: dict[str, dict[str, Any]]
    """In bfloat16, by what is trained."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("ranks")
    store = Store(folder / "store")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with use_store(store):
        start = tiny_checkpoint()
        (folder / "start").write_text(start.digest)
        processes = [_start(folder, rank) for rank in range(RANKS)]
        single = TorchEngine(start, config(None))
        norms, checkpoints = [], []
        for _ in SPLITS:
            norms.append(update(single, random_rows(7)).grad_norm)
            checkpoints.append(publish(single))
        sft = rank_process.finetune(TorchEngine(start, config(None)))
        grpo = rank_process.improve(TorchEngine(start, config(None)))
        half = {
            name: rank_process.score(TorchEngine(start, how)) for name, how in rank_process.half_configs(None).items()
        }
        ranks = _finish(folder, processes)
    torch.set_num_threads(threads)
    return Trained(store, ranks, norms, checkpoints, sft, grpo, half)


def _start(folder: Path, rank: int) -> subprocess.Popen[bytes]:
    project = Path(__file__).parents[3]
    surroundings = {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (folder / f"rank{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, rank_process.__file__, str(folder), str(rank)],
            env=os.environ | surroundings,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _finish(folder: Path, processes: list[subprocess.Popen[bytes]]) -> list[dict[str, Any]]:
    """The reports of both ranks; both are killed at the deadline, or as soon as one fails."""
    end = time.monotonic() + DEADLINE
    try:
        while any(process.poll() is None for process in processes):
            assert time.monotonic() < end, f"the ranks are not done after {DEADLINE} s"
            if any(process.returncode for process in processes):
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(RANKS))
    assert [process.returncode for process in processes] == [0] * RANKS, logs
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def _tensors(trained: Trained, digest: str, file: str) -> dict[str, torch.Tensor]:
    with use_store(trained.store), plain_folder(Checkpoint(digest).path) as folder:
        stored: dict[str, torch.Tensor] = load_file(folder / file)
    return stored


@pytest.mark.parametrize("stage", STAGES)
def test_both_ranks_report_the_gradient_norm_of_the_whole_batch(trained: Trained, stage: int) -> None:
    for rank in trained.ranks:
        assert [step["norm"] for step in rank[str(stage)]["updates"]] == pytest.approx(trained.norms, rel=1e-6)
    assert 1.0 < min(trained.norms) <= max(trained.norms) < 2.0, "clipped at 1, which half of it (a mean) would not be"


@pytest.mark.claim("means of micro-batch means", "ZeRO 3 that trains a part")
@pytest.mark.parametrize("update_number", range(len(SPLITS)))
@pytest.mark.parametrize("stage", STAGES)
def test_parameters_equal_those_of_one_rank_after_every_update(
    trained: Trained, stage: int, update_number: int
) -> None:
    digest = trained.ranks[0][str(stage)]["updates"][update_number]["digest"]
    with use_store(trained.store):
        assert_close(Checkpoint(digest), trained.checkpoints[update_number])


@pytest.mark.parametrize("stage", STAGES)
def test_the_checkpoint_of_two_ranks_is_that_of_one(trained: Trained, stage: int) -> None:
    digests = [rank[str(stage)]["updates"][-1]["digest"] for rank in trained.ranks]
    assert digests[0] == digests[1]
    found, expected = Checkpoint(digests[0]), trained.checkpoints[-1]
    with use_store(trained.store):
        assert_close(found, expected, "optimizer.safetensors")
        folders = [found.path, expected.path]
        assert len({tuple(sorted(file.name for file in folder.iterdir())) for folder in folders}) == 1
        assert len({(folder / "trainer_state.json").read_text() for folder in folders}) == 1


@pytest.mark.claim("NaN on one rank")
@pytest.mark.parametrize("stage", STAGES)
def test_nan_on_one_rank_skips_the_step_on_all(trained: Trained, stage: int) -> None:
    for rank in trained.ranks:
        after = rank[str(stage)]["nan"]
        assert (after["skipped"], after["finite"], after["count"]) == (True, False, 1)
    weights = _tensors(trained, trained.ranks[0][str(stage)]["nan"]["digest"], "model.safetensors")
    before = _tensors(trained, trained.ranks[0][str(stage)]["updates"][-1]["digest"], "model.safetensors")
    assert all(tensor.equal(before[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("stage", STAGES)
def test_sft_on_two_ranks_has_the_loss_and_gradient_of_one(trained: Trained, stage: int) -> None:
    for rank in trained.ranks:
        assert rank[str(stage)]["sft"] == pytest.approx(trained.sft, rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_float32_logits_in_bf16_on_two_ranks_are_those_of_one(trained: Trained, stage: int) -> None:
    """ZeRO 3 adds biases in float32; gradients differ by what products in bfloat16 round."""
    for name, expected in trained.half.items():
        for rank in trained.ranks:
            found = torch.tensor(rank[str(stage)][name]["logprobs"])
            apart = (found - torch.tensor(expected["logprobs"])).abs().max()
            assert apart <= (1e-6 if stage < 3 else 1e-2)
            assert rank[str(stage)][name]["norm"] == pytest.approx(expected["norm"], rel=1e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_knows_its_place_and_numbers_are_summed_over_ranks(trained: Trained, stage: int) -> None:
    assert [rank[str(stage)]["place"] for rank in trained.ranks] == [[0, 2], [1, 2]]
    assert [rank[str(stage)]["total"] for rank in trained.ranks] == [1.5, 1.5]


def test_plain_torch_refuses_to_be_one_of_several_ranks(trained: Trained) -> None:
    for number, rank in enumerate(trained.ranks):
        assert f"expected one process, found rank {number} of 2" in rank["torch"]
        assert "set training.engine.kind to deepspeed" in rank["torch"]


@pytest.mark.claim("ranks on different paths")
@pytest.mark.parametrize("stage", STAGES)
def test_policy_updates_on_two_ranks_are_those_of_one(trained: Trained, stage: int) -> None:
    for rank in trained.ranks:
        assert rank[str(stage)]["grpo"]["metrics"] == pytest.approx(trained.grpo["metrics"], rel=1e-6)
    # The gradients, as AdamW's first moments have them: what it then does to parameters also magnifies their rounding.
    found, expected = (
        torch.cat([tensor.flatten() for name, tensor in sorted(moments.items()) if name.endswith("/exp_avg")])
        for moments in (
            _tensors(trained, digest, "optimizer.safetensors")
            for digest in (trained.ranks[0][str(stage)]["grpo"]["digest"], trained.grpo["digest"])
        )
    )
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "an adapter"])
def test_weights_that_travel_in_half_change_no_bit_of_zero_3(trained: Trained, adapter: bool) -> None:
    """Matrices of linear layers are nine tenths of it; the rest, and all of the other run, travels in float32."""
    if adapter:
        pytest.importorskip("peft")
    for rank in trained.ranks:
        half, whole = rank[f"gathers {adapter}"]
        assert (half["digests"], half["norms"]) == (whole["digests"], whole["norms"])
        assert len(set(half["digests"])) == 2
        assert set(whole["sent"]) == {"torch.float32"}
        assert sum(half["sent"].values()) == whole["sent"]["torch.float32"]
        assert half["sent"]["torch.bfloat16"] > 0.9 * whole["sent"]["torch.float32"]


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "an adapter"])
def test_zero_3_hands_weights_over_one_at_a_time(trained: Trained, tmp_path: Path, adapter: bool) -> None:
    if adapter:
        pytest.importorskip("peft")
    (first, _), (second, _) = (rank[f"gathers {adapter}"] for rank in trained.ranks)
    handed = trained.store.root.parent / f"handed {adapter}" / "model.safetensors"
    whole = _tensors(trained, first["digests"][-1], "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in whole.items()}, tmp_path / "expected", metadata={"format": "pt"}
    )
    assert handed.read_bytes() == (tmp_path / "expected").read_bytes()
    largest = max(4 * tensor.numel() for tensor in whole.values())
    assert second["grown"] <= 3 * largest
    limit = (5 if adapter else 3) * largest  # a weight, its change, their sum, the sum before, the next weight
    assert first["grown"] - handed.stat().st_size <= limit, "apart from the file, which is memory"
    assert 10 * largest < sum(4 * tensor.numel() for tensor in whole.values())


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "an adapter"])
def test_ranks_that_have_no_room_for_weights_go_on_together(trained: Trained, adapter: bool) -> None:
    if adapter:
        pytest.importorskip("peft")
    assert [rank[f"gathers {adapter}"][0]["ranks without room"] for rank in trained.ranks] == [2.0, 2.0]
