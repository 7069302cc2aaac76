"""The tables of figures in README.md and docs/measured.md: those of the records, whatever records there are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "recipes"))

import duel_overview  # noqa: E402
import measured_tables  # noqa: E402
import readme_table  # noqa: E402

from hf_lema.reporting.contender import ContenderResult  # noqa: E402

GIB = 1 << 30


def a_row(name: str, step_s: float, vram_gib: float, **fields: Any) -> dict[str, Any]:
    values = {"num_steps": 6, "num_warmup_steps": 2, "loss": [1.0] * 6, "step_s": [9.0, 9.0] + [step_s] * 4}
    values |= {"vram_allocated_peak_bytes": int(vram_gib * GIB), "vram_reserved_peak_bytes": int(vram_gib * GIB) + GIB}
    values |= {"ram_private_above_imports_peak_bytes": GIB, "batches_sha256": "b"}
    return ContenderResult(name=name, status="ok", **(values | fields)).to_json()


def write_duel(path: Path, rows: list[dict[str, Any]], time_utc: str = "2026-12-01T00:00:00Z", **settings: Any) -> Path:
    record = {
        "settings": {"model": "llama-2-70b shape", "batch_size": 8, "seq_len": 512, "precision": "fp16"} | settings,
        "environment": {"gpu_name": "H100", "time_utc": time_utc},
        "contenders": rows,
    }
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


def lines_of(made: str) -> list[str]:
    return [line for line in made.splitlines() if line.startswith("| ") and ":--" not in line]


def test_the_pages_have_the_tables_of_the_records_that_are_kept() -> None:
    assert readme_table.main(["--check"]) == 0, "python recipes/readme_table.py --write"


def test_a_changed_figure_in_a_page_is_found_and_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in readme_table.PAGES}
    assert all("0.659" in text for text in texts.values()), "a figure of the tables"
    pages = {tmp_path / path.name: make for path, make in readme_table.PAGES.items()}
    monkeypatch.setattr(readme_table, "PAGES", pages)
    for changed in pages:
        for path in pages:
            old, new = ("0.659", "0.956") if path == changed else ("", "")
            path.write_text(texts[path.name].replace(old, new), encoding="utf-8")

        assert readme_table.main(["--check"]) == 1
        assert f"{changed.name} has other figures" in capsys.readouterr().out
        assert readme_table.main(["--write"]) == 0
        assert {path.name: path.read_text(encoding="utf-8") for path in pages} == texts


def test_lines_of_other_recipes_and_of_runs_that_failed_are_passed_over(tmp_path: Path) -> None:
    (bench,) = [path for path in measured_tables.record_files() if path.name == "h100-7b-fp16-c.jsonl"]
    text = bench.read_text(encoding="utf-8")
    failed = json.dumps({"name": "min", "error": "stopped after 120 s"})
    (tmp_path / bench.name).write_text(f"{failed}\n{text}", encoding="utf-8")
    (tmp_path / "fuzz.jsonl").write_text(json.dumps({"num_cases": 1}), encoding="utf-8")

    found = measured_tables.record_files(tmp_path)
    assert [path.name for path in found] == [bench.name]
    assert measured_tables.tables(found) == measured_tables.tables([bench])


def test_every_record_of_a_duel_or_a_bench_is_in_a_table() -> None:
    text = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    assert [path.name for path in measured_tables.record_files() if path.name not in text] == []


def test_a_new_record_has_a_table_without_a_change_of_code(tmp_path: Path) -> None:
    failed = ContenderResult(name="qlora", status="out_of_memory", reason="CUDA out of memory").to_json()
    skipped = ContenderResult(name="trainstream", status="skipped", reason="not installed").to_json()
    rows = [a_row("peft", 1.0, 40), failed, skipped, a_row("lema-nf4", 2.0, 4)]
    path = write_duel(tmp_path / "h100-70b.json", rows, vram_limit_bytes=16 * GIB, num_processes=2)
    made = measured_tables.tables([path])

    assert made.startswith("**llama-2-70b shape, 8 x 512 tokens, fp16, 2 processes, held to 16.00 GiB of VRAM, H100**")
    _, peft, qlora, lema = lines_of(made)
    assert "| 1.000 | 1.00 | 40.00 (41.00) | 1.00 | [h100-70b](../recipes/results/h100-70b.json) |" in peft
    assert "| out of memory |" in qlora
    assert "| 2.000 | 2.00 | 4.00 (5.00) |" in lema
    assert "trainstream" not in made
    assert made.endswith("What others do better: peft takes 1.000 s a step, lema at best 2.000 s.")


def test_of_the_same_row_in_two_records_the_newest_counts_with_the_stock_step_of_its_own_record(tmp_path: Path) -> None:
    old = write_duel(tmp_path / "old.json", [a_row("peft", 1.0, 40), a_row("lema", 9.0, 4), a_row("lema@6GiB", 3.0, 6)])
    rows = [a_row("peft", 2.0, 40), a_row("lema", 4.0, 3)]
    new = write_duel(tmp_path / "new.json", rows, time_utc="2026-12-02T00:00:00Z")
    _, peft, lema, budget = lines_of(measured_tables.tables([new, old]))

    assert "| 2.000 | 1.00 |" in peft
    assert "| 4.000 | 2.00 | 3.00 (4.00) |" in lema
    assert "| 3.000 | 3.00 |" in budget


def test_what_lies_within_the_noise_is_not_called_better(tmp_path: Path) -> None:
    rows = [
        a_row(name, 0.0, 4) | {"step_s": [9.0, 9.0, *(least + more for more in (0.0, 0.5, 1.0, 1.5))]}
        for name, least in (("peft", 1.0), ("lema", 1.1))
    ]
    assert "What others do better" not in measured_tables.tables([write_duel(tmp_path / "d.json", rows)])


def test_a_step_is_held_against_that_of_its_own_record_and_no_other(tmp_path: Path) -> None:
    slow = write_duel(tmp_path / "slow.json", [a_row("peft", 2.0, 4), a_row("qlora", 1.0, 4), a_row("lema", 1.8, 4)])
    rows = [a_row("peft", 1.0, 4), a_row("lema@6GiB", 1.5, 4)]
    fast = write_duel(tmp_path / "fast.json", rows, time_utc="2026-12-02T00:00:00Z")

    made = measured_tables.tables([slow, fast])  # the newest stock step is faster than all of ours, but in another hour
    assert made.endswith("What others do better: qlora takes 1.000 s a step, lema at best 1.800 s.")


def test_other_jobs_have_other_tables_and_records_of_other_kinds_have_none(tmp_path: Path) -> None:
    write_duel(tmp_path / "a.json", [a_row("lema", 1.0, 4)])
    write_duel(tmp_path / "b.json", [a_row("lema", 1.0, 4), a_row("peft", 1.0, 4)], batch_size=32)
    (tmp_path / "reply.json").write_text('{"kind": "reply"}', encoding="utf-8")
    files = measured_tables.record_files(tmp_path)

    assert [path.name for path in files] == ["a.json", "b.json"]
    heads = [line for line in measured_tables.tables(files).splitlines() if line.startswith("**")]
    assert ["32 x 512" in head for head in heads] == [True, False], "the one with more contenders first"


def test_the_overview_has_a_column_for_each_job_and_a_row_for_each_contender(tmp_path: Path) -> None:
    failed = ContenderResult(name="qlora", status="out_of_memory", reason="CUDA out of memory").to_json()
    write_duel(tmp_path / "whole.json", [a_row("lema", 2.0, 4), a_row("peft", 1.0, 40), failed], batch_size=32)
    write_duel(tmp_path / "held.json", [a_row("lema@6GiB", 1.5, 6)], vram_limit_bytes=16 * GIB)
    write_duel(tmp_path / "small.json", [a_row("peft", 0.5, 30)])
    (tmp_path / "bench.jsonl").write_text("{}", encoding="utf-8")
    made = duel_overview.overview(sorted(tmp_path.iterdir()))

    assert made.startswith("**llama-2-70b shape, fp16**: seconds a step · GiB of VRAM · GiB of RAM\n\n")
    held = "held to 16.00 GiB of VRAM"
    links = [f"[H100](recipes/results/{name}.json)" for name in ("small", "whole", "held")]
    assert [line.split(" | ") for line in lines_of(made)] == [
        [
            "| contender",
            f"8 x 512 tokens, {links[0]}",
            f"32 x 512 tokens, {links[1]}",
            f"8 x 512 tokens, {held}, {links[2]} |",
        ],
        ["| peft", "0.500 · 30.0 · 1.00", "1.000 · 40.0 · 1.00", " |"],
        ["| qlora", "", "out of memory", " |"],
        ["| lema", "", "2.000 · 4.00 · 1.00", " |"],
        ["| lema@6GiB", "", "", "1.500 · 6.00 · 1.00 |"],
    ]
    assert made.endswith(
        "What others do better:\n\n- 32 x 512 tokens: peft takes 1.000 s a step, lema at best 2.000 s."
    )


def test_of_two_records_of_a_job_the_overview_takes_that_with_more_contenders_then_the_newest(tmp_path: Path) -> None:
    skipped = ContenderResult(name="qlora", status="skipped", reason="no time").to_json()
    rows = [a_row("peft", 1.0, 40), a_row("lema", 2.0, 4)]
    write_duel(tmp_path / "a.json", rows, time_utc="2026-12-02T00:00:00Z")
    write_duel(tmp_path / "b.json", rows, time_utc="2026-12-03T00:00:00Z")
    write_duel(tmp_path / "c.json", [a_row("peft", 9.0, 40), skipped], time_utc="2026-12-04T00:00:00Z")
    write_duel(tmp_path / "d.json", [skipped], seq_len=64)
    made = duel_overview.overview(sorted(tmp_path.iterdir()))

    assert "recipes/results/b.json" in made
    assert "a.json" not in made
    assert "c.json" not in made
    assert "64 tokens" not in made


def test_what_a_record_lacks_comes_from_another_of_the_same_machine_and_job(tmp_path: Path) -> None:
    write_duel(tmp_path / "a.json", [a_row("peft", 1.0, 40), a_row("lema", 2.0, 4)])
    rows = [a_row("peft", 3.0, 40), a_row("qlora", 4.0, 10)]
    write_duel(tmp_path / "b.json", rows[1:], time_utc="2026-12-02T00:00:00Z")
    write_duel(tmp_path / "two.json", rows, num_processes=2)
    made = duel_overview.overview(sorted(tmp_path.iterdir()))

    head, peft, qlora, lema = (line.split(" | ") for line in lines_of(made))
    assert head[1] == "8 x 512 tokens, [H100](recipes/results/a.json), [2](recipes/results/b.json)"
    assert head[2] == "8 x 512 tokens, 2 processes, [H100](recipes/results/two.json) |"
    assert [row[1] for row in (peft, qlora, lema)] == [
        "1.000 · 40.0 · 1.00",
        "4.000 · 10.0 · 1.00",
        "2.000 · 4.00 · 1.00",
    ]


def test_a_record_that_does_not_say_its_size_or_precision_has_a_column(tmp_path: Path) -> None:
    path = write_duel(tmp_path / "a.json", [a_row("peft", 1.0, 40)], precision=None)
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["settings"]["seq_len"]
    path.write_text(json.dumps(record), encoding="utf-8")
    made = duel_overview.overview([path])

    assert made.startswith("**llama-2-70b shape**: ")
    assert "| contender | [H100](recipes/results/a.json) |" in made


def test_models_have_overviews_of_their_own_and_without_a_card_it_is_ram_that_is_compared(tmp_path: Path) -> None:
    on_cpu = a_row("peft", 1.0, 0) | {"vram_allocated_peak_bytes": None, "vram_reserved_peak_bytes": None}
    write_duel(tmp_path / "cpu.json", [on_cpu | {"ram_resident_above_imports_peak_bytes": 3 * GIB}], model="small")
    write_duel(tmp_path / "gpu.json", [a_row("lema", 2.0, 4)])
    made = duel_overview.overview(sorted(tmp_path.iterdir()))

    assert "**small, fp16**: seconds a step · GiB of RAM · GiB of resident RAM" in made
    assert "| peft | 1.000 · 1.00 · 3.00 |" in made
    assert "| lema | 2.000 · 4.00 · 1.00 |" in made


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="must have one line"):
        readme_table.with_tables(f"{readme_table.END} {readme_table.BEGIN}", "x")
