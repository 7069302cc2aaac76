"""Cutting one visit of a layer along the batch.

Responsibility: which arguments are cut, and the proof that a layer class may be. Knows nothing of weights or autograd.

The layer crosses the bus once and computes on a few sequences at a time, forward and backward, so that its activations
are those of a piece. Without dropout the outputs differ from the uncut visit only by the kernels' choice for another
batch size, and adapter gradients by the order in which the pieces are summed.

A forward keeps no graph and takes less memory for the whole batch than a backward for a part of it, so that it may
compute on several pieces at once: where starting kernels takes the time, each of them starts once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_lema.layer.swaps import changed

CUT_ARGUMENTS = frozenset(
    {
        "attention_mask",
        "position_ids",
        "position_embeddings",
        "position_embeddings_global",
        "position_embeddings_local",
    }
)
"""Arguments of transformers' decoder layers that are cut where their first of at least two dimensions is the batch."""

WHOLE_ARGUMENTS = frozenset({"cache_position"})
"""Tensors that every piece gets whole."""

MAX_RELATIVE_ERROR = 2e-2
"""Between a cut and an uncut visit when a layer class is checked: far above rounding in bfloat16 (below 1e-2 on an
H100), far below what a wrongly cut mask or position does."""


@dataclass(frozen=True)
class Piece:
    """Sequences ``begin..end`` of a batch."""

    begin: int
    end: int

    def cut(self, value: Any, batch_size: int) -> Any:
        """The piece's part of an argument; arguments without a batch dimension pass whole."""
        if isinstance(value, torch.Tensor):
            return value[self.begin : self.end] if value.dim() >= 2 and value.shape[0] == batch_size else value
        if isinstance(value, (tuple, list)):
            return type(value)(self.cut(item, batch_size) for item in value)
        return value

    def cut_named(self, named: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
        """`cut` for those arguments that are known to be cut."""
        return {name: self.cut(value, batch_size) if name in CUT_ARGUMENTS else value for name, value in named.items()}


class MicroBatches:
    """Decides how visits are cut; shared by all layers of a model.

    Args:
        micro_batch_size: Sequences in a piece; 0 to cut nothing.
        is_verified: Whether every layer class is known to agree; it is then not checked.
        forward_micro_batch_size: Sequences in a forward, which keeps no graph and so has room for more than a backward;
            at least a piece.

    Attributes:
        micro_batch_size: As given; may be changed between steps.
        forward_micro_batch_size: As given; may be changed between steps.
        is_verified: As given.
    """

    def __init__(self, micro_batch_size: int, is_verified: bool = False, *, forward_micro_batch_size: int = 0) -> None:
        self.micro_batch_size = micro_batch_size
        self.forward_micro_batch_size = forward_micro_batch_size
        self.is_verified = is_verified
        self._may_cut: dict[type[nn.Module], bool] = {}
        self._apart: set[type[nn.Module]] = set()

    def pieces(
        self,
        layer: nn.Module,
        hidden: torch.Tensor,
        named: Mapping[str, Any],
        run: Callable[[torch.Tensor, Mapping[str, Any]], Any],
    ) -> list[Piece]:
        """The pieces of a visit, one for the whole batch where it is not cut.

        Args:
            layer: The layer; its class is checked at its first cut visit, with weights on the device.
            hidden: Hidden states, [batch, tokens, hidden].
            named: Its other arguments by name.
            run: Calls the layer's forward with hidden states and arguments.
        """
        batch_size = hidden.shape[0]
        size = self.micro_batch_size
        whole = [Piece(0, batch_size)]
        if not size or batch_size <= size or hidden.dim() != 3 or not _known(named, batch_size):
            return whole
        if type(layer) not in self._may_cut:
            self._may_cut[type(layer)] = self.is_verified or _agrees(layer, hidden, named, run)
        if not self._may_cut[type(layer)]:
            return whole
        return [Piece(begin, min(begin + size, batch_size)) for begin in range(0, batch_size, size)]

    def groups(self, layer: nn.Module, pieces: Sequence[Piece]) -> list[Sequence[Piece]]:
        """The pieces that a forward computes on at once."""
        size = self.forward_micro_batch_size
        if type(layer) in self._apart or size <= self.micro_batch_size:
            num_pieces = 1
        else:
            num_pieces = len(pieces) if size >= pieces[-1].end else size // self.micro_batch_size
        return [pieces[begin : begin + num_pieces] for begin in range(0, len(pieces), num_pieces)]

    def keep_apart(self, layer: nn.Module) -> None:
        """From now on layers of this class compute on one piece at a time in the forward too."""
        self._apart.add(type(layer))


def _known(named: Mapping[str, Any], batch_size: int) -> bool:
    """Whether every argument with tensors is one that is known to be cut or to pass whole; scalars always may."""
    return all(
        tensor.dim() == 0
        or name in WHOLE_ARGUMENTS
        or (name in CUT_ARGUMENTS and _is_batched(name, tensor, batch_size))
        for name, value in named.items()
        for tensor in _tensors(value)
    )


def _is_batched(name: str, tensor: torch.Tensor, batch_size: int) -> bool:
    """Whether the first dimension is the batch, or one for all; positions of several axes have the axes there."""
    if name == "position_ids" and tensor.dim() > 2:
        return False
    return tensor.dim() < 2 or tensor.shape[0] in (1, batch_size)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _agrees(
    layer: nn.Module,
    hidden: torch.Tensor,
    named: Mapping[str, Any],
    run: Callable[[torch.Tensor, Mapping[str, Any]], Any],
) -> bool:
    """Compares two sequences, together and one by one, without dropout."""
    batch_size = hidden.shape[0]

    def outputs(begin: int, end: int) -> list[torch.Tensor]:
        return list(_tensors(run(hidden[begin:end], Piece(begin, end).cut_named(named, batch_size))))

    with changed([(module.__dict__, "training", False) for module in layer.modules()]), torch.no_grad():
        both, *single = outputs(0, 2), outputs(0, 1), outputs(1, 2)
    agrees = all(o.dim() > 0 and o.shape[0] == 2 for o in both) and all(
        o.dim() > 0 and o.shape[0] == 1 for outs in single for o in outs
    )
    if agrees:
        together, apart = both[0].float(), torch.cat([first for first, *_ in single]).float()
        agrees = bool((together - apart).norm() <= MAX_RELATIVE_ERROR * together.norm())
    if not agrees:
        warnings.warn(
            f"{type(layer).__name__} gives other results for a part of the batch; it is not cut into micro-batches",
            stacklevel=2,
        )
    return agrees
