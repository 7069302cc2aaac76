"""Packing a linear's weight to 4 bits with bitsandbytes, and lending it packed to bitsandbytes' own linear.

Responsibility: `PackedMatrix` to and from ``Params4bit`` and ``QuantState``. Imports bitsandbytes: whoever needs this
module imports it when there is something packed. Knows nothing of files, transformers, or the order of layers.

Note [packed views]: the packed bytes of a slot and their statistics are one ``Params4bit`` and one ``QuantState`` per
slot and layout, views of the slot's memory, and are lent as objects. Autograd's version counters do not guard them:
bitsandbytes keeps the weight and the state of a forward outside autograd's saved tensors. So each visit gets a state of
its own that knows which fill of the slot it belongs to, and that refuses to be read after the next one began: a graph
that outlives its visit raises instead of computing with another layer's weights. The check compares two integers of the
host where bitsandbytes reads the absmax, in every forward and backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from bitsandbytes import functional
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn

from hf_lema.files.layout import NESTED_BLOCK_VALUES, LayerLayout, PackedMatrix

PIECE_VALUES = {"cpu": 2**16, "cuda": 2**24}
"""Values that are packed at a time, whole blocks. On a CPU bitsandbytes 0.50 takes some 20 bytes a value meanwhile."""


class Refilled(Protocol):
    """What a lent state asks of the buffer that it lies in."""

    generation: int


@functools.cache
def code_table(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values that the 4-bit codes stand for: float32, one tensor per device."""
    table: torch.Tensor = functional.get_4bit_type(quant_type, device=device)
    return table


@functools.cache
def nested_code_table(device: torch.device) -> torch.Tensor:
    """The 256 values that the 8-bit codes of absmax values stand for: float32, one tensor per device."""
    table: torch.Tensor = functional.create_dynamic_map().to(device)
    return table


