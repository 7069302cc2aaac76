"""Facts that are computed: arithmetic, numbers, calendar, units and memory sizes.

Each family draws its numbers from a generator that it is given, so the answers are true by computation and there are
as many of them as anyone asks for.
"""

from __future__ import annotations

import datetime
import math
import random
from collections.abc import Callable
from fractions import Fraction

from reply_facts import Confidence, Fact

Family = Callable[[random.Random], Fact]
"""Draws one fact."""


def computed_fact(
    topic: str, key: str, question: str, answer: object, explanation: str, confidence: Confidence = Confidence.HIGH
) -> Fact:
    """A fact with one wording; its key is unique over the topics."""
    return Fact(
        key=f"{topic}:{key}",
        topic=topic,
        questions=(question,),
        answer=str(answer),
        explanation=explanation,
        confidence=confidence,
    )


def decimal_text(value: Fraction) -> str:
    """A fraction whose decimal form ends, written out in full."""
    return f"{float(value):.10f}".rstrip("0").rstrip(".")


def addition(rng: random.Random) -> Fact:
    """A sum, explained by the inverse."""
    a, b = sorted((rng.randint(11, 999), rng.randint(11, 999)))
    return computed_fact("arithmetic", f"{a}+{b}", f"What is {a} + {b}?", a + b, f"{a + b} - {b} = {a}.")


def subtraction(rng: random.Random) -> Fact:
    """A difference, explained by the inverse."""
    a, b = rng.randint(100, 999), rng.randint(11, 99)
    return computed_fact("arithmetic", f"{a}-{b}", f"What is {a} - {b}?", a - b, f"{a - b} + {b} = {a}.")


def multiplication(rng: random.Random) -> Fact:
    """A product, split into tens and ones."""
    a, b = rng.randint(3, 99), rng.randint(12, 99)
    tens, ones = b - b % 10, b % 10
    low, high = sorted((a, b))
    return computed_fact(
        "arithmetic",
        f"{low}*{high}",
        f"What is {a} x {b}?",
        a * b,
        f"{a} x {tens} = {a * tens}; {a} x {ones} = {a * ones}.",
    )


def division(rng: random.Random) -> Fact:
    """A quotient and remainder, explained by the product."""
    a, b = rng.randint(50, 999), rng.randint(3, 30)
    quotient, remainder = divmod(a, b)
    answer = f"{quotient} remainder {remainder}" if remainder else str(quotient)
    return computed_fact(
        "arithmetic", f"{a}/{b}", f"What is {a} divided by {b}?", answer, f"{b} x {quotient} = {b * quotient}."
    )


def percentage(rng: random.Random) -> Fact:
    """A percentage of a round number."""
    percent, whole = rng.choice((5, 10, 15, 20, 25, 30, 40, 60, 75, 80)), rng.randint(2, 99) * 20
    part = decimal_text(Fraction(percent * whole, 100))
    return computed_fact(
        "arithmetic",
        f"{percent}%{whole}",
        f"What is {percent} percent of {whole}?",
        part,
        f"One percent is {decimal_text(Fraction(whole, 100))}.",
    )


def greatest_common_divisor(rng: random.Random) -> Fact:
    """The greatest common divisor of two numbers that have one above 1."""
    divisor = rng.randint(2, 12)
    a, b = sorted((divisor * rng.randint(2, 30), divisor * rng.randint(31, 60)))
    gcd = math.gcd(a, b)
    return computed_fact(
        "numbers",
        f"gcd({a},{b})",
        f"What is the greatest common divisor of {a} and {b}?",
        gcd,
        f"{a} = {gcd} x {a // gcd} and {b} = {gcd} x {b // gcd}.",
    )


def primality(rng: random.Random) -> Fact:
    """Whether an odd number is a prime."""
    number = rng.randrange(51, 1999, 2)
    divisor = next((d for d in range(3, math.isqrt(number) + 1, 2) if number % d == 0), None)
    if divisor is None:
        return computed_fact(
            "numbers", f"prime({number})", f"Is {number} a prime?", "Yes", "Only 1 and itself divide it."
        )
    explanation = f"{number} = {divisor} x {number // divisor}."
    return computed_fact("numbers", f"prime({number})", f"Is {number} a prime?", "No", explanation)


def square(rng: random.Random) -> Fact:
    """A square or its root."""
    root = rng.randint(12, 250)
    key = f"square({root})"
    if rng.random() < 0.5:
        return computed_fact("numbers", key, f"What is the square of {root}?", root**2, f"{root} x {root} = {root**2}.")
    return computed_fact(
        "numbers", key, f"What is the square root of {root**2}?", root, f"{root} x {root} = {root**2}."
    )


def binary(rng: random.Random) -> Fact:
    """A number in binary or hexadecimal."""
    number = rng.randint(17, 1023)
    if rng.random() < 0.5:
        powers = " + ".join(str(1 << bit) for bit in reversed(range(10)) if number >> bit & 1)
        return computed_fact(
            "numbers", f"base({number})", f"What is {number} in binary?", f"{number:b}", f"{number} = {powers}."
        )
    high, low = divmod(number, 16)
    return computed_fact(
        "numbers",
        f"base({number})",
        f"What is {number} in hexadecimal?",
        f"{number:X}",
        f"{number} = {high} x 16 + {low}.",
    )


