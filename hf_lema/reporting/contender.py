"""What is known of one contender after a duel: plain data and its JSON form.

Responsibility: the form of a result, checked at its making, so that a report never meets a half-filled one. Knows
neither how the figures were measured nor how they are shown.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STATUSES = ("ok", "out_of_memory", "failed", "skipped")
_PER_STEP = ("loss", "step_s", "vram_step_peak_bytes", "h2d_bytes", "disk_bytes")


@dataclass(frozen=True, kw_only=True)
class UseSample:
    """One point of a memory curve.

    Attributes:
        elapsed_s: Seconds since the contender's process began to train.
        vram_bytes: VRAM of the process; ``None`` on a machine without a card.
        ram_bytes: Private RAM of the process above what its imports took.
    """

    elapsed_s: float
    vram_bytes: int | None
    ram_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class ContenderResult:
    """The outcome of one contender. Lists may be given for the tuples.

    Attributes:
        name: Its name in the duel, such as ``peft``.
        status: ``ok``, ``out_of_memory``, ``failed`` or ``skipped``.
        reason: Why it is not ``ok``, in one sentence.
        num_steps: Optimizer steps that it finished.
        num_warmup_steps: Steps at the beginning that no time is taken from.
        loss: Training loss of each step, in order; may hold NaN.
        step_s: Wall time of each step, warm-up included.
        tokens_per_s: Tokens over wall time after the warm-up.
        vram_allocated_peak_bytes: Largest use by tensors; ``None``, like the next two, without a card.
        vram_reserved_peak_bytes: Largest use by torch's allocator.
        vram_process_peak_bytes: Largest use by the process.
        vram_step_peak_bytes: Largest use by the process in each step.
        vram_card_bytes: Size of the card, or the limit that the contender was held to.
        ram_private_above_imports_peak_bytes: Largest private RAM (anonymous and shared pages), less what the imports,
            the device context and the model skeleton took.
        ram_file_peak_bytes: Largest use by pages of mapped files.
        ram_resident_above_imports_peak_bytes: Largest resident RAM, pages of mapped files included, less what the
            imports took; given where no card takes part. A stock model on the CPU computes from its mapped checkpoint:
            private RAM alone would leave its weights out.
        h2d_bytes: Layer bytes moved to the device in each step; empty when nothing is streamed.
        disk_bytes: Layer bytes read from disk in each step, likewise.
        wait_s: Time in all steps together that compute waited for layers.
        samples: The memory curve, oldest first.
        batches_sha256: Digest of the batches that it trained on, to prove that all saw the same.
        num_trainable: Parameters that train.
        notes: Sentences that a reader of its figures must know.

    Raises:
        ValueError: At making, when a field contradicts another; all contradictions are named.
    """

    name: str
    status: str
    reason: str = ""
    num_steps: int = 0
    num_warmup_steps: int = 0
    loss: Sequence[float] = ()
    step_s: Sequence[float] = ()
    tokens_per_s: float | None = None
    vram_allocated_peak_bytes: int | None = None
    vram_reserved_peak_bytes: int | None = None
    vram_process_peak_bytes: int | None = None
    vram_step_peak_bytes: Sequence[int] = ()
    vram_card_bytes: int | None = None
    ram_private_above_imports_peak_bytes: int | None = None
    ram_file_peak_bytes: int | None = None
    ram_resident_above_imports_peak_bytes: int | None = None
    h2d_bytes: Sequence[int] = ()
    disk_bytes: Sequence[int] = ()
    wait_s: float | None = None
    samples: Sequence[UseSample] = ()
    batches_sha256: str | None = None
    num_trainable: int | None = None
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in (*_PER_STEP, "samples", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        faults = []
        if self.status not in STATUSES:
            faults.append(f"status is {self.status!r}, expected one of {', '.join(STATUSES)}")
        if self.status != "ok" and not self.reason:
            faults.append(f"status is {self.status!r} but no reason is given")
        if self.status == "ok" and self.num_steps < 1:
            faults.append("status is 'ok' but no step was done")
        lengths = {name: len(getattr(self, name)) for name in _PER_STEP}
        too_long = {name: length for name, length in lengths.items() if length > self.num_steps}
        faults += [f"{name} has {length} values for {self.num_steps} steps" for name, length in too_long.items()]
        if self.num_warmup_steps < 0:
            faults.append(f"num_warmup_steps is {self.num_warmup_steps}, expected 0 or more")
        if faults:
            raise ValueError(f"result of contender {self.name!r}: {'; '.join(faults)}")

    @property
    def timed_step_s(self) -> tuple[float, ...]:
        """Step times after the warm-up."""
        return tuple(self.step_s)[self.num_warmup_steps :]

    def to_json(self) -> dict[str, Any]:
        """A dictionary ready for ``json.dumps``; a number that is not finite is written as text (``"nan"``)."""
        data = json_ready(dataclasses.asdict(self))
        assert isinstance(data, dict), "asdict gives a dictionary"
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ContenderResult:
        """The result that `to_json` wrote.

        Raises:
            ValueError: A field is missing or unknown, or its value does not fit.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        required = {"name", "status"}
        if missing := sorted(required - set(data)):
            raise ValueError(f"result of a contender lacks {', '.join(missing)}")
        if unknown := sorted(set(data) - names):
            raise ValueError(f"result of contender {data['name']!r} has unknown fields: {', '.join(unknown)}")
        values = dict(data)
        # Text in a list of numbers is a number that is not finite: see to_json.
        for name in ("loss", "step_s"):
            values[name] = tuple(float(value) for value in data.get(name, ()))
        for name in ("tokens_per_s", "wait_s"):
            values[name] = None if data.get(name) is None else float(data[name])
        values["samples"] = tuple(UseSample(**sample) for sample in data.get("samples", ()))
        return cls(**values)


def json_ready(value: Any) -> Any:
    """The value with numbers that are not finite, at any depth, as text (``"nan"``), which ``float`` reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    return value