def quantize(
    matrix: PackedMatrix,
    values: torch.Tensor,
    out: Mapping[str, torch.Tensor],
    device: torch.device,
    cast: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Packs a weight on the device, in pieces of whole blocks; the result is that of ``quantize_4bit`` on all of it.

    Args:
        matrix: What it is to become.
        values: Any floating dtype and device, ``matrix.shape``.
        out: Where the parts go, by name; any device.
        device: Where it is packed.
        cast: Turns a piece on the device into ``matrix.dtype``; a plain cast if None.
    """
    flat = values.reshape(-1)
    packed = out[matrix.name].view(-1)
    absmax = torch.empty(-(-flat.numel() // matrix.block_values), dtype=torch.float32, device=device)
    piece_values = PIECE_VALUES[device.type]
    for begin in range(0, flat.numel(), piece_values):
        piece = flat[begin : begin + piece_values].to(device)
        piece = piece.to(matrix.dtype) if cast is None else cast(piece)
        codes, state = functional.quantize_4bit(piece, blocksize=matrix.block_values, quant_type=matrix.quant_type)
        packed[begin // 2 : begin // 2 + codes.numel()].copy_(codes.view(-1))
        first_block = begin // matrix.block_values
        absmax[first_block : first_block + state.absmax.numel()] = state.absmax
    if not matrix.is_nested:
        out[matrix.absmax].copy_(absmax)
        return
    offset = absmax.mean()
    nested_codes, nested = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_VALUES)
    out[matrix.absmax].copy_(nested_codes)
    out[matrix.nested_absmax].copy_(nested.absmax)
    out[matrix.nested_offset].copy_(offset)


def state_over(matrix: PackedMatrix, parts: Mapping[str, torch.Tensor], *, own_tables: bool = False) -> QuantState:
    """A state that reads the parts where they lie.

    Args:
        matrix: What they are the parts of.
        parts: Tensors by name, all on one device.
        own_tables: Whether the state gets tables of its own: ``save_pretrained`` takes tensors that several states
            share for tied weights.
    """
    device = parts[matrix.absmax].device
    code = code_table(matrix.quant_type, device)
    nested = None
    if matrix.is_nested:
        nested_code = nested_code_table(device)
        nested = QuantState(
            absmax=parts[matrix.nested_absmax],
            code=nested_code.clone() if own_tables else nested_code,
            blocksize=NESTED_BLOCK_VALUES,
            dtype=torch.float32,
        )
    return QuantState(
        absmax=parts[matrix.absmax],
        shape=torch.Size(matrix.shape),
        code=code.clone() if own_tables else code,
        blocksize=matrix.block_values,
        quant_type=matrix.quant_type,
        dtype=matrix.dtype,
        offset=parts[matrix.nested_offset] if matrix.is_nested else None,
        state2=nested,
    )


def parameter_over(
    matrix: PackedMatrix,
    parts: Mapping[str, torch.Tensor],
    module: Linear4bit | None = None,
    *,
    own_tables: bool = False,
) -> Params4bit:
    """A parameter that is packed already, over the parts where they lie: no move packs it again."""
    return Params4bit(
        parts[matrix.name],
        requires_grad=False,
        quant_state=state_over(matrix, parts, own_tables=own_tables),
        blocksize=matrix.block_values,
        compress_statistics=matrix.is_nested,
        quant_type=matrix.quant_type,
        quant_storage=torch.uint8,
        module=module,
        bnb_quantized=True,
    )


def register_packed(matrix: PackedMatrix, parts: Mapping[str, torch.Tensor], module: Any) -> None:
    """Registers the parts as the weight of a ``Linear4bit`` at rest."""
    parameter = parameter_over(matrix, parts, module, own_tables=True)
    module._parameters["weight"] = parameter
    module.quant_state = parameter.quant_state
    # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a weight at its first forward in eval mode, for good, and then
    # computes past autograd. Versions before 0.50 do not look at the flag.
    module.support_avx512bf16_for_cpu = False


def matrix_of(name: str, parameter: Params4bit) -> PackedMatrix:
    """What a packed parameter consists of.

    Args:
        name: The matrix's name.
        parameter: A ``Params4bit`` that has been packed.

    Raises:
        ValueError: It has not been packed yet, has been repacked for a CPU, or has tables or blocks of its own.
    """
    state = parameter.quant_state
    if state is None:
        raise ValueError(f"{name} is to be packed to 4 bits but has not been: move the model to its device first")
    if state.__dict__.get("packing_format_for_cpu", False):
        raise ValueError(
            f"{name} was repacked by bitsandbytes for inference on this CPU and has lost precision: load the model "
            "again and wrap it before its first evaluation"
        )
    device = state.absmax.device
    nested_values = state.state2.blocksize if state.nested else NESTED_BLOCK_VALUES
    has_own_table = not torch.equal(state.code, code_table(state.quant_type, device)) or (
        state.nested and not torch.equal(state.state2.code, nested_code_table(device))
    )
    if has_own_table or nested_values != NESTED_BLOCK_VALUES:
        raise ValueError(
            f"{name} is packed with a code table of its own, or absmax blocks of {nested_values} values where "
            f"{NESTED_BLOCK_VALUES} were expected: pack the full-precision model with the installed bitsandbytes"
        )
    return PackedMatrix(
        name=name,
        shape=tuple(state.shape),
        dtype=state.dtype,
        is_nested=state.nested,
        quant_type=state.quant_type,
        block_values=state.blocksize,
    )


def parts_of(matrix: PackedMatrix, parameter: Params4bit) -> dict[str, torch.Tensor]:
    """The tensors of a packed parameter by name, where they lie now."""
    state = parameter.quant_state
    parts = {matrix.name: parameter.data.view(-1).view(torch.uint8).view(-1, 1), matrix.absmax: state.absmax}
    if matrix.is_nested:
        parts |= {matrix.nested_absmax: state.state2.absmax, matrix.nested_offset: state.offset}
    return parts


def store(matrix: PackedMatrix, parameter: Params4bit, out: Mapping[str, torch.Tensor]) -> None:
    """Copies a packed parameter's tensors and has it rest on the copies; nothing is packed again.

    Raises:
        ValueError: It is packed in another way than the matrix. Its dtype alone may differ: bitsandbytes unpacks in
            float32 and rounds once, so the values are the same.
    """
    found = matrix_of(matrix.name, parameter)
    if found.tensors() != matrix.tensors() or (found.shape, found.quant_type) != (matrix.shape, matrix.quant_type):
        raise ValueError(f"{matrix.name} was replaced by {found}, expected {matrix}")
    for name, part in parts_of(matrix, parameter).items():
        out[name].copy_(part)
    rest_on(matrix, parameter, out)


def rest_on(matrix: PackedMatrix, parameter: Params4bit, parts: Mapping[str, torch.Tensor]) -> None:
    """Has a packed parameter, and the module that it knows, read the parts from now on."""
    parameter.data = parts[matrix.name]
    parameter.quant_state = state_over(matrix, parts, own_tables=True)
    if parameter.module is not None:
        parameter.module.quant_state = parameter.quant_state


def copied(matrix: PackedMatrix, parameter: Params4bit, device: torch.device) -> dict[str, torch.Tensor]:
    """Copies of a packed parameter's tensors on a device."""
    return {name: part.to(device, copy=True) for name, part in parts_of(matrix, parameter).items()}


class LentState(QuantState):
    """A slot's state for one visit; see Note [packed views]."""

    def __init__(self, state: QuantState, name: str, slot: Refilled) -> None:
        self.__dict__.update(state.__dict__)
        self._name = name
        self._slot = slot
        self._generation = slot.generation

    @property
    def absmax(self) -> Any:
        """The absmax of each block.

        Raises:
            RuntimeError: The slot has been filled anew since the visit.
        """
        if self._slot.generation != self._generation:
            raise RuntimeError(
                f"{self._name}: the 4-bit weights of a visit were asked for after their slot was filled anew (fill "
                f"{self._slot.generation}, expected {self._generation}): a graph from inside a streamed layer was kept "
                "beyond its visit. Take gradients through the layer's outputs"
            )
        return self.__dict__["absmax"]

    @absmax.setter
    def absmax(self, value: torch.Tensor) -> None:
        self.__dict__["absmax"] = value


class LentMatrices:
    """The packed matrices of one slot and layout; see Note [packed views].

    Args:
        layout: The layout.
        views: Its tensors as parameters over the slot.
        slot: Counts its fills.
    """

    def __init__(self, layout: LayerLayout, views: Mapping[str, nn.Parameter], slot: Refilled) -> None:
        self._slot = slot
        self._lent: dict[str, nn.Parameter] = dict(views)
        self._packed: list[tuple[str, Params4bit, QuantState]] = []
        for matrix in layout.packed:
            parameter = parameter_over(matrix, {name: views[name].data for name in matrix.tensors()})
            self._packed.append((matrix.name, parameter, parameter.quant_state))
            self._lent[matrix.name] = parameter

    def lend(self) -> dict[str, nn.Parameter]:
        """The layer's tensors for one visit, the packed ones bound to the fill that is in the slot now."""
        for name, parameter, state in self._packed:
            parameter.quant_state = LentState(state, name, self._slot)
        return self._lent
