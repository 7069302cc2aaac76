"""Writing a standard checkpoint, ``model.safetensors`` or its shards with their index, tensor by tensor.

Responsibility: which tensor lies where in which shard, the headers, positioned writes, the index. Names, shapes and
dtypes are known before the first byte is written, so nothing is ever held back. Knows nothing of where tensors come
from.

Shards and index are as ``save_pretrained`` of transformers makes them; the files follow
https://github.com/huggingface/safetensors#format. Inside a shard, tensors of wider elements come first: that keeps
every tensor aligned to its elements, which readers expect.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from hf_lema.files.checkpoint import DTYPE_NAMES, INDEX_NAME, SINGLE_NAME, TensorLocation, align_up, tensor_nbytes
from hf_lema.files.safetensors_header import LENGTH_BYTES

if TYPE_CHECKING:
    from typing_extensions import Self

_HEADER_ALIGNMENT_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class CheckpointLayout:
    """Where every tensor of a checkpoint that is to be written will lie.

    Attributes:
        headers: File name -> its first bytes, up to the data.
        tensors: Name -> location; the path is the file name alone.
        nbytes: Bytes of all files and the index together.
    """

    headers: Mapping[str, bytes]
    tensors: Mapping[str, TensorLocation]
    nbytes: int

    @property
    def weight_map(self) -> dict[str, str]:
        """Name -> file name."""
        return {name: location.path.name for name, location in self.tensors.items()}

    def index_text(self) -> str:
        """The index as JSON text; empty where there is one file only."""
        if len(self.headers) < 2:
            return ""
        total_bytes = sum(location.nbytes for location in self.tensors.values())
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(self.weight_map.items()))}
        return json.dumps(index, indent=2) + "\n"


def plan_checkpoint(tensors: Mapping[str, tuple[Sequence[int], torch.dtype]], max_shard_bytes: int) -> CheckpointLayout:
    """Share tensors out over shards.

    Args:
        tensors: Name -> (shape, dtype), in the order in which they should lie.
        max_shard_bytes: A new shard begins where the next tensor would not fit. A larger tensor gets its own.

    Returns:
        The layout: one file with the plain name if all fit into one.

    Raises:
        ValueError: No tensors, a bound below 1, or dtypes that safetensors has no name for; all are named.
    """
    unknown = [f"{name} ({dtype})" for name, (_, dtype) in tensors.items() if dtype not in DTYPE_NAMES]
    if unknown:
        raise ValueError(f"these tensors have a dtype that has no name in safetensors: {', '.join(unknown)}")
    if not tensors or max_shard_bytes < 1:
        raise ValueError(f"expected tensors and a shard of at least 1 byte, got {len(tensors)} and {max_shard_bytes}")
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, (shape, dtype) in tensors.items():
        nbytes = tensor_nbytes(shape, dtype)
        if shards[-1] and shard_bytes + nbytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += nbytes
    headers: dict[str, bytes] = {}
    located: dict[str, TensorLocation] = {}
    stem, suffix = SINGLE_NAME.split(".")
    for number, names in enumerate(shards, start=1):
        file_name = SINGLE_NAME if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        names = sorted(names, key=lambda name: -tensors[name][1].itemsize)
        headers[file_name], found = _lay_out(file_name, {name: tensors[name] for name in names})
        located |= found
    layout = CheckpointLayout(headers=headers, tensors=located, nbytes=0)
    nbytes = sum(map(len, headers.values())) + sum(location.nbytes for location in located.values())
    return CheckpointLayout(headers=headers, tensors=located, nbytes=nbytes + len(layout.index_text()))


def _lay_out(
    file_name: str, tensors: Mapping[str, tuple[Sequence[int], torch.dtype]]
) -> tuple[bytes, dict[str, TensorLocation]]:
    """Header of one file, and where in it each tensor lies."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (shape, dtype) in tensors.items():
        end = begin + tensor_nbytes(shape, dtype)
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(align_up(len(text), _HEADER_ALIGNMENT_BYTES))
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    located = {}
    offset_bytes = len(header)
    for name, (shape, dtype) in tensors.items():
        nbytes = tensor_nbytes(shape, dtype)
        located[name] = TensorLocation(
            path=Path(file_name), offset_bytes=offset_bytes, nbytes=nbytes, shape=tuple(shape), dtype=dtype
        )
        offset_bytes += nbytes
    return header, located


class CheckpointWriter:
    """Fills a folder with the files of a layout; a context manager. Tensors may come in any order."""

    def __init__(self, folder: Path, layout: CheckpointLayout) -> None:
        """Say what will be written; files are made when the context is entered.

        Args:
            folder: It exists.
            layout: What will be written.
        """
        self._folder = folder
        self._layout = layout
        self._left_bytes = {name: location.nbytes for name, location in layout.tensors.items()}
        self._descriptors: dict[str, int] = {}  # owned: closed in __exit__

    def __enter__(self) -> Self:
        """Make the files and write their headers."""
        try:
            for file_name, header in self._layout.headers.items():
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._descriptors[file_name] = os.open(self._folder / file_name, flags, 0o644)
                self._pwrite(file_name, memoryview(header), 0)
            if text := self._layout.index_text():
                (self._folder / INDEX_NAME).write_text(text, encoding="utf-8")
        except BaseException:
            self._close()
            raise
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor.

        Args:
            name: One of the layout's.
            tensor: On the CPU, of the layout's shape and dtype.

        Raises:
            ValueError: Another shape or dtype, or no such name.
            OSError: The disk is full or refused.
        """
        location = self._layout.tensors[name]
        if tuple(tensor.shape) != location.shape or tensor.dtype != location.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, laid out was {location.dtype} of "
                f"{location.shape}"
            )
        self.write_part(name, 0, tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)

    def write_part(self, name: str, offset_bytes: int, data: memoryview) -> None:
        """Write a part of a tensor's bytes.

        Args:
            name: One of the layout's.
            offset_bytes: Where in the tensor the part begins. Every byte must be written once.
            data: The bytes.

        Raises:
            ValueError: The part does not fit into the tensor, or more is written than it has.
            OSError: The disk is full or refused.
        """
        location = self._layout.tensors[name]
        if offset_bytes + len(data) > location.nbytes or len(data) > self._left_bytes[name]:
            raise ValueError(f"{name}: {len(data)} bytes at {offset_bytes} are more than its {location.nbytes}")
        self._pwrite(location.path.name, data, location.offset_bytes + offset_bytes)
        self._left_bytes[name] -= len(data)

    def _pwrite(self, file_name: str, data: memoryview, offset_bytes: int) -> None:
        try:
            while len(data):
                num_written = os.pwrite(self._descriptors[file_name], data, offset_bytes)
                data, offset_bytes = data[num_written:], offset_bytes + num_written
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"the disk of {self._folder.parent} became full at byte {offset_bytes} of {file_name} "
                f"({os.strerror(error.errno)}). Nothing is left of what was written: free some space and run it again",
            ) from error

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the files.

        Raises:
            RuntimeError: No exception came, but tensors are missing.
        """
        self._close()
        missing = sorted(name for name, left_bytes in self._left_bytes.items() if left_bytes)
        if exc_type is None and missing:
            raise RuntimeError(f"{len(missing)} tensors of {self._folder} were not written: {', '.join(missing)}")
