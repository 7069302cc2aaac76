"""What is kept of a training, and its JSON lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hf_lema.measuring.records import PeakMemory, StepRecord, append_json_line, interval_figures, merged_peak
from hf_lema.units import GIB


def step_record(**figures: Any) -> StepRecord:
    names = (*PeakMemory.__dataclass_fields__, *StepRecord.__dataclass_fields__)
    values: dict[str, Any] = dict.fromkeys(names) | {"ram_rss_peak_bytes": 5, "num_steps_done": 1, "step_s": 2.0}
    return StepRecord(**(values | figures))


def test_an_interval_is_told_by_its_peaks_and_its_means() -> None:
    records = [
        step_record(step_s=1.0, num_tokens=10, vram_allocated_peak_bytes=GIB, num_demand_loads=1),
        step_record(step_s=3.0, num_tokens=30, vram_allocated_peak_bytes=2 * GIB, num_demand_loads=2),
    ]
    figures = interval_figures(records)
    assert (figures["step_s"], figures["tokens_per_s"], figures["num_demand_loads"]) == (2.0, 10.0, 3)
    assert figures["vram_allocated_peak_gib"] == 2.0
    assert "wait_per_step_s" not in figures
    assert "tokens_per_s" not in interval_figures([*records, step_record()])  # one step did not count


def test_no_record_has_no_peak() -> None:
    with pytest.raises(ValueError, match="no record"):
        merged_peak([])


def test_a_line_that_a_crash_cut_short_stays_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.jsonl"
    path.write_text('{"kind": "st')
    append_json_line(path, {"step_s": 1.0})
    append_json_line(path, {"step_s": math.nan})
    assert path.read_text().splitlines() == ['{"kind": "st', '{"step_s": 1.0}', '{"step_s": "nan"}']
