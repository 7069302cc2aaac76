"""What may be said of one contender against another, and what may not.

Responsibility: comparing two results figure by figure, with the noise under which nothing is said. Knows nothing of
tables or pages.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from hf_lema.reporting.contender import ContenderResult
from hf_lema.units import MIB, format_bytes

# Below this many timed steps a spread means nothing.
MIN_TIMED_STEPS = 4
# The allocator takes memory in segments of 2 MiB to 20 MiB; RAM is sampled, and the C library gives pages back late.
MEMORY_NOISE_BYTES = 32 * MIB
MEMORY_NOISE_RATIO = 0.02

NOISE_RULE = (
    "Nothing is said where the difference is within the noise. "
    "Step: the difference of the medians after the warm-up against the larger of the two interquartile ranges, "
    f"from {MIN_TIMED_STEPS} timed steps each. "
    f"VRAM and RAM: the larger of {format_bytes(MEMORY_NOISE_BYTES)} and "
    f"{100 * MEMORY_NOISE_RATIO:.0f} % of the larger figure. "
    "Loss: equal means the same number at every step; otherwise the largest difference is given, "
    "and only where both trained on the same batches."
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of a contender against the baseline's.

    Attributes:
        quantity: ``step``, ``VRAM``, ``RAM``, ``resident RAM`` or ``loss``.
        ratio: Contender over baseline; ``None`` where nothing may be said, or a ratio means nothing.
        text: What may be said, for a person.
    """

    quantity: str
    ratio: float | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All that may be said of a contender against the baseline.

    Attributes:
        comparisons: One for each figure that both have; none when one of the two did not finish.
        text: The same in one line.
    """

    comparisons: tuple[Comparison, ...]
    text: str


def verdict(result: ContenderResult, baseline: ContenderResult | None) -> Verdict:
    """Compare a contender with the baseline.

    The noise under which nothing is said of a figure:

    - **step**: medians of the steps after the warm-up. The noise is the larger interquartile range of the two; with
      fewer than 4 timed steps in either there is no verdict.
    - **VRAM** (allocated peak), **RAM** (private peak above imports) and **resident RAM** (the same with the pages of
      mapped files, where no card takes part): the larger of 32 MiB and 2 % of the larger
      figure.
    - **loss**: no noise: either every step's loss is the same number, or the largest difference is stated. Where the
      batches were not the same, or a loss is not a number, that is said instead.

    Args:
        result: The contender.
        baseline: What it is held against; ``None`` when the duel had none.
    """
    if result.status != "ok":
        return Verdict(comparisons=(), text=f"{result.status.replace('_', ' ')}: {result.reason}")
    if baseline is None:
        return Verdict(comparisons=(), text="no baseline")
    if result.name == baseline.name:
        return Verdict(comparisons=(), text="baseline")
    if baseline.status != "ok":
        ended = {"out_of_memory": "ran out of memory", "failed": "failed", "skipped": "was skipped"}[baseline.status]
        return Verdict(comparisons=(), text=f"finished; {baseline.name} {ended}")
    candidates = (
        _compare_step(result, baseline),
        _compare_memory("VRAM", result.vram_allocated_peak_bytes, baseline.vram_allocated_peak_bytes),
        _compare_memory(
            "RAM", result.ram_private_above_imports_peak_bytes, baseline.ram_private_above_imports_peak_bytes
        ),
        _compare_memory(
            "resident RAM",
            result.ram_resident_above_imports_peak_bytes,
            baseline.ram_resident_above_imports_peak_bytes,
        ),
        _compare_loss(result, baseline),
    )
    comparisons = tuple(comparison for comparison in candidates if comparison is not None)
    return Verdict(comparisons=comparisons, text=", ".join(comparison.text for comparison in comparisons))


def step_median_and_spread_s(result: ContenderResult) -> tuple[float, float] | None:
    """Median and interquartile range of the steps after the warm-up; ``None`` with fewer than four of them."""
    times_s = result.timed_step_s
    if len(times_s) < MIN_TIMED_STEPS:
        return None
    lower_s, median_s, upper_s = statistics.quantiles(times_s, n=4, method="inclusive")
    return median_s, upper_s - lower_s


def _compare_step(result: ContenderResult, baseline: ContenderResult) -> Comparison:
    own, other = step_median_and_spread_s(result), step_median_and_spread_s(baseline)
    if own is None or other is None:
        too_few = f"step: no verdict (fewer than {MIN_TIMED_STEPS} timed steps)"
        return Comparison(quantity="step", ratio=None, text=too_few)
    noise_s = max(own[1], other[1])
    if abs(own[0] - other[0]) <= noise_s:
        return Comparison(quantity="step", ratio=None, text="step within noise")
    ratio = own[0] / other[0]
    return Comparison(quantity="step", ratio=ratio, text=f"{_times(ratio)} the step")


def _compare_memory(quantity: str, own_bytes: int | None, other_bytes: int | None) -> Comparison | None:
    if own_bytes is None or other_bytes is None:
        return None
    noise_bytes = max(MEMORY_NOISE_BYTES, MEMORY_NOISE_RATIO * max(own_bytes, other_bytes))
    difference_bytes = own_bytes - other_bytes
    if abs(difference_bytes) <= noise_bytes:
        return Comparison(quantity=quantity, ratio=None, text=f"{quantity} within noise")
    if min(own_bytes, other_bytes) <= noise_bytes:  # a ratio to next to nothing means nothing
        sign = "+" if difference_bytes > 0 else "-"
        text = f"{quantity} {sign}{format_bytes(abs(difference_bytes))}"
        return Comparison(quantity=quantity, ratio=None, text=text)
    ratio = own_bytes / other_bytes
    return Comparison(quantity=quantity, ratio=ratio, text=f"{_times(ratio)} the {quantity}")


def _compare_loss(result: ContenderResult, baseline: ContenderResult) -> Comparison | None:
    num_steps = min(len(result.loss), len(baseline.loss))
    if num_steps == 0:
        return None
    pairs = list(zip(result.loss, baseline.loss, strict=False))
    return Comparison(quantity="loss", ratio=None, text=_loss_text(result, baseline, pairs))


def _loss_text(result: ContenderResult, baseline: ContenderResult, pairs: list[tuple[float, float]]) -> str:
    for contender in (result, baseline):
        for num_steps, loss in enumerate(contender.loss, start=1):
            if not math.isfinite(loss):
                return f"loss of {contender.name} is {loss} at step {num_steps}"
    if result.batches_sha256 is None or result.batches_sha256 != baseline.batches_sha256:
        return "loss: no verdict (not the same batches)"
    if all(own == other for own, other in pairs):
        return f"loss equal ({len(pairs)} steps)"
    differences = [abs(own - other) for own, other in pairs]
    largest = max(differences)
    return f"loss differs by up to {largest:.2g} (step {differences.index(largest) + 1})"


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times" if ratio < 10 else f"{ratio:.0f} times"
