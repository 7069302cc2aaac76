"""The decoder layers of a checkpoint, as the model registers them.

Responsibility: one layout per layer, where a layer's bytes can be read in place, and how they are made where they
cannot: converted, packed to 4 bits, or taken over packed. Knows nothing of the model's other weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from importlib.metadata import version
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from hf_lema.files.checkpoint import (
    CheckpointIndex,
    FileSet,
    LayerLayout,
    PackedMatrix,
    ReadSpan,
    TensorLocation,
    make_layout,
    merge_spans,
    read_spans_into,
)
from hf_lema.files.pack import PACK_VERSION, layouts_to_json
from hf_lema.model.conversion import ConversionGroup, ConversionPlan, convert
from hf_lema.model.layer_tensors import (
    NOTHING_PACKED,
    LayerTensors,
    Packing,
    TensorReader,
    cast_checked,
    check_complete,
    group_by_layer,
    meta_copy,
)
from hf_lema.runtime.packed_checkpoint import StoredMatrix

if TYPE_CHECKING:
    from typing_extensions import Self


MAX_THREADS = 4
"""Threads that read and pack: from the page cache of an H100 host four read 21 to 30 GB/s, as much as its bus takes."""


class CheckpointSource:
    """The bytes of every decoder layer, from the checkpoint's files.

    Attributes:
        layouts: One for each decoder layer; names relative to the layer, shapes as the model registers them, dtypes as
            they will be.
        spans: For each layer what to read to fill a buffer of its layout; None where bytes must be converted first.
        reason: Why spans is None; empty where it is not.
        dtype: The dtype that the model is loaded in.
        identity: A digest that changes when the checkpoint, or what is made of it, does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers_path: str,
        index: CheckpointIndex,
        plan: ConversionPlan,
        dtype: torch.dtype,
        packing: Packing = NOTHING_PACKED,
    ) -> None:
        """Lay the layers out; reads no tensor.

        Args:
            model: Decoder layers on meta.
            layers_path: Path of the list of decoder layers in the model.
            index: The checkpoint.
            plan: Made for this model and checkpoint.
            dtype: The dtype that the model is loaded in.
            packing: Which linears are packed.

        Raises:
            ValueError: Tensors of decoder layers are missing from the checkpoint or have another shape; all are named.
        """
        self.dtype = dtype
        self._packing = packing
        self._pool: ThreadPoolExecutor | None = None  # owned
        self._reader = TensorReader(index)  # owned
        # Conversions look shapes up in the model, whose layers will be wrapped or replaced: they get their own.
        self._meta_model = meta_copy(model) if plan.has_converters else model
        self._prefix = layers_path + "."
        layers = model.get_submodule(layers_path)
        assert isinstance(layers, nn.ModuleList)
        found = group_by_layer(self._meta_model, layers_path, len(layers), plan, self._reader)
        check_complete(layers, layers_path, found, packing)
        # In the order of the names, which is also the order of the data in the files that save_pretrained writes: the
        # spans of a layer then merge to one or a few.
        self._groups = tuple(layer.groups for layer in found)
        self.layouts: tuple[LayerLayout, ...] = tuple(
            self._lay_out(layer_idx, layer.tensors) for layer_idx, layer in enumerate(found)
        )
        self.reason = self._why_not_in_place(index.tensors)
        self.spans: tuple[tuple[ReadSpan, ...], ...] | None = None
        if not self.reason:
            self.spans = tuple(
                self._layer_spans(layout, groups) for layout, groups in zip(self.layouts, self._groups, strict=True)
            )
        versions = [transformers.__version__] if plan.has_converters else []
        parts = [PACK_VERSION, index.identity(), layouts_to_json(self.layouts), *versions]
        self.identity = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        if packing.matrices:
            self._pool = ThreadPoolExecutor(self._num_threads(found), thread_name_prefix="hf_lema-packer")

    def _lay_out(self, layer_idx: int, tensors: Mapping[str, tuple[torch.Size, torch.dtype]]) -> LayerLayout:
        """The layout of a layer, with what is packed in place of the weights."""
        parts: dict[str, tuple[Sequence[int], torch.dtype]] = {}
        packed = []
        for name, tensor in sorted(tensors.items()):
            matrix = self._matrix(layer_idx, name)
            parts |= {name: tensor} if matrix is None else matrix.tensors()
            packed += [] if matrix is None else [matrix]
        return make_layout(layer_idx, parts, packed)

    def _matrix(self, layer_idx: int, name: str) -> PackedMatrix | None:
        """What a weight is packed to, None for one that stays as it is; as it is stored, where it is packed there."""
        target = f"{self._prefix}{layer_idx}.{name}"
        stored = self._stored(target, layer_idx)
        return self._packing.matrices.get(target) if stored is None else replace(stored.matrix, name=name)

    def _stored(self, target: str, layer_idx: int) -> StoredMatrix | None:
        if target not in self._packing.matrices or not self._packing.stored:
            return None
        sources = next(group.sources for group in self._groups[layer_idx] if group.target == target)
        return self._packing.stored[sources[0]]

    def _num_threads(self, found: Sequence[LayerTensors]) -> int:
        """As many as hold no more than two layers of full precision between them."""
        stored = self._reader.index.tensors
        group_bytes = [
            sum(stored[name].nbytes for name in group.sources) * (1 if group.converter is None else 2)
            for groups in self._groups
            for group in groups
        ]
        layer_bytes = max(
            sum(shape.numel() * self.dtype.itemsize for shape, _ in layer.tensors.values()) for layer in found
        )
        room_bytes = 3 * layer_bytes // 2  # the rest is for what packing itself takes
        return max(1, min(MAX_THREADS, room_bytes // max(1, *group_bytes)))

    @property
    def needs_conversion(self) -> bool:
        """Whether bytes cannot be read in place."""
        return self.spans is None

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layout.nbytes for layout in self.layouts)

    def _why_not_in_place(self, stored: Mapping[str, TensorLocation]) -> str:
        groups = [group for layer_groups in self._groups for group in layer_groups]
        reasons = []
        joined = [group.target for group in groups if group.converter is not None]
        if joined:
            reasons.append(f"transformers makes {len(joined)} tensors from others (first: {joined[0]})")
        if self._packing.stored:
            reasons.append("bitsandbytes' statistics are laid out anew")
        elif self._packing.matrices:
            reasons.append(f"{len(self._packing.matrices)} linears are packed to 4 bits")
        cast = [name for group in groups for name in group.sources if stored[name].dtype != group.cast_to]
        if cast:
            dtypes = sorted({str(stored[name].dtype) for name in cast})
            reasons.append(f"{len(cast)} tensors are stored as {', '.join(dtypes)}, wanted is {self.dtype}")
        return "; ".join(reasons)

    def _layer_spans(self, layout: LayerLayout, groups: Sequence[ConversionGroup]) -> tuple[ReadSpan, ...]:
        layer_prefix = f"{self._prefix}{layout.layer_idx}."
        sources = {group.target.removeprefix(layer_prefix): group.sources[0] for group in groups}
        spans = []
        for spec in layout.tensors:
            location = self._reader.index.tensors[sources[spec.name]]
            spans.append(
                ReadSpan(
                    path=location.path,
                    file_offset_bytes=location.offset_bytes,
                    nbytes=location.nbytes,
                    layer_offset_bytes=spec.offset_bytes,
                )
            )
        return merge_spans(spans)

    def write_layer(self, layer_idx: int, out: torch.Tensor) -> None:
        """Fill a buffer with a layer, whether in place or by conversion. May be called from several threads.

        Beyond ``out`` it holds the tensors of one conversion: the sources and the result of one joined tensor; where
        linears are packed, those of a few, at most two layers of full precision.

        Args:
            layer_idx: Which layer.
            out: 1-D contiguous uint8 tensor on the CPU, at least ``layouts[layer_idx].nbytes`` long. Padding between
                tensors is left as it is.

        Raises:
            ValueError: A finite value does not fit the dtype, a file was replaced or cut, or the buffer does not fit.
            RuntimeError: The source is closed.
        """
        if self.spans is not None:
            read_spans_into(self._reader.files, self.spans[layer_idx], out)
            return
        views = self.layouts[layer_idx].views(out)
        if self._pool is None:
            for group in self._groups[layer_idx]:
                self._write_group(layer_idx, group, views)
            return
        writes = [self._pool.submit(self._write_group, layer_idx, group, views) for group in self._groups[layer_idx]]
        wait(writes)  # none may write to the buffer any more when an error is raised
        for write in writes:
            write.result()

    @torch.no_grad()
    def _write_group(self, layer_idx: int, group: ConversionGroup, views: Mapping[str, torch.Tensor]) -> None:
        layer_prefix = f"{self._prefix}{layer_idx}."
        packed = {matrix.name: matrix for matrix in self.layouts[layer_idx].packed}
        matrix = packed.get(group.target.removeprefix(layer_prefix))
        if matrix is not None and group.converter is None:
            self._write_packed(layer_idx, group, matrix, views)
            return
        for target, tensor in convert(group, self._meta_model, self._reader.read).items():
            name = target.removeprefix(layer_prefix)
            if name in packed:
                self._pack(target, packed[name], tensor, views)
            elif name in views:
                views[name].copy_(tensor)

    def _write_packed(
        self, layer_idx: int, group: ConversionGroup, matrix: PackedMatrix, views: Mapping[str, torch.Tensor]
    ) -> None:
        """Packs one stored weight, cast on the device, or takes over one that is packed."""
        stored = self._stored(group.target, layer_idx)
        if stored is not None:
            stored.read_into(self._reader.files, matrix, views)
            return
        name = group.sources[0]
        values = self._reader.read(name, self._reader.index.tensors[name].dtype)
        self._pack(group.target, matrix, values, views, lambda piece: cast_checked(name, piece, matrix.dtype))

    def _pack(
        self,
        target: str,
        matrix: PackedMatrix,
        values: torch.Tensor,
        views: Mapping[str, torch.Tensor],
        cast: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        from hf_lema.runtime.quantization import quantize  # bitsandbytes is not needed where nothing is packed

        is_transposed = target in self._packing.transposed
        quantize(matrix, values.T if is_transposed else values, views, self._packing.device, cast)

    def open_files(self) -> FileSet:
        """Give a new set of the checkpoint's files to read `spans` from. The caller owns it."""
        return self._reader.index.open_files()

    def close(self) -> None:
        """Close the files and end the threads. May be called any number of times."""
        if self._pool is not None:
            self._pool.shutdown()
        self._reader.files.close()

    @property
    def made_with(self) -> str:
        """The versions that the values depend on, for whoever wonders where a pack's last bits come from."""
        made = f"transformers {transformers.__version__}"
        if self._packing.matrices and not self._packing.stored:
            made += f", bitsandbytes {version('bitsandbytes')} on {self._packing.device.type}"
        return made

    def fingerprint(self) -> str:
        """As `CheckpointIndex.fingerprint`."""
        return self._reader.index.fingerprint()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
