"""Which tensors are streamed, on which tier they rest, and how they get there.

Responsibility: choosing, laying out and filling the store, from a built model or from a checkpoint. Knows nothing of
slots, threads of the runtime, or autograd.

Note [vectors]: in a packed model the tensors of decoder layers with one dimension, norms and biases, are not streamed
but stay on the device: 0.5 MB of Llama-2-7B. ``prepare_model_for_kbit_training`` turns them to float32, and the linear
of bitsandbytes its bias to the compute dtype, for good; both would write past a slot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from hf_lema.config import LemaConfig
from hf_lema.files.layout import LayerLayout, PackedMatrix, make_layout
from hf_lema.layer.layer_weights import StreamedTensor, rest
from hf_lema.model.stock_quantizer import (
    make_quantizer,
    mark_as_packed,
    matrices_of,
    put_in_packed_linears,
    transposed_weights,
)
from hf_lema.runtime.host_store import HostStore, RamStore


def streamed_tensors(
    lm: PreTrainedModel, layers: nn.ModuleList
) -> dict[int, tuple[LayerLayout, tuple[StreamedTensor, ...]]]:
    """Chooses what to stream: frozen base tensors of decoder layers that are registered in one place only.

    Adapters and what PEFT keeps beside the base are never streamed, whether they train now or not; a tensor that two
    modules share stays on the device, because the layers' stores would break the tie. See Note [vectors] for what stays
    in a packed model.

    Returns:
        Layer index -> (layout, places); layers with nothing to stream are left out.
    """
    counts = Counter(
        id(parameter) for module in lm.modules() for parameter in module._parameters.values() if parameter is not None
    )
    keeps_vectors = any(is_packed(parameter) for parameter in lm.parameters())
    chosen = {}
    for layer_idx, layer in enumerate(layers):
        adapters = _adapter_parameters(layer)
        places = [
            _place(f"{prefix}.{attribute}" if prefix else attribute, module, attribute)
            for prefix, module in layer.named_modules()
            for attribute, parameter in module._parameters.items()
            if parameter is not None
            and not parameter.requires_grad
            and counts[id(parameter)] == 1
            and id(parameter) not in adapters
            and not (keeps_vectors and parameter.dim() <= 1)
        ]
        if places:
            chosen[layer_idx] = (_layout_of(layer_idx, places), tuple(places))
    return chosen


def is_packed(parameter: torch.Tensor) -> bool:
    """Whether a parameter is bitsandbytes' of 4 bits. By name: bitsandbytes is not needed where there is none."""
    return type(parameter).__name__ == "Params4bit"


def _place(name: str, owner: nn.Module, attribute: str) -> StreamedTensor:
    parameter = owner._parameters[attribute]
    if parameter is None or not is_packed(parameter):
        return StreamedTensor(name, owner, attribute)
    from hf_lema.runtime.quantization import matrix_of

    packed: Any = parameter
    return StreamedTensor(name, owner, attribute, matrix_of(name, packed))


def _layout_of(layer_idx: int, places: Sequence[StreamedTensor]) -> LayerLayout:
    tensors: dict[str, tuple[Sequence[int], torch.dtype]] = {}
    for place in places:
        parameter = _registered(place)
        tensors |= {place.name: (parameter.shape, parameter.dtype)} if place.matrix is None else place.matrix.tensors()
    return make_layout(layer_idx, tensors, [place.matrix for place in places if place.matrix is not None])


def _registered(place: StreamedTensor) -> nn.Parameter:
    parameter = place.owner._parameters[place.attribute]
    assert parameter is not None
    return parameter


def _adapter_parameters(layer: nn.Module) -> set[int]:
    """Ids of the parameters that PEFT has put into a layer."""
    found: set[int] = set()
    for module in layer.modules():
        if isinstance(module, BaseTunerLayer):
            base = {id(parameter) for parameter in module.get_base_layer().parameters()}
            found |= {id(parameter) for parameter in module.parameters()} - base
        elif isinstance(module, AuxiliaryTrainingWrapper):
            base = {id(parameter) for parameter in module.original_module.parameters()}
            found |= {id(parameter) for parameter in module.parameters()} - base
    return found


