"""Where every tensor of a decoder layer lies inside that layer's buffer.

Responsibility: offsets, alignment and typed views. Pure arithmetic over names, shapes and torch dtypes. Knows nothing
of files, devices, threads or transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT: int = 256
"""Bytes. Every tensor starts, and every layer ends, at a multiple of it: what CUDA's own allocator guarantees, and
more than any kernel's vector loads ask for."""


def align_up(num_bytes: int, alignment: int = ALIGNMENT) -> int:
    """Round bytes up to the next multiple of ``alignment``."""
    return -(-num_bytes // alignment) * alignment


def tensor_nbytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a dense tensor of this shape and dtype."""
    return math.prod(shape) * dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor inside its layer's buffer.

    Attributes:
        name: Name relative to the layer, such as ``self_attn.q_proj.weight``.
        shape: Sizes of its dimensions.
        dtype: Type of its elements.
        offset_bytes: Distance from the start of the layer's buffer, a multiple of ``ALIGNMENT``.
        nbytes: Bytes of its elements, without padding.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """Every tensor of one decoder layer, and the size of the buffer that holds them.

    Attributes:
        layer_idx: Position of the layer in the model, from 0.
        tensors: In the order of their offsets.
        nbytes: Bytes of the buffer with all padding, a multiple of ``ALIGNMENT``.
    """

    layer_idx: int
    tensors: tuple[TensorSpec, ...]
    nbytes: int

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Look at a buffer as this layer's tensors.

        Args:
            buffer: 1-D, contiguous, uint8, of any device, at least ``nbytes`` long; the layer begins at its first byte.

        Returns:
            Name relative to the layer -> view of the buffer's memory with the true shape and dtype. Nothing is copied.

        Raises:
            ValueError: The buffer is not 1-D contiguous uint8, is too short, or starts inside its storage at an offset
                that is no multiple of ``ALIGNMENT``.
        """
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
            raise ValueError(
                f"layer {self.layer_idx}: the buffer must be 1-D contiguous torch.uint8, got {buffer.dtype} of shape "
                f"{tuple(buffer.shape)} and stride {buffer.stride()}"
            )
        if buffer.numel() < self.nbytes:
            raise ValueError(
                f"layer {self.layer_idx}: the buffer has {buffer.numel()} bytes, the layer needs {self.nbytes}"
            )
        if buffer.storage_offset() % ALIGNMENT:
            raise ValueError(
                f"layer {self.layer_idx}: the buffer starts at byte {buffer.storage_offset()} of its storage, expected "
                f"a multiple of {ALIGNMENT}"
            )
        return {
            spec.name: buffer[spec.offset_bytes : spec.offset_bytes + spec.nbytes].view(spec.dtype).view(spec.shape)
            for spec in self.tensors
        }


def make_layout(layer_idx: int, tensors: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> LayerLayout:
    """Lay tensors out one after another, each at a multiple of ``ALIGNMENT``.

    Args:
        layer_idx: Position of the layer in the model, from 0.
        tensors: Name relative to the layer -> (shape, dtype), in the order in which they are to lie.

    Returns:
        The layout; its ``nbytes`` is rounded up to ``ALIGNMENT``.

    Raises:
        ValueError: The index is negative, or a shape has a negative size.
    """
    if layer_idx < 0:
        raise ValueError(f"layer_idx must be at least 0, got {layer_idx}")
    wrong = {name: tuple(shape) for name, (shape, _) in tensors.items() if any(size < 0 for size in shape)}
    if wrong:
        raise ValueError(f"layer {layer_idx}: shapes with a negative size: {wrong}")
    specs: list[TensorSpec] = []
    end_bytes = 0
    for name, (shape, dtype) in tensors.items():
        nbytes = tensor_nbytes(shape, dtype)
        specs.append(TensorSpec(name=name, shape=tuple(shape), dtype=dtype, offset_bytes=end_bytes, nbytes=nbytes))
        end_bytes = align_up(end_bytes + nbytes)
    return LayerLayout(layer_idx=layer_idx, tensors=tuple(specs), nbytes=end_bytes)
