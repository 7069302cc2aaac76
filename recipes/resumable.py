"""A training that may die: what was trained is kept in a checkpoint from which it goes on, bit for bit.

A checkpoint is taken between two steps. An interrupt (Ctrl-C, SIGTERM) lets the step that runs end first; a second one
does not wait. An error inside a step, out of memory among them, leaves the parameters as the last step left them, and
the random state of that moment was noted, so the checkpoint is the one that would have been taken then. Only where the
optimizer itself was cut off is nothing written: the last checkpoint of the Trainer's own schedule stands. A checkpoint
that was cut off itself (a full disk, an interrupt that does not wait) is taken away; one that a killed process left is
taken away when the run goes on.

Knows transformers' Trainer. Does not know the model, the data, or what the recipe measures.
"""

from __future__ import annotations

import gc
import random
import shlex
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lema import last_whole_checkpoint
from hf_lema.files.trainer_checkpoints import torn_checkpoints

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_INTERRUPTED = 130
EXIT_FAILED = 1
SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full or failing disk becomes: written by Python, by torch, by safetensors."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Why a training ended before its last step.

    Attributes:
        num_steps_done: Optimizer steps done.
        reason: In one line.
        error: What was raised; None after an interrupt that waited for the step's end.
        save_error: Why the last step's end could not be kept; None where it could, or was not to be.
        checkpoint: Where it can go on; None where no step was finished and none was kept.
    """

    num_steps_done: int
    reason: str
    error: BaseException | None
    save_error: BaseException | None
    checkpoint: Path | None


@dataclass(frozen=True, kw_only=True)
class _RandomState:
    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: torch.Tensor | None


class StepBoundary(TrainerCallback):
    """Knows whether the optimizer is at work, and the random state at the end of the last step; stops when asked."""

    def __init__(self) -> None:
        self.stop_reason: str | None = None
        self.is_updating = False
        self._random: _RandomState | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.is_updating, self._random = False, None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.is_updating = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.is_updating = False
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        self._random = _RandomState(
            python=random.getstate(), numpy=np.random.get_state(), cpu=torch.get_rng_state(), cuda=cuda
        )
        if self.stop_reason is not None and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def go_back_to_step_end(self) -> bool:
        """Sets the random state of the last step's end; False where no step has ended."""
        if self._random is None:
            return False
        random.setstate(self._random.python)
        np.random.set_state(self._random.numpy)
        torch.set_rng_state(self._random.cpu)
        if self._random.cuda is not None:
            torch.cuda.set_rng_state(self._random.cuda)
        return True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, the first interrupt asks for a stop at the step's end; the second one acts as usual."""
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

        def ask(number: int, frame: Any) -> None:
            self.stop_reason = f"interrupted ({signal.Signals(number).name})"
            print(f"\n{self.stop_reason}: this step ends first; a second one does not wait", flush=True)
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in STOP_SIGNALS:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train_or_keep(trainer: Trainer, *, resume: bool) -> Stop | None:
    """Trains to the end, or keeps what was trained.

    Args:
        trainer: With ``save_strategy="steps"``; its ``output_dir`` is where checkpoints are.
        resume: Go on from the last checkpoint there.

    Returns:
        None where the training reached its last step, else why it did not.

    Raises:
        ValueError: There is nothing to resume.
    """
    folder = Path(trainer.args.output_dir)
    last = last_whole_checkpoint(folder)
    if resume and last is None:
        raise ValueError(f"--resume: there is no checkpoint in {folder} that is whole; leave it out to begin anew")
    _remove_torn(folder)
    boundary = StepBoundary()
    trainer.add_callback(boundary)
    error: BaseException | None = None
    with boundary.listening():
        try:
            trainer.train(resume_from_checkpoint=last if resume else None)
        except (KeyboardInterrupt, MemoryError, *SAVE_ERRORS) as caught:
            error = _without_frames(caught)
    num_steps_done = trainer.state.global_step
    if error is None and num_steps_done >= trainer.state.max_steps:
        return None
    save_error = None if error is None else _keep(trainer, boundary)
    last = last_whole_checkpoint(folder)
    reason = boundary.stop_reason or ""
    if error is not None:
        lines = str(error).splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"
    return Stop(
        num_steps_done=num_steps_done,
        reason=reason,
        error=error,
        save_error=save_error,
        checkpoint=None if last is None else Path(last),
    )


def _keep(trainer: Trainer, boundary: StepBoundary) -> BaseException | None:
    """Writes the checkpoint of the last step's end, unless the optimizer was cut off or no step had ended.

    Returns:
        Why it could not be written; what was written of it is then taken away again.
    """
    gc.collect()
    folder = Path(trainer.args.output_dir)
    try:
        if not boundary.is_updating and boundary.go_back_to_step_end():
            trainer.model.zero_grad(set_to_none=True)
            # The same call that Trainer makes on its schedule; no public one keeps optimizer and random state.
            trainer._save_checkpoint(trainer.model, trial=None)
    except SAVE_ERRORS as error:
        return _without_frames(error)
    finally:
        _remove_torn(folder)
    return None


def _without_frames(error: BaseException) -> BaseException:
    """Lets go of what the frames of an error, and of those before it, hold: activations, files half written."""
    chained: list[BaseException | None] = [error]
    while chained:
        each = chained.pop()
        if each is not None and each.__traceback__ is not None:
            each.__traceback__ = None
            chained += [each.__cause__, each.__context__]
    return error


def _remove_torn(folder: Path) -> None:
    for path in torn_checkpoints(folder):
        shutil.rmtree(path)


def command_to_resume(script: str, options: Sequence[str]) -> str:
    """The command line that goes on, from the one that was used."""
    return shlex.join(["python", script, *(option for option in options if option != "--resume"), "--resume"])


def report_stop(stop: Stop, num_steps: int, script: str, options: Sequence[str]) -> int:
    """Says why a training ended early and how to go on.

    Args:
        stop: As `train_or_keep` gave it.
        num_steps: Steps that were to be done.
        script: The recipe.
        options: That it was given.

    Returns:
        The exit status.

    Raises:
        RuntimeError: The error that ended the training, where it was neither an interrupt nor a lack of memory.
    """
    print(f"\nTraining stopped after step {stop.num_steps_done} of {num_steps}: {stop.reason}", flush=True)
    if stop.save_error is not None:
        print(f"The last step could not be kept: {type(stop.save_error).__name__}: {stop.save_error}")
        print("Is the disk full, or was it unplugged? What was written of that checkpoint is taken away.")
    if stop.checkpoint is None:
        print("No step was finished and kept, so there is nothing to go on from.")
    else:
        print(f"What was trained is kept in {stop.checkpoint}. To go on, bit for bit:")
        print(f"    {command_to_resume(script, options)}", flush=True)
    if stop.error is None or isinstance(stop.error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if not isinstance(stop.error, (torch.OutOfMemoryError, MemoryError)):
        raise stop.error
    print("A smaller --vram-budget or --ram-budget may be given with it: budgets change no number.", flush=True)
    return EXIT_FAILED
