"""Forward without a graph, backward by recompute: the autograd side of a layer visit.

Responsibility: `Visit` (what a recompute needs) and the autograd Function. Knows nothing of where weights come from.

Note [explicit inputs]: the layer's trainable tensors are inputs of the Function and their gradients its outputs. The
recompute runs on detached aliases of them, so that hooks of the parameters themselves (a user's, or DDP's) fire once,
in the outer graph; and in the forward the aliases need no gradient, so that autocast does not keep a cast of them that
has no graph and use it in a later recompute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from hf_lema.replay import AutocastState, ForwardHooks, RandomState
from hf_lema.schedule import Direction


class StreamedLayer(Protocol):
    """What a visit asks of its layer."""

    layer_idx: int

    def weights(self, direction: Direction, *, expect_backward: bool = False) -> AbstractContextManager[None]:
        """Has the layer's weights on the device for the duration of the block."""

    def call_plain(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the forward of the layer's own class."""


class Visit:
    """Everything that a later recompute of one forward visit needs, besides the hidden states.

    Args:
        layer: The layer.
        args: Positional arguments after the hidden states.
        kwargs: Keyword arguments.
        trainable_slots: (registry, name) of each trainable tensor.
        hooks: Forward hooks under the layer at the time of the visit.
        device: Where the layer computes.
    """

    def __init__(
        self,
        layer: StreamedLayer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        trainable_slots: list[tuple[dict[str, Any], str]],
        hooks: ForwardHooks,
        device: torch.device,
    ) -> None:
        self.layer = layer
        self._args = args
        self._kwargs = kwargs
        self._trainable_slots = trainable_slots
        self._is_tuple = False
        self._num_outputs = 1
        self._tensor_places: list[int] = []
        self._hooks = hooks
        self._rng = RandomState.capture(device)
        self._autocast = AutocastState.capture(device)

    def run(self, hidden: torch.Tensor, trainables: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Calls the layer's own forward with the given trainable tensors registered; returns its tensor outputs."""
        registered = [(registry, name, registry[name]) for registry, name in self._trainable_slots]
        try:
            for (registry, name), alias in zip(self._trainable_slots, trainables, strict=True):
                registry[name] = alias
            output = self.layer.call_plain(hidden, *self._args, **self._kwargs)
        finally:
            for registry, name, parameter in registered:
                registry[name] = parameter
        return self._tensors_of(output)

    def _tensors_of(self, output: Any) -> tuple[torch.Tensor, ...]:
        self._is_tuple = isinstance(output, tuple)
        outputs = output if isinstance(output, tuple) else (output,)
        foreign = [type(o).__name__ for o in outputs if o is not None and not isinstance(o, torch.Tensor)]
        if foreign:
            raise ValueError(
                f"layer {self.layer.layer_idx}: outputs of type {foreign} cannot pass through a streamed layer while "
                "gradients are on; expected tensors or None"
            )
        self._num_outputs = len(outputs)
        self._tensor_places = [i for i, o in enumerate(outputs) if o is not None]
        return tuple(o for o in outputs if o is not None)

    def rebuild(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        """Puts the Function's outputs back into the form in which the layer returns them."""
        if not self._is_tuple:
            return tensors[0]
        outputs: list[torch.Tensor | None] = [None] * self._num_outputs
        for place, tensor in zip(self._tensor_places, tensors, strict=True):
            outputs[place] = tensor
        return tuple(outputs)

    @contextmanager
    def forward_conditions(self) -> Iterator[None]:
        """Random state, autocast and hooks of the forward visit; those outside are untouched."""
        with self._rng.replayed(), self._autocast.entered(), self._hooks.entered():
            yield


class Recompute(torch.autograd.Function):
    """Forward without a graph; backward leases the layer again, recomputes with a graph, and differentiates that."""

    @staticmethod
    def forward(ctx: Any, visit: Visit, hidden: torch.Tensor, *trainables: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.visit = visit
        ctx.set_materialize_grads(False)  # an output that nobody used must give no gradient, not zeros
        ctx.save_for_backward(hidden, *trainables)
        with visit.layer.weights(Direction.FORWARD, expect_backward=True):
            outputs = visit.run(hidden, tuple(t.detach() for t in trainables))
        ctx.mark_non_differentiable(*(o for o in outputs if not o.is_floating_point()))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        visit: Visit = ctx.visit
        hidden, *trainables = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[1])
        aliases = tuple(t.detach().requires_grad_(True) for t in trainables)
        wanted = ([hidden] if hidden.requires_grad else []) + list(aliases)
        with visit.layer.weights(Direction.BACKWARD), torch.enable_grad():
            with visit.forward_conditions():
                outputs = visit.run(hidden, aliases)
            pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if o.requires_grad and g is not None]
            grads = list(
                torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
                if pairs
                else [None] * len(wanted)
            )
        hidden_grad = grads.pop(0) if hidden.requires_grad else None
        return (None, hidden_grad, *grads)
