"""A duel's results: their form, what may be said of them, the table, the page and the pictures."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from hf_lema.reporting import plots
from hf_lema.reporting.contender import ContenderResult, UseSample
from hf_lema.reporting.curves import CURVE_RULE
from hf_lema.reporting.plots import write_plots
from hf_lema.reporting.report import baseline_of, format_table, summarize, write_markdown
from hf_lema.reporting.verdict import NOISE_RULE, step_median_and_spread_s, verdict
from hf_lema.units import GIB, MIB

STEPS_OF_ONE_SECOND = (
    9.0,
    9.0,
    0.98,
    0.99,
    1.0,
    1.01,
    1.02,
)  # two of warm-up; then median 1.0, quartiles 0.99 and 1.01


def result(name: str = "lema", **fields: Any) -> ContenderResult:
    values: dict[str, Any] = {
        "status": "ok",
        "num_steps": 7,
        "num_warmup_steps": 2,
        "loss": (2.5, 2.0, 1.5, 1.2, 1.0, 0.9, 0.8),
        "step_s": STEPS_OF_ONE_SECOND,
        "tokens_per_s": 512.0,
        "vram_allocated_peak_bytes": 4 * GIB,
        "vram_reserved_peak_bytes": 5 * GIB,
        "vram_process_peak_bytes": 6 * GIB,
        "ram_private_above_imports_peak_bytes": 2 * GIB,
        "ram_file_peak_bytes": GIB,
        "batches_sha256": "ab12",
        "num_trainable": 1000,
    }
    return ContenderResult(name=name, **(values | fields))


def scaled(times_s: tuple[float, ...], factor: float) -> tuple[float, ...]:
    return tuple(factor * time_s for time_s in times_s)


def texts(own: ContenderResult, baseline: ContenderResult | None) -> dict[str, str]:
    return {comparison.quantity: comparison.text for comparison in verdict(own, baseline).comparisons}


def out_of_memory(name: str = "peft") -> ContenderResult:
    return ContenderResult(name=name, status="out_of_memory", reason="CUDA out of memory.\nTried to allocate | 2 GiB")


# The form


def test_a_result_comes_back_from_its_json_unchanged() -> None:
    samples = [
        UseSample(elapsed_s=0.5, vram_bytes=None, ram_bytes=7),
        UseSample(elapsed_s=1.0, vram_bytes=3, ram_bytes=9),
    ]
    before = result(samples=samples, h2d_bytes=[5] * 7, disk_bytes=[6] * 7, wait_s=0.25, notes=["one", "two"])
    text = json.dumps(before.to_json(), allow_nan=False)
    assert ContenderResult.from_json(json.loads(text)) == before
    assert hash(before) == hash(ContenderResult.from_json(json.loads(text)))


def test_a_failed_result_comes_back_from_its_json_unchanged() -> None:
    before = out_of_memory()
    assert ContenderResult.from_json(json.loads(json.dumps(before.to_json()))) == before


def test_a_loss_that_is_no_number_survives_json() -> None:
    before = result(loss=(2.0, math.nan, math.inf), tokens_per_s=math.inf)
    text = json.dumps(before.to_json(), allow_nan=False)  # strict JSON, that any reader takes
    after = ContenderResult.from_json(json.loads(text))
    assert after.loss[0] == 2.0
    assert math.isnan(after.loss[1])
    assert after.loss[2] == after.tokens_per_s == math.inf


def test_all_contradictions_of_a_result_are_named() -> None:
    with pytest.raises(ValueError, match="'lema'") as caught:
        result(status="lost", num_steps=3, num_warmup_steps=-1)
    message = str(caught.value)
    for fault in ("status is 'lost'", "no reason", "loss has 7 values for 3", "step_s has 7", "num_warmup_steps is -1"):
        assert fault in message


def test_a_finished_result_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no step was done"):
        ContenderResult(name="peft", status="ok")


def test_json_with_unknown_or_missing_fields_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'lema'.*colour, speed"):
        ContenderResult.from_json(result().to_json() | {"speed": 1, "colour": 2})
    with pytest.raises(ValueError, match="lacks name"):
        ContenderResult.from_json({"status": "ok"})


def test_a_result_cannot_be_changed_and_takes_a_copy_of_its_lists() -> None:
    losses = [2.0, 1.0]
    own = result(loss=losses)
    losses.append(math.nan)
    assert own.loss == (2.0, 1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        own.name = "other"  # type: ignore[misc]


# The verdict


def test_the_step_is_told_as_a_multiple_of_the_baselines_median_after_the_warm_up() -> None:
    slower = result(step_s=scaled(STEPS_OF_ONE_SECOND, 1.25))
    assert texts(slower, result("peft"))["step"] == "1.25 times the step"
    (step, *_) = verdict(slower, result("peft")).comparisons
    assert step.ratio == 1.25


def test_no_verdict_on_the_step_within_the_larger_of_the_two_spreads() -> None:
    wide = (0.8, 0.9, 1.0, 1.1, 1.2)  # quartiles 0.9 and 1.1
    baseline = result("peft", step_s=(9.0, 9.0, *wide))
    assert step_median_and_spread_s(baseline) == (1.0, pytest.approx(0.2))
    at_noise = result(step_s=scaled(STEPS_OF_ONE_SECOND, 1.19))
    above_noise = result(step_s=scaled(STEPS_OF_ONE_SECOND, 1.21))
    assert texts(at_noise, baseline)["step"] == "step within noise"
    assert texts(above_noise, baseline)["step"] == "1.21 times the step"
    # the contender's own spread counts as the baseline's does
    assert texts(dataclasses.replace(baseline, name="lema"), dataclasses.replace(at_noise, name="peft"))["step"] == (
        "step within noise"
    )


def test_no_verdict_on_the_step_from_fewer_than_four_timed_steps() -> None:
    few = result(step_s=(9.0, 9.0, 2.0, 2.0, 2.0), num_steps=7)
    assert texts(few, result("peft"))["step"] == "step: no verdict (fewer than 4 timed steps)"
    assert texts(dataclasses.replace(result("peft"), name="lema"), dataclasses.replace(few, name="peft"))[
        "step"
    ].startswith("step: no verdict")


def test_equal_steps_are_within_noise_even_without_any_spread() -> None:
    exact = (1.0,) * 7
    assert texts(result(step_s=exact), result("peft", step_s=exact))["step"] == "step within noise"


def test_a_duel_without_stock_peft_is_held_against_its_first_contender() -> None:
    assert baseline_of([result("qlora"), result("lema-nf4")]) == "qlora"
    assert baseline_of([result("lema"), result("peft")]) == "peft"
    assert baseline_of([]) == "peft"


@pytest.mark.parametrize(
    ("own_bytes", "other_bytes", "text"),
    [
        (4 * GIB, 16 * GIB, "0.25 times the VRAM"),
        (20 * GIB, GIB, "20 times the VRAM"),
        (GIB, GIB + 32 * MIB, "VRAM within noise"),
        (GIB, GIB + 33 * MIB, "0.97 times the VRAM"),
        (100 * GIB, 101 * GIB, "VRAM within noise"),
        (100 * GIB, 103 * GIB, "0.97 times the VRAM"),
        (3 * GIB, 0, "VRAM +3.00 GiB"),
        (10 * MIB, 3 * GIB, "VRAM -2.99 GiB"),
    ],
)
def test_memory_is_told_above_its_noise_only(own_bytes: int, other_bytes: int, text: str) -> None:
    own = result(vram_allocated_peak_bytes=own_bytes)
    assert texts(own, result("peft", vram_allocated_peak_bytes=other_bytes))["VRAM"] == text


def test_ram_below_what_the_imports_took_gives_a_difference_and_no_ratio() -> None:
    own, other = result(ram_private_above_imports_peak_bytes=-50 * MIB), result("peft")
    assert texts(own, other)["RAM"] == "RAM -2.05 GiB"
    comparison = next(c for c in verdict(own, other).comparisons if c.quantity == "RAM")
    assert comparison.ratio is None


def test_a_figure_that_one_of_the_two_lacks_is_not_compared() -> None:
    assert "VRAM" not in texts(result(vram_allocated_peak_bytes=None), result("peft"))
    assert "loss" not in texts(result(loss=()), result("peft"))


def test_an_equal_loss_is_called_equal_and_a_different_one_by_its_largest_difference() -> None:
    assert texts(result(), result("peft"))["loss"] == "loss equal (7 steps)"
    losses = list(result().loss)
    losses[4] += 0.125
    losses[5] += 1e-6
    assert texts(result(loss=losses), result("peft"))["loss"] == "loss differs by up to 0.12 (step 5)"


def test_the_smallest_difference_of_a_loss_is_no_equality() -> None:
    losses = list(result().loss)
    losses[2] = math.nextafter(losses[2], 2.0)
    assert texts(result(loss=losses), result("peft"))["loss"].startswith("loss differs by up to 2.2e-16")


def test_losses_of_different_batches_are_not_compared() -> None:
    for digest in ("cd34", None):
        assert texts(result(batches_sha256=digest), result("peft"))["loss"] == (
            "loss: no verdict (not the same batches)"
        )


def test_a_loss_that_is_no_number_is_said_and_never_called_equal() -> None:
    losses = (2.5, math.nan, 1.0)
    assert texts(result(loss=losses), result("peft"))["loss"] == "loss of lema is nan at step 2"
    assert texts(result(loss=losses), result("peft", loss=losses))["loss"] == "loss of lema is nan at step 2"
    assert texts(result(), result("peft", loss=losses))["loss"] == "loss of peft is nan at step 2"


def test_who_did_not_finish_gets_its_reason_and_no_comparison() -> None:
    ended = verdict(out_of_memory("lema"), result("peft"))
    assert ended.comparisons == ()
    assert ended.text.startswith("out of memory: CUDA out of memory")
    failed = ContenderResult(name="qlora", status="failed", reason="bitsandbytes is not installed")
    assert verdict(failed, result("peft")).text == "failed: bitsandbytes is not installed"


@pytest.mark.parametrize(
    ("status", "text"),
    [("out_of_memory", "finished; peft ran out of memory"), ("failed", "finished; peft failed"),
     ("skipped", "finished; peft was skipped")],
)  # fmt: skip
def test_against_a_baseline_that_did_not_finish_only_that_is_said(status: str, text: str) -> None:
    baseline = ContenderResult(name="peft", status=status, reason="because")
    assert verdict(result(), baseline).text == text


def test_the_baseline_and_a_duel_without_one_get_no_comparison() -> None:
    assert verdict(result("peft"), result("peft")).text == "baseline"
    assert verdict(result(), None).text == "no baseline"


# The table


def test_the_table_shows_each_contender_and_its_verdict() -> None:
    results = [
        result("peft", vram_allocated_peak_bytes=16 * GIB),
        result("lema", step_s=scaled(STEPS_OF_ONE_SECOND, 1.25), tokens_per_s=51.23),
        out_of_memory("qlora"),
    ]
    assert format_table(summarize(results)).splitlines() == [
        "contender  status         loss first  loss last  step s  spread s  tokens/s  VRAM GiB  RAM GiB",
        "----------------------------------------------------------------------------------------------",
        "peft       ok                 2.5000     0.8000   1.000     0.020       512     16.00     2.00",
        "lema       ok                 2.5000     0.8000   1.250     0.025      51.2      4.00     2.00",
        "qlora      out of memory           -          -       -         -         -         -        -",
        "",
        "against peft",
        "  peft       baseline",
        "  lema       1.25 times the step, 0.25 times the VRAM, RAM within noise, loss equal (7 steps)",
        "  qlora      out of memory: CUDA out of memory. Tried to allocate | 2 GiB",
        "",
        "curves",
        "  peft       loss falls by 0.28 a step (R2 0.91); too short for plateaus and cliffs",
        "  lema       loss falls by 0.28 a step (R2 0.91); too short for plateaus and cliffs",
    ]


def test_the_table_says_where_the_loss_rested_and_dropped_and_how_often_the_card_was_nearly_full() -> None:
    stairs = result(
        num_steps=24,
        loss=[3.0] * 12 + [2.0] * 12,
        vram_step_peak_bytes=[15 * GIB] * 6 + [8 * GIB] * 18,
        vram_card_bytes=16 * GIB,
    )
    reading = "2 plateaus (steps 1-12, 13-24), 1 cliff (step 13); VRAM above 90 % in 25 % of the steps"
    assert format_table(summarize([stairs])).endswith(reading)


def test_without_a_card_the_table_has_no_vram() -> None:
    table = format_table(summarize([result("peft", vram_allocated_peak_bytes=None)]))
    assert "VRAM" not in table
    assert "RAM GiB" in table


def test_a_long_reason_is_cut_in_the_table_but_not_on_the_page(tmp_path: Path) -> None:
    failed = ContenderResult(name="qlora", status="failed", reason="word " * 100 + "end")
    table = format_table(summarize([failed]))
    assert max(len(line) for line in table.splitlines()) < 130
    assert table.endswith("...")
    write_markdown([failed], {}, tmp_path / "report.md")
    assert "word end" in (tmp_path / "report.md").read_text()


def test_with_too_few_steps_for_a_spread_the_median_is_still_shown() -> None:
    (row,) = summarize([result(step_s=(9.0, 9.0, 1.0, 3.0))])
    assert (row.step_median_s, row.step_spread_s) == (2.0, None)


def test_the_first_and_last_loss_may_be_no_number() -> None:
    assert " nan" in format_table(summarize([result(loss=(2.0, math.nan))]))


def test_a_duel_of_nobody_is_said_to_be_one() -> None:
    assert format_table([]) == "no contender"


def test_the_verdicts_are_against_the_named_baseline() -> None:
    results = [result("peft"), result("lema", vram_allocated_peak_bytes=GIB)]
    rows = summarize(results, baseline_name="lema")
    assert [row.verdict.split(",")[1:2] for row in rows] == [[" 4.00 times the VRAM"], []]
    assert "against lema" in format_table(rows, "lema")


# The page


def test_the_page_holds_results_verdicts_rule_notes_pictures_and_environment(tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.md"
    results = [
        result("peft", notes=["loaded in float32"]),
        result("lema", h2d_bytes=[GIB] * 7, vram_allocated_peak_bytes=GIB),
        out_of_memory("qlora"),
    ]
    environment = {"torch_version": "2.13.0", "ram_limit_bytes": 16 * GIB, "gpu_name": None, "cpu_model": "A | B"}
    plots = [tmp_path / "out" / "plots" / "step_time.png"]
    write_markdown(results, environment, path, settings={"seed": 0}, plots=plots, title="Duel on a laptop")
    page = path.read_text()
    lines = page.splitlines()
    assert lines[0] == "# Duel on a laptop"
    assert lines[2] == (
        "| contender | status | loss first | loss last | step s | spread s | tokens/s | VRAM GiB | VRAM reserved GiB "
        "| VRAM process GiB | RAM GiB | file pages GiB | moved GiB/step | bus GiB/s |"
    )
    row = "| lema | ok | 2.5000 | 0.8000 | 1.000 | 0.020 | 512 | 1.00 | 5.00 | 6.00 | 2.00 | 1.00 | 1.00 | 1.00 |"
    assert row in lines
    assert "| qlora | out of memory | - | - | - | - | - | - | - | - | - | - | - | - |" in lines
    assert "- **lema**: step within noise, 0.25 times the VRAM, RAM within noise, loss equal (7 steps)" in lines
    assert "- **qlora**: out of memory: CUDA out of memory. Tried to allocate | 2 GiB" in lines
    assert NOISE_RULE in lines
    assert "- **lema**: loss falls by 0.28 a step (R2 0.91); too short for plateaus and cliffs" in lines
    assert CURVE_RULE in lines
    assert "- **peft**: loaded in float32" in lines
    assert "![step time](plots/step_time.png)" in lines
    assert "| seed | 0 |" in lines
    assert "| ram_limit_bytes | 16.00 GiB |" in lines
    assert "| gpu_name | - |" in lines
    assert r"| cpu_model | A \| B |" in lines
    assert page.endswith("\n")


def test_every_line_of_a_table_on_the_page_has_as_many_cells(tmp_path: Path) -> None:
    write_markdown([result("peft"), out_of_memory("lema")], {"name": "a|b\nc"}, tmp_path / "report.md")
    tables = (tmp_path / "report.md").read_text().split("\n\n")
    for table in (part for part in tables if part.startswith("|")):
        num_cells = {line.replace(r"\|", "").count("|") for line in table.splitlines()}
        assert len(num_cells) == 1


def test_a_page_without_a_card_says_so(tmp_path: Path) -> None:
    own = result(vram_allocated_peak_bytes=None, vram_reserved_peak_bytes=None, vram_process_peak_bytes=None)
    write_markdown([own], {}, tmp_path / "report.md")
    page = (tmp_path / "report.md").read_text()
    assert "No GPU took part" in page
    assert "VRAM GiB" not in page


def test_the_rule_on_the_page_states_the_figures_that_are_used() -> None:
    for figure in ("32.00 MiB", "2 %", "4 timed steps"):
        assert figure in NOISE_RULE


# The pictures


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def with_samples(own: ContenderResult, *, has_vram: bool) -> ContenderResult:
    samples = [
        UseSample(elapsed_s=i / 10, vram_bytes=i * GIB if has_vram else None, ram_bytes=i * GIB) for i in range(9)
    ]
    return dataclasses.replace(own, samples=samples)


needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the extra report")


@needs_matplotlib
def test_the_pictures_are_written_where_the_list_says(tmp_path: Path) -> None:
    results = [with_samples(result("peft"), has_vram=True), with_samples(result("lema"), has_vram=True)]
    paths = write_plots(results, tmp_path / "plots")
    assert [path.name for path in paths] == ["loss.png", "vram.png", "step_time.png"]
    for path in paths:
        width, height = png_size(path)
        assert width >= 1000
        assert height >= 600


@needs_matplotlib
def test_without_a_card_ram_is_drawn(tmp_path: Path) -> None:
    paths = write_plots([with_samples(result("peft"), has_vram=False)], tmp_path)
    assert [path.name for path in paths] == ["loss.png", "ram.png", "step_time.png"]


@needs_matplotlib
def test_a_duel_with_failures_and_losses_that_are_no_numbers_is_drawn(tmp_path: Path) -> None:
    results = [
        result("peft", loss=(2.0, math.nan, 1.0)),
        with_samples(out_of_memory("qlora"), has_vram=True),
        ContenderResult(name="lema", status="skipped", reason="not asked for"),
        *[with_samples(result(f"more-{idx}"), has_vram=True) for idx in range(9)],  # more than there are colours
    ]
    assert len(write_plots(results, tmp_path)) == 3


@needs_matplotlib
def test_plateaus_cliffs_and_a_nearly_full_card_are_drawn(tmp_path: Path) -> None:
    plain = with_samples(result("peft", num_steps=24, loss=[3.0] * 24), has_vram=True)
    stairs = dataclasses.replace(plain, loss=[3.0] * 12 + [2.0] * 12, vram_card_bytes=8 * GIB)
    names = ["loss.png", "vram.png", "step_time.png"]
    assert [path.name for path in write_plots([plain], tmp_path / "plain")] == names
    assert [path.name for path in write_plots([stairs], tmp_path / "stairs")] == names
    for name in names[:2]:
        assert (tmp_path / "plain" / name).read_bytes() != (tmp_path / "stairs" / name).read_bytes()


@needs_matplotlib
def test_a_few_steps_have_their_median_drawn_and_a_loss_curve_counts_whole_steps(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    few = [result("peft", num_steps=4, loss=[3.0, 2.0, 1.0, 1.5], step_s=[9.0, 9.0, 1.0, 1.2])]
    assert step_median_and_spread_s(few[0]) is None
    axes = Figure().add_subplot()
    assert plots._draw_step_time(axes, few)
    (bar,) = [line for line in axes.lines if line.get_marker() == "None"]
    assert list(bar.get_xdata()) == [median(few[0].timed_step_s)] * 2
    axes = Figure().add_subplot()
    assert plots._draw_loss(axes, few)
    assert all(tick == int(tick) for tick in axes.get_xticks())


@needs_matplotlib
def test_a_picture_without_a_figure_is_not_drawn(tmp_path: Path) -> None:
    assert write_plots([out_of_memory()], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_an_error_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"hf_lema\[report\]"):
        write_plots([result()], tmp_path)


def test_importing_the_report_loads_neither_matplotlib_nor_torch() -> None:
    code = "import hf_lema.reporting.report, sys; print({'matplotlib', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
