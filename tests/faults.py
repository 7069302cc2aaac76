"""The faults that a run may meet: how each is brought about, what the user sees, what remains, how to go on.

tests/test_faults.py makes each of them happen and holds the run to what is written here; the table in
docs/reliability.md is made from this list: python tests/faults.py
"""

from __future__ import annotations

import dataclasses
import errno
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_scene import (
    FAULT_STEP,
    SAVE_STEPS,
    STATIONS,
    Scene,
    break_thread,
    cut_file,
    fill_disk,
    out_of_memory,
    overwrite_file,
    raising,
    refuse_late,
    replace_file,
    sending,
)

from hf_lema import StepChoices
from hf_lema.runtime.host_memory import PAGE_LOCK_ADVICE

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- from tests/faults.py -->\n", "<!-- end -->\n"
MODEL_FILE = "model.safetensors"
SCHEDULED = "the checkpoints of Trainer's schedule, whole"
TORN = "the same; the torn `checkpoint-N` is passed over by `last_whole_checkpoint` and written anew"
STEP = "a checkpoint of the last finished step"
FREED = "the last whole checkpoint; what was written of the next one is taken away"
ALL = "everything: the run goes on, bit for bit"
NOTHING = "no output, and no half of one"
RESUME = "load the model again and resume as above"
COMMAND = "the command that is printed (`--resume`)"
KEPT = ", under `recipes/resumable.py`"

PLACES = {"{layer}": r"\d+", "{n}": r"\d+", "{file}": rf"\S+/{re.escape(MODEL_FILE)}", "{folder}": r"\S+"}
PLACES |= {"{size}": r"[\d.]+ \w+"}


def matches(template: str, text: str) -> bool:
    """Whether a text is a template with its places filled in."""
    pattern = re.escape(template)
    for place, filled in PLACES.items():
        pattern = pattern.replace(re.escape(place), filled)
    return re.fullmatch(pattern, text) is not None


