"""Which matrix products of a layer nobody reads, told from the operators of one forward without data.

Responsibility: `find_unread`. It finds on tensors without data what `hf_lema.layer.unread_products` finds by trial on
real ones. Knows no models.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_lema.layer.swaps import changed
from hf_lema.layer.unread_products import MAX_CANDIDATES, product_shape

aten = torch.ops.aten

_HAND_ON = frozenset(
    {
        aten.add.Tensor,
        aten.add_.Tensor,
        aten.cat.default,
        aten.clone.default,
        aten.detach.default,
        aten.native_dropout.default,
        aten.sub.Tensor,
        aten._to_copy.default,
        aten._unsafe_view.default,
        torch.ops.prim.device.default,  # asked of tensors without data
    }
)
"""Operators whose backward reads none of the values that they are given, views apart (PyTorch's derivatives.yaml)."""

_SCALE = frozenset({aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor, aten.div_.Tensor})
"""The same, where the other factor is a number."""


class _Watch(TorchDispatchMode):
    """Follows products, and what is made of them, until an operator reads them.

    Attributes:
        maker: Index of the matrix whose product is being made.
        unread: Indices of the matrices whose products nobody has read.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.maker: int | None = None
        self.unread: set[int] = set()
        self._made_of: dict[int, tuple[weakref.ref[torch.UntypedStorage], set[int]]] = {}

    def making(self, index: int, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the forward of a matrix."""
        self.maker = index
        try:
            return plain(*args, **kwargs)
        finally:
            self.maker = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        made_of = {index for tensor in _tensors((args, kwargs)) for index in self._products_in(tensor)}
        hands_on = func in _HAND_ON or func.is_view or (func in _SCALE and not isinstance(args[1], torch.Tensor))
        if not hands_on:
            self.unread -= made_of
            made_of = set()
        if self.maker is not None and product_shape(func, args) is not None:
            self.unread.add(self.maker)
            made_of = {self.maker}
        if made_of:
            for tensor in _tensors(output):
                self._follow(tensor, made_of)
        return output

    def _products_in(self, tensor: torch.Tensor) -> set[int]:
        found = self._made_of.get(tensor.untyped_storage()._cdata)
        return set() if found is None else found[1]

    def _follow(self, tensor: torch.Tensor, made_of: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, known = storage._cdata, self._products_in(tensor)
        reference = weakref.ref(storage, lambda _: self._made_of.pop(key, None))
        self._made_of[key] = (reference, known | made_of)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def find_unread(matrices: Sequence[nn.Module], forward: Callable[[], object]) -> tuple[int, ...]:
    """The matrices whose products no backward would read; none where the layer has too many to try.

    Args:
        matrices: Modules that ``forward`` calls.
        forward: A forward of their layer.

    Returns:
        Their indices.
    """
    if len(matrices) > MAX_CANDIDATES:
        return ()
    watch = _Watch()
    calls = [functools.partial(watch.making, index, matrix.forward) for index, matrix in enumerate(matrices)]
    stand_ins = [(matrix.__dict__, "forward", call) for matrix, call in zip(matrices, calls, strict=True)]
    with changed(stand_ins), torch.no_grad(), watch:
        forward()
    return tuple(sorted(watch.unread))
