"""Reading the header of a safetensors file: what tensors it holds and where, without reading one.

Responsibility: the byte format (https://github.com/huggingface/safetensors#format): eight bytes of little-endian header
length, the header as JSON, then the data without holes. Every rule of the format is checked here, because what passes
is later read by position. Knows nothing of shards, models or layers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_lema.files.layout import tensor_nbytes

MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's own limit."""

LENGTH_BYTES = 8

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
        ValueError: The file is no valid safetensors file; the message lists everything that is wrong with it.
    """
    nbytes = path.stat().st_size
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
            problems.append(f"tensor {name!r}: {problem}")
        else:
            tensors[name] = location
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset_bytes, item[1].nbytes)))
    if not problems:
        problems = _coverage_problems(tensors, data_offset_bytes, nbytes)
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueError(f"{path} is no valid safetensors file:{listed}\nFetch or save it again")
    return SafetensorsHeader(
        path=path, nbytes=nbytes, metadata=metadata, tensors=tensors, sha256=hashlib.sha256(raw).hexdigest()
    )


def _parse(raw: bytes) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Split the JSON text into metadata and tensor entries; the third item says what is wrong."""
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            repeated.extend(sorted({name for name in names if names.count(name) > 1}))
        return found

    try:
        header = json.loads(raw, object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        return {}, {}, [f"its header is no JSON text: {error}"]
    if not isinstance(header, dict):
        return {}, {}, [f"its header is a JSON {type(header).__name__}, expected an object"]
    problems = [f"its header names {name!r} more than once" for name in repeated]
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        problems.append(f"its __metadata__ is no table of texts: {str(metadata)[:80]}")
        metadata = {}
    return metadata, header, problems


def _is_size(number: object) -> bool:
    return type(number) is int and number >= 0


def _locate(entry: object, path: Path, data_offset_bytes: int) -> tuple[TensorLocation | None, str]:
    """Turn a tensor's header entry into its location, or say why that cannot be done."""
    if not isinstance(entry, dict):
        return None, f"its entry is a JSON {type(entry).__name__}, expected an object"
    dtype_name, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        return None, f"unknown dtype {dtype_name!r}, expected one of {', '.join(DTYPES)}"
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        return None, f"shape {shape!r}, expected a list of sizes"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        return None, f"data_offsets {offsets!r}, expected [begin, end]"
    begin, end = offsets
    nbytes = tensor_nbytes(shape, dtype)
    if end - begin != nbytes:
        return None, f"data_offsets {offsets} hold {end - begin} bytes, {dtype_name} of shape {shape} needs {nbytes}"
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
