"""Where every tensor of a decoder layer lies inside that layer's buffer.

Responsibility: offsets, alignment and typed views; what a matrix packed to 4 bits consists of. Pure arithmetic over
names, shapes and torch dtypes. Knows nothing of files, devices, threads or transformers.
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


BLOCK_VALUES: int = 64
"""Values that share one absmax: bitsandbytes' default, and what transformers always asks of it."""

BLOCK_SIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Values that can share one absmax; bitsandbytes has kernels for these."""

QUANT_TYPES: tuple[str, ...] = ("nf4", "fp4")

NESTED_BLOCK_VALUES: int = 256
"""Absmax values that share one scale under double quantization. bitsandbytes' kernels know no other."""


@dataclass(frozen=True, kw_only=True)
class PackedMatrix:
    """A linear's weight in 4 bits a value, as `bitsandbytes.functional.quantize_4bit` packs it.

    In its layer it is several plain tensors: the packed bytes under its own name, and its statistics under names that
    begin with it, those that bitsandbytes saves them by.

    Attributes:
        name: Name of the packed bytes relative to the layer, such as ``self_attn.q_proj.weight``.
        shape: (out_features, in_features).
        dtype: Type of the values that were packed, and of those that unpacking gives.
        is_nested: Whether the absmax values are packed to 8 bits themselves (double quantization).
        quant_type: ``"nf4"`` or ``"fp4"``.
        block_values: Values that share one absmax.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    is_nested: bool
    quant_type: str = "nf4"
    block_values: int = BLOCK_VALUES

    @property
    def absmax(self) -> str:
        """Name of the absmax of each block: uint8 if nested, else float32."""
        return f"{self.name}.absmax"

    @property
    def nested_absmax(self) -> str:
        """Name of the float32 scales of blocks of absmax values."""
        return f"{self.name}.nested_absmax"

    @property
    def nested_offset(self) -> str:
        """Name of the mean that was taken from the absmax values: float32, no dimension."""
        return f"{self.name}.nested_offset"

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of what it consists of, in the order in which it lies in the layer."""
        num_values = math.prod(self.shape)
        num_blocks = -(-num_values // self.block_values)
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {self.name: ((-(-num_values // 2), 1), torch.uint8)}
        if not self.is_nested:
            return found | {self.absmax: ((num_blocks,), torch.float32)}
        return found | {
            self.absmax: ((num_blocks,), torch.uint8),
            self.nested_absmax: ((-(-num_blocks // NESTED_BLOCK_VALUES),), torch.float32),
            self.nested_offset: ((), torch.float32),
        }


def packed_linear_bytes(out_features: int, in_features: int, *, double_quantization: bool = True) -> int:
    """Bytes that a linear's weight takes in a layer's buffer once it is packed to NF4, padding included."""
    shape = (out_features, in_features)
    matrix = PackedMatrix(name="weight", shape=shape, dtype=torch.float32, is_nested=double_quantization)
    return sum(align_up(tensor_nbytes(shape, dtype)) for shape, dtype in matrix.tensors().values())


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """Every tensor of one decoder layer, and the size of the buffer that holds them.

    Attributes:
        layer_idx: Position of the layer in the model, from 0.
        tensors: In the order of their offsets.
        nbytes: Bytes of the buffer with all padding, a multiple of ``ALIGNMENT``.
        packed: The matrices that some of the tensors are the parts of.
    """

    layer_idx: int
    tensors: tuple[TensorSpec, ...]
    nbytes: int
    packed: tuple[PackedMatrix, ...] = ()

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


def make_layout(
    layer_idx: int,
    tensors: Mapping[str, tuple[Sequence[int], torch.dtype]],
    packed: Sequence[PackedMatrix] = (),
) -> LayerLayout:
    """Lay tensors out one after another, each at a multiple of ``ALIGNMENT``.

    Args:
        layer_idx: Position of the layer in the model, from 0.
        tensors: Name relative to the layer -> (shape, dtype), in the order in which they are to lie.
        packed: Matrices that are packed to 4 bits; their parts are among the tensors.

    Returns:
        The layout; its ``nbytes`` is rounded up to ``ALIGNMENT``.

    Raises:
        ValueError: The index is negative, a shape has a negative size, or parts of a packed matrix are missing or of
            another shape or dtype.
    """
    if layer_idx < 0:
        raise ValueError(f"layer_idx must be at least 0, got {layer_idx}")
    wrong = {name: tuple(shape) for name, (shape, _) in tensors.items() if any(size < 0 for size in shape)}
    if wrong:
        raise ValueError(f"layer {layer_idx}: shapes with a negative size: {wrong}")
    parts = {name: part for matrix in packed for name, part in matrix.tensors().items()}
    found = {name: (tuple(shape), dtype) for name, (shape, dtype) in tensors.items()}
    if misfits := {name: (found.get(name), part) for name, part in parts.items() if found.get(name) != part}:
        listed = "; ".join(f"{name} is {has}, expected {part}" for name, (has, part) in misfits.items())
        raise ValueError(f"layer {layer_idx}: packed matrices lack parts: {listed}")
    specs: list[TensorSpec] = []
    end_bytes = 0
    for name, (shape, dtype) in tensors.items():
        nbytes = tensor_nbytes(shape, dtype)
        specs.append(TensorSpec(name=name, shape=tuple(shape), dtype=dtype, offset_bytes=end_bytes, nbytes=nbytes))
        end_bytes = align_up(end_bytes + nbytes)
    return LayerLayout(layer_idx=layer_idx, tensors=tuple(specs), nbytes=end_bytes, packed=tuple(packed))