# ---- the list ----


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        happens: What goes wrong, in words.
        sees: The error as it is printed; places in braces stand for what differs. In brackets what is no error.
        remains: What is left.
        go_on: What the user does.
        inject: Puts it into a run.
        last_step: Step of the last whole checkpoint afterwards.
        max_lock_bytes: Most that may be page-locked at once, from the start.
        is_slow: Whether it is left to the slow tests: another station of one that is not.
    """

    happens: str
    sees: str
    remains: str
    go_on: str
    inject: Callable[[Scene], None] = lambda scene: None
    last_step: int = FAULT_STEP - 1
    max_lock_bytes: int = 2**40
    is_slow: bool = False


READ = (
    "RuntimeError: the prefetch thread failed; layer {layer} cannot be fetched. Reading layer {layer} ended in %s. "
    "Once that is mended, load the model again and resume from the last checkpoint"
)
MEMORY = (
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\nIt was in the %s of layer {layer}. Give a "
    "smaller vram_budget, a smaller batch or shorter sequences, and resume from the last checkpoint"
)
CUT = (
    "ValueError: bytes {n} to {n} of the layer: {file} ended early: wanted {n} bytes at offset {n}, got {n}. The file "
    "was cut while in use: fetch it again"
)
EIO = (
    "OSError: [Errno 5] Input/output error at offset {n}. The disk could not be read: copy the model to another one, "
    "or fetch it again: '{file}'"
)
OVERWRITTEN = (
    "ValueError: bytes {n} to {n} of the layer: {file} was written to while it was in use: what was read may be a "
    "mixture of old and new bytes. Leave the files of a model alone while it is streamed, and load it again"
)
TORCH_FULL = "RuntimeError: [enforce fail at inline_container.cc:{n}] . unexpected pos {n} vs {n}"


def _fault(happens: str, sees: str, inject: Callable[[Scene], None], **other: Any) -> Fault:
    return Fault(happens=happens, sees=sees, inject=inject, **({"remains": SCHEDULED, "go_on": RESUME} | other))


def _raising(name: str, place: str) -> Callable[[Scene], None]:
    return lambda scene: STATIONS[place](scene, sending(getattr(signal, name)))


def _left_by(place: str) -> dict[str, Any]:
    """What an end in this place leaves of a stock run."""
    return {"remains": TORN, "last_step": FAULT_STEP - 1 - SAVE_STEPS} if place == "a save" else {}


ERRORS = [
    _fault(
        f"read {n} of a step fails",
        READ % EIO,
        lambda scene, n=n: scene.at_read(raising(OSError, errno.EIO, ""), n),
        is_slow=n > 1,
    )
    for n in (1, 9, 23)
] + [
    _fault("the file ends early at the 9th read of a step", READ % CUT, lambda s: s.at_read(lambda *_: 0, 9)),
    _fault("a model file is cut", READ % CUT, cut_file, go_on=f"fetch the file again, then {RESUME}"),
    _fault("a model file is written to in place", READ % OVERWRITTEN, overwrite_file),
    _fault("anything else in the prefetch thread", READ % "ArithmeticError: on purpose", break_thread),
    _fault("out of memory in the forward", MEMORY % "forward", lambda s: s.in_layer(out_of_memory(), 1)),
    _fault("out of memory in the backward", MEMORY % "backward", lambda s: s.in_layer(out_of_memory(), 2)),
    _fault(
        "out of memory in the optimizer",
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        lambda s: s.in_optimizer(out_of_memory()),
        go_on=f'a smaller `vram_budget`, or `optim="paged_adamw_8bit"` from the start; {RESUME}',
    ),
    *(
        _fault(
            f"Ctrl-C (SIGINT) in {place}",
            "KeyboardInterrupt: ",
            _raising("SIGINT", place),
            is_slow=place not in ("the backward", "a save"),
            **_left_by(place),
        )
        for place in STATIONS
    ),
    _fault(
        "the disk is full during a checkpoint",
        TORCH_FULL,
        fill_disk,
        remains=TORN,
        go_on=f"free some space, then {RESUME}",
        last_step=FAULT_STEP - 1 - SAVE_STEPS,
    ),
]
"""What ends a run of the stock Trainer with an error."""

KILLS = [
    _fault(
        f"{name} in {place}",
        "(the process ends at once)",
        _raising(name, place),
        is_slow=name == "SIGTERM",
        **_left_by(place),
    )
    for name, places in (("SIGTERM", tuple(STATIONS)), ("SIGKILL", ("a save",)))
    for place in places
]
"""What ends the process of a stock Trainer."""

ASKED = "interrupted (%s): this step ends first; a second one does not wait"
KEEPING = [
    *(
        _fault(
            f"{name} in {place}{KEPT}",
            ASKED % name,
            _raising(name, place),
            remains=STEP,
            go_on=COMMAND,
            last_step=FAULT_STEP,
            is_slow=(name, place) not in {("SIGTERM", "the backward"), ("SIGINT", "a save")},
        )
        for name in ("SIGINT", "SIGTERM")
        for place in STATIONS
    ),
    _fault(
        f"a second Ctrl-C (SIGINT) in a save{KEPT}",
        "KeyboardInterrupt: ",
        lambda s: s.in_save(lambda: (sending(signal.SIGINT)(), sending(signal.SIGINT)())),
        remains=STEP,
        go_on=COMMAND,
    ),
    _fault(
        f"out of memory in the backward{KEPT}",
        MEMORY % "backward",
        lambda s: s.in_layer(out_of_memory(), 2),
        remains=STEP,
        go_on=f"{COMMAND}, with a smaller budget",
    ),
    _fault(
        f"out of memory in the optimizer{KEPT}",
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        lambda s: s.in_optimizer(out_of_memory()),
        go_on=COMMAND,
        is_slow=True,
    ),
    _fault(
        f"a read fails{KEPT}",
        READ % EIO,
        lambda s: s.at_read(raising(OSError, errno.EIO, ""), 9),
        remains=STEP,
        go_on=COMMAND,
        is_slow=True,
    ),
    _fault(
        f"the disk is full during a checkpoint{KEPT}",
        TORCH_FULL,
        fill_disk,
        remains=FREED,
        go_on=f"free some space, then {COMMAND}",
        last_step=FAULT_STEP - 1 - SAVE_STEPS,
    ),
]
"""What the recipes make of it."""

PAGEABLE = "through pageable memory, at a fraction of the bus rate"
REFUSED = "UserWarning: page-locking {size} %s. " + PAGE_LOCK_ADVICE
SURVIVED = [
    _fault(
        "every read gives fewer bytes than asked",
        "(nothing)",
        lambda s: s.at_read(lambda preadv, fd, buffers, offset: preadv(fd, [buffers[0][:7000]], offset), 1),
    ),
    _fault("a model file is replaced by another", "(nothing: the one that is open is read on)", replace_file),
    _fault(
        "page-locking is refused at the start",
        REFUSED % f"of host memory was refused; copies to the GPU go {PAGEABLE}",
        lambda scene: None,
        max_lock_bytes=0,
    ),
    _fault(
        "page-locking is refused later, for boundary activations",
        REFUSED % f"for boundary activations was refused; they travel {PAGEABLE}",
        refuse_late(StepChoices(boundaries_in_ram=True)),
    ),
    _fault(
        "page-locking is refused later, for embedding and head",
        REFUSED % "for the embedding was refused; embedding and head stay in VRAM",
        refuse_late(StepChoices(outside_in_ram=True)),
    ),
]  # fmt: skip
SURVIVED = [dataclasses.replace(fault, remains=ALL, go_on="not needed") for fault in SURVIVED]
"""What a run goes on through."""

MERGES = [
    Fault(
        happens="the disk becomes full during a merge",
        sees=(
            "OSError: [Errno 28] the disk of {folder} became full at byte {n} of model.safetensors (No space left on "
            "device). Nothing is left of what was written: free some space and run it again"
        ),
        remains=NOTHING,
        go_on="free some space, then the same command",
    )
]


# ---- the table ----


def _shown(sees: str) -> str:
    """As code, unless it is a remark in brackets; a message of two lines is in two pieces."""
    if sees.startswith("("):
        return sees
    return "<br>".join(f"``{line.strip(' :')}``" for line in sees.splitlines())


def table() -> str:
    """The list as Markdown; faults that differ in their station alone share a row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for fault in [*SURVIVED, *ERRORS, *KILLS, *KEEPING, *MERGES]:
        rows.setdefault((_shown(fault.sees), fault.remains, fault.go_on), []).append(fault.happens)
    lines = ["| what happens | what you see | what remains | how to go on |", "|---|---|---|---|"]
    lines += [f"| {'<br>'.join(happens)} | {' | '.join(cells)} |" for cells, happens in rows.items()]
    return "\n".join(lines) + "\n"


def written_table() -> str:
    """The table as the document has it."""
    return DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
