"""A duel's verdict in two or three sentences: who needs the least memory, who is the fastest, who did not finish.

Responsibility: the words. What may be said at all is `hf_lema.reporting.verdict`'s to decide.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_lema.reporting.contender import ContenderResult
from hf_lema.reporting.verdict import step_median_and_spread_s, verdict
from hf_lema.units import to_gib

# The first that every finished contender has is what memory means in a duel: without a card it is RAM.
_MEMORY = (
    ("VRAM", "vram_allocated_peak_bytes"),
    ("resident RAM", "ram_resident_above_imports_peak_bytes"),
    ("RAM", "ram_private_above_imports_peak_bytes"),
)


def memory_of_duel(results: Sequence[ContenderResult]) -> tuple[str, str] | None:
    """What is compared as memory: its name, and the field of `ContenderResult`; ``None`` where nothing was measured."""
    finished = [result for result in results if result.status == "ok"]
    for quantity, field in _MEMORY:
        if finished and all(getattr(result, field) is not None for result in finished):
            return quantity, field
    return None


def headline(results: Sequence[ContenderResult], baseline_name: str) -> str:
    """The verdict on a duel, for a person who reads nothing else.

    Args:
        results: The contenders, each once.
        baseline_name: The one that the others are held against.
    """
    finished = [result for result in results if result.status == "ok"]
    ends = [f"{result.name} {_END[result.status]}." for result in results if result.status != "ok"]
    if not finished:
        return " ".join(["No contender finished.", *ends])
    baseline = next((result for result in finished if result.name == baseline_name), None)
    sentences = [_least_memory(finished, baseline), _fastest(finished)]
    return " ".join([*filter(None, sentences), *ends])


_END = {"out_of_memory": "ran out of memory", "failed": "failed", "skipped": "was skipped"}


def _least_memory(finished: Sequence[ContenderResult], baseline: ContenderResult | None) -> str:
    memory = memory_of_duel(finished)
    if memory is None:
        return ""
    quantity, field = memory
    least = min(finished, key=lambda result: getattr(result, field))
    tied = [other.name for other in finished if other is not least and _is_noise(least, other, quantity)]
    if len(tied) + 1 == len(finished) > 1:
        most_bytes = max(getattr(result, field) for result in finished)
        range_gib = f"{to_gib(getattr(least, field)):.2f} to {to_gib(most_bytes):.2f} GiB"
        return f"No contender needs less {quantity} than all others beyond noise, {range_gib}."
    text = f"{_joined([least.name, *tied])} {'need' if tied else 'needs'} the least {quantity}, "
    text += f"{to_gib(getattr(least, field)):.2f} GiB"
    if baseline is None or least.name == baseline.name or baseline.name in tied:
        return text + "."
    comparisons = {comparison.quantity: comparison.text for comparison in verdict(least, baseline).comparisons}
    words = [comparisons[name] for name in (quantity, "step", "loss") if name in comparisons]
    return f"{text}; {f'{least.name} ' if tied else ''}against {baseline.name}: {', '.join(words)}."


def _fastest(finished: Sequence[ContenderResult]) -> str:
    timed = [(summary[0], result) for result in finished if (summary := step_median_and_spread_s(result)) is not None]
    if len(timed) < 2:
        return ""
    step_s, fastest = min(timed, key=lambda pair: pair[0])
    tied = [other.name for _, other in timed if other is not fastest and _is_noise(fastest, other, "step")]
    if len(tied) + 1 == len(timed):
        slowest_s = max(median_s for median_s, _ in timed)
        return f"No contender is the fastest beyond noise, {step_s:.3f} to {slowest_s:.3f} s a step."
    names = _joined([fastest.name, *tied])
    return f"{names} {'are' if tied else 'is'} the fastest, {step_s:.3f} s a step{', within noise' if tied else ''}."


def _is_noise(one: ContenderResult, other: ContenderResult, quantity: str) -> bool:
    compared = {comparison.quantity: comparison for comparison in verdict(one, other).comparisons}
    return quantity in compared and compared[quantity].text == f"{quantity} within noise"


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
