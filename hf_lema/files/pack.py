"""The pack: a checkpoint's decoder layers rewritten as they lie in a slot, one contiguous read each.

Responsibility: the pack's format, writing one so that it is whole or absent, opening one. Knows nothing of where the
layers' bytes come from.

Format, version 2: a safetensors file that any reader of safetensors opens. Tensor ``layer.<idx>`` (U8, one dimension)
is the buffer of that layer, padding included. The header is padded with spaces so that the first layer starts at a
multiple of 4096 bytes. ``__metadata__`` holds ``format``, ``version``, ``source_identity``, ``source_files`` (a JSON
list, see `CheckpointIndex.fingerprint`), ``dtype``, ``made_with`` (the versions that made the values, for information)
and ``layouts``: for each layer ``[idx, tensors, packed]``, the tensors as ``[name, dtype, shape]`` in the order in
which `make_layout` places them, the matrices packed to 4 bits as ``[name, dtype, shape, is_nested, quant_type,
block_values]``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from hf_lema.files.checkpoint import (
    DTYPE_NAMES,
    DTYPES,
    FileSet,
    LayerLayout,
    PackedMatrix,
    ReadSpan,
    SafetensorsHeader,
    align_up,
    make_layout,
    read_header,
)
from hf_lema.files.foreign_json import described, parse_json, shown
from hf_lema.files.layout import BLOCK_SIZES, QUANT_TYPES
from hf_lema.files.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, dense_nbytes, is_shape
from hf_lema.files.staging import partial_path, remove_stale_partials, require_disk_space, sync

if TYPE_CHECKING:
    from typing_extensions import Self

PACK_SUFFIX = ".lema.safetensors"
PACK_FORMAT = "hf_lema pack"
PACK_VERSION = "2"
PAGE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class PackIndex:
    """A pack that was opened.

    Attributes:
        path: The file.
        nbytes: Its size.
        layouts: One for each layer, in the order of the layers.
        spans: For each layer, what to read; one span, as long as the layout.
        source_identity: What the pack was made from, as the writer gave it.
        source_files: The files it was made from, as JSON text, wherever they lay.
        dtype: The dtype asked of the writer, as text.
        made_with: The versions that made the values, as text.
    """

    path: Path
    nbytes: int
    layouts: tuple[LayerLayout, ...]
    spans: tuple[tuple[ReadSpan, ...], ...]
    source_identity: str
    source_files: str
    dtype: str
    made_with: str

    def open_files(self) -> FileSet:
        """Give a new set with the pack's file to read from. The caller owns it."""
        return FileSet({self.path: self.nbytes})


def open_pack(path: str | Path) -> PackIndex:
    """Read and check the header of a pack.

    Args:
        path: The file.

    Returns:
        Its index.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, is no pack, or one of another version; the message says what to do.
    """
    path = Path(path)
    header = read_header(path)
    found_format, found_version = header.metadata.get("format"), header.metadata.get("version")
    if found_format != PACK_FORMAT:
        raise ValueError(f"{path} is no pack: its format is {shown(described(found_format))}, expected {PACK_FORMAT!r}")
    if found_version != PACK_VERSION:
        raise ValueError(
            f"{path} is a pack of version {shown(described(found_version))}, this release reads version "
            f"{PACK_VERSION!r}. Delete it: it is written again when needed"
        )
    try:
        layouts = _layouts_from_json(header.metadata["layouts"])
        texts = {name: header.metadata[name] for name in ("source_identity", "source_files", "dtype", "made_with")}
        _check_source_files(texts["source_files"])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: the pack's metadata is damaged ({shown(described(error), 500)}). Delete it: it is written again"
        ) from error
    return PackIndex(
        path=path,
        nbytes=header.nbytes,
        layouts=layouts,
        spans=_layer_spans(header, layouts),
        **texts,
    )


def _layer_spans(header: SafetensorsHeader, layouts: Sequence[LayerLayout]) -> tuple[tuple[ReadSpan, ...], ...]:
    wanted = {f"layer.{layout.layer_idx}": layout.nbytes for layout in layouts}
    found = {name: location.nbytes for name, location in header.tensors.items()}
    if wanted != found:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        listed = ", ".join(f"{name}: {found.get(name)} bytes, expected {wanted.get(name)}" for name in wrong)
        raise ValueError(f"{header.path}: the pack's layers do not fit its layouts ({shown(listed, 2000)}). Delete it")
    return tuple(
        (
            ReadSpan(
                path=header.path,
                file_offset_bytes=header.tensors[f"layer.{layout.layer_idx}"].offset_bytes,
                nbytes=layout.nbytes,
                layer_offset_bytes=0,
            ),
        )
        for layout in layouts
    )


