"""Tables of all measured figures, made from the records in results/; `readme_table.py` writes them to docs/measured.md.

Every duel (``*.json`` of compare_peft.py) and every job in lines of bench_step.py (``*.jsonl``) is a table of its own.
Where several records hold the same job, done by the same contender in the same way, the newest counts. Records of other
kinds, which have sections of their own in README.md, are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lema.config import LemaConfig
from hf_lema.reporting.bench_lines import STREAMED, read_bench_lines, way_to_run
from hf_lema.reporting.contender import ContenderResult
from hf_lema.reporting.duel_record import DUEL_KEYS, DuelRecord, duel_title, read_duels
from hf_lema.reporting.report import BASELINE_NAME
from hf_lema.reporting.verdict import verdict
from hf_lema.units import to_gib

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "recipes" / "results"
LINKS = "../recipes/results"
"""Where the records are, seen from docs/."""
NUM_SLOTS = LemaConfig().num_slots


@dataclass(frozen=True, kw_only=True)
class Line:
    """One contender of one record.

    Attributes:
        label: The contender and its set-up.
        result: Its figures.
        baseline: Stock PEFT of the same record, on the same machine in the same hour.
        source: File name of the record.
        time_utc: When it was made.
    """

    label: str
    result: ContenderResult
    baseline: ContenderResult | None
    source: str
    time_utc: str

    @property
    def step_s(self) -> float | None:
        """Median after the warm-up."""
        return statistics.median(self.result.timed_step_s) if self.result.timed_step_s else None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What contenders are compared in.

    Attributes:
        head: Of its column.
        field: Of a result.
        quantity: Its name in a verdict.
    """

    head: str
    field: str
    quantity: str


FIGURES = (
    Figure(head="VRAM allocated (reserved) GiB", field="vram_allocated_peak_bytes", quantity="VRAM"),
    Figure(head="private RAM GiB", field="ram_private_above_imports_peak_bytes", quantity="RAM"),
    Figure(head="resident RAM GiB", field="ram_resident_above_imports_peak_bytes", quantity="resident RAM"),
)


def record_files(folder: Path = RESULTS) -> list[Path]:
    """The records of duels and benches, by name."""
    duels = [path for path in sorted(folder.glob("*.json")) if _is_duel(path)]
    return duels + [path for path in sorted(folder.glob("*.jsonl")) if any(map(_is_step, _lines_of(path)))]


def _lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _is_step(line: str) -> bool:
    """Whether a line is one of bench_step.py, and not of another recipe or of a run that failed."""
    return {"options", "step_s"} <= json.loads(line).keys()


def _is_duel(path: Path) -> bool:
    return set(DUEL_KEYS) <= json.loads(path.read_text(encoding="utf-8")).keys()


def tables(files: Iterable[Path]) -> str:
    """Markdown of all jobs: those on a GPU first, those with the most contenders before others."""
    jobs: dict[tuple[str, str], list[Line]] = {}
    for path in files:
        for duel in duels_of(path):
            jobs.setdefault((device_of(duel), duel.title), []).extend(lines_of(duel, path.name))
    newest = {key: _newest(lines) for key, lines in jobs.items()}
    in_order = sorted(newest, key=lambda key: (not _has_vram(newest[key]), -len(newest[key]), key))
    return "\n\n".join(_table(*key, newest[key]) for key in in_order)


def duels_of(path: Path) -> Sequence[DuelRecord]:
    """The duels of a file; in lines of bench_step.py every set-up is a contender, named by `_set_up`."""
    if path.suffix != ".jsonl":
        return read_duels([path])
    return _with_baseline([_one_line(line) for line in filter(_is_step, _lines_of(path))])


def _one_line(line: str) -> DuelRecord:
    (fields,) = read_bench_lines(line)
    name = _set_up(json.loads(line)["options"])
    results = tuple(dataclasses.replace(result, name=name) for result in fields["results"])
    return DuelRecord(**fields | {"title": duel_title(fields["settings"]), "results": results})


def _set_up(options: dict[str, Any]) -> str:
    if not options["contender"].startswith(STREAMED):
        return str(options["contender"])
    places = {"ram": "in RAM", "disk": "from disk", "mixed": "in RAM and on disk"}
    place = "from cold files" if options.get("cold") else places[options["tier"]]
    way = way_to_run(options)
    how = f"at {options['vram_budget']}" if way is None else f"in {way}"
    slots = "" if options["num_slots"] == NUM_SLOTS else f", {options['num_slots']} slots"
    return f"{options['contender']} {how}{slots}, layers {place}"


def _with_baseline(duels: Sequence[DuelRecord]) -> list[DuelRecord]:
    """Each line beside the stock PEFT of its job in the file."""
    stock = {duel.title: duel.results[0] for duel in duels if duel.results[0].name == BASELINE_NAME}
    return [
        dataclasses.replace(duel, results=(*duel.results, stock[duel.title]))
        if duel.title in stock and duel.results[0].name != BASELINE_NAME
        else duel
        for duel in duels
    ]


def device_of(duel: DuelRecord) -> str:
    """The card, or without one the processor."""
    return str(duel.environment.get("gpu_name") or duel.environment.get("cpu_model") or "an unnamed machine")


def lines_of(duel: DuelRecord, source: str) -> list[Line]:
    """The contenders of a duel that had their turn.

    Args:
        duel: The duel.
        source: File name of its record.
    """
    baseline = next((result for result in duel.results if result.name == BASELINE_NAME), None)
    time_utc = str(duel.environment.get("time_utc", ""))
    return [
        Line(label=result.name, result=result, baseline=baseline, source=source, time_utc=time_utc)
        for result in duel.results
        if result.status != "skipped"
    ]


