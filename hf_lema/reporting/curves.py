"""Reading a training's curves: how straight the loss falls, where it rests, where it drops, how full the card was.

Responsibility: numbers in, a reading out; each rule is stated where it is applied. Knows neither how the numbers were
measured nor how the reading is shown.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

NEARLY_FULL_SHARE = 0.9
"""Share of the card above which a step counts as nearly out of memory."""
MIN_STEPS = 10
"""A shorter curve is fitted, but not searched for plateaus and cliffs."""

_MAD_TO_SIGMA = 1.4826  # of a normal distribution: standard deviation over median absolute deviation
_CLIFF_ERRORS = 5.0
_CLIFF_NOISES = 3.0
_FLAT_NOISES = 3.0
_PLATEAU_PACE = 0.25

CURVE_RULE = (
    "Curves: the line is fitted by least squares over all steps; the noise of a curve is taken from its second "
    "differences. A cliff: a line with a jump, fitted to the w steps before and the w after (w: a twelfth of the "
    f"curve, 5 to 20), falls at the jump by at least {_CLIFF_ERRORS:.0f} of its standard errors and "
    f"{_CLIFF_NOISES:.0f} noises. A plateau: a stretch without a cliff whose fitted line changes by less than a "
    "quarter of the curve's mean pace, and in no window of it by more than half; a window is as long as the noise "
    "asks, at least w, and no plateau is told where that is more than half of the curve; two that are nearer than a "
    "window are one where both together are flat. A curve whose means of w steps stay within "
    f"{_FLAT_NOISES:.0f} noises is one plateau."
)


@dataclass(frozen=True, kw_only=True)
class LinearFit:
    """The least-squares line through a curve.

    Attributes:
        slope_per_step: Change in one step, in the unit of the values; negative where they fall.
        r2: Share of the values' variance that the line explains, 0 to 1; 0 for a constant curve.
    """

    slope_per_step: float
    intercept: float
    r2: float

    def at(self, num_steps: float) -> float:
        """The line's value after so many steps; the first value of the curve is at 1."""
        return self.intercept + self.slope_per_step * num_steps


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """A stretch of steps in which the loss hardly changes; both ends count from 1 and belong to it."""

    first_step: int
    last_step: int


@dataclass(frozen=True, kw_only=True)
class Cliff:
    """A sudden, lasting fall: ``step`` is the first of the lower steps, from 1; ``drop`` the height of the jump."""

    step: int
    drop: float


@dataclass(frozen=True, kw_only=True)
class CurveReading:
    """What is to be seen in a loss curve.

    Attributes:
        num_steps: Values that were read.
        fit: The line through all of them.
        noise: Standard deviation of a single value around a smooth curve, in the unit of the values.
        plateaus: In their order, apart from each other.
        cliffs: In their order.
    """

    num_steps: int
    fit: LinearFit
    noise: float
    plateaus: tuple[Plateau, ...]
    cliffs: tuple[Cliff, ...]

    @property
    def text(self) -> str:
        """The reading in one line for a person."""
        way = "rises" if self.fit.slope_per_step > 0 else "falls"
        line = f"loss {way} by {abs(self.fit.slope_per_step):.2g} a step (R2 {self.fit.r2:.2f})"
        if self.num_steps < MIN_STEPS:
            return f"{line}; too short for plateaus and cliffs"
        plateaus = ", ".join(f"{plateau.first_step}-{plateau.last_step}" for plateau in self.plateaus)
        cliffs = ", ".join(str(cliff.step) for cliff in self.cliffs)
        return f"{line}, {_count('plateau', self.plateaus, plateaus)}, {_count('cliff', self.cliffs, cliffs)}"


def _count(word: str, found: Sequence[object], where: str) -> str:
    if not found:
        return f"no {word}"
    step = "step" if len(found) == 1 and "-" not in where else "steps"
    return f"{len(found)} {word}{'s' if len(found) > 1 else ''} ({step} {where})"


def linear_fit(values: Sequence[float]) -> LinearFit:
    """The least-squares line through values at steps 1, 2, 3 and so on.

    Raises:
        ValueError: Fewer than two values, or one that is not finite.
    """
    if len(values) < 2 or not all(math.isfinite(value) for value in values):
        raise ValueError(f"a line needs at least two values, all finite; got {len(values)}: {list(values[:8])}")
    mean_step = (len(values) + 1) / 2
    mean = statistics.fmean(values)
    steps = range(1, len(values) + 1)
    slope = sum((step - mean_step) * (value - mean) for step, value in zip(steps, values, strict=True)) / sum(
        (step - mean_step) ** 2 for step in steps
    )
    intercept = mean - slope * mean_step
    total = sum((value - mean) ** 2 for value in values)
    rest = sum((value - intercept - slope * step) ** 2 for step, value in zip(steps, values, strict=True))
    return LinearFit(slope_per_step=slope, intercept=intercept, r2=0.0 if total == 0 else max(1 - rest / total, 0.0))


def curve_noise(values: Sequence[float]) -> float:
    """Standard deviation of one value around a smooth curve, in the unit of the values.

    From the second differences, in which a straight line vanishes and independent noise grows by the root of six
    (1 + 4 + 1); their median absolute value is hardly touched by cliffs.
    """
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return _MAD_TO_SIGMA * statistics.median(bends) / math.sqrt(6) if bends else 0.0


