"""Layers of which some are in RAM and the others in their files, for a host that holds most of a model.

Responsibility: which layers are where, and asking the right store. Knows no budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from hf_lema.runtime.host_store import DiskStore, HostStore, RamStore
from hf_lema.runtime.schedule import spread_evenly


def layers_in_ram(layer_bytes: Mapping[int, int], budget_bytes: int) -> tuple[int, ...]:
    """The layers that stay in RAM: as many as fit, with those left in files spread evenly over the depth.

    Between two reads from the disk there are then as many layers as can be, whose computing the reads hide behind.

    Args:
        layer_bytes: Bytes of each streamed layer, by layer index.
        budget_bytes: What the layers may take.

    Returns:
        Layer indices, ascending.
    """
    layers = sorted(layer_bytes)
    for num_left in range(len(layers)):
        left = set(spread_evenly(num_left, len(layers)))
        kept = tuple(layer for i, layer in enumerate(layers) if i not in left)
        if sum(layer_bytes[i] for i in kept) <= budget_bytes:
            return kept
    return ()


class MixedStore(HostStore):
    """A `RamStore` and a `DiskStore` that have the layers between them.

    Args:
        ram: The layers in RAM; owned from here on, and filled by whoever made it.
        disk: The others; owned from here on.
    """

    tier = "mixed"

    def __init__(self, ram: RamStore, disk: DiskStore) -> None:
        super().__init__(dict(sorted({**ram.layouts, **disk.layouts}.items())), ram.device)
        self.ram, self._disk = ram, disk
        self.is_shared = ram.is_shared

    @property
    def pinned_bytes(self) -> int:
        return self.ram.pinned_bytes + self._disk.pinned_bytes

    @property
    def held_bytes(self) -> int:
        return self.ram.held_bytes

    @property
    def file_layers(self) -> tuple[int, ...]:
        return self._disk.file_layers

    @property
    def paths(self) -> frozenset[Path]:
        return self._disk.paths

    def _part(self, layer_idx: int) -> HostStore:
        return self.ram if layer_idx in self.ram.layouts else self._disk

    def host_views(self, layer_idx: int) -> dict[str, torch.Tensor]:
        return self._part(layer_idx).host_views(layer_idx)

    def read_into(self, layer_idx: int, out: torch.Tensor) -> None:
        self._part(layer_idx).read_into(layer_idx, out)
        self.disk_bytes = self._disk.disk_bytes

    def mark_changed(self, layer_idx: int) -> None:
        self._part(layer_idx).mark_changed(layer_idx)

    def mark_if_changed(self, layer_idx: int) -> bool:
        return self._part(layer_idx).mark_if_changed(layer_idx)

    def refuse_cut_files(self) -> None:
        self._disk.refuse_cut_files()

    def close(self) -> None:
        self.ram.close()
        self._disk.close()
        super().close()
