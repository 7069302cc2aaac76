"""Reading the header of a safetensors file: what tensors it holds and where, without reading one.

Responsibility: the byte format (https://github.com/huggingface/safetensors#format): eight bytes of little-endian header
length, the header as JSON, then the data without holes. Every rule of the format is checked here, because what passes
is later read by position. Knows nothing of shards, models or layers.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_lema.files.foreign_json import described, listing, parse_json, shown

MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's own limit."""

LENGTH_BYTES = 8

MAX_DIMS = 64
"""Dimensions of a tensor; torch and numpy stop there, too."""

MAX_SIZE = 2**63 - 1
"""Of a dimension, an offset or a file: what the system can address, and what keeps every sum here a small number."""

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""Name of a dtype in the format -> torch dtype. Types of less than a byte have no entry: they are quantized formats."""

DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorLocation:
    """Where a tensor's bytes lie on disk.

    Attributes:
        path: The file.
        offset_bytes: Distance from the start of the file, header included.
        nbytes: Bytes of its elements.
        shape: Sizes of its dimensions.
        dtype: Type of its elements, as stored.
    """

    path: Path
    offset_bytes: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class SafetensorsHeader:
    """What one safetensors file says of itself.

    Attributes:
        path: The file.
        nbytes: Size of the whole file.
        metadata: The free text entries (``__metadata__``).
        tensors: Name -> location, in the order of the data.
        sha256: Digest of the header's bytes, in hexadecimal.
    """

    path: Path
    nbytes: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorLocation]
    sha256: str


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of a safetensors file.

    Args:
        path: The file.

    Returns:
        The header; every location in it lies inside the file and overlaps no other.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no regular file, or no valid safetensors file; the message lists what is wrong with it.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # to open a pipe would wait for ever
        raise ValueError(f"{path} is {_kind_of(found.st_mode)}, expected a safetensors file")
    nbytes = found.st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if nbytes < LENGTH_BYTES or header_bytes > min(nbytes - LENGTH_BYTES, MAX_HEADER_BYTES):
            raise ValueError(
                f"{path}: its first {LENGTH_BYTES} bytes announce a header of {header_bytes} bytes, but the file has "
                f"{nbytes} bytes and a header at most {MAX_HEADER_BYTES}. It is no safetensors file, or was cut: fetch "
                "it again"
            )
        raw = file.read(header_bytes)
    metadata, entries, problems = _parse(raw)
    data_offset_bytes = LENGTH_BYTES + header_bytes
    tensors: dict[str, TensorLocation] = {}
    for name, entry in entries.items():
        location, problem = _locate(entry, path, data_offset_bytes)
        if location is None:
            problems.append(f"tensor {shown(name)!r}: {problem}")
        else:
            tensors[name] = location
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset_bytes, item[1].nbytes)))
    if not problems:
        problems = _coverage_problems(tensors, data_offset_bytes, nbytes)
    if problems:
        raise ValueError(f"{path} is no valid safetensors file:{listing(problems, '  ')}\nFetch or save it again")
    return SafetensorsHeader(
        path=path, nbytes=nbytes, metadata=metadata, tensors=tensors, sha256=hashlib.sha256(raw).hexdigest()
    )


def _kind_of(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _parse(raw: bytes) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Split the JSON text into metadata and tensor entries; the third item says what is wrong."""
    try:
        header, repeated = parse_json(raw)
    except ValueError as error:
        return {}, {}, [f"its header is no JSON text: {error}"]
    if not isinstance(header, dict):
        return {}, {}, [f"its header is a JSON {type(header).__name__}, expected an object"]
    problems = [f"its header names {shown(name)!r} more than once" for name in repeated]
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        problems.append(f"its __metadata__ is no table of texts: {shown(metadata)}")
        metadata = {}
    return metadata, header, problems


def _is_size(number: object) -> bool:
    return type(number) is int and 0 <= number <= MAX_SIZE


def dense_nbytes(shape: Sequence[int], itemsize: int) -> int | None:
    """Bytes of a dense tensor; None if they are more than a file can have.

    Args:
        shape: Sizes of its dimensions, each at most `MAX_SIZE`.
        itemsize: Bytes of an element.
    """
    if 0 in shape:
        return 0
    nbytes = itemsize
    for size in shape:
        nbytes *= size
        if nbytes > MAX_SIZE:
            return None
    return nbytes


def is_shape(shape: object) -> bool:
    """Whether a JSON value is a list of sizes that a tensor can have."""
    return isinstance(shape, list) and len(shape) <= MAX_DIMS and all(_is_size(size) for size in shape)


def _locate(entry: object, path: Path, data_offset_bytes: int) -> tuple[TensorLocation | None, str]:
    """Turn a tensor's header entry into its location, or say why that cannot be done."""
    if not isinstance(entry, dict):
        return None, f"its entry is a JSON {type(entry).__name__}, expected an object"
    dtype_name, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        return None, f"unknown dtype {shown(described(dtype_name))}, expected one of {', '.join(DTYPES)}"
    if not isinstance(shape, list) or not is_shape(shape):
        return None, f"shape {shown(described(shape))}, expected a list of at most {MAX_DIMS} sizes"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        return None, f"data_offsets {shown(described(offsets))}, expected [begin, end]"
    begin, end = offsets
    nbytes = dense_nbytes(shape, dtype.itemsize)
    if nbytes is None or end - begin != nbytes:
        needed = "more than any file has" if nbytes is None else str(nbytes)
        return None, f"data_offsets {offsets} hold {end - begin} bytes, {dtype_name} of shape {shape} needs {needed}"
    offset_bytes = data_offset_bytes + begin
    return TensorLocation(path=path, offset_bytes=offset_bytes, nbytes=nbytes, shape=tuple(shape), dtype=dtype), ""


def _coverage_problems(tensors: Mapping[str, TensorLocation], data_offset_bytes: int, nbytes: int) -> list[str]:
    """Tensors, in the order of their data, must cover all that follows the header without overlap or hole."""
    problems: list[str] = []
    end_bytes, last_name = data_offset_bytes, "the header"
    for name, location in tensors.items():
        if location.offset_bytes < end_bytes:
            problems.append(f"tensor {name!r} overlaps {last_name!r} by {end_bytes - location.offset_bytes} bytes")
        elif location.offset_bytes > end_bytes:
            problems.append(f"a hole of {location.offset_bytes - end_bytes} bytes before tensor {name!r}")
        if location.offset_bytes + location.nbytes >= end_bytes:
            end_bytes, last_name = location.offset_bytes + location.nbytes, name
    if end_bytes > nbytes:
        problems.append(f"it was cut: it has {nbytes} bytes, its header describes {end_bytes}")
    elif end_bytes < nbytes:
        problems.append(f"it has {nbytes} bytes, its header describes only {end_bytes}")
    return problems
