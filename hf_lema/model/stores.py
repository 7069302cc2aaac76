"""The host store of a model: which tier holds its layers, and how they get there from a checkpoint.

Responsibility: choosing within the RAM budget, filling, and one copy for all processes of a machine. Knows nothing of
modules, slots or autograd.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from hf_lema.config import LemaConfig
from hf_lema.files.checkpoint import read_spans_into
from hf_lema.files.file_set import FileSet, ReadSpan
from hf_lema.files.layout import LayerLayout
from hf_lema.files.pack import PackIndex
from hf_lema.model.packing import cached_pack, find_pack
from hf_lema.model.source import CheckpointSource
from hf_lema.runtime.host_memory import available_host_bytes
from hf_lema.runtime.host_store import MAX_RING_BYTES, DiskStore, HostStore, RamStore, ring_bytes
from hf_lema.runtime.local_ranks import LocalGroup, Offer, share
from hf_lema.runtime.mixed_store import MixedStore, layers_in_ram
from hf_lema.runtime.numa import in_turn, nodes_of_group
from hf_lema.units import GIB, format_bytes

RAM_HEAD_ROOM_BYTES = GIB
"""Left free under ``ram_budget="auto"`` for the process itself and its data workers."""


class StoreMaker:
    """Makes the store of one model on one machine.

    Args:
        layouts: The streamed layers.
        config: The budgets.
        device: Where layers compute.
        source: The checkpoint that the layers come from.
        pack: The layers in a pack; if None, one is made where layers that stay in files need one.
        num_processes: That will share the memory on this machine.
    """

    def __init__(
        self,
        layouts: Mapping[int, LayerLayout],
        config: LemaConfig,
        device: torch.device,
        source: CheckpointSource,
        pack: PackIndex | None = None,
        num_processes: int = 1,
    ) -> None:
        self._nodes = nodes_of_group(device, num_processes)
        self._layouts, self._config, self._device = layouts, config, device
        self._source, self._pack = source, pack
        self._layer_bytes = {i: layout.nbytes for i, layout in layouts.items()}
        budget_bytes = config.ram_budget_bytes
        if config.ram_budget == "auto":
            budget_bytes = available_host_bytes() - RAM_HEAD_ROOM_BYTES
        self._budget_bytes = max(0, budget_bytes or 0)
        stated_bytes = MAX_RING_BYTES if config.ram_budget == "min" else self._budget_bytes // 2
        self._max_ring_bytes = min(MAX_RING_BYTES, stated_bytes)

    def make(self, is_shared: bool = False) -> HostStore:
        """The RAM tier where the layers fit the budget, the disk tier where none does, else some layers in each.

        Args:
            is_shared: Whether other processes will map the memory.
        """
        room_bytes = self._budget_bytes
        if room_bytes < sum(self._layer_bytes.values()) and self._device.type == "cuda":
            room_bytes -= ring_bytes(max(self._layer_bytes.values()), self._max_ring_bytes)
        store = self._over(layers_in_ram(self._layer_bytes, room_bytes), is_shared, None)
        if (slab := slab_of(store)) is not None:
            self._fill(slab)
        return store

    def accept(self, offer: Offer) -> HostStore:
        """The store over memory that another process has filled."""
        if offer.descriptor is None:
            return self._over((), False, None)
        # The same rule on the same bytes chooses the same layers.
        kept = layers_in_ram(self._layer_bytes, os.fstat(offer.descriptor).st_size)
        store = self._over(kept, True, offer.descriptor)
        slab = slab_of(store)
        assert slab is not None
        slab.seal()
        slab.make_read_only()
        return store

    def _over(self, in_ram: Sequence[int], is_shared: bool, descriptor: int | None) -> HostStore:
        ram, disk = (
            {i: layout for i, layout in self._layouts.items() if (i in in_ram) is wanted} for wanted in (True, False)
        )
        if not disk:
            return RamStore(ram, self._device, is_shared=is_shared, of=descriptor)
        spans, files = self._files()
        from_files = DiskStore(disk, spans, self._device, max_ring_bytes=self._max_ring_bytes, files=files)
        if not ram:
            return from_files
        return MixedStore(RamStore(ram, self._device, is_shared=is_shared, of=descriptor), from_files)

    def _files(self) -> tuple[dict[int, Sequence[ReadSpan]], FileSet]:
        """Where each layer's bytes lie, and the open files, in a form that can be read in place."""
        if self._pack is None and self._source.spans is not None:
            spans, files = self._source.spans, self._source.open_files()
        else:
            self._pack = self._pack or cached_pack(self._source)
            spans, files = self._pack.spans, self._pack.open_files()
        return dict(zip(self._layouts, spans, strict=True)), files

    def _fill(self, slab: RamStore) -> None:
        if self._pack is None and self._source.needs_conversion:
            self._pack = find_pack(self._source)
        # A conversion holds a layer of its own, or has threads of its own; plain reads go straight into the slab.
        num_threads = 1 if self._pack is None and self._source.needs_conversion else 4
        with ExitStack() as stack:
            write = self._source.write_layer
            if self._pack is not None:
                spans, files = self._files()
                stack.enter_context(files)

                def write(layer_idx: int, out: torch.Tensor) -> None:
                    read_spans_into(files, spans[layer_idx], out)

            pool = stack.enter_context(
                ThreadPoolExecutor(num_threads, thread_name_prefix="hf_lema-loader", initializer=in_turn(self._nodes))
            )
            loads = [pool.submit(write, i, slab.layer_buffer(i)) for i in slab.layouts]
            for load in tqdm(loads, desc="Loading layers", delay=2, leave=False):
                load.result()
        slab.seal()


