"""One fact that a reply can state, and the rule by which its confidence is chosen.

Knows nothing of templates, tokens or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Confidence(Enum):
    """How sure a reply may be.

    The rule, applied to every fact of this recipe:

    * ``HIGH``: settled by definition, by computation or by record (a capital, a sum, a date, a symbol).
    * ``MEDIUM``: right to the digits given, but measured or rounded (a height, a mass, miles in kilometres).
    * ``LOW``: an estimate on which good sources differ (a count of stars, the words that make so many tokens).
    """

    HIGH = "High"
    MEDIUM = "Medium"
    LOW = "Low"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A question about one subject, in one or more wordings, with its true answer.

    Attributes:
        key: The subject that the fact belongs to. All facts of one key fall on the same side of the train and
            held-out split, so no wording and no turned-round question of a held-out subject is ever trained on.
        topic: Name of the table or family that the fact comes from.
        questions: Wordings of the same question, at least one.
        answer: The short answer, with no full stop of its own unless it is a sentence.
        explanation: One sentence that supports the answer.
        confidence: By the rule of :class:`Confidence`.
    """

    key: str
    topic: str
    questions: tuple[str, ...]
    answer: str
    explanation: str
    confidence: Confidence = Confidence.HIGH
