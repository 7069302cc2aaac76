"""What PEFT's tuner layers inside a decoder layer are set to, and the unmerging that must not wait for a visit.

Responsibility: one seam with ``BaseTunerLayer``. Knows nothing of visits.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import nn


class TunerLayers:
    """Reads and settles the state of tuner layers."""

    def find(self, modules: Iterable[nn.Module]) -> list[nn.Module]:
        """Those among some modules."""
        return [module for module in modules if isinstance(module, BaseTunerLayer)]

    def merged(self, tuners: Sequence[Any]) -> Hashable:
        """Which adapters are merged into which base."""
        return tuple(tuple(tuner.merged_adapters) for tuner in tuners)

    def state(self, tuners: Sequence[Any]) -> Hashable:
        """Which adapters are merged, active and disabled: what decides which of them a forward computes with."""
        return tuple((*tuner.merged_adapters, None, *tuner.active_adapters, tuner.disable_adapters) for tuner in tuners)

    def unmerge_disabled(self, tuners: Sequence[Any]) -> bool:
        """Unmerges, at rest, what a forward would unmerge by itself, in memory that is only lent to it.

        Returns:
            Whether there was any.
        """
        found = [tuner for tuner in tuners if tuner.disable_adapters and tuner.merged_adapters]
        for tuner in found:
            with torch.no_grad(), onload_layer(tuner):
                tuner.unmerge()
        return bool(found)


TUNER_LAYERS = TunerLayers()