def roman(rng: random.Random) -> Fact:
    """A year in Roman numerals."""
    number = rng.randint(4, 2100)
    signs = ((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL"))
    signs += ((10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))
    rest, text = number, ""
    for value, sign in signs:
        text += sign * (rest // value)
        rest %= value
    first = next(value for value, _ in signs if value <= number)
    return computed_fact(
        "numbers",
        f"roman({number})",
        f"How is {number} written in Roman numerals?",
        text,
        f"It starts with {dict(signs)[first]} for {first}.",
    )


def weekday(rng: random.Random) -> Fact:
    """The weekday of a date in the Gregorian calendar."""
    date = datetime.date(1901, 1, 1) + datetime.timedelta(days=rng.randrange(44900))
    day, before = date.strftime("%A"), (date - datetime.timedelta(days=7)).isoformat()
    question = f"Which weekday was {date.isoformat()}?"
    return computed_fact("calendar", date.isoformat(), question, day, f"{before} was a {day} too.")


def leap_year(rng: random.Random) -> Fact:
    """Whether a year is a leap year, by the Gregorian rule."""
    year = rng.randint(1600, 2400)
    is_leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    if year % 100 == 0:
        reason = f"{year} is {'' if is_leap else 'not '}divisible by 400."
    else:
        reason = f"{year} is {'' if is_leap else 'not '}divisible by 4."
    return computed_fact("calendar", f"leap({year})", f"Is {year} a leap year?", "Yes" if is_leap else "No", reason)


def days_between(rng: random.Random) -> Fact:
    """The days from one date to another of the same year."""
    year = rng.randint(1950, 2023)
    first, last = sorted(rng.sample(range(365), 2))
    start = datetime.date(year, 1, 1)
    a, b = start + datetime.timedelta(days=first), start + datetime.timedelta(days=last)
    return computed_fact(
        "calendar",
        f"{a}..{b}",
        f"How many days are there from {a.isoformat()} to {b.isoformat()}?",
        last - first,
        f"They are days {first + 1} and {last + 1} of {year}.",
    )


# unit, smaller unit, how many of the smaller one make the larger
CONVERSIONS = (
    ("km", "m", 1000), ("m", "cm", 100), ("cm", "mm", 10), ("kg", "g", 1000), ("tonnes", "kg", 1000),
    ("litres", "ml", 1000), ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24),
    ("weeks", "days", 7), ("feet", "inches", 12), ("yards", "feet", 3), ("pounds", "ounces", 16),
    ("GiB", "MiB", 1024), ("MiB", "KiB", 1024), ("GB", "MB", 1000), ("bytes", "bits", 8), ("dozens", "pieces", 12),
    ("hectares", "m²", 10000), ("kWh", "Wh", 1000), ("MHz", "kHz", 1000), ("inches", "mm", Fraction(254, 10)),
)  # fmt: skip


def conversion(rng: random.Random) -> Fact:
    """A number of units in a smaller unit."""
    unit, smaller, factor = rng.choice(CONVERSIONS)
    amount = rng.randint(2, 400)
    return computed_fact(
        "units",
        f"{amount}{unit}",
        f"How many {smaller} are {amount} {unit}?",
        decimal_text(Fraction(amount * factor)),
        f"{amount} x {decimal_text(Fraction(factor))}, by definition.",
    )


def temperature(rng: random.Random) -> Fact:
    """Degrees Celsius in Fahrenheit or kelvin."""
    celsius = rng.randint(-50, 250)
    if rng.random() < 0.5:
        answer = f"{decimal_text(Fraction(celsius * 9, 5) + 32)} °F"
        return computed_fact(
            "units", f"{celsius}C", f"What is {celsius} °C in Fahrenheit?", answer, "Times 9/5, plus 32."
        )
    answer = f"{celsius + 273.15:.2f} K"
    return computed_fact("units", f"{celsius}C", f"What is {celsius} °C in kelvin?", answer, "Plus 273.15.")


# unit, other unit, how many of the other one unit is
ROUNDED_CONVERSIONS = (
    ("miles", "km", 1.609344), ("pounds", "kg", 0.45359237), ("feet", "metres", 0.3048),
    ("ounces", "grams", 28.349523125), ("nautical miles", "km", 1.852), ("acres", "hectares", 0.40468564224),
    ("US gallons", "litres", 3.785411784),
)  # fmt: skip


def rounded_conversion(rng: random.Random) -> Fact:
    """An amount in another system of units, rounded to whole ones."""
    unit, other, factor = rng.choice(ROUNDED_CONVERSIONS)
    amount = rng.randint(20, 400)
    answer = f"About {round(amount * factor)} {other}"
    question = f"About how many {other} are {amount} {unit}?"
    return computed_fact(
        "units", f"{amount}{unit}", question, answer, f"One is {factor:.3g} {other}.", Confidence.MEDIUM
    )


def rounded_root(rng: random.Random) -> Fact:
    """An irrational square root to two digits."""
    number = rng.choice([n for n in range(2, 1000) if math.isqrt(n) ** 2 != n])
    low = math.isqrt(number)
    reason = f"{number} is between {low**2} and {(low + 1) ** 2}."
    question = f"What is the square root of {number}?"
    return computed_fact("numbers", f"root({number})", question, f"About {number**0.5:.2f}", reason, Confidence.MEDIUM)


NUMBER_FAMILIES: tuple[Family, ...] = (
    addition,
    subtraction,
    multiplication,
    division,
    percentage,
    greatest_common_divisor,
    primality,
    square,
    rounded_root,
    binary,
    roman,
    weekday,
    leap_year,
    days_between,
    conversion,
    rounded_conversion,
    temperature,
)
