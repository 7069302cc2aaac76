"""A run that a fault is put into: its stations, and how each kind of fault is brought about there.

Knows Trainer, the streamer and the system's calls. Does not know what the run is held to afterwards: tests/faults.py.
"""

from __future__ import annotations

import contextlib
import os
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
from hf_lema.model_runtime import runtime_of
from hf_lema.wrapper import apply_choices

NUM_STEPS, SAVE_STEPS, FAULT_STEP = 6, 2, 5
"""Steps of a run, steps from checkpoint to checkpoint, and the step (counted from 1) in which a fault comes."""

SETTINGS: dict[str, Any] = {"max_steps": NUM_STEPS, "save_strategy": "steps", "save_steps": SAVE_STEPS}
SETTINGS |= {"num_examples": 2 * NUM_STEPS}


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
        outside = runtime_of(scene.trainer.model.get_base_model()).outside
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
