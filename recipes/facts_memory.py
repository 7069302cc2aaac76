"""Facts that are computed about memory and text: sizes of weights, transfer times, tokens, and estimates of length."""

from __future__ import annotations

import random
from fractions import Fraction

from facts_computed import computed_fact, decimal_text
from reply_facts import Confidence, Fact

PRECISIONS = (("fp32", 4), ("fp16", 2), ("bf16", 2), ("int8", 1))


def matrix_memory(rng: random.Random) -> Fact:
    """The memory of a dense matrix."""
    rows, columns = rng.choice((512, 1024, 2048, 4096, 8192)), 128 * rng.randint(4, 100)
    name, num_bytes = rng.choice(PRECISIONS)
    mib = decimal_text(Fraction(rows * columns * num_bytes, 1 << 20))
    return computed_fact(
        "memory",
        f"{rows}x{columns}",
        f"How large is a {rows} x {columns} matrix in {name}?",
        f"{mib} MiB",
        f"Each entry takes {num_bytes} byte{'s' if num_bytes > 1 else ''}.",
    )


def lora_parameters(rng: random.Random) -> Fact:
    """The trainable parameters that LoRA adds to one linear layer."""
    d_in, d_out, rank = 64 * rng.randint(4, 128), 64 * rng.randint(4, 128), rng.choice((4, 8, 16, 32, 64))
    count = rank * (d_in + d_out)
    return computed_fact(
        "memory",
        f"lora({d_in},{d_out},{rank})",
        f"How many weights does LoRA of rank {rank} add to a {d_in} x {d_out} layer?",
        f"{count:,}",
        f"{rank} x ({d_in} + {d_out}).",
    )


def model_memory(rng: random.Random) -> Fact:
    """The memory of a model's weights."""
    tenths = rng.randint(5, 800)
    name, num_bytes = rng.choice(PRECISIONS)
    billions = decimal_text(Fraction(tenths, 10))
    return computed_fact(
        "memory",
        f"model({billions})",
        f"How large are {billions} billion {name} weights?",
        f"{decimal_text(Fraction(tenths * num_bytes, 10))} GB",
        f"Each takes {num_bytes} byte{'s' if num_bytes > 1 else ''}.",
    )


def transfer_time(rng: random.Random) -> Fact:
    """The time to move bytes over a bus, at its full rate."""
    rate, seconds = rng.choice((5, 8, 10, 12, 16, 20, 25, 32, 40, 50)), Fraction(rng.randint(1, 80), 10)
    size = decimal_text(rate * seconds)
    return computed_fact(
        "memory",
        f"transfer({size},{rate})",
        f"How long does it take to move {size} GB at {rate} GB/s?",
        f"{decimal_text(seconds)} s",
        f"{size} divided by {rate}.",
    )


def tokens_in_step(rng: random.Random) -> Fact:
    """The tokens of an optimizer step."""
    batch, accumulation, length = rng.randint(1, 32), rng.randint(1, 16), 64 * rng.randint(1, 64)
    return computed_fact(
        "memory",
        f"tokens({batch},{accumulation},{length})",
        f"How many tokens are in {accumulation} batch{'es' if accumulation > 1 else ''} of {batch} x {length}?",
        f"{batch * accumulation * length:,}",
        "It is the product of the numbers.",
    )


def words_in_tokens(rng: random.Random) -> Fact:
    """An estimate of the English words that make so many tokens; it depends on the text and the tokenizer."""
    num_tokens = 100 * rng.randint(1, 400)
    return computed_fact(
        "estimates",
        f"words({num_tokens})",
        f"Roughly how many English words are {num_tokens} tokens?",
        f"Perhaps {num_tokens * 3 // 4}",
        "Some 3/4 of a word a token; texts differ.",
        Confidence.LOW,
    )


def reading_time(rng: random.Random) -> Fact:
    """An estimate of the time to read a text; readers differ."""
    num_minutes = rng.randint(2, 120)
    return computed_fact(
        "estimates",
        f"reading({num_minutes})",
        f"Roughly how long does it take to read {240 * num_minutes} words?",
        f"Perhaps {num_minutes} minutes",
        "At some 240 words a minute; readers differ.",
        Confidence.LOW,
    )


MEMORY_FAMILIES = (
    matrix_memory,
    lora_parameters,
    model_memory,
    transfer_time,
    tokens_in_step,
    words_in_tokens,
    reading_time,
)
