"""Counts what PyTorch operators would take on a CUDA device: bytes alive, operations, memory traffic, kernels.

Responsibility: `ByteMeter`, which counts, and `CudaBehaviour`, which has tensors on the CPU take the paths that CUDA
tensors take. Both work on real tensors and on fake ones (``FakeTensorMode``), which have no data. Knows no models.

``torch.distributed._tools.mem_tracker`` counts the same way, but hooks every module and wants its parameters known
beforehand; and fake tensors that say they are on CUDA have no autograd in a build of PyTorch without CUDA.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nn_functional
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

ALLOCATION_BYTES = 512
"""Every allocation on a CUDA device is rounded up to it (``kMinBlockSize`` of PyTorch's caching allocator)."""

_NO_KERNEL = ("aten.empty", "aten.new_empty", "aten.detach", "aten.lift_fresh", "prim.")
"""Operators that start nothing on the device, besides the views."""

# fmt: off
_TO_FLOAT32 = frozenset({
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt",
    "sinh", "tan", "pow", "softplus", "layer_norm", "group_norm", "norm", "nll_loss", "mse_loss", "l1_loss",
    "smooth_l1_loss", "kl_div", "cross_entropy", "softmax", "log_softmax", "cumsum", "cumprod", "prod", "sum",
    "logsumexp",
})
# fmt: on
"""Functions that autocast computes in float32 on CUDA (PyTorch's documentation of ``torch.amp``) and not on a CPU."""


def allocated_bytes(num_bytes: int) -> int:
    """What an allocation of so many bytes takes on a CUDA device."""
    return -(-num_bytes // ALLOCATION_BYTES) * ALLOCATION_BYTES


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Alike pieces of work.

    Attributes:
        num_flops: Floating-point operations of one, as ``torch.utils.flop_counter`` counts them; 0 where it does not.
        num_bytes: Bytes that one reads and writes.
        is_half: Whether it multiplies in two-byte floats.
        count: How many.
    """

    num_flops: int
    num_bytes: int
    is_half: bool
    count: int


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What was counted over a stretch of code.

    Attributes:
        peak_bytes: Most bytes alive at a time, above those alive at its beginning.
        kept_bytes: Bytes alive at its end, above the same.
        work: The kernels that it starts.
    """

    peak_bytes: int
    kept_bytes: int
    work: tuple[Kernels, ...]


class ByteMeter(TorchDispatchMode):
    """Counts what operators allocate, by the life of storages, and what they compute.

    A storage counts from the operator that makes it until its last tensor is gone. What a kernel takes inside (a
    workspace) is not seen.

    Args:
        is_counted: Whether a tensor is the device's. By default a fake one is: real ones beside them are the host's,
            such as a saved random state.
    """

    def __init__(self, is_counted: Callable[[torch.Tensor], bool] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_counted = is_counted or (lambda tensor: isinstance(tensor, FakeTensor))
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._live_bytes = 0
        self._peak_bytes = 0
        self._work: Counter[tuple[int, int, bool]] = Counter()

    @contextmanager
    def measured(self) -> Iterator[list[Measure]]:
        """Counts inside the block; the list has its one measure afterwards."""
        measures: list[Measure] = []
        begin_bytes = self._peak_bytes = self._live_bytes
        self._work.clear()
        with self:
            yield measures
        work = tuple(
            Kernels(num_flops=flops, num_bytes=num_bytes, is_half=is_half, count=count)
            for (flops, num_bytes, is_half), count in self._work.items()
        )
        peak_bytes, kept_bytes = self._peak_bytes - begin_bytes, self._live_bytes - begin_bytes
        measures.append(Measure(peak_bytes=peak_bytes, kept_bytes=kept_bytes, work=work))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # autograd asks at every node; a third of the time otherwise
        output = func(*args, **kwargs)
        outputs = _tensors(output)
        inputs: list[torch.Tensor] | None = None
        for tensor in outputs:
            if not self._is_counted(tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self._alive:
                continue
            # What an operator was given was there before: a view of a weight is no allocation.
            inputs = _tensors((args, kwargs)) if inputs is None else inputs
            if all(storage._cdata != given.untyped_storage()._cdata for given in inputs):
                self._count(storage)
        if not func.is_view and not str(func).startswith(_NO_KERNEL):
            self._note_work(func, args, kwargs, output, outputs)
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, allocated_bytes(storage.nbytes())

        def forget(_: object) -> None:
            del self._alive[key]
            self._live_bytes -= num_bytes

        self._alive[key] = weakref.ref(storage, forget)
        self._live_bytes += num_bytes
        self._peak_bytes = max(self._peak_bytes, self._live_bytes)

    def _note_work(self, func: Any, args: Any, kwargs: Any, output: Any, outputs: list[torch.Tensor]) -> None:
        inputs = _tensors((args, kwargs))
        counted = flop_registry.get(func.overloadpacket)
        shaped = _with_all_heads(args) if "scaled_dot_product" in str(func) else args
        num_flops = 0 if counted is None else int(counted(*shaped, **kwargs, out_val=output))
        if _is_causal(func, args, kwargs):
            num_flops //= 2  # fused attention skips what the mask hides; the counter does not know
        is_half = bool(num_flops) and all(t.element_size() == 2 for t in inputs if t.is_floating_point())
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in inputs + outputs)
        self._work[num_flops, num_bytes, is_half] += 1


def _with_all_heads(args: Sequence[Any]) -> list[Any]:
    """Arguments of attention, keys and values of grouped heads replaced by their shapes with all heads.

    Up to PyTorch 2.11 the counter refuses fewer heads of keys than of queries.
    """
    fours = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 4]
    num_heads = max((arg.shape[1] for arg in fours), default=0)
    return [
        torch.Size((arg.shape[0], num_heads, *arg.shape[2:])) if any(arg is four for four in fours) else arg
        for arg in args
    ]


def _is_causal(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator is called with its argument ``is_causal`` set."""
    names = [argument.name for argument in func._schema.arguments]
    if "is_causal" not in names:
        return False
    place = names.index("is_causal")
    return bool(args[place] if place < len(args) else kwargs.get("is_causal", False))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class _UnpackedLinear(torch.autograd.Function):
    """A linear layer whose weight exists only while it is multiplied with, as bitsandbytes' 4-bit layers do it."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return nn_functional.linear(hidden, torch.empty_like(weight, dtype=hidden.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ torch.empty_like(weight, dtype=grads[0].dtype), None, None


class CudaBehaviour(TorchFunctionMode):
    """Has functions called inside do with CPU tensors what they do with CUDA tensors, as far as memory goes.

    Dropout keeps a mask of one byte an element, attention is one fused kernel that saves the logarithms of its sums,
    autocast goes up to float32 where it does on CUDA.

    Args:
        has_flash: Whether the card has flash attention (compute capability 8.0); with a mask, or without it, attention
            is the memory-efficient kernel.
        packed: Ids of weights of linear layers that are at rest in 4 bits.
    """

    def __init__(self, has_flash: bool, packed: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self._has_flash = has_flash
        self._packed = packed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn_functional.dropout:
            return _dropout(*args, **kwargs)
        if func is nn_functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is nn_functional.linear and id(args[1]) in self._packed:
            return self._unpacked(*args, **kwargs)
        if torch.is_autocast_enabled("cpu") and getattr(func, "__name__", "") in _TO_FLOAT32:
            args = tuple(a.float() if _is_half(a) else a for a in args)
        return func(*args, **kwargs)

    def _unpacked(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            hidden = hidden.to(torch.get_autocast_dtype("cpu"))
        with torch.autocast("cpu", enabled=False):
            output: torch.Tensor = _UnpackedLinear.apply(hidden, weight, bias)  # type: ignore[no-untyped-call]
        return output

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """What ``_fused_sdp_choice`` of ATen's CUDA part picks: flash without a mask, else memory-efficient.

        Grouped queries without flash fall to the math kernel, which holds the whole matrix of scores in float32:
        the memory-efficient kernel does not take them (``scaled_dot_product_attention``'s documentation).
        """
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        is_half = query.dtype in (torch.float16, torch.bfloat16)
        output: torch.Tensor
        if self._has_flash and is_half and attn_mask is None and query.shape[-1] <= 256:
            output = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
            return output
        if enable_gqa and key.shape[1] != query.shape[1]:
            output = aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
            )[0]
            return output
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
        output = aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]
        return output


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    if not training or not 0.0 < p < 1.0:
        return nn_functional.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def behaving(forward: Callable[..., Any], behaviour: CudaBehaviour) -> Callable[..., Any]:
    """A forward that behaves as on CUDA wherever it is called, in a recompute too, which runs in autograd's thread."""

    @functools.wraps(forward)
    def called(*args: Any, **kwargs: Any) -> Any:
        with behaviour:
            return forward(*args, **kwargs)

    return called
