"""Telling a label by likelihood: which label word a model finds most likely after a text, and how often that is right.

No text is generated and none is parsed: the score of a word is the sum of the log-probabilities of its tokens. Knows
forwards of causal language models. Does not know how a model was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from reply_data import IGNORED_LABEL
from sentiment_data import LabelledText, tokenize_labelled
from torch import nn


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """How often the label was told right, 0 to 1.

    Attributes:
        num_texts: Held-out texts.
        accuracy: Share of right labels.
        precision: Of two labels, of the positive one: how many of those told are right. Of more, the mean over labels.
        recall: How many of those there are were told; likewise.
        f1: Harmonic mean of both; of more than two labels, the mean of theirs.
    """

    num_texts: int
    accuracy: float
    precision: float
    recall: float
    f1: float

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return asdict(self)


def score_labels(told: Sequence[str], true: Sequence[str], words: Sequence[str]) -> LabelScore:
    """Compares told with true labels.

    Args:
        told: One word a text.
        true: Likewise.
        words: All label words; of two, the last is the positive class.

    Raises:
        ValueError: There is no text, or the lengths differ.
    """
    if not true or len(told) != len(true):
        raise ValueError(f"{len(told)} told labels for {len(true)} texts; expected one for each, at least one")
    pairs = list(zip(told, true, strict=True))
    classes = words[-1:] if len(words) == 2 else words
    per_class = []
    for word in classes:
        num_right = sum(own == other == word for own, other in pairs)
        num_told, num_true = told.count(word), true.count(word)
        # F1 = 2 PR / (P + R) = 2 right / (told + true); 0 where nothing was told or there is nothing to tell.
        per_class.append(
            (_share(num_right, num_told), _share(num_right, num_true), _share(2 * num_right, num_told + num_true))
        )
    means = [sum(values) / len(classes) for values in zip(*per_class, strict=True)]
    accuracy = sum(own == other for own, other in pairs) / len(pairs)
    return LabelScore(num_texts=len(pairs), accuracy=accuracy, precision=means[0], recall=means[1], f1=means[2])


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def tell_labels(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[LabelledText],
    words: Sequence[str],
    *,
    seq_len: int,
    batch_size: int,
) -> list[str]:
    """The most likely label word of each text; of equally likely ones, the first.

    Words whose last token alone differs share one forward, since a word's last token is never an input.

    Args:
        model: On any device; it is in training mode again afterwards if it was before.
        tokenizer: A fast one with an end-of-text token.
        texts: What is labelled; their own words are not looked at.
        words: The choice.
        seq_len: Tokens that a text with its label may have.
        batch_size: Sequences of a forward.
    """
    inputs: dict[tuple[int, ...], int] = {}
    scored: list[tuple[int, int, list[int]]] = []  # input, where its first label token is told, and the label's tokens
    for text in texts:
        for word in words:
            tokens = tokenize_labelled(text, word, tokenizer, seq_len, pad=False)
            first = next(idx for idx, label in enumerate(tokens.labels) if label != IGNORED_LABEL)
            label_ids = tokens.input_ids[first:-1]  # without the end of text
            number = inputs.setdefault(tuple(tokens.input_ids[:-2]), len(inputs))
            scored.append((number, first - 1, label_ids))
    sequences = list(inputs)
    log_probabilities = _log_probabilities(model, sequences, scored, tokenizer.eos_token_id, batch_size)
    num_words = len(words)
    return [
        words[max(range(num_words), key=lambda idx: log_probabilities[begin + idx])]
        for begin in range(0, len(scored), num_words)
    ]


def _log_probabilities(
    model: nn.Module,
    sequences: Sequence[tuple[int, ...]],
    scored: Sequence[tuple[int, int, list[int]]],
    pad_id: int,
    batch_size: int,
) -> list[float]:
    """For each scored label, the sum over its tokens; sequences of like length go together."""
    labels_of: dict[int, list[int]] = {}
    for idx, (number, _, _) in enumerate(scored):
        labels_of.setdefault(number, []).append(idx)
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    device = model.get_input_embeddings().weight.device
    sums = [0.0] * len(scored)
    was_training = model.training
    model.eval()
    for begin in range(0, len(order), batch_size):
        numbers = order[begin : begin + batch_size]
        length = max(len(sequences[number]) for number in numbers)
        rows = [[*sequences[number], *[pad_id] * (length - len(sequences[number]))] for number in numbers]
        mask = [[1] * len(sequences[number]) + [0] * (length - len(sequences[number])) for number in numbers]
        with torch.no_grad():
            ids = torch.tensor(rows, device=device)
            logits = model(input_ids=ids, attention_mask=torch.tensor(mask, device=device), use_cache=False).logits
        for row, number in enumerate(numbers):
            for idx in labels_of[number]:
                _, first, label_ids = scored[idx]
                told = logits[row, first : first + len(label_ids)].float().log_softmax(dim=-1)
                sums[idx] = sum(told[place, token].item() for place, token in enumerate(label_ids))
    model.train(was_training)
    return sums
