"""README's table card x model -> what fits and how long a step takes, each figure with where it comes from.

    python recipes/card_table.py            plans anew, writes recipes/results/card-table.json and README's table
    python recipes/card_table.py --readme   only writes the table, from that record

Planned figures are those of ``hf-lema plan`` (`compare_plans`), with data-sheet rates; measured ones are read from
records in recipes/results. A test holds README against the record, and the record against a new plan.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_lema import LemaConfig
from hf_lema.planning.device_rates import find_rates
from hf_lema.planning.memory_plan import MemoryPlan
from hf_lema.planning.plan_table import compare_plans
from hf_lema.planning.step_cost import PlanOptions
from hf_lema.units import format_bytes, parse_bytes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "recipes" / "results"
RECORD = RESULTS / "card-table.json"
BEGIN, END = "<!-- card table: python recipes/card_table.py -->", "<!-- /card table -->"
BATCH_SIZE, SEQ_LEN, LORA_RANK = 8, 512, 16
MACHINES = (
    ("T4, Colab", "T4", "11.2GiB"),
    ("T4, Kaggle (one of two)", "T4", "27GiB"),
    ("P100, Kaggle", "P100", "27GiB"),
    ("RTX 3060 12 GB, a PC of 32 GB", "RTX 3060", "28GiB"),
)
"""What is shown, card of the planner, free RAM: Colab's 12.7 GiB, Kaggle's 29 and the PC's, less what runs there."""
MODELS = ("llama-2-7b", "llama-2-13b")
COLUMNS = ("peft", "qlora", "lema", "lema-nf4")
MEASURED = (("H100 80 GB", "h100-7b-fp16-b.jsonl", "llama-2-7b", {"peft": 0, "lema": 1}),)
"""What is shown, record, model, and which line of the record is which column."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One job on one card.

    Attributes:
        fits: Whether it does.
        vram_bytes: Allocated at the peak.
        step_s: Of a step: a lower bound where it is planned, the median where it is measured.
        tier: Where streamed layers rest: ``"ram"``, ``"disk"``, ``"mixed"``; ``"vram"`` where none is streamed.
    """

    fits: bool
    vram_bytes: int
    step_s: float
    tier: str


def plan_row(card: str, ram: str, model: str) -> dict[str, Cell]:
    """All columns for a card and a model.

    Args:
        card: As ``hf-lema plan --card`` takes it.
        ram: Free RAM.
        model: A shape.
    """
    shared: dict[str, Any] = {"batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "lora": LORA_RANK}
    shared |= {"ram_bytes": parse_bytes(ram), "rates": find_rates(card)}
    cells: dict[str, Cell] = {}
    for quantization in (None, "nf4"):
        options = PlanOptions(dtype="float16", quantization=quantization)
        compared = compare_plans(model, LemaConfig(), **shared, options=options)
        streamed, stock, qlora = (_cell(p, f) for p, f in zip(compared.plans, compared.fits, strict=True))
        cells |= {"lema-nf4": streamed} if quantization else {"lema": streamed, "peft": stock, "qlora": qlora}
    return {name: cells[name] for name in COLUMNS}


def _cell(plan: MemoryPlan, fits: bool) -> Cell:
    return Cell(fits=fits, vram_bytes=plan.vram_bytes, step_s=round(plan.time.step_s, 3), tier=plan.tier)


def measured_row(record: str, lines: dict[str, int]) -> dict[str, Cell]:
    """The columns that a record of ``bench_step.py`` has.

    Args:
        record: File in recipes/results.
        lines: Column -> number of its line.
    """
    read = [json.loads(line) for line in (RESULTS / record).read_text(encoding="utf-8").splitlines()]
    return {
        name: Cell(
            fits=True,
            vram_bytes=read[number]["vram_allocated_peak_bytes"],
            step_s=read[number]["step_median_s"],
            tier="vram" if read[number]["options"]["contender"] == "peft" else read[number]["options"]["tier"],
        )
        for name, number in lines.items()
    }


def make_record() -> dict[str, Any]:
    """Plans every row; takes a minute or two of one core."""
    planned = [
        {"machine": machine, "card": card, "ram": ram, "model": model, "cells": _as_json(plan_row(card, ram, model))}
        for machine, card, ram in MACHINES
        for model in MODELS
    ]
    job = {"batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "lora_rank": LORA_RANK, "dtype": "float16"}
    return {"job": job, "planned": planned}


def _as_json(cells: dict[str, Cell]) -> dict[str, Any]:
    return {name: asdict(cell) for name, cell in cells.items()}


def render(record: dict[str, Any]) -> str:
    """The table as Markdown."""
    head = ("card", "free RAM", "model", "stock PEFT, fp16", "QLoRA", "hf_lema, fp16", "hf_lema, NF4", "from")
    rows = [
        (
            row["machine"],
            row["ram"].replace("GiB", " GiB"),
            row["model"],
            *_texts(row["cells"], is_bound=True),
            "planned",
        )
        for row in record["planned"]
    ]
    for machine, name, model, lines in MEASURED:
        texts = _texts(_as_json(measured_row(name, lines)), is_bound=False)
        rows.append((machine, "", model, *texts, f"measured ([record](recipes/results/{name}))"))
    return "\n".join([_line(head), _line(["---"] * len(head)), *map(_line, rows)])


def _texts(cells: dict[str, Any], is_bound: bool) -> list[str]:
    return [_text(cells[name], is_bound) if name in cells else "" for name in COLUMNS]


def _text(cell: dict[str, Any], is_bound: bool) -> str:
    if not cell["fits"]:
        return "no"
    time = f"{'at least ' if is_bound else ''}{cell['step_s']:.3g} s"
    where = {"vram": "", "ram": ", RAM", "disk": ", disk", "mixed": ", RAM and disk"}[cell["tier"]]
    return f"{format_bytes(cell['vram_bytes'])}{where}, {time}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_table(text: str, table: str) -> str:
    """README's text with its table written anew.

    Raises:
        ValueError: It has no such block, or more than one.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md: expected one block between {BEGIN} and {END}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> None:
    """Writes the record and the table."""
    parser = argparse.ArgumentParser(description="plan README's table of cards and models")
    parser.add_argument("--readme", action="store_true", help="write the table from the record that is there")
    args = parser.parse_args(argv)
    if not args.readme:
        RECORD.write_text(json.dumps(make_record(), indent=1) + "\n", encoding="utf-8")
    table = render(json.loads(RECORD.read_text(encoding="utf-8")))
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), table), encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
