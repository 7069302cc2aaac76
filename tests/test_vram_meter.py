"""Device memory of this process: NVML where it sees, the whole card where it does not."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_lema.measuring import vram_meter
from hf_lema.measuring.vram_meter import AllocatorPeak, VramMeter
from hf_lema.units import GIB


class FakeNvml:
    """The part of pynvml that is used, with a list of processes."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, processes: list[Any], fails_at_init: bool = False) -> None:
        self.processes = processes
        self.fails_at_init = fails_at_init

    def nvmlInit(self) -> None:
        if self.fails_at_init:
            raise self.NVMLError("driver not loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> str:
        assert uuid == b"GPU-1234"
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        assert handle == "handle"
        return self.processes


def process(pid: int, used_bytes: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=used_bytes)


@pytest.fixture
def open_meter(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeNvml | None], VramMeter]:
    """A meter of a 16 GiB card with 10 GiB free, over a given NVML."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))

    def open_with(nvml: FakeNvml | None) -> VramMeter:
        spec = None if nvml is None else object()
        monkeypatch.setattr(vram_meter.importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return VramMeter(torch.device("cuda", 0))

    return open_with


def test_nvml_gives_the_use_of_this_process_alone(open_meter: Callable[[FakeNvml | None], VramMeter]) -> None:
    meter = open_meter(FakeNvml([process(os.getpid() + 1, 5 * GIB), process(os.getpid(), 2 * GIB)]))
    assert (meter.source, meter.read_bytes(), meter.total_bytes) == ("nvml_process", 2 * GIB, 16 * GIB)


@pytest.mark.parametrize(
    "nvml",
    [
        None,
        FakeNvml([]),
        FakeNvml([process(os.getpid() + 1, 5 * GIB)]),
        FakeNvml([process(os.getpid(), None)]),
        FakeNvml([], fails_at_init=True),
    ],
    ids=["no package", "empty list", "other processes only", "no figure", "no driver"],
)
def test_where_nvml_is_blind_the_use_of_the_card_is_read_and_named(
    nvml: FakeNvml | None, open_meter: Callable[[FakeNvml | None], VramMeter]
) -> None:
    meter = open_meter(nvml)
    assert (meter.source, meter.read_bytes()) == ("mem_get_info_device", 6 * GIB)


def test_nvml_that_goes_blind_later_is_left_with_a_warning(
    open_meter: Callable[[FakeNvml | None], VramMeter], caplog: pytest.LogCaptureFixture
) -> None:
    nvml = FakeNvml([process(os.getpid(), 2 * GIB)])
    meter = open_meter(nvml)
    nvml.processes = []
    assert meter.read_bytes() == 6 * GIB
    assert meter.source == "mem_get_info_device"
    assert "whole card" in caplog.text


def test_the_allocator_may_take_the_process_fraction_of_the_card(
    open_meter: Callable[[FakeNvml | None], VramMeter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.25)
    assert open_meter(None).allocator_limit_bytes() == 4 * GIB
    monkeypatch.setattr(torch, "__version__", "2.6.0")  # the fraction cannot be read there
    assert open_meter(None).allocator_limit_bytes() == 16 * GIB


def test_reading_the_allocator_begins_new_peaks(
    open_meter: Callable[[FakeNvml | None], VramMeter], monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = {
        "allocated_bytes.all.peak": 5,
        "reserved_bytes.all.peak": 8,
        "num_alloc_retries": 2,
        "num_ooms": 1,
    }
    resets: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    peak = open_meter(None).take_allocator_peak()
    assert peak == AllocatorPeak(allocated_bytes=5, reserved_bytes=8, num_alloc_retries=2, num_ooms=1)
    assert resets == [torch.device("cuda", 0)]


def test_there_is_no_meter_without_a_cuda_device() -> None:
    assert vram_meter.open_vram_meter(torch.device("cpu")) is None
