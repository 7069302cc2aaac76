"""The examples of a duel as fixed-length tokens: the reply examples of this folder, or a data set of the user's.

Knows file formats and tokenization. Does not know trainers or contenders.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reply_data import IGNORED_LABEL, NUM_EXAMPLES, ReplyExample, TokenizedExample, make_examples, tokenize_reply
from training import TokenDataset

MAX_ROWS = 20_000
"""Rows read from a data set of the user's: more than any duel trains on."""
REPLY_COLUMNS = ("reply", "completion", "response")
NUM_COLUMNS_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Tokens and what to call them.

    Attributes:
        dataset: Examples of exactly ``seq_len`` tokens, padding included.
        label: Name for tables and records, no local path.
        num_examples: Examples in the data set.
        num_skipped: Examples left out: replies longer than ``seq_len``, and rows without text.
    """

    dataset: TokenDataset
    label: str
    num_examples: int
    num_skipped: int


def prepare_data(
    name: str | None, tokenizer: Any, seq_len: int, seed: int, num_examples: int = NUM_EXAMPLES
) -> PreparedData:
    """Makes or reads the examples and tokenizes them.

    Args:
        name: None for the reply examples; a .jsonl or .csv file; or a hub id, of which the train split is read.
        tokenizer: A fast transformers tokenizer.
        seq_len: Tokens an example.
        seed: Of the reply examples.
        num_examples: How many reply examples are made.

    Raises:
        ValueError: The file has no rows, or no column that the recipe knows, or nothing is left.
    """
    if name is None:
        label, rows = f"{num_examples} [LEMA_REPLY] examples", make_examples(num_examples, seed)
    else:
        label = Path(name).name if Path(name).is_file() else name
        rows = [_as_example(row, label) for row in read_rows(name)]
    if not rows:
        raise ValueError(f"{label} has no rows")
    tokenized = [
        tokenize_reply(row, tokenizer, seq_len) if row.prompt else _tokenize_text(row.reply, tokenizer, seq_len)
        for row in rows
    ]
    kept = [example for example in tokenized if example is not None]
    if not kept:
        raise ValueError(f"none of the {len(rows)} examples of {label} fits into {seq_len} tokens: raise --seq-len")
    return PreparedData(
        dataset=stack(kept), label=label, num_examples=len(kept), num_skipped=len(tokenized) - len(kept)
    )


def read_rows(name: str) -> Iterable[dict[str, Any]]:
    """At most ``MAX_ROWS`` rows of a .jsonl or .csv file, or of a hub set's train split.

    Raises:
        ValueError: A file of another kind.
    """
    path = Path(name)
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            lines = [line for line in file if line.strip()]
        return [json.loads(line) for line in lines[:MAX_ROWS]]
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return [row for row, _ in zip(csv.DictReader(file), range(MAX_ROWS), strict=False)]
    if path.exists():
        raise ValueError(f"{path.name} is neither .jsonl nor .csv, the two kinds of file that --dataset reads")
    from datasets import load_dataset

    split = load_dataset(name, split="train")
    return split.select(range(min(len(split), MAX_ROWS)))


def _as_example(row: dict[str, Any], label: str) -> ReplyExample:
    """A row with a prompt and a reply is trained on the reply; one with a text, on all of it."""
    reply_column = next((column for column in REPLY_COLUMNS if column in row), None)
    if "prompt" in row and reply_column is not None:
        return ReplyExample(prompt=str(row["prompt"]), reply=str(row[reply_column]), topic=label, key="")
    if "text" in row:
        return ReplyExample(prompt="", reply=str(row["text"]), topic=label, key="")
    found = ", ".join(sorted(map(str, row))[:NUM_COLUMNS_SHOWN])
    raise ValueError(
        f"a row of {label} has the columns {found}; expected text, or prompt with one of {', '.join(REPLY_COLUMNS)}"
    )


def _tokenize_text(text: str, tokenizer: Any, seq_len: int) -> TokenizedExample | None:
    """All tokens are trained on; a text that is too long is cut, and then has no end to learn."""
    if not text.strip():
        return None
    ids = list(tokenizer(text)["input_ids"])
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    ids = ids[:seq_len]
    num_padding = seq_len - len(ids)
    return TokenizedExample(
        input_ids=ids + [tokenizer.eos_token_id] * num_padding,
        attention_mask=[1] * len(ids) + [0] * num_padding,
        labels=ids + [IGNORED_LABEL] * num_padding,
    )


def stack(examples: Sequence[TokenizedExample]) -> TokenDataset:
    """Examples of equal length as one data set."""
    return TokenDataset(
        torch.tensor([example.input_ids for example in examples], dtype=torch.int32),
        torch.tensor([example.attention_mask for example in examples], dtype=torch.int8),
        torch.tensor([example.labels for example in examples], dtype=torch.int32),
    )
