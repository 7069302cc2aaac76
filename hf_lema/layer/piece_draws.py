"""Random numbers of a forward that computes on several pieces of a batch at once, as each piece's recompute needs them.

Responsibility: drawing dropout's masks piece by piece inside one forward, remembering from which random state, and
drawing them again for one piece. Knows nothing of layers' visits.

What a generator gives depends on the size of what is asked for, so a mask for the whole batch is not made of the masks
of its pieces. Dropout modules are therefore called once for each piece, in a forward whose other operators see all of
them. A layer that draws in any other way (dropout on attention weights inside a function, noise of a router) is found
by the state of the generator, which is then not where dropout left it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hf_lema.layer.micro_batch import Piece
from hf_lema.layer.replay import generator_of
from hf_lema.layer.swaps import changed

_ALIGNMENT_BYTES = 64
"""A kernel for random numbers may go through misaligned memory in another order."""


class DrawsElsewhereError(Exception):
    """The layer draws random numbers that are not the dropout of a known batch; it must be computed piece by piece."""


def active_dropouts(dropouts: Iterable[nn.Dropout]) -> tuple[nn.Dropout, ...]:
    """Those that draw now."""
    return tuple(dropout for dropout in dropouts if dropout.training and dropout.p > 0)


class PieceDraws:
    """The random states of one visit.

    Args:
        device: Where the layer computes.
        dropouts: Of the layer, those that draw.
        is_verified: Whether the layer is known to draw by nothing else; it is then not checked.
    """

    def __init__(self, device: torch.device, dropouts: Sequence[nn.Dropout], is_verified: bool = False) -> None:
        self._generator = generator_of(device)
        self._others = [] if device.type == "cpu" else [torch.default_generator]
        self._dropouts = tuple(dropouts)
        self._is_verified = is_verified
        self._drawn: dict[int, list[tuple[torch.Size, torch.Tensor]]] = {}
        self._left: torch.Tensor | None = None

    @contextmanager
    def drawing(self, pieces: Sequence[Piece]) -> Iterator[None]:
        """Draws for each of some pieces that follow one another and are computed together inside the block.

        Raises:
            DrawsElsewhereError: Something else drew; the forward must be done again.
        """
        before = [generator.get_state() for generator in self._others]
        self._left = self._generator.get_state()
        for piece in pieces:
            self._drawn[piece.begin] = []
        if any(dropout.inplace for dropout in self._dropouts):
            raise DrawsElsewhereError
        with self._replaced(lambda dropout: functools.partial(self._draw, dropout, pieces)):
            yield
        self._refuse_others(self._generator.get_state())
        if not all(torch.equal(a, g.get_state()) for a, g in zip(before, self._others, strict=True)):
            raise DrawsElsewhereError

    def _draw(self, dropout: nn.Dropout, pieces: Sequence[Piece], hidden: torch.Tensor) -> torch.Tensor:
        first, end = pieces[0].begin, pieces[-1].end
        # With two dimensions the first may be tokens of an expert, however many they are.
        if hidden.dim() < 3 or hidden.shape[0] != end - first:
            raise DrawsElsewhereError
        state = self._generator.get_state()
        self._refuse_others(state)
        dropped = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        for piece in pieces:
            part = _plain(hidden[piece.begin - first : piece.end - first])
            self._drawn[piece.begin].append((part.shape, state))
            dropped[piece.begin - first : piece.end - first] = torch.native_dropout(part, dropout.p, True)[0]
            state = self._generator.get_state()
        self._left = state
        return dropped

    def _refuse_others(self, state: torch.Tensor) -> None:
        if not self._is_verified and self._left is not None and not torch.equal(state, self._left):
            raise DrawsElsewhereError

    @contextmanager
    def replaying(self, piece: Piece, layer_idx: int) -> Iterator[None]:
        """Draws inside the block what was drawn for the piece.

        Args:
            piece: One of those given to `drawing`.
            layer_idx: For messages.

        Raises:
            RuntimeError: Another number or shape of tensors was dropped than in the forward.
        """
        drawn = iter(self._drawn[piece.begin])

        def draw(dropout: nn.Dropout, hidden: torch.Tensor) -> torch.Tensor:
            shape, state = next(drawn, (None, None))
            if state is None or hidden.shape != shape:
                raise RuntimeError(
                    f"layer {layer_idx}: dropout of {tuple(hidden.shape)} in the recompute, {shape and tuple(shape)} "
                    "in the forward: the layer computed something else"
                )
            dropped: torch.Tensor = _Redrawn.apply(  # type: ignore[no-untyped-call]
                _plain(hidden), dropout.p, self._generator, state
            )
            return dropped

        with self._replaced(lambda dropout: functools.partial(draw, dropout)):
            yield
        if next(drawn, None) is not None:
            raise RuntimeError(f"layer {layer_idx}: the recompute dropped fewer tensors than the forward")

    @contextmanager
    def _replaced(self, stand_in: Callable[[nn.Dropout], Any]) -> Iterator[None]:
        with changed((dropout.__dict__, "forward", stand_in(dropout)) for dropout in self._dropouts):
            yield


class _Redrawn(torch.autograd.Function):
    """Dropout from a known random state. Its backward drops the gradient from the same state and needs no mask kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, probability: float, generator: torch.Generator, state: torch.Tensor
    ) -> torch.Tensor:
        ctx.again = probability, generator, state
        generator.set_state(state)
        return torch.native_dropout(hidden, probability, True)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        probability, generator, state = ctx.again
        generator.set_state(state)
        return torch.native_dropout(_plain(gradient), probability, True)[0], None, None, None


def _plain(hidden: torch.Tensor) -> torch.Tensor:
    """The tensor in the order and alignment that its masks depend on."""
    is_aligned = hidden.storage_offset() * hidden.element_size() % _ALIGNMENT_BYTES == 0
    return hidden if is_aligned and hidden.is_contiguous() else hidden.clone(memory_format=torch.contiguous_format)
