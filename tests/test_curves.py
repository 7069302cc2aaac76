"""Reading made curves: the fit of a line, plateaus and cliffs where they were put, and none where they were not."""

from __future__ import annotations

import math
import random

import pytest

from hf_lema.reporting.curves import CURVE_RULE, CurveReading, curve_noise, linear_fit, read_curve, share_above


def noisy(values: list[float], sigma: float, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [value + rng.gauss(0, sigma) for value in values]


def line(num_steps: int) -> list[float]:
    return [3 - 2 * idx / num_steps for idx in range(num_steps)]


def stairs(num_steps: int, num_treads: int = 4) -> list[float]:
    return [3 - 0.5 * (num_treads * idx // num_steps) for idx in range(num_steps)]


def decay(num_steps: int, num_steps_to_settle: float) -> list[float]:
    return [0.04 + 2.13 * math.exp(-idx / num_steps_to_settle) for idx in range(num_steps)]


def reading(values: list[float]) -> CurveReading:
    found = read_curve(values)
    assert found is not None
    return found


def stretches(found: CurveReading) -> list[tuple[int, int]]:
    return [(plateau.first_step, plateau.last_step) for plateau in found.plateaus]


# The line


def test_a_straight_line_is_fitted_exactly():
    fit = linear_fit([10.0, 8.0, 6.0, 4.0])
    assert (fit.slope_per_step, fit.intercept, fit.r2) == (-2.0, 12.0, 1.0)
    assert fit.at(1) == 10.0


def test_the_fit_of_four_points_is_that_of_the_normal_equations():
    fit = linear_fit([1.0, 3.0, 2.0, 4.0])
    assert fit.slope_per_step == pytest.approx(0.8)
    assert fit.intercept == pytest.approx(0.5)
    assert fit.r2 == pytest.approx(0.64)


def test_a_constant_curve_has_no_slope_and_explains_nothing():
    fit = linear_fit([2.0, 2.0, 2.0])
    assert (fit.slope_per_step, fit.r2) == (0.0, 0.0)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf, 2.0]])
def test_a_line_through_too_little_or_through_no_number_is_refused(values):
    with pytest.raises(ValueError, match="at least two values, all finite"):
        linear_fit(values)


def test_more_noise_is_seen_as_such_on_a_slope_and_across_cliffs():
    for curve in (line(400), stairs(400)):
        assert curve_noise(noisy(curve, 0.1)) == pytest.approx(0.1, rel=0.2)
    assert curve_noise(line(50)) == pytest.approx(0, abs=1e-12)


# Plateaus and cliffs


@pytest.mark.parametrize("sigma", [0.0, 0.02, 0.03])
def test_stairs_are_a_plateau_a_tread_and_a_cliff_between(sigma):
    found = reading(noisy(stairs(100), sigma))
    assert stretches(found) == [(1, 25), (26, 50), (51, 75), (76, 100)]
    assert [cliff.step for cliff in found.cliffs] == [26, 51, 76]
    assert [cliff.drop for cliff in found.cliffs] == pytest.approx([0.5] * 3, abs=4 * sigma)


def test_longer_stairs_are_told_from_five_times_less_than_their_noise():
    found = reading(noisy(stairs(400), 0.1))
    assert len(found.plateaus) == 4
    assert [cliff.step for cliff in found.cliffs] == [101, 201, 301]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("sigma", [0.0, 0.02, 0.1, 0.4])
def test_a_steady_fall_has_neither_plateau_nor_cliff_however_noisy(sigma, seed):
    found = reading(noisy(line(120), sigma, seed))
    assert (found.plateaus, found.cliffs) == ((), ())
    assert found.fit.slope_per_step == pytest.approx(-2 / 120, rel=0.25)


@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.02])
def test_a_smooth_decay_is_no_cliff_and_its_tail_a_plateau(sigma):
    found = reading(noisy(decay(625, 30), sigma))
    assert found.cliffs == ()
    ((first, last),) = stretches(found)
    assert 90 < first < 180
    assert last == 625


def test_a_curve_that_never_moves_is_one_plateau_with_noise_and_without():
    for curve in ([1.5] * 60, noisy([1.5] * 60, 0.1)):
        assert stretches(reading(curve)) == [(1, 60)]


def test_a_rise_is_no_cliff():
    found = reading([2.0] * 20 + [3.0] * 20)
    assert found.cliffs == ()
    assert stretches(found)[0][0] == 1


def test_a_single_low_step_is_no_cliff():
    assert reading([*noisy(line(60), 0.02)[:30], 0.5, *noisy(line(60), 0.02)[31:]]).cliffs == ()


def test_where_the_noise_hides_the_pace_no_plateau_is_told():
    assert reading(noisy(stairs(40), 0.25)).plateaus == ()


def test_a_short_curve_gets_its_line_and_no_more():
    found = reading([3.0, 1.0, 1.0, 1.0])
    assert (found.plateaus, found.cliffs, found.num_steps) == ((), (), 4)
    assert "too short for plateaus and cliffs" in found.text


def test_what_follows_a_loss_that_is_no_number_is_not_read():
    assert read_curve([3.0, 2.0, math.nan, 1.0]) == read_curve([3.0, 2.0])
    assert read_curve([math.nan, 1.0, 2.0]) is None
    assert read_curve([1.0]) is None


def test_the_text_names_slope_fit_and_steps():
    assert reading(stairs(100, 2)).text == (
        "loss falls by 0.0075 a step (R2 0.75), 2 plateaus (steps 1-50, 51-100), 1 cliff (step 51)"
    )
    assert reading(line(50)).text.endswith("(R2 1.00), no plateau, no cliff")


def test_the_rule_states_the_figures_that_are_used():
    for figure in ("5 of its standard errors", "3 noises", "a quarter", "a twelfth"):
        assert figure in CURVE_RULE


# The card


def test_share_of_nearly_full_steps_counts_those_strictly_above():
    assert share_above([89, 90, 91, 100], 100) == 0.5
    assert share_above([60, 40], 100, share=0.5) == 0.5
    assert share_above([], 100) is None


def test_a_card_without_size_is_refused():
    with pytest.raises(ValueError, match="must be positive, got 0 bytes"):
        share_above([1], 0)