def slab_of(store: HostStore) -> RamStore | None:
    """The part of a store that is in RAM."""
    if isinstance(store, MixedStore):
        return store.ram
    return store if isinstance(store, RamStore) else None


def store_of_model(layouts: Mapping[int, LayerLayout], config: LemaConfig, device: torch.device) -> RamStore:
    """An empty store for a model that is in memory already; its layers move there one by one.

    Args:
        layouts: The streamed layers.
        config: The budgets.
        device: Where layers compute.

    Raises:
        ValueError: The layers do not fit the stated ``ram_budget``, and there is no file to leave them in.
    """
    needed_bytes = sum(layout.nbytes for layout in layouts.values())
    budget_bytes = config.ram_budget_bytes
    if config.ram_budget == "auto" or (budget_bytes is not None and needed_bytes <= budget_bytes):
        if (group := LocalGroup.find()) is not None:
            warnings.warn(
                f"each of the {group.size} processes of this machine keeps its own copy of the layers in RAM, "
                f"{format_bytes(needed_bytes)}, because each has built its own model. "
                "LemaModelWrapper.from_pretrained loads them once for all",
                stacklevel=3,
            )
        return RamStore(layouts, device)
    stated = config.ram_budget if budget_bytes is None else format_bytes(budget_bytes)
    raise ValueError(
        f"ram_budget is {stated}, but the streamed layers of this model, which are in memory now, take "
        f"{format_bytes(needed_bytes)}. Use LemaModelWrapper.from_pretrained, which streams them from their files"
    )


def store_from_checkpoint(
    layouts: Mapping[int, LayerLayout],
    config: LemaConfig,
    device: torch.device,
    source: CheckpointSource,
    pack: PackIndex | None = None,
    group: LocalGroup | None = None,
) -> HostStore:
    """The store of a checkpoint's layers, filled; in a group the first process makes it and all map its memory.

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
    maker = StoreMaker(layouts, config, device, source, pack, 1 if group is None else group.size)
    if group is None:
        return maker.make()
    stores: list[HostStore] = []

    def make() -> Offer:
        store = maker.make(is_shared=True)
        stores.append(store)
        slab = slab_of(store)
        return Offer(tier=store.tier, descriptor=None if slab is None else slab.take_descriptor())

    share(
        f"{source.identity[:16]}-{config.quantization}", make, lambda offer: stores.append(maker.accept(offer)), group
    )
    return stores[0]
