"""Judging replies: what a model answers to held-out questions, and which parts of the reply format are there.

Knows the format of `reply_data` and `generate` of transformers. Does not know how the model was trained or where its
weights are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from reply_data import ReplyExample
from torch import nn
from transformers import GenerationConfig

OPENING, CLOSING = "[LEMA_REPLY]", "[/LEMA_REPLY]"
FIELDS = ("Answer", "Explanation", "Confidence")
_FIELD_LINE = re.compile(rf"^({'|'.join(FIELDS)}):(.*)$", flags=re.MULTILINE)
_WELL_FORMED = re.compile(
    r"\[LEMA_REPLY\]\nAnswer: (?P<answer>\S[^\n]*)\nExplanation: \S[^\n]*\n"
    r"Confidence: (?:High|Medium|Low)\n\[/LEMA_REPLY\]"
)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model wrote after a prompt.

    Attributes:
        text: Up to and without the end-of-text token; other special tokens stay in it.
        stopped: The model ended by itself; False where it was cut at the limit.
    """

    text: str
    stopped: bool


@dataclass(frozen=True, kw_only=True)
class ReplyJudgement:
    """Which demands of the format one reply meets.

    Attributes:
        opens: It begins with the opening tag, on a line of its own.
        closes: It ends with the closing tag, on a line of its own.
        fields_in_order: Answer, Explanation, Confidence, once each, in this order, none empty.
        confidence_known: The confidence is High, Medium or Low.
        tags_once: Neither tag is there twice.
        stops: The model ended by itself.
        well_formed: The whole reply is of the format and the model ended by itself.
    """

    opens: bool
    closes: bool
    fields_in_order: bool
    confidence_known: bool
    tags_once: bool
    stops: bool
    well_formed: bool


def judge_reply(reply: Reply) -> ReplyJudgement:
    """Holds one reply against the format. A demand that another one needs is judged by itself all the same."""
    text = reply.text
    found = [(name, value.strip()) for name, value in _FIELD_LINE.findall(text)]
    confidences = [value for name, value in found if name == "Confidence"]
    return ReplyJudgement(
        opens=text.startswith(OPENING + "\n"),
        closes=text.endswith("\n" + CLOSING),
        fields_in_order=[name for name, _ in found] == list(FIELDS) and all(value for _, value in found),
        confidence_known=bool(confidences) and set(confidences) <= {"High", "Medium", "Low"},
        tags_once=text.count(OPENING) <= 1 and text.count(CLOSING) <= 1,
        stops=reply.stopped,
        well_formed=reply.stopped and _WELL_FORMED.fullmatch(text) is not None,
    )


@dataclass(frozen=True, kw_only=True)
class ReplyScore:
    """Shares of the replies, 0 to 1, that meet each demand of `ReplyJudgement`.

    Attributes:
        num_replies: Replies that were judged.
        right_answer: Share whose answer is, letter by letter, the one of the held-out fact; no part of the format.
    """

    num_replies: int
    opens: float
    closes: float
    fields_in_order: float
    confidence_known: float
    tags_once: float
    stops: float
    well_formed: float
    right_answer: float

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return asdict(self)


SCORE_LABELS = {
    "opens": "begins with [LEMA_REPLY]",
    "closes": "ends with [/LEMA_REPLY]",
    "fields_in_order": "Answer, Explanation, Confidence in order",
    "confidence_known": "Confidence is High, Medium or Low",
    "tags_once": "no tag twice",
    "stops": "stops by itself",
    "well_formed": "all of these",
    "right_answer": "answer as in the held-out fact (no part of the format)",
}


def score_replies(replies: Sequence[Reply], examples: Sequence[ReplyExample]) -> ReplyScore:
    """Judges all replies and takes the shares.

    Args:
        replies: Of the model.
        examples: The questions with their references, in the same order.

    Raises:
        ValueError: There is no reply, or not one for each example.
    """
    if not replies or len(replies) != len(examples):
        raise ValueError(f"{len(replies)} replies to {len(examples)} questions; expected one for each, at least one")
    judgements = [judge_reply(reply) for reply in replies]
    right = [_answer(reply.text) == _answer(example.reply) for reply, example in zip(replies, examples, strict=True)]
    shares = {
        field.name: sum(getattr(judgement, field.name) for judgement in judgements) / len(judgements)
        for field in fields(ReplyJudgement)
    }
    return ReplyScore(num_replies=len(replies), right_answer=sum(right) / len(right), **shares)


def _answer(text: str) -> str | None:
    """The answer of a well-formed reply; a fact's own reply always is one, so None never equals it."""
    match = _WELL_FORMED.fullmatch(text)
    return None if match is None else match["answer"]


def generate_replies(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int
) -> list[Reply]:
    """Lets the model answer, greedily, several prompts at a time: a streamed model moves once a token for all of them.

    Args:
        model: On any device, with or without an adapter, streamed or not. It is in training mode again afterwards if
            it was before.
        tokenizer: With an end-of-text token. Prompts are padded on the left.
        prompts: Up to where the reply begins.
        max_new_tokens: Where a reply is cut.
        batch_size: Prompts at a time.
    """
    was_training = model.training
    model.eval()
    end_id = tokenizer.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end_id, pad_token_id=end_id, use_cache=True
    )
    replies = []
    for begin in range(0, len(prompts), batch_size):
        ids = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts[begin : begin + batch_size]]
        # Some tokenizers put an end-of-text behind every text: no reply would follow it.
        ids = [row[:-1] if row[-1] == end_id else row for row in ids]
        length = max(map(len, ids))
        device = model.get_input_embeddings().weight.device
        padded = torch.tensor([[end_id] * (length - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids], device=device)
        with torch.no_grad():
            output = model.generate(input_ids=padded, attention_mask=mask, generation_config=settings)
        replies += [_reply(row[length:].tolist(), tokenizer) for row in output]
    model.train(was_training)
    return replies


def _reply(ids: list[int], tokenizer: Any) -> Reply:
    stopped = tokenizer.eos_token_id in ids
    ids = ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids
    return Reply(text=tokenizer.decode(ids, clean_up_tokenization_spaces=False), stopped=stopped)
