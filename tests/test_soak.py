"""A long run stays flat, and a model that was wrapped, trained and unwrapped leaves nothing."""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PEFT_THEN_WRAP, WRAP_THEN_PEFT, build, forward_backward, prepare

from hf_lema import LemaConfig, LemaModelWrapper, StepChoices, get_streamer
from hf_lema.units import MIB

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

import random_data
import soak
from footprint import EXACT, Footprint, read_footprint, what_grew

pytestmark = pytest.mark.integration

FLAT = Footprint(
    private_bytes=100 * MIB,
    pinned_bytes=7,
    vram_allocated_bytes=5,
    vram_reserved_bytes=6,
    num_threads=3,
    num_handles=20,
)


@pytest.mark.parametrize("name", EXACT)
def test_a_figure_that_changes_by_one_is_named(name: str) -> None:
    changed = replace(FLAT, **{name: getattr(FLAT, name) + 1})

    assert what_grew([FLAT] * 8, 0) == []
    (said,) = what_grew([FLAT, changed, FLAT, FLAT], 0)
    assert said.startswith(name)


@pytest.mark.parametrize("num_before", range(1, 8))
def test_one_small_tensor_more_from_any_sample_on_is_a_fault(num_before: int) -> None:
    leaked = replace(FLAT, vram_allocated_bytes=FLAT.vram_allocated_bytes + 512)

    (said,) = what_grew([FLAT] * num_before + [leaked] * (8 - num_before), 0)
    assert said == "vram_allocated_bytes went from 5 to 517 (least 5, most 517)"


def test_private_memory_may_grow_by_what_is_stated_and_no_more() -> None:
    grown = [replace(FLAT, private_bytes=FLAT.private_bytes + i * MIB) for i in range(9)]

    assert what_grew(grown, 7 * MIB) == []  # from the median of 0 and 1 to that of 7 and 8
    (said,) = what_grew(grown, 7 * MIB - 1)
    assert said.startswith("private_bytes grew by 7.00 MiB")


def footprint_with_scalars(model: torch.nn.Module) -> Footprint:
    """The footprint; tensors of one value count as VRAM, each the 512 bytes that CUDA's allocator gives it."""
    footprint = read_footprint(model)
    num_scalars = sum(issubclass(type(found), torch.Tensor) and found.dim() == 0 for found in gc.get_objects())
    return replace(footprint, vram_allocated_bytes=512 * num_scalars)


def soaked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(soak, "NUM_SAMPLES", 10)
    monkeypatch.setattr(soak, "NUM_EVALUATIONS", 4)
    monkeypatch.setattr(random_data, "NUM_EXAMPLES", 8)  # four steps an epoch
    monkeypatch.setattr(soak, "read_footprint", footprint_with_scalars)
    output = tmp_path / "soak.json"
    options = ["--device", "cpu", "--steps", "20", "--num-layers", "2", "--tier", tier]
    code = soak.main([*options, "--folder", str(tmp_path), "--output", str(output)])
    return code, json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.parametrize("tier", ["disk", pytest.param("ram", marks=pytest.mark.slow), soak.STOCK])
def test_a_soak_trains_evaluates_saves_and_finds_the_process_flat(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, record = soaked(tmp_path, monkeypatch, tier)

    assert (code, record["faults"], record["num_steps"], record["host_tier"]) == (0, [], 20, tier)
    assert record["steps"] == [2, 5, 6, 9, 10, 13, 14, 17, 18]  # every two, but never before the first of an epoch
    assert len(record["footprints"]["num_threads"]) == 9
    assert record["footprints"]["vram_allocated_bytes"][0] > 0
    assert (record.get("disk_bytes", 0) > 0) == (tier == "disk")
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["checkpoint-15", "checkpoint-20"]


def test_a_soak_finds_files_left_open_and_one_tensor_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, kept, build_model = [], [], soak.build_model

    def leak(*_: Any) -> None:
        files.append(os.open("/dev/null", os.O_RDONLY))
        if len(files) == 15:  # of 20 steps and some evaluations
            kept.append(torch.zeros(()))

    def leaking(*args: Any) -> Any:
        model = build_model(*args)
        model.register_forward_pre_hook(leak)
        return model

    monkeypatch.setattr(soak, "build_model", leaking)
    code, record = soaked(tmp_path, monkeypatch, "disk")
    for file in files:
        os.close(file)

    assert code == 1
    vram, handles = sorted(record["faults"], reverse=True)
    assert vram.startswith("vram_allocated_bytes went from")
    assert handles.startswith("num_handles went from")
    held_bytes = record["footprints"]["vram_allocated_bytes"]
    assert held_bytes[-1] - held_bytes[0] == 512


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_a_thousand_steps_are_flat(tier: str, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--steps", "1000", "--tier", tier]
    assert soak.main([*options, "--output", str(tmp_path / "soak.json")]) == 0


def cycle(order: str, device: str) -> None:
    """One model's life under a wrap."""
    config = LemaConfig(vram_budget="min", choices=StepChoices(boundaries_in_ram=True))
    model = prepare(order, build(num_layers=2), config=config, device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for step in range(2):
        forward_backward(model, seed=step)
        optimizer.step()
        optimizer.zero_grad()
    assert get_streamer(model).pinned_bytes > 0
    assert not isinstance(LemaModelWrapper.unwrap(model), LemaModelWrapper)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_fifty_wraps_trainings_and_unwraps_leave_nothing(device: str, request: pytest.FixtureRequest) -> None:
    locked = request.getfixturevalue("page_locks").locked if device == "cpu" else {}
    footprints = []
    for i in range(50):
        cycle((WRAP_THEN_PEFT, PEFT_THEN_WRAP)[i % 2], device)
        assert locked == {}
        if i % 5 == 4:  # a garbage collection each
            footprints.append(read_footprint())
    assert what_grew(footprints[2:], MIB) == []
