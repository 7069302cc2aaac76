"""What takes longer than two seconds says so: with a bar where pieces can be counted, else with the time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import build, closing
from test_host_memory import FakeCudart
from tqdm.std import tqdm

from hf_lema import LemaConfig, LemaModelWrapper, progress
from hf_lema.files import base_files
from hf_lema.files.base_files import BaseFiles
from hf_lema.files.checkpoint import CheckpointIndex
from hf_lema.model import loading, placement, stores
from hf_lema.progress import time_shown
from hf_lema.runtime import host_memory
from hf_lema.runtime.host_memory import HostBuffer

MIB = 2**20
MAX_WAIT_S = 10.0


class RecordedBar(tqdm):
    """tqdm's own, with the books kept of every one that was made."""

    made: list[RecordedBar]
    shown: threading.Event

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.texts: list[str] = []
        self.settings = kwargs
        self.was_closed = False
        super().__init__(*args, **kwargs)
        self.made.append(self)

    def set_description_str(self, desc: str | None = None, refresh: bool = True) -> None:
        super().set_description_str(desc, refresh)
        self.texts.append(str(desc))
        if len(self.texts) == 2:
            self.shown.set()

    def close(self) -> None:
        super().close()
        self.was_closed = True


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[RecordedBar]:
    """The bars of the package, in the order in which they were begun."""
    monkeypatch.setattr(RecordedBar, "made", [], raising=False)
    monkeypatch.setattr(RecordedBar, "shown", threading.Event(), raising=False)
    for room in (progress, base_files, loading, placement, stores):
        monkeypatch.setattr(room, "tqdm", RecordedBar)
    return RecordedBar.made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY_S", 0.001)
    monkeypatch.setattr(progress, "REFRESH_S", 0.001)


def no_clock_runs() -> bool:
    return not any(thread.name == "hf_lema-clock" for thread in threading.enumerate())


# ---- what cannot be counted ----


def test_a_short_call_shows_nothing(bars: list[RecordedBar]) -> None:
    with time_shown("Doing"):
        assert not no_clock_runs()

    assert bars == []
    assert no_clock_runs()


@pytest.mark.usefixtures("impatient")
def test_a_long_call_shows_the_time_again_and_again_and_wipes_it_out(
    bars: list[RecordedBar], capsys: pytest.CaptureFixture[str]
) -> None:
    with time_shown("Doing"):
        assert RecordedBar.shown.wait(MAX_WAIT_S)

    (bar,) = bars
    assert bar.was_closed
    assert no_clock_runs()
    *shown, wiped, end = capsys.readouterr().err.split("\r")
    assert [text for text in shown if text.strip()] == bar.texts
    assert (wiped.strip(), end) == ("", "")


def test_the_time_is_that_since_the_call_began(
    bars: list[RecordedBar], impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([100.0, 102.4, 103.4])
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(times, 200.0)))
    with time_shown("Doing"):
        assert RecordedBar.shown.wait(MAX_WAIT_S)

    assert bars[0].texts[:2] == ["Doing: 2 s", "Doing: 3 s"]


@pytest.mark.usefixtures("impatient")
def test_a_call_that_fails_leaves_no_line_and_no_thread(bars: list[RecordedBar]) -> None:
    def fail() -> None:
        with time_shown("Doing"):
            assert RecordedBar.shown.wait(MAX_WAIT_S)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()

    assert bars[0].was_closed
    assert no_clock_runs()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("result", [0, 2], ids=["allowed", "refused"])
def test_a_long_page_lock_shows_its_time_and_is_one_range(
    result: int, bars: list[RecordedBar], monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowCudart(FakeCudart):
        def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:
            assert RecordedBar.shown.wait(MAX_WAIT_S)
            return super().cudaHostRegister(pointer, nbytes, flags)

    cudart = SlowCudart(result)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(host_memory, "clear_cuda_error", lambda: None)

    assert HostBuffer(3 * MIB).page_lock() == (result == 0)
    assert [nbytes for _, nbytes in cudart.registered] == [3 * MIB] * (result == 0)
    assert bars[0].texts[0].startswith("Page-locking 3.00 MiB of RAM: ")
    assert no_clock_runs()


# ---- what can ----


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build(num_layers=3).save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


def read_the_base(model: Path) -> None:
    BaseFiles(CheckpointIndex.open(model)).record()


def compare_the_base(model: Path) -> None:
    recorded = BaseFiles(CheckpointIndex.open(model)).record()
    RecordedBar.made.clear()
    moved = model.rename(model.with_name("moved"))
    base = BaseFiles(CheckpointIndex.open(moved))
    assert base.differences(recorded) == []


def load(model: Path) -> None:
    with closing(LemaModelWrapper.from_pretrained(str(model), LemaConfig(ram_budget="auto"))):
        pass


def wrap(model: Path) -> None:
    with closing(LemaModelWrapper.wrap(build(num_layers=3), LemaConfig(ram_budget="auto"))):
        pass


@pytest.mark.parametrize(
    ("act", "names"),
    [
        (read_the_base, ["Reading the base model"]),
        (compare_the_base, ["Reading the base model"]),
        (load, ["Loading embedding and head", "Loading layers"]),
        (wrap, ["Moving layers"]),
    ],
)
def test_a_bar_counts_all_there_is_and_waits_two_seconds(
    act: Callable[[Path], None], names: list[str], model: Path, bars: list[RecordedBar]
) -> None:
    act(model)

    assert [bar.settings["desc"] for bar in bars] == names
    for bar in bars:
        assert bar.n == bar.total > 0
        assert (bar.settings["delay"], bar.settings["leave"]) == (2, False)
        assert bar.was_closed


def test_the_base_is_counted_in_bytes_and_read_once(
    model: Path, bars: list[RecordedBar], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_files, "PIECE_BYTES", 4096)
    base = BaseFiles(CheckpointIndex.open(model))
    base.record()
    base.record()

    assert [bar.n for bar in bars] == [sum(file.nbytes for file in base.files), 0]
