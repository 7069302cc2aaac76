"""The `[LEMA_REPLY]` chat examples: true facts in a fixed reply format, and their tokens with labels on the reply.

    python recipes/reply_data.py --num-examples 5000 --output replies.jsonl

Knows the facts and the format. Does not know models, trainers or devices. The held-out split holds other *facts*, not
other wordings: which side a subject falls on depends on its name alone, so it is the same for every seed and size.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from facts_computed import NUMBER_FAMILIES
from facts_lema import card_facts, lema_facts
from facts_memory import MEMORY_FAMILIES
from facts_science import prefix_facts, science_facts
from facts_world import book_facts, country_facts, element_facts, event_facts
from reply_facts import Fact

SYSTEM = "You are a precise assistant trained using LEMA."
NUM_EXAMPLES = 5000
SPLITS = ("train", "held_out")
HELD_OUT_EVERY = 10
"""One subject in this many is held out."""
MAX_TABLE_SHARE = 0.5
"""At most this part of the examples comes from tables; the rest is computed, of which there is no end."""
MAX_MISSES = 1000
"""Draws in a row that give nothing new, after which the families are taken to be used up."""
IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class ReplyExample:
    """One example. ``text`` is ``prompt + reply``; the reply starts at ``[LEMA_REPLY]``.

    Attributes:
        prompt: System and question, up to and with the line ``<|assistant|>``.
        reply: From ``[LEMA_REPLY]`` to ``[/LEMA_REPLY]``, with no newline at its end.
        topic: Name of the table or family that the fact comes from.
        key: Subject of the fact, unique to one split.
    """

    prompt: str
    reply: str
    topic: str
    key: str

    @property
    def text(self) -> str:
        """The whole example, as it is trained on (less the end-of-text token)."""
        return self.prompt + self.reply


def is_held_out(key: str) -> bool:
    """Whether a subject belongs to the held-out split, by a hash of its name and nothing else."""
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_EVERY == 0


def format_example(fact: Fact, question: str) -> ReplyExample:
    """Puts one wording of a fact into the chat format; a blank line stands before each further role."""
    prompt = f"<|system|>\n{SYSTEM}\n\n<|user|>\n{question}\n\n<|assistant|>\n"
    reply = (
        f"[LEMA_REPLY]\nAnswer: {fact.answer}\nExplanation: {fact.explanation}\n"
        f"Confidence: {fact.confidence.value}\n[/LEMA_REPLY]"
    )
    return ReplyExample(prompt=prompt, reply=reply, topic=fact.topic, key=fact.key)


def table_examples(split: str, rng: random.Random) -> list[ReplyExample]:
    """One example a fact of the tables (each wording of those about LEMA), in random order."""
    tables = (country_facts, element_facts, event_facts, book_facts, science_facts, prefix_facts, card_facts)
    facts = itertools.chain.from_iterable(table() for table in tables)
    examples = [format_example(fact, rng.choice(fact.questions)) for fact in facts]
    for fact in lema_facts():
        examples.extend(format_example(fact, question) for question in fact.questions)
    examples = [example for example in examples if is_held_out(example.key) == (split == "held_out")]
    rng.shuffle(examples)
    return examples


def computed_examples(split: str, num_examples: int, rng: random.Random) -> list[ReplyExample]:
    """Draws from each family in turn, at most one example a subject.

    Raises:
        ValueError: The families are used up before ``num_examples`` were found.
    """
    examples: list[ReplyExample] = []
    seen: set[str] = set()
    num_misses = 0
    for family in itertools.cycle(NUMBER_FAMILIES + MEMORY_FAMILIES):
        if len(examples) == num_examples:
            return examples
        if num_misses == MAX_MISSES:
            break
        fact = family(rng)
        num_misses += 1
        if fact.key not in seen and is_held_out(fact.key) == (split == "held_out"):
            num_misses = 0
            seen.add(fact.key)
            examples.append(format_example(fact, fact.questions[0]))
    raise ValueError(f"only {len(examples)} different computed examples were found, {num_examples} were asked for")


def make_examples(num_examples: int = NUM_EXAMPLES, seed: int = 0, split: str = "train") -> list[ReplyExample]:
    """Makes distinct, true examples; the same arguments always give the same list.

    Args:
        num_examples: How many, at least 1.
        seed: Chooses wordings, computed facts and order; it does not move a subject between the splits.
        split: ``"train"`` or ``"held_out"``.

    Raises:
        ValueError: An unknown split, or more examples than there are facts.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if num_examples < 1:
        raise ValueError(f"num_examples is {num_examples}; at least 1 is needed")
    rng = random.Random(f"{seed}/{split}")
    examples = table_examples(split, rng)[: round(num_examples * MAX_TABLE_SHARE)]
    examples += computed_examples(split, num_examples - len(examples), rng)
    rng.shuffle(examples)
    return examples


@dataclass(frozen=True, kw_only=True)
class TokenizedExample:
    """Token ids of one example with the labels of its loss.

    Attributes:
        input_ids: ``seq_len`` token ids if padded, else as many as the example has.
        attention_mask: 1 on tokens, 0 on padding.
        labels: The token id where the loss counts, -100 on the prompt and on padding.
    """

    input_ids: list[int]
    attention_mask: list[int]
    labels: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.attention_mask)


def tokenize_reply(example: ReplyExample, tokenizer: Any, seq_len: int, *, pad: bool = True) -> TokenizedExample | None:
    """Tokenizes the whole text at once and keeps the loss on the reply and on the end-of-text token.

    The padding is told apart by position, not by its id: many tokenizers pad with the end-of-text token, and a mask by
    id would leave the end untrained.

    Args:
        example: The example.
        tokenizer: A fast transformers tokenizer that has an ``eos_token_id``.
        seq_len: Tokens that the example may have, end-of-text included.
        pad: Whether to pad on the right to exactly ``seq_len``.

    Returns:
        The tokens, or None where the example has more than ``seq_len``: a reply without its end is not trained on.

    Raises:
        ValueError: The tokenizer gives no offsets or has no end-of-text token.
    """
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer must be a fast one with an end-of-text token; this one is not")
    encoded = tokenizer(example.text, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
        offsets.append((len(example.text), len(example.text)))
    else:
        offsets[-1] = (len(example.text), len(example.text))
    if len(ids) > seq_len:
        return None
    start = len(example.prompt)
    labels = [token if begin >= start else IGNORED_LABEL for token, (begin, _) in zip(ids, offsets, strict=True)]
    num_padding = seq_len - len(ids) if pad else 0
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return TokenizedExample(
        input_ids=ids + [pad_id] * num_padding,
        attention_mask=[1] * len(ids) + [0] * num_padding,
        labels=labels + [IGNORED_LABEL] * num_padding,
    )


def write_jsonl(examples: Iterable[ReplyExample], path: Path) -> int:
    """Writes one JSON object a line with ``text``, ``prompt``, ``reply``, ``topic`` and ``key``; returns the count."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            record = {"text": example.text, **asdict(example)}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def main(argv: list[str] | None = None) -> None:
    """Writes the examples to a .jsonl file."""
    parser = argparse.ArgumentParser(description="write [LEMA_REPLY] chat examples as .jsonl")
    parser.add_argument("--num-examples", type=int, default=NUM_EXAMPLES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--output", type=Path, default=Path("lema_replies.jsonl"))
    args = parser.parse_args(argv)
    count = write_jsonl(make_examples(args.num_examples, args.seed, args.split), args.output)
    print(f"wrote {count} examples to {args.output}")


if __name__ == "__main__":
    main()