def _newest(lines: Sequence[Line]) -> list[Line]:
    """Of each label the newest, stock PEFT first, the rest in the order of their names."""
    by_label = {line.label: line for line in sorted(lines, key=lambda line: line.time_utc)}
    return sorted(by_label.values(), key=lambda line: (line.label != BASELINE_NAME, is_ours(line), line.label))


def is_ours(line: Line) -> bool:
    """Whether it is a streamed model's."""
    return line.label.startswith(STREAMED)


def _has_vram(lines: Sequence[Line]) -> bool:
    return any(line.result.vram_allocated_peak_bytes is not None for line in lines)


def figures_of(lines: Sequence[Line]) -> list[Figure]:
    """The figures that some of the lines have."""
    return [figure for figure in FIGURES if any(getattr(line.result, figure.field) is not None for line in lines)]


def _table(device: str, job: str, lines: Sequence[Line]) -> str:
    shown = figures_of(lines)
    head = ["contender", "step s", f"times {BASELINE_NAME}", *(figure.head for figure in shown), "record"]
    rows = [head, [":--", *["--:"] * (len(head) - 2), ":--"], *(_cells(line, shown) for line in lines)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    said = better(lines)
    return "\n\n".join(
        [f"**{job}, {device}**", table, *([f"What others do better: {'; '.join(said)}."] if said else [])]
    )


def _cells(line: Line, shown: Sequence[Figure]) -> list[str]:
    link = f"[{Path(line.source).stem}]({LINKS}/{line.source})"
    if line.result.status != "ok":
        return [line.label, line.result.status.replace("_", " "), "", *["" for _ in shown], link]
    return [line.label, seconds(line.step_s), _ratio(line), *(_gib(line.result, figure) for figure in shown), link]


def seconds(step_s: float | None) -> str:
    """As it stands in a table."""
    return "-" if step_s is None else f"{step_s:.3f}" if step_s < 10 else f"{step_s:.1f}"


def _ratio(line: Line) -> str:
    if line.baseline is None or not line.baseline.timed_step_s or line.step_s is None:
        return "-"
    return f"{line.step_s / statistics.median(line.baseline.timed_step_s):.2f}"


def _gib(result: ContenderResult, figure: Figure) -> str:
    value = getattr(result, figure.field)
    if value is None:
        return "-"
    reserved = result.vram_reserved_peak_bytes if figure.quantity == "VRAM" else None
    return f"{to_gib(value):.2f}" + ("" if reserved is None else f" ({to_gib(reserved):.2f})")


def better(lines: Sequence[Line]) -> list[str]:
    """What others do better than any streamed contender, plainly; nothing of what is within the noise."""
    finished = [line for line in lines if line.result.status == "ok"]
    ours, others = [line for line in finished if is_ours(line)], [line for line in finished if not is_ours(line)]
    parts = [
        f"{best.label} takes {seconds(best.step_s)} s a step, {STREAMED} at best {seconds(own.step_s)} s"
        for best, own in _faster(others, ours)
    ]
    # Private RAM alone leaves out the weights of a stock model on the CPU, which are pages of its mapped file.
    for figure in [f for f in figures_of(lines) if _has_vram(lines) or f.quantity != "RAM"]:
        read = functools.partial(_value, field=figure.field)
        if (pair := _best_of_both(others, ours, figure.quantity, read)) is not None:
            best, _ = pair
            least, least_own = (f"{to_gib(getattr(line.result, figure.field)):.2f}" for line in pair)
            parts.append(f"{best.label} needs {least} GiB of {figure.quantity}, {STREAMED} at least {least_own}")
    return parts


def _faster(others: Sequence[Line], ours: Sequence[Line]) -> Iterator[tuple[Line, Line]]:
    """Every other contender that is faster than all of ours, and the one of ours that comes nearest to it.

    Seconds are those of a machine and an hour: each of ours is held against the other of its own record.
    """
    for label in dict.fromkeys(line.label for line in others):
        pairs = [
            (other, own)
            for own in ours
            for other in _beside(own, others)
            if other.label == label and other.step_s is not None and own.step_s is not None
        ]
        if not pairs:
            continue
        best, own = max(pairs, key=lambda pair: pair[0].step_s / pair[1].step_s)
        if (pair := _best_of_both([best], [own], "step", lambda line: line.step_s)) is not None:
            yield pair


def _beside(own: Line, others: Sequence[Line]) -> list[Line]:
    """The other contenders of a line's record; stock PEFT also where a newer record's has taken its row."""
    found = [line for line in others if line.source == own.source and line.label != BASELINE_NAME]
    return (
        found if own.baseline is None else [dataclasses.replace(own, label=BASELINE_NAME, result=own.baseline), *found]
    )


def _value(line: Line, field: str) -> float | None:
    value: float | None = getattr(line.result, field)
    return value


def _best_of_both(
    others: Sequence[Line], ours: Sequence[Line], quantity: str, read: Callable[[Line], float | None]
) -> tuple[Line, Line] | None:
    """The least of the others and the least of ours, where the first is less beyond the noise of a duel's verdict."""
    known = [[(value, line) for line in side if (value := read(line)) is not None] for side in (others, ours)]
    if not all(known):
        return None
    (least, best), (least_own, own) = (min(side, key=lambda pair: pair[0]) for side in known)
    said = {comparison.quantity: comparison.text for comparison in verdict(own.result, best.result).comparisons}
    is_said = quantity in said and "within noise" not in said[quantity] and "no verdict" not in said[quantity]
    return (best, own) if least < least_own and is_said else None
