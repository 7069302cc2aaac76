"""Labelled texts: read, split, and turned into a prompt whose next words are the label.

Knows file formats, the split and tokenization. Does not know models or how a label is scored.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duel_data import read_rows
from reply_data import ReplyExample, TokenizedExample, tokenize_reply

TRAIN_SHARE = 0.8
WORDS = {"0": "negative", "1": "positive", "neg": "negative", "pos": "positive"}
"""Words for the labels that sets of reviews use; any other label is its own word."""
HUB_SPLITS = ("train", "test")
NUM_COLUMNS_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """One text with the word that is to be told."""

    text: str
    word: str


@dataclass(frozen=True, kw_only=True)
class LabelledSplit:
    """A data set in its two parts, which share no text.

    Attributes:
        label: Name for tables and records, no local path.
        words: The label words, sorted; of two, the last one is the positive class.
        train: Four fifths, in random order.
        held_out: The rest, likewise.
        num_repeated: Rows left out because their text was there before.
    """

    label: str
    words: tuple[str, ...]
    train: tuple[LabelledText, ...]
    held_out: tuple[LabelledText, ...]
    num_repeated: int


def load_split(name: str, seed: int) -> LabelledSplit:
    """Reads a labelled set and splits it 80/20; the same seed gives the same parts.

    Args:
        name: A .jsonl or .csv file, or a hub id, of which train and test are put together before they are split.
        seed: Of the order.

    Raises:
        ValueError: Columns are missing, fewer than two labels are there, or too few rows.
    """
    label = Path(name).name if Path(name).is_file() else name
    rows = read_rows(name) if Path(name).suffix in (".jsonl", ".csv") or Path(name).exists() else _hub_rows(name)
    by_text: dict[str, str] = {}
    num_rows = 0
    for row in rows:
        if "text" not in row or "label" not in row:
            found = ", ".join(sorted(map(str, row))[:NUM_COLUMNS_SHOWN])
            raise ValueError(f"a row of {label} has the columns {found}; expected text and label")
        num_rows += 1
        by_text.setdefault(" ".join(str(row["text"]).split()), word_of(row["label"]))
    by_text.pop("", None)
    texts = [LabelledText(text=text, word=word) for text, word in by_text.items()]
    words = tuple(sorted({text.word for text in texts}))
    if len(words) < 2 or len(texts) < 5:
        raise ValueError(f"{label} has {len(texts)} texts with the labels {', '.join(words)}; at least 5 and 2 needed")
    random.Random(seed).shuffle(texts)
    num_train = round(TRAIN_SHARE * len(texts))
    return LabelledSplit(
        label=label,
        words=words,
        train=tuple(texts[:num_train]),
        held_out=tuple(texts[num_train:]),
        num_repeated=num_rows - len(texts),
    )


def _hub_rows(name: str) -> Iterable[Mapping[str, Any]]:
    from datasets import concatenate_datasets, load_dataset

    splits = load_dataset(name)
    return concatenate_datasets([splits[split] for split in HUB_SPLITS if split in splits])


def word_of(label: Any) -> str:
    """The word for a label."""
    text = str(label).strip()
    return WORDS.get(text.lower(), text)


def as_example(text: str, word: str) -> ReplyExample:
    """The prompt and, as its reply, the label word."""
    return ReplyExample(prompt=f"Review: {text}\nSentiment:", reply=f" {word}", topic="", key="")


def tokenize_labelled(
    text: LabelledText, word: str, tokenizer: Any, seq_len: int, *, pad: bool = True
) -> TokenizedExample:
    """Tokens with the loss on the label word and the end of text; a text that is too long loses its end, not its label.

    Args:
        text: The text; its own word is not looked at.
        word: The label word that follows.
        tokenizer: A fast one with an end-of-text token.
        seq_len: Tokens that the example may have.
        pad: Whether to pad to exactly ``seq_len``.

    Raises:
        ValueError: Not even the label fits into ``seq_len``.
    """
    kept = text.text
    while True:
        tokens = tokenize_reply(as_example(kept, word), tokenizer, seq_len, pad=pad)
        if tokens is not None:
            return tokens
        if not kept:
            raise ValueError(f"the prompt without its text and the label {word!r} have more than {seq_len} tokens")
        offsets = tokenizer(kept, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        whole = tokenize_reply(as_example(kept, word), tokenizer, sys.maxsize, pad=False)
        assert whole is not None, "nothing is longer than that"
        num_kept = len(offsets) - (whole.num_tokens - seq_len)
        kept = kept[: offsets[num_kept - 1][1]].rstrip() if num_kept > 0 else ""


def training_tokens(texts: Sequence[LabelledText], tokenizer: Any, seq_len: int) -> list[TokenizedExample]:
    """All texts with their own words, padded."""
    return [tokenize_labelled(text, text.word, tokenizer, seq_len) for text in texts]