def pack_linears(lm: PreTrainedModel, layers_path: str, config: LemaConfig, device: torch.device) -> None:
    """Packs the linears of a built model's decoder layers, one at a time; each original is dropped before the next.

    Raises:
        ValueError: The model has adapters already: PEFT chose their kind for full-precision linears.
    """
    if any(isinstance(module, BaseTunerLayer) for module in lm.modules()):
        raise ValueError(
            "the model has adapters, which PEFT made for full-precision linears: wrap the base model with "
            f"quantization={config.quantization!r} first, then get_peft_model"
        )
    from hf_lema.runtime.quantization import quantize, register_packed

    quantizer = make_quantizer(lm.dtype, config.double_quantization, device=device)
    originals = put_in_packed_linears(lm, layers_path, quantizer)
    transposed = transposed_weights(originals)
    matrices = matrices_of(originals, layers_path, lm.dtype, config.double_quantization)
    for path in tqdm(list(originals), desc="Packing linears", delay=2, leave=False):
        name = f"{path}.weight"
        weight = originals.pop(path)._parameters["weight"]
        assert weight is not None
        matrix = replace(matrices[name], dtype=weight.dtype)
        parts = {part: torch.empty(shape, dtype=dtype) for part, (shape, dtype) in matrix.tensors().items()}
        quantize(matrix, weight.data.T if name in transposed else weight.data, parts, device)
        register_packed(matrix, parts, lm.get_submodule(path))
    mark_as_packed(lm, quantizer, lm.dtype)


def fill_from_model(store: HostStore, streamed: Mapping[int, tuple[LayerLayout, tuple[StreamedTensor, ...]]]) -> None:
    """Moves a built model's tensors into the store; the same Parameter objects then rest on its memory."""
    assert isinstance(store, RamStore)
    with torch.no_grad():
        for layer_idx, (_, places) in tqdm(streamed.items(), desc="Moving layers", delay=2, leave=False):
            views = store.host_views(layer_idx)
            for place in places:
                rest(place, views)
    store.seal()


def register_at_rest(store: HostStore, layers: nn.ModuleList) -> dict[int, tuple[StreamedTensor, ...]]:
    """Registers the store's tensors in the model.

    Returns:
        Layer index -> where each streamed tensor is registered.
    """
    packs_linears = any(layout.packed for layout in store.layouts.values())
    places = {}
    for layer_idx, layout in store.layouts.items():
        views = store.host_views(layer_idx)
        matrices = {matrix.name: matrix for matrix in layout.packed}
        parts = {name for matrix in layout.packed for name in matrix.tensors()}
        found = []
        for name, view in views.items():
            if name in matrices:
                found.append(_register_packed(layers[layer_idx], matrices[name], views))
            elif packs_linears and view.dim() <= 1 and name not in parts:
                _register(layers[layer_idx], name, view.to(store.device, copy=True))  # see Note [vectors]
            elif name not in parts:
                found.append(_register(layers[layer_idx], name, view))
        places[layer_idx] = tuple(found)
    return places


def _register(layer: nn.Module, name: str, tensor: torch.Tensor) -> StreamedTensor:
    path, _, attribute = name.rpartition(".")
    owner = layer.get_submodule(path)
    owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    return StreamedTensor(name, owner, attribute)


def _register_packed(layer: nn.Module, matrix: PackedMatrix, views: Mapping[str, torch.Tensor]) -> StreamedTensor:
    from hf_lema.runtime.quantization import register_packed

    path, _, attribute = matrix.name.rpartition(".")
    owner = layer.get_submodule(path)
    register_packed(matrix, views, owner)
    return StreamedTensor(matrix.name, owner, attribute, matrix)
