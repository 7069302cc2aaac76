"""A checkpoint whose linears bitsandbytes has packed to 4 bits already, as transformers saves it.

Responsibility: finding packed weights and their statistics among the stored tensors, checking that they fit, reading
one as it is. Packs nothing. Knows nothing of models, layers or devices.

Format: a packed weight ``W`` comes with ``W.absmax`` and ``W.quant_map``, under double quantization with
``W.nested_absmax`` and ``W.nested_quant_map``, and with ``W.quant_state.bitsandbytes__nf4`` (or ``fp4``): JSON text in
bytes with shape, dtype, block sizes and the offset of the absmax values. Source: ``QuantState.as_dict(packed=True)``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_lema.files.checkpoint import CheckpointIndex, FileSet, PackedMatrix, TensorLocation
from hf_lema.files.foreign_json import described, listing, parse_json, shown
from hf_lema.files.layout import BLOCK_SIZES, NESTED_BLOCK_VALUES, tensor_nbytes
from hf_lema.files.safetensors_header import dense_nbytes, is_shape

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_MAX_STATE_BYTES = 65536  # bitsandbytes writes some hundred
_MAX_OFFSET = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class StoredMatrix:
    """One packed weight of a checkpoint.

    Attributes:
        matrix: What it consists of; its name is that in the checkpoint.
        locations: Name of each stored part -> where it lies. The offset is in none of them.
        nested_offset: The mean of the absmax values; 0 where they are not nested.
    """

    matrix: PackedMatrix
    locations: Mapping[str, TensorLocation]
    nested_offset: float

    def read_into(self, files: FileSet, matrix: PackedMatrix, out: Mapping[str, torch.Tensor]) -> None:
        """Reads the parts as they are.

        Args:
            files: The checkpoint's files.
            matrix: The same matrix by its name in the layer.
            out: CPU tensors by that name, contiguous.
        """
        for stored, name in zip(self.matrix.tensors(), matrix.tensors(), strict=True):
            if stored in self.locations:
                location = self.locations[stored]
                memory = out[name].view(-1).view(torch.uint8).numpy().data
                files.pread_into(location.path, location.offset_bytes, memory)
            else:
                out[name].fill_(self.nested_offset)


def split_packed(index: CheckpointIndex) -> tuple[CheckpointIndex, dict[str, StoredMatrix]]:
    """Tells packed weights from the others.

    Args:
        index: The checkpoint.

    Returns:
        The checkpoint without the statistics, every packed weight in it with the shape of the weight that it stands for
        (bytes and place are those of the file); and the packed weights by name.

    Raises:
        ValueError: Statistics are missing, of another size, or of another code table than the installed bitsandbytes
            has; all are named.
    """
    found: dict[str, StoredMatrix] = {}
    problems: list[str] = []
    with index.open_files() as files:
        for state_name, location in index.tensors.items():
            if match := _STATE.fullmatch(state_name):
                try:
                    found[match[1]] = _read_state(index.tensors, files, match[1], match[2], location)
                except ValueError as error:
                    problems.append(f"{shown(match[1])}: {error}")
    if problems:
        raise ValueError(
            f"the packed weights in {index.folder} cannot be used as they are:{listing(problems)}\nFetch the "
            'checkpoint again, or pack the full-precision one with LemaConfig(quantization="nf4")'
        )
    parts = {f"{name}.{statistic}" for name in found for statistic in _STATISTICS}
    tensors = {
        name: dataclasses.replace(location, shape=found[name].matrix.shape, dtype=torch.uint8)
        if name in found
        else location
        for name, location in index.tensors.items()
        if name not in parts and _STATE.fullmatch(name) is None
    }
    return dataclasses.replace(index, tensors=tensors), found


def _read(files: FileSet, location: TensorLocation) -> torch.Tensor:
    memory = torch.empty(location.nbytes, dtype=torch.uint8)
    files.pread_into(location.path, location.offset_bytes, memory.numpy().data)
    return memory.view(location.dtype).view(location.shape)


def _read_state(
    stored: Mapping[str, TensorLocation], files: FileSet, name: str, quant_type: str, location: TensorLocation
) -> StoredMatrix:
    if location.nbytes > _MAX_STATE_BYTES:
        raise ValueError(f"its quantization state has {location.nbytes} bytes, expected some hundred")
    memory = torch.empty(location.nbytes, dtype=torch.uint8)
    files.pread_into(location.path, location.offset_bytes, memory.numpy().data)
    try:
        state, _ = parse_json(bytes(memory.numpy()))
    except ValueError as error:
        raise ValueError(f"its quantization state is damaged: {error}") from error
    matrix, offset = _parse_state(state, name, quant_type)
    wanted = {part: spec for part, spec in matrix.tensors().items() if part != matrix.nested_offset}
    missing = [part for part in wanted if part not in stored]
    if missing:
        raise ValueError(f"the checkpoint lacks {', '.join(missing)}")
    # The bytes count, not the type: a checkpoint may store packed bytes as another type (bnb_4bit_quant_storage).
    wrong = [
        f"{part} has {stored[part].nbytes} bytes, expected {tensor_nbytes(*spec)}"
        for part, spec in wanted.items()
        if stored[part].nbytes != tensor_nbytes(*spec)
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    _check_tables(stored, files, matrix)
    locations = {part: stored[part] for part in wanted}
    return StoredMatrix(matrix=matrix, locations=locations, nested_offset=offset)


def _parse_state(state: Any, name: str, quant_type: str) -> tuple[PackedMatrix, float]:
    """What a quantization state says of its matrix, and the mean of its absmax values."""
    if not isinstance(state, dict):
        raise ValueError(f"its quantization state is a JSON {type(state).__name__}, expected an object")
    shape: Any = state.get("shape")
    block_values, dtype_name = state.get("blocksize"), state.get("dtype")
    dtype = vars(torch).get(dtype_name) if isinstance(dtype_name, str) else None
    is_matrix = is_shape(shape) and len(shape) == 2 and dense_nbytes(shape, 8) is not None
    if not is_matrix or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"its quantization state is of a {shown(described(dtype_name))} of shape {shown(shape)}")
    if type(block_values) is not int or block_values not in BLOCK_SIZES:
        raise ValueError(f"blocks of {shown(block_values)} values, expected one of {BLOCK_SIZES}")
    is_nested = "nested_blocksize" in state
    if is_nested and state["nested_blocksize"] != NESTED_BLOCK_VALUES:
        found = shown(state["nested_blocksize"])
        raise ValueError(f"absmax blocks of {found} values, expected {NESTED_BLOCK_VALUES}")
    offset: Any = state.get("nested_offset") if is_nested else 0.0
    if type(offset) not in (int, float) or not -_MAX_OFFSET <= offset <= _MAX_OFFSET:  # NaN is neither
        raise ValueError(f"a nested_offset of {shown(offset)}, expected a finite number")
    matrix = PackedMatrix(
        name=name,
        shape=(shape[0], shape[1]),
        dtype=dtype,
        is_nested=is_nested,
        quant_type=quant_type,
        block_values=block_values,
    )
    return matrix, float(offset)


def _check_tables(stored: Mapping[str, TensorLocation], files: FileSet, matrix: PackedMatrix) -> None:
    from hf_lema.runtime.quantization import code_table, nested_code_table  # only here is bitsandbytes needed

    cpu = torch.device("cpu")
    tables = {f"{matrix.name}.quant_map": code_table(matrix.quant_type, cpu)}
    if matrix.is_nested:
        tables[f"{matrix.name}.nested_quant_map"] = nested_code_table(cpu)
    for name, table in tables.items():
        if name not in stored:
            raise ValueError(f"the checkpoint lacks {name}")
        location = stored[name]
        # Size first: a table is of 16 or 256 values, whatever the file announces.
        if (location.shape, location.dtype) != (tuple(table.shape), table.dtype) or not torch.equal(
            _read(files, location), table
        ):
            raise ValueError(f"{name} is another code table than that of the installed bitsandbytes")
