"""Suites of measurements: read strictly, run apart, judged by their targets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

import bench_step  # noqa: E402
import bench_suite  # noqa: E402
from bench_suite import Run, figures, judged, measure, read_suite, table  # noqa: E402

from hf_lema import StepChoices  # noqa: E402

SUITES = sorted((RECIPES / "suites").glob("*.json"))
GIB = 2**30


def record(step_s: float, vram_gib: float, **more: Any) -> dict[str, Any]:
    return {
        "step_median_s": step_s,
        "vram_allocated_peak_bytes": vram_gib * GIB,
        "vram_reserved_peak_bytes": 1.2 * vram_gib * GIB,
        "ram_private_above_baseline_peak_bytes": 3 * GIB,
    } | more


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_run_of_a_suite_is_one_that_can_be_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in read_suite(path):
        options = [*run.options, "--device", "cuda"]
        args = bench_step.parse_arguments(options)
        assert args.choices is None or StepChoices(**json.loads(args.choices))
        assert run.targets or run.against or run.name.startswith(("peft", "qlora", "1 x 512"))


def test_a_run_is_compared_and_judged() -> None:
    stock, streamed = record(1.0, 15.0), record(1.05, 4.0, bus_over_pinned_copy_ratio=0.9)
    found = figures(streamed, stock)

    assert found["step_ratio"] == 1.05
    assert (found["vram_gib"], found["reserved_ratio"], found["ram_gib"]) == (4.0, pytest.approx(1.2), 3.0)
    assert judged({"max_step_ratio": 1.1, "min_bus_ratio": 0.88}, found) == [
        "step_ratio <= 1.1 met",
        "bus_ratio >= 0.88 met",
    ]
    assert judged({"max_vram_gib": 3.9, "min_bus_ratio": 0.95, "min_disk_ratio": 0.8}, found) == [
        "vram_gib 3.9 MISSED",
        "bus_ratio 0.95 MISSED",
        "disk_ratio not measured",
    ]


def test_a_cold_run_is_held_against_the_fastest_plain_read() -> None:
    rates = {"disk_cold_1_threads_bytes_per_s": 1e9, "disk_cold_4_threads_bytes_per_s": 2e9}

    assert figures(record(1.0, 1.0, disk_without_drop_bytes_per_s=1.8e9, **rates), None)["disk_ratio"] == 0.9
    assert "disk_ratio" not in figures(record(1.0, 1.0, disk_bytes_per_s=1.8e9, **rates), None)


def test_table_says_what_failed_and_what_was_missed() -> None:
    runs = [
        Run(name="peft", options=()),
        Run(name="lema", options=(), against="peft", targets={"max_step_ratio": 1.1}),
        Run(name="other", options=(), against="peft"),
    ]
    records = {"peft": record(1.0, 15.0), "lema": record(1.2, 4.0), "other": {"error": "exit code 1: out of memory"}}
    text, is_met = table(runs, records)

    assert not is_met
    assert "| lema | 1.200 | 1.200 | 4.000 | 4.800 | 3.000 |  |  | step_ratio 1.1 MISSED |" in text
    assert "out of memory" in text.splitlines()[-1]
    assert table(runs[:1], records)[1]
    assert not table(runs[:1], {})[1], "a run that was not made meets nothing"


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([{"name": "a", "options": ""}, {"name": "a", "options": ""}], "two runs are named a"),
        ([{"name": "a", "options": "", "against": "b"}], "b, which does not come before"),
        ([{"name": "a", "options": "", "targets": {"max_speed": 1}}], "max_speed"),
    ],
)
def test_a_suite_that_makes_no_sense_is_refused(runs: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    path.write_text(json.dumps({"options": "", "runs": runs}))
    with pytest.raises(ValueError, match=message):
        read_suite(path)


def test_a_run_that_ends_badly_or_never_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = tmp_path / "bench.py"
    bench.write_text("import sys, time\nif sys.argv[1] == 'sleep': time.sleep(60)\nsys.exit('no such card')\n")
    monkeypatch.setattr(bench_suite, "BENCH", bench)

    assert measure(Run(name="a", options=("fail",)), []) == {"name": "a", "error": "exit code 1: no such card"}
    assert measure(Run(name="b", options=("sleep",), limit_s=0.5), []) == {"name": "b", "error": "stopped after 0 s"}


def test_a_suite_runs_and_keeps_every_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = tmp_path / "bench.py"
    bench.write_text(
        "import json, sys\nprint('noise')\n"
        "print(json.dumps({'step_median_s': 2.0 if 'lema' in sys.argv else 1.0, 'options': sys.argv[1:]}))\n"
    )
    monkeypatch.setattr(bench_suite, "BENCH", bench)
    suite, output = tmp_path / "suite.json", tmp_path / "lines.jsonl"
    runs = [
        {"name": "peft", "options": "peft"},
        {"name": "lema", "options": "lema", "against": "peft", "targets": {"max_step_ratio": 2.5}},
        {"name": "slow", "options": "lema", "against": "peft", "targets": {"max_step_ratio": 1.5}},
        {"name": "long", "options": "peft", "limit_s": 1000},
    ]
    suite.write_text(json.dumps({"options": "--shape x", "runs": runs}))
    common = [str(suite), "--checkpoint-dir", str(tmp_path), "--output", str(output)]

    assert bench_suite.main([*common, "--only", "lema", "--commit", "abc"]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["peft", "lema"], "with what it is compared with"
    assert lines[1]["options"] == ["--shape", "x", "lema", "--checkpoint-dir", str(tmp_path), "--commit", "abc"]
    assert "step_ratio <= 2.5 met" in capsys.readouterr().out
    assert bench_suite.main([*common, "--limit-s", "500"]) == 1
    shown = capsys.readouterr().out
    assert "step_ratio 1.5 MISSED" in shown
    assert "not run: no time left" in shown
