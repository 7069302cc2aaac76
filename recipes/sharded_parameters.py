"""Adapter parameters as they are, when a peer has split or moved them: FSDP2's DTensors, DeepSpeed's partitions.

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


def whole(parameter: nn.Parameter) -> torch.Tensor:
    """The values on the CPU, of all processes together where they are spread over them."""
    value = parameter.detach()
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.to("cpu").contiguous()
