"""Fine-tune models larger than the GPU with the stock Trainer and stock PEFT.

The names below are the public interface. They are imported at first use, so that ``import hf_lema`` loads nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_lema.choices import StepChoices
    from hf_lema.config import LemaConfig
    from hf_lema.export.merging import merge_and_save
    from hf_lema.files.trainer_checkpoints import last_whole_checkpoint
    from hf_lema.measuring.telemetry import MemoryTelemetryCallback
    from hf_lema.planning.memory_plan import MemoryPlan
    from hf_lema.planning.planner import plan_memory
    from hf_lema.runtime.streamer import LayerStreamer, StreamerStats
    from hf_lema.wrapper import LemaModelWrapper, get_streamer

__version__ = "0.1.0.dev0"

_HOMES = {
    "LayerStreamer": "hf_lema.runtime.streamer",
    "LemaConfig": "hf_lema.config",
    "LemaModelWrapper": "hf_lema.wrapper",
    "MemoryPlan": "hf_lema.planning.memory_plan",
    "MemoryTelemetryCallback": "hf_lema.measuring.telemetry",
    "StepChoices": "hf_lema.choices",
    "StreamerStats": "hf_lema.runtime.streamer",
    "get_streamer": "hf_lema.wrapper",
    "last_whole_checkpoint": "hf_lema.files.trainer_checkpoints",
    "merge_and_save": "hf_lema.export.merging",
    "plan_memory": "hf_lema.planning.planner",
}

__all__ = [
    "LayerStreamer",
    "LemaConfig",
    "LemaModelWrapper",
    "MemoryPlan",
    "MemoryTelemetryCallback",
    "StepChoices",
    "StreamerStats",
    "get_streamer",
    "last_whole_checkpoint",
    "merge_and_save",
    "plan_memory",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_lema' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
