"""Adapter parameters as they are, when a peer has split, moved or released them: FSDP2, DeepSpeed, TrainStream.

Knows torch, and deepspeed where it is in use. Does not know contenders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."
"""What torch's checkpoint wrapper, FSDP's way to recompute, puts into the names of parameters."""


@contextlib.contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, partitions of DeepSpeed are whole tensors; every process of the group must take part."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]  # DeepSpeed's own mark
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def is_released(parameter: nn.Parameter) -> bool:
    """Whether a parameter has a shape but no memory: its values are elsewhere, and the model's state dict has them."""
    if isinstance(parameter, DTensor) or parameter.numel() == 0:
        return False
    return parameter.untyped_storage().nbytes() == 0


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """The values on the CPU, of all processes together where they are spread over them."""
    value = parameter.detach()
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.to("cpu").contiguous()
