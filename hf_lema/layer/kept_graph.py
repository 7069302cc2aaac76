"""The graph of a forward visit that is kept for the backward, without the memory that its weights were lent in.

Responsibility: which layers keep theirs, the proof that they may, and what autograd saves of lent weights. Knows no
visits.

Note [lent memory]: when the backward comes, the layer's weights lie in another slot, or another layer's lie in theirs.
So of a saved tensor that lies in lent memory only its place there is kept, and the same view of the memory that is lent
to the backward is given back. A custom autograd Function that holds a weight as an attribute goes past this, and would
compute with whatever lies there. So the first kept visit of a layer whose weights move runs on copies of them that are
overwritten at its end, and its gradients are compared with a recompute's. So is the first with another adapter, and the
first after modules, parameters or weights have changed; a graph from before such a change is not used. What this does
not show is such a Function on a path that the compared visit did not take (an expert without tokens).
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from hf_lema.layer.joint_casts import JointCasts
from hf_lema.layer.micro_batch import MAX_RELATIVE_ERROR
from hf_lema.layer.replay import SavingHooks


class KeptLayers:
    """Which layers keep their graphs; shared by all layers of a model.

    Args:
        layers: Their indices.

    Attributes:
        layers: As given; may be changed between steps.
    """

    def __init__(self, layers: Iterable[int] = ()) -> None:
        self.layers = frozenset(layers)
        self._proven: dict[int, set[Hashable]] = {}
        self._refused: set[int] = set()

    def wants(self, layer_idx: int) -> bool:
        """Whether a layer is to keep the graph of its coming visit."""
        return layer_idx in self.layers and layer_idx not in self._refused

    def proofs(self, layer_idx: int) -> set[Hashable]:
        """With which trained tensors a layer's kept graph has given the gradients of a recompute.

        With another adapter other modules compute. Once the layer is forgotten this is another set: a visit from before
        is known by the old one.
        """
        return self._proven.setdefault(layer_idx, set())

    def forget(self, layer_idx: int) -> None:
        """Takes a layer's proofs back: other modules may compute in it now. What was refused stays so."""
        self._proven.pop(layer_idx, None)

    def agree(
        self, layer_idx: int, kept: Sequence[torch.Tensor | None], recomputed: Sequence[torch.Tensor | None]
    ) -> bool:
        """Whether the gradients of a layer's kept visit are those of its recompute.

        Where they differ (at all on the CPU, by more than rounding on a GPU, whose kernels may add in any order) the
        layer is recomputed from now on. Gradients that are not finite, as those of a loss scaled too high, say nothing.
        """
        pairs = [(a, b) for a, b in zip(kept, recomputed, strict=True) if a is not None and b is not None]
        if not all(bool(b.isfinite().all()) for _, b in pairs):
            return False
        are_same_ones = [a is None for a in kept] == [b is None for b in recomputed]
        if not are_same_ones or not all(_is_close(a, b) for a, b in pairs):
            self.refuse(
                layer_idx,
                "gives other gradients from its kept activations than from a recompute (an autograd Function that "
                "holds weights as attributes does)",
            )
            return False
        return True

    def refuse(self, layer_idx: int, reason: str) -> None:
        """From now on the layer is recomputed."""
        if not self._refused:
            warnings.warn(
                f"layer {layer_idx} {reason}; it, and every layer that does so, is recomputed instead of kept",
                stacklevel=2,
            )
        self._refused.add(layer_idx)


def _is_close(kept: torch.Tensor, recomputed: torch.Tensor) -> bool:
    if torch.equal(kept, recomputed):
        return True
    if kept.device.type == "cpu":
        return False
    error = (kept.float() - recomputed.float()).norm()
    return bool(error <= MAX_RELATIVE_ERROR * recomputed.float().norm())


class WrittenError(Exception):
    """A tensor that a kept graph needs was written to in place since it was saved."""


class _Place(NamedTuple):
    """Where a saved tensor lies in lent memory."""

    lent: int  # index of a lent tensor in the same storage
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset_bytes: int  # from where the lent tensor begins


class _Held(NamedTuple):
    """A saved tensor elsewhere. Hooks go past autograd's own check of the version."""

    tensor: torch.Tensor
    version: int


class LentMemory(SavingHooks):
    """What a graph saves, by its place in lent memory where it lies there; see Note [lent memory].

    Args:
        lent: The tensors that are lent while the graph is made.
    """

    def __init__(self, lent: Sequence[torch.Tensor]) -> None:
        super().__init__()
        # By the identity of the storage: tensors without data, of which a plan counts the bytes, have no address.
        self._first_in: dict[int, tuple[int, int]] = {}
        self._num_lent = len(lent)
        for index, tensor in enumerate(lent):
            self._first_in.setdefault(tensor.untyped_storage()._cdata, (index, _begin_bytes(tensor)))
        self._lent: Sequence[torch.Tensor] | None = None

    def lend_again(self, lent: Sequence[torch.Tensor] | None) -> None:
        """Says where the weights are while the graph is differentiated; None when it has been.

        Args:
            lent: In the order in which they were given first.

        Raises:
            WrittenError: Some of them are not lent any more: they were unfrozen.
        """
        if lent is not None and len(lent) != self._num_lent:
            raise WrittenError
        self._lent = lent

    def pack(self, tensor: torch.Tensor) -> _Place | _Held:
        """A place in lent memory, or the tensor where it lies elsewhere."""
        self.num_packed += 1
        # A sparse tensor has no storage, so it lies in none that is lent.
        found = self._first_in.get(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None
        if found is None:
            # Without its history: a node that holds its own output would never be freed.
            held = tensor if tensor.grad_fn is None else tensor.detach()
            return _Held(held, held._version)
        first, begin_bytes = found
        return _Place(first, tensor.dtype, tensor.size(), tensor.stride(), _begin_bytes(tensor) - begin_bytes)

    def unpack(self, saved: _Place | _Held) -> torch.Tensor:
        """The tensor in the memory that is lent now, or the one that was held.

        Raises:
            RuntimeError: Nothing is lent now.
            WrittenError: It was written to since.
        """
        if isinstance(saved, _Held):
            if saved.tensor._version != saved.version:
                raise WrittenError
            return saved.tensor
        if self._lent is None:
            raise RuntimeError(
                "a graph from inside a streamed layer was used outside of the layer's backward, when its weights are "
                "not on the device. Take gradients through the layer's outputs"
            )
        first = self._lent[saved.lent].detach()
        offset = (_begin_bytes(first) + saved.offset_bytes) // saved.dtype.itemsize
        whole = first if first.dtype == saved.dtype else first.view(-1).view(saved.dtype)
        return whole.as_strided(saved.size, saved.stride, offset)


def _begin_bytes(tensor: torch.Tensor) -> int:
    """Where a tensor begins in its storage."""
    return int(tensor.storage_offset()) * tensor.element_size()


@dataclass
class KeptGraph:
    """The graphs of one visit.

    Attributes:
        memory: What they save.
        trainables: Aliases of the trainable tensors, leaves of the graphs.
        casts: Of these.
        proofs: Of its layer when the graph was made; see `KeptLayers.proofs`.
        is_proven: Whether it needs no comparison with a recompute.
        parts: Hidden states, a leaf, and outputs of each piece that has not been differentiated yet.
    """

    memory: LentMemory
    trainables: tuple[torch.Tensor, ...]
    casts: JointCasts
    proofs: set[Hashable]
    is_proven: bool
    parts: list[tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = field(default_factory=list)
