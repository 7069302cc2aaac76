"""The page on scale says what the planner says, and the measurement of several processes adds up."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

import bench_group  # noqa: E402
import bench_shared_reads  # noqa: E402
import bench_step  # noqa: E402
import scale_page  # noqa: E402

from hf_lema.planning.data_parallel import Launch  # noqa: E402
from hf_lema.reporting.report_files import make_report  # noqa: E402
from hf_lema.units import GIB  # noqa: E402


def record(rank: int, step_s: float, ram_gib: float | None, num_processes: int = 2) -> dict[str, Any]:
    return {
        "rank": rank,
        "num_processes": num_processes,
        "step_median_s": step_s,
        "ram_proportional_above_baseline_bytes": None if ram_gib is None else ram_gib * GIB,
        "vram_allocated_peak_bytes": 4 * GIB,
        "bus_bytes_per_s": 24e9 / step_s,
        "loss_last": 1.0,
        "options": {"batch_size": 8, "seq_len": 512},
        "environment": {},
    }


def test_tables_of_the_page_are_those_of_the_planner() -> None:
    assert scale_page.main(["--check"]) == 0, "python recipes/scale_page.py"


def test_a_page_that_is_not_what_the_planner_says_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "scale.md"
    page.write_text(f"before\n{scale_page.BEGIN}\nold\n{scale_page.END}\nafter\n")
    monkeypatch.setattr(scale_page, "PAGE", page)
    monkeypatch.setattr(scale_page, "table_text", lambda table, records: table.title)
    assert scale_page.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().out
    assert scale_page.main([]) == 0
    assert scale_page.main(["--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    with pytest.raises(ValueError, match="mark"):
        scale_page.page_with("no marks", "")


def test_measured_cells_come_from_the_newest_record_of_the_contender() -> None:
    def line(name: str, step_s: float) -> dict[str, Any]:
        ranks = [record(0, step_s, 7.0), record(1, step_s - 0.01, 6.5)]
        return {"name": name} | bench_group.group_record(record(0, 0.7, 12.8, 1), ranks)

    records = [line("lema", 0.8), line("lema", 0.72), line("lema-nf4", 0.9)]

    assert scale_page.measured(records, "lema", Launch()) == "0.700 s, 12.8 GiB"
    assert scale_page.measured(records, "lema", Launch(num_processes=2)) == "0.720 s, 1.94 times, 13.5 GiB"
    assert scale_page.measured([], "lema", Launch()) == "not measured yet"
    assert scale_page.measured(records, "lema", Launch(num_processes=8)) == "computed only"
    assert scale_page.measured(records, "lema", Launch(num_processes=2, num_hosts=2)) == "computed only"


def test_a_group_is_as_fast_as_its_slowest_process_and_shared_pages_count_once() -> None:
    alone, ranks = record(0, 0.70, 12.8, 1), [record(0, 0.71, 6.9), record(1, 0.73, 6.8)]
    found = bench_group.group_record(alone, ranks)

    assert found["step_median_s"] == 0.73
    assert found["throughput_ratio"] == pytest.approx(2 * 0.70 / 0.73)
    assert found["tokens_per_s"] == pytest.approx(2 * 8 * 512 / 0.73)
    assert found["ram_group_bytes"] == pytest.approx(13.7 * GIB)
    text, is_met = bench_group.summary(found, {"min_throughput_ratio": 1.9, "max_ram_group_gib": 14.5})
    assert is_met
    assert "rank 1: 0.730 s a step, bus 32.9 GB/s" in text
    text, is_met = bench_group.summary(found, {"min_throughput_ratio": 1.95, "max_ram_group_gib": 13.0})
    assert not is_met
    assert text.count("MISSED") == 2
    unknown = bench_group.group_record(alone, [record(0, 0.71, None), record(1, 0.73, 6.8)])
    assert unknown["ram_group_bytes"] is None
    assert not bench_group.summary(unknown, {"max_ram_group_gib": 14.5})[1], "what is not known meets nothing"


def test_processes_beside_each_other_say_what_the_machine_takes_from_a_group() -> None:
    def with_steps(rank: int, *step_s: float) -> dict[str, Any]:
        found = record(rank, sorted(step_s[1:])[1], 12.8, 1)
        return found | {"step_s": list(step_s), "options": found["options"] | {"warmup": 1}}

    alone = with_steps(0, 9.0, 0.70, 0.70, 0.70)
    beside = [with_steps(0, 9.0, 0.71, 0.80, 0.72), with_steps(0, 9.0, 0.79, 0.71, 0.73)]
    found = bench_group.group_record(alone, [record(0, 0.80, 6.9), record(1, 0.81, 6.8)], beside)

    assert found["throughput_ratio_beside"] == pytest.approx(2 * 0.70 / 0.73)
    assert found["throughput_ratio_in_step"] == pytest.approx(2 * 0.70 / 0.79)
    assert found["beside"] == beside
    text, _ = bench_group.summary(found, {})
    assert "throughput_ratio 1.728; throughput_ratio_beside 1.918; throughput_ratio_in_step 1.772" in text


def test_one_who_does_not_come_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="1 of 2 processes"):
        bench_step.meet(2, tmp_path, limit_s=0.05)
    (tmp_path / "another").touch()
    bench_step.meet(2, tmp_path, limit_s=0.05)


def test_a_report_shows_the_bus_rate_of_each_process(tmp_path: Path) -> None:
    def steps(rank: int, step_s: float, num_processes: int) -> dict[str, Any]:
        job = {"contender": "lema", "shape": "llama-2-7b", "dtype": "fp16", "device": "cuda", "warmup": 1}
        found = record(rank, step_s, 7.0, num_processes)
        moved = {"step_s": [9.0, step_s, step_s], "h2d_bytes": [0, 24 * GIB, 24 * GIB], "loss": [1.0, 1.0, 1.0]}
        return found | moved | {"options": found["options"] | job}

    ranks = [steps(0, 0.8, 2), steps(1, 0.75, 2)]
    lines = tmp_path / "scale.jsonl"
    lines.write_text(json.dumps({"name": "lema"} | bench_group.group_record(steps(0, 0.6, 1), ranks)) + "\n")
    markdown = tmp_path / "scale.md"
    make_report([lines], markdown=markdown)
    head, *rows = [line.split("|")[1:-1] for line in markdown.read_text().splitlines() if line.startswith("|")]
    column = [cell.strip() for cell in head].index("bus GiB/s")
    rates = {row[0].strip(): row[column].strip() for row in rows if len(row) == len(head)}
    assert rates["lema"] == "40.00"
    assert rates["lema process 1 of 2"] == "30.00"
    assert rates["lema process 2 of 2"] == "32.00"


@pytest.mark.parametrize("path", sorted((RECIPES / "groups").glob("*.json")), ids=lambda path: path.stem)
def test_every_run_of_a_group_file_is_one_that_can_be_asked_for(path: Path) -> None:
    runs = bench_group.read_runs(argparse.Namespace(suite=path, options=[]))
    assert [run["name"] for run in runs if run["targets"]] == ["lema", "lema-nf4"]
    for run in runs:
        args = bench_step.parse_arguments([*run["options"], "--device", "cuda"])
        assert (args.batch_size, args.seq_len, args.shape) == (8, 512, "llama-2-7b")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("contender", ["lema", "lema-nf4"])
def test_the_measurement_of_two_processes_runs_dry_on_a_cpu(contender: str, tmp_path: Path) -> None:
    output = tmp_path / "lines.jsonl"
    options = f"--shape tiny --contender {contender} --device cpu --batch-size 2 --seq-len 16 --steps 4 --warmup 1"
    where = ["--checkpoint-dir", str(tmp_path / "checkpoints"), "--output", str(output)]

    assert bench_group.main([*where, "--beside", "--commit", "abc", "--", *options.split()]) == 0
    found = json.loads(output.read_text())
    assert [beside["num_processes"] for beside in found["beside"]] == [1, 1]
    assert found["beside"][0]["batches_sha256"] == found["beside"][1]["batches_sha256"]
    assert found["throughput_ratio_in_step"] > 0
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert found["throughput_ratio"] > 0
    assert found["alone"]["num_processes"] == 1
    first, second = found["ranks"]
    # Each process trains on its own rows, and moves what one alone moves.
    assert first["batches_sha256"] != second["batches_sha256"]
    assert first["h2d_bytes"][2:] == second["h2d_bytes"][2:] == found["alone"]["h2d_bytes"][2:]
    assert all(bus > 0 for bus in found["bus_bytes_per_s"])
    assert found["ram_group_bytes"] > 0
    assert found["environment"]["stated_commit"] == "abc"


def test_processes_that_read_the_same_layers_read_the_disk_once(tmp_path: Path) -> None:
    layer_bytes, num_layers = 48 * 2**20, 2
    path = tmp_path / "layers"
    path.write_bytes(bytes(range(256)) * (layer_bytes * num_layers // 256))
    alone = bench_shared_reads.measure(path, layer_bytes, num_layers, 1, "at the same time")
    if abs(alone["disk_over_file_ratio"] - 1) > 0.02:
        pytest.skip("this file system does not count what it reads, or keeps pages that were dropped")
    for way in ("at the same time", "one process late"):
        found = bench_shared_reads.measure(path, layer_bytes, num_layers, 2, way)
        assert found["disk_over_file_ratio"] == pytest.approx(1, abs=0.05), way
