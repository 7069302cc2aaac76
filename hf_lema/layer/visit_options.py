"""How visits are run, and what a visit asks of its layer.

Responsibility: `VisitOptions`, `LayerParts` and the protocol of a layer. Runs nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from hf_lema.layer.boundaries import Boundaries
from hf_lema.layer.joint_casts import plain_linears
from hf_lema.layer.kept_graph import KeptLayers
from hf_lema.layer.micro_batch import MicroBatches
from hf_lema.layer.token_tiles import TokenTiles
from hf_lema.runtime.schedule import Direction


class InputCasts(Protocol):
    """Casts of inputs to the dtype of an adapter's weights, which autocast undoes at once."""

    def find(self, modules: Iterable[nn.Module]) -> Sequence[nn.Module]:
        """The modules that make such casts."""

    def left_out(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Leaves their casts out for the duration of the block."""


class Adapters(Protocol):
    """What the adapters under a layer are set to."""

    def find(self, modules: Iterable[nn.Module]) -> Sequence[nn.Module]:
        """The modules that hold them."""

    def merged(self, modules: Sequence[nn.Module]) -> Hashable:
        """Which are merged into the base."""

    def state(self, modules: Sequence[nn.Module]) -> Hashable:
        """Which are merged, active and disabled."""

    def unmerge_disabled(self, modules: Sequence[nn.Module]) -> bool:
        """Unmerges what a forward would unmerge by itself; whether there was any."""


class LayerParts:
    """The modules of a layer that a visit treats by themselves.

    Args:
        modules: All modules of the layer.
        input_casts: Finds those that cast their inputs.
        adapters: Finds those that hold adapters.

    Attributes:
        modules: As given.
        tuners: Those that hold adapters.
        linears: See `JointCasts`.
        dropouts: See `PieceDraws`.
        input_casters: As found.
    """

    def __init__(
        self, modules: Sequence[nn.Module], input_casts: InputCasts | None = None, adapters: Adapters | None = None
    ) -> None:
        self.modules = modules
        self.tuners = [] if adapters is None else adapters.find(modules)
        self.linears = plain_linears(modules)
        self.dropouts = [module for module in modules if type(module) is nn.Dropout]
        self.input_casters = [] if input_casts is None else input_casts.find(modules)


class StreamedLayer(Protocol):
    """What a visit asks of its layer."""

    layer_idx: int
    layer: nn.Module

    @property
    def parts(self) -> LayerParts:
        """What a visit treats by itself."""

    def weights(self, direction: Direction, *, expect_backward: bool = False) -> AbstractContextManager[None]:
        """Has the layer's weights on the device for the duration of the block."""

    def swapped(
        self, entries: Sequence[tuple[dict[str, Any], str, Any]], stand_ins: Sequence[Any]
    ) -> AbstractContextManager[None]:
        """Registers stand-ins for the duration of the block."""

    def call_plain(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the forward of the layer's own class."""

    def undo_interrupted_swaps(self) -> None:
        """Registers again what an interrupt in the clean-up of `swapped` has left out."""

    @property
    def stays(self) -> bool:
        """Whether its weights are lent to every visit in the same memory."""

    def lent(self) -> Sequence[torch.Tensor]:
        """The tensors that are lent to the visit under way, always in the same order."""

    def copied(self) -> AbstractContextManager[None]:
        """Registers copies of the lent tensors for the duration of the block, and overwrites them at its end."""


@dataclass(frozen=True)
class VisitOptions:
    """How visits are run; shared by all layers of a model. Each may be changed between steps.

    Attributes:
        micro_batches: How visits are cut along the batch.
        tiles: How the token-wise part of a layer is cut along the tokens.
        boundaries: Where hidden states wait for the backward, if not in device memory.
        input_casts: Casts that may be left out where the numbers do not change; None for none.
        kept: Layers whose visits keep their graphs.
        adapters: What adapters are set to; None where there are none to ask.
    """

    micro_batches: MicroBatches
    tiles: TokenTiles
    boundaries: Boundaries
    input_casts: InputCasts | None = None
    kept: KeptLayers = field(default_factory=KeptLayers)
    adapters: Adapters | None = None