def layouts_to_json(layouts: Sequence[LayerLayout]) -> str:
    """Write layouts as the pack stores them.

    Raises:
        ValueError: A tensor has a dtype that safetensors has no name for.
    """
    unknown = [spec.name for layout in layouts for spec in layout.tensors if spec.dtype not in DTYPE_NAMES]
    if unknown:
        raise ValueError(f"a pack cannot hold these tensors, their dtype has no name in safetensors: {unknown}")
    return json.dumps(
        [
            [
                layout.layer_idx,
                [[spec.name, DTYPE_NAMES[spec.dtype], list(spec.shape)] for spec in layout.tensors],
                [
                    [m.name, DTYPE_NAMES[m.dtype], list(m.shape), m.is_nested, m.quant_type, m.block_values]
                    for m in layout.packed
                ],
            ]
            for layout in layouts
        ],
        separators=(",", ":"),
    )


def _layouts_from_json(text: str) -> tuple[LayerLayout, ...]:
    """Read layouts; every number is checked before anything is computed from it.

    Raises:
        ValueError: They are not as `layouts_to_json` writes them.
    """
    layers, repeated = parse_json(text)
    if repeated or not isinstance(layers, list):
        raise ValueError("its layouts are no list of layers")
    layouts = tuple(_layout_from_json(layer) for layer in layers)
    if len({layout.layer_idx for layout in layouts}) < len(layouts):
        raise ValueError("a layer has two layouts")
    return layouts


def _layout_from_json(layer: object) -> LayerLayout:
    layer_idx, tensors, packed = _fields(layer, int, list, list)
    specs: dict[str, tuple[Sequence[int], torch.dtype]] = {}
    for tensor in tensors:
        name, dtype, shape = _fields(tensor, str, str, list)
        specs[name] = (shape, _dtype(dtype, shape))
    if len(specs) < len(tensors):
        raise ValueError(f"layer {layer_idx} has two tensors of one name")
    return make_layout(layer_idx, specs, [_packed_from_json(matrix) for matrix in packed])


def _packed_from_json(matrix: object) -> PackedMatrix:
    name, dtype, shape, is_nested, quant_type, block_values = _fields(matrix, str, str, list, bool, str, int)
    of = _dtype(dtype, shape)
    if len(shape) != 2 or quant_type not in QUANT_TYPES or block_values not in BLOCK_SIZES:
        raise ValueError(f"{shown(name)} is packed as {shown([shape, quant_type, block_values])}")
    out_features, in_features = shape
    return PackedMatrix(
        name=name,
        shape=(out_features, in_features),
        dtype=of,
        is_nested=is_nested,
        quant_type=quant_type,
        block_values=block_values,
    )


def _fields(values: object, *types: type) -> list[Any]:
    """A list of exactly these types: to Python ``True`` is an int, to a pack it is not."""
    if not isinstance(values, list) or [type(value) for value in values] != list(types):
        raise ValueError(f"{shown(values)}, expected {', '.join(kind.__name__ for kind in types)}")
    return values


def _dtype(name: str, shape: Sequence[int]) -> torch.dtype:
    """The dtype of a tensor of this shape, if there can be one."""
    if name not in DTYPES or not is_shape(shape) or dense_nbytes(shape, DTYPES[name].itemsize) is None:
        raise ValueError(f"a tensor of {shown(name)} with the shape {shown(shape)}")
    return DTYPES[name]


def _check_source_files(text: str) -> None:
    """See that it is what `CheckpointIndex.fingerprint` gives."""
    files, _ = parse_json(text)
    if not isinstance(files, list):
        raise ValueError("its source_files are no list")
    for file in files:
        _fields(file, str, int, str, str)


