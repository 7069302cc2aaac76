"""Which tensors are streamed, on which tier they rest, and how they get there.

Responsibility: choosing, laying out and filling the store, from a built model or from a checkpoint. Knows nothing of
slots, threads of the runtime, or autograd.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from hf_lema.config import LemaConfig
from hf_lema.host_memory import available_host_bytes
from hf_lema.host_store import DiskStore, HostStore, RamStore
from hf_lema.layer_proxy import StreamedTensor
from hf_lema.layout import LayerLayout, make_layout
from hf_lema.packing import cached_pack
from hf_lema.source import CheckpointSource
from hf_lema.units import GIB, format_bytes

RAM_HEAD_ROOM_BYTES = GIB
"""Left free under ``ram_budget="auto"`` for the process itself and its data workers."""


def streamed_tensors(
    lm: PreTrainedModel, layers: nn.ModuleList
) -> dict[int, tuple[LayerLayout, tuple[StreamedTensor, ...]]]:
    """Chooses what to stream: frozen base tensors of decoder layers that are registered in one place only.

    Adapters and what PEFT keeps beside the base are never streamed, whether they train now or not; a tensor that two
    modules share stays on the device, because the layers' stores would break the tie.

    Returns:
        Layer index -> (layout, places); layers with nothing to stream are left out.
    """
    counts = Counter(
        id(parameter) for module in lm.modules() for parameter in module._parameters.values() if parameter is not None
    )
    chosen = {}
    for layer_idx, layer in enumerate(layers):
        adapters = _adapter_parameters(layer)
        places = [
            StreamedTensor(f"{prefix}.{attribute}" if prefix else attribute, module, attribute)
            for prefix, module in layer.named_modules()
            for attribute, parameter in module._parameters.items()
            if parameter is not None
            and not parameter.requires_grad
            and counts[id(parameter)] == 1
            and id(parameter) not in adapters
        ]
        if places:
            tensors = {place.name: _registered(place) for place in places}
            layout = make_layout(layer_idx, {name: (t.shape, t.dtype) for name, t in tensors.items()})
            chosen[layer_idx] = (layout, tuple(places))
    return chosen


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


def choose_store(
    layouts: Mapping[int, LayerLayout],
    config: LemaConfig,
    device: torch.device,
    source: CheckpointSource | None,
) -> HostStore:
    """The RAM tier where the layers fit the budget, else the disk tier.

    Args:
        layouts: The streamed layers.
        config: The budgets.
        device: Where layers compute.
        source: The checkpoint that the layers come from; None for a model that is already in memory.

    Raises:
        ValueError: A model that is already in memory does not fit the stated ``ram_budget``.
    """
    needed_bytes = sum(layout.nbytes for layout in layouts.values())
    budget_bytes = config.ram_budget_bytes
    if config.ram_budget == "auto":
        # A model that is already in RAM is moved, layer by layer, not copied.
        budget_bytes = needed_bytes if source is None else available_host_bytes() - RAM_HEAD_ROOM_BYTES
    if budget_bytes is not None and needed_bytes <= budget_bytes:
        return RamStore(layouts, device)
    if source is None:
        stated = config.ram_budget if budget_bytes is None else format_bytes(budget_bytes)
        raise ValueError(
            f"ram_budget is {stated}, but the streamed layers of this model, which are in memory now, take "
            f"{format_bytes(needed_bytes)}. Use LemaModelWrapper.from_pretrained, which streams them from their files"
        )
    ring_bytes = {} if budget_bytes is None else {"max_ring_bytes": max(0, budget_bytes // 2)}
    if source.spans is not None:
        spans, files = source.spans, source.open_files()
    else:
        pack = cached_pack(source)
        spans, files = pack.spans, pack.open_files()
    return DiskStore(layouts, dict(zip(layouts, spans, strict=True)), device, files=files, **ring_bytes)


def fill_from_model(store: HostStore, streamed: Mapping[int, tuple[LayerLayout, tuple[StreamedTensor, ...]]]) -> None:
    """Moves a built model's tensors into the store; the same Parameter objects then rest on its memory."""
    assert isinstance(store, RamStore)
    with torch.no_grad():
        for layer_idx, (_, places) in streamed.items():
            views = store.host_views(layer_idx)
            for place in places:
                parameter = _registered(place)
                views[place.name].copy_(parameter.data)
                parameter.data = views[place.name]
    store.seal()


def fill_from_checkpoint(
    store: HostStore, source: CheckpointSource, layers: nn.ModuleList
) -> dict[int, tuple[StreamedTensor, ...]]:
    """Reads the layers into the RAM tier (the disk tier needs nothing) and registers the weights at rest.

    Returns:
        Layer index -> where each streamed tensor is registered.
    """
    if isinstance(store, RamStore):
        # A conversion holds a layer of its own; reads in place go straight into the slab.
        num_threads = 1 if source.needs_conversion else 4
        with ThreadPoolExecutor(num_threads, thread_name_prefix="hf_lema-loader") as pool:
            loads = [pool.submit(source.write_layer, i, store.layer_buffer(i)) for i in store.layouts]
            for load in tqdm(loads, desc="Loading layers", delay=2, leave=False):
                load.result()
        store.seal()
    source.close()
    places = {}
    for layer_idx in store.layouts:
        views = store.host_views(layer_idx)
        places[layer_idx] = tuple(_register(layers[layer_idx], name, view) for name, view in views.items())
    return places


def _register(layer: nn.Module, name: str, view: torch.Tensor) -> StreamedTensor:
    path, _, attribute = name.rpartition(".")
    owner = layer.get_submodule(path)
    owner._parameters[attribute] = nn.Parameter(view, requires_grad=False)
    return StreamedTensor(name, owner, attribute)
