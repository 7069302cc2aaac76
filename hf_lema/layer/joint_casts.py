"""The casts of a visit's trainable matrices to autocast's dtype, made together.

Responsibility: which linears they are for, the casts, the way back of their gradients. Knows nothing of visits.

Under autocast every linear casts its own weight, and autograd casts every gradient back: with an adapter on all seven
linears of a Llama layer 14 kernels each way, where starting a kernel takes longer than running it. Here one operator
casts all of them, once for all pieces of a visit, and one casts the gradients back. The numbers are autocast's: it too
casts a weight once for all its uses, and sums their gradients in that dtype before it casts the sum.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as nn_functional
from torch import nn

from hf_lema.layer.swaps import changed


def plain_linears(modules: Iterable[nn.Module]) -> dict[int, nn.Linear]:
    """Linears that compute as ``nn.Linear`` does, by the identity of their parameters' registry."""
    return {id(module._parameters): module for module in modules if type(module) is nn.Linear}


class JointCasts:
    """Casts of the float32 weights of linears among some trainable tensors.

    Args:
        linears: As `plain_linears` gives them.
        slots: (registry, name) of each trainable tensor.
        trainables: The tensors.
        dtype: Autocast's; None where it is off: there is nothing to cast then.

    Attributes:
        halves: The casts; they need a gradient if gradients are on.
    """

    def __init__(
        self,
        linears: Mapping[int, nn.Linear],
        slots: Sequence[tuple[dict[str, Any], str]],
        trainables: Sequence[torch.Tensor],
        dtype: torch.dtype | None,
    ) -> None:
        found = [] if dtype is None else list(zip(slots, trainables, strict=True))
        self._places = [
            place
            for place, ((registry, name), tensor) in enumerate(found)
            if name == "weight"
            and tensor.dtype is torch.float32
            and (linear := linears.get(id(registry))) is not None
            and "forward" not in linear.__dict__
        ]
        self._linears = [linears[id(slots[place][0])] for place in self._places]
        self.halves: list[torch.Tensor] = []
        if self._places:
            with torch.no_grad():
                wide = [trainables[place] for place in self._places]
                self.halves = [torch.empty_like(tensor, dtype=dtype) for tensor in wide]
                torch._foreach_copy_(self.halves, wide)
            if torch.is_grad_enabled():
                for half in self.halves:
                    half.requires_grad_()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Has the linears use the casts inside the block."""
        pairs = zip(self._linears, self.halves, strict=True)
        with changed((linear.__dict__, "forward", functools.partial(_linear, linear, half)) for linear, half in pairs):
            yield

    def joined(
        self, gradients: list[torch.Tensor | None], half_gradients: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """The gradients of the trainable tensors.

        Args:
            gradients: Theirs where they were used by themselves.
            half_gradients: Those of `halves`.
        """
        there = [(place, half) for place, half in zip(self._places, half_gradients, strict=True) if half is not None]
        if not there:
            return gradients
        halves = [half for _, half in there]
        wide = [torch.empty_like(half, dtype=torch.float32) for half in halves]
        with torch.no_grad():
            torch._foreach_copy_(wide, halves)
        for (place, _), gradient in zip(there, wide, strict=True):
            alone = gradients[place]
            gradients[place] = gradient if alone is None else alone + gradient
        return gradients


def _linear(linear: nn.Linear, half: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return nn_functional.linear(hidden, half, linear._parameters["bias"])


def summed(sums: list[torch.Tensor | None], more: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Two pieces' gradients added, None where neither has one."""
    total = [b if a is None else a for a, b in zip(sums, more, strict=True)]
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(sums, more, strict=True)) if a is not None and b is not None]
    if pairs:
        added: Sequence[torch.Tensor] = torch._foreach_add([a for _, a, _ in pairs], [b for *_, b in pairs])
        for (i, *_), tensor in zip(pairs, added, strict=True):
            total[i] = tensor
    return total
