"""Leaving out, in a recompute, the matrix products whose values nobody reads.

Responsibility: finding them by trial, and having them not computed. Knows no visits and no architectures.

A recompute runs a layer's forward for its graph; its output is dropped. The backward reads what autograd saved, and of
a product that is only added to something (the residual, an adapter's own product) nothing is saved. In a Llama layer
that is so for the last projection of the feed-forward part: 22 % of what the projections multiply. Stock checkpointing
computes it. Where a norm follows (Gemma 2), or a factor that trains, the values are read.

Note [trial]: a recompute that has a large number instead of one product gives the gradients of the real one only if
nobody reads it. What is found so is tried together once more, with NaN, at every layer. NaN stays in its place from
then on: who would read it after all gets no plausible gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._ops import OpOverload
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lema.layer.kept_graph import are_close
from hf_lema.layer.swaps import changed

MEASURED_ON = ("cpu",)
"""Types of devices on which products are left out. On a GPU neither memory nor time was measured yet."""

MAX_CANDIDATES = 16
"""Matrices of a layer that are tried one by one; with more (experts, each with its own), none is left out."""

_LARGE = 8192.0
"""Finite in float16. NaN would do, but where it is read it may become an index."""

_NUM_SAMPLED = 4096
"""Least number of elements of a gradient that two runs are compared in, besides its norm; all of a smaller one."""

_Gradients = list[torch.Tensor | None]


def matrices_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that are one matrix, with or without a bias: ``nn.Linear``, GPT-2's ``Conv1D``, 4-bit linears."""
    return [module for module in modules if _is_matrix(module)]


def _is_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    is_alone = not module._modules and set(module._parameters) <= {"weight", "bias"}
    return weight is not None and is_alone and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _product_shape(func: OpOverload, args: Sequence[Any]) -> tuple[int, ...] | None:
    """Shape of what an operator gives, if that is the product of a tensor and a weight; else None."""
    if func is torch.ops.aten.mm.default:
        return args[0].shape[0], args[1].shape[1]
    if func is torch.ops.aten.addmm.default:
        return args[1].shape[0], args[2].shape[1]
    if func.namespace == "bitsandbytes" and func._opname == "gemm_4bit":
        return *args[0].shape[:-1], args[2][0]
    return None


class _Without(TorchDispatchMode):
    """A number instead of every product inside; autograd, which comes first, sees none of it."""

    def __init__(self, stand_in: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stand_in = stand_in

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shape = _product_shape(func, args) if isinstance(func, OpOverload) else None
        return func(*args, **kwargs or {}) if shape is None else args[0].new_full(shape, self._stand_in)


def _without(stand_in: float, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Without(stand_in):
        return plain(*args, **kwargs)


@contextmanager
def left_out(modules: Iterable[nn.Module], stand_in: float = torch.nan) -> Iterator[None]:
    """Has matrices give a number instead of their products inside the block."""
    with changed((m.__dict__, "forward", functools.partial(_without, stand_in, m.forward)) for m in modules):
        yield


class UnreadProducts:
    """Finds the matrices of layers whose products nobody reads; shared by all layers of a model."""

    def __init__(self) -> None:
        self._hints: dict[tuple[Hashable, int], tuple[int, ...]] = {}

    @staticmethod
    def may_be_left_out(device: torch.device) -> bool:
        """Whether nobody watches every module, or every gradient, on a device where leaving out was measured."""
        watched = module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks
        return device.type in MEASURED_ON and not watched and not torch.is_anomaly_enabled()

    def find(
        self, kind: Hashable, matrices: Sequence[nn.Module], gradients: Callable[[], _Gradients]
    ) -> tuple[tuple[int, ...] | None, _Gradients]:
        """Tries a layer.

        One run's gradients are held at a time, so that trials take no more memory than any recompute.

        Args:
            kind: What it has in common with layers of which the same may be expected.
            matrices: Its matrices.
            gradients: Gives the gradients of one visit by a recompute, every time that it is called.

        Returns:
            Indices of matrices, and the gradients with every product computed. None for the indices where gradients
            say nothing: they are not finite, as those of a loss scaled too high, or all 0, as those of masked tokens.
        """

        def traits(indices: Sequence[int], stand_in: float = torch.nan) -> list[_Traits | None]:
            with left_out([matrices[index] for index in indices], stand_in):
                return _traits(gradients())

        key = (kind, len(matrices))
        hint = self._hints.get(key)
        tried = traits(hint) if hint else None
        grads = gradients()
        real = _traits(grads)
        norms = [float(of_one.norm) for of_one in real if of_one is not None]
        if not all(math.isfinite(norm) for norm in norms) or not any(norms):
            return None, grads
        if hint is not None and (tried is None or _are_alike(tried, real)):
            return hint, grads
        del grads
        candidates = range(len(matrices)) if len(matrices) <= MAX_CANDIDATES else ()
        found = tuple(index for index in candidates if _are_alike(traits([index], _LARGE), real))
        if found and not _are_alike(traits(found), real):
            found = ()
        self._hints[key] = found
        return found, gradients()


class _Traits(NamedTuple):
    """What tells one gradient from another in little memory."""

    norm: torch.Tensor
    sample: torch.Tensor


def _traits(grads: _Gradients) -> list[_Traits | None]:
    return [None if grad is None else _traits_of(grad) for grad in grads]


def _traits_of(grad: torch.Tensor) -> _Traits:
    dtype = torch.float64 if grad.device.type == "cpu" else torch.float32
    flat = grad.detach().flatten()
    return _Traits(torch.linalg.vector_norm(flat, dtype=dtype), flat[:: max(1, flat.numel() // _NUM_SAMPLED)].clone())


def _are_alike(tried: Sequence[_Traits | None], real: Sequence[_Traits | None]) -> bool:
    if [a is None for a in tried] != [b is None for b in real]:
        return False
    flat = [[part for of_one in both if of_one is not None for part in of_one] for both in (tried, real)]
    return are_close(*flat)
