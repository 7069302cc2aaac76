"""Forward without a graph, backward by recompute: the autograd side of a layer visit.

Responsibility: `Visit` (what a recompute needs) and the autograd Function. Knows nothing of where weights come from.

Note [explicit inputs]: the layer's trainable tensors are inputs of the Function and their gradients its outputs. The
recompute runs on detached aliases of them, so that hooks of the parameters themselves (a user's, or DDP's) fire once,
in the outer graph; and in the forward the aliases need no gradient, so that autocast does not keep a cast of them that
has no graph and use it in a later recompute.

A visit that is kept makes its graph in the forward, and on aliases too, of its own: autocast then keeps casts of them
that have a graph, all pieces of the visit use these as they are, and no other visit finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hf_lema.layer.joint_casts import JointCasts, summed
from hf_lema.layer.kept_graph import KeptGraph, LentMemory, WrittenError
from hf_lema.layer.micro_batch import Piece
from hf_lema.layer.piece_draws import DrawsElsewhereError, PieceDraws, active_dropouts
from hf_lema.layer.replay import AutocastState, ForwardHooks, RandomState, Surroundings
from hf_lema.layer.swaps import changed
from hf_lema.layer.visit_options import StreamedLayer, VisitOptions
from hf_lema.runtime.schedule import Direction


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
        is_kept: Whether the forward's graph is kept for the backward.
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
        is_kept: bool = False,
    ) -> None:
        self.layer = layer
        self.options = options
        self.is_kept = is_kept
        self._graph: KeptGraph | None = None
        self._tile_tokens = options.tiles.tile_tokens  # the recompute must draw what the forward drew
        self._args = args
        self._named = kwargs
        self._batch_size = batch_size
        self._pieces: list[Piece] = []
        self._draws: PieceDraws | None = None
        self._are_inputs_cast = True
        self._trainable_slots = trainable_slots
        self._is_tuple = False
        self._num_outputs = 1
        self._tensor_places: list[int] = []
        self._hooks = hooks
        self._rng = RandomState.capture(device)
        self._autocast = AutocastState.capture(device)
        self._modules = layer.parts.modules
        self._training = [module.training for module in self._modules]
        self._adapters = self._adapter_state()
        self.device = device

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
        dropouts = self._cut(hidden)
        cut = self.options.micro_batches
        with self._casts_entered(trainables):
            if not self.is_cut:
                return self.run(hidden, trainables)
            pieces = self._pieces
            groups = cut.groups(self.layer.layer, pieces)
            # Tiles are recomputed by themselves in the backward, out of the order in which they drew.
            if len(groups) == len(pieces) or self._tile_tokens or self.is_kept:
                return self._run_pieces(hidden, trainables, [[piece] for piece in pieces])
            self._draws = PieceDraws(self.device, dropouts, cut.is_verified)
            try:
                return self._run_pieces(hidden, trainables, groups)
            except DrawsElsewhereError:
                cut.keep_apart(self.layer.layer)
            self._draws = None
            self._rng.restore()
            return self._run_pieces(hidden, trainables, [[piece] for piece in pieces])

    def run_kept(
        self, hidden: torch.Tensor, trainables: tuple[torch.Tensor, ...], needs_gradient: bool
    ) -> tuple[torch.Tensor, ...]:
        """The forward visit with a graph, which `gradients` differentiates instead of a recompute's.

        Args:
            hidden: Hidden states of the whole batch.
            trainables: The trainable tensors; the graph is made on aliases of them.
            needs_gradient: Whether the hidden states get one.

        Returns:
            The tensor outputs, without their graph.
        """
        self._cut(hidden)
        hidden = hidden.detach()
        aliases = tuple(t.detach().requires_grad_() for t in trainables)
        proofs = self.options.kept.proofs(self.layer.layer_idx)
        is_proven = self.layer.stays or self._trained in proofs
        with nullcontext() if is_proven else self.layer.copied():
            memory = LentMemory(self.layer.lent())
            with torch.enable_grad(), self._casts_entered(aliases) as casts, memory.saving():
                graph = KeptGraph(memory, aliases, casts, proofs, is_proven)
                for piece in self._pieces if self.is_cut else [None]:
                    part = hidden if piece is None else hidden[piece.begin : piece.end]
                    part = part.detach().requires_grad_(needs_gradient)
                    graph.parts.append((part, self.run(part, aliases, piece)))
        self._graph = graph
        outputs = [outputs for _, outputs in graph.parts]
        if not self.is_cut:
            return tuple(output.detach() for output in outputs[0])
        return tuple(torch.cat([output.detach() for output in same]) for same in zip(*outputs, strict=True))

    def _adapter_state(self) -> Hashable:
        adapters = self.options.adapters
        return None if adapters is None else adapters.state(self.layer.parts.tuners)

    @property
    def _trained(self) -> tuple[tuple[int, str], ...]:
        return tuple((id(registry), name) for registry, name in self._trainable_slots)

    def _cut(self, hidden: torch.Tensor) -> tuple[nn.Dropout, ...]:
        """Decides in which pieces the visit is computed; the dropouts that draw in it."""
        if not self._args:
            self._pieces = self.options.micro_batches.pieces(
                self.layer.layer, hidden, self._named, lambda part, named: self.layer.call_plain(part, **named)
            )
        dropouts = active_dropouts(self.layer.parts.dropouts)
        # A dropout's mask depends on the dtype in which it is drawn: stock's, unless masks are drawn for parts anyway.
        is_tiled = 0 < self._tile_tokens < hidden.shape[:-1].numel()
        self._are_inputs_cast = bool(dropouts) and not self.is_cut and not is_tiled
        return dropouts

    def _run_pieces(
        self, hidden: torch.Tensor, trainables: tuple[torch.Tensor, ...], groups: Sequence[Sequence[Piece]]
    ) -> tuple[torch.Tensor, ...]:
        """The forward on some pieces at a time; outputs of the whole batch."""
        whole: list[torch.Tensor] = []
        for group in groups:
            part = Piece(group[0].begin, group[-1].end)
            with nullcontext() if self._draws is None else self._draws.drawing(group):
                if len(groups) == 1:
                    return self.run(hidden, trainables)
                outputs = self.run(hidden[part.begin : part.end], trainables, part)
            if not whole:
                whole = [o.new_empty((self._batch_size, *o.shape[1:])) for o in outputs]
            for target, output in zip(whole, outputs, strict=True):
                target[part.begin : part.end] = output
        return tuple(whole)

    @contextmanager
    def _casts_entered(self, trainables: Sequence[torch.Tensor]) -> Iterator[JointCasts]:
        """Has the layer cast together, or not at all, what autocast and adapters would cast one by one."""
        dtype = self._autocast.half_dtype(self.device)
        casts = JointCasts(self.layer.parts.linears, self._trainable_slots, trainables, dtype)
        with self._casts_entered_again(casts):
            yield casts

    @contextmanager
    def _casts_entered_again(self, casts: JointCasts) -> Iterator[None]:
        """The same with casts that are there."""
        inputs, is_on = self.options.input_casts, self._autocast.half_dtype(self.device) is not None
        leaves_out = inputs is not None and is_on and not self._are_inputs_cast
        with (
            casts.entered(),
            inputs.left_out(self.layer.parts.input_casters) if inputs and leaves_out else nullcontext(),
        ):
            yield

    @property
    def is_cut(self) -> bool:
        """Whether the visit is cut into pieces."""
        return len(self._pieces) > 1

    def gradients(
        self, hidden: torch.Tensor, trainables: tuple[torch.Tensor, ...], grad_outputs: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """Differentiates the visit: its kept graph, once, or a recompute.

        Args:
            hidden: Hidden states, detached; whether it needs a gradient says whether one is computed.
            trainables: Detached aliases that need a gradient.
            grad_outputs: Gradients of the tensor outputs, None for one that nobody used.

        Returns:
            The gradient of the hidden states (None if not needed), then those of the trainable tensors.
        """
        graph, self._graph = self._graph, None
        kept, layer_idx = self.options.kept, self.layer.layer_idx
        if graph is None or graph.proofs is not kept.proofs(layer_idx):  # modules or weights have changed since
            return self._recomputed(hidden, trainables, grad_outputs)
        try:
            grads = self._graph_gradients(graph, grad_outputs)
        except WrittenError:
            kept.refuse(layer_idx, "has kept activations that were written to in place after its forward")
            return self._recomputed(hidden, trainables, grad_outputs)
        if graph.is_proven:
            return grads
        again = self._recomputed(hidden, trainables, grad_outputs)
        if not kept.agree(layer_idx, grads, again):
            return again
        graph.proofs.add(self._trained)
        return grads

    def _recomputed(
        self, hidden: torch.Tensor, trainables: tuple[torch.Tensor, ...], grad_outputs: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """The gradients by a recompute; the arguments are those of `gradients`.

        Raises:
            RuntimeError: Other adapters are merged, active or disabled than in the forward.
        """
        if self._adapter_state() != self._adapters:
            raise RuntimeError(
                f"layer {self.layer.layer_idx}: adapters were merged, unmerged, switched, enabled or disabled between "
                "the forward and its backward, which computes the layer again. Change them before the forward"
            )
        modes = zip(self._modules, self._training, strict=True)
        with (
            changed([(module.__dict__, "training", was) for module, was in modes if module.training != was]),
            self._rng.replayed(),
            self._hooks.entered(),
            self._casts_entered(trainables) as casts,
        ):

            def of_part(
                part: torch.Tensor, grad_outputs: tuple[torch.Tensor | None, ...], piece: Piece | None
            ) -> list[torch.Tensor | None]:
                with self._autocast.entered():
                    outputs = self.run(part, trainables, piece)
                return _differentiated(outputs, grad_outputs, part, trainables, casts)

            if not self.is_cut:
                return of_part(hidden, grad_outputs, None)

            def of_piece(piece: Piece, grad_outputs: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
                part = hidden[piece.begin : piece.end].detach().requires_grad_(hidden.requires_grad)
                replaying = nullcontext() if self._draws is None else self._draws.replaying(piece, self.layer.layer_idx)
                with replaying:
                    return _with_hidden(of_part(part, grad_outputs, piece), part)

            return self._joined(grad_outputs, of_piece)

    def _graph_gradients(
        self, graph: KeptGraph, grad_outputs: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """The gradients by the kept graphs, each of which is let go of when it has been differentiated.

        Raises:
            WrittenError: Something that they need was written to.
        """
        registered = [(registry, name, registry[name]) for registry, name in self._trainable_slots]
        graph.memory.lend_again(self.layer.lent())
        try:
            # What runs again in a backward, such as a checkpoint in the layer, finds what it found in the forward.
            again = self._casts_entered_again(graph.casts)
            with self._hooks.entered(), self.layer.swapped(registered, graph.trainables), again:

                def of_next(grad_outputs: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
                    part, outputs = graph.parts.pop(0)
                    grads = _differentiated(outputs, grad_outputs, part, graph.trainables, graph.casts)
                    return _with_hidden(grads, part) if self.is_cut else grads

                if not self.is_cut:
                    return of_next(grad_outputs)
                return self._joined(grad_outputs, lambda _, parts: of_next(parts))
        finally:
            graph.memory.lend_again(None)

    def _joined(
        self,
        grad_outputs: tuple[torch.Tensor | None, ...],
        of_piece: Callable[[Piece, tuple[torch.Tensor | None, ...]], list[torch.Tensor | None]],
    ) -> list[torch.Tensor | None]:
        """The gradients of all pieces: joined for the hidden states, summed for the trainable tensors."""
        hidden_grads: list[torch.Tensor] = []  # joined at the end: the last piece's peak is without its own part
        sums: list[torch.Tensor | None] = [None] * len(self._trainable_slots)
        for piece in self._pieces:
            parts = tuple(None if g is None else g[piece.begin : piece.end] for g in grad_outputs)
            part_grad, *grads = of_piece(piece, parts)
            if part_grad is not None:
                hidden_grads.append(part_grad)
            sums = summed(sums, grads)
        return [torch.cat(hidden_grads) if hidden_grads else None, *sums]

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


def _differentiated(
    outputs: tuple[torch.Tensor, ...],
    grad_outputs: tuple[torch.Tensor | None, ...],
    hidden: torch.Tensor,
    trainables: tuple[torch.Tensor, ...],
    casts: JointCasts,
) -> list[torch.Tensor | None]:
    """The gradient of the hidden states (None if not needed), then those of the trainable tensors."""
    pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if o.requires_grad and g is not None]
    if not pairs:
        return [None] * (1 + len(trainables))
    leaves = ([hidden] if hidden.requires_grad else []) + [*trainables, *casts.halves]
    grads: list[torch.Tensor | None] = list(
        torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    )
    hidden_grad = grads.pop(0) if hidden.requires_grad else None
    num_alone = len(trainables)
    return [hidden_grad, *casts.joined(grads[:num_alone], grads[num_alone:])]


def _with_hidden(grads: list[torch.Tensor | None], hidden: torch.Tensor) -> list[torch.Tensor | None]:
    """The same with zeros for hidden states that need a gradient and were not used: a piece is a part of a whole."""
    first, *others = grads
    return [torch.zeros_like(hidden) if first is None and hidden.requires_grad else first, *others]


class Recompute(torch.autograd.Function):
    """Forward without a graph; backward leases the layer again, recomputes with a graph, and differentiates that."""

    @staticmethod
    def forward(ctx: Any, visit: Visit, hidden: torch.Tensor, *trainables: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.visit = visit
        ctx.set_materialize_grads(False)  # an output that nobody used must give no gradient, not zeros
        boundaries = visit.options.boundaries
        # A layer's input is contiguous; one that is not would come back with other strides, so it stays.
        # One of a kept graph stays too: the graph holds it.
        leaves = boundaries.in_use and not visit.is_kept and hidden.is_contiguous() and hidden.numel() > 0
        ctx.boundaries = boundaries if leaves else None
        saved = boundaries.keep(hidden) if leaves else hidden
        ctx.save_for_backward(saved, *trainables)
        with visit.layer.weights(Direction.FORWARD, expect_backward=True):
            if visit.is_kept:
                outputs = visit.run_kept(hidden, trainables, ctx.needs_input_grad[1])
            else:
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
        surroundings = Surroundings(visit.device)
        try:
            with visit.layer.weights(Direction.BACKWARD), torch.enable_grad():
                grads = visit.gradients(hidden, aliases, grad_outputs)
        except BaseException:
            surroundings.put_back()
            visit.layer.undo_interrupted_swaps()
            raise
        return (None, *grads)
