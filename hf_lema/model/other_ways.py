"""Other ways to spread a model over devices, or to change how it runs, that streaming does not combine with.

Responsibility: seeing that one of them is on, and the line that says what to use instead. Each of them moves, splits or
traces the layers that are streamed, so a model under two of them would hold stale weights, or none. Knows nothing of
stores or layers.
"""

from __future__ import annotations

import os

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, DynamoBackend, model_has_dtensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

_INSTEAD = (
    "Launch with DDP, where all processes stream one shared copy (torchrun, or accelerate launch --multi_gpu), or "
    "train without hf_lema where the split model fits over all GPUs"
)

FSDP_MESSAGE = f"FSDP splits the decoder layers that are streamed here, so the two cannot be combined. {_INSTEAD}"

DEEPSPEED_MESSAGE = (
    "DeepSpeed moves and splits parameters itself (ZeRO-3, offload), so it cannot be combined with streamed layers. "
    f"{_INSTEAD}"
)

TENSOR_PARALLEL_MESSAGE = (
    f"tensor parallelism splits the weights that are streamed here, so the two cannot be combined. {_INSTEAD}"
)

COMPILE_MESSAGE = (
    "torch.compile of the whole model cannot be combined with streaming: the weights of a layer are lent to it for one "
    "visit, which a traced graph would not see. Leave out torch_compile=True, torch.compile(model) and dynamo_backend; "
    "kernels that a layer compiles by itself (flex attention) work"
)

DATA_PARALLEL_MESSAGE = (
    "several GPUs are visible and there is no launcher: Trainer would use torch.nn.DataParallel, which copies the "
    "model to every GPU and cannot stream it. Make one GPU visible (CUDA_VISIBLE_DEVICES=0), or launch one process a "
    "GPU (accelerate launch, torchrun)"
)


def refuse_other_ways(lm: PreTrainedModel | None = None) -> None:
    """Raises where the process, or the model, is set up for something that streaming does not combine with.

    Accelerate says what it will do in its state once an ``Accelerator`` exists, and in the environment before: the
    launcher and ``TrainingArguments`` write it there.

    Args:
        lm: A model that was built elsewhere and may be split already.

    Raises:
        RuntimeError: FSDP, DeepSpeed, tensor parallelism or compilation of the whole model is on.
    """
    state = AcceleratorState() if AcceleratorState._shared_state else None
    distributed_type = None if state is None else state.distributed_type
    if distributed_type == DistributedType.FSDP or _is_on("ACCELERATE_USE_FSDP"):
        raise RuntimeError(FSDP_MESSAGE)
    if (
        distributed_type == DistributedType.DEEPSPEED
        or _is_on("ACCELERATE_USE_DEEPSPEED")
        or is_deepspeed_zero3_enabled()
    ):
        raise RuntimeError(DEEPSPEED_MESSAGE)
    if distributed_type == DistributedType.MEGATRON_LM or _is_on("ACCELERATE_USE_MEGATRON_LM"):
        raise RuntimeError(TENSOR_PARALLEL_MESSAGE)
    if int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", "1")) > 1 or (lm is not None and model_has_dtensor(lm)):
        raise RuntimeError(TENSOR_PARALLEL_MESSAGE)
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no") if state is None else state.dynamo_plugin.backend.value
    if backend.upper() != DynamoBackend.NO.value:
        raise RuntimeError(COMPILE_MESSAGE)


def refuse_data_parallel() -> None:
    """Raises where Trainer is about to use ``torch.nn.DataParallel``.

    Raises:
        RuntimeError: Several GPUs are visible and there is no process group.
    """
    if torch.cuda.device_count() > 1 and not torch.distributed.is_initialized():
        raise RuntimeError(DATA_PARALLEL_MESSAGE)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")
