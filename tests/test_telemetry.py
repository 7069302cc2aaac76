"""The callback under a stock Trainer: what it records, writes, prints and warns of."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_lema import LemaConfig, LemaModelWrapper, get_streamer
from hf_lema.measuring import telemetry, vram_meter
from hf_lema.measuring.sampler import MemorySampler, read_process_memory
from hf_lema.measuring.telemetry import MemoryTelemetryCallback
from hf_lema.measuring.vram_meter import AllocatorPeak
from hf_lema.runtime.streamer import StreamerStats
from hf_lema.units import GIB, MIB

pytestmark = pytest.mark.integration

NUM_TOKENS_PER_BATCH = 2 * 8


def sampler_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == MemorySampler.THREAD_NAME]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def tiny_dataset() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(32, (8,), generator=generator) for _ in range(64)]
    return [{"input_ids": row, "labels": row} for row in rows]


def tiny_trainer(folder: Path, callbacks: list[TrainerCallback], **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model=tiny_model(),
        args=TrainingArguments(**(settings | options)),
        train_dataset=tiny_dataset(),
        eval_dataset=tiny_dataset()[:4],
        callbacks=callbacks,
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class FakeMeter:
    """A card of 16 GiB whose use the test sets."""

    source = "nvml_process"
    total_bytes = 16 * GIB

    def __init__(self) -> None:
        self.process_bytes = 6 * GIB
        self.reserved_bytes = 5 * GIB
        self.spike_bytes = 0  # reserved once since the last take
        self.limit_bytes = 16 * GIB
        self.num_alloc_retries = 0
        self.num_takes = 0

    def read_bytes(self) -> int:
        return self.process_bytes

    def allocator_limit_bytes(self) -> int:
        return self.limit_bytes

    def take_allocator_peak(self) -> AllocatorPeak:
        self.num_takes += 1
        spike_bytes, self.spike_bytes = self.spike_bytes, 0
        return AllocatorPeak(
            allocated_bytes=4 * GIB + self.num_takes,
            reserved_bytes=max(self.reserved_bytes, spike_bytes),
            num_alloc_retries=self.num_alloc_retries,
            num_ooms=0,
        )


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> FakeMeter:
    fake = FakeMeter()
    monkeypatch.setattr(telemetry, "open_vram_meter", lambda device: fake)
    return fake


class AtStep(TrainerCallback):
    """Calls a function with the number of the step that begins."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self.function = function

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.function(state.global_step + 1)


def test_every_step_has_a_record_and_the_run_a_peak(tmp_path: Path) -> None:
    callback = MemoryTelemetryCallback()
    tiny_trainer(tmp_path, [callback]).train()
    assert [record.num_steps_done for record in callback.records] == [1, 2, 3, 4]
    for record in callback.records:
        assert record.step_s > 0
        assert record.num_tokens == NUM_TOKENS_PER_BATCH
        assert record.tokens_per_s == NUM_TOKENS_PER_BATCH / record.step_s
        assert record.ram_rss_peak_bytes > record.ram_private_peak_bytes > MIB  # type: ignore[operator]
        assert record.vram_allocated_peak_bytes is record.vram_process_peak_bytes is None
        assert record.h2d_bytes is record.wait_s is None
    assert callback.peak is not None
    assert callback.peak.ram_rss_peak_bytes >= max(record.ram_rss_peak_bytes for record in callback.records)
    assert len(callback.samples) >= 1
    assert sampler_threads() == []


def test_the_model_is_left_without_a_hook(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [MemoryTelemetryCallback()])
    trainer.train()
    assert len(trainer.model._forward_pre_hooks) == 0


def test_telemetry_does_not_change_the_numbers(tmp_path: Path) -> None:
    plain, measured = tiny_trainer(tmp_path, []), tiny_trainer(tmp_path, [])
    MemoryTelemetryCallback.attach(measured, tmp_path / "telemetry.jsonl")
    plain.train()
    measured.train()
    for first, second in zip(plain.model.parameters(), measured.model.parameters(), strict=True):
        assert torch.equal(first, second)


