"""Writes the tables of docs/scale.md: what more cards and more machines give, planned, and measured where a record is.

    python recipes/scale_page.py            # rewrite the tables
    python recipes/scale_page.py --check    # 1 where they are not what the planner says today

Planned rows are those of ``hf-lema plan --num-processes N --num-hosts M`` for the same job, at the rates beside each
table. Measured columns come from lines of `bench_group.py` in recipes/results/scale-7b.jsonl; there is no such file yet
where they say "not measured yet". Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from check_plans import H100

from hf_lema import LemaConfig
from hf_lema.planning.data_parallel import Launch
from hf_lema.planning.device_rates import DATA_SHEETS, DeviceRates
from hf_lema.planning.memory_plan import MemoryPlan
from hf_lema.planning.planner import best_plan
from hf_lema.planning.step_cost import PlanOptions, StepCost
from hf_lema.units import GIB, to_gib

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.md"
RECORDS = ROOT / "recipes" / "results" / "scale-7b.jsonl"
BEGIN, END = "<!-- tables: python recipes/scale_page.py -->", "<!-- end of tables -->"

# RAM of eight channels of DDR5-4800 and two sockets, less what copying from it reaches in practice: an assumption.
RAM_BYTES_PER_S = 400e9
NVLINK_BYTES_PER_S = 450e9
NETWORK_BYTES_PER_S = 100e9 / 8


@dataclass(frozen=True, kw_only=True)
class Table:
    """One job on one kind of card.

    Attributes:
        title: Heading of the table.
        contender: Name of the run in the record file, or "" where there is none.
        quantization: As in `PlanOptions`.
        rates: Of the card.
        launches: Its rows.
    """

    title: str
    contender: str
    quantization: str | None
    rates: DeviceRates
    launches: tuple[Launch, ...]


_EIGHT = Launch(num_processes=8, ram_bytes_per_s=RAM_BYTES_PER_S, link_bytes_per_s=NVLINK_BYTES_PER_S)
_H100_LAUNCHES = (
    Launch(),
    Launch(num_processes=2, link_bytes_per_s=NVLINK_BYTES_PER_S),
    _EIGHT,
    *(replace(_EIGHT, num_hosts=n, network_bytes_per_s=NETWORK_BYTES_PER_S) for n in (2, 4)),
    replace(_EIGHT, num_hosts=4, network_bytes_per_s=25e9 / 8),
)
TABLES = (
    Table(
        title="Llama-2-7B in fp16, H100 at the rates that `recipes/check_plans.py` checks",
        contender="lema",
        quantization=None,
        rates=H100,
        launches=_H100_LAUNCHES,
    ),
    Table(
        title="Llama-2-7B in NF4, the same cards",
        contender="lema-nf4",
        quantization="nf4",
        rates=H100,
        launches=_H100_LAUNCHES,
    ),
    Table(
        title="Llama-2-7B in fp16, T4 by its data sheet (optimistic), no links but the bus",
        contender="",
        quantization=None,
        rates=DATA_SHEETS["T4"],
        launches=(Launch(), Launch(num_processes=2), Launch(num_processes=2, cards_per_bus=2)),
    ),
)


def plans_of(table: Table) -> list[MemoryPlan]:
    """A plan for each row: 8 x 512 tokens a card, LoRA r=16, two slots, nothing but them and the ends in VRAM."""
    options = PlanOptions(
        quantization=table.quantization,
        boundaries="vram",
        embedding_and_head="vram",
        micro_batch_size=8,
        ram_bytes=1024 * GIB,
    )
    cost = StepCost("llama-2-7b", 8, 512, 16, table.rates, options)
    return [
        best_plan(
            cost,
            LemaConfig(vram_budget="min"),
            replace(options, num_processes=launch.num_processes, launch=launch),
        )
        for launch in table.launches
    ]


def measured(records: Sequence[dict[str, Any]], contender: str, launch: Launch) -> str:
    """What a record says of a row; only one machine's rows are measured."""
    if launch.num_hosts > 1 or launch.num_processes > 2 or launch.cards_per_bus > 1 or not contender:
        return "computed only"
    for record in reversed(records):
        if record["name"] != contender or record["num_processes"] != 2:
            continue
        if launch.num_processes == 1:
            return f"{record['alone']['step_median_s']:.3f} s, {to_gib(record['ram_alone_bytes']):.1f} GiB"
        ram = to_gib(record["ram_group_bytes"])
        return f"{record['step_median_s']:.3f} s, {record['throughput_ratio']:.2f} times, {ram:.1f} GiB"
    return "not measured yet"


def _launch_text(launch: Launch) -> str:
    cards = f"{launch.num_processes} card{'s' if launch.num_processes > 1 else ''}"
    if launch.cards_per_bus > 1:
        return f"{cards} behind one link"
    if launch.num_hosts > 1:
        return f"{launch.num_hosts} x {cards}, {8 * launch.network_bytes_per_s / 1e9:g} Gbit/s"
    return cards


def table_text(table: Table, records: Sequence[dict[str, Any]]) -> str:
    """One table in Markdown."""
    plans = plans_of(table)
    lines = [
        f"### {table.title}",
        "",
        "| cards | bus a card | step, at least | gradients | tokens/s | times one card | RAM a machine | VRAM a card "
        "| measured |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: | :-- |",
    ]
    for launch, plan in zip(table.launches, plans, strict=True):
        cells = [
            _launch_text(launch),
            f"{launch.shared(table.rates).h2d_bytes_per_s / 1e9:.1f} GB/s",
            f"{plan.time.step_s:.3f} s",
            f"{plan.time.all_reduce_s:.3f} s",
            f"{plan.tokens_per_s:,.0f}",
            f"{plan.tokens_per_s / plans[0].tokens_per_s:.2f}",
            f"{to_gib(plan.host_group_bytes):.1f} GiB",
            f"{to_gib(plan.vram_bytes):.2f} GiB",
            measured(records, table.contender, launch),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read_records(path: Path = RECORDS) -> list[dict[str, Any]]:
    """Lines of `bench_group.py`; none where the file is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def page_with(text: str, tables: str) -> str:
    """The page with its tables replaced.

    Raises:
        ValueError: A mark is missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"{PAGE.name} lacks the mark {BEGIN} or {END}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}"


def main(argv: list[str] | None = None) -> int:
    """Rewrites the page, or says whether it is stale."""
    parser = argparse.ArgumentParser(description="write the tables of docs/scale.md")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where the page is stale")
    args = parser.parse_args(argv)
    records = read_records()
    found = PAGE.read_text(encoding="utf-8")
    wanted = page_with(found, "\n\n".join(table_text(table, records) for table in TABLES))
    if args.check:
        print("up to date" if found == wanted else f"{PAGE} is stale: python recipes/scale_page.py")
        return int(found != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
