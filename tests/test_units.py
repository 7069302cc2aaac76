"""Bytes and their text form."""

from __future__ import annotations

import pytest

from hf_lema.units import GIB, MIB, TIB, format_bytes, parse_bytes, to_gib


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("6GiB", 6 * 2**30),
        ("6 GiB", 6 * 2**30),
        (" 6gib ", 6 * 2**30),
        ("2.4GiB", 2576980377),
        (".5GiB", 2**29),
        ("512MiB", 512 * 2**20),
        ("1TiB", 2**40),
        ("3KiB", 3072),
        ("16GB", 16 * 10**9),
        ("1.5MB", 1_500_000),
        ("1kB", 1000),
        ("17B", 17),
        ("17", 17),
        ("0", 0),
        (0, 0),
        (123456789012345, 123456789012345),
    ],
)
def test_a_quantity_is_read_as_it_is_meant(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


def test_a_large_decimal_quantity_loses_no_byte() -> None:
    assert parse_bytes("8388608.000000000000000000GiB") == 2**23 * 2**30
    assert parse_bytes("9007199254740993") == 9007199254740993


@pytest.mark.parametrize(
    "text", ["", "GiB", "six GiB", "-1GiB", "1e3", "1,5GiB", "6GiB!", "nan", "inf", "٣GiB", "1 2GiB"]
)
def test_nonsense_is_refused_with_what_was_found(text: str) -> None:
    with pytest.raises(ValueError, match="byte quantity") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


def test_an_unknown_unit_is_named_together_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unit 'Gib2?y?t?e?s?'.*GiB") as caught:
        parse_bytes("6Gibytes")
    assert "6Gibytes" in str(caught.value)


def test_a_fraction_without_a_unit_is_refused_and_the_remedy_is_given() -> None:
    with pytest.raises(ValueError, match=r"'6.5' has no unit.*6.5GiB"):
        parse_bytes("6.5")


@pytest.mark.parametrize("quantity", [-1, True, 1.5, None, b"6GiB"])
def test_what_is_no_quantity_is_refused(quantity: object) -> None:
    with pytest.raises(ValueError, match="byte quantity"):
        parse_bytes(quantity)  # type: ignore[arg-type]


def test_a_very_long_text_is_cut_in_the_message() -> None:
    with pytest.raises(ValueError, match="byte quantity") as caught:
        parse_bytes("x" * 10_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (210 * MIB, "210.00 MiB"),
        (int(6.36 * GIB) + 1, "6.36 GiB"),
        (3 * TIB // 2, "1.50 TiB"),
        (-3 * GIB, "-3.00 GiB"),
        (GIB - 1, "1.00 GiB"),
        (GIB - 6 * 2**10, "1023.99 MiB"),
    ],
)
def test_bytes_are_written_in_the_largest_unit_that_fits(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_what_was_written_can_be_read_again() -> None:
    for num_bytes in (0, 5, 3 * 2**10, 7 * 2**20, 6 * 2**30, 2**41):
        assert parse_bytes(format_bytes(num_bytes)) == num_bytes


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_not_written(number: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        format_bytes(number)


def test_a_gib_is_two_to_the_thirty() -> None:
    assert to_gib(2**30) == 1.0
    assert to_gib(3 * 2**29) == 1.5