UNIT = re.compile(r"^num_|_(bytes|gib|s|unitless)$")


def test_every_number_in_the_lines_has_its_unit_in_its_key(tmp_path: Path, meter: FakeMeter) -> None:
    path = tmp_path / "deep" / "telemetry.jsonl"
    tiny_trainer(tmp_path, [MemoryTelemetryCallback(path)]).train()
    lines = read_lines(path)
    assert [line["kind"] for line in lines] == [
        "environment", "step", "step", "log", "step", "step", "log", "summary",
    ]  # fmt: skip
    for line in lines:
        numbers = [
            key for key, value in line.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
        ]
        assert len(numbers) >= 2
        assert [key for key in numbers if not UNIT.search(key)] == []
    assert lines[0]["torch_version"] == torch.__version__
    assert lines[0]["vram_process_source"] == "nvml_process"
    assert (lines[0]["num_steps_done"], lines[0]["num_steps_planned"]) == (0, 4)
    assert lines[1]["vram_reserved_minus_allocated_bytes"] == GIB - lines[1]["vram_allocated_peak_bytes"] + 4 * GIB
    assert lines[3]["loss_unitless"] > 0
    assert lines[-1]["num_steps"] == 4


def test_lines_are_on_disk_while_training_runs(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.jsonl"
    seen: list[int] = []
    probe = AtStep(lambda num_step: seen.append(sum(line["kind"] == "step" for line in read_lines(path))))
    tiny_trainer(tmp_path, [MemoryTelemetryCallback(path), probe]).train()
    assert seen == [0, 1, 2, 3]


def test_a_resumed_run_continues_the_file(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.jsonl"
    tiny_trainer(tmp_path, [MemoryTelemetryCallback(path)], save_strategy="steps", save_steps=2).train()
    resumed = tiny_trainer(tmp_path, [MemoryTelemetryCallback(path)])
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    lines = read_lines(path)
    steps = [line["num_steps_done"] for line in lines if line["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 3, 4]
    assert [line["num_steps_done"] for line in lines if line["kind"] == "environment"] == [0, 2]
    assert lines[0]["kind"] == "environment"


def test_accumulation_makes_one_record_of_all_its_micro_batches(tmp_path: Path) -> None:
    callback = MemoryTelemetryCallback()
    tiny_trainer(tmp_path, [callback], gradient_accumulation_steps=3).train()
    assert [record.num_tokens for record in callback.records] == [3 * NUM_TOKENS_PER_BATCH] * 4


def test_evaluation_and_saving_are_not_step_time_nor_step_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))

    class Work(TrainerCallback):
        """A step takes 1 s, each evaluated batch 100 s, a save 1000 s; it stands before the telemetry."""

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            clock.now_s += 1

        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            clock.now_s += 100

        def on_save(self, *args: Any, **kwargs: Any) -> None:
            clock.now_s += 1000

    callback = MemoryTelemetryCallback()
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    tiny_trainer(tmp_path, [Work(), callback], eval_on_start=True, **options).train()
    assert [record.step_s for record in callback.records] == [1.0, 1.0, 1.0, 1.0]
    assert [record.num_tokens for record in callback.records] == [NUM_TOKENS_PER_BATCH] * 4
    assert [record.elapsed_s for record in callback.records] == [201.0, 402.0, 1603.0, 1804.0]


def test_time_between_two_steps_belongs_to_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))

    def load_data(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        clock.now_s += 1
        return {key: torch.stack([row[key] for row in batch]) for key in batch[0]}

    callback = MemoryTelemetryCallback()
    trainer = tiny_trainer(tmp_path, [callback])
    trainer.data_collator = load_data
    trainer.train()
    assert sum(record.step_s for record in callback.records[1:]) >= 3


def test_the_tokens_of_trainer_are_taken_where_the_hook_sees_none(tmp_path: Path) -> None:
    class EmbeddingTrainer(Trainer):
        """Calls the model without token ids, as a multimodal one may be."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            embeddings = model.get_input_embeddings()(inputs["input_ids"])
            return model(inputs_embeds=embeddings, labels=inputs["labels"]).loss

    for is_counted, num_tokens in ((True, NUM_TOKENS_PER_BATCH), (False, None)):
        callback = MemoryTelemetryCallback()
        source = tiny_trainer(tmp_path, [], include_num_input_tokens_seen=is_counted)
        trainer = EmbeddingTrainer(
            model=tiny_model(), args=source.args, train_dataset=tiny_dataset(), callbacks=[callback]
        )
        trainer.train()
        assert [record.num_tokens for record in callback.records] == [num_tokens] * 4


class LogProbe(TrainerCallback):
    """Keeps what a logging integration would see."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_attach_stands_first_so_that_integrations_see_the_figures(tmp_path: Path, meter: FakeMeter) -> None:
    probe = LogProbe()
    trainer = tiny_trainer(tmp_path, [probe])
    callback = MemoryTelemetryCallback.attach(trainer, warn_fraction=0.5)
    assert trainer.callback_handler.callbacks[0] is callback
    trainer.train()
    first, second, last = probe.logs
    for log in (first, second):
        assert log["vram_allocated_peak_gib"] == 4.0
        assert log["vram_reserved_peak_gib"] == 5.0
        assert log["vram_reserved_minus_allocated_gib"] == 1.0
        assert log["vram_process_peak_gib"] == 6.0
        assert log["num_alloc_retries"] == 0
        assert log["step_s"] > 0
        assert log["tokens_per_s"] > 0
        assert log["ram_private_peak_gib"] > 0
        assert "h2d_per_step_gib" not in log
    assert last["run_vram_allocated_peak_gib"] == 4.0
    assert "train_loss" in last


def test_a_plain_callback_reaches_the_log_history(tmp_path: Path) -> None:
    probe = LogProbe()
    trainer = tiny_trainer(tmp_path, [probe, MemoryTelemetryCallback()])
    trainer.train()
    assert all("step_s" not in log for log in probe.logs)  # the probe stood before it
    with_loss = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in with_loss] == [2, 4]
    for log in with_loss:
        assert log["step_s"] > 0
        assert log["ram_rss_peak_gib"] > 0
        assert "vram_allocated_peak_gib" not in log
    assert "run_ram_rss_peak_gib" in trainer.state.log_history[-1]
    json.dumps(trainer.state.log_history)


