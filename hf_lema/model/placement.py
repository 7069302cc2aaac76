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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from hf_lema.config import LemaConfig
from hf_lema.files.checkpoint import read_spans_into
from hf_lema.files.layout import LayerLayout, PackedMatrix, make_layout
from hf_lema.files.pack import PackIndex
from hf_lema.layer.layer_proxy import StreamedTensor, rest
from hf_lema.model.packing import cached_pack, find_pack
from hf_lema.model.source import CheckpointSource
from hf_lema.model.stock_quantizer import (
    make_quantizer,
    mark_as_packed,
    matrices_of,
    put_in_packed_linears,
    transposed_weights,
)
from hf_lema.runtime.host_memory import available_host_bytes
from hf_lema.runtime.host_store import DiskStore, HostStore, RamStore
from hf_lema.runtime.local_ranks import LocalGroup, Offer, share
from hf_lema.units import GIB, format_bytes

RAM_HEAD_ROOM_BYTES = GIB
"""Left free under ``ram_budget="auto"`` for the process itself and its data workers."""


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

    quantizer = make_quantizer(lm.dtype, config.double_quantization)
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


def choose_store(
    layouts: Mapping[int, LayerLayout],
    config: LemaConfig,
    device: torch.device,
    source: CheckpointSource | None,
    pack: PackIndex | None = None,
    is_shared: bool = False,
) -> HostStore:
    """The RAM tier where the layers fit the budget, else the disk tier.

    Args:
        layouts: The streamed layers.
        config: The budgets.
        device: Where layers compute.
        source: The checkpoint that the layers come from; None for a model that is already in memory.
        pack: The layers in a pack; if None, one is made where the disk tier needs one.
        is_shared: Whether other processes will map the RAM tier's memory.

    Raises:
        ValueError: A model that is already in memory does not fit the stated ``ram_budget``.
    """
    needed_bytes = sum(layout.nbytes for layout in layouts.values())
    budget_bytes = config.ram_budget_bytes
    if config.ram_budget == "auto":
        # A model that is already in RAM is moved, layer by layer, not copied.
        budget_bytes = needed_bytes if source is None else available_host_bytes() - RAM_HEAD_ROOM_BYTES
    if budget_bytes is not None and needed_bytes <= budget_bytes:
        return RamStore(layouts, device, is_shared=is_shared)
    if source is None:
        stated = config.ram_budget if budget_bytes is None else format_bytes(budget_bytes)
        raise ValueError(
            f"ram_budget is {stated}, but the streamed layers of this model, which are in memory now, take "
            f"{format_bytes(needed_bytes)}. Use LemaModelWrapper.from_pretrained, which streams them from their files"
        )
    ring_bytes = {} if budget_bytes is None else {"max_ring_bytes": max(0, budget_bytes // 2)}
    if pack is None and source.spans is not None:
        spans, files = source.spans, source.open_files()
    else:
        pack = pack or cached_pack(source)
        spans, files = pack.spans, pack.open_files()
    return DiskStore(layouts, dict(zip(layouts, spans, strict=True)), device, files=files, **ring_bytes)


def fill_from_model(store: HostStore, streamed: Mapping[int, tuple[LayerLayout, tuple[StreamedTensor, ...]]]) -> None:
    """Moves a built model's tensors into the store; the same Parameter objects then rest on its memory."""
    assert isinstance(store, RamStore)
    with torch.no_grad():
        for layer_idx, (_, places) in streamed.items():
            views = store.host_views(layer_idx)
            for place in places:
                rest(place, views)
    store.seal()


def store_from_checkpoint(
    layouts: Mapping[int, LayerLayout],
    config: LemaConfig,
    device: torch.device,
    source: CheckpointSource,
    pack: PackIndex | None = None,
    group: LocalGroup | None = None,
) -> HostStore:
    """The tier that fits, filled; in a group of processes the first chooses and fills, and all map its memory.

    Args:
        layouts: The streamed layers.
        config: The budgets.
        device: Where layers compute.
        source: The checkpoint that the layers come from.
        pack: The layers in a pack.
        group: The processes of this machine that load the same model; None for a process alone.

    Raises:
        RuntimeError: The first process failed, or loads another model.
    """
    if group is None:
        return _filled(choose_store(layouts, config, device, source, pack), source, pack)
    stores: list[HostStore] = []

    def make() -> Offer:
        store = _filled(choose_store(layouts, config, device, source, pack, is_shared=True), source, pack)
        stores.append(store)
        return Offer(tier=store.tier, descriptor=store.take_descriptor() if isinstance(store, RamStore) else None)

    def accept(offer: Offer) -> None:
        if offer.descriptor is None:
            disk_only = replace(config, ram_budget="min")
            stores.append(choose_store(layouts, disk_only, device, source, pack))
        else:
            store = RamStore(layouts, device, is_shared=True, of=offer.descriptor)
            store.seal()
            stores.append(store)

    share(f"{source.identity[:16]}-{config.quantization}", make, accept, group)
    return stores[0]


def _filled(store: HostStore, source: CheckpointSource, pack: PackIndex | None) -> HostStore:
    if isinstance(store, RamStore):
        if pack is None and source.needs_conversion:
            pack = find_pack(source)
        _fill_slab(store, source, pack)
    return store


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


def _fill_slab(store: RamStore, source: CheckpointSource, pack: PackIndex | None) -> None:
    # A conversion holds a layer of its own, or has threads of its own; plain reads go straight into the slab.
    num_threads = 1 if pack is None and source.needs_conversion else 4
    with ExitStack() as stack:
        write = source.write_layer
        if pack is not None:
            files, spans = stack.enter_context(pack.open_files()), dict(zip(store.layouts, pack.spans, strict=True))

            def write(layer_idx: int, out: torch.Tensor) -> None:
                read_spans_into(files, spans[layer_idx], out)

        pool = stack.enter_context(ThreadPoolExecutor(num_threads, thread_name_prefix="hf_lema-loader"))
        loads = [pool.submit(write, i, store.layer_buffer(i)) for i in store.layouts]
        for load in tqdm(loads, desc="Loading layers", delay=2, leave=False):
            load.result()
    store.seal()


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
