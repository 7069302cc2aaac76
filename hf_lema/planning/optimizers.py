"""What an optimizer of ``TrainingArguments(optim=...)`` keeps for each trainable tensor.

Responsibility: bytes of optimizer state, by where they are. Makes no optimizer.

Sources: torch's AdamW keeps two moments in the parameter's dtype and, fused, a step counter on the device. bitsandbytes
(``optim/optimizer.py``, ``Optimizer2State.init_state``) keeps two moments in float32, or two of 8 bits with one float32
scale for every 256 numbers each, where a tensor has 4,096 numbers or more; the paged kinds put moments of 100,000
numbers or more into memory that CUDA moves between RAM and the card as it is touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_lema.planning.meter import allocated_bytes

FUSED = "adamw_torch_fused"
"""Trainer's own choice where nothing is said."""

OPTIMIZERS = (FUSED, "adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
"""Names as in ``TrainingArguments``."""

_BLOCK_SIZE = 256
_MIN_8BIT_NUMEL = 4096
_MIN_PAGED_NUMEL = 100_000
_CODE_TABLES_BYTES = 2 * 256 * 4
"""What the 8-bit codes stand for, once for all tensors."""


@dataclass(frozen=True, kw_only=True)
class OptimizerBytes:
    """Where an optimizer's state is.

    Attributes:
        vram_bytes: In the device's allocator.
        paged_bytes: In memory that CUDA moves: in RAM while the card is full.
    """

    vram_bytes: int
    paged_bytes: int = 0


def optimizer_bytes(optim: str, tensors: Iterable[tuple[int, int]]) -> OptimizerBytes:
    """State for trainable tensors, as a CUDA device's allocator counts it.

    Args:
        optim: One of `OPTIMIZERS`.
        tensors: (numbers, bytes of a number) of each trainable tensor.

    Raises:
        ValueError: Another optimizer.
    """
    if optim not in OPTIMIZERS:
        raise ValueError(f"optim is {optim!r}, expected one of {', '.join(OPTIMIZERS)}")
    if optim in (FUSED, "adamw_torch"):
        step_bytes = allocated_bytes(4) if optim == FUSED else 0  # unfused, the counter is on the host
        return OptimizerBytes(vram_bytes=sum(2 * allocated_bytes(n * size) + step_bytes for n, size in tensors))
    is_8bit, is_paged = optim.endswith("8bit"), optim.startswith("paged")
    vram_bytes, paged_bytes = 2 * allocated_bytes(_CODE_TABLES_BYTES // 2) if is_8bit else 0, 0
    for numel, _ in tensors:
        is_packed = is_8bit and numel >= _MIN_8BIT_NUMEL
        moment_bytes = numel if is_packed else 4 * numel
        if is_paged and numel >= _MIN_PAGED_NUMEL:
            paged_bytes += 2 * moment_bytes
        else:
            vram_bytes += 2 * allocated_bytes(moment_bytes)
        if is_packed:
            vram_bytes += 2 * allocated_bytes(4 * -(-numel // _BLOCK_SIZE))
    return OptimizerBytes(vram_bytes=vram_bytes, paged_bytes=paged_bytes)