def read_curve(losses: Sequence[float]) -> CurveReading | None:
    """Fit the loss of each step, and find its plateaus and cliffs by `CURVE_RULE`.

    A loss that is not finite ends the curve: what came before it is read.

    Args:
        losses: Of each optimizer step, in order, in nats per token.

    Returns:
        The reading; ``None`` with fewer than two finite values.
    """
    num_finite = next((idx for idx, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    values = [float(loss) for loss in losses[:num_finite]]
    if len(values) < 2:
        return None
    noise = curve_noise(values)
    is_long = len(values) >= MIN_STEPS
    cliffs = _find_cliffs(values, noise) if is_long else ()
    return CurveReading(
        num_steps=len(values),
        fit=linear_fit(values),
        noise=noise,
        plateaus=_find_plateaus(values, noise, cliffs) if is_long else (),
        cliffs=cliffs,
    )


def _window_steps(values: Sequence[float]) -> int:
    return min(max(len(values) // 12, MIN_STEPS // 2), 20)


def _find_cliffs(values: Sequence[float], noise: float) -> tuple[Cliff, ...]:
    """Finds nearer to each other than a window are one cliff, where the jump explains most."""
    width = _window_steps(values)
    found: list[tuple[float, Cliff]] = []
    for idx in range(width, len(values) - width + 1):
        drop, error = _jump(values[idx - width : idx + width])
        if drop <= 0 or drop < _CLIFF_NOISES * noise or drop < _CLIFF_ERRORS * error:
            continue
        cliff = Cliff(step=idx + 1, drop=drop)
        if found and cliff.step - found[-1][1].step < width:
            found[-1] = min(found[-1], (error, cliff), key=lambda find: find[0])
        else:
            found.append((error, cliff))
    return tuple(cliff for _, cliff in found)


def _jump(window: Sequence[float]) -> tuple[float, float]:
    """Fall at the middle of an even window, and its standard error, with one slope on both sides (least squares)."""
    width = len(window) // 2
    halves = (window[:width], window[width:])
    # The slope of both sides together, each around its own mean, is free of the jump; so is what it leaves.
    moments = [(step - (width - 1) / 2) for step in range(width)]
    spread = 2 * sum(moment**2 for moment in moments)
    slope = sum(moment * value for half in halves for moment, value in zip(moments, half, strict=True)) / spread
    means = [statistics.fmean(half) for half in halves]
    rests = [
        value - mean - slope * moment
        for half, mean in zip(halves, means, strict=True)
        for moment, value in zip(moments, half, strict=True)
    ]
    variance = sum(rest**2 for rest in rests) / (2 * width - 3)
    error = math.sqrt(variance * (2 / width + width**2 / spread))
    return means[0] - means[1] + slope * width, error


def _find_plateaus(values: Sequence[float], noise: float, cliffs: Sequence[Cliff]) -> tuple[Plateau, ...]:
    num_steps, width = len(values), _window_steps(values)
    means = [statistics.fmean(values[idx : idx + width]) for idx in range(num_steps - width + 1)]
    span = max(means) - min(means)
    if span <= _FLAT_NOISES * noise:
        return (Plateau(first_step=1, last_step=num_steps),)
    allowed = _PLATEAU_PACE * span / num_steps
    # The slope of a line through m noisy values has the standard error noise * sqrt(12 / m**3): the window is long
    # enough for two of them to be within what is allowed.
    length = max(width, math.ceil((12 * (2 * noise / allowed) ** 2) ** (1 / 3)))
    if length > num_steps // 2:
        return ()
    edges = [0, *(cliff.step - 1 for cliff in cliffs), num_steps]
    return tuple(
        plateau
        for begin, end in itertools.pairwise(edges)
        for plateau in _flat_stretches(values, begin, end, length, allowed)
    )


def _flat_stretches(
    values: Sequence[float], begin: int, end: int, length: int, allowed_per_step: float
) -> list[Plateau]:
    """Stretches between two cliffs, grown step by step from the first flat window that lies in no other.

    One that ends within a window of the next is joined with it where both together are flat.
    """
    mean = statistics.fmean(values)
    sums = list(itertools.accumulate((value - mean for value in values), initial=0.0))
    moments = list(itertools.accumulate((idx * (value - mean) for idx, value in enumerate(values)), initial=0.0))

    def slope(first: int, last: int) -> float:
        num_steps, middle = last - first, (first + last - 1) / 2
        moment = moments[last] - moments[first] - middle * (sums[last] - sums[first])
        return abs(12 * moment / (num_steps**3 - num_steps))

    stretches: list[Plateau] = []
    first = begin
    while first + length <= end:
        last = first + length
        if slope(first, last) > allowed_per_step:
            first += 1
            continue
        while last < end and slope(first, last + 1) <= allowed_per_step:
            if slope(last + 1 - length, last + 1) > 2 * allowed_per_step:
                break
            last += 1
        begin_of_both = stretches[-1].first_step - 1 if stretches else first
        if stretches and first - stretches[-1].last_step < length and slope(begin_of_both, last) <= allowed_per_step:
            stretches.pop()
        else:
            begin_of_both = first
        stretches.append(Plateau(first_step=begin_of_both + 1, last_step=last))
        first = last
    return stretches


def share_above(step_peak_bytes: Sequence[int], limit_bytes: int, share: float = NEARLY_FULL_SHARE) -> float | None:
    """Share of the steps, 0 to 1, whose largest use was above that share of the limit; ``None`` without a step.

    Raises:
        ValueError: The limit is not positive.
    """
    if limit_bytes <= 0:
        raise ValueError(f"the size of the card must be positive, got {limit_bytes} bytes")
    if not step_peak_bytes:
        return None
    return sum(peak_bytes > share * limit_bytes for peak_bytes in step_peak_bytes) / len(step_peak_bytes)
