"""The faults that a run may meet: how each is brought about, what the user sees, what remains, how to go on.

tests/test_faults.py makes each of them happen and holds the run to what is written here; the table in
docs/reliability.md is made from this list: python tests/faults.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import NUM_LAYERS, RecordingTrainer, adapt, arguments, examples
from test_host_store import FakeGpu
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from hf_lema import LemaConfig, LemaModelWrapper, StepChoices, get_streamer
from hf_lema.files import file_set
from hf_lema.runtime.host_memory import PAGE_LOCK_ADVICE
from hf_lema.wrapper import _runtime_of, apply_choices

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- from tests/faults.py -->\n", "<!-- end -->\n"
MODEL_FILE = "model.safetensors"
NUM_STEPS, SAVE_STEPS, FAULT_STEP = 6, 2, 5
"""Steps of a run, steps from checkpoint to checkpoint, and the step (counted from 1) in which a fault comes."""

SETTINGS: dict[str, Any] = {"max_steps": NUM_STEPS, "save_strategy": "steps", "save_steps": SAVE_STEPS}
SETTINGS |= {"num_examples": 2 * NUM_STEPS}

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


# ---- a run that a fault can be put into ----


def load(model_folder: Path, **choices: Any) -> Any:
    """A model that streams from its file, with an adapter; boundary activations are in RAM."""
    config = LemaConfig(ram_budget="min", choices=StepChoices(boundaries_in_ram=True))
    model = LemaModelWrapper.from_pretrained(
        str(model_folder), config, device="cpu", attn_implementation="eager", **choices
    )
    return adapt(model.train())


def make_trainer(model: Any, output_dir: Path) -> RecordingTrainer:
    """The stock Trainer over it, with checkpoints."""
    settings = {name: value for name, value in SETTINGS.items() if name != "num_examples"}
    rows = examples(SETTINGS["num_examples"])
    return RecordingTrainer(model=model, args=arguments(output_dir, **settings), train_dataset=rows)


@dataclass
class Scene:
    """A run that is about to begin.

    Attributes:
        trainer: Over a model that streams from disk.
        model_file: What it streams from.
        gpu: What page-locks are asked of.
        patch: Undone when the run is over.
        cleanups: Called when the run is over.
    """

    trainer: RecordingTrainer
    model_file: Path
    gpu: FakeGpu
    patch: pytest.MonkeyPatch
    cleanups: list[Callable[[], object]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The step that runs, counted from 1."""
        return self.trainer.state.global_step + 1

    @property
    def store(self) -> Any:
        return get_streamer(self.trainer.model).host_store

    def at_step(self, act: Callable[[], object], step: int = FAULT_STEP) -> None:
        """Acts when a step begins."""

        class AtStep(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step + 1 == step:
                    act()

        self.trainer.add_callback(AtStep())

    def at_read(self, read: Callable[..., int], num_read: int) -> None:
        """Has another function do the ``num_read``-th positioned read of the fault's step, and those after it."""
        preadv, left = os.preadv, [-1]

        def counted(descriptor: int, buffers: list[Any], offset: int) -> int:
            left[0] -= left[0] > 0
            return read(preadv, descriptor, buffers, offset) if left[0] == 0 else preadv(descriptor, buffers, offset)

        self.patch.setattr(file_set.os, "preadv", counted)
        self.at_step(lambda: left.__setitem__(0, num_read))

    def in_layer(self, act: Callable[[], object], num_call: int) -> None:
        """Acts in the middle of a layer's forward: at the first call of the step, or at the second, the recompute."""
        calls: list[int] = []

        def hook(*_: Any) -> None:
            if self.step == FAULT_STEP:
                calls.append(1)
                if len(calls) == num_call:
                    act()

        layers = self.trainer.model.get_base_model().model.layers
        self.cleanups.append(layers[NUM_LAYERS // 2].mlp.act_fn.register_forward_hook(hook).remove)

    def in_optimizer(self, act: Callable[[], object]) -> None:
        """Acts when the parameters are updated and the step is not over."""

        def hook(*_: Any) -> None:
            if self.step == FAULT_STEP:
                act()

        self.cleanups.append(register_optimizer_step_post_hook(hook).remove)

    def in_save(self, act: Callable[[], object]) -> None:
        """Acts when half of a checkpoint's optimizer state is written: that of the last step before the fault's."""
        save, acted = torch.save, []

        def half(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            save(value, path, *args, **kwargs)
            if str(path).endswith("optimizer.pt") and self.step >= FAULT_STEP and not acted:
                acted.append(path)
                os.truncate(path, os.path.getsize(path) // 2)
                act()
                save(value, path, *args, **kwargs)

        self.patch.setattr(torch, "save", half)

    @contextlib.contextmanager
    def played(self) -> Iterator[None]:
        """For the time of the run, with the signals of a foreground process: one in the background ignores SIGINT."""
        handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for cleanup in self.cleanups:
                cleanup()
            self.patch.undo()


Act = Callable[[], object]
STATIONS: dict[str, Callable[[Scene, Act], None]] = {
    "the forward": lambda scene, act: scene.in_layer(act, 1),
    "the backward": lambda scene, act: scene.in_layer(act, 2),
    "the optimizer": Scene.in_optimizer,
    "a save": Scene.in_save,
}


def raising(error: type[BaseException], *arguments: object) -> Callable[..., int]:
    """A new error at each call: one that was kept would hold, with its frames, the graph of the step for ever."""

    def act(*_: Any) -> int:
        raise error(*arguments)

    return act


def sending(number: int) -> Act:
    return lambda: signal.raise_signal(number)


def out_of_memory() -> Act:
    return raising(torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB.")


def cut_file(scene: Scene) -> None:
    scene.at_step(lambda: os.truncate(scene.model_file, scene.model_file.stat().st_size // 4))


def overwrite_file(scene: Scene) -> None:
    def overwrite() -> None:
        with scene.model_file.open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"\0" * 8)

    scene.at_step(overwrite)


def replace_file(scene: Scene) -> None:
    def replace() -> None:
        other = scene.model_file.with_suffix(".new")
        other.write_bytes(b"\0" * scene.model_file.stat().st_size)
        other.rename(scene.model_file)

    scene.at_step(replace)


def break_thread(scene: Scene) -> None:
    read_into = scene.store.read_into

    def broken(layer_idx: int, out: torch.Tensor) -> None:
        if scene.step == FAULT_STEP:
            raise ArithmeticError("on purpose")
        read_into(layer_idx, out)

    scene.store.read_into = broken


def fill_disk(scene: Scene) -> None:
    """The optimizer's state of a checkpoint goes to a device that is always full: the errors are the system's own."""

    def link() -> None:
        folder = Path(scene.trainer.args.output_dir) / f"checkpoint-{FAULT_STEP - 1}"
        folder.mkdir()
        (folder / "optimizer.pt").symlink_to("/dev/full")

    scene.at_step(link, FAULT_STEP - 1)


def refuse_late(choices: StepChoices) -> Callable[[Scene], None]:
    """Page-locking is allowed until memory for the choices is to be locked, in the middle of the run."""

    def inject(scene: Scene) -> None:
        outside = _runtime_of(scene.trainer.model.get_base_model()).outside
        move_to_host = outside.move_to_host

        def as_on_a_gpu() -> None:
            outside._device = torch.device("cuda")
            move_to_host()
            outside._device = torch.device("cpu")

        def choose() -> None:
            scene.gpu.max_lock_bytes = 0
            apply_choices(scene.trainer.model, choices)

        scene.patch.setattr(outside, "move_to_host", as_on_a_gpu)
        scene.at_step(lambda: apply_choices(scene.trainer.model, StepChoices()), 1)
        scene.at_step(choose)

    return inject


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
