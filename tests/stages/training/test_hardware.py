"""What `auto` is on a machine, a block's peak of memory, and the order in which it adds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import ConfigError
from pipeline.store.context import Call, running
from stages.rollout.config import HFBackendConfig, VLLMBackendConfig
from stages.training import ComputeConfig, TrainingConfig, hardware
from stages.training.hardware import fixed_order, peak_memory, threads, training_device, within_quota

FLASH, WORKSPACES = "FLASH_ATTENTION_DETERMINISTIC", "CUBLAS_WORKSPACE_CONFIG"
GPU, NATIVE, EMULATED = (True, False), (False, True), (False, False)
"""Machines: whether there is a CUDA device, and whether the CPU multiplies bfloat16."""


def on(patch: pytest.MonkeyPatch, machine: tuple[bool, bool]) -> None:
    """Pretend to be on that machine."""
    cuda, native = machine
    patch.setattr(hardware, "built_for_cuda", lambda: True)
    patch.setattr(hardware, "visible_devices", lambda: ["0"] if cuda else [])
    patch.setattr(hardware, "native_bf16", lambda: native)


@pytest.mark.parametrize(
    ("machine", "precision", "attention"),
    [(GPU, "bf16", "sdpa"), (NATIVE, "bf16", "eager"), (EMULATED, "fp32", "eager")],
)
def test_auto_is_what_the_machine_computes_fast(
    monkeypatch: pytest.MonkeyPatch, machine: tuple[bool, bool], precision: str, attention: str
) -> None:
    on(monkeypatch, machine)
    auto = ComputeConfig()
    assert (auto.bf16, auto.attention_kind) == (precision == "bf16", attention)
    assert auto.key()["precision"] == precision
    assert {each(dtype="auto").key()["dtype"] for each in (HFBackendConfig, VLLMBackendConfig)} == {
        {"bf16": "bfloat16", "fp32": "float32"}[precision]
    }


@pytest.mark.parametrize("machine", [GPU, NATIVE, EMULATED])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_named_precision_is_taken_wherever_it_runs(
    monkeypatch: pytest.MonkeyPatch, machine: tuple[bool, bool], precision: str
) -> None:
    on(monkeypatch, machine)
    named = TrainingConfig.model_validate({"precision": precision, "attention": "eager"})
    assert (named.bf16, named.attention_kind, named.key()["precision"]) == (precision == "bf16", "eager", precision)


def test_another_precision_is_another_key_and_another_kernel_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for machine in (GPU, NATIVE, EMULATED):
        on(monkeypatch, machine)
        keys.append(TrainingConfig().key())
    assert keys[0] == keys[1] != keys[2]


def test_a_device_counts_only_where_torch_is_built_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, GPU)
    assert hardware.has_cuda()
    monkeypatch.setattr(hardware, "built_for_cuda", lambda: False)
    assert not hardware.has_cuda()


def test_a_driver_without_files_counts_unless_its_devices_are_hidden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on(monkeypatch, EMULATED)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(hardware, "_OTHERS", (tmp_path / "kfd",))
    assert not hardware.has_cuda()
    (tmp_path / "kfd").touch()
    assert hardware.has_cuda()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not hardware.has_cuda()


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (2.5, 2), (0.5, 1), (64.0, 8)])
def test_threads_stay_within_the_quota_of_a_container(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int
) -> None:
    monkeypatch.setattr(hardware, "cpu_quota", lambda: quota)
    assert within_quota(8) == expected


def test_auto_threads_are_torchs_within_the_quota_and_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(hardware, "cpu_quota", lambda: 1.5)
    with threads(3):  # what torch has outside
        with threads("auto"):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with threads(2):
            assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        with threads("auto"):
            assert torch.get_num_threads() == 3


def touch(mib: int) -> None:
    """Allocate memory, write to each page of it, free it."""
    np.ones(mib << 20, dtype=np.uint8)


def test_what_a_block_allocates_raises_its_peak() -> None:
    with peak_memory() as idle:
        pass
    with peak_memory() as busy:
        touch(80)
    assert busy.mib >= idle.mib + 64
    assert busy.mib < idle.mib + 200  # MiB, and not of other tests


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not reset the mark")
def test_a_later_block_does_not_inherit_the_peak_of_an_earlier_one() -> None:
    with peak_memory() as busy:
        touch(80)
    with peak_memory() as idle:
        pass
    assert idle.mib <= busy.mib - 64


def test_the_peak_of_a_block_that_fails_is_known_too() -> None:
    with pytest.raises(ZeroDivisionError), peak_memory() as peak:
        _ = 1 / 0
    assert peak.mib > 0


def test_without_a_reset_the_mark_is_the_highest_since_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    touch(80)
    monkeypatch.setattr(Path, "write_text", refuse)
    with peak_memory() as peak:
        pass
    resident_now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert peak.mib >= resident_now + 64


def order_of_sums() -> tuple[object, ...]:
    """All that decides in which order, and how exactly, a device adds."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
        os.environ.get(FLASH),
    )


