"""What a user may choose, and what is refused with which words."""

from __future__ import annotations

import dataclasses

import pytest

from hf_lema.config import LemaConfig

GIB = 2**30


def test_defaults_decide_everything_by_themselves() -> None:
    config = LemaConfig()
    assert (config.vram_budget, config.ram_budget, config.num_slots) == ("auto", "auto", 2)
    assert config.vram_budget_bytes is None
    assert config.ram_budget_bytes is None


@pytest.mark.parametrize("field", ["vram_budget", "ram_budget"])
@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("auto", None),
        ("min", None),
        ("6GiB", 6 * GIB),
        ("2.4GiB", 24 * GIB // 10),
        ("512 MiB", GIB // 2),
        ("6GB", 6 * 10**9),
        ("1048576", 2**20),
        (12345, 12345),
    ],
)
def test_budgets_are_read_as_bytes(field: str, budget: str | int, expected: int | None) -> None:
    assert getattr(LemaConfig(**{field: budget}), f"{field}_bytes") == expected


@pytest.mark.parametrize("field", ["vram_budget", "ram_budget"])
@pytest.mark.parametrize("budget", ["lots", "", "-1GiB", "6 GiBi", "nan", -1, 6.0, None, True, "AUTO"])
def test_a_budget_that_cannot_be_read_is_refused_by_its_name(field: str, budget: object) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        LemaConfig(**{field: budget})
    assert '"auto", "min"' in str(caught.value)


@pytest.mark.parametrize("field", ["vram_budget", "ram_budget"])
@pytest.mark.parametrize("budget", [0, "0", "0GiB", "0.1B"])
def test_a_budget_of_nothing_is_refused(field: str, budget: str | int) -> None:
    with pytest.raises(ValueError, match=f"{field} must be positive"):
        LemaConfig(**{field: budget})


@pytest.mark.parametrize("num_slots", [1, 0, -3])
def test_fewer_than_two_slots_are_refused(num_slots: int) -> None:
    with pytest.raises(ValueError, match=f"num_slots is {num_slots}.*at least 2"):
        LemaConfig(num_slots=num_slots)


@pytest.mark.parametrize("num_slots", [2.5, "3", None])
def test_a_number_of_slots_that_is_no_integer_is_refused(num_slots: object) -> None:
    with pytest.raises(ValueError, match="num_slots"):
        LemaConfig(num_slots=num_slots)


@pytest.mark.parametrize("micro_batch_size", [0, 1, 64])
def test_micro_batches_are_a_number_of_sequences(micro_batch_size: int) -> None:
    assert LemaConfig(micro_batch_size=micro_batch_size).micro_batch_size == micro_batch_size


@pytest.mark.parametrize("micro_batch_size", [-1, 2.0, "4", None, True, "auto"])
def test_micro_batches_of_anything_else_are_refused(micro_batch_size: object) -> None:
    with pytest.raises(ValueError, match="micro_batch_size"):
        LemaConfig(micro_batch_size=micro_batch_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("choices", [{"micro_batch_size": 2}, "min", 3, True])
def test_choices_that_are_none_are_refused(choices: object) -> None:
    with pytest.raises(ValueError, match="StepChoices or a MemoryPlan"):
        LemaConfig(choices=choices)  # type: ignore[arg-type]


def test_choices_cannot_be_changed_afterwards_nor_given_by_position() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LemaConfig().num_slots = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        LemaConfig("6GiB")  # type: ignore[misc]


def test_equal_choices_are_equal_and_can_be_replaced() -> None:
    config = LemaConfig(vram_budget="6GiB")
    assert config == LemaConfig(vram_budget="6GiB")
    assert dataclasses.replace(config, num_slots=3).vram_budget_bytes == 6 * GIB
    with pytest.raises(ValueError, match="num_slots"):
        dataclasses.replace(config, num_slots=1)
