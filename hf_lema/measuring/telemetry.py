"""Measuring a training: memory, time and traffic of every optimizer step, on any Trainer, streamed model or not.

Responsibility: `MemoryTelemetryCallback`: when to read which counter, the lines it writes, and the figures that it adds
to Trainer's own logs. It reads between steps, never inside a forward, and never waits for the device. It does not know
how to draw.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_lema.environment import environment_record
from hf_lema.measuring.base_guard import BaseGuard
from hf_lema.measuring.full_card import FullCardWarning
from hf_lema.measuring.records import (
    PeakMemory,
    StepRecord,
    append_json_line,
    interval_figures,
    merged_peak,
    peak_figures,
    progress_line,
    rank_path,
)
from hf_lema.measuring.sampler import MemorySample, MemorySampler, ProcessMemory, read_process_memory
from hf_lema.measuring.step_counters import StepCounters, TokenCounter
from hf_lema.measuring.vram_meter import AllocatorPeak, VramMeter, open_vram_meter
from hf_lema.runtime.numa import node_of_card
from hf_lema.wrapper import find_streamer

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_lema.runtime.streamer import LayerStreamer

__all__ = [
    "MemorySample",
    "MemorySampler",
    "MemoryTelemetryCallback",
    "PeakMemory",
    "ProcessMemory",
    "StepRecord",
    "environment_record",
    "progress_line",
    "read_process_memory",
]

logger = logging.getLogger(__name__)


class MemoryTelemetryCallback(TrainerCallback, ExportableState):
    """Measures every optimizer step of a Trainer and says what it took.

    Per step, and as a peak since training began: VRAM allocated, reserved and of the process, RAM resident, private and
    of files; per step also time, tokens per second and, for a streamed model, bytes moved, bytes read, waits and demand
    loads. ``records`` holds one `StepRecord` a step, ``peak`` the run's peaks, ``samples`` the memory curve.

    The time of a step is the wall time between two ``on_step_end`` events. Kernels of the optimizer may still run then
    and count for the step after: single figures may shift by that much, their sum is right. Evaluation, prediction and
    saving are left out; the first step counts from its own beginning. To have exact peaks per step the callback resets
    torch's peak counters after every step: read ``peak`` rather than ``torch.cuda.max_memory_allocated``.

    Checkpoints note, in ``trainer_state.json``, which files the base of a streamed model came from. A run that is
    resumed with other files is refused before its first step. (To tell files apart by every byte they are read once, at
    the first checkpoint.)

    Trainer's logs gain the interval since the last log: peaks, means per step, tokens per second and the bus rate. In a
    distributed run every process measures itself and writes a file of its own; only the main process prints.

    Args:
        path: File for JSON lines: an environment line at each start of training, then one line a step and one a log,
            at the end a summary; flushed line by line. An existing file is continued, never cut. The main process
            of a distributed run writes ``steps.jsonl``, the others ``steps.rank1.jsonl`` and so on.
        warn_fraction: Share of the card, or of the limit set for this process, above which a warning is logged, once
            per crossing.
        sample_interval_s: Seconds between the sampler thread's readings.
        vram_limit_bytes: A card size to measure against where that is smaller than the real one.
        ram_baseline: What the process held before the part to be measured; by default what it holds now.
        console: Print one line at each log.
        allow_changed_base: Resume with a base model whose files are not those that the checkpoint was trained on.

    Raises:
        ValueError: ``warn_fraction`` is not above 0 and at most 1, or ``sample_interval_s`` is not above 0.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        warn_fraction: float = 0.9,
        sample_interval_s: float = 0.05,
        *,
        vram_limit_bytes: int | None = None,
        ram_baseline: ProcessMemory | None = None,
        console: bool = True,
        allow_changed_base: bool = False,
    ) -> None:
        self._full_card = FullCardWarning(warn_fraction, vram_limit_bytes)
        if not sample_interval_s > 0:
            raise ValueError(f"sample_interval_s must be above 0, got {sample_interval_s}")
        self.path = None if path is None else Path(path)
        self.records: list[StepRecord] = []
        self.peak: PeakMemory | None = None
        self._sample_interval_s = sample_interval_s
        self._ram_baseline = read_process_memory() if ram_baseline is None else ram_baseline
        self._console = console
        self._base_guard = BaseGuard(allow_changed_base)
        self._sampler: MemorySampler | None = None  # owned here, from on_train_begin to close()
        self._token_hook: RemovableHandle | None = None  # owned here, likewise
        self._samples: tuple[MemorySample, ...] = ()
        self._tokens = TokenCounter()
        self._meter: VramMeter | None = None
        self._allocator: AllocatorPeak | None = None
        self._streamer: LayerStreamer | None = None
        self._train_start_s = 0.0
        self._num_tokens_at_start = 0
        self._step_start: StepCounters | None = None
        self._num_records_logged = 0
        self._environment: dict[str, Any] = {}
        self._process_rank = 0

    @classmethod
    def attach(cls, trainer: Trainer, path: str | Path | None = None, **options: Any) -> MemoryTelemetryCallback:
        """Add the callback in front of all others, so that TensorBoard and W&B see its figures in Trainer's logs.

        Trainer's integrations run before callbacks given by the user, so the figures of a plain callback reach
        ``state.log_history`` and the console only.

        Args:
            trainer: Any Trainer, before ``train()``.
            path: As in the class.
            **options: The other arguments of the class.

        Returns:
            The callback.

        Raises:
            ValueError: The trainer already has such a callback.
        """
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(callback, MemoryTelemetryCallback) for callback in callbacks):
            raise ValueError(
                "this trainer already has a MemoryTelemetryCallback: leave it out of `callbacks=` and attach one, "
                "or take it out first with trainer.remove_callback(MemoryTelemetryCallback)"
            )
        callback = cls(path, **options)
        callbacks.insert(0, callback)
        return callback

    @property
    def samples(self) -> tuple[MemorySample, ...]:
        """The memory curve of the training that runs, or else of the last one."""
        return self._samples if self._sampler is None else self._sampler.samples

    def state(self) -> dict[str, Any]:
        """What Trainer keeps of the callback in a checkpoint: its arguments, and the identity of the base's files."""
        arguments = {
            "path": None if self.path is None else str(self.path),
            "warn_fraction": self._full_card.fraction,
            "sample_interval_s": self._sample_interval_s,
            "vram_limit_bytes": self._full_card.vram_limit_bytes,
            "console": self._console,
            "allow_changed_base": self._base_guard.is_override,
        }
        return {"args": arguments, "attributes": self._base_guard.attributes()}

    def close(self) -> None:
        """Stop measuring: end the sampler thread and take the hook off the model. May be called again.

        Training that ends normally calls it. After a training that raised, call it, or use the callback as a context
        manager, to have the peaks up to the failure in ``peak`` and no thread left.
        """
        sampler, self._sampler = self._sampler, None
        hook, self._token_hook = self._token_hook, None
        if hook is not None:
            hook.remove()
        if sampler is not None:
            try:
                self._take_peak(sampler)
                self._samples = sampler.samples
            finally:
                sampler.close()
        self._meter, self._streamer, self._step_start = None, None, None
        self._base_guard.end()

    def __enter__(self) -> MemoryTelemetryCallback:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Trainer's events, in the order in which they come.

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Start the sampler and the counters; write the environment line."""
        if model is None:
            raise ValueError("on_train_begin came without the model, which Trainer passes to its callbacks")
        self.close()  # an earlier training of this trainer may have ended in an exception
        # Trainer looks here for every callback when it saves; a checkpoint from before this one has no entry of it.
        stored: Any = state.stateful_callbacks.setdefault(type(self).__name__, {})  # type: ignore[union-attr]
        self._base_guard.begin(model, stored[0] if isinstance(stored, list) else stored)
        self.records, self.peak, self._num_records_logged = [], None, 0
        self._full_card.arm()
        self._process_rank = args.process_index
        self._environment = _process_record(args)
        self._meter = open_vram_meter(args.device)
        self._streamer = find_streamer(model)
        self._tokens = TokenCounter()
        self._token_hook = model.register_forward_pre_hook(self._tokens, with_kwargs=True)
        read_vram_bytes = None if self._meter is None else self._meter.read_bytes
        self._sampler = MemorySampler(read_vram_bytes, interval_s=self._sample_interval_s).start()
        self._train_start_s = time.perf_counter()
        self._num_tokens_at_start = int(state.num_input_tokens_seen)
        self._take_peak(self._sampler)  # what came before training is no step's peak
        self._write_line("environment", self._session_record(state))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the first step; every other one begins where the step before ended."""
        if self._sampler is not None and self._step_start is None:
            counters = self._read_counters(state, time.perf_counter())
            # Trainer has counted the first batch before this event in transformers 4, and after it in 5.
            self._step_start = dataclasses.replace(counters, num_tokens_by_trainer=self._num_tokens_at_start)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the record of the step that ended, and begin the next step."""
        if self._sampler is None or self._step_start is None:
            return
        now_s = time.perf_counter()
        memory = self._take_peak(self._sampler)
        start, end = self._step_start, self._read_counters(state, now_s)
        self._step_start = end
        record = StepRecord(
            **dataclasses.asdict(memory),
            num_steps_done=state.global_step,
            elapsed_s=now_s - self._train_start_s,
            **end.figures_since(start),
        )
        self.records.append(record)
        self._write_line("step", record.to_dict())

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the evaluation out of the step that runs."""
        self._skip_to_now(state)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Leave the prediction out of the step that runs."""
        self._skip_to_now(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the saving out of the step that runs."""
        self._skip_to_now(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to a log of training loss, and the run's peaks to the last log; print the console line."""
        if logs is None or self._sampler is None:
            return
        if "loss" in logs and self._num_records_logged < len(self.records):
            interval = self.records[self._num_records_logged :]
            self._num_records_logged = len(self.records)
            figures = interval_figures(interval)
            loss = float(logs["loss"])
            self._write_line("log", {"num_steps_done": state.global_step, "loss_unitless": loss})
            self._print_line(state, loss, interval)
        elif "train_runtime" in logs and self.peak is not None:
            figures = {f"run_{name}": value for name, value in peak_figures(self.peak).items()}
        else:
            return
        logs.update(figures)
        # Trainer has copied `logs` into its history before this event.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the summary line and stop measuring."""
        if self._sampler is None:
            return
        elapsed_s = time.perf_counter() - self._train_start_s
        self.close()
        assert self.peak is not None, "close() notes a last peak"
        self._write_line("summary", self.peak.to_dict() | {"num_steps": len(self.records), "elapsed_s": elapsed_s})

    # Reading.

    def _take_peak(self, sampler: MemorySampler) -> PeakMemory:
        """Peak since the last call, folded into the run's peak; begins a new one."""
        sampled = sampler.take_peak()
        self._allocator = None if self._meter is None else self._meter.take_allocator_peak()
        baseline_bytes, private_bytes = self._ram_baseline.private_bytes, sampled.ram_private_bytes
        above_bytes = None if baseline_bytes is None or private_bytes is None else private_bytes - baseline_bytes
        memory = PeakMemory(
            vram_allocated_peak_bytes=None if self._allocator is None else self._allocator.allocated_bytes,
            vram_reserved_peak_bytes=None if self._allocator is None else self._allocator.reserved_bytes,
            vram_process_peak_bytes=sampled.vram_process_bytes,
            ram_rss_peak_bytes=sampled.ram_rss_bytes,
            ram_private_peak_bytes=private_bytes,
            ram_private_above_baseline_peak_bytes=above_bytes,
            ram_file_peak_bytes=sampled.ram_file_bytes,
        )
        self.peak = memory if self.peak is None else merged_peak([self.peak, memory])
        if self._meter is not None:
            self._full_card.look(memory, self._meter)
        return memory

    def _read_counters(self, state: TrainerState, now_s: float) -> StepCounters:
        return StepCounters(
            time_s=now_s,
            num_tokens=self._tokens.num_tokens,
            num_tokens_by_trainer=int(state.num_input_tokens_seen),
            allocator=self._allocator,
            stream=None if self._streamer is None else self._streamer.stats(),
        )

    def _skip_to_now(self, state: TrainerState) -> None:
        if self._sampler is None:
            return
        self._take_peak(self._sampler)
        if self._step_start is not None:
            self._step_start = self._read_counters(state, time.perf_counter())

    # Writing.

    def _session_record(self, state: TrainerState) -> dict[str, Any]:
        return (
            environment_record()
            | self._environment
            | {
                "vram_process_source": None if self._meter is None else self._meter.source,
                "ram_baseline_private_bytes": self._ram_baseline.private_bytes,
                "sample_interval_s": self._sample_interval_s,
                "num_steps_done": state.global_step,
                "num_steps_planned": state.max_steps,
                "is_streamed": self._streamer is not None,
            }
        )

    def _write_line(self, kind: str, figures: dict[str, Any]) -> None:
        if self.path is None:
            return
        append_json_line(rank_path(self.path, self._process_rank), {"kind": kind} | figures)

    def _print_line(self, state: TrainerState, loss: float, interval: list[StepRecord]) -> None:
        if not self._console or not state.is_world_process_zero:
            return
        line = progress_line(state.global_step, state.max_steps, loss, merged_peak(interval))
        tqdm.write(line, file=sys.stdout)  # above the progress bar, not through it


def _process_record(args: TrainingArguments) -> dict[str, Any]:
    """Which process of the run this is, and what its card is next to."""
    return {
        "num_processes": args.world_size,
        "process_rank_unitless": args.process_index,
        "local_process_rank_unitless": args.local_process_index,
        "numa_node_unitless": node_of_card(args.device),
    }
