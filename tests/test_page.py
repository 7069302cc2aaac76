"""A duel read back from its file, repeated runs merged, its verdict in words, its charts, its page."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hf_lema.reporting import plots
from hf_lema.reporting.chart_style import Chart
from hf_lema.reporting.charts import duel_charts
from hf_lema.reporting.contender import ContenderResult, UseSample
from hf_lema.reporting.duel_record import DuelRecord, duel_from_json, duel_title, read_duels
from hf_lema.reporting.headline import headline
from hf_lema.reporting.label_places import label_positions
from hf_lema.reporting.memory_bars import ram_bars, vram_bars
from hf_lema.reporting.page import page_html, write_page
from hf_lema.reporting.repeats import merge_runs
from hf_lema.reporting.report_files import make_report
from hf_lema.units import GIB, MIB

ROOT = Path(__file__).resolve().parents[1]
LOSS = (3.0, 2.5, 2.0, 1.8, 1.6, 1.5, 1.4, 1.3)


def a_result(name: str, vram_gib: float = 4, step_s: float = 1.0, **fields: Any) -> ContenderResult:
    times_s = [9.0, 9.0, *(step_s * factor for factor in (0.98, 0.99, 1.0, 1.0, 1.01, 1.02))]
    samples = [UseSample(elapsed_s=t, vram_bytes=int(vram_gib * GIB), ram_bytes=t * GIB) for t in range(3)]
    values: dict[str, Any] = {
        "status": "ok",
        "num_steps": 8,
        "num_warmup_steps": 2,
        "loss": LOSS,
        "step_s": times_s,
        "tokens_per_s": 512 / step_s,
        "vram_allocated_peak_bytes": int(vram_gib * GIB),
        "vram_reserved_peak_bytes": int((vram_gib + 1) * GIB),
        "vram_process_peak_bytes": int((vram_gib + 2) * GIB),
        "ram_private_above_imports_peak_bytes": 2 * GIB,
        "ram_file_peak_bytes": GIB,
        "samples": samples,
        "batches_sha256": "ab12",
    }
    return ContenderResult(name=name, **(values | fields))


def out_of_memory(name: str = "qlora") -> ContenderResult:
    return ContenderResult(name=name, status="out_of_memory", reason="CUDA out of memory")


PLAN: dict[str, Any] = {
    "slots_bytes": GIB,
    "resident_bytes": 0,
    "embedding_bytes": GIB // 4,
    "head_bytes": GIB // 4,
    "other_bytes": 0,
    "adapter_bytes": GIB // 8,
    "optimizer_bytes": GIB // 4,
    "workspace_bytes": 0,
    "context_bytes": GIB // 2,
    "phases": [
        {"name": "loss", "boundary_bytes": GIB, "kept_bytes": 0, "gradient_bytes": 0, "activation_bytes": GIB},
        {
            "name": "backward",
            "boundary_bytes": 0,
            "kept_bytes": GIB,
            "gradient_bytes": GIB // 8,
            "activation_bytes": GIB,
        },
    ],
    "host": {"slab_bytes": 12 * GIB, "ring_bytes": 0, "boundary_bytes": 0, "embedding_bytes": 0, "optimizer_bytes": 0},
}


def a_duel(**fields: Any) -> DuelRecord:
    results = (
        a_result("peft", 16, 1.0),
        a_result("lema", 4, 1.25),
        a_result("lema-auto", 12, 1.1),
        out_of_memory(),
    )
    values: dict[str, Any] = {
        "title": "a model, 8 x 512 tokens",
        "settings": {"vram_limit_bytes": 18 * GIB, "seed": 0},
        "environment": {"gpu_name": "a card", "vram_total_bytes": 80 * GIB, "git_commit": "c0ffee", "git_dirty": False},
        "results": results,
        "plans": {"lema": PLAN},
        "commands": ("python recipes/compare_peft.py --quick",),
        "remarks": ("All saw the same batches.",),
    }
    return DuelRecord(**(values | fields))


def charts(duel: DuelRecord) -> dict[str, Chart]:
    return {chart.key: chart for chart in duel_charts(duel, "peft")}


# Reading


def duel_json(*rows: dict[str, Any], **fields: Any) -> dict[str, Any]:
    settings = {"model": "m", "batch_size": 2, "seq_len": 96, "precision": "fp32"}
    environment = {"git_commit": "c0ffee", "time_utc": "now"}
    return {"settings": settings, "environment": environment, "contenders": list(rows)} | fields


def test_a_duel_comes_back_from_its_file(tmp_path: Path) -> None:
    rows = [
        a_result("peft").to_json() | {"wall_s": 3.0, "details": {}},
        a_result("lema").to_json() | {"details": {"plan": PLAN}},
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(duel_json(*rows, remarks=["Same."], command="do it")))

    (duel,) = read_duels([path])

    assert duel.results == (a_result("peft"), a_result("lema"))
    assert (duel.title, duel.remarks, duel.commands) == ("m, 2 x 96 tokens, fp32", ("Same.",), ("do it",))
    assert duel.plans == {"lema": PLAN}


def test_a_duel_on_a_smaller_card_says_so_in_its_title(tmp_path: Path) -> None:
    record = duel_json(a_result("peft").to_json())
    record["settings"] |= {"vram_limit_bytes": 16 * 2**30, "num_processes": 2}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(record))

    (duel,) = read_duels([path])
    assert duel.title == "m, 2 x 96 tokens, fp32, 2 processes, held to 16.00 GiB of VRAM"


def test_files_of_the_same_job_and_machine_are_one_duel_and_others_are_not(tmp_path: Path) -> None:
    first, again, other = (tmp_path / f"{name}.json" for name in ("first", "again", "other"))
    first.write_text(json.dumps(duel_json(a_result("peft").to_json(), environment={"git_commit": "c", "time_utc": 1})))
    again.write_text(json.dumps(duel_json(a_result("lema").to_json(), environment={"git_commit": "c", "time_utc": 2})))
    other.write_text(json.dumps(duel_json(a_result("lema").to_json(), environment={"git_commit": "d", "time_utc": 1})))

    duels = read_duels([first, again, other])

    assert [[result.name for result in duel.results] for duel in duels] == [["peft", "lema"], ["lema"]]


def test_files_without_a_commit_are_never_put_together(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text(json.dumps(duel_json(a_result("peft").to_json(), environment={"git_commit": None})))

    assert len(read_duels(paths)) == 2


def test_all_files_that_hold_no_duel_are_named(tmp_path: Path) -> None:
    contents = {"a.json": "{", "b.json": '{"settings": {}}', "c.jsonl": '{"loss": []}\nno JSON', "d.json": "[]"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)

    with pytest.raises(ValueError, match="no record of a duel") as caught:
        read_duels([tmp_path / name for name in contents])

    message = str(caught.value)
    for part in (
        "a.json: no JSON",
        "b.json: no record",
        "no environment, contenders",
        "line 1 has no options",
        "line 2",
    ):
        assert part in message
    assert "d.json" in message


def test_every_record_of_duels_and_benches_that_the_project_keeps_can_be_shown() -> None:
    folder = ROOT / "recipes" / "results"
    benches = [path for path in folder.glob("*.jsonl") if '"step_s"' in path.read_text(encoding="utf-8")]
    paths = sorted([*folder.glob("duel-*.json"), *benches])
    assert len(benches) >= 3

    for duel in read_duels(paths):
        assert duel.results
        assert headline(duel.results, "peft")
        assert charts(duel)


def test_lines_of_the_step_benchmark_become_contenders_named_by_what_differs() -> None:
    (duel, *_) = read_duels([ROOT / "recipes/results/h100-7b-fp16-c.jsonl"])

    assert [result.name for result in duel.results] == ["peft", "lema ram min", "lema disk min", "lema ram 6.36GiB"]
    assert round(duel.results[0].vram_allocated_peak_bytes / GIB, 2) == 15.59  # as README says of that record
    assert all(command.startswith("python recipes/bench_step.py --shape llama-2-7b") for command in duel.commands)


def test_other_choices_are_other_contenders_of_the_same_job_and_without_dropout_it_is_another_job() -> None:
    with_dropout, without, *_ = read_duels([ROOT / "recipes/results/h100-7b-nf4-b.jsonl"])

    assert [result.name for result in with_dropout.results] == [
        "qlora",
        "lema-nf4 ram micro-batches of 4, forward of 8, all off",
        "lema-nf4 ram whole batches, layers off",
        "lema-nf4 disk micro-batches of 4, forward of 8, all off",
    ]
    assert without.title == f"{with_dropout.title}, no LoRA dropout"
    assert [result.name for result in without.results] == ["qlora", "lema-nf4"]


def test_choices_that_differ_in_their_layers_alone_are_not_runs_of_one_contender(tmp_path: Path) -> None:
    line = json.loads((ROOT / "recipes/results/h100-7b-nf4-b.jsonl").read_text(encoding="utf-8").splitlines()[2])
    path = tmp_path / "bench.jsonl"
    choices = ["{}", '{"kept_layers":[0,1]}', '{"resident_layers":[0],"kept_layers":[0]}']
    lines = [json.dumps(line | {"options": line["options"] | {"choices": text}}) for text in choices]
    path.write_text("\n".join(lines), encoding="utf-8")
    (duel,) = read_duels([path])

    ways = ["layers off", "layers off, 2 kept", "layers off, 1 resident, 1 kept"]
    assert [result.name for result in duel.results] == [f"lema-nf4 whole batches, {way}" for way in ways]


def test_runs_beside_others_have_a_title_of_their_own() -> None:
    settings = {"model": "m", "batch_size": 8, "seq_len": 512, "precision": "fp16"}
    assert duel_title(settings | {"num_at_once": 1}) == duel_title(settings) == "m, 8 x 512 tokens, fp16"
    assert duel_title(settings | {"num_at_once": 4}) == "m, 8 x 512 tokens, fp16, 4 at a time"
    assert duel_title({"num_at_once": 2}) == "a model, 2 at a time"


def test_a_bench_of_some_layers_is_not_titled_as_one_of_the_whole_model(tmp_path: Path) -> None:
    line = json.loads((ROOT / "recipes/results/h100-7b-fp16-c.jsonl").read_text(encoding="utf-8").splitlines()[0])
    line["options"]["num_layers"] = 2
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps(line), encoding="utf-8")
    (duel,) = read_duels([path])

    assert duel.title == "llama-2-7b shape, 2 layers (random weights), 8 x 512 tokens, fp16"


# Runs of the same contender


def test_runs_are_merged_with_the_steps_of_all_and_the_largest_peak() -> None:
    first, second = a_result("lema", 4, 1.0), a_result("lema", 5, 2.0)
    (merged,) = merge_runs([first, second])

    assert sorted(merged.timed_step_s) == sorted([*first.timed_step_s, *second.timed_step_s])
    assert (merged.num_steps, merged.num_warmup_steps) == (16, 4)
    assert merged.vram_allocated_peak_bytes == 5 * GIB
    assert merged.tokens_per_s == pytest.approx(512 * 12 / sum(merged.timed_step_s))
    assert merged.loss == LOSS
    assert merged.notes == ("2 runs, their median steps 1.000, 2.000 s; the steps of all are taken together.",)


def test_a_run_that_did_not_finish_leaves_the_figures_of_those_that_did_and_a_note() -> None:
    (merged,) = merge_runs([out_of_memory("lema"), a_result("lema")])

    assert (merged.status, merged.loss) == ("ok", LOSS)
    assert merged.notes == ("One of 2 runs did not finish: CUDA out of memory",)


def test_runs_with_other_losses_are_said_to_have_them() -> None:
    (merged,) = merge_runs([a_result("lema"), a_result("lema", step_s=1.1, loss=(9.0, *LOSS[1:]))])

    assert "The losses were not the same in all runs" in merged.notes[-1]


def test_the_same_run_given_twice_counts_once() -> None:
    assert merge_runs([a_result("lema"), a_result("lema")]) == (a_result("lema"),)


# The verdict in words


def test_headline_tells_who_needs_least_who_is_fastest_and_who_did_not_finish() -> None:
    assert headline(a_duel().results, "peft") == (
        "lema needs the least VRAM, 4.00 GiB; against peft: 0.25 times the VRAM, 1.25 times the step, "
        "loss equal (8 steps). peft is the fastest, 1.000 s a step. qlora ran out of memory."
    )


def test_headline_calls_nobody_a_winner_within_the_noise() -> None:
    results = [a_result("peft"), a_result("lema", vram_allocated_peak_bytes=4 * GIB + MIB, step_s=1.001)]
    assert headline(results, "peft") == (
        "No contender needs less VRAM than all others beyond noise, 4.00 to 4.00 GiB. "
        "No contender is the fastest beyond noise, 1.000 to 1.001 s a step."
    )
    results.append(a_result("qlora", 9, 2.0))
    assert headline(results, "peft") == (
        "peft and lema need the least VRAM, 4.00 GiB. peft and lema are the fastest, 1.000 s a step, within noise."
    )


def test_headline_calls_nobody_fast_from_fewer_than_four_timed_steps() -> None:
    results = [a_result("peft", 9), a_result("lema", step_s=2.0)]
    few = [dataclasses.replace(result, step_s=result.step_s[:5]) for result in results]

    assert "fastest" in headline(results, "peft")
    assert "fastest" not in headline(few, "peft")


def test_headline_without_a_card_speaks_of_ram_and_without_anybody_says_so() -> None:
    no_card = {"vram_allocated_peak_bytes": None, "ram_resident_above_imports_peak_bytes": 3 * GIB}
    assert "resident RAM, 3.00 GiB" in headline([a_result("lema", **no_card), out_of_memory()], "peft")
    assert headline([out_of_memory()], "peft") == "No contender finished. qlora ran out of memory."


# The charts


def traces(chart: Chart) -> list[tuple[str, Any, Any]]:
    return [(trace["name"], trace["x"], trace["y"]) for trace in chart.figure["data"]]


def test_trade_off_places_each_finished_contender_and_draws_the_limit() -> None:
    chart = charts(a_duel())["trade-off"]

    assert traces(chart) == [("peft", [16.0], [1.0]), ("lema", [4.0], [1.25]), ("lema-auto", [12.0], [1.1])]
    (line,) = chart.figure["layout"]["shapes"]
    assert (line["x0"], line["x1"]) == (18.0, 18.0)
    (label,) = chart.figure["layout"]["annotations"]
    assert "limit 18.0 GiB" in label["text"]
    assert "qlora" in label["text"]
    assert chart.figure["data"][1]["error_x"]["array"] == [1.0], "what was reserved beyond"


def test_a_card_far_larger_than_all_is_drawn_on_a_logarithmic_axis_and_the_caption_says_so() -> None:
    chart = charts(a_duel(settings={}))["trade-off"]
    layout = chart.figure["layout"]

    assert layout["xaxis"]["type"] == "log"
    assert layout["shapes"][0]["x0"] == 80.0
    assert layout["annotations"][0]["text"].startswith("card 80.0 GiB")
    assert layout["annotations"][0]["x"] == pytest.approx(math.log10(80.0))
    begin, end = layout["xaxis"]["range"]
    assert 10**begin < 4.0 < 80.0 < 10**end
    assert chart.caption.endswith("The scale of memory is logarithmic.")
    assert "type" not in layout["yaxis"]


def test_names_of_dots_stand_where_no_dot_no_whisker_and_no_other_name_is() -> None:
    row = [(0.1, 0.5), (0.2, 0.5), (0.95, 0.2)]
    first, second, last = label_positions(row, ["peft", "lema", "lema-auto"])

    assert (first, second) != ("middle right", "middle left"), "both between the two dots"
    assert "left" in last, "the edge is on the right"
    assert label_positions([(0.3, 0.5)], ["peft"]) == ["middle right"]
    assert label_positions([(0.3, 0.5)], ["peft"], [(0.3, 0.49, 0.9, 0.51)]) != ["middle right"]


def test_eleven_contenders_look_different_and_their_names_are_in_the_legend_alone() -> None:
    results = tuple(a_result(f"c{idx}", vram_gib=idx + 1) for idx in range(11))
    shown = charts(a_duel(results=results))
    looks = {(t["marker"]["symbol"], t["marker"]["color"]) for t in shown["trade-off"].figure["data"]}

    assert len(looks) == len({symbol for symbol, _ in looks}) == 11
    assert shown["vram"].figure["layout"]["annotations"] == []
    in_pictures = {(plots._MARKERS[idx % len(plots._MARKERS)], plots._COLOURS[idx % 7]) for idx in range(11)}
    assert len(in_pictures) == len({marker for marker, _ in in_pictures}) == 11
    (end,) = [each for each in shown["loss"].figure["layout"]["annotations"] if each.get("name") == "end"]
    assert end["text"] == "c0 = 10 others"


def test_loss_has_the_difference_to_the_baseline_below() -> None:
    other = a_result("qlora", loss=[loss + 0.5 for loss in LOSS])
    chart = charts(a_duel(results=(a_result("peft"), a_result("lema"), other)))["loss"]
    below = {trace["name"]: trace["y"] for trace in chart.figure["data"] if trace.get("yaxis") == "y2"}

    assert below["lema"] == [0.0] * 8
    assert below["qlora"] == pytest.approx([0.5] * 8)
    assert len(below) == 2
    assert "that of lema is zero at every step" in chart.caption


def test_no_difference_is_drawn_for_other_batches_and_that_is_said() -> None:
    chart = charts(a_duel(results=(a_result("peft"), a_result("lema", batches_sha256="cd"))))["loss"]

    assert all("yaxis" not in trace for trace in chart.figure["data"])
    assert "No difference for lema, which did not see the same batches" in chart.caption


def test_a_loss_that_is_no_number_is_a_gap() -> None:
    broken = a_result("lema", loss=(3.0, math.nan, math.inf))
    chart = charts(a_duel(results=(a_result("peft"), broken)))["loss"]

    assert chart.figure["data"][1]["y"] == [3.0, None, None]
    json.dumps(chart.figure, allow_nan=False)


def test_curves_are_told_apart_without_colour() -> None:
    names = ["peft", "qlora", "lema", "a", "b", "c", "d"]
    results = tuple(a_result(name, vram_gib=idx + 1) for idx, name in enumerate(names))
    for key in ("loss", "vram", "ram"):
        styles = [
            (trace["line"]["dash"], trace["marker"]["symbol"])
            for trace in charts(a_duel(results=results))[key].figure["data"]
            if "yaxis" not in trace
        ]
        assert len({dash for dash, _ in styles}) == len({symbol for _, symbol in styles}) == 7


def test_bars_are_planned_and_measured_where_a_plan_is_and_measured_alone_elsewhere() -> None:
    chart = charts(a_duel())["vram-bars"]
    labels = chart.figure["data"][0]["y"]
    assert labels == ["peft, measured", "lema, planned", "lema, measured", "lema-auto, measured"]
    sums = [sum(trace["x"][idx] for trace in chart.figure["data"]) for idx in range(4)]
    assert sums == [18.0, 4.5, 6.0, 14.0]

    without = charts(a_duel(plans={}))["vram-bars"]
    assert without.figure["data"][0]["y"] == ["peft", "lema", "lema-auto"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/results").glob("duel-7*.json")), ids=lambda path: path.stem)
def test_planned_bars_are_all_of_what_is_planned(path: Path) -> None:
    (duel,) = read_duels([path])
    planned = {bar.name: sum(bar.parts.values()) for bar in vram_bars(duel.results, duel.plans) if bar.is_planned}
    on_the_host = {bar.name: sum(bar.parts.values()) for bar in ram_bars(duel.results, duel.plans) if bar.is_planned}

    assert planned == {name: plan["vram_bytes"] + plan["context_bytes"] for name, plan in duel.plans.items()}
    assert on_the_host == {
        name: plan["host_private_bytes"] for name, plan in duel.plans.items() if plan["host_private_bytes"]
    }
    assert {"peft", "lema-nf4"} & planned.keys()


def test_a_plan_from_before_layers_kept_activations_can_still_be_drawn() -> None:
    old = dict(PLAN, phases=[{k: v for k, v in phase.items() if k != "kept_bytes"} for phase in PLAN["phases"]])
    old["host"] = {k: v for k, v in PLAN["host"].items() if k != "optimizer_bytes"}
    bars = [
        [bar.parts for bar in of(a_duel().results, {"lema": old}) if bar.is_planned] for of in (vram_bars, ram_bars)
    ]

    assert "kept activations" not in bars[0][0]
    assert bars[0][0]["boundary activations"] == bars[0][0]["activations"] == GIB
    assert bars[1][0] == {"layers": 12 * GIB}


def test_a_plan_that_lacks_a_field_is_an_error_that_names_it() -> None:
    plan = {name: value for name, value in PLAN.items() if name != "head_bytes"}
    with pytest.raises(ValueError, match="memory plan of lema has no head_bytes"):
        charts(a_duel(plans={"lema": plan}))


def test_without_a_card_there_is_no_chart_of_vram() -> None:
    no_card = {f"vram_{name}_peak_bytes": None for name in ("allocated", "reserved", "process")}
    samples = [UseSample(elapsed_s=1.0, vram_bytes=None, ram_bytes=GIB)]
    duel = a_duel(results=(a_result("peft", samples=samples, **no_card),), plans={})

    assert list(charts(duel)) == ["trade-off", "loss", "ram", "ram-bars"]
    assert charts(duel)["trade-off"].title == "RAM against step time"


def test_a_duel_that_nobody_finished_has_no_chart_and_still_a_page() -> None:
    duel = a_duel(results=(out_of_memory(),), plans={})
    assert charts(duel) == {}
    pytest.importorskip("plotly")
    assert "No contender finished" in page_html([duel])


def themed(value: Any) -> Any:
    """Colours in the places of their names, as the page's script does it."""
    if isinstance(value, str):
        return "#123456" if re.fullmatch(r"\$[a-z]+\d*", value) else value
    if isinstance(value, list):
        return [themed(item) for item in value]
    return {key: themed(item) for key, item in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("key", ["trade-off", "loss", "vram", "ram", "vram-bars", "ram-bars"])
def test_plotly_knows_every_property_of_a_chart(key: str) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    graph_objects.Figure(**themed(charts(a_duel())[key].figure))


def test_every_colour_of_a_chart_is_a_colour_of_the_page() -> None:
    text = json.dumps([chart.figure for chart in duel_charts(a_duel(), "peft")])
    css = (ROOT / "hf_lema" / "reporting" / "page.css").read_text()
    for name in set(re.findall(r'"\$([a-z]+\d*)"', text)):
        assert css.count(f"--{name}:") == 2, f"--{name}, once light and once dark"


# The page


class Elements(HTMLParser):
    """Addresses that a page asks for, and its elements with an id."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href") and value:
                self.addresses.append(value)
            if name == "id" and value:
                self.ids.append(value)


def test_page_is_one_file_that_asks_for_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    write_page([a_duel()], tmp_path / "out" / "report.html")
    elements = Elements()
    elements.feed((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))

    assert elements.addresses == ["data:,"]
    assert [name for name in elements.ids if name.startswith("duel-0-") and not name.endswith("-title")] == [
        f"duel-0-{key}" for key in ("trade-off", "loss", "vram", "ram", "vram-bars", "ram-bars")
    ]
    assert len(elements.ids) == len(set(elements.ids))


def test_page_says_verdict_command_settings_and_environment() -> None:
    pytest.importorskip("plotly")
    page = page_html([a_duel()])

    for text in (
        headline(a_duel().results, "peft"),
        "<code>git checkout c0ffee</code>",
        "<code>python recipes/compare_peft.py --quick</code>",
        "<dt>vram_limit_bytes</dt><dd>18.00 GiB</dd>",
        "<dt>gpu_name</dt><dd>a card</dd>",
        "All saw the same batches.",
    ):
        assert text in page


def test_text_of_a_record_is_escaped_on_the_page() -> None:
    pytest.importorskip("plotly")
    nasty = dataclasses.replace(a_result("</script><b>"), notes=("<i>&",))
    page = page_html([a_duel(title="<u>", results=(nasty,), plans={}, commands=("<s>",), remarks=("<q>",))])

    for raw in ("</script><b>", "<i>&", "<u>", "<s>", "<q>"):
        assert raw not in page


def test_a_page_of_nothing_and_one_without_plotly_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no duel to show"):
        page_html([])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else find(name))
    with pytest.raises(RuntimeError, match=r'pip install "hf_lema\[report\]"'):
        page_html([a_duel()])


def test_a_record_that_is_not_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks status"):
        duel_from_json(duel_json({"name": "peft"}))


# hf-lema report


def test_report_writes_page_and_markdown_from_the_same_files_and_tells_the_verdict(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    source = tmp_path / "results.json"
    source.write_text(json.dumps(duel_json(a_result("peft", 16).to_json(), a_result("lema").to_json())))

    report = make_report([source], html=tmp_path / "out" / "r.html", markdown=tmp_path / "out" / "r.md")

    assert {path.name for path in report.files} == {"r.html", "r.md", "loss.png", "vram.png", "step_time.png"}
    assert all(path.is_file() for path in report.files)
    text = report.format()
    assert "lema needs the least VRAM, 4.00 GiB" in text
    assert "0.25 times the VRAM" in text
    assert str(tmp_path / "out" / "r.html") in text
    as_dict = json.loads(json.dumps(report.to_dict()))
    assert [row["vram_allocated_peak_bytes"] for row in as_dict["duels"][0]["contenders"]] == [16 * GIB, 4 * GIB]
    assert as_dict["duels"][0]["headline"] in text


def test_report_without_any_file_to_write_just_tells(tmp_path: Path) -> None:
    report = make_report([ROOT / "recipes/results/duel-smollm2-135m-cpu.json"])

    assert report.files == ()
    assert "qlora" in report.format()


def test_report_refuses_two_duels_in_one_markdown_and_a_baseline_that_is_not_there(tmp_path: Path) -> None:
    lines = ROOT / "recipes/results/h100-7b-fp16-c.jsonl"
    with pytest.raises(ValueError, match="one duel, but the files hold 2"):
        make_report([lines], markdown=tmp_path / "r.md")
    with pytest.raises(ValueError, match="no contender is named 'lemma'; there are peft, lema"):
        make_report([lines], baseline_name="lemma")
    assert list(tmp_path.iterdir()) == []
