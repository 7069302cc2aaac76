"""Whether the finished contenders of a duel did the same job, in sentences for its reader.

Knows the results and their details. Does not know how a contender is trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from contender_process import Outcome

from hf_lema.units import GIB, format_bytes

MAX_CONTEXT_BYTES = int(1.5 * GIB)
"""A CUDA context with NCCL's takes less; more at a contender's start is somebody else's."""


def check_same(outcomes: Sequence[Outcome]) -> list[str]:
    """Sentences on what the finished contenders shared, or did not: batches, adapter, optimizer, an idle device."""
    finished = [outcome for outcome in outcomes if outcome.result.status == "ok"]
    if len(finished) < 2:
        return []
    return [*_batches(finished), *_starts(finished), *_optimizer(finished), *_busy(finished), *_equal_ends(finished)]


def _batches(finished: Sequence[Outcome]) -> list[str]:
    if len({outcome.result.batches_sha256 for outcome in finished}) > 1:
        return ["BEWARE: the contenders did not see the same batches."]
    return ["All saw the same batches."]


def _starts(finished: Sequence[Outcome]) -> list[str]:
    """In another precision the same adapter is rounded in another way, so only contenders of one are compared."""
    by_precision: dict[str | None, set[str]] = {}
    for outcome in finished:
        by_precision.setdefault(outcome.details.get("precision"), set()).add(outcome.details["adapter_start_sha256"])
    sentences = []
    if any(len(starts) > 1 for starts in by_precision.values()):
        sentences.append("BEWARE: the contenders did not begin with the same adapter.")
    elif len(by_precision) == 1:
        sentences.append("All began with the same adapter, bit for bit.")
    else:
        sentences.append("All that trained in one precision began with the same adapter, bit for bit.")
    if len({outcome.result.num_trainable for outcome in finished}) > 1:
        sentences.append("BEWARE: the contenders did not train the same number of parameters.")
    return sentences


def _optimizer(finished: Sequence[Outcome]) -> list[str]:
    settings = {json.dumps(outcome.details.get("optimizer"), sort_keys=True) for outcome in finished}
    return ["BEWARE: the contenders did not have the same optimizer settings."] if len(settings) > 1 else []


def _busy(finished: Sequence[Outcome]) -> list[str]:
    """Whoever ran beside a contender took memory or time from it."""
    sentences = []
    for outcome in finished:
        used_bytes = outcome.details.get("vram_in_use_at_start_bytes")
        if used_bytes is not None and used_bytes > MAX_CONTEXT_BYTES:
            name, used = outcome.result.name, format_bytes(used_bytes)
            sentences.append(f"BEWARE: the card was not idle when {name} began, {used} were in use.")
    here = len(os.sched_getaffinity(0))
    num_cpus = min(outcome.environment.get("num_cpus_usable") or here for outcome in finished)  # kept runs have theirs
    loads = [outcome.details.get("num_load_average_1_min") or 0.0 for outcome in finished]
    if max(loads) > num_cpus:
        span = f"{min(loads):.1f} to {max(loads):.1f} on {num_cpus} cores"
        sentences.append(f"BEWARE: the processor was not idle, its load was {span} when contenders began.")
    return list(dict.fromkeys(sentences))


def _equal_ends(finished: Sequence[Outcome]) -> list[str]:
    by_end: dict[str, list[str]] = {}
    for outcome in finished:
        by_end.setdefault(outcome.details["adapter_end_sha256"], []).append(outcome.result.name)
    by_end = {digest: list(dict.fromkeys(names)) for digest, names in by_end.items()}  # a contender's runs are one
    equal = [" and ".join(names) for names in by_end.values() if len(names) > 1]
    return [f"After the last step the adapters of {names} are equal, bit for bit." for names in equal]