FIXED = (True, False, True, False, False, "highest", "1")


@pytest.fixture
def other_settings(monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """Settings that are neither torch's defaults nor those of a fixed order."""
    monkeypatch.setenv(FLASH, "0")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("high")
    try:
        yield order_of_sums()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


def test_a_fixed_order_holds_in_its_block_only(other_settings: tuple[object, ...]) -> None:
    with fixed_order(True):
        assert order_of_sums() == FIXED
        with fixed_order(False):
            assert order_of_sums() == FIXED
    assert order_of_sums() == other_settings == (True, True, False, True, True, "high", "0")


def test_a_fixed_order_ends_with_a_block_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FLASH, raising=False)
    before = order_of_sums()
    with pytest.raises(ZeroDivisionError), fixed_order(True):
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="out of memory"), fixed_order(True):
        raise RuntimeError("out of memory")
    assert order_of_sums() == before
    assert FLASH not in os.environ


def add_in_any_order() -> None:
    """Two values for one place: torch has no fixed order for it on any device."""
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


def test_an_operation_without_a_fixed_order_is_named_with_what_to_set() -> None:
    add_in_any_order()
    before = order_of_sums()
    with pytest.raises(ConfigError, match=r"training\.deterministic: put_ .*training\.attention"), fixed_order(True):
        add_in_any_order()
    assert order_of_sums() == before


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device that has not begun, of which only the environment is looked at."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(WORKSPACES, "")
    monkeypatch.delenv(WORKSPACES)


@pytest.mark.usefixtures("gpu")
def test_cublas_gets_its_work_space_before_cuda_begins() -> None:
    assert training_device() == "cuda"
    assert os.environ[WORKSPACES] == ":4096:8"
    with fixed_order(True):
        assert order_of_sums() == FIXED


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("found", [None, ":4096:2:16:8"])
def test_a_work_space_without_a_fixed_order_is_refused(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    if found is not None:
        monkeypatch.setenv(WORKSPACES, found)
    before = order_of_sums()
    with pytest.raises(ConfigError, match=rf"{WORKSPACES}.*found {found}"), fixed_order(True):
        pytest.fail("it has begun")
    assert order_of_sums() == before


@pytest.mark.parametrize(
    ("device", "wanted", "remedy"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_only_a_gpu_without_a_fixed_order_has_a_remedy(
    request: pytest.FixtureRequest, device: str, wanted: bool, remedy: bool
) -> None:
    if device == "cuda":
        request.getfixturevalue("gpu")
    call = Call("stage", "1", {})
    with running(call), fixed_order(wanted):
        pass
    assert ("training.deterministic" in call.remedy) is remedy


def test_only_a_fixed_order_that_is_asked_for_is_part_of_the_key() -> None:
    assert "deterministic" not in TrainingConfig().key()
    assert TrainingConfig(deterministic=True).key() == TrainingConfig().key() | {"deterministic": True}