def test_a_second_callback_on_one_trainer_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [MemoryTelemetryCallback()])
    with pytest.raises(ValueError, match="already has a MemoryTelemetryCallback"):
        MemoryTelemetryCallback.attach(trainer)
    trainer.remove_callback(MemoryTelemetryCallback)
    MemoryTelemetryCallback.attach(trainer)


def test_the_console_line_names_step_loss_and_ram(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer(tmp_path, [MemoryTelemetryCallback()])
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Step ")]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(lines) == 2
    for line, num_steps, loss in zip(lines, (2, 4), losses, strict=True):
        assert re.fullmatch(rf"Step {num_steps}/4 \| Loss: {loss:.4f} \| RAM: \d+\.\d\d GiB", line)


def test_the_console_line_names_vram_on_a_card(
    tmp_path: Path, meter: FakeMeter, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_trainer(tmp_path, [MemoryTelemetryCallback()]).train()
    assert re.search(r"^Step 4/4 \| Loss: \d\.\d{4} \| VRAM: 4\.00 GiB$", capsys.readouterr().out, re.MULTILINE)


def test_the_console_line_stands_clear_of_the_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(tmp_path, [MemoryTelemetryCallback()], disable_tqdm=False).train()
    assert re.search(r"^Step 4/4 \| Loss: .* GiB$", capsys.readouterr().out, re.MULTILINE)


def test_the_console_can_be_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(tmp_path, [MemoryTelemetryCallback(console=False)]).train()
    assert "Step " not in capsys.readouterr().out


def test_another_process_than_the_main_one_prints_nothing_and_writes_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Trainer, "is_world_process_zero", lambda self: False)
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    callback = MemoryTelemetryCallback(tmp_path / "telemetry.jsonl")
    tiny_trainer(tmp_path, [callback]).train()
    assert "Step " not in capsys.readouterr().out
    assert not (tmp_path / "telemetry.jsonl").exists()
    environment, *lines = read_lines(tmp_path / "telemetry.rank1.jsonl")
    assert (environment["process_rank_unitless"], environment["num_processes"]) == (1, 2)
    assert environment["numa_node_unitless"] is None
    assert sum(line["kind"] == "step" for line in lines) == len(callback.records) == 4


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_warning_comes_once_per_crossing(tmp_path: Path, meter: FakeMeter, caplog: pytest.LogCaptureFixture) -> None:
    process_bytes = {1: 15 * GIB, 2: 15 * GIB, 3: 8 * GIB, 4: 15 * GIB, 5: 15 * GIB, 6: 8 * GIB}
    callback = MemoryTelemetryCallback(sample_interval_s=60)
    use = AtStep(lambda num_step: setattr(meter, "process_bytes", process_bytes[num_step]))
    with caplog.at_level(logging.WARNING, "hf_lema"):
        tiny_trainer(tmp_path, [use, callback], max_steps=6).train()
    first, second = warnings_of(caplog)
    assert first == second
    assert "15.00 GiB of 16.00 GiB (94 %)" in first
    assert "threshold of 90 %" in first


def test_the_warning_threshold_can_be_set(tmp_path: Path, meter: FakeMeter, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_lema"):
        tiny_trainer(tmp_path, [MemoryTelemetryCallback()]).train()
        assert warnings_of(caplog) == []
        tiny_trainer(tmp_path, [MemoryTelemetryCallback(warn_fraction=0.3)]).train()
    (message,) = warnings_of(caplog)
    assert "6.00 GiB of 16.00 GiB (38 %)" in message


def test_the_warning_respects_the_process_fraction_and_a_given_limit(
    tmp_path: Path, meter: FakeMeter, caplog: pytest.LogCaptureFixture
) -> None:
    meter.limit_bytes = 5 * GIB  # what set_per_process_memory_fraction leaves to the allocator
    with caplog.at_level(logging.WARNING, "hf_lema"):
        tiny_trainer(tmp_path, [MemoryTelemetryCallback()]).train()
    assert "5.00 GiB of 5.00 GiB (100 %)" in warnings_of(caplog)[0]
    caplog.clear()
    meter.limit_bytes = 16 * GIB
    with caplog.at_level(logging.WARNING, "hf_lema"):
        tiny_trainer(tmp_path, [MemoryTelemetryCallback(vram_limit_bytes=int(6.5 * GIB))]).train()
    assert "6.00 GiB of 6.50 GiB (92 %)" in warnings_of(caplog)[0]


def test_allocator_retries_are_counted_per_step(tmp_path: Path, meter: FakeMeter) -> None:
    meter.num_alloc_retries = 7  # before training
    callback = MemoryTelemetryCallback()
    use = AtStep(lambda num_step: setattr(meter, "num_alloc_retries", 7 + (num_step >= 2) + 2 * (num_step >= 4)))
    tiny_trainer(tmp_path, [use, callback]).train()
    assert [record.num_alloc_retries for record in callback.records] == [0, 1, 0, 2]
    assert [record.num_ooms for record in callback.records] == [0, 0, 0, 0]


def test_a_peak_before_training_or_in_evaluation_is_the_runs_and_no_steps(tmp_path: Path, meter: FakeMeter) -> None:
    class Spikes(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.spike_bytes = 7 * GIB if state.global_step == 2 else 0

    callback = MemoryTelemetryCallback()
    trainer = tiny_trainer(tmp_path, [Spikes(), callback], eval_strategy="steps", eval_steps=2)
    meter.spike_bytes = 6 * GIB
    trainer.train()
    assert [record.vram_reserved_peak_bytes for record in callback.records] == [5 * GIB] * 4
    assert callback.peak is not None
    assert callback.peak.vram_reserved_peak_bytes == 7 * GIB


def test_what_is_asked_of_the_model_outside_training_is_no_step_token(tmp_path: Path) -> None:
    def ask(num_step: int) -> None:
        model = trainer.model.eval()
        model(input_ids=torch.ones(3, 8, dtype=torch.long))
        model.train()

    callback = MemoryTelemetryCallback()
    trainer = tiny_trainer(tmp_path, [AtStep(ask), callback])
    trainer.train()
    assert [record.num_tokens for record in callback.records] == [NUM_TOKENS_PER_BATCH] * 4


def test_a_streamed_model_adds_what_its_steps_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeStreamer:
        num_calls = 10

        def stats(self) -> StreamerStats:
            n = self.num_calls
            return StreamerStats(
                num_hits=3 * n, num_demand_loads=n, wait_s=0.5 * n, disk_bytes=5 * n, h2d_bytes=GIB * n
            )

    streamer = FakeStreamer()
    monkeypatch.setattr(telemetry, "find_streamer", lambda model: streamer)
    callback = MemoryTelemetryCallback(tmp_path / "telemetry.jsonl")

    class Move(TrainerCallback):
        """Training moves once a micro-batch, an evaluated batch moves too."""

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            streamer.num_calls += 2

        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            streamer.num_calls += 100

    trainer = tiny_trainer(tmp_path, [Move(), callback], eval_strategy="steps", eval_steps=1)
    trainer.train()
    for record in callback.records:
        assert (record.num_hits, record.num_demand_loads, record.wait_s) == (6, 2, 1.0)
        assert (record.disk_bytes, record.h2d_bytes) == (10, 2 * GIB)
        assert record.bus_bytes_per_s == pytest.approx(2 * GIB / record.step_s)
    with_loss = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in with_loss] == [2, 4]
    for log in with_loss:  # each tells the two steps since the log before
        assert (log["h2d_per_step_gib"], log["wait_per_step_s"], log["num_demand_loads"]) == (2.0, 1.0, 4)
    assert read_lines(tmp_path / "telemetry.jsonl")[0]["is_streamed"] is True


def test_what_a_wrapped_model_moves_is_told_step_by_step(
    tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    model = LemaModelWrapper.wrap(tiny_llama(num_layers=5), LemaConfig(vram_budget="min"), "cpu")
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    callback = MemoryTelemetryCallback(tmp_path / "telemetry.jsonl")
    trainer = Trainer(
        model=get_peft_model(model, adapter),
        args=tiny_trainer(tmp_path, []).args,
        train_dataset=tiny_dataset(),
        callbacks=[callback],
    )
    streamer = get_streamer(model)
    try:
        before = streamer.stats()
        trainer.train()
        after = streamer.stats()
    finally:
        streamer.close()
    moved_bytes = [record.h2d_bytes for record in callback.records]
    assert all(num_bytes is not None and num_bytes >= 5 * streamer.layer_bytes for num_bytes in moved_bytes)
    # What was asked for ahead of a step that did not come belongs to no step.
    ahead_bytes = after.h2d_bytes - before.h2d_bytes - sum(moved_bytes)  # type: ignore[arg-type]
    assert 0 <= ahead_bytes <= 2 * streamer.layer_bytes
    assert [record.num_hits + record.num_demand_loads for record in callback.records] == [10] * 4  # type: ignore[operator]


def test_ram_is_given_raw_and_above_the_baseline(tmp_path: Path) -> None:
    baseline = read_process_memory()
    ballast = torch.ones(64 * MIB, dtype=torch.uint8)
    callback = MemoryTelemetryCallback(ram_baseline=baseline)
    tiny_trainer(tmp_path, [callback]).train()
    for record in callback.records:
        above_bytes = record.ram_private_above_baseline_peak_bytes
        assert above_bytes == record.ram_private_peak_bytes - baseline.private_bytes  # type: ignore[operator]
        assert above_bytes > 56 * MIB  # type: ignore[operator]
    del ballast


def test_training_that_fails_leaves_its_peak_and_no_thread(tmp_path: Path) -> None:
    def fail(num_step: int) -> None:
        if num_step == 3:
            raise torch.OutOfMemoryError("no room")

    trainer = tiny_trainer(tmp_path, [AtStep(fail)])
    with MemoryTelemetryCallback.attach(trainer) as callback, pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert sampler_threads() == []
    assert len(trainer.model._forward_pre_hooks) == 0
    assert len(callback.records) == 2
    assert callback.peak is not None
    callback.close()


def test_a_trainer_can_train_again_after_a_failure(tmp_path: Path) -> None:
    fails = [True]

    def fail_once(num_step: int) -> None:
        if num_step == 3 and fails.pop():
            raise RuntimeError("once")

    callback = MemoryTelemetryCallback()
    trainer = tiny_trainer(tmp_path, [AtStep(fail_once), callback])
    with pytest.raises(RuntimeError, match="once"):
        trainer.train()
    fails.append(False)
    trainer.train()
    assert [record.num_tokens for record in callback.records] == [NUM_TOKENS_PER_BATCH] * 4
    assert len(trainer.model._forward_pre_hooks) == 0
    assert sampler_threads() == []


def test_evaluation_without_training_measures_nothing(tmp_path: Path) -> None:
    callback = MemoryTelemetryCallback(tmp_path / "telemetry.jsonl")
    trainer = tiny_trainer(tmp_path, [callback])
    trainer.evaluate()
    trainer.predict(tiny_dataset()[:2])
    assert callback.records == []
    assert callback.peak is None
    assert not (tmp_path / "telemetry.jsonl").exists()


def test_a_model_in_training_can_be_copied(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [])
    copies: list[Any] = []
    trainer.add_callback(AtStep(lambda num_step: copies.append(copy.deepcopy(trainer.model))))
    MemoryTelemetryCallback.attach(trainer)
    trainer.train()
    assert len(copies) == 4


@pytest.mark.parametrize(
    ("options", "name"),
    [({"warn_fraction": 0}, "warn_fraction"), ({"warn_fraction": 90}, "warn_fraction"),
     ({"sample_interval_s": 0}, "sample_interval_s")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        MemoryTelemetryCallback(**options)


def test_a_loss_that_is_no_number_is_logged_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class NanTrainer(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.nan

    source = tiny_trainer(tmp_path, [], logging_nan_inf_filter=False)
    callback = MemoryTelemetryCallback(tmp_path / "telemetry.jsonl")
    NanTrainer(model=tiny_model(), args=source.args, train_dataset=tiny_dataset(), callbacks=[callback]).train()
    assert "Loss: nan" in capsys.readouterr().out
    losses = [line["loss_unitless"] for line in read_lines(tmp_path / "telemetry.jsonl") if line["kind"] == "log"]
    assert losses == ["nan", "nan"]
    assert all(math.isnan(float(loss)) for loss in losses)


@pytest.mark.gpu
def test_on_a_card_the_peaks_are_the_allocators_own(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    real = vram_meter.VramMeter(device)
    real.take_allocator_peak()
    base_bytes = torch.cuda.memory_allocated(device)
    tensor = torch.empty(256 * MIB, dtype=torch.uint8, device=device)
    del tensor
    peak = real.take_allocator_peak()
    assert peak.allocated_bytes == base_bytes + 256 * MIB
    assert real.take_allocator_peak().allocated_bytes == base_bytes
    assert 256 * MIB <= peak.reserved_bytes <= real.read_bytes() <= real.total_bytes
    callback = MemoryTelemetryCallback(tmp_path / "telemetry.jsonl")
    tiny_trainer(tmp_path, [callback], use_cpu=False).train()
    for record in callback.records:
        assert 0 < record.vram_allocated_peak_bytes <= record.vram_reserved_peak_bytes  # type: ignore[operator]
        assert record.vram_reserved_peak_bytes <= record.vram_process_peak_bytes  # type: ignore[operator]
    first = read_lines(tmp_path / "telemetry.jsonl")[0]
    assert first["vram_process_source"] in ("nvml_process", "mem_get_info_device")
    assert first["gpu_name"]
    assert first["driver_version"]
