"""A decoder layer whose weights are lent to it for each visit.

Responsibility: the class graft, and how one visit goes. Knows nothing of files or threads.

Note [graft]: a layer becomes a proxy by changing its class to a subclass of the one it has, with the same name. Module
paths, adapter keys, attributes and ``isinstance`` checks then stay as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_lema.layer.layer_weights import LayerWeights, StreamedTensor
from hf_lema.layer.recompute import Recompute, Visit
from hf_lema.layer.replay import ForwardHooks, Surroundings
from hf_lema.layer.self_check import CheckedVisit, SelfCheck
from hf_lema.layer.visit_arguments import VisitArguments, held_by_containers
from hf_lema.layer.visit_options import VisitOptions
from hf_lema.runtime.schedule import Direction
from hf_lema.runtime.streamer import LayerStreamer


class LayerProxy(nn.Module):
    """Mixed into the class of a decoder layer by `graft_layer`; see Note [graft]."""

    _lema: ProxyState

    @property
    def gradient_checkpointing(self) -> bool:
        """Always False, whoever sets it: the layer recomputes in any case, a second time would double the bytes."""
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        pass

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        # `.to(device)` moves what is registered; streamed tensors stay on the host.
        with self._lema.streamed_tensors_hidden():
            moved: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return moved

    def __deepcopy__(self, memo: object) -> nn.Module:
        raise TypeError(COPY_MESSAGE)

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError(COPY_MESSAGE)


COPY_MESSAGE = (
    "a wrapped model owns threads and device buffers and cannot be copied or pickled; use save_pretrained, or "
    "LemaModelWrapper.unwrap(model) first"
)


class ProxyState(LayerWeights):
    """What a proxied layer needs to run a visit.

    Args:
        layer_idx: Position of the layer in the model.
        layer: The layer, not yet grafted.
        streamer: Lends the weights.
        streamed: The tensors that are lent.
        config: The model's configuration, for flags that ask inner modules for outputs.
        options: How training visits are run.

    Attributes:
        on_sweep: Called with batch size and sequence length before a training visit (set on the first layer).
        check: Runs the first training visits twice, and compares; None for no check.
    """

    def __init__(
        self,
        layer_idx: int,
        layer: nn.Module,
        streamer: LayerStreamer,
        streamed: tuple[StreamedTensor, ...],
        config: object,
        options: VisitOptions,
    ) -> None:
        super().__init__(layer_idx, layer, streamer, streamed, options)
        self.plain_class: type[nn.Module] = type(layer)
        self.on_sweep: Callable[[int, int], None] | None = None
        self.check: SelfCheck | None = None
        self._arguments = VisitArguments(layer_idx, self.plain_class, config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One visit: plain where no gradient is needed, else through the recompute Function."""
        if not args:
            raise ValueError(
                f"layer {self.layer_idx} ({self.plain_class.__name__}) was called without positional hidden states"
            )
        self.undo_interrupted_swaps()
        surroundings = Surroundings(self.streamer.device)
        try:
            return self._visit(args, kwargs)
        except BaseException:
            surroundings.put_back()
            self.undo_interrupted_swaps()
            raise

    def _visit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.reconcile()
        own = self.own_parameters()
        if self.unmerge_disabled():
            self.reconcile()
            own = self.own_parameters()
        self.bring_to_device(own)
        trainables = [entry for entry in own if entry[2].requires_grad] if torch.is_grad_enabled() else []
        hidden = args[0]
        if self.on_sweep is not None and torch.is_grad_enabled():
            self.on_sweep(hidden.shape[0], hidden.shape[:-1].numel() // max(1, hidden.shape[0]))
        if not (torch.is_grad_enabled() and (trainables or hidden.requires_grad)):
            with self.weights(Direction.FORWARD):
                return self.call_plain(*args, **kwargs)
        others, kwargs = self._arguments.without_cache(args[1:], kwargs)
        self._arguments.refuse_lost_gradients(others, kwargs)
        slots = [(registry, name) for registry, name, _ in trainables]
        hooks = ForwardHooks.capture(self._modules[1:])
        # By name, so that they can be cut; what lies beyond the names of the signature stays positional.
        num_named = self._arguments.num_named
        named = {**dict(self._arguments.named(others[:num_named])), **kwargs}
        is_checked = self.check is not None and self.check.wants(self.layer_idx)
        visit = (CheckedVisit if is_checked else Visit)(
            self,
            others[num_named:],
            named,
            slots,
            hooks,
            self.streamer.device,
            self._options,
            hidden.shape[0],
            self._is_kept(hidden),
        )
        if isinstance(visit, CheckedVisit) and self.check is not None:
            visit.check = self.check
        held = held_by_containers(named)
        outputs = Recompute.apply(  # type: ignore[no-untyped-call]
            visit, hidden, *(parameter for _, _, parameter in trainables)
        )
        self._arguments.refuse_written(held, held_by_containers(named))
        return visit.rebuild(outputs)

    def _is_kept(self, hidden: torch.Tensor) -> bool:
        """Whether a visit keeps its graph for the backward.

        Tiles are recomputed one by one in any case. What is packed to 4 bits is held by bitsandbytes as an attribute
        (see Note [lent memory] of `hf_lema.layer.kept_graph`), so it must lie still.
        """
        if not self._options.kept.wants(self.layer_idx):
            return False
        is_tiled = 0 < self._options.tiles.tile_tokens < hidden.shape[:-1].numel()
        return not is_tiled and (self.stays or not self.is_packed)

    def call_plain(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the forward of the layer's own class: no hooks of the layer fire, no proxy is entered."""
        return self.plain_class.forward(self.layer, *args, **kwargs)


@functools.cache
def _proxy_class(plain_class: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(plain_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._lema.forward(*args, **kwargs)

    body = {"forward": forward, "__module__": plain_class.__module__, "__qualname__": plain_class.__qualname__}
    return type(plain_class.__name__, (LayerProxy, plain_class), body)


def graft_layer(state: ProxyState) -> None:
    """Makes the state's layer a proxy; see Note [graft]."""
    layer = state.layer
    object.__setattr__(layer, "_lema", state)
    layer.__class__ = _proxy_class(state.plain_class)  # type: ignore[arg-type]


def ungraft_layer(layer: nn.Module) -> None:
    """Gives a proxied layer its own class back."""
    state: ProxyState = layer.__dict__.pop("_lema")
    layer.__class__ = state.plain_class
