"""Which stored tensors make up each decoder layer, and reading single ones.

Responsibility: sorting a conversion plan by layer, what is missing or of another shape, which linears are packed to 4
bits; reading and casting one tensor. Knows nothing of buffers, devices or threads.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lema.files.checkpoint import CheckpointIndex, FileSet, PackedMatrix
from hf_lema.model.conversion import ConversionGroup, ConversionPlan, convert
from hf_lema.runtime.packed_checkpoint import StoredMatrix
from hf_lema.units import MIB

PIECE_BYTES = 16 * MIB
"""What is read at a time of a tensor that only passes through: large enough for a disk's full rate."""


class TensorReader:
    """Reads single tensors of a checkpoint. May be used from several threads at once."""

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self.files: FileSet = index.open_files()  # owned by whoever made the reader

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read a tensor into new CPU memory and cast it.

        Args:
            name: Its name in the checkpoint.
            dtype: What it is cast to.

        Raises:
            ValueError: A finite value does not fit the dtype; the file was replaced or cut.
        """
        location = self.index.tensors[name]
        memory = torch.empty(location.nbytes, dtype=torch.uint8)
        self.files.pread_into(location.path, location.offset_bytes, memory.numpy().data)
        return cast_checked(name, memory.view(location.dtype).view(location.shape), dtype)

    def read_pieces(self, name: str, dtype: torch.dtype, max_piece_bytes: int) -> Iterator[torch.Tensor]:
        """Read a tensor as consecutive flat pieces, cast; the memory of a piece is used again for the next.

        Args:
            name: Its name in the checkpoint.
            dtype: What it is cast to.
            max_piece_bytes: How much of the file is read at a time.

        Raises:
            ValueError: As for `read`.
        """
        location = self.index.tensors[name]
        itemsize = location.dtype.itemsize
        memory = torch.empty(min(location.nbytes, max(1, max_piece_bytes // itemsize) * itemsize), dtype=torch.uint8)
        for begin in range(0, location.nbytes, max(1, len(memory))):
            piece = memory[: location.nbytes - begin]
            self.files.pread_into(location.path, location.offset_bytes + begin, piece.numpy().data)
            yield cast_checked(name, piece.view(location.dtype), dtype)

    def have_same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors of the checkpoint are the same in shape, dtype and every bit."""
        one, other = self.index.tensors[first], self.index.tensors[second]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        pieces = (self.read_pieces(name, one.dtype, PIECE_BYTES) for name in (first, second))
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*pieces, strict=True))

    def read_meta(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """What `read` would give, without its values: a tensor on the meta device."""
        return torch.empty(self.index.tensors[name].shape, dtype=dtype, device="meta")


def cast_checked(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast, and refuse where that would turn a finite value into an infinity.

    Raises:
        ValueError: Naming the tensor, its largest value and the largest of the dtype.
    """
    cast = tensor.to(dtype)
    if not (tensor.dtype.is_floating_point and dtype.is_floating_point) or tensor.dtype == dtype:
        return cast
    if dtype.itemsize > 1 and not torch.isfinite(cast).all():
        lost = torch.isfinite(tensor) & ~torch.isfinite(cast)
        num_lost = int(lost.sum())
        if num_lost:
            largest = float(tensor[lost].abs().max())
            raise ValueError(
                f"tensor {name!r} holds {num_lost} values that do not fit {dtype}: up to {largest:.6g}, the largest of "
                f"{dtype} is {torch.finfo(dtype).max:.6g}. Load the model in another dtype, such as torch.bfloat16"
            )
    return cast


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """What the checkpoint gives for one decoder layer: names relative to the layer."""

    groups: tuple[ConversionGroup, ...]
    tensors: Mapping[str, tuple[torch.Size, torch.dtype]]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Which linears of the decoder layers are packed to 4 bits, and how.

    Attributes:
        matrices: Full name of the weight in the model -> what it becomes, its name relative to the layer.
        transposed: Full names of those that the checkpoint holds transposed.
        stored: Name in the checkpoint -> weight that is packed there already.
        device: Where the others are packed.
    """

    matrices: Mapping[str, PackedMatrix]
    transposed: frozenset[str]
    stored: Mapping[str, StoredMatrix]
    device: torch.device


NOTHING_PACKED = Packing(matrices={}, transposed=frozenset(), stored={}, device=torch.device("cpu"))


def meta_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own modules, whose tensors are all on meta; parameters are shared, nobody writes to them."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared | {id(tensor): tensor.to("meta") for tensor in model.buffers()})


def group_by_layer(
    model: PreTrainedModel, layers_path: str, num_layers: int, plan: ConversionPlan, reader: TensorReader
) -> list[LayerTensors]:
    """Sort the plan's groups by decoder layer; what converters make is found by running them on meta tensors."""
    of_layer = re.compile(rf"{re.escape(layers_path)}\.(\d+)\.(.+)")
    groups: list[list[ConversionGroup]] = [[] for _ in range(num_layers)]
    tensors: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{} for _ in range(num_layers)]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for group in plan.groups:
        match = of_layer.fullmatch(group.target)
        if match is None or int(match[1]) >= num_layers:
            continue
        layer_idx = int(match[1])
        made = {name: tensor for name, tensor in convert(group, model, reader.read_meta).items() if name in parameters}
        if made:
            groups[layer_idx].append(group)
        for name, tensor in made.items():
            tensors[layer_idx][name.removeprefix(f"{layers_path}.{layer_idx}.")] = (tensor.shape, tensor.dtype)
    return [
        LayerTensors(groups=tuple(layer_groups), tensors=layer_tensors)
        for layer_groups, layer_tensors in zip(groups, tensors, strict=True)
    ]


def check_complete(layers: nn.ModuleList, layers_path: str, found: Sequence[LayerTensors], packing: Packing) -> None:
    """Every parameter of every layer must come from the checkpoint, in its own shape, packed or not as it is there."""
    problems = []
    for layer_idx, layer in enumerate(layers):
        tensors = found[layer_idx].tensors
        sources = {group.target: group.sources for group in found[layer_idx].groups}
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            full_name = f"{layers_path}.{layer_idx}.{name}"
            shape = parameter.shape[::-1] if full_name in packing.transposed else parameter.shape
            if name not in tensors:
                problems.append(f"{full_name} is missing from the checkpoint")
            elif tensors[name][0] != shape:
                stored = tuple(tensors[name][0])
                problems.append(f"{full_name} has shape {stored} in the checkpoint, expected {tuple(shape)}")
            elif packing.stored:
                num_packed = sum(source in packing.stored for source in sources.get(full_name, ()))
                expected = full_name in packing.matrices
                if num_packed != expected:
                    problems.append(f"{full_name} is {'not ' if expected else ''}packed to 4 bits in the checkpoint")
    if problems:
        listed = "".join(f"\n- {problem}" for problem in problems)
        raise ValueError(
            f"the checkpoint does not fit the model's {len(layers)} decoder layers:{listed}\nIs its config.json the "
            "one that it was saved with?"
        )
