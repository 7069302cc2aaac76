"""Forward without a graph, backward by recompute: the autograd side of a layer visit.

Responsibility: `Visit` (what a recompute needs) and the autograd Function. Knows nothing of where weights come from.

Note [explicit inputs]: the layer's trainable tensors are inputs of the Function and their gradients its outputs. The
recompute runs on detached aliases of them, so that hooks of the parameters themselves (a user's, or DDP's) fire once,
in the outer graph; and in the forward the aliases need no gradient, so that autocast does not keep a cast of them that
has no graph and use it in a later recompute.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hf_lema.layer.boundaries import Boundaries
from hf_lema.layer.micro_batch import MicroBatches, Piece
from hf_lema.layer.replay import AutocastState, ForwardHooks, RandomState
from hf_lema.layer.token_tiles import TokenTiles
from hf_lema.runtime.schedule import Direction


class StreamedLayer(Protocol):
    """What a visit asks of its layer."""

    layer_idx: int
    layer: nn.Module

    def weights(self, direction: Direction, *, expect_backward: bool = False) -> AbstractContextManager[None]:
        """Has the layer's weights on the device for the duration of the block."""

    def swapped(
        self, entries: Sequence[tuple[dict[str, Any], str, Any]], stand_ins: Sequence[Any]
    ) -> AbstractContextManager[None]:
        """Registers stand-ins for the duration of the block."""

    def call_plain(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the forward of the layer's own class."""


@dataclass(frozen=True)
class VisitOptions:
    """How visits are run; shared by all layers of a model. Each may be changed between steps.

    Attributes:
        micro_batches: How visits are cut along the batch.
        tiles: How the token-wise part of a layer is cut along the tokens.
        boundaries: Where hidden states wait for the backward, if not in device memory.
    """

    micro_batches: MicroBatches
    tiles: TokenTiles
    boundaries: Boundaries


class Visit:
    """Everything that a later recompute of one forward visit needs, besides the hidden states.

    Args:
        layer: The layer.
        args: Positional arguments after the hidden states that have no name; with any, the batch is not cut.
        kwargs: Arguments by name.
        trainable_slots: (registry, name) of each trainable tensor.
        hooks: Forward hooks under the layer at the time of the visit.
        device: Where the layer computes.
        options: How visits are run.
        batch_size: Sequences in the batch.
    """

    def __init__(
        self,
        layer: StreamedLayer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        trainable_slots: list[tuple[dict[str, Any], str]],
        hooks: ForwardHooks,
        device: torch.device,
        options: VisitOptions,
        batch_size: int,
    ) -> None:
        self.layer = layer
        self.options = options
        self._tile_tokens = options.tiles.tile_tokens  # the recompute must draw what the forward drew
        self._args = args
        self._named = kwargs
        self._batch_size = batch_size
        self._pieces: list[Piece] = []
        self._trainable_slots = trainable_slots
        self._is_tuple = False
        self._num_outputs = 1
        self._tensor_places: list[int] = []
        self._hooks = hooks
        self._rng = RandomState.capture(device)
        self._autocast = AutocastState.capture(device)

    def run(
        self, hidden: torch.Tensor, trainables: tuple[torch.Tensor, ...], piece: Piece | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Calls the layer's own forward with the given trainable tensors registered; returns its tensor outputs.

        Args:
            hidden: Hidden states of the whole batch, or of the piece.
            trainables: Stand-ins for the trainable tensors, in the order of `trainable_slots`.
            piece: Which part of the batch the other arguments are cut to; None for all of it.
        """
        named = self._named if piece is None else piece.cut_named(self._named, self._batch_size)
        registered = [(registry, name, registry[name]) for registry, name in self._trainable_slots]
        tiles = self.options.tiles.entered(self.layer.layer, hidden, self._tile_tokens)
        with self.layer.swapped(registered, trainables), tiles:
            output = self.layer.call_plain(hidden, *self._args, **named)
        return self._tensors_of(output)

    def run_forward(self, hidden: torch.Tensor, trainables: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The forward visit, piece by piece; the pieces are remembered for the recompute."""
        if not self._args:
            self._pieces = self.options.micro_batches.pieces(
                self.layer.layer, hidden, self._named, lambda part, named: self.layer.call_plain(part, **named)
            )
        if not self.is_cut:
            return self.run(hidden, trainables)
        whole: list[torch.Tensor] = []
        for piece in self._pieces:
            outputs = self.run(hidden[piece.begin : piece.end], trainables, piece)
            if not whole:
                whole = [o.new_empty((self._batch_size, *o.shape[1:])) for o in outputs]
            for target, output in zip(whole, outputs, strict=True):
                target[piece.begin : piece.end] = output
        return tuple(whole)

    @property
    def is_cut(self) -> bool:
        """Whether the visit is cut into pieces."""
        return len(self._pieces) > 1

    def gradients(
        self, hidden: torch.Tensor, trainables: tuple[torch.Tensor, ...], grad_outputs: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """Recomputes the visit and differentiates it.

        Args:
            hidden: Hidden states, detached; whether it needs a gradient says whether one is computed.
            trainables: Detached aliases that need a gradient.
            grad_outputs: Gradients of the tensor outputs, None for one that nobody used.

        Returns:
            The gradient of the hidden states (None if not needed), then those of the trainable tensors.
        """
        with self._rng.replayed(), self._hooks.entered():
            if not self.is_cut:
                return self._piece_gradients(hidden, trainables, grad_outputs, None)
            hidden_grad = torch.empty_like(hidden) if hidden.requires_grad else None
            sums: list[torch.Tensor | None] = [None] * len(trainables)
            for piece in self._pieces:
                part = hidden[piece.begin : piece.end].detach().requires_grad_(hidden.requires_grad)
                parts = tuple(None if g is None else g[piece.begin : piece.end] for g in grad_outputs)
                part_grad, *grads = self._piece_gradients(part, trainables, parts, piece)
                if hidden_grad is not None:
                    if part_grad is None:
                        hidden_grad[piece.begin : piece.end].zero_()
                    else:
                        hidden_grad[piece.begin : piece.end] = part_grad
                sums = [g if s is None else s if g is None else s + g for s, g in zip(sums, grads, strict=True)]
            return [hidden_grad, *sums]

    def _piece_gradients(
        self,
        hidden: torch.Tensor,
        trainables: tuple[torch.Tensor, ...],
        grad_outputs: tuple[torch.Tensor | None, ...],
        piece: Piece | None,
    ) -> list[torch.Tensor | None]:
        with self._autocast.entered():
            outputs = self.run(hidden, trainables, piece)
        pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if o.requires_grad and g is not None]
        wanted = ([hidden] if hidden.requires_grad else []) + list(trainables)
        if not pairs:
            return [None] * (1 + len(trainables))
        grads: list[torch.Tensor | None] = list(
            torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        )
        return grads if hidden.requires_grad else [None, *grads]

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


class Recompute(torch.autograd.Function):
    """Forward without a graph; backward leases the layer again, recomputes with a graph, and differentiates that."""

    @staticmethod
    def forward(ctx: Any, visit: Visit, hidden: torch.Tensor, *trainables: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.visit = visit
        ctx.set_materialize_grads(False)  # an output that nobody used must give no gradient, not zeros
        boundaries = visit.options.boundaries
        # A layer's input is contiguous; one that is not would come back with other strides, so it stays.
        leaves = boundaries.in_use and hidden.is_contiguous() and hidden.numel() > 0
        ctx.boundaries = boundaries if leaves else None
        saved = boundaries.keep(hidden) if leaves else hidden
        ctx.save_for_backward(saved, *trainables)
        with visit.layer.weights(Direction.FORWARD, expect_backward=True):
            outputs = visit.run_forward(hidden, tuple(t.detach() for t in trainables))
        ctx.mark_non_differentiable(*(o for o in outputs if not o.is_floating_point()))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        visit: Visit = ctx.visit
        saved, *trainables = ctx.saved_tensors
        hidden = saved if ctx.boundaries is None else ctx.boundaries.bring(saved)
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[1])
        aliases = tuple(t.detach().requires_grad_(True) for t in trainables)
        with visit.layer.weights(Direction.BACKWARD), torch.enable_grad():
            grads = visit.gradients(hidden, aliases, grad_outputs)
        return (None, *grads)