class PackWriter:
    """Writes a pack, layer by layer; a context manager.

    The bytes go to a temporary file in the same folder, which takes the pack's name only when every layer is on the
    disk. Leaving the context by an exception, or without having written all layers, leaves nothing. A killed process
    leaves its temporary file; the next writer of the same pack removes it.
    """

    def __init__(
        self,
        path: str | Path,
        layouts: Sequence[LayerLayout],
        *,
        source_identity: str,
        dtype: torch.dtype | str,
        source_files: str = "[]",
        made_with: str = "",
    ) -> None:
        """Describe the pack; nothing is written before the context is entered.

        Args:
            path: Name of the pack; its folder is made if it does not exist.
            layouts: One for each layer, in the order in which they will be written.
            source_identity: What the pack is made from.
            dtype: The dtype of the weights, for information.
            source_files: The files it is made from, as `CheckpointIndex.fingerprint` gives them.
            made_with: The versions that make the values, for information.

        Raises:
            ValueError: A layout has a dtype that a pack cannot hold, or two are of the same layer.
        """
        self.path = Path(path)
        self._layouts = tuple(layouts)
        if len({layout.layer_idx for layout in layouts}) < len(self._layouts):
            raise ValueError(f"layers appear twice: {[layout.layer_idx for layout in layouts]}")
        self._header = _header_bytes(
            self._layouts,
            {
                "source_identity": source_identity,
                "source_files": source_files,
                "dtype": str(dtype).removeprefix("torch."),
                "made_with": made_with,
            },
        )
        self.nbytes = len(self._header) + sum(layout.nbytes for layout in self._layouts)
        self._partial_path = partial_path(self.path)
        self._descriptor = -1  # owned: closed in __exit__
        self._num_written = 0

    def available_bytes(self) -> int:
        """Free disk space where the pack will lie."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.path.parent).free

    def __enter__(self) -> Self:
        """Check the disk space and write the header.

        Raises:
            OSError: There is too little disk space (``ENOSPC``), or the file cannot be made.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_partials(self.path)
        remedy = "Free some, or set HF_LEMA_CACHE to a folder on another disk"
        require_disk_space(self.path.parent, self.nbytes, "the pack", remedy)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(self._partial_path, flags, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until closed: says that a writer lives
            self._write(memoryview(self._header))
        except BaseException:
            self._discard()
            raise
        return self

    def write_layer(self, layer_idx: int, buffer: torch.Tensor) -> None:
        """Append the next layer.

        Args:
            layer_idx: It must be the next one of the layouts.
            buffer: 1-D contiguous uint8 tensor on the CPU, at least as long as the layer's layout.

        Raises:
            RuntimeError: The context is not entered.
            ValueError: Another layer was due, or the buffer is no such tensor.
            OSError: The disk is full or refused.
        """
        if self._descriptor < 0:
            raise RuntimeError("the pack is not open for writing: use it in a with statement")
        due = self._layouts[self._num_written] if self._num_written < len(self._layouts) else None
        if due is None or due.layer_idx != layer_idx:
            raise ValueError(f"got layer {layer_idx}, due was {'none' if due is None else due.layer_idx}")
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.device.type != "cpu":
            raise ValueError(f"layer {layer_idx}: expected a 1-D uint8 tensor on the CPU, got {buffer.dtype}")
        if buffer.numel() < due.nbytes:
            raise ValueError(f"layer {layer_idx}: the buffer has {buffer.numel()} bytes, the layer {due.nbytes}")
        self._write(buffer[: due.nbytes].numpy().data)
        self._num_written += 1

    def _write(self, data: memoryview) -> None:
        while len(data):
            data = data[os.write(self._descriptor, data) :]

    def _discard(self) -> None:
        self._partial_path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the pack its name if all went well, else remove what was written.

        Raises:
            RuntimeError: No exception came, but layers are missing.
        """
        try:
            if exc_type is None:
                missing = [layout.layer_idx for layout in self._layouts[self._num_written :]]
                if missing:
                    raise RuntimeError(f"the pack {self.path} is not complete: layers {missing} were not written")
                os.fsync(self._descriptor)
                self._partial_path.replace(self.path)
                sync(self.path.parent)
        finally:
            self._discard()


def _header_bytes(layouts: Sequence[LayerLayout], texts: Mapping[str, str]) -> bytes:
    """Length and JSON header, padded with spaces to a multiple of `PAGE_BYTES`."""
    header: dict[str, object] = {
        "__metadata__": {
            "format": PACK_FORMAT,
            "version": PACK_VERSION,
            **texts,
            "layouts": layouts_to_json(layouts),
        }
    }
    begin = 0
    for layout in layouts:
        offsets = [begin, begin + layout.nbytes]
        header[f"layer.{layout.layer_idx}"] = {"dtype": "U8", "shape": [layout.nbytes], "data_offsets": offsets}
        begin += layout.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    padded_bytes = align_up(LENGTH_BYTES + len(text), PAGE_BYTES) - LENGTH_BYTES
    if padded_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"the pack's header would have {padded_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed")
    return padded_bytes.to_bytes(LENGTH_BYTES, "little") + text.ljust(padded_bytes)
